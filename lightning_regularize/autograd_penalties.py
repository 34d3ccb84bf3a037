r"""Penalties whose gradient autograd computes: of the singular values, of angles, or any function of one's own.

They need whole weights. They have no proximal step, which cannot be derived from a function's value.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_regularize._checks import check_is_number, check_positive_integer, name_of
from lightning_regularize._penalty import Penalty, check_strength, check_whole, dense_gradients
from lightning_regularize._steps.buckets import Tensors, listed
from lightning_regularize.units import at_least_float32, in_float64, unit_dims

__all__ = ["ByAutograd", "Function", "Orthogonal", "Spectral"]


class ByAutograd(Penalty):
    """A penalty whose gradient autograd computes: the base, of which a subclass says the value.

    Weights of half precision are handed over in float32, and gradients rounded once.
    """

    takes_lists: ClassVar[bool] = True

    @abstractmethod
    def of(self, weights: Tensor, dim: int | Sequence[int] | None) -> Tensor:
        """Return ``R`` of each of several weights of one shape.

        Args:
            weights: Shape ``(n, ...)``, float32 or float64. Autograd records what is done with it.
            dim: As for :class:`Penalty`, of one of the weights.

        Returns:
            Shape ``(n,)``.
        """

    def value(
        self, weight: Tensors, strength: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None
    ) -> Tensor:
        """Return ``strength`` times the value of whole weights, see :meth:`Penalty.value`."""
        check_strength("strength", strength)
        weights = listed(weight)
        found = [in_float64(self._values(_stack(weights, rows), dim).detach()) for rows in _alike(weights)]
        return torch.cat([values.to(weights[0].device) for values in found]).sum() * strength

    def add_gradient_(
        self, gradient: Tensors, weight: Tensors, strength: float | Tensor, *, dim: int | Sequence[int] | None = None
    ) -> None:
        """Add ``strength`` times the gradient of the value, see :meth:`Penalty.add_gradient_`.

        Raises:
            TypeError: A function returns no tensor.
            ValueError: If ``strength`` is a number and negative or not finite, ``gradient`` is sparse, or a function
                returns a tensor that is no scalar, or through which no gradient reaches the weight.
        """
        check_strength("strength", strength)
        weights, gradients = listed(weight), dense_gradients(gradient)
        if not isinstance(strength, Tensor) and strength == 0:
            return  # where the gradient is NaN too, as that of a root is at 0
        for rows in _alike(weights):
            stack = _stack(weights, rows)
            values = self._values(stack, dim)
            if not values.requires_grad:
                raise ValueError(
                    f"{self} does not depend on the weight in a way that autograd can see: use operations of torch, "
                    "without `detach`, `item`, `data` or `no_grad`."
                )
            with torch.autocast(stack.device.type, enabled=False):
                (found,) = torch.autograd.grad(values, stack, torch.ones_like(values))
            with torch.no_grad():
                torch._foreach_add_([gradients[i] for i in rows], list((found * strength).unbind()))

    def proximal_(self, weight: Tensors, threshold: float | Tensors, *, dim: int | Sequence[int] | None = None) -> None:
        """Raise an error: there is no proximal step.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{self} has no proximal step: write a `Penalty` with one, or use its gradient.")

    def _values(self, stack: Tensor, dim: int | Sequence[int] | None) -> Tensor:
        # Under autocast products would be of half precision.
        with torch.enable_grad(), torch.autocast(stack.device.type, enabled=False):
            return self.of(stack, dim)


@final
@dataclass(frozen=True)
class Function(ByAutograd):
    """Any function of a weight: called for each weight, with the whole of it in its own shape.

    Args:
        function: From a tensor to a 0-d tensor. It has to be a pure function, the same in every process.

    Raises:
        TypeError: If ``function`` cannot be called.

    Example:
        >>> def double_well(weight):
        ...     return (weight.square() - 1).square().sum()
        >>> gradient = torch.zeros(2)
        >>> Function(double_well).add_gradient_(gradient, torch.tensor([1.0, 2.0]), strength=0.5)
        >>> gradient
        tensor([ 0., 12.])
    """

    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"`function` should be a function from a tensor to a 0-d tensor, got {self.function!r}.")

    @property
    def name(self) -> str:
        """The function's name, of an object the name of its class."""
        return name_of(self.function)

    def __str__(self) -> str:
        return self.name

    def of(self, weights: Tensor, dim: int | Sequence[int] | None) -> Tensor:
        """Call the function on each weight.

        Raises:
            TypeError: It returns no tensor.
            ValueError: It returns a tensor that is no scalar.
        """
        found = [self.function(weight) for weight in weights.unbind()]
        for value in found:
            if not isinstance(value, Tensor):
                raise TypeError(f"{self.name} should return a 0-d tensor, got {value!r}.")
            if value.dim() or value.is_complex():
                raise ValueError(
                    f"{self.name} should return a real 0-d tensor, got shape {tuple(value.shape)} and {value.dtype} "
                    f"for a weight of shape {tuple(weights.shape[1:])}: take the sum or mean."
                )
        return torch.stack(found)


@final
@dataclass(frozen=True)
class Orthogonal(ByAutograd):
    r"""Mean absolute cosine between the incoming weights of output units: units that look for different things.

    .. math:: R(w) = \frac{1}{k (k - 1)} \sum_{i \ne j}
        \frac{|\langle w_i, w_j \rangle|}{\lVert w_i \rVert_2 \lVert w_j \rVert_2}

    over the ``k`` rows, or columns, of the weight as a matrix of output units by incoming weights. It is Keras'
    ``OrthogonalRegularizer``, for kernels of more than two dims as well. Keras stores the transpose: its "rows" are
    "columns" here, and the reverse. With one row it is 0. Rows of length 0 are orthogonal to all. It needs memory for
    ``k * k`` cosines: leave large embeddings out.

    Args:
        mode: "rows" for output units, "columns" for inputs.

    Raises:
        ValueError: If ``mode`` is neither.

    Example:
        >>> weight = torch.tensor([[2.0, 0.0], [3.0, 3.0]])
        >>> Orthogonal().value(weight)
        tensor(0.7071, dtype=torch.float64)
    """

    mode: Literal["rows", "columns"] = "rows"
    per_unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mode not in ("rows", "columns"):
            raise ValueError(f"`mode` should be 'rows' or 'columns', got {self.mode!r}.")

    def of(self, weights: Tensor, dim: int | Sequence[int] | None) -> Tensor:
        """Sum the cosines of all pairs."""
        matrices = _matrices(weights, dim)
        vectors = matrices if self.mode == "rows" else matrices.mT
        count = vectors.shape[1]
        if count < 2 or not vectors.shape[2]:
            return (vectors * 0).sum((1, 2))
        largest = vectors.detach().abs().amax(2, keepdim=True)
        has_length = largest > 0
        scaled = torch.where(
            has_length, vectors / torch.where(has_length, largest, 1.0), 1.0
        )  # squares do not underflow
        directions = scaled / scaled.norm(dim=2, keepdim=True) * has_length
        cosines: Tensor = (directions @ directions.mT).triu(1)
        return cosines.abs().sum((1, 2)) * (2 / (count * (count - 1)))


@final
@dataclass(frozen=True)
class Spectral(ByAutograd):
    r"""How far the largest singular value is from a target: layers that neither blow up nor die.

    .. math:: R(w) = (\sigma_{\max}^k - \text{target}^k)^2

    of the weight as a matrix of output units by incoming weights. Singular values are computed exactly, in each step:
    for matrices of a few hundred rows. Of weights that are not finite the value is NaN, and the gradient 0.

    Args:
        target: Where the largest singular value should be, positive.
        k: A positive integer; the larger, the stronger the pull from far above the target.

    Raises:
        TypeError: An argument is no number.
        ValueError: ``target`` or ``k`` is out of range.

    Example:
        >>> Spectral(target=1.0).value(torch.diag(torch.tensor([2.0, 0.5])))
        tensor(9., dtype=torch.float64)

    References:
        Lewandowski et al., Learning Continually by Spectral Regularization, ICLR 2025, arXiv:2406.06811.
    """

    target: float = 1.0
    k: int = 2
    per_unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_is_number("target", self.target)
        if not 0 < self.target < float("inf"):
            raise ValueError(f"`target` should be positive and finite, got {self.target!r}.")
        check_positive_integer(self.k, "`k`")

    def of(self, weights: Tensor, dim: int | Sequence[int] | None) -> Tensor:
        """Compute the largest singular values."""
        matrices = _matrices(weights, dim)
        if not matrices[0].numel():
            return matrices.sum((1, 2))
        is_finite = matrices.detach().isfinite().all(2).all(1)
        # The decomposition raises an error for one that is not finite.
        largest = torch.linalg.matrix_norm(torch.where(is_finite[:, None, None], matrices, 0.0), 2)
        values = (largest**self.k - self.target**self.k).square()
        return torch.where(is_finite, values, float("nan"))


def _alike(weights: list[Tensor]) -> list[list[int]]:
    """The numbers of the weights that agree in shape, dtype and device.

    Raises:
        ValueError: One is a DTensor.
    """
    check_whole(weights)
    found: dict[Any, list[int]] = {}
    for i, weight in enumerate(weights):
        found.setdefault((weight.shape, weight.dtype, weight.device), []).append(i)
    return list(found.values())


def _stack(weights: list[Tensor], rows: list[int]) -> Tensor:
    stack = torch.stack([weights[i].detach() for i in rows])
    return stack.to(at_least_float32(stack)).requires_grad_()


def _matrices(weights: Tensor, dim: int | Sequence[int] | None) -> Tensor:
    """Weights as matrices of output units by incoming weights, shape ``(n, units, incoming)``."""
    inner = unit_dims(weights[0], dim)
    outer = [d for d in range(weights.dim() - 1) if d not in inner]
    arranged = weights.permute(0, *[d + 1 for d in outer], *[d + 1 for d in inner])
    return arranged.flatten(1 + len(outer)).flatten(1, len(outer)) if outer else arranged.flatten(1)[:, None]
