"""Does a run that is saved under one layout and resumed, there or under another, end like an uninterrupted one?"""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

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


class Stop(L.Callback):
    """Ends a run that is for its checkpoint only."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == SAVED_AT


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
    trainer = train(rank, world_size, layout, module, [*callbacks(), weights], save, resume, logger=logger)
    groups = [sorted(set(group) - {"params", "param_names"}) for group in trainer.optimizers[0].param_groups]
    return weights.found, logger.values, groups


def train(rank, world_size, layout, module, callbacks, save=None, resume=None, **options):
    saves = [] if save is None else [Save(save), Stop()]
    trainer = make_trainer(
        *callbacks, *saves, max_epochs=1, devices=world_size, **{**layout.options(), "logger": False, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and Lightning's, of checkpoints; ours have tests of their own
        trainer.fit(module, Steps(rank, layout.data_parallel, layout.dtype), ckpt_path=resume)
    return trainer


def run(function, layout, *arguments):
    """What the first of the processes returns."""
    return run_distributed(function, layout, *arguments, world_size=LAYOUTS[layout].processes)[0]


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory):
    """Where a function saves under a layout, once for all tests that resume from there."""

    @functools.cache
    def path(function, layout, *arguments):
        run(function, layout, *arguments, found := tmp_path_factory.mktemp("saved") / "saved")
        return found

    return path


@functools.cache
def in_one_process(callbacks):
    return fit(0, 1, "single", callbacks)


@pytest.mark.parametrize(
    ("before", "after", "callbacks"),
    [
        ("ddp", "ddp", decay),
        ("ddp", "single", decay),
        ("single", "ddp", decay),
        ("single", "fsdp2 full", decay),
        ("single", "fsdp2 sharded", decay),
        ("ddp", "fsdp2 full", decay),
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
def test_resumed_equals_uninterrupted(before, after, callbacks, saved_by):
    expected, expected_log, groups = in_one_process(callbacks)
    found, log, groups_there = run(fit, after, callbacks, None, saved_by(fit, before, callbacks))
    for name, weight in expected.items():
        assert found[name] == pytest.approx(weight, rel=0, abs=2e-6), name
    for key, steps in log.items():
        assert min(steps) == SAVED_AT, key
        for step, value in steps.items():
            assert value == pytest.approx(expected_log[key][step], rel=1e-5, abs=0), key
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


def fit_alike(rank, world_size, layout, callbacks, change=lambda module: module, save=None, resume=None):
    layout, moments, weights = LAYOUTS[layout], Moments(), Weights()
    module = change(Alike(is_sharded=layout.spread is not None))
    train(rank, world_size, layout, module, [*callbacks, moments, weights], save, resume)
    return moments.found, weights.found


# What the run before has and the run after has, and how much the weights decay then.


class Rules(NamedTuple):
    callbacks: Callable[[], list] = list
    change: Callable[[Alike], Alike] = lambda module: module
    decays: dict = {}  # nothing is ever written to it

    def fit(self, rank, world_size, layout, save=None, resume=None):
        return fit_alike(rank, world_size, layout, self.callbacks(), self.change, save, resume)


def own(module):
    return regularize(module, 0.9, factors={"encoder.*": 0.5})


RULES = {
    "without us": Rules(decays={"encoder.weight": 0.01, "head.weight": 0.01}),  # AdamW's default
    "the optimizer's decay": Rules(lambda: [WeightDecay(0.01)], decays={"encoder.weight": 0.01, "head.weight": 0.01}),
    "factor": Rules(
        lambda: [WeightDecay(0.9, factors={"encoder.*": 0.5})], decays={"encoder.weight": 0.45, "head.weight": 0.9}
    ),
    "exclude": Rules(
        lambda: [WeightDecay(0.9, exclude=("head.*",))], decays={"encoder.weight": 0.9, "head.weight": 0.0}
    ),
    "decoupled": Rules(
        lambda: [WeightDecay(0.9, method="decoupled")], decays={"encoder.weight": 0.9, "head.weight": 0.9}
    ),
    "regularize": Rules(change=own, decays={"encoder.weight": 0.45, "head.weight": 0.9}),
}
CHANGES = [
    ("factor", "exclude"),
    ("exclude", "factor"),
    ("factor", "decoupled"),
    ("without us", "factor"),
    ("the optimizer's decay", "without us"),
    ("regularize", "exclude"),
    ("without us", "regularize"),
]


class ByHand(Alike):
    """Each weight in a group of its own, whose weight decay is changed in mid-run."""

    def __init__(self, before, after):
        super().__init__(is_sharded=False)
        self.before, self.after = before, after

    def configure_optimizers(self):
        groups = [{"params": [p], "weight_decay": self.before[name]} for name, p in self.named_parameters()]
        return torch.optim.AdamW(groups, lr=0.05)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == SAVED_AT:
            for (name, _), group in zip(self.named_parameters(), self.optimizers().param_groups, strict=True):
                group["weight_decay"] = self.after[name]


@functools.cache
def uninterrupted(before, after):
    weights = Weights()
    train(0, 1, LAYOUTS["single"], ByHand(RULES[before].decays, RULES[after].decays), [weights])
    return weights.found


def save_all(rank, world_size, layout, folder):
    """One run for each of the rules, all in one start of the processes."""
    folder.mkdir(exist_ok=True)
    for name in dict.fromkeys(before for before, _ in CHANGES):
        RULES[name].fit(rank, world_size, layout, save=folder / name)


def resume_all(rank, world_size, layout, folder):
    return {
        (before, after): RULES[after].fit(rank, world_size, layout, resume=folder / before)[1]
        for before, after in CHANGES
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single", "single"),
        ("ddp", "ddp"),
        ("single", "fsdp2 full"),
        ("ddp", "fsdp2 sharded"),
        ("fsdp2 sharded", "fsdp2 sharded"),
        ("fsdp2 full", "single"),
        ("ddp", "fsdp1 sharded"),
        ("fsdp1 sharded", "fsdp1 sharded"),
    ],
)
def test_a_run_goes_on_under_other_rules_without_us_and_after_a_run_without_us(before, after, saved_by):
    found = run(resume_all, after, saved_by(save_all, before))
    for change in CHANGES:
        for name, weight in uninterrupted(*change).items():
            assert found[change][name] == pytest.approx(weight, rel=0, abs=2e-6), (*change, name)


def test_the_changes_of_rules_are_seen_in_the_weights():
    ends = [uninterrupted(*change)["encoder.weight"] for change in [*CHANGES, ("without us", "without us")]]
    apart = [abs(a - b).max() for a, b in itertools.combinations(ends, 2)]
    assert sorted(apart)[:3] == pytest.approx([0.0, 0.0, 0.0], rel=0, abs=1e-9)  # pairs of rules that are equal
    assert sorted(apart)[3] > 1e-3


@pytest.mark.parametrize("before", ["factor", "regularize", "without us"])
@pytest.mark.parametrize("after", ["fsdp2 full", "fsdp2 sharded"])
def test_each_weight_keeps_its_own_moments(before, after, saved_by):
    saved = saved_by(save_all, "single") / before
    expected, _ = RULES["exclude"].fit(0, 1, "single", resume=saved)
    found = run(RULES["exclude"].fit, after, None, saved)
    assert set(found[0]) == set(expected) == {"encoder.weight", "head.weight"}
    for name, moment in expected.items():
        assert found[0][name] == pytest.approx(moment, rel=1e-6, abs=1e-9), name
    assert abs(expected["encoder.weight"] - expected["head.weight"]).max() > 0.01


class Own(Training, RegularizedModule):
    def __init__(self):
        super().__init__(optimizer=functools.partial(torch.optim.AdamW, lr=0.05), factors={"output.*": 0.5})


def fit_own(rank, world_size, layout, save=None, resume=None):
    layout, weights = LAYOUTS[layout], Weights()
    train(rank, world_size, layout, Own().build(layout, layout.dtype), [weights], save, resume)
    return weights.found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single", "fsdp2 full"),
        ("ddp", "fsdp2 sharded"),
        ("fsdp2 sharded", "fsdp2 sharded"),
        ("fsdp2 full", "single"),
        ("ddp", "fsdp1 sharded"),
    ],
)
def test_a_regularized_module_goes_from_layout_to_layout(before, after, saved_by):
    expected = fit_own(0, 1, "single")
    found = run(fit_own, after, None, saved_by(fit_own, before))
    for name, weight in expected.items():
        assert found[name] == pytest.approx(weight, rel=0, abs=2e-6), name


def test_groups_have_no_keys_but_torchs():
    """A key that is not in a sharded checkpoint, or only there, ends a resume."""
    with_callback, without = (in_one_process(callbacks)[2] for callbacks in (decay, list))
    assert with_callback == without
