"""What reading many files taught, remembered in the user's cache folder until one of them changes.

The folder is `sds-ssd-kaist` in `$XDG_CACHE_HOME` or `~/.cache`. It may be deleted at any time;
where it cannot be used, and whatever is damaged in it, files are simply read again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaist.files import InputError, write_atomically

VERSION = 1  # of what is remembered; a change of meaning needs another
LEAST = 500  # files; fewer are read as soon as they are looked up
SETTLED = 2.0  # seconds; a younger file could change again without another time of change


class Fingerprint(NamedTuple):
    """Which files (a hash of their paths), their state (of sizes and times of change), and the
    newest time of change, seconds."""

    paths: str
    state: str
    newest: float


def fingerprint(paths: Iterable[str | Path]) -> Fingerprint:
    """The fingerprint of files as they are now.

    Raises:
        OSError: a file, its `filename`, is not there.
    """
    names, states, newest = hashlib.sha256(), hashlib.sha256(), 0
    here = os.getcwd()
    for path in paths:
        status = os.stat(path)
        names.update(f"{os.path.join(here, path)}\n".encode())
        states.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        newest = max(newest, status.st_mtime_ns)
    return Fingerprint(names.hexdigest()[:16], states.hexdigest()[:16], newest / 1e9)


def remember(
    kind: str, paths: Sequence[str], learn: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `learn()` returns, taken from an earlier time if no file has changed since.

    Nothing is remembered of few files, of files changed just now, and when `learn` raises.

    Args:
        kind: a word for what is learned.
        paths: of every file that it depends on.
        learn: returns named arrays without objects.
    """
    if len(paths) < LEAST:
        return learn()
    try:
        mark = fingerprint(paths)
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sds-ssd-kaist"
    except (OSError, RuntimeError):  # `learn` can tell what is missing; or the user has no home
        return learn()
    name = f"{kind}-{VERSION}-{mark.paths}"
    path = folder / f"{name}-{mark.state}.npz"
    try:
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except Exception:  # not there, or whatever zipfile and numpy meet in a damaged file
        learned = learn()
    if time.time() - mark.newest > SETTLED:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{name}-*.npz"):
                stale.unlink(missing_ok=True)
            write_atomically(path, lambda beside: save(beside, learned))
        except (InputError, OSError):
            pass  # it is read again next time
    return learned


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file under just this name."""
    with path.open("wb") as file:
        np.savez(file, **arrays)
