"""A training run: its progress, its folder with checkpoints and log, and how it stops and resumes."""

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

from torch import Tensor, nn
from tqdm import tqdm

from engine.captured import is_out_of_memory
from engine.checkpoint import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, load_checkpoint, save_checkpoint
from engine.config import MACHINE_CONSTANTS, OLD_DEFAULTS, same_value
from engine.curves import MISS_RATES, draw_curves
from engine.distributed import any_process, broadcast_object, is_main_process, world_size
from engine.history import lock_folder, saved_constants
from kaist.files import InputError, make_folder, write_atomically, write_text
from kaist.report import percent
from kaist.sources import KAIST

DAMAGED_CHECKPOINT = "damaged.pt"  # a last.pt that was found to be damaged
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
WARM_UP_STEPS, TIMED_STEPS = 10, 20  # steps of a process before timing, and timed, to estimate its duration
# Progress of a new run. A checkpoint stores these keys and the state of the parts.
INITIAL_PROGRESS = {"epoch": 0, "step": 0, "sums": [], "seconds": 0.0, "skipped": 0, "history": []}
FORCE_QUIT_SECONDS = 3.0  # a second Ctrl-C after this time does not wait for the current step


class Run:
    """A training run: its progress and the folder it is saved in.

    An unfinished run with the same constants is resumed. The sampler and the augmentation are keyed by
    (seed, epoch, frame) and no layer samples random numbers, so parts, epoch and step are its whole state.
    If the name belongs to a finished run or one with other constants, the new run gets a number: `26`,
    `26-2`, …

    As a context manager it handles Ctrl-C, SIGTERM and SIGHUP: it completes the current step, saves and
    stops the program. It also saves if an error is raised between two steps. Only rank 0 writes files.

    Args:
        config: the run's constants.
        name: name of its folder, without a number.
        model_args: arguments of its network.

    Attributes:
        folder, notes: its path, and the lines to be printed at the start.
        epoch, step: completed epochs, and completed steps of the current epoch.
        terms, sums: names of the loss terms, and the sum of each over these steps.
        seconds, skipped: time of these steps, and how many were skipped because they were not finite.
        history: the rows of log.csv, one for each completed epoch.
        parts: checkpoint key -> object with a state_dict, "model" and "optimizer" among them.
        planned_batch: returns the largest batch size expected to fit into device memory; 0 if unknown.
        stop_requested: the signal that requested a stop after the current step, or None.
        in_step: whether a step is changing the parts, which must not be saved then.
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
        self.n_steps = 0  # in this process
        chosen = self.choose_folder() if is_main_process() else None
        self.folder, self.state = broadcast_object(chosen)
        self.resumes = bool(self.state)
        progress = INITIAL_PROGRESS | self.state
        self.epoch, self.step, self.skipped = progress["epoch"], progress["step"], progress["skipped"]
        self.seconds, self.sums = progress["seconds"], list(progress["sums"])
        self.history: list[dict[str, float]] = list(progress["history"])

    # ------------------------------------------------------------------------- choosing the folder

    def choose_folder(self) -> tuple[Path, dict[str, Any]]:
        """The folder to use, locked if its run is resumed, and the newest checkpoint in it, else {}."""
        for number in itertools.count(1):
            folder = Path(self.config.checkpoints) / (self.name + f"-{number}" * (number > 1))
            state = self.read_folder(folder) if folder.exists() else {}
            if state is not None:
                return folder, state
            self.unlock()

    def read_folder(self, folder: Path) -> dict[str, Any] | None:
        """The state to resume from, {} if there is no checkpoint yet; None if the folder cannot be used.

        A damaged last.pt is renamed, with a warning, and previous.pt used instead.

        Raises:
            InputError: another process is using this run.
        """
        if not (folder / "config.json").is_file():
            if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
                return {}
            self.notes.append(f"{folder} has no config.json; starting a new run")
            return None
        if not same_recipe(folder, vars(self.config)):
            self.notes.append(f"{folder} is a run with other constants; starting a new run")
            return None
        self.lock = lock_folder(folder)
        paths = [path for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT) if (path := folder / name).exists()]
        loaded = ((path, state) for path in paths if (state := load_resumable(path, self.config.epochs)))
        path, state = next(loaded, (None, {}))
        if not state:
            if paths:
                print(f"warning: {folder} cannot be resumed; starting a new run")
            return None if paths else {}
        reported = (folder / "miss_rate.json").exists()
        if "optimizer" not in state or (state["epoch"] >= self.config.epochs and reported):
            self.notes.append(f"{folder} is finished; starting a new run")
            return None
        if path != paths[0]:
            os.replace(paths[0], folder / DAMAGED_CHECKPOINT)
            print(f"warning: resuming from {path}; the damaged {LAST_CHECKPOINT} is now {DAMAGED_CHECKPOINT}")
        self.notes = [f"resuming {folder} from epoch {state['epoch'] + 1}, step {state['step'] + 1}"]
        return state

    def restore(self, parts: dict[str, Any]) -> None:
        """Set the parts, and load their states if the run is resumed.

        Raises:
            InputError: the checkpoint, of an older version of this code, lacks a part's state.
        """
        self.parts, problem = parts, ""
        if len(self.sums) not in (0, len(self.terms)):
            problem = "it has other loss terms"
        for name, part in parts.items() if self.state else ():
            try:
                if name in self.state or part.state_dict():
                    part.load_state_dict(self.state[name])
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
                problem = problem or f"it does not hold the state of {name!r}, so the run cannot be resumed"
        if problem:
            path = self.folder / LAST_CHECKPOINT
            raise InputError(problem, "move its folder away to start a new run", file=path)
        self.state = {}

    def start(self) -> None:
        """Make and lock the folder, remove temporary files, write config.json and the first checkpoint.

        Raises:
            InputError: another process has started this run since, or the disk is full.
        """
        make_folder(self.folder)
        if self.lock is None:
            self.lock = lock_folder(self.folder)
            if (self.folder / "config.json").exists():
                problem = "another process has just started this run"
                raise InputError(problem, "run the command again", file=self.folder)
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        constants = vars(self.config) | {"name": self.name}
        write_text(self.folder / "config.json", json.dumps(constants, indent=1))
        if not (self.folder / LAST_CHECKPOINT).exists():
            self.save()
        if self.history:
            self.write_log()
        self.saved_at = time.monotonic()

    def unlock(self) -> None:
        """Release the lock of the folder."""
        if self.lock:
            self.lock.close()
        self.lock = None

    # ------------------------------------------------------------------------- stopping

    def __enter__(self) -> Run:
        if is_main_process():
            self.start()
        # Signals that are ignored stay ignored, such as SIGHUP under nohup.
        numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self.request_stop) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        try:
            if kind is not None and not self.in_step and is_main_process():
                self.save()
                place = f"epoch {self.epoch + 1}, step {self.step + 1}"
                tqdm.write(f"saved; the same command resumes from {place}")
            if error and is_out_of_memory(error):
                raise self.out_of_memory() from None
        finally:
            self.unlock()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def out_of_memory(self) -> InputError:
        """The error for a step that does not fit into memory, with a batch size that should."""
        planned = min(self.planned_batch() if world_size() == 1 else 0, self.config.batch_size - 1)
        hint = f" (about {planned} should fit)" if planned > 0 else ""
        problem = f"a step of BATCH_SIZE = {self.config.batch_size} does not fit into the device's memory"
        remedy = f"lower BATCH_SIZE{hint}, INPUT_SIZE or WIDTH; the same command resumes from last.pt"
        return InputError(problem, remedy)

    def request_stop(self, number: int, _: object) -> None:
        """Signal handler: request a stop; a second Ctrl-C after `FORCE_QUIT_SECONDS` stops at once."""
        now = time.monotonic()
        if self.stop_requested is None:
            self.stop_requested, self.stop_time = number, now
        elif number == signal.SIGINT and now - self.stop_time > FORCE_QUIT_SECONDS:
            raise KeyboardInterrupt

    def check_stop(self) -> None:
        """Stop the program if a stop was requested in any process, so that all stop at the same step."""
        if any_process(self.stop_requested is not None):
            if self.stop_requested in (signal.SIGINT, None):
                raise KeyboardInterrupt
            sys.exit(128 + self.stop_requested)

    def until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches to evaluate on. A signal stops a single process here; several complete the evaluation."""
        for batch in batches:
            if world_size() == 1:
                self.check_stop()
            yield batch

    # ------------------------------------------------------------------------- progress and results

    def add_step(self, losses: Tensor | None, seconds: float) -> None:
        """Count a step. losses: (terms,), None for a skipped step; seconds: its time."""
        self.step += 1
        self.seconds += seconds
        self.sums = self.sums or [0.0] * len(self.terms)
        if losses is None:
            self.skipped += 1
        else:
            self.sums = [a + b for a, b in zip(self.sums, losses.tolist(), strict=True)]

    def mean_losses(self) -> dict[str, float]:
        """Each loss term, averaged over the steps of the current epoch."""
        means = (value / max(1, self.step - self.skipped) for value in self.sums)
        return dict(zip(self.terms, means, strict=True))

    def show_progress(self, bar: tqdm, total_steps: int) -> None:
        """Show time left, speed and mean loss on the bar; once, after the timed steps, print the duration."""
        if not self.step:
            return
        speed = self.step * self.config.batch_size / max(self.seconds, 1e-9)
        done = self.epoch * total_steps // self.config.epochs + self.step
        left = tqdm.format_interval((total_steps - done) * self.seconds / self.step)
        loss = self.mean_losses()["loss"]
        bar.set_postfix_str(f"{left} left, {speed:.0f} img/s, loss {loss:.2f}", refresh=False)
        self.n_steps += 1
        if self.n_steps == WARM_UP_STEPS:
            self.timed_from = time.monotonic()
        if self.n_steps == WARM_UP_STEPS + TIMED_STEPS and is_main_process():
            pace = (time.monotonic() - self.timed_from) / TIMED_STEPS
            left = tqdm.format_interval((total_steps - done) * pace)
            tqdm.write(f"expected: {left} more of training, at {pace:.2g} s per step, plus the evaluations")

    def end_epoch(self, scores: dict[str, float]) -> None:
        """Add the epoch to the log and save its checkpoint, also as best.pt if its miss rate is the lowest.

        Args:
            scores: the mask losses' learned weights, "weight_map1", …; after an evaluation also "miss_rate",
                "miss_rate_day", "miss_rate_night", "recall", "ap_map1", "iou_map1", …, as fractions.
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
        if scores.get("miss_rate", 2.0) < best:  # before last.pt, whose history says that best.pt was saved
            save_checkpoint(self.folder / "best.pt", self.checkpoint_content(resumable=False))
        self.save()
        self.write_log()
        if "miss_rate" in scores:
            tqdm.write(self.epoch_line(self.history[-1]))

    def best_epoch(self, model: nn.Module) -> nn.Module:
        """A copy of the model with the weights of best.pt, or its own if there is no best.pt."""
        path, chosen = self.folder / "best.pt", copy.deepcopy(model)
        state = load_checkpoint(path)["model"] if is_main_process() and path.exists() else None
        chosen.load_state_dict(broadcast_object(state) or model.state_dict())
        return chosen

    def epoch_line(self, row: dict[str, float]) -> str:
        """One line with the results of an evaluated epoch."""
        rates = " / ".join(percent(row[name]) for name in MISS_RATES)
        masks = [f"{value:.2f}" for name, value in row.items() if name.startswith(("ap_", "iou_"))]
        mask_part = f", masks {' '.join(masks)}" if masks else ""
        return (
            f"epoch {row['epoch']}/{self.config.epochs}: loss {row['loss']:.2f}, miss rate {rates} "
            f"(all / day / night), recall {100 * row['recall']:.1f}{mask_part}, "
            f"{tqdm.format_interval(row['seconds'])} of training"
        )

    def summary(self) -> str:
        """The lines printed at the end: results, files, and the next commands."""
        scored = [row for row in self.history if "miss_rate" in row]
        best = min(scored, key=lambda row: row["miss_rate"])
        seconds = tqdm.format_interval(sum(row["seconds"] for row in self.history))
        chosen = self.folder / "best.pt" if self.config.validation else self.folder
        files = ", ".join(sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".")))
        is_kaist = self.config.data == KAIST
        example = f"{self.config.data_root}/images" if is_kaist else "--visible FILE --lwir FILE"
        return (
            f"{self.folder}: {self.epoch} epoch{'s' * (self.epoch != 1)}, {seconds} of training; lowest miss "
            f"rate {100 * best['miss_rate']:.2f} at epoch {best['epoch']}\nfiles: {files}\n"
            f"next: python eval.py --checkpoint {chosen} --bootstrap 1000\n"
            f"      python detect.py --checkpoint {self.folder} {example}"
        )

    def checkpoint_content(self, resumable: bool) -> dict[str, Any]:
        """The content of a checkpoint; without the optimiser it cannot be resumed."""
        content = {"model_args": self.model_args, "config": vars(self.config), "experiment": self.name}
        content |= {name: getattr(self, name) for name in INITIAL_PROGRESS}
        parts = {name: part for name, part in self.parts.items() if resumable or name != "optimizer"}
        return content | {name: part.state_dict() for name, part in parts.items()}

    def save(self) -> None:
        """Write last.pt; the last.pt before it becomes previous.pt."""
        content = self.checkpoint_content(resumable=True)
        save_checkpoint(self.folder / LAST_CHECKPOINT, content, previous=self.folder / PREVIOUS_CHECKPOINT)
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
        """Write frame ids and loss terms of a non-finite step to a file, and return its path."""
        path = self.folder / f"nonfinite-epoch{self.epoch + 1}-step{self.step + 1}-rank{rank}.json"
        terms = dict(zip(self.terms, map(str, losses.tolist()), strict=True))
        place = {"epoch": self.epoch + 1, "step": self.step + 1, "seed": self.config.seed}
        write_text(path, json.dumps({"frames": frame_ids, "losses": terms, **place}, indent=1))
        return path


def load_resumable(path: Path, epochs: int) -> dict[str, Any] | None:
    """Load a checkpoint to resume a run of `epochs` from; None, with a warning, if that is impossible."""
    try:
        state = load_checkpoint(path)
        if not is_valid_progress(INITIAL_PROGRESS | {"epoch": None, "step": None} | state, epochs):
            raise InputError("it has no valid progress of a run", "move it away", file=path)
        return state
    except InputError as error:
        print(f"warning: {error}")
        return None


def is_valid_progress(progress: dict[str, Any], epochs: int) -> bool:
    """Whether the values of the keys of `INITIAL_PROGRESS` are possible in a run of `epochs`."""
    epoch, step, sums, rows = (progress[name] for name in ("epoch", "step", "sums", "history"))
    counts = all(type(number) is int and number >= 0 for number in (epoch, step, progress["skipped"]))
    if not (counts and isinstance(sums, list) and isinstance(rows, list)):
        return False
    columns = {"epoch", "loss", "lr", "seconds"}
    logged = all(isinstance(row, dict) and columns <= row.keys() for row in rows)
    if not logged or epoch > epochs or len(rows) != epoch or bool(step) != bool(sums):
        return False
    logged = [value for row in rows for value in row.values()]  # some may be NaN
    numbers = all(isinstance(number, int | float) for number in (progress["seconds"], *sums, *logged))
    return numbers and all(map(math.isfinite, (progress["seconds"], *sums)))


def same_recipe(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the run in a folder has these constants, except for `MACHINE_CONSTANTS`."""
    try:
        saved = saved_constants(folder)
    except (OSError, InputError):
        return False
    names = config.keys() - set(MACHINE_CONSTANTS)
    return all(same_value(name, config[name], saved.get(name, OLD_DEFAULTS.get(name))) for name in names)
