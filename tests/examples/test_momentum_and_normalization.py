"""Are the formulas those of ridge regression, is the training AdamW's, and do the weights settle where they should?"""

import math
from argparse import Namespace

import momentum_and_normalization as example
import numpy as np
import pytest
import torch
from claims import be_quiet
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from torch import nn


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield be_quiet()
    torch.set_num_threads(threads)


def test_decay_of_parabolas_is_ridge_regression():
    curvature, decay, slopes = 2.0, 0.5, example.SLOPES.numpy()
    features = math.sqrt(curvature) * np.eye(len(slopes))
    ridge = Ridge(alpha=decay, fit_intercept=False).fit(features, slopes / math.sqrt(curvature))
    assert example.FORMULAS[example.RIDGE](example.SLOPES).tolist() == pytest.approx(
        ridge.coef_.tolist(), abs=1e-12, rel=0
    )


# Of A = 3, and of A = 6, for B = 2, d = 0.5 and momentum 0.9: 3 / 2.5, 3 / 2.05, and 3 / 2; the bound is 1 / 0.5.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SGD coupled", (1.2, 2.4)),
        ("SGD decoupled", (1.2, 2.4)),
        ("momentum coupled", (1.2, 2.4)),
        ("momentum stable", (1.2, 2.4)),
        ("Adam coupled", (1.2, 2.4)),
        ("momentum decoupled", (1.463415, 2.926829)),
        ("AdamW", (1.5, 2.0)),
    ],
)
def test_each_way_leads_where_a_hand_calculation_says(name, expected):
    found = example.minimize(example.WAYS[name], seed=5, steps=1500)
    slopes = example.SLOPES.tolist()
    assert (found[slopes.index(3.0)].item(), found[slopes.index(6.0)].item()) == pytest.approx(
        expected, abs=1e-4, rel=0
    )


def test_each_digit_is_once_in_training_or_test_with_its_label():
    images, labels = load_digits(return_X_y=True)
    parts = example.digits()
    assert [len(part_labels) for _, part_labels in parts] == [1200, 597]
    given = sorted((*image.tolist(), label) for image, label in zip(images / 16, labels.tolist(), strict=True))
    split = sorted(
        (*image.tolist(), label)
        for part_images, part_labels in parts
        for image, label in zip(part_images, part_labels.tolist(), strict=True)
    )
    assert split == given  # sixteenths are exact in float32


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_scaled_training_is_the_same_to_the_last_bit(name):
    assert example.difference_when_scaled(name, 1, steps=60) == 0


def test_it_is_another_with_the_learning_rate_of_another_optimizer(monkeypatch):
    setting, _ = example.SCALABLE["SGD"]
    monkeypatch.setitem(example.SCALABLE, "SGD", (setting, 1))
    assert example.difference_when_scaled("SGD", 1, steps=20) > 0.1


def test_a_setting_scales_by_the_power_of_its_optimizer():
    setting = example.Setting(example.SGD, lr=0.5, weight_decay=0.25, start=3.0)
    assert setting.scaled(2, power=1)[1:] == (1.0, 0.125, 6.0)
    assert setting.scaled(2, power=2)[1:] == (2.0, 0.0625, 6.0)


def test_training_is_that_of_a_plain_loop_in_which_two_matrices_decay():
    steps, setting = 20, example.Setting(example.ADAMW, lr=0.01, weight_decay=3.0, start=0.5)
    trained = example.train(setting, 4, logger=False, max_steps=steps)
    (images, labels), _ = example.digits()
    batches = example.Batches(images, labels, batch_size=32, seed=4)
    iter(batches)  # as Lightning, to see whether they can be iterated; each time they have another order
    batches = iter(batches)
    torch.manual_seed(4)
    first, second, head = nn.Linear(64, 128, bias=False), nn.Linear(128, 128, bias=False), nn.Linear(128, 10)
    net = nn.Sequential(first, nn.BatchNorm1d(128), nn.ReLU(), second, nn.BatchNorm1d(128), nn.ReLU(), head)
    matrices = [first.weight, second.weight]
    others = [*net[1].parameters(), *net[4].parameters(), *head.parameters()]
    groups = [{"params": matrices, "lr": 0.01, "weight_decay": 3.0}, {"params": others, "lr": 3e-3, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    with torch.no_grad():
        for matrix in matrices:
            matrix.mul_(0.5)
    for _ in range(steps):
        images, labels = next(batches)
        is_drawn, drawn = torch.rand(32) < 0.2, torch.randint(10, (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), torch.where(is_drawn, drawn, labels)).backward()
        optimizer.step()
    for found, expected in zip(trained.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_adamw_settles_at_the_expected_size_and_angle(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "STEPS", example.STEPS // 2)  # 4 timescales, of which the last is looked at
    log = example.watch("lr 0.003, decay 1", Namespace(seed=0, output=tmp_path, fast=False))
    for matrix in ("hidden.0.weight", "hidden.3.weight"):
        assert log.late(f"rms/{matrix}/expected") == pytest.approx(math.sqrt(0.003 / 2), rel=1e-6, abs=0)
        assert log.late(f"rms/{matrix}") == pytest.approx(math.sqrt(0.003 / 2), rel=0.15, abs=0)
        assert log.late(f"angle/{matrix}") == pytest.approx(math.sqrt(2 * 0.003 * 0.1 / 1.9), rel=0.15, abs=0)
        assert log.ratio(f"rms/{matrix}") == pytest.approx(
            log.late(f"rms/{matrix}") / math.sqrt(0.003 / 2), rel=1e-6, abs=0
        )
    assert log.late("test_accuracy") > 0.93


def test_quarters_are_means_of_what_was_logged():
    rows = [{"step": step, "rms": value} for step, value in enumerate([1.0, 3.0, 4.0, 6.0, 7.0, 8.0, 0.0, 1.0])]
    log = example.Log([{"step": 0, "epoch": 0}, *rows])
    assert log.quarters("rms") == [2.0, 5.0, 7.5, 0.5]
    assert log.late("rms") == 0.5
    assert example.means([1.0, 3.0, 4.0, 6.0, 7.0], size=2) == [2.0, 5.0, 7.0]
