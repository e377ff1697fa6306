"""Miss rate of detectors on KAIST: tables, curves, and pictures of what went wrong.

Result files need no network, no checkpoint and no torch:

    python eval.py --detections result.txt other.json --annotations KAIST_annotation.json

Without --detections a checkpoint is evaluated, the newest finished run's unless --checkpoint names one:

    python eval.py

Finished runs are compared in one table and one figure:

    python eval.py --compare checkpoints/26 checkpoints/19
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.config import DETECT_KEYS, check_experiment, find_folder, limit_workers, pick
from engine.curves import compare_runs, unique_names
from engine.history import find_run
from kaist.annotations import MODALITIES, PairSet, read_image_list
from kaist.bootstrap import MAX_RESAMPLES
from kaist.files import InputError, OneLineParser, check_folders, check_overwrite, out_path, run_script
from kaist.miss_rate import GroundTruth, load_ground_truth, select_frames
from kaist.pair_sets import find_lwir_range, open_pairs
from kaist.report import draw_curves, print_scores, score, write_json
from kaist.results import NO_DETECTIONS, Detections, frames_path, read_detections, write_and_read
from kaist.sources import KAIST, TEST_SET_KEYS, dataset_name, find_kaist, open_testing, pairs_root

CHECKPOINTS = "checkpoints"  # where the newest finished run is looked for
ANNOTATIONS = ""  # KAIST_annotation.json, an annotation folder or a KAIST root
DATA_ROOT = ""  # folder with images/; a checkpoint knows its own
OUT = "miss_rate.png"  # the curves; png, jpg or pdf
COMPARISON = "comparison.png"  # the figure of --compare
ERRORS = "errors.png"  # the sheet of --show-errors
DEVICE = "auto"  # auto, cpu, cuda, mps
COMPILE = "off"  # torch.compile for a checkpoint's network: on, off
SUBSETS = ("day", "night", "campus", "road", "downtown")
MOST_ERRORS = 1000  # on one sheet
SURE = 0.3  # score from which a network means a person
PICTURES = (".png", ".jpg", ".pdf")


def main() -> None:
    """Evaluate result files, a checkpoint's network, or finished runs."""
    arguments = parse_arguments()
    if arguments.compare:
        runs = [find_run(path, find_folder(CHECKPOINTS)) for path in arguments.compare]
        compare_runs(runs, arguments.bootstrap, arguments.by_video, arguments.out or Path(COMPARISON))
        return
    found = read_result_files(arguments) if arguments.detections else evaluate_checkpoint(arguments)
    print(f"people of {found[0].test_set.source}")
    samples = {"resamples": arguments.bootstrap, "by_video": arguments.by_video, "with_coco": True}
    scores = [score(f.name, f.test_set, f.detections, **samples) for f in found]
    print_scores(scores, arguments.all_setups)
    if arguments.json:
        write_json(scores, arguments.json, curves=True)
        print(f"numbers: {arguments.json}")
    try:
        if curves := arguments.out or found[0].curves:
            draw_curves(scores, curves)
            print(f"curves: {curves}")
        if arguments.show_errors:
            show_errors(found, arguments)
    except ModuleNotFoundError as error:
        print(f"note: no picture was drawn: {error.name} is not installed (pip install matplotlib pillow)")


class Found(NamedTuple):
    """What a detector found in a test set.

    root: of the images; curves, errors: where the pictures go by themselves, None where nowhere.
    """

    name: str
    test_set: GroundTruth
    detections: Detections
    root: Path | PairSet | None
    curves: Path | None = Path(OUT)
    errors: Path | None = Path(ERRORS)


def parse_arguments() -> Namespace:
    """The command line. InputError: flags that cannot be used, or not together."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_mutually_exclusive_group().add_argument
    add("--detections", nargs="+", type=Path, metavar="FILE", help="result files, text or COCO's JSON")
    add("--checkpoint", type=Path, help="a checkpoint or a run's folder (default: the newest finished run)")
    add("--compare", nargs="+", type=Path, metavar="RUN", help="finished runs, by folder or name")
    add = parser.add_argument_group("frames and people").add_argument
    where = "KAIST_annotation.json, an annotation folder or a KAIST root"
    add("--annotations", type=Path, default=ANNOTATIONS or None, help=where)
    add("--data-root", type=Path, default=DATA_ROOT or None, help="folder with images/")
    whole = "a full KAIST: fills --data-root, --image-list and --annotations, but for those given"
    add("--kaist", type=Path, metavar="ROOT", help=whole)
    other = "a set of pairs other than KAIST: its description, pairs.json, or its name, with --data-root"
    add("--data", default=None, metavar="SET", help=f"{other} (docs/your-data.md)")
    listing = "frames to evaluate; ids of result files without a companion count along it"
    add("--image-list", type=Path, metavar="FILE", help=listing)
    add("--subset", help=f"evaluate only {', '.join(SUBSETS)}, or the frames of an image list")
    group = parser.add_argument_group("a checkpoint's network")
    add = group.add_mutually_exclusive_group().add_argument
    dark = ("visible", "lwir", "sides-a", "sides-b", "surroundings")
    halves = "visible's right and LWIR's left half (sides-a), the other halves, LWIR around its centre"
    add("--blackout", choices=dark, default="", help=f"blank a modality, {halves}")
    add("--without", choices=dark[:2], default="", dest="blackout", help="short for --blackout")
    whose = "the checkpoint is its author's file of this row's network (docs/published.md)"
    group.add_argument("--experiment", default="", metavar="ROW", help=whose)
    group.add_argument("--device", default=DEVICE, help="auto, cpu, cuda, mps (%(default)s)")
    pays = "torch.compile it first, which pays for long lists (%(default)s)"
    group.add_argument("--compile", choices=("on", "off"), default=COMPILE, help=pays)
    add = parser.add_argument_group("numbers and pictures").add_argument
    add("--all-setups", action="store_true", help="also print the nine setups and the scenes")
    add("--bootstrap", type=int, default=0, metavar="N", help="95%% intervals from N resamples")
    add("--by-video", action="store_true", help="resample whole videos instead of frames")
    add("--json", type=out_path(), metavar="FILE", help="write all numbers and curves at full precision")
    beside = "in a checkpoint's folder, else"
    add("--out", type=out_path(*PICTURES), metavar="FILE", help=f"picture of the curves ({beside} {OUT})")
    errors = "picture the N worst false positives and the N largest missed people"
    add("--show-errors", type=int, default=0, metavar="N", help=errors)
    add("--errors-out", type=out_path(*PICTURES), metavar="FILE", help=f"where to ({beside} {ERRORS})")
    arguments = parser.parse_args()
    if arguments.compare:
        taken = ("compare", "bootstrap", "by_video", "out")
        others = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
        if others := sorted(others - set(taken)):
            parser.error(f"--compare takes no --{others[0].replace('_', '-')}")
    theirs = arguments.image_list or arguments.annotations or arguments.kaist
    if arguments.detections and arguments.data and theirs:
        parser.error(
            "--data brings its own list and labels: leave --image-list, --annotations and --kaist away"
        )
    data = (arguments.data_root, arguments.image_list, arguments.annotations, arguments.kaist)
    arguments.data_flags = (dataset_name(arguments.data or ""), *data)
    if root := arguments.kaist:
        given = {"test_list": arguments.image_list, "test_annotations": arguments.annotations}
        parts = find_kaist(root, {name: str(path) for name, path in given.items() if path}, ["test"])
        arguments.data_root = arguments.data_root or root
        arguments.image_list = arguments.image_list or root / parts["test_list"]
        arguments.annotations = arguments.annotations or root / parts["test_annotations"]
    for flag, number, most in (
        ("--bootstrap", arguments.bootstrap, MAX_RESAMPLES),
        ("--show-errors", arguments.show_errors, MOST_ERRORS),
    ):
        if not 0 <= number <= most:
            parser.error(f"{flag} takes a number from 0 to {most}")
    written = arguments.json, arguments.out, arguments.errors_out
    check_folders(*written)
    check_experiment(parser, arguments)
    files = arguments.detections = leave_companions(arguments.detections or [])
    named = arguments.annotations, arguments.image_list, arguments.checkpoint, Path(arguments.subset or "")
    check_overwrite(written, [*files, *map(frames_path, files), *named])
    for path in files:
        if not os.path.isfile(path):  # unlike Path's own, it takes any name
            raise InputError("result file not found", "check --detections", file=path)
    if arguments.detections and not (arguments.annotations or arguments.data):
        parser.error("--detections needs --annotations or --data")
    if arguments.detections and arguments.show_errors and not (arguments.data_root or arguments.data):
        parser.error("--show-errors needs --data-root, the folder with images/")
    if arguments.blackout and (arguments.detections or arguments.compare):
        parser.error("--blackout and --without evaluate a checkpoint: leave --detections and --compare away")
    return arguments


# ------------------------------------------------------------------- result files


def leave_companions(files: Sequence[Path]) -> list[Path]:
    """The files but for the lists of frames beside result files, which *.txt means too. InputError: there are
    no others."""
    results = [path for path in files if not path.name.endswith(".frames.txt")]
    if files and not results:
        raise InputError("it lists the frames of a result file", "name the result file", file=files[0])
    if len(results) < len(files):
        print(f"note: {len(files) - len(results)} lists of frames (.frames.txt) are no result files")
    return results


def read_result_files(arguments: Namespace) -> list[Found]:
    """What the result files say of their frames, or of the subset of them that is asked for."""
    test_set, files = open_test_frames(arguments), arguments.detections
    with_endings = len({path.resolve().with_suffix("") for path in files}) < len(files)  # a.txt and a.json
    names, found = unique_names([path if with_endings else path.with_suffix("") for path in files], "_"), []
    for path, name in zip(files, names, strict=True):
        own, detections = test_set, read_detections(path, test_set.frames)
        if detections.id_format:
            print(f"note: {path}: {detections.id_format}")
        if arguments.subset:
            others = detections.other_frames  # those outside of the subset are left out on purpose
            frames = choose_frames(test_set, arguments.subset)
            own, detections = select_frames(test_set, detections, frames)
            detections = replace(detections, other_frames=others)
        found.append(Found(name, own, detections, own.pair_set or arguments.data_root))
    return found


def open_test_frames(arguments: Namespace) -> GroundTruth:
    """People of the frames that the result files speak of.

    Ids of a file count along its own companion, else along --image-list, else along the annotation
    JSON. Without --image-list all files have to mean the same frames.
    """
    if arguments.data:
        pairs = open_pairs(arguments.data, pairs_root(arguments.data, arguments.data_root or ""), "test")
        if arguments.show_errors:
            pairs = replace(pairs, lwir_range=find_lwir_range(pairs))
        return load_ground_truth(pairs, pairs.frames)
    if arguments.image_list:
        return load_ground_truth(arguments.annotations, read_image_list(arguments.image_list))
    companions = [path for path in map(frames_path, arguments.detections) if path.exists()]
    if not companions:
        return load_ground_truth(arguments.annotations)
    lists = [read_image_list(path) for path in companions]
    if len(companions) < len(arguments.detections):
        lists.append(list(load_ground_truth(arguments.annotations).frames))
    if any(other != lists[0] for other in lists):
        problem = "the result files' ids mean different lists of frames"
        remedy = "evaluate them one by one, or name the frames to evaluate with --image-list"
        raise InputError(problem, remedy, file=companions[0])
    return load_ground_truth(arguments.annotations, lists[0])


def choose_frames(test_set: GroundTruth, subset: str) -> list[str]:
    """The frames of a subset: a time of day, a scene, or an image list."""
    if subset in SUBSETS:
        chosen = np.array(test_set.frames)[test_set.in_subset(subset)].tolist()
        if not chosen:
            raise InputError(f"no frame is of subset {subset!r}", "choose another with --subset")
        return chosen
    if not Path(subset).is_file():
        known = f"{', '.join(SUBSETS)} or a file"
        raise InputError(f"--subset {subset!r} is neither a subset nor an image list", f"choose {known}")
    return read_image_list(subset, any_id=True)


# ------------------------------------------------------------------- a checkpoint


def evaluate_checkpoint(arguments: Namespace) -> list[Found]:
    """Run a checkpoint's network over its test frames and write the detections into its folder.

    The run's own `detections.txt` is written again by its own `last.pt`, finished and on its own
    data, alone; any other evaluation has its checkpoint and its flags in its files' names
    (`detections-best.txt`). Nothing is written where the folder is read-only.
    """
    # Here, because result files are evaluated without torch.
    from datasets import TEST_LOADER_KEYS, test_loader
    from engine.checkpoint import choose_checkpoint
    from utils import choose_device, choose_precision, compile_model, detect_frames, open_network

    path = choose_checkpoint(arguments.checkpoint, find_folder(CHECKPOINTS))
    device = choose_device(arguments.device)
    given = {"data": arguments.data or KAIST * bool(arguments.kaist), "data_root": arguments.data_root}
    given |= {"test_list": arguments.image_list, "test_annotations": arguments.annotations}
    given = {name: str(value) for name, value in given.items() if value}
    model, config, epoch = open_network(path, device, arguments.experiment, **given)
    limit_workers(config)
    if config.data != KAIST and (arguments.image_list or arguments.annotations):
        problem = "it brings its own list and labels"
        raise InputError(problem, "leave --image-list and --annotations away", file=config.data)
    check_blackout(config, arguments.blackout)
    root, test_set = open_testing(**pick(config, *TEST_SET_KEYS))
    if arguments.subset:
        test_set, _ = select_frames(test_set, NO_DETECTIONS, choose_frames(test_set, arguments.subset))
    loader = test_loader(root, test_set, model, without=arguments.blackout, **pick(config, *TEST_LOADER_KEYS))
    precision = choose_precision(config.precision, device)
    network = compile_model(model, arguments.compile)
    detections, masks = detect_frames(network, loader, precision, **pick(config, *DETECT_KEYS))
    if masks:
        print("masks: " + ", ".join(f"{name} {value:.3f}" for name, value in masks.items()))
    sure = np.bincount(detections.frame_idxs[detections.scores >= SURE])
    if n_full := np.count_nonzero(sure >= config.max_boxes):
        most = f"the most detections there can be, {config.max_boxes}, at scores from {SURE} up"
        print(f"warning: {n_full} frames with {most}: this network is not trained")

    unfinished = epoch is not None and epoch < config.epochs
    weights = f"epoch{epoch}" * unfinished if path.stem == "last" else path.stem
    flags = [Path(os.path.abspath(flag)).stem for flag in (*arguments.data_flags, arguments.subset) if flag]
    blackout = f"without-{arguments.blackout}" if arguments.blackout else ""
    suffix = "".join(f"-{part}" for part in (weights, *flags, blackout) if part)
    name = path.resolve().parent.name + suffix
    writable = os.access(path.parent, os.W_OK)
    with tempfile.TemporaryDirectory() as spare:
        result = (path.parent if writable else Path(spare)) / f"detections{suffix}.txt"
        detections = write_and_read(result, detections, test_set.frames)
    if writable:
        print(f"detections: {result}")
        pictures = [path.with_name(f"{kind}{suffix}.png") for kind in ("miss_rate", "errors")]
    else:
        print(f"note: {path.parent} is read-only, so nothing is written there; --out FILE draws the curves")
        pictures = [None, None]
    return [Found(name, test_set, detections, root, *pictures)]


def check_blackout(config: Namespace, blackout: str) -> None:
    """Refuse to blank a modality of a network that takes no other, and warn where it was never
    trained to do without."""
    if blackout and len(MODALITIES[config.input_mode]) == 1:
        problem = f"a network with input {config.input_mode!r} cannot do without a modality"
        raise InputError(problem, "leave --blackout and --without away")
    if blackout and not config.modality_dropout:
        print(f"warning: it was not trained to do without {blackout} (MODALITY_DROPOUT)")


def show_errors(found: Sequence[Found], arguments: Namespace) -> None:
    """Draw the sheet of each detector's errors."""
    from kaist.error_sheet import draw_errors

    for f in found:
        path = arguments.errors_out or f.errors or Path(ERRORS)
        path = path if len(found) == 1 else path.with_stem(f"{path.stem}-{f.name}")
        n_views, n_absent = draw_errors(f.test_set, f.detections, f.root, arguments.show_errors, path, f.name)
        missing = f" ({n_absent} of {n_views} images are missing)" if n_absent else ""
        print(f"errors of {f.name}: {path}{missing}")


if __name__ == "__main__":
    run_script(main)
