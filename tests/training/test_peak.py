"""Is it told when the learning rate rises above what counted as its peak?"""

import warnings

import lightning.pytorch as L
import pytest
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from lightning_regularize import DropoutSchedule, L1Penalty, WeightDecay
from lightning_regularize.schedules import FollowLR, Linear, Warmup
from tests.training.support import QUIET, Batches, adamw, make_trainer, train
from tests.training.support import Regression as Model

pytestmark = QUIET


class Rates(L.Callback):
    """Writes the rate of each batch."""

    def __init__(self, rates):
        self.rates = rates

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rates[batch_idx]


class Dropped(Model):
    """With a dropout that a schedule may move."""

    def __init__(self):
        super().__init__(lambda parameters: adamw(parameters, lr=0.1))
        self.drop = nn.Dropout(0.1)


FOLLOWING = {
    "WeightDecay": lambda: WeightDecay(FollowLR(0.2)),
    "WeightDecay(decoupled)": lambda: WeightDecay(Warmup(FollowLR(0.2), steps=1), method="decoupled"),
    "L1Penalty": lambda: L1Penalty(FollowLR(1e-4)),
    "DropoutSchedule": lambda: DropoutSchedule(FollowLR(0.2)),
    "a function": lambda: WeightDecay(lambda at: 0.2 * at.lr / at.peak_lr),
}


def told(callback, rates):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Dropped(), Rates(rates), callback, max_epochs=1)
    return [str(warning.message) for warning in caught if "follows the learning rate" in str(warning.message)]


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_rate_that_rises_above_the_peak_is_told_once(name):
    messages = told(FOLLOWING[name](), [0.1, 0.05, 0.1, 0.4, 0.4, 0.8, 0.1])
    assert len(messages) == 1
    assert "has risen to 0.4. Its largest value before, 0.1, counted as the peak" in messages[0]


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_rate_below_the_peak_is_no_cause(name):
    assert told(FOLLOWING[name](), [0.1, 0.05, 0.1, 0.02, 0.1, 0.1, 0.0]) == []


def test_a_rate_that_rises_by_rounding_is_no_cause():
    def warm_up(optimizer):
        return LinearLR(optimizer, total_iters=5)

    module = Model(lambda parameters: adamw(parameters, lr=3e-4), warm_up)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        witness = train(module, WeightDecay(FollowLR(0.2)), max_epochs=1)
    assert witness.lrs()[-1] > 3e-4


def test_what_does_not_follow_the_rate_says_nothing():
    assert told(WeightDecay(Linear(0.1, 0.2)), [0.1, 0.4, 0.8, 0.1, 0.1, 0.1, 0.1]) == []
    assert told(WeightDecay(0.1), [0.1, 0.4, 0.8, 0.1, 0.1, 0.1, 0.1]) == []
    assert told(WeightDecay(lambda at: 0.1 + 0.01 * at.step), [0.1, 0.4, 0.8, 0.1, 0.1, 0.1, 0.1]) == []


def test_the_peak_is_the_largest_rate_that_was_seen():
    class Seen(L.Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.rates.append(pl_module.drop.p)

    module, seen = Dropped(), Seen()
    trainer = make_trainer(Rates([0.1, 0.4, 0.1, 0.1]), DropoutSchedule(FollowLR(0.2)), seen, max_epochs=1)
    with pytest.warns(UserWarning, match="has risen to 0.4"):
        trainer.fit(module, Batches(4))
    assert seen.rates == pytest.approx([0.2, 0.2, 0.05, 0.05], rel=1e-9, abs=0)
