"""How is a matrix pulled to low rank? By the sum of its singular values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_regularize._penalty import Penalty, check_strength, check_whole, dense_gradients
from lightning_regularize._steps.buckets import Tensors, listed
from lightning_regularize.spectral_projections import matrix_buckets, put_matrices_back_, with_singular_values
from lightning_regularize.units import check_dim, in_float64


@final
@dataclass(frozen=True)
class NuclearNorm(Penalty):
    r"""The sum of singular values of the matrix of a layer: single singular values become zero, and with them the rank.

    .. math:: R(W) = \sum_i \sigma_i, \quad \nabla R = \sum_{\sigma_i > 0} u_i v_i^\top, \quad
        \operatorname{prox}_{tR}(W) = \sum_i \max(\sigma_i - t, 0) \, u_i v_i^\top

    It is for single matrices what L1 is for single weights. The matrix is that of output units by incoming weights. The
    decomposition is exact, in float64, of each matrix in each step: 1 ms for 64x64, 30 ms for 256x256, 1 s for
    1024x1024 on one core of a CPU. On a GPU, torch's decomposition waits for the device. Large layers can do with
    ``WeightPenalty(NuclearNorm(), ..., every_n_steps=100)``, or with a ``WeightConstraint`` by
    :class:`~lightning_regularize.projections.Rank`, which finds the first singular values by random directions.

    The proximal step has a threshold for all weights of a matrix together. In the metric of Adam, with a step size for
    each weight, it has no closed form: take SGD, or ``method="gradient"``.

    Args:
        dim: The dims that hold the incoming weights of a unit; None takes what the layer says, see
            :func:`~lightning_regularize.units.norm_dims`.

    Raises:
        TypeError: If ``dim`` is neither an integer nor a sequence of integers.
        ValueError: If ``dim`` is empty.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
        >>> NuclearNorm().value(weight, strength=0.1)
        tensor(0.3500, dtype=torch.float64)
        >>> NuclearNorm().proximal_(weight, threshold=1.0)
        >>> weight
        tensor([[2., 0.],
                [0., 0.]])

    References:
        Cai, Candès and Shen, A Singular Value Thresholding Algorithm for Matrix Completion, SIAM J. Optim. 20(4), 2010.
    """

    dim: int | Sequence[int] | None = None
    per_unit: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = True
    takes_metric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_dim(self.dim)

    @torch.no_grad()
    def value(
        self, weight: Tensors, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the sum of singular values, see :meth:`Penalty.value`."""
        check_strength("strength", strength)
        weights = listed(weight)
        found = [torch.zeros((), dtype=torch.float64, device=weights[0].device)]
        for _, _, _, matrices in matrix_buckets(weights, self.dim if dim is None else dim):
            sigma, _ = with_singular_values(matrices, torch.ones_like)
            found.append(sigma.sum().to(weights[0].device))
        return torch.stack(found).sum() * strength

    @torch.no_grad()
    def add_gradient_(
        self, gradient: Tensors, weight: Tensors, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength`` times the matrix with all singular values but zeros set to 1, see :meth:`Penalty`.

        Raises:
            ValueError: If ``strength`` is a number and negative or not finite, ``gradient`` is sparse, or ``weight`` is
                what a rank holds of a whole.
        """
        check_strength("strength", strength)
        weights, gradients = listed(weight), dense_gradients(gradient)
        check_whole(weights)
        for indices, those, inner, matrices in matrix_buckets(weights, self.dim if dim is None else dim):
            # What rounding may have made of zero counts as zero, as in `torch.linalg.matrix_rank`.
            relative = max(matrices.shape[1:]) * torch.finfo(those[0].dtype).eps

            def reciprocals(sigma: Tensor, relative: float = relative) -> Tensor:
                return torch.where(sigma > relative * sigma[:, :1], 1 / sigma, 0.0)

            _, directions = with_singular_values(matrices, reciprocals)
            terms = [torch.empty_like(each, dtype=matrices.dtype) for each in those]
            put_matrices_back_(terms, directions * strength, inner)
            torch._foreach_add_([gradients[i] for i in indices], terms)

    @torch.no_grad()
    def proximal_(self, weight: Tensors, threshold: float | Tensor, *, dim: int | Sequence[int] | None = None) -> None:
        """Move every singular value ``threshold`` nearer to zero, at most there, see :meth:`Penalty.proximal_`.

        Raises:
            ValueError: If ``threshold`` is a number and negative or not finite, or a tensor of more than one number.
        """
        check_strength("threshold", threshold)
        if isinstance(threshold, Tensor) and threshold.dim():
            raise ValueError(
                "`threshold` should be a number or a 0-d tensor: the proximal step of the nuclear norm has no closed "
                f"form for one number per weight, got shape {tuple(threshold.shape)}."
            )

        def factors(sigma: Tensor) -> Tensor:
            return torch.where(sigma > threshold, 1 - threshold / sigma, 0.0)

        for _, those, inner, matrices in matrix_buckets(listed(weight), self.dim if dim is None else dim):
            sigma, found = with_singular_values(matrices, factors)
            is_finite = (sigma < math.inf).all(1)  # what is broken stays as it is, where it is seen
            put_matrices_back_(those, torch.where(is_finite[:, None, None], found, in_float64(matrices)), inner)
