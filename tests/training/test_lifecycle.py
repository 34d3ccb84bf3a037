"""Is everything put back after a run, however it ends, so that the next one starts afresh?"""

import copy
import functools
import io
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    DropoutSchedule,
    ElasticNetPenalty,
    GeneralizationGapMonitor,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    RegularizationSummary,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
)
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Cosine, FromLRScheduler, Linear
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    Witness,
    adamw,
    assert_identical_weights,
    make_trainer,
    train,
    weights,
)

pytestmark = QUIET

LINE = [k / 20 for k in range(21)]


class Early(Regression):
    """Makes its optimizer once for all fits, with groups of the user's."""

    def __init__(self, hidden=0.1, output=0.1):
        super().__init__()
        groups = [
            {"params": [*self.hidden.parameters(), *self.norm.parameters()], "weight_decay": hidden},
            {"params": [*self.output.parameters()], "weight_decay": output},
        ]
        self.optimizer = adamw(groups)

    def configure_optimizers(self):
        return self.optimizer


def hooks(optimizer):
    """All hooks of an optimizer."""
    names = [name for name in vars(optimizer) if name.endswith("_hooks")]
    return {name: len(getattr(optimizer, name)) for name in names if getattr(optimizer, name)}


def assert_left_clean(module, trainer):
    assert "configure_optimizers" not in vars(module)
    for optimizer in trainer.optimizers:
        assert hooks(optimizer) == {}


class Raise(L.Callback):
    def __init__(self, hook, error, step=0):
        setattr(self, hook, self.act)
        self.error, self.step = error, step

    def act(self, trainer, *_, **__):
        if trainer.global_step == self.step:
            raise self.error


def test_after_a_fit():
    module, trainer = Regression(), make_trainer(WeightDecay(Linear(0.0, 1.0)), max_epochs=1)
    trainer.fit(module, Batches())
    assert_left_clean(module, trainer)


@pytest.mark.parametrize(
    ("hook", "step"),
    [("setup", 0), ("on_fit_start", 0), ("on_train_start", 0), ("on_train_batch_start", 0), ("on_after_backward", 4)],
)
@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
def test_after_an_exception(hook, step, error):
    module, weight_decay = Regression(), WeightDecay(Linear(0.0, 1.0))
    trainer = make_trainer(weight_decay, Raise(hook, error, step), max_epochs=3)
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        trainer.fit(module, Batches())
    assert_left_clean(module, trainer)
    fresh, twin = Regression(), Regression()  # and the callback serves again
    assert train(fresh, weight_decay).steps == train(twin, WeightDecay(Linear(0.0, 1.0))).steps
    assert_identical_weights(weights(fresh), weights(twin))


def test_what_others_have_put_on_the_module_stays_there():
    module = Regression()
    module.configure_optimizers = configure = functools.partial(
        Regression.configure_optimizers, module
    )  # as a CLI does
    train(module, WeightDecay(0.1), max_epochs=1)
    assert module.configure_optimizers is configure


def test_after_an_exception_in_the_modules_own_configure_optimizers():
    module = Regression(lambda parameters: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(module, WeightDecay(0.1))
    assert "configure_optimizers" not in vars(module)


# --------------------------------------------------------------------------------------------------------------------
# Fit twice


@pytest.mark.parametrize("make_module", [Regression, Early, lambda: Early(0.1, 0.05)], ids=["late", "early", "ratio"])
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("same_callback", [True, False], ids=["same callback", "new callback"])
def test_a_second_trainer_begins_anew(make_module, end, same_callback):
    """Although an optimizer made early keeps the groups and the values that the first run left."""

    def weight_decay():
        return WeightDecay(Linear(0.5, end), factors={"output.*": 0.1})

    module, first = make_module(), weight_decay()
    once = train(module, first)
    again = train(module, first if same_callback else weight_decay())
    assert [decays for _, decays, _ in again.steps] == [decays for _, decays, _ in once.steps]
    assert len(again.steps) == 21
    assert_left_clean(module, module.trainer)


@pytest.mark.parametrize("module_class", [Regression, Early])
def test_the_same_trainer_with_more_epochs_goes_on(module_class):
    module, witness = module_class(), Witness()
    trainer = make_trainer(WeightDecay(Linear(0.0, 1.0)), witness, max_epochs=2)
    trainer.fit(module, Batches())
    assert witness.decays() == pytest.approx([k / 13 for k in range(14)])
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, Batches())
    assert witness.decays()[14:] == pytest.approx(LINE[14:])
    assert len(witness.steps) == 21


def test_fit_validate_fit():
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

    module, weight_decay = Validated(), WeightDecay(Linear(0.0, 1.0))
    trainer = make_trainer(weight_decay, witness := Witness(), max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(module, Batches(), Batches())
    left = weights(module)
    trainer.validate(module, Batches(), verbose=False)
    assert_identical_weights(weights(module), left)
    assert witness.decays() == pytest.approx(LINE)


def test_nothing_is_written_before_training_starts():
    seen = []

    class Sane(Regression):
        def validation_step(self, batch, batch_idx):
            if self.trainer.sanity_checking:
                seen.extend(group["weight_decay"] for group in self.optimizers().param_groups)

    before = weights(module := Sane(functools.partial(adamw, weight_decay=0.7)))
    trainer = make_trainer(
        WeightDecay(0.1), Raise("on_train_start", InterruptedError()), max_epochs=1, num_sanity_val_steps=1
    )
    with pytest.raises(InterruptedError):
        trainer.fit(module, Batches(), Batches())
    assert seen == [0.7, 0.0]
    assert_identical_weights(weights(module), before)


# --------------------------------------------------------------------------------------------------------------------
# Copies made while it runs


class CopyAt(L.Callback):
    def __init__(self, copy):
        self.copy, self.copies = copy, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 4:
            self.copies.append(self.copy(pl_module))


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.save"])
def test_a_module_copied_while_it_trains_is_a_plain_module(copy):
    module, copier = Regression(), CopyAt(copy)
    weight_decay = WeightDecay(Linear(0.0, 1.0))
    witness = train(module, weight_decay, copier)
    (twin,) = copier.copies
    assert_identical_weights(weights(twin), witness.weights[3])
    (group,) = twin.configure_optimizers().param_groups
    assert group["params"][0] is twin.hidden.weight
    assert train(twin, WeightDecay(Linear(0.0, 1.0))).decays() == pytest.approx(LINE)  # and can be trained in turn


@pytest.mark.parametrize("copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_callback_copied_while_it_trains_is_as_new(copy):
    weight_decay = WeightDecay(Cosine(0.1, 0.9), exclude=("bias",), factors={"output.*": 0.5}, total_steps=12)
    copier = CopyAt(lambda _: copy(weight_decay))
    train(Regression(), weight_decay, copier)
    module, twin = Regression(), Regression()
    found, expected = train(twin, copier.copies[0]), train(module, weight_decay)
    assert found.steps == expected.steps
    assert_identical_weights(weights(module), weights(twin))


def test_what_ddp_spawn_sends_can_be_pickled():
    schedule = FromLRScheduler(functools.partial(StepLR, step_size=6))
    trainer = make_trainer(WeightDecay(schedule), max_epochs=1)
    trainer.fit(module := Regression(), Batches())
    callbacks, module = pickle.loads(pickle.dumps((trainer.callbacks, module)))
    assert len(train(module, *[c for c in callbacks if isinstance(c, WeightDecay)]).steps) == 21


class Unpicklable(Regression):
    """With metrics for a monitor of their gap, and something that cannot be copied to another process."""

    def __init__(self):
        super().__init__(functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0))
        self.drop, self.function = nn.Dropout(0.1), lambda: None

    def training_step(self, batch, batch_idx):
        self.log("train_acc", 1.0, on_epoch=True, on_step=False, batch_size=1)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 1.0, batch_size=1)


CALLBACKS = {
    "WeightDecay": lambda: WeightDecay(0.1),
    "AnchorDecay": lambda: AnchorDecay(0.1),
    "ConstrainedDecay": lambda: ConstrainedDecay("start"),
    "L1Penalty": lambda: L1Penalty(0.1),
    "L2Penalty": lambda: L2Penalty(0.1),
    "ElasticNetPenalty": lambda: ElasticNetPenalty(0.1, 0.1),
    "GroupLassoPenalty": lambda: GroupLassoPenalty(0.1),
    "WeightConstraint": lambda: WeightConstraint(MaxNorm(0.1)),
    "DropoutSchedule": lambda: DropoutSchedule(0.2),
    "WeightNormMonitor": WeightNormMonitor,
    "GeneralizationGapMonitor": lambda: GeneralizationGapMonitor("acc"),
    "RegularizationSummary": RegularizationSummary,
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_copy_of_a_callback_that_ran_does_not_hold_the_module(name, tmp_path):
    callback = CALLBACKS[name]()
    trainer = make_trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path), num_sanity_val_steps=0)
    trainer.fit(Unpicklable(), Batches(), Batches(2))
    copies = pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)
    assert not any(hasattr(twin, "log") or hasattr(twin, "log_dict") for twin in copies)
    for twin in copies:
        make_trainer(twin, max_epochs=1, logger=CSVLogger(tmp_path)).fit(Unpicklable(), Batches(), Batches(2))
