"""Unpaired crops and flips: each modality has its own window, and boxes follow the image they are seen in."""

import numpy as np
import pytest
import torch

from kaist.annotations import open_annotations
from kaist.frames import BOTH, LWIR, VISIBLE, load_frames
from ssd.augment import (
    Augmentation,
    Transform,
    mean_colour,
    round_to_pixels,
    sample_transform,
    unpaired_window,
    whole_frame,
)

SIZE = (256, 320)
NOBODY = np.zeros((0, 4), np.float32)


def sample(seed, people=NOBODY, **options):
    rng = np.random.default_rng(seed)
    return sample_transform(rng, people, np.zeros(4), Augmentation(**options), SIZE, mean_colour(4))


def transform(*windows, flips=(False, False), **changes):
    plain = whole_frame(4, SIZE)
    crops = tuple(round_to_pixels(w, SIZE, flip) for w, flip in zip(windows, flips, strict=False))
    return Transform(crops, plain.matrix, plain.offset, SIZE, mean_colour(4), **changes)


def extent(bright):
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_each_modalitys_boxes_follow_its_own_pixels():
    """In each sample a bright box in visible and another one in LWIR are where their boxes say."""
    rng, apart = np.random.default_rng(0), 0
    for seed in range(150):
        w, h = rng.integers(30, 90), rng.integers(60, 140)
        x, y = rng.integers(20, 530), rng.integers(20, 350)
        boxes = np.array([[x, y, x + w, y + h], [x + 8, y + 2, x + 8 + w, y + 2 + h]], np.float32)
        frame = np.zeros((512, 640, 4), np.uint8)
        for box, channels in zip(boxes.astype(int), (slice(3), slice(3, 4)), strict=True):
            frame[box[1] : box[3], box[0] : box[2], channels] = 255
        seen = np.array([VISIBLE, LWIR])
        options = {"hue_saturation": False, "crop_apart": 0.5, "mirror_apart": 0.5, "shift_left": 0.5}
        t = sample(seed, boxes, **options)
        plain = Transform(t.crops, np.eye(4, dtype=np.float32), np.zeros(4, np.float32), SIZE, t.filler)
        image = plain.apply(frame).numpy()
        moved, labels = plain.move(boxes, np.array([1, 1]), seen)
        is_apart = len(t.crops) == 2
        apart += is_apart
        assert is_apart or (labels == BOTH).all()
        places = zip(moved * np.tile(SIZE[::-1], 2), labels, strict=True)
        for i, (box, label) in enumerate(places):
            assert label in ((VISIBLE, LWIR) if is_apart else (BOTH,))
            modality = label if is_apart else seen[i] if len(moved) == 2 else None
            if modality is None:
                continue
            channel = 0 if modality == VISIBLE else 3
            found = extent((image[channel] > 127) & (image[channel] != t.filler[channel]))
            assert np.abs(np.array(found) - box).max() <= 1.01
    assert 60 < apart < 130  # 0.5 + 0.5 * 0.25 of 150


def test_labels_of_paired_and_unpaired_crops():
    boxes = np.array([[100, 100, 140, 200], [300, 100, 340, 200], [304, 100, 344, 200], [400, 100, 440, 200]])
    boxes, seen = boxes.astype(np.float32), np.array([BOTH, VISIBLE, LWIR, LWIR])
    labels = np.array([1, 1, 1, -1])
    frame = (0, 0, 640, 512)
    moved, found = transform(frame).move(boxes, labels, seen)
    assert found.tolist() == [BOTH, BOTH, BOTH, -1] and np.allclose(moved * (640, 512, 640, 512), boxes)
    moved, found = transform(frame, frame, flips=(False, True)).move(boxes, labels, seen)
    assert found.tolist() == [VISIBLE, VISIBLE, LWIR, LWIR, -1]
    xs = (moved * 640)[:, 0].round().tolist()
    assert xs == [100, 300, 640 - 140, 640 - 344, 640 - 440]


def test_boxes_that_become_equal_are_merged():
    """A person in the middle of a mirrored frame; and a visible one where LWIR has an ignored object."""
    frame = (0, 0, 640, 512)
    boxes = np.array([[300, 100, 340, 200], [100, 50, 150, 250], [490, 50, 540, 250]], np.float32)
    t = transform(frame, frame, flips=(False, True))
    moved, labels = t.move(boxes, np.array([1, 1, -1]), np.array([BOTH, VISIBLE, LWIR]))
    assert labels.tolist() == [BOTH, -1] and len(moved) == 2


def test_truncated_persons_are_ignored_on_request():
    boxes = np.array(
        [[300, 100, 340, 200], [10, 100, 70, 300], [0, 100, 40, 200], [0, 0, 20, 50]], np.float32
    )
    window, objects = (30, 0, 670, 512), (np.ones(4, np.int64), np.full(4, BOTH))
    assert transform(window).move(boxes, *objects)[1].tolist() == [BOTH, BOTH]
    assert transform(window, ignore_truncated=True).move(boxes, *objects)[1].tolist() == [BOTH, -1, -1]
    assert sample(0, crop_apart=0.1).ignore_truncated and not sample(0, mirror_apart=0.9).ignore_truncated


def test_unpaired_windows_are_as_published():
    rng = np.random.default_rng(1)
    people = np.array([[200.0, 150, 240, 250], [500, 200, 530, 270]])
    options = Augmentation(zoom_out=4.0, crop_aspect=(0.8, 1.2))
    windows = np.array([unpaired_window(rng, people, options) for _ in range(1500)])
    size = (windows[:, 2:] - windows[:, :2]) / (640, 512)
    area, aspect = size.prod(1), size[:, 0] / size[:, 1]
    assert 0.25 <= area.min() < 0.3 and 3.7 < area.max() <= 4
    assert 0.8 <= aspect.min() < 0.82 and 1.18 < aspect.max() <= 1.2
    low, high = windows[:, None, :2], windows[:, None, 2:]
    assert ((low < people[:, :2]) & (high > people[:, 2:])).all(2).any(1).all()
    smaller = size < 1  # in the frame; larger ones around it
    inside = (windows[:, :2] >= 0) & (windows[:, 2:] <= (640, 512))
    around = (windows[:, :2] <= 0) & (windows[:, 2:] >= (640, 512))
    assert np.where(smaller, inside, around).all() and 0.1 < smaller.mean() < 0.6
    everywhere = np.array([[-1.0, -1, 641, 513]])
    narrow = Augmentation(zoom_out=1.01, crop_aspect=(0.99, 1.01))
    zoomed = [unpaired_window(rng, everywhere, narrow) for _ in range(50)]
    assert (0.0, 0.0, 640.0, 512.0) in zoomed  # no window holds it: the frame
    assert len({unpaired_window(rng, NOBODY, options) for _ in range(50)}) == 50


def test_how_often_crops_are_unpaired():
    drawn = [sample(seed, crop_apart=0.5) for seed in range(300)]
    assert 120 < sum(len(t.crops) == 2 for t in drawn) < 180
    drawn = [sample(seed, mirror_apart=0.5) for seed in range(400)]
    apart = [t for t in drawn if len(t.crops) == 2]
    assert 70 < len(apart) < 130  # a quarter: half of the mirrored half
    assert all(t.crops[0].flip and not t.crops[1].flip for t in apart)
    assert all(t.crops[0][:2] == t.crops[1][:2] for t in apart)  # one window
    drawn = [sample(seed, crop_apart=1e-9, shift_left=0.3).crops for seed in range(400)]
    shifts = [c[0].source[0] for c in drawn if c[0].source[0]]
    assert 80 < len(shifts) < 150 and max(shifts) == 20 and len(set(shifts)) > 15
    assert all(c[0].source[2] == 640 and c[0].target[2] == round(320 - c[0].source[0] / 2) for c in drawn)


def test_unpaired_crops_have_the_filler_of_their_modality():
    t = transform((-320, -256, 960, 768), (0, 0, 640, 512))
    image = t.apply(np.full((512, 640, 4), 7, np.uint8))
    assert (image[:3, 0, 0] == torch.from_numpy(t.filler[:3])).all() and (image[3] == 7).all()
    assert (image[:3, 64:192, 80:240] == 7).all()


@pytest.mark.parametrize("form", ["xml-sanitized", "xml", "bbgt"])
def test_forms_of_one_box_give_visible_and_lwir_the_same(form, tmp_path):
    """With one crop the label is `BOTH`; with two, each modality has the box, moved by its own crop."""
    xml = "<object><name>{}</name><bndbox><x>{}</x><y>{}</y><w>{}</w><h>{}</h></bndbox></object>"
    objects = [("person", 100, 100, 40, 90), ("people", 300, 100, 90, 90)]
    folder = {"xml-sanitized": "annotations-xml-new-sanitized", "xml": "annotations-xml-new"}.get(form)
    path = tmp_path / (folder or "annotations") / "set00/V000" / f"I00000.{'xml' if folder else 'txt'}"
    path.parent.mkdir(parents=True)
    if folder:
        path.write_text(f"<annotation>{''.join(xml.format(*o) for o in objects)}</annotation>")
    else:
        path.write_text("% bbGt version=3\n" + "\n".join(" ".join(map(str, (*o, *[0] * 7))) for o in objects))
    kwargs = {"min_height": 12, "margin": 5, "pairs": True}
    [frame] = load_frames(["set00/V000/I00000"], open_annotations(tmp_path, form), **kwargs)
    whole, right = (0, 0, 640, 512), (20, 0, 660, 512)  # LWIR moves 20 pixels to the left
    objects = frame.boxes_px, frame.labels, frame.seen
    boxes, labels = transform(whole).move(*objects)
    assert labels.tolist() == [BOTH, -1] and np.allclose(
        boxes[0] * (640, 512, 640, 512), [100, 100, 140, 190]
    )
    boxes, labels = transform(whole, right).move(*objects)
    assert labels.tolist() == [VISIBLE, -1, LWIR, -1]
    assert np.allclose((boxes[2:] - boxes[:2]) * 640, [[-20, 0, -20, 0]] * 2, atol=1e-3)
