"""The memory that a training step takes on CUDA, planned on fake tensors, without a GPU.

A step on fake tensors, which have no values, allocates and frees what a real one would, and the bytes are
counted. They are CPU tensors, because autograd needs a driver for CUDA tensors; the losses are CUDA's.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from engine.optim import make_optimizer

OBJECTS_PER_FRAME = 16  # boxes of a frame, padding included
# Batches that are planned. In smaller ones the optimiser's step sets the peak, not the frames.
PROBE_BATCH_SIZES = (16, 32)
ALLOCATION_BLOCK = 512  # bytes: CUDA's allocator rounds up to whole blocks
RESERVED_BYTES = 1.5e9  # for CUDA's context and the convolutions' workspaces
SAFETY_FACTOR = 1.3  # largest measured / planned ratio on an H100, less the reserve (docs/speed.md)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors created in its context: `current`, still alive, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.counted = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.counted and id(storage) not in inputs:
                    self.counted[storage] = size = -(-storage.nbytes() // ALLOCATION_BLOCK) * ALLOCATION_BLOCK
                    self.count(size)
                    weakref.finalize(storage, self.count, -size)
        return out

    def count(self, size: int) -> None:
        """Add the bytes of a new tensor; negative for a freed one."""
        self.current += size
        self.peak = max(self.peak, self.current)


class MemoryPlan(NamedTuple):
    """Bytes of the weights, of gradients and optimiser state (`fixed`), and of each frame of a batch."""

    weights: int
    fixed: int
    per_frame: int

    def total(self, n: int) -> int:
        """Bytes of a training step on n frames, underestimated for small n."""
        return self.weights + self.fixed + n * self.per_frame

    def largest_batch(self, memory: float) -> int:
        """The largest batch that fits into `memory` bytes, with the reserve and the safety factor; or 0."""
        usable = (memory - RESERVED_BYTES) / SAFETY_FACTOR
        return max(0, int((usable - self.weights - self.fixed) // self.per_frame))


def plan_memory(model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype) -> MemoryPlan:
    """Plan eager training steps of a `Detector`, which may be on "meta"; optimizer: "sgd" or "adam"."""
    few, many = (added_bytes(model, criterion, optimizer, precision, n) for n in PROBE_BATCH_SIZES)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    per_frame = (many - few) // (PROBE_BATCH_SIZES[1] - PROBE_BATCH_SIZES[0])
    return MemoryPlan(weights, many - PROBE_BATCH_SIZES[1] * per_frame, per_frame)


def plan_batch(
    model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype
) -> Callable[[], int]:
    """Return a function that computes the largest batch that fits on the model's GPU, 0 if none does.

    Call this before the first training step, because memory in use now counts as taken.
    """
    device = model.priors.device
    if device.type != "cuda":
        return lambda: 0
    resident = torch.cuda.memory_allocated(device)

    def largest_batch() -> int:
        plan = plan_memory(model, criterion, optimizer, precision)
        return plan.largest_batch(torch.cuda.mem_get_info(device)[1] - resident + plan.weights)

    return largest_batch


def added_bytes(
    model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype, n: int
) -> int:
    """Peak bytes of a training step on n frames beyond the weights, with gradients and optimiser state."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # here, because few runs need this slow import

    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        model, criterion = as_fake(model).train(), as_fake(criterion)
        criterion.multibox.sparse = criterion.multibox.static
        optim = make_optimizer(model, criterion, name=optimizer, lr=1e-3, bias_lr_factor=1, weight_decay=0)
        with LiveBytes() as live:
            for parameter in (*model.parameters(), *criterion.parameters()):
                parameter.grad = torch.empty_like(parameter)
            optim.step()
            images = torch.empty(n, model.mean.shape[1], *model.size, dtype=torch.uint8)
            boxes = torch.empty(n, OBJECTS_PER_FRAME, 4)
            labels = torch.empty(n, OBJECTS_PER_FRAME, dtype=torch.int64)
            masks = [torch.empty(n, *model.grids[i][:2], dtype=torch.int64) for i in model.infused_maps]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
                predictions = model(images)
            loss = criterion(predictions, boxes, labels, masks)[0]
            del predictions
            optim.zero_grad()
            loss.backward()
            optim.step()
        return live.peak


def as_fake(module: nn.Module) -> nn.Module:
    """Copy a module with fake CPU tensors as parameters and buffers, which allocates nothing."""
    memo: dict[int, Any] = {}  # of deepcopy: the copy of each tensor, by its id
    for tensor in (*module.parameters(), *module.buffers()):
        new = torch.empty_like(tensor, device="cpu", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, memo)
