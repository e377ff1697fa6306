"""SSD's matching of priors with objects (section 2.2 of the paper), written twice.

`match` does only what an image's objects need and suits a CPU. `match_static` is a fixed sequence of
operations on whole batches, so that a GPU never waits for the host and the graph compiles. Tests hold
the two equal.

The best prior of each ignored object is ignored, with all that tie for it. Of the others each person
owns one, by greedy bipartite matching in descending IoU. Of equal overlaps the earlier person goes
first, then the earlier prior. Any other prior with an IoU of 0.5 goes by the object of its
highest IoU: positive if that is a person, ignored if it is to be ignored. Of the rest, a prior with
half of its area inside an ignored object is ignored. What remains is background.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

from ssd.boxes import to_corners

PERSON, BACKGROUND, IGNORE = 1, 0, -1
MATCH_IOU = 0.5  # from which a prior answers for an object
TIE = 1e-5  # overlaps that differ by no more than this share are equal


@torch.no_grad()
def match(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """Which object each prior answers for, image by image.

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64: 1 person, -1 ignore, 0 padding.
        priors: (P, 4) cxcywh fractions.

    Returns:
        target: (N, P) int8: 1 person, 0 background, -1 ignored.
        matched_idxs: (N, P) int64 index of a prior's object, meaningful where target is 1.
    """
    corners, areas = prior_corners(priors)
    target = np.zeros((len(boxes), len(priors)), np.int8)
    matched_idxs = np.zeros(target.shape, np.int64)
    for i, kinds in enumerate(labels.numpy()):
        persons, ignored = (np.flatnonzero(kinds == kind) for kind in (PERSON, IGNORE))
        objects, n = np.append(persons, ignored), len(persons)
        if not len(objects):
            continue
        own = boxes[i, torch.from_numpy(objects)]
        shared = intersection(own, corners)
        inside = (shared[n:] >= 0.5 * areas).any(0).numpy()
        union = (box_areas(own).unsqueeze(1) + areas).sub_(shared)
        overlaps = shared.div_(union)
        taken = is_best(overlaps[n:]).any(0).numpy()
        iou = overlaps.numpy()
        near = np.flatnonzero(iou.max(0) >= MATCH_IOU)
        best = iou[:, near].argmax(0)
        iou[:n, taken] = -1
        owner, owned = match_bipartite(iou[:n])
        target[i, inside] = IGNORE
        target[i, near] = np.where(best < n, PERSON, IGNORE)
        target[i, taken] = IGNORE
        target[i, owned] = PERSON
        matched_idxs[i, near] = objects[best]
        matched_idxs[i, owned] = objects[owner]
    return torch.from_numpy(target), torch.from_numpy(matched_idxs)


def match_bipartite(iou: np.ndarray) -> tuple[list[int], list[int]]:
    """Greedy bipartite matching: rows, and the column that each of them owns.

    Every row waits with its best overlap in a queue. The highest overlap gets its column if that is
    free; else the row waits again with its best overlap among the free columns. Where there are too
    few columns, some rows own none.

    Args:
        iou: (m, P) overlaps, -1 where a column is not to be had; refused ones become -1.
    """
    best = iou.argmax(1).tolist()  # numpy's is many times faster than torch's
    queue = [(-iou[row, column], row, column) for row, column in enumerate(best)]
    heapq.heapify(queue)
    taken: dict[int, int] = {}
    while queue and queue[0][0] <= 0:
        _, row, column = queue[0]
        if column in taken:
            iou[row, list(taken)] = -1
            column = int(iou[row].argmax())
            heapq.heapreplace(queue, (-iou[row, column], row, column))
        else:
            taken[column] = row
            heapq.heappop(queue)
    return list(taken.values()), list(taken)


@torch.no_grad()
def match_static(boxes: Tensor, labels: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """`match` as a fixed sequence of operations, whatever the values are."""
    corners, areas = prior_corners(priors)
    shared = intersection(boxes, corners)  # (N, M, P)
    iou = shared / (box_areas(boxes).unsqueeze(2) + areas - shared)
    person, ignored = (labels == PERSON).unsqueeze(2), (labels == IGNORE).unsqueeze(2)
    inside = ((shared >= 0.5 * areas) & ignored).any(1)
    of_ignored = iou.masked_fill(~ignored, -1.0)
    iou = iou.masked_fill(~person, -1.0)
    taken = is_best(of_ignored).any(1)

    best, matched_idxs = iou.max(1)
    near = torch.maximum(best, of_ignored.amax(1)) >= MATCH_IOU
    positive = near & (best >= of_ignored.amax(1)) & ~taken
    target = torch.where(positive, PERSON, (near | inside | taken) * IGNORE).to(torch.int8)

    owned = match_bipartite_static(iou.masked_fill(taken.unsqueeze(1), -1.0))
    rows = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    spare = target.new_zeros((len(target), 1))  # where those who own none are written
    target = torch.cat([target, spare], 1).scatter(1, owned, PERSON)[:, :-1]
    matched_idxs = torch.cat([matched_idxs, spare], 1).scatter(1, owned, rows)[:, :-1]
    return target, matched_idxs


def match_bipartite_static(iou: Tensor) -> Tensor:
    """`match_bipartite` of a batch: the highest overlap left is served, min(M, P) times.

    Of iou (N, M, P), -1 for what is no person: (N, M) int64 index of the prior each object owns, or P.
    """
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

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64, 0 padding; priors: (P, 4) cxcywh.

    Returns:
        target: (N, P) int64, the label of the object, 0 background;
        matched_idxs: (N, P) int64, that object, meaningful where target is not 0.
    """
    # An object inside of several priors of a size overlaps them alike, and rounding says which one it
    # takes: as in the published loss areas are those of corners, and divided by in this order.
    corners = to_corners(priors)
    shared = intersection(boxes, corners.T)  # (N, M, P)
    iou = shared / (box_areas(boxes).unsqueeze(2) + box_areas(corners) - shared)
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


def is_best(iou: Tensor) -> Tensor:
    """Which of overlaps (…, P) are the highest of their row, but for rounding: an object that several priors
    of one size enclose overlaps all of them alike. A row without any overlap has no best one."""
    return (iou >= iou.amax(-1, keepdim=True) * (1 - TIE)) & (iou > 0)


def prior_corners(priors: Tensor) -> tuple[Tensor, Tensor]:
    """xyxy corners (4, P) of cxcywh priors, a row each, and their areas (P,)."""
    return to_corners(priors).T.contiguous(), priors[:, 2] * priors[:, 3]


def intersection(boxes: Tensor, corners: Tensor) -> Tensor:
    """(…, P) overlap areas of boxes (…, 4) xyxy with priors' `corners` (4, P)."""
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)
    width = torch.minimum(x1, corners[2]).sub_(torch.maximum(x0, corners[0])).clamp_(min=0)
    height = torch.minimum(y1, corners[3]).sub_(torch.maximum(y0, corners[1])).clamp_(min=0)
    return width.mul_(height)


def box_areas(boxes: Tensor) -> Tensor:
    """(…,) areas of boxes (…, 4) xyxy."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
