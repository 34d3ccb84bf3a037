"""Does torch take weights that are zero in two of four places as its sparse ones, and compute the same with them?

Needs CUDA, and a GPU with sparse tensor cores.
"""

import copy

import pytest
import torch
from torch import nn

from lightning_regularize import WeightConstraint
from lightning_regularize.projections import NM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs CUDA and compute capability 8.0",
    ),
    # torch 2.13: sparse semi-structured tensors are a prototype
    pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_trained_model_is_converted_and_computes_the_same(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)).cuda()
    inputs, targets = torch.randn(128, 128, device="cuda"), torch.randn(128, 64, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with WeightConstraint(NM(2, 4)).attach(optimizer, model):
        for _ in range(3):
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
    model.to(dtype)
    converted, inputs = copy.deepcopy(model), inputs.to(dtype)
    for layer in (converted[0], converted[2]):
        sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        assert torch.equal(sparse.to_dense(), layer.weight)
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    with torch.inference_mode():
        found, expected = converted(inputs), model(inputs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=4 * eps)
