"""MLPD and INSANet: SSDs with two VGG16-BN streams, visible and LWIR, and a person logit for each modality.

Kim et al., "MLPD: Multi-Label Pedestrian Detector in Multispectral Domain" (RA-L 2021); Lee et al., "INSANet:
INtra-INter Spectral Attention Network for Effective Feature Fusion of Multispectral Pedestrian Detection"
(Sensors 2024). With the authors' weights (`ssd/published.py`), outputs equal those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaist.files import InputError
from ssd.layers import VGG16_STAGES, Detector, L2Norm, conv_relu, stage_outputs, vgg_stage

# Mean and standard deviation of KAIST's training frames: R, G, B, LWIR, for pixels from 0 to 1.
MEAN = (0.3465, 0.3219, 0.2842, 0.1598)
STD = (0.2358, 0.2265, 0.2274, 0.0813)
WINDOWS_PER_SIDE = 16  # attention windows along each side of a map
MASKED_LOGIT = -100.0  # added to attention logits between tokens that are not neighbours, as in Swin


class MultispectralSSD(Detector):
    """What MLPD and INSANet share: the heads and the input, (N, 4, H, W) uint8, LWIR last.

    A subclass creates the layers up to the six maps in `add_backbone`. conf has three logits per prior:
    background, person in visible, person in LWIR.

    infusion, infusion_conv: see `Detector.add_heads`. detector_kwargs: arguments of `Detector`; published are
    width 1.0, prior_set "multispectral" and size (512, 640).
    """

    n_logits, family, input_mode = 3, "mlpd", "halfway"

    def __init__(self, *, infusion: Sequence[int], infusion_conv: bool, **detector_kwargs: Any) -> None:
        super().__init__(**detector_kwargs)
        self.add_backbone(self.scaled)
        self.conv4_3_norm = L2Norm(self.scaled(512))
        self.add_heads([self.scaled(512)] * 6, infusion, infusion_conv)
        self.add_normalisation(MEAN, STD)


class MLPD(MultispectralSSD):
    """Two streams up to conv4_3, shared layers after it, and a fusion of both streams on each of six maps.

    In training mode, BatchNorm of the shared layers normalises each stream on its own.
    """

    stream_map = (512, 8)

    def add_backbone(self, scaled: Callable[[int], int]) -> None:
        def stream(channels: int) -> nn.Sequential:
            layers = vgg_stage(VGG16_STAGES[0], channels, scaled, batch_norm=True)
            return layers.append(same_size_pool())

        self.visible, self.lwir = stream(3), stream(1)
        self.stages = lower_stages(scaled)
        self.joins = nn.ModuleList(join(scaled(512)) for _ in range(6))

    def backbones(self) -> list[list[nn.Module]]:
        return [[*stream, *self.stages[0][:9]] for stream in (self.visible, self.lwir)]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        visible = stage_outputs(self.visible(x[:, :3]), self.stages)
        lwir = stage_outputs(self.lwir(x[:, 3:]), self.stages)
        pairs = zip(self.joins, visible, lwir, strict=True)
        maps = [join(torch.cat(pair, dim=1)) for join, *pair in pairs]
        return [self.conv4_3_norm(maps[0]), *maps[1:], visible[0], lwir[0]]


class INSANet(MultispectralSSD):
    """Two streams up to conv3_3, spectral attention between them, and one trunk on their mean.

    The sides of the input must be multiples of 64 pixels: conv3_3's map, a quarter of the input, is divided
    into 16 x 16 windows.
    """

    stream_map = (256, 4)

    def add_backbone(self, scaled: Callable[[int], int]) -> None:
        first, second = VGG16_STAGES[0][:9], VGG16_STAGES[0][9:]

        def stream(channels: int) -> nn.Sequential:
            layers = vgg_stage(first, channels, scaled, batch_norm=True)
            return layers.extend(conv_relu(scaled(256), scaled(256), 1))

        self.visible, self.lwir = stream(3), stream(1)
        self.attention = SpectralAttention(scaled(256), (self.size[0] / 4, self.size[1] / 4))
        self.to_conv4_3 = vgg_stage(second, scaled(256), scaled, batch_norm=True)
        self.to_conv4_3.append(same_size_pool())
        self.stages = lower_stages(scaled)

    def backbones(self) -> list[list[nn.Module]]:
        trunk = [*self.to_conv4_3, *self.stages[0][:9]]
        return [[*stream[:-2], *trunk] for stream in (self.visible, self.lwir)]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        streams = [self.visible(x[:, :3]), self.lwir(x[:, 3:])]
        maps = stage_outputs(self.to_conv4_3(self.attention(*streams)), self.stages)
        return [self.conv4_3_norm(maps[0]), *maps[1:], *streams]


def same_size_pool() -> nn.MaxPool2d:
    """pool4 of both networks: 3x3 with stride 1, which keeps the resolution."""
    return nn.MaxPool2d(3, stride=1, padding=1)


def lower_stages(scaled: Callable[[int], int]) -> nn.ModuleList:
    """The layers from each map to the next: conv5 and conv6, conv7, conv8, conv9, conv10.

    Of the layers after conv5, only conv6_1 and conv7_2 have BatchNorm.
    """
    wide, narrow = scaled(512), scaled(256)

    def extra(stride: int, batch_norm: bool = False) -> nn.Sequential:
        squeeze = conv_relu(wide, narrow, 1, stride=stride)
        return nn.Sequential(*squeeze, *conv_relu(narrow, wide, 3, padding=1, batch_norm=batch_norm))

    conv5_6 = nn.Sequential(
        *vgg_stage(VGG16_STAGES[1][1:], wide, scaled, batch_norm=True),
        nn.MaxPool2d(2, ceil_mode=True),
        *conv_relu(wide, wide, 3, padding=1, batch_norm=True),
        *conv_relu(wide, wide, 1),
    )
    return nn.ModuleList([conv5_6, extra(2, batch_norm=True), extra(2), extra(1), extra(1)])


def join(channels: int) -> nn.Sequential:
    """MLPD's fusion of both streams on one map: (N, 2 channels, h, w) -> (N, channels, h, w)."""
    return nn.Sequential(
        nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels, momentum=0.01),
        nn.ReLU(inplace=True),
    )


class SpectralAttention(nn.Module):
    """INSANet's intra-inter spectral attention: two rounds in windows, the second with shifted windows.

    size: (height, width) of each stream's map. Raises InputError if it is no multiple of 16.
    """

    def __init__(self, channels: int, size: tuple[float, float]) -> None:
        super().__init__()
        if any(side % WINDOWS_PER_SIDE for side in size):
            problem = f"INPUT_SIZE = {tuple(int(4 * side) for side in size)} cannot be used by INSANet"
            raise InputError(problem, "use multiples of 64, such as 512,640")
        self.window = tuple(int(side) // WINDOWS_PER_SIDE for side in size)
        self.shift = tuple(side // 2 for side in self.window)
        self.rounds = nn.ModuleList(AttentionRound(channels) for _ in range(2))
        self.register_buffer("mask", shift_mask(self.window, self.shift), persistent=False)

    def forward(self, visible: Tensor, lwir: Tensor) -> Tensor:
        """Attend within and between two streams (N, C, h, w) and return their mean (N, C, h, w)."""
        height, width = visible.shape[2:]
        x = torch.cat([visible, lwir]).permute(0, 2, 3, 1)
        x = self.rounds[0](to_windows(x, self.window), None)
        x = from_windows(x, self.window, height, width)
        up, left = self.shift
        x = self.rounds[1](to_windows(x.roll((-up, -left), (1, 2)), self.window), self.mask)
        x = from_windows(x, self.window, height, width).roll((up, left), (1, 2))
        visible, lwir = x.chunk(2)
        return ((visible + lwir) / 2).permute(0, 3, 1, 2)


class AttentionRound(nn.Module):
    """Attention within each stream, then from each stream to the other stream's input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.intra, self.inter = Attention(channels), Attention(channels)
        self.mlp = nn.Sequential(
            nn.Linear(2 * channels, 8 * channels, bias=False),
            nn.GELU(),
            nn.Linear(8 * channels, channels, bias=False),
            nn.LayerNorm(channels),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Update both streams, (2N, windows, tokens, C), visible first, then LWIR."""
        other = torch.cat(x.chunk(2)[::-1])
        x = x + self.intra(x, x, mask)
        attended = self.inter(x, other, mask)
        return x + self.mlp(torch.cat([x, attended], dim=-1))


class Attention(nn.Module):
    """Single-head attention within windows, with projection and LayerNorm, without position encoding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.fc = (nn.Linear(channels, channels, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from x to source, both (N, windows, tokens, C); the mask is that of `shift_mask`."""
        x = F.scaled_dot_product_attention(self.q(x), self.k(source), self.v(source), attn_mask=mask)
        return self.norm(self.fc(x))


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(N, H, W, C) -> (N, windows, tokens, C), windows and tokens in row-major order."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, window: tuple[int, int], height: int, width: int) -> Tensor:
    """Invert `to_windows`: (N, windows, tokens, C) -> (N, height, width, C)."""
    x = x.unflatten(2, window).unflatten(1, (height // window[0], width // window[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Swin's attention mask (windows, tokens, tokens) for shifted windows (Liu et al., 2021).

    It is `MASKED_LOGIT` between tokens that share a window only because the map wraps around, else 0.
    """
    regions = []
    for side, step in zip(window, shift, strict=True):
        region = torch.zeros(WINDOWS_PER_SIDE * side)
        region[-side:] = 1
        region[WINDOWS_PER_SIDE * side - step :] = 2
        regions.append(region)
    region = 3 * regions[0][:, None] + regions[1]
    region = to_windows(region[None, :, :, None], window).squeeze(3).squeeze(0)
    return torch.where(region.unsqueeze(1) == region.unsqueeze(2), 0.0, MASKED_LOGIT)
