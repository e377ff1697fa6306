"""A training run's folder: its configuration, checkpoints, log and curves, and how it resumes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from errors import InputError
from files import make_folder, write_atomically
from utils import load_checkpoint, save_checkpoint

# Constants that may differ between a run and its continuation: they change no number.
MACHINE_CONSTANTS = ("experiment", "checkpoints", "device", "workers", "cache", "max_bad_frames")
LOG_COLUMNS = ("epoch", "loss", "loc", "conf", "seg", "lr", "images_per_s", "seconds",
               "miss_rate", "miss_rate_day", "miss_rate_night", "recall")  # fmt: skip


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
        sums: (4,) sums of loss, loc, conf and seg over those steps; seconds: their time.
        history: a dict with `LOG_COLUMNS` for each completed epoch.
        parts: what training changes, by the name it has in a checkpoint; "model" and "optimizer"
            are two of them. Set by `restore`.
    """

    def __init__(self, config: dict[str, Any], name: str, model_args: dict[str, Any]) -> None:
        self.config = config
        self.name = name
        self.model_args = model_args
        self.epoch = self.step = 0
        self.sums = [0.0] * 4
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
        try:
            theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        ours = json.loads(json.dumps(self.config))  # tuples become lists, as in the file
        if any(ours[k] != theirs.get(k) for k in ours.keys() - set(MACHINE_CONSTANTS)):
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

    def add_step(self, losses: Tensor, seconds: float) -> None:
        """Count a step; losses is (4,): loss, loc, conf, seg."""
        self.step += 1
        self.sums = [a + b for a, b in zip(self.sums, losses.tolist(), strict=True)]
        self.seconds += seconds

    def pass_over(self) -> None:
        """Count a step without a frame that could be read; the mean losses stay as they are."""
        self.sums = [value * (self.step + 1) / max(1, self.step) for value in self.sums]
        self.step += 1

    def mean_losses(self) -> list[float]:
        """Loss, loc, conf and seg, averaged over the steps of the epoch under way."""
        return [value / max(1, self.step) for value in self.sums]

    def end_epoch(self, scores: dict[str, float], writes: bool) -> None:
        """Log the epoch, save its checkpoint (and as best.pt if its miss rate is the lowest).

        Args:
            scores: "miss_rate", "miss_rate_day", "miss_rate_night" and "recall" as fractions;
                empty when the epoch was not evaluated.
            writes: whether this process is the one that writes.
        """
        losses = dict(zip(("loss", "loc", "conf", "seg"), self.mean_losses(), strict=True))
        speed = self.step * self.config["batch_size"] / max(self.seconds, 1e-9)
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        row = {"epoch": self.epoch + 1, **losses, "lr": lr,
               "images_per_s": speed, "seconds": self.seconds}  # fmt: skip
        best = min((past.get("miss_rate", 2.0) for past in self.history), default=2.0)
        self.history.append({**row, **scores})
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, [0.0] * 4, 0.0
        if not writes:
            return
        if scores and scores["miss_rate"] < best:  # first: what last.pt tells has happened
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
            "history": self.history, **parts,
        }  # fmt: skip

    def save(self) -> None:
        """Write last.pt."""
        save_checkpoint(self.folder / "last.pt", self.content(to_continue=True))

    def write_log(self) -> None:
        """Write log.csv and curves.png from the history."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, LOG_COLUMNS, restval="")
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
        terms = dict(zip(("loss", "loc", "conf", "seg"), map(str, losses.tolist()), strict=True))
        evidence = {"frames": frame_ids, "losses": terms, "epoch": self.epoch + 1,
                    "step": self.step + 1, "seed": self.config["seed"]}  # fmt: skip
        text = json.dumps(evidence, indent=1)
        write_atomically(path, lambda beside: beside.write_text(text))
        return path


def nonfinite_error(path: Path) -> InputError:
    """The line that ends a run whose loss is not finite."""
    return InputError(
        "the loss is not a finite number; the batch's frames and loss terms are in this file",
        "lower LR, or look at those frames; last.pt holds the weights from before this epoch",
        file=path,
    )
