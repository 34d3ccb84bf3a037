"""Is the peak of a learning rate the largest that it had, or is known to get?"""

import pytest
import torch
from torch.optim import SGD

from lightning_regularize._steps.clock import Clock
from lightning_regularize._steps.hooks import UnsupportedOptimizerError
from lightning_regularize.schedules import Constant, FollowLR, Join, Linear, Position, value_at


def optimizer_of(**group):
    optimizer = SGD([torch.ones(1)], lr=0.5)
    optimizer.param_groups[0].update(group)
    return optimizer


def peak(clock, optimizer):
    return clock.position(optimizer.param_groups[0], 0).peak_lr


def test_a_rate_that_falls_has_the_peak_from_which_it_fell():
    """By hand: a scheduler of torch's leaves a note of it in the group."""
    clock, optimizer = Clock(), optimizer_of()
    assert peak(clock, optimizer) == 0.5
    optimizer.param_groups[0]["lr"] = 0.1
    assert peak(clock, optimizer) == 0.5
    assert clock.value(FollowLR(1.0), optimizer.param_groups[0], 1) == 0.2


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"lr": 0.1, "initial_lr": 0.3}, 0.3),  # of most schedulers
        ({"lr": 0.1, "initial_lr": 0.1, "max_lr": 0.4}, 0.4),  # of cycling ones, which begin below it
        ({"lr": 0.6, "initial_lr": 0.3}, 0.6),
    ],
    ids=["initial", "max", "now"],
)
def test_what_schedulers_write_into_a_group_counts(group, expected):
    assert peak(Clock(), optimizer_of(**group)) == expected


@pytest.mark.parametrize(
    ("saved", "expected"),
    [([[0.7]], 0.7), ([[0.2]], 0.5), ([[0.7, 0.9]], 0.5), ([], 0.5)],
    ids=["higher", "lower", "of more groups", "none"],
)
def test_a_checkpoint_tells_of_peaks_if_it_has_as_many_groups(saved, expected):
    clock, optimizer = Clock(), optimizer_of()
    clock.restore_peaks([optimizer], saved)
    assert peak(clock, optimizer) == expected


def test_what_follows_a_rate_needs_one_and_other_errors_stay_their_own():
    clock = Clock()
    with pytest.raises(UnsupportedOptimizerError, match=r"FollowLR.* needs a learning rate"):
        clock.value(FollowLR(1.0), {"params": [], "lr": None}, 0)
    with pytest.raises(ValueError, match="should give a finite number"):
        clock.value(lambda at: -1.0, {"params": [], "lr": 0.1}, 0)


@pytest.mark.parametrize("schedule", [Linear(0.0, 1.0), Join([FollowLR(1.0), 0.1], boundaries=[500])], ids=repr)
def test_values_that_are_known_ahead_are_those_of_each_step(schedule):
    clock, group = Clock(1000), optimizer_of().param_groups[0]
    for step in (0, 63, 64, 127, 128, 3, 900, 899, 999, 1000, 2000):
        assert clock.value(schedule, group, step) == value_at(schedule, Position(step, 1000))
    clock.total_steps = 4000
    assert clock.value(schedule, group, 2001) == value_at(schedule, Position(2001, 4000))


def test_a_schedule_is_not_taken_for_one_that_is_gone():
    clock, group = Clock(), optimizer_of().param_groups[0]
    assert [clock.value(Constant(value), group, 0) for value in range(100)] == list(range(100))
