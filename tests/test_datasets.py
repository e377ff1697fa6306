"""Frames to batches: ignore rules, decoding, augmentation that boxes follow, determinism."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from datasets import KaistPairs, batch_loader
from kaist.annotations import image_path, make_objects, open_annotations, read_image_list
from kaist.files import InputError
from kaist.frames import label_objects, load_frames
from kaist.images import cache_frames, check_images
from kaist.images import read_frame as read
from model import INPUT_CHANNELS
from ssd.augment import (
    Augmentation,
    Transform,
    colour_matrix,
    distort,
    frame_mean,
    mean_colour,
    random_window,
    round_to_pixels,
    sample_transform,
    whole_frame,
)

SIZE = (300, 300)


def pairs(root, frames=None, **changes):
    if frames is None:
        ids = read_image_list(root / "imageSets/train-all.txt")
        frames = load_frames(ids, open_annotations(root), min_height=12, margin=5)
    settings = {
        "input_mode": "early",
        "input_size": SIZE,
        "augmentation": Augmentation(),
        "masks_follow": True,
        "seed": 7,
    } | changes
    return KaistPairs(root, frames, filler=mean_colour(INPUT_CHANNELS[settings["input_mode"]]), **settings)


def batches(dataset, workers=0, epoch=0, skip=0, shuffle=True, maps=((38, 38),)):
    loader = batch_loader(
        dataset, batch_size=4, workers=workers, shuffle=shuffle, map_sizes=list(maps), pin_memory=False
    )
    return list(loader.epoch(epoch, skip))


# ------------------------------------------------------------------------------- ignore rules


def test_what_is_learned_and_what_is_ignored():
    rows = [
        ("person", [100, 100, 20, 50], 0, False),
        ("person", [100, 100, 20, 50], 2, False),  # occlusion alone does not ignore
        ("people", [100, 100, 20, 50], 0, False),
        ("person?", [100, 100, 20, 50], 0, False),
        ("cyclist", [100, 100, 20, 50], 0, False),
        ("person", [100, 100, 20, 50], 0, True),
        ("person", [100, 100, 20, 11], 0, False),  # too low
        ("person", [4, 100, 20, 50], 0, False),  # too close to each border
        ("person", [100, 4, 20, 50], 0, False),
        ("person", [616, 100, 20, 50], 0, False),
        ("person", [100, 458, 20, 50], 0, False),
        ("person", [5, 5, 630, 502], 0, False),  # just inside
    ]
    objects = make_objects(rows)
    labels = label_objects(objects.boxes, objects.is_person, min_height=12, margin=5)
    assert labels.tolist() == [1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1]


# ----------------------------------------------------------------------------------- decoding


def test_modalities_and_channels(demo_root):
    frame_id = read_image_list(demo_root / "imageSets/test-all.txt")[0]
    early = read(demo_root, frame_id, "early")
    assert early.shape == (512, 640, 4) and early.dtype == np.uint8
    assert np.array_equal(read(demo_root, frame_id, "visible"), early[..., :3])
    assert np.array_equal(read(demo_root, frame_id, "lwir"), early[..., 3:])
    stored = Image.open(image_path(demo_root, frame_id, "lwir")).convert("RGB")
    assert np.abs(np.asarray(stored).astype(int) - early[..., 3:]).max() <= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "image not found"),
        (lambda p: p.write_bytes(b"no image"), "unreadable image"),
        (lambda p: Image.new("RGB", (320, 256)).save(p), "the image is 320x256"),
    ],
)
def test_bad_images_are_named_before_training(demo_root, tmp_path, damage, message):
    root = shutil.copytree(demo_root, tmp_path / "set")
    frame_id = read_image_list(root / "imageSets/train-all.txt")[3]
    path = image_path(root, frame_id, "lwir")
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        check_images(root, [frame_id], "early")
    assert str(error.value).startswith(str(path))
    check_images(root, [frame_id], "visible")  # what the input does not need is not asked for


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_named_from_any_worker(demo_root, tmp_path, workers):
    root = shutil.copytree(demo_root, tmp_path / "set")
    dataset = pairs(root)
    path = image_path(root, dataset.frames[5].id, "visible")
    path.write_bytes(path.read_bytes()[:9000])
    check_images(root, [dataset.frames[5].id], "early")  # its header is whole
    with pytest.raises(InputError, match=r"I\d{5}\.jpg: broken image"):
        batches(dataset, workers)


# ------------------------------------------------------------------------------- augmentation


def geometry(window, flip=False, channels=4):
    """A Transform that takes a window and changes no colour."""
    plain = whole_frame(channels, SIZE)
    crop = round_to_pixels(window, SIZE, flip)
    return Transform(crop, plain.matrix, plain.offset, SIZE, mean_colour(channels))


def test_unaugmented_sample_is_the_resized_frame(demo_root):
    dataset = pairs(demo_root, augmentation=None)
    sample = dataset[0, 0]
    frame = dataset.frames[0]
    pixels = read(demo_root, frame.id, "early")
    plain = Image.fromarray(pixels[..., :3]).resize((300, 300), Image.Resampling.BILINEAR)
    difference = np.asarray(plain).transpose(2, 0, 1).astype(int) - sample.image[:3].numpy()
    assert np.abs(difference).mean() < 0.5 and np.abs(difference).max() <= 2
    expected = frame.boxes_px.clip(0, (640, 512, 640, 512)) / (640, 512, 640, 512)
    assert np.allclose(sample.boxes, expected, atol=1e-6)


def test_boxes_follow_the_pixels():
    """A bright box in both modalities lands where its box says, whatever the window."""
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(300):
        x, y = rng.integers(20, 500), rng.integers(20, 350)
        w, h = rng.integers(30, 100), rng.integers(60, 140)
        frame = np.zeros((512, 640, 4), np.uint8)
        frame[y : y + h, x : x + w] = 255
        box = np.array([[x, y, x + w, y + h]], np.float32)
        t = geometry(random_window(rng, box, 4.0), flip=bool(rng.random() < 0.5))
        image = t.apply(frame)
        filler = (image == torch.from_numpy(t.filler).view(4, 1, 1)).all(0)
        boxes, labels = t.move(box, np.array([1]))
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


def test_one_resize_equals_canvas_crop_and_resize():
    """Against the plain way: paste on a mean-coloured canvas, crop, then resize."""
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
    frame = np.array(smooth.resize((640, 512), Image.Resampling.BICUBIC))
    differences = []
    for _ in range(40):
        window = random_window(rng, np.zeros((0, 4)), 3.0)
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
    """SSD's recipe as the paper tells it, one trial at a time."""
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
    """The window of torchvision's zoom-out and IoU crop, from their parameters alone."""
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
    """An image of a size, without pixels."""
    return tv_tensors.Image(torch.empty(1, 1, 1).expand(1, height, width))


@pytest.mark.parametrize("recipe", ["the paper's", "torchvision's"])
def test_windows_have_the_recipes_distribution(recipe):
    """Kolmogorov-Smirnov distances of the edges, size and shape of thousands of windows."""
    people = np.array([[100.0, 100, 300, 480], [500, 200, 530, 280]])
    n = 4000 if recipe == "the paper's" else 1200
    ours_rng, plain_rng = np.random.default_rng(2), np.random.default_rng(3)
    ours = np.array([random_window(ours_rng, people, 4.0) for _ in range(n)])
    if recipe == "the paper's":
        plain = np.array([plain_window(plain_rng, people, 4.0) for _ in range(n)])
    else:
        people = people[:1]  # of several, torchvision's overlap and centre are the same person's
        torch.manual_seed(0)
        ours = np.array([random_window(ours_rng, people, 4.0) for _ in range(n)])
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
    windows = np.array([random_window(rng, np.zeros((0, 4)), 1.0) for _ in range(200)])
    assert 0.7 < ((windows[:, 2] - windows[:, 0]) < 639).mean() < 0.95


def test_persons_leave_with_their_centre_and_crowds_only_with_their_last_pixel():
    box = np.array([[90.0, 100, 130, 200]] * 2, np.float32)
    t = geometry((112, 0, 432, 512))  # the centre, 110, is just outside
    boxes, labels = t.move(box, np.array([1, -1]))
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
        "hue": TF.adjust_hue,
    }[kind]
    theirs = adjust(image.float() / 255, 9 / 360 if kind == "hue" else factor) * 255
    # A hue shift is a rotation here and a walk around the HSV hexagon there.
    assert np.abs(ours - theirs.numpy()).mean() < (4.0 if kind == "hue" else 0.05)


def draw(frame, rng):
    mean = frame_mean(frame)
    return sample_transform(rng, np.zeros((0, 4)), mean, Augmentation(), SIZE, mean_colour(len(mean)))


def test_distortion_keeps_modalities_apart():
    frame = np.full((512, 640, 4), 100, np.uint8)
    frame[..., 3] = 200
    content = torch.from_numpy(frame[:30, :30].transpose(2, 0, 1).copy())
    drawn = [draw(frame, np.random.default_rng(i)) for i in range(60)]
    changed = torch.stack([distort(content, t.matrix, t.offset).flatten(1).float().mean(1) for t in drawn])
    assert (changed[:, 3] != 200).float().mean() > 0.3
    ratios = changed[:, 3] / changed[:, 0]
    assert ratios.std() > 0.1  # not one draw for both
    alone = draw(frame[..., 3:], np.random.default_rng(0))
    assert alone.matrix.shape == (1, 1) and alone.offset.shape == (1,)


def test_undistorted_pixels_are_left_alone():
    content = torch.randint(256, (4, 30, 30), dtype=torch.uint8)
    whole = whole_frame(4, SIZE)
    assert distort(content, whole.matrix, whole.offset) is content
    frame = np.full((512, 640, 1), 9, np.uint8)
    alone = [draw(frame, np.random.default_rng(i)).matrix[0, 0] == 1 for i in range(100)]
    assert 10 < sum(alone) < 45  # neither brightness nor contrast: a quarter


def test_distortion_is_the_matrix_rounded_and_clipped():
    frame = np.random.default_rng(0).integers(0, 256, (512, 640, 4), dtype=np.uint8)
    content = torch.from_numpy(frame[:30, :30].transpose(2, 0, 1).copy())
    for seed in range(20):
        t = draw(frame, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)  # the window and the flip are drawn first
        random_window(rng, np.zeros((0, 4)), 4.0), rng.random()
        mean = frame[::8, ::8].mean((0, 1))
        expected = []
        for part in (slice(0, 3), slice(3, 4)):
            matrix, offset = colour_matrix(rng, mean[part], True)
            expected.append(np.einsum("ij,jhw->ihw", matrix, content[part]) + offset[:, None, None])
        expected = np.concatenate(expected).clip(0, 255)
        ours = distort(content, t.matrix, t.offset).numpy()
        assert np.abs(ours - expected).max() < 0.51  # to the nearest


# ------------------------------------------------------------------- batches and determinism


def test_batches_carry_padded_boxes_and_masks(demo_root):
    [batch, *_] = batches(pairs(demo_root, augmentation=None), maps=((38, 38), (19, 19)))
    assert batch.images.shape == (4, 4, 300, 300) and batch.images.dtype == torch.uint8
    assert batch.boxes.shape[:2] == batch.labels.shape and batch.labels.dtype == torch.int64
    assert [tuple(m.shape) for m in batch.masks] == [(4, 38, 38), (4, 19, 19)]
    assert (batch.boxes[batch.labels == 0] == 0).all()
    people = (batch.labels == 1).any(1)
    assert torch.equal((batch.masks[0] == 1).flatten(1).any(1), people) and people.any()


def same(a, b):
    return all(
        torch.equal(x.images, y.images)
        and torch.equal(x.boxes, y.boxes)
        and torch.equal(x.masks[0], y.masks[0])
        and x.frame_ids == y.frame_ids
        for x, y in zip(a, b, strict=True)
    )


def test_samples_depend_on_seed_epoch_and_frame_alone(demo_root):
    dataset = pairs(demo_root)
    alone = batches(dataset, workers=0, epoch=3)
    assert same(alone, batches(dataset, workers=2, epoch=3))
    assert same(alone[1:], batches(dataset, workers=0, epoch=3, skip=1))
    assert not same(alone, batches(dataset, epoch=4))
    assert not same(alone, batches(pairs(demo_root, seed=8), epoch=3))


def test_evaluation_order_is_the_lists(demo_root):
    dataset = pairs(demo_root, augmentation=None)
    order = [i for batch in batches(dataset, workers=2, shuffle=False) for i in batch.frame_ids]
    assert order == [frame.id for frame in dataset.frames]


def test_masks_of_the_logged_mistake_ignore_the_augmentation(demo_root):
    wrong = batches(pairs(demo_root, masks_follow=False))
    right = batches(pairs(demo_root))
    still = {
        i: mask
        for batch in batches(pairs(demo_root, augmentation=None))
        for i, mask in zip(batch.frame_ids, batch.masks[0], strict=True)
    }
    for a, b in zip(wrong, right, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.boxes, b.boxes)
        for frame_id, mask in zip(a.frame_ids, a.masks[0], strict=True):
            assert torch.equal(mask, still[frame_id])
    assert not same(wrong, right)


# ------------------------------------------------------------------------------- frame cache


@pytest.mark.parametrize("input_mode", ["early", "visible", "lwir"])
def test_cached_samples_equal_decoded_ones(demo_root, tmp_path, input_mode):
    decoded = pairs(demo_root, input_mode=input_mode)
    ids = [frame.id for frame in decoded.frames]
    cache = cache_frames(tmp_path / "cache", demo_root, ids, input_mode)
    cached = pairs(demo_root, input_mode=input_mode, cache=cache)
    assert same(batches(decoded, epoch=1), batches(cached, epoch=1))
    assert np.array_equal(cache.read(ids[5]), read(demo_root, ids[5], input_mode))
    assert len(pickle.dumps(cache)) < 10_000  # workers map the file, pixels are not sent to them
    if input_mode == "early":
        assert same(batches(decoded, epoch=2), batches(cached, workers=2, epoch=2))


def test_cache_is_reused_until_a_file_changes(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    first = cache_frames(folder, root, ids, "early")
    before = first.path.stat()
    first.read(ids[0])[:] = 0  # whatever a reader does to its frame stays its own
    again = cache_frames(folder, root, ids, "early")
    assert again.path == first.path and again.path.stat().st_ino == before.st_ino
    assert np.array_equal(again.read(ids[0]), read(root, ids[0], "early"))

    path = image_path(root, ids[1], "lwir")
    shutil.copy(image_path(root, ids[2], "lwir"), path)
    redrawn = cache_frames(folder, root, ids, "early")
    assert np.array_equal(redrawn.read(ids[1]), read(root, ids[1], "early"))
    assert not np.array_equal(redrawn.read(ids[1]), first.read(ids[1]))  # a mapped file lives on
    assert [p for p in folder.iterdir()] == [redrawn.path]

    os.utime(path, ns=(0, 0))  # the same size, another time
    assert cache_frames(folder, root, ids, "early").path != redrawn.path


def test_caches_of_other_roots_inputs_and_lists_are_kept_apart(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    kinds = [(demo_root, ids, "early"), (root, ids, "early"), (root, ids, "lwir"), (root, ids[::-1], "early")]
    paths = {cache_frames(folder, *kind).path for kind in kinds}
    assert len(paths) == 4 and set(folder.iterdir()) == paths


def test_interrupted_cache_is_drawn_again(demo_root, tmp_path):
    root, folder = shutil.copytree(demo_root, tmp_path / "set"), tmp_path / "cache"
    ids = read_image_list(root / "imageSets/train-all.txt")[:3]
    path = image_path(root, ids[2], "visible")
    whole = path.read_bytes()
    path.write_bytes(whole[:9000])
    with pytest.raises(InputError, match="broken image"):
        cache_frames(folder, root, ids, "early")
    assert list(folder.iterdir()) == []
    path.write_bytes(whole)
    cache = cache_frames(folder, root, ids, "early")
    name = cache.path.name.rsplit("-", 1)[0]
    unfinished = folder / f".{name}-0.u8.1.tmp"  # of a process that was killed
    unfinished.write_bytes(b"")
    os.utime(unfinished, (0, 0))
    cache.path.write_bytes(b"cut off")
    cache = cache_frames(folder, root, ids, "early")
    assert np.array_equal(cache.read(ids[2]), read(root, ids[2], "early"))
    assert list(folder.iterdir()) == [cache.path]


def test_cache_says_when_it_cannot_be(demo_root, tmp_path, monkeypatch):
    ids = read_image_list(demo_root / "imageSets/train-all.txt")[:3]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a folder"):
        cache_frames(tmp_path / "file", demo_root, ids, "early")
    with pytest.raises(InputError, match=r"I99999.jpg: image not found"):
        cache_frames(tmp_path / "cache", demo_root, ["set00/V000/I99999"], "early")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(InputError, match=r"a cache of 0\.0 GB does not fit, 0\.0 GB are free"):
        cache_frames(tmp_path / "cache", demo_root, ids, "early")


def test_real_pairs_load(reference):
    root = reference / "mini"
    ids = read_image_list(root / "imageSets/pairs.txt")
    for form in ("bbgt", "xml"):
        frames = load_frames(ids, open_annotations(root, form), min_height=12, margin=5)
        [batch, _] = batches(pairs(root, frames, augmentation=None), shuffle=False)
        assert batch.images.shape == (4, 4, 300, 300) and (batch.labels == 1).sum() > 10
