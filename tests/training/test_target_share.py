"""Do constraints follow schedules, functions and intervals of steps, and do zeros stay when they are frozen?"""

import itertools

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_regularize import WeightConstraint
from lightning_regularize.projections import NM, Box, FrobeniusBall, MaxNorm, Rank, TopShare
from lightning_regularize.schedules import Cosine, CubicRamp, FollowLR, Linear, simulate
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    assert_identical_weights,
    make_trainer,
    train,
    weights,
    zero_mean,
)

pytestmark = QUIET

STEPS = 21  # 3 epochs of 7 batches
EACH = {"hidden.weight": 12, "output.weight": 8}


def zeros(seen, name="hidden.weight"):
    return (seen[name] == 0).sum().item()


@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_the_share_follows_its_schedule_to_one_element(scope):
    schedule = CubicRamp(1.0, 0.1, until=0.7)
    witness = train(Regression(), WeightConstraint(TopShare(schedule, scope)))
    for seen, share in zip(witness.weights, simulate(schedule, STEPS), strict=True):
        for names in [EACH] if scope == "all" else [[name] for name in EACH]:
            size = sum(EACH[name] for name in names)
            assert size - sum(zeros(seen, name) for name in names) == max(round(share * size), 1)
    assert share == 0.1


def test_from_a_step_on_zeros_stay_and_the_rest_trains_on():
    share = Linear(0.25, 0.75)  # which gives weights back, unless they are frozen
    free = train(Regression(), WeightConstraint(TopShare(share)))
    assert [zeros(free.weights[i]) for i in (0, 4, -1)] == [9, 8, 3]
    witness = train(Regression(), WeightConstraint(TopShare(share), freeze_zeros=5))
    for seen, expected in zip(witness.weights[:5], free.weights, strict=False):
        assert_identical_weights(seen, expected)
    last = witness.weights[4]["hidden.weight"] == 0
    for before, after in zip(witness.weights[4:], witness.weights[5:], strict=False):
        assert torch.equal(after["hidden.weight"] == 0, last)
        assert (after["hidden.weight"] != before["hidden.weight"])[~last].all()


def pairs(witness):
    seen = [each["hidden.weight"] for each in witness.weights]
    return itertools.pairwise(seen)


def test_frozen_zeros_stay_while_the_share_still_falls():
    constraint = WeightConstraint(TopShare(Linear(1.0, 0.25)), freeze_zeros=0.0)
    assert all(not torch.any((a == 0) & (b != 0)) for a, b in pairs(train(Regression(), constraint)))


def test_zeros_of_n_of_m_stay_as_well():
    witness = train(Regression(), WeightConstraint(NM(2, 4), include=("output.weight",), freeze_zeros=3))
    last = witness.weights[2]["output.weight"] == 0
    assert all(torch.equal(seen["output.weight"] == 0, last) for seen in witness.weights[3:])


@pytest.mark.parametrize("at", [8, 16])
def test_a_resumed_run_equals_one_without_a_break(at, tmp_path):
    """Before zeros are frozen, and after."""

    def constraint():
        return WeightConstraint(TopShare(CubicRamp(1.0, 0.2, until=0.5), "all"), freeze_zeros=0.6, every_n_steps=3)

    whole, resumed = Regression(), Regression()
    train(whole, constraint(), SaveAfter(tmp_path, at))
    train(resumed, constraint(), ckpt_path=tmp_path / f"{at}.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("projection", "measure"),
    [
        (MaxNorm(Cosine(0.6, 0.2)), lambda w: w.norm(dim=1).max()),
        (FrobeniusBall(Linear(1.0, 0.3)), lambda w: w.norm()),
        (Box(0.0, Linear(0.3, 0.1)), lambda w: w.max()),
        (MaxNorm(FollowLR(0.3)), lambda w: w.norm(dim=1).max()),
    ],
    ids=["MaxNorm", "FrobeniusBall", "Box", "following the rate"],
)
def test_bounds_follow_schedules(projection, measure):
    witness = train(Regression(), WeightConstraint(projection))
    schedule = next(value for value in vars(projection).values() if callable(value))
    for seen, bound in zip(witness.weights, simulate(schedule, STEPS), strict=True):
        assert 0.9 * bound < measure(seen["hidden.weight"]) <= bound


def test_a_plain_function_is_applied_after_each_step():
    witness = train(Regression(), WeightConstraint(zero_mean))
    assert all(abs(seen["hidden.weight"].mean()) < 1e-15 for seen in witness.weights)
    free = train(Regression())
    assert any(abs(seen["hidden.weight"].mean()) > 1e-3 for seen in free.weights)


def test_projections_at_every_nth_step():
    witness = train(Regression(), WeightConstraint(Rank(1), every_n_steps=5))
    ranks = [int(torch.linalg.matrix_rank(seen["hidden.weight"], rtol=1e-9)) for seen in witness.weights]
    assert [step for step, rank in enumerate(ranks, start=1) if rank == 1] == [5, 10, 15, 20]


def test_a_step_that_is_skipped_restores_nothing_and_projects_nothing():
    class Overflowing(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if self.trainer.global_step == 5 else loss

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    module = Overflowing()
    witness = train(module, WeightConstraint(TopShare(0.5), freeze_zeros=3), plugins=[plugin], max_epochs=1)
    assert zeros(weights(module)) == 6
    assert all(torch.equal(seen["hidden.weight"] == 0, module.hidden.weight == 0) for seen in witness.weights[3:])


def test_in_a_loop_of_ones_own():
    layer = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    constraint = WeightConstraint(TopShare(Linear(1.0, 0.1)), freeze_zeros=0.5, total_steps=10)
    with constraint.attach(optimizer, layer):
        for _ in range(10):
            layer(torch.ones(2, 10)).square().sum().backward()
            optimizer.step()
    assert layer.weight.count_nonzero() == 10


def misshapen(weight):
    return weight.sum(0)


def counts(weight):
    return (weight > 0).long()


def no_tensor(weight):
    weight.mul_(0.5)


UNFIT = {
    "another shape": (misshapen, ValueError, r"'hidden.weight': misshapen should return a floating tensor of the we"),
    "integers": (counts, ValueError, "counts should return a floating tensor of the weight's shape"),
    "nothing": (
        no_tensor,
        TypeError,
        "no_tensor should return a tensor of the weight's shape, got None",
    ),
    "a share that ends at 0": (TopShare(Linear(1.0, 0.0)), ValueError, r"in step 20: `share` should be in \(0, 1\]"),
    "a share above 1": (TopShare(Linear(1.5, 0.5)), ValueError, "in step 0: `share` should be in .* got 1.5"),
}


@pytest.mark.parametrize(("projection", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_work_is_refused_before_any_weight_changes(projection, error, message):
    module = Regression()
    before = weights(module)
    with pytest.raises(error, match=message):
        train(module, WeightConstraint(projection))
    assert_identical_weights(weights(module), before)


BAD = {
    "no projection": (lambda: WeightConstraint("MaxNorm"), TypeError, "or a function from a weight to a tensor"),
    "class": (lambda: WeightConstraint(TopShare), TypeError, "`projection` should be one of"),
    "every 0": (lambda: WeightConstraint(Rank(1), every_n_steps=0), ValueError, "`every_n_steps` should be a positive"),
    "freeze": (
        lambda: WeightConstraint(TopShare(0.5), freeze_zeros=1.5),
        ValueError,
        "`freeze_zeros` should be a step or a fraction of the run, got 1.5",
    ),
    "relative": (
        lambda: FrobeniusBall(Linear(1.0, 0.5), relative=True),
        ValueError,
        "`radius` should be a number where it is relative",
    ),
    "horizon": (
        lambda: make_trainer(WeightConstraint(TopShare(Linear(1, 0.5))), max_epochs=-1).fit(Regression(), Batches()),
        Exception,
        "needs to know how many steps the run has",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
