"""Copy-paste augmentation: people of one frame pasted into another, in both modalities alike.

A person keeps its place in height, because on KAIST a person's size follows from where its feet
are; it moves sideways to where it covers nobody. Source: Ghiasi et al., "Simple Copy-Paste is a
Strong Data Augmentation Method for Instance Segmentation" (CVPR 2021), with soft-edged boxes in
place of instance masks, which KAIST does not have.
"""

from __future__ import annotations

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH

MOST = 3  # people pasted into a frame
TRIALS = 10  # places tried for each
RIM = 0.15  # of a box's width: how far around it the patch fades out


def paste_people(
    rng: np.random.Generator,
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    donor_pixels: np.ndarray,
    people: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A frame with one to three people of another frame.

    Args:
        rng: draws how many, who, and where.
        pixels, donor_pixels: (512, 640, C) uint8; neither is changed.
        boxes, labels: (n, 4) float32 xyxy pixels and (n,) int64 of the frame's objects.
        people: (m, 4) xyxy pixels of the other frame's persons, at least one.

    Returns:
        Pixels, boxes and labels with those for whom one of `TRIALS` places was free added.
    """
    pixels = pixels.copy()
    count = rng.integers(1, MOST + 1)
    for box in people[rng.permutation(len(people))[:count]]:
        width = box[2] - box[0]
        for start in rng.uniform(0, FRAME_WIDTH - width, TRIALS).round():
            shift = np.float32(start - box[0].round())
            moved = box + np.array([shift, 0, shift, 0], dtype=np.float32)
            if not touches(moved, boxes) and moved[0] >= 0 and moved[2] <= FRAME_WIDTH:
                blend(pixels, donor_pixels, box, int(shift))
                boxes = np.concatenate([boxes, moved[None]])
                labels = np.append(labels, 1)
                break
    return pixels, boxes, labels


def touches(box: np.ndarray, boxes: np.ndarray) -> bool:
    """Whether a box (4,) overlaps any of boxes (n, 4), all xyxy."""
    apart = (boxes[:, 2:] <= box[:2]) | (boxes[:, :2] >= box[2:])
    return bool((~apart.any(1)).any())


def blend(pixels: np.ndarray, donor: np.ndarray, box: np.ndarray, shift: int) -> None:
    """Copy a box of the donor's pixels, moved sideways, into `pixels`, fading out around it."""
    rim = max(2, round(RIM * float(box[2] - box[0])))
    x0, y0, x1, y1 = (int(v) for v in box.round())
    left, right = max(x0 - rim, 0, -shift), min(x1 + rim, FRAME_WIDTH, FRAME_WIDTH - shift)
    top, bottom = max(y0 - rim, 0), min(y1 + rim, FRAME_HEIGHT)
    across, down = fade(left, right, x0, x1, rim), fade(top, bottom, y0, y1, rim)
    alpha = (down[:, None] * across)[..., None]
    target = pixels[top:bottom, left + shift : right + shift]
    source = donor[top:bottom, left:right]
    target[:] = np.round(source * alpha + target * (1 - alpha))


def fade(start: int, end: int, low: int, high: int, rim: int) -> np.ndarray:
    """(end - start,) float32: 1 on the pixels from low to high, falling to 0 over `rim` beyond."""
    centre = np.arange(start, end, dtype=np.float32) + 0.5
    outside = np.maximum(low - centre, centre - high).clip(0)
    return 1 - (outside / rim).clip(max=1)
