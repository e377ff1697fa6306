"""Sets of visible and LWIR pairs other than KAIST, by one small description: see docs/your-data.md.

A description is a JSON file, `pairs.json`, or a name in `NAMED`. A frame's id is what the * of its
images' pattern stand for, or its path below their folder without the ending.
"""

from __future__ import annotations

import difflib
import glob
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from kaist.annotation_files import FRAME_ID, Errors, ObjectRow, Objects, make_objects, refuse
from kaist.annotations import SUFFIXES, list_lines, open_annotations, open_test_annotations
from kaist.files import InputError, load_json, read_text
from kaist.images import image_size, open_deep
from kaist.label_formats import FORMS, guess_label_form, read_coco, read_labels
from kaist.pairs import PairSet

SPLITS = ("train", "test")
TEXTS = ("visible", "lwir", "labels", "list", "form", "night")  # keys of a description, see docs/your-data.md
LISTS = ("names", "person", "ignore", "drop")
DEFAULTS = {"person": ["person"], "ignore": ["people", "cyclist", "person?", "person?a", "ignored"]}
NAMED: dict[str, dict[str, Any]] = {
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
PERCENTILES = (0.1, 99.9)  # of the training list's LWIR values, which become 0 and 255
SAMPLED = 200  # frames that these are taken of


def open_pairs(data: str, root: Path | None, split: str, errors: Errors = None) -> PairSet:
    """The frames of a set's split with their images, sizes and objects; every label and header is read.

    Args:
        data: a description's file, or a name in `NAMED`; root: where its paths begin (default: the
            description's folder); split: "train" or "test".
        errors: takes what is wrong with a frame's images and labels, as in `kaist.annotation_files`;
            a frame of two sizes is left out then.

    Raises:
        InputError: something is missing, malformed or contradicts itself.
    """
    given, source, base = describe(data, root)
    stands = given.get("splits", {}).get(split, split)
    paths = {
        key: given[key].replace("{split}", stands) for key in ("visible", "lwir", "list") if key in given
    }
    found = {modality: find_files(base, paths[modality], SUFFIXES) for modality in ("visible", "lwir")}
    ids = sorted(found["visible"].keys() & found["lwir"].keys())
    if not ids:
        a, b = (f"{next(iter(found[m]))!r}" for m in ("visible", "lwir"))
        problem = f"no visible image ({a}, …) has an LWIR partner ({b}, …)"
        raise InputError(problem, "let the * of both patterns stand for what a pair shares", file=source)
    images = {i: {modality: files[i] for modality, files in found.items()} for i in ids}
    if "list" in paths:
        ids = listed(one_file(base, paths["list"]), aliases(images, base))
    elif alone := found["visible"].keys() ^ found["lwir"].keys():
        print(f"note: {len(alone)} of {len(ids) + len(alone)} frames lack a modality and are left out")
    sizes = {i: size for i in ids if (size := pair_size(images[i], errors))}
    ids = list(sizes)
    labels, names = given["labels"].replace("{split}", stands), given.get("names", ())
    if not labels:
        opened = open_test_annotations(base, ids) if split == "test" else open_annotations(base)
        rows = {i: (Path(opened.path(i)), opened.read_rows(i)) for i in ids}
    elif labels.endswith(".json"):
        path = one_file(base, labels)
        rows = {i: (path, own) for i, own in coco_rows(path, ids, aliases(images, base)).items()}
    else:
        files = label_files(base, labels, ids, given.get("form", ""), errors)
        rows = {
            i: (f[0], read_labels(*f, sizes[i], names, errors)) if f else (base, []) for i, f in files.items()
        }
    roles = {name: role for role in ("drop", "ignore", "person") for name in given.get(role, ())}
    objects = {i: choose_objects(*rows[i], roles, errors) for i in ids}
    files = {i: {**images[i], "labels": rows[i][0]} for i in ids}
    return PairSet(source, tuple(ids), files, sizes, objects, given.get("night", ""))


def describe(data: str, root: Path | None) -> tuple[dict[str, Any], Path, Path]:
    """A description with its defaults, what it is called, and the folder where its paths begin.

    Raises:
        InputError: there is none, or it holds what no description has.
    """
    if data in NAMED:
        if root is None or not root.is_dir():
            raise InputError(f"{data} needs its folder", "name it by --data-root", file=root)
        return {**DEFAULTS, **NAMED[data]}, root, root
    path = Path(data)
    if not path.is_file():
        remedy = f"name a description, pairs.json, or one of {', '.join(NAMED)}"
        raise InputError("no such set of pairs", remedy, file=path)
    given = load_json(read_text(path), path)
    if not isinstance(given, dict) or not {"visible", "lwir", "labels"} <= given.keys():
        remedy = "see docs/your-data.md"
        raise InputError("a description has at least visible, lwir and labels", remedy, file=path)
    for key, value in given.items():
        if key not in (known := (*TEXTS, *LISTS, "splits")):
            near = difflib.get_close_matches(key, known, 1) or [", ".join(known)]
            raise InputError(f"{key!r} is nothing that a description has", f"write {near[0]}", file=path)
        kind = str if key in TEXTS else list if key in LISTS else dict
        words = value.values() if kind is dict and isinstance(value, dict) else value
        if not isinstance(value, kind) or not all(isinstance(word, str) for word in words):
            kind = {dict: "an object of texts", list: "a list of texts", str: "a text"}[kind]
            raise InputError(f"{key!r} is not {kind}", "see docs/your-data.md", file=path)
    if given.get("form", FORMS[0]) not in FORMS:
        raise InputError(f"form {given['form']!r} is unknown", f"use {', '.join(FORMS)}", file=path)
    return {**DEFAULTS, **given}, path, path.parent if root is None else root


# ------------------------------------------------------------------- files


def find_files(base: Path, pattern: str, endings: Sequence[str]) -> dict[str, Path]:
    """Id -> file, of a folder with all below it, or of a pattern of which each * is within a name.

    Raises:
        InputError: there is none, or one frame has two.
    """
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


def one_file(base: Path, pattern: str) -> Path:
    """The file that a name or pattern means."""
    found = sorted(base.glob(pattern)) if "*" in pattern else [base / pattern]
    if len(found) != 1 or not found[0].is_file():
        problem = f"{len(found)} files match" if len(found) > 1 else "no such file"
        raise InputError(problem, "name one in a description of your own", file=base / pattern)
    return found[0]


def aliases(images: Mapping[str, Mapping[str, Path]], base: Path) -> dict[str, str]:
    """What a frame may be called -> its id: the id, its images' paths and names, each without the
    ending; names that several frames share are left out."""
    shared: dict[str, set[str]] = {}
    for frame_id, files in images.items():
        for path in files.values():
            below = path.relative_to(base) if path.is_relative_to(base) else path
            for name in (frame_id, below.with_suffix("").as_posix(), path.stem):
                shared.setdefault(name, set()).add(frame_id)
    names = {name: next(iter(ids)) for name, ids in shared.items() if len(ids) == 1}
    return names | {frame_id: frame_id for frame_id in images}


def find_id(name: str, known: Mapping[str, str], exactly: bool = False) -> str | None:
    """The id of the frame that a list or a JSON calls by this name, or exactly so, folders and all."""
    path = PurePosixPath(name)
    forms = (name, (path.parent / path.stem).as_posix(), path.name, path.stem)[: 2 if exactly else None]
    return next((known[form] for form in forms if form in known), None)


def listed(path: Path, known: Mapping[str, str]) -> list[str]:
    """The ids of a list's frames.

    Raises:
        InputError: a frame without both images, one listed twice, or none at all.
    """
    first: dict[str, int] = {}
    for name, number in list_lines(path, any_id=True).items():
        frame_id = find_id(name, known)
        if frame_id is None:
            problem = f"{name[:60]!r} is no frame that has both images"
            remedy = "write an image's name or its pair's id, or leave it out"
            raise InputError(problem, remedy, file=path, line=number)
        if first.setdefault(frame_id, number) != number:
            problem = f"{name[:60]} stands in line {first[frame_id]} already"
            raise InputError(problem, "list each frame once", file=path, line=number)
    return list(first)


def label_files(
    base: Path, pattern: str, ids: Iterable[str], form: str, errors: Errors
) -> dict[str, tuple[Path, str] | None]:
    """Id -> label file and its form; None for a frame without one, in YOLO's form alone.

    Raises:
        InputError: a frame has no label file.
    """
    found = find_files(base, pattern, (".xml", ".XML", ".txt"))
    forms = {i: (found[i], form or guess_label_form(found[i])) if i in found else None for i in ids}
    missing = [i for i, file in forms.items() if file is None]
    if missing and {file[1] for file in forms.values() if file} != {"yolo"}:
        problem = f"{len(missing)} frames have no label file, {missing[0]} first"
        refuse(InputError(problem, "label them, or leave them out by a list", file=base / pattern), errors)
    elif missing:
        print(f"note: {len(missing)} of {len(forms)} frames have no label file: as YOLO has it, no objects")
    return forms


def coco_rows(path: Path, ids: Iterable[str], known: Mapping[str, str]) -> dict[str, list[ObjectRow]]:
    """Id -> objects of a COCO JSON, which may hold other frames too.

    Raises:
        InputError: a frame is not in it, or is there twice.
    """
    named: dict[str, str] = {}
    content = read_coco(path)
    for exactly in (True, False):  # so that of two splits in one file each has its own
        for name in content:
            frame_id = find_id(name, known, exactly)
            other = named.setdefault(frame_id, name) if frame_id else name
            if other != name and not exactly and find_id(other, known, True) != frame_id:
                problem = f"{other} and {name} may both be frame {frame_id}"
                raise InputError(problem, "write file_name from the description's folder on", file=path)
    rows = {frame_id: content[name] for frame_id, name in named.items()}
    if missing := [i for i in ids if i not in rows]:
        problem = f"{len(missing)} frames are not in it, {missing[0]} first"
        raise InputError(problem, "label them, or leave them out by a list", file=path)
    return rows


# ------------------------------------------------------------------- what is in them


def choose_objects(
    path: Path, rows: Sequence[ObjectRow], roles: Mapping[str, str], errors: Errors
) -> Objects:
    """The objects that are not dropped; those to learn are called "person", the others are ignored.

    Args:
        path: where they were read; roles: class -> "person", "ignore" or "drop".

    Raises:
        InputError: a class that the description does not speak of.
    """
    kept = []
    for row in rows:
        role = roles.get(row.label, roles.get("*"))
        if role is None:
            line = None if path.suffix == ".json" else row.number or None
            problem = f"class {row.label[:40]!r} is none that the description speaks of"
            refuse(InputError(problem, "add it to person, ignore or drop", file=path, line=line), errors)
        elif role != "drop":
            kept.append(row._replace(label="person") if role == "person" else row._replace(ignore=True))
    return make_objects(kept)


def pair_size(pair: Mapping[str, Path], errors: Errors) -> tuple[int, int] | None:
    """Width and height of a pair's images; None if they were refused.

    Raises:
        InputError: they differ, or an image cannot be read.
    """
    try:
        visible, lwir = image_size(pair["visible"]), image_size(pair["lwir"], deep=True)
        if visible == lwir:
            return visible
        problem = "it is {}x{}, its visible image {}x{}".format(*lwir, *visible)
        raise InputError(problem, "register and scale both to one size", file=pair["lwir"])
    except InputError as error:
        refuse(error, errors)
        return None


def find_lwir_range(pairs: PairSet) -> tuple[float, float]:
    """Which values of LWIR images of more than 8 bits become 0 and 255; (0, 0) where all have 8.

    The percentiles `PERCENTILES` of up to `SAMPLED` of the frames, which are those to train on.
    """
    step = math.ceil(len(pairs.frames) / SAMPLED)
    looks = [open_deep(pairs.images[frame_id]["lwir"]) for frame_id in pairs.frames[::step]]
    if all(pixels is None for pixels in looks):
        return 0.0, 0.0
    if not all(pixels is not None for pixels in looks):
        raise InputError("LWIR images of 8 bits and of more are mixed", "scale all alike", file=pairs.source)
    low, high = np.percentile(np.concatenate([pixels[::4, ::4].ravel() for pixels in looks]), PERCENTILES)
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
