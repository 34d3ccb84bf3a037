"""What does it look like? Norms over a run, schedules, histograms.

Every function returns ``(fig, ax)`` and draws into the axes given as ``ax``, as torchmetrics does. A picture of several
panels returns a list of axes, and takes as many. A figure made here is not registered with pyplot, so that nothing is
left behind in a long run: keep it with ``fig.savefig("norms.pdf")``, or end a notebook's cell with ``fig``.

matplotlib is imported when something is drawn: ``pip install "lightning-regularize[plot]"``. Colors are told apart
without color too, by markers and dashes.
"""

from __future__ import annotations

import csv
import difflib
import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lightning_regularize._checks import check_positive_integer
from lightning_regularize._sharding import is_dtensor
from lightning_regularize._used import used_weights, without_unknown
from lightning_regularize.schedules import Schedule, ScheduleLike, simulate
from lightning_regularize.selection import parameter_infos

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

__all__ = ["plot_norms", "plot_schedule", "plot_histograms"]


class _HasLogDir(Protocol):
    """What a logger that writes into a directory has, Lightning's ``CSVLogger`` among them."""

    @property
    def log_dir(self) -> str | None:
        """The directory of this run."""


Series: TypeAlias = tuple[Sequence[float], Sequence[float]]  # steps and values, as many
Source: TypeAlias = "str | os.PathLike[str] | _HasLogDir | Mapping[str, Series]"
Panels: TypeAlias = "Axes | list[Axes]"

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # Okabe and Ito: safe for color blindness
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_EXPECTED: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.0}
_MOST_LINES = len(_COLORS)  # more cannot be told apart in one panel
_MOST_PANELS = 20  # more do not fit a page

_LABELS = {  # where the quantity's own name leaves open what it is or what its unit is
    "angle": "angle (radians per step)",
    "below_threshold": "share below threshold",
    "effective_decay": "effective decay (share removed per step)",
    "ratio": "update norm / weight norm",
    "rms": "RMS of the weights",
    "sparsity": "sparsity (share of zeros)",
    "timescale": "timescale (steps)",
    "timescale_epochs": "timescale (epochs)",
}
_LINEAR = ("generalization_gap", "sparsity", "below_threshold")  # differences and shares, of which 0 is a value


class _Look(NamedTuple):
    """How a quantity is shown."""

    label: str
    may_be_log: bool


def plot_norms(
    source: Source,
    *,
    keys: Sequence[str] | None = None,
    quantity: str = "weight_norm",
    expected: bool = True,
    kind: Literal["auto", "lines", "grid", "heatmap"] = "auto",
    ax: Axes | Sequence[Axes] | None = None,
) -> tuple[Figure, Panels]:
    """Draw a logged quantity over the steps of a run, for the whole model or layer by layer.

    Args:
        source: A ``metrics.csv`` of Lightning's ``CSVLogger``, its directory, the logger itself, or a mapping from keys
            like ``"weight_norm/encoder.weight"`` to steps and values.
        keys: What to draw: names like ``"total"`` or ``"encoder.weight"``, or globs like ``"encoder.*"``. By default
            everything that was logged; a heat map then leaves out totals, which are no layers.
        quantity: The part of the keys before the slash.
        expected: Whether to draw what theory expects, dashed, where it was logged (``.../expected``). A heat map has no
            place for it.
        kind: ``"lines"`` in one panel, a ``"grid"`` of one panel a key, or a ``"heatmap"`` of layers over steps.
            ``"auto"`` takes the first of them that stays readable: lines up to 6 keys, a grid up to 20 (and where no
            ``ax`` is given).
        ax: Where to draw; for a grid a sequence of as many axes as there are keys.

    Returns:
        The figure and its axes, for a grid a list of them.

    Raises:
        ValueError: If ``kind`` is unknown. A quantity or key that was not logged is one too, and names the nearest.

    Example:
        >>> norms = {"weight_norm/total": ([0, 50, 100], [5.0, 4.1, 3.9]), "weight_norm/head": ([0, 50], [1.0, 1.2])}
        >>> fig, ax = plot_norms(norms)
        >>> [line.get_label() for line in ax.lines], ax.get_ylabel()
        (['total', 'head'], 'weight norm')
    """
    if kind not in ("auto", "lines", "grid", "heatmap"):
        raise ValueError(f"`kind` should be 'auto', 'lines', 'grid' or 'heatmap', got {kind!r}.")
    log = _log(source)
    names = _select(log, quantity, keys)
    if kind == "auto":
        kind = _readable_kind(len(names), own_figure=ax is None)
    if kind == "heatmap" and keys is None:
        names = [name for name in names if not _is_total(name)] or names
    measured = {name: log[f"{quantity}/{name}"] for name in names}
    theory = {name: log[key] for name in names if expected and (key := f"{quantity}/{name}/expected") in log}
    look = _Look(_label(quantity), may_be_log=quantity not in _LINEAR)
    if kind == "heatmap":
        return _plot_heatmap(measured, look, ax)
    return (_plot_lines if kind == "lines" else _plot_grid)(measured, theory, look, ax)


def plot_schedule(
    schedule: ScheduleLike,
    total_steps: int,
    *,
    lr_schedule: Sequence[float] | Callable[[int], float] | Schedule | None = None,
    lr: float | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> tuple[Figure, Panels]:
    """Draw a schedule of the weight decay, and what becomes of it together with the learning rate.

    With a learning rate there are three panels: weight decay, learning rate, and their product, which is the share of a
    weight that a step removes and the number that counts.

    Args:
        schedule: A number, a schedule or a callable that takes a ``Position``.
        total_steps: Optimizer steps of the run, positive.
        lr_schedule: Learning rate of each step: ``total_steps`` numbers, a function of the step, or a schedule.
        lr: Constant learning rate, instead of ``lr_schedule``. With neither, the weight decay is drawn alone, and a
            schedule that follows the learning rate is shown at its peak.
        ax: Where to draw; with a learning rate a sequence of three axes.

    Returns:
        The figure and its axes, with a learning rate a list of three.

    Raises:
        ValueError: If both learning rates are given.

    Example:
        >>> from lightning_regularize.schedules import Cosine
        >>> fig, axes = plot_schedule(Cosine(0.04, 0.4), 100, lr_schedule=lambda step: 1e-3 * (1 - step / 100))
        >>> [ax.get_ylabel() for ax in axes]
        ['weight decay', 'learning rate', 'lr * weight decay']
    """
    if lr is not None and lr_schedule is not None:
        raise ValueError(f"One of `lr` and `lr_schedule` should be given, got both: {lr!r} and {lr_schedule!r}.")
    if isinstance(lr_schedule, Schedule):
        lr_schedule = simulate(lr_schedule, total_steps)
    rate = lr_schedule if lr_schedule is not None else 1.0 if lr is None else lr
    weight_decays = simulate(schedule, total_steps, lr=rate)
    panels = {"weight decay": weight_decays}
    if lr is not None or lr_schedule is not None:
        panels["learning rate"] = lrs = simulate(lambda at: at.lr, total_steps, lr=rate)
        panels["lr * weight decay"] = [lr * weight_decay for lr, weight_decay in zip(lrs, weight_decays, strict=True)]
    fig, axes = _axes(ax, len(panels), columns=1, panel_size=(5.5, 2.6 if len(panels) == 1 else 1.5), sharex=True)
    for panel, color, (label, values) in zip(axes, _COLORS, panels.items(), strict=False):
        panel.plot(range(total_steps), values, color=color, marker="." if total_steps <= 50 else "")
        panel.set(ylabel=label, ylim=(0, 1.08 * max(values) or 1.0))
        panel.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
        _count_steps(panel)
        _tidy(panel)
    axes[-1].set_xlabel("optimizer step")
    fig.align_ylabels(axes)
    return fig, axes if len(axes) > 1 else axes[0]


def plot_histograms(
    weights: nn.Module | Mapping[str, Tensor | Iterable[Tensor]],
    *,
    bins: int = 64,
    log: bool = True,
    ax: Axes | Sequence[Axes] | None = None,
) -> tuple[Figure, Panels]:
    """Draw how the values of weights are distributed.

    A module gets one panel a parameter; of a layer that is pruned or parametrized, one of the weight that it uses. A
    mapping from labels to tensors is laid over each other in one panel on common
    bins, such as ``{"before": before.parameters(), "after": after.parameters()}``, and has one panel a label when it
    has more than 6. Only finite values are drawn; the label says how many were not.

    Args:
        weights: A module, or for each label a tensor or several; real, of any dtype, on any device, not sharded.
        bins: Number of bins between the smallest and the largest value, positive.
        log: Whether the counts are on a logarithmic axis, which shows the tails.
        ax: Where to draw; for several panels a sequence of as many axes.

    Returns:
        The figure and its axes, for several panels a list of them.

    Raises:
        ValueError: If ``bins`` is no positive integer, or there is no value to draw.
        TypeError: If ``weights`` is neither a module nor a mapping.

    Example:
        >>> fig, axes = plot_histograms(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [ax.get_title() for ax in axes]
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    check_positive_integer(bins, "`bins`")
    if not isinstance(weights, (nn.Module, Mapping)):
        raise TypeError(f"`weights` should be a module, or map labels to tensors, got {type(weights).__name__}.")
    named = _used_by(weights) if isinstance(weights, nn.Module) else weights.items()
    values = {name: _values(name, tensors) for name, tensors in named}
    if not any(len(tensor) for tensor in values.values()):
        raise ValueError("`weights` should have at least one value, got none.")
    overlaid = not isinstance(weights, nn.Module) and len(values) <= _MOST_LINES
    groups = [values] if overlaid else [{name: tensor} for name, tensor in values.items()]
    fig, axes = _axes(ax, len(groups), columns=4, panel_size=(5.5, 3.2) if overlaid else (2.4, 1.7))
    for panel, group in zip(axes, groups, strict=True):
        _draw_histograms(panel, group, bins, log)
    _label_panels(fig, axes, "value of a weight", "weights per bin", own_figure=ax is None)
    return fig, axes[0] if overlaid else axes


def _plot_lines(
    measured: Mapping[str, Series], theory: Mapping[str, Series], look: _Look, ax: Axes | Sequence[Axes] | None
) -> tuple[Figure, Axes]:
    fig, (panel,) = _axes(ax, 1, columns=1, panel_size=(6.5, 3.2))
    handles: dict[str, Any] = {}
    for index, (name, series) in enumerate(measured.items()):
        color = _COLORS[index % _MOST_LINES]
        # Shifted, so that the markers of neighboring lines do not hide each other.
        markers = _spread(len(series[1]), shift=index / len(measured))
        marker: dict[str, Any] = {"marker": _MARKERS[index % _MOST_LINES], "markersize": 4, "markevery": markers}
        (handles[name],) = panel.plot(*series, label=name, color=color, linewidth=1.2, **marker)
        if name in theory:
            panel.plot(*theory[name], label=f"{name}/expected", color=color, **_EXPECTED)
    if theory:
        handles["expected"] = panel.plot([], [], label="expected", color="0.3", **_EXPECTED)[0]
    _scale(panel, [*measured.values(), *theory.values()], look)
    panel.set(xlabel="optimizer step", ylabel=look.label)
    _legend(panel, handles, outside=ax is None)
    return fig, panel


def _plot_grid(
    measured: Mapping[str, Series], theory: Mapping[str, Series], look: _Look, ax: Axes | Sequence[Axes] | None
) -> tuple[Figure, list[Axes]]:
    fig, axes = _axes(ax, len(measured), columns=4, panel_size=(2.2, 1.5), sharex=True)
    handles = {}
    for panel, (name, series) in zip(axes, measured.items(), strict=True):
        marker = "." if len(series[1]) == 1 else ""
        (handles["measured"],) = panel.plot(*series, label=name, color=_COLORS[0], linewidth=1.2, marker=marker)
        if name in theory:
            (handles["expected"],) = panel.plot(*theory[name], label=f"{name}/expected", color=_COLORS[1], **_EXPECTED)
        _scale(panel, [series, theory.get(name, series)], look)
        panel.set_title(_wrap(name), fontsize="small", parse_math=False)
    _label_panels(fig, axes, "optimizer step", look.label, own_figure=ax is None)
    if theory and ax is None:
        fig.legend(handles.values(), handles, loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    elif theory:
        _legend(axes[0], handles, outside=False)
    return fig, axes


def _plot_heatmap(measured: Mapping[str, Series], look: _Look, ax: Axes | Sequence[Axes] | None) -> tuple[Figure, Axes]:
    rows = len(measured)
    fig, (panel,) = _axes(ax, 1, columns=1, panel_size=(7.0, min(max(0.17 * rows + 0.9, 2.4), 12.0)))
    steps = sorted({step for steps, _ in measured.values() for step in steps})
    at = [dict(zip(*series, strict=True)) for series in measured.values()]
    colors = [[row.get(step, math.nan) for step in steps] for row in at]
    norm, ticks = _color_scale([value for row in colors for value in row if math.isfinite(value)], look)
    mesh = panel.pcolormesh(_edges(steps), range(rows + 1), colors, norm=norm, cmap="viridis", rasterized=True)
    panel.patch.set(hatch="////", edgecolor="0.7", facecolor="white")  # shows where nothing finite was logged
    every = math.ceil(rows / 64)
    panel.set_yticks([row + 0.5 for row in range(0, rows, every)], list(measured)[::every], parse_math=False)
    panel.tick_params(axis="y", length=0, labelsize="small" if rows <= 24 else "x-small")
    panel.invert_yaxis()  # the first layer on top, as in a listing
    panel.set_xlabel("optimizer step")
    _count_steps(panel)
    bar = fig.colorbar(mesh, ax=panel, label=look.label, pad=0.02, aspect=min(max(12, rows), 40), **ticks)
    bar.ax.yaxis.set_minor_formatter("")
    return fig, panel


def _draw_histograms(ax: Axes, values: Mapping[str, Tensor], bins: int, log: bool) -> None:
    finite = {name: tensor[tensor.isfinite()] for name, tensor in values.items()}
    limits = _limits(torch.cat(list(finite.values())))
    handles = {}
    for index, (name, tensor) in enumerate(finite.items()):
        counts, edges = torch.histogram(tensor, bins, range=limits)
        outline = {"color": _COLORS[index], "linestyle": _DASHES[index], "linewidth": 1.3}
        style: dict[str, Any] = {"fill": True, "color": "0.5"} if len(values) == 1 else outline
        missing = len(values[name]) - len(tensor)
        title = f"{name} ({missing:,} not finite)" if missing else name
        handles[title] = ax.stairs(counts.tolist(), edges.tolist(), label=name, **style)
    if log:
        # Limits first: matplotlib warns when it has to find them and no bin has a value.
        ax.set_ylim(0.7, max(12.0, 1.5 * ax.get_ylim()[1]))  # a bin of one value stands out from an empty one
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter("")
    _tidy(ax)
    if len(values) == 1:
        ax.set_title(_wrap(next(iter(handles))), fontsize="small", parse_math=False)
    else:
        _legend(ax, handles, outside=False)


def _log(source: Source) -> dict[str, Series]:
    # What was logged, for each key: steps and values as numbers.
    if isinstance(source, Mapping):
        return {key: _series(key, *series) for key, series in source.items()}
    path = source if isinstance(source, str | os.PathLike) else getattr(source, "log_dir", None)
    if path is None:
        raise TypeError(
            "`source` should be a path, a logger with a `log_dir` (Lightning's CSVLogger) or a mapping, "
            f"got {type(source).__name__}."
        )
    path = Path(path)
    return _read_csv(path / "metrics.csv" if path.is_dir() else path)


def _read_csv(path: Path) -> dict[str, Series]:
    if not path.is_file():
        raise FileNotFoundError(
            f"`source` should lead to a metrics.csv, got {str(path)!r}, which does not exist. "
            "Lightning's CSVLogger writes it every `flush_logs_every_n_steps` and at the end of a run."
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "step" not in rows[0]:
        raise ValueError(f"{str(path)!r} should have a column 'step' and rows, got {list(*rows[:1])}.")
    columns = sorted((column for column in rows[0] if "/" in column), key=_natural)
    cells = {column: [(row["step"], row[column]) for row in rows if row[column]] for column in columns}
    return {column: _series(column, *zip(*pairs, strict=True)) for column, pairs in cells.items() if pairs}


def _series(key: str, steps: Iterable[Any], values: Iterable[Any]) -> Series:
    series = [float(step) for step in steps], [float(value) for value in values]
    if len(series[0]) != len(series[1]) or not series[0]:
        raise ValueError(
            f"`source[{key!r}]` should have one step for each value and at least one, "
            f"got {len(series[0])} steps and {len(series[1])} values."
        )
    return series


def _select(log: Mapping[str, Series], quantity: str, keys: Sequence[str] | None) -> list[str]:
    # The names that were logged for the quantity and that the keys ask for, in the order of the keys.
    prefix = f"{quantity}/"
    logged = [key.removeprefix(prefix) for key in log if key.startswith(prefix) and not key.endswith("/expected")]
    if not logged:
        quantities = sorted({key.partition("/")[0] for key in log if "/" in key})
        raise ValueError(f"`quantity` should be one that was logged, got {quantity!r}.{_nearest(quantity, quantities)}")
    if keys is None:
        return logged
    if isinstance(keys, str) or not keys:
        raise ValueError(f"`keys` should be a sequence of at least one name, got {keys!r}.")
    selected: dict[str, None] = {}
    for key in keys:
        name = key.removeprefix(prefix)
        matches = [other for other in logged if other == name or fnmatchcase(other, name)]
        if not matches:
            raise ValueError(f"`keys` should name what was logged, got {key!r}.{_nearest(name, logged)}")
        selected |= dict.fromkeys(matches)
    return list(selected)


def _nearest(name: str, names: Sequence[str]) -> str:
    # The end of an error message: the most similar names, or the first ones there are.
    if similar := difflib.get_close_matches(name, names, cutoff=0.5):
        return f" Did you mean {' or '.join(map(repr, similar))}?"
    return f" There are: {', '.join(names[:20]) or 'none'}{', ...' if len(names) > 20 else ''}."


def _is_total(name: str) -> bool:
    return name == "total" or name.endswith(" total")  # with several optimizers "optimizer0 total"


def _readable_kind(count: int, *, own_figure: bool) -> Literal["lines", "grid", "heatmap"]:
    if count <= _MOST_LINES:
        return "lines"
    return "grid" if count <= _MOST_PANELS and own_figure else "heatmap"


def _used_by(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # The weights that layers use, without those that are packed in some way that cannot be told.
    weights = used_weights(parameter_infos(module))
    for weight in without_unknown(weights, functools.partial(warnings.warn, stacklevel=5), "plot_histograms"):
        name, is_float = weight.info.name, weight.info.parameter.is_floating_point()
        for source in weight.recipe.sources.values():
            _check_readable(name, source)
        tensor = weight.piece().tensor
        if is_float or tensor.is_floating_point() or tensor.is_complex():
            yield name, tensor
        else:
            warnings.warn(f"plot_histograms leaves out {name!r}, which is packed in {tensor.dtype}.", stacklevel=3)


def _values(name: str, tensors: Tensor | Iterable[Tensor]) -> Tensor:
    # All values as one vector on the CPU, wide enough for the range of any data type.
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for tensor in tensors:
        _check_readable(name, tensor)
    return torch.cat([tensor.detach().flatten().cpu().double() for tensor in tensors] or [torch.zeros(0).double()])


def _check_readable(name: str, tensor: Tensor) -> None:
    if tensor.is_complex() or tensor.is_meta or is_dtensor(tensor):  # which is read by a collective: a rank would wait
        raise ValueError(f"`weights[{name!r}]` should be real, in memory and whole, got {tensor!r}.")


def _limits(values: Tensor) -> tuple[float, float]:
    # The ends of the bins: the extreme values, or as in numpy half a unit around a single one.
    if not len(values):
        return 0.0, 1.0
    low, high = values.min().item(), values.max().item()
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _edges(steps: Sequence[float]) -> list[float]:
    # The borders half-way between steps, and one outside each end.
    inner = [(left + right) / 2 for left, right in pairwise(steps)] or [steps[0] + 0.5]
    return [2 * steps[0] - inner[0], *inner, *([2 * steps[-1] - inner[-1]] if len(steps) > 1 else [])]


def _spread(count: int, *, shift: float) -> list[int]:
    # Some ten indices, evenly spread.
    stride = max(count / 10, 1.0)
    return sorted({min(int((index + shift) * stride), count - 1) for index in range(10)})


def _color_scale(finite: Sequence[float], look: _Look) -> tuple[Normalize, dict[str, Any]]:
    # The scale and what its color bar needs: logarithmic, but linear where there are zeros or negative values.
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if low <= 0 or not look.may_be_log:
        return Normalize(low, high), {}
    # By itself matplotlib labels powers of ten only, and there may be none in the range.
    if high < 10 * low:
        return LogNorm(low, high), {"ticks": MaxNLocator(6), "format": "%g"}
    return LogNorm(low, high), {"ticks": LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)), "format": "%g"}


def _axes(
    ax: Axes | Sequence[Axes] | None,
    count: int,
    *,
    columns: int,
    panel_size: tuple[float, float],
    sharex: bool = False,
) -> tuple[Figure, list[Axes]]:
    # The axes given, or new ones of so many inches each.
    if ax is None:
        return _new_axes(count, min(columns, count), panel_size, sharex)
    axes = list(getattr(ax, "flat", ax)) if isinstance(ax, Iterable) else [ax]  # `plt.subplots` returns an array
    if len(axes) != count:
        raise ValueError(f"`ax` should be {count} axes, one a panel, got {len(axes)}.")
    return axes[0].figure.figure, axes  # twice, because the first may be a subfigure


def _new_axes(count: int, columns: int, panel_size: tuple[float, float], sharex: bool) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib, which is not installed: pip install "lightning-regularize[plot]".'
        ) from error
    rows = math.ceil(count / columns)
    fig = Figure(figsize=(columns * panel_size[0], rows * panel_size[1] + 0.4), layout="constrained")
    axes = list(fig.subplots(rows, columns, sharex=sharex, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for lowest in axes[max(count - columns, 0) : count]:
        lowest.tick_params(labelbottom=True)  # also where the panel below was unused
    return fig, axes[:count]


def _label_panels(fig: Figure, axes: Sequence[Axes], xlabel: str, ylabel: str, *, own_figure: bool) -> None:
    # Once for a figure of our own, in every panel of somebody else's.
    if own_figure and len(axes) > 1:
        fig.supxlabel(xlabel, fontsize="medium")
        fig.supylabel(ylabel, fontsize="medium")
    else:
        for panel in axes:
            panel.set(xlabel=xlabel, ylabel=ylabel)


def _label(quantity: str) -> str:
    return _LABELS.get(quantity, quantity.replace("_", " "))


def _scale(ax: Axes, series: Iterable[Series], look: _Look) -> None:
    # Logarithmic where a linear axis would flatten the small values.
    finite = [value for _, values in series for value in values if math.isfinite(value)]
    if look.may_be_log and finite and 0 < 30 * min(finite) < max(finite):
        ax.set_yscale("log")
    _count_steps(ax)
    _tidy(ax)


def _count_steps(ax: Axes) -> None:
    # No half steps among the ticks; an axis that somebody else has scaled is theirs.
    if ax.get_xscale() == "linear":
        ax.locator_params(axis="x", integer=True)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _legend(ax: Axes, handles: Mapping[str, Any], *, outside: bool) -> None:
    # Above the panel, not at its side: names of parameters are long.
    where: dict[str, Any] = {"loc": "best", "framealpha": 0.8, "edgecolor": "none"}  # readable on a line as well
    if outside:
        where = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2 if len(handles) > 1 else 1}
        where["frameon"] = False
    legend = ax.legend(list(handles.values()), ["name"] * len(handles), fontsize="small", **where)
    # Written afterwards, because matplotlib leaves out labels that begin with an underscore.
    for text, name in zip(legend.get_texts(), handles, strict=True):
        text.set(text=name, parse_math=False)


def _wrap(name: str, width: int = 30) -> str:
    # A dotted name, broken behind dots into as few lines as it needs, of similar length; "layers.0." stays whole.
    count = math.ceil(len(name) / width)
    lines = [""]
    for part in re.split(r"(?<=\.)(?!\d+\.)", name):
        if lines[-1] and len(lines) < count and len(lines[-1] + part) > len(name) / count:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _natural(name: str) -> list[tuple[int, str]]:
    # A key to sort by that puts layer 10 behind layer 2.
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
