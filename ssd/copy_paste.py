"""Copy-paste augmentation: persons of one frame pasted into another one.

Persons keep their pixels, their size and their height in the frame: they are only moved sideways.
"""

from __future__ import annotations

import numpy as np

MAX_PASTED = 3  # persons pasted into a frame
PLACEMENT_TRIALS = 10  # random places tried for each person
FEATHER = 0.15  # width of the faded border around a patch, as a fraction of the box's width


def paste_people(
    rng: np.random.Generator,
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    donor_pixels: np.ndarray,
    people: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A frame's pixels, boxes and labels with one to three people of another one, where places are free.

    Args:
        pixels, donor_pixels: (h, w, C) uint8, of one size; neither is changed.
        boxes, labels: (n, 4) float32 xyxy pixels and (n,) int64 of the frame's objects.
        people: (m, 4) xyxy pixels of the other frame's persons, at least one.
    """
    pixels, count = pixels.copy(), rng.integers(1, MAX_PASTED + 1)
    for box in people[rng.permutation(len(people))[:count]]:
        width = box[2] - box[0]
        for start in rng.uniform(0, pixels.shape[1] - width, PLACEMENT_TRIALS).round():
            shift = np.float32(start - box[0].round())
            moved = box + np.array([shift, 0, shift, 0], dtype=np.float32)
            apart = ((boxes[:, 2:] <= moved[:2]) | (boxes[:, :2] >= moved[2:])).any(1)
            if apart.all() and moved[0] >= 0 and moved[2] <= pixels.shape[1]:
                blend(pixels, donor_pixels, box, int(shift))
                boxes = np.concatenate([boxes, moved[None]])
                labels = np.append(labels, 1)
                break
    return pixels, boxes, labels


def blend(pixels: np.ndarray, donor: np.ndarray, box: np.ndarray, shift: int) -> None:
    """Copy a box of the donor's pixels, moved sideways, into `pixels`, fading out around it."""
    rim = max(2, round(FEATHER * float(box[2] - box[0])))
    x0, y0, x1, y1 = (int(v) for v in box.round())
    height, width, _ = pixels.shape
    left, right = max(x0 - rim, 0, -shift), min(x1 + rim, width, width - shift)
    top, bottom = max(y0 - rim, 0), min(y1 + rim, height)
    across, down = feather(left, right, x0, x1, rim), feather(top, bottom, y0, y1, rim)
    alpha = (down[:, None] * across)[..., None]
    target = pixels[top:bottom, left + shift : right + shift]
    source = donor[top:bottom, left:right]
    target[:] = np.round(source * alpha + target * (1 - alpha))


def feather(start: int, end: int, low: int, high: int, rim: int) -> np.ndarray:
    """(end - start,) float32: 1 on the pixels from low to high, falling to 0 over `rim` beyond."""
    centre = np.arange(start, end, dtype=np.float32) + 0.5
    outside = np.maximum(low - centre, centre - high).clip(0)
    return 1 - (outside / rim).clip(max=1)
