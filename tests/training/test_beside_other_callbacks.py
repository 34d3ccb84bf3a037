"""Do WeightDecay and callbacks that change optimizers, epochs or weights leave each other's work whole?"""

import csv
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
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import FollowLR, Linear
from tests.training.support import (
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
def test_unfrozen_groups_are_split(first):
    module = WithBackbone()
    witness = train(module, *ordered(first, WeightDecay(Linear(0.0, 1.0)), Unfreeze()))
    for k, (_, decays, _) in enumerate(witness.steps):
        x = LINE[k]
        assert decays == pytest.approx([x, 0.0] + [0.0] * (k >= 7) + [x, 0.0] * (k >= 14))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = module.trainer.optimizers[0].param_groups
    assert [[names[id(parameter)] for parameter in group["params"]] for group in groups] == [
        ["output.weight"],
        ["output.bias"],
        ["norm.weight", "norm.bias"],
        ["hidden.weight"],
        ["hidden.bias"],
    ]


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
    split_into = [0, 0, 1, 2, 2]  # the parts of each of the groups that the user sees
    for (_, _, lrs), (_, _, expected_lrs) in zip(found.steps, expected.steps, strict=True):
        assert lrs == [expected_lrs[i] for i in split_into[: len(lrs)]]


def test_groups_of_unfrozen_modules_have_labels_that_do_not_repeat(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor(logging_interval="step", log_weight_decay=True)
    train(WithBackbone(), WeightDecay(Linear(0.0, 1.0)), Unfreeze(), monitor, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        columns = next(csv.reader(file))
    labels = ["decay", "no_decay", "pg3", "pg4 decay", "pg4 no_decay"]
    assert {f"weight_decay/{label}" for label in labels} <= set(columns)
    assert {f"lr-AdamW/{label}-weight_decay" for label in labels} <= set(columns)


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
    expected = train(whole, *callbacks(), SaveAfter(tmp_path, step)).steps
    for k, (_, decays, _) in enumerate(expected):
        assert decays == pytest.approx([LINE[k], 0.0] * (1 + (k >= 7)))
    assert train(resumed, *callbacks(), ckpt_path=tmp_path / f"{step}.ckpt").steps == expected[step:]
    assert_identical_weights(weights(resumed), weights(whole))


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
    assert "configure_optimizers" not in vars(module)
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
    assert witness.decays()[:21] == pytest.approx(LINE)
    # The decay as SWA leaves it to the user: with groups made by hand and set before each step.
    assert witness.decays(1) == [0.0] * len(witness.steps)
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
    assert witness.decays() == pytest.approx(LINE)
    steps = train(twin, WeightDecay(Linear(0.0, 1.0))).weights
    average = dict(steps[0])
    for left in steps[1:]:
        average = {name: 0.5 * average[name] + 0.5 * weight for name, weight in left.items()}
    assert_same_weights(weights(module), average)


@ORDERS
def test_the_copy_that_weight_averaging_keeps_has_a_configure_optimizers_of_its_own(first):
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
