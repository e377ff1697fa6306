"""Open sets of visible and LWIR pairs other than KAIST from a description, see docs/your-data.md.

A description is a JSON file, `pairs.json`, or a name in `NAMED_SETS`. A frame's id is what the * of its
image pattern match, joined by "/", or, without *, its path in the image folder without the suffix.
Missing, malformed or contradictory input raises an InputError with the file and the line.
"""

from __future__ import annotations

import difflib
import glob
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from kaist.annotations import IMAGE_SUFFIXES, PairSet, line_numbers, open_annotations, open_test_annotations
from kaist.files import InputError, load_json, printable, read_text
from kaist.images import image_size, load_deep_image
from kaist.labels import FRAME_ID, KAIST_LABELS, Errors, ObjectRow, guess_form, read_json, read_labels, report

SPLITS = ("train", "test")
ROLES = ("person", "ignore", "drop")
LABEL_FORMS = ("xml", "kaist-text", "yolo", "cvc14")  # forms of label files of one frame
# The keys of a description, see docs/your-data.md, and the types of their values.
KEY_TYPES = {
    **dict.fromkeys(("visible", "lwir", "labels", "list", "form", "night"), str),
    **dict.fromkeys(("names", *ROLES), list),
    "splits": dict,
}
TYPE_NAMES = {str: "a string", list: "a list of strings", dict: "an object of strings"}
DEFAULT_ROLES = {"person": ["person"], "ignore": [*KAIST_LABELS[1:], "ignored"]}
NAMED_SETS: dict[str, dict[str, Any]] = {
    "kaist": {
        "visible": "images/*/*/visible/*",
        "lwir": "images/*/*/lwir/*",
        "labels": "",  # the first of KAIST's forms that exists
        "list": "imageSets/{split}-all*.txt",
        "ignore": ["*"],
    },
    "llvip": {
        "visible": "visible/{split}/*.jpg",
        "lwir": "infrared/{split}/*.jpg",
        "labels": "Annotations/*.xml",
        "night": "*",
    },
    "flir": {
        "visible": "JPEGImages/*_RGB.jpg",
        "lwir": "JPEGImages/*_PreviewData.jpeg",
        "labels": "Annotations/*_PreviewData.xml",
        "list": "align_{split}.txt",
        "splits": {"test": "validation"},
        "drop": ["*"],
    },
    "cvc14": {
        "visible": "*/Visible/{split}/FramesPos/*.tif",
        "lwir": "*/FIR/{split}/FramesPos/*.tif",
        "labels": "*/Visible/{split}/Annotations/*.txt",
        "splits": {"train": "Train", "test": "NewTest"},
        "form": "cvc14",
        "night": "Night/*",
    },
}
LWIR_PERCENTILES = (0.1, 99.9)  # of the LWIR values of the training set; they become 0 and 255
MAX_SAMPLED = 200  # frames from which the percentiles are computed
UNLABELLED_REMEDY = "label them, or use a list without them"
Files = Mapping[str, Mapping[str, Path]]  # modality -> id -> file, also of frames without the other modality
Labels = dict[str, tuple[Path, list[ObjectRow]]]  # id -> label file of a frame, and its objects


def open_pairs(data: str, root: Path | None, split: str, errors: Errors = None) -> PairSet:
    """Open one split of a set; this reads every image header and every label file.

    Args:
        data: the path of a description, or a name in `NAMED_SETS`; split: "train" or "test".
        root: the folder that the description's paths are relative to; None: the description's folder.
        errors: collects errors as in `kaist.labels`; frames with invalid images are then left out.
    """
    given, source, base = read_description(data, root, split)
    found = {modality: find_files(base, given[modality]) for modality in ("visible", "lwir")}
    ids = sorted(found["visible"].keys() & found["lwir"].keys())
    if not ids:
        a, b = (f"{next(iter(files))!r}" for files in found.values())
        problem = f"no visible image ({a}, …) has an LWIR partner ({b}, …)"
        raise InputError(problem, "put * where both file names of a pair have the same text", file=source)
    images = {i: {modality: files[i] for modality, files in found.items()} for i in ids}
    if "list" in given:
        ids = read_pair_list(resolve_file(base, given["list"]), found)
    elif unpaired := found["visible"].keys() ^ found["lwir"].keys():
        print(f"note: {len(unpaired)} of {len(ids) + len(unpaired)} frames lack a modality and are left out")
    sizes = {i: size for i in ids if (size := check_pair(i, images[i], errors))}
    if not given["labels"]:  # KAIST's annotations
        annotations = open_test_annotations(base, ids) if split == "test" else open_annotations(base)
        labels = {i: (Path(annotations.path(i)), annotations.read_rows(i)) for i in sizes}
    elif given["labels"].endswith(".json"):
        labels = read_coco_labels(base, given["labels"], sizes, found, errors)
    else:
        labels = read_label_files(base, given, sizes, errors)
    roles = {name: role for role in ROLES for name in given.get(role, ())}
    objects = {i: apply_roles(path, rows, roles, errors) for i, (path, rows) in labels.items()}
    files = {i: {**images[i], "labels": path} for i, (path, _) in labels.items()}
    return PairSet(source, tuple(sizes), files, sizes, objects, given.get("night", ""))


def read_description(data: str, root: Path | None, split: str) -> tuple[dict[str, Any], Path, Path]:
    """Read and check a description; return it for one split with defaults, its source, its base folder."""
    path, remedy = Path(data), "see docs/your-data.md"
    if data in NAMED_SETS and (root is None or not root.is_dir()):
        raise InputError(f"{data} needs its folder", "set it with --data-root", file=root)
    if data not in NAMED_SETS and not path.is_file():
        choices = f"choose a description, pairs.json, or one of {', '.join(NAMED_SETS)}"
        raise InputError("no such set of pairs", choices, file=path)
    given = NAMED_SETS.get(data) or load_json(read_text(path), path)
    if not isinstance(given, dict) or not {"visible", "lwir", "labels"} <= given.keys():
        raise InputError("a description needs visible, lwir and labels", remedy, file=path)
    for key, value in given.items():
        if key not in KEY_TYPES:
            near = difflib.get_close_matches(key, KEY_TYPES, 1) or [", ".join(KEY_TYPES)]
            raise InputError(f"{key!r} is not a key of a description", f"write {near[0]}", file=path)
        strings = value.values() if isinstance(value, dict) else value
        if not isinstance(value, KEY_TYPES[key]) or not all(isinstance(text, str) for text in strings):
            raise InputError(f"{key!r} is not {TYPE_NAMES[KEY_TYPES[key]]}", remedy, file=path)
    if given.get("form", LABEL_FORMS[0]) not in LABEL_FORMS:
        raise InputError(f"form {given['form']!r} is unknown", f"use {', '.join(LABEL_FORMS)}", file=path)
    names = [name for role in ROLES for name in dict.fromkeys(given.get(role, ()))]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{repeated[0]!r} is in two of {', '.join(ROLES)}", "keep it in one", file=path)
    defaults = {role: [x for x in defaults if x not in names] for role, defaults in DEFAULT_ROLES.items()}
    split = given.get("splits", {}).get(split, split)
    texts = {key: text.replace("{split}", split) for key, text in given.items() if isinstance(text, str)}
    return defaults | given | texts, root if data in NAMED_SETS else path, root or path.parent


def find_files(base: Path, pattern: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Map frame ids to the files in a folder and its subfolders, or to those of a pattern with *."""
    parts = (base / pattern).parts
    n_plain = next((i for i, part in enumerate(parts) if "*" in part), len(parts))
    head, below = Path(*parts[:n_plain]), "/".join(parts[n_plain:])
    if not head.is_dir():
        raise InputError("no such folder", "check the path, or quote a pattern: 'rgb/*.png'", file=head)
    names = re.compile("([^/]*)".join(map(re.escape, re.sub(r"\.(\*|\w+)$", "", below).split("*"))))
    found: dict[str, Path] = {}
    paths = head.glob(glob.escape(below).replace("[*]", "*") or "**/*")
    for path in sorted(p for p in paths if p.suffix in suffixes):
        stem = path.relative_to(head).with_suffix("").as_posix()
        groups = names.fullmatch(stem)
        frame_id = "/".join(groups.groups()) if groups else stem
        if frame_id in found:
            problem = f"this file and {found[frame_id]} have the same frame id, {frame_id}"
            raise InputError(problem, "remove or rename one of them", file=path)
        found[frame_id] = path
    if not found:
        raise InputError("no file matches", f"use files of {', '.join(suffixes)}", file=base / pattern)
    return found


def resolve_file(base: Path, pattern: str) -> Path:
    """Return the single file of a name or pattern."""
    found = sorted(base.glob(pattern)) if "*" in pattern else [base / pattern]
    if len(found) != 1 or not found[0].is_file():
        problem = f"{len(found)} files match" if len(found) > 1 else "no such file"
        raise InputError(problem, "give the file name in your own description", file=base / pattern)
    return found[0]


def match_names(names: Iterable[str], found: Files) -> dict[str, str]:
    """Map names in a list or a JSON to frame ids; names without a unique frame are left out.

    A name is a frame id, or the end of the path of either image, with or without the suffix."""
    stems = {}
    for name in names:
        path = PurePosixPath(name)
        stems[name] = (path.with_suffix("") if path.suffix in IMAGE_SUFFIXES else path).as_posix()
    ids: dict[str, set[str]] = {name: set() for name in (*stems, *stems.values())}
    for files in found.values():
        for frame_id, path in files.items():
            parts = Path(os.path.abspath(path)).with_suffix("").as_posix().split("/")
            for tail in accumulate(reversed(parts), "{1}/{0}".format):
                if tail in ids:
                    ids[tail].add(frame_id)
    ids |= {frame_id: {frame_id} for files in found.values() for frame_id in files}
    matches = {name: ids[name] or ids[stem] for name, stem in stems.items()}
    return {name: min(frame_ids) for name, frame_ids in matches.items() if len(frame_ids) == 1}


def read_pair_list(path: Path, found: Files) -> list[str]:
    """Read the frame ids of an image list; each frame needs both images and is listed once."""
    first: dict[str, int] = {}
    lines = line_numbers(path, any_id=True)
    frames = match_names(lines, found)
    for name, number in lines.items():
        frame_id = frames.get(name)
        if not all(frame_id in files for files in found.values()):
            problem = f"{name[:60]!r} is not a frame with both images"
            raise InputError(problem, "write its id or its image, or delete the line", file=path, line=number)
        if first.setdefault(frame_id, number) != number:
            problem = f"{name[:60]} is already in line {first[frame_id]}"
            raise InputError(problem, "list each frame once", file=path, line=number)
    return list(first)


def read_label_files(
    base: Path, given: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], errors: Errors
) -> Labels:
    """Read the label files of the frames in `sizes`; only in YOLO's format may a frame have no file."""
    files = find_files(base, given["labels"], (".xml", ".XML", ".txt"))
    forms = {i: given.get("form") or guess_form(files[i]) for i in sizes if i in files}
    missing = [i for i in sizes if i not in files]
    if missing and set(forms.values()) == {"yolo"}:
        print(f"note: {len(missing)} of {len(sizes)} frames have no label file, which means no objects")
    elif missing:
        problem = f"{len(missing)} frames have no label file, {missing[0]} first"
        report(InputError(problem, UNLABELLED_REMEDY, file=base / given["labels"]), errors)
    names = given.get("names", ())
    found = {i: (files[i], read_labels(files[i], form, sizes[i], names, errors)) for i, form in forms.items()}
    return {i: found.get(i, (base, [])) for i in sizes}


def read_coco_labels(base: Path, pattern: str, ids: Collection[str], found: Files, errors: Errors) -> Labels:
    """Read the objects of frames from a COCO JSON; a path that does not exist is matched by its file name."""
    path = resolve_file(base, pattern)
    content = read_json(path, errors, kaist=False)
    frames, names = match_names(content, found), {}
    foreign = [name for name in content if name not in frames and not (base / name).exists()]
    file_names = {name: PurePosixPath(name).name for name in foreign}
    by_file_name = match_names(file_names.values(), found) if file_names else {}
    frames |= {name: by_file_name[last] for name, last in file_names.items() if last in by_file_name}
    for name, frame_id in frames.items():
        if frame_id in ids and names.setdefault(frame_id, name) != name:
            problem = f"{names[frame_id]} and {name} are both frame {frame_id}"
            raise InputError(problem, "list each frame once", file=path)
    if missing := [i for i in ids if i not in names]:
        problem = f"{len(missing)} frames are not in this file, {missing[0]} first"
        remedy = f"write file_name relative to the description's folder, {UNLABELLED_REMEDY}"
        report(InputError(problem, remedy, file=path), errors)
    return {i: (path, content[names[i]] if i in names else []) for i in ids}


def apply_roles(
    path: Path, rows: Sequence[ObjectRow], roles: Mapping[str, str], errors: Errors
) -> list[ObjectRow]:
    """Drop or ignore objects by the role of their class, and label the others "person".

    path: the label file, for messages; roles: class -> one of `ROLES`."""
    kept = []
    for row in rows:
        role = roles.get(row.label, roles.get("*"))
        if role is None:
            line = None if path.suffix == ".json" else row.number or None
            problem = f"class {row.label[:40]!r} is not in the description"
            report(InputError(problem, "add it to person, ignore or drop", file=path, line=line), errors)
        elif role != "drop":
            kept.append(row._replace(label="person") if role == "person" else row._replace(ignore=True))
    return kept


def check_pair(frame_id: str, pair: Mapping[str, Path], errors: Errors) -> tuple[int, int] | None:
    """Return the width and height of both images of a pair; None if they or the id are invalid."""
    try:
        if printable(frame_id).strip().splitlines() != [frame_id]:  # not a line of a text file
            problem = f"its frame id, {frame_id!r}, cannot be written to a list of frames"
            raise InputError(problem, "rename the file", file=pair["visible"])
        visible, lwir = image_size(pair["visible"]), image_size(pair["lwir"], deep=True)
        if visible == lwir:
            return visible
        problem = "it is {}x{}, its visible image {}x{}".format(*lwir, *visible)
        raise InputError(problem, "register and scale both to one size", file=pair["lwir"])
    except InputError as error:
        report(error, errors)
        return None


def find_lwir_range(pairs: PairSet, errors: Errors = None) -> tuple[float, float]:
    """Choose the values that become 0 and 255 in LWIR images of more than 8 bits; (0, 0) if all have 8.

    These are the `LWIR_PERCENTILES` of up to `MAX_SAMPLED` frames, evenly spaced.
    Raises InputError if some LWIR images have 8 bits and others more.
    """
    images = []
    for frame_id in pairs.frames[:: math.ceil(len(pairs.frames) / MAX_SAMPLED) or 1]:
        try:
            images.append(load_deep_image(pairs.images[frame_id]["lwir"]))
        except InputError as error:
            report(error, errors)
    deep = [pixels[::4, ::4].ravel() for pixels in images if pixels is not None]
    if not deep:
        return 0.0, 0.0
    if len(deep) < len(images):
        problem = "LWIR has both 8-bit images and images with more bits"
        report(InputError(problem, "scale all alike", file=pairs.source), errors)
    low, high = np.percentile(np.concatenate(deep), LWIR_PERCENTILES)
    return float(low), float(max(high, low + 1))


def kaist_ids(pairs: PairSet, split: str) -> dict[str, str]:
    """Map frame ids to KAIST ids: unchanged if all are KAIST ids, else numbered by split and time of day."""
    if all(map(FRAME_ID.fullmatch, pairs.frames)):
        return {i: i for i in pairs.frames}
    ids, counts = {}, [0] * 12
    for frame_id in pairs.frames:
        is_night = pairs.time_of_day(frame_id) == "night"
        set_id = {"train": 0, "test": 6}[split] + 3 * is_night  # KAIST's night sets are 3 to 5 and 9 to 11
        video, number = divmod(counts[set_id], 10**5)
        ids[frame_id] = f"set{set_id:02d}/V{video:03d}/I{number:05d}"
        counts[set_id] += 1
    return ids
