"""Does a run that is saved under one layout and resumed, there or under another, end like an uninterrupted one?"""

import functools
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    L1Penalty,
    RegularizedModule,
    WeightConstraint,
    WeightDecay,
    regularize,
)
from lightning_regularize.projections import FrobeniusBall
from lightning_regularize.schedules import Cosine, Linear
from tests.distributed import run_distributed
from tests.training.matrix import Column, Kept, Network, Share, Training, Weights, array, fsdp1, shard, whole
from tests.training.support import QUIET, make_trainer

pytestmark = QUIET

STEPS, SAVED_AT = 12, 5  # of 4 epochs of 3 batches


class Steps(Share):
    """All batches of a run as one epoch; a checkpoint tells at which to go on."""

    def __init__(self, index, count, dtype):
        super().__init__(index, count, dtype, batches=STEPS)
        self.given = self.first = 0

    def __iter__(self):
        first, self.first = self.first, 0
        for i in range(first, len(self.batches)):
            self.given = i + 1
            yield self.batches[i]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state_dict):
        self.first = state_dict["given"]


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.path)


def fsdp2(sharded):
    return {
        "strategy": ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=sharded
        )
    }


LAYOUTS = {
    "single": Column("", dtype=torch.float32),
    "ddp": Column("", lambda: {"strategy": "ddp"}, data_parallel=2, dtype=torch.float32),
    "fsdp2 sharded": Column("", lambda: fsdp2(True), data_parallel=2, spread=shard, dtype=torch.float32),
    "fsdp2 full": Column("", lambda: fsdp2(False), data_parallel=2, spread=shard, dtype=torch.float32),
    "fsdp1 sharded": Column("", lambda: fsdp1(state_dict_type="sharded"), data_parallel=2, dtype=torch.float32),
    # Its full state dict ends the process in torch itself when parameters are on the CPU (seen in 2.13).
}


def decay():
    return [WeightDecay(Cosine(0.1, 0.9), factors={"output.*": 0.5}), L1Penalty(Linear(0.1, 0.0))]


def stateful():
    ball = WeightConstraint(FrobeniusBall(0.95, relative=True), include=("hidden.weight",))
    constrained = ConstrainedDecay("warm_start", warm_start_steps=3, include=("output.weight",))
    return [WeightDecay(0.0), AnchorDecay(Linear(1.0, 0.1), include=("embed.weight",)), ball, constrained]


def fit(rank, world_size, layout, callbacks, save=None, resume=None):
    layout = LAYOUTS[layout]
    module, weights, logger = Network().build(layout, layout.dtype), Weights(), Kept()
    saves = [] if save is None else [Save(save)]
    trainer = make_trainer(
        *callbacks(), weights, *saves, logger=logger, max_epochs=1, devices=world_size, **layout.options()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and Lightning's, of checkpoints; ours have tests of their own
        trainer.fit(module, Steps(rank, layout.data_parallel, layout.dtype), ckpt_path=resume)
    groups = [sorted(set(group) - {"params", "param_names"}) for group in trainer.optimizers[0].param_groups]
    return weights.found, logger.values, groups


def run(layout, *arguments):
    return run_distributed(fit, layout, *arguments, world_size=LAYOUTS[layout].processes)[0]


@pytest.mark.parametrize(
    ("before", "after", "callbacks"),
    [
        ("ddp", "ddp", decay),
        ("ddp", "single", decay),
        ("single", "ddp", decay),
        ("single", "fsdp2 full", decay),
        ("ddp", "fsdp2 sharded", decay),
        ("ddp", "fsdp1 sharded", decay),
        ("fsdp2 sharded", "fsdp2 sharded", decay),
        ("fsdp2 full", "fsdp2 full", decay),
        ("fsdp2 full", "single", decay),
        ("fsdp1 sharded", "fsdp1 sharded", decay),
        ("ddp", "single", stateful),
        ("fsdp2 sharded", "fsdp2 sharded", stateful),
        ("fsdp2 full", "single", stateful),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_resumed_equals_uninterrupted(before, after, callbacks, tmp_path):
    expected, expected_log, groups = fit(0, 1, "single", callbacks)
    run(before, callbacks, tmp_path / "saved")
    found, log, groups_there = run(after, callbacks, None, tmp_path / "saved")
    for name, weight in expected.items():
        assert found[name] == pytest.approx(weight, rel=0, abs=2e-6), name
    for key, steps in log.items():
        assert min(steps) == SAVED_AT, key
        for step, value in steps.items():
            assert value == pytest.approx(expected_log[key][step], rel=1e-5), key
    assert groups_there == groups


class Alike(L.LightningModule):
    """Two weights whose moments could be taken for each other's."""

    def __init__(self, *, is_sharded):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.encoder, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.is_sharded = is_sharded

    def configure_model(self):
        if self.is_sharded:
            for part in (self.encoder, self.head, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.head(torch.tanh(self.encoder(x)))[:, :2] - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Moments(L.Callback):
    def on_train_start(self, trainer, module):
        states = trainer.optimizers[0].state
        self.found = {name: array(whole(states[p]["exp_avg"])) for name, p in module.named_parameters() if p in states}


def fit_alike(rank, world_size, callbacks, change=lambda module: module, save=None, resume=None):
    layout, moments = LAYOUTS["single" if world_size == 1 else "fsdp2 full"], Moments()
    module = change(Alike(is_sharded=world_size == 2))
    saves = [] if save is None else [Save(save)]
    trainer = make_trainer(*callbacks, moments, *saves, max_epochs=1, devices=world_size, **layout.options())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Steps(rank, layout.data_parallel, layout.dtype), ckpt_path=resume)
    return moments.found


def split():
    return WeightDecay(0.1, factors={"encoder.*": 0.5})


def test_moments_of_alike_weights_are_not_mixed_up(tmp_path):
    fit_alike(0, 1, [split()], save=tmp_path / "saved")
    expected = fit_alike(0, 1, [split()], resume=tmp_path / "saved")
    found = run_distributed(fit_alike, [split()], lambda module: module, None, tmp_path / "saved")[0]
    assert set(found) == set(expected) == {"encoder.weight", "head.weight"}
    for name, moment in expected.items():
        assert found[name] == pytest.approx(moment), name


def test_moments_that_were_mixed_up_are_refused(tmp_path):
    """After `regularize` nobody has numbered them as FSDP2 does."""
    fit_alike(0, 1, [], lambda module: regularize(module, 0.1, factors={"encoder.*": 0.5}), save=tmp_path / "saved")
    fit_alike(0, 1, [split()], resume=tmp_path / "saved")
    with pytest.raises(AssertionError, match="moments are mixed up"):
        run_distributed(fit_alike, [split()], lambda module: module, None, tmp_path / "saved")


class Own(Training, RegularizedModule):
    def __init__(self):
        super().__init__(optimizer=functools.partial(torch.optim.AdamW, lr=0.05), factors={"output.*": 0.5})


def fit_own(rank, world_size, save=None, resume=None):
    layout, weights = LAYOUTS["single" if world_size == 1 else "fsdp2 full"], Weights()
    module = Own().build(layout, layout.dtype)
    saves = [] if save is None else [Save(save)]
    trainer = make_trainer(weights, *saves, max_epochs=1, devices=world_size, **layout.options())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Steps(rank, layout.data_parallel, layout.dtype), ckpt_path=resume)
    return weights.found


def test_a_regularized_module_goes_from_one_process_to_fsdp2(tmp_path):
    expected = fit_own(0, 1, tmp_path / "saved")
    found = run_distributed(fit_own, None, tmp_path / "saved")[0]
    for name, weight in expected.items():
        assert found[name] == pytest.approx(weight, rel=0, abs=2e-6), name


def test_groups_have_no_keys_but_torchs_and_their_names():
    """What is not in a sharded checkpoint, or only there, ends a resume."""
    with_callback, without = (fit(0, 1, "single", callbacks)[2] for callbacks in (decay, list))
    assert with_callback == [sorted({*without[0], "name"})] * len(with_callback)
