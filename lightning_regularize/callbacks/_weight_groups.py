"""Which weights are penalized as one? Output units, input features, heads of attention, or blocks of neighbors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning_regularize._heads import head_parts
from lightning_regularize.callbacks._penalty_methods import Alike, Target
from lightning_regularize.selection import tensor_name
from lightning_regularize.units import block_dims, input_dims

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_regularize._heads import Part
    from lightning_regularize.callbacks._selective import Selective
    from lightning_regularize.selection import ParameterInfo


class WeightGroups(ABC):
    """How the elements of weights are grouped."""

    def look(self, owner: Selective, infos: Sequence[ParameterInfo]) -> None:  # noqa: B027
        """Learn what the model holds now, before single weights are asked for.

        Raises:
            ValueError: Groups cannot be told.
        """

    def check(self, groups: Sequence[Sequence[Alike]]) -> None:  # noqa: B027
        """Refuse parameter groups, each with its targets, by which groups of weights are torn apart.

        Raises:
            ValueError: They are.
        """

    @abstractmethod
    def target(self, owner: Selective, info: ParameterInfo) -> Target | None:
        """The groups of one weight; None if it has none and is left alone.

        Raises:
            ValueError: They cannot be told.
        """


class OutputUnits(WeightGroups):
    """The incoming weights of an output unit, or what lies along dims that the user names.

    Args:
        dim: These dims; None takes what the layer says.
    """

    def __init__(self, dim: int | Sequence[int] | None = None) -> None:
        self._dim = dim

    def target(self, owner: Selective, info: ParameterInfo) -> Target:
        view, dim = owner.units(info, self._dim, f"{type(owner).__name__}(..., dim=...)")
        return Target(info, view, dim)


class InputFeatures(WeightGroups):
    """All weights that one input feeds."""

    def target(self, owner: Selective, info: ParameterInfo) -> Target:
        owner.warn_if_guessed(info, f"{type(owner).__name__}(..., dim=...)")
        return Target(info, *input_dims(info.owner, tensor_name(info.name), info.shape))


class Blocks(WeightGroups):
    """Neighbors.

    Args:
        size: How many.
        dim: Along which dim; None takes that of the inputs.
    """

    def __init__(self, size: int, dim: int | None) -> None:
        self._size, self._dim = size, dim

    def target(self, owner: Selective, info: ParameterInfo) -> Target:
        if self._dim is None:
            owner.warn_if_guessed(info, f"{type(owner).__name__}(..., dim=...)")
        view, dim = block_dims(info.owner, tensor_name(info.name), info.shape, self._size, dim=self._dim)
        return Target(info, view, dim)


class Heads(WeightGroups):
    """Heads of attention layers. Weights of other layers are left alone."""

    def __init__(self) -> None:
        self._parts: dict[int, Part] = {}

    def look(self, owner: Any, infos: Sequence[ParameterInfo]) -> None:
        wanted = [id(info.parameter) for info in infos if owner.selects(info)]
        self._parts = head_parts(owner.run.root, infos, wanted)
        if not self._parts:
            raise ValueError(
                "the model has no attention layer that is known, among what `include` and `exclude` select. A layer is "
                "known by an integer attribute `num_heads`, and by projections called q_proj, k_proj, v_proj, or "
                "in_proj_weight or qkv for all three, and out_proj."
            )

    def check(self, groups: Sequence[Sequence[Alike]]) -> None:
        place: dict[str, int] = {}
        for i, lists in enumerate(groups):
            for part in (part for alike in lists for part in alike.parts if part is not None):
                if place.setdefault(part.layer, i) != i:
                    raise ValueError(
                        f"the weights of the attention layer {part.layer!r} are in several parameter groups, and a "
                        "head can only be penalized as a whole: put them in one, or leave some out by `exclude`."
                    )

    def target(self, owner: Selective, info: ParameterInfo) -> Target | None:
        part = self._parts.get(id(info.parameter))
        return None if part is None else Target(info, part=part)
