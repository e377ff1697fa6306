"""Confidence intervals of miss rates: bootstrap over frames or videos. Needs only numpy."""

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
)
from kaist.results import Detections

MAX_RESAMPLES = 10**6  # their rates are kept in memory


def bootstrap(
    ground_truth: GroundTruth,
    detections: Detections,
    setups: Mapping[str, Setup] = SETUPS,
    *,
    resamples: int = 1000,
    seed: int = 0,
    by_video: bool = False,
) -> dict[str, np.ndarray]:
    """Official miss rates of resampled frames: setup -> (resamples,) float64; nan for one frame or video.

    The nonparametric bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6
    and 13): as many frames as a subset has are sampled from it with replacement, and keep their matches.
    `by_video` samples whole videos instead (the cluster bootstrap; Davison and Hinkley, Bootstrap Methods,
    1997, section 3.8). Frames of one video resemble each other, so sampling frames understates the
    uncertainty about other streets.

    Samples depend only on the seed and the frames. So the difference of two detectors' samples is a paired
    one, and its interval shows whether the detectors differ on these frames.
    """
    ranked = detections.sort_by_score()
    videos = [*map(video_of, ground_truth.frames)]
    units = np.unique(videos, return_inverse=True)[1] if by_video else np.arange(len(videos))
    n_units, samples = int(units.max()) + 1, {}
    for name, matching in match_setups(ground_truth, ranked, setups):
        rng = np.random.default_rng(seed)
        in_subset = np.unique(units[matching.frames])
        if len(in_subset) == 1:
            samples[name] = np.full(resamples, np.nan)
            continue
        n_people = np.bincount(ground_truth.frame_idxs[matching.positive], minlength=len(videos))
        hits, false = matching.outcome == 1, matching.outcome == 0
        hits_before = np.append(
            np.cumsum(hits)[false], np.count_nonzero(hits)
        )  # each false positive; the end
        hits, false = ranked.frame_idxs[hits], ranked.frame_idxs[false]
        rates = np.empty((resamples, len(FPPI_POINTS)))
        for i in range(resamples):
            picks = in_subset[rng.integers(0, max(len(in_subset), 1), len(in_subset))]
            weight = np.bincount(picks, minlength=n_units)[units] * matching.frames  # copies of each frame
            allowed = allowed_false_positives(weight.sum(), FPPI_POINTS)
            n_false = np.searchsorted(np.cumsum(weight[false]), allowed, side="right")
            found = np.append(0, np.cumsum(weight[hits]))[hits_before[n_false]]
            rates[i] = divide_or_nan(found, weight @ n_people)
        samples[name] = log_average(rates, "official")
    return samples


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of bootstrap samples, (low, high); nan if no sample has people."""
    samples = samples[~np.isnan(samples)]
    low, high = np.quantile(samples, [(1 - 0.95) / 2, (1 + 0.95) / 2]) if len(samples) else (np.nan, np.nan)
    return float(low), float(high)
