"""Load batches in worker processes, and handle their signals, failures and unreadable frames."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from tqdm import tqdm

from engine.distributed import any_process, gather, is_main_process, rank, world_size
from kaist.files import InputError


def share_memory(tensors: Sequence[Tensor]) -> InputError | None:
    """Move a worker's tensors to shared memory, and return the error if there is too little of it.

    multiprocessing would move them too, but if that failed, the main process would wait forever.
    """
    if get_worker_info() is None:
        return None
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        remedy = "enlarge /dev/shm (docker run --shm-size=8g), or lower WORKERS or BATCH_SIZE"
        return InputError(f"too little shared memory for a batch ({str(error).splitlines()[0]})", remedy)
    return None


@contextmanager
def block_sigint() -> Iterator[None]:
    """Block Ctrl-C (SIGINT) while worker processes start.

    The workers inherit the block: only the main process handles Ctrl-C, and it stops them. The SIGCHLD
    handler that torch installs raises at any point of the main process, so it is removed again. The loader
    still notices a dead worker when it waits for a batch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def worker_init_fn(_: int) -> None:
    """Let SIGTERM end a worker at once; a forked one has inherited the main process's handler."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class BadFrame(NamedTuple):
    """An item of the data set whose frame cannot be read."""

    frame_id: str
    error: InputError


class EpochBatches(Sampler):
    """Batches of keys (epoch, index); each process gets every `world_size`-th frame of a batch.

    Args:
        length: number of frames.
        batch_size: frames in a batch, of all processes together.
        seed: shuffles the frames by (seed, epoch) and drops an incomplete last batch, unless it is the only
            one. None keeps all frames in order.

    Attributes:
        epoch: the next epoch.
        skip: number of batches to leave out at its start.

    Raises:
        InputError: there are more processes than training frames.
    """

    def __init__(self, length: int, batch_size: int, seed: int | None) -> None:
        if seed is not None and length < world_size():
            problem = f"{length} frames cannot be split among {world_size()} processes"
            raise InputError(problem, "start fewer processes, or use a longer list")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(self.length / self.batch_size)
        return max(1, self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.seed is not None:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        for start in range(self.skip * self.batch_size, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size][rank() :: world_size()]
            yield [(self.epoch, index) for index in batch.tolist()]


class BatchLoader:
    """Batches of a data set, epoch by epoch; the worker processes are kept between epochs.

    Args:
        dataset: indexed by (epoch, index), with a `seed`.
        collate_fn: takes a list of items. Returns an InputError, which is then raised, or a batch (None if
            no frame could be read) and a list of BadFrame.
        batch_size: frames in a batch, of all processes together.
        start_method: of the workers; "auto" is Python's default on this system.
        shuffle: training order, see `EpochBatches`. False: all frames in order.
        max_bad_frames: number of unreadable frames that are left out, with a warning each.

    Attributes:
        bad_frames: frame id -> error of the unreadable frames so far, in all processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate_fn: Callable[[list], Any],
        *,
        batch_size: int,
        workers: int,
        start_method: str = "auto",
        shuffle: bool,
        pin_memory: bool,
        max_bad_frames: int = 0,
    ) -> None:
        self.max_bad_frames = max_bad_frames
        self.bad_frames: dict[str, InputError] = {}
        self.batches = EpochBatches(len(dataset), batch_size, dataset.seed if shuffle else None)
        workers = min(workers, len(self.batches))
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=start_method if workers and start_method != "auto" else None,
            worker_init_fn=worker_init_fn,
        )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of one epoch, without the first `skip`.

        A batch is None in all processes if one of them could read none of its frames. It is also None in
        a process that has no frame of an incomplete last batch.

        Raises:
            InputError: more than `max_bad_frames` frames are unreadable (raised at the same batch in every
                process), a worker died, or there is too little shared memory.
        """
        self.batches.epoch, self.batches.skip = epoch, skip
        try:
            with block_sigint():
                items = iter(self.loader)
            for item in items:
                if isinstance(item, InputError):
                    raise item
                batch, bad = item
                if any_process(bool(bad)):
                    self.record_bad_frames([frame for frames in gather(bad) for frame in frames])
                    batch = None if any_process(batch is None) else batch
                yield batch
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            remedy = "often memory ran out: lower WORKERS or BATCH_SIZE, or enlarge /dev/shm"
            raise InputError(f"a loader process died ({error})", remedy) from None

    def record_bad_frames(self, frames: list[BadFrame]) -> None:
        """Warn once of each unreadable frame. Raises InputError if there are more than `max_bad_frames`."""
        for frame_id, error in frames:
            if frame_id not in self.bad_frames and self.max_bad_frames and is_main_process():
                tqdm.write(f"warning: {error}; {frame_id} is left out", file=sys.stderr)
            self.bad_frames.setdefault(frame_id, error)
        if len(self.bad_frames) > self.max_bad_frames:
            first = next(iter(self.bad_frames.values()))
            problem = f"{first.problem}; all unreadable frames so far: {', '.join(self.bad_frames)}"
            raise InputError(problem, "copy them again, then run the same command", file=first.file)
