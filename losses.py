"""What SSD300 is trained on: the multibox loss and the segmentation infusion loss.

Both take a whole batch as padded tensors; no loop runs over its images. Label 1 is a person,
-1 an ignored object (crowd, cyclist, too small, cut by the border), 0 padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from model import Predictions, encode
from parallel import ALONE, Team

PERSON, BACKGROUND, IGNORE = 1, 0, -1
CPU_BLOCK = 4  # images matched at a time on a CPU


class MultiBoxLoss(nn.Module):
    """SSD's loss (section 2.2 of the paper): localisation of matched priors, and confidence.

    Confidence is the cross-entropy of all positive priors and of the hardest negatives, three a
    positive; both losses are divided by the number of positives in the batch (at least 1).

    Args:
        priors: (P, 4) cxcywh fractions.
        loc_loss: "l1" or "smooth_l1".
        loc_reduction: "sum" over coordinates, divided by the positives as in the paper; or
            "mean" over coordinates too (a quarter of it), as the logged experiments did.
        match_iou: a prior that overlaps a person by at least this IoU is positive.
        negative_ratio: mined negatives for each positive.
        min_negatives: mined negatives of a frame with fewer positives, so that frames of pure
            background teach too.
        team: the processes that share a batch: the positives of all of them are counted, and
            the average of their losses is the whole batch's.
    """

    def __init__(
        self,
        priors: Tensor,
        *,
        loc_loss: str,
        loc_reduction: str,
        match_iou: float = 0.5,
        negative_ratio: int = 3,
        min_negatives: int = 3,
        team: Team = ALONE,
    ) -> None:
        super().__init__()
        self.register_buffer("priors", priors, persistent=False)
        self.distance = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[loc_loss]
        self.loc_terms = {"sum": 1, "mean": 4}[loc_reduction]
        self.match_iou = match_iou
        self.negative_ratio = negative_ratio
        self.min_negatives = min_negatives
        self.team = team

    def forward(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loc, conf) losses, two float32 scalars, for the whole batch.

        Args:
            predictions: loc (N, P, 4) and conf (N, P, 2), float32.
            boxes: (N, M, 4) xyxy fractions, padded.
            labels: (N, M) int64: 1 person, -1 ignore, 0 padding.
        """
        target, owner = match(boxes, labels, self.priors, self.match_iou)
        positive = target == PERSON
        count = self.team.sum(positive.sum()).clamp(min=1) / self.team.size

        image, prior = positive.nonzero(as_tuple=True)
        wanted = box_convert(boxes[image, owner[image, prior]], "xyxy", "cxcywh")
        offsets = encode(wanted, self.priors[prior])
        loc = self.distance(predictions.loc[image, prior], offsets, reduction="sum")

        # With two classes the cross-entropy is softplus of the logits' difference.
        margin = predictions.conf[..., 1] - predictions.conf[..., 0]
        wanted_negatives = (self.negative_ratio * positive.sum(1)).clamp(min=self.min_negatives)
        hard = hardest_negatives(margin, target, wanted_negatives)
        conf = F.softplus(-margin[image, prior]).sum() + F.softplus(hard).sum()
        return loc / (self.loc_terms * count), conf / count


def hardest_negatives(margin: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
    """The (N, k) highest margins of background priors, -inf beyond a frame's wanted number.

    Args:
        margin: (N, P) person logit minus background logit; it orders negatives by their loss.
        target: (N, P) as from `match`; only background (0) is mined.
        wanted: (N,) negatives to mine in each frame.
    """
    k = min(int(wanted.max()), margin.shape[1])
    hard = margin.masked_fill(target != BACKGROUND, -torch.inf).topk(k, dim=1).values
    surplus = torch.arange(k, device=margin.device) >= wanted.unsqueeze(1)
    return hard.masked_fill(surplus, -torch.inf)


@torch.no_grad()
def match(
    boxes: Tensor, labels: Tensor, priors: Tensor, match_iou: float
) -> tuple[Tensor, Tensor]:
    """Give each prior its target and the object it answers for.

    Each person first owns one prior, by greedy bipartite matching in descending IoU, so that no
    person is left out when two share their best prior. Then each further prior whose best IoU
    with a person reaches `match_iou` is positive. Of the rest, a prior with at least half of its
    area inside an ignored object is ignored (the rule by which the evaluation absorbs
    detections); what remains is background.

    Args:
        boxes: (N, M, 4) xyxy fractions; labels: (N, M) int64, 1 person, -1 ignore, 0 padding.
        priors: (P, 4) cxcywh fractions.

    Returns:
        target (N, P) int64, 1 person, 0 background, -1 ignored; and owner (N, P) int64, the
        index of the best overlapping (or owning) object, meaningful where target is 1.
    """
    if labels.shape[1] == 0:
        boxes, labels = boxes.new_zeros((len(boxes), 1, 4)), labels.new_zeros((len(boxes), 1))
    size = len(boxes) if boxes.is_cuda else CPU_BLOCK
    blocks = zip(boxes.split(size), labels.split(size), strict=True)
    matched = [match_block(b, ls, priors, match_iou) for b, ls in blocks]
    target, owner = (torch.cat(parts) for parts in zip(*matched, strict=True))
    return target, owner


def match_block(
    boxes: Tensor, labels: Tensor, priors: Tensor, match_iou: float
) -> tuple[Tensor, Tensor]:
    """`match` for so many images that their overlaps with all priors fit the processor's cache."""
    overlap = intersection(boxes, box_convert(priors, "cxcywh", "xyxy"))
    prior_area = priors[:, 2] * priors[:, 3]
    box_area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    ignored = ((overlap >= 0.5 * prior_area) & (labels == IGNORE).unsqueeze(2)).any(1)
    iou = overlap / (box_area.unsqueeze(2) + prior_area - overlap)
    iou.masked_fill_((labels != PERSON).unsqueeze(2), -1.0)

    best, owner = iou.max(dim=1)
    target = torch.where(ignored, IGNORE, BACKGROUND)
    target[best >= match_iou] = PERSON
    image, person = (labels == PERSON).nonzero(as_tuple=True)
    prior = own_priors(iou, labels == PERSON)[image, person]
    target[image, prior] = PERSON
    owner[image, prior] = person
    return target, owner


def intersection(boxes: Tensor, priors: Tensor) -> Tensor:
    """(N, M, P) overlap areas of boxes (N, M, 4) with priors (P, 4), both xyxy."""
    boxes = boxes.unsqueeze(2)
    width = torch.minimum(boxes[..., 2], priors[:, 2]) - torch.maximum(boxes[..., 0], priors[:, 0])
    height = torch.minimum(boxes[..., 3], priors[:, 3]) - torch.maximum(boxes[..., 1], priors[:, 1])
    return width.clamp_(min=0).mul_(height.clamp_(min=0))


def own_priors(iou: Tensor, is_person: Tensor) -> Tensor:
    """Index (N, M) of the prior each person owns: greedy bipartite matching in descending IoU.

    Run as deferred acceptance (Gale and Shapley, 1962): every person asks for its best prior, the
    one with the highest IoU holds it, the others ask for their next best. With one overlap that
    ranks both sides the outcome is the greedy one, and most batches need a single round. Of equal
    overlaps the earlier person holds the prior. `iou` (N, M, P) loses the refused overlaps.
    """
    best, prior = iou.max(dim=2)
    earlier = torch.ones(iou.shape[1], iou.shape[1], device=iou.device).triu(1).bool()
    rivals = is_person.unsqueeze(2) & is_person.unsqueeze(1)
    while True:
        # stronger[n, i, j]: i asks for the same prior as j and goes first
        same = (prior.unsqueeze(2) == prior.unsqueeze(1)) & rivals
        equal = best.unsqueeze(2) == best.unsqueeze(1)
        stronger = (best.unsqueeze(2) > best.unsqueeze(1)) | (equal & earlier)
        refused = (same & stronger).any(dim=1)
        if not refused.any():
            return prior
        image, person = refused.nonzero(as_tuple=True)
        iou[image, person, prior[image, person]] = -1.0
        best[image, person], prior[image, person] = iou[image, person].max(dim=1)


class SegmentationLoss(nn.Module):
    """Cross-entropy between mask logits and box-shaped masks, summed up over the infused maps.

    Args:
        cells: "mean" over a batch's cells, or "sum" over a frame's cells (mean over frames).
        maps: "mean" or "sum" over the feature maps.
        team: the processes that share a batch, as in `MultiBoxLoss`.
    """

    def __init__(self, *, cells: str, maps: str, team: Team = ALONE) -> None:
        super().__init__()
        self.cells = cells
        self.maps = maps
        self.team = team

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
                cells = self.team.sum((mask != IGNORE).sum()).clamp(min=1) / self.team.size
            else:
                cells = len(mask)
            losses.append(loss / cells)
        losses = torch.stack(losses)
        return (losses.sum() if self.maps == "sum" else losses.mean()), losses
