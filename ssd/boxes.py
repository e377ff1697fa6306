"""SSD's priors, box encoding and decoding, and detections from predictions by NMS.

Source: Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kaist.files import InputError
from kaist.frames import BOTH

MIN_ENCODED_SIDE = 1e-5  # fraction of the input; shorter sides are encoded as this: no log of zero
VARIANCES = (0.1, 0.2)  # SSD's scaling of centre and size offsets
MAX_LOG_SCALE = math.log(1000 / 16)  # largest log ratio of the sides of a decoded box and its prior
STRIDES = (8, 16, 32, 64)  # of SSD300's four finest maps, in pixels of the input
TOPK_CANDIDATES = 400  # boxes of an image that go into NMS, by score
# SSD300's extra layers: channels of the 1x1 and of the 3x3 convolution, stride and padding of the latter.
EXTRA_LAYERS = ((256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0), (128, 256, 1, 0))


class Predictions(NamedTuple):
    """A network's output for a batch."""

    loc: Tensor  # (N, P, 4) encoded offsets of each prior
    # (N, P, 2) logits of background and person, or (N, P, 3): background, person in visible, person in LWIR.
    conf: Tensor
    seg: list[Tensor]  # for each infused map (N, 2, h, w) mask logits; empty if not requested


class Grid(NamedTuple):
    """The h x w cells of a feature map.

    The centre of row i, column j is ((j + 0.5) * dx, (i + 0.5) * dy), as fractions of the input.
    """

    h: int
    w: int
    dy: float
    dx: float
    modality: int = BOTH  # what the map is computed from: `VISIBLE`, `LWIR` or `BOTH`


def feature_map_sizes(size: tuple[int, int], network: str = "ssd300") -> list[tuple[int, int]]:
    """(height, width) of the six maps of "ssd300" or "mlpd", for an input of (height, width) pixels.

    Raises:
        InputError: the input is too small for six maps, or implausibly large.
    """
    if max(size) > 10_000:
        raise InputError("INPUT_SIZE is above 10,000 pixels", "use a smaller one, such as 512,640")
    strides = (8, 16) if network == "ssd300" else (8, 16, 32, 64, 64, 64)
    sides = [[math.ceil(side / stride) for stride in strides] for side in size]
    for _, _, stride, padding in EXTRA_LAYERS if network == "ssd300" else ():
        for cells in sides:
            cells.append((cells[-1] + 2 * padding - 3) // stride + 1)
    sizes = list(zip(*sides, strict=True))
    if min(sizes[-1]) < 1:
        problem = f"INPUT_SIZE = {tuple(size)} is too small for six feature maps"
        raise InputError(problem, "use at least 257 pixels a side")
    return sizes


def prior_shapes(prior_set: str) -> list[list[tuple[float, float]]]:
    """(width, height) of each map's priors, as fractions of the input.

    "ssd300": the paper's scales for VOC (0.1, then 0.2 to 0.9); "ssd300-coco": torchvision's for COCO
    (0.07, then 0.15 to 0.87). The order is torchvision's: a square of the map's scale, a square of the
    geometric mean with the next scale, then ratio r and 1/r for each r.

    "pedestrian": upright boxes of the median person's shape (width/height 0.44 in a 640x512 frame, 0.35 in
    fractions). Each of eight heights from 0.062 to 1 is used on the maps whose cells suit its width. Found by
    `python -m tools.priors --derive 8` on KAIST's train-all-02 list.

    "multispectral": MLPD's and INSANet's, with ratios 1/2 and 1 in a 640x512 frame, in three sizes each.
    """
    if prior_set == "pedestrian":
        heights, maps = (0.062, 0.093, 0.138, 0.205, 0.305, 0.453, 0.673, 1.0), (0, 1, 3, 4, 6, 7)
        return [[(0.35 * h, h) for h in heights[first : first + 4]] for first in maps]
    if prior_set == "multispectral":
        return [
            [
                (side * scale * math.sqrt(ratio) / 640, side * scale / math.sqrt(ratio) / 512)
                for ratio in (1 / 2, 1)
                for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3))
            ]
            for side in (40, 80, 160, 200, 280, 360)
        ]
    scales = {
        "ssd300": (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.075),
        "ssd300-coco": (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
    }[prior_set]
    shapes = []
    for i, ratios in enumerate(((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))):
        s, between = scales[i], math.sqrt(scales[i] * scales[i + 1])
        map_shapes = [(s, s), (between, between)]
        for root in map(math.sqrt, ratios):
            map_shapes += [(s * root, s / root), (s / root, s * root)]
        shapes.append([(min(w, 1.0), min(h, 1.0)) for w, h in map_shapes])
    return shapes


def make_grids(size: tuple[int, int], centres: str, network: str = "ssd300") -> list[Grid]:
    """The cells of the six feature maps of `feature_map_sizes`.

    centres: "even" divides the input evenly into cells, as in the logged experiments. "stride" places
        SSD300's cells by the strides of the four finest maps, as torchvision does: 38 cells of 8 pixels
        reach beyond an input of 300. The two coarsest maps, which are not padded, stay even.
    """
    grids = [Grid(h, w, 1 / h, 1 / w) for h, w in feature_map_sizes(size, network)]
    if centres == "stride" and network == "ssd300":
        for i, stride in enumerate(STRIDES):
            grids[i] = grids[i]._replace(dy=stride / size[0], dx=stride / size[1])
    return grids


def make_priors(grids: list[Grid], shapes: list[list[tuple[float, float]]]) -> Tensor:
    """(P, 4) float32 cxcywh priors, fractions of the input; 2,740 of SSD300's 8,732 cross its border."""
    priors = []
    cpu = torch.device("cpu")  # explicit, because arithmetic on "meta" would import torch._dynamo
    for (h, w, dy, dx, _), map_shapes in zip(grids, shapes, strict=True):
        indices = torch.arange(h, device=cpu), torch.arange(w, device=cpu)
        rows, columns = torch.meshgrid(*indices, indexing="ij")
        centres = torch.stack([(columns + 0.5) * dx, (rows + 0.5) * dy], dim=-1)
        wh = torch.tensor(map_shapes, device=cpu).expand(h, w, -1, 2)
        centres = centres.unsqueeze(2).expand_as(wh)
        priors.append(torch.cat([centres, wh], dim=-1).reshape(-1, 4))
    return torch.cat(priors)


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """Encode boxes (…, 4) cxcywh as offsets (…, 4) from priors (…, 4) cxcywh (SSD, eq. 2), always finite."""
    centre = (boxes[..., :2] - priors[..., :2]) / (priors[..., 2:] * VARIANCES[0])
    size = torch.log(boxes[..., 2:].clamp(min=MIN_ENCODED_SIDE) / priors[..., 2:]) / VARIANCES[1]
    return torch.cat([centre, size], dim=-1)


def decode(loc: Tensor, priors: Tensor) -> Tensor:
    """Invert `encode`. Sizes are clamped, so that no offset overflows to infinity."""
    centre = priors[..., :2] + loc[..., :2] * VARIANCES[0] * priors[..., 2:]
    size = priors[..., 2:] * torch.exp((loc[..., 2:] * VARIANCES[1]).clamp(max=MAX_LOG_SCALE))
    return torch.cat([centre, size], dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes (…, 4) from cxcywh to xyxy."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes (…, 4) from xyxy to cxcywh."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


@functools.cache
def load_nms() -> Callable[[Tensor, Tensor, float], Tensor]:
    """torchvision's NMS: (boxes (k, 4) xyxy, scores (k,), IoU) -> indices to keep, by descending score.

    Only its compiled library is loaded, because `import torchvision` takes two seconds.
    """
    try:
        for library in Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*"):
            torch.ops.load_library(library)
        return torch.ops.torchvision.nms
    except (AttributeError, OSError):  # another layout of the package
        from torchvision.ops import nms

        return nms


def person_scores(conf: Tensor) -> Tensor:
    """Scores (…,) from logits (…, 2 or 3): the probability of a person, or its mean over both modalities."""
    if conf.shape[-1] == 2:
        return torch.sigmoid(conf[..., 1] - conf[..., 0])
    return conf.sigmoid()[..., 1:].mean(dim=-1)


@torch.no_grad()
def detect(
    predictions: Predictions, priors: Tensor, *, min_score: float, nms_iou: float, max_boxes: int
) -> list[tuple[Tensor, Tensor]]:
    """Decode the boxes of each image and remove duplicates by NMS.

    With two logits the `TOPK_CANDIDATES` boxes of highest score go into NMS, clipped to the frame, as in SSD.
    With three logits all boxes do, and they are not clipped, as in MLPD and INSANet.

    Args:
        priors: (P, 4) cxcywh fractions.
        min_score: only boxes of a higher score are kept; max_boxes: maximum number of boxes per image.
        nms_iou: a box is removed if its IoU with a box of higher score is above this.

    Returns:
        For each image boxes (k, 4) xyxy fractions of the frame, and scores (k,) in descending order.
    """
    scores = person_scores(predictions.conf)
    is_ssd = predictions.conf.shape[-1] == 2
    counts = (scores > min_score).sum(1).tolist()
    scores, prior = scores.topk(min(max(counts), TOPK_CANDIDATES) if is_ssd else max(counts), dim=1)
    loc = predictions.loc.gather(1, prior.unsqueeze(2).expand(-1, -1, 4))
    boxes = cxcywh_to_xyxy(decode(loc, priors[prior]))
    boxes = boxes.clamp(0, 1) if is_ssd else boxes
    results = []
    for image_boxes, image_scores, n in zip(boxes, scores, counts, strict=True):
        kept = load_nms()(image_boxes[:n], image_scores[:n], nms_iou)[:max_boxes]
        results.append((image_boxes[kept], image_scores[kept]))
    return results
