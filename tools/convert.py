"""Writes a set of visible and LWIR pairs as COCO JSON, YOLO text or in KAIST's own layout.

    python -m tools.convert mine/pairs.json --to kaist --out data/mine
    python -m tools.convert llvip --data-root LLVIP --to coco --out data/llvip

A set is a description, pairs.json (docs/your-data.md), or kaist, llvip, flir or cvc14 by name. COCO and
YOLO keep images as they are, beside a pairs.json that describes the result. KAIST's layout has frames
scaled to 640x512 with 8 bits, and is trained on by train.py --data-root.
"""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from engine.config import OneLineParser
from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, JSON_NAME
from kaist.files import InputError, make_folder, run_script, write_atomically, write_text
from kaist.images import open_view, rescale
from kaist.label_formats import class_name, coco_content, scaled, yolo_lines
from kaist.pair_sets import NAMED, SPLITS, describe, find_lwir_range, kaist_ids, open_pairs
from kaist.pairs import PairSet
from tools.faults import LABELS

KAIST_SIZE = (FRAME_WIDTH, FRAME_HEIGHT)
JPEG_QUALITY = 95  # of frames that are scaled


def main() -> None:
    """Read the set, then write it; labels last, so that an unfinished one is none."""
    arguments = parse_arguments()
    describe(arguments.data, arguments.data_root)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError("it holds something already", "choose a new folder by --out", file=arguments.out)
    sets = {split: open_pairs(arguments.data, arguments.data_root, split) for split in arguments.split}
    check_apart(sets)
    make_folder(arguments.out)
    if arguments.to == "kaist":
        write_kaist(sets, arguments.out)
        hint = f"--data-root {arguments.out}"
    else:
        write_images(sets, arguments.out)
        {"coco": write_coco, "yolo": write_yolo}[arguments.to](sets, arguments.out)
        hint = str(arguments.out / "pairs.json")
    for split, pairs in sets.items():
        n = sum(len(own.labels) for own in pairs.objects.values())
        people = sum(int(own.is_person.sum()) for own in pairs.objects.values())
        words = f"{len(pairs.frames)} frames, {people} people to learn, {n - people} objects to ignore"
        print(f"{split}: {words}")
    print(f"written: {hint}")


def parse_arguments() -> Namespace:
    """The command line."""
    parser = OneLineParser(
        prog="python -m tools.convert", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", metavar="SET", help=f"a description, pairs.json, or {', '.join(NAMED)}")
    add("--data-root", type=Path, metavar="FOLDER", help="where the set's paths begin")
    add("--to", choices=("coco", "yolo", "kaist"), required=True, help="the form to write")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for it")
    add("--split", nargs="+", choices=SPLITS, default=SPLITS, help="what to write (default: both)")
    return parser.parse_args()


def check_apart(sets: dict[str, PairSet]) -> None:
    """Refuse a set whose frames to train on and to test on are the same, all or some."""
    files = [{pair["visible"] for pair in pairs.images.values()} for pairs in sets.values()]
    if len(files) > 1 and (shared := files[0] & files[1]):
        problem = f"{len(shared)} frames are both to train and to test"
        raise InputError(problem, "tell them apart by {split} or lists", file=min(shared))


# ------------------------------------------------------------------- COCO and YOLO


def write_images(sets: dict[str, PairSet], out: Path) -> None:
    """The images as they are: images/<split>/<id>, visible, and lwir/<split>/<id>."""
    for split, pairs in sets.items():
        for frame_id in tqdm(pairs.frames, f"images to {split}", unit="frame", leave=False):
            for modality, folder in (("visible", "images"), ("lwir", "lwir")):
                source = pairs.images[frame_id][modality]
                place_file(source, out / folder / split / f"{frame_id}{source.suffix}")


def place_file(source: Path, target: Path) -> None:
    """A file under another name: a hard link where the disk can, else a copy."""
    make_folder(target.parent)
    try:
        os.link(source.resolve(), target)
    except OSError:
        write_atomically(target, partial(shutil.copyfile, source))


def write_coco(sets: dict[str, PairSet], out: Path) -> None:
    """annotations/<split>.json of each split, and the description."""
    make_folder(out / "annotations")
    for split, pairs in sets.items():
        files = [f"{i}{pairs.images[i]['visible'].suffix}" for i in pairs.frames]
        sizes, objects = ([column[i] for i in pairs.frames] for column in (pairs.sizes, pairs.objects))
        write_text(out / f"annotations/{split}.json", json.dumps(coco_content(files, sizes, objects)) + "\n")
    labels = {label for pairs in sets.values() for own in pairs.objects.values() for label in own.labels}
    write_description(sets, out, "annotations/{split}.json", sorted(labels - {"person"}), {})


def write_yolo(sets: dict[str, PairSet], out: Path) -> None:
    """labels/<split>/<id>.txt of each frame, data.yaml as Ultralytics reads it, and the description."""
    every = [own for pairs in sets.values() for own in pairs.objects.values()]
    labels = {class_name(own, i) for own in every for i in range(len(own.labels))} - {"person"}
    names = ["person", *sorted(labels)]
    for split, pairs in sets.items():
        for frame_id in tqdm(pairs.frames, f"labels to {split}", unit="frame", leave=False):
            path = out / f"labels/{split}/{frame_id}.txt"
            make_folder(path.parent)
            write_text(path, yolo_lines(pairs.objects[frame_id], pairs.sizes[frame_id], names))
    text = "".join(f"{'val' if split == 'test' else split}: images/{split}\n" for split in sets)
    write_text(out / "data.yaml", f"path: .\n{text}names: {json.dumps(names)}\n")
    write_description(sets, out, "labels/{split}", names[1:], {"names": names})


def write_description(
    sets: dict[str, PairSet], out: Path, labels: str, ignored: list[str], more: dict[str, object]
) -> None:
    """The pairs.json of what was written."""
    content = {"visible": "images/{split}", "lwir": "lwir/{split}", "labels": labels, **more}
    content |= {"person": ["person"], "ignore": ignored}
    if night := next(iter(sets.values())).night:
        content["night"] = night
    write_text(out / "pairs.json", json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------- KAIST


def write_kaist(sets: dict[str, PairSet], out: Path) -> None:
    """images/, imageSets/, names.csv and one KAIST_annotation.json of all frames, at 640x512."""
    named = {split: kaist_ids(pairs, split) for split, pairs in sets.items()}
    deep = find_lwir_range(next(iter(sets.values())))
    if deep[1]:
        print("LWIR of {:g} … {:g} becomes 0 … 255, what lies beyond is clipped".format(*deep))
    files, objects, rows = [], [], ["frame,split,visible,lwir\n"]
    with ThreadPoolExecutor() as pool:
        for split, pairs in sets.items():
            draw = partial(draw_frame, pairs, named[split], out, deep)
            for _ in tqdm(pool.map(draw, pairs.frames), split, len(pairs.frames), unit="frame", leave=False):
                pass
            for i in pairs.frames:
                files.append(named[split][i])
                own = scaled(pairs.objects[i], pairs.sizes[i], KAIST_SIZE)
                labels = tuple(label if label in LABELS else "__ignore__" for label in own.labels)
                objects.append(replace(own, labels=labels))
                rows.append(
                    f"{named[split][i]},{split},{pairs.images[i]['visible']},{pairs.images[i]['lwir']}\n"
                )
    write_text(out / "names.csv", "".join(rows))
    content = coco_content(files, [KAIST_SIZE] * len(files), objects, "im_name")
    write_text(out / JSON_NAME, json.dumps(content) + "\n")
    make_folder(out / "imageSets")
    for split, ids in named.items():
        write_text(out / f"imageSets/{split}-all.txt", "".join(f"{name}\n" for name in ids.values()))


def draw_frame(
    pairs: PairSet, named: dict[str, str], out: Path, deep: tuple[float, float], frame_id: str
) -> None:
    """Both images of a frame under its KAIST name: as they are if they are 640x512 with 8 bits."""
    video, name = named[frame_id].rsplit("/", 1)
    for modality in ("visible", "lwir"):
        source = pairs.images[frame_id][modality]
        target = out / "images" / video / modality / name
        if pairs.sizes[frame_id] == KAIST_SIZE and not (modality == "lwir" and deep[1]):
            place_file(source, target.with_suffix(source.suffix))
            continue
        make_folder(target.parent)
        view = rescale(open_view(source, modality, deep))
        save = partial(view.save, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        write_atomically(target.with_suffix(".jpg"), save)


if __name__ == "__main__":
    run_script(main)
