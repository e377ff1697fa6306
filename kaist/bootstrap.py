"""How sure a miss rate is: bootstrap over frames or videos. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kaist.miss_rate import (
    BLOCK,
    FPPI_POINTS,
    SETUPS,
    GroundTruth,
    Setup,
    allowed_false_positives,
    log_average,
    match_setups,
    rank,
    share,
)
from kaist.results import Detections

MOST_RESAMPLES = 10**6  # whose rates are held in memory


def bootstrap(
    ground_truth: GroundTruth,
    detections: Detections,
    setups: Mapping[str, Setup] = SETUPS,
    *,
    resamples: int = 1000,
    seed: int = 0,
    by_video: bool = False,
) -> dict[str, np.ndarray]:
    """Official miss rates (resamples,) of each setup on frames drawn anew with replacement.

    The nonparametric bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapters 6 and 13): a subset's frames are drawn with replacement as many times as it has
    frames, and the rate is taken of the drawn frames, matches staying what they are. `interval`
    takes the percentiles. Frames of one video resemble each other, so that drawing frames
    understates the spread over other streets; `by_video` draws whole videos (the cluster
    bootstrap; Davison and Hinkley, Bootstrap Methods, 1997, section 3.8).

    The draws depend on the seed and the frames alone: for two detectors, the difference of their
    samples is the paired one, whose interval says whether they differ on these frames.
    """
    ranked = rank(detections)
    videos = [frame_id.rsplit("/", 1)[0] for frame_id in ground_truth.frames]
    units = np.unique(videos, return_inverse=True)[1] if by_video else np.arange(len(videos))
    samples = {}
    for name, matching in match_setups(ground_truth, ranked, setups):
        rng = np.random.default_rng(seed)
        drawn = np.unique(units[matching.frames])
        people = np.bincount(ground_truth.frame[matching.positive], minlength=len(videos))
        hits, false = matching.outcome == 1, matching.outcome == 0
        hits_before = np.append(np.cumsum(hits)[false], np.count_nonzero(hits))
        hits, false = ranked.frame[hits], ranked.frame[false]
        size = max(1, BLOCK // max(len(videos), len(false), len(hits)))
        rates = [np.empty((0, len(FPPI_POINTS)))]
        for start in range(0, resamples, size):
            n = min(size, resamples - start)
            weight = draw_weights(rng, n, drawn, len(videos), units) * matching.frames
            allowed = allowed_false_positives(weight.sum(axis=1, keepdims=True), FPPI_POINTS)
            seen = count_up_to(np.cumsum(weight[:, false], axis=1), allowed)
            found = np.cumsum(np.pad(weight[:, hits], ((0, 0), (1, 0))), axis=1)
            found = np.take_along_axis(found, hits_before[seen], axis=1)
            rates.append(share(found, weight @ people[:, None]))
        samples[name] = log_average(np.concatenate(rates), "official")
    return samples


def draw_weights(
    rng: np.random.Generator, n: int, drawn: np.ndarray, n_frames: int, units: np.ndarray
) -> np.ndarray:
    """(n, n_frames) int64: how often each frame's unit came up in n draws from `drawn`."""
    n_units = int(units.max()) + 1
    picks = drawn[rng.integers(0, max(len(drawn), 1), (n, len(drawn)))]
    picks += np.arange(n)[:, None] * n_units
    return np.bincount(picks.ravel(), minlength=n * n_units).reshape(n, n_units)[:, units]


def count_up_to(ascending: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """For each row of (n, k) ascending counts, how many are not above each of (n, 9) limits."""
    n, k = ascending.shape
    lift = np.arange(n)[:, None] * (int(ascending.max(initial=0)) + 1)
    limits = np.minimum(limits, ascending.max(initial=0)) + lift
    found = np.searchsorted((ascending + lift).ravel(), limits.ravel(), side="right")
    return found.reshape(limits.shape) - np.arange(n)[:, None] * k


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95% of bootstrap samples, (low, high); nan where no sample has people."""
    samples = samples[~np.isnan(samples)]
    low, high = np.quantile(samples, [(1 - 0.95) / 2, (1 + 0.95) / 2]) if len(samples) else (np.nan, np.nan)
    return float(low), float(high)
