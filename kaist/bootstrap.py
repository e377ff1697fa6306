"""How sure a miss rate is: bootstrap over frames or videos. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kaist.frames import video_of
from kaist.miss_rate import (
    FPPI_POINTS,
    SETUPS,
    GroundTruth,
    Setup,
    allowed_false_positives,
    divide_or_nan,
    log_average,
    match_setups,
    sort_by_score,
)
from kaist.results import Detections

MAX_RESAMPLES = 10**6  # whose rates are held in memory


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
    samples is the paired one, whose interval says whether they differ on these frames. Of a single frame or
    video samples are nan.
    """
    ranked = sort_by_score(detections)
    videos = [*map(video_of, ground_truth.frames)]
    units = np.unique(videos, return_inverse=True)[1] if by_video else np.arange(len(videos))
    n_units, samples = int(units.max()) + 1, {}
    for name, matching in match_setups(ground_truth, ranked, setups):
        rng = np.random.default_rng(seed)
        drawn = np.unique(units[matching.frames])
        if len(drawn) == 1:  # which says nothing about others
            samples[name] = np.full(resamples, np.nan)
            continue
        people = np.bincount(ground_truth.frame_idxs[matching.positive], minlength=len(videos))
        hits, false = matching.outcome == 1, matching.outcome == 0
        hits_before = np.append(np.cumsum(hits)[false], np.count_nonzero(hits))  # each false one, and the end
        hits, false = ranked.frame_idxs[hits], ranked.frame_idxs[false]
        rates = np.empty((resamples, len(FPPI_POINTS)))
        for i in range(resamples):
            picks = drawn[rng.integers(0, max(len(drawn), 1), len(drawn))]
            weight = np.bincount(picks, minlength=n_units)[units] * matching.frames  # of each frame
            allowed = allowed_false_positives(weight.sum(), FPPI_POINTS)
            seen = np.searchsorted(np.cumsum(weight[false]), allowed, side="right")
            found = np.append(0, np.cumsum(weight[hits]))[hits_before[seen]]
            rates[i] = divide_or_nan(found, weight @ people)
        samples[name] = log_average(rates, "official")
    return samples


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95% of bootstrap samples, (low, high); nan where no sample has people."""
    samples = samples[~np.isnan(samples)]
    low, high = np.quantile(samples, [(1 - 0.95) / 2, (1 + 0.95) / 2]) if len(samples) else (np.nan, np.nan)
    return float(low), float(high)
