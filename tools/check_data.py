"""Looks at every image and annotation of image lists, and reports all that is missing, broken or
suspicious.

    python -m tools.check_data ROOT
    python -m tools.check_data ROOT --list imageSets/train-all-02.txt
    python -m tools.check_data mine/pairs.json
    python -m tools.check_data llvip --data-root LLVIP

All that training would refuse is found, and what it would learn from without a word: copies,
black frames, swapped modalities, boxes outside of the frame. Ends with 0 if nothing was found,
with 1 if there are faults, with 2 if it cannot check at all.
"""

from __future__ import annotations

import csv
import signal
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path

from tqdm import tqdm

from engine.config import OneLineParser
from kaist.annotations import (
    FRAME_HEIGHT,
    FRAME_WIDTH,
    MODALITIES,
    PLACES,
    Annotations,
    PairSet,
    find_file,
    find_form,
    image_path,
    list_lines,
    open_annotations,
)
from kaist.files import InputError, run_script, write_atomically
from kaist.pair_sets import NAMED, SPLITS, find_lwir_range, open_pairs
from tools.faults import (
    COLOURED,
    FAULTS,
    GREY,
    Fault,
    ImageStats,
    check_file,
    check_image,
    check_json,
    implausible_objects,
    to_fault,
    unreadable,
)

MAX_SHOWN = 5  # faults of a kind in the table; the file has all


def main() -> int:
    """Check what the command line names; returns the exit code."""
    arguments = parse_arguments()
    root, out, modalities = arguments.root, arguments.out, MODALITIES[arguments.input_mode]
    if not out.parent.is_dir():
        raise InputError("no such folder", "name another, or make it first", file=out.parent)
    named = str(root) in NAMED and (arguments.data_root or not root.is_dir())
    if named or root.is_file():
        n_frames, faults = check_pairs(str(root), arguments.data_root, modalities)
        of, where, base = "", root, arguments.data_root or root.parent
    else:
        if not root.is_dir():
            raise InputError("no such folder", "name another, or make it first", file=root)
        lists = [find_file(root, name) for name in arguments.list or ()]
        lists = lists or sorted((root / "imageSets").glob("*.txt"))
        if not lists:
            raise InputError("no image lists here", "name some by --list", file=root / "imageSets")
        forms, jsons = find_annotations(root, arguments.annotations)
        frames: dict[str, tuple[Path, int]] = {}  # frame id -> the list and line that name it first
        faults = [fault for path in lists for fault in check_list(path, frames, bool(arguments.list))]
        faults += check_frames(root, frames, modalities, forms, jsons)
        sources = dict.fromkeys([*(form.form for form in forms), *(path.name for path in jsons)])
        n_frames, of, base = len(frames), f" of {len(lists)} list{'s' * (len(lists) != 1)}", root
        where = f"annotations {', '.join(sources)}"
    print(f"{n_frames} frames{of}, {' and '.join(modalities)}; {where}")
    if not faults:
        out.unlink(missing_ok=True)  # of an earlier check
        print("no fault found")
        return 0
    write_atomically(out, lambda path: write_faults(faults, path))
    print(f"{table(faults, base)}\nall of them: {out}")
    n_missing = sum(fault.name == "missing-visible" for fault in faults)
    if n_missing > n_frames / 3:
        print(f"{n_missing} of {n_frames} visible images are missing: --input-mode lwir needs none")
    return 1


def parse_arguments() -> Namespace:
    """The command line."""
    kinds = "\n".join(f"  {name:20} {text}" for name, (text, _) in FAULTS.items())
    parser = OneLineParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, epilog=f"faults:\n{kinds}"
    )
    add = parser.add_argument
    others = f"a set of pairs other than KAIST: its description, pairs.json, or {', '.join(NAMED)}"
    add("root", type=Path, metavar="ROOT", help=f"folder with images/, or {others}")
    add("--data-root", type=Path, metavar="FOLDER", help="where the paths of such a set begin")
    words = "an image list, below ROOT or any path; several should share no frame (default: all of "
    words += "imageSets, of which those to train and to test should share none)"
    add("--list", action="append", metavar="FILE", help=words)
    words = "what will be trained, which says whose images are needed (%(default)s)"
    add("--input-mode", choices=MODALITIES, default="early", help=words)
    words = "bbgt, xml, xml-sanitized, paired, json, a path, or all that ROOT holds"
    add("--annotations", default="all", help=words)
    add("--out", type=Path, default=Path("faults.csv"), help="all faults as CSV (%(default)s)")
    return parser.parse_args()


def find_annotations(root: Path, where: str) -> tuple[list[Annotations], list[Path]]:
    """The annotations to check: those with a file for each frame, and JSON files.

    Args:
        where: a form, a path, or "all" that the root holds.
    """
    if where not in ("all", *PLACES):
        named = find_file(root, where)
        return ([], [named]) if named.is_file() else ([open_annotations(named)], [])
    kinds = PLACES if where == "all" else [where]
    found = {kind: find_form(root, kind) for kind in kinds}
    if not any(found.values()):
        open_annotations(root, "auto" if where == "all" else where)  # says what it looked for
    jsons = found.pop("json", [])
    forms = [Annotations(path, kind, "lwir") for kind, paths in found.items() for path in paths]
    return forms, jsons


def check_pairs(data: str, root: Path | None, modalities: Sequence[str]) -> tuple[int, list[Fault]]:
    """How many frames a set of pairs other than KAIST has, and all their faults."""
    errors: list[InputError] = []
    sets = {split: open_pairs(data, root, split, errors) for split in SPLITS}
    faults, places, images, sizes = [], {}, {}, {}
    for split, pairs in sets.items():
        for frame_id in pairs.frames:
            name, files, size = f"{split} {frame_id}", pairs.images[frame_id], pairs.sizes[frame_id]
            places[name], images[name], sizes[name] = (pairs.source, 0), files, size
            faults += implausible_objects(pairs.objects[frame_id], files["labels"], size, kaist=False)
    shared = {files["visible"] for files in sets["train"].images.values()}
    shared &= {files["visible"] for files in sets["test"].images.values()}
    faults += [Fault("list-overlap", path, 0, "it is both to train and to test") for path in sorted(shared)]
    lwir_range = find_lwir_range(sets["train"], errors)
    every = replace(sets["train"], images=images, sizes=sizes, lwir_range=lwir_range)
    faults += check_frames(every, places, modalities, [], [])
    grey = [fault for fault in faults if fault.name == "grey-visible"]
    if grey and len(grey) == len(places):
        print("note: all visible images are grey")
        faults = [fault for fault in faults if fault not in grey]
    refused = [to_fault(error, error.file or Path(data)) for error in errors]
    return len(places), [*dict.fromkeys([*refused, *faults])]  # a broken image may be met twice


def check_list(path: Path, frames: dict[str, tuple[Path, int]], disjoint: bool) -> Iterator[Fault]:
    """Faults of an image list; its frames are added to `frames`.

    Args:
        disjoint: whether it may share no frame with any other list; else with those alone of which
            one is to train and the other to test, by their names.

    Raises:
        InputError: it is not there or is no text.
    """
    errors: list[InputError] = []
    for frame_id, line in list_lines(path, errors).items():
        other, other_line = frames.setdefault(frame_id, (path, line))
        if other != path and (disjoint or ("test" in path.stem) != ("test" in other.stem)):
            yield Fault("list-overlap", path, line, f"{frame_id} is in {other}:{other_line} too")
    yield from (to_fault(error, path) for error in errors)


def check_frames(
    root: Path | PairSet,
    frames: dict[str, tuple[Path, int]],
    modalities: Sequence[str],
    forms: list[Annotations],
    jsons: list[Path],
) -> list[Fault]:
    """All faults of frames, of which the list and line are known that name each, and of JSON files."""
    checked = [check_json(path) for path in jsons]
    faults = [fault for found, _ in checked for fault in found]
    first: dict[bytes, Path] = {}
    annotated: dict[Path, dict[str, list[bool]]] = defaultdict(dict)
    ignore_sigint = (signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    with ProcessPoolExecutor(initializer=signal.signal, initargs=ignore_sigint) as pool:
        roots = (root.take(frame_id) if isinstance(root, PairSet) else root for frame_id in frames)
        reports = pool.map(check_frame, roots, repeat(modalities), repeat(forms), frames, chunksize=8)
        bar = tqdm(reports, "checking", len(frames), unit="frame", leave=False)
        for (frame_id, place), (found, digests, row) in zip(frames.items(), bar, strict=True):
            row += [frame_id in json_frames for _, json_frames in checked]
            if not any(row) and not digests and all(f.name.startswith("missing-") for f in found):
                faults.append(Fault("unknown-frame", *place, f"{frame_id} has no file at all"))
                continue
            annotated[place[0]][frame_id] = row
            faults += found
            for digest, path in digests.items():
                other = first.setdefault(digest, path)
                if other != path:
                    problem = f"the same picture as {other}".replace(f"{root}/" * isinstance(root, Path), "")
                    faults.append(Fault("copied-image", path, 0, problem))
    for rows in annotated.values() if forms or jsons else ():
        faults += missing_annotations(rows, forms, jsons)
    return faults


def missing_annotations(
    rows: dict[str, list[bool]], forms: list[Annotations], jsons: list[Path]
) -> Iterator[Fault]:
    """Frames of one list that an annotation lacks which holds others of that list; if none holds
    any, the first is the one that lacks them. rows: frame id -> whether each source holds it."""
    in_use = [any(column) for column in zip(*rows.values(), strict=True)]
    in_use[0] |= not any(in_use)
    for frame_id, row in rows.items():
        for i in (i for i, there in enumerate(row) if in_use[i] and not there):
            path = Path(forms[i].path(frame_id)) if i < len(forms) else jsons[i - len(forms)]
            yield Fault("missing-annotation", path, 0, f"{frame_id} is not annotated")


# ------------------------------------------------------------------------------ one frame


def check_frame(
    root: Path | PairSet, modalities: Sequence[str], forms: Sequence[Annotations], frame_id: str
) -> tuple[list[Fault], dict[bytes, Path], list[bool]]:
    """The faults of one frame that its own files tell; digest -> file of its sound images; whether
    each of the annotations holds it."""
    paths = {modality: image_path(root, frame_id, modality) for modality in modalities}
    is_kaist = not isinstance(root, PairSet)
    size = (FRAME_WIDTH, FRAME_HEIGHT) if is_kaist else root.sizes[frame_id]
    deep = (0, 0) if is_kaist else root.lwir_range
    seen = {modality: check_image(path, modality, size, deep) for modality, path in paths.items()}
    faults = [result for result in seen.values() if isinstance(result, Fault)]
    images = {modality: stats for modality, stats in seen.items() if isinstance(stats, ImageStats)}
    faults += compare_modalities(images, paths)
    annotations = [check_annotation(form, frame_id) for form in forms]
    faults += [fault for found, _ in annotations for fault in found]
    digests = {stats.digest: paths[modality] for modality, stats in images.items()}
    return faults, digests, [there for _, there in annotations]


def compare_modalities(images: dict[str, ImageStats], paths: dict[str, Path]) -> Iterator[Fault]:
    """Images that look as if they were of the other modality."""
    grey = "visible" in images and images["visible"].colour < GREY
    coloured = "lwir" in images and images["lwir"].colour > COLOURED
    if len({stats.digest for stats in images.values()}) < len(images):
        yield Fault("same-image", paths["lwir"], 0, "the same picture as the visible image")
    elif grey and coloured:
        yield Fault("swapped-modalities", paths["lwir"], 0, "it has colours, the visible has none")
    elif grey:
        yield Fault("grey-visible", paths["visible"], 0, "it has no colours")
    elif coloured:
        yield Fault("coloured-lwir", paths["lwir"], 0, "it has colours")


def check_annotation(form: Annotations, frame_id: str) -> tuple[list[Fault], bool]:
    """Faults of a frame's annotation, and whether it is there; its absence is no fault yet."""
    modalities = ("visible", "lwir") if form.form == "paired" else (form.modality,)
    paths = [Path(Annotations(form.source, form.form, m).path(frame_id)) for m in modalities]
    faults, labels = [], []
    for path in paths:
        if fault := unreadable(path, "missing-annotation"):
            faults.append(fault)
        else:
            found, rows = check_file(path, form.form, frame_id)
            faults += found
            labels.append([row.label for row in rows])
    if not labels and {fault.name for fault in faults} == {"missing-annotation"}:
        return [], False
    if not faults and labels[0] != labels[-1]:
        problem = f"{labels[0]} in the visible file, {labels[1]} here"
        faults.append(Fault("unpaired-objects", paths[1], 0, problem))
    return faults, True


# ------------------------------------------------------------------------------ the report


def table(faults: list[Fault], root: Path) -> str:
    """Faults by name, the first few of each with their places."""
    rows = []
    for name in FAULTS:
        found = [fault for fault in faults if fault.name == name]
        places = [f"{f.file}:{f.line}".removesuffix(":0").removeprefix(f"{root}/") for f in found]
        rows += [(name, x, f.problem) for x, f in zip(places[:MAX_SHOWN], found, strict=False)]
        rows += [(name, f"… and {len(found) - MAX_SHOWN} more", "")] * (len(found) > MAX_SHOWN)
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([*lines, f"faults: {len(faults)}, kinds: {len({fault.name for fault in faults})}"])


def write_faults(faults: list[Fault], path: Path) -> None:
    """The faults as CSV: fault, file, line (0: the whole file), problem."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("fault", "file", "line", "problem"), *faults])


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
