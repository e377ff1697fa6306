"""The functions that are timed: training step, detection, samples; the same of torchvision; random inputs."""

import copy
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import count, cycle, islice
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

from datasets import AUGMENTATION_KEYS, DATASET_KEYS, Batch, Collate, KaistPairs, input_kwargs
from engine.captured import capture_steps
from engine.config import ROOT, model_arguments, pick, read_constants, resolve_row
from engine.optim import make_optimizer, update_ema
from kaist.annotations import FRAME_HEIGHT, FRAME_SIZE, FRAME_WIDTH, image_path
from kaist.frame_cache import cache_frames
from kaist.frames import Frame
from kaist.images import read_frame
from kaist.miss_rate import GroundTruth
from kaist.results import Detections, write_detections
from model import INPUT_CHANNELS, make_network
from pseudo_gt import box_masks
from ssd.augment import Augmentation
from ssd.boxes import Predictions, detect, encode
from ssd.layers import Detector
from ssd.losses import CRITERION_KEYS, Criterion
from ssd.memory_plan import OBJECTS_PER_FRAME
from tools.timing import Setting
from train import make_step
from utils import autocast, compile_model, detect_image

NMS_SETTINGS = {"min_score": 0.01, "nms_iou": 0.45, "max_boxes": 200}  # as in training


# ------------------------------------------------------------------------------ rows of the lab book


def row_config(row: str, **changes: object) -> Namespace:
    """train.py's constants with the values of a row of the lab book, and `changes` to them."""
    constants = {name: value for name, (value, _) in read_constants(ROOT / "train.py").items()}
    return Namespace(**(constants | resolve_row(row) | changes))


def plain_config(**changes: object) -> Namespace:
    """Row 26 made similar to the usual SSD300: no BatchNorm, SGD, the paper's loss, masks on two maps."""
    usual = {"batch_norm": False, "optimizer": "sgd", "loc_reduction": "sum", "infusion": (1, 1, 0, 0, 0, 0)}
    return row_config("26", **{"input_mode": "early", **usual, **NMS_SETTINGS, **changes})


def row_network(config: Namespace) -> tuple[Detector, Criterion]:
    """A row's untrained network and its criterion, on torch's default device."""
    model = make_network(**model_arguments(config))
    heads = (model.priors, model.grids, model.infused_maps, model.n_logits)
    return model, Criterion(*heads, **pick(config, *CRITERION_KEYS))


class Step:
    """A row's training step, built as in train.py, from untrained weights; mode is a value of COMPILE."""

    def __init__(self, config: Namespace, device: torch.device, precision: torch.dtype, mode: str = "off"):
        self.config, self.n_steps = config, 0
        model, criterion = row_network(config)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.criterion = criterion.to(device)
        rates = pick(config, "bias_lr_factor", "weight_decay")
        self.optimizer = make_optimizer(model, criterion, name=config.optimizer, lr=1e-6, **rates)
        self.ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else model
        step = make_step(compile_model(model, mode), model, criterion, self.optimizer, precision)
        self.take_step = capture_steps(step, self.optimizer, mode, device)

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step and return the loss terms, (terms,), total first."""
        losses, _ = self.take_step(batch.images, batch.boxes, batch.labels, *batch.masks)
        update_ema(self.ema, self.model, self.config.ema_decay, self.n_steps)
        self.n_steps += 1
        return losses[0]


def random_batch(model: Detector, n: int) -> Batch:
    """n frames of noise with 3 persons each, padded as in the memory plan, on the CPU; equal for equal n."""
    g = torch.Generator().manual_seed(n)
    size = (n, INPUT_CHANNELS[model.input_mode], *model.size)
    images = torch.randint(256, size, dtype=torch.uint8, generator=g)
    boxes, labels = random_objects(n, 3, torch.device("cpu"))
    padding = OBJECTS_PER_FRAME - labels.shape[1]
    boxes, labels = F.pad(boxes, (0, 0, 0, padding)), F.pad(labels, (0, padding))
    masks = box_masks(boxes, labels, [model.grids[i] for i in model.infused_maps])
    return Batch(images, boxes, labels, masks, ["frame"] * n)


def repeated_step(setting: Setting, config: Namespace, precision: torch.dtype) -> Callable[[], Tensor]:
    """A row's training step, always on the same batch."""
    step = Step(config, setting.device, precision, "auto")
    return partial(step, random_batch(step.model, setting.batch).to(setting.device))


def bare_step(setting: Setting, config: Namespace, precision: torch.dtype) -> Callable[[], None]:
    """Forward and backward pass of a row's convolutions, ReLUs and pools only."""
    model = row_network(config)[0].to(setting.device, memory_format=torch.channels_last)
    model.conv4_3_norm = nn.Identity()
    images = random_batch(model, setting.batch).images.to(setting.device)
    images = images.float().to(memory_format=torch.channels_last)
    heads = [*model.loc_heads, *model.conf_heads, *model.seg_heads]
    gradients: list[Tensor] = []

    def step() -> None:
        model.zero_grad()
        with autocast(setting.device, precision):
            maps = model.feature_maps(images)
            fused = maps[: len(model.map_sizes)]
            inputs = [*fused, *fused, *(maps[i] for i in model.infused_maps)]
            outputs = [head(x) for head, x in zip(heads, inputs, strict=True)]
        gradients[:] = gradients or [torch.randn_like(x) for x in outputs]
        torch.autograd.backward(outputs, gradients)

    return step


def row_image(setting: Setting, config: Namespace, precision: torch.dtype) -> Callable[[], object]:
    """Detection in one frame by a row's network, from its files, with the row's NMS settings."""
    model, settings = row_detector(config, setting.device), pick(config, "test_flip", *NMS_SETTINGS)
    root, frames = setting.demo()

    def run() -> object:
        pixels = read_frame(root, frames[0].id, config.input_mode)
        return detect_image(model, pixels, precision, **settings)

    return run


def row_detector(config: Namespace, device: torch.device) -> Detector:
    """A row's network in evaluation mode, biased so that few priors are persons, as after training."""
    model = row_network(config)[0].to(device, memory_format=torch.channels_last)
    for head in model.eval().conf_heads:
        head.bias.data.view(-1, model.n_logits)[:, 1:] = -4.0
    return model


def row_pairs(
    setting: Setting, config: Namespace, model: Detector, cached: bool, n_frames: int | None = None
) -> KaistPairs:
    """A row's dataset of the demo set's frames, repeated or cut to n_frames."""
    root, frames = setting.demo()
    ids, cache = [frame.id for frame in frames], None
    if cached:
        cache = cache_frames(setting.folder / "cache", root, ids, config.input_mode)
    options = Augmentation(**pick(config, *AUGMENTATION_KEYS)) if config.augment else None
    kwargs = input_kwargs(model) | pick(config, *DATASET_KEYS)
    frames = list(islice(cycle(frames), n_frames or len(frames)))
    return KaistPairs(root, frames, augmentation=options, cache=cache, **kwargs)


# ------------------------------------------------------------------------------ parts of the plain SSD300


def loss_step(setting: Setting, people: int, ours: bool) -> Callable[[], object]:
    """Multibox loss and its gradient for 32 frames: ours, or the usual SSD loss."""
    model, criterion = row_network(plain_config(width=0.01))
    multibox, priors = criterion.to(setting.device).multibox, model.priors.to(setting.device)
    predictions = random_predictions(32, 0.0, setting.device)
    objects = random_objects(32, people, setting.device)
    leaves = [x.requires_grad_() for x in predictions[:2]]
    loss = (lambda *inputs: sum(multibox(*inputs))) if ours else partial(usual_loss, priors)
    return lambda: torch.autograd.grad(loss(predictions, *objects), leaves)


def detection(setting: Setting, mean: float, ours: bool) -> Callable[[], object]:
    """Decoding and NMS of random predictions for 8 images, at most 200 boxes each: ours, or torchvision's."""
    predictions = random_predictions(8, mean, setting.device)
    priors = row_network(plain_config(width=0.01))[0].priors.to(setting.device)
    if ours:
        return partial(detect, predictions, priors, **NMS_SETTINGS)
    anchors = [300 * box_convert(priors, "cxcywh", "xyxy")] * 8
    outputs = {"bbox_regression": predictions.loc, "cls_logits": predictions.conf}
    return partial(torchvision_ssd(setting).postprocess_detections, outputs, anchors, [(300, 300)] * 8)


def our_samples(setting: Setting, cached: bool) -> Callable[[], tuple]:
    """A batch of all frames, augmented anew at each call, on one thread."""
    torch.set_num_threads(1)
    model = row_network(plain_config(width=0.01))[0]
    collate = Collate([model.grids[i] for i in model.infused_maps])
    pairs = row_pairs(setting, plain_config(), model, cached)
    keys = ((epoch, i) for epoch in count() for i in range(len(pairs)))
    return lambda: collate([pairs[key] for key in islice(keys, len(pairs))])


# ------------------------------------------------------------------------------ references


def torchvision_ssd(setting: Setting) -> SSD:
    """Torchvision's untrained SSD300 for persons in fp32, biased as in `row_detector`."""
    network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2, score_thresh=0.01)
    for head in network.head.classification_head.module_list:
        head.bias.data.view(-1, 2)[:, 1] = -4.0
    return network.to(setting.device)


def torchvision_step(setting: Setting) -> Callable[[], None]:
    """Torchvision's training step, which has no masks."""
    n, device, model = setting.batch, setting.device, torchvision_ssd(setting).train()
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


def torchvision_image(setting: Setting) -> Callable[[], object]:
    """Torchvision's detection in one visible image, from its file."""
    model, (root, frames) = torchvision_ssd(setting).eval(), setting.demo()
    path = image_path(root, frames[0].id, "visible")
    read = lambda: decode_image(path, ImageReadMode.RGB).to(setting.device) / 255  # noqa: E731
    return torch.inference_mode()(lambda: model([read()]))


def recipe_samples(setting: Setting) -> Callable[[], list[tuple]]:
    """Samples of all frames by torchvision's v2 transforms for SSD, with our masks, on one thread."""
    torch.set_num_threads(1)
    root, frames = setting.demo()
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
        masks = box_masks(boxes, target["labels"][None], [(38, 38), (19, 19)])
        return torch.cat([visible, lwir[:1]]), boxes, masks

    return lambda: [sample(frame) for frame in frames]


def usual_loss(priors: Tensor, predictions: Predictions, boxes: Tensor, labels: Tensor) -> Tensor:
    """The sum of the loc and conf loss as the usual SSD code computes it, matching image by image, without
    ignored objects. Priors (P, 4) are cxcywh, boxes (N, M, 4) xyxy, both fractions; labels are (N, M)."""
    corners = box_convert(priors, "cxcywh", "xyxy")
    target = torch.zeros(len(boxes), len(priors), dtype=torch.int64, device=boxes.device)
    matched = boxes.new_zeros(len(boxes), len(priors), 4)
    for i, gt in enumerate(b[x == 1] for b, x in zip(boxes, labels, strict=True)):
        iou = box_iou(gt, corners)
        overlap, matched_idxs = iou.max(0)
        best_prior = iou.argmax(1)
        matched_idxs[best_prior] = torch.arange(len(gt), device=boxes.device)
        overlap[best_prior] = 1.0
        target[i] = overlap >= 0.5
        matched[i] = gt[matched_idxs]
    positive = target > 0
    offsets = encode(box_convert(matched[positive], "xyxy", "cxcywh"), priors.expand_as(matched)[positive])
    loc = F.smooth_l1_loss(predictions.loc[positive], offsets, reduction="sum")
    entropy = F.cross_entropy(predictions.conf.flatten(0, 1), target.flatten(), reduction="none")
    entropy = entropy.view_as(target)
    hardest = entropy.masked_fill(positive, 0).sort(1, descending=True).values
    rank = torch.arange(len(priors), device=boxes.device)
    mined = rank < 3 * positive.sum(1, keepdim=True)
    return (loc + entropy[positive].sum() + hardest[mined].sum()) / positive.sum()


# ------------------------------------------------------------------------------ random inputs


def random_objects(n: int, people: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes (n, people + 1, 4), xyxy in fractions, and labels (n, people + 1) of persons.

    The last object of each image is ignored.
    """
    g = torch.Generator().manual_seed(people)
    height = torch.rand(n, people + 1, generator=g) * 0.4 + 0.1
    size = torch.stack([0.35 * height, height], -1)
    corner = torch.rand(n, people + 1, 2, generator=g) * (1 - size)
    labels = torch.ones(n, people + 1, dtype=torch.int64)
    labels[:, -1] = -1
    return torch.cat([corner, corner + size], -1).to(device), labels.to(device)


def random_predictions(n: int, mean: float, device: torch.device) -> Predictions:
    """Predictions for 8,732 priors; person logits exceed background logits by `mean`, give or take 2."""
    g = torch.Generator().manual_seed(n)
    conf = torch.randn(n, 8732, 2, generator=g) * 2**0.5
    conf[..., 1] += mean
    return Predictions((torch.randn(n, 8732, 4, generator=g) / 2).to(device), conf.to(device), [])


def random_result(path: Path) -> GroundTruth:
    """Write a result file of six random boxes per frame; return ground truth of two persons per frame."""
    rng, n_frames = np.random.default_rng(0), 2252
    ids = tuple(f"set{6 + i % 6:02d}/V000/I{i // 6:05d}" for i in range(n_frames))
    height = rng.uniform(30, 200, 2 * n_frames)
    size = np.stack([0.41 * height, height], 1)
    boxes = np.concatenate([rng.random(size.shape) * (FRAME_SIZE - size), size], 1)
    frame, occlusion = np.repeat(np.arange(n_frames), 2), rng.choice(3, len(boxes), p=(0.7, 0.2, 0.1))
    # A third of the detections is random, the others are near persons.
    detected = np.concatenate([boxes, np.tile(boxes, (2, 1))[rng.permutation(2 * len(boxes))]])
    detected = (detected + rng.normal(0, 3, detected.shape)).clip(1)
    write_detections(path, Detections(np.tile(frame, 3), detected, rng.random(len(detected)).round(6)), ids)
    return GroundTruth(ids, frame, boxes, occlusion, rng.random(len(boxes)) < 0.2)
