"""KAIST's log-average miss rate: ground truth, matching and curves. Needs only numpy.

Protocols:
    official: bbGt.m of Piotr Dollár's toolbox with KAIST's settings, the benchmark's own numbers.
    leaderboard: the Python script behind the public leaderboard. Two of its defects are reproduced, so
        that published tables can be compared: it does not count people in frames without detections, and
        it rounds the nine FPPI points to four digits. A third is not: on fewer than 100 frames it takes
        the last detection rate if the first detection is a false positive.

The order of a result file's rows matters only among equal scores in one frame: the first row is matched
first, as by bbGt.m's stable sort.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaist.annotations import (
    SCENES,
    Annotations,
    LabelledFrames,
    PairSet,
    open_test_annotations,
    scene,
    time_of_day,
)
from kaist.files import InputError
from kaist.results import Detections, frame_indices, reindex_frames

MIN_OVERLAP = 0.5  # of a match
BORDER_MARGIN = 5  # people closer to the frame's border are ignored, pixels
FPPI_POINTS = 10.0 ** np.arange(-2, 0.25, 0.25)  # false positives per image at which rates are averaged
PROTOCOLS = {"official": FPPI_POINTS, "leaderboard": np.round(FPPI_POINTS, 4)}  # protocol -> FPPI points
MAX_BLOCK_PAIRS = 1 << 17  # pairs of boxes processed at once, to limit memory


class Setup(NamedTuple):
    """Which people count."""

    heights: tuple[float, float]  # lowest and highest, inclusive, pixels
    occlusion: tuple[int, ...]  # levels
    subset: str = "all"  # of the frames: all, day, night, campus, road or downtown, by set number


REASONABLE = Setup((55, np.inf), (0, 1))
SETUPS = {
    "Reasonable-all": REASONABLE,
    "Reasonable-day": REASONABLE._replace(subset="day"),
    "Reasonable-night": REASONABLE._replace(subset="night"),
    "Scale=near": Setup((115, np.inf), (0,)),
    "Scale=medium": Setup((45, 115), (0,)),
    "Scale=far": Setup((1, 45), (0,)),
    "Occ=none": Setup((1, np.inf), (0,)),
    "Occ=partial": Setup((1, np.inf), (1,)),
    "Occ=heavy": Setup((1, np.inf), (2,)),
}
SCENE_SETUPS = {f"Reasonable-{place}": REASONABLE._replace(subset=place) for place in SCENES}


# ------------------------------------------------------------------- ground truth


@dataclass(frozen=True)
class GroundTruth:
    """The annotated objects of a list of frames."""

    frames: tuple[str, ...]  # frame ids
    frame_idxs: np.ndarray  # (m,) int64, each object's index into `frames`, ascending
    boxes: np.ndarray  # (m, 4) float64 xywh pixels
    occlusion: np.ndarray  # (m,) int64: 0 none, 1 partial, 2 heavy
    ignore: np.ndarray  # (m,) bool, objects of another class than "person" or flagged to be ignored
    source: Path | None = None  # the annotations' file or folder
    pair_set: PairSet | None = None  # None for KAIST

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n_frames, 2) int64 width and height of each frame, pixels."""
        return (self.pair_set or LabelledFrames()).frame_sizes(self.frames)

    def in_subset(self, subset: str) -> np.ndarray:
        """(n_frames,) bool, the frames in a setup's subset."""
        if subset == "all":
            return np.ones(len(self.frames), bool)
        return np.array([subset in names for names in self.subsets], bool)

    @cached_property
    def subsets(self) -> list[tuple[str, ...]]:
        """The subsets that each frame is in: its time of day and, for KAIST, its scene."""
        if self.pair_set is not None:
            return [(self.pair_set.time_of_day(frame_id),) for frame_id in self.frames]
        sets = {frame_id[:5] for frame_id in self.frames}
        subsets = {name: (time_of_day(name), scene(name)) for name in sets}
        return [subsets[frame_id[:5]] for frame_id in self.frames]


def load_ground_truth(
    annotations: Annotations | PairSet | str | Path, frames: Sequence[str] | None = None
) -> GroundTruth:
    """Read the ground truth of a list of frames. Objects of other classes than "person" are ignored.

    Args:
        annotations: opened annotations, or the path of a KAIST root, an annotation folder or a JSON file
            (see `kaist.annotations.open_test_annotations`).
        frames: frame ids; None takes those of the annotation JSON, in its order.

    Raises:
        InputError: a frame is not annotated, a file is malformed, or no frames are given.
    """
    if isinstance(annotations, str | Path):
        annotations = open_test_annotations(annotations, frames)
    frames = annotations.frames if frames is None else tuple(frames)
    if not frames:
        problem = "these annotations have no list of the frames to evaluate"
        raise InputError(problem, "give an image list (--image-list)", file=annotations.source)
    objects, counts = annotations.read_all(frames)
    idxs, ignore = np.repeat(np.arange(len(frames)), counts), ~objects.is_person
    pair_set = annotations if isinstance(annotations, PairSet) else None
    return GroundTruth(frames, idxs, objects.boxes, objects.occlusion, ignore, annotations.source, pair_set)


def select_frames(
    ground_truth: GroundTruth, detections: Detections, frames: Sequence[str]
) -> tuple[GroundTruth, Detections]:
    """Ground truth and detections of some of the frames, in the order of `frames`.

    Raises:
        InputError: a frame is not in the ground truth.
    """
    new_idxs = frame_indices(ground_truth.frames, frames, "the frames evaluated")
    idxs = new_idxs[ground_truth.frame_idxs]
    order = np.argsort(idxs, kind="stable")[np.count_nonzero(idxs < 0) :]
    columns = {name: getattr(ground_truth, name)[order] for name in ("boxes", "occlusion", "ignore")}
    selected = replace(ground_truth, frames=tuple(frames), frame_idxs=idxs[order], **columns)
    return selected, reindex_frames(detections, new_idxs)


# ------------------------------------------------------------------- matching


def overlapping_pairs(ground_truth: GroundTruth, detections: Detections) -> list[np.ndarray]:
    """Pairs of a detection and a ground truth box of the same frame that intersect, in order of detections.

    Returns:
        det, gt: (p,) int64 indices; intersection, det_area, gt_area: (p,) float64 square pixels, of
        continuous coordinates.
    """
    first = np.searchsorted(ground_truth.frame_idxs, np.arange(len(ground_truth.frames) + 1))
    n_pairs = np.diff(first)[detections.frame_idxs]
    blocks = np.flatnonzero(np.diff(np.cumsum(n_pairs) // MAX_BLOCK_PAIRS)) + 1
    (x, y, w, h), (u, v, gt_w, gt_h) = detections.boxes.T, ground_truth.boxes.T
    det_edges, gt_edges = np.stack([x, y, x + w, y + h]), np.stack([u, v, u + gt_w, v + gt_h])
    pairs = []
    for rows in np.split(np.arange(len(n_pairs)), blocks):
        n = n_pairs[rows]
        det = np.repeat(rows, n)
        gt = np.arange(len(det)) + np.repeat(first[detections.frame_idxs[rows]] - np.cumsum(n) + n, n)
        (x0, y0, x1, y1), (u0, v0, u1, v1) = det_edges.take(det, 1), gt_edges.take(gt, 1)
        width, height = np.minimum(x1, u1) - np.maximum(x0, u0), np.minimum(y1, v1) - np.maximum(y0, v0)
        intersect = np.flatnonzero((width > 0) & (height > 0))
        pairs.append((det[intersect], gt[intersect], (width * height)[intersect]))
    det, gt, intersection = map(np.concatenate, zip(*pairs, strict=True))
    return [det, gt, intersection, (w * h)[det], (gt_w * gt_h)[gt]]


def sort_candidates(det: np.ndarray, gt: np.ndarray, overlap: np.ndarray, min_overlap: float) -> np.ndarray:
    """Indices of the pairs (p,) with enough overlap, sorted by detection, then by descending overlap.

    Of equal overlaps the later ground truth box comes first, as in bbGt.m.
    """
    enough = np.flatnonzero(overlap >= min_overlap)
    return enough[np.lexsort((-gt[enough], -overlap[enough], det[enough]))]


def match_greedily(det: np.ndarray, gt: np.ndarray, n_gt: int) -> np.ndarray:
    """Match each detection, in order, with the first of its candidates that is not matched yet.

    Args:
        det, gt: (p,) candidate pairs, sorted by `sort_candidates`; detections are sorted by score.

    Returns:
        (n_gt,) int64: the detection that each ground truth box is matched with, or -1.
    """
    gt_match, last_matched = [-1] * n_gt, -1
    for d, g in zip(det.tolist(), gt.tolist(), strict=True):
        if d != last_matched and gt_match[g] < 0:
            gt_match[g] = last_matched = d
    return np.array(gt_match, np.int64)


@dataclass(frozen=True)
class Matching:
    """Matches under one setup and protocol.

    A detection is ignored if it is matched with an ignored box, or outside the subset.
    """

    outcome: np.ndarray  # (n,) int8 of each detection: 1 true positive, 0 false positive, -1 ignored
    positive: np.ndarray  # (m,) bool, ground truth that counts
    gt_match: np.ndarray  # (m,) int64, the detection that each such box is matched with, or -1
    frames: np.ndarray  # (n_frames,) bool, the frames in the subset


def match_setups(
    ground_truth: GroundTruth,
    detections: Detections,
    setups: Mapping[str, Setup] = SETUPS,
    protocol: str = "official",
) -> Iterator[tuple[str, Matching]]:
    """Match detections, sorted by score, under each setup. Yields (name, matching)."""
    sizes, h = ground_truth.sizes[ground_truth.frame_idxs], ground_truth.boxes[:, 3]
    usable = ~ground_truth.ignore & is_inside(ground_truth.boxes, BORDER_MARGIN, sizes)
    counted = np.ones(len(ground_truth.frames), dtype=bool)
    if protocol == "leaderboard":
        counted = np.bincount(detections.frame_idxs, minlength=len(counted)) > 0
    det, gt, intersection, area, gt_area = overlapping_pairs(ground_truth, detections)
    best = sort_candidates(det, gt, intersection / (area + gt_area - intersection), MIN_OVERLAP)
    match_det, match_gt = det[best], gt[best]
    inside = intersection >= MIN_OVERLAP * area  # enough to ignore the detection if the box is ignored
    matched: dict[tuple, tuple[np.ndarray, ...]] = {}  # setups that differ only by subset share their matches
    for name, (heights, levels, subset) in setups.items():
        if (heights, levels) not in matched:
            counts = usable & (h >= heights[0]) & (h <= heights[1])
            counts &= np.array([level in levels for level in (0, 1, 2)])[ground_truth.occlusion]
            pairs = counts[match_gt]
            gt_match = match_greedily(match_det[pairs], match_gt[pairs], len(counts))
            outcome = np.zeros(len(detections.scores), dtype=np.int8)
            outcome[det[inside & ~counts[gt]]] = -1
            outcome[gt_match[gt_match >= 0]] = 1  # a true positive is never ignored
            matched[heights, levels] = counts, outcome, gt_match
        counts, outcome, gt_match = matched[heights, levels]
        frames = ground_truth.in_subset(subset)
        outcome = np.where(frames[detections.frame_idxs], outcome, -1)
        positive = counts & (frames & counted)[ground_truth.frame_idxs]
        yield name, Matching(outcome, positive, gt_match, frames)


def is_inside(boxes: np.ndarray, margin: float, sizes: np.ndarray) -> np.ndarray:
    """(n,) bool, xywh boxes (n, 4) that keep `margin` pixels to the borders of their frames, sizes (n, 2)."""
    ends = boxes[:, :2] + boxes[:, 2:]
    return ((boxes[:, :2] >= margin) & (ends <= sizes - margin)).all(axis=1)


# ------------------------------------------------------------------- miss rate


@dataclass(frozen=True)
class Result:
    """One setup's miss rate and curve. Rates are fractions, nan if no person counts."""

    miss_rate: float
    recall: float
    rates: np.ndarray  # (9,) detection rate at each of `points`
    points: np.ndarray  # (9,) false positives per image
    hits: np.ndarray  # (k,) bool, true positives among the detections not ignored, by descending score
    scores: np.ndarray  # (k,) float64, their scores
    n_positive: int  # people that count
    n_frames: int  # frames in the subset

    @property
    def fppi(self) -> np.ndarray:
        """(k,) false positives per image among the detections up to each one."""
        return np.cumsum(~self.hits) / self.n_frames

    @property
    def detection_rate(self) -> np.ndarray:
        """(k,) fraction of the people found by the detections up to each one."""
        return divide_or_nan(np.cumsum(self.hits), self.n_positive)


def divide_or_nan(found: np.ndarray, n_positive: np.ndarray | int) -> np.ndarray:
    """found / n_positive, nan where n_positive is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.equal(n_positive, 0), np.nan, np.divide(found, n_positive))


def evaluate(
    ground_truth: GroundTruth,
    detections: Detections,
    setups: Mapping[str, Setup] = SETUPS,
    protocol: str = "official",
) -> dict[str, Result]:
    """Miss rate, recall and curve for each setup.

    The detection rate at an FPPI point is that of the last detection whose FPPI is not above it, or 0. The
    miss rate is the geometric mean of 1 - rate over the nine points (Dollár et al., PAMI 2012).

    Args:
        protocol: "official" or "leaderboard" (see the module's docstring).

    Raises:
        InputError: the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is unknown", f"use {' or '.join(PROTOCOLS)}")
    ranked, points, results = detections.sort_by_score(), PROTOCOLS[protocol], {}
    for name, matching in match_setups(ground_truth, ranked, setups, protocol):
        keep = matching.outcome >= 0
        hits = matching.outcome[keep] == 1
        n_positive, n_frames = (int(np.count_nonzero(x)) for x in (matching.positive, matching.frames))
        false = np.flatnonzero(~hits)
        allowed = np.minimum(allowed_false_positives(n_frames, points), len(false))
        found = np.append(false, len(hits))[allowed] - allowed  # hits before the next false positive
        rates, recall = divide_or_nan(found, n_positive), float(divide_or_nan(hits.sum(), n_positive))
        miss_rate, scores = float(log_average(rates, protocol)), ranked.scores[keep]
        results[name] = Result(miss_rate, recall, rates, points, hits, scores, n_positive, n_frames)
    return results


def allowed_false_positives(n_frames: np.ndarray | int, points: np.ndarray) -> np.ndarray:
    """The largest numbers of false positives, int64, whose FPPI is not above each point."""
    n_frames = np.maximum(n_frames, 1)
    guess = np.floor(n_frames * points).astype(np.int64) + 1  # one more, in case the product was rounded down
    guess -= guess / n_frames > points
    return guess - (guess / n_frames > points)


def log_average(rates: np.ndarray, protocol: str) -> np.ndarray:
    """Miss rate from detection rates (…, 9). The official tool replaces a miss of 0 by 1e-10."""
    missed = 1 - rates
    if protocol == "official":
        missed = np.maximum(missed, 1e-10)
    with np.errstate(divide="ignore"):
        return np.exp(np.log(missed).mean(axis=-1))


def find_id_shift(ground_truth: GroundTruth, detections: Detections) -> int:
    """-1 or 1 if image ids seem to be counted from the wrong number; else 0.

    They do if detections match 1.5 times as many boxes, and at least 20, in the frame before or after theirs.
    """
    n_matched = {}
    for shift in (0, -1, 1):
        idxs = detections.frame_idxs + shift
        inside = (idxs >= 0) & (idxs < len(ground_truth.frames))
        moved = replace(detections.take(inside), frame_idxs=idxs[inside])
        _, gt, intersection, area, gt_area = overlapping_pairs(ground_truth, moved)
        overlapping = intersection >= MIN_OVERLAP * (area + gt_area - intersection)
        n_matched[shift] = len(np.unique(gt[overlapping]))
    best = max(n_matched, key=n_matched.__getitem__)
    return best if n_matched[best] >= max(20, 1.5 * n_matched[0]) else 0
