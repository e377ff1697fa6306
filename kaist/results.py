"""Result files: a detector's boxes and scores for a list of frames. Needs only numpy.

Formats:
    text: one `image_id,x,y,w,h,score` per line; ids count from 1 along the image list.
    COCO's JSON: a list of `{image_id, category_id, bbox: [x, y, w, h], score}`; ids count from 0, or are
        all frame ids (also written as set00_V000_I00000); rows of a category other than 1 are left out.

Boxes are in pixels of the frame, for KAIST of 640x512. A companion file `<stem>.frames.txt`, with one frame
id per line, is the list that the ids count along. Without one it is the list that the reader is given.
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

PEDESTRIAN_ID = 1  # category_id


@dataclass(frozen=True)
class Detections:
    """Boxes with scores in a list of frames."""

    frame_idxs: np.ndarray  # (n,) int64, index into the list of frames
    boxes: np.ndarray  # (n, 4) float64 xywh pixels
    scores: np.ndarray  # (n,) float64
    other_categories: int = 0  # rows left out because they are not pedestrians
    other_frames: int = 0  # rows left out because their frames are not in the list
    id_format: str = ""  # a note on how a JSON file's ids were read

    def __post_init__(self) -> None:
        """Raise ValueError if a box or score is not finite."""
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("a detection's box or score is not finite")

    def take(self, index: np.ndarray) -> Detections:
        """Select detections by index or mask."""
        columns = {name: getattr(self, name)[index] for name in ("frame_idxs", "boxes", "scores")}
        return replace(self, **columns)

    def sort_by_score(self) -> Detections:
        """Sort by descending score; equal scores by frame, then by row."""
        return self.take(np.lexsort((self.frame_idxs, -self.scores)))


NO_DETECTIONS = Detections(np.empty(0, np.int64), np.empty((0, 4)), np.empty(0))


def join_frames(predictions: Iterable[tuple[np.ndarray, np.ndarray]]) -> Detections:
    """Concatenate each frame's boxes (k, 4) xywh pixels and scores (k,)."""
    boxes, scores = zip(*predictions, strict=True)
    idxs = np.repeat(np.arange(len(scores)), list(map(len, scores)))
    return Detections(idxs, np.concatenate(boxes), np.concatenate(scores))


def frame_indices(frame_ids: Sequence[str], frames: Sequence[str], source: str | Path) -> np.ndarray:
    """(len(frame_ids),) int64, the index of each frame id in `frames`, or -1.

    Raises:
        InputError: some of `frames` are not in `frame_ids`, which come from `source`.
    """
    idxs = {frame_id: i for i, frame_id in enumerate(frames)}
    missing = idxs.keys() - set(frame_ids)
    if missing:
        problem = f"{len(missing)} frames to evaluate are not in {source}, for example {min(missing)}"
        raise InputError(problem, "remove them from the list of frames to evaluate")
    return np.array([idxs.get(frame_id, -1) for frame_id in frame_ids], dtype=np.int64)


def reindex_frames(detections: Detections, new_idxs: np.ndarray) -> Detections:
    """Replace frame index i by new_idxs[i], and leave out detections whose new index is -1."""
    idxs = new_idxs[detections.frame_idxs]
    keep = idxs >= 0
    others = detections.other_frames + np.count_nonzero(~keep)
    return replace(detections.take(keep), frame_idxs=idxs[keep], other_frames=others)


def frames_path(path: str | Path) -> Path:
    """The companion file of a result file: the frames that its ids count along, one frame id per line."""
    return Path(path).with_suffix(".frames.txt")


def read_detections(path: str | Path, frames: Sequence[str]) -> Detections:
    """Read a result file, text or JSON; frame indices are along `frames`.

    A file without rows is valid, and so is a box of zero width or height, which overlaps nothing (as in
    bbGt.m).

    Raises:
        InputError: a row is malformed, a size negative, a value not finite, or an id outside of the list;
            or the companion file lacks some of `frames`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("result file not found", "check --detections", file=path)
    text = read_text(path)
    is_json = path.suffix == ".json" or text.lstrip()[:1] in ("[", "{")
    companion = frames_path(path)
    listed = read_image_list(companion, any_id=True) if companion.exists() else frames
    rows, positions, others, id_format = parse_json(text, path, listed) if is_json else parse_text(text, path)
    base = 0 if is_json else 1
    ids = rows[:, 0] - base
    counting = f"ids of {'JSON' if is_json else 'text'} files count from {base} along the image list that "
    counting += "the detector ran on; name it with --image-list"
    no_frame = f"image_id is not one of {base} to {base + len(listed) - 1}"
    for bad, problem, remedy in (
        (~np.isfinite(rows).all(axis=1), "a value is not finite", "correct the row"),
        ((rows[:, 3:5] < 0).any(axis=1), "width or height is negative", "correct the row"),
        ((ids != np.floor(ids)) | (ids < 0) | (ids >= len(listed)), no_frame, counting),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            line = entry_line(text, positions[row]) if is_json else positions[row] + 1
            values = ",".join(f"{value:g}" for value in rows[row])
            raise InputError(f"{problem}: {values}", remedy, file=path, line=line)
    detections = Detections(ids.astype(np.int64), rows[:, 1:5], rows[:, 5], others, id_format=id_format)
    if listed is frames:
        return detections
    return reindex_frames(detections, frame_indices(listed, frames, companion))


def parse_text(text: str, path: Path) -> tuple[np.ndarray, Sequence[int], int, str]:
    """Parse a text result; returns the same values as `parse_json`."""

    def load(lines: list[str]) -> np.ndarray:
        rows = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
        if rows.shape != (len(lines), 6):  # loadtxt skips blank lines
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
    """Parse lines of an integer and five plain decimals, such as -12.3450, twice as fast as loadtxt.

    Digits are read as integers and divided by powers of ten. Both are exact floats up to 15 digits, so the
    quotient is the float nearest to the decimal, as from float().

    Returns:
        (n, 6) float64, or None if the text contains anything else or longer numbers.
    """
    chars = np.frombuffer(text, np.uint8)
    marks, signs = np.flatnonzero((chars < ord("0")) & (chars != ord("-"))), np.flatnonzero(chars == ord("-"))
    if text.translate(None, b"0123456789-.,\n") or len(marks) % 11:
        return None
    lines = chars[marks].reshape(-1, 11)
    if (lines != tuple(b",.,.,.,.,.\n")).any() or (chars[signs - 1] != ord(",")).any():
        return None
    digits = np.diff(marks, prepend=-1).reshape(-1, 11) - 1  # characters between the marks, signs included
    decimals = digits[:, 2::2]
    if digits.min() < 1 or digits[:, 0].max() > 15 or (digits[:, 1::2] + decimals).max() > 15:
        return None
    rows = np.fromstring(text.replace(b".", b"").replace(b"\n", b","), np.int64, sep=",").reshape(-1, 6)
    return rows / 10.0 ** np.insert(decimals, 0, 0, axis=1)


def parse_json(text: str, path: Path, frames: Sequence[str]) -> tuple[np.ndarray, Sequence[int], int, str]:
    """Parse a JSON result. If the first image_id is a string, all have to be frame ids.

    Returns:
        (n, 6) float64 rows of pedestrians: image_id, x, y, w, h, score; the position of each row in the
        file, from 0; the number of rows of other categories; and a note on how ids were read, or "".
    """
    content = load_json(text, path)
    if not isinstance(content, list):
        raise InputError("the JSON is not a list", "write a list of detections", file=path, line=1)
    numbers, id_format = {}, "its image ids are read as numbers from 0 along the list of frames"
    if content and isinstance(content[0], dict) and isinstance(content[0].get("image_id"), str):
        numbers = {name: i for i, frame in enumerate(frames) for name in (frame, frame.replace("/", "_"))}
        id_format = "its image ids are frame ids"
    errors = InputError, KeyError, TypeError, OverflowError
    try:
        rows, positions = parse_entries(content, numbers)
        return rows, positions, len(content) - len(rows), id_format if content else ""
    except errors:
        for position, entry in enumerate(content):
            try:
                parse_entries([entry], numbers)
            except errors as error:
                problem = f"{str(entry)[:80]} is not a detection"
                remedy = "write image_id, category_id, bbox [x, y, w, h] and score as numbers"
                if isinstance(error, InputError):
                    problem, remedy = error.problem, error.remedy
                raise InputError(problem, remedy, file=path, line=entry_line(text, position)) from None
        raise


def parse_entries(content: list, numbers: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Parse entries as in `parse_json`: rows (n, 6) of pedestrians, and their positions (n,).

    numbers: frame id -> image_id, if the file's ids are frame ids.
    """
    [categories] = plain_numbers([[entry["category_id"] for entry in content]], len(content))
    positions = np.flatnonzero(categories == PEDESTRIAN_ID)
    entries = [content[position] for position in positions]
    boxes = plain_numbers([entry["bbox"] for entry in entries], 4)
    ids, scores = ([entry[key] for entry in entries] for key in ("image_id", "score"))
    if numbers:
        if unknown := [image_id for image_id in ids if str(image_id) not in numbers]:
            problem = f"image_id {str(unknown[0])[:60]!r} is not in the list of frames"
            raise InputError(problem, "name the image list that the detector ran on with --image-list")
        ids = [numbers[image_id] for image_id in ids]
    ids, scores = plain_numbers([ids, scores], len(entries))
    return np.column_stack([ids, boxes, scores]), positions


def entry_line(text: str, position: int) -> int:
    """The 1-based line on which an entry of a JSON list begins; positions count from 0."""
    decoder, end = json.JSONDecoder(), text.index("[") + 1
    for _ in range(position + 1):
        start = re.compile(r"[\s,]*").match(text, end).end()
        _, end = decoder.raw_decode(text, start)
    return text.count("\n", 0, start) + 1


def write_detections(path: str | Path, detections: Detections, frames: Sequence[str]) -> None:
    """Write a result file, JSON if `path` ends in .json, else text, and its companion file before it.

    Nine digits are written, so that float32 boxes and scores are read back exactly.
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
    """Write a result file and read it again, so that the rounded values in the file are evaluated."""
    write_detections(path, detections, frames)
    return read_detections(path, frames)
