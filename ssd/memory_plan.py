"""The memory that a training step takes on CUDA, planned by fake tensors: no GPU is needed.

A fake tensor has shape and dtype, and no values. A step on fake tensors makes and drops the tensors that
a real one would, and their bytes are counted as they come and go. The fakes are a CPU's, because
autograd asks for a driver where there are any of CUDA; the losses are those that CUDA takes.
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

OBJECTS_PER_FRAME = 16  # padded number of boxes
# The bytes per frame come from these two; in smaller batches the optimiser's step sets the peak.
PROBE_BATCH_SIZES = (16, 32)
ALLOCATION_BLOCK = 512  # bytes: CUDA's allocator rounds up to whole blocks
RESERVED_BYTES = 1.5e9  # for CUDA's context and the convolutions' workspaces
SAFETY_FACTOR = 1.3  # largest ratio of measured to planned bytes on an H100 (docs/speed.md)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within and not yet gone. `peak`: the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and id(storage) not in before:
                    self.known[storage] = size = -(-storage.nbytes() // ALLOCATION_BLOCK) * ALLOCATION_BLOCK
                    self.count(size)
                    weakref.finalize(storage, self.count, -size)
        return out

    def count(self, size: int) -> None:
        """Bytes that have come, or, below zero, gone."""
        self.now += size
        self.peak = max(self.peak, self.now)


class MemoryPlan(NamedTuple):
    """Bytes of the weights, of what any step adds (gradients, optimiser), and of what each frame adds."""

    weights: int
    fixed: int
    per_frame: int

    def step(self, n: int) -> int:
        """What training with batches of n frames takes; of few frames, it may be more."""
        return self.weights + self.fixed + n * self.per_frame

    def largest_batch(self, memory: float) -> int:
        """The largest batch that fits into `memory` bytes, with the reserve and the safety factor; or 0."""
        usable = (memory - RESERVED_BYTES) / SAFETY_FACTOR
        return max(0, int((usable - self.weights - self.fixed) // self.per_frame))


def plan_memory(model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype) -> MemoryPlan:
    """The plan of eager training steps of a `Detector` on any device, "meta" included, by its `Criterion` and
    the optimizer "sgd" or "adam"; a compiled network takes no more."""
    few, many = (added_bytes(model, criterion, optimizer, precision, n) for n in PROBE_BATCH_SIZES)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    per_frame = (many - few) // (PROBE_BATCH_SIZES[1] - PROBE_BATCH_SIZES[0])
    return MemoryPlan(weights, many - PROBE_BATCH_SIZES[1] * per_frame, per_frame)


def plan_batch(
    model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype
) -> Callable[[], int]:
    """What gives the largest batch that fits into a GPU beside what is there now, before the first step; 0
    where none does or the model is on no GPU."""
    device = model.priors.device
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def largest() -> int:
        if device.type != "cuda":
            return 0
        plan = plan_memory(model, criterion, optimizer, precision)
        return plan.largest_batch(torch.cuda.mem_get_info(device)[1] - resident + plan.weights)

    return largest


def added_bytes(
    model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype, n: int
) -> int:
    """The peak of what a training step on n frames adds to the weights, an earlier one's gradients and the
    optimiser's state included."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: few runs need it, and it takes a while

    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        model, criterion = as_fake(model).train(), as_fake(criterion)
        criterion.multibox.sparse = criterion.multibox.static
        learner = make_optimizer(model, criterion, name=optimizer, lr=1e-3, bias_lr_factor=1, weight_decay=0)
        with LiveBytes() as live:
            for parameter in (*model.parameters(), *criterion.parameters()):
                parameter.grad = torch.empty_like(parameter)
            learner.step()
            images = torch.empty(n, model.mean.shape[1], *model.size, dtype=torch.uint8)
            boxes = torch.empty(n, OBJECTS_PER_FRAME, 4)
            labels = torch.empty(n, OBJECTS_PER_FRAME, dtype=torch.int64)
            masks = [torch.empty(n, *model.grids[i][:2], dtype=torch.int64) for i in model.infused_maps]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
                predictions = model(images)
            loss = criterion(predictions, boxes, labels, masks)[0]
            del predictions
            learner.zero_grad()
            loss.backward()
            learner.step()
        return live.peak


def as_fake(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are a CPU's fake tensors; nothing is allocated."""
    fake: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new = torch.empty_like(tensor, device="cpu", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        fake[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, fake)
