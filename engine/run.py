"""A training run's folder: its configuration, checkpoints, log and curves, and how it resumes."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.checkpoint import LAST, PREVIOUS, load_checkpoint, save_checkpoint
from engine.config import MACHINE_CONSTANTS, OLD_DEFAULTS, same_value
from engine.curves import MISS_RATES, draw_curves
from engine.distributed import any_process, broadcast_object, is_main_process, world_size
from engine.history import lock_folder, saved_constants
from kaist.files import InputError, make_folder, write_atomically, write_text
from kaist.report import percent
from kaist.sources import KAIST

DAMAGED = "damaged.pt"  # a last.pt that turned out not to be whole
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
WARM_UP_STEPS, TIMED_STEPS = 10, 20  # steps: the first of a process, and those by which its end is foretold
# Where a run stands that begins: what its checkpoint tells beside the state of its parts.
INITIAL_PROGRESS = {"epoch": 0, "step": 0, "sums": [], "seconds": 0.0, "skipped": 0, "history": []}
FORCE_QUIT_SECONDS = 3.0  # seconds after which another Ctrl-C ends a run that is still at its step


class Run:
    """Where a training run stands, and the folder that remembers it.

    A run with the same constants that was not finished is continued: the sampler and the
    augmentation are keyed by (seed, epoch, frame) and no layer draws at random, so that the parts,
    epoch and step are all there is to remember. A finished run, or one of the same name with
    other constants, is left alone and the new one gets a number: `26`, `26-2`, … A run that
    another process is at is refused.

    As a context manager it hears Ctrl-C, SIGTERM and SIGHUP: the step under way is completed, the
    checkpoint saved, and the program ended. It also saves when an error ends the block between two
    steps. Of several processes the first one writes.

    Args:
        config: the run's constants; name: of its folder; model_args: of its network.

    Attributes:
        folder: `<CHECKPOINTS>/<name>`; notes: what there is to say of the choice.
        epoch, step: completed epochs, and completed steps of the epoch under way.
        terms: names of the loss terms; sums: of each over those steps; seconds: their time;
            skipped: how many of them were left out because they were not finite.
        history: for each completed epoch its number, mean loss terms, learning rate, speed and,
            where it was evaluated, its scores: the columns of log.csv.
        parts: what training changes, by the name it has in a checkpoint; "model" and "optimizer"
            are two of them. Set by `restore`.
        planned_batch: gives the largest batch that is expected to fit into the device's memory; 0: unknown.
        stop_requested: the signal that asked the run to end after this step, or None.
        in_step: whether the parts are being changed, so that they are nothing to go on from.
    """

    def __init__(self, config: Namespace, name: str, model_args: dict[str, Any]) -> None:
        self.config, self.name, self.model_args = config, name, model_args
        self.terms: tuple[str, ...] = ()
        self.planned_batch: Callable[[], int] = int
        self.parts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.lock: TextIO | None = None
        self.stop_requested: int | None = None
        self.stop_time = self.saved_at = 0.0
        self.in_step = False
        self.n_timed = 0  # steps of this process
        chosen = self.choose_folder() if is_main_process() else None
        self.folder, self.state = broadcast_object(chosen)
        self.resumes = bool(self.state)
        stood = INITIAL_PROGRESS | self.state
        self.epoch, self.step, self.skipped = stood["epoch"], stood["step"], stood["skipped"]
        self.seconds, self.sums = stood["seconds"], list(stood["sums"])
        self.history: list[dict[str, float]] = list(stood["history"])

    # ------------------------------------------------------------------------- which run it is

    def choose_folder(self) -> tuple[Path, dict[str, Any]]:
        """The folder of an unfinished run of the same constants, locked, or the next free name; and the
        newest checkpoint in it, {} for none."""
        for number in itertools.count(1):
            folder = Path(self.config.checkpoints) / (self.name + f"-{number}" * (number > 1))
            state = self.read_folder(folder) if folder.exists() else {}
            if state is not None:
                return folder, state
            self.unlock()

    def read_folder(self, folder: Path) -> dict[str, Any] | None:
        """The newest whole checkpoint of a folder's run if it is this one and unfinished, else None.

        It is {} of a run that was killed before its first checkpoint, and of an empty folder. A last.pt that
        is damaged is named and moved aside, and previous.pt taken instead. A run without a whole one is left
        alone, with a warning. InputError: another process is at this run.
        """
        if not (folder / "config.json").is_file():
            if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
                return {}
            problem = "has no config.json, so that nobody knows what run it is"
            self.notes.append(f"{folder} {problem}: a new one")
            return None
        if not same_recipe(folder, vars(self.config)):
            self.notes.append(f"{folder} is a run with other constants: a new one")
            return None
        self.lock = lock_folder(folder)
        kept = [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]
        whole = ((path, state) for path in kept if (state := load_resumable(path, self.config.epochs)))
        path, state = next(whole, (None, {}))
        if not state:
            if kept:
                print(f"warning: {folder} cannot go on; starting anew beside it")
            return None if kept else {}
        reported = (folder / "miss_rate.json").exists()
        if "optimizer" not in state or (state["epoch"] >= self.config.epochs and reported):
            self.notes.append(f"{folder} is finished: a new run")
            return None
        if path != kept[0]:
            os.replace(kept[0], folder / DAMAGED)
            print(f"warning: going on from {path}; what is left of the other is {DAMAGED}")
        self.notes = [f"resuming {folder} from epoch {state['epoch'] + 1}, step {state['step'] + 1}"]
        return state

    def restore(self, parts: dict[str, Any]) -> None:
        """Take charge of parts with state_dict and load_state_dict, in the state of the run that goes on, if
        one does. InputError: the checkpoint, of an older version of this code, lacks a part's state."""
        self.parts, problem = parts, ""
        if len(self.sums) not in (0, len(self.terms)):
            problem = "its loss terms are others"
        for name, part in parts.items() if self.state else ():
            try:
                if name in self.state or part.state_dict():
                    part.load_state_dict(self.state[name])
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
                problem = problem or f"it does not hold the state of {name!r}, so that this run cannot go on"
        if problem:
            raise InputError(problem, "move its folder away to start anew", file=self.folder / LAST)
        self.state = {}

    def start(self) -> None:
        """Make and lock the folder, clear away what a killed writer left, write what is missing. InputError:
        another process has begun this run in the meantime, or the disk is full."""
        make_folder(self.folder)
        if self.lock is None:
            self.lock = lock_folder(self.folder)
            if (self.folder / "config.json").exists():
                problem = "another process has begun this run in the meantime"
                raise InputError(problem, "give the command again", file=self.folder)
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        constants = vars(self.config) | {"name": self.name}
        write_text(self.folder / "config.json", json.dumps(constants, indent=1))
        if not (self.folder / LAST).exists():
            self.save()
        if self.history:
            self.write_log()
        self.saved_at = time.monotonic()

    def unlock(self) -> None:
        """Let other processes have the folder."""
        if self.lock:
            self.lock.close()
        self.lock = None

    # ------------------------------------------------------------------------- how it ends

    def __enter__(self) -> Run:
        if is_main_process():
            self.start()
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as by nohup
        self.handlers = {number: signal.signal(number, self.request_stop) for number in heard}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        try:
            if kind is not None and not self.in_step and is_main_process():
                self.save()
                place = f"epoch {self.epoch + 1}, step {self.step + 1}"
                tqdm.write(f"saved; the same command goes on from {place}")
            if isinstance(error, torch.OutOfMemoryError):
                raise self.out_of_memory() from None
        finally:
            self.unlock()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def out_of_memory(self) -> InputError:
        """The line that ends a run whose step does not fit, with the batch that is expected to."""
        planned = min(self.planned_batch() if world_size() == 1 else 0, self.config.batch_size - 1)
        hint = f" (about {planned} should fit)" if planned > 0 else ""
        problem = f"a step of BATCH_SIZE = {self.config.batch_size} does not fit into the device's memory"
        remedy = f"lower BATCH_SIZE{hint}, INPUT_SIZE or WIDTH; the same command goes on from last.pt"
        return InputError(problem, remedy)

    def request_stop(self, number: int, _: object) -> None:
        """Note a signal; a second Ctrl-C that comes `FORCE_QUIT_SECONDS` seconds later does not wait."""
        now = time.monotonic()
        if self.stop_requested is None:
            self.stop_requested, self.stop_time = number, now
        elif number == signal.SIGINT and now - self.stop_time > FORCE_QUIT_SECONDS:
            raise KeyboardInterrupt

    def check_stop(self) -> None:
        """End the block as a signal would have, if one has asked for it in any process: all end at the same
        step."""
        if any_process(self.stop_requested is not None):
            if self.stop_requested in (signal.SIGINT, None):
                raise KeyboardInterrupt
            sys.exit(128 + self.stop_requested)

    def until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches to evaluate on, in one process none after a signal; several go on to the end."""
        for batch in batches:
            if world_size() == 1:
                self.check_stop()
            yield batch

    # ------------------------------------------------------------------------- what it has done

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

    def show_progress(self, bar: tqdm, total_steps: int) -> None:
        """Put when the run ends, its speed and its mean loss on a bar that fits 80 columns; say once how
        long the run is going to take, by the steps after the first `WARM_UP_STEPS`."""
        if not self.step:
            return
        speed = self.step * self.config.batch_size / max(self.seconds, 1e-9)
        done = self.epoch * total_steps // self.config.epochs + self.step
        left = tqdm.format_interval((total_steps - done) * self.seconds / self.step)
        loss = self.mean_losses()["loss"]
        bar.set_postfix_str(f"{left} left, {speed:.0f} img/s, loss {loss:.2f}", refresh=False)
        self.n_timed += 1
        if self.n_timed == WARM_UP_STEPS:
            self.timed_from = time.monotonic()
        if self.n_timed == WARM_UP_STEPS + TIMED_STEPS and is_main_process():
            pace = (time.monotonic() - self.timed_from) / TIMED_STEPS
            expected = tqdm.format_interval((total_steps - done) * pace)
            tqdm.write(f"expected: {expected} more of training, at {pace:.2g} s a step, and the evaluations")

    def end_epoch(self, scores: dict[str, float]) -> None:
        """Log the epoch, save its checkpoint (and as best.pt if its miss rate is the lowest).

        Args:
            scores: "weight_map1", … of the masks' losses where they are learned; and when the
                epoch was evaluated "miss_rate", "miss_rate_day", "miss_rate_night", "recall" and
                the masks' "ap_map1", … as fractions.
        """
        best = min((past.get("miss_rate", 2.0) for past in self.history), default=2.0)
        row = {
            "epoch": self.epoch + 1,
            **self.mean_losses(),
            "lr": self.parts["optimizer"].param_groups[0]["lr"],
            "images_per_s": self.step * self.config.batch_size / max(self.seconds, 1e-9),
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        self.history.append({**row, **scores})
        self.epoch, self.step, self.skipped = self.epoch + 1, 0, 0
        self.sums, self.seconds = [], 0.0
        if not is_main_process():
            return
        if scores.get("miss_rate", 2.0) < best:  # first: what last.pt tells has happened
            save_checkpoint(self.folder / "best.pt", self.checkpoint_content(to_continue=False))
        self.save()
        self.write_log()
        if "miss_rate" in scores:
            tqdm.write(self.epoch_line(self.history[-1]))

    def best_epoch(self, model: nn.Module) -> nn.Module:
        """A copy of a network with the weights of best.pt; as it is where no epoch had a miss rate."""
        path, chosen = self.folder / "best.pt", copy.deepcopy(model)
        state = load_checkpoint(path)["model"] if is_main_process() and path.exists() else None
        chosen.load_state_dict(broadcast_object(state) or model.state_dict())
        return chosen

    def epoch_line(self, row: dict[str, float]) -> str:
        """One line on an epoch that was evaluated."""
        rates = " / ".join(percent(row[name]) for name in MISS_RATES)
        masks = [f"{value:.2f}" for name, value in row.items() if name.startswith(("ap_", "iou_"))]
        said = f", masks {' '.join(masks)}" if masks else ""
        return (
            f"epoch {row['epoch']}/{self.config.epochs}: loss {row['loss']:.2f}, miss rate {rates} "
            f"(all / day / night), recall {100 * row['recall']:.1f}{said}, "
            f"{tqdm.format_interval(row['seconds'])} of training"
        )

    def summary(self) -> str:
        """Where the run is, what is in it, and what to do next."""
        scored = [row for row in self.history if "miss_rate" in row]
        best = min(scored, key=lambda row: row["miss_rate"])
        seconds = tqdm.format_interval(sum(row["seconds"] for row in self.history))
        chosen = self.folder / "best.pt" if self.config.validation else self.folder
        files = ", ".join(sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".")))
        is_kaist = self.config.data == KAIST
        example = f"{self.config.data_root}/images" if is_kaist else "--visible FILE --lwir FILE"
        return (
            f"{self.folder}: {self.epoch} epoch{'s' * (self.epoch != 1)}, {seconds} of training; lowest miss "
            f"rate {100 * best['miss_rate']:.2f} at epoch {best['epoch']}\nin it: {files}\n"
            f"next: python eval.py --checkpoint {chosen} --bootstrap 1000\n"
            f"      python detect.py --checkpoint {self.folder} {example}"
        )

    def checkpoint_content(self, to_continue: bool) -> dict[str, Any]:
        """A checkpoint's content; without the optimiser it can be used but not continued."""
        known = {"model_args": self.model_args, "config": vars(self.config), "experiment": self.name}
        known |= {name: getattr(self, name) for name in INITIAL_PROGRESS}
        parts = {name: part for name, part in self.parts.items() if to_continue or name != "optimizer"}
        return known | {name: part.state_dict() for name, part in parts.items()}

    def save(self) -> None:
        """Write last.pt; the one before it becomes previous.pt."""
        content = self.checkpoint_content(to_continue=True)
        save_checkpoint(self.folder / LAST, content, previous=self.folder / PREVIOUS)
        self.saved_at = time.monotonic()

    def save_is_due(self) -> bool:
        """Whether the newest checkpoint is older than SAVE_MINUTES."""
        minutes = self.config.save_minutes
        return bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes

    def write_log(self) -> None:
        """Write log.csv and curves.png from the history."""
        text = io.StringIO()
        writer = csv.DictWriter(text, dict.fromkeys(key for row in self.history for key in row), restval="")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.folder / "log.csv", text.getvalue())
        write_atomically(self.folder / "curves.png", lambda path: draw_curves(self.history, self.name, path))

    def save_evidence(self, frame_ids: list[str], losses: Tensor, rank: int) -> Path:
        """Write what a step that went wrong saw: frame ids and loss terms. Returns the path."""
        path = self.folder / f"nonfinite-epoch{self.epoch + 1}-step{self.step + 1}-rank{rank}.json"
        named = dict(zip(self.terms, map(str, losses.tolist()), strict=True))
        where = {"epoch": self.epoch + 1, "step": self.step + 1, "seed": self.config.seed}
        write_text(path, json.dumps({"frames": frame_ids, "losses": named, **where}, indent=1))
        return path


def load_resumable(path: Path, epochs: int) -> dict[str, Any] | None:
    """A checkpoint that tells where its run of so many epochs stood; None, with a warning, if none can
    be gone on from."""
    try:
        state = load_checkpoint(path)
        if not is_valid_progress(INITIAL_PROGRESS | {"epoch": None, "step": None} | state, epochs):
            raise InputError("it does not tell where its run stood", "move it away", file=path)
        return state
    except InputError as error:
        print(f"warning: {error}")
        return None


def is_valid_progress(stood: dict[str, Any], epochs: int) -> bool:
    """Whether the names of `INITIAL_PROGRESS` have values of a run of so many epochs."""
    epoch, step, sums, rows = (stood[name] for name in ("epoch", "step", "sums", "history"))
    counts = all(type(number) is int and number >= 0 for number in (epoch, step, stood["skipped"]))
    if not (counts and isinstance(sums, list) and isinstance(rows, list)):
        return False
    columns = {"epoch", "loss", "lr", "seconds"}
    logged = all(isinstance(row, dict) and columns <= row.keys() for row in rows)
    if not logged or epoch > epochs or len(rows) != epoch or bool(step) != bool(sums):
        return False
    logged = [value for row in rows for value in row.values()]  # some may be NaN
    numbers = all(isinstance(number, int | float) for number in (stood["seconds"], *sums, *logged))
    return numbers and all(map(math.isfinite, (stood["seconds"], *sums)))


def same_recipe(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a run's folder was made with these constants, `MACHINE_CONSTANTS` aside."""
    try:
        theirs = saved_constants(folder)
    except (OSError, InputError):
        return False
    names = config.keys() - set(MACHINE_CONSTANTS)
    return all(same_value(name, config[name], theirs.get(name, OLD_DEFAULTS.get(name))) for name in names)
