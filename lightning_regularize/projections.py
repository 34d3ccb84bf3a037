r"""Where may weights lie? Sets of allowed weights, and the way from anywhere to the nearest point of the set.

A projection solves :math:`\arg\min_{x \in C} \lVert x - w \rVert_2`. Applied after an optimizer step it makes a
constraint hold exactly, whatever the step was. Weights that lie inside already come back bit for bit.

Every projection takes one tensor or a list of them. A list needs as many calls as it has shapes, however long it is.

Norms are taken in at least float32 and combined in float64. A *ball* is never left, not by a rounding either: what is
outside goes to just inside the bound, by the relative margin :math:`2^{-8}` in bfloat16 and :math:`2^{-11}` in float16,
which is what rounding a weight to these types can add, and by 32 units in the last place above. On a *sphere* weights
that are as near to it as that are left alone. Thus a second projection changes nothing. Units whose norm is zero, NaN
or infinite are left alone too: the first have no direction, the others should be seen and not hidden.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_regularize._checks import check_is_number, check_positive_integer
from lightning_regularize._sharding import local_piece, piece_like
from lightning_regularize._steps.buckets import HALF, Tensors, buckets, listed, put_back_, stacked
from lightning_regularize.units import (
    at_least_float32,
    in_float64,
    norm_dims,
    norms_of_units,
    spread_of,
    sum_over_ranks,
    unit_buckets,
    unit_dims,
    unit_norms,
)

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate

__all__ = [
    "Projection",
    "MaxNorm", "UnitNorm", "NonNegative", "Box", "FrobeniusBall", "FrobeniusSphere", "SpectralBall", "NM",
    "norm_dims", "unit_dims", "unit_norms", "sum_over_ranks",
]  # fmt: skip

_EXACT_RANK = 64  # up to this many singular values are computed, mostly in milliseconds; more is slow for every step
_COLD_ITERATIONS = 30  # 0.6 % below the largest singular value of Gaussian 256x128 matrices; 5 % after 5

Factors = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]  # of norms: which are to change, and by what factor


class Projection(ABC):
    """A set of allowed weights: the base of all projections, to be implemented by a frozen dataclass.

    Example:
        >>> @dataclass(frozen=True)
        ... class ZeroMean(Projection):
        ...     def project_(self, weight: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
        ...         mean = weight.mean()
        ...         weight.sub_(mean)
        ...         return mean != 0
        >>> ZeroMean().project(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """

    per_unit: ClassVar[bool] = False
    """Whether each output unit is constrained for itself, so that :func:`norm_dims` has to say what a unit is."""

    takes_lists: ClassVar[bool] = False
    """Whether :meth:`project_` takes a list of weights as well, for one call instead of many."""

    @abstractmethod
    def project_(self, weight: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Move ``weight`` in place to the nearest point of the set.

        Args:
            weight: Any shape, floating. Nothing of this is recorded by autograd. A DTensor is projected as the whole
                tensor that it is; every rank that holds a piece should take part.
            dim: The dims that hold the incoming weights of one output unit, see :func:`norm_dims`. It precedes the
                projection's own ``dim``; without both it is all dims but the first. Only where ``per_unit``.

        Returns:
            Whether anything was changed: a 0-d bool tensor on the weight's device, so that nobody has to wait for the
            device. Of a DTensor it tells of the piece on this rank.
        """

    def project(self, weight: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Return the point of the set that is nearest to ``weight``, which is left as it is.

        Args:
            weight: As for :meth:`project_`.
            dim: As for :meth:`project_`.

        Returns:
            A new tensor like ``weight``, detached.
        """
        projected = weight.detach().clone()
        self.project_(projected, dim=dim)
        return projected

    def check_shape(self, shape: Sequence[int], dim: Sequence[int] | None) -> None:  # noqa: B027
        """Refuse a weight that this projection cannot act on, before training.

        Args:
            shape: The shape of the whole weight.
            dim: As for :meth:`project_`.

        Raises:
            ValueError: It cannot; the message says why.
        """

    def at_start(self, weight: Tensor) -> "Projection":
        """Return this projection with a relative radius replaced by the number it means for the weights at the start.

        Args:
            weight: The weights before training. Of a DTensor every rank should pass its piece.

        Returns:
            A projection that depends on nothing but its own numbers; itself, if it was one already.

        Raises:
            ValueError: If the radius is relative and the norm at the start is zero or not finite.

        Example:
            >>> FrobeniusBall(0.5, relative=True).at_start(torch.tensor([[3.0, 4.0]]))
            FrobeniusBall(radius=2.5, relative=False)
        """
        match self:
            case FrobeniusBall(relative=True) | FrobeniusSphere(relative=True):
                norm = _frobenius_norm(weight).item()
                if not 0 < norm < math.inf:
                    raise ValueError(
                        f"A relative `radius` needs a positive, finite norm at the start, got {norm}. "
                        "Leave this parameter out, or give the radius as a number with `relative=False`."
                    )
                return replace(self, radius=self.radius * norm, relative=False)
            case _:
                return self


@final
@dataclass(frozen=True)
class MaxNorm(Projection):
    r"""The incoming weights of every output unit have at most the norm ``max_norm``.

    .. math:: w_g \leftarrow w_g \min\Bigl(1, \frac{c}{\lVert w_g \rVert_2}\Bigr)

    The usual companion of dropout, with 3 or 4 there. At PyTorch's default initialization the norm is about 0.58, so
    that a bound of 2 or 3 may never be met at all.

    Args:
        max_norm: ``c``, positive and finite.
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

    max_norm: float
    dim: int | Sequence[int] | None = None
    per_unit: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("max_norm", self.max_norm)

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Scale down, in place, the units that exceed the bound, see :meth:`Projection.project_`."""
        return _rescale_units_(
            weight, self.dim if dim is None else dim, functools.partial(_into_ball, bound=self.max_norm)
        )


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
    takes_lists: ClassVar[bool] = True

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
        low: Smallest weight; ``-math.inf`` for no bound below.
        high: Largest weight; ``math.inf`` for no bound above.

    Raises:
        ValueError: If ``low`` is not below ``high``, or both are infinite.

    Example:
        >>> Box(-0.01, 0.01).project(torch.tensor([-1.0, 0.005, 1.0]))
        tensor([-0.0100,  0.0050,  0.0100])

    References:
        Arjovsky et al., Wasserstein GAN, 2017, https://arxiv.org/abs/1701.07875, where the critic has 0.01.
    """

    low: float
    high: float
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_number("low", self.low)
        _check_number("high", self.high)
        if not self.low < self.high:
            raise ValueError(f"`low` should be below `high`, got low={self.low!r} and high={self.high!r}.")
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError(
                f"`low` or `high` should be finite, or nothing is bounded, got low={self.low} and high={self.high}."
            )

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Clip the weights in place, see :meth:`Projection.project_`."""
        return _into_interval_(weight, self.low, self.high)


@final
@dataclass(frozen=True)
class FrobeniusBall(Projection):
    r"""All the weights of a tensor together have at most the norm ``radius``: the hard form of weight decay.

    .. math:: W \leftarrow W \min\Bigl(1, \frac{r}{\lVert W \rVert_F}\Bigr)

    Args:
        radius: ``r``, positive and finite: a norm, or a multiple of the norm at the start.
        relative: Whether ``radius`` is such a multiple; :meth:`Projection.at_start` then gives the projection to use.

    Raises:
        ValueError: If ``radius`` is not positive and finite.

    Example:
        >>> FrobeniusBall(2.0).project(torch.tensor([[2.0, 2.0], [2.0, 2.0]]))
        tensor([[1.0000, 1.0000],
                [1.0000, 1.0000]])
    """

    radius: float
    relative: bool = False
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("radius", self.radius)
        if not isinstance(self.relative, bool):
            raise TypeError(f"`relative` should be True or False, got {self.relative!r}.")

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Scale the tensor down in place, see :meth:`Projection.project_`.

        Raises:
            ValueError: If the radius is still relative.
        """
        return _rescale_whole_(weight, functools.partial(_into_ball, bound=_absolute_radius(self)))


@final
@dataclass(frozen=True)
class FrobeniusSphere(Projection):
    r"""All the weights of a tensor together have the norm ``radius``, as they had at the start if it is relative and 1.

    .. math:: W \leftarrow W \frac{r}{\lVert W \rVert_F}

    Args:
        radius: ``r``, positive and finite: a norm, or a multiple of the norm at the start.
        relative: Whether ``radius`` is such a multiple; :meth:`Projection.at_start` then gives the projection to use.

    Raises:
        ValueError: If ``radius`` is not positive and finite.

    Example:
        >>> FrobeniusSphere(10.0).project(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """

    radius: float
    relative: bool = False
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("radius", self.radius)
        if not isinstance(self.relative, bool):
            raise TypeError(f"`relative` should be True or False, got {self.relative!r}.")

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Scale the tensor to its norm in place, see :meth:`Projection.project_`.

        Raises:
            ValueError: If the radius is still relative.
        """
        return _rescale_whole_(weight, functools.partial(_onto_sphere, radius=_absolute_radius(self)))


@final
@dataclass(frozen=True)
class SpectralBall(Projection):
    r"""The matrix of a layer, ``(units, incoming)``, stretches no input by more than ``max_sigma``.

    .. math:: W = U \Sigma V^\top \leftarrow U \min(\Sigma, s) V^\top

    That is the nearest matrix, and what matrices with a side of at most 64 get, by a decomposition in float64 (1 ms
    for 64x64, 400 ms for the embeddings of 50,000 words). Larger ones are scaled, :math:`W \leftarrow W \min(1, s /
    \sigma)`, which is inside but farther away, with :math:`\sigma` from power iteration. It comes from below, so that
    the bound is exceeded by as much as the iteration is off: on Gaussian matrices of 256x128 13 % after one iteration
    from a cold start, 5 % after 5, and 0.6 % (2 % in the worst of 20) after 30, which is what a call without
    ``vector`` makes. With a vector kept from step to step one iteration does: 1.3 % where every step adds noise of 3
    % of the bound. In low precision the rounding of a whole matrix may exceed the margin for the largest singular
    value: the bound then holds to about one unit in the last place. A DTensor is gathered on every rank for the time
    of the call. On a GPU, torch's decomposition waits for the device in each call.

    Args:
        max_sigma: ``s``, positive and finite.
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see :func:`norm_dims`.
        iterations: Power iterations a call with ``vector``, at least 1; the default is that of
            ``torch.nn.utils.parametrizations.spectral_norm``.

    Raises:
        ValueError: If ``max_sigma`` is not positive and finite, or ``iterations`` is below 1.

    Example:
        >>> SpectralBall(1.0).project(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    References:
        Yoshida and Miyato, Spectral Norm Regularization, 2017, https://arxiv.org/abs/1705.10941;
        Miyato et al., Spectral Normalization for Generative Adversarial Networks, ICLR 2018,
        https://arxiv.org/abs/1802.05957 (the power iteration with a warm start).
    """

    max_sigma: float
    dim: int | Sequence[int] | None = None
    iterations: int = 1
    per_unit: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("max_sigma", self.max_sigma)
        check_positive_integer(self.iterations, "`iterations`")

    @torch.no_grad()
    def project_(
        self, weight: Tensors, *, dim: int | Sequence[int] | None = None, vector: Tensors | None = None
    ) -> Tensor:
        """Bound the singular values in place, see :meth:`Projection.project_`.

        Args:
            weight: At least 2-D, finite; or a list of such.
            dim: As for every projection.
            vector: What :meth:`warm_start` gave for each weight, updated in place; the caller keeps it from step to
                step. Matrices that are decomposed do without.

        Returns:
            Whether anything was changed, a 0-d bool tensor.
        """
        weights = listed(weight)
        vectors = None if vector is None else listed(vector)
        dims = [unit_dims(each, self.dim if dim is None else dim) for each in weights]
        matrices = [_matrix(each, of_units) for each, of_units in zip(weights, dims, strict=True)]
        alike = [(each.shape, each.dtype, spread_of(each), of) for each, of in zip(weights, dims, strict=True)]
        changed = []
        for indices, (found,) in buckets(matrices, alike=alike, dims=[None] * len(matrices)):
            those, inner, matrix = [weights[i] for i in indices], dims[indices[0]], stacked(found)
            if min(matrix.shape[1:]) <= _EXACT_RANK:
                changed.append(_clip_singular_values_(those, matrix, inner, self.max_sigma))
                continue
            if vectors is None:
                sigma, _ = _power_iteration(matrix, _longest_row(matrix), _COLD_ITERATIONS)
            else:
                kept = [vectors[i] for i in indices]
                sigma, direction = _power_iteration(matrix, torch.stack(kept), self.iterations)
                torch._foreach_copy_(kept, direction.unbind())
            sigma = in_float64(sigma).view([-1] + [1] * those[0].dim())
            changed.append(_scale_(those, stacked(those), *_into_ball(sigma, those[0].dtype, bound=self.max_sigma)))
        return _any(changed, weights)

    def warm_start(self, weight: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Return the direction of the inputs that ``weight`` stretches most, by 30 power iterations from a cold start.

        Args:
            weight: At least 2-D, finite.
            dim: As for every projection.

        Returns:
            Shape ``(incoming,)``, norm 1, float32 or the weight's dtype where that is wider. The same for the same
            weight: no random number is drawn.

        Example:
            >>> SpectralBall(1.0).warm_start(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
            tensor([1., 0.])
        """
        matrix = _matrix(weight, unit_dims(weight, self.dim if dim is None else dim))
        return _power_iteration(matrix[None], _longest_row(matrix[None]), _COLD_ITERATIONS)[1][0]


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
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see :func:`norm_dims`.

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
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_integer(self.n, "`n`")
        check_positive_integer(self.m, "`m`")
        if self.n >= self.m:
            raise ValueError(f"`n` should be less than `m`, or all weights are zero, got n={self.n} and m={self.m}.")

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
            rows = torch.stack([each.full_tensor() for each in those]) if is_cut else stacked(those)  # type: ignore[attr-defined]
            input_dim = along[indices[0]][0] + 1
            groups = rows.unflatten(input_dim, (-1, self.m)).movedim(input_dim + 1, -1)  # type: ignore[no-untyped-call]
            smallest = groups.abs().argsort(dim=-1, stable=True)[..., : self.n]
            changed.append((groups.gather(-1, smallest) != 0).any())
            groups.scatter_(-1, smallest, 0)
            if is_cut:
                pieces = [piece_like(whole, each) for whole, each in zip(rows.unbind(), those, strict=True)]
                torch._foreach_copy_([local_piece(each) for each in those], pieces)
            else:
                put_back_(those, rows)
        return _any(changed, weights)


def _check_number(name: str, value: object) -> None:
    if not (isinstance(value, Tensor) and value.dim() == 0):
        check_is_number(name, value)


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` should be positive and finite, got {value!r}.")


def _frobenius_norm(weight: Tensor) -> Tensor:
    # With dims: a 0-d factor would be rounded to the weight's own low precision before it multiplies.
    with_dims = weight if weight.dim() else weight.view(1)
    return unit_norms(with_dims, range(with_dims.dim())).view([1] * weight.dim())


def _absolute_radius(projection: FrobeniusBall | FrobeniusSphere) -> float:
    if projection.relative:
        raise ValueError(
            f"`radius` should be a norm by now, got a multiple of the norm at the start: use "
            f"`{type(projection).__name__}({projection.radius}, relative=True).at_start(weight)`, made before training."
        )
    return projection.radius


def _margin(dtype: torch.dtype) -> float:
    """How much a norm may grow, relatively, when every element is rounded to ``dtype`` and the norm is measured."""
    eps = torch.finfo(dtype).eps
    return eps / 2 if dtype in HALF else 32 * eps


def _rescale_units_(weight: Tensors, dim: int | Sequence[int] | None, to: Factors) -> Tensor:
    weights = listed(weight)
    return _rescale_(weights, [unit_dims(each, dim) for each in weights], to)


def _rescale_whole_(weight: Tensors, to: Factors) -> Tensor:
    # With a dim at least: a 0-d factor would be rounded to the weight's own low precision before it multiplies.
    weights = [each if each.dim() else each.view(1) for each in listed(weight)]
    return _rescale_(weights, [tuple(range(each.dim())) for each in weights], to)


def _rescale_(weights: list[Tensor], dims: list[tuple[int, ...]], to: Factors) -> Tensor:
    changed = []
    for indices, (those,) in unit_buckets(dims, weights):
        units = stacked(those)
        found = norms_of_units(units, those[0], dims[indices[0]])
        changed.append(_scale_(those, units, *to(found, units.dtype)))
    return _any(changed, weights)


def _into_ball(found: Tensor, dtype: torch.dtype, *, bound: float) -> tuple[Tensor, Tensor]:
    return (found > bound) & (found < math.inf), bound * (1 - _margin(dtype)) / found


def _onto_sphere(found: Tensor, dtype: torch.dtype, *, radius: float) -> tuple[Tensor, Tensor]:
    off = (found - radius).abs() > radius * _margin(dtype)
    return off & (found > 0) & (found < math.inf), radius / found


def _scale_(weights: list[Tensor], units: Tensor, where: Tensor, factors: Tensor) -> Tensor:
    changed = where.any()
    # On a GPU all are multiplied, most of them by 1, which changes no bit: to look would wait for it. The factors keep
    # at least float32, so that a low-precision weight is rounded once.
    if not units.is_cpu or changed:
        units.mul_(torch.where(where, factors, 1.0).to(at_least_float32(units)))
        put_back_(weights, units)
    return changed


def _any(changed: list[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Whether anything was changed, on the device of the first weight."""
    if len(changed) == 1:
        return changed[0]
    if not changed:
        return torch.zeros((), dtype=torch.bool, device=weights[0].device if weights else None)
    found: Tensor = torch.stack([each.to(changed[0].device, non_blocking=True) for each in changed])
    return found.any()


def _into_interval_(weight: Tensors, low: float, high: float) -> Tensor:
    weights = [local for each in listed(weight) if (local := local_piece(each)).numel()]
    changed = []
    for _, (those,) in buckets(weights):
        if those[0].is_cpu:
            ends = [each.aminmax() for each in those]  # both in one pass
            smallest, largest = (torch.stack(side) for side in zip(*ends, strict=True))
            for each in those:
                each.clamp_(low, high)
        else:
            largest = torch.stack(torch._foreach_max(those))
            smallest = -torch.stack(torch._foreach_max(torch._foreach_neg(those)))
            torch._foreach_clamp_min_(those, low)
            torch._foreach_clamp_max_(those, high)
        changed.append(((smallest < low) | (largest > high)).any())
    return _any(changed, listed(weight))


def _matrix(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The whole weight as ``(units, incoming)``, at least float32; a view of it where that is possible."""
    whole = weight.detach()
    if dist.is_available() and isinstance(whole, DTensor):
        whole = whole.full_tensor()
    units = [d for d in range(whole.dim()) if d not in dims]
    sizes = [math.prod(whole.shape[d] for d in side) for side in (units, dims)]
    matrix = whole.permute(*units, *dims).reshape(sizes)
    return matrix.to(at_least_float32(matrix))


def _clip_singular_values_(weights: list[Tensor], matrix: Tensor, dims: tuple[int, ...], bound: float) -> Tensor:
    weight = weights[0]  # all are of one shape and spread alike
    finite = matrix.isfinite().flatten(1).all(dim=1)  # what is broken stays as it is, where it is seen
    u, sigma, vh = torch.linalg.svd(torch.where(finite[:, None, None], in_float64(matrix), 0.0), full_matrices=False)
    outside = (sigma > bound) & finite[:, None]
    inside = torch.where(outside, bound * (1 - _margin(weight.dtype)), sigma)
    clipped = torch.where(outside.any(dim=1)[:, None, None], (u * inside[:, None]) @ vh, matrix).to(weight.dtype)
    order = [*[d for d in range(weight.dim()) if d not in dims], *dims]
    clipped = clipped.view(len(weights), *[weight.shape[d] for d in order])
    clipped = clipped.permute(0, *[1 + order.index(d) for d in range(weight.dim())])
    pieces = clipped.unbind()
    if dist.is_available() and isinstance(weight, DTensor):
        mesh, everywhere = weight.device_mesh, [Replicate()] * len(weight.placements)
        whole = [DTensor.from_local(piece, mesh, everywhere, run_check=False) for piece in pieces]
        pieces = tuple(each.redistribute(placements=weight.placements).to_local() for each in whole)
    torch._foreach_copy_([local_piece(each) for each in weights], pieces)
    changed: Tensor = outside.any()
    return changed


def _longest_row(matrix: Tensor) -> Tensor:
    # It has a part in the direction sought unless that is perpendicular to it, and needs no random number.
    longest = torch.linalg.vector_norm(matrix, dim=2, keepdim=True).argmax(dim=1, keepdim=True)
    return torch.take_along_dim(matrix, longest, dim=1)[:, 0]


def _power_iteration(matrix: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The largest singular value of each matrix, from below, and its right vector."""
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        image = F.normalize(matrix @ vector[:, :, None], dim=1, eps=tiny)
        vector = F.normalize(image.mT @ matrix, dim=2, eps=tiny)[:, 0]
    sigma: Tensor = torch.linalg.vector_norm(matrix @ vector[:, :, None], dim=(1, 2))
    return sigma, vector
