"""What all networks share: VGG16's layers, the heads on six feature maps, and the forward pass.

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

MIN_NORM = 1e-3  # shorter feature vectors of conv4_3 are divided by this instead of their length

# VGG16 up to conv5_3: output channels of the convolutions; "M" is a 2x2 max-pool. Pools round up (75 -> 38).
VGG16_STAGES = ((64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512), ("M", 512, 512, 512))


class Detector(nn.Module):
    """A network with loc, conf and segmentation heads on six feature maps.

    A subclass builds its backbone, calls `add_heads`, and implements `feature_maps`. Its `backbones` lists
    the layers of VGG16 for each input stream, in VGG16's order; shared layers are in both lists.

    Args:
        width: multiplier of all layers' channels; 1.0 is VGG16.
        prior_set: a name in `prior_shapes`; size: (height, width) of the input in pixels.

    Attributes:
        priors: (P, 4) cxcywh fractions of the input, a non-persistent buffer.
        map_sizes: (height, width) of each feature map, finest first.
        grids: the cells of each map, followed by those of visible's and LWIR's map if these have heads.
        infused_maps: indices into `grids` of the maps with a segmentation head.
    """

    n_logits = 2  # per prior; 3 with a person in visible and a person in LWIR
    centres, family = "even", "ssd300"  # as `make_grids` takes them
    stream_map = (0, 0)  # channels (at width 1.0) and stride of each stream's last map before fusion

    def __init__(self, width: float, prior_set: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.prior_set, self.size, self.width = prior_set, tuple(size), width

    def scaled(self, channels: int) -> int:
        """Channels times the width multiplier, rounded to a multiple of 8."""
        return max(8, round(channels * self.width / 8) * 8)

    def add_heads(self, map_widths: Sequence[int], infusion: Sequence[int], infusion_conv: bool) -> None:
        """Create priors and heads, and initialise all convolutions.

        Args:
            map_widths: channels of each map.
            infusion: for each map 1 if it has a segmentation head with (N, 2, h, w) logits, else 0. A 2 for
                the first map adds a head on visible's and on LWIR's map before fusion.
            infusion_conv: add a 3x3 convolution before the 1x1 convolution of each segmentation head.
        """
        self.grids, widths = make_grids(self.size, self.centres, self.family), list(map_widths)
        self.map_sizes = [(grid.h, grid.w) for grid in self.grids]
        shapes = prior_shapes(self.prior_set)
        self.register_buffer("priors", make_priors(self.grids, shapes), persistent=False)
        maps = list(zip(widths, map(len, shapes), strict=True))
        self.loc_heads = nn.ModuleList(nn.Conv2d(w, 4 * n, 3, padding=1) for w, n in maps)
        self.conf_heads = nn.ModuleList(nn.Conv2d(w, self.n_logits * n, 3, padding=1) for w, n in maps)
        self.apply(init_convolution)
        # conv4_3's features are scaled to length 20: start with small predictions.
        for head in (*self.loc_heads, *self.conf_heads):
            init_convolution(head, small=True)
        # Last, so that the other weights of a seed do not depend on the segmentation heads.
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
        """Register the buffers that `normalise` uses, from each channel's values for pixels from 0 to 1."""
        for name, values in (("mean", mean), ("std", std)):
            buffer = torch.tensor(values, device="cpu").view(1, -1, 1, 1) * 255
            self.register_buffer(name, buffer, persistent=False)

    def filler(self) -> np.ndarray:
        """(C,) uint8 colour of pixels outside the frame, which normalisation turns into zero."""
        return self.mean.round().to(torch.uint8).flatten().cpu().numpy()

    def map_priors(self) -> list[Tensor]:
        """The priors of each feature map, (P_i, 4) cxcywh fractions."""
        cells = zip(self.map_sizes, self.loc_heads, strict=True)
        return list(self.priors.split([h * w * head.out_channels // 4 for (h, w), head in cells]))

    def forward(self, images: Tensor, with_masks: bool = False) -> Predictions:
        """Predict from (N, C, H, W) uint8 images; mask logits only in training mode or if `with_masks`."""
        return self.predict(self.normalise(images), with_masks or self.training)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise (N, C, H, W) uint8 images to float32 by each channel's mean and standard deviation."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def predict(self, x: Tensor, with_masks: bool) -> Predictions:
        """`forward` for normalised images."""
        maps = self.feature_maps(x)
        loc = flatten_heads(self.loc_heads, maps[: len(self.map_sizes)], 4)
        conf = flatten_heads(self.conf_heads, maps[: len(self.map_sizes)], self.n_logits)
        heads = zip(self.infused_maps, self.seg_heads, strict=True) if with_masks else ()
        seg = [head(maps[i]).float() for i, head in heads]
        return Predictions(loc.float(), conf.float(), seg)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The six maps for loc and conf heads, finest first, then visible's and LWIR's map, if any."""
        raise NotImplementedError


def conv_relu(*args: int, batch_norm: bool = False, **kwargs: int) -> list[nn.Module]:
    """`nn.Conv2d(*args, **kwargs)`, BatchNorm if requested, and a ReLU."""
    norm = [nn.BatchNorm2d(args[1])] if batch_norm else []
    return [nn.Conv2d(*args, **kwargs), *norm, nn.ReLU(inplace=True)]


def vgg_stage(
    stage: Sequence[int | str], in_channels: int, scaled: Callable[[int], int], batch_norm: bool
) -> nn.Sequential:
    """Layers of VGG16: 3x3 convolutions (with BatchNorm if requested), ReLUs and max-pools."""
    layers: list[nn.Module] = []
    for width in stage:
        if width == "M":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        else:
            layers += conv_relu(in_channels, scaled(width), 3, batch_norm=batch_norm, padding=1)
            in_channels = scaled(width)
    return nn.Sequential(*layers)


class L2Norm(nn.Module):
    """Scale each cell's feature vector to unit length, then each channel by a learned factor.

    ParseNet (Liu et al., 2015), with SSD's initial factor 20. Vectors shorter than `MIN_NORM` stay short,
    so that the gradient grows at most by 20 / MIN_NORM (flat images, first steps).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape, float32."""
        return F.normalize(x.float(), eps=MIN_NORM) * self.scale.view(1, -1, 1, 1)


def init_convolution(module: nn.Module, small: bool = False) -> None:
    """Initialise a convolution: He, or if `small` normal with standard deviation 0.01; biases zero.

    Other modules are not changed, nor are convolutions on "meta": normal numbers there would import
    torch._dynamo, which takes more than a second.
    """
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        if small:
            nn.init.normal_(module.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def flatten_heads(heads: nn.ModuleList, maps: list[Tensor], values: int) -> Tensor:
    """Apply head i to map i: (N, P, values), priors ordered by map, row, column, shape."""
    outputs = [head(x).permute(0, 2, 3, 1) for head, x in zip(heads, maps, strict=True)]
    return torch.cat([x.reshape(x.shape[0], -1, values) for x in outputs], dim=1)


def stage_outputs(first: Tensor, stages: nn.ModuleList) -> list[Tensor]:
    """The first map and the output of each stage, applied one after the other."""
    return list(accumulate(stages, lambda x, stage: stage(x), initial=first))
