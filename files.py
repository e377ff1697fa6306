"""Reading and writing files so that nothing is lost and whatever fails is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import InputError


def read_text(path: Path) -> str:
    """A text file's content; what is not text is refused."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("not a text file", "name another file", file=path) from None


def load_json(text: str, path: Path) -> Any:
    """The content of a JSON file, of which `text` is the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem, line = error.msg, error.lineno
    except (RecursionError, ValueError) as error:  # nested, or a number written, without end
        problem, line = str(error), None
    raise InputError(f"broken JSON ({problem})", "copy or write it again", file=path, line=line)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        InputError: it cannot be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot be made a folder ({error.strerror or error})", "choose another place",
            file=path,
        ) from None  # fmt: skip


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it: what was there stays whole until then.

    Args:
        write: called with the temporary path; it creates the file.

    Raises:
        InputError: the file cannot be written there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        raise InputError(
            f"cannot write it ({error.strerror or error})", "choose another place", file=path
        ) from None
    finally:
        beside.unlink(missing_ok=True)
