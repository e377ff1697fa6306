"""Run folders, read without torch: config.json, log.csv, the table of runs, and the lock of a folder."""

from __future__ import annotations

import csv
import errno
import os
import platform
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from kaist.files import InputError, load_json, read_text

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

LAST_CHECKPOINT = "last.pt"  # a run's newest checkpoint


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log.csv, one for each completed epoch; an empty cell is NaN.

    Raises:
        InputError: a cell is not a number.
    """
    text = read_text(folder / "log.csv")
    try:
        rows = csv.DictReader(text.splitlines())
        return [{key: float(value or "nan") for key, value in row.items()} for row in rows]
    except (TypeError, ValueError, csv.Error):
        raise InputError("a cell is not a number", "choose another run", file=folder / "log.csv") from None


def saved_constants(folder: Path) -> dict[str, Any]:
    """A run's constants, from its config.json.

    Raises:
        OSError: there is no config.json.
        InputError: it is not a JSON object.
    """
    path = folder / "config.json"
    config = load_json(read_text(path), path)
    if not isinstance(config, dict):
        raise InputError("not a run's constants", "choose another run", file=path)
    return config


def find_run(named: Path, runs: Path) -> Path:
    """The first of `named`, `runs/named` and `runs/named.pt` that exists, else `named`."""
    places = (named, runs / named, runs / f"{named}.pt")
    return next((place for place in places if place.exists()), named)


def read_run(folder: Path) -> dict[str, Any] | None:
    """A run's "config", "log" rows, "epochs" to train, and whether it is "finished"; None if it is no run."""
    try:
        config = saved_constants(folder)
        log = read_log(folder) if (folder / "log.csv").is_file() else []
        epochs = int(config["epochs"])
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, InputError):
        return None
    finished = len(log) >= epochs and (folder / "miss_rate.json").is_file()
    return {"config": config, "log": log, "epochs": epochs, "finished": finished}


def runs_table(folder: str | Path, describe_changes: Callable[[dict[str, Any]], str]) -> str:
    """A table of the runs in a folder, newest first.

    Args:
        describe_changes: takes a run's config and returns what differs from its row.
    """
    found = []
    for path in sorted(Path(folder).glob("*/")):
        if run := read_run(path):
            last = path / LAST_CHECKPOINT  # not the folder's time, which an evaluation changes too
            found.append(((last if last.exists() else path).stat().st_mtime, path.name, run))
    if not found:
        return f"{folder}: no runs yet; python train.py starts one"
    columns = f"{{:{max(len(name) for _, name, _ in found)}}} {{:>5}} {{:>9}}  {{:10}} {{:>9}}  {{:16}}  {{}}"
    rows = [("run", "row", "epochs", "", "miss rate", "last written", "what differs")]
    for written, name, run in sorted(found, key=lambda item: item[0], reverse=True):
        rates = [100 * row["miss_rate"] for row in run["log"] if row.get("miss_rate", -1) >= 0]
        row, done = str(run["config"].get("experiment") or "demo"), f"{len(run['log'])}/{run['epochs']}"
        state = "finished" if run["finished"] else "unfinished"
        best = f"{min(rates):.2f}" if rates else "–"
        moment = f"{datetime.fromtimestamp(written):%Y-%m-%d %H:%M}"
        rows.append((name, row, done, state, best, moment, describe_changes(run["config"])))
    return "\n".join([f"{folder}:", *(columns.format(*row).rstrip() for row in rows)])


def lock_folder(folder: Path) -> TextIO:
    """Lock a folder for this process, as long as the returned file is open.

    It is a POSIX record lock. The kernel releases it when the process ends, even if it is killed. Forked
    children do not inherit it. It works across hosts on file systems with locks, such as NFS.

    Raises:
        InputError: another process has the lock (named with host and time), or the folder is not writable.
    """
    try:
        file = (folder / ".lock").open("a+")
    except OSError as error:
        problem = f"cannot be written to ({error.strerror or error})"
        raise InputError(problem, "choose another folder for --checkpoints", file=folder) from None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "just started"
            file.close()
            problem = f"another process is using this run ({holder})"
            raise InputError(problem, "wait until it ends, or stop it", file=folder) from None
        print(f"warning: {folder} cannot be locked ({error.strerror}); do not start this run twice")
    file.truncate(0)
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    file.write(f"pid {os.getpid()} on {platform.node()} since {now}\n")
    file.flush()
    return file
