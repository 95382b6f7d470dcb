"""Figures as inline SVG that takes its colours and letters from the page: readable in light and in dark.

Every function returns one `<svg>` element with a `<title>`; equal input gives equal text.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

# Stand-ins that matplotlib draws with; the SVG gets the page's CSS variables in their place.
INK, MUTED, GRID = "#010203", "#040506", "#070809"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line",
             **{color: f"--series-{number}" for number, color in enumerate(SERIES, 1)}}
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none", "lines.linewidth": 2.0,
}
Point = tuple[float, float, float]  # mean, low, high


def recall_curves(curves: Mapping[str, Mapping[int, Point]], alt: str) -> str:
    """Recall against cut-off, one line per system with its interval as a band; `curves[system][k]`."""
    def draw(axes: Any) -> None:
        cuts = sorted({k for curve in curves.values() for k in curve})
        ends = []
        for color, (system, curve) in zip(_colors(len(curves)), curves.items(), strict=True):
            points = np.array([curve[k] for k in cuts])
            axes.fill_between(cuts, points[:, 1], points[:, 2], color=color, alpha=0.16, linewidth=0)
            axes.plot(cuts, points[:, 0], color=color, marker="o", markersize=4.5)
            ends.append((float(points[-1, 0]), system, color))
        axes.set_xscale("log")
        axes.set_xticks(cuts, [str(k) for k in cuts])
        axes.minorticks_off()
        axes.set_xlabel("products looked at (k)")
        axes.set_ylabel("recall")
        axes.set_ylim(0, min(1.0, max(point[2] for curve in curves.values() for point in curve.values()) * 1.08))
        _label_ends(axes, cuts[-1], ends)

    return _svg(draw, alt, (5.7, 3.6))


def _label_ends(axes: Any, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Names at the right ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, last = (high - low) * 0.065, -np.inf
    for y, system, color in sorted(ends):
        last = max(y, last + gap)
        axes.annotate(system, (x, y), xytext=(1.02, (last - low) / (high - low)), textcoords="axes fraction",
                      color=color, va="center", fontweight="bold", annotation_clip=False)


def dot_plot(rows: Sequence[str], series: Mapping[str, Sequence[Point | None]], label: str, alt: str,
             zero: bool = False) -> str:
    """One line per row, one dot with its interval per series; `zero` draws a line at no difference."""
    def draw(axes: Any) -> None:
        offsets = np.linspace(-0.26, 0.26, len(series)) if len(series) > 1 else [0.0]
        for color, offset, (name, points) in zip(_colors(len(series)), offsets, series.items(), strict=True):
            found = [(row, point) for row, point in enumerate(points) if point is not None]
            y = [row + offset for row, _ in found]
            axes.hlines(y, [p[1] for _, p in found], [p[2] for _, p in found], color=color, linewidth=2.2, alpha=0.55)
            axes.plot([p[0] for _, p in found], y, "o", color=color, markersize=6, label=name)
        if zero:
            axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        if len(series) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=min(4, len(series)), handletextpad=0.1,
                        columnspacing=1.0)

    return _svg(draw, alt, (5.7, 1.2 + 0.2 * len(rows) * max(2, len(series))))


def win_loss(differences: npt.NDArray[np.float64], label: str, alt: str) -> str:
    """Every query's difference as a bar, largest gain first: gains, ties and losses at a glance."""
    def draw(axes: Any) -> None:
        ordered = np.sort(differences[np.isfinite(differences)])[::-1]
        if len(ordered) > 400:  # one bar for each 400th of the queries is finer than the eye
            ordered = np.array([part.mean() for part in np.array_split(ordered, 400)])
        share = (np.arange(len(ordered)) + 0.5) / len(ordered) * 100
        width = 100 / len(ordered)
        for sign, color in ((1, SERIES[1]), (-1, SERIES[3])):
            axes.bar(share, np.where(ordered * sign > 0, ordered, 0), width=width, color=color, linewidth=0)
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set_xlim(0, 100)
        axes.set_xlabel("queries, % (best first)")
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)

    return _svg(draw, alt, (5.7, 2.7))


def review_counts(num_reviews: npt.NDArray[np.int64], alt: str) -> str:
    """How many products have at least n reviews, both axes logarithmic: a power law is a straight line."""
    def draw(axes: Any) -> None:
        counts = np.sort(num_reviews[num_reviews > 0])
        values, first = np.unique(counts, return_index=True)
        axes.step(values, len(counts) - first, where="pre", color=SERIES[0])
        axes.fill_between(values, len(counts) - first, 0.8, step="pre", color=SERIES[0], alpha=0.12, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_ylim(bottom=0.8)
        axes.set_xlabel("reviews before the cut (n)")
        axes.set_ylabel("products with n or more")

    return _svg(draw, alt, (5.7, 3.1))


def timeline(months: Mapping[str, Mapping[str, int]], alt: str) -> str:
    """Reviews per month, coloured by split; `months["2021-03"][split]`."""
    def draw(axes: Any) -> None:
        names = sorted(months)
        x, bottom = np.arange(len(names)), np.zeros(len(names))
        for color, split in zip((SERIES[0], SERIES[2], SERIES[3]), ("train", "valid", "test"), strict=True):
            height = np.array([months[name].get(split, 0) for name in names], dtype=float)
            axes.bar(x, height, bottom=bottom, width=0.9, color=color, label=split, linewidth=0)
            bottom += height
        step = max(1, len(names) // 5)
        axes.set_xticks(x[::step], names[::step])
        axes.set_ylabel("reviews a month")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)

    return _svg(draw, alt, (5.7, 3.1))


def bars(values: Mapping[str, float], label: str, alt: str) -> str:
    """One bar a name, in the order given."""
    def draw(axes: Any) -> None:
        axes.barh(range(len(values)), list(values.values()), color=SERIES[0], linewidth=0, height=0.7)
        axes.set_yticks(range(len(values)), list(values))
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(values) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)

    return _svg(draw, alt, (5.7, 0.8 + 0.22 * len(values)))


def histogram(values: npt.NDArray[np.floating[Any]], label: str, alt: str, bins: int = 40) -> str:
    """How often each value occurs, as a share of all."""
    def draw(axes: Any) -> None:
        axes.hist(values, bins=bins, weights=np.full(len(values), 1 / max(1, len(values))), color=SERIES[0],
                  linewidth=0)
        axes.set_xlabel(label)
        axes.set_ylabel("share")

    return _svg(draw, alt, (5.7, 2.6))


def curves(lines: Mapping[str, Mapping[float, Point]], labels: tuple[str, str], alt: str,
           marked: Mapping[str, float] | None = None) -> str:
    """One line a name with its interval as a band; `lines[name][x]`, `labels` of both axes, a dot at `marked[name]`."""
    def draw(axes: Any) -> None:
        ends = []
        for color, (name, line) in zip(_colors(len(lines)), lines.items(), strict=True):
            places = sorted(line)
            points = np.array([line[place] for place in places])
            axes.fill_between(places, points[:, 1], points[:, 2], color=color, alpha=0.16, linewidth=0)
            axes.plot(places, points[:, 0], color=color)
            if marked is not None and name in marked:
                axes.plot([marked[name]], [line[marked[name]][0]], "o", color=color, markersize=7)
            ends.append((float(points[-1, 0]), name, color))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        _label_ends(axes, 1, ends)

    return _svg(draw, alt, (5.7, 3.6))


def swarm(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str, alt: str) -> str:
    """One line of dots a name: `points[name]` are places on the axis and, from 0 to 1, what colours each dot."""
    thirds = ((0.0, SERIES[0], "low"), (1 / 3, MUTED, "middle"), (2 / 3, SERIES[3], "high"))

    def draw(axes: Any) -> None:
        for row, (x, tone) in enumerate(points.values()):
            place, tones = np.asarray(x, dtype=float), np.asarray(tone, dtype=float)
            spread = (np.arange(len(place)) * 0.618034 % 1 - 0.5) * 0.62     # even, and the same every time
            for number, (start, color, name) in enumerate(thirds):
                end = thirds[number + 1][0] if number + 1 < len(thirds) else np.inf
                chosen = (tones >= start) & (tones < end)
                axes.plot(place[chosen], row + spread[chosen], "o", color=color, markersize=2.6, alpha=0.7,
                          markeredgewidth=0, label=name if row == 0 else None)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(points)), list(points))
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(points) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, handletextpad=0.1, title="feature's value")

    return _svg(draw, alt, (5.7, 1.3 + 0.26 * len(points)))


def month_of(timestamp_ms: int) -> str:
    """The month of a timestamp in UTC, as `2021-03`."""
    return f"{datetime.fromtimestamp(timestamp_ms / 1000, UTC):%Y-%m}"


def _colors(count: int) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(count)]


def _svg(draw: Any, alt: str, size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": alt}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", bbox_inches="tight", pad_inches=0.06,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inline(stream.getvalue(), alt)


def inline(document: str, alt: str) -> str:
    """A matplotlib SVG document as an element of a page: own ids, the page's colours and font, a title."""
    svg = document[document.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"f{abs(hash_text(alt)):x}-"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"font(-family)?: [^;\"]*'?DejaVu Sans'?[^;\"]*", _font, svg)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" class="plot">', svg, count=1)
    end = svg.index(">") + 1
    return f"{svg[:end]}<title>{html.escape(alt)}</title>{svg[end:].strip()}"


def _font(match: re.Match[str]) -> str:
    return match.group(0).replace("'DejaVu Sans'", "var(--font)").replace("DejaVu Sans", "var(--font)")


def hash_text(text: str) -> int:
    """A small number that is the same for the same text in every process."""
    import zlib

    return zlib.crc32(text.encode())
