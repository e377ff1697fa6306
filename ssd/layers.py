"""What the networks share: VGG16's layers, the heads on six feature maps, and the forward pass.

Sources: Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016); Brazil et al., "Illuminating
Pedestrians via Simultaneous Detection & Segmentation" (ICCV 2017) for segmentation infusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaist.frames import LWIR, VISIBLE
from ssd.boxes import Grid, Predictions, make_grids, make_priors, prior_shapes

MIN_NORM = 1e-3  # length below which conv4_3's features are not scaled to unit length

# VGG16 up to conv5_3: convolutions' widths, "M" a 2x2 max-pool. The third pool rounds up
# (75 -> 38), the one before conv6 keeps its resolution.
VGG16_STAGES = ((64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512), ("M", 512, 512, 512))


class Detector(nn.Module):
    """A network with loc, conf and mask heads on six feature maps.

    A subclass makes its backbone, calls `add_heads`, and says in `feature_maps` what the heads read. In
    `backbones` it lists VGG16's layers of each input stream in their order; shared ones are in both.

    Args:
        width: multiplier of every layer's width; 1.0 is VGG16's.
        prior_set: a name in `prior_shapes`; size: (height, width) of the input in pixels.

    Attributes:
        priors: (P, 4) cxcywh fractions of the input, a non-persistent buffer.
        n_logits: of a prior: background and person, or background and a person in each modality.
        map_sizes: (height, width) of each feature map, finest first.
        grids: the cells of each, and of visible's and LWIR's map where these have heads of their own.
        centres, family: where the priors lie, as of `make_grids`.
        infused_maps: indices of the grids with a segmentation head.
        stream_map: (channels at width 1.0, stride in pixels) of a stream's last map before fusion.
    """

    n_logits, centres, family, stream_map = 2, "even", "ssd300", (0, 0)

    def __init__(self, width: float, prior_set: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.prior_set, self.size, self.width = prior_set, tuple(size), width

    def scaled(self, channels: int) -> int:
        """A layer's channels under the width multiplier, in eights."""
        return max(8, round(channels * self.width / 8) * 8)

    def add_heads(self, map_widths: Sequence[int], infusion: Sequence[int], infusion_conv: bool) -> None:
        """Make priors and heads, and initialise all convolutions.

        Args:
            map_widths: channels of each map.
            infusion: for each map 1 where it has a segmentation head of (N, 2, h, w) logits, else 0. A 2 of
                the first map adds one on visible's and one on LWIR's stream, before they are fused.
            infusion_conv: a 3x3 convolution of the map's own width before a head's 1x1.
        """
        self.grids, widths = make_grids(self.size, self.centres, self.family), list(map_widths)
        self.map_sizes = [(grid.h, grid.w) for grid in self.grids]
        shapes = prior_shapes(self.prior_set)
        self.register_buffer("priors", make_priors(self.grids, shapes), persistent=False)
        maps = list(zip(widths, map(len, shapes), strict=True))
        self.loc_heads = nn.ModuleList(nn.Conv2d(w, 4 * n, 3, padding=1) for w, n in maps)
        self.conf_heads = nn.ModuleList(nn.Conv2d(w, self.n_logits * n, 3, padding=1) for w, n in maps)
        self.apply(init_convolution)
        # conv4_3's features arrive 20 times longer than others: start from small predictions.
        for head in (*self.loc_heads, *self.conf_heads):
            init_convolution(head, small=True)
        # Last, so that networks of one seed start alike whatever is infused.
        self.infused_maps = [i for i, infused in enumerate(infusion) if infused]
        if infusion[0] == 2:
            h, w = (math.ceil(side / self.stream_map[1]) for side in self.size)
            self.grids += [Grid(h, w, 1 / h, 1 / w, modality) for modality in (VISIBLE, LWIR)]
            self.infused_maps += [len(widths), len(widths) + 1]
            widths += [self.scaled(self.stream_map[0])] * 2
        self.seg_heads = nn.ModuleList()
        for width in (widths[i] for i in self.infused_maps):
            conv = conv_relu(width, width, 3, padding=1) if infusion_conv else []
            self.seg_heads.append(nn.Sequential(*conv, nn.Conv2d(width, 2, 1)))
        self.seg_heads.apply(init_convolution)
        for head in self.seg_heads:
            init_convolution(head[-1], small=True)

    def add_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Make the buffers by which images are normalised, from shares of 255 a channel."""
        for name, values in (("mean", mean), ("std", std)):
            buffer = torch.tensor(values, device="cpu").view(1, -1, 1, 1) * 255
            self.register_buffer(name, buffer, persistent=False)

    def filler(self) -> np.ndarray:
        """(C,) uint8: the colour that normalisation turns into zero, for what an image does not show."""
        return self.mean.round().to(torch.uint8).flatten().cpu().numpy()

    def map_priors(self) -> list[Tensor]:
        """The priors of each feature map, (P_i, 4) cxcywh fractions."""
        cells = zip(self.map_sizes, self.loc_heads, strict=True)
        return list(self.priors.split([h * w * head.out_channels // 4 for (h, w), head in cells]))

    def forward(self, images: Tensor, with_masks: bool = False) -> Predictions:
        """Predict from (N, C, H, W) uint8 images; mask logits in training or on request only."""
        return self.predict(self.normalise(images), with_masks or self.training)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float32 with each channel's mean and spread."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def predict(self, x: Tensor, with_masks: bool) -> Predictions:
        """`forward` on images that are already normalised."""
        maps = self.feature_maps(x)
        loc = flatten_heads(self.loc_heads, maps[: len(self.map_sizes)], 4)
        conf = flatten_heads(self.conf_heads, maps[: len(self.map_sizes)], self.n_logits)
        heads = zip(self.infused_maps, self.seg_heads, strict=True) if with_masks else ()
        seg = [head(maps[i]).float() for i, head in heads]
        return Predictions(loc.float(), conf.float(), seg)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The six maps that loc and conf heads read, finest first; then visible's and LWIR's, if any."""
        raise NotImplementedError


def conv_relu(*shape: int, batch_norm: bool = False, **how: int) -> list[nn.Module]:
    """A convolution, as `nn.Conv2d` takes it, with BatchNorm where asked, and a ReLU."""
    norm = [nn.BatchNorm2d(shape[1])] if batch_norm else []
    return [nn.Conv2d(*shape, **how), *norm, nn.ReLU(inplace=True)]


def vgg_stage(
    stage: Sequence[int | str], in_channels: int, scaled: Callable[[int], int], batch_norm: bool
) -> nn.Sequential:
    """A run of VGG16: 3x3 convolutions (with BatchNorm where asked), ReLUs and max-pools."""
    layers: list[nn.Module] = []
    for width in stage:
        if width == "M":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        else:
            layers += conv_relu(in_channels, scaled(width), 3, batch_norm=batch_norm, padding=1)
            in_channels = scaled(width)
    return nn.Sequential(*layers)


class L2Norm(nn.Module):
    """Each cell's feature vector scaled to unit length, times a learned factor a channel.

    ParseNet (Liu et al., 2015), with SSD's initial factor 20. A cell of hardly any features is not scaled up
    all the way, so that the gradient is at most 20 / MIN_NORM times its own (flat images, first steps).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape, float32."""
        return F.normalize(x.float(), eps=MIN_NORM) * self.scale.view(1, -1, 1, 1)


def init_convolution(module: nn.Module, small: bool = False) -> None:
    """He initialisation for convolutions, or normal weights of spread 0.01; biases zero. Others are left
    alone, and shapes on "meta" too: normal numbers there would import torch._dynamo, a second and more."""
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        if small:
            nn.init.normal_(module.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def flatten_heads(heads: nn.ModuleList, maps: list[Tensor], values: int) -> Tensor:
    """Apply head i to map i; (N, P, values) in the priors' order: map, row, column, shape."""
    found = [head(x).permute(0, 2, 3, 1) for head, x in zip(heads, maps, strict=True)]
    return torch.cat([x.reshape(x.shape[0], -1, values) for x in found], dim=1)


def stage_outputs(first: Tensor, stages: nn.ModuleList) -> list[Tensor]:
    """The first map and what each stage makes of the one before it."""
    return list(accumulate(stages, lambda x, stage: stage(x), initial=first))
