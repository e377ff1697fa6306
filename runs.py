"""A training run's folder: its configuration, checkpoints, log and curves, and how it resumes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from errors import InputError
from experiments import BASE
from files import make_folder, write_atomically
from utils import load_checkpoint, save_checkpoint

# Constants that may differ between a run and its continuation: they change no number.
MACHINE_CONSTANTS = ("experiment", "checkpoints", "name", "device", "workers", "cache",
                     "loader", "compile", "on_nonfinite", "max_bad_frames")  # fmt: skip


class Part(Protocol):
    """What training changes and a checkpoint keeps: a model, an optimiser, a loss, …"""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Run:
    """Where a training run stands, and the folder that remembers it.

    A run with the same constants that was not finished is continued: the sampler and the
    augmentation are keyed by (seed, epoch, frame), so that the parts, epoch and step are all
    there is to remember. A finished run, or one of the same name with other constants, is
    left alone and the new one gets a number: `26`, `26-2`, …

    Attributes:
        folder: `<CHECKPOINTS>/<name>`.
        epoch, step: completed epochs, and completed steps of the epoch under way.
        terms: names of the loss terms; sums: of each over those steps; seconds: their time;
            skipped: how many of them were left out because they were not finite.
        history: for each completed epoch its number, mean loss terms, learning rate, speed and,
            where it was evaluated, its scores: the columns of log.csv.
        parts: what training changes, by the name it has in a checkpoint; "model" and "optimizer"
            are two of them. Set by `restore`.
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
        self.folder = self.choose_folder(Path(config["checkpoints"]))

    def choose_folder(self, root: Path) -> Path:
        """The folder of an unfinished run of the same constants, or the next free name."""
        number = 1
        while True:
            folder = root / (self.name if number == 1 else f"{self.name}-{number}")
            if not folder.exists() or self.continues(folder):
                return folder
            number += 1

    def continues(self, folder: Path) -> bool:
        """Take up a folder's run if it is this one and unfinished.

        A run that was killed before its first checkpoint is this one too; a checkpoint that cannot
        be read is left alone, with a warning.
        """
        if not same_recipe(folder, self.config):
            return False
        if not (folder / "last.pt").exists():
            return True
        try:
            state = load_checkpoint(folder / "last.pt")
        except InputError as error:
            print(f"warning: {error}; starting anew beside it")
            return False
        reported = (folder / "miss_rate.json").exists()
        if "optimizer" not in state or (state["epoch"] >= self.config["epochs"] and reported):
            return False
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
                    "move its folder away to start anew", file=self.folder / "last.pt",
                )  # fmt: skip
        self.state = None

    def begin(self) -> None:
        """Make the folder and write the configuration."""
        make_folder(self.folder)
        text = json.dumps({"name": self.name, **self.config}, indent=1)
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text))

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
        row = {"epoch": self.epoch + 1, **self.mean_losses(), "lr": lr,
               "images_per_s": speed, "seconds": self.seconds,
               "skipped": self.skipped}  # fmt: skip
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
        parts = {name: part.state_dict() for name, part in self.parts.items()
                 if to_continue or name != "optimizer"}  # fmt: skip
        return {
            "model_args": self.model_args, "config": self.config, "experiment": self.name,
            "epoch": self.epoch, "step": self.step, "sums": self.sums, "seconds": self.seconds,
            "skipped": self.skipped,
            "history": self.history, **parts,
        }  # fmt: skip

    def save(self) -> None:
        """Write last.pt."""
        save_checkpoint(self.folder / "last.pt", self.content(to_continue=True))

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
        for key, label in (("miss_rate", "all"), ("miss_rate_day", "day"),
                           ("miss_rate_night", "night")):  # fmt: skip
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
        evidence = {"frames": frame_ids, "losses": terms, "epoch": self.epoch + 1,
                    "step": self.step + 1, "seed": self.config["seed"]}  # fmt: skip
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
        "the loss or its gradient is not a finite number; the batch's frames and loss terms are in "
        "this file", "lower LR, look at those frames, or go on without them by --on-nonfinite skip "
        "from last.pt, which holds the weights from before",
        file=path,
    )
