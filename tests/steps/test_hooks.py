"""Is everything done once around each real step, whatever optimizer steps, and however it is called?"""

import copy
import functools
import gc
import itertools
import warnings
import weakref

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_regularize import L1Penalty, L2Penalty, WeightConstraint, WeightDecay
from lightning_regularize._steps.hooks import Work
from lightning_regularize._steps.watch import Watch, stepping_optimizers
from lightning_regularize.projections import MaxNorm
from tests.distributed import run_distributed
from tests.steps.optimizers import (
    COMBINED,
    DECAYS,
    EXCLUDED,
    STEPS,
    Layout,
    Lookahead,
    Net,
    Orthogonal,
    Partly,
    Plain,
    Sharpness,
    adamw,
    assert_identical,
    closure_of,
    decay,
    matrices_and_rest,
    ordered,
    plain_step,
    split,
    step_by_keyword,
    step_by_position,
    train,
    weights,
)

STEP = {"without a closure": plain_step, "by position": step_by_position, "by keyword": step_by_keyword}


def by_step(function):
    return pytest.mark.parametrize("step", STEP.values(), ids=STEP)(function)


# --------------------------------------------------------------------------------------------------------------------
# Closures


@by_step
@pytest.mark.parametrize("make", [adamw, functools.partial(optim.SGD, lr=0.1, momentum=0.9), Plain])
def test_with_and_without_a_closure(make, step):
    net, twin = Net(), Net()
    optimizer, hand_made = make(net.parameters()), make(split(twin))
    decay().attach(optimizer, net)
    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))


class Renaming(Plain):
    """Calls its closure ``forward``."""

    def step(self, forward=None):
        return super().step(forward)


class KeywordOnly(Plain):
    def step(self, *, evaluate):
        return super().step(evaluate)


class AfterOthers(Plain):
    """Takes other arguments before its closure."""

    def step(self, metric, names=(), closure=None):
        assert metric == 1.0
        return super().step(closure)


class WithAModule(Plain):
    """Takes a module, which can be called too, before its closure."""

    def step(self, module, closure=None):
        assert isinstance(module, nn.Module)
        return super().step(closure)


class WithAModuleAndNoName(Plain):
    """Takes a module before its closure, which is not called so."""

    def step(self, module, evaluate):
        assert isinstance(module, nn.Module)
        return super().step(evaluate)


class WithALossFunction(Plain):
    """Takes a function that is no closure before its closure."""

    def step(self, loss_function, closure=None):
        assert loss_function is nn.functional.mse_loss
        return super().step(closure)


def call(cls, optimizer, loss):
    closure = closure_of(optimizer, loss)
    if cls is Renaming:
        return optimizer.step(forward=closure)
    if cls is KeywordOnly:
        return optimizer.step(evaluate=closure)
    if cls is AfterOthers:
        return optimizer.step(1.0, ["a"], closure)
    if cls is WithAModuleAndNoName:
        return optimizer.step(nn.Linear(1, 1), closure)
    if cls is WithAModule:
        return optimizer.step(nn.Linear(1, 1), closure=closure)
    return optimizer.step(nn.functional.mse_loss, closure=closure)


@pytest.mark.parametrize(
    "cls", [Renaming, KeywordOnly, AfterOthers, WithAModule, WithAModuleAndNoName, WithALossFunction]
)
def test_a_closure_in_another_place(cls):
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters()), cls(split(twin))
    decay().attach(optimizer, net)
    step = functools.partial(call, cls)
    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))


def test_step_returns_what_it_returned():
    net, twin = Net(), Net()
    optimizer, alone = Plain(net.parameters()), Plain(twin.parameters())
    decay().attach(optimizer, net)
    assert step_by_position(optimizer, functools.partial(net.loss, 0)) == step_by_position(
        alone, functools.partial(twin.loss, 0)
    )
    assert optimizer.step() is None
    assert optimizer.step(None) is None
    assert optimizer.step(closure=None) is None


class Twice(Plain):
    """SAM in one class: the gradient at a point uphill of the weights."""

    evaluations = 2

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for _ in range(self.evaluations - 1):
                moves = [(p, 0.05 * p.grad) for group in self.param_groups for p in group["params"]]
                for p, move in moves:
                    p.add_(move)
                with torch.enable_grad():
                    closure()
                for p, move in moves:
                    p.sub_(move)
            for i, group in enumerate(self.param_groups):
                self.update(group, i)
        return loss


class Thrice(Twice):
    evaluations = 3


class Searching(Plain):
    """Evaluates until the loss is smaller, with a step that it halves; decay is in each trial."""

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        held = [(p, p.detach().clone(), p.grad.clone(), g) for g in self.param_groups for p in g["params"]]
        for k in range(4):
            with torch.no_grad():
                for p, before, gradient, group in held:
                    p.copy_(before - group["lr"] * 0.5**k * (gradient + group["weight_decay"] * before))
            with torch.enable_grad():
                if closure() < loss:
                    break
        return loss


@pytest.mark.parametrize("cls", [Twice, Thrice, Searching])
def test_a_closure_that_is_evaluated_several_times(cls):
    net, twin = Net(), Net()
    optimizer, hand_made = cls(net.parameters()), cls(split(twin))
    layout = Layout(optimizer)
    decay().attach(optimizer, net)

    def step(optimizer, loss):
        def seen():
            if optimizer is layout.optimizer:
                layout.check()
            return loss()

        return step_by_position(optimizer, seen)

    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))


class Recorder(Work):
    """What is called around steps."""

    def __init__(self):
        self.calls = []

    def on_gradients(self, step):
        self.calls.append(("gradients", step.number))

    def before_step(self, step):
        self.calls.append(("before", step.number))

    def after_step(self, step, *, is_real):
        self.calls.append(("after" if is_real else "skipped", step.number))


@pytest.mark.parametrize(("cls", "evaluations"), [(Plain, 1), (Twice, 2), (Thrice, 3)])
def test_gradients_are_complete_at_each_evaluation_and_weights_change_once(cls, evaluations):
    net, recorder = Net(), Recorder()
    optimizer = cls(net.parameters())
    watch = Watch(optimizer, recorder)
    train(net, optimizer, step=step_by_position, last=3)
    expected = []
    for k in range(3):
        expected += [("gradients", k), ("before", k), *[("gradients", k)] * (evaluations - 1), ("after", k)]
    assert recorder.calls == expected
    assert watch.steps == 3
    watch.remove()
    train(net, optimizer, step=step_by_position, last=1)
    assert len(recorder.calls) == len(expected)


def test_the_gradients_of_lbfgs_are_complete_after_each_evaluation_and_not_before():
    net, recorder = Net(), Recorder()
    optimizer = optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    watch = Watch(optimizer, recorder)
    train(net, optimizer, step=step_by_position, last=1)
    assert recorder.calls == [("before", 0), *[("gradients", 0)] * 3, ("after", 0)]
    watch.remove()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(optim.LBFGS, lr=0.1, max_iter=3),
        functools.partial(optim.LBFGS, lr=0.1, max_iter=4, line_search_fn="strong_wolfe"),
        functools.partial(optim.LBFGS, lr=0.1, max_iter=1),
    ],
    ids=["3 evaluations", "strong Wolfe", "1 evaluation"],
)
def test_lbfgs_by_the_decoupled_method(make):
    """It decays once a step and before the first evaluation: nothing may move weights between evaluations."""
    net, twin = Net(), Net()
    optimizer, alone = make(net.parameters()), make(twin.parameters())
    layout = Layout(optimizer)
    decay(method="decoupled").attach(optimizer, net)
    found = train(net, optimizer, step=step_by_position)
    for k in range(STEPS):
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.mul_(1 - 0.1 * DECAYS[k] * (name not in EXCLUDED))
        train(twin, alone, step=step_by_position, first=k, last=k + 1)
    torch.testing.assert_close(found, weights(twin), rtol=0, atol=1e-12)
    layout.check()


def test_lbfgs_is_refused_by_name_where_the_optimizer_should_decay():
    net = Net()
    with pytest.raises(MisconfigurationException, match=r"LBFGS has no `weight_decay`.*method='decoupled'"):
        decay().attach(optim.LBFGS(net.parameters()), net)


# --------------------------------------------------------------------------------------------------------------------
# Steps inside steps, and compiled ones


class TwoLevels(optim.AdamW):
    """Its step calls ``super().step()``, so that hooks are called twice."""

    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure)


class ThreeLevels(TwoLevels):
    def step(self, closure=None):
        return super().step(closure=closure)


class EvaluatesAtTheTop(optim.SGD):
    """Evaluates the closure by itself and gives none to the level below."""

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)
        super().step()
        return loss


class TwoSteps(optim.SGD):
    """Steps twice with one gradient."""

    def step(self, closure=None):
        loss = super().step(closure)
        super().step()
        return loss


LEVELS = [TwoLevels, ThreeLevels, EvaluatesAtTheTop, TwoSteps]


def hook_all_levels(cls):
    """torch lets the step of a class call hooks when its first instance is made."""
    for base in cls.__mro__[1:]:
        if issubclass(base, optim.Optimizer) and base is not optim.Optimizer:
            base(Net().parameters(), lr=0.1)


@by_step
@pytest.mark.parametrize("cls", LEVELS)
def test_a_step_that_calls_the_step_of_its_base_class(cls, step):
    hook_all_levels(cls)
    net, twin, recorder = Net(), Net(), Recorder()
    optimizer, hand_made = cls(net.parameters(), lr=0.1), cls(split(twin), lr=0.1)
    decay().attach(optimizer, net)
    Watch(optimizer, recorder)
    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))
    assert recorder.calls == [(what, k) for k in range(STEPS) for what in ("gradients", "before", "after")]


@pytest.mark.parametrize("has_closure", [False, True], ids=["without a closure", "with a closure"])
@pytest.mark.parametrize("cls", LEVELS)
def test_a_step_that_was_kept_before(cls, has_closure):
    """As by ``torch.compile(optimizer.step)`` or accelerate: what we put in its place is not called."""
    hook_all_levels(cls)
    net, twin, recorder = Net(), Net(), Recorder()
    optimizer, hand_made = cls(net.parameters(), lr=0.1), cls(split(twin), lr=0.1)
    layout, kept = Layout(optimizer), {optimizer: optimizer.step, hand_made: hand_made.step}
    decay().attach(optimizer, net)
    Watch(optimizer, recorder)

    def step(optimizer, loss):
        closure = closure_of(optimizer, loss)
        if has_closure:
            return kept[optimizer](closure)
        closure()
        return kept[optimizer]()

    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))
    assert recorder.calls == [(what, k) for k in range(STEPS) for what in ("gradients", "before", "after")]
    layout.check()


@by_step
def test_what_is_added_to_gradients_is_added_once(step):
    """Hooks of a class with three levels come three times a step."""
    hook_all_levels(ThreeLevels)
    net, twin = Net(), Net()
    L2Penalty(0.3).attach(optimizer := ThreeLevels(net.parameters(), lr=0.1), net)
    L2Penalty(0.3).attach(expected := adamw(twin.parameters()), twin)
    assert_identical(train(net, optimizer, step=step), train(twin, expected, step=step))


def compiled_after(optimizer, net):
    decay().attach(optimizer, net)
    return torch.compile(optimizer.step, backend="eager")


def compiled_before(optimizer, net):
    step = torch.compile(optimizer.step, backend="eager")
    decay().attach(optimizer, net)
    return step


def compiled_in_a_function(optimizer, net):
    decay().attach(optimizer, net)

    @torch.compile(backend="eager", fullgraph=False)
    def step():
        optimizer.step()

    return step


# torch 2.13 calls what it deprecates when it compiles for the first time
FIRST_COMPILATION = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@FIRST_COMPILATION
@pytest.mark.parametrize("compile_", [compiled_after, compiled_before, compiled_in_a_function])
def test_a_compiled_step(compile_):
    net, twin = Net(torch.float32), Net(torch.float32)
    optimizer, hand_made = (
        optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        optim.SGD(split(twin), lr=0.1, momentum=0.9),
    )
    layout = Layout(optimizer)
    compiled = compile_(optimizer, net)

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss().backward()
        compiled()

    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0)))
    layout.check()
    torch.compiler.reset()


@FIRST_COMPILATION
def test_a_compiled_step_with_a_tensor_as_learning_rate():
    """As in torch's recipe, so that a change of the rate does not compile anew. Capturable works on the CPU so only."""
    net, twin = Net(torch.float32), Net(torch.float32)
    options = {"foreach": True, "capturable": True}
    optimizer = adamw(net.parameters(), lr=torch.tensor(0.1), **options)
    hand_made = adamw(split(twin), lr=torch.tensor(0.1), **options)
    decay().attach(optimizer, net)
    made = {each: torch.compile(each.step, backend="eager") for each in (optimizer, hand_made)}

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss().backward()
        made[optimizer]()

    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))
    torch.compiler.reset()


# --------------------------------------------------------------------------------------------------------------------
# Hooks of others


def register(optimizer, look, kind):
    """A hook of somebody else, and what removes it."""
    return {
        "pre": lambda: optimizer.register_step_pre_hook(look),
        "post": lambda: optimizer.register_step_post_hook(look),
        "global pre": lambda: register_optimizer_step_pre_hook(look),
        "global post": lambda: register_optimizer_step_post_hook(look),
    }[kind]()


@pytest.mark.parametrize("when", ["before", "after", "between steps"])
@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
@by_step
def test_hooks_of_others_see_the_users_groups(step, kind, when):
    net, calls = Net(), []
    optimizer = adamw(net.parameters())
    layout = Layout(optimizer)

    def look(optimizer, args, kwargs):
        layout.check()
        calls.append(optimizer.param_groups[0]["weight_decay"])

    handles = [register(optimizer, look, kind)] if when == "before" else []
    decay().attach(optimizer, net)
    try:
        if when == "after":
            handles.append(register(optimizer, look, kind))
        train(net, optimizer, step=step, last=2)
        if when == "between steps":
            handles.append(register(optimizer, look, kind))
        train(net, optimizer, step=step, first=2)
    finally:
        for handle in handles:
            handle.remove()
    shown = DECAYS if "pre" in kind else (*DECAYS[1:], DECAYS[-1])  # after a step that of the next one
    assert calls == list(shown[2 * (when == "between steps") :])


@pytest.mark.parametrize("when", ["before", "after"])
@by_step
def test_hooks_of_others_that_change_the_arguments(step, when):
    """A pre-hook may return others: here a closure that wraps the user's."""
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    layout = Layout(optimizer)

    def halve(optimizer, args, kwargs):
        def closure(inner):
            if optimizer is layout.optimizer:
                layout.check()
            loss = inner()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.mul_(0.5)
            return loss

        if len(args) > 1:
            return (args[0], functools.partial(closure, args[1])), kwargs
        if "closure" in kwargs:
            return args, {"closure": functools.partial(closure, kwargs["closure"])}
        closure(lambda: None)
        return None

    if when == "before":
        optimizer.register_step_pre_hook(halve)
    decay().attach(optimizer, net)
    if when == "after":
        optimizer.register_step_pre_hook(halve)
    hand_made.register_step_pre_hook(halve)
    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))


@pytest.mark.parametrize("change", ["gradient", "lr", "both"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_hooks_of_others_do_is_used_by_the_step(change, when):
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))

    def do(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            if change != "gradient":
                group["lr"] *= 0.9
            for p in group["params"] if change != "lr" else ():
                p.grad.clamp_(-0.1, 0.1)

    if when == "before":
        optimizer.register_step_pre_hook(do)
    decay().attach(optimizer, net)
    if when == "after":
        optimizer.register_step_pre_hook(do)
    hand_made.register_step_pre_hook(do)
    assert_identical(train(net, optimizer), train(twin, hand_made, (1.0, 0.0)))


# --------------------------------------------------------------------------------------------------------------------
# Exceptions


class Interrupted(BaseException):
    """As KeyboardInterrupt: no ``except Exception`` stops it."""


class Failing(Plain):
    """Fails once, after it has changed the first parameter."""

    fails = False

    def update(self, group, i):
        if self.fails and i == len(self.param_groups) - 1:
            self.fails = False
            raise Interrupted
        super().update(group, i)


def in_the_update(optimizer, loss):
    optimizer.fails = True
    step_by_position(optimizer, loss)


def in_the_update_without_a_closure(optimizer, loss):
    optimizer.fails = True
    plain_step(optimizer, loss)


def in_the_closure(optimizer, loss):
    def fail():
        loss().backward()
        raise Interrupted

    optimizer.step(fail)


def _fail(*_):
    raise Interrupted


def in_a_pre_hook(optimizer, loss):
    with optimizer.register_step_pre_hook(_fail):
        step_by_keyword(optimizer, loss)


def in_a_post_hook(optimizer, loss):
    with optimizer.register_step_post_hook(_fail):
        plain_step(optimizer, loss)


def in_a_global_hook(optimizer, loss):
    with register_optimizer_step_pre_hook(_fail):
        plain_step(optimizer, loss)


FAILURES = [
    in_the_update,
    in_the_update_without_a_closure,
    in_the_closure,
    in_a_pre_hook,
    in_a_post_hook,
    in_a_global_hook,
]


@pytest.mark.parametrize("failure", FAILURES)
def test_groups_are_the_users_after_an_exception(failure):
    """And training goes on as with hand-made groups to which the same happened."""
    net, twin = Net(), Net()
    optimizer, hand_made = Failing(net.parameters()), Failing(split(twin))
    layout = Layout(optimizer)
    attachment = decay().attach(optimizer, net)
    for side, made, factors in ((net, optimizer, ()), (twin, hand_made, (1.0, 0.0))):
        train(side, made, factors, last=2)
        number = 2 + (failure is not in_a_post_hook)  # after an exception in the update the step is not counted
        with pytest.raises(Interrupted):
            train(side, made, factors, step=failure, first=2, last=3)
        if made is optimizer:
            layout.check()
            assert made.param_groups[0]["weight_decay"] == DECAYS[2 if number == 3 else 3]
        train(side, made, factors, first=5 - number)
    assert_identical(weights(net), weights(twin))
    attachment.remove()
    layout.check()
    assert "step" not in vars(optimizer)


def test_a_step_that_was_kept_before_and_fails():
    """Nothing tells us of its end: the groups are the user's again from the next step on, or when we are removed."""
    for is_removed in (False, True):
        net, twin = Net(), Net()
        optimizer, hand_made = Failing(net.parameters()), Failing(split(twin))
        layout, kept = Layout(optimizer), {optimizer: optimizer.step, hand_made: hand_made.step}
        attachment = decay().attach(optimizer, net)

        def step(optimizer, loss, kept=kept):
            closure_of(optimizer, loss)()
            kept[optimizer]()

        for side, made, factors in ((net, optimizer, ()), (twin, hand_made, (1.0, 0.0))):
            train(side, made, factors, step=step, last=1)
            made.fails = True
            with pytest.raises(Interrupted):
                train(side, made, factors, step=step, first=1, last=2)
            if is_removed:
                attachment.remove()
                layout.check()
            else:
                train(side, made, factors, step=step, first=1)
        layout.check()
        assert_identical(weights(net), weights(twin))


# --------------------------------------------------------------------------------------------------------------------
# Optimizers that hold others

SCHEDULERS = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda k: 0.5**k),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=STEPS + 1),
}

REST = ("norm.weight", "norm.bias", "output.weight", "output.bias")  # so that both inner optimizers are split


def muon_and_adamw(net, make, by_hand=False):
    matrices, rest = matrices_and_rest(net)
    if by_hand:
        names = {p: name for name, p in net.named_parameters()}
        matrices, rest = (
            [{"params": [p for p in group if (names[p] in REST) is wanted]} for wanted in (False, True)]
            for group in (matrices, rest)
        )
    return make(optim.Muon(matrices, lr=0.1), adamw(rest))


@pytest.mark.parametrize("make", COMBINED.values(), ids=COMBINED)
@by_step
def test_several_optimizers_in_one(step, make):
    net, twin = Net(), Net()
    optimizer, hand_made = muon_and_adamw(net, make), muon_and_adamw(twin, make, by_hand=True)
    scheduler, expected = (LambdaLR(each, lambda k: 0.5**k) for each in (optimizer, hand_made))
    layout = Layout(optimizer)
    attachment = decay(exclude=("norm.*", "output.*")).attach(optimizer, net)
    ratio = 0.01 / 0.1  # of AdamW's default to Muon's
    assert_identical(
        train(net, optimizer, step=step, scheduler=scheduler),
        train(twin, hand_made, (1.0, 0.0, ratio, 0.0), step=step, scheduler=expected),
    )
    layout.check(same_list=make is not COMBINED["a list"] and make is not COMBINED["one in the other"])
    attachment.remove()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert all("step" not in vars(each) or each.step.__func__ for each in stepping_optimizers(optimizer))


@pytest.mark.parametrize("make", COMBINED.values(), ids=COMBINED)
def test_all_groups_of_several_optimizers_in_one_show_the_weight_decay(make):
    net = Net()
    optimizer = muon_and_adamw(net, make)
    decay(exclude=("norm.*", "output.*")).attach(optimizer, net)
    for k in range(STEPS):  # ratios are those of all groups: Muon's 0.1 is the largest
        expected = [DECAYS[k], 0.1 * DECAYS[k]]
        assert [g["weight_decay"] for g in optimizer.param_groups] == [
            pytest.approx(e, rel=1e-12, abs=0) for e in expected
        ]
        train(net, optimizer, first=k, last=k + 1)


def test_the_optimizer_itself_steps_what_no_inner_one_holds():
    net, twin = Net(), Net()
    optimizer = Partly(list(net.hidden.parameters()), adamw([*net.norm.parameters(), *net.output.parameters()]))
    layout = Layout(optimizer)
    assert stepping_optimizers(optimizer) == [optimizer.inner, optimizer]
    decay().attach(optimizer, net)
    found = train(net, optimizer)
    layout.check()
    inner = adamw([{"params": [twin.output.weight]}, {"params": [*twin.norm.parameters(), twin.output.bias]}])
    hand_made = Partly([{"params": [twin.hidden.weight]}, {"params": [twin.hidden.bias]}], inner)
    assert_identical(found, train(twin, hand_made, (0.0, 0.0, 1.0, 0.0)))


WRAPPERS = {
    "Lookahead": lambda groups: Lookahead(adamw(groups)),
    "Lookahead of SGD": lambda groups: Lookahead(optim.SGD(groups, lr=0.1, momentum=0.9), k=3),
    "orthogonal gradients": lambda groups: Orthogonal(adamw(groups)),
    "one around the other": lambda groups: Lookahead(Orthogonal(Plain(groups))),
    "SAM": lambda groups: Sharpness(groups, Plain, lr=0.1),
    "SAM with AdamW": lambda groups: Sharpness(groups, optim.AdamW, lr=0.1),
}


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("step", [step_by_position, step_by_keyword])
def test_optimizers_around_others(make, step):
    net, twin = Net(), Net()
    optimizer, hand_made = make(ordered(net)), make(split(twin))
    layout = Layout(optimizer)
    attachment = decay().attach(optimizer, net)
    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))
    layout.check()
    attachment.remove()
    layout.check()


class Accelerated(Orthogonal):
    """As under accelerate with fp16: for each step it puts another ``step`` on the optimizer, and then the first."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.kept, self.steps = optimizer.step, 0

    def step(self, closure=None):
        def patched(*args, **kwargs):
            self.steps += 1
            return self.kept(*args, **kwargs)

        self.optimizer.step = patched
        try:
            return self.optimizer.step(closure)
        finally:
            self.optimizer.step = self.kept


@by_step
@pytest.mark.parametrize("make", [adamw, functools.partial(optim.SGD, lr=0.1, momentum=0.9), Plain])
def test_an_optimizer_whose_step_is_replaced_again_and_again(make, step):
    net, twin = Net(), Net()
    optimizer, hand_made = Accelerated(make(net.parameters())), Accelerated(make(split(twin)))
    layout = Layout(optimizer)
    for _ in range(2):  # it can be removed and attached again
        attachment = decay().attach(optimizer, net)
        assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))
        layout.check()
        attachment.remove()
        layout.check()
    assert optimizer.steps == 2 * STEPS


class Renewing(optim.Optimizer):
    """Makes its inner optimizer anew when a group is added or a state is loaded, as ZeroRedundancyOptimizer may."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.renew()

    def renew(self):
        state = self.inner.state if hasattr(self, "inner") else {}
        self.inner = optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.inner.state.update(state)
        self.param_groups = self.inner.param_groups

    def add_param_group(self, group):
        super().add_param_group(group)
        if hasattr(self, "inner"):
            self.renew()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups
        self.renew()

    def state_dict(self):
        return self.inner.state_dict()

    def step(self, closure=None):
        return self.inner.step(closure)


@by_step
@pytest.mark.parametrize("change", ["nothing", "a group", "a state", "an assignment"])
def test_an_inner_optimizer_that_is_made_anew(change, step):
    net, twin = Net(), Net()
    first = [net.hidden.weight, net.hidden.bias, *net.norm.parameters()]
    optimizer = Renewing(first)
    hand_made = Renewing([{"params": [twin.hidden.weight]}, {"params": [twin.hidden.bias, *twin.norm.parameters()]}])
    decay().attach(optimizer, net)
    last = [{"params": list(net.output.parameters())}], [{"params": [p]} for p in twin.output.parameters()]
    for side, made, factors, groups in (
        (net, optimizer, (), last[0]),
        (twin, hand_made, (1.0, 0.0, 1.0, 0.0), last[1]),
    ):
        train(side, made, factors, step=step, last=2)
        if change == "a group":
            for group in groups:
                made.add_param_group(group)
        elif change == "a state":
            made.load_state_dict(copy.deepcopy(made.state_dict()))
        elif change == "an assignment":
            made.renew()
        train(side, made, factors, step=step, first=2)
    assert_identical(weights(net), weights(twin))


class Open(Renewing):
    """Whose copies have all of its attributes."""

    def __getstate__(self):
        return vars(self)


@by_step
def test_an_optimizer_keeps_what_acts_on_inner_ones_that_are_made_anew(step):
    net, twin = Net(), Net()
    optimizer, hand_made = Open(net.parameters()), Open(split(twin))
    callback = decay()
    callback.attach(optimizer, net)
    callback = weakref.ref(callback)
    train(net, optimizer, step=step, last=2)
    optimizer.renew()
    gc.collect()
    assert not copy.deepcopy(optimizer)._regularizers
    train(net, optimizer, step=step, first=2)
    assert_identical(weights(net), train(twin, hand_made, (1.0, 0.0), step=step))
    del optimizer
    gc.collect()
    assert callback() is None


class Lazy(optim.Optimizer):
    """Makes its inner optimizer in its first step, over its own dictionaries, to which that one adds keys."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.inner = None

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.inner is None:
            self.inner = optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.inner.step()
        return loss


@by_step
@pytest.mark.parametrize("make", [SCHEDULERS["LambdaLR"], SCHEDULERS["CosineAnnealingLR"]], ids=["lambda", "cosine"])
def test_an_inner_optimizer_that_is_made_in_the_first_step(make, step):
    net, twin = Net(), Net()
    optimizer, hand_made = Lazy(net.parameters()), Lazy(split(twin))
    decay().attach(optimizer, net)
    schedulers = [make(each) for each in (optimizer, hand_made)]
    assert_identical(
        train(net, optimizer, step=step, scheduler=schedulers[0]),
        train(twin, hand_made, (1.0, 0.0), step=step, scheduler=schedulers[1]),
    )


def test_an_optimizer_without_hooks_is_refused_by_name():
    class Bare(optim.Optimizer):
        def __init__(self, params):
            self.param_groups, self.state, self.defaults = [{"params": list(params), "weight_decay": 0.0}], {}, {}

        def step(self, closure=None):
            pass

    net = Net()
    with pytest.raises(MisconfigurationException, match=r"Bare does not call `Optimizer\.__init__`"):
        decay().attach(Bare(net.parameters()), net)


# --------------------------------------------------------------------------------------------------------------------
# Two processes


def join(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    warnings.simplefilter("ignore")  # torch 2.13 calls what it deprecates when it imports this
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer


def zero(rank, world_size, change):
    """The weights under ZeroRedundancyOptimizer and under AdamW with hand-made groups, on which all ranks agree."""
    zero_redundancy_optimizer = join(rank, world_size)
    net, twin = Net(), Net()
    optimizer = zero_redundancy_optimizer([*net.hidden.parameters(), *net.norm.parameters()], optim.AdamW, lr=0.1)
    hand_made = adamw([{"params": [twin.hidden.weight]}, {"params": [twin.hidden.bias, *twin.norm.parameters()]}])
    attachment = decay().attach(optimizer, net)
    train(net, optimizer, last=2)
    train(twin, hand_made, (1.0, 0.0), last=2)
    if change == "a group":
        optimizer.add_param_group({"params": list(net.output.parameters())})
        for p in twin.output.parameters():
            hand_made.add_param_group({"params": [p]})
    elif change == "a state":
        states = []
        for to in range(world_size):
            optimizer.consolidate_state_dict(to)
            states += [copy.deepcopy(optimizer.state_dict())] if to == rank else []
        optimizer.load_state_dict(*states)
    elif change == "frozen":
        for each in (net, twin):
            each.hidden.bias.requires_grad_(False)
            each.hidden.bias.grad = None
    train(net, optimizer, first=2, last=3)
    layout = Layout(optimizer)
    train(net, optimizer, first=3)
    layout.check()
    train(twin, hand_made, (1.0, 0.0, 1.0, 0.0), first=2)
    shown = [group["weight_decay"] for group in optimizer.param_groups]
    attachment.remove()
    found, expected = ({name: p.tolist() for name, p in weights(each).items()} for each in (net, twin))
    return found, expected, shown, [group["weight_decay"] for group in optimizer.param_groups]


@pytest.mark.parametrize("change", ["nothing", "a group", "a state", "frozen"])
def test_zero_redundancy_optimizer_on_two_processes(change):
    for found, expected, shown, given in run_distributed(zero, change):
        assert found == expected
        assert shown == [DECAYS[-1]] * len(shown)
        assert given == [0.01] * len(given)


def overlapping(rank, world_size):
    from torch.nn.parallel import DistributedDataParallel

    zero_redundancy_optimizer = join(rank, world_size)
    net = DistributedDataParallel(Net())
    optimizer = zero_redundancy_optimizer(net.parameters(), optim.AdamW, lr=0.1, overlap_with_ddp=True)
    for callback in (decay(), decay(method="decoupled"), *callbacks()[1:]):
        with pytest.raises(
            MisconfigurationException,
            match=r"ZeroRedundancyOptimizer\(overlap_with_ddp=True\).*=False",
        ):
            callback.attach(optimizer, net)


def test_zero_redundancy_optimizer_that_overlaps_with_ddp_is_refused():
    run_distributed(overlapping)


# --------------------------------------------------------------------------------------------------------------------
# Several at one optimizer


def callbacks():
    return decay(), L1Penalty(0.01), WeightConstraint(MaxNorm(0.5))


def leaves_nothing(optimizer):
    assert not {"_regularizer", "step"} & vars(optimizer).keys()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_several_are_removed_in_any_order(order):
    net = Net()
    optimizer = adamw(net.parameters())
    layout = Layout(optimizer)
    attachments = [callback.attach(optimizer, net) for callback in callbacks()]
    for k, i in enumerate(order):
        train(net, optimizer, first=k, last=k + 1)
        attachments[i].remove()
        layout.check()
    leaves_nothing(optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    for attachment in attachments:
        attachment.remove()  # again, which does nothing
    leaves_nothing(optimizer)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_each_acts_until_it_is_removed(order):
    """Alone and beside the others it does the same: their places do not matter where they do not touch each other."""
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    made = callbacks()
    attachments = {i: made[i].attach(optimizer, net) for i in order}
    others = {i: callbacks()[i].attach(hand_made, twin) for i in (1, 2)}
    train(net, optimizer, last=2)
    train(twin, hand_made, (1.0, 0.0), last=2)
    for k, i in enumerate(order, start=2):
        attachments[i].remove()
        if i:
            others[i].remove()
        else:
            for group in hand_made.param_groups:
                group["weight_decay"] = 0.01
        decays = attachments.pop(i) and 0 in attachments
        train(net, optimizer, first=k, last=k + 1)
        train(twin, hand_made, (1.0, 0.0) if decays else (), first=k, last=k + 1)
    assert_identical(weights(net), weights(twin))


@pytest.mark.parametrize("second", [decay, lambda: WeightDecay(None), lambda: WeightDecay(0.3)])
def test_a_second_weight_decay_on_one_optimizer_is_refused_and_the_first_goes_on(second):
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    layout = Layout(optimizer)
    attachment = decay().attach(optimizer, net)
    train(net, optimizer, last=2)
    with pytest.raises(MisconfigurationException, match="Two WeightDecay"):
        second().attach(optimizer, net)
    train(net, optimizer, first=2)
    assert_identical(weights(net), train(twin, hand_made, (1.0, 0.0)))
    attachment.remove()
    layout.check()
    leaves_nothing(optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_a_callback_is_attached_once_at_a_time():
    net, callback = Net(), decay()
    optimizer = adamw(net.parameters())
    attachment = callback.attach(optimizer, net)
    with pytest.raises(RuntimeError, match="in use already"):
        callback.attach(adamw(Net().parameters()), Net())
    attachment.remove()
    callback.attach(optimizer, net).remove()
    leaves_nothing(optimizer)


def test_a_step_that_somebody_has_put_there_before_is_there_again_after_it_was_removed():
    net = Net()
    optimizer = adamw(net.parameters())
    optimizer.step = step = functools.partial(optimizer.step)
    decay().attach(optimizer, net).remove()
    assert vars(optimizer)["step"] is step


def test_attached_again_after_it_was_removed():
    """In between the optimizer decays everything, as it was made to."""
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    for k in range(3):
        attachment = WeightDecay(0.5).attach(optimizer, net)
        train(net, optimizer, first=2 * k, last=2 * k + 1)
        attachment.remove()
        train(net, optimizer, first=2 * k + 1, last=2 * k + 2)
        for step, values in ((2 * k, (0.5, 0.0)), (2 * k + 1, (0.01, 0.01))):
            for group, value in zip(hand_made.param_groups, values, strict=True):
                group["weight_decay"] = value
            train(twin, hand_made, first=step, last=step + 1)
    assert_identical(weights(net), weights(twin))
    leaves_nothing(optimizer)


def test_used_as_a_context():
    net = Net()
    optimizer = adamw(net.parameters())
    with decay().attach(optimizer, net):
        train(net, optimizer)
    leaves_nothing(optimizer)


def test_one_optimizer_each_for_two_modules():
    """What acts on one leaves the other alone."""
    nets, twins = (Net(), Net()), (Net(), Net())
    optimizers, hand_made = [adamw(net.parameters()) for net in nets], [adamw(split(twin)) for twin in twins]
    for i, values in enumerate([(0.5, {}), (0.2, {"output.*": 0.5})]):
        WeightDecay(values[0], factors=values[1]).attach(optimizers[i], nets[i])
    twin = twins[1]
    hand_made[1] = adamw([{"params": [p]} for p in (twin.hidden.weight, twin.output.weight)])
    hand_made[1].add_param_group({"params": [p for name, p in twin.named_parameters() if name in EXCLUDED]})
    for made, values in zip(hand_made, [(0.5, 0.0), (0.2, 0.1, 0.0)], strict=True):
        for group, value in zip(made.param_groups, values, strict=True):
            group["weight_decay"] = value
    for k in range(STEPS):
        for net, optimizer in zip([*nets, *twins], [*optimizers, *hand_made], strict=True):
            train(net, optimizer, first=k, last=k + 1)
    for net, twin in zip(nets, twins, strict=True):
        assert_identical(weights(net), weights(twin))


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "not removed"])
def test_nothing_is_kept_alive(removed):
    net = Net()
    optimizer = adamw(net.parameters())
    attachment = decay().attach(optimizer, net)
    train(net, optimizer)
    if removed:
        attachment.remove()
    seen = [weakref.ref(each) for each in (net, optimizer, net.hidden.weight)]
    del net, optimizer, attachment
    gc.collect()
    assert [each() for each in seen] == [None] * 3


# --------------------------------------------------------------------------------------------------------------------
# LR schedulers


@pytest.mark.parametrize("when", ["before", "after", "between steps"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_that_are_made_before_and_after(make, when):
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    layout = Layout(optimizer)
    scheduler = make(optimizer) if when == "before" else None
    attachment = decay().attach(optimizer, net)
    if when == "between steps":
        train(net, optimizer, last=2)
        train(twin, hand_made, (1.0, 0.0), last=2)
    scheduler, expected = scheduler or make(optimizer), make(hand_made)
    keys = [list(group) for group in optimizer.param_groups]
    first = 2 if when == "between steps" else 0
    train(net, optimizer, scheduler=scheduler, first=first)  # torch warns where a scheduler sees no step before its own
    train(twin, hand_made, (1.0, 0.0), scheduler=expected, first=first)
    assert_identical(weights(net), weights(twin))
    assert scheduler.get_last_lr() == expected.get_last_lr()[:1]
    attachment.remove()
    assert optimizer.param_groups is layout.list
    assert [list(group) for group in optimizer.param_groups] == keys
    # What a scheduler has wrapped stays, and does nothing.
    train(net, optimizer, last=1)
    for group in hand_made.param_groups:
        group["weight_decay"] = 0.01
    train(twin, hand_made, last=1)
    assert_identical(weights(net), weights(twin))
    decay().attach(optimizer, net)
    train(net, optimizer)
    assert_identical(weights(net), train(twin, hand_made, (1.0, 0.0)))


def test_a_plateau_scheduler():
    net, twin = Net(), Net()
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    schedulers = [ReduceLROnPlateau(each, patience=0, threshold=0.5, factor=0.3) for each in (optimizer, hand_made)]
    decay().attach(optimizer, net)
    for k in range(STEPS):
        for side, made, factors, scheduler in ((net, optimizer, (), 0), (twin, hand_made, (1.0, 0.0), 1)):
            train(side, made, factors, first=k, last=k + 1)
            schedulers[scheduler].step(1.0)
    assert_identical(weights(net), weights(twin))
    assert optimizer.param_groups[0]["lr"] == hand_made.param_groups[0]["lr"] < 0.01


# --------------------------------------------------------------------------------------------------------------------
# Steps that are none


class Scaled(Net):
    """Has an infinite gradient at one step."""

    bad = 2

    def loss(self, k):
        return super().loss(k) * (float("inf") if k == self.bad else 1.0)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("unscales", [False, True], ids=["", "unscaled by the loop"])
def test_a_step_that_a_grad_scaler_skips_neither_counts_nor_acts(fused, unscales):
    net, twin = Scaled(torch.float32), Scaled(torch.float32)
    optimizer, hand_made = adamw(net.parameters(), fused=fused), adamw(split(twin), fused=fused)
    layout = Layout(optimizer)
    decay().attach(optimizer, net)
    scalers = {each: torch.amp.GradScaler("cpu", init_scale=1024.0) for each in (optimizer, hand_made)}

    def step(optimizer, loss):
        optimizer.zero_grad()
        scaler = scalers[optimizer]
        scaler.scale(loss()).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    train(net, optimizer, step=step)
    layout.check()
    train(twin, hand_made, (1.0, 0.0), step=step, last=2)
    for k in range(2, STEPS):  # the step after the one that was skipped has its weight decay
        hand_made.param_groups[0]["weight_decay"] = DECAYS[max(k - 1, 2)]
        train(twin, hand_made, step=step, first=k, last=k + 1)
    assert_identical(weights(net), weights(twin))
    assert scalers[optimizer].get_scale() == scalers[hand_made].get_scale() == 512.0


@pytest.mark.parametrize("make", [adamw, functools.partial(optim.SGD, lr=0.1, momentum=0.9), Plain])
def test_the_step_that_a_distributed_checkpoint_makes_while_it_loads_neither_counts_nor_acts(make):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net, twin = Net(), Net()
    optimizer, hand_made = make(net.parameters()), make(split(twin))
    decay().attach(optimizer, net)
    before = weights(net)
    state = get_optimizer_state_dict(net, optimizer)  # of an optimizer that has none: this steps
    assert_identical(weights(net), before)
    set_optimizer_state_dict(net, optimizer, state)
    optimizer.state.clear()
    assert_identical(train(net, optimizer), train(twin, hand_made, (1.0, 0.0)))


@pytest.mark.parametrize(
    ("is_stepped", "gradient"), [(True, 0.0), (False, None), (False, 1.0)], ids=["no gradient now", "never one", "one"]
)
def test_a_step_at_a_learning_rate_of_zero_counts_where_nothing_is_loaded(is_stepped, gradient):
    """As the first of a warm-up, or the last of a schedule."""
    net, recorder = Net(), Recorder()
    optimizer = adamw(net.parameters())
    if is_stepped:
        train(net, optimizer, last=1)
    watch = Watch(optimizer, recorder)
    optimizer.param_groups[0]["lr"] = 0.0
    for p in net.parameters():
        p.grad = None if gradient is None else torch.full_like(p, gradient)
    optimizer.step()
    assert recorder.calls == [("gradients", 0), ("before", 0), ("after", 0)]
    assert watch.steps == 1
    watch.remove()


def test_a_loop_that_counts_by_itself():
    net, twin, position = Net(), Net(), iter([0, 0, 3, 3, 1, 1, 5, 5])
    optimizer, hand_made = adamw(net.parameters()), adamw(split(twin))
    place = {"now": 0}
    decay().attach(optimizer, net, position=lambda: place["now"])
    del position
    for k, place["now"] in enumerate([0, 3, 1, 5]):
        train(net, optimizer, first=k, last=k + 1)
        hand_made.param_groups[0]["weight_decay"], hand_made.param_groups[1]["weight_decay"] = DECAYS[place["now"]], 0.0
        train(twin, hand_made, first=k, last=k + 1)
    assert_identical(weights(net), weights(twin))


# --------------------------------------------------------------------------------------------------------------------
# Optimizers of another package, where it is installed

PYTORCH_OPTIMIZER = [
    "ADOPT",
    "Ano",
    "APOLLO",
    "ASGD",
    "AccSGD",
    "AdEMAMix",
    "AdaBelief",
    "AdaBound",
    "AdaDelta",
    "AdaFactor",
    "AdaMod",
    "AdaNorm",
    "AdaSmooth",
    "AdaTAM",
    "Adai",
    "Adalite",
    "Adam",
    "AdaMax",
    "AdamC",
    "AdamG",
    "AdamP",
    "AdamS",
    "AdamWSN",
    "Aida",
    "Alice",
    "AggMo",
    "BCOS",
    "Conda",
    "CAME",
    "DAdaptAdaGrad",
    "DAdaptAdam",
    "DAdaptAdan",
    "DAdaptLion",
    "DAdaptSGD",
    "DiffGrad",
    "EXAdam",
    "FAdam",
    "FOCUS",
    "GaLore",
    "Grams",
    "Kron",
    "LARS",
    "Lamb",
    "LaProp",
    "Lion",
    "MADGRAD",
    "MARS",
    "NovoGrad",
    "PAdam",
    "PID",
    "PNM",
    "Prodigy",
    "QHAdam",
    "QHM",
    "RACS",
    "RAdam",
    "RMSprop",
    "Ranger",
    "SCION",
    "SCIONLight",
    "SGD",
    "SGDP",
    "SGDSaI",
    "SGDW",
    "SOAP",
    "SPAM",
    "SPlus",
    "SWATS",
    "SaRA",
    "ScalableShampoo",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Shampoo",
    "SignSGD",
    "SimplifiedAdEMAMix",
    "StableAdamW",
    "TAM",
    "Tiger",
    "VSGD",
    "Yogi",
]


@pytest.mark.parametrize("name", PYTORCH_OPTIMIZER)
@pytest.mark.filterwarnings("ignore")
def test_pytorch_optimizers_equal_hand_made_groups(name):
    package = pytest.importorskip("pytorch_optimizer")
    cls = getattr(package, name, None)
    if cls is None:
        pytest.skip(f"this version has no {name}")
    net, twin = Net(torch.float32), Net(torch.float32)
    optimizer, hand_made = cls(net.parameters()), cls(split(twin))
    layout = Layout(optimizer)
    decay().attach(optimizer, net)
    found = {}
    for side, made, factors in ((net, optimizer, ()), (twin, hand_made, (1.0, 0.0))):
        torch.manual_seed(0)
        np.random.seed(0)  # Kron draws from numpy's own generator
        found[side] = train(side, made, factors, step=step_by_position)
    assert_identical(found[net], found[twin])
    assert optimizer.param_groups is layout.list


AROUND = {
    "Lookahead": lambda package, groups: package.Lookahead(adamw(groups), k=2),
    "OrthoGrad": lambda package, groups: package.OrthoGrad(adamw(groups)),
    "SAM": lambda package, groups: package.SAM(groups, optim.AdamW, lr=0.1),
    "Lookahead of SOAP": lambda package, groups: package.Lookahead(package.SOAP(groups, lr=0.1), k=2),
}


@pytest.mark.parametrize("make", AROUND.values(), ids=AROUND)
@pytest.mark.filterwarnings("ignore")
def test_pytorch_optimizers_around_others_equal_hand_made_groups(make):
    package = pytest.importorskip("pytorch_optimizer")
    net, twin = Net(torch.float32), Net(torch.float32)
    optimizer, hand_made = make(package, ordered(net)), make(package, split(twin))
    decay().attach(optimizer, net)

    def step(optimizer, loss):
        closure = closure_of(optimizer, loss)
        closure()
        return optimizer.step(closure)

    assert_identical(train(net, optimizer, step=step), train(twin, hand_made, (1.0, 0.0), step=step))


# --------------------------------------------------------------------------------------------------------------------
# One entry for each group


class RatesInAList(optim.SGD):
    """Keeps something for each group, and looks it up by the group's number."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, weight_decay=0.01)
        self.rates = self.keep([group["lr"] for group in self.param_groups])

    def keep(self, rates):
        return rates

    def step(self, closure=None):
        for i, group in enumerate(self.param_groups):
            group["lr"] = self.rates[i]
        return super().step(closure)


class RatesInATuple(RatesInAList):
    def keep(self, rates):
        return tuple(rates)


class RatesByNumber(RatesInAList):
    def keep(self, rates):
        return dict(enumerate(rates))


class RatesPaired(RatesInAList):
    def step(self, closure=None):
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] = rate
        return optim.SGD.step(self, closure)


class RatesByName(RatesInAList):
    """In an attribute for each group."""

    def keep(self, rates):
        for i, rate in enumerate(rates):
            setattr(self, f"rate{i}", rate)

    def step(self, closure=None):
        for i, group in enumerate(self.param_groups):
            group["lr"] = getattr(self, f"rate{i}")
        return optim.SGD.step(self, closure)


@pytest.mark.parametrize("cls", [RatesInAList, RatesInATuple, RatesByNumber, RatesPaired, RatesByName])
def test_one_entry_for_each_group_is_told_what_to_do(cls):
    net = Net()
    optimizer = cls(net.parameters())
    layout = Layout(optimizer)
    with decay().attach(optimizer, net):
        with pytest.raises(MisconfigurationException, match=r"shown in parts.*method='decoupled'"):
            train(net, optimizer, ())
        layout.check()
    with WeightDecay(0.1, method="decoupled").attach(optimizer, net):
        train(net, optimizer, ())


@pytest.mark.parametrize("callback", [L1Penalty(0.1), WeightDecay(0.1, exclude=())], ids=["L1", "as many parts"])
@pytest.mark.parametrize("error", [IndexError, ValueError, AttributeError])
def test_an_error_of_an_optimizer_without_parts_stays_its_own(error, callback):
    class Empty(optim.SGD):
        def step(self, closure=None):
            raise error("mine")

    net = Net()
    optimizer = Empty(net.parameters(), lr=0.1)
    with callback.attach(optimizer, net), pytest.raises(error, match=r"^mine$"):
        train(net, optimizer, ())
