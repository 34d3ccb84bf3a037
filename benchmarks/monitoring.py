"""What does it cost to watch weights, as ratios to a bare training step, a dot product and ``wandb.watch`` on a CPU?

Run: python benchmarks/monitoring.py [--steps 60] [--layers 24] [--wandb]

The model is bound by its parameters (24 x Linear(1024, 1024) + LayerNorm, 25 M of them, batch 16, AdamW), the worst
case for whatever reads each of them. Every other step of one run is watched and logged to a CSV file, so that drifts
of the machine hit both kinds; printed is the median over neighbors of watched over bare.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_regularize import WeightNormMonitor
from lightning_regularize._sharding import Sharding
from lightning_regularize.histograms import histograms
from lightning_regularize.norms import norms

READ_ONLY = ("weight", "rms", "gradient", "sparsity", "effective_decay", "timescale")
CASES = {
    "weight, total": {},
    "weight, by parameter": {"detail": "parameter"},
    "weight and gradient, by parameter": {"quantities": ("weight", "gradient"), "detail": "parameter"},
    "all of one read, by parameter": {"quantities": READ_ONLY, "detail": "parameter"},
    "update, ratio, angle, by parameter": {"quantities": ("update", "ratio", "angle"), "detail": "parameter"},
    "stable rank, by parameter": {"quantities": ("stable_rank",), "detail": "parameter"},
}


class Deep(pl.LightningModule):
    def __init__(self, layers):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(1024, 1024), nn.LayerNorm(1024), nn.GELU()) for _ in range(layers)]
        self.layers = nn.Sequential(*blocks)
        self.register_buffer("x", torch.randn(16, 1024))

    def training_step(self, batch, batch_idx):
        return self.layers(self.x).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Ends(pl.Callback):
    """When each batch ended, after the callbacks before this one."""

    def __init__(self):
        self.times = []

    def on_train_batch_end(self, *_):
        self.times.append(time.perf_counter())


def watched_over_bare(layers, steps, **options):
    """The median ratio of a watched step to the mean of its two neighbors, and the bare step's median in ms."""
    ends = Ends()
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[WeightNormMonitor(every_n_steps=2, **options), ends],
            logger=CSVLogger(directory),
            log_every_n_steps=10_000,
            max_steps=steps,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Deep(layers), range(steps))
    durations = [b - a for a, b in itertools.pairwise(ends.times)]  # the first is of step 1, which is watched
    ratios = [durations[i] / statistics.mean(durations[i - 1 : i + 2 : 2]) for i in range(4, len(durations) - 1, 2)]
    return statistics.median(ratios), 1e3 * statistics.median(durations[3::2])


def interleaved(rounds, **cases):
    """The median time of each case in ms, all run in turn."""
    times = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def compare_norms(layers, rounds):
    parameters = list(Deep(layers).parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    found = interleaved(rounds, dot=lambda: torch.dot(flat, flat), norms=lambda: norms(parameters))
    print(f"norms of {len(parameters)} tensors: x{found['norms'] / found['dot']:.2f} of a dot ({found['dot']:.1f} ms)")


def compare_histograms(layers, rounds):
    import wandb

    run = wandb.init(mode="offline", dir=tempfile.mkdtemp(), settings=wandb.Settings(silent=True))
    module = Deep(layers)
    named = dict(module.named_parameters())
    run.watch(module, log="parameters")

    def watch():
        for name, parameter in named.items():  # what its hook does
            run._torch.log_tensor_stats(parameter.data, f"parameters/{name}")
        run.log({})

    def ours():
        found = histograms(list(named.values()), sharding=Sharding())
        run.log({k: wandb.Histogram(np_histogram=(h.counts, h.edges)) for k, h in zip(named, found, strict=True)})

    found = interleaved(rounds, watch=watch, ours=ours)
    run.finish()
    print(f"histograms: x{found['watch'] / found['ours']:.1f} as fast as wandb.watch ({found['watch']:.0f} ms)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--wandb", action="store_true", help="compare histograms with wandb.watch, offline")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    compare_norms(arguments.layers, arguments.rounds)
    if arguments.wandb:
        compare_histograms(arguments.layers, arguments.rounds)
    for name, options in CASES.items():
        ratio, bare = watched_over_bare(arguments.layers, arguments.steps, **options)
        rare = 1 + (ratio - 1) / 50
        print(f"{name:36s} x{ratio:.3f} of a bare step ({bare:.0f} ms); logged every 50th step x{rare:.4f}", flush=True)


if __name__ == "__main__":
    main()
