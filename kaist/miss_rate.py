"""KAIST's log-average miss rate: people, matching, curves. Needs numpy alone.

    from miss_rate import evaluate, load_ground_truth
    from result_files import read_detections

    people = load_ground_truth("KAIST_annotation.json")
    results = evaluate(people, read_detections("result.txt", people.frames))
    print(results["Reasonable-all"].miss_rate)

Protocols:
    official: bbGt.m of Piotr Dollár's toolbox with KAIST's settings, the benchmark's own numbers.
    leaderboard: the Python script behind the public leaderboard. Its two defects are repeated so
        that published tables can be compared: people in frames where the detector found nothing
        are not counted, and the nine FPPI points are rounded to four digits.

The order of a result file's rows changes nothing, but for one thing: detections of one frame with
exactly the same score take their turn in the order of their rows, as in bbGt.m (see `rank`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaist.annotations import (
    FRAME_HEIGHT,
    FRAME_WIDTH,
    Annotations,
    find_annotations,
    find_file,
    open_test_annotations,
    read_image_list,
    scene,
    time_of_day,
)
from kaist.files import InputError
from kaist.results import Detections, frame_places, move_frames

OVERLAP = 0.5  # least overlap of a match
MARGIN = 5  # pixels; people that come closer to the frame's border are ignored
PROTOCOLS = ("official", "leaderboard")
FPPI_POINTS = 10.0 ** np.arange(-2, 0.25, 0.25)  # where the detection rate is sampled
BLOCK = 1 << 17  # elements worked on at once, to bound memory


class Setup(NamedTuple):
    """Which people count: heights (lowest, highest), inclusive, pixels; occlusion levels; subset
    of the frames: "all", "day", "night", "campus", "road" or "downtown", by set number."""

    heights: tuple[float, float]
    occlusion: tuple[int, ...]
    subset: str = "all"


SETUPS = {
    "Reasonable-all": Setup((55, np.inf), (0, 1)),
    "Reasonable-day": Setup((55, np.inf), (0, 1), "day"),
    "Reasonable-night": Setup((55, np.inf), (0, 1), "night"),
    "Scale=near": Setup((115, np.inf), (0,)),
    "Scale=medium": Setup((45, 115), (0,)),
    "Scale=far": Setup((1, 45), (0,)),
    "Occ=none": Setup((1, np.inf), (0,)),
    "Occ=partial": Setup((1, np.inf), (1,)),
    "Occ=heavy": Setup((1, np.inf), (2,)),
}
SCENE_SETUPS = {
    f"Reasonable-{place}": Setup((55, np.inf), (0, 1), place) for place in ("campus", "road", "downtown")
}


# ------------------------------------------------------------------- people


@dataclass(frozen=True)
class GroundTruth:
    """The annotated objects of a list of frames, in the list's order.

    frames: frame ids; frame: (m,) int64 index into them, ascending; boxes: (m, 4) float64 xywh
    pixels; occlusion: (m,) int64; ignore: (m,) bool, objects that are not plainly a person;
    source: where they were read.
    """

    frames: tuple[str, ...]
    frame: np.ndarray
    boxes: np.ndarray
    occlusion: np.ndarray
    ignore: np.ndarray
    source: Path | None = None

    def in_subset(self, subset: str) -> np.ndarray:
        """(n_frames,) bool: the frames of a setup's subset."""
        if subset == "all":
            return np.ones(len(self.frames), dtype=bool)
        one_of_set = {frame_id[:5]: frame_id for frame_id in self.frames}
        chosen = {s for s, f in one_of_set.items() if subset in (time_of_day(f), scene(f))}
        return np.array([frame_id[:5] in chosen for frame_id in self.frames], dtype=bool)


def load_ground_truth(
    annotations: Annotations | str | Path, frames: Sequence[str] | None = None
) -> GroundTruth:
    """Read the people of all frames; whatever is labelled other than "person" is ignored.

    Args:
        annotations: opened, or the path of a KAIST root, an annotation folder or a JSON file
            (see `kaist.open_test_annotations`).
        frames: frame ids; None takes those of the annotation JSON, in its order.

    Raises:
        InputError: a frame is not annotated, a file is malformed, or nothing says which frames.
    """
    if not isinstance(annotations, Annotations):
        annotations = open_test_annotations(annotations, frames)
    frames = annotations.frames if frames is None else tuple(frames)
    if not frames:
        raise InputError(
            "nothing says which frames to evaluate",
            "name an image list (--image-list)",
            file=annotations.source,
        )
    objects, counts = annotations.read_all(frames)
    return GroundTruth(
        frames,
        np.repeat(np.arange(len(frames)), counts),
        objects.boxes,
        objects.occlusion,
        ~objects.is_person,
        annotations.source,
    )


def select_frames(
    ground_truth: GroundTruth, detections: Detections, frames: Sequence[str]
) -> tuple[GroundTruth, Detections]:
    """People and detections of some of the frames, in the order of `frames`.

    Raises:
        InputError: a frame is not among the ground truth's.
    """
    place = frame_places(ground_truth.frames, frames, "the frames evaluated")
    new = place[ground_truth.frame]
    order = np.argsort(new, kind="stable")[np.count_nonzero(new < 0) :]
    people = GroundTruth(
        tuple(frames),
        new[order],
        ground_truth.boxes[order],
        ground_truth.occlusion[order],
        ground_truth.ignore[order],
        ground_truth.source,
    )
    return people, move_frames(detections, place)


# ------------------------------------------------------------------- matching


class Overlaps(NamedTuple):
    """Pairs of a detection and an object of the same frame that overlap enough.

    detection, object: (p,) int64 of the pairs that match if the object counts, by detection and
    within one from the best overlap down (of equal ones the later object first).
    absorbed, absorber: (q,) int64, detection and object of the pairs in which the object absorbs
    the detection if it is ignored.
    """

    detection: np.ndarray
    object: np.ndarray
    absorbed: np.ndarray
    absorber: np.ndarray


def find_overlaps(ground_truth: GroundTruth, detections: Detections) -> Overlaps:
    """All pairs with an overlap of at least 0.5, found in blocks of bounded memory.

    Overlap is intersection over union for objects that count and intersection over the
    detection's area for ignored ones; coordinates are continuous.
    """
    n_frames = len(ground_truth.frames)
    first = np.searchsorted(ground_truth.frame, np.arange(n_frames + 1))
    n_pairs = np.diff(first)[detections.frame]
    blocks = np.flatnonzero(np.diff(np.cumsum(n_pairs) // BLOCK)) + 1
    found = []
    for rows in np.split(np.arange(len(n_pairs)), blocks):
        n = n_pairs[rows]
        detection = np.repeat(rows, n)
        start = first[detections.frame[rows]] - np.cumsum(n) + n
        thing = np.arange(len(detection)) + np.repeat(start, n)
        x, y, w, h = detections.boxes[detection].T
        u, v, s, t = ground_truth.boxes[thing].T
        width = np.minimum(x + w, u + s) - np.maximum(x, u)
        height = np.minimum(y + h, v + t) - np.maximum(y, v)
        shared = np.where((width > 0) & (height > 0), width * height, 0.0)
        union = shared / (w * h + s * t - shared)
        match = np.flatnonzero(union >= OVERLAP)
        match = match[np.lexsort((-thing[match], -union[match], detection[match]))]
        with np.errstate(invalid="ignore"):  # a detection without area overlaps nothing
            absorb = shared / (w * h) >= OVERLAP
        found.append((detection[match], thing[match], detection[absorb], thing[absorb]))
    return Overlaps(*map(np.concatenate, zip(*found, strict=True)))


def assign(detection: np.ndarray, thing: np.ndarray, n_objects: int) -> np.ndarray:
    """Give objects to detections: in turn, each takes the first of its objects still free.

    All frames at once, by proposals: every detection asks for its best object, an object keeps
    the first-ranked detection that ever asks, and the others ask for their next one. As all
    objects rank detections alike, this ends in exactly what serving them in turn gives.

    Args:
        detection, thing: (p,) pairs as in `Overlaps`, detections ranked by their number.

    Returns:
        (n_objects,) int64: the detection that has each object, -1 if none.
    """
    nobody = len(detection)
    holder = np.full(n_objects, nobody)  # of each object, the pair in which it is held
    asking = np.flatnonzero(np.diff(detection, prepend=-1))  # each detection's first pair
    while len(asking):
        wanted = thing[asking]
        before = holder[wanted]
        np.minimum.at(holder, wanted, asking)  # pairs are in order of rank
        now = holder[wanted]
        lost = np.concatenate([asking[now != asking], np.unique(before[before != now])])
        lost = lost[lost + 1 < nobody]
        asking = lost[detection[lost] == detection[lost + 1]] + 1
    return np.append(detection, -1)[holder]


@dataclass(frozen=True)
class Matching:
    """What became of detections and people under one setup and protocol.

    outcome: (n,) int8 of each detection: 1 found a person, 0 false positive, -1 absorbed by an
    ignored object or outside the subset; positive: (m,) bool, objects that count; finder: (m,)
    int64, the detection that found each, or -1; frames: (n_frames,) bool, the subset.
    """

    outcome: np.ndarray
    positive: np.ndarray
    finder: np.ndarray
    frames: np.ndarray


def match_setups(
    ground_truth: GroundTruth,
    detections: Detections,
    setups: Mapping[str, Setup] = SETUPS,
    protocol: str = "official",
) -> Iterator[tuple[str, Matching]]:
    """Match the detections under each setup; the outcomes are in the order of `rank`ed ones."""
    x, y, w, h = ground_truth.boxes.T
    usable = ~ground_truth.ignore & (x >= MARGIN) & (y >= MARGIN)
    usable &= (x + w <= FRAME_WIDTH - MARGIN) & (y + h <= FRAME_HEIGHT - MARGIN)
    counted = np.ones(len(ground_truth.frames), dtype=bool)
    if protocol == "leaderboard":
        counted = np.bincount(detections.frame, minlength=len(counted)) > 0
    elif protocol != "official":
        raise InputError(f"protocol {protocol!r} is unknown", f"use {' or '.join(PROTOCOLS)}")
    overlaps = find_overlaps(ground_truth, detections)
    matched: dict[tuple, tuple[np.ndarray, ...]] = {}  # setups differ by subset only, some of them
    for name, setup in setups.items():
        key = setup[:2]
        if key not in matched:
            low, high = setup.heights
            counts = usable & (h >= low) & (h <= high)
            counts &= np.isin(ground_truth.occlusion, setup.occlusion)
            matched[key] = (counts, *match(overlaps, counts, len(detections.scores)))
        counts, outcome, finder = matched[key]
        frames = ground_truth.in_subset(setup.subset)
        outcome = np.where(frames[detections.frame], outcome, -1)
        positive = counts & (frames & counted)[ground_truth.frame]
        yield name, Matching(outcome, positive, finder, frames)


def match(overlaps: Overlaps, counts: np.ndarray, n_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) outcome of each detection and (m,) finder of each object; `counts`: (m,) bool."""
    outcome = np.zeros(n_detections, dtype=np.int8)
    outcome[overlaps.absorbed[~counts[overlaps.absorber]]] = -1
    chosen = counts[overlaps.object]
    finder = assign(overlaps.detection[chosen], overlaps.object[chosen], len(counts))
    outcome[finder[finder >= 0]] = 1  # what holds a person is not absorbed
    return outcome, finder


def rank(detections: Detections) -> Detections:
    """The detections from the highest score down; equal ones by frame, then by row.

    If some frame's rows are not in descending order, the file has no order to keep, and equal
    scores of one frame are ranked by x, y, w, h instead: every shuffle gives the same result.
    """
    by_frame = np.argsort(detections.frame, kind="stable")
    frame, scores = detections.frame[by_frame], detections.scores[by_frame]
    shuffled = np.any((np.diff(frame) == 0) & (np.diff(scores) > 0))
    order = by_frame[np.argsort(-scores, kind="stable")]
    if shuffled:
        frame, scores = detections.frame[order], detections.scores[order]
        equal = np.pad((np.diff(frame) == 0) & (np.diff(scores) == 0), 1)
        tied = np.flatnonzero(equal[1:] | equal[:-1])
        keys = (*detections.boxes[order[tied]].T[::-1], frame[tied], -scores[tied])
        order[tied] = order[tied][np.lexsort(keys)]
    return replace(
        detections,
        frame=detections.frame[order],
        boxes=detections.boxes[order],
        scores=detections.scores[order],
    )


# ------------------------------------------------------------------- miss rate


@dataclass(frozen=True)
class Result:
    """One setup's miss rate and curve; rates are fractions.

    miss_rate, recall: nan where no person counts. rates: (9,) detection rate at FPPI `points`.
    hits, scores: (k,) bool, float64, the detections that count, from the highest score down: true
    or false positive. n_positive, n_frames: people that count, frames of the subset.
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
        return share(np.cumsum(self.hits), self.n_positive)


def share(found: np.ndarray, n_positive: np.ndarray | int) -> np.ndarray:
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
    ranked = rank(detections)
    points = fppi_points(protocol)
    results = {}
    for name, matching in match_setups(ground_truth, ranked, setups, protocol):
        keep = matching.outcome >= 0
        hits = matching.outcome[keep] == 1
        n_positive = int(np.count_nonzero(matching.positive))
        n_frames = int(np.count_nonzero(matching.frames))
        false = np.flatnonzero(~hits)
        allowed = np.minimum(allowed_false_positives(n_frames, points), len(false))
        found = np.append(false, len(hits))[allowed] - allowed  # hits before the next false one
        rates = share(found, n_positive)
        results[name] = Result(
            float(log_average(rates, protocol)),
            float(share(hits.sum(), n_positive)),
            rates,
            points,
            hits,
            ranked.scores[keep],
            n_positive,
            n_frames,
        )
    return results


def fppi_points(protocol: str) -> np.ndarray:
    """(9,) FPPI at which a protocol samples the curve."""
    return np.round(FPPI_POINTS, 4) if protocol == "leaderboard" else FPPI_POINTS


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


def id_shift(ground_truth: GroundTruth, detections: Detections) -> int:
    """-1 or 1 if the detections fit the people of the frame before or after clearly better than
    those of their own, as when ids were counted from the wrong number; else 0.

    Clearly: detections overlap half as many people again, and at least twenty.
    """
    fits = {}
    for shift in (0, -1, 1):
        frame = detections.frame + shift
        inside = (frame >= 0) & (frame < len(ground_truth.frames))
        moved = Detections(frame[inside], detections.boxes[inside], detections.scores[inside])
        fits[shift] = len(np.unique(find_overlaps(ground_truth, moved).object))
    best = max(fits, key=fits.__getitem__)
    return best if fits[best] >= max(20, 1.5 * fits[0]) else 0


def open_test_set(root: Path, test_list: str, where: str) -> GroundTruth:
    """The people of a test list.

    Args:
        test_list: an image list below the root, or any path.
        where: TEST_ANNOTATIONS: "auto" (see `kaist.open_test_annotations`), a form, or a path.
    """
    frame_ids = read_image_list(find_file(root, test_list))
    if where == "auto":
        annotations = open_test_annotations(root, frame_ids)
    else:
        annotations = find_annotations(root, where, "lwir")
    return load_ground_truth(annotations, frame_ids)
