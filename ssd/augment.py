"""SSD's augmentation for registered pairs: one window, one resize, boxes that follow exactly.

Zoom-out, crop, flip and resize are one window of the source frame before a pixel is touched: pixels are
resampled once. `sample_transform` draws a `Transform`, which is applied to pixels and moves boxes.

Sources: SSD paper, sections 2.2 (crops, distortion) and 3.6 (zoom-out); modalities apart: Kim et al.,
"MLPD" (RA-L 2021); the shift to the left: Lee et al., "INSANet" (Sensors 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kaist.annotations import FRAME_SIZE
from kaist.frames import BOTH, LWIR, VISIBLE, merge_equal
from kaist.images import MEAN_COLOUR

CROP_OVERLAPS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # None: no crop
CROP_TRIALS = 50
Window = tuple[float, float, float, float]
Size = tuple[int, int]
MAX_SHIFT = 20  # pixels of the frame that a pair is shifted to the left
MIN_BOX_SIDE = 1.0  # pixels of the network's input; a smaller remnant of a cropped box is dropped
# Luma weights (ITU-R BT.601) and the RGB -> YIQ matrix, in which a hue shift is a rotation.
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)


@dataclass(frozen=True)
class Augmentation:
    """SSD's training augmentation (section 2.2 and 3.6 of the paper), for a registered pair.

    zoom_out: largest side of the zoomed-out canvas in frames; of `unpaired_window`'s windows, the largest
        side and area in those of the frame, and the inverse of the smallest.
    crop_aspect: smallest and largest width / height of a crop, in those of the frame; SSD's own is
        0.5 to 2 of its pixels.
    min_input_height: persons that end up lower in the network's input, in its pixels, are ignored.
    hue_saturation: distort hue and saturation of the visible image too.
    lwir_jitter: distort brightness and contrast of the LWIR image.
    jitter: probability of `extra_colour_jitter`, for each modality, and of `add_blur_and_noise`.
    copy_paste: share of the frames into which people of other frames are pasted.
    modality_dropout: how probable it is that one modality of a sample, by a fair coin, is filler alone.
    crop_apart: how probable it is that each modality is cropped by its own `unpaired_window`; else the
        frame is whole. 0: one `random_window` for both.
    mirror_apart: how probable it is that of a mirrored pair LWIR is left as it was.
    shift_left: how probable it is that both are moved up to `MAX_SHIFT` whole pixels to the left.
    """

    zoom_out: float = 4.0
    crop_aspect: tuple[float, float] = (0.4, 1.6)
    min_input_height: float = 0.0
    hue_saturation: bool = True
    lwir_jitter: bool = True
    jitter: float = 0.0
    copy_paste: float = 0.0
    modality_dropout: float = 0.0
    crop_apart: float = 0.0
    mirror_apart: float = 0.0
    shift_left: float = 0.0


def random_window(
    rng: np.random.Generator, people: np.ndarray, options: Augmentation, frame: Size = FRAME_SIZE
) -> Window:
    """Zoom-out and IoU crop as one xyxy window in pixels of the frame (width, height); it may reach outside.

    Half of the time the frame is placed on a canvas 1 to `zoom_out` times its size. Then one of
    SSD's minimum overlaps is drawn: none leaves the canvas as it is; otherwise the first of 50 crops of
    0.3 to 1 of each side is taken that reaches that overlap with some of the people (n, 4) xyxy pixels, and
    holds some person's centre; if none does, another overlap is drawn. A frame without people takes any
    crop that shows the frame in half its area.
    """
    x, y, w, h = 0.0, 0.0, float(frame[0]), float(frame[1])
    if rng.random() < 0.5:
        scale = rng.uniform(1, options.zoom_out)
        x = -rng.uniform(0, (scale - 1) * w)
        y = -rng.uniform(0, (scale - 1) * h)
        w, h = w * scale, h * scale
    while True:
        overlap = CROP_OVERLAPS[rng.integers(len(CROP_OVERLAPS))]
        if overlap is None:
            return x, y, x + w, y + h
        size = rng.uniform(0.3, 1, (CROP_TRIALS, 2)) * (w, h)
        corner = (x, y) + rng.random((CROP_TRIALS, 2)) * ((w, h) - size)
        aspect = size[:, 0] / size[:, 1] * (frame[1] / frame[0])
        fits = (aspect > options.crop_aspect[0]) & (aspect < options.crop_aspect[1])
        crops = np.concatenate([corner, corner + size], axis=1)
        if len(people):
            fits &= crop_overlaps(crops, people, overlap)
        else:
            shared = crops[:, 2:].clip(max=frame) - crops[:, :2].clip(0)
            fits &= shared.clip(0).prod(1) >= 0.5 * size.prod(1)
        if fits.any():
            return tuple(crops[fits.argmax()].tolist())


def crop_overlaps(crops: np.ndarray, people: np.ndarray, overlap: float) -> np.ndarray:
    """(t,) bool: which crops (t, 4) reach the IoU with some person and hold some one's centre."""
    centre = (people[:, :2] + people[:, 2:]) / 2
    crops = crops[:, None]
    holds = ((centre > crops[..., :2]) & (centre < crops[..., 2:])).all(2).any(1)
    low = np.maximum(crops[..., :2], people[:, :2])
    high = np.minimum(crops[..., 2:], people[:, 2:])
    shared = (high - low).clip(0).prod(2)
    union = (crops[..., 2:] - crops[..., :2]).prod(2) + (people[:, 2:] - people[:, :2]).prod(1)
    return holds & ((shared / (union - shared)).max(1) >= overlap)


def unpaired_window(
    rng: np.random.Generator, people: np.ndarray, options: Augmentation, frame: Size = FRAME_SIZE
) -> Window:
    """MLPD's crop of one modality; arguments and result as of `random_window`.

    The first of 50 windows whose sides and area are 1 / `zoom_out` to `zoom_out` times the frame's, and
    which holds some person wholly, if there is any; the whole frame if there is no such window. It lies
    in the frame where it is smaller, and around it where it is larger.
    """
    most = options.zoom_out
    width = rng.uniform(1 / most, most, CROP_TRIALS)
    size = np.stack([width, width / rng.uniform(*options.crop_aspect, CROP_TRIALS)], axis=1)
    corner = rng.random((CROP_TRIALS, 2)) * (1 - size)
    windows = np.concatenate([corner, corner + size], axis=1) * np.tile(frame, 2)
    fits = (np.abs(np.log(np.column_stack([size, size.prod(1)]))) <= np.log(most)).all(1)
    if len(people):
        holds = (people[:, :2] > windows[:, None, :2]) & (people[:, 2:] < windows[:, None, 2:])
        fits &= holds.all(2).any(1)
    return tuple(windows[fits.argmax()].tolist()) if fits.any() else (0, 0, *frame)


class Crop(NamedTuple):
    """How one rectangle of the frame lands on the network's input: source in pixels of the frame, target in
    those of the input, both integer xyxy; outside there is filler; flip: mirrored afterwards."""

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    flip: bool


def round_to_pixels(window: Window, size: Size, flip: bool, frame: Size = FRAME_SIZE) -> Crop:
    """The part of a window inside a frame of (width, height) and its place in an input of (height, width), in
    whole pixels, by which boxes are moved too: they keep to what is seen exactly."""
    source, target = [0] * 4, [0] * 4
    for axis, (extent, length) in enumerate(zip(frame, size[::-1], strict=True)):
        low, high = window[axis], window[axis + 2]
        scale = length / (high - low)
        start = min(max(round(low), 0), extent - 1)
        end = max(min(round(high), extent), start + 1)
        to = [round((edge - low) * scale) for edge in (start, end)]
        to[0] = min(max(to[0], 0), length - 1)
        to[1] = max(min(to[1], length), to[0] + 1)
        source[axis], source[axis + 2] = start, end
        target[axis], target[axis + 2] = to
    return Crop(tuple(source), tuple(target), flip)


def colour_matrix(
    rng: np.random.Generator, mean: np.ndarray, hue_saturation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """SSD's photometric distortion of one modality as a matrix (c, c) and an offset (c,).

    Brightness and contrast by 0.5 to 1.5 and, for RGB, saturation by 0.5 to 1.5 and hue by up to 18 degrees,
    each with probability 1/2, in random order; `mean` (c,) of the frame is the grey point of the contrast.
    """
    c = len(mean)
    luma = LUMA if c == 3 else np.ones(1)
    matrix, offset = np.eye(c), np.zeros(c)
    kinds = ["brightness", "contrast", "saturation", "hue"]
    for kind in rng.permutation(kinds if c == 3 and hue_saturation else kinds[:2]):
        apply, factor, angle = rng.random() < 0.5, rng.uniform(0.5, 1.5), rng.uniform(-18, 18)
        if not apply:
            continue
        step, shift = factor * np.eye(c), 0.0
        if kind == "contrast":
            shift = (1 - factor) * (luma @ (matrix @ mean + offset))
        elif kind == "saturation":
            step = step + (1 - factor) * np.outer(np.ones(c), luma)
        elif kind == "hue":
            cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
            step = YIQ_TO_RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ RGB_TO_YIQ
        matrix, offset = step @ matrix, step @ offset + shift
    return matrix, offset


def extra_colour_jitter(
    rng: np.random.Generator, matrix: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (c, c) and offset (c,) of one modality, distorted further than SSD does.

    RGB: each channel by 0.6 to 1.5, and a fifth of the time grey. LWIR: gain 0.4 to 2.5, offset -20 to
    40 grey levels, and a twentieth of the time of the other polarity, around 80.
    """
    if len(offset) == 3:
        step, shift = np.diag(np.exp(rng.uniform(np.log(0.6), np.log(1.5), 3))), rng.uniform(-15, 15)
        if rng.random() < 0.2:
            step = step @ np.outer(np.ones(3), LUMA)
    else:
        step, shift = np.exp(rng.uniform(np.log(0.4), np.log(2.5), (1, 1))), rng.uniform(-20, 40)
        if rng.random() < 0.05:
            step, shift = -step, 80.0
    return step @ matrix, step @ offset + shift


def add_blur_and_noise(rng: np.random.Generator, image: Tensor) -> Tensor:
    """An input (C, h, w) uint8, blurred (3x3 at most) and with noise of up to 12 grey levels, in LWIR 3."""
    parts = []
    for part, most in zip(channel_parts(len(image)), (12, 3) if len(image) > 1 else (3,), strict=False):
        content = image[part].float()
        if rng.random() < 0.5:
            content = torch.lerp(
                content, F.avg_pool2d(content, 3, 1, 1, count_include_pad=False), rng.random()
            )
        noise = rng.standard_normal(content.shape, np.float32) * np.float32(rng.uniform(0, most))
        parts.append((content + torch.from_numpy(noise) + 0.5).clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


def frame_mean(frame: np.ndarray) -> np.ndarray:
    """(C,) float32: the mean colour of a frame (h, w, C), to well under 1/255."""
    return torch.from_numpy(frame)[::8, ::8].float().mean((0, 1)).numpy()


@dataclass(frozen=True)
class Transform:
    """How a sample is made of a frame: it moves pixels and boxes alike.

    crops: one for all channels, or visible's and LWIR's; matrix (C, C) and offset (C,) float32: of colours;
    size: (height, width) of the network's input; filler: (C,) uint8, the colour outside of the frame;
    min_height: persons lower than this in the input, in its pixels, are ignored.
    ignore_truncated: persons cut by the border of the input are ignored.
    """

    crops: tuple[Crop, ...]
    matrix: np.ndarray
    offset: np.ndarray
    size: Size
    filler: np.ndarray
    min_height: float = 0.0
    ignore_truncated: bool = False

    def apply(self, pixels: np.ndarray) -> Tensor:
        """The network's input (C, *size) uint8 of a frame's pixels (h, w, C) uint8."""
        height, width = self.size
        image = torch.from_numpy(self.filler).view(-1, 1, 1).repeat(1, height, width)
        parts = channel_parts(len(image)) if len(self.crops) == 2 else [slice(None)]
        for crop, part in zip(self.crops, parts, strict=True):
            (x0, y0, x1, y1), (left, top, right, bottom), flip = crop
            cut = torch.from_numpy(pixels[y0:y1, x0:x1, part]).permute(2, 0, 1).unsqueeze(0)
            how = {"mode": "bilinear", "antialias": True, "align_corners": False}
            resized = F.interpolate(cut, (bottom - top, right - left), **how)[0]
            resized = apply_colour_matrix(resized, self.matrix[part, part], self.offset[part])
            if flip:
                left, right, resized = width - right, width - left, resized.flip(2)
            image[part, top:bottom, left:right] = resized
        return image

    def move(
        self, boxes_px: np.ndarray, labels: np.ndarray, seen: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A frame's objects, as in `Frame`, in the input: boxes (k, 4) float32 xyxy fractions, labels (k,).

        Persons of a pair are labelled `BOTH`. Of modalities moved apart each has the boxes that are seen in
        it, labelled as it; boxes that come to lie on one another are joined. Ignored objects stay -1.
        """
        moved, modalities = [], (VISIBLE, LWIR) if len(self.crops) == 2 else (BOTH,)
        for crop, modality in zip(self.crops, modalities, strict=True):
            own = seen & modality > 0
            of_own = np.where(labels[own] == 1, modality, labels[own])
            moved.append(self.crop_boxes(crop, boxes_px[own], of_own))
        return moved[0] if len(moved) == 1 else merge_equal(*map(np.concatenate, zip(*moved, strict=True)))

    def crop_boxes(
        self, crop: Crop, boxes_px: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) xyxy pixels of the frame -> (k, 4) float32 xyxy fractions of the input, clipped to it.

        A person stays when its centre is in view, as in SSD; an ignored object as long as anything of it
        does, so that no remnant of a crowd is mined. Boxes left with less than a pixel are dropped.
        """
        source, target = np.array(crop[:2], dtype=np.float32)
        scale = (target[2:] - target[:2]) / (source[2:] - source[:2])
        boxes = (boxes_px.reshape(-1, 2, 2) - source[:2]) * scale + target[:2]
        limit = np.array(self.size[::-1], dtype=np.float32)
        if crop.flip:
            boxes[..., 0] = limit[0] - boxes[:, ::-1, 0]
        centre = boxes.mean(1)
        in_view = ((centre > 0) & (centre < limit)).all(1)
        if self.ignore_truncated:
            labels = np.where(((boxes >= 0) & (boxes <= limit)).all((1, 2)), labels, -1)
        boxes = boxes.clip(0, limit)
        stays = (in_view | (labels == -1)) & ((boxes[:, 1] - boxes[:, 0]) >= MIN_BOX_SIDE).all(1)
        labels = np.where(boxes[:, 1, 1] - boxes[:, 0, 1] < self.min_height, -1, labels)
        return (boxes[stays] / limit).reshape(-1, 4), labels[stays]


def whole_frame(channels: int, size: Size, frame: Size = FRAME_SIZE) -> Transform:
    """The undistorted frame of (width, height) in an input of (height, width), which it fills."""
    crop = round_to_pixels((0, 0, *frame), size, False, frame)
    nothing = np.zeros(channels, np.float32)
    return Transform((crop,), np.eye(channels, dtype=np.float32), nothing, size, nothing.astype(np.uint8))


def sample_transform(
    rng: np.random.Generator,
    people: np.ndarray,
    mean: np.ndarray,
    options: Augmentation,
    size: Size,
    filler: np.ndarray,
    frame: Size = FRAME_SIZE,
) -> Transform:
    """Draw a window and a flip, of both modalities or of each, and a distortion of each by itself.

    What options of 0 ask for draws nothing, so that all else is the same without it.

    Args:
        people: (n, 4) xyxy pixels of the persons in the frame; mean: as from `frame_mean`.
        size: (height, width) of the network's input; filler: (C,) uint8; frame: its width and height.
    """
    how = (rng, people, options, frame)
    if not options.crop_apart:
        windows = [random_window(*how)] * 2
    elif rng.random() < options.crop_apart:
        windows = [unpaired_window(*how), unpaired_window(*how)]
    else:
        windows = [(0, 0, *frame)] * 2
    flips = [bool(rng.random() < 0.5)] * 2
    if options.mirror_apart and flips[1]:
        flips[1] = bool(rng.random() >= options.mirror_apart)
    if options.shift_left and rng.random() < options.shift_left:
        shift = int(rng.integers(MAX_SHIFT + 1))
        windows = [(x0 + shift, y0, x1 + shift, y1) for x0, y0, x1, y1 in windows]
    crops = [round_to_pixels(window, size, flip, frame) for window, flip in zip(windows, flips, strict=True)]
    matrix, offset = np.eye(len(mean), dtype=np.float32), np.zeros(len(mean), np.float32)
    for part in channel_parts(len(mean)):
        if part.stop - part.start == 3 or options.lwir_jitter:
            matrix[part, part], offset[part] = colour_matrix(rng, mean[part], options.hue_saturation)
        if options.jitter and rng.random() < options.jitter:
            matrix[part, part], offset[part] = extra_colour_jitter(rng, matrix[part, part], offset[part])
    if options.modality_dropout and rng.random() < options.modality_dropout:
        visible, lwir = channel_parts(4)
        gone = visible if rng.random() < 0.5 else lwir
        matrix[gone], offset[gone] = 0, filler[gone]
    crops = tuple(dict.fromkeys(crops))  # equal ones are one of both
    limits = (options.min_input_height, options.crop_apart > 0)
    return Transform(crops, matrix, offset, size, filler, *limits)


def channel_parts(channels: int) -> list[slice]:
    """The channels of each modality, visible first."""
    return [slice(0, 3), slice(3, 4)] if channels == 4 else [slice(0, channels)]


def mean_colour(channels: int) -> np.ndarray:
    """(C,) uint8: the mean colour of KAIST's frames, which normalisation turns into zero."""
    return MEAN_COLOUR[3:] if channels == 1 else MEAN_COLOUR[:channels]


def apply_colour_matrix(content: Tensor, matrix: np.ndarray, offset: np.ndarray) -> Tensor:
    """matrix (C, C) times each colour of (C, h, w) uint8, plus offset (C,), rounded and clipped."""
    if not offset.any() and np.array_equal(matrix, np.eye(len(matrix))):
        return content
    offset = torch.from_numpy(offset).unsqueeze(1) + 0.5  # the conversion to uint8 truncates
    pixels = torch.addmm(offset, torch.from_numpy(matrix), content.flatten(1).float())
    # By numpy: torch converts float to uint8 six times slower on a CPU.
    pixels = pixels.clamp_(0, 255).numpy().astype(np.uint8)
    return torch.from_numpy(pixels).view_as(content)
