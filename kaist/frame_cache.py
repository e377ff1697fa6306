"""Frames decoded once into a memory map, for disks and page caches faster than a JPEG decoder.

A cache is one file for one list of frames: their raw uint8 pixels, then a checksum of each. Its
name tells what it was drawn from: the frames' paths, and their sizes and times of change; so a cache
of other or changed images is never found, and redrawn. Every process maps it read-only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kaist.annotations import FRAME_SIZE, MODALITIES, PairSet, image_path
from kaist.files import InputError, write_atomically
from kaist.images import read_frame

FRAMES_PER_BLOCK = 64  # frames decoded before they are written
STALE_SECONDS = 3600.0  # seconds without a write after which a temporary file's writer is dead


@dataclass
class FrameCache:
    """Decoded frames by id, mapped into memory on first use, in each process by itself.

    path: a file as from `cache_frames`; rows: frame id -> its place; shape: of all, (F, h, w, C).
    """

    path: Path
    rows: dict[str, int]
    shape: tuple[int, int, int, int]
    pixels: np.ndarray | None = None

    def all(self) -> np.ndarray:
        """All frames, (F, h, w, C) uint8, mapped: pixels are read when they are used."""
        if self.pixels is None:
            # "c": writable in memory, as torch wants it, but never written to the file.
            self.pixels = np.memmap(self.path, np.uint8, "c", shape=self.shape)
        return self.pixels

    def read(self, frame_id: str) -> np.ndarray:
        """One frame, (h, w, C) uint8, as `images.read_frame` gives it."""
        return self.all()[self.rows[frame_id]]

    def find_damaged(self) -> list[str]:
        """The frames whose pixels do not have their checksum; every pixel is read."""
        from tqdm import tqdm

        sums = np.fromfile(self.path, np.uint32, offset=int(np.prod(self.shape)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = tqdm(pool.map(checksum, self.all()), "checking the cache", len(sums), leave=False)
            return [i for i, own, expected in zip(self.rows, found, sums, strict=True) if own != expected]

    def __getstate__(self) -> dict:
        """Without the map: pickled for a worker process it would be a copy of all pixels."""
        return {**self.__dict__, "pixels": None}


def checksum(frame: np.ndarray) -> int:
    """A checksum of a frame, above 10 GB/s: the CRC-32 of the sum of its stretches of 2,560 bytes, and of
    what is left.

    It finds what happens to files: holes, cut and shifted content, flipped bits, another frame.
    """
    pixels = np.ascontiguousarray(frame).reshape(-1)
    rest = pixels.size - pixels.size % 2560
    total = np.add.reduce(pixels[:rest].view(np.uint64).reshape(-1, 320), axis=0)
    return zlib.crc32(pixels[rest:], zlib.crc32(total))


def cache_frames(
    folder: str | Path, root: Path | PairSet, frame_ids: Sequence[str], input_mode: str, check: bool = True
) -> FrameCache:
    """The cache of a list of frames in a folder; drawn if it is not there, damaged, or not of these
    files.

    A stale cache of the same list is deleted first. What is drawn appears under its name when it
    is whole, whoever else draws it at the same time; processes that map an older file keep it.

    Args:
        folder: where caches are kept; made if need be. root: the images' KAIST root, or set of pairs.
        check: compare every frame of a cache that is there with its checksum, as a run does once.

    Raises:
        InputError: an image is missing or unreadable, frames are of several sizes, or the disk is too small.
    """
    modalities = MODALITIES[input_mode]
    try:
        names, states = fingerprint(image_path(root, i, m) for i in frame_ids for m in modalities)
    except OSError as error:
        problem = f"image not found ({error.strerror})"
        raise InputError(problem, "check DATA_ROOT and the image list", file=error.filename) from None
    path = Path(folder) / f"frames-{names}-{states}.u8"
    channels = sum({"visible": 3, "lwir": 1}[modality] for modality in modalities)
    rows = {frame_id: i for i, frame_id in enumerate(frame_ids)}
    sizes = {root.sizes[i] if isinstance(root, PairSet) else FRAME_SIZE for i in frame_ids}
    if len(sizes) > 1:
        problem = f"its frames are of {len(sizes)} sizes, and those of a cache have one"
        raise InputError(problem, "leave CACHE empty", file=root.source)
    [(width, height)] = sizes
    cache = FrameCache(path, rows, (len(rows), height, width, channels))
    size = int(np.prod(cache.shape)) + 4 * len(frame_ids)
    if path.is_file() and path.stat().st_size == size:
        damaged = cache.find_damaged() if check else []
        if not damaged:
            return cache
        print(f"warning: {path} is damaged ({len(damaged)} frames, {damaged[0]} first); it is drawn again")
        cache.pixels = None
    prepare_folder(path, f"frames-{names}", size)
    read = partial(read_frame, root, input_mode=input_mode)
    write_atomically(path, lambda temporary: write_cache(temporary, frame_ids, read), size)
    return cache


def fingerprint(paths: Iterable[str | Path]) -> tuple[str, str]:
    """Which files (a hash of their paths), and their state (of their sizes and times of change)."""
    names, states = hashlib.sha256(), hashlib.sha256()
    here = os.getcwd()
    for path in paths:
        status = os.stat(path)
        names.update(f"{os.path.join(here, path)}\n".encode(errors="surrogateescape"))
        states.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return names.hexdigest()[:16], states.hexdigest()[:16]


def prepare_folder(path: Path, name: str, size: int) -> None:
    """Make a cache's folder, delete what is stale or unfinished of its list's, check the disk."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stale = [other for other in folder.glob(f"{name}-*.u8") if other != path]
        begun, old = folder.glob(f".{name}-*.tmp"), time.time() - STALE_SECONDS
        for other in [*stale, *(other for other in begun if other.stat().st_mtime < old)]:
            other.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        problem = f"cannot be used as a folder ({error.strerror})"
        raise InputError(problem, "choose another with CACHE", file=folder) from None
    if free < size:
        problem = f"a cache of {size / 1e6:,.1f} MB does not fit, {free / 1e6:,.1f} MB are free"
        raise InputError(problem, "choose another folder with CACHE, or none", file=folder)


def write_cache(path: Path, frame_ids: Sequence[str], read: Callable[[str], np.ndarray]) -> None:
    """Decode all frames into a file, a block at a time; decoders run beside each other."""
    from tqdm import tqdm

    sums = []
    bar = tqdm(total=len(frame_ids), desc="decoding into the cache", unit="frame", leave=False)
    with path.open("wb") as file, ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(frame_ids), FRAMES_PER_BLOCK):
            for frame in pool.map(read, frame_ids[start : start + FRAMES_PER_BLOCK]):
                file.write(frame.data)
                sums.append(checksum(frame))
                bar.update()
        file.write(np.array(sums, np.uint32).data)
