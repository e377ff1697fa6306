"""What tools/benchmark.py times of this project, and the inputs that it draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets import Batch, Frame, KaistPairs
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH
from kaist.frame_cache import FrameCache
from kaist.images import read_image
from kaist.miss_rate import GroundTruth
from kaist.results import Detections, write_detections
from model import SSD300
from pseudo_gt import box_masks
from ssd.augment import Augmentation, mean_colour
from ssd.boxes import Predictions
from ssd.losses import MultiBoxLoss, SegmentationLoss
from utils import autocast, detect_image, tune_malloc

MODEL = {"input_mode": "early", "batch_norm": False, "width": 1.0, "prior_set": "ssd300", "size": (300, 300)}
MODEL |= {"infusion": (1, 1, 0, 0, 0, 0), "infusion_conv": False}
LIMITS = {"min_score": 0.01, "nms_iou": 0.45, "max_boxes": 200}  # of detection, as in training


def with_malloc_tuning(make: Callable, *arguments: object) -> Callable:
    """make(…) where the C library keeps freed memory, as in train.py, eval.py and detect.py."""
    tune_malloc()
    return make(*arguments)


# ------------------------------------------------------------------------------ this project's


def make_model(**changes: object) -> SSD300:
    """A network of MODEL's arguments, but for some."""
    return SSD300(**(MODEL | changes))


def make_pairs(root: Path, frames: list[Frame], cache: FrameCache | None) -> KaistPairs:
    """Augmented training samples of a KAIST root, from its files or a frame cache."""
    return KaistPairs(
        root,
        frames,
        input_mode="early",
        input_size=(300, 300),
        filler=mean_colour(4),
        augmentation=Augmentation(),
        masks_follow=True,
        seed=0,
        cache=cache,
    )


def our_step(
    device: torch.device,
    precision: torch.dtype,
    n: int,
    batches: Iterator[Batch] | None = None,
    **changes: object,
) -> Callable[[], None]:
    """A training step with masks, as train.py makes it, on the next of the batches or, without
    any, again and again on n frames of 3 people."""
    model = make_model(**changes).to(device, memory_format=torch.channels_last).train()
    if batches is None:
        images = torch.randint(256, (n, 4, *model.size), dtype=torch.uint8, device=device)
        boxes, labels = random_objects(n, 3, device)
        masks = box_masks(boxes, labels, [model.grids[i] for i in model.infused_maps])
        batches = itertools.repeat(Batch(images, boxes, labels, masks, []))
    loss, on_gpu = our_loss(model), device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9, fused=on_gpu)
    network = torch.compile(model, dynamic=False) if on_gpu else model

    def step() -> None:
        batch = next(batches)
        with autocast(device, precision):
            predictions = network(batch.images)
        total = loss(predictions, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def our_loss(model: SSD300) -> Callable[[Predictions, Batch], Tensor]:
    """The total of a training step's losses."""
    multibox = MultiBoxLoss(model.priors, loc_loss="smooth_l1", loc_reduction="sum")
    segmentation = SegmentationLoss(len(model.infused_maps), cells="mean", maps="sum")

    def loss(predictions: Predictions, batch: Batch) -> Tensor:
        boxes = sum(multibox(predictions, batch.boxes, batch.labels))
        return boxes + segmentation(predictions.seg, batch.masks)[0]

    return loss


def trunk_step(device: torch.device, precision: torch.dtype, n: int, **changes: object) -> Callable[[], None]:
    """The same network's convolutions, ReLUs and pools, forward and backward, and nothing else."""
    model = make_model(**changes).to(device, memory_format=torch.channels_last)
    images = torch.randn(n, 4, *model.size, device=device).to(memory_format=torch.channels_last)
    heads = [*model.loc_heads, *model.conf_heads, *model.seg_heads]
    gradients: list[Tensor] = []

    def outputs() -> list[Tensor]:
        conv4_3 = model.to_conv4_3(images)
        maps = [conv4_3, model.conv6_7(model.to_conv5_3(conv4_3))]
        for extra in model.extras:
            maps.append(extra(maps[-1]))
        inputs = [*maps, *maps, *(maps[i] for i in model.infused_maps)]
        return [head(x) for head, x in zip(heads, inputs, strict=True)]

    if device.type == "cuda":
        outputs = torch.compile(outputs)

    def step() -> None:
        model.zero_grad()
        with autocast(device, precision):
            out = outputs()
        gradients[:] = gradients or [torch.randn_like(x) for x in out]
        torch.autograd.backward(out, gradients)

    return step


def our_image(device: torch.device, precision: torch.dtype, path: Path) -> Callable[[], None]:
    """Detection in a visible image's file, as detect.py makes it."""
    model = make_model(input_mode="visible").to(device, memory_format=torch.channels_last).eval()

    def run() -> None:
        detect_image(model, read_image(path, "visible"), precision, **LIMITS)

    return run


# ------------------------------------------------------------------------------ inputs


def random_objects(n: int, people: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes (n, people + 1, 4) of pedestrians' shape and labels: the last object is ignored."""
    g = torch.Generator().manual_seed(people)
    height = torch.rand(n, people + 1, generator=g) * 0.4 + 0.1
    size = torch.stack([0.35 * height, height], -1)
    corner = torch.rand(n, people + 1, 2, generator=g) * (1 - size)
    labels = torch.ones(n, people + 1, dtype=torch.int64)
    labels[:, -1] = -1
    return torch.cat([corner, corner + size], -1).to(device), labels.to(device)


def random_predictions(n: int, mean: float, device: torch.device) -> Predictions:
    """Predictions of 8,732 priors; the margin of person over background is `mean` +- 2."""
    g = torch.Generator().manual_seed(n)
    conf = torch.randn(n, 8732, 2, generator=g) * 2**0.5
    conf[..., 1] += mean
    return Predictions((torch.randn(n, 8732, 4, generator=g) / 2).to(device), conf.to(device), [])


def random_result(folder: Path, n_frames: int) -> tuple[GroundTruth, Path]:
    """Two people a frame, and a result file with six boxes a frame, some on the people."""
    rng = np.random.default_rng(0)
    ids = [f"set{6 + i % 6:02d}/V{i // 6 // 5000:03d}/I{i // 6 % 5000:05d}" for i in range(n_frames)]
    height = rng.uniform(30, 200, 2 * n_frames)
    size = np.stack([0.41 * height, height], 1)
    boxes = np.concatenate([rng.random(size.shape) * ((FRAME_WIDTH, FRAME_HEIGHT) - size), size], 1)
    frame = np.repeat(np.arange(n_frames), 2)
    occlusion = rng.choice(3, len(boxes), p=(0.7, 0.2, 0.1))
    people = GroundTruth(tuple(ids), frame, boxes, occlusion, rng.random(len(boxes)) < 0.2)
    shuffled = np.tile(boxes, (2, 1))[rng.permutation(2 * len(boxes))]
    found = np.concatenate([boxes, shuffled]) + rng.normal(0, 3, (3 * len(boxes), 4))
    detections = Detections(np.tile(frame, 3), found.clip(1), rng.random(len(found)).round(6))
    path = folder / f"result-{n_frames}.txt"
    write_detections(path, detections, ids)
    return people, path
