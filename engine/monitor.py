"""Count steps and their losses, and stop a run whose losses or gradients are not finite."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from engine.distributed import is_main_process, rank
from engine.run import Run
from kaist.files import InputError

MAX_NONFINITE_STEPS = 20  # consecutive skipped steps after which ON_NONFINITE = "skip" stops too
READ_BACK_STEPS = 10  # steps whose losses are copied from a GPU together, so that it seldom waits
NONFINITE_ERROR = (
    "the loss or its gradient is not a finite number; the batch's frames and loss terms are in this file",
    "lower LR, check those frames, or skip such steps with --on-nonfinite skip, which resumes from last.pt, "
    "saved before this step",
)


class StepMonitor:
    """Context manager that counts a run's steps and stops the run if they are not finite.

    On a CPU each step is counted at once. On a GPU `READ_BACK_STEPS` are counted together, with one copy.
    So a non-finite step is reported a few steps late, but with its own number and frames. `GuardedStep`
    has already skipped it then.

    Args:
        max_nonfinite_steps: number of consecutive non-finite steps that stops the run.
    """

    def __init__(self, run: Run, max_nonfinite_steps: int) -> None:
        self.run, self.max_nonfinite_steps = run, max_nonfinite_steps
        self.consecutive = 0
        self.started = time.perf_counter()
        self.pending: list[tuple[Tensor, Tensor, list[str]]] = []  # arguments of `add`

    def __enter__(self) -> StepMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.run.in_step:
            self.flush()  # before the run is saved

    def steps(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (step of the epoch, batch) for the rest of the epoch.

        A batch of None (no readable frame) counts as a skipped step. After each step the run is saved if
        SAVE_MINUTES have passed, and stopped if a signal has requested it.
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
        """Add a step.

        Args:
            losses: (2, terms), on the device: averaged over the processes, and of this process.
            finite: whether losses and gradient are finite, a bool scalar on the device.

        Raises:
            InputError: too many consecutive steps were not finite; the last one's frames are in a file.
        """
        self.pending.append((losses, finite, frame_ids))
        if not losses.is_cuda or len(self.pending) == READ_BACK_STEPS:
            self.flush()

    def flush(self) -> None:
        """Read back and count all pending steps."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        losses, finite, frame_ids = zip(*pending, strict=True)
        losses, finite = torch.stack(losses).cpu(), torch.stack(finite).tolist()
        now = time.perf_counter()
        seconds, self.started = (now - self.started) / len(pending), now
        for (mean_losses, own_losses), is_finite, ids in zip(losses, finite, frame_ids, strict=True):
            self.consecutive = 0 if is_finite else self.consecutive + 1
            if not is_finite:
                evidence = self.run.save_evidence(ids, own_losses, rank())
                if self.consecutive == self.max_nonfinite_steps:
                    self.run.in_step = True  # later steps have changed the weights: do not save them
                    raise InputError(*NONFINITE_ERROR, file=evidence)
            self.run.add_step(mean_losses if is_finite else None, seconds)
