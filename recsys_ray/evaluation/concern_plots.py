"""Figures of concern models, small multiples: precision and recall, calibration, confusion."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.evaluation.plots import INK, MUTED, SERIES, STYLE, inline

Floats = npt.NDArray[np.float64]
Answers = Mapping[str, Floats]      # system -> probabilities of the same products
COLUMNS = 4


def precision_recall(panels: Mapping[str, tuple[Floats, Answers]], alt: str) -> str:
    """One panel a concern, `panels[concern] = (labels, answers)`: a line a system, dashed the prevalence."""
    from sklearn.metrics import precision_recall_curve

    def draw(axes: Any, concern: str) -> None:
        label, answers = panels[concern]
        for color, (system, probability) in zip(SERIES, answers.items(), strict=False):
            precision, recall, _ = precision_recall_curve(label, probability)
            axes.step(recall, precision, where="post", color=color, linewidth=1.6, label=system)
        axes.axhline(float(label.mean()), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.03)

    return _panels(list(panels), draw, ("recall", "precision"), alt)


def reliability(panels: Mapping[str, tuple[Floats, Floats]], alt: str) -> str:
    """One panel a system, `panels[system] = (labels, probabilities)` of all concerns: share of positives by bin.

    The size of a dot is the number of pairs in its bin; a calibrated system lies on the diagonal.
    """
    def draw(axes: Any, system: str) -> None:
        label, probability = panels[system]
        bins = np.minimum((probability * 10).astype(np.int64), 9)
        counts = np.bincount(bins, minlength=10)
        full = counts > 0
        said = np.bincount(bins, weights=probability, minlength=10)[full] / counts[full]
        true = np.bincount(bins, weights=label, minlength=10)[full] / counts[full]
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(said, true, color=SERIES[0], linewidth=1.2, alpha=0.6)
        axes.scatter(said, true, s=12 + 130 * counts[full] / counts.max(), color=SERIES[0], linewidths=0, zorder=3)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)

    return _panels(list(panels), draw, ("probability", "share of positives"), alt)


def shares(counts: Mapping[str, Sequence[int]], alt: str) -> str:
    """One panel a concern: how many products have a probability in each of equal bins from 0 to 1."""
    def draw(axes: Any, concern: str) -> None:
        bins = len(counts[concern])
        axes.bar((np.arange(bins) + 0.5) / bins, counts[concern], width=0.9 / bins, color=SERIES[0], linewidth=0)
        axes.set_xlim(0, 1)

    return _panels(list(counts), draw, ("probability", "products"), alt)


def confusion_matrices(counts: Mapping[str, Mapping[str, int]], alt: str) -> str:
    """One panel a concern: yes and no of the system by column, of the label by row; colour is the share of the row."""
    def draw(axes: Any, concern: str) -> None:
        one = counts[concern]
        cells = np.array([[one["true_yes"], one["false_no"]], [one["false_yes"], one["true_no"]]], dtype=float)
        shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
        for row in range(2):
            for column in range(2):
                right = row == column
                axes.fill_between([column, column + 1], 1 - row, 2 - row, color=SERIES[1] if right else SERIES[3],
                                  alpha=0.08 + 0.6 * shares[row, column], linewidth=0)
                axes.text(column + 0.5, 1.5 - row, f"{int(cells[row, column])}", ha="center", va="center", color=INK)
        axes.set_xticks([0.5, 1.5], ["yes", "no"])
        axes.set_yticks([1.5, 0.5], ["is 1", "is 0"])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_xlim(0, 2)
        axes.set_ylim(0, 2)

    return _panels(list(counts), draw, ("", ""), alt, height=1.5)


def _panels(names: Sequence[str], draw: Callable[[Any, str], None], labels: tuple[str, str], alt: str,
            height: float = 1.9) -> str:
    """One SVG of small panels in rows of four, with the legend of the first below all."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    with matplotlib.rc_context({**STYLE, "font.size": 8.5, "svg.hashsalt": alt}):
        figure = Figure(figsize=(2.3 * columns, height * rows + 0.5), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, name in enumerate(names):
            axes = grid[place // columns, place % columns]
            draw(axes, name)
            axes.set_title(name, fontsize=9, color=INK)
        for axes in grid.reshape(-1)[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel(labels[0], color=MUTED, fontsize=8.5)
        figure.supylabel(labels[1], color=MUTED, fontsize=8.5)
        handles, texts = grid[0, 0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, texts, loc="outside upper center", ncol=min(6, len(texts)))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", bbox_inches="tight", pad_inches=0.06,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inline(stream.getvalue(), alt)
