"""The losses: SSD's multibox loss, its multi-label variant, and the segmentation infusion loss.

In all functions `boxes` are (N, M, 4) xyxy fractions and `labels` (N, M) int64: 1, 2 or 3 is a person (seen
in visible only, in LWIR only, in both), -1 an ignored object (crowd, cyclist, too small, cut by the border),
0 is padding. For networks with two logits, 1 is the only label of persons.
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

# Config keys that `Criterion` takes as keyword arguments.
CRITERION_KEYS = (
    *("loc_loss", "loc_reduction", "conf_divisor"),
    *("seg_cells", "seg_maps", "seg_balance", "seg_person_share", "seg_weight"),
)
LossSums = tuple[Tensor, Tensor, Tensor, Tensor]  # loc, conf, number of positives, of mined negatives
NEG_TO_POS_RATIO = 3  # mined negatives per positive
LOG_VARIANCE_LIMIT = 5.0  # learned weights stay between exp(-5) and exp(5)
HEIGHT_UNIT = 50.0  # pixels of height that add 1 to the weight of a person's cells (SDS-RCNN)


class MultiBoxLoss(nn.Module):
    """SSD's loss (section 2.2 of the paper): localisation and confidence.

    Confidence is the cross-entropy of all positive priors and of the hardest negatives of each frame: three
    per positive, and at least three, so that frames without persons contribute. Localisation is divided by
    the batch's number of positives (at least 1). With several processes, the divisors are means over the
    processes, so that the mean of their losses is the loss of the whole batch.

    Args:
        priors: (P, 4) cxcywh fractions.
        loc_loss: "l1" or "smooth_l1".
        loc_reduction: "sum" over the four offsets, as in the paper, or "mean", as in the logged experiments.
        conf_divisor: "positives": their number, as in the paper. "balanced": the number of positives or a
            third of the negatives, whichever is larger, for small batches with few persons.
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
        """Compute the (loc, conf) losses of a batch, two float32 scalars."""
        compute = self.sparse if predictions.loc.device.type == "cpu" else self.static
        loc, conf, positives, negatives = compute(predictions, boxes, labels)
        positives = all_reduce_sum(positives).clamp(min=1) / world_size()
        divisor = positives
        if self.balanced:
            negatives = all_reduce_sum(negatives) / world_size()
            divisor = torch.maximum(positives, negatives / NEG_TO_POS_RATIO)
        return loc / (self.loc_divisor * positives), conf / divisor

    @cached_property
    def prior_table(self) -> PriorTable:
        """The priors, prepared for `match`."""
        return PriorTable(self.priors)

    def sparse(self, predictions: Predictions, boxes: Tensor, labels: Tensor) -> LossSums:
        """`static` for the CPU: computes only priors that have a loss, 4 to 100 times as fast."""
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

    def static(self, predictions: Predictions, boxes: Tensor, labels: Tensor) -> LossSums:
        """Sum the losses of a batch. No shape depends on a value, so that a GPU never waits for the host."""
        target, matched_idxs = self.match(boxes, labels)
        positive = target > BACKGROUND
        matched = boxes.gather(1, matched_idxs.unsqueeze(2).expand(-1, -1, 4))
        offsets = encode(xyxy_to_cxcywh(matched), self.priors)
        # Other priors are compared with their own prediction: no loss, no gradient.
        offsets = torch.where(positive.unsqueeze(2), offsets, predictions.loc.detach())
        loc = self.distance(predictions.loc, offsets, reduction="sum")

        positive_losses, negative_losses = self.conf_losses(predictions.conf, target)
        # Losses are not negative, so that zeros come after all negatives.
        hardest = negative_losses.masked_fill(target != BACKGROUND, 0).sort(dim=1, descending=True).values
        n_negatives = torch.minimum(self.n_negatives(positive.sum(1)), (target == BACKGROUND).sum(1))
        mined = torch.arange(len(self.priors), device=target.device) < n_negatives.unsqueeze(1)
        conf = positive_losses.masked_fill(~positive, 0).sum() + hardest.masked_fill(~mined, 0).sum()
        return loc, conf, positive.sum(), n_negatives.sum()

    def match(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The targets (N, P) and matched_idxs (N, P) of the priors."""
        return match_static(boxes, labels, self.priors)

    def conf_losses(self, conf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each prior if it is a positive (N, P), and if it is a negative (N, P)."""
        margin = conf[..., 1] - conf[..., 0]
        return F.softplus(-margin), F.softplus(margin)

    def n_negatives(self, n_positives: Tensor) -> Tensor:
        """The number of negatives to mine for each frame's number of positives."""
        return (NEG_TO_POS_RATIO * n_positives).clamp(min=self.min_negatives)


class MultiLabelLoss(MultiBoxLoss):
    """The loss of MLPD and INSANet (Kim et al., "MLPD", RA-L 2021).

    The confidence loss of a prior is the sum of three binary cross-entropies: background, person in visible,
    person in LWIR. No negatives are mined in frames without positives. Priors matched to an ignored object
    have no loss. All devices use `static`.
    """

    min_negatives, sparse = 0, MultiBoxLoss.static

    def __init__(self, priors: Tensor) -> None:
        super().__init__(priors, loc_loss="l1", loc_reduction="mean")

    def match(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return match_multilabel(boxes, labels, self.priors)

    def conf_losses(self, conf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.stack([target == BACKGROUND, (target & VISIBLE) > 0, (target & LWIR) > 0], dim=2)
        losses = F.binary_cross_entropy_with_logits(conf, classes.to(conf.dtype), reduction="none").sum(2)
        return losses, losses


def hardest_negatives(conf: Tensor, target: Tensor, n_negatives: Tensor) -> Tensor:
    """Hard negative mining: the background priors of highest loss, at most `n_negatives` (N,) of each frame.

    conf: (N, P, 2) logits, detached; target: (N, P) as from `match`. Returns (K,) indices into (N * P,).
    """
    margin = (conf[..., 1] - conf[..., 0]).masked_fill_(target != BACKGROUND, -torch.inf)
    n_priors = margin.shape[1]
    counts = n_negatives.clamp(max=n_priors).tolist()
    hardest = [row.topk(k, sorted=False).indices for row, k in zip(margin, counts, strict=True)]
    index = torch.cat([priors + i * n_priors for i, priors in enumerate(hardest)])
    return index[target.flatten()[index] == BACKGROUND]


class SegmentationLoss(nn.Module):
    """Cross-entropy between mask logits and box-shaped masks of `n_maps` infused maps.

    Args:
        cells: "mean" over the cells of a batch, or "sum" over the cells of a frame and mean over frames.
        maps: "mean" or "sum" over maps. "uncertainty": the sum of exp(-s) L + s / 2 over maps, with a loss L
            and a learned log variance s each (Kendall et al., "Multi-Task Learning Using Uncertainty to
            Weigh Losses", CVPR 2018).
        balance: weights of the cells, with mean 1 over a batch. "none": equal. "share": a map's person
            cells have `person_share` of the total weight. "height": background cells have weight 1,
            person cells 1 + height / 50, the height in pixels of a frame 512 pixels high (SDS-RCNN).
    """

    def __init__(
        self, n_maps: int, *, cells: str, maps: str, balance: str = "none", person_share: float = 0.2
    ) -> None:
        super().__init__()
        self.cells, self.maps, self.balance, self.person_share = cells, maps, balance, person_share
        if maps == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(n_maps))

    def log_precision(self) -> Tensor:
        """(maps,) -s, clamped, because a loss of zero would increase its weight without limit."""
        return -self.log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)

    def forward(
        self, seg: Sequence[Tensor], masks: Sequence[Tensor], heights: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss, a float32 scalar, and the loss of each map, (maps,).

        Args:
            seg: for each map (N, 2, h, w) logits of background and person.
            masks: for each map (N, h, w) int64: 1 person, 0 background, -1 ignored.
            heights: for each map `cell_heights`, if `balance` is "height".
        """
        losses = []
        for i, (logits, mask) in enumerate(zip(seg, masks, strict=True)):
            entropy = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")
            if self.balance == "share":
                entropy = entropy * self.normalise_weights(self.share_weights(mask), mask)
            elif self.balance == "height":
                entropy = entropy * self.normalise_weights(1 + heights[i] / HEIGHT_UNIT, mask)
            n_cells = len(mask)
            if self.cells == "mean":
                n_cells = all_reduce_sum((mask != IGNORE).sum()).clamp(min=1) / world_size()
            losses.append(entropy.sum() / n_cells)
        losses = torch.stack(losses)
        if self.maps == "uncertainty":
            log_precision = self.log_precision()
            return (log_precision.exp() * losses - log_precision / 2).sum(), losses
        return (losses.sum() if self.maps == "sum" else losses.mean()), losses

    def share_weights(self, mask: Tensor) -> Tensor:
        """Weights (N, h, w) that give person cells `person_share` of the total."""
        n_persons, n_background = (all_reduce_sum((mask == label).sum()) for label in (PERSON, BACKGROUND))
        odds = self.person_share / (1 - self.person_share)
        return torch.where(mask == PERSON, odds * n_background.clamp(min=1) / n_persons, 1.0)

    def normalise_weights(self, weights: Tensor, mask: Tensor) -> Tensor:
        """Scale weights (N, h, w) to mean 1 over the cells of a batch that are not ignored."""
        weights = weights * (mask != IGNORE)
        total = all_reduce_sum(torch.stack([weights.sum(), (mask != IGNORE).sum()]))
        return weights * total[1] / total[0].clamp(min=1e-6)


def cell_heights(boxes: Tensor, labels: Tensor, grid: Grid) -> Tensor:
    """Height of the tallest person over the centre of each cell, (N, h, w) float32 pixels of a KAIST frame.

    The height is 0 where there is no person. Persons that are not seen in the map's modality do not count.
    """
    rows = (torch.arange(grid.h, device=boxes.device) + 0.5) * grid.dy
    columns = (torch.arange(grid.w, device=boxes.device) + 0.5) * grid.dx
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)
    is_over = ((rows >= y0) & (rows < y1)).unsqueeze(3) & ((columns >= x0) & (columns < x1)).unsqueeze(2)
    is_seen = (labels > 0) & (labels & grid.modality > 0)
    heights = ((y1 - y0).squeeze(-1) * FRAME_HEIGHT * is_seen)[..., None, None]
    return (is_over * heights).amax(1) if boxes.shape[1] else boxes.new_zeros(len(boxes), grid.h, grid.w)


class Criterion(nn.Module):
    """The training loss: loc + conf + `seg_weight` x seg.

    Args:
        priors, loc_loss, loc_reduction, conf_divisor: see `MultiBoxLoss`.
        grids: the cells of all feature maps; infused_maps: indices of those with a segmentation head.
        n_logits: per prior: 2 (`MultiBoxLoss`) or 3 (`MultiLabelLoss`).
        seg_kwargs: arguments of `SegmentationLoss`, their names prefixed by "seg_".

    Attributes:
        terms: names of what `forward` returns: loss, loc, conf, seg, and seg_map1, … of each infused map.
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
        **seg_kwargs: str | float,
    ) -> None:
        super().__init__()
        self.multilabel = n_logits == 3
        kwargs = {"loc_loss": loc_loss, "loc_reduction": loc_reduction, "conf_divisor": conf_divisor}
        self.multibox = MultiLabelLoss(priors) if self.multilabel else MultiBoxLoss(priors, **kwargs)
        kwargs = {name.removeprefix("seg_"): value for name, value in seg_kwargs.items()}
        self.segmentation = SegmentationLoss(len(infused_maps), **kwargs)
        self.seg_weight = seg_weight
        self.height_grids = [grids[i] for i in infused_maps if self.segmentation.balance == "height"]
        self.terms = ("loss", "loc", "conf", "seg", *(f"seg_map{i + 1}" for i in infused_maps))

    def learned_weights(self) -> dict[str, float]:
        """The learned weights of the maps as weight_map1, …; {} unless SEG_MAPS is "uncertainty"."""
        if self.segmentation.maps != "uncertainty":
            return {}
        names = (term.replace("seg", "weight") for term in self.terms[4:])
        return dict(zip(names, self.segmentation.log_precision().exp().tolist(), strict=True))

    def forward(
        self, predictions: Predictions, boxes: Tensor, labels: Tensor, masks: Sequence[Tensor]
    ) -> Tensor:
        """Compute the losses named in `terms`, (terms,) float32; masks as in `SegmentationLoss.forward`."""
        multibox_labels = labels if self.multilabel else labels.clamp(max=PERSON)
        loc, conf = self.multibox(predictions, boxes, multibox_labels)
        heights = [cell_heights(boxes, labels, grid) for grid in self.height_grids]
        seg, map_losses = loc.new_zeros(()), ()  # created on the device, to which a copy would block
        if predictions.seg:
            seg, map_losses = self.segmentation(predictions.seg, masks, heights)
        return torch.stack([loc + conf + self.seg_weight * seg, loc, conf, seg, *map_losses])
