"""Functions in processes of their own, and the memory that they take."""

from __future__ import annotations

import re
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

STATUS = Path("/proc/self/status")


class Subprocess:
    """A function in a process of its own, which ends when this object is gone.

    make(*arguments) is called there and gives the function; a call runs it and returns what it
    returns. All of them have to be picklable.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: object) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=worker, args=(theirs, make, arguments), daemon=True).start()
        theirs.close()

    def __call__(self) -> object:
        """Raises EOFError or OSError where the process has died; it has said why on stderr."""
        self.pipe.send(None)
        return self.pipe.recv()


def worker(pipe: Connection, make: Callable, arguments: tuple) -> None:
    """Run make(*arguments)() whenever asked, as long as there is somebody to ask."""
    function = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(function())


def added_memory(make: Callable[..., Callable], *arguments: object) -> Callable[[], int]:
    """A function that gives the bytes by which this process's peak rises above what it held, in the
    first call of make(*arguments). On Linux; `resource` would begin with the parent's peak."""
    function = make(*arguments)

    def held(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", STATUS.read_text())[1])

    def measure() -> int:
        before = held("VmRSS")
        function()
        return held("VmHWM") - before

    return measure
