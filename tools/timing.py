"""How tools/benchmark.py measures: work in turns, medians, and the rows of its table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from kaist.demo import draw_demo


@dataclass(frozen=True)
class Bench:
    """What every row needs: the device and its precision, a folder, and how long to measure.

    seconds, rounds: of measuring a row, at least; demo: a small demo set.
    """

    device: torch.device
    precision: torch.dtype
    folder: Path
    quick: bool
    seconds: float
    rounds: int = 3

    @property
    def demo(self) -> Path:
        root = self.folder / "demo"
        if not root.exists():
            draw_demo(root, train_frames=16, test_frames=8, progress=False)
        return root


class Row(NamedTuple):
    """A line of the table; `met` is None where there is nothing to reach."""

    work: str
    ours: str
    reference: str
    ratio: str
    target: str
    met: bool | None

    def __str__(self) -> str:
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        return f"| {' | '.join(self[:5])} | {verdict} |"


def faster(work: str, ours: float, reference: float, name: str, target: float) -> Row:
    """A row of two times in milliseconds; the target is how many times faster ours has to be."""
    ratio = reference / ours
    return Row(
        work,
        f"{ours:.4g} ms",
        f"{name}: {reference:.4g} ms",
        f"{ratio:.3g}x faster",
        f">= {target:g}x",
        ratio >= target,
    )


def share(work: str, ours: str, reference: str, ratio: float, target: float) -> Row:
    """A row in which ours has to stay below a share of the reference."""
    return Row(work, ours, reference, f"{ratio:.3g} of it", f"<= {target:g}", ratio <= target)


def interleave(bench: Bench, *functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each function: a warm-up, then rounds in turns."""
    for function in functions:
        lap(function, bench.device)
    end = time.perf_counter() + bench.seconds
    rounds: list[list[float]] = []
    while len(rounds) < bench.rounds or time.perf_counter() < end:
        rounds.append([1e3 * lap(function, bench.device) for function in functions])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


class Apart:
    """A function in a process of its own, which ends when this object is gone.

    make(*arguments) is called there and gives the function; a call runs it and returns what it
    returns. All of them have to be picklable.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: object) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, make, arguments), daemon=True).start()
        theirs.close()

    def __call__(self) -> object:
        """Raises EOFError or OSError where the process has died; it has said why on stderr."""
        self.pipe.send(None)
        return self.pipe.recv()


def serve(pipe: Connection, make: Callable, arguments: tuple) -> None:
    """Run make(*arguments)() whenever asked, as long as there is somebody to ask."""
    function = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(function())


def lap(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done with it."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
