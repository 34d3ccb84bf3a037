"""Do WeightDecay and callbacks that change optimizers, epochs or weights leave each other's work whole?"""

import functools

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import FollowLR, Linear
from tests.reading import read_csv
from tests.training.support import (
    EXCLUDED,
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    adamw,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    train,
    weights,
)

pytestmark = QUIET

LINE = [k / 20 for k in range(21)]


def approx(values):
    return pytest.approx(values, rel=1e-12, abs=0)


class WithBackbone(Regression):
    """The backbone is what stands before the output."""

    def __init__(self, *args, **options):
        super().__init__(lambda parameters: adamw(p for p in parameters if p.requires_grad), *args, **options)
        self.backbone = nn.Sequential(self.hidden, self.norm)


class StaysUnfrozen(BaseFinetuning):
    """Lightning freezes anew when it resumes, and forgets to unfreeze what stands in the groups that it restores."""

    def on_train_start(self, trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)


class Backbone(BackboneFinetuning, StaysUnfrozen):
    """As Lightning's."""


class Unfreeze(StaysUnfrozen):
    """The norm in the second epoch and the first layer in the third."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.hidden, pl_module.norm])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch in {1, 2}:
            module = pl_module.norm if epoch == 1 else pl_module.hidden
            self.unfreeze_and_add_param_group(module, optimizer, initial_denom_lr=1)


ORDERS = pytest.mark.parametrize("first", [True, False], ids=["before", "after"])


def ordered(first, weight_decay, other):
    return (weight_decay, other) if first else (other, weight_decay)


@ORDERS
def test_what_is_unfrozen_decays_unless_it_is_excluded(first):
    module, twin = WithBackbone(), WithBackbone()
    witness = train(module, *ordered(first, WeightDecay(Linear(0.0, 1.0)), Unfreeze()))
    expected = train(twin, Unfreeze())
    for k, ((_, decays, _), (_, without, _)) in enumerate(zip(witness.steps, expected.steps, strict=True)):
        assert set(decays) == set(without)
        assert decays == approx({name: LINE[k] * (name not in EXCLUDED) for name in decays})


@ORDERS
def test_decay_by_the_callback_itself_acts_on_what_is_unfrozen_as_adamw_does(first):
    module, twin = WithBackbone(), WithBackbone()
    train(module, *ordered(first, WeightDecay(Linear(0.0, 1.0), method="decoupled"), Unfreeze()))
    train(twin, *ordered(first, WeightDecay(Linear(0.0, 1.0)), Unfreeze()))
    assert_same_weights(weights(module), weights(twin))


@ORDERS
def test_groups_that_unfreezing_has_added_are_left_as_without_the_callback(first):
    module, twin = WithBackbone(), WithBackbone()
    train(module, *ordered(first, WeightDecay(Linear(0.0, 1.0)), Unfreeze()))
    train(twin, Unfreeze())
    groups, without = module.trainer.optimizers[0].param_groups, twin.trainer.optimizers[0].param_groups
    names = {id(parameter): name for each in (module, twin) for name, parameter in each.named_parameters()}
    held = [["output.weight", "output.bias"], ["norm.weight", "norm.bias"], ["hidden.weight", "hidden.bias"]]
    assert [[names[id(parameter)] for parameter in group["params"]] for group in groups] == held
    assert [list(group) for group in groups] == [list(group) for group in without]
    for group, expected in zip(groups, without, strict=True):
        assert {**group, "params": None} == {**expected, "params": None}


class UnfreezeKnownToScheduler(Unfreeze):
    """LambdaLR refuses groups of which nobody told it."""

    def finetune_function(self, pl_module, epoch, optimizer):
        super().finetune_function(pl_module, epoch, optimizer)
        scheduler = pl_module.lr_schedulers()
        if len(optimizer.param_groups) > len(scheduler.base_lrs):
            scheduler.base_lrs.append(0.05)
            scheduler.lr_lambdas.append(lambda step: 0.8**step)


@ORDERS
@pytest.mark.parametrize(
    ("make_scheduler", "unfreeze", "options"),
    [
        (functools.partial(StepLR, step_size=4), Unfreeze, {}),
        (functools.partial(ReduceLROnPlateau, patience=0), Unfreeze, {"interval": "epoch", "monitor": "train_loss"}),
        (lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step), UnfreezeKnownToScheduler, {}),
    ],
    ids=["StepLR", "ReduceLROnPlateau", "LambdaLR"],
)
def test_learning_rates_of_unfrozen_groups_are_as_without_the_callback(first, make_scheduler, unfreeze, options):
    module, twin = WithBackbone(make_scheduler, **options), WithBackbone(make_scheduler, **options)
    found = train(module, *ordered(first, WeightDecay(0.01), unfreeze()))
    expected = train(twin, unfreeze())
    assert [lrs for _, _, lrs in found.steps] == [lrs for _, _, lrs in expected.steps]


@ORDERS
def test_groups_of_unfrozen_modules_have_keys_of_their_own_and_show_what_their_first_step_uses(first, tmp_path):
    logger, monitor = CSVLogger(tmp_path), LearningRateMonitor(logging_interval="step", log_weight_decay=True)
    callbacks = [WeightDecay(Linear(0.0, 1.0)), Unfreeze(), monitor]
    train(WithBackbone(), *(callbacks if first else reversed(callbacks)), logger=logger)
    found = read_csv(logger)
    expected = {
        "weight_decay": {k: LINE[k] for k in range(7)},
        "weight_decay/pg1": {k: LINE[k] for k in range(7, 21)},
        "weight_decay/pg2": dict.fromkeys(range(7, 21), 0.0),
        "weight_decay/pg3": {k: LINE[k] for k in range(14, 21)},
    }
    assert {key for key in found if key.startswith("weight_decay")} == set(expected)
    for key, values in expected.items():
        assert found[key] == approx(values)
        if "/" in key:  # Lightning renames its own keys when a group is added, as here
            assert found[f"lr-AdamW/{key.removeprefix('weight_decay/')}-weight_decay"] == approx(values)


@ORDERS
@pytest.mark.parametrize("step", [5, 7, 10, 14, 17], ids="after step {}".format)
def test_resumed_after_unfreezing_equals_uninterrupted(first, step, tmp_path):
    def callbacks():
        return ordered(first, WeightDecay(Linear(0.0, 1.0)), Unfreeze())

    whole, resumed = (WithBackbone(functools.partial(StepLR, step_size=4)) for _ in range(2))
    expected = train(whole, *callbacks(), SaveAfter(tmp_path, step)).steps
    found = train(resumed, *callbacks(), ckpt_path=tmp_path / f"{step}.ckpt").steps
    assert found == expected[step:]
    assert_identical_weights(weights(resumed), weights(whole))


@ORDERS
@pytest.mark.parametrize("step", [5, 14, 17], ids="after step {}".format)
def test_backbone_finetuning(first, step, tmp_path):
    def callbacks():
        finetuning = Backbone(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, verbose=False)
        return ordered(first, WeightDecay(Linear(0.0, 1.0)), finetuning)

    whole, resumed = WithBackbone(), WithBackbone()
    witness = train(whole, *callbacks(), SaveAfter(tmp_path, step))
    expected = witness.steps
    for k, (_, decays, _) in enumerate(expected):
        assert len(decays) == (6 if k >= 7 else 2)
        assert decays == approx({name: LINE[k] * (name not in EXCLUDED) for name in decays})
    assert train(resumed, *callbacks(), ckpt_path=tmp_path / f"{step}.ckpt").steps == expected[step:]
    assert_identical_weights(weights(resumed), weights(whole))


@ORDERS
def test_the_rate_that_backbone_finetuning_writes_each_epoch_is_as_without_the_callback(first):
    def finetuning():
        options = {"backbone_initial_lr": 1e-3, "lambda_func": lambda epoch: 2.0, "verbose": False}
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1, should_align=False, **options)

    module, twin = WithBackbone(), WithBackbone()
    found, expected = train(module, *ordered(first, WeightDecay(0.3), finetuning())), train(twin, finetuning())
    assert [lrs for _, _, lrs in found.steps] == [lrs for _, _, lrs in expected.steps]
    assert found.steps[-1][2]["hidden.weight"] == found.steps[-1][2]["hidden.bias"] == approx(2e-3)


# --------------------------------------------------------------------------------------------------------------------
# LearningRateMonitor


def by_epoch(optimizer):
    return LambdaLR(optimizer, lambda epoch: 0.5**epoch)


@ORDERS
@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
@pytest.mark.parametrize(
    ("schedule", "make_scheduler", "options"),
    [
        (Linear(0.2, 1.0), None, {}),
        (Linear(0.2, 1.0), functools.partial(StepLR, step_size=2), {}),
        (FollowLR(0.3), functools.partial(StepLR, step_size=2), {}),
        (FollowLR(0.3), functools.partial(OneCycleLR, max_lr=0.2, total_steps=22), {}),
        (FollowLR(0.3), by_epoch, {"interval": "epoch"}),
    ],
    ids=["Linear", "Linear-StepLR", "FollowLR-StepLR", "FollowLR-OneCycleLR", "FollowLR-by epoch"],
)
def test_learning_rate_monitor_shows_what_each_step_uses(first, method, schedule, make_scheduler, options, tmp_path):
    logger, monitor = CSVLogger(tmp_path), LearningRateMonitor(logging_interval="step", log_weight_decay=True)
    module = Regression(adamw, make_scheduler, **options)
    witness = train(module, *ordered(first, WeightDecay(schedule, method=method), monitor), logger=logger)
    found = read_csv(logger)
    assert found["lr-AdamW"] == approx(dict(enumerate(witness.lrs())))
    if method == "optimizer":
        assert found["lr-AdamW-weight_decay"] == approx(dict(enumerate(witness.decays())))
        assert found["weight_decay"] == approx(dict(enumerate(witness.decays())))
    else:  # the optimizer decays nothing
        assert set(found["lr-AdamW-weight_decay"].values()) == {0.0}


@ORDERS
def test_learning_rate_monitor_shows_it_of_accumulated_batches(first, tmp_path):
    """Of seven batches an epoch two, two, two and one make a step."""
    logger, monitor = CSVLogger(tmp_path), LearningRateMonitor(logging_interval="step", log_weight_decay=True)
    weight_decay = WeightDecay(Linear(0.0, 1.1))
    train(Regression(), *ordered(first, weight_decay, monitor), logger=logger, accumulate_grad_batches=2)
    expected = approx({k: k / 10 for k in range(12)})
    found = read_csv(logger)
    assert found["lr-AdamW-weight_decay"] == expected
    assert found["weight_decay"] == expected


# --------------------------------------------------------------------------------------------------------------------
# Learning rates


class WithRate(Regression):
    def __init__(self, **options):
        super().__init__(**options)
        self.lr = 0.1

    def configure_optimizers(self):
        self.make_optimizer = functools.partial(torch.optim.AdamW, lr=self.lr)
        return super().configure_optimizers()


def test_tuner_lr_find(tmp_path):
    module, weight_decay = WithRate(), WeightDecay(Linear(0.0, 1.0))
    before = weights(module)
    trainer = make_trainer(weight_decay, max_epochs=3, default_root_dir=tmp_path)
    finder = Tuner(trainer).lr_find(module, Batches(), num_training=15, early_stop_threshold=None, update_attr=False)
    assert len(finder.results["lr"]) == 15
    assert_identical_weights(weights(module), before)
    trainer.fit(module, Batches())
    train(twin := WithRate(), WeightDecay(Linear(0.0, 1.0)))
    assert_identical_weights(weights(module), weights(twin))


@ORDERS
def test_learning_rate_finder(first, tmp_path):
    module, twin = WithRate(), WithRate()
    finder = LearningRateFinder(num_training_steps=15, early_stop_threshold=None)
    weight_decay = WeightDecay(lambda at: FollowLR(0.5)(at) * (1 + at.step))
    witness = train(module, *ordered(first, weight_decay, finder), default_root_dir=tmp_path)
    assert module.lr != twin.lr
    assert witness.lrs() == [module.lr] * 21
    assert witness.decays() == [0.5 * (1 + k) for k in range(21)]


# --------------------------------------------------------------------------------------------------------------------
# Averages of the weights


class WithBatchNorm(WithRate):
    """For which StochasticWeightAveraging adds an epoch that makes no step."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)


@ORDERS
@pytest.mark.parametrize("module_class", [WithRate, WithBatchNorm])
def test_stochastic_weight_averaging(module_class, first):
    module, twin = module_class(), module_class()

    def averaging():
        return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)

    witness = train(module, *ordered(first, WeightDecay(Linear(0.0, 1.0)), averaging()))
    assert witness.decays()[:21] == approx(LINE)
    assert {decay for name in EXCLUDED for decay in witness.decays(name)} == {0.0}
    # The oracle is SWA with groups made by hand, of which the decay is set before each step.
    decaying = [p for name, p in twin.named_parameters() if name in {"hidden.weight", "output.weight"}]
    others = [p for name, p in twin.named_parameters() if name not in {"hidden.weight", "output.weight"}]
    twin.configure_optimizers = lambda: adamw([{"params": decaying}, {"params": others, "weight_decay": 0.0}])

    def set_decay(optimizer):
        optimizer.param_groups[0]["weight_decay"] = min(twin.trainer.global_step / 20, 1.0)

    twin.on_before_optimizer_step = set_decay
    train(twin, averaging())
    assert_identical_weights(weights(module), weights(twin))


@ORDERS
def test_exponential_moving_average(first):
    module, twin = Regression(), Regression()
    averaging = EMAWeightAveraging(decay=0.5, update_starting_at_step=0)
    witness = train(module, *ordered(first, WeightDecay(Linear(0.0, 1.0)), averaging))
    assert witness.decays() == approx(LINE)
    steps = train(twin, WeightDecay(Linear(0.0, 1.0))).weights
    average = dict(steps[0])
    for left in steps[1:]:
        average = {name: 0.5 * average[name] + 0.5 * weight for name, weight in left.items()}
    assert_same_weights(weights(module), average)


@ORDERS
def test_the_copy_that_weight_averaging_keeps_is_a_module_of_its_own(first):
    averaging = WeightAveraging()
    copies = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            copies.append(averaging._average_model.module)

    module = Regression()
    train(module, *ordered(first, WeightDecay(0.1), averaging), Look(), max_epochs=1)
    optimizer = copies[0].configure_optimizers()
    assert [len(group["params"]) for group in optimizer.param_groups] == [6]
    assert optimizer.param_groups[0]["params"][0] is copies[0].hidden.weight


@ORDERS
def test_model_checkpoint_saves_what_the_steps_left(first, tmp_path):
    def callbacks():
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
        return ordered(first, WeightDecay(Linear(0.0, 1.0)), checkpoint)

    whole, resumed = Regression(), Regression()
    expected = train(whole, *callbacks(), enable_checkpointing=True)
    assert_identical_weights(torch.load(tmp_path / "step=10.ckpt")["state_dict"], expected.weights[9])
    found = train(resumed, *callbacks(), enable_checkpointing=True, ckpt_path=tmp_path / "step=10.ckpt")
    assert found.steps == expected.steps[10:]
    assert_identical_weights(weights(resumed), weights(whole))
