"""The memory that a training step takes on CUDA, planned by fake tensors: no GPU is needed.

A fake tensor has shape, dtype and device, and no values. A step on fake tensors of `cuda:0` makes
and drops the tensors that a real one would, and their bytes are counted as they come and go.
"""

from __future__ import annotations

import copy
import heapq
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from engine.optim import make_optimizer

CUDA = torch.device("cuda", 0)
OBJECTS = 16  # of a frame in the plan
BLOCK = 512  # bytes: CUDA's allocator gives whole blocks
ROOM = 1.5e9  # bytes that the plan leaves to CUDA's context, the convolutions' workspaces and gaps
# Kernels without a fake counterpart; they change their arguments and return nothing.
FUSED = (torch.ops.aten._fused_sgd_.default, torch.ops.aten._fused_adam_.default)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within, new tensors are fake, on `cuda:0` where that is asked for, and autocast takes bf16.

    Autocast would ask the driver, which need not be there.
    """
    from unittest.mock import patch

    from torch._subclasses.fake_tensor import FakeTensorMode  # here: few runs need it, and it takes a while

    missing = "torch.cuda.amp.common.amp_definitely_not_available"
    with (
        patch(missing, lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are fake ones on `cuda:0`; nothing is allocated."""
    fake: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new = torch.empty_like(tensor, device=CUDA, requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        fake[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, fake)


@torch.no_grad()
def backward(losses: list[Tensor]) -> None:
    """`losses.pop().backward()`, node by node: autograd's own engine asks for a driver.

    A node, and what it has saved, goes when nobody else holds it. The gradients of parameters are
    set, not added to.
    """
    root = losses.pop().grad_fn
    received: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones((), device=CUDA)}}
    queue, root = [(0, 0, root)], None
    while queue:
        node = heapq.heappop(queue)[2]
        own = received.pop(node)
        if hasattr(node, "variable"):
            node.variable.grad = own[0]
            continue
        run = getattr(node, "apply", node)  # of a Function written in Python, and of all others
        out = run(*(own.pop(i, None) for i in range(len(node._input_metadata))))
        out = out if isinstance(out, tuple) else (out,)
        for (above, i), gradient in zip(node.next_functions, out, strict=True):
            if above is None or gradient is None:
                continue
            if above not in received:
                received[above] = {}
                # The later a node was made, the earlier its turn; parameters wait for all of their share.
                turn = 1 if hasattr(above, "variable") else -above._sequence_nr()
                heapq.heappush(queue, (turn, id(above), above))
            wanted = above._input_metadata[i]  # as the engine does: broadcast sizes are summed up
            gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
            known = received[above].get(i)
            received[above][i] = gradient if known is None else known + gradient
        node = run = own = out = gradient = above = known = None


class FusedKernels(TorchDispatchMode):
    """Has the fused optimisers' kernels, which cannot be traced, do nothing on one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in FUSED:
            check_one_device(args)
            return None
        return func(*args, **(kwargs or {}))


def check_one_device(arguments: Any) -> None:
    """Raises RuntimeError where tensors are not all on one device."""
    devices = {t.device for t in tree_leaves(arguments) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"tensors of two devices: {devices}")


class LiveBytes(FusedKernels):
    """Counts the bytes of the tensors that are made within and not yet gone.

    Attributes:
        peak: the most that there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and id(storage) not in before:
                    self.add(storage)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it goes."""
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, size)

    def remove(self, size: int) -> None:
        self.now -= size


class MemoryPlan(NamedTuple):
    """Bytes: of the weights; of what a step adds whatever the batch (gradients, optimiser); of what
    each frame of the batch adds."""

    weights: int
    fixed: int
    per_frame: int

    def step(self, n: int) -> int:
        """What training with batches of n frames takes."""
        return self.weights + self.fixed + n * self.per_frame

    def largest_batch(self, memory: float) -> int:
        """The largest batch that fits into so many bytes, `ROOM` left free; 0 if none does."""
        return max(0, int((memory - ROOM - self.weights - self.fixed) // self.per_frame))


def plan_memory(model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype) -> MemoryPlan:
    """The plan of eager training steps; a compiled network takes no more.

    Args:
        model: a `Detector` on any device, "meta" included; criterion: its `Criterion`.
        optimizer: "sgd" or "adam"; precision: of the convolutions.
    """
    one, two = (added_bytes(model, criterion, optimizer, precision, n) for n in (1, 2))
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return MemoryPlan(weights, 2 * one - two, two - one)


def plan_batch(
    model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, precision: torch.dtype
) -> Callable[[], int]:
    """A function that gives the largest batch that fits into a GPU beside what is there now, before
    the first step; 0 where none does or the model is on no GPU."""
    device = model.priors.device
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def largest() -> int:
        if device.type != "cuda":
            return 0
        name = "adam" if isinstance(optimizer, torch.optim.Adam) else "sgd"
        plan = plan_memory(model, criterion, name, precision)
        return plan.largest_batch(torch.cuda.mem_get_info(device)[1] - resident + plan.weights)

    return largest


def added_bytes(
    model: nn.Module, criterion: nn.Module, optimizer: str, precision: torch.dtype, n: int
) -> int:
    """The peak of what the first training step on n frames adds to the weights."""
    with fake_cuda():
        model, criterion = on_fake_cuda(model).train(), on_fake_cuda(criterion)
        learner = make_optimizer(model, criterion, name=optimizer, lr=1e-3, bias_lr_factor=1, weight_decay=0)
        with LiveBytes() as live:
            images = torch.empty(n, model.mean.shape[1], *model.size, dtype=torch.uint8, device=CUDA)
            boxes = torch.empty(n, OBJECTS, 4, device=CUDA)
            labels = torch.empty(n, OBJECTS, dtype=torch.int64, device=CUDA)
            sizes = (model.grids[i][:2] for i in model.infused_maps)
            masks = [torch.empty(n, *size, dtype=torch.int64, device=CUDA) for size in sizes]
            with torch.autocast("cuda", torch.bfloat16, enabled=precision != torch.float32):
                predictions = model(images)
            losses = [criterion(predictions, boxes, labels, masks)[0]]
            del predictions
            backward(losses)
            learner.step()
        return live.peak
