"""What is a projection? The base of all of them, and what they ask of their arguments."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_regularize._checks import check_is_number
from lightning_regularize._steps.buckets import HALF, put_back_
from lightning_regularize.schedules import Schedule
from lightning_regularize.units import at_least_float32, unit_norms


class Projection(ABC):
    """A set of allowed weights: the base of all projections, to be implemented by a frozen dataclass.

    Example:
        >>> from dataclasses import dataclass
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
    """Whether each output unit is constrained for itself, so that :func:`~lightning_regularize.units.norm_dims` has to
    say what a unit is."""

    keeps_zeros: ClassVar[bool] = False
    """Whether elements that are zero stay so, so that a weight with a pruning mask is projected as the layer uses
    it. Of other projections masked weights are refused."""

    takes_lists: ClassVar[bool] = False
    """Whether :meth:`project_` takes a list of weights as well, for one call instead of many."""

    @abstractmethod
    def project_(self, weight: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
        """Move ``weight`` in place to the nearest point of the set.

        Args:
            weight: Any shape, floating. Nothing of this is recorded by autograd. A DTensor is projected as the whole
                tensor that it is; every rank that holds a piece should take part.
            dim: The dims that hold the incoming weights of one output unit, see
                :func:`~lightning_regularize.units.norm_dims`. It precedes the projection's own ``dim``; without both it
                is all dims but the first. Only where ``per_unit``.

        Returns:
            Whether anything was changed: a 0-d bool tensor on the weight's device, so that nobody has to wait for the
            device. For a DTensor it is about the piece on this rank.
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
            >>> from lightning_regularize.projections import FrobeniusBall
            >>> FrobeniusBall(0.5, relative=True).at_start(torch.tensor([[3.0, 4.0]]))
            FrobeniusBall(radius=2.5, relative=False)
        """
        projection: Any = self
        if not getattr(self, "relative", False):
            return self
        norm = frobenius_norm(weight).item()
        if not 0 < norm < math.inf:
            raise ValueError(
                f"A relative `radius` needs a positive, finite norm at the start, got {norm}. "
                "Leave this parameter out, or give the radius as a number with `relative=False`."
            )
        found: Projection = replace(projection, radius=projection.radius * norm, relative=False)
        return found


def schedules_of(projection: Projection) -> dict[str, Schedule]:
    """The arguments of a projection that follow a schedule, by name.

    Example:
        >>> from lightning_regularize.projections import MaxNorm
        >>> from lightning_regularize.schedules import Cosine
        >>> schedules_of(MaxNorm(Cosine(4.0, 2.0)))
        {'max_norm': Cosine(start=4.0, end=2.0)}
    """
    named: Any = projection
    values = {field.name: getattr(named, field.name) for field in fields(named)} if is_dataclass(named) else {}
    return {name: value for name, value in values.items() if isinstance(value, Schedule)}


def number_now(projection: Projection, name: str) -> float:
    """The value of an argument, which should not be a schedule any more.

    Raises:
        ValueError: It is one.
    """
    value: Any = getattr(projection, name)
    if isinstance(value, Schedule):
        raise ValueError(
            f"`{name}` should be a number by now, got {value!r}: WeightConstraint reads schedules in each step; in a "
            f"loop of your own call `dataclasses.replace(projection, {name}=...)` with the value of the step."
        )
    return value  # type: ignore[no-any-return]


def check_number_or_schedule(name: str, value: object) -> None:
    """Refuse an argument that is neither a number, nor a 0-d tensor, nor a schedule.

    Raises:
        TypeError: It is something else.
    """
    if callable(value) and not isinstance(value, (Schedule, type)):
        raise TypeError(
            f"`{name}` should be a number or a `Schedule`, got {value!r}: make it a subclass of `Schedule`."
        )
    if not isinstance(value, Schedule) and not (isinstance(value, Tensor) and value.dim() == 0):
        check_is_number(name, value)


def check_positive(name: str, value: Any) -> None:
    """Refuse a number that is not positive and finite; a schedule is read later.

    Raises:
        TypeError: It is neither a number nor a schedule.
        ValueError: It is out of range.
    """
    check_number_or_schedule(name, value)
    if not isinstance(value, Schedule) and not 0 < value < math.inf:
        raise ValueError(f"`{name}` should be positive and finite, got {value!r}.")


def margin(dtype: torch.dtype) -> float:
    """How much a norm may grow, relatively, when every element is rounded to ``dtype`` and the norm is measured."""
    eps = torch.finfo(dtype).eps
    return eps / 2 if dtype in HALF else 32 * eps


def into_ball(found: Tensor, dtype: torch.dtype, *, bound: float) -> tuple[Tensor, float]:
    """Of norms: which are outside of a ball, and the norm that is just inside."""
    return (found > bound) & (found < math.inf), bound * (1 - margin(dtype))


def scale_(weights: list[Tensor], units: Tensor, found: Tensor, where: Tensor, target: float) -> Tensor:
    """Give some units, of the norms that were found, a norm, and return whether there are any."""
    changed = where.any()
    # On a GPU all are multiplied, most of them by 1, which changes no bit: to look would wait for it. The factors keep
    # at least float32, so that a low-precision weight is rounded once.
    if not units.is_cpu or changed:
        units.mul_(torch.where(where, target / found, 1.0).to(at_least_float32(units)))
        put_back_(weights, units)
    return changed


def any_of(changed: list[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Whether anything was changed, on the device of the first weight."""
    if len(changed) == 1:
        return changed[0]
    if not changed:
        return torch.zeros((), dtype=torch.bool, device=weights[0].device if weights else None)
    found: Tensor = torch.stack([each.to(changed[0].device, non_blocking=True) for each in changed])
    return found.any()


def frobenius_norm(weight: Tensor) -> Tensor:
    """The norm of a whole weight, with its dims kept as size 1."""
    # With dims: a 0-d factor would be rounded to the weight's own low precision before it multiplies.
    with_dims = weight if weight.dim() else weight.view(1)
    return unit_norms(with_dims, range(with_dims.dim())).view([1] * weight.dim())
