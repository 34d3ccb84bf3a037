"""Does an interrupted and resumed training equal an uninterrupted one?"""

import functools
import math

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

from lightning_regularize import AnchorDecay, ConstrainedDecay, WeightConstraint, WeightDecay
from lightning_regularize.projections import FrobeniusBall, FrobeniusSphere, SpectralBall
from lightning_regularize.schedules import Cosine, FollowLR, FromLRScheduler, Linear, Timescale, Warmup
from tests.reading import read_csv
from tests.training.support import (
    EXCLUDED,
    QUIET,
    Regression,
    SaveAfter,
    adamw,
    assert_identical_weights,
    train,
    weights,
)

pytestmark = QUIET

STEPS = 21  # 3 epochs of 7 batches


def fit(module, *callbacks, **options):
    """Train, and return what each step used: the optimizer, and by name the weight decays and the learning rates."""
    return train(module, *callbacks, **options).steps


def decays(steps, name="hidden.weight"):
    return [used[name] for _, used, _ in steps]


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
    logged, logged_resumed = map(read_csv, loggers)
    assert list(logged["weight_decay"].values()) == pytest.approx(decays(expected), rel=1e-12, abs=0)
    assert logged_resumed == {
        key: {k: value for k, value in values.items() if k >= step} for key, values in logged.items()
    }


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"max_steps": 16}], ids=str)
def test_resumed_equals_uninterrupted_under(options, tmp_path):
    whole, resumed = Regression(), Regression()
    expected = fit(whole, WeightDecay(Linear(0.0, 1.0)), SaveAfter(tmp_path, 5), **options)
    found = fit(resumed, WeightDecay(Linear(0.0, 1.0)), ckpt_path=tmp_path / "5.ckpt", **options)
    assert found == expected[5:]
    assert_identical_weights(weights(resumed), weights(whole))


class EveryOther(Regression):
    """Leaves every other batch without a step, which Lightning counts as one."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if batch_idx % 2:
            closure()
        else:
            optimizer.step(closure)


class Twice(Regression):
    """Steps twice, which Lightning counts as one step."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.step(closure)
        optimizer.step(closure)


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
@pytest.mark.parametrize(("cls", "at_9"), [(EveryOther, 5), (Twice, 18)], ids=["every other", "twice"])
@pytest.mark.filterwarnings("ignore:WeightDecay. training has ended after 12 steps")
def test_resumed_equals_uninterrupted_where_lightning_counts_other_steps(cls, at_9, method, tmp_path):
    whole, resumed = cls(), cls()
    decay = functools.partial(WeightDecay, Linear(0.1, 0.9), total_steps=42, method=method)
    expected = fit(whole, decay(), SaveAfter(tmp_path, 9))
    found = fit(resumed, decay(), ckpt_path=tmp_path / "9.ckpt")
    assert found == expected[at_9:]
    assert_identical_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize("projection", [FrobeniusBall(Linear(1.0, 0.2)), FrobeniusSphere(torch.tensor(0.5))], ids=repr)
def test_a_radius_that_is_not_relative_is_in_no_checkpoint(projection, tmp_path):
    whole, resumed = Regression(), Regression()
    fit(whole, WeightConstraint(projection), SaveAfter(tmp_path, 5))
    fit(resumed, WeightConstraint(projection), ckpt_path=tmp_path / "5.ckpt")
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


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_ratios_of_groups_last_where_the_shown_values_are_all_zero(method, tmp_path):
    """The checkpoint's groups say 0 for the step to come; what the user gave stands in the callback's own state."""
    weight_decay = functools.partial(WeightDecay, lambda at: 0.3 * (at.step != 5), method=method)
    whole, resumed = Regression(two_groups), Regression(two_groups)
    expected = fit(whole, weight_decay(), SaveAfter(tmp_path, 5))
    saved = torch.load(tmp_path / "5.ckpt")["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in saved] == [0.0, 0.0]
    found = fit(resumed, weight_decay(), ckpt_path=tmp_path / "5.ckpt")
    assert found == expected[5:]
    assert_identical_weights(weights(resumed), weights(whole))
    assert [group["weight_decay"] for group in resumed.trainer.optimizers[0].param_groups] == [0.2, 0.1]


def two_groups(parameters):
    parameters = list(parameters)
    return adamw([{"params": parameters[:4], "weight_decay": 0.2}, {"params": parameters[4:], "weight_decay": 0.1}])


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints have the user's groups, with the callback and without it


@pytest.mark.parametrize("make_optimizer", [adamw, two_groups], ids=["one group", "two groups"])
def test_a_checkpoint_has_the_groups_that_it_has_without_the_callback(make_optimizer, tmp_path):
    (tmp_path / "without").mkdir()
    fit(Regression(make_optimizer), SaveAfter(tmp_path / "without", 5))
    fit(Regression(make_optimizer), WeightDecay(0.4, factors={"output.*": 0.5}), SaveAfter(tmp_path, 5))
    paths = tmp_path / "5.ckpt", tmp_path / "without" / "5.ckpt"
    found, expected = (torch.load(path)["optimizer_states"][0]["param_groups"] for path in paths)
    assert len(found) == len(expected)
    for group, without in zip(found, expected, strict=True):
        assert list(group) == list(without)
        assert {**group, "weight_decay": None} == {**without, "weight_decay": None}


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
    assert found == expected


def test_from_a_checkpoint_without_the_callback_the_schedule_goes_on_at_the_step(tmp_path):
    fit(Regression(), SaveAfter(tmp_path, 8))
    steps = fit(Regression(), WeightDecay(Linear(0.0, 1.0)), ckpt_path=tmp_path / "8.ckpt")
    assert decays(steps) == pytest.approx([k / 20 for k in range(8, 21)], rel=1e-12, abs=0)
    assert {decay for name in EXCLUDED for decay in decays(steps, name)} == {0.0}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # Lightning misses ours
def test_without_the_callback_from_a_checkpoint_with_it(scheduler, tmp_path):
    """The optimizer goes on with the value that the checkpoint shows, which is 0."""
    fit(regression(scheduler), WeightDecay(0.0), SaveAfter(tmp_path, 8))
    resumed, whole = regression(scheduler), regression(scheduler, functools.partial(adamw, weight_decay=0.0))
    found, expected = fit(resumed, ckpt_path=tmp_path / "8.ckpt"), fit(whole)
    assert found == expected[8:]
    assert_identical_weights(weights(resumed), weights(whole))


def moments(module):
    """``exp_avg`` by the parameter's name."""
    state = module.trainer.optimizers[0].state
    return {name: state[parameter]["exp_avg"].clone() for name, parameter in module.named_parameters()}


class Look(L.Callback):
    """Keeps what the optimizer holds once all is restored."""

    def on_train_start(self, trainer, pl_module):
        self.moments = moments(pl_module)


def saved_moments(path):
    """What a checkpoint holds, whose optimizer has one group and numbers the parameters in order."""
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
    ids=["none, now rules", "none, now factors", "less excluded", "more excluded", "more factors", "fewer factors"],
)
@pytest.mark.filterwarnings("ignore:WeightDecay differs from the checkpoint's")  # tested below
def test_moments_stay_with_their_weights_when_the_rules_change(before, after, tmp_path):
    callbacks = [] if before is None else [WeightDecay(0.0, **before)]
    # The moments do not depend on the rules as long as nothing decays: this run tells what they are.
    fit(Regression(functools.partial(adamw, weight_decay=0.0)), SaveAfter(tmp_path, 5))
    expected = saved_moments(tmp_path / "5.ckpt")
    fit(Regression(functools.partial(adamw, weight_decay=0.0)), *callbacks, SaveAfter(tmp_path, 5))
    look = Look()
    fit(Regression(), WeightDecay(0.0, **after), look, ckpt_path=tmp_path / "5.ckpt")
    assert_identical_weights(look.moments, expected)


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
@pytest.mark.filterwarnings("ignore:WeightDecay differs from the checkpoint's")  # tested below
def test_resumed_with_other_rules_what_follows_is_as_if_they_had_always_been_there(method, tmp_path):
    """Of a schedule that is 0 until the checkpoint, the weights tell nothing of the earlier rules."""
    late = functools.partial(WeightDecay, lambda at: 0.5 * (at.step >= 5), method=method)
    rules = {"exclude": ("norm", "output.*"), "factors": {"hidden.weight": 0.5}}
    fit(Regression(), late(factors={"output.*": 2.0}), SaveAfter(tmp_path, 5))
    whole, resumed = Regression(), Regression()
    expected, found = fit(whole, late(**rules)), fit(resumed, late(**rules), ckpt_path=tmp_path / "5.ckpt")
    assert found == expected[5:]
    assert_identical_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"weight_decay": 0.5}, r"weight_decay: 0\.1 then, 0\.5 now"),
        ({"exclude": ("bias",)}, r"exclude: \['bias', 'norm', 'vector'\] then, \['bias'\] now"),
        ({"factors": {"output.*": 0.5}}, r"factors: None then, {'output\.\*': 0\.5} now"),
    ],
    ids=["weight_decay", "exclude", "factors"],
)
def test_the_constructor_wins_over_the_checkpoint_and_says_so(arguments, difference, tmp_path):
    fit(Regression(), WeightDecay(0.1), SaveAfter(tmp_path, 5))
    now = WeightDecay(**{"weight_decay": 0.1, **arguments})
    with pytest.warns(UserWarning, match=f"WeightDecay differs from the checkpoint's and wins over it. {difference}"):
        steps = fit(Regression(), now, ckpt_path=tmp_path / "5.ckpt")
    assert set(decays(steps)) == {arguments.get("weight_decay", 0.1)}


def test_an_argument_that_only_another_version_has_is_no_difference(tmp_path):
    fit(Regression(), WeightDecay(0.1), SaveAfter(tmp_path, 5))
    checkpoint = torch.load(tmp_path / "5.ckpt", weights_only=False)
    checkpoint["callbacks"]["WeightDecay"]["arguments"]["new"] = "1.0"
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    fit(Regression(), WeightDecay(0.1), ckpt_path=tmp_path / "newer.ckpt")  # no warning, which would be an error


def test_functions_that_are_defined_again_are_no_difference(tmp_path):
    def weight_decay():
        return WeightDecay(lambda at: 0.1, exclude=(lambda info: info.kind == "bias",))

    fit(Regression(), weight_decay(), SaveAfter(tmp_path, 5))
    fit(Regression(), weight_decay(), ckpt_path=tmp_path / "5.ckpt")  # no warning, which would be an error


class Wider(Regression):
    strict_loading = False

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(2, 2, dtype=torch.float64)


@pytest.mark.parametrize("weight_decay", [True, False], ids=["with", "without"])
@pytest.mark.parametrize(
    ("make_module", "message"),
    [
        (Wider, "contains a parameter group that doesn't match the size of optimizer's group"),
        (functools.partial(Regression, two_groups), "loaded state dict has a different number of parameter groups"),
    ],
    ids=["more parameters", "more groups"],
)
def test_groups_of_the_users_that_do_not_fit_are_torchs_own_error(make_module, message, weight_decay, tmp_path):
    callbacks = [WeightDecay(0.1)] * weight_decay
    fit(Regression(), *callbacks, SaveAfter(tmp_path, 5))
    with pytest.raises(ValueError, match=message):
        fit(make_module(), *callbacks, ckpt_path=tmp_path / "5.ckpt")


ANCHORED = AnchorDecay(0.1, include=("weight",))
BALL = WeightConstraint(FrobeniusBall(0.9, relative=True))
DAMAGED = [  # a callback, where its state is damaged, and by what
    *[(WeightDecay(0.1), ("steps",), value) for value in (3, [-1], [1.5], ["3"])],
    *[(WeightDecay(0.1), ("peaks",), value) for value in (0.1, [0.1], [[-0.1]], [[math.nan]])],
    *[(WeightDecay(0.1), ("given",), value) for value in (0.1, [[math.nan]], [[-0.1]], [["0.1"]])],
    *[(WeightDecay(0.1), ("parts",), value) for value in (0.1, [0.1], [[[0.1]]])],
    *[(BALL, ("radii", "?"), value) for value in (math.nan, math.inf, -1.0, 0.0, "1", None, 1e300)],
    (WeightConstraint(SpectralBall(1.0)), ("vectors", "?"), torch.ones(7)),
    *[(BALL, ("radii",), value) for value in (1.0, [1.0])],
    (WeightConstraint(SpectralBall(1.0)), ("vectors", "?"), torch.full((3,), math.nan)),
    (WeightConstraint(SpectralBall(1.0)), ("vectors", "?"), [1.0]),
    *[(ConstrainedDecay("start"), ("matrices", "multiplier", "?"), value) for value in (math.nan, -1.0, 1e9, "1")],
    *[(ConstrainedDecay("start"), ("matrices", "bound", "?"), value) for value in (math.nan, -1.0, None)],
    *[(ConstrainedDecay("start"), ("matrices", "smoothed", "?"), value) for value in (math.nan, -1.0, math.inf)],
    (ConstrainedDecay("start"), ("matrices", "growth", "?"), math.nan),
    (ConstrainedDecay("start"), ("matrices", "bound"), [1.0]),
    (ConstrainedDecay("start"), ("matrices",), 1.0),
    (ANCHORED, ("anchors", "?"), torch.tensor([math.inf])),
    (ANCHORED, ("anchors", "?"), torch.tensor([1.0])),
    (ANCHORED, ("anchors", "?"), torch.tensor([1])),
    (ANCHORED, ("anchors", "?"), torch.zeros(1).to_sparse()),
    (ANCHORED, ("anchors", "?"), "w"),
    (ANCHORED, ("anchors",), [torch.zeros(1)]),
]


@pytest.mark.filterwarnings("ignore:.* that ConstrainedDecay decays as well:UserWarning")
@pytest.mark.parametrize(
    ("callback", "path", "value"),
    DAMAGED,
    ids=[f"{type(callback).__name__}-{'-'.join(path)}-{value}".splitlines()[0] for callback, path, value in DAMAGED],
)
def test_a_damaged_state_is_refused_before_training(callback, path, value, tmp_path):
    train(Regression(), callback, SaveAfter(tmp_path, 3), max_epochs=1)
    checkpoint = torch.load(tmp_path / "3.ckpt", weights_only=False)
    (state,) = (each for key, each in checkpoint["callbacks"].items() if key.startswith(type(callback).__name__))
    for key in path[:-1]:
        state = state[key]
    last = next(iter(state)) if path[-1] == "?" else path[-1]
    state[last] = value
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    before = weights(module := Regression())
    with pytest.raises(ValueError, match=rf"{type(callback).__name__}: `{path[0]}.*` in the checkpoint should .*, got"):
        train(module, callback, ckpt_path=tmp_path / "damaged.ckpt")
    loaded = torch.load(tmp_path / "3.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(w, before[n]) or torch.equal(w, loaded[n]) for n, w in weights(module).items())


def test_an_anchor_that_the_checkpoint_lacks_is_an_error(tmp_path):
    train(Regression(), ANCHORED, SaveAfter(tmp_path, 3), max_epochs=1)
    checkpoint = torch.load(tmp_path / "3.ckpt", weights_only=False)
    (state,) = (each for key, each in checkpoint["callbacks"].items() if key.startswith("AnchorDecay"))
    state["anchors"].popitem()
    torch.save(checkpoint, tmp_path / "partial.ckpt")
    with pytest.raises(ValueError, match=r"AnchorDecay: `anchors\['.*'\]` in the checkpoint .*, got nothing"):
        train(Regression(), ANCHORED, ckpt_path=tmp_path / "partial.ckpt")


class RaisesTheRate(Regression):
    """Its own code writes the rate: it peaks in the middle of the run, above what the optimizer began with."""

    def on_train_batch_start(self, batch, batch_idx):
        step = self.trainer.global_step
        self.optimizers().param_groups[0]["lr"] = 0.02 if step < 3 else 0.1 if step < 8 else 0.01


@pytest.mark.filterwarnings("ignore:.* follows the learning rate, which has risen:UserWarning")
@pytest.mark.parametrize("schedule", [FollowLR(0.5), Timescale(steps=20), Warmup(FollowLR(0.5), steps=2)], ids=repr)
@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_a_peak_of_the_rate_before_the_checkpoint_is_known_after_it(schedule, method, tmp_path):
    whole = RaisesTheRate(functools.partial(SGD, lr=0.02))
    train(whole, WeightDecay(schedule, method=method), SaveAfter(tmp_path, 12))
    resumed = RaisesTheRate(functools.partial(SGD, lr=0.02))
    train(resumed, WeightDecay(schedule, method=method), ckpt_path=tmp_path / "12.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))
