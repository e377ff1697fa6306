"""KAIST on disk: frame ids, image lists and every form of annotation. Needs numpy alone.

Forms (boxes are x, y, w, h in pixels of the 640x512 frame in all of them):
    bbgt: `annotations/set00/V000/I00000.txt` (or flat, `set00_V000_I00000.txt`), a header
        `% bbGt version=3`, then `person x y w h occ vx vy vw vh ign ang` a line.
    xml, xml-sanitized: `annotations-xml-new[-sanitized]/set00/V000/I00000.xml`.
    paired: `annotations_paired/set00/V000/{visible,lwir}/I00000.txt`, a header, then
        `person x y w h …` a line (AR-CNN's annotations, one file for each modality).
    json: `KAIST_annotation.json`, the improved annotations of the test set in one file.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kaist.files import InputError, load_json, read_text
from kaist.remember import remember

FRAME_WIDTH, FRAME_HEIGHT = 640, 512
FRAME_ID = re.compile(r"set(0\d|1[01])/V\d{3}/I\d{5}", re.ASCII)
DAY_SETS = {"set00", "set01", "set02", "set06", "set07", "set08"}
SCENES = ("campus", "road", "downtown")  # by set number modulo 3
JSON_NAME = "KAIST_annotation.json"
FOLDERS = {
    "bbgt": "annotations",
    "xml-sanitized": "annotations-xml-new-sanitized",
    "xml": "annotations-xml-new",
    "paired": "annotations_paired",
}  # in the order in which "auto" looks for them; JSON comes last
# The modalities that each form of the network's input needs, visible first.
MODALITIES = {
    "lwir": ("lwir",),
    "visible": ("visible",),
    "mean": ("visible", "lwir"),
    "early": ("visible", "lwir"),
    "halfway": ("visible", "lwir"),
}
REMEDY = "set ANNOTATIONS (--annotations) to a form or a path"


def time_of_day(frame_id: str) -> str:
    """ "day" or "night", by the number of the frame's set."""
    return "day" if frame_id[:5] in DAY_SETS else "night"


def scene(frame_id: str) -> str:
    """ "campus", "road" or "downtown", by the number of the frame's set."""
    return SCENES[int(frame_id[3:5]) % 3]


def read_image_list(path: str | Path) -> list[str]:
    """The frame ids of an imageSets file, `set00/V000/I00000` a line; blank lines are skipped.

    Raises:
        InputError: a missing or empty list, a line that is no frame id, a frame listed twice.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.txt"))[:8]
        have = f"{path.parent} holds {', '.join(beside)}" if beside else "check the path"
        raise InputError("image list not found", have, file=path)
    first_line: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        frame_id = line.strip()
        if not frame_id:
            continue
        if not FRAME_ID.fullmatch(frame_id):
            raise InputError(
                f"{frame_id[:60]!r} is not a frame id", "write set00/V000/I00000", file=path, line=number
            )
        if frame_id in first_line:
            raise InputError(
                f"{frame_id} stands in line {first_line[frame_id]} already",
                "list each frame once",
                file=path,
                line=number,
            )
        first_line[frame_id] = number
    if not first_line:
        raise InputError("the image list is empty", "list at least one frame", file=path)
    return list(first_line)


def find_file(root: Path, name: str) -> Path:
    """A file named relative to a KAIST root, or by any other path."""
    return root / name if (root / name).exists() or not Path(name).exists() else Path(name)


def image_path(root: Path, frame_id: str, modality: str) -> Path:
    """`<root>/images/set00/V000/<modality>/I00000.jpg`."""
    video, name = frame_id.rsplit("/", 1)
    return Path(f"{root}/images/{video}/{modality}/{name}.jpg")


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one frame.

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


ObjectRow = tuple[str, list[float], float, bool]  # label, [x, y, w, h], occlusion, ignore


def make_objects(rows: list[ObjectRow]) -> Objects:
    """Objects from rows."""
    return Objects(
        np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
        tuple(row[0] for row in rows),
        np.array([row[2] for row in rows], dtype=np.int64),
        np.array([row[3] for row in rows], dtype=bool),
    )


def check_row(box: list[float], occlusion: float, path: Path, line: int | None, where: str = "") -> None:
    """Refuse a box of no area or not finite, and an occlusion other than 0, 1 or 2.

    Args:
        where: the object's place in words, for files whose lines are not known.
    """
    x, y, w, h = box
    if not (w > 0 and h > 0 and abs(x) + abs(y) + w + h < 1e6):
        raise InputError(
            f"{where}box x={x:g} y={y:g} w={w:g} h={h:g} is not a box of pixels with positive size",
            "correct or delete it",
            file=path,
            line=line,
        )
    if occlusion not in (0, 1, 2):
        raise InputError(
            f"{where}occlusion {occlusion:g} is unknown",
            "use 0 none, 1 partial or 2 heavy",
            file=path,
            line=line,
        )


def parse_number(text: str, path: Path, line: int | None) -> float:
    """A number of an annotation file, or an InputError that names it."""
    try:
        return float(text)
    except (TypeError, ValueError):
        raise InputError(f"{text!r} is not a number", "correct the line", file=path, line=line) from None


def read_bbgt(path: Path) -> list[ObjectRow]:
    """One bbGt text file, version 3 (Piotr Dollár's toolbox)."""
    return read_lines(path, columns=11)


def read_paired(path: Path) -> list[ObjectRow]:
    """One modality's file of the paired annotations; occlusion and ignore may be absent."""
    return read_lines(path, columns=5)


def read_lines(path: Path, columns: int) -> list[ObjectRow]:
    """A header line, then an object a line: a label and at least `columns` - 1 numbers."""
    lines = read_text(path).splitlines()
    if not lines or not lines[0].startswith("%"):
        raise InputError(
            "the first line is not a bbGt header", "begin the file with '% bbGt version=3'", file=path, line=1
        )
    numbered = enumerate(lines[1:], 2)
    return [line_row(line, columns, path, n) for n, line in numbered if line.strip()]


def line_row(line: str, columns: int, path: Path, number: int) -> ObjectRow:
    """A row from one line of a text file; `number` is the line's."""
    fields = line.split()
    if len(fields) < columns:
        raise InputError(
            f"{len(fields)} columns where at least {columns} are wanted",
            "write 'person x y w h occ vx vy vw vh ign ang'",
            file=path,
            line=number,
        )
    box = [parse_number(field, path, number) for field in fields[1:5]]
    occlusion = ignore = 0.0
    if len(fields) >= 11:
        occlusion = parse_number(fields[5], path, number)
        ignore = parse_number(fields[10], path, number)
    check_row(box, occlusion, path, number)
    return fields[0], box, occlusion, ignore != 0


def read_xml(path: Path) -> list[ObjectRow]:
    """One XML file; its bndbox holds x, y, w, h."""
    rows = []
    for i, item in enumerate(parse_xml(path).iter("object")):
        try:
            rows.append(xml_row(item, path, None))
        except InputError:  # the parser keeps no lines: look it up, and say it again with it
            xml_row(item, path, object_line(path, i))
    return rows


def parse_xml(path: Path) -> ElementTree.Element:
    """The root of one XML file; entities, which can grow without bound, are refused."""
    text = read_text(path)
    if "<!DOCTYPE" in text:
        raise InputError("an XML with a DOCTYPE is not read", "delete its DOCTYPE", file=path)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(
            f"broken XML ({error})", "copy the file again", file=path, line=error.position[0]
        ) from None
    if root.tag != "annotation":
        raise InputError(
            f"<{root.tag[:60]}> is no KAIST annotation", "copy the file again", file=path, line=1
        )
    return root


def xml_row(item: ElementTree.Element, path: Path, line: int | None) -> ObjectRow:
    """A row from one XML object."""
    label, sides = item.findtext("name"), item.find("bndbox")
    box = [None] if sides is None else [sides.findtext(side) for side in "xywh"]
    if label is None or None in box:
        raise InputError(
            "an object lacks its name or one of bndbox's x, y, w, h", "add it", file=path, line=line
        )
    box = [parse_number(text, path, line) for text in box]
    occlusion = parse_number(item.findtext("occlusion", "0"), path, line)
    check_row(box, occlusion, path, line)
    return label.strip(), box, occlusion, False


def object_line(path: Path, index: int) -> int:
    """The line on which an XML file's object begins; objects count from 0."""
    starts = list(re.finditer(rb"<object\b", path.read_bytes()))
    return path.read_bytes().count(b"\n", 0, starts[index].start()) + 1 if starts else 1


def read_json(path: Path) -> dict[str, Objects]:
    """All frames of a test JSON, in the order of their ids.

    Objects of a category other than "person" and those with ignore = 1 keep their flag; every
    object's label is its category's name.
    """
    content = load_json(read_text(path), path)
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = sorted(content["images"], key=lambda image: image["id"])
        rows: dict[int, list] = {image["id"]: [] for image in images}
        frames = {image["im_name"] for image in images}
        if not len(rows) == len(frames) == len(images) or not all(map(FRAME_ID.fullmatch, frames)):
            raise ValueError("an image's id or im_name is there twice, or is no frame id")
        for number, item in enumerate(content["annotations"]):
            rows[item["image_id"]].append(json_row(item, number, names, path))
        return {image["im_name"]: make_objects(rows[image["id"]]) for image in images}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"not a KAIST annotation JSON ({type(error).__name__}: {error})",
            "use KAIST_annotation.json, with images, annotations and categories",
            file=path,
        ) from None


def json_row(item: Any, number: int, names: dict[Any, Any], path: Path) -> ObjectRow:
    """A row from the JSON's annotation `number`; names: category id -> label."""
    where = f"annotation {number} of the list"
    try:
        label, occlusion, ignore = names[item["category_id"]], item["occlusion"], item["ignore"]
        numbers = [*item["bbox"], occlusion]
        if not isinstance(label, str) or {*map(type, numbers)} - {int, float}:
            raise TypeError("a value is of the wrong type")
        box = [float(value) for value in numbers[:-1]]
        check_row(box, occlusion, path, None, f"{where}: ")
        return label, box, occlusion, bool(ignore)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where} lacks a field or holds a wrong one ({type(error).__name__}: {error})",
            "compare it with the others",
            file=path,
        ) from None


READERS: dict[str, Callable[[Path], list[ObjectRow]]] = {
    "bbgt": read_bbgt,
    "xml": read_xml,
    "xml-sanitized": read_xml,
    "paired": read_paired,
}


class Annotations:
    """Annotations of one form.

    Attributes:
        source: the folder, or the JSON file.
        form: "bbgt", "xml", "xml-sanitized", "paired" or "json".
        frames: frame ids in file order for JSON, else None.
    """

    def __init__(self, source: Path, form: str, modality: str) -> None:
        self.source = source
        self.form = form
        self.modality = modality
        self.objects = read_json(source) if form == "json" else {}
        self.frames = tuple(self.objects) if form == "json" else None

    def path(self, frame_id: str) -> str:
        """The file that annotates a frame. A str: a Path takes longer to make than to look up."""
        if self.form == "json":
            return str(self.source)
        if self.form == "paired":
            video, name = frame_id.rsplit("/", 1)
            return f"{self.source}/{video}/{self.modality}/{name}.txt"
        if self.form == "bbgt":
            path = f"{self.source}/{frame_id}.txt"
            flat = f"{self.source}/{frame_id.replace('/', '_')}.txt"
            return path if os.path.exists(path) or not os.path.exists(flat) else flat
        return f"{self.source}/{frame_id}.xml"

    def read(self, frame_id: str) -> Objects:
        """The objects of a frame.

        Raises:
            InputError: the file is missing or malformed.
        """
        if self.form != "json":
            return make_objects(self.read_rows(Path(self.path(frame_id))))
        if frame_id not in self.objects:
            raise InputError(f"{frame_id} is not annotated in it", REMEDY, file=self.source)
        return self.objects[frame_id]

    def read_all(self, frame_ids: Sequence[str]) -> tuple[Objects, np.ndarray]:
        """The objects of many frames, one frame after another, and how many each has, (n,) int64.

        Files are read again only after one of them has changed (see remember.py).

        Raises:
            InputError: the first file that is missing or malformed.
        """
        if self.form == "json":
            found = [self.read(frame_id) for frame_id in frame_ids]
            parts = ("boxes", "occlusion", "ignore")
            boxes, *rest = (np.concatenate([getattr(o, part) for o in found]) for part in parts)
            labels = tuple(label for objects in found for label in objects.labels)
            counts = np.array([len(objects.boxes) for objects in found])
            return Objects(boxes, labels, *rest), counts
        paths = [self.path(frame_id) for frame_id in frame_ids]

        def learn() -> dict[str, np.ndarray]:
            rows = [self.read_rows(Path(path)) for path in paths]
            objects = make_objects([row for own in rows for row in own])
            columns = {**vars(objects), "labels": np.array(objects.labels, dtype=np.str_)}
            return {**columns, "counts": np.array([len(own) for own in rows])}

        columns = remember(f"annotations-{self.form}", paths, learn)
        counts, labels = columns.pop("counts"), tuple(columns.pop("labels").tolist())
        return Objects(labels=labels, **columns), counts

    def read_rows(self, path: Path) -> list[ObjectRow]:
        """The objects of a file of this form, as rows."""
        try:
            return READERS[self.form](path)
        except FileNotFoundError:
            raise InputError("annotation not found", REMEDY, file=path) from None
        except OSError as error:
            raise InputError(
                f"unreadable annotation ({error.strerror})", "check the file", file=path
            ) from None


def open_annotations(source: str | Path, form: str = "auto", modality: str = "lwir") -> Annotations:
    """Annotations of a KAIST root, an annotation folder or a JSON file.

    Args:
        source: the root, folder or file.
        form: which form to read; "auto" takes the first that the root holds, in the order of
            `FOLDERS`, then JSON.
        modality: whose boxes to read of the paired form.

    Raises:
        InputError: nothing of that form is there; the line names what was looked for.
    """
    source = Path(source)
    if source.is_file():
        return Annotations(source, "json", modality)
    if not source.is_dir():
        raise InputError("no such folder or file", f"check DATA_ROOT, or {REMEDY}", file=source)
    wanted = [*FOLDERS, "json"] if form == "auto" else [form]
    looked_for = []
    for kind in wanted:
        if kind == "json":
            places = [source / JSON_NAME, source / "annotations" / JSON_NAME]
            found = next((place for place in places if place.is_file()), None)
        elif kind in FOLDERS:
            places = [source / FOLDERS[kind]]
            found = places[0] if has_annotations(places[0], kind) else None
            if found is None and source.name == FOLDERS[kind]:
                found = source
        else:
            raise InputError(
                f"{form!r} is not a form of annotation", f"use auto, {', '.join(FOLDERS)}, json or a path"
            )
        if found is not None:
            return Annotations(found, kind, modality)
        looked_for += [str(place.relative_to(source)) for place in places]
    if form == "auto" and (kind := guess_form(source)):
        return Annotations(source, kind, modality)
    looked = ", ".join(looked_for)
    raise InputError(f"no annotations here; looked for {looked}", REMEDY, file=source)


def open_test_annotations(source: str | Path, frame_ids: Sequence[str] | None) -> Annotations:
    """Annotations to evaluate on, of a KAIST root, an annotation folder or a JSON file.

    A root's KAIST_annotation.json is preferred if it has every frame of the list, because it holds
    the improved annotations that papers evaluate on; else the root's other forms, as in `auto`.

    Args:
        frame_ids: the frames to evaluate; None takes the JSON's own.
    """
    source = Path(source)
    if any((source / place / JSON_NAME).is_file() for place in (".", "annotations")):
        improved = open_annotations(source, "json")
        if frame_ids is None or set(frame_ids) <= set(improved.frames):
            return improved
    return open_annotations(source)


def has_annotations(folder: Path, kind: str) -> bool:
    """Whether an annotation folder is there and holds files of its kind at all."""
    ending = ".xml" if kind.startswith("xml") else ".txt"
    return folder.is_dir() and next(folder.rglob(f"*{ending}"), None) is not None


def guess_form(folder: Path) -> str | None:
    """The form of a folder under a name of its own, by the first file in it."""
    first = next((path for path in folder.rglob("*") if path.suffix in (".xml", ".txt")), None)
    if first is None or "imageSets" in first.parts:
        return None
    if first.suffix == ".xml":
        return "xml"
    return "paired" if first.parent.name in ("visible", "lwir") else "bbgt"


def find_annotations(root: Path, where: str, modality: str) -> Annotations:
    """Annotations named by a constant: "auto", a form within the root, or a path."""
    if where in ("auto", "json", *FOLDERS):
        return open_annotations(root, where, modality)
    return open_annotations(find_file(root, where), "auto", modality)
