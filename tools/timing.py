"""Timing and memory measurements: interleaved turns, subprocesses, and table lines with targets."""

from __future__ import annotations

import os
import pickle
import re
import signal
import statistics
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kaist.annotations import open_annotations, read_image_list
from kaist.demo import draw_set
from kaist.frames import Frame, load_frames

MIN_TURNS = 3  # timed turns of each function
PROCESS_STATUS = Path("/proc/self/status")
# Rows of the lab book with every kind of network, loss and optimiser.
LOSS_ROWS = "1 6 7 12 13 14 18 20 21 22 25 26 26b 27 28 29 31 32 33 35 36 38 39 40 41 42 50 demo"
# Arguments of a `Setting` with which every part of the GPU report runs on a CPU in short time.
TINY_SETTING = {"seconds": 0.0, "batch": 2, "train_frames": 8, "width": 0.03, "speed_width": 0.03}
TINY_SETTING |= {"loss_rows": "26 29 42", "batch_sizes": (1,), "test_frames": 8, "workers": 0}
TINY_SETTING |= {"compile_modes": ("off",), "time_factor": 50.0}


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured. The defaults are those of the report on a GPU."""

    device: torch.device
    precision: torch.dtype
    folder: Path  # for the files that measurements write
    seconds: float = 1.0  # time of a measurement
    batch: int = 32  # frames of a training step
    train_frames: int = 128  # size of the demo set
    width: float = 0.125  # width multiplier of networks whose values are compared
    speed_width: float = 1.0  # width multiplier of networks that are timed
    loss_rows: str = LOSS_ROWS  # rows whose losses and gradients are compared
    batch_sizes: tuple[int, ...] = (8, 16, 64, 128, 256)  # of the steps whose memory is measured
    test_frames: int = 2252  # length of the evaluated image list
    workers: int = 8  # processes of a loader
    compile_modes: tuple[str, ...] = ("off", "graphs", "on")  # values of COMPILE that are compared
    time_factor: float = 1.0  # multiplies the time limits of the report

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def demo(self) -> tuple[Path, list[Frame]]:
        """The root of a small demo set, drawn if absent, and its training frames that contain persons."""
        root = self.folder / "demo"
        if not root.exists():
            draw_set(root, train_frames=self.train_frames, test_frames=6, progress=False)
        ids = read_image_list(root / "imageSets/train-all.txt")
        frames = load_frames(ids, open_annotations(root), min_height=12, margin=5)
        return root, [frame for frame in frames if frame.n_persons]


class Line(NamedTuple):
    """A measured value with its target, `aim`, and whether it was met; None where there is no target."""

    what: str
    value: float
    unit: str
    note: str = ""
    aim: str = ""
    met: bool | None = None

    def row(self) -> str:
        """The line as a row of the Markdown table that begins with `TABLE_HEADER`."""
        verdict = {None: "", True: "met", False: "**missed**"}[self.met]
        return f"| {self.what} | {self.value:.4g} | {self.unit} | {self.aim} | {verdict} | {self.note} |"


TABLE_HEADER = "| what | value | unit | aim | | |\n|---|---|---|---|---|---|"


def at_least(what: str, value: float, unit: str, aim: float, note: str = "") -> Line:
    """A line whose target is a lower bound."""
    return Line(what, value, unit, note, f">= {aim:g}", bool(value >= aim))


def at_most(what: str, value: float, unit: str, aim: float, note: str = "") -> Line:
    """A line whose target is an upper bound."""
    return Line(what, value, unit, note, f"<= {aim:g}", bool(value <= aim))


class Timing(NamedTuple):
    """Median seconds of a call, and the deviation of the fastest and slowest turn from it as text."""

    seconds: float
    spread: str


def timer(function: Callable[[], object]) -> Callable[[int], float]:
    """A function of n that calls `function` n times and returns the mean seconds of a call."""

    def clock() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    return lambda n: timeit.timeit(function, timer=clock, number=n) / n


def make_timer(make: Callable[..., Callable[[], object]], *arguments: object) -> Callable[[int], float]:
    """The timer of the function that make(*arguments) returns."""
    return timer(make(*arguments))


def time_in_turns(setting: Setting, *timers: Callable[[int], float]) -> list[Timing]:
    """Run timers by turns: each once per round, at least `MIN_TURNS` rounds and `setting.seconds`.

    A turn is one call on a CPU. On a GPU it is a block of calls that is synchronised at its end only,
    as in training. Warm-up calls come first.
    """
    warm_ups = 3 if setting.on_gpu else 1  # kernels are chosen, graphs captured
    once = [min(timer(1) for _ in range(warm_ups)) for timer in timers]
    calls = [max(1, round(setting.seconds / 5 / taken)) if setting.on_gpu else 1 for taken in once]
    end, rounds = time.perf_counter() + setting.seconds, []
    while len(rounds) < MIN_TURNS or time.perf_counter() < end:
        rounds.append([timer(n) for timer, n in zip(timers, calls, strict=True)])
    timings = []
    for times in zip(*rounds, strict=True):
        median = statistics.median(times)
        low, high = (100 * (bound / median - 1) for bound in (min(times), max(times)))
        timings.append(Timing(median, f"{low:+.1f} to {high:+.1f}% in time"))
    return timings


class Subprocess:
    """A function that runs in a spawned process and keeps its state there from call to call.

    `make(*arguments)` returns the function. It is called in that process, at the first call. What is sent
    between the processes has to be picklable. At the end of a `with` block the process and its children
    are killed.
    """

    def __init__(self, make: Callable[..., Callable], *arguments: object) -> None:
        self.payload = pickle.dumps((make, *arguments))
        new_group = getattr(os, "setsid", None)  # a process group, which includes its children
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=new_group)
        self.pid = self.pool.submit(os.getpid)  # starts the process, which imports modules meanwhile

    def __call__(self, *arguments: object, seconds: float | None = None) -> Any:
        """Call the function. Raises TimeoutError after `seconds`, RuntimeError where it fails or its process
        dies."""
        future = self.pool.submit(call, self.payload, *arguments)
        if not wait([future], seconds).done:
            raise TimeoutError("the time limit was exceeded")
        return future.result()

    def __enter__(self) -> Subprocess:
        return self

    def __exit__(self, *exception: object) -> None:
        posix = hasattr(os, "killpg")
        kill, number = (os.killpg, signal.SIGKILL) if posix else (os.kill, signal.SIGTERM)
        with suppress(ProcessLookupError, BrokenProcessPool):
            kill(self.pid.result(), number)
        self.pool.shutdown()


def call(payload: bytes, *arguments: object) -> object:
    """Call the function of a `Subprocess`. Raises RuntimeError for its exceptions, not all of which can be
    pickled."""
    try:
        return build(payload)(*arguments)
    except Exception as problem:
        message = f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]
        raise RuntimeError(message) from None


@cache
def build(payload: bytes) -> Callable:
    """Unpickle (make, *arguments) and return make(*arguments), once in a process."""
    make, *arguments = pickle.loads(payload)
    return make(*arguments)


def added_memory(make: Callable[..., Callable], *arguments: object) -> Callable[[], int]:
    """A function that returns the bytes by which the first call of make(…) raises this process's peak memory
    above its current memory. Linux only; `resource` would include the parent's peak."""
    function = make(*arguments)

    def status(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", PROCESS_STATUS.read_text())[1])

    def measure() -> int:
        before = status("VmRSS")
        function()
        return status("VmHWM") - before

    return measure
