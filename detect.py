"""Detect persons in images, in pairs of images, or in whole folders.

    python detect.py data/demo/images/set06/V000/visible/I00000.jpg
    python detect.py --visible photo.png --lwir thermal.png
    python detect.py --pair "drive/*_rgb.jpg" "drive/*_ir.png" --animation drive.gif --json drive.json

Name a file of either modality or a folder. The other file of a pair has the same name in the visible/
or lwir/ folder next to it; --pair is for other names. A network trained with MODALITY_DROPOUT also works
with one modality. Each image gives a picture with boxes and scores, both modalities side by side; KAIST's
annotations are dashed if they are found. Boxes are saved to `detections.csv`, in pixels of the image.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from engine.config import DETECT_KEYS, check_experiment, find_folder, pick
from engine.validation import CHOICES
from kaist.annotations import FRAME_ID, FRAME_SIZE, IMAGE_SUFFIXES, MODALITIES, Objects, open_test_annotations
from kaist.files import (
    InputError,
    OneLineParser,
    check_folders,
    check_overwrite,
    make_folder,
    out_path,
    run_script,
    write_atomically,
    write_text,
)
from kaist.pair_sets import find_files
from kaist.report import format_people
from kaist.results import PEDESTRIAN_ID
from kaist.sources import KAIST

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ssd.layers import Detector

CHECKPOINTS = "checkpoints"  # parent folder of the runs
MIN_SCORE = 0.3  # default of --min-score
OUT = "detections"  # default of --out
DEVICE = "auto"  # auto, cpu, cuda, mps
MAX_LISTED = 20  # images whose boxes are printed, instead of a progress bar; printed boxes of an image

Pair = dict[str, Path]  # modality -> file of one frame


def main() -> None:
    """Detect persons in all images named, and draw a picture of each. Reports images that cannot be used."""
    arguments = parse_arguments()
    failures: list[InputError] = []
    images = list_images(arguments.images, failures, arguments.out)
    pairs = [{"visible": arguments.visible, "lwir": arguments.lwir}] if arguments.visible else []
    matched = match_files(*arguments.pair) if arguments.pair else []
    if not images and not pairs and not matched:
        raise InputError("there is no image to use", "see the errors above")

    # Imported here, because torch takes a while, and wrong flags and paths should be reported at once.
    from PIL import ImageShow

    from engine.checkpoint import choose_checkpoint
    from kaist.demo import streets_note
    from kaist.picture import draw_pair
    from utils import choose_device, choose_precision, open_network

    device = choose_device(arguments.device)
    path = choose_checkpoint(arguments.checkpoint, find_folder(CHECKPOINTS))
    model, config, _ = open_network(path, device, arguments.experiment, min_score=arguments.min_score)
    if note := streets_note(config.data_root):
        print(note)
    precision = choose_precision(arguments.precision or config.precision, device)
    pairs += find_pairs(images, config, failures)
    pairs += [pair for pair in matched if check_modalities(pair, config, failures, len(matched))]
    if n_single := sum(not pair.keys() >= set(MODALITIES[config.input_mode]) for pair in pairs):
        print(f"note: {count_images(n_single)} without the other modality, which is blanked")

    names, table = output_names(pairs), arguments.out / "detections.csv"
    written = [table, *(arguments.out / f"{name}.png" for name in names), *combined_outputs(arguments)]
    check_overwrite(written, [path, *(file for pair in pairs for file in pair.values())])
    annotations, is_listed = read_annotations(pairs), len(pairs) <= MAX_LISTED
    detections: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # name of a picture -> boxes, scores
    n_rescaled, start = 0, time.monotonic()
    bar = tqdm(pairs, "detecting", unit="image", leave=False, disable=is_listed)
    for pair, name in zip(bar, names, strict=True):
        try:
            views, boxes, scores = detect_pair(model, pair, config, precision)
        except InputError as error:
            report_failure(error, failures, len(pairs))
            continue
        n_rescaled += config.data == KAIST and any(view.size != FRAME_SIZE for view in views.values())
        objects = annotations.get(next(iter(pair.values())))
        picture, out = draw_pair(views, boxes, scores, objects, name), arguments.out / f"{name}.png"
        make_folder(arguments.out)
        write_atomically(out, lambda temporary, p=picture: p.save(temporary, format="PNG", compress_level=1))
        write_rows(table, name, boxes, scores, first=not detections)
        if arguments.show and len(detections) < MAX_LISTED:
            arguments.show = ImageShow.show(picture, name)
            if not arguments.show:
                print("note: this computer has no program that can show pictures")
        detections[name] = boxes, scores
        if is_listed:
            print_boxes(out, boxes, scores)
    all_scores = [scores for _, scores in detections.values()]
    if not is_listed:
        speed, n_boxes = len(detections) / (time.monotonic() - start), sum(map(len, all_scores))
        n_images = count_images(len(detections))
        print(f"{arguments.out}: {n_images}, {format_people(n_boxes)}, {speed:.1f} images/s")
    if detections:
        write_combined(detections, arguments)
    if n_rescaled:
        print(f"note: {count_images(n_rescaled)} of another size than KAIST's; boxes are in their own pixels")
    if n_full := sum(np.count_nonzero(scores >= MIN_SCORE) >= config.max_boxes for scores in all_scores):
        limit = f"the maximum of {config.max_boxes} detections at scores of {MIN_SCORE} or more"
        print(f"warning: {count_images(n_full)} with {limit}: this network is not trained")
    if failures:
        raise InputError(f"{count_images(len(failures))} could not be used", "see the errors above")


def detect_pair(
    model: Detector, pair: Pair, config: Namespace, precision: torch.dtype
) -> tuple[dict[str, Image.Image], np.ndarray, np.ndarray]:
    """A frame's images, and the detections: boxes (k, 4) xywh, pixels of the first image; scores (k,)."""
    from kaist.images import join_modalities, load_image, to_array
    from utils import detect_image

    views = {modality: load_image(file, modality, config.lwir_range) for modality, file in pair.items()}
    resized, modalities = fit_views(views, pair, config.data), MODALITIES[config.input_mode]
    arrays = {modality: to_array(view) for modality, view in resized.items() if modality in modalities}
    frame = join_modalities(arrays, config.input_mode, model.filler())
    boxes, scores = detect_image(model, frame, precision, **pick(config, *DETECT_KEYS))
    width, height = next(iter(views.values())).size
    return views, boxes * np.tile((width / frame.shape[1], height / frame.shape[0]), 2), scores


def fit_views(views: dict[str, Image.Image], pair: Pair, data: str) -> dict[str, Image.Image]:
    """Resize the images of a frame to KAIST's 640x512; those of other data sets keep their size.

    Raises:
        InputError: The two images of another data set differ in size.
    """
    from kaist.images import rescale

    if data == KAIST:
        return {modality: rescale(view) for modality, view in views.items()}
    if len({view.size for view in views.values()}) > 1:
        sizes = " and ".join("{}x{}".format(*view.size) for view in views.values())
        problem = f"its visible and LWIR images are {sizes}"
        raise InputError(problem, "register and scale both to one size", file=pair["lwir"])
    return views


def write_combined(detections: dict[str, tuple[np.ndarray, np.ndarray]], arguments: Namespace) -> None:
    """Write the files of --json, --sheet and --animation; detections: picture name -> boxes, scores."""
    from kaist.picture import save_animation, save_sheet

    if arguments.json:
        entries = [
            {"image_id": name, "category_id": PEDESTRIAN_ID, "bbox": box, "score": score}
            for name, (boxes, scores) in detections.items()
            for box, score in zip(boxes.round(4).tolist(), scores.tolist(), strict=True)
        ]
        write_text(arguments.json, json.dumps(entries))
    pictures = [arguments.out / f"{name}.png" for name in detections]
    for path, save in ((arguments.sheet, save_sheet), (arguments.animation, save_animation)):
        if path:
            print(f"{path}: {count_images(save(path, pictures))}")


def count_images(n: int) -> str:
    """ "1 image", "2 images", …"""
    return f"{n} image" if n == 1 else f"{n} images"


def print_boxes(out: Path, boxes: np.ndarray, scores: np.ndarray) -> None:
    """Print the number of boxes (k, 4) xywh in a picture, and the first `MAX_LISTED` with scores (k,)."""
    print(f"{out}: {format_people(len(scores))}")
    for (x, y, w, h), score in zip(boxes[:MAX_LISTED].tolist(), scores[:MAX_LISTED].tolist(), strict=True):
        print(f"  x {x:6.1f}  y {y:6.1f}  w {w:6.1f}  h {h:6.1f}  score {score:.3f}")
    if len(scores) > MAX_LISTED:
        print(f"  and {len(scores) - MAX_LISTED} more, in detections.csv")


def parse_arguments() -> Namespace:
    """Parse and check the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", nargs="*", type=Path, help="images, or folders, which are searched with their subfolders")
    add("--visible", type=Path, metavar="FILE", help="the visible image of a pair, with --lwir")
    add("--lwir", type=Path, metavar="FILE", help="the LWIR image of a pair, with --visible")
    pair = "two folders with files of the same names, or two patterns whose * stand for the same text"
    add("--pair", nargs=2, metavar=("VISIBLE", "LWIR"), help=pair)
    add("--checkpoint", type=Path, help="a checkpoint or a run's folder (default: the newest finished run)")
    published = "--checkpoint is an author's file of weights for this row's network (docs/published.md)"
    add("--experiment", default="", metavar="ROW", help=published)
    add("--min-score", type=float, default=MIN_SCORE, help="minimum score of a box (default: %(default)s)")
    add("--out", type=Path, default=Path(OUT), help="folder of the output (default: %(default)s)")
    add("--json", type=out_path(), metavar="FILE", help="write all boxes as COCO results")
    sheet, animation = out_path(".png", ".jpg"), out_path(".gif", ".webp")
    add("--sheet", type=sheet, metavar="FILE", help="write a sheet of all pictures, scaled down: png, jpg")
    add("--animation", type=animation, metavar="FILE", help="write an animation of all pictures: gif, webp")
    add("--show", action="store_true", help=f"open the pictures in a viewer, at most {MAX_LISTED}")
    add("--device", default=DEVICE, help="auto, cpu, cuda, mps (default: %(default)s)")
    add("--precision", choices=CHOICES["precision"], help="(default: that of the checkpoint)")
    arguments = parser.parse_args()
    if not 0 <= arguments.min_score <= 1:
        parser.error(f"--min-score {arguments.min_score} is not a number from 0 to 1")
    if bool(arguments.visible) != bool(arguments.lwir):
        parser.error("--visible and --lwir must be used together; a single image needs no flag")
    if not arguments.images and not arguments.visible and not arguments.pair:
        parser.error("name images or folders, or use --visible and --lwir, or --pair")
    check_experiment(parser, arguments)
    check_folders(*(path for path in combined_outputs(arguments) if arguments.out not in path.parents))
    return arguments


def combined_outputs(arguments: Namespace) -> list[Path]:
    """The files to write that contain the detections of all images."""
    return [path for path in (arguments.json, arguments.sheet, arguments.animation) if path]


def report_failure(error: InputError, failures: list[InputError], n_images: int) -> None:
    """Print the error of one image and add it to `failures`; raise it if there is a single image."""
    if n_images == 1:
        raise error
    failures.append(error)
    tqdm.write(f"error: {error}", file=sys.stderr)


def list_images(paths: Sequence[Path], failures: list[InputError], out: Path | None = None) -> list[Path]:
    """List the images named and those in the folders named and their subfolders.

    The folder `out`, which has pictures of earlier runs, is skipped unless it is named itself.
    """
    images: list[Path] = []
    for path in paths:
        files, problem = [path], ""
        if path.is_dir():
            skipped = out.resolve() if out and out.resolve() != path.resolve() else None
            found = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            files = sorted((p for p in found if skipped not in p.resolve().parents), key=natural_key)
            problem = "" if files else "no image in this folder"
        elif not path.exists():
            problem = "no such image or folder"
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            problem = "not an image"
        if problem:
            remedy = f"choose a folder or a file of {', '.join(IMAGE_SUFFIXES[:5])}"
            report_failure(InputError(problem, remedy, file=path), failures, len(paths))
        else:
            images += files
    return images


def natural_key(path: Path | str) -> list[tuple[int, str]]:
    """Sort key that orders names by the numbers in them: frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


def match_files(visible: str, lwir: str) -> list[Pair]:
    """Pair the files of two folders, or of two patterns with *, by name; unpaired ones are frames, too."""
    files = {"visible": find_files(Path(), visible), "lwir": find_files(Path(), lwir)}
    keys = sorted(files["visible"] | files["lwir"], key=natural_key)
    return [{m: by_key[key] for m, by_key in files.items() if key in by_key} for key in keys]


def find_pairs(images: Sequence[Path], config: Namespace, failures: list[InputError]) -> list[Pair]:
    """The frames of the images, without duplicates, that have the modalities the network needs.

    An image outside a `visible` or `lwir` folder is used by a network with a single modality.
    """
    pairs: dict[tuple[Path, ...], Pair] = {}
    for path in images:
        is_loose = path.parent.name not in ("visible", "lwir")
        pair = {MODALITIES[config.input_mode][0]: path}
        if not is_loose:
            pair = {m: file for m in ("visible", "lwir") if (file := find_partner(path, m))}
        if check_modalities(pair, config, failures, len(images), is_loose):
            pairs[tuple(pair.values())] = pair
    return list(pairs.values())


def check_modalities(
    pair: Pair, config: Namespace, failures: list[InputError], n_images: int, is_loose: bool = False
) -> bool:
    """Whether a frame has the modalities that the network needs; if not, report a failure.

    A network trained with modality dropout needs one of two, but not a loose image of unknown modality.
    """
    needed = MODALITIES[config.input_mode]
    missing = [m for m in needed if m not in pair]
    if not missing or (config.modality_dropout and len(missing) < len(needed) and not is_loose):
        return True
    problem = f"the {missing[0]} image is missing, and a network with input {config.input_mode!r} needs it"
    remedy = "use one name in visible/ and lwir/, or --pair, or a network trained with MODALITY_DROPOUT"
    report_failure(InputError(problem, remedy, file=next(iter(pair.values()))), failures, n_images)
    return False


def find_partner(path: Path, modality: str) -> Path | None:
    """The file of a modality of an image's frame, with any image suffix, or None."""
    folder = path.parents[1] / modality
    names = [path.name, *(path.stem + suffix for suffix in IMAGE_SUFFIXES)]
    return next((folder / name for name in names if (folder / name).exists()), None)


def output_names(pairs: Sequence[Pair]) -> list[str]:
    """A unique name for each frame: set00_V000_I00000 in KAIST's layout, else the file's name."""
    numbers: Counter[str] = Counter()  # lower-case name -> last number used for it; 0: the name is free
    names = []
    for pair in pairs:
        path = next(iter(pair.values()))
        folders = path.parts[-4:-2] if kaist_frame(path) else ()
        name = base = "_".join([*folders, path.stem])
        while numbers[name.casefold()]:
            numbers[base.casefold()] += 1
            name = f"{base}-{numbers[base.casefold()]}"
        numbers[name.casefold()] += 1
        names.append(name)
    return names


def kaist_frame(path: Path) -> tuple[Path, str] | None:
    """The root and the frame id of an image in KAIST's layout, else None."""
    path = path.absolute()
    frame_id = "/".join((*path.parts[-4:-2], path.stem))
    return (path.parents[4], frame_id) if FRAME_ID.fullmatch(frame_id) and len(path.parents) > 4 else None


def read_annotations(pairs: Sequence[Pair]) -> dict[Path, Objects]:
    """First file of a frame -> its annotated objects, for frames with KAIST annotations."""
    frames: dict[Path, dict[Path, str]] = defaultdict(dict)  # root -> file -> frame id
    for path in (next(iter(pair.values())) for pair in pairs):
        if frame := kaist_frame(path):
            frames[frame[0]][path] = frame[1]
    objects = {}
    for root, ids in frames.items():
        with suppress(InputError):
            annotations = open_test_annotations(root, list(ids.values()))
            for path, frame_id in ids.items():
                objects[path] = annotations.read(frame_id)
    return objects


def write_rows(path: Path, name: str, boxes: np.ndarray, scores: np.ndarray, first: bool) -> None:
    """Append an image's boxes (k, 4) xywh and scores (k,) to a CSV file; `first` creates the file."""
    rows = [["image", "x", "y", "w", "h", "score"]] if first else []
    for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
        rows.append([name, *(f"{value:.4f}" for value in box), f"{score:.8f}"])
    mode = "w" if first else "a"
    try:
        with path.open(mode, encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        problem = f"cannot write it ({error.strerror})"
        raise InputError(problem, "free disk space or choose another --out", file=path) from None


if __name__ == "__main__":
    run_script(main)
