"""Does the example give each weight to the right optimizer, and claim only what exceeds the spread?"""

import muon_and_decay as example
import pytest
from muon_and_decay import CONSTANT, MUON, NONE, RIGHT, RUNS, Classifier, Sample, claim, claim_of_no_difference
from torch.optim import Muon


def test_muon_gets_the_three_hidden_layers():
    module = Classifier(RUNS[MUON].optimizer)
    muon, rest = module.make_optimizer(module).optimizers
    assert isinstance(muon, Muon)
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(128, 64), (128, 128), (128, 128)]
    assert any(p is module.head.weight for p in rest.param_groups[0]["params"])


@pytest.mark.parametrize(("offset", "holds"), [(0.045, True), (0.035, False), (-0.045, False)])
def test_a_difference_is_claimed_if_it_is_larger_than_both_deviations_together(offset, holds):
    values = [0.5, 0.52, 0.54]  # a standard deviation of 0.02
    samples = {
        MUON: {RIGHT: Sample([value + offset for value in values])},
        NONE: {RIGHT: Sample(values)},
    }
    found = claim(samples, MUON, NONE, RIGHT)
    assert found.holds is holds
    assert f"{0.52 + offset:.3f} ± 0.020 and 0.520 ± 0.020" in found.measured


@pytest.mark.parametrize(("offset", "holds"), [(0.035, True), (0.045, False), (-0.045, False)])
def test_no_difference_is_claimed_only_if_none_is_larger_than_both_deviations_together(offset, holds):
    values = [0.5, 0.52, 0.54]
    names = {NONE: 0.0, CONSTANT: 0.01, MUON: offset}
    samples = {name: {RIGHT: Sample([value + shift for value in values])} for name, shift in names.items()}
    assert claim_of_no_difference(samples, list(names), RIGHT).holds is holds


def test_a_sample_is_told_by_mean_and_standard_deviation():
    assert str(Sample([0.8, 0.9, 1.0])) == "0.900 ± 0.100"
    assert set(example.EPOCHS) == {"right", "40 % wrong"}
