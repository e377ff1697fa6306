"""Labels of other sets than KAIST: VOC XML, YOLO text, CVC-14's text, COCO JSON. Needs numpy alone.

Whatever the form, a row's box is x, y, w, h in pixels of its frame, from the upper left corner.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kaist.annotation_files import (
    READERS,
    Errors,
    ObjectRow,
    Objects,
    check_object,
    json_row,
    parse_number,
    parse_xml,
    read_rows,
    xml_row,
)
from kaist.files import InputError, load_json, read_text

FORMS = ("xml", "kaist-text", "yolo", "cvc14")  # of files for one frame each
DIGITS = 8  # of YOLO's fractions: at 10,000 pixels a side a ten-thousandth of a pixel


def guess_label_form(path: Path) -> str:
    """The form of one frame's label file, by its ending and its first character."""
    if path.suffix.lower() == ".xml":
        return "xml"
    return "kaist-text" if read_text(path).startswith("%") else "yolo"


def read_labels(
    path: Path, form: str, size: tuple[int, int], names: Sequence[str] = (), errors: Errors = None
) -> list[ObjectRow]:
    """The objects of one frame's label file.

    Args:
        form: one of `FORMS`; size: width and height of the frame; names: of YOLO's class numbers,
            which name themselves where there are none.
        errors: takes what is refused, as in `kaist.annotation_files`.

    Raises:
        InputError: the file is malformed.
    """
    if form == "xml":
        root, lines = parse_xml(path)
        return read_rows(zip(lines, root.iter("object"), strict=True), voc_row, path, errors)
    if form == "kaist-text":
        return READERS["paired"](path, errors)
    numbered = ((n, line) for n, line in enumerate(read_text(path).splitlines(), 1) if line.strip())
    row = partial(yolo_row, size, names) if form == "yolo" else cvc14_row
    return read_rows(numbered, row, path, errors)


def voc_row(item: ElementTree.Element, number: int) -> ObjectRow:
    """A row from one object of a VOC XML, corners xmin, ymin, xmax, ymax, or of KAIST's, x, y, w, h.

    Corners are taken as they are: the width is xmax - xmin. What is `difficult` is ignored.
    """
    corners = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    label = item.findtext("name", "").strip()
    if None in corners or not label:
        return xml_row(item, number)
    x, y, right, bottom = map(parse_number, corners)
    box = [x, y, right - x, bottom - y]
    check_object(box, 0)
    return ObjectRow(label, box, 0, item.findtext("difficult", "0").strip() == "1", number)


def yolo_row(size: tuple[int, int], names: Sequence[str], line: str, number: int) -> ObjectRow:
    """A row from `class cx cy w h`, fractions of the frame; a sixth column, a confidence, is left out."""
    fields = line.split()
    if len(fields) not in (5, 6):
        raise InputError(f"{len(fields)} columns where YOLO has 5", "write 'class cx cy w h'")
    cx, cy, w, h = map(parse_number, fields[1:5])
    if max(map(abs, (cx, cy, w, h))) > 2:  # a box may leave the frame
        problem = f"{' '.join(fields[1:5])} are not fractions of the frame, from 0 to 1"
        raise InputError(problem, "divide pixels by the frame's width and height")
    label = fields[0]
    if not (label.isascii() and label.isdigit()) or (names and int(label) >= len(names)):
        raise InputError(f"class {label!r} has no name", "name the classes in order as the set's 'names'")
    width, height = size
    box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    check_object(box, 0)
    return ObjectRow(names[int(label)] if names else label, box, 0, False, number)


def cvc14_row(line: str, number: int) -> ObjectRow:
    """A row from CVC-14's `x y w h 1 0 …`, of which x and y are the box's centre: a person."""
    fields = line.split()
    if len(fields) < 5:
        raise InputError(f"{len(fields)} columns where CVC-14 has 5 or more", "write 'x y w h 1 0'")
    x, y, w, h = map(parse_number, fields[:4])
    box = [x - w / 2, y - h / 2, w, h]
    check_object(box, 0)
    return ObjectRow("person", box, 0, False, number)


def read_coco(path: Path) -> dict[str, list[ObjectRow]]:
    """file_name -> the objects of one image of a COCO JSON, or im_name, as KAIST's calls it.

    A crowd is ignored. Occlusion is 0 where the file does not tell it.

    Raises:
        InputError: it is no such JSON, or an object is malformed.
    """
    content = load_json(read_text(path), path)
    try:
        files = {image["id"]: str(image.get("file_name") or image["im_name"]) for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        items = [{"occlusion": 0, "ignore": a.get("iscrowd", 0), **a} for a in content["annotations"]]
        rows: dict[str, list[ObjectRow]] = {name: [] for name in files.values()}
        for row in read_rows(enumerate(items), partial(json_row, path, names), path, None):
            rows[files[items[row.number]["image_id"]]].append(row)
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"not a COCO annotation JSON ({type(error).__name__}: {error})"
        raise InputError(problem, "use one with images, annotations and categories", file=path) from None
    if len(rows) < len(content["images"]):
        raise InputError("two of its images have one id or name", "tell them apart", file=path)
    return rows


# ------------------------------------------------------------------- writing


def yolo_lines(objects: Objects, size: tuple[int, int], names: Sequence[str]) -> str:
    """The text of one frame's YOLO file; names: of the class numbers, see `class_name`."""
    width, height = size
    lines = []
    for i, (x, y, w, h) in enumerate(objects.boxes.tolist()):
        values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        number = names.index(class_name(objects, i))
        lines.append(" ".join([str(number), *(f"{value:.{DIGITS}f}" for value in values)]) + "\n")
    return "".join(lines)


def class_name(objects: Objects, i: int) -> str:
    """The label of an object; of a person who is ignored "ignored"."""
    return "ignored" if objects.ignore[i] and objects.labels[i] == "person" else objects.labels[i]


def coco_content(
    files: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    objects: Sequence[Objects],
    name_key: str = "file_name",
) -> Mapping[str, Any]:
    """What a COCO JSON of these images holds; boxes are written as they are.

    Args:
        name_key: what an image's name is called: "im_name" in KAIST's, where occlusion always stands.
    """
    occlusion = name_key == "im_name" or any(own.occlusion.any() for own in objects)
    others = sorted({label for own in objects for label in own.labels} - {"person"})
    numbers = {label: i for i, label in enumerate(["person", *others], 1)}
    annotations = []
    for image_id, own in enumerate(objects):
        columns = own.boxes.tolist(), own.labels, own.occlusion.tolist(), own.ignore.tolist()
        for box, label, level, ignored in zip(*columns, strict=True):
            item = {"id": len(annotations) + 1, "image_id": image_id, "category_id": numbers[label]}
            item |= {"bbox": box, "area": box[2] * box[3], "height": box[3]}
            item |= {"iscrowd": int(ignored), "ignore": int(ignored)}
            annotations.append(item | ({"occlusion": level} if occlusion else {}))
    images = [
        {"id": i, name_key: name, "width": width, "height": height}
        for i, (name, (width, height)) in enumerate(zip(files, sizes, strict=True))
    ]
    categories = [{"id": i, "name": label} for label, i in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def scaled(objects: Objects, size: tuple[int, int], to: tuple[int, int]) -> Objects:
    """Objects of a frame of `size` (width, height) as they lie in the frame scaled to another size."""
    factors = np.tile(np.divide(to, size), 2)
    return Objects(objects.boxes * factors, objects.labels, objects.occlusion, objects.ignore)
