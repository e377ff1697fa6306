"""Weights as safetensors: a header's length, the header as JSON, then the tensors' bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def write_safetensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write tensors, and what the file says of itself."""
    header: dict[str, Any] = {"__metadata__": about}
    parts, end = [], 0
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [end, end := end + len(data)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.writelines([struct.pack("<Q", len(text)), text, *parts])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file as `write_safetensors` writes it, and what it says of itself."""
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8:start])
    about = header.pop("__metadata__", {})
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    data = torch.frombuffer(content, dtype=torch.uint8)
    tensors = {}
    for name, part in header.items():
        first, end = part["data_offsets"]
        own = data[start + first : start + end].clone()  # aligned, wherever it stands
        tensors[name] = own.view(dtypes[part["dtype"]]).view(part["shape"])
    return tensors, about


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    kinds = ([(name, x.dtype, x.shape) for name, x in tensors.items()] for tensors in (a, b))
    if next(kinds) != next(kinds):
        return False
    pairs = zip(a.values(), b.values(), strict=True)
    return all(torch.equal(*(x.flatten().view(torch.uint8) for x in pair)) for pair in pairs)
