"""The picture of a run: loss terms and miss rate over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def draw_curves(history: Sequence[dict[str, float]], name: str, path: Path) -> None:
    """Draw a run's curves.png: a point for each epoch, so that a single one shows.

    Args:
        history: a row for each completed epoch, as in log.csv, losses and miss rates as fractions.
        name: the run's, for the title; path: of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for term in ("loss", "loc", "conf", "seg"):
        left.plot(epochs, [row[term] for row in history], ".-", label=term)
    scored = [row for row in history if row.get("miss_rate", -1) >= 0]
    for key, label in (("miss_rate", "all"), ("miss_rate_day", "day"), ("miss_rate_night", "night")):
        rates = [100 * row[key] for row in scored]
        right.plot([row["epoch"] for row in scored], rates, "o-", label=label)
    left.set(xlabel="epoch", ylabel="training loss", title=f"{name}: loss terms")
    best = min(scored, key=lambda row: row["miss_rate"], default=None)
    said = f"best {100 * best['miss_rate']:.2f} at epoch {best['epoch']:.0f}" if best else "not evaluated yet"
    right.set(xlabel="epoch", ylabel="miss rate, Reasonable (%)", title=f"{name}: {said}", ylim=(0, 100))
    for axes in (left, right):
        axes.set_xlim(0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, format="png", dpi=120)
