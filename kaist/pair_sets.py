"""Sets of visible and LWIR pairs other than KAIST, by one small description: see docs/your-data.md.

A description is a JSON file, `pairs.json`, or a name in `NAMED_SETS`. A frame's id is what the * of its
images' pattern stand for, or its path below their folder without the ending. What is missing, malformed or
contradicts itself is refused by an InputError that names it and its line.
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
LABEL_FORMS = ("xml", "kaist-text", "yolo", "cvc14")  # of label files for one frame each
# What a description may have, see docs/your-data.md, and of which kind it is.
KEY_TYPES = {
    **dict.fromkeys(("visible", "lwir", "labels", "list", "form", "night"), str),
    **dict.fromkeys(("names", *ROLES), list),
    "splits": dict,
}
TYPE_NAMES = {str: "a text", list: "a list of texts", dict: "an object of texts"}
DEFAULT_ROLES = {"person": ["person"], "ignore": [*KAIST_LABELS[1:], "ignored"]}
NAMED_SETS: dict[str, dict[str, Any]] = {
    "kaist": {
        "visible": "images/*/*/visible/*",
        "lwir": "images/*/*/lwir/*",
        "labels": "",  # whichever of KAIST's forms is there
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
LWIR_PERCENTILES = (0.1, 99.9)  # of the training list's LWIR values, which become 0 and 255
UNLABELLED_REMEDY = "label them, or leave them out by a list"
MAX_SAMPLED = 200  # frames that these are taken of
Files = Mapping[str, Mapping[str, Path]]  # modality -> id -> file, of frames that lack the other one too
Labels = dict[str, tuple[Path, list[ObjectRow]]]  # id -> where a frame's objects were read, and they


def open_pairs(data: str, root: Path | None, split: str, errors: Errors = None) -> PairSet:
    """The frames of a set's split with their images, sizes and objects; every label and header is read.

    Args:
        data: a description's file, or a name in `NAMED_SETS`; root: where its paths begin (default: the
            description's folder); split: "train" or "test".
        errors: takes what is wrong with a frame's images and labels, as in `kaist.labels`; a frame of
            two sizes is left out then.
    """
    given, source, base = read_description(data, root, split)
    found = {modality: find_files(base, given[modality]) for modality in ("visible", "lwir")}
    ids = sorted(found["visible"].keys() & found["lwir"].keys())
    if not ids:
        a, b = (f"{next(iter(files))!r}" for files in found.values())
        problem = f"no visible image ({a}, …) has an LWIR partner ({b}, …)"
        raise InputError(problem, "let the * of both patterns stand for what a pair shares", file=source)
    images = {i: {modality: files[i] for modality, files in found.items()} for i in ids}
    if "list" in given:
        ids = read_pair_list(resolve_file(base, given["list"]), found)
    elif alone := found["visible"].keys() ^ found["lwir"].keys():
        print(f"note: {len(alone)} of {len(ids) + len(alone)} frames lack a modality and are left out")
    sizes = {i: size for i in ids if (size := check_pair(i, images[i], errors))}
    if not given["labels"]:  # whichever of KAIST's forms is there
        opened = open_test_annotations(base, ids) if split == "test" else open_annotations(base)
        labels = {i: (Path(opened.path(i)), opened.read_rows(i)) for i in sizes}
    elif given["labels"].endswith(".json"):
        labels = read_coco_labels(base, given["labels"], sizes, found, errors)
    else:
        labels = read_label_files(base, given, sizes, errors)
    roles = {word: role for role in ROLES for word in given.get(role, ())}
    objects = {i: apply_roles(*own, roles, errors) for i, own in labels.items()}
    files = {i: {**images[i], "labels": path} for i, (path, _) in labels.items()}
    return PairSet(source, tuple(sizes), files, sizes, objects, given.get("night", ""))


def read_description(data: str, root: Path | None, split: str) -> tuple[dict[str, Any], Path, Path]:
    """A description of a split, with its defaults; what it is called; the folder where its paths begin."""
    path, remedy = Path(data), "see docs/your-data.md"
    if data in NAMED_SETS and (root is None or not root.is_dir()):
        raise InputError(f"{data} needs its folder", "name it by --data-root", file=root)
    if data not in NAMED_SETS and not path.is_file():
        known = f"name a description, pairs.json, or one of {', '.join(NAMED_SETS)}"
        raise InputError("no such set of pairs", known, file=path)
    given = NAMED_SETS.get(data) or load_json(read_text(path), path)
    if not isinstance(given, dict) or not {"visible", "lwir", "labels"} <= given.keys():
        raise InputError("a description has at least visible, lwir and labels", remedy, file=path)
    for key, value in given.items():
        if key not in KEY_TYPES:
            near = difflib.get_close_matches(key, KEY_TYPES, 1) or [", ".join(KEY_TYPES)]
            raise InputError(f"{key!r} is nothing that a description has", f"write {near[0]}", file=path)
        words = value.values() if isinstance(value, dict) else value
        if not isinstance(value, KEY_TYPES[key]) or not all(isinstance(word, str) for word in words):
            raise InputError(f"{key!r} is not {TYPE_NAMES[KEY_TYPES[key]]}", remedy, file=path)
    if given.get("form", LABEL_FORMS[0]) not in LABEL_FORMS:
        raise InputError(f"form {given['form']!r} is unknown", f"use {', '.join(LABEL_FORMS)}", file=path)
    own = [word for role in ROLES for word in dict.fromkeys(given.get(role, ()))]
    if twice := [word for word in own if own.count(word) > 1]:
        raise InputError(f"{twice[0]!r} stands in two of {', '.join(ROLES)}", "leave it in one", file=path)
    defaults = {role: [word for word in words if word not in own] for role, words in DEFAULT_ROLES.items()}
    stands = given.get("splits", {}).get(split, split)
    texts = {key: text.replace("{split}", stands) for key, text in given.items() if isinstance(text, str)}
    return defaults | given | texts, root if data in NAMED_SETS else path, root or path.parent


def find_files(base: Path, pattern: str, endings: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Id -> file, of a folder with all below it, or of a pattern of which each * is within a name."""
    parts = (base / pattern).parts
    n_plain = next((i for i, part in enumerate(parts) if "*" in part), len(parts))
    head, below = Path(*parts[:n_plain]), "/".join(parts[n_plain:])
    if not head.is_dir():
        raise InputError("no such folder", "name one, or quote a pattern, such as 'rgb/*.png'", file=head)
    names = re.compile("([^/]*)".join(map(re.escape, re.sub(r"\.(\*|\w+)$", "", below).split("*"))))
    found: dict[str, Path] = {}
    paths = head.glob(glob.escape(below).replace("[*]", "*") or "**/*")
    for path in sorted(p for p in paths if p.suffix in endings):
        stem = path.relative_to(head).with_suffix("").as_posix()
        groups = names.fullmatch(stem)
        frame_id = "/".join(groups.groups()) if groups else stem
        if frame_id in found:
            problem = f"it and {found[frame_id]} are of one frame, {frame_id}"
            raise InputError(problem, "move one of them away", file=path)
        found[frame_id] = path
    if not found:
        raise InputError("no file matches", f"it may end in {', '.join(endings)}", file=base / pattern)
    return found


def resolve_file(base: Path, pattern: str) -> Path:
    """The file that a name or pattern means."""
    found = sorted(base.glob(pattern)) if "*" in pattern else [base / pattern]
    if len(found) != 1 or not found[0].is_file():
        problem = f"{len(found)} files match" if len(found) > 1 else "no such file"
        raise InputError(problem, "name one in a description of your own", file=base / pattern)
    return found[0]


def match_names(names: Iterable[str], found: Files) -> dict[str, str]:
    """Name -> the frame that a list or a JSON means by it, of names that mean one frame: by its id, or by
    the path of either image from any folder on, with or without the ending."""
    forms = {}
    for name in names:
        path = PurePosixPath(name)
        forms[name] = name, (path.with_suffix("") if path.suffix in IMAGE_SUFFIXES else path).as_posix()
    meant: dict[str, set[str]] = {form: set() for own in forms.values() for form in own}
    for files in found.values():
        for frame_id, path in files.items():
            parts = Path(os.path.abspath(path)).with_suffix("").as_posix().split("/")
            for tail in accumulate(reversed(parts), "{1}/{0}".format):
                if tail in meant:
                    meant[tail].add(frame_id)
    meant |= {frame_id: {frame_id} for files in found.values() for frame_id in files}
    frames = {name: meant[name] or meant[plain] for name, plain in forms.values()}
    return {name: min(ids) for name, ids in frames.items() if len(ids) == 1}


def read_pair_list(path: Path, found: Files) -> list[str]:
    """The ids of a list's frames; each has both images and is listed once."""
    first: dict[str, int] = {}
    lines = line_numbers(path, any_id=True)
    frames = match_names(lines, found)
    for name, number in lines.items():
        frame_id = frames.get(name)
        if not all(frame_id in files for files in found.values()):
            problem = f"{name[:60]!r} is no frame that has both images"
            raise InputError(problem, "write an id or an image, or leave it out", file=path, line=number)
        if first.setdefault(frame_id, number) != number:
            problem = f"{name[:60]} is already in line {first[frame_id]}"
            raise InputError(problem, "list each frame once", file=path, line=number)
    return list(first)


def read_label_files(
    base: Path, given: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], errors: Errors
) -> Labels:
    """The objects of frames of these ids and sizes, of a label file each; in YOLO's form alone a frame may
    have none."""
    files = find_files(base, given["labels"], (".xml", ".XML", ".txt"))
    forms = {i: given.get("form") or guess_form(files[i]) for i in sizes if i in files}
    missing = [i for i in sizes if i not in files]
    if missing and set(forms.values()) == {"yolo"}:
        print(f"note: {len(missing)} of {len(sizes)} frames have no label file: as YOLO has it, no objects")
    elif missing:
        problem = f"{len(missing)} frames have no label file, {missing[0]} first"
        report(InputError(problem, UNLABELLED_REMEDY, file=base / given["labels"]), errors)
    names = given.get("names", ())
    found = {i: (files[i], read_labels(files[i], form, sizes[i], names, errors)) for i, form in forms.items()}
    return {i: found.get(i, (base, [])) for i in sizes}


def read_coco_labels(base: Path, pattern: str, ids: Collection[str], found: Files, errors: Errors) -> Labels:
    """The objects of frames in a COCO JSON, each once; it may hold other frames too. Names of folders that
    are not here, as of another machine, go by their last part."""
    path = resolve_file(base, pattern)
    content = read_json(path, errors, kaist=False)
    frames, names = match_names(content, found), {}
    foreign = [name for name in content if name not in frames and not (base / name).exists()]
    last = {name: PurePosixPath(name).name for name in foreign}
    of_last = match_names(last.values(), found) if last else {}
    frames |= {name: of_last[own] for name, own in last.items() if own in of_last}
    for name, frame_id in frames.items():
        if frame_id in ids and names.setdefault(frame_id, name) != name:
            problem = f"{names[frame_id]} and {name} are both frame {frame_id}"
            raise InputError(problem, "name each frame once", file=path)
    if missing := [i for i in ids if i not in names]:
        problem = f"{len(missing)} frames are not in it, {missing[0]} first"
        remedy = f"write file_name from the description's folder on, {UNLABELLED_REMEDY}"
        report(InputError(problem, remedy, file=path), errors)
    return {i: (path, content[names[i]] if i in names else []) for i in ids}


def apply_roles(
    path: Path, rows: Sequence[ObjectRow], roles: Mapping[str, str], errors: Errors
) -> list[ObjectRow]:
    """The objects that are not dropped; those to learn are called "person", the others are ignored.
    path: where they were read; roles: class -> one of `ROLES`."""
    kept = []
    for row in rows:
        role = roles.get(row.label, roles.get("*"))
        if role is None:
            line = None if path.suffix == ".json" else row.number or None
            problem = f"class {row.label[:40]!r} is none that the description speaks of"
            report(InputError(problem, "add it to person, ignore or drop", file=path, line=line), errors)
        elif role != "drop":
            kept.append(row._replace(label="person") if role == "person" else row._replace(ignore=True))
    return kept


def check_pair(frame_id: str, pair: Mapping[str, Path], errors: Errors) -> tuple[int, int] | None:
    """Width and height of a pair's images, which have to agree; None if they or its id were refused."""
    try:
        if printable(frame_id).strip().splitlines() != [frame_id]:  # as a result's companion has it
            problem = f"its frame's id, {frame_id!r}, cannot stand in a list of frames"
            raise InputError(problem, "rename it", file=pair["visible"])
        visible, lwir = image_size(pair["visible"]), image_size(pair["lwir"], deep=True)
        if visible == lwir:
            return visible
        problem = "it is {}x{}, its visible image {}x{}".format(*lwir, *visible)
        raise InputError(problem, "register and scale both to one size", file=pair["lwir"])
    except InputError as error:
        report(error, errors)
        return None


def find_lwir_range(pairs: PairSet, errors: Errors = None) -> tuple[float, float]:
    """Which values of LWIR images of more than 8 bits become 0 and 255; (0, 0) where all have 8.

    The `LWIR_PERCENTILES` of up to `MAX_SAMPLED` of the frames, which are those to train on. Some of 8
    bits and others of more are refused.
    """
    looks = []
    for frame_id in pairs.frames[:: math.ceil(len(pairs.frames) / MAX_SAMPLED) or 1]:
        try:
            looks.append(load_deep_image(pairs.images[frame_id]["lwir"]))
        except InputError as error:
            report(error, errors)
    deep = [pixels[::4, ::4].ravel() for pixels in looks if pixels is not None]
    if not deep:
        return 0.0, 0.0
    if len(deep) < len(looks):
        problem = "LWIR has both 8-bit images and images with more bits"
        report(InputError(problem, "scale all alike", file=pairs.source), errors)
    low, high = np.percentile(np.concatenate(deep), LWIR_PERCENTILES)
    return float(low), float(max(high, low + 1))


def kaist_ids(pairs: PairSet, split: str) -> dict[str, str]:
    """Id -> KAIST's form of it: its own, or counted along a set of its split and time of day."""
    if all(map(FRAME_ID.fullmatch, pairs.frames)):
        return {i: i for i in pairs.frames}
    sets = {("train", "day"): 0, ("train", "night"): 3, ("test", "day"): 6, ("test", "night"): 9}
    numbers = dict.fromkeys(sets.values(), 0)
    named = {}
    for frame_id in pairs.frames:
        own = sets[split, pairs.time_of_day(frame_id) or "day"]
        named[frame_id] = f"set{own:02d}/V{numbers[own] // 10**5:03d}/I{numbers[own] % 10**5:05d}"
        numbers[own] += 1
    return named
