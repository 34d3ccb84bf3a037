r"""What pulls weights to zero? Penalties: their values, their gradients, and the steps that end at zero exactly.

A penalty is a function :math:`a R(w)` that is added to the loss. The class says :math:`R`; the strength :math:`a` is an
argument everywhere, so that it can follow a schedule. There are two ways to minimize it along with the loss:

* ``add_gradient_`` before the optimizer's step. It works with every optimizer, but weights only hover around zero.
* ``proximal_`` after the step,

  .. math:: w \leftarrow \operatorname{prox}_{tR}(w) = \arg\min_x \tfrac{1}{2} \lVert x - w \rVert_2^2 + t R(x),

  which sets weights to zero and leaves them there. The threshold is the strength times the step that the optimizer
  takes for a unit gradient: ``lr`` for SGD, ``lr / (1 - momentum)`` with momentum, ``lr / (sqrt(v_hat) + eps)`` of each
  weight for Adam. With any other the minimum is not the one asked for, or has no zeros.

Neither makes a temporary tensor of the size of the weight on a CPU: what does not fit into a cache is worked on in
pieces. (Groups under an elementwise metric are the exception.) A DTensor stands for its piece on this rank wherever
weights do not need to know of each other; groups may be spread over ranks.

References:
    Parikh and Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1(3), 2014.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_regularize._checks import check_is_number
from lightning_regularize._sharding import local_tensor
from lightning_regularize.norms import norms
from lightning_regularize.projections import sum_over_ranks, unit_dims, unit_norms

__all__ = ["Penalty", "L1", "L2", "ElasticNet", "GroupLasso"]

_NEWTON_STEPS = 10
_PIECE = 2**20  # elements; 4 MiB of float32: fewer cost more in waking up threads than the cache saves, measured


class Penalty(ABC):
    """What pulls weights to zero, at unit strength: the base of all penalties, to be implemented by a frozen dataclass.

    In every method ``weight`` is floating, of any shape, and autograd records nothing. ``dim`` matters only where
    ``per_unit``: the dims that hold the incoming weights of one output unit, by default all but the first.
    """

    per_unit: ClassVar[bool] = False
    """Whether output units are groups, so that :func:`~lightning_regularize.projections.norm_dims` has to say them."""

    @abstractmethod
    def value(
        self, weight: Tensor, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength * R(weight)``, accurate in every precision.

        Args:
            weight: A weight. Of a DTensor it is the value of the whole, for which every rank should pass its piece.
            strength: Non-negative: a number, or a 0-d tensor on the weight's device.
            dim: See the class.

        Returns:
            A 0-d tensor on the weight's device, float64 (float32 on devices without it).

        Raises:
            ValueError: If ``strength`` is a number and negative or not finite.
        """

    @abstractmethod
    def add_gradient_(
        self, gradient: Tensor, weight: Tensor, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add the (sub)gradient of ``strength * R`` at ``weight`` to ``gradient``, in place; 0 where there is a kink.

        Args:
            gradient: Dense, of the weight's shape, dtype and placements.
            weight: A weight.
            strength: Non-negative: a number, or a 0-d tensor on the weight's device (such as what
                ``GradScaler.scale`` returns), for which nobody waits for the device.
            dim: See the class.

        Raises:
            ValueError: If ``strength`` is a number and negative or not finite, or ``gradient`` is sparse.
        """

    @abstractmethod
    def proximal_(self, weight: Tensor, threshold: float | Tensor, *, dim: int | Sequence[int] | None = None) -> None:
        """Replace ``weight`` by the minimizer of ``|x - weight|^2 / 2 + threshold * R(x)``, in place.

        Args:
            weight: A weight.
            threshold: Strength times step, non-negative: a number, a 0-d tensor, or a tensor of the weight's shape.
            dim: See the class.

        Raises:
            ValueError: If ``threshold`` is a number and negative or not finite, or a tensor of another shape.
        """


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

    def value(
        self, weight: Tensor, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the sum of magnitudes, see :meth:`Penalty.value`."""
        _check("strength", strength)
        return norms([weight], 1.0)[0] * strength

    def add_gradient_(
        self, gradient: Tensor, weight: Tensor, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * sign(weight)``, see :meth:`Penalty.add_gradient_`."""
        _check("strength", strength, gradient)
        for g, w in _pieces(gradient, weight):
            _add_(g, w.sign(), strength)

    def proximal_(self, weight: Tensor, threshold: float | Tensor, *, dim: int | Sequence[int] | None = None) -> None:
        """Move every weight ``threshold`` nearer to zero, at most there, see :meth:`Penalty.proximal_`."""
        _check("threshold", threshold)
        for w, t in _with_threshold(weight, threshold):
            _soft_threshold_(w, t)


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

    def value(
        self, weight: Tensor, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times half the sum of squares, see :meth:`Penalty.value`."""
        _check("strength", strength)
        return norms([weight])[0].square() * (0.5 * strength)

    def add_gradient_(
        self, gradient: Tensor, weight: Tensor, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * weight``, see :meth:`Penalty.add_gradient_`."""
        _check("strength", strength, gradient)
        _add_(local_tensor(gradient), local_tensor(weight), strength)

    def proximal_(self, weight: Tensor, threshold: float | Tensor, *, dim: int | Sequence[int] | None = None) -> None:
        """Divide by ``1 + threshold``, see :meth:`Penalty.proximal_`."""
        _check("threshold", threshold)
        for w, t in _with_threshold(weight, threshold):
            w.div_(1 + t)


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

    def __post_init__(self) -> None:
        check_is_number("l1_ratio", self.l1_ratio)
        if not 0 <= self.l1_ratio <= 1:
            raise ValueError(f"`l1_ratio` should be in [0, 1], got {self.l1_ratio!r}.")

    def value(
        self, weight: Tensor, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the mixture, see :meth:`Penalty.value`."""
        _check("strength", strength)
        return L1().value(weight, self.l1_ratio * strength) + L2().value(weight, (1 - self.l1_ratio) * strength)

    def add_gradient_(
        self, gradient: Tensor, weight: Tensor, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * (r * sign(weight) + (1 - r) * weight)``, see :meth:`Penalty.add_gradient_`."""
        _check("strength", strength, gradient)
        for g, w in _pieces(gradient, weight):
            _add_(g, w.sign(), strength * self.l1_ratio)
            _add_(g, w, strength * (1 - self.l1_ratio))

    def proximal_(self, weight: Tensor, threshold: float | Tensor, *, dim: int | Sequence[int] | None = None) -> None:
        """Move towards zero, then divide, see :meth:`Penalty.proximal_`."""
        _check("threshold", threshold)
        for w, t in _with_threshold(weight, threshold):
            _soft_threshold_(w, t * self.l1_ratio)
            w.div_(1 + t * (1 - self.l1_ratio))


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

    where Newton's method finds :math:`\nu_g`, to rounding. It needs some temporary tensors of the weight's size, and if
    ranks hold pieces of a group 10 small collectives.

    Args:
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see
            :func:`~lightning_regularize.projections.norm_dims`.

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

    def value(
        self, weight: Tensor, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the sum over groups, see :meth:`Penalty.value`."""
        _check("strength", strength)
        dims = unit_dims(weight, self.dim if dim is None else dim)
        others = [d for d in range(weight.dim()) if d not in dims]
        return sum_over_ranks(unit_norms(weight, dims).sum(), weight, others) * (_root_size(weight, dims) * strength)

    def add_gradient_(
        self, gradient: Tensor, weight: Tensor, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength * sqrt(|g|)`` in the direction of each group, see :meth:`Penalty.add_gradient_`."""
        _check("strength", strength, gradient)
        dims = unit_dims(weight, self.dim if dim is None else dim)
        found = unit_norms(weight, dims)
        factors = torch.where(found > 0, _root_size(weight, dims) * strength / found, 0.0)
        local_tensor(gradient).addcmul_(
            local_tensor(weight), factors.to(torch.promote_types(weight.dtype, torch.float32))
        )

    def proximal_(self, weight: Tensor, threshold: float | Tensor, *, dim: int | Sequence[int] | None = None) -> None:
        """Shorten every group by its threshold, at most to zero, see :meth:`Penalty.proximal_`.

        Raises:
            ValueError: If ``threshold`` is a number and negative or not finite, or a tensor with neither one element a
                group nor one a weight.
        """
        _check("threshold", threshold)
        dims = unit_dims(weight, self.dim if dim is None else dim)
        found = unit_norms(weight, dims)
        if isinstance(threshold, Tensor) and threshold.dim():
            thresholds = local_tensor(threshold)
            if thresholds.shape == local_tensor(weight).shape:
                _shrink_in_metric_(weight, thresholds * _root_size(weight, dims), found, dims)
                return
        removed = _one_a_group(threshold, found) * _root_size(weight, dims)
        factors = torch.where(found > removed, 1 - removed / found, 0.0)
        local_tensor(weight).mul_(factors.to(torch.promote_types(weight.dtype, torch.float32)))


def _check(name: str, value: float | Tensor, gradient: Tensor | None = None) -> None:
    # A tensor is not looked at: that would wait for its device.
    if not isinstance(value, Tensor):
        check_is_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` should be non-negative and finite, got {value!r}.")
    if gradient is not None and gradient.layout is not torch.strided:
        raise ValueError(
            f"`gradient` should be dense, got {gradient.layout}: a penalty pulls at every weight, not only at the rows "
            "that were looked up. Use `sparse=False` in the embedding, or a proximal step."
        )


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors on this rank, cut alike, so that on a CPU a temporary of that size is no main-memory traffic."""
    local = tuple(map(local_tensor, tensors))
    if not local[0].is_cpu or local[0].numel() <= _PIECE:
        return (local,)
    count = -(-local[0].numel() // _PIECE)
    return zip(*(tensor.chunk(count) for tensor in local), strict=True)


def _with_threshold(weight: Tensor, threshold: float | Tensor) -> Iterable[tuple[Tensor, float | Tensor]]:
    if not isinstance(threshold, Tensor):
        return ((local_tensor(weight), threshold),)  # whole, as no temporary is made
    if threshold.dim() and threshold.shape != weight.shape:
        raise ValueError(
            f"`threshold` should be a number, a 0-d tensor, or a tensor of the weight's shape {tuple(weight.shape)}, "
            f"got shape {tuple(threshold.shape)}."
        )
    whole = threshold if threshold.dim() else local_tensor(threshold).expand_as(local_tensor(weight))
    return ((w, t) for w, t in _pieces(weight, whole))


def _add_(gradient: Tensor, term: Tensor, strength: float | Tensor) -> None:
    if isinstance(strength, Tensor):
        gradient.addcmul_(term, strength)  # `alpha` would have to come to the host
    else:
        gradient.add_(term, alpha=strength)


def _soft_threshold_(weight: Tensor, threshold: float | Tensor) -> None:
    if isinstance(threshold, Tensor):
        weight.sub_(weight.clamp(-threshold, threshold))
    else:
        # The only way in place: `torch.nn.functional.softshrink` has no `out`, and to copy doubles the time.
        torch.ops.aten.softshrink.out(weight, threshold, out=weight)


def _root_size(weight: Tensor, dims: Sequence[int]) -> float:
    return math.sqrt(math.prod(weight.shape[d] for d in dims))


def _one_a_group(threshold: float | Tensor, found: Tensor) -> float | Tensor:
    if not isinstance(threshold, Tensor) or not threshold.dim():
        return threshold
    local = local_tensor(threshold)
    if local.numel() != found.numel():
        raise ValueError(
            f"`threshold` should be one number a group, of shape {tuple(found.shape)}, or one a weight, got shape "
            f"{tuple(local.shape)}."
        )
    return local.view_as(found)


def _shrink_in_metric_(weight: Tensor, removed: Tensor, found: Tensor, dims: tuple[int, ...]) -> None:
    r"""Solve :math:`\sum_i (w_i / (\nu + a_i))^2 = 1` for every group, and multiply by :math:`\nu / (\nu + a_i)`.

    The root of the inverse of that sum is concave and rises with :math:`\nu`, so that Newton's method goes up from 0
    to the solution without passing it, and stays at 0 where that is the solution. Ten steps suffice for any spread of
    ``a``, measured up to :math:`e^{40}`; with Adam it is mostly half of that.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.where(found > 0, found, 1.0)  # all in units of the group's norm: nothing overflows
    directions = local_tensor(weight) / scale.to(dtype)
    removed = (removed / scale.to(dtype)).clamp_min_(torch.finfo(dtype).eps ** 1.5)  # not to divide by zero
    norm = torch.zeros_like(found)
    for _ in range(_NEWTON_STEPS):
        divisors = removed + norm.to(dtype)
        squares = (directions / divisors).square_()
        here = torch.stack([s.sum(dims, keepdim=True, dtype=found.dtype) for s in (squares, squares / divisors)])
        everywhere = sum_over_ranks(here, weight, dims)
        total, slope = everywhere
        before, norm = norm, (norm + torch.where(slope > 0, (total**1.5 - total) / slope, 0.0)).clamp_min_(0)
        # To ask is free on a CPU only, and where ranks work together all should make the same number of steps.
        if norm.is_cpu and everywhere is here and torch.allclose(norm, before, rtol=torch.finfo(dtype).eps, atol=0):
            break
    local_tensor(weight).mul_(removed.add_(norm.to(dtype)).reciprocal_().mul_(norm.to(dtype)))
