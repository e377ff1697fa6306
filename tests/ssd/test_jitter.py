"""Distortion beyond SSD's: it does not change windows, and stays within its documented ranges."""

import numpy as np
import torch

from ssd.augment import Augmentation, add_blur_and_noise, extra_colour_jitter, mean_colour, sample_transform


def draw(jitter, channels=4):
    options, filler = Augmentation(jitter=jitter), mean_colour(channels)
    mean = np.full(channels, 90.0, np.float32)
    return [
        sample_transform(np.random.default_rng(seed), np.zeros((0, 4)), mean, options, (64, 80), filler)
        for seed in range(20)
    ]


def test_jitter_does_not_change_windows():
    """The window is sampled before the colours; all colours differ."""
    plain, jittered = draw(0.0), draw(1.0)
    assert [t.crops[0].source for t in plain] == [t.crops[0].source for t in jittered]
    assert all(not np.array_equal(a.matrix, b.matrix) for a, b in zip(plain, jittered, strict=True))


def test_channels_and_gain_stay_in_their_ranges():
    rng = np.random.default_rng(0)
    colours = [extra_colour_jitter(rng, np.eye(3), np.zeros(3)) for _ in range(400)]
    grey = [m for m, _ in colours if np.count_nonzero(m) == 9]
    assert 40 < len(grey) < 130
    gains = np.array([np.diag(m) for m, _ in colours if np.count_nonzero(m) == 3])
    assert 0.6 <= gains.min() < 0.7 and 1.4 < gains.max() <= 1.5
    heat = [extra_colour_jitter(rng, np.eye(1), np.zeros(1)) for _ in range(400)]
    gains, offsets = np.array([m.item() for m, _ in heat]), np.array([o.item() for _, o in heat])
    assert 5 < (gains < 0).sum() < 45 and (offsets[gains < 0] == 80).all()
    assert abs(gains).min() >= 0.4 and abs(gains).max() <= 2.5
    assert offsets.min() >= -20 and offsets[gains > 0].max() <= 40


def test_blur_and_noise_keep_the_grey_level():
    rng, image = np.random.default_rng(1), torch.full((4, 64, 80), 100, dtype=torch.uint8)
    image[:, 20:40, 30:40] = 160
    for _ in range(20):
        rough = add_blur_and_noise(rng, image)
        assert rough.shape == image.shape and rough.dtype == torch.uint8
        difference = rough.float() - image.float()
        assert difference.mean((1, 2)).abs().max() < 1
        assert difference[3].std() < 8 and difference[:3].std() < 16
    assert not torch.equal(add_blur_and_noise(rng, image), add_blur_and_noise(rng, image))
    for part in (image[3:], image[:3]):
        assert add_blur_and_noise(rng, part).shape == part.shape
