"""Does each rule follow its own schedule? Oracles: groups by hand, AdamC of pytorch_optimizer, nanochat's arrays."""

import functools
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from pytorch_optimizer import AdamC
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_regularize import WeightDecay
from lightning_regularize.decay_methods import METHODS
from lightning_regularize.schedules import Cosine, FollowLR, Join, Linear, Timescale, simulate
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    adamw,
    assert_identical_weights,
    make_trainer,
    plain_loop,
    train,
    weights,
)

pytestmark = QUIET

STEPS = 21
RULES = {"output.*": 0.3, "*": Linear(0.2, 0.0)}


def by_name(module, *names):
    named = dict(module.named_parameters())
    chosen = [[named.pop(name)] for name in names]
    return [*chosen, list(named.values())]


def train_by_hand(make, output=0.3, hidden=RULES["*"]):
    """The hidden weight, the output weight and the rest, in groups of their own, in a loop of torch."""
    module = Regression(make)
    groups = [{"params": params, "weight_decay": 0.0} for params in by_name(module, "hidden.weight", "output.weight")]
    optimizer = make(groups)
    optimizer.param_groups[1]["weight_decay"] = output
    data = [batch for _ in range(3) for batch in Batches()]
    return plain_loop(module, optimizer, data, simulate(hidden, STEPS))


@pytest.mark.parametrize("make", [adamw, functools.partial(SGD, lr=0.05, momentum=0.9)], ids=["adamw", "sgd"])
def test_it_is_what_groups_by_hand_do(make):
    module = Regression(make)
    witness = train(module, WeightDecay(RULES))
    assert_identical_weights(weights(module), train_by_hand(make))
    assert witness.decays("output.weight") == [0.3] * STEPS
    assert witness.decays("hidden.weight") == simulate(RULES["*"], STEPS)
    assert witness.decays("hidden.bias") == [0.0] * STEPS
    assert len(module.trainer.optimizers[0].param_groups) == 1
    assert [shown for (shown,) in witness.shown] == simulate(RULES["*"], STEPS)  # of the last rule


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_of_0_excludes_and_others_act_as_alone_with_every_method(method):
    of_rule, alone = Regression(), Regression()
    train(of_rule, WeightDecay({"output.*": 0.0, "*": Linear(0.2, 0.0)}, method=method))
    train(alone, WeightDecay(Linear(0.2, 0.0), method=method, exclude=("bias", "norm", "output.*")))
    assert_identical_weights(weights(of_rule), weights(alone))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "optimizer"])
def test_two_rules_decay_as_targets_by_hand_with_every_method(method):
    module = Regression(functools.partial(SGD, lr=0.05))
    train(module, WeightDecay(RULES, method=method))
    factors = Regression(functools.partial(SGD, lr=0.05))  # at constant values a rule is a factor
    train(factors, WeightDecay(0.2, method=method, factors={"output.*": 1.5}))
    constants = Regression(functools.partial(SGD, lr=0.05))
    train(constants, WeightDecay({"output.*": 0.3, "*": 0.2}, method=method))
    torch.testing.assert_close(weights(constants), weights(factors), rtol=0, atol=1e-12)
    assert not torch.equal(module.hidden.weight, constants.hidden.weight)


class Appends(Regression):
    """Gives its optimizer the last layer in the third batch, whose losses have no gradient."""

    def __init__(self):
        super().__init__(lambda parameters: SGD([self.hidden.weight], lr=0.1, weight_decay=0.1))

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.optimizers().param_groups[0]["params"].append(self.output.weight)

    def loss(self, batch):
        return 0 * super().loss(batch)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "stable"])
def test_what_is_appended_in_mid_run_decays_by_its_own_rule_from_then_on(method):
    module = Appends()
    start = weights(module)
    rules = {"output.*": 0.9, "*": 0.5}
    train(module, WeightDecay(rules, method=method), max_epochs=1)
    rate = 1.0 if method == "independent" else 0.1
    for name, steps, decay in (("hidden.weight", 7, 0.5), ("output.weight", 5, 0.9)):
        expected = start[name] * (1 - rate * decay) ** steps
        torch.testing.assert_close(module.get_parameter(name).detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight_decay", [0.05, 0.0], ids=str)
def test_none_keeps_what_the_optimizer_has(weight_decay):
    make = functools.partial(adamw, weight_decay=weight_decay)
    module = Regression(make)
    witness = train(module, WeightDecay({"output.*": 0.3, "*": None}))
    assert witness.decays("hidden.weight") == [weight_decay] * STEPS
    assert witness.decays("output.weight") == [0.3] * STEPS
    assert {shown for (shown,) in witness.shown} == {weight_decay}
    assert_identical_weights(weights(module), train_by_hand(make, hidden=weight_decay))


def test_ratios_of_groups_and_factors_multiply():
    def make(parameters):
        hidden, *rest = parameters
        return adamw([{"params": [hidden], "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.2}])

    module = Regression(make)
    witness = train(module, WeightDecay(RULES, factors={"output.*": lambda info: info.shape[0] / 4}))
    assert witness.decays("output.weight") == [0.15] * STEPS
    assert witness.decays("hidden.weight") == [value / 2 for value in simulate(RULES["*"], STEPS)]
    assert [group["weight_decay"] for group in module.trainer.optimizers[0].param_groups] == [0.1, 0.2]  # put back


def test_a_resumed_run_goes_on_with_each_schedule(tmp_path):
    rules = {"output.*": FollowLR(0.3), "*": Cosine(0.2, 0.0)}
    make = functools.partial(LambdaLR, lr_lambda=lambda step: 1 - step / STEPS)
    whole, resumed = Regression(make_scheduler=make), Regression(make_scheduler=make)
    train(whole, WeightDecay(rules), SaveAfter(tmp_path, 10))
    train(resumed, WeightDecay(rules), ckpt_path=tmp_path / "10.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))


def test_another_rule_than_the_checkpoints_wins_and_is_told_once(tmp_path):
    train(Regression(), WeightDecay(RULES), SaveAfter(tmp_path, 10))
    with pytest.warns(UserWarning, match="differs from the checkpoint's and wins over it") as caught:
        witness = train(Regression(), WeightDecay({**RULES, "output.*": 0.4}), ckpt_path=tmp_path / "10.ckpt")
    said = [str(warning.message) for warning in caught if "differs" in str(warning.message)]
    assert len(said) == 1
    assert "'output.*': 0.3" in said[0]
    assert "'output.*': 0.4" in said[0]
    assert set(witness.decays("output.weight")) == {0.4}


@pytest.mark.parametrize("method", METHODS)
def test_each_rule_of_each_group_is_logged(method, tmp_path):
    module, logger = Regression(), CSVLogger(tmp_path)
    trainer = make_trainer(WeightDecay(RULES, method=method), logger=logger, max_epochs=1)
    trainer.fit(module, Batches())
    found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("weight_decay")}
    assert found == {"weight_decay/pg1/output.*": pytest.approx(0.3, rel=1e-6, abs=0), "weight_decay/pg1/*": 0.0}


def test_a_mapping_with_one_rule_is_logged_as_one_schedule():
    trainer = make_trainer(WeightDecay({"*": 0.1}), max_epochs=1)
    trainer.fit(Regression(), Batches())
    assert [key for key in trainer.callback_metrics if key.startswith("weight_decay")] == ["weight_decay"]


def test_each_schedule_is_asked_only_for_groups_that_need_it():
    def needs_a_rate(at):
        raise AssertionError(at)

    witness = train(Regression(), WeightDecay({"output.*": 0.1, "*": 0.2}))
    assert set(witness.decays("hidden.weight")) == {0.2}
    rules = {"output.*": lambda at: 0.1 if at.lr == 0.2 else needs_a_rate(at), "*": 0.2}

    def make(parameters):
        *others, weight, bias = parameters
        return adamw([{"params": others}, {"params": [weight, bias], "lr": 0.2}])

    witness = train(Regression(make), WeightDecay(rules))
    assert set(witness.decays("output.weight")) == {0.1}


# What the field does


class BatchNormMLP(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16, bias=False)
            )
            self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))


def rate(step):
    return min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / 300)) / 2


def steps_of(model, optimizer, first, last, scale):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 32, 8, generator=generator), torch.randint(3, (300, 32), generator=generator)
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate(step)
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(model(x[step]), y[step])).backward()
        optimizer.step()


# AdamC divides by the corrected `sqrt(v) + eps` instead of `sqrt(v)` corrected, plus `eps`, and by no less than 1e-15.
# A step of torch's AdamW is the same where both round away, as with a loss of 2 ** 20 times the size.
@pytest.mark.parametrize(
    ("make", "eps", "scale", "atol"),
    [(AdamC, 1e-8, 1.0, 0.0), (AdamW, 1e-16, 2.0**20, 1e-6)],
    ids=["by its own optimizer", "by AdamW"],
)
@pytest.mark.parametrize("resumes", [False, True], ids=["whole", "resumed"])
def test_it_is_the_adamc_of_pytorch_optimizer_with_the_head_left_out(make, eps, scale, atol, resumes):
    expected = BatchNormMLP()
    hidden, other, head, rest = by_name(expected, "body.0.weight", "body.3.weight", "head.weight")
    decay = {"weight_decay": 0.5}
    groups = [{"params": [*hidden, *other], "normalized": True, **decay}, {"params": head, **decay}, {"params": rest}]
    steps_of(expected, AdamC(groups, lr=3e-3, eps=eps), 0, 300, scale)

    def make_all():
        model = BatchNormMLP()
        return model, make(model.parameters(), lr=3e-3, eps=eps), WeightDecay({"head.*": 0.5, "*": FollowLR(0.5)})

    model, optimizer, callback = make_all()
    attachment = callback.attach(optimizer, model, total_steps=300)
    if resumes:
        steps_of(model, optimizer, 0, 150, scale)
        state, of_optimizer, of_callback = model.state_dict(), optimizer.state_dict(), callback.state_dict()
        attachment.remove()
        model, optimizer, callback = make_all()
        model.load_state_dict(state)
        optimizer.load_state_dict(of_optimizer)
        callback.load_state_dict(of_callback)
        callback.attach(optimizer, model, total_steps=300)
    steps_of(model, optimizer, 150 if resumes else 0, 300, scale)
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("resumes", [False, True], ids=["whole", "resumed"])
def test_it_follows_the_arrays_of_nanochat(resumes, tmp_path):
    """Cosine to 0 on matrices, ``0.5 * (1 + cos(pi * it / num_iterations))``, and constants elsewhere."""
    to_zero = Join([Cosine(0.28, 0.0), 0.0], boundaries=[STEPS + 1])
    rules = {"output.*": 0.01, "weight": to_zero}
    options = {"ckpt_path": tmp_path / "10.ckpt"} if resumes else {}
    if resumes:
        train(Regression(), WeightDecay(rules), SaveAfter(tmp_path, 10))
    witness = train(Regression(), WeightDecay(rules), **options)
    expected = [0.28 * 0.5 * (1 + math.cos(math.pi * it / STEPS)) for it in range(10 if resumes else 0, STEPS)]
    assert witness.decays("hidden.weight") == pytest.approx(expected, rel=0, abs=1e-12)
    assert witness.decays("output.weight") == [0.01] * len(expected)


def test_the_share_left_after_a_timescale_without_gradients_is_1_over_e():
    weight = nn.Linear(4, 4, bias=False)
    optimizer = AdamW(weight.parameters(), lr=1e-3)
    before = weight.weight.detach().clone()
    WeightDecay(Timescale(steps=200)).attach(optimizer, weight)
    for _ in range(200):
        weight.weight.grad = torch.zeros_like(weight.weight)
        optimizer.step()
    torch.testing.assert_close(weight.weight / before, torch.full((4, 4), math.exp(-1)), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("make", "options", "what"),
    [
        (functools.partial(SGD, lr=0.1, momentum=0.9), {}, "the momentum of SGD"),
        (torch.optim.Adam, {}, "the averages of Adam"),
        (AdamW, {"method": "coupled"}, "the averages of AdamW"),
    ],
    ids=["momentum", "Adam", "coupled"],
)
def test_a_timescale_of_decay_that_passes_through_averages_is_told(make, options, what):
    module = Regression()
    with pytest.warns(UserWarning, match=f"counts on decay by lr .* passes through {what}.*method='decoupled'"):
        WeightDecay({"output.*": Timescale(steps=9), "*": 0.1}, **options).attach(make(module.parameters()), module)
    # No warning, which would be an error.
    WeightDecay(0.1, **options).attach(make(module.parameters()), module)
    WeightDecay(Timescale(steps=9), method="decoupled").attach(make(module.parameters()), module)
    WeightDecay(Timescale(steps=9)).attach(SGD(module.parameters(), lr=0.1), module)


def resolved(batch_size):
    """The weight decay of every step of a run over 16 samples, with a rate that grows as the root of the batch size."""
    make = functools.partial(adamw, lr=0.01 * math.sqrt(batch_size))
    data = Batches(16 // batch_size, batch_size)
    return train(Regression(make), WeightDecay(Timescale(epochs=3)), data=data, max_epochs=2).decays()


@pytest.mark.parametrize("batch_size", [2, 8], ids=str)
def test_a_timescale_carries_over_to_another_batch_size_as_in_the_paper(batch_size):
    """B / (lr * lambda * D) stays, for D samples (arXiv 2505.13738): with lr ~ sqrt(B), lambda ~ sqrt(B)."""
    (small,), (large,) = set(resolved(1)), set(resolved(batch_size))
    assert small == pytest.approx(1 / (0.01 * 3 * 16), rel=1e-12, abs=0)
    assert large / small == pytest.approx(math.sqrt(batch_size), rel=1e-12, abs=0)


# Wrong rules

WRONG = {
    "excluded": ({"norm": 0.1, "*": 0.05}, "'norm' never applies: .* excluded from weight decay, by '(bias|norm)'"),
    "order": ({"*": 0.1, "output.*": 0.2}, r"'output\.\*' never applies: .* a rule before it\. Change the order"),
    "0 too late": ({"*": 0.1, "output.*": 0.0}, r"'output\.\*' never applies"),
    "none left": ({"output.*": 0.1}, r"no rule for \['hidden\.weight'\], got \['output\.\*'\]\. Add '\*' for the rest"),
    "misspelled": ({"outptu.*": 0.1, "*": 0.2}, r"'outptu\.\*' matches no parameter; the nearest are 'output"),
    "nothing decays": ({"embedding": 0.1, "*": 0.0}, "no rule with a positive weight decay matches"),
}


@pytest.mark.parametrize(("rules", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_a_rule_that_does_nothing_raises_before_training(rules, message, method):
    module = Regression()
    before = weights(module)
    with pytest.raises(ValueError, match="^WeightDecay: `weight_decay`.*" + message):
        train(module, WeightDecay(rules, method=method))
    assert_identical_weights(weights(module), before)


@pytest.mark.parametrize("rules", [{"norm": 0.0, "*": 0.1}, {"embedding": 0.1, "*": 0.2}], ids=str)
def test_a_rule_that_says_what_holds_or_a_kind_that_is_absent_is_none_to_refuse(rules):
    assert set(train(Regression(), WeightDecay(rules)).decays()) == {rules["*"]}


def test_a_rule_for_what_a_group_gave_0_raises():
    def make(parameters):
        *others, weight, bias = parameters
        return adamw([{"params": others, "weight_decay": 0.1}, {"params": [weight, bias], "weight_decay": 0.0}])

    with pytest.raises(MisconfigurationException, match=r"^WeightDecay: `weight_decay` has no effect for 'output\.\*'"):
        train(Regression(make), WeightDecay(RULES))


CONSTRUCTOR = {
    "empty": ({}, {}, ValueError, "`weight_decay` should have a schedule for at least one rule, got an empty mapping"),
    "value": ({"*": "0.1"}, {}, TypeError, r"`weight_decay\['\*'\]` should be a number, .* got '0.1'"),
    "negative": ({"*": -0.1}, {}, ValueError, r"`weight_decay\['\*'\]` should be a finite number .* got -0.1"),
    "word": ({"heads": 0.1}, {}, ValueError, "`weight_decay` should hold kinds .* got 'heads'"),
    "takes back": ({"*": 0.1, "!norm": 0.2}, {}, ValueError, "`weight_decay`: '!norm' takes nothing back in a mapping"),
    "None": ({"*": None}, {"method": "stable"}, ValueError, "A weight decay of None for a rule keeps the optimizer's"),
    "timescale": ({"*": Timescale(steps=9)}, {"method": "independent"}, ValueError, "A Timescale counts on decay by"),
    "Hydra": ({"_target_": "Cosine"}, {}, TypeError, "`weight_decay` should be a number, .* `_convert_: all`"),
}


@pytest.mark.parametrize(("rules", "options", "error", "message"), CONSTRUCTOR.values(), ids=CONSTRUCTOR)
def test_wrong_rules_raise_in_the_constructor(rules, options, error, message):
    with pytest.raises(error, match="^(WeightDecay: )?" + message):
        WeightDecay(rules, **options)


def test_two_lambdas_have_names_of_their_own():
    callback = WeightDecay({lambda info: info.kind == "weight": 0.1, lambda info: True: 0.2})
    assert callback.rules.names == ["<lambda>", "<lambda> 2"]


def test_the_text_is_the_constructor_call():
    callback = WeightDecay({"head.*": 0.1, "*": FollowLR(0.1)}, exclude=("bias",))
    assert repr(eval(repr(callback))) == repr(callback)
    assert callback.arguments["weight_decay"] == {"head.*": 0.1, "*": FollowLR(0.1)}
