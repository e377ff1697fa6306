"""Miss rate of detectors on KAIST: tables, curves, and pictures of what went wrong.

Result files need no network, no checkpoint and no torch:

    python eval.py --detections result.txt other.json --annotations KAIST_annotation.json

Without --detections a checkpoint is evaluated, the newest run's unless --checkpoint names one:

    python eval.py
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from config import OneLineParser
from error_sheet import FORMATS, draw_errors
from errors import InputError, run_script
from kaist import read_image_list, scene, time_of_day
from miss_rate import GroundTruth, load_ground_truth, select_frames
from report import draw_curves, print_scores, score, write_json
from result_files import frames_path, read_detections, write_detections

CHECKPOINTS = "checkpoints"  # where the newest run is looked for
ANNOTATIONS = ""  # KAIST_annotation.json, an annotation folder or a KAIST root
DATA_ROOT = ""  # folder with images/; a checkpoint knows its own
OUT = "miss_rate.png"  # the curves; png, jpg or pdf
ERRORS = "errors.png"  # the sheet of --show-errors


def main() -> None:
    arguments = parse_arguments()
    if arguments.detections:
        ground_truth = open_ground_truth(arguments)
        files, names = arguments.detections, unique_names(arguments.detections)
        out, data_root = arguments.out or Path(OUT), arguments.data_root
    else:
        name, path, ground_truth, data_root = evaluate_checkpoint(arguments)
        files, names, out = [path], [name], arguments.out or path.parent / OUT
    found = [read_detections(path, ground_truth.frames) for path in files]
    if arguments.subset:
        frames = choose_frames(ground_truth.frames, arguments.subset)
        selected = [select_frames(ground_truth, detections, frames) for detections in found]
        ground_truth, found = selected[0][0], [detections for _, detections in selected]
    scores = [
        score(name, ground_truth, detections, arguments.bootstrap, arguments.by_video)
        for name, detections in zip(names, found, strict=True)
    ]
    print_scores(scores, arguments.all_setups)
    draw_curves(scores, out)
    print(f"curves: {out}")
    if arguments.json:
        write_json(scores, arguments.json, curves=True)
    if arguments.show_errors:
        for name, detections in zip(names, found, strict=True):
            path = arguments.errors_out
            path = path if len(files) == 1 else path.with_stem(f"{path.stem}-{name}")
            n_pictures, n_absent = draw_errors(
                ground_truth, detections, data_root, arguments.show_errors, path
            )
            missing = f" ({n_absent} of {n_pictures} images are missing)" if n_absent else ""
            print(f"errors of {name}: {path}{missing}")


def parse_arguments() -> Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--detections", nargs="+", type=Path, metavar="FILE", help="result files, text or JSON")
    add("--checkpoint", type=Path, help="a checkpoint instead; default: the newest run's")
    add("--annotations", type=Path, default=ANNOTATIONS or None,
        help="KAIST_annotation.json, an annotation folder or a KAIST root")  # fmt: skip
    add("--image-list", type=Path, help="frames that the ids of the result files mean")
    add("--subset", help="evaluate only day, night, campus, road, downtown, or an image list")
    add("--all-setups", action="store_true", help="also print the nine setups and the scenes")
    add("--bootstrap", type=int, default=0, metavar="N", help="95%% intervals from N resamples")
    add("--by-video", action="store_true", help="resample whole videos instead of frames")
    add("--out", type=picture, help=f"picture of the curves ({OUT}, in a checkpoint's folder)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all numbers and curves at full precision")
    add("--show-errors", type=int, default=0, metavar="N",
        help="picture the N worst false positives and the N largest missed people")  # fmt: skip
    add("--errors-out", type=picture, default=Path(ERRORS), help="where to (%(default)s)")
    add("--data-root", type=Path, default=DATA_ROOT or None, help="folder with images/")
    arguments = parser.parse_args()
    if arguments.detections and not arguments.annotations:
        parser.error("--detections needs --annotations")
    if arguments.detections and arguments.checkpoint:
        parser.error("--detections and --checkpoint exclude each other")
    for path in arguments.detections or []:
        if not path.is_file():
            raise InputError("result file not found", "check --detections", file=path)
    for path in (arguments.out, arguments.json, arguments.errors_out):
        if path and not path.parent.is_dir():
            raise InputError("no such folder", "make it first", file=path.parent)
    if arguments.detections and arguments.show_errors and not arguments.data_root:
        parser.error("--show-errors needs --data-root, the folder with images/")
    if arguments.bootstrap < 0 or arguments.show_errors < 0:
        parser.error("--bootstrap and --show-errors take a number above 0")
    return arguments


def picture(text: str) -> Path:
    """A path that a picture can be written to."""
    if Path(text).suffix not in FORMATS:
        raise InputError(f"{text!r} is no picture's name", f"end it in {', '.join(FORMATS)}")
    return Path(text)


def evaluate_checkpoint(arguments: Namespace) -> tuple[str, Path, GroundTruth, Path]:
    """Run a checkpoint's network over its test frames and write the detections into its folder.

    Returns:
        The run's name, the result file (`detections.txt` for `last.pt`, `detections-best.txt` for
        `best.pt`), the people of its frames, and the root of its images.
    """
    # Here, because result files are evaluated without torch.
    from inference import run_checkpoint
    from utils import newest_checkpoint

    path = arguments.checkpoint or newest_checkpoint(Path(CHECKPOINTS))
    settings = {"data_root": arguments.data_root, "test_list": arguments.image_list,
                "test_annotations": arguments.annotations,
                "device": arguments.device}  # fmt: skip
    given = {key: str(value) for key, value in settings.items() if value}
    config, ground_truth, detections = run_checkpoint(path, given)
    suffix = "" if path.stem == "last" else f"-{path.stem}"
    result = path.parent / f"detections{suffix}.txt"
    write_detections(result, detections, ground_truth.frames)
    return path.resolve().parent.name + suffix, result, ground_truth, Path(config["data_root"])


def open_ground_truth(arguments: Namespace) -> GroundTruth:
    """People of --image-list, else of the first result file's companion, else of the JSON."""
    companion = frames_path(arguments.detections[0])
    frames = None
    if arguments.image_list:
        frames = read_image_list(arguments.image_list)
    elif companion.is_file():
        frames = read_image_list(companion)
    return load_ground_truth(arguments.annotations, frames)


def choose_frames(frames: Sequence[str], subset: str) -> list[str]:
    """The frames of a subset: a time of day, a scene, or an image list."""
    if subset in ("day", "night", "campus", "road", "downtown"):
        chosen = [f for f in frames if subset in (time_of_day(f), scene(f))]
        if not chosen:
            raise InputError(f"no frame is of subset {subset!r}", "choose another with --subset")
        return chosen
    return read_image_list(subset)


def unique_names(files: Sequence[Path]) -> list[str]:
    """A short name for each result file."""
    for name_of in (lambda path: path.stem, lambda path: path.name, str):
        names = [name_of(path) for path in files]
        if len(set(names)) == len(names):
            return names
    raise InputError("a result file is named twice", "name each once", file=files[0])


if __name__ == "__main__":
    run_script(main)
