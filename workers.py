"""Loader processes that start, end and fail without leaving anyone waiting."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from kaist.files import InputError


def worker_settings(workers: int, start_method: str) -> dict[str, Any]:
    """What a DataLoader is told of its processes.

    Args:
        start_method: "fork", "spawn", "forkserver", or "auto" for Python's choice.

    Raises:
        InputError: this system has no such start method.
    """
    if start_method not in ("auto", *multiprocessing.get_all_start_methods()):
        raise InputError(f"START_METHOD = {start_method!r} is not for this system", "use auto")
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "multiprocessing_context": start_method if workers and start_method != "auto" else None,
        "worker_init_fn": begin_worker,
    }


def items_of(loader: DataLoader) -> Iterator[Any]:
    """What a loader made with `worker_settings` yields.

    Its processes are deaf to Ctrl-C, which the main process answers, and end with it.

    Raises:
        InputError: a process died, or came with an InputError in place of an item.
    """
    try:
        with calm_start():
            items = iter(loader)
        for item in items:
            if isinstance(item, InputError):
                raise item
            yield item
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise InputError(
            f"a loader process died ({error})",
            "often memory ran out: lower WORKERS or BATCH_SIZE, or enlarge /dev/shm",
        ) from None


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
        return InputError(
            f"too little shared memory for a batch ({str(error).splitlines()[0]})",
            "enlarge /dev/shm (docker run --shm-size=8g), or lower WORKERS or BATCH_SIZE",
        )  # fmt: skip
    return None


@contextmanager
def calm_start() -> Iterator[None]:
    """Start worker processes without a signal in the midst of it.

    Ctrl-C waits until all have started, and they inherit that they do not hear it. torch's
    handler for ended processes, which raises wherever the main process happens to be, is taken
    back: the loader looks after its workers too whenever it waits for a batch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # another could set none
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def begin_worker(_: int) -> None:
    """End at once when told to: a forked worker has inherited what the main process would do."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
