"""Does a penalty act once per step, on the right weights, by the right amount, whatever the Trainer does around it?"""

import functools
import itertools
import pickle
import subprocess
import sys
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import LBFGS, SGD, Adadelta, Adam, AdamW, Muon, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    RegularizationSummary,
    WeightConstraint,
    WeightDecay,
)
from lightning_regularize.projections import Box, MaxNorm
from lightning_regularize.schedules import Linear, Steps
from tests.models import ConvNet
from tests.reading import read_csv
from tests.training import spread
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    train,
    weights,
)

pytestmark = QUIET

PENALIZED = ("hidden.weight", "output.weight")
STRENGTH = 0.125
sgd = functools.partial(SGD, lr=0.1)
momentum = functools.partial(SGD, lr=0.1, momentum=0.5)


def scaler(init_scale=1024.0, **options):
    """A GradScaler on a CPU; float64 is left alone by autocast, so that weights can be compared exactly."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, **options))


# --- the oracle: a loop without Lightning and without this package ------------------------------------------------


def l1_gradient(weight, strength):
    weight.grad += strength * weight.detach().sign()


def soft_threshold(weight, threshold):
    weight.data.copy_(weight.data.sign() * (weight.data.abs() - threshold).clamp(min=0))


def windows(accumulate, epochs=3):
    data = list(Batches())
    return [data[i : i + accumulate] for _ in range(epochs) for i in range(0, len(data), accumulate)]


def loop(optimizer, module, steps, *, gradient=None, after=None, accumulate=1):
    """``gradient(parameter, k)`` and ``after(parameter, k)`` see the penalized parameters at each step ``k``."""
    penalized = [p for name, p in module.named_parameters() if name in PENALIZED]
    for k, window in enumerate(steps):
        optimizer.zero_grad()
        for batch in window:
            (module.loss(batch) / accumulate).backward()
        for parameter in penalized if gradient else ():
            gradient(parameter, k)
        optimizer.step()
        for parameter in penalized if after else ():
            after(parameter, k)


def by_hand(make_optimizer, **options):
    module = Regression()
    loop(make_optimizer(module.parameters()), module, windows(options.get("accumulate", 1)), **options)
    return weights(module)


# --- when and how much --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3, 100])
def test_the_gradient_comes_once_per_step_in_the_trailing_window_too(accumulate):
    module = Regression(momentum)
    train(module, L1Penalty(STRENGTH), accumulate_grad_batches=accumulate)
    expected = by_hand(momentum, gradient=lambda w, k: l1_gradient(w, STRENGTH), accumulate=accumulate)
    assert_same_weights(weights(module), expected)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("make_optimizer", "threshold"), [(sgd, 0.1 * STRENGTH), (momentum, 0.2 * STRENGTH)], ids=["SGD", "momentum"]
)
def test_the_proximal_step_comes_once_per_step(make_optimizer, threshold, accumulate):
    module = Regression(make_optimizer)
    train(module, L1Penalty(STRENGTH, method="proximal"), accumulate_grad_batches=accumulate)
    expected = by_hand(make_optimizer, after=lambda w, k: soft_threshold(w, threshold), accumulate=accumulate)
    assert_same_weights(weights(module), expected)


@pytest.mark.parametrize(
    ("make_penalty", "gradient"),
    [
        (L1Penalty, lambda w: w.sign()),
        (L2Penalty, lambda w: w),
        (functools.partial(ElasticNetPenalty, l2=0.5), lambda w: w.sign() + 4 * w),
        (GroupLassoPenalty, lambda w: w.shape[1] ** 0.5 * w / w.norm(dim=1, keepdim=True)),
    ],
    ids=["L1", "L2", "elastic net", "group lasso"],
)
def test_each_penalty_adds_its_gradient(make_penalty, gradient):
    module = Regression(sgd)
    train(module, make_penalty(STRENGTH))

    def add(weight, k):
        weight.grad += STRENGTH * gradient(weight.detach())

    assert_same_weights(weights(module), by_hand(sgd, gradient=add))


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_the_strength_follows_its_schedule(method):
    module = Regression(sgd)
    train(module, L1Penalty(Linear(0.0, 0.2), method=method))
    hooks = {
        "gradient": {"gradient": lambda w, k: l1_gradient(w, 0.01 * k)},
        "proximal": {"after": lambda w, k: soft_threshold(w, 0.1 * 0.01 * k)},
    }
    assert_same_weights(weights(module), by_hand(sgd, **hooks[method]))


def test_the_threshold_follows_the_learning_rate():
    module = Regression(sgd, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=7, gamma=0.1))
    train(module, L1Penalty(STRENGTH, method="proximal"))
    twin = Regression()
    optimizer = sgd(twin.parameters())
    for k, window in enumerate(windows(1)):
        lr = optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** (k // 7)
        loop(optimizer, twin, [window], after=lambda w, _, lr=lr: soft_threshold(w, lr * STRENGTH))
    assert_same_weights(weights(module), weights(twin))


def test_clipping_comes_after_the_gradient():
    module, twin = Regression(sgd), Regression()
    train(module, L1Penalty(STRENGTH), gradient_clip_val=0.05)
    plain = sgd(twin.parameters())
    plain.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(twin.parameters(), 0.05) and None)
    loop(plain, twin, windows(1), gradient=lambda w, k: l1_gradient(w, STRENGTH))
    assert_same_weights(weights(module), weights(twin))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_every_evaluation_of_lbfgs_has_the_gradient_once(line_search):
    make_optimizer = functools.partial(LBFGS, lr=0.1, max_iter=3, line_search_fn=line_search)
    module, twin = Regression(make_optimizer), Regression()
    make_trainer(L1Penalty(STRENGTH), max_epochs=1).fit(module, Batches())
    optimizer = make_optimizer(twin.parameters())
    for (batch,) in windows(1, epochs=1):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = twin.loss(batch)
            loss.backward()
            for name, parameter in twin.named_parameters():
                if name in PENALIZED:
                    l1_gradient(parameter, STRENGTH)
            return loss

        optimizer.step(closure)
    assert_same_weights(weights(module), weights(twin))


class PastLightning(Regression):
    """Steps torch's optimizer by hand, of which Lightning sees nothing."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers().optimizer
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class InTurns(PastLightning):
    """Steps Lightning's optimizer in the batches between."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers() if batch_idx % 2 else self.optimizers().optimizer
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("module_class", [PastLightning, InTurns])
@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_steps_of_torchs_own_optimizer_count(method, module_class):
    module = module_class(sgd)
    train(module, L1Penalty(Linear(0.0, 0.2), method=method, total_steps=21))
    hooks = {
        "gradient": {"gradient": lambda w, k: l1_gradient(w, 0.01 * k)},
        "proximal": {"after": lambda w, k: soft_threshold(w, 0.1 * 0.01 * k)},
    }
    assert_same_weights(weights(module), by_hand(sgd, **hooks[method]))


# --- zeros --------------------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """The weights after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(weights(pl_module))


@pytest.mark.parametrize("make_optimizer", [sgd, functools.partial(Adam, lr=0.05)], ids=["SGD", "Adam"])
def test_signs_never_flip_in_a_proximal_step(make_optimizer):
    before = []

    class Remember(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(lambda *_: before.append(weights(pl_module)))

    watch = Watch()
    train(Regression(make_optimizer), Remember(), L1Penalty(STRENGTH, method="proximal"), watch)
    zeros = 0
    for old, new in zip(before, watch.seen, strict=True):
        for name in PENALIZED:
            assert (old[name] * new[name] >= 0).all()
            zeros += (new[name] == 0).sum().item()
    assert zeros > 0


class Insensitive(Regression):
    """Its loss does not depend on the first input, which every batch has at zero."""

    def loss(self, batch):
        x, y = batch
        return super().loss((x * torch.tensor([0.0, 1.0, 1.0]), y))


@pytest.mark.parametrize("make_optimizer", [sgd, functools.partial(AdamW, lr=0.05)], ids=["SGD", "AdamW"])
def test_zero_weights_that_no_gradient_moves_stay_at_zero(make_optimizer):
    watch = Watch()
    train(Insensitive(make_optimizer), L1Penalty(0.5, method="proximal"), watch, max_epochs=10)
    columns = [seen["hidden.weight"][:, 0] for seen in watch.seen]
    first = next(i for i, column in enumerate(columns) if (column == 0).all())
    assert all((column == 0).all() for column in columns[first:])


class Classifier(L.LightningModule):
    def __init__(self, make_optimizer):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.net = ConvNet()
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        return self.net(self.net.example(8)).square().mean()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


@pytest.mark.parametrize("make_optimizer", [momentum, functools.partial(Adam, lr=0.01)], ids=["SGD", "Adam"])
def test_whole_channels_become_zero_and_the_rest_of_the_layer_stays_dense(make_optimizer):
    module = Classifier(make_optimizer)
    trainer = make_trainer(GroupLassoPenalty(0.02, include=("*conv*.weight",), method="proximal"), max_epochs=1)
    trainer.fit(module, range(30))
    zero = {n: (p == 0).flatten(1) for n, p in module.named_parameters() if "conv" in n}
    assert any(z.all(dim=1).any() for z in zero.values())
    assert all((z.all(dim=1) == z.any(dim=1)).all() for z in zero.values())
    assert (module.net.fc.weight != 0).all()


def test_a_scalar_can_be_penalized():
    class Scaled(Regression):
        def __init__(self):
            super().__init__(functools.partial(Adam, lr=0.05))
            self.logit_scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))

        def loss(self, batch):
            return super().loss(batch) + 1e-3 * self.logit_scale

    module = Scaled()
    train(module, L1Penalty(1.0, include=("logit_scale*",), exclude=(), method="proximal"))
    assert module.logit_scale == 0


# --- on which weights ---------------------------------------------------------------------------------------------


def moved(module, *callbacks, **options):
    """Names of what differs from a run without the callbacks."""
    twin = pickle.loads(pickle.dumps(module))
    train(module, *callbacks, **options)
    train(twin, **options)
    plain = weights(twin)
    return {name for name, weight in weights(module).items() if not torch.equal(weight, plain[name])}


class OnlyHidden(Regression):
    """So that the penalty cannot reach a weight by way of another: each acts on the loss by itself."""

    def loss(self, batch):
        return sum((p - 0.3).square().sum() for p in self.parameters() if p is not self.output.weight)


@pytest.mark.parametrize("method", ["gradient", "proximal"])
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, {"hidden.weight"}),
        ({"include": ("*.bias",), "exclude": ()}, {"hidden.bias", "norm.bias", "output.bias"}),
        ({"include": ("norm",), "exclude": ("*.bias",)}, {"norm.weight"}),
    ],
    ids=["default", "biases", "norms"],
)
def test_rules_select(rules, expected, method):
    assert moved(OnlyHidden(sgd), L1Penalty(STRENGTH, method=method, **rules)) == expected


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_a_parameter_without_a_gradient_gets_none_and_stays(method):
    module = OnlyHidden(sgd)
    before = weights(module)
    train(module, L1Penalty(STRENGTH, method=method))
    assert module.output.weight.grad is None
    assert torch.equal(module.output.weight, before["output.weight"])


class Unfreeze(L.Callback):
    """The hidden layer trains from the second epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.hidden.requires_grad_(trainer.current_epoch > 0)


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_frozen_weights_rest_until_they_are_unfrozen(method):
    watch, module = Watch(), Regression(sgd)
    before = weights(module)
    train(module, Unfreeze(), L1Penalty(STRENGTH, method=method), watch, max_epochs=2)
    assert torch.equal(watch.seen[6]["hidden.weight"], before["hidden.weight"])

    plain, other = Watch(), Regression(sgd)
    train(other, Unfreeze(), L1Penalty(STRENGTH, method=method, include=("output.*",)), plain, max_epochs=2)
    assert torch.equal(watch.seen[6]["output.weight"], plain.seen[6]["output.weight"])
    assert not torch.equal(watch.seen[7]["hidden.weight"], plain.seen[7]["hidden.weight"])


class Adversaries(L.LightningModule):
    """A generator that steps with every batch, and a discriminator that steps with every other."""

    def __init__(self, make_generator=sgd, make_discriminator=sgd):
        super().__init__()
        self.generator, self.discriminator = Regression(), Regression()
        self.makers = make_generator, make_discriminator
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [make(part.parameters()) for make, part in zip(self.makers, self.children(), strict=True)]

    def training_step(self, batch, batch_idx):
        pairs = zip(self.optimizers(), self.children(), strict=True)
        for optimizer, part in itertools.islice(pairs, 1 + self.trainer.fit_loop.total_batch_idx % 2):
            optimizer.zero_grad()
            self.manual_backward(part.loss(batch))
            optimizer.step()


@pytest.mark.parametrize("method", ["gradient", "proximal"])
@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_only_the_parameters_of_the_stepping_optimizer_are_touched_at_its_own_pace(part, method):
    module = Adversaries()
    train(module, L1Penalty(Linear(0.0, 0.2), include=(f"{part}.*",), method=method, total_steps=21))
    expected = {}
    for name, every in (("generator", 1), ("discriminator", 2)):
        twin = Regression()
        steps = windows(1)[every - 1 :: every]
        hooks = {
            "gradient": {"gradient": lambda w, k: l1_gradient(w, 0.01 * k)},
            "proximal": {"after": lambda w, k: soft_threshold(w, 0.1 * 0.01 * k)},
        }
        loop(sgd(twin.parameters()), twin, steps, **(hooks[method] if name == part else {}))
        expected |= {f"{name}.{key}": weight for key, weight in weights(twin).items()}
    assert_same_weights(weights(module), expected)


class Words(L.LightningModule):
    def __init__(self, make_optimizer=sgd):
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)
        nn.init.ones_(self.table.weight)
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        return self.table(torch.tensor([0])).sum() * 0.0

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def test_sparse_gradients_are_refused_and_nothing_has_changed():
    module = Words()
    message = r"L1Penalty.*\['table\.weight'\] have sparse gradients.*`exclude=.* or method='proximal'"
    with pytest.raises(MisconfigurationException, match=message):
        train(module, L1Penalty(STRENGTH), data=range(3))
    assert (module.table.weight == 1).all()


def test_sparse_gradients_allow_proximal_steps_on_the_whole_table():
    module = Words()
    train(module, L1Penalty(STRENGTH, method="proximal"), data=range(3), max_epochs=1)
    torch.testing.assert_close(module.table.weight.detach(), torch.full((4, 3), 1 - 3 * 0.1 * STRENGTH))


# --- mixed precision ----------------------------------------------------------------------------------------------


class Overflowing(Regression):
    """Its third batch has an infinite loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.trainer.global_step == 2 else loss


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("method", ["gradient", "proximal"])
@pytest.mark.parametrize("make", [sgd, functools.partial(Adam, lr=0.05)], ids=["SGD", "Adam"])
def test_a_grad_scaler_changes_nothing(make, method, fused):
    found, expected = Regression(functools.partial(make, fused=fused)), Regression(make)
    train(found, L1Penalty(STRENGTH, method=method), plugins=[scaler()])
    train(expected, L1Penalty(STRENGTH, method=method))
    assert_same_weights(weights(found), weights(expected))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_a_step_that_overflows_moves_nothing(method, fused):
    watch = Watch()
    make_optimizer = functools.partial(Adam, lr=0.05, fused=fused)
    train(Overflowing(make_optimizer), L1Penalty(STRENGTH, method=method), watch, plugins=[scaler()], max_epochs=1)
    assert_identical_weights(watch.seen[2], watch.seen[1])
    assert not torch.equal(watch.seen[3]["hidden.weight"], watch.seen[2]["hidden.weight"])


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("module_class", [Regression, Overflowing])
def test_the_scale_grows_and_backs_off_as_without_a_penalty(module_class, fused):
    scales = []
    for callbacks in ([], [L1Penalty(1e4)]):
        plugin = scaler(growth_interval=4)
        train(module_class(functools.partial(Adam, lr=0.05, fused=fused)), *callbacks, plugins=[plugin])
        scales.append(plugin.scaler.get_scale())
    assert scales[0] == scales[1] != 1024.0


# --- what is logged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "key", "value"),
    [
        (L1Penalty(0.1), "penalty/l1", lambda w: 0.1 * w.abs().sum()),
        (L1Penalty(0.1, method="proximal"), "penalty/l1", lambda w: 0.1 * w.abs().sum()),
        (L2Penalty(0.1), "penalty/l2", lambda w: 0.05 * w.square().sum()),
        (
            ElasticNetPenalty(0.1, 0.3),
            "penalty/elastic_net",
            lambda w: 0.1 * w.abs().sum() + 0.15 * w.square().sum(),
        ),
        (
            GroupLassoPenalty(0.1),
            "penalty/group_lasso",
            lambda w: 0.1 * w.shape[1] ** 0.5 * w.norm(dim=1).sum(),
        ),
    ],
    ids=["L1", "proximal L1", "L2", "elastic net", "group lasso"],
)
def test_the_value_is_logged_of_the_weights_that_the_step_finds(penalty, key, value, tmp_path):
    watch, module, logger = Watch(), Regression(sgd), CSVLogger(tmp_path)
    found = [weights(module)]
    train(module, penalty, watch, logger=logger)
    found += watch.seen[:-1]
    expected = {k: sum(value(seen[name]) for name in PENALIZED).item() for k, seen in enumerate(found)}
    assert read_csv(logger)[key] == pytest.approx(expected, rel=1e-6, abs=0)


def test_frozen_weights_are_not_in_the_logged_value(tmp_path):
    logger, module = CSVLogger(tmp_path), Regression(sgd)
    module.output.weight.requires_grad_(False)
    expected = weights(module)["hidden.weight"].abs().sum().item()
    make_trainer(L1Penalty(1.0), logger=logger, max_steps=1).fit(module, Batches())
    assert read_csv(logger)["penalty/l1"] == pytest.approx({0: expected}, rel=1e-6, abs=0)


def test_the_value_is_logged_when_lightning_logs(tmp_path):
    logger = CSVLogger(tmp_path)
    train(Regression(sgd), L1Penalty(Steps([0.1, 0.2], [5])), logger=logger, log_every_n_steps=5)
    assert list(read_csv(logger)["penalty/l1"]) == [4, 9, 14, 19]


def test_lbfgs_logs_the_weights_of_its_first_evaluation(tmp_path):
    logger, module = CSVLogger(tmp_path), Regression(functools.partial(LBFGS, lr=0.1, max_iter=3))
    first = sum(weights(module)[name].abs().sum() for name in PENALIZED).item()
    make_trainer(L1Penalty(1.0), logger=logger, max_steps=1).fit(module, Batches())
    assert read_csv(logger)["penalty/l1"] == pytest.approx({0: first}, rel=1e-6, abs=0)


def test_two_of_a_kind_and_two_optimizers_have_keys_of_their_own(tmp_path):
    logger = CSVLogger(tmp_path)
    penalties = [L1Penalty(0.1, include=("generator.*",)), L1Penalty(0.2, include=("discriminator.*",))]
    train(Adversaries(), *penalties, logger=logger, max_epochs=1)
    logged = {key: list(values) for key, values in read_csv(logger).items() if key.startswith("penalty")}
    assert logged == {"penalty/l1 1 optimizer0": list(range(7)), "penalty/l1 2 optimizer1": [1, 3, 5]}


# --- state --------------------------------------------------------------------------------------------------------


def hidden(info):
    return "hidden" in info.name


PAIRS = {
    "equal": lambda: (L1Penalty(0.1), L1Penalty(0.1)),
    "strength": lambda: (L1Penalty(0.1), L1Penalty(0.2)),
    "include": lambda: (L1Penalty(0.1), L1Penalty(0.1, include=("output.*",))),
    "exclude": lambda: (L1Penalty(0.1), L1Penalty(0.1, exclude=("bias",))),
    "method": lambda: (L1Penalty(0.1), L1Penalty(0.1, method="proximal")),
    "schedule": lambda: (L1Penalty(0.1), L1Penalty(Linear(0.1, 0.0))),
    "class": lambda: (L1Penalty(0.1), L2Penalty(0.1)),
    "elastic net": lambda: (ElasticNetPenalty(0.1, 0.2), ElasticNetPenalty(0.1, 0.3)),
    "function as a rule": lambda: (L1Penalty(0.1, include=(hidden,)), L1Penalty(0.1)),
    "lambdas as rules": lambda: (
        L1Penalty(0.1, include=(lambda i: "hidden" in i.name,)),
        L1Penalty(0.1, include=(lambda i: "put" in i.name,)),
    ),
    "lambdas as schedules": lambda: (L1Penalty(lambda at: 0.1), L1Penalty(lambda at: 0.2)),
}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_state_keys_tell_two_in_one_trainer_apart(make):
    pair = make()
    assert pair[0].state_key != pair[1].state_key
    train(Regression(sgd), *pair, max_epochs=1)
    assert pair[0].state_key != pair[1].state_key


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_state_keys_are_the_same_in_the_next_run_also_of_copies(make):
    pair, again = make(), make()
    keys = []
    for callbacks in (pair, again, *([pickle.loads(pickle.dumps(pair))] if "lambda" not in repr(pair) else [])):
        train(Regression(sgd), *callbacks, max_epochs=1)
        keys.append([callback.state_key for callback in callbacks])
    assert all(each == keys[0] for each in keys)


def test_the_key_of_a_lambda_is_that_of_another_process():
    code = "from lightning_regularize import L1Penalty; key = L1Penalty(1.0, include=(lambda i: i.shape,)).state_key"
    exec(code, here := {"__name__": "__main__"})
    command = [sys.executable, "-c", f"{code}; print(key)"]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")
    assert there == here["key"]
    assert "0x" not in there
    assert there.startswith("L1Penalty")


def test_another_strength_wins_over_the_checkpoints_and_it_is_said(tmp_path):
    """The rules tell the two apart, so that each is compared with what it was."""

    def penalties(strength):
        return L1Penalty(strength, include=("hidden.*",)), L1Penalty(0.5, include=("output.*",))

    path = tmp_path / "5.ckpt"
    train(Regression(sgd), *penalties(0.1), SaveAfter(tmp_path, 5))
    with pytest.warns(
        UserWarning, match=r"L1Penalty differs from .* wins over it\. strength: 0\.1 then, 0\.2 now\."
    ) as w:
        train(found := Regression(sgd), *penalties(0.2), ckpt_path=path)
    assert sum("differs from" in str(warning.message) for warning in w) == 1
    train(twin := Regression(sgd), *penalties(Steps([0.1, 0.2], [5])))
    assert_identical_weights(weights(found), weights(twin))


@pytest.mark.parametrize("method", ["gradient", "proximal"])
@pytest.mark.parametrize("step", [3, 8, 15])
@pytest.mark.parametrize("module_class", [functools.partial(Regression, momentum), Adversaries], ids=["one", "two"])
def test_resumed_equals_uninterrupted(module_class, step, method, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            path = tmp_path / "checkpoint.ckpt"
            if trainer.fit_loop.total_batch_idx + 1 == step:
                trainer.save_checkpoint(path)

    def penalties():
        scheduled = L1Penalty(Linear(0.0, 0.5), include=("*hidden.*",), method=method, total_steps=21)
        return scheduled, L1Penalty(0.1, include=("*output.*",), method=method)

    whole, resumed = module_class(), module_class()
    train(whole, *penalties(), Save())
    train(resumed, *penalties(), ckpt_path=tmp_path / "checkpoint.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))


def test_a_second_fit_acts_once():
    module, twin, penalty = Regression(sgd), Regression(sgd), L1Penalty(STRENGTH)
    for _ in range(2):
        train(module, penalty)
        train(twin, L1Penalty(STRENGTH))
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_after_an_exception_the_optimizer_steps_alone(method):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module, trainer = Failing(sgd), make_trainer(L1Penalty(STRENGTH, method=method), max_epochs=1)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, Batches())
    optimizer, before = trainer.optimizers[0], weights(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_identical_weights(weights(module), before)


# --- what cannot work ---------------------------------------------------------------------------------------------


class Matrices(Regression):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.norm, self.hidden.bias, self.output.bias = nn.Identity(), None, None


@pytest.mark.parametrize("make_optimizer", [Muon, Adadelta, LBFGS])
def test_an_unknown_metric_is_an_error_before_training_that_names_the_known(make_optimizer):
    module = Matrices(make_optimizer)
    before = weights(module)
    known = "SGD, Adam, AdamW, NAdam, RMSprop, Adagrad"
    with pytest.raises(
        MisconfigurationException, match=f"{known}, not of {make_optimizer.__name__}.*method='gradient'"
    ):
        train(module, L1Penalty(STRENGTH, method="proximal"))
    assert_identical_weights(weights(module), before)


def test_the_metric_of_an_optimizer_that_holds_nothing_penalized_does_not_matter():
    penalty = L1Penalty(STRENGTH, include=("discriminator.*",), method="proximal")
    train(Adversaries(make_generator=Adadelta), penalty, max_epochs=1)


@pytest.mark.parametrize(
    ("penalty", "make_optimizer", "message"),
    [
        (L1Penalty(0.1), functools.partial(SGD, lr=0.1, maximize=True), "maximize=True.* use method='proximal'"),
        (L1Penalty(0.1, include=("embedding",)), sgd, "L1Penalty has nothing to pull at: no parameter matches"),
    ],
    ids=["climbing", "nothing penalized"],
)
def test_what_cannot_work_is_an_error_before_training(penalty, make_optimizer, message):
    with pytest.raises(MisconfigurationException, match=message):
        train(Regression(make_optimizer), penalty)


class Normalized(Regression):
    """A weight that the layer divides by its norm."""

    def __init__(self, normalize):
        super().__init__(sgd)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the older functions that they will go
            normalize(self.hidden)


NORMALIZATIONS = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, "hidden.parametrizations.weight.original1"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "hidden.parametrizations.weight.original"),
    "older weight_norm": (nn.utils.weight_norm, "hidden.weight_v"),
    "older spectral_norm": (nn.utils.spectral_norm, "hidden.weight_orig"),
}
SPARSE = {
    "l1": functools.partial(L1Penalty, 10.0),
    "elastic net": functools.partial(ElasticNetPenalty, 10.0, 0.1),
    "group lasso": functools.partial(GroupLassoPenalty, 10.0),
}


@pytest.mark.parametrize(("normalize", "name"), NORMALIZATIONS.values(), ids=NORMALIZATIONS)
@pytest.mark.parametrize("penalty", SPARSE.values(), ids=SPARSE)
def test_exact_zeros_of_what_is_divided_by_its_norm_are_refused(penalty, normalize, name):
    module = Normalized(normalize)
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=rf"divide zero by zero.*\['{name}'\].*`exclude`"):
        train(module, penalty(method="proximal"))
    assert_identical_weights(weights(module), before)
    train(module, penalty(method="proximal", exclude=("bias", "norm", name)))
    assert all(weight.isfinite().all() for weight in weights(module).values())
    assert not module.output.weight.any()


@pytest.mark.parametrize("normalize", [normalize for normalize, _ in NORMALIZATIONS.values()], ids=NORMALIZATIONS)
def test_what_is_divided_by_its_norm_may_be_penalized_without_exact_zeros(normalize):
    module = Normalized(normalize)
    train(module, L1Penalty(0.1), L2Penalty(0.1, method="proximal"), GroupLassoPenalty(0.1))
    assert all(weight.isfinite().all() for weight in weights(module).values())


def test_units_of_a_parametrized_weight_are_those_of_its_layer():
    module = Normalized(lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Hardtanh()))
    module.hidden.parametrizations.weight.original.register_hook(torch.zeros_like)
    with torch.no_grad():
        module.hidden.parametrizations.weight.original[2] *= 1e-3
    train(module, GroupLassoPenalty(0.01, include=("hidden.parametrizations.*",), method="proximal"), max_epochs=1)
    assert module.hidden.parametrizations.weight.original.any(dim=1).tolist() == [True, True, False, True]


def test_a_weight_whose_units_nobody_knows_is_named():
    module = Regression(sgd)
    module.lora = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(MisconfigurationException, match=r"not know what the units of 'lora' are.*`exclude=.*`dim`"):
        train(module, GroupLassoPenalty(0.1))


class Complex(Regression):
    def __init__(self):
        super().__init__(sgd)
        self.gain = nn.Parameter(torch.ones(2, 2, dtype=torch.complex128))

    def loss(self, batch):
        return super().loss(batch) + self.gain.abs().square().mean()


@pytest.mark.parametrize(
    "callback",
    [
        L1Penalty(0.1),
        L1Penalty(0.1, method="proximal"),
        L2Penalty(0.1, method="proximal"),
        ElasticNetPenalty(0.1, 0.1),
        GroupLassoPenalty(0.1),
        WeightConstraint(MaxNorm(1.0)),
        WeightConstraint(Box(-1, 1)),
        ConstrainedDecay("start"),
        WeightDecay(0.1, method="cautious"),
        WeightDecay(0.1, method="stable"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_complex_weights_are_refused_where_signs_or_norms_of_units_matter(callback):
    module = Complex()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"made for real weights, and \['gain'\] are complex"):
        train(module, callback)
    assert_identical_weights(weights(module), before)


@pytest.mark.parametrize(
    "callback",
    [L2Penalty(0.125), WeightDecay(0.125, method="decoupled"), WeightDecay(0.125, method="coupled")],
    ids=["l2", "decoupled", "coupled"],
)
def test_complex_weights_shrink_as_their_parts_do(callback):
    module = Complex()
    train(module, callback, RegularizationSummary())
    # The gradient of a mean over 4 squared magnitudes is w / 2.
    expected = torch.full((2, 2), (1 - 0.1 * 0.5 - 0.1 * 0.125) ** 21, dtype=torch.complex128)
    torch.testing.assert_close(module.gain.detach(), expected)


@pytest.mark.parametrize(
    "callback",
    [GroupLassoPenalty(0.1), WeightConstraint(MaxNorm(1.0)), AnchorDecay(0.1), ConstrainedDecay("start")],
    ids=lambda callback: type(callback).__name__,
)
def test_lazy_weights_are_named_where_they_are_needed_before_the_first_batch(callback):
    module = Regression(sgd)
    module.output = nn.LazyLinear(2, bias=False, dtype=torch.float64)
    with pytest.raises(MisconfigurationException, match=r"\['output.weight'\] have no shape yet: run a batch"):
        train(module, callback)


# --- low precision ----------------------------------------------------------------------------------------------------


class Half(Regression):
    def __init__(self):
        super().__init__(functools.partial(SGD, lr=1e-2))
        self.to(torch.bfloat16)

    def loss(self, batch):
        return 0.0 * super().loss([part.to(torch.bfloat16) for part in batch])


def warm_up(optimizer):
    return LambdaLR(optimizer, lambda step: min(1.0, step / 7))


ROUNDED = {
    "l1": functools.partial(L1Penalty, include=("weight",)),
    "l2": functools.partial(L2Penalty, include=("weight",)),
    "elastic net": functools.partial(ElasticNetPenalty, l2=0.1, include=("weight",)),
    "group lasso": functools.partial(GroupLassoPenalty, include=("weight",)),
}


@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("make_scheduler", [None, warm_up], ids=["constant", "warm-up"])
def test_shrinking_that_rounds_to_nothing_is_warned_of_once(make, make_scheduler):
    module = Half()
    module.make_scheduler = make_scheduler
    before = weights(module)
    with pytest.warns(UserWarning, match=r"method='proximal'\) is off by up to 100%") as caught:
        train(module, make(1e-4, method="proximal"))
    assert len([w for w in caught if "is off by" in str(w.message)]) == 1
    assert_identical_weights(weights(module), before)


@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("method", ["gradient", "proximal"])
def test_shrinking_that_acts_is_not_warned_of(make, method, recwarn):
    module = Half()
    module.make_scheduler = warm_up
    train(module, make(2.0 if method == "proximal" else 16.0, method=method))
    train(Regression(sgd), make(1e-9, method=method), max_epochs=1)
    assert not [w for w in recwarn if "is off by" in str(w.message)]


class Steep(Half):
    """Its gradients are all of about size 1, whatever the weights."""

    def loss(self, batch):
        return sum((parameter * torch.ones_like(parameter)).sum() for parameter in self.parameters())


@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_that_rounds_the_penalty_away_is_warned_of_once(make, dtype):
    module, without = Steep().to(dtype), Steep().to(dtype)
    options = {"l2": 1e-5} if make is ROUNDED["elastic net"] else {}
    with pytest.warns(UserWarning, match=r"method='gradient'\) is off by up to 100% of its strength") as caught:
        train(module, make(1e-5, **options))
    assert len([w for w in caught if "is off by" in str(w.message)]) == 1
    train(without)
    assert_identical_weights(weights(module), weights(without))


@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("module_class", [Half, Steep])
@pytest.mark.parametrize("strength", [1e-3, 1e-2, 0.1, 1.0])
def test_a_penalty_in_gradients_of_half_precision_has_its_strength_or_is_warned_of(
    make, module_class, strength, recwarn
):
    """What a step adds, in the mean over a run, is within 5 % of what it adds to float32 gradients."""
    added, asked = 0.0, 0.0
    penalty = make(strength)

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            nonlocal added, asked
            for name, p in pl_module.named_parameters():
                if p.grad is not None and name.endswith("weight") and p.dim() > 1:
                    term = torch.zeros_like(p, dtype=torch.float64)
                    penalty.penalty().add_gradient_(term, p.detach().double(), penalty.strength({"params": []}, 0))
                    gradient = torch.ones_like(p) if module_class is Steep else torch.zeros_like(p)
                    added += ((p.grad.double() - gradient.double()) * term).sum().item()
                    asked += term.square().sum().item()

    train(module_class(), penalty, Watch())
    is_warned = any("is off by" in str(w.message) for w in recwarn)
    assert is_warned or added == pytest.approx(asked, rel=0.05, abs=0)


def test_a_strength_that_grows_is_judged_at_the_end(recwarn):
    train(Half(), L2Penalty(Linear(0.0, 20.0), include=("weight",), method="proximal"))
    assert not [w for w in recwarn if "is off by" in str(w.message)]


@pytest.mark.parametrize(
    ("rule", "message"),
    [("output.wieght", r"'output.wieght' matches no parameter; the nearest are 'output.weight'"), ("*.gamma", "no")],
    ids=["misspelled", "absent"],
)
def test_a_rule_that_matches_nothing_is_an_error_before_training(rule, message):
    with pytest.raises(ValueError, match=message):
        train(Regression(sgd), L1Penalty(0.1, include=(rule,)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: L1Penalty(-0.1), ValueError, r"not negative, got -0\.1"),
        (lambda: L1Penalty(float("nan")), ValueError, "finite number that is not negative, got nan"),
        (lambda: L1Penalty("0.1"), TypeError, r"a `Schedule` or a callable .*, got '0\.1'"),
        (lambda: L1Penalty(0.1, method="prox"), ValueError, "`method` should be 'gradient' or 'proximal', got 'prox'"),
        (lambda: L1Penalty(0.1, include="weight"), TypeError, "`include` should be a sequence of rules, got 'weight'"),
        (lambda: L1Penalty(0.1, include=("wieght",)), ValueError, "Did you mean 'weight'"),
        (lambda: L1Penalty(0.1, exclude=(3,)), TypeError, "`exclude` should hold kinds"),
        (
            lambda: L1Penalty(0.1, total_steps=0),
            ValueError,
            "`total_steps` should be a positive integer or None, got 0",
        ),
        (lambda: L2Penalty(-1.0), ValueError, "not negative"),
        (lambda: GroupLassoPenalty(-1.0), ValueError, "not negative"),
        (lambda: ElasticNetPenalty(-0.1, 0.1), ValueError, "`l1`"),
        (lambda: ElasticNetPenalty(0.1, float("inf")), ValueError, "`l2`"),
        (lambda: ElasticNetPenalty(0.0, 0.0), ValueError, "`l1` or `l2` should be positive, got 0 for both"),
        (lambda: ElasticNetPenalty(0.1, 0.1, schedule=-1.0), ValueError, "not negative"),
    ],
)
def test_bad_input_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- two processes ------------------------------------------------------------------------------------------------

adam = functools.partial(Adam, lr=0.05)
found = spread.results(
    {
        "L1": (lambda: L1Penalty(0.05), adam),
        "L1, proximal": (lambda: L1Penalty(0.05, method="proximal"), adam),
        "L1, proximal, SGD": (lambda: L1Penalty(0.05, method="proximal"), sgd),
        "L1 of everything": (lambda: L1Penalty(0.05, exclude=()), adam),
        "L2": (lambda: L2Penalty(0.05), adam),
        "group lasso": (lambda: GroupLassoPenalty(0.01), adam),
        "group lasso, proximal": (lambda: GroupLassoPenalty(0.01, method="proximal"), adam),
        "group lasso, proximal, RMSprop": (
            lambda: GroupLassoPenalty(0.01, method="proximal"),
            functools.partial(RMSprop, lr=0.05),
        ),
        "group lasso, proximal, SGD": (lambda: GroupLassoPenalty(0.05, method="proximal"), sgd),
    }
)


@pytest.mark.parametrize("name", found.names)
@pytest.mark.parametrize("strategy", spread.STRATEGIES)
def test_two_processes_equal_one(strategy, name):
    one, two = found("one process")[name], found(strategy)[name]
    for key, weight in one.items():
        np.testing.assert_allclose(two[key], weight, rtol=0, atol=1e-12)
