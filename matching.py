"""Which prior answers for which person: SSD's matching, written twice.

`match` goes image by image, does only what an image's objects need, and suits a CPU.
`match_static` is a fixed sequence of whole-batch operations whose shapes follow from the shapes of
its inputs alone: a GPU never has to wait for the host, and it can be compiled. Tests hold the two
equal.

Each person first owns one prior, by greedy bipartite matching in descending IoU, so that no person
is left out when two share their best prior; of equal overlaps the earlier person goes first, then
the earlier prior. Then each further prior whose best IoU with a person reaches `match_iou` is
positive. Of the rest, a prior with at least half of its area inside an ignored object is ignored
(the rule by which the evaluation absorbs detections); what remains is background.

Both functions take
    boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64, 1 person, -1 ignore, 0 padding;
    priors: (P, 4) cxcywh fractions;
and return
    target: (N, P) int8, 1 person, 0 background, -1 ignored;
    owner: (N, P) int64, the object a prior answers for, meaningful where target is 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

PERSON, BACKGROUND, IGNORE = 1, 0, -1
ROWS = 16  # objects of an image whose overlaps are computed at a time: they fit the CPU's cache


def intersection(boxes: Tensor, corners: Tensor, out: Tensor | None = None) -> Tensor:
    """(…, P) overlap areas of boxes (…, 4) xyxy with priors' `corners` (4, P)."""
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)
    width = torch.minimum(x1, corners[2]).sub_(torch.maximum(x0, corners[0])).clamp_(min=0)
    height = torch.minimum(y1, corners[3]).sub_(torch.maximum(y0, corners[1])).clamp_(min=0)
    return torch.mul(width, height, out=out)


def box_areas(boxes: Tensor) -> Tensor:
    """(…,) areas of boxes (…, 4) xyxy."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def prior_corners(priors: Tensor) -> tuple[Tensor, Tensor]:
    """xyxy corners (4, P) of cxcywh priors, a row each, and their areas (P,)."""
    return box_convert(priors, "cxcywh", "xyxy").T.contiguous(), priors[:, 2] * priors[:, 3]


# ------------------------------------------------------------------------- image by image


@torch.no_grad()
def match(
    boxes: Tensor, labels: Tensor, priors: Tensor, match_iou: float
) -> tuple[Tensor, Tensor]:
    """Matching, image by image; overlaps are computed for a few images at a time."""
    corners, areas = prior_corners(priors)
    target = np.zeros((len(boxes), len(priors)), np.int8)
    owner = np.zeros(target.shape, np.int64)
    kinds = labels.numpy()
    overlaps = boxes.new_empty((max(ROWS, labels.shape[1]), len(priors)))
    for images in blocks((kinds != 0).sum(1).tolist()):
        people, ignored = (np.argwhere(kinds[images] == kind) for kind in (PERSON, IGNORE))
        image, k = torch.from_numpy(np.concatenate([people, ignored])).T
        objects = boxes[images][image, k]
        shared = overlaps[: len(objects)]
        for rows, out in zip(objects.split(ROWS), shared.split(ROWS), strict=True):
            intersection(rows, corners, out)
        covered = shared[len(people) :].ge(0.5 * areas).numpy()
        for image, inside in zip(ignored[:, 0], covered, strict=True):
            target[images][image, inside] = IGNORE
        shared = shared[: len(people)]
        union = (box_areas(objects[: len(people)]).unsqueeze(1) + areas).sub_(shared)
        iou = shared.div_(union).numpy()
        ends = people[:, 0].searchsorted(range(images.stop - images.start + 1)).tolist()
        for image, (start, end) in enumerate(pairwise(ends), images.start):
            if start < end:
                own, prior = match_image(iou[start:end], match_iou)
                target[image, prior] = PERSON
                owner[image, prior] = people[start:end, 1][own]
    return torch.from_numpy(target), torch.from_numpy(owner)


def blocks(counts: list[int]) -> Iterator[slice]:
    """Consecutive images that together hold at most `ROWS` objects, or one with more."""
    start = total = 0
    for image, count in enumerate(counts):
        if image > start and total + count > ROWS:
            yield slice(start, image)
            start, total = image, 0
        total += count
    yield slice(start, len(counts))


def match_image(iou: np.ndarray, match_iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Persons and the priors that answer for them, from an image's overlaps (m, P); of a prior that
    is there twice the last one counts."""
    positive = np.flatnonzero(iou.max(0) >= match_iou)
    best = iou[:, positive].argmax(0)
    own, prior = own_priors(iou)
    return np.append(best, own), np.append(positive, prior)


def own_priors(iou: np.ndarray) -> tuple[list[int], list[int]]:
    """Persons (at most as many as there are priors) and the priors they own, by greedy matching.

    Every person waits with its best overlap in a queue. The highest overlap is served: with the
    prior if that is free, else the person waits again with its best overlap of the free priors.
    `iou` (m, P) loses what was refused.
    """
    best = iou.argmax(1).tolist()  # numpy's is many times faster than torch's
    queue = [(-iou[person, prior], person, prior) for person, prior in enumerate(best)]
    heapq.heapify(queue)
    taken: dict[int, int] = {}
    while queue and len(taken) < iou.shape[1]:
        _, person, prior = queue[0]
        if prior in taken:
            iou[person, list(taken)] = -1
            prior = int(iou[person].argmax())
            heapq.heapreplace(queue, (-iou[person, prior], person, prior))
        else:
            taken[prior] = person
            heapq.heappop(queue)
    return list(taken.values()), list(taken)


# ------------------------------------------------------------------------- static shapes


@torch.no_grad()
def match_static(
    boxes: Tensor, labels: Tensor, priors: Tensor, match_iou: float
) -> tuple[Tensor, Tensor]:
    """Matching without a look at any value: the batch at once, and as many rounds as objects."""
    corners, areas = prior_corners(priors)
    shared = intersection(boxes, corners)  # (N, M, P)
    covered = (shared >= 0.5 * areas) & (labels == IGNORE).unsqueeze(2)
    iou = shared / (box_areas(boxes).unsqueeze(2) + areas - shared)
    iou = iou.masked_fill((labels != PERSON).unsqueeze(2), -1.0)
    best, owner = iou.max(1)
    target = torch.where(best >= match_iou, PERSON, covered.any(1) * IGNORE).to(torch.int8)

    prior = own_priors_static(iou)
    person = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    spare = target.new_zeros((len(target), 1))  # where those who own none are written
    target = torch.cat([target, spare], 1).scatter(1, prior, PERSON)[:, :-1]
    owner = torch.cat([owner, spare], 1).scatter(1, prior, person)[:, :-1]
    return target, owner


def own_priors_static(iou: Tensor) -> Tensor:
    """Index (N, M) of the prior each object owns, P where it owns none.

    A person's M best priors are enough to choose from, since others own at most M - 1 of them. Then
    M times the highest overlap left is served.

    Args:
        iou: (N, M, P) overlaps, -1 for what is no person.
    """
    n, m, p = iou.shape
    k = min(m, p)
    # One integer holds the overlap (float bits of numbers from 0 up order as integers do) and,
    # for equal overlaps, the prior, earlier ones higher. -1 becomes the lowest of all.
    bits = iou.clamp(min=0).view(torch.int32).long() + (iou >= 0)
    key = (bits * p + (p - 1 - torch.arange(p, device=iou.device))).topk(k, dim=2).values
    candidate = (p - 1 - key % p).flatten(1)  # (N, M k) priors
    overlap = (key // p).flatten(1)  # 0 for what is no person
    whose = torch.arange(m, device=iou.device).repeat_interleave(k)
    own = torch.full((n, m), p, device=iou.device)
    for _ in range(m):
        value, slot = overlap.max(1, keepdim=True)
        person, prior = whose[slot], candidate.gather(1, slot)
        own = own.scatter(1, person, torch.where(value > 0, prior, own.gather(1, person)))
        overlap = overlap.masked_fill((whose == person) | (candidate == prior), 0)
    return own
