"""Fake CUDA tensors without a driver, and a walk over autograd's graph of them."""

import copy
import heapq
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# Kernels without a fake counterpart; they change their arguments and return nothing.
FUSED = (torch.ops.aten._fused_sgd_.default, torch.ops.aten._fused_adam_.default)


@contextmanager
def fake_cuda():
    """Within, new tensors are fake, on `cuda:0` where that is asked for, and autocast takes bf16.

    Autocast would ask the driver, which need not be there.
    """
    missing = "torch.cuda.amp.common.amp_definitely_not_available"
    with (
        patch(missing, lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def on_fake_cuda(module):
    """A copy whose parameters and buffers are fake ones on `cuda:0`; nothing is allocated."""
    fake = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new = torch.empty_like(tensor.to("meta"), device=CUDA, requires_grad=False)  # priors are on the CPU
        is_parameter = isinstance(tensor, nn.Parameter)
        fake[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, fake)


@torch.no_grad()
def backward(losses, device=CUDA):
    """`losses.pop().backward()`, node by node: autograd's own engine asks for a driver.

    A node, and what it has saved, goes when nobody else holds it. The gradients of parameters are
    set, not added to.
    """
    root = losses.pop().grad_fn
    received = {root: {0: torch.ones((), device=device)}}
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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in FUSED:
            check_one_device(args)
            return None
        return func(*args, **(kwargs or {}))


def check_one_device(arguments):
    """Raises RuntimeError where tensors are not all on one device."""
    devices = {t.device for t in tree_leaves(arguments) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"tensors of two devices: {devices}")
