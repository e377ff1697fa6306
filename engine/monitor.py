"""Per-step losses, read back in blocks so that a GPU never waits for the host to look."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from engine.distributed import is_main_process, rank
from engine.run import Run
from kaist.files import InputError

MAX_NONFINITE_STEPS = 20  # in a row, that ON_NONFINITE = "skip" leaves out before it stops all the same
READ_BACK_STEPS = 10  # of a GPU, whose losses come to the host together
NONFINITE = (
    "the loss or its gradient is not a finite number; the batch's frames and loss terms are in this file",
    "lower LR, look at those frames, or go on without them by --on-nonfinite skip from last.pt, which is "
    "from before this step",
)


class StepMonitor:
    """Counts a run's steps and stops it when they are not finite, as a context manager.

    On a CPU a step is counted at once. On a GPU `READ_BACK_STEPS` are counted together, with one
    copy; so a step that is not finite is told a few steps late, as that step, with its own frames.
    (`GuardedStep` has kept it and those after it from harm.)

    Args:
        max_nonfinite_steps: how many steps in a row that are not finite end the run.
    """

    def __init__(self, run: Run, max_nonfinite_steps: int) -> None:
        self.run, self.max_nonfinite_steps = run, max_nonfinite_steps
        self.consecutive = 0
        self.started = time.perf_counter()
        self.pending: list[tuple[Tensor, Tensor, list[str]]] = []  # as they were added

    def __enter__(self) -> StepMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.run.in_step:
            self.flush()  # what is saved next has seen all steps

    def steps(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(step of the epoch, batch) for the rest of the epoch.

        A batch of which no frame could be read is counted as a step that was left out. Between two
        steps the run is saved if that is due, and ended if a signal has asked for it.
        """
        for step, batch in enumerate(batches, self.run.step):
            if batch is None:
                self.flush()
                self.run.add_step(None, 0.0)
            else:
                self.run.in_step = True
                yield step, batch
                self.run.in_step = False
            if is_main_process() and self.run.save_is_due():
                self.flush()
                self.run.save()
            self.run.check_stop()

    def add(self, losses: Tensor, finite: Tensor, frame_ids: list[str]) -> None:
        """Take note of a step. InputError: too many steps in a row were not finite. What the last one saw is
        in the run's folder.

        Args:
            losses: (2, terms), averaged over the processes and of this one, on the device.
            finite: whether they and the gradient are, a bool scalar on the device.
        """
        self.pending.append((losses, finite, frame_ids))
        if not losses.is_cuda or len(self.pending) == READ_BACK_STEPS:
            self.flush()

    def flush(self) -> None:
        """Count every step so far."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        losses, finite, frame_ids = zip(*pending, strict=True)
        losses, finite = torch.stack(losses).cpu(), torch.stack(finite).tolist()
        now = time.perf_counter()
        seconds, self.started = (now - self.started) / len(pending), now
        for (mean, own), good, ids in zip(losses, finite, frame_ids, strict=True):
            self.consecutive = 0 if good else self.consecutive + 1
            if not good:
                evidence = self.run.save_evidence(ids, own, rank())
                if self.consecutive == self.max_nonfinite_steps:
                    self.run.in_step = True  # later steps have moved the weights: they are not to be saved
                    raise InputError(*NONFINITE, file=evidence)
            self.run.add_step(mean if good else None, seconds)
