"""What several rooms need and none owns: devices, precision, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from errors import InputError
from files import write_atomically
from model import SSD300

CHECKPOINT_FORMAT = "sds-ssd-kaist-1"


def choose_device(name: str) -> torch.device:
    """The device a name stands for; "auto" takes a GPU (CUDA, then Apple's) where there is one.

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
    return device


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


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which the network runs in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != torch.float32)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save a checkpoint of tensors, primitives, lists, tuples and dicts, atomically.

    `content` holds `model_args` and `model` (what `build_model` needs), `config`, `experiment`,
    and for training also the optimiser, the history and where the run stands.
    """
    content = {"format": CHECKPOINT_FORMAT, **content}

    def write(beside: Path) -> None:
        try:
            torch.save(content, beside)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(str(error).splitlines()[0]) from None

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU; nothing in the file can run code.

    Raises:
        InputError: no such file, not a checkpoint, or one of another program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            "checkpoint not found", "train one with python train.py, or check --checkpoint",
            file=path,
        ) from None  # fmt: skip
    except Exception as error:  # whatever torch meets in a foreign or truncated file
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise InputError(
            f"not a readable checkpoint ({reason})", "it is damaged or another program's: choose "
            "another, or move this one away", file=path,
        ) from None  # fmt: skip
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            "not a checkpoint of this project", "choose one that train.py wrote", file=path
        )
    return content


def build_model(checkpoint: dict[str, Any]) -> SSD300:
    """The network of a checkpoint, rebuilt from its own arguments; no weights are downloaded."""
    model = SSD300(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    return model


def newest_checkpoint(folder: Path) -> Path:
    """The `last.pt` that was written last among a folder's runs."""
    found = sorted(folder.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            "no run with a checkpoint", "train one with python train.py, or name one with "
            "--checkpoint", file=folder,
        )  # fmt: skip
    return found[-1]
