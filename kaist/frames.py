"""Annotated frames as training sees them: corners of boxes, and who is learned or ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kaist.annotations import FRAME_SIZE, Annotations, PairSet, time_of_day
from kaist.files import InputError
from kaist.miss_rate import GroundTruth, is_inside

# What `split_frames` takes from a configuration.
FRAME_KEYS = ("validation", "seed", "min_height", "margin", "learn")
VISIBLE, LWIR, BOTH = 1, 2, 3  # bits: in which modality's image an object is seen
# Whom LEARN names: the words that annotations call them by, () for any.
PERSON_LABELS = {"person": ("person",), "people": ("person", "person?", "people"), "all": ()}


@dataclass(frozen=True)
class Frame:
    """One frame's objects.

    boxes_px: (n, 4) float32 xyxy pixels of the frame; labels: (n,) int64, 1 for a person to learn, -1
    for an object to ignore; seen: (n,) int64, whose box it is: `VISIBLE`, `LWIR` or `BOTH`; size:
    width and height of the frame, pixels.
    """

    id: str
    boxes_px: np.ndarray
    labels: np.ndarray
    seen: np.ndarray
    size: tuple[int, int] = FRAME_SIZE

    @property
    def persons(self) -> np.ndarray:
        """(m, 4) boxes of the persons to learn."""
        return self.boxes_px[self.labels == 1]

    @property
    def n_persons(self) -> int:
        """How many persons there are to learn; one of two boxes, each a modality's, counts once."""
        return max(int((self.seen[self.labels == 1] & bit > 0).sum()) for bit in (VISIBLE, LWIR))


def load_frames(
    frame_ids: list[str],
    annotations: Annotations | PairSet,
    *,
    min_height: float,
    margin: float,
    learn: str = "person",
    pairs: bool = False,
) -> list[Frame]:
    """Read the annotations of all frames; a malformed file stops here, before any training.

    Args:
        min_height, margin: as in `make_frames`; learn: a key of `PERSON_LABELS`.
        pairs: of the paired form read each modality's boxes, not those of one for both.
    """
    if pairs and isinstance(annotations, Annotations) and annotations.form == "paired":
        how = {"min_height": min_height, "margin": margin, "learn": learn}
        sources = (Annotations(annotations.source, "paired", modality) for modality in ("visible", "lwir"))
        visible, lwir = (load_frames(frame_ids, source, **how) for source in sources)
        return [pair_frame(*frames) for frames in zip(visible, lwir, strict=True)]
    objects, counts = annotations.read_all(frame_ids)
    sizes, names = annotations.frame_sizes(frame_ids), PERSON_LABELS[learn]
    is_person = np.array([not names or label in names for label in objects.labels], bool) & ~objects.ignore
    return make_frames(frame_ids, objects.boxes, is_person, counts, sizes, min_height, margin)


def pair_frame(visible: Frame, lwir: Frame) -> Frame:
    """A frame of each modality's objects, those that agree in box and label once."""
    objects = [np.column_stack([frame.boxes_px, frame.labels]) for frame in (visible, lwir)]
    seen = np.repeat([VISIBLE, LWIR], [len(visible.labels), len(lwir.labels)])
    rows, seen = merge_equal(np.concatenate(objects), seen)
    return Frame(visible.id, rows[:, :4].astype(np.float32), rows[:, 4].astype(np.int64), seen)


def merge_equal(rows: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal rows (n, k) once, where the first stood, their bits (n,) int64 joined by "or" (-1 stays -1)."""
    _, first, place = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    joined = np.zeros(len(first), np.int64)
    np.bitwise_or.at(joined, place.reshape(-1), bits)
    order = first.argsort()
    return rows[first[order]], joined[order]


def frames_from_gt(ground_truth: GroundTruth, min_height: float, margin: float) -> list[Frame]:
    """A test list's frames, with the labels that training would give their objects."""
    counts = np.bincount(ground_truth.frame, minlength=len(ground_truth.frames))
    objects = ground_truth.boxes, ~ground_truth.ignore, counts
    return make_frames(ground_truth.frames, *objects, ground_truth.sizes, min_height, margin)


def make_frames(
    frame_ids: Sequence[str],
    boxes: np.ndarray,
    is_person: np.ndarray,
    counts: np.ndarray,
    sizes: np.ndarray,
    min_height: float,
    margin: float,
) -> list[Frame]:
    """Frames of so many objects and such sizes, (n_frames,) and (n_frames, 2).

    Ignored are objects that are not plainly a person, persons lower than `min_height` pixels, and
    persons that leave the frame less `margin` pixels on each side.

    Args:
        boxes: (n, 4) xywh pixels of one frame after the other; is_person: (n,) bool.
    """
    is_learned = is_person & (boxes[:, 3] >= min_height) & is_inside(boxes, margin, sizes.repeat(counts, 0))
    labels = np.where(is_learned, 1, -1).astype(np.int64)
    corners = boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    first = counts.cumsum()[:-1]
    objects = zip(np.split(corners, first), np.split(labels, first), strict=True)
    rows = zip(frame_ids, objects, counts, map(tuple, sizes.tolist()), strict=True)
    return [Frame(frame_id, *own, np.full(count, BOTH), size) for frame_id, own, count, size in rows]


def video_of(frame_id: str) -> str:
    """set00/V000 of set00/V000/I00000."""
    return frame_id.rpartition("/")[0]


def indices_in_videos(frame_ids: Iterable[str]) -> list[int]:
    """How many frames of its video come before each frame in a list."""
    seen: Counter[str] = Counter()
    places = []
    for video in map(video_of, frame_ids):
        places.append(seen[video])
        seen[video] += 1
    return places


def describe_videos(frame_ids: Iterable[str]) -> str:
    """The videos of frames in words, with the number of frames of each."""
    return ", ".join(f"{video} ({n})" for video, n in Counter(map(video_of, frame_ids)).items())


def hold_out_videos(times: Mapping[str, str], share: float, seed: int) -> dict[str, None]:
    """The frames, as keys, of whole videos, drawn at random, that together are near a share of a list.

    Neighbouring frames show the same people, so that frames drawn one by one would be known from
    training. Of day and of night as much is held out, at least one video each, but never the last.
    times: frame id -> "day" or "night", or "" where nothing tells.

    Raises:
        InputError: a share is asked for, and there is a single video of day and of night.
    """
    held_out: set[str] = set()
    for time in sorted({*times.values()}) if share else ():
        own = [video_of(frame_id) for frame_id, its_time in times.items() if its_time == time]
        videos, counts = np.unique(own, return_counts=True)
        order, n = np.random.default_rng(seed).permutation(len(videos)), 0
        for i in order[:-1]:
            if n + counts[i] / 2 <= share * len(own):  # nearer to the share with it than without
                held_out.add(str(videos[i]))
                n += counts[i]
        if not n and len(videos) > 1:
            held_out.add(str(videos[counts.argmin()]))
    if share and not held_out:
        problem = f"VALIDATION = {share:g} holds out whole videos, and the list has one of day and of night"
        raise InputError(problem, "list more videos, or set VALIDATION = 0")
    return dict.fromkeys(frame_id for frame_id in times if video_of(frame_id) in held_out)


def split_frames(
    frame_ids: list[str], annotations: Annotations | PairSet, *, validation: float, seed: int, **how: object
) -> tuple[list[Frame], list[str]]:
    """The frames to train on, and the ids of those held out for validation (maybe none).

    Args:
        validation, seed: the share and the seed of `hold_out_videos`; how: as of `load_frames`.

    Raises:
        InputError: no frame to train on holds a person to learn.
    """
    time_of = annotations.time_of_day if isinstance(annotations, PairSet) else time_of_day
    held_out = hold_out_videos({i: time_of(i) for i in frame_ids}, validation, seed)
    frames = [frame for frame in load_frames(frame_ids, annotations, **how) if frame.id not in held_out]
    if not any(frame.n_persons for frame in frames):
        problem = "no frame of the training list holds a person to learn"
        remedy = "check TRAIN_LIST, VALIDATION, ANNOTATIONS, LEARN and MIN_HEIGHT"
        raise InputError(problem, remedy, file=annotations.source)
    return frames, list(held_out)
