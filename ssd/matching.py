"""Matching of priors to ground-truth objects (section 2.2 of the SSD paper).

`match` is for the CPU and looks only at pairs whose IoU can matter. `match_static` is for GPUs: whole
batches in a fixed sequence of operations, which never waits for the host and can be compiled. Both give
the same result:

1. The best prior of each ignored object is ignored, and so are all priors that tie with it.
2. Each person gets one of the other priors, by greedy bipartite matching in descending IoU. Ties go to the
   earlier person, then to the earlier prior.
3. Any other prior takes the object of its highest IoU if that is at least 0.5. It is positive if the object
   is a person, ignored if the object is ignored.
4. Of the rest, a prior with half of its area inside an ignored object is ignored, any other is background.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssd.boxes import cxcywh_to_xyxy

PERSON, BACKGROUND, IGNORE = 1, 0, -1
MATCH_IOU = 0.5  # minimum IoU of a matched prior, except for each person's best one
IOU_LEVELS = (*(MATCH_IOU / 2**i for i in range(10)), 0.0)  # minimum IoUs of the search for best priors
# Relative difference up to which IoUs are equal: priors of one shape that contain the object tie.
TIE_TOLERANCE = 1e-5


class PriorTable:
    """(P, 4) cxcywh priors, prepared for `match`.

    Priors on a grid share x ranges, y ranges and areas: SSD300's 8,732 have 333 of each. Values that depend
    only on a range or an area are computed once for each unique one.

    Attributes:
        areas: (P,); unique_areas: (V, 1), and the index of each prior's area (P,).
        ranges: of x and of y: low (U, 1), high (U, 1), and the index of each prior's range (P,).
    """

    def __init__(self, priors: Tensor) -> None:
        corners, self.areas = cxcywh_to_xyxy(priors).numpy(), (priors[:, 2] * priors[:, 3]).numpy()
        self.ranges = []
        for axis in (0, 1):
            ends, index = np.unique(corners[:, axis::2], axis=0, return_inverse=True)
            self.ranges.append((ends[:, :1], ends[:, 1:], index.ravel()))
        areas, index = np.unique(self.areas, return_inverse=True)
        self.unique_areas = areas[:, None], index

    def axis_overlaps(self, boxes: np.ndarray) -> list[np.ndarray]:
        """(U, K) overlaps of all x ranges with boxes (K, 4) xyxy, and of all y ranges."""
        return [
            np.maximum(np.minimum(high, boxes[:, axis + 2]) - np.maximum(low, boxes[:, axis]), 0)
            for axis, (low, high, _) in enumerate(self.ranges)
        ]

    def pairs(self, boxes: np.ndarray, min_iou: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of boxes (K, 4) xyxy and priors of at least an IoU: box index, prior index, IoU, each (n,).

        The ratio of areas and the IoU along each axis bound the IoU, and exclude most pairs early.
        """
        areas, overlaps = box_area(boxes), self.axis_overlaps(boxes)
        prior_areas, index = self.unique_areas
        is_similar = 1.01 * np.minimum(prior_areas, areas) >= min_iou * np.maximum(prior_areas, areas)
        is_near = is_similar.take(index, axis=0)  # (P, K)
        for axis, (low, high, index) in enumerate(self.ranges):
            lengths = (high - low) + (boxes[:, axis + 2] - boxes[:, axis])
            is_near &= (overlaps[axis] >= 0.99 * min_iou / (1 + min_iou) * lengths).take(index, axis=0)
        prior, box = np.divmod(np.flatnonzero(is_near), len(boxes))
        width, height = (x[index[prior], box] for x, (*_, index) in zip(overlaps, self.ranges, strict=True))
        intersection = width * height
        iou = intersection / (areas[box] + self.areas[prior] - intersection)
        is_pair = iou >= min_iou
        return box[is_pair], prior[is_pair], iou[is_pair]


def match(boxes: Tensor, labels: Tensor, priors: PriorTable) -> tuple[Tensor, Tensor]:
    """Match P priors to the objects of a batch.

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64: 1 person, -1 ignored, 0 padding.

    Returns:
        target: (N, P) int8: 1 person, 0 background, -1 ignored.
        matched_idxs: (N, P) int64 index of the prior's object, valid where target is 1.
    """
    target = np.zeros((len(boxes), len(priors.areas)), np.int8)
    matched_idxs = np.zeros(target.shape, np.int64)
    persons, ignored = (np.nonzero(labels.numpy() == label) for label in (PERSON, IGNORE))
    n_persons = len(persons[0])
    # All objects of the batch: persons first, then ignored ones.
    image, index = np.concatenate([persons, ignored], axis=1)
    boxes, labels = boxes.numpy()[image, index], labels.numpy()[image, index]
    overlaps = zip(priors.axis_overlaps(boxes[n_persons:]), priors.ranges, strict=True)
    width, height = (overlap.take(prior_range, 0) for overlap, (*_, prior_range) in overlaps)
    inside = np.flatnonzero(width * height >= 0.5 * priors.areas[:, None])
    prior, row = np.divmod(inside, len(boxes) - n_persons)
    target[ignored[0][row], prior] = IGNORE

    # Below, "place" is the index of a prior among all priors of all images, as in target.flatten().
    found: list[tuple[np.ndarray, ...]] = []
    taken: set[int] = set()
    best_place: dict[int, int] = {}  # of each person

    def find_pairs(objects: np.ndarray, min_iou: float) -> tuple[np.ndarray, ...]:
        """Pairs of objects and priors of at least an IoU: object, place, IoU, each (n,)."""
        box, prior, iou = priors.pairs(boxes[objects], min_iou)
        found.append((objects[box], image[objects[box]] * len(priors.areas) + prior, iou))
        return found[-1]

    left = np.arange(n_persons, len(boxes))
    for min_iou in IOU_LEVELS:
        if not len(left):
            break
        objects, place, iou = find_pairs(left, min_iou)
        best = np.zeros(len(boxes), np.float32)
        np.maximum.at(best, objects, iou)
        is_known = best >= 1.01 * min_iou  # then all priors that tie are among the pairs
        is_best = (iou >= best[objects] * (1 - TIE_TOLERANCE)) & (iou > 0) & is_known[objects]
        taken.update(place[is_best].tolist())
        left = left[~is_known[left]]

    # Greedy: no pair below a level is used before all pairs above it are.
    left = np.arange(n_persons)
    for min_iou in IOU_LEVELS:
        if not len(left):
            break
        objects, place, iou = find_pairs(left, min_iou)
        order = np.lexsort((place, objects, -iou))
        for person, prior in zip(objects[order].tolist(), place[order].tolist(), strict=True):
            if person not in best_place and prior not in taken:
                best_place[person] = prior
                taken.add(prior)
        left = np.setdiff1d(left, list(best_place))

    if found:
        objects, place, iou = (np.concatenate(x) for x in zip(*found, strict=True))
        order = np.lexsort((-objects, iou))  # np.put keeps the last: the highest IoU, the earlier object
        order = order[iou[order] >= MATCH_IOU]
        np.put(target, place[order], labels[objects[order]])
        np.put(matched_idxs, place[order], index[objects[order]])
    np.put(target, list(taken), IGNORE)
    np.put(target, list(best_place.values()), PERSON)
    np.put(matched_idxs, list(best_place.values()), index[list(best_place)])
    return torch.from_numpy(target), torch.from_numpy(matched_idxs)


@torch.no_grad()
def match_static(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """`match` in a fixed sequence of operations; priors: (P, 4) cxcywh."""
    overlap, areas = intersection(boxes, cxcywh_to_xyxy(priors)), priors[:, 2] * priors[:, 3]
    iou = overlap / (box_area(boxes).unsqueeze(2) + areas - overlap)
    is_person, is_ignored = (labels == PERSON).unsqueeze(2), (labels == IGNORE).unsqueeze(2)
    inside = ((overlap >= 0.5 * areas) & is_ignored).any(1)
    ignored_iou = iou.masked_fill(~is_ignored, -1.0)
    iou = iou.masked_fill(~is_person, -1.0)  # replaced, because a second tensor would cost memory
    best = ignored_iou.amax(2, keepdim=True)
    taken = ((ignored_iou >= best * (1 - TIE_TOLERANCE)) & (ignored_iou > 0)).any(1)

    best, matched_idxs = iou.max(1)
    near = torch.maximum(best, ignored_iou.amax(1)) >= MATCH_IOU
    positive = near & (best >= ignored_iou.amax(1)) & ~taken
    target = torch.where(positive, PERSON, (near | inside | taken) * IGNORE).to(torch.int8)

    best_prior = match_bipartite(iou.masked_fill(taken.unsqueeze(1), -1.0))
    rows = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    dummy = target.new_zeros((len(target), 1))  # the column of objects without a prior, cut off again
    target = torch.cat([target, dummy], 1).scatter(1, best_prior, PERSON)[:, :-1]
    matched_idxs = torch.cat([matched_idxs, dummy], 1).scatter(1, best_prior, rows)[:, :-1]
    return target, matched_idxs


def match_bipartite(iou: Tensor) -> Tensor:
    """Greedy bipartite matching: (N, M) int64 index of each object's prior, or P for none.

    iou: (N, M, P), modified in place; -1 for pairs that cannot match. The highest IoU is matched first.
    """
    n, m, p = iou.shape
    best_prior = torch.full((n, m), p, device=iou.device)
    for _ in range(min(m, p)):
        best, place = iou.flatten(1).max(1, keepdim=True)
        row, column = place // p, place % p
        best_prior = best_prior.scatter(1, row, torch.where(best >= 0, column, best_prior.gather(1, row)))
        iou.scatter_(1, row.unsqueeze(2).expand(-1, -1, p), -1.0)
        iou.scatter_(2, column.unsqueeze(1).expand(-1, m, -1), -1.0)
    return best_prior


@torch.no_grad()
def match_multilabel(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """MLPD's matching (Kim et al., RA-L 2021), in which ignored objects are matched like persons.

    A prior takes the object of its highest IoU if that is at least 0.5. Then each object takes its best
    prior, whatever the IoU. If objects share their best prior, the last one takes it.

    Args and Returns as in `match_static`, except that target (N, P) int64 is the label of the prior's object,
    0 for background.
    """
    # Priors of one shape that contain an object tie up to rounding. As in the published loss, areas are
    # computed from corners, and operations keep this order.
    corners = cxcywh_to_xyxy(priors)
    overlap = intersection(boxes, corners)
    iou = overlap / (box_area(boxes).unsqueeze(2) + box_area(corners) - overlap)
    padding = labels == 0
    best_iou, matched_idxs = iou.masked_fill(padding.unsqueeze(2), -1.0).max(1)
    best_prior = iou.argmax(2).masked_fill(padding, len(priors))  # padding: a dummy column, cut off again
    taken_by = torch.full((len(boxes), len(priors) + 1), -1, device=boxes.device)
    objects = torch.arange(labels.shape[1], device=boxes.device).expand_as(labels)
    taken_by = taken_by.scatter_reduce(1, best_prior, objects, "amax")[:, :-1]
    matched_idxs = torch.where(taken_by >= 0, taken_by, matched_idxs)
    is_matched = (taken_by >= 0) | (best_iou >= MATCH_IOU)
    target = labels.gather(1, matched_idxs).masked_fill(~is_matched, 0)
    return target, matched_idxs


def intersection(boxes: Tensor, corners: Tensor) -> Tensor:
    """(N, M, P) areas of intersection of boxes (N, M, 4) with priors (P, 4), both xyxy."""
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)
    left, top, right, bottom = corners.unbind(1)
    width = torch.minimum(x1, right).sub_(torch.maximum(x0, left)).clamp_(min=0)
    return width.mul_(torch.minimum(y1, bottom).sub_(torch.maximum(y0, top)).clamp_(min=0))


def box_area(boxes: Tensor) -> Tensor:
    """(…,) areas of boxes (…, 4) xyxy."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
