"""SSD300 on VGG16 with segmentation infusion heads.

The infusion heads predict box-shaped masks from the detector's feature maps; they are not used at inference.

Sources: Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016); Brazil et al., "Illuminating
Pedestrians via Simultaneous Detection & Segmentation" (ICCV 2017), segmentation infusion.
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

# Channels of a batch's images.
INPUT_CHANNELS = {"lwir": 1, "visible": 3, "mean": 4, "early": 4, "halfway": 4}
IMAGENET_MEAN = (0.485, 0.456, 0.406, 0.449)  # R, G, B, then their mean for LWIR
IMAGENET_STD = (0.229, 0.224, 0.225, 0.226)


class SSD300(Detector):
    """SSD with a VGG16 backbone, six feature maps and optional segmentation infusion heads.

    Args:
        input_mode: "lwir" (1 channel), "visible" (3), "mean" (average of visible and LWIR, 3),
            "early" (4 stacked channels) or "halfway" (see `HalfwayFusion`). The channels of a batch
            are visible first, LWIR last.
        batch_norm: BatchNorm after each of VGG16's 13 convolutions, as in VGG16-BN.
        width, prior_set, size: see `Detector`; infusion, infusion_conv: see `Detector.add_heads`.
        centres: centres of the priors, "even" or "stride", see `make_grids`.
        pixel_mean, pixel_std: (R, G, B, LWIR) for pixels from 0 to 1; normalise the input.

    The defaults are the values of checkpoints older than the argument.
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
        """Normalise (N, C, H, W) uint8 images to float; "mean" averages visible and LWIR to 3 channels."""
        x = super().normalise(images)
        return (x[:, :3] + x[:, 3:]) / 2 if self.input_mode == "mean" else x

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The six feature maps, finest first: 38, 19, 10, 5, 3, 1 cells a side for a 300x300 input."""
        conv4_3 = self.to_conv4_3(x)
        finest = self.conv4_3_norm(conv4_3)  # first, because the order affects rounding of gradients
        return [finest, *stage_outputs(self.conv6_7(self.to_conv5_3(conv4_3)), self.extras)]


class HalfwayFusion(nn.Module):
    """A VGG16 stream up to conv4_3 for each modality, fused by a 1x1 convolution.

    Source: Liu et al., "Multispectral Deep Neural Networks for Pedestrian Detection" (BMVC 2016), whose
    halfway fusion is also after conv4. (MLPD differs: both streams have all layers, fused at each map.)

    Args:
        visible, lwir: streams from 3 channels and 1 channel to `channels`, at 1/8 of the resolution.
    """

    def __init__(self, visible: nn.Sequential, lwir: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.visible, self.lwir = visible, lwir
        self.join = nn.Sequential(*conv_relu(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W), visible first -> (N, channels, h, w)."""
        return self.join(torch.cat([self.visible(x[:, :3]), self.lwir(x[:, 3:])], dim=1))

    def start_from_mean(self) -> None:
        """Initialise the fusion as the mean of the streams, the input that pretrained layers expect."""
        half = torch.eye(self.join[0].out_channels, device="cpu") / 2
        self.join[0].weight.data.copy_(torch.cat([half, half], dim=1)[..., None, None])


def make_network(network: str = "ssd300", **arguments: Any) -> Detector:
    """An untrained network: "ssd300", "mlpd" or "insanet", with the arguments of that class."""
    return {"ssd300": SSD300, "mlpd": MLPD, "insanet": INSANet}[network](**arguments)


def build_model(checkpoint: dict[str, Any]) -> Detector:
    """Rebuild a checkpoint's network from its `model_args` and weights; nothing is downloaded.

    Raises:
        InputError: The weights do not fit the arguments.
    """
    arguments, weights = checkpoint["model_args"], checkpoint["model"]
    try:
        with torch.device("meta"):  # check the shapes first: bad arguments could need all memory
            make_network(**arguments).load_state_dict(weights, assign=True)
        model = make_network(**arguments)
        model.load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:  # bad arguments can raise any type
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        problem = f"the checkpoint's weights do not fit its model_args ({reason})"
        raise InputError(problem, "choose another checkpoint") from None
    return model


def predict_mirrored(model: Detector, images: Tensor) -> Predictions:
    """Predictions from the mirror images of (N, C, H, W) uint8 images, mapped back; without masks.

    Each prior takes the prediction of the prior of the same shape in the mirrored column, with the
    opposite x offset.

    With centres at multiples of the stride, priors are not symmetric: 38 cells of 8 pixels are 304
    pixels wide, the input 300. Padding the left of the mirror image with the mean colour, up to a
    multiple of the coarsest stride, makes them symmetric.
    """
    pad = -model.size[1] % STRIDES[-1] if model.centres == "stride" else 0
    filler = model.mean.round().to(images.dtype).expand(images.shape[0], -1, images.shape[2], pad)
    predictions = model(torch.cat([filler, images.flip(3)], dim=3))
    padded_sizes = feature_map_sizes((model.size[0], model.size[1] + pad)) if pad else model.map_sizes
    mirrored, shifts, first = [], [], 0
    for k, ((h, w), (_, columns)) in enumerate(zip(model.map_sizes, padded_sizes, strict=True)):
        shapes = model.loc_heads[k].out_channels // 4
        idxs = first + torch.arange(h * columns * shapes, device=images.device)
        mirrored.append(idxs.view(h, columns, shapes).flip(1)[:, :w].flatten())
        # The two coarsest maps' priors are symmetric without the padding: undo its shift of their boxes.
        # new_full, because copying numbers to a GPU would make the host wait.
        shift = 0.0 if k < len(STRIDES) else pad / model.size[1]
        shifts.append(predictions.loc.new_full((len(mirrored[-1]),), shift))
        first += len(idxs)
    mirrored_idxs = torch.cat(mirrored)
    loc = predictions.loc[:, mirrored_idxs]
    x = torch.cat(shifts) / (VARIANCES[0] * model.priors[:, 2]) - loc[..., 0]
    loc = torch.cat([x.unsqueeze(-1), loc[..., 1:]], dim=-1)
    return Predictions(loc, predictions.conf[:, mirrored_idxs], [])
