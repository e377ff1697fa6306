"""What a network is trained on: the multibox loss and the segmentation infusion loss.

Both take a whole batch as padded tensors; no loop runs over its images. Labels 1, 2 and 3 are persons
(seen in visible alone, in LWIR alone, in both), -1 an ignored object (crowd, cyclist, too small, cut
by the border), 0 padding. A network of two logits has a single label for persons: 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import all_reduce_sum, world_size
from kaist.annotations import FRAME_HEIGHT
from kaist.frames import LWIR, VISIBLE
from ssd.boxes import Grid, Predictions, encode, xyxy_to_cxcywh
from ssd.matching import BACKGROUND, IGNORE, PERSON, PriorTable, match, match_multilabel, match_static

# What `Criterion` takes from a configuration.
CRITERION_KEYS = (
    *("loc_loss", "loc_reduction", "conf_divisor"),
    *("seg_cells", "seg_maps", "seg_balance", "seg_person_share", "seg_weight"),
)
Sums = tuple[Tensor, Tensor, Tensor, Tensor]
NEG_TO_POS_RATIO = 3  # mined negatives for each positive
LOG_VARIANCE_LIMIT = 5.0  # learned weights stay between exp(-5) and exp(5)
HEIGHT_UNIT = 50.0  # pixels of height that add 1 to the weight of a person's cells, SDS-RCNN's


class MultiBoxLoss(nn.Module):
    """SSD's loss (section 2.2 of the paper): localisation of matched priors, and confidence.

    Confidence is the cross-entropy of all positive priors and of the hardest negatives, three a
    positive, but at least three a frame, so that frames of pure background teach too. Localisation is
    divided by the number of positives in the batch (at least 1). Processes that share a batch count
    what all of it holds: the mean of their losses is the batch's.

    Args:
        priors: (P, 4) cxcywh fractions; loc_loss: "l1" or "smooth_l1".
        loc_reduction: "sum" over coordinates, divided by the positives as in the paper; or
            "mean" over coordinates too (a quarter of it), as the logged experiments did.
        conf_divisor: what confidence is divided by. "positives": their number, as in the paper.
            "balanced": a third of the negatives where that is more, as in small batches whose frames
            are without people, so that there are 3 to 4 terms to one of the divisor.
    """

    min_negatives = 3

    def __init__(
        self, priors: Tensor, *, loc_loss: str, loc_reduction: str, conf_divisor: str = "positives"
    ) -> None:
        super().__init__()
        self.register_buffer("priors", priors, persistent=False)
        self.distance = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[loc_loss]
        self.loc_divisor = {"sum": 1, "mean": 4}[loc_reduction]
        self.balanced = conf_divisor == "balanced"

    def forward(self, predictions: Predictions, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loc, conf) losses, two float32 scalars, for the whole batch: boxes (N, M, 4) xyxy fractions and
        labels (N, M) int64, padded."""
        way = self.sparse if predictions.loc.device.type == "cpu" else self.static
        loc, conf, positives, negatives = way(predictions, boxes, labels)
        positives = all_reduce_sum(positives).clamp(min=1) / world_size()
        divisor = positives
        if self.balanced:
            negatives = all_reduce_sum(negatives) / world_size()
            divisor = torch.maximum(positives, negatives / NEG_TO_POS_RATIO)
        return loc / (self.loc_divisor * positives), conf / divisor

    @cached_property
    def prior_table(self) -> PriorTable:
        """The priors as `match` takes them."""
        return PriorTable(self.priors)

    def sparse(self, predictions: Predictions, boxes: Tensor, labels: Tensor) -> Sums:
        """`static` that looks only at priors that have a loss: on a CPU 4 to 100 times as fast."""
        target, matched_idxs = match(boxes, labels, self.prior_table)
        positive = torch.from_numpy(np.flatnonzero(target.numpy() == PERSON))
        image, prior = positive // len(self.priors), positive % len(self.priors)
        n_negatives = self.n_negatives(image.bincount(minlength=len(boxes)))
        negative = hardest_negatives(predictions.conf.detach(), target, n_negatives)

        offsets = encode(xyxy_to_cxcywh(boxes[image, matched_idxs[image, prior]]), self.priors[prior])
        loc = predictions.loc.flatten(0, 1).index_select(0, positive)
        conf = predictions.conf.flatten(0, 1).index_select(0, torch.cat([positive, negative]))
        margin = conf[:, 1] - conf[:, 0]
        # With two classes the cross-entropy is softplus of the logits' difference.
        margin = torch.cat([-margin[: len(positive)], margin[len(positive) :]])
        sums = self.distance(loc, offsets, reduction="sum"), F.softplus(margin).sum()
        return *sums, torch.tensor(len(positive)), torch.tensor(len(negative))

    def static(self, predictions: Predictions, boxes: Tensor, labels: Tensor) -> Sums:
        """Sums of loc and conf, and the numbers of positives and of mined negatives; with shapes that no
        value changes, so that a GPU never waits for the host."""
        target, matched_idxs = self.match(boxes, labels)
        positive = target > BACKGROUND
        matched = boxes.gather(1, matched_idxs.unsqueeze(2).expand(-1, -1, 4))
        offsets = encode(xyxy_to_cxcywh(matched), self.priors)
        # What is not positive is compared with itself: no loss, no gradient.
        offsets = torch.where(positive.unsqueeze(2), offsets, predictions.loc.detach())
        loc = self.distance(predictions.loc, offsets, reduction="sum")

        of_positives, of_negatives = self.conf_losses(predictions.conf, target)
        # No loss is below zero: what is no background sorts behind all that has any.
        hardest = of_negatives.masked_fill(target != BACKGROUND, 0).sort(dim=1, descending=True).values
        n_negatives = torch.minimum(self.n_negatives(positive.sum(1)), (target == BACKGROUND).sum(1))
        mined = torch.arange(len(self.priors), device=target.device) < n_negatives.unsqueeze(1)
        conf = of_positives.masked_fill(~positive, 0).sum() + hardest.masked_fill(~mined, 0).sum()
        return loc, conf, positive.sum(), n_negatives.sum()

    def match(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What each prior answers for, (N, P), and which object that is, (N, P)."""
        return match_static(boxes, labels, self.priors)

    def conf_losses(self, conf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The confidence loss of each prior as a positive and as a negative, twice (N, P)."""
        margin = conf[..., 1] - conf[..., 0]
        return F.softplus(-margin), F.softplus(margin)

    def n_negatives(self, n_positives: Tensor) -> Tensor:
        """How many negatives are mined of frames with so many positives."""
        return (NEG_TO_POS_RATIO * n_positives).clamp(min=self.min_negatives)


class MultiLabelLoss(MultiBoxLoss):
    """MLPD's and INSANet's loss: a prior's person may be seen in visible, in LWIR, or in both.

    Kim et al., "MLPD" (RA-L 2021). Of three logits a prior's confidence loss is the sum of the binary
    cross-entropies of background, person in visible and person in LWIR. Frames without positives have
    none. Priors that answer for an ignored object have no loss. One way serves every device.
    """

    min_negatives, sparse = 0, MultiBoxLoss.static

    def __init__(self, priors: Tensor) -> None:
        super().__init__(priors, loc_loss="l1", loc_reduction="mean")

    def match(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return match_multilabel(boxes, labels, self.priors)

    def conf_losses(self, conf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.stack([target == BACKGROUND, (target & VISIBLE) > 0, (target & LWIR) > 0], dim=2)
        losses = F.binary_cross_entropy_with_logits(conf, seen.to(conf.dtype), reduction="none").sum(2)
        return losses, losses


def hardest_negatives(conf: Tensor, target: Tensor, n_negatives: Tensor) -> Tensor:
    """The `n_negatives` (N,) background priors of highest loss of each frame, or all that it has, as indices
    into a batch's (N P) priors; conf: (N, P, 2) logits, without gradient; target: (N, P) as from `match`."""
    margin = (conf[..., 1] - conf[..., 0]).masked_fill_(target != BACKGROUND, -torch.inf)
    n_priors = margin.shape[1]
    counts = n_negatives.clamp(max=n_priors).tolist()
    hardest = [row.topk(k, sorted=False).indices for row, k in zip(margin, counts, strict=True)]
    index = torch.cat([own + i * n_priors for i, own in enumerate(hardest)])
    return index[target.flatten()[index] == BACKGROUND]


class SegmentationLoss(nn.Module):
    """Cross-entropy between mask logits and box-shaped masks, summed up over `n_maps` infused maps.

    Args:
        cells: "mean" over a batch's cells, or "sum" over a frame's cells (mean over frames).
        maps: "mean" or "sum" over the feature maps, or "uncertainty": a sum in which each map's
            loss L counts exp(-s) L + s / 2 with a learned s, the logarithm of its variance (Kendall
            et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018).
        balance: weights of the cells, of a mean of 1 over a batch. "none": all alike. "share": a
            map's person cells together have `person_share` of the weight. "height": a person's cells
            count 1 + height / 50 to a background cell's 1, with the height in pixels of a 512 pixels
            high frame (SDS-RCNN: Brazil et al., ICCV 2017).
    """

    def __init__(
        self, n_maps: int, *, cells: str, maps: str, balance: str = "none", person_share: float = 0.2
    ) -> None:
        super().__init__()
        self.cells, self.maps, self.balance, self.person_share = cells, maps, balance, person_share
        if maps == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(n_maps))

    def weights(self) -> list[float]:
        """What each map's loss is multiplied by, as learned so far; [] where that is fixed."""
        return self.bounded().exp().tolist() if self.maps == "uncertainty" else []

    def bounded(self) -> Tensor:
        """-s of each map, bounded: a loss of zero would raise its weight without end."""
        return -self.log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)

    def forward(
        self, seg: Sequence[Tensor], masks: Sequence[Tensor], heights: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """The loss, a float32 scalar, and each map's own, (maps,).

        Args, each per infused map: seg: (N, 2, h, w) logits of background and person; masks: (N, h, w) int64,
        1 person, 0 background, -1 left out; heights: as from `cell_heights`, where `balance` asks for them.
        """
        losses = []
        for i, (logits, mask) in enumerate(zip(seg, masks, strict=True)):
            entropy = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")
            if self.balance == "share":
                entropy = entropy * self.normalise(self.share_weights(mask), mask)
            elif self.balance == "height":
                entropy = entropy * self.normalise(1 + heights[i] / HEIGHT_UNIT, mask)
            n_cells = len(mask)
            if self.cells == "mean":
                n_cells = all_reduce_sum((mask != IGNORE).sum()).clamp(min=1) / world_size()
            losses.append(entropy.sum() / n_cells)
        losses = torch.stack(losses)
        if self.maps == "uncertainty":
            precision = self.bounded()
            return (precision.exp() * losses - precision / 2).sum(), losses
        return (losses.sum() if self.maps == "sum" else losses.mean()), losses

    def share_weights(self, mask: Tensor) -> Tensor:
        """Weights (N, h, w) that give a map's person cells `person_share` of the total."""
        n_persons, n_background = (all_reduce_sum((mask == kind).sum()) for kind in (PERSON, BACKGROUND))
        odds = self.person_share / (1 - self.person_share)
        return torch.where(mask == PERSON, odds * n_background.clamp(min=1) / n_persons, 1.0)

    def normalise(self, weights: Tensor, mask: Tensor) -> Tensor:
        """Weights (N, h, w) of a mean of 1 over the cells of a batch that are not left out."""
        weights = weights * (mask != IGNORE)
        total = all_reduce_sum(torch.stack([weights.sum(), (mask != IGNORE).sum()]))
        return weights * total[1] / total[0].clamp(min=1e-6)


def cell_heights(boxes: Tensor, labels: Tensor, grid: Grid) -> Tensor:
    """(N, h, w) height of the tallest person over each cell's centre that the map sees, in pixels of a
    KAIST frame, 0 where there is none; of boxes (N, M, 4) xyxy fractions and labels (N, M) int64, padded."""
    rows, columns = (
        (torch.arange(n, device=boxes.device) + 0.5) * step
        for n, step in ((grid.h, grid.dy), (grid.w, grid.dx))
    )
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)
    over = ((rows >= y0) & (rows < y1)).unsqueeze(3) & ((columns >= x0) & (columns < x1)).unsqueeze(2)
    seen = (labels > 0) & (labels & grid.modality > 0)
    heights = ((y1 - y0).squeeze(-1) * FRAME_HEIGHT * seen)[..., None, None]
    return (over * heights).amax(1) if boxes.shape[1] else boxes.new_zeros(len(boxes), grid.h, grid.w)


class Criterion(nn.Module):
    """The total that is minimised: loc + conf + `seg_weight` x seg.

    Called with predictions and a batch's boxes, labels and masks; returns the float32 `terms`.

    Args:
        priors, loc_loss, loc_reduction, conf_divisor: as in `MultiBoxLoss`.
        grids: the cells of all feature maps; infused_maps: which of them have a segmentation head.
        n_logits: of a prior: 2 (`MultiBoxLoss`) or 3 (`MultiLabelLoss`).
        seg: what `SegmentationLoss` takes, each name after "seg_".

    Attributes: terms, names of the losses: the total, loc, conf, seg, and seg of each infused map from 1.
    """

    def __init__(
        self,
        priors: Tensor,
        grids: Sequence[Grid],
        infused_maps: Sequence[int],
        n_logits: int,
        *,
        loc_loss: str,
        loc_reduction: str,
        conf_divisor: str = "positives",
        seg_weight: float,
        **seg: str | float,
    ) -> None:
        super().__init__()
        self.multilabel = n_logits == 3
        how = {"loc_loss": loc_loss, "loc_reduction": loc_reduction, "conf_divisor": conf_divisor}
        self.multibox = MultiLabelLoss(priors) if self.multilabel else MultiBoxLoss(priors, **how)
        how = {name.removeprefix("seg_"): value for name, value in seg.items()}
        self.segmentation = SegmentationLoss(len(infused_maps), **how)
        self.seg_weight = seg_weight
        self.weighted_grids = [grids[i] for i in infused_maps] if how.get("balance") == "height" else []
        self.terms = ("loss", "loc", "conf", "seg", *(f"seg_map{i + 1}" for i in infused_maps))

    def learned_weights(self) -> dict[str, float]:
        """ "weight_map1", … of the maps' mask losses where SEG_MAPS learns them, else nothing."""
        names = (term.replace("seg", "weight") for term in self.terms[4:])
        return dict(zip(names, self.segmentation.weights(), strict=False))

    def forward(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor, masks: Sequence[Tensor]
    ) -> Tensor:
        where_seen = labels if self.multilabel else labels.clamp(max=PERSON)
        loc, conf = self.multibox(predictions, boxes, where_seen)
        heights = [cell_heights(boxes, labels, grid) for grid in self.weighted_grids]
        seg, of_maps = loc.new_zeros(()), ()  # made on the device: a copy to it would be waited for
        if predictions.seg:
            seg, of_maps = self.segmentation(predictions.seg, masks, heights)
        return torch.stack([loc + conf + self.seg_weight * seg, loc, conf, seg, *of_maps])
