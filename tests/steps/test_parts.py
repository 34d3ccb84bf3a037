"""Does an optimizer that sees its groups in parts make the steps that it makes with hand-made groups?"""

import copy
import functools
import itertools
import operator
import pickle
import re
import types

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn, optim
from torch.optim import Optimizer

from lightning_regularize import WeightDecay
from lightning_regularize._steps.hooks import hooks_of
from lightning_regularize._steps.parts import Parts, user_groups
from tests.steps.optimizers import (
    DECAYS,
    EXCLUDED,
    STEPS,
    AdaBound,
    AdaBoundByZip,
    Layout,
    Matrices,
    Net,
    Plain,
    adamw,
    assert_identical,
    decay,
    ordered,
    plain_step,
    split,
    step_by_keyword,
    step_by_position,
    train,
    weights,
)

OPTIMIZERS = {
    "SGD": functools.partial(optim.SGD, lr=0.1, momentum=0.9),
    "SGD Nesterov foreach": functools.partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": functools.partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Adam": functools.partial(optim.Adam, lr=0.1),
    "Adam foreach": functools.partial(optim.Adam, lr=0.1, foreach=True),
    "Adam fused": functools.partial(optim.Adam, lr=0.1, fused=True),
    "AdamW": adamw,
    "AdamW foreach": functools.partial(adamw, foreach=True),
    "AdamW fused": functools.partial(adamw, fused=True),
    "AdamW amsgrad": functools.partial(adamw, amsgrad=True),
    "AdamW fused amsgrad": functools.partial(adamw, fused=True, amsgrad=True),
    "AdamW maximize": functools.partial(adamw, maximize=True),
    "NAdam": functools.partial(optim.NAdam, lr=0.1),
    "NAdam decoupled": functools.partial(optim.NAdam, lr=0.1, decoupled_weight_decay=True),
    "RAdam": functools.partial(optim.RAdam, lr=0.1),
    "RMSprop": functools.partial(optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.1),
    "Adagrad fused": functools.partial(optim.Adagrad, lr=0.1, fused=True),
    "Adadelta": optim.Adadelta,
    "Adamax": functools.partial(optim.Adamax, lr=0.1),
    "ASGD": functools.partial(optim.ASGD, lr=0.1, t0=2),
    "Adafactor": functools.partial(optim.Adafactor, lr=0.1),
}


# --------------------------------------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equal_to_hand_made_groups_bit_for_bit(make, dtype):
    net, twin = Net(dtype), Net(dtype)
    optimizer, hand_made = make(net.parameters(), weight_decay=0.1), make(split(twin))
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):  # moments and counters as well
        assert_identical(dict(optimizer.state[p]), dict(hand_made.state[q]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_muon_equals_hand_made_groups_bit_for_bit(dtype):
    net, twin = Matrices(dtype), Matrices(dtype)
    optimizer, hand_made = optim.Muon(net.parameters()), optim.Muon(split(twin, ("output.weight",)))
    decay(exclude=("output.*",)).attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))


LAYERS = {
    "one group": [(0.3, ("hidden", "norm", "output"))],
    "a ratio": [(0.4, ("hidden", "norm")), (0.2, ("output",))],
    "none in one": [(0.4, ("hidden",)), (0.0, ("norm", "output"))],
    "a group that is excluded as a whole": [(0.4, ("hidden",)), (0.1, ("norm",)), (0.4, ("output",))],
}


def layers(net, given):
    return [
        {"params": [p for name in names for p in getattr(net, name).parameters()], "weight_decay": value}
        for value, names in given
    ]


def divided(net, given, factors):
    """Hand-made: for each of the user's groups what decays, by falling factor, and what does not."""
    names = {id(p): name for name, p in net.named_parameters()}
    largest = max(value for value, _ in given)
    groups, products = [], []
    for group in layers(net, given):
        of = {p: 0.0 if names[id(p)] in EXCLUDED else factors.get(names[id(p)], 1.0) for p in group["params"]}
        for factor in sorted(set(of.values()), reverse=True):
            groups.append({"params": [p for p in group["params"] if of[p] == factor]})
            products.append(factor * group["weight_decay"] / largest)
    return groups, products


@pytest.mark.parametrize(
    "factors", [{}, {"output.weight": 0.25}, {"hidden.weight": 2.0, "output.weight": 0.0}], ids=str
)
@pytest.mark.parametrize("given", LAYERS.values(), ids=LAYERS)
def test_ratios_and_factors_equal_hand_made_groups(given, factors):
    net, twin = Net(), Net()
    optimizer = adamw(layers(net, given))
    decay(factors=factors).attach(optimizer, net)
    groups, products = divided(twin, given, factors)
    assert_identical(train(net, optimizer), train(twin, adamw(groups), factors=products))


@pytest.mark.parametrize("given", LAYERS.values(), ids=LAYERS)
def test_without_a_value_the_groups_keep_their_own(given):
    net, twin = Net(), Net()
    optimizer = adamw(layers(net, given))
    WeightDecay(None).attach(optimizer, net)
    groups, products = divided(twin, given, {})
    largest = max(value for value, _ in given)
    hand_made = adamw([{**g, "weight_decay": p * largest} for g, p in zip(groups, products, strict=True)])
    assert_identical(train(net, optimizer), train(twin, hand_made))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [value for value, _ in given]


# --------------------------------------------------------------------------------------------------------------------
# Values of groups


class Counting(Plain):
    """Counts its steps in the group, and steps the further the later."""

    def update(self, group, i):
        group["count"] = group.get("count", 0) + 1
        for p in group["params"]:
            p.sub_(group["lr"] * group["count"] * (p.grad + group["weight_decay"] * p))


class CountingInATensor(Plain):
    """Likewise, by a tensor that is made once and changed in place, as under CUDA graphs."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["count"] = torch.zeros((), dtype=torch.float64)

    def update(self, group, i):
        group["count"] += 1
        for p in group["params"]:
            p.sub_(group["lr"] * group["count"] * (p.grad + group["weight_decay"] * p))


class CountingInANewTensor(CountingInATensor):
    """Likewise, by a new tensor at each step."""

    def update(self, group, i):
        group["count"] = group["count"] + 0.0
        super().update(group, i)


class CountingInADict(Plain):
    """Likewise, in a dictionary of the group that is changed in place."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["numbers"] = {"count": 0}

    def update(self, group, i):
        group["numbers"]["count"] += 1
        for p in group["params"]:
            p.sub_(group["lr"] * group["numbers"]["count"] * (p.grad + group["weight_decay"] * p))


class CountingInAList(Plain):
    """Likewise, in a list of the group that grows."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["history"] = []

    def update(self, group, i):
        group["history"].append(group["lr"])
        for p in group["params"]:
            p.sub_(sum(group["history"]) * (p.grad + group["weight_decay"] * p))


COUNTING = [Counting, CountingInATensor, CountingInANewTensor, CountingInADict, CountingInAList]


@pytest.mark.parametrize("cls", COUNTING)
def test_what_an_optimizer_writes_to_its_groups_stands_in_the_users_group(cls):
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters()), cls(split(twin))
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))
    (group,), (expected, _) = optimizer.param_groups, hand_made.param_groups
    for key in expected.keys() - {"params", "weight_decay"}:
        assert group[key] == expected[key]


@pytest.mark.parametrize("value", [None, False, 0, (), "text", torch.ones(2)], ids=str)
def test_a_key_that_an_optimizer_adds_stands_in_the_users_group(value):
    class Adding(Plain):
        def update(self, group, i):
            group.setdefault("added", value)
            super().update(group, i)

    net, twin = Net(), Net()
    optimizer, hand_made = Adding(net.parameters()), Adding(split(twin))
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))
    assert list(optimizer.param_groups[0])[-1] == "added"
    assert repr(optimizer.param_groups[0]["added"]) == repr(value)


@pytest.mark.parametrize("cls", COUNTING)
def test_what_the_user_writes_reaches_all_parts(cls):
    """Also of what the optimizer counts in its groups: the count begins anew in the middle."""
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters()), cls(split(twin))
    decay().attach(optimizer, net)
    for side, made, factors in ((net, optimizer, ()), (twin, hand_made, (1.0, 0.0))):
        train(side, made, factors, last=3)
        for group in made.param_groups:
            group["lr"] = 0.01
            if isinstance(group.get("count"), torch.Tensor):
                group["count"].zero_()
            elif "count" in group:
                group["count"] = 0
            elif "numbers" in group:
                group["numbers"] = {"count": 0}
            else:
                group["history"] = []
        train(side, made, factors, first=3)
    assert_identical(weights(net), weights(twin))


class Statistic(Plain):
    """The size of a step follows a running mean over all parameters of the group: parts of a group differ in it."""

    def update(self, group, i):
        squares = [p.grad.square().sum() for p in group["params"]]
        group["mean"] = 0.5 * group.get("mean", 1.0) + 0.5 * float(sum(squares))
        for p in group["params"]:
            p.sub_(group["lr"] / (1 + group["mean"]) * (p.grad + group["weight_decay"] * p))


class StatisticInATensor(Plain):
    """Likewise, in a tensor that is changed in place."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["mean"] = torch.ones((), dtype=torch.float64)

    def update(self, group, i):
        group["mean"].lerp_(sum(p.grad.square().sum() for p in group["params"]), 0.5)
        for p in group["params"]:
            p.sub_(group["lr"] / (1 + group["mean"]) * (p.grad + group["weight_decay"] * p))


class StatisticInAList(Plain):
    """Likewise, in a list of numbers that is changed in place."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["means"] = [1.0]

    def update(self, group, i):
        squares = [p.grad.square().sum() for p in group["params"]]
        group["means"].append(0.5 * group["means"][-1] + 0.5 * float(sum(squares)))
        for p in group["params"]:
            p.sub_(group["lr"] / (1 + group["means"][-1]) * (p.grad + group["weight_decay"] * p))


STATISTICS = [Statistic, StatisticInATensor, StatisticInAList]


@pytest.mark.parametrize("cls", STATISTICS)
def test_parts_keep_what_they_differ_in(cls):
    """As hand-made groups would; the user's group shows what the first part has."""
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters()), cls(split(twin))
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))
    (group,), (first, second) = optimizer.param_groups, hand_made.param_groups
    key = "means" if "means" in group else "mean"
    assert group[key] == first[key]
    assert first[key] != second[key]


@pytest.mark.parametrize("cls", STATISTICS)
def test_what_parts_differ_in_survives_saving_and_loading(cls):
    net, twin = Net(), Net()
    hand_made = train(twin, cls(split(twin)), factors=(1.0, 0.0))
    callback, optimizer = decay(), cls(net.parameters())
    callback.attach(optimizer, net)
    train(net, optimizer, last=3)
    saved = pickle.loads(pickle.dumps([callback.state_dict(), optimizer.state_dict(), net.state_dict()]))
    resumed, callback = Net(), decay()
    optimizer = cls(resumed.parameters())
    callback.load_state_dict(saved[0])
    callback.attach(optimizer, resumed)
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert_identical(train(resumed, optimizer, first=3), hand_made)


def test_parts_that_do_not_differ_leave_nothing_in_the_state():
    for cls in (Plain, Counting, CountingInATensor, CountingInADict, optim.AdamW):
        net, callback = Net(), decay()
        optimizer = cls(net.parameters(), lr=0.1)
        callback.attach(optimizer, net)
        train(net, optimizer)
        assert "parts" not in callback.state_dict(), cls


OF_NUMPY = {
    "array": np.array([1.0, 2.0]),
    "number": np.float32(1.0),
    "in a tuple": (np.zeros(2), "a"),
    "in a list": [np.zeros(2)],
    "in a dictionary": {"of": np.zeros(2)},
}


@pytest.mark.parametrize("value", OF_NUMPY.values(), ids=OF_NUMPY)
def test_values_of_numpy_do_not_differ_either(value):
    net = Net()
    optimizer = optim.SGD([{"params": list(net.parameters()), "value": value}], lr=0.1)
    callback = decay()
    callback.attach(optimizer, net)
    train(net, optimizer)
    assert "parts" not in callback.state_dict()


@pytest.mark.parametrize("cls", STATISTICS)
def test_what_parts_differ_in_is_missed_with_one_warning_where_it_was_not_saved(cls, recwarn):
    net = Net()
    callback, optimizer = decay(), cls(net.parameters())
    callback.attach(optimizer, net)
    train(net, optimizer, last=3)
    state = {key: value for key, value in callback.state_dict().items() if key != "parts"}
    resumed, callback, saved = Net(), decay(), optimizer.state_dict()
    optimizer = cls(resumed.parameters())
    optimizer.load_state_dict(saved)
    callback.load_state_dict(state)
    callback.attach(optimizer, resumed)
    train(resumed, optimizer, first=3)
    assert len([w for w in recwarn if re.search("differ", str(w.message))]) == 1


@pytest.mark.parametrize("factory", [optim.AdamW, optim.SGD, optim.Adam])
@pytest.mark.parametrize("key", ["lr", "weight_decay", "both"])
def test_tensors_in_groups_keep_their_identity(factory, key):
    """Captured graphs and compiled steps hold them; torch takes a tensor rate with ``foreach=False``."""
    net, twin = Net(), Net()
    options = {name: torch.tensor(0.1, dtype=torch.float64) for name in ("lr", "weight_decay") if key in (name, "both")}
    options = {"lr": 0.1, "weight_decay": 0.1, "foreach": False, **options}
    optimizer = factory(net.parameters(), **options)
    hand_made = factory(
        [{**group, "weight_decay": copy.copy(options["weight_decay"])} for group in split(twin)], **options
    )
    for group in hand_made.param_groups:
        group.update({name: v.clone() for name, v in group.items() if isinstance(v, torch.Tensor)})
    before = {name: value for name, value in optimizer.param_groups[0].items() if isinstance(value, torch.Tensor)}
    assert set(before) == {name for name in options if isinstance(options[name], torch.Tensor)}
    attachment = decay().attach(optimizer, net)
    schedules = [optim.lr_scheduler.StepLR(made, 1, gamma=0.5) for made in (optimizer, hand_made)]
    assert_identical(
        train(net, optimizer, scheduler=schedules[0]),
        train(twin, hand_made, factors=(1.0, 0.0), scheduler=schedules[1]),
    )
    attachment.remove()
    for name, value in before.items():
        assert optimizer.param_groups[0][name] is value
    assert float(optimizer.param_groups[0]["lr"]) == 0.1 * 0.5**STEPS
    assert float(optimizer.param_groups[0]["weight_decay"]) == 0.1


def test_the_tensors_that_an_optimizer_sees_while_it_steps_are_always_the_same():
    """Also where the user writes a number or another tensor: a captured graph would go on reading the first one."""
    seen = set()

    class Seeing(Plain):
        def update(self, group, i):
            seen.add((i, id(group["lr"]), id(group["weight_decay"])))
            super().update(group, i)

    net = Net()
    optimizer = Seeing(net.parameters(), lr=torch.tensor(0.1), weight_decay=torch.tensor(0.0))
    decay().attach(optimizer, net)
    for k in range(STEPS):
        train(net, optimizer, first=k, last=k + 1)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1 / (k + 1))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 0.01), ("betas", (0.5, 0.9)), ("eps", 0.1), ("amsgrad", True), ("fused", True)]
)
def test_a_value_that_changes_between_steps_is_used(key, value):
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    decay().attach(optimizer, net)
    for side, made, factors in ((net, optimizer, ()), (twin, hand_made, (1.0, 0.0))):
        if key != "amsgrad":  # which needs the state from the first step on
            train(side, made, factors, last=3)
        for group in made.param_groups:
            group[key] = value
        train(side, made, factors, first=0 if key == "amsgrad" else 3)
    assert_identical(weights(net), weights(twin))


class Optional(Plain):
    """Reads a key that may be in a group or not."""

    def update(self, group, i):
        for p in group["params"]:
            p.sub_(group["lr"] * group.get("boost", 1.0) * (p.grad + group["weight_decay"] * p))


def test_keys_that_come_and_go_between_steps():
    net, twin = Net(), Net()
    optimizer, hand_made = Optional(net.parameters()), Optional(split(twin))
    decay().attach(optimizer, net)
    for side, made, factors in ((net, optimizer, ()), (twin, hand_made, (1.0, 0.0))):
        train(side, made, factors, last=2)
        for group in made.param_groups:
            group["boost"] = 3.0
        train(side, made, factors, first=2, last=4)
        for group in made.param_groups:
            del group["boost"]
        train(side, made, factors, first=4, last=5)
        for group in made.param_groups:
            group["boost"] = 3.0  # as before
        train(side, made, factors, first=5)
    assert_identical(weights(net), weights(twin))


# --------------------------------------------------------------------------------------------------------------------
# What groups hold


def append(optimizer, groups, parameters):
    for i, parameter in zip(groups, parameters, strict=True):
        optimizer.param_groups[i]["params"].append(parameter)


@pytest.mark.parametrize("are_named", [False, True], ids=["plain", "named"])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Counting, Statistic, StatisticInATensor])
def test_parameters_that_are_appended_to_a_group(cls, are_named):
    """The bias and the gain among them do not decay, and the rest goes on with what it had."""
    net, twin = Net(), Net()
    late = ("output.weight", "output.bias", "norm.weight")
    given = dict(net.named_parameters())
    optimizer = cls([(name, p) if are_named else p for name, p in given.items() if name not in late], lr=0.1)
    decay().attach(optimizer, net)
    train(net, optimizer, last=3)
    append(optimizer, (0, 0, 0), [given[name] for name in late])
    train(net, optimizer, first=3)

    expected = dict(twin.named_parameters())
    groups = [
        [p for n, p in expected.items() if n not in late and (n in EXCLUDED) is wanted] for wanted in (False, True)
    ]
    hand_made = cls([{"params": group} for group in groups], lr=0.1)
    train(twin, hand_made, factors=(1.0, 0.0), last=3)
    append(hand_made, (0, 1, 1), [expected[name] for name in late])
    train(twin, hand_made, factors=(1.0, 0.0), first=3)
    assert_identical(weights(net), weights(twin))


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Statistic])
def test_groups_that_are_added(cls):
    net, twin = Net(), Net()
    optimizer = cls([*net.hidden.parameters(), *net.norm.parameters()], lr=0.1)
    decay().attach(optimizer, net)
    train(net, optimizer, last=3)
    optimizer.add_param_group({"params": list(net.output.parameters())})
    train(net, optimizer, first=3)

    hidden, norm, output = twin.hidden, twin.norm, twin.output
    hand_made = cls([{"params": [hidden.weight]}, {"params": [hidden.bias, *norm.parameters()]}], lr=0.1)
    train(twin, hand_made, factors=(1.0, 0.0), last=3)
    for parameter in (output.weight, output.bias):
        hand_made.add_param_group({"params": [parameter]})
    train(twin, hand_made, factors=(1.0, 0.0, 1.0, 0.0), first=3)
    assert_identical(weights(net), weights(twin))
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Counting])
def test_parameters_that_replace_others_in_a_group(cls):
    net, twin = Net(), Net()
    optimizer, hand_made = cls(ordered(net), lr=0.1), cls(split(twin), lr=0.1)
    decay().attach(optimizer, net)
    for side, made, factors in ((net, optimizer, ()), (twin, hand_made, (1.0, 0.0))):
        train(side, made, factors, last=3)
        new = nn.Parameter(side.output.weight.detach() * 0.5)
        for group in made.param_groups:
            group["params"][:] = [new if p is side.output.weight else p for p in group["params"]]
        side.output.weight = new
        train(side, made, factors, first=3)
    assert_identical(weights(net), weights(twin))


@pytest.mark.parametrize("place", [0, 1, 2], ids="empty group {}".format)
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Counting])
def test_a_group_without_parameters_is_one_part(cls, place):
    net, twin = Net(), Net()
    optimizer, hand_made = (
        cls(
            [{"params": list(net.hidden.parameters())}, {"params": [*net.norm.parameters(), *net.output.parameters()]}],
            lr=0.1,
        ),
        cls([{"params": g["params"]} for g in divided(twin, LAYERS["none in one"], {})[0]], lr=0.1),
    )
    optimizer.param_groups.insert(place, {**optimizer.param_groups[0], "params": []})
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0, 1.0, 0.0)))
    assert [len(group["params"]) for group in optimizer.param_groups][place] == 0


def test_parameters_that_stand_in_no_module_decay_by_their_shape():
    net = Net()
    matrix, vector = nn.Parameter(torch.ones(2, 2).double()), nn.Parameter(torch.ones(2).double())
    optimizer = Plain([*net.parameters(), matrix, vector], lr=0.1)
    decay().attach(optimizer, net)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert matrix.tolist() == [[pytest.approx(1 - 0.1 * DECAYS[0], rel=1e-12, abs=0)] * 2] * 2
    assert vector.tolist() == [1.0, 1.0]


def test_a_parameter_with_a_name_in_the_group():
    """torch keeps ``param_names`` beside ``params``; parts have those of what they hold."""
    seen = []

    class Named(Plain):
        def update(self, group, i):
            seen.append(dict(zip(group["param_names"], group["params"], strict=True)))
            super().update(group, i)

    net = Net()
    optimizer = Named(net.named_parameters())
    layout = Layout(optimizer)
    decay().attach(optimizer, net)
    train(net, optimizer, last=1)
    layout.check()
    assert [list(part) for part in seen] == [["hidden.weight", "output.weight"], list(EXCLUDED)]
    assert all(part[name] is net.get_parameter(name) for part in seen for name in part)


# --------------------------------------------------------------------------------------------------------------------
# Lists that go with the groups


class WithAnotherList(Plain):
    """A list that has as many entries as there are groups, and something else in it."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.functions = [Plain.update] * len(self.param_groups)

    def update(self, group, i):
        assert len(self.functions) in (2, 4)
        for function in self.functions:
            function(self, group, i)


@pytest.mark.parametrize("cls", [AdaBound, AdaBoundByZip])
def test_a_list_with_one_rate_for_each_group_goes_with_them(cls):
    net, twin = Net(), Net()
    given = [(0.4, ("hidden", "norm")), (0.4, ("output",))]
    optimizer, hand_made = cls(layers(net, given)), cls(divided(twin, given, {})[0])
    for made, rates in ((optimizer, (0.2, 0.05)), (hand_made, (0.2, 0.2, 0.05, 0.05))):
        for group, rate in zip(made.param_groups, rates, strict=True):
            group["lr"] = rate
    lists = optimizer.base_lrs
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0, 1.0, 0.0)))
    assert optimizer.base_lrs is lists
    assert lists == [0.1, 0.1]


def test_other_lists_stay_as_they_are():
    net, twin = Net(), Net()
    optimizer, hand_made = WithAnotherList(net.parameters()), WithAnotherList(split(twin))
    del hand_made.functions[1:]
    optimizer.functions, hand_made.functions = [Plain.update] * 2, [Plain.update] * 2
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))
    assert len(optimizer.functions) == 2


# --------------------------------------------------------------------------------------------------------------------
# What everybody else sees


@pytest.mark.parametrize("step", [step_by_position, step_by_keyword])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Statistic, CountingInAList])
def test_groups_are_the_users_while_the_closure_runs_and_after_the_step(cls, step):
    net = Net()
    optimizer = cls(layers(net, LAYERS["a ratio"]), lr=0.1)
    step(optimizer, functools.partial(net.loss, 0))  # an optimizer may add keys of its own in the first step
    layout = Layout(optimizer)
    attachment = decay().attach(optimizer, net)

    def loss(k):
        layout.check()
        return net.loss(k)

    for k in range(STEPS):
        step(optimizer, functools.partial(loss, k))
        layout.check()
    attachment.remove()
    layout.check()


@pytest.mark.parametrize(
    ("given", "factors", "expected"),
    [
        (LAYERS["one group"], {}, [1.0]),
        (LAYERS["a ratio"], {}, [1.0, 0.5]),
        (LAYERS["none in one"], {}, [1.0, 0.0]),
        (LAYERS["a group that is excluded as a whole"], {}, [1.0, 0.0, 1.0]),
        (LAYERS["a ratio"], {"output.weight": 0.25}, [1.0, 0.125]),
        (LAYERS["one group"], {"output.weight": 4.0}, [4.0]),
    ],
)
def test_a_group_shows_the_weight_decay_of_the_next_step(given, factors, expected):
    net = Net()
    optimizer = adamw(layers(net, given))
    attachment = decay(factors=factors).attach(optimizer, net)
    for k in range(STEPS):
        assert [g["weight_decay"] for g in optimizer.param_groups] == [factor * DECAYS[k] for factor in expected]
        train(net, optimizer, first=k, last=k + 1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [factor * DECAYS[-1] for factor in expected]
    attachment.remove()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [value for value, _ in given]


@pytest.mark.parametrize("method", ["decoupled", "coupled", "independent", "cautious", "stable"])
def test_other_methods_set_the_optimizers_own_to_zero(method):
    net = Net()
    optimizer = adamw(layers(net, LAYERS["a ratio"]))
    layout = Layout(optimizer)
    attachment = decay(method=method).attach(optimizer, net)
    for k in range(STEPS):
        train(net, optimizer, first=k, last=k + 1)
        layout.check()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    attachment.remove()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0.2]


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Counting, StatisticInATensor])
def test_the_state_dict_is_that_of_an_optimizer_without_a_regularizer(cls):
    net, alone = Net(), Net()
    optimizer, bare = cls(net.parameters(), lr=0.1), cls(alone.parameters(), lr=0.1)
    decay().attach(optimizer, net)
    train(net, optimizer)
    train(alone, bare)
    state, expected = optimizer.state_dict(), bare.state_dict()
    assert [list(group) for group in state["param_groups"]] == [list(group) for group in expected["param_groups"]]
    assert [g["params"] for g in state["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    assert {i: list(entry) for i, entry in state["state"].items()} == {
        i: list(entry) for i, entry in expected["state"].items()
    }
    assert state.keys() == expected.keys()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Counting])
def test_a_copy_of_the_optimizer_has_nothing_of_ours(cls, duplicate):
    net = Net()
    optimizer = cls(net.parameters(), lr=0.1)
    decay().attach(optimizer, net)
    train(net, optimizer, last=2)
    twin = duplicate(optimizer)
    names = {"_regularizer", "step"} & vars(twin).keys()
    assert not names
    assert not twin._optimizer_step_pre_hooks
    assert not twin._optimizer_step_post_hooks
    train(net, optimizer, first=2)


# --------------------------------------------------------------------------------------------------------------------
# Somebody else writes the weight decay


def in_a_closure(optimizer, loss, value):
    def closure():
        optimizer.zero_grad()
        optimizer.param_groups[0]["weight_decay"] = value
        result = loss()
        result.backward()
        return result

    optimizer.step(closure)


def before_the_step(optimizer, loss, value):
    optimizer.zero_grad()
    loss().backward()
    optimizer.param_groups[0]["weight_decay"] = value
    optimizer.step()


def in_a_hook(optimizer, loss, value):
    def hook(optimizer, args, kwargs):
        optimizer.param_groups[0]["weight_decay"] = value

    handle = optimizer.register_step_pre_hook(hook)
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    handle.remove()


def in_a_post_hook(optimizer, loss, value):
    def hook(optimizer, args, kwargs):
        optimizer.param_groups[0]["weight_decay"] = value

    handle = optimizer.register_step_post_hook(hook)
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    handle.remove()


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
@pytest.mark.parametrize("write", [in_a_closure, before_the_step, in_a_hook, in_a_post_hook])
def test_a_value_that_somebody_else_writes_is_overridden(write, method):
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    decay(method=method).attach(optimizer, net)
    with pytest.warns(UserWarning, match=r"Somebody has set weight_decay=0\.9") as told:
        found = train(net, optimizer, step=functools.partial(write, value=0.9))
    expected = train(twin, hand_made, factors=(1.0, 0.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if method == "optimizer" else 1e-12)
    assert len([w for w in told if "Somebody" in str(w.message)]) == 1


def test_values_that_differ_are_told_once_each_time():
    """A run in which somebody follows a schedule of their own is told of it once, not at each step."""
    net = Net()
    optimizer = adamw(net.parameters())
    decay().attach(optimizer, net)
    values = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    with pytest.warns(UserWarning, match="Somebody has set weight_decay") as told:
        train(net, optimizer, step=lambda *args: before_the_step(*args, value=next(values)))
    assert len(told) == 1


@pytest.mark.parametrize("saved", ["with", "without"])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, Counting])
def test_loading_a_state_dict_is_no_override(cls, saved):
    """The suite turns a warning into an error. The new dictionaries are the user's, whatever weight decay they have."""
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters(), lr=0.1), cls(split(twin), lr=0.1)
    before = cls(Net().parameters(), lr=0.1, weight_decay=0.7).state_dict()
    decay().attach(optimizer, net)
    if saved == "without":
        optimizer.load_state_dict(before)
    train(net, optimizer, last=3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, first=3)
    assert_identical(weights(net), train(twin, hand_made, factors=(1.0, 0.0)))


# --------------------------------------------------------------------------------------------------------------------
# What cannot be shown in parts


class Fixed(Plain):
    """Its groups are a property without a setter."""

    def __init__(self, params, **options):
        made = vars(Plain(params, **options))
        self.kept = made.pop("param_groups")
        vars(self).update(made)

    @property
    def param_groups(self):
        return self.kept


class FixedAfterwards(Plain):
    """Refuses to be changed after it was made."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.is_made = True

    def __setattr__(self, name, value):
        if name == "param_groups" and vars(self).get("is_made"):
            raise AttributeError("param_groups cannot be set")
        super().__setattr__(name, value)


class Deaf(Plain):
    """Its groups are a property whose setter does nothing."""

    def __init__(self, params, **options):
        self.kept = []
        super().__init__(params, **options)

    @property
    def param_groups(self):
        return self.kept

    @param_groups.setter
    def param_groups(self, value):
        self.take(value)

    def take(self, value):
        pass


class Copying(Deaf):
    """Its groups are a property whose setter takes what is in the list."""

    def take(self, value):
        self.kept[:] = list(value)


class MasterWeights(Optimizer):
    """Steps float64 copies of the weights by an inner optimizer, and copies them back."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})
        held = [p for group in self.param_groups for p in group["params"]]
        self.pairs = [(p, nn.Parameter(p.detach().double().clone())) for p in held]
        self.inner = optim.AdamW([copy for _, copy in self.pairs], **{"lr": 0.1, **options})

    def step(self, closure=None):
        for p, master in self.pairs:
            master.grad = p.grad.double()
        self.inner.step()
        with torch.no_grad():
            for p, master in self.pairs:
                p.copy_(master)


class Offload(MasterWeights):
    """Likewise, by one optimizer for each parameter."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        del self.inner
        self.each = {p: optim.AdamW([master], **{"lr": 0.1, **options}) for p, master in self.pairs}

    def step(self, closure=None):
        for p, master in self.pairs:
            master.grad = p.grad.double()
            self.each[p].step()
        with torch.no_grad():
            for p, master in self.pairs:
                p.copy_(master)


class Flat(Optimizer):
    """Steps one flat copy of all weights."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})
        self.held = [p for group in self.param_groups for p in group["params"]]
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in self.held]))
        self.inners = [optim.SGD([self.flat], **{"lr": 0.1, **options})]

    def step(self, closure=None):
        self.flat.grad = torch.cat([p.grad.flatten() for p in self.held])
        self.inners[0].step()
        with torch.no_grad():
            pieces = self.flat.split([p.numel() for p in self.held])
            for p, piece in zip(self.held, pieces, strict=True):
                p.copy_(piece.view_as(p))


class WithASettingForSingleParameters(Plain):
    """As bitsandbytes: settings for single parameters by group and place."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.mng = type("GlobalOptimManager", (), {"index2config": {(0, 1): {"optim_bits": 8}}})()


REFUSED = [
    Fixed,
    FixedAfterwards,
    Deaf,
    Copying,
    MasterWeights,
    Offload,
    Flat,
    WithASettingForSingleParameters,
]


@pytest.mark.parametrize("cls", REFUSED)
def test_what_cannot_be_shown_in_parts_is_refused_by_name_and_with_advice(cls):
    net = Net()
    optimizer, before = cls(net.parameters()), weights(net)
    layout = Layout(optimizer)
    with pytest.raises(MisconfigurationException, match=rf"(?s){cls.__name__}.*method='decoupled'"):
        decay().attach(optimizer, net)
    layout.check()
    assert not {"_regularizer", "step"} & vars(optimizer).keys()
    assert_identical(weights(net), before)


@pytest.mark.parametrize("cls", [Fixed, FixedAfterwards, Deaf, Copying, WithASettingForSingleParameters])
def test_the_advice_works(cls):
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters()), Plain(twin.parameters())
    decay(method="decoupled").attach(optimizer, net)
    train(net, optimizer)
    for k in range(STEPS):
        hand_made.zero_grad()
        twin.loss(k).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.mul_(1 - 0.1 * DECAYS[k] * (name not in EXCLUDED))
        hand_made.step()
    assert_identical(weights(net), weights(twin))


class Early(Plain):
    """Reads its groups before it calls the closure."""

    def step(self, closure=None):
        groups = self.param_groups
        loss = None if closure is None else closure()
        with torch.no_grad():
            for i, group in enumerate(groups):
                self.update(group, i)
        return loss


class EarlyWithAFlatList(Plain):
    def step(self, closure=None):
        held = [(p, group) for group in self.param_groups for p in group["params"]]
        loss = None if closure is None else closure()
        with torch.no_grad():
            for p, group in held:
                p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))
        return loss


class EarlyInItsConstructor(Plain):
    """As LBFGS: one group, which it knows from the beginning."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.only = self.param_groups[0]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            self.update(self.only, 0)
        return loss


class Hidden(Plain):
    """Steps by an optimizer in an object of its own, in which nobody looks for one."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.pool = types.SimpleNamespace(inner=optim.SGD(self.param_groups, lr=0.1))

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.pool.inner.step()
        return loss


class EarlyAndLate(Early):
    """Reads the number of its groups afterwards as well."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.count = len(self.param_groups)
        return loss


class RateOnly(Plain):
    """Reads the rate of its first group, and has all parameters and their groups in a list of its own."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.held = [(p, group) for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        lr = self.param_groups[0]["lr"]
        with torch.no_grad():
            for p, group in self.held:
                p.sub_(lr * (p.grad + group["weight_decay"] * p))
        return loss


@pytest.mark.parametrize(
    ("cls", "step"),
    [
        *itertools.product([Early, EarlyWithAFlatList], [step_by_position]),
        (EarlyAndLate, step_by_position),
        *itertools.product([EarlyInItsConstructor, Hidden, RateOnly], [step_by_position, plain_step]),
    ],
)
def test_an_optimizer_that_reads_its_groups_too_early_is_an_error(cls, step):
    net = Net()
    optimizer = cls(net.parameters())
    layout = Layout(optimizer)
    decay().attach(optimizer, net)
    with pytest.raises(
        MisconfigurationException, match=rf"{cls.__name__} does not read its parameter groups.*method='decoupled'"
    ):
        step(optimizer, functools.partial(net.loss, 0))
    layout.check()


NO_OTHERS = []
READ = {
    "by a loop": list,
    "by number": lambda groups: [groups[i] for i in (0, -1)],
    "backwards": reversed,
    "with others": lambda groups: groups + NO_OTHERS,
    "in pieces": lambda groups: groups[:1] + groups[1:],
    "in a copy": lambda groups: groups.copy(),
}


@pytest.mark.parametrize("step", [step_by_position, plain_step])
@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_groups_may_be_read_in_any_way(read, step):
    class Reading(Plain):
        def step(self, closure=None):
            loss = None if closure is None else closure()
            with torch.no_grad():
                for i, group in enumerate(read(self.param_groups)):
                    self.update(group, i)
            return loss

    net, twin = Net(), Net()
    optimizer, hand_made = Reading(net.parameters()), Reading(split(twin))
    decay().attach(optimizer, net)
    found = train(net, optimizer, step=step)
    assert_identical(found, train(twin, hand_made, factors=(1.0, 0.0), step=step))


class Paired(Plain):
    """Has a list with one entry for each group, and reads as many groups as that has entries."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.numbers = list(range(len(self.param_groups)))

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group, number in self.pairs():
                self.update(group, number)
        return loss


PAIRS = {
    "zip": lambda groups, numbers: zip(groups, numbers, strict=False),
    "zip, the other way": lambda groups, numbers: ((g, i) for i, g in zip(numbers, groups, strict=False)),
    "one by one": lambda groups, numbers: ((groups[i], i) for i in numbers),
}


@pytest.mark.parametrize("sizes", [[6], [4, 2], [2, 4]], ids=["one", "the first is split", "the second is split"])
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_an_optimizer_that_leaves_parts_unread_is_an_error(pairs, sizes):
    class Pairing(Paired):
        def pairs(self):
            return pairs(self.param_groups, self.numbers)

    net = Net()
    parameters = iter(net.parameters())
    optimizer = Pairing([{"params": [next(parameters) for _ in range(size)]} for size in sizes])
    layout = Layout(optimizer)
    decay().attach(optimizer, net)
    with pytest.raises(MisconfigurationException, match=r"Pairing does not read.* or not all of them.*'decoupled'"):
        plain_step(optimizer, functools.partial(net.loss, 0))
    layout.check()


def test_an_optimizer_that_only_looks_at_its_groups_in_its_first_step_is_asked_in_the_next():
    class Waiting(Paired):
        is_first = True

        def pairs(self):
            is_first, self.is_first = self.is_first, False
            rates = [group["lr"] for group in self.param_groups]
            return [] if is_first else zip(self.param_groups, rates[:1], strict=False)

    net = Net()
    optimizer = Waiting(net.parameters())
    decay().attach(optimizer, net)
    plain_step(optimizer, functools.partial(net.loss, 0))
    with pytest.raises(MisconfigurationException, match="Waiting does not read"):
        plain_step(optimizer, functools.partial(net.loss, 1))


class Resting(Plain):
    """Does nothing in each first step of two."""

    count = 0

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.count += 1
        with torch.no_grad():
            for i, group in enumerate(self.param_groups):
                if self.count % 2 == 0:
                    self.update(group, i)
        return loss


class Skipping(Plain):
    """Leaves the last group alone, whose parameters something else may step."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        with torch.no_grad():
            for i, group in enumerate(self.param_groups):
                if group.get("steps", True):
                    self.update(group, i)
        return loss


class Chaining(Plain):
    """Puts the parameters of all groups into one list."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        params = functools.reduce(operator.add, (group["params"] for group in self.param_groups), [])
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        with torch.no_grad():
            for p, weight_decay in zip(params, decays, strict=True):
                if p.grad is not None:
                    p.sub_(0.1 * (p.grad + weight_decay * p))
        return loss


@pytest.mark.parametrize("step", [step_by_position, plain_step])
@pytest.mark.parametrize("cls", [Resting, Skipping, Chaining])
def test_what_an_optimizer_leaves_alone_is_its_own_affair(cls, step):
    net, twin, last, last_of_twin = Net(), Net(), nn.Linear(2, 2), nn.Linear(2, 2)
    last_of_twin.load_state_dict(last.state_dict())
    both, skipped = nn.ModuleList([net, last]), {"weight_decay": 0.0, "steps": False}
    optimizer = cls([{"params": list(net.parameters())}, {"params": list(last.parameters()), **skipped}])
    hand_made = cls([*split(twin), {"params": list(last_of_twin.parameters()), **skipped}])
    for module in (last, last_of_twin):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
    decay().attach(optimizer, both)
    found = train(net, optimizer, step=step)
    assert_identical(found, train(twin, hand_made, factors=(1.0, 0.0, 0.0), step=step))


@pytest.mark.parametrize("cls", [Early, EarlyWithAFlatList])
def test_without_a_closure_it_does_not_matter_when_groups_are_read(cls):
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters()), cls(split(twin))
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))


@pytest.mark.parametrize("cls", [Early, EarlyWithAFlatList, EarlyInItsConstructor])
def test_the_decoupled_method_does_not_mind(cls):
    net, twin = Net(), Net()
    optimizer = cls(net.parameters())
    decay(method="decoupled").attach(optimizer, net)
    train(net, optimizer, step=step_by_position)
    hand_made = Plain(twin.parameters())
    decay(method="decoupled").attach(hand_made, twin)
    assert_identical(weights(net), train(twin, hand_made))


# --------------------------------------------------------------------------------------------------------------------
# Optimizers of other packages, where they are installed


SCHEDULE_FREE = ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFreeReference")


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_equals_hand_made_groups(name):
    cls = getattr(pytest.importorskip("schedulefree"), name)
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters(), lr=0.1), cls(split(twin), lr=0.1)
    optimizer.train()
    hand_made.train()
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer), train(twin, hand_made, factors=(1.0, 0.0)))
    optimizer.eval()
    hand_made.eval()
    assert_identical(weights(net), weights(twin))


# --------------------------------------------------------------------------------------------------------------------
# Tensors that groups share


def another_tensor(optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.001)


def a_number(optimizer):
    optimizer.param_groups[0]["lr"] = 0.001


def in_place(optimizer):
    optimizer.param_groups[0]["lr"].fill_(0.02)


@pytest.mark.parametrize("change", [another_tensor, a_number, in_place])
@pytest.mark.parametrize("exclude", [(), ("bias",)], ids=["one part", "parts"])
def test_a_rate_that_groups_share(change, exclude):
    """torch gives all groups the same default tensor: what is written to one group of them stays there."""

    def run(net, callback):
        given = torch.tensor(0.1)
        groups = [{"params": list(net.hidden.parameters())}, {"params": list(net.output.parameters())}]
        optimizer = optim.SGD(groups, lr=given, weight_decay=0.0)
        attachment = callback.attach(optimizer, net) if callback else None
        train(net, optimizer, (), last=2)
        change(optimizer)
        train(net, optimizer, (), first=2)
        if attachment:
            attachment.remove()
        return weights(net), [float(group["lr"]) for group in optimizer.param_groups], float(given)

    found, rates, given = run(Net(), WeightDecay(0.0, exclude=exclude))
    expected, expected_rates, expected_given = run(Net(), None)
    assert (rates, given) == (expected_rates, expected_given)
    assert_identical(found, expected)


def test_a_weight_decay_that_groups_share_is_no_override(recwarn):
    net = Net()
    groups = [{"params": list(net.hidden.parameters())}, {"params": list(net.output.parameters())}]
    optimizer = optim.SGD(groups, lr=0.1, weight_decay=torch.tensor(0.01))
    with decay().attach(optimizer, net):
        train(net, optimizer, ())
    assert not [str(warning.message) for warning in recwarn if "Somebody" in str(warning.message)]
    assert [float(group["weight_decay"]) for group in optimizer.param_groups] == [
        pytest.approx(0.01, rel=1e-6, abs=0)
    ] * 2


class KeepsHistory(Plain):
    """Replaces a tensor in a list that its group holds."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            history = group.setdefault("history", [torch.zeros(2)])
            history[0] = history[0] + 1
        return loss


class KeepsCounts(Plain):
    """Counts in a dictionary within a dictionary."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group.setdefault("counts", {"of": {"steps": 0}})["of"]["steps"] += 1
        return loss


@pytest.mark.parametrize(("cls", "key"), [(KeepsHistory, "history"), (KeepsCounts, "counts")])
@pytest.mark.parametrize("exclude", [(), ("bias",)], ids=["one part", "parts"])
def test_what_an_optimizer_writes_into_lists_and_dictionaries_of_a_group(cls, key, exclude):
    net = Net()
    optimizer = cls(net.parameters())
    callback = WeightDecay(0.1, exclude=exclude)
    with callback.attach(optimizer, net):
        train(net, optimizer, ())
        callback.state_dict()
        found = optimizer.param_groups[0][key]
    assert found[0].tolist() == [STEPS] * 2 if key == "history" else found == {"of": {"steps": STEPS}}


# --------------------------------------------------------------------------------------------------------------------
# Parts by themselves


def in_two_parts():
    """An optimizer whose group has two parts, which are not shown."""
    net = Net()
    optimizer = adamw(net.parameters())
    hooks_of(optimizer).parts = parts = Parts(lambda parameter: (0, float(parameter.dim() > 1)))
    parts.values = [{0: 0.5}]
    return optimizer, parts


def test_the_users_groups_are_known_while_their_parts_are_shown():
    optimizer, parts = in_two_parts()
    groups = optimizer.param_groups
    parts.show(optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert user_groups(optimizer) is groups
    parts.hide(optimizer)
    assert user_groups(optimizer) is optimizer.param_groups is groups


@pytest.mark.parametrize(("saved", "used"), [([{"lr": 0.2}, {"lr": 0.3}], [0.2, 0.3]), ([{"lr": 0.2}] * 3, [0.1, 0.1])])
def test_values_that_a_checkpoint_has_for_as_many_parts_are_used(saved, used):
    optimizer, parts = in_two_parts()
    optimizer.param_groups[0]["lr"] = 0.1
    parts.load_state_dict([saved])
    assert [part["lr"] for part in parts.update(optimizer)] == used
