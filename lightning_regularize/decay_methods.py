"""What applies weight decay, around the steps of any torch optimizer? One class for each method.

``before`` and ``after`` are called around each real step, so that a hand-written loop can use them as a callback does.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, NAdam

from lightning_regularize._sharding import Sharding, local_pieces, settle_gradients_
from lightning_regularize._steps.buckets import refreshed
from lightning_regularize._steps.clock import as_rate
from lightning_regularize.decay import (
    change_stochastically_,
    check_share,
    couple_,
    decay_,
    decay_cautiously_,
    decay_stochastic_,
    noise_seed,
)
from lightning_regularize.selection import has_sparse_gradient
from lightning_regularize.step_sizes import mean_length
from lightning_regularize.units import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from lightning_regularize.selection import ParameterInfo


class Alike(NamedTuple):
    """Parameters that decay equally in this step.

    Args:
        names: Canonical names.
        parameters: With gradients, as they were found.
        group: The optimizer's group that they stand in.
        weight_decay: For this step, factors included.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    group: dict[str, Any]
    weight_decay: float

    @property
    def share(self) -> float | Tensor:
        """What a decoupled step removes: learning rate times weight decay."""
        return as_rate(self.group["lr"]) * self.weight_decay

    @property
    def pull(self) -> float:
        """What a coupled step adds of the weight to its gradient; an optimizer that maximizes subtracts that."""
        return -self.weight_decay if self.group.get("maximize") else self.weight_decay

    def where(self, flags: Sequence[bool]) -> Alike:
        """Those whose flag is set, mostly all."""
        if all(flags):
            return self
        names, parameters = itertools.compress(self.names, flags), itertools.compress(self.parameters, flags)
        return self._replace(names=list(names), parameters=list(parameters))


def _call(change: Callable[..., None], tensors: Sequence[Tensor], *columns: Sequence[Tensor]) -> None:
    change(tensors, *columns)


class DecayMethod(ABC):  # noqa: B024 each method does one of three things, none does all
    """How weights decay around one step of an optimizer. ``before`` and ``after`` are called around each real step."""

    uses_optimizer = False
    """Does the optimizer decay, by its own ``weight_decay``? For all others that is set to 0."""
    adds_to_gradients = False
    """Does it act through the gradients?"""
    needs_rate = False
    """Does it need the learning rate? Some optimizers find their own."""
    knows_share = True
    """Is it known before a step which share of a weight that removes?"""
    needs_real_weights = False
    """Does it compare signs or sizes, which complex weights do not have?"""

    change: Callable[..., None] = staticmethod(_call)
    """Calls what changes tensors; a callback puts here what also measures how much of it rounding leaves."""

    @property
    def acts_on_weights(self) -> bool:
        """Does it change weights by itself, around the step?"""
        return not (self.uses_optimizer or self.adds_to_gradients)

    def on_gradients(self, targets: Sequence[Alike], scale: Tensor | None, step: int) -> None:  # noqa: B027
        """Gradients are complete, and multiplied by ``scale``; by default nothing is to be done."""

    def before(self, optimizer: Optimizer, targets: Sequence[Alike], step: int) -> None:  # noqa: B027
        """Weights are about to change; by default nothing is to be done."""

    def after(self, optimizer: Optimizer, targets: Sequence[Alike], step: int) -> None:  # noqa: B027
        """Weights have changed; by default nothing is to be done."""

    def refuse(self, optimizer: Optimizer) -> str:
        """Why this method cannot work with ``optimizer``; empty if it can."""
        if not self.needs_rate or all(group.get("lr") is not None for group in optimizer.param_groups):
            return ""
        return (
            f"{type(optimizer).__name__} has lr=None and chooses its learning rate by itself, and "
            f"{type(self).__name__.lower()} weight decay needs it: give it a rate, or use method='independent'."
        )

    def refuse_sparse(self, infos: Sequence[ParameterInfo]) -> str:
        """Why this method cannot let ``infos`` decay, if the gradients of one of them are sparse; otherwise empty."""
        sparse = [info.name for info in infos if has_sparse_gradient(info)]
        if not sparse or not (self.uses_optimizer or self.adds_to_gradients):
            return ""
        return (
            f"{sparse} have sparse gradients, to which no decay can be added. Leave them out, by "
            "`exclude=(*DEFAULT_EXCLUDE, \"embedding\")`, use `sparse=False`, or WeightDecay(..., method='decoupled')."
        )

    def rate(self, lr: float) -> float:
        """What weight decay is multiplied by, at a learning rate, to give the share that a step removes."""
        return lr


@final
@dataclass
class ByOptimizer(DecayMethod):
    """The optimizer decays by itself; its groups are split while it steps."""

    uses_optimizer = True

    def refuse(self, optimizer: Optimizer) -> str:
        """LBFGS, Rprop and others have no weight decay."""
        if all("weight_decay" in group for group in optimizer.param_groups):
            return ""
        return (
            f"{type(optimizer).__name__} has no `weight_decay` of its own that could be set. "
            "Use WeightDecay(..., method='decoupled'), which decays by itself."
        )


@final
@dataclass
class Coupled(DecayMethod):
    r"""As the gradient of an L2 penalty: :math:`g \leftarrow g + \lambda w`, then the step.

    Args:
        stochastic: Round half-precision gradients at random, see
            :func:`~lightning_regularize.decay.change_stochastically_`.
        seed: Of that noise.
    """

    stochastic: bool = False
    seed: int = 0

    adds_to_gradients = True

    @torch.no_grad()
    def on_gradients(self, targets: Sequence[Alike], scale: Tensor | None, step: int) -> None:
        """Add the gradient of the penalty, multiplied as the gradients are."""
        for alike in targets:
            settled = settle_gradients_(alike.parameters)
            found = alike.where([gradient is not None for gradient in settled])  # LBFGS may decay what has none
            weights, gradients = local_pieces(found.parameters), local_pieces([g for g in settled if g is not None])
            value = alike.pull if scale is None else scale * alike.pull
            if not self.stochastic:
                self.change(functools.partial(couple_, weight_decay=value), gradients, weights)
                continue
            for name, gradient, weight in zip(found.names, gradients, weights, strict=True):
                add = functools.partial(couple_, weights=weight.to(at_least_float32(weight)), weight_decay=value)
                change_stochastically_(gradient, add, seed=noise_seed(self.seed, step, name))


@final
@dataclass
class Decoupled(DecayMethod):
    r"""As AdamW, for any optimizer: :math:`w \leftarrow (1 - \eta\lambda)\,w`, then the step.

    Args:
        stochastic: Round half-precision weights at random, see :func:`~lightning_regularize.decay.decay_stochastic_`.
        seed: Of that noise.
    """

    stochastic: bool = False
    seed: int = 0

    needs_rate = True

    def before(self, optimizer: Optimizer, targets: Sequence[Alike], step: int) -> None:
        """Decay, as AdamW does before its update."""
        seed = (self.seed, step) if self.stochastic else None
        _decay(self, [(alike.share, alike) for alike in targets], seed)


@final
@dataclass
class Independent(DecayMethod):
    r"""The share removed per step does not depend on the learning rate: :math:`w \leftarrow (1 - \lambda)\,w`.

    Args:
        stochastic: As of :class:`Decoupled`.
        seed: As of :class:`Decoupled`.
    """

    stochastic: bool = False
    seed: int = 0

    def rate(self, lr: float) -> float:
        """The learning rate does not matter."""
        return 1.0

    def before(self, optimizer: Optimizer, targets: Sequence[Alike], step: int) -> None:
        """Decay by the weight decay itself."""
        seed = (self.seed, step) if self.stochastic else None
        _decay(self, [(alike.weight_decay, alike) for alike in targets], seed)


@final
@dataclass
class Cautious(DecayMethod):
    r"""Decay only where update and weight agree: :math:`w \leftarrow w - \eta(u + \lambda 1[u w \ge 0] w)`.

    Costs a copy of the decaying weights: what an optimizer's update was is known only when it has been made.
    """

    needs_rate = True
    needs_real_weights = True
    knows_share = False

    def __post_init__(self) -> None:
        self._copies: WeakKeyDictionary[Optimizer, list[Tensor]] = WeakKeyDictionary()

    @torch.no_grad()
    def before(self, optimizer: Optimizer, targets: Sequence[Alike], step: int) -> None:
        """Remember the weights, in memory that is kept from step to step."""
        _check_shares(alike.share for alike in targets)
        weights = local_pieces([parameter for alike in targets for parameter in alike.parameters])
        self._copies[optimizer] = refreshed(self._copies.get(optimizer, []), weights)

    @torch.no_grad()
    def after(self, optimizer: Optimizer, targets: Sequence[Alike], step: int) -> None:
        """Decay what the update has moved towards zero."""
        copies = iter(self._copies.get(optimizer, ()))
        for alike in targets:
            weights = local_pieces(alike.parameters)
            decay = functools.partial(decay_cautiously_, share=alike.share)
            self.change(decay, weights, list(itertools.islice(copies, len(weights))))


@final
@dataclass
class Stable(DecayMethod):
    r"""Stable weight decay: the share follows the optimizer's real step size.

    SGD with momentum :math:`\mu` and dampening :math:`\tau` decays by :math:`\eta\lambda(1 - \tau)/(1 - \mu)`, Adam
    by :math:`\eta\lambda / \sqrt{\bar v}` with :math:`\bar v` the mean of :math:`\hat v` over all its weights in this
    step.

    Args:
        sharding: Which ranks hold pieces of the weights.

    References:
        Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them" (SWD), NeurIPS 2023.
    """

    sharding: Sharding

    needs_rate = True
    needs_real_weights = True
    knows_share = False

    def refuse(self, optimizer: Optimizer) -> str:
        """Known are SGD and the Adams."""
        if reason := super().refuse(optimizer):
            return reason
        if any(group.get("amsgrad") for group in optimizer.param_groups):
            return "Stable weight decay is not defined for AMSGrad: use `amsgrad=False`, or method='decoupled'."
        if isinstance(optimizer, (SGD, Adam, NAdam)):
            return ""
        return f"Stable weight decay is defined for SGD, Adam, AdamW and NAdam, not for {type(optimizer).__name__}."

    def before(self, optimizer: Optimizer, targets: Sequence[Alike], step: int) -> None:
        """Decay by the share that fits the step to come."""
        if isinstance(optimizer, SGD):
            _decay(self, [(alike.share * _steady_length(alike.group), alike) for alike in targets])
        else:
            _check_shares(alike.share for alike in targets)
            length = mean_length(optimizer, self.sharding)
            _decay(self, [(alike.share * length, alike) for alike in targets])


def will_move(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[bool]:
    """Which parameters are going to change in the step that begins? LBFGS begins before there are gradients."""
    if isinstance(optimizer, LBFGS):
        return [parameter.grad is not None or parameter.requires_grad for parameter in parameters]
    return [parameter.grad is not None for parameter in parameters]


def _steady_length(group: Mapping[str, Any]) -> float:
    """How far SGD goes for a steady unit gradient, in learning rates."""
    momentum = group["momentum"]
    return float((1 - group["dampening"]) / (1 - momentum)) if momentum else 1.0


def _check_shares(shares: Iterable[float | Tensor]) -> None:
    """Before any weight changes."""
    for share in shares:
        check_share(share)


@torch.no_grad()
def _decay(
    method: DecayMethod,
    shares: Sequence[tuple[float | Tensor, Alike]],
    seed: tuple[int, int] | None = None,
) -> None:
    """Decay each list by its share; with a seed and a step, round at random, each tensor with noise of its own."""
    _check_shares(share for share, _ in shares)
    for share, alike in shares:
        weights = local_pieces(alike.parameters)
        if seed is None:
            method.change(functools.partial(decay_, share=share), weights)
            continue
        for name, weight in zip(alike.names, weights, strict=True):
            decay_stochastic_(weight, share, seed=noise_seed(*seed, name))


METHODS: dict[str, type[DecayMethod]] = {
    "optimizer": ByOptimizer,
    "decoupled": Decoupled,
    "coupled": Coupled,
    "independent": Independent,
    "cautious": Cautious,
    "stable": Stable,
}
"""By the word that asks for it."""

_INSTEAD = {"adamw": " AdamW's is 'optimizer' with AdamW itself, else 'decoupled'.", "l2": " It is 'coupled'."}


def check_method(method: object) -> None:
    """Refuse what is not a word of :data:`METHODS`.

    Raises:
        ValueError: It is something else.
    """
    if method not in METHODS:
        instead = _INSTEAD.get(str(method).lower(), "")
        raise ValueError(f"`method` should be one of {tuple(METHODS)}, got {method!r}.{instead}")
