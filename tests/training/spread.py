"""One training on one process and on two, DDP or FSDP2, to be compared; units of one layer are cut by FSDP2."""

import functools

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.models import randn
from tests.training.support import make_trainer

STEPS, SAMPLES = 6, 4
STRATEGIES = ("ddp", "fsdp2")


class Share:
    """What one of the processes gets of each batch."""

    def __init__(self, rank, world_size):
        share = SAMPLES // world_size
        self.mine = slice(rank * share, (rank + 1) * share)

    def __len__(self):
        return STEPS

    def __iter__(self):
        for i in range(STEPS):
            yield tuple(randn(SAMPLES, *size, seed=i)[self.mine].double() for size in ((3,), (3, 3)))


class Upsampling(L.LightningModule):
    """The norms of a ConvTranspose run along dim 0, which FSDP2 cuts; those of a Linear do not. 5 rows do not halve."""

    def __init__(self, make_optimizer, rank=0, world_size=1):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.linear, self.up = nn.Linear(3, 10), nn.ConvTranspose1d(5, 3, 2)
        self.double()
        self.make_optimizer, self.rank, self.world_size = make_optimizer, rank, world_size

    def configure_model(self):
        if self.world_size > 1 and isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.linear, self.up, self):
                fully_shard(layer, mesh=mesh)

    def train_dataloader(self):
        return Share(self.rank, self.world_size)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.up(torch.tanh(self.linear(x)).view(-1, 5, 2)) - y).square().mean()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def fit(features, strategy, rank=0, world_size=1):
    """The weights that each feature, ``make_callback, make_optimizer``, leaves, whole and by name."""
    return {name: _fit(*feature, strategy, rank, world_size) for name, feature in features.items()}


def _fit(make_callback, make_optimizer, strategy, rank, world_size):
    module = Upsampling(make_optimizer, rank, world_size)
    how = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(world_size, 1) if strategy == "fsdp2" else None, "auto": "auto"}
    trainer = make_trainer(make_callback(), max_epochs=1, strategy=how[strategy], devices=world_size)
    trainer.fit(module)
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy() for n, p in module.named_parameters()
    }


def results(features):
    """``found(strategy)``: what two processes make of all features, in one start, once for a test module."""

    @functools.cache
    def found(strategy):
        if strategy == "one process":
            return fit(features, "auto")
        first, second = run_distributed(lambda rank, world_size: fit(features, strategy, rank, world_size))
        assert all((first[name][key] == second[name][key]).all() for name in first for key in first[name])
        return first

    found.names = tuple(features)
    return found
