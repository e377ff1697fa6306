"""Decode frames once into a memory-mapped file, which can be faster than decoding JPEG in every epoch.

A cache is one file for one list of frames: their raw uint8 pixels, then a checksum of each frame.
The file name has a hash of the image paths and one of their sizes and modification times, so that
a cache of other or modified images is never used.
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

FRAMES_PER_BLOCK = 64  # frames that are decoded in parallel before they are written
STALE_SECONDS = 3600.0  # a temporary file without a write for so long was abandoned by its process


@dataclass
class FrameCache:
    """Decoded frames; every process maps the file into memory on first use.

    path: a file written by `cache_frames`; rows: frame id -> index; shape: (n_frames, h, w, C).
    """

    path: Path
    rows: dict[str, int]
    shape: tuple[int, int, int, int]
    pixels: np.ndarray | None = None

    def all(self) -> np.ndarray:
        """Return all frames, (n_frames, h, w, C) uint8, as a memory map."""
        if self.pixels is None:
            # "c", copy on write: torch.from_numpy requires writable memory; the file never changes.
            self.pixels = np.memmap(self.path, np.uint8, "c", shape=self.shape)
        return self.pixels

    def read(self, frame_id: str) -> np.ndarray:
        """Return one frame, (h, w, C) uint8, equal to that of `read_frame`."""
        return self.all()[self.rows[frame_id]]

    def find_damaged(self) -> list[str]:
        """Return the ids of the frames whose checksum differs; reads all pixels."""
        from tqdm import tqdm

        sums = np.fromfile(self.path, np.uint32, offset=int(np.prod(self.shape)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            actual = tqdm(pool.map(checksum, self.all()), "checking the cache", len(sums), leave=False)
            return [i for i, crc, expected in zip(self.rows, actual, sums, strict=True) if crc != expected]

    def __getstate__(self) -> dict:
        """Drop the map, which pickle would copy into every worker process."""
        return {**self.__dict__, "pixels": None}


def checksum(frame: np.ndarray) -> int:
    """Compute a checksum of a frame at above 10 GB/s: the CRC-32 of the sum of its 2,560-byte chunks, and
    of the rest.

    It detects the usual damage of files: holes, truncated or shifted content, flipped bits, swapped frames.
    """
    pixels = np.ascontiguousarray(frame).reshape(-1)
    n_summed = pixels.size - pixels.size % 2560
    total = np.add.reduce(pixels[:n_summed].view(np.uint64).reshape(-1, 320), axis=0)
    return zlib.crc32(pixels[n_summed:], zlib.crc32(total))


def cache_frames(
    folder: str | Path, root: Path | PairSet, frame_ids: Sequence[str], input_mode: str, check: bool = True
) -> FrameCache:
    """Open the cache of a list of frames; build it if it is missing or damaged, or if images have changed.

    Older caches of the same list are deleted before. The file gets its final name when it is complete,
    so that several processes may build it at once, and processes that map an older file can continue.

    Args:
        folder: the folder of the caches, created if it does not exist.
        root: the KAIST root, or a set of pairs.
        check: whether to verify the checksums of an existing cache; a run does this once.

    Raises:
        InputError: an image is missing or invalid, frames differ in size, or the disk is too small.
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
        problem = f"the frames have {len(sizes)} sizes, and a cache needs one"
        raise InputError(problem, "leave CACHE empty", file=root.source)
    [(width, height)] = sizes
    cache = FrameCache(path, rows, (len(rows), height, width, channels))
    size = int(np.prod(cache.shape)) + 4 * len(frame_ids)
    if path.is_file() and path.stat().st_size == size:
        damaged = cache.find_damaged() if check else []
        if not damaged:
            return cache
        print(f"warning: {path} is damaged ({len(damaged)} frames, {damaged[0]} first); it is built again")
        cache.pixels = None
    prepare_folder(path, f"frames-{names}", size)
    read = partial(read_frame, root, input_mode=input_mode)
    write_atomically(path, lambda temporary: write_cache(temporary, frame_ids, read), size)
    return cache


def fingerprint(paths: Iterable[str | Path]) -> tuple[str, str]:
    """Hash the paths of files, and, separately, their sizes and modification times."""
    names, states = hashlib.sha256(), hashlib.sha256()
    here = os.getcwd()
    for path in paths:
        status = os.stat(path)
        names.update(f"{os.path.join(here, path)}\n".encode(errors="surrogateescape"))
        states.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return names.hexdigest()[:16], states.hexdigest()[:16]


def prepare_folder(path: Path, name: str, size: int) -> None:
    """Create the folder, delete older and abandoned caches of the same list, and check the disk space."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        older = [other for other in folder.glob(f"{name}-*.u8") if other != path]
        temporary, limit = folder.glob(f".{name}-*.tmp"), time.time() - STALE_SECONDS
        for other in [*older, *(other for other in temporary if other.stat().st_mtime < limit)]:
            other.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        problem = f"cannot use this folder ({error.strerror})"
        raise InputError(problem, "choose another folder with CACHE", file=folder) from None
    if free < size:
        problem = f"a cache of {size / 1e6:,.1f} MB does not fit, {free / 1e6:,.1f} MB are free"
        raise InputError(problem, "choose another folder with CACHE, or leave it empty", file=folder)


def write_cache(path: Path, frame_ids: Sequence[str], read: Callable[[str], np.ndarray]) -> None:
    """Decode all frames into a file, block by block with several threads, and append the checksums."""
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
