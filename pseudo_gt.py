"""Box-shaped masks: what the segmentation infusion heads learn to predict."""

from __future__ import annotations

if __name__ == "__main__":
    raise SystemExit("it draws nothing itself any more: python -m tools.show_masks")

from dataclasses import dataclass

import torch
from torch import Tensor


def box_masks(
    boxes: Tensor, labels: Tensor, map_sizes: list[tuple], map_range: MapRange | None = None
) -> list[Tensor]:
    """Masks (N, h, w) int64 of each feature map: 1 person, 0 background, -1 ignored.

    A cell belongs to a box when the cell's centre lies inside it (left and top edge included,
    right and bottom edge not). A box that holds no cell's centre marks the one cell under its
    own centre, so that no box is lost on a coarse map. Where a person and an ignored object
    cover the same cell, the person wins.

    Args:
        boxes: (N, M, 4) xyxy fractions of the network's input, padded.
        labels: (N, M) int64: 1, 2 or 3 person (of a modality, or both: the union), -1 ignore, 0 padding.
        map_sizes: of each map (h, w), or an `ssd.boxes.Grid` (h, w, dy, dx, seen) where its cells do not
            divide the input evenly, or where it sees one modality: others' persons are background.
        map_range: leaves the persons that a map cannot detect out of its mask.
    """
    of_maps = map_range.labels(boxes, labels) if map_range else [labels] * len(map_sizes)
    return [one_map(boxes, own, *size) for own, size in zip(of_maps, map_sizes, strict=True)]


@dataclass(frozen=True)
class MapRange:
    """Whose mask a person belongs into: that of the maps whose priors can detect it.

    A map of an SSD detects only boxes of its own sizes. A person is in a map's range when one of
    the map's priors overlaps it by IoU >= 0.5, or when the best prior of all is the map's.

    Args:
        priors: (P_i, 4) cxcywh fractions of each of the network's maps.
        maps: indices of the maps that masks are wanted for.
        outside: what persons out of range become: 0 background, -1 ignored.
    """

    priors: list[Tensor]
    maps: list[int]
    outside: int

    def labels(self, boxes: Tensor, labels: Tensor) -> list[Tensor]:
        """(N, M) labels for each wanted map, of boxes and labels as `box_masks` takes them."""
        from torchvision.ops import box_convert, box_iou  # here, because it takes two seconds

        corners = box_convert(torch.cat(self.priors), "cxcywh", "xyxy")
        overlap = box_iou(boxes.flatten(0, 1), corners).view(*labels.shape, -1)
        best = [x.amax(-1) for x in overlap.split([len(p) for p in self.priors], dim=-1)]
        best_of_all = torch.stack(best).amax(0)
        out = [(best[i] < 0.5) & (best[i] < best_of_all) & (labels > 0) for i in self.maps]
        return [labels.masked_fill(outside, self.outside) for outside in out]


def one_map(
    boxes: Tensor, labels: Tensor, h: int, w: int, dy: float = 0, dx: float = 0, seen: int = 3
) -> Tensor:
    """`box_masks` for a single (h, w) map; cells without a distance of their own are even."""
    (columns, column), (rows, row) = (
        cells(boxes[..., axis], boxes[..., axis + 2], n, step or 1 / n)
        for axis, n, step in ((0, w, dx), (1, h, dy))
    )
    holds_none = ~(columns.any(-1) & rows.any(-1)).unsqueeze(-1)
    columns, rows = torch.where(holds_none, column, columns), torch.where(holds_none, row, rows)
    covered = rows.unsqueeze(-1) & columns.unsqueeze(-2)  # (N, M, h, w)
    person = (covered & ((labels > 0) & (labels & seen > 0))[..., None, None]).any(1)
    ignored = (covered & (labels == -1)[..., None, None]).any(1)
    return torch.where(person, 1, torch.where(ignored, -1, 0))


def cells(start: Tensor, end: Tensor, n: int, step: float) -> tuple[Tensor, Tensor]:
    """(…, n) bool, twice: which of n cells, `step` wide, have their centre in the span, and the one that
    its middle lies in."""
    index = torch.arange(n, device=start.device)
    centres = (index + 0.5) * step
    inside = (centres >= start.unsqueeze(-1)) & (centres < end.unsqueeze(-1))
    middle = ((start + end) / 2 / step).long().clamp(0, n - 1)
    return inside, index == middle.unsqueeze(-1)
