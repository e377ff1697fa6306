"""Augmentation on a device: frames kept there, and a batch's transforms applied all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kaist.frame_cache import FrameCache
from ssd.augment import Transform, channel_parts, frame_mean

FRAMES_PER_COPY = 64  # frames that go into the device's memory at a time
MAX_MEMORY_FRACTION = 0.5  # of the device's free memory for frames; the rest is for training


class DeviceFrames:
    """All frames of a cache, for batches of them on a device.

    Attributes:
        frames: (F, h, w, C) uint8: in a CUDA device's memory if they fit into `MAX_MEMORY_FRACTION` of
            what is free, else mapped from the disk.
        means: (F, C) float32 mean colours, as from `frame_mean`.
    """

    def __init__(self, cache: FrameCache, device: torch.device) -> None:
        self.device = device
        mapped = self.frames = torch.from_numpy(cache.all())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        if mapped.nbytes <= MAX_MEMORY_FRACTION * free:
            self.frames = torch.empty(mapped.shape, dtype=torch.uint8, device=device)
        means = []
        for start in tqdm(range(0, len(mapped), FRAMES_PER_COPY), desc="reading the cache", leave=False):
            block = mapped[start : start + FRAMES_PER_COPY]
            means += [frame_mean(frame) for frame in block.numpy()]
            if self.frames is not mapped:
                self.frames[start : start + FRAMES_PER_COPY] = block
        self.means = np.stack(means)

    def __str__(self) -> str:
        where = "mapped from the cache" if self.frames.device.type == "cpu" else "in its memory"
        return f"batches made on {self.device}, {self.frames.nbytes / 1e9:.1f} GB of frames {where}"

    def take(self, rows: Tensor) -> Tensor:
        """The frames (N, h, w, C) of rows (N,) int64, on the device."""
        if self.frames.device.type != "cpu":
            return self.frames[send(rows, self.device)]
        shape = (len(rows), *self.frames.shape[1:])
        chosen = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return send(torch.index_select(self.frames, 0, rows, out=chosen), self.device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Start to copy a tensor to a device, without waiting for a GPU."""
    on_gpu = device.type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


class TransformBatch(NamedTuple):
    """What `Transform.apply` needs, of N transforms.

    crops: (N, k, 9) float32 source and target x0, y0, x1, y1, and 1 for mirrored, of all channels
    (k = 1) or of visible and LWIR (k = 2, where any of the transforms needs it); matrices: (N, C, C)
    and offsets: (N, C) float32.
    """

    crops: Tensor
    matrices: Tensor
    offsets: Tensor

    @classmethod
    def stack(cls, transforms: Sequence[Transform]) -> TransformBatch:
        """Transforms of one batch, on the CPU."""
        k = max(len(t.crops) for t in transforms)
        crops = [[(*c.source, *c.target, c.flip) for c in t.crops * (k // len(t.crops))] for t in transforms]
        return cls(
            torch.tensor(crops, dtype=torch.float32),
            torch.from_numpy(np.stack([t.matrix for t in transforms])),
            torch.from_numpy(np.stack([t.offset for t in transforms])),
        )

    def to(self, device: torch.device) -> TransformBatch:
        """The same on a device."""
        return TransformBatch(*(send(tensor, device) for tensor in self))

    def apply(self, frames: Tensor, size: tuple[int, int], filler: Tensor) -> Tensor:
        """`Transform.apply` for frames (N, h, w, C) uint8: (N, C, *size) uint8.

        The resize is two products with matrices of a triangle filter's weights, one for the rows of each
        sample and one for its columns, which also place and mirror it. filler: (C,) uint8.
        """
        channels = frames.shape[3]
        parts = channel_parts(channels) if self.crops.shape[1] == 2 else [slice(None)]
        views = [resample(frames[..., p], c, size) for p, c in zip(parts, self.crops.unbind(1), strict=True)]
        content, inside = [torch.cat([view[i] for view in views], 1) for i in (0, 1)]

        # + 0.5: the conversion to uint8 truncates
        pixels = (self.offsets + 0.5)[..., None, None].expand_as(content)
        for k in range(channels):  # by hand: a float32 product may be a TF32 one
            pixels = pixels + self.matrices[:, :, k, None, None] * content[:, k : k + 1]
        pixels = pixels.clamp_(0, 255).to(torch.uint8)
        return torch.where(inside, pixels, filler.view(-1, 1, 1))


def resample(frames: Tensor, crops: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Frames (N, H, W, C) uint8 cut, resized and mirrored by crops (N, 9): whole grey levels (N, C, *size)
    float32, and where these are of the frame, (N, C, *size) bool."""
    n, height, width, channels = frames.shape
    # Half precision holds every uint8, and its weights are good to a twentieth of a grey level.
    dtype = torch.float16 if frames.is_cuda else torch.float32
    source, target, mirrored = crops[:, :4], crops[:, 4:8], crops[:, 8].bool()
    upright = torch.zeros_like(mirrored)
    rows, in_rows = resize_weights(source[:, 1::2], target[:, 1::2], upright, height, size[0])
    columns, in_columns = resize_weights(source[:, ::2], target[:, ::2], mirrored, width, size[1])
    pixels = torch.bmm(rows.to(dtype), frames.reshape(n, height, -1).to(dtype))
    pixels = pixels.view(n, size[0], width, channels).permute(0, 3, 1, 2)
    pixels = torch.matmul(pixels, columns.to(dtype).transpose(1, 2).unsqueeze(1)).float().round_()
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return pixels, inside.expand_as(pixels)


def resize_weights(
    source: Tensor, target: Tensor, mirrored: Tensor, length_in: int, length_out: int
) -> tuple[Tensor, Tensor]:
    """Weights (N, out, in) of an antialiased resize along one axis, as `F.interpolate` has them, and which
    of the output's places (N, out) are in the target.

    A triangle one output pixel wide to each side, at least one input pixel, over the source's pixels.

    Args:
        source, target: (N, 2) float32 whole numbers, the first pixel and the one after the last.
        mirrored: (N,) bool: the output is reversed.
    """
    (source_start, source_end), (target_start, target_end) = (
        edges.unsqueeze(2).unbind(1) for edges in (source, target)
    )
    place = torch.arange(length_out, device=mirrored.device)
    place = torch.where(mirrored.unsqueeze(1), length_out - 1 - place, place) - target_start
    inside = (place >= 0) & (place < target_end - target_start)
    scale = (source_end - source_start) / (target_end - target_start)
    centre = source_start + (place + 0.5) * scale
    pixel = torch.arange(length_in, device=mirrored.device) + 0.5
    weights = 1 - (pixel - centre.unsqueeze(2)).abs() / scale.clamp(min=1).unsqueeze(2)
    in_source = (pixel > source_start) & (pixel < source_end)
    weights = weights.clamp_(min=0) * (in_source.unsqueeze(1) & inside.unsqueeze(2))
    return weights / weights.sum(2, keepdim=True).clamp_(min=1e-6), inside
