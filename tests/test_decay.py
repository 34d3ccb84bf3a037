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
    pull_back_,
    pull_by_importance_,
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


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_all_are_shares(share):
    weight, other = numbers(2.0), numbers(2.0)
    decay_(weight, share)
    pull_(other, numbers(1.0), share)
    assert [weight.item(), other.item()] == [2.0 * (1 - share), 2.0 - share]


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


def test_nothing_is_pulled_past_its_anchor():
    """Nor is one changed that is at its anchor, or that has come nearer."""
    weights = [numbers(4.0, 1.0), numbers(4.0, 1.0), numbers(4.0), numbers(2.0), numbers(3.0)]
    anchors = [numbers(0.0, 1.0), numbers(0.0, 1.0), numbers(0.0), numbers(2.0), numbers(0.0)]
    pull_back_(weights, anchors, numbers(2.0, 1.0, 0.0, 0.0, 5.0), numbers(1.0, 2.0, 3.0, 1.0, 1.0))
    assert [weight.tolist() for weight in weights] == [[2.0, 1.0], [0.0, 1.0], [0.0], [2.0], [3.0]]


@pytest.mark.parametrize("share", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_importance_is_a_factor_of_each_element(share, dtype):
    weight, anchor = numbers(4.0, 4.0, 4.0, dtype=dtype), numbers(2.0, 2.0, 2.0, dtype=dtype)
    pull_by_importance_([weight], [anchor], [numbers(0.0, 1.0, 2.0, dtype=dtype)], share)
    assert weight.tolist() == [4.0, 3.0, 2.0]


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


# --- lists ----------------------------------------------------------------------------------------------------------

SHARE = 0.0123
FLOATING = [torch.float32, torch.float64, *HALF]


def tensors(seed, large=False):
    """Of several dtypes, shapes and layouts, some without elements; in an order that mixes them."""
    shapes = [(), (0,), (3,), (4, 0), (5, 7), (2, 3, 4, 5), *([(300, 2000)] if large else [])]
    drawn = [randn(1, *shape, seed=seed + i)[0] for i, shape in enumerate(shapes)]
    drawn += [drawn[4].T, drawn[5].contiguous(memory_format=torch.channels_last), randn(6, 8, seed=seed)[::2, ::2]]
    return [tensor.clone().to(dtype) for tensor in drawn for dtype in FLOATING]


def by_element(weights, others, formula):
    """The formula in float64, rounded to the dtype of the weights."""
    return [formula(w.double(), o.double()).to(w.dtype) for w, o in zip(weights, others, strict=True)]


def cautious(after, before, s):
    return torch.where((before - after) * before >= 0, after - s * before, after)


LISTS = {
    "decay": (lambda w, o, s: decay_(w, s), lambda w, o, s: (1 - s) * w),
    "couple": (lambda w, o, s: couple_(w, o, s), lambda w, o, s: w + s * o),
    "cautious": (lambda w, o, s: decay_cautiously_(w, o, s), cautious),
    "pull": (lambda w, o, s: pull_(w, o, s), lambda w, o, s: w - s * (w - o)),
}
each_list = pytest.mark.parametrize(("act", "formula"), LISTS.values(), ids=LISTS)
each_share = pytest.mark.parametrize(
    "share", [SHARE, torch.tensor(SHARE, dtype=torch.float64)], ids=["number", "tensor"]
)


@each_list
@each_share
def test_a_list_of_all_kinds(act, formula, share):
    weights, others = tensors(0, large=True), tensors(100, large=True)
    expected = by_element(weights, others, lambda w, o: formula(w, o, SHARE))
    act(weights, others, share)
    for weight, wanted in zip(weights, expected, strict=True):
        # A result is rounded once more where a formula has two operations.
        eps = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight, wanted, rtol=2 * eps, atol=2 * eps, equal_nan=True)


@each_list
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_a_tensor_is_a_list_of_one(act, formula, dtype):
    weights, other = [randn(7, 5).to(dtype) for _ in range(2)], randn(7, 5, seed=1).to(dtype)
    act(weights[0], other, SHARE)
    act([weights[1]], [other], SHARE)
    assert_same_bits(*weights)


@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("share", [1e-3, 0.0123, 0.2], ids=str)
def test_lists_decay_as_torch_multiplies_one_tensor(dtype, share):
    """Also in half precision, in which a list would round the factor first."""
    weights = [randn(n, seed=n).to(dtype) for n in (1, 7, 8, 33, 5000)]
    expected = [weight * (1 - share) for weight in weights]
    decay_(weights, share)
    for weight, wanted in zip(weights, expected, strict=True):
        assert_same_bits(*(torch.view_as_real(t) if dtype.is_complex else t for t in (weight, wanted)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_share_in_a_tensor_is_not_rounded_to_half_precision(dtype):
    weights = [randn(500, seed=seed).to(dtype) for seed in range(2)]
    expected = [(weight.double() * (1 - SHARE)).to(dtype) for weight in weights]
    decay_(weights, torch.tensor(SHARE, dtype=torch.float64))
    for weight, wanted in zip(weights, expected, strict=True):
        assert_same_bits(weight, wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_cautious_decay_sees_signs_whose_product_float16_cannot_hold(count):
    """The update 2e-5 moves the weight 1e-3 away from zero; their product is 0 in float16."""
    before = [torch.full((2,), 1e-3, dtype=torch.float16) for _ in range(count)]
    after = [b + 2e-5 for b in before]
    expected = [a.clone() for a in after]
    decay_cautiously_(after, before, 0.5)
    for weight, wanted in zip(after, expected, strict=True):
        assert_same_bits(weight, wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_cautious_decay_keeps_what_is_not_finite_visible(count):
    after = [numbers(math.nan, math.inf, 0.5) for _ in range(count)]
    decay_cautiously_(after, [numbers(1.0, 1.0, 1.0) for _ in range(count)], 0.25)
    for weight in after:
        assert weight[0].isnan()
        assert weight[1:].tolist() == [math.inf, 0.25]


def test_empty_lists():
    for act, _ in LISTS.values():
        act([], [], SHARE)
        act([], [], torch.tensor(SHARE))


# --- stochastic rounding ------------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize("start", [1.0, -1.0, 1.0 + 2**-6, 60000.0, 3e-4], ids=str)
def test_one_step_is_right_in_the_mean(dtype, start):
    weight = torch.full((400_000,), start, dtype=dtype)
    begin = weight[0].item()
    decay_stochastic_(weight, 1e-3, seed=0)
    # The share is a fraction of a spacing, so that the mean of n weights is off by at most spacing / sqrt(4 n).
    spread = SPACING[dtype] * abs(begin) / math.sqrt(4 * weight.numel())
    assert weight.double().mean().item() == pytest.approx(begin * (1 - 1e-3), abs=4 * spread, rel=0)
    assert len(weight.unique()) == 2


@each_half
def test_rounded_to_nearest_nothing_decays_and_at_random_it_does(dtype):
    nearest, at_random = torch.ones(2, 4096, dtype=dtype)
    for step in range(1000):
        decay_(nearest, 1e-4)
        decay_stochastic_(at_random, 1e-4, seed=step)
    assert (nearest == 1).all()
    assert at_random.double().mean().item() == pytest.approx(math.exp(-0.1), rel=0.01, abs=0)


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
    assert weight.double().mean().item() == pytest.approx(0.7 * start, abs=4 * spread + 1e-7 * start, rel=0)


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
