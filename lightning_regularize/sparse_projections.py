"""Which weights may be other than zero? Projections onto weights with a given number of zeros."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor

from lightning_regularize._checks import check_positive_integer
from lightning_regularize._projection import Projection, any_of, check_number_or_schedule, number_now
from lightning_regularize._sharding import copy_pieces_, gathered, is_dtensor
from lightning_regularize._steps.buckets import Tensors, buckets, listed, put_back_, scratch, stacked
from lightning_regularize.schedules import Schedule
from lightning_regularize.units import at_least_float32, check_dim, spread_of, unit_buckets, unit_dims

__all__ = ["NM", "TopShare"]

_DIGIT = 16  # bits: a float32 has two digits of them, a float64 four, and each is counted in one pass
_LARGE = 2**16  # elements of a tensor on a CPU, above which counting is faster than selecting


@final
@dataclass(frozen=True)
class NM(Projection):
    r"""Of every ``m`` neighbors along the input dim ``n`` are zero: 2 of 4 is what sparse tensor cores are made for.

    The ``n`` smallest magnitudes become zero, the first of equal ones, which is the nearest point of the set. The input
    dim is the first of those that hold the incoming weights of a unit: dim 1 of a Linear or a convolution. The zeros
    are chosen anew in every step. A DTensor that ranks cut along the input dim is gathered for the time of the call.

    Args:
        n: How many are zero, at least 1 and less than ``m``.
        m: Of how many; it should divide the size of the input dim.
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see
            :func:`~lightning_regularize.units.norm_dims`.

    Raises:
        ValueError: If ``n`` or ``m`` is not a positive integer, or ``n`` is not less than ``m``.

    Example:
        >>> NM(2, 4).project(torch.tensor([[0.1, -3.0, 2.0, 0.5], [4.0, 3.0, 2.0, -1.0]]))
        tensor([[ 0., -3.,  2.,  0.],
                [ 4.,  3.,  0.,  0.]])

    References:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks from Scratch, ICLR 2021;
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378.
    """

    n: int
    m: int
    dim: int | Sequence[int] | None = None
    per_unit: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_integer(self.n, "`n`")
        check_positive_integer(self.m, "`m`")
        if self.n >= self.m:
            raise ValueError(f"`n` should be less than `m`, or all weights are zero, got n={self.n} and m={self.m}.")
        check_dim(self.dim)

    def check_shape(self, shape: Sequence[int], dim: Sequence[int] | None) -> None:
        """Refuse a weight whose input dim ``m`` does not divide, see :meth:`Projection.check_shape`.

        Raises:
            ValueError: If ``m`` does not divide the size of the input dim.
        """
        along = min(dim) if dim else 1
        if shape[along] % self.m:
            raise ValueError(
                f"`m` should divide the size of the input dim, got m={self.m} for dim {along} of shape {tuple(shape)}."
            )

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Set the smallest weights to zero in place, see :meth:`Projection.project_`.

        Raises:
            ValueError: If ``m`` does not divide the size of the input dim.
        """
        weights, changed = listed(weight), []
        along = [unit_dims(each, self.dim if dim is None else dim)[:1] for each in weights]
        for each, dims in zip(weights, along, strict=True):
            self.check_shape(each.shape, dims)
        for indices, (those,) in unit_buckets(along, weights):
            is_cut = spread_of(those[0]) is not None
            rows = torch.stack(list(map(gathered, those))) if is_cut else stacked(those)
            input_dim = along[indices[0]][0] + 1
            groups = rows.unflatten(input_dim, (-1, self.m)).movedim(input_dim + 1, -1)  # type: ignore[no-untyped-call]
            smallest = groups.abs().argsort(dim=-1, stable=True)[..., : self.n]
            changed.append((groups.gather(-1, smallest) != 0).any())
            groups.scatter_(-1, smallest, 0)
            if is_cut:
                copy_pieces_(those, rows.unbind())
            else:
                put_back_(those, rows)
        return any_of(changed, weights)


@final
@dataclass(frozen=True)
class TopShare(Projection):
    r"""The largest ``share`` of the weights stays, all others are zero: ``TopShare(0.1)`` makes 90 % zeros.

    Of ``n`` weights ``round(share * n)`` keep their values, at least one: those with the largest magnitudes, which is
    the nearest point of the set. The number is met exactly, also where magnitudes are equal: of weights in one tensor
    the first become zero. The zeros are chosen anew in every step, unless ``WeightConstraint(..., freeze_zeros=...)``
    keeps them. Weights that ranks hold pieces of are gathered, one tensor or a few small ones at a time; over all
    tensors this is done three times.

    Args:
        share: What is kept, in (0, 1]; or a schedule, such as a
            :class:`~lightning_regularize.schedules.CubicRamp` from 1.0 to 0.1.
        scope: "tensor" keeps this share of each tensor; "all" of all tensors of a list together, which in a
            ``WeightConstraint`` are all that it constrains in one optimizer, of a ``ChainedOptimizer`` in each of its
            inner ones.

    Raises:
        TypeError: If ``share`` is neither a number nor a schedule.
        ValueError: If ``share`` is not in (0, 1], or ``scope`` is neither of the two.

    Example:
        >>> TopShare(0.5).project(torch.tensor([[3.0, -1.0], [2.0, -4.0]]))
        tensor([[ 3.,  0.],
                [ 0., -4.]])

    References:
        Zhu and Gupta, To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression, 2017,
        https://arxiv.org/abs/1710.01878.
    """

    share: float | Schedule
    scope: Literal["tensor", "all"] = "tensor"
    keeps_zeros: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number_or_schedule("share", self.share)
        if not isinstance(self.share, Schedule) and not 0 < self.share <= 1:
            percent = f" {self.share:g} % is {self.share / 100:g}." if 1 < self.share <= 100 else ""
            raise ValueError(f"`share` should be in (0, 1], the part that is kept, got {self.share!r}.{percent}")
        if self.scope not in ("tensor", "all"):
            raise ValueError(f"`scope` should be 'tensor' or 'all', got {self.scope!r}.")

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Set all but the largest weights to zero in place, see :meth:`Projection.project_`."""
        share, weights = number_now(self, "share"), [each for each in listed(weight) if each.numel()]
        if self.scope == "all":
            size = sum(each.numel() for each in weights)
            return any_of([_drop_from_all_(weights, dropped)] if (dropped := _dropped(size, share)) else [], weights)
        changed = []
        alike = [(each.shape, spread_of(each)) for each in weights]
        for _, (those,) in buckets(weights, alike=alike, dims=[None] * len(weights)):
            if dropped := _dropped(those[0].numel(), share):
                changed.append(_drop_from_each_(those, dropped))
        return any_of(changed, weights)


def _dropped(size: int, share: float) -> int:
    """How many of ``size`` weights become zero."""
    return size - max(round(share * size), 1) if size else 0


def _drop_from_each_(weights: list[Tensor], number: int) -> Tensor:
    """Set the smallest ``number`` weights of each tensor to zero; all are of one shape and spread alike."""
    whole = [gathered(each) if is_dtensor(each) else each for each in weights]
    if len(whole) == 1 and whole[0].is_cpu and whole[0].numel() > _LARGE:
        changed = _drop_from_all_(whole, number)
    else:
        rows = stacked(whole)
        sizes = rows.flatten(1).abs().to(at_least_float32(rows)).nan_to_num_(nan=math.inf, posinf=math.inf)  # NaN stays
        if rows.is_cpu:
            limit = sizes.kthvalue(number, dim=1, keepdim=True).values
        else:  # where `kthvalue` has one block of threads for each tensor
            limit = sizes.sort(dim=1).values[:, number - 1 : number]
        below, equal = sizes < limit, sizes == limit
        left = number - below.sum(1, keepdim=True)
        rows.masked_fill_((below | (equal & (_ordinal(equal) <= left))).view(rows.shape), 0)
        put_back_(whole, rows)
        changed = (limit > 0).any()
    if is_dtensor(weights[0]):
        copy_pieces_(weights, whole)
    return changed


def _drop_from_all_(weights: list[Tensor], number: int) -> Tensor:
    """Set the smallest ``number`` weights of all tensors together to zero.

    The bits of magnitudes, read as integers, have the order of the magnitudes, with NaN above all. The threshold is
    found digit by digit: how many have each value of the first digit, then, of those that agree with the threshold in
    it, of the second. No more than a bucket of weights is copied, or gathered, at a time.
    """
    wide = max((at_least_float32(each) for each in weights), key=lambda dtype: dtype.itemsize)
    device, width = weights[0].device, 8 * wide.itemsize
    limit, left = None, torch.full((), number, device=device)
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 + 2**_DIGIT, dtype=torch.int64, device=device)
        for _, flat in _flat(weights):
            bits = _bits(flat, wide)
            digits = torch.bitwise_right_shift(bits, shift, out=scratch(bits, dtype=torch.int64, slot="digits"))
            if limit is None:
                matches = torch.ones((), dtype=torch.int64, device=flat.device).expand_as(digits)
            else:
                matches = torch.bitwise_right_shift(digits, _DIGIT, out=scratch(digits, slot="matches"))
                torch.eq(matches, limit.to(flat.device, non_blocking=True), out=matches)
                digits &= 2**_DIGIT - 1
            here = counts if flat.device == device else torch.zeros_like(counts, device=flat.device)
            here[1:].scatter_add_(0, digits, matches)
            if here is not counts:
                counts += here.to(device, non_blocking=True)
        totals = counts.cumsum(0)  # how many have a smaller digit, for each digit
        digit = torch.searchsorted(totals, left) - 1
        left = left - totals.gather(0, digit.view(1))[0]
        limit = digit if limit is None else torch.add(digit, limit, alpha=2**_DIGIT)
    limit, ordinal = cast("Tensor", limit), None
    for those, flat in _flat(weights):
        if ordinal is not None:
            left = left - ordinal[-1].to(device, non_blocking=True)
        here, rest = (each.to(flat.device, non_blocking=True) for each in (limit, left))
        bits = _bits(flat, wide)
        equal = bits == here
        ordinal = _ordinal(equal)
        flat.masked_fill_((bits < here) | (equal & (ordinal <= rest)), 0)
        values = torch.split(flat, [each.numel() for each in those])
        copy_pieces_(those, [value.view(each.shape) for value, each in zip(values, those, strict=True)])
    changed: Tensor = limit > 0
    return changed


def _flat(weights: list[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Whole weights side by side, a bucket at a time: some tensors, and their elements. All ranks should take part."""
    for _, (those,) in buckets([each for each in weights if not is_dtensor(each)]):
        side_by_side = [each.reshape(-1) for each in those]
        yield those, torch.cat(side_by_side, out=scratch(those[0], [sum(map(len, side_by_side))], slot="flat"))
    for each in filter(is_dtensor, weights):
        yield [each], gathered(each).reshape(-1)


def _ordinal(mask: Tensor) -> Tensor:
    """For each True along the last dim, which of them it is, from 1; on a CPU a tenth of the time of 64 bits."""
    return mask.cumsum(-1, dtype=torch.int32)


def _bits(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of magnitudes as integers: a temporary."""
    sizes = torch.abs(flat, out=scratch(flat, slot="sizes")).to(dtype)
    return sizes.view(torch.int32 if dtype.itemsize == 4 else torch.int64)
