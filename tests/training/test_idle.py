"""Is it said when a callback cannot do anything?"""

import functools

import lightning.pytorch as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    DropoutSchedule,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
)
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Linear
from tests.training.matrix import Kept
from tests.training.support import QUIET, Batches, Regression, assert_identical_weights, make_trainer, train, weights

pytestmark = QUIET

OUTPUT = {"include": ("output.weight",)}
CALLBACKS = {
    "L1Penalty": lambda: L1Penalty(0.1, **OUTPUT),
    "L2Penalty": lambda: L2Penalty(0.1, method="proximal", **OUTPUT),
    "GroupLassoPenalty": lambda: GroupLassoPenalty(0.1, **OUTPUT),
    "WeightConstraint": lambda: WeightConstraint(MaxNorm(0.1), **OUTPUT),
    "AnchorDecay": lambda: AnchorDecay(0.1, **OUTPUT),
    "ConstrainedDecay": lambda: ConstrainedDecay("start", **OUTPUT),
}


def idle(caught):
    return [str(w.message) for w in caught if "has no effect as long as" in str(w.message)]


@pytest.mark.parametrize("name", CALLBACKS)
def test_parameters_that_no_optimizer_holds_are_warned_of(name):
    module = Regression()
    module.make_optimizer = lambda _: SGD(module.hidden.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=rf"{name} has no effect as long as no optimizer trains .*'output.weight'"
    ) as w:
        train(module, CALLBACKS[name](), max_epochs=1)
    assert len(idle(w)) == 1


@pytest.mark.parametrize("name", CALLBACKS)
def test_frozen_parameters_are_warned_of(name):
    module = Regression(functools.partial(SGD, lr=0.1))
    module.output.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"{name} has no effect as long as all parameters that it is for are frozen"):
        train(module, CALLBACKS[name](), max_epochs=1)


@pytest.mark.parametrize("name", CALLBACKS)
def test_parameters_that_are_trained_are_not(name, recwarn):
    train(Regression(functools.partial(SGD, lr=0.1)), CALLBACKS[name](), max_epochs=1)
    assert not idle(recwarn)


class ByHand(Regression):
    """Steps the optimizer that Lightning has wrapped, which counts steps and calls hooks."""

    is_wrapped = True

    def __init__(self):
        super().__init__(functools.partial(SGD, lr=0.1))
        self.automatic_optimization, self.drop = False, nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.is_wrapped)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class ByHandPastLightning(ByHand):
    """Steps torch's optimizer, so that Lightning neither counts nor calls anything."""

    is_wrapped = False


STEPPING = {
    **CALLBACKS,
    "WeightDecay": lambda: WeightDecay(Linear(0.0, 1.0), total_steps=7),
    "WeightDecay cautious": lambda: WeightDecay(Linear(0.0, 1.0), total_steps=7, method="cautious"),
    "L1Penalty scheduled": lambda: L1Penalty(Linear(0.0, 1.0), method="proximal", total_steps=7),
    "ConstrainedDecay warm_start": lambda: ConstrainedDecay("warm_start", warm_start_steps=3),
    "DropoutSchedule": lambda: DropoutSchedule(Linear(0.0, 0.5), total_steps=7),
    "WeightNormMonitor": WeightNormMonitor,
}


@pytest.mark.parametrize("name", STEPPING)
def test_steps_that_lightning_does_not_count_are_as_those_that_it_does(name):
    module, twin = ByHandPastLightning(), ByHand()
    loggers = Kept(), Kept()
    for each, logger in zip((module, twin), loggers, strict=True):
        train(each, STEPPING[name](), max_epochs=1, logger=logger)
    assert_identical_weights(weights(module), weights(twin))
    assert module.drop.p == twin.drop.p
    found, expected = (logger.values for logger in loggers)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-12, abs=0), key


class Nothing(Regression):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None:UserWarning")
@pytest.mark.parametrize("name", [*CALLBACKS, "DropoutSchedule"])
def test_without_an_optimizer_training_goes_on(name):
    class Steps(L.Callback):
        seen = 0

        def on_train_batch_end(self, *_):
            self.seen += 1

    steps = Steps()
    make = CALLBACKS.get(name, lambda: DropoutSchedule(Linear(0.0, 0.5)))
    trainer = make_trainer(make(), steps, max_epochs=1)
    if name == "DropoutSchedule":
        trainer.fit(Nothing(), Batches())
    else:
        with pytest.warns(UserWarning, match="no optimizer trains"):
            trainer.fit(Nothing(), Batches())
    assert steps.seen == len(Batches())


class TwoRates(Regression):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dropout(0.1), nn.Dropout(0.2)


def test_each_dropout_schedule_has_a_key_of_its_own():
    logger = Kept()
    schedules = DropoutSchedule(0.3, include=("first",)), DropoutSchedule(0.5, include=("second",))
    train(TwoRates(), *schedules, max_epochs=1, logger=logger)
    assert list(logger.values["dropout/p 1"].values()) == pytest.approx([0.3] * 7, rel=1e-12, abs=0)
    assert list(logger.values["dropout/p 2"].values()) == pytest.approx([0.5] * 7, rel=1e-12, abs=0)
    assert "dropout/p" not in logger.values


def test_two_dropout_schedules_for_one_rate_are_refused_every_time():
    schedules = DropoutSchedule(0.3), DropoutSchedule(0.5, include=("second",))
    module = TwoRates()
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match=r"Two DropoutSchedules have the rates of \['second'\]"):
            train(module, *schedules)
        assert (module.first.p, module.second.p) == (0.1, 0.2)
