"""KAIST's log-average miss rate: ground truth, matching, curves. Needs numpy alone.

Protocols:
    official: bbGt.m of Piotr Dollár's toolbox with KAIST's settings, the benchmark's own numbers.
    leaderboard: the Python script behind the public leaderboard. Its two defects are repeated so
        that published tables can be compared: people in frames where the detector found nothing
        are not counted, and the nine FPPI points are rounded to four digits. (A third is not: where
        a subset of less than 100 frames begins with a false positive, it takes the last rate.)

Rows of a result file may stand in any order. Only among detections of one frame with the same score
the order counts: the first row is matched first, as by bbGt.m's stable sort.
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

MIN_OVERLAP = 0.5  # least overlap of a match
BORDER_MARGIN = 5  # pixels; people that come closer to the frame's border are ignored
FPPI_POINTS = 10.0 ** np.arange(-2, 0.25, 0.25)  # where the detection rate is sampled
PROTOCOLS = {"official": FPPI_POINTS, "leaderboard": np.round(FPPI_POINTS, 4)}  # by protocol
MAX_BLOCK_PAIRS = 1 << 17  # elements worked on at once, to bound memory


class Setup(NamedTuple):
    """Which people count: heights (lowest, highest), inclusive, pixels; occlusion levels; subset
    of the frames: "all", "day", "night", "campus", "road" or "downtown", by set number."""

    heights: tuple[float, float]
    occlusion: tuple[int, ...]
    subset: str = "all"


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


# ------------------------------------------------------------------- people


@dataclass(frozen=True)
class GroundTruth:
    """The annotated objects of a list of frames, in the list's order.

    frames: frame ids; frame: (m,) int64 index into them, ascending; boxes: (m, 4) float64 xywh
    pixels; occlusion: (m,) int64; ignore: (m,) bool, objects that are not plainly a person;
    source: where they were read; pairs: the set that they are of, if not KAIST.
    """

    frames: tuple[str, ...]
    frame_idxs: np.ndarray
    boxes: np.ndarray
    occlusion: np.ndarray
    ignore: np.ndarray
    source: Path | None = None
    pair_set: PairSet | None = None

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n_frames, 2) int64 width and height of the frames."""
        return (self.pair_set or LabelledFrames()).frame_sizes(self.frames)

    def in_subset(self, subset: str) -> np.ndarray:
        """(n_frames,) bool: the frames of a setup's subset."""
        if subset == "all":
            return np.ones(len(self.frames), bool)
        return np.array([subset in names for names in self.subsets], bool)

    @cached_property
    def subsets(self) -> list[tuple[str, ...]]:
        """Of each frame its time of day and, of KAIST, its scene."""
        if self.pair_set is not None:
            return [(self.pair_set.time_of_day(frame_id),) for frame_id in self.frames]
        sets = {frame_id[:5] for frame_id in self.frames}
        subsets = {name: (time_of_day(name), scene(name)) for name in sets}
        return [subsets[frame_id[:5]] for frame_id in self.frames]


def load_ground_truth(
    annotations: Annotations | PairSet | str | Path, frames: Sequence[str] | None = None
) -> GroundTruth:
    """Read the people of all frames; whatever is labelled other than "person" is ignored.

    Args:
        annotations: opened, or the path of a KAIST root, an annotation folder or a JSON file
            (see `kaist.open_test_annotations`).
        frames: frame ids; None takes those of the annotation JSON, in its order.

    Raises:
        InputError: a frame is not annotated, a file is malformed, or nothing says which frames.
    """
    if isinstance(annotations, str | Path):
        annotations = open_test_annotations(annotations, frames)
    frames = annotations.frames if frames is None else tuple(frames)
    if not frames:
        problem = "nothing says which frames to evaluate"
        raise InputError(problem, "name an image list (--image-list)", file=annotations.source)
    objects, counts = annotations.read_all(frames)
    frame, ignore = np.repeat(np.arange(len(frames)), counts), ~objects.is_person
    pairs = annotations if isinstance(annotations, PairSet) else None
    return GroundTruth(frames, frame, objects.boxes, objects.occlusion, ignore, annotations.source, pairs)


def select_frames(
    ground_truth: GroundTruth, detections: Detections, frames: Sequence[str]
) -> tuple[GroundTruth, Detections]:
    """People and detections of some of the frames, in the order of `frames`.

    Raises:
        InputError: a frame is not among the ground truth's.
    """
    place = frame_indices(ground_truth.frames, frames, "the frames evaluated")
    frame = place[ground_truth.frame_idxs]
    order = np.argsort(frame, kind="stable")[np.count_nonzero(frame < 0) :]
    columns = {name: getattr(ground_truth, name)[order] for name in ("boxes", "occlusion", "ignore")}
    selected = replace(ground_truth, frames=tuple(frames), frame_idxs=frame[order], **columns)
    return selected, reindex_frames(detections, place)


# ------------------------------------------------------------------- matching


def overlapping_pairs(ground_truth: GroundTruth, detections: Detections) -> list[np.ndarray]:
    """Detections and ground truth boxes of their frames that share an area; coordinates are continuous.

    Returns:
        (p,) det and gt, by det; the area that they share; and the area of each.
    """
    first = np.searchsorted(ground_truth.frame_idxs, np.arange(len(ground_truth.frames) + 1))
    n_pairs = np.diff(first)[detections.frame_idxs]
    blocks = np.flatnonzero(np.diff(np.cumsum(n_pairs) // MAX_BLOCK_PAIRS)) + 1
    (x, y, w, h), (u, v, gt_w, gt_h) = detections.boxes.T, ground_truth.boxes.T
    det_edges, gt_edges = np.stack([x, y, x + w, y + h]), np.stack([u, v, u + gt_w, v + gt_h])
    found = []
    for rows in np.split(np.arange(len(n_pairs)), blocks):
        n = n_pairs[rows]
        det = np.repeat(rows, n)
        gt = np.arange(len(det)) + np.repeat(first[detections.frame_idxs[rows]] - np.cumsum(n) + n, n)
        (x0, y0, x1, y1), (u0, v0, u1, v1) = det_edges.take(det, 1), gt_edges.take(gt, 1)
        width, height = np.minimum(x1, u1) - np.maximum(x0, u0), np.minimum(y1, v1) - np.maximum(y0, v0)
        touch = np.flatnonzero((width > 0) & (height > 0))
        found.append((det[touch], gt[touch], (width * height)[touch]))
    det, gt, shared = map(np.concatenate, zip(*found, strict=True))
    return [det, gt, shared, (w * h)[det], (gt_w * gt_h)[gt]]


def sort_candidates(det: np.ndarray, gt: np.ndarray, overlap: np.ndarray, least: float) -> np.ndarray:
    """Which pairs overlap by enough; by detection, and each detection's from the best overlap down (of equal
    ones the later box first)."""
    enough = np.flatnonzero(overlap >= least)
    return enough[np.lexsort((-gt[enough], -overlap[enough], det[enough]))]


def match_greedily(det: np.ndarray, gt: np.ndarray, n_gt: int) -> np.ndarray:
    """Match detections in turn: each takes the first of its ground truth boxes that is still free.

    Args:
        det, gt: (p,) pairs as of `sort_candidates`, detections ranked by their number.

    Returns:
        (n_gt,) int64: the detection that each box is matched with, -1 if none.
    """
    gt_match, served = [-1] * n_gt, -1
    for d, g in zip(det.tolist(), gt.tolist(), strict=True):
        if d != served and gt_match[g] < 0:
            gt_match[g] = served = d
    return np.array(gt_match, np.int64)


@dataclass(frozen=True)
class Matching:
    """Matches under one setup and protocol.

    outcome: (n,) int8 of each detection: 1 true positive, 0 false positive, -1 ignored: matched with
    an ignored box, or outside the subset. positive: (m,) bool, ground truth that counts. gt_match:
    (m,) int64, the detection that each such box is matched with, or -1. frames: (n_frames,) bool,
    the subset.
    """

    outcome: np.ndarray
    positive: np.ndarray
    gt_match: np.ndarray
    frames: np.ndarray


def match_setups(
    ground_truth: GroundTruth,
    detections: Detections,
    setups: Mapping[str, Setup] = SETUPS,
    protocol: str = "official",
) -> Iterator[tuple[str, Matching]]:
    """Match `rank`ed detections under each setup; outcomes are in their order."""
    sizes, h = ground_truth.sizes[ground_truth.frame_idxs], ground_truth.boxes[:, 3]
    usable = ~ground_truth.ignore & is_inside(ground_truth.boxes, BORDER_MARGIN, sizes)
    counted = np.ones(len(ground_truth.frames), dtype=bool)
    if protocol == "leaderboard":
        counted = np.bincount(detections.frame_idxs, minlength=len(counted)) > 0
    det, gt, shared, area, gt_area = overlapping_pairs(ground_truth, detections)
    best = sort_candidates(det, gt, shared / (area + gt_area - shared), MIN_OVERLAP)
    match_det, match_gt = det[best], gt[best]
    inside = shared >= MIN_OVERLAP * area  # of a box to ignore, by which then the detection is ignored
    matched: dict[tuple, tuple[np.ndarray, ...]] = {}  # setups differ by subset only, some of them
    for name, (heights, levels, subset) in setups.items():
        if (heights, levels) not in matched:
            counts = usable & (h >= heights[0]) & (h <= heights[1])
            counts &= np.array([level in levels for level in (0, 1, 2)])[ground_truth.occlusion]
            pairs = counts[match_gt]
            gt_match = match_greedily(match_det[pairs], match_gt[pairs], len(counts))
            outcome = np.zeros(len(detections.scores), dtype=np.int8)
            outcome[det[inside & ~counts[gt]]] = -1
            outcome[gt_match[gt_match >= 0]] = 1  # a matched detection is never ignored
            matched[heights, levels] = counts, outcome, gt_match
        counts, outcome, gt_match = matched[heights, levels]
        frames = ground_truth.in_subset(subset)
        outcome = np.where(frames[detections.frame_idxs], outcome, -1)
        positive = counts & (frames & counted)[ground_truth.frame_idxs]
        yield name, Matching(outcome, positive, gt_match, frames)


def is_inside(boxes: np.ndarray, margin: float, sizes: np.ndarray) -> np.ndarray:
    """(n,) bool: which xywh boxes keep a margin to the borders of their frames, of sizes (n, 2)."""
    ends = boxes[:, :2] + boxes[:, 2:]
    return ((boxes[:, :2] >= margin) & (ends <= sizes - margin)).all(axis=1)


def sort_by_score(detections: Detections) -> Detections:
    """The detections from the highest score down; equal ones by frame, then by row."""
    order = np.argsort(detections.frame_idxs, kind="stable")
    return detections.take(order[np.argsort(-detections.scores[order], kind="stable")])


# ------------------------------------------------------------------- miss rate


@dataclass(frozen=True)
class Result:
    """One setup's miss rate and curve; rates are fractions.

    miss_rate, recall: nan where no person counts. rates: (9,) detection rate at FPPI `points`.
    hits, scores: (k,) bool, float64, the detections that are not ignored, from the highest score
    down: true or false positive. n_positive, n_frames: people that count, frames of the subset.
    """

    miss_rate: float
    recall: float
    rates: np.ndarray
    points: np.ndarray
    hits: np.ndarray
    scores: np.ndarray
    n_positive: int
    n_frames: int

    @property
    def fppi(self) -> np.ndarray:
        """(k,) false positives per image down to each detection."""
        return np.cumsum(~self.hits) / self.n_frames

    @property
    def detection_rate(self) -> np.ndarray:
        """(k,) share of the people found down to each detection; nan where none counts."""
        return divide_or_nan(np.cumsum(self.hits), self.n_positive)


def divide_or_nan(found: np.ndarray, n_positive: np.ndarray | int) -> np.ndarray:
    """found / n_positive, nan where nobody counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.equal(n_positive, 0), np.nan, np.divide(found, n_positive))


def evaluate(
    ground_truth: GroundTruth,
    detections: Detections,
    setups: Mapping[str, Setup] = SETUPS,
    protocol: str = "official",
) -> dict[str, Result]:
    """Miss rate, recall and curve for each setup.

    The rate at an FPPI point is that of the last detection whose FPPI is not above it, 0 if
    there is none; the miss rate is the geometric mean of 1 - rate over the nine points.

    Args:
        protocol: "official" or "leaderboard" (see the module's docstring).
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is unknown", f"use {' or '.join(PROTOCOLS)}")
    ranked, points, results = sort_by_score(detections), PROTOCOLS[protocol], {}
    for name, matching in match_setups(ground_truth, ranked, setups, protocol):
        keep = matching.outcome >= 0
        hits = matching.outcome[keep] == 1
        n_positive, n_frames = (int(np.count_nonzero(x)) for x in (matching.positive, matching.frames))
        false = np.flatnonzero(~hits)
        allowed = np.minimum(allowed_false_positives(n_frames, points), len(false))
        found = np.append(false, len(hits))[allowed] - allowed  # hits before the next false one
        rates, recall = divide_or_nan(found, n_positive), float(divide_or_nan(hits.sum(), n_positive))
        miss_rate, scores = float(log_average(rates, protocol)), ranked.scores[keep]
        results[name] = Result(miss_rate, recall, rates, points, hits, scores, n_positive, n_frames)
    return results


def allowed_false_positives(n_frames: np.ndarray | int, points: np.ndarray) -> np.ndarray:
    """The most false positives whose number / n_frames is not above each point, int64."""
    n_frames = np.maximum(n_frames, 1)
    guess = np.floor(n_frames * points).astype(np.int64) + 1  # one more, lest rounding lost it
    guess -= guess / n_frames > points
    return guess - (guess / n_frames > points)


def log_average(rates: np.ndarray, protocol: str) -> np.ndarray:
    """Miss rate from detection rates (…, 9); where all people are found at a point, a miss of
    1e-10 stands for 0, except that the leaderboard's script then returns 0."""
    missed = 1 - rates
    if protocol == "official":
        missed = np.maximum(missed, 1e-10)
    with np.errstate(divide="ignore"):
        return np.exp(np.log(missed).mean(axis=-1))


def find_id_shift(ground_truth: GroundTruth, detections: Detections) -> int:
    """-1 or 1 if the detections fit the people of the frame before or after clearly better than
    those of their own, as when ids were counted from the wrong number; else 0.

    Clearly: detections overlap half as many people again, and at least twenty.
    """
    fits = {}
    for shift in (0, -1, 1):
        frame = detections.frame_idxs + shift
        inside = (frame >= 0) & (frame < len(ground_truth.frames))
        moved = replace(detections.take(inside), frame_idxs=frame[inside])
        _, gt, shared, area, gt_area = overlapping_pairs(ground_truth, moved)
        fits[shift] = len(np.unique(gt[shared >= MIN_OVERLAP * (area + gt_area - shared)]))
    best = max(fits, key=fits.__getitem__)
    return best if fits[best] >= max(20, 1.5 * fits[0]) else 0
