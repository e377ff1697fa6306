"""A network for export to other runtimes: frames of any size in, boxes in pixels out, as one graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssd.boxes import TOPK_CANDIDATES, Predictions, cxcywh_to_xyxy, decode, load_nms, person_scores
from ssd.layers import Detector

# Boxes that go into NMS with three logits. `ssd.boxes.detect` takes all, but a graph's shapes are fixed.
MULTILABEL_CANDIDATES = 4000
ROUND_HALF_UP = 0.5 + 2**-10  # added before floor; a bit above 0.5, because runtimes sum in any order
MIN_SIDE = 0.01  # pixels; boxes with a shorter side after clipping are dropped, as in result files


class Deployable(nn.Module):
    """A detector with resizing, decoding and NMS, all shapes fixed by the input's.

    min_score, nms_iou, max_boxes: see `ssd.boxes.detect`. raw: return all priors' boxes and scores, without
    NMS. predict_mirrored: predicts from the mirrored images, to average with the predictions, if given.
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
        """Detect persons in frames (n, height, width, C) uint8 of each modality, of any sizes.

        Returns (n, max_boxes, 5): x0, y0, x1, y1 in pixels of the first modality, and score; best first,
        padded with zeros; and the number of boxes (n,). If raw, boxes (n, P, 4) and scores (n, P) instead.
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
        # One NMS for the batch: an offset for each image keeps its boxes from overlapping the others', as in
        # torchvision's batched_nms.
        offset = boxes.max() - boxes.min() + 1
        shifted = boxes + offset * torch.arange(boxes.shape[0]).view(-1, 1, 1)
        kept = load_nms()(shifted.flatten(0, 1), scores.flatten(), self.nms_iou)
        ones = torch.ones_like(kept, dtype=torch.float32)
        is_kept = torch.zeros_like(scores).flatten().scatter(0, kept, ones).view_as(scores) > 0
        is_kept &= (scores > self.min_score) & ((pixels[..., 2:] - pixels[..., :2]) >= MIN_SIDE).all(2)
        scores, best = (scores * is_kept).topk(min(self.max_boxes, n_candidates), dim=1)
        detections = torch.cat([gather_boxes(pixels, best), scores.unsqueeze(2)], dim=2)
        return detections * (scores > 0).unsqueeze(2), (scores > 0).sum(1)


def gather_boxes(values: Tensor, index: Tensor) -> Tensor:
    """(n, k, 4): the rows of values (n, P, 4) at index (n, k)."""
    return values.gather(1, index.unsqueeze(2).expand(-1, -1, 4))


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (n, h, w, C) uint8 to (n, C, *size) float32 integers, by two matrix products, for any runtime.

    Fewer than 1% of the pixels differ from torch's antialiased resize, by one grey level.
    """
    x = frames.permute(0, 3, 1, 2).float()
    x = (x @ resize_weights(frames.shape[2], size[1]).T + ROUND_HALF_UP).floor()
    return (resize_weights(frames.shape[1], size[0]) @ x + ROUND_HALF_UP).floor().clamp(0, 255)


def resize_weights(source: int, target: int) -> Tensor:
    """(target, source) float32 weights of antialiased linear interpolation along one side.

    A row is a triangle around the target pixel's centre, whose half-width is one target pixel but at least
    one source pixel.
    """
    step = torch.scalar_tensor(source, dtype=torch.float32) / target
    centre = (torch.arange(target) + 0.5) * step
    distance = (torch.arange(source) + 0.5 - centre.unsqueeze(1)).abs()
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def to_half(model: Detector) -> None:
    """Convert convolutions and BatchNorm to half precision, in place; other layers keep theirs."""

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(module.weight.dtype),)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear | nn.LayerNorm):
            module.register_forward_pre_hook(cast)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.half()
