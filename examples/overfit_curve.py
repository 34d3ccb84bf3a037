"""Fit ten noisy points of a line with a network of 80 000 weights, with and without weight decay.

    python examples/overfit_curve.py

What to look for: in `fits.png`, a panel every 200 steps, the curve without weight decay bends until it passes through
every training point, noise and all; its error on them falls to 7e-8. With a weight decay of 0.01 it cuts the corners:
the error on the training points stays at 0.02, and that on 1000 test points, of which 0.25 is noise that nobody can
foresee, is 0.44 instead of 0.50, a ratio of 0.88 (seed 0). Ten points are few and the decay is mild, so the gain is
small, but it was there for each of the seeds 0 to 19: ratios from 0.87 to 0.96, 0.92 on average. Without the noise of
the test points, as mean squared distance from the true line, the ratios were 0.49 to 0.92, 0.76 on average. All these
are means over the last five panels, because the decayed curve swings a little to the end. More decay would do better
here: `--weight-decay 0.1` had test ratios of 0.59, 0.96, 0.84, 0.77 and 0.58 for the seeds 0 to 4.

In `second_layer.png` the norm of the second layer's weights grows from 8.1 to 8.4 without decay, and shrinks to 2.6
with it. Decay alone would leave 1.1: the loss pulls against it, and keeps what it needs. Biases do not decay.

Histograms of the weights and the gradients of each layer, every 20 steps, are for TensorBoard:

    tensorboard --logdir runs/overfit_curve/tensorboard

Open its address in a browser, then the tab Histograms (or Distributions): `weight_histogram/net.2.weight` is the second
layer, 40 000 weights that gather around zero with weight decay and keep their spread without;
`gradient_histogram/net.2.weight` narrows to nothing without, once the training points are fitted, and not with weight
decay, against which the gradient has to hold to the end.
"""

from __future__ import annotations

import csv
import itertools
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from claims import Claim, be_quiet, conclude, number, parser_of
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from pictures import COLORS, panels, save
from torch import Tensor, nn

from lightning_regularize import WeightDecay, WeightNormMonitor
from lightning_regularize.norms import norms
from lightning_regularize.plots import plot_norms
from lightning_regularize.theory import timescale

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lightning.pytorch.loggers import Logger
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLOPE, NOISE = 1.5, 0.5
TRAIN_POINTS, TEST_POINTS = 10, 1000
LR, MOMENTUM = 0.01, 0.9
LAST = 5  # validations over which errors are averaged: with decay the curve swings a little to the end
WATCHED = "net.2.weight"  # of the second layer
GRID = torch.linspace(-1, 1, 201)[:, None]  # where fitted curves are drawn
LOOKS = ({"color": COLORS[1], "linestyle": "-"}, {"color": COLORS[5], "linestyle": "--"})


class Points(NamedTuple):
    """Places and values, ``(n, 1)`` each."""

    x: Tensor
    y: Tensor


def noisy_line(count: int, *, slope: float, noise: float, generator: torch.Generator) -> Points:
    """Points of ``y = slope * x``, evenly spaced from -1 to 1, with normal noise of this standard deviation."""
    x = torch.linspace(-1, 1, count)[:, None]
    return Points(x, slope * x + noise * torch.randn(x.shape, generator=generator))


class FullBatch:
    """All points in each of an epoch's batches."""

    def __init__(self, points: Points, batches: int = 1) -> None:
        self.points, self.batches = points, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Points]:
        return itertools.repeat(self.points, self.batches)


class Regressor(LightningModule):
    """Learns ``y`` from ``x`` by squared error; it is validated on the training points, then on the test points."""

    def __init__(self, net: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], Any]) -> None:
        super().__init__()
        self.net, self.make_optimizer = net, make_optimizer

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        """The loss as any module reports it: it knows of no penalty."""
        loss = nn.functional.mse_loss(self.net(batch.x), batch.y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Points, batch_idx: int, dataloader_idx: int) -> None:
        """The error in evaluation mode."""
        error = nn.functional.mse_loss(self.net(batch.x), batch.y)
        key = ("train_error", "test_error")[dataloader_idx]
        self.log(key, error, batch_size=len(batch.x), add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        """Whatever it was given."""
        return self.make_optimizer(self.parameters())


class Curves(Callback):
    """Keeps what the network predicts on the grid at each validation, ``{steps made: values}``."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, list[float]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Regressor) -> None:
        """The network is in evaluation mode."""
        self.values[trainer.global_step] = pl_module.net(GRID).flatten().tolist()


class Result(NamedTuple):
    """What a run leaves: fitted curves by step, its log, and the norm of the second layer at the start and the end."""

    label: str
    curves: dict[int, list[float]]
    log: Path
    start_norm: float
    end_norm: float

    def error(self, part: str) -> float:
        """Mean squared error on the "train" or the "test" points."""
        _, values = logged(self.log, f"{part}_error")
        return fmean(values[-LAST:])

    def distance(self) -> float:
        """Mean squared distance from the true line: the test error without the noise of the test points."""
        curves = torch.tensor(list(self.curves.values())[-LAST:])
        return (curves - SLOPE * GRID.flatten()).square().mean().item()


def network() -> nn.Sequential:
    """1-200-200-200-1."""
    return nn.Sequential(
        nn.Linear(1, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 1),
    )


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Without weight decay, which is the callback's."""
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


def train(label: str, callbacks: Sequence[Callback], data: Sequence[Points], options: argparse.Namespace) -> Result:
    """One run, from the same initial weights as the others."""
    seed_everything(options.seed, verbose=False)
    model, curves = Regressor(network(), sgd), Curves()
    start_norm = norm_of_watched(model)
    monitor = WeightNormMonitor(
        quantities=("weight", "gradient"), detail="parameter", histograms=True, every_n_steps=options.log_every
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[*callbacks, monitor, curves],
        logger=fresh_loggers(options.output, label),
        log_every_n_steps=options.log_every,
        val_check_interval=options.draw_every,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, FullBatch(data[0], options.steps), [*map(FullBatch, data)])
    return Result(label, curves.values, Path(trainer.log_dir) / "metrics.csv", start_norm, norm_of_watched(model))


def norm_of_watched(model: LightningModule) -> float:
    """As the monitor measures it."""
    return norms([model.get_parameter(WATCHED)])[0].item()


def fresh_loggers(output: Path, name: str) -> list[Logger]:
    """CSV and TensorBoard: a folder each, in which every run has its own."""
    for kind in ("csv", "tensorboard"):
        shutil.rmtree(output / kind / name, ignore_errors=True)  # of an earlier call
    return [
        CSVLogger(output, name="csv", version=name),
        TensorBoardLogger(output, name="tensorboard", version=name, default_hp_metric=False),
    ]


def logged(path: Path, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of what was logged under a key."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(key)]
    return [float(row["step"]) for row in rows], [float(row[key]) for row in rows]


# -- what is shown -----------------------------------------------------------------------------------------------------


def plot_curves(results: Sequence[Result], data: Sequence[Points]) -> Figure:
    """Both fitted curves over the points, a panel for each validation."""
    steps = list(results[0].curves)
    figure, axes = panels(2, len(steps) // 2, width=7.5, height=3.9, sharex=True, sharey=True)
    for ax, step in zip(axes, steps, strict=True):
        draw_points(ax, data, SLOPE)
        for result, looks in zip(results, LOOKS, strict=True):
            ax.plot(GRID, result.curves[step], linewidth=1.4, label=result.label, **looks)
        ax.set_title(f"{step} steps", fontsize="small")
    figure.supxlabel("x", fontsize="medium")
    figure.supylabel("y", fontsize="medium")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize="small"
    )
    return figure


def draw_points(ax: Axes, data: Sequence[Points], slope: float) -> None:
    """Training and test points, and the line that they are of."""
    train_points, test_points = data
    ax.plot(*(part[::20] for part in test_points), "x", color="0.6", markersize=3, label="test points (1 in 20)")
    ax.axline((0, 0), slope=slope, color="0.4", linewidth=0.8, linestyle=":", label="true line")
    ax.plot(*train_points, "o", color="black", markersize=3.5, label="training points", zorder=3)


def plot_second_layer(results: Sequence[Result], options: argparse.Namespace) -> Figure:
    """The norm of its weights over the steps, beside what decay would leave of them if there were nothing to learn."""
    series = {f"weight_norm/{result.label}": logged(result.log, f"weight_norm/{WATCHED}") for result in results}
    steps, _ = series[f"weight_norm/{results[1].label}"]
    alone = [results[1].start_norm * share_left(step, options.weight_decay) for step in steps]
    figure, ax = plot_norms(series | {"weight_norm/decay with nothing to learn": (steps, alone)})
    ax.set(ylabel=r"norm of the second layer, $\Vert W_2 \Vert_2$", ylim=(0, None))
    return figure


def share_left(step: float, weight_decay: float) -> float:
    """Of a weight without any gradient, after so many steps of SGD."""
    return math.exp(-step / timescale(LR, weight_decay, MOMENTUM))


def claims_of(results: Sequence[Result]) -> list[Claim]:
    """What the docstring says, with a margin that the seeds 0 to 19 left."""
    without, decayed = results
    test, train = ([result.error(part) for result in results] for part in ("test", "train"))
    distances = [result.distance() for result in results]
    return [
        Claim(
            "with weight decay the test error is lower",
            f"{test[1]:.3f} against {test[0]:.3f}, a ratio of {test[1] / test[0]:.2f}",
            test[1] < 0.98 * test[0],
        ),
        Claim(
            "its curve is closer to the true line",
            f"mean squares {distances[1]:.3f} against {distances[0]:.3f}, a ratio of {distances[1] / distances[0]:.2f}",
            distances[1] < 0.95 * distances[0],
        ),
        Claim(
            "without, the error on the training points is less than a quarter of that with weight decay",
            f"{train[0]:.1e} against {train[1]:.1e}",
            train[0] < 0.25 * train[1],
        ),
        Claim(
            "the second layer's weights shrink to less than half with weight decay, and not without",
            f"norms of {decayed.start_norm:.2f} to {decayed.end_norm:.2f}, and to {without.end_norm:.2f}",
            decayed.end_norm < 0.5 * decayed.start_norm and without.end_norm > without.start_norm,
        ),
    ]


# -- the command -------------------------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for, and how often to look."""
    parser = parser_of(__doc__, "overfit_curve")
    parser.add_argument(
        "--weight-decay", type=number(0, 1), default=0.01, metavar="L", help="of the second run, by default 0.01"
    )
    options = parser.parse_args(arguments)
    options.steps, options.draw_every, options.log_every = (20, 2, 1) if options.fast else (2000, 200, 20)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without and with weight decay, and show what came of it."""
    options = parse_options(arguments)
    be_quiet()
    generator = torch.Generator().manual_seed(options.seed)
    data = [noisy_line(count, slope=SLOPE, noise=NOISE, generator=generator) for count in (TRAIN_POINTS, TEST_POINTS)]
    results = [
        train("no weight decay", [], data, options),
        train(f"weight decay {options.weight_decay:g}", [WeightDecay(options.weight_decay)], data, options),
    ]
    save(plot_curves(results, data), options.output / "fits.png")
    save(plot_second_layer(results, options), options.output / "second_layer.png")
    print(f"Histograms: tensorboard --logdir {options.output / 'tensorboard'}")
    conclude(claims_of(results), is_fast=options.fast)


if __name__ == "__main__":
    main()
