"""The plain way: what tools/benchmark.py measures this project's fast paths against.

Written as tutorials and torchvision are: a loop over images or files, vectorised within each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area, box_convert
from torchvision.transforms import v2

from datasets import Frame
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, image_path
from kaist.miss_rate import FPPI_POINTS, GroundTruth, Setup
from pseudo_gt import box_masks
from ssd.boxes import Predictions, encode


def plain_multibox_loss(predictions: Predictions, boxes: Tensor, labels: Tensor, priors: Tensor) -> Tensor:
    """loc + conf as tutorials write it: image by image, hard negatives by sorting them all."""
    area = priors[:, 2] * priors[:, 3]
    total, n_positive = torch.zeros((), device=priors.device), 0
    for loc, conf, image_boxes, image_labels in zip(*predictions[:2], boxes, labels, strict=True):
        target = torch.zeros(len(priors), dtype=torch.int64, device=priors.device)
        people, ignored = (image_boxes[image_labels == label] for label in (1, -1))
        shared = intersection(ignored, priors)
        target[(shared >= 0.5 * area).any(0)] = -1
        to_ignored = shared / ((ignored[:, 2:] - ignored[:, :2]).prod(1)[:, None] + area - shared)
        target[(to_ignored >= 0.5).any(0)] = -1
        shared = intersection(people, priors)
        iou = shared / ((people[:, 2:] - people[:, :2]).prod(1)[:, None] + area - shared)
        owner = torch.zeros_like(target)
        if len(people):
            best, owner = iou.max(0)
            nearer = best >= to_ignored.amax(0) if len(ignored) else True
            target[(best >= 0.5) & nearer] = 1
        for row in to_ignored:  # an ignored object's best prior is nobody's, nor are those that tie
            taken = (row > 0) & (row >= row.max() * (1 - 1e-5))
            target[taken], iou[:, taken] = -1, -1
        for _ in people:  # each owns a prior, the best overlap of all first
            person, prior = divmod(int(iou.argmax()), len(priors))
            if iou[person, prior] < 0:
                break
            target[prior], owner[prior] = 1, person
            iou[person], iou[:, prior] = -1, -1
        positive = target == 1
        offsets = encode(box_convert(people[owner[positive]], "xyxy", "cxcywh"), priors[positive])
        entropy = F.cross_entropy(conf, target.clamp(min=0), reduction="none")
        negatives = entropy[target == 0].sort(descending=True).values
        n = int(positive.sum())
        total = total + F.smooth_l1_loss(loc[positive], offsets, reduction="sum")
        total = total + entropy[positive].sum() + negatives[: max(3, 3 * n)].sum()
        n_positive += n
    return total / max(1, n_positive)


def plain_match(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) 1 person, 0 background or -1 ignored for each prior of an image, and (P,) its object.

    Args:
        boxes: (M, 4) xyxy; labels: (M,); priors: (P, 4) cxcywh.
    """
    corners = box_convert(priors, "cxcywh", "xyxy")
    low, high = torch.max(boxes[:, None, :2], corners[:, :2]), torch.min(boxes[:, None, 2:], corners[:, 2:])
    shared = (high - low).clamp_(min=0)
    shared = shared[..., 0] * shared[..., 1]
    areas, people = priors[:, 2] * priors[:, 3], (labels == 1).nonzero()[:, 0]
    target = -(shared[labels == -1] >= 0.5 * areas).any(0).long()
    if not len(people):
        return target, torch.zeros_like(target)
    iou = shared[people] / (box_area(boxes[people])[:, None] + areas - shared[people])
    best, matched_idxs = iou.max(0)
    target[best >= 0.5] = 1
    own = best_priors(iou)
    target[own] = 1
    matched_idxs[own] = torch.arange(len(people), device=own.device)
    return target, people[matched_idxs]


def best_priors(iou: Tensor) -> Tensor:
    """(m,) each person's own prior of overlaps (m, P); of two that want one, the better has it."""
    best, own = iou.max(1)
    while True:
        order = best.argsort(descending=True).cpu().numpy()
        first = np.unique(own.cpu().numpy()[order], return_index=True)[1]
        if len(first) == len(own):
            return own
        losers = np.delete(order, first)
        iou[losers, own[losers]] = -1
        best[losers], own[losers] = iou[losers].max(1)


def v2_sample(root: Path) -> Callable[[Frame], tuple]:
    """torchvision's SSD recipe on a pair: zoom-out on a canvas, crop, flip, resize, masks."""
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

    return sample


def plain_miss_rates(path: Path, ground_truth: GroundTruth, setups: dict[str, Setup]) -> dict[str, float]:
    """Read a text result file and evaluate it frame by frame, for each setup anew."""
    rows: list[list[list[float]]] = [[] for _ in ground_truth.frames]
    for line in path.read_text().splitlines():
        image_id, *row = map(float, line.split(","))
        rows[int(image_id) - 1].append(row)
    people: list[list[tuple]] = [[] for _ in ground_truth.frames]
    columns = ground_truth.boxes, ground_truth.occlusion, ground_truth.ignore
    for i, *person in zip(ground_truth.frame, *columns, strict=True):
        people[i].append(tuple(person))

    rates = {}
    for name, setup in setups.items():
        frames = np.flatnonzero(ground_truth.in_subset(setup.subset))
        hits: list[tuple[float, bool]] = []
        n_people = 0
        for i in frames:
            objects = [(person[0], counts(*person, setup)) for person in people[i]]
            n_people += sum(positive for _, positive in objects)
            hits += match_frame(rows[i], objects)
        hits.sort(key=lambda hit: -hit[0])
        found = np.array([hit for _, hit in hits], dtype=bool)
        fppi, recall = np.cumsum(~found) / len(frames), np.cumsum(found) / n_people
        reached = [max(recall[fppi <= point], default=0.0) for point in FPPI_POINTS]
        rates[name] = float(np.exp(np.log(np.maximum(1 - np.array(reached), 1e-10)).mean()))
    return rates


def counts(box: np.ndarray, occlusion: int, ignore: bool, setup: Setup) -> bool:
    """Whether a person counts under a setup."""
    x, y, w, h = box
    inside = x >= 5 and y >= 5 and x + w <= FRAME_WIDTH - 5 and y + h <= FRAME_HEIGHT - 5
    low, high = setup.heights
    return bool(inside and not ignore and low <= h <= high and occlusion in setup.occlusion)


def match_frame(rows: list[list[float]], objects: list[tuple[np.ndarray, bool]]) -> list[tuple[float, bool]]:
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
