"""Writes a set of visible and LWIR pairs as COCO JSON, YOLO text or in KAIST's own layout.

    python -m tools.convert mine/pairs.json --to kaist --out data/mine
    python -m tools.convert llvip --data-root LLVIP --to coco --out data/llvip

A set is a description, pairs.json (docs/your-data.md), or kaist, llvip, flir or cvc14 by name. COCO and
YOLO keep images as they are, beside a pairs.json that describes the result. KAIST's layout has frames
scaled to 640x512 with 8 bits, and is trained on by train.py --data-root.
"""

import csv
import io
import json
import os
import shutil
from argparse import Namespace, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from engine.config import OneLineParser
from kaist.annotations import FRAME_SIZE, JSON_NAME, PairSet
from kaist.files import InputError, make_folder, run_script, write_atomically, write_text
from kaist.images import load_image, rescale
from kaist.labels import KAIST_LABELS, ObjectRow, coco_content, yolo_class, yolo_text
from kaist.pair_sets import NAMED_SETS, SPLITS, find_lwir_range, kaist_ids, open_pairs

JPEG_QUALITY = 95  # of frames that are scaled
FOLDERS = {"visible": "images", "lwir": "lwir"}  # of the images of COCO and YOLO
LABELS_AT = {"coco": "annotations/{split}.json", "yolo": "labels/{split}"}


def main() -> None:
    """Read the set, then write it; its description or lists last, so that an unfinished one is none."""
    arguments = parse_arguments()
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError("it holds something already", "choose a new folder by --out", file=arguments.out)
    sets = {split: open_pairs(arguments.data, arguments.data_root, split) for split in arguments.split}
    files = [{pair["visible"] for pair in pairs.images.values()} for pairs in sets.values()]
    if len(files) > 1 and (shared := files[0] & files[1]):
        problem = f"{len(shared)} frames are both to train and to test"
        raise InputError(problem, "tell them apart by {split} or lists", file=min(shared))
    if arguments.to == "kaist":
        deep = find_lwir_range(sets.get("train") or sets["test"])
        if deep[1] and "train" not in sets:  # it is that of the frames to train on, whatever is written
            deep = find_lwir_range(open_pairs(arguments.data, arguments.data_root, "train"))
        write_kaist(sets, arguments.out, deep)
        hint = f"--data-root {arguments.out}"
    else:
        write_plain(sets, arguments.to, arguments.out)
        hint = str(arguments.out / "pairs.json")
    for split, pairs in sets.items():
        rows = [row for own in pairs.objects.values() for row in own]
        people = sum(row.label == "person" and not row.ignore for row in rows)
        words = f"{people} people to learn, {len(rows) - people} objects to ignore"
        print(f"{split}: {len(pairs.frames)} frames, {words}")
    print(f"written: {hint}")


def parse_arguments() -> Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="SET", help=f"a description, pairs.json, or {', '.join(NAMED_SETS)}")
    add("--data-root", type=Path, metavar="FOLDER", help="where the set's paths begin")
    add("--to", choices=("coco", "yolo", "kaist"), required=True, help="the form to write")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for it")
    add("--split", nargs="+", choices=SPLITS, default=SPLITS, help="what to write (default: both)")
    return parser.parse_args()


def place_file(source: Path, target: Path) -> None:
    """A file under another name: a hard link where the disk can, else a copy."""
    make_folder(target.parent)
    try:
        os.link(source.resolve(), target)
    except OSError:
        write_atomically(target, partial(shutil.copyfile, source))


def write_new(path: Path, text: str) -> None:
    """Write a text file and make its folder."""
    make_folder(path.parent)
    write_text(path, text)


def write_plain(sets: dict[str, PairSet], form: str, out: Path) -> None:
    """The images as they are, images/<split>/<id>, visible, and lwir/<split>/<id>; their labels as COCO
    or YOLO has them; and the pairs.json of both."""
    every = [row for pairs in sets.values() for own in pairs.objects.values() for row in own]
    classes = {yolo_class(row) if form == "yolo" else row.label for row in every}
    names = ["person", *sorted(classes - {"person"})]
    for split, pairs in sets.items():
        place, images = out / LABELS_AT[form].format(split=split), []
        for frame_id in tqdm(sorted(pairs.frames), split, unit="frame", leave=False):  # as they are read
            size, rows, files = (of[frame_id] for of in (pairs.sizes, pairs.objects, pairs.images))
            for modality, folder in FOLDERS.items():
                name = f"{frame_id}{files[modality].suffix}"
                place_file(files[modality], out / folder / split / name)
            images.append((f"{frame_id}{files['visible'].suffix}", size, rows))
            if form == "yolo":
                write_new(place / f"{frame_id}.txt", yolo_text(rows, size, names))
        if form == "coco":
            write_new(place, json.dumps(coco_content(images)) + "\n")
    content = {modality: f"{folder}/{{split}}" for modality, folder in FOLDERS.items()}
    content |= {"labels": LABELS_AT[form], "person": names[:1], "ignore": names[1:]}
    if form == "yolo":  # with the file that Ultralytics reads
        content["names"] = names
        text = "".join(f"{'val' if split == 'test' else split}: images/{split}\n" for split in sets)
        write_new(out / "data.yaml", f"path: .\n{text}names: {json.dumps(names)}\n")
    if night := next(iter(sets.values())).night:
        content["night"] = night
    write_new(out / "pairs.json", json.dumps(content, indent=1) + "\n")


def write_kaist(sets: dict[str, PairSet], out: Path, deep: tuple[float, float]) -> None:
    """KAIST's layout at 640x512, one JSON for all frames, and names.csv; deep: as of `find_lwir_range`."""
    named = {split: kaist_ids(pairs, split) for split, pairs in sets.items()}
    if deep[1]:
        print("LWIR of {:g} … {:g} becomes 0 … 255, what lies beyond is clipped".format(*deep))
    images, table, text = [], [("frame", "split", "visible", "lwir")], io.StringIO()
    for split, pairs in sets.items():
        draw = partial(draw_frame, pairs, named[split], out, deep)
        with ThreadPoolExecutor() as pool:
            list(tqdm(pool.map(draw, pairs.frames), split, len(pairs.frames), unit="frame", leave=False))
        for i, name in named[split].items():
            images.append((name, FRAME_SIZE, [scale(row, pairs.sizes[i]) for row in pairs.objects[i]]))
            table.append((name, split, pairs.images[i]["visible"], pairs.images[i]["lwir"]))
    csv.writer(text, lineterminator="\n").writerows(table)
    write_new(out / "names.csv", text.getvalue())
    write_new(out / JSON_NAME, json.dumps(coco_content(images, "im_name")) + "\n")
    for split, ids in named.items():
        write_new(out / f"imageSets/{split}-all.txt", "".join(f"{name}\n" for name in ids.values()))


def scale(row: ObjectRow, size: tuple[int, int]) -> ObjectRow:
    """An object of a frame of `size` (width, height) as it lies in the frame scaled to KAIST's size, under
    a label that KAIST has."""
    label = row.label if row.label in KAIST_LABELS else "__ignore__"
    factors = [to / side for to, side in zip(FRAME_SIZE, size, strict=True)] * 2
    return row._replace(label=label, box=[a * b for a, b in zip(row.box, factors, strict=True)])


def draw_frame(
    pairs: PairSet, named: dict[str, str], out: Path, deep: tuple[float, float], frame_id: str
) -> None:
    """Both images of a frame under its KAIST name: as they are if they are 640x512 with 8 bits."""
    video, name = named[frame_id].rsplit("/", 1)
    for modality in ("visible", "lwir"):
        source = pairs.images[frame_id][modality]
        target = out / "images" / video / modality / name
        if pairs.sizes[frame_id] == FRAME_SIZE and not (modality == "lwir" and deep[1]):
            place_file(source, target.with_suffix(source.suffix))
            continue
        make_folder(target.parent)
        view = rescale(load_image(source, modality, deep))
        save = partial(view.save, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        write_atomically(target.with_suffix(".jpg"), save)


if __name__ == "__main__":
    run_script(main)
