"""Which singular values may a matrix have? Projections that bound them, or that keep only the largest ones."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_regularize._checks import check_positive_integer
from lightning_regularize._projection import Projection, any_of, check_positive, into_ball, margin, number_now, scale_
from lightning_regularize._sharding import copy_pieces_, gathered
from lightning_regularize._steps.buckets import Tensors, buckets, listed, stacked
from lightning_regularize.schedules import Schedule
from lightning_regularize.units import at_least_float32, check_dim, in_float64, spread_of, unit_dims

__all__ = ["Rank", "SpectralBall", "matrix_buckets", "put_matrices_back_", "with_singular_values"]

_EXACT_SIDE = 64  # up to this many singular values are computed, mostly in milliseconds; more is slow for every step
_COLD_ITERATIONS = 30  # 0.6 % below the largest singular value of Gaussian 256x128 matrices; 5 % after 5
_EXACT_RANK_SIDE = 256  # for `Rank`, which is for every hundredth step or so
_MORE_DIRECTIONS, _RANGE_ITERATIONS = 10, 4  # of the randomized method, beside the k that are asked for


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
        max_sigma: ``s``, positive and finite; or a schedule.
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see
            :func:`~lightning_regularize.units.norm_dims`.
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

    max_sigma: float | Schedule
    dim: int | Sequence[int] | None = None
    iterations: int = 1
    per_unit: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("max_sigma", self.max_sigma)
        check_positive_integer(self.iterations, "`iterations`")
        check_dim(self.dim)

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
        weights, bound = listed(weight), number_now(self, "max_sigma")
        vectors = None if vector is None else listed(vector)
        changed = []
        for indices, those, inner, matrix in matrix_buckets(weights, self.dim if dim is None else dim):
            if min(matrix.shape[1:]) <= _EXACT_SIDE:
                changed.append(_clip_singular_values_(those, matrix, inner, bound))
                continue
            if vectors is None:
                sigma, _ = _power_iteration(matrix, _longest_row(matrix), _COLD_ITERATIONS)
            else:
                kept = [vectors[i] for i in indices]
                sigma, direction = _power_iteration(matrix, torch.stack(kept), self.iterations)
                torch._foreach_copy_(kept, direction.unbind())
            sigma = in_float64(sigma).view([-1] + [1] * those[0].dim())
            changed.append(scale_(those, stacked(those), sigma, *into_ball(sigma, those[0].dtype, bound=bound)))
        return any_of(changed, weights)

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
class Rank(Projection):
    r"""The matrix of a layer, ``(units, incoming)``, has at most rank ``k``: what two thin layers could hold.

    .. math:: W = U \Sigma V^\top \leftarrow \sum_{i \le k} \sigma_i u_i v_i^\top

    That is the nearest matrix (Eckart and Young). It is exact, in float64, for matrices with a side of at most 256.
    Larger ones are projected onto the range that four subspace iterations with ``k + 10`` fixed pseudo-random
    directions find: to rounding where later singular values are small beside the first ``k``, as they are where weights
    had this rank before; else at a distance a little larger than the smallest possible. A rank counts as ``k`` if the
    next singular value is what rounding may have left. In half precision, rounding the weights makes more of those.

    Use it with ``WeightConstraint(Rank(k), every_n_steps=...)``: between these steps weights leave the set. A DTensor
    is gathered on every rank for the time of the call. On a GPU, torch's decomposition waits for the device.

    Args:
        k: The rank, at least 1. Matrices with a side of at most ``k`` stay as they are.
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see
            :func:`~lightning_regularize.units.norm_dims`.

    Raises:
        ValueError: If ``k`` is not a positive integer.

    Example:
        >>> Rank(1).project(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        tensor([[3., 0.],
                [0., 0.]])

    References:
        Halko, Martinsson and Tropp, Finding Structure with Randomness, SIAM Review 53(2), 2011,
        https://arxiv.org/abs/0909.4061 (the randomized method).
    """

    k: int
    dim: int | Sequence[int] | None = None
    per_unit: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive_integer(self.k, "`k`")
        check_dim(self.dim)

    @torch.no_grad()
    def project_(self, weight: Tensors, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Set all singular values but the first ``k`` to zero in place, see :meth:`Projection.project_`."""
        weights, changed = listed(weight), []
        for _, those, inner, matrices in matrix_buckets(weights, self.dim if dim is None else dim):
            side = min(matrices.shape[1:])
            if self.k >= side:
                continue
            is_exact = side <= max(_EXACT_RANK_SIDE, self.k + _MORE_DIRECTIONS)
            sigma, nearest = (_cut_off if is_exact else _cut_off_randomly)(matrices, self.k)
            # What rounding a matrix to its dtype adds to a singular value is at most this.
            rounding = margin(those[0].dtype) * torch.linalg.vector_norm(sigma, dim=1)
            is_outside = sigma[:, self.k] > rounding  # not so where weights are NaN or infinite
            put_matrices_back_(
                those, torch.where(is_outside[:, None, None], nearest.to(matrices.dtype), matrices), inner
            )
            changed.append(is_outside.any())
        return any_of(changed, weights)


def matrix_buckets(
    weights: Sequence[Tensor], dim: int | Sequence[int] | None
) -> Iterator[tuple[list[int], list[Tensor], tuple[int, ...], Tensor]]:
    """Arrange whole weights as matrices, for batched operations. Of DTensors every rank should pass its piece.

    Args:
        weights: At least 2-D.
        dim: The dims that hold the incoming weights of a unit, see :func:`~lightning_regularize.units.unit_dims`.

    Yields:
        Which weights, of one shape; these; the dims that hold the incoming weights of a unit; and the matrices, shape
        ``(n, units, incoming)``, at least float32, which may share the memory of a weight.
    """
    dims = [unit_dims(each, dim) for each in weights]
    matrices = [_matrix(each, of_units) for each, of_units in zip(weights, dims, strict=True)]
    alike = [(each.shape, each.dtype, spread_of(each), of) for each, of in zip(weights, dims, strict=True)]
    for indices, (found,) in buckets(matrices, alike=alike, dims=[None] * len(matrices)):
        if found[0].numel():
            yield indices, [weights[i] for i in indices], dims[indices[0]], stacked(found)


def put_matrices_back_(weights: Sequence[Tensor], matrices: Tensor, dims: tuple[int, ...]) -> None:
    """Give weights of one shape, spread alike, the values of whole matrices as ``matrix_buckets`` yields them."""
    weight = weights[0]
    order = [*[d for d in range(weight.dim()) if d not in dims], *dims]
    arranged = matrices.to(weight.dtype).view(len(weights), *[weight.shape[d] for d in order])
    copy_pieces_(weights, arranged.permute(0, *[1 + order.index(d) for d in range(weight.dim())]).unbind())


def with_singular_values(matrices: Tensor, factors: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    r"""Return singular values, and the matrices with each of them multiplied, in float64.

    :math:`W V \operatorname{diag}(f) V^\top`, with :math:`V` from the triangular factor of the larger side, so that the
    decomposition is of a square matrix of the smaller one.

    Args:
        matrices: Shape ``(n, rows, columns)``.
        factors: From singular values, in descending order, to what each is multiplied by; shape ``(n, side)``.

    Returns:
        The singular values, shape ``(n, side)``, and the matrices; NaN of a matrix that is not finite.
    """
    is_finite = matrices.isfinite().flatten(1).all(dim=1)[:, None, None]
    whole = torch.where(is_finite, in_float64(matrices), 0.0)  # the decomposition raises an error for others
    tall = whole if whole.shape[1] >= whole.shape[2] else whole.mT
    _, sigma, vh = torch.linalg.svd(torch.linalg.qr(tall, mode="r").R)
    found = (tall @ vh.mT) * factors(sigma)[:, None, :] @ vh
    found = found if tall is whole else found.mT
    return torch.where(is_finite[:, 0], sigma, math.nan), torch.where(is_finite, found, math.nan)


def _cut_off(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values, and the matrices without all but the first ones."""

    def kept(sigma: Tensor) -> Tensor:
        return (torch.arange(sigma.shape[1], device=sigma.device) < rank).to(sigma.dtype).expand_as(sigma)

    return with_singular_values(matrices, kept)


def _cut_off_randomly(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same of matrices with large sides, by the randomized method."""
    is_finite = matrices.isfinite().flatten(1).all(dim=1)[:, None, None]
    whole = torch.where(is_finite, matrices, 0.0)
    # Always the same numbers: ranks and resumed runs have to agree.
    numbers = torch.Generator().manual_seed(0)
    shape = whole.shape[2], rank + _MORE_DIRECTIONS
    start = torch.randn(shape, generator=numbers, dtype=torch.float64, device="cpu")
    image = whole @ start.to(whole, non_blocking=True)
    for _ in range(_RANGE_ITERATIONS):
        image = whole @ torch.linalg.qr(whole.mT @ torch.linalg.qr(image).Q).Q
    basis = torch.linalg.qr(image).Q
    sigma, found = _cut_off(basis.mT @ whole, rank)
    return torch.where(is_finite[:, 0], sigma, math.nan), basis @ found.to(basis.dtype)


def _matrix(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The whole weight as ``(units, incoming)``, at least float32; a view of it where that is possible."""
    whole = gathered(weight)
    units = [d for d in range(whole.dim()) if d not in dims]
    sizes = [math.prod(whole.shape[d] for d in side) for side in (units, dims)]
    matrix = whole.permute(*units, *dims).reshape(sizes)
    return matrix.to(at_least_float32(matrix))


def _clip_singular_values_(weights: list[Tensor], matrix: Tensor, dims: tuple[int, ...], bound: float) -> Tensor:
    finite = matrix.isfinite().flatten(1).all(dim=1)  # what is broken stays as it is, where it is seen
    u, sigma, vh = torch.linalg.svd(torch.where(finite[:, None, None], in_float64(matrix), 0.0), full_matrices=False)
    outside = (sigma > bound) & finite[:, None]
    inside = torch.where(outside, bound * (1 - margin(weights[0].dtype)), sigma)
    clipped = torch.where(outside.any(dim=1)[:, None, None], (u * inside[:, None]) @ vh, matrix)
    put_matrices_back_(weights, clipped, dims)
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
