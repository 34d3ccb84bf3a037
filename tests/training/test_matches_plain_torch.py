"""Does a training with WeightDecay equal a loop in plain torch with hand-made groups?"""

import functools
import math

import pytest
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import (
    Constant,
    Cosine,
    Exponential,
    FollowLR,
    FromLRScheduler,
    Join,
    Linear,
    Polynomial,
    Steps,
    Warmup,
)
from tests.naming import printed
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    adamw,
    assert_identical_weights,
    assert_same_weights,
    plain_loop,
    split,
    train,
    weights,
)

pytestmark = QUIET

STEPS = 21  # 3 epochs of 7 batches
LAST = STEPS - 1


class WithoutVectors(Regression):
    """Only matrices, which is what Muon takes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm, self.hidden.bias, self.output.bias = nn.Identity(), None, None


# What each schedule is worth at step k, by hand. FollowLR has its own test below.
SCHEDULES = {
    "number": (0.3, lambda k: 0.3),
    "Constant": (Constant(0.3), lambda k: 0.3),
    "Linear": (Linear(0.1, 0.9), lambda k: 0.1 + 0.8 * k / LAST),
    "Cosine": (Cosine(0.04, 0.4), lambda k: 0.22 - 0.18 * math.cos(math.pi * k / LAST)),
    "Exponential": (Exponential(1.0, 0.01), lambda k: 10 ** (-2 * k / LAST)),
    "Polynomial": (Polynomial(0.8, 0.2, power=2), lambda k: 0.2 + 0.6 * (1 - k / LAST) ** 2),
    "Steps": (Steps([0.5, 0.1, 0.0], [4, 12]), lambda k: 0.5 if k < 4 else 0.1 if k < 12 else 0.0),
    "Warmup": (Warmup(Linear(1.0, 0.2), steps=5), lambda k: k / 5 if k < 5 else 1 - 0.8 * (k - 5) / (LAST - 5)),
    "Join": (Join([Linear(0.0, 0.6), 0.25], [11]), lambda k: 0.06 * k if k < 11 else 0.25),
    "FromLRScheduler": (
        FromLRScheduler(functools.partial(StepLR, step_size=6, gamma=0.5), value=0.8),
        lambda k: 0.8 * 0.5 ** (k // 6),
    ),
    "callable": (lambda at: 0.7 / (1 + at.step), lambda k: 0.7 / (1 + k)),
}
OPTIMIZERS = {
    "SGD": (Regression, functools.partial(SGD, lr=0.05, momentum=0.9)),
    "Adam": (Regression, functools.partial(Adam, lr=0.05)),
    "AdamW": (Regression, functools.partial(AdamW, lr=0.05)),
    "RMSprop": (Regression, functools.partial(RMSprop, lr=0.01)),
    "Muon": (WithoutVectors, functools.partial(Muon, lr=0.05)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_equal_those_of_a_plain_loop(schedule, optimizer):
    schedule, expected = SCHEDULES[schedule]
    module_class, make_optimizer = OPTIMIZERS[optimizer]
    module, twin = module_class(make_optimizer), module_class()
    train(module, WeightDecay(schedule))
    plain_loop(twin, make_optimizer(split(twin)), 3 * list(Batches()), map(expected, range(STEPS)))
    assert_same_weights(weights(module), weights(twin))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_step_uses_its_value_of_the_schedule(schedule):
    schedule, expected = SCHEDULES[schedule]
    witness = train(Regression(), WeightDecay(schedule))
    assert witness.decays() == pytest.approx([expected(k) for k in range(STEPS)], rel=1e-14, abs=1e-15)


@pytest.mark.parametrize(
    "schedule",
    [Linear(0.1, 0.9), Linear(1.0, 0.0), Cosine(0.04, 0.4), Exponential(1.0, 0.01), Polynomial(0.8, 0.2, power=3)],
    ids=printed,
)
def test_first_step_uses_the_start_value_and_last_step_the_end_value_exactly(schedule):
    decays = train(Regression(), WeightDecay(schedule)).decays()
    assert len(decays) == STEPS
    assert (decays[0], decays[-1]) == (schedule.start, schedule.end)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_follow_lr_equals_a_plain_loop_in_which_both_anneal(optimizer):
    module_class, make_optimizer = OPTIMIZERS[optimizer]
    anneal = functools.partial(CosineAnnealingLR, T_max=STEPS)
    module, twin = module_class(make_optimizer, anneal), module_class()
    train(module, WeightDecay(FollowLR(0.5)))
    plain = make_optimizer(split(twin))
    decays = [0.25 * (1 + math.cos(math.pi * k / STEPS)) for k in range(STEPS)]
    plain_loop(twin, plain, 3 * list(Batches()), decays, anneal(plain))
    assert_same_weights(weights(module), weights(twin))


def test_follow_lr_is_worth_its_value_at_the_peak_of_one_cycle():
    cycle = functools.partial(OneCycleLR, max_lr=0.2, total_steps=STEPS)
    witness = train(Regression(make_scheduler=cycle), WeightDecay(FollowLR(0.5)))
    assert witness.decays() == pytest.approx([0.5 * lr / 0.2 for lr in witness.lrs()], rel=1e-14, abs=0)


def test_a_schedule_by_epochs_sees_the_epoch_that_runs():
    witness = train(Regression(), WeightDecay(lambda at: 0.1 * at.epoch))
    assert witness.decays() == [0.0] * 7 + [0.1] * 7 + [0.2] * 7


def test_weights_equal_those_of_hand_made_groups_bit_for_bit():
    module, twin = Regression(), Regression()
    decaying, excluded = split(twin)
    twin.make_optimizer = lambda _: adamw([{**decaying, "weight_decay": 0.3}, excluded])
    train(module, WeightDecay(0.3))
    train(twin)
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_implementation(options):
    module, twin = Regression(functools.partial(AdamW, **options)), Regression()
    train(module, WeightDecay(Linear(0.0, 0.5)))
    plain_loop(twin, AdamW(split(twin), **options), 3 * list(Batches()), [0.5 * k / LAST for k in range(STEPS)])
    assert_same_weights(weights(module), weights(twin))


def test_gradient_clipping_leaves_the_decay_alone():
    module, twin = Regression(), Regression()
    train(module, WeightDecay(Linear(0.0, 0.5)), gradient_clip_val=0.01)
    plain = AdamW(split(twin), lr=0.1)
    plain.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(twin.parameters(), 0.01) and None)
    plain_loop(twin, plain, 3 * list(Batches()), [0.5 * k / LAST for k in range(STEPS)])
    assert_same_weights(weights(module), weights(twin))
