"""Frames for training: xyxy boxes labelled as person or ignore, and a validation split by video."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kaist.annotations import FRAME_SIZE, Annotations, PairSet, time_of_day
from kaist.files import InputError
from kaist.miss_rate import GroundTruth, is_inside

# Config keys that `split_frames` takes.
FRAME_KEYS = ("validation", "seed", "min_height", "margin", "learn")
VISIBLE, LWIR, BOTH = 1, 2, 3  # bit flags of `Frame.seen`
# LEARN -> annotated classes that count as persons; (): all classes.
PERSON_LABELS = {"person": ("person",), "people": ("person", "person?", "people"), "all": ()}


@dataclass(frozen=True)
class Frame:
    """The objects of one frame.

    Attributes:
        boxes_px: (n, 4) float32 xyxy, pixels of the frame; size: its width and height.
        labels: (n,) int64, 1 for a person to train on, -1 for an object to ignore.
        seen: (n,) int64, the modality whose box it is: `VISIBLE`, `LWIR` or `BOTH`.
    """

    id: str
    boxes_px: np.ndarray
    labels: np.ndarray
    seen: np.ndarray
    size: tuple[int, int] = FRAME_SIZE

    @property
    def persons(self) -> np.ndarray:
        """(m, 4) float32 xyxy boxes of the persons to train on."""
        return self.boxes_px[self.labels == 1]

    @property
    def n_persons(self) -> int:
        """Number of persons to train on; a person with a box for each modality counts once."""
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
    """Read the annotations of all frames, so that malformed files are found before training.

    Args:
        min_height, margin: as in `make_frames`.
        learn: a key of `PERSON_LABELS`.
        pairs: read the boxes of both modalities from the paired form, instead of one modality's for both.
    """
    if pairs and isinstance(annotations, Annotations) and annotations.form == "paired":
        kwargs = {"min_height": min_height, "margin": margin, "learn": learn}
        sources = (Annotations(annotations.source, "paired", modality) for modality in ("visible", "lwir"))
        visible, lwir = (load_frames(frame_ids, source, **kwargs) for source in sources)
        return [pair_frame(*frames) for frames in zip(visible, lwir, strict=True)]
    objects, counts = annotations.read_all(frame_ids)
    sizes, names = annotations.frame_sizes(frame_ids), PERSON_LABELS[learn]
    is_person = np.array([not names or label in names for label in objects.labels], bool) & ~objects.ignore
    return make_frames(frame_ids, objects.boxes, is_person, counts, sizes, min_height, margin)


def pair_frame(visible: Frame, lwir: Frame) -> Frame:
    """Merge the objects of both modalities into one frame; equal boxes with equal labels become one."""
    objects = [np.column_stack([frame.boxes_px, frame.labels]) for frame in (visible, lwir)]
    seen = np.repeat([VISIBLE, LWIR], [len(visible.labels), len(lwir.labels)])
    rows, seen = merge_equal(np.concatenate(objects), seen)
    return Frame(visible.id, rows[:, :4].astype(np.float32), rows[:, 4].astype(np.int64), seen)


def merge_equal(rows: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal rows (n, k) into the first of them and their bits (n,) int64 by bitwise or."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    merged = np.zeros(len(first), np.int64)
    np.bitwise_or.at(merged, inverse.reshape(-1), bits)
    order = first.argsort()
    return rows[first[order]], merged[order]


def frames_from_gt(ground_truth: GroundTruth, min_height: float, margin: float) -> list[Frame]:
    """Convert ground truth to frames, labelled as for training."""
    counts = np.bincount(ground_truth.frame_idxs, minlength=len(ground_truth.frames))
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
    """Build frames from concatenated objects.

    An object is ignored if it is not a person, is less than `min_height` pixels high, or is not
    inside the frame with a distance of `margin` pixels to each border.

    Args:
        boxes: (n, 4) xywh pixels; is_person: (n,) bool.
        counts: (n_frames,) number of objects of each frame; sizes: (n_frames, 2) width and height.
    """
    is_target = is_person & (boxes[:, 3] >= min_height) & is_inside(boxes, margin, sizes.repeat(counts, 0))
    labels = np.where(is_target, 1, -1).astype(np.int64)
    corners = boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    first = counts.cumsum()[:-1]
    objects = zip(np.split(corners, first), np.split(labels, first), strict=True)
    rows = zip(frame_ids, objects, counts, map(tuple, sizes.tolist()), strict=True)
    return [Frame(frame_id, *pair, np.full(count, BOTH), size) for frame_id, pair, count, size in rows]


def video_of(frame_id: str) -> str:
    """Return the video of a frame id: set00/V000 of set00/V000/I00000."""
    return frame_id.rpartition("/")[0]


def indices_in_videos(frame_ids: Iterable[str]) -> list[int]:
    """Return the index of each frame among the listed frames of its video."""
    counters: dict[str, Iterator[int]] = defaultdict(itertools.count)
    return [next(counters[video_of(frame_id)]) for frame_id in frame_ids]


def describe_videos(frame_ids: Iterable[str]) -> str:
    """Format the videos of frames with their numbers of frames: "set00/V000 (17), set00/V001 (9)"."""
    return ", ".join(f"{video} ({n})" for video, n in Counter(map(video_of, frame_ids)).items())


def hold_out_videos(times: Mapping[str, str], share: float, seed: int) -> dict[str, None]:
    """Hold out random videos with about this share of the frames; return their frame ids as keys.

    Single frames would show persons of neighbouring training frames. Day and night are split
    separately: at least one video of each is held out, but never all.
    times: frame id -> "day" or "night", or "" if unknown.

    Raises:
        InputError: share > 0, but there is at most one video by day and one by night.
    """
    held_out: set[str] = set()
    for time in sorted({*times.values()}) if share else ():
        video_of_frames = [video_of(frame_id) for frame_id, its_time in times.items() if its_time == time]
        videos, counts = np.unique(video_of_frames, return_counts=True)
        order, n = np.random.default_rng(seed).permutation(len(videos)), 0
        for i in order[:-1]:
            if n + counts[i] / 2 <= share * counts.sum():  # with it, n is closer to the share
                held_out.add(str(videos[i]))
                n += counts[i]
        if not n and len(videos) > 1:
            held_out.add(str(videos[counts.argmin()]))
    if share and not held_out:
        problem = f"VALIDATION = {share:g} holds out whole videos, but there is at most one by day and night"
        raise InputError(problem, "list more videos, or set VALIDATION = 0")
    return dict.fromkeys(frame_id for frame_id in times if video_of(frame_id) in held_out)


def split_frames(
    ids: list[str], annotations: Annotations | PairSet, *, validation: float, seed: int, **kwargs: object
) -> tuple[list[Frame], list[str]]:
    """Return the frames to train on and the ids of the frames held out for validation, if any.

    Args:
        validation, seed: the share and the seed of `hold_out_videos`; kwargs: for `load_frames`.

    Raises:
        InputError: no frame to train on has a person to train on.
    """
    time_of = annotations.time_of_day if isinstance(annotations, PairSet) else time_of_day
    held_out = hold_out_videos({i: time_of(i) for i in ids}, validation, seed)
    frames = [frame for frame in load_frames(ids, annotations, **kwargs) if frame.id not in held_out]
    if not any(frame.n_persons for frame in frames):
        problem = "no frame of the training list has a person to train on"
        remedy = "check TRAIN_LIST, VALIDATION, ANNOTATIONS, LEARN and MIN_HEIGHT"
        raise InputError(problem, remedy, file=annotations.source)
    return frames, list(held_out)
