"""Finished runs beside each other: one table, one figure.

`python eval.py --compare checkpoints/26 checkpoints/19 …`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.config import find_folder
from engine.curves import LOSSES, Log, plot_epochs
from engine.history import read_log, saved_constants
from kaist.bootstrap import interval
from kaist.files import InputError, read_text, write_atomically
from kaist.report import ALL, Scores, percent, print_scores, score, show_interval
from kaist.results import frames_path, read_detections
from kaist.sources import KAIST, open_testing

RESAMPLES = 1000  # of the bootstrap, where no other number is asked for
STYLES = dict(zip(LOSSES, ("-", "--", ":", "-."), strict=True))


def compare_runs(folders: Sequence[Path], resamples: int, out: Path) -> None:
    """Print the runs' miss rates with intervals, recall and differences; draw them and their
    losses into a picture.

    Args:
        folders: of finished runs that were evaluated on the same frames.
        resamples: of the bootstrap; 0 takes `RESAMPLES`.

    Raises:
        InputError: a folder is not that of a finished run, or was evaluated on other frames.
    """
    configs, names = [read_config(folder) for folder in folders], tell_apart(folders, "/")
    frames = [read_text(frames_path(folder / "detections.txt")).splitlines() for folder in folders]
    for folder, own in zip(folders, frames, strict=True):
        if own != frames[0]:
            problem = f"it was evaluated on other frames than {folders[0]}"
            raise InputError(problem, "compare runs of one test list", file=folder)
    config = configs[0]
    where = {name: config[name] for name in ("test_list", "test_annotations")}
    _, test_set = open_testing(config.get("data", KAIST), find_folder(config["data_root"]), **where)
    scores = []
    for folder, name in zip(folders, names, strict=True):
        detections = read_detections(folder / "detections.txt", test_set.frames)
        scores.append(score(name, test_set, detections, resamples or RESAMPLES))
    print(f"people of {test_set.source}")
    print_scores(scores)
    logs = [read_log(folder) for folder in folders]
    write_atomically(out, lambda path: draw_runs(scores, logs, path, out.suffix[1:]))
    print(f"curves: {out}")


def read_config(folder: Path) -> dict:
    """A finished run's constants."""
    for name in ("config.json", "log.csv", "detections.txt", "detections.frames.txt"):
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing", "--compare takes folders of finished runs", file=folder)
    config, names = saved_constants(folder), ("data_root", "test_list", "test_annotations")
    if not all(isinstance(config.get(name), str) for name in names):
        path = folder / "config.json"
        raise InputError("it holds no run's constants", "choose another run", file=path)
    return config


def tell_apart(paths: Sequence[Path], joiner: str) -> list[str]:
    """A name for each path: its last part, or with those above it, joined, where these are alike.

    Raises:
        InputError: two paths are the same.
    """
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [joiner.join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{paths[-1].name} is named twice", "name each once")


def draw_runs(scores: Sequence[Scores], logs: Sequence[Log], path: Path, form: str) -> None:
    """Training losses and miss rate over the epochs, and the final miss rates with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15, 2 + max(3.0, 0.6 * len(scores))), layout="constrained")
    losses, rates, final = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    key = ALL
    for i, (s, log) in enumerate(zip(scores, logs, strict=True)):
        colour = f"C{i % 10}"
        for term, style in STYLES.items():
            width = 1.5 if term == "loss" else 0.8
            plot_epochs(losses, log, {term: s.name}, color=colour, linestyle=style, linewidth=width)
        plot_epochs(rates, log, {"miss_rate": s.name}, color=colour)
        low, high = interval(s.samples[key])
        final.plot([low, high], [i, i], color=colour, linewidth=2)
        final.plot(s.official[key].miss_rate, i, "o", color=colour)
    rows = [
        f"{s.name}\n{percent(s.official[key].miss_rate)} {show_interval(s.samples[key])}\n"
        f"recall {percent(s.official[key].recall)}"
        for s in scores
    ]
    final.set_yticks(range(len(scores)), rows)
    best = min(scores, key=lambda s: s.official[key].miss_rate)
    losses.set(title="training loss and its terms", ylim=(0, None))
    lowest = f"{best.name} ends lowest, {percent(best.official[key].miss_rate)}%"
    rates.set(title=f"miss rate, Reasonable\n{lowest}", ylim=(0, 1))
    final.set(title="final miss rate, 95% interval", xlim=(0, 1), ylim=(len(scores) - 0.5, -0.5))
    final.grid(axis="x", alpha=0.3)
    rates.yaxis.set_major_formatter("{x:.0%}")
    final.xaxis.set_major_formatter("{x:.0%}")
    lines = [Line2D([], [], color="black", linestyle=style, label=term) for term, style in STYLES.items()]
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    losses.legend(handles=lines, **place)
    rates.legend(handles=rates.lines[:], **place)
    figure.savefig(path, format=form, dpi=110)
