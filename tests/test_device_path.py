"""Batches made on a device, here the CPU as one, are those of `BatchLoader`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine.loader
from datasets import Collate, DeviceLoader, KaistPairs, batch_loader
from engine.config import device_loader_conflict
from engine.loader import EpochBatches
from kaist.annotations import open_annotations, read_image_list
from kaist.frame_cache import cache_frames
from kaist.frames import load_frames
from model import INPUT_CHANNELS
from pseudo_gt import MapRange
from ssd.augment import Augmentation, mean_colour
from ssd.device_augment import TransformBatch, resize_weights
from ssd.losses import IGNORE
from tools.workloads import plain_config, row_network

MAPS = [(38, 38), (19, 19)]


@pytest.fixture(scope="module")
def dataset(demo_root, tmp_path_factory):
    """A function that gives the demo set's training pairs from a cache."""
    ids = read_image_list(demo_root / "imageSets/train-all.txt")
    frames = load_frames(ids, open_annotations(demo_root), min_height=12, margin=5)
    folder = tmp_path_factory.mktemp("frames")

    def pairs(**changes):
        settings = {
            "input_mode": "early",
            "input_size": (300, 300),
            "augmentation": Augmentation(),
            "masks_follow": True,
            "seed": 7,
            "filler": mean_colour(INPUT_CHANNELS[changes.get("input_mode", "early")]),
        } | changes
        # The cache in another order than the frames: rows are not indices.
        cache = cache_frames(folder, demo_root, ids[::-1], settings["input_mode"])
        return KaistPairs(demo_root, frames, cache=cache, **settings)

    return pairs


def loaders(dataset, workers=0, map_range=None):
    settings = {"batch_size": 4, "map_sizes": MAPS, "map_range": map_range}
    plain = batch_loader(dataset, workers=0, shuffle=True, pin_memory=False, **settings)
    return plain, DeviceLoader(dataset, workers=workers, device=torch.device("cpu"), **settings)


def check(plain, ours):
    """All but the pixels is equal; returns each sample's mean difference of pixels."""
    differences = []
    for a, b in zip(plain, ours, strict=True):
        assert a.frame_ids == b.frame_ids
        n = a.labels.shape[1]
        assert torch.equal(a.boxes, b.boxes[:, :n]) and not b.labels[:, n:].any()
        assert torch.equal(a.labels, b.labels[:, :n]) and b.labels.shape[1] % 8 == 0
        assert len(a.masks) == len(b.masks) and all(map(torch.equal, a.masks, b.masks))
        assert b.images.dtype == torch.uint8 and a.images.shape == b.images.shape
        difference = (a.images.float() - b.images.float()).abs()
        differences.append(difference.flatten(1).mean(1))
    return torch.cat(differences)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_mode": "visible", "input_size": (320, 272)},
        {"input_mode": "lwir"},
        {"augmentation": Augmentation(zoom_out=1.0, hue_saturation=False, lwir_jitter=False)},
        {"augmentation": None},
        {"augmentation": Augmentation(crop_apart=0.6, mirror_apart=0.5, shift_left=0.5)},
        {"filler": np.array([9, 0, 255, 1], np.uint8), "augmentation": Augmentation(modality_dropout=0.9)},
        {"masks_follow": False},
    ],
)
def test_batches_equal_the_workers(dataset, changes):
    plain, ours = loaders(dataset(**changes))
    for epoch in range(2):
        differences = check(plain.epoch(epoch), ours.epoch(epoch))
        assert len(differences) == 12 and differences.mean() < 0.3 and differences.max() < 1


def test_batches_depend_on_seed_epoch_and_frame_alone(dataset):
    _, alone = loaders(dataset())
    plain, ours = loaders(dataset(), workers=2)
    whole = list(alone.epoch(3))
    for got, skip in ((ours.epoch(3), 0), (alone.epoch(3, skip=2), 2), (ours.epoch(3, skip=1), 1)):
        for a, b in zip(whole[skip:], got, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.boxes, b.boxes)
    assert len(ours) == len(plain) == 3


def test_a_batch_is_split_by_rank(dataset, monkeypatch):
    pairs = dataset()
    monkeypatch.setattr(engine.loader, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(engine.loader, "rank", lambda rank=rank: rank)
        keys = EpochBatches(len(pairs), 4, pairs.seed)
        plain = [Collate(MAPS)([pairs[key] for key in batch])[0] for batch in keys]
        _, ours = loaders(pairs)
        assert check(plain, ours.epoch(0)).max() < 1


def test_masks_leave_out_who_is_out_of_range(dataset):
    priors = row_network(plain_config(width=0.01))[0].map_priors()
    plain, ours = loaders(dataset(), map_range=MapRange(priors, [0, 1], IGNORE))
    check(plain.epoch(0), ours.epoch(0))
    kept, _ = loaders(dataset())
    pairs = zip(kept.epoch(0), ours.epoch(0), strict=True)
    assert any(not torch.equal(a.masks[0], b.masks[0]) for a, b in pairs)


def test_a_loader_that_is_left_halfway_can_start_again(dataset):
    _, ours = loaders(dataset(), workers=1)
    batches = ours.epoch(0)
    first = next(batches)
    batches.close()
    assert torch.equal(first.images, next(ours.epoch(0)).images)


@pytest.mark.parametrize("seed", range(4))
def test_resize_is_torchs(seed):
    """Random crops of noise, where every weight shows, against F.interpolate in float32."""
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(0, 300, 2).tolist()
    x1, y1 = x0 + int(rng.integers(1, 340)), y0 + int(rng.integers(1, 212))
    frames = torch.from_numpy(rng.integers(0, 256, (1, 512, 640, 1), dtype=np.uint8))
    mirrored = bool(seed % 2)
    edges = [x0, y0, x1, y1, 7, 20, 291, 203]
    crop = torch.tensor([[[*edges, mirrored]]], dtype=torch.float32)
    transforms = TransformBatch(crop, torch.eye(1)[None], torch.zeros(1, 1))
    image = transforms.apply(frames, (300, 300), torch.tensor([3], dtype=torch.uint8))
    part = frames[:, y0:y1, x0:x1].permute(0, 3, 1, 2).float()
    content = F.interpolate(part, (183, 284), mode="bilinear", antialias=True, align_corners=False)
    expected = torch.full((1, 1, 300, 300), 3.0)
    expected[:, :, 20:203, 7:291] = content
    expected = expected.flip(3) if mirrored else expected
    assert (image - expected).abs().max() <= 0.51  # to the nearest


def test_every_place_of_the_target_has_weights_that_add_up_to_one():
    source = torch.tensor([[0.0, 640], [5, 6], [600, 640]])
    target = torch.tensor([[0.0, 300], [9, 10], [1, 299]])
    mirrored = torch.tensor([True, False, True])
    weights, inside = resize_weights(source, target, mirrored, 640, 300)
    assert torch.allclose(weights.sum(2), inside.float())
    assert inside.sum(1).tolist() == [300, 1, 298]
    assert (weights[1].nonzero() == torch.tensor([[9, 5]])).all()


def test_nothing_waits_for_a_value_on_the_device(dataset):
    """Traced as a whole with fake tensors, where looking at a value fails."""
    _, ours = loaders(dataset())
    [_, frames, transforms, _], *_ = map(ours.send, ours.loader)
    compiled = torch.compile(TransformBatch.apply, fullgraph=True, dynamic=False, backend="aot_eager")
    images = compiled(transforms, frames, (300, 300), ours.filler)
    assert torch.equal(images, transforms.apply(frames, (300, 300), ours.filler))


def test_what_keeps_batches_off_the_device_is_said():
    assert not device_loader_conflict("folder", copy_paste=False, jitter=False)
    assert "CACHE" in device_loader_conflict("", copy_paste=False, jitter=False)
    assert "COPY_PASTE" in device_loader_conflict("folder", copy_paste=True, jitter=False)
    assert "JITTER" in device_loader_conflict("folder", copy_paste=False, jitter=True)
