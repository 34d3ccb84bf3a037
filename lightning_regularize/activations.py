r"""How large are activations? Penalties on what a module returns, in place of its weights.

Each is a mean over the batch, as losses are, so that it does not depend on how many samples a batch has.

Example:
    >>> outputs = torch.tensor([[1.0, -3.0], [0.0, 2.0]], requires_grad=True)
    >>> penalty(outputs, norm="l1")
    tensor(3., grad_fn=<DivBackward0>)

References:
    Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, JMLR 24, 2023 (z-loss, with strength 1e-4);
    Zoph et al., ST-MoE: Designing Stable and Transferable Sparse Expert Models, 2022,
    https://arxiv.org/abs/2202.08906 (z-loss of a router, with strength 1e-3).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_regularize.units import at_least_float32

__all__ = ["NORMS", "penalty", "gradient"]


class _Norm(NamedTuple):
    """A sum over the elements of a tensor, its gradient, and the number of things that it is the sum over."""

    total: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    count: Callable[[Tensor], int]


def _samples(outputs: Tensor) -> int:
    return max(outputs.shape[0], 1)


def _positions(outputs: Tensor) -> int:
    return max(outputs.numel() // max(outputs.shape[-1], 1), 1)


def _square_of_logsumexp(outputs: Tensor) -> Tensor:
    return outputs.logsumexp(-1).square().sum()


def _its_gradient(outputs: Tensor) -> Tensor:
    return outputs.softmax(-1) * (2 * outputs.logsumexp(-1, keepdim=True))


NORMS = {
    "l1": _Norm(lambda x: x.abs().sum(), torch.sign, _samples),
    "l2": _Norm(lambda x: x.square().sum(), lambda x: 2 * x, _samples),
    "logsumexp": _Norm(_square_of_logsumexp, _its_gradient, _positions),
}
"""The norms by name."""


def penalty(outputs: Tensor, norm: str = "l1") -> Tensor:
    r"""Return how large the outputs of a module are, to be added to a loss.

    ========== ================================================ ============================================
    norm       penalty                                          also known as
    ========== ================================================ ============================================
    l1         :math:`\frac{1}{B} \sum_i |x_i|`                 ``activity_regularizer=L1(1.0)`` of Keras
    l2         :math:`\frac{1}{B} \sum_i x_i^2`                 ``activity_regularizer=L2(1.0)`` of Keras
    logsumexp  :math:`\frac{1}{N} \sum_n (\log \sum_c e^{x_{nc}})^2`  z-loss, where outputs are logits
    ========== ================================================ ============================================

    for :math:`B` samples, which are along dim 0, and :math:`N` positions with classes along the last dim. As in Keras
    there is no 1/2 before the squares, in contrast to :class:`~lightning_regularize.penalties.L2`.

    Args:
        outputs: Floating, with at least one dim.
        norm: "l1", "l2" or "logsumexp".

    Returns:
        A 0-d tensor on the same device, at least float32, of which autograd knows the gradient.

    Raises:
        ValueError: If there is no such norm, or ``outputs`` has no dim.

    Example:
        >>> penalty(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), norm="l2")
        tensor(12.5000)
    """
    kind = _checked(outputs, norm)
    return kind.total(outputs.to(at_least_float32(outputs))) / kind.count(outputs)


def gradient(outputs: Tensor, norm: str = "l1") -> Tensor:
    """Return the gradient of :func:`penalty`, 0 where there is a kink.

    Args:
        outputs: As for :func:`penalty`.
        norm: As for :func:`penalty`.

    Returns:
        A tensor of the shape of ``outputs``, at least float32.

    Raises:
        ValueError: If there is no such norm, or ``outputs`` has no dim.

    Example:
        >>> gradient(torch.tensor([[1.0, -3.0], [0.0, 2.0]]))
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.5000]])
    """
    kind = _checked(outputs, norm)
    return kind.gradient(outputs.to(at_least_float32(outputs))) / kind.count(outputs)


def _checked(outputs: Tensor, norm: str) -> _Norm:
    if norm not in list(NORMS):  # a list would have no hash
        raise ValueError(f"`norm` should be one of {', '.join(map(repr, NORMS))}, got {norm!r}.")
    if not outputs.dim():
        raise ValueError("`outputs` should have a dim for the samples of a batch, got a 0-d tensor.")
    return NORMS[norm]
