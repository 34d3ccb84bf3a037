import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_regularize.projections import (
    Box,
    FrobeniusBall,
    FrobeniusSphere,
    MaxNorm,
    NonNegative,
    Projection,
    SpectralBall,
    UnitNorm,
)
from lightning_regularize.units import norm_dims, unit_dims, unit_norms, units_are_known
from tests.distributed import run_distributed
from tests.models import Calls, many_weights, randn
from tests.properties import (
    assert_idempotent,
    assert_inside,
    assert_nearest_point,
    assert_pure,
    assert_same_bits,
    matrices,
    nearest_point_by_solver,
)

PROJECTIONS = [
    MaxNorm(1.5),
    MaxNorm(1.5, dim=0),
    UnitNorm(),
    NonNegative(),
    Box(-0.5, 0.75),
    Box(0.5, math.inf),
    FrobeniusBall(2.0),
    FrobeniusSphere(2.0),
    SpectralBall(1.5),
]
CONVEX = [p for p in PROJECTIONS if not isinstance(p, (UnitNorm, FrobeniusSphere))]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

each_projection = pytest.mark.parametrize("projection", PROJECTIONS, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
fast = settings(max_examples=60, deadline=None)


def row_norms(weight):
    """In float64, by Python's correctly rounded ``hypot``."""
    return [math.hypot(*row) for row in weight.double().flatten(1).tolist()]


# --- every projection ---------------------------------------------------------------------------------------------


@each_projection
@fast
@given(weight=matrices())
def test_a_second_projection_changes_nothing(projection, weight):
    assert_idempotent(projection, weight)


@each_projection
@fast
@given(weight=matrices(), dtype=st.sampled_from(FLOATS))
def test_in_place_and_pure_agree_and_say_whether_anything_changed(projection, weight, dtype):
    assert_pure(projection, weight.to(dtype))


@pytest.mark.parametrize("projection", CONVEX, ids=repr)
@fast
@given(weight=matrices(), seed=st.integers(0, 2**31))
def test_no_other_member_of_a_convex_set_is_nearer(projection, weight, seed):
    projected = projection.project(weight)
    others = [projection.project(3 * randn(*weight.shape, seed=seed).double()) for _ in range(3)]
    # Members on the way from the projection to others would be nearer if any were.
    near = [projected + step * (other - projected) for other in others for step in (1e-6, 1e-3, 0.1, 1.0)]
    assert_nearest_point(projected, weight, near)


@pytest.mark.parametrize(
    ("projection", "constraint"),
    [
        pytest.param(MaxNorm(1.5), lambda x: 1.5**2 - (x**2).sum(1), id="MaxNorm"),
        pytest.param(MaxNorm(1.5, dim=0), lambda x: 1.5**2 - (x**2).sum(0), id="MaxNorm over columns"),
        pytest.param(FrobeniusBall(2.0), lambda x: 4.0 - np.sum(x**2), id="FrobeniusBall"),
        pytest.param(NonNegative(), lambda x: x.ravel(), id="NonNegative"),
        pytest.param(Box(-0.5, 0.75), lambda x: np.concatenate([x + 0.5, 0.75 - x], None), id="Box"),
        # One singular value above the bound: where several meet there the constraint has kinks.
        pytest.param(SpectralBall(3.1), lambda x: 3.1**2 - np.linalg.eigvalsh(x @ x.T), id="SpectralBall"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_projection_is_the_point_that_a_solver_finds(projection, constraint, seed):
    weight = 1.5 * randn(3, 4, seed=seed).double()
    expected = nearest_point_by_solver(weight, constraint)
    torch.testing.assert_close(projection.project(weight), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("projection", [UnitNorm(), FrobeniusSphere(2.0)], ids=repr)
@fast
@given(weight=matrices(), seed=st.integers(0, 2**31))
def test_no_other_member_of_a_sphere_is_nearer(projection, weight, seed):
    others = [projection.project(randn(*weight.shape, seed=seed + i).double()) for i in range(5)]
    found = projection.project(weight)
    if (found == 0).all(dim=1).any():  # no direction: left alone, and therefore not on the sphere
        return
    assert_nearest_point(found, weight, [*others, projection.project(found + 1e-4 * others[0])])


@each_projection
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_weights_are_left_alone(projection, shape):
    assert not projection.project_(torch.empty(shape))


@each_projection
def test_a_parameter_is_projected_in_place_without_autograd(projection):
    parameter = nn.Parameter(3 * randn(3, 4))
    address = parameter.data_ptr()
    assert projection.project_(parameter)
    assert parameter.data_ptr() == address
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert not projection.project(parameter).requires_grad


@each_projection
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded slice"])
def test_the_layout_in_memory_does_not_matter(projection, layout):
    dense = 2 * randn(4, 3, 2, 5)
    weight = {
        "channels_last": lambda: dense.to(memory_format=torch.channels_last),
        "transposed": lambda: dense.transpose(0, 3).contiguous().transpose(0, 3),
        "expanded slice": lambda: torch.cat([dense, dense])[:4],
    }[layout]()
    expected = projection.project(dense)
    projection.project_(weight)
    torch.testing.assert_close(weight, expected)


@each_projection
def test_a_list_is_projected_as_each_of_its_weights(projection):
    weights, expected = many_weights(), many_weights()
    changed = [projection.project_(weight) for weight in expected]
    assert projection.project_(weights) == any(changed)
    for found, weight in zip(weights, expected, strict=True):
        eps = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(found, weight, rtol=4 * eps, atol=4 * eps)
    assert not projection.project_([])


@each_projection
def test_the_number_of_calls_does_not_depend_on_the_length_of_a_list(projection):
    def calls(length):
        weights = [torch.empty(4, 4, device="meta") for _ in range(length)]
        with Calls() as counted:
            projection.project_(weights)
        return counted.count

    assert 0 < calls(2) == calls(50) < 40


def test_large_matrices_of_a_list_keep_their_vectors():
    ball = SpectralBall(1.0)
    weights = [randn(80, 70, seed=i) for i in range(3)] + [randn(70, 90)]
    vectors = [ball.warm_start(weight) for weight in weights]
    expected, kept = [w.clone() for w in weights], [v.clone() for v in vectors]
    for weight, vector in zip(expected, kept, strict=True):
        ball.project_(weight, vector=vector)
    ball.project_(weights, vector=vectors)
    for found, other in zip([*weights, *vectors], [*expected, *kept], strict=True):
        torch.testing.assert_close(found, other)


@each_projection
def test_nobody_waits_for_the_device(projection):
    weight = torch.empty(6, 80, 70, device="meta") if projection.per_unit else torch.empty(6, 5, device="meta")
    assert projection.project_(weight).device.type == "meta"  # a value on the host would raise


@each_projection
def test_projections_are_values(projection):
    assert pickle.loads(pickle.dumps(projection)) == projection
    assert hash(projection) == hash(pickle.loads(pickle.dumps(projection)))
    assert projection.at_start(torch.ones(2, 2)) is projection


@pytest.mark.parametrize("projection", [MaxNorm(1.0), UnitNorm(), FrobeniusBall(1.0), FrobeniusSphere(1.0)], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_stay_as_they_are_and_show(projection, bad):
    weight = torch.tensor([[bad, 2.0]])
    assert not projection.project_(weight)
    assert_same_bits(weight, torch.tensor([[bad, 2.0]]))


# --- norms of units -----------------------------------------------------------------------------------------------


@fast
@given(weight=matrices(), bound=st.floats(0.01, 100))
def test_max_norm_holds_and_leaves_rows_inside_bit_for_bit(weight, bound):
    projected = MaxNorm(bound).project(weight)
    assert_inside(row_norms(projected), bound)
    for before, after, norm in zip(weight, projected, row_norms(weight), strict=True):
        if norm <= bound * (1 - 1e-15):
            assert_same_bits(after, before)
        elif norm > bound * (1 + 1e-15):
            torch.testing.assert_close(after, before * (bound / norm), rtol=1e-13, atol=0)


@each_dtype
@pytest.mark.parametrize("columns", [1, 2, 17, 300, 20000])
@pytest.mark.parametrize("bound", [0.1, 3.0])
def test_max_norm_is_strict_in_every_precision(dtype, columns, bound):
    rows = min(20_000, 4_000_000 // columns // 10)
    sizes = bound / math.sqrt(columns) * torch.linspace(0.2, 3, rows).unsqueeze(1)
    weight = (randn(rows, columns) * sizes).to(dtype)
    exact = torch.linalg.vector_norm(weight.double(), dim=1)
    projected = MaxNorm(bound).project(weight)
    assert_inside(torch.linalg.vector_norm(projected.double(), dim=1), bound)
    inside = exact < bound * (1 - 1e-5)
    assert 0 < inside.sum() < rows
    assert_same_bits(projected[inside], weight[inside])
    assert_idempotent(MaxNorm(bound), weight)


@pytest.mark.parametrize("shape", [(3, 4096), (3, 100_000), (100_000, 3)], ids=str)
@pytest.mark.parametrize("number", [0.1, 0.3, 0.7, 1 / 3])
def test_max_norm_is_strict_where_all_roundings_agree(shape, number):
    projection = MaxNorm(1.0, dim=shape.index(max(shape)))
    projected = projection.project(torch.full(shape, number))
    assert_inside(torch.linalg.vector_norm(projected.double(), dim=projection.dim), 1.0)
    assert_idempotent(projection, projected)


@each_dtype
def test_max_norm_loses_no_more_than_the_margin(dtype):
    margin = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 32 * torch.finfo(dtype).eps)
    projected = MaxNorm(1.0).project(randn(2000, 64).to(dtype))
    norms = torch.linalg.vector_norm(projected.double(), dim=1)
    assert norms.min() >= 1 - 2 * margin


def test_row_norms_are_not_taken_in_low_precision():
    # In bfloat16 a sum of 4096 ones stops at 256, and in float16 a square of 300 overflows.
    assert unit_norms(torch.ones(1, 4096, dtype=torch.bfloat16)).item() == 64
    assert unit_norms(torch.full((1, 4), 300.0, dtype=torch.float16)).item() == 600


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 100_000), 1), ((100_000, 3), 0), ((50, 40, 30), (0, 1, 2)), ((50, 40, 30), (0, 2)), ((9, 4097), -1)],
)
def test_norms_over_many_elements_are_accurate(shape, dim):
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.vector_norm(weight.double(), dim=dim, keepdim=True)
    torch.testing.assert_close(unit_norms(weight, dim), expected, rtol=3e-6, atol=0)


@each_dtype
def test_unit_norm_is_as_near_to_one_as_the_precision_allows(dtype):
    weight = (3 * randn(500, 100)).to(dtype)
    norms = torch.linalg.vector_norm(UnitNorm().project(weight).double(), dim=1)
    margin = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 32 * torch.finfo(dtype).eps)
    assert (norms - 1).abs().max() <= margin
    assert_idempotent(UnitNorm(), weight)


def test_rows_without_direction_stay_zero():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(UnitNorm().project(weight), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


# --- which weights are the incoming ones of a unit ------------------------------------------------------------------


def units_by_autograd(layer, inputs):
    """For every output unit, which weights it depends on: the layer itself says."""
    output = layer.double()(*[x.double() for x in inputs])
    for unit in range(output.shape[1]):
        (gradient,) = torch.autograd.grad(output[:, unit].sum(), layer.weight, retain_graph=True)
        yield gradient != 0


@pytest.mark.parametrize(
    ("layer", "input_shapes"),
    [
        pytest.param(nn.Linear(5, 4), [(2, 5)], id="Linear"),
        pytest.param(nn.Conv1d(4, 6, 3), [(2, 4, 7)], id="Conv1d"),
        pytest.param(nn.Conv2d(4, 6, (3, 2)), [(2, 4, 7, 7)], id="Conv2d"),
        pytest.param(nn.Conv3d(2, 3, 2), [(2, 2, 4, 4, 4)], id="Conv3d"),
        pytest.param(nn.Conv2d(4, 6, 3, groups=2), [(2, 4, 7, 7)], id="Conv2d grouped"),
        pytest.param(nn.Conv2d(4, 4, 3, groups=4), [(2, 4, 7, 7)], id="Conv2d depthwise"),
        pytest.param(nn.ConvTranspose1d(4, 6, 3), [(2, 4, 7)], id="ConvTranspose1d"),
        pytest.param(nn.ConvTranspose2d(4, 6, (3, 2)), [(2, 4, 7, 7)], id="ConvTranspose2d"),
        pytest.param(nn.ConvTranspose3d(2, 3, 2), [(2, 2, 4, 4, 4)], id="ConvTranspose3d"),
        pytest.param(nn.ConvTranspose1d(6, 4, 3, groups=2), [(2, 6, 7)], id="ConvTranspose1d grouped"),
        pytest.param(nn.ConvTranspose2d(6, 9, 3, groups=3), [(2, 6, 7, 7)], id="ConvTranspose2d grouped"),
        pytest.param(nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], id="Bilinear"),
    ],
)
@pytest.mark.parametrize("projection", [MaxNorm(0.5), UnitNorm()], ids=repr)
def test_a_unit_is_the_weights_that_an_output_depends_on(layer, input_shapes, projection):
    units = list(units_by_autograd(layer, [1 + randn(*shape, seed=3).abs() for shape in input_shapes]))
    assert torch.equal(torch.stack(units).sum(0), torch.ones(layer.weight.shape, dtype=torch.int64))
    weight = layer.weight.detach().copy_(randn(*layer.weight.shape))
    weight[units[0]] *= 0.4 / torch.linalg.vector_norm(weight[units[0]])
    expected = weight.clone()
    for unit in units:
        norm = math.hypot(*weight[unit].tolist())
        if norm > 0.5 or isinstance(projection, UnitNorm):
            expected[unit] *= projection.project(torch.tensor([[norm]], dtype=torch.float64)).item() / norm
    view, dim = norm_dims(layer, "weight", weight.shape)
    torch.testing.assert_close(
        unit_norms(weight.view(view), dim).flatten(),
        torch.tensor([math.hypot(*weight[unit].tolist()) for unit in units]).double(),
    )
    projection.project_(weight.view(view), dim=dim)
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Embedding(7, 3), "weight"),
        (nn.EmbeddingBag(7, 3), "weight"),
        (nn.MultiheadAttention(6, 2), "in_proj_weight"),
        (nn.MultiheadAttention(6, 2), "out_proj.weight"),
        (nn.MultiheadAttention(6, 2, kdim=4, vdim=5), "k_proj_weight"),
        (nn.LSTM(5, 3, num_layers=2, bidirectional=True), "weight_ih_l0"),
        (nn.LSTM(5, 3, num_layers=2, bidirectional=True), "weight_hh_l1_reverse"),
        (nn.LSTM(5, 4, proj_size=2), "weight_hr_l0"),
        (nn.GRU(5, 3), "weight_ih_l0"),
        (nn.RNN(5, 3), "weight_hh_l0"),
        (nn.LSTMCell(5, 3), "weight_ih"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_rows_are_units(layer, name):
    weight = layer.get_parameter(name).detach()
    weight.copy_(randn(*weight.shape))
    expected = weight.clone().double()
    for row in expected:
        norm = math.sqrt(sum(x * x for x in row.tolist()))
        row *= min(1.0, 1.2 / norm)
    owner = layer.get_submodule(name.rpartition(".")[0])
    view, dim = norm_dims(owner, name, weight.shape)
    MaxNorm(1.2).project_(weight.view(view), dim=dim)
    torch.testing.assert_close(weight, expected.float(), rtol=1e-5, atol=0)


class Layer(nn.Module):
    """A layer of somebody's, with attributes that tell its sizes, and a weight of some shape."""

    def __init__(self, shape, name="weight", **sizes):
        super().__init__()
        self.register_parameter(name, nn.Parameter(randn(*shape)))
        for size, value in sizes.items():
            setattr(self, size, value)


class Transposed(nn.Linear):
    """Stores (in, out), as its attributes tell."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(randn(in_features, out_features))


def transformers_conv1d(outputs, inputs):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


@pytest.mark.parametrize(
    ("layer", "incoming"),
    [
        (transformers_conv1d(6, 4), (0,)),
        (transformers_conv1d(4, 4), (0,)),
        (Transposed(4, 6), (0,)),
        (nn.Linear(4, 6), (1,)),
        (Layer((4, 6), in_features=4, out_features=6), (0,)),
        (Layer((6, 4), in_features=4, out_features=6), (1,)),
        (Layer((4, 6), "kernel", in_channels=4, out_channels=6), (0,)),
        (Layer((4, 6), "W", _in_feats=4, _out_feats=6), (0,)),
        (Layer((6, 4, 3), in_channels=4, out_channels=6), (1, 2)),
        (Layer((4, 6, 3), in_channels=4, out_channels=6), (0, 2)),
        (Layer((3, 4, 6), in_channels=4, out_channels=6), (1,)),
        (Layer((3, 6, 4), in_dim=4, out_dim=6), (2,)),
        (nn.Conv2d(4, 6, 3), (1, 2, 3)),
        (nn.Conv1d(6, 6, 3, groups=6), (1, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_sizes_that_a_layer_tells_decide_what_its_units_are(layer, incoming):
    ((name, weight), *_) = layer.named_parameters()
    assert norm_dims(layer, name, weight.shape) == (tuple(weight.shape), incoming)
    assert units_are_known(layer, weight.shape)
    outgoing = [d for d in range(weight.dim()) if d not in incoming]
    units = weight.detach().permute(*outgoing, *incoming).flatten(len(outgoing)).flatten(0, -2)
    expected = torch.tensor([math.hypot(*unit) for unit in units.tolist()], dtype=torch.float64)
    found = unit_norms(weight.detach(), incoming).permute(*outgoing, *incoming).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        Layer((4, 6)),
        Layer((4, 4), in_features=4, out_features=4),
        Layer((5, 7), in_channels=4, out_channels=6),
        Layer((4, 6), in_channels=(4, 4), out_channels=6),
    ],
    ids=["no sizes", "square", "other sizes", "no number"],
)
def test_where_a_layer_tells_nothing_dim_0_is_a_guess(layer):
    assert norm_dims(layer, "weight", layer.weight.shape)[1] == (1,)
    assert not units_are_known(layer, layer.weight.shape)


def test_a_dim_that_is_asked_for_precedes_the_layer():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    assert norm_dims(layer, "weight", layer.weight.shape, dim=0) == ((4, 3, 3, 3), (0,))
    assert norm_dims(layer, "bias", layer.bias.shape, dim=-1) == ((6,), (0,))


def test_the_dim_of_the_call_precedes_that_of_the_projection():
    weight = torch.full((2, 2), 3.0)
    torch.testing.assert_close(MaxNorm(3.0, dim=0).project(weight, dim=(0, 1)), weight / 2)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Linear(3, 2), "bias"),
        (nn.LayerNorm(3), "weight"),
        (nn.PReLU(), "weight"),
        (nn.LSTM(3, 2), "bias_ih_l0"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_incoming_weights_needs_a_dim(layer, name):
    with pytest.raises(ValueError, match="or say by `dim` what a unit is"):
        norm_dims(layer, name, layer.get_parameter(name).shape)


# --- bounds, balls, spheres -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [Box(-0.3, 0.7), Box(-math.inf, 0.2), Box(0.1, math.inf), NonNegative()], ids=repr)
@fast
@given(weight=matrices(dtype=torch.float32))
def test_bounds_hold_and_weights_between_them_keep_their_bits(box, weight):
    low, high = (0.0, math.inf) if isinstance(box, NonNegative) else (np.float32(box.low), np.float32(box.high))
    expected = [[min(max(x, low), high) for x in row] for row in weight.tolist()]
    assert_same_bits(box.project(weight), torch.tensor(expected, dtype=torch.float32))


@each_dtype
@pytest.mark.parametrize("shape", [(7,), (40, 30), (3, 4, 5, 6), (600, 500), ()], ids=str)
def test_frobenius_balls_and_spheres(dtype, shape):
    weight = randn(*shape, 1).squeeze(-1).to(dtype) + 1
    norm = weight.double().square().sum().sqrt().item()
    ball, sphere = FrobeniusBall(0.5 * norm), FrobeniusSphere(2 * norm)
    assert_inside([ball.project(weight).double().square().sum().sqrt()], ball.radius)
    margin = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-5)
    for projection in (ball, sphere):
        found = projection.project(weight).double()
        torch.testing.assert_close(found, weight.double() * (projection.radius / norm), rtol=2 * margin, atol=0)
        assert_idempotent(projection, weight)
    assert_same_bits(FrobeniusBall(1.1 * norm).project(weight), weight)


@pytest.mark.parametrize("kind", [FrobeniusBall, FrobeniusSphere])
def test_a_relative_radius_is_a_multiple_of_the_norm_at_the_start(kind):
    start = torch.tensor([[6.0, 8.0]])
    assert kind(0.7, relative=True).at_start(start) == kind(7.0)
    with pytest.raises(ValueError, match=rf"use `{kind.__name__}\(0.7, relative=True\)\.at_start\(weight\)`"):
        kind(0.7, relative=True).project(start)
    with pytest.raises(ValueError, match=r"needs a positive, finite norm at the start, got 0\.0"):
        kind(0.7, relative=True).at_start(torch.zeros(2, 2))


# --- singular values ------------------------------------------------------------------------------------------------


@fast
@given(weight=matrices(), bound=st.floats(0.1, 50))
def test_singular_values_are_clipped(weight, bound):
    projected = SpectralBall(bound).project(weight).numpy()
    u, sigma, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(projected, (u * np.minimum(sigma, bound)) @ vh, atol=1e-11)
    assert_inside(np.linalg.svd(projected, compute_uv=False), bound)


def test_singular_values_of_units_in_the_last_dims_are_clipped():
    weight = randn(3, 4, 5).double()
    found = SpectralBall(1.0).project(weight, dim=0)
    u, sigma, vh = np.linalg.svd(weight.flatten(1).T.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.flatten(1).T, (u * np.minimum(sigma, 1.0)) @ vh, atol=1e-11)


@each_dtype
@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (16, 3, 3, 3)], ids=str)
def test_the_spectral_bound_holds_after_rounding(dtype, shape):
    weight = (0.2 * randn(*shape)).to(dtype)
    sigma = np.linalg.svd(weight.double().flatten(1).numpy(), compute_uv=False)
    bound = float(np.median(sigma))
    found = np.linalg.svd(SpectralBall(bound).project(weight).double().flatten(1).numpy(), compute_uv=False)
    assert_inside(found, bound, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10 if dtype == torch.float16 else 0.0)
    assert_same_bits(SpectralBall(float(sigma[0]) * 1.01).project(weight), weight)


def test_large_matrices_are_scaled_to_within_the_error_of_the_power_iteration():
    weight = randn(256, 128)
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)[0]
    projected = SpectralBall(1.0).project(weight)
    torch.testing.assert_close(projected, weight * (projected[0, 0] / weight[0, 0]))
    assert_inside(np.linalg.svd(projected.double().numpy(), compute_uv=False), 1.0, rtol=0.03)
    assert_same_bits(SpectralBall(float(sigma) * 1.01).project(weight), weight)
    assert_idempotent(SpectralBall(1.0), weight)


def test_a_vector_kept_from_step_to_step_follows_the_largest_singular_value():
    projection, weight = SpectralBall(1.0), randn(256, 128)
    vector = projection.warm_start(weight)
    for step in range(300):
        weight.add_(randn(256, 128, seed=step + 1), alpha=1e-3)
        projection.project_(weight, vector=vector)
    torch.testing.assert_close(torch.linalg.vector_norm(vector), torch.tensor(1.0))
    assert_inside(np.linalg.svd(weight.double().numpy(), compute_uv=False), 1.0, rtol=0.02)


def test_the_matrix_of_a_transposed_convolution_has_a_row_an_output_channel():
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
    weight = layer.weight.detach()
    view, dim = norm_dims(layer, "weight", weight.shape)
    rows = torch.stack([weight.view(2, 3, 2, 3, 3)[g, :, o].flatten() for g in range(2) for o in range(2)]).double()
    u, sigma, vh = torch.linalg.svd(rows, full_matrices=False)
    bound = sigma[1].item()
    SpectralBall(bound).project_(weight.view(view), dim=dim)
    found = torch.stack([weight.view(2, 3, 2, 3, 3)[g, :, o].flatten() for g in range(2) for o in range(2)])
    torch.testing.assert_close(found.double(), u * sigma.clamp(max=bound) @ vh, rtol=1e-5, atol=1e-6)


# --- several ranks --------------------------------------------------------------------------------------------------

SPREAD = [MaxNorm(1.5), MaxNorm(1.5, dim=0), UnitNorm(), UnitNorm(dim=(0, 1)), NonNegative(), Box(-0.5, 0.5)]
SPREAD += [FrobeniusBall(3.0), FrobeniusSphere(3.0), SpectralBall(1.0)]


def project_spread(rank, world_size, shape, mesh_shape, placements):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", mesh_shape)
    whole = randn(*shape)
    for projection in SPREAD:
        weight = distribute_tensor(whole.clone(), mesh, placements)
        changed = projection.project_(weight)
        assert not isinstance(changed, DTensor)
        torch.testing.assert_close(weight.full_tensor(), projection.project(whole), rtol=2e-6, atol=1e-7)
        assert weight.placements == tuple(placements)
        assert_same_bits(projection.project(weight).to_local(), weight.to_local())


@pytest.mark.parametrize(
    ("shape", "mesh_shape", "placements"),
    [
        pytest.param((6, 5), (2,), [Shard(0)], id="rows apart"),
        pytest.param((6, 5), (2,), [Shard(1)], id="rows cut, unevenly"),
        pytest.param((1, 5), (2,), [Shard(0)], id="nothing on one rank"),
        pytest.param((6, 1), (2,), [Shard(1)], id="no column on one rank"),
        pytest.param((6, 5), (2,), [Replicate()], id="replicated"),
        pytest.param((70, 66), (2,), [Shard(1)], id="too large to decompose"),
        pytest.param((5, 7), (2, 2), [Shard(0), Shard(1)], id="rows apart and cut"),
        pytest.param((5, 7), (2, 2), [Replicate(), Shard(1)], id="replicated and cut"),
    ],
)
def test_a_weight_spread_over_ranks_is_projected_as_a_whole(shape, mesh_shape, placements):
    run_distributed(project_spread, shape, mesh_shape, placements, world_size=math.prod(mesh_shape))


def project_transposed(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)):
        whole = randn(*layer.weight.shape)
        weight = distribute_tensor(whole.clone(), mesh, [Shard(0)])
        view, dim = norm_dims(layer, "weight", weight.shape)
        MaxNorm(2.0).project_(weight.view(view), dim=dim)
        expected = MaxNorm(2.0).project(whole.view(view), dim=dim).view_as(whole)
        assert not torch.equal(expected, whole)
        torch.testing.assert_close(weight.full_tensor(), expected)


def test_input_channels_on_different_ranks_are_normed_together():
    run_distributed(project_transposed)


def project_fsdp_over_tensor_parallel(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    whole = {name: p.detach().copy_(randn(*p.shape)).clone() for name, p in model.named_parameters()}
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    for projection in (MaxNorm(1.5), MaxNorm(1.4, dim=0), FrobeniusBall(3.0)):
        for name in ("0.weight", "1.weight"):
            weight = model.get_parameter(name)
            projection.project_(weight)
            projection.project_(whole[name])
            torch.testing.assert_close(weight.full_tensor().detach(), whole[name])


def test_fsdp_over_tensor_parallel_cuts_a_dim_twice():
    run_distributed(project_fsdp_over_tensor_parallel, world_size=4)


def relative_radius(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    weight = distribute_tensor(torch.tensor([[6.0], [8.0]]), init_device_mesh("cpu", (2,)), [Shard(0)])
    return FrobeniusBall(0.5, relative=True).at_start(weight)


def test_a_relative_radius_is_that_of_the_whole_weight():
    assert run_distributed(relative_radius) == [FrobeniusBall(5.0)] * 2


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxNorm(0.0), "`max_norm` should be positive and finite, got 0.0"),
        (lambda: MaxNorm(-1.0), "`max_norm` should be positive and finite, got -1.0"),
        (lambda: MaxNorm(math.nan), "`max_norm` should be positive and finite, got nan"),
        (lambda: MaxNorm(math.inf), "`max_norm` should be positive and finite, got inf"),
        (lambda: FrobeniusBall(0), "`radius` should be positive and finite, got 0"),
        (lambda: FrobeniusBall(-2.0, relative=True), "`radius` should be positive and finite, got -2.0"),
        (lambda: FrobeniusSphere(math.nan), "`radius` should be positive and finite, got nan"),
        (lambda: SpectralBall(0.0), "`max_sigma` should be positive and finite, got 0.0"),
        (lambda: SpectralBall(1.0, iterations=0), "`iterations` should be a positive integer, got 0"),
        (lambda: Box(1.0, 1.0), "`low` should be below `high`, got low=1.0 and high=1.0"),
        (lambda: Box(2.0, -2.0), "`low` should be below `high`, got low=2.0 and high=-2.0"),
        (lambda: Box(math.nan, 1.0), "`low` should be below `high`, got low=nan"),
        (lambda: Box(0.0, math.nan), "`low` should be below `high`, got low=0.0 and high=nan"),
        (lambda: Box(-math.inf, math.inf), "`low` or `high` should be finite"),
        (lambda: MaxNorm(1.0).project(torch.ones(3)), "`dim` should be given for a weight with less than 2 dims"),
        (lambda: UnitNorm().project(torch.tensor(1.0)), "`dim` should be given for a weight with less than 2 dims"),
        (lambda: MaxNorm(1.0, dim=2).project(torch.ones(3, 4)), r"shape \(3, 4\), each from -2 to 1, got 2"),
        (lambda: MaxNorm(1.0).project(torch.ones(3, 4), dim=()), r"each from -2 to 1, got \(\)"),
        (lambda: UnitNorm(dim=(0, 0)).project(torch.ones(3, 4)), r"different dims .*, got \(0, 0\)"),
        (lambda: UnitNorm(dim=(1, -1)).project(torch.ones(3, 4)), r"different dims .*, got \(1, -1\)"),
        (lambda: SpectralBall(1.0, dim=-3).project(torch.ones(3, 4)), "each from -2 to 1, got -3"),
        (lambda: norm_dims(nn.Linear(2, 2), "weight", (2, 2), dim=5), "each from -2 to 1, got 5"),
        (lambda: unit_dims(torch.ones(4)), "`dim` should be given"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", ["1", None, [1.0], True, torch.ones(2)], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (MaxNorm, "max_norm"),
        (FrobeniusBall, "radius"),
        (FrobeniusSphere, "radius"),
        (SpectralBall, "max_sigma"),
        (lambda value: Box(value, 1.0), "low"),
        (lambda value: Box(-1.0, value), "high"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_no_number_is_refused_by_name(make, name, value):
    with pytest.raises(TypeError, match=f"`{name}` should be a number, got "):
        make(value)


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(1), torch.tensor(0.5)], ids=repr)
def test_other_numbers_bound_as_pythons_do(number):
    weight = randn(3, 4)
    for make in (MaxNorm, FrobeniusBall, lambda value: Box(-1.0, value + 0.1)):
        torch.testing.assert_close(make(number).project(weight), make(float(number)).project(weight))


@pytest.mark.parametrize("relative", ["no", 1, None], ids=repr)
@pytest.mark.parametrize("ball", [FrobeniusBall, FrobeniusSphere], ids=lambda ball: ball.__name__)
def test_relative_is_true_or_false(ball, relative):
    with pytest.raises(TypeError, match="`relative` should be True or False, got "):
        ball(1.0, relative=relative)


@pytest.mark.parametrize("iterations", [2.0, math.nan, math.inf, True, "3", -1], ids=repr)
def test_iterations_are_a_positive_integer(iterations):
    with pytest.raises(ValueError, match="`iterations` should be a positive integer, got "):
        SpectralBall(1.0, iterations=iterations)


@pytest.mark.parametrize("shape", [(3, 4), (100, 80)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_is_broken_stays_visible_in_a_spectral_ball(value, shape):
    weight = randn(*shape)
    weight[1, 2] = value
    SpectralBall(0.1).project_(weight)
    assert not weight.isfinite().all()


def test_a_projection_of_ones_own_needs_one_method():
    class Mean(Projection):
        def project_(self, weight, *, dim=None):
            return weight.fill_(weight.mean()).any()

    torch.testing.assert_close(Mean().project(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 2.0]))
    assert not Mean.per_unit
