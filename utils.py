"""What several rooms need and none owns: devices, precision, checkpoints."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from kaist.files import InputError, write_atomically
from model import SSD300
from seal import check_seal, seal

CHECKPOINT_FORMAT = "sds-ssd-kaist-1"
LAST, PREVIOUS = "last.pt", "previous.pt"  # a run's newest checkpoint, and the one before it


def choose_device(name: str) -> torch.device:
    """The device a name stands for; "auto" takes a GPU (CUDA, then Apple's) where there is one.

    Sets what makes the device fast for this whole process.

    Raises:
        InputError: the device is not there.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is none of cpu, cuda and mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"DEVICE = {name!r} cannot be used ({reason})", "try auto") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes stay: the fastest kernel is worth a search
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_memory()
    return device


def keep_memory() -> None:
    """Have the C library keep what is freed for the next step; by glibc alone, else a no-op.

    What glibc gives back to the system comes again page by page, each filled with zeros first: for
    a training step's feature maps about a tenth of its time. 32 MiB is as far as glibc's own
    threshold grows; larger blocks are taken from what is kept where they fit, which holds the peak
    down.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # as malloc.h numbers them
    mallopt(m_trim_threshold, -1)
    mallopt(m_mmap_threshold, 32 * 2**20)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions run in: "fp32", "bf16", or "auto".

    "auto" is bfloat16 (by autocast; weights and losses stay float32) where the device has
    instructions for it, a CPU with AMX or AVX512-BF16 included, else float32.
    """
    if name == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "cpu":
            # A torch too old to tell counts as without.
            abilities = getattr(torch.cpu, "get_capabilities", dict)()
            has_bf16 = bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
        else:
            has_bf16 = False
        name = "bf16" if has_bf16 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def make_deterministic() -> None:
    """Have torch choose algorithms whose result is the same every time, where it has any.

    Of others it warns. To be called before the device is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    torch.backends.cudnn.benchmark = False


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which the network runs in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != torch.float32)


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
            "checkpoint not found", "train one with python train.py, or check --checkpoint",
            file=path,
        ) from None  # fmt: skip
    except Exception as error:  # whatever torch meets in a foreign file
        previous = path.with_name(PREVIOUS)
        kept = path.name == LAST and previous.exists()
        raise InputError(
            f"not a readable checkpoint ({unpickling_problem(error)})",
            f"use the one before it, {previous}" if kept else "it is damaged or another program's: "
            "choose another, or move this one away", file=path,
        ) from None  # fmt: skip
    needed = {"format", "model_args", "config", "model"}
    if (not isinstance(content, dict) or not needed <= content.keys()
            or content["format"] != CHECKPOINT_FORMAT):  # fmt: skip
        raise InputError(
            "not a checkpoint of this project", "choose one that train.py wrote", file=path
        )
    return content


def unpickling_problem(error: Exception) -> str:
    """What stopped torch.load, in a few words; torch's own would advise to run the file's code."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it holds {code[1]}, which is code; none was run"
    if isinstance(error, UnpicklingError):
        return "it holds something else than weights"
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def build_model(checkpoint: dict[str, Any]) -> SSD300:
    """The network of a checkpoint, rebuilt from its own arguments; no weights are downloaded.

    Raises:
        InputError: the weights are not those of such a network.
    """
    try:
        model = SSD300(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"the checkpoint's weights do not fit its own model_args ({reason})", "choose another"
        ) from None
    return model


def choose_checkpoint(named: Path | None, runs: Path) -> Path:
    """The checkpoint named, the `last.pt` of a run's folder named, or the newest among `runs`."""
    path = named or newest_checkpoint(runs)
    return path / LAST if path.is_dir() else path


def newest_checkpoint(folder: Path) -> Path:
    """The `last.pt` that was written last among a folder's runs."""
    found = sorted(folder.glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            "no run with a checkpoint", "train one with python train.py, or name one with "
            "--checkpoint", file=folder,
        )  # fmt: skip
    return found[-1]
