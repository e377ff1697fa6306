"""KAIST pairs as training and test batches: ignore rules, decoding, samples, padding, masks.

Every random choice for a sample comes from a generator keyed by (seed, epoch, frame index), so
any number of workers gives the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from augment import (
    Augmentation,
    jitter,
    random_window,
    resize,
    snap,
    view_boxes,
    view_pixels,
)
from errors import InputError
from kaist import FRAME_HEIGHT, FRAME_WIDTH, Annotations, Objects, image_path
from pseudo_gt import box_masks

MODALITIES = {"lwir": ("lwir",), "visible": ("visible",),
              "mean": ("visible", "lwir"), "early": ("visible", "lwir")}  # fmt: skip


# ------------------------------------------------------------------------- frames and pixels


@dataclass(frozen=True)
class Frame:
    """One frame's objects: boxes (n, 4) float32 xyxy pixels of 640x512, labels (n,) int64."""

    id: str
    boxes_px: np.ndarray
    labels: np.ndarray


def label_objects(objects: Objects, min_height: float, margin: float) -> np.ndarray:
    """(n,) int64 labels: 1 for a person to learn, -1 for an object to ignore.

    Ignored are other labels than person, objects flagged in the file, persons lower than
    `min_height` pixels, and persons that leave the frame less `margin` pixels on each side.
    """
    x, y, w, h = objects.boxes.T
    inside = (x >= margin) & (y >= margin)
    inside &= (x + w <= FRAME_WIDTH - margin) & (y + h <= FRAME_HEIGHT - margin)
    person = np.array([label == "person" for label in objects.labels], dtype=bool)
    learn = person & ~objects.ignore & (h >= min_height) & inside
    return np.where(learn, 1, -1).astype(np.int64)


def load_frames(
    frame_ids: list[str], annotations: Annotations, *, min_height: float, margin: float
) -> list[Frame]:
    """Read the annotations of all frames; a malformed file stops here, before any training."""
    frames = []
    for frame_id in frame_ids:
        objects = annotations.read(frame_id)
        boxes = objects.boxes.astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        frames.append(Frame(frame_id, boxes, label_objects(objects, min_height, margin)))
    return frames


def check_images(root: Path, frame_ids: list[str], input_mode: str) -> None:
    """Look at every image's header: it exists, is an image, and has KAIST's size.

    Raises:
        InputError: for the first image that is missing, unreadable or of another size.
    """
    for frame_id in frame_ids:
        for modality in MODALITIES[input_mode]:
            with open_image(image_path(root, frame_id, modality)):
                pass


def open_image(path: Path) -> Image.Image:
    """Open an image of KAIST's size without decoding it."""
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise InputError(
            "image not found", "check DATA_ROOT, the image list and INPUT_MODE", file=path
        ) from None
    except (UnidentifiedImageError, OSError) as error:
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


def read_image(path: Path, modality: str) -> np.ndarray:
    """Decode one image: visible as (512, 640, 3), LWIR as (512, 640, 1), uint8."""
    with open_image(path) as image:
        try:
            if modality == "visible":
                return np.array(image.convert("RGB"))
            image.draft("L", None)  # a JPEG's luma alone: no colour conversion to undo
            return np.array(image.convert("L"))[..., None]
        except OSError as error:
            raise InputError(f"broken image ({error})", "copy it again", file=path) from None


def read_frame(root: Path, frame_id: str, input_mode: str) -> np.ndarray:
    """The modalities of one frame side by side: (512, 640, C) uint8, visible first."""
    images = [read_image(image_path(root, frame_id, m), m) for m in MODALITIES[input_mode]]
    return images[0] if len(images) == 1 else np.concatenate(images, axis=2)


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

    Indexed by (epoch, index). A frame that cannot be read is returned as its InputError, because
    an exception would cross from a worker process as a traceback.
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
    ) -> None:
        self.root = Path(root)
        self.frames = frames
        self.input_mode = input_mode
        self.size = tuple(size)
        self.augmentation = augmentation
        self.masks_follow = masks_follow
        self.seed = seed

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        epoch, index = key
        frame = self.frames[index]
        try:
            pixels = read_frame(self.root, frame.id, self.input_mode)
        except InputError as error:
            return error
        whole = snap((0, 0, FRAME_WIDTH, FRAME_HEIGHT), self.size, flip=False)
        if self.augmentation is None:
            view, content = whole, resize(pixels, whole)
        else:
            rng = np.random.default_rng((self.seed, epoch, index))
            people = frame.boxes_px[frame.labels == 1]
            window = random_window(rng, people, self.augmentation.zoom_out)
            view = snap(window, self.size, flip=bool(rng.random() < 0.5))
            content = resize(pixels, view)
            content = jitter(content, pixels, rng, self.augmentation.hue_saturation)
        image = view_pixels(content, view, self.size)
        boxes, labels = view_boxes(frame.boxes_px, frame.labels, view, self.size)
        mask_boxes, mask_labels = boxes, labels
        if not self.masks_follow:
            mask_boxes, mask_labels = view_boxes(frame.boxes_px, frame.labels, whole, self.size)
        return Sample(image, boxes, labels, mask_boxes, mask_labels, frame.id)


def pad(boxes: list[np.ndarray], labels: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Lists of (n, 4) and (n,) to (N, M, 4) and (N, M), M the largest n but at least 1."""
    most = max(1, *(len(b) for b in boxes))
    padded = torch.zeros((len(boxes), most, 4))
    padded_labels = torch.zeros((len(boxes), most), dtype=torch.int64)
    for i, (b, label) in enumerate(zip(boxes, labels, strict=True)):
        padded[i, : len(b)] = torch.from_numpy(b)
        padded_labels[i, : len(b)] = torch.from_numpy(label)
    return padded, padded_labels


@dataclass(frozen=True)
class Collate:
    """Samples to a Batch with masks for feature maps of the given (h, w) sizes."""

    map_sizes: list[tuple[int, int]]

    def __call__(self, samples: list[Sample | InputError]) -> Batch | InputError:
        for sample in samples:
            if isinstance(sample, InputError):
                return sample
        boxes, labels = pad([s.boxes for s in samples], [s.labels for s in samples])
        mask_boxes, mask_labels = pad(
            [s.mask_boxes for s in samples], [s.mask_labels for s in samples]
        )
        masks = box_masks(mask_boxes, mask_labels, self.map_sizes)
        images = torch.stack([s.image for s in samples])
        return Batch(images, boxes, labels, masks, [s.frame_id for s in samples])


class EpochSampler(Sampler):
    """Keys (epoch, index) of one epoch: shuffled by (seed, epoch), or in order without a seed.

    epoch: which epoch comes next; skip: frames at its start that are left out.
    """

    def __init__(self, length: int, seed: int | None) -> None:
        self.length = length
        self.seed = seed
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.seed is not None:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        for index in order[self.skip :].tolist():
            yield self.epoch, index


class BatchLoader:
    """Batches of a data set, epoch by epoch, with worker processes kept between epochs.

    Args:
        shuffle: training order: another permutation each epoch, an incomplete last batch is left
            out (unless it is the only one). False: the frames in their order, all of them.
        map_sizes: (h, w) of the feature maps that masks are wanted for.
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
    ) -> None:
        self.sampler = EpochSampler(len(dataset), dataset.seed if shuffle else None)
        self.loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self.sampler,
            drop_last=shuffle and len(dataset) >= batch_size,
            num_workers=workers,
            collate_fn=Collate(map_sizes),
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without the first `skip`.

        Raises:
            InputError: a frame turned out to be unreadable.
        """
        self.sampler.epoch, self.sampler.skip = epoch, skip * self.loader.batch_size
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch
