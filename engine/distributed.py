"""Distributed data-parallel training: `torchrun --nproc_per_node=N train.py`, on one machine or many.

Batch, learning rate and losses mean the same for any number of processes: a global batch is split
by rank, and losses are normalised by what the whole batch holds. Without torchrun every function
here does nothing and returns its input.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kaist.files import InputError

# What gloo, NCCL and their store say of a process that cannot be reached any more.
CONNECTION_ERRORS = r"[Cc]onnection|Broken pipe|recv, got 0|remote process exited|[Tt]imed? ?out"


def init_distributed(device: torch.device, batch_size: int) -> None:
    """Join the processes that torchrun's environment describes.

    Tensors on GPUs are reduced by NCCL, others by gloo. InputError: the batch cannot be split evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return
    if batch_size % processes:
        problem = f"BATCH_SIZE = {batch_size} cannot be split among {processes} processes"
        raise InputError(problem, "it is the batch of all processes together; choose a multiple")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def run_distributed(main: Callable[[], None]) -> None:
    """Run main(), then leave the other processes. InputError: another one has ended, at whatever exchange
    with it, or cannot be reached any more."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except RuntimeError as error:
        if not (dist.is_initialized() and re.search(CONNECTION_ERRORS, str(error))):
            raise
        problem = "another process of this run has ended"
        raise InputError(problem, "see what it said; the same command goes on") from None


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(value: Tensor) -> Tensor:
    """A tensor summed over the processes; no gradient flows through."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """A tensor averaged over the processes; no gradient flows through."""
    return all_reduce_sum(value) / world_size()


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process; on the host, so that no GPU is waited for."""
    return bool(all_reduce_sum(torch.tensor(float(flag))))


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank, on every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def average_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over the processes; `SyncBatchNorm` has them equal."""
    statistics = ("running_mean", "running_var")
    average(buffer for name, buffer in model.named_buffers() if name.endswith(statistics))


def average(tensors: Iterable[Tensor]) -> None:
    """Average tensors over the processes, in place."""
    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor)
        tensor /= world_size()


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over the processes, starting from rank 0's weights.

    BatchNorm normalises by the whole batch on GPUs. On CPUs, where torch cannot, each process
    normalises by its own frames; each step begins with rank 0's statistics.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)
