"""A run's log as a picture: losses, miss rate, recall and masks, and the learning rate over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kaist.report import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Sequence[dict[str, float]]  # a row a completed epoch, as in log.csv
LOSSES = ("loss", "loc", "conf", "seg")
MISS_RATES = {"miss_rate": "all", "miss_rate_day": "day", "miss_rate_night": "night"}


def draw_curves(log: Log, name: str, path: Path) -> None:
    """Draw a run's log as a PNG of four panels; the legends tell where each curve ends.

    Args:
        log: rows of evaluated epochs have "miss_rate", "miss_rate_day", "miss_rate_night", "recall"
            and the masks' "iou_map1", "ap_map1", … too, as fractions.
        name: the run's; path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    losses, rates, found, rate = figure.subplots(2, 2, sharex=True).flat
    scored = [row for row in log if has(row, "miss_rate")]
    title = f"{name}, {len(log)} epoch{'s' * (len(log) != 1)}"
    if scored:
        best = min(scored, key=lambda row: row["miss_rate"])
        title += f": best miss rate {percent(best['miss_rate'])}% (epoch {best['epoch']:g})"
    figure.suptitle(title)

    plot_epochs(losses, log, {key: key for key in LOSSES}, "{:.3g}")
    losses.set(title="training loss", ylim=(0, None))
    plot_epochs(rates, scored, MISS_RATES, "{:.2%}")
    rates.set(title="miss rate, Reasonable: lower is better", ylim=(0, 1))
    masks = dict.fromkeys(key for row in scored for key in row if key.startswith(("iou_", "ap_")))
    names = {key: f"mask {key.replace('_', ' ').replace('map', 'map ')}" for key in masks}
    plot_epochs(found, scored, {"recall": "recall", **names}, "{:.2%}")
    found.set(title="recall and masks: higher is better", ylim=(0, 1))
    plot_epochs(rate, log, {"lr": "learning rate"}, "{:.2g}")
    rate.set(title="learning rate", ylim=(0, None))
    for panel in (rates, found):
        panel.yaxis.set_major_formatter("{x:.0%}")
    figure.savefig(path, format="png", dpi=110)


def plot_epochs(panel: Axes, log: Log, names: dict[str, str], form: str = "", **style: object) -> None:
    """Plot columns of a log over whole epochs, a marker each, with a legend on the panel's right.

    Args:
        names: column -> what the legend calls it; columns without a number are left out.
        form: how the legend writes a curve's last value.
        style: of the lines, as `Axes.plot` takes it.
    """
    from matplotlib.ticker import MaxNLocator

    for key, name in names.items():
        points = [(row["epoch"], row[key]) for row in log if has(row, key)]
        if points:
            label = f"{name} {form.format(points[-1][1])}".strip()
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, **style)
    panel.set(xlabel="epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.grid(alpha=0.3)
    if panel.lines:
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    else:
        panel.text(0.5, 0.5, "not evaluated yet", ha="center", transform=panel.transAxes)


def has(row: dict[str, float], key: str) -> bool:
    """Whether a row of a log holds a number in a column."""
    return not math.isnan(row.get(key, math.nan))
