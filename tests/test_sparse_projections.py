"""Are sparse projections the nearest points of their sets, and is what they cannot do refused?"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.sparse import _semi_structured_conversions as conversions

from lightning_regularize import WeightConstraint
from lightning_regularize.projections import NM, MaxNorm, TopShare
from lightning_regularize.schedules import CubicRamp
from tests.distributed import run_distributed
from tests.models import randn
from tests.training.support import QUIET, Regression, train

pytestmark = QUIET

KINDS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]
SHAPES = [(3, 8), (1, 16), (5, 8, 3), (2, 24, 3, 2)]
CASES = [(n, m, shape) for n, m in KINDS for shape in SHAPES]  # 20


def nearest(group, n):
    """The nearest vector with ``n`` zeros, of all ways to choose them."""
    ways = [
        np.where(np.isin(range(len(group)), zeros), 0, group) for zeros in itertools.combinations(range(len(group)), n)
    ]
    return min(ways, key=lambda way: np.square(way - group).sum())


@pytest.mark.parametrize(("n", "m", "shape"), CASES, ids=[f"{n} of {m}, {shape}" for n, m, shape in CASES])
def test_the_result_is_the_nearest_of_all(n, m, shape):
    weight = randn(*shape).double()
    rows = np.moveaxis(weight.numpy(), 1, -1)
    expected = np.apply_along_axis(nearest, -1, rows.reshape(*rows.shape[:-1], -1, m), n).reshape(rows.shape)
    assert np.array_equal(np.moveaxis(NM(n, m).project(weight).numpy(), 1, -1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_list_is_as_one_after_the_other_and_a_second_time_changes_nothing(dtype):
    weights = [randn(*shape).to(dtype) for shape in ((3, 8), (3, 8), (2, 4, 3), (0, 4))]
    weights.append(randn(8, 3).to(dtype).T)  # not contiguous
    expected = [NM(2, 4).project(each) for each in weights]
    assert NM(2, 4).project_(weights)
    assert all(torch.equal(found, each) for found, each in zip(weights, expected, strict=True))
    assert not NM(2, 4).project_(weights)


def test_of_equal_weights_the_first_become_zero():
    assert NM(1, 2).project(torch.tensor([[1.0, -1.0, -2.0, 2.0]])).tolist() == [[0.0, -1.0, 0.0, 2.0]]


def test_nan_stays_to_be_seen():
    assert NM(1, 2).project(torch.tensor([[torch.nan, 1.0]]))[0, 0].isnan()


BAD = {
    "n > m": ((5, 4), "`n` should be less than `m`, or all weights are zero, got n=5 and m=4"),
    "n = m": ((4, 4), "`n` should be less than `m`"),
    "n = 0": ((0, 4), "`n` should be a positive integer, got 0"),
    "half": ((1, 2.5), "`m` should be a positive integer, got 2.5"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        NM(*arguments)


def test_m_that_does_not_divide_is_told_before_training():
    module = Regression()
    before = module.hidden.weight.detach().clone()
    with pytest.raises(ValueError, match=r"WeightConstraint: 'hidden.weight': `m` should divide .* got m=4 for dim 1"):
        train(module, WeightConstraint(NM(2, 4)))
    assert torch.equal(module.hidden.weight, before)


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Conv2d(8, 3, 3), nn.ConvTranspose2d(8, 3, 3)], ids=repr)
def test_the_layer_says_which_dim_is_the_input(layer):
    callback = WeightConstraint(NM(6, 8))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with callback.attach(optimizer, layer):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    inputs = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    assert ((layer.weight != 0).sum(inputs) == 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_of_four_is_the_layout_of_sparse_tensor_cores(dtype):
    module, callback = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 7)), WeightConstraint(NM(2, 4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with callback.attach(optimizer, module):
        module(randn(5, 64)).sum().backward()
        optimizer.step()
    weight = module[0].weight.detach().to(dtype)
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.shape == (32, 32)  # half of the elements, and which half
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, meta), weight)
    assert weight.count_nonzero() == weight.numel() / 2


# --- the largest share ----------------------------------------------------------------------------------------------

# 20 lists of weights; the tenth has one that is large enough for another way to find its threshold.
SHARES = (0.1, 0.37, 0.5, 0.9)
LISTS = [
    [(3, 8), (3, 8), (5,)],
    [(1, 1), (2, 2)],
    [(7, 3, 2), (0, 4), (4, 5)],
    [(300, 300), (11, 13), (3,)],
    [(64, 10), (10, 64), (64,), (8, 2, 3, 3)],
]


def largest(arrays, share):
    """All but the largest of some arrays together are zero; of equal ones the last are kept."""
    flat = np.concatenate([array.ravel() for array in arrays]) if arrays else np.zeros(0)
    kept = max(round(share * len(flat)), 1) if len(flat) else 0
    order = np.argsort(np.abs(flat), kind="stable")
    flat[order[: len(flat) - kept]] = 0
    pieces = np.split(flat, np.cumsum([array.size for array in arrays])[:-1])
    return [piece.reshape(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def expected_of(weights, share, scope):
    arrays = [each.double().numpy().copy() for each in weights]
    return largest(arrays, share) if scope == "all" else [largest([each], share)[0] for each in arrays]


def rounded(shapes, dtype):
    """Rounded to tenths, so that many are equal."""
    return [(10 * randn(*shape, seed=i)).round().div(10).to(dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("scope", ["tensor", "all"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shapes", LISTS, ids=lambda shapes: f"{len(shapes)} of {shapes[0]}")
def test_the_largest_share_is_kept(shapes, share, scope):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weights = rounded(shapes, dtype)
        expected = expected_of(weights, share, scope)
        before = [each.clone() for each in weights]
        changed = TopShare(share, scope).project_(weights)
        if scope == "tensor":
            for found, each in zip(weights, expected, strict=True):
                assert np.array_equal(found.double().numpy(), each)
        else:  # of equal ones in several tensors any may be kept
            assert sum(map(torch.count_nonzero, weights)) == sum(map(np.count_nonzero, expected))
            distance = sum((found - each).double().square().sum() for found, each in zip(weights, before, strict=True))
            least = sum(np.square(a - b.double().numpy()).sum() for a, b in zip(expected, before, strict=True))
            assert distance.item() == pytest.approx(least, rel=1e-12, abs=1e-12)
        assert changed == any(not torch.equal(a, b) for a, b in zip(weights, before, strict=True))
        assert not TopShare(share, scope).project_(weights)


@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_equal_weights_are_dropped_to_one_element(scope):
    for size in (10, 300 * 300):
        weight = torch.ones(size, dtype=torch.bfloat16)
        assert TopShare(0.1, scope).project(weight).count_nonzero() == size // 10
    assert TopShare(0.01, scope).project(torch.ones(10)).count_nonzero() == 1


@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_nan_stays_and_other_layouts_are_written_to(scope):
    weight = torch.tensor([[torch.nan, 3.0, 1.0], [2.0, -5.0, torch.inf]])
    found = TopShare(0.5, scope).project(weight.T)
    assert found.nan_to_num(9.0, posinf=torch.inf).tolist() == [[9.0, 0.0], [0.0, -5.0], [0.0, torch.inf]]
    image = randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    projected = TopShare(0.3, scope).project(image)
    assert np.array_equal(projected.double().numpy(), expected_of([image], 0.3, "tensor")[0])


def project_pieces(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh, found = init_device_mesh("cpu", (world_size,)), {}
    for i, shapes in enumerate(LISTS):
        for scope in ("tensor", "all"):
            for dim in (0, -1):
                weights = rounded(shapes, torch.float32)
                spread = [distribute_tensor(w, mesh, [Shard(dim % w.dim())]) for w in weights]
                spread[-1] = weights[-1]  # one that every rank has
                TopShare(0.3, scope).project_(spread)
                found[i, scope, dim] = [w.full_tensor().numpy() for w in spread[:-1]] + [weights[-1].numpy()]
    return found


def test_pieces_are_projected_as_the_whole():
    first, second = run_distributed(project_pieces)
    for (i, scope, dim), arrays in first.items():
        weights = rounded(LISTS[i], torch.float32)
        expected = expected_of(weights, 0.3, scope)
        assert all(np.array_equal(a, b) for a, b in zip(arrays, second[i, scope, dim], strict=True))
        assert sum(map(np.count_nonzero, arrays)) == sum(map(np.count_nonzero, expected))
        if scope == "tensor":
            assert all(np.array_equal(a, b) for a, b in zip(arrays, expected, strict=True))
        for array, weight in zip(arrays, weights, strict=True):
            assert np.array_equal(array[array != 0], weight.numpy()[array != 0])


BAD_SHARES = {
    "0": ((0.0,), ValueError, r"`share` should be in \(0, 1\], the part that is kept, got 0.0"),
    "percent": ((10,), ValueError, r"got 10. 10 % is 0.1"),
    "tensor": ((torch.tensor(2.0),), ValueError, r"`share` should be in \(0, 1\]"),
    "negative": ((-0.5,), ValueError, "got -0.5"),
    "nan": ((float("nan"),), ValueError, "got nan"),
    "text": (("0.1",), TypeError, "`share` should be a number, got '0.1'. Write 0.1 without quotes"),
    "function": ((len,), TypeError, "`share` should be a number or a `Schedule`"),
    "scope": ((0.1, "global"), ValueError, "`scope` should be 'tensor' or 'all', got 'global'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_SHARES.values(), ids=BAD_SHARES)
def test_bad_shares(arguments, error, message):
    with pytest.raises(error, match=message):
        TopShare(*arguments)


def test_a_schedule_needs_somebody_who_reads_it():
    for projection in (TopShare(CubicRamp(1.0, 0.1)), MaxNorm(CubicRamp(1.0, 0.1))):
        with pytest.raises(ValueError, match=r"should be a number by now, got CubicRamp.*WeightConstraint reads"):
            projection.project(torch.ones(2, 2))
