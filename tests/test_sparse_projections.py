"""Are sparse projections the nearest points of their sets, and is what they cannot do refused?"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

from lightning_regularize import WeightConstraint
from lightning_regularize.projections import NM
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
