"""Does a step cost a constant number of launches, and does it wait for the device only where it is logged?"""

import functools

import pytest
import torch

from tests.rehearsal.device import is_possible, rehearse
from tests.rehearsal.steps import observe, observe_each, train
from tests.rehearsal.table import ROWS

pytestmark = pytest.mark.skipif(not is_possible(), reason="this torch knows no devices written in Python")

FEW, MANY = 2, 8  # layers; `python -m tests.rehearsal` takes 75 and 300

# What waits, in the singular value decomposition of torch. One that is here and does not wait is a failure.
WAITING = dict.fromkeys(
    ("spectral ball", "rank 2", "nuclear norm, gradient", "nuclear norm, proximal"),
    pytest.mark.xfail(strict=True, raises=AssertionError),
)


@functools.cache
def seen(row, *, logs=False):
    """What the callback does in a step with few layers, and in one with many."""
    return observe_each(row.make, [{"layers": layers, "logs": logs, **row.options} for layers in (FEW, MANY)])


def rows(chosen, marks=None):
    marked = [pytest.param(row, id=row.name, marks=(marks or {}).get(row.name, ())) for row in chosen]
    return pytest.mark.parametrize("row", marked)


def check_launches(row, bound, **options):
    few, many = (found.launched for found in seen(row, **options))
    assert bound is None or few.total() <= bound, few
    assert many.total() == few.total(), many - few


LOGGED = [row for row in ROWS if row.transfers]


@rows(ROWS)
def test_launches_of_a_step(row):
    check_launches(row, row.launches)


@rows(LOGGED)
def test_launches_of_a_step_that_is_logged(row):
    check_launches(row, row.logged_launches, logs=True)


@rows(ROWS, WAITING)
def test_no_step_waits_that_is_not_logged(row):
    few, _ = seen(row)
    assert not few.waited


@rows(LOGGED)
def test_a_step_that_is_logged_waits_once(row):
    few, _ = seen(row, logs=True)
    assert few.waited.total() == row.transfers, few.waited


# Other optimizers and precisions


@rows(ROWS)
def test_no_device_is_mixed_with_another(row):
    rehearse(train_in_other_precisions, row)


def train_in_other_precisions(observer, row):
    half = [{"dtype": torch.bfloat16}] if row.takes_half else []
    for options in (*half, {"scaler": True}, {"scaler": True, "fused": True}):
        train(observer, row.make, 1, **options, **row.options)


@rows([row for row in ROWS if "Decay" in row.name])
def test_a_learning_rate_on_the_device_is_read_by_the_clock_only(row):
    at_a_rate_on_the_host = observe(row.make, 1, fused=True).waited
    more = observe(row.make, 1, fused=True, tensor_lr=True).waited - at_a_rate_on_the_host
    assert not [place for place in more if "clock.py" not in place]
