"""Feeds broken input to everything that reads a user's files and flags.

    python -m tools.fuzz --inputs 1000000 --seed 0

Inputs are valid files and command lines, mutated with a knowledge of their structure. A reader may
take one or refuse it with an InputError; any other exception, a hang, or a file that training
would refuse and the data check calls clean is a failure. Failing inputs are kept in `--out`; they
belong into tests/test_fuzz.py. Each input depends on its reader, number and seed alone. Not for
Windows, which has no alarms.
"""

from __future__ import annotations

import faulthandler
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import detect
import eval as eval_script
import train
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.config import OneLineParser, read_constants
from kaist.annotation_files import read_bbgt, read_json, read_paired, read_xml
from kaist.annotations import read_image_list
from kaist.demo import draw_demo
from kaist.files import InputError, make_folder, run_script
from kaist.images import read_image
from kaist.results import read_detections
from tools.faults import Fault, check_image, check_json, check_text, check_xml
from tools.mutations import WORDS, XML_WORDS, mutate_bytes, mutate_json, mutate_png, mutate_text, mutate_zip

INPUTS, SEED = 1_000_000, 0
LIMIT = 10.0  # seconds of the processor that one input may take
OUT = "fuzz-failures"
FRAMES = [f"set06/V000/I{number:05d}" for number in range(20)]
XML = """<?xml version="1.0"?>
<annotation><filename>set06/V000/I00019</filename>
<size><width>640</width><height>512</height><depth>4</depth></size>
<object><name>person</name><bndbox><x>10</x><y>20</y><w>30</w><h>60</h></bndbox>
<occlusion>0</occlusion></object>
<object><name>people</name><bndbox><x>9</x><y>8</y><w>7</w><h>6</h></bndbox></object></annotation>
"""


class Reader(NamedTuple):
    """What is fed: a call on a file, valid files, how they are mutated, its share of all inputs."""

    read: Callable[[Path], Any]
    file: str
    seeds: list[bytes]
    mutate: Callable[[random.Random, list[bytes]], bytes]
    share: float


class Hang(BaseException):
    """An input took longer than `LIMIT`."""


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


def read_companion(path: Path) -> None:
    """Read a result file whose companion is `path`."""
    result = path.with_name("result.txt")
    result.write_text("1,10,20,30,60,0.5\n20,10,20,30,60,0.5\n")
    read_detections(result, FRAMES)


def draw_seeds(folder: Path) -> dict[str, list[bytes]]:
    """Valid content for each kind of file, of a small demo set drawn below `folder`."""
    root = folder / "demo"
    draw_demo(root, train_frames=6, test_frames=6, progress=False)
    content = json.loads((root / "KAIST_annotation.json").read_text())
    content |= {"images": content["images"][:4], "annotations": content["annotations"][:6]}
    ids = [image["id"] for image in content["images"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    rows = [
        {"image_id": i, "category_id": 1 + (i == 2), "bbox": [10.5, 20, 30, 60], "score": 0.5}
        for i in range(4)
    ]
    pictures: dict[str, list[bytes]] = {"JPEG": [], "PNG": []}
    for path in sorted((root / "images").rglob("*.jpg"))[:4]:
        for kind in pictures:
            buffer = io.BytesIO()
            image = Image.open(path)
            image = image.quantize(8) if kind == "PNG" else image  # both small
            image.save(buffer, kind, quality=5)
            pictures[kind].append(buffer.getvalue())
    path = folder / "seed.pt"
    tensors = {"w": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.float16)}
    save_checkpoint(
        path,
        {
            "model": tensors,
            "model_args": {"size": (300, 300), "width": 0.5},
            "config": {"lr": 1e-3},
            "experiment": "26",
            "epoch": 3,
        },
    )
    return {
        "bbgt": [path.read_bytes() for path in sorted((root / "annotations").rglob("*.txt"))],
        "xml": [XML.encode()],
        "annotation-json": [json.dumps(content).encode()],
        "result-text": [b"".join(b"%d,10.5,20,30.25,60,0.%d\n" % (i, i) for i in range(1, 10))],
        "result-json": [json.dumps(rows).encode(), json.dumps(rows[:1], indent=1).encode()],
        "image-list": ["\n".join(FRAMES).encode(), b"set00/V000/I00001\n"],
        "checkpoint": [path.read_bytes()],
        "jpeg": pictures["JPEG"],
        "png": pictures["PNG"],
        "train-flags": [
            b"--experiment\n26\n--lr\n1e-3\n--infusion\n1,1,0,0,0,0\n--no-augment",
            b"--batch-size=8\n--input-size\n300,300\n--device\ncpu",
        ],
        "eval-flags": [
            b"--detections\n%b\n--annotations\nx.json\n--bootstrap\n10\n--by-video" % os.fsencode(__file__),
            b"--checkpoint\nx\n--subset\nnight\n--out\nx.png\n--show-errors\n2",
        ],
        "detect-flags": [b"x.jpg\n--checkpoint\ny\n--min-score\n0.2\n--out\nz\n--device\ncpu"],
    }


def make_readers(seeds: dict[str, list[bytes]]) -> dict[str, Reader]:
    """Everything that is fed, by name."""
    constants = [f"--{name.replace('_', '-')}".encode() for name in read_constants(train.__file__)]
    text = partial(mutate_text, words=WORDS)
    flags = partial(mutate_text, words=(*WORDS, *constants, b"--help", b"--", b"-x", b"auto"))
    xml = partial(mutate_text, words=WORDS + XML_WORDS)
    bbgt = partial(with_check, read_bbgt, lambda path: check_text(path, 11)[0])
    paired = partial(with_check, read_paired, lambda path: check_text(path, 5)[0])
    from_xml = partial(with_check, read_xml, lambda path: check_xml(path, FRAMES[19])[0])
    from_json = partial(with_check, read_json, lambda path: check_json(path)[0])
    visible = partial(with_check, partial(read_image, modality="visible"), check_picture)
    lwir = partial(with_check, partial(read_image, modality="lwir"), check_picture)
    results = partial(read_detections, frames=FRAMES)
    return {
        "bbgt": Reader(bbgt, "x.txt", seeds["bbgt"], text, 0.16),
        "paired": Reader(paired, "x.txt", seeds["bbgt"], text, 0.1),
        "xml": Reader(from_xml, "x.xml", seeds["xml"], xml, 0.12),
        "annotation-json": Reader(from_json, "x.json", seeds["annotation-json"], mutate_json, 0.1),
        "result-text": Reader(results, "x.txt", seeds["result-text"], text, 0.13),
        "result-json": Reader(results, "x.json", seeds["result-json"], mutate_json, 0.12),
        "companion": Reader(read_companion, "result.frames.txt", seeds["image-list"], text, 0.08),
        "image-list": Reader(read_image_list, "x.txt", seeds["image-list"], text, 0.107),
        "checkpoint": Reader(load_checkpoint, "x.pt", seeds["checkpoint"], mutate_zip, 0.04),
        "jpeg": Reader(lwir, "x.jpg", seeds["jpeg"], mutate_bytes, 0.015),
        "png": Reader(visible, "x.jpg", seeds["png"], mutate_png, 0.01),
        "train-flags": Reader(partial(parse_flags, train.configure), "x", seeds["train-flags"], flags, 0.002),
        "eval-flags": Reader(
            partial(parse_flags, eval_script.parse_arguments), "x", seeds["eval-flags"], flags, 0.008
        ),
        "detect-flags": Reader(
            partial(parse_flags, detect.parse_arguments), "x", seeds["detect-flags"], flags, 0.008
        ),
    }


def check_picture(path: Path) -> list[Fault]:
    """The data check of one image, as a list."""
    result = check_image(path, "visible")
    return [result] if isinstance(result, Fault) else []


# ------------------------------------------------------------------------------ feeding


def feed(reader: Reader, data: bytes, folder: Path) -> bool:
    """Write an input below `folder` and read it; returns whether it was refused.

    Raises:
        BaseException: whatever comes out of the reader other than an InputError.
    """
    path = folder / reader.file
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader.read(path)
        except InputError:
            return True
    return False


def make_input(name: str, reader: Reader, number: int, seed: int) -> bytes:
    """Input `number` of a reader."""
    return reader.mutate(random.Random(f"{seed} {name} {number}"), reader.seeds)


def hang(*_: Any) -> None:
    """The answer to an alarm."""
    raise Hang(f"more than {LIMIT:g} s")


def work(
    rank: int,
    workers: int,
    counts: dict[str, int],
    seeds: dict[str, list[bytes]],
    seed: int,
    folder: Path,
    queue: multiprocessing.Queue,
) -> None:
    """Feed every `workers`-th input; puts (reader, inputs, refused, seconds, failures)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has inherited another answer
    torch.set_num_threads(1)
    folder.mkdir()
    readers = make_readers(seeds)
    for name, count in counts.items():
        numbers = range(rank, count, workers)
        for start in range(0, len(numbers), 200):
            # Who waits for something, or hangs in C, hears no alarm: then the process ends.
            faulthandler.dump_traceback_later(60 * LIMIT, exit=True)
            some = numbers[start : start + 200]
            queue.put((name, *feed_many(name, readers[name], some, seed, folder)))
    queue.put(None)


def feed_many(
    name: str, reader: Reader, numbers: Sequence[int], seed: int, folder: Path
) -> tuple[int, int, float, list[tuple[int, bytes, str]]]:
    """Feed some inputs; returns how many, how many were refused, the seconds it took, and
    (number, input, traceback) of those that failed."""
    refused, failures, started = 0, [], time.perf_counter()
    signal.signal(signal.SIGPROF, hang)
    for number in numbers:
        data = make_input(name, reader, number, seed)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            refused += feed(reader, data, folder)
        except BaseException:
            failures.append((number, data, traceback.format_exc()))
        signal.setitimer(signal.ITIMER_PROF, 0)
    return len(numbers), refused, time.perf_counter() - started, failures


def main() -> None:
    """Feed all readers their shares of the inputs, in several processes."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--inputs", type=int, default=INPUTS, help="of all readers together (%(default)s)")
    add("--seed", type=int, default=SEED, help="another seed, other inputs (%(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    add("--reader", action="append", help="feed this one alone; may be repeated")
    add("--out", type=Path, default=Path(OUT), help="folder for what fails (%(default)s)")
    arguments = parser.parse_args()
    memory = Path("/dev/shm")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        seeds = draw_seeds(Path(folder))
        readers = make_readers(seeds)
        chosen = arguments.reader or list(readers)
        if set(chosen) - set(readers):
            parser.error(f"the readers are {', '.join(readers)}")
        share = sum(readers[name].share for name in chosen)
        counts = {name: math.ceil(arguments.inputs * readers[name].share / share) for name in chosen}
        fed, failed = run(counts, seeds, arguments, Path(folder))
    print(
        f"{fed:,} inputs in {time.perf_counter() - started:.0f} s, "
        f"{failed} failures" + f", kept in {arguments.out}" * bool(failed)
    )
    sys.exit(bool(failed))


def run(
    counts: dict[str, int], seeds: dict[str, list[bytes]], arguments: Namespace, folder: Path
) -> tuple[int, int]:
    """Run the processes, keep what fails, print a table; returns how many were fed and failed."""
    queue: multiprocessing.Queue = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(
            target=work,
            args=(rank, arguments.workers, counts, seeds, arguments.seed, folder / str(rank), queue),
            daemon=True,
        )
        for rank in range(arguments.workers)
    ]
    for worker in workers:
        worker.start()
    rows = {name: [0, 0, 0.0, 0] for name in counts}
    kept: Counter[str] = Counter()
    bar = tqdm(total=sum(counts.values()), unit="input")
    try:
        for name, n, refused, seconds, failures in messages(queue, workers):
            bar.update(n)
            new = n, refused, seconds, len(failures)
            rows[name] = [a + b for a, b in zip(rows[name], new, strict=True)]
            for number, data, trace in failures:
                kind = name + re.sub(r"\d+", "0", trace.splitlines()[-1])[:80]
                kept[kind] += 1
                if kept[kind] <= 3:
                    keep(arguments.out / f"{name}-{number}", data, trace)
    finally:  # Ctrl-C leaves the table of what was fed
        bar.close()
        print_table(rows)
    died = [rank for rank, worker in enumerate(workers) if worker.join() or worker.exitcode]
    for rank in died:
        newest = max((folder / str(rank)).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        keep(arguments.out / f"died-{newest.name}", newest.read_bytes(), "the process died\n")
    return sum(row[0] for row in rows.values()), sum(row[3] for row in rows.values()) + len(died)


def messages(queue: multiprocessing.Queue, workers: list) -> Iterator[tuple]:
    """What the processes put, until all have ended."""
    running = len(workers)
    while running:
        try:
            message = queue.get(timeout=1)
        except Empty:
            if not any(worker.is_alive() for worker in workers) and queue.empty():
                return
            continue
        if message is None:
            running -= 1
        else:
            yield message


def print_table(rows: dict[str, list]) -> None:
    """How many inputs of each reader were refused, taken and failed, and the time they took."""
    print(f"{'reader':16} {'inputs':>9} {'refused':>9} {'taken':>9} {'failed':>6} {'us each':>8}")
    for name, (n, refused, seconds, failed) in rows.items():
        print(
            f"{name:16} {n:9,} {refused:9,} {n - refused - failed:9,} {failed:6} "
            f"{1e6 * seconds / max(1, n):8.0f}"
        )


def keep(path: Path, data: bytes, trace: str) -> None:
    """Keep a failing input and what it did."""
    make_folder(path.parent)
    path.write_bytes(data)
    path.with_name(f"{path.name}.trace").write_text(trace, errors="backslashreplace")


if __name__ == "__main__":
    run_script(main)
