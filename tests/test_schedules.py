"""Schedules give the published curves, exactly at both ends, at any position in any order."""

import copy
import json
import math
import pickle
import warnings
from dataclasses import FrozenInstanceError, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import CLI
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_regularize._checks import check_positive_integer, check_rounding
from lightning_regularize._steps.clock import Clock
from lightning_regularize.schedules import (
    Constant,
    Cosine,
    Exponential,
    FollowLR,
    FromLRScheduler,
    Join,
    Linear,
    Polynomial,
    Position,
    Schedule,
    ScheduleLike,
    Steps,
    Timescale,
    Warmup,
    as_schedule,
    check_total_steps,
    depends_on_step_alone,
    early_dropout,
    late_dropout,
    simulate,
    value_at,
)
from tests.naming import printed

halve_every_second_step = partial(StepLR, step_size=2, gamma=0.5)

EXAMPLES = [
    Constant(0.1),
    Linear(0.1, 0.0),
    Cosine(0.04, 0.4),
    Exponential(0.1, 0.001),
    Polynomial(0.1, 0.0, 2.0),
    Steps([0.1, 0.2, 0.3], [2, 5]),
    Steps([0.1, 0.2], [0.5]),
    Join([0.1, Linear(0.1, 0.0)], [0.25]),
    Warmup(Cosine(0.1, 0.0), steps=3),
    Warmup(Cosine(0.1, 0.0), fraction=0.2, start=0.05),
    FollowLR(0.1),
    Timescale(steps=30, schedule=Cosine(1.0, 0.0)),
    FromLRScheduler(halve_every_second_step, value=0.1),
]
unhurried = settings(deadline=None)  # a busy machine is no failure
every_example = pytest.mark.parametrize("schedule", EXAMPLES, ids=printed)


def after(step, total_steps=10, **rest):
    return Position(step, total_steps, **rest)


ON_THE_STEP_ALONE = [
    (0.1, True),
    (Constant(0.1), True),
    (Cosine(0.04, 0.4), True),
    (Steps([0.1, 0.2], [0.5]), True),
    (Join([0.1, Linear(0.1, 0.0)], [0.25]), True),
    (Warmup(Cosine(0.1, 0.0), steps=3), True),
    (FollowLR(0.1), False),
    (Timescale(steps=30), False),
    (Timescale(steps=30, schedule=Cosine(1.0, 0.0)), False),
    (Join([0.1, FollowLR(0.1)], [0.25]), False),
    (Warmup(FollowLR(0.1), steps=3), False),
    (FromLRScheduler(halve_every_second_step, value=0.1), False),  # a scheduler steps, and is not read ahead
    (lambda at: at.lr, False),
]


@pytest.mark.parametrize(("schedule", "expected"), ON_THE_STEP_ALONE, ids=printed)
def test_what_depends_on_the_step_alone(schedule, expected):
    assert depends_on_step_alone(schedule) is expected


# Position


def test_a_position_is_at_the_peak_of_the_learning_rate_by_default():
    assert Position(3, 10) == Position(step=3, total_steps=10, epoch=0, lr=1.0, peak_lr=1.0)


@pytest.mark.parametrize(
    ("step", "total_steps", "fraction"),
    [
        (0, 5, 0.0),
        (1, 5, 0.25),
        (4, 5, 1.0),
        (5, 5, 1.0),
        (99, 5, 1.0),
        (0, 1, 0.0),
        (7, 1, 0.0),
        (0, 2, 0.0),
        (1, 2, 1.0),
    ],
)
def test_fraction_is_0_at_the_first_step_and_1_at_the_last_and_past_it(step, total_steps, fraction):
    assert Position(step, total_steps).fraction == fraction


def test_fraction_of_an_unknown_horizon_is_an_error_that_asks_for_total_steps():
    with pytest.raises(ValueError, match=r"horizon is unknown. Give `total_steps`"):
        _ = Position(3, math.inf).fraction


def test_a_position_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        after(3).step = 4


# Curves, against numbers worked out by hand and numpy's closed forms


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
        (Linear(1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Linear(0.5, 1.5), [0.5, 0.75, 1.0, 1.25, 1.5]),
        (Cosine(1.0, 0.0), [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0]),
        (Cosine(0.0, 2.0), [0.0, 1.0 - math.sqrt(0.5), 1.0, 1.0 + math.sqrt(0.5), 2.0]),
        (Exponential(16.0, 1.0), [16.0, 8.0, 4.0, 2.0, 1.0]),
        (Exponential(0.01, 100.0), [0.01, 0.1, 1.0, 10.0, 100.0]),
        (Polynomial(1.0, 0.0, 2), [1.0, 0.5625, 0.25, 0.0625, 0.0]),
        (Polynomial(0.0, 1.0, 0.5), [0.0, 1 - math.sqrt(0.75), 1 - math.sqrt(0.5), 0.5, 1.0]),
        (Polynomial(3.0, 1.0, 1), [3.0, 2.5, 2.0, 1.5, 1.0]),
    ],
    ids=printed,
)
def test_a_curve_over_five_steps(schedule, values):
    assert simulate(schedule, total_steps=5) == pytest.approx(values, rel=1e-14, abs=1e-15)


FRACTIONS = np.linspace(0, 1, 100)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(0.04, 0.4), np.linspace(0.04, 0.4, 100)),
        (Cosine(0.04, 0.4), 0.22 - 0.18 * np.cos(np.pi * FRACTIONS)),
        (Exponential(0.3, 0.002), np.geomspace(0.3, 0.002, 100)),
        (Polynomial(0.4, 0.04, 0.9), 0.04 + 0.36 * (1 - FRACTIONS) ** 0.9),
    ],
    ids=printed,
)
def test_a_curve_is_its_closed_form(schedule, values):
    np.testing.assert_allclose(simulate(schedule, total_steps=100), values, rtol=1e-13)


def test_cosine_is_dinos_cosine_once_that_reaches_its_end():
    # dino/utils.py: final + 0.5 * (base - final) * (1 + cos(pi * i / n)) for i < n. Our last step is what i = n gives.
    base, final, n = 0.04, 0.4, 50
    dino = np.array([final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / n)) for i in range(n + 1)])
    np.testing.assert_allclose(simulate(Cosine(base, final), total_steps=n + 1), dino, rtol=1e-14)


def test_warmup_of_cosine_is_dinos_warmup_and_cosine_over_the_remaining_steps():
    rise, fall = np.linspace(0, 0.5, 10, endpoint=False), 0.25 + 0.25 * np.cos(np.pi * np.linspace(0, 1, 40))
    np.testing.assert_allclose(
        simulate(Warmup(Cosine(0.5, 0.0), steps=10), 50), np.concatenate([rise, fall]), rtol=1e-14, atol=1e-16
    )


values = st.floats(min_value=0.0, max_value=1e6)
positive_values = st.floats(min_value=1e-6, max_value=1e6)
curves = st.one_of(
    st.builds(Linear, values, values),
    st.builds(Cosine, values, values),
    st.builds(Exponential, positive_values, positive_values),
    st.builds(Polynomial, values, values, st.floats(min_value=0.05, max_value=20)),
)


@unhurried
@given(curves, st.integers(min_value=2, max_value=10**7))
def test_the_first_and_the_last_step_have_the_very_start_and_end(curve, total_steps):
    assert curve(Position(0, total_steps)) == curve.start
    assert curve(Position(total_steps - 1, total_steps)) == curve.end


@unhurried
@given(curves, st.integers(min_value=1, max_value=60))
def test_a_curve_stays_between_its_ends_and_never_turns(curve, total_steps):
    curve_values = simulate(curve, total_steps)
    assert min(curve.start, curve.end) <= min(curve_values)
    assert max(curve_values) <= max(curve.start, curve.end)
    assert curve_values == sorted(curve_values, reverse=curve.start > curve.end)


def test_rounding_leads_no_value_out_of_what_lies_between_the_ends():
    start, end = 0.8444218515250481, 0.8444218515250482  # the plain formula gives 0.8444218515250483 at 7/9
    assert set(simulate(Exponential(start, end), 10)) == {start, end}


@unhurried
@given(curves, st.integers(min_value=1, max_value=10**6), st.integers(min_value=0, max_value=10**6))
def test_past_the_end_a_curve_holds_its_last_value(curve, total_steps, steps_past):
    end = Position(total_steps - 1, total_steps)
    assert curve(replace(end, step=end.step + steps_past)) == curve(end)


@unhurried
@given(curves, st.randoms())
def test_a_curve_is_a_function_of_the_position_in_whatever_order_it_is_read(curve, random):
    in_order = simulate(curve, 20)
    steps = random.sample(range(20), 20)
    assert [curve(Position(step, 20)) for step in steps] == [in_order[step] for step in steps]


@pytest.mark.parametrize("curve", [Linear(0.5, 0.1), Cosine(0.5, 0.1), Exponential(0.5, 0.1), Polynomial(0.5, 0.1, 2)])
def test_a_run_of_one_step_has_the_start_and_a_run_of_two_has_both_ends(curve):
    assert simulate(curve, 1) == [0.5]
    assert simulate(curve, 2) == [0.5, 0.1]


# Steps


@pytest.mark.parametrize(
    ("boundaries", "total_steps", "values"),
    [
        ([2, 3], 5, [1.0, 1.0, 2.0, 3.0, 3.0]),
        ([0.4, 0.6], 5, [1.0, 1.0, 2.0, 3.0, 3.0]),
        ([2, 0.75], 4, [1.0, 1.0, 2.0, 3.0]),
        ([0.25, 3], 4, [1.0, 2.0, 2.0, 3.0]),
        ([0, 2], 3, [2.0, 2.0, 3.0]),
        ([1, 1.0], 3, [1.0, 2.0, 2.0]),
        ([0.3, 0.4], 2, [1.0, 3.0]),  # both round to step 1: the middle stair has no step
        ([2, 9], 4, [1.0, 1.0, 2.0, 2.0]),
        ([0.2, 0.9], 1, [2.0]),  # these round to steps 0 and 1
    ],
)
def test_steps(boundaries, total_steps, values):
    assert simulate(Steps([1, 2, 3], boundaries), total_steps) == values


def test_a_boundary_of_1_is_a_step_and_of_1_point_0_the_whole_run():
    assert simulate(Steps([0.1, 0.2], [1]), 4) == [0.1, 0.2, 0.2, 0.2]
    assert simulate(Steps([0.1, 0.2], [1.0]), 4) == [0.1, 0.1, 0.1, 0.1]
    assert Steps([0.1, 0.2], [1]) != Steps([0.1, 0.2], [1.0])
    assert Join([0.1, 0.2], [1]) != Join([0.1, 0.2], [1.0])
    assert Steps([0.1, 0.2], [np.int64(1)]) == Steps((0.1, 0.2), (1,))


def test_one_value_needs_no_boundary():
    assert simulate(Steps([0.1], []), 2) == [0.1, 0.1]


def test_past_the_end_the_stairs_hold_although_a_boundary_lies_there():
    assert Steps([0.1, 0.2], [100])(Position(200, total_steps=50)) == 0.1


@pytest.mark.parametrize("joined", [Steps([1, 2, 3], [80, 0.5]), Join([1, 2, 3], [80, 0.5])], ids=printed)
def test_mixed_boundaries_that_do_not_increase_in_this_run_are_an_error_at_the_call(joined):
    assert joined(Position(0, total_steps=200)) == 1.0
    with pytest.raises(ValueError, match=r"should increase, got \(80, 0.5\): of 100 steps these are \[80, 50\]"):
        joined(Position(0, total_steps=100))


# Join and Warmup


def test_join_gives_each_schedule_its_own_run():
    seen = []

    def note(at):
        seen.append(at)
        return 0.0

    simulate(Join([0.5, note, 0.5], [2, 0.5]), total_steps=10, steps_per_epoch=4, lr=lambda step: 0.1 * step)
    assert seen == [
        Position(0, 3, epoch=0, lr=0.1 * 2, peak_lr=0.1 * 9, steps_per_epoch=4),
        Position(1, 3, epoch=0, lr=0.1 * 3, peak_lr=0.1 * 9, steps_per_epoch=4),
        Position(2, 3, epoch=1, lr=0.1 * 4, peak_lr=0.1 * 9, steps_per_epoch=4),
    ]


@pytest.mark.parametrize("boundaries", [[3], [0.5]])
def test_joined_curves_have_their_exact_ends(boundaries):
    assert simulate(Join([Linear(0.0, 0.4), Cosine(0.3, 0.1)], boundaries), 6) == pytest.approx(
        [0.0, 0.2, 0.4, 0.3, 0.2, 0.1], rel=1e-15, abs=0
    )


def test_join_past_the_end_holds():
    join = Join([0.1, Linear(0.2, 0.7)], [4])
    assert join(Position(9, 10)) == join(Position(50, 10)) == 0.7


@pytest.mark.parametrize(
    ("warmup", "values"),
    [
        (Warmup(1.0, 4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (Warmup(1.0, steps=2, start=0.5), [0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        (Warmup(1.0, steps=2, start=2.0), [2.0, 1.5, 1.0, 1.0, 1.0, 1.0]),
        (Warmup(1.0, fraction=0.5), [0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        (Warmup(Linear(1.0, 0.0), steps=1), [0.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (Warmup(Linear(1.0, 0.0), steps=0), [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        (Warmup(Linear(1.0, 0.0), fraction=0.0), [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        (Warmup(Linear(0.6, 0.0), steps=6), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (Warmup(Linear(1.2, 0.0), steps=12), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
    ids=printed,
)
def test_warmup(warmup, values):
    assert simulate(warmup, 6) == pytest.approx(values, rel=1e-14, abs=1e-15)


def test_warmup_of_a_value_that_follows_the_learning_rate_reads_the_current_one():
    assert simulate(Warmup(FollowLR(0.4), steps=2), 4, lr=[1.0, 0.5, 1.0, 0.25]) == [0.0, 0.1, 0.4, 0.1]


def test_a_warmup_longer_than_the_run_holds_past_the_end():
    assert Warmup(1.0, steps=10)(Position(8, total_steps=5)) == 0.4


def test_a_warmup_longer_than_the_run_leads_to_the_first_value_all_the_same():
    assert simulate(Warmup(Join([0.2, 0.8], [0.9]), steps=4), 3) == pytest.approx([0.0, 0.05, 0.1], rel=1e-15, abs=0)


# Early and late dropout


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (early_dropout(0.4, until=5), [0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0]),
        (early_dropout(0.4, until=0.625), [0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0]),
        (early_dropout(0.4, until=0), [0.0] * 8),
        (early_dropout(0.7, until=1.0), [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        (late_dropout(0.4, start=5), [0.0] * 5 + [0.4] * 3),
        (late_dropout(0.4, start=0.625), [0.0] * 5 + [0.4] * 3),
        (late_dropout(0.4, start=0), [0.4] * 8),
        (late_dropout(0.4, start=1.0), [0.0] * 8),
    ],
    ids=printed,
)
def test_early_and_late_dropout(schedule, expected):
    assert simulate(schedule, 8) == pytest.approx(expected, rel=1e-6, abs=0)


def test_early_and_late_dropout_end_and_begin_at_50_of_300_epochs():
    early, late = (simulate(schedule(0.1), 3000) for schedule in (early_dropout, late_dropout))
    assert early[:500] == pytest.approx(
        np.linspace(0.1, 0, 500), rel=1e-6, abs=0
    )  # as drop_scheduler.py of facebookresearch/dropout
    assert set(early[500:]) == {0.0}
    assert late == [0.0] * 500 + [0.1] * 2500


@pytest.mark.parametrize("make", [early_dropout, late_dropout])
@pytest.mark.parametrize(("p", "error"), [(1.0, ValueError), (-0.1, ValueError), ("0.1", TypeError)])
def test_early_and_late_dropout_refuse_what_is_no_rate(make, p, error):
    with pytest.raises(error, match="`p` should be"):
        make(p)


# FollowLR


def test_follow_lr_is_the_value_at_the_peak_and_proportional_below():
    assert simulate(FollowLR(0.1), 4, lr=[0.1, 0.05, 0.025, 0.0]) == [0.1, 0.05, 0.025, 0.0]


def test_follow_lr_is_zero_where_the_peak_is_zero():
    assert FollowLR(0.1)(after(3, lr=0.0, peak_lr=0.0)) == 0.0


# Timescale


@pytest.mark.parametrize("kind", ["epochs", "steps", "fraction"])
def test_a_weight_without_gradient_shrinks_to_one_over_e_in_a_timescale(kind):
    """Of AdamW itself, at the peak rate: (1 - 1 / 200)^200 is 1 / e to 0.3 %."""
    timescale = Timescale(**{"epochs": {"epochs": 4}, "steps": {"steps": 200}, "fraction": {"fraction": 0.5}}[kind])
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    for value in simulate(timescale, total_steps=400, steps_per_epoch=50, lr=1e-3)[:200]:
        optimizer.param_groups[0]["weight_decay"] = value
        optimizer.step()
    assert weight.tolist() == pytest.approx([math.exp(-1)] * 3, rel=3e-3, abs=0)


@pytest.mark.parametrize("lr", [[1e-3, 2e-3, 5e-4], [2e-3] * 3, [0.0, 2e-3, 0.0]])
def test_a_timescale_counts_at_the_peak_of_the_rate(lr):
    assert simulate(Timescale(steps=50), 3, lr=lr) == pytest.approx([1 / (2e-3 * 50)] * 3, rel=1e-12, abs=0)


@pytest.mark.parametrize("schedule", [Linear(1, 0), Constant(0.5), Steps([1, 3], [2]), lambda at: at.step])
def test_a_timescale_is_multiplied_by_its_schedule(schedule):
    values, plain = simulate(schedule, 4), simulate(Timescale(steps=10), 4)
    expected = [value * factor for value, factor in zip(plain, values, strict=True)]
    assert simulate(Timescale(steps=10, schedule=schedule), 4) == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_timescale_is_zero_where_the_peak_is_zero():
    assert Timescale(steps=10)(after(3, lr=0.0, peak_lr=0.0)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Exactly one of `epochs`, `steps` and `fraction` should be given, got none"),
        ({"epochs": 1, "steps": 10}, ValueError, "Exactly one of"),
        ({"steps": 0}, ValueError, "`steps` should be positive, got 0"),
        ({"epochs": -1.0}, ValueError, "`epochs` should be"),
        ({"fraction": math.inf}, ValueError, "`fraction` should be"),
        ({"steps": "10"}, TypeError, "`steps` should be"),
        ({"steps": 10, "schedule": "Cosine"}, TypeError, "`schedule` should be"),
    ],
)
def test_a_timescale_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Timescale(**arguments)


@pytest.mark.parametrize("timescale", [Timescale(epochs=2), Timescale(fraction=0.1)])
def test_a_timescale_needs_to_know_the_length_of_its_unit(timescale):
    with pytest.raises(ValueError, match=r"needs to know how many steps an epoch or the run has: give `steps`"):
        timescale(Position(step=3, total_steps=math.inf))


def test_what_needs_the_end_of_the_run_in_a_timescale():
    assert Timescale(fraction=0.1).needs_total_steps
    assert Timescale(steps=1, schedule=Cosine(1, 0)).needs_total_steps
    assert not Timescale(epochs=1).needs_total_steps


# FromLRScheduler, against torch's own loop


def warmup_then_cosine(optimizer):
    first = LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return SequentialLR(optimizer, [first, CosineAnnealingLR(optimizer, T_max=16)], milestones=[4])


def chained(optimizer):
    return ChainedScheduler([ConstantLR(optimizer, 0.1, total_iters=5), ExponentialLR(optimizer, 0.9)])


def inverse_square_root(step):
    return (step + 1) ** -0.5


FACTORIES = [
    halve_every_second_step,
    partial(CosineAnnealingLR, T_max=20, eta_min=0.01),
    partial(CosineAnnealingWarmRestarts, T_0=5),
    partial(OneCycleLR, max_lr=0.5, total_steps=20),
    partial(LambdaLR, lr_lambda=inverse_square_root),
    partial(PolynomialLR, total_iters=12, power=2.0),
    partial(CyclicLR, base_lr=0.1, max_lr=0.3, step_size_up=4),
    warmup_then_cosine,
    chained,
]
every_factory = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: getattr(f, "func", f).__name__)


def torch_learning_rates(factory, value, steps):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=value)
    scheduler = factory(optimizer)
    lrs = []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs[:steps]


@every_factory
def test_an_lr_scheduler_gives_the_values_that_it_gives_torch(factory):
    # 19 and not 20 steps: the oracle steps once more, and OneCycleLR refuses a step past its end
    assert simulate(FromLRScheduler(factory, value=0.2), 19) == torch_learning_rates(factory, 0.2, 19)


@every_factory
def test_an_lr_scheduler_can_be_read_in_any_order(factory):
    schedule = FromLRScheduler(factory, value=0.2)
    expected = torch_learning_rates(factory, 0.2, 19)
    order = [7, 7, 6, 18, 17, 3, 12, 0, 18, 0]
    assert [schedule(Position(step, 19)) for step in order] == [expected[step] for step in order]


def test_going_forward_steps_the_scheduler_once_a_step():
    calls = []
    schedule = FromLRScheduler(partial(LambdaLR, lr_lambda=lambda step: calls.append(step) or 1.0))
    simulate(schedule, 50)
    assert calls == list(range(50))


def test_past_the_end_an_lr_scheduler_holds_where_torch_would_refuse():
    schedule = FromLRScheduler(partial(OneCycleLR, max_lr=0.5, total_steps=20))
    assert schedule(Position(500, total_steps=20)) == schedule(Position(19, total_steps=20))


@every_factory
def test_an_lr_scheduler_warns_of_nothing_and_leaves_the_global_random_state(factory):
    before = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = FromLRScheduler(factory, value=0.2)
        simulate(schedule, 20)
        schedule(Position(3, 20))
    assert not caught
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("steps_before", [0, 7])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda schedule: pickle.loads(pickle.dumps(schedule))])
def test_a_copy_of_a_running_lr_scheduler_continues_with_the_same_values(copied, steps_before):
    schedule = FromLRScheduler(warmup_then_cosine, value=0.2)
    expected = simulate(schedule, 20)
    schedule(Position(steps_before, 20))
    twin = copied(schedule)
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    assert simulate(twin, 20) == expected


def test_lr_schedulers_compare_by_factory_and_value_not_by_progress():
    running, fresh = FromLRScheduler(chained, value=0.2), FromLRScheduler(chained, value=0.2)
    simulate(running, 5)
    assert running == fresh
    assert fresh != FromLRScheduler(chained, value=0.3)
    assert fresh != FromLRScheduler(warmup_then_cosine, value=0.2)


def test_an_lr_scheduler_works_where_tensors_are_not_made_as_usual():
    with torch.inference_mode(), torch.device("meta"):
        assert simulate(FromLRScheduler(halve_every_second_step), 3) == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            ReduceLROnPlateau,
            "`factory` should return a torch LRScheduler that needs no metric, got a ReduceLROnPlateau",
        ),
        (lambda optimizer: optimizer, "got a SGD"),
        (0.1, "`factory` should be a callable that takes an optimizer, got 0.1"),
    ],
)
def test_what_is_no_lr_scheduler_is_refused(factory, message):
    with pytest.raises(TypeError, match=message):
        FromLRScheduler(factory)


# Which schedules need a horizon


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(0.1),
        FollowLR(0.1),
        FromLRScheduler(halve_every_second_step),
        Steps([0.1, 0.2], [3]),
        Join([Linear(0.1, 0.2), Cosine(0.2, 0.1), 0.1], [3, 9]),
        Join([Steps([0.1, 0.2], [0.5]), FollowLR(0.1)], [3]),
        Warmup(0.1, steps=3),
        Warmup(lambda at: 0.1 * at.step, steps=3),
    ],
    ids=printed,
)
def test_lengths_in_steps_serve_an_unknown_horizon(schedule):
    assert not schedule.needs_total_steps
    endless, finite = ([schedule(Position(step, total)) for step in range(20)] for total in (math.inf, 20))
    assert endless == finite


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(0.1, 0.2),
        Cosine(0.1, 0.2),
        Exponential(0.1, 0.2),
        Polynomial(0.1, 0.2, 2),
        Steps([0.1, 0.2, 0.3], [3, 0.5]),
        Join([0.1, 0.2], [0.5]),
        Join([0.1, Linear(0.1, 0.2)], [3]),
        Warmup(Linear(0.1, 0.2), steps=3),
        Warmup(0.1, fraction=0.1),
        Join([0.1, Warmup(0.2, fraction=0.1)], [3]),
    ],
    ids=printed,
)
def test_fractions_of_an_unknown_horizon_are_an_error(schedule):
    assert schedule.needs_total_steps
    with pytest.raises(ValueError, match="horizon is unknown"):
        schedule(Position(5, math.inf))


# All schedules


@every_example
def test_a_schedule_survives_pickling_and_copying(schedule):
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), copy.copy(schedule)):
        assert type(twin) is type(schedule)
        assert simulate(twin, 12) == simulate(schedule, 12)


@every_example
def test_a_schedule_is_equal_to_a_copy_and_to_no_other_example(schedule):
    assert copy.copy(schedule) == schedule
    assert sum(schedule == other for other in EXAMPLES) == 1
    assert len({schedule, copy.copy(schedule)}) == 1


@pytest.mark.parametrize("schedule", EXAMPLES[:-1], ids=printed)  # a factory prints as no expression
def test_a_schedule_prints_as_the_expression_that_makes_it(schedule):
    assert eval(repr(schedule)) == schedule


@every_example
def test_a_schedule_cannot_be_changed(schedule):
    with pytest.raises(FrozenInstanceError):
        schedule.needs_total_steps = True


@every_example
@unhurried
@given(st.integers(min_value=0, max_value=300), st.integers(min_value=1, max_value=100))
def test_every_position_has_a_finite_non_negative_python_float(schedule, step, total_steps):
    value = schedule(Position(step, total_steps))
    assert type(value) is float
    assert 0 <= value < math.inf


@pytest.mark.parametrize(
    ("positional", "by_keyword"),
    [
        (Constant(0.1), Constant(value=0.1)),
        (Linear(0.1, 0.2), Linear(end=0.2, start=0.1)),
        (Cosine(0.1, 0.2), Cosine(end=0.2, start=0.1)),
        (Exponential(0.1, 0.2), Exponential(end=0.2, start=0.1)),
        (Polynomial(0.1, 0.2, 3), Polynomial(power=3, end=0.2, start=0.1)),
        (Steps([0.1, 0.2], [3]), Steps(boundaries=(3,), values=(0.1, 0.2))),
        (Join([0.1, 0.2], [3]), Join(boundaries=(3,), schedules=(Constant(0.1), Constant(0.2)))),
        (Warmup(0.1, 3), Warmup(steps=3, schedule=Constant(0.1), start=0.0)),
        (FollowLR(0.1), FollowLR(value=0.1)),
        (FromLRScheduler(chained), FromLRScheduler(factory=chained, value=1.0)),
    ],
    ids=printed,
)
def test_arguments_by_position_or_keyword(positional, by_keyword):
    assert positional == by_keyword


def test_numpy_numbers_become_python_numbers():
    schedule = Linear(np.float64(0.1), np.int64(1))
    assert (type(schedule.start), type(schedule.end)) == (float, float)
    assert schedule == Linear(0.1, 1.0)
    assert type(check_total_steps(np.int64(3))) is type(check_positive_integer(np.int64(3), "")) is int
    check_rounding("stochastic", seed=np.int64(3))


# What is refused


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-math.inf, ValueError),
        (np.float32("nan"), ValueError),
        (True, TypeError),
        (np.True_, TypeError),
        ("0.1", TypeError),
        (None, TypeError),
        (1j, TypeError),
        (torch.tensor(0.1), TypeError),
        ([0.1], TypeError),
    ],
    ids=printed,
)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("value", Constant),
        ("start", lambda bad: Linear(bad, 0.1)),
        ("end", lambda bad: Linear(0.1, bad)),
        ("start", lambda bad: Cosine(bad, 0.1)),
        ("end", lambda bad: Exponential(0.1, bad)),
        ("power", lambda bad: Polynomial(0.1, 0.2, bad)),
        ("values", lambda bad: Steps([0.1, bad], [1])),
        ("start", lambda bad: Warmup(0.1, 1, start=bad)),
        ("value", FollowLR),
        ("value", lambda bad: FromLRScheduler(chained, value=bad)),
        ("lr", lambda bad: simulate(0.1, 1, lr=[bad])),
    ],
)
def test_a_value_should_be_a_finite_number_that_is_not_negative(name, make, bad, error):
    with pytest.raises(error, match=f"`{name}` should be a finite number that is not negative, got "):
        make(bad)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Exponential(0.0, 0.1), ValueError, "`start` and `end` should be positive, got 0.0 and 0.1"),
        (lambda: Exponential(0.1, 0), ValueError, "`start` and `end` should be positive, got 0.1 and 0.0"),
        (lambda: Polynomial(0.1, 0.2, 0), ValueError, "`power` should be positive, got 0.0"),
        (lambda: Steps([0.1], [3]), ValueError, "`values` should have one element more than `boundaries`, got 1 and 1"),
        (lambda: Steps([], []), ValueError, "`values` should have one element more than `boundaries`, got 0 and 0"),
        (
            lambda: Join([0.1, 0.2], []),
            ValueError,
            "`schedules` should have one element more than `boundaries`, got 2 and 0",
        ),
        (lambda: Steps([1, 2, 3], [3, 3]), ValueError, r"strictly increasing, got \(3, 3\)"),
        (lambda: Steps([1, 2, 3], [0.5, 0.2]), ValueError, r"strictly increasing, got \(0.5, 0.2\)"),
        (lambda: Join([1, 2, 3, 4], [5, 0.5, 3]), ValueError, r"strictly increasing, got \(5, 0.5, 3\)"),
        (lambda: Steps([1, 2], [-1]), ValueError, "`boundaries` should be an integer of at least 0, got -1"),
        (lambda: Steps([1, 2], [1.5]), ValueError, r"`boundaries` should be in \[0, 1\] as a fraction .* got 1.5"),
        (lambda: Steps([1, 2], [-0.5]), ValueError, "`boundaries` should be a finite number .* got -0.5"),
        (lambda: Steps([1, 2], [True]), TypeError, "`boundaries` should be an integer of at least 0, got True"),
        (lambda: Steps([1, 2], ["3"]), TypeError, "`boundaries` should be a finite number .* got '3'"),
        (lambda: Steps([1, 2], 3), TypeError, "`boundaries` should be a sequence, got 3"),
        (lambda: Steps(0.1, []), TypeError, "`values` should be a sequence, got 0.1"),
        (lambda: Join("ab", [3]), TypeError, "`schedules` should be a sequence, got 'ab'"),
        (lambda: Join([0.1, "cosine"], [3]), TypeError, "`schedules` should be a number, .* got 'cosine'"),
        (lambda: Warmup(0.1), ValueError, "Either `steps` or `fraction` should be given, got None and None"),
        (lambda: Warmup(0.1, 3, 0.1), ValueError, "Either `steps` or `fraction` should be given, got 3 and 0.1"),
        (lambda: Warmup(0.1, steps=-1), ValueError, "`steps` should be an integer of at least 0, got -1"),
        (lambda: Warmup(0.1, steps=0.1), TypeError, "`steps` should be an integer of at least 0, got 0.1"),
        (lambda: Warmup(0.1, steps=True), TypeError, "`steps` should be an integer of at least 0, got True"),
        (lambda: Warmup(0.1, fraction=True), TypeError, "`fraction` should be a finite number .* got True"),
        (lambda: Warmup(0.1, fraction=-0.1), ValueError, "`fraction` should be a finite number .* got -0.1"),
        (lambda: Warmup(0.1, fraction=1.1), ValueError, r"`fraction` should be in \[0, 1\] .* got 1.1"),
        (lambda: Warmup(Cosine, steps=1), TypeError, "`schedule` should be a number, .* got <class .*Cosine'>"),
        (lambda: as_schedule(None), TypeError, "`value` should be a number, .* got None"),
        (lambda: as_schedule(True), TypeError, "`value` should be a number, .* got True"),
        (
            lambda: as_schedule(-0.1, name="strength"),
            ValueError,
            "`strength` should be a finite number that is not negative, got -0.1",
        ),
        (lambda: simulate(0.1, 0), ValueError, "`total_steps` should be an integer of at least 1, got 0"),
        (lambda: simulate(0.1, math.inf), TypeError, "`total_steps` should be an integer of at least 1, got inf"),
        (lambda: simulate(0.1, 3, steps_per_epoch=0), ValueError, "`steps_per_epoch` should be .* at least 1, got 0"),
        (lambda: simulate(0.1, 3, lr=[1.0]), ValueError, "`lr` should have one element for each of the 3 steps, got 1"),
        (lambda: simulate(0.1, 3, lr=None), TypeError, "`lr` should be a sequence, got None"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_expected_and_found(make, error, message):
    with pytest.raises(error, match=message):
        make()


# as_schedule, value_at, simulate


def test_as_schedule_makes_numbers_constant_and_keeps_what_can_be_called():
    assert as_schedule(1) == as_schedule(np.float32(1)) == Constant(1.0)
    cosine = Cosine(0.1, 0.2)
    assert as_schedule(cosine) is cosine
    assert as_schedule(inverse_square_root) is inverse_square_root


@pytest.mark.parametrize("result", [math.nan, math.inf, -1e-9, None, "0.1", True, torch.tensor(0.1), np.float64("nan")])
def test_a_result_one_cannot_train_with_names_schedule_and_position(result):
    def broken(at):
        return result

    with pytest.raises(ValueError, match=r"broken at .* should give a finite number .* at Position\(step=3, total"):
        value_at(broken, after(3))
    with pytest.raises(ValueError, match=r"broken at .* should give a finite number .* at Position\(step=1, total"):
        value_at(Join([0.1, broken], [2]), after(3))


def test_value_at_reads_numbers_schedules_and_callables():
    assert value_at(0.1, after(3)) == 0.1
    assert value_at(Linear(0.0, 0.9), after(3)) == pytest.approx(0.3, rel=1e-15, abs=0)
    result = value_at(lambda at: np.float32(at.step), after(3))
    assert (result, type(result)) == (3.0, float)


def test_a_subclass_with_a_call_alone_is_a_schedule():
    class Half(Schedule):
        def __call__(self, at):
            return 0.5

    assert not Half().needs_total_steps
    assert simulate(Warmup(Half(), steps=1), 3) == [0.0, 0.5, 0.5]


def test_a_schedule_without_a_call_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


def test_simulate_counts_epochs_and_finds_the_peak():
    seen = []
    simulate(lambda at: seen.append(at) or 0.0, 3, steps_per_epoch=2, lr=(0.1, 0.3, 0.2))
    assert seen == [Position(0, 3, 0, 0.1, 0.3, 2), Position(1, 3, 0, 0.3, 0.3, 2), Position(2, 3, 1, 0.2, 0.3, 2)]


@pytest.mark.parametrize("lr", [[0.0, 0.2, 0.4], np.array([0.0, 0.2, 0.4]), lambda step: 0.2 * step])
def test_simulate_takes_learning_rates_in_any_form(lr):
    assert simulate(FollowLR(1.0), 3, lr=lr) == [0.0, 0.5, 1.0]


def test_simulate_at_a_constant_learning_rate_is_at_its_peak():
    assert simulate(FollowLR(0.3), 2, lr=1e-3) == [0.3, 0.3]


# LightningCLI


def in_yaml(name, **arguments):
    return {"class_path": f"lightning_regularize.schedules.{name}", "init_args": arguments}


def takes_schedule(weight_decay: float | Schedule = 0.1):
    return weight_decay


def takes_anything(weight_decay: ScheduleLike = 0.1):
    return weight_decay


@pytest.mark.parametrize("function", [takes_schedule, takes_anything])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (0.3, 0.3),
        (in_yaml("Constant", value=0.1), Constant(0.1)),
        (in_yaml("Linear", start=0.1, end=0), Linear(0.1, 0.0)),
        (in_yaml("Cosine", start=0.1, end=0.0), Cosine(0.1, 0.0)),
        ({"class_path": "Cosine", "init_args": {"start": 0.1, "end": 0.0}}, Cosine(0.1, 0.0)),
        (in_yaml("Exponential", start=0.1, end=0.01), Exponential(0.1, 0.01)),
        (in_yaml("Polynomial", start=0.1, end=0.0, power=2), Polynomial(0.1, 0.0, 2)),
        (in_yaml("Steps", values=[0.1, 1, 2], boundaries=[1, 1.0]), Steps([0.1, 1, 2], [1, 1.0])),
        (in_yaml("FollowLR", value=0.1), FollowLR(0.1)),
        (in_yaml("Timescale", epochs=2.0), Timescale(epochs=2.0)),
        (in_yaml("Warmup", schedule=0.1, fraction=0.2), Warmup(0.1, fraction=0.2)),
        (
            in_yaml("Warmup", schedule=in_yaml("Cosine", start=0.1, end=0.0), steps=10),
            Warmup(Cosine(0.1, 0.0), steps=10),
        ),
        (
            in_yaml("Join", schedules=[0.1, in_yaml("Linear", start=0.1, end=0.0)], boundaries=[0.5]),
            Join([0.1, Linear(0.1, 0.0)], [0.5]),
        ),
    ],
    ids=lambda case: repr(case) if isinstance(case, Schedule) else "",
)
def test_lightning_cli_builds_a_schedule(function, config, expected):
    assert CLI(function, args=[f"--weight_decay={json.dumps(config)}"]) == expected


def test_lightning_cli_builds_an_lr_scheduler_factory():
    config = in_yaml(
        "FromLRScheduler",
        factory={"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.5}},
        value=0.4,
    )
    schedule = CLI(takes_schedule, args=[f"--weight_decay={json.dumps(config)}"])
    assert simulate(schedule, 5) == [0.4, 0.4, 0.2, 0.2, 0.1]


def test_a_schedule_is_no_function_of_the_step():
    with pytest.raises(TypeError, match=r"`lr` should be .* a function of the step, got Cosine.*simulate"):
        simulate(FollowLR(0.1), 10, lr=Cosine(1e-3, 0.0))


def test_a_subclass_may_look_at_more_than_the_step():
    class OfRate(Cosine):
        def __call__(self, at):
            return super().__call__(at) * at.lr

    group = {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5}
    for schedule in (OfRate(1.0, 1.0), Join([OfRate(1.0, 1.0), 1.0], [3])):
        clock = Clock(total_steps=5)
        assert [clock.value(schedule, {**group, "lr": lr}, step) for step, lr in enumerate([0.5, 0.1])] == [0.5, 0.1]
