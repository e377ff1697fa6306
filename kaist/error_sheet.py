"""A sheet of pictures of what a detector got wrong. Runs without torch."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kaist.annotations import image_path
from kaist.files import InputError, write_atomically
from kaist.images import frame_view
from kaist.miss_rate import SETUPS, GroundTruth, Matching, allowed_false_positives, match_setups, rank
from kaist.pairs import PairSet
from kaist.results import Detections

SETUP = "Reasonable-all"
OPERATING_FPPI = 0.1  # who is not found at this rate of false positives counts as missed
WIDTH, HEIGHT = 176, 220  # of one view, pixels
COLUMNS = 4
PER_VIDEO = 2  # errors of a video that come first: its neighbouring frames hold the same ones again
CAPTIONS = {"visible": "visible", "lwir": "LWIR"}
COLOURS = {"red": "the error", "lime": "person who counts", "yellow": "ignored object"}


def draw_errors(
    ground_truth: GroundTruth, detections: Detections, root: Path | PairSet, n: int, path: Path, name: str
) -> tuple[int, int]:
    """Draw the n false positives of the highest scores and the n largest people missed.

    Each tile shows the visible and the LWIR image around the error; its title tells the frame and
    the score. Of each video the first `PER_VIDEO` errors come before its others.

    Args:
        root: folder with images/, or a set of pairs.
        path: the sheet; its ending tells the format.
        name: the detector's.

    Returns:
        How many views the sheet holds, and how many of their images are missing (grey).

    Raises:
        InputError: not one of the images is below `root`, or one is broken.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranked, people = rank(detections), ground_truth
    [(_, matching)] = match_setups(people, ranked, {SETUP: SETUPS[SETUP]})
    false, missed = find_errors(people, matching)
    counts = len(false), len(missed)
    false, missed = spread(people, ranked.frame, false)[:n], spread(people, people.frame, missed)[:n]
    tiles = [(ranked.frame[i], ranked.boxes[i], f"score {ranked.scores[i]:.2f}") for i in false]
    for i in missed:
        det = matching.gt_match[i]
        score = f"found at {ranked.scores[det]:.2f}" if det >= 0 else "never found"
        tiles.append((people.frame[i], people.boxes[i], f"{people.boxes[i, 3]:.0f} px, {score}"))
    headings = (
        f"{name}: {len(false)} of {counts[0]} false positives, those of the highest scores",
        f"{name}: {len(missed)} of {counts[1]} people missed at {OPERATING_FPPI} false positives per image, "
        "the largest",
    )
    rows = [max(1, math.ceil(len(part) / COLUMNS)) for part in (false, missed)]
    figure = Figure(figsize=(3.7 * COLUMNS, 2.6 * sum(rows) + 1.2), layout="constrained")
    panels = []
    for part, n_rows, heading, found in zip(
        figure.subfigures(2, 1, height_ratios=rows), rows, headings, (false, missed), strict=True
    ):
        part.suptitle(heading, fontsize=14, fontweight="bold")
        grid = part.subplots(n_rows, COLUMNS, squeeze=False).ravel()
        for panel in grid:
            panel.axis("off")
        panels += grid[: len(found)].tolist()
    absent = []
    for panel, (frame, box, text) in zip(panels, tiles, strict=True):
        files = {m: image_path(root, people.frames[frame], m) for m in ("visible", "lwir")}
        absent += [file for file in files.values() if not file.exists()]
        here = np.flatnonzero(people.frame == frame)
        colours = np.where(matching.positive[here], "lime", "yellow")
        boxes = [*zip(people.boxes[here], colours.tolist(), strict=True), (box, "red")]
        images = {m: frame_view(root, people.frames[frame], m) for m, file in files.items() if file.exists()}
        views = [draw_view(images.get(m), m, box, boxes) for m in files]
        panel.imshow(
            np.hstack([views[0], np.full_like(views[0][:, :2], 255), views[1]]), interpolation="nearest"
        )
        panel.set_title(f"{people.frames[frame]}: {text}", fontsize=9)
    if absent and len(absent) == 2 * len(tiles):
        raise InputError("no image is there", "name the folder with images/ as --data-root", file=absent[0])
    patches = [Patch(facecolor="grey", edgecolor=c, linewidth=2, label=COLOURS[c]) for c in COLOURS]
    part.legend(handles=patches, loc="outside lower center", ncol=3)
    write_atomically(path, lambda beside: figure.savefig(beside, format=path.suffix[1:], dpi=110))
    return 2 * len(tiles), len(absent)


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


def spread(ground_truth: GroundTruth, frame: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Errors, indices into `frame`, with the first `PER_VIDEO` of each video before its others."""
    seen: Counter[str] = Counter()
    later = []
    for i in errors:
        video = ground_truth.frames[frame[i]].rsplit("/", 1)[0]
        later.append(seen[video] >= PER_VIDEO)
        seen[video] += 1
    return errors[np.argsort(later, kind="stable")]


def draw_view(
    image: Image.Image | None, modality: str, box: np.ndarray, boxes: list[tuple[np.ndarray, str]]
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
    caption = CAPTIONS[modality] if image else f"no {CAPTIONS[modality]} image"
    pen.text((5, 3), caption, "white", ImageFont.load_default(15), stroke_width=2, stroke_fill="black")
    return np.array(view)
