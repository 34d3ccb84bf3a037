r"""What pulls weights to zero? Penalties: their values, their gradients, and the steps that end at zero exactly.

A penalty is a function :math:`a R(w)` that is added to the loss. The class says :math:`R`; the strength :math:`a` is an
argument everywhere, so that it can follow a schedule. There are two ways to minimize it along with the loss:

* ``add_gradient_`` before the optimizer's step. It works with every optimizer, but weights only hover around zero.
* ``proximal_`` after the step,

  .. math:: w \leftarrow \operatorname{prox}_{tR}(w) = \arg\min_x \tfrac{1}{2} \lVert x - w \rVert_2^2 + t R(x),

  which sets weights to zero and leaves them there. The threshold is the strength times the step that the optimizer
  takes for a unit gradient: ``lr`` for SGD, ``lr / (1 - momentum)`` with momentum, ``lr / (sqrt(v_hat) + eps)`` of each
  weight for Adam. With any other the minimum is not the one asked for, or has no zeros.

Every method takes one tensor or a list of them, and works on a list by a number of calls that does not depend on its
length. Large tensors are worked on in pieces, so that temporaries are small. A DTensor stands for its piece on this
rank wherever weights do not need to know of each other; groups may be spread over ranks.

References:
    Parikh and Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1(3), 2014.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from lightning_regularize._checks import check_is_number
from lightning_regularize._penalty import Penalty, check_strength, dense_gradients
from lightning_regularize._sharding import local_piece, local_pieces
from lightning_regularize._steps.buckets import (
    Tensors,
    buckets,
    copies,
    listed,
    new,
    operand,
    put_back_,
    scratch,
    stacked,
    widened,
    write_back_,
)
from lightning_regularize.autograd_penalties import ByAutograd, Function, Orthogonal, Spectral
from lightning_regularize.norms import norms
from lightning_regularize.nuclear_norm import NuclearNorm
from lightning_regularize.units import check_dim, norms_of_units, spread_of, sum_over_ranks, unit_buckets, unit_dims

__all__ = [
    "Penalty",
    "L1", "L2", "ElasticNet", "GroupLasso", "NuclearNorm", "ByAutograd", "Function", "Orthogonal", "Spectral",
]  # fmt: skip

_STEPS_ON_CPU = 10  # of Newton's method, at most
_STEPS_ELSEWHERE = 7  # always: to ask a device whether fewer suffice would wait for it


@final
@dataclass(frozen=True)
class L1(Penalty):
    r"""The sum of magnitudes: single weights become zero (the lasso).

    .. math:: R(w) = \sum_i |w_i|, \quad \nabla R = \operatorname{sign}(w), \quad
        \operatorname{prox}_{tR}(w) = \operatorname{sign}(w) \max(|w| - t, 0)

    Example:
        >>> weight, gradient = torch.tensor([-0.5, 0.0, 2.0]), torch.zeros(3)
        >>> L1().value(weight, strength=0.1)
        tensor(0.2500, dtype=torch.float64)
        >>> L1().add_gradient_(gradient, weight, strength=0.1)
        >>> gradient
        tensor([-0.1000,  0.0000,  0.1000])
        >>> L1().proximal_(weight, threshold=0.75)
        >>> weight.abs()
        tensor([0.0000, 0.0000, 1.2500])

    References:
        Tibshirani, Regression Shrinkage and Selection via the Lasso, J. R. Stat. Soc. B 58(1), 1996.
    """

    takes_lists: ClassVar[bool] = True
    takes_pieces: ClassVar[bool] = True

    @torch.no_grad()
    def value(
        self, weight: Tensors, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the sum of magnitudes, see :meth:`Penalty.value`."""
        check_strength("strength", strength)
        return norms(listed(weight), 1.0).sum() * strength

    @torch.no_grad()
    def add_gradient_(
        self, gradient: Tensors, weight: Tensors, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * sign(weight)``, see :meth:`Penalty.add_gradient_`."""
        for gradients, weights in _with_gradients(weight, gradient, strength):
            _add_(gradients, new("sign", weights), strength)

    @torch.no_grad()
    def proximal_(self, weight: Tensors, threshold: float | Tensors, *, dim: int | Sequence[int] | None = None) -> None:
        """Move every weight ``threshold`` nearer to zero, at most there, see :meth:`Penalty.proximal_`."""
        for weights, thresholds in _with_thresholds(weight, threshold, bounded=False):
            _soft_threshold_(weights, thresholds)


@final
@dataclass(frozen=True)
class L2(Penalty):
    r"""Half the sum of squares: all weights shrink, none becomes zero (ridge regression; coupled weight decay).

    .. math:: R(w) = \tfrac{1}{2} \sum_i w_i^2, \quad \nabla R = w, \quad \operatorname{prox}_{tR}(w) = \frac{w}{1 + t}

    Example:
        >>> weight = torch.tensor([3.0, 4.0])
        >>> L2().value(weight, strength=0.1)
        tensor(1.2500, dtype=torch.float64)
        >>> L2().proximal_(weight, threshold=1.0)
        >>> weight
        tensor([1.5000, 2.0000])

    References:
        Hoerl and Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems, Technometrics 12(1), 1970.
    """

    takes_lists: ClassVar[bool] = True
    takes_pieces: ClassVar[bool] = True

    @torch.no_grad()
    def value(
        self, weight: Tensors, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times half the sum of squares, see :meth:`Penalty.value`."""
        check_strength("strength", strength)
        return norms(listed(weight)).square().sum() * (0.5 * strength)

    @torch.no_grad()
    def add_gradient_(
        self, gradient: Tensors, weight: Tensors, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * weight``, see :meth:`Penalty.add_gradient_`."""
        for gradients, weights in _with_gradients(weight, gradient, strength, bounded=False):
            _add_(gradients, weights, strength)

    @torch.no_grad()
    def proximal_(self, weight: Tensors, threshold: float | Tensors, *, dim: int | Sequence[int] | None = None) -> None:
        """Divide by ``1 + threshold``, see :meth:`Penalty.proximal_`."""
        for weights, thresholds in _with_thresholds(weight, threshold, bounded=False):
            _divide_(weights, thresholds, 1.0)


@final
@dataclass(frozen=True)
class ElasticNet(Penalty):
    r"""L1 and L2 together: zeros as with the lasso, but weights that do the same are kept or dropped together.

    .. math:: R(w) = r \sum_i |w_i| + \tfrac{1}{2} (1 - r) \sum_i w_i^2, \quad
        \operatorname{prox}_{tR}(w) = \frac{\operatorname{sign}(w) \max(|w| - t r, 0)}{1 + t (1 - r)}

    This is scikit-learn's convention, where the strength is called ``alpha``. Two strengths of one's own, ``l1`` and
    ``l2``, are ``ElasticNet(l1 / (l1 + l2))`` at strength ``l1 + l2``.

    Args:
        l1_ratio: ``r``, in [0, 1]: 1 is :class:`L1`, 0 is :class:`L2`.

    Raises:
        ValueError: If ``l1_ratio`` is not in [0, 1].

    Example:
        >>> weight = torch.tensor([-0.5, 0.0, 2.0])
        >>> ElasticNet(0.5).value(weight, strength=2.0)
        tensor(4.6250, dtype=torch.float64)
        >>> ElasticNet(0.5).proximal_(weight, threshold=2.0)
        >>> weight.abs()
        tensor([0.0000, 0.0000, 0.5000])

    References:
        Zou and Hastie, Regularization and Variable Selection via the Elastic Net, J. R. Stat. Soc. B 67(2), 2005.
    """

    l1_ratio: float
    takes_lists: ClassVar[bool] = True
    takes_pieces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_is_number("l1_ratio", self.l1_ratio)
        if not 0 <= self.l1_ratio <= 1:
            raise ValueError(f"`l1_ratio` should be in [0, 1], got {self.l1_ratio!r}.")

    @torch.no_grad()
    def value(
        self, weight: Tensors, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the mixture, see :meth:`Penalty.value`."""
        check_strength("strength", strength)
        return L1().value(weight, self.l1_ratio * strength) + L2().value(weight, (1 - self.l1_ratio) * strength)

    @torch.no_grad()
    def add_gradient_(
        self, gradient: Tensors, weight: Tensors, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * (r * sign(weight) + (1 - r) * weight)``, see :meth:`Penalty.add_gradient_`."""
        for gradients, weights in _with_gradients(weight, gradient, strength):
            _add_(gradients, new("sign", weights), strength * self.l1_ratio)
            _add_(gradients, weights, strength * (1 - self.l1_ratio))

    @torch.no_grad()
    def proximal_(self, weight: Tensors, threshold: float | Tensors, *, dim: int | Sequence[int] | None = None) -> None:
        """Move towards zero, then divide, see :meth:`Penalty.proximal_`."""
        for weights, thresholds in _with_thresholds(weight, threshold):
            if isinstance(thresholds, float):
                _soft_threshold_(weights, thresholds * self.l1_ratio)
            else:
                _soft_threshold_(weights, new("mul", thresholds, operand(self.l1_ratio, thresholds), slot="share"))
            _divide_(weights, thresholds, 1 - self.l1_ratio)


@final
@dataclass(frozen=True)
class GroupLasso(Penalty):
    r"""The norms of output units, each times the root of its size: whole neurons and channels become zero.

    .. math:: R(w) = \sum_g \sqrt{|g|} \lVert w_g \rVert_2, \quad
        \operatorname{prox}_{tR}(w)_g = w_g \max\Bigl(0, 1 - \frac{t \sqrt{|g|}}{\lVert w_g \rVert_2}\Bigr)

    A threshold is one number, a 0-d tensor, or a tensor with one element a group, such as the norms' shape, which is
    ``weight``'s with ``dim`` of size 1. One of ``weight``'s own shape is a metric, such as Adam's, for the distance:

    .. math:: \operatorname{prox}(w) = \arg\min_x \tfrac{1}{2} \sum_i \frac{(x_i - w_i)^2}{t_i} + R(x), \quad
        x_i = w_i \, \frac{\nu_g}{\nu_g + t_i \sqrt{|g|}}, \quad \nu_g = \lVert x_g \rVert_2

    where Newton's method finds :math:`\nu_g`, to rounding; on a GPU, where it always makes 7 steps, nearly so if a few
    thresholds are smaller than the others by orders of magnitude. If ranks hold pieces of a group it makes 10 steps
    with a small collective each.

    Args:
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see
            :func:`~lightning_regularize.units.norm_dims`.

    Raises:
        TypeError: If ``dim`` is neither an integer nor a sequence of integers.
        ValueError: If ``dim`` is empty.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> GroupLasso().value(weight, strength=0.1)
        tensor(0.7778, dtype=torch.float64)
        >>> GroupLasso().proximal_(weight, threshold=2.5 / 2**0.5)
        >>> weight
        tensor([[1.5000, 2.0000],
                [0.0000, 0.0000]])

    References:
        Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, J. R. Stat. Soc. B 68(1),
        2006; Yun, Lozano and Yang, Adaptive Proximal Gradient Methods for Structured Neural Networks, NeurIPS 2021 (in
        the metric of an adaptive optimizer).
    """

    dim: int | Sequence[int] | None = None
    per_unit: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True
    takes_pieces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_dim(self.dim)

    @torch.no_grad()
    def value(
        self, weight: Tensors, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the sum over groups, see :meth:`Penalty.value`."""
        check_strength("strength", strength)
        weights, dim = listed(weight), self.dim if dim is None else dim
        # What ranks found is added up once for all weights that are spread alike; all ranks meet them in one order.
        alike: dict[tuple[Hashable, int, tuple[int, ...]], list[Tensor]] = {}
        for each in weights:
            alike.setdefault((spread_of(each), each.dim(), unit_dims(each, dim)), []).append(each)
        values = []
        for (_, number, dims), those in alike.items():
            found = [
                norms_of_units(stacked(w, wide=True), w[0], dims).sum() * _root_size(w[0], dims)
                for _, (w,) in unit_buckets([dims] * len(those), those)
            ]
            others = [d for d in range(number) if d not in dims]
            values.append(sum_over_ranks(_sum(found), those[0], others))
        return _sum(values) * strength

    @torch.no_grad()
    def add_gradient_(
        self, gradient: Tensors, weight: Tensors, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * sqrt(|g|)`` in the direction of each group, see :meth:`Penalty.add_gradient_`."""
        check_strength("strength", strength)
        weights = listed(weight)
        dims = [unit_dims(each, self.dim if dim is None else dim) for each in weights]
        for indices, (w, g) in unit_buckets(dims, weights, dense_gradients(gradient)):
            units, inner = stacked(w, wide=True), dims[indices[0]]
            found = norms_of_units(units, w[0], inner)
            factors = (_root_size(w[0], inner) * strength / found).nan_to_num_(0.0, 0.0)  # 0 where the norm is
            sums = stacked(g, slot="gradients", wide=True)
            sums.addcmul_(units, factors.to(torch.promote_types(units.dtype, torch.float32)))
            put_back_(g, sums)

    @torch.no_grad()
    def proximal_(self, weight: Tensors, threshold: float | Tensors, *, dim: int | Sequence[int] | None = None) -> None:
        """Shorten every group by its threshold, at most to zero, see :meth:`Penalty.proximal_`.

        Raises:
            ValueError: If ``threshold`` is a number and negative or not finite, or a tensor with neither one element
                per group nor one per weight.
        """
        weights, thresholds = listed(weight), _checked(threshold)
        dims = [unit_dims(each, self.dim if dim is None else dim) for each in weights]
        columns = [list(map(_as_groups, thresholds, weights, dims))] if isinstance(thresholds, list) else []
        for indices, (w, *t) in unit_buckets(dims, weights, *columns, bounded=bool(columns)):
            units, inner = stacked(w, wide=True), dims[indices[0]]
            root = _root_size(w[0], inner)
            if isinstance(thresholds, list):
                each = stacked(t[0], slot="thresholds")
                removed: Any = torch.mul(each, root, out=scratch(each, slot="removed"))
            else:
                removed = thresholds * root
            if isinstance(removed, Tensor) and removed.shape == units.shape:
                _shrink_in_metric_(units, removed, w[0], inner)
            else:
                found = norms_of_units(units, w[0], inner)
                factors = torch.where(found > removed, 1 - removed / found, 0.0)
                units.mul_(factors.to(torch.promote_types(units.dtype, torch.float32)))
            put_back_(w, units)


def _checked(threshold: float | Tensors) -> float | Tensor | list[Tensor]:
    """A number or 0-d tensor for all weights, or a list with a tensor for each."""
    if isinstance(threshold, Tensor) and threshold.dim():
        return [threshold]
    if isinstance(threshold, Tensor):
        return local_piece(threshold)
    if isinstance(threshold, list | tuple) and all(isinstance(each, Tensor) for each in threshold):
        return list(threshold)
    check_strength("threshold", threshold)
    return float(threshold)  # type: ignore[arg-type]


def _with_gradients(
    weight: Tensors, gradient: Tensors, strength: float | Tensor, *, bounded: bool = True
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Lists of gradients and of weights on this rank."""
    gradients = dense_gradients(gradient)
    check_strength("strength", strength)
    for bucket in buckets(local_pieces(listed(weight)), local_pieces(gradients), bounded=bounded):
        yield bucket.columns[1], bucket.columns[0]


def _add_(gradients: list[Tensor], terms: list[Tensor], strength: float | Tensor) -> None:
    if isinstance(strength, Tensor) and not strength.is_cpu:  # as `alpha` it would have to come to the host
        torch._foreach_add_(gradients, new("mul", terms, strength, slot="scaled"))
    else:
        torch._foreach_add_(gradients, terms, alpha=float(strength))


def _with_thresholds(
    weight: Tensors, threshold: float | Tensors, *, bounded: bool = True
) -> Iterator[tuple[list[Tensor], float | list[Tensor]]]:
    """Lists of weights on this rank, each with one number for all of them, or with a list of tensors of their shapes.

    Half precision is computed in float32 and rounded once, when the next list is asked for.

    Raises:
        ValueError: A threshold is a tensor of another shape.
    """
    weights, thresholds = listed(weight), _checked(threshold)
    columns = [weights, thresholds] if isinstance(thresholds, list) else [weights]
    for row in zip(*columns, strict=True):
        if row[-1].shape not in (row[0].shape, local_piece(row[0]).shape):
            raise ValueError(
                "`threshold` should be a number, a 0-d tensor, or a tensor of the weight's shape "
                f"{tuple(row[0].shape)}, got shape {tuple(row[-1].shape)}."
            )
    for bucket in buckets(*map(local_pieces, columns), bounded=bounded or not isinstance(thresholds, float)):
        narrow, *found = bucket.columns
        wide = widened(narrow)
        if isinstance(thresholds, float):
            yield wide, thresholds
        elif isinstance(thresholds, list):
            yield wide, found[0] if found[0][0].dtype == wide[0].dtype else copies(found[0], slot="threshold")
        else:
            same = copies(wide, slot="threshold")
            torch._foreach_zero_(same)
            torch._foreach_add_(same, 1.0)
            torch._foreach_mul_(same, thresholds)  # to add it would read it on the host (torch 2.13)
            yield wide, same
        write_back_(narrow, wide)


def _soft_threshold_(weights: list[Tensor], thresholds: float | list[Tensor]) -> None:
    if isinstance(thresholds, list):
        bounded = new("neg", thresholds, slot="bounded")
        if len(weights) == 1:  # in one pass
            torch.clamp(weights[0], bounded[0], thresholds[0], out=bounded[0])
        else:
            torch._foreach_maximum_(bounded, weights)
            torch._foreach_minimum_(bounded, thresholds)
    elif weights[0].is_cpu:
        for weight in weights:  # in one pass over memory, and in place: `torch.nn.functional.softshrink` has no `out`
            torch.ops.aten.softshrink.out(weight, thresholds, out=weight)
        return
    else:
        bounded = list(torch._foreach_clamp_max(weights, thresholds))
        torch._foreach_clamp_min_(bounded, -thresholds)
    torch._foreach_sub_(weights, bounded)


def _divide_(weights: list[Tensor], thresholds: float | list[Tensor], share: float) -> None:
    """Divide by ``1 + share * threshold``."""
    if isinstance(thresholds, list):
        divisors = new("mul", thresholds, operand(share, thresholds), slot="divisors")
        torch._foreach_add_(divisors, operand(1.0, divisors))
        torch._foreach_div_(weights, divisors)
    else:
        torch._foreach_div_(weights, operand(1.0 + share * thresholds, weights))


def _root_size(weight: Tensor, dims: Sequence[int]) -> float:
    return math.sqrt(math.prod(weight.shape[d] for d in dims))


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).sum()


def _as_groups(threshold: Tensor, weight: Tensor, dims: Sequence[int]) -> Tensor:
    """A threshold on this rank, of the weight's shape or of that of the norms of its groups.

    Raises:
        ValueError: It has another number of elements.
    """
    local, shape = local_piece(threshold), local_piece(weight).shape
    if local.shape == shape:
        return local
    groups = [1 if d in dims else size for d, size in enumerate(shape)]
    if local.numel() != math.prod(groups):
        raise ValueError(
            f"`threshold` should be one number per group, of shape {tuple(groups)}, or one per weight, got shape "
            f"{tuple(local.shape)}."
        )
    return local.view(groups)


def _shrink_in_metric_(units: Tensor, removed: Tensor, weight: Tensor, dims: tuple[int, ...]) -> None:
    r"""Solve :math:`\sum_i (w_i / (\nu + a_i))^2 = 1` for every group, and multiply by :math:`\nu / (\nu + a_i)`.

    The root of the inverse of that sum is concave and rises with :math:`\nu`, so that Newton's method goes up from
    below to the solution without passing it. It starts at :math:`\lVert w \rVert - \sum_i w_i^2 a_i / \lVert w
    \rVert^2`, which is below by Jensen's inequality, or at 0: near the solution where ``a`` is small or alike. Random
    ``a`` needs at most 5 steps to rounding, measured for spreads up to :math:`e^{40}`. The worst groups of two weights
    need 10 to 1e-8: where the weight with the smaller ``a`` is smaller by orders of magnitude.

    Args:
        units: Weights of one shape, stacked; changed in place.
        removed: :math:`a`, of the same shape; used up.
        weight: One of the weights, which shows whether ranks hold pieces of a group.
        dims: The dims of a weight that hold a group.
    """
    dtype, inner = removed.dtype, [d + 1 for d in dims]
    limits = torch.finfo(dtype)
    found = norms_of_units(units, weight, dims)
    scale = (found + (found == 0)).to(dtype)  # all in units of the group's norm: nothing overflows
    squares = torch.div(units, scale, out=scratch(removed, slot="squares")).square_()
    removed.div_(scale).clamp_(limits.eps**1.5, limits.max**0.4)  # not to divide by zero, nor to multiply 0 by infinity
    divisors, terms = (scratch(removed, slot=slot) for slot in ("divisors", "terms"))
    sums = torch.empty(2, *found.shape, dtype=dtype, device=units.device)
    first, second = sums.unbind()
    torch.sum(torch.mul(squares, removed, out=terms), inner, keepdim=True, out=first)
    # A group whose norm has underflowed begins at zero and stays there.
    norm = ((found > 0).to(dtype) - sum_over_ranks(first, weight, dims)).clamp_min_(0)
    for _ in range(_STEPS_ON_CPU if units.is_cpu else _STEPS_ELSEWHERE):
        torch.add(removed, norm, out=divisors)
        torch.div(squares, torch.mul(divisors, divisors, out=terms), out=terms)
        torch.sum(terms, inner, keepdim=True, out=first)
        torch.sum(terms.div_(divisors), inner, keepdim=True, out=second)
        everywhere = sum_over_ranks(sums, weight, dims)
        total, slope = everywhere.unbind()
        before = norm.clone() if units.is_cpu else norm
        norm.addcdiv_(total.pow(1.5) - total, slope.clamp_min_(limits.tiny)).clamp_min_(0)
        # Where ranks work together all should make the same number of steps.
        if units.is_cpu and everywhere is sums and torch.allclose(norm, before, rtol=limits.eps, atol=0):
            break
    units.mul_(torch.reciprocal(removed.add_(norm), out=removed).mul_(norm))
