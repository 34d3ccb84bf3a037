"""Do two processes, each with its half of every batch, follow a schedule as one with the whole batches?

What other callbacks and strategies do there is in ``test_distributed.py``.
"""

import functools

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import Cosine
from tests.distributed import run_distributed
from tests.training.support import QUIET, Batches, Regression, SaveAfter, adamw, assert_same_weights, train, weights

pytestmark = QUIET

STRATEGIES = pytest.mark.parametrize("name", ["ddp", "fsdp2"])


class Halves(Batches):
    """The part of each batch that belongs to one of two ranks."""

    def __init__(self, rank):
        super().__init__()
        self.batches = [tuple(tensor.chunk(2)[rank] for tensor in batch) for batch in self.batches]


class Sharded(Regression):
    def configure_model(self):
        for layer in (self.hidden, self.norm, self.output):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def strategy(name):
    if name == "ddp":
        return Regression(), DDPStrategy(process_group_backend="gloo")
    return Sharded(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def weight_decay():
    return WeightDecay(Cosine(0.04, 0.4), factors={"output.*": 0.5})


def whole(module):
    """The weights as lists; every rank has to ask."""
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    return {name: tensor.detach().tolist() for name, tensor in full.items()}


def run(rank, world_size, name, options, *callbacks):
    module, how = strategy(name)
    witness = train(module, weight_decay(), *callbacks, data=Halves(rank), strategy=how, devices=2, **options)
    return witness.steps, whole(module)


def assert_equals_one_process(ranks, expected, module):
    for steps, found in ranks:
        assert steps == expected
        found = {name: torch.tensor(weight, dtype=torch.float64) for name, weight in found.items()}
        assert_same_weights(found, weights(module))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=["", "accumulation"])
@STRATEGIES
def test_two_processes_equal_one(name, options):
    expected = train(module := Regression(), weight_decay(), **options).steps
    assert_equals_one_process(run_distributed(run, name, options), expected, module)


@pytest.mark.parametrize("step", [5, 7], ids="after step {}".format)
@STRATEGIES
def test_resumed_equals_one_process_uninterrupted(name, step, tmp_path):
    expected = train(module := Regression(), weight_decay()).steps
    run_distributed(run, name, {}, SaveAfter(tmp_path, step))
    resumed = run_distributed(run, name, {"ckpt_path": tmp_path / f"{step}.ckpt"})
    assert_equals_one_process(resumed, expected[step:], module)


def run_with(rank, world_size, callbacks, ckpt_path=None):
    module, how = strategy("ddp")
    module.make_optimizer = functools.partial(adamw, weight_decay=0.0)
    train(module, *callbacks, data=Halves(rank), strategy=how, devices=2, ckpt_path=ckpt_path)
    return whole(module)


def test_from_a_checkpoint_without_the_callback(tmp_path):
    """Nothing decays, so that the run without the callback is the oracle."""
    expected = run_distributed(run_with, [SaveAfter(tmp_path, 5)])
    assert run_distributed(run_with, [WeightDecay(0.0)], tmp_path / "5.ckpt") == expected
