"""Are `Rank` and the nuclear norm what numpy's decomposition in float64 says, also where ranks hold pieces?"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_regularize import WeightPenalty
from lightning_regularize.penalties import NuclearNorm
from lightning_regularize.projections import Rank
from tests.distributed import run_distributed
from tests.models import randn
from tests.properties import assert_idempotent, assert_pure

# 20 shapes: tall, wide, square, convolutions, one row, one column.
SHAPES = [
    *((2, 2), (3, 3), (4, 5), (5, 4), (8, 8), (1, 6), (6, 1), (7, 20), (20, 7), (16, 33), (33, 16), (40, 3), (3, 40)),
    *((4, 3, 2), (2, 3, 4), (6, 2, 3, 3), (3, 6, 1, 2), (70, 66), (2, 300), (300, 5)),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def decomposed(weight):
    return np.linalg.svd(weight.double().flatten(1).numpy(), full_matrices=False)


def composed(u, sigma, vh, shape):
    return torch.from_numpy((u * sigma) @ vh).view(shape)


def nearest_of_rank(weight, k):
    u, sigma, vh = decomposed(weight)
    return composed(u, np.where(np.arange(len(sigma)) < k, sigma, 0), vh, weight.shape)


def shrunk(weight, threshold):
    u, sigma, vh = decomposed(weight)
    return composed(u, np.maximum(sigma - threshold, 0), vh, weight.shape)


@each_shape
@pytest.mark.parametrize("k", [1, 3])
def test_the_nearest_matrix_of_a_rank(shape, k):
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        weight = randn(*shape).to(dtype)
        found = Rank(k).project(weight)
        torch.testing.assert_close(found.double(), nearest_of_rank(weight, k), atol=atol, rtol=0)


@each_shape
def test_the_proximal_map_of_the_nuclear_norm(shape):
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        weight = randn(*shape).to(dtype)
        expected = shrunk(weight, 0.7)
        NuclearNorm().proximal_(weight, threshold=torch.tensor(0.7, dtype=torch.float64))
        torch.testing.assert_close(weight.double(), expected, atol=atol, rtol=0)


@each_shape
def test_the_gradient_is_that_of_autograd(shape):
    weight, gradient = randn(*shape).double().requires_grad_(), torch.ones(shape, dtype=torch.float64)
    torch.linalg.matrix_norm(weight.flatten(1), "nuc").backward()
    NuclearNorm().add_gradient_(gradient, weight, 0.5)
    torch.testing.assert_close(gradient, 1 + 0.5 * weight.grad, atol=1e-9, rtol=0)
    value = NuclearNorm().value(weight, 0.5).item()
    assert value == pytest.approx(0.5 * decomposed(weight.detach())[1].sum(), rel=1e-12, abs=0)


def test_zero_singular_values_have_no_gradient():
    weight = torch.outer(randn(5), randn(4, seed=1))
    gradient = torch.zeros_like(weight)
    NuclearNorm().add_gradient_(gradient, weight, 1.0)
    torch.testing.assert_close(gradient, weight / weight.norm(), atol=1e-6, rtol=0)
    gradient = torch.zeros(2, 3)
    NuclearNorm().add_gradient_(gradient, torch.zeros(2, 3), 1.0)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_second_projection_changes_nothing(dtype):
    assert_pure(Rank(2), randn(12, 9).to(dtype))
    once = Rank(2).project(randn(12, 9).to(dtype))
    if dtype in (torch.float32, torch.float64):
        assert_idempotent(Rank(2), once)
    sigma = torch.linalg.svdvals(once.double())
    assert sigma[2] <= torch.finfo(dtype).eps * sigma[0] * (4 if dtype in (torch.float32, torch.float64) else 1)


def test_a_large_matrix_is_projected_nearly_as_well():
    noise, low = randn(300, 280).double(), randn(300, 20, seed=1).double() @ randn(20, 280, seed=2).double()
    far = (noise - Rank(20).project(noise)).norm() / (noise - nearest_of_rank(noise, 20)).norm()
    assert 1 <= far < 1.01  # there is no gap between singular values
    weight = low + 1e-3 * noise
    found = Rank(20).project(weight)
    torch.testing.assert_close(found, nearest_of_rank(weight, 20), atol=1e-6, rtol=0)
    assert not Rank(20).project_(found)


def test_lists_and_what_is_not_finite():
    weights = [randn(4, 6), randn(4, 6, seed=1), randn(6, 4).T, randn(3, 2, 5), torch.full((4, 6), torch.nan)]
    weights.append(torch.empty(0, 6))
    weights.append(torch.full((4, 6), torch.inf))
    expected = [each if i in (4, 5, 6) else Rank(2).project(each) for i, each in enumerate(weights)]
    assert Rank(2).project_([each.clone() for each in weights])
    found, shortened = [each.clone() for each in weights], [each.clone() for each in weights]
    Rank(2).project_(found)
    NuclearNorm().proximal_(shortened, 0.5)
    for i, (each, one, short, weight) in enumerate(zip(found, expected, shortened, weights, strict=True)):
        torch.testing.assert_close(each, one, equal_nan=True)
        alone = weight.clone()
        if i != 5:
            NuclearNorm().proximal_(alone, 0.5)
        torch.testing.assert_close(short, alone, equal_nan=True)
    assert not Rank(4).project_(weights)


def project_pieces(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh, found = init_device_mesh("cpu", (world_size,)), []
    for i, shape in enumerate(SHAPES):
        weight = randn(*shape).double()
        low, short = (distribute_tensor(weight, mesh, [Shard(i % 2)]) for _ in range(2))
        Rank(2).project_(low)
        NuclearNorm().proximal_(short, 0.7)
        found.append((low.full_tensor().numpy(), short.full_tensor().numpy()))
    return found


def test_pieces_are_treated_as_the_whole():
    for found in run_distributed(project_pieces):
        for i, (low, short) in enumerate(found):
            weight = randn(*SHAPES[i]).double()
            np.testing.assert_allclose(low, nearest_of_rank(weight, 2), rtol=0, atol=1e-12)
            np.testing.assert_allclose(short, shrunk(weight, 0.7), rtol=0, atol=1e-12)


def trained(penalty, make_optimizer, rank=2):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    target = randn(5, rank).double() @ randn(rank, 6, seed=1).double() + 0.05 * randn(5, 6, seed=2).double()
    optimizer = make_optimizer(layer.parameters())
    with penalty.attach(optimizer, layer):
        for _ in range(300):
            optimizer.zero_grad()
            (0.5 * (layer.weight - target).square().sum()).backward()
            optimizer.step()
    return layer.weight.detach(), target


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_ends_at_the_minimum(momentum):
    """Of half the squared distance to a target plus the norm, which the proximal map gives in one step."""
    found, target = trained(
        WeightPenalty(NuclearNorm(), 0.3, method="proximal"),
        lambda parameters: torch.optim.SGD(parameters, lr=0.02 if momentum else 0.2, momentum=momentum),
    )
    torch.testing.assert_close(found, shrunk(target, 0.3), atol=1e-4, rtol=0)
    assert torch.linalg.matrix_rank(found, atol=1e-9) == 2


def test_adam_is_refused_before_any_weight_changes():
    with pytest.raises(
        Exception, match=r"of NuclearNorm.* needs one step size .* Adam has one for each weight: use SGD"
    ):
        trained(WeightPenalty(NuclearNorm(), 0.3, method="proximal"), torch.optim.Adam)


BAD = {
    "k = 0": (lambda: Rank(0), ValueError, "`k` should be a positive integer, got 0"),
    "k = 1.5": (lambda: Rank(1.5), ValueError, "`k` should be a positive integer, got 1.5"),
    "dim": (lambda: NuclearNorm(dim="rows"), TypeError, "`dim` should be None, an integer"),
    "one threshold": (
        lambda: NuclearNorm().proximal_(torch.ones(2, 2), torch.ones(2, 2)),
        ValueError,
        r"`threshold` should be a number or a 0-d tensor: .* got shape \(2, 2\)",
    ),
    "vector": (lambda: Rank(1).project(torch.ones(3)), ValueError, "`dim` should be given for a weight with less than"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
