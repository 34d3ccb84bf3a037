"""Learn 200 weights from 20 examples, with an L2 penalty, with weight decay, and under a limit on the norm.

    python examples/high_dimensional_regression.py

The experiment is that of Dive into Deep Learning: the inputs are standard normal, all true weights are 0.01, the noise
is 0.01, and SGD makes 40 steps from random weights.

What to look for, seed 0: without regularization the training loss falls to 0.00005, and the test loss stays at 0.0213.
A weight decay of 3 makes that 0.0122. Three ways to ask for it agree, each as far as it should:

* `L2Penalty(3.0)` adds 3 w to the gradient, and under `WeightDecay(3.0)` SGD does so itself: all weights are the same
  to the last bit, after each epoch. (With Adam they would not be.) Both leave the bias alone.
* `FrobeniusBall(c)` forbids a norm above c, here the one that weight decay ends with. After the 40 steps the norm is
  equal, the test loss nearly so (times 0.97), and so is the direction (cosine 0.985), but the training loss is a sixth:
  neither run has converged. At convergence both have the same weights (to 1e-16), those of scikit-learn's Ridge with
  alpha 60 = 3 x 20 examples: a penalty and a limit are one problem written in two ways, and the limit's Lagrange
  multiplier is the weight decay, 3.000000.

Over the seeds 0 to 49 weight decay lowered the test loss every time, on average from 0.0197 to 0.0112, or to 0.570 of
it (standard deviation 0.059).

Mind what this is: from 20 examples nobody learns 200 weights. With all weights 0 and the mean of the training targets
as the bias the test loss is 0.0108, on seed 0 as on average. What weight decay does in these 40 steps is to forget the
random initial weights, of which 20 examples see only a tenth. So cross-validation, in the second figure, chooses the
strongest that it is offered. For runs from zero to convergence one weight decay is as good as another: the test loss is
0.0103 without and 0.0102 with 3, and over the seeds 0 to 19 their ratio was between 0.97 and 1.03.

References:
    Zhang, Lipton, Li and Smola, Dive into Deep Learning, 2023, the section on weight decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from claims import Claim, be_quiet, conclude, integer, parser_of
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.ticker import LogLocator, NullLocator
from pictures import look, panels, save
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_regularize import L2Penalty, WeightConstraint, WeightDecay
from lightning_regularize.norms import norms
from lightning_regularize.projections import FrobeniusBall

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INPUTS, TRAIN, TEST = 200, 20, 100
STRENGTH = 3.0
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5
NONE, PENALTY, DECAY, LIMIT = "none", f"L2Penalty({STRENGTH})", f"WeightDecay({STRENGTH})", "FrobeniusBall(c)"


class Data(NamedTuple):
    """Inputs, (n, 200), and targets, (n, 1), in float64."""

    inputs: Tensor
    targets: Tensor

    def rows(self, which: slice | np.ndarray) -> Data:
        """Some of the examples."""
        return Data(self.inputs[which], self.targets[which])


def samples(seed: int) -> tuple[Data, Data]:
    """20 examples to learn from and 100 to test with. All 200 weights are 0.01, and the bias is 0.05."""
    random = np.random.default_rng(seed)  # not torch's, from which the initial weights come
    inputs = random.normal(size=(TRAIN + TEST, INPUTS))
    noise = random.normal(scale=0.01, size=(TRAIN + TEST, 1))
    targets = 0.01 * inputs.sum(axis=1, keepdims=True) + 0.05 + noise
    data = Data(torch.from_numpy(inputs), torch.from_numpy(targets))
    return data.rows(slice(TRAIN)), data.rows(slice(TRAIN, None))


def centered(train: Data, test: Data) -> tuple[Data, Data]:
    """With inputs of mean 0 in training, so that the bias has nothing to do with the weights and converges as fast."""
    mean = train.inputs.mean(dim=0)
    return train._replace(inputs=train.inputs - mean), test._replace(inputs=test.inputs - mean)


class Recipe(NamedTuple):
    """How SGD trains, and how large the weights are at the start."""

    title: str
    epochs: int
    passes: int  # through the examples, an epoch
    batch_size: int
    lr: float
    start_std: float
    is_centered: bool

    def batches(self, data: Data) -> DataLoader:
        """In a new order in each pass."""
        dataset = TensorDataset(*data)
        order = RandomSampler(dataset, num_samples=self.passes * len(dataset))
        size = min(self.batch_size, len(dataset))
        return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))


SHORT = Recipe("10 epochs from random weights", 10, 1, batch_size=5, lr=0.01, start_std=0.01, is_centered=False)
LONG = Recipe("from zero to convergence", 1, 300, batch_size=TRAIN, lr=0.05, start_std=0.0, is_centered=True)


class Regression(LightningModule):
    """Learns a linear function by plain SGD, and knows nothing of regularization."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.lr = recipe.lr
        self.linear = nn.Linear(INPUTS, 1)
        nn.init.normal_(self.linear.weight, std=recipe.start_std)
        nn.init.zeros_(self.linear.bias)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Half the mean squared error."""
        return (self.linear(inputs) - targets).square().mean() / 2

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD without momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Curves(Callback):
    """Keeps the losses and the weights as they are before training and after each epoch."""

    def __init__(self, train: Data, test: Data) -> None:
        super().__init__()
        self.data = {"training": train, "test": test}
        self.losses: dict[str, list[float]] = {part: [] for part in self.data}
        self.weights: list[Tensor] = []
        self.bias = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The initial weights."""
        self._note(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the last step has left, and the constraint after it."""
        self._note(pl_module)

    @torch.no_grad()
    def _note(self, model: LightningModule) -> None:
        for part, data in self.data.items():
            self.losses[part].append(model.loss(*data).item())
        self.weights.append(model.linear.weight[0].clone())
        self.bias = model.linear.bias.item()

    def final(self, part: str) -> float:
        """The loss in the end, on the "training" or the "test" examples."""
        return self.losses[part][-1]

    @property
    def norm(self) -> float:
        """Of the final weights."""
        return norms(self.weights[-1:]).item()

    @property
    def multiplier(self) -> float:
        """The strength of the pull towards zero that balances the gradient along the final weights."""
        (inputs, targets), weights = self.data["training"], self.weights[-1]
        errors = inputs @ weights + self.bias - targets[:, 0]
        return -(errors @ (inputs @ weights) / len(inputs) / weights.square().sum()).item()


# -- what is trained ---------------------------------------------------------------------------------------------------


def fit(recipe: Recipe, train: Data, test: Data, callbacks: Sequence[Callback], seed: int) -> Curves:
    """One run, from the same initial weights and through the same batches as all others of this recipe and seed."""
    seed_everything(seed)
    if recipe.is_centered:
        train, test = centered(train, test)
    curves = Curves(train, test)
    trainer = Trainer(
        max_epochs=recipe.epochs,
        accelerator="cpu",
        precision="64-true",  # so that what should be equal is so in many digits
        callbacks=[*callbacks, curves],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(recipe), recipe.batches(train))
    return curves


def three_ways(recipe: Recipe, train: Data, test: Data, seed: int) -> dict[str, Curves]:
    """Without regularization, and in three ways to keep the weights small."""
    added = {NONE: [], PENALTY: [L2Penalty(STRENGTH)], DECAY: [WeightDecay(STRENGTH)]}
    runs = {name: fit(recipe, train, test, callbacks, seed) for name, callbacks in added.items()}
    limit = WeightConstraint(FrobeniusBall(runs[DECAY].norm))
    return runs | {LIMIT: fit(recipe, train, test, [limit], seed)}


def cross_validate(recipe: Recipe, data: Data, seed: int) -> np.ndarray:
    """Loss on each held-out fold, for each weight decay of the grid, (folds, grid)."""
    found = []
    for seen, unseen in KFold(FOLDS, shuffle=True, random_state=seed).split(data.inputs):
        parts = data.rows(seen), data.rows(unseen)
        found.append([fit(recipe, *parts, [WeightDecay(decay)], seed).final("test") for decay in GRID])
    return np.array(found)


def pairs(recipe: Recipe, seeds: Sequence[int]) -> np.ndarray:
    """Final training loss, test loss and half the squared norm, without and with weight decay, (seeds, 2, 3)."""
    found = []
    for seed in seeds:
        runs = [fit(recipe, *samples(seed), callbacks, seed) for callbacks in ([], [WeightDecay(STRENGTH)])]
        found.append([(run.final("training"), run.final("test"), run.norm**2 / 2) for run in runs])
    return np.array(found)


# -- what is shown -----------------------------------------------------------------------------------------------------


def table_of(recipe: Recipe, runs: dict[str, Curves], mean_loss: float) -> Table:
    """A row for each run, as it ended, and one for the mean of the training targets."""
    table = Table(title=f"200 weights, 20 examples: {recipe.title}")
    table.add_column("Regularization")
    for heading in ("Training loss", "Test loss", "Norm of w"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        table.add_row(name, f"{run.final('training'):.1e}", f"{run.final('test'):.4f}", f"{run.norm:.4f}")
    table.add_row("all weights 0", "", f"{mean_loss:.4f}", "0")
    return table


def table_of_pairs(recipe: Recipe, paired: np.ndarray) -> Table:
    """Means over the seeds."""
    table = Table(title=f"{recipe.title}: means, number of seeds: {len(paired)}")
    table.add_column("Regularization")
    for heading in ("Training loss", "Test loss", "Half the squared norm"):
        table.add_column(heading, justify="right")
    for name, (train_loss, test_loss, half_square) in zip((NONE, DECAY), paired.mean(axis=0), strict=True):
        table.add_row(name, f"{train_loss:.1e}", f"{test_loss:.5f}", f"{half_square:.5f}")
    return table


def plot_losses(runs: dict[str, Curves], mean_loss: float) -> Figure:
    """Loss on the training and on the test examples, before training and after each epoch."""
    figure, axes = panels(1, 2)
    for ax, part in zip(axes, ("training", "test"), strict=True):
        for i, (name, run) in enumerate(runs.items()):
            losses = run.losses[part]
            ax.plot(losses, label=name, markevery=(i % 3, 3), markersize=4, linewidth=1.3, **look(i))
        ax.set(xlabel="epoch", ylabel="half the mean squared error", xticks=range(0, len(losses), 2))
        ax.set_title(f"{part} examples", fontsize="medium")
    make_log(axes[0], 1)
    make_log(axes[1], 1, 1.2, 1.5, 2, 2.5, 3, 5, 7)
    lines = axes[0].get_lines()
    constant = axes[1].axhline(mean_loss, color="0.5", linewidth=0.8, label="all weights 0")
    axes[1].legend(handles=[constant], loc="center right", frameon=False, fontsize="small")
    figure.legend(handles=lines, loc="outside upper center", ncols=4, frameon=False, fontsize="small", handlelength=3)
    return figure


def plot_folds(losses: dict[Recipe, np.ndarray]) -> Figure:
    """Loss on each held-out fold over the weight decay, and its mean, a panel for each recipe."""
    figure, axes = panels(1, len(losses), sharey=True)
    for ax, (recipe, folds) in zip(axes, losses.items(), strict=True):
        mean = folds.mean(axis=0)
        best = mean.argmin()
        fold, *_ = ax.plot(GRID, folds.T, color="0.6", linewidth=0.8, label="one fold held out")
        (line,) = ax.plot(GRID, mean, label=f"mean of the {FOLDS} folds", markersize=4, linewidth=1.3, **look(1))
        (star,) = ax.plot(GRID[best], mean[best], "*", color="black", markersize=10, label="the least mean")
        ax.set(xlabel="weight decay", xscale="log")
        ax.set_title(recipe.title, fontsize="medium")
    make_log(axes[0], 1, 1.5, 2, 3, 5, 7)
    axes[0].set_ylabel("half the mean squared error")
    legend = {"loc": "outside upper center", "ncols": 3, "frameon": False, "fontsize": "small"}
    figure.legend(handles=[fold, line, star], **legend)
    return figure


def make_log(ax: Axes, *digits: float) -> None:
    """A logarithmic axis with ticks at these multiples of powers of ten, written as plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=digits))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


# -- the command -------------------------------------------------------------------------------------------------------


def claims_on_ways(short: dict[str, Curves], long: dict[str, Curves]) -> list[Claim]:
    """Where do the three ways agree, and how well?"""
    apart = max(farthest(*pair) for pair in zip(short[PENALTY].weights, short[DECAY].weights, strict=True))
    norm = short[LIMIT].norm / short[DECAY].norm
    loss = short[LIMIT].final("test") / short[DECAY].final("test")
    cosine = torch.cosine_similarity(short[LIMIT].weights[-1], short[DECAY].weights[-1], dim=0).item()
    final_apart, multiplier = farthest(long[LIMIT].weights[-1], long[DECAY].weights[-1]), long[LIMIT].multiplier
    return [
        Claim(
            f"{PENALTY} and {DECAY} give the same weights after each epoch",
            f"a largest difference of {apart:.0e}",
            apart <= 1e-6,
        ),
        Claim(
            f"the norm that {DECAY} has after {SHORT.epochs} epochs, as a limit, gives its test loss to 10 %, and "
            "nearly its direction",
            f"norm x {norm:.6f}, test loss x {loss:.2f}, cosine {cosine:.3f}",
            abs(norm - 1) < 1e-6 and abs(loss - 1) < 0.1 and cosine > 0.95,
        ),
        Claim(
            "at convergence such a limit gives its weights, and the multiplier is the weight decay",
            f"a largest difference of {final_apart:.0e}, multiplier {multiplier:.6f}",
            final_apart < 1e-8 and abs(multiplier - STRENGTH) < 1e-6,
        ),
        claim_on_ridge(long[DECAY]),
    ]


def claim_on_ridge(run: Curves) -> Claim:
    """Its strength is per example, and that of scikit-learn for all of them."""
    inputs, targets = run.data["training"]
    ridge = Ridge(alpha=STRENGTH * TRAIN).fit(inputs, targets[:, 0])
    weights, bias = farthest(run.weights[-1], torch.from_numpy(ridge.coef_)), abs(run.bias - ridge.intercept_)
    return Claim(
        f"these are the weights and the bias of scikit-learn's Ridge({ridge.alpha:g})",
        f"differences of {weights:.0e} and {bias:.0e}",
        max(weights, bias) < 1e-6,
    )


def farthest(first: Tensor, second: Tensor) -> float:
    """The largest difference between two weights that should be equal."""
    return (first - second).abs().max().item()


def claims_on_loss(paired: np.ndarray, chosen: float, test_losses: Sequence[float], long_ratio: float) -> list[Claim]:
    """What is it good for?"""
    ratios = paired[:, 1, 1] / paired[:, 0, 1]
    without, with_chosen = test_losses
    return [
        Claim(
            f"{DECAY} lowers the test loss on every seed, on average to about 0.564 of it",
            f"x {ratios.mean():.3f}, lower on {(ratios < 1).sum()} of {len(ratios)}",
            (ratios < 1).all() and abs(ratios.mean() - 0.564) < 0.2 / len(ratios) ** 0.5,  # one seed is within 0.17
        ),
        Claim(
            "the weight decay that cross-validation chooses lowers it, too",
            f"{chosen:g} is chosen, and the test loss is {with_chosen:.4f} and not {without:.4f}",
            with_chosen < 0.8 * without,
        ),
        Claim(
            f"from zero weights and at convergence {DECAY} changes the test loss by less than 10 %",
            f"x {long_ratio:.3f}",
            abs(long_ratio - 1) < 0.1,
        ),
    ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = parser_of(__doc__, "high_dimensional_regression")
    parser.add_argument("--seeds", type=integer(1, 10_000), help="how many to compare with and without decay, 50")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (2 if options.fast else 50)
    if options.seed + options.seeds > 2**32:
        parser.error(f"{options.seeds} seeds from {options.seed} on go beyond {2**32 - 1}")
    return options


def recipes(options: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """As long as they should be, or much shorter."""
    if not options.fast:
        return SHORT, LONG
    return SHORT._replace(epochs=2, title="2 epochs from random weights"), LONG._replace(passes=5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train in all ways, choose the strength, repeat over the seeds, and judge."""
    options = parse_options(arguments)
    be_quiet()
    short, long = recipes(options)
    train, test = samples(options.seed)
    ways = {recipe: three_ways(recipe, train, test, options.seed) for recipe in (short, long)}
    folds = {recipe: cross_validate(recipe, train, options.seed) for recipe in (short, long)}
    chosen = GRID[folds[short].mean(axis=0).argmin()]
    with_chosen = fit(short, train, test, [WeightDecay(chosen)], options.seed)
    paired = pairs(short, range(options.seed, options.seed + options.seeds))
    mean_loss = (test.targets - train.targets.mean()).square().mean().item() / 2

    console = Console()
    for recipe, runs in ways.items():
        console.print(table_of(recipe, runs, mean_loss))
    console.print(table_of_pairs(short, paired))
    save(plot_losses(ways[short], mean_loss), options.output / "loss.png")
    save(plot_folds(folds), options.output / "cross_validation.png")
    test_losses = [run.final("test") for run in (ways[short][NONE], with_chosen)]
    long_ratio = ways[long][DECAY].final("test") / ways[long][NONE].final("test")
    claims = [*claims_on_ways(*ways.values()), *claims_on_loss(paired, chosen, test_losses, long_ratio)]
    conclude(claims, is_fast=options.fast)


if __name__ == "__main__":
    main()
