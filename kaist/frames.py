"""Annotated frames as training sees them: corners of boxes, and who is learned or ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, Annotations
from kaist.miss_rate import GroundTruth


@dataclass(frozen=True)
class Frame:
    """One frame's objects: boxes (n, 4) float32 xyxy pixels of 640x512, labels (n,) int64."""

    id: str
    boxes_px: np.ndarray
    labels: np.ndarray


def label_objects(boxes: np.ndarray, is_person: np.ndarray, min_height: float, margin: float) -> np.ndarray:
    """(n,) int64 labels: 1 for a person to learn, -1 for an object to ignore.

    Ignored are objects that are not plainly a person, persons lower than `min_height` pixels, and
    persons that leave the frame less `margin` pixels on each side.

    Args:
        boxes: (n, 4) xywh pixels; is_person: (n,) bool.
    """
    x, y, w, h = boxes.T
    inside = (x >= margin) & (y >= margin)
    inside &= (x + w <= FRAME_WIDTH - margin) & (y + h <= FRAME_HEIGHT - margin)
    return np.where(is_person & (h >= min_height) & inside, 1, -1).astype(np.int64)


def load_frames(
    frame_ids: list[str], annotations: Annotations, *, min_height: float, margin: float
) -> list[Frame]:
    """Read the annotations of all frames; a malformed file stops here, before any training."""
    objects, counts = annotations.read_all(frame_ids)
    labels = label_objects(objects.boxes, objects.is_person, min_height, margin)
    return split_objects(frame_ids, objects.boxes, labels, counts)


def frames_of(ground_truth: GroundTruth, min_height: float, margin: float) -> list[Frame]:
    """A test list's frames, with the labels that training would give their objects."""
    labels = label_objects(ground_truth.boxes, ~ground_truth.ignore, min_height, margin)
    counts = np.bincount(ground_truth.frame, minlength=len(ground_truth.frames))
    return split_objects(ground_truth.frames, ground_truth.boxes, labels, counts)


def split_objects(
    frame_ids: Sequence[str], boxes: np.ndarray, labels: np.ndarray, counts: np.ndarray
) -> list[Frame]:
    """Frames of so many objects each; boxes (n, 4) xywh pixels of one frame after the other."""
    corners = boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    first = counts.cumsum()[:-1]
    objects = zip(np.split(corners, first), np.split(labels, first), strict=True)
    return [Frame(frame_id, *own) for frame_id, own in zip(frame_ids, objects, strict=True)]
