"""KAIST pairs as training and test samples: ignore rules, augmentation.

Every random choice for a sample comes from a generator keyed by (seed, epoch, frame index), so
any number of workers gives the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from engine.loader import BadFrame
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, Annotations, time_of_day
from kaist.files import InputError
from kaist.frame_cache import FrameCache
from kaist.images import read_frame
from ssd.augment import (
    Augmentation,
    Recipe,
    View,
    distort,
    draw_recipe,
    frame_mean,
    paste_people,
    resize,
    view_boxes,
    view_pixels,
    whole_frame,
)

# ------------------------------------------------------------------------- frames


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


# ------------------------------------------------------------------------- samples


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




class KaistPairs(Dataset):
    """Frames of a KAIST root as samples for a network of a given input.

    Args:
        root: folder with `images/`.
        frames: as from `load_frames`.
        input_mode: "lwir", "visible", "mean", "early" or "halfway".
        size: (height, width) of the network's input.
        augmentation: None resizes the whole frame.
        masks_follow: masks show the boxes after augmentation; False repeats the mistake of the
            logged experiments 18 to 25, whose masks showed the unaugmented frame.
        seed: key of all random choices, together with epoch and frame index.
        cache: decoded frames of this input, read instead of the images.
        without: a modality that is blanked instead of read.

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
        without: str = "",
    ) -> None:
        self.root = Path(root)
        self.frames = frames
        self.input_mode = input_mode
        self.size = tuple(size)
        self.augmentation = augmentation
        self.masks_follow = masks_follow
        self.seed = seed
        self.cache = cache
        self.without = without

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
        return read_frame(self.root, frame_id, self.input_mode, self.without)


if __name__ == "__main__":
    raise SystemExit("it checks nothing itself any more: python -m tools.check_data ROOT")
