"""Annotation files: the objects of one file of each form that KAIST's annotations come in.

What cannot be used is refused with its line. Readers that are given a list `errors` put it there
and go on.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

import numpy as np

from kaist.files import InputError, load_json, read_text

FRAME_ID = re.compile(r"set(0\d|1[01])/V\d{3}/I\d{5}", re.ASCII)
JSON_REMEDY = "use KAIST_annotation.json, with images, annotations and categories"
Errors = list[InputError] | None


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one frame, or of many, one after the other.

    boxes: (n, 4) float64 xywh pixels, as in the file; labels: n words (person, people, cyclist,
    person?, …); occlusion: (n,) int64, 0 none, 1 partial, 2 heavy; ignore: (n,) bool, the file's
    own ignore flag.
    """

    boxes: np.ndarray
    labels: tuple[str, ...]
    occlusion: np.ndarray
    ignore: np.ndarray

    @property
    def is_person(self) -> np.ndarray:
        """(n,) bool: labelled "person" and not flagged to be ignored."""
        return np.array([label == "person" for label in self.labels], dtype=bool) & ~self.ignore


class ObjectRow(NamedTuple):
    """An object as its file has it. box: x, y, w, h; number: its line, or its place in a JSON's list."""

    label: str
    box: list[float]
    occlusion: float
    ignore: bool
    number: int


def make_objects(rows: Sequence[tuple]) -> Objects:
    """Objects from rows (label, box, occlusion, ignore, …)."""
    return Objects(
        np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
        tuple(row[0] for row in rows),
        np.array([row[2] for row in rows], dtype=np.int64),
        np.array([row[3] for row in rows], dtype=bool),
    )


def read_rows(
    items: Iterable[tuple[int, Any]], read: Callable[[Any, int], ObjectRow], path: Path, errors: Errors
) -> list[ObjectRow]:
    """The rows that `read` makes of numbered items; the line of an item it refuses is its number."""
    rows = []
    for number, item in items:
        try:
            rows.append(read(item, number))
        except InputError as error:
            if error.file is None:
                error = InputError(error.problem, error.remedy, file=path, line=number)
            refuse(error, errors)
    return rows


def refuse(error: InputError, errors: Errors) -> None:
    """Add an error to the list, or raise it where there is none."""
    if errors is None:
        raise error from None
    errors.append(error)


def check_object(box: list[float], occlusion: float) -> None:
    """Refuse a box of no area or not finite, and an occlusion other than 0, 1 or 2."""
    x, y, w, h = box
    if not (w > 0 and h > 0 and abs(x) + abs(y) + w + h < 1e6):
        problem = f"box x={x:g} y={y:g} w={w:g} h={h:g} is not a box of pixels with positive size"
        raise InputError(problem, "correct or delete it")
    if occlusion not in (0, 1, 2):
        raise InputError(f"occlusion {occlusion:g} is unknown", "use 0 none, 1 partial or 2 heavy")


def parse_number(text: str) -> float:
    """A decimal number. Python's float() alone would take 1_000 and every script's digits."""
    try:
        if text.isascii() and "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise InputError(f"{text!r} is not a number", "correct the line")


# ------------------------------------------------------------------- text


def read_lines(path: Path, errors: Errors = None, *, columns: int) -> list[ObjectRow]:
    """A header line, then an object a line: a label and at least `columns` - 1 numbers."""
    lines = read_text(path).splitlines()
    if not lines or not lines[0].startswith("%"):
        problem, remedy = "the first line is not a bbGt header", "begin the file with '% bbGt version=3'"
        refuse(InputError(problem, remedy, file=path, line=1), errors)
    numbered = ((number, line) for number, line in enumerate(lines[1:], 2) if line.strip())
    return read_rows(numbered, partial(line_row, columns), path, errors)


def line_row(columns: int, line: str, number: int) -> ObjectRow:
    """A row from one line of a text file."""
    fields = line.split()
    if len(fields) < columns:
        problem = f"{len(fields)} columns where at least {columns} are wanted"
        raise InputError(problem, "write 'person x y w h occ vx vy vw vh ign ang'")
    box = [parse_number(field) for field in fields[1:5]]
    occlusion = ignore = 0.0
    if len(fields) >= 11:
        occlusion, ignore = parse_number(fields[5]), parse_number(fields[10])
    check_object(box, occlusion)
    return ObjectRow(fields[0], box, occlusion, ignore != 0, number)


# ------------------------------------------------------------------- XML


def read_xml(path: Path, errors: Errors = None) -> list[ObjectRow]:
    """One XML file; its bndbox holds x, y, w, h."""
    root, lines = parse_xml(path)
    return read_rows(zip(lines, root.iter("object"), strict=True), xml_row, path, errors)


def parse_xml(path: Path) -> tuple[ElementTree.Element, list[int]]:
    """The root of one XML file, and the line on which each of its objects begins.

    Raises:
        InputError: it cannot be parsed, is another kind of XML, or has a DOCTYPE, whose entities
            could grow without bound.
    """
    parser, builder, lines = expat.ParserCreate(), ElementTree.TreeBuilder(), []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "object":
            lines.append(parser.CurrentLineNumber)
        builder.start(tag, attributes)

    def refuse_doctype(*_: object) -> None:
        line = parser.CurrentLineNumber
        raise InputError("an XML with a DOCTYPE is not read", "delete its DOCTYPE", file=path, line=line)

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse_doctype
    try:
        parser.Parse(read_text(path), True)
    except expat.ExpatError as error:
        problem, line = f"broken XML ({error})", error.lineno
        raise InputError(problem, "copy the file again", file=path, line=line) from None
    root = builder.close()
    if root.tag != "annotation":
        problem = f"<{root.tag[:60]}> is no KAIST annotation"
        raise InputError(problem, "copy the file again", file=path, line=1)
    return root, lines


def xml_row(item: ElementTree.Element, number: int) -> ObjectRow:
    """A row from one XML object."""
    label, sides = item.findtext("name"), item.find("bndbox")
    box = [None] if sides is None else [sides.findtext(side) for side in "xywh"]
    if label is None or None in box:
        raise InputError("an object lacks its name or one of bndbox's x, y, w, h", "add it")
    box = [parse_number(text) for text in box]
    occlusion = parse_number(item.findtext("occlusion", "0"))
    check_object(box, occlusion)
    return ObjectRow(label.strip(), box, occlusion, False, number)


# Form -> reader of one file (path, errors). In bbGt files, version 3 of Piotr Dollár's toolbox, a line has
# 12 columns, of which the last may be missing; in paired ones occlusion and ignore may be absent too.
READERS = {
    "bbgt": partial(read_lines, columns=11),
    "paired": partial(read_lines, columns=5),
    "xml": read_xml,
    "xml-sanitized": read_xml,
}


# ------------------------------------------------------------------- JSON


def read_json(path: Path, errors: Errors = None) -> dict[str, list[ObjectRow]]:
    """A test JSON: frame id -> the frame's objects, in the order of the images' ids.

    An object's label is its category's name.

    Raises:
        InputError: it is no such JSON, or an object is malformed; the line tells which.
    """
    content = load_json(read_text(path), path)
    frames: dict[Any, str] = {}
    objects: dict[str, list[ObjectRow]] = {}
    try:
        for image in sorted(content["images"], key=lambda image: image["id"]):
            number, frame_id = image["id"], image["im_name"]
            if not FRAME_ID.fullmatch(frame_id):
                raise ValueError(f"im_name {frame_id!r} is no frame id")
            if number in frames or frame_id in objects:
                problem = f"image {number} or im_name {frame_id} is there twice"
                refuse(InputError(problem, JSON_REMEDY, file=path), errors)
            frames[number], objects[frame_id] = frame_id, []
        names, items = {c["id"]: c["name"] for c in content["categories"]}, content["annotations"]
        for row in read_rows(enumerate(items), partial(json_row, path, names), path, errors):
            image_id = items[row.number]["image_id"]
            if image_id in frames:
                objects[frames[image_id]].append(row)
            else:
                problem = f"annotation {row.number} is of image {image_id}, which is not in it"
                refuse(InputError(problem, JSON_REMEDY, file=path), errors)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"not a KAIST annotation JSON ({type(error).__name__}: {error})"
        raise InputError(problem, JSON_REMEDY, file=path) from None
    return objects


def json_row(path: Path, names: dict[Any, str], item: Any, number: int) -> ObjectRow:
    """A row from a JSON's object `number`, refused by its number; names: category id -> label."""
    try:
        label, ignore, occlusion = names[item["category_id"]], item["ignore"], item["occlusion"]
        box = list(item["bbox"])
        if len(box) != 4 or {*map(type, (*box, occlusion))} - {int, float} or type(label) is not str:
            raise TypeError("a value is of the wrong type")
        if type(ignore) not in (int, bool) or ignore not in (0, 1):
            raise TypeError(f"ignore is {ignore!r}, not 0, 1, true or false")
        box = [float(side) for side in box]
        check_object(box, occlusion)
        return ObjectRow(label, box, occlusion, bool(ignore), number)
    except InputError as error:
        problem, remedy = f": {error.problem}", error.remedy
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f" lacks a field or holds a wrong one ({type(error).__name__}: {error})"
        remedy = "compare it with the others"
    raise InputError(f"annotation {number} of the list{problem}", remedy, file=path)
