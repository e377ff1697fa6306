"""Read and write files safely, report bad input in one line, and run the command-line scripts."""

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

MAX_TEXT = 2**28  # bytes of a text file; published results of the whole test set have about 2**22


class InputError(Exception):
    """A file, flag or constant that cannot be used, reported to the user in one line.

    The arguments are also attributes.

    Args:
        problem: what is wrong, as a sentence without a full stop.
        remedy: what the user can do about it.
        file: the file at fault, if there is one.
        line: its 1-based line number, if known.
    """

    def __init__(
        self, problem: str, remedy: str, *, file: str | Path | None = None, line: int | None = None
    ) -> None:
        place = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(f"{place}{problem}; {remedy}")
        self.problem, self.remedy, self.file, self.line = problem, remedy, file, line

    def __reduce__(self) -> tuple:
        """Pickle the finished message, so that a worker process can send it to the main process."""
        return type(self).__new__, (type(self), *self.args), vars(self)


# ------------------------------------------------------------------- reading


def check_file(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        OSError: the path does not exist.
        InputError: it is a folder, or a pipe or device, from which a read could wait forever.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise InputError(f"it is {kind}, not a file", "choose a file", file=path)
    return status.st_size


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, with or without a byte order mark, whatever the locale.

    Raises:
        InputError: not a regular file, not UTF-8, or larger than `MAX_TEXT`.
    """
    size = check_file(path)
    if size > MAX_TEXT:
        problem = f"the file has {size / 1e6:.0f} MB, the limit for text files is {MAX_TEXT / 1e6:.0f} MB"
        raise InputError(problem, "split it, or leave out detections of low scores", file=path)
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("not a text file in UTF-8", "choose another file", file=path) from None


def load_json(text: str, path: Path) -> Any:
    """Parse the text of a JSON file; `path` is for the InputError that reports broken JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem, line = error.msg, error.lineno
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with too many digits
        problem, line = str(error), None
    raise InputError(f"broken JSON ({problem})", "copy or create the file again", file=path, line=line)


# ------------------------------------------------------------------- writing


def make_folder(path: Path) -> None:
    """Create a folder and its parents if they do not exist; raises InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot create this folder ({error.strerror or error})"
        raise InputError(problem, "choose another folder", file=path) from None


def write_atomically(path: Path, write: Callable[[Path], object], size: int = 0) -> None:
    """Write a temporary file in the same folder, then rename it to `path`.

    The content is flushed to the disk before the rename, so that a power cut leaves either the old
    file or the new one. The temporary name is random, so that several processes can write one path.

    Args:
        write: writes the content; it is called with the path of the empty temporary file.
        size: expected size in bytes, if known, for the message about a full disk.

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
            remedy = "free some space (finished runs, damaged.pt, frame caches) or choose another place; the "
            remedy += "previous version of the file is intact"
        else:
            problem, remedy = f"cannot write it ({error.strerror or error})", "choose another place"
        raise InputError(problem, remedy, file=path) from None
    finally:
        with contextlib.suppress(OSError):  # a read-only disk: there is no file to delete
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically as UTF-8, whatever the locale, escaped as by `printable`."""
    write_atomically(path, lambda temporary: temporary.write_bytes(printable(text).encode()))


def printable(text: str) -> str:
    """Escape what UTF-8 cannot encode, such as the undecodable bytes of a file name."""
    return text.encode(errors="backslashreplace").decode()


# ------------------------------------------------------------------- scripts


class PrintAction(argparse.Action):
    """A flag that prints `text()` and exits, as --help does."""

    def __init__(self, option_strings: list[str], dest: str, *, text: Any, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.text())
        parser.exit()


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises one InputError where argparse would print the usage.

    The program name of a package's script is the command that starts it: python -m tools.priors.
    """

    def __init__(self, **kwargs: Any) -> None:
        script = Path(sys.argv[0])
        package = script.parent.name
        prog = f"python -m {package}.{script.stem}" if package in ("tools", "kaist", "tests") else None
        super().__init__(**{"prog": prog, **kwargs})

    def error(self, message: str) -> None:
        """Raise an InputError; the remedy for an unknown flag is a similar known flag, if there is one."""
        remedy = f"{self.prog} --help lists the flags"
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        known = [flag[2:] for action in self._actions for flag in action.option_strings]
        if unknown and (near := difflib.get_close_matches(unknown[1][2:], known, n=1)):
            remedy = f"did you mean --{near[0]}?"
        raise InputError(message, remedy)


def out_path(*suffixes: str) -> Callable[[str], Path]:
    """Return an argparse type for the path of an output file; suffixes: the allowed ones, none: any."""

    def parse(text: str) -> Path:
        if not Path(text).name or os.path.isdir(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a file name")
        if suffixes and Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text} does not end in {' or '.join(suffixes)}")
        return Path(text)

    return parse


def check_folders(*files: Path | None) -> None:
    """Raise an InputError unless the folders of these output files exist; None is skipped."""
    for path in filter(None, files):
        if not os.path.isdir(path.parent):  # unlike Path.is_dir, it accepts names that are too long
            raise InputError("no such folder", "create it first", file=path.parent)


def check_overwrite(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Raise an InputError if an output file is also an input file; None is skipped."""
    real_inputs = {os.path.realpath(path) for path in inputs if path}
    for path in filter(None, outputs):
        if os.path.realpath(path) in real_inputs:
            raise InputError("an input file that would be overwritten", "choose another place", file=path)


def check_flags(check: Callable[[], object]) -> None:
    """Check a script's command line before slow imports such as torch.

    Ctrl-C during these imports ends the program without a traceback, until `run_script` is called.
    """
    run_script(check)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main() and turn errors into exit codes.

    An InputError, an OSError that names its file, and a standard output that cannot be written print
    one line on stderr and exit with 2. Ctrl-C, SIGTERM and SIGHUP raise an exception in main() and exit
    with 128 + signal. A closed pipe exits silently. Characters that stdout cannot encode are escaped.
    """

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handled = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # not under nohup
    for number in handled:
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by `check_flags`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    exit_request = None
    try:
        try:
            main()
        except SystemExit as error:  # such as after --help; the output still has to be flushed
            exit_request = error
        if sys.stdout:
            sys.stdout.flush()
    except InputError as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        exit_with_error("interrupted", 130, "")
    except OSError as error:
        if error.filename is not None:  # a name that is too long, a folder without permission, …
            exit_with_error(f"{str(error.filename)[:200]}: {error.strerror}")
        if not discard_broken_output("\n"):
            raise
        if isinstance(error, BrokenPipeError):  # such as by … | head -1
            sys.exit(128 + signal.SIGPIPE)
        exit_with_error(f"standard output: {error.strerror}")
    finally:
        for number in handled:  # an exception at interpreter exit would print a traceback
            signal.signal(number, signal.SIG_DFL)
    if exit_request:
        raise exit_request


def exit_with_error(message: str, code: int = 2, prefix: str = "error: ") -> None:
    """Print one line on stderr and exit."""
    discard_broken_output()
    with contextlib.suppress(OSError):  # stderr may be closed
        print(f"{prefix}{message}", file=sys.stderr)
    sys.exit(code)


def discard_broken_output(probe: str = "") -> bool:
    """Flush stdout after writing `probe`; return whether that failed, and then discard all output."""
    try:
        if sys.stdout:
            print(end=probe, flush=True)
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
