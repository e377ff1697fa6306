"""Weights in the safetensors format: the header's length, the header as JSON, then the tensors' bytes."""

import json
import struct
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a safetensors file."""
    header: dict[str, dict] = {"__metadata__": metadata}
    parts, end = [], 0
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [end, end := end + len(data)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `to_safetensors` made."""
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    data, tensors = torch.frombuffer(content, dtype=torch.uint8), {}
    for name, part in header.items():
        first, end = part["data_offsets"]
        aligned = data[start + first : start + end].clone()
        tensors[name] = aligned.view(dtypes[part["dtype"]]).view(part["shape"])
    return tensors, metadata
