"""KAIST on disk: frame ids, image lists and every form of annotation. Needs numpy alone.

Forms (boxes are x, y, w, h in pixels of the 640x512 frame in all of them, see `kaist.labels`):
    bbgt: `annotations/set00/V000/I00000.txt` (or flat, `set00_V000_I00000.txt`).
    xml, xml-sanitized: `annotations-xml-new[-sanitized]/set00/V000/I00000.xml`.
    paired: `annotations_paired/set00/V000/{visible,lwir}/I00000.txt` (AR-CNN's, one file for each
        modality).
    json: `KAIST_annotation.json`, the improved annotations of the test set in one file.

What is missing or malformed is refused by an InputError that names it and its line.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kaist.files import InputError, read_text
from kaist.labels import FRAME_ID, Errors, ObjectRow, Objects, make_objects, read_json, read_labels, report

FRAME_SIZE = FRAME_WIDTH, FRAME_HEIGHT = 640, 512
DAY_SETS = {"set00", "set01", "set02", "set06", "set07", "set08"}
SCENES = ("campus", "road", "downtown")  # by set number modulo 3
JSON_NAME = "KAIST_annotation.json"
# Where each form is looked for below a root, in the order in which "auto" does.
FORM_PATHS = {
    "bbgt": ("annotations",),
    "xml-sanitized": ("annotations-xml-new-sanitized",),
    "xml": ("annotations-xml-new",),
    "paired": ("annotations_paired",),
    "json": (JSON_NAME, f"annotations/{JSON_NAME}"),
}
# The modalities that each form of the network's input needs, visible first.
MODALITIES = {
    "lwir": ("lwir",),
    "visible": ("visible",),
    "mean": ("visible", "lwir"),
    "early": ("visible", "lwir"),
    "halfway": ("visible", "lwir"),
}
# Of images, in the order in which they are looked for.
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".tif", ".tiff", ".JPG", ".PNG", ".JPEG", ".TIF", ".TIFF")
FORM_REMEDY = "set ANNOTATIONS (--annotations) to a form or a path"


def time_of_day(frame_id: str) -> str:
    """ "day" or "night", by the number of the frame's set."""
    return "day" if frame_id[:5] in DAY_SETS else "night"


def scene(frame_id: str) -> str:
    """ "campus", "road" or "downtown", by the number of the frame's set."""
    return SCENES[int(frame_id[3:5]) % 3]


def read_image_list(path: str | Path, any_id: bool = False) -> list[str]:
    """The frame ids of an imageSets file, `set00/V000/I00000` a line, each once; blank lines are skipped.

    any_id: whether ids of another form are taken too, as sets of pairs have them.
    """
    return list(line_numbers(Path(path), any_id=any_id))


def line_numbers(path: Path, errors: Errors = None, any_id: bool = False) -> dict[str, int]:
    """Frame id -> its line in an image list, in the list's order; any_id: as of `read_image_list`."""
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.txt"))[:8]
        have = f"{path.parent} holds {', '.join(beside)}" if beside else "check the path"
        raise InputError("image list not found", have, file=path)
    lines: dict[str, int] = {}
    for number, text in enumerate(read_text(path).splitlines(), 1):
        frame_id, problem = text.strip(), ""
        if frame_id and not any_id and not FRAME_ID.fullmatch(frame_id):
            problem, remedy = f"{frame_id[:60]!r} is not a frame id", "write set00/V000/I00000"
        elif frame_id and lines.setdefault(frame_id, number) != number:
            problem, remedy = f"{frame_id} stands in line {lines[frame_id]} already", "list each frame once"
        if problem:
            report(InputError(problem, remedy, file=path, line=number), errors)
    if not lines and not errors:
        report(InputError("the image list is empty", "list at least one frame", file=path), errors)
    return lines


def resolve_path(root: Path, name: str) -> Path:
    """A file named relative to a KAIST root, or by any other path."""
    return root / name if (root / name).exists() or not Path(name).exists() else Path(name)


def image_path(root: Path | PairSet, frame_id: str, modality: str) -> Path:
    """The file of one modality's image; in a KAIST root it may have any of `IMAGE_SUFFIXES`."""
    if isinstance(root, PairSet):
        return root.images[frame_id][modality]
    video, name = frame_id.rsplit("/", 1)
    stem = f"{root}/images/{video}/{modality}/{name}"
    existing = (stem + suffix for suffix in IMAGE_SUFFIXES if os.path.exists(stem + suffix))
    return Path(next(existing, stem + IMAGE_SUFFIXES[0]))


class LabelledFrames:
    """KAIST's frames; `read_rows(frame_id)` knows a frame's objects as its file has them."""

    def frame_sizes(self, frame_ids: Sequence[str]) -> np.ndarray:
        """(n, 2) int64 width and height of frames."""
        return np.tile(FRAME_SIZE, (len(frame_ids), 1))

    def read(self, frame_id: str) -> Objects:
        """The objects of a frame."""
        return make_objects(self.read_rows(frame_id))

    def read_all(self, frame_ids: Sequence[str]) -> tuple[Objects, np.ndarray]:
        """The objects of many frames, one frame after another, and how many each has, (n,) int64."""
        rows = [self.read_rows(frame_id) for frame_id in frame_ids]
        return make_objects([*itertools.chain(*rows)]), np.array([len(own) for own in rows], np.int64)


@dataclass(frozen=True)
class PairSet(LabelledFrames):
    """One split of a set of visible and LWIR pairs other than KAIST, as `kaist.pair_sets` opens it.

    It is used like a KAIST root where images are read, and like `Annotations` where objects are.

    Attributes:
        source: the description, or the root of a named set, for messages.
        frames: ids, in the order of the list, or sorted.
        images: id -> modality, or "labels" -> file; sizes: id -> width and height, of both.
        objects: id -> what is labelled, without dropped classes; who is to be learned is a "person".
        night: pattern of the ids of frames by night.
        lwir_range: as from `find_lwir_range`.
    """

    source: Path
    frames: tuple[str, ...]
    images: Mapping[str, Mapping[str, Path]]
    sizes: Mapping[str, tuple[int, int]]
    objects: Mapping[str, list[ObjectRow]]
    night: str = ""
    lwir_range: tuple[float, float] = (0.0, 0.0)

    def time_of_day(self, frame_id: str) -> str:
        """ "day" or "night", as the description or a KAIST id has it, or "" where neither says."""
        if self.night:
            return "night" if fnmatch.fnmatchcase(frame_id, self.night) else "day"
        return time_of_day(frame_id) if FRAME_ID.fullmatch(frame_id) else ""

    def frame_sizes(self, frame_ids: Sequence[str]) -> np.ndarray:
        """(n, 2) int64 width and height of frames."""
        return np.array([self.sizes[frame_id] for frame_id in frame_ids], np.int64).reshape(-1, 2)

    def take(self, frame_id: str) -> PairSet:
        """One frame alone, without its objects: quick to send to another process."""
        files, size = {frame_id: self.images[frame_id]}, {frame_id: self.sizes[frame_id]}
        return replace(self, frames=(frame_id,), images=files, sizes=size, objects={})

    def read_rows(self, frame_id: str) -> list[ObjectRow]:
        """The objects of a frame."""
        return self.objects[frame_id]


class Annotations(LabelledFrames):
    """KAIST's annotations of one form.

    Attributes:
        source: the folder, or the JSON file.
        form: "bbgt", "xml", "xml-sanitized", "paired" or "json".
        modality: whose boxes are read of the paired form.
        frames: frame ids in file order for JSON, else None.
    """

    def __init__(self, source: Path, form: str, modality: str) -> None:
        self.source, self.form, self.modality = source, form, modality
        self.json_frames = read_json(source) if form == "json" else None
        self.frames = None if self.json_frames is None else tuple(self.json_frames)

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

    def read_rows(self, frame_id: str) -> list[ObjectRow]:
        """The objects of a frame as its file has them."""
        if self.json_frames is not None:
            if frame_id not in self.json_frames:
                raise InputError(f"{frame_id} is not annotated in it", FORM_REMEDY, file=self.source)
            return self.json_frames[frame_id]
        path = Path(self.path(frame_id))
        try:
            return read_labels(path, self.form)
        except FileNotFoundError:
            raise InputError("annotation not found", FORM_REMEDY, file=path) from None
        except OSError as error:
            problem = f"unreadable annotation ({error.strerror})"
            raise InputError(problem, "check the file", file=path) from None


def open_annotations(root: str | Path, where: str = "auto", modality: str = "lwir") -> Annotations:
    """Annotations of a KAIST root, an annotation folder or a JSON file.

    Args:
        where: which: "auto" takes the first form that the root holds, in the order of `FORM_PATHS`; else a
            form, or a path, below the root or any.
        modality: whose boxes to read of the paired form.
    """
    root = Path(root)
    if where not in ("auto", *FORM_PATHS):
        root, where = resolve_path(root, where), "auto"
    if root.is_file():
        return Annotations(root, "json", modality)
    if not root.is_dir():
        problem = f"no such folder or file, and no form of annotation ({', '.join(FORM_PATHS)})"
        raise InputError(problem, f"check DATA_ROOT, or {FORM_REMEDY}", file=root)
    forms = FORM_PATHS if where == "auto" else [where]
    for form in forms:
        found = find_form_paths(root, form) or [root] * (root.name == FORM_PATHS[form][0])
        if found:
            return Annotations(found[0], form, modality)
    if where == "auto" and (form := guess_folder_form(root)):
        return Annotations(root, form, modality)
    looked_for = ", ".join(place for form in forms for place in FORM_PATHS[form])
    raise InputError(f"no annotations here; looked for {looked_for}", FORM_REMEDY, file=root)


def open_test_annotations(root: str | Path, frame_ids: Sequence[str] | None) -> Annotations:
    """Annotations to evaluate on: a root's KAIST_annotation.json if it has every frame of the list (None:
    its own are meant), because papers evaluate on these improved ones; else as `open_annotations`."""
    if find_form_paths(Path(root), "json"):
        improved = open_annotations(root, "json")
        if frame_ids is None or set(frame_ids) <= set(improved.frames):
            return improved
    return open_annotations(root)


def find_form_paths(root: Path, form: str) -> list[Path]:
    """The places of a form below a KAIST root that hold annotations at all."""
    places = [root / place for place in FORM_PATHS[form]]
    if form == "json":
        return [path for path in places if path.exists()]
    ending = ".xml" if form.startswith("xml") else ".txt"
    return [folder for folder in places if next(folder.rglob(f"*{ending}"), None) is not None]


def guess_folder_form(folder: Path) -> str | None:
    """The form of a folder under a name of its own, by the first file in it."""
    first = next((path for path in folder.rglob("*") if path.suffix in (".xml", ".txt")), None)
    if first is None or "imageSets" in first.parts:
        return None
    if first.suffix == ".xml":
        return "xml"
    return "paired" if first.parent.name in ("visible", "lwir") else "bbgt"
