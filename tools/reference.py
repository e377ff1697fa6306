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

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, image_path
from kaist.frames import Frame
from kaist.miss_rate import FPPI_POINTS, GroundTruth, Setup
from pseudo_gt import box_masks
from ssd.boxes import Predictions, encode


def plain_multibox_loss(predictions: Predictions, boxes: Tensor, labels: Tensor, priors: Tensor) -> Tensor:
    """loc + conf of a batch: matched image by image, hard negatives by sorting all priors of each.

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M); priors: (P, 4) cxcywh.
    """
    matches = [plain_match(*objects, priors) for objects in zip(boxes, labels, strict=True)]
    target, matched_idxs = (torch.stack(part) for part in zip(*matches, strict=True))
    image, prior = (target == 1).nonzero(as_tuple=True)
    matched = box_convert(boxes[image, matched_idxs[image, prior]], "xyxy", "cxcywh")
    offsets = encode(matched, priors[prior])
    loc = F.smooth_l1_loss(predictions.loc[image, prior], offsets, reduction="sum")

    conf = F.cross_entropy(predictions.conf.flatten(0, 1), target.clamp(min=0).flatten(), reduction="none")
    conf = conf.view(target.shape)
    hardest = conf.masked_fill(target != 0, 0).sort(1, descending=True).values
    n_negatives = (3 * (target == 1).sum(1, keepdim=True)).clamp(min=3)
    negatives = hardest[torch.arange(len(priors), device=priors.device) < n_negatives]
    return (loc + conf[image, prior].sum() + negatives.sum()) / max(1, len(image))


def plain_match(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) 1 person, 0 background or -1 ignored for each prior of an image, and (P,) its object.

    Args:
        boxes: (M, 4) xyxy; labels: (M,); priors: (P, 4) cxcywh.
    """
    corners = box_convert(priors, "cxcywh", "xyxy")
    low, high = torch.max(boxes[:, None, :2], corners[:, :2]), torch.min(boxes[:, None, 2:], corners[:, 2:])
    shared = (high - low).clamp_(min=0)
    shared = shared[..., 0] * shared[..., 1]
    areas = priors[:, 2] * priors[:, 3]
    iou = shared / (box_area(boxes)[:, None] + areas - shared)
    people, ignored = ((labels == label).nonzero()[:, 0] for label in (1, -1))
    target = -((shared[ignored] >= 0.5 * areas) | (iou[ignored] >= 0.5)).any(0).long()
    # An ignored object's best prior is nobody's, nor are those that tie with it.
    highest = iou.amax(1, keepdim=True).clamp(min=1e-12)
    taken = (iou >= highest * (1 - 1e-5))[ignored].any(0)
    target[taken] = -1
    if not len(people):
        return target, torch.zeros_like(target)
    nearest_ignored = iou[ignored].amax(0) if len(ignored) else torch.zeros_like(areas)
    iou = iou[people].masked_fill(taken, -1)
    best, matched_idxs = iou.max(0)
    target[(best >= 0.5) & (best >= nearest_ignored)] = 1
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
