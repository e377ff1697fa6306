"""Box-shaped masks, the training targets of the segmentation infusion heads."""

from __future__ import annotations

if __name__ == "__main__":
    raise SystemExit("to see masks, run: python -m tools.show_masks")

from dataclasses import dataclass

import torch
from torch import Tensor


def box_masks(
    boxes: Tensor, labels: Tensor, map_sizes: list[tuple], map_range: MapRange | None = None
) -> list[Tensor]:
    """Masks (N, h, w) int64 for each feature map: 1 person, 0 background, -1 ignored.

    A cell belongs to a box if the cell's centre is inside the box (left and top edge included,
    right and bottom edge excluded). A box without any cell's centre marks the cell at its own
    centre, so that no box is lost on a coarse map. A person takes precedence over an ignored
    object in the same cell.

    Args:
        boxes: (N, M, 4) xyxy fractions of the network's input, padded.
        labels: (N, M) int64: person 1, 2 or 3 (visible, LWIR, both), -1 ignore, 0 padding.
        map_sizes: (h, w) of each map; or an `ssd.boxes.Grid` (h, w, dy, dx, modality) if the cells do not
            divide the input evenly, or if the map is of one modality (persons of the other are background).
        map_range: relabels persons that a map cannot detect; None keeps their labels.
    """
    map_labels = map_range.labels(boxes, labels) if map_range else [labels] * len(map_sizes)
    return [map_mask(boxes, *args) for args in zip(map_labels, map_sizes, strict=True)]


@dataclass(frozen=True)
class MapRange:
    """Relabels persons that a feature map cannot detect.

    Each map of an SSD detects boxes of certain sizes. A person is in a map's range if one of the
    map's priors has an IoU >= 0.5 with it, or if the prior with the highest IoU is on this map.

    Args:
        priors: (P_i, 4) cxcywh fractions, for each of the network's maps.
        maps: indices of the infused maps.
        outside: label for persons out of range: 0 background, -1 ignored.
    """

    priors: list[Tensor]
    maps: list[int]
    outside: int

    def labels(self, boxes: Tensor, labels: Tensor) -> list[Tensor]:
        """(N, M) labels for each infused map; boxes and labels as in `box_masks`."""
        from torchvision.ops import box_convert, box_iou  # here, because it takes two seconds

        corners = box_convert(torch.cat(self.priors), "cxcywh", "xyxy")
        iou = box_iou(boxes.flatten(0, 1), corners).view(*labels.shape, -1)
        map_best = [x.amax(-1) for x in iou.split([len(p) for p in self.priors], dim=-1)]
        best = torch.stack(map_best).amax(0)
        out = [(map_best[i] < 0.5) & (map_best[i] < best) & (labels > 0) for i in self.maps]
        return [labels.masked_fill(is_out, self.outside) for is_out in out]


def map_mask(boxes: Tensor, labels: Tensor, map_size: tuple) -> Tensor:
    """The mask (N, h, w) of one map, see `box_masks`."""
    h, w, dy, dx, seen = map_size if len(map_size) == 5 else (*map_size, 1 / map_size[0], 1 / map_size[1], 3)
    columns, centre_column = cells_in_span(boxes[..., 0], boxes[..., 2], w, dx)
    rows, centre_row = cells_in_span(boxes[..., 1], boxes[..., 3], h, dy)
    is_small = ~(columns.any(-1) & rows.any(-1)).unsqueeze(-1)
    columns, rows = torch.where(is_small, centre_column, columns), torch.where(is_small, centre_row, rows)
    covered = rows.unsqueeze(-1) & columns.unsqueeze(-2)  # (N, M, h, w)
    person = (covered & ((labels > 0) & (labels & seen > 0))[..., None, None]).any(1)
    ignored = (covered & (labels == -1)[..., None, None]).any(1)
    return torch.where(person, 1, torch.where(ignored, -1, 0))


def cells_in_span(start: Tensor, end: Tensor, n: int, step: float) -> tuple[Tensor, Tensor]:
    """Which of n cells of width `step` have their centre in a span, and which one contains the span's
    middle; two (…, n) bool tensors."""
    index = torch.arange(n, device=start.device)
    centres = (index + 0.5) * step
    inside = (centres >= start.unsqueeze(-1)) & (centres < end.unsqueeze(-1))
    middle = ((start + end) / 2 / step).long().clamp(0, n - 1)
    return inside, index == middle.unsqueeze(-1)
