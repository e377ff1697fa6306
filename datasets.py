"""KAIST pairs as batches: augmented samples, and their loaders.

Every random choice for a sample comes from a generator keyed by (seed, epoch, frame index), so
any number of workers gives the same samples.
"""

from __future__ import annotations

if __name__ == "__main__":
    raise SystemExit("it checks nothing itself any more: python -m tools.check_data ROOT")

import dataclasses
import math
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
    """One frame as the network sees it; boxes are (n, 4) xyxy fractions of the input.

    image: (C, H, W) uint8.
    mask_boxes, mask_labels: what the masks are drawn from: the boxes, or those of the unaugmented
    frame where masks do not follow the augmentation.
    """

    image: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    mask_boxes: np.ndarray
    mask_labels: np.ndarray
    frame_id: str


@dataclass(eq=False)
class KaistPairs(Dataset):
    """Frames of a KAIST root, or of another set of pairs, as samples for a network of a given input.

    Indexed by (epoch, index). A frame that cannot be read comes as a BadFrame, because an exception
    would end the whole batch.

    root: folder with `images/`, or a set of pairs; frames: as from `load_frames`.
    input_mode: "lwir", "visible", "mean", "early" or "halfway"; input_size: (height, width).
    filler: (C,) uint8, the colour around a frame and of a blanked modality.
    augmentation: None resizes the whole frame.
    masks_follow: masks show the boxes after augmentation. False repeats the mistake of the logged
        experiments 18 to 25, whose masks showed the unaugmented frame.
    seed: key of all random choices, together with epoch and frame index.
    cache: decoded frames of this input, read instead of the images.
    without: a modality that is blanked instead of read.
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
            how = (options, self.input_size, self.filler, frame.size)
            transform = sample_transform(rng, frame.persons, frame_mean(pixels), *how)
        image = transform.apply(pixels)
        if options is not None and rng.random() < options.jitter:
            image = add_blur_and_noise(rng, image)
        annotated = (frame.boxes_px, frame.labels, frame.seen)
        objects = transform.move(*annotated)
        mask_objects = objects if self.masks_follow else whole.move(*annotated)
        return Sample(image, *objects, *mask_objects, frame.id)

    def paste(self, rng: np.random.Generator, frame: Frame, pixels: np.ndarray) -> tuple[Frame, np.ndarray]:
        """The frame, by chance with people of another one of the same time of day and size."""
        donors = self.donors.get(self.kind(frame))
        if not donors or rng.random() >= self.augmentation.copy_paste:
            return frame, pixels
        donor = self.frames[rng.choice(donors)]
        try:
            theirs = self.read(donor.id)
        except InputError:  # it is told when its own turn comes
            return frame, pixels
        own = (frame.boxes_px, frame.labels)
        pixels, boxes, labels = paste_people(rng, pixels, *own, theirs, donor.persons)
        seen = np.append(frame.seen, np.full(len(labels) - len(frame.labels), BOTH))
        return dataclasses.replace(frame, boxes_px=boxes, labels=labels, seen=seen), pixels

    @cached_property
    def donors(self) -> dict[tuple[str, tuple[int, int]], list[int]]:
        """Indices of the frames with persons, by time of day and size."""
        found = defaultdict(list)
        for i, frame in enumerate(self.frames):
            if frame.n_persons:
                found[self.kind(frame)].append(i)
        return found

    def kind(self, frame: Frame) -> tuple[str, tuple[int, int]]:
        """A frame's time of day, as its set marks it, and its size."""
        is_marked = isinstance(self.root, PairSet)
        return (self.root.time_of_day if is_marked else time_of_day)(frame.id), frame.size

    def read(self, frame_id: str) -> np.ndarray:
        """A frame's pixels, (h, w, C) uint8, from the cache where there is one."""
        if self.cache is not None:
            return self.cache.read(frame_id)
        return read_frame(self.root, frame_id, self.input_mode, self.without, self.filler)


# ------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """images (N, C, H, W) uint8; boxes (N, M, 4) float32 xyxy fractions; labels (N, M) int64, 1 person
    in visible, 2 in LWIR, 3 in both, -1 ignore, 0 padding; masks: per infused map (N, h, w) int64;
    frame ids."""

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


def max_objects(dataset: KaistPairs) -> int:
    """How many objects a sample may have, rounded up, for batches of a shape that stays."""
    options = dataset.augmentation or Augmentation()
    most = max(len(frame.labels) for frame in dataset.frames) + MAX_PASTED * (options.copy_paste > 0)
    most *= 2 if options.mirror_apart or options.crop_apart else 1  # one box may become two
    return max(8, math.ceil(most / 8) * 8)


def pad(arrays: Sequence[np.ndarray], pad_to: int) -> Tensor:
    """Arrays (n_i, …) of N frames as a tensor (N, M, …), filled with zeros: M is the largest n_i, but at
    least `pad_to`."""
    shape = (len(arrays), max(pad_to, *map(len, arrays)), *arrays[0].shape[1:])
    padded = np.zeros(shape, arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class Collate:
    """Samples to a Batch with masks for feature maps of the given (h, w) sizes, and what is bad.

    The Batch is of the frames that could be read, None if there are none.

    map_range: leaves the persons that a map cannot detect out of its mask.
    pad_to: so many objects a frame, or those of the fullest frame if they are more.
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
        boxes, labels, *mask_objects = (pad(own, self.pad_to) for own in arrays)
        masks = box_masks(*mask_objects, self.map_sizes, self.map_range)
        images = torch.stack([sample.image for sample in samples])
        if problem := share_memory([images, boxes, labels, *masks]):
            return problem
        return Batch(images, boxes, labels, masks, [sample.frame_id for sample in samples]), bad


# ------------------------------------------------------------------------- loaders


def training_loader(
    dataset: KaistPairs, model: Detector, *, cache: str, out_of_range: str, **settings: Any
) -> BatchLoader:
    """Shuffled batches for a network, with masks.

    Args:
        cache: folder for decoded frames, "" for none.
        out_of_range: what persons become whom a map cannot detect: "keep", "background" or "ignore".
        settings: as of `BatchLoader`.
    """
    if cache:
        wanted = (cache, dataset.root, [frame.id for frame in dataset.frames], dataset.input_mode)
        if is_main_process():
            cache_frames(*wanted)
        barrier()
        dataset = dataclasses.replace(dataset, cache=cache_frames(*wanted, check=False))
    map_range, priors = None, [own.cpu() for own in model.map_priors()]  # masks are made there
    if out_of_range != "keep":  # a stream's map, which has no priors, goes by the finest
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
    """Batches of a test list's whole frames in their order for a network, after a look at every image.

    Args:
        min_height, margin: whom the masks ignore, as in `make_frames`.
        without: a modality that is blanked.
        settings: as of `BatchLoader`.
    """
    frames = frames_from_gt(ground_truth, min_height, margin)
    check_images(root, [frame.id for frame in frames], model.input_mode, without)
    dataset = KaistPairs(root, frames, **input_kwargs(model), without=without)
    return batch_loader(dataset, model, shuffle=False, **settings)


def input_kwargs(model: Detector) -> dict[str, Any]:
    """What `KaistPairs` is told of the network that its samples are for."""
    return {"input_mode": model.input_mode, "input_size": model.size, "filler": model.filler()}


def batch_loader(
    dataset: KaistPairs, model: Detector, map_range: MapRange | None = None, **settings: Any
) -> BatchLoader:
    """Batches of pairs on the host, for a network and its device; map_range as in `Collate`, settings as of
    `BatchLoader`."""
    on_gpu = model.priors.is_cuda
    # A GPU wants shapes that stay; a CPU nothing to do for padding.
    pad_to = max_objects(dataset) if on_gpu else 1
    collate = Collate([model.grids[i] for i in model.infused_maps], map_range, pad_to)
    return BatchLoader(dataset, collate, pin_memory=on_gpu, **settings)
