"""SSD's augmentation for registered pairs of visible and LWIR images.

`sample_transform` samples a `Transform`, which is applied to a frame's pixels and boxes. Zoom-out, crop and
shift are composed into one window of the frame, so that pixels are resampled once. In all functions
`person_boxes` are (n, 4) xyxy pixels of the frame, `frame` is its (width, height), and `size` is the network
input's (height, width).

Sources: SSD paper, sections 2.2 (crops, distortion) and 3.6 (zoom-out); separate crops and flips of the
modalities: Kim et al., "MLPD" (RA-L 2021); shift to the left: Lee et al., "INSANet" (Sensors 2024).
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

Window = tuple[float, float, float, float]  # xyxy pixels of the frame
Size = tuple[int, int]
Objects = tuple[np.ndarray, np.ndarray]  # boxes (k, 4) float32 xyxy fractions of the input, labels (k,) int64
AffineMap = tuple[np.ndarray, np.ndarray]  # matrix (c, c) and offset (c,) that map colours
CROP_OVERLAPS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # minimum IoU of a crop and a person; None: no crop
CROP_TRIALS = 50
MAX_SHIFT = 20  # pixels of the frame
MIN_BOX_SIDE = 1.0  # pixels of the network's input; cropped boxes with a smaller side are dropped
# Luma weights (ITU-R BT.601) and the RGB -> YIQ matrix, in which a hue shift is a rotation.
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)


@dataclass(frozen=True)
class Augmentation:
    """Options of the training augmentation."""

    # Largest side of the zoomed-out canvas, as a multiple of the frame's; sides and area of an
    # `unpaired_window` are 1 / zoom_out to zoom_out times the frame's.
    zoom_out: float = 4.0
    # Limits of a crop's width / height, as multiples of the frame's; SSD's own are 0.5 and 2 in pixels.
    crop_aspect: tuple[float, float] = (0.4, 1.6)
    min_input_height: float = 0.0  # persons lower than this in the network's input are ignored (pixels)
    hue_saturation: bool = True  # distort hue and saturation of the visible image too
    lwir_jitter: bool = True  # distort brightness and contrast of the LWIR image
    jitter: float = 0.0  # probability of `extra_colour_jitter` (each modality) and `add_blur_and_noise`
    copy_paste: float = 0.0  # probability that persons of another frame are pasted into a frame
    modality_dropout: float = 0.0  # probability that one modality, either with equal chance, is blanked
    # Probability that each modality has its own `unpaired_window`, otherwise the frame is not cropped.
    # 0: one `random_window` for both.
    crop_apart: float = 0.0
    mirror_apart: float = 0.0  # probability that LWIR is not mirrored when visible is
    shift_left: float = 0.0  # probability that both modalities are shifted left, by 0 to `MAX_SHIFT` pixels


def random_window(
    rng: np.random.Generator, person_boxes: np.ndarray, options: Augmentation, frame: Size = FRAME_SIZE
) -> Window:
    """Sample SSD's zoom-out and IoU crop as one window, which may reach outside the frame.

    With probability 1/2 the frame is placed on a canvas 1 to `zoom_out` times its size. Then a minimum
    IoU is sampled from `CROP_OVERLAPS`: None returns the canvas. Otherwise the first of 50 crops, of 0.3 to 1
    times the canvas's sides, is returned that passes `crops_with_person`. If none does, another IoU is
    sampled. Without persons, at least half of the crop's area has to show the frame.
    """
    x, y, w, h = 0.0, 0.0, float(frame[0]), float(frame[1])
    if rng.random() < 0.5:
        scale = rng.uniform(1, options.zoom_out)
        x = -rng.uniform(0, (scale - 1) * w)
        y = -rng.uniform(0, (scale - 1) * h)
        w, h = w * scale, h * scale
    while True:
        min_iou = CROP_OVERLAPS[rng.integers(len(CROP_OVERLAPS))]
        if min_iou is None:
            return x, y, x + w, y + h
        sides = rng.uniform(0.3, 1, (CROP_TRIALS, 2)) * (w, h)
        corner = (x, y) + rng.random((CROP_TRIALS, 2)) * ((w, h) - sides)
        aspect = sides[:, 0] / sides[:, 1] * (frame[1] / frame[0])
        fits = (aspect > options.crop_aspect[0]) & (aspect < options.crop_aspect[1])
        crops = np.concatenate([corner, corner + sides], axis=1)
        if len(person_boxes):
            fits &= crops_with_person(crops, person_boxes, min_iou)
        else:
            intersection = crops[:, 2:].clip(max=frame) - crops[:, :2].clip(0)
            fits &= intersection.clip(0).prod(1) >= 0.5 * sides.prod(1)
        if fits.any():
            return tuple(crops[fits.argmax()].tolist())


def crops_with_person(crops: np.ndarray, person_boxes: np.ndarray, min_iou: float) -> np.ndarray:
    """(t,) bool: crops (t, 4) that contain the centre of a person and overlap some person by `min_iou`."""
    centres = (person_boxes[:, :2] + person_boxes[:, 2:]) / 2
    crops = crops[:, None]
    has_centre = ((centres > crops[..., :2]) & (centres < crops[..., 2:])).all(2).any(1)
    low = np.maximum(crops[..., :2], person_boxes[:, :2])
    high = np.minimum(crops[..., 2:], person_boxes[:, 2:])
    intersection = (high - low).clip(0).prod(2)
    areas = (crops[..., 2:] - crops[..., :2]).prod(2) + (person_boxes[:, 2:] - person_boxes[:, :2]).prod(1)
    return has_centre & ((intersection / (areas - intersection)).max(1) >= min_iou)


def unpaired_window(
    rng: np.random.Generator, person_boxes: np.ndarray, options: Augmentation, frame: Size = FRAME_SIZE
) -> Window:
    """Sample MLPD's crop of one modality.

    Returns the first of 50 windows whose sides and area are 1 / `zoom_out` to `zoom_out` times the frame's
    and which contains a whole person, if the frame has any. If no window does, returns the whole frame. Along
    each axis the window is inside the frame where it is smaller, and contains it where it is larger.
    """
    max_scale = options.zoom_out
    width = rng.uniform(1 / max_scale, max_scale, CROP_TRIALS)
    sides = np.stack([width, width / rng.uniform(*options.crop_aspect, CROP_TRIALS)], axis=1)
    corner = rng.random((CROP_TRIALS, 2)) * (1 - sides)
    windows = np.concatenate([corner, corner + sides], axis=1) * np.tile(frame, 2)
    fits = (np.abs(np.log(np.column_stack([sides, sides.prod(1)]))) <= np.log(max_scale)).all(1)
    if len(person_boxes):
        low, high = windows[:, None, :2], windows[:, None, 2:]
        is_inside = (person_boxes[:, :2] > low) & (person_boxes[:, 2:] < high)
        fits &= is_inside.all(2).any(1)
    return tuple(windows[fits.argmax()].tolist()) if fits.any() else (0, 0, *frame)


class Crop(NamedTuple):
    """A rectangle of the frame and its place in the network's input, both xyxy in whole pixels."""

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]  # the rest of the input is filler
    flip: bool  # mirror the input afterwards


def round_to_pixels(window: Window, size: Size, flip: bool, frame: Size = FRAME_SIZE) -> Crop:
    """Round a window to the `Crop` that shows it in the input.

    Boxes are moved by the rounded crop as well, so that they fit the pixels exactly.
    """
    low, high = np.array(window, float).reshape(2, 2)
    extent, length = np.array(frame), np.array(size[::-1])
    scale = length / (high - low)
    start = low.round().clip(0, extent - 1)
    end = np.maximum(high.round().clip(max=extent), start + 1)
    target_start = ((start - low) * scale).round().clip(0, length - 1)
    target_end = np.maximum(((end - low) * scale).round().clip(max=length), target_start + 1)
    source, target = np.stack([[*start, *end], [*target_start, *target_end]]).astype(int).tolist()
    return Crop(tuple(source), tuple(target), flip)


def colour_matrix(rng: np.random.Generator, mean: np.ndarray, hue_saturation: bool) -> AffineMap:
    """Sample SSD's photometric distortion of one modality as a matrix and an offset.

    Brightness and contrast are scaled by 0.5 to 1.5. For RGB, saturation is scaled by 0.5 to 1.5 and hue is
    rotated by up to 18 degrees. Each has probability 1/2, and their order is random. Contrast is scaled
    around the luma of `mean` (c,), the frame's mean colour.
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


def extra_colour_jitter(rng: np.random.Generator, matrix: np.ndarray, offset: np.ndarray) -> AffineMap:
    """Compose a distortion beyond SSD's with the colour matrix and offset of one modality.

    RGB: a gain of 0.6 to 1.5 for each channel, an offset of -15 to 15, and grey with probability 0.2. LWIR: a
    gain of 0.4 to 2.5 and an offset of -20 to 40; with probability 0.05 a negative gain and an offset of 80.
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
    """Distort an input image (C, h, w) uint8 by noise and, with probability 1/2, blur, for each modality.

    The blur is at most a 3x3 mean. The noise has a spread of at most 12 grey levels in visible, 3 in LWIR.
    """
    parts = []
    max_noises = (12, 3) if len(image) > 1 else (3,)
    for part, max_noise in zip(channel_parts(len(image)), max_noises, strict=False):
        content = image[part].float()
        if rng.random() < 0.5:
            blurred = F.avg_pool2d(content, 3, 1, 1, count_include_pad=False)
            content = torch.lerp(content, blurred, rng.random())
        noise = rng.standard_normal(content.shape, np.float32) * np.float32(rng.uniform(0, max_noise))
        parts.append((content + torch.from_numpy(noise) + 0.5).clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


def frame_mean(frame: np.ndarray) -> np.ndarray:
    """(C,) float32 mean colour of a frame (h, w, C) uint8, estimated from every eighth row and column."""
    return torch.from_numpy(frame)[::8, ::8].float().mean((0, 1)).numpy()


@dataclass(frozen=True)
class Transform:
    """A sampled augmentation, for a frame's pixels (`apply`) and its boxes (`move`)."""

    crops: tuple[Crop, ...]  # one for all channels, or one for visible and one for LWIR
    matrix: np.ndarray  # (C, C) float32, see `apply_colour_matrix`
    offset: np.ndarray  # (C,) float32
    size: Size
    filler: np.ndarray  # (C,) uint8, the colour outside the frame
    min_height: float = 0.0  # persons lower than this in the input are ignored (pixels)
    ignore_truncated: bool = False  # persons cut by the border of the input are ignored

    def apply(self, pixels: np.ndarray) -> Tensor:
        """Transform a frame's pixels (h, w, C) uint8 to the network's input (C, *size) uint8."""
        height, width = self.size
        image = torch.from_numpy(self.filler).view(-1, 1, 1).repeat(1, height, width)
        parts = channel_parts(len(image)) if len(self.crops) == 2 else [slice(None)]
        for crop, part in zip(self.crops, parts, strict=True):
            (x0, y0, x1, y1), (left, top, right, bottom), flip = crop
            cropped = torch.from_numpy(pixels[y0:y1, x0:x1, part]).permute(2, 0, 1).unsqueeze(0)
            size = (bottom - top, right - left)
            resized = F.interpolate(cropped, size, mode="bilinear", antialias=True, align_corners=False)[0]
            resized = apply_colour_matrix(resized, self.matrix[part, part], self.offset[part])
            if flip:
                left, right, resized = width - right, width - left, resized.flip(2)
            image[part, top:bottom, left:right] = resized
        return image

    def move(self, boxes_px: np.ndarray, labels: np.ndarray, seen: np.ndarray) -> Objects:
        """Transform a frame's objects, given as in `Frame`, to the network's input.

        With one crop, persons are labelled `BOTH`. With two, each modality has the boxes that are seen in it,
        labelled `VISIBLE` or `LWIR`, and equal boxes are merged. Ignored objects stay -1.
        """
        moved, modalities = [], (VISIBLE, LWIR) if len(self.crops) == 2 else (BOTH,)
        for crop, modality in zip(self.crops, modalities, strict=True):
            is_seen = seen & modality > 0
            crop_labels = np.where(labels[is_seen] == 1, modality, labels[is_seen])
            moved.append(self.crop_boxes(crop, boxes_px[is_seen], crop_labels))
        return moved[0] if len(moved) == 1 else merge_equal(*map(np.concatenate, zip(*moved, strict=True)))

    def crop_boxes(self, crop: Crop, boxes_px: np.ndarray, labels: np.ndarray) -> Objects:
        """`move` for one crop and boxes (n, 4) xyxy pixels of the frame.

        Persons are kept if their centre is inside the input, as in SSD. Ignored objects are kept if any part
        is inside, so that none of it is mined as background. Boxes are clipped to the input, and dropped if a
        side is below `MIN_BOX_SIDE`.
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
        is_kept = (in_view | (labels == -1)) & ((boxes[:, 1] - boxes[:, 0]) >= MIN_BOX_SIDE).all(1)
        labels = np.where(boxes[:, 1, 1] - boxes[:, 0, 1] < self.min_height, -1, labels)
        return (boxes[is_kept] / limit).reshape(-1, 4), labels[is_kept]


def whole_frame(channels: int, size: Size, frame: Size = FRAME_SIZE) -> Transform:
    """The transform that only resizes a frame to the network's input."""
    crop = round_to_pixels((0, 0, *frame), size, False, frame)
    zeros = np.zeros(channels, np.float32)
    return Transform((crop,), np.eye(channels, dtype=np.float32), zeros, size, zeros.astype(np.uint8))


def sample_transform(
    rng: np.random.Generator,
    person_boxes: np.ndarray,
    mean: np.ndarray,
    options: Augmentation,
    size: Size,
    filler: np.ndarray,
    frame: Size = FRAME_SIZE,
) -> Transform:
    """Sample the windows, flips and colours of one training sample.

    Options that are 0 use no random numbers, so that they leave the rest of the sample unchanged.

    Args:
        mean: (C,) mean colour of the frame, as from `frame_mean`.
        filler: (C,) uint8, the colour outside the frame and of a blanked modality.
    """
    window_args = (rng, person_boxes, options, frame)
    if not options.crop_apart:
        windows = [random_window(*window_args)] * 2
    elif rng.random() < options.crop_apart:
        windows = [unpaired_window(*window_args) for _ in range(2)]
    else:
        windows = [(0, 0, *frame)] * 2
    flips = [bool(rng.random() < 0.5)] * 2
    if options.mirror_apart and flips[1]:
        flips[1] = bool(rng.random() >= options.mirror_apart)
    if options.shift_left and rng.random() < options.shift_left:
        shift = int(rng.integers(MAX_SHIFT + 1))
        windows = [(x0 + shift, y0, x1 + shift, y1) for x0, y0, x1, y1 in windows]
    crops = [round_to_pixels(window, size, flip, frame) for window, flip in zip(windows, flips, strict=True)]
    crops = tuple(dict.fromkeys(crops))  # one crop if both are equal
    matrix, offset = np.eye(len(mean), dtype=np.float32), np.zeros(len(mean), np.float32)
    for part in channel_parts(len(mean)):
        if part.stop - part.start == 3 or options.lwir_jitter:
            matrix[part, part], offset[part] = colour_matrix(rng, mean[part], options.hue_saturation)
        if options.jitter and rng.random() < options.jitter:
            matrix[part, part], offset[part] = extra_colour_jitter(rng, matrix[part, part], offset[part])
    if options.modality_dropout and rng.random() < options.modality_dropout:
        visible, lwir = channel_parts(4)
        dropped = visible if rng.random() < 0.5 else lwir
        matrix[dropped], offset[dropped] = 0, filler[dropped]
    ignore_truncated = options.crop_apart > 0
    return Transform(crops, matrix, offset, size, filler, options.min_input_height, ignore_truncated)


def channel_parts(channels: int) -> list[slice]:
    """The channels of each modality, visible first."""
    return [slice(0, 3), slice(3, 4)] if channels == 4 else [slice(0, channels)]


def mean_colour(channels: int) -> np.ndarray:
    """(C,) uint8 mean colour of KAIST's frames, which normalisation turns into zero."""
    return MEAN_COLOUR[3:] if channels == 1 else MEAN_COLOUR[:channels]


def apply_colour_matrix(image: Tensor, matrix: np.ndarray, offset: np.ndarray) -> Tensor:
    """Map each colour c of an image (C, h, w) uint8 to matrix @ c + offset, rounded and clipped to uint8."""
    if not offset.any() and np.array_equal(matrix, np.eye(len(matrix))):
        return image
    offset = torch.from_numpy(offset).unsqueeze(1) + 0.5  # the conversion to uint8 truncates
    pixels = torch.addmm(offset, torch.from_numpy(matrix), image.flatten(1).float())
    # By numpy: torch converts float to uint8 six times slower on a CPU.
    pixels = pixels.clamp_(0, 255).numpy().astype(np.uint8)
    return torch.from_numpy(pixels).view_as(image)
