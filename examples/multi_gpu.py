"""Train on several processes, by DDP and by FSDP2, and get the numbers of one process.

    python examples/multi_gpu.py                                                      # two GPUs, or else two CPU cores
    python examples/multi_gpu.py --devices 4 --accelerator gpu --strategy fsdp2

What to look for: the callbacks are not told how many processes there are. Each process gets its share of the same
batches, and under FSDP2 it keeps only its rows of each weight. Decay on a schedule, exact zeros from a proximal L1, a
hard limit on the norm of each unit, and every number that is logged come out as from one process with whole batches.
All is in float64, whose rounding is too small to hide anything: over the seeds 0 to 4 the weights differ by 1e-15 to
5e-15, while the callbacks move them by 0.24 to 0.35. In float32 (without the two `double()`) it is 8e-7 to 3e-6, and a
weight may reach zero a step earlier or later.

The script is started once. Lightning starts it again for every further process, so that all of `main` runs in each of
them: what only the first should do, as to judge and to draw, asks for its rank.

It was run on the CPU only, with 2 to 4 processes (gloo), and never on a GPU.
"""

from __future__ import annotations

import csv
import gc
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from claims import Claim, be_quiet, conclude, integer, parser_of
from label_noise import digits
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from pictures import look, panels, save
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_regularize import L1Penalty, WeightConstraint, WeightDecay, WeightNormMonitor
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Cosine, simulate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from lightning.pytorch.strategies import Strategy
    from matplotlib.figure import Figure

BATCH_SIZE = 60  # images over all processes
LIMIT = 0.5
SCHEDULE = Cosine(0.1, 1.0)
LABELS = {"ddp": "DDP", "fsdp2": "FSDP2"}


def regularization() -> list[Callback]:
    """The same for any number of processes."""
    return [
        WeightDecay(SCHEDULE, factors={"net.5.*": 0.5}),
        L1Penalty(3e-4, method="proximal"),
        WeightConstraint(MaxNorm(LIMIT)),
    ]


def strategy_of(name: str, devices: int) -> Strategy:
    """What the Trainer is given; of Lightning's two kinds of FSDP the new one, which needs to be told what to split."""
    if name == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)


class Classifier(LightningModule):
    """Learns to classify vectors of 64 numbers with AdamW."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.data = TensorDataset(images, labels)
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
        )

    def configure_model(self) -> None:
        """FSDP2 leaves to the module what is sharded, and together with what: here, each layer for itself."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def train_dataloader(self) -> DataLoader:
        """This process's share of the batches."""
        return loader(self.data, self.trainer.world_size, self.trainer.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy; `sync_dist` logs its mean over all processes."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, whose weight decay the callback sets."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loader(data: TensorDataset, processes: int, rank: int) -> DataLoader:
    """Equal shares of the same batches, in a new order each epoch, however many processes there are.

    Lightning would put a DistributedSampler in place by itself, but not for one process, which would see other batches.
    """
    sampler = DistributedSampler(data, num_replicas=processes, rank=rank)
    return DataLoader(data, BATCH_SIZE // processes, sampler=sampler)


class Fit(NamedTuple):
    """What a run leaves: whole weights, the share of them that the process had in its memory, and logs."""

    weights: dict[str, Tensor]
    share: float
    log_dir: Path

    def log(self) -> dict[str, dict[int, float]]:
        """What the first process wrote: `{key: {step: value}}`."""
        with (self.log_dir / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {key: {int(row["step"]): float(row[key]) for row in rows if row[key]} for key in rows[0]}


def train(name: str, options: argparse.Namespace, *, strategy: Strategy | str = "auto", devices: int = 1) -> Fit:
    """One run; every process calls this, the first being the one that was started by hand."""
    seed_everything(options.seed)
    images, labels = digits(options.seed).train
    module = Classifier(images.double(), labels).double()
    monitor = WeightNormMonitor(quantities=("weight", "gradient", "sparsity"), detail="module")
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=devices,
        strategy=strategy,
        callbacks=[*([] if name == "plain" else regularization()), monitor],
        logger=CSVLogger(options.output, name="csv", version=name),
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    numbers = sum(w.numel() for w in weights.values())
    held = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights.values())
    return Fit({name: whole(w).cpu() for name, w in weights.items()}, held / numbers, Path(trainer.log_dir))


def whole(weight: Tensor) -> Tensor:
    """All of a weight of which FSDP2 has left each process a piece; every process has to ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


# -- what is shown -----------------------------------------------------------------------------------------------------


def judge(alone: Fit, plain: Fit, spread: Mapping[str, Fit], processes: int) -> list[Claim]:
    """Is there anything by which one could tell that there were several processes?"""
    moved = distance(plain, alone)
    shares = {LABELS[name]: fit.share for name, fit in spread.items()}
    return [
        *(claim for name, fit in spread.items() for claim in compare(LABELS[name], fit, alone)),
        Claim(
            "a process holds all weights under DDP, and no more than its share under FSDP2",
            ", ".join(f"{label} {share:.0%}" for label, share in shares.items()),
            shares.get("DDP", 1.0) == 1.0 and shares.get("FSDP2", 0.0) < 1.5 / processes,
        ),
        Claim("what the callbacks do to the weights is far more than rounding", f"{moved:.2f}", moved > 0.1),
    ]


def compare(label: str, fit: Fit, alone: Fit) -> list[Claim]:
    """Does this run have the weights and the log of the one process?"""
    apart, logged = distance(fit, alone), max(differences(fit, alone).values())
    zeros, expected_zeros = (torch.cat([w.flatten() == 0 for w in of.weights.values()]) for of in (fit, alone))
    longest = max(w.norm(dim=1).max().item() for w in fit.weights.values() if w.dim() > 1)
    used = list(fit.log()["weight_decay"].values())
    expected = simulate(SCHEDULE, len(used))
    deviation = max(abs(a / b - 1) for a, b in zip(used, expected, strict=True))
    return [
        Claim(f"{label} trains the weights of one process", f"at most {apart:.0e} between them", apart < 1e-9),
        Claim(f"{label} logs the numbers of one process", f"at most {logged:.0e} of one between them", logged < 1e-9),
        Claim(
            f"{label} brings the same weights to exactly zero",
            f"{zeros.sum():,} zeros, {(zeros != expected_zeros).sum()} of them elsewhere or missing",
            torch.equal(zeros, expected_zeros) and zeros.sum().item() > 1000,
        ),
        Claim(f"{label} keeps each unit within {LIMIT}", f"{longest:.6f} at most", abs(longest / LIMIT - 1) < 1e-6),
        Claim(
            f"{label} decays on the schedule",
            f"{used[0]:.2g} to {used[-1]:.2g}, at most {deviation:.0e} of it off",
            deviation < 1e-9,
        ),
    ]


def distance(one: Fit, other: Fit) -> float:
    """The largest difference of two weights."""
    return max((one.weights[name] - weight).abs().max().item() for name, weight in other.weights.items())


def differences(fit: Fit, alone: Fit) -> dict[int, float]:
    """The largest difference of what was logged at each step, as a part of what the one process logged."""
    found, expected = fit.log(), alone.log()
    if found.keys() != expected.keys():
        return {0: math.inf}
    at_step: dict[int, list[float]] = {step: [] for step in expected["step"]}
    for key, values in expected.items():
        for step, value in values.items():
            at_step[step].append(abs(found[key].get(step, math.nan) - value) / (abs(value) or 1.0))
    return {step: max(parts) for step, parts in at_step.items()}


def plot(alone: Fit, plain: Fit, spread: Mapping[str, Fit]) -> Figure:
    """The norm of all weights, one run drawn over the other, and what lies between them."""
    figure, (norms, apart) = panels(1, 2, width=8.0, height=3.2)
    thin = {"linewidth": 1.3, "markersize": 4}
    norms.plot(*series(plain), label="without the callbacks", **thin, **look(3) | {"marker": ""})
    norms.plot(*series(alone), label="one process", color="0.75", linewidth=6)
    for i, (name, fit) in enumerate(spread.items(), start=1):
        style = {"label": LABELS[name], "markevery": (5 * i, 20), **thin, **look(i)}
        norms.plot(*series(fit), **style)
        apart.plot(*zip(*differences(fit, alone).items(), strict=True), **style)
    for dtype, dashes in ((torch.float64, ":"), (torch.float32, "-.")):
        label = f"rounding of {str(dtype).removeprefix('torch.')}"
        apart.axhline(torch.finfo(dtype).eps, color="0.5", linestyle=dashes, linewidth=1, label=label)
    norms.set(xlabel="optimizer step", ylabel=r"norm of all weights, $\Vert w \Vert_2$")
    norms.set_ylim(0, 1.08 * norms.get_ylim()[1])
    apart.set(xlabel="optimizer step", ylabel="largest relative difference\nof what is logged", yscale="log")
    apart.set_ylim(1e-17, 1e-5)
    norms.legend(frameon=False, fontsize="small", loc="lower right")
    apart.legend(frameon=False, fontsize="small", loc="center right")
    return figure


def series(fit: Fit) -> tuple[list[int], list[float]]:
    """The norm of all weights over the steps."""
    logged = fit.log()["weight_norm/total"]
    return list(logged), list(logged.values())


# -- the command -------------------------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = parser_of(__doc__, "multi_gpu")
    parser.add_argument("--strategy", nargs="+", choices=LABELS, default=list(LABELS), help="by default both")
    parser.add_argument("--devices", type=integer(2, BATCH_SIZE), default=2, help="processes, by default 2")
    parser.add_argument(
        "--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="auto: GPUs if there is one a process"
    )
    options = parser.parse_args(arguments)
    if BATCH_SIZE % options.devices:
        parser.error(f"argument --devices: should divide the {BATCH_SIZE} images of a batch, got {options.devices}")
    gpus = torch.cuda.device_count()
    if options.accelerator == "gpu" and gpus < options.devices:
        parser.error(f"argument --accelerator: there are {gpus} GPUs for {options.devices} processes")
    if options.accelerator == "auto":
        options.accelerator = "gpu" if gpus >= options.devices else "cpu"
    options.strategy = list(dict.fromkeys(options.strategy))
    options.epochs = 2 if options.fast else 10
    return options


def leave_group() -> None:
    """Before Python ends: a thread of gloo's that then still holds a tensor aborts the process, now and then."""
    gc.collect()  # the trainers, which hold the group
    torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run in each process; the first is a process of its own before it is one of several."""
    options = parse_options(arguments)
    be_quiet()
    is_first = rank_zero_only.rank == 0
    if is_first:
        shutil.rmtree(options.output / "csv", ignore_errors=True)  # of an earlier run
        alone, plain = train("one", options), train("plain", options)
    spread = {
        name: train(name, options, strategy=strategy_of(name, options.devices), devices=options.devices)
        for name in options.strategy
    }
    leave_group()
    if is_first:
        save(plot(alone, plain, spread), options.output / "multi_gpu.png")
        conclude(judge(alone, plain, spread, options.devices), is_fast=options.fast)


if __name__ == "__main__":
    main()
