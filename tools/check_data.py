"""Looks at every image and annotation of image lists, and reports all that is missing, broken or
suspicious.

    python -m tools.check_data ROOT --list imageSets/train-all-02.txt

All that training would refuse is found, and what it would learn from without a word: copies,
black frames, swapped modalities, boxes outside of the frame. Ends with 0 if nothing was found,
with 1 if there are faults, with 2 if it cannot check at all.
"""

from __future__ import annotations

import csv
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from engine.config import OneLineParser
from kaist.annotations import (
    FOLDERS,
    FRAME_ID,
    JSON_NAME,
    MODALITIES,
    Annotations,
    find_file,
    has_annotations,
    image_path,
    open_annotations,
    read_image_list,
)
from kaist.files import InputError, read_text, run_script, write_atomically
from tools.faults import (
    COLOURED,
    FAULTS,
    GREY,
    Fault,
    Look,
    check_image,
    check_json,
    check_text,
    check_xml,
    unreadable,
)

OUT = "faults.csv"
SHOWN = 5  # faults of a kind in the table; the file has all


class FrameReport(NamedTuple):
    """What was found at one frame.

    pictures: (digest, file) of each sound image; has_image: whether any is there at all;
    annotated: whether each of the annotations holds the frame.
    """

    faults: list[Fault]
    pictures: list[tuple[bytes, Path]]
    has_image: bool
    annotated: list[bool]


def main() -> int:
    """Check what the command line names; returns the exit code."""
    parser = OneLineParser(
        prog="python -m tools.check_data",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="faults:\n" + "\n".join(f"  {name:20} {text}" for name, text in FAULTS.items()),
    )
    add = parser.add_argument
    add("root", type=Path, metavar="ROOT", help="folder with images/")
    add(
        "--list",
        action="append",
        required=True,
        metavar="FILE",
        help="an image list, below ROOT or any path; give several if they should share no frame",
    )
    add(
        "--input-mode",
        choices=MODALITIES,
        default="early",
        help="what will be trained, which says whose images are needed (%(default)s)",
    )
    add(
        "--annotations",
        default="all",
        help="bbgt, xml, xml-sanitized, paired, json, a path, or all that ROOT holds",
    )
    add("--out", type=Path, default=Path(OUT), help="all faults as CSV (%(default)s)")
    arguments = parser.parse_args()
    root, out = arguments.root, arguments.out
    for folder in (root, out.parent):
        if not folder.is_dir():
            raise InputError("no such folder", "name another, or make it first", file=folder)
    lists = [find_file(root, name) for name in arguments.list]
    forms, jsons = find_annotations(root, arguments.annotations)
    faults, n_frames = check(root, lists, MODALITIES[arguments.input_mode], forms, jsons)
    write_atomically(out, lambda beside: write_faults(faults, beside))
    read = ", ".join([*(form.form for form in forms), *(path.name for path in jsons)])
    images = " and ".join(MODALITIES[arguments.input_mode])
    print(f"{n_frames} frames, {images}; annotations {read}")
    print(table(faults, root) + f"\nall of them: {out}" if faults else "no fault found")
    return 1 if faults else 0


def find_annotations(root: Path, where: str) -> tuple[list[Annotations], list[Path]]:
    """The annotations to check: those with a file for each frame, and JSON files.

    Args:
        where: a form, a path, or "all" that the root holds.
    """
    named = find_file(root, where)
    if where not in ("all", "json", *FOLDERS):
        return ([], [named]) if named.is_file() else ([open_annotations(named)], [])
    jsons = [root / place / JSON_NAME for place in (".", "annotations")]
    jsons = [path for path in jsons if path.is_file() and where in ("all", "json")]
    kinds = [kind for kind in FOLDERS if where in ("all", kind)]
    folders = [(root / FOLDERS[kind], kind) for kind in kinds]
    forms = [Annotations(*f, modality="lwir") for f in folders if has_annotations(*f)]
    if not forms and not jsons:
        open_annotations(root, "auto" if where == "all" else where)  # says what it looked for
    return forms, jsons


def check(
    root: Path, lists: list[Path], modalities: Sequence[str], forms: list[Annotations], jsons: list[Path]
) -> tuple[list[Fault], int]:
    """All faults of the frames of some lists, and how many frames there are.

    Raises:
        InputError: a list is not there or is no text.
    """
    faults: list[Fault] = []
    frames: dict[str, tuple[Path, int]] = {}  # frame id -> the list and line that name it first
    for path in lists:
        faults += check_list(path, frames)
    held = []
    for path in jsons:
        found, json_frames = check_json(path)
        faults += found
        held.append(json_frames)

    first: dict[bytes, Path] = {}
    annotated: dict[Path, dict[str, list[bool]]] = defaultdict(dict)
    deaf = (signal.SIGINT, signal.SIG_IGN)  # only the parent answers Ctrl-C
    with ProcessPoolExecutor(initializer=signal.signal, initargs=deaf) as pool:
        reports = pool.map(partial(check_frame, root, modalities, forms), frames, chunksize=8)
        bar = tqdm(reports, "checking", len(frames), unit="frame", leave=False)
        for (frame_id, place), report in zip(frames.items(), bar, strict=True):
            row = report.annotated + [frame_id in json_frames for json_frames in held]
            if not report.has_image and not any(row):
                faults.append(Fault("unknown-frame", *place, f"{frame_id} has no file at all"))
                continue
            annotated[place[0]][frame_id] = row
            faults += report.faults
            for digest, path in report.pictures:
                other = first.setdefault(digest, path)
                if other != path:
                    problem = f"the same picture as {relative(other, root)}"
                    faults.append(Fault("copied-image", path, 0, problem))
    for rows in annotated.values():
        faults += missing_annotations(rows, forms, jsons)
    return faults, len(frames)


def missing_annotations(
    rows: dict[str, list[bool]], forms: list[Annotations], jsons: list[Path]
) -> Iterator[Fault]:
    """Frames of one list that an annotation lacks which holds others of that list.

    If none holds any, the first is the one that lacks them.

    Args:
        rows: frame id -> whether each of the forms and JSON files holds it.
    """
    counts = [any(column) for column in zip(*rows.values(), strict=True)]
    if not any(counts):
        counts[:1] = [True] * len(counts[:1])
    for frame_id, row in rows.items():
        for i, (counts_here, there) in enumerate(zip(counts, row, strict=True)):
            if counts_here and not there:
                path = Path(forms[i].path(frame_id)) if i < len(forms) else jsons[i - len(forms)]
                yield Fault("missing-annotation", path, 0, f"{frame_id} is not annotated")


def check_list(path: Path, frames: dict[str, tuple[Path, int]]) -> Iterator[Fault]:
    """Faults of an image list; its frames are added to `frames`.

    Raises:
        InputError: it is not there or is no text.
    """
    if not path.is_file():
        read_image_list(path)  # says what is there instead
    empty = True
    for line, text in enumerate(read_text(path).splitlines(), 1):
        frame_id = text.strip()
        if not frame_id:
            continue
        empty = False
        if not FRAME_ID.fullmatch(frame_id):
            yield Fault("list-bad-id", path, line, f"{frame_id[:60]!r} is not a frame id")
            continue
        where, other = frames.setdefault(frame_id, (path, line))
        if where != path:
            yield Fault("list-overlap", path, line, f"{frame_id} is in {where}:{other} too")
        elif other != line:
            yield Fault("list-repeated-id", path, line, f"{frame_id} is in line {other} too")
    if empty:
        yield Fault("list-empty", path, 0, "it lists no frame")


# ------------------------------------------------------------------------------ one frame


def check_frame(
    root: Path, modalities: Sequence[str], forms: Sequence[Annotations], frame_id: str
) -> FrameReport:
    """Everything about one frame that its own files can tell."""
    paths = {modality: image_path(root, frame_id, modality) for modality in modalities}
    seen = {modality: check_image(path, modality) for modality, path in paths.items()}
    faults = [result for result in seen.values() if isinstance(result, Fault)]
    looks = {modality: look for modality, look in seen.items() if isinstance(look, Look)}
    has_image = bool(looks) or any(not fault.name.startswith("missing-") for fault in faults)
    faults += compare_modalities(looks, paths)
    pictures = {look.digest: paths[modality] for modality, look in looks.items()}
    annotated = []
    for form in forms:
        found, there = check_annotation(form, frame_id)
        faults += found
        annotated.append(there)
    return FrameReport(faults, list(pictures.items()), has_image, annotated)


def compare_modalities(looks: dict[str, Look], paths: dict[str, Path]) -> Iterator[Fault]:
    """Images that look as if they were of the other modality."""
    grey = "visible" in looks and looks["visible"].colour < GREY
    coloured = "lwir" in looks and looks["lwir"].colour > COLOURED
    if len({look.digest for look in looks.values()}) < len(looks):
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
    absent = [unreadable(path, "missing-annotation") for path in paths]
    if all(fault and fault.name == "missing-annotation" for fault in absent):
        return [], False
    faults = [fault for fault in absent if fault]
    labels = []
    for path in (path for path, fault in zip(paths, absent, strict=True) if not fault):
        found, rows = (
            check_xml(path, frame_id)
            if path.suffix == ".xml"
            else check_text(path, columns=5 if form.form == "paired" else 11)
        )
        faults += found
        labels.append([label for _, label, _ in rows])
    if not faults and labels[0] != labels[-1]:
        problem = f"{labels[0]} in the visible file, {labels[1]} here"
        faults.append(Fault("unpaired-objects", paths[1], 0, problem))
    return faults, True


# ------------------------------------------------------------------------------ the report


def relative(path: Path, root: Path) -> Path:
    """A path as seen from the root, if it is below it."""
    return path.relative_to(root) if path.is_relative_to(root) else path


def table(faults: list[Fault], root: Path) -> str:
    """Faults by name, the first few of each with their places."""
    lines = []
    for name in FAULTS:
        found = [fault for fault in faults if fault.name == name]
        for fault in found[:SHOWN]:
            place = f"{relative(fault.file, root)}:{fault.line}".removesuffix(":0")
            lines.append((name, place, fault.problem))
        if len(found) > SHOWN:
            lines.append((name, f"… and {len(found) - SHOWN} more", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    rows = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in lines]
    kinds = len({fault.name for fault in faults})
    return "\n".join([*rows, f"faults: {len(faults)}, kinds: {kinds}"])


def write_faults(faults: list[Fault], path: Path) -> None:
    """The faults as CSV: fault, file, line (0: the whole file), problem."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("fault", "file", "line", "problem"))
        writer.writerows(faults)


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
