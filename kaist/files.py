"""Reading and writing files so that nothing is lost and whatever fails is named."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import json
import os
import re
import secrets
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MAX_TEXT = 2**28  # bytes of a text file; published results of the whole test set have 2**22


class InputError(Exception):
    """A file, flag or constant that cannot be used, told in one line.

    Args:
        problem: what is wrong, as a sentence without a full stop.
        remedy: what the user can do about it.
        file: the file at fault, if there is one.
        line: its 1-based line number, if known.

    Attributes: problem, remedy, file and line, as given.
    """

    def __init__(
        self, problem: str, remedy: str, *, file: str | Path | None = None, line: int | None = None
    ) -> None:
        place = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(f"{place}{problem}; {remedy}")
        self.problem, self.remedy, self.file, self.line = problem, remedy, file, line

    def __reduce__(self) -> tuple:
        """Pickled as its message: a loader's worker process sends it to the main one."""
        return type(self).__new__, (type(self), *self.args), vars(self)


# ------------------------------------------------------------------- reading


def check_file(path: Path) -> int:
    """The size of a file in bytes; a folder is refused, and a pipe, which one would wait for.

    Raises:
        OSError: there is nothing.
        InputError: it is something else.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise InputError(f"it is {kind}, not a file", "name a file", file=path)
    return status.st_size


def read_text(path: Path) -> str:
    """A text file's content, UTF-8 whatever the locale; as of `check_file`.

    What is no text, or more than memory may hold (then it is not read), is an InputError too.
    """
    size = check_file(path)
    if size > MAX_TEXT:
        problem = f"{size / 1e6:.0f} MB, and a text file may have {MAX_TEXT / 1e6:.0f}"
        raise InputError(problem, "split it, or leave out detections of low scores", file=path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("not a text file in UTF-8", "name another file", file=path) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def load_json(text: str, path: Path) -> Any:
    """The content of a JSON file, of which `text` is the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem, line = error.msg, error.lineno
    except (RecursionError, ValueError) as error:  # nested, or a number written, without end
        problem, line = str(error), None
    raise InputError(f"broken JSON ({problem})", "copy or write it again", file=path, line=line)


# ------------------------------------------------------------------- writing


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there; an InputError says where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made a folder ({error.strerror or error})"
        raise InputError(problem, "choose another place", file=path) from None


def write_atomically(path: Path, write: Callable[[Path], object], size: int = 0) -> None:
    """Write a file beside its place and rename it: what was there stays whole until then.

    The content has reached the disk before it gets its name, so that a power cut leaves the old
    file or the new one. Each writer has a temporary file of its own, under a random name.

    Args:
        write: called with the temporary path of an empty file, to fill it.
        size: bytes it is going to need, if that is known, for the message about a full disk.

    Raises:
        InputError: the file cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = max(size, temporary.stat().st_size if temporary.exists() else 0)
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            problem = f"the disk is full: it needs {size / 1e6:.1f} MB or more, {free / 1e6:.1f} MB are free"
            remedy = "free some (runs that are over, damaged.pt, frame caches) or choose another place; what "
            remedy += "was there before is whole"
        else:
            problem, remedy = f"cannot write it ({error.strerror or error})", "choose another place"
        raise InputError(problem, remedy, file=path) from None
    finally:
        with contextlib.suppress(OSError):  # of a read-only disk; the file is not there
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8 whatever the locale; what no UTF-8 can hold, such as
    other bytes of a file's name, is escaped."""
    write_atomically(path, lambda temporary: temporary.write_bytes(printable(text).encode()))


def printable(text: str) -> str:
    """The text with whatever UTF-8 cannot hold, such as other bytes of a file's name, escaped."""
    return text.encode(errors="backslashreplace").decode()


# ------------------------------------------------------------------- scripts


class PrintAction(argparse.Action):
    """A flag that prints a text and ends the program, as --help does."""

    def __init__(self, option_strings: list[str], dest: str, *, text: Any, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.text())
        parser.exit()


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose refusal is one InputError instead of a usage screen.

    A script of a package is named by the command that starts it.
    """

    def __init__(self, **settings: Any) -> None:
        script = Path(sys.argv[0])
        package = script.parent.name
        prog = f"python -m {package}.{script.stem}" if package in ("tools", "kaist") else None
        super().__init__(**{"prog": prog, **settings})

    def error(self, message: str) -> None:
        """Refuse a command line; of an unknown flag the known one that is near to it is named."""
        remedy = f"{self.prog} --help lists the flags"
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        known = [flag[2:] for action in self._actions for flag in action.option_strings]
        if unknown and (near := difflib.get_close_matches(unknown[1][2:], known, n=1)):
            remedy = f"did you mean --{near[0]}?"
        raise InputError(message, remedy)


def out_path(*endings: str) -> Callable[[str], Path]:
    """A parser of the path of a file to be written, which has one of these endings, or any."""

    def parse(text: str) -> Path:
        if not Path(text).name or os.path.isdir(text):
            raise argparse.ArgumentTypeError(f"{text!r} is no file's name")
        if endings and Path(text).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text} does not end in {' or '.join(endings)}")
        return Path(text)

    return parse


def check_folders(*files: Path | None) -> None:
    """Refuse files to be written whose folders are not there."""
    for path in filter(None, files):
        if not os.path.isdir(path.parent):  # unlike Path's own, it takes any name
            raise InputError("no such folder", "make it first", file=path.parent)


def check_overwrite(written: Iterable[Path | None], read: Iterable[Path | None]) -> None:
    """Refuse files to be written that are among those to be read."""
    inputs = {os.path.realpath(path) for path in read if path}
    for path in filter(None, written):
        if os.path.realpath(path) in inputs:
            raise InputError("it is to be read, and would be replaced", "choose another place", file=path)


def check_flags(check: Callable[[], object]) -> None:
    """Check a script's command line before it imports what takes seconds to import.

    Ctrl-C then ends the program without a traceback, until `run_script` takes over.
    """
    run_script(check)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main: Callable[[], None]) -> None:
    """Run an entry script's main(); an InputError becomes one line on stderr and exit code 2.

    So does an OSError that names its file, and an output that cannot be written. Ctrl-C, SIGTERM
    and a closed terminal unwind main() as exceptions (exit code 128 + signal); a closed pipe ends
    it silently. What the terminal's encoding lacks is escaped.
    """

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    heard = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in heard if signal.getsignal(number) == signal.SIG_DFL]  # else it is ignored
    for number in heard:
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as scripts have it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    end = None
    try:
        try:
            main()
        except SystemExit as error:  # as after --help
            end = error
        if sys.stdout:
            sys.stdout.flush()
    except InputError as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        exit_with_error("interrupted", 130, "")
    except OSError as error:
        if error.filename is not None:  # a name too long, a folder that may not be entered, …
            exit_with_error(f"{str(error.filename)[:200]}: {error.strerror}")
        if not discard_broken_output("\n"):
            raise
        if isinstance(error, BrokenPipeError):  # as by … | head -1
            sys.exit(128 + signal.SIGPIPE)
        exit_with_error(f"standard output: {error.strerror}")
    finally:
        for number in heard:  # an exception while the interpreter ends would be printed
            signal.signal(number, signal.SIG_DFL)
    if end:
        raise end


def exit_with_error(message: str, code: int = 2, kind: str = "error: ") -> None:
    """End the process with a line on stderr."""
    discard_broken_output()
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"{kind}{message}", file=sys.stderr)
    sys.exit(code)


def discard_broken_output(probe: str = "") -> bool:
    """Whether standard output cannot be written, not even `probe`; what waits is then dropped."""
    try:
        if sys.stdout:
            print(end=probe, flush=True)
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
