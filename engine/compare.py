"""Finished runs beside each other: one table, one figure.

`python eval.py --compare checkpoints/26 checkpoints/19 …`
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from kaist.bootstrap import interval
from kaist.files import InputError, read_text, write_atomically
from kaist.miss_rate import GroundTruth
from kaist.report import HEADLINE, Scores, headline, percent, print_scores, score, show_interval
from kaist.results import read_detections

RESAMPLES = 1000  # of the bootstrap, where no other number is asked for


def compare_runs(folders: Sequence[Path], resamples: int, out: Path) -> None:
    """Print the runs' miss rates with intervals, recall and differences; draw them and their
    losses into a picture.

    Args:
        folders: of finished runs that were evaluated on the same frames.
        resamples: of the bootstrap; 0 takes `RESAMPLES`.

    Raises:
        InputError: a folder is not that of a finished run, or was evaluated on other frames.
    """
    # Here, because result files are evaluated without torch.
    from kaist.miss_rate import open_test_set

    configs = [read_config(folder) for folder in folders]
    names = run_names(folders)
    frames = [(folder / "detections.frames.txt").read_text().split() for folder in folders]
    for folder, own in zip(folders, frames, strict=True):
        if own != frames[0]:
            raise InputError(
                f"it was evaluated on other frames than {folders[0]}",
                "compare runs of one test list",
                file=folder,
            )
    first = configs[0]
    people = open_test_set(Path(first["data_root"]), first["test_list"], first["test_annotations"])
    scores = [
        score_run(folder, name, people, resamples or RESAMPLES)
        for folder, name in zip(folders, names, strict=True)
    ]
    print(f"{len(people.frames)} frames, people of {people.source}")
    print_scores(scores)
    logs = [read_log(folder) for folder in folders]
    write_atomically(out, lambda path: draw_runs(scores, logs, path, out.suffix[1:]))
    print(f"curves: {out}")


def read_config(folder: Path) -> dict:
    """A finished run's constants."""
    for name in ("config.json", "log.csv", "detections.txt", "detections.frames.txt"):
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing", "--compare takes folders of finished runs", file=folder)
    try:
        return json.loads(read_text(folder / "config.json"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"broken JSON ({error.msg})", "choose another run", file=folder / "config.json", line=error.lineno
        ) from None


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or with those above them where these are alike."""
    folders = [folder.resolve() for folder in folders]
    if len(set(folders)) < len(folders):
        raise InputError("a run is named twice", "name each once")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def score_run(folder: Path, name: str, people: GroundTruth, resamples: int) -> Scores:
    """A run's own detections, evaluated with intervals."""
    detections = read_detections(folder / "detections.txt", people.frames)
    return score(name, people, detections, resamples)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log.csv; an empty cell is NaN."""
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{key: float(value or "nan") for key, value in row.items()} for row in rows]
    except (TypeError, ValueError):
        raise InputError("a cell is not a number", "choose another run", file=folder / "log.csv") from None


def draw_runs(
    scores: Sequence[Scores], logs: Sequence[list[dict[str, float]]], path: Path, form: str
) -> None:
    """Training loss and miss rate over the epochs, and the final miss rates with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.6 + max(3.0, 0.35 * len(scores))), layout="constrained")
    losses, rates, final = figure.subplots(1, 3)
    for i, (s, log) in enumerate(zip(scores, logs, strict=True)):
        colour = f"C{i % 10}"
        epochs = [row["epoch"] for row in log]
        for term, style in (("loss", "-"), ("loc", "--"), ("conf", ":"), ("seg", "-.")):
            label = s.name if term == "loss" else None
            losses.plot(
                epochs,
                [row[term] for row in log],
                style,
                color=colour,
                label=label,
                linewidth=1.5 if term == "loss" else 0.8,
            )
        scored = [row for row in log if not math.isnan(row.get("miss_rate", math.nan))]
        rates.plot(
            [row["epoch"] for row in scored],
            [100 * row["miss_rate"] for row in scored],
            "o-",
            color=colour,
            label=s.name,
        )
        low, high = (100 * float(bound) for bound in interval(s.samples[HEADLINE[0]]))
        rate = 100 * s.official[HEADLINE[0]].miss_rate
        final.plot([low, high], [i, i], color=colour, linewidth=2)
        final.plot(rate, i, "o", color=colour)
        recall = percent(headline(s.official)["recall"])
        final.annotate(
            f"{rate:.2f} {show_interval(s.samples[HEADLINE[0]])}, recall {recall}",
            (low, i),
            xytext=(0, 6),
            textcoords="offset points",
            fontsize="small",
        )
    losses.set(xlabel="epoch", ylabel="training loss", title="loss –, loc - -, conf ···, seg -·")
    rates.set(xlabel="epoch", ylabel="miss rate, Reasonable (%)", ylim=(0, 100))
    final.set(xlabel="miss rate, Reasonable (%), 95% interval", xlim=(0, 100), ylim=(len(scores) - 0.4, -0.8))
    final.set_yticks(range(len(scores)), [s.name for s in scores])
    losses.legend(fontsize="small")
    figure.savefig(path, format=form, dpi=110)
