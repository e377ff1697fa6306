"""SSD's matching of priors with objects (section 2.2 of the paper), written twice.

`match` looks only at pairs whose IoU may count and suits a CPU. `match_static` is a fixed sequence of
operations on whole batches, so that a GPU never waits for the host and the graph compiles. Tests hold
the two equal.

The best prior of each ignored object is ignored, with all that tie for it. Of the others each person
owns one, by greedy bipartite matching in descending IoU. Of equal overlaps the earlier person goes
first, then the earlier prior. Any other prior with an IoU of 0.5 goes by the object of its
highest IoU: positive if that is a person, ignored if it is to be ignored. Of the rest, a prior with
half of its area inside an ignored object is ignored. What remains is background.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssd.boxes import cxcywh_to_xyxy

PERSON, BACKGROUND, IGNORE = 1, 0, -1
MATCH_IOU = 0.5  # from which a prior answers for an object
IOU_LEVELS = (*(MATCH_IOU / 2**i for i in range(10)), 0.0)  # of IoU, down which a best prior is looked for
# Relative difference up to which IoUs count as equal: those with priors that enclose the object.
TIE_TOLERANCE = 1e-5


class PriorTable:
    """(P, 4) cxcywh priors, made ready for `match`. Those of grids have few areas and few spans along x and
    along y (SSD300's 8,732 have 333 of each): what is asked of a span is asked once.

    Attributes: areas (P,); spans: of x and of y each span once, low (U, 1) and high (U, 1), and which of them
    each prior has, (P,); sizes: likewise the areas, (V, 1) and (P,).
    """

    def __init__(self, priors: Tensor) -> None:
        corners, self.areas = cxcywh_to_xyxy(priors).numpy(), (priors[:, 2] * priors[:, 3]).numpy()
        self.spans = []
        for axis in (0, 1):
            ends, index = np.unique(corners[:, axis::2], axis=0, return_inverse=True)
            self.spans.append((ends[:, :1], ends[:, 1:], index.ravel()))
        sizes, index = np.unique(self.areas, return_inverse=True)
        self.sizes = sizes[:, None], index

    def common(self, boxes: np.ndarray) -> list[np.ndarray]:
        """How much of each span of x, and of y, boxes (K, 4) xyxy have in common with it, (U, K)."""
        return [
            np.maximum(np.minimum(high, boxes[:, axis + 2]) - np.maximum(low, boxes[:, axis]), 0)
            for axis, (low, high, _) in enumerate(self.spans)
        ]

    def pairs(self, boxes: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of boxes (K, 4) xyxy and priors whose IoU is `least` or more: box, prior, IoU, (n,) each.

        Neither their IoU along an axis nor the ratio of their areas can be less: others are not looked at.
        """
        areas, common = box_area(boxes), self.common(boxes)
        sizes, index = self.sizes
        is_near = (1.01 * np.minimum(sizes, areas) >= least * np.maximum(sizes, areas)).take(index, axis=0)
        for axis, (low, high, index) in enumerate(self.spans):
            sides = (high - low) + (boxes[:, axis + 2] - boxes[:, axis])
            is_near &= (common[axis] >= 0.99 * least / (1 + least) * sides).take(index, axis=0)  # (P, K)
        prior, box = np.divmod(np.flatnonzero(is_near), len(boxes))
        width, height = (x[index[prior], box] for x, (*_, index) in zip(common, self.spans, strict=True))
        shared = width * height
        iou = shared / (areas[box] + self.areas[prior] - shared)
        reach = np.flatnonzero(iou >= least)
        return box[reach], prior[reach], iou[reach]


def match(boxes: Tensor, labels: Tensor, priors: PriorTable) -> tuple[Tensor, Tensor]:
    """Which object each of P priors answers for.

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64: 1 person, -1 ignore, 0 padding.

    Returns:
        target: (N, P) int8: 1 person, 0 background, -1 ignored.
        matched_idxs: (N, P) int64 index of a prior's object, meaningful where target is 1.
    """
    target = np.zeros((len(boxes), len(priors.areas)), np.int8)
    matched_idxs = np.zeros(target.shape, np.int64)
    persons, ignored = (np.nonzero(labels.numpy() == kind) for kind in (PERSON, IGNORE))
    image, index = np.concatenate([persons, ignored], axis=1)
    own, kinds, n = boxes.numpy()[image, index], labels.numpy()[image, index], len(persons[0])
    width, height = (x.take(span[2], 0) for x, span in zip(priors.common(own[n:]), priors.spans, strict=True))
    inside = np.flatnonzero(width * height >= 0.5 * priors.areas[:, None])
    prior, row = np.divmod(inside, len(own) - n)
    target[ignored[0][row], prior] = IGNORE

    near: list[tuple[np.ndarray, ...]] = []
    taken: set[int] = set()
    owned: dict[int, int] = {}

    def pairs(objects: np.ndarray, least: float) -> tuple[np.ndarray, ...]:
        """Where objects and priors have an IoU of `least`: object, the prior's place in the batch, IoU."""
        box, prior, iou = priors.pairs(own[objects], least)
        near.append((objects[box], image[objects[box]] * len(priors.areas) + prior, iou))
        return near[-1]

    left = np.arange(n, len(own))
    for least in IOU_LEVELS:
        if not len(left):
            break
        objects, place, iou = pairs(left, least)
        best = np.zeros(len(own), np.float32)
        np.maximum.at(best, objects, iou)
        is_known = best >= 1.01 * least  # and so is what ties for it
        is_best = (iou >= best[objects] * (1 - TIE_TOLERANCE)) & (iou > 0) & is_known[objects]
        taken.update(place[is_best].tolist())
        left = left[~is_known[left]]

    # Greedy: pairs of an IoU below a level have to wait until all above it are served.
    left = np.arange(n)
    for least in IOU_LEVELS:
        if not len(left):
            break
        objects, place, iou = pairs(left, least)
        order = np.lexsort((place, objects, -iou))
        for person, prior in zip(objects[order].tolist(), place[order].tolist(), strict=True):
            if person not in owned and prior not in taken:
                owned[person] = prior
                taken.add(prior)
        left = np.setdiff1d(left, list(owned))

    if near:
        objects, place, iou = (np.concatenate(x) for x in zip(*near, strict=True))
        order = np.lexsort((-objects, iou))  # of a prior's objects the last one put stays
        order = order[iou[order] >= MATCH_IOU]
        np.put(target, place[order], kinds[objects[order]])
        np.put(matched_idxs, place[order], index[objects[order]])
    np.put(target, list(taken), IGNORE)
    np.put(target, list(owned.values()), PERSON)
    np.put(matched_idxs, list(owned.values()), index[list(owned)])
    return torch.from_numpy(target), torch.from_numpy(matched_idxs)


@torch.no_grad()
def match_static(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """`match` as a fixed sequence of operations, whatever the values are."""
    shared, areas = intersection(boxes, cxcywh_to_xyxy(priors)), priors[:, 2] * priors[:, 3]
    iou = shared / (box_area(boxes).unsqueeze(2) + areas - shared)
    person, ignored = (labels == PERSON).unsqueeze(2), (labels == IGNORE).unsqueeze(2)
    inside = ((shared >= 0.5 * areas) & ignored).any(1)
    of_ignored = iou.masked_fill(~ignored, -1.0)
    iou = iou.masked_fill(~person, -1.0)
    best = of_ignored.amax(2, keepdim=True)
    taken = ((of_ignored >= best * (1 - TIE_TOLERANCE)) & (of_ignored > 0)).any(1)

    best, matched_idxs = iou.max(1)
    near = torch.maximum(best, of_ignored.amax(1)) >= MATCH_IOU
    positive = near & (best >= of_ignored.amax(1)) & ~taken
    target = torch.where(positive, PERSON, (near | inside | taken) * IGNORE).to(torch.int8)

    owned = match_bipartite(iou.masked_fill(taken.unsqueeze(1), -1.0))
    rows = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    spare = target.new_zeros((len(target), 1))  # where those who own none are written
    target = torch.cat([target, spare], 1).scatter(1, owned, PERSON)[:, :-1]
    matched_idxs = torch.cat([matched_idxs, spare], 1).scatter(1, owned, rows)[:, :-1]
    return target, matched_idxs


def match_bipartite(iou: Tensor) -> Tensor:
    """Of iou (N, M, P), -1 for what is no person: (N, M) int64 index of the prior each object owns, or P. The
    highest overlap left is served, min(M, P) times."""
    n, m, p = iou.shape
    rows, columns = (torch.arange(k, device=iou.device) for k in (m, p))
    owned = torch.full((n, m), p, device=iou.device)
    for _ in range(min(m, p)):
        overlap, place = iou.flatten(1).max(1, keepdim=True)
        row, column = place // p, place % p
        owned = owned.scatter(1, row, torch.where(overlap >= 0, column, owned.gather(1, row)))
        taken = (rows == row).unsqueeze(2) | (columns == column).unsqueeze(1)
        iou = iou.masked_fill(taken, -1.0)
    return owned


@torch.no_grad()
def match_multilabel(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """MLPD's matching (Kim et al., RA-L 2021): ignored objects answered for like any other.

    A prior answers for the object that it overlaps most if their IoU is at least 0.5. Then each
    object takes the prior that overlaps it most, whatever the IoU; of objects that take the same
    prior the later one has it.

    Args: boxes (N, M, 4) xyxy fractions; labels (N, M) int64, 0 padding; priors (P, 4) cxcywh.
    Returns: (N, P) int64 label of each prior's object, 0 background; and (N, P) int64 index of that object.
    """
    # An object inside of several priors of a size overlaps them alike, and rounding says which one it
    # takes: as in the published loss areas are those of corners, and divided by in this order.
    corners = cxcywh_to_xyxy(priors)
    shared = intersection(boxes, corners)
    iou = shared / (box_area(boxes).unsqueeze(2) + box_area(corners) - shared)
    padding = labels == 0
    overlap, matched_idxs = iou.masked_fill(padding.unsqueeze(2), -1.0).max(1)
    best = iou.argmax(2).masked_fill(padding, len(priors))  # padding takes one beyond the last
    taken = torch.full((len(boxes), len(priors) + 1), -1, device=boxes.device)
    objects = torch.arange(labels.shape[1], device=boxes.device).expand_as(labels)
    taken = taken.scatter_reduce(1, best, objects, "amax")[:, :-1]
    matched_idxs = torch.where(taken >= 0, taken, matched_idxs)
    answers = (taken >= 0) | (overlap >= MATCH_IOU)
    target = labels.gather(1, matched_idxs).masked_fill(~answers, 0)
    return target, matched_idxs


def intersection(boxes: Tensor, corners: Tensor) -> Tensor:
    """(N, M, P) areas that boxes (N, M, 4) and priors (P, 4), both xyxy, have in common."""
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)
    left, top, right, bottom = corners.unbind(1)
    width = torch.minimum(x1, right).sub_(torch.maximum(x0, left)).clamp_(min=0)
    return width.mul_(torch.minimum(y1, bottom).sub_(torch.maximum(y0, top)).clamp_(min=0))


def box_area(boxes: Tensor) -> Tensor:
    """(…,) areas of boxes (…, 4) xyxy."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
