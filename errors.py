"""The one error type for whatever a user's file, flag or constant can get wrong."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path


class InputError(Exception):
    """A file, flag or constant that cannot be used, told in one line.

    Args:
        problem: what is wrong, as a sentence without a full stop.
        remedy: what the user can do about it.
        file: the file at fault, if there is one.
        line: its 1-based line number, if known.

    Attributes: problem, file and line, as given.
    """

    def __init__(
        self, problem: str, remedy: str, *, file: str | Path | None = None, line: int | None = None
    ) -> None:
        place = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(f"{place}{problem}; {remedy}")
        self.problem, self.file, self.line = problem, file, line

    def __reduce__(self) -> tuple:
        """Pickled as its message: a loader's worker process sends it to the main one."""
        return type(self).__new__, (type(self), *self.args), vars(self)


def run_script(main: Callable[[], None]) -> None:
    """Run an entry script's main(); an InputError becomes one line on stderr and exit code 2.

    So does what the system says of a file, where nobody has foreseen it. Ctrl-C, SIGTERM and a
    closed terminal unwind main() as exceptions (exit code 128 + signal).
    """

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:  # else someone ignores it
            signal.signal(number, stop)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as scripts have it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a name too long, a folder that may not be entered, a failing disk
        if error.filename is None:
            raise
        print(f"error: {str(error.filename)[:200]}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
