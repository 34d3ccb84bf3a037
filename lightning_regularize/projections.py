r"""Where may weights lie? Sets of allowed weights, and the way from anywhere to the nearest point of the set.

A projection solves :math:`\arg\min_{x \in C} \lVert x - w \rVert_2`. Applied after an optimizer step it makes a
constraint hold exactly, whatever the step was. Weights that lie inside already come back bit for bit.

Every projection takes one tensor or a list of them. A list needs as many calls as it has shapes, however long it is.
Bounds and radii may be a :class:`~lightning_regularize.schedules.Schedule`, which ``WeightConstraint`` reads in each
step.

Norms are taken in at least float32 and combined in float64. A *ball* is never left, not by a rounding either: what is
outside goes to just inside the bound, by the relative margin :math:`2^{-8}` in bfloat16 and :math:`2^{-11}` in float16,
which is what rounding a weight to these types can add, and by 32 units in the last place above. On a *sphere* weights
that are as near to it as that are left alone. Thus a second projection changes nothing. Units whose norm is zero, NaN
or infinite are left alone too: the first have no direction, the others should be seen and not hidden.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_regularize._checks import name_of
from lightning_regularize._projection import (
    Projection,
    any_of,
    check_number_or_schedule,
    check_positive,
    into_ball,
    margin,
    number_now,
    scale_,
)
from lightning_regularize._sharding import gathered, local_piece, piece_like
from lightning_regularize._steps.buckets import Tensors, buckets, listed, stacked
from lightning_regularize.schedules import Schedule
from lightning_regularize.sparse_projections import NM, TopShare
from lightning_regularize.spectral_projections import Rank, SpectralBall
from lightning_regularize.units import (
    at_least_float32,
    check_dim,
    norm_dims,
    norms_of_units,
    sum_over_ranks,
    unit_buckets,
    unit_dims,
    unit_norms,
)

__all__ = [
    "Projection",
    "MaxNorm", "UnitNorm", "NonNegative", "Box", "FrobeniusBall", "FrobeniusSphere", "SpectralBall", "Rank", "NM",
    "TopShare", "Function",
    "norm_dims", "unit_dims", "unit_norms", "sum_over_ranks",
]  # fmt: skip

Aim = Callable[[Tensor, torch.dtype], tuple[Tensor, float]]  # of norms: which are to change, and to what


@final
@dataclass(frozen=True)
class MaxNorm(Projection):
    r"""The incoming weights of every output unit have at most the norm ``max_norm``.

    .. math:: w_g \leftarrow w_g \min\Bigl(1, \frac{c}{\lVert w_g \rVert_2}\Bigr)

    The usual companion of dropout, with 3 or 4 there. At PyTorch's default initialization the norm is about 0.58, so
    that a bound of 2 or 3 may never be met at all.

    Args:
        max_norm: ``c``, positive and finite; or a schedule.
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see :func:`norm_dims`.

    Raises:
        ValueError: If ``max_norm`` is not positive and finite.

    Example:
        >>> MaxNorm(1.0).project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])

    References:
        Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 15, 2014;
        Srebro and Shraibman, Rank, Trace-Norm and Max-Norm, COLT 2005.
    """

    max_norm: float | Schedule
    dim: int | Sequence[int] | None = None
    per_unit: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm)
        check_dim(self.dim)

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Scale down, in place, the units that exceed the bound, see :meth:`Projection.project_`."""
        bound = number_now(self, "max_norm")
        return _rescale_units_(weight, self.dim if dim is None else dim, functools.partial(into_ball, bound=bound))


@final
@dataclass(frozen=True)
class UnitNorm(Projection):
    r"""The incoming weights of every output unit have norm 1: only their direction is learned.

    .. math:: w_g \leftarrow w_g / \lVert w_g \rVert_2

    Args:
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see :func:`norm_dims`.

    Example:
        >>> UnitNorm().project(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])

    References:
        Loshchilov et al., nGPT: Normalized Transformer with Representation Learning on the Hypersphere, 2024,
        https://arxiv.org/abs/2410.01131, where it replaces weight decay and warm-up.
    """

    dim: int | Sequence[int] | None = None
    per_unit: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_dim(self.dim)

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Scale the units to norm 1 in place, see :meth:`Projection.project_`."""
        return _rescale_units_(weight, self.dim if dim is None else dim, functools.partial(_onto_sphere, radius=1.0))


@final
@dataclass(frozen=True)
class NonNegative(Projection):
    r"""No weight is below zero, as parts-based (nonnegative matrix factorization) and monotone models ask for.

    .. math:: w \leftarrow \max(w, 0)

    Example:
        >>> NonNegative().project(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    keeps_zeros: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Raise negative weights to zero in place, see :meth:`Projection.project_`."""
        return _into_interval_(weight, 0.0, math.inf)


@final
@dataclass(frozen=True)
class Box(Projection):
    r"""Every weight lies between two bounds: weight clipping.

    .. math:: w \leftarrow \min(\max(w, \mathrm{low}), \mathrm{high})

    The bounds are rounded to the weight's dtype, as ``torch.clamp`` does.

    Args:
        low: Smallest weight; ``-math.inf`` for no bound below. Or a schedule, which is never negative.
        high: Largest weight; ``math.inf`` for no bound above. Or a schedule.

    Raises:
        ValueError: If ``low`` is not below ``high``, or both are infinite.

    Example:
        >>> Box(-0.01, 0.01).project(torch.tensor([-1.0, 0.005, 1.0]))
        tensor([-0.0100,  0.0050,  0.0100])

    References:
        Arjovsky et al., Wasserstein GAN, 2017, https://arxiv.org/abs/1701.07875, where the critic has 0.01.
    """

    low: float | Schedule
    high: float | Schedule
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number_or_schedule("low", self.low)
        check_number_or_schedule("high", self.high)
        if isinstance(self.low, Schedule) or isinstance(self.high, Schedule):
            return
        if not self.low < self.high:
            raise ValueError(f"`low` should be below `high`, got low={self.low!r} and high={self.high!r}.")
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError(
                f"`low` or `high` should be finite, or nothing is bounded, got low={self.low} and high={self.high}."
            )

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Clip the weights in place, see :meth:`Projection.project_`."""
        return _into_interval_(weight, number_now(self, "low"), number_now(self, "high"))


@final
@dataclass(frozen=True)
class FrobeniusBall(Projection):
    r"""All the weights of a tensor together have at most the norm ``radius``: the hard form of weight decay.

    .. math:: W \leftarrow W \min\Bigl(1, \frac{r}{\lVert W \rVert_F}\Bigr)

    Args:
        radius: ``r``, positive and finite: a norm, or a multiple of the norm at the start; or, of norms, a schedule.
        relative: Whether ``radius`` is such a multiple; :meth:`Projection.at_start` then gives the projection to use.

    Raises:
        ValueError: If ``radius`` is not positive and finite.

    Example:
        >>> FrobeniusBall(2.0).project(torch.tensor([[2.0, 2.0], [2.0, 2.0]]))
        tensor([[1.0000, 1.0000],
                [1.0000, 1.0000]])
    """

    radius: float | Schedule
    relative: bool = False
    keeps_zeros: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_radius(self.radius, self.relative)

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Scale the tensor down in place, see :meth:`Projection.project_`.

        Raises:
            ValueError: If the radius is still relative.
        """
        return _rescale_whole_(weight, functools.partial(into_ball, bound=_absolute_radius(self)))


@final
@dataclass(frozen=True)
class FrobeniusSphere(Projection):
    r"""All the weights of a tensor together have the norm ``radius``, as they had at the start if it is relative and 1.

    .. math:: W \leftarrow W \frac{r}{\lVert W \rVert_F}

    Args:
        radius: ``r``, positive and finite: a norm, or a multiple of the norm at the start; or, of norms, a schedule.
        relative: Whether ``radius`` is such a multiple; :meth:`Projection.at_start` then gives the projection to use.

    Raises:
        ValueError: If ``radius`` is not positive and finite.

    Example:
        >>> FrobeniusSphere(10.0).project(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """

    radius: float | Schedule
    relative: bool = False
    keeps_zeros: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_radius(self.radius, self.relative)

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Scale the tensor to its norm in place, see :meth:`Projection.project_`.

        Raises:
            ValueError: If the radius is still relative.
        """
        return _rescale_whole_(weight, functools.partial(_onto_sphere, radius=_absolute_radius(self)))


@final
@dataclass(frozen=True)
class Function(Projection):
    """What a function of a weight returns takes the weight's place, also if it is not the nearest point of any set.

    Args:
        function: From a tensor to a tensor of the same shape. It gets each weight as a whole and detached, in float32
            where that is of half precision. It has to be a pure function, the same in every process.

    Raises:
        TypeError: If ``function`` cannot be called.

    Example:
        >>> def zero_mean(weight):
        ...     return weight - weight.mean()
        >>> Function(zero_mean).project(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """

    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"`function` should be a function from a tensor to one of the same shape, got {self.function!r}."
            )

    @property
    def name(self) -> str:
        """The function's name, of an object the name of its class."""
        return name_of(self.function)

    @torch.no_grad()
    def project_(self, weight: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Call the function on the whole weight, see :meth:`Projection.project_`.

        Raises:
            TypeError: It returns no tensor.
            ValueError: It returns a tensor of another shape, or of integers or booleans.
        """
        whole = gathered(weight)
        wide = whole.to(at_least_float32(whole), copy=True)
        before = wide.clone()  # a function may work in place
        found: object = self.function(wide)
        if not isinstance(found, Tensor):
            raise TypeError(f"{self.name} should return a tensor of the weight's shape, got {found!r}.")
        if found.shape != whole.shape or not (found.is_floating_point() or found.dtype == whole.dtype):
            raise ValueError(
                f"{self.name} should return a floating tensor of the weight's shape {tuple(whole.shape)}, got "
                f"{tuple(found.shape)} and {found.dtype}."
            )
        local_piece(weight).copy_(piece_like(found, weight))
        changed: Tensor = (found != before).any()
        return changed


def _check_radius(radius: object, relative: object) -> None:
    check_positive("radius", radius)
    if not isinstance(relative, bool):
        raise TypeError(f"`relative` should be True or False, got {relative!r}.")
    if relative and isinstance(radius, Schedule):
        raise ValueError(f"`radius` should be a number where it is relative to the start, got {radius!r}.")


def _absolute_radius(projection: FrobeniusBall | FrobeniusSphere) -> float:
    if projection.relative:
        raise ValueError(
            f"`radius` should be a norm by now, got a multiple of the norm at the start: use "
            f"`{type(projection).__name__}({projection.radius}, relative=True).at_start(weight)`, made before training."
        )
    return number_now(projection, "radius")


def _rescale_units_(weight: Tensors, dim: int | Sequence[int] | None, to: Aim) -> Tensor:
    weights = listed(weight)
    return _rescale_(weights, [unit_dims(each, dim) for each in weights], to)


def _rescale_whole_(weight: Tensors, to: Aim) -> Tensor:
    # With a dim at least: a 0-d factor would be rounded to the weight's own low precision before it multiplies.
    weights = [each if each.dim() else each.view(1) for each in listed(weight)]
    return _rescale_(weights, [tuple(range(each.dim())) for each in weights], to)


def _rescale_(weights: list[Tensor], dims: list[tuple[int, ...]], to: Aim) -> Tensor:
    changed = []
    for indices, (those,) in unit_buckets(dims, weights, bounded=False):
        units = stacked(those, wide=True)
        found = norms_of_units(units, those[0], dims[indices[0]])
        changed.append(scale_(those, units, found, *to(found, those[0].dtype)))
    return any_of(changed, weights)


def _onto_sphere(found: Tensor, dtype: torch.dtype, *, radius: float) -> tuple[Tensor, float]:
    off = (found - radius).abs() > radius * margin(dtype)
    return off & (found > 0) & (found < math.inf), radius


def _into_interval_(weight: Tensors, low: float, high: float) -> Tensor:
    weights = [local for each in listed(weight) if (local := local_piece(each)).numel()]
    changed = []
    for _, (those,) in buckets(weights, bounded=False):
        if those[0].is_cpu:
            smallest, largest = (torch.stack(ends) for ends in zip(*map(torch.aminmax, those), strict=True))
            inside = (smallest >= low) & (largest <= high)  # False for NaN
            for each in itertools.compress(those, (~inside).tolist()):  # most often a pass less
                each.clamp_(low, high)
        else:
            largest = torch.stack(torch._foreach_max(those))
            smallest = -torch.stack(torch._foreach_max(torch._foreach_neg(those)))
            torch._foreach_clamp_min_(those, low)
            torch._foreach_clamp_max_(those, high)
        changed.append(((smallest < low) | (largest > high)).any())
    return any_of(changed, listed(weight))
