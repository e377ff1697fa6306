"""Data sets, batches and loaders of visible-LWIR pairs.

All random values of a sample come from a generator with the seed (seed, epoch, frame index), so the
samples do not depend on the number of workers.
"""

from __future__ import annotations

if __name__ == "__main__":
    raise SystemExit("to check a data set, run: python -m tools.check_data ROOT")

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.distributed import barrier, is_main_process
from engine.loader import BadFrame, BatchLoader, share_memory
from kaist.annotations import PairSet, time_of_day
from kaist.files import InputError
from kaist.frame_cache import FrameCache, cache_frames
from kaist.frames import BOTH, Frame, frames_from_gt
from kaist.images import check_images, read_frame
from kaist.miss_rate import GroundTruth
from pseudo_gt import MapRange, box_masks
from ssd.augment import Augmentation, add_blur_and_noise, frame_mean, sample_transform, whole_frame
from ssd.copy_paste import MAX_PASTED, paste_people
from ssd.layers import Detector

# Config keys that KaistPairs, Augmentation, training_loader and test_loader take as keyword arguments.
DATASET_KEYS = ("masks_follow", "seed")
AUGMENTATION_KEYS = tuple(field.name for field in dataclasses.fields(Augmentation))
LOADER_KEYS = ("batch_size", "workers", "start_method")
TRAIN_LOADER_KEYS = ("cache", "out_of_range", "max_bad_frames", *LOADER_KEYS)
TEST_LOADER_KEYS = ("min_height", "margin", *LOADER_KEYS)

# ------------------------------------------------------------------------- samples


class Sample(NamedTuple):
    """One frame as the network sees it.

    image: (C, H, W) uint8.
    boxes: (n, 4) float32 xyxy fractions of the input; labels: (n,) int64, see `Batch`.
    mask_boxes, mask_labels: the objects in the masks; see `KaistPairs.masks_follow`.
    """

    image: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    mask_boxes: np.ndarray
    mask_labels: np.ndarray
    frame_id: str


@dataclass(eq=False)
class KaistPairs(Dataset):
    """Samples from the frames of KAIST or of another set of pairs, indexed by (epoch, index).

    A frame that cannot be read gives a `BadFrame`, because an exception would lose the whole batch.

    root: folder with `images/`, or a set of pairs; frames: see `kaist.frames`.
    input_mode: "lwir", "visible", "mean", "early" or "halfway"; input_size: (height, width).
    filler: (C,) uint8, the fill colour around a frame and of a blanked modality.
    augmentation: random augmentation; None only resizes the frame.
    masks_follow: make masks from the augmented boxes. False uses the original boxes, a mistake of
        the logged experiments 18 to 25.
    seed: random seed, combined with the epoch and the frame index.
    cache: decoded frames, read instead of the image files.
    without: a modality to blank.
    """

    root: Path | PairSet
    frames: list[Frame]
    _: dataclasses.KW_ONLY
    input_mode: str
    input_size: tuple[int, int]
    filler: np.ndarray
    augmentation: Augmentation | None = None
    masks_follow: bool = True
    seed: int = 0
    cache: FrameCache | None = None
    without: str = ""

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, key: tuple[int, int]) -> Sample | BadFrame:
        frame = self.frames[key[1]]
        rng = np.random.default_rng((self.seed, *key))
        options = self.augmentation
        try:
            pixels = self.read(frame.id)
            if options is not None and options.copy_paste:
                frame, pixels = self.paste(rng, frame, pixels)
        except InputError as error:
            return BadFrame(frame.id, error)
        whole = transform = whole_frame(pixels.shape[2], self.input_size, frame.size)
        if options is not None:
            settings = (options, self.input_size, self.filler, frame.size)
            transform = sample_transform(rng, frame.persons, frame_mean(pixels), *settings)
        image = transform.apply(pixels)
        if options is not None and rng.random() < options.jitter:
            image = add_blur_and_noise(rng, image)
        frame_objects = (frame.boxes_px, frame.labels, frame.seen)
        objects = transform.move(*frame_objects)
        mask_objects = objects if self.masks_follow else whole.move(*frame_objects)
        return Sample(image, *objects, *mask_objects, frame.id)

    def paste(self, rng: np.random.Generator, frame: Frame, pixels: np.ndarray) -> tuple[Frame, np.ndarray]:
        """Copy-paste augmentation with a random donor frame of the same time of day and size."""
        donors = self.donors.get(self.group_of(frame))
        if not donors or rng.random() >= self.augmentation.copy_paste:
            return frame, pixels
        donor = self.frames[rng.choice(donors)]
        try:
            donor_pixels = self.read(donor.id)
        except InputError:  # reported when the donor's own sample is read
            return frame, pixels
        objects = (frame.boxes_px, frame.labels)
        pixels, boxes, labels = paste_people(rng, pixels, *objects, donor_pixels, donor.persons)
        seen = np.append(frame.seen, np.full(len(labels) - len(frame.labels), BOTH))
        return dataclasses.replace(frame, boxes_px=boxes, labels=labels, seen=seen), pixels

    @cached_property
    def donors(self) -> dict[tuple[str, tuple[int, int]], list[int]]:
        """Indices of the frames with persons, by time of day and size."""
        groups = defaultdict(list)
        for i, frame in enumerate(self.frames):
            if frame.n_persons:
                groups[self.group_of(frame)].append(i)
        return groups

    def group_of(self, frame: Frame) -> tuple[str, tuple[int, int]]:
        """A frame's time of day and size."""
        time_of = self.root.time_of_day if isinstance(self.root, PairSet) else time_of_day
        return time_of(frame.id), frame.size

    def read(self, frame_id: str) -> np.ndarray:
        """A frame's pixels, (h, w, C) uint8, from the cache if there is one."""
        if self.cache is not None:
            return self.cache.read(frame_id)
        return read_frame(self.root, frame_id, self.input_mode, self.without, self.filler)


# ------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Samples of N frames, padded to M objects.

    images: (N, C, H, W) uint8.
    boxes: (N, M, 4) float32 xyxy fractions of the input.
    labels: (N, M) int64: person in visible 1, in LWIR 2, in both 3; ignore -1; padding 0.
    masks: for each infused map (N, h, w) int64, see `box_masks`.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    masks: list[Tensor]
    frame_ids: list[str]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device, from pinned memory without blocking."""
        tensors = (t.to(device, non_blocking=True) for t in (self.images, self.boxes, self.labels))
        masks = [mask.to(device, non_blocking=True) for mask in self.masks]
        return Batch(*tensors, masks, self.frame_ids)


def max_objects(dataset: KaistPairs) -> int:
    """The maximum number of objects in a sample, at least 1."""
    options = dataset.augmentation or Augmentation()
    n = max(len(frame.labels) for frame in dataset.frames) + MAX_PASTED * (options.copy_paste > 0)
    n *= 2 if options.mirror_apart or options.crop_apart else 1  # a box may become one per modality
    return max(1, n)


def pad(arrays: Sequence[np.ndarray], pad_to: int) -> Tensor:
    """Pad N arrays (n_i, …) with zeros to a tensor (N, M, …); M is the largest n_i, at least `pad_to`."""
    shape = (len(arrays), max(pad_to, *map(len, arrays)), *arrays[0].shape[1:])
    padded = np.zeros(shape, arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class Collate:
    """The collate_fn: samples to a `Batch` (None if there is no readable frame) and the bad frames.

    If shared memory is full, it returns an `InputError` instead, which the loader raises.
    map_sizes, map_range: see `box_masks`; pad_to: the minimum number of objects after padding.
    """

    map_sizes: list[tuple[int, int]]
    map_range: MapRange | None = None
    pad_to: int = 1

    def __call__(self, items: list[Sample | BadFrame]) -> tuple[Batch | None, list[BadFrame]] | InputError:
        bad = [item for item in items if isinstance(item, BadFrame)]
        samples = [item for item in items if isinstance(item, Sample)]
        if not samples:
            return None, bad
        arrays = zip(*(sample[1:5] for sample in samples), strict=True)
        boxes, labels, *mask_objects = (pad(field, self.pad_to) for field in arrays)
        masks = box_masks(*mask_objects, self.map_sizes, self.map_range)
        images = torch.stack([sample.image for sample in samples])
        if problem := share_memory([images, boxes, labels, *masks]):
            return problem
        return Batch(images, boxes, labels, masks, [sample.frame_id for sample in samples]), bad


# ------------------------------------------------------------------------- loaders


def training_loader(
    dataset: KaistPairs, model: Detector, *, cache: str, out_of_range: str, **settings: Any
) -> BatchLoader:
    """The loader of shuffled training batches.

    Args:
        cache: folder for decoded frames, "" for none.
        out_of_range: treatment in a map's mask of persons that match none of its priors: "keep",
            "background" or "ignore".
        settings: see `BatchLoader`.
    """
    if cache:
        cache_args = (cache, dataset.root, [frame.id for frame in dataset.frames], dataset.input_mode)
        if is_main_process():
            cache_frames(*cache_args)
        barrier()
        dataset = dataclasses.replace(dataset, cache=cache_frames(*cache_args, check=False))
    map_range = None
    if out_of_range != "keep":
        priors = [map_priors.cpu() for map_priors in model.map_priors()]  # workers make masks on the CPU
        # The maps of the two streams have no priors; they use those of the finest map.
        maps = [i if i < len(priors) else 0 for i in model.infused_maps]
        map_range = MapRange(priors, maps, {"background": 0, "ignore": -1}[out_of_range])
    return batch_loader(dataset, model, shuffle=True, map_range=map_range, **settings)


def test_loader(
    root: Path | PairSet,
    ground_truth: GroundTruth,
    model: Detector,
    *,
    min_height: float,
    margin: float,
    without: str = "",
    **settings: Any,
) -> BatchLoader:
    """The loader of unaugmented test frames in their order; checks first that all images exist.

    Args:
        min_height, margin: persons to ignore in the masks, see `make_frames`.
        without: a modality to blank.
        settings: see `BatchLoader`.
    """
    frames = frames_from_gt(ground_truth, min_height, margin)
    check_images(root, [frame.id for frame in frames], model.input_mode, without)
    dataset = KaistPairs(root, frames, **input_kwargs(model), without=without)
    return batch_loader(dataset, model, shuffle=False, **settings)


def input_kwargs(model: Detector) -> dict[str, Any]:
    """The arguments of `KaistPairs` that follow from the network."""
    return {"input_mode": model.input_mode, "input_size": model.size, "filler": model.filler()}


def batch_loader(
    dataset: KaistPairs, model: Detector, map_range: MapRange | None = None, **settings: Any
) -> BatchLoader:
    """The loader of a data set for a network and its device; settings: see `BatchLoader`."""
    on_gpu = model.priors.is_cuda
    pad_to = max_objects(dataset) if on_gpu else 1  # fixed shapes for CUDA graphs, less work on a CPU
    collate = Collate([model.grids[i] for i in model.infused_maps], map_range, pad_to)
    return BatchLoader(dataset, collate, pin_memory=on_gpu, **settings)
