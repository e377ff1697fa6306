"""Samples to batches: padding, masks, the order of an epoch, worker processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import KaistPairs, Sample
from engine.loader import BadFrame, BatchLoader, share_memory
from kaist.files import InputError
from pseudo_gt import MapRange, box_masks
from ssd.augment import MOST as MOST_PASTED


class Batch(NamedTuple):
    """images (N, C, H, W) uint8; boxes (N, M, 4) float32 xyxy fractions; labels (N, M) int64,
    1 person, -1 ignore, 0 padding; masks: per infused map (N, h, w) int64; frame ids."""

    images: Tensor
    boxes: Tensor
    labels: Tensor
    masks: list[Tensor]
    frame_ids: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; copies from pinned memory do not block."""
        tensors = (t.to(device, non_blocking=True) for t in (self.images, self.boxes, self.labels))
        masks = [mask.to(device, non_blocking=True) for mask in self.masks]
        return Batch(*tensors, masks, self.frame_ids)


def most_objects(dataset: KaistPairs) -> int:
    """How many objects a sample may have, rounded up, for batches of a shape that stays."""
    pasted = MOST_PASTED if dataset.augmentation and dataset.augmentation.copy_paste else 0
    most = max(len(frame.labels) for frame in dataset.frames) + pasted
    return max(8, math.ceil(most / 8) * 8)


def pad(
    boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], least: int
) -> tuple[Tensor, Tensor]:
    """Lists of (n, 4) and (n,) to (N, M, 4) and (N, M), M the largest n but at least `least`."""
    most = max(least, *(len(b) for b in boxes))
    padded = torch.zeros((len(boxes), most, 4))
    padded_labels = torch.zeros((len(boxes), most), dtype=torch.int64)
    for i, (b, label) in enumerate(zip(boxes, labels, strict=True)):
        padded[i, : len(b)] = torch.from_numpy(b)
        padded_labels[i, : len(b)] = torch.from_numpy(label)
    return padded, padded_labels


@dataclass(frozen=True)
class Collate:
    """Samples to a Batch with masks for feature maps of the given (h, w) sizes, and what is bad.

    The Batch is of the frames that could be read, None if there are none.

    map_range: leaves the persons that a map cannot detect out of its mask.
    objects: boxes and labels are padded to so many, or to those of the fullest frame.
    """

    map_sizes: list[tuple[int, int]]
    map_range: MapRange | None = None
    objects: int = 1

    def __call__(
        self, items: list[Sample | BadFrame]
    ) -> tuple[Batch | None, list[BadFrame]] | InputError:
        bad = [item for item in items if isinstance(item, BadFrame)]
        samples = [item for item in items if isinstance(item, Sample)]
        if not samples:
            return None, bad
        boxes, labels = pad(
            [s.boxes for s in samples], [s.labels for s in samples], self.objects
        )
        mask_boxes, mask_labels = pad(
            [s.mask_boxes for s in samples], [s.mask_labels for s in samples], self.objects
        )
        masks = box_masks(mask_boxes, mask_labels, self.map_sizes, self.map_range)
        images = torch.stack([s.image for s in samples])
        if problem := share_memory([images, boxes, labels, *masks]):
            return problem
        return Batch(images, boxes, labels, masks, [s.frame_id for s in samples]), bad


def batch_loader(
    dataset: KaistPairs,
    *,
    map_sizes: list[tuple[int, int]],
    map_range: MapRange | None = None,
    pin_memory: bool,
    **settings: Any,
) -> BatchLoader:
    """A BatchLoader of pairs with masks for feature maps of the given (h, w) sizes.

    Args:
        map_range: as in `Collate`; settings: as of `BatchLoader`.
    """
    # A GPU wants shapes that stay; a CPU nothing to do for padding.
    objects = most_objects(dataset) if pin_memory else 1
    collate = Collate(map_sizes, map_range, objects)
    return BatchLoader(dataset, collate, pin_memory=pin_memory, **settings)




