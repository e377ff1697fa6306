"""Miss rate of detectors on KAIST: tables, curves, and pictures of what went wrong.

Result files need no network, no checkpoint and no torch:

    python eval.py --detections result.txt other.json --annotations KAIST_annotation.json

Without --detections a checkpoint is evaluated, the newest run's unless --checkpoint names one:

    python eval.py

Finished runs are compared in one table and one figure:

    python eval.py --compare checkpoints/26 checkpoints/19
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.compare import compare_runs
from engine.config import OneLineParser
from kaist.annotations import MODALITIES, read_image_list, scene, time_of_day
from kaist.demo import open_root
from kaist.error_sheet import FORMATS, draw_errors
from kaist.files import InputError, run_script
from kaist.miss_rate import GroundTruth, load_ground_truth, select_frames
from kaist.report import draw_curves, print_scores, score, write_json
from kaist.results import Detections, frames_path, read_detections, write_detections

CHECKPOINTS = "checkpoints"  # where the newest run is looked for
ANNOTATIONS = ""  # KAIST_annotation.json, an annotation folder or a KAIST root
DATA_ROOT = ""  # folder with images/; a checkpoint knows its own
OUT = "miss_rate.png"  # the curves; png, jpg or pdf
COMPARISON = "comparison.png"  # the figure of --compare
ERRORS = "errors.png"  # the sheet of --show-errors


def main() -> None:
    """Evaluate result files, or a checkpoint's network."""
    arguments = parse_arguments()
    if arguments.compare:
        compare_runs(arguments.compare, arguments.bootstrap, arguments.out or Path(COMPARISON))
        return
    if arguments.detections:
        files, names = arguments.detections, unique_names(arguments.detections)
        ground_truth = open_ground_truth(arguments)
        out, data_root = arguments.out or Path(OUT), arguments.data_root
    else:
        name, path, ground_truth, data_root = evaluate_checkpoint(arguments)
        files, names = [path], [name]
        out = arguments.out or path.with_name(path.stem.replace("detections", "miss_rate") + ".png")
    found = [read_detections(path, ground_truth.frames) for path in files]
    if arguments.subset:
        frames = choose_frames(ground_truth.frames, arguments.subset)
        selected = [select_frames(ground_truth, detections, frames) for detections in found]
        ground_truth, found = selected[0][0], [detections for _, detections in selected]
    print(f"{len(ground_truth.frames)} frames, people of {ground_truth.source}")
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
    add(
        "--annotations",
        type=Path,
        default=ANNOTATIONS or None,
        help="KAIST_annotation.json, an annotation folder or a KAIST root",
    )
    add("--compare", nargs="+", type=Path, metavar="RUN", help="folders of finished runs instead")
    add("--image-list", type=Path, help="frames to evaluate; ids of files without a companion count along it")
    add("--subset", help="evaluate only day, night, campus, road, downtown, or an image list")
    add("--all-setups", action="store_true", help="also print the nine setups and the scenes")
    add("--bootstrap", type=int, default=0, metavar="N", help="95%% intervals from N resamples")
    add("--by-video", action="store_true", help="resample whole videos instead of frames")
    add("--out", type=picture, help=f"picture of the curves ({OUT}, in a checkpoint's folder)")
    add(
        "--without",
        choices=("visible", "lwir"),
        default="",
        help="a modality to blank, as if it were missing",
    )
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all numbers and curves at full precision")
    add(
        "--show-errors",
        type=int,
        default=0,
        metavar="N",
        help="picture the N worst false positives and the N largest missed people",
    )
    add("--errors-out", type=picture, default=Path(ERRORS), help="where to (%(default)s)")
    add("--data-root", type=Path, default=DATA_ROOT or None, help="folder with images/")
    arguments = parser.parse_args()
    if arguments.detections and not arguments.annotations:
        parser.error("--detections needs --annotations")
    if sum(map(bool, (arguments.detections, arguments.checkpoint, arguments.compare))) > 1:
        parser.error("--detections, --checkpoint and --compare exclude each other")
    if arguments.without and (arguments.detections or arguments.compare):
        parser.error("--without evaluates a checkpoint: leave --detections and --compare away")
    for path in arguments.detections or []:
        if not os.path.isfile(path):  # unlike Path's own, it takes any name
            raise InputError("result file not found", "check --detections", file=path)
    for path in (arguments.out, arguments.json, arguments.errors_out):
        if path and not os.path.isdir(path.parent):
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

    The run's own `detections.txt` is written again by its own `last.pt` on its own data alone; any
    other evaluation has its checkpoint and its flags in its name (`detections-best.txt`).

    Returns:
        The run's name, the result file, the people of its frames, and the root of its images.
    """
    # Here, because result files are evaluated without torch.
    from engine.checkpoint import choose_checkpoint

    path = choose_checkpoint(arguments.checkpoint, Path(CHECKPOINTS))
    settings = {
        "data_root": arguments.data_root,
        "test_list": arguments.image_list,
        "test_annotations": arguments.annotations,
        "device": arguments.device,
    }
    given = {key: str(value) for key, value in settings.items() if value}
    print(f"weights of {path}")
    config, ground_truth, detections, mask_ious = run_checkpoint(path, given, arguments.without)
    if mask_ious:
        print(", ".join(f"{name} {value:.3f}" for name, value in mask_ious.items()))
    parts = [path.stem] if path.stem != "last" else []
    parts += [Path(given[key]).stem for key in settings if key in given and key != "device"]
    parts += [Path(arguments.subset).stem] if arguments.subset else []
    parts += [f"without-{arguments.without}"] if arguments.without else []
    suffix = "".join(f"-{part}" for part in parts)
    result = path.parent / f"detections{suffix}.txt"
    write_detections(result, detections, ground_truth.frames)
    return path.resolve().parent.name + suffix, result, ground_truth, Path(config["data_root"])


def run_checkpoint(
    path: Path, settings: dict[str, Any], without: str = ""
) -> tuple[dict[str, Any], GroundTruth, Detections, dict[str, float]]:
    """A checkpoint's network over its test list.

    Args:
        settings: override the checkpoint's own configuration (`data_root`, `test_list`,
            `test_annotations`, `device`, …).
        without: a modality that is blanked, of a network that takes both.

    Returns:
        The configuration used, the people of the test list, the detections, and the masks' IoU.
    """
    # Here, because result files are evaluated without torch.
    import torch

    from datasets import test_loader
    from engine.checkpoint import load_checkpoint
    from kaist.miss_rate import open_test_set
    from model import INPUT_CHANNELS, build_model
    from ssd.augment import mean_colour
    from utils import choose_device, choose_precision, detect_frames

    checkpoint = load_checkpoint(path)
    config = checkpoint["config"] | settings
    if without:
        check_missing(config, without)
    root = open_root(config["data_root"])
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    ground_truth = open_test_set(root, config["test_list"], config["test_annotations"])
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    names = ("input_mode", "input_size", "min_height", "margin", "batch_size", "workers")
    loader = test_loader(
        root,
        ground_truth,
        device=device,
        filler=mean_colour(INPUT_CHANNELS[config["input_mode"]]),
        without=without,
        start_method=config.get("start_method", "auto"),  # older checkpoints have none
        map_sizes=[model.map_sizes[i] for i in model.infused_maps],
        **{name: config[name] for name in names},
    )
    nms_settings = {name: config[name] for name in ("min_score", "nms_iou", "max_boxes")}
    test_flip = config.get("test_flip", False)
    detections, mask_ious = detect_frames(model, loader, precision, test_flip=test_flip, **nms_settings)
    return config, ground_truth, detections, mask_ious


def check_missing(config: dict[str, Any], without: str) -> None:
    """Refuse to leave a modality out of a network that takes no other, and warn where it was
    never trained to do without."""
    if len(MODALITIES[config["input_mode"]]) == 1:
        raise InputError(
            f"a network with input {config['input_mode']!r} cannot do without a modality",
            "leave --without away",
        )
    if not config.get("modality_dropout"):
        print(f"warning: it was not trained to do without {without} (MODALITY_DROPOUT)")


def open_ground_truth(arguments: Namespace) -> GroundTruth:
    """People of the frames that the result files speak of.

    Ids of a file count along its own companion, else along --image-list, else along the annotation
    JSON. Without --image-list all files have to mean the same frames.
    """
    if arguments.image_list:
        return load_ground_truth(arguments.annotations, read_image_list(arguments.image_list))
    companions = [path for path in map(frames_path, arguments.detections) if path.is_file()]
    if not companions:
        return load_ground_truth(arguments.annotations)
    lists = [read_image_list(path) for path in companions]
    if len(companions) < len(arguments.detections):
        lists.append(list(load_ground_truth(arguments.annotations).frames))
    if any(other != lists[0] for other in lists):
        raise InputError(
            "the result files' ids mean different lists of frames",
            "evaluate them one by one, or name the frames to evaluate with --image-list",
            file=companions[0],
        )
    return load_ground_truth(arguments.annotations, lists[0])


def choose_frames(frames: Sequence[str], subset: str) -> list[str]:
    """The frames of a subset: a time of day, a scene, or an image list."""
    if subset in ("day", "night", "campus", "road", "downtown"):
        chosen = [f for f in frames if subset in (time_of_day(f), scene(f))]
        if not chosen:
            raise InputError(f"no frame is of subset {subset!r}", "choose another with --subset")
        return chosen
    if not Path(subset).is_file():
        raise InputError(
            f"--subset {subset!r} is neither a subset nor an image list",
            "choose day, night, campus, road, downtown or a file",
        )
    return read_image_list(subset)


def unique_names(files: Sequence[Path]) -> list[str]:
    """A short name for each result file, fit for a file's name: its own, or its run's folder."""
    for name_of in (
        lambda path: path.stem,
        lambda path: path.name,
        lambda path: path.resolve().parent.name,
        lambda path: str(path.with_suffix("")).strip("./").replace("/", "_"),
    ):
        names = [name_of(path) for path in files]
        if len(set(names)) == len(names):
            return names
    raise InputError("a result file is named twice", "name each once", file=files[0])


if __name__ == "__main__":
    run_script(main)
