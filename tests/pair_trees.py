"""Miniature sets of pairs in the layouts of LLVIP, FLIR aligned and CVC-14, and of a custom set."""

import json

import numpy as np
from PIL import Image

WORDS = {"xmin": 0, "ymin": 1, "xmax": 2, "ymax": 3}


def draw_pair(visible, lwir, size, boxes=(), seed=0, deep=False):
    """A pair of images of (width, height) in which xywh boxes are bright; LWIR of 16 bits if deep."""
    width, height = size
    rng = np.random.default_rng(seed)
    pixels = rng.integers(40, 90, (height, width, 4))
    for x, y, w, h in boxes:
        pixels[round(y) : round(y + h), round(x) : round(x + w)] += 120
    for path in (visible, lwir):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., :3].astype(np.uint8)).save(visible)
    if deep:
        Image.fromarray((20000 + 10 * pixels[..., 3]).astype(np.uint16)).save(lwir)
    else:
        Image.fromarray(pixels[..., 3].astype(np.uint8)).save(lwir)


def voc(size, objects):
    """A VOC XML; objects: (class, xywh, difficult)."""
    text = "<annotation><size><width>{}</width><height>{}</height><depth>3</depth></size>\n".format(*size)
    for label, (x, y, w, h), difficult in objects:
        sides = zip(WORDS, (x, y, x + w, y + h), strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        text += f"<object><name>{label}</name><difficult>{difficult}</difficult>"
        text += f"<bndbox>{box}</bndbox></object>\n"
    return text + "</annotation>\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def draw_llvip(root, n=3, size=(320, 256)):
    """LLVIP: {visible,infrared}/{train,test}/NNNNNN.jpg and one Annotations/ for all."""
    for s, split in enumerate(("train", "test")):
        for i in range(n):
            name, box = f"{10001 + 10000 * s + i:06d}", (40 + 10 * i, 60, 30, 90)
            draw_pair(*(root / f / split / f"{name}.jpg" for f in ("visible", "infrared")), size, [box], i)
            write(root / f"Annotations/{name}.xml", voc(size, [("person", box, 0)]))
    return root


def draw_flir(root):
    """FLIR aligned: all in JPEGImages, split by lists; persons, cars and bicycles."""
    names = [f"FLIR_{i:05d}" for i in (2, 3, 8, 8863)]
    for i, name in enumerate(names):
        files = (root / f"JPEGImages/{name}_{end}" for end in ("RGB.jpg", "PreviewData.jpeg"))
        objects = [("person", (100 + i, 200, 40, 100), 0), ("car", (300, 220, 150, 90), 0)]
        objects += [("bicycle", (500, 250, 60, 60), 0)] * (i == 1)
        draw_pair(*files, (640, 512), [box for _, box, _ in objects], i)
        write(root / f"Annotations/{name}_PreviewData.xml", voc((640, 512), objects))
    write(root / "align_train.txt", "".join(f"{name}_PreviewData\n" for name in names[:3]))
    write(root / "align_validation.txt", f"{names[3]}_PreviewData\n")
    return root


def draw_cvc14(root):
    """CVC-14: 640x471, by day and night, centres of boxes; one frame has no FIR image."""
    for t, time in enumerate(("Day", "Night")):
        for s, split in enumerate(("Train", "NewTest")):
            for i in range(3):
                name = f"2014_05_01_13_{i:02d}_0{len(time)}"
                visible, fir = (root / time / m / split / f"FramesPos/{name}.tif" for m in ("Visible", "FIR"))
                draw_pair(visible, fir, (640, 471), seed=i + 3 * s + 6 * t)
                Image.open(visible).convert("L").save(visible)  # its visible images are grey
                for m, shift in (("Visible", 0), ("FIR", 7)):
                    line = f"{200 + 10 * i + shift} 240 40 101 1 0 0 0 0 {i} 0\n"
                    write(root / time / m / split / f"Annotations/{name}.txt", line)
    (root / "Day/FIR/Train/FramesPos/2014_05_01_13_02_03.tif").unlink()
    return root


def draw_own(root, form="yolo", size=(160, 120), n=4, deep=False, height=50, **more):
    """A custom set with train/ and test/ folders; returns its pairs.json.

    form: of the labels, "yolo", "voc" or "coco"; classes person, rider and dog; height: of persons.
    """
    for s, split in enumerate(("train", "test")):
        images, annotations = [], []
        for i in range(n):
            boxes = [("person", (20 + 5 * i, 30, 20, height)), ("rider", (80, 40, 16, 40))]
            boxes += [("dog", (110, 90, 30, 20))] * (i % 2)
            files = root / f"colour/{split}/{i:03d}.png", root / f"thermal/{split}/{i:03d}.png"
            draw_pair(*files, size, [box for _, box in boxes], i + n * s, deep)
            images.append({"id": i, "file_name": f"{i:03d}.png", "width": size[0], "height": size[1]})
            names = ["person", "rider", "dog"]
            lines = ""
            for label, (x, y, w, h) in boxes:
                values = (x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]
                lines += f"{names.index(label)} " + " ".join(f"{v:.6f}" for v in values) + "\n"
                item = {"id": len(annotations), "image_id": i, "category_id": names.index(label) + 1}
                annotations.append(item | {"bbox": [x, y, w, h], "iscrowd": 0})
            if form == "yolo":
                write(root / f"labels/{split}/{i:03d}.txt", lines)
            if form == "voc":
                write(root / f"labels/{split}/{i:03d}.xml", voc(size, [(*box, 0) for box in boxes]))
        if form == "coco":
            categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
            content = {"images": images, "annotations": annotations, "categories": categories}
            write(root / f"labels/{split}.json", json.dumps(content))
    description = {
        "visible": "colour/{split}",
        "lwir": "thermal/{split}/*.png",
        "labels": "labels/{split}" + (".json" if form == "coco" else ""),
        "person": ["person"],
        "ignore": ["rider"],
        "drop": ["dog"],
        **({"names": names} if form == "yolo" else {}),
        **more,
    }
    write(root / "pairs.json", json.dumps(description, indent=1))
    return root / "pairs.json"
