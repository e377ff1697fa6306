"""Feeds broken input to everything that reads a user's files and flags.

    python -m tools.fuzz --inputs 1000000 --seed 0

Inputs are valid files and command lines, mutated with a knowledge of their structure. A reader may
take one or refuse it with an InputError; any other exception, a hang, or a file that training
would refuse and the data check calls clean is a failure. Failing inputs are kept in `--out`; they
belong into tests/tools/test_fuzz.py. Each input depends on its reader, number and seed alone.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
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
from kaist.annotation_files import READERS, read_json
from kaist.annotations import read_image_list
from kaist.files import InputError, make_folder, run_script
from kaist.images import read_image
from kaist.results import read_detections
from tools.faults import Fault, check_file, check_image, check_json
from tools.mutations import JSON_WORDS, WORDS, XML_WORDS, mutate_bytes, mutate_text, mutate_zip

CHUNK = 200  # inputs that a process takes at a time
LIMIT = 100.0  # seconds that they may take
MAX_KEPT = 100  # failing inputs that are kept
FRAMES = [f"set06/V000/I{number:05d}" for number in range(20)]
TEXT = b"% bbGt version=3\nperson 10 20 30 60 1 0 0 0 0 0 0\npeople 300 200 90 60 0 0 0 0 0 1 0\n"
XML = b"""<?xml version="1.0"?>
<annotation><filename>set06/V000/I00019</filename>
<size><width>640</width><height>512</height><depth>4</depth></size>
<object><name>person</name><bndbox><x>10</x><y>20</y><w>30</w><h>60</h></bndbox>
<occlusion>0</occlusion></object>
<object><name>people</name><bndbox><x>9</x><y>8</y><w>17</w><h>36</h></bndbox></object></annotation>
"""


class Reader(NamedTuple):
    """A call on a file, the file's name, valid content, its mutation, its share of all inputs."""

    read: Callable[[Path], Any]
    file: str
    seeds: list[bytes]
    mutate: Callable[[random.Random, list[bytes]], bytes]
    share: float


# ------------------------------------------------------------------------------ readers


def with_check(read: Callable[[Path], Any], check: Callable[[Path], list], path: Path) -> None:
    """Read a file; the data check has to find a fault in it if it is refused."""
    faults = check(path)
    try:
        read(path)
    except InputError as error:
        if not faults:
            raise AssertionError(f"the data check finds nothing, but: {error}") from error
        raise


def check_picture(path: Path) -> list[Fault]:
    """The data check of one image, as a list."""
    result = check_image(path, "visible")
    return [result] if isinstance(result, Fault) else []


def parse_flags(parse: Callable[[], Any], path: Path) -> None:
    """Give a script's parser a file's lines as its command line."""
    argv = [os.fsdecode(line) for line in path.read_bytes().replace(b"\0", b"").split(b"\n")]
    kept, sys.argv = sys.argv, ["script.py", *argv]
    try:
        with redirect_stdout(io.StringIO()):
            parse()
    except SystemExit as end:
        if end.code:  # all but --help
            raise
    finally:
        sys.argv = kept


def read_frame_list(path: Path) -> None:
    """Read a result file whose list of frames is `path`."""
    result = path.with_name("result.txt")
    result.write_text("1,10,20,30,60,0.5\n20,10,20,30,60,0.5\n")
    read_detections(result, FRAMES)


def make_seeds(folder: Path) -> dict[str, list[bytes]]:
    """Valid content for each kind of file; a checkpoint is written below `folder`."""
    row = {"image_id": 0, "category_id": 1, "bbox": [10.5, 20, 30, 60], "score": 0.5}
    rows = [row | {"image_id": i, "category_id": 1 + (i == 2)} for i in range(4)]
    people = {
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "people"}],
        "images": [{"id": i, "im_name": FRAMES[i], "width": 640, "height": 512} for i in range(4)],
        "annotations": [row | {"id": i, "occlusion": i % 3, "ignore": i % 2} for i, row in enumerate(rows)],
    }
    gradient = Image.linear_gradient("L").resize((640, 512))
    picture = Image.merge("RGB", [gradient, gradient.rotate(180), gradient])
    jpeg, png = io.BytesIO(), io.BytesIO()
    picture.save(jpeg, "JPEG", quality=5)
    picture.quantize(8).save(png, "PNG")
    tensors = {"w": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.float16)}
    state = {"model": tensors, "model_args": {"size": (300, 300), "width": 0.5}, "epoch": 3}
    save_checkpoint(folder / "seed.pt", state | {"config": {"lr": 1e-3}, "experiment": "26"})
    flags = {
        "train": "--experiment 26 --lr 1e-3 --infusion 1,1,0,0,0,0 --no-augment --input-size 300,300",
        "eval": f"--detections {__file__} --annotations x.json --bootstrap 10 --by-video --out x.png",
        "detect": "x.jpg --checkpoint y --min-score 0.2 --out z --device cpu",
    }
    return {
        "text": [TEXT, TEXT + TEXT.split(b"\n")[1]],
        "xml": [XML],
        "annotation-json": [json.dumps(people, indent=i).encode() for i in (None, 1)],
        "result-text": [b"".join(b"%d,10.5,20,30.25,60,0.%d\n" % (i, i) for i in range(1, 10))],
        "result-json": [json.dumps(rows).encode(), json.dumps(rows[:2], indent=1).encode()],
        "image-list": ["\n".join(FRAMES).encode(), b"set00/V000/I00001\n"],
        "checkpoint": [(folder / "seed.pt").read_bytes()],
        "jpeg": [jpeg.getvalue()],
        "png": [png.getvalue()],
        **{f"{script}-flags": ["\n".join(line.split()).encode()] for script, line in flags.items()},
    }


def make_readers(seeds: dict[str, list[bytes]]) -> dict[str, Reader]:
    """Everything that is fed, by name."""
    constants = [f"--{name.replace('_', '-')}".encode() for name in read_constants(train.__file__)]
    more = {"text": (), "xml": XML_WORDS, "json": JSON_WORDS}
    text, xml, json_text = (partial(mutate_text, words=WORDS + words) for words in more.values())
    flags = partial(mutate_text, words=(*WORDS, *constants, b"--help", b"--", b"-x", b"auto"))
    checks = {form: partial(check_file, form=form, frame_id=FRAMES[19]) for form in READERS}
    bbgt, paired, from_xml = (
        partial(with_check, READERS[form], lambda path, check=checks[form]: check(path)[0])
        for form in ("bbgt", "paired", "xml")
    )
    from_json = partial(with_check, read_json, lambda path: check_json(path)[0])
    visible, lwir = (
        partial(with_check, partial(read_image, modality=m), check_picture) for m in ("visible", "lwir")
    )
    results = partial(read_detections, frames=FRAMES)
    parsers = train.configure, eval_script.parse_arguments, detect.parse_arguments
    from_train, from_eval, from_detect = (partial(parse_flags, parse) for parse in parsers)
    return {
        "bbgt": Reader(bbgt, "x.txt", seeds["text"], text, 0.16),
        "paired": Reader(paired, "x.txt", seeds["text"], text, 0.1),
        "xml": Reader(from_xml, "x.xml", seeds["xml"], xml, 0.12),
        "annotation-json": Reader(from_json, "x.json", seeds["annotation-json"], json_text, 0.1),
        "result-text": Reader(results, "x.txt", seeds["result-text"], text, 0.13),
        "result-json": Reader(results, "x.json", seeds["result-json"], json_text, 0.12),
        "frame-list": Reader(read_frame_list, "result.frames.txt", seeds["image-list"], text, 0.08),
        "image-list": Reader(read_image_list, "x.txt", seeds["image-list"], text, 0.107),
        "checkpoint": Reader(load_checkpoint, "x.pt", seeds["checkpoint"], mutate_zip, 0.04),
        "jpeg": Reader(lwir, "x.jpg", seeds["jpeg"], mutate_bytes, 0.015),
        "png": Reader(visible, "x.jpg", seeds["png"], mutate_bytes, 0.01),
        "train-flags": Reader(from_train, "x", seeds["train-flags"], flags, 0.002),
        "eval-flags": Reader(from_eval, "x", seeds["eval-flags"], flags, 0.008),
        "detect-flags": Reader(from_detect, "x", seeds["detect-flags"], flags, 0.008),
    }


# ------------------------------------------------------------------------------ feeding


def make_input(name: str, reader: Reader, number: int, seed: int) -> bytes:
    """Input `number` of a reader."""
    return reader.mutate(random.Random(f"{seed} {name} {number}"), reader.seeds)


Fed = tuple[Counter[str], list[tuple[str, bytes, str]]]  # counts; failures: label, input, traceback


def feed(reader: Reader, inputs: Iterable[tuple[str, bytes]], folder: Path) -> Fed:
    """Write labelled inputs below `folder`, each over the other, and read them."""
    counts, failures = Counter[str](), []
    for label, data in inputs:
        path = folder / reader.file
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(path)
            counts["taken"] += 1
        except InputError:
            counts["refused"] += 1
        except BaseException:
            counts["failed"] += 1
            failures.append((label, data, traceback.format_exc()))
    return counts, failures


def feed_chunk(
    seeds: dict[str, list[bytes]], seed: int, folder: Path, chunk: tuple[str, range]
) -> tuple[str, Fed]:
    """Feed a reader the inputs of some numbers, in a process of the pool; after `LIMIT` it ends."""
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.__stderr__)
    torch.set_num_threads(1)
    own = folder / str(os.getpid())
    own.mkdir(exist_ok=True)
    (name, numbers), reader = chunk, make_readers(seeds)[chunk[0]]
    fed = feed(reader, ((f"{name}-{i}", make_input(name, reader, i, seed)) for i in numbers), own)
    faulthandler.cancel_dump_traceback_later()
    return name, fed


def feed_all(
    seeds: dict[str, list[bytes]], counts: dict[str, int], seed: int, workers: int, folder: Path
) -> Iterator[tuple[str, Fed]]:
    """Feed all readers in several processes. An input that ends its process ends everything, and
    is among what the processes were reading, which then is the last that is yielded."""
    starts = [(name, start) for name, count in counts.items() for start in range(0, count, CHUNK)]
    chunks = [(name, range(start, min(start + CHUNK, counts[name]))) for name, start in starts]
    ignore_sigint = (signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore_sigint) as pool:
        try:
            yield from pool.map(partial(feed_chunk, seeds, seed, folder), chunks)
        except BrokenProcessPool:
            own = [path for path in folder.iterdir() if path.name.isdigit()]
            files = [max(path.iterdir(), key=lambda file: file.stat().st_mtime_ns) for path in own]
            trace = "a process died that was reading this or another died-… file\n"
            died = [(f"died-{file.parent.name}-{file.name}", file.read_bytes(), trace) for file in files]
            yield "died", (Counter(failed=1), died)


def main() -> None:
    """Feed all readers their shares of the inputs; exit code 1 if any fails."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--inputs", type=int, default=1_000_000, help="of all readers together (%(default)s)")
    add("--seed", type=int, default=0, help="another seed, other inputs (%(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    add("--reader", action="append", help="feed this one alone; may be repeated")
    add("--out", type=Path, default=Path("fuzz-failures"), help="for what fails (%(default)s)")
    arguments = parser.parse_args()
    totals: dict[str, Counter[str]] = {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        seeds = make_seeds(Path(folder))
        readers = make_readers(seeds)
        chosen = arguments.reader or list(readers)
        if set(chosen) - set(readers):
            parser.error(f"the readers are {', '.join(readers)}")
        share = arguments.inputs / sum(readers[name].share for name in chosen)
        counts = {name: round(share * readers[name].share + 0.5) for name in chosen}
        fed = feed_all(seeds, counts, arguments.seed, arguments.workers, Path(folder))
        with tqdm(total=sum(counts.values()), unit="input") as bar, suppress(KeyboardInterrupt):
            for name, (new, failures) in fed:
                bar.update(new.total())
                totals[name] = totals.get(name, Counter()) + new
                for label, data, trace in failures[: MAX_KEPT - totals[name]["failed"] + new["failed"]]:
                    make_folder(arguments.out)
                    (arguments.out / label).write_bytes(data)
                    (arguments.out / f"{label}.trace").write_text(trace, errors="backslashreplace")
    print(f"{'reader':16} {'refused':>9} {'taken':>9} {'failed':>6}")
    for name, n in totals.items():
        print(f"{name:16} {n['refused']:9,} {n['taken']:9,} {n['failed']:6}")
    total = sum(totals.values(), Counter())
    kept = f", kept in {arguments.out}" if total["failed"] else ""
    print(f"{total.total():,} inputs, {total['failed']} failures{kept}")
    sys.exit(bool(total["failed"]))


if __name__ == "__main__":
    run_script(main)
