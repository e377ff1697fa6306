"""Box-shaped masks: what the segmentation infusion heads learn to predict.

As a script, `python pseudo_gt.py` draws augmented training samples with their boxes and every
feature map's mask into one picture, so that masks which do not follow the boxes are seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from kaist.files import InputError, run_script, write_atomically

if TYPE_CHECKING:
    from batches import Batch

DATA_ROOT = "data/demo"  # KAIST root; the demo set is drawn here if it is absent
IMAGE_LIST = "imageSets/train-all.txt"  # frames to draw: below DATA_ROOT, or any path
ANNOTATIONS = "auto"  # auto, bbgt, xml, xml-sanitized, paired or json
INPUT_MODE = "early"  # what to show: lwir, visible or early (both)
ZOOM_OUT = 4.0  # largest zoomed-out canvas, in frames a side
MASKS_FOLLOW = True  # False draws the logged mistake: masks of the unaugmented frame
SAMPLES = 5  # rows of the picture, each with a random frame and a random augmentation
SEED = 0  # of both
OUT = "pseudo_gt.png"  # where the picture goes


def box_masks(
    boxes: Tensor,
    labels: Tensor,
    map_sizes: list[tuple[int, int]],
    map_range: MapRange | None = None,
) -> list[Tensor]:
    """Masks (N, h, w) int64 of each feature map: 1 person, 0 background, -1 ignored.

    A cell belongs to a box when the cell's centre lies inside it (left and top edge included,
    right and bottom edge not). A box that holds no cell's centre marks the one cell under its
    own centre, so that no box is lost on a coarse map. Where a person and an ignored object
    cover the same cell, the person wins.

    Args:
        boxes: (N, M, 4) xyxy fractions of the network's input, padded.
        labels: (N, M) int64: 1 person, -1 ignore, 0 padding.
        map_sizes: (h, w) of each map.
        map_range: leaves the persons that a map cannot detect out of its mask.
    """
    of_maps = map_range.labels(boxes, labels) if map_range else [labels] * len(map_sizes)
    return [one_map(boxes, own, h, w) for own, (h, w) in zip(of_maps, map_sizes, strict=True)]


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
        corners = box_convert(torch.cat(self.priors), "cxcywh", "xyxy")
        overlap = box_iou(boxes.flatten(0, 1), corners).view(*labels.shape, -1)
        best = [x.amax(-1) for x in overlap.split([len(p) for p in self.priors], dim=-1)]
        best_of_all = torch.stack(best).amax(0)
        out = [(best[i] < 0.5) & (best[i] < best_of_all) & (labels == 1) for i in self.maps]
        return [labels.masked_fill(outside, self.outside) for outside in out]


def one_map(boxes: Tensor, labels: Tensor, h: int, w: int) -> Tensor:
    """`box_masks` for a single (h, w) map."""
    columns = cells_inside(boxes[..., 0], boxes[..., 2], w)
    rows = cells_inside(boxes[..., 1], boxes[..., 3], h)
    centre_column = cell_under((boxes[..., 0] + boxes[..., 2]) / 2, w)
    centre_row = cell_under((boxes[..., 1] + boxes[..., 3]) / 2, h)
    holds_none = ~(columns.any(-1) & rows.any(-1)).unsqueeze(-1)
    columns = torch.where(holds_none, centre_column, columns)
    rows = torch.where(holds_none, centre_row, rows)
    covered = rows.unsqueeze(-1) & columns.unsqueeze(-2)  # (N, M, h, w)
    person = (covered & (labels == 1)[..., None, None]).any(1)
    ignored = (covered & (labels == -1)[..., None, None]).any(1)
    return torch.where(person, 1, torch.where(ignored, -1, 0))


def cells_inside(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """(..., cells) bool: which of `cells` equal cells of [0, 1] have their centre in the span."""
    centres = (torch.arange(cells, device=start.device) + 0.5) / cells
    return (centres >= start.unsqueeze(-1)) & (centres < end.unsqueeze(-1))


def cell_under(point: Tensor, cells: int) -> Tensor:
    """(..., cells) bool: the one cell that a point of [0, 1] lies in."""
    index = (point * cells).long().clamp(0, cells - 1)
    return torch.arange(cells, device=point.device) == index.unsqueeze(-1)


# ------------------------------------------------------------------------- the script


def main() -> None:
    """Draw random samples of an image list."""
    # Here, because datasets.py itself needs the masks above.
    from batches import Collate
    from config import check_config, parse_flags, read_constants
    from datasets import Augmentation, KaistPairs, load_frames
    from kaist.annotations import find_annotations, find_file, read_image_list
    from kaist.demo import open_root
    from kaist.images import check_images
    from model import feature_map_sizes

    constants = read_constants(__file__)
    config = {name: value for name, (value, _) in constants.items()}
    config |= parse_flags(__doc__.splitlines()[0], constants, None)
    check_config(config)
    root = open_root(config["data_root"])
    frame_ids = read_image_list(find_file(root, config["image_list"]))
    order = torch.randperm(len(frame_ids), generator=torch.manual_seed(config["seed"]))
    annotations = find_annotations(root, config["annotations"], "lwir")
    frames = load_frames([frame_ids[i] for i in order], annotations, min_height=12, margin=5)
    frames = [frame for frame in frames if (frame.labels == 1).any()][: config["samples"]]
    if not frames:
        raise InputError("no frame has a person to draw", "choose another IMAGE_LIST", file=root)
    check_images(root, [frame.id for frame in frames], config["input_mode"])
    dataset = KaistPairs(
        root, frames, input_mode=config["input_mode"], size=(300, 300),
        augmentation=Augmentation(config["zoom_out"]), masks_follow=config["masks_follow"],
        seed=config["seed"],
    )  # fmt: skip
    collate = Collate(feature_map_sizes((300, 300)))
    batch, bad = collate([dataset[0, i] for i in range(len(frames))])
    if bad:
        raise bad[0].error
    write_atomically(Path(config["out"]), lambda path: draw_masks(batch, path))
    print(f"{config['out']}: {len(frames)} augmented samples, green persons, red ignored objects")


def draw_masks(batch: Batch, path: Path) -> None:
    """Draw a batch: its visible and LWIR images with boxes, then every mask."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    channels = batch.images.shape[1]
    panels = {1: [[0]], 3: [[0, 1, 2]], 4: [[0, 1, 2], [3]]}[channels]
    columns = len(panels) + len(batch.masks)
    figure = Figure(figsize=(1.7 * columns, 1.75 * len(batch.images)), layout="constrained")
    axes = figure.subplots(len(batch.images), columns, squeeze=False)
    for row, image, boxes, labels, frame_id, *masks in zip(
        axes, batch.images, batch.boxes, batch.labels, batch.frame_ids, *batch.masks, strict=True
    ):
        height, width = image.shape[1:]
        row[0].set_title(frame_id, fontsize=7)
        for axis, panel in zip(row, panels, strict=False):
            axis.imshow(image[panel].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                if label:
                    size = (x1 - x0) * width, (y1 - y0) * height
                    colour = "lime" if label == 1 else "red"
                    outline = Rectangle((x0 * width, y0 * height), *size, fill=False, color=colour)
                    axis.add_patch(outline)
        for axis, mask in zip(row[len(panels) :], masks, strict=True):
            axis.imshow(mask.numpy(), cmap="RdYlGn", vmin=-1, vmax=1)
            axis.set_title("{} x {}".format(*mask.shape), fontsize=7)
        for axis in row:
            axis.set_axis_off()
    figure.savefig(path, format="png", dpi=130)


if __name__ == "__main__":
    run_script(main)
