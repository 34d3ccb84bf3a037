"""Do weights decay by the method that was asked for, whatever optimizer and precision the Trainer runs?"""

import functools
import math
import pickle
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import LBFGS, SGD, Adadelta, Adam, AdamW, RMSprop, Rprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from lightning_regularize import AnchorDecay, ConstrainedDecay, Hyperball, WeightDecay
from lightning_regularize.schedules import Cosine, FollowLR, Linear
from tests.training import spread
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    State,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    weights,
)

pytestmark = QUIET

DECAYING = ("hidden.weight", "output.weight")
METHODS = ("optimizer", "decoupled", "coupled", "independent", "cautious", "stable")
sgd = functools.partial(SGD, lr=0.1)
adam = functools.partial(Adam, lr=0.05)


def fit(module, *callbacks, data=None, ckpt_path=None, **options):
    trainer = make_trainer(*callbacks, **{"max_epochs": 3, **options})
    trainer.fit(module, Batches() if data is None else data, ckpt_path=ckpt_path)
    return module


class Watch(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(weights(pl_module))


class Save(L.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def scaler(**options):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, **options))


# --- decoupled ----------------------------------------------------------------------------------------------------


class Grouped(Regression):
    """Two groups with rates of their own, and one with half the other's weight decay."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer, functools.partial(CosineAnnealingLR, T_max=50))

    def configure_optimizers(self):
        groups = [
            {"params": list(self.hidden.parameters()), "lr": 0.1, "weight_decay": 0.2},
            {"params": list(self.output.parameters()), "lr": 0.03, "weight_decay": 0.1},
        ]
        optimizer = self.make_optimizer(groups)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
def test_adam_with_decoupled_decay_is_adamw_to_the_last_bit(foreach):
    decay = functools.partial(WeightDecay, Cosine(0.04, 0.4), exclude=("bias",))
    found = fit(
        Grouped(functools.partial(Adam, foreach=foreach)), decay(method="decoupled"), max_steps=50, max_epochs=-1
    )
    expected = fit(Grouped(functools.partial(AdamW, foreach=foreach)), decay(), max_steps=50, max_epochs=-1)
    assert_identical_weights(weights(found), weights(expected))


def decoupled_by_hand(make_optimizer, share, closure=False):
    module = Regression()
    optimizer = make_optimizer(module.parameters())
    for batch in 3 * list(Batches()):

        def evaluate(batch=batch):
            optimizer.zero_grad()
            loss = module.loss(batch)
            loss.backward()
            return loss

        if not closure:
            evaluate()
        for name in DECAYING:
            module.get_parameter(name).data.mul_(1 - share)
        optimizer.step(evaluate) if closure else optimizer.step()
    return weights(module)


@pytest.mark.parametrize(
    ("method", "share"), [("decoupled", 0.1 * 0.3), ("independent", 0.3)], ids=["decoupled", "independent"]
)
@pytest.mark.parametrize(
    ("make_optimizer", "closure"),
    [
        (sgd, False),
        (functools.partial(Rprop, lr=0.1), False),
        (functools.partial(RMSprop, lr=0.1), False),
        (functools.partial(LBFGS, lr=0.1, max_iter=3), True),
        (functools.partial(LBFGS, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"), True),
    ],
    ids=["SGD", "Rprop", "RMSprop", "LBFGS", "LBFGS with line search"],
)
def test_any_optimizer_decays_before_its_step(make_optimizer, closure, method, share):
    found = fit(Regression(make_optimizer), WeightDecay(0.3, method=method))
    assert_same_weights(weights(found), decoupled_by_hand(make_optimizer, share, closure))


def test_an_error_names_the_method_for_an_optimizer_without_weight_decay():
    with pytest.raises(MisconfigurationException, match=r"LBFGS has no `weight_decay` .*method='decoupled'"):
        fit(Regression(LBFGS), WeightDecay(0.3))


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_optimizers_own_decay_is_off(method):
    seen = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            seen.extend(group["weight_decay"] for group in optimizer.param_groups)

    fit(Regression(functools.partial(AdamW, lr=0.05, weight_decay=0.3)), WeightDecay(0.1, method=method), Look())
    assert set(seen) == {0.0}


@pytest.mark.parametrize("method", METHODS[1:])
def test_only_what_is_not_excluded_decays_and_by_its_factor(method):
    """Nothing but decay moves this module: its loss does not depend on the weights."""

    class Still(Regression):
        def loss(self, batch):
            return sum(0.0 * p.sum() for p in self.parameters()) + 0.0 * self.norm.bias.square().sum()

    module = Still(sgd)
    before = weights(module)
    decay = WeightDecay(0.1, method=method, factors={"output.*": 0.5})
    after = weights(fit(module, decay, max_steps=1, max_epochs=-1))
    share = 0.1 if method == "independent" else 0.01
    for name, weight in before.items():
        factor = {"hidden.weight": 1 - share, "output.weight": 1 - share / 2}.get(name, 1.0)
        torch.testing.assert_close(after[name], factor * weight, rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_grad_scaler_changes_nothing(fused, method):
    found = fit(Regression(functools.partial(adam, fused=fused)), WeightDecay(0.25, method=method), plugins=[scaler()])
    expected = fit(Regression(adam), WeightDecay(0.25, method=method))
    assert_same_weights(weights(found), weights(expected))


RATES = {"1-d": lambda rate: torch.tensor([rate], dtype=torch.float64), "numpy": np.array}


@pytest.mark.parametrize("make", RATES.values(), ids=RATES)
@pytest.mark.parametrize(
    "callback",
    [*(WeightDecay(0.25, method=method) for method in METHODS[1:]), AnchorDecay(0.25), Hyperball()],
    ids=[*METHODS[1:], "anchor", "hyperball"],
)
def test_a_rate_may_be_whatever_the_optimizer_takes(callback, make):
    class Written(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.optimizers[0].param_groups[0]["lr"] = make(0.1)

    found = fit(Regression(sgd), callback, Written(), max_epochs=1)
    expected = fit(Regression(sgd), callback, max_epochs=1)
    assert_same_weights(weights(found), weights(expected))


class Overflowing(Regression):
    """Its third batch has an infinite loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.trainer.global_step == 2 else loss


@pytest.mark.parametrize(
    "callback",
    [
        *(WeightDecay(0.25, method=method) for method in METHODS[1:]),
        AnchorDecay(0.25, anchor={name: 0 * w for name, w in weights(Regression()).items()}),
        ConstrainedDecay("start", factor=0.1),
    ],
    ids=[*METHODS[1:], "anchor", "constrained"],
)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_that_overflows_moves_nothing(fused, callback):
    watch = Watch()
    fit(Overflowing(functools.partial(adam, fused=fused)), callback, watch, plugins=[scaler()], max_epochs=1)
    assert_identical_weights(watch.seen[2], watch.seen[1])
    assert not torch.equal(watch.seen[3]["hidden.weight"], watch.seen[2]["hidden.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(method, tmp_path):
    def decay():
        return WeightDecay(Linear(0.0, 0.5), method=method)

    whole, resumed = Regression(adam), Regression(adam)
    fit(whole, decay(), Save(tmp_path / "8.ckpt", 8))
    fit(resumed, decay(), ckpt_path=tmp_path / "8.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_and_those_without_a_gradient_rest(method):
    class Partly(Regression):
        def loss(self, batch):
            return (self.hidden(batch[0]) - 1).square().mean()

    module = Partly(sgd)
    module.hidden.bias.requires_grad_(False)
    before = weights(module)
    fit(module, WeightDecay(0.3, method=method, exclude=()))
    assert torch.equal(module.output.weight, before["output.weight"])
    assert torch.equal(module.hidden.bias, before["hidden.bias"])
    assert not torch.equal(module.hidden.weight, before["hidden.weight"])


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (functools.partial(RMSprop, lr=0.1), "defined for SGD, Adam, AdamW and NAdam, not for RMSprop"),
        (Adadelta, "not for Adadelta"),
        (functools.partial(Adam, amsgrad=True), "not defined for AMSGrad"),
    ],
    ids=["RMSprop", "Adadelta", "AMSGrad"],
)
def test_stable_decay_refuses_what_it_is_not_defined_for_before_training(make_optimizer, message):
    module = Regression(make_optimizer)
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, WeightDecay(0.1, method="stable"))
    assert_identical_weights(weights(module), before)


# --- low precision ------------------------------------------------------------------------------------------------


class Still(L.LightningModule):
    """Weights of one, and gradients of zero: whatever changes has decayed."""

    def __init__(self, make_optimizer, dtype=torch.bfloat16, numel=4096):
        super().__init__()
        self.layer = nn.Linear(numel, 1, bias=False, dtype=dtype)
        nn.init.ones_(self.layer.weight)
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        return (0 * self.layer.weight).sum()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    @property
    def mean(self):
        return self.layer.weight.detach().double().mean().item()


gentle = functools.partial(SGD, lr=1e-3)  # with a weight decay of 0.1, 1e-4 goes per step
AT_RANDOM = functools.partial(WeightDecay, 0.1, method="decoupled", rounding="stochastic")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_at_random_a_thousand_small_steps_are_right_in_the_mean(dtype):
    module = Still(gentle, dtype)
    optimizer = module.configure_optimizers()
    module.layer.weight.grad = torch.zeros_like(module.layer.weight)
    with AT_RANDOM().attach(optimizer, module):
        for _ in range(1000):
            optimizer.step()
    assert module.mean == pytest.approx(np.exp(-0.1), rel=0.01, abs=0)


def test_each_single_step_is_right_in_the_mean():
    module, means = Still(gentle, numel=200_000), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            means.append(pl_module.mean)

    fit(module, AT_RANDOM(), Look(), data=range(5), max_epochs=1)
    spread_of_mean = 2.0**-8 * (1e-4 / 2.0**-8 / 200_000) ** 0.5  # a coin with 1e-4 / spacing for heads
    assert means == pytest.approx([(1 - 1e-4) ** k for k in range(1, 6)], abs=6 * spread_of_mean, rel=1e-6)


def test_rounded_at_random_a_resumed_run_has_the_same_bits(tmp_path):
    whole, resumed = Still(gentle), Still(gentle)
    fit(whole, AT_RANDOM(), Save(tmp_path / "8.ckpt", 14), data=Batches(), max_epochs=5)
    fit(resumed, AT_RANDOM(), data=Batches(), max_epochs=5, ckpt_path=tmp_path / "8.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))
    assert whole.mean < 1


def test_seeds_make_other_noise():
    first, second = Still(gentle), Still(gentle)
    fit(first, AT_RANDOM(), data=range(10), max_epochs=1)
    fit(second, AT_RANDOM(seed=1), data=range(10), max_epochs=1)
    assert not torch.equal(first.layer.weight, second.layer.weight)


LOST = "WeightDecay(method={!r}) is off by up to 100% of its strength here"


@pytest.mark.parametrize(
    ("make_optimizer", "dtype", "options"),
    [
        (functools.partial(AdamW, lr=1e-3), torch.bfloat16, {}),
        (gentle, torch.float16, {"method": "decoupled"}),
        (gentle, torch.bfloat16, {"method": "decoupled"}),
        (gentle, torch.bfloat16, {"method": "cautious"}),
        (gentle, torch.bfloat16, {"method": "stable"}),
        (functools.partial(Adam, lr=1e-3, fused=True), torch.bfloat16, {"method": "decoupled"}),
        (functools.partial(AdamW, lr=1e-3, fused=True), torch.bfloat16, {}),
        (gentle, torch.bfloat16, {"method": "coupled"}),
        (gentle, torch.bfloat16, {"method": "independent", "weight_decay": 1e-3}),
    ],
    ids=[
        *("bfloat16", "float16", "decoupled", "cautious", "stable", "decoupled, fused", "fused", "coupled"),
        "independent",
    ],
)
def test_decay_that_rounds_to_nothing_is_warned_of_once(make_optimizer, dtype, options):
    module = Still(make_optimizer, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, WeightDecay(**{"weight_decay": 0.1, **options}), data=range(5), max_epochs=1)
    lost = LOST.format(options.get("method", "optimizer"))
    assert sum(lost in str(warning.message) for warning in caught) == 1
    assert module.mean == 1


@pytest.mark.parametrize(
    ("make_optimizer", "dtype", "options"),
    [
        (functools.partial(AdamW, lr=1e-3), torch.float32, {}),
        (gentle, torch.bfloat16, {"method": "decoupled", "rounding": "stochastic"}),
        (gentle, torch.bfloat16, {"method": "coupled", "weight_decay": 62.5}),
        (gentle, torch.bfloat16, {"method": "independent", "weight_decay": 0.125}),
        (gentle, torch.bfloat16, {"weight_decay": 0.0}),
    ],
    ids=["float32", "stochastic", "large coupled decay", "large independent share", "no decay"],
)
def test_decay_that_rounds_to_something_is_not(make_optimizer, dtype, options):
    """A warning would be an error."""
    fit(Still(make_optimizer, dtype), WeightDecay(**{"weight_decay": 0.1, **options}), data=range(2), max_epochs=1)


def test_decay_that_is_small_only_while_the_rate_warms_up_is_not():
    """A warning would be an error. At the peak a step removes 1/64, in the first epoch a hundredth of that."""

    class WarmingUp(Still):
        def configure_optimizers(self):
            optimizer = self.make_optimizer(self.parameters())
            scheduler = LambdaLR(optimizer, lambda step: 1.0 if step > 1 else 0.01)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    module = WarmingUp(functools.partial(AdamW, lr=0.125))
    fit(module, WeightDecay(0.125), data=range(2), max_epochs=3)
    assert module.mean < 1


def test_an_anchor_that_rounds_to_nothing_is_warned_of():
    anchor = {"layer.weight": torch.full((1, 4096), 0.5)}
    with pytest.warns(UserWarning, match=r"AnchorDecay is off by up to 100% of its strength here"):
        fit(Still(gentle), AnchorDecay(0.1, anchor=anchor, include=("layer.weight",)), data=range(2), max_epochs=1)


# --- bound to the learning rate -----------------------------------------------------------------------------------


class Digits(L.LightningModule):
    """Batch norm makes the two hidden layers scale-invariant; labels are wrong at random, anew in each batch."""

    def __init__(self, steps):
        super().__init__()
        x, y = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)
        self.norms = nn.ModuleList([nn.BatchNorm1d(128), nn.BatchNorm1d(128)])
        self.generator, self.steps, self.gradient_norms = torch.Generator().manual_seed(0), steps, []

    def training_step(self, batch, batch_idx):
        rows = torch.randint(len(self.x), (32,), generator=self.generator)
        wrong = torch.rand(32, generator=self.generator) < 0.3
        labels = torch.where(wrong, torch.randint(10, (32,), generator=self.generator), self.y[rows])
        x = torch.relu(self.norms[0](self.first(self.x[rows])))
        return nn.functional.cross_entropy(self.head(torch.relu(self.norms[1](self.second(x)))), labels)

    def on_before_optimizer_step(self, optimizer):
        squares = [layer.weight.grad.square().sum() for layer in (self.first, self.second)]
        self.gradient_norms.append(sum(squares).sqrt().item())

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.95))
        scheduler = CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def growth_of_gradients(schedule, steps=1500):
    """Gradient norm at 97 % of the run over that at 30 %, each the mean over 4 % of it."""
    module = Digits(steps)
    fit(module, WeightDecay(schedule, exclude=("bias", "norm", "vector", "head.*")), data=range(steps), max_epochs=1)
    means = [np.mean(module.gradient_norms[int((at - 0.02) * steps) : int((at + 0.02) * steps)]) for at in (0.3, 0.97)]
    return means[1] / means[0]


def test_decay_that_follows_the_lr_keeps_gradients_from_growing_at_the_end():
    """Defazio, "Why Gradients Rapidly Increase Near the End of Training", 2025; measured here: 1.98 and 0.88."""
    assert growth_of_gradients(2.0) == pytest.approx(2.0, abs=0.25, rel=1e-6)
    assert growth_of_gradients(FollowLR(2.0)) == pytest.approx(0.9, abs=0.15, rel=1e-6)


# --- towards an anchor --------------------------------------------------------------------------------------------


def anchored_by_hand(make_optimizer, strength, included=lambda name: True):
    module = Regression()
    anchor = weights(module)
    optimizer = make_optimizer(module.parameters())
    for k, batch in enumerate(3 * list(Batches())):
        optimizer.zero_grad()
        module.loss(batch).backward()
        for name, parameter in module.named_parameters():
            if included(name):
                share = optimizer.param_groups[0]["lr"] * strength(k)
                parameter.data.sub_(share * (parameter.data - anchor[name]))
        optimizer.step()
    return weights(module)


@pytest.mark.parametrize(
    ("strength", "expected"),
    [(0.5, lambda k: 0.5), (Linear(1.0, 0.0), lambda k: 1 - k / 20)],
    ids=["number", "schedule"],
)
@pytest.mark.parametrize("make_optimizer", [sgd, adam], ids=["SGD", "Adam"])
def test_weights_are_pulled_to_where_they_began(make_optimizer, strength, expected):
    found = fit(Regression(make_optimizer), AnchorDecay(strength))
    assert_same_weights(weights(found), anchored_by_hand(make_optimizer, expected))


def test_a_new_head_is_left_alone():
    found = fit(Regression(sgd), AnchorDecay(0.5, exclude=("output.*",)))
    by_hand = anchored_by_hand(sgd, lambda k: 0.5, lambda name: not name.startswith("output"))
    assert_same_weights(weights(found), by_hand)


def test_lbfgs_is_pulled_before_each_of_its_steps():
    def pulled_by_hand():
        module = Regression()
        anchor, optimizer = weights(module), LBFGS(module.parameters(), lr=0.1, max_iter=3)
        for batch in 3 * list(Batches()):

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = module.loss(batch)
                loss.backward()
                return loss

            for name, parameter in module.named_parameters():
                parameter.data.sub_(0.1 * 0.5 * (parameter.data - anchor[name]))
            optimizer.step(closure)
        return weights(module)

    found = fit(Regression(functools.partial(LBFGS, lr=0.1, max_iter=3)), AnchorDecay(0.5))
    assert_same_weights(weights(found), pulled_by_hand(), atol=1e-10)  # its steps amplify roundings


@pytest.mark.parametrize("anchor", ["init", weights(Regression(sgd))], ids=["init", "given"])
def test_a_resumed_run_has_the_anchor_of_the_first_start(anchor, tmp_path):
    whole, resumed = Regression(sgd), Regression(sgd)
    fit(whole, AnchorDecay(0.5, anchor=anchor), Save(tmp_path / "8.ckpt", 8))
    fit(resumed, AnchorDecay(0.5, anchor=anchor), ckpt_path=tmp_path / "8.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (AnchorDecay(0.5), "The checkpoint has no anchor: AnchorDecay takes the weights as they are now"),
        (
            ConstrainedDecay("start"),
            "does not hold the norms at the start of training: ConstrainedDecay .* of the weights as they are now",
        ),
        (
            ConstrainedDecay("warm_start", warm_start_steps=12),
            "does not hold the norms .*: ConstrainedDecay begins anew, .* after step 12, or now if that is over",
        ),
        (
            ConstrainedDecay("inflection_point", interval=2),
            "does not hold the norms .*: ConstrainedDecay begins anew, .* are looked for from now on",
        ),
    ],
    ids=["anchor", "start", "warm start", "inflection point"],
)
def test_what_a_checkpoint_does_not_tell_is_said(callback, message, tmp_path):
    fit(Regression(sgd), Save(tmp_path / "8.ckpt", 8))
    with pytest.warns(UserWarning, match=message):
        fit(Regression(sgd), callback, ckpt_path=tmp_path / "8.ckpt")


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        ({}, r"AnchorDecay: `anchor` should have a tensor of shape \(4, 3\) for 'hidden.weight', but lacks it"),
        ({"net.hidden.weight": torch.zeros(4, 3)}, r"but lacks it; its names are such as 'net.hidden.weight'"),
        ({"hidden.weight": torch.zeros(3, 4)}, r"but has shape \(3, 4\). Complete it, or leave .* out by `exclude`"),
    ],
    ids=["incomplete", "other names", "other shape"],
)
def test_an_anchor_that_does_not_fit_is_an_error_before_training(anchor, message):
    with pytest.raises(ValueError, match=message):
        fit(Regression(sgd), AnchorDecay(0.5, anchor=anchor))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.full((4, 3), float("nan")), ValueError, r"of 'hidden.weight' should hold finite .* with NaN"),
        (torch.zeros(4, 3, dtype=torch.int64), ValueError, r"floating-point numbers, .*torch.int64"),
        (np.zeros((4, 3)), TypeError, "AnchorDecay: `anchor` should hold tensors, got ndarray for 'hidden.weight'"),
        (0.0, TypeError, "`anchor` should hold tensors, got float for 'hidden.weight'"),
    ],
    ids=["nan", "integers", "numpy", "number"],
)
def test_an_anchor_is_made_of_finite_tensors(values, error, message):
    module = Regression(sgd)
    before = weights(module)
    with pytest.raises(error, match=message):
        fit(module, AnchorDecay(0.5, anchor={**module.state_dict(), "hidden.weight": values}))
    assert_identical_weights(weights(module), before)


@pytest.mark.parametrize(
    "callback",
    [
        WeightDecay(11.0, method="decoupled"),
        WeightDecay(1.1, method="independent"),
        WeightDecay(11.0, method="cautious"),
        AnchorDecay(11.0),
    ],
    ids=["decoupled", "independent", "cautious", "anchor"],
)
def test_a_step_that_removes_more_than_the_whole_weight_is_refused(callback):
    module = Regression(sgd)  # lr 0.1
    with pytest.raises(ValueError, match=r"should remove a share in \[0, 1\] of each weight, got 1.1"):
        fit(module, callback)


# --- constrained --------------------------------------------------------------------------------------------------


def constrained_by_hand(make_optimizer, bound_of, steps=21):
    """``bound_of(k, square, start)`` says kappa of a matrix after step ``k``, or None as long as there is none."""
    module = Regression()
    optimizer = make_optimizer(module.parameters())
    named = {name: module.get_parameter(name) for name in DECAYING}
    start = {name: p.detach().square().sum().item() for name, p in named.items()}
    multipliers, bounds = dict.fromkeys(named, 0.0), dict.fromkeys(named)
    for k, batch in enumerate(3 * list(Batches()), start=1):
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
        for name, parameter in named.items():
            square = parameter.detach().square().sum().item()
            if bounds[name] is None:
                bounds[name] = bound_of(k, square, start[name])
            if bounds[name] is not None:
                multipliers[name] = max(0.0, multipliers[name] + (square - bounds[name]) / parameter.numel())
                parameter.data.mul_(1 - 2 * multipliers[name])
    return weights(module)


@pytest.mark.parametrize(
    ("callback", "bound_of"),
    [
        (ConstrainedDecay("start"), lambda k, square, start: start),
        (ConstrainedDecay("start", factor=0.8), lambda k, square, start: 0.8 * start),
        (ConstrainedDecay("warm_start", warm_start_steps=5), lambda k, square, start: square if k == 5 else None),
    ],
    ids=["start", "start, with a factor", "warm start"],
)
def test_each_matrix_has_its_own_multiplier(callback, bound_of):
    found = fit(Regression(adam), callback)
    assert_same_weights(weights(found), constrained_by_hand(adam, bound_of))


class Growing(L.LightningModule):
    """A weight that takes given values, step by step."""

    def __init__(self, values):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.values = torch.tensor([0.0, *values], dtype=torch.float64)
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        return -(self.layer.weight * (self.values[batch_idx + 1] - self.values[batch_idx])).sum()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1.0)


def test_the_bound_is_taken_where_growth_slows_down():
    """The square norm grows by 1, 3, 5, 7, ... until step 6, and slower from then on: the next look sees it."""
    values = [0.01 * k for k in range(1, 7)] + [0.0605, 0.061, 0.0615, 0.062, 0.0625, 0.063]
    decay = ConstrainedDecay("inflection_point", interval=2)
    fit(Growing(values), decay, state := State(decay), data=range(12), max_epochs=1)
    smoothed, growth, bound = 0.0, -np.inf, None
    for k in range(2, 13, 2):
        square = values[k - 1] ** 2
        now = 0.9 * smoothed + 0.1 * square
        if now - smoothed < growth and bound is None:
            bound = square
        smoothed, growth = now, now - smoothed
    assert bound is not None
    assert state.last["matrices"]["bound"] == pytest.approx({"layer.weight": bound}, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        (ConstrainedDecay("warm_start", warm_start_steps=17), "after step 17. Give a smaller `warm_start_steps`"),
        (ConstrainedDecay("inflection_point", interval=16), "one in 16 steps, .* Give a smaller `interval`"),
    ],
    ids=["warm start", "inflection point"],
)
def test_it_tells_if_it_found_no_bound_until_the_end(decay, message):
    with pytest.warns(UserWarning, match=f"ConstrainedDecay has done nothing in 16 steps: .*{message}"):
        fit(Regression(adam), decay, max_steps=16)


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 0}], ids=["a trial run", "no step"])
def test_it_does_not_tell_of_a_run_that_is_none(options):
    fit(Regression(adam), ConstrainedDecay("warm_start", warm_start_steps=17), **options)


@pytest.mark.parametrize("bound", ["start", "warm_start", "inflection_point"])
def test_a_resumed_run_has_bounds_and_multipliers_of_the_first(bound, tmp_path):
    def callback():
        return ConstrainedDecay(bound, factor=0.9, warm_start_steps=4, interval=2)

    whole, resumed = Regression(adam), Regression(adam)
    fit(whole, callback(), Save(tmp_path / "8.ckpt", 8))
    fit(resumed, callback(), ckpt_path=tmp_path / "8.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))


def test_a_warm_start_that_a_grad_scaler_skips_is_made_up_for():
    decay = ConstrainedDecay("warm_start", warm_start_steps=3)  # the third step overflows
    fit(Overflowing(adam), decay, state := State(decay), plugins=[scaler()], max_epochs=1)
    bounds = state.last["matrices"]["bound"]
    assert set(bounds) == set(DECAYING)
    assert all(map(math.isfinite, bounds.values()))


def test_large_weights_are_bounded_and_do_not_swing_to_infinity():
    module = Regression(sgd)
    for name in DECAYING:
        nn.init.normal_(module.get_parameter(name), std=3.0, generator=torch.Generator().manual_seed(0))
    start = {name: module.get_parameter(name).norm().item() for name in DECAYING}
    fit(module, ConstrainedDecay("start", factor=0.25), max_epochs=10)
    for name in DECAYING:
        assert 0 < module.get_parameter(name).norm() < start[name]


@pytest.mark.parametrize("order", [1, -1], ids=["WeightDecay first", "WeightDecay last"])
def test_it_says_nothing_beside_a_weight_decay_of_zero(order):
    """A warning would be an error."""
    fit(Regression(), *[WeightDecay(0.0), ConstrainedDecay("start")][::order], max_epochs=1)


def test_it_warns_of_an_optimizer_that_decays_as_well():
    with pytest.warns(
        UserWarning, match=r"AdamW decays weights by weight_decay=0.01 that ConstrainedDecay decays"
    ) as caught:
        fit(Regression(), ConstrainedDecay("start"))
    assert sum("ConstrainedDecay" in str(warning.message) for warning in caught) == 1


# --- state and bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callback",
    [WeightDecay(0.1, method="cautious"), AnchorDecay(0.1), ConstrainedDecay("start")],
    ids=["WeightDecay", "AnchorDecay", "ConstrainedDecay"],
)
def test_a_copy_made_during_training_is_of_the_callback_only(callback):
    copies = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            copies.append(pickle.dumps(callback))

    fit(Regression(sgd), callback, Copy(), max_epochs=1)
    assert len(copies[0]) < 1000
    first, second = Regression(sgd), Regression(sgd)
    fit(first, pickle.loads(copies[0]))
    fit(second, pickle.loads(pickle.dumps(callback)))
    assert_identical_weights(weights(first), weights(second))


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (AnchorDecay(0.1, include=("embedding",)), MisconfigurationException, "AnchorDecay has nothing to pull"),
        (
            ConstrainedDecay(include=("embedding",)),
            MisconfigurationException,
            "ConstrainedDecay has nothing to constrain",
        ),
        (AnchorDecay(0.1, exclude=("*.wieght",)), ValueError, "matches no parameter"),
        (ConstrainedDecay(include=("*.wieght",)), ValueError, "matches no parameter"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_before_training(callback, error, message):
    with pytest.raises(error, match=message):
        fit(Regression(sgd), callback)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightDecay(0.1, method="decouple"), ValueError, "`method` should be one of .*, got 'decouple'"),
        (lambda: WeightDecay(0.1, rounding="stochastic"), ValueError, "needs method='decoupled' or 'independent'"),
        (lambda: AnchorDecay(-0.1), ValueError, "not negative, got -0.1"),
        (lambda: AnchorDecay(0.1, anchor="start"), TypeError, "`anchor` should be 'init' or a state dict, got 'start'"),
        (lambda: AnchorDecay(0.1, include="weight"), TypeError, "`include` should be a sequence of rules"),
        (lambda: ConstrainedDecay("begin"), ValueError, "`bound` should be one of .*, got 'begin'"),
        (lambda: ConstrainedDecay(factor=0.0), ValueError, "`factor` should be positive and finite, got 0.0"),
        (lambda: ConstrainedDecay(warm_start_steps=0), ValueError, "`warm_start_steps` should be a positive integer"),
        (lambda: ConstrainedDecay(interval=2.5), ValueError, "`interval` should be a positive integer, got 2.5"),
    ],
)
def test_bad_input_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- two processes ------------------------------------------------------------------------------------------------

found = spread.results(
    {
        **{method: (functools.partial(WeightDecay, 0.3, method=method), adam) for method in METHODS},
        "stable, SGD": (
            functools.partial(WeightDecay, 0.3, method="stable"),
            functools.partial(SGD, lr=0.1, momentum=0.5),
        ),
        "anchor": (lambda: AnchorDecay(0.5), adam),
        "constrained": (lambda: ConstrainedDecay("start", factor=0.5), adam),
        "constrained, warm start": (lambda: ConstrainedDecay("warm_start", factor=0.5, warm_start_steps=2), adam),
    }
)


@pytest.mark.parametrize("name", found.names)
@pytest.mark.parametrize("strategy", spread.STRATEGIES)
def test_two_processes_equal_one(strategy, name):
    one, two = found("one process")[name], found(strategy)[name]
    for key, weight in one.items():
        np.testing.assert_allclose(two[key], weight, rtol=0, atol=1e-12)
