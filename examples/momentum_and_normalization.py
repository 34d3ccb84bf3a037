"""What does weight decay do to weights before a normalization, and what does momentum do to weight decay?

    python examples/momentum_and_normalization.py

What to look for, in the first figure: scaling the weights before a batch normalization does not change what a network
computes, so decay cannot make the function smaller there. What it sets is the pace. Updates push the weights out, decay
pulls them in, and where both balance the weights turn by a fixed angle a step. Five runs of an MLP on scikit-learn's
digits have learning rates and weight decays that make for the same angle. They start from weights 4 times as small or
as large, settle at sizes that differ by a factor of 3, use AdamW or SGD; soon all turn alike, and their test accuracies
are within about 0.01 of each other. The dashed lines are not fitted: `lightning_regularize.theory` has them from the
hyperparameters, for AdamW sqrt(lr / (2 decay)), and for the size under SGD from the gradients as well. Over the seeds 0
to 4 the sizes were 0.96 to 1.04 times what is expected, and the angles 0.91 to 1.00 times.

Without decay the weights grow all the time, and their angle shrinks, to a fourth of the others' after 2,667 steps. That
is a schedule of the learning rate that nobody asked for. Here it has the best accuracy, 0.98 against 0.94 to 0.97, for
the other rates are constant and their noise never ends.

The size is free to the last bit: matrices that start 8 times as large, with 8 times the learning rate (SGD: 64 times)
and as much less decay, remain exactly 8 times as large, and all other weights the same, here for 200 steps in float64.

In the second figure: "weight decay" means three things. Nine weights have the losses B/2 w^2 - A w. As the gradient of
a penalty, decay d moves their minima from A / B to A / (B + d), which is ridge regression, whatever the optimizer.
Decoupled it does so with plain SGD. With momentum mu it moves them as a decay of (1 - mu) d would, for momentum makes
each gradient count 1 / (1 - mu) times and the decay once; `method="stable"` puts that right. AdamW, where there is no
noise, does not move them at all up to a size of 1 / d, and lets no weight get larger.

References:
    van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, https://arxiv.org/abs/1706.05350;
    Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212;
    Xie and Li, Implicit Bias of AdamW, ICML 2024, https://arxiv.org/abs/2404.04454.
"""

from __future__ import annotations

import re
import shutil
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from claims import Claim, be_quiet, conclude, parser_of
from label_noise import Batches, read_csv
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from pictures import look, panels, save
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lightning_regularize import DEFAULT_EXCLUDE, WeightDecay, WeightNormMonitor
from lightning_regularize.plots import plot_norms
from lightning_regularize.theory import max_abs_weight, timescale

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from matplotlib.figure import Figure
    from torch.optim import Optimizer

    MakeOptimizer = Callable[[Iterable[Any]], Optimizer]

MOMENTUM = 0.9  # of SGD, and the beta1 of Adam
QUIET = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}

# -- weights before a norm ---------------------------------------------------------------------------------------------

MATRICES = "hidden.0.weight", "hidden.3.weight"
FACTOR = 8  # a power of two, by which multiplication is exact

# The learning rates are those of all but the matrices. With its usual beta2 of 0.999 AdamW remembers the gradients of
# the last 1,000 steps, among them the large ones that weights have while they are small, and settles much later.
ADAMW = partial(torch.optim.AdamW, lr=3e-3, betas=(MOMENTUM, 0.99))
SGD = partial(torch.optim.SGD, lr=0.05, momentum=MOMENTUM)


class Setting(NamedTuple):
    """How the two matrices are trained."""

    optimizer: MakeOptimizer
    lr: float
    weight_decay: float
    start: float = 1.0  # factor on PyTorch's initial weights

    def scaled(self, factor: float, *, power: int) -> Setting:
        """What trains matrices that are larger by a factor in just the same way."""
        share = factor**power
        return self._replace(lr=share * self.lr, weight_decay=self.weight_decay / share, start=factor * self.start)


RUNS = {
    "lr 0.003, decay 1": Setting(ADAMW, 3e-3, 1.0),
    "same, start / 4": Setting(ADAMW, 3e-3, 1.0, start=0.25),
    "same, start x 4": Setting(ADAMW, 3e-3, 1.0, start=4.0),
    "lr 0.01, decay 0.3": Setting(ADAMW, 1e-2, 0.3),
    "SGD, lr 0.3, decay 0.001": Setting(SGD, 0.3, 1e-3),
    "no decay": Setting(ADAMW, 3e-3, 0.0),
}
DECAYED = [name for name, setting in RUNS.items() if setting.weight_decay]
STARTS = DECAYED[:3]
STEPS = round(8 * timescale(lr=3e-3, weight_decay=1.0))  # all that decay have this timescale

# With the power in which the learning rate follows the size of the weights. AdamW's steps have to be larger by the same
# factor; gradients before a norm are smaller by it, so that SGD's rate has to make up for that as well.
SCALABLE = {
    "AdamW": (Setting(partial(ADAMW, eps=1e-30), 3e-3, 1.0), 1),
    "SGD": (Setting(SGD, 0.3, 1e-3), 2),
}


class Classifier(LightningModule):
    """An MLP of which two matrices stand right before a batch normalization."""

    def __init__(self, setting: Setting, *, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.setting = setting
        self.hidden = nn.Sequential(
            nn.Linear(64, 128, bias=False),
            nn.BatchNorm1d(128, eps=norm_eps),
            nn.ReLU(),
            nn.Linear(128, 128, bias=False),
            nn.BatchNorm1d(128, eps=norm_eps),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, 10)
        with torch.no_grad():
            for name in MATRICES:
                self.get_parameter(name).mul_(setting.start)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.hidden(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, a fifth of the labels being drawn anew: theory is about noise, and this noise never ends."""
        images, labels = batch
        is_drawn = torch.rand(labels.shape) < 0.2
        labels = torch.where(is_drawn, torch.randint(10, labels.shape), labels)
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the test images, with their own labels."""
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(dim=1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Optimizer:
        """The matrices have a learning rate of their own, all else has that of the optimizer."""
        matrices = [self.get_parameter(name) for name in MATRICES]
        others = [parameter for name, parameter in self.named_parameters() if name not in MATRICES]
        return self.setting.optimizer([{"params": matrices, "lr": self.setting.lr}, {"params": others}])


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,200 training and 597 test images, (n, 64) from 0 to 1, with their labels; always the same."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = (
        torch.from_numpy(part) for part in train_test_split(images / 16, labels, train_size=1200, random_state=0)
    )
    return (train_images.float(), train_labels), (test_images.float(), test_labels)


def train(
    setting: Setting, seed: int, *, norm_eps: float = 1e-5, monitors: Sequence[Callback] = (), **trainer: Any
) -> Classifier:
    """A run in which the two matrices decay and nothing else does."""
    seed_everything(seed, verbose=False)
    model = Classifier(setting, norm_eps=norm_eps)
    decay = WeightDecay(setting.weight_decay, exclude=(*DEFAULT_EXCLUDE, "head.*"))
    learned, tested = digits()
    Trainer(accelerator="cpu", callbacks=[decay, *monitors], num_sanity_val_steps=0, **QUIET, **trainer).fit(
        model, Batches(*learned, batch_size=32, seed=seed), Batches(*tested, batch_size=len(tested[0]))
    )
    return model


class Log(NamedTuple):
    """What a run has logged."""

    rows: list[dict[str, float]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def quarters(self, key: str) -> list[float]:
        """The mean value in each quarter of the run; two timescales, if it decays."""
        _, values = self.series(key)
        return [fmean(values[len(values) * k // 4 : len(values) * (k + 1) // 4]) for k in range(4)]

    def late(self, key: str) -> float:
        """The mean of the last quarter."""
        return self.quarters(key)[-1]

    def ratio(self, key: str) -> float:
        """Measured over expected, in the last quarter."""
        return self.late(key) / self.late(f"{key}/expected")


def watch(name: str, options: argparse.Namespace) -> Log:
    """One of the runs, and what a monitor sees of its matrices."""
    folder = options.output / "csv" / re.sub(r"\W+", "_", name)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    monitor = WeightNormMonitor(
        quantities=("rms", "angle", "gradient"), include=MATRICES, detail="parameter", expected=True
    )
    train(
        RUNS[name],
        options.seed,
        monitors=[monitor],
        logger=CSVLogger(folder.parent, name=None, version=folder.name),
        max_steps=160 if options.fast else STEPS,
        log_every_n_steps=10,
        check_val_every_n_epoch=1 if options.fast else 5,
    )
    return Log(read_csv(folder / "metrics.csv"))


def difference_when_scaled(name: str, seed: int, *, steps: int) -> float:
    """How far all weights of two runs, one in a larger scale, are from being the same but for that scale."""
    setting, power = SCALABLE[name]
    # Small enough to be lost in rounding: an eps of the usual size has a scale of its own.
    how = {"norm_eps": 1e-30, "precision": "64-true", "logger": False, "max_steps": steps}
    one, other = (
        dict(train(either, seed, **how).named_parameters()) for either in (setting, setting.scaled(FACTOR, power=power))
    )
    factors = {name: FACTOR if name in MATRICES else 1 for name in one}
    return max((other[name] - factor * one[name]).abs().max().item() for name, factor in factors.items())


# -- decay under momentum ----------------------------------------------------------------------------------------------

CURVATURE, DECAY = 2.0, 0.5  # B and d in the formulas
SLOPES = torch.arange(-6.0, 7.5, 1.5, dtype=torch.float64)  # A
BOUND = max_abs_weight(DECAY)
RIDGE, WEAKER, CLIPPED = "A / (B + d)", "A / (B + (1 - mu) d)", "A / B, at most 1 / d"
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    RIDGE: lambda slopes: slopes / (CURVATURE + DECAY),
    WEAKER: lambda slopes: slopes / (CURVATURE + (1 - MOMENTUM) * DECAY),
    CLIPPED: lambda slopes: (slopes / CURVATURE).clamp(-BOUND, BOUND),
}


class Way(NamedTuple):
    """An optimizer, the method of its decay, and the formula of where that leads."""

    optimizer: MakeOptimizer
    method: str
    formula: str


PLAIN, HEAVY = partial(torch.optim.SGD, lr=0.05), partial(torch.optim.SGD, lr=0.05, momentum=MOMENTUM)
# Inside its bound AdamW holds out against decay by gradients that vanish, by a factor of sqrt(beta2) a step: from 1 to
# 1e-5 takes 23,000 steps at the usual 0.999, and 220 here.
ADAM, ADAMW_QUICK = (partial(make, lr=0.05, betas=(MOMENTUM, 0.9)) for make in (torch.optim.Adam, torch.optim.AdamW))
WAYS = {
    "SGD coupled": Way(PLAIN, "coupled", RIDGE),
    "SGD decoupled": Way(PLAIN, "decoupled", RIDGE),
    "momentum coupled": Way(HEAVY, "coupled", RIDGE),
    "momentum stable": Way(HEAVY, "stable", RIDGE),
    "Adam coupled": Way(ADAM, "coupled", RIDGE),
    "momentum decoupled": Way(HEAVY, "decoupled", WEAKER),
    "AdamW": Way(ADAMW_QUICK, "optimizer", CLIPPED),
}


class Parabolas(LightningModule):
    """Nine weights, each with a loss of its own, B/2 w^2 - A w."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.linear = nn.Linear(len(SLOPES), 1, bias=False, dtype=torch.float64)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """The batch is a mere number."""
        weight = self.linear.weight
        return (CURVATURE / 2 * weight**2 - SLOPES * weight).sum()

    def configure_optimizers(self) -> Any:
        """With a learning rate that ends at 0, for Adam does not come to rest by itself."""
        optimizer = self.optimizer(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def minimize(way: Way, seed: int, *, steps: int) -> Tensor:
    """Where the nine weights end, float64."""
    seed_everything(seed, verbose=False)
    model, decay = Parabolas(way.optimizer), WeightDecay(DECAY, method=way.method)
    trainer = Trainer(accelerator="cpu", precision="64-true", max_epochs=1, callbacks=[decay], logger=False, **QUIET)
    trainer.fit(model, range(steps))
    return model.linear.weight.detach().flatten()


def expected(way: Way) -> Tensor:
    """Where the nine weights should end."""
    return FORMULAS[way.formula](SLOPES)


def worst_error(name: str, found: Tensor) -> float:
    """Of the nine weights."""
    return (found - expected(WAYS[name])).abs().max().item()


# -- what is shown -----------------------------------------------------------------------------------------------------


def table_of_runs(logs: Mapping[str, Log]) -> Table:
    """A row for each run, of its last quarter."""
    table = Table(title="The second matrix before a norm: measured (expected)")
    for heading in ("Run", "RMS", "angle a step", "test accuracy"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, log in logs.items():
        keys = [f"{quantity}/{MATRICES[1]}" for quantity in ("rms", "angle")]
        beside = (f" ({log.late(f'{key}/expected'):.4f})" if name in DECAYED else "" for key in keys)
        cells = (f"{log.late(key):.4f}{expected}" for key, expected in zip(keys, beside, strict=True))
        table.add_row(name, *cells, f"{log.late('test_accuracy'):.3f}")
    return table


def table_of_ways(found: Mapping[str, Tensor]) -> Table:
    """A row for each optimizer and method."""
    table = Table(title=f"Minimum of B/2 w^2 - A w, B = {CURVATURE:g}, with decay d = {DECAY}")
    for heading in ("Optimizer and\nmethod", "\nFormula", "\nA = 3", "by the\nformula", "worst\nof nine"):
        table.add_column(heading, justify="right" if len(table.columns) > 1 else "left")
    shown = SLOPES.tolist().index(3.0)
    for name, weights in found.items():
        numbers = f"{weights[shown]:.6f}", f"{expected(WAYS[name])[shown]:.6f}", f"{worst_error(name, weights):.0e}"
        table.add_row(name, WAYS[name].formula, *numbers)
    return table


def plot_runs(logs: Mapping[str, Log]) -> Figure:
    """RMS and angle of the second matrix over the steps of each run."""
    figure, axes = panels(2, 1, height=5.4, sharex=True)
    for ax, quantity in zip(axes, ("rms", "angle"), strict=True):
        plot_norms(series_of(logs, quantity), quantity=quantity, kind="lines", ax=ax)
        ax.set_ylim(0, None)
        legend = ax.get_legend()
        legend.remove()
    axes[0].set_xlabel("")
    labels = [text.get_text() for text in legend.get_texts()]
    figure.legend(legend.legend_handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def series_of(logs: Mapping[str, Log], quantity: str) -> dict[str, tuple[list[float], list[float]]]:
    """Of the second matrix in all runs, measured and expected; means over 50 steps, for single steps are noisy."""
    found = {}
    for name, log in logs.items():
        for end in ("", "/expected") if name in DECAYED else ("",):
            steps, values = log.series(f"{quantity}/{MATRICES[1]}{end}")
            found[f"{quantity}/{name}{end}"] = means(steps), means(values)
    return found


def means(values: Sequence[float], size: int = 5) -> list[float]:
    """Of so many values in a row."""
    return [fmean(values[start : start + size]) for start in range(0, len(values), size)]


def plot_ways(found: Mapping[str, Tensor]) -> Figure:
    """By how much decay makes each minimum smaller: formulas as lines, what was measured as markers."""
    figure, (ax,) = panels(1, 1, height=4.0)
    slopes = torch.linspace(SLOPES[0].item(), SLOPES[-1].item(), 201)
    for index, (formula, function) in enumerate(FORMULAS.items(), start=1):
        style = {**look(index), "markerfacecolor": "none", "markersize": 5 + index}
        names = [name for name in found if WAYS[name].formula == formula]
        ax.plot([], [], label=f"{formula}: {', '.join(names)}", **style)
        ax.plot(slopes / CURVATURE, slopes / CURVATURE - function(slopes), **style | {"marker": ""})
        for name in names:
            ax.plot(SLOPES / CURVATURE, SLOPES / CURVATURE - found[name], **style | {"linestyle": ""})
    ax.set(xlabel="weight without decay, A / B", ylabel="what decay takes from it")
    figure.legend(loc="outside upper center", frameon=False, fontsize="small", handlelength=3)
    return figure


def claims_of(logs: Mapping[str, Log], differences: Mapping[str, float], found: Mapping[str, Tensor]) -> list[Claim]:
    """What the docstring says, and whether it was so."""
    sizes = [logs[name].ratio(f"rms/{matrix}") for name in DECAYED for matrix in MATRICES]
    angles = [logs[name].ratio(f"angle/{matrix}") for name in DECAYED for matrix in MATRICES]
    agreements = [spread([logs[name].late(f"rms/{matrix}") for name in STARTS]) for matrix in MATRICES]
    growths = [logs["no decay"].quarters(f"rms/{matrix}") for matrix in MATRICES]
    slower = [logs["no decay"].late(f"angle/{matrix}") / logs[STARTS[0]].late(f"angle/{matrix}") for matrix in MATRICES]
    accuracies = [logs[name].late("test_accuracy") for name in DECAYED]
    errors = [worst_error(name, weights) for name, weights in found.items()]
    return [
        Claim(
            "under weight decay, matrices before a norm end within 15 % of the expected RMS",
            f"ratios from {min(sizes):.2f} to {max(sizes):.2f}",
            min(sizes) > 0.85 and max(sizes) < 1.15,
        ),
        Claim(
            "and turn within 15 % of the expected angle a step",
            f"ratios from {min(angles):.2f} to {max(angles):.2f}",
            min(angles) > 0.85 and max(angles) < 1.15,
        ),
        Claim(
            "starts 16 times apart end within 5 % of each other",
            f"{max(agreements):.1%}",
            max(agreements) < 0.05,
        ),
        Claim(
            "without decay they grow all the time, and in the end turn less than a third as far a step",
            f"RMS {' -> '.join(f'{value:.3f}' for value in growths[1])}, {max(slower):.2f} as far",
            all(sorted(growth) == growth for growth in growths) and max(slower) < 1 / 3,
        ),
        Claim(
            "turning alike, they are alike in test accuracy to 0.03",
            f"{min(accuracies):.3f} to {max(accuracies):.3f}",
            max(accuracies) - min(accuracies) < 0.03,
        ),
        Claim(
            f"matrices {FACTOR} times as large, with lr and decay to match, stay exactly {FACTOR} times as large",
            ", ".join(f"{name} off by {difference:g}" for name, difference in differences.items()),
            not any(differences.values()),
        ),
        Claim(
            f"{len(found)} ways to decay lead where their formulas say, to 0.0001",
            f"{max(errors):.0e} at worst",
            max(errors) < 1e-4,
        ),
    ]


def spread(values: Sequence[float]) -> float:
    """By which share the largest exceeds the smallest."""
    return max(values) / min(values) - 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all runs, and show what came of it."""
    options = parser_of(__doc__, "momentum_and_normalization").parse_args(arguments)
    be_quiet()
    logs = {name: watch(name, options) for name in RUNS}
    steps = 20 if options.fast else 200
    differences = {name: difference_when_scaled(name, options.seed, steps=steps) for name in SCALABLE}
    found = {name: minimize(way, options.seed, steps=50 if options.fast else 1500) for name, way in WAYS.items()}
    console = Console()
    console.print(table_of_runs(logs), table_of_ways(found))
    save(plot_runs(logs), options.output / "equilibrium.png")
    save(plot_ways(found), options.output / "minima.png")
    conclude(claims_of(logs, differences, found), is_fast=options.fast)


if __name__ == "__main__":
    main()
