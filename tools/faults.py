"""Faults of a KAIST root or a set of pairs: their names, and the checks of single frames and files."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_SIZE, FRAME_WIDTH, Annotations
from kaist.files import InputError, load_json, read_text
from kaist.images import load_image, open_image
from kaist.labels import KAIST_LABELS, ObjectRow, json_objects, parse_xml, read_labels

# Name -> description, and a regular expression for the message of the reader that reports this fault
# ("": no reader does). The first expression that matches a message gives the name.
FAULTS = {
    "list-empty": ("an image list without frames", "the image list is empty"),
    "list-bad-id": ("a line that is not of the form set00/V000/I00000", "is not a frame id"),
    "list-repeated-id": ("a frame listed twice", "is already in line"),
    "list-overlap": ("a frame both in a training and a test list, or in two lists named by --list", ""),
    "unknown-frame": ("a listed frame with neither images nor annotations", ""),
    "missing-visible": ("no visible image", ""),
    "missing-lwir": ("no LWIR image", ""),
    "misnamed-image": ("an image with a suffix that is not supported (.bmp, .webp)", ""),
    "broken-link": ("a link to a file that does not exist", ""),
    "unreadable-file": ("a file without read permission, or a folder in place of a file", ""),
    "empty-file": ("a file of 0 bytes", ""),
    "huge-image": ("an image too large to decode", "exceeds limit|too large to decode"),
    "16-bit-image": ("16 bits or floating point, which would be clipped to white", "8-bit image"),
    "not-an-image": ("content that is not JPEG, PNG or TIFF", "cannot identify image"),
    "broken-image": ("an image that cannot be decoded completely", "unreadable image|broken image"),
    "wrong-size": ("an image that is not 640x512, or not of its partner's size", "its visible image"),
    "constant-image": ("an image of a single colour", ""),
    "grey-visible": ("a visible image without colours", ""),
    "coloured-lwir": ("an LWIR image with colours", ""),
    "swapped-modalities": ("visible and LWIR images in place of each other", ""),
    "same-image": ("visible and LWIR images with the same pixels", ""),
    "copied-image": ("images of two frames with the same pixels", ""),
    "missing-annotation": ("a frame without annotation", "have no label file|are not in this file"),
    "not-text": ("an annotation that is not a text file", "not a text file"),
    "bad-header": ("a text annotation that does not begin with '% bbGt version=3'", "is not a bbGt header"),
    "too-few-columns": ("a line with too few columns", "columns where"),
    "not-a-number": ("a word in place of a number", "is not a number|fractions of the frame"),
    "no-area": ("a box without a positive, finite size", "with positive size"),
    "outside-frame": ("a box completely outside the frame", ""),
    "leaves-frame": ("a box with more than half of its area outside the frame", ""),
    "odd-box": ("a box of implausible height or aspect ratio", ""),
    "repeated-box": ("two objects with the same box", ""),
    "unknown-label": ("a label other than KAIST's person, people, cyclist, …", "^class "),
    "unknown-occlusion": ("an occlusion other than 0, 1 and 2", "is unknown"),
    "unpaired-objects": ("different objects in the visible and LWIR files of the paired form", ""),
    "broken-xml": ("XML that cannot be parsed or is not KAIST's", "broken XML|DOCTYPE|> is not a"),
    "contradicting-file": ("an annotation that names another frame or size", ""),
    "broken-json": ("JSON that cannot be parsed or is not KAIST's", "broken JSON|annotation JSON"),
    "json-repeated-id": ("an id or frame that occurs twice in a JSON", "occurs twice"),
    "json-unknown-image": ("a JSON object whose image is not in the JSON", "but no image has"),
    "incomplete-object": ("an XML or JSON object that lacks its name, box or more", "lacks|annotation "),
}
HEIGHT_RANGE = (10, 450)  # plausible box heights in a frame 512 high, pixels; KAIST's are 20 to 309
PERSON_ASPECT_RANGE = (0.08, 4.0)  # plausible width / height of persons
OTHER_ASPECT_RANGE = (0.08, 16.0)  # the same for other objects; KAIST's crowds reach 10.7
UNSUPPORTED_SUFFIXES = (".bmp", ".webp", ".gif", ".Jpg", ".Png")
# An image's chroma is the 99.5th percentile of max - min over its channels.
MIN_VISIBLE_CHROMA, MAX_LWIR_CHROMA = 6, 10  # KAIST's LWIR images have 3
MIN_CONTRAST = 1.0  # standard deviation of the grey values; KAIST's darkest LWIR images have 7


class Fault(NamedTuple):
    """One fault: a key of `FAULTS`, the file, the line (0: the whole file), and a message."""

    name: str
    file: Path
    line: int
    problem: str


def check_frame(
    frame_id: str, paths: dict[str, Path], expected: tuple, forms: Sequence[Annotations]
) -> tuple[list[Fault], dict[bytes, Path], list[int]]:
    """Check the images and annotation files of one frame; paths, expected: as in `check_frame_images`.

    Returns:
        The faults, digest -> file of the valid images, and the indices of the forms that annotate the frame.
    """
    faults, digests = check_frame_images(paths, *expected)
    by_form = {i: check_annotation(form, frame_id) for i, form in enumerate(forms)}
    form_idxs = [i for i, form_faults in by_form.items() if form_faults is not None]
    return [*faults, *chain.from_iterable(by_form[i] for i in form_idxs)], digests, form_idxs


def check_frame_images(
    paths: dict[str, Path], size: tuple[int, int] = FRAME_SIZE, lwir_range: tuple[float, float] = (0.0, 0.0)
) -> tuple[list[Fault], dict[bytes, Path]]:
    """Check the images of one frame; return the faults, and digest -> file of the images that are valid.

    paths: modality -> file; size, lwir_range: as in `check_image`.
    """
    results = {modality: check_image(path, modality, size, lwir_range) for modality, path in paths.items()}
    faults = [result for result in results.values() if isinstance(result, Fault)]
    images = {modality: result for modality, result in results.items() if not isinstance(result, Fault)}
    digests = {digest: paths[modality] for modality, (digest, _) in images.items()}
    grey = "visible" in images and images["visible"][1] < MIN_VISIBLE_CHROMA
    coloured = "lwir" in images and images["lwir"][1] > MAX_LWIR_CHROMA
    if len(digests) < len(images):
        faults.append(Fault("same-image", paths["lwir"], 0, "the same pixels as the visible image"))
    elif grey and coloured:
        faults.append(Fault("swapped-modalities", paths["lwir"], 0, "it has colours, the visible has none"))
    elif grey:
        faults.append(Fault("grey-visible", paths["visible"], 0, "it has no colours"))
    elif coloured:
        faults.append(Fault("coloured-lwir", paths["lwir"], 0, "it has colours"))
    return faults, digests


def check_image(
    path: Path,
    modality: str,
    size: tuple[int, int] = FRAME_SIZE,
    lwir_range: tuple[float, float] = (0.0, 0.0),
) -> Fault | tuple[bytes, float]:
    """Return the first fault of one image, or the digest of its pixels and its chroma.

    size: expected width and height; lwir_range: as in `load_image`.
    """
    if fault := check_readable(path, f"missing-{modality}"):
        return fault
    deep = modality == "lwir" and lwir_range[0] < lwir_range[1]
    try:
        with open_image(path, deep) as image:
            if image.size != size:
                return Fault("wrong-size", path, 0, "{}x{}, not {}x{}".format(*image.size, *size))
        # An 8-bit LWIR image is loaded like a visible one, to find colours in it.
        image = load_image(path, "lwir", lwir_range) if deep else load_image(path, "visible")
    except InputError as error:
        return to_fault(error)
    pixels = np.asarray(image.convert("RGB"))
    subsampled = pixels[::4, ::4].astype(np.int16)
    if subsampled.mean(2).std() < MIN_CONTRAST:
        return Fault("constant-image", path, 0, f"all pixels are about {subsampled.mean():.0f}")
    chroma = np.percentile(subsampled.max(2) - subsampled.min(2), 99.5)
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).digest(), float(chroma)


def check_readable(path: Path, missing: str) -> Fault | None:
    """Return the fault of an unreadable or empty file, if any; missing: the fault of an absent one."""
    try:
        if path.is_symlink() and not path.exists():
            return Fault("broken-link", path, 0, f"a link to {path.readlink()}, which does not exist")
        if not path.exists():
            for other in map(path.with_suffix, UNSUPPORTED_SUFFIXES):
                if other.exists():
                    return Fault("misnamed-image", other, 0, "save it as JPEG or PNG")
            return Fault(missing, path, 0, "no such file")
        if not path.is_file():
            return Fault("unreadable-file", path, 0, "not a regular file")
        with path.open("rb") as file:
            return None if file.read(1) else Fault("empty-file", path, 0, "the file is empty")
    except OSError as error:
        return Fault("unreadable-file", path, 0, str(error.strerror or error))


def check_annotation(form: Annotations, frame_id: str) -> list[Fault] | None:
    """Check a frame's annotation files in one form; return None if there are none."""
    modalities = ("visible", "lwir") if form.form == "paired" else (form.modality,)
    paths = [Path(Annotations(form.source, form.form, m).path(frame_id)) for m in modalities]
    results = [check_label_file(path, form.form, frame_id) for path in paths]
    faults = [fault for file_faults, _ in results for fault in file_faults]
    if [fault.name for fault in faults] == ["missing-annotation"] * len(paths):
        return None
    labels = [[row.label for row in rows] for _, rows in results]
    if not faults and labels[0] != labels[-1]:
        problem = f"{labels[0]} in the visible file, {labels[1]} here"
        faults.append(Fault("unpaired-objects", paths[1], 0, problem))
    return faults


def check_label_file(path: Path, form: str, frame_id: str) -> tuple[list[Fault], list[ObjectRow]]:
    """Check one frame's annotation file; return its faults and objects. form: as in `read_labels`."""
    if fault := check_readable(path, "missing-annotation"):
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


def check_label_json(path: Path) -> tuple[list[Fault], set[str]]:
    """Check an annotation JSON; return its faults and the ids of its frames."""
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
    for number, count in Counter(repr(item["id"]) for item in items).items():
        if count > 1:
            faults.append(Fault("json-repeated-id", path, 0, f"annotation id {number} occurs {count} times"))
    return faults, set(frames)


def implausible_objects(
    rows: list[ObjectRow], path: Path, size: tuple[int, int] = FRAME_SIZE, kaist: bool = True
) -> Iterator[Fault]:
    """Yield the faults of one frame's valid objects.

    path: their file; size: width and height of the frame, pixels; kaist: whether to check the labels too.
    """
    lowest, highest = (limit * size[1] / FRAME_HEIGHT for limit in HEIGHT_RANGE)
    boxes, in_json = set(), path.suffix == ".json"
    for label, (x, y, w, h), _, _, number in rows:
        width = max(min(x + w, size[0]) - max(x, 0), 0)
        height = max(min(y + h, size[1]) - max(y, 0), 0)
        low, high = PERSON_ASPECT_RANGE if label == "person" else OTHER_ASPECT_RANGE
        found = {
            "unknown-label": kaist and label not in KAIST_LABELS,
            "outside-frame": not width * height,
            "leaves-frame": 0 < width * height < 0.5 * w * h,
            "odd-box": not (low <= w / h <= high and lowest <= h <= highest),
            "repeated-box": (x, y, w, h) in boxes,
        }
        boxes.add((x, y, w, h))
        problem = f"annotation {number}: " * in_json + f"{label[:40]} x={x:g} y={y:g} w={w:g} h={h:g}"
        line = 0 if in_json else number
        yield from (Fault(name, path, line, problem) for name, is_fault in found.items() if is_fault)


def to_fault(error: InputError) -> Fault:
    """Convert the error of a reader to a fault, named by the expressions in `FAULTS`."""
    names = (name for name, (_, words) in FAULTS.items() if words and re.search(words, error.problem))
    return Fault(next(names, "unreadable-file"), Path(error.file), error.line or 0, error.problem)
