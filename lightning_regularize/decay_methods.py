"""What applies weight decay, around the steps of any torch optimizer? One class for each method.

``before`` and ``after`` are called around each real step, so that a hand-written loop can use them as a callback does.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, NAdam

from lightning_regularize._sharding import Sharding, gradient_of, local_tensor, settle_gradient_
from lightning_regularize.decay import HALF, check_share, couple_, decay_, decay_cautiously_, decay_stochastic_
from lightning_regularize.norms import norms
from lightning_regularize.theory import decay_rounding_threshold

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
    rounds_like_a_product = True
    """Are half-precision weights multiplied by a factor that may round to 1?"""

    def on_gradients(self, targets: Sequence[Target], scale: Tensor | None) -> None:  # noqa: B027
        """Gradients are complete, and multiplied by ``scale``; by default nothing is to be done."""

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:  # noqa: B027
        """Weights are about to change; by default nothing is to be done."""

    def after(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:  # noqa: B027
        """Weights have changed; by default nothing is to be done."""

    def refuse(self, optimizer: Optimizer) -> str:
        """Why this method cannot work with ``optimizer``; empty if it can."""
        if not self.needs_rate or all(group.get("lr") is not None for group in optimizer.param_groups):
            return ""
        return (
            f"{type(optimizer).__name__} has lr=None and chooses its learning rate by itself, and "
            f"{type(self).__name__.lower()} weight decay needs it: give it a rate, or use method='independent'."
        )

    def rate(self, lr: float) -> float:
        """What weight decay is multiplied by, at a learning rate, to give the share that a step removes."""
        return lr

    def lost_in_rounding(self, group: Mapping[str, Any], weight_decay: float, peak_lr: float) -> str:
        """A warning, if at the peak rate of a group decay rounds to nothing in half precision; otherwise empty."""
        if not self.rounds_like_a_product or (self.uses_optimizer and group.get("fused")):
            return ""  # a fused kernel rounds once, with the gradient's noise in it
        share = weight_decay * self.rate(peak_lr)
        dtypes = {parameter.dtype for parameter in group["params"]} & set(HALF)
        lost = next((dtype for dtype in dtypes if share < decay_rounding_threshold(dtype)), None)
        if lost is None:
            return ""
        what = "lr * weight_decay" if self.uses_optimizer or self.needs_rate else "weight_decay"
        return (
            f"Weight decay does nothing here: {what} is {share:.2g} at its peak, and {lost} weights stay as they are "
            f"below {decay_rounding_threshold(lost):.2g}. Use WeightDecay(..., method='decoupled', "
            "rounding='stochastic'), a fused optimizer, or float32 weights with precision='bf16-mixed'."
        )


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
    r"""As the gradient of an L2 penalty: :math:`g \leftarrow g + \lambda w`, then the step."""

    adds_to_gradients = True
    rounds_like_a_product = False

    def on_gradients(self, targets: Sequence[Target], scale: Tensor | None) -> None:
        """Add the gradient of the penalty, multiplied as the gradients are."""
        alike: dict[tuple[float, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for target in targets:
            gradient = settle_gradient_(target.parameter)
            if gradient is None:  # LBFGS may decay what has none
                continue
            value = -target.weight_decay if target.group.get("maximize") else target.weight_decay
            gradients, weights = alike.setdefault((value, target.parameter.dtype in HALF), ([], []))
            gradients.append(local_tensor(gradient))
            weights.append(local_tensor(target.parameter))
        for (value, is_half), (gradients, weights) in alike.items():
            if scale is None and not is_half:
                torch._foreach_add_(gradients, weights, alpha=value)
            else:
                for gradient, weight in zip(gradients, weights, strict=True):
                    couple_(gradient, weight, value if scale is None else scale * value)


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

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Decay, as AdamW does before its update."""
        _decay([(target, target.share) for target in targets], self, step)


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

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Decay by the weight decay itself."""
        _decay([(target, target.weight_decay) for target in targets], self, step)


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

    def before(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Remember the weights, in buffers that are made once."""
        for target in targets:
            check_share(target.share)
        weights, copies = [local_tensor(target.parameter) for target in targets], self._copies.get(optimizer, [])
        if [copy.shape for copy in copies] == [weight.shape for weight in weights]:
            for copy, weight in zip(copies, weights, strict=True):
                copy.copy_(weight)
        else:
            self._copies[optimizer] = [weight.clone() for weight in weights]

    def after(self, optimizer: Optimizer, targets: Sequence[Target], step: int) -> None:
        """Decay what the update has moved towards zero."""
        for target, before in zip(targets, self._copies.get(optimizer, ()), strict=True):
            decay_cautiously_(local_tensor(target.parameter), before, float(target.share))


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
    rounds_like_a_product = False

    def refuse(self, optimizer: Optimizer) -> str:
        """Known are SGD and the Adams."""
        if reason := super().refuse(optimizer):
            return reason
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


def will_move(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Is a parameter going to change in the step that begins? LBFGS begins before there are gradients."""
    return parameter.grad is not None or (isinstance(optimizer, LBFGS) and parameter.requires_grad)


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


@torch.no_grad()
def _decay(shares: Sequence[tuple[Target, float | Tensor]], method: Decoupled | Independent, step: int) -> None:
    alike: dict[Any, tuple[float | Tensor, list[Tensor]]] = {}
    for target, share in shares:  # all are checked before any weight changes
        check_share(share)
        key = (id(target.group), target.weight_decay) if isinstance(share, Tensor) else share
        weight = local_tensor(target.parameter)
        alike.setdefault((key, weight.dtype in HALF), (share, []))[1].append(weight)
    if method.stochastic:
        for target, share in shares:
            digest = hashlib.blake2b(f"{method.seed}/{step}/{target.name}".encode(), digest_size=6).digest()
            decay_stochastic_(local_tensor(target.parameter), float(share), seed=int.from_bytes(digest, "big"))
        return
    for (_, is_half), (share, weights) in alike.items():
        if is_half:  # on a CPU (torch 2.13) a list rounds the factor itself to half precision
            for weight in weights:
                decay_(weight, share)
        else:
            torch._foreach_mul_(weights, 1 - share)


METHODS: dict[str, type[DecayMethod]] = {
    "optimizer": ByOptimizer,
    "decoupled": Decoupled,
    "coupled": Coupled,
    "independent": Independent,
    "cautious": Cautious,
    "stable": Stable,
}
"""By the word that asks for it."""
