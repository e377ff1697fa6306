"""A sheet of pictures of what a detector got wrong. Runs without torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from kaist.annotations import image_path
from kaist.files import InputError, write_atomically
from kaist.images import decode
from kaist.miss_rate import SETUPS, GroundTruth, Matching, allowed_false_positives, match_setups, rank
from kaist.results import Detections

SETUP = "Reasonable-all"
OPERATING_FPPI = 0.1  # who is not found at this rate of false positives counts as missed
WIDTH, HEIGHT = 144, 180  # of one picture, pixels
TILE_WIDTH, TILE_HEIGHT = 2 * WIDTH + 12, HEIGHT + 36  # visible and LWIR, two lines of text
COLUMNS = 5
TITLE = 20  # pixels of height
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".pdf": "PDF"}


def draw_errors(
    ground_truth: GroundTruth, detections: Detections, root: Path, n: int, path: Path
) -> tuple[int, int]:
    """Draw the n highest-scored false positives and the n largest people missed.

    Each tile shows the visible and the LWIR image around the error, which is drawn in red, people
    who count in green, ignored objects in yellow; under it the frame id and the score.

    Args:
        root: folder with images/.
        path: the sheet; .png, .jpg or .pdf.

    Returns:
        How many pictures the sheet holds, and how many of their images are missing (grey).

    Raises:
        InputError: not one of the images is below `root`, or one is broken.
    """
    ranked = rank(detections)
    matching = dict(match_setups(ground_truth, ranked, {SETUP: SETUPS[SETUP]}))[SETUP]
    false, missed = find_errors(ground_truth, matching)
    rows = {
        "false positives of the highest score": [
            (ranked.frame[i], ranked.boxes[i], f"score {ranked.scores[i]:.3g}") for i in false[:n]
        ],
        f"largest people not found at {OPERATING_FPPI} false positives per image": [
            (ground_truth.frame[i], box, describe(box, matching.gt_match[i], ranked))
            for i, box in zip(missed[:n], ground_truth.boxes[missed[:n]], strict=True)
        ],
    }
    tops = np.cumsum(
        [0, *(TITLE + TILE_HEIGHT * math.ceil(len(row) / COLUMNS) for row in rows.values())]
    ).tolist()
    sheet = Image.new("RGB", (COLUMNS * TILE_WIDTH, tops[-1]), "white")
    pen = ImageDraw.Draw(sheet)
    absent = []
    for (title, row), top in zip(rows.items(), tops, strict=False):
        pen.text((4, top + 4), title if row else f"{title}: none", fill="black")
        for i, (frame, box, text) in enumerate(row):
            x, y = i % COLUMNS * TILE_WIDTH, top + TITLE + i // COLUMNS * TILE_HEIGHT
            frame_id = ground_truth.frames[frame]
            boxes = [*objects_of(frame, ground_truth, matching), (box, "red")]
            for k, modality in enumerate(("visible", "lwir")):
                file = image_path(root, frame_id, modality)
                if file.exists():
                    view = crop(decode(file, modality), box, boxes)
                else:
                    absent.append(file)
                    view = Image.new("RGB", (WIDTH, HEIGHT), "lightgrey")
                    ImageDraw.Draw(view).text((8, 80), f"no {modality} image", fill="black")
                sheet.paste(view, (x + k * (WIDTH + 2), y))
            pen.text((x + 2, y + HEIGHT + 2), f"{frame_id}\n{text}", fill="black")
    n_pictures = 2 * sum(map(len, rows.values()))
    if absent and len(absent) == n_pictures:
        raise InputError("no image is there", "name the folder with images/ as --data-root", file=absent[0])
    write_atomically(path, lambda beside: sheet.save(beside, format=FORMATS[path.suffix]))
    return n_pictures, len(absent)


def find_errors(ground_truth: GroundTruth, matching: Matching) -> tuple[np.ndarray, np.ndarray]:
    """False positives from the highest score down and missed people from the largest down.

    Indices into the ranked detections and into the ground truth. A person is missed who is found
    only below the score at which there are 0.1 false positives per image, or not at all.
    """
    false = np.flatnonzero(matching.outcome == 0)
    allowed = allowed_false_positives(len(ground_truth.frames), np.array(OPERATING_FPPI))
    limit = false[allowed] if allowed < len(false) else len(matching.outcome)
    missed = matching.positive & ((matching.gt_match < 0) | (matching.gt_match >= limit))
    missed = np.flatnonzero(missed)
    return false, missed[np.argsort(-ground_truth.boxes[missed, 3], kind="stable")]


def describe(box: np.ndarray, finder: int, ranked: Detections) -> str:
    """A missed person's height and the score at which they are found after all."""
    found = f"found at score {ranked.scores[finder]:.3g}" if finder >= 0 else "found at no score"
    return f"{box[3]:.0f} pixels, {found}"


def objects_of(frame: int, ground_truth: GroundTruth, matching: Matching) -> list[tuple[np.ndarray, str]]:
    """A frame's annotated boxes (4,) xywh and the colours they are drawn in."""
    here = np.flatnonzero(ground_truth.frame == frame)
    colours = np.where(matching.positive[here], "lime", "yellow").tolist()
    return list(zip(ground_truth.boxes[here], colours, strict=True))


def crop(image: Image.Image, box: np.ndarray, boxes: list[tuple[np.ndarray, str]]) -> Image.Image:
    """The surroundings of an xywh box with coloured boxes drawn in."""
    x, y, w, h = box
    scale = HEIGHT / max(2 * h, 2 * w * HEIGHT / WIDTH, 80)
    left, top = x + (w - WIDTH / scale) / 2, y + (h - HEIGHT / scale) / 2
    extent = (left, top, left + WIDTH / scale, top + HEIGHT / scale)
    view = image.convert("RGB").transform(
        (WIDTH, HEIGHT), Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR
    )
    pen = ImageDraw.Draw(view)
    for (x, y, w, h), colour in boxes:
        corners = np.array([x - left, y - top, x + w - left, y + h - top]) * scale
        pen.rectangle(corners.tolist(), outline=colour)
    return view
