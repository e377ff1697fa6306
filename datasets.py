"""KAIST pairs as training and test samples: ignore rules, augmentation.

Every random choice for a sample comes from a generator keyed by (seed, epoch, frame index), so
any number of workers gives the same samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine.config import device_loader_conflict
from engine.distributed import barrier, is_main_process, rank, world_size
from engine.loader import BadFrame, BatchLoader, EpochBatches, items_of, share_memory, worker_settings
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, Annotations, time_of_day
from kaist.files import InputError
from kaist.frame_cache import FrameCache
from kaist.images import cache_frames, check_images, read_frame
from kaist.miss_rate import GroundTruth
from model import SSD300
from pseudo_gt import MapRange, box_masks
from ssd.augment import MOST as MOST_PASTED
from ssd.augment import (
    Augmentation,
    Recipe,
    View,
    distort,
    draw_recipe,
    frame_mean,
    mean_colour,
    paste_people,
    resize,
    view_boxes,
    view_pixels,
    whole_frame,
)
from ssd.boxes import make_grids
from ssd.losses import BACKGROUND, IGNORE

# ------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class Frame:
    """One frame's objects: boxes (n, 4) float32 xyxy pixels of 640x512, labels (n,) int64."""

    id: str
    boxes_px: np.ndarray
    labels: np.ndarray


def label_objects(boxes: np.ndarray, is_person: np.ndarray, min_height: float, margin: float) -> np.ndarray:
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
    return [
        Frame(frame_id, boxes[start:end], labels[start:end])
        for frame_id, start, end in zip(frame_ids, starts, ends, strict=True)
    ]


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

    def place(self, frame: Frame, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A sample's boxes, labels, mask boxes and mask labels."""
        boxes, labels = view_boxes(frame.boxes_px, frame.labels, view, self.size)
        if self.masks_follow:
            return boxes, labels, boxes, labels
        whole = whole_frame(1, self.size).view
        return boxes, labels, *view_boxes(frame.boxes_px, frame.labels, whole, self.size)

    def paste(self, rng: np.random.Generator, frame: Frame, pixels: np.ndarray) -> tuple[Frame, np.ndarray]:
        """The frame, by chance with people of another one of the same time of day."""
        donors = self.donors[time_of_day(frame.id)]
        if not len(donors) or rng.random() >= self.augmentation.copy_paste:
            return frame, pixels
        donor = self.frames[rng.choice(donors)]
        pixels, *objects = paste_people(
            rng, pixels, frame.boxes_px, frame.labels, self.read(donor.id), donor.boxes_px[donor.labels == 1]
        )
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


def frame_loader(
    root: Path, ground_truth: GroundTruth, config: dict[str, Any], device: torch.device, without: str = ""
) -> BatchLoader:
    """Batches of whole frames in their order, with the infused maps' masks of their people, after
    a look at every image.

    Each process gets every `world_size`-th frame. A modality that is `without` is blanked.
    """
    frames = frames_of(ground_truth, config)[rank() :: world_size()]
    check_images(root, [frame.id for frame in frames], config["input_mode"], without)
    # Checkpoints from before a constant was added have its old value.
    centres, network = config.get("centres", "even"), config.get("network", "ssd300")
    grids = make_grids(config["input_size"], centres, network)
    dataset = KaistPairs(
        root,
        frames,
        input_mode=config["input_mode"],
        size=config["input_size"],
        augmentation=None,
        masks_follow=True,
        seed=config["seed"],
        without=without,
    )
    return batch_loader(
        dataset,
        batch_size=config["batch_size"],
        workers=config["workers"],
        start_method=config.get("start_method", "auto"),  # older checkpoints have none
        shuffle=False,
        map_sizes=[grids[i] for i in infused_maps(config)],
        pin_memory=device.type == "cuda",
    )


def frames_of(ground_truth: GroundTruth, config: dict[str, Any]) -> list[Frame]:
    """A test list's frames, with the labels that training would give their objects."""
    first = np.searchsorted(ground_truth.frame, np.arange(1, len(ground_truth.frames)))
    labels = label_objects(ground_truth.boxes, ~ground_truth.ignore, config["min_height"], config["margin"])
    corners = ground_truth.boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    objects = zip(np.split(corners, first), np.split(labels, first), strict=True)
    return [Frame(i, *own) for i, own in zip(ground_truth.frames, objects, strict=True)]


def infused_maps(config: dict[str, Any]) -> list[int]:
    """Indices of the feature maps with a segmentation head."""
    return [i for i, infused in enumerate(config["infusion"]) if infused]


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


def pad(boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], least: int) -> tuple[Tensor, Tensor]:
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

    def __call__(self, items: list[Sample | BadFrame]) -> tuple[Batch | None, list[BadFrame]] | InputError:
        bad = [item for item in items if isinstance(item, BadFrame)]
        samples = [item for item in items if isinstance(item, Sample)]
        if not samples:
            return None, bad
        boxes, labels = pad([s.boxes for s in samples], [s.labels for s in samples], self.objects)
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


def make_loader(
    config: dict[str, Any], frames: list[Frame], model: SSD300, device: torch.device
) -> BatchLoader | DeviceLoader:
    """Training batches with masks for the infused maps."""
    names = ("zoom_out", "hue_saturation", "lwir_jitter", "copy_paste", "modality_dropout")
    augmentation = Augmentation(**{name: config[name] for name in names})
    cache = None
    if config["cache"]:
        ids, source = [frame.id for frame in frames], Path(config["data_root"])
        if is_main_process():
            cache_frames(config["cache"], source, ids, config["input_mode"])
        barrier()
        cache = cache_frames(config["cache"], source, ids, config["input_mode"], check=False)
    dataset = KaistPairs(
        Path(config["data_root"]),
        frames,
        input_mode=config["input_mode"],
        size=config["input_size"],
        augmentation=augmentation if config["augment"] else None,
        masks_follow=config["masks_follow"],
        seed=config["seed"],
        cache=cache,
    )
    settings = {
        "batch_size": config["batch_size"],
        "workers": config["workers"],
        "start_method": config["start_method"],
        "map_sizes": [model.grids[i] for i in model.infused_maps],
        "map_range": choose_range(config, model),
    }
    on_gpu = device.type == "cuda"
    able = on_gpu and not device_loader_conflict(config)
    if config["loader"] == "device" or (config["loader"] == "auto" and able):
        loader = DeviceLoader(dataset, device=device, **settings)
        if is_main_process():
            print(loader)
        return loader
    return batch_loader(
        dataset, shuffle=True, pin_memory=on_gpu, max_bad=config["max_bad_frames"], **settings
    )


def choose_range(config: dict[str, Any], model: SSD300) -> MapRange | None:
    """Which persons belong into a map's mask: None for all of them."""
    if config["out_of_range"] == "keep":
        return None
    outside = {"background": BACKGROUND, "ignore": IGNORE}[config["out_of_range"]]
    return MapRange([p.cpu() for p in model.map_priors()], model.infused_maps, outside)


BLOCK = 64  # frames that go into the device's memory at a time


SHARE = 0.5  # of the device's free memory that frames may take; the rest is for training


class Recipes(NamedTuple):
    """What the host sends for a batch.

    rows: (N,) int64 places in the cache; views: (N, 9) float32 source and target x0, y0, x1, y1,
    and 1 for mirrored; matrices: (N, C, C) and offsets: (N, C) float32; boxes (N, M, 4) and labels
    (N, M) as in a Batch; mask_boxes and mask_labels: what masks are drawn from.
    """

    rows: Tensor
    views: Tensor
    matrices: Tensor
    offsets: Tensor
    boxes: Tensor
    labels: Tensor
    mask_boxes: Tensor
    mask_labels: Tensor


class RecipeDraws(Dataset):
    """The random part of `KaistPairs` with a cache, without a look at a pixel.

    Args:
        means: (F, C) mean colour of every frame of the cache, as from `augment.frame_mean`.
    """

    def __init__(self, pairs: KaistPairs, means: np.ndarray) -> None:
        self.pairs = pairs
        self.means = means

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        """Of a key (epoch, index): frame id, place in the cache, recipe, and boxes and labels as
        from `KaistPairs.place`."""
        frame = self.pairs.frames[key[1]]
        row = self.pairs.cache.rows[frame.id]
        recipe = whole_frame(self.means.shape[1], self.pairs.size)
        if self.pairs.augmentation is not None:
            recipe = self.pairs.draw(self.pairs.generator(*key), frame, self.means[row])
        return frame.id, row, recipe, *self.pairs.place(frame, recipe.view)


def collate_recipes(draws: list[tuple], most: int) -> tuple[list[str], Recipes]:
    """Frame ids and Recipes of a batch, objects padded to `most`."""
    ids, rows, recipes, *objects = zip(*draws, strict=True)
    views = [(*view.source, *view.target, view.flip) for view, _, _ in recipes]
    matrices, offsets = (np.stack([recipe[k] for recipe in recipes]) for k in (1, 2))
    return list(ids), Recipes(
        torch.tensor(rows),
        torch.tensor(views, dtype=torch.float32),
        torch.from_numpy(matrices),
        torch.from_numpy(offsets),
        *pad(*objects[:2], most),
        *pad(*objects[2:], most),
    )


class DeviceLoader:
    """Batches of a data set with a cache, made on a device; used like `BatchLoader`.

    Every batch has the same shapes. While the device works on one, the host draws the next.

    Args:
        dataset: with a cache, and without copy-paste, whose pixels are of two frames.
        batch_size: frames a batch, of all processes together.
        workers: processes that draw; start_method: how they start, as in `BatchLoader`.
        map_sizes, map_range: of the feature maps that masks are wanted for, as in `Collate`.

    Attributes:
        frames: the cache's frames (F, 512, 640, C) uint8: in the device's memory where they fit,
            else mapped from the disk, which in effect is the host's memory.
    """

    def __init__(
        self,
        dataset: KaistPairs,
        *,
        batch_size: int,
        workers: int,
        start_method: str = "auto",
        map_sizes: list[tuple[int, int]],
        device: torch.device,
        map_range: MapRange | None = None,
    ) -> None:
        self.size = dataset.size
        self.map_sizes = map_sizes
        self.device = device
        self.map_range = map_range and dataclasses.replace(
            map_range, priors=[priors.to(device) for priors in map_range.priors]
        )
        self.frames, means = load_cache(dataset.cache, device)
        self.filler = mean_colour(self.frames.shape[3]).to(device)
        self.batches = EpochBatches(len(dataset), batch_size, dataset.seed)
        self.loader = DataLoader(
            RecipeDraws(dataset, means),
            batch_sampler=self.batches,
            collate_fn=partial(collate_recipes, most=most_objects(dataset)),
            **worker_settings(workers, start_method),
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.batches)

    def __str__(self) -> str:
        where = "mapped from the cache" if self.frames.device.type == "cpu" else "in its memory"
        return f"batches made on {self.device}, {self.frames.nbytes / 1e9:.1f} GB of frames {where}"

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, on the device, without the first `skip`."""
        self.batches.epoch, self.batches.skip = epoch, skip
        for ids, recipes, frames in ahead(map(self.send, items_of(self.loader)), self.device):
            images = make_images(frames, recipes, self.size, self.filler)
            masks = box_masks(recipes.mask_boxes, recipes.mask_labels, self.map_sizes, self.map_range)
            yield Batch(images, recipes.boxes, recipes.labels, masks, ids)

    def send(self, drawn: tuple[list[str], Recipes]) -> tuple[list[str], Recipes, Tensor]:
        """Start to copy a batch's recipes, and its frames if they are not there, to the device."""
        ids, recipes = drawn
        on_gpu = self.device.type == "cuda"

        def copy(tensor: Tensor) -> Tensor:
            tensor = tensor.pin_memory() if on_gpu else tensor
            return tensor.to(self.device, non_blocking=on_gpu)

        sent = Recipes(*map(copy, recipes))
        if self.frames.device.type == "cpu":
            chosen = torch.empty((len(ids), *self.frames.shape[1:]), dtype=torch.uint8, pin_memory=on_gpu)
            torch.index_select(self.frames, 0, recipes.rows, out=chosen)
            return ids, sent, copy(chosen)
        return ids, sent, self.frames[sent.rows]


def load_cache(cache: FrameCache, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """All frames (F, 512, 640, C) uint8 of a cache, on a CUDA device if they fit into `SHARE` of
    its free memory, else mapped; and their mean colours (F, C)."""
    mapped = torch.from_numpy(cache.all())
    frames = mapped
    if device.type == "cuda" and mapped.nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]:
        frames = torch.empty(mapped.shape, dtype=torch.uint8, device=device)
    means = []
    for start in tqdm(range(0, len(mapped), BLOCK), desc="reading the cache", leave=False):
        block = mapped[start : start + BLOCK]
        means += [frame_mean(frame) for frame in block.numpy()]
        if frames is not mapped:
            frames[start : start + BLOCK] = block
    return frames, np.stack(means)


def ahead(items: Iterator, device: torch.device) -> Iterator:
    """The same items, each fetched by a thread while the one before is in use."""
    # A thread begins on the first GPU, whichever this process works on.
    use = torch.cuda.set_device if device.index else None
    with ThreadPoolExecutor(1, initializer=use, initargs=(device,) if use else ()) as thread:
        end = object()
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def make_images(frames: Tensor, recipes: Recipes, size: tuple[int, int], filler: Tensor) -> Tensor:
    """Cut, resize (antialiased), mirror and distort a batch: (N, C, *size) uint8.

    The resize is two products with matrices that hold the weights of a triangle filter, one for
    the rows of each sample and one for its columns, which also place and mirror it.

    Args:
        frames: (N, 512, 640, C) uint8.
        filler: (C,) uint8, the colour around the frame.
    """
    n, height, width, channels = frames.shape
    # Half precision holds every uint8, and its weights are good to a twentieth of a grey level.
    dtype = torch.float16 if frames.is_cuda else torch.float32
    views = recipes.views
    mirrored = views[:, 8].bool()
    rows, in_rows = resize_weights(
        views[:, 1], views[:, 3], views[:, 5], views[:, 7], torch.zeros_like(mirrored), height, size[0]
    )
    columns, in_columns = resize_weights(
        views[:, 0], views[:, 2], views[:, 4], views[:, 6], mirrored, width, size[1]
    )
    pixels = torch.bmm(rows.to(dtype), frames.view(n, height, -1).to(dtype))
    pixels = pixels.view(n, size[0], width, channels).permute(0, 3, 1, 2)
    pixels = torch.matmul(pixels, columns.to(dtype).transpose(1, 2).unsqueeze(1))
    content = pixels.float().round_()

    # + 0.5: the conversion to uint8 truncates
    pixels = (recipes.offsets + 0.5)[..., None, None].expand_as(content)
    for k in range(channels):  # by hand: a float32 product may be a TF32 one
        pixels = pixels + recipes.matrices[:, :, k, None, None] * content[:, k : k + 1]
    pixels = pixels.clamp_(0, 255).to(torch.uint8)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(inside, pixels, filler.view(-1, 1, 1))


def resize_weights(
    source_start: Tensor,
    source_end: Tensor,
    target_start: Tensor,
    target_end: Tensor,
    mirrored: Tensor,
    length_in: int,
    length_out: int,
) -> tuple[Tensor, Tensor]:
    """Weights (N, out, in) of an antialiased resize along one axis, and which of the output's
    places (N, out) are in the target.

    Each sample takes the source's pixels [start, end) to the target's, as `F.interpolate` with
    bilinear and antialias does: a triangle one output pixel wide to each side, at least one input
    pixel, over the source's pixels alone.

    Args:
        source_start, source_end, target_start, target_end: (N,) float32 whole numbers.
        mirrored: (N,) bool: the output is reversed.
    """
    place = torch.arange(length_out, device=mirrored.device)
    place = torch.where(mirrored.unsqueeze(1), length_out - 1 - place, place)
    place = place - target_start.unsqueeze(1)
    inside = (place >= 0) & (place < (target_end - target_start).unsqueeze(1))
    scale = ((source_end - source_start) / (target_end - target_start)).unsqueeze(1)
    centre = source_start.unsqueeze(1) + (place + 0.5) * scale
    pixel = torch.arange(length_in, device=mirrored.device) + 0.5
    weights = 1 - (pixel - centre.unsqueeze(2)).abs() / scale.clamp(min=1).unsqueeze(2)
    in_source = (pixel > source_start.unsqueeze(1)) & (pixel < source_end.unsqueeze(1))
    weights = weights.clamp_(min=0) * (in_source.unsqueeze(1) & inside.unsqueeze(2))
    return weights / weights.sum(2, keepdim=True).clamp_(min=1e-6), inside


if __name__ == "__main__":
    raise SystemExit("it checks nothing itself any more: python -m tools.check_data ROOT")
