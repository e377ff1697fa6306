"""A sheet of pictures of what a detector got wrong. Runs without torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kaist.annotations import PairSet, image_path
from kaist.files import InputError, write_atomically
from kaist.frames import indices_in_videos
from kaist.images import load_frame_image
from kaist.miss_rate import (
    SETUPS,
    GroundTruth,
    Matching,
    allowed_false_positives,
    match_setups,
    sort_by_score,
)
from kaist.picture import CAPTIONS
from kaist.results import Detections

SETUP = "Reasonable-all"
OPERATING_FPPI = 0.1  # who is not found at this rate of false positives counts as missed
WIDTH, HEIGHT = 176, 220  # of one view, pixels
COLUMNS = 4
PER_VIDEO = 2  # errors of a video that come first: its neighbouring frames hold the same ones again
COLOURS = {"red": "the error", "lime": "person who counts", "yellow": "ignored object"}


def draw_errors(
    ground_truth: GroundTruth, detections: Detections, root: Path | PairSet, n: int, path: Path, name: str
) -> tuple[int, int]:
    """Draw the n false positives of the highest scores and the n largest people missed.

    Each tile shows the visible and the LWIR image around the error. Of each video the first `PER_VIDEO`
    errors come before its others.

    Args:
        root: folder with images/, or a set of pairs; path: the sheet, its ending tells the format.
        name: the detector's.

    Returns:
        How many views the sheet holds, and how many of their images are missing (grey).

    Raises:
        InputError: not one of the images is below `root`, or one is broken.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    people, ranked = ground_truth, sort_by_score(detections)
    [(_, matching)] = match_setups(people, ranked, {SETUP: SETUPS[SETUP]})
    false, missed = find_errors(people, matching)
    false_tiles, missed_tiles = [], []  # of a frame's number, a box and words
    for i in order_across_videos(people, ranked.frame_idxs, false)[:n]:
        false_tiles.append((ranked.frame_idxs[i], ranked.boxes[i], f"score {ranked.scores[i]:.2f}"))
    for i in order_across_videos(people, people.frame_idxs, missed)[:n]:
        det = matching.gt_match[i]
        score = f"found at {ranked.scores[det]:.2f}" if det >= 0 else "never found"
        missed_tiles.append((people.frame_idxs[i], people.boxes[i], f"{people.boxes[i, 3]:.0f} px, {score}"))
    rate = f"{OPERATING_FPPI} false positives per image"
    sheets = {
        f"{len(false_tiles)} of {len(false)} false positives, those of the highest scores": false_tiles,
        f"{len(missed_tiles)} of {len(missed)} people missed at {rate}, the largest": missed_tiles,
    }
    rows = [max(1, math.ceil(len(tiles) / COLUMNS)) for tiles in sheets.values()]
    figure = Figure(figsize=(3.7 * COLUMNS, 2.6 * sum(rows) + 1.2), layout="constrained")
    parts, absent = figure.subfigures(2, 1, height_ratios=rows), []
    for part, n_rows, (heading, tiles) in zip(parts, rows, sheets.items(), strict=True):
        part.suptitle(f"{name}: {heading}", fontsize=14, fontweight="bold")
        panels = part.subplots(n_rows, COLUMNS, squeeze=False).ravel()
        for panel in panels:
            panel.axis("off")
        for panel, (frame, box, text) in zip(panels, tiles, strict=False):
            frame_id, here = people.frames[frame], np.flatnonzero(people.frame_idxs == frame)
            colours = np.where(matching.positive[here], "lime", "yellow").tolist()
            boxes = [*zip(people.boxes[here], colours, strict=True), (box, "red")]
            files = [image_path(root, frame_id, modality) for modality in CAPTIONS]
            absent += [file for file in files if not file.exists()]
            visible, lwir = (
                draw_view(load_frame_image(root, frame_id, m) if file.exists() else None, caption, box, boxes)
                for file, (m, caption) in zip(files, CAPTIONS.items(), strict=True)
            )
            white = np.full_like(visible[:, :2], 255)
            panel.imshow(np.hstack([visible, white, lwir]), interpolation="nearest")
            panel.set_title(f"{frame_id}: {text}", fontsize=9)
    n_views = 2 * len(false_tiles + missed_tiles)
    if absent and len(absent) == n_views:
        raise InputError("no image is there", "name the folder with images/ as --data-root", file=absent[0])
    patches = [Patch(facecolor="grey", edgecolor=c, linewidth=2, label=COLOURS[c]) for c in COLOURS]
    part.legend(handles=patches, loc="outside lower center", ncol=3)
    write_atomically(path, lambda beside: figure.savefig(beside, format=path.suffix[1:], dpi=110))
    return n_views, len(absent)


def find_errors(ground_truth: GroundTruth, matching: Matching) -> tuple[np.ndarray, np.ndarray]:
    """False positives from the highest score down and missed people from the largest down.

    Indices into the ranked detections and into the ground truth. A person is missed who is found
    only below the score at which there are 0.1 false positives per image, or not at all.
    """
    false = np.flatnonzero(matching.outcome == 0)
    allowed = allowed_false_positives(len(ground_truth.frames), np.array(OPERATING_FPPI))
    limit = false[allowed] if allowed < len(false) else len(matching.outcome)
    found = (matching.gt_match >= 0) & (matching.gt_match < limit)
    missed = np.flatnonzero(matching.positive & ~found)
    return false, missed[np.argsort(-ground_truth.boxes[missed, 3], kind="stable")]


def order_across_videos(ground_truth: GroundTruth, frame: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Errors, indices into `frame`, with the first `PER_VIDEO` of each video before its others."""
    places = indices_in_videos(ground_truth.frames[frame[i]] for i in errors)
    return errors[np.argsort(np.array(places) >= PER_VIDEO, kind="stable")]


def draw_view(
    image: Image.Image | None, caption: str, box: np.ndarray, boxes: list[tuple[np.ndarray, str]]
) -> np.ndarray:
    """The surroundings of an xywh box in an image, with coloured boxes: (HEIGHT, WIDTH, 3) uint8."""
    x, y, w, h = box
    scale = HEIGHT / max(2 * h, 2 * w * HEIGHT / WIDTH, 80)
    left, top = x + (w - WIDTH / scale) / 2, y + (h - HEIGHT / scale) / 2
    extent = (left, top, left + WIDTH / scale, top + HEIGHT / scale)
    view = Image.new("RGB", (WIDTH, HEIGHT), "lightgrey")
    if image:
        image = image.convert("RGB")
        view = image.transform(view.size, Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(view)
    for (x, y, w, h), colour in boxes:
        corners = np.array([x - left, y - top, x + w - left, y + h - top]) * scale
        pen.rectangle(corners.tolist(), outline=colour, width=2)
    caption = caption if image else f"no {caption} image"
    pen.text((5, 3), caption, "white", ImageFont.load_default(15), stroke_width=2, stroke_fill="black")
    return np.array(view)
