import math
import pickle

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import linear_model
from sklearn.datasets import load_diabetes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_regularize.penalties import L1, L2, ElasticNet, GroupLasso
from lightning_regularize.units import norm_dims
from tests.distributed import run_distributed
from tests.models import Calls, many_weights, randn
from tests.properties import assert_proximal, assert_same_bits, matrices

# Each penalty at unit strength, written down once more in numpy, float64.
FORMULAS = {
    L1(): lambda w: np.abs(w).sum(),
    L2(): lambda w: 0.5 * (w**2).sum(),
    ElasticNet(0.3): lambda w: 0.3 * np.abs(w).sum() + 0.35 * (w**2).sum(),
    GroupLasso(): lambda w: sum(math.sqrt(row.size) * math.sqrt((row**2).sum()) for row in w),
    GroupLasso(dim=0): lambda w: sum(math.sqrt(column.size) * math.sqrt((column**2).sum()) for column in w.T),
}
BY_ENTRY = [L1(), L2(), ElasticNet(0.3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

each_penalty = pytest.mark.parametrize("penalty", FORMULAS, ids=repr)
each_by_entry = pytest.mark.parametrize("penalty", BY_ENTRY, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
fast = settings(max_examples=60, deadline=None)


def gradient_of(penalty, weight, strength, **options):
    gradient = torch.zeros_like(weight)
    penalty.add_gradient_(gradient, weight, strength, **options)
    return gradient


def proximal(penalty, weight, threshold, **options):
    weight = weight.clone()
    penalty.proximal_(weight, threshold, **options)
    return weight


def differences(function, weight, h=1e-6):
    """The gradient of a numpy function by central differences."""
    steps = h * np.eye(weight.size).reshape(-1, *weight.shape)
    return np.array([(function(weight + s) - function(weight - s)) / (2 * h) for s in steps]).reshape(weight.shape)


# --- values -------------------------------------------------------------------------------------------------------


@each_penalty
@each_dtype
def test_the_value_is_that_of_the_formula_in_float64(penalty, dtype):
    weight = (randn(300, 400) * 3).to(dtype)
    value = penalty.value(weight, 0.25)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(0.25 * FORMULAS[penalty](weight.double().numpy()), rel=1e-6, abs=0)


@each_by_entry
@each_dtype
def test_a_million_elements_neither_overflow_nor_get_lost(penalty, dtype):
    # Equal numbers are the worst case: all roundings within a block agree.
    weight = torch.full((1000, 1001), 0.1, dtype=dtype)
    assert penalty.value(weight).item() == pytest.approx(FORMULAS[penalty](weight.double().numpy()), rel=1e-4, abs=0)


@each_penalty
def test_the_strength_may_be_a_tensor(penalty):
    weight, strength = randn(3, 4), torch.tensor(0.3)
    torch.testing.assert_close(penalty.value(weight, strength), penalty.value(weight, 0.3), rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient_of(penalty, weight, strength), gradient_of(penalty, weight, 0.3))
    torch.testing.assert_close(proximal(penalty, weight, strength), proximal(penalty, weight, 0.3))


# --- gradients ----------------------------------------------------------------------------------------------------


@each_penalty
def test_the_gradient_is_added_and_is_that_of_the_formula(penalty):
    weight, before = randn(4, 5).double(), randn(4, 5, seed=1).double()
    gradient = before.clone()
    penalty.add_gradient_(gradient, weight, 0.7)
    expected = before + 0.7 * torch.from_numpy(differences(FORMULAS[penalty], weight.numpy()))
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-7)


@each_penalty
def test_nothing_pulls_where_all_is_zero(penalty):
    weight = torch.zeros(2, 3)
    assert_same_bits(gradient_of(penalty, weight, 0.7), torch.zeros(2, 3))


@each_penalty
@each_dtype
def test_the_gradient_is_right_in_low_precision(penalty, dtype):
    weight, before = randn(6, 40).to(dtype), randn(6, 40, seed=1).to(dtype)
    exact = before.double().clone()
    penalty.add_gradient_(exact, weight.double(), 0.7)
    gradient = before.clone()
    penalty.add_gradient_(gradient, weight, 0.7)
    assert gradient.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("scale", [2.0**16, torch.tensor(2.0**16)], ids=["number", "tensor"])
def test_a_scaled_strength_does_not_overflow_a_float16_gradient(scale):
    gradient = torch.full((4,), 8.0, dtype=torch.float16)
    L1().add_gradient_(gradient, torch.full((4,), -2.0, dtype=torch.float16), 1e-4 * scale)
    torch.testing.assert_close(gradient, torch.full((4,), 8.0 - 6.5536, dtype=torch.float16))


# --- proximal maps ------------------------------------------------------------------------------------------------


@each_penalty
@pytest.mark.parametrize("threshold", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 2)], ids=str)
def test_the_proximal_map_minimizes_its_objective(penalty, threshold, shape):
    weight = randn(*shape, seed=5).double()
    found = proximal(penalty, weight, threshold)
    assert_proximal(found, weight, lambda w: threshold * FORMULAS[penalty](w))


@each_by_entry
def test_an_elementwise_threshold_is_the_metric_of_an_adaptive_optimizer(penalty):
    weight = randn(3, 4).double()
    thresholds = randn(3, 4, seed=1).double().abs()
    expected = [
        proximal(penalty, w.view(1), t.item()) for w, t in zip(weight.view(-1), thresholds.view(-1), strict=True)
    ]
    torch.testing.assert_close(proximal(penalty, weight, thresholds), torch.cat(expected).view(3, 4))


@pytest.mark.parametrize("penalty", [L1(), ElasticNet(0.3)], ids=repr)
@pytest.mark.parametrize("elementwise", [False, True], ids=["number", "elementwise"])
@fast
@given(weight=matrices(), threshold=st.floats(0, 100), dtype=st.sampled_from(DTYPES))
def test_zeros_are_exact_and_signs_never_flip(penalty, elementwise, weight, threshold, dtype):
    weight = weight.to(dtype)
    found = proximal(penalty, weight, torch.full_like(weight, threshold) if elementwise else threshold)
    limit = threshold * (penalty.l1_ratio if isinstance(penalty, ElasticNet) else 1.0)
    clearly = 4 * torch.finfo(dtype).eps * limit
    assert (found[weight.double().abs() <= limit - clearly] == 0).all()
    assert (found[weight.double().abs() > limit + clearly] != 0).all()
    assert (found * weight >= 0).all()
    assert (found.abs() <= weight.abs()).all()


@pytest.mark.parametrize("strength", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@each_dtype
def test_the_elastic_net_rounds_its_parts_apart(dtype, strength):
    # The sum of sign and weight, rounded to bfloat16 by itself, would leave nothing of so small a weight.
    weight = torch.tensor([2.0**-10, -(2.0**-10)], dtype=dtype)
    gradient = -0.25 * weight.sign()  # what the first part adds
    ElasticNet(0.5).add_gradient_(gradient, weight, strength)
    assert_same_bits(gradient, 0.25 * weight)


def test_the_ends_of_the_elastic_net_are_its_parts():
    weight = randn(5, 6)
    torch.testing.assert_close(proximal(ElasticNet(1.0), weight, 0.3), proximal(L1(), weight, 0.3))
    torch.testing.assert_close(proximal(ElasticNet(0.0), weight, 0.3), proximal(L2(), weight, 0.3))


def test_groups_become_zero_as_a_whole():
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = proximal(GroupLasso(), weight, 1.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]) * (1 - math.sqrt(2) / 5))


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_groups_may_have_a_threshold_each(shape):
    weight = randn(3, 4)
    thresholds = torch.tensor([0.1, 0.4, 2.0])
    expected = torch.cat(
        [proximal(GroupLasso(), row[None], t.item()) for row, t in zip(weight, thresholds, strict=True)]
    )
    torch.testing.assert_close(proximal(GroupLasso(), weight, thresholds.view(shape)), expected)
    assert (expected == 0).all(dim=1).tolist() == [False, False, True]


def test_a_group_of_a_grouped_transposed_convolution_is_an_output_channel():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    weight = layer.weight.detach().copy_(randn(4, 3, 3, 3))
    weight[2:, 1] *= 1e-3  # the input of output channel 4
    before = weight.clone()
    view, dim = norm_dims(layer, "weight", weight.shape)
    GroupLasso().proximal_(weight.view(view), 0.1, dim=dim)
    assert (weight[2:, 1] == 0).all()
    weight[2:, 1] = before[2:, 1] = 1.0
    assert (weight != 0).all()
    expected = [before[g : g + 2, o] for g in (0, 2) for o in range(3)]
    shrink = [1 - 0.1 * math.sqrt(18) / math.sqrt((x.double() ** 2).sum()) for x in expected]
    torch.testing.assert_close(weight[:2, 0], before[:2, 0] * shrink[0])
    torch.testing.assert_close(weight[2:, 2], before[2:, 2] * shrink[5])


@pytest.mark.parametrize(
    ("penalty", "reference"),
    [
        pytest.param(L1(), lambda a, n: linear_model.Lasso(alpha=a, tol=1e-15, max_iter=10**6), id="Lasso"),
        pytest.param(
            ElasticNet(0.4),
            lambda a, n: linear_model.ElasticNet(alpha=a, l1_ratio=0.4, tol=1e-15, max_iter=10**6),
            id="ElasticNet",
        ),
        pytest.param(L2(), lambda a, n: linear_model.Ridge(alpha=a * n), id="Ridge"),
    ],
)
def test_proximal_gradient_descent_finds_the_coefficients_of_scikit_learn(penalty, reference):
    x, y = load_diabetes(return_X_y=True)
    x, y = x * math.sqrt(len(x)), (y - y.mean()) / y.std()
    expected = reference(0.05, len(x)).fit(x, y).coef_
    features, targets = torch.from_numpy(x), torch.from_numpy(y)
    lr = 1 / torch.linalg.matrix_norm(features, 2).item() ** 2 * len(x)
    weight = torch.zeros(10, dtype=torch.float64)
    for _ in range(4000):
        weight -= lr * features.T @ (features @ weight - targets) / len(x)
        penalty.proximal_(weight, lr * 0.05)
    np.testing.assert_allclose(weight.numpy(), expected, atol=1e-10)
    assert (weight == 0).tolist() == (expected == 0).tolist()


# --- any tensor ---------------------------------------------------------------------------------------------------


@each_by_entry
@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(randn(8, 6, 5, 4).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(randn(7, 9).T, id="transposed"),
        pytest.param(randn(1500, 1600)[:, ::2], id="large, strided"),
        pytest.param(randn(1200, 1300).T, id="large, transposed"),
        pytest.param(randn(3, 1_000_003), id="large, rows too large for a piece"),
        pytest.param(randn(2_500_001), id="large vector"),
        pytest.param(torch.tensor(-0.7), id="a number"),
        pytest.param(torch.empty(0), id="nothing"),
        pytest.param(torch.empty(4, 0), id="rows of nothing"),
    ],
)
def test_every_shape_and_layout(penalty, weight):
    expected = weight.contiguous().clone()
    whole = torch.zeros_like(expected)
    r = {L1(): 1.0, L2(): 0.0, ElasticNet(0.3): 0.3}[penalty]
    whole += 0.5 * (r * expected.sign() + (1 - r) * expected)
    torch.testing.assert_close(gradient_of(penalty, weight, 0.5), whole)
    shrunk = expected.sign() * (expected.abs() - 0.5 * r).clamp(min=0) / (1 + 0.5 * (1 - r))
    torch.testing.assert_close(proximal(penalty, weight, 0.5), shrunk)
    torch.testing.assert_close(proximal(penalty, weight, torch.full_like(weight, 0.5)), shrunk)


@each_penalty
def test_a_parameter_is_changed_in_place_without_autograd(penalty):
    parameter = nn.Parameter(randn(3, 4))
    parameter.grad = randn(3, 4, seed=1)
    before = parameter.detach().clone()
    assert not penalty.value(parameter).requires_grad
    penalty.add_gradient_(parameter.grad, parameter, 0.1)
    assert_same_bits(parameter.detach(), before)
    penalty.proximal_(parameter, 0.1)
    assert parameter.grad_fn is None
    assert not torch.equal(parameter, before)


@each_penalty
def test_nobody_waits_for_the_device(penalty):
    weight, number = torch.empty(3, 4, device="meta"), torch.empty((), device="meta")
    penalty.add_gradient_(torch.empty_like(weight), weight, number)  # a value on the host would raise
    penalty.proximal_(weight, number)
    assert penalty.value(weight, number).device.type == "meta"


@each_penalty
def test_penalties_are_values(penalty):
    assert pickle.loads(pickle.dumps(penalty)) == penalty
    assert hash(pickle.loads(pickle.dumps(penalty))) == hash(penalty)
    assert penalty.per_unit == isinstance(penalty, GroupLasso)


def test_nan_stays_visible():
    weight = torch.tensor([[math.nan, 1.0]])
    for penalty in FORMULAS:
        assert penalty.value(weight).isnan()
        assert proximal(penalty, weight, 0.1)[0, 0].isnan()


# --- lists --------------------------------------------------------------------------------------------------------


def assert_lists_are_the_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)


@each_penalty
@pytest.mark.parametrize("strength", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_the_gradients_of_a_list_are_those_of_each(penalty, strength):
    weights = many_weights()
    found, expected = ([torch.ones_like(w) for w in weights] for _ in range(2))
    penalty.add_gradient_(found, weights, strength)
    for gradient, weight in zip(expected, weights, strict=True):
        penalty.add_gradient_(gradient, weight, strength)
    assert_lists_are_the_same(found, expected)
    assert_lists_are_the_same(weights, many_weights())


@each_penalty
@pytest.mark.parametrize(
    "make_threshold",
    [
        pytest.param(lambda weights: 0.1, id="number"),
        pytest.param(lambda weights: torch.tensor(0.1), id="tensor"),
        pytest.param(
            lambda weights: [randn(*w.shape, seed=i).abs().to(w.dtype) for i, w in enumerate(weights)], id="each"
        ),
    ],
)
def test_the_proximal_step_of_a_list_is_that_of_each(penalty, make_threshold):
    weights = many_weights()
    expected = [w.clone() for w in weights]
    threshold = make_threshold(weights)
    before = [t.clone() for t in threshold] if isinstance(threshold, list) else threshold
    penalty.proximal_(weights, threshold)
    for i, weight in enumerate(expected):
        penalty.proximal_(weight, before[i] if isinstance(before, list) else before)
    assert_lists_are_the_same(weights, expected)
    assert sum(not torch.equal(w, b) for w, b in zip(weights, many_weights(), strict=True)) >= 12
    if isinstance(threshold, list):
        assert all(torch.equal(t, b) for t, b in zip(threshold, before, strict=True))


def test_groups_of_a_list_may_have_a_threshold_each():
    weights = [randn(3, 4, seed=i) for i in range(3)]
    thresholds = [randn(3, seed=i).abs() for i in range(3)]
    expected = [proximal(GroupLasso(), w, t) for w, t in zip(weights, thresholds, strict=True)]
    GroupLasso().proximal_(weights, thresholds)
    assert_lists_are_the_same(weights, expected)


@each_penalty
def test_the_value_of_a_list_is_the_sum_of_values(penalty):
    weights = many_weights()
    expected = sum(penalty.value(weight, 0.3).item() for weight in weights)
    assert penalty.value(weights, 0.3).item() == pytest.approx(expected, rel=1e-9, abs=0)


@each_penalty
@pytest.mark.parametrize("method", ["gradient", "proximal", "proximal, each"])
def test_the_number_of_calls_does_not_depend_on_the_length_of_a_list(penalty, method):
    def calls(length):
        weights, others = ([torch.empty(4, 4, device="meta") for _ in range(length)] for _ in range(2))
        with Calls() as counted:
            if method == "gradient":
                penalty.add_gradient_(others, weights, 0.1)
            else:
                penalty.proximal_(weights, others if "each" in method else 0.1)
        return counted.count

    assert 0 < calls(2) == calls(50) < 120


# --- several ranks ------------------------------------------------------------------------------------------------


def penalize_spread(rank, world_size, mesh_shape, placements):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", mesh_shape)
    whole, thresholds = randn(5, 7), randn(5, 7, seed=1).abs()
    for penalty in FORMULAS:
        weight, gradient = (distribute_tensor(t, mesh, placements) for t in (whole.clone(), torch.zeros(5, 7)))
        torch.testing.assert_close(penalty.value(weight, 0.3), penalty.value(whole, 0.3), rtol=1e-6, atol=0)
        penalty.add_gradient_(gradient, weight, 0.3)
        torch.testing.assert_close(gradient.full_tensor(), gradient_of(penalty, whole, 0.3))
        penalty.proximal_(weight, 0.3)
        torch.testing.assert_close(weight.full_tensor(), proximal(penalty, whole, 0.3))
        if penalty in BY_ENTRY:
            penalty.proximal_(weight, distribute_tensor(thresholds, mesh, placements))
            expected = proximal(penalty, proximal(penalty, whole, 0.3), thresholds)
            torch.testing.assert_close(weight.full_tensor(), expected)


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        pytest.param((2,), [Shard(0)], id="rows apart"),
        pytest.param((2,), [Shard(1)], id="rows cut"),
        pytest.param((2,), [Replicate()], id="replicated"),
        pytest.param((2, 2), [Shard(0), Shard(1)], id="rows apart and cut"),
        pytest.param((2, 2), [Replicate(), Shard(0)], id="replicated and apart"),
    ],
)
def test_a_weight_spread_over_ranks_is_penalized_as_a_whole(mesh_shape, placements):
    run_distributed(penalize_spread, mesh_shape, placements, world_size=math.prod(mesh_shape))


def penalize_spread_list(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    places = [Shard(0), Shard(1), Shard(0), Replicate(), Shard(1), Shard(0)]
    shapes = [(5, 7), (5, 7), (1, 3), (5, 7), (4, 7), (900, 3000)]  # uneven, empty on one rank, and large
    whole = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    metric = [randn(*shape, seed=i).abs() for i, shape in enumerate(shapes)]

    def spread(tensors):
        return [distribute_tensor(t.clone(), mesh, [place]) for t, place in zip(tensors, places, strict=True)]

    for penalty in FORMULAS:
        weights, gradients = spread(whole), spread([torch.zeros_like(w) for w in whole])
        assert penalty.value(weights, 0.3).item() == pytest.approx(penalty.value(whole, 0.3).item(), rel=1e-6, abs=0)
        penalty.add_gradient_([*gradients, torch.zeros(2, 2)], [*weights, torch.ones(2, 2)], 0.3)
        for gradient, weight in zip(gradients, whole, strict=True):
            torch.testing.assert_close(gradient.full_tensor(), gradient_of(penalty, weight, 0.3))
        penalty.proximal_(weights, spread(metric))
        for found, weight, thresholds in zip(weights, whole, metric, strict=True):
            expected = proximal(penalty, weight, thresholds)
            torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-5, atol=1e-6)


def test_a_list_of_weights_that_are_spread_in_different_ways():
    run_distributed(penalize_spread_list)


# --- groups in the metric of an adaptive optimizer ----------------------------------------------------------------


def in_metric(weight, thresholds):
    """The minimizer row by row: scipy finds the norm that solves its own equation, in float64."""
    rows = []
    for w, t in zip(weight.double().numpy(), thresholds.double().numpy(), strict=True):
        removed = t * math.sqrt(w.size)

        def excess(norm, w=w, removed=removed):
            return ((w / (norm + removed)) ** 2).sum() - 1

        norm = scipy.optimize.brentq(excess, 0, np.linalg.norm(w), xtol=1e-300, rtol=1e-15) if excess(0) > 0 else 0.0
        rows.append(w * norm / (norm + removed))
    return torch.from_numpy(np.array(rows))


@pytest.mark.parametrize("spread", [0, 1, 5, 20, 40], ids="spread e^{}".format)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 0.1, 1.0], ids=str)
def test_groups_under_an_elementwise_threshold_end_where_scipy_says(scale, spread):
    weight = randn(40, 12).double() * torch.linspace(0.1, 3, 40)[:, None]
    thresholds = scale * torch.exp(spread * (randn(40, 12, seed=1).double().sigmoid() - 1))
    found = proximal(GroupLasso(), weight, thresholds)
    torch.testing.assert_close(found, in_metric(weight, thresholds), rtol=1e-12, atol=1e-15)


def test_a_group_whose_solution_is_zero_is_exactly_zero_and_others_are_nowhere():
    weight = torch.tensor([[0.1, -0.2, 0.3], [1.0, 1.0, -1.0]], dtype=torch.float64)
    thresholds = torch.tensor([[1.0, 0.5, 2.0], [0.1, 0.2, 0.5]], dtype=torch.float64)
    found = proximal(GroupLasso(), weight, thresholds)
    assert (found[0] == 0).all()
    assert (found[1] * weight[1] > 0).all()


@each_dtype
def test_equal_elementwise_thresholds_do_what_one_number_does(dtype):
    weight = randn(20, 30).to(dtype)
    expected = proximal(GroupLasso(), weight.double(), 0.15)
    found = proximal(GroupLasso(), weight, torch.full_like(weight, 0.15))
    torch.testing.assert_close(found.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


def test_weights_without_a_threshold_are_left_and_zero_groups_too():
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    found = proximal(GroupLasso(), weight, torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(found, weight, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_infinite_threshold_takes_its_weight_and_no_other(dtype):
    weight = torch.tensor([[0.0, 1.0], [2.0, 1.0], [3.0, 0.0]], dtype=dtype)
    thresholds = torch.tensor([[math.inf, 0.1], [math.inf, 0.1], [math.inf, math.inf]], dtype=dtype)
    shrunk = 1 - 0.1 * math.sqrt(2)  # as if the weight were alone in its group
    expected = torch.tensor([[0.0, shrunk], [0.0, shrunk], [0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(proximal(GroupLasso(), weight, thresholds), expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3)], ids=str)
def test_the_groups_under_an_elementwise_threshold_are_units_of_the_layer(layer):
    weight = layer.weight.detach().double()
    thresholds = 0.05 * randn(*weight.shape, seed=1).double().sigmoid()
    _, dims = norm_dims(layer, "weight", weight.shape)
    unit = next(d for d in range(weight.dim()) if d not in dims)
    found = proximal(GroupLasso(), weight, thresholds, dim=dims).movedim(unit, 0).flatten(1)
    expected = in_metric(weight.movedim(unit, 0).flatten(1), thresholds.movedim(unit, 0).flatten(1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1e-22, 1e-30], ids=str)
def test_groups_whose_norm_underflows_are_zero_afterwards(size):
    """Momentum leaves such numbers in weights that were zero."""
    weight = torch.full((2, 3), size)
    weight[1] = 1.0
    found = proximal(GroupLasso(), weight, torch.full((2, 3), 1e-3))
    assert (found[0] == 0).all()
    assert (found[1] != 0).all()


def shrink_spread_in_metric(rank, world_size, placements):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    whole, thresholds = randn(5, 7).double(), 0.3 * randn(5, 7, seed=1).double().sigmoid()
    weight, expected = distribute_tensor(whole.clone(), mesh, placements), in_metric(whole, thresholds)
    GroupLasso().proximal_(weight, distribute_tensor(thresholds, mesh, placements))
    torch.testing.assert_close(weight.full_tensor(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=["rows apart", "rows cut", "replicated"])
def test_groups_spread_over_ranks_are_shrunk_in_the_metric_of_the_whole(placement):
    run_distributed(shrink_spread_in_metric, [placement])


# --- bad input ----------------------------------------------------------------------------------------------------


@each_penalty
@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_strengths_and_thresholds_are_non_negative_and_finite(penalty, bad):
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match=f"`strength` should be non-negative and finite, got {bad}"):
        penalty.value(weight, bad)
    with pytest.raises(ValueError, match=f"`strength` should be non-negative and finite, got {bad}"):
        penalty.add_gradient_(torch.zeros(2, 3), weight, bad)
    with pytest.raises(ValueError, match=f"`threshold` should be non-negative and finite, got {bad}"):
        penalty.proximal_(weight, bad)


@each_penalty
@pytest.mark.parametrize("bad", ["0.1", None, True, [0.1]], ids=repr)
def test_strengths_and_thresholds_are_numbers(penalty, bad):
    weight = torch.ones(2, 3)
    with pytest.raises(TypeError, match="`strength` should be a number, got "):
        penalty.value(weight, bad)
    with pytest.raises(TypeError, match="`strength` should be a number, got "):
        penalty.add_gradient_(torch.zeros(2, 3), weight, bad)
    with pytest.raises(TypeError, match="`threshold` should be a number, got "):
        penalty.proximal_(weight, bad)
    with pytest.raises(TypeError, match="`l1_ratio` should be a number, got "):
        ElasticNet(bad)


@each_penalty
def test_a_sparse_gradient_is_refused(penalty):
    gradient = torch.zeros(4, 3).to_sparse()
    with pytest.raises(ValueError, match=r"`gradient` should be dense, got torch\.sparse_coo: .* Use `sparse=False`"):
        penalty.add_gradient_(gradient, torch.ones(4, 3), 0.1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ElasticNet(-0.1), r"`l1_ratio` should be in \[0, 1\], got -0.1"),
        (lambda: ElasticNet(1.1), r"`l1_ratio` should be in \[0, 1\], got 1.1"),
        (lambda: ElasticNet(math.nan), r"`l1_ratio` should be in \[0, 1\], got nan"),
        (lambda: L1().proximal_(torch.ones(3, 4), torch.ones(4)), r"weight's shape \(3, 4\), got shape \(4,\)"),
        (lambda: L2().proximal_(torch.ones(3), torch.ones(1)), r"weight's shape \(3,\), got shape \(1,\)"),
        (
            lambda: GroupLasso().proximal_(torch.ones(3, 4), torch.ones(4)),
            r"one number per group, of shape \(3, 1\), or one per weight, got shape \(4,\)",
        ),
        (lambda: GroupLasso().value(torch.ones(3)), "`dim` should be given for a weight with less than 2 dims"),
        (lambda: GroupLasso(dim=2).value(torch.ones(3, 4)), "each from -2 to 1, got 2"),
    ],
)
def test_bad_input_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
