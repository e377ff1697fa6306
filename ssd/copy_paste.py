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
    donor_boxes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paste 1 to `MAX_PASTED` persons of a donor frame where they overlap no object, if a place is found.

    Args:
        pixels, donor_pixels: (h, w, C) uint8, of the same size; not modified.
        boxes, labels: (n, 4) float32 xyxy pixels and (n,) int64 of the frame's objects.
        donor_boxes: (m, 4) float32 xyxy pixels of the donor's persons, m >= 1.

    Returns: the new pixels, boxes and labels.
    """
    pixels, n_pasted = pixels.copy(), rng.integers(1, MAX_PASTED + 1)
    for box in donor_boxes[rng.permutation(len(donor_boxes))[:n_pasted]]:
        width = box[2] - box[0]
        for left in rng.uniform(0, pixels.shape[1] - width, PLACEMENT_TRIALS).round():
            shift = np.float32(left - box[0].round())
            moved = box + np.array([shift, 0, shift, 0], dtype=np.float32)
            is_free = ((boxes[:, 2:] <= moved[:2]) | (boxes[:, :2] >= moved[2:])).any(1)
            if is_free.all() and moved[0] >= 0 and moved[2] <= pixels.shape[1]:
                blend(pixels, donor_pixels, box, int(shift))
                boxes = np.concatenate([boxes, moved[None]])
                labels = np.append(labels, 1)
                break
    return pixels, boxes, labels


def blend(pixels: np.ndarray, donor_pixels: np.ndarray, box: np.ndarray, shift: int) -> None:
    """Blend a box of the donor into `pixels`, `shift` pixels to the right, in place; its border fades out."""
    border = max(2, round(FEATHER * float(box[2] - box[0])))
    x0, y0, x1, y1 = (int(v) for v in box.round())
    height, width, _ = pixels.shape
    left, right = max(x0 - border, 0, -shift), min(x1 + border, width, width - shift)
    top, bottom = max(y0 - border, 0), min(y1 + border, height)
    alpha_x, alpha_y = feather(left, right, x0, x1, border), feather(top, bottom, y0, y1, border)
    alpha = (alpha_y[:, None] * alpha_x)[..., None]
    target = pixels[top:bottom, left + shift : right + shift]
    source = donor_pixels[top:bottom, left:right]
    target[:] = np.round(source * alpha + target * (1 - alpha))


def feather(start: int, end: int, low: int, high: int, border: int) -> np.ndarray:
    """(end - start,) float32 weights: 1 for pixels from low to high, falling to 0 over `border` pixels."""
    centres = np.arange(start, end, dtype=np.float32) + 0.5
    distance = np.maximum(low - centres, centres - high).clip(0)
    return 1 - (distance / border).clip(max=1)
