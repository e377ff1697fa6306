"""What SSD300 is trained on: the multibox loss and the segmentation infusion loss.

Both take a whole batch as padded tensors; no loop runs over its images. Label 1 is a person,
-1 an ignored object (crowd, cyclist, too small, cut by the border), 0 padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from engine.distributed import ALONE, Team
from matching import BACKGROUND, IGNORE, PERSON, match, match_static
from model import Predictions, encode

LOG_VARIANCE_LIMIT = 5.0  # learned weights stay between exp(-5) and exp(5)


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
        terms = self.sparse if predictions.loc.device.type == "cpu" else self.static
        loc, conf, positives = terms(predictions, boxes, labels)
        count = self.team.sum(positives).clamp(min=1) / self.team.size
        return loc / (self.loc_terms * count), conf / count

    def sparse(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of loc and conf, and the positives' number, from those priors alone that teach
        something: the quick way on a CPU."""
        target, owner = match(boxes, labels, self.priors, self.match_iou)
        positive = torch.from_numpy(np.flatnonzero(target.numpy() == PERSON))
        image, prior = positive // len(self.priors), positive % len(self.priors)
        wanted = self.negatives(image.bincount(minlength=len(boxes)))
        negative = hardest_negatives(predictions.conf.detach(), target, wanted)

        offsets = encode(to_cxcywh(boxes[image, owner[image, prior]]), self.priors[prior])
        loc = predictions.loc.flatten(0, 1).index_select(0, positive)
        conf = predictions.conf.flatten(0, 1).index_select(0, torch.cat([positive, negative]))
        margin = conf[:, 1] - conf[:, 0]
        # With two classes the cross-entropy is softplus of the logits' difference.
        margin = torch.cat([-margin[: len(positive)], margin[len(positive) :]])
        sums = self.distance(loc, offsets, reduction="sum"), F.softplus(margin).sum()
        return *sums, torch.tensor(len(positive))

    def static(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same from all priors, with shapes that no value changes: the way on a GPU, which
        never waits for the host to look at one."""
        target, owner = match_static(boxes, labels, self.priors, self.match_iou)
        positive = target == PERSON
        owned = boxes.gather(1, owner.unsqueeze(2).expand(-1, -1, 4))
        offsets = encode(to_cxcywh(owned), self.priors)
        # What is not positive is compared with itself: no loss, no gradient.
        offsets = torch.where(positive.unsqueeze(2), offsets, predictions.loc.detach())
        loc = self.distance(predictions.loc, offsets, reduction="sum")

        margin = predictions.conf[..., 1] - predictions.conf[..., 0]
        negative = margin.masked_fill(target != BACKGROUND, -torch.inf)
        hardest = negative.sort(dim=1, descending=True).values
        rank = torch.arange(len(self.priors), device=margin.device)
        mined = rank < self.negatives(positive.sum(1)).unsqueeze(1)
        conf = F.softplus(hardest).masked_fill(~mined, 0).sum()
        conf = conf + F.softplus(-margin).masked_fill(~positive, 0).sum()
        return loc, conf, positive.sum()

    def negatives(self, positives: Tensor) -> Tensor:
        """How many negatives frames (N,) of so many positives mine."""
        return (self.negative_ratio * positives).clamp(min=self.min_negatives)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """xyxy boxes (…, 4) as cxcywh."""
    return box_convert(boxes, "xyxy", "cxcywh")


def hardest_negatives(conf: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
    """Indices into the (N P) priors of a batch: of each frame its `wanted` (N,) background priors
    with the highest loss, or all that it has.

    Args:
        conf: (N, P, 2) logits, without gradient; target: (N, P) as from `match`.
    """
    margin = (conf[..., 1] - conf[..., 0]).masked_fill_(target != BACKGROUND, -torch.inf)
    hardest = [row.topk(min(k, len(row)), sorted=False)
               for row, k in zip(margin, wanted.tolist(), strict=True)]  # fmt: skip
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
        team: the processes that share a batch, as in `MultiBoxLoss`.
    """

    def __init__(self, n_maps: int, *, cells: str, maps: str, team: Team = ALONE) -> None:
        super().__init__()
        self.cells = cells
        self.maps = maps
        self.team = team
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
                cells = self.team.sum((mask != IGNORE).sum()).clamp(min=1) / self.team.size
            else:
                cells = len(mask)
            losses.append(loss / cells)
        losses = torch.stack(losses)
        if self.maps == "uncertainty":
            precision = self.bounded()
            return (precision.exp() * losses - precision / 2).sum(), losses
        return (losses.sum() if self.maps == "sum" else losses.mean()), losses
