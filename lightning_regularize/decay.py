"""How does a weight shrink? One step of each kind of weight decay, as functions on lists of tensors.

``share`` is always the part of a weight that one step removes: learning rate times weight decay where the two are
coupled by the optimizer's convention, and weight decay alone where they are not. All functions change their first
argument in place, are exact for the pieces of a sharded tensor, and record nothing for autograd.

Where a function takes tensors, a single one is a list of one. Strengths are numbers, or tensors of one element, which
are never read back from their device. A list is worked on by a constant number of ``torch._foreach_*`` calls, whatever
its length.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_regularize._rows import dense_pieces, sums
from lightning_regularize._sharding import Sharding, local_pieces
from lightning_regularize._steps.buckets import (
    HALF,
    buckets,
    copies,
    listed,
    multiply_each_,
    new,
    operand,
    widened,
    write_back_,
)
from lightning_regularize.norms import power_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning_regularize._steps.buckets import Tensors


@torch.no_grad()
def decay_(weights: Tensors, share: float | Tensor) -> None:
    r"""Shrink weights, as AdamW does before its update.

    .. math:: w \leftarrow (1 - s)\,w

    With ``s = lr * weight_decay`` this is decoupled decay, to the last bit what torch's AdamW does; with a share that
    does not depend on the learning rate it is independent decay.

    Args:
        weights: Any shapes, floating.
        share: ``s``, in [0, 1].

    Example:
        >>> weights = [torch.tensor([1.0, -2.0]), torch.tensor([4.0])]
        >>> decay_(weights, 0.25)
        >>> weights
        [tensor([ 0.7500, -1.5000]), tensor([3.])]

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019;
        Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023,
        https://arxiv.org/abs/2309.14322 (independent decay).
    """
    check_share(share)
    factor = 1 - share
    if isinstance(factor, Tensor):
        for _, (some,) in buckets(listed(weights)):
            wide = widened(some)
            torch._foreach_mul_(wide, _like(factor, wide))
            write_back_(some, wide)
        return
    for (alike,) in _by_dtype(listed(weights)):
        torch._foreach_mul_(alike, operand(factor, alike))


@torch.no_grad()
def decay_stochastic_(weight: Tensor, share: float | Tensor, *, seed: int) -> None:
    r"""Shrink one weight in float32, and round to its low precision at random, so that the mean is right.

    .. math:: w \leftarrow \mathrm{round}_\xi\bigl((1 - s)\,w\bigr), \qquad
        \mathbb{E}\,[\mathrm{round}_\xi(x)] = x

    Rounding to nearest, ``w * (1 - s)`` is ``w`` again for every weight while ``s`` is below :math:`2^{-9}` in bfloat16
    and :math:`2^{-12}` in float16: nothing decays. Weights of float32 and wider are rounded to nearest as ever.

    Each weight has noise of its own, so there is no form for lists: a weight costs 12 launches in bfloat16 and 21 in
    float16, and as many again for each further 2**20 elements.

    Args:
        weight: Any shape, floating.
        share: ``s``, in [0, 1].
        seed: The noise is a function of it and of the shape alone, so that replicas stay equal and runs resume.

    Example:
        >>> weight = torch.ones(100_000, dtype=torch.bfloat16)
        >>> decay_stochastic_(weight, 1e-3, seed=0)
        >>> abs(weight.double().mean().item() - 0.999) < 1e-4
        True
    """
    if weight.dtype not in HALF:
        decay_(weight, share)
        return
    check_share(share)
    generator = torch.Generator(weight.device).manual_seed(seed)
    pieces = torch.split(weight.view(-1), _PIECE) if weight.is_contiguous() else (weight,)
    for piece in pieces:
        piece.copy_(_round_stochastically(piece.float().mul_(1 - share), piece.dtype, generator))


@torch.no_grad()
def change_stochastically_(tensor: Tensor, change: Callable[[Tensor], object], *, seed: int) -> None:
    r"""Change one tensor in float32, and round to its low precision at random, so that the mean is right.

    Rounding to nearest, what is added to a number is lost while it is below half the distance to the next number, such
    as 1/256 of it in bfloat16. Tensors of float32 and wider are changed as they are.

    Args:
        tensor: Any shape, floating.
        change: Changes in place what it is given: the tensor, or a float32 copy of it.
        seed: As of :func:`decay_stochastic_`.

    Example:
        >>> gradient = torch.ones(100_000, dtype=torch.bfloat16)
        >>> change_stochastically_(gradient, lambda wide: wide.add_(1e-3), seed=0)
        >>> abs(gradient.double().mean().item() - 1.001) < 1e-4
        True
    """
    if tensor.dtype not in HALF:
        change(tensor)
        return
    generator, wide = torch.Generator(tensor.device).manual_seed(seed), tensor.float()
    change(wide)
    tensor.copy_(_round_stochastically(wide, tensor.dtype, generator))


def noise_seed(seed: int, step: int, name: str) -> int:
    """Return a seed for one tensor in one step, the same in every process and in a resumed run.

    Args:
        seed: The user's.
        step: The number of the step.
        name: The name of the tensor.

    Example:
        >>> noise_seed(0, 7, "layer.weight") == noise_seed(0, 7, "layer.weight") != noise_seed(0, 8, "layer.weight")
        True
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=6).digest(), "big")


@torch.no_grad()
def couple_(gradients: Tensors, weights: Tensors, weight_decay: float | Tensor) -> None:
    r"""Add the gradient of :math:`\tfrac{\lambda}{2}\lVert w \rVert^2`, which an optimizer then treats as any other.

    .. math:: g \leftarrow g + \lambda w

    Args:
        gradients: Like ``weights``.
        weights: Any shapes, floating.
        weight_decay: :math:`\lambda`, at least 0; a tensor where a loss scale is in it.

    Example:
        >>> gradient = torch.zeros(2)
        >>> couple_(gradient, torch.tensor([1.0, -2.0]), 0.5)
        >>> gradient
        tensor([ 0.5000, -1.0000])
    """
    if isinstance(weight_decay, Tensor):
        for _, (into, some) in buckets(listed(gradients), listed(weights)):
            torch._foreach_add_(into, new("mul", some, _like(weight_decay, some)))
        return
    for into, alike in _by_dtype(listed(gradients), listed(weights)):
        torch._foreach_add_(into, alike, alpha=weight_decay)


@torch.no_grad()
def decay_cautiously_(weights: Tensors, before: Tensors, share: float | Tensor) -> None:
    r"""Shrink, after an update, the weights that the update has moved towards zero as well.

    .. math:: w \leftarrow w' - s\,\mathbf{1}\,[\,u \odot w \ge 0\,] \odot w, \qquad w' = w - \eta u

    Args:
        weights: :math:`w'`, the weights after the update; any shapes.
        before: :math:`w`, the weights before it.
        share: ``s``, in [0, 1].

    Example:
        >>> weight = torch.tensor([0.9, 1.1])
        >>> decay_cautiously_(weight, torch.tensor([1.0, 1.0]), 0.1)
        >>> weight
        tensor([0.8000, 1.1000])

    References:
        Chen et al., "Cautious Weight Decay", 2025, https://arxiv.org/abs/2510.12402.
    """
    check_share(share)
    strength = -1.0 if isinstance(share, Tensor) else -share
    for _, (after, start) in buckets(listed(weights), listed(before)):
        moved = new("sub", start, after)
        if moved[0].dtype == torch.float16:  # in which a product of small numbers is 0, whatever their signs
            torch._foreach_sign_(moved)
        torch._foreach_mul_(moved, start)
        is_single = len(after) == 1
        if is_single:
            moved[0].ge_(0)
        else:  # There is no `torch._foreach_ge_`. This leaves `start` where that is 1, and 0 elsewhere.
            torch._foreach_sign_(moved)
            torch._foreach_clamp_max_(moved, 0.0)
            torch._foreach_mul_(moved, start)
            torch._foreach_add_(moved, start)
        if isinstance(share, Tensor):
            torch._foreach_mul_(moved, _like(share, moved))
        if is_single:
            torch._foreach_addcmul_(after, start, moved, value=strength)
        else:
            torch._foreach_add_(after, moved, alpha=strength)


@torch.no_grad()
def pull_(weights: Tensors, anchors: Tensors, share: float | Tensor) -> None:
    r"""Move weights towards anchors.

    .. math:: w \leftarrow w - s\,(w - w_0)

    Args:
        weights: Any shapes, floating.
        anchors: :math:`w_0`, like ``weights``.
        share: ``s``, in [0, 1].

    Example:
        >>> weight = torch.tensor([1.0, 3.0])
        >>> pull_(weight, torch.tensor([1.0, 1.0]), 0.5)
        >>> weight
        tensor([1., 2.])

    References:
        Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (L2-SP), ICML 2018.
    """
    check_share(share)
    if isinstance(share, Tensor):
        for _, (some, those) in buckets(listed(weights), listed(anchors)):
            wide, gaps = widened(some), copies(those, slot="gaps")
            torch._foreach_sub_(gaps, wide)
            torch._foreach_mul_(gaps, _like(share, gaps))
            torch._foreach_add_(wide, gaps)
            write_back_(some, wide)
        return
    for alike, targets in _by_dtype(listed(weights), listed(anchors)):
        torch._foreach_lerp_(alike, targets, share)


@torch.no_grad()
def progress(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    sharding: Sharding | None = None,
) -> tuple[Tensor, Tensor]:
    r"""How far each weight is from its anchor, and whether its gradient calls it back.

    .. math:: \lVert w - w_0 \rVert, \qquad \langle g, w - w_0 \rangle > 0

    Args:
        weights: :math:`w`, parameters of any shapes. Every rank that holds a piece of a DTensor should take part.
        anchors: :math:`w_0`, the local pieces.
        gradients: :math:`g`, the local pieces.
        sharding: Which ranks hold pieces; by default only DTensors are taken to be spread.

    Returns:
        Two tensors of shape ``(len(weights),)``: distances in float64, and truth values.

    Example:
        >>> one = torch.ones(2)
        >>> progress([3 * one, 3 * one], [one, one], [one, -one])
        (tensor([2.8284, 2.8284], dtype=torch.float64), tensor([ True, False]))
    """
    gaps = torch._foreach_sub(local_pieces(weights), list(anchors))
    products = torch._foreach_mul(gaps, list(gradients))
    # One column for each, and so one collective for both.
    found = torch.stack([power_sums(dense_pieces(gaps), 2.0), sums(dense_pieces(products))], dim=1)
    squares, dots = (sharding or Sharding()).reduce(found, weights).unbind(dim=1)
    return squares.sqrt(), dots > 0


@torch.no_grad()
def pull_back_(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    distances: Tensor,
    strengths: Tensor,
    *,
    sharding: Sharding | None = None,
) -> None:
    r"""Take back what a step has added to the distance from the anchor, or a part of it.

    .. math:: w \leftarrow w - a\,r\,(w - w_0), \qquad
        r = \max\Bigl(0,\ 1 - \frac{d}{\lVert w - w_0 \rVert}\Bigr)

    With :math:`a = 1` a weight that has moved away is at the distance from before.

    Args:
        weights: :math:`w`, parameters after the step. Every rank that holds a piece of a DTensor should take part.
        anchors: :math:`w_0`, the local pieces.
        distances: :math:`d`, the distances before the step; shape ``(len(weights),)``.
        strengths: :math:`a` of each, at least 0; 0 for what should not be pulled. Likewise. No weight is pulled past
            its anchor.
        sharding: Which ranks hold pieces; by default only DTensors are taken to be spread.

    Example:
        >>> weight, anchor = torch.tensor([4.0, 1.0]), torch.tensor([0.0, 1.0])
        >>> pull_back_([weight], [anchor], distances=torch.tensor([2.0]), strengths=torch.tensor([1.0]))
        >>> weight
        tensor([2., 1.])

    References:
        Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024,
        https://arxiv.org/abs/2411.01713.
    """
    pieces = local_pieces(weights)
    gaps = torch._foreach_sub(pieces, list(anchors))
    squares = (sharding or Sharding()).reduce(power_sums(dense_pieces(gaps), 2.0), weights)
    ratios = (1 - distances / squares.sqrt()).nan_to_num(nan=0.0, neginf=0.0).clamp_min(0)  # 0 where nothing has moved
    multiply_each_(gaps, (strengths * ratios).clamp_max(1))
    torch._foreach_sub_(pieces, gaps)


@torch.no_grad()
def pull_by_importance_(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor], share: float | Tensor
) -> None:
    r"""Move weights towards anchors, each element by an importance of its own.

    .. math:: w \leftarrow w - s\,F \odot (w - w_0)

    Args:
        weights: Any shapes, floating.
        anchors: :math:`w_0`, like ``weights``.
        importance: :math:`F`, like ``weights``, at least 0; for elastic weight consolidation the diagonal of the Fisher
            information.
        share: ``s``, with which no element of :math:`sF` should exceed 1.

    Example:
        >>> weight = torch.tensor([2.0, 2.0])
        >>> pull_by_importance_([weight], [torch.zeros(2)], [torch.tensor([1.0, 0.0])], 0.5)
        >>> weight
        tensor([1., 2.])

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
        https://arxiv.org/abs/1612.00796.
    """
    for _, (some, those, factors) in buckets(listed(weights), listed(anchors), listed(importance)):
        wide = widened(some)
        gaps = copies(those, slot="gaps")
        torch._foreach_sub_(gaps, wide)
        torch._foreach_mul_(gaps, factors)
        if isinstance(share, Tensor):
            torch._foreach_mul_(gaps, _like(share, gaps))
            torch._foreach_add_(wide, gaps)
        else:
            torch._foreach_add_(wide, gaps, alpha=share)
        write_back_(some, wide)


def next_multiplier(multiplier: Tensor, square_norm: Tensor, bound: Tensor, numel: Tensor) -> Tensor:
    r"""The Lagrange multiplier of :math:`\lVert W \rVert^2 \le \kappa` after one step of constrained decay.

    .. math:: l \leftarrow \max\bigl(0,\; l + (\lVert W \rVert^2 - \kappa) / n\bigr)

    The weight then becomes :math:`W (1 - 2 l)`, which is :func:`decay_` with a share of :math:`2 l`.

    Args:
        multiplier: ``l`` of each matrix, shape ``(k,)``.
        square_norm: :math:`\lVert W \rVert^2` of each, after the optimizer's step.
        bound: :math:`\kappa` of each; infinite where it is not known yet.
        numel: ``n``, the number of weights of each.

    Returns:
        The new ``l``, shape ``(k,)``, at least 0.

    Example:
        >>> one = torch.tensor([1.0])
        >>> next_multiplier(0 * one, square_norm=3 * one, bound=one, numel=4 * one)
        tensor([0.5000])

    References:
        Franke et al., "Improving Deep Learning Optimization through Constrained Parameter Regularization" (CPR),
        NeurIPS 2024, https://arxiv.org/abs/2311.09058.
    """
    return (multiplier + (square_norm - bound) / numel).clamp_min(0)


def check_share(share: float | Tensor) -> None:
    """Refuse a share of a weight outside [0, 1].

    Args:
        share: The part of each weight that a step removes; a tensor is not looked at, which would wait for its device.

    Raises:
        ValueError: It is out of range.
    """
    if not isinstance(share, Tensor) and not 0 <= share <= 1:
        raise ValueError(
            f"A step should remove a share in [0, 1] of each weight, got {share:.6g}: as a product with the learning "
            "rate the strength is too large, and weights would change their sign and grow."
        )


def _by_dtype(*columns: Sequence[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
    """The rows of a table of tensors by the device and dtype in the last column: what torch takes in one call.

    Unlike :func:`~lightning_regularize._steps.buckets.buckets` it cuts nothing, which is fast, and enough where there
    are no temporaries.
    """
    dtypes, devices = [tensor.dtype for tensor in columns[-1]], [tensor.device for tensor in columns[-1]]
    if len(set(dtypes)) == 1 and len(set(devices)) == 1:
        return [tuple(map(list, columns))]
    kinds = zip(devices, dtypes, strict=True)
    rows: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for kind, row in zip(kinds, zip(*columns, strict=True), strict=True):
        rows.setdefault(kind, []).append(row)
    return [tuple(map(list, zip(*alike, strict=True))) for alike in rows.values()]


def _like(strength: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """A strength with the dtype and on the device of a list, as torch needs it to take the list in one call."""
    return strength.to(tensors[0].device, tensors[0].dtype, non_blocking=True)


_PIECE = 2**20  # elements that are rounded at a time, so that no full-size float32 copy is made
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # which the mantissa of float32 loses


def _round_stochastically(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 to ``dtype``, up or down with a probability that keeps the mean."""
    most = 1 << DROPPED_BITS[dtype]
    noise = torch.randint(0, most, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return round_with(noise, value, dtype)


def round_with(noise: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to ``dtype``, up where ``noise``, from 0 to ``2 ** DROPPED_BITS[dtype]``, and the dropped bits carry."""
    dropped = DROPPED_BITS[dtype]
    rounded = value.view(torch.int32).add(noise).bitwise_and_(-1 << dropped).view(torch.float32)
    if dtype == torch.float16:  # below its normal range the spacing no longer shrinks
        quantum = 2.0**-24
        uniform = noise.float().div_(1 << dropped)
        rounded = torch.where(value.abs() < 2.0**-14, value.div(quantum).add_(uniform).floor_() * quantum, rounded)
    return torch.where(value.isfinite(), rounded, value).to(dtype)
