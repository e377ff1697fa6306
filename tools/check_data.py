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

import csv
import io
import signal
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product, repeat
from pathlib import Path

from tqdm import tqdm

from kaist.annotations import (
    FORM_PATHS,
    MODALITIES,
    Annotations,
    PairSet,
    find_form_paths,
    image_path,
    line_numbers,
    open_annotations,
    resolve_path,
)
from kaist.files import InputError, OneLineParser, check_folders, out_path, read_text, run_script, write_text
from kaist.pair_sets import NAMED_SETS, SPLITS, find_lwir_range, open_pairs
from tools.faults import FAULTS, Fault, check_file, check_images, check_json, implausible_objects, to_fault

MAX_SHOWN = 5  # faults of a kind in the table; the file has all


def main() -> int:
    """Check what the command line names; returns the exit code."""
    arguments = parse_arguments()
    root, out, modalities = arguments.root, arguments.out, MODALITIES[arguments.input_mode]
    check_folders(out)
    named = str(root) in NAMED_SETS and (arguments.data_root or not root.is_dir())
    if named or root.is_file():
        n_frames, faults = check_pairs(str(root), arguments.data_root, modalities)
        of, where, base = "", root, arguments.data_root or root.parent
    else:
        if not root.is_dir():
            raise InputError("no such folder", "name another, or make it first", file=root)
        lists = [resolve_path(root, name) for name in arguments.list or ()]
        lists = lists or sorted((root / "imageSets").glob("*.txt"))
        if not lists:
            raise InputError("no image lists here", "name some by --list", file=root / "imageSets")
        forms, jsons = find_annotations(root, arguments.annotations)
        frames: dict[str, tuple[Path, int]] = {}  # frame id -> the list and line that name it first
        faults = [fault for path in lists for fault in check_list(path, frames, bool(arguments.list))]
        faults += check_frames(root, frames, modalities, {}, forms, jsons)
        sources = dict.fromkeys([*(form.form for form in forms), *(path.name for path in jsons)])
        n_frames, of, base = len(frames), f" of {len(lists)} list{'s' * (len(lists) != 1)}", root
        where = f"annotations {', '.join(sources)}"
    print(f"{n_frames} frames{of}, {' and '.join(modalities)}; {where}")
    if not faults:
        if out.is_file() and read_text(out).startswith("fault,file,line,problem"):
            out.unlink()  # of an earlier check
        print("no fault found")
        return 0
    rows = io.StringIO()
    csv.writer(rows).writerows([("fault", "file", "line", "problem"), *faults])  # line 0: the whole file
    write_text(out, rows.getvalue())
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
    others = f"a set of pairs other than KAIST: its description, pairs.json, or {', '.join(NAMED_SETS)}"
    add("root", type=Path, metavar="ROOT", help=f"folder with images/, or {others}")
    add("--data-root", type=Path, metavar="FOLDER", help="where the paths of such a set begin")
    words = "an image list, below ROOT or any path; several should share no frame (default: all of "
    words += "imageSets, of which those to train and to test should share none)"
    add("--list", action="append", metavar="FILE", help=words)
    words = "what will be trained, which says whose images are needed (%(default)s)"
    add("--input-mode", choices=MODALITIES, default="early", help=words)
    words = "bbgt, xml, xml-sanitized, paired, json, a path, or all that ROOT holds"
    add("--annotations", default="all", help=words)
    add("--out", type=out_path(), default=Path("faults.csv"), help="all faults as CSV (%(default)s)")
    return parser.parse_args()


def find_annotations(root: Path, where: str) -> tuple[list[Annotations], list[Path]]:
    """The annotations to check: those with a file for each frame, and JSON files.

    Args:
        where: a form, a path, or "all" that the root holds.
    """
    if where not in ("all", *FORM_PATHS):
        named = resolve_path(root, where)
        return ([], [named]) if named.is_file() else ([open_annotations(named)], [])
    kinds = FORM_PATHS if where == "all" else [where]
    found = [(kind, path) for kind in kinds for path in find_form_paths(root, kind)]
    if not found:
        open_annotations(root, "auto" if where == "all" else where)  # says what it looked for
    forms = [Annotations(path, kind, "lwir") for kind, path in found if kind != "json"]
    return forms, [path for kind, path in found if kind == "json"]


def check_pairs(data: str, root: Path | None, modalities: Sequence[str]) -> tuple[int, list[Fault]]:
    """How many frames a set of pairs other than KAIST has, and all their faults."""
    errors: list[InputError] = []
    sets = {split: open_pairs(data, root, split, errors) for split in SPLITS}
    lwir_range = find_lwir_range(sets["train"], errors)
    faults, pictures = [], {}
    for pairs in sets.values():
        for frame_id, rows in pairs.objects.items():
            path, size = pairs.images[frame_id]["labels"], pairs.sizes[frame_id]
            faults += implausible_objects(rows, path, size, kaist=False)
        places = dict.fromkeys(pairs.frames, (pairs.source, 0))
        faults += check_frames(replace(pairs, lwir_range=lwir_range), places, modalities, pictures)
    train, test = ({files["visible"] for files in pairs.images.values()} for pairs in sets.values())
    words = "it is both to train and to test"
    faults += [Fault("list-overlap", path, 0, words) for path in sorted(train & test)]
    n_frames, grey = len(train) + len(test), [fault for fault in faults if fault.name == "grey-visible"]
    if grey and len(grey) == n_frames:
        print("note: all visible images are grey")
        faults = [fault for fault in faults if fault not in grey]
    return n_frames, [*dict.fromkeys([*map(to_fault, errors), *faults])]  # a broken image may be met twice


def check_list(path: Path, frames: dict[str, tuple[Path, int]], disjoint: bool) -> Iterator[Fault]:
    """Faults of an image list; its frames are added to `frames`.

    Args:
        disjoint: whether it may share no frame with any other list; else with those alone of which
            one is to train and the other to test, by their names.

    Raises:
        InputError: it is not there or is no text.
    """
    errors: list[InputError] = []
    for frame_id, line in line_numbers(path, errors).items():
        other, other_line = frames.setdefault(frame_id, (path, line))
        if other != path and (disjoint or ("test" in path.stem) != ("test" in other.stem)):
            yield Fault("list-overlap", path, line, f"{frame_id} is in {other}:{other_line} too")
    yield from map(to_fault, errors)


def check_frames(
    root: Path | PairSet,
    frames: dict[str, tuple[Path, int]],
    modalities: Sequence[str],
    pictures: dict[bytes, Path],
    forms: Sequence[Annotations] = (),
    jsons: Sequence[Path] = (),
) -> Iterator[Fault]:
    """All faults of frames, of which the list and line are known that name each, and of JSON files.

    pictures: digest -> file of the images seen so far.
    """
    annotated: dict[Annotations | Path, set[str]] = {form: set() for form in forms}  # by whom, which frames
    for path in jsons:
        faults, annotated[path] = check_json(path)
        yield from faults
    by_list: dict[Path, list[str]] = defaultdict(list)
    ignore_sigint = (signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    with ProcessPoolExecutor(initializer=signal.signal, initargs=ignore_sigint) as pool:
        roots = (root.take(frame_id) if isinstance(root, PairSet) else root for frame_id in frames)
        reports = pool.map(check_frame, roots, repeat(modalities), repeat(forms), frames, chunksize=8)
        bar = tqdm(reports, "checking", len(frames), unit="frame", leave=False)
        for (frame_id, place), (faults, digests, sources) in zip(frames.items(), bar, strict=True):
            for i in sources:
                annotated[forms[i]].add(frame_id)
            is_known = any(frame_id in own for own in annotated.values())
            if not is_known and [fault.name for fault in faults] == [f"missing-{m}" for m in modalities]:
                yield Fault("unknown-frame", *place, f"{frame_id} has no file at all")
                continue
            by_list[place[0]].append(frame_id)
            yield from faults
            for digest, path in digests.items():
                other = pictures.setdefault(digest, path)
                if other != path:
                    problem = f"the same picture as {other}".replace(f"{root}/" * isinstance(root, Path), "")
                    yield Fault("copied-image", path, 0, problem)
    # Of a list those are missing that an annotation lacks which holds others of that list; if none holds
    # any, the first annotation is the one that lacks them.
    for ids in by_list.values():
        in_use = [source for source, own in annotated.items() if not own.isdisjoint(ids)]
        for source, frame_id in product(in_use or [*annotated][:1], ids):
            if frame_id not in annotated[source]:
                path = source if isinstance(source, Path) else Path(source.path(frame_id))
                yield Fault("missing-annotation", path, 0, f"{frame_id} is not annotated")


def check_frame(
    root: Path | PairSet, modalities: Sequence[str], forms: Sequence[Annotations], frame_id: str
) -> tuple[list[Fault], dict[bytes, Path], list[int]]:
    """The faults of one frame that its own files tell; digest -> file of its sound images; places of the
    annotations that hold it."""
    paths = {modality: image_path(root, frame_id, modality) for modality in modalities}
    how = (root.sizes[frame_id], root.lwir_range) if isinstance(root, PairSet) else ()
    faults, digests = check_images(paths, *how)
    sources = []
    for i, form in enumerate(forms):
        found = check_annotation(form, frame_id)
        if found is not None:
            faults += found
            sources.append(i)
    return faults, digests, sources


def check_annotation(form: Annotations, frame_id: str) -> list[Fault] | None:
    """Faults of a frame's annotation; None if it is not there, which is no fault yet."""
    modalities = ("visible", "lwir") if form.form == "paired" else (form.modality,)
    paths = [Path(Annotations(form.source, form.form, m).path(frame_id)) for m in modalities]
    found = [check_file(path, form.form, frame_id) for path in paths]
    faults = [fault for own, _ in found for fault in own]
    if [fault.name for fault in faults] == ["missing-annotation"] * len(paths):
        return None
    labels = [[row.label for row in rows] for _, rows in found]
    if not faults and labels[0] != labels[-1]:
        problem = f"{labels[0]} in the visible file, {labels[1]} here"
        faults.append(Fault("unpaired-objects", paths[1], 0, problem))
    return faults


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


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
