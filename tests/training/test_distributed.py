"""Does training spread over processes give the numbers of one process, or say why not?"""

import functools
import itertools
import math
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_regularize import ConstrainedDecay, L1Penalty, WeightConstraint, WeightDecay
from lightning_regularize.projections import Box, MaxNorm
from lightning_regularize.schedules import Cosine
from tests.distributed import run_distributed
from tests.training.matrix import (
    COLUMNS,
    PAGE,
    ROWS,
    Column,
    Network,
    Share,
    Weights,
    as_markdown,
    assert_cell,
    fit,
    fit_all,
    whole_weights,
)
from tests.training.support import QUIET, make_trainer

pytestmark = [
    *QUIET,
    # torch, of a test's own gathering of weights over two dims of a mesh
    pytest.mark.filterwarnings("ignore:.*sequential all_gather operations"),
]

HERE = [column for column in COLUMNS if column != "single" and not column.startswith("deepspeed")]


@functools.cache
def alone(row, dtype):
    """What one process makes of it."""
    return fit(0, 1, row, "single", dtype)


@pytest.fixture(scope="module", params=HERE)
def spread(request, tmp_path_factory):
    """A column, and what it makes of the rows that are asked for, all trained by the same processes."""
    column = request.param
    items = [item for item in request.session.items if getattr(item, "originalname", None) == "test_cell"]
    rows = [item.callspec.params["row"] for item in items if item.callspec.params["spread"] == column]
    return column, train_all(rows, column, tmp_path_factory.mktemp("progress") / "row")


def train_all(rows, column, progress):
    world_size = COLUMNS[column].processes
    try:
        outcomes = run_distributed(fit_all, rows, column, progress, world_size=world_size, timeout=250)
    except AssertionError as error:
        at = [progress.with_suffix(f".{rank}").read_text() for rank in range(world_size)]
        raise AssertionError(f"while the processes trained {at}: {error}") from None
    return {row: [outcome[row] for outcome in outcomes] for row in rows}


@pytest.mark.timeout(300)  # four processes train all rows one after the other, in 80 s on two cores that are busy
@pytest.mark.parametrize("row", ROWS)
def test_cell(spread, row):
    column, outcomes = spread
    assert_cell(row, column, outcomes[row], alone(row, COLUMNS[column].dtype))


# Not of use without these: what does nothing is equal everywhere.
ACTING = [row for row in ROWS if not row.startswith(("WeightNorm", "stable_rank", "RegularizationSummary"))]


@pytest.mark.parametrize("row", ACTING)
def test_every_row_changes_what_is_trained(row, monkeypatch):
    dtype = COLUMNS["single"].dtype
    acting = alone(row, dtype).weights
    monkeypatch.setitem(ROWS, row, ROWS[row]._replace(callbacks=list, wrap=lambda module: module))
    if row != "RegularizedModule":
        plain = fit(0, 1, row, "single", dtype).weights
        assert max(abs(acting[name] - plain[name]).max() for name in plain) > 1e-3


def test_the_page_shows_the_table():
    """It is written by ``python -m tests.training.matrix``."""
    assert as_markdown() in PAGE.read_text()


# -- gradients that overflow in one process ---------------------------------------------------------------------------


class Overflowing(Network):
    """In one process, in its second batch."""

    fused, process = False, 1

    def training_step(self, batch, batch_idx):
        overflows = self.global_rank == self.process and self.global_step == 1
        return super().training_step(batch, batch_idx) * (math.inf if overflows else 1.0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, fused=self.fused)


class Watch(L.Callback):
    """All weights after every batch."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, *_):
        self.weights.append(np.concatenate([weight.ravel() for weight in whole_weights(trainer).values()]))


def fit_overflowing(rank, world_size, column, fused):
    column, watch = COLUMNS[column], Watch()
    module = Overflowing().build(column, torch.float32)
    module.fused = fused
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    features = [
        WeightDecay(0.5, method="decoupled"),
        L1Penalty(0.05, method="proximal"),
        WeightConstraint(Box(-1, 0.5)),
    ]
    options = {"max_epochs": 2, "devices": world_size, "plugins": [precision], **column.options()}
    make_trainer(*features, watch, **options).fit(module, Share(rank, world_size, torch.float32))
    return watch.weights


@pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])
@pytest.mark.parametrize("column", ["ddp", "fsdp2"])
def test_where_one_process_overflows_all_skip_the_step(column, fused):
    first, second = run_distributed(fit_overflowing, column, fused)
    assert np.array_equal(first, second)
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(first)]
    assert moved == [False, True, True]


# -- other launchers -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_spawned_processes():
    """Callbacks and module are pickled on the way; Lightning brings the weights back."""

    def weights(devices, strategy):
        module = Network().build(Column("any", data_parallel=devices))
        callbacks = [WeightDecay(Cosine(0.1, 0.9)), L1Penalty(0.05)]
        make_trainer(*callbacks, max_epochs=2, devices=devices, strategy=strategy).fit(module, Halves(devices))
        return {name: parameter.detach() for name, parameter in module.named_parameters()}

    alone, spread = weights(1, "auto"), weights(2, "ddp_spawn")
    for name, weight in alone.items():
        assert spread[name].numpy() == pytest.approx(weight.numpy(), rel=0, abs=1e-12)


class Late(Network):
    """Its output layer is in no group at first."""

    def configure_optimizers(self):
        late = set(self.output.parameters())
        return torch.optim.AdamW([p for p in self.parameters() if p not in late], lr=0.05)


class AddGroup(L.Callback):
    """As BackboneFinetuning does, and after a validation."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": list(module.output.parameters())})


def fit_late(rank, world_size, method):
    column = COLUMNS["fsdp2" if world_size == 2 else "single"]
    weights = Weights()
    trainer = make_trainer(
        AddGroup(), WeightDecay(0.5, method=method), weights, max_epochs=2, devices=world_size, **column.options()
    )
    trainer.fit(Late().build(column), Share(rank, world_size), Share(rank, world_size))
    return weights.found


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_groups_that_are_added_after_a_validation_decay_under_fsdp2(method):
    expected = fit_late(0, 1, method)
    for found in run_distributed(fit_late, method):
        for name, weight in expected.items():
            assert found[name] == pytest.approx(weight, rel=0, abs=1e-12), name


class Redundant(Network):
    """Each process keeps the optimizer's state for a part of the parameters."""

    def configure_optimizers(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch itself uses what it deprecates
            from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=0.05)


def features_of(method):
    if method == "with a state of their own":
        return [WeightDecay(0.0), ConstrainedDecay(factor=0.5, bound="start")]
    return [WeightDecay(Cosine(0.1, 0.9), factors={"output.*": 0.5}, method=method), L1Penalty(0.05)]


def fit_redundant(rank, world_size, method, path=None, resume=None):
    """Two epochs; after the first the state is saved, which all processes put together."""
    weights, module, features = Weights(), Redundant().build(COLUMNS["ddp"]), features_of(method)
    saves = [] if path is None else [ModelCheckpoint(path.parent, path.name, every_n_train_steps=2, save_top_k=-1)]
    options = {"devices": 2, "strategy": "ddp", "enable_checkpointing": bool(saves)}
    trainer = make_trainer(*features, weights, *saves, max_epochs=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of a folder that exists
        trainer.fit(module, Share(rank, world_size), ckpt_path=resume)
    return weights.found


@pytest.mark.parametrize("method", ["optimizer", "decoupled", "with a state of their own"])
def test_zero_redundancy_optimizer(method, tmp_path):
    """The optimizer inside of it steps, with other dictionaries as groups; its state holds None for other ranks."""
    module, weights = Network().build(COLUMNS["single"]), Weights()
    make_trainer(*features_of(method), weights, max_epochs=2).fit(module, Share())
    uninterrupted = run_distributed(fit_redundant, method, tmp_path / "{step}")
    resumed = run_distributed(fit_redundant, method, None, tmp_path / "step=2.ckpt")
    for found in uninterrupted + resumed:
        for name, weight in weights.found.items():
            assert found[name] == pytest.approx(weight, rel=0, abs=1e-12), name


def fit_one_constrained_weight(rank, world_size):
    weights = Weights()
    constraint = WeightConstraint(MaxNorm(0.3), include=("hidden.weight",))
    options = {"devices": 2, "strategy": "ddp"} if world_size == 2 else {}
    column, kind = ("ddp", Redundant) if world_size == 2 else ("single", Network)
    trainer = make_trainer(constraint, weights, max_epochs=2, **options)
    trainer.fit(kind().build(COLUMNS[column]), Share(rank, world_size))
    return weights.found


def test_a_constraint_of_one_weight_under_zero_redundancy_optimizer():
    """One process steps it. The other one has nothing to project, and still takes part in collectives."""
    expected = fit_one_constrained_weight(0, 1)
    for found in run_distributed(fit_one_constrained_weight, timeout=20):
        for name, weight in expected.items():
            assert found[name] == pytest.approx(weight, rel=0, abs=1e-12), name


class Halves(Share):
    """The samples of whichever process asks."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __iter__(self):
        import torch.distributed as dist

        rank = dist.get_rank() if dist.is_initialized() else 0
        return iter(Share(rank, self.count).batches)
