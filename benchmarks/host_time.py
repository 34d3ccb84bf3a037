"""How long Python takes for each callback in a step, on a model of many tiny tensors: what a GPU waits for.

Run: OMP_NUM_THREADS=1 python benchmarks/host_time.py [--layers 75] [--rounds 3]

The time in the callback's own hooks and in those around the optimizer's step is added up, and divided by the time of a
foreach AdamW step on the same tensors. Printed is the smallest of all rounds, since other processes only ever add time.
The monitor is timed on a step that is logged and on one that is not.
"""

import argparse
import functools
import logging
import statistics
import tempfile
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
)
from lightning_regularize._steps.hooks import StepHooks
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Cosine

WARM_UP, STEPS = 10, 50
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
AROUND_STEPS = ("_enter", "_begin", "_show_parts", "_leave")
ALL_BUT_SPECTRA = ("weight", "rms", "gradient", "update", "ratio", "angle", "sparsity", "effective_decay")

CASES = {
    "WeightDecay(Cosine)": lambda: WeightDecay(Cosine(0.04, 0.4)),
    **{
        f"WeightDecay, {method}": functools.partial(WeightDecay, 0.1, method=method)
        for method in ("decoupled", "independent", "coupled", "cautious", "stable")
    },
    "L1Penalty": lambda: L1Penalty(1e-5),
    "L1Penalty, proximal": lambda: L1Penalty(1e-5, method="proximal"),
    "ElasticNetPenalty, proximal": lambda: ElasticNetPenalty(1e-5, 1e-5, method="proximal"),
    "GroupLassoPenalty": lambda: GroupLassoPenalty(1e-5),
    "GroupLassoPenalty, proximal": lambda: GroupLassoPenalty(1e-5, method="proximal"),
    "WeightConstraint(MaxNorm)": lambda: WeightConstraint(MaxNorm(3.0)),
    "ConstrainedDecay": lambda: ConstrainedDecay(),
    "AnchorDecay": lambda: AnchorDecay(0.01),
    "WeightNormMonitor, not logging": lambda: WeightNormMonitor(every_n_steps=1000),
    "WeightNormMonitor, per parameter": lambda: WeightNormMonitor(every_n_steps=1, detail="parameter"),
    "WeightNormMonitor, all but spectra": lambda: WeightNormMonitor(
        every_n_steps=1, detail="parameter", quantities=ALL_BUT_SPECTRA
    ),
}


class Tiny(pl.LightningModule):
    """Layers with four tensors each."""

    def __init__(self, layers):
        super().__init__()
        self.net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(layers)])

    def training_step(self, batch, batch_idx):
        return self.net(torch.ones(4, 8)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.01, foreach=True)


class Stopwatch:
    """Adds up the time in functions that it wraps; one that runs inside another one counts once."""

    def __init__(self):
        self.seconds, self.is_running = 0.0, False

    def wrap(self, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            if self.is_running:
                return function(*args, **kwargs)
            self.is_running, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.is_running = False
                self.seconds += time.perf_counter() - start

        return timed


class Lap(pl.Callback):
    """What the stopwatch has counted by the end of each batch."""

    def __init__(self, stopwatch):
        self.stopwatch, self.laps = stopwatch, []

    def on_train_batch_end(self, *_):
        self.laps.append(self.stopwatch.seconds)


def seconds_of(callback, layers):
    """The median time in a step."""
    stopwatch, originals = Stopwatch(), {name: getattr(StepHooks, name) for name in AROUND_STEPS}
    lap = Lap(stopwatch)
    for name in HOOKS:
        setattr(callback, name, stopwatch.wrap(getattr(callback, name)))
    for name, function in originals.items():
        setattr(StepHooks, name, stopwatch.wrap(function))
    try:
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[callback, lap],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=CSVLogger(tempfile.mkdtemp()),
            log_every_n_steps=10 * STEPS,
            max_steps=WARM_UP + STEPS,
        )
        trainer.fit(Tiny(layers), torch.utils.data.DataLoader(range(WARM_UP + STEPS)))
    finally:
        for name, function in originals.items():
            setattr(StepHooks, name, function)
    return statistics.median(b - a for a, b in zip(lap.laps[WARM_UP:], lap.laps[WARM_UP + 1 :], strict=False))


def seconds_of_adamw(layers):
    """The median time of a step of the optimizer alone."""
    module = Tiny(layers)
    optimizer = module.configure_optimizers()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=75)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    units, found = [], {name: [] for name in CASES}
    for _ in range(arguments.rounds):
        for name, make in CASES.items():
            units.append(seconds_of_adamw(arguments.layers))
            found[name].append(seconds_of(make(), arguments.layers))
    unit = min(units)
    print(f"{4 * arguments.layers} tensors; a foreach AdamW step takes {unit * 1e6:.0f} us; torch {torch.__version__}")
    for name, values in found.items():
        print(f"{name:36s} {min(values) * 1e6:8.0f} us   {min(values) / unit:6.3f} AdamW steps")


if __name__ == "__main__":
    main()
