"""What is a penalty? The base of all of them, and what they ask of their arguments."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_regularize._checks import check_is_number
from lightning_regularize._sharding import is_dtensor
from lightning_regularize._steps.buckets import Tensors, listed


class Penalty(ABC):
    """What pulls weights to zero, at unit strength: the base of all penalties, to be implemented by a frozen dataclass.

    In every method ``weight`` is floating, of any shape, and autograd records nothing. ``dim`` matters only where
    ``per_unit``: the dims that hold the incoming weights of one output unit, by default all but the first.
    """

    per_unit: ClassVar[bool] = False
    """Whether output units are groups, so that :func:`~lightning_regularize.units.norm_dims` has to say them."""

    takes_pieces: ClassVar[bool] = False
    """Whether ``weight`` may be what a rank holds of it: a DTensor, and without ``per_unit`` also any run of its
    elements. Other penalties get whole weights, gathered from all ranks."""

    takes_lists: ClassVar[bool] = False
    """Whether ``weight``, ``gradient`` and a threshold that is a tensor may be lists, for one call instead of many."""

    takes_metric: ClassVar[bool] = True
    """Whether the threshold of ``proximal_`` may be a tensor of the weight's shape, as Adam and its like need it."""

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
            threshold: Strength times step, non-negative: a number, a 0-d tensor, or, where ``takes_metric``, a tensor
                of the weight's shape.
            dim: See the class.

        Raises:
            ValueError: If ``threshold`` is a number and negative or not finite, or a tensor of another shape.
        """


def dense_gradients(gradient: Tensors) -> list[Tensor]:
    """The gradients as a list.

    Raises:
        ValueError: One is sparse.
    """
    gradients = listed(gradient)
    for each in gradients:
        if each.layout is not torch.strided:
            raise ValueError(
                f"`gradient` should be dense, got {each.layout}: a penalty pulls at every weight, not only at the "
                "rows that were looked up. Use `sparse=False` in the embedding, or a proximal step."
            )
    return gradients


def check_whole(weights: Sequence[Tensor]) -> None:
    """Refuse what a rank holds of a weight.

    Raises:
        ValueError: One is a DTensor.
    """
    if any(map(is_dtensor, weights)):
        raise ValueError("The whole weight is needed, got what a rank holds of it: pass `weight.full_tensor()`.")


def check_strength(name: str, value: object) -> None:
    """Refuse a number that is negative or not finite.

    Raises:
        TypeError: ``value`` is neither a number nor a tensor.
        ValueError: It is negative or not finite.
    """
    if isinstance(value, Tensor):  # to look at it would wait for its device
        return
    check_is_number(name, value)
    if not 0 <= value < math.inf:  # type: ignore[operator]
        raise ValueError(f"`{name}` should be non-negative and finite, got {value!r}.")
