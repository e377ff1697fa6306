"""SSD300 on VGG16 with segmentation infusion heads.

Sources: Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016); Brazil et al., "Illuminating
Pedestrians via Simultaneous Detection & Segmentation" (ICCV 2017) for segmentation infusion: heads
that learn box-shaped masks from the same feature maps, and are left out at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kaist.files import InputError
from ssd.boxes import EXTRA_LAYERS, STRIDES, VARIANCES, Predictions, feature_map_sizes
from ssd.layers import VGG16_STAGES, Detector, L2Norm, conv_relu, stage_outputs, vgg_stage
from ssd.multispectral import MLPD, INSANet

# What a batch carries.
INPUT_CHANNELS = {"lwir": 1, "visible": 3, "mean": 4, "early": 4, "halfway": 4}
IMAGENET_MEAN = (0.485, 0.456, 0.406, 0.449)  # R, G, B, then their mean for LWIR
IMAGENET_STD = (0.229, 0.224, 0.225, 0.226)


class SSD300(Detector):
    """SSD with a VGG16 backbone, six feature maps and optional segmentation infusion heads.

    Args:
        input_mode: "lwir" (1 channel), "visible" (3), "mean" (visible and LWIR averaged into 3),
            "early" (4 channels side by side) or "halfway" (see `HalfwayFusion`). Batches carry
            visible first, LWIR last.
        batch_norm: BatchNorm after each of VGG16's 13 convolutions, as in VGG16-BN.
        width, prior_set, size: as of `Detector`; infusion, infusion_conv: as in `Detector.add_heads`.
        centres: where the priors lie, "even" or "stride", see `make_grids`.
        pixel_mean, pixel_std: (R, G, B, LWIR) of pixels from 0 to 1, subtracted and divided by.

    What a checkpoint from before an argument was added was trained with is its default.
    """

    def __init__(
        self,
        *,
        input_mode: str,
        batch_norm: bool,
        width: float,
        infusion: Sequence[int],
        infusion_conv: bool,
        prior_set: str,
        size: tuple[int, int],
        centres: str = "even",
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(width, prior_set, size)
        self.input_mode, self.centres = input_mode, centres
        scaled = self.scaled
        if input_mode == "halfway":
            streams = [vgg_stage(VGG16_STAGES[0], n, scaled, batch_norm) for n in (3, 1)]
            self.to_conv4_3 = HalfwayFusion(*streams, scaled(512))
        else:
            in_channels = {"early": 4, "lwir": 1}.get(input_mode, 3)
            self.to_conv4_3 = vgg_stage(VGG16_STAGES[0], in_channels, scaled, batch_norm)
        self.to_conv5_3 = vgg_stage(VGG16_STAGES[1], scaled(512), scaled, batch_norm)
        self.conv4_3_norm = L2Norm(scaled(512))
        self.conv6_7 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            *conv_relu(scaled(512), scaled(1024), 3, padding=6, dilation=6),
            *conv_relu(scaled(1024), scaled(1024), 1),
        )
        self.extras = nn.ModuleList()
        map_widths = [scaled(512), scaled(1024)]
        for squeeze, expand, stride, padding in EXTRA_LAYERS:
            narrow = conv_relu(map_widths[-1], scaled(squeeze), 1)
            wide = conv_relu(scaled(squeeze), scaled(expand), 3, stride=stride, padding=padding)
            self.extras.append(nn.Sequential(*narrow, *wide))
            map_widths.append(scaled(expand))

        self.add_heads(map_widths, infusion, infusion_conv)
        if input_mode == "halfway":
            self.to_conv4_3.start_from_mean()

        channels = slice(3, 4) if input_mode == "lwir" else slice(0, INPUT_CHANNELS[input_mode])
        self.add_normalisation(pixel_mean[channels], pixel_std[channels])

    def backbones(self) -> list[list[nn.Module]]:
        first = self.to_conv4_3
        streams = [first.visible, first.lwir] if self.input_mode == "halfway" else [first]
        return [[*stream, *self.to_conv5_3] for stream in streams]

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float, less `pixel_mean` over `pixel_std`; "mean" averages to 3."""
        x = super().normalise(images)
        return (x[:, :3] + x[:, 3:]) / 2 if self.input_mode == "mean" else x

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The six maps the heads read, finest first: 38, 19, 10, 5, 3, 1 for a 300x300 input."""
        conv4_3 = self.to_conv4_3(x)
        finest = self.conv4_3_norm(conv4_3)  # first: the order decides how gradients round
        return [finest, *stage_outputs(self.conv6_7(self.to_conv5_3(conv4_3)), self.extras)]


class HalfwayFusion(nn.Module):
    """Visible and LWIR each in a VGG16 stream up to conv4_3, joined there by a 1x1 convolution.

    Source: Liu et al., "Multispectral Deep Neural Networks for Pedestrian Detection" (BMVC 2016), whose
    halfway fusion joins after conv4 too. (MLPD does not: it runs both streams through all layers and
    joins them at each of six maps.)

    Args:
        visible, lwir: from 3 channels and from 1 to `channels` at an eighth of the resolution.
    """

    def __init__(self, visible: nn.Sequential, lwir: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.visible, self.lwir = visible, lwir
        self.join = nn.Sequential(*conv_relu(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W), visible first -> (N, channels, h, w)."""
        return self.join(torch.cat([self.visible(x[:, :3]), self.lwir(x[:, 3:])], dim=1))

    def start_from_mean(self) -> None:
        """Let the join be the streams' mean, so that pretrained layers after it see what they know."""
        half = torch.eye(self.join[0].out_channels, device="cpu") / 2
        self.join[0].weight.data.copy_(torch.cat([half, half], dim=1)[..., None, None])


def make_network(network: str = "ssd300", **arguments: Any) -> Detector:
    """An untrained network: "ssd300", "mlpd" or "insanet", of that class's arguments."""
    return {"ssd300": SSD300, "mlpd": MLPD, "insanet": INSANet}[network](**arguments)


def build_model(checkpoint: dict[str, Any]) -> Detector:
    """The network of a checkpoint, rebuilt from its own arguments; no weights are downloaded. InputError: the
    weights are not those of such a network."""
    arguments, weights = checkpoint["model_args"], checkpoint["model"]
    try:
        with torch.device("meta"):  # shapes alone: other arguments could take all memory
            make_network(**arguments).load_state_dict(weights, assign=True)
        model = make_network(**arguments)
        model.load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:  # whatever wrong arguments lead to
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise InputError(
            f"the checkpoint's weights do not fit its own model_args ({reason})", "choose another"
        ) from None
    return model


def predict_mirrored(model: Detector, images: Tensor) -> Predictions:
    """What the mirror images of (N, C, H, W) uint8 images say of the images, prior by prior.

    A prior's partner is the prior of the same shape in the column counted from the other side, and
    its offset to the right becomes one to the left. There are no masks.

    The priors of a 300 pixels wide input with centres at strides of 8 have no partners: the 38 cells
    are 304 pixels wide. So the mirror image is padded on its left with the mean colour, up to a
    multiple of the coarsest stride. That shifts the cells by what the priors lack to be symmetric.
    """
    pad = -model.size[1] % STRIDES[-1] if model.centres == "stride" else 0
    filler = model.mean.round().to(images.dtype).expand(images.shape[0], -1, images.shape[2], pad)
    predictions = model(torch.cat([filler, images.flip(3)], dim=3))
    padded_sizes = feature_map_sizes((model.size[0], model.size[1] + pad)) if pad else model.map_sizes
    partners, shifts, first = [], [], 0
    for k, ((h, w), (_, columns)) in enumerate(zip(model.map_sizes, padded_sizes, strict=True)):
        shapes = model.loc_heads[k].out_channels // 4
        places = first + torch.arange(h * columns * shapes, device=images.device)
        partners.append(places.view(h, columns, shapes).flip(1)[:, :w].flatten())
        # Priors that divide the input evenly are symmetric as they are. Filled on the device: a GPU
        # would be waited for by a copy of numbers to it.
        shift = 0.0 if k < len(STRIDES) else pad / model.size[1]
        shifts.append(predictions.loc.new_full((len(partners[-1]),), shift))
        first += len(places)
    partner = torch.cat(partners)
    loc = predictions.loc[:, partner]
    x = torch.cat(shifts) / (VARIANCES[0] * model.priors[:, 2]) - loc[..., 0]
    loc = torch.cat([x.unsqueeze(-1), loc[..., 1:]], dim=-1)
    return Predictions(loc, predictions.conf[:, partner], [])
