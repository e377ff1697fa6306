"""Evaluate detectors on KAIST: miss rate tables, curves, and pictures of errors.

Result files need neither a checkpoint nor torch:

    python eval.py --detections result.txt other.json --annotations KAIST_annotation.json

Without --detections a checkpoint is evaluated. The default is that of the newest finished run:

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

CHECKPOINTS = "checkpoints"  # parent folder of the runs
ANNOTATIONS = ""  # default of --annotations
DATA_ROOT = ""  # default of --data-root
OUT = "miss_rate.png"  # picture of the curves
COMPARISON = "comparison.png"  # picture of --compare
ERRORS = "errors.png"  # picture of --show-errors
DEVICE = "auto"  # auto, cpu, cuda, mps
COMPILE = "off"  # torch.compile of a checkpoint's network: on, off
SUBSETS = ("day", "night", "campus", "road", "downtown")
MAX_ERRORS = 1000  # errors of each kind in one picture
CONFIDENT_SCORE = 0.3  # an untrained network reaches MAX_BOXES detections above this score
PICTURE_ENDINGS = (".png", ".jpg", ".pdf")


def main() -> None:
    """Evaluate result files or a checkpoint, or compare finished runs."""
    arguments = parse_arguments()
    if arguments.compare:
        runs = [find_run(path, find_folder(CHECKPOINTS)) for path in arguments.compare]
        compare_runs(runs, arguments.bootstrap, arguments.by_video, arguments.out or Path(COMPARISON))
        return
    results = read_result_files(arguments) if arguments.detections else [evaluate_checkpoint(arguments)]
    print(f"ground truth: {results[0].test_set.source}")
    kwargs = {"resamples": arguments.bootstrap, "by_video": arguments.by_video, "with_coco": True}
    scores = [score(result.name, result.test_set, result.detections, **kwargs) for result in results]
    print_scores(scores, arguments.all_setups)
    if arguments.json:
        write_json(scores, arguments.json, curves=True)
        print(f"numbers: {arguments.json}")
    try:
        if curves := arguments.out or results[0].curves:
            draw_curves(scores, curves)
            print(f"curves: {curves}")
        if arguments.show_errors:
            show_errors(results, arguments)
    except ModuleNotFoundError as error:
        print(f"note: no picture was drawn: {error.name} is not installed (pip install matplotlib pillow)")


class DetectorResult(NamedTuple):
    """The detections of one detector in a test set.

    root: the folder of the images, or a set of pairs.
    curves, errors: default paths of the pictures; None if the folder is read-only.
    """

    name: str
    test_set: GroundTruth
    detections: Detections
    root: Path | PairSet | None
    curves: Path | None = Path(OUT)
    errors: Path | None = Path(ERRORS)


def parse_arguments() -> Namespace:
    """Parse and check the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_mutually_exclusive_group().add_argument
    add("--detections", nargs="+", type=Path, metavar="FILE", help="result files, text or COCO JSON")
    add("--checkpoint", type=Path, help="a checkpoint or a run's folder (default: the newest finished run)")
    add("--compare", nargs="+", type=Path, metavar="RUN", help="finished runs, by folder or name")
    add = parser.add_argument_group("test set").add_argument
    annotations = "KAIST_annotation.json, a folder of annotations or a KAIST root"
    add("--annotations", type=Path, default=ANNOTATIONS or None, help=annotations)
    add("--data-root", type=Path, default=DATA_ROOT or None, help="folder with images/")
    kaist = "full KAIST data set: sets --data-root, --image-list and --annotations unless they are given"
    add("--kaist", type=Path, metavar="ROOT", help=kaist)
    pairs = "another set of pairs: the path of its pairs.json, or its name with --data-root"
    add("--data", metavar="SET", help=f"{pairs} (docs/your-data.md)")
    image_list = "frames to evaluate; also the frames of result files without a .frames.txt file"
    add("--image-list", type=Path, metavar="FILE", help=image_list)
    add("--subset", help=f"evaluate only {', '.join(SUBSETS)}, or the frames of an image list")
    group = parser.add_argument_group("checkpoint")
    add = group.add_mutually_exclusive_group().add_argument
    blackouts = ("visible", "lwir", "sides-a", "sides-b", "surroundings")
    parts = "opposite halves of both (sides-a, sides-b) or LWIR except its centre (surroundings)"
    add("--blackout", choices=blackouts, default="", help=f"blank a modality, {parts}")
    add("--without", choices=blackouts[:2], default="", dest="blackout", help="short for --blackout")
    published = "--checkpoint is an author's file of weights for this row's network (docs/published.md)"
    group.add_argument("--experiment", default="", metavar="ROW", help=published)
    group.add_argument("--device", default=DEVICE, help="auto, cpu, cuda, mps (default: %(default)s)")
    speed = "use torch.compile, which is faster for long lists (default: %(default)s)"
    group.add_argument("--compile", choices=("on", "off"), default=COMPILE, help=speed)
    add = parser.add_argument_group("output").add_argument
    add("--all-setups", action="store_true", help="also print the nine setups and the scenes")
    add("--bootstrap", type=int, default=0, metavar="N", help="95%% intervals from N resamples")
    add("--by-video", action="store_true", help="resample whole videos instead of frames")
    add("--json", type=out_path(), metavar="FILE", help="write all numbers and curves")
    place = "default: in the checkpoint's folder, else"
    picture = out_path(*PICTURE_ENDINGS)
    add("--out", type=picture, metavar="FILE", help=f"picture of the curves ({place} {OUT})")
    errors = "draw the N false positives of highest score and the N largest missed persons"
    add("--show-errors", type=int, default=0, metavar="N", help=errors)
    add("--errors-out", type=picture, metavar="FILE", help=f"picture of the errors ({place} {ERRORS})")
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser: OneLineParser, arguments: Namespace) -> None:
    """Refuse bad flags, replace --kaist by the flags it stands for, and make suffixes of output files."""
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    unused = sorted(given - {"compare", "bootstrap", "by_video", "out"}) if arguments.compare else []
    files, data, root = arguments.detections, arguments.data, arguments.kaist
    own_lists = arguments.image_list or arguments.annotations or root
    has_images = arguments.data_root or data or root
    for is_wrong, message in (
        (unused, f"--compare takes no --{''.join(unused[:1]).replace('_', '-')}"),
        (files and data and own_lists, "--data takes no --image-list, --annotations or --kaist"),
        (files and not (arguments.annotations or data or root), "--detections needs --annotations or --data"),
        (files and arguments.show_errors and not has_images, "--show-errors needs --data-root"),
        (files and arguments.blackout, "--blackout and --without need a checkpoint, not --detections"),
        (not 0 <= arguments.bootstrap <= MAX_RESAMPLES, f"--bootstrap is not from 0 to {MAX_RESAMPLES}"),
        (not 0 <= arguments.show_errors <= MAX_ERRORS, f"--show-errors is not from 0 to {MAX_ERRORS}"),
    ):
        if is_wrong:
            parser.error(message)
    check_experiment(parser, arguments)
    flags = (arguments.data_root, arguments.image_list, arguments.annotations, root, arguments.subset)
    names = [Path(os.path.abspath(flag)).stem for flag in (dataset_name(data or ""), *flags) if flag]
    arguments.suffixes = [*names, f"without-{arguments.blackout}"] if arguments.blackout else names
    if root:
        lists = {"test_list": arguments.image_list, "test_annotations": arguments.annotations}
        parts = find_kaist(root, {name: str(path) for name, path in lists.items() if path}, ["test"])
        arguments.data_root = arguments.data_root or root
        arguments.image_list = arguments.image_list or root / parts["test_list"]
        arguments.annotations = arguments.annotations or root / parts["test_annotations"]
    written = arguments.json, arguments.out, arguments.errors_out
    check_folders(*written)
    files = arguments.detections = drop_frame_lists(files or [])
    read = arguments.annotations, arguments.image_list, arguments.checkpoint, Path(arguments.subset or "")
    check_overwrite(written, [*files, *map(frames_path, files), *read])
    for path in files:
        if not os.path.isfile(path):  # Path.is_file raises an error for some names
            raise InputError("result file not found", "check --detections", file=path)


# ------------------------------------------------------------------- result files


def drop_frame_lists(files: Sequence[Path]) -> list[Path]:
    """Drop the .frames.txt files of result files, which a pattern such as *.txt includes.

    Raises:
        InputError: There are no other files.
    """
    results = [path for path in files if not path.name.endswith(".frames.txt")]
    if files and not results:
        raise InputError("a list of frames, not a result file", "name the result file", file=files[0])
    if len(results) < len(files):
        print(f"note: ignored {len(files) - len(results)} lists of frames (.frames.txt)")
    return results


def read_result_files(arguments: Namespace) -> list[DetectorResult]:
    """Read the result files, and select the frames of --subset."""
    test_set, files = open_test_set(arguments), arguments.detections
    same_stems = len({path.resolve().with_suffix("") for path in files}) < len(files)  # a.txt and a.json
    names = unique_names([path if same_stems else path.with_suffix("") for path in files], "_")
    results = []
    for path, name in zip(files, names, strict=True):
        ground_truth, detections = test_set, read_detections(path, test_set.frames)
        if detections.id_format:
            print(f"note: {path}: {detections.id_format}")
        if arguments.subset:
            n_other = detections.other_frames  # rows that --subset removes are not reported
            frames = choose_frames(test_set, arguments.subset)
            ground_truth, detections = select_frames(test_set, detections, frames)
            detections = replace(detections, other_frames=n_other)
        root = ground_truth.pair_set or arguments.data_root
        results.append(DetectorResult(name, ground_truth, detections, root))
    return results


def open_test_set(arguments: Namespace) -> GroundTruth:
    """Load the ground truth of the frames to evaluate.

    The list of frames is that of --image-list, or of the result files' .frames.txt files, or else of
    the annotation JSON. Without --image-list all result files must have the same list.
    """
    if arguments.data:
        pairs = open_pairs(arguments.data, pairs_root(arguments.data, arguments.data_root or ""), "test")
        if arguments.show_errors:
            pairs = replace(pairs, lwir_range=find_lwir_range(pairs))
        return load_ground_truth(pairs, pairs.frames)
    if arguments.image_list:
        return load_ground_truth(arguments.annotations, read_image_list(arguments.image_list))
    frame_files = [path for path in map(frames_path, arguments.detections) if path.exists()]
    if not frame_files:
        return load_ground_truth(arguments.annotations)
    lists = [read_image_list(path) for path in frame_files]
    if len(frame_files) < len(arguments.detections):
        lists.append(list(load_ground_truth(arguments.annotations).frames))
    if any(other != lists[0] for other in lists):
        problem = "the result files have different lists of frames"
        remedy = "evaluate them one by one, or choose the frames to evaluate with --image-list"
        raise InputError(problem, remedy, file=frame_files[0])
    return load_ground_truth(arguments.annotations, lists[0])


def choose_frames(test_set: GroundTruth, subset: str) -> list[str]:
    """The frames of a subset: a time of day, a scene, or the path of an image list."""
    if subset in SUBSETS:
        frames = np.array(test_set.frames)[test_set.in_subset(subset)].tolist()
        if not frames:
            raise InputError(f"the test set has no frame in subset {subset!r}", "choose another --subset")
        return frames
    if not Path(subset).is_file():
        problem = f"--subset {subset!r} is neither a subset nor an image list"
        raise InputError(problem, f"choose {', '.join(SUBSETS)} or a file")
    return read_image_list(subset, any_id=True)


# ------------------------------------------------------------------- a checkpoint


def evaluate_checkpoint(arguments: Namespace) -> DetectorResult:
    """Run a checkpoint's network on its test set and write the detections into its folder.

    Only the finished `last.pt` of a run with its own test set overwrites the run's `detections.txt`.
    Other files are named after the checkpoint and the flags (`detections-best.txt`). A read-only folder is
    left as it is.
    """
    # Imported here, because result files are evaluated without torch.
    from datasets import TEST_LOADER_KEYS, test_loader
    from engine.checkpoint import choose_checkpoint
    from utils import choose_device, choose_precision, compile_model, detect_frames, open_network

    path = choose_checkpoint(arguments.checkpoint, find_folder(CHECKPOINTS))
    device = choose_device(arguments.device)
    changes = {"data": arguments.data or KAIST * bool(arguments.kaist), "data_root": arguments.data_root}
    changes |= {"test_list": arguments.image_list, "test_annotations": arguments.annotations}
    changes = {name: str(value) for name, value in changes.items() if value}
    model, config, epoch = open_network(path, device, arguments.experiment, **changes)
    limit_workers(config)
    if config.data != KAIST and (arguments.image_list or arguments.annotations):
        problem = "this set has its own list and labels"
        raise InputError(problem, "omit --image-list and --annotations", file=config.data)
    check_blackout(config, arguments.blackout)
    root, test_set = open_testing(**pick(config, *TEST_SET_KEYS))
    if arguments.subset:
        test_set, _ = select_frames(test_set, NO_DETECTIONS, choose_frames(test_set, arguments.subset))
    loader = test_loader(root, test_set, model, without=arguments.blackout, **pick(config, *TEST_LOADER_KEYS))
    precision = choose_precision(config.precision, device)
    network = compile_model(model, arguments.compile)
    detections, mask_aps = detect_frames(network, loader, precision, **pick(config, *DETECT_KEYS))
    if mask_aps:
        print("masks: " + ", ".join(f"{name} {value:.3f}" for name, value in mask_aps.items()))
    per_frame = np.bincount(detections.frame_idxs[detections.scores >= CONFIDENT_SCORE])
    if n_full := np.count_nonzero(per_frame >= config.max_boxes):
        limit = f"the maximum of {config.max_boxes} detections at scores of {CONFIDENT_SCORE} or more"
        print(f"warning: {n_full} frames have {limit}: this network is not trained")

    is_unfinished = epoch is not None and epoch < config.epochs
    weights = f"epoch{epoch}" * is_unfinished if path.stem == "last" else path.stem
    suffix = "".join(f"-{part}" for part in (weights, *arguments.suffixes) if part)
    is_writable = os.access(path.parent, os.W_OK)
    with tempfile.TemporaryDirectory() as temporary:
        result = (path.parent if is_writable else Path(temporary)) / f"detections{suffix}.txt"
        detections = write_and_read(result, detections, test_set.frames)
    if is_writable:
        print(f"detections: {result}")
        pictures = [path.with_name(f"{kind}{suffix}.png") for kind in ("miss_rate", "errors")]
    else:
        print(f"note: {path.parent} is read-only, so no files are written; --out FILE draws the curves")
        pictures = [None, None]
    return DetectorResult(path.resolve().parent.name + suffix, test_set, detections, root, *pictures)


def check_blackout(config: Namespace, blackout: str) -> None:
    """Refuse --blackout for a network with one modality, and warn if it was trained without dropout."""
    if blackout and len(MODALITIES[config.input_mode]) == 1:
        problem = f"a network with input {config.input_mode!r} has a single modality"
        raise InputError(problem, "omit --blackout and --without")
    if blackout and not config.modality_dropout:
        print(f"warning: the network was not trained to work without {blackout} (MODALITY_DROPOUT)")


def show_errors(results: Sequence[DetectorResult], arguments: Namespace) -> None:
    """Draw a picture of the errors of each detector."""
    from kaist.error_sheet import draw_errors

    n = arguments.show_errors
    for r in results:
        path = arguments.errors_out or r.errors or Path(ERRORS)
        path = path if len(results) == 1 else path.with_stem(f"{path.stem}-{r.name}")
        n_views, n_missing = draw_errors(r.test_set, r.detections, r.root, n, path, r.name)
        missing = f" ({n_missing} of {n_views} images are missing)" if n_missing else ""
        print(f"errors of {r.name}: {path}{missing}")


if __name__ == "__main__":
    run_script(main)
