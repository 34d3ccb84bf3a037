"""Monitor norms, steps and decay in Weights & Biases, offline and without an account.

    python examples/wandb_monitoring.py
    wandb sync DIR    # the folder that it names, if you have an account: prints the address of the run

An MLP with BatchNorm learns digits of which 40 % are labeled wrongly, in training and validation, while weight decay
rises from 0.3 to 3. `callbacks()` has all there is to see, and the model knows nothing of it. W&B makes a section of
what stands before the slash of a key. Set `WANDB_MODE=online` to send the run while it trains.

What to look for in the workspace, section by section (numbers of seed 0):

- `train_loss` falls from 2.1 to below 0.1, as if all were well.
- `generalization_gap`: 0.01 after 5 epochs, and 0.55 after 20. The network learns wrong labels by heart. Meanwhile its
  accuracy on new ones falls from 0.55 to 0.42, where 0.60 is all that one who knows the truth would reach.
- `weight_norm`: 18.6 at first and 29.8 in the end, although hidden1 and hidden2 shrink to less than a third. The layers
  tell why: the gains of norm2 do not decay and grow from 11 to 27, which gives back part of what the head loses.
- `rms` and `angle` with their `/expected`: weights before a norm end up where theory expects them, and turn by 0.87
  (hidden1) and 1.03 (hidden2) times the expected angle a step. They lag behind the schedule by about a timescale. The
  head has no norm behind it, and is 3 times as large: of such layers theory says nothing.
- `ratio`: 0.002 to 0.004 for all weights together. Far less than 0.001 is likely too low a learning rate, and far more
  too high a one. hidden1 and hidden2 reach 0.02, because decay has made them small.
- `timescale`: over how many steps decay acts, from 1,545 at the full learning rate down to 167. Longer than the run, or
  shorter than an epoch (`timescale_epochs` below 1), is likely a mistake.
- `weight_decay` and `lr-AdamW`: the schedules, as the optimizer had them.
- `gradient_norm` rises from 2 to 10, because smaller weights before a norm have larger gradients.
  `gradient_nonfinite` and `sparsity` stay at 0, the one luckily, and the other because nothing here makes zeros.
- `weight_histogram`, `gradient_histogram`: of each parameter. They are most of the 6 MB that the run takes.

Over the seeds 0 to 4 the gap was 0.53 to 0.57 in the end, hidden1 turned by 0.84 to 0.88 and hidden2 by 1.00 to 1.03
times the expected angle, and they were 0.93 to 0.97 and 0.86 to 0.87 times as large as expected.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from claims import Claim, be_quiet, conclude, parser_of
from label_noise import Batches, digits, read_csv, with_noise
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from pictures import look, panels, save
from torch import Tensor, nn

from lightning_regularize import GeneralizationGapMonitor, RegularizationSummary, WeightDecay, WeightNormMonitor
from lightning_regularize.plots import plot_norms
from lightning_regularize.schedules import Cosine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

HIDDEN = ("hidden1", "hidden2")
"""The layers with a norm behind them, of which theory speaks."""


class Classifier(LightningModule):
    """Learns digits by AdamW, with a BatchNorm behind each hidden layer."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()  # W&B shows them as the run's config
        self.hidden1 = nn.Linear(64, 128, bias=False)
        self.norm1 = nn.BatchNorm1d(128)
        self.hidden2 = nn.Linear(128, 128, bias=False)
        self.norm2 = nn.BatchNorm1d(128)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (n, 10)."""
        features = self.norm1(self.hidden1(images)).relu()
        return self.head(self.norm2(self.hidden2(features)).relu())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, logged each 20 steps, and accuracy, logged each epoch."""
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train_loss", loss)
        self.log_accuracy("train_acc", logits, labels)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        self.log_accuracy("val_acc", self(images), labels)

    def log_accuracy(self, key: str, logits: Tensor, labels: Tensor) -> None:
        """Of an epoch."""
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(key, accuracy, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """AdamW with a linear rise of the learning rate over the first 100 steps."""
        # A second moment of 0.999 remembers 1000 steps, longer than decay acts here: theory would have to wait for it.
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def callbacks() -> list[Callback]:
    """All that this example is about."""
    return [
        WeightDecay(Cosine(0.3, 3.0)),
        RegularizationSummary(),
        LearningRateMonitor(logging_interval="step", log_weight_decay=True),
        GeneralizationGapMonitor("acc"),
        WeightNormMonitor(
            quantities=(
                "weight",
                "rms",
                "gradient",
                "update",
                "ratio",
                "angle",
                "sparsity",
                "effective_decay",
                "timescale",
            ),
            detail="module",
            histograms=True,
            expected=True,
        ),
    ]


def wandb_logger(output: Path, seed: int) -> WandbLogger:
    """Offline and silent, and with all that it writes below one folder, unless the environment says otherwise."""
    import wandb  # takes a second, which a wrong command line should not have to wait for

    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CACHE_DIR", str(output.absolute() / "wandb" / "cache"))
    wandb.setup()  # reads these, which without this call comes after a first message
    return WandbLogger(name=f"seed {seed}", project="regularization", save_dir=output)


class Log(NamedTuple):
    """Where a run was logged to."""

    csv: Path
    wandb: Path


def train(output: Path, epochs: int, seed: int) -> Log:
    """One run, logged to a CSV file and to W&B."""
    seed_everything(seed)
    shutil.rmtree(output / "csv", ignore_errors=True)  # of an earlier run
    csv, wandb = CSVLogger(output, name=None, version="csv"), wandb_logger(output, seed)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks(),
        logger=[csv, wandb],
        log_every_n_steps=20,
        check_val_every_n_epoch=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    (images, labels), (val_images, val_labels) = digits(seed)
    validation = Batches(val_images, with_noise(val_labels, seed + 1), batch_size=len(val_images))
    trainer.fit(Classifier(), Batches(images, labels, batch_size=60, seed=seed), validation)
    folder = Path(wandb.experiment.dir).parent
    wandb.experiment.finish()
    return Log(Path(csv.log_dir) / "metrics.csv", folder)


class Rows(NamedTuple):
    """What a CSVLogger wrote: one row or more for each step on which something was logged."""

    rows: list[dict[str, float]]

    def series(self, key: str) -> dict[int, float]:
        """What was logged under a key, by step."""
        return {int(row["step"]): row[key] for row in self.rows if key in row}

    def over_expected(self, key: str) -> float:
        """What was measured over what was expected, averaged over the last tenth of the steps."""
        measured, expected = self.series(key), self.series(f"{key}/expected")
        last = sorted(measured)[-max(len(measured) // 10, 1) :]
        return sum(measured[step] / expected[step] for step in last) / len(last)


def plot_equilibrium(csv: Path) -> Figure:
    """How large weights are and how far a step turns them, measured and expected."""
    figure, axes = panels(2, 3, height=4.2)
    for quantity, row in (("rms", axes[:3]), ("angle", axes[3:])):
        plot_norms(csv, quantity=quantity, keys=[*HIDDEN, "head"], kind="grid", ax=row)
        row[0].get_legend().remove()  # one for all panels is enough
        for ax in row[1:]:
            ax.set_ylabel("")
    for ax in axes[:3]:
        ax.set_xlabel("")
    figure.legend(
        axes[0].get_lines(),
        ["measured", "expected"],
        loc="outside upper center",
        ncols=2,
        frameon=False,
        fontsize="small",
    )
    return figure


def plot_overview(csv: Path, rows: Rows) -> Figure:
    """What is learned by heart, and how large all layers are meanwhile."""
    figure, (left, right) = panels(1, 2)
    for i, (key, label) in enumerate(
        (("train_acc", "training"), ("val_acc", "validation"), ("generalization_gap/acc", "gap")), start=1
    ):
        series = rows.series(key)
        every = max(len(series) // 5, 1)
        left.plot([*series], [*series.values()], label=label, markevery=every, markersize=4, **look(i))
    left.set(xlabel="optimizer step", ylabel="accuracy (fraction)", ylim=(0, 1.05))
    left.legend(frameon=False, fontsize="small", handlelength=3, loc="lower right")
    plot_norms(csv, kind="heatmap", keys=["hidden1", "norm1", "hidden2", "norm2", "head"], ax=right)
    return figure


def claims_of(rows: Rows, run: Path) -> list[Claim]:
    """What was written, and what it shows."""
    steps, loss_steps = list(rows.series("weight_norm/total")), list(rows.series("train_loss"))
    decays, gaps = ([*rows.series(key).values()] for key in ("lr-AdamW-weight_decay", "generalization_gap/acc"))
    angles, sizes = (
        {part: rows.over_expected(f"{key}/{part}") for part in (*HIDDEN, "head")} for key in ("angle", "rms")
    )
    files = [*run.glob("*.wandb")]  # none if WANDB_MODE is "disabled"
    size = sum(file.stat().st_size for file in files) / 1000
    return [
        Claim(
            "norms stand on the very steps of train_loss",
            f"{len(steps)} and {len(loss_steps)} rows, {len({*steps} ^ {*loss_steps})} of them alone",
            steps == loss_steps,
        ),
        Claim(
            "weight decay went from 0.3 to 3",
            f"{decays[0]:.3f} at first, {decays[-1]:.3f} in the end",
            abs(decays[0] - 0.3) < 0.01 and abs(decays[-1] - 3) < 0.01,
        ),
        Claim(
            "in the end the hidden layers turn as fast as theory expects, to 25 %",
            ", ".join(f"{part} {angles[part]:.2f} times" for part in HIDDEN),
            all(abs(angles[part] - 1) < 0.25 for part in HIDDEN),
        ),
        Claim(
            "and are as large, to 25 %",
            ", ".join(f"{part} {sizes[part]:.2f} times" for part in HIDDEN),
            all(abs(sizes[part] - 1) < 0.25 for part in HIDDEN),
        ),
        Claim(
            "the head, with no norm behind it, is more than twice as large and turns less than half as fast",
            f"{sizes['head']:.2f} and {angles['head']:.2f} times",
            sizes["head"] > 2 and angles["head"] < 0.5,
        ),
        Claim(
            "the generalization gap grows from less than 0.2 to more than 0.45",
            f"{gaps[0]:.3f} at first, {max(gaps):.3f} at most, {gaps[-1]:.3f} in the end",
            gaps[0] < 0.2 and gaps[-1] > 0.45,
        ),
        Claim(
            "all of it, with histograms, is in one file for W&B",
            f"{len(files)} file of {size:,.0f} kB",
            len(files) == 1 and size > 1000,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw, say how to send the run, and judge."""
    options = parser_of(__doc__, "wandb_monitoring").parse_args(arguments)
    be_quiet()
    log = train(options.output, epochs=5 if options.fast else 200, seed=options.seed)
    rows = Rows(read_csv(log.csv))
    save(plot_equilibrium(log.csv), options.output / "equilibrium.png")
    save(plot_overview(log.csv, rows), options.output / "overview.png")
    if any(log.wandb.glob("*.wandb")):
        print(f"To see it in W&B: wandb sync {log.wandb}")
    conclude(claims_of(rows, log.wandb), is_fast=options.fast)


if __name__ == "__main__":
    main()
