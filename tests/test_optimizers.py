"""Oracles: the same optimizers stepped by hand, timm's choice of what Muon steps, and splits written out by hand."""

import copy
import enum
import functools
import importlib.abc
import importlib.machinery
import io
import pickle
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, lr_scheduler

from lightning_regularize import parameter_infos, select
from lightning_regularize.optimizers import ChainedOptimizer, hidden_matrices

STEPS = 100
BETAS = {"betas": (0.9, 0.99)}


class Net(nn.Module):
    """Words, two hidden layers, and an output layer."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.embed, self.norm = nn.Embedding(9, 4), nn.LayerNorm(6)
            self.first, self.second, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, words):
        x = torch.tanh(self.norm(self.first(self.embed(words))))
        return self.out(torch.tanh(self.second(x)))

    def loss(self, k):
        generator = torch.Generator().manual_seed(k)
        words = torch.randint(9, (8,), generator=generator)
        target = torch.stack([words.sin(), words.cos()], dim=1).to(self.out.weight)
        return (self(words) - target).square().mean()


MATRICES = ("first.weight", "second.weight")


def by_hand(net, first, second):
    """The two optimizers that a chain of ``{hidden_matrices: first, "*": second}`` should be."""
    named = list(net.named_parameters())
    return [
        make([p for name, p in named if (name in MATRICES) is is_matrix])
        for make, is_matrix in ((first, True), (second, False))
    ]


def chain(net, first, second):
    return ChainedOptimizer(net, {hidden_matrices: first, "*": second})


def train(net, optimizers, schedulers=(), *, scaler=None, first=0, last=STEPS, overflows=()):
    for k in range(first, last):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = net.loss(k)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss * (torch.inf if k in overflows else 1.0)).backward()
        for optimizer in optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        for scheduler in schedulers:
            scheduler.step(loss.item()) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


def assert_identical(net, twin):
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


# --------------------------------------------------------------------------------------------------------------------
# One step after the other, as by hand

PAIRS = {
    "Muon and AdamW": (partial(Muon, lr=0.02), partial(AdamW, lr=3e-3, **BETAS)),
    "Muon and SGD": (partial(Muon, lr=0.02), partial(SGD, lr=0.01, momentum=0.9)),
    "Adam and AdamW": (partial(Adam, lr=0.01, foreach=True), partial(AdamW, lr=3e-3, amsgrad=True)),
    "fused": (partial(SGD, lr=0.02, momentum=0.9, fused=True), partial(AdamW, lr=3e-3, fused=True)),
    "rates that are tensors": (
        partial(Adam, lr=torch.tensor(0.02), foreach=False),
        partial(AdamW, lr=torch.tensor(3e-3), foreach=False),
    ),
}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_a_chain_is_bit_equal_to_two_optimizers_stepped_by_hand(first, second):
    net, twin = Net(), Net()
    optimizer, optimizers = chain(net, first, second), by_hand(twin, first, second)
    train(net, [optimizer])
    train(twin, optimizers)
    assert_identical(net, twin)
    assert not torch.equal(net.first.weight, Net().first.weight)


SCHEDULERS = {
    "OneCycleLR": lambda o, lrs: lr_scheduler.OneCycleLR(o, max_lr=lrs, total_steps=STEPS + 1),
    "OneCycleLR without momentum": lambda o, lrs: lr_scheduler.OneCycleLR(
        o, max_lr=lrs, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "CyclicLR": lambda o, lrs: lr_scheduler.CyclicLR(o, base_lr=[lr / 4 for lr in lrs], max_lr=lrs, step_size_up=7),
    "CosineAnnealingLR": lambda o, lrs: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "LambdaLR": lambda o, lrs: lr_scheduler.LambdaLR(o, [lambda k: 0.99**k] * len(lrs)),
    "LinearLR, then StepLR": lambda o, lrs: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=10), lr_scheduler.StepLR(o, 20)], [10]
    ),
    "ReduceLROnPlateau": lambda o, lrs: lr_scheduler.ReduceLROnPlateau(
        o, patience=1, factor=0.5, min_lr=[lr / 100 for lr in lrs]
    ),
}
RATES = (0.02, 0.003)


CASES = [
    *(("Muon and AdamW", name) for name in SCHEDULERS),
    *((pair, name) for pair in ("Muon and SGD", "Adam and AdamW") for name in ("OneCycleLR", "CyclicLR")),
]


@pytest.mark.parametrize(("pair", "name"), CASES)
def test_with_learning_rate_schedulers(pair, name):
    """One scheduler for the chain is what one for each optimizer is, also in what it does to momentum."""
    make = SCHEDULERS[name]
    net, twin = Net(), Net()
    optimizer, optimizers = chain(net, *PAIRS[pair]), by_hand(twin, *PAIRS[pair])
    scheduler = make(optimizer, RATES)
    train(net, [optimizer], [scheduler])
    train(twin, optimizers, [make(each, [lr]) for each, lr in zip(optimizers, RATES, strict=True)])
    assert_identical(net, twin)
    assert [g["lr"] for g in optimizer.param_groups] == [each.param_groups[0]["lr"] for each in optimizers]


@pytest.mark.parametrize("make", [SCHEDULERS["OneCycleLR"], SCHEDULERS["ReduceLROnPlateau"]], ids=["cycle", "plateau"])
def test_a_run_that_is_resumed_is_the_run_that_is_not(make):
    net, twin = Net(), Net()
    optimizers = by_hand(twin, *PAIRS["Muon and AdamW"])
    train(twin, optimizers, [make(each, [lr]) for each, lr in zip(optimizers, RATES, strict=True)])
    optimizer = chain(net, *PAIRS["Muon and AdamW"])
    scheduler = make(optimizer, RATES)
    train(net, [optimizer], [scheduler], last=40)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    resumed = Net()
    optimizer = chain(resumed, *PAIRS["Muon and AdamW"])
    scheduler = make(optimizer, RATES)
    for each, state in zip((resumed, optimizer, scheduler), torch.load(file), strict=True):
        each.load_state_dict(state)
    train(resumed, [optimizer], [scheduler], first=40)
    assert_identical(resumed, twin)


@pytest.mark.parametrize("pair", ["Muon and AdamW", "fused"])
def test_with_a_grad_scaler_that_skips_steps(pair):
    net, twin = Net(), Net()
    optimizer, optimizers = chain(net, *PAIRS[pair]), by_hand(twin, *PAIRS[pair])
    # torch 2.13: a fused SGD whose very first step is skipped, by hand, keeps the scaled gradients as its momentum.
    skipped, scales = (31, 32, 77) if pair == "fused" else (0, 31, 32, 77), []
    for side, made in ((net, [optimizer]), (twin, optimizers)):
        scaler = torch.amp.GradScaler("cpu", growth_interval=10)
        train(side, made, scaler=scaler, overflows=skipped)
        scales.append(scaler.get_scale())
    assert_identical(net, twin)
    assert scales[0] == scales[1]
    counts = {int(state["step"]) for state in optimizer.optimizers[1].state.values()}
    assert counts == {STEPS - len(skipped)}


def test_a_step_is_skipped_for_all_if_the_gradients_of_one_overflow():
    net = Net()
    before, optimizer = copy.deepcopy(net), chain(net, *PAIRS["Muon and AdamW"])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net.loss(0)).backward()
    net.out.bias.grad.fill_(torch.inf)  # AdamW's, while those of Muon are finite
    scaler.step(optimizer)
    assert_identical(net, before)


def test_gradients_that_were_unscaled_and_clipped():
    net, twin = Net(), Net()
    optimizer, optimizers = chain(net, *PAIRS["Muon and AdamW"]), by_hand(twin, *PAIRS["Muon and AdamW"])
    for side, made in ((net, [optimizer]), (twin, optimizers)):
        scaler = torch.amp.GradScaler("cpu")
        for k in range(5):
            scaler.scale(side.loss(k)).backward()
            for each in made:
                scaler.unscale_(each)
            nn.utils.clip_grad_norm_(side.parameters(), 0.1)
            for each in made:
                scaler.step(each)
            scaler.update()
            side.zero_grad()
    assert_identical(net, twin)


def test_the_closure_is_evaluated_once_and_before_all():
    net, seen = Net(), []
    optimizer = chain(net, *PAIRS["Muon and AdamW"])

    def closure():
        seen.append(copy.deepcopy(net))
        optimizer.zero_grad()
        loss = net.loss(0)
        loss.backward()
        return loss

    before = copy.deepcopy(net)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(seen) == 1
    assert_identical(seen[0], before)
    assert loss.item() == before.loss(0).item()
    assert not torch.equal(net.first.weight, before.first.weight)
    assert not torch.equal(net.out.weight, before.out.weight)


@pytest.mark.parametrize("inner", [False, True], ids=["the chain", "an inner optimizer"])
def test_hooks_are_called_once_a_step(inner):
    net, calls = Net(), []
    optimizer = chain(net, *PAIRS["Muon and AdamW"])
    hooked = optimizer.optimizers[1] if inner else optimizer
    hooked.register_step_pre_hook(lambda *_: calls.append("pre"))
    hooked.register_step_post_hook(lambda *_: calls.append("post"))
    train(net, [optimizer], last=2)
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_reset(set_to_none):
    net = Net()
    optimizer = chain(net, *PAIRS["Muon and AdamW"])
    net.loss(0).backward()
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in net.parameters())


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step():
    net, twin = Net(), Net()
    pair = [partial(SGD, lr=0.02, momentum=0.9), partial(AdamW, lr=3e-3)]
    optimizer, optimizers = chain(net, *pair), by_hand(twin, *pair)
    step = torch.compile(optimizer.step, backend="eager")
    for k in range(5):
        optimizer.zero_grad()
        net.loss(k).backward()
        step()
    train(twin, optimizers, last=5)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# What others see


def test_groups_are_the_dictionaries_of_the_inner_optimizers():
    optimizer = chain(Net(), *PAIRS["Muon and AdamW"])

    def inner():
        return [id(group) for each in optimizer.optimizers for group in each.param_groups]

    assert list(map(id, optimizer.param_groups)) == inner()
    optimizer.load_state_dict(optimizer.state_dict())
    assert list(map(id, optimizer.param_groups)) == inner()
    optimizer.optimizers[0].load_state_dict(optimizer.optimizers[0].state_dict())
    optimizer.step()
    assert list(map(id, optimizer.param_groups)) == inner()
    assert "betas" not in optimizer.param_groups[0]
    assert "momentum" not in optimizer.param_groups[1]


def test_the_state_is_that_of_the_inner_optimizers():
    net = Net()
    optimizer = chain(net, *PAIRS["Muon and AdamW"])
    assert not optimizer.state
    train(net, [optimizer], last=1)
    muon, adamw = optimizer.optimizers
    assert len(optimizer.state) == len(list(net.parameters()))
    assert optimizer.state[net.first.weight] is muon.state[net.first.weight]
    for parameter, state in optimizer.state.items():  # as Lightning does to move it to a device
        optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
    assert optimizer.state[net.out.bias] is adamw.state[net.out.bias]
    del optimizer.state[net.out.bias]
    assert net.out.bias not in adamw.state
    assert optimizer.state[net.out.bias] == {}  # as in torch
    with pytest.raises(KeyError):
        optimizer.state[nn.Parameter(torch.ones(1))]


def test_the_state_dict_has_the_layout_of_torch():
    net = Net()
    optimizer = chain(net, *PAIRS["Muon and AdamW"])
    train(net, [optimizer], last=3)
    found = optimizer.state_dict()
    assert [group["params"] for group in found["param_groups"]] == [[0, 1], [2, 3, 4, 5, 6, 7, 8]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(found["state"]) == list(range(9))
    for number, state in found["state"].items():
        assert state is optimizer.state[parameters[number]]


class Counting(SGD):
    """Keeps something under a key that is no parameter, and looks at its state dict."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.state["calls"] = 0

    def step(self, closure=None):
        self.state["calls"] += 1
        return super().step(closure)

    def load_state_dict(self, state_dict):
        self.loaded = state_dict
        super().load_state_dict(state_dict)


def test_states_that_belong_to_no_parameter_and_overridden_methods():
    net = Net()
    optimizer = chain(net, partial(Counting, lr=0.1), partial(Counting, lr=0.2))
    train(net, [optimizer], last=3)
    saved = optimizer.state_dict()
    optimizer.optimizers[0].state["calls"] = 7
    saved = copy.deepcopy(optimizer.state_dict())
    other = chain(Net(), partial(Counting, lr=0.1), partial(Counting, lr=0.2))
    other.load_state_dict(saved)
    assert [each.state["calls"] for each in other.optimizers] == [7, 3]
    assert all(each.loaded["param_groups"] for each in other.optimizers)


def test_hooks_of_the_state_dict():
    net = Net()
    optimizer = chain(net, *PAIRS["Muon and AdamW"])
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    saved, seen = optimizer.state_dict(), []
    assert saved["extra"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(saved)
    assert seen == [1, "loaded"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_copies_go_on_as_the_original(copied):
    net = Net()
    optimizer = chain(net, *PAIRS["Muon and AdamW"])
    train(net, [optimizer], last=3)
    other_net, other = copied((net, optimizer))
    train(net, [optimizer], first=3, last=6)
    train(other_net, [other], first=3, last=6)
    assert_identical(net, other_net)
    assert [*map(id, other.param_groups)] == [id(g) for each in other.optimizers for g in each.param_groups]
    with pytest.raises(RuntimeError, match="`add_param_group` of one of its `optimizers`"):
        other.add_param_group({"params": []})


def test_a_lambda_as_a_rule_does_not_hinder_pickling():
    net = Net()
    optimizer = ChainedOptimizer(net, {lambda info: "first" in info.name: SGD, "*": lambda params: AdamW(params)})
    other = pickle.loads(pickle.dumps(optimizer))
    assert [len(group["params"]) for group in other.param_groups] == [2, 7]


def test_the_text_names_rules_and_optimizers():
    text = repr(chain(Net(), *PAIRS["Muon and AdamW"]))
    assert text.index("hidden_matrices: Muon") < text.index("*: AdamW")


# --------------------------------------------------------------------------------------------------------------------
# Which parameters


def names_of(net, optimizer):
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names[id(p)] for group in each.param_groups for p in group["params"]] for each in optimizer.optimizers]


def test_the_first_rule_decides():
    net = Net()
    rules = {"first.*": SGD, "embedding": partial(SGD, lr=0.5), hidden_matrices: Muon, nn.LayerNorm: Adam, "*": AdamW}
    assert names_of(net, ChainedOptimizer(net, rules)) == [
        ["first.weight", "first.bias"],
        ["embed.weight"],
        ["second.weight"],
        ["norm.weight", "norm.bias"],
        ["second.bias", "out.weight", "out.bias"],
    ]


def test_kinds_that_the_module_does_not_have_and_a_rest_of_nothing_are_skipped():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer = ChainedOptimizer(net, {"embedding": SGD, "weight": Muon, "*": AdamW})
    assert [type(each) for each in optimizer.optimizers] == [Muon]


def test_frozen_parameters_come_in_when_they_are_added():
    """As Lightning's BackboneFinetuning adds them."""
    net = Net()
    net.embed.requires_grad_(False)
    net.first.requires_grad_(False)
    optimizer = ChainedOptimizer(net, {"embedding": SGD, hidden_matrices: partial(Muon, lr=0.02), "*": AdamW})
    assert names_of(net, optimizer) == [
        ["second.weight"],
        ["norm.weight", "norm.bias", "second.bias", "out.weight", "out.bias"],
    ]
    for layer in (net.first, net.embed):
        layer.requires_grad_(True)
    optimizer.add_param_group({"params": [*net.first.parameters(), ("embed", net.embed.weight)], "lr": 0.5})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 5, 1, 1, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 1e-3, 0.5, 0.5, 0.5]
    assert [type(each) for each in optimizer.optimizers] == [Muon, AdamW, SGD]
    before = copy.deepcopy(net)
    train(net, [optimizer], last=1)
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"of shapes \[\(2,\)\] are not of its module"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
    other = chain(net, *PAIRS["Muon and AdamW"])
    with pytest.raises(ValueError, match=r"groups of \[1, 5, 1, 1, 1\] parameters"):
        other.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, [optimizer], first=1, last=2)


def test_a_group_that_was_added_to_an_inner_optimizer_is_seen():
    net = Net()
    optimizer = ChainedOptimizer(net, {hidden_matrices: partial(Muon, lr=0.02), "*": AdamW})
    extra = nn.Parameter(torch.ones(2))
    optimizer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.eye(3))]})
    optimizer.optimizers[1].add_param_group({"params": [extra]})
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 7, 1, 1]
    assert optimizer.state_dict()["param_groups"][-1]["params"] == [10]


CHANGES = {
    "replaced": lambda optimizer: setattr(optimizer, "param_groups", optimizer.param_groups[:1]),  # as by DeepSpeed
    "appended": lambda optimizer: optimizer.param_groups.append({"params": [], "lr": 0.1}),
    "removed": lambda optimizer: optimizer.param_groups.pop(),
    "another dictionary": lambda optimizer: optimizer.param_groups.__setitem__(0, dict(optimizer.param_groups[0])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_list_of_groups_that_was_changed_is_refused_before_any_weight_changes(change):
    net = Net()
    before, optimizer = copy.deepcopy(net), chain(net, *PAIRS["Muon and AdamW"])
    net.loss(0).backward()
    change(optimizer)
    with pytest.raises(RuntimeError, match=r"use `add_param_group`.*DeepSpeed"):
        optimizer.step()
    assert_identical(net, before)


def test_a_state_that_was_replaced_is_refused_and_one_that_was_emptied_begins_anew():
    net, twin = Net(), Net()
    optimizer, fresh = chain(net, *PAIRS["Muon and AdamW"]), chain(twin, *PAIRS["Muon and AdamW"])
    net.loss(0).backward()
    optimizer.step()
    twin.load_state_dict(net.state_dict())
    optimizer.state.clear()
    for each, its_optimizer in ((net, optimizer), (twin, fresh)):
        each.zero_grad()
        each.loss(1).backward()
        its_optimizer.step()
    assert_identical(net, twin)
    optimizer.state = {}
    with pytest.raises(RuntimeError, match=r"`state` was replaced.*`state\.clear\(\)`"):
        optimizer.step()
    assert_identical(net, twin)


WRONG = {
    "no module": (lambda net: (net.parameters(), {"*": SGD}), TypeError, "should be a torch.nn.Module, got generator"),
    "no mapping": (lambda net: (net, [SGD]), TypeError, r"`optimizers` should map rules to what makes an optimizer"),
    "nothing": (lambda net: (net, {}), ValueError, "`optimizers` is empty"),
    "an optimizer": (
        lambda net: (net, {"*": SGD(net.parameters())}),
        TypeError,
        r"the value of '\*' .* got SGD. For example functools.partial\(torch.optim.SGD",
    ),
    "what makes none": (lambda net: (net, {"*": lambda params: None}), TypeError, r"'\*' should make .* it made None"),
    "a word": (lambda net: (net, {"biases": SGD, "*": SGD}), ValueError, "Did you mean 'bias'"),
    "nearly hidden_matrices": (
        lambda net: (net, {"hidden_matrix": SGD, "*": SGD}),
        ValueError,
        "Did you mean 'hidden_m",
    ),
    "a glob without a match": (lambda net: (net, {"a.*": SGD, "*": SGD}), ValueError, r"'a\.\*' matches no parameter"),
    "a rule without effect": (
        lambda net: (net, {"*": SGD, "bias": AdamW}),
        ValueError,
        "the optimizer of 'bias' gets nothing: rules before it",
    ),
    "no rule": (
        lambda net: (net, {hidden_matrices: SGD, "bias": SGD}),
        ValueError,
        r"no rule matches 'embed.weight' of shape \(9, 4\).*Add '\*' as the last rule",
    ),
    "other parameters": (
        lambda net: (net, {hidden_matrices: lambda _: SGD(net.parameters()), "*": AdamW}),
        ValueError,
        "'hidden_matrices' should hold the 2 parameters that it is given",
    ),
    "L-BFGS": (lambda net: (net, {"*": torch.optim.LBFGS}), TypeError, "LBFGS.* evaluates the closure by itself"),
    "a number": (
        lambda net: (net, {"*": partial(SGD, lr=-1.0)}),
        ValueError,
        r"the optimizer of '\*' cannot be made: Invalid learning rate",
    ),
    "an argument": (lambda net: (net, {"*": partial(SGD, rate=1.0)}), TypeError, r"cannot be made: .* 'rate'"),
    "nothing to train": (lambda net: (net.requires_grad_(False), {"*": SGD}), ValueError, "no trainable parameters"),
    "a lazy layer": (lambda net: (nn.LazyLinear(3), {"*": SGD}), ValueError, "have no shape yet.*run a batch"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ChainedOptimizer(*arguments(Net()))


def test_what_muon_refuses_is_named_with_its_rule_and_the_way_out():
    net = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(2, 4, 3), nn.ConvTranspose2d(4, 3, 2), nn.Linear(3, 2))
    message = (
        r"'hidden_matrices' does not take '1.weight' of shape \(4, 2, 3\), '2.weight' of shape \(4, 3, 2, 2\): Muon "
        r"only supports 2D .* such as 'type:Conv1d', 'type:ConvTranspose2d'\."
    )
    with pytest.raises(ValueError, match=message):
        ChainedOptimizer(net, {hidden_matrices: Muon, "*": AdamW})
    convolutions = {"type:Conv1d": AdamW, "type:ConvTranspose2d": AdamW}
    optimizer = ChainedOptimizer(net, {**convolutions, hidden_matrices: Muon, "*": AdamW})
    assert names_of(net, optimizer)[2] == ["0.weight"]
    with pytest.raises(ValueError, match=r"before it, such as 'bias', 'norm'\."):
        ChainedOptimizer(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), {"*": Muon})


# --------------------------------------------------------------------------------------------------------------------
# Hidden matrices


def hidden(module):
    return [info.name for info in parameter_infos(module) if hidden_matrices(info)]


def linear(out_features=3, in_features=3):
    return nn.Linear(in_features, out_features, bias=False)


class Tied(nn.Module):
    """As GPT: the output layer is the embedding, and the last weight with a name of its own is hidden."""

    def __init__(self):
        super().__init__()
        self.wte, self.proj, self.lm_head = nn.Embedding(7, 3), linear(), linear(7)
        self.lm_head.weight = self.wte.weight


class Several(nn.Module):
    """Output layers by name, of which none is the last."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, linear())
        self.body = linear()


class MLPHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy_head = nn.Sequential(linear(), nn.Tanh(), linear())
        self.value_head, self.heads = nn.Sequential(linear(), nn.Tanh(), linear()), nn.ModuleList([linear()])
        self.head, self.body = linear(), linear()


class Timm(nn.Module):
    def __init__(self, classifier, *names):
        super().__init__()
        self.pretrained_cfg = {"classifier": classifier}
        for name in names:
            self.add_module(name, linear())


def of_older_timm(config):
    """It had its configuration under another name, and not always as a dictionary."""
    model = Timm("fc", "fc", "last")
    model.default_cfg = config(**vars(model).pop("pretrained_cfg"))
    return model


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 9, 4))
        self.table, self.scale = nn.Parameter(torch.ones(9, 4)), nn.Parameter(torch.ones(4))
        self.depthwise, self.conv = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)
        self.gru, self.mean = nn.GRU(4, 4, bias=False), linear(1, 4)

    def no_weight_decay(self):
        return {"table"}


HIDDEN = {
    "the last one is the output": (lambda: nn.Sequential(linear(), nn.ReLU(), linear()), ["0.weight"]),
    "one layer": (lambda: nn.Sequential(nn.Embedding(3, 3), linear()), []),
    "one output": (lambda: nn.Sequential(linear(), linear(1)), ["0.weight"]),
    "a head of convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), ["0.weight"]),
    "tied": (Tied, ["proj.weight"]),
    "named": (lambda: Several("head", "value_head", "fc", "heads"), ["fc.weight", "heads.weight", "body.weight"]),
    "several layers in each of two heads": (
        MLPHeads,
        ["policy_head.0.weight", "value_head.0.weight", "heads.0.weight", "body.weight"],
    ),
    "of attention": (
        lambda: Several("q_head", "k_head", "v_head", "seq_head"),
        ["q_head.weight", "k_head.weight", "v_head.weight", "body.weight"],
    ),
    "of a router": (
        lambda: nn.ModuleDict({"router": Several("classifier"), "shared_router": Several("head"), "lm_head": linear()}),
        ["router.classifier.weight", "router.body.weight", "shared_router.head.weight", "shared_router.body.weight"],
    ),
    "tokens and tables": (Tokens, ["conv.weight", "gru.weight_ih_l0", "gru.weight_hh_l0"]),
    "of timm": (lambda: Timm("fc", "fc", "last"), ["last.weight"]),
    "of timm, two": (lambda: Timm(("a", "b"), "a", "b", "last"), ["last.weight"]),
    "of an older timm": (lambda: of_older_timm(dict), ["last.weight"]),
    "of an older timm, with an object": (lambda: of_older_timm(types.SimpleNamespace), ["last.weight"]),
    "of timm, none": (lambda: Timm("fc", "last"), ["last.weight"]),
    "of timm, with layers behind it": (
        lambda: nn.Sequential(Timm("fc", "last"), linear(), linear()),
        ["0.last.weight", "1.weight"],
    ),
    "of timm, with a classifier and layers behind it": (
        lambda: nn.Sequential(Timm("fc", "fc", "last"), linear(), linear()),
        ["0.last.weight", "1.weight"],
    ),
}


@pytest.mark.parametrize(("make", "expected"), HIDDEN.values(), ids=HIDDEN)
def test_hidden_matrices(make, expected):
    assert hidden(make()) == expected


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_hidden_matrices_are_the_same_under_wrappers():
    net = nn.Sequential(linear(), linear())
    assert hidden(torch.compile(net)) == hidden(net) == ["0.weight"]


def test_hidden_matrices_are_a_rule_by_their_name_too():
    net = Net()
    assert [info.name for info in select(net, include=("hidden_matrices",))] == list(MATRICES)
    assert [info.name for info in select(net, include=(hidden_matrices,), exclude=("first.*",))] == ["second.weight"]
    optimizer = ChainedOptimizer(net, {"hidden_matrices": Muon, "*": AdamW})
    assert names_of(net, optimizer)[0] == list(MATRICES)
    for rule in (hidden_matrices, "hidden_matrices"):
        with pytest.raises(ValueError, match="'hidden_matrices' matches no parameter; the module has none beside"):
            select(nn.Linear(2, 2), include=(rule,))


def test_hidden_matrices_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6)
    expected = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert hidden(transformers.GPT2LMHeadModel(config)) == expected
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    assert not any("classifier" in name or "embeddings" in name for name in hidden(model))
    assert sum("encoder" in name for name in hidden(model)) == 6
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    assert len(hidden(llama)) == 7


# --------------------------------------------------------------------------------------------------------------------
# What timm chooses

TIMM = [
    "beit_base_patch16_224", "convmixer_1536_20", "convnext_atto", "cpubone_s0", "cspnext_s", "cspresnet50",
    "davit_tiny", "deit_tiny_distilled_patch16_224", "dpn48b", "efficientformerv2_s0", "efficientnet_b0",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_slim", "gernet_s", "ghostnet_050",
    "hardcorenas_a", "hgnet_tiny", "hieradet_small", "lcnet_035", "lcnetv2_small", "lowformer_b0", "mixer_s16_224",
    "mobilevit_s", "pit_s_224", "repghostnet_050", "resnet18", "resnetv2_18", "rexnet_100", "selecsls60",
    "shvit_s1", "skresnet18", "swin_tiny_patch4_window7_224", "vgg11", "visformer_tiny", "xception41",
]  # fmt: skip

DIFFERENT = {
    # timm leaves matrices with a side below 4 to AdamW. A rule of ours does not look at sizes.
    "convit_tiny": {f"blocks.{i}.attn.pos_proj.weight" for i in range(10)},
    "fastvit_t8": {"stem.0.conv_scale.conv.weight"},
    "swinv2_cr_tiny_224": {
        *(f"stages.2.blocks.{i}.attn.meta_mlp.fc1.weight" for i in range(6)),
        *(f"stages.{i}.blocks.{j}.attn.meta_mlp.fc1.weight" for i in (0, 1, 3) for j in (0, 1)),
        *(f"stages.0.blocks.{i}.attn.meta_mlp.fc2.weight" for i in (0, 1)),
    },
    "vit_relpos_small_patch16_224": {f"blocks.{i}.attn.rel_pos.mlp.fc1.weight" for i in range(12)},
    # The configuration of the model names the last layer of its head as the classifier, and `get_classifier` all.
    "caformer_s18": {"head.fc.fc1.weight"},
}


class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that stand for torchvision's, of which timm uses nothing here."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        modes = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        module.__getattr__ = functools.partial(self.attribute, modes)

    @staticmethod
    def attribute(modes, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return modes if name == "InterpolationMode" else type(name, (nn.Module,), {})


@pytest.fixture(scope="module")
def timm():
    """timm, which imports torchvision; what stands for that is gone afterwards."""
    pytest.importorskip("timm", exc_type=ImportError) if importlib.util.find_spec("torchvision") else None
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    stand, before = Stand(), set(sys.modules)
    sys.meta_path.append(stand)
    try:
        yield importlib.import_module("timm")
    finally:
        sys.meta_path.remove(stand)
        for name in {name for name in set(sys.modules) - before if name.split(".")[0] in ("timm", "torchvision")}:
            del sys.modules[name]


def choice_of_timm(timm, model):
    """What timm's Muon orthogonalizes, where the classifier and what does not decay are left to its fallback."""
    optim = importlib.import_module("timm.optim._param_groups")
    muon = importlib.import_module("timm.optim.muon")
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    outputs = {id(p) for classifier in classifiers for p in classifier.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) in outputs]
    no_decay = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = optim.param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=no_decay, fallback_list=names, fallback_no_weight_decay=True
    )
    rest = {id(p) for group in groups if group.get("use_fallback") for p in group["params"]}
    return {n for n, p in model.named_parameters() if id(p) not in rest and muon._is_suitable_for_muon(p)}


@pytest.mark.parametrize("name", [*TIMM, *DIFFERENT])
@pytest.mark.filterwarnings("ignore")
def test_hidden_matrices_are_what_timm_gives_to_muon(timm, name):
    with torch.device("meta"):
        model = timm.create_model(name)
    expected = choice_of_timm(timm, model)
    assert len(expected) > 5
    assert set(hidden(model)) ^ expected == DIFFERENT.get(name, set())


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
@pytest.mark.filterwarnings("ignore")
def test_models_of_timm_inside_another_module_and_without_a_classifier(timm, name):
    with torch.device("meta"):
        model, headless = timm.create_model(name), timm.create_model(name, num_classes=0)
    expected = [name.removeprefix("0.") for name in hidden(nn.Sequential(model, linear(), linear()))]
    assert expected == [*hidden(model), "1.weight"]
    assert hidden(headless) == hidden(model)
