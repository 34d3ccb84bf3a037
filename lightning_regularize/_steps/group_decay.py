"""How strongly does each group decay, what did the user give it, and what does its ``weight_decay`` show meanwhile?

A schedule writes over what the user gave, keeps the ratios between groups, and puts everything back at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_regularize._checks import is_number
from lightning_regularize._steps.parts import user_groups
from lightning_regularize._steps.targets import held_by

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    ValueOf = Callable[[dict[str, Any], int, float], float]
    """From a group, the number of a step and the ratio of the group to the weight decay in that step."""


@dataclass
class _Leaf:
    """What was computed last for one optimizer that steps."""

    ratios: list[float] = field(default_factory=list)
    at: tuple[Any, ...] = ()
    values: list[Any] = field(default_factory=list)
    version: int = -1
    largest: list[float] = field(default_factory=list)
    written: list[Any] | None = None


class GroupDecay:
    """The weight decay of the groups of one optimizer, and of those that step for it.

    A group is known by its dictionary and, since loading a state replaces that, by its parameters.

    Args:
        optimizer: The optimizer that the training loop knows; its groups have the values that the user gave.
        value_of: The weight decay of a group; None to leave the groups as they are.
        factors_of: The factors of the parameters in each group of an optimizer.
        shows_value: Does a group show its value? It shows 0 where something else than the optimizer decays.
    """

    def __init__(
        self,
        optimizer: Any,
        value_of: ValueOf | None,
        factors_of: Callable[[Any], list[list[float]]],
        *,
        shows_value: bool,
    ) -> None:
        self._optimizer, self._value_of = ref(optimizer), value_of
        self._factors_of, self._shows_value = factors_of, shows_value
        # What was given; None where torch has filled in a default. Of groups by identity, beside a reference that keeps
        # it from being used twice.
        self._given: dict[int, tuple[dict[str, Any], float | None]] = {}
        self._given_to: MutableMapping[Tensor, float | None] = WeakTensorKeyDictionary()
        self._raw: dict[int, tuple[dict[str, Any], float]] = {}
        self._raw_of: MutableMapping[Tensor, float] = WeakTensorKeyDictionary()
        self._written: dict[int, tuple[dict[str, Any], Any]] = {}
        self._leaves: WeakKeyDictionary[Any, _Leaf] = WeakKeyDictionary()
        self._groups: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._is_warned = False
        for group in user_groups(optimizer):
            self._learn(group, _value(group))
        self.look()

    # -- what the user gave --------------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Learn groups that were added, and dictionaries that were replaced; forget those that are gone.

        Returns:
            Has anything changed?
        """
        optimizer = self._optimizer()
        groups = user_groups(optimizer)
        ids = list(map(id, groups))
        if ids == self._ids:
            return False
        default = float(getattr(optimizer, "defaults", {}).get("weight_decay") or 0.0)
        for group in groups:
            if id(group) not in self._given:
                # A default of a group that is added in mid-run was not given by the user.
                added = None if _value(group) == default else _value(group)
                self._learn(group, self._find(group, added))
        self._groups, self._ids = list(groups), ids
        held = {id(group) for leaf in (optimizer, *self._leaves) for group in user_groups(leaf)}
        for known in (self._given, self._raw, self._written):
            for key in known.keys() - held:
                del known[key]
        self._leaves.clear()
        return True

    def _find(self, group: dict[str, Any], unknown: float | None) -> float | None:
        """What a group was given, known by its dictionary or by a parameter."""
        if id(group) in self._given:
            return self._given[id(group)][1]
        return next((self._given_to[p] for p in group["params"] if p in self._given_to), unknown)

    def _learn(self, group: dict[str, Any], given: float | None) -> None:
        self._given[id(group)] = group, given
        if "weight_decay" in group:
            self._keep(group, _value(group) if given is None else given)
        for parameter in group["params"]:
            self._given_to[parameter] = given

    def _keep(self, group: dict[str, Any], value: float) -> None:
        """Remember what is to be put back."""
        self._raw[id(group)] = group, value
        for parameter in group["params"]:
            self._raw_of[parameter] = value

    def restore(self, saved: Sequence[float | None]) -> None:
        """Use the values of :meth:`state`, if there are as many groups."""
        self.look()
        if len(saved) == len(self._groups):
            for group, given in zip(self._groups, saved, strict=True):
                self._learn(group, given)
            self._leaves.clear()

    def state(self) -> list[float | None]:
        """What each group was given; None where torch had filled in a default."""
        self.look()
        return [self._given[id(group)][1] for group in self._groups]

    def ratio(self, group: dict[str, Any]) -> float:
        """What a group has of a scheduled value: 1 with the largest weight decay given; 1 for all if none has any."""
        largest = max((self._given[id(each)][1] or 0.0 for each in self._groups), default=0.0)
        given = self._find(group, None)
        return 1.0 if given is None or not largest else given / largest

    # -- what it is now ------------------------------------------------------------------------------------------------

    def values(self, leaf: Any, number: int, epoch: int = 0) -> list[Any]:
        """The weight decay of factor 1 in each group of an optimizer that steps, in step ``number``."""
        if self._value_of is None:
            return [group.get("weight_decay", 0.0) for group in user_groups(leaf)]
        self.look()
        found = self._leaves.get(leaf) or self._leaves.setdefault(leaf, _Leaf())
        groups = self._groups if leaf is self._optimizer() else user_groups(leaf)
        lrs = [group.get("lr") for group in groups]
        at = (number, epoch, *lrs)
        if any(isinstance(lr, Tensor) for lr in lrs) or found.at != at:
            found.at = at
            if len(found.ratios) != len(groups):
                found.ratios = list(map(self.ratio, groups))
            found.values = [self._value_of(group, number, r) for group, r in zip(groups, found.ratios, strict=True)]
        return found.values

    def shown(self, leaf: Any, values: Sequence[Any]) -> list[Any]:
        """What the groups show of their values: that of what decays most in a group of the user's."""
        found = self._leaves.setdefault(leaf, _Leaf())
        version = held_by(leaf).version
        if found.version != version or not version:
            found.largest = self._largest_factors(leaf)
            found.version = held_by(leaf).version
        return [value * factor for value, factor in zip(values, found.largest, strict=True)]

    def _largest_factors(self, leaf: Any) -> list[float]:
        largest = [max(factors, default=1.0) for factors in self._factors_of(leaf)]
        outer = self._optimizer()
        if leaf is outer:
            return largest
        # ZeroRedundancyOptimizer gives the inner optimizer a share of each group.
        of_outer = zip(self._groups, self._factors_of(outer), strict=True)
        known = {id(p): max(factors, default=1.0) for group, factors in of_outer for p in group["params"]}
        firsts = [group["params"][0] if group["params"] else None for group in user_groups(leaf)]
        return [known.get(id(first), factor) for first, factor in zip(firsts, largest, strict=True)]

    # -- what stands in the groups meanwhile ---------------------------------------------------------------------------

    def show(self, leaf: Any, number: int, epoch: int = 0) -> list[Any]:
        """Write the weight decay of step ``number`` into the groups of ``leaf``, and of the optimizer that holds it.

        Returns:
            The :meth:`values` of that step.
        """
        values = self.values(leaf, number, epoch)
        if self._value_of is None or self._leaves[leaf].written is values:
            return values
        outer = self._optimizer()
        self._write(user_groups(leaf), self.shown(leaf, values))
        if leaf is not outer:
            own = {id(group) for group in user_groups(leaf)}
            shown = self.shown(outer, self.values(outer, number, epoch))
            others = [(g, value) for g, value in zip(self._groups, shown, strict=True) if id(g) not in own]
            self._write([group for group, _ in others], [value for _, value in others])
        self._leaves[leaf].written = values
        return values

    def _write(self, groups: Sequence[dict[str, Any]], values: Sequence[float]) -> None:
        for group, value in zip(groups, values, strict=True):
            if "weight_decay" in group:
                if id(group) not in self._raw:  # ZeroRedundancyOptimizer copies the key between its own groups
                    known = (self._raw_of[p] for p in group["params"] if p in self._raw_of)
                    self._keep(group, next(known, _value(group)))
                _set(group, value if self._shows_value else 0.0)
                self._written[id(group)] = group, _stamp(group["weight_decay"])

    def check_unchanged(self, leaf: Any, warn: Callable[[str], None]) -> None:
        """Write again, and warn once, where somebody else has written; a new dictionary is no such case."""
        for i, group in enumerate(leaf.param_groups, start=1):
            known = self._written.get(id(group))
            if known is not None and (known[1] is group["weight_decay"] or known[1] == _stamp(group["weight_decay"])):
                continue
            if leaf in self._leaves:
                self._leaves[leaf].written = None
            if known is not None and not self._is_warned:
                self._is_warned = True
                warn(
                    f"Somebody has set weight_decay={_value(group):g} in group {group.get('name') or f'pg{i}'!r} of "
                    f"{type(leaf).__name__} during training. WeightDecay overrides it by its own value."
                )

    def put_back(self) -> None:
        """Write the values that the groups had before."""
        for group, _ in self._written.values():
            _set(group, self._raw[id(group)][1])
        self._written.clear()


def check_given(given: Any) -> None:
    """Refuse what :meth:`GroupDecay.state` cannot have given for some optimizers.

    Raises:
        ValueError: The checkpoint is damaged.
    """
    lists = isinstance(given, list) and all(isinstance(values, list) for values in given)
    values = [value for each in given for value in each if value is not None] if lists else []
    if not lists or not all(is_number(value) and 0 <= value < math.inf for value in values):
        raise ValueError(
            f"WeightDecay: `given` in the checkpoint should hold the finite weight decay of each group, got {given!r}."
        )


def _set(group: dict[str, Any], value: float) -> None:
    """Write ``weight_decay``; captured graphs and compiled steps hold a tensor that stands there."""
    if isinstance(group["weight_decay"], Tensor):
        group["weight_decay"].fill_(value)
    else:
        group["weight_decay"] = value


def _value(group: dict[str, Any]) -> float:
    return float(group.get("weight_decay") or 0.0)


def _stamp(value: Any) -> Any:
    return (id(value), value._version) if isinstance(value, Tensor) else value
