"""Frames to batches: samples, masks, determinism, the frame cache."""

import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Collate, KaistPairs, batch_loader, max_objects
from engine.loader import BadFrame
from kaist.annotations import image_path, open_annotations, read_image_list
from kaist.files import InputError
from kaist.frame_cache import cache_frames
from kaist.frames import BOTH, load_frames
from kaist.images import check_images
from kaist.images import read_frame as read
from model import INPUT_CHANNELS
from ssd.augment import Augmentation, mean_colour

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
    model = SimpleNamespace(priors=torch.zeros(1, 4), grids=maps, infused_maps=range(len(maps)))
    loader = batch_loader(dataset, model, batch_size=4, workers=workers, shuffle=shuffle)
    return list(loader.epoch(epoch, skip))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_by_any_worker(demo_root, tmp_path, workers):
    root = shutil.copytree(demo_root, tmp_path / "set")
    dataset = pairs(root)
    path = image_path(root, dataset.frames[5].id, "visible")
    path.write_bytes(path.read_bytes()[:9000])
    check_images(root, [dataset.frames[5].id], "early")  # its header is intact
    with pytest.raises(InputError, match=r"I\d{5}\.jpg: broken image"):
        batches(dataset, workers)


def test_an_unreadable_donor_leaves_the_frame_unchanged(demo_root, tmp_path):
    root = shutil.copytree(demo_root, tmp_path / "set")
    dataset = pairs(root, augmentation=Augmentation(copy_paste=1.0))
    path = image_path(root, dataset.frames[5].id, "visible")
    path.write_bytes(path.read_bytes()[:9000])
    found = [dataset[epoch, i] for epoch in range(3) for i in range(len(dataset))]
    bad = [sample.frame_id for sample in found if isinstance(sample, BadFrame)]
    assert bad == [dataset.frames[5].id] * 3


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


# ------------------------------------------------------------------- batches and determinism


def test_batches_carry_padded_boxes_and_masks(demo_root):
    [batch, *_] = batches(pairs(demo_root, augmentation=None), maps=((38, 38), (19, 19)))
    assert batch.images.shape == (4, 4, 300, 300) and batch.images.dtype == torch.uint8
    assert batch.boxes.shape[:2] == batch.labels.shape and batch.labels.dtype == torch.int64
    assert [tuple(m.shape) for m in batch.masks] == [(4, 38, 38), (4, 19, 19)]
    assert (batch.boxes[batch.labels == 0] == 0).all()
    people = (batch.labels == BOTH).any(1)
    assert torch.equal((batch.masks[0] == 1).flatten(1).any(1), people) and people.any()


@pytest.mark.parametrize("options", [{"copy_paste": 1.0}, {"crop_apart": 1.0, "mirror_apart": 0.5}])
def test_padding_for_a_gpu_keeps_the_shapes_and_adds_nothing(demo_root, options):
    dataset = pairs(demo_root, augmentation=Augmentation(**options))
    room = max_objects(dataset)
    for epoch in range(3):
        samples = [dataset[epoch, i] for i in range(4)]
        (plain, _), (padded, _) = (Collate([(38, 38)], pad_to=n)(samples) for n in (1, room))
        n = plain.labels.shape[1]
        assert padded.boxes.shape == (4, room, 4) and n <= room and not padded.labels[:, n:].any()
        assert torch.equal(padded.labels[:, :n], plain.labels)
        assert torch.equal(padded.boxes[:, :n], plain.boxes)
        assert torch.equal(padded.masks[0], plain.masks[0])


def same(a, b):
    return all(
        torch.equal(x.images, y.images)
        and torch.equal(x.boxes, y.boxes)
        and torch.equal(x.masks[0], y.masks[0])
        and x.frame_ids == y.frame_ids
        for x, y in zip(a, b, strict=True)
    )


def test_samples_depend_only_on_seed_epoch_and_frame(demo_root):
    dataset = pairs(demo_root)
    alone = batches(dataset, workers=0, epoch=3)
    assert same(alone, batches(dataset, workers=2, epoch=3))
    assert same(alone[1:], batches(dataset, workers=0, epoch=3, skip=1))
    assert not same(alone, batches(dataset, epoch=4))
    assert not same(alone, batches(pairs(demo_root, seed=8), epoch=3))


def test_the_evaluation_order_is_that_of_the_list(demo_root):
    dataset = pairs(demo_root, augmentation=None)
    order = [i for batch in batches(dataset, workers=2, shuffle=False) for i in batch.frame_ids]
    assert order == [frame.id for frame in dataset.frames]


def test_masks_can_ignore_the_augmentation_as_in_the_log(demo_root):
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


def test_real_pairs_load(reference):
    root = reference / "mini"
    ids = read_image_list(root / "imageSets/pairs.txt")
    for form in ("bbgt", "xml"):
        frames = load_frames(ids, open_annotations(root, form), min_height=12, margin=5)
        [batch, _] = batches(pairs(root, frames, augmentation=None), shuffle=False)
        assert batch.images.shape == (4, 4, 300, 300) and (batch.labels == BOTH).sum() > 10
