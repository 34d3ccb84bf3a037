"""Train on digits with AdamW and its weight decay in several ways, and with Muon for the hidden matrices.

    python examples/muon_and_decay.py

What to look for: each row is trained with five seeds, on 600 images with right labels for 3 epochs, and with 40 % wrong
labels for 20. Muon for the hidden matrices, and AdamW for the rest, learns right labels faster than AdamW alone (0.965
of the test images are right after 3 epochs, and 0.947). It learns wrong labels faster as well, so that with many of
them and many steps it is the worse choice (0.663, and 0.897). There weight decay matters: without it AdamW ends at
0.752. Whether the decay is constant (0.897), falls to 0 (0.868) or follows the learning rate but for the output layer
(AdamC, 0.875), or whether the hidden matrices keep their norm on the hyperball instead (0.879), makes no difference
that is larger than the spread. A timescale of two epochs, 20 steps, is a constant decay of 10 for AdamW's learning rate
of 0.005, and of 1 for Muon's of 0.05.

The example claims a difference only where that of the means is larger than the sum of both standard deviations over the
seeds, and no difference only where it is not.

The strengths come from a coarse scan on the very test images, so the table shows what each can do; it is no contest.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from bias_exclusion import train, training_sets
from claims import Claim, be_quiet, conclude, parser_of
from label_noise import Batches, digits
from lightning.pytorch import Callback, LightningModule, seed_everything
from pictures import look, panels, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from lightning_regularize import ChainedOptimizer, Hyperball, WeightDecay, hidden_matrices
from lightning_regularize.schedules import Cosine, FollowLR, Timescale

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.figure import Figure

LR, MUON_LR, HYPERBALL_LR = 5e-3, 0.05, 0.1
SEEDS = 5
WRONG, RIGHT = "40 % wrong", "right"
EPOCHS = {RIGHT: 3, WRONG: 20}


def adamw(module: nn.Module) -> Optimizer:
    """One group, whose weight decay the callback sets."""
    return AdamW(module.parameters(), lr=LR, weight_decay=0.0)


def muon_and_adamw(module: nn.Module) -> Optimizer:
    """Muon for the hidden matrices, AdamW for the biases, the norms and the output layer."""
    rules = {
        hidden_matrices: partial(Muon, lr=MUON_LR, weight_decay=0.0),
        "*": partial(AdamW, lr=LR, weight_decay=0.0),
    }
    return ChainedOptimizer(module, rules)


def adamw_on_the_hyperball(module: nn.Module) -> Optimizer:
    """AdamW with a rate for the hidden matrices that is an angle: how far a step turns them."""
    rules = {
        hidden_matrices: partial(AdamW, lr=HYPERBALL_LR, weight_decay=0.0),
        "*": partial(AdamW, lr=LR, weight_decay=0.0),
    }
    return ChainedOptimizer(module, rules)


class Run(NamedTuple):
    """What makes the optimizer, and the callbacks."""

    optimizer: Callable[[nn.Module], Optimizer]
    callbacks: Callable[[], list[Callback]]


NONE, CONSTANT, TIMESCALE = "AdamW, no decay", "AdamW, constant", "AdamW, timescale"
COSINE, ADAM_C, HYPERBALL, MUON = "AdamW, cosine to 0", "AdamC", "AdamW, Hyperball", "Muon and AdamW, timescale"
REGULARIZED = (CONSTANT, COSINE, ADAM_C, HYPERBALL)
RUNS = {
    NONE: Run(adamw, lambda: [WeightDecay(0.0)]),
    CONSTANT: Run(adamw, lambda: [WeightDecay(10.0)]),
    COSINE: Run(adamw, lambda: [WeightDecay(Cosine(15.0, 0.0))]),
    ADAM_C: Run(adamw, lambda: [WeightDecay({"head.*": 10.0, "*": FollowLR(10.0)})]),
    TIMESCALE: Run(adamw, lambda: [WeightDecay(Timescale(epochs=2))]),
    HYPERBALL: Run(adamw_on_the_hyperball, lambda: [WeightDecay(0.0), Hyperball(include=(hidden_matrices,))]),
    MUON: Run(muon_and_adamw, lambda: [WeightDecay(Timescale(epochs=2))]),
}


class Classifier(LightningModule):
    """Vectors of 64 numbers, three hidden layers with a LayerNorm behind each, ten classes."""

    def __init__(self, make_optimizer: Callable[[nn.Module], Optimizer], width: int = 128) -> None:
        super().__init__()
        sizes = (64, width, width)
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU()) for size in sizes)
        )
        self.head = nn.Linear(width, 10)
        self.make_optimizer = make_optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes, (n, 10)."""
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy with the labels as they are."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        """One optimizer for Lightning, and a cosine of all its learning rates to 0."""
        optimizer = self.make_optimizer(self)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def accuracy(run: Run, images_and_labels: tuple[Tensor, Tensor], seed: int, epochs: int) -> float:
    """On test images with right labels, after the last epoch."""
    seed_everything(seed, verbose=False)
    model = Classifier(run.optimizer)
    train(model, Batches(*images_and_labels, batch_size=60, seed=seed), run.callbacks(), epochs)
    images, labels = digits(seed).test
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


class Sample(NamedTuple):
    """Accuracies of one run, one for each seed."""

    values: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds."""
        return stdev(self.values)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.spread:.3f}"


Samples = dict[str, dict[str, Sample]]
"""By run, and by labels."""


def train_all(seeds: Sequence[int], epochs: Mapping[str, int]) -> Samples:
    """Each run with each seed, on right labels and on wrong ones."""
    sets = {seed: training_sets(seed) for seed in seeds}
    return {
        name: {
            labels: Sample([accuracy(run, sets[seed][labels], seed, count) for seed in seeds])
            for labels, count in epochs.items()
        }
        for name, run in RUNS.items()
    }


# -- what is shown -----------------------------------------------------------------------------------------------------


def table_of(samples: Samples) -> Table:
    """A row for each run, a column for each training set."""
    table = Table(title="Test accuracy on digits, mean and standard deviation over the seeds")
    table.add_column("Optimizer, weight decay")
    for labels in EPOCHS:
        table.add_column(f"Labels {labels},\n{EPOCHS[labels]} epochs", justify="right")
    for name, found in samples.items():
        table.add_row(name, *map(str, found.values()))
    return table


def plot(samples: Samples) -> Figure:
    """The accuracy of each seed as a point, and the mean of each run as a line."""
    figure, axes = panels(1, 2, sharey=True)
    for ax, labels in zip(axes, EPOCHS, strict=True):
        for i, found in enumerate(each[labels] for each in samples.values()):
            style = look(i)
            ax.plot(found.values, [i] * len(found.values), "o", color=style["color"], markersize=4, alpha=0.6)
            ax.plot([found.mean] * 2, [i - 0.3, i + 0.3], color=style["color"], linewidth=2)
        ax.set(xlabel="test accuracy (fraction)")
        ax.set_title(f"labels {labels}, {EPOCHS[labels]} epochs", fontsize="medium")
    axes[0].set_yticks(range(len(samples)), list(samples))
    axes[0].invert_yaxis()
    return figure


# -- the command -------------------------------------------------------------------------------------------------------


def exceeds_spread(first: Sample, second: Sample) -> bool:
    """Is the difference of the means larger than both standard deviations together?"""
    return abs(first.mean - second.mean) > first.spread + second.spread


def claim(samples: Samples, better: str, worse: str, labels: str) -> Claim:
    """The difference of two runs is larger than their spread."""
    first, second = samples[better][labels], samples[worse][labels]
    return Claim(
        f"labels {labels}, {EPOCHS[labels]} epochs: {better} is right more often than {worse}, by more than the spread",
        f"{first} and {second}, a difference of {first.mean - second.mean:+.3f}",
        first.mean > second.mean and exceeds_spread(first, second),
    )


def claim_of_no_difference(samples: Samples, names: Sequence[str], labels: str) -> Claim:
    """No two of several runs differ by more than their spread."""
    found = [samples[name][labels] for name in names]
    return Claim(
        f"labels {labels}, {EPOCHS[labels]} epochs: no two of {'; '.join(names)} differ by more than the spread",
        "; ".join(map(str, found)),
        not any(exceeds_spread(*pair) for pair in combinations(found, 2)),
    )


def claims_of(samples: Samples) -> list[Claim]:
    """What is shown, in numbers."""
    pairs = [zip(samples[CONSTANT][labels].values, samples[TIMESCALE][labels].values, strict=True) for labels in EPOCHS]
    apart = max(abs(a - b) for pair in pairs for a, b in pair)
    return [
        claim(samples, MUON, CONSTANT, RIGHT),
        claim(samples, MUON, NONE, RIGHT),
        *(claim(samples, name, NONE, WRONG) for name in REGULARIZED),
        claim(samples, CONSTANT, MUON, WRONG),
        claim_of_no_difference(samples, REGULARIZED, WRONG),
        Claim(
            "a timescale of two epochs is a weight decay of 10: all accuracies are the same",
            f"a largest difference of {apart:.0e}",
            apart == 0,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all runs with all seeds, and judge."""
    options = parser_of(__doc__, "muon_and_decay").parse_args(arguments)
    be_quiet()
    seeds = range(options.seed, options.seed + (2 if options.fast else SEEDS))
    samples = train_all(seeds, dict.fromkeys(EPOCHS, 1) if options.fast else EPOCHS)
    Console().print(table_of(samples))
    save(plot(samples), options.output / "accuracy.png")
    conclude(claims_of(samples), is_fast=options.fast)


if __name__ == "__main__":
    main()
