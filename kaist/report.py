"""What a reader sees of miss rates: tables, notes, curves, JSON. Runs without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kaist.bootstrap import bootstrap, interval
from kaist.files import printable, write_atomically, write_text
from kaist.miss_rate import SCENE_SETUPS, SETUPS, GroundTruth, Result, evaluate, id_shift
from kaist.results import Detections, read_detections, write_detections

HEADLINE = ("Reasonable-all", "Reasonable-day", "Reasonable-night")
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of the miss rate
FLOOR = 1e-4  # what stands for 0 on logarithmic axes


@dataclass(frozen=True)
class Scores:
    """One detector's results under both protocols.

    official, leaderboard: name of setup -> Result; samples: name of setup -> bootstrap samples of
    the official miss rate, empty without them; notes: what a reader of the numbers has to know.
    """

    name: str
    official: dict[str, Result]
    leaderboard: dict[str, Result]
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def score(
    name: str, ground_truth: GroundTruth, detections: Detections, resamples: int = 0, by_video: bool = False
) -> Scores:
    """Evaluate a detector under both protocols, with bootstrap samples if any are wanted."""
    setups = {**SETUPS, **SCENE_SETUPS}
    official = evaluate(ground_truth, detections, setups)
    leaderboard = evaluate(ground_truth, detections, setups, "leaderboard")
    samples = {}
    if resamples:
        samples = bootstrap(ground_truth, detections, setups, resamples=resamples, by_video=by_video)
    notes = find_notes(ground_truth, detections, official[HEADLINE[0]], leaderboard[HEADLINE[0]])
    return Scores(printable(name), official, leaderboard, samples, notes)


def find_notes(
    ground_truth: GroundTruth, detections: Detections, official: Result, leaderboard: Result
) -> list[str]:
    """What is unusual about a result, a sentence each; results are those of Reasonable-all."""
    notes = []
    lost = official.n_positive - leaderboard.n_positive
    if lost:
        notes.append(
            f"the leaderboard's script drops frames without detections and so loses {lost} of "
            f"{official.n_positive} people: it says {percent(leaderboard.miss_rate)}, and "
            f"{percent(official.miss_rate)} is right"
        )
    if not len(detections.scores):
        notes.append("there is not one detection in it")
    if not official.n_positive:
        notes.append("no frame has a person who counts under Reasonable: there is no miss rate")
    if detections.other_categories:
        notes.append(f"left out {detections.other_categories} rows of other categories")
    if detections.other_frames:
        notes.append(f"left out {detections.other_frames} rows of frames not evaluated")
    shift = id_shift(ground_truth, detections)
    if shift:
        where = "after" if shift > 0 else "before"
        notes.append(
            f"its boxes fit the frames {where} their own far better; do its ids count from the "
            "right number (text 1, JSON 0) along the right list?"
        )
    return notes


def headline(results: dict[str, Result]) -> dict[str, float]:
    """The numbers of a training log, fractions."""
    rates = {
        "miss_rate" + key.removeprefix("Reasonable").replace("-all", "").replace("-", "_"): results[
            key
        ].miss_rate
        for key in HEADLINE
    }
    return {**rates, "recall": results[HEADLINE[0]].recall}


def count_people(ground_truth: GroundTruth) -> str:
    """How many frames there are, and how many of their people count, in words."""
    nothing = Detections(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    people, day, night = (evaluate(ground_truth, nothing)[key].n_positive for key in HEADLINE)
    few = "; fewer than 50 say little" if people < 50 else ""
    return f"{len(ground_truth.frames)} frames, {people} people count ({day} day, {night} night){few}"


def report(name: str, ground_truth: GroundTruth, detections: Detections, folder: Path) -> dict:
    """Print a run's table and write detections.txt, miss_rate.png and miss_rate.json to its folder.

    Returns:
        What miss_rate.json holds for it (see `as_dict`).
    """
    path = folder / "detections.txt"
    write_detections(path, detections, ground_truth.frames)
    written = read_detections(path, ground_truth.frames)  # its digits are what others will have
    scores = [score(name, ground_truth, written)]
    print_scores(scores)
    draw_curves(scores, folder / "miss_rate.png")
    write_json(scores, folder / "miss_rate.json")
    return as_dict(scores)[name]


def as_dict(scores: Sequence[Scores], curves: bool = False) -> dict[str, dict]:
    """name -> protocol -> setup -> numbers, fractions at full precision; None where undefined.

    Args:
        curves: add each setup's whole curve: score, FPPI and detection rate of every detection.
    """

    def numbers(result: Result, samples: np.ndarray | None) -> dict:
        values = {
            "miss_rate": number(result.miss_rate),
            "recall": number(result.recall),
            "reference_fppi": result.points.tolist(),
            "detection_rate_at_reference_fppi": [number(rate) for rate in result.rates.tolist()],
            "n_positive": result.n_positive,
            "n_frames": result.n_frames,
            "n_true_positive": int(result.hits.sum()),
            "n_false_positive": int((~result.hits).sum()),
        }
        if curves:
            values["curve"] = {
                "score": result.scores.tolist(),
                "fppi": result.fppi.tolist(),
                "detection_rate": [number(rate) for rate in result.detection_rate.tolist()],
            }
        if samples is not None:
            values["interval_95"] = [number(bound) for bound in interval(samples)]
            values["resamples"] = len(samples)
        return values

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        s.name: {
            "official": {k: numbers(r, s.samples.get(k)) for k, r in s.official.items()},
            "leaderboard": {k: numbers(r, None) for k, r in s.leaderboard.items()},
            "notes": s.notes,
        }
        for s in scores
    }


def write_json(scores: Sequence[Scores], path: Path, curves: bool = False) -> None:
    """Write `as_dict` to a file."""
    text = json.dumps(as_dict(scores, curves), allow_nan=False) + "\n"
    write_text(path, text)


# ------------------------------------------------------------------- tables


def percent(value: float) -> str:
    """A fraction as a percentage with two decimals; a dash if it is not defined."""
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


def print_scores(scores: Sequence[Scores], all_setups: bool = False) -> None:
    """Print the table, all setups if they are wanted, paired differences and notes."""
    print(headline_table(scores))
    if all_setups:
        print("\n" + setup_table(scores))
    for line in compare(scores):
        print(line)
    for s in scores:
        for note in s.notes:
            print(f"warning: {s.name}: {note}")


def headline_table(scores: Sequence[Scores]) -> str:
    """Reasonable under both protocols, in per cent, lowest miss rate first."""
    title = "miss rate, Reasonable (%)"
    width = max(len(title), *(len(s.name) for s in scores))
    lines = [
        f"{title:{width}}  {'official':<32}leaderboard",
        " " * width + f"{'all':>8}{'day':>8}{'night':>8}{'recall':>8}" * 2,
    ]
    for s in by_miss_rate(scores):
        cells = [
            percent(value) for results in (s.official, s.leaderboard) for value in headline(results).values()
        ]
        lines.append(f"{s.name:{width}}" + "".join(f"{cell:>8}" for cell in cells))
        if s.samples:
            bounds = [
                f"{key.removeprefix('Reasonable-')} {show_interval(s.samples[key])}" for key in HEADLINE
            ]
            lines.append(f"{'':{width}}  95%: {', '.join(bounds)}")
    return "\n".join(lines)


def setup_table(scores: Sequence[Scores]) -> str:
    """Official miss rates under every setup, in per cent: a setup a line, a detector a column."""
    scores = by_miss_rate(scores)
    widths = [max(len(s.name), 22 if s.samples else 8) + 2 for s in scores]
    lines = [f"{'official (%)':18}{'people':>7}{'frames':>8}"]
    lines[0] += "".join(f"{s.name:>{w}}" for s, w in zip(scores, widths, strict=True))
    for key, first in scores[0].official.items():
        line = f"{key:18}{first.n_positive:>7}{first.n_frames:>8}"
        for s, w in zip(scores, widths, strict=True):
            bounds = " " + show_interval(s.samples[key]) if s.samples else ""
            line += f"{percent(s.official[key].miss_rate) + bounds:>{w}}"
        lines.append(line)
    return "\n".join(lines)


def compare(scores: Sequence[Scores]) -> list[str]:
    """Whether each detector differs from the best one under Reasonable-all, a sentence each.

    The interval is that of the paired difference: both rates on the same resampled frames.
    """
    key = HEADLINE[0]
    best, *others = by_miss_rate(scores)
    lines = []
    for s in others:
        if s.samples and best.samples:
            low, high = interval(s.samples[key] - best.samples[key])
            verdict = "they differ" if low > 0 or high < 0 else "no difference is shown"
            gap = s.official[key].miss_rate - best.official[key].miss_rate
            lines.append(
                f"{s.name} minus {best.name}: {percent(gap)} points, 95% [{percent(low)}, "
                f"{percent(high)}]: {verdict}"
            )
    return lines


def show_interval(samples: np.ndarray) -> str:
    """[low, high] in per cent."""
    return "[{}, {}]".format(*map(percent, interval(samples)))


def by_miss_rate(scores: Sequence[Scores], key: str = HEADLINE[0]) -> list[Scores]:
    """Lowest official miss rate first; undefined ones last."""
    return sorted(scores, key=lambda s: np.nan_to_num(s.official[key].miss_rate, nan=2.0))


# ------------------------------------------------------------------- curves


def draw_curves(scores: Sequence[Scores], path: Path) -> None:
    """Miss rate over false positives per image, log-log: all, day and night side by side.

    The nine sample points are marked; beyond its last detection a curve goes on level.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    colours = {s.name: f"C{i % 10}" for i, s in enumerate(by_miss_rate(scores))}
    lowest = 1.0
    for panel, key in zip(panels, HEADLINE, strict=True):
        for s in by_miss_rate(scores, key):
            result, colour = s.official[key], colours[s.name]
            fppi = np.concatenate([[FLOOR], result.fppi, [10]])
            rate = np.pad(result.detection_rate, (1, 0))
            missed = np.maximum(1 - np.append(rate, rate[-1]), FLOOR)
            sampled = np.maximum(1 - result.rates, FLOOR)
            label = f"{percent(result.miss_rate)}% {s.name}"
            panel.step(np.maximum(fppi, FLOOR), missed, where="post", color=colour, label=label)
            panel.plot(result.points, sampled, "o", markersize=4, color=colour)
            lowest = min(lowest, np.min(sampled, where=~np.isnan(sampled), initial=1))
        title = f"{key}, {result.n_frames} frames, {result.n_positive} people"
        panel.set(xscale="log", yscale="log", title=title, xlabel="false positives per image")
        panel.set(xlim=(2e-3, 10))
        panel.grid(True, which="both", axis="x", alpha=0.3)
        panel.grid(True, axis="y", alpha=0.3)
        panel.legend(loc="lower left", fontsize="small")
    bottom = max(0.6 * lowest, TICKS[0])
    ticks = [tick for tick in TICKS if tick >= bottom]
    panels[0].set(ylabel="miss rate", ylim=(bottom, 1.05))
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_yticks([], minor=True)
    write_atomically(path, lambda beside: figure.savefig(beside, format=path.suffix[1:], dpi=120))
