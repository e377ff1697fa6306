"""The loss of MLPD and INSANet: a prior's person may be seen in visible, in LWIR, or in both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import all_reduce_sum, world_size
from kaist.frames import LWIR, VISIBLE
from ssd.boxes import Predictions, encode, to_corners


class MultiLabelLoss(nn.Module):
    """Binary cross-entropies of three logits, and the mean absolute error of the offsets.

    Kim et al., "MLPD" (RA-L 2021). Positive priors and the hardest negatives, three a positive in
    each frame, count; a prior's loss is the sum over background, person in visible and person in
    LWIR. Priors that answer for an ignored object have no loss. One fixed sequence of whole-batch
    operations serves every device: none waits for a value.

    Args:
        priors: (P, 4) cxcywh fractions.
        match_iou: a prior answers for the object that it overlaps most, by at least this IoU.
        negative_ratio: mined negatives for each positive.
    """

    def __init__(self, priors: Tensor, *, match_iou: float = 0.5, negative_ratio: int = 3) -> None:
        super().__init__()
        self.register_buffer("priors", priors, persistent=False)
        self.match_iou = match_iou
        self.negative_ratio = negative_ratio

    def forward(self, predictions: Predictions, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loc, conf) losses, two float32 scalars, for the whole batch.

        Args:
            predictions: loc (N, P, 4) and conf (N, P, 3), float32.
            boxes: (N, M, 4) xyxy fractions, padded.
            labels: (N, M) int64: 1 visible alone, 2 LWIR alone, 3 both, -1 ignore, 0 padding.
        """
        target, matched_idxs = match_multilabel(boxes, labels, self.priors, self.match_iou)
        positive = target > 0
        n_positives = all_reduce_sum(positive.sum()).clamp(min=1) / world_size()

        matched = boxes.gather(1, matched_idxs.unsqueeze(2).expand(-1, -1, 4))
        low, high = matched[..., :2], matched[..., 2:]
        offsets = encode(torch.cat([(low + high) / 2, high - low], dim=-1), self.priors)
        # What is not positive is compared with itself: no loss, no gradient.
        offsets = torch.where(positive.unsqueeze(2), offsets, predictions.loc.detach())
        loc = F.l1_loss(predictions.loc, offsets, reduction="sum") / (4 * n_positives)

        seen = torch.stack([target == 0, (target & VISIBLE) > 0, (target & LWIR) > 0], dim=2)
        losses = F.binary_cross_entropy_with_logits(
            predictions.conf, seen.to(predictions.conf.dtype), reduction="none"
        ).sum(2)
        hardest = losses.masked_fill(target != 0, -torch.inf).sort(dim=1, descending=True).values
        rank = torch.arange(len(self.priors), device=losses.device)
        n_negatives = self.negative_ratio * positive.sum(1, keepdim=True)
        mined = (rank < n_negatives) & (hardest > -torch.inf)
        conf = losses.masked_fill(~positive, 0).sum() + hardest.masked_fill(~mined, 0).sum()
        return loc, conf / n_positives


@torch.no_grad()
def match_multilabel(
    boxes: Tensor, labels: Tensor, priors: Tensor, match_iou: float
) -> tuple[Tensor, Tensor]:
    """Which prior answers for which object, ignored ones like any other.

    A prior answers for the object that it overlaps most if their IoU is at least `match_iou`. Then
    each object takes the prior that overlaps it most, whatever the IoU; of objects that take the
    same prior the later one has it.

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64, 0 padding; priors: (P, 4) cxcywh.

    Returns:
        target: (N, P) int64, the label of the object, 0 background;
        matched_idxs: (N, P) int64, that object, meaningful where target is not 0.
    """
    # An object inside of several priors of a size overlaps them alike, and rounding says which one it
    # takes: as in the published loss areas are those of corners, and divided by in this order.
    ours, theirs = boxes.unsqueeze(2), to_corners(priors)  # (N, M, 1, 4), (P, 4)
    width, height = (
        torch.minimum(ours[..., i + 2], theirs[:, i + 2]).sub_(torch.maximum(ours[..., i], theirs[:, i]))
        for i in (0, 1)
    )
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))  # (N, M, P)
    area, area_of_priors = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (ours, theirs))
    iou = shared / (area + area_of_priors - shared)
    padding = labels == 0
    overlap, matched_idxs = iou.masked_fill(padding.unsqueeze(2), -1.0).max(1)
    best = iou.argmax(2).masked_fill(padding, len(priors))  # padding takes one beyond the last
    taken = torch.full((len(boxes), len(priors) + 1), -1, device=boxes.device)
    objects = torch.arange(labels.shape[1], device=boxes.device).expand_as(labels)
    taken = taken.scatter_reduce(1, best, objects, "amax")[:, :-1]
    matched_idxs = torch.where(taken >= 0, taken, matched_idxs)
    answers = (taken >= 0) | (overlap >= match_iou)
    target = labels.gather(1, matched_idxs).masked_fill(~answers, 0)
    return target, matched_idxs
