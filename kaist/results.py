"""Result files: a detector's boxes and scores for a list of frames. Needs numpy alone.

Two forms are read and written:
    text: `image_id,x,y,w,h,score` a line; ids count from 1 along the image list.
    JSON, COCO's form: a list of `{image_id, category_id, bbox: [x, y, w, h], score}`; ids count from
        0, or are all frame ids, also as set00_V000_I00000; rows of a category other than 1 are no
        pedestrians.

Boxes are pixels of the frame, KAIST's of 640x512. A companion `<stem>.frames.txt` beside a result file, one
frame id a line, says which frames its ids mean; without one it is the list the reader is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kaist.annotations import read_image_list
from kaist.files import InputError, load_json, read_text, write_text
from kaist.labels import plain_numbers

PEDESTRIAN_ID = 1  # the category_id that counts


@dataclass(frozen=True)
class Detections:
    """Boxes with scores in a list of frames.

    frame: (n,) int64 index into the list, from 0; boxes: (n, 4) float64 xywh pixels; scores: (n,)
    float64. Left out of them, and counted: other_categories, rows that are not pedestrians;
    other_frames, rows of frames that the list does not hold. ids: what the file's ids were taken for,
    where one may wonder.
    """

    frame_idxs: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    other_categories: int = 0
    other_frames: int = 0
    id_format: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for boxes or scores that are not finite: no rate could be trusted."""
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("a detection's box or score is not finite")

    def take(self, index: np.ndarray) -> Detections:
        """Some of the detections, by their index."""
        columns = {name: getattr(self, name)[index] for name in ("frame_idxs", "boxes", "scores")}
        return replace(self, **columns)


NO_DETECTIONS = Detections(np.empty(0, np.int64), np.empty((0, 4)), np.empty(0))


def join_frames(found: Iterable[tuple[np.ndarray, np.ndarray]]) -> Detections:
    """Detections of the boxes (k, 4) xywh pixels and scores (k,) of each frame."""
    boxes, scores = zip(*found, strict=True)
    frame = np.repeat(np.arange(len(scores)), list(map(len, scores)))
    return Detections(frame, np.concatenate(boxes), np.concatenate(scores))


def frame_indices(named: Sequence[str], frames: Sequence[str], where: str | Path) -> np.ndarray:
    """(len(named),) int64: where each named frame stands in `frames`, -1 if it is not there."""
    places = {frame_id: i for i, frame_id in enumerate(frames)}
    missing = places.keys() - set(named)
    if missing:
        problem = f"{len(missing)} frames to evaluate, {min(missing)} among them, are not in {where}"
        raise InputError(problem, "evaluate a list that holds nothing else")
    return np.array([places.get(frame_id, -1) for frame_id in named], dtype=np.int64)


def reindex_frames(detections: Detections, place: np.ndarray) -> Detections:
    """The detections with frame i renamed place[i]; those with place -1 are left out."""
    frame = place[detections.frame_idxs]
    keep = frame >= 0
    others = detections.other_frames + np.count_nonzero(~keep)
    return replace(detections.take(keep), frame_idxs=frame[keep], other_frames=others)


def frames_path(path: str | Path) -> Path:
    """The companion of a result file that says which frames its ids mean, one frame id a line."""
    return Path(path).with_suffix(".frames.txt")


def read_detections(path: str | Path, frames: Sequence[str]) -> Detections:
    """Read a result file, text or JSON; the frames of its ids are indexed along `frames`.

    A file without rows is a legal result: no detections. A box of zero width or height is legal too: it
    overlaps nothing, as in bbGt.m.

    Raises:
        InputError: a malformed row, a negative size, a value that is not finite, or an id
            outside the list, with file and line; or a companion that lacks some of `frames`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("result file not found", "check --detections", file=path)
    text = read_text(path)
    is_json = path.suffix == ".json" or text.lstrip()[:1] in ("[", "{")
    companion = frames_path(path)
    named = read_image_list(companion, any_id=True) if companion.exists() else frames
    rows, places, others, taken_for = parse_json(text, path, named) if is_json else parse_text(text, path)
    base = 0 if is_json else 1
    ids = rows[:, 0] - base
    counting = f"ids of {'JSON' if is_json else 'text'} files count from {base} along the image list the "
    counting += "detector ran on; name it with --image-list"
    no_frame = f"image_id is not one of {base} to {base + len(named) - 1}"
    for bad, problem, remedy in (
        (~np.isfinite(rows).all(axis=1), "a value is not finite", "correct the row"),
        ((rows[:, 3:5] < 0).any(axis=1), "width or height is negative", "correct the row"),
        ((ids != np.floor(ids)) | (ids < 0) | (ids >= len(named)), no_frame, counting),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            line = entry_line(text, places[row]) if is_json else places[row] + 1
            values = ",".join(f"{value:g}" for value in rows[row])
            raise InputError(f"{problem}: {values}", remedy, file=path, line=line)
    detections = Detections(ids.astype(np.int64), rows[:, 1:5], rows[:, 5], others, id_format=taken_for)
    if named is frames:
        return detections
    return reindex_frames(detections, frame_indices(named, frames, companion))


def parse_text(text: str, path: Path) -> tuple[np.ndarray, Sequence[int], int, str]:
    """Rows (n, 6) float64 of a text result, their places in the file, 0 other categories, no word."""

    def load(lines: list[str]) -> np.ndarray:
        rows = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
        if rows.shape != (len(lines), 6):  # it skips blank lines
            raise ValueError
        return rows

    text = text.rstrip()
    lines = text.split("\n")
    if not text:
        return np.empty((0, 6)), (), 0, ""
    if (rows := parse_decimals(f"{text}\n".encode())) is not None:
        return rows, range(len(rows)), 0, ""
    try:
        return load(lines), range(len(lines)), 0, ""
    except ValueError:
        for number, line in enumerate(lines, 1):
            try:
                load([line or "?"])
            except ValueError:
                problem = f"{line.strip()[:60]!r} is not image_id,x,y,w,h,score"
                raise InputError(problem, "correct or delete the line", file=path, line=number) from None
        raise


def parse_decimals(text: bytes) -> np.ndarray | None:
    """Lines of an integer and five plain decimals, such as -12.3450, as rows (n, 6): twice as fast.

    Their digits are read as integers and divided by powers of ten. Up to 15 digits both are exact
    floats, so that the quotient is the float that is nearest to the decimal, as float() has it.

    Returns:
        None for a text that holds anything else, or longer numbers.
    """
    chars = np.frombuffer(text, np.uint8)
    marks, signs = np.flatnonzero((chars < ord("0")) & (chars != ord("-"))), np.flatnonzero(chars == ord("-"))
    if text.translate(None, b"0123456789-.,\n") or len(marks) % 11:
        return None
    lines = chars[marks].reshape(-1, 11)
    if (lines != tuple(b",.,.,.,.,.\n")).any() or (chars[signs - 1] != ord(",")).any():
        return None
    digits = np.diff(marks, prepend=-1).reshape(-1, 11) - 1  # between the marks, signs included
    decimals = digits[:, 2::2]
    if digits.min() < 1 or digits[:, 0].max() > 15 or (digits[:, 1::2] + decimals).max() > 15:
        return None
    rows = np.fromstring(text.replace(b".", b"").replace(b"\n", b","), np.int64, sep=",").reshape(-1, 6)
    return rows / 10.0 ** np.insert(decimals, 0, 0, axis=1)


def parse_json(text: str, path: Path, frames: Sequence[str]) -> tuple[np.ndarray, Sequence[int], int, str]:
    """Rows (n, 6) float64 of a JSON result's pedestrians, their places, how many others there are, and
    what the ids were taken for.

    Where the first image_id is text, all have to be frame ids.
    """
    content = load_json(text, path)
    if not isinstance(content, list):
        raise InputError("the JSON is not a list", "write a list of detections", file=path, line=1)
    numbers, taken_for = {}, "its image ids are taken for numbers from 0 along the list of frames"
    if content and isinstance(content[0], dict) and isinstance(content[0].get("image_id"), str):
        numbers = {name: i for i, frame in enumerate(frames) for name in (frame, frame.replace("/", "_"))}
        taken_for = "its image ids are frame ids"
    refused = InputError, KeyError, TypeError, OverflowError
    try:
        rows, places = parse_entries(content, numbers)
        return rows, places, len(content) - len(rows), taken_for if content else ""
    except refused:
        for place, entry in enumerate(content):
            try:
                parse_entries([entry], numbers)
            except refused as error:
                problem = f"{str(entry)[:80]} is no detection"
                remedy = "write image_id, category_id, bbox [x, y, w, h] and score as numbers"
                if isinstance(error, InputError):
                    problem, remedy = error.problem, error.remedy
                raise InputError(problem, remedy, file=path, line=entry_line(text, place)) from None
        raise


def parse_entries(content: list, numbers: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, 6) float64 of a JSON's pedestrians, all at once, and their places.

    numbers: of frames by their ids, if they are these.
    """
    [categories] = plain_numbers([[entry["category_id"] for entry in content]], len(content))
    places = np.flatnonzero(categories == PEDESTRIAN_ID)
    people = [content[place] for place in places]
    boxes = plain_numbers([entry["bbox"] for entry in people], 4)
    ids, scores = ([entry[key] for entry in people] for key in ("image_id", "score"))
    if numbers:
        if unknown := [image_id for image_id in ids if str(image_id) not in numbers]:
            problem = f"image_id {str(unknown[0])[:60]!r} is no frame of the list"
            raise InputError(problem, "name the detector's list with --image-list")
        ids = [numbers[image_id] for image_id in ids]
    ids, scores = plain_numbers([ids, scores], len(people))
    return np.column_stack([ids, boxes, scores]), places


def entry_line(text: str, place: int) -> int:
    """The line on which an entry of a JSON list begins; places count from 0."""
    decoder, end = json.JSONDecoder(), text.index("[") + 1
    for _ in range(place + 1):
        start = re.compile(r"[\s,]*").match(text, end).end()
        _, end = decoder.raw_decode(text, start)
    return text.count("\n", 0, start) + 1


def write_detections(path: str | Path, detections: Detections, frames: Sequence[str]) -> None:
    """Write a result file (JSON if the path ends so, else text) and its companion frames file.

    Nine digits are written, so that float32 boxes and scores return exactly. Either file is
    written beside its place and renamed, the companion first.
    """
    path = Path(path)
    values = np.column_stack([detections.boxes, detections.scores]).tolist()
    ids = detections.frame_idxs.tolist()
    rows = [(i, [f"{value:.9g}" for value in row]) for i, row in zip(ids, values, strict=True)]
    text = "".join(f"{i + 1},{','.join(row)}\n" for i, row in rows)
    if path.suffix == ".json":
        content = [
            {"image_id": i, "category_id": PEDESTRIAN_ID, "bbox": [*map(float, box)], "score": float(score)}
            for i, (*box, score) in rows
        ]
        text = json.dumps(content)
    write_text(frames_path(path), "\n".join(frames) + "\n")
    write_text(path, text)


def write_and_read(path: Path, detections: Detections, frames: Sequence[str]) -> Detections:
    """Write a result file and read it again: its digits are what others will have."""
    write_detections(path, detections, frames)
    return read_detections(path, frames)
