"""How the weights move: the optimiser, its groups, the learning rate's schedule, averaging."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def make_optimizer(model: nn.Module, criterion: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or Adam, in groups: weights, biases with their own rate, and what the
    criterion learns, which is not decayed."""
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "scale": 1.0}, {"params": biases, "scale": config["bias_lr_factor"]}]
    if learned := list(criterion.parameters()):
        groups.append({"params": learned, "scale": 1.0, "weight_decay": 0.0})
    settings = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
    # On a GPU one kernel for all parameters; a CPU's would round differently than it always has.
    settings["fused"] = next(model.parameters()).is_cuda or None
    if config["optimizer"] == "adam":
        optimizer = torch.optim.Adam(groups, **settings)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, **settings)
    optimizer.register_load_state_dict_pre_hook(keep_kernels)
    return optimizer


def keep_kernels(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to be loaded, without the choice of kernels of the device that saved it."""
    fused = optimizer.defaults["fused"]
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


def update(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
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


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The length of the gradient of all parameters, a scalar; not finite if any of it is not."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)


class MovingAverage:
    """An exponential moving average of a network's weights (Polyak and Juditsky, 1992).

    model: the average, to be evaluated and kept; BatchNorm's statistics are copies of the
    network's. With a decay of 0 it is the network itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.decay = decay
        self.model = copy.deepcopy(network).requires_grad_(False) if decay else network

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0 over the whole run.

        The decay grows with the steps, as far as the one asked for: the first weights are copied,
        and a short run does not remember how it began.
        """
        if self.model is self.network:
            return
        share = 1 - min(self.decay, step / (step + 10))
        for mean, new in zip(self.model.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(new, share)
        for mean, new in zip(self.model.buffers(), self.network.buffers(), strict=True):
            mean.copy_(new)


def set_lr(optimizer: torch.optim.Optimizer, config: dict[str, Any], factor: float) -> None:
    """Give each group LR x its scale x the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = config["lr"] * group["scale"] * factor


def lr_factor(config: dict[str, Any], step: int, total_steps: int) -> float:
    """What the schedule multiplies the learning rate by in a step of `total_steps`.

    "step": x0.1 from epoch int(E/6)*4 and again from int(E/6)*5 of E epochs, as logged (never for
    fewer than 6 epochs); "cosine": a linear warm-up over the first 5% of the steps, then half a
    cosine down to 0 (Loshchilov and Hutter, 2017).
    """
    if config["schedule"] == "constant":
        return 1.0
    if config["schedule"] == "step":
        epoch, sixth = step * config["epochs"] // total_steps, config["epochs"] // 6
        return 0.1 ** ((epoch >= 4 * sixth) + (epoch >= 5 * sixth)) if sixth else 1.0
    warm_up = max(1, total_steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, total_steps - warm_up))) / 2
