"""Zip archives that tell whether they are whole: the comment at their end is their SHA-256.

Every zip reader takes such a file, torch.load among them; none of them looks at the content's own
checksums when it is in a hurry, as torch.load is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path
from typing import BinaryIO

MARK = b"sha256 "
LENGTH = len(MARK) + 64  # bytes of the comment


def seal(file: BinaryIO) -> None:
    """Give an archive without a comment, open for reading and writing, its checksum as one."""
    file.seek(-2, os.SEEK_END)  # the last field of a zip archive is its comment's length
    file.write(LENGTH.to_bytes(2, "little"))
    file.flush()
    file.write(MARK + sha256(file, file.tell()))


def check_seal(path: Path) -> None:
    """Find any change to a sealed file, a single bit's anywhere included.

    An archive that ends without a comment passes: it was never sealed.

    Raises:
        ValueError: the file was cut short or changed, or never was such an archive.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - LENGTH))
        tail = file.read()
        if tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0":
            return
        if tail[: len(MARK)] != MARK:
            raise ValueError("it is cut short, or no such file at all")
        if tail != MARK + sha256(file, end - LENGTH):
            raise ValueError("it is damaged: its checksum differs")


def sha256(file: BinaryIO, length: int) -> bytes:
    """The SHA-256 of a file's first bytes, in hexadecimal digits."""
    with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest().encode()
