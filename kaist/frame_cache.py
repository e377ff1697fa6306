"""Frames decoded once into a memory map, for disks and page caches faster than a JPEG decoder.

A cache is one file of raw uint8 pixels for one list of frames, shared read-only by every process
that maps it. Its name tells what it was drawn from: the frames' paths, and their sizes and times
of change; so a cache of other or changed images is never found, and redrawn.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH, image_path
from kaist.files import InputError, stale_files, write_atomically

BLOCK = 64  # frames decoded before they are written


class FrameCache:
    """Decoded frames by id, mapped into memory on first use, in each process by itself.

    Args:
        path: a file as from `open_cache`; rows: frame id -> its place in the file; channels: of
            each frame.
    """

    def __init__(self, path: Path, rows: dict[str, int], channels: int) -> None:
        self.path = path
        self.rows = rows
        self.shape = (len(rows), FRAME_HEIGHT, FRAME_WIDTH, channels)
        self.pixels: np.ndarray | None = None

    def all(self) -> np.ndarray:
        """All frames, (F, 512, 640, C) uint8, mapped: pixels are read when they are used."""
        if self.pixels is None:
            # "c": writable in memory, as torch wants it, but never written to the file.
            self.pixels = np.memmap(self.path, np.uint8, "c", shape=self.shape)
        return self.pixels

    def read(self, frame_id: str) -> np.ndarray:
        """One frame, (512, 640, C) uint8, as `images.read_frame` gives it."""
        return self.all()[self.rows[frame_id]]

    def __getstate__(self) -> dict:
        """Without the map: pickled for a worker process it would be a copy of all pixels."""
        return {**self.__dict__, "pixels": None}


def open_cache(
    folder: str | Path,
    root: Path,
    frame_ids: Sequence[str],
    modalities: Sequence[str],
    read: Callable[[str], np.ndarray],
) -> FrameCache:
    """The cache of a list of frames in a folder; drawn if it is not there or not of these files.

    A stale cache of the same list is deleted first. What is drawn appears under its name when it
    is whole; processes that map an older file keep it until they end.

    Args:
        folder: where caches are kept; made if need be. root: the images' KAIST root.
        modalities: whose images `read` decodes, 4 channels for both, 3 visible, 1 LWIR.
        read: frame id -> (512, 640, C) uint8.

    Raises:
        InputError: an image is missing or unreadable, or the disk is too small.
    """
    folder = Path(folder)
    channels = sum({"visible": 3, "lwir": 1}[modality] for modality in modalities)
    paths = [image_path(root, frame_id, modality) for frame_id in frame_ids for modality in modalities]
    try:
        names, states = fingerprint(paths)
    except OSError as error:
        raise InputError(
            f"image not found ({error.strerror})", "check DATA_ROOT and the image list", file=error.filename
        ) from None
    name = f"frames-{names}"
    path = folder / f"{name}-{states}.u8"
    cache = FrameCache(path, {frame_id: i for i, frame_id in enumerate(frame_ids)}, channels)
    size = int(np.prod(cache.shape))
    if not (path.is_file() and path.stat().st_size == size):
        make_room(folder, name, size)
        write_atomically(path, lambda beside: draw(beside, frame_ids, read))
    return cache


def fingerprint(paths: Iterable[str | Path]) -> tuple[str, str]:
    """Which files (a hash of their paths), and their state (of their sizes and times of change).

    Raises:
        OSError: a file, its `filename`, is not there.
    """
    names, states = hashlib.sha256(), hashlib.sha256()
    here = os.getcwd()
    for path in paths:
        status = os.stat(path)
        names.update(f"{os.path.join(here, path)}\n".encode())
        states.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return names.hexdigest()[:16], states.hexdigest()[:16]


def make_room(folder: Path, name: str, size: int) -> None:
    """Make the folder, delete what is stale or unfinished of a list's caches, check the disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{name}-*.u8"):
            stale.unlink()
        for unfinished in stale_files(folder, f".{name}-*.tmp"):
            unfinished.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(
            f"cannot be used as a folder ({error.strerror})", "choose another with CACHE", file=folder
        ) from None
    if free < size:
        raise InputError(
            f"a cache of {size / 1e9:.1f} GB does not fit, {free / 1e9:.1f} GB are free",
            "choose another folder with CACHE, or none",
            file=folder,
        )


def draw(path: Path, frame_ids: Sequence[str], read: Callable[[str], np.ndarray]) -> None:
    """Decode all frames into a file, a block at a time; decoders run beside each other."""
    from tqdm import tqdm

    bar = tqdm(total=len(frame_ids), desc="decoding into the cache", unit="frame", leave=False)
    with path.open("wb") as file, ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(frame_ids), BLOCK):
            for frame in pool.map(read, frame_ids[start : start + BLOCK]):
                file.write(frame.data)
                bar.update()
