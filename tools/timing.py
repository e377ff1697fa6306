"""How things are measured: in turns, some in processes of their own, each result a line with its aim."""

import atexit
import os
import re
import signal
import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from kaist.annotations import open_annotations, read_image_list
from kaist.demo import draw_set
from kaist.frames import Frame, load_frames

TURNS = 3  # of each function, at least
STATUS = Path("/proc/self/status")
ROWS = "1 6 7 12 13 14 18 20 21 22 25 26 26b 27 28 29 31 32 33 35 36 38 39 40 41 42 50 demo"  # of every kind
# Of a `Setting`, to see on a CPU that all parts run.
TINY = {"seconds": 0.0, "batch": 2, "drawn": 8, "width": 0.03, "speed_width": 0.03, "rows": "26 29 42"}
TINY |= {"batches": (1,), "frames": 8, "workers": 0, "modes": ("off",), "patience": 50.0}


@dataclass(frozen=True)
class Setting:
    """What every measurement needs: the device and its precision, a folder for what it draws, and how much is
    measured; by default all of a GPU."""

    device: torch.device
    precision: torch.dtype
    folder: Path
    seconds: float = 1.0  # that a measurement takes
    batch: int = 32  # frames of a step
    drawn: int = 128  # training frames of the demo set
    width: float = 0.125  # of the networks whose values are compared
    speed_width: float = 1.0  # of those that are timed
    rows: str = ROWS  # whose losses are compared
    batches: tuple[int, ...] = (8, 16, 64, 128, 256)  # of the steps whose memory is looked at
    frames: int = 2252  # of the test list
    workers: int = 8  # of the loaders
    modes: tuple[str, ...] = ("off", "graphs", "on")  # that COMPILE is compared at
    patience: float = 1.0  # times the seconds that a part may take

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def demo(self) -> tuple[Path, list[Frame]]:
        """A small demo set, and its training frames that have people."""
        root = self.folder / "demo"
        if not root.exists():
            draw_set(root, train_frames=self.drawn, test_frames=6, progress=False)
        ids = read_image_list(root / "imageSets/train-all.txt")
        frames = load_frames(ids, open_annotations(root), min_height=12, margin=5)
        return root, [frame for frame in frames if frame.n_persons]


class Line(NamedTuple):
    """What was measured, the value, its unit, a remark, the aim, and whether it is met, None where
    nothing was asked for."""

    what: str
    value: float
    unit: str
    note: str = ""
    aim: str = ""
    met: bool | None = None

    def row(self) -> str:
        """The line of a table under `HEADER`."""
        verdict = {None: "", True: "met", False: "**missed**"}[self.met]
        return f"| {self.what} | {self.value:.4g} | {self.unit} | {self.aim} | {verdict} | {self.note} |"


HEADER = "| what | value | unit | aim | | |\n|---|---|---|---|---|---|"


def at_least(what: str, value: float, unit: str, aim: float, note: str = "") -> Line:
    """A line whose value has to reach an aim."""
    return Line(what, value, unit, note, f">= {aim:g}", bool(value >= aim))


def at_most(what: str, value: float, unit: str, aim: float, note: str = "") -> Line:
    """A line whose value may not exceed an aim."""
    return Line(what, value, unit, note, f"<= {aim:g}", bool(value <= aim))


class Timing(NamedTuple):
    """Median seconds of a call, and how far the turns were from it, in words."""

    seconds: float
    spread: str


def time_in_turns(setting: Setting, *functions: Callable[[], object]) -> list[Timing]:
    """Time functions that do the same work, or one alone: a warm-up, then turns until the time is up.

    A turn is one call; on a GPU it is a block of calls, and the device is waited for at its end
    alone, as in training.
    """

    def turn(function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
        return (time.perf_counter() - start) / calls

    warm_ups = 3 if setting.on_gpu else 1  # in which kernels are chosen, graphs captured
    once = [min(turn(function, 1) for _ in range(warm_ups)) for function in functions]
    calls = [max(1, round(setting.seconds / 5 / taken)) if setting.on_gpu else 1 for taken in once]
    end, turns = time.perf_counter() + setting.seconds, []
    while len(turns) < TURNS or time.perf_counter() < end:
        turns.append([turn(*pair) for pair in zip(functions, calls, strict=True)])
    timings = []
    for times in zip(*turns, strict=True):
        median = statistics.median(times)
        low, high = (100 * (bound / median - 1) for bound in (min(times), max(times)))
        timings.append(Timing(median, f"{low:+.1f} to {high:+.1f}% in time"))
    return timings


class Subprocess:
    """A function in a process of its own, which ends, with those that it has started, by `end()` or when
    this object is gone.

    make(*arguments) is called there, at the first call, and gives the function; a call runs it and
    returns what it returns. All of them have to be picklable.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: object) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, make, arguments))
        process.start()
        theirs.close()
        self.end = weakref.finalize(self, end, process)
        atexit.register(self.end)  # before multiprocessing waits for it

    def __call__(self, seconds: float | None = None) -> object:
        """Raises TimeoutError after so many seconds, RuntimeError for an error there or its death."""
        try:
            self.pipe.send(None)
            if not self.pipe.poll(seconds):
                raise TimeoutError("it took longer than it may")
            answer, error = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("its process died") from None
        if error:
            raise RuntimeError(error)
        return answer


def serve(pipe: Connection, make: Callable, arguments: tuple) -> None:
    """Run make(*arguments)() whenever asked, as long as there is somebody to ask."""
    if hasattr(os, "setsid"):  # so that what it starts ends with it
        os.setsid()
    function = None
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.recv()
            try:
                function = function or make(*arguments)
                answer = function(), ""
            except Exception as problem:  # whatever it is, others can do without
                answer = None, f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]
            pipe.send(answer)


def end(process: BaseProcess) -> None:
    """End a process of `serve` and those that it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may have no group of its own yet
    process.join()


def added_memory(setting: Setting, make: Callable[..., Callable], *arguments: object) -> Callable[[], int]:
    """A function that gives the bytes by which this process's peak rises above what it held, in the first
    call of make(setting, …). On Linux; `resource` would begin with the parent's peak."""
    function = make(setting, *arguments)

    def held(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", STATUS.read_text())[1])

    def measure() -> int:
        before = held("VmRSS")
        function()
        return held("VmHWM") - before

    return measure
