"""Do the three ways agree with closed forms and hand-written loops, and does decay help as the example says?"""

import high_dimensional_regression as example
import numpy as np
import pytest
import torch
from high_dimensional_regression import DECAY, LIMIT, LONG, NONE, PENALTY, SHORT, fit, samples
from scipy.optimize import brentq
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold

from lightning_regularize import L2Penalty, WeightConstraint, WeightDecay
from lightning_regularize.projections import FrobeniusBall

FULL_BATCH = SHORT._replace(batch_size=20)  # so that an oracle needs no order


def ridge_of(train, decay):
    """The closed form for half the mean squared error: scikit-learn sums over the examples instead."""
    return Ridge(alpha=decay * len(train.inputs)).fit(train.inputs.numpy(), train.targets.numpy()[:, 0])


def test_data_have_the_stated_weights_bias_and_noise():
    for part, size in zip(samples(0), (20, 100), strict=True):
        assert part.inputs.shape == (size, 200)
        assert part.targets.shape == (size, 1)
        assert part.targets.dtype == torch.float64
    inputs, targets = samples(0)[1]
    noise = targets - inputs @ torch.full((200, 1), 0.01, dtype=torch.float64) - 0.05
    assert noise.mean().item() == pytest.approx(0, abs=0.004, rel=0)  # four standard errors
    assert noise.std().item() == pytest.approx(0.01, abs=0.003, rel=0)
    assert inputs.std().item() == pytest.approx(1, abs=0.02, rel=0)
    assert not torch.equal(samples(1)[1].inputs, inputs)


def test_no_initial_weight_is_an_input():
    """numpy and torch, seeded alike, should draw different numbers."""
    train, test = samples(0)
    start = fit(SHORT._replace(epochs=1), train, test, [], 0).weights[0]
    assert start.std().item() == pytest.approx(0.01, abs=0.002, rel=0)
    assert np.abs(np.corrcoef(start.numpy(), train.inputs.numpy())[0, 1:]).max() < 0.3


@pytest.mark.parametrize(
    ("callbacks", "decay", "limit"),
    [
        ([], 0.0, np.inf),
        ([L2Penalty(3.0)], 3.0, np.inf),
        ([WeightDecay(3.0)], 3.0, np.inf),
        ([WeightConstraint(FrobeniusBall(0.05))], 0.0, 0.05),
    ],
    ids=["none", "penalty", "decay", "limit"],
)
def test_steps_are_those_of_a_loop_by_hand(callbacks, decay, limit):
    train, test = samples(3)
    curves = fit(FULL_BATCH, train, test, callbacks, 3)
    x, y = train.inputs.numpy(), train.targets.numpy()[:, 0]
    w, b = curves.weights[0].numpy(), 0.0
    for after in curves.weights[1:]:
        error = x @ w + b - y
        w, b = w - 0.01 * (x.T @ error / 20 + decay * w), b - 0.01 * error.mean()
        w = w * min(1, limit / np.sqrt(w @ w))
        np.testing.assert_allclose(after.numpy(), w, rtol=0, atol=1e-12)
    assert curves.bias == pytest.approx(b, abs=1e-12, rel=0)
    assert curves.final("training") == pytest.approx(np.mean((x @ w + b - y) ** 2) / 2, rel=1e-9, abs=0)


def test_a_limit_gives_the_ridge_whose_norm_it_is():
    """The strength of that ridge is found by a root finder, which knows nothing of gradients and projections."""
    train, test = samples(1)
    limit = 0.02
    curves = fit(LONG, train, test, [WeightConstraint(FrobeniusBall(limit))], 1)
    decay = brentq(lambda x: np.linalg.norm(ridge_of(train, x).coef_) - limit, 1e-3, 1e3, xtol=1e-12)
    assert curves.multiplier == pytest.approx(decay, rel=1e-6, abs=0)
    np.testing.assert_allclose(curves.weights[-1].numpy(), ridge_of(train, decay).coef_, rtol=0, atol=1e-9)


def test_cross_validation_is_that_of_closed_forms(monkeypatch):
    monkeypatch.setattr(example, "GRID", (1e-4, 10.0))
    train, _ = samples(2)
    found = example.cross_validate(LONG, train, 2)
    splits = KFold(5, shuffle=True, random_state=2).split(train.inputs)
    for losses, (seen, unseen) in zip(found, splits, strict=True):
        for loss, decay in zip(losses, (1e-4, 10.0), strict=True):
            inputs, targets = train.rows(unseen)
            errors = ridge_of(train.rows(seen), decay).predict(inputs.numpy()) - targets.numpy()[:, 0]
            assert loss == pytest.approx(np.mean(errors**2) / 2, rel=1e-5, abs=0)


def test_three_ways_agree_as_the_docstring_says():
    train, test = samples(0)
    runs = example.three_ways(SHORT, train, test, 0)
    losses = {name: (found.final("training"), found.final("test")) for name, found in runs.items()}
    assert losses[NONE] == pytest.approx((5.2e-5, 0.0213), rel=0.02, abs=0)
    assert losses[DECAY] == pytest.approx((4.9e-4, 0.0122), rel=0.02, abs=0)
    assert losses[LIMIT] == pytest.approx((8.6e-5, 0.0118), rel=0.02, abs=0)
    assert all(map(torch.equal, runs[PENALTY].weights, runs[DECAY].weights))
    assert runs[LIMIT].norm == pytest.approx(runs[DECAY].norm, rel=1e-9, abs=0)


def test_decay_lowers_the_test_loss_on_every_seed():
    paired = example.pairs(SHORT, range(20))
    without, decayed = paired.mean(axis=0)
    # What plain torch loops had elsewhere, over 50 seeds; for 20 the standard error of the ratio is 0.013.
    assert (paired[:, 1, 1] / paired[:, 0, 1]).mean() == pytest.approx(0.564, abs=0.045, rel=0)
    assert (paired[:, 1, 1] < paired[:, 0, 1]).all()
    assert without[1:] == pytest.approx([0.01965, 0.0101], rel=0.07, abs=0)
    assert decayed == pytest.approx([4.8e-4, 0.01103, 0.0015], rel=0.1, abs=0)
    assert without[0] < 3e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "should be from 1 to 10000, got 0"),
        (["--seeds", "many"], "invalid integer value: 'many'"),
        (["--seed", str(2**32 - 2), "--seeds", "3"], f"3 seeds from {2**32 - 2} on go beyond {2**32 - 1}"),
        (["--lr", "1"], "unrecognized arguments: --lr 1"),
    ],
    ids=["no seed", "no number", "seeds too large", "unknown option"],
)
def test_wrong_arguments_are_told_before_anything_is_written(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        example.main([*arguments, "--output", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
