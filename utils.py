"""What several rooms need and none owns: devices, precision, checkpoints."""

from __future__ import annotations

import ctypes
import os

import torch

from kaist.files import InputError


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














