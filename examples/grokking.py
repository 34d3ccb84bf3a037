"""A network learns addition modulo 31 by heart, and long afterwards, if its weights decay, how to add.

    python examples/grokking.py

What to look for: half of all pairs of numbers are learned within 50 steps, and not one in a hundred of the others comes
out right, fewer than by guessing. Without weight decay that is all that ever happens; the run is given 6,000 steps.
With it the validation accuracy rises, much later, to 0.95, where a run ends, although there is nothing left to learn
on the training pairs. That is grokking, and who stops when the training accuracy is 1, or when the validation accuracy
has stayed at 0 for a few hundred steps, never sees it.

It is the decay that sets the pace. With a weight decay of 0.3, 0.5 and 1 it took, over the seeds 0 to 4, 3,150 to
4,050, 2,100 to 2,800 and 1,250 to 1,850 steps. In timescales of the decay, 1 / (lr * weight decay), that is 9.5 to
12.2, 10.5 to 14.0 and 12.5 to 18.5: not quite a constant, but one can tell from it when not to expect anything. With
0.01, PyTorch's default, ten timescales are 100,000 steps.

What decay changes is the norm of the weights. With it the norm stays below 76, and is 65 to 69 in the end. Without,
it is 576 to 604 after 6,000 steps, for Adam makes steps of the same size from gradients however small. In three seeds
of the five there are moments in which these steps forget even training pairs, the spikes in the figure.

References:
    Power et al., Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets, 2022,
    https://arxiv.org/abs/2201.02177.
"""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from claims import Claim, be_quiet, conclude, parser_of
from label_noise import read_csv
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from pictures import look, panels, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from lightning_regularize import GeneralizationGapMonitor, WeightDecay, WeightNormMonitor
from lightning_regularize.theory import timescale

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

MODULUS = 31
LR = 0.01
WEIGHT_DECAYS = (0.0, 0.3, 0.5, 1.0)
MAX_STEPS, EPOCH_STEPS = 6000, 50  # an epoch of one full batch a step would be mostly Lightning's own work
GROKKED = 0.95  # the validation accuracy at which a run ends


class Adder(LightningModule):
    """Says which number two others add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * MODULUS, 256, bias=False), nn.ReLU(), nn.Linear(256, MODULUS, bias=False)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy; the accuracy is that of the epoch's last step."""
        pairs, sums = batch
        logits = self.net(pairs)
        if self.trainer.is_last_batch:
            self.log("train_accuracy", accuracy(logits, sums), on_step=False, on_epoch=True, batch_size=len(sums))
        return cross_entropy(logits, sums)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The accuracy on the other half of the table of addition."""
        pairs, sums = batch
        self.log("val_accuracy", accuracy(self.net(pairs), sums), batch_size=len(sums))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without weight decay, which is the callback's."""
        return torch.optim.AdamW(self.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of right answers."""
    return (logits.argmax(dim=1) == labels).float().mean()


def halves_of_addition(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """All pairs of numbers, one-hot, (n, 62), and their sums, (n,), at random 480 to learn and 481 others."""
    a, b = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS)).T
    pairs, sums = torch.cat([one_hot(a), one_hot(b)], dim=1).float(), (a + b) % MODULUS
    order = torch.randperm(len(sums), generator=torch.Generator().manual_seed(seed))
    other, learned = order.tensor_split(2)  # the first one is the larger
    return (pairs[learned], sums[learned]), (pairs[other], sums[other])


class Run(NamedTuple):
    """What was logged of a run."""

    weight_decay: float
    rows: list[dict[str, float]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Numbers of steps made, and values."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] + 1 for row in rows], [row[key] for row in rows]

    def last(self, key: str) -> float:
        """The value at the end."""
        return self.series(key)[1][-1]

    def first_step(self, key: str, least: float) -> float:
        """After how many steps a value was first reached; infinite if it never was."""
        return next((step for step, value in zip(*self.series(key), strict=True) if value >= least), math.inf)

    @property
    def learned(self) -> float:
        """The steps after which all training pairs come out right."""
        return self.first_step("train_accuracy", 1.0)

    @property
    def grokked(self) -> float:
        """The steps after which the other pairs do, too."""
        return self.first_step("val_accuracy", GROKKED)

    @property
    def timescales(self) -> float:
        """That took how many timescales of the decay."""
        return self.grokked / self.timescale

    @property
    def timescale(self) -> float:
        """Of the decay, in steps."""
        return timescale(LR, self.weight_decay)


def train(weight_decay: float, options: argparse.Namespace) -> Run:
    """One run, with the same data and initial weights as the others."""
    seed_everything(options.seed, verbose=False)
    folder = options.output / "csv" / f"decay_{weight_decay:g}"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    trainer = Trainer(
        max_steps=200 if options.fast else MAX_STEPS,
        accelerator="cpu",
        callbacks=[
            WeightDecay(weight_decay),
            WeightNormMonitor(),
            GeneralizationGapMonitor("accuracy"),
            EarlyStopping("val_accuracy", mode="max", stopping_threshold=GROKKED, patience=MAX_STEPS),
        ],
        logger=CSVLogger(folder.parent, name=None, version=folder.name),
        log_every_n_steps=EPOCH_STEPS,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    learned, other = halves_of_addition(options.seed)
    trainer.fit(Adder(), DataLoader([learned] * EPOCH_STEPS, batch_size=None), DataLoader([other], batch_size=None))
    return Run(weight_decay, read_csv(folder / "metrics.csv"))


# -- what is shown -----------------------------------------------------------------------------------------------------


def table_of(runs: Sequence[Run]) -> Table:
    """A row for each run."""
    table = Table(title=f"(a + b) mod {MODULUS}, by AdamW with a learning rate of {LR}")
    for heading in (
        "Weight\ndecay",
        "Training pairs\nlearned by step",
        f"{GROKKED:.0%} of the others\nby step",
        "in timescales\nof the decay",
        "Gap at\nthe end",
        "Weight\nnorm",
    ):
        table.add_column(heading, justify="right")
    for run in runs:
        is_grokked = run.grokked < math.inf
        table.add_row(
            f"{run.weight_decay:g}",
            f"{run.learned:g}",
            f"{run.grokked:g}" if is_grokked else "never",
            f"{run.timescales:.1f}" if is_grokked else "",
            f"{run.last('generalization_gap/accuracy'):.3f}",
            f"{run.last('weight_norm/total'):.0f}",
        )
    return table


def plot(runs: Sequence[Run]) -> Figure:
    """Accuracies and weight norm over steps, and the validation accuracy over timescales of the decay."""
    figure, (accuracies, norms, rescaled) = panels(1, 3, width=8.5, height=3.3)
    for index, run in enumerate(runs):
        style = {"markevery": 0.15, "markersize": 4, "linewidth": 1.3, **look(index)}
        steps, values = run.series("val_accuracy")
        accuracies.plot(steps, values, label=f"decay {run.weight_decay:g}", **style)
        accuracies.plot(*run.series("train_accuracy"), color="0.6", linewidth=0.8, zorder=1)
        norms.plot(*run.series("weight_norm/total"), **style)
        if run.weight_decay:
            rescaled.plot([step / run.timescale for step in steps], values, **style)
    accuracies.annotate("training pairs, all runs", (60, 1.02), fontsize="small", color="0.4")
    norms.set_yscale("log")
    norms.set_yticks((50, 100, 200, 500), ("50", "100", "200", "500"))
    norms.minorticks_off()
    for ax, label in ((accuracies, "accuracy"), (norms, "norm of all weights"), (rescaled, "validation accuracy")):
        ax.set(xscale="log", xlabel="optimizer step", ylabel=label)
    rescaled.set_xlabel("step / timescale")
    figure.legend(loc="outside upper center", ncols=len(runs), frameon=False, fontsize="small", handlelength=3)
    return figure


def claims_of(runs: Sequence[Run]) -> list[Claim]:
    """What the docstring says, and whether it was so."""
    free, *decayed = runs
    learned = max(run.learned for run in runs)
    best = max(free.series("val_accuracy")[1])
    grokked = [run.grokked for run in decayed]
    timescales = [run.timescales for run in decayed]
    norms = [run.last("weight_norm/total") for run in decayed]
    return [
        Claim("all learn the training pairs by heart within 200 steps", f"{learned:g} steps", learned <= 200),
        Claim("without decay no more than 10 % of the others come out right", f"{best:.1%} at best", best <= 0.1),
        Claim(
            f"with decay 1, {GROKKED:.0%} of them do within 3,000 steps",
            f"{grokked[-1]:g} of at most {MAX_STEPS:,} steps",
            grokked[-1] <= 3000,
        ),
        Claim(
            "the stronger the decay, the sooner",
            ", ".join(f"{run.grokked:g} steps with {run.weight_decay:g}" for run in decayed),
            all(later > sooner for later, sooner in pairwise(grokked)),
        ),
        Claim(
            "counted in timescales of the decay they take equally long, within a factor of 2",
            ", ".join(f"{run.timescales:.1f} with {run.weight_decay:g}" for run in decayed),
            max(timescales) < 2 * min(timescales),
        ),
        Claim(
            "without decay the weights end more than twice as large",
            f"norms {free.last('weight_norm/total'):.0f} and {', '.join(f'{norm:.0f}' for norm in norms)}",
            free.last("weight_norm/total") > 2 * max(norms),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all runs, and show what came of it."""
    options = parser_of(__doc__, "grokking").parse_args(arguments)
    be_quiet()
    runs = [train(weight_decay, options) for weight_decay in WEIGHT_DECAYS]
    Console().print(table_of(runs))
    save(plot(runs), options.output / "grokking.png")
    conclude(claims_of(runs), is_fast=options.fast)


if __name__ == "__main__":
    main()
