"""Curves of a run's log, and a comparison of finished runs as a table and a figure.

`python eval.py --compare checkpoints/26 checkpoints/19 …`
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import find_data
from engine.history import read_log, saved_constants
from kaist.bootstrap import interval
from kaist.files import InputError, read_text, write_atomically
from kaist.report import MAIN, Scores, format_interval, percent, print_scores, score
from kaist.results import frames_path, read_detections
from kaist.sources import KAIST, TEST_SET_KEYS, open_testing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Sequence[dict[str, float]]  # one row for each completed epoch, as in log.csv
LINE_STYLES = {"loss": "-", "loc": "--", "conf": ":", "seg": "-."}  # of the loss terms in a comparison
MISS_RATES = {"miss_rate": "all", "miss_rate_day": "day", "miss_rate_night": "night"}
RESAMPLES = 1000  # default number of bootstrap resamples in a comparison


def draw_curves(log: Log, name: str, path: Path) -> None:
    """Draw a run's log as a PNG of four panels; the legends have the last value of each curve.

    Args:
        log: rows of evaluated epochs also have "miss_rate", "miss_rate_day", "miss_rate_night", "recall",
            "iou_map1", "ap_map1", …, as fractions.
        name: of the run.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    losses, rates, recalls, lr = figure.subplots(2, 2, sharex=True).flat
    evaluated = [row for row in log if has_number(row, "miss_rate")]
    title = f"{name}, {len(log)} epoch{'s' * (len(log) != 1)}"
    if evaluated:
        best = min(evaluated, key=lambda row: row["miss_rate"])
        title += f": best miss rate {percent(best['miss_rate'])}% (epoch {best['epoch']:g}), Reasonable"
    figure.suptitle(title, fontsize=14, fontweight="bold")

    last = {key: value for row in log for key, value in row.items() if has_number(row, key)}
    miss_rate, recall = (f" {percent(last[key])}%" if evaluated else "" for key in ("miss_rate", "recall"))
    labels = {"recall": "recall"}
    for key in dict.fromkeys(key for row in evaluated for key in row if key.startswith(("iou_", "ap_"))):
        measure, number = key.split("_map")
        labels[key] = f"mask {'AP' if measure == 'ap' else 'IoU'} of map {number}"
    plot_epochs(losses, log, {key: key for key in LINE_STYLES}, "{:.3g}")
    plot_epochs(rates, evaluated, MISS_RATES, "{:.2%}")
    plot_epochs(recalls, evaluated, labels, "{:.2%}")
    plot_epochs(lr, log, {"lr": "lr"}, "{:.2g}")
    losses.set(title=f"training loss {last['loss']:.3g}")
    rates.set(title=f"miss rate{miss_rate}: lower is better", ylim=(0, 1))
    recalls.set(title=f"recall{recall} and masks: higher is better", ylim=(0, 1))
    lr.set(title=f"learning rate {last['lr']:.2g}")
    for panel in (losses, lr):
        panel.update_datalim([(1, 0)])
        panel.autoscale_view()
        panel.set_ylim(0)
    lr.yaxis.set_major_formatter("{x:.3g}")
    for panel in (rates, recalls):
        panel.yaxis.set_major_formatter("{x:.0%}")
    for panel in (losses, rates):
        panel.set_xlabel("")
    figure.savefig(path, format="png", dpi=110)


def plot_epochs(panel: Axes, log: Log, labels: dict[str, str], last: str = "", **kwargs: object) -> None:
    """Plot columns of a log over the epochs, with markers, and a legend to the right of the panel.

    Args:
        labels: column -> its label; columns without numbers are left out.
        last: format of a curve's last value in its label; "" leaves the value out.
        kwargs: of `Axes.plot`.
    """
    from matplotlib.ticker import MaxNLocator

    for key, label in labels.items():
        points = [(row["epoch"], row[key]) for row in log if has_number(row, key)]
        if points:
            text = f"{label} {last.format(points[-1][1])}".strip()
            markers = {"marker": "o", "markersize": 4, "clip_on": False}  # not cut off at the border
            panel.plot(*zip(*points, strict=True), label=text, **markers, **kwargs)
    panel.set(xlabel="epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.lines:
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    else:
        panel.text(0.5, 0.5, "not evaluated yet", ha="center", transform=panel.transAxes)


def has_number(row: dict[str, float], key: str) -> bool:
    """Whether a row of a log has a number in a column."""
    return not math.isnan(row.get(key, math.nan))


# ------------------------------------------------------------------- comparison of runs


def compare_runs(folders: Sequence[Path], resamples: int, by_video: bool, out: Path) -> None:
    """Print miss rates with intervals, recall and differences of runs, and draw them with the losses.

    Args:
        resamples: of the bootstrap; 0 for `RESAMPLES`.
        by_video: resample videos instead of frames.
        out: path of the picture.

    Raises:
        InputError: a folder is not a finished run, or was evaluated on other frames.
    """
    configs = [finished_constants(folder) for folder in folders]
    frames = [read_text(frames_path(folder / "detections.txt")).splitlines() for folder in folders]
    for folder, frame_ids in zip(folders, frames, strict=True):
        if frame_ids != frames[0]:
            problem = f"it was evaluated on other frames than {folders[0]}"
            raise InputError(problem, "compare runs with the same test list", file=folder)
    config = {"data": KAIST, **configs[0], **find_data(configs[0])}
    _, test_set = open_testing(**{name: config[name] for name in TEST_SET_KEYS if name in config})
    scores = []
    for folder, name in zip(folders, unique_names(folders, "/"), strict=True):
        detections = read_detections(folder / "detections.txt", test_set.frames)
        scores.append(score(name, test_set, detections, resamples or RESAMPLES, by_video))
    print(f"ground truth: {test_set.source}")
    print_scores(scores)
    logs = [read_log(folder) for folder in folders]
    write_atomically(out, lambda path: draw_runs(scores, logs, path, out.suffix[1:]))
    print(f"curves: {out}")


def finished_constants(folder: Path) -> dict:
    """The constants of a finished run. Raises InputError if the folder is not a finished run."""
    for name in ("config.json", "log.csv", "detections.txt", "detections.frames.txt"):
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing", "--compare takes folders of finished runs", file=folder)
    config = saved_constants(folder)
    if not all(isinstance(config.get(name), str) for name in ("data_root", "test_list", "test_annotations")):
        raise InputError("config.json does not have a run's constants", "choose another run", file=folder)
    return config


def unique_names(paths: Sequence[Path], joiner: str) -> list[str]:
    """The shortest unique names of paths: their last parts, joined. Raises InputError if two are the same."""
    resolved = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, resolved)) + 1):
        names = [joiner.join(parts[-depth:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{paths[-1].name} is given twice", "give each once")


def draw_runs(scores: Sequence[Scores], logs: Sequence[Log], path: Path, file_format: str) -> None:
    """Draw losses and miss rates over the epochs, and the final miss rates with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15, 2.5 + max(3.0, 0.8 * len(scores))), layout="constrained")
    losses, rates, final = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    rows = []
    for i, (s, log) in enumerate(zip(scores, logs, strict=True)):
        colour, result = f"C{i % 10}", s.official[MAIN]
        for term, style in LINE_STYLES.items():
            width = 1.5 if term == "loss" else 0.8
            plot_epochs(losses, log, {term: s.name}, color=colour, linestyle=style, linewidth=width)
        plot_epochs(rates, log, {"miss_rate": s.name}, color=colour)
        final.plot(interval(s.samples[MAIN]), [i, i], color=colour, linewidth=2)
        final.plot(result.miss_rate, i, "o", color=colour, clip_on=False)
        rate = f"{percent(result.miss_rate)} {format_interval(s.samples[MAIN])}"
        name = textwrap.fill(s.name.replace("-", "- "), 28).replace("- ", "-")  # wrapped at hyphens
        rows.append(f"{name}\n{rate}\nrecall {percent(result.recall)}")
    best = min(scores, key=lambda s: s.official[MAIN].miss_rate)
    title = f"lowest miss rate: {best.name}, {percent(best.official[MAIN].miss_rate)}%"
    figure.suptitle(title, fontsize=14, fontweight="bold")
    losses.set(title="training loss and its terms", ylim=(0, None))
    rates.set(title="miss rate, Reasonable", ylim=(0, 1))
    final.set(title="final miss rate, 95% interval", xlim=(0, 1), ylim=(len(scores) - 0.5, -0.5))
    final.set_yticks(range(len(scores)), rows)
    final.grid(axis="x", alpha=0.3)
    for axis in (rates.yaxis, final.xaxis):
        axis.set_major_formatter("{x:.0%}")
    terms = [
        Line2D([], [], color="black", linestyle=style, label=term) for term, style in LINE_STYLES.items()
    ]
    losses.legend(handles=terms, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    rates.legend().remove()
    figure.legend(handles=rates.lines[:], loc="outside lower center", ncols=2)
    figure.savefig(path, format=file_format, dpi=110)
