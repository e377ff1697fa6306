"""What can be wrong with the files of a KAIST set: every fault of a file, by name."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH
from kaist.files import InputError, load_json, read_text
from kaist.images import open_image, open_view
from kaist.labels import ObjectRow, json_objects, parse_xml, read_labels

# Name -> what it is, and words by which the message of a reader that finds it is known; the first that fit.
FAULTS = {
    "list-empty": ("an image list without frames", "the image list is empty"),
    "list-bad-id": ("a line that is not set00/V000/I00000", "is not a frame id"),
    "list-repeated-id": ("a frame listed twice", "stands in line"),
    "list-overlap": ("a frame of two lists, of which one is to test what the other taught", ""),
    "unknown-frame": ("a listed frame with neither image nor annotation", ""),
    "missing-visible": ("no visible image", ""),
    "missing-lwir": ("no LWIR image", ""),
    "misnamed-image": ("the image is there under an ending that is not read (.bmp, .webp)", ""),
    "broken-link": ("a link to a file that is not there", ""),
    "unreadable-file": ("a file that may not be read, or that is no file", ""),
    "empty-file": ("a file of 0 bytes", ""),
    "huge-image": ("a size that would fill the memory", "exceeds limit|too large to decode"),
    "16-bit-image": (
        "an image of 16 bits or floating point, which would be clipped to white",
        "not an 8-bit image|of 8 bits and of more|image of 8 bits",
    ),
    "not-an-image": ("content that is no JPEG, PNG or TIFF", "cannot identify image"),
    "broken-image": ("an image that cannot be decoded to its end", "unreadable image|broken image"),
    "wrong-size": ("an image that is not 640x512, or of another size than its pair's", "its visible image"),
    "constant-image": ("one colour all over", ""),
    "grey-visible": ("a visible image without colours", ""),
    "coloured-lwir": ("an LWIR image with colours", ""),
    "swapped-modalities": ("visible in the place of LWIR and the reverse", ""),
    "same-image": ("visible and LWIR are the same picture", ""),
    "copied-image": ("the same picture under two frame ids", ""),
    "missing-annotation": ("no annotation", "have no label file|are not in it"),
    "not-text": ("an annotation that is not text", "not a text file"),
    "bad-header": ("a text annotation that does not begin with '% bbGt version=3'", "is not a bbGt header"),
    "too-few-columns": ("a line with too few columns", "columns where"),
    "not-a-number": ("a word where a number belongs", "is not a number|fractions of the frame"),
    "no-area": ("a box without a positive, finite size", "with positive size"),
    "outside-frame": ("a box wholly outside of the frame", ""),
    "leaves-frame": ("a box less than half in the frame", ""),
    "odd-box": ("a person or object of an impossible height or shape", ""),
    "repeated-box": ("two objects with the same box", ""),
    "unknown-label": (
        "a label other than person, people, cyclist and person?",
        "the description speaks of|has no name",
    ),
    "unknown-occlusion": ("an occlusion other than 0, 1 and 2", "is unknown"),
    "unpaired-objects": ("visible and LWIR files of the paired form with other objects", ""),
    "broken-xml": (
        "an XML that cannot be parsed, or is none of KAIST's",
        "broken XML|an XML with a DOCTYPE|is no KAIST annotation",
    ),
    "contradicting-file": ("a file that says it belongs to another frame or size", ""),
    "broken-json": (
        "a JSON that cannot be parsed, or is none of KAIST's",
        "broken JSON|not a (KAIST|COCO) annotation JSON",
    ),
    "json-repeated-id": ("an id or frame that a JSON holds twice", "is there twice"),
    "json-unknown-image": ("a JSON object of an image that is not in it", "which is not in it"),
    "incomplete-object": (
        "an XML or JSON object that lacks its name, box or other fields",
        "an object lacks|annotation ",
    ),
}
LABELS = {"person", "people", "cyclist", "person?", "__ignore__"}
HEIGHTS = (10, 450)  # pixels of a frame 512 high; KAIST's objects have 20 to 309
PERSON_ASPECTS = (0.08, 4.0)  # width / height
ASPECTS = (0.08, 16.0)  # the same of other objects; KAIST's crowds reach 10.7
OTHER_ENDINGS = (".bmp", ".webp", ".gif", ".Jpg", ".Png")
GREY, COLOURED = 6, 10  # 99.5th percentile of max - min over the channels; KAIST's LWIR has 3
FLAT = 1.0  # standard deviation of grey values; KAIST's darkest LWIR frames have 7


class Fault(NamedTuple):
    """One fault: its name in `FAULTS`, its file, its line (0: the file as a whole), in words."""

    name: str
    file: Path
    line: int
    problem: str


class ImageStats(NamedTuple):
    """A decoded image: a digest of its pixels and how coloured it is (see `COLOURED`)."""

    digest: bytes
    colour: float


def unreadable(path: Path, missing: str) -> Fault | None:
    """Why a file's content cannot be had, if it cannot; `missing` is the fault of its absence."""
    try:
        if path.is_symlink() and not path.exists():
            return Fault("broken-link", path, 0, f"a link to {path.readlink()}, which is not there")
        if not path.exists():
            for ending in OTHER_ENDINGS if path.suffix == ".jpg" else ():
                if path.with_suffix(ending).exists():
                    return Fault("misnamed-image", path.with_suffix(ending), 0, "save it as JPEG or PNG")
            return Fault(missing, path, 0, "no such file")
        if not path.is_file():
            return Fault("unreadable-file", path, 0, "it is no file")
        with path.open("rb") as file:
            return None if file.read(1) else Fault("empty-file", path, 0, "it holds nothing")
    except OSError as error:
        return Fault("unreadable-file", path, 0, str(error.strerror or error))


def check_image(
    path: Path,
    modality: str,
    size: tuple[int, int] = (FRAME_WIDTH, FRAME_HEIGHT),
    lwir_range: tuple[float, float] = (0.0, 0.0),
) -> Fault | ImageStats:
    """What is wrong with one image, or how it looks; size: its width and height, if all is well; lwir_range:
    as of `open_view`."""
    if fault := unreadable(path, f"missing-{modality}"):
        return fault
    deep = modality == "lwir" and lwir_range[0] < lwir_range[1]
    try:
        with open_image(path, deep) as image:
            if image.size != size:
                return Fault("wrong-size", path, 0, "{}x{}, not {}x{}".format(*image.size, *size))
            pixels = None if deep else np.asarray(image.convert("RGB"))
        if deep:
            pixels = np.asarray(open_view(path, modality, lwir_range).convert("RGB"))
    except InputError as error:
        return to_fault(error, path)
    except Exception as error:  # whatever Pillow meets in broken data
        return Fault("broken-image", path, 0, str(error))
    few = pixels[::4, ::4].astype(np.int16)
    if few.mean(2).std() < FLAT:
        return Fault("constant-image", path, 0, f"all of it is about {few.mean():.0f}")
    colour = np.percentile(few.max(2) - few.min(2), 99.5)
    return ImageStats(hashlib.blake2b(pixels.tobytes(), digest_size=16).digest(), float(colour))


# ------------------------------------------------------------------------------ annotations


def to_fault(error: InputError, path: Path) -> Fault:
    """What a reader refused, under its name."""
    names = (name for name, (_, words) in FAULTS.items() if words and re.search(words, error.problem))
    return Fault(next(names, "unreadable-file"), path, error.line or 0, error.problem)


def check_file(path: Path, form: str, frame_id: str) -> tuple[list[Fault], list[ObjectRow]]:
    """Faults of a frame's annotation in a file of its own, and its objects."""
    errors: list[InputError] = []
    try:
        rows = read_labels(path, form, errors=errors)
        root = parse_xml(path)[0] if form.startswith("xml") else None
    except InputError as error:
        return [to_fault(error, path)], []
    faults = [*(to_fault(error, path) for error in errors), *implausible_objects(rows, path)]
    if root is not None:
        named = re.findall(r"set\d\d|V\d{3}|I\d{5}", root.findtext("filename", ""))
        if set(named) - set(frame_id.split("/")):
            problem = f"its filename is {root.findtext('filename')!r}"
            faults.append(Fault("contradicting-file", path, 0, problem))
        size = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
        if any(size) and size != [str(FRAME_WIDTH), str(FRAME_HEIGHT)]:
            faults.append(Fault("contradicting-file", path, 0, f"its size is {size[0]}x{size[1]}"))
    return faults, rows


def check_json(path: Path) -> tuple[list[Fault], set[str]]:
    """Faults of a test JSON, and the frames it holds."""
    errors: list[InputError] = []
    try:
        content = load_json(read_text(path), path)
        frames = json_objects(content, path, errors)
    except InputError as error:
        return [to_fault(error, path)], set()
    faults = [to_fault(error, path) for error in errors]
    faults += [fault for rows in frames.values() for fault in implausible_objects(rows, path)]
    for image in content["images"]:
        size = image.get("width", FRAME_WIDTH), image.get("height", FRAME_HEIGHT)
        if size != (FRAME_WIDTH, FRAME_HEIGHT):
            problem = f"{image['im_name']} is of size {size[0]}x{size[1]}"
            faults.append(Fault("contradicting-file", path, 0, problem))
    items = (item for item in content["annotations"] if isinstance(item, dict) and "id" in item)
    ids = Counter(repr(item["id"]) for item in items)
    for repeated, count in ids.items():
        if count > 1:
            problem = f"annotation id {repeated} is there {count} times"
            faults.append(Fault("json-repeated-id", path, 0, problem))
    return faults, set(frames)


def implausible_objects(
    rows: list[ObjectRow], path: Path, size: tuple[int, int] = (FRAME_WIDTH, FRAME_HEIGHT), kaist: bool = True
) -> Iterator[Fault]:
    """What is odd about well-formed objects of one frame of (width, height); kaist: and of their labels."""
    lowest, highest = (limit * size[1] / FRAME_HEIGHT for limit in HEIGHTS)
    boxes, in_json = set(), path.suffix == ".json"
    for label, (x, y, w, h), _, _, number in rows:
        width = max(min(x + w, size[0]) - max(x, 0), 0)
        height = max(min(y + h, size[1]) - max(y, 0), 0)
        low, high = PERSON_ASPECTS if label == "person" else ASPECTS
        odd = {
            "unknown-label": kaist and label not in LABELS,
            "outside-frame": not width * height,
            "leaves-frame": 0 < width * height < 0.5 * w * h,
            "odd-box": not (low <= w / h <= high and lowest <= h <= highest),
            "repeated-box": (x, y, w, h) in boxes,
        }
        boxes.add((x, y, w, h))
        words = f"annotation {number}: " * in_json + f"{label[:40]} x={x:g} y={y:g} w={w:g} h={h:g}"
        yield from (
            Fault(name, path, 0 if in_json else number, words) for name, is_so in odd.items() if is_so
        )
