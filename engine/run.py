"""A training run's folder: its configuration, checkpoints, log and curves, and how it resumes."""

from __future__ import annotations

import csv
import errno
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import Tensor

from engine.checkpoint import LAST, PREVIOUS, load_checkpoint, save_checkpoint
from engine.experiments import BASE
from kaist.files import InputError, make_folder, write_atomically

# Constants that may differ between a run and its continuation: they change no number.
MACHINE_CONSTANTS = (
    "experiment",
    "checkpoints",
    "name",
    "device",
    "workers",
    "cache",
    "start_method",
    "save_minutes",
    "deterministic",
    "loader",
    "compile",
    "on_nonfinite",
    "max_bad_frames",
)
DAMAGED = "damaged.pt"  # a last.pt that turned out not to be whole


class Part(Protocol):
    """What training changes and a checkpoint keeps: a model, an optimiser, a loss, …"""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Run:
    """Where a training run stands, and the folder that remembers it.

    A run with the same constants that was not finished is continued: the sampler and the
    augmentation are keyed by (seed, epoch, frame) and no layer draws at random, so that the parts,
    epoch and step are all there is to remember. A finished run, or one of the same name with
    other constants, is left alone and the new one gets a number: `26`, `26-2`, … A run that
    another process is at is refused.

    Attributes:
        folder: `<CHECKPOINTS>/<name>`.
        epoch, step: completed epochs, and completed steps of the epoch under way.
        terms: names of the loss terms; sums: of each over those steps; seconds: their time;
            skipped: how many of them were left out because they were not finite.
        history: for each completed epoch its number, mean loss terms, learning rate, speed and,
            where it was evaluated, its scores: the columns of log.csv.
        parts: what training changes, by the name it has in a checkpoint; "model" and "optimizer"
            are two of them. Set by `restore`.
        whole: whether the parts, epoch and step belong together; not so within `undivided`.
    """

    def __init__(self, config: dict[str, Any], name: str, model_args: dict[str, Any]) -> None:
        self.config = config
        self.name = name
        self.model_args = model_args
        self.epoch = self.step = 0
        self.terms: tuple[str, ...] = ()
        self.sums: list[float] = []
        self.skipped = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.parts: dict[str, Part] = {}
        self.state: dict[str, Any] | None = None
        self.whole = True
        self.saved_at = 0.0
        self.lock: Any = None
        self.folder = self.choose_folder(Path(config["checkpoints"]))

    def choose_folder(self, root: Path) -> Path:
        """The folder of an unfinished run of the same constants, or the next free name."""
        number = 1
        while True:
            folder = root / (self.name if number == 1 else f"{self.name}-{number}")
            if not folder.exists() or self.continues(folder):
                return folder
            number += 1

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which is this process's: other processes get the rest."""
        return {**self.__dict__, "lock": None}

    def continues(self, folder: Path) -> bool:
        """Take up a folder's run if it is this one and unfinished, and lock it.

        A run that was killed before its first checkpoint is this one too, and so is a folder in
        which nothing was written yet.

        Raises:
            InputError: another process is at this run.
        """
        if not (folder / "config.json").is_file():
            return folder.is_dir() and all(p.name.startswith(".") for p in folder.iterdir())
        if not same_recipe(folder, self.config):
            return False
        self.lock = lock_folder(folder)
        if self.read_state(folder):
            return True
        self.lock.close()
        self.lock = None
        return False

    def read_state(self, folder: Path) -> bool:
        """Load the newest whole checkpoint of an unfinished run, if it has any yet.

        A last.pt that is damaged is named and moved aside, and previous.pt taken instead.
        Without a whole one the run is left alone, with a warning, and this is False.
        """
        kept = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
        state = None
        for path in kept:
            try:
                state = load_checkpoint(path)
                break
            except InputError as error:
                print(f"warning: {error}")
        if state is None:
            if kept:
                print(f"warning: {folder} cannot go on; starting anew beside it")
            return not kept
        reported = (folder / "miss_rate.json").exists()
        if "optimizer" not in state or (state["epoch"] >= self.config["epochs"] and reported):
            return False
        if path != kept[0]:
            os.replace(kept[0], folder / DAMAGED)
            print(f"warning: going on from {path}; what is left of the other is {DAMAGED}")
        self.state = state
        self.epoch, self.step = state["epoch"], state["step"]
        self.sums, self.seconds = list(state["sums"]), state["seconds"]
        self.skipped = state.get("skipped", 0)
        self.history = list(state["history"])
        return True

    @property
    def resumes(self) -> bool:
        """Whether an earlier start of this run is continued."""
        return self.state is not None

    def restore(self, parts: dict[str, Part]) -> None:
        """Take charge of the parts, in the state of the run that is continued, if one is.

        Raises:
            InputError: the checkpoint, of an older version of this code, lacks a part's state.
        """
        self.parts = parts
        if self.state is None:
            return
        for name, part in parts.items():
            if name in self.state:
                part.load_state_dict(self.state[name])
            elif part.state_dict():
                raise InputError(
                    f"it does not hold the state of {name!r}, so that this run cannot go on",
                    "move its folder away to start anew",
                    file=self.folder / "last.pt",
                )
        self.state = None

    def begin(self) -> None:
        """Make and lock the folder, clear away what a killed writer left, write what is missing.

        Raises:
            InputError: another process has begun this run in the meantime, or the disk is full.
        """
        make_folder(self.folder)
        if self.lock is None:
            self.lock = lock_folder(self.folder)
            if (self.folder / "config.json").exists():
                raise InputError(
                    "another process has begun this run in the meantime",
                    "give the command again",
                    file=self.folder,
                )
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        text = json.dumps({"name": self.name, **self.config}, indent=1)
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text))
        if not (self.folder / LAST).exists():
            self.save()
        if self.history:
            self.write_log()
        self.saved_at = time.monotonic()

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """A block that changes where the run stands; Ctrl-C and the like wait until it has ended.

        A block that fails leaves the run not `whole`: what memory holds is nothing to go on from.
        """
        waiting: list[int] = []
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        handlers = [signal.signal(n, lambda number, _: waiting.append(number)) for n in numbers]
        before, self.whole = self.whole, False
        try:
            yield
            self.whole = before
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)

    def add_step(self, losses: Tensor | None, seconds: float) -> None:
        """Count a step; losses holds the value of each of `terms`, None for a step left out."""
        self.step += 1
        self.seconds += seconds
        self.sums = self.sums or [0.0] * len(self.terms)
        if losses is None:
            self.skipped += 1
        else:
            self.sums = [a + b for a, b in zip(self.sums, losses.tolist(), strict=True)]

    def mean_losses(self) -> dict[str, float]:
        """Each loss term, averaged over the steps of the epoch under way."""
        means = (value / max(1, self.step - self.skipped) for value in self.sums)
        return dict(zip(self.terms, means, strict=True))

    def end_epoch(self, scores: dict[str, float], writes: bool) -> None:
        """Log the epoch, save its checkpoint (and as best.pt if its miss rate is the lowest).

        Args:
            scores: "weight_map1", … of the masks' losses where they are learned; and when the
                epoch was evaluated "miss_rate", "miss_rate_day", "miss_rate_night", "recall" and
                the masks' "iou_map1", … as fractions.
            writes: whether this process is the one that writes.
        """
        speed = self.step * self.config["batch_size"] / max(self.seconds, 1e-9)
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        row = {
            "epoch": self.epoch + 1,
            **self.mean_losses(),
            "lr": lr,
            "images_per_s": speed,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        best = min((past.get("miss_rate", 2.0) for past in self.history), default=2.0)
        self.history.append({**row, **scores})
        self.epoch, self.step, self.skipped = self.epoch + 1, 0, 0
        self.sums, self.seconds = [], 0.0
        if not writes:
            return
        if scores.get("miss_rate", 2.0) < best:  # first: what last.pt tells has happened
            save_checkpoint(self.folder / "best.pt", self.content(to_continue=False))
        self.save()
        self.write_log()

    def content(self, to_continue: bool) -> dict[str, Any]:
        """A checkpoint's content; without the optimiser it can be used but not continued."""
        parts = {
            name: part.state_dict() for name, part in self.parts.items() if to_continue or name != "optimizer"
        }
        return {
            "model_args": self.model_args,
            "config": self.config,
            "experiment": self.name,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "history": self.history,
            **parts,
        }

    def save(self) -> None:
        """Write last.pt; the one before it becomes previous.pt."""
        save_checkpoint(self.folder / LAST, self.content(to_continue=True), previous=self.folder / PREVIOUS)
        self.saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether the newest checkpoint is older than SAVE_MINUTES."""
        minutes = self.config["save_minutes"]
        return bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes

    def write_log(self) -> None:
        """Write log.csv and curves.png from the history."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                columns = dict.fromkeys(key for row in self.history for key in row)
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(self.history)

        write_atomically(self.folder / "log.csv", write)
        write_atomically(self.folder / "curves.png", self.draw_curves)

    def draw_curves(self, path: Path) -> None:
        """Loss terms and miss rate over the epochs."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in self.history]
        for term in ("loss", "loc", "conf", "seg"):
            left.plot(epochs, [row[term] for row in self.history], label=term)
        left.set(xlabel="epoch", ylabel="training loss")
        left.legend()
        scored = [row for row in self.history if "miss_rate" in row]
        for key, label in (("miss_rate", "all"), ("miss_rate_day", "day"), ("miss_rate_night", "night")):
            rates = [100 * row[key] for row in scored]
            right.plot([row["epoch"] for row in scored], rates, marker="o", label=label)
        right.set(xlabel="epoch", ylabel="miss rate, Reasonable (%)", ylim=(0, 100))
        right.legend()
        figure.savefig(path, format="png", dpi=120)

    def save_evidence(self, frame_ids: list[str], losses: Tensor, rank: int) -> Path:
        """Write what a step that went wrong saw: frame ids and loss terms. Returns the path."""
        where = f"epoch{self.epoch + 1}-step{self.step + 1}-rank{rank}"
        path = self.folder / f"nonfinite-{where}.json"
        terms = dict(zip(self.terms, map(str, losses.tolist()), strict=True))
        evidence = {
            "frames": frame_ids,
            "losses": terms,
            "epoch": self.epoch + 1,
            "step": self.step + 1,
            "seed": self.config["seed"],
        }
        text = json.dumps(evidence, indent=1)
        write_atomically(path, lambda beside: beside.write_text(text))
        return path


def same_recipe(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a run's folder was made with these constants, `MACHINE_CONSTANTS` aside."""
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    ours = json.loads(json.dumps(config))  # tuples become lists, as in the file
    # A run from before a constant was added had what BASE says of it.
    return all(ours[k] == theirs.get(k, BASE.get(k)) for k in ours.keys() - set(MACHINE_CONSTANTS))


def nonfinite_error(path: Path) -> InputError:
    """The line that ends a run whose loss is not finite."""
    return InputError(
        "the loss or its gradient is not a finite number; the batch's frames and loss terms are in this file",
        "lower LR, look at those frames, or go on without them by --on-nonfinite skip "
        "from last.pt, which is from before this step",
        file=path,
    )


try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None


LOCK = ".lock"


def lock_folder(folder: Path) -> TextIO:
    """Lock a folder for this process; the lock lasts as long as the file returned is open.

    It is a POSIX record lock: the kernel gives it back when the process ends, killed or not, so
    that there are no stale ones; forked children do not hold it; and it reaches from host to host
    on file systems that pass locks on, as NFS does.

    Raises:
        InputError: another process holds it; the line tells which, where and since when.
    """
    try:
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise InputError(
            f"cannot be written to ({error.strerror})", "choose another place", file=folder
        ) from None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise InputError(
                f"another process is at this run ({file.read().strip() or 'it just began'})",
                "wait for its end, or stop it",
                file=folder,
            ) from None
        print(f"warning: {folder} cannot be locked ({error.strerror}); do not start it twice")
    file.truncate(0)
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    file.write(f"pid {os.getpid()} on {platform.node()} since {now}\n")
    file.flush()
    return file
