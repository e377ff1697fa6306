"""Optimiser, parameter groups, learning rate schedules, and the moving average of the weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZER_KEYS = ("lr", "bias_lr_factor", "weight_decay")  # config keys that `make_optimizer` takes


def make_optimizer(
    model: nn.Module,
    criterion: nn.Module,
    *,
    name: str,
    lr: float,
    bias_lr_factor: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or Adam, with parameter groups for weights, biases and the criterion.

    Args:
        name: "sgd" or "adam".
        bias_lr_factor: the learning rate of biases is this times `lr`.
        weight_decay: L2 penalty, except on the criterion's parameters.
    """
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "scale": 1.0}, {"params": biases, "scale": bias_lr_factor}]
    if learned := list(criterion.parameters()):
        groups.append({"params": learned, "scale": 1.0, "weight_decay": 0.0})
    settings = {"lr": lr, "weight_decay": weight_decay}
    # Only on GPUs: fused CPU kernels round differently, and CPU runs have to stay reproducible.
    settings["fused"] = next(model.parameters()).is_cuda or None
    sgd = partial(torch.optim.SGD, momentum=0.9)
    optimizer = {"adam": torch.optim.Adam, "sgd": sgd}[name](groups, **settings)
    optimizer.register_load_state_dict_pre_hook(keep_fused)
    return optimizer


def keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Replace `fused` in a saved state with this optimiser's value: the state may be from another device."""
    fused = optimizer.defaults["fused"]
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Take an optimiser step unless `finite`, a bool scalar tensor, is False.

    The fused kernels read it on the device, as they do for `torch.amp.GradScaler`, so the host does not
    wait for it. Only before the first step, when the optimiser has no state yet, the host reads it.
    """
    if not (optimizer.defaults["fused"] and optimizer.state):
        if finite:
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


class GuardedStep:
    """An optimiser step that is skipped if a loss or the gradient is not finite.

    BatchNorm's running statistics, which the forward pass has changed, are then restored. The host does
    not wait for a GPU, except before the first step (`step_if_finite`).

    Args:
        network: the network whose BatchNorm statistics are restored.
        optimizer: from `make_optimizer`.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.before = [buffer.clone() for buffer in self.statistics]

    def save_statistics(self) -> None:
        """Save BatchNorm's running statistics; to be called before the forward pass."""
        for before, buffer in zip(self.before, self.statistics, strict=True):
            before.copy_(buffer)

    def __call__(self, losses: Tensor) -> Tensor:
        """Take or skip the step, after backward.

        Args:
            losses: (terms,), averaged over the processes, so that all take or skip the same steps.

        Returns:
            Whether losses and gradient are finite, a bool scalar tensor.
        """
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        gradient_norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        finite = losses.isfinite().all() & gradient_norm.isfinite()
        step_if_finite(self.optimizer, finite)
        for buffer, before in zip(self.statistics, self.before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        return finite


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Update the exponential moving average of the weights (Polyak and Juditsky, 1992), in place.

    Does nothing if `ema` is `model`.

    Args:
        decay: at most this; early steps use step / (step + 10), to forget the initial weights sooner.
        step: number of the optimiser step just taken, from 0, over the whole run.
    """
    if ema is model:
        return
    weight = 1 - min(decay, step / (step + 10))
    for mean, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():  # BatchNorm's statistics too
            mean.lerp_(new, weight)
        else:
            mean.copy_(new)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group to `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def lr_factor(schedule: str, epochs: int, step: int, total_steps: int) -> float:
    """Factor of the learning rate at `step` of `total_steps`.

    Args:
        schedule: "constant": 1.
            "step": x0.1 at epoch int(E/6)*4 and again at int(E/6)*5 of E epochs, as in the log; 1 if E < 6.
            "step-mlpd": x0.1 at 1/2 and again at 9/10 of the epochs, as MLPD and INSANet were trained.
            "cosine": linear warm-up over the first 5% of the steps, then half a cosine down to 0
            (Loshchilov and Hutter, 2017).
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        epoch, sixth = step * epochs // total_steps, epochs // 6
        return 0.1 ** ((epoch >= 4 * sixth) + (epoch >= 5 * sixth)) if sixth else 1.0
    if schedule == "step-mlpd":
        progress = step * epochs // total_steps / epochs
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.9))
    warmup_steps = max(1, total_steps // 20)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))) / 2
