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
        title += f": best miss rate {percent(best['miss_rate'])}% (epoch {best['epoch']:g}), Reasonable"
    figure.suptitle(title, fontsize=14, fontweight="bold")

    ends = {key: value for row in log for key, value in row.items() if has(row, key)}
    rated, recalled = (f" {percent(ends[key])}%" if scored else "" for key in ("miss_rate", "recall"))
    plot_epochs(losses, log, {key: key for key in LOSSES}, "{:.3g}")
    losses.set(title=f"training loss {ends['loss']:.3g}")
    plot_epochs(rates, scored, MISS_RATES, "{:.2%}")
    rates.set(title=f"miss rate{rated}: lower is better", ylim=(0, 1))
    masks = dict.fromkeys(key for row in scored for key in row if key.startswith(("iou_", "ap_")))
    words = {"ap": "AP", "iou": "IoU"}
    names = {key: "mask {} of map {}".format(words[key.split("_")[0]], key.split("map")[1]) for key in masks}
    plot_epochs(found, scored, {"recall": "recall", **names}, "{:.2%}")
    found.set(title=f"recall{recalled} and masks: higher is better", ylim=(0, 1))
    plot_epochs(rate, log, {"lr": "lr"}, "{:.2g}")
    rate.set(title=f"learning rate {ends['lr']:.2g}")
    rate.yaxis.set_major_formatter("{x:.3g}")
    for panel in (losses, rate):
        panel.update_datalim([(1, 0)])
        panel.autoscale_view()
        panel.set_ylim(0)
    for panel in (rates, found):
        panel.yaxis.set_major_formatter("{x:.0%}")
    for panel in (losses, rates):
        panel.set_xlabel("")
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
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
    panel.set(xlabel="epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.lines:
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    else:
        panel.text(0.5, 0.5, "not evaluated yet", ha="center", transform=panel.transAxes)


def has(row: dict[str, float], key: str) -> bool:
    """Whether a row of a log holds a number in a column."""
    return not math.isnan(row.get(key, math.nan))
