"""Checkpoints: saved atomically, verified by checksums and loaded without running code."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from engine.history import LAST_CHECKPOINT, find_run, read_run
from kaist.files import InputError, write_atomically

CHECKPOINT_FORMAT = "sds-ssd-kaist-1"
PREVIOUS_CHECKPOINT = "previous.pt"  # the checkpoint before last.pt


def save_checkpoint(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Save a checkpoint atomically.

    Args:
        content: tensors, primitives, lists, tuples and dicts: `model_args` and `model` (for `build_model`),
            `config`, `experiment`, and to resume training also optimiser, history and progress.
        previous: new path of the checkpoint that is replaced.

    Raises:
        InputError: it cannot be written; the old checkpoint is unchanged.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
            except RuntimeError as error:  # torch wraps the OSError that says why
                raise error.__context__ or error from None
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # not a rename, so that last.pt always exists
            except OSError:  # a file system without hard links
                os.replace(path, previous)

    write_atomically(path, write, size=tensor_bytes(content))


def tensor_bytes(content: Any) -> int:
    """Size of all tensors in nested dicts and lists, bytes: nearly the size of the checkpoint."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        content = list(content.values())
    return sum(map(tensor_bytes, content)) if isinstance(content, list) else 0


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, without running any code in the file.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.exists():
        remedy = "train one with python train.py, or check --checkpoint"
        raise InputError("checkpoint not found", remedy, file=path)
    try:
        verify_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many types
        previous = path.with_name(PREVIOUS_CHECKPOINT)
        remedy = "it is damaged, or from another program: choose another, or move this one away"
        if path.name == LAST_CHECKPOINT and previous.exists():
            remedy = f"use the one before it, {previous}"
        problem = f"not a readable checkpoint ({unpickling_problem(error)})"
        raise InputError(problem, remedy, file=path) from None
    if not is_checkpoint(content):
        raise InputError("not a checkpoint of this project", "choose one from train.py", file=path)
    return content


def verify_archive(path: Path) -> None:
    """Check the parts of a checkpoint's zip archive against their checksums, which torch.load does not do.

    Also reject what could need much more memory than the file's size: compressed or overlapping parts, which
    torch.save does not write, and a bytearray, which torch.load creates from its length.

    Raises:
        ValueError: it is not such an archive, or was changed.
    """
    if not path.is_file():
        raise ValueError("it is not a file")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is truncated, or not a checkpoint")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed, which train.py never does")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("its parts overlap")
        if any(b"\nbytearray\n" in archive.read(part) for part in parts if part.filename.endswith(".pkl")):
            raise ValueError("it asks for a bytearray, which could be of any size")
        if damaged := archive.testzip():
            raise ValueError(f"it is damaged: the checksum of {damaged} differs")


def is_checkpoint(content: Any) -> bool:
    """Whether loaded content has the parts of a checkpoint, with the right types."""
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        return False
    parts = [content.get(name) for name in ("config", "model_args", "model")]
    if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts):
        return False
    return isinstance(content.get("epoch", 0), int) and all(map(is_plain_tensor, parts[2].values()))


def is_plain_tensor(value: Any) -> bool:
    """Whether a value is a dense, real tensor whose storage is as large as its shape."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_complex():
        return False
    return value.untyped_storage().nbytes() >= value.nbytes


def unpickling_problem(error: Exception) -> str:
    """Why torch.load failed, in a few words. (torch's message suggests to run the file's code.)"""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it contains {code[1]}, which is code; none was run"
    if isinstance(error, UnpicklingError):
        return "it contains something other than weights"
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def choose_checkpoint(named: Path | None, runs: Path) -> Path:
    """The checkpoint to use; warns if its run is not finished.

    Args:
        named: a checkpoint, or the folder or name of a run (its `last.pt`). None: see `newest_checkpoint`.
        runs: the folder of the runs.

    Raises:
        InputError: there is no run.
    """
    path = find_run(named or newest_checkpoint(runs), runs)
    path = path / LAST_CHECKPOINT if path.is_dir() else path
    run = read_run(path.parent) if path.name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT) else None
    if run and not run["finished"]:
        print(f"warning: {path.parent} is not finished ({len(run['log'])} of {run['epochs']} epochs)")
    return path


def newest_checkpoint(folder: Path) -> Path:
    """The newest `last.pt` of a folder's finished runs, or of all runs if none is finished."""
    found = sorted(folder.glob(f"*/{LAST_CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        remedy = "train one with python train.py, or name one with --checkpoint"
        raise InputError(f"no run with a checkpoint in {folder.resolve()}", remedy)
    finished = [path for path in found if (run := read_run(path.parent)) and run["finished"]]
    chosen = (finished or found)[-1]
    if chosen != found[-1]:
        print(f"note: {found[-1].parent} is newer, but not finished; choose it with --checkpoint")
    return chosen
