"""Several processes as one: `torchrun --nproc_per_node=N train.py`, on one machine or many.

Batch, learning rate and losses mean the same for any number of processes: a global batch is split
by rank, and losses are normalised by what the whole batch holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kaist.files import InputError


@dataclass(frozen=True)
class Team:
    """This process and the others: rank 0 to size - 1. Alone, every method returns its input."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """A tensor summed over the processes; no gradient flows through."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def average_gradients(self, module: nn.Module) -> None:
        """Average the gradients of a module's parameters, as `spread` does for the network's."""
        if self.size > 1:
            for parameter in module.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return bool(self.sum(torch.tensor(float(flag))))  # on the host: no wait for a GPU

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.size > 1:
            dist.barrier()

    def spread(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes, starting from rank 0's weights.

        BatchNorm's statistics are the whole batch's on GPUs; on CPUs, where torch has none that
        are shared, each process normalises by its own frames.
        """
        if self.size == 1:
            return model
        if next(model.parameters()).is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model)

    def close(self) -> None:
        """Leave the team at the end of a run."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = Team()


def join_team(device: torch.device, batch_size: int) -> tuple[Team, torch.device]:
    """The team that torchrun's environment describes, and this process's device.

    Without torchrun: a team of one. On CUDA each process takes the GPU of its local rank, and what
    lies there goes over NCCL; all else goes over gloo.

    Raises:
        InputError: the global batch cannot be split evenly.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, device
    if batch_size % size:
        raise InputError(
            f"BATCH_SIZE = {batch_size} cannot be split among {size} processes",
            "it is the batch of all processes together; choose a multiple",
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Team(dist.get_rank(), size), device
