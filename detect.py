"""Find people in images or pairs of them, or in whole folders.

    python detect.py data/demo/images/set06/V000/visible/I00000.jpg
    python detect.py --visible photo.png --lwir thermal.png
    python detect.py --pair "drive/*_rgb.jpg" "drive/*_ir.png" --animation drive.gif --json drive.json

Name either modality's file, or a folder of any depth: the partner is found in the visible/ or lwir/
folder beside its own, and a network trained with MODALITY_DROPOUT does without one. Other names are
paired by --pair. Each image becomes a picture with boxes and scores, the modalities side by side,
annotated objects dashed where KAIST's annotations are at hand. The boxes are kept in `detections.csv`,
in pixels of the image itself.
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

from engine.config import CHOICES, DETECT_KEYS, check_experiment, find_folder, pick
from kaist.annotations import FRAME_ID, FRAME_SIZE, MODALITIES, Objects, open_test_annotations
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

CHECKPOINTS = "checkpoints"  # the newest finished run here is used unless --checkpoint names one
MIN_SCORE = 0.3  # draw and print detections from this score up
OUT = "detections"  # folder for pictures and detections.csv
DEVICE = "auto"  # auto, cpu, cuda, mps
ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
MAX_LISTED = 20  # images that are told one by one, of more a progress bar; and boxes of one image

MISSING = (
    "keep both in visible/ and lwir/ under one name, name them by --pair or --visible and --lwir, or use a "
    "network trained with MODALITY_DROPOUT"
)

Pair = dict[str, Path]  # modality -> file of one frame


def main() -> None:
    """Detect in every image named, one picture each. InputError: some images could not be used; the others
    were."""
    arguments = parse_arguments()
    failures: list[InputError] = []
    images = list_images(arguments.images, failures, arguments.out)
    pairs = [{"visible": arguments.visible, "lwir": arguments.lwir}] if arguments.visible else []
    matched = match_names(*arguments.pair) if arguments.pair else []
    if not images and not pairs and not matched:
        raise InputError("there is no image to look at", "the lines above say why")

    # Here, so that a wrong flag or name is answered at once: torch takes a while.
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
    pairs += [pair for pair in matched if can_use(pair, config, failures, len(matched))]
    if alone := sum(not pair.keys() >= set(MODALITIES[config.input_mode]) for pair in pairs):
        print(f"note: {count_of(alone)} without the other modality, which is blanked")

    names, table = output_names(pairs), arguments.out / "detections.csv"
    written = [table, *(arguments.out / f"{name}.png" for name in names), *together(arguments)]
    check_overwrite(written, [path, *(file for pair in pairs for file in pair.values())])
    annotated, few = read_annotated(pairs), len(pairs) <= MAX_LISTED
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # name of a picture -> boxes, scores
    n_rescaled, start = 0, time.monotonic()
    bar = tqdm(pairs, "detecting", unit="image", leave=False, disable=few)
    for pair, name in zip(bar, names, strict=True):
        try:
            views, boxes, scores = detect_pair(model, pair, config, precision)
        except InputError as error:
            skip(error, failures, len(pairs))
            continue
        n_rescaled += config.data == KAIST and any(view.size != FRAME_SIZE for view in views.values())
        objects = annotated.get(next(iter(pair.values())))
        picture, out = draw_pair(views, boxes, scores, objects, name), arguments.out / f"{name}.png"
        make_folder(arguments.out)
        write_atomically(out, lambda beside, p=picture: p.save(beside, format="PNG", compress_level=1))
        write_rows(table, name, boxes, scores, first=not found)
        if arguments.show and len(found) < MAX_LISTED:
            arguments.show = ImageShow.show(picture, name)
            if not arguments.show:
                print("note: there is no program here that shows pictures")
        found[name] = boxes, scores
        if few:
            print_boxes(out, boxes, scores)
    if not few:
        speed, n = len(found) / (time.monotonic() - start), sum(len(scores) for _, scores in found.values())
        print(f"{arguments.out}: {count_of(len(found))}, {format_people(n)}, {speed:.1f} images/s")
    if found:
        write_together(found, arguments)
    if n_rescaled:
        print(f"note: {count_of(n_rescaled)} of another size than KAIST's; boxes are in their own pixels")
    full = [np.count_nonzero(scores >= MIN_SCORE) >= config.max_boxes for _, scores in found.values()]
    if n_full := sum(full):
        most = f"the most there can be, {config.max_boxes}, at scores from {MIN_SCORE} up"
        print(f"warning: {count_of(n_full)} with {most}: this network is not trained")
    if failures:
        raise InputError(f"{count_of(len(failures))} could not be used", "the lines above say why")


def detect_pair(
    model: Detector, pair: Pair, config: Namespace, precision: torch.dtype
) -> tuple[dict[str, Image.Image], np.ndarray, np.ndarray]:
    """A frame's images, boxes (k, 4) xywh in pixels of the first, and scores (k,). InputError:
    an image cannot be used."""
    from kaist.images import join_modalities, load_image, to_array
    from utils import detect_image

    views = {modality: load_image(file, modality, config.lwir_range) for modality, file in pair.items()}
    fitted, wanted = fit_views(views, pair, config.data), MODALITIES[config.input_mode]
    arrays = {modality: to_array(view) for modality, view in fitted.items() if modality in wanted}
    frame = join_modalities(arrays, config.input_mode, model.filler())
    boxes, scores = detect_image(model, frame, precision, **pick(config, *DETECT_KEYS))
    width, height = next(iter(views.values())).size
    return views, boxes * np.tile((width / frame.shape[1], height / frame.shape[0]), 2), scores


def fit_views(views: dict[str, Image.Image], pair: Pair, data: str) -> dict[str, Image.Image]:
    """The views as the network saw those it learned: KAIST's scaled to 640x512, others of one size.
    InputError: the modalities of a pair that is not KAIST's are of two sizes."""
    from kaist.images import rescale

    if data == KAIST:
        return {modality: rescale(view) for modality, view in views.items()}
    if len({view.size for view in views.values()}) > 1:
        sizes = " and ".join("{}x{}".format(*view.size) for view in views.values())
        problem = f"its visible and LWIR images are {sizes}"
        raise InputError(problem, "register and scale both to one size", file=pair["lwir"])
    return views


def write_together(found: dict[str, tuple[np.ndarray, np.ndarray]], arguments: Namespace) -> None:
    """Write what is asked for of all pictures (name -> boxes, scores) in one file: COCO's JSON, a sheet, an
    animation."""
    from kaist.picture import save_animation, save_sheet

    if arguments.json:
        entries = [
            {"image_id": name, "category_id": PEDESTRIAN_ID, "bbox": box, "score": score}
            for name, (boxes, scores) in found.items()
            for box, score in zip(boxes.round(4).tolist(), scores.tolist(), strict=True)
        ]
        write_text(arguments.json, json.dumps(entries))
    pictures = [arguments.out / f"{name}.png" for name in found]
    for path, save in ((arguments.sheet, save_sheet), (arguments.animation, save_animation)):
        if path:
            print(f"{path}: {count_of(save(path, pictures))}")


def count_of(n: int) -> str:
    """A number of images, in words."""
    return f"{n} image" if n == 1 else f"{n} images"


def print_boxes(out: Path, boxes: np.ndarray, scores: np.ndarray) -> None:
    """Tell a picture's boxes (k, 4) xywh and scores (k,), the best `MAX_LISTED` of them."""
    print(f"{out}: {format_people(len(scores))}")
    for (x, y, w, h), score in zip(boxes[:MAX_LISTED].tolist(), scores[:MAX_LISTED].tolist(), strict=True):
        print(f"  x {x:6.1f}  y {y:6.1f}  w {w:6.1f}  h {h:6.1f}  score {score:.3f}")
    if len(scores) > MAX_LISTED:
        print(f"  and {len(scores) - MAX_LISTED} more, in detections.csv")


def parse_arguments() -> Namespace:
    """The command line. InputError: flags that cannot be used, or not together."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", nargs="*", type=Path, help="images, or folders that are searched for them")
    add("--visible", type=Path, metavar="FILE", help="the visible image of a pair of any names")
    add("--lwir", type=Path, metavar="FILE", help="its LWIR image")
    named = "files of other names: two folders whose files have the same names, or two patterns whose * agree"
    add("--pair", nargs=2, metavar=("VISIBLE", "LWIR"), help=named)
    add("--checkpoint", type=Path, help="a checkpoint or a run's folder (default: the newest finished run)")
    whose = "the checkpoint is its author's file of this row's network (docs/published.md)"
    add("--experiment", default="", metavar="ROW", help=whose)
    add("--min-score", type=float, default=MIN_SCORE, help="what is drawn and kept (%(default)s)")
    add("--out", type=Path, default=Path(OUT), help="folder of the pictures (%(default)s)")
    add("--json", type=out_path(), metavar="FILE", help="all boxes as COCO has results, image_id the name")
    sheet, film = out_path(".png", ".jpg"), out_path(".gif", ".webp")
    add("--sheet", type=sheet, metavar="FILE", help="a picture of all pictures, small: png, jpg")
    add("--animation", type=film, metavar="FILE", help="all pictures one after the other: gif, webp")
    add("--show", action="store_true", help=f"open each picture, of up to {MAX_LISTED}")
    add("--device", default=DEVICE, help="auto, cpu, cuda, mps (%(default)s)")
    add("--precision", choices=CHOICES["precision"], help="default: the checkpoint's own")
    arguments = parser.parse_args()
    check_folders(*(path for path in together(arguments) if arguments.out not in path.parents))
    check_experiment(parser, arguments)
    if not 0 <= arguments.min_score <= 1:
        parser.error(f"--min-score {arguments.min_score} is not a number from 0 to 1")
    if bool(arguments.visible) != bool(arguments.lwir):
        parser.error("--visible and --lwir belong together; name a lone image without a flag")
    if not arguments.images and not arguments.visible and not arguments.pair:
        parser.error("name an image or a folder, or --visible and --lwir, or --pair")
    return arguments


def together(arguments: Namespace) -> list[Path]:
    """The files that are asked for of all pictures together."""
    return [path for path in (arguments.json, arguments.sheet, arguments.animation) if path]


def skip(error: InputError, failures: list[InputError], n_images: int) -> None:
    """Tell an error in one line and go on, or raise it where there is nothing else to go on with."""
    if n_images == 1:
        raise error
    failures.append(error)
    tqdm.write(f"error: {error}", file=sys.stderr)


def list_images(paths: Sequence[Path], failures: list[InputError], out: Path | None = None) -> list[Path]:
    """The images named, and those anywhere in the folders named, by path; but for pictures of ours, in a
    folder `out` below a folder named."""
    images: list[Path] = []
    for path in paths:
        found, error = [path], None
        if path.is_dir():
            own = out.resolve() if out and out.resolve() != path.resolve() else None
            files = (p for p in path.rglob("*") if p.suffix.lower() in ENDINGS)
            found = sorted((p for p in files if own not in p.resolve().parents), key=in_order)
            error = ("no image in this folder", f"it may hold {', '.join(ENDINGS)}")
        elif not path.exists():
            found, error = [], ("no such image or folder", "check the path")
        elif path.suffix.lower() not in ENDINGS:
            found, error = [], ("not an image", f"name one of {', '.join(ENDINGS)}")
        if not found:
            skip(InputError(*error, file=path), failures, len(paths))
        images += found
    return images


def in_order(path: Path | str) -> list[tuple[int, str]]:
    """A key that sorts names as people count: frame 2 before frame 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


def match_names(visible: str, lwir: str) -> list[Pair]:
    """The frames of two folders, by path below them, or of two patterns, by what their * stand for; with one
    modality where the other has no such name. InputError: one of them has no file, or two of one frame."""
    found = {m: find_files(Path(), name) for m, name in (("visible", visible), ("lwir", lwir))}
    keys = sorted(found["visible"] | found["lwir"], key=in_order)
    return [{m: own[key] for m, own in found.items() if key in own} for key in keys]


def find_pairs(images: Sequence[Path], config: Namespace, failures: list[InputError]) -> list[Pair]:
    """The frames that images belong to, each once; at least the modalities that the network needs.

    An image outside of a `visible` or `lwir` folder is taken for the one modality of a
    single-modality network.
    """
    pairs: dict[tuple[Path, ...], Pair] = {}
    for path in images:
        pair, lone = {MODALITIES[config.input_mode][0]: path}, path.parent.name not in ("visible", "lwir")
        if not lone:
            pair = {m: file for m in ("visible", "lwir") if (file := partner(path, m))}
        if can_use(pair, config, failures, len(images), lone):
            pairs[tuple(pair.values())] = pair
    return list(pairs.values())


def can_use(pair: Pair, config: Namespace, failures: list[InputError], n: int, lone: bool = False) -> bool:
    """Whether a frame has what the network needs; if not, that is told.

    A network trained with modality dropout needs but one of two; n: how many frames are named; lone:
    its one image may be of either modality.
    """
    needed = MODALITIES[config.input_mode]
    missing = [m for m in needed if m not in pair]
    if not missing or (config.modality_dropout and len(missing) < len(needed) and not lone):
        return True
    problem = f"the {missing[0]} image is missing, and a network with input {config.input_mode!r} needs it"
    skip(InputError(problem, MISSING, file=next(iter(pair.values()))), failures, n)
    return False


def partner(path: Path, modality: str) -> Path | None:
    """The file of a modality of an image's frame, of any ending, if there is one."""
    folder = path.parents[1] / modality
    names = [path.name, *(path.stem + form(ending) for ending in ENDINGS for form in (str.lower, str.upper))]
    return next((folder / name for name in names if (folder / name).exists()), None)


def output_names(pairs: Sequence[Pair]) -> list[str]:
    """A distinct name for each pair: set00_V000_I00000 from KAIST's layout, else the file's."""
    last: Counter[str] = Counter()  # number given of each name, whatever its case; 0: it is free
    names = []
    for pair in pairs:
        path = next(iter(pair.values()))
        folders = path.parts[-4:-2] if frame_of(path) else ()
        name = base = "_".join([*folders, path.stem])
        while last[name.casefold()]:
            last[base.casefold()] += 1
            name = f"{base}-{last[base.casefold()]}"
        last[name.casefold()] += 1
        names.append(name)
    return names


def frame_of(path: Path) -> tuple[Path, str] | None:
    """The KAIST root and the frame id of an image in KAIST's layout."""
    path = path.absolute()
    frame_id = "/".join((*path.parts[-4:-2], path.stem))
    return (path.parents[4], frame_id) if FRAME_ID.fullmatch(frame_id) and len(path.parents) > 4 else None


def read_annotated(pairs: Sequence[Pair]) -> dict[Path, Objects]:
    """First file of a pair -> the annotated objects of its frame, where KAIST's annotations are at hand."""
    frames: dict[Path, dict[Path, str]] = defaultdict(dict)
    for path in (next(iter(pair.values())) for pair in pairs):
        if frame := frame_of(path):
            frames[frame[0]][path] = frame[1]
    found = {}
    for root, ids in frames.items():
        with suppress(InputError):
            annotations = open_test_annotations(root, list(ids.values()))
            for path, frame_id in ids.items():
                found[path] = annotations.read(frame_id)
    return found


def write_rows(path: Path, name: str, boxes: np.ndarray, scores: np.ndarray, first: bool) -> None:
    """Append an image's detections to the table; `first` begins it anew."""
    rows = [["image", "x", "y", "w", "h", "score"]] if first else []
    for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
        rows.append([name, *(f"{value:.4f}" for value in box), f"{score:.8f}"])
    how = {"mode": "w" if first else "a", "encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    try:
        with path.open(**how) as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        problem = f"cannot write it ({error.strerror})"
        raise InputError(problem, "free some room or choose another --out", file=path) from None


if __name__ == "__main__":
    run_script(main)
