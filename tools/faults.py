"""What can be wrong with the files of a KAIST set: every fault of a file, by name."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_SIZE, FRAME_WIDTH
from kaist.files import InputError, load_json, read_text
from kaist.images import load_image, open_image
from kaist.labels import KAIST_LABELS, ObjectRow, json_objects, parse_xml, read_labels

# Name -> what it is, and words by which the message of a reader that finds it is known; the first that fit.
FAULTS = {
    "list-empty": ("an image list without frames", "the image list is empty"),
    "list-bad-id": ("a line that is not set00/V000/I00000", "is not a frame id"),
    "list-repeated-id": ("a frame listed twice", "is already in line"),
    "list-overlap": ("a frame of two lists, of which one is to test what the other taught", ""),
    "unknown-frame": ("a listed frame with neither image nor annotation", ""),
    "missing-visible": ("no visible image", ""),
    "missing-lwir": ("no LWIR image", ""),
    "misnamed-image": ("the image is there under an ending that is not read (.bmp, .webp)", ""),
    "broken-link": ("a link to a file that is not there", ""),
    "unreadable-file": ("a file that may not be read, or that is no file", ""),
    "empty-file": ("a file of 0 bytes", ""),
    "huge-image": ("a size that would fill the memory", "exceeds limit|too large to decode"),
    "16-bit-image": ("16 bits or floating point, which would be clipped to white", "8-bit image"),
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
    "unknown-label": ("a label other than KAIST's person, people, cyclist, …", "speaks of|has no name"),
    "unknown-occlusion": ("an occlusion other than 0, 1 and 2", "is unknown"),
    "unpaired-objects": ("visible and LWIR files of the paired form with other objects", ""),
    "broken-xml": ("an XML that cannot be parsed, or is none of KAIST's", "broken XML|DOCTYPE|> is not a"),
    "contradicting-file": ("a file that says it belongs to another frame or size", ""),
    "broken-json": ("a JSON that cannot be parsed, or is none of KAIST's", "broken JSON|annotation JSON"),
    "json-repeated-id": ("an id or frame that a JSON holds twice", "occurs twice"),
    "json-unknown-image": ("a JSON object of an image that is not in it", "but no image has"),
    "incomplete-object": ("an XML or JSON object that lacks its name, box or more", "lacks|annotation "),
}
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


def unreadable(path: Path, missing: str) -> Fault | None:
    """Why a file's content cannot be had, if it cannot; `missing` is the fault of its absence."""
    try:
        if path.is_symlink() and not path.exists():
            return Fault("broken-link", path, 0, f"a link to {path.readlink()}, which is not there")
        if not path.exists():
            for other in map(path.with_suffix, OTHER_ENDINGS):
                if other.exists():
                    return Fault("misnamed-image", other, 0, "save it as JPEG or PNG")
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
    size: tuple[int, int] = FRAME_SIZE,
    lwir_range: tuple[float, float] = (0.0, 0.0),
) -> Fault | tuple[bytes, float]:
    """What is wrong with one image, or a digest of its pixels and how coloured it is, see `COLOURED`.

    size: its width and height, if all is well; lwir_range: as of `load_image`.
    """
    if fault := unreadable(path, f"missing-{modality}"):
        return fault
    deep = modality == "lwir" and lwir_range[0] < lwir_range[1]
    try:
        with open_image(path, deep) as image:
            if image.size != size:
                return Fault("wrong-size", path, 0, "{}x{}, not {}x{}".format(*image.size, *size))
        # LWIR of 8 bits is opened as visible is, so that colours in it are seen.
        view = load_image(path, "lwir", lwir_range) if deep else load_image(path, "visible")
    except InputError as error:
        return to_fault(error)
    pixels = np.asarray(view.convert("RGB"))
    few = pixels[::4, ::4].astype(np.int16)
    if few.mean(2).std() < FLAT:
        return Fault("constant-image", path, 0, f"all of it is about {few.mean():.0f}")
    colour = np.percentile(few.max(2) - few.min(2), 99.5)
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).digest(), float(colour)


def check_images(
    paths: dict[str, Path], size: tuple[int, int] = FRAME_SIZE, lwir_range: tuple[float, float] = (0.0, 0.0)
) -> tuple[list[Fault], dict[bytes, Path]]:
    """Faults of a frame's images by modality, as of `check_image`, and digest -> file of the sound ones."""
    seen = {modality: check_image(path, modality, size, lwir_range) for modality, path in paths.items()}
    faults = [result for result in seen.values() if isinstance(result, Fault)]
    images = {modality: result for modality, result in seen.items() if not isinstance(result, Fault)}
    digests = {digest: paths[modality] for modality, (digest, _) in images.items()}
    grey = "visible" in images and images["visible"][1] < GREY
    coloured = "lwir" in images and images["lwir"][1] > COLOURED
    if len(digests) < len(images):
        faults.append(Fault("same-image", paths["lwir"], 0, "the same picture as the visible image"))
    elif grey and coloured:
        faults.append(Fault("swapped-modalities", paths["lwir"], 0, "it has colours, the visible has none"))
    elif grey:
        faults.append(Fault("grey-visible", paths["visible"], 0, "it has no colours"))
    elif coloured:
        faults.append(Fault("coloured-lwir", paths["lwir"], 0, "it has colours"))
    return faults, digests


def to_fault(error: InputError) -> Fault:
    """What a reader refused, under its name."""
    names = (name for name, (_, words) in FAULTS.items() if words and re.search(words, error.problem))
    return Fault(next(names, "unreadable-file"), Path(error.file), error.line or 0, error.problem)


def check_file(path: Path, form: str, frame_id: str) -> tuple[list[Fault], list[ObjectRow]]:
    """Faults of a frame's annotation in a file of its own, and its objects."""
    if fault := unreadable(path, "missing-annotation"):
        return [fault], []
    errors: list[InputError] = []
    try:
        rows = read_labels(path, form, errors=errors)
        root = parse_xml(path)[0] if form.startswith("xml") else None
    except InputError as error:
        return [to_fault(error)], []
    faults = [*map(to_fault, errors), *implausible_objects(rows, path)]
    if root is not None:
        name = root.findtext("filename", "")
        if set(re.findall(r"set\d\d|V\d{3}|I\d{5}", name)) - set(frame_id.split("/")):
            faults.append(Fault("contradicting-file", path, 0, f"its filename is {name!r}"))
        size = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
        if any(size) and size != [*map(str, FRAME_SIZE)]:
            faults.append(Fault("contradicting-file", path, 0, f"its size is {size[0]}x{size[1]}"))
    return faults, rows


def check_json(path: Path) -> tuple[list[Fault], set[str]]:
    """Faults of a test JSON, and the frames it holds."""
    errors: list[InputError] = []
    try:
        content = load_json(read_text(path), path)
        frames = json_objects(content, path, errors)
    except InputError as error:
        return [to_fault(error)], set()
    faults = [*map(to_fault, errors)]
    faults += [fault for rows in frames.values() for fault in implausible_objects(rows, path)]
    for image in content["images"]:
        size = image.get("width", FRAME_WIDTH), image.get("height", FRAME_HEIGHT)
        if size != FRAME_SIZE:
            problem = f"{image['im_name']} is of size {size[0]}x{size[1]}"
            faults.append(Fault("contradicting-file", path, 0, problem))
    items = (item for item in content["annotations"] if isinstance(item, dict) and "id" in item)
    for repeated, count in Counter(repr(item["id"]) for item in items).items():
        if count > 1:
            problem = f"annotation id {repeated} is there {count} times"
            faults.append(Fault("json-repeated-id", path, 0, problem))
    return faults, set(frames)


def implausible_objects(
    rows: list[ObjectRow], path: Path, size: tuple[int, int] = FRAME_SIZE, kaist: bool = True
) -> Iterator[Fault]:
    """What is odd about well-formed objects of one frame of (width, height); kaist: and of their labels."""
    lowest, highest = (limit * size[1] / FRAME_HEIGHT for limit in HEIGHTS)
    boxes, in_json = set(), path.suffix == ".json"
    for label, (x, y, w, h), _, _, number in rows:
        width = max(min(x + w, size[0]) - max(x, 0), 0)
        height = max(min(y + h, size[1]) - max(y, 0), 0)
        low, high = PERSON_ASPECTS if label == "person" else ASPECTS
        odd = {
            "unknown-label": kaist and label not in KAIST_LABELS,
            "outside-frame": not width * height,
            "leaves-frame": 0 < width * height < 0.5 * w * h,
            "odd-box": not (low <= w / h <= high and lowest <= h <= highest),
            "repeated-box": (x, y, w, h) in boxes,
        }
        boxes.add((x, y, w, h))
        words = f"annotation {number}: " * in_json + f"{label[:40]} x={x:g} y={y:g} w={w:g} h={h:g}"
        line = 0 if in_json else number
        yield from (Fault(name, path, line, words) for name, is_so in odd.items() if is_so)
