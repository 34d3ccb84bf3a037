"""Does WeightPenalty act as its shorthands do, and as the function in the loss would?"""

import functools
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_regularize import ElasticNetPenalty, GroupLassoPenalty, L1Penalty, L2Penalty, WeightPenalty
from lightning_regularize.penalties import L1, L2, ElasticNet, GroupLasso, Orthogonal, Penalty
from lightning_regularize.schedules import Linear
from tests.reading import read_csv
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    assert_identical_weights,
    assert_same_weights,
    double_well,
    train,
    weights,
)

pytestmark = QUIET

RAMP = Linear(0.0, 0.1)
SHORTHANDS = {
    "L1": (L1(), functools.partial(L1Penalty, RAMP)),
    "L2": (L2(), functools.partial(L2Penalty, RAMP)),
    "elastic net": (ElasticNet(0.25), functools.partial(ElasticNetPenalty, 0.25, 0.75, schedule=RAMP)),
    "group lasso": (GroupLasso(), functools.partial(GroupLassoPenalty, RAMP)),
}


@dataclass(frozen=True)
class Own(Penalty):
    """The L1 penalty by someone who knows only one tensor."""

    def value(self, weight, strength=1.0, *, dim=None):
        return strength * weight.detach().abs().sum(dtype=torch.float64)

    def add_gradient_(self, gradient, weight, strength, *, dim=None):
        gradient.add_(weight.detach().sign() * strength)

    def proximal_(self, weight, threshold, *, dim=None):
        weight.sub_(weight.clamp(-threshold, threshold))


@pytest.mark.parametrize("method", ["gradient", "proximal"])
@pytest.mark.parametrize(("penalty", "shorthand"), SHORTHANDS.values(), ids=SHORTHANDS)
def test_shorthands(penalty, shorthand, method):
    by_name, by_penalty = Regression(), Regression()
    train(by_name, shorthand(method=method))
    train(by_penalty, WeightPenalty(penalty, RAMP, method=method))
    assert_identical_weights(weights(by_penalty), weights(by_name))


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_a_penalty_of_ones_own(method):
    own, ours = Regression(), Regression()
    train(own, WeightPenalty(Own(), 0.02, method=method))
    train(ours, L1Penalty(0.02, method=method))
    assert_same_weights(weights(own), weights(ours))


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_every_third_step_has_three_times_the_strength(method, tmp_path):
    """As a strength that is 0 in the steps between, also in a run that is resumed between two of them."""

    def peaks(at):
        return 0.06 * (at.step % 3 == 2)

    rare, peaked, resumed = Regression(), Regression(), Regression()
    penalty = functools.partial(WeightPenalty, L1(), method=method)
    train(rare, penalty(0.02, every_n_steps=3), SaveAfter(tmp_path, 10))
    train(peaked, penalty(peaks))
    assert_identical_weights(weights(rare), weights(peaked))
    train(resumed, penalty(0.02, every_n_steps=3), ckpt_path=tmp_path / "10.ckpt")
    assert_identical_weights(weights(resumed), weights(rare))


class WithPenaltyInLoss(Regression):
    def loss(self, batch):
        return super().loss(batch) + 0.1 * (double_well(self.hidden.weight) + double_well(self.output.weight))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_function_acts_as_in_the_loss(accumulate):
    by_callback, in_loss = Regression(), WithPenaltyInLoss()
    train(by_callback, WeightPenalty(double_well, 0.1), data=Batches(8), accumulate_grad_batches=accumulate)
    train(in_loss, data=Batches(8), accumulate_grad_batches=accumulate)
    assert_same_weights(weights(by_callback), weights(in_loss))


class Wells(nn.Module):
    def forward(self, weight):
        return double_well(weight)


@pytest.mark.parametrize(
    ("penalty", "name"),
    [
        (double_well, "double_well"),
        (functools.partial(double_well), "double_well"),
        (lambda w: w.sum(), "lambda"),
        (Wells(), "Wells"),
        (Orthogonal(), "Orthogonal"),
        (Own(), "Own"),
    ],
    ids=["function", "partial", "lambda", "module", "penalty", "own"],
)
def test_the_name_in_the_log(penalty, name, tmp_path):
    logger = CSVLogger(tmp_path)
    train(Regression(), WeightPenalty(penalty, 0.1), logger=logger, max_epochs=1)
    assert len(read_csv(logger)[f"penalty/{name}"]) == 7


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: WeightPenalty(L1, 0.1),
            TypeError,
            r"WeightPenalty: `penalty` .* got the class L1: write L1\(\.\.\.\)",
        ),
        (lambda: WeightPenalty("l1", 0.1), TypeError, "WeightPenalty: `penalty` should be one of .*, got 'l1'"),
        (lambda: WeightPenalty(L1(), 0.1, every_n_steps=0), ValueError, "WeightPenalty: `every_n_steps` .* positive"),
        (lambda: WeightPenalty(double_well, -1.0), ValueError, "WeightPenalty: `strength` .* not negative"),
        (
            lambda: WeightPenalty(double_well, 0.1, method="proximal"),
            ValueError,
            "WeightPenalty: `method='proximal'` needs a proximal step, .* double_well: .* write a `Penalty`",
        ),
        (
            lambda: train(Regression(), WeightPenalty(lambda w: w.square(), Linear(0.0, 0.1))),
            ValueError,
            r"WeightPenalty: 'hidden.weight': lambda should return a real 0-d tensor, got shape \(4, 3\)",
        ),
    ],
    ids=["class", "text", "every 0", "negative", "proximal", "no scalar"],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
