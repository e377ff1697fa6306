"""Convert a set of visible and LWIR pairs to COCO JSON, YOLO text or KAIST's layout.

    python -m tools.convert mine/pairs.json --to kaist --out data/mine
    python -m tools.convert llvip --data-root LLVIP --to coco --out data/llvip

A set is a description file, pairs.json (docs/your-data.md), or one of the names kaist, llvip, flir and
cvc14. COCO and YOLO keep the images unchanged and add a pairs.json that describes the result. KAIST's
layout has 8-bit frames scaled to 640x512; train.py --data-root takes it.
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

JPEG_QUALITY = 95  # of scaled frames
IMAGE_FOLDERS = {"visible": "images", "lwir": "lwir"}  # in the COCO and YOLO output
LABEL_PATHS = {"coco": "annotations/{split}.json", "yolo": "labels/{split}"}


def main() -> None:
    """Read the set, then write it: the images first, so that an interrupted conversion cannot be read."""
    arguments = parse_arguments()
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError("this is not an empty folder", "choose a new folder by --out", file=arguments.out)
    sets = {split: open_pairs(arguments.data, arguments.data_root, split) for split in arguments.split}
    files = [{pair["visible"] for pair in pairs.images.values()} for pairs in sets.values()]
    if len(files) > 1 and (shared := files[0] & files[1]):
        problem = f"{len(shared)} frames are both in the training and the test set"
        raise InputError(problem, "separate them by {split} or lists", file=min(shared))
    if arguments.to == "kaist":
        lwir_range = find_lwir_range(sets.get("train") or sets["test"])
        if lwir_range[1] and "train" not in sets:  # the test set has to be scaled like the training set
            lwir_range = find_lwir_range(open_pairs(arguments.data, arguments.data_root, "train"))
        write_kaist(sets, arguments.out, lwir_range)
        result = f"--data-root {arguments.out}"
    else:
        write_coco_or_yolo(sets, arguments.to, arguments.out)
        result = str(arguments.out / "pairs.json")
    for split, pairs in sets.items():
        rows = [row for frame_rows in pairs.objects.values() for row in frame_rows]
        n_persons = sum(row.label == "person" and not row.ignore for row in rows)
        counts = f"{n_persons} persons, {len(rows) - n_persons} ignored objects"
        print(f"{split}: {len(pairs.frames)} frames, {counts}")
    print(f"written: {result}")


def parse_arguments() -> Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="SET", help=f"a description file, pairs.json, or {', '.join(NAMED_SETS)}")
    add("--data-root", type=Path, metavar="FOLDER", help="root folder of the set")
    add("--to", choices=("coco", "yolo", "kaist"), required=True, help="output format")
    add("--out", type=Path, required=True, metavar="FOLDER", help="output folder, new or empty")
    add("--split", nargs="+", choices=SPLITS, default=SPLITS, help="splits to convert (default: both)")
    return parser.parse_args()


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy if the file system cannot link."""
    make_folder(target.parent)
    try:
        os.link(source.resolve(), target)
    except OSError:
        write_atomically(target, partial(shutil.copyfile, source))


def write_new(path: Path, text: str) -> None:
    """Write a text file and create its folder."""
    make_folder(path.parent)
    write_text(path, text)


def write_coco_or_yolo(sets: dict[str, PairSet], form: str, out: Path) -> None:
    """Write images/SPLIT/ID (visible), lwir/SPLIT/ID, the labels and pairs.json; form: "coco" or "yolo"."""
    all_rows = [row for pairs in sets.values() for rows in pairs.objects.values() for row in rows]
    classes = {yolo_class(row) if form == "yolo" else row.label for row in all_rows}
    names = ["person", *sorted(classes - {"person"})]
    for split, pairs in sets.items():
        label_path, images = out / LABEL_PATHS[form].format(split=split), []
        # Sorted like the frames that open_pairs returns, so that COCO's image ids count in their order.
        for frame_id in tqdm(sorted(pairs.frames), split, unit="frame", leave=False):
            files, size, rows = pairs.images[frame_id], pairs.sizes[frame_id], pairs.objects[frame_id]
            for modality, folder in IMAGE_FOLDERS.items():
                name = f"{frame_id}{files[modality].suffix}"
                link_or_copy(files[modality], out / folder / split / name)
            images.append((f"{frame_id}{files['visible'].suffix}", size, rows))
            if form == "yolo":
                write_new(label_path / f"{frame_id}.txt", yolo_text(rows, size, names))
        if form == "coco":
            write_new(label_path, json.dumps(coco_content(images)) + "\n")
    description = {modality: f"{folder}/{{split}}" for modality, folder in IMAGE_FOLDERS.items()}
    description |= {"labels": LABEL_PATHS[form], "person": names[:1], "ignore": names[1:]}
    if form == "yolo":
        description["names"] = names
        text = "".join(f"{'val' if split == 'test' else split}: images/{split}\n" for split in sets)
        write_new(out / "data.yaml", f"path: .\n{text}names: {json.dumps(names)}\n")  # for Ultralytics
    if night := next(iter(sets.values())).night:
        description["night"] = night
    write_new(out / "pairs.json", json.dumps(description, indent=1) + "\n")


def write_kaist(sets: dict[str, PairSet], out: Path, lwir_range: tuple[float, float]) -> None:
    """Write 640x512 frames in KAIST's layout, one JSON for all frames, names.csv and the image lists."""
    kaist_names = {split: kaist_ids(pairs, split) for split, pairs in sets.items()}
    if lwir_range[1]:
        print("LWIR values {:g} to {:g} are scaled to 0 to 255, others are clipped".format(*lwir_range))
    images, table, text = [], [("frame", "split", "visible", "lwir")], io.StringIO()
    for split, pairs in sets.items():
        write_frame = partial(write_kaist_frame, pairs, kaist_names[split], out, lwir_range)
        with ThreadPoolExecutor() as pool:
            done = pool.map(write_frame, pairs.frames)
            list(tqdm(done, split, len(pairs.frames), unit="frame", leave=False))
        for i, name in kaist_names[split].items():
            images.append((name, FRAME_SIZE, [scale(row, pairs.sizes[i]) for row in pairs.objects[i]]))
            table.append((name, split, pairs.images[i]["visible"], pairs.images[i]["lwir"]))
    csv.writer(text, lineterminator="\n").writerows(table)
    write_new(out / "names.csv", text.getvalue())
    write_new(out / JSON_NAME, json.dumps(coco_content(images, "im_name")) + "\n")
    for split, names in kaist_names.items():
        write_new(out / f"imageSets/{split}-all.txt", "".join(f"{name}\n" for name in names.values()))


def scale(row: ObjectRow, size: tuple[int, int]) -> ObjectRow:
    """Scale an object's box from a frame of `size` (width, height) to KAIST's, and give it a KAIST label."""
    label = row.label if row.label in KAIST_LABELS else "__ignore__"
    factors = [new / old for new, old in zip(FRAME_SIZE, size, strict=True)] * 2
    return row._replace(label=label, box=[a * b for a, b in zip(row.box, factors, strict=True)])


def write_kaist_frame(
    pairs: PairSet, kaist_names: dict[str, str], out: Path, lwir_range: tuple[float, float], frame_id: str
) -> None:
    """Write both images of a frame under its KAIST name; 8-bit images of 640x512 stay unchanged."""
    video, name = kaist_names[frame_id].rsplit("/", 1)
    for modality in ("visible", "lwir"):
        source = pairs.images[frame_id][modality]
        target = out / "images" / video / modality / name
        if pairs.sizes[frame_id] == FRAME_SIZE and not (modality == "lwir" and lwir_range[1]):
            link_or_copy(source, target.with_suffix(source.suffix))
            continue
        make_folder(target.parent)
        image = rescale(load_image(source, modality, lwir_range))
        save = partial(image.save, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        write_atomically(target.with_suffix(".jpg"), save)


if __name__ == "__main__":
    run_script(main)
