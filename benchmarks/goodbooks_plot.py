"""The learning curves of the goodbooks benchmark's cross-encoders as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_curves(trained: Sequence[Mapping[str, Any]], path: Path) -> None:
    """nDCG@10 of validation users over the pairs seen; `trained` holds name, pairs_per_step, cpu_hours and curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for one in trained:
        pairs = [point["step"] * one["pairs_per_step"] for point in one["curve"]]
        axes.plot(pairs, [point["nDCG@10"] for point in one["curve"]], marker="o", markersize=3.5,
                  label=f"{one['name']} ({one['cpu_hours']:.2f} CPU-hours)")
    axes.set(xlabel="training pairs seen", ylabel="nDCG@10, negatives of its own kind")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
