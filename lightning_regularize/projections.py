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
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeGuard, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_regularize._checks import check_is_number, is_named
from lightning_regularize._sharding import local_piece, local_tensor
from lightning_regularize._steps.buckets import Bucket, Tensors, buckets, listed, put_back_, stacked

if dist.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate

__all__ = [
    "Projection",
    "MaxNorm", "UnitNorm", "NonNegative", "Box", "FrobeniusBall", "FrobeniusSphere", "SpectralBall",
    "norm_dims", "units_are_known", "unit_dims", "unit_buckets", "unit_norms", "norms_of_units", "sum_over_ranks",
]  # fmt: skip

_BLOCK = 256  # elements reduced in float32 before float64 takes over: an error below 12 eps, even if all are equal
_EXACT_RANK = 64  # up to this many singular values are computed, mostly in milliseconds; more is slow for every step
_COLD_ITERATIONS = 30  # 0.6 % below the largest singular value of Gaussian 256x128 matrices; 5 % after 5

_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS_OF_TORCH = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase,
    nn.RNNCellBase,
)  # fmt: skip
# What layers call the numbers of their inputs and outputs: torch, PyTorch Geometric, DGL, and many others.
_SIZES = (
    ("in_features", "out_features"), ("in_channels", "out_channels"), ("_in_feats", "_out_feats"),
    ("in_dim", "out_dim"), ("input_dim", "output_dim"),
)  # fmt: skip


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
    of the call.

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
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"`iterations` should be a positive integer, got {self.iterations!r}.")

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
        alike = [(each.shape, each.dtype, _spread(each), of) for each, of in zip(weights, dims, strict=True)]
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
            sigma = _wide(sigma).view([-1] + [1] * those[0].dim())
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


def norm_dims(
    owner: nn.Module, name: str, shape: Sequence[int], *, dim: int | Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how to view a parameter, and along which dims, so that each norm is that of one output unit's input.

    ====================================  ==========================  ============  =================
    Layer                                 Weight                      Norm over     One norm a
    ====================================  ==========================  ============  =================
    Linear                                (out, in)                   in            output feature
    Conv1d to Conv3d, also grouped        (out, in / groups, k, ...)  in, k, ...    output channel
    ConvTranspose1d to 3d                 (in, out, k, ...)           in, k, ...    output channel
    the same, grouped                     (in, out / groups, k, ...)  in of the     output channel
                                                                      group, k, ...
    Embedding, EmbeddingBag               (number, features)          features      embedding
    MultiheadAttention, in and out        (out, in)                   in            query, key, ...
    RNN, LSTM, GRU, their cells           (gates * hidden, in)        in            gate of a unit
    Bilinear                              (out, in1, in2)             in1, in2      output feature
    Conv1D of transformers                (in, out)                   in            output feature
    any that tells its sizes              (out, in, ...)              in, ...       output feature
    the same                              (in, out, ...)              in, ...       output feature
    the same                              (relations, in, out)        in            output of a relation
    any other, ``weight`` in its name     (out, ...)                  ...           entry of dim 0
    ====================================  ==========================  ============  =================

    A layer tells its sizes by attributes such as ``in_features`` and ``out_features``, or ``in_channels`` and
    ``out_channels``. If the two differ and occur in the shape, they decide, whatever the class. The last row is a
    guess, see :func:`units_are_known`.

    Args:
        owner: The module that has the parameter.
        name: The parameter's name, as its owner or as the whole model says it.
        shape: The parameter's shape, of the whole tensor where ranks hold pieces.
        dim: What the user asks for, instead of all this.

    Returns:
        ``view, dim``: ``weight.view(view)`` shares its memory, and ``dim`` are dims of it, counted from the front.

    Raises:
        ValueError: If ``dim`` lacks, is empty or repeats itself; or if it is not given and cannot be told.

    Example:
        >>> norm_dims(nn.Conv2d(8, 6, 3), "weight", (6, 8, 3, 3))
        ((6, 8, 3, 3), (1, 2, 3))
        >>> norm_dims(nn.ConvTranspose2d(8, 6, 3, groups=2), "weight", (8, 3, 3, 3))
        ((2, 4, 3, 3, 3), (1, 3, 4))
    """
    shape = tuple(shape)
    if dim is not None:
        return shape, _checked_dims(dim, shape)
    if isinstance(owner, _TRANSPOSED_CONVOLUTIONS) and len(shape) > 2:
        if owner.groups == 1:
            return shape, (0, *range(2, len(shape)))
        # Its input channels come group by group, and each group has output channels of its own.
        return (owner.groups, shape[0] // owner.groups, *shape[1:]), (1, *range(3, len(shape) + 1))
    stated = _stated_dims(owner, shape)
    if stated is not None:
        return shape, stated
    if "weight" not in name or len(shape) < 2:
        raise ValueError(
            f"A norm over the incoming weights of a unit needs a weight with at least 2 dims, got {name!r} of "
            f'{type(owner).__name__} with shape {shape}. Leave it out, as by `exclude=("*{name}",)`, or say by `dim` '
            "what a unit is."
        )
    return shape, tuple(range(1, len(shape)))


def units_are_known(owner: nn.Module, shape: Sequence[int]) -> bool:
    """Is it known what the output units of a weight are, or does :func:`norm_dims` take dim 0 for want of better?

    Args:
        owner: The module that has the weight.
        shape: The weight's shape, of the whole tensor where ranks hold pieces.

    Returns:
        True for layers of torch, for ``Conv1D`` of transformers, and for layers with attributes such as
        ``in_features`` and ``out_features`` that differ and occur in the shape.

    Example:
        >>> class Graph(nn.Module):
        ...     def __init__(self, in_features, out_features):
        ...         super().__init__()
        ...         self.in_features, self.out_features = in_features, out_features
        >>> units_are_known(Graph(3, 4), (3, 4)), units_are_known(Graph(4, 4), (4, 4))
        (True, False)
    """
    return isinstance(owner, _LAYERS_OF_TORCH) or _stated_dims(owner, tuple(shape)) is not None


def _stated_dims(owner: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dims of the incoming weights of a unit, if the layer tells them."""
    if len(shape) < 2:
        return None
    if is_named(owner, "Conv1D") and len(shape) == 2:
        return (0,)
    for names in _SIZES:
        incoming, outgoing = (getattr(owner, name, None) for name in names)
        if not isinstance(incoming, int) or not isinstance(outgoing, int) or incoming == outgoing:
            continue
        if shape[:2] == (outgoing, incoming):
            return tuple(range(1, len(shape)))
        if shape[:2] == (incoming, outgoing):
            return (0, *range(2, len(shape)))
        if len(shape) == 3 and shape[1:] == (incoming, outgoing):
            return (1,)
        if len(shape) == 3 and shape[1:] == (outgoing, incoming):
            return (2,)
    return None


def unit_dims(weight: Tensor, dim: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the dims that hold the incoming weights of one output unit, in order and counted from the front.

    Args:
        weight: Any tensor.
        dim: Some of its dims; by default all but the first.

    Raises:
        ValueError: If ``weight`` lacks ``dim``, or has less than 2 dims and ``dim`` is not given.

    Example:
        >>> unit_dims(torch.ones(6, 8, 3, 3)), unit_dims(torch.ones(8, 6), dim=-2)
        ((1, 2, 3), (0,))
    """
    if dim is not None:
        return _checked_dims(dim, weight.shape)
    if weight.dim() < 2:
        raise ValueError(
            f"`dim` should be given for a weight with less than 2 dims, got None for shape {tuple(weight.shape)}."
        )
    return tuple(range(1, weight.dim()))


def unit_norms(weight: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    r"""Return the L2 norm of each output unit, accurate, and of the whole unit where ranks hold pieces of it.

    Args:
        weight: Any shape, floating. For a DTensor whose units are cut every rank that holds a piece should take part.
        dim: The dims that hold the incoming weights of a unit; by default all but the first.

    Returns:
        The norms of the units on this rank, float64 (float32 on devices without it), with ``dim`` kept as size 1, so
        that they broadcast against the weight's local piece.

    Raises:
        ValueError: If ``weight`` lacks ``dim``, or has less than 2 dims and ``dim`` is not given.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]], dtype=torch.float64)
    """
    dims = unit_dims(weight, dim)
    return norms_of_units(local_tensor(weight)[None], weight, dims)[0]


def norms_of_units(units: Tensor, weight: Tensor, dims: Sequence[int]) -> Tensor:
    """Return what :func:`unit_norms` does, for several weights of one shape at once.

    Args:
        units: The weights, or this rank's pieces of them, stacked.
        weight: One of them, which tells whether ranks hold pieces of a unit.
        dims: The dims of a weight that hold a unit, in order and counted from the front.

    Returns:
        One norm for each weight and unit, with ``dims`` kept as size 1.
    """
    found = _local_norms(units, tuple(d + 1 for d in dims))
    return sum_over_ranks(found.square(), weight, dims).sqrt() if _is_cut(weight, dims) else found


def unit_buckets(
    dims: Sequence[tuple[int, ...]], weights: Sequence[Tensor], *columns: Sequence[Tensor]
) -> Iterator[Bucket]:
    """Arrange weights, and tensors that belong to each, in lists that one batched operation on units can work on.

    Args:
        dims: For each weight the dims that hold the incoming weights of one output unit, see :func:`unit_dims`.
        weights: Of any shapes, dtypes and devices. If ranks hold pieces of units, every rank should take part.
        columns: Tensors for each weight: of its shape, or with some dims of size 1.

    Returns:
        Buckets of tensors of one shape and with the same dims, all on this rank. Only where ranks hold pieces of units
        the weights are DTensors. Large weights come in pieces of whole units.
    """
    rows: list[Tensor] = []
    alike: list[Hashable] = []
    between: list[int | None] = []
    for weight, of_units, *others in zip(weights, dims, *columns, strict=True):
        is_cut = _is_cut(weight, of_units)
        rows.append(weight if is_cut else local_piece(weight))
        alike.append((rows[-1].shape, of_units, _spread(weight) if is_cut else None, *[o.shape for o in others]))
        units = [d for d in range(weight.dim()) if d not in of_units]
        between.append(max(units, key=weight.size) if units and not is_cut else None)
    return buckets(rows, *[list(map(local_piece, column)) for column in columns], alike=alike, dims=between)


def sum_over_ranks(values: Tensor, weight: Tensor, dims: Sequence[int]) -> Tensor:
    """Add up what the ranks found in their pieces of ``weight``, over the ranks between which ``dims`` are cut.

    Args:
        values: What this rank found. Its dims need not be those of ``weight``.
        weight: Any tensor; only a DTensor is spread over ranks.
        dims: Dims of ``weight``, counted from the front.

    Returns:
        ``values`` itself if no rank boundary lies in ``dims``, else the sum, by one collective.

    Example:
        >>> sum_over_ranks(torch.tensor(1.0), torch.ones(3, 3), [0])
        tensor(1.)
    """
    if not _is_cut(weight, dims):
        return values
    # Where the rank boundary lies in other dims the values differ, and should: "replicated" keeps them apart.
    parts = [Partial() if cut else Replicate() for cut in _cuts(weight, dims)]
    whole = [Replicate()] * len(parts)
    return (
        DTensor.from_local(values, weight.device_mesh, parts, run_check=False).redistribute(placements=whole).to_local()
    )


def _cuts(weight: "DTensor", dims: Sequence[int]) -> list[bool]:
    # By attribute, since FSDP2 over tensor parallel has placements that are no `Shard` and yet cut a dim.
    return [getattr(placement, "dim", None) in dims for placement in weight.placements]


def _spread(weight: Tensor) -> Hashable:
    """What tells how a weight is spread over ranks."""
    if dist.is_available() and isinstance(weight, DTensor):
        return weight.device_mesh, weight.placements
    return None


def _is_cut(weight: Tensor, dims: Sequence[int]) -> "TypeGuard[DTensor]":
    return dist.is_available() and isinstance(weight, DTensor) and any(_cuts(weight, dims))


def _checked_dims(dim: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    dims = _from_the_front((dim,) if isinstance(dim, int) else tuple(dim), len(shape))
    if not dims:
        raise ValueError(
            f"`dim` should name different dims of a weight of shape {tuple(shape)}, each from {-len(shape)} to "
            f"{len(shape) - 1}, got {dim!r}."
        )
    return dims


@functools.cache  # it is asked for each weight in each step
def _from_the_front(given: tuple[int, ...], number: int) -> tuple[int, ...]:
    """Dims of a tensor with ``number`` of them, in order; none if they are not ``given`` properly."""
    dims = sorted({d % number for d in given if -number <= d < number})
    return tuple(dims) if len(dims) == len(given) else ()


def _check_number(name: str, value: object) -> None:
    if not (isinstance(value, Tensor) and value.dim() == 0):
        check_is_number(name, value)


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` should be positive and finite, got {value!r}.")


def _local_norms(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Norms over ``dims``, kept as size 1. The dims that lie together at the end, most often all, go first and fast."""
    last, others = _last_dims(dims, weight.dim())
    found = weight
    if last:
        rows = weight
        if not weight.is_contiguous():  # a view for `channels_last` as well
            rows = weight.permute(*range(last[0]), *sorted(last, key=weight.stride, reverse=True))
        found = _row_norms(rows.flatten(last[0]))
        found = found.view(*found.shape, *[1] * len(last))
    if others:
        # Not `vector_norm`: over dims that are not the last it takes 40 times as long and loses up to 5 digits.
        found = _wide(found.to(_at_least_float32(found)).square().sum(others, keepdim=True)).sqrt()
    return found


@functools.cache
def _last_dims(dims: tuple[int, ...], number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of ``dims`` that are the last of all, and the others."""
    last = tuple(d for d in dims if set(range(d, number)) <= set(dims))
    return last, dims[: len(dims) - len(last)]


def _row_norms(rows: Tensor) -> Tensor:
    """Norms over the last dim, of blocks in float32 and of their norms in float64."""
    size = rows.shape[-1]
    if size <= _BLOCK:
        return _wide(torch.linalg.vector_norm(rows, dim=-1, dtype=_at_least_float32(rows)))
    count, rest = divmod(size, _BLOCK)
    blocks = rows.narrow(-1, 0, size - rest).view(*rows.shape[:-1], count, _BLOCK)
    found: Tensor = torch.linalg.vector_norm(_row_norms(blocks), dim=-1)
    return torch.hypot(found, _row_norms(rows.narrow(-1, size - rest, rest))) if rest else found


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()  # MPS has no float64


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
    return eps / 2 if dtype in (torch.float16, torch.bfloat16) else 32 * eps


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
        units.mul_(torch.where(where, factors, 1.0).to(_at_least_float32(units)))
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
    return matrix.to(_at_least_float32(matrix))


def _clip_singular_values_(weights: list[Tensor], matrix: Tensor, dims: tuple[int, ...], bound: float) -> Tensor:
    weight = weights[0]  # all are of one shape and spread alike
    finite = matrix.isfinite().flatten(1).all(dim=1)  # what is broken stays as it is, where it is seen
    u, sigma, vh = torch.linalg.svd(torch.where(finite[:, None, None], _wide(matrix), 0.0), full_matrices=False)
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
