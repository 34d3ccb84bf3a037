"""What a callback adds to a training step on a CPU, beside the usual ways, as ratios to a bare Trainer.

Run: python benchmarks/overhead.py [--rounds 12] [--steps 20]

The model is bound by its parameters (12 x Linear(1024, 1024) + LayerNorm, batch 16, AdamW), which is the worst case for
whatever reads or writes each of them. All cases run in turn in every round, in another order each time, so that drifts
of the machine hit all. Printed is the lower quartile of all steps of a case, since other processes only ever add time,
and its ratio to that of the bare step. `--wandb` adds `wandb.watch`.
"""

import argparse
import itertools
import logging
import random
import statistics
import tempfile
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from torch import nn

from lightning_regularize import L1Penalty, WeightDecay, WeightNormMonitor, param_groups
from lightning_regularize.schedules import Cosine

WARM_UP = 4  # steps of a run that are not timed


class Timer(pl.Callback):
    """The duration of each batch after the warm-up, from the end of one to the end of the next."""

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, *_):
        self.ends.append(time.perf_counter())

    def steps(self):
        return [b - a for a, b in itertools.pairwise(self.ends[WARM_UP:])]


class Deep(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(1024, 1024), nn.LayerNorm(1024), nn.GELU()) for _ in range(12)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("x", torch.randn(16, 1024))

    def training_step(self, batch, batch_idx):
        return self.layers(self.x).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class GroupsByHand(Deep):
    """What ``WeightDecay`` spares, without a schedule."""

    def configure_optimizers(self):
        return torch.optim.AdamW(param_groups(self, weight_decay=0.01), lr=1e-4)


class PenaltyInLoss(Deep):
    """The usual loop over ``abs().sum()``."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 1e-5 * sum(p.abs().sum() for p in self.parameters() if p.dim() > 1)


class LoggedGradientNorms(Deep):
    """What Lightning's documentation recommends."""

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, norm_type=2))


class Watched(Deep):
    """``wandb.watch``, every step."""

    def on_fit_start(self):
        import wandb

        self.run = wandb.init(mode="offline", dir=tempfile.mkdtemp(), settings=wandb.Settings(silent=True))
        wandb.watch(self, log="all", log_freq=1)

    def on_train_batch_end(self, *_):
        self.run.log({})

    def on_fit_end(self):
        self.run.finish()


CASES = {
    "bare": (Deep, lambda: []),
    "groups by hand": (GroupsByHand, lambda: []),
    "WeightDecay(Cosine)": (Deep, lambda: [WeightDecay(Cosine(0.01, 0.1))]),
    "L1Penalty": (Deep, lambda: [L1Penalty(1e-5)]),
    "L1Penalty, proximal": (Deep, lambda: [L1Penalty(1e-5, method="proximal")]),
    "abs().sum() in the loss": (PenaltyInLoss, lambda: []),
    "WeightNormMonitor": (Deep, lambda: [WeightNormMonitor()]),
    "WeightNormMonitor, each parameter, each step": (
        Deep,
        lambda: [WeightNormMonitor(detail="parameter", every_n_steps=1)],
    ),
    "Lightning's grad_norm, each step": (LoggedGradientNorms, lambda: []),
}


def step_times(make_module, make_callbacks, steps):
    timer = Timer()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[*make_callbacks(), timer],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=CSVLogger(tempfile.mkdtemp()),
        max_steps=steps + WARM_UP,
    )
    torch.manual_seed(0)
    trainer.fit(make_module(), torch.utils.data.DataLoader(range(steps + WARM_UP)))
    return timer.steps()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--wandb", action="store_true", help="also time wandb.watch(log='all', log_freq=1)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = CASES | ({"wandb.watch(log='all'), each step": (Watched, lambda: [])} if arguments.wandb else {})
    times = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name in random.sample(list(cases), len(cases)):
            times[name] += step_times(*cases[name], arguments.steps)
    quartiles = {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name, value in quartiles.items():
        print(f"{name:46s} {value * 1e3:7.1f} ms   x {value / quartiles['bare']:.3f}")


if __name__ == "__main__":
    main()
