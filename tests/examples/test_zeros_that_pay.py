"""Does the example remove what nothing reads, nothing else, and say truly what sparse tensor cores take?"""

import pytest
import torch
import zeros_that_pay as example
from torch import nn
from zeros_that_pay import Result, TwoOfFour, claims_of, fits_sparse_tensor_cores, unread, without_unread

from lightning_regularize.projections import NM
from tests.models import randn

MODELS = [example.ResNet(channels=8, hidden=16), example.ViT(width=8, hidden=16)]
IMAGES = randn(5, 64).double()


@pytest.fixture(params=MODELS, ids=lambda model: type(model).__name__)
def model(request):
    """Every parameter and statistic is a random number, so that nothing is zero by chance."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*request.param.parameters(), *request.param.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1
    return request.param.double().eval()


def test_without_the_units_that_nothing_reads_outputs_are_the_same(model):
    for layer, units in zip(model.layers, ([0, 3, 4], [15]), strict=True):
        layer.reads.weight.data[:, units] = 0
    smaller = without_unread(model, IMAGES[:1])
    assert [layer.writes.weight.shape[0] for layer in smaller.layers] == [13, 15]
    assert [layer.reads.weight.shape[1] for layer in smaller.layers] == [13, 15]
    assert [layer.reads.weight.shape[1] for layer in model.layers] == [16, 16]  # the model itself stays
    torch.testing.assert_close(smaller(IMAGES), model(IMAGES), rtol=1e-12, atol=1e-12)


def test_a_unit_that_is_written_by_zeros_stays_for_it_is_a_constant_that_is_read(model):
    model.layers[0].writes.weight.data[3] = 0
    assert unread(model.layers[0].reads) == []


def test_of_a_layer_of_zeros_one_unit_stays():
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    assert unread(layer) == [1, 2, 3]


@pytest.mark.parametrize(
    ("weight", "fits"),
    [
        (NM(2, 4).project(randn(32, 64)), True),
        (NM(3, 4).project(randn(32, 64)), True),
        (NM(1, 4).project(randn(32, 64)), False),
        (NM(2, 4, dim=0).project(randn(32, 64)), False),
        (NM(2, 4).project(randn(16, 64)), False),
        (NM(2, 4).project(randn(32, 32)), False),
    ],
    ids=["2 of 4", "3 of 4", "1 of 4", "along outputs", "few rows", "few columns"],
)
def test_which_weights_sparse_tensor_cores_take(weight, fits):
    assert fits_sparse_tensor_cores(weight) is fits


RIGHT = Result("ResNet", [8], [4], (0.9, 0.9, 0.9), (2.0, 1.0), 1e-6)
FITTING = TwoOfFour(0.9, weights=8, fitting=8)


@pytest.mark.parametrize(
    ("result", "semi", "number"),
    [
        (RIGHT, FITTING, 0),
        (RIGHT._replace(difference=2e-5), FITTING, 1),
        (RIGHT._replace(left=[5]), FITTING, 1),
        (RIGHT._replace(accuracies=(0.9, 0.88, 0.88)), FITTING, 1),
        (RIGHT._replace(milliseconds=(1.0, 1.0)), FITTING, 1),
        (RIGHT, FITTING._replace(fitting=7), 1),
        (RIGHT, FITTING._replace(accuracy=0.87), 1),
    ],
)
def test_each_claim_can_fail(result, semi, number):
    assert [claim.holds for claim in claims_of([result], semi)].count(False) == number
