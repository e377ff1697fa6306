"""Zip archives that tell whether they are whole: the comment at their end is their SHA-256.

Every zip reader takes such a file, torch.load among them; none of them looks at the content's own
checksums when it is in a hurry, as torch.load is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kaist.files import InputError, write_atomically

MARK = b"sha256 "
LENGTH = len(MARK) + 64  # bytes of the comment


def seal(file: BinaryIO) -> None:
    """Give an archive without a comment, open for reading and writing, its checksum as one."""
    file.seek(-2, os.SEEK_END)  # the last field of a zip archive is its comment's length
    file.write(LENGTH.to_bytes(2, "little"))
    file.flush()
    file.write(MARK + sha256(file, file.tell()))


def check_seal(path: Path) -> None:
    """Find any change to a sealed file, a single bit's anywhere included.

    An archive that ends without a comment passes: it was never sealed.

    Raises:
        ValueError: the file was cut short or changed, or never was such an archive.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - LENGTH))
        tail = file.read()
        if tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0":
            return
        if tail[: len(MARK)] != MARK:
            raise ValueError("it is cut short, or no such file at all")
        if tail != MARK + sha256(file, end - LENGTH):
            raise ValueError("it is damaged: its checksum differs")


def sha256(file: BinaryIO, length: int) -> bytes:
    """The SHA-256 of a file's first bytes, in hexadecimal digits."""
    with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest().encode()


CHECKPOINT_FORMAT = "sds-ssd-kaist-1"


LAST, PREVIOUS = "last.pt", "previous.pt"  # a run's newest checkpoint, and the one before it


def save_checkpoint(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Save a checkpoint of tensors, primitives, lists, tuples and dicts, sealed and atomically.

    Args:
        content: holds `model_args` and `model` (what `build_model` needs), `config`, `experiment`,
            and for training also the optimiser, the history and where the run stands.
        previous: the name that the checkpoint which is replaced gets.

    Raises:
        InputError: it cannot be written; what was there is whole.
    """
    content = {"format": CHECKPOINT_FORMAT, **content}

    def write(beside: Path) -> None:
        with beside.open("w+b") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch, closing the file, hides why it cannot
                raise error.__context__ or error from None
            seal(file)
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # so that there is a last.pt at every instant
            except OSError:  # a file system without hard links
                os.replace(path, previous)

    write_atomically(path, write, size=bytes_of(content))


def bytes_of(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists: nearly those of their checkpoint."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        content = list(content.values())
    return sum(map(bytes_of, content)) if isinstance(content, list) else 0


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU; nothing in the file can run code.

    Raises:
        InputError: no such file, a damaged one, or one of another program.
    """
    path = Path(path)
    try:
        check_seal(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            "checkpoint not found", "train one with python train.py, or check --checkpoint", file=path
        ) from None
    except Exception as error:  # whatever torch meets in a foreign file
        previous = path.with_name(PREVIOUS)
        kept = path.name == LAST and previous.exists()
        raise InputError(
            f"not a readable checkpoint ({unpickling_problem(error)})",
            f"use the one before it, {previous}"
            if kept
            else "it is damaged or another program's: choose another, or move this one away",
            file=path,
        ) from None
    needed = {"format", "model_args", "config", "model"}
    if (
        not isinstance(content, dict)
        or not needed <= content.keys()
        or content["format"] != CHECKPOINT_FORMAT
    ):
        raise InputError("not a checkpoint of this project", "choose one that train.py wrote", file=path)
    return content


def unpickling_problem(error: Exception) -> str:
    """What stopped torch.load, in a few words; torch's own would advise to run the file's code."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it holds {code[1]}, which is code; none was run"
    if isinstance(error, UnpicklingError):
        return "it holds something else than weights"
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def choose_checkpoint(named: Path | None, runs: Path) -> Path:
    """The checkpoint named, the `last.pt` of a run's folder named, or the newest among `runs`."""
    path = named or newest_checkpoint(runs)
    return path / LAST if path.is_dir() else path


def newest_checkpoint(folder: Path) -> Path:
    """The `last.pt` that was written last among a folder's runs."""
    found = sorted(folder.glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            "no run with a checkpoint",
            "train one with python train.py, or name one with --checkpoint",
            file=folder,
        )
    return found[-1]
