"""A network as other programs take it: frames of any size in, boxes in their pixels out, all in one graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssd.boxes import TOPK_CANDIDATES, Predictions, cxcywh_to_xyxy, decode, load_nms, person_scores
from ssd.layers import Detector

# The candidates of NMS of a network that looks at all of them: a graph's shapes are fixed.
MULTILABEL_CANDIDATES = 4000
ROUND_HALF_UP = 0.5 + 2**-10  # rounds a half up, however a runtime adds it together
MIN_SIDE = 0.01  # pixels; a box that is clipped to less is left out, as in result files


class Deployable(nn.Module):
    """Frames of any size to boxes in their pixels, of fixed shapes.

    Args:
        min_score, nms_iou, max_boxes: as of `ssd.boxes.detect`.
        raw: give the boxes of all priors and their scores instead.
        predict_mirrored: what the mirror images say of the images, to average with; None without.
    """

    def __init__(
        self,
        model: Detector,
        *,
        min_score: float,
        nms_iou: float,
        max_boxes: int,
        raw: bool = False,
        predict_mirrored: Callable[[Detector, Tensor], Predictions] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.predict_mirrored = model, predict_mirrored
        self.min_score, self.nms_iou, self.max_boxes, self.raw = min_score, nms_iou, max_boxes, raw

    def forward(self, *frames: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (n, max_boxes, 5) x0, y0, x1, y1, score, best first and zeros after the last; and their
        number (n,). Raw: boxes (n, P, 4) and scores (n, P) of all priors.

        Args:
            frames: (n, height, width, C) uint8 of each modality, of any sizes; boxes are pixels of the
                first.
        """
        images = torch.cat([resize(frame, self.model.size) for frame in frames], dim=1)
        loc, conf, _ = self.model(images)
        if self.predict_mirrored:
            mirrored = self.predict_mirrored(self.model, images)
            loc, conf = (loc + mirrored.loc) / 2, (conf + mirrored.conf) / 2
        scores = person_scores(conf)
        is_ssd = conf.shape[-1] == 2
        priors = self.model.priors
        if not self.raw:
            n_candidates = min(TOPK_CANDIDATES if is_ssd else MULTILABEL_CANDIDATES, len(priors))
            scores, best = scores.topk(n_candidates, dim=1)
            loc, priors = gather_boxes(loc, best), priors[best]
        boxes = cxcywh_to_xyxy(decode(loc, priors))
        boxes = boxes.clamp(0, 1) if is_ssd else boxes
        height, width = frames[0].shape[1:3]
        sides = [torch.scalar_tensor(side, dtype=torch.float32) for side in (width, height)]
        pixels = boxes * torch.stack(sides * 2)
        if self.raw:
            return pixels, scores
        # One NMS for all images: moved apart, they do not overlap each other.
        reach = boxes.max() - boxes.min() + 1
        apart = boxes + reach * torch.arange(boxes.shape[0]).view(-1, 1, 1)
        kept = load_nms()(apart.flatten(0, 1), scores.flatten(), self.nms_iou)
        ones = torch.ones_like(kept, dtype=torch.float32)
        is_kept = torch.zeros_like(scores).flatten().scatter(0, kept, ones).view_as(scores) > 0
        is_kept &= (scores > self.min_score) & ((pixels[..., 2:] - pixels[..., :2]) >= MIN_SIDE).all(2)
        scores, best = (scores * is_kept).topk(min(self.max_boxes, n_candidates), dim=1)
        found = torch.cat([gather_boxes(pixels, best), scores.unsqueeze(2)], dim=2)
        return found * (scores > 0).unsqueeze(2), (scores > 0).sum(1)


def gather_boxes(values: Tensor, index: Tensor) -> Tensor:
    """Rows (n, k, 4) of values (n, P, 4) by their index (n, k)."""
    return values.gather(1, index.unsqueeze(2).expand(-1, -1, 4))


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, h, w, C) uint8 -> (n, C, *size) float32 of whole numbers: torch's antialiased resize of uint8, by
    two matrix products, which every runtime has. Less than a pixel in a hundred differs, by a grey level."""
    x = frames.permute(0, 3, 1, 2).float()
    x = (x @ resize_weights(frames.shape[2], size[1]).T + ROUND_HALF_UP).floor()
    return (resize_weights(frames.shape[1], size[0]) @ x + ROUND_HALF_UP).floor().clamp(0, 255)


def resize_weights(source: int, target: int) -> Tensor:
    """(target, source) float32: how much each pixel of a side is in each pixel of the resized side. A
    triangle around the target's centre, as wide as its pixels, but at least as the source's."""
    step = torch.scalar_tensor(source, dtype=torch.float32) / target
    centre = (torch.arange(target) + 0.5) * step
    distance = (torch.arange(source) + 0.5 - centre.unsqueeze(1)).abs()
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def to_half(model: Detector) -> None:
    """Convolutions and BatchNorm in half precision; what stands between them keeps its own."""

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(module.weight.dtype),)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear | nn.LayerNorm):
            module.register_forward_pre_hook(cast)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.half()
