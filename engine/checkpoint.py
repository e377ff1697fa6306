"""Checkpoints: files of weights and numbers, written atomically, found damaged by their checksums."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from engine.history import LAST, find_run, read_run
from kaist.files import InputError, write_atomically

CHECKPOINT_FORMAT = "sds-ssd-kaist-1"
PREVIOUS = "previous.pt"  # a run's newest checkpoint but one


def save_checkpoint(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Save a checkpoint of tensors, primitives, lists, tuples and dicts, atomically. InputError: it cannot be
    written; what was there is whole.

    Args:
        content: holds `model_args` and `model` (what `build_model` needs), `config`, `experiment`,
            and for training also the optimiser, the history and where the run stands.
        previous: the name that the checkpoint which is replaced gets.
    """

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            try:
                torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
            except RuntimeError as error:  # torch, closing the file, hides why it cannot
                raise error.__context__ or error from None
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # so that there is a last.pt at every instant
            except OSError:  # a file system without hard links
                os.replace(path, previous)

    write_atomically(path, write, size=tensor_bytes(content))


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists: nearly those of their checkpoint."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        content = list(content.values())
    return sum(map(tensor_bytes, content)) if isinstance(content, list) else 0


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU; nothing in the file can run code. InputError: no such file, a damaged
    one, or one of another program."""
    path = Path(path)
    if not path.exists():
        remedy = "train one with python train.py, or check --checkpoint"
        raise InputError("checkpoint not found", remedy, file=path)
    try:
        verify_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch meets in a foreign file
        previous = path.with_name(PREVIOUS)
        remedy = "it is damaged or another program's: choose another, or move this one away"
        if path.name == LAST and previous.exists():
            remedy = f"use the one before it, {previous}"
        problem = f"not a readable checkpoint ({unpickling_problem(error)})"
        raise InputError(problem, remedy, file=path) from None
    if not is_checkpoint(content):
        raise InputError("not a checkpoint of this project", "choose one that train.py wrote", file=path)
    return content


def verify_archive(path: Path) -> None:
    """Compare a checkpoint's parts with the checksums that its zip archive keeps of them.

    torch.load itself does not. A part that is compressed is refused: torch.save writes none, and
    it could be a thousand times larger than the file. So is the one thing that torch.load would
    make of nothing but a number, at any size.

    Raises:
        ValueError: it is no such archive, or was changed.
    """
    if not path.is_file():
        raise ValueError("it is not a file")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is cut short, or no checkpoint at all")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed, which train.py never does")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("its parts lie on top of each other")
        if any(b"\nbytearray\n" in archive.read(part) for part in parts if part.filename.endswith(".pkl")):
            raise ValueError("it asks for a bytearray, which could be of any size")
        if damaged := archive.testzip():
            raise ValueError(f"it is damaged: the checksum of {damaged} differs")


def is_checkpoint(content: Any) -> bool:
    """Whether something has a checkpoint's parts, of their types: `model` holds plain tensors."""
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        return False
    parts = [content.get(name) for name in ("config", "model_args", "model")]
    if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts):
        return False
    return isinstance(content.get("epoch", 0), int) and all(map(is_plain_tensor, parts[2].values()))


def is_plain_tensor(value: Any) -> bool:
    """Whether a value is a dense, real tensor that has all the memory its shape speaks of."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_complex():
        return False
    return value.untyped_storage().nbytes() >= value.nbytes


def unpickling_problem(error: Exception) -> str:
    """What stopped torch.load, in a few words; torch's own would advise to run the file's code."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it holds {code[1]}, which is code; none was run"
    if isinstance(error, UnpicklingError):
        return "it holds something else than weights"
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def choose_checkpoint(named: Path | None, runs: Path) -> Path:
    """The checkpoint named, the `last.pt` of a run named or of its folder, or the newest finished run's.

    Without a finished run it is the newest of all. A run that is not finished is told. InputError: there is
    no run to choose.
    """
    path = find_run(named or newest_checkpoint(runs), runs)
    path = path / LAST if path.is_dir() else path
    run = read_run(path.parent) if path.name in (LAST, PREVIOUS) else None
    if run and not run["finished"]:
        print(f"warning: {path.parent} is not finished ({len(run['log'])} of {run['epochs']} epochs)")
    return path


def newest_checkpoint(folder: Path) -> Path:
    """The `last.pt` that was written last among a folder's finished runs, else among all."""
    found = sorted(folder.glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        remedy = "train one with python train.py, or name one with --checkpoint"
        raise InputError(f"no run with a checkpoint in {folder.resolve()}", remedy)
    finished = [path for path in found if (run := read_run(path.parent)) and run["finished"]]
    chosen = (finished or found)[-1]
    if chosen != found[-1]:
        print(f"note: {found[-1].parent} is newer, but not finished: --checkpoint takes it")
    return chosen
