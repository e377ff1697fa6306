"""Check every image and annotation of image lists, and report missing, broken and suspicious files.

    python -m tools.check_data ROOT
    python -m tools.check_data ROOT --list imageSets/train-all-02.txt
    python -m tools.check_data mine/pairs.json
    python -m tools.check_data llvip --data-root LLVIP

This finds every file that training would refuse. It also finds what training would accept silently:
copies, black frames, swapped modalities, boxes outside the frame. The exit code is 0 without faults,
1 with faults, and 2 if the check cannot run.
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
from tools.faults import FAULTS, Fault, check_frame, check_label_json, implausible_objects, to_fault

MAX_SHOWN = 5  # faults of one kind in the printed table; the CSV file has all
CSV_HEADER = ("fault", "file", "line", "problem")  # line 0: the whole file


def main() -> int:
    """Run the check; return the exit code."""
    arguments = parse_arguments()
    root, out, modalities = arguments.root, arguments.out, MODALITIES[arguments.input_mode]
    check_folders(out)
    is_named = str(root) in NAMED_SETS and (arguments.data_root or not root.is_dir())
    if is_named or root.is_file():
        n_frames, faults = check_pairs(str(root), arguments.data_root, modalities)
        print(f"{n_frames} frames, {' and '.join(modalities)}; {root}")
        base = arguments.data_root or root.parent
    else:
        n_frames, faults = check_kaist(root, arguments.list, arguments.annotations, modalities)
        base = root
    if not faults:
        if out.is_file() and read_text(out).startswith(",".join(CSV_HEADER)):
            out.unlink()  # the result of an earlier check
        print("no fault found")
        return 0
    text = io.StringIO()
    csv.writer(text).writerows([CSV_HEADER, *faults])
    write_text(out, text.getvalue())
    print(f"{fault_table(faults, base)}\nall of them: {out}")
    n_missing = sum(fault.name == "missing-visible" for fault in faults)
    if n_missing > n_frames / 3:
        print(f"{n_missing} of {n_frames} visible images are missing: --input-mode lwir needs none")
    return 1


def parse_arguments() -> Namespace:
    """Parse the command line."""
    kinds = "\n".join(f"  {name:20} {description}" for name, (description, _) in FAULTS.items())
    parser = OneLineParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, epilog=f"faults:\n{kinds}"
    )
    add = parser.add_argument
    others = f"another set of pairs: its description, pairs.json, or {', '.join(NAMED_SETS)}"
    add("root", type=Path, metavar="ROOT", help=f"KAIST root, which has images/, or {others}")
    add("--data-root", type=Path, metavar="FOLDER", help="root folder of another set of pairs")
    text = "image list, a path below ROOT or any path; lists given together must not share frames (default: "
    text += "all lists in imageSets, of which training and test lists must not share frames)"
    add("--list", action="append", metavar="FILE", help=text)
    text = "input mode of the training, which decides which images are needed (%(default)s)"
    add("--input-mode", choices=MODALITIES, default="early", help=text)
    text = "bbgt, xml, xml-sanitized, paired, json, a path, or all annotations in ROOT (%(default)s)"
    add("--annotations", default="all", help=text)
    add("--out", type=out_path(), default=Path("faults.csv"), help="CSV file of all faults (%(default)s)")
    return parser.parse_args()


def check_kaist(
    root: Path, names: Sequence[str] | None, which: str, modalities: Sequence[str]
) -> tuple[int, list[Fault]]:
    """Check a KAIST root; return the number of frames and the faults.

    names: image lists, None: all lists in imageSets; which: as in `find_annotations`.
    """
    if not root.is_dir():
        raise InputError("no such folder", "check the path", file=root)
    lists = [resolve_path(root, name) for name in names or ()] or sorted((root / "imageSets").glob("*.txt"))
    if not lists:
        raise InputError("no image lists here", "name them by --list", file=root / "imageSets")
    forms, jsons = find_annotations(root, which)
    frames: dict[str, tuple[Path, int]] = {}
    faults = [fault for path in lists for fault in check_list(path, frames, bool(names))]
    faults += check_frames(root, frames, modalities, {}, forms, jsons)
    sources = ", ".join(dict.fromkeys([*(form.form for form in forms), *(path.name for path in jsons)]))
    n_lists = f"{len(lists)} list{'s' * (len(lists) != 1)}"
    print(f"{len(frames)} frames of {n_lists}, {' and '.join(modalities)}; annotations {sources}")
    return len(frames), faults


def find_annotations(root: Path, which: str) -> tuple[list[Annotations], list[Path]]:
    """Find the annotations to check: those with one file per frame, and JSON files.

    which: a form, a path, or "all" for every form in the root.
    """
    if which not in ("all", *FORM_PATHS):
        path = resolve_path(root, which)
        return ([], [path]) if path.is_file() else ([open_annotations(path)], [])
    forms = FORM_PATHS if which == "all" else [which]
    found = [(form, path) for form in forms for path in find_form_paths(root, form)]
    if not found:
        open_annotations(root, "auto" if which == "all" else which)  # raises an InputError with the paths
    folders = [Annotations(path, form, "lwir") for form, path in found if form != "json"]
    return folders, [path for form, path in found if form == "json"]


def check_pairs(data: str, root: Path | None, modalities: Sequence[str]) -> tuple[int, list[Fault]]:
    """Check another set of pairs, as named for `open_pairs`; return the number of frames and the faults."""
    errors: list[InputError] = []
    sets = {split: open_pairs(data, root, split, errors) for split in SPLITS}
    lwir_range = find_lwir_range(sets["train"], errors)
    faults, digests = [], {}
    for pairs in sets.values():
        for frame_id, rows in pairs.objects.items():
            path, size = pairs.images[frame_id]["labels"], pairs.sizes[frame_id]
            faults += implausible_objects(rows, path, size, kaist=False)
        frames = dict.fromkeys(pairs.frames, (pairs.source, 0))
        faults += check_frames(replace(pairs, lwir_range=lwir_range), frames, modalities, digests)
    train, test = ({files["visible"] for files in pairs.images.values()} for pairs in sets.values())
    problem = "this frame is both in the training and the test set"
    faults += [Fault("list-overlap", path, 0, problem) for path in sorted(train & test)]
    n_frames, grey = len(train) + len(test), [fault for fault in faults if fault.name == "grey-visible"]
    if grey and len(grey) == n_frames:
        print("note: all visible images are grey")
        faults = [fault for fault in faults if fault not in grey]
    # A broken image may be reported by open_pairs, find_lwir_range and check_frames.
    return n_frames, [*dict.fromkeys([*map(to_fault, errors), *faults])]


def check_list(path: Path, frames: dict[str, tuple[Path, int]], disjoint: bool) -> Iterator[Fault]:
    """Yield the faults of an image list, and add its frames to `frames`.

    Args:
        frames: frame id -> the list and line that name it first.
        disjoint: report every frame that another list has. False: only if one of the two is a test list,
            which has "test" in its name.
    """
    errors: list[InputError] = []
    for frame_id, line in line_numbers(path, errors).items():
        other, other_line = frames.setdefault(frame_id, (path, line))
        if other != path and (disjoint or ("test" in path.stem) != ("test" in other.stem)):
            yield Fault("list-overlap", path, line, f"{frame_id} is also in {other}:{other_line}")
    yield from map(to_fault, errors)


def check_frames(
    root: Path | PairSet,
    frames: dict[str, tuple[Path, int]],
    modalities: Sequence[str],
    digests: dict[bytes, Path],
    forms: Sequence[Annotations] = (),
    jsons: Sequence[Path] = (),
) -> Iterator[Fault]:
    """Yield the faults of frames and of annotation JSONs.

    frames: as in `check_list`; digests: digest -> file of all images checked so far, which is updated.
    """
    annotated: dict[Annotations | Path, set[str]] = {form: set() for form in forms}  # source -> frame ids
    for path in jsons:
        faults, annotated[path] = check_label_json(path)
        yield from faults
    by_list: dict[Path, list[str]] = defaultdict(list)
    ignore_sigint = (signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    with ProcessPoolExecutor(initializer=signal.signal, initargs=ignore_sigint) as pool:
        paths = ({m: image_path(root, frame_id, m) for m in modalities} for frame_id in frames)
        is_set = isinstance(root, PairSet)
        expected = ((root.sizes[frame_id], root.lwir_range) if is_set else () for frame_id in frames)
        results = pool.map(check_frame, frames, paths, expected, repeat(forms), chunksize=8)
        bar = tqdm(results, "checking", len(frames), unit="frame", leave=False)
        for (frame_id, place), (faults, frame_digests, form_idxs) in zip(frames.items(), bar, strict=True):
            for i in form_idxs:
                annotated[forms[i]].add(frame_id)
            is_annotated = any(frame_id in frame_ids for frame_ids in annotated.values())
            if not is_annotated and [fault.name for fault in faults] == [f"missing-{m}" for m in modalities]:
                yield Fault("unknown-frame", *place, f"{frame_id} has neither images nor annotations")
                continue
            by_list[place[0]].append(frame_id)
            yield from faults
            for digest, path in frame_digests.items():
                other = digests.setdefault(digest, path)
                if other != path:
                    problem = f"the same pixels as {other}".replace(f"{root}/" * isinstance(root, Path), "")
                    yield Fault("copied-image", path, 0, problem)
    yield from missing_annotations(by_list, annotated)


def missing_annotations(
    by_list: dict[Path, list[str]], annotated: dict[Annotations | Path, set[str]]
) -> Iterator[Fault]:
    """Yield the frames that a source of annotations should have.

    A source that annotates some frames of a list has to annotate all of them. If no source annotates any
    of them, the faults name the first source.
    """
    for frame_ids in by_list.values():
        used = [source for source, known in annotated.items() if not known.isdisjoint(frame_ids)]
        for source, frame_id in product(used or [*annotated][:1], frame_ids):
            if frame_id not in annotated[source]:
                path = source if isinstance(source, Path) else Path(source.path(frame_id))
                yield Fault("missing-annotation", path, 0, f"{frame_id} is not annotated")


def fault_table(faults: list[Fault], base: Path) -> str:
    """Format faults by name, the first `MAX_SHOWN` of each; their paths are relative to `base`."""
    rows = []
    for name in FAULTS:
        found = [fault for fault in faults if fault.name == name]
        places = [f"{f.file}:{f.line}".removesuffix(":0").removeprefix(f"{base}/") for f in found]
        rows += [(name, place, f.problem) for place, f in zip(places[:MAX_SHOWN], found, strict=False)]
        rows += [(name, f"… and {len(found) - MAX_SHOWN} more", "")] * (len(found) > MAX_SHOWN)
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([*lines, f"faults: {len(faults)}, kinds: {len({fault.name for fault in faults})}"])


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
