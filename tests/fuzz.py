"""Fuzz everything that reads a user's files and flags.

    python -m tests.fuzz --inputs 1000000 --seed 0

Inputs are mutations of valid files and command lines. A reader may accept an input or refuse it with an
InputError. Any other exception, a hang, or a refused file in which the data check finds no fault is a
failure. Failing inputs are saved in `--out` and should be added to tests/test_fuzz.py. An input depends
only on its reader, number and seed.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import detect
import eval as eval_script
import train
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.config import OneLineParser, read_constants
from kaist.annotations import read_image_list
from kaist.files import InputError, make_folder, run_script, write_text
from kaist.images import load_image
from kaist.labels import read_json, read_labels
from kaist.results import read_detections
from tools.faults import Fault, check_image, check_label_file, check_label_json

TIMEOUT = 10  # seconds for one input
MAX_BYTES = 200_000  # of an input
FRAME_IDS = [f"set06/V000/I{number:05d}" for number in range(20)]
BBGT = "% bbGt version=3\nperson 10 20 30 60 1 0 0 0 0 0 0\npeople 300 200 90 60 0 0 0 0 0 1 0\n"
XML = """<?xml version="1.0"?>
<annotation><filename>set06/V000/I00019</filename><size><width>640</width><height>512</height></size>
<object><name>person</name><bndbox><x>10</x><y>20</y><w>30</w><h>60</h></bndbox>
<occlusion>0</occlusion></object>
<object><name>people</name><bndbox><x>9</x><y>8</y><w>17</w><h>36</h></bndbox></object></annotation>
"""
FLAGS = {
    "train": "--experiment 26 --lr 1e-3 --infusion 1,1,0,0,0,0 --no-augment --input-size 300,300",
    "eval": f"--detections {__file__} --annotations x.json --bootstrap 10 --by-video --out x.png",
    "detect": "x.jpg --checkpoint y --min-score 0.2 --out z --device cpu",
}
BILLION_LAUGHS = b'<!DOCTYPE a [<!ENTITY a "ha">%b]>' % b"".join(
    b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(9)
)  # each entity expands to ten of the previous one
TOKENS = (
    *b"0 -1 1 2 3 -0.0 0.5 1.5 640 512 1e5 1e308 1e400 -1e400 1e-400 nan -nan inf -inf NaN".split(),
    *b"Infinity -Infinity 2147483648 9223372036854775808 18446744073709551616 0x10 1_0".split(),
    *(b"9" * 400, b"9" * 5000, "٣".encode(), "１".encode(), "\u2028é😀".encode()),
    *b"\0|\x0b|\x1c|\x85|\xff|\xef\xbb\xbf|\xff\xfe|\xed\xa0\x80|| |\t|\n|\r\n|\r".split(b"|"),
    *rb"""% %s{} ' " \ \ud800 , ; # - ../../x /dev/null true null person""".split(),
    *(b"A" * 70_000, b"1 " * 5000, b"1," * 5000),
    # JSON
    *b'{ } [ ] : // false [] {} [[]] [1] [1,2,3,4] {"id":1} {"id":0,"id":1} "x" "1" "" "\\ud800"'.split(),
    *b'"image_id" "id" "bbox" "score" "set06/V000/I00001" -1000000000000000000000000000000'.split(),
    *(b"[" * 3000, b"[" * 100_000, b'{"a":' * 3000, b"[" * 2000 + b"]" * 2000),
    # XML
    *b"< > </ <object> </object> <name> <bndbox> &a; &i; &lt; &#0; &#x110000; <![CDATA[ ]]>".split(),
    *b"<!-- --> xmlns:a='b' <a:object/> <?xml?>".split(),
    *(b"<?xml version='1.0' encoding='%s'?>" % name for name in (b"utf-8", b"utf-16", b"klingon")),
    *(b'<!DOCTYPE a SYSTEM "file:///etc/passwd">', b"<a>" * 3000, b"<a>" * 100_000, BILLION_LAUGHS),
    # command lines
    *(f"--{name.replace('_', '-')}".encode() for name in read_constants(train.__file__)),
    *(b"--help", b"--", b"-x", b"auto"),
)


# ------------------------------------------------------------------------------ mutations


def mutate_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return a seed with one to four mutations that ignore its structure."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 16, 200)))
        match rng.randrange(4):
            case 0:
                data[at:end] = rng.choice((rng.randbytes(end - at), b"\0" * 4, b"\xff" * 4, b"\x7f\xff"))
            case 1:
                data[at:end] *= rng.choice((0, 0, 2, 3, 50))
            case 2:
                del data[at:]
            case 3:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)


def mutate_text(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return a seed with words and lines replaced, repeated or deleted."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spans = [match.span() for match in re.finditer(rb"\"[^\"]*\"|[^\s,<>\":{}\[\]]+", data[:4000])]
        start, end = rng.choice(spans) if spans else (0, 0)
        match rng.randrange(5):
            case 0 | 1:
                kept = rng.choice((b"", b"", data[start:end]))
                data = data[:start] + rng.choice((*TOKENS, b"", b"")) + kept + data[end:]
            case 2:
                lines = data.split(b"\n")
                line = rng.randrange(len(lines))
                lines[line : line + 1] *= rng.choice((0, 0, 0, 0, 2, 2, 2, 300))
                data = b"\n".join(lines)
            case 3:
                old, new = rng.choice((b"\n|\r\n", b"\n|\r", b"\n|\0", b",|;", b"0|\0")).split(b"|")
                data = data.replace(old, new)
            case 4:
                data = mutate_bytes(rng, [data, *seeds])
    if rng.random() < 0.02:
        data = data.decode("latin-1").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    return data[:MAX_BYTES]


def mutate_zip(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return a zip archive (a checkpoint), mutated as a whole or in one member with a valid checksum."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, seeds)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(rng.choice(seeds))) as old, zipfile.ZipFile(buffer, "w") as new:
        bad = rng.choice([n for n in old.namelist() if n.endswith(".pkl")] * 3 + old.namelist())
        for name in old.namelist():
            data = mutate_bytes(rng, [old.read(name)]) if name == bad else old.read(name)
            new.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


# ------------------------------------------------------------------------------ readers


class Reader(NamedTuple):
    """A reader of files, and how to make its inputs.

    file: name of the input file; weight: relative number of inputs; seeds: valid contents.
    """

    read: Callable[[Path], Any]
    file: str
    weight: int
    seeds: Sequence[bytes]
    mutate: Callable[[random.Random, Sequence[bytes]], bytes] = mutate_text


def checked(read: Callable[[Path], Any], find_faults: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a reader that fails if it refuses a file in which the data check finds no fault."""

    def read_and_check(path: Path) -> None:
        faults = find_faults(path)
        try:
            read(path)
        except InputError as error:
            if not faults:
                raise AssertionError(f"the data check finds nothing, but: {error}") from error
            raise

    return read_and_check


def parse_flags(parse: Callable[[], Any], path: Path) -> None:
    """Run a script's parser on the lines of a file as its command line."""
    argv = [os.fsdecode(line) for line in path.read_bytes().replace(b"\0", b"").split(b"\n")]
    old_argv, sys.argv = sys.argv, ["script.py", *argv]
    try:
        with redirect_stdout(io.StringIO()):
            parse()
    except SystemExit as end:
        if end.code:  # 0: --help
            raise
    finally:
        sys.argv = old_argv


def read_frame_list(path: Path) -> None:
    """Read a result file whose frame list is `path`."""
    result = path.with_name("result.txt")
    result.write_text("1,10,20,30,60,0.5\n20,10,20,30,60,0.5\n")
    read_detections(result, FRAME_IDS)


def make_readers() -> dict[str, Reader]:
    """Return all readers by name."""
    row = {"image_id": 0, "category_id": 1, "bbox": [10.5, 20, 30, 60], "score": 0.5}
    rows = [row | {"image_id": i, "category_id": 1 + (i == 2)} for i in range(4)]
    people = {
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "people"}],
        "images": [{"id": i, "im_name": FRAME_IDS[i], "width": 640, "height": 512} for i in range(4)],
        "annotations": [row | {"id": i, "occlusion": i % 3, "ignore": i % 2} for i, row in enumerate(rows)],
    }
    gradient = Image.linear_gradient("L").resize((640, 512))
    picture = Image.merge("RGB", [gradient, gradient.rotate(180), gradient])
    jpeg, png = io.BytesIO(), io.BytesIO()
    picture.save(jpeg, "JPEG", quality=5)
    picture.quantize(8).save(png, "PNG")
    tensors = {"w": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.float16)}
    state = {"model": tensors, "model_args": {"size": (300, 300), "width": 0.5}, "epoch": 3}
    with tempfile.TemporaryDirectory() as folder:
        seed = Path(folder) / "seed.pt"
        save_checkpoint(seed, state | {"config": {"lr": 1e-3}, "experiment": "26"})
        checkpoint = seed.read_bytes()
    results = "".join(f"{i},10.5,20,30.25,60,0.{i}\n" for i in range(1, 10))

    def texts(*texts: str) -> list[bytes]:
        return [text.encode() for text in texts]

    def annotation(form: str) -> Callable[[Path], None]:
        find_faults = lambda path: check_label_file(path, form, FRAME_IDS[19])[0]  # noqa: E731
        return checked(partial(read_labels, form=form), find_faults)

    def image(modality: str) -> Callable[[Path], None]:
        find_fault = lambda path: isinstance(check_image(path, modality), Fault)  # noqa: E731
        return checked(partial(load_image, modality=modality), find_fault)

    read_label_json = checked(read_json, lambda path: check_label_json(path)[0])
    lists = texts("\n".join(FRAME_IDS), FRAME_IDS[1])
    read_results = partial(read_detections, frames=FRAME_IDS)
    boxes, entries = (texts(json.dumps(x), json.dumps(x, indent=1)) for x in (people, rows))
    parsers = train.configure, eval_script.parse_arguments, detect.parse_arguments
    flags = {
        f"{name}-flags": Reader(partial(parse_flags, parse), "x", 1, texts("\n".join(FLAGS[name].split())))
        for name, parse in zip(FLAGS, parsers, strict=True)
    }
    return flags | {
        "bbgt": Reader(annotation("bbgt"), "x.txt", 20, texts(BBGT)),
        "paired": Reader(annotation("paired"), "x.txt", 20, texts(BBGT)),
        "xml": Reader(annotation("xml"), "x.xml", 20, texts(XML)),
        "annotation-json": Reader(read_label_json, "x.json", 20, boxes),
        "result-text": Reader(read_results, "x.txt", 20, texts(results)),
        "result-json": Reader(read_results, "x.json", 20, entries),
        "frame-list": Reader(read_frame_list, "result.frames.txt", 20, lists),
        "image-list": Reader(read_image_list, "x.txt", 20, lists),
        "checkpoint": Reader(load_checkpoint, "x.pt", 5, [checkpoint], mutate_zip),
        "jpeg": Reader(image("lwir"), "x.jpg", 2, [jpeg.getvalue()], mutate_bytes),
        "png": Reader(image("visible"), "x.jpg", 2, [png.getvalue()], mutate_bytes),
    }


# ------------------------------------------------------------------------------ running


def make_input(name: str, reader: Reader, number: int, seed: int) -> bytes:
    """Make input `number` of a reader."""
    return reader.mutate(random.Random(f"{seed} {name} {number}"), reader.seeds)


def feed(reader: Reader, data: bytes, folder: Path) -> str:
    """Write an input to `folder` and read it; return "accepted", "refused", or the traceback of a failure."""

    def time_out(*_: object) -> None:
        raise TimeoutError(f"not read after {TIMEOUT} s")

    (folder / reader.file).write_bytes(data)
    signal.signal(signal.SIGALRM, time_out)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder / reader.file)
        return "accepted"
    except InputError:
        return "refused"
    except KeyboardInterrupt:
        raise
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Run all readers on their shares of the inputs; exit code 1 if any fails."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--inputs", type=int, default=1_000_000, help="number of inputs for all readers (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--reader", action="append", help="run only this reader; may be repeated")
    add("--out", type=Path, default=Path("fuzz-failures"), help="folder for failing inputs (%(default)s)")
    arguments = parser.parse_args()
    readers, n_failed = make_readers(), 0
    chosen = arguments.reader or list(readers)
    if set(chosen) - set(readers):
        parser.error(f"the readers are {', '.join(readers)}")
    share = arguments.inputs / sum(readers[name].weight for name in chosen)
    print(f"{'reader':16} {'refused':>9} {'accepted':>9} {'failed':>6}")
    for name in chosen:
        reader, counts = readers[name], Counter[str]()
        numbers = range(math.ceil(share * reader.weight))
        with tempfile.TemporaryDirectory() as folder:
            for number in tqdm(numbers, name, leave=False):
                data = make_input(name, reader, number, arguments.seed)
                result = feed(reader, data, Path(folder))
                if result not in ("accepted", "refused"):
                    make_folder(arguments.out)
                    (arguments.out / f"{name}-{number}").write_bytes(data)
                    write_text(arguments.out / f"{name}-{number}.trace", result)
                    result = "failed"
                counts[result] += 1
        print(f"{name:16} {counts['refused']:9,} {counts['accepted']:9,} {counts['failed']:6}")
        n_failed += counts["failed"]
    print(f"{n_failed} failures" + (f", saved in {arguments.out}" if n_failed else ""))
    sys.exit(n_failed > 0)


if __name__ == "__main__":
    run_script(main)
