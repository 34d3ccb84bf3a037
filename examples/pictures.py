"""How does a figure look that one can read in print and without color? What the examples' pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

COLORS = ("black", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "0.55", "#8C6D31")
"""Of Okabe and Ito: safe for color blindness."""

DASHES = ("-", "--", "-.", ":")
MARKERS = ("", "o", "s", "^", "D", "v", "P")


def look(index: int) -> dict[str, str]:
    """Of the line with this number: its color, and how it is told from the others without it."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def panels(
    rows: int, columns: int, *, width: float = 6.5, height: float = 3.3, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches, and its tidy panels row by row. It is not registered with pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for ax in axes:
        tidy(ax)
    return figure, axes


def tidy(ax: Axes) -> None:
    """Only the part of the frame that is an axis, and a faint grid."""
    ax.grid(color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def plot_accuracies(ax: Axes, curves: Mapping[str, Mapping[int, float]]) -> None:
    """The accuracy on clean images after each epoch, by step, of the run that each label stands for."""
    for i, (label, values) in enumerate(curves.items()):
        ax.plot(range(1, len(values) + 1), values.values(), label=label, markevery=0.2, markersize=4, **look(i))
    ax.set(xlabel="epoch", ylabel="accuracy on clean images")
    ax.legend(frameon=False, fontsize="small")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    print(f"Figure: {path}")
