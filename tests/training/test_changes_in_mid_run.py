"""Does every callback go on with what there is, when optimizers, parameters and layers are replaced in mid-run?

The oracle is a loop over batches and parameters in float64, in which each callback is one or two lines of arithmetic.
"""

import contextlib
import functools
import gc
import math
import weakref
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import LBFGS, SGD, Adam, RMSprop

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    DropoutSchedule,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
)
from lightning_regularize.projections import Box, FrobeniusBall, MaxNorm
from lightning_regularize.schedules import Cosine, FollowLR, Linear, Position, Steps, Warmup
from tests.training.matrix import Kept
from tests.training.support import (
    QUIET,
    Around,
    Batches,
    Regression,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    weights,
)

pytestmark = QUIET

EPOCHS, BATCHES = 3, 3
STEPS = EPOCHS * BATCHES
sgd = functools.partial(SGD, lr=0.1)
adam = functools.partial(Adam, lr=0.02)


# -- each callback, by hand ------------------------------------------------------------------------------------------


class At(NamedTuple):
    """One parameter in one step by hand; ``memory`` is the parameter's own."""

    parameter: Any
    group: dict
    optimizer: Any
    strength: float
    memory: dict

    @property
    def lr(self):
        return self.group["lr"]


def nothing(at):
    pass


class Member(NamedTuple):
    """A callback, and what it does to one parameter when gradients are complete, before the step, and after it."""

    make: Any
    gradients: Any = nothing
    before: Any = nothing
    after: Any = nothing
    value: Any = None
    acts_on_vectors: bool = False
    start: float = 0.03  # a third of it at the end


def strength(start, step, total_steps=STEPS):
    return start * (1 - 2 / 3 * step / (total_steps - 1))


def length(at):
    """How far the optimizer goes for a steady gradient of 1."""
    if isinstance(at.optimizer, SGD):
        return at.lr / (1 - at.group["momentum"])
    state = at.optimizer.state[at.parameter]
    if isinstance(at.optimizer, RMSprop):
        return at.lr / (state["square_avg"].sqrt() + at.group["eps"])
    return at.lr / ((state["exp_avg_sq"] / (1 - at.group["betas"][1] ** state["step"].item())).sqrt() + at.group["eps"])


def row_norms(weight):
    return weight.square().sum(dim=1, keepdim=True).sqrt()


def add(gradient_of):
    return lambda at: at.parameter.grad.add_(at.strength * gradient_of(at.parameter))


def shrink(to):
    return lambda at: at.parameter.copy_(to(at.parameter, at.strength * length(at)))


def soft(weight, threshold):
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


def soft_rows(weight, threshold):
    return weight * (1 - threshold * math.sqrt(weight.shape[1]) / row_norms(weight)).clamp_min(0)


def lend_a_gradient(at):
    """As SGD and Adam decay: what stands in ``grad`` afterwards is without it."""
    at.memory["gradient"] = at.parameter.grad
    at.parameter.grad = at.parameter.grad + at.strength * at.parameter


def take_it_back(at):
    at.parameter.grad = at.memory["gradient"]


def remember(at):
    at.memory["before"] = at.parameter.clone()


def decay_where_the_step_agrees(at):
    before = at.memory["before"]
    at.parameter.sub_(at.lr * at.strength * before * ((before - at.parameter) * before >= 0))


def decay_by_the_real_step_size(at):
    if isinstance(at.optimizer, SGD):
        root = 1 - at.group["momentum"]
    else:
        squares = []
        for parameter in (p for group in at.optimizer.param_groups for p in group["params"] if p.grad is not None):
            state, beta = at.optimizer.state.get(parameter, {}), at.group["betas"][1]
            seen = state.get("exp_avg_sq", torch.zeros_like(parameter))
            steps = float(state.get("step", 0)) + 1
            squares.append(((beta * seen + (1 - beta) * parameter.grad.square()) / (1 - beta**steps)).flatten())
        root = torch.cat(squares).mean().sqrt()
    at.parameter.mul_(1 - at.lr * at.strength / root)


def pull_to_the_start(at):
    if "start" in at.memory:
        at.parameter.sub_(at.lr * at.strength * (at.parameter - at.memory["start"]))


def decay_by_a_multiplier(at):
    excess = at.parameter.square().sum() - 0.5 * at.memory["first"].square().sum()
    multiplier = (at.memory.get("multiplier", 0.0) + excess / at.parameter.numel()).clamp(0, 0.25)
    at.memory["multiplier"] = multiplier
    at.parameter.mul_(1 - 2 * multiplier)


def limit_rows(at):
    at.parameter.mul_((0.5 / row_norms(at.parameter)).clamp_max(1))


def on_schedule(make, *, start=0.03, **options):
    schedule = Linear(start, start / 3)
    return functools.partial(make, schedule, total_steps=STEPS, **options)


def decay(method, *, start=0.3, **by_hand):
    return Member(on_schedule(WeightDecay, start=start, method=method), start=start, **by_hand)


def penalty(name, method, **by_hand):
    classes = {"l1": L1Penalty, "l2": L2Penalty, "group_lasso": GroupLassoPenalty}
    values = {
        "l1": lambda w: w.abs().sum(),
        "l2": lambda w: w.square().sum() / 2,
        "elastic_net": lambda w: w.abs().sum() / 4 + 3 / 4 * w.square().sum() / 2,
        "group_lasso": lambda w: math.sqrt(w.shape[1]) * row_norms(w).sum(),
    }
    make = on_schedule(classes[name], method=method) if name in classes else elastic_net(method)
    return Member(make, value=(f"penalty/{name}", values[name]), **by_hand)


def elastic_net(method):
    schedule = Linear(1.0, 1 / 3)
    return functools.partial(
        ElasticNetPenalty, 0.03 / 4, l2=0.03 * 3 / 4, schedule=schedule, method=method, total_steps=STEPS
    )


MEMBERS = {
    "optimizer": decay("optimizer", before=lend_a_gradient, after=take_it_back),
    "coupled": decay("coupled", gradients=add(lambda w: w)),
    "decoupled": decay("decoupled", before=lambda at: at.parameter.mul_(1 - at.lr * at.strength)),
    "independent": decay("independent", start=0.03, before=lambda at: at.parameter.mul_(1 - at.strength)),
    "cautious": decay("cautious", before=remember, after=decay_where_the_step_agrees),
    "stable": decay("stable", start=0.1, before=decay_by_the_real_step_size),
    "L1": penalty("l1", "gradient", gradients=add(torch.sign)),
    "L2": penalty("l2", "gradient", gradients=add(lambda w: w)),
    "elastic net": penalty("elastic_net", "gradient", gradients=add(lambda w: w.sign() / 4 + w * 3 / 4)),
    "group lasso": penalty(
        "group_lasso", "gradient", gradients=add(lambda w: math.sqrt(w.shape[1]) * w / row_norms(w))
    ),
    "proximal L1": penalty("l1", "proximal", after=shrink(soft)),
    "proximal L2": penalty("l2", "proximal", after=shrink(lambda w, t: w / (1 + t))),
    "proximal elastic net": penalty(
        "elastic_net", "proximal", after=shrink(lambda w, t: soft(w, t / 4) / (1 + t * 3 / 4))
    ),
    "proximal group lasso": penalty("group_lasso", "proximal", after=shrink(soft_rows)),
    "constraint": Member(lambda: WeightConstraint(MaxNorm(0.5)), after=limit_rows),
    "anchor": Member(on_schedule(AnchorDecay, start=1.0), start=1.0, before=pull_to_the_start, acts_on_vectors=True),
    "constrained": Member(lambda: ConstrainedDecay("start", factor=0.5), after=decay_by_a_multiplier),
    "monitor": Member(lambda: WeightNormMonitor(quantities=("weight", "gradient"))),
}

BUNDLES = {  # each method of each callback once; what acts in one phase does so in this order
    "optimizer": ["optimizer", "L1", "proximal group lasso", "constraint"],
    "coupled": ["coupled", "proximal L2", "anchor"],
    "decoupled": ["elastic net", "decoupled", "constrained", "proximal L1"],
    "independent": ["constraint", "group lasso", "independent", "proximal elastic net"],
    "cautious": ["anchor", "L2", "cautious", "constrained"],
    "stable": ["stable", "constraint", "proximal L2"],
}


class ByHand:
    """A training loop with ``names`` of ``MEMBERS``, without Lightning and without this package.

    Each step accumulates the gradients of a list of batches.
    """

    def __init__(self, module, names, changes, steps=None):
        self.module, self.members, self.memory = module, [MEMBERS[name] for name in names], {}
        self.logged, self.weights = {}, []
        steps = [[batch] for batch in EPOCHS * list(Batches(BATCHES))] if steps is None else steps
        self.total_steps = len(steps)
        optimizer = module.configure_optimizers()
        for parameter in module.parameters():
            self.memory[parameter] = {"first": parameter.detach().clone(), "start": parameter.detach().clone()}
        for step, batches in enumerate(steps):
            optimizer = changes[step](module, optimizer) or optimizer if step in changes else optimizer
            for parameter in module.parameters():
                self.memory.setdefault(parameter, {"first": parameter.detach().clone()})
            self.step(optimizer, step, batches)
            self.weights.append(weights(module))

    def step(self, optimizer, step, batches):
        def closure():
            optimizer.zero_grad()
            loss = sum(map(self.module.loss, batches))
            loss.backward()
            self.log(optimizer, step)
            self.act("gradients", optimizer, step)
            return loss

        if isinstance(optimizer, LBFGS):
            self.act("before", optimizer, step)
            optimizer.step(closure)
        else:
            closure()
            self.act("before", optimizer, step)
            optimizer.step()
        self.act("after", optimizer, step)

    @torch.no_grad()
    def act(self, phase, optimizer, step):
        for member in self.members:
            for group in optimizer.param_groups:
                for parameter in self.trained(group, member):
                    if parameter.grad is not None or (isinstance(optimizer, LBFGS) and phase == "before"):
                        value = strength(member.start, step, self.total_steps)
                        getattr(member, phase)(At(parameter, group, optimizer, value, self.memory[parameter]))

    def trained(self, group, member):
        return [p for p in group["params"] if p.requires_grad and (p.dim() > 1 or member.acts_on_vectors)]

    @torch.no_grad()
    def log(self, optimizer, step):
        """The first evaluation of a closure counts."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        found = {
            "weight_norm/total": sum(p.square().sum() for p in trained).sqrt(),
            "gradient_norm/total": sum(p.grad.square().sum() for p in trained if p.grad is not None).sqrt(),
        }
        for member in self.members:
            penalized = [p for group in optimizer.param_groups for p in self.trained(group, member)]
            if member.value is not None and penalized:
                key, value = member.value
                found[key] = strength(member.start, step, self.total_steps) * sum(map(value, penalized))
        for key, value in found.items():
            self.logged.setdefault(key, {}).setdefault(step, float(value))


# -- the same with Lightning -----------------------------------------------------------------------------------------


class Model(Regression):
    """May edit itself at the beginning of ``training_step``, and may step by hand."""

    def __init__(self, make_optimizer=sgd, *, automatic=True):
        super().__init__(make_optimizer)
        self.automatic_optimization = automatic
        self.edit = None

    def training_step(self, batch, batch_idx):
        if self.edit is not None:
            self.edit()
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if isinstance(optimizer.optimizer, LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        return None


class Place(NamedTuple):
    """Where in the user's code something is changed: before step ``first``, then every so many steps."""

    who: str
    hook: str
    first: int = 0
    every: int = 1


PLACES = {
    **{
        f"{who}, {hook}": Place(who, hook, first, every)
        for who in ("callback before", "callback after", "module")
        for hook, first, every in (
            ("on_train_epoch_start", 0, BATCHES),
            ("on_train_batch_start", 0, 1),
            ("on_train_batch_end", 1, 1),
        )
    },
    "training_step by hand": Place("training_step by hand", "training_step"),
    # The optimizer that is replaced still makes the step of this batch.
    "training_step": Place("training_step", "training_step", first=1),
}
BATCH_START = PLACES["callback before, on_train_batch_start"]


class Weights(L.Callback):
    """The weights after each step, and those that the last step of all has left."""

    def __init__(self):
        self.found, self.last = [], None

    def on_train_batch_end(self, trainer, module, *_):
        self.found.append(weights(module))

    def on_exception(self, trainer, module, exception):
        self.last = weights(module)


class Run:
    """A Trainer with ``names`` of ``MEMBERS`` and the monitor, in which ``changes`` come before steps."""

    def __init__(self, names, changes, place=BATCH_START, make_optimizer=sgd, callbacks=None):
        self.module = Model(make_optimizer, automatic=place.who != "training_step by hand")
        self.callbacks = [MEMBERS[name].make() for name in names] if callbacks is None else callbacks
        self.changes, self.place, self.calls = changes, place, 0
        self.kept, self.witness = Kept(), Weights()

    def fit(self):
        editor, act = L.Callback(), self.edit
        if self.place.hook == "training_step":
            self.module.edit = act
        else:
            setattr(self.module if self.place.who == "module" else editor, self.place.hook, act)
        monitor = [] if any(isinstance(c, WeightNormMonitor) for c in self.callbacks) else [MEMBERS["monitor"].make()]
        ours = [*monitor, *self.callbacks]
        order = [*ours, editor] if self.place.who == "callback after" else [editor, *ours]
        self.trainer = make_trainer(self.witness, *order, logger=self.kept, max_epochs=EPOCHS)
        self.trainer.fit(self.module, Batches(BATCHES))
        return self

    @property
    def ours(self):
        return [c for c in self.trainer.callbacks if type(c).__module__.startswith("lightning_regularize.")]

    def edit(self, *_):
        step = self.place.first + self.calls * self.place.every
        self.calls += 1
        if step in self.changes:
            (optimizer,) = self.trainer.strategy.optimizers
            changed = self.changes[step](self.module, optimizer)
            if changed is not None:
                self.trainer.strategy.optimizers = [changed]
            self.edited = weights(self.module)


def assert_goes_on(names, changes, place=BATCH_START, make_optimizer=sgd):
    """A run in which something changes has the weights and logged values of the loop by hand."""
    assert_equal(Run(names, changes, place, make_optimizer).fit(), ByHand(Model(make_optimizer), names, changes))


def assert_equal(run, expected):
    for found, right in zip(run.witness.found, expected.weights, strict=True):
        assert_same_weights(found, right, atol=1e-11)
    for key, values in expected.logged.items():
        assert run.kept.values[key] == pytest.approx(values, rel=1e-6, abs=1e-9), key


def says_that_there_is_no_anchor(names):
    """An anchor made of the weights at the start has none for what is new in the model."""
    if "anchor" in names:
        return pytest.warns(UserWarning, match=r"AnchorDecay has no anchor for '.*', which is new")
    return contextlib.nullcontext()


# -- B1: another optimizer -------------------------------------------------------------------------------------------


def momentum(module, optimizer):
    return SGD(module.parameters(), lr=0.05, momentum=0.9)


def nesterov(module, optimizer):
    return SGD(module.parameters(), lr=0.02, momentum=0.5, nesterov=True)


def to_adam(module, optimizer):
    return adam(module.parameters())


def to_rmsprop(module, optimizer):
    return RMSprop(module.parameters(), lr=0.01)


def to_lbfgs(module, optimizer):
    return LBFGS(module.parameters(), lr=0.1, max_iter=3)


def to_two_groups(module, optimizer):
    groups = [{"params": [*module.output.parameters()], "lr": 0.01}]
    return SGD([{"params": [*module.hidden.parameters(), *module.norm.parameters()]}, *groups], lr=0.05)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_goes_on_with_another_optimizer_wherever_it_comes_from(bundle, place):
    names, place = BUNDLES[bundle], PLACES[place]
    changes = {3: momentum, 6: nesterov} if place.every > 1 else {4: momentum, 8: nesterov}
    assert_goes_on(names, changes, place)


@pytest.mark.parametrize("place", ["callback after, on_train_batch_start", "training_step by hand"])
@pytest.mark.parametrize("name", MEMBERS)
def test_goes_on_alone_with_another_optimizer(name, place):
    assert_goes_on([name], {4: momentum}, PLACES[place])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_acts_in_the_order_of_callbacks_on_an_optimizer_that_one_of_them_has_brought(place):
    """The callback behind that one sees it first."""

    class Bring(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.strategy.optimizers = [momentum(module, None)]

    found = []
    for at in (0, place):
        callbacks = [WeightConstraint(MaxNorm(0.1)), L1Penalty(0.005, method="proximal")]
        callbacks.insert(at, Bring())
        make_trainer(*callbacks, max_epochs=2).fit(module := Model(sgd), Batches(BATCHES))
        found.append(weights(module))
    assert_identical_weights(*found)


@pytest.mark.parametrize("change", [to_two_groups, to_adam, to_rmsprop], ids=lambda change: change.__name__)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_goes_on_with_an_optimizer_of_another_class(bundle, change):
    scaled = change is not to_two_groups  # each weight has its own step length
    names = [n for n in BUNDLES[bundle] if not (scaled and n == "proximal group lasso")]
    names = [n for n in names if not (change is to_rmsprop and n == "stable")]
    assert_goes_on(names, {4: change})


WITH_LBFGS = [
    name for name in MEMBERS if not name.startswith("proximal") and name not in ("optimizer", "stable", "monitor")
]


@pytest.mark.parametrize("place", ["callback after, on_train_epoch_start", "training_step by hand"])
@pytest.mark.parametrize("name", WITH_LBFGS)
def test_goes_on_from_adam_to_lbfgs(name, place):
    assert_goes_on([name], {3: to_lbfgs}, PLACES[place], adam)


@pytest.mark.parametrize("place", ["callback before, on_train_batch_start", "training_step by hand"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer", "LBFGS has no `weight_decay` .*decoupled"),
        ("stable", "Stable weight decay .*LBFGS"),
        ("proximal L1", "LBFGS.*method='gradient'"),
        ("proximal group lasso", "LBFGS.*method='gradient'"),
    ],
)
def test_what_cannot_work_with_lbfgs_is_refused_before_it_steps(name, message, place):
    run = Run([name], {4: to_lbfgs}, PLACES[place], make_optimizer=adam)
    with pytest.raises(MisconfigurationException, match=message):
        run.fit()
    assert len(run.witness.found) == 4
    assert_identical_weights(run.witness.last, run.witness.found[-1])


@pytest.mark.parametrize("name", ["L1", "L2", "group lasso"])
def test_the_gradient_of_a_penalty_is_refused_by_an_optimizer_that_climbs(name):
    def change(module, optimizer):
        return SGD(module.parameters(), lr=0.1, maximize=True)

    run = Run([name], {4: change})
    with pytest.raises(MisconfigurationException, match=r"maximize=True.*method='proximal'"):
        run.fit()
    assert_identical_weights(run.witness.last, run.witness.found[-1])


EXCHANGES = {
    "by itself": (lambda new: new, lambda optimizer, new: new),
    "in another one": (Around, lambda optimizer, new: Around(new)),
    "in the same one": (Around, lambda optimizer, new: optimizer.use(new)),
}


@pytest.mark.parametrize("place", [BATCH_START, PLACES["module, on_train_batch_end"]], ids=["start", "end"])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("peak", [0.1, 0.4], ids="lr {}".format)
def test_the_optimizers_own_decay_has_the_groups_of_the_new_optimizer(peak, exchange, place):
    """Bit for bit as by hand-made groups, with AdamW's own decoupled decay."""
    wrap, put = EXCHANGES[exchange]

    def made(*params):
        return torch.optim.AdamW(params, lr=peak, amsgrad=True)

    def change(module, optimizer):
        return put(optimizer, made(*module.parameters()))

    callbacks = [WeightDecay(Linear(0.3, 0.1))]
    run = Run([], {4: change}, place, callbacks=callbacks, make_optimizer=lambda p: wrap(made(*p))).fit()
    twin = Model()

    def split():
        matrices, others = [twin.hidden.weight, twin.output.weight], []
        others = [p for p in twin.parameters() if all(p is not matrix for matrix in matrices)]
        return made({"params": matrices}, {"params": others, "weight_decay": 0.0})

    for step, batch in enumerate(EPOCHS * list(Batches(BATCHES))):
        if step in (0, 4):
            optimizer = split()
        optimizer.param_groups[0]["weight_decay"] = Linear(0.3, 0.1)(Position(step, STEPS))
        optimizer.zero_grad()
        twin.loss(batch).backward()
        optimizer.step()
    assert_identical_weights(weights(run.module), weights(twin))


# -- B2: other layers ------------------------------------------------------------------------------------------------


def fresh(layer, seed=7):
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.empty_like(parameter, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    return layer


def pruned(module, optimizer):
    """The last hidden unit goes, as structured pruning does it."""
    hidden, norm, output = nn.Linear(3, 3).double(), nn.LayerNorm(3).double(), nn.Linear(3, 2).double()
    kept = {"hidden": hidden, "norm": norm, "output": output}
    for name, layer in kept.items():
        before = getattr(module, name)
        layer.weight.data = (before.weight[:, :3] if name == "output" else before.weight[:3]).detach().clone()
        layer.bias.data = before.bias[: len(layer.bias)].detach().clone()
        setattr(module, name, layer)
    return sgd(module.parameters())


def grown(module, optimizer):
    """Two more hidden units."""
    for name, layer in {"hidden": nn.Linear(3, 6), "norm": nn.LayerNorm(6), "output": nn.Linear(6, 2)}.items():
        before, after = getattr(module, name).weight.detach(), fresh(layer.double())
        after.weight.data[tuple(map(slice, before.shape))] = before
        setattr(module, name, after)
    return SGD(module.parameters(), lr=0.05, momentum=0.5)


def one_layer_new(module, optimizer):
    module.output = fresh(nn.Linear(4, 2).double())
    return sgd(module.parameters())


def deeper(module, optimizer):
    module.output = nn.Sequential(module.output, fresh(nn.Linear(2, 5).double()), fresh(nn.Linear(5, 2).double()))
    return sgd(module.parameters())


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (pruned, "module, on_train_epoch_start"),
        (grown, "callback after, on_train_batch_end"),
        (one_layer_new, "callback before, on_train_epoch_start"),
        (deeper, "training_step by hand"),
    ],
    ids=["pruned", "grown", "one new", "deeper"],
)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_acts_on_new_layers_from_the_next_step_on(bundle, change, place):
    names = BUNDLES[bundle]
    with says_that_there_is_no_anchor(names):
        assert_goes_on(names, {3: change}, PLACES[place])


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_model_that_grows_each_epoch_is_followed(bundle):
    names, changes = BUNDLES[bundle], {2: deeper, 3: one_layer_new, 5: grown, 6: pruned, 8: deeper}
    with says_that_there_is_no_anchor(names):
        assert_goes_on(names, changes)


def test_parts_of_a_new_model_are_logged_by_their_names():
    monitor = WeightNormMonitor(detail="parameter")
    run = Run([], {4: deeper}, callbacks=[monitor]).fit()
    steps = {key: sorted(values) for key, values in run.kept.values.items()}
    assert steps["weight_norm/hidden.weight"] == list(range(9))
    assert steps["weight_norm/output.weight"] == [0, 1, 2, 3]
    assert steps["weight_norm/output.0.weight"] == steps["weight_norm/output.2.bias"] == [4, 5, 6, 7, 8]


# -- B3: other parameters in the groups ------------------------------------------------------------------------------


def swap(optimizer, module, name, parameter):
    """As densification does it: a new parameter in the module, in its group, and with the state of the old one."""
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    old = getattr(layer, leaf)
    setattr(layer, leaf, parameter)
    for group in optimizer.param_groups:
        group["params"] = [parameter if p is old else p for p in group["params"]]
    optimizer.state[parameter] = optimizer.state.pop(old, {})


def same_values(module, optimizer):
    swap(optimizer, module, "hidden.weight", nn.Parameter(module.hidden.weight.detach().clone()))


def other_values(module, optimizer):
    swap(optimizer, module, "output.weight", nn.Parameter(0.5 + module.output.weight.detach()))


def all_of_them(module, optimizer):
    for name, parameter in list(module.named_parameters()):
        swap(optimizer, module, name, nn.Parameter(2 * parameter.detach()))


def in_the_list_itself(module, optimizer):
    old, module.hidden.weight = module.hidden.weight, nn.Parameter(-module.hidden.weight.detach())
    (group,) = optimizer.param_groups
    group["params"][[p is old for p in group["params"]].index(True)] = module.hidden.weight


def of_another_shape(module, optimizer):
    pruned(module, optimizer)
    optimizer.param_groups[0]["params"][:] = module.parameters()
    optimizer.state.clear()


def pruned_for_good(module, optimizer):
    prune.l1_unstructured(module.hidden, "weight", amount=2)
    prune.remove(module.hidden, "weight")


PARAMETERS = {
    "same values": {4: same_values},
    "other values": {3: other_values},
    "in the list": {4: in_the_list_itself},
    "of another shape": {5: of_another_shape},
    "several times": {2: same_values, 3: all_of_them, 4: other_values, 6: all_of_them, 7: in_the_list_itself},
    "before each step": dict.fromkeys(range(1, STEPS), all_of_them),
}


@pytest.mark.parametrize("changes", PARAMETERS)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_acts_on_parameters_that_are_replaced_in_their_group(bundle, changes):
    names, make_optimizer = BUNDLES[bundle], functools.partial(SGD, lr=0.05, momentum=0.5)
    with says_that_there_is_no_anchor(names):
        assert_goes_on(names, PARAMETERS[changes], make_optimizer=make_optimizer)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_acts_on_a_weight_that_is_pruned_for_good(bundle):
    assert_goes_on(BUNDLES[bundle], {2: pruned_for_good, 5: pruned_for_good})


@pytest.mark.parametrize("change", [same_values, all_of_them], ids=lambda change: change.__name__)
def test_a_given_anchor_holds_for_the_parameter_that_replaces_another(change):
    anchor = {name: 0.1 + weight for name, weight in weights(Model()).items()}
    run = Run([], {4: change}, callbacks=[AnchorDecay(1.0, anchor=anchor)]).fit()
    twin = Model()
    optimizer = sgd(twin.parameters())
    for step, batch in enumerate(EPOCHS * list(Batches(BATCHES))):
        if step == 4:
            change(twin, optimizer)
        optimizer.zero_grad()
        twin.loss(batch).backward()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.sub_(0.1 * (parameter - anchor[name]))
        optimizer.step()
    assert_same_weights(weights(run.module), weights(twin))


def of_some(parameters):
    """An optimizer of two hidden parameters: the norm's and the output's are not trained yet."""
    return SGD([*parameters][:2], lr=0.1, momentum=0.5)


def extended(module, optimizer):
    optimizer.param_groups[0]["params"].extend(module.output.parameters())


def inserted_in_front(module, optimizer):
    optimizer.param_groups[0]["params"][:0] = [*module.output.parameters(), *module.norm.parameters()]


def a_new_list(module, optimizer):
    group = optimizer.param_groups[0]
    group["params"] = [module.norm.weight, *group["params"], module.norm.bias]


def a_group_more(module, optimizer):
    optimizer.add_param_group({"params": [*module.output.parameters()], "lr": 0.03})


class LazyScale(LazyModuleMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.UninitializedParameter()

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            self.scale.materialize(x.shape[-1:])
            nn.init.ones_(self.scale)

    def forward(self, x):
        return x * self.scale


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    "callback",
    [WeightDecay(0.5), WeightDecay(0.5, method="decoupled"), L1Penalty(0.1), L2Penalty(0.1, method="proximal")],
    ids=repr,
)
def test_what_a_lazy_parameter_is_is_looked_at_again_when_it_has_a_shape(callback):
    module = nn.Sequential(nn.LazyLinear(2), LazyScale())
    optimizer = sgd(module.parameters())
    with callback.attach(optimizer, module):
        (0.0 * module(torch.ones(1, 3))).sum().backward()
        before = weights(module)
        optimizer.step()
    assert torch.equal(module[1].scale, before["1.scale"])
    assert not torch.equal(module[0].weight, before["0.weight"])


APPENDED = {
    "extended": {4: extended},
    "in front": {3: inserted_in_front},
    "a new list": {5: a_new_list, 7: a_group_more},
    "a new layer in a group": {3: extended, 6: lambda m, o: o.add_param_group({"params": [*m.norm.parameters()]})},
}


@pytest.mark.parametrize("changes", APPENDED)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_acts_on_parameters_that_a_group_gets(bundle, changes):
    assert_goes_on(BUNDLES[bundle], APPENDED[changes], make_optimizer=of_some)


def by_layer(parameters):
    """One group a layer."""
    hidden_and_output = list(parameters)
    pairs = [hidden_and_output[i : i + 2] for i in range(0, len(hidden_and_output), 2)]
    return SGD([{"params": pair, "lr": 0.1 / (i + 1)} for i, pair in enumerate(pairs)], lr=0.1)


def without_the_last(module, optimizer):
    del optimizer.param_groups[-1]


def without_the_first(module, optimizer):
    optimizer.param_groups = optimizer.param_groups[1:]


def reversed_in_place(module, optimizer):
    optimizer.param_groups[:] = optimizer.param_groups[::-1]


def an_empty_group(module, optimizer):
    optimizer.param_groups[0]["params"].clear()


def one_parameter_less(module, optimizer):
    optimizer.param_groups[2]["params"].pop(0)


REMOVED = {
    "the first": {3: without_the_first},
    "reversed": {4: reversed_in_place},
    "emptied": {5: an_empty_group},
    "a parameter": {4: one_parameter_less},
    "and back": {3: without_the_last, 6: lambda m, o: o.add_param_group({"params": [*m.output.parameters()]})},
}


@pytest.mark.parametrize("changes", REMOVED)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_leaves_alone_what_is_removed_from_the_groups(bundle, changes):
    assert_goes_on(BUNDLES[bundle], REMOVED[changes], make_optimizer=by_layer)


def freeze(module, optimizer):
    module.hidden.requires_grad_(False)


def unfreeze(module, optimizer):
    module.requires_grad_(True)


def freeze_all_but_one(module, optimizer):
    module.requires_grad_(False)
    module.output.bias.requires_grad_(True)


def freeze_a_group(module, optimizer):
    for parameter in optimizer.param_groups[-1]["params"]:
        parameter.requires_grad_(False)


FROZEN = {
    "unfreeze": {0: freeze, 5: unfreeze},
    "and back": {2: freeze, 5: unfreeze, 7: freeze_all_but_one},
    "the last group": {1: freeze_a_group, 6: unfreeze},
}


@pytest.mark.parametrize("changes", FROZEN)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_leaves_frozen_parameters_alone_and_acts_again_when_they_are_trained(bundle, changes):
    assert_goes_on(BUNDLES[bundle], FROZEN[changes], make_optimizer=by_layer)


# -- B4: masks and parametrizations ----------------------------------------------------------------------------------


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def masked(module, optimizer):
    prune.l1_unstructured(module.hidden, "weight", amount=0.5)


def masked_rows(module, optimizer):
    prune.ln_structured(module.output, "weight", amount=1, n=2, dim=0)


def masked_by_hand(module, optimizer):
    prune.custom_from_mask(module.hidden, "weight", torch.eye(4, 3))


def parametrized(module, optimizer):
    parametrize.register_parametrization(module.hidden, "weight", Tripled())


def weight_norm(module, optimizer):
    parametrizations.weight_norm(module.hidden)
    return sgd(module.parameters())


def spectral_norm(module, optimizer):
    nn.utils.spectral_norm(module.output)


MASKS = [masked, masked_rows, masked_by_hand, parametrized, weight_norm, spectral_norm]
PROJECTIONS = {"MaxNorm": MaxNorm(0.3), "FrobeniusBall": FrobeniusBall(0.5), "Box": Box(0.05, 0.2)}
INSIDE = {
    "MaxNorm": lambda weight: row_norms(weight).max() <= 0.3 + 1e-9,
    "FrobeniusBall": lambda weight: weight.norm() <= 0.5 + 1e-9,
    "Box": lambda weight: weight.min() >= 0.05 and weight.max() <= 0.2,
}


def used_weights(module):
    """As a forward pass computes them."""
    module.loss(Batches(1).batches[0])
    return [module.hidden.weight.detach(), module.output.weight.detach()]


def assert_refused_before_weights_changed_or_inside(run, projection):
    try:
        run.fit()
    except MisconfigurationException as error:
        assert "WeightConstraint" in str(error)  # noqa: PT017 (either way is right)
        assert_identical_weights(run.witness.last, run.edited)
    else:
        assert all(map(INSIDE[projection], used_weights(run.module)))


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_that_is_masked_in_mid_run_is_refused_or_constrained(place):
    place = PLACES[place]
    run = Run([], {3 if place.every > 1 else 4: masked}, place, callbacks=[WeightConstraint(MaxNorm(0.3))])
    assert_refused_before_weights_changed_or_inside(run, "MaxNorm")


@pytest.mark.parametrize("change", MASKS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_what_is_computed_from_a_stored_weight_in_mid_run_is_refused_or_constrained(projection, change):
    run = Run([], {5: change}, callbacks=[WeightConstraint(PROJECTIONS[projection])])
    assert_refused_before_weights_changed_or_inside(run, projection)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "options", [{}, {"use_global_unstructured": False, "amount": 0.3}, {"make_pruning_permanent": False}], ids=str
)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_model_pruning_in_mid_run_is_refused_or_constrained(projection, options, order):
    run = Run([], {}, callbacks=[WeightConstraint(PROJECTIONS[projection])])
    layers = [(run.module.hidden, "weight"), (run.module.output, "weight")]
    pruning = ModelPruning("l1_unstructured", layers, **{"amount": 0.5, **options})
    run.callbacks = [pruning, *run.callbacks] if order == "before" else [*run.callbacks, pruning]
    run.edited = None
    run.witness.on_train_epoch_start = lambda trainer, module: vars(run).update(edited=weights(module))
    assert_refused_before_weights_changed_or_inside(run, projection)


# -- D2, D3: the number of steps -------------------------------------------------------------------------------------


class Several(Model):
    """Steps by hand: after every so many batches, or so many times a batch."""

    def __init__(self, every=1, times=1):
        super().__init__(automatic=False)
        self.every, self.times, self.drop = every, times, nn.Dropout(0.1)
        self.seen = 0

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(self.times):
            if self.seen % self.every == 0:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if (self.seen + 1) % self.every == 0:
                optimizer.step()
        self.seen += 1


SCHEDULED = {
    "WeightDecay": WeightDecay,
    "GroupLassoPenalty(proximal)": functools.partial(GroupLassoPenalty, method="proximal"),
    "ElasticNetPenalty": lambda schedule, **options: ElasticNetPenalty(0.1, 0.1, schedule=schedule, **options),
    "AnchorDecay": AnchorDecay,
    "DropoutSchedule": DropoutSchedule,
}
each_scheduled = pytest.mark.parametrize("name", SCHEDULED)


def class_of(name):
    return name.partition("(")[0]


def fit(module, *callbacks, data=BATCHES, **options):
    trainer = make_trainer(*callbacks, **{"max_epochs": EPOCHS, **options})
    trainer.fit(module, None if data is None else Batches(data))
    return trainer


@pytest.mark.parametrize("schedule", [Linear(0.3, 0.0), Cosine(0.1, 0.2), Warmup(Cosine(0.3, 0.1), steps=2)], ids=repr)
@each_scheduled
def test_a_schedule_asks_for_the_number_of_steps_in_manual_optimization(name, schedule):
    with pytest.raises(MisconfigurationException, match=rf"{class_of(name)}.*give `total_steps`"):
        fit(Several(every=4), SCHEDULED[name](schedule))


@pytest.mark.parametrize("schedule", [0.1, Steps([0.3, 0.1], [5]), FollowLR(0.1)], ids=repr)
@each_scheduled
def test_what_needs_no_end_does_not_ask(name, schedule):
    fit(Several(every=2), SCHEDULED[name](schedule))


@pytest.mark.parametrize(
    ("every", "times", "steps"),
    [(3, 1, 3), (1, 1, 9), (1, 5, 45), (2, 1, 4)],
    ids=["every third batch", "each batch", "five a batch", "every second batch"],
)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_schedule_follows_the_steps_that_are_made_by_hand(bundle, every, times, steps):
    names = [name for name in BUNDLES[bundle] if name not in ("constraint", "constrained")]
    module, batches = Several(every, times), EPOCHS * list(Batches(BATCHES))
    fit(module, *[MEMBERS[name].make(total_steps=steps) for name in names])
    of_steps = [batches[i : i + every] for i in range(0, len(batches) - every + 1, every) for _ in range(times)]
    expected = ByHand(Several(), names, {}, of_steps)
    assert_same_weights(weights(module), expected.weights[-1])


@pytest.mark.parametrize(
    ("module", "total_steps", "message"),
    [
        (
            functools.partial(Several, every=2),
            9,
            "training has ended after 4 steps of 9, before .* has reached its end",
        ),
        (functools.partial(Several, times=5), 9, "was over after 9 steps, and the optimizer made 45"),
        (functools.partial(Several, every=3), 2, "was over after 2 steps, and the optimizer made 3"),
        (Model, 20, "training has ended after 9 steps of 20, before .* has reached its end"),
        (Model, 8, "was over after 8 steps, and the optimizer made 9"),
    ],
    ids=["every second batch", "five a batch", "every third batch", "automatic, long", "automatic, short"],
)
@each_scheduled
def test_a_schedule_that_does_not_fit_the_run_is_told_at_the_end(name, module, total_steps, message):
    module = module()
    module.drop = nn.Dropout(0.1)
    with pytest.warns(UserWarning, match=f"{class_of(name)}: .*{message}"):
        fit(module, SCHEDULED[name](Linear(0.1, 0.2), total_steps=total_steps))


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"fast_dev_run": 2}, {"max_steps": 5}, {"limit_train_batches": 1}, {"accumulate_grad_batches": 2}],
    ids=str,
)
@each_scheduled
def test_a_run_that_is_stopped_or_known_to_be_short_is_not(name, options):
    module = Model()
    module.drop = nn.Dropout(0.1)
    fit(module, SCHEDULED[name](Linear(0.1, 0.2)), *([] if options else [Stop()]), **options)


class Changing(Model):
    """Has other data in each epoch."""

    def __init__(self, *counts):
        super().__init__()
        self.counts, self.drop = counts, nn.Dropout(0.1)

    def train_dataloader(self):
        return Batches(self.counts[self.trainer.current_epoch])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((2, 3, 4), "was over after 6 steps, and the optimizer made 9"),
        ((2, 2, 3), "was over after 6 steps, and the optimizer made 7"),
        ((4, 3, 2), "training has ended after 9 steps of 12, before .* has reached its end"),
        ((3, 2, 4), None),
    ],
    ids=str,
)
@each_scheduled
def test_data_that_grow_or_shrink_are_told_at_the_end(name, counts, message):
    callback = SCHEDULED[name](Linear(0.1, 0.2))
    told = contextlib.nullcontext()
    if message is not None:
        told = pytest.warns(UserWarning, match=f"{class_of(name)}: .*{message}")
    with told:
        fit(Changing(*counts), callback, data=None, reload_dataloaders_every_n_epochs=1)


# -- B5: a second fit ------------------------------------------------------------------------------------------------


class Pair(L.LightningModule):
    """Models with an optimizer each; the second steps with every second batch, the third with every third."""

    def __init__(self, count=2):
        super().__init__()
        self.models = nn.ModuleList([Regression() for _ in range(count)])
        self.automatic_optimization = False
        self.fails_at = None

    def configure_optimizers(self):
        return [sgd(model.parameters()) for model in self.models]

    def training_step(self, batch, batch_idx):
        for i, (model, optimizer) in enumerate(zip(self.models, self.optimizers(), strict=True)):
            if batch_idx % (i + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward(model.loss(batch))
                if (self.trainer.current_epoch, batch_idx) == self.fails_at:
                    raise RuntimeError("fails on purpose")
                optimizer.step()


def fit_pair(module, callbacks, **options):
    kept = Kept()
    trainer = fit(module, *callbacks, logger=kept, **options)
    return trainer, kept.values


@pytest.mark.filterwarnings("ignore:.*training has ended after .* steps of .*:UserWarning")
@pytest.mark.parametrize("first", ["complete", "an exception", "three optimizers"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_second_fit_of_a_callback_begins_anew(bundle, first):
    used, new = ([MEMBERS[name].make() for name in BUNDLES[bundle]] for _ in range(2))
    before = Pair(3 if first == "three optimizers" else 2)
    if first == "an exception":
        before.fails_at = (1, 1)
        with pytest.raises(RuntimeError, match="on purpose"):
            fit_pair(before, used)
    else:
        fit_pair(before, used)
    module, twin = Pair(), Pair()
    _, found = fit_pair(module, used)
    _, expected = fit_pair(twin, new)
    assert_identical_weights(weights(module), weights(twin))
    assert found == expected


@pytest.mark.filterwarnings("ignore:.*training has ended after .* steps of .*:UserWarning")
@pytest.mark.parametrize("name", ["optimizer", "decoupled", "coupled", "independent", "cautious", "stable"])
def test_another_fit_of_one_trainer_goes_on_at_the_step_of_each_optimizer(name):
    names = [name, "L1", "proximal L2"]
    whole, twice = Pair(), Pair()
    _, expected = fit_pair(whole, [MEMBERS[name].make() for name in names])
    trainer, values = fit_pair(twice, [MEMBERS[name].make() for name in names], max_epochs=1)
    trainer.fit_loop.max_epochs = EPOCHS
    trainer.fit(twice, Batches(BATCHES))
    assert_identical_weights(weights(twice), weights(whole))
    assert values == expected


# -- H9: what is gone is let go --------------------------------------------------------------------------------------


@pytest.fixture
def _frozen_garbage():
    """Of the objects that are there already nothing is collected, which would take most of the time.

    They stay frozen: ``gc.unfreeze`` would also release what conftest.py froze for all tests.
    """
    gc.collect()
    gc.freeze()


class Alive(L.Callback):
    """Which of what ``references`` point to is alive when training ends?"""

    def __init__(self, references):
        self.references = references

    def on_train_end(self, trainer, module):
        gc.collect()
        self.found = [kind for kind, reference in self.references if reference() is not None]


def noting(change, references):
    """The same change; ``references`` get what is there before."""

    def noted(module, optimizer):
        references.append(("optimizer", weakref.ref(optimizer)))
        references.extend(("parameter", weakref.ref(parameter)) for parameter in module.parameters())
        return change(module, optimizer)

    return noted


@pytest.mark.usefixtures("_frozen_garbage")
@pytest.mark.parametrize(
    ("change", "gone"),
    [(momentum, {"optimizer"}), (grown, {"optimizer", "parameter"}), (all_of_them, {"parameter"})],
    ids=["optimizer", "layers and optimizer", "parameters"],
)
@pytest.mark.parametrize("bundle", ["the monitor alone", *BUNDLES])
def test_what_is_replaced_is_let_go_while_the_run_goes_on(bundle, change, gone):
    names, references = BUNDLES.get(bundle, []), []
    run, alive = Run(names, {4: noting(change, references)}), Alive(references)
    run.callbacks.append(alive)
    with says_that_there_is_no_anchor(names if "parameter" in gone else []):
        run.fit()
    assert {kind for kind, _ in references} == {"optimizer", "parameter"}
    assert not set(alive.found) & gone


@pytest.mark.usefixtures("_frozen_garbage")
@pytest.mark.parametrize("ending", ["end", "exception"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_callbacks_that_are_kept_hold_nothing_of_the_run(bundle, ending):
    def fit_and_keep():
        run = Run(BUNDLES[bundle], {4: momentum})
        if ending == "exception":
            run.changes[6] = lambda module, optimizer: 1 / 0
            with pytest.raises(ZeroDivisionError):
                run.fit()
        else:
            run.fit()
        things = {"module": run.module, "trainer": run.trainer, "optimizer": run.trainer.optimizers[0]}
        things |= dict(run.module.named_parameters())
        return run.ours, {name: weakref.ref(thing) for name, thing in things.items()}

    kept, references = fit_and_keep()
    gc.collect()
    assert [name for name, reference in references.items() if reference() is not None] == []
    assert len(kept) == len(BUNDLES[bundle]) + 1


# -- a new optimizer of the old one's groups -------------------------------------------------------------------------


class Remakes(L.Callback):
    """Makes a new optimizer of what the old one's groups hold."""

    def __init__(self, groups_of):
        self.groups_of = groups_of

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch:
            (old,) = trainer.strategy.optimizers
            trainer.strategy.optimizers = [SGD(self.groups_of(old), lr=0.1)]


@pytest.mark.parametrize(
    "groups_of",
    [
        lambda old: old.param_groups,
        lambda old: [dict(group) for group in old.param_groups],
        lambda old: [{key: group[key] for key in ("params", "weight_decay")} for group in old.param_groups],
    ],
    ids=["its groups", "copies of its groups", "parameters and weight decay"],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_what_was_given_is_known_to_an_optimizer_made_of_the_groups(groups_of, is_last):
    """The scheduled value in the groups is not taken for one that the user gave: 0.2 and 0.1 keep their ratio."""

    def make(parameters):
        first, *rest = parameters
        return SGD([{"params": [first], "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.1}], lr=0.1)

    module, callbacks = Regression(make), [WeightDecay(Linear(0.0, 0.8), exclude=()), Remakes(groups_of)]
    trainer = make_trainer(*(callbacks if is_last else reversed(callbacks)), max_epochs=EPOCHS)
    shown = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            shown.append([group["weight_decay"] for group in optimizer.param_groups])

    trainer.callbacks.append(Look())
    trainer.fit(module, Batches(count=BATCHES))
    assert all(second == pytest.approx(first / 2, rel=1e-12, abs=0) for first, second in shown)
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.2, 0.1]


# -- optimizers that come back -----------------------------------------------------------------------------------------


class Alternates(L.Callback):
    """Lets two optimizers take turns by epoch."""

    def __init__(self, make):
        self.make = make

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.both = trainer.strategy.optimizers[0], self.make(pl_module.parameters())
        trainer.strategy.optimizers = [self.both[trainer.current_epoch % 2]]


@pytest.mark.parametrize("rule", [sgd, adam, functools.partial(RMSprop, lr=0.01)], ids=["SGD", "Adam", "RMSprop"])
def test_an_optimizer_that_comes_back_decays_as_before(rule):
    def make(parameters):
        first, *rest = parameters
        return rule([{"params": [first]}, {"params": rest}], weight_decay=0.01)

    def by_hand(parameters):
        parameters = list(parameters)
        decays = [0.05, *(0.5 if p.dim() > 1 else 0.0 for p in parameters[1:])]
        return rule([{"params": [p], "weight_decay": d} for p, d in zip(parameters, decays, strict=True)])

    module, twin, alternates = Regression(make), Regression(by_hand), Alternates(make)
    callbacks = [alternates, WeightDecay(0.5, factors={"hidden.weight": 0.1})]
    make_trainer(*callbacks, max_epochs=4).fit(module, Batches(count=BATCHES))
    make_trainer(Alternates(by_hand), max_epochs=4).fit(twin, Batches(count=BATCHES))
    assert_identical_weights(weights(module), weights(twin))
    for optimizer in alternates.both:
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01]
        assert "_regularizer" not in vars(optimizer)


# -- somebody else writes between steps --------------------------------------------------------------------------------


class WritesDecay(torch.optim.lr_scheduler.LRScheduler):
    """Schedules a weight decay of its own."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.9
        return [group["lr"] for group in self.optimizer.param_groups]


class WritesAtBatchEnd(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.9


class WritesAtEpochEnd(L.Callback):
    def on_train_epoch_end(self, trainer, *_):
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.9


@pytest.mark.parametrize(
    ("scheduler", "callbacks"),
    [(WritesDecay, []), (None, [WritesAtBatchEnd()]), (None, [WritesAtEpochEnd()])],
    ids=["a scheduler", "at the end of a batch", "at the end of an epoch"],
)
def test_what_somebody_writes_between_steps_is_told(scheduler, callbacks):
    module, twin = Regression(sgd, scheduler), Regression(sgd)
    with pytest.warns(UserWarning, match=r"Somebody has set weight_decay=0\.9 in group 'pg1' of SGD"):
        make_trainer(*callbacks, WeightDecay(Linear(0.5, 0.1)), max_epochs=2).fit(module, Batches(count=BATCHES))
    make_trainer(WeightDecay(Linear(0.5, 0.1)), max_epochs=2).fit(twin, Batches(count=BATCHES))
    assert_identical_weights(weights(module), weights(twin))


# -- a batch that an exception ends ------------------------------------------------------------------------------------


class FailsOnce(Regression):
    has_failed = False

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.trainer.global_step == 2 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("on purpose")


def test_values_of_a_batch_that_failed_are_not_logged_by_the_next_run():
    module, kept = FailsOnce(sgd), Kept()
    trainer = make_trainer(L1Penalty(0.1), WeightDecay(0.5), max_epochs=1, logger=kept)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, Batches(count=BATCHES))
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, L1Penalty)]
    trainer.fit_loop.max_epochs = 2
    kept.values.clear()
    trainer.fit(module, Batches(count=BATCHES))
    assert "weight_decay" in kept.values
    assert "penalty/l1" not in kept.values
