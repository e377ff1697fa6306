"""Read and write label files in every supported format. Needs numpy only.

Files of one frame, by `form`; all are read as x, y, w, h in pixels, x and y the upper left corner:
    bbgt: a header, then lines of `label x y w h occ vx vy vw vh ign ang` (version 3 of Piotr Dollár's
        toolbox). paired, kaist-text: the same, but five columns are enough.
    xml, xml-sanitized: KAIST's XML with x, y, w, h in bndbox, or VOC's with xmin, ymin, xmax, ymax.
    yolo: lines of `class cx cy w h`, as fractions of the frame.
    cvc14: lines of `x y w h 1 0 …`, x and y the centre of the box; every object is a person.
Files of many frames are JSON: KAIST's test annotations, or COCO's.

Invalid input raises an InputError with its line. Readers with a parameter `errors` append it to that
list, if there is one, and continue with the next object.
"""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

import numpy as np

from kaist.files import InputError, load_json, read_text

FRAME_ID = re.compile(r"set(0\d|1[01])/V\d{3}/I\d{5}", re.ASCII)
KAIST_LABELS = ("person", "people", "cyclist", "person?", "person?a", "__ignore__")
# Text forms: minimum and maximum number of columns, and an example of a line.
COLUMNS = {
    "bbgt": (11, math.inf, "person x y w h occ vx vy vw vh ign ang"),  # ang is optional
    **dict.fromkeys(("paired", "kaist-text"), (5, math.inf, "person x y w h occ vx vy vw vh ign ang")),
    "yolo": (5, 6, "class cx cy w h"),  # a sixth column, the confidence, is ignored
    "cvc14": (5, math.inf, "x y w h 1 0"),
}
YOLO_DECIMALS = 8  # decimal places of a fraction: 0.0001 pixels in a frame of 10,000 pixels
Errors = list[InputError] | None  # a list that collects errors; None: raise the first one


class ObjectRow(NamedTuple):
    """One object of a label file. box: xywh pixels; number: its line, or its index in a JSON list."""

    label: str
    box: list[float]
    occlusion: float = 0
    ignore: bool = False
    number: int = 0


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one frame, or of several frames, concatenated.

    Attributes:
        boxes: (n, 4) float64 xywh pixels, as in the file.
        labels: n class names (person, people, cyclist, person?, …).
        occlusion: (n,) int64, 0 none, 1 partial, 2 heavy.
        ignore: (n,) bool, the ignore flag of the file.
    """

    boxes: np.ndarray
    labels: tuple[str, ...]
    occlusion: np.ndarray
    ignore: np.ndarray

    @property
    def is_person(self) -> np.ndarray:
        """(n,) bool: labelled "person" without an ignore flag."""
        return np.array([label == "person" for label in self.labels], dtype=bool) & ~self.ignore


def make_objects(rows: Sequence[tuple]) -> Objects:
    """Build `Objects` from rows (label, box, occlusion, ignore, …)."""
    labels, boxes, occlusion, ignore, *_ = zip(*rows, strict=True) if rows else [()] * 4
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Objects(boxes, labels, np.array(occlusion, np.int64), np.array(ignore, bool))


def report(error: InputError, errors: Errors) -> None:
    """Append an error to the list, or raise it if there is no list."""
    if errors is None:
        raise error from None
    errors.append(error)


def check_object(row: ObjectRow) -> ObjectRow:
    """Return the row if its box is finite with positive size and its occlusion is 0, 1 or 2, else raise."""
    x, y, w, h = row.box
    if not (w > 0 and h > 0 and abs(x) + abs(y) + w + h < 1e6):
        problem = f"box x={x:g} y={y:g} w={w:g} h={h:g} is not a box of pixels with positive size"
        raise InputError(problem, "correct or delete it")
    if row.occlusion not in (0, 1, 2):
        raise InputError(f"occlusion {row.occlusion:g} is unknown", "use 0 none, 1 partial or 2 heavy")
    return row


def parse_number(text: str) -> float:
    """Parse a decimal number; unlike float(), refuse 1_000 and digits that are not ASCII."""
    try:
        if text.isascii() and "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise InputError(f"{text!r} is not a number", "correct the line")


# ------------------------------------------------------------------- files of one frame


def guess_form(path: Path) -> str:
    """Guess the form of one frame's label file from its suffix and its first character."""
    if path.suffix.lower() == ".xml":
        return "xml"
    return "kaist-text" if read_text(path).startswith("%") else "yolo"


def read_labels(
    path: Path, form: str, size: tuple[int, int] = (1, 1), names: Sequence[str] = (), errors: Errors = None
) -> list[ObjectRow]:
    """Read the objects of one frame's label file.

    Args:
        form: a key of `COLUMNS`, "xml" or "xml-sanitized".
        size: width and height of the frame, for YOLO.
        names: class names by YOLO's class number; empty: the number is the label.
    """
    if form.startswith("xml"):
        root, lines = parse_xml(path)
        return read_rows(zip(lines, root.iter("object"), strict=True), xml_row, path, errors)
    lines = read_text(path).splitlines()
    row = {"yolo": partial(yolo_row, size, names), "cvc14": cvc14_row}.get(form)
    if row is None and not (lines and lines[0].startswith("%")):
        problem, remedy = "the first line is not a bbGt header", "begin the file with '% bbGt version=3'"
        report(InputError(problem, remedy, file=path, line=1), errors)
    minimum, maximum, example = COLUMNS[form]

    def read(line: str, number: int) -> ObjectRow:
        fields = line.split()
        if not minimum <= len(fields) <= maximum:
            problem = f"{len(fields)} columns where {form} has {minimum}{' or more' * (maximum == math.inf)}"
            raise InputError(problem, f"write '{example}'")
        return (row or bbgt_row)(fields, number)

    n_header = 0 if row else 1
    numbered = ((number, line) for number, line in enumerate(lines[n_header:], n_header + 1) if line.strip())
    return read_rows(numbered, read, path, errors)


def read_rows(
    items: Iterable[tuple[int, Any]],
    read: Callable[[Any, int], ObjectRow],
    path: Path,
    errors: Errors,
    place: str = "",
) -> list[ObjectRow]:
    """Read and check (number, item) pairs; place: format of an invalid item's location, "": its line."""
    rows = []
    for number, item in items:
        try:
            rows.append(check_object(read(item, number)))
        except InputError as error:
            problem, line = place.format(number) + error.problem, None if place else number
            report(InputError(problem, error.remedy, file=path, line=line), errors)
    return rows


def bbgt_row(fields: list[str], number: int) -> ObjectRow:
    """Parse a line of KAIST's text; without the later columns, occlusion is 0 and ignore is False."""
    box = [parse_number(field) for field in fields[1:5]]
    occlusion, ignore = (parse_number(fields[i]) for i in (5, 10)) if len(fields) >= 11 else (0.0, 0.0)
    return ObjectRow(fields[0], box, occlusion, ignore != 0, number)


def yolo_row(size: tuple[int, int], names: Sequence[str], fields: list[str], number: int) -> ObjectRow:
    """Parse a line of YOLO's format."""
    cx, cy, w, h = map(parse_number, fields[1:5])
    if max(map(abs, (cx, cy, w, h))) > 2:  # boxes may extend beyond the frame
        problem = f"{' '.join(fields[1:5])} are not fractions of the frame, from 0 to 1"
        raise InputError(problem, "divide pixels by the frame's width and height")
    label = fields[0]
    if not (label.isascii() and label.isdigit()) or (names and int(label) >= len(names)):
        raise InputError(f"class {label!r} has no name", "list all class names in order as 'names'")
    width, height = size
    box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    return ObjectRow(names[int(label)] if names else label, box, number=number)


def cvc14_row(fields: list[str], number: int) -> ObjectRow:
    """Parse a line of CVC-14's format."""
    x, y, w, h = map(parse_number, fields[:4])
    return ObjectRow("person", [x - w / 2, y - h / 2, w, h], number=number)


def parse_xml(path: Path) -> tuple[ElementTree.Element, list[int]]:
    """Parse a KAIST XML file: its root, and the line on which each of its objects starts.

    Raises:
        InputError: broken XML, another root, or a DOCTYPE, whose entities could expand without bound.
    """
    parser, builder, lines = expat.ParserCreate(), ElementTree.TreeBuilder(), []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "object":
            lines.append(parser.CurrentLineNumber)
        builder.start(tag, attributes)

    def refuse_doctype(*_: object) -> None:
        line = parser.CurrentLineNumber
        raise InputError("XML with a DOCTYPE is not supported", "delete it", file=path, line=line)

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
        problem = f"<{root.tag[:60]}> is not a KAIST annotation"
        raise InputError(problem, "copy the file again", file=path, line=1)
    return root, lines


def xml_row(item: ElementTree.Element, number: int) -> ObjectRow:
    """Parse an XML object with x, y, w, h, or VOC's with corners, whose `difficult` means ignore."""
    label = item.findtext("name", "").strip()
    box = {side.tag: side.text or "" for side in item.iterfind("bndbox/*")}
    sides = [box.get(side) for side in (*"xywh", "xmin", "ymin", "xmax", "ymax")]
    if not label or (None in sides[:4] and None in sides[4:]):
        problem = "an object lacks its name or a value of its bndbox (x, y, w, h, or xmin, ymin, xmax, ymax)"
        raise InputError(problem, "add it")
    if None in sides[4:]:
        occlusion = parse_number(item.findtext("occlusion", "0"))
        return ObjectRow(label, [*map(parse_number, sides[:4])], occlusion, number=number)
    x, y, right, bottom = map(parse_number, sides[4:])
    difficult = item.findtext("difficult", "0").strip() == "1"
    return ObjectRow(label, [x, y, right - x, bottom - y], 0, difficult, number)


# ------------------------------------------------------------------- JSON files of many frames


def read_json(path: Path, errors: Errors = None, kaist: bool = True) -> dict[str, list[ObjectRow]]:
    """Read an annotation JSON: name of an image -> its objects, see `json_objects`."""
    return json_objects(load_json(read_text(path), path), path, errors, kaist)


def json_objects(content: Any, path: Path, errors: Errors, kaist: bool = True) -> dict[str, list[ObjectRow]]:
    """Group the objects of an annotation JSON by image name, in the order of the image ids.

    Args:
        kaist: True: an image's name is its im_name, which is a KAIST frame id, and every object has
            occlusion and ignore. False: the name is file_name or im_name, and iscrowd means ignore.
    """
    objects: dict[str, list[ObjectRow]] = {}  # by image name
    by_id: dict[Any, list[ObjectRow]] = {}  # the same lists by image id
    try:
        for image in sorted(content["images"], key=lambda image: image["id"]):
            number = image["id"]
            name = image["im_name"] if kaist else str(image.get("file_name") or image["im_name"])
            if kaist and not FRAME_ID.fullmatch(name):
                raise ValueError(f"im_name {name!r} is not of the form set00/V000/I00000")
            if number in by_id or name in objects:
                problem = f"image {number} or {'im_name' if kaist else 'file_name'} {name} occurs twice"
                report(InputError(problem, "give each image a unique id and name", file=path), errors)
            by_id[number] = objects[name] = []
        names, items = {c["id"]: c["name"] for c in content["categories"]}, content["annotations"]
        if not kaist:
            for item in items:
                item["ignore"] = item.get("iscrowd") or item.get("ignore", 0)
                item.setdefault("occlusion", 0)
        try:
            rows = json_rows(items, names)
        except InputError:  # check them one by one to find out which is invalid
            place = "annotation {} of the list: "
            rows = read_rows(enumerate(items), lambda x, i: json_rows([x], names, i)[0], path, errors, place)
        for row in rows:
            image_id = items[row.number]["image_id"]
            if image_id in by_id:
                by_id[image_id].append(row)
            else:
                problem = f"annotation {row.number} has image_id {image_id}, but no image has this id"
                report(InputError(problem, "correct its image_id, or add the image", file=path), errors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        form = "KAIST" if kaist else "COCO"
        problem = f"not a {form} annotation JSON ({type(error).__name__}: {error})"
        remedy = "use a file with images, annotations and categories"
        raise InputError(problem, remedy, file=path) from None
    return objects


def json_rows(items: Sequence[Any], names: Mapping[Any, str], first: int = 0) -> list[ObjectRow]:
    """Convert and check JSON objects at once; names: category id -> label; first: number of the first one.

    Raises:
        InputError: one of the objects is invalid; the message does not say which.
    """
    try:
        labels = [names[item["category_id"]] for item in items]
        ignore, occlusion = ([item[key] for item in items] for key in ("ignore", "occlusion"))
        boxes = plain_numbers([item["bbox"] for item in items], 4)
        [levels] = plain_numbers([occlusion], len(items))
        if {*map(type, labels)} - {str}:
            raise TypeError("a value is of the wrong type")
        if {*map(type, ignore)} - {int, bool} or {*ignore} - {0, 1}:
            raise TypeError(f"ignore is {ignore[0]!r}, not 0, 1, true or false")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"a field is missing or has a wrong value ({type(error).__name__}: {error})"
        raise InputError(problem, "compare it with the other annotations") from None
    columns = labels, boxes.tolist(), levels.tolist(), map(bool, ignore), range(first, first + len(items))
    rows = [*map(ObjectRow._make, zip(*columns, strict=True))]
    x, y, w, h = boxes.T
    with np.errstate(over="ignore"):
        valid = (w > 0) & (h > 0) & (abs(x) + abs(y) + w + h < 1e6) & np.isin(levels, (0, 1, 2))
    for i in np.flatnonzero(~valid):
        check_object(rows[i])
    return rows


def plain_numbers(rows: Sequence[Sequence[Any]], columns: int) -> np.ndarray:
    """Convert rows of JSON numbers to (n, columns) float64; unlike float(), refuse strings and booleans.

    Raises:
        TypeError, OverflowError: a value is not a number or is too large, or a row has another length.
    """
    values = [*itertools.chain.from_iterable(rows)]
    if {*map(type, values)} - {int, float} or {*map(len, rows)} - {columns}:
        raise TypeError("a value is of the wrong type")
    return np.array(values, np.float64).reshape(len(rows), columns)


# ------------------------------------------------------------------- writing


def yolo_class(row: ObjectRow) -> str:
    """Class name of an object in a YOLO file: its label, but "ignored" for a person to ignore."""
    return "ignored" if row.ignore and row.label == "person" else row.label


def yolo_text(rows: Iterable[ObjectRow], size: tuple[int, int], names: Sequence[str]) -> str:
    """Format one frame's objects as a YOLO file; size: width and height; names: all class names, in order."""
    lines = []
    for row in rows:
        x, y, w, h = row.box
        values = ((x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1])
        fractions = " ".join(f"{value:.{YOLO_DECIMALS}f}" for value in values)
        lines.append(f"{names.index(yolo_class(row))} {fractions}\n")
    return "".join(lines)


def coco_content(
    images: Iterable[tuple[str, tuple[int, int], list[ObjectRow]]], name_key: str = "file_name"
) -> dict[str, Any]:
    """Build the content of a COCO JSON from images (name, (width, height), objects).

    name_key: key of an image's name. With "im_name", KAIST's key, every object has an occlusion.
    """
    images = list(images)
    all_rows = [row for _, _, rows in images for row in rows]
    occlusion = name_key == "im_name" or any(row.occlusion for row in all_rows)
    labels = ["person", *sorted({row.label for row in all_rows} - {"person"})]
    category_ids = {label: i for i, label in enumerate(labels, 1)}
    entries, annotations = [], []
    for image_id, (name, (width, height), rows) in enumerate(images):
        entries.append({"id": image_id, name_key: name, "width": width, "height": height})
        for row in rows:
            item = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_ids[row.label]}
            item |= {"bbox": row.box, "area": row.box[2] * row.box[3], "height": row.box[3]}
            item |= {"iscrowd": int(row.ignore), "ignore": int(row.ignore)}
            annotations.append(item | ({"occlusion": int(row.occlusion)} if occlusion else {}))
    categories = [{"id": i, "name": label} for label, i in category_ids.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}
