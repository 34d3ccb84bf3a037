"""What the tests of steps share: a tiny module, hand-made groups, a plain loop, and optimizers as people write them."""

import functools
from collections import OrderedDict

import torch
from torch import nn, optim
from torch.optim import Optimizer

from lightning_regularize import WeightDecay

torch.set_num_threads(1)

STEPS = 6
DECAYS = (0.5, 0.25, 0.8, 0.0, 0.1, 0.4)  # of each step
EXCLUDED = ("hidden.bias", "norm.weight", "norm.bias", "output.bias")


def table(position):
    """A schedule that is the table above, so that both sides have the same numbers to the last bit."""
    return DECAYS[position.step]


def decay(**options):
    return WeightDecay(table, **{"total_steps": STEPS, **options})


class Net(nn.Module):
    """Two layers with a norm between."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.hidden, self.norm, self.output = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
            self.batches = [(torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)) for _ in range(STEPS)]
        self.to(dtype)

    def loss(self, k):
        x, y = self.batches[k]
        return (self.output(torch.tanh(self.norm(self.hidden(x)))) - y).square().mean()


class Matrices(Net):
    """Without vectors, of which Muon knows nothing; ``output.weight`` is to be excluded."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        self.norm, self.hidden.bias, self.output.bias = nn.Identity(), None, None


def weights(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def ordered(net, excluded=EXCLUDED):
    """All parameters, those that decay first: a sum over them has the same order with hand-made groups."""
    return [parameter for group in split(net, excluded) for parameter in group["params"]]


def split(net, excluded=EXCLUDED):
    """Hand-made groups: what decays, then what does not."""
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in net.named_parameters():
        groups[name in excluded]["params"].append(parameter)
    return groups


# -- loops -------------------------------------------------------------------------------------------------------------


def plain_step(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def step_by_position(optimizer, loss):
    return optimizer.step(closure_of(optimizer, loss))


def step_by_keyword(optimizer, loss):
    return optimizer.step(closure=closure_of(optimizer, loss))


def train(net, optimizer, factors=(), *, step=plain_step, scheduler=None, first=0, last=STEPS):
    """The weights after a plain loop. Hand-made groups, as oracle, get ``factors`` of the weight decay of each step."""
    for k in range(first, last):
        for group, factor in zip(optimizer.param_groups, factors, strict=False):
            set_decay(group, factor * DECAYS[k])
        step(optimizer, functools.partial(net.loss, k))
        if scheduler is not None:
            scheduler.step()
    return weights(net)


def set_decay(group, value):
    if isinstance(group["weight_decay"], torch.Tensor):
        group["weight_decay"].fill_(value)
    else:
        group["weight_decay"] = value


def assert_identical(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Layout:
    """What of an optimizer is the user's: the list of groups, its dictionaries, their keys, and what they hold."""

    def __init__(self, optimizer):
        self.optimizer, self.list, self.groups = optimizer, optimizer.param_groups, list(optimizer.param_groups)
        self.keys = [list(group) for group in self.groups]
        self.held = [(group["params"], [*group["params"]]) for group in self.groups]

    def check(self, *, same_list=True):
        groups = self.optimizer.param_groups
        assert groups is self.list or not same_list
        assert [id(group) for group in groups] == [id(group) for group in self.groups]
        assert [list(group) for group in groups] == self.keys
        for group, (params, parameters) in zip(groups, self.held, strict=True):
            assert group["params"] is params
            assert [id(p) for p in params] == [id(p) for p in parameters]


# -- optimizers as people write them -----------------------------------------------------------------------------------


class Plain(Optimizer):
    """Gradient descent with coupled weight decay; subclasses change one thing."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, **more):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **more})

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for i, group in enumerate(self.param_groups):
                self.update(group, i)
        return loss

    def update(self, group, i):
        for p in group["params"]:
            if p.grad is not None:
                p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))


class AdaBound(Plain):
    """Has a list with the first learning rate of each group, and reads it while it steps."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    def update(self, group, i):
        final_lr = 0.1 * group["lr"] / self.base_lrs[i]
        for p in group["params"]:
            p.sub_(final_lr * (p.grad + group["weight_decay"] * p))


class AdaBoundByZip(AdaBound):
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group, base_lr in zip(self.param_groups, self.base_lrs, strict=True):
                for p in group["params"]:
                    p.sub_(0.1 * group["lr"] / base_lr * (p.grad + group["weight_decay"] * p))
        return loss


class Lookahead(Optimizer):
    """As in timm: no ``Optimizer.__init__``, the inner optimizer's dictionaries, own keys in them, own state_dict."""

    def __init__(self, base, alpha=0.5, k=2):
        # torch's zero_grad makes `step` call hooks.
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = {}
        for group in self.param_groups:
            group.update(lookahead_alpha=alpha, lookahead_k=k, lookahead_step=0)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self._base_optimizer.step(closure)
        for group in self._base_optimizer.param_groups:
            group["lookahead_step"] += 1
            for p in group["params"]:
                slow = self._base_optimizer.state[p].setdefault("slow", p.clone())
                if group["lookahead_step"] % group["lookahead_k"] == 0:
                    p.copy_(slow.lerp_(p, group["lookahead_alpha"]))
        return loss

    def state_dict(self):
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class Orthogonal(Optimizer):
    """As pytorch_optimizer's OrthoGrad: no ``Optimizer.__init__``, all of the inner one's by properties."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    @property
    def defaults(self):
        return self.optimizer.defaults

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.sub_(p * (p * p.grad).sum() / (p * p).sum().clamp(min=1e-30))
        self.optimizer.step()
        return loss

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)


class ActsAsOne:
    """Has what Lightning asks of an optimizer, without being one; a real one steps for it."""

    def __init__(self, optimizer):
        self.real, self.state, self.defaults = optimizer, optimizer.state, optimizer.defaults

    @property
    def param_groups(self):
        return self.real.param_groups

    def zero_grad(self, set_to_none=True):
        self.real.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.real.step(closure)

    def state_dict(self):
        return self.real.state_dict()

    def load_state_dict(self, state_dict):
        self.real.load_state_dict(state_dict)


class StepsByItself(ActsAsOne):
    """No real optimizer steps for it."""

    def __init__(self, groups):
        self.groups, self.state, self.defaults = [{"params": list(groups), "lr": 0.1, "weight_decay": 0.0}], {}, {}

    @property
    def param_groups(self):
        return self.groups

    def zero_grad(self, set_to_none=True):
        for p in self.groups[0]["params"]:
            p.grad = None

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for p in self.groups[0]["params"]:
                p.sub_(0.1 * p.grad)
        return loss

    def state_dict(self):
        return {}


class Sharpness(Optimizer):
    """SAM as most people have it: the inner optimizer is made over the outer one's dictionaries."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        held = [(p, g["rho"]) for g in self.param_groups for p in g["params"]]
        norm = torch.stack([p.grad.norm() for p, _ in held]).norm()
        moved = [(p, p.clone()) for p, _ in held]
        for p, rho in held:
            p.add_(p.grad, alpha=float(rho / norm))
        with torch.enable_grad():
            closure()
        for p, before in moved:
            p.copy_(before)
        self.base_optimizer.step()
        return loss


class _Combining(Optimizer):
    """Several optimizers as one, for Lightning, which wants a single one."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for inner in self.inner():
            inner.step()
        return loss

    def zero_grad(self, set_to_none=True):
        for inner in self.inner():
            inner.zero_grad(set_to_none)

    def state_dict(self):
        return {"inner": [inner.state_dict() for inner in self.inner()]}

    def load_state_dict(self, state_dict):
        for inner, state in zip(self.inner(), state_dict["inner"], strict=True):
            inner.load_state_dict(state)


class CombinedByAttributes(_Combining):
    """Muon and AdamW; ``param_groups`` is a list of their dictionaries."""

    def __init__(self, first, second):
        self.muon, self.adamw = first, second
        self.param_groups, self.state, self.defaults = first.param_groups + second.param_groups, {}, {}

    def inner(self):
        return [self.muon, self.adamw]

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


class CombinedByProperty(_Combining):
    """The inner optimizers in a list; ``param_groups`` is made anew each time that it is read."""

    def __init__(self, *optimizers):
        self.optimizers, self.state, self.defaults = list(optimizers), {}, {}

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def inner(self):
        return self.optimizers


class CombinedByName(_Combining):
    """The inner optimizers in a dictionary; ``Optimizer.__init__`` gets their dictionaries, and keeps them."""

    def __init__(self, **optimizers):
        self.by_name = optimizers
        super().__init__([group for optimizer in optimizers.values() for group in optimizer.param_groups], {})

    def inner(self):
        return list(self.by_name.values())

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.param_groups = [group for optimizer in self.inner() for group in optimizer.param_groups]


class CombinedByKind(CombinedByName):
    """Lists of inner optimizers in a dictionary."""

    def __init__(self, first, second):
        super().__init__(first=first, second=second)
        self.by_name = {"all": [first, second]}

    def inner(self):
        return self.by_name["all"]


class Partly(Plain):
    """Steps the groups that are marked by itself, and the others by an inner optimizer."""

    def __init__(self, params, inner):
        super().__init__(params, own=True)
        self.inner, self.param_groups = inner, self.param_groups + inner.param_groups

    def step(self, closure=None):
        loss = super().step(closure)
        self.inner.step()
        return loss

    def update(self, group, i):
        if group.get("own"):
            super().update(group, i)


COMBINED = {
    "attributes": CombinedByAttributes,
    "a list": CombinedByProperty,
    "lists in a dictionary": CombinedByKind,
    "a dictionary": lambda first, second: CombinedByName(first=first, second=second),
    "one in the other": lambda first, second: CombinedByProperty(Lookahead(first), Orthogonal(second)),
}


def matrices_and_rest(net):
    """Parameters as for Muon and AdamW."""
    return [[p for p in net.parameters() if (p.dim() == 2) is wanted] for wanted in (True, False)]


def adamw(params, **options):
    return optim.AdamW(params, **{"lr": 0.1, **options})
