"""The plain way: what tools/benchmark.py measures this project's fast paths against.

Written as a tutorial would, one image, one box, one file at a time; whatever comes with
torchvision is called.
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
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image
from torchvision.transforms import v2

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, image_path
from kaist.frames import Frame
from kaist.miss_rate import FPPI_POINTS, GroundTruth, Setup
from pseudo_gt import box_masks
from ssd.boxes import Predictions, decode, encode


def plain_multibox_loss(predictions: Predictions, boxes: Tensor, labels: Tensor, priors: Tensor) -> Tensor:
    """loc + conf as tutorials write it: image by image, hard negatives by sorting them all."""
    area = priors[:, 2] * priors[:, 3]
    total, n_positive = torch.zeros((), device=priors.device), 0
    for loc, conf, image_boxes, image_labels in zip(*predictions[:2], boxes, labels, strict=True):
        target = torch.zeros(len(priors), dtype=torch.int64, device=priors.device)
        for box in image_boxes[image_labels == -1]:
            target[intersection(box[None], priors)[0] >= 0.5 * area] = -1
        people = image_boxes[image_labels == 1]
        shared = intersection(people, priors)
        iou = shared / ((people[:, 2:] - people[:, :2]).prod(1)[:, None] + area - shared)
        owner = torch.zeros_like(target)
        if len(people):
            best, owner = iou.max(0)
            target[best >= 0.5] = 1
        for _ in people:  # each owns a prior, the best overlap of all first
            person, prior = divmod(int(iou.argmax()), len(priors))
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


def intersection(boxes: Tensor, priors: Tensor) -> Tensor:
    """(m, P) overlap areas of boxes (m, 4) xyxy with priors (P, 4) cxcywh."""
    corners = box_convert(priors, "cxcywh", "xyxy")
    low = torch.max(boxes[:, None, :2], corners[:, :2])
    high = torch.min(boxes[:, None, 2:], corners[:, 2:])
    return (high - low).clamp(min=0).prod(2)


def plain_detect(
    predictions: Predictions, priors: Tensor, *, min_score: float, nms_iou: float, max_boxes: int
) -> list[tuple[Tensor, Tensor]]:
    """Decode and NMS as tutorials write it: all overlaps, then a loop over the candidates."""
    results = []
    for loc, conf in zip(*predictions[:2], strict=True):
        scores = torch.sigmoid(conf[:, 1] - conf[:, 0])
        scores, order = scores.sort(descending=True, stable=True)
        order = order[scores >= min_score]
        boxes = box_convert(decode(loc[order], priors[order]), "cxcywh", "xyxy")
        boxes = clip_boxes_to_image(boxes, (1, 1))
        iou = box_iou(boxes, boxes)
        dropped = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for i in range(len(boxes)):
            if not dropped[i]:
                dropped[i + 1 :] |= iou[i, i + 1 :] > nms_iou
        kept = (~dropped).nonzero().squeeze(1)[:max_boxes]
        results.append((boxes[kept], scores[kept]))
    return results


def recipe_sample(root: Path) -> Callable[[Frame], tuple]:
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
        pair = [
            tv_tensors.Image(Image.open(image_path(root, frame.id, modality)).convert("RGB"))
            for modality in ("visible", "lwir")
        ]
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                frame.boxes_px, format="XYXY", canvas_size=(FRAME_HEIGHT, FRAME_WIDTH)
            ),
            "labels": torch.from_numpy(frame.labels),
        }
        visible, lwir, target = transform(*pair, target)
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
    for i, *person in zip(
        ground_truth.frame, ground_truth.boxes, ground_truth.occlusion, ground_truth.ignore, strict=True
    ):
        people[i].append(tuple(person))

    rates = {}
    for name, setup in setups.items():
        frames = np.flatnonzero(ground_truth.in_subset(setup.subset))
        hits: list[tuple[float, bool]] = []
        n_positive = 0
        for i in frames:
            objects = [(box, counts(box, occlusion, ignore, setup)) for box, occlusion, ignore in people[i]]
            n_positive += sum(positive for _, positive in objects)
            hits += match_frame(rows[i], objects)
        hits.sort(key=lambda hit: -hit[0])
        found = np.array([hit for _, hit in hits], dtype=bool)
        fppi, rate = np.cumsum(~found) / len(frames), np.cumsum(found) / n_positive
        reached = [max(rate[fppi <= point], default=0.0) for point in FPPI_POINTS]
        rates[name] = float(np.exp(np.log(np.maximum(1 - np.array(reached), 1e-10)).mean()))
    return rates


def counts(box: np.ndarray, occlusion: int, ignore: bool, setup: Setup) -> bool:
    """Whether a person counts under a setup."""
    x, y, w, h = box
    inside = x >= 5 and y >= 5 and x + w <= FRAME_WIDTH - 5 and y + h <= FRAME_HEIGHT - 5
    low, high = setup.heights
    return bool(inside and not ignore and low <= h <= high and occlusion in setup.occlusion)


def match_frame(rows: list[list[float]], objects: list[tuple[np.ndarray, bool]]) -> list[tuple[float, bool]]:
    """(score, found a person) of one frame's detections, without those that are absorbed."""
    results, taken = [], set()
    for *box, score in sorted(rows, key=lambda row: -row[-1]):
        best, chosen, absorbed = 0.5, None, False
        x, y, w, h = box
        for k, ((u, v, s, t), positive) in enumerate(objects):
            width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
            shared = width * height if width > 0 and height > 0 else 0.0
            if not positive:
                absorbed |= shared / (w * h) >= 0.5
            elif k not in taken and shared / (w * h + s * t - shared) >= best:
                best, chosen = shared / (w * h + s * t - shared), k
        if chosen is not None:
            taken.add(chosen)
            results.append((score, True))
        elif not absorbed:
            results.append((score, False))
    return results
