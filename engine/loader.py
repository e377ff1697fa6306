"""Loader processes that start, end and fail without leaving anyone waiting."""

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
    """Move a loader process's tensors to where the main process can see them, if this is one.

    Here, because where multiprocessing does it a failure would be waited for forever. Returns what
    went wrong.
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
    """Start worker processes without a signal in the midst of it.

    Ctrl-C waits until all have started. They inherit that they do not hear it: the main process
    answers it, and they end with that. torch's handler for ended processes, which raises wherever the
    main process happens to be, is taken back: the loader looks after them whenever it waits for a batch.
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
    """End at once when told to: a forked worker has inherited what the main process would do."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class BadFrame(NamedTuple):
    """What comes in a sample's place when its frame cannot be read."""

    frame_id: str
    error: InputError


class EpochBatches(Sampler):
    """Batches of keys (epoch, index) of one epoch, of each of which this process gets every `world_size`-th
    frame. InputError: there are more processes than frames to train on.

    Args:
        seed: order frames by (seed, epoch) and leave out an incomplete last batch (unless it is
            the only one); None keeps their order and all of them.

    Attributes:
        epoch: which one comes next; skip: batches at its start that are left out.
    """

    def __init__(self, length: int, batch_size: int, seed: int | None) -> None:
        if seed is not None and length < world_size():
            problem = f"{length} frames cannot be split among {world_size()} processes"
            raise InputError(problem, "start fewer, or take a longer list")
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
    """Batches of a data set, epoch by epoch, with worker processes kept between epochs.

    Args:
        dataset: indexed by (epoch, index), with a `seed`.
        collate_fn: a list of its items -> a batch (None if no frame could be read) and each BadFrame; or
            an InputError, which is then raised.
        batch_size: frames a batch, of all processes together.
        start_method: of the workers: "auto" starts them as Python does here.
        shuffle: training order, see `EpochBatches`. False: the frames in their order, all of them.
        max_bad_frames: frames that may turn out to be unreadable; they are left out, with a warning each.

    Attributes:
        bad_frames: the unreadable frames met so far, by their id, in this process or another.
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
        """Batches an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of one epoch, without the first `skip`.

        None stands for a batch of which no frame can be read, or none of one process's share: so all
        processes keep in step. It can come only where `max_bad_frames` allows it, and as the last one of
        frames in their order, of which this process may have no share. InputError: more than `max_bad_frames`
        frames turned out to be unreadable, at the same batch in every process; a loader process died; or
        shared memory is too small.
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
        """Warn of frames that went bad, once each, or stop if they are too many."""
        for frame_id, error in frames:
            if frame_id not in self.bad_frames and self.max_bad_frames and is_main_process():
                tqdm.write(f"warning: {error}; {frame_id} is left out", file=sys.stderr)
            self.bad_frames.setdefault(frame_id, error)
        if len(self.bad_frames) > self.max_bad_frames:
            first = next(iter(self.bad_frames.values()))
            problem = f"{first.problem}; all unreadable frames so far: {', '.join(self.bad_frames)}"
            raise InputError(problem, "copy them again and give the same command", file=first.file)
