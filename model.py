"""SSD300 on VGG16 with segmentation infusion heads.

Sources: Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016); Brazil et al., "Illuminating
Pedestrians via Simultaneous Detection & Segmentation" (ICCV 2017) for segmentation infusion: heads
that learn box-shaped masks from the same feature maps, supervise the backbone during training, and
are left out at inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaist.files import InputError
from ssd.boxes import EXTRA_LAYERS, Predictions, feature_map_sizes, make_priors, prior_shapes

# What a batch carries.
INPUT_CHANNELS = {"lwir": 1, "visible": 3, "mean": 4, "early": 4, "halfway": 4}
MEAN = (0.485, 0.456, 0.406, 0.449)  # ImageNet R, G, B, then their mean for LWIR
STD = (0.229, 0.224, 0.225, 0.226)
NORM_FLOOR = 1e-3  # length below which conv4_3's features are not scaled to unit length

# VGG16 up to conv5_3: convolutions' widths, "M" a 2x2 max-pool. The third pool rounds up
# (75 -> 38), the one before conv6 keeps its resolution.
VGG16_STAGES = ((64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512), ("M", 512, 512, 512))


class SSD300(nn.Module):
    """SSD with a VGG16 backbone, six feature maps and optional segmentation infusion heads.

    Args:
        input_mode: "lwir" (1 channel), "visible" (3), "mean" (visible and LWIR averaged into 3),
            "early" (4 channels side by side) or "halfway" (see `HalfwayFusion`). Batches carry
            visible first, LWIR last.
        batch_norm: BatchNorm after each of VGG16's 13 convolutions, as in VGG16-BN.
        width: multiplier of every layer's width; 1.0 is VGG16.
        infusion: for each of the six maps 1 where it has a segmentation head, else 0.
        infusion_conv: a 3x3 convolution of the map's own width before the head's 1x1.
        prior_set: a name in `prior_shapes`.
        size: (height, width) of the input in pixels; feature maps and priors follow from it.

    The priors are the non-persistent buffer `priors`, (P, 4) cxcywh fractions of the input.
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
    ) -> None:
        super().__init__()
        self.input_mode = input_mode
        self.prior_set = prior_set
        self.size = tuple(size)

        def scaled(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

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
            nn.Conv2d(scaled(512), scaled(1024), 3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(scaled(1024), scaled(1024), 1),
            nn.ReLU(inplace=True),
        )
        self.extras = nn.ModuleList()
        map_widths = [scaled(512), scaled(1024)]
        for squeeze, expand, stride, padding in EXTRA_LAYERS:
            self.extras.append(
                nn.Sequential(
                    nn.Conv2d(map_widths[-1], scaled(squeeze), 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(scaled(squeeze), scaled(expand), 3, stride, padding),
                    nn.ReLU(inplace=True),
                )
            )
            map_widths.append(scaled(expand))

        shapes = prior_shapes(prior_set)
        self.loc_heads = nn.ModuleList(
            nn.Conv2d(w, 4 * len(s), 3, padding=1) for w, s in zip(map_widths, shapes, strict=True)
        )
        self.conf_heads = nn.ModuleList(
            nn.Conv2d(w, 2 * len(s), 3, padding=1) for w, s in zip(map_widths, shapes, strict=True)
        )
        self.apply(init_convolution)
        # conv4_3's features arrive 20 times longer than others: start from small predictions.
        for head in (*self.loc_heads, *self.conf_heads):
            nn.init.normal_(head.weight, std=0.01)
        # Last, so that networks of one seed start alike whatever is infused.
        self.infused_maps = [i for i, infused in enumerate(infusion) if infused]
        self.seg_heads = nn.ModuleList(infusion_head(map_widths[i], infusion_conv) for i in self.infused_maps)
        self.seg_heads.apply(init_convolution)
        for head in self.seg_heads:
            nn.init.normal_(head[-1].weight, std=0.01)
        if input_mode == "halfway":
            self.to_conv4_3.start_from_mean()

        channels = slice(3, 4) if input_mode == "lwir" else slice(0, INPUT_CHANNELS[input_mode])
        for name, values in (("mean", MEAN[channels]), ("std", STD[channels])):
            buffer = torch.tensor(values).view(1, -1, 1, 1) * 255
            self.register_buffer(name, buffer, persistent=False)
        self.map_sizes = feature_map_sizes(self.size)
        self.register_buffer("priors", make_priors(self.map_sizes, shapes), persistent=False)

    def map_priors(self) -> list[Tensor]:
        """The priors of each feature map, (P_i, 4) cxcywh fractions."""
        cells = zip(self.map_sizes, self.conf_heads, strict=True)
        return list(self.priors.split([h * w * head.out_channels // 2 for (h, w), head in cells]))

    def forward(self, images: Tensor, with_masks: bool = False) -> Predictions:
        """Predict from (N, C, H, W) uint8 images; mask logits in training or on request only."""
        return self.predict(self.normalise(images), with_masks or self.training)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float with ImageNet's mean and spread; "mean" averages to 3."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        return (x[:, :3] + x[:, 3:]) / 2 if self.input_mode == "mean" else x

    def predict(self, x: Tensor, with_masks: bool) -> Predictions:
        """`forward` on images that are already normalised."""
        maps = self.feature_maps(x)
        loc = flatten_heads(self.loc_heads, maps, 4)
        conf = flatten_heads(self.conf_heads, maps, 2)
        seg = []
        if with_masks:
            heads = zip(self.infused_maps, self.seg_heads, strict=True)
            seg = [head(maps[i]).float() for i, head in heads]
        return Predictions(loc.float(), conf.float(), seg)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The six maps the heads read, finest first: 38, 19, 10, 5, 3, 1 for a 300x300 input."""
        conv4_3 = self.to_conv4_3(x)
        maps = [self.conv4_3_norm(conv4_3), self.conv6_7(self.to_conv5_3(conv4_3))]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps


def vgg_stage(
    stage: Sequence[int | str], in_channels: int, scaled: Callable[[int], int], batch_norm: bool
) -> nn.Sequential:
    """A run of VGG16: 3x3 convolutions (with BatchNorm where asked), ReLUs and max-pools."""
    layers: list[nn.Module] = []
    for width in stage:
        if width == "M":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        layers.append(nn.Conv2d(in_channels, scaled(width), 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(scaled(width)))
        layers.append(nn.ReLU(inplace=True))
        in_channels = scaled(width)
    return nn.Sequential(*layers)


class HalfwayFusion(nn.Module):
    """Visible and LWIR each in a VGG16 stream up to conv4_3, joined there by a 1x1 convolution.

    Liu et al., "Multispectral Deep Neural Networks for Pedestrian Detection" (BMVC 2016), and the
    place of the join in MLPD (Kim et al., 2021).

    Args:
        visible, lwir: from 3 channels and from 1 to `channels` at an eighth of the resolution.
    """

    def __init__(self, visible: nn.Sequential, lwir: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.visible = visible
        self.lwir = lwir
        self.join = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W), visible first -> (N, channels, h, w)."""
        return self.join(torch.cat([self.visible(x[:, :3]), self.lwir(x[:, 3:])], dim=1))

    def start_from_mean(self) -> None:
        """Let the join be the streams' mean, so that pretrained layers after it see what they
        know."""
        half = torch.eye(self.join[0].out_channels) / 2
        with torch.no_grad():
            self.join[0].weight.copy_(torch.cat([half, half], dim=1)[..., None, None])


class L2Norm(nn.Module):
    """Each cell's feature vector scaled to unit length, times a learned factor a channel.

    ParseNet (Liu et al., 2015), with SSD's initial factor 20. Computed in float32, and
    `F.normalize` keeps value and gradient finite where a cell's features are all zero. A cell of
    hardly any features is not scaled up all the way: the gradient is at most 20 / NORM_FLOOR times
    its own, where it could else be as good as infinite (flat images, a network's first steps).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape, float32."""
        return F.normalize(x.float(), eps=NORM_FLOOR) * self.scale.view(1, -1, 1, 1)


def infusion_head(width: int, with_conv: bool) -> nn.Sequential:
    """Segmentation infusion: (N, width, h, w) -> (N, 2, h, w) logits of background and person."""
    conv = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)] if with_conv else []
    return nn.Sequential(*conv, nn.Conv2d(width, 2, 1))


def init_convolution(module: nn.Module) -> None:
    """He initialisation for convolutions, biases zero; other modules are left alone."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


def flatten_heads(heads: nn.ModuleList, maps: list[Tensor], values: int) -> Tensor:
    """Apply head i to map i; (N, P, values) in the priors' order: map, row, column, shape."""
    outputs = [
        head(x).permute(0, 2, 3, 1).reshape(len(x), -1, values) for head, x in zip(heads, maps, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def build_model(checkpoint: dict[str, Any]) -> SSD300:
    """The network of a checkpoint, rebuilt from its own arguments; no weights are downloaded.

    Raises:
        InputError: the weights are not those of such a network.
    """
    try:
        model = SSD300(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"the checkpoint's weights do not fit its own model_args ({reason})", "choose another"
        ) from None
    return model


def mirror(model: SSD300, predictions: Predictions) -> Predictions:
    """What predictions of mirror images say of the images themselves, prior by prior; no masks.

    Each prior's mirror image is the prior of the same shape in the column counted from the other
    side, and its offset to the right becomes one to the left.
    """
    order, first = [], 0
    for priors, (h, w) in zip(model.map_priors(), model.map_sizes, strict=True):
        places = torch.arange(first, first + len(priors), device=priors.device)
        order.append(places.view(h, w, -1).flip(1).flatten())
        first += len(priors)
    order = torch.cat(order)
    loc = predictions.loc[:, order] * predictions.loc.new_tensor((-1, 1, 1, 1))
    return Predictions(loc, predictions.conf[:, order], [])
