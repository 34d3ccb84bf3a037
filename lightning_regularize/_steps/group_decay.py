"""How strongly does each group decay, what did the user give it, and what does its ``weight_decay`` show meanwhile?

A schedule writes over what the user gave, keeps the ratios between groups, and puts everything back at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from operator import mul
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_regularize._checks import is_number
from lightning_regularize._steps.parts import user_groups
from lightning_regularize._steps.targets import held_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping, Sequence

    from lightning_regularize._steps.targets import Held

    ValueOf = Callable[[dict[str, Any], int, float], float]
    """From a group, the number of a step and the ratio of the group to the weight decay in that step."""


_UNWRITTEN = object()


@dataclass(eq=False)
class Given:
    """What the user gave a group."""

    value: float | None  # None where torch has filled in a default
    before: float | None  # what is to be put back; None where there was no weight decay yet
    written: Any = _UNWRITTEN  # what stands there meanwhile, as :func:`_stamp`


@dataclass(eq=False)
class _Leaf:
    """What was computed last for one optimizer that steps."""

    held: Held
    groups: list[dict[str, Any]] = field(default_factory=list)
    at: tuple[Any, ...] = ()
    values: list[Any] = field(default_factory=list)
    written: list[Any] | None = None
    ratios: list[float] | None = None
    largest: list[float] = field(default_factory=list)
    version: int = 0


class GroupDecay:
    """The weight decay of the groups of one optimizer, and of those that step for it.

    A group is known by its dictionary and, since loading a state replaces that, by its parameters.

    Args:
        optimizer: The optimizer that the training loop knows; its groups have the values that the user gave.
        value_of: The weight decay of a group; None to leave the groups as they are.
        factors_of: The factors of the parameters in each group of an optimizer.
        shows_value: Does a group show its value? It shows 0 where something else than the optimizer decays.
        known: What is known of groups, by parameter: an optimizer may be made of another one's groups in mid-run.
    """

    def __init__(
        self,
        optimizer: Any,
        value_of: ValueOf | None,
        factors_of: Callable[[Any], list[list[float]]],
        *,
        shows_value: bool,
        known: MutableMapping[Tensor, Given],
    ) -> None:
        self._optimizer, self._value_of = ref(optimizer), value_of
        self._factors_of, self._shows_value = factors_of, shows_value
        self._known_to_all = known
        # With the group, which keeps its identity from being used twice.
        self._known: dict[int, tuple[dict[str, Any], Given]] = {}
        self._of_parameter: MutableMapping[Tensor, Given] = WeakTensorKeyDictionary()
        self._leaves: WeakKeyDictionary[Any, _Leaf] = WeakKeyDictionary()
        self._groups: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._is_warned = False
        for group in user_groups(optimizer):
            given = _find(known, group)
            if given is None or given.written is not group.get("weight_decay"):
                given = _given(group)
            self._learn(group, replace(given, written=_UNWRITTEN))
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
        self._groups, self._ids = list(groups), ids
        held = {id(group) for each in (optimizer, *self._leaves) for group in user_groups(each)}
        for key in self._known.keys() - held:
            del self._known[key]
        for group in groups:
            self._given(group)
        self._leaves.clear()
        return True

    def _given(self, group: dict[str, Any]) -> Given:
        if id(group) in self._known:
            return self._known[id(group)][1]
        if known := _find(self._of_parameter, group):
            return self._learn(group, replace(known, written=_UNWRITTEN))
        found, defaults = _given(group), getattr(self._optimizer(), "defaults", {})
        # A default of a group that is added in mid-run was not given by the user.
        return self._learn(group, replace(found, value=None) if found.value == _value(defaults) else found)

    def _learn(self, group: dict[str, Any], given: Given) -> Given:
        self._known[id(group)] = group, given
        for parameter in group["params"]:
            self._of_parameter[parameter] = self._known_to_all[parameter] = given
        return given

    def restore(self, saved: Sequence[float | None]) -> None:
        """Use the values of :meth:`state`, if there are as many groups."""
        self.look()
        if len(saved) == len(self._groups):
            for group, given in zip(self._groups, saved, strict=True):
                self._learn(group, Given(given, _value(group) if given is None else given))
            self._leaves.clear()

    def state(self) -> list[float | None]:
        """What each group was given; None where torch had filled in a default."""
        self.look()
        return [self._given(group).value for group in self._groups]

    def ratio(self, group: dict[str, Any]) -> float:
        """What a group has of a scheduled value: 1 with the largest weight decay given; 1 for all if none has any."""
        largest = max((self._given(each).value or 0.0 for each in self._groups), default=0.0)
        given = self._given(group).value
        return 1.0 if given is None or not largest else given / largest

    # -- what it is now ------------------------------------------------------------------------------------------------

    def values(self, leaf: Any, number: int, epoch: int = 0) -> list[Any]:
        """The weight decay of factor 1 in each group of an optimizer that steps, in step ``number``."""
        return self._computed(leaf, number, epoch).values

    def _computed(self, leaf: Any, number: int, epoch: int) -> _Leaf:
        """The values of a step. They are computed anew only if the step, the epoch or a learning rate is another."""
        self.look()
        found = self._leaves.get(leaf)
        if found is None:
            found = self._leaves[leaf] = _Leaf(held_by(leaf))
        found.groups = groups = self._groups if leaf is self._optimizer() else user_groups(leaf)
        if self._value_of is None:
            found.values = [group.get("weight_decay", 0.0) for group in groups]
            return found
        at = number, epoch, *[group.get("lr") for group in groups]
        if found.at != at or Tensor in map(type, at):
            if found.ratios is None or len(found.ratios) != len(groups):
                found.ratios = list(map(self.ratio, groups))
            found.at = at
            found.values = [self._value_of(group, number, r) for group, r in zip(groups, found.ratios, strict=True)]
        return found

    def shown(self, leaf: Any, number: int, epoch: int = 0) -> list[Any]:
        """What the groups show of their values: that of what decays most in a group of the user's."""
        return self._shown(leaf, self._computed(leaf, number, epoch))

    def _shown(self, leaf: Any, found: _Leaf) -> list[Any]:
        if found.version != found.held.version or not found.version:
            found.largest = self._largest_factors(leaf)
            found.version = found.held.version
        return list(map(mul, found.values, found.largest))

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
        found = self._computed(leaf, number, epoch)
        if self._value_of is None or found.written is found.values:
            return found.values
        self._write(found.groups, self._shown(leaf, found))
        outer = self._optimizer()
        if leaf is not outer:
            own = set(map(id, found.groups))
            shown = zip(self._groups, self.shown(outer, number, epoch), strict=True)
            others = [(group, value) for group, value in shown if id(group) not in own]
            self._write([group for group, _ in others], [value for _, value in others])
        found.written = found.values
        return found.values

    def _write(self, groups: Sequence[dict[str, Any]], values: Sequence[float]) -> None:
        for group, value in zip(groups, values, strict=True):
            if "weight_decay" in group:
                given = self._given(group)
                if given.before is None:  # ZeroRedundancyOptimizer has copied the key from its inner optimizer
                    befores = (self._of_parameter[p].before for p in group["params"])
                    given.before = next((b for b in befores if b is not None), _value(group))
                given.written = _set(group, value if self._shows_value else 0.0)

    def check_unchanged(self, leaf: Any, warn: Callable[[str], None]) -> None:
        """Write again, and warn once, where somebody else has written; a new dictionary is no such case."""
        for i, group in enumerate(leaf.param_groups, start=1):
            written = self._known[id(group)][1].written if id(group) in self._known else _UNWRITTEN
            if written == _stamp(group.get("weight_decay")):
                continue
            if leaf in self._leaves:
                self._leaves[leaf].written = None
            if written is not _UNWRITTEN and not self._is_warned:
                self._is_warned = True
                warn(
                    f"Somebody has set weight_decay={_value(group):g} in group {group.get('name') or f'pg{i}'!r} of "
                    f"{type(leaf).__name__} during training. WeightDecay overrides it by its own value."
                )

    def put_back(self) -> None:
        """Write the values that the groups had before."""
        for group, given in self._known.values():
            if given.written is not _UNWRITTEN:
                _set(group, given.before or 0.0)
                given.written = _UNWRITTEN


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


def _find(known: Mapping[Tensor, Given], group: dict[str, Any]) -> Given | None:
    return next((known[p] for p in group["params"] if p in known), None)


def _given(group: dict[str, Any]) -> Given:
    return Given(_value(group), _value(group) if "weight_decay" in group else None)


def _set(group: dict[str, Any], value: float) -> Any:
    """Write ``weight_decay``, and return its stamp. Captured graphs and compiled steps hold the tensor in its place."""
    if isinstance(group["weight_decay"], Tensor):
        return _stamp(group["weight_decay"].fill_(value))
    group["weight_decay"] = value
    return value


def _value(group: dict[str, Any]) -> float:
    return float(group.get("weight_decay") or 0.0)


def _stamp(value: Any) -> Any:
    return (id(value), value._version) if isinstance(value, Tensor) else value
