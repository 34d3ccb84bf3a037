"""How far does an optimizer go for a unit of gradient? The metric in which a proximal step has to be taken.

A penalty's gradient :math:`a s` and its proximal step agree on where training ends only if the threshold is the
strength :math:`a` times the length that the optimizer gives a steady unit gradient. With momentum 0.9 that is ten times
the learning rate; with Adam it differs from weight to weight.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, NAdam, Optimizer, RMSprop

from lightning_regularize._sharding import gradients_of, local_piece, local_pieces
from lightning_regularize._steps.buckets import HALF, copies, new, operand
from lightning_regularize.norms import norms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_regularize._sharding import Sharding

__all__ = [
    "KNOWN_OPTIMIZERS",
    "StepSize",
    "differ_by_weight",
    "knows",
    "mean_length",
    "step_size",
    "step_sizes",
    "thresholds",
]


class StepSize(NamedTuple):
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
        return thresholds([self], [self.square], [] if self.mean is None else [self.mean], 1.0)[0].clone()


def thresholds(sizes: Sequence[StepSize], squares: list[Tensor], means: list[Tensor], strength: float) -> list[Tensor]:
    r"""Return ``strength`` times the lengths of steps, one number for each weight, for a bucket of weights.

    Args:
        sizes: The step sizes, none of them one number for all weights.
        squares: Their ``square``, or alike pieces of these, in one dtype.
        means: Likewise their ``mean``; empty where they have none.
        strength: What the lengths are multiplied by.

    Returns:
        Temporaries, see :func:`~lightning_regularize._steps.buckets.new`, in at least float32.
    """
    if means or squares[0].dtype in HALF:
        found = copies(squares, slot="step_size")
        if means:
            torch._foreach_addcmul_(found, means, means, value=-1)
        torch._foreach_sqrt_(found)
    else:
        found = new("sqrt", squares, slot="step_size")
    # With the root of the correction taken out of the sum, one pass over the elements less.
    roots = [_root(size.correction) for size in sizes]
    _update_("add", found, [size.eps / root for size, root in zip(sizes, roots, strict=True)])
    lengths = [strength * size.length / root for size, root in zip(sizes, roots, strict=True)]
    if len(found) == 1 and found[0].is_cpu:  # in one pass
        torch.div(torch.as_tensor(lengths[0], dtype=found[0].dtype, device="cpu"), found[0], out=found[0])
    else:
        torch._foreach_reciprocal_(found)
        _update_("mul", found, lengths)
    return found


def _root(value: float | Tensor) -> Any:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _update_(function: str, tensors: list[Tensor], numbers: list[Any]) -> None:
    """One number for each tensor: mostly all are equal, and where they lie on a device they stay there."""
    update = getattr(torch, f"_foreach_{function}_")
    if any(isinstance(number, Tensor) for number in numbers):
        update(tensors, [torch.as_tensor(number, device=t.device) for number, t in zip(numbers, tensors, strict=True)])
    else:
        update(tensors, numbers if len(set(numbers)) > 1 else operand(numbers[0], tensors))


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
    return step_sizes(optimizer, group, [parameter])[0]


def step_sizes(optimizer: Optimizer, group: Mapping[str, Any], parameters: Sequence[Tensor]) -> list[StepSize | None]:
    """Return what :func:`step_size` does, for each of ``parameters``.

    Args:
        optimizer: One of :data:`KNOWN_OPTIMIZERS`.
        group: The group of all these parameters.
        parameters: Parameters that the optimizer has stepped.

    Raises:
        ValueError: The optimizer's metric is not known.
    """
    for kind, metric in _METRICS.items():
        if isinstance(optimizer, kind):
            return [metric(group, optimizer.state.get(parameter, {})) for parameter in parameters]
    raise ValueError(unknown_metric(optimizer))


def knows(optimizer: Optimizer) -> bool:
    """Is the metric of this optimizer known?"""
    return isinstance(optimizer, tuple(_METRICS))


def differ_by_weight(optimizer: Optimizer) -> bool:
    """Does an optimizer whose metric is known have a step size for each weight, and not one for all of a group?"""
    return not isinstance(optimizer, SGD)


def unknown_metric(optimizer: Optimizer) -> str:
    """The message for an optimizer whose metric is not known."""
    return (
        f"A proximal step needs to know how far the optimizer goes for a unit of gradient, which is known of "
        f"{', '.join(KNOWN_OPTIMIZERS)}, not of {type(optimizer).__name__}: use one of these, or method='gradient'."
    )


def _sgd(group: Mapping[str, Any], _: Mapping[str, Any]) -> StepSize:
    lr, momentum = _number(group["lr"]), group["momentum"]
    return StepSize(lr * (1 - group["dampening"]) / (1 - momentum) if momentum else lr)


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    square = state.get("max_exp_avg_sq") if group.get("amsgrad") else state.get("exp_avg_sq")
    if square is None:
        return None
    bias = 1 - group["betas"][1] ** _number(state["step"])
    return StepSize(_number(group["lr"]), local_piece(square), 1 / bias, eps=group["eps"])


def _nadam(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    size = _adam(group, state)
    if size is None:
        return None
    beta, decay, step = group["betas"][0], group["momentum_decay"], _number(state["step"])
    momentum, following = (beta * (1 - 0.5 * 0.96 ** (k * decay)) for k in (step, step + 1))
    product = _number(state["mu_product"])
    # Of a steady gradient the average holds 1 - beta^step, and both summands have a bias correction of their own.
    gain = (1 - momentum) / (1 - product) + following / (1 - product * following) * (1 - beta**step)
    return size._replace(length=size.length * gain)


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    if "square_avg" not in state:
        return None
    mean = local_piece(state["grad_avg"]) if group["centered"] else None
    square = local_piece(state["square_avg"])
    return StepSize(_number(group["lr"]) / (1 - group["momentum"]), square, mean=mean, eps=group["eps"])


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any]) -> StepSize | None:
    if "sum" not in state:
        return None
    lr = _number(group["lr"]) / (1 + (_number(state["step"]) - 1) * group["lr_decay"])
    return StepSize(lr, local_piece(state["sum"]), eps=group["eps"])


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


@torch.no_grad()
def mean_length(optimizer: Optimizer, sharding: Sharding) -> Tensor:
    r"""The :math:`1 / \sqrt{\bar v}` of the step that begins, of Adam, over all its weights with a gradient.

    Args:
        optimizer: Adam, AdamW or NAdam.
        sharding: Which ranks hold pieces of the weights.

    Returns:
        On the device of the weights; 0 where all gradients are zero, since Adam does not move either.
    """
    groups = optimizer.param_groups
    # Of every parameter, for a rank may hold no element of one, and then neither gradient nor state.
    parameters = [parameter for group in groups for parameter in group["params"]]
    nothing = local_piece(parameters[0]).new_empty(0)
    found = gradients_of(parameters)
    gradients = local_pieces([nothing if gradient is None else gradient for gradient in found])
    pairs = zip(parameters, found, strict=True)
    states = [{} if gradient is None else optimizer.state.get(p, {}) for p, gradient in pairs]
    averages = local_pieces([state.get("exp_avg_sq", nothing) for state in states])
    squares, seen = norms(gradients).square(), norms(averages, 1.0)
    numel = torch.tensor([gradient.numel() for gradient in gradients], dtype=squares.dtype, device="cpu")
    rows = torch.stack([squares, seen, *_counts([state.get("step", 0.0) for state in states], numel, squares)], dim=1)
    rows = sharding.reduce(rows, parameters)
    # A GradScaler leaves it to a fused optimizer to divide the gradients, and says by what.
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        rows[:, 0] /= scale.to(rows) ** 2
    of_groups = zip(torch.split(rows, [len(group["params"]) for group in groups]), groups, strict=True)
    total = functools.reduce(torch.add, [_sum_of_v_hat(part, group["betas"][1]) for part, group in of_groups])
    return (rows[:, 3].sum() / total).sqrt().nan_to_num(nan=0.0, posinf=0.0)


def _sum_of_v_hat(rows: Tensor, beta: float | Tensor) -> Tensor:
    """Over a group, from sums of squared gradients, of their averages, of steps and of elements of each parameter."""
    square, seen, steps, numel = rows.unbind(dim=1)
    correction = 1 - beta ** (steps / numel.clamp_min(1) + 1)
    return (((1 - beta) * square + beta * seen) / correction).sum()


def _counts(steps: Sequence[float | Tensor], numel: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Steps times elements, and elements, of each parameter. Adam counts on the host, or on the device if fused."""
    if any(isinstance(step, Tensor) and not step.is_cpu for step in steps):
        zero = torch.zeros((), device=like.device)
        counted = torch.stack([s.to(zero.device) if isinstance(s, Tensor) else zero + s if s else zero for s in steps])
        numel = numel.to(like.device, non_blocking=True)
        return counted.to(numel.dtype) * numel, numel
    numbers = [step.item() if isinstance(step, Tensor) else step for step in steps]
    counted = torch.tensor(numbers, dtype=numel.dtype, device="cpu")
    return torch.stack([counted * numel, numel]).to(like.device, non_blocking=True).unbind()
