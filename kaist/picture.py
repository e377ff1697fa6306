"""Draws detections with their scores, and annotated objects dashed, on images. Runs without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kaist.annotations import FRAME_SIZE, Objects
from kaist.files import write_atomically

DETECTION_COLOUR, PERSON_COLOUR, IGNORED_COLOUR = "lime", "white", "orange"
BAR_COLOUR = "#202020"  # behind captions
SHEET_WIDTH = 1920  # pixels
MAX_SHEET_COLUMNS, MAX_SHEET_PICTURES = 8, 200
ANIMATION_WIDTH = 960  # pixels
FRAME_MILLISECONDS = 100  # duration of each picture of an animation
CAPTIONS = {"visible": "visible", "lwir": "LWIR (thermal)"}


def draw_pair(
    images: Mapping[str, Image.Image],
    boxes: np.ndarray,
    scores: np.ndarray,
    annotated: Objects | None = None,
    title: str = "",
) -> Image.Image:
    """Draw the modalities of a frame side by side, with boxes, scores and a legend.

    Args:
        images: modality -> image; all are resized to the first one's size.
        boxes: (k, 4) float xywh pixels of the first image; scores: (k,).
        annotated: the frame's annotated objects, in pixels of a 640x512 frame, or None.
        title: text next to the first modality's name.
    """
    width, height = next(iter(images.values())).size
    font = ImageFont.load_default(max(14, height // 34))
    line = max(2, height // 256)
    bar = round(1.7 * font.size)
    sheet = Image.new("RGB", (width * len(images) + line * (len(images) - 1), height + 2 * bar), BAR_COLOUR)
    legend = [(DETECTION_COLOUR, f"{len(boxes)} found" + ", with score" * (len(boxes) > 0))]
    if annotated is not None:
        scale = np.tile((width, height) / np.array(FRAME_SIZE), 2)
        n_people = int(annotated.is_person.sum())
        legend.append((PERSON_COLOUR, f"{n_people} annotated (dashed)"))
        if n_people < len(annotated.boxes):
            n_ignored = len(annotated.boxes) - n_people
            legend.append((IGNORED_COLOUR, f"{n_ignored} annotated as ignored (dashed)"))
    for i, (modality, image) in enumerate(images.items()):
        panel = image.convert("RGB").resize((width, height))
        pen = ImageDraw.Draw(panel)
        if annotated is not None:
            for box, is_person in zip(annotated.boxes * scale, annotated.is_person, strict=True):
                draw_dashed(pen, box, PERSON_COLOUR if is_person else IGNORED_COLOUR, line)
        for x, y, w, h in boxes.tolist():
            pen.rectangle((x, y, x + w, y + h), outline=DETECTION_COLOUR, width=line)
        draw_scores(pen, boxes, scores, font, panel.size)
        left = i * (width + line)
        sheet.paste(panel, (left, bar))
        caption = CAPTIONS[modality] + (f"  {title}" if i == 0 else "")
        ImageDraw.Draw(sheet).text((left + 6, bar / 2), caption, "white", font, anchor="lm")
    left = 6.0
    for colour, text in legend:
        ImageDraw.Draw(sheet).text((left, height + 1.5 * bar), text, colour, font, anchor="lm")
        left += font.getlength(text) + bar
    return sheet


def draw_scores(
    pen: ImageDraw.ImageDraw,
    boxes: np.ndarray,
    scores: np.ndarray,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Write each xywh box's score on a label above it, or nearby if another label is in the way."""
    labels: list[tuple[float, float, float, float]] = []  # left, top, right, bottom
    for (x, y, w, h), score in zip(boxes.tolist(), scores.tolist(), strict=True):
        text = f"{score:.2f}"
        wide, tall = font.getlength(text) + 4, 1.15 * font.size
        places = [(x, y - tall), (x + w - wide, y - tall), (x, y + h), (x + w - wide, y + h), (x, y)]
        for left, top in places + [(x, y - n * tall) for n in (2, 3, 4)]:
            left, top = min(max(left, 0), size[0] - wide), min(max(top, 0), size[1] - tall)
            label = left, top, left + wide, top + tall
            if not any(boxes_overlap(label, other) for other in labels):
                pen.rectangle(label, fill=DETECTION_COLOUR)
                pen.text((left + 2, top + tall / 2), text, "black", font, anchor="lm")
                labels.append(label)
                break  # without a free place the score is left out, because it would hide another


def boxes_overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two xyxy boxes intersect."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_dashed(pen: ImageDraw.ImageDraw, box: Sequence[float], colour: str, line: int) -> None:
    """Outline an xywh box in dashes."""
    x, y, w, h = map(float, box)
    dash = 3 * line
    for start in np.arange(0, w, 2 * dash):
        for edge in (y, y + h):
            pen.line((x + start, edge, x + min(start + dash, w), edge), fill=colour, width=line)
    for start in np.arange(0, h, 2 * dash):
        for edge in (x, x + w):
            pen.line((edge, y + start, edge, y + min(start + dash, h)), fill=colour, width=line)


def save_sheet(path: Path, pictures: Sequence[Path]) -> int:
    """Write picture files, scaled down, on one sheet; at most MAX_SHEET_PICTURES, evenly spaced.
    Returns the number of pictures."""
    pictures = pictures[:: math.ceil(len(pictures) / MAX_SHEET_PICTURES)]
    columns = min(math.ceil(len(pictures) ** 0.5), MAX_SHEET_COLUMNS)
    small = [open_scaled(picture, SHEET_WIDTH // columns) for picture in pictures]
    width, height = (max(picture.size[axis] for picture in small) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(small) / columns) * height), BAR_COLOUR)
    for i, picture in enumerate(small):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    form = "JPEG" if path.suffix.lower() == ".jpg" else "PNG"
    write_atomically(path, lambda temporary: sheet.save(temporary, format=form))
    return len(small)


def save_animation(path: Path, pictures: Sequence[Path]) -> int:
    """Write picture files as the frames of an animated GIF or WebP that repeats forever.
    Returns the number of pictures."""
    first = open_scaled(pictures[0], ANIMATION_WIDTH)
    others = (open_scaled(picture, ANIMATION_WIDTH).resize(first.size) for picture in pictures[1:])
    kwargs = {"save_all": True, "duration": FRAME_MILLISECONDS, "loop": 0, "format": path.suffix[1:].upper()}
    write_atomically(path, lambda temporary: first.save(temporary, append_images=others, **kwargs))
    return len(pictures)


def open_scaled(path: Path, width: int) -> Image.Image:
    """Open a picture file, scaled to a width in pixels."""
    with Image.open(path) as picture:
        return picture.convert("RGB").resize((width, max(1, round(picture.height * width / picture.width))))
