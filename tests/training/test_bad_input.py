"""Is every mistake a clear error before any weight has changed?"""

import math

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import Linear
from tests.training.support import QUIET, Regression, adamw, assert_identical_weights, train, weights

pytestmark = QUIET


NOT_FINITE = r"`weight_decay` should be a finite number that is not negative, got "
NO_SCHEDULE = r"`weight_decay` should be a number, a `Schedule` or a callable of a `Position`, got "
NO_STEPS = r"`total_steps` should be a positive integer or None, got "
NO_FACTOR = r"the factor of 'bias' should be "

CONSTRUCTOR = {
    "negative": ({"weight_decay": -0.1}, ValueError, NOT_FINITE + "-0.1"),
    "nan": ({"weight_decay": math.nan}, ValueError, NOT_FINITE + "nan"),
    "inf": ({"weight_decay": math.inf}, ValueError, NOT_FINITE + "inf"),
    "string": ({"weight_decay": "0.1"}, TypeError, NO_SCHEDULE + "'0.1'"),
    "bool": ({"weight_decay": True}, TypeError, NO_SCHEDULE + "True"),
    "list": ({"weight_decay": [0.1]}, TypeError, NO_SCHEDULE + r"\[0\.1\]"),
    "None and a method": (
        {"weight_decay": None, "method": "decoupled"},
        ValueError,
        r"`weight_decay=None` keeps the optimizer's own decay, it needs method='optimizer', got 'decoupled'",
    ),
    "class": ({"weight_decay": Linear}, TypeError, NO_SCHEDULE + "<class"),
    "no steps": ({"total_steps": 0}, ValueError, NO_STEPS + "0"),
    "negative steps": ({"total_steps": -1}, ValueError, NO_STEPS + "-1"),
    "half a step": ({"total_steps": 2.5}, ValueError, NO_STEPS + "2.5"),
    "bool steps": ({"total_steps": True}, ValueError, NO_STEPS + "True"),
    "string steps": ({"total_steps": "10"}, ValueError, NO_STEPS + "'10'"),
    "method": ({"method": "l2"}, ValueError, r"`method` should be .*'optimizer'.*, got 'l2'"),
    "rounding": ({"rounding": "up"}, ValueError, r"`rounding` should be 'nearest'.*, got 'up'"),
    "unknown word": ({"exclude": ("biases",)}, ValueError, r"got 'biases'\. Did you mean 'bias'\? .* '\*biases\*'"),
    "one rule": (
        {"exclude": "bias"},
        TypeError,
        r"should be a sequence of rules, got 'bias'; one alone is \('bias',\)",
    ),
    "no rule": ({"exclude": (3,)}, TypeError, r"`exclude` should hold kinds .*, got 3"),
    "unknown word in factors": (
        {"factors": {"heads": 2.0}},
        ValueError,
        r"`factors` should hold kinds .*, got 'heads'",
    ),
    "negative factor": ({"factors": {"bias": -1.0}}, ValueError, NO_FACTOR + "finite and at least 0, got -1.0"),
    "nan factor": ({"factors": {"bias": math.nan}}, ValueError, NO_FACTOR + "finite and at least 0, got nan"),
    "string factor": ({"factors": {"bias": "1"}}, TypeError, NO_FACTOR + "a number, got '1'"),
    "factors in a list": ({"factors": ["bias"]}, TypeError, r"`factors` should map rules to numbers, got \['bias'\]"),
    "factors in an empty list": ({"factors": []}, TypeError, r"`factors` should map rules to numbers, got \[\]"),
    "set of rules": ({"exclude": {"bias"}}, TypeError, r"sequence of rules, got \{'bias'\}; a list or a tuple is one"),
    "negative seed": ({"seed": -1}, ValueError, "`seed` should be an integer of at least 0, got -1"),
    "string seed": ({"seed": "3"}, ValueError, "`seed` should be an integer of at least 0, got '3'"),
    "bool seed": ({"seed": True}, ValueError, "`seed` should be an integer of at least 0, got True"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR.values(), ids=CONSTRUCTOR)
def test_constructor(arguments, error, message):
    with pytest.raises(error, match=message):
        WeightDecay(**{"weight_decay": 0.1, **arguments})


class OnlyNorms(Regression):
    def __init__(self):
        super().__init__(lambda parameters: adamw(p for p in parameters if p.requires_grad))
        del self.hidden, self.output


def fails_before_training(module, callbacks, error, message):
    before = weights(module)
    with pytest.raises(error, match=message):
        train(module, *callbacks)
    assert_identical_weights(weights(module), before)


IDLE_RULES = {
    "glob": (
        {"exclude": ("hiden.*",)},
        r"'hiden\.\*' matches no parameter; the nearest are 'hidden\.\w+', 'hidden\.\w+'",
    ),
    "type": ({"exclude": ("type:LayrNorm",)}, r"'type:LayrNorm' matches no parameter; the nearest are 'LayerNorm'"),
    "class": ({"exclude": (nn.Conv2d,)}, r"Conv2d.*matches no parameter"),
    "function": ({"exclude": (lambda info: False,)}, r"<lambda> .*matches no parameter"),
    "factor": ({"factors": {"head.*": 0.1}}, r"'head\.\*' matches no parameter"),
    "factor of what is excluded": ({"factors": {"bias": 0.1}}, r"The factor of 'bias' never applies"),
    "everything excluded": ({"exclude": ("*",)}, r"every parameter is excluded from it by exclude=\('\*',\)"),
    "all factors 0": ({"factors": {"*": 0.0}}, r"every parameter is excluded"),
}


@pytest.mark.parametrize(("arguments", "message"), IDLE_RULES.values(), ids=IDLE_RULES)
def test_rules_that_do_nothing(arguments, message):
    fails_before_training(Regression(), [WeightDecay(0.1, **arguments)], ValueError, message)


def test_a_module_in_which_nothing_decays():
    fails_before_training(OnlyNorms(), [WeightDecay(0.1)], ValueError, "every parameter is excluded")


def test_zero_weight_decay_may_exclude_everything():
    train(Regression(), WeightDecay(0.0, exclude=("*",)), max_epochs=1)


def test_weights_that_are_frozen_cannot_decay_and_it_is_said():
    module = Regression(lambda parameters: adamw(p for p in parameters if p.requires_grad))
    module.hidden.weight.requires_grad_(False)
    module.output.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="Weight decay has no effect: all parameters that it applies to are frozen"):
        train(module, WeightDecay(0.1), max_epochs=1)


TOO_MANY = "2 WeightDecay callbacks would write over each other"


@pytest.mark.parametrize("second", [{}, {"weight_decay": 0.2}, {"exclude": ("norm",)}], ids=["equal", "value", "rules"])
def test_two_callbacks(second):
    both = [WeightDecay(0.1), WeightDecay(**{"weight_decay": 0.1, **second})]
    fails_before_training(Regression(), both, MisconfigurationException, TOO_MANY)


def test_two_callbacks_that_the_module_brings():
    class Opinionated(Regression):
        def configure_callbacks(self):
            return [WeightDecay(0.1), WeightDecay(0.2)]

    fails_before_training(Opinionated(), [WeightDecay(0.3)], MisconfigurationException, TOO_MANY)


BAD_VALUES = [math.nan, math.inf, -0.1, None, "0.1", True, 1j]


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
def test_a_bad_value_at_the_first_step(value):
    message = r"should give a finite number that is not negative, got .* at Position\(step=0"
    fails_before_training(Regression(), [WeightDecay(lambda at: value)], ValueError, message)


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
def test_a_bad_value_at_a_later_step(value):
    module, twin = Regression(), Regression()
    with pytest.raises(ValueError, match=r"got .* at Position\(step=4, total_steps=21, epoch=0"):
        train(module, WeightDecay(lambda at: value if at.step == 4 else 0.1))
    train(twin, WeightDecay(0.1), max_steps=4)
    assert_identical_weights(weights(module), weights(twin))


def test_a_bad_value_for_a_group_that_does_not_decay_is_one_all_the_same():
    fails_before_training(Regression(), [WeightDecay(lambda at: math.nan)], ValueError, "got nan")
