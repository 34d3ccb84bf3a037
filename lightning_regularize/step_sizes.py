"""How far does an optimizer go for a unit of gradient? The metric in which a proximal step has to be taken.

A penalty's gradient :math:`a s` and its proximal step agree on where training ends only if the threshold is the
strength :math:`a` times the length that the optimizer gives a steady unit gradient. With momentum 0.9 that is ten times
the learning rate; with Adam it differs from weight to weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, NAdam, Optimizer, RMSprop

from lightning_regularize._sharding import local_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["KNOWN_OPTIMIZERS", "StepSize", "knows", "step_size"]


@dataclass(frozen=True)
class StepSize:
    r"""Step lengths for a unit gradient, :math:`\ell / (\sqrt{c\,(v - m^2)} + \varepsilon)`, not yet computed.

    Args:
        length: :math:`\ell`.
        square: :math:`v`, an average of squared gradients, the piece of it on this rank; None where all weights have
            the step length ``length``.
        correction: :math:`c`, the reciprocal of the bias of ``square``.
        mean: :math:`m`, for a centered average.
        eps: :math:`\varepsilon`.
    """

    length: float | Tensor
    square: Tensor | None = None
    correction: float | Tensor = 1.0
    mean: Tensor | None = None
    eps: float = 0.0

    def lengths(self) -> float | Tensor:
        """A number for all weights, or one for each, shaped like the piece on this rank."""
        if self.square is None:
            return self.length
        square = self.square if self.mean is None else self.square.addcmul(self.mean, self.mean, value=-1)
        return (square * self.correction).sqrt_().add_(self.eps).reciprocal_().mul_(self.length)

    def pieces(self, count: int) -> list[StepSize]:
        """The step sizes of ``count`` pieces along the first dim."""
        if self.square is None or count == 1:
            return [self] * count
        means = self.mean.chunk(count) if self.mean is not None else [None] * count
        squares = self.square.chunk(count)
        return [
            StepSize(self.length, square, self.correction, mean, self.eps)
            for square, mean in zip(squares, means, strict=True)
        ]


def step_size(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> StepSize | None:
    r"""How far a steady unit gradient moves each weight of ``parameter``, read off after a step.

    ==========================  ======================================================
    Optimizer                   Length
    ==========================  ======================================================
    SGD                         :math:`\eta\,(1 - \tau) / (1 - \mu)` (dampening, momentum)
    Adam, AdamW                 :math:`\eta / (\sqrt{\hat v} + \varepsilon)`, AMSGrad's maximum for :math:`\hat v`
    NAdam                       as Adam, times what its momentum schedule makes of a steady gradient, about 1
    RMSprop                     :math:`\eta / (1 - \mu) / (\sqrt{v} + \varepsilon)`, centered or not
    Adagrad                     :math:`\eta_t / (\sqrt{\sum g^2} + \varepsilon)`
    ==========================  ======================================================

    Args:
        optimizer: One of :data:`KNOWN_OPTIMIZERS`.
        group: The parameter's group.
        parameter: A parameter that the optimizer has stepped.

    Returns:
        The step sizes, or None if the optimizer has not stepped this parameter yet.

    Raises:
        ValueError: The optimizer's metric is not known.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
        >>> round(step_size(optimizer, optimizer.param_groups[0], weight).length, 6)
        1.0

    References:
        Yun, Lozano and Yang, "Adaptive Proximal Gradient Methods for Structured Neural Networks", NeurIPS 2021.
    """
    for kind, metric in _METRICS.items():
        if isinstance(optimizer, kind):
            state = optimizer.state.get(parameter, {})
            return metric(group, {key: _local(value) for key, value in state.items()})
    raise ValueError(unknown_metric(optimizer))


def knows(optimizer: Optimizer) -> bool:
    """Is the metric of this optimizer known?"""
    return isinstance(optimizer, tuple(_METRICS))


def unknown_metric(optimizer: Optimizer) -> str:
    """What to tell the user of an optimizer that is not known."""
    return (
        f"A proximal step needs to know how far the optimizer goes for a unit of gradient, which is known of "
        f"{', '.join(KNOWN_OPTIMIZERS)}, not of {type(optimizer).__name__}: use one of these, or method='gradient'."
    )


def _local(value: Any) -> Any:
    return local_tensor(value) if isinstance(value, Tensor) else value


def _sgd(group: Mapping[str, Any], _: Mapping[str, Any]) -> StepSize:
    momentum = group["momentum"]
    return StepSize(group["lr"] * (1 - group["dampening"]) / (1 - momentum) if momentum else group["lr"])


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    square = state.get("max_exp_avg_sq") if group.get("amsgrad") else state.get("exp_avg_sq")
    if square is None:
        return None
    bias = 1 - group["betas"][1] ** _number(state["step"])
    return StepSize(group["lr"], square, 1 / bias, eps=group["eps"])


def _nadam(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    size = _adam(group, state)
    if size is None:
        return None
    beta, decay, step = group["betas"][0], group["momentum_decay"], _number(state["step"])
    momentum, following = (beta * (1 - 0.5 * 0.96 ** (k * decay)) for k in (step, step + 1))
    product = _number(state["mu_product"])
    # Of a steady gradient the average holds 1 - beta^step, and both summands have a bias correction of their own.
    gain = (1 - momentum) / (1 - product) + following / (1 - product * following) * (1 - beta**step)
    return replace(size, length=size.length * gain)


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    if "square_avg" not in state:
        return None
    mean = state["grad_avg"] if group["centered"] else None
    return StepSize(group["lr"] / (1 - group["momentum"]), state["square_avg"], mean=mean, eps=group["eps"])


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    if "sum" not in state:
        return None
    lr = group["lr"] / (1 + (_number(state["step"]) - 1) * group["lr_decay"])
    return StepSize(lr, state["sum"], eps=group["eps"])


def _number(value: Any) -> Any:
    """A number that a state holds, in double precision; on another device it stays there, so that nobody waits."""
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


_METRICS: dict[type[Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any]], StepSize | None]] = {
    SGD: _sgd,
    Adam: _adam,
    torch.optim.AdamW: _adam,
    NAdam: _nadam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}

KNOWN_OPTIMIZERS = tuple(kind.__name__ for kind in _METRICS)
"""The optimizers, and their subclasses, whose step sizes are known."""
