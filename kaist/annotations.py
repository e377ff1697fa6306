"""Find and read KAIST's image lists, images and annotations on disk. Needs numpy only.

Forms of annotation (boxes are x, y, w, h in pixels of the 640x512 frame, see `kaist.labels`):
    bbgt: `annotations/set00/V000/I00000.txt`, or `set00_V000_I00000.txt` without subfolders.
    xml, xml-sanitized: `annotations-xml-new[-sanitized]/set00/V000/I00000.xml`.
    paired: `annotations_paired/set00/V000/{visible,lwir}/I00000.txt`, one file for each modality (AR-CNN).
    json: `KAIST_annotation.json`, the improved annotations of the test set in one file.

Missing or malformed files raise an InputError with the file and the line.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kaist.files import InputError, read_text
from kaist.labels import FRAME_ID, Errors, ObjectRow, Objects, make_objects, read_json, read_labels, report

FRAME_SIZE = FRAME_WIDTH, FRAME_HEIGHT = 640, 512
DAY_SETS = {"set00", "set01", "set02", "set06", "set07", "set08"}
SCENES = ("campus", "road", "downtown")  # by set number modulo 3
JSON_NAME = "KAIST_annotation.json"
DEMO_ROOT = Path("data/demo")  # where kaist.demo renders the demo set
# The paths of each form below a KAIST root, in the order in which "auto" tries them.
FORM_PATHS = {
    "bbgt": ("annotations",),
    "xml-sanitized": ("annotations-xml-new-sanitized",),
    "xml": ("annotations-xml-new",),
    "paired": ("annotations_paired",),
    "json": (JSON_NAME, f"annotations/{JSON_NAME}"),
}
# INPUT_MODE -> the modalities it reads, visible first.
MODALITIES = {
    "lwir": ("lwir",),
    "visible": ("visible",),
    "mean": ("visible", "lwir"),
    "early": ("visible", "lwir"),
    "halfway": ("visible", "lwir"),
}
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".tif", ".tiff", ".JPG", ".PNG", ".JPEG", ".TIF", ".TIFF")
FORM_REMEDY = "set ANNOTATIONS (--annotations) to a form or a path"


def time_of_day(frame_id: str) -> str:
    """Return "day" or "night", by the number of the frame's set."""
    return "day" if frame_id[:5] in DAY_SETS else "night"


def scene(frame_id: str) -> str:
    """Return "campus", "road" or "downtown", by the number of the frame's set."""
    return SCENES[int(frame_id[3:5]) % 3]


def read_image_list(path: str | Path, any_id: bool = False) -> list[str]:
    """Read the frame ids of an imageSets file: one `set00/V000/I00000` per line, without duplicates.

    any_id: accept other ids too, as other sets of pairs have them.
    """
    return list(line_numbers(Path(path), any_id=any_id))


def line_numbers(path: Path, errors: Errors = None, any_id: bool = False) -> dict[str, int]:
    """Map the frame ids of an image list to their lines, in order; any_id: as in `read_image_list`."""
    if not path.exists():
        others = sorted(p.name for p in path.parent.glob("*.txt"))[:8]
        remedy = f"{path.parent} has {', '.join(others)}" if others else "check the path"
        raise InputError("image list not found", remedy, file=path)
    lines: dict[str, int] = {}
    for number, text in enumerate(read_text(path).splitlines(), 1):
        frame_id, problem = text.strip(), ""
        if frame_id and not any_id and not FRAME_ID.fullmatch(frame_id):
            problem, remedy = f"{frame_id[:60]!r} is not a frame id", "write it as set00/V000/I00000"
        elif frame_id and lines.setdefault(frame_id, number) != number:
            problem, remedy = f"{frame_id} is already in line {lines[frame_id]}", "list each frame once"
        if problem:
            report(InputError(problem, remedy, file=path, line=number), errors)
    if not lines and not errors:
        report(InputError("the image list is empty", "list at least one frame", file=path), errors)
    return lines


def resolve_path(root: Path, name: str) -> Path:
    """Return root/name if it exists or `name` does not, else `name`."""
    return root / name if (root / name).exists() or not Path(name).exists() else Path(name)


def image_path(root: Path | PairSet, frame_id: str, modality: str) -> Path:
    """Return a frame's image file; below a KAIST root, with the first of `IMAGE_SUFFIXES` that exists."""
    if isinstance(root, PairSet):
        return root.images[frame_id][modality]
    video, name = frame_id.rsplit("/", 1)
    stem = f"{root}/images/{video}/{modality}/{name}"
    existing = (stem + suffix for suffix in IMAGE_SUFFIXES if os.path.exists(stem + suffix))
    return Path(next(existing, stem + IMAGE_SUFFIXES[0]))


class LabelledFrames:
    """Base class of annotated frames; subclasses define `read_rows(frame_id)`. Frames have KAIST's size."""

    def frame_sizes(self, frame_ids: Sequence[str]) -> np.ndarray:
        """Return the width and height of frames, (n, 2) int64."""
        return np.tile(FRAME_SIZE, (len(frame_ids), 1))

    def read(self, frame_id: str) -> Objects:
        """Read the objects of a frame."""
        return make_objects(self.read_rows(frame_id))

    def read_all(self, frame_ids: Sequence[str]) -> tuple[Objects, np.ndarray]:
        """Read the objects of several frames, concatenated, and their number in each frame, (n,) int64."""
        rows = [self.read_rows(frame_id) for frame_id in frame_ids]
        return make_objects([*itertools.chain(*rows)]), np.array([*map(len, rows)], np.int64)


@dataclass(frozen=True)
class PairSet(LabelledFrames):
    """One split of a set of visible and LWIR pairs other than KAIST, see `kaist.pair_sets.open_pairs`.

    Functions that read images take it instead of a KAIST root; functions that read objects take it
    instead of `Annotations`.

    Attributes:
        source: the description file, or the root of a named set, for messages.
        frames: frame ids, in the order of the list, or sorted.
        images: id -> "visible", "lwir" and "labels" -> file; sizes: id -> width and height of both images.
        objects: id -> objects without dropped classes; training targets have the label "person".
        night: fnmatch pattern of the ids of night frames.
        lwir_range: the LWIR values that become 0 and 255, see `find_lwir_range`.
    """

    source: Path
    frames: tuple[str, ...]
    images: Mapping[str, Mapping[str, Path]]
    sizes: Mapping[str, tuple[int, int]]
    objects: Mapping[str, list[ObjectRow]]
    night: str = ""
    lwir_range: tuple[float, float] = (0.0, 0.0)

    def time_of_day(self, frame_id: str) -> str:
        """Return "day" or "night", from the description or a KAIST id, or "" if unknown."""
        if self.night:
            return "night" if fnmatch.fnmatchcase(frame_id, self.night) else "day"
        return time_of_day(frame_id) if FRAME_ID.fullmatch(frame_id) else ""

    def frame_sizes(self, frame_ids: Sequence[str]) -> np.ndarray:
        """Return the width and height of frames, (n, 2) int64."""
        return np.array([self.sizes[frame_id] for frame_id in frame_ids], np.int64).reshape(-1, 2)

    def read_rows(self, frame_id: str) -> list[ObjectRow]:
        """Return the objects of a frame."""
        return self.objects[frame_id]


class Annotations(LabelledFrames):
    """KAIST's annotations in one form.

    Attributes:
        source: the folder, or the JSON file.
        form: a key of `FORM_PATHS`.
        modality: "visible" or "lwir", whose boxes are read; only for the paired form.
        frames: the frame ids of a JSON, in the order of its image ids; None for the other forms.
    """

    def __init__(self, source: Path, form: str, modality: str) -> None:
        self.source, self.form, self.modality = source, form, modality
        self.json_frames = read_json(source) if form == "json" else None
        self.frames = None if self.json_frames is None else tuple(self.json_frames)

    def path(self, frame_id: str) -> str:
        """Return the annotation file of a frame, as a str because creating a Path takes longer."""
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
        """Read the objects of a frame."""
        if self.json_frames is not None:
            if frame_id not in self.json_frames:
                raise InputError(f"{frame_id} is not annotated in this file", FORM_REMEDY, file=self.source)
            return self.json_frames[frame_id]
        path = Path(self.path(frame_id))
        try:
            return read_labels(path, self.form)
        except FileNotFoundError:
            raise InputError("annotation not found", FORM_REMEDY, file=path) from None
        except OSError as error:
            problem = f"unreadable annotation ({error.strerror})"
            raise InputError(problem, "check the file", file=path) from None


def open_annotations(root: str | Path, which: str = "auto", modality: str = "lwir") -> Annotations:
    """Open the annotations of a KAIST root, an annotation folder or a JSON file.

    Args:
        which: a form, or a path, absolute or relative to the root; "auto": the first form that exists.
        modality: "visible" or "lwir", whose boxes to read from the paired form.
    """
    root = Path(root)
    if which not in ("auto", *FORM_PATHS):
        root, which = resolve_path(root, which), "auto"
    if root.is_file():
        return Annotations(root, "json", modality)
    if not root.is_dir():
        problem = f"no such folder or file, and not a form of annotation ({', '.join(FORM_PATHS)})"
        raise InputError(problem, f"check the path, or {FORM_REMEDY}", file=root)
    forms = FORM_PATHS if which == "auto" else [which]
    for form in forms:
        found = find_form_paths(root, form) or [root] * (root.name == FORM_PATHS[form][0])
        if found:
            return Annotations(found[0], form, modality)
    if which == "auto" and (form := guess_folder_form(root)):
        return Annotations(root, form, modality)
    looked_for = ", ".join(place for form in forms for place in FORM_PATHS[form])
    raise InputError(f"no annotations here; looked for {looked_for}", FORM_REMEDY, file=root)


def open_test_annotations(root: str | Path, frame_ids: Sequence[str] | None) -> Annotations:
    """Open the annotations to evaluate on: KAIST_annotation.json, which papers use, if it has all frames
    (None: those of the JSON), else those of `open_annotations`."""
    if find_form_paths(Path(root), "json"):
        improved = open_annotations(root, "json")
        if frame_ids is None or set(frame_ids) <= set(improved.frames):
            return improved
    return open_annotations(root)


def find_form_paths(root: Path, form: str) -> list[Path]:
    """Return the existing files or folders of a form below a KAIST root; a folder must have a label file."""
    paths = [root / path for path in FORM_PATHS[form]]
    if form == "json":
        return [path for path in paths if path.exists()]
    suffix = ".xml" if form.startswith("xml") else ".txt"
    return [folder for folder in paths if next(folder.rglob(f"*{suffix}"), None) is not None]


def guess_folder_form(folder: Path) -> str | None:
    """Guess the form of an annotation folder with another name from its first label file."""
    first = next((path for path in folder.rglob("*") if path.suffix in (".xml", ".txt")), None)
    if first is None or "imageSets" in first.parts:
        return None
    if first.suffix == ".xml":
        return "xml"
    return "paired" if first.parent.name in ("visible", "lwir") else "bbgt"
