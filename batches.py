"""Samples to batches: padding, masks, the order of an epoch, worker processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from copy_paste import MOST as MOST_PASTED
from datasets import BadFrame, KaistPairs, Sample
from kaist.files import InputError
from parallel import ALONE, Team
from pseudo_gt import MapRange, box_masks
from workers import items_of, share_memory, worker_settings


class BadFrames(InputError):
    """Frames that went bad under a run's way; what the run has learned so far is sound."""


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


class EpochBatches(Sampler):
    """Batches of keys (epoch, index) of one epoch.

    epoch: which epoch comes next; skip: batches at its start that are left out.

    Args:
        seed: order frames by (seed, epoch) and leave out an incomplete last batch (unless it is
            the only one); None keeps their order and all of them.
        team: of each batch this process gets every `team.size`-th frame.
    """

    def __init__(self, length: int, batch_size: int, seed: int | None, team: Team) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.team = team
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(self.length / self.batch_size)
        return max(1, self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.seed is not None:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        for start in range(self.skip * self.batch_size, len(self) * self.batch_size,
                           self.batch_size):  # fmt: skip
            batch = order[start : start + self.batch_size][self.team.rank :: self.team.size]
            yield [(self.epoch, index) for index in batch.tolist()]


class BatchLoader:
    """Batches of a data set, epoch by epoch, with worker processes kept between epochs.

    A worker process is deaf to Ctrl-C, which the main process answers, and ends with it. One that
    dies ends the epoch with an InputError.

    Args:
        dataset: indexed by (epoch, index), with a `seed`.
        collate_fn: a list of its items -> a batch (None if no frame could be read) and BadFrames.
        batch_size: frames a batch, of all processes of the team together.
        start_method: of the workers: "fork", "spawn", "forkserver", or "auto" for Python's choice.
        shuffle: training order: another permutation each epoch, an incomplete last batch is left
            out (unless it is the only one). False: the frames in their order, all of them.
        max_bad: frames that may turn out to be unreadable; they are left out, with a warning each.

    Attributes:
        bad: the unreadable frames met so far, by their id, in this process or another of the team.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate_fn: Callable[[list], Any],
        *,
        batch_size: int,
        workers: int,
        start_method: str = "auto",
        shuffle: bool,
        pin_memory: bool,
        max_bad: int = 0,
        team: Team = ALONE,
    ) -> None:
        self.max_bad = max_bad
        self.bad: dict[str, InputError] = {}
        seed = dataset.seed if shuffle else None
        self.batches = EpochBatches(len(dataset), batch_size, seed, team)
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            **worker_settings(workers, start_method),
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of one epoch, without the first `skip`.

        None stands for a batch of which no frame can be read, or none of one process's share: so
        all processes keep in step. It can come only where `max_bad` allows it.

        Raises:
            BadFrames: more than `max_bad` frames turned out to be unreadable, at the same batch
                in every process.
            InputError: a loader process died, or shared memory is too small.
        """
        self.batches.epoch, self.batches.skip = epoch, skip
        team = self.batches.team
        for batch, bad in items_of(self.loader):
            if team.any(bool(bad)):
                self.note([frame for frames in team.gather(bad) for frame in frames])
                batch = None if team.any(batch is None) else batch
            yield batch

    def note(self, frames: list[BadFrame]) -> None:
        """Warn of frames that went bad, once each, or stop if they are too many."""
        for frame_id, error in frames:
            if frame_id not in self.bad and self.max_bad and self.batches.team.writes:
                tqdm.write(f"warning: {error}; {frame_id} is left out", file=sys.stderr)
            self.bad.setdefault(frame_id, error)
        if len(self.bad) > self.max_bad:
            first = next(iter(self.bad.values()))
            raise BadFrames(
                f"{first.problem}; all unreadable frames so far: {', '.join(self.bad)}",
                "copy them again and give the same command", file=first.file,
            )  # fmt: skip
