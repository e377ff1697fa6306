"""Reports of miss rates: tables, notes, curves and JSON. Runs without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kaist.bootstrap import bootstrap, interval
from kaist.coco_ap import coco_ap
from kaist.files import printable, write_atomically, write_text
from kaist.miss_rate import PROTOCOLS, SCENE_SETUPS, SETUPS, GroundTruth, Result, evaluate, find_id_shift
from kaist.results import NO_DETECTIONS, Detections, write_and_read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAIN = "Reasonable-all"  # the setup that detectors are ranked by
HEADLINE = {MAIN: "all", "Reasonable-day": "day", "Reasonable-night": "night"}  # setup -> column of the table
FEW_PEOPLE = 50  # below, one person changes the miss rate by 2 points or more
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # miss rates
CUT_SCORE = 0.2  # if no score of a file is below, its detector may have dropped lower ones
LOG_ZERO = 1e-4  # drawn in place of 0 on logarithmic axes
MAX_FPPI = 10  # right end of the curves


@dataclass(frozen=True)
class Scores:
    """One detector's results. Dictionaries without a comment have names of setups as keys."""

    name: str
    official: dict[str, Result]
    leaderboard: dict[str, Result]
    samples: dict[str, np.ndarray] = field(default_factory=dict)  # of the official miss rate, by bootstrap
    notes: list[str] = field(default_factory=list)  # printed as warnings
    coco: dict[str, float] = field(default_factory=dict)  # COCO's average precisions, as from `coco_ap`


def score(
    name: str,
    ground_truth: GroundTruth,
    detections: Detections,
    resamples: int = 0,
    by_video: bool = False,
    with_coco: bool = False,
) -> Scores:
    """Evaluate a detector under both protocols, with `resamples` bootstrap samples if not 0."""
    setups = {**SETUPS, **SCENE_SETUPS}
    official, leaderboard = (evaluate(ground_truth, detections, setups, protocol) for protocol in PROTOCOLS)
    samples = {}
    if resamples:
        samples = bootstrap(ground_truth, detections, setups, resamples=resamples, by_video=by_video)
    notes = find_notes(ground_truth, detections, official[MAIN], leaderboard[MAIN])
    coco = coco_ap(ground_truth, detections) if with_coco else {}
    return Scores(printable(name), official, leaderboard, samples, notes, coco)


def find_notes(
    ground_truth: GroundTruth, detections: Detections, official: Result, leaderboard: Result
) -> list[str]:
    """Notes on what is unusual about a detector's results, which are those of Reasonable-all."""
    rate, lost = percent(official.miss_rate), official.n_positive - leaderboard.n_positive
    tied, reverse = measure_ties(ground_truth, detections)
    shift, scores = find_id_shift(ground_truth, detections), official.scores
    is_cut = len(scores) and scores[0] <= 1 and scores[-1] >= CUT_SCORE and official.fppi[-1] < 1
    notes = {
        f"the leaderboard's script drops frames without detections and so does not count {lost} of "
        f"{official.n_positive} people: it gives {percent(leaderboard.miss_rate)}, and {rate} is right": lost,
        "it contains no detections": not len(detections.scores),
        f"left out {detections.other_categories} rows of other categories": detections.other_categories,
        f"left out {detections.other_frames} rows of frames not evaluated": detections.other_frames,
        f"{tied:.1%} of the frames have equal scores, which are matched in the order of their rows: in the "
        f"reverse order the miss rate would be {percent(reverse)}, not {rate}": percent(reverse) != rate,
        f"its boxes fit the {'next' if shift > 0 else 'previous'} frames far better than their own; check "
        "that its ids start at the right number (text 1, JSON 0) and are of the right list": shift,
        f"no score is below {CUT_SCORE}, and the curve ends before one false positive per image: with lower "
        "scores the miss rate would be lower (detect.py --min-score 0.01)": is_cut,
    }
    return [note for note, applies in notes.items() if applies]


def measure_ties(ground_truth: GroundTruth, detections: Detections) -> tuple[float, float]:
    """The fraction of frames with equal scores, and the miss rate if rows of equal scores are reversed."""
    ranked = detections.sort_by_score()
    tied = (np.diff(ranked.frame_idxs) == 0) & (np.diff(ranked.scores) == 0)
    order = np.lexsort((-np.arange(len(ranked.frame_idxs)), ranked.frame_idxs, -ranked.scores))
    reverse = replace(ranked, boxes=ranked.boxes[order])  # frames and scores stay as they are
    [result] = evaluate(ground_truth, reverse, {MAIN: SETUPS[MAIN]}).values()
    return len(np.unique(ranked.frame_idxs[1:][tied])) / len(ground_truth.frames), result.miss_rate


def headline(results: dict[str, Result]) -> dict[str, float]:
    """The columns of a training log, as fractions: miss_rate, miss_rate_day, miss_rate_night and recall."""
    rates = {f"miss_rate_{name}": results[key].miss_rate for key, name in HEADLINE.items()}
    return {"miss_rate": rates.pop("miss_rate_all"), **rates, "recall": results[MAIN].recall}


def describe_test_set(ground_truth: GroundTruth) -> str:
    """Text with the number of frames, and of the people in them that count."""
    return describe_counts(evaluate(ground_truth, NO_DETECTIONS))


def describe_counts(results: dict[str, Result]) -> str:
    """Text with the number of frames, and of the people in them that count."""
    total, day, night = (results[key].n_positive for key in HEADLINE)
    counts = f"{format_people(total)} {'counts' if total == 1 else 'count'}"
    known = any(results[key].n_frames for key in HEADLINE if key != MAIN)
    times = f" ({day} day, {night} night)" if known else ""
    return f"{results[MAIN].n_frames} frames, {counts}{times}"


def format_people(n: int) -> str:
    """A number of people, as "1 person" or "2 people"."""
    return f"{n} person" if n == 1 else f"{n} people"


def report(name: str, ground_truth: GroundTruth, detections: Detections, folder: Path) -> dict:
    """Print a run's table and write detections.txt, miss_rate.png and miss_rate.json to its folder.
    Returns the content of miss_rate.json for this run, see `as_dict`."""
    written = write_and_read(folder / "detections.txt", detections, ground_truth.frames)
    scores = [score(name, ground_truth, written)]
    print_scores(scores)
    draw_curves(scores, folder / "miss_rate.png")
    write_json(scores, folder / "miss_rate.json")
    return as_dict(scores)[name]


def as_dict(scores: Sequence[Scores], curves: bool = False) -> dict[str, dict]:
    """detector -> protocol -> setup -> numbers: fractions at full precision, None where undefined.

    curves: add each setup's curve: score, FPPI and detection rate of every detection.
    """
    content = {}
    for s in scores:
        official, leaderboard = (
            {key: numbers(result, curves) for key, result in results.items()}
            for results in (s.official, s.leaderboard)
        )
        for key, samples in s.samples.items():
            official[key] |= {"interval_95": interval(samples), "resamples": len(samples)}
        content[s.name] = {"official": official, "leaderboard": leaderboard, "notes": s.notes}
        content[s.name] |= {"coco": s.coco} if s.coco else {}
    return json.loads(json.dumps(content), parse_constant=lambda nan: None)


def numbers(result: Result, curves: bool) -> dict[str, Any]:
    """A result's numbers under their keys in JSON; NaN is not replaced yet."""
    values = {
        "miss_rate": result.miss_rate,
        "recall": result.recall,
        "reference_fppi": result.points.tolist(),
        "detection_rate_at_reference_fppi": result.rates.tolist(),
        "n_positive": result.n_positive,
        "n_frames": result.n_frames,
        "n_true_positive": int(result.hits.sum()),
        "n_false_positive": int((~result.hits).sum()),
    }
    if curves:
        columns = {"score": result.scores, "fppi": result.fppi, "detection_rate": result.detection_rate}
        values["curve"] = {name: column.tolist() for name, column in columns.items()}
    return values


def write_json(scores: Sequence[Scores], path: Path, curves: bool = False) -> None:
    """Write `as_dict` to a file."""
    write_text(path, json.dumps(as_dict(scores, curves), allow_nan=False) + "\n")


def percent(value: float) -> str:
    """Format a fraction as a percentage with two decimals, nan as a dash."""
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


def print_scores(scores: Sequence[Scores], all_setups: bool = False) -> None:
    """Print the number of people, the tables, paired differences and notes."""
    print(describe_counts(scores[0].official))
    print(headline_table(scores))
    if all_setups:
        print("\n" + setup_table(scores))
    for s in scores:
        if s.coco:
            print(f"COCO (%) {s.name}: " + ", ".join(f"{name} {percent(ap)}" for name, ap in s.coco.items()))
    for line in compare(scores):
        print(line)
    if not any(scores[0].official[f"Occ={level}"].n_positive for level in ("partial", "heavy")):
        lowest = SETUPS[MAIN].heights[0]
        print(f"note: nobody is labelled as occluded, so everyone of at least {lowest} pixels counts")
    people = {HEADLINE[key]: scores[0].official[key].n_positive for key in with_frames(scores, HEADLINE)}
    if few := ", ".join(f"{n} ({name})" for name, n in people.items() if n < FEW_PEOPLE):
        print(f"warning: few people count, {few}: each person can change that miss rate by 2 points or more")
    for s in scores:
        for note in s.notes:
            print(f"warning: {s.name}: {note}")


def with_frames(scores: Sequence[Scores], setups: Iterable[str]) -> list[str]:
    """The setups whose subset has frames."""
    return [key for key in setups if scores[0].official[key].n_frames]


def headline_table(scores: Sequence[Scores]) -> str:
    """Reasonable miss rates under both protocols, in per cent, lowest first."""
    title, keys = "miss rate, Reasonable (%)", with_frames(scores, HEADLINE)
    width = max(len(title), *(len(s.name) for s in scores))
    columns = "".join(f"{name:>8}" for name in (*(HEADLINE[key] for key in keys), "recall"))
    lines = [f"{title:{width}}  {'official':<{len(columns)}}leaderboard", " " * width + 2 * columns]
    for s in sort_by_miss_rate(scores):
        line = f"{s.name:{width}}"
        for results in (s.official, s.leaderboard):
            values = [*(results[key].miss_rate for key in keys), results[MAIN].recall]
            line += "".join(f"{percent(value):>8}" for value in values)
        lines.append(line)
        if s.samples:
            bounds = [f"{HEADLINE[key]} {format_interval(s.samples[key])}" for key in keys]
            lines.append(f"{'':{width}}  95%: {', '.join(bounds)}")
    return "\n".join(lines)


def setup_table(scores: Sequence[Scores]) -> str:
    """Official miss rates in per cent, with a line per setup and a column per detector."""
    scores = sort_by_miss_rate(scores)
    widths = [max(len(s.name), 22 if s.samples else 8) + 2 for s in scores]
    lines = [f"{'official (%)':18}{'people':>7}{'frames':>8}"]
    lines[0] += "".join(f"{s.name:>{w}}" for s, w in zip(scores, widths, strict=True))
    for key in with_frames(scores, scores[0].official):
        first = scores[0].official[key]
        line = f"{key:18}{first.n_positive:>7}{first.n_frames:>8}"
        for s, w in zip(scores, widths, strict=True):
            bounds = " " + format_interval(s.samples[key]) if s.samples else ""
            line += f"{percent(s.official[key].miss_rate) + bounds:>{w}}"
        lines.append(line)
    return "\n".join(lines)


def compare(scores: Sequence[Scores]) -> list[str]:
    """Whether each detector's Reasonable-all miss rate differs from the best one's, a line per detector.

    The interval is that of the paired difference, of both rates on the same resampled frames.
    """
    best, *others = sort_by_miss_rate(scores)
    lines = []
    for s in others if best.samples else ():
        samples = s.samples[MAIN] - best.samples[MAIN]
        verdict = "they differ" if differs(samples) else "no difference is shown"
        gap = percent(s.official[MAIN].miss_rate - best.official[MAIN].miss_rate)
        lines.append(f"{s.name} minus {best.name}: {gap} points, 95% {format_interval(samples)}: {verdict}")
    return lines


def differs(samples: np.ndarray) -> bool:
    """Whether the 95% interval of a difference excludes zero."""
    low, high = interval(samples)
    return low > 0 or high < 0


def format_interval(samples: np.ndarray) -> str:
    """Format the 95% interval of bootstrap samples as [low, high] in per cent."""
    return "[{}, {}]".format(*map(percent, interval(samples)))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def sort_by_miss_rate(scores: Sequence[Scores], key: str = MAIN) -> list[Scores]:
    """Sort by official miss rate, lowest first and undefined last."""
    return sorted(scores, key=lambda s: np.nan_to_num(s.official[key].miss_rate, nan=2.0))


def draw_curves(scores: Sequence[Scores], path: Path) -> None:
    """Plot the official miss rate over false positives per image, in panels for all, day and night.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    keys = with_frames(scores, HEADLINE)
    keys = keys if len(keys) == 3 else keys[-1:]  # with frames only by day, or by night, "all" shows the same
    figure = Figure(figsize=(5.2 * len(keys), 5 + 0.22 * len(scores)), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        plot_curves(panel, scores, key)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=120))


def plot_curves(panel: Axes, scores: Sequence[Scores], key: str) -> None:
    """Plot one setup's curves, with dots at the nine FPPI points. Colours are the same in all panels."""
    order = [s.name for s in sort_by_miss_rate(scores)]
    ranked = sort_by_miss_rate(scores, key)
    for s in ranked:
        result, i = s.official[key], order.index(s.name)
        inside = result.fppi <= MAX_FPPI
        fppi = np.concatenate([[LOG_ZERO], result.fppi[inside], [MAX_FPPI]])
        rate = np.pad(result.detection_rate[inside], (1, 0))
        missed = np.maximum(1 - np.append(rate, rate[-1]), LOG_ZERO)
        colour, label = f"C{i % 10}", f"{percent(result.miss_rate)}% {s.name}"
        style = {"where": "post", "color": colour, "linestyle": "-" if i < 10 else "--"}
        panel.step(np.maximum(fppi, LOG_ZERO), missed, label=label, **style)
        panel.plot(result.points, np.maximum(1 - result.rates, LOG_ZERO), "o", markersize=4, color=colour)
    best = ranked[0].official[key]
    title = f"{HEADLINE[key]}: {ranked[0].name} {percent(best.miss_rate)}%"
    title += f", best of {len(scores)}" if len(scores) > 1 else ""
    title += f"\n{best.n_frames} frames, {format_people(best.n_positive)}"
    rates = np.concatenate([s.official[k].rates for s in scores for k in HEADLINE])
    bottom = max(0.6 * (1 - np.max(rates, where=~np.isnan(rates), initial=0)), TICKS[0])
    ticks = [tick for tick in TICKS if tick >= bottom]
    panel.set(xscale="log", yscale="log", xlim=(2e-3, MAX_FPPI), ylim=(bottom, 1.05), title=title)
    panel.set(xlabel="false positives per image (dots: averaged)", ylabel="miss rate, Reasonable, official")
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_yticks([], minor=True)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.grid(which="both", axis="x", alpha=0.3)
    panel.grid(axis="y", alpha=0.3)
    panel.label_outer()
    if len(scores) > 1:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
