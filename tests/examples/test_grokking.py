"""Is the table of addition right, is the training AdamW's, and does the network grok?"""

import math
from argparse import Namespace
from itertools import product

import grokking
import pytest
import torch
from claims import be_quiet
from torch import nn


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield be_quiet()
    torch.set_num_threads(threads)


def numbers(pairs):
    """The two numbers of each one-hot pair."""
    assert pairs.shape[1] == 62
    assert (pairs.sum(dim=1) == 2).all()
    return [tuple(row.nonzero().flatten().tolist()) for row in pairs]


def test_each_pair_is_in_one_half_with_its_sum():
    halves = grokking.halves_of_addition(0)
    assert [len(sums) for _, sums in halves] == [480, 481]
    table = [
        (a, second - 31, total)
        for pairs, sums in halves
        for (a, second), total in zip(numbers(pairs), sums.tolist(), strict=True)
    ]
    assert sorted(table) == [(a, b, (a + b) % 31) for a, b in product(range(31), repeat=2)]


def test_the_seed_decides_which_pairs_are_learned():
    (first, _), _ = grokking.halves_of_addition(0)
    (again, _), _ = grokking.halves_of_addition(0)
    (other, _), _ = grokking.halves_of_addition(1)
    assert torch.equal(first, again)
    # Two independent halves share a half: 240 pairs, with a standard deviation of 8.
    assert len(set(numbers(first)) & set(numbers(other))) == pytest.approx(240, abs=40, rel=0)


def test_training_is_that_of_a_plain_loop_with_adamw(tmp_path):
    run = grokking.train(1.0, Namespace(seed=3, output=tmp_path, fast=True))
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(62, 256, bias=False), nn.ReLU(), nn.Linear(256, 31, bias=False))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=1.0)
    (pairs, sums), (other_pairs, other_sums) = grokking.halves_of_addition(3)
    norms, accuracies = [], []
    for step in range(1, 201):
        norm = torch.cat([weight.detach().flatten() for weight in net.parameters()]).norm().item()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(pairs), sums).backward()
        optimizer.step()
        if step % 50 == 0:
            norms.append(norm)
            accuracies.append((net(other_pairs).argmax(dim=1) == other_sums).double().mean().item())
    steps = [50, 100, 150, 200]
    assert run.series("weight_norm/total") == (steps, pytest.approx(norms, rel=1e-4, abs=0))
    assert run.series("val_accuracy") == (steps, pytest.approx(accuracies, abs=1 / 480, rel=0))


def test_decay_1_groks_and_ends_there(tmp_path):
    run = grokking.train(1.0, Namespace(seed=0, output=tmp_path, fast=False))
    assert run.learned <= 200
    # A plain loop took 1,450 steps from other initial weights; without decay it took more than 6,000.
    assert 800 < run.grokked < 3000
    assert run.series("val_accuracy")[0][-1] == run.grokked
    gap = run.last("train_accuracy") - run.last("val_accuracy")
    assert run.last("generalization_gap/accuracy") == pytest.approx(gap, abs=1e-6, rel=0)
    assert gap <= 0.05


def test_steps_are_counted_from_one_and_never_is_infinite():
    rows = [{"step": 49, "val_accuracy": 0.1}, {"step": 49, "train_accuracy": 0.9}, {"step": 99, "val_accuracy": 0.96}]
    run = grokking.Run(0.5, rows)
    assert run.series("val_accuracy") == ([50, 100], [0.1, 0.96])
    assert (run.learned, run.grokked) == (math.inf, 100)
    assert run.timescales == pytest.approx(100 * 0.01 * 0.5, rel=1e-6, abs=0)


def test_a_run_that_does_not_show_it_fails():
    def logged(weight_decay, grokked, norm):
        rows = [{"step": 49, "train_accuracy": 1.0, "weight_norm/total": norm, "val_accuracy": 0.0}]
        return grokking.Run(weight_decay, [*rows, {"step": grokked - 1, "val_accuracy": 0.96}])

    good = [logged(0.3, 4000, 60.0), logged(0.5, 3000, 60.0), logged(1.0, 1500, 60.0)]
    free = grokking.Run(0.0, [{"step": 49, "train_accuracy": 1.0, "weight_norm/total": 150.0, "val_accuracy": 0.0}])
    assert all(claim.holds for claim in grokking.claims_of([free, *good]))
    slow = [*good[:2], logged(1.0, 3500, 90.0)]  # 12, 15 and 35 timescales
    assert [claim.holds for claim in grokking.claims_of([logged(0.0, 2000, 150.0), *slow])] == [True, *[False] * 5]
