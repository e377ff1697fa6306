"""The network over whole image lists: frames in, detections in pixels of the frame out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from batches import batch_loader
from datasets import Frame, KaistPairs, label_objects
from engine.distributed import ALONE, Team
from engine.loader import BatchLoader
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH
from kaist.images import check_images
from kaist.miss_rate import GroundTruth
from kaist.results import Detections
from model import SSD300
from ssd.augment import resize, view_pixels, whole_frame
from ssd.boxes import Predictions, detect, feature_map_sizes
from ssd.losses import IGNORE, PERSON
from utils import autocast


def frame_loader(
    root: Path,
    ground_truth: GroundTruth,
    config: dict[str, Any],
    device: torch.device,
    team: Team = ALONE,
    without: str = "",
) -> BatchLoader:
    """Batches of whole frames in their order, with the infused maps' masks of their people, after
    a look at every image.

    Of a team each process gets every `team.size`-th frame. A modality that is `without` is blanked.
    """
    frames = frames_of(ground_truth, config)[team.rank :: team.size]
    check_images(root, [frame.id for frame in frames], config["input_mode"], without)
    map_sizes = feature_map_sizes(config["input_size"])
    dataset = KaistPairs(
        root, frames, input_mode=config["input_mode"], size=config["input_size"], augmentation=None,
        masks_follow=True, seed=config["seed"], without=without,
    )  # fmt: skip
    return batch_loader(
        dataset, batch_size=config["batch_size"], workers=config["workers"],
        start_method=config.get("start_method", "auto"),  # older checkpoints have none
        shuffle=False,
        map_sizes=[map_sizes[i] for i in infused_maps(config)], pin_memory=device.type == "cuda",
    )  # fmt: skip


def frames_of(ground_truth: GroundTruth, config: dict[str, Any]) -> list[Frame]:
    """A test list's frames, with the labels that training would give their objects."""
    first = np.searchsorted(ground_truth.frame, np.arange(1, len(ground_truth.frames)))
    labels = label_objects(
        ground_truth.boxes, ~ground_truth.ignore, config["min_height"], config["margin"]
    )
    corners = ground_truth.boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    objects = zip(np.split(corners, first), np.split(labels, first), strict=True)
    return [Frame(i, *own) for i, own in zip(ground_truth.frames, objects, strict=True)]


def infused_maps(config: dict[str, Any]) -> list[int]:
    """Indices of the feature maps with a segmentation head."""
    return [i for i, infused in enumerate(config["infusion"]) if infused]


def detect_frames(
    model: SSD300,
    loader: BatchLoader,
    device: torch.device,
    precision: torch.dtype,
    config: dict[str, Any],
    team: Team = ALONE,
) -> tuple[Detections, dict[str, float]]:
    """Detections of every frame of a loader, and how well the mask heads know where people are.

    Args:
        config: its `min_score`, `nms_iou` and `max_boxes` are `model.detect`'s; `test_flip`
            averages over mirror images too.
        team: the loader holds every `team.size`-th frame; the detections of all come back.

    Returns:
        The detections, in xywh pixels of the 640x512 frame; and "iou_map1", … of each infused map:
        the cells that both the predicted and the box-shaped mask call person, of all frames, over
        those that one of them does. Ignored cells are left out; NaN where no cell is a person's.
    """
    was_training = model.training
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []
    cells = torch.zeros(len(model.infused_maps), 2, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for batch in tqdm(loader.epoch(0), total=len(loader), desc="detecting", leave=False,
                          disable=not team.writes):  # fmt: skip
            images = batch.images.to(device, non_blocking=True)
            predictions = predict(model, images, precision, config, with_masks=True)
            for i, (logits, mask) in enumerate(zip(predictions.seg, batch.masks, strict=True)):
                cells[i] += shared_cells(logits, mask.to(device))
            pairs = detect(predictions, model.priors, **limits(config))
            found += [(boxes.cpu(), scores.cpu()) for boxes, scores in pairs]
    model.train(was_training)
    shares = team.gather(found)
    found = [shares[i % team.size][i // team.size] for i in range(sum(map(len, shares)))]
    found = [to_pixels(boxes, scores) for boxes, scores in found]
    frame = np.repeat(np.arange(len(found)), [len(scores) for _, scores in found])
    detections = Detections(frame, *map(np.concatenate, zip(*found, strict=True)))
    both, either = team.sum(cells).double().T
    names = [f"iou_map{i + 1}" for i in model.infused_maps]
    return detections, dict(zip(names, (both / either).tolist(), strict=True))


def shared_cells(logits: Tensor, mask: Tensor) -> Tensor:
    """(2,) int64: cells that both call person, and cells that either does.

    Args:
        logits: (N, 2, h, w) of background and person; mask: (N, h, w) as from `box_masks`.
    """
    predicted = (logits[:, 1] > logits[:, 0]) & (mask != IGNORE)
    return torch.stack([(predicted & (mask == PERSON)).sum(), (predicted | (mask == PERSON)).sum()])


def predict(
    model: SSD300,
    images: Tensor,
    precision: torch.dtype,
    config: dict[str, Any],
    with_masks: bool = False,
) -> Predictions:
    """The network's word on (N, C, H, W) uint8 images; with a configuration's `test_flip` loc and
    conf are averaged with those of their mirror images."""
    with autocast(images.device, precision):
        predictions = model(images, with_masks)
        if config.get("test_flip"):  # checkpoints of older versions do not speak of it
            mirrored = mirror(model, model(images.flip(3)))
            loc, conf = ((a + b) / 2 for a, b in zip(predictions[:2], mirrored[:2], strict=True))
            predictions = Predictions(loc, conf, predictions.seg)
    return predictions


def limits(config: dict[str, Any]) -> dict[str, float]:
    """What `model.detect` is told by a configuration."""
    return {name: config[name] for name in ("min_score", "nms_iou", "max_boxes")}


def mirror(model: SSD300, predictions: Predictions) -> Predictions:
    """What predictions of mirror images say of the images themselves, prior by prior; no masks.

    Each prior's mirror image is the prior of the same shape in the column counted from the other
    side, and its offset to the right becomes one to the left.
    """
    order, first = [], 0
    for priors, (h, w) in zip(model.map_priors(), model.map_sizes, strict=True):
        places = torch.arange(first, first + len(priors), device=priors.device)
        order.append(places.view(h, w, -1).flip(1).flatten())
        first += len(priors)
    order = torch.cat(order)
    loc = predictions.loc[:, order] * predictions.loc.new_tensor((-1, 1, 1, 1))
    return Predictions(loc, predictions.conf[:, order], [])


def detect_image(
    model: SSD300, frame: np.ndarray, precision: torch.dtype, config: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (k, 4) xywh pixels and scores (k,), best first, of a frame as from `read_frame`."""
    whole = whole_frame(frame.shape[2], model.size).view
    image = view_pixels(resize(frame, whole), whole, model.size).unsqueeze(0)
    with torch.inference_mode():
        predictions = predict(model, image.to(model.priors.device), precision, config)
    [(boxes, scores)] = detect(predictions, model.priors, **limits(config))
    return to_pixels(boxes, scores)


def to_pixels(boxes: Tensor, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """xyxy fractions (k, 4) and scores (k,) as float64 xywh pixels of the 640x512 frame.

    Boxes that clipping to the frame left with no area worth writing down are left out.
    """
    pixels = (FRAME_WIDTH, FRAME_HEIGHT, FRAME_WIDTH, FRAME_HEIGHT)
    boxes = box_convert(boxes, "xyxy", "xywh").cpu().double().numpy() * pixels
    keep = (boxes[:, 2:] >= 0.01).all(1)
    return boxes[keep], scores.cpu().double().numpy()[keep]
