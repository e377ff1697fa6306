"""What SSD300 is trained on: the multibox loss and the segmentation infusion loss.

Both take a whole batch as padded tensors; no loop runs over its images. Label 1 is a person,
-1 an ignored object (crowd, cyclist, too small, cut by the border), 0 padding.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import all_reduce_sum, world_size
from ssd.boxes import Predictions, encode, to_corners

PERSON, BACKGROUND, IGNORE = 1, 0, -1
TIE = 1e-5  # overlaps that differ by no more than this share are equal
LOG_VARIANCE_LIMIT = 5.0  # learned weights stay between exp(-5) and exp(5)


# ------------------------------------------------------------------------------ matching
#
# SSD's matching (section 2.2 of the paper), written twice: `match` does only what an image's objects
# need and suits a CPU; `match_static` is a fixed sequence of operations on whole batches, so that a
# GPU never waits for the host and the graph compiles. Tests hold the two equal.
#
# The best prior of each ignored object is ignored, with all that tie for it. Of the others each person
# owns one, by greedy bipartite matching in descending IoU. Of equal overlaps the earlier person goes
# first, then the earlier prior. Any other prior with an IoU of `match_iou` goes by the object of its
# highest IoU: positive if that is a person, ignored if it is to be ignored. Of the rest, a prior with
# half of its area inside an ignored object is ignored. What remains is background.


@torch.no_grad()
def match(boxes: Tensor, labels: Tensor, priors: Tensor, match_iou: float) -> tuple[Tensor, Tensor]:
    """Which object each prior answers for, image by image.

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64: 1 person, -1 ignore, 0 padding.
        priors: (P, 4) cxcywh fractions.
        match_iou: a prior that overlaps a person by this IoU is positive.

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
        near = np.flatnonzero(iou.max(0) >= match_iou)
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
def match_static(boxes: Tensor, labels: Tensor, priors: Tensor, match_iou: float) -> tuple[Tensor, Tensor]:
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
    near = torch.maximum(best, of_ignored.amax(1)) >= match_iou
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

    Args:
        iou: (N, M, P) overlaps, -1 for what is no person.

    Returns:
        (N, M) int64 index of the prior each object owns, P where it owns none.
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


def is_best(iou: Tensor) -> Tensor:
    """Which of overlaps (…, P) are the highest of their row, but for rounding.

    An object that several priors of one size enclose overlaps all of them alike. A row without any
    overlap has no best one.
    """
    return (iou >= iou.amax(-1, keepdim=True) * (1 - TIE)) & (iou > 0)


def prior_corners(priors: Tensor) -> tuple[Tensor, Tensor]:
    """xyxy corners (4, P) of cxcywh priors, a row each, and their areas (P,)."""
    return box_convert(priors, "cxcywh", "xyxy").T.contiguous(), priors[:, 2] * priors[:, 3]


def intersection(boxes: Tensor, corners: Tensor) -> Tensor:
    """(…, P) overlap areas of boxes (…, 4) xyxy with priors' `corners` (4, P)."""
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)
    width = torch.minimum(x1, corners[2]).sub_(torch.maximum(x0, corners[0])).clamp_(min=0)
    height = torch.minimum(y1, corners[3]).sub_(torch.maximum(y0, corners[1])).clamp_(min=0)
    return width.mul_(height)


def box_areas(boxes: Tensor) -> Tensor:
    """(…,) areas of boxes (…, 4) xyxy."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


# ------------------------------------------------------------------------------ losses


class MultiBoxLoss(nn.Module):
    """SSD's loss (section 2.2 of the paper): localisation of matched priors, and confidence.

    Confidence is the cross-entropy of all positive priors and of the hardest negatives, three a
    positive. Localisation is divided by the number of positives in the batch (at least 1). Processes
    that share a batch count what all of it holds: the mean of their losses is the batch's.

    Args:
        priors: (P, 4) cxcywh fractions.
        loc_loss: "l1" or "smooth_l1".
        loc_reduction: "sum" over coordinates, divided by the positives as in the paper; or
            "mean" over coordinates too (a quarter of it), as the logged experiments did.
        conf_divisor: what confidence is divided by. "positives": their number, as in the paper.
            Frames without people add negatives to it, so that a small batch with few positives
            has many terms a positive. "balanced": a third of the negatives where that is more, so
            that there are 3 to 4 terms to one of the divisor.
        match_iou: a prior that overlaps a person by at least this IoU is positive.
        negative_ratio: mined negatives for each positive.
        min_negatives: mined negatives of a frame with fewer positives, so that frames of pure
            background teach too.
    """

    def __init__(
        self,
        priors: Tensor,
        *,
        loc_loss: str,
        loc_reduction: str,
        conf_divisor: str = "positives",
        match_iou: float = 0.5,
        negative_ratio: int = 3,
        min_negatives: int = 3,
    ) -> None:
        super().__init__()
        self.register_buffer("priors", priors, persistent=False)
        self.distance = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[loc_loss]
        self.loc_terms = {"sum": 1, "mean": 4}[loc_reduction]
        self.balanced = conf_divisor == "balanced"
        self.match_iou = match_iou
        self.negative_ratio = negative_ratio
        self.min_negatives = min_negatives

    def forward(self, predictions: Predictions, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loc, conf) losses, two float32 scalars, for the whole batch.

        Args:
            predictions: loc (N, P, 4) and conf (N, P, 2), float32.
            boxes: (N, M, 4) xyxy fractions, padded.
            labels: (N, M) int64: 1 person, -1 ignore, 0 padding.
        """
        terms = self.sparse if predictions.loc.device.type == "cpu" else self.static
        loc, conf, positives, negatives = terms(predictions, boxes, labels)
        positives = all_reduce_sum(positives).clamp(min=1) / world_size()
        divisor = positives
        if self.balanced:
            negatives = all_reduce_sum(negatives) / world_size()
            divisor = torch.maximum(positives, negatives / self.negative_ratio)
        return loc / (self.loc_terms * positives), conf / divisor

    def sparse(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of loc and conf, and the numbers of positives and of mined negatives.

        Only priors that have a loss are looked at, which is the fast way on a CPU.
        """
        target, matched_idxs = match(boxes, labels, self.priors, self.match_iou)
        positive = torch.from_numpy(np.flatnonzero(target.numpy() == PERSON))
        image, prior = positive // len(self.priors), positive % len(self.priors)
        n_negatives = self.n_negatives(image.bincount(minlength=len(boxes)))
        negative = hardest_negatives(predictions.conf.detach(), target, n_negatives)

        offsets = encode(to_cxcywh(boxes[image, matched_idxs[image, prior]]), self.priors[prior])
        loc = predictions.loc.flatten(0, 1).index_select(0, positive)
        conf = predictions.conf.flatten(0, 1).index_select(0, torch.cat([positive, negative]))
        margin = conf[:, 1] - conf[:, 0]
        # With two classes the cross-entropy is softplus of the logits' difference.
        margin = torch.cat([-margin[: len(positive)], margin[len(positive) :]])
        sums = self.distance(loc, offsets, reduction="sum"), F.softplus(margin).sum()
        return *sums, torch.tensor(len(positive)), torch.tensor(len(negative))

    def static(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from all priors, with shapes that no value changes.

        A GPU never waits for the host to look at a value.
        """
        target, matched_idxs = match_static(boxes, labels, self.priors, self.match_iou)
        positive = target == PERSON
        matched = boxes.gather(1, matched_idxs.unsqueeze(2).expand(-1, -1, 4))
        offsets = encode(to_cxcywh(matched), self.priors)
        # What is not positive is compared with itself: no loss, no gradient.
        offsets = torch.where(positive.unsqueeze(2), offsets, predictions.loc.detach())
        loc = self.distance(predictions.loc, offsets, reduction="sum")

        margin = predictions.conf[..., 1] - predictions.conf[..., 0]
        negative = margin.masked_fill(target != BACKGROUND, -torch.inf)
        hardest = negative.sort(dim=1, descending=True).values
        rank = torch.arange(len(self.priors), device=margin.device)
        mined = rank < self.n_negatives(positive.sum(1)).unsqueeze(1)
        conf = F.softplus(hardest).masked_fill(~mined, 0).sum()
        conf = conf + F.softplus(-margin).masked_fill(~positive, 0).sum()
        return loc, conf, positive.sum(), (mined & (hardest > -torch.inf)).sum()

    def n_negatives(self, n_positives: Tensor) -> Tensor:
        """How many negatives are mined of frames (N,) with so many positives."""
        return (self.negative_ratio * n_positives).clamp(min=self.min_negatives)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """xyxy boxes (…, 4) as cxcywh."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)


def hardest_negatives(conf: Tensor, target: Tensor, n_negatives: Tensor) -> Tensor:
    """The background priors of highest loss of each frame, as indices into a batch's (N P) priors.

    Args:
        conf: (N, P, 2) logits, without gradient; target: (N, P) as from `match`.
        n_negatives: (N,) how many of each frame; all that it has if there are fewer.
    """
    margin = (conf[..., 1] - conf[..., 0]).masked_fill_(target != BACKGROUND, -torch.inf)
    hardest = [
        row.topk(min(k, len(row)), sorted=False) for row, k in zip(margin, n_negatives.tolist(), strict=True)
    ]
    frame = torch.arange(len(margin)).repeat_interleave(torch.tensor([len(x[0]) for x in hardest]))
    index = torch.cat([index for _, index in hardest]) + frame * margin.shape[1]
    return index[torch.cat([values for values, _ in hardest]) != -torch.inf]


class SegmentationLoss(nn.Module):
    """Cross-entropy between mask logits and box-shaped masks, summed up over the infused maps.

    Args:
        n_maps: number of infused maps.
        cells: "mean" over a batch's cells, or "sum" over a frame's cells (mean over frames).
        maps: "mean" or "sum" over the feature maps, or "uncertainty": a sum in which each map's
            loss L counts exp(-s) L + s / 2 with a learned s, the logarithm of its variance (Kendall
            et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018).
    """

    def __init__(self, n_maps: int, *, cells: str, maps: str) -> None:
        super().__init__()
        self.cells = cells
        self.maps = maps
        if maps == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(n_maps))

    def weights(self) -> list[float]:
        """What each map's loss is multiplied by, as learned so far; [] where that is fixed."""
        return self.bounded().exp().tolist() if self.maps == "uncertainty" else []

    def bounded(self) -> Tensor:
        """-s of each map, bounded: a loss of zero would raise its weight without end."""
        return -self.log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)

    def forward(self, seg: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, a float32 scalar (0 without infused maps), and each map's own, (maps,).

        Args:
            seg: per infused map (N, 2, h, w) logits of background and person.
            masks: per infused map (N, h, w) int64: 1 person, 0 background, -1 left out.
        """
        if not seg:
            return torch.zeros(()), torch.zeros(0)
        losses = []
        for logits, mask in zip(seg, masks, strict=True):
            loss = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum")
            if self.cells == "mean":
                cells = all_reduce_sum((mask != IGNORE).sum()).clamp(min=1) / world_size()
            else:
                cells = len(mask)
            losses.append(loss / cells)
        losses = torch.stack(losses)
        if self.maps == "uncertainty":
            precision = self.bounded()
            return (precision.exp() * losses - precision / 2).sum(), losses
        return (losses.sum() if self.maps == "sum" else losses.mean()), losses


class Criterion(nn.Module):
    """The total that is minimised: loc + conf + `seg_weight` x seg.

    Called with predictions and a batch's boxes, labels and masks; returns the float32 `terms`.

    Args:
        priors, loc_loss, loc_reduction, conf_divisor: as in `MultiBoxLoss`.
        seg_cells, seg_maps: as `cells` and `maps` in `SegmentationLoss`.
        infused_maps: indices of the feature maps with a segmentation head.

    Attributes:
        terms: names of the losses: the total, loc, conf, seg, and seg of each infused map (map 1
            is the finest).
    """

    def __init__(
        self,
        priors: Tensor,
        infused_maps: Sequence[int],
        *,
        loc_loss: str,
        loc_reduction: str,
        conf_divisor: str,
        seg_cells: str,
        seg_maps: str,
        seg_weight: float,
    ) -> None:
        super().__init__()
        self.multibox = MultiBoxLoss(
            priors, loc_loss=loc_loss, loc_reduction=loc_reduction, conf_divisor=conf_divisor
        )
        self.segmentation = SegmentationLoss(len(infused_maps), cells=seg_cells, maps=seg_maps)
        self.seg_weight = seg_weight
        of_maps = (f"seg_map{i + 1}" for i in infused_maps)
        self.terms = ("loss", "loc", "conf", "seg", *of_maps)

    def learned_weights(self) -> dict[str, float]:
        """ "weight_map1", … of the maps' mask losses where SEG_MAPS learns them, else nothing."""
        names = (term.replace("seg", "weight") for term in self.terms[4:])
        return dict(zip(names, self.segmentation.weights(), strict=False))

    def forward(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor, masks: Sequence[Tensor]
    ) -> Tensor:
        loc, conf = self.multibox(predictions, boxes, labels)
        seg, of_maps = self.segmentation(predictions.seg, masks)
        total = loc + conf + self.seg_weight * seg.to(loc.device)
        return torch.stack([total, loc, conf, seg.to(loc.device), *of_maps])
