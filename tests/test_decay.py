"""Does one step of each manner of decay do what its formula says, in every precision?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_regularize.decay import (
    couple_,
    decay_,
    decay_cautiously_,
    decay_stochastic_,
    next_multiplier,
    pull_,
)
from tests.models import randn
from tests.properties import assert_same_bits

HALF = [torch.bfloat16, torch.float16]
SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # between 1 and 2
each_half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))
fast = settings(max_examples=60, deadline=None)


def numbers(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


# --- the formulas, by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_decay(share):
    weight = numbers(1.0, -2.0, 0.0)
    decay_(weight, share)
    assert weight.tolist() == [0.75, -1.5, 0.0]


@pytest.mark.parametrize("weight_decay", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_couple(weight_decay):
    weight, gradient = numbers(1.0, -2.0), numbers(0.25, 0.25)
    couple_(gradient, weight, weight_decay)
    assert gradient.tolist() == [0.75, -0.75]
    assert weight.tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (1.0, 0.5, 0.25),
        (1.0, 1.5, 1.5),
        (-1.0, -0.5, -0.25),
        (-1.0, -1.5, -1.5),
        (1.0, 1.0, 0.75),
        (0.0, 0.5, 0.5),
    ],
    ids=["shrinks", "grows", "negative shrinks", "negative grows", "stays", "from zero"],
)
def test_cautious_decay(before, after, expected):
    weight = numbers(after)
    decay_cautiously_(weight, numbers(before), 0.25)
    assert weight.item() == expected


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf])
def test_shares_are_from_nothing_to_all(share):
    weight, other = torch.ones(3), torch.zeros(3)
    for act in (
        lambda: decay_(weight, share),
        lambda: decay_stochastic_(weight.bfloat16(), share, seed=0),
        lambda: decay_cautiously_(weight, other, share),
        lambda: pull_(weight, other, share),
    ):
        with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
            act()
    assert weight.tolist() == [1.0, 1.0, 1.0]


def test_pull():
    weight = numbers(1.0, 3.0, -1.0)
    pull_(weight, numbers(1.0, 1.0, 1.0), 0.5)
    assert weight.tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("multiplier", "square_norm", "bound", "numel", "expected"),
    [
        (0.0, 3.0, 1.0, 4.0, 0.5),
        (0.5, 3.0, 1.0, 4.0, 1.0),
        (0.5, 1.0, 2.0, 4.0, 0.25),
        (0.1, 1.0, 9.0, 4.0, 0.0),
        (0.7, 1.0, math.inf, 4.0, 0.0),
    ],
    ids=["outside", "still outside", "inside", "never negative", "no bound yet"],
)
def test_multiplier(multiplier, square_norm, bound, numel, expected):
    found = next_multiplier(*(numbers(x) for x in (multiplier, square_norm, bound, numel)))
    assert found.tolist() == [expected]


def test_nothing_is_recorded_for_autograd():
    weight = torch.nn.Parameter(numbers(1.0, 2.0))
    for act in (
        lambda: decay_(weight, 0.1),
        lambda: pull_(weight, numbers(0.0, 0.0), 0.1),
        lambda: decay_cautiously_(weight, numbers(1.0, 2.0), 0.1),
        lambda: decay_stochastic_(weight, 0.1, seed=0),
    ):
        act()
        assert weight.grad_fn is None


# --- stochastic rounding ------------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize("start", [1.0, -1.0, 1.0 + 2**-6, 60000.0, 3e-4], ids=str)
def test_one_step_is_right_in_the_mean(dtype, start):
    weight = torch.full((400_000,), start, dtype=dtype)
    begin = weight[0].item()
    decay_stochastic_(weight, 1e-3, seed=0)
    # The share is a fraction of a spacing, so that the mean of n weights is off by at most spacing / sqrt(4 n).
    spread = SPACING[dtype] * abs(begin) / math.sqrt(4 * weight.numel())
    assert weight.double().mean().item() == pytest.approx(begin * (1 - 1e-3), abs=4 * spread)
    assert len(weight.unique()) == 2


@each_half
def test_rounded_to_nearest_nothing_decays_and_at_random_it_does(dtype):
    nearest, at_random = torch.ones(2, 4096, dtype=dtype)
    for step in range(1000):
        decay_(nearest, 1e-4)
        decay_stochastic_(at_random, 1e-4, seed=step)
    assert (nearest == 1).all()
    assert at_random.double().mean().item() == pytest.approx(math.exp(-0.1), rel=0.01)


@pytest.mark.parametrize(
    "start", [2.0**-24, 3 * 2.0**-24, 2.0**-15, 2.0**-14, 2.0**-14 - 2.0**-24], ids="{:.3g}".format
)
def test_float16_below_its_normal_range_is_right_in_the_mean(start):
    weight = torch.full((400_000,), start, dtype=torch.float16)
    decay_stochastic_(weight, 0.3, seed=0)
    quantum = 2.0**-24
    steps = (weight.double() / quantum).unique()
    assert torch.equal(steps, steps.round())  # each lies on float16's grid
    assert len(steps) <= 2
    spread = quantum / math.sqrt(4 * weight.numel())
    assert weight.double().mean().item() == pytest.approx(0.7 * start, abs=4 * spread + 1e-7 * start)


@each_half
@fast
@given(value=st.floats(-6e4, 6e4, width=32), share=st.floats(0, 1), seed=st.integers(0, 2**48 - 1))
def test_a_weight_goes_to_one_of_its_two_neighbors(dtype, value, share, seed):
    weight = torch.full((8,), value, dtype=dtype)
    exact = weight[0].float().mul(1 - share)
    decay_stochastic_(weight, share, seed=seed)
    nearest = exact.to(dtype)
    zero, far = torch.zeros((), dtype=dtype), torch.tensor(math.inf, dtype=dtype)
    below, above = torch.nextafter(nearest, -far), torch.nextafter(nearest, far)
    assert all(below <= w <= above for w in weight)
    assert all(abs(w) <= abs(torch.tensor(value, dtype=dtype)) for w in weight)
    assert all(w == zero or w.sign() == exact.sign() for w in weight)


@each_half
def test_what_is_on_the_grid_stays(dtype):
    weight = randn(1000).to(dtype)
    before = weight.clone()
    decay_stochastic_(weight, 0.0, seed=0)
    assert_same_bits(weight, before)


@each_half
def test_what_is_not_finite_stays_visible(dtype):
    weight = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    decay_stochastic_(weight, 0.1, seed=0)
    assert weight[:2].tolist() == [math.inf, -math.inf]
    assert weight[2].isnan()


@each_half
def test_the_noise_is_a_function_of_the_seed(dtype):
    weights = [torch.ones(1000, dtype=dtype) for _ in range(3)]
    for weight, seed in zip(weights, (1, 1, 2), strict=True):
        decay_stochastic_(weight, 1e-3, seed=seed)
    assert_same_bits(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    decay_stochastic_(torch.ones(10, dtype=torch.bfloat16), 1e-3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(2**20 + 5,), (1025, 1024)], ids=str)
def test_weights_of_several_pieces_are_decayed_wholly(size):
    weight = torch.ones(size, dtype=torch.bfloat16)
    decay_stochastic_(weight, 0.5, seed=0)
    assert (weight == 0.5).all()


def test_a_transposed_weight_decays_in_place():
    whole = torch.ones(64, 32, dtype=torch.bfloat16)
    decay_stochastic_(whole.T, 0.5, seed=0)
    assert (whole == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_rounded_to_nearest_as_ever(dtype):
    weight, expected = randn(100).to(dtype), randn(100).to(dtype)
    decay_stochastic_(weight, 1e-3, seed=0)
    decay_(expected, 1e-3)
    assert_same_bits(weight, expected)
