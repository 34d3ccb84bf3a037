"""How does a weight move that keeps its norm? By a turn, whose angle is the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_regularize._sharding import Sharding, local_pieces
from lightning_regularize._steps.buckets import multiply_each_
from lightning_regularize.norms import norms

if TYPE_CHECKING:
    from collections.abc import Sequence


@torch.no_grad()
def turn_(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    lengths: Tensor,
    radii: Tensor,
    *,
    sharding: Sharding | None = None,
) -> None:
    r"""Turn the step of an optimizer, whatever its length, into a step of a given length on a sphere.

    .. math:: W \leftarrow R\,\frac{V}{\lVert V\rVert}, \qquad
        V = W_0 - \eta R\,\frac{W_0 - W_1}{\lVert W_0 - W_1\rVert}

    A weight that the optimizer has left where it was stays there, and so does one of a single element, which cannot
    turn.

    Args:
        weights: :math:`W_1`, the weights after the step, of any shapes, float32 or wider; they become :math:`W`.
            Every rank that holds a piece of a DTensor should take part.
        before: :math:`W_0`, the local pieces of the weights before the step, with norm :math:`R`.
        lengths: :math:`\eta`, the length of each step relative to its radius, at least 0; shape ``(len(weights),)``,
            on the device of the first weight.
        radii: :math:`R`, the norm of each weight, positive; likewise.
        sharding: Which ranks hold pieces; by default only DTensors are taken to be spread.

    Example:
        >>> weight = torch.tensor([3.0, -10.0])
        >>> turn_([weight], [torch.tensor([3.0, 0.0])], lengths=torch.tensor([1.0]), radii=torch.tensor([3.0]))
        >>> weight
        tensor([ 2.1213, -2.1213])

    References:
        Wen et al., "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization", 2026,
        https://arxiv.org/abs/2606.16899.
    """
    pieces = local_pieces(weights)
    torch._foreach_sub_(pieces, list(before))
    step = norms(weights, sharding=sharding)
    has_moved = step != 0  # a step that is NaN stays one
    if any(weight.numel() == 1 for weight in weights):
        has_moved &= torch.tensor([weight.numel() > 1 for weight in weights], device=step.device)
    multiply_each_(pieces, torch.where(has_moved, lengths * radii / step, 0.0))
    torch._foreach_add_(pieces, list(before))
    length = norms(weights, sharding=sharding)
    multiply_each_(pieces, torch.where(has_moved & (length != 0), radii / length, 1.0))
