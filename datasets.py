"""KAIST pairs as training and test batches: ignore rules, decoding, samples, padding, masks.

Every random choice for a sample comes from a generator keyed by (seed, epoch, frame index), so
any number of workers gives the same samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from augment import (
    Augmentation,
    Recipe,
    View,
    distort,
    draw_recipe,
    frame_mean,
    resize,
    view_boxes,
    view_pixels,
    whole_frame,
)
from copy_paste import MOST as MOST_PASTED
from copy_paste import paste_people
from errors import InputError, run_script
from frame_cache import FrameCache, open_cache
from kaist import FRAME_HEIGHT, FRAME_WIDTH, Annotations, image_path, time_of_day
from parallel import ALONE, Team
from pseudo_gt import MapRange, box_masks
from remember import remember

MODALITIES = {"lwir": ("lwir",), "visible": ("visible",),
              "mean": ("visible", "lwir"), "early": ("visible", "lwir")}  # fmt: skip


# ------------------------------------------------------------------------- frames and pixels


@dataclass(frozen=True)
class Frame:
    """One frame's objects: boxes (n, 4) float32 xyxy pixels of 640x512, labels (n,) int64."""

    id: str
    boxes_px: np.ndarray
    labels: np.ndarray


def label_objects(
    boxes: np.ndarray, is_person: np.ndarray, min_height: float, margin: float
) -> np.ndarray:
    """(n,) int64 labels: 1 for a person to learn, -1 for an object to ignore.

    Ignored are objects that are not plainly a person, persons lower than `min_height` pixels, and
    persons that leave the frame less `margin` pixels on each side.

    Args:
        boxes: (n, 4) xywh pixels; is_person: (n,) bool.
    """
    x, y, w, h = boxes.T
    inside = (x >= margin) & (y >= margin)
    inside &= (x + w <= FRAME_WIDTH - margin) & (y + h <= FRAME_HEIGHT - margin)
    return np.where(is_person & (h >= min_height) & inside, 1, -1).astype(np.int64)


def load_frames(
    frame_ids: list[str], annotations: Annotations, *, min_height: float, margin: float
) -> list[Frame]:
    """Read the annotations of all frames; a malformed file stops here, before any training."""
    objects, counts = annotations.read_all(frame_ids)
    boxes = objects.boxes.astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    labels = label_objects(objects.boxes, objects.is_person, min_height, margin)
    ends = counts.cumsum().tolist()
    starts = [0, *ends[:-1]]
    return [Frame(frame_id, boxes[start:end], labels[start:end])
            for frame_id, start, end in zip(frame_ids, starts, ends, strict=True)]  # fmt: skip


def check_images(root: Path, frame_ids: list[str], input_mode: str) -> None:
    """Look at every image's header: it exists, is an image, and has KAIST's size.

    Raises:
        InputError: for the first image that is missing, unreadable or of another size.
    """
    paths = [image_path(root, frame_id, modality) for frame_id in frame_ids
             for modality in MODALITIES[input_mode]]  # fmt: skip

    def look() -> dict[str, np.ndarray]:
        for path in paths:
            with open_image(path):
                pass
        return {}

    remember("images", paths, look)


def open_image(path: Path) -> Image.Image:
    """Open an image of KAIST's size without decoding it."""
    try:
        image = Image.open(path, formats=("JPEG", "PNG"))
    except FileNotFoundError:
        raise InputError(
            "image not found", "check DATA_ROOT, the image list and INPUT_MODE", file=path
        ) from None
    except Exception as error:  # whatever Pillow meets in broken data, or a size beyond reason
        raise InputError(f"unreadable image ({error})", "copy it again", file=path) from None
    if image.size != (FRAME_WIDTH, FRAME_HEIGHT):
        size = "{}x{}".format(*image.size)
        image.close()
        raise InputError(
            f"the image is {size}, KAIST frames are {FRAME_WIDTH}x{FRAME_HEIGHT}",
            "use the benchmark's own images",
            file=path,
        )
    return image


def decode(path: Path, modality: str) -> Image.Image:
    """Decode one image of KAIST's size: visible as RGB, LWIR as a single channel."""
    with open_image(path) as image:
        mode = "RGB" if modality == "visible" else "L"
        try:
            image.draft(mode, None)  # a grey JPEG's luma alone: no colour conversion to undo
            image.load()
            return image if image.mode == mode else image.convert(mode)
        except Exception as error:  # whatever Pillow meets in broken data
            raise InputError(f"broken image ({error})", "copy it again", file=path) from None


def read_image(path: Path, modality: str) -> np.ndarray:
    """Decode one image: visible as (512, 640, 3), LWIR as (512, 640, 1), uint8."""
    pixels = np.array(decode(path, modality))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def read_frame(root: Path, frame_id: str, input_mode: str) -> np.ndarray:
    """The modalities of one frame side by side: (512, 640, C) uint8, visible first."""
    modalities = MODALITIES[input_mode]
    if len(modalities) == 1:
        return read_image(image_path(root, frame_id, modalities[0]), modalities[0])
    visible, lwir = (decode(image_path(root, frame_id, m), m) for m in modalities)
    visible.putalpha(lwir)  # Pillow keeps four bytes a pixel anyhow: much faster than numpy
    return np.array(visible)


def cache_frames(
    folder: str | Path, root: Path, frame_ids: Sequence[str], input_mode: str
) -> FrameCache:
    """The frames of a list decoded into a cache in `folder`, drawn only where it is not there yet.

    Raises:
        InputError: an image cannot be read, or the disk is too small.
    """
    def read(frame_id: str) -> np.ndarray:
        return read_frame(root, frame_id, input_mode)

    return open_cache(folder, Path(root), frame_ids, MODALITIES[input_mode], read)


# ------------------------------------------------------------------------- samples and batches


class Sample(NamedTuple):
    """One frame as the network sees it; boxes are xyxy fractions of the input.

    mask_boxes, mask_labels: what the masks are drawn from: the boxes, or those of the unaugmented
    frame where masks do not follow the augmentation.
    """

    image: Tensor
    boxes: np.ndarray
    labels: np.ndarray
    mask_boxes: np.ndarray
    mask_labels: np.ndarray
    frame_id: str


class BadFrame(NamedTuple):
    """What comes in a sample's place when its frame cannot be read."""

    frame_id: str
    error: InputError


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


class KaistPairs(Dataset):
    """Frames of a KAIST root as samples for a network of a given input.

    Args:
        root: folder with `images/`.
        frames: as from `load_frames`.
        input_mode: "lwir", "visible", "mean" or "early".
        size: (height, width) of the network's input.
        augmentation: None resizes the whole frame.
        masks_follow: masks show the boxes after augmentation; False repeats the mistake of the
            logged experiments 18 to 25, whose masks showed the unaugmented frame.
        seed: key of all random choices, together with epoch and frame index.
        cache: decoded frames of this input, read instead of the images.

    Indexed by (epoch, index). A frame that cannot be read comes as a BadFrame, because an exception
    would end the whole batch.
    """

    def __init__(
        self,
        root: Path,
        frames: list[Frame],
        *,
        input_mode: str,
        size: tuple[int, int],
        augmentation: Augmentation | None,
        masks_follow: bool,
        seed: int,
        cache: FrameCache | None = None,
    ) -> None:
        self.root = Path(root)
        self.frames = frames
        self.input_mode = input_mode
        self.size = tuple(size)
        self.augmentation = augmentation
        self.masks_follow = masks_follow
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, key: tuple[int, int]) -> Sample | BadFrame:
        epoch, index = key
        try:
            return self.sample(epoch, index)
        except InputError as error:
            return BadFrame(self.frames[index].id, error)

    def sample(self, epoch: int, index: int) -> Sample:
        """A frame's sample of an epoch."""
        frame = self.frames[index]
        pixels = self.read(frame.id)
        recipe = whole_frame(pixels.shape[2], self.size)
        if self.augmentation is not None:
            rng = self.generator(epoch, index)
            if self.augmentation.copy_paste:
                frame, pixels = self.paste(rng, frame, pixels)
            recipe = self.draw(rng, frame, frame_mean(pixels))
        content = distort(resize(pixels, recipe.view), recipe.matrix, recipe.offset)
        image = view_pixels(content, recipe.view, self.size)
        return Sample(image, *self.place(frame, recipe.view), frame.id)

    def generator(self, epoch: int, index: int) -> np.random.Generator:
        """The source of all that is random about a frame's sample of an epoch."""
        return np.random.default_rng((self.seed, epoch, index))

    def draw(self, rng: np.random.Generator, frame: Frame, mean: np.ndarray) -> Recipe:
        """How a sample is made of a frame with this mean colour."""
        people = frame.boxes_px[frame.labels == 1]
        return draw_recipe(rng, people, mean, self.augmentation, self.size)

    def place(
        self, frame: Frame, view: View
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A sample's boxes, labels, mask boxes and mask labels."""
        boxes, labels = view_boxes(frame.boxes_px, frame.labels, view, self.size)
        if self.masks_follow:
            return boxes, labels, boxes, labels
        whole = whole_frame(1, self.size).view
        return boxes, labels, *view_boxes(frame.boxes_px, frame.labels, whole, self.size)

    def paste(
        self, rng: np.random.Generator, frame: Frame, pixels: np.ndarray
    ) -> tuple[Frame, np.ndarray]:
        """The frame, by chance with people of another one of the same time of day."""
        donors = self.donors[time_of_day(frame.id)]
        if not len(donors) or rng.random() >= self.augmentation.copy_paste:
            return frame, pixels
        donor = self.frames[rng.choice(donors)]
        pixels, *objects = paste_people(
            rng, pixels, frame.boxes_px, frame.labels,
            self.read(donor.id), donor.boxes_px[donor.labels == 1],
        )  # fmt: skip
        return Frame(frame.id, *objects), pixels

    @cached_property
    def donors(self) -> dict[str, np.ndarray]:
        """Indices of the frames with persons, by time of day."""
        found: dict[str, list[int]] = {"day": [], "night": []}
        for i, frame in enumerate(self.frames):
            if (frame.labels == 1).any():
                found[time_of_day(frame.id)].append(i)
        return {time: np.array(indices) for time, indices in found.items()}

    def read(self, frame_id: str) -> np.ndarray:
        """A frame's pixels, (512, 640, C) uint8, from the cache where there is one."""
        if self.cache is not None:
            return self.cache.read(frame_id)
        return read_frame(self.root, frame_id, self.input_mode)


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

    def __call__(self, items: list[Sample | BadFrame]) -> tuple[Batch | None, list[BadFrame]]:
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
        return Batch(images, boxes, labels, masks, [s.frame_id for s in samples]), bad


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

    Args:
        batch_size: frames a batch, of all processes of the team together.
        shuffle: training order: another permutation each epoch, an incomplete last batch is left
            out (unless it is the only one). False: the frames in their order, all of them.
        map_sizes, map_range: of the feature maps that masks are wanted for, as in `Collate`.
        max_bad: frames that may turn out to be unreadable; they are left out, with a warning each.

    Attributes:
        bad: the unreadable frames met so far, by their id, in this process or another of the team.
    """

    def __init__(
        self,
        dataset: KaistPairs,
        *,
        batch_size: int,
        workers: int,
        shuffle: bool,
        map_sizes: list[tuple[int, int]],
        pin_memory: bool,
        map_range: MapRange | None = None,
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
            num_workers=workers,
            # A GPU wants shapes that stay; a CPU nothing to do for padding.
            collate_fn=Collate(map_sizes, map_range, most_objects(dataset) if pin_memory else 1),
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch | None]:
        """The batches of one epoch, without the first `skip`.

        None stands for a batch of which no frame can be read, or none of one process's share: so
        all processes keep in step. It can come only where `max_bad` allows it.

        Raises:
            BadFrames: more than `max_bad` frames turned out to be unreadable, at the same batch
                in every process.
        """
        self.batches.epoch, self.batches.skip = epoch, skip
        team = self.batches.team
        for batch, bad in self.loader:
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


def main() -> None:
    """`python datasets.py --check ROOT --list LIST` looks for faults in a data set."""
    from check_data import main as check  # here, because it needs what is above

    sys.exit(check())


if __name__ == "__main__":
    run_script(main)
