"""The multibox loss written plainly, for tests to hold the fast one against: image by image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert

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
    """(m,) each person's own prior of overlaps (m, P), the best overlap of all first."""
    own = torch.zeros(len(iou), dtype=torch.int64, device=iou.device)
    for _ in own:
        person, prior = divmod(int(iou.argmax()), iou.shape[1])
        own[person] = prior
        iou[person], iou[:, prior] = -2, -2
    return own
