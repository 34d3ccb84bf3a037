"""Are the intercepts those of closed forms, and are the tables of the example right?"""

import io

import bias_exclusion as example
import numpy as np
import pytest
import torch
from bias_exclusion import Data, fit_line, samples
from label_noise import digits, with_noise
from rich.console import Console
from sklearn.linear_model import LinearRegression, Ridge

from lightning_regularize import WeightDecay
from tests.examples.support import run


def solution(data, decay, *, bias_decays):
    """Intercept and weights that minimize half the mean squared error and half the decayed squares."""
    inputs, targets = data.inputs.numpy(), data.targets.numpy()[:, 0]
    design = np.column_stack([np.ones(len(inputs)), inputs])
    decays = np.diag([decay if bias_decays else 0.0] + [decay] * inputs.shape[1])
    intercept, *weights = np.linalg.solve(design.T @ design / len(inputs) + decays, design.T @ targets / len(inputs))
    return intercept, weights


def rows_of(text):
    """The cells of rich tables, row by row."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def assert_fit(fit, intercept, weights):
    assert fit.intercept == pytest.approx(intercept, abs=1e-9, rel=0)
    np.testing.assert_allclose(fit.weights, weights, rtol=0, atol=1e-9)


def test_inputs_have_mean_zero_and_targets_the_stated_line():
    data = samples(0, number=400)
    assert data.inputs.mean(dim=0).abs().max() < 1e-12
    line = LinearRegression().fit(data.inputs, data.targets[:, 0])
    # four standard errors of noise 0.5 in 400 examples
    assert line.intercept_ == pytest.approx(10, abs=0.1, rel=0)
    np.testing.assert_allclose(line.coef_, [3.0, 0.5, -0.5], atol=0.1)
    assert not torch.equal(samples(1, number=400).targets, data.targets)


@pytest.mark.parametrize("decay", [0.5, 1.0, 3.0])
def test_a_decayed_intercept_is_the_mean_over_one_plus_decay(decay):
    data = samples(2)
    fit = fit_line(data, [WeightDecay(decay, exclude=())], 250)
    assert fit.intercept == pytest.approx(data.targets.mean().item() / (1 + decay), abs=1e-9, rel=0)
    assert_fit(fit, *solution(data, decay, bias_decays=True))


def test_an_excluded_intercept_is_that_of_ridge():
    data = samples(3)
    fit = fit_line(data, [WeightDecay(2.0)], 300)
    ridge = Ridge(alpha=2.0 * 60).fit(data.inputs.numpy(), data.targets.numpy()[:, 0])
    assert_fit(fit, ridge.intercept_, ridge.coef_)
    assert fit.intercepts[0] == 0
    assert len(fit.intercepts) == 301


@pytest.mark.parametrize("exclude", [(), ("bias",)], ids=["decayed", "excluded"])
def test_the_closed_forms_hold_for_inputs_that_are_not_centered(exclude):
    """Then a spoiled intercept spoils the weights, too."""
    centered = samples(4)
    data = Data(centered.inputs + 0.5, centered.targets)
    fit = fit_line(data, [WeightDecay(1.0, exclude=exclude)], 500)
    assert_fit(fit, *solution(data, 1.0, bias_decays=not exclude))


def test_without_decay_it_is_least_squares():
    data = samples(5)
    line = LinearRegression().fit(data.inputs.numpy(), data.targets.numpy()[:, 0])
    assert_fit(fit_line(data, [], 400), line.intercept_, line.coef_)


def test_the_table_says_why_each_parameter_is_where_it_is():
    console = Console(width=80, file=io.StringIO())
    console.print(example.table_of_kinds(example.Encoder()))
    assert {name: facts for name, *facts in rows_of(console.file.getvalue())} == {
        "positions": ["1x12x16", "weight", "decay", "-"],
        "layer_scale": ["16", "vector", "no_decay", "vector"],
        "tokens.weight": ["100x16", "embedding", "decay", "-"],
        "norm.weight": ["16", "norm", "no_decay", "norm"],
        "norm.bias": ["16", "bias", "no_decay", "bias"],
        "attention.in_proj_weight": ["48x16", "weight", "decay", "-"],
        "attention.in_proj_bias": ["48", "bias", "no_decay", "bias"],
        "attention.out_proj.weight": ["16x16", "weight", "decay", "-"],
        "attention.out_proj.bias": ["16", "bias", "no_decay", "bias"],
        "mlp.0.weight": ["32x16", "weight", "decay", "-"],
        "mlp.0.bias": ["32", "bias", "no_decay", "bias"],
        "mlp.1.weight": ["1", "vector", "no_decay", "vector"],
        "mlp.2.weight": ["16x32", "weight", "decay", "-"],
        "mlp.2.bias": ["16", "bias", "no_decay", "bias"],
    }


def test_the_right_labels_are_those_that_the_wrong_ones_were_made_of():
    sets = example.training_sets(7)
    (images, wrong), (same_images, right) = sets["40 % wrong"], sets["right"]
    assert torch.equal(images, same_images)
    assert torch.equal(images, digits(7).train[0])
    assert torch.equal(with_noise(right, 7), wrong)
    assert (right != wrong).sum() == 240


def test_a_whole_run_shows_what_its_docstring_says(tmp_path):
    process = run("bias_exclusion", "--output", tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\nholds: ") == 4
    rows = rows_of(process.stdout)
    intercepts = {name: float(first) for name, first, *_ in rows if first.startswith(("4.", "9."))}
    assert intercepts == {
        "none": pytest.approx(9.908276, abs=1e-6, rel=0),
        "WeightDecay(1.0)": pytest.approx(9.908276, abs=1e-6, rel=0),
        "WeightDecay(1.0, exclude=())": pytest.approx(4.954138, abs=1e-6, rel=0),
    }
    accuracies = {name: [float(first), *map(float, others)] for name, first, *others in rows if first.startswith("0.")}
    assert accuracies == {  # the standard deviation over seeds is about 0.015
        "none": pytest.approx([0.775, 0.972], abs=0.04, rel=0),
        "WeightDecay(10.0)": pytest.approx([0.733, 0.973], abs=0.04, rel=0),
        'WeightDecay(10.0, exclude=("bias",))': pytest.approx([0.833, 0.968], abs=0.04, rel=0),
    }
