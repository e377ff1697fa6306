"""Training batches made on the device: the frame cache in its memory, augmentation by the batch.

The host draws what is random, by the same code and with the same numbers as `KaistPairs`: windows,
flips, colours, and the boxes that follow from them. The device cuts, resizes and distorts. Boxes,
labels, masks and frames are those of `BatchLoader`; pixels differ by rounding alone, because the
CPU rounds between its two passes of the resize.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from batches import Batch, most_objects, pad
from datasets import KaistPairs
from engine.distributed import ALONE, Team
from engine.loader import EpochBatches, items_of, worker_settings
from kaist.frame_cache import FrameCache
from pseudo_gt import MapRange, box_masks
from ssd.augment import frame_mean, mean_colour, whole_frame

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
        torch.tensor(rows), torch.tensor(views, dtype=torch.float32), torch.from_numpy(matrices),
        torch.from_numpy(offsets), *pad(*objects[:2], most), *pad(*objects[2:], most),
    )  # fmt: skip


class DeviceLoader:
    """Batches of a data set with a cache, made on a device; used like `BatchLoader`.

    Every batch has the same shapes. While the device works on one, the host draws the next.

    Args:
        dataset: with a cache, and without copy-paste, whose pixels are of two frames.
        batch_size: frames a batch, of all processes of the team together.
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
        team: Team = ALONE,
    ) -> None:
        self.size = dataset.size
        self.map_sizes = map_sizes
        self.device = device
        self.map_range = map_range and dataclasses.replace(
            map_range, priors=[priors.to(device) for priors in map_range.priors]
        )
        self.frames, means = load_cache(dataset.cache, device)
        self.filler = mean_colour(self.frames.shape[3]).to(device)
        self.batches = EpochBatches(len(dataset), batch_size, dataset.seed, team)
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
            masks = box_masks(
                recipes.mask_boxes, recipes.mask_labels, self.map_sizes, self.map_range
            )
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
            chosen = torch.empty((len(ids), *self.frames.shape[1:]), dtype=torch.uint8,
                                 pin_memory=on_gpu)  # fmt: skip
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


# ------------------------------------------------------------------------- pixels


def make_images(
    frames: Tensor, recipes: Recipes, size: tuple[int, int], filler: Tensor
) -> Tensor:
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
    rows, in_rows = resize_weights(views[:, 1], views[:, 3], views[:, 5], views[:, 7],
                                   torch.zeros_like(mirrored), height, size[0])  # fmt: skip
    columns, in_columns = resize_weights(views[:, 0], views[:, 2], views[:, 4], views[:, 6],
                                         mirrored, width, size[1])  # fmt: skip
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
