"""Who applies the weight decay, where the optimizer does not? One class a manner, for any torch optimizer.

A manner is told twice a step what to decay, right before and right after the weights change, and is plain torch: a
hand-written loop can call it as well as a callback.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, NAdam

from lightning_regularize._sharding import Sharding, gradient_of, local_tensor
from lightning_regularize.decay import decay_, decay_cautiously_, decay_stochastic_
from lightning_regularize.norms import norms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter that decays in this step.

    Attributes:
        name: Canonical name.
        parameter: With a gradient, as it was found.
        group: The optimizer's group that it stands in.
        weight_decay: For this step, factors included.
    """

    name: str
    parameter: nn.Parameter
    group: dict[str, Any]
    weight_decay: float

    @property
    def share(self) -> float | Tensor:
        """What a decoupled step removes: learning rate times weight decay."""
        return self.group["lr"] * self.weight_decay  # type: ignore[no-any-return]


class Manner(ABC):
    """How weights decay around one step of an optimizer. Both methods are called for every step that is real."""

    @abstractmethod
    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Gradients are complete and unscaled, weights not yet changed."""

    def after(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:  # noqa: B027
        """Weights have changed; by default nothing is left to do."""

    def refuse(self, optimizer: Optimizer) -> str:
        """Why this manner cannot work with ``optimizer``; empty if it can."""
        del optimizer  # most work with any
        return ""


@final
@dataclass
class Decoupled(Manner):
    r"""As AdamW, for any optimizer: :math:`w \leftarrow (1 - \eta\lambda)\,w`, then the step.

    Args:
        stochastic: Round half-precision weights at random, see :func:`~lightning_regularize.decay.decay_stochastic_`.
        seed: Of that noise.
    """

    stochastic: bool = False
    seed: int = 0

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Decay, as AdamW does before its update."""
        for target in targets:
            _decay(target, target.share, self, step)


@final
@dataclass
class Independent(Manner):
    r"""The share removed per step does not depend on the learning rate: :math:`w \leftarrow (1 - \lambda)\,w`.

    Args:
        stochastic: As of :class:`Decoupled`.
        seed: As of :class:`Decoupled`.
    """

    stochastic: bool = False
    seed: int = 0

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Decay by the weight decay itself."""
        for target in targets:
            _decay(target, target.weight_decay, self, step)


@final
@dataclass
class Cautious(Manner):
    r"""Decay only where update and weight agree: :math:`w \leftarrow w - \eta(u + \lambda 1[u w \ge 0] w)`.

    Costs a copy of the decaying weights: what an optimizer's update was is known only when it has been made.
    """

    def __post_init__(self) -> None:
        self._copies: dict[int, Tensor] = {}

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Remember the weights, in buffers that are made once."""
        for target in targets:
            weight = local_tensor(target.parameter)
            copy = self._copies.get(id(target.parameter))
            if copy is None:
                self._copies[id(target.parameter)] = weight.clone()
            else:
                copy.copy_(weight)

    def after(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Decay what the update has moved towards zero."""
        for target in targets:
            before = self._copies[id(target.parameter)]
            decay_cautiously_(local_tensor(target.parameter), before, float(target.share))


@final
@dataclass
class Stable(Manner):
    r"""Stable weight decay: the share follows the optimizer's real step size.

    SGD with momentum :math:`\mu` and dampening :math:`\tau` decays by :math:`\eta\lambda(1 - \tau)/(1 - \mu)`, Adam
    by :math:`\eta\lambda / \sqrt{\bar v}` with :math:`\bar v` the mean of :math:`\hat v` over all its weights in this
    step, as of the gradients before clipping.

    Args:
        sharding: Which ranks hold pieces of the weights.

    References:
        Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them" (SWD), NeurIPS 2023.
    """

    sharding: Sharding

    def refuse(self, optimizer: Optimizer) -> str:
        """Known are SGD and the Adams."""
        if any(group.get("amsgrad") for group in optimizer.param_groups):
            return "Stable weight decay is not defined for AMSGrad: use `amsgrad=False`, or method='decoupled'."
        if isinstance(optimizer, (SGD, Adam, NAdam)):
            return ""
        return f"Stable weight decay is defined for SGD, Adam, AdamW and NAdam, not for {type(optimizer).__name__}."

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Decay by the share that fits the step to come."""
        root = None if isinstance(optimizer, SGD) else self._root_mean(optimizer)
        for target in targets:
            if root is None:
                momentum, dampening = target.group["momentum"], target.group["dampening"]
                share = target.share * ((1 - dampening) / (1 - momentum) if momentum else 1.0)
            else:
                share = target.share / root
            decay_(local_tensor(target.parameter), share)

    def _root_mean(self, optimizer: Optimizer) -> Tensor:
        """The square root of the mean of v_hat as the step is going to make it, over all weights with a gradient."""
        total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        # A GradScaler leaves it to a fused optimizer to divide the gradients, and says by what.
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale
        for group in optimizer.param_groups:
            if not group["params"]:
                continue
            beta = group["betas"][1]
            # Of every parameter, for a rank may hold no element of one, and then neither gradient nor state.
            rows = torch.stack([_second_moment(p, optimizer.state.get(p, {})) for p in group["params"]])
            square, seen, steps, numel = self.sharding.reduce(rows, group["params"]).unbind(dim=1)
            correction = 1 - beta ** (torch.where(numel > 0, steps / numel, 0.0) + 1)
            part = (((1 - beta) * square / scale**2 + beta * seen) / correction).sum()
            total, count = total.to(part) + part, count.to(part) + numel.sum()
        # Where all gradients are zero Adam does not move either, so nothing decays.
        return torch.where(total > 0, torch.sqrt(total / count), math.inf)


def _second_moment(parameter: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Sums over the elements here: of squared gradients, of what Adam has seen of them, of its steps, and of ones."""
    gradient = gradient_of(parameter)
    if gradient is None:
        return local_tensor(parameter).new_zeros(4, dtype=torch.float64)
    numel = local_tensor(gradient).numel()
    square = norms([local_tensor(gradient)])[0].square()
    average = state.get("exp_avg_sq")
    seen = square.new_zeros(()) if average is None else local_tensor(average).sum(dtype=torch.float64)
    steps = torch.as_tensor(state.get("step", 0)).to(square) * numel
    return torch.stack([square, seen, steps, square.new_full((), numel)])


def _decay(target: Target, share: float | Tensor, manner: Decoupled | Independent, step: int) -> None:
    weight = local_tensor(target.parameter)
    if manner.stochastic:
        digest = hashlib.blake2b(f"{manner.seed}/{step}/{target.name}".encode(), digest_size=6).digest()
        decay_stochastic_(weight, float(share), seed=int.from_bytes(digest, "big"))
    else:
        decay_(weight, share)
