"""How the weights move: the optimiser, its groups, the learning rate's schedule, averaging."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZER_KEYS = ("lr", "bias_lr_factor", "weight_decay")  # what `make_optimizer` takes from a configuration


def make_optimizer(
    model: nn.Module,
    criterion: nn.Module,
    *,
    name: str,
    lr: float,
    bias_lr_factor: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or Adam, in groups: weights, biases, whose learning rate is `bias_lr_factor`
    times `lr`, and what the criterion learns, which is not decayed.

    name: "sgd" or "adam"; weight_decay: L2 penalty.
    """
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "scale": 1.0}, {"params": biases, "scale": bias_lr_factor}]
    if learned := list(criterion.parameters()):
        groups.append({"params": learned, "scale": 1.0, "weight_decay": 0.0})
    settings = {"lr": lr, "weight_decay": weight_decay}
    # On a GPU one kernel for all parameters; a CPU's would round differently than it always has.
    settings["fused"] = next(model.parameters()).is_cuda or None
    sgd = partial(torch.optim.SGD, momentum=0.9)
    optimizer = {"adam": torch.optim.Adam, "sgd": sgd}[name](groups, **settings)
    optimizer.register_load_state_dict_pre_hook(keep_fused)
    return optimizer


def keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to be loaded, without the choice of kernels of the device that saved it."""
    fused = optimizer.defaults["fused"]
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step of the optimiser unless `finite`, a bool scalar, is False.

    The fused kernels look at it on the device, as they do for `torch.amp.GradScaler`; the host does
    not wait for its value, except before the first step, which has no momentum to keep.
    """
    if not (optimizer.defaults["fused"] and optimizer.state):
        if finite:
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


class GuardedStep:
    """An optimiser's step that is not taken where a loss or the gradient is not finite.

    BatchNorm's statistics, which move in the forward pass, then go back to what they were before it.
    The host does not look at a value, so that a GPU is never waited for.

    Args:
        network: whose BatchNorm statistics are guarded; optimizer: from `make_optimizer`.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.before = [buffer.clone() for buffer in self.statistics]

    def save_statistics(self) -> None:
        """To be called before the forward pass."""
        for before, buffer in zip(self.before, self.statistics, strict=True):
            before.copy_(buffer)

    def __call__(self, losses: Tensor) -> Tensor:
        """Take the step after backward, with losses (terms,) averaged over the processes, so that all of them
        agree; returns whether it was finite, a bool scalar."""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        gradient_norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        finite = losses.isfinite().all() & gradient_norm.isfinite()
        step_if_finite(self.optimizer, finite)
        for buffer, before in zip(self.statistics, self.before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        return finite


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Take the weights after optimiser step `step`, counted from 0 over the run, into their
    exponential moving average (Polyak and Juditsky, 1992), in place.

    The decay grows with the steps, as far as the one asked for: the first weights are copied, and a
    short run does not remember how it began. Of a `model` that is its own `ema` nothing is done.
    """
    if ema is model:
        return
    share = 1 - min(decay, step / (step + 10))
    for mean, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():  # BatchNorm's statistics too
            mean.lerp_(new, share)
        else:
            mean.copy_(new)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group a learning rate, times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def lr_factor(schedule: str, epochs: int, step: int, total_steps: int) -> float:
    """What a schedule multiplies the learning rate by in a step of `total_steps`.

    "constant": 1. "step": x0.1 from epoch int(E/6)*4 and again from int(E/6)*5 of E epochs, as logged
    (never for fewer than 6 epochs). "step-mlpd": x0.1 from half of the epochs and again from nine tenths,
    as MLPD and INSANet were trained. "cosine": a linear warm-up over the first 5% of the steps, then half
    a cosine down to 0 (Loshchilov and Hutter, 2017).
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        epoch, sixth = step * epochs // total_steps, epochs // 6
        return 0.1 ** ((epoch >= 4 * sixth) + (epoch >= 5 * sixth)) if sixth else 1.0
    if schedule == "step-mlpd":
        done = step * epochs // total_steps / epochs
        return 0.1 ** ((done >= 0.5) + (done >= 0.9))
    warm_up = max(1, total_steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, total_steps - warm_up))) / 2
