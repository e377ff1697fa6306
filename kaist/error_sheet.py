"""Draws a detector's false positives and missed people on one sheet. Runs without torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kaist.annotations import PairSet, image_path
from kaist.files import InputError, write_atomically
from kaist.frames import indices_in_videos
from kaist.images import load_frame_image
from kaist.miss_rate import REASONABLE, GroundTruth, Matching, allowed_false_positives, match_setups
from kaist.picture import CAPTIONS
from kaist.results import Detections

OPERATING_FPPI = 0.1  # false positives per image at which people are found or missed
WIDTH, HEIGHT = 176, 220  # of one view, pixels
COLUMNS = 4
MAX_PER_VIDEO = 2  # errors of one video before those of others, because neighbouring frames repeat an error
COLOURS = {"red": "the error", "lime": "person who counts", "yellow": "ignored object"}


def draw_errors(
    ground_truth: GroundTruth, detections: Detections, root: Path | PairSet, n: int, path: Path, name: str
) -> tuple[int, int]:
    """Draw the n false positives with the highest scores and the n largest missed people.

    Each tile shows the visible and the LWIR image around the error.

    Args:
        root: folder with images/, or a set of pairs; path: the sheet; name: the detector's.

    Returns:
        The number of views on the sheet, and the number of those whose image is missing (drawn grey).

    Raises:
        InputError: all images are missing below `root`, or one is broken.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranked, gt = detections.sort_by_score(), ground_truth
    [(_, matching)] = match_setups(gt, ranked, {"Reasonable-all": REASONABLE})
    false, missed = find_errors(gt, matching)
    false_tiles, missed_tiles = [], []  # frame index, xywh box, caption
    for i in order_across_videos(gt, ranked.frame_idxs, false)[:n]:
        false_tiles.append((ranked.frame_idxs[i], ranked.boxes[i], f"score {ranked.scores[i]:.2f}"))
    for i in order_across_videos(gt, gt.frame_idxs, missed)[:n]:
        det = matching.gt_match[i]
        score = f"found at score {ranked.scores[det]:.2f}" if det >= 0 else "never found"
        missed_tiles.append((gt.frame_idxs[i], gt.boxes[i], f"{gt.boxes[i, 3]:.0f} px, {score}"))
    rate = f"{OPERATING_FPPI} false positives per image"
    sheets = {
        f"{len(false_tiles)} of {len(false)} false positives, those with the highest scores": false_tiles,
        f"{len(missed_tiles)} of {len(missed)} people missed at {rate}, the largest": missed_tiles,
    }
    rows = [max(1, math.ceil(len(tiles) / COLUMNS)) for tiles in sheets.values()]
    figure = Figure(figsize=(3.7 * COLUMNS, 2.6 * sum(rows) + 1.2), layout="constrained")
    parts, missing = figure.subfigures(2, 1, height_ratios=rows), []
    for part, n_rows, (heading, tiles) in zip(parts, rows, sheets.items(), strict=True):
        part.suptitle(f"{name}: {heading}", fontsize=14, fontweight="bold")
        panels = part.subplots(n_rows, COLUMNS, squeeze=False).ravel()
        for panel in panels:
            panel.axis("off")
        for panel, (frame, box, text) in zip(panels, tiles, strict=False):
            frame_id, here = gt.frames[frame], np.flatnonzero(gt.frame_idxs == frame)
            colours = np.where(matching.positive[here], "lime", "yellow").tolist()
            boxes = [*zip(gt.boxes[here], colours, strict=True), (box, "red")]
            files = [image_path(root, frame_id, modality) for modality in CAPTIONS]
            missing += [file for file in files if not file.exists()]
            visible, lwir = (
                draw_view(load_frame_image(root, frame_id, m) if file.exists() else None, caption, box, boxes)
                for file, (m, caption) in zip(files, CAPTIONS.items(), strict=True)
            )
            white = np.full_like(visible[:, :2], 255)
            panel.imshow(np.hstack([visible, white, lwir]), interpolation="nearest")
            panel.set_title(f"{frame_id}: {text}", fontsize=9)
    n_views = 2 * len(false_tiles + missed_tiles)
    if missing and len(missing) == n_views:
        remedy = "give the folder with images/ as --data-root"
        raise InputError("all images are missing", remedy, file=missing[0])
    patches = [Patch(facecolor="grey", edgecolor=c, linewidth=2, label=COLOURS[c]) for c in COLOURS]
    part.legend(handles=patches, loc="outside lower center", ncol=3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=110))
    return n_views, len(missing)


def find_errors(ground_truth: GroundTruth, matching: Matching) -> tuple[np.ndarray, np.ndarray]:
    """Indices of false positives, by descending score, and of missed people, by descending height.

    False positives index the sorted detections, missed people the ground truth. People are missed if they
    are found only at scores that give more than OPERATING_FPPI false positives per image, or not at all.
    """
    false = np.flatnonzero(matching.outcome == 0)
    allowed = allowed_false_positives(len(ground_truth.frames), np.array(OPERATING_FPPI))
    limit = false[allowed] if allowed < len(false) else len(matching.outcome)
    found = (matching.gt_match >= 0) & (matching.gt_match < limit)
    missed = np.flatnonzero(matching.positive & ~found)
    return false, missed[np.argsort(-ground_truth.boxes[missed, 3], kind="stable")]


def order_across_videos(ground_truth: GroundTruth, frame_idxs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Reorder errors, indices into `frame_idxs`: each video's first MAX_PER_VIDEO come before all others."""
    places = indices_in_videos(ground_truth.frames[frame_idxs[i]] for i in errors)
    return errors[np.argsort(np.array(places) >= MAX_PER_VIDEO, kind="stable")]


def draw_view(
    image: Image.Image | None, caption: str, box: np.ndarray, boxes: list[tuple[np.ndarray, str]]
) -> np.ndarray:
    """Crop the surroundings of an xywh box and draw xywh boxes in their colours, (HEIGHT, WIDTH, 3) uint8."""
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
