"""What tools/benchmark.py times: this project's steps and torchvision's, on drawn inputs."""

from __future__ import annotations

import copy
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection.ssd import SSD, ssd300_vgg16
from torchvision.ops import box_convert, box_iou
from torchvision.transforms import v2

from datasets import AUGMENTATION, PAIRS, Batch, KaistPairs
from engine.config import ROOT, model_arguments, pick, read_constants, resolve_row
from engine.optim import GuardedStep, make_optimizer, update_ema
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, image_path, open_annotations, read_image_list
from kaist.frame_cache import FrameCache
from kaist.frames import Frame, load_frames
from kaist.images import read_frame, read_image
from kaist.miss_rate import FPPI_POINTS, GroundTruth, Setup
from kaist.results import Detections, write_detections
from model import INPUT_CHANNELS, SSD300, make_network
from pseudo_gt import box_masks
from ssd.augment import Augmentation, mean_colour
from ssd.boxes import Predictions, encode
from ssd.layers import Detector
from ssd.losses import TERMS, Criterion, MultiBoxLoss, SegmentationLoss
from utils import autocast, compile_model, detect_image, tune_malloc

MODEL = {"input_mode": "early", "batch_norm": False, "width": 1.0, "prior_set": "ssd300", "size": (300, 300)}
MODEL |= {"infusion": (1, 1, 0, 0, 0, 0), "infusion_conv": False}
LIMITS = {"min_score": 0.01, "nms_iou": 0.45, "max_boxes": 200}  # of detection, as in training
MAPS = [(38, 38), (19, 19)]  # of which there are masks


def with_malloc_tuning(make: Callable, *arguments: object) -> Callable:
    """make(…) where the C library keeps freed memory, as in train.py, eval.py and detect.py."""
    tune_malloc()
    return make(*arguments)


# ------------------------------------------------------------------------------ this project's


def our_model(device: torch.device, **changes: object) -> SSD300:
    """A network of MODEL's arguments, but for some."""
    return SSD300(**(MODEL | changes)).to(device, memory_format=torch.channels_last)


def our_step(
    device: torch.device,
    precision: torch.dtype,
    n: int,
    batches: Iterator[Batch] | None = None,
    width: float = 1.0,
) -> Callable[[], None]:
    """A training step with masks, as train.py makes it, on the next of the batches or, without
    any, again and again on n frames of 3 people."""
    model = our_model(device, width=width).train()
    if batches is None:
        images = torch.randint(256, (n, 4, 300, 300), dtype=torch.uint8, device=device)
        boxes, labels = random_objects(n, 3, device)
        batches = itertools.repeat(Batch(images, boxes, labels, box_masks(boxes, labels, MAPS), []))
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
    segmentation = SegmentationLoss(len(MAPS), cells="mean", maps="sum")

    def loss(predictions: Predictions, batch: Batch) -> Tensor:
        boxes = sum(multibox(predictions, batch.boxes, batch.labels))
        return boxes + segmentation(predictions.seg, batch.masks)[0]

    return loss


def bare_step(device: torch.device, precision: torch.dtype, n: int, width: float = 1.0) -> Callable[[], None]:
    """The same network's convolutions, ReLUs and pools, forward and backward, and nothing else."""
    model = our_model(device, width=width)
    model.conv4_3_norm = nn.Identity()
    images = torch.randn(n, 4, 300, 300, device=device).to(memory_format=torch.channels_last)
    heads = [*model.loc_heads, *model.conf_heads, *model.seg_heads]
    gradients: list[Tensor] = []

    def outputs() -> list[Tensor]:
        maps = model.feature_maps(images)
        return [head(x) for head, x in zip(heads, [*maps, *maps, *maps[: len(MAPS)]], strict=True)]

    if device.type == "cuda":
        outputs = torch.compile(outputs)

    def step() -> None:
        model.zero_grad()
        with autocast(device, precision):
            out = outputs()
        gradients[:] = gradients or [torch.randn_like(x) for x in out]
        torch.autograd.backward(out, gradients)

    return step


def our_image(device: torch.device, precision: torch.dtype, path: Path) -> Callable[[], object]:
    """Detection in a visible image's file, as detect.py makes it."""
    model = our_model(device, input_mode="visible").eval()
    return lambda: detect_image(model, read_image(path, "visible"), precision, **LIMITS)


# ------------------------------------------------------------------------------ a row's


def row_config(row: str, **changes: object) -> Namespace:
    """train.py's constants as a row of the lab book has them, but for some."""
    constants = {name: value for name, (value, _) in read_constants(ROOT / "train.py").items()}
    return Namespace(**(constants | resolve_row(row) | changes))


def row_network(config: Namespace) -> tuple[Detector, Criterion]:
    """A row's untrained network and its losses, made where torch makes tensors."""
    model = make_network(**model_arguments(config))
    heads = (model.priors, model.grids, model.infused_maps, model.n_logits)
    return model, Criterion(*heads, **pick(config, *TERMS))


def row_maps(config: Namespace) -> list[tuple[int, int]]:
    """(height, width) of the feature maps that have masks."""
    with torch.device("meta"):
        model = make_network(**model_arguments(config))
    return [model.grids[i] for i in model.infused_maps]


class Step:
    """A row's training step on a device, as train.py makes it, from untrained weights.

    Args:
        config: as from `row_config`; mode: what COMPILE says.
    """

    def __init__(self, config: Namespace, device: torch.device, precision: torch.dtype, mode: str = "off"):
        self.config, self.device, self.precision, self.taken = config, device, precision, 0
        model, criterion = row_network(config)
        model, self.criterion = model.to(device, memory_format=torch.channels_last), criterion.to(device)
        rates = pick(config, "bias_lr_factor", "weight_decay")
        self.optimizer = make_optimizer(model, self.criterion, name=config.optimizer, lr=1e-6, **rates)
        self.ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else model
        self.guarded_step = GuardedStep(model, self.optimizer)
        self.model, self.network = model.train(), compile_model(model, mode, device)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.criterion.parameters()]

    def losses(self, batch: Batch) -> Tensor:
        """The loss terms, (terms,), total first."""
        with autocast(self.device, self.precision):
            predictions = self.network(batch.images)
        return self.criterion(predictions, batch.boxes, batch.labels, batch.masks)

    def __call__(self, batch: Batch) -> None:
        losses = self.losses(batch)
        self.optimizer.zero_grad()
        losses[0].backward()
        self.guarded_step(losses.detach())
        update_ema(self.ema, self.model, self.config.ema_decay, self.taken)
        self.taken += 1


def row_batch(config: Namespace, n: int) -> Batch:
    """n frames of 3 people and noise for a row's network, on the CPU; always the same."""
    g = torch.Generator().manual_seed(n)
    size = (n, INPUT_CHANNELS[config.input_mode], *config.input_size)
    images = torch.randint(256, size, dtype=torch.uint8, generator=g)
    boxes, labels = random_objects(n, 3, torch.device("cpu"))
    return Batch(images, boxes, labels, box_masks(boxes, labels, row_maps(config)), ["frame"] * n)


def row_image(
    config: Namespace, device: torch.device, precision: torch.dtype, root: Path, frame: Frame
) -> Callable[[], object]:
    """Detection by a row's network in a frame, from its files, with the row's limits."""
    model, settings = row_detector(config, device), pick(config, "test_flip", *LIMITS)

    def run() -> object:
        pixels = read_frame(root, frame.id, config.input_mode)
        return detect_image(model, pixels, precision, **settings)

    return run


def row_detector(config: Namespace, device: torch.device) -> Detector:
    """A row's network for detection, of which few priors say person, as of a trained one."""
    model = row_network(config)[0].to(device, memory_format=torch.channels_last)
    for head in model.eval().conf_heads:
        head.bias.data.view(-1, model.n_logits)[:, 1:] = -4.0
    return model


def people_frames(root: Path) -> list[Frame]:
    """The training frames of a KAIST root that hold people."""
    ids = read_image_list(root / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(root), min_height=12, margin=5)
    return [frame for frame in frames if (frame.labels == 1).any()]


def row_pairs(
    root: Path, frames: list[Frame], config: Namespace, cache: FrameCache | None = None
) -> KaistPairs:
    """A row's samples of a KAIST root, augmented if it says so, from its files or a frame cache."""
    filler = mean_colour(INPUT_CHANNELS[config.input_mode])
    options = Augmentation(**pick(config, *AUGMENTATION)) if config.augment else None
    return KaistPairs(root, frames, filler=filler, augmentation=options, cache=cache, **pick(config, *PAIRS))


# ------------------------------------------------------------------------------ torchvision's


def torchvision_ssd(device: torch.device) -> SSD:
    """SSD300 for persons, in fp32, untrained."""
    network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2, score_thresh=0.01)
    return network.to(device)


def torchvision_step(device: torch.device, n: int) -> Callable[[], None]:
    """A training step, without masks."""
    model = torchvision_ssd(device).train()
    images = list(torch.rand(n, 3, 300, 300, device=device))
    labels = torch.ones(3, dtype=torch.int64, device=device)
    targets = [{"boxes": b[:3] * 300, "labels": labels} for b in random_objects(n, 3, device)[0]]
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)

    def step() -> None:
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_loss(predictions: Predictions, boxes: Tensor, labels: Tensor, priors: Tensor) -> Callable:
    """A function that matches image by image, and gives the sum of both losses of all images at once, as
    the usual SSD code does; ignored objects are left out."""
    corners = box_convert(priors, "cxcywh", "xyxy")
    people = [b[x == 1] for b, x in zip(boxes, labels, strict=True)]

    def loss() -> Tensor:
        target = torch.zeros(len(boxes), len(priors), dtype=torch.int64, device=boxes.device)
        matched = boxes.new_zeros(len(boxes), len(priors), 4)
        for i, own in enumerate(people):
            iou = box_iou(own, corners)
            overlap, person = iou.max(0)
            best = iou.argmax(1)
            person[best] = torch.arange(len(own), device=boxes.device)
            overlap[best] = 1.0
            target[i] = overlap >= 0.5
            matched[i] = own[person]
        positive = target > 0
        offsets = encode(
            box_convert(matched[positive], "xyxy", "cxcywh"), priors.expand_as(matched)[positive]
        )
        loc = F.smooth_l1_loss(predictions.loc[positive], offsets, reduction="sum")
        entropy = F.cross_entropy(predictions.conf.flatten(0, 1), target.flatten(), reduction="none")
        entropy = entropy.view_as(target)
        hardest = entropy.masked_fill(positive, 0).sort(1, descending=True).values
        rank = torch.arange(len(priors), device=boxes.device)
        mined = rank < 3 * positive.sum(1, keepdim=True)
        return (loc + entropy[positive].sum() + hardest[mined].sum()) / positive.sum()

    return loss


def torchvision_image(device: torch.device, path: Path) -> Callable[[], object]:
    """Detection in an image's file."""
    model = torchvision_ssd(device).eval()
    return torch.inference_mode()(lambda: model([decode_image(path, ImageReadMode.RGB).to(device) / 255]))


def torchvision_sample(root: Path) -> Callable[[Frame], tuple]:
    """The SSD recipe on a pair: zoom-out on a canvas, crop, flip, resize; and our masks."""
    transform = v2.Compose(
        [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.Resize((300, 300), antialias=True),
            v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[-1]["labels"]),
        ]
    )

    def sample(frame: Frame) -> tuple:
        paths = [image_path(root, frame.id, modality) for modality in ("visible", "lwir")]
        pair = [tv_tensors.Image(Image.open(path).convert("RGB")) for path in paths]
        size = (FRAME_HEIGHT, FRAME_WIDTH)
        boxes = tv_tensors.BoundingBoxes(frame.boxes_px, format="XYXY", canvas_size=size)
        visible, lwir, target = transform(*pair, {"boxes": boxes, "labels": torch.from_numpy(frame.labels)})
        boxes = (target["boxes"] / 300)[None]
        return torch.cat([visible, lwir[:1]]), boxes, box_masks(boxes, target["labels"][None], MAPS)

    return sample


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


def random_result(path: Path, n_frames: int) -> GroundTruth:
    """Two people a frame, and a result file with six boxes a frame, some on the people."""
    rng = np.random.default_rng(0)
    ids = tuple(f"set{6 + i % 6:02d}/V000/I{i // 6:05d}" for i in range(n_frames))
    height = rng.uniform(30, 200, 2 * n_frames)
    size = np.stack([0.41 * height, height], 1)
    boxes = np.concatenate([rng.random(size.shape) * ((FRAME_WIDTH, FRAME_HEIGHT) - size), size], 1)
    frame, occlusion = np.repeat(np.arange(n_frames), 2), rng.choice(3, len(boxes), p=(0.7, 0.2, 0.1))
    found = np.concatenate([boxes, np.tile(boxes, (2, 1))[rng.permutation(2 * len(boxes))]])
    found = (found + rng.normal(0, 3, found.shape)).clip(1)
    write_detections(path, Detections(np.tile(frame, 3), found, rng.random(len(found)).round(6)), ids)
    return GroundTruth(ids, frame, boxes, occlusion, rng.random(len(boxes)) < 0.2)


# ------------------------------------------------------------------------------ the metric, plainly


def plain_miss_rates(path: Path, ground_truth: GroundTruth, setups: dict[str, Setup]) -> dict[str, float]:
    """Read a text result file and evaluate it frame by frame, for each setup anew."""
    rows: list[list[list[float]]] = [[] for _ in ground_truth.frames]
    for line in path.read_text().splitlines():
        image_id, *row = map(float, line.split(","))
        rows[int(image_id) - 1].append(row)
    rates = {}
    x, y, w, h = ground_truth.boxes.T
    inside = (x >= 5) & (y >= 5) & (x + w <= FRAME_WIDTH - 5) & (y + h <= FRAME_HEIGHT - 5)
    for name, setup in setups.items():
        low, high = setup.heights
        counts = inside & ~ground_truth.ignore & (low <= h) & (h <= high)
        counts &= np.isin(ground_truth.occlusion, setup.occlusion)
        people: list[list[tuple]] = [[] for _ in ground_truth.frames]
        for i, box, positive in zip(ground_truth.frame, ground_truth.boxes.tolist(), counts, strict=True):
            people[i].append((box, positive))
        frames = np.flatnonzero(ground_truth.in_subset(setup.subset))
        n_people = sum(positive for i in frames for _, positive in people[i])
        hits = sorted(
            (hit for i in frames for hit in match_frame(rows[i], people[i])), key=lambda hit: -hit[0]
        )
        found = np.array([hit for _, hit in hits], dtype=bool)
        fppi, recall = np.cumsum(~found) / len(frames), np.cumsum(found) / n_people
        reached = [max(recall[fppi <= point], default=0.0) for point in FPPI_POINTS]
        rates[name] = float(np.exp(np.log(np.maximum(1 - np.array(reached), 1e-10)).mean()))
    return rates


def match_frame(rows: list[list[float]], objects: list[tuple[list[float], bool]]) -> list[tuple[float, bool]]:
    """(score, found a person) of one frame's detections, without those that are ignored."""
    results, taken = [], set()
    for *box, score in sorted(rows, key=lambda row: -row[-1]):
        best, chosen, ignored = 0.5, None, False
        x, y, w, h = box
        for k, ((u, v, s, t), positive) in enumerate(objects):
            width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
            shared = width * height if width > 0 and height > 0 else 0.0
            if not positive:
                ignored |= shared / (w * h) >= 0.5
            elif k not in taken and shared / (w * h + s * t - shared) >= best:
                best, chosen = shared / (w * h + s * t - shared), k
        if chosen is not None:
            taken.add(chosen)
            results.append((score, True))
        elif not ignored:
            results.append((score, False))
    return results
