"""What each training step came to, without a GPU that waits for the host to look."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from engine.run import Run, nonfinite_error

MAX_SKIPS = 20  # steps in a row that ON_NONFINITE = "skip" leaves out before it stops all the same


class Outcome(NamedTuple):
    """A step's losses of the whole batch and of this process, (2, terms); whether it was finite;
    its frames; and when all this has come to the host (None: it is there)."""

    losses: Tensor
    finite: Tensor
    frame_ids: list[str]
    arrival: torch.cuda.Event | None


class StepLog:
    """Counts a run's steps and stops it when they are not finite, as a context manager.

    On a GPU a step is counted after the next one was launched, so that the device always has work;
    the last one when the context is left. A step that is not finite is told as that step, with its
    own frames. (`optimisation.update` has kept it from the weights.)

    Args:
        rank: of this process.
        patience: how many steps in a row that are not finite end the run.
    """

    def __init__(self, run: Run, rank: int, patience: int) -> None:
        self.run = run
        self.rank = rank
        self.patience = patience
        self.in_a_row = 0
        self.started = time.perf_counter()
        self.waiting: deque[Outcome] = deque()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()  # whatever ended the steps: what is saved next has seen all of them

    def add(self, losses: Tensor, finite: Tensor, frame_ids: list[str]) -> None:
        """Take note of a step.

        Raises:
            InputError: too many steps in a row were not finite. What the last one saw is in the
                run's folder.
        """
        arrival = None
        if losses.is_cuda:
            # Into pinned memory, behind what the device still has to do.
            losses, finite = (x.to("cpu", non_blocking=True) for x in (losses, finite))
            arrival = torch.cuda.Event()
            arrival.record()
        self.waiting.append(Outcome(losses, finite, frame_ids, arrival))
        while len(self.waiting) > (arrival is not None):
            self.count(self.waiting.popleft())

    def flush(self) -> None:
        """Count every step so far."""
        with self.run.undivided():
            while self.waiting:
                self.count(self.waiting.popleft())

    def count(self, outcome: Outcome) -> None:
        """Tell the run."""
        if outcome.arrival is not None:
            outcome.arrival.synchronize()
        finite = bool(outcome.finite)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not finite:
            evidence = self.run.save_evidence(outcome.frame_ids, outcome.losses[1], self.rank)
            if self.in_a_row == self.patience:
                self.waiting.clear()
                raise nonfinite_error(evidence)
        now = time.perf_counter()
        self.run.add_step(outcome.losses[0] if finite else None, now - self.started)
        self.started = now
