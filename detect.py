"""Find people in single KAIST images or pairs, or in whole folders of them.

    python detect.py data/demo/images/set06/V000/visible/I00000.jpg

Name either modality's file (or folder); its partner is found beside it, and a network trained with
MODALITY_DROPOUT does without one. Each image becomes a picture with boxes and scores, visible and
LWIR side by side; the boxes are printed and kept in `detections.csv`.
"""

from __future__ import annotations

import signal
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from engine.checkpoint import choose_checkpoint, load_checkpoint
from engine.config import OneLineParser
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, MODALITIES
from kaist.files import InputError, make_folder, run_script, write_atomically
from kaist.images import MEAN_COLOUR, join_modalities, read_image
from model import SSD300, build_model
from utils import choose_device, choose_precision, detect_image

CHECKPOINTS = "checkpoints"  # the newest run here is used unless --checkpoint names one
MIN_SCORE = 0.3  # draw and print detections from this score up
OUT = "detections"  # folder for pictures and detections.txt
DEVICE = "auto"  # auto, cpu, cuda, mps
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")


def main() -> None:
    """Detect in every image named, one picture each."""
    arguments = parse_arguments()
    if not 0 <= arguments.min_score <= 1:
        raise InputError(f"--min-score {arguments.min_score}", "it is a share, from 0 to 1")
    device = choose_device(arguments.device)
    make_folder(arguments.out)
    path = choose_checkpoint(arguments.checkpoint, Path(CHECKPOINTS))
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    pairs = [find_pair(image, config) for image in list_images(arguments.images)]
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last).eval()
    print(f"{len(pairs)} image{'s' * (len(pairs) != 1)}, weights of {path}")
    alone = sum(len(pair) < len(MODALITIES[config["input_mode"]]) for pair in pairs)
    if alone:
        print(f"note: {alone} without the other modality, which is blanked")

    names = output_names(pairs)
    rows = []
    for pair, name in zip(pairs, names, strict=True):
        boxes, scores = detect_pair(model, pair, config | {"min_score": arguments.min_score})
        picture = draw_pair(pair, boxes, scores)
        out = arguments.out / f"{name}.png"
        write_atomically(out, lambda beside, p=picture: p.save(beside, format="PNG"))
        print(f"{out}: {len(boxes)} people")
        for (x, y, w, h), score in zip(boxes.tolist(), scores.tolist(), strict=True):
            print(f"  x {x:6.1f}  y {y:6.1f}  w {w:6.1f}  h {h:6.1f}  score {score:.3f}")
            rows.append(f"{name},{x:.4f},{y:.4f},{w:.4f},{h:.4f},{score:.8f}\n")
    text = "image,x,y,w,h,score\n" + "".join(rows)
    write_atomically(arguments.out / "detections.csv", lambda beside: beside.write_text(text))


def parse_arguments() -> Any:
    """The command line."""
    parser: ArgumentParser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, help="images or folders of images")
    parser.add_argument("--checkpoint", type=Path, help="default: the newest run's last.pt")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(OUT), help="default: %(default)s")
    parser.add_argument("--device", default=DEVICE, help="default: %(default)s")
    return parser.parse_args()


def list_images(paths: list[Path]) -> Iterator[Path]:
    """The images named, and those in the folders named, by name."""
    for path in paths:
        if not path.exists():
            raise InputError("no such image or folder", "check the path", file=path)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
            if not found:
                raise InputError("no images in this folder", "name a visible/ or lwir/ folder", file=path)
            yield from found
        elif path.suffix.lower() not in IMAGE_ENDINGS:
            raise InputError("not an image", f"name one of {', '.join(IMAGE_ENDINGS)}", file=path)
        else:
            yield path


def find_pair(path: Path, config: dict[str, Any]) -> dict[str, Path]:
    """Modality -> file of one frame; at least those that the network needs.

    An image outside of a `visible` or `lwir` folder is taken for the one modality of a
    single-modality network. A network trained with modality dropout needs but one of two.

    Raises:
        InputError: a modality that the network needs is not there.
    """
    input_mode = config["input_mode"]
    needed = MODALITIES[input_mode]
    if path.parent.name not in ("visible", "lwir"):
        if len(needed) == 1:
            return {needed[0]: path}
        raise InputError(
            f"a network with input {input_mode!r} needs visible and LWIR",
            "keep them in …/visible/ and …/lwir/ under the same name",
            file=path,
        )
    pair = {m: path.parent.parent / m / path.name for m in ("visible", "lwir")}
    for modality in needed:
        if not pair[modality].exists() and not config.get("modality_dropout"):
            raise InputError(
                f"the {modality} image is missing, which a network with input {input_mode!r} needs",
                "add it, or use a network trained without it or with MODALITY_DROPOUT",
                file=pair[modality],
            )
    return {m: p for m, p in pair.items() if p.exists()}


def output_names(pairs: list[dict[str, Path]]) -> list[str]:
    """A distinct name for each pair: set00_V000_I00000 from KAIST's layout, else the file's."""
    names: list[str] = []
    for pair in pairs:
        path = next(iter(pair.values()))
        folders = path.parts[-4:-2] if path.parent.name in ("visible", "lwir") else ()
        name = "_".join([*folders, path.stem])
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def detect_pair(
    model: SSD300, pair: dict[str, Path], config: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (k, 4) xywh pixels of the frame and scores (k,), by descending score."""
    wanted = MODALITIES[config["input_mode"]]
    images = {m: read_image(path, m) for m, path in pair.items() if m in wanted}
    precision = choose_precision(config["precision"], model.priors.device)
    frame = join_modalities(images, config["input_mode"], MEAN_COLOUR)
    nms_settings = {name: config[name] for name in ("min_score", "nms_iou", "max_boxes")}
    return detect_image(model, frame, precision, test_flip=config.get("test_flip", False), **nms_settings)


def draw_pair(pair: dict[str, Path], boxes: np.ndarray, scores: np.ndarray) -> Image.Image:
    """The frame's modalities side by side, with boxes (k, 4) xywh pixels and their scores."""
    panels = []
    font = ImageFont.load_default(14)
    for modality, path in pair.items():
        pixels = read_image(path, modality)
        panel = Image.fromarray(pixels if modality == "visible" else pixels.repeat(3, axis=2))
        draw = ImageDraw.Draw(panel)
        for (x, y, w, h), score in zip(boxes.tolist(), scores.tolist(), strict=True):
            draw.rectangle((x, y, x + w, y + h), outline="lime", width=2)
            draw.text(
                (x, max(0, y - 17)),
                f"{score:.2f}",
                fill="lime",
                font=font,
                stroke_width=1,
                stroke_fill="black",
            )
        panels.append(panel)
    sheet = Image.new("RGB", (FRAME_WIDTH * len(panels), FRAME_HEIGHT))
    for i, panel in enumerate(panels):
        sheet.paste(panel, (FRAME_WIDTH * i, 0))
    return sheet


if __name__ == "__main__":
    run_script(main)
