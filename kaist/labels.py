"""Label files: every form that objects of frames are read in and written in. Needs numpy alone.

Forms of one frame's file; a row's box is x, y, w, h in pixels from the upper left corner in all of them:
    bbgt: a header, then `label x y w h occ vx vy vw vh ign ang` a line (version 3 of Piotr Dollár's
        toolbox); of paired and kaist-text five columns are enough.
    xml, xml-sanitized: KAIST's, whose bndbox holds x, y, w, h, or VOC's, with xmin, ymin, xmax, ymax.
    yolo: `class cx cy w h` a line, fractions of the frame.
    cvc14: `x y w h 1 0 …` a line, x and y the box's centre; all are persons.
A JSON file holds many frames: KAIST's test annotations, or COCO's.

What cannot be used is refused by an InputError with its line. Readers that are given a list `errors` put
it there and go on.
"""

from __future__ import annotations

import itertools
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
MANY = 10**6
# Text forms: the fewest and the most columns that a line may have, and how it is to be written.
COLUMNS = {
    "bbgt": (11, MANY, "person x y w h occ vx vy vw vh ign ang"),  # of which the last may be missing
    **dict.fromkeys(("paired", "kaist-text"), (5, MANY, "person x y w h occ vx vy vw vh ign ang")),
    "yolo": (5, 6, "class cx cy w h"),  # a sixth, a confidence, is left out
    "cvc14": (5, MANY, "x y w h 1 0"),
}
YOLO_DECIMALS = 8  # of YOLO's fractions: at 10,000 pixels a side a ten-thousandth of a pixel
JSON_REMEDY = "use one with images, annotations and categories"
Errors = list[InputError] | None


class ObjectRow(NamedTuple):
    """An object as its file has it. box: x, y, w, h; number: its line, or its place in a JSON's list."""

    label: str
    box: list[float]
    occlusion: float = 0
    ignore: bool = False
    number: int = 0


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


def make_objects(rows: Sequence[tuple]) -> Objects:
    """Objects from rows (label, box, occlusion, ignore, …)."""
    labels, boxes, occlusion, ignore, *_ = zip(*rows, strict=True) if rows else [()] * 4
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Objects(boxes, labels, np.array(occlusion, np.int64), np.array(ignore, bool))


def report(error: InputError, errors: Errors) -> None:
    """Add an error to the list, or raise it where there is none."""
    if errors is None:
        raise error from None
    errors.append(error)


def check_object(row: ObjectRow) -> ObjectRow:
    """Refuse a box of no area or not finite, and an occlusion other than 0, 1 or 2."""
    x, y, w, h = row.box
    if not (w > 0 and h > 0 and abs(x) + abs(y) + w + h < 1e6):
        problem = f"box x={x:g} y={y:g} w={w:g} h={h:g} is not a box of pixels with positive size"
        raise InputError(problem, "correct or delete it")
    if row.occlusion not in (0, 1, 2):
        raise InputError(f"occlusion {row.occlusion:g} is unknown", "use 0 none, 1 partial or 2 heavy")
    return row


def parse_number(text: str) -> float:
    """A decimal number. Python's float() alone would take 1_000 and every script's digits."""
    try:
        if text.isascii() and "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise InputError(f"{text!r} is not a number", "correct the line")


# ------------------------------------------------------------------- one frame's file


def guess_form(path: Path) -> str:
    """The form of one frame's label file, by its ending and its first character."""
    if path.suffix.lower() == ".xml":
        return "xml"
    return "kaist-text" if read_text(path).startswith("%") else "yolo"


def read_labels(
    path: Path, form: str, size: tuple[int, int] = (1, 1), names: Sequence[str] = (), errors: Errors = None
) -> list[ObjectRow]:
    """The objects of one frame's label file.

    Args:
        form: one of `COLUMNS`, xml or xml-sanitized; size: width and height of the frame, for YOLO;
            names: of YOLO's class numbers, which name themselves where there are none.
    """
    if form.startswith("xml"):
        root, lines = parse_xml(path)
        return read_rows(zip(lines, root.iter("object"), strict=True), xml_row, path, errors)
    lines = read_text(path).splitlines()
    row = {"yolo": partial(yolo_row, size, names), "cvc14": cvc14_row}.get(form)
    if row is None and not (lines and lines[0].startswith("%")):
        problem, remedy = "the first line is not a bbGt header", "begin the file with '% bbGt version=3'"
        report(InputError(problem, remedy, file=path, line=1), errors)
    fewest, most, example = COLUMNS[form]

    def read(line: str, number: int) -> ObjectRow:
        fields = line.split()
        if not fewest <= len(fields) <= most:
            problem = f"{len(fields)} columns where {form} has {fewest}{' or more' * (most == MANY)}"
            raise InputError(problem, f"write '{example}'")
        return (row or bbgt_row)(fields, number)

    begin = 0 if row else 1
    numbered = ((number, line) for number, line in enumerate(lines[begin:], begin + 1) if line.strip())
    return read_rows(numbered, read, path, errors)


def read_rows(
    items: Iterable[tuple[int, Any]],
    read: Callable[[Any, int], ObjectRow],
    path: Path,
    errors: Errors,
    place: str = "",
) -> list[ObjectRow]:
    """The rows that `read` makes of numbered items. place: says where a refused one is, by its number;
    "": that is its line."""
    rows = []
    for number, item in items:
        try:
            rows.append(check_object(read(item, number)))
        except InputError as error:
            problem, line = place.format(number) + error.problem, None if place else number
            report(InputError(problem, error.remedy, file=path, line=line), errors)
    return rows


def bbgt_row(fields: list[str], number: int) -> ObjectRow:
    """A row from one line of KAIST's text; without its later columns nothing is occluded or ignored."""
    box = [parse_number(field) for field in fields[1:5]]
    occlusion, ignore = (parse_number(fields[i]) for i in (5, 10)) if len(fields) >= 11 else (0.0, 0.0)
    return ObjectRow(fields[0], box, occlusion, ignore != 0, number)


def yolo_row(size: tuple[int, int], names: Sequence[str], fields: list[str], number: int) -> ObjectRow:
    """A row from a line of YOLO's."""
    cx, cy, w, h = map(parse_number, fields[1:5])
    if max(map(abs, (cx, cy, w, h))) > 2:  # a box may leave the frame
        problem = f"{' '.join(fields[1:5])} are not fractions of the frame, from 0 to 1"
        raise InputError(problem, "divide pixels by the frame's width and height")
    label = fields[0]
    if not (label.isascii() and label.isdigit()) or (names and int(label) >= len(names)):
        raise InputError(f"class {label!r} has no name", "name the classes in order as the set's 'names'")
    width, height = size
    box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    return ObjectRow(names[int(label)] if names else label, box, number=number)


def cvc14_row(fields: list[str], number: int) -> ObjectRow:
    """A row from a line of CVC-14's."""
    x, y, w, h = map(parse_number, fields[:4])
    return ObjectRow("person", [x - w / 2, y - h / 2, w, h], number=number)


def parse_xml(path: Path) -> tuple[ElementTree.Element, list[int]]:
    """The root of one XML file, and the line on which each of its objects begins.

    A DOCTYPE is refused, because its entities could grow without bound.
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
    """A row from one XML object, of sides x, y, w, h or of corners, as they are: xmax - xmin wide.

    What VOC calls `difficult` is ignored.
    """
    label = item.findtext("name", "").strip()
    box = {side.tag: side.text or "" for side in item.iterfind("bndbox/*")}
    sides = [box.get(side) for side in (*"xywh", "xmin", "ymin", "xmax", "ymax")]
    if not label or (None in sides[:4] and None in sides[4:]):
        problem = "an object lacks its name or a side of its bndbox (x, y, w, h, or xmin, ymin, xmax, ymax)"
        raise InputError(problem, "add it")
    if None in sides[4:]:
        occlusion = parse_number(item.findtext("occlusion", "0"))
        return ObjectRow(label, [*map(parse_number, sides[:4])], occlusion, number=number)
    x, y, right, bottom = map(parse_number, sides[4:])
    difficult = item.findtext("difficult", "0").strip() == "1"
    return ObjectRow(label, [x, y, right - x, bottom - y], 0, difficult, number)


# ------------------------------------------------------------------- a JSON of many frames


def read_json(path: Path, errors: Errors = None, kaist: bool = True) -> dict[str, list[ObjectRow]]:
    """Frame id -> objects of KAIST's test JSON, in the order of the images' ids, see `json_objects`."""
    return json_objects(load_json(read_text(path), path), path, errors, kaist)


def json_objects(content: Any, path: Path, errors: Errors, kaist: bool = True) -> dict[str, list[ObjectRow]]:
    """An image's name -> its objects, of a JSON's content. An object's label is its category's name.

    kaist: whether each image's im_name is a KAIST frame's id, and each object has an occlusion and an
    ignore flag; else names are file_name or im_name, and a crowd is ignored.
    """
    frames: dict[Any, str] = {}
    objects: dict[str, list[ObjectRow]] = {}

    def one_row(item: Any, number: int) -> ObjectRow:
        return json_rows([item], names)[0]._replace(number=number)

    try:
        for image in sorted(content["images"], key=lambda image: image["id"]):
            number = image["id"]
            name = image["im_name"] if kaist else str(image.get("file_name") or image["im_name"])
            if kaist and not FRAME_ID.fullmatch(name):
                raise ValueError(f"im_name {name!r} is no frame id")
            if number in frames or name in objects:
                problem = f"image {number} or {'im_name' if kaist else 'file_name'} {name} is there twice"
                report(InputError(problem, "give each an id and a name of its own", file=path), errors)
            frames[number], objects[name] = name, []
        names, items = {c["id"]: c["name"] for c in content["categories"]}, content["annotations"]
        if not kaist:
            for item in items:
                item["ignore"] = item.get("iscrowd") or item.get("ignore", 0)
                item.setdefault("occlusion", 0)
        try:
            rows = json_rows(items, names)
        except InputError:  # of which one, one by one
            place = "annotation {} of the list: "
            rows = read_rows(enumerate(items), one_row, path, errors, place)
        for row in rows:
            image_id = items[row.number]["image_id"]
            if image_id in frames:
                objects[frames[image_id]].append(row)
            else:
                problem = f"annotation {row.number} is of image {image_id}, which is not in it"
                report(InputError(problem, "correct its image_id, or add the image", file=path), errors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        form = "KAIST" if kaist else "COCO"
        problem = f"not a {form} annotation JSON ({type(error).__name__}: {error})"
        raise InputError(problem, JSON_REMEDY, file=path) from None
    return objects


def json_rows(items: Sequence[Any], names: Mapping[Any, str]) -> list[ObjectRow]:
    """The rows of a JSON's objects, all at once; names: category id -> label.

    Raises:
        InputError: one of them cannot be used; which one is not told.
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
        problem = f"it lacks a field or holds a wrong one ({type(error).__name__}: {error})"
        raise InputError(problem, "compare it with the others") from None
    columns = labels, boxes.tolist(), levels.tolist(), map(bool, ignore), range(len(items))
    rows = [*map(ObjectRow._make, zip(*columns, strict=True))]
    x, y, w, h = boxes.T
    with np.errstate(over="ignore"):
        good = (w > 0) & (h > 0) & (abs(x) + abs(y) + w + h < 1e6) & np.isin(levels, (0, 1, 2))
    for place in np.flatnonzero(~good):
        check_object(rows[place])
    return rows


def plain_numbers(rows: Sequence[Sequence[Any]], columns: int) -> np.ndarray:
    """(n, columns) float64 of rows of a JSON's numbers; float() alone would take texts and booleans.

    Raises:
        TypeError, OverflowError: a value is something else, there are more or fewer, or it is too large.
    """
    values = [*itertools.chain.from_iterable(rows)]
    if {*map(type, values)} - {int, float} or {*map(len, rows)} - {columns}:
        raise TypeError("a value is of the wrong type")
    return np.array(values, np.float64).reshape(len(rows), columns)


# ------------------------------------------------------------------- writing


def yolo_class(row: ObjectRow) -> str:
    """What YOLO's form calls an object: by its label, but a person who is ignored "ignored"."""
    return "ignored" if row.ignore and row.label == "person" else row.label


def yolo_text(rows: Iterable[ObjectRow], size: tuple[int, int], names: Sequence[str]) -> str:
    """The text of one frame's YOLO file; size: its width and height; names: of the class numbers."""
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
    """What a COCO JSON of images (name, (width, height), objects) holds; boxes are written as they are.

    name_key: what an image's name is called: "im_name" in KAIST's, where occlusion always stands.
    """
    images = list(images)
    every = [row for _, _, rows in images for row in rows]
    occlusion = name_key == "im_name" or any(row.occlusion for row in every)
    labels = ["person", *sorted({row.label for row in every} - {"person"})]
    numbers = {label: i for i, label in enumerate(labels, 1)}
    entries, annotations = [], []
    for image_id, (name, (width, height), rows) in enumerate(images):
        entries.append({"id": image_id, name_key: name, "width": width, "height": height})
        for row in rows:
            item = {"id": len(annotations) + 1, "image_id": image_id, "category_id": numbers[row.label]}
            item |= {"bbox": row.box, "area": row.box[2] * row.box[3], "height": row.box[3]}
            item |= {"iscrowd": int(row.ignore), "ignore": int(row.ignore)}
            annotations.append(item | ({"occlusion": int(row.occlusion)} if occlusion else {}))
    categories = [{"id": i, "name": label} for label, i in numbers.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}
