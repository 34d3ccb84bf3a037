"""Is everything the same under ``pytorch_lightning``, whose classes are others than those of ``lightning.pytorch``?

The same training runs under both packages, and has to end with the same bits and the same logged numbers.
"""

import functools
import importlib
import sys

import pytest
import torch
import yaml
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR

import lightning_regularize
from lightning_regularize import (
    WeightDecay,
    regularize,
)
from lightning_regularize.schedules import Linear
from tests.distributed import run_distributed
from tests.training.matrix import KeepsValues
from tests.training.support import CALLBACKS, MONITORS, QUIET, Batches, assert_identical_weights, weights

pytest.importorskip("pytorch_lightning")
pytestmark = QUIET

TWINS = ("lightning.pytorch", "pytorch_lightning")
EPOCHS, BATCHES = 3, 4
both = pytest.mark.parametrize("package", TWINS)


# -- a training under either package ---------------------------------------------------------------------------------


def classes(package, *path):
    """A module of the package: ``classes(package, "callbacks")``."""
    return importlib.import_module(".".join([package, *path]))


def build(module):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module.hidden, module.norm, module.output = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    module.drop = nn.Dropout(0.1)
    return module.double()


class Steps:
    """What a module of either package does."""

    interval = "step"  # of the LR scheduler

    def loss(self, batch):
        x, y = batch
        return (self.output(self.drop(torch.tanh(self.norm(self.hidden(x))))) - y).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=1)

    def train_dataloader(self):
        return Batches(BATCHES)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.0)
        scheduler = CosineAnnealingLR(optimizer, T_max=EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


@functools.cache
def module_class(package):
    return type("Net", (Steps, classes(package).LightningModule), {})


@functools.cache
def kept_class(package):
    return type("Kept", (KeepsValues, classes(package, "loggers", "logger").Logger), {})


def save_at(package, step, path):
    callback = classes(package).Callback()

    def on_train_batch_end(trainer, *_):
        if trainer.global_step == step:
            trainer.save_checkpoint(path)

    callback.on_train_batch_end = on_train_batch_end
    return callback


def trainer_of(package, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": EPOCHS, "log_every_n_steps": 1, "logger": kept_class(package)(), **quiet, **options}
    return classes(package).Trainer(accelerator="cpu", callbacks=list(callbacks), **options)


def fit(package, *callbacks, module=None, ckpt_path=None, interval="step", **options):
    """The weights, all that was logged, and what ``callback_metrics`` holds."""
    module = build(module_class(package)()) if module is None else module
    module.interval = interval
    trainer = trainer_of(package, *callbacks, **options)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)  # of dropout
        trainer.fit(module, ckpt_path=ckpt_path)
    logged = trainer.logger.values if trainer.logger else {}
    return weights(module), logged, {key: float(value) for key, value in trainer.callback_metrics.items()}


def assert_same(runs):
    (found, logged, metrics), (expected, *expected_logs) = runs
    assert_identical_weights(found, expected)
    assert [logged, metrics] == expected_logs


# -- each callback under each of Lightning's own ---------------------------------------------------------------------


BUNDLES = {
    "optimizer": ["optimizer", "L1", "proximal group lasso", "constraint", "dropout", "monitor", "gap", "summary"],
    "decoupled": ["dropout", "decoupled", "elastic net", "proximal L1", "monitor"],
    "coupled": ["monitor", "L2", "coupled", "anchor", "proximal elastic net"],
    "independent": ["group lasso", "independent", "proximal L2", "monitor"],
    "cautious": ["cautious", "constrained", "monitor"],
    "stable": ["constraint", "stable", "monitor"],
}


def monitored(package):
    return [classes(package, "callbacks").LearningRateMonitor(log_weight_decay=True)]


def accumulating_more(package):
    return [classes(package, "callbacks").GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), *monitored(package)]


def averaging_at_the_end(package):
    return [classes(package, "callbacks").StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)]


def averaging(package):
    return [classes(package, "callbacks").WeightAveraging(avg_fn=lambda average, new, count: 0.9 * average + 0.1 * new)]


SETTINGS = {
    "accumulation": (monitored, {"accumulate_grad_batches": 3}),
    "GradientAccumulationScheduler": (accumulating_more, {}),
    "StochasticWeightAveraging": (averaging_at_the_end, {"interval": "epoch"}),
    "WeightAveraging": (averaging, {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_callbacks_end_with_the_same_bits(bundle, setting):
    beside, options = SETTINGS[setting]
    assert_same([fit(p, *[CALLBACKS[n]() for n in BUNDLES[bundle]], *beside(p), **options) for p in TWINS])


@pytest.mark.parametrize("bundle", BUNDLES)
def test_resumed_runs_end_with_the_same_bits(bundle, tmp_path):
    runs = []
    for package in TWINS:
        path = tmp_path / f"{package}.ckpt"
        make = functools.partial(map, lambda name: CALLBACKS[name](), BUNDLES[bundle])
        fit(package, *make(), save_at(package, 5, path))
        runs.append(fit(package, *make(), ckpt_path=path))
    assert_same(runs)


@functools.cache
def fit_without_callbacks():
    return fit(TWINS[0], *accumulating_more(TWINS[0]))


@pytest.mark.parametrize("name", CALLBACKS)
def test_each_alone_acts_in_both(name):
    """Without others beside it that could do its work, and not in vain."""
    runs = [fit(package, CALLBACKS[name](), *accumulating_more(package)) for package in TWINS]
    assert_same(runs)
    without = fit_without_callbacks()
    changes_weights = name not in MONITORS
    assert changes_weights == any(not torch.equal(runs[1][0][n], weight) for n, weight in without[0].items())


@pytest.mark.parametrize("bundle", ["optimizer", "coupled", "cautious"])
def test_a_checkpoint_of_one_is_resumed_in_the_other(bundle, tmp_path):
    def make():
        return [CALLBACKS[name]() for name in BUNDLES[bundle]]

    fit(TWINS[0], *make(), save_at(TWINS[0], 6, tmp_path / "6.ckpt"))
    assert_same([fit(package, *make(), ckpt_path=tmp_path / "6.ckpt") for package in TWINS])


@both
def test_a_schedule_ends_with_the_last_step_of_a_growing_accumulation(package):
    """4 steps, 2 steps and 1 step."""
    _, logged, _ = fit(package, WeightDecay(Linear(0.1, 1.0)), *accumulating_more(package))
    steps = sorted(logged["weight_decay"])
    values = list(dict.fromkeys(round(logged["weight_decay"][step], 9) for step in steps))
    assert values == pytest.approx([0.1 + 0.9 * k / 6 for k in range(7)], rel=1e-6, abs=1e-9)


@both
def test_a_schedule_does_not_count_the_epoch_that_weight_averaging_adds(package):
    module = build(module_class(package)())
    module.norm = nn.BatchNorm1d(6).double()  # the epoch that is added updates its statistics
    callbacks = [WeightDecay(Linear(0.0, 1.0)), *averaging_at_the_end(package)]
    _, logged, _ = fit(package, *callbacks, module=module, interval="epoch")
    found = [value for _, value in sorted(logged["weight_decay"].items())]
    steps = EPOCHS * BATCHES
    assert found[:steps] == pytest.approx([k / (steps - 1) for k in range(steps)], rel=1e-6, abs=1e-9)


@both
@pytest.mark.parametrize("name", CALLBACKS)
def test_classes_are_recognized(name, package):
    assert isinstance(CALLBACKS[name](), classes(package).Callback)


# -- modules ---------------------------------------------------------------------------------------------------------


def by_hand(package):
    """Two groups made by hand in the module."""

    class Grouped(module_class(package)):
        def configure_optimizers(self):
            matrices = [p for p in self.parameters() if p.dim() > 1]
            others = [p for p in self.parameters() if p.dim() <= 1]
            groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, lr=0.05)

    return build(Grouped())


def plain(package, weight_decay):
    class Plain(module_class(package)):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=weight_decay)

    return build(Plain())


@both
@pytest.mark.parametrize("given", [None, 0.3], ids="weight_decay={}".format)
def test_regularize_equals_groups_made_by_hand(given, package):
    module = regularize(plain(package, 0.3 if given is None else 0.1), given)
    found, expected = (fit(package, module=m)[0] for m in (module, by_hand(package)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@both
def test_regularize_keeps_the_callbacks_and_the_class_of_a_module(package):
    class Stopping(module_class(package)):
        def configure_callbacks(self):
            return classes(package, "callbacks").EarlyStopping("val_loss", patience=100)

    module = regularize(build(Stopping()))
    assert type(module) is Stopping
    names = [type(callback).__name__ for callback in module.configure_callbacks()]
    assert names == ["EarlyStopping", "WeightDecay"]


@both
def test_the_decay_of_a_trainer_wins_over_that_of_a_module(package):
    module = regularize(plain(package, 0.1), 0.2)
    found, expected = (fit(package, *c, module=m)[0] for m, c in ((module, [WeightDecay(0.3)]), (by_hand(package), [])))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# -- the command line ------------------------------------------------------------------------------------------------

YAML = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: false
  callbacks:
  - class_path: lightning_regularize.WeightDecay
    init_args:
      weight_decay: {class_path: lightning_regularize.schedules.Linear, init_args: {start: 0.1, end: 0.3}}
      factors: {"output.*": 0.5}
  - class_path: lightning_regularize.L1Penalty
    init_args: {strength: 1.0e-3, method: proximal}
  - class_path: lightning_regularize.L1Penalty
    init_args: {strength: 1.0e-4, include: ["output.*"]}
  - class_path: lightning_regularize.WeightConstraint
    init_args: {projection: {class_path: lightning_regularize.projections.MaxNorm, init_args: {max_norm: 0.5}}}
  - class_path: lightning_regularize.DropoutSchedule
    init_args: {p: 0.2}
  - class_path: lightning_regularize.RegularizationSummary
"""


def run_cli(package, path):
    class Net(module_class(package)):
        def __init__(self):
            super().__init__()
            build(self)

    cli = classes(package, "cli").LightningCLI
    return cli(Net, auto_configure_optimizers=False, save_config_callback=None, args=["fit", "--config", str(path)])


@pytest.fixture
def _command_line(monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["cli"])  # LightningCLI warns where both it and `args` are given
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse renames


@pytest.mark.usefixtures("_command_line")
def test_callbacks_train_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    found, expected = (run_cli(package, path) for package in TWINS)
    assert_identical_weights(weights(found.model), weights(expected.model))
    for cli in (found, expected):
        names = [type(callback).__name__ for callback in cli.trainer.callbacks]
        assert [name for name in names if hasattr(lightning_regularize, name)] == [
            callback["class_path"].rpartition(".")[2] for callback in yaml.safe_load(YAML)["trainer"]["callbacks"]
        ]
        assert torch.linalg.vector_norm(cli.model.hidden.weight, dim=1).max() <= 0.5 + 1e-9


# -- two processes ---------------------------------------------------------------------------------------------------


def sharded_class(package):
    class Sharded(module_class(package)):
        def configure_model(self):
            if not hasattr(self.hidden.weight, "full_tensor"):
                for layer in (self.hidden, self.norm, self.output):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    return Sharded


def fit_on_two(rank, world_size, package, strategy, names, ckpt_path=None, save=None):
    strategies = classes(package, "strategies")
    if strategy == "fsdp2":
        module = build(sharded_class(package)())
        options = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        how = strategies.ModelParallelStrategy(**options, process_group_backend="gloo")
    else:
        module = build(module_class(package)())
        how = strategies.DDPStrategy(process_group_backend="gloo")
    module.drop = nn.Identity()  # no two processes draw the same noise
    module.train_dataloader = lambda: Halves(rank)
    callbacks = [CALLBACKS[name]() for name in names if name not in ("dropout", "gap")]
    saves = [] if save is None else [save_at(package, 5, save)]
    options = {"strategy": how, "devices": 2, "limit_val_batches": 0}
    trainer = trainer_of(package, *callbacks, *saves, **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in module.named_parameters()}
    logged = {key: found for key, found in trainer.logger.values.items() if key != "epoch"}
    return {name: weight.detach().tolist() for name, weight in found.items()}, logged


class Halves(Batches):
    """The part of each batch that belongs to one of two processes."""

    def __init__(self, rank):
        super().__init__(BATCHES)
        self.batches = [tuple(tensor.chunk(2)[rank] for tensor in batch) for batch in self.batches]


@pytest.mark.parametrize(
    ("bundle", "strategy"), [("optimizer", "ddp"), ("optimizer", "fsdp2"), ("decoupled", "fsdp2"), ("coupled", "fsdp2")]
)
def test_two_processes_end_with_the_same_bits(bundle, strategy):
    found, expected = (run_distributed(fit_on_two, package, strategy, BUNDLES[bundle]) for package in TWINS)
    assert found == expected
    assert found[0][0] == found[1][0]


def test_sharded_runs_resume_with_the_same_bits(tmp_path):
    runs = []
    for package in TWINS:
        path = tmp_path / package
        run_distributed(fit_on_two, package, "fsdp2", BUNDLES["optimizer"], None, path)
        runs.append(run_distributed(fit_on_two, package, "fsdp2", BUNDLES["optimizer"], path))
    assert runs[0] == runs[1]
