"""Are heads cut out where they are zero, so that outputs stay, and judged by what was found?"""

import pytest
import torch
from head_pruning import HEADS, LAYERS, WIDTH, Outcome, Transformer, claims_of, norms, without


@pytest.mark.parametrize("left", [[0, 1, 2, 3], [1], [0, 2], []], ids=str)
def test_outputs_stay_where_what_is_cut_out_is_zero(left):
    torch.manual_seed(0)
    model = Transformer()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)  # biases too
    for block in model.blocks:
        for head in set(range(HEADS)) - set(left):
            block.attention.in_proj_weight.data.view(3, HEADS, -1, WIDTH)[:, head] = 0
            block.attention.out_proj.weight.data.view(WIDTH, HEADS, -1)[:, :, :][:, head] = 0
        assert norms(block.attention).nonzero().flatten().tolist() == left
    images = torch.rand(5, 64)
    smaller = without(model, [left] * LAYERS)
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-5, atol=1e-5)
    sizes = [sum(p.numel() for p in each.blocks.parameters()) for each in (smaller, model)]
    assert sizes[0] < sizes[1] or len(left) == HEADS


@pytest.mark.parametrize(
    ("gone", "accuracy", "holds"), [(3, 0.9, True), (2, 0.9, False), (12, 0.9, False), (3, 0.8, False)]
)
def test_claims_are_judged_by_heads_and_accuracy(gone, accuracy, holds):
    model = Transformer()
    values = torch.arange(LAYERS * HEADS).ge(gone).float().view(LAYERS, HEADS)
    dense = Outcome(model, list(torch.ones(LAYERS, HEADS)), 0.91)
    heads, accuracies, _ = claims_of(dense, Outcome(model, list(values), accuracy), seed=0)
    assert (heads.holds and accuracies.holds) is holds
