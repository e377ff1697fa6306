"""Augmentation: windows, colours and moved boxes, compared with the paper and torchvision."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import rgb_to_hsv
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from kaist.frames import BOTH
from ssd.augment import (
    LUMA,
    Augmentation,
    Transform,
    apply_colour_matrix,
    colour_matrix,
    frame_mean,
    mean_colour,
    random_window,
    round_to_pixels,
    sample_transform,
    whole_frame,
)

SIZE = (300, 300)


def geometry(window, flip=False, channels=4):
    """A Transform that shows a window and does not change colours."""
    plain = whole_frame(channels, SIZE)
    crop = round_to_pixels(window, SIZE, flip)
    return Transform((crop,), plain.matrix, plain.offset, SIZE, mean_colour(channels))


@pytest.mark.parametrize("window", [(639.7, 511.7, 700, 600), (-60, -60, 0.3, 0.3), (10.2, 10.2, 10.3, 10.3)])
def test_a_crop_has_at_least_one_pixel_of_frame_and_input(window):
    (x0, y0, x1, y1), (left, top, right, bottom), _ = round_to_pixels(window, SIZE, False)
    assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 512
    assert 0 <= left < right <= 300 and 0 <= top < bottom <= 300


def test_boxes_follow_the_pixels():
    """For any window, a bright rectangle in both modalities is where its box says."""
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(300):
        x, y = rng.integers(20, 500), rng.integers(20, 350)
        w, h = rng.integers(30, 100), rng.integers(60, 140)
        frame = np.zeros((512, 640, 4), np.uint8)
        frame[y : y + h, x : x + w] = 255
        box = np.array([[x, y, x + w, y + h]], np.float32)
        t = geometry(random_window(rng, box, Augmentation(zoom_out=4.0)), flip=bool(rng.random() < 0.5))
        image = t.apply(frame)
        filler = (image == torch.from_numpy(t.filler).view(4, 1, 1)).all(0)
        boxes, labels = t.move(box, np.array([1]), np.array([BOTH]))
        if not len(boxes):
            continue
        seen += 1
        x0, y0, x1, y1 = (boxes[0] * 300).tolist()
        for channel in image:
            bright = (channel > 127) & ~filler
            rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(found) - (x0, y0, x1, y1)).max() <= 1.01
    assert seen > 200


def test_around_the_frame_is_the_filler_undistorted():
    frame, filler = np.full((512, 640, 3), 90, np.uint8), np.array([7, 200, 31], np.uint8)
    for seed in range(40):
        t = sample_transform(
            np.random.default_rng(seed), np.zeros((0, 4)), frame_mean(frame), Augmentation(), SIZE, filler
        )
        image = t.apply(frame)
        around = (image == torch.from_numpy(filler).view(3, 1, 1)).all(0)
        x0, y0, x1, y1 = t.crops[0].target
        assert (~around).sum() == (x1 - x0) * (y1 - y0)
        assert (image[:, ~around] == image[:, ~around][:, :1]).all()


def test_one_resize_equals_canvas_crop_and_resize():
    """Compared with a straightforward implementation: paste on a mean-coloured canvas, crop, then resize."""
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
    frame = np.array(smooth.resize((640, 512), Image.Resampling.BICUBIC))
    differences = []
    for _ in range(40):
        window = random_window(rng, np.zeros((0, 4)), Augmentation(zoom_out=3.0))
        window = tuple(float(round(edge)) for edge in window)
        ours = geometry(window, channels=3).apply(frame).numpy().transpose(1, 2, 0)
        x0, y0, x1, y1 = map(int, window)
        canvas = np.tile(mean_colour(3), (y1 - y0, x1 - x0, 1))
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, 640), min(y1, 512)
        canvas[top - y0 : bottom - y0, left - x0 : right - x0] = frame[top:bottom, left:right]
        plain = np.asarray(Image.fromarray(canvas).resize((300, 300), Image.Resampling.BILINEAR))
        differences.append(np.abs(plain.astype(int) - ours).mean())
    assert np.mean(differences) < 1.0 and max(differences) < 4


def plain_window(rng, people, zoom_out):
    """SSD's sampling as described in the paper, one trial at a time."""
    x, y, w, h = 0.0, 0.0, 640.0, 512.0
    if rng.random() < 0.5:
        scale = rng.uniform(1, zoom_out)
        x, y = -rng.uniform(0, scale * w - w), -rng.uniform(0, scale * h - h)
        w, h = w * scale, h * scale
    while True:
        least = rng.choice([None, 0, 0.1, 0.3, 0.5, 0.7, 0.9])
        if least is None:
            return x, y, x + w, y + h
        for _ in range(50):
            cw, ch = rng.uniform(0.3 * w, w), rng.uniform(0.3 * h, h)
            if not 0.5 < ch / cw < 2:
                continue
            cx, cy = x + rng.uniform(0, w - cw), y + rng.uniform(0, h - ch)
            overlap, holds = 0.0, False
            for x0, y0, x1, y1 in people:
                iw = max(0, min(x1, cx + cw) - max(x0, cx))
                ih = max(0, min(y1, cy + ch) - max(y0, cy))
                shared = iw * ih
                overlap = max(overlap, shared / (cw * ch + (x1 - x0) * (y1 - y0) - shared))
                holds |= cx < (x0 + x1) / 2 < cx + cw and cy < (y0 + y1) / 2 < cy + ch
            if overlap >= least and holds:
                return cx, cy, cx + cw, cy + ch


def torchvision_window(people):
    """A window from the parameters of torchvision's zoom-out and IoU crop."""
    x, y, w, h = 0, 0, 640, 512
    if torch.rand(1) < 0.5:
        left, top, right, bottom = v2.RandomZoomOut().make_params([image_of(w, h)])["padding"]
        x, y, w, h = -left, -top, w + left + right, h + top + bottom
    shifted = torch.tensor(people) - torch.tensor([x, y, x, y])
    boxes = tv_tensors.BoundingBoxes(shifted, format="XYXY", canvas_size=(h, w))
    crop = v2.RandomIoUCrop(trials=50).make_params([image_of(w, h), boxes])
    if not crop:
        return x, y, x + w, y + h
    x, y = x + crop["left"], y + crop["top"]
    return x, y, x + crop["width"], y + crop["height"]


def image_of(width, height):
    """An image of a given size that shares one pixel."""
    return tv_tensors.Image(torch.empty(1, 1, 1).expand(1, height, width))


@pytest.mark.parametrize("recipe", ["the paper's", "torchvision's"])
def test_windows_have_the_recipes_distribution(recipe):
    """Kolmogorov-Smirnov test on edges, size and shape of thousands of windows."""
    people = np.array([[100.0, 100, 300, 480], [500, 200, 530, 280]])
    n = 4000 if recipe == "the paper's" else 500
    ours_rng, plain_rng = np.random.default_rng(2), random.Random(3)  # numpy's is slow, number by number
    ours = np.array([random_window(ours_rng, people, Augmentation(zoom_out=4.0)) for _ in range(n)])
    if recipe == "the paper's":
        plain = np.array([plain_window(plain_rng, people, 4.0) for _ in range(n)])
    else:
        people = people[:1]  # of several, torchvision's overlap and centre are the same person's
        torch.manual_seed(0)
        ours = np.array([random_window(ours_rng, people, Augmentation(zoom_out=4.0)) for _ in range(n)])
        plain = np.array([torchvision_window(people) for _ in range(n)])
    size = ours[:, 2:] - ours[:, :2], plain[:, 2:] - plain[:, :2]
    columns = [(ours[:, k], plain[:, k]) for k in range(4)]
    columns += [[s.prod(1) ** 0.5 for s in size], [100 * s[:, 1] / s[:, 0] for s in size]]
    for a, b in columns:
        both = np.sort(np.concatenate([a, b]).round())  # torchvision's windows are whole pixels
        ranks = [np.searchsorted(np.sort(x.round()), both, "right") / n for x in (a, b)]
        assert np.abs(ranks[0] - ranks[1]).max() < 1.95 * (2 / n) ** 0.5  # the 0.1% point


def test_frames_without_people_are_cropped_too():
    rng = np.random.default_rng(0)
    windows = np.array([random_window(rng, np.zeros((0, 4)), Augmentation(zoom_out=1.0)) for _ in range(200)])
    assert 0.7 < ((windows[:, 2] - windows[:, 0]) < 639).mean() < 0.95


def test_persons_need_their_centre_in_view_and_crowds_any_pixel():
    box = np.array([[90.0, 100, 130, 200]] * 2, np.float32)
    t = geometry((112, 0, 432, 512))  # the centre, 110, is just outside
    boxes, labels = t.move(box, np.array([1, -1]), np.full(2, BOTH))
    assert labels.tolist() == [-1]
    assert np.allclose(boxes[0], [0, 100 / 512, 18 / 320, 200 / 512], atol=0.01)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation", "hue"])
def test_colour_steps_against_torchvision(kind):
    """Each distortion as a matrix against torchvision's, on mid-range colours (no clipping)."""
    factor = 0.8

    class Script:
        """A generator that applies one kind alone, by a fixed factor."""

        def permutation(self, kinds):
            return [kind]

        def random(self):
            return 0.0

        def uniform(self, low, high):
            return 9.0 if low < 0 else factor

    image = torch.randint(90, 150, (3, 40, 50), generator=torch.manual_seed(0))
    mean = image.float().mean((1, 2)).numpy()
    matrix, offset = colour_matrix(Script(), mean, hue_saturation=True)
    ours = np.einsum("ij,jhw->ihw", matrix, image) + offset[:, None, None]
    adjust = {
        "brightness": TF.adjust_brightness,
        "contrast": TF.adjust_contrast,
        "saturation": TF.adjust_saturation,
    }.get(kind)
    if kind == "hue":  # a rotation by 9 degrees here, a walk around the HSV hexagon there
        hues = [rgb_to_hsv(colours.transpose(1, 2, 0) / 255)[..., 0] for colours in (ours, image.numpy())]
        turn = 360 * ((hues[0] - hues[1] + 0.5) % 1 - 0.5)
        assert 6 < abs(turn.mean()) < 12
        assert np.allclose(*(np.tensordot(LUMA, colours, 1) for colours in (ours, image.numpy())), atol=0.1)
        return
    theirs = adjust(image.float() / 255, factor) * 255
    assert np.abs(ours - theirs.numpy()).mean() < 0.05


def draw(frame, rng):
    mean = frame_mean(frame)
    return sample_transform(rng, np.zeros((0, 4)), mean, Augmentation(), SIZE, mean_colour(len(mean)))


def test_modalities_are_distorted_independently():
    frame = np.full((512, 640, 4), 100, np.uint8)
    frame[..., 3] = 200
    content = torch.from_numpy(frame[:30, :30].transpose(2, 0, 1).copy())
    drawn = [draw(frame, np.random.default_rng(i)) for i in range(60)]
    distorted = [apply_colour_matrix(content, t.matrix, t.offset) for t in drawn]
    changed = torch.stack([image.flatten(1).float().mean(1) for image in distorted])
    assert (changed[:, 3] != 200).float().mean() > 0.3
    ratios = changed[:, 3] / changed[:, 0]
    assert ratios.std() > 0.1  # not one draw for both
    alone = draw(frame[..., 3:], np.random.default_rng(0))
    assert alone.matrix.shape == (1, 1) and alone.offset.shape == (1,)


def test_undistorted_pixels_are_not_copied():
    content = torch.randint(256, (4, 30, 30), dtype=torch.uint8)
    whole = whole_frame(4, SIZE)
    assert apply_colour_matrix(content, whole.matrix, whole.offset) is content
    frame = np.full((512, 640, 1), 9, np.uint8)
    alone = [draw(frame, np.random.default_rng(i)).matrix[0, 0] == 1 for i in range(100)]
    assert 10 < sum(alone) < 45  # neither brightness nor contrast: a quarter


def test_distortion_is_the_matrix_rounded_and_clipped():
    frame = np.random.default_rng(0).integers(0, 256, (512, 640, 4), dtype=np.uint8)
    content = torch.from_numpy(frame[:30, :30].transpose(2, 0, 1).copy())
    for seed in range(20):
        t = draw(frame, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)  # the window and the flip are drawn first
        random_window(rng, np.zeros((0, 4)), Augmentation(zoom_out=4.0)), rng.random()
        mean = frame[::8, ::8].mean((0, 1))
        expected = []
        for part in (slice(0, 3), slice(3, 4)):
            matrix, offset = colour_matrix(rng, mean[part], True)
            expected.append(np.einsum("ij,jhw->ihw", matrix, content[part]) + offset[:, None, None])
        expected = np.concatenate(expected).clip(0, 255)
        ours = apply_colour_matrix(content, t.matrix, t.offset).numpy()
        assert np.abs(ours - expected).max() < 0.51  # to the nearest


def test_crops_stay_within_crop_aspect():
    rng, person = np.random.default_rng(0), np.array([[300.0, 200, 340, 300]])
    widest = {(0.4, 1.6): 0.0, (0.8, 1.2): 0.0}
    for limits in widest:
        for _ in range(300):
            x0, y0, x1, y1 = random_window(rng, person, Augmentation(zoom_out=1.0, crop_aspect=limits))
            aspect = (x1 - x0) / (y1 - y0) / 1.25  # in that of the frame, 640 x 512
            assert limits[0] < aspect < limits[1]
            widest[limits] = max(widest[limits], aspect)
    assert widest[0.4, 1.6] > 1.5 and widest[0.8, 1.2] > 1.15


def test_persons_below_the_minimum_input_height_are_ignored():
    """20 pixels of 512 are 11.7 of 300; zoomed out twice, 5.9."""
    boxes, labels = np.array([[300, 200, 310, 220], [100, 100, 150, 220]], np.float32), np.array([1, 1])
    for zoom, expected in ((1, [BOTH, BOTH]), (2, [-1, BOTH])):
        crop = round_to_pixels((0, 0, 640 * zoom, 512 * zoom), SIZE, flip=False)
        transform = replace(whole_frame(4, SIZE), crops=(crop,), min_height=10.0)
        assert transform.move(boxes, labels, np.full(2, BOTH))[1].tolist() == expected
    rng = np.random.default_rng(0)
    options = Augmentation(min_input_height=10.0)
    drawn = sample_transform(rng, boxes, np.zeros(4), options, SIZE, mean_colour(4))
    assert drawn.min_height == 10.0 and whole_frame(4, SIZE).min_height == 0.0
