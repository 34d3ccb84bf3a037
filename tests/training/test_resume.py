"""Does an interrupted and resumed training equal an uninterrupted one?"""

import csv
import functools

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import Cosine, FollowLR, FromLRScheduler, Linear
from tests.training.support import QUIET, Regression, SaveAfter, adamw, assert_identical_weights, train, weights

pytestmark = QUIET

STEPS = 21  # 3 epochs of 7 batches


def fit(module, *callbacks, **options):
    """Train, and return what each step used: the optimizer, and its groups' weight decays and learning rates."""
    return train(module, *callbacks, **options).steps


def logged(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


def power(step):
    return 0.9**step


SCHEDULERS = {
    "none": None,
    "LambdaLR": functools.partial(LambdaLR, lr_lambda=power),
    "MultiplicativeLR": lambda optimizer: MultiplicativeLR(optimizer, lambda _: 0.9),
    "OneCycleLR": functools.partial(OneCycleLR, max_lr=0.2, total_steps=STEPS),
    "CosineAnnealingWarmRestarts": functools.partial(CosineAnnealingWarmRestarts, T_0=6),
    "ReduceLROnPlateau": functools.partial(ReduceLROnPlateau, patience=0, min_lr=[1e-3]),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), CosineAnnealingLR(o, 16)], [5]),
}
HALVED = FromLRScheduler(functools.partial(StepLR, step_size=6, gamma=0.5))


def regression(scheduler, make_optimizer=adamw):
    options = {"interval": "epoch", "monitor": "train_loss"} if scheduler == "ReduceLROnPlateau" else {}
    return Regression(make_optimizer, SCHEDULERS[scheduler], **options)


@pytest.mark.parametrize("step", [1, 5, 7, 20], ids="after step {}".format)
@pytest.mark.parametrize(
    ("schedule", "scheduler"),
    [(Cosine(0.04, 0.4), "none"), (FollowLR(0.3), "OneCycleLR"), (HALVED, "LambdaLR")],
    ids=["Cosine", "FollowLR-OneCycleLR", "FromLRScheduler-LambdaLR"],
)
def test_resumed_equals_uninterrupted(schedule, scheduler, step, tmp_path):
    whole, resumed = regression(scheduler), regression(scheduler)
    loggers = [CSVLogger(tmp_path, version=name) for name in ("whole", "resumed")]
    expected = fit(whole, WeightDecay(schedule), SaveAfter(tmp_path, step), logger=loggers[0])
    found = fit(resumed, WeightDecay(schedule), ckpt_path=tmp_path / f"{step}.ckpt", logger=loggers[1])
    assert found == expected[step:]
    assert_identical_weights(weights(resumed), weights(whole))
    rows, resumed_rows = map(logged, loggers)
    assert [float(row["weight_decay/decay"]) for row in rows] == pytest.approx([decay for _, (decay, _), _ in expected])
    assert resumed_rows == rows[step:]


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"max_steps": 16}], ids=str)
def test_resumed_equals_uninterrupted_under(options, tmp_path):
    whole, resumed = Regression(), Regression()
    expected = fit(whole, WeightDecay(Linear(0.0, 1.0)), SaveAfter(tmp_path, 5), **options)
    found = fit(resumed, WeightDecay(Linear(0.0, 1.0)), ckpt_path=tmp_path / "5.ckpt", **options)
    assert found == expected[5:]
    assert_identical_weights(weights(resumed), weights(whole))


def test_resuming_twice_equals_uninterrupted(tmp_path):
    def weight_decay():
        return WeightDecay(Linear(0.1, 0.9), factors={"output.*": 0.1})

    whole, once, twice = Regression(), Regression(), Regression()
    expected = fit(whole, weight_decay(), SaveAfter(tmp_path, 4))
    fit(once, weight_decay(), SaveAfter(tmp_path, 9), ckpt_path=tmp_path / "4.ckpt")
    found = fit(twice, weight_decay(), ckpt_path=tmp_path / "9.ckpt")
    assert found == expected[9:]
    assert_identical_weights(weights(twice), weights(whole))


def test_one_callback_serves_the_first_run_and_the_resumed_one(tmp_path):
    whole, resumed, weight_decay = Regression(), Regression(), WeightDecay(HALVED)
    expected = fit(whole, weight_decay, SaveAfter(tmp_path, 5))
    found = fit(resumed, weight_decay, ckpt_path=tmp_path / "5.ckpt")
    assert found == expected[5:]


# --------------------------------------------------------------------------------------------------------------------
# A checkpoint made without the callback: its optimizer has one group, ours two


@pytest.mark.parametrize("make_optimizer", [adamw, functools.partial(SGD, lr=0.1, momentum=0.9)], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_from_a_checkpoint_without_the_callback(scheduler, make_optimizer, tmp_path):
    """Nothing decays, so that resuming without the callback is the oracle."""
    make_optimizer = functools.partial(make_optimizer, weight_decay=0.0)
    fit(regression(scheduler, make_optimizer), SaveAfter(tmp_path, 8))
    without, resumed = regression(scheduler, make_optimizer), regression(scheduler, make_optimizer)
    expected = fit(without, ckpt_path=tmp_path / "8.ckpt")
    found = fit(resumed, WeightDecay(0.0), ckpt_path=tmp_path / "8.ckpt")
    assert_identical_weights(weights(resumed), weights(without))
    assert found == [(0, 2 * decays, 2 * lrs) for _, decays, lrs in expected]


def test_from_a_checkpoint_without_the_callback_the_schedule_goes_on_at_the_step(tmp_path):
    fit(Regression(), SaveAfter(tmp_path, 8))
    rows = fit(Regression(), WeightDecay(Linear(0.0, 1.0)), ckpt_path=tmp_path / "8.ckpt")
    assert [decays for _, decays, _ in rows] == [[k / 20, 0.0] for k in range(8, 21)]


def moments(module):
    """``exp_avg`` by the parameter's name."""
    state = module.trainer.optimizers[0].state
    return {name: state[parameter]["exp_avg"].clone() for name, parameter in module.named_parameters()}


class Look(L.Callback):
    """Keeps what the optimizer holds once all is restored."""

    def on_train_start(self, trainer, pl_module):
        self.moments = moments(pl_module)


def saved_moments(path):
    """What a checkpoint of a run without groups, whose optimizer numbers the parameters in order, holds."""
    state = torch.load(path)["optimizer_states"][0]["state"]
    return {name: state[i]["exp_avg"] for i, (name, _) in enumerate(Regression().named_parameters())}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {}),
        (None, {"factors": {"hidden.*": 0.5}}),
        ({}, {"exclude": ("bias",)}),
        ({"exclude": ()}, {}),
        ({"exclude": ("*.bias", "norm.*")}, {"factors": {"output.*": 0.5, "hidden.*": 2.0}}),
        ({"factors": {"output.*": 0.5, "hidden.*": 2.0}}, {"exclude": ("output.*",)}),
    ],
    ids=["none, now groups", "none, now factors", "less excluded", "more excluded", "more groups", "fewer groups"],
)
@pytest.mark.filterwarnings("ignore:WeightDecay differs from the checkpoint's")  # tested below
def test_moments_stay_with_their_weights_when_the_rules_change(before, after, tmp_path):
    callbacks = [] if before is None else [WeightDecay(0.0, **before)]
    # The moments do not depend on the groups as long as nothing decays: this run tells what they are.
    fit(Regression(functools.partial(adamw, weight_decay=0.0)), SaveAfter(tmp_path, 5))
    expected = saved_moments(tmp_path / "5.ckpt")
    fit(Regression(functools.partial(adamw, weight_decay=0.0)), *callbacks, SaveAfter(tmp_path, 5))
    look = Look()
    fit(Regression(), WeightDecay(0.0, **after), look, ckpt_path=tmp_path / "5.ckpt")
    assert_identical_weights(look.moments, expected)


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (WeightDecay(0.5), r"weight_decay: Constant\(value=0.1\) then, Constant\(value=0.5\) now"),
        (WeightDecay(0.1, exclude=("bias",)), r"exclude: \['bias', 'norm', 'vector'\] then, \['bias'\] now"),
        (WeightDecay(0.1, factors={"output.*": 0.5}), r"factors: {} then, {'output.\*': 0.5} now"),
    ],
    ids=["weight_decay", "exclude", "factors"],
)
def test_the_constructor_wins_over_the_checkpoint_and_says_so(now, difference, tmp_path):
    fit(Regression(), WeightDecay(0.1), SaveAfter(tmp_path, 5))
    with pytest.warns(UserWarning, match=f"WeightDecay differs from the checkpoint's and wins over it. {difference}"):
        rows = fit(Regression(), now, ckpt_path=tmp_path / "5.ckpt")
    assert {decays[0] for _, decays, _ in rows} == {now.schedule.value}


def test_functions_that_are_defined_again_are_no_difference(tmp_path):
    def weight_decay():
        return WeightDecay(lambda at: 0.1, exclude=(lambda info: info.kind == "bias",))

    fit(Regression(), weight_decay(), SaveAfter(tmp_path, 5))
    fit(Regression(), weight_decay(), ckpt_path=tmp_path / "5.ckpt")  # no warning, which would be an error


class Wider(Regression):
    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(2, 2, dtype=torch.float64)


class Renamed(Regression):
    """As many parameters of other shapes in the same groups."""

    def __init__(self):
        super().__init__()
        self.hidden, self.output = self.output, self.hidden


def ignoring_weights(module_class):
    class Lenient(module_class):
        strict_loading = False

        def load_state_dict(self, state_dict, strict=True):
            """The optimizer's state is what is tested."""

    return Lenient()


@pytest.mark.parametrize(
    ("module_class", "message"),
    [
        (
            Wider,
            r"groups of sizes \(decay: 2, no_decay: 4\), here are 2 of sizes \(3, 5\).*'extra.bias', 'extra.weight'",
        ),
        (Renamed, r"an optimizer state 'exp_avg' of shape \(4, 3\) where 'hidden.weight' of shape \(2, 4\) stands"),
    ],
    ids=["more parameters", "other shapes"],
)
def test_groups_that_cannot_be_matched_are_an_error_before_training(module_class, message, tmp_path):
    fit(Regression(), WeightDecay(0.1), SaveAfter(tmp_path, 5))
    module = ignoring_weights(module_class)
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, WeightDecay(0.1), ckpt_path=tmp_path / "5.ckpt")
    assert_identical_weights(weights(module), before)
