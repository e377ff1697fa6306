"""Result files: a detector's boxes and scores for a list of frames. Needs numpy alone.

Two forms are read and written:
    text: `image_id,x,y,w,h,score` a line; ids count from 1 along the image list.
    JSON: a list of `{image_id, category_id, bbox: [x, y, w, h], score}`; ids count from 0, and
        rows of a category other than 1 are no pedestrians.

Boxes are pixels of the 640x512 frame. A companion `<stem>.frames.txt` beside a result file, one
frame id a line, says which frames its ids mean; without one it is the list the reader is given.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kaist.annotations import read_image_list
from kaist.files import InputError, load_json, read_text, write_text

PEDESTRIAN = 1  # the category_id that counts


@dataclass(frozen=True)
class Detections:
    """Boxes with scores in a list of frames.

    frame: (n,) int64 index into the list, from 0; boxes: (n, 4) float64 xywh pixels; scores: (n,)
    float64. Left out of them, and counted: other_categories, rows that are not pedestrians;
    other_frames, rows of frames that the list does not hold.
    """

    frame: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    other_categories: int = 0
    other_frames: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for boxes or scores that are not finite: no rate could be trusted."""
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("a detection's box or score is not finite")

    def take(self, index: np.ndarray) -> Detections:
        """Some of the detections, by their index."""
        return replace(self, frame=self.frame[index], boxes=self.boxes[index], scores=self.scores[index])


def frame_places(named: Sequence[str], frames: Sequence[str], where: str | Path) -> np.ndarray:
    """(len(named),) int64: where each named frame stands in `frames`, -1 if it is not there."""
    places = {frame_id: i for i, frame_id in enumerate(frames)}
    missing = places.keys() - set(named)
    if missing:
        problem = f"{len(missing)} frames to evaluate, {min(missing)} among them, are not in {where}"
        raise InputError(problem, "evaluate a list that holds nothing else")
    return np.array([places.get(frame_id, -1) for frame_id in named], dtype=np.int64)


def move_frames(detections: Detections, place: np.ndarray) -> Detections:
    """The detections with frame i renamed place[i]; those with place -1 are left out."""
    frame = place[detections.frame]
    keep = frame >= 0
    others = detections.other_frames + np.count_nonzero(~keep)
    return replace(detections.take(keep), frame=frame[keep], other_frames=others)


def frames_path(path: str | Path) -> Path:
    """The companion of a result file that says which frames its ids mean, one frame id a line."""
    return Path(path).with_suffix(".frames.txt")


def read_detections(path: str | Path, frames: Sequence[str]) -> Detections:
    """Read a result file, text or JSON; the frames of its ids are indexed along `frames`.

    Ids count along the companion `<stem>.frames.txt` if there is one, else along `frames`. A file
    without rows is a legal result: no detections. A box of zero width or height is legal too: it
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
    rows, places, others = parse_json(text, path) if is_json else parse_text(text, path)
    companion = frames_path(path)
    named = read_image_list(companion) if companion.is_file() else frames

    def refuse(bad: np.ndarray, problem: str, remedy: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            line = entry_line(text, places[row]) if is_json else places[row] + 1
            values = ",".join(f"{value:g}" for value in rows[row])
            raise InputError(f"{problem}: {values}", remedy, file=path, line=line)

    refuse(~np.isfinite(rows).all(axis=1), "a value is not finite", "correct the row")
    refuse((rows[:, 3:5] < 0).any(axis=1), "width or height is negative", "correct the row")
    base = 0 if is_json else 1
    ids = rows[:, 0] - base
    refuse(
        (ids != np.floor(ids)) | (ids < 0) | (ids >= len(named)),
        f"image_id is not one of {base} to {base + len(named) - 1}",
        f"ids of {'JSON' if is_json else 'text'} files count from {base} along the image list "
        "the detector ran on; name it with --image-list",
    )
    detections = Detections(ids.astype(np.int64), rows[:, 1:5], rows[:, 5], others)
    if named is frames:
        return detections
    return move_frames(detections, frame_places(named, frames, companion))


def parse_text(text: str, path: Path) -> tuple[np.ndarray, Sequence[int], int]:
    """Rows (n, 6) float64 of a text result, their places in the file, 0 other categories."""
    text = text.rstrip()
    if not text:
        return np.empty((0, 6)), (), 0
    rows = parse_decimals(f"{text}\n".encode())
    if rows is None:
        rows = parse_lines(text.split("\n"), path)
    return rows, range(len(rows)), 0


def parse_decimals(text: bytes) -> np.ndarray | None:
    """Lines of six plain decimals, such as -12.3450, as rows (n, 6): all numbers at once.

    Their digits are read as integers and divided by powers of ten. Up to 15 digits both are exact
    floats, so that the quotient is the float that is nearest to the decimal, as float() has it.

    Returns:
        None for a text that holds anything else, or longer numbers.
    """
    first_line = text[: text.index(b"\n")].split(b",")  # tells most files of long numbers
    if max(map(len, first_line)) > 17 or text.translate(None, b"0123456789-.,\n"):
        return None
    chars = np.frombuffer(text, np.uint8)
    marks = np.flatnonzero((chars < ord("-")) | (chars == ord(".")))  # commas, line ends, points
    point = chars[marks] == ord(".")
    ends, points, field = marks[~point], marks[point], np.cumsum(~point)[point]
    signs = np.flatnonzero(chars == ord("-"))
    digits = np.diff(ends, prepend=-1) - 1  # of each number, once its point and sign are taken off
    digits[field] -= 1
    digits[np.searchsorted(ends, signs)] -= 1
    plain = (chars[signs - 1] < ord("-")).all() and not (point[1:] & point[:-1]).any()
    if not plain or digits.min() < 1 or digits.max() > 15:
        return None  # a sign within a number, two points in one, none or too many digits
    if len(ends) % 6 or (chars[ends].reshape(-1, 6) != tuple(b",,,,,\n")).any():
        return None
    decimals = np.zeros(len(ends))
    decimals[field] = ends[field] - points - 1
    whole = np.fromstring(text.replace(b".", b"").replace(b"\n", b","), np.int64, sep=",")
    return (whole / 10.0**decimals).reshape(-1, 6)


def parse_lines(lines: list[str], path: Path) -> np.ndarray:
    """Rows (n, 6) float64 of a text result of any numbers."""

    def load(some: list[str]) -> np.ndarray:
        rows = np.loadtxt(some, delimiter=",", comments=None, ndmin=2)
        if rows.shape != (len(some), 6):  # it skips blank lines
            raise ValueError
        return rows

    try:
        return load(lines)
    except ValueError:
        for number, line in enumerate(lines, 1):
            try:
                load([line or "?"])
            except ValueError:
                problem = f"{line.strip()[:60]!r} is not image_id,x,y,w,h,score"
                raise InputError(problem, "correct or delete the line", file=path, line=number) from None
        raise


def parse_json(text: str, path: Path) -> tuple[np.ndarray, Sequence[int], int]:
    """Rows (n, 6) float64 of a JSON result's pedestrians, their places, how many others there are.

    A row is (image_id, x, y, w, h, score).
    """
    content = load_json(text, path)
    if not isinstance(content, list):
        raise InputError("the JSON is not a list", "write a list of detections", file=path, line=1)
    try:
        rows = entry_rows(content)
    except (KeyError, TypeError, ValueError, OverflowError):
        place = next(i for i, entry in enumerate(content) if not is_entry(entry))
        problem, line = f"{str(content[place])[:80]} is no detection", entry_line(text, place)
        remedy = "write image_id, category_id, bbox [x, y, w, h] and score as numbers"
        raise InputError(problem, remedy, file=path, line=line) from None
    places = [i for i, entry in enumerate(content) if entry["category_id"] == PEDESTRIAN]
    return rows, places, len(content) - len(places)


def entry_rows(entries: Sequence[Mapping]) -> np.ndarray:
    """Rows (n, 6) float64 of the entries that are pedestrians.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: an entry lacks a number.
    """
    categories = [entry["category_id"] for entry in entries]
    found = [e for e, category in zip(entries, categories, strict=True) if category == PEDESTRIAN]
    boxes = [entry["bbox"] for entry in found]
    columns = [entry["image_id"] for entry in found], *zip(*boxes, strict=True), [e["score"] for e in found]
    if {*map(type, itertools.chain(categories, *columns))} - {int, float}:
        raise TypeError("a value is no number")
    return np.array(columns, np.float64).T if found else np.empty((0, 6))


def is_entry(entry: Mapping) -> bool:
    """Whether `entry_rows` takes an entry."""
    try:
        return entry_rows([entry]).shape[1] == 6
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


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
    ids = detections.frame.tolist()
    if path.suffix == ".json":
        rows = ([float(f"{v:.9g}") for v in row] for row in values)
        content = [
            {"image_id": i, "category_id": PEDESTRIAN, "bbox": row[:4], "score": row[4]}
            for i, row in zip(ids, rows, strict=True)
        ]
        text = json.dumps(content)
    else:
        rows = zip(ids, values, strict=True)
        text = "".join(f"{i + 1}," + ",".join(f"{v:.9g}" for v in row) + "\n" for i, row in rows)
    listing = "\n".join(frames) + "\n"
    write_text(frames_path(path), listing)
    write_text(path, text)
