"""Distributed data-parallel training: `torchrun --nproc_per_node=N train.py`, on one machine or many.

Batch size, learning rate and losses mean the same for any number of processes: a global batch is split
by rank, and losses are normalised over the whole batch. Without torchrun there is one process: functions
that communicate do nothing and return their input.
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

# Messages of gloo, NCCL and their store about a process that cannot be reached.
CONNECTION_ERRORS = r"[Cc]onnection|Broken pipe|recv, got 0|remote process exited|[Tt]imed? ?out"


def init_distributed(device: torch.device, batch_size: int) -> None:
    """Join the process group that torchrun's environment describes: NCCL for GPU tensors, gloo for others.

    Raises:
        InputError: the batch cannot be split evenly among the processes, or they cannot use the device.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return
    if batch_size % processes:
        problem = f"BATCH_SIZE = {batch_size} cannot be split among {processes} processes"
        remedy = "it is the batch size of all processes together; choose a multiple of their number"
        raise InputError(problem, remedy)
    if device.type == "mps":
        raise InputError("several processes cannot train on DEVICE = mps", "add --device cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def run_distributed(main: Callable[[], None]) -> None:
    """Run main(), then leave the process group.

    Raises:
        InputError: another process has ended or cannot be reached.
    """
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except RuntimeError as error:
        if not (dist.is_initialized() and re.search(CONNECTION_ERRORS, str(error))):
            raise
        problem = "another process of this run has ended"
        raise InputError(problem, "see its error message; the same command resumes the run") from None


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is rank 0, the only process that prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over the processes, without gradient."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """Average a tensor over the processes, without gradient."""
    return all_reduce_sum(value) / world_size()


def any_process(flag: bool) -> bool:
    """Whether a flag is true in any process. Uses a CPU tensor, so it does not wait for the GPU."""
    return bool(all_reduce_sum(torch.tensor(float(flag))))


def gather(value: Any) -> list[Any]:
    """The values of all processes in order of rank, on every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The value of rank 0, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def average_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over the processes; `SyncBatchNorm` keeps them equal."""
    statistics = ("running_mean", "running_var")
    average(buffer for name, buffer in model.named_buffers() if name.endswith(statistics))


def average(tensors: Iterable[Tensor]) -> None:
    """Average tensors over the processes, in place."""
    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor)
        tensor /= world_size()


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Wrap a model in DistributedDataParallel, which starts from the weights of rank 0.

    On GPUs BatchNorm uses the statistics of the whole batch. torch has no SyncBatchNorm for CPUs: there
    each process uses those of its own frames, and each step starts from the running statistics of rank 0.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)
