"""One process at a run: a lock on its folder that ends with the process, however that ends."""

from __future__ import annotations

import errno
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import TextIO

from kaist.files import InputError

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

LOCK = ".lock"


def lock_folder(folder: Path) -> TextIO:
    """Lock a folder for this process; the lock lasts as long as the file returned is open.

    It is a POSIX record lock: the kernel gives it back when the process ends, killed or not, so that there
    are no stale ones; forked children do not hold it; and it reaches from host to host on file systems that
    pass locks on, as NFS does. InputError: another process holds it; the line tells which, where and since
    when.
    """
    try:
        file = (folder / LOCK).open("a+")
    except OSError as error:
        problem = f"cannot be written to ({error.strerror or error})"
        raise InputError(problem, "choose another place", file=folder) from None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "it just began"
            file.close()
            problem = f"another process is at this run ({holder})"
            raise InputError(problem, "wait for its end, or stop it", file=folder) from None
        print(f"warning: {folder} cannot be locked ({error.strerror}); do not start it twice")
    file.truncate(0)
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    file.write(f"pid {os.getpid()} on {platform.node()} since {now}\n")
    file.flush()
    return file
