"""How strongly does each group decay, what did the user give it, and what does its ``weight_decay`` show meanwhile?

A schedule writes over what the user gave, keeps the ratios between groups, and puts everything back at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_regularize._steps.parts import user_groups
from lightning_regularize._steps.targets import held_by

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    ValueOf = Callable[[int, dict[str, Any], int, float], float | None]
    """From the number of a schedule, a group, the number of a step and the ratio of the group to the weight decay in
    that step; None for what the user gave the group."""


_UNWRITTEN = object()
_DECAY = "weight_decay"


@dataclass(eq=False)
class Given:
    """What the user gave a group."""

    value: float | None  # None where torch has filled in its default
    original: float | None  # what is put back, a default too; None where there was no weight decay yet
    written: Any = _UNWRITTEN  # by us, see :func:`_stamp`


@dataclass(eq=False)
class _Row:
    """One group of an optimizer that steps."""

    group: dict[str, Any]
    given: Given
    ratio: float
    factors: dict[int, float]  # the largest of what decays in it, by schedule
    values: dict[int, Any] = field(default_factory=dict)  # the weight decay of factor 1 in a step, by schedule

    def by_schedule(self) -> dict[int, Any]:
        return {i: self.values[i] * factor for i, factor in self.factors.items()}

    def shown(self) -> Any:
        """The value of what decays most by the last schedule."""
        return self.by_schedule()[max(self.factors)] if self.factors else 0.0

    def is_written(self) -> bool:
        """Does the group show what was written there last, if it shows anything?"""
        return _DECAY not in self.group or _is_written(self.given, self.group)


@dataclass(eq=False)
class _Leaf:
    """What was computed last for one optimizer that steps."""

    held_version: int
    rows: list[_Row]
    position: tuple[Any, ...] = ()
    is_written: bool = False  # do the groups show it?

    def is_of(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Loading a state replaces groups."""
        return _are_same([row.group for row in self.rows], groups)


class GroupDecay:
    """The weight decay of the groups of one optimizer, and of those that step for it.

    A group is known by its dictionary and, since loading a state replaces that, by its parameters.

    Args:
        optimizer: The optimizer that the training loop knows; its groups have the values that the user gave.
        value_of: The weight decay of a group; None to leave the groups as they are.
        settings_of: For each group of an optimizer, the schedule and the factor of each of its parameters.
        shows_value: Does a group show its value? It shows 0 where something else than the optimizer decays.
        of_run: What is known of all groups in the run, by parameter: an optimizer may be made of another one's groups.
        warn: Says that somebody else writes into the groups.
    """

    def __init__(
        self,
        optimizer: Any,
        value_of: ValueOf | None,
        settings_of: Callable[[Any], list[list[tuple[int, float]]]],
        *,
        shows_value: bool,
        of_run: MutableMapping[Tensor, list[Given]],
        warn: Callable[[str], None],
    ) -> None:
        self._optimizer, self._value_of = ref(optimizer), value_of
        self._settings_of, self._shows_value, self._warn = settings_of, shows_value, warn
        self._of_run = of_run
        # With the group, which keeps its identity from being used twice.
        self._of_group: dict[int, tuple[dict[str, Any], Given]] = {}
        self._of_parameter: MutableMapping[Tensor, Given] = WeakTensorKeyDictionary()
        self._leaves: WeakKeyDictionary[Any, _Leaf] = WeakKeyDictionary()
        self._groups: list[dict[str, Any]] = []
        self._largest: float | None = None  # weight decay given, once it was asked for
        self._is_warned = False
        for group in user_groups(optimizer):
            before = [given for parameter in group["params"] for given in of_run.get(parameter, ())]
            given = next((each for each in before if _is_written(each, group)), None)
            self._learn(group, _read(group) if given is None else replace(given, written=_UNWRITTEN))
        self.look()

    # -- what the user gave --------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Learn groups that were added, and dictionaries that were replaced; forget those that are gone."""
        optimizer = self._optimizer()
        groups = user_groups(optimizer)
        if _are_same(groups, self._groups):
            return
        self._groups, self._largest = list(groups), None
        held = {id(group) for each in (optimizer, *self._leaves) for group in user_groups(each)}
        for key in self._of_group.keys() - held:
            del self._of_group[key]
        for group in groups:
            self._given(group)
        self._leaves.clear()

    def _given(self, group: dict[str, Any]) -> Given:
        if id(group) in self._of_group:
            return self._of_group[id(group)][1]
        known = next((self._of_parameter[p] for p in group["params"] if p in self._of_parameter), None)
        if known is not None:
            return self._learn(group, replace(known, written=_UNWRITTEN))
        given, defaults = _read(group), getattr(self._optimizer(), "defaults", {})
        # A default of a group that is added in mid-run was not given by the user.
        return self._learn(group, replace(given, value=None) if given.value == _value(defaults) else given)

    def _learn(self, group: dict[str, Any], given: Given) -> Given:
        self._of_group[id(group)], self._largest = (group, given), None
        for parameter in group["params"]:
            self._of_parameter[parameter] = given
            self._of_run.setdefault(parameter, []).append(given)
        return given

    def restore(self, saved: Sequence[float | None]) -> None:
        """Use the values of :meth:`state`, if there are as many groups."""
        self.look()
        if len(saved) == len(self._groups):
            for group, value in zip(self._groups, saved, strict=True):
                self._learn(group, Given(value, _value(group) if value is None else value))
            self._leaves.clear()

    def state(self) -> list[float | None]:
        """What each group was given; None where torch had filled in a default."""
        self.look()
        return [self._given(group).value for group in self._groups]

    def ratio(self, group: dict[str, Any]) -> float:
        """What a group has of a scheduled value: 1 with the largest weight decay given; 1 for all if none has any."""
        given = self._given(group).value
        if self._largest is None:
            self._largest = max((self._given(each).value or 0.0 for each in self._groups), default=0.0)
        return 1.0 if given is None or not self._largest else given / self._largest

    # -- what it is now ------------------------------------------------------------------------------------------------

    def values(self, leaf: Any, number: int, epoch: int = 0) -> list[dict[int, Any]]:
        """The weight decay of factor 1 in each group of an optimizer that steps, in step ``number``.

        Returns:
            For each group the values by schedule, of schedules by which something in it decays.
        """
        return [row.values for row in self._computed(leaf, number, epoch).rows]

    def by_schedule(self, leaf: Any, number: int, epoch: int = 0) -> list[dict[int, Any]]:
        """As :meth:`values`, times the largest factor of what decays by the schedule in the group."""
        return [row.by_schedule() for row in self._computed(leaf, number, epoch).rows]

    def _computed(self, leaf: Any, number: int, epoch: int) -> _Leaf:
        """The values of a step. They are computed anew only if the step, the epoch or a learning rate is another."""
        self.look()
        groups = self._groups if leaf is self._optimizer() else user_groups(leaf)
        version = held_by(leaf).look(groups)  # parameters may have been appended just now
        found = self._leaves.get(leaf)
        if found is None or found.held_version != version or not found.is_of(groups):
            factors = self._largest_factors(leaf)
            rows = [_Row(g, self._given(g), self.ratio(g), f) for g, f in zip(groups, factors, strict=True)]
            found = self._leaves[leaf] = _Leaf(version, rows)
        position = number, epoch, *[group.get("lr") for group in groups]
        if self._value_of is None or found.position != position or Tensor in map(type, position):
            found.position, found.is_written = position, False
            for row in found.rows:
                row.values = self._values_of(row, number)
        return found

    def _values_of(self, row: _Row, number: int) -> dict[int, Any]:
        if self._value_of is None:
            return {0: row.group.get(_DECAY, 0.0)}
        values = {i: self._value_of(i, row.group, number, row.ratio) for i in row.factors}
        if None in values.values():
            kept = _value(row.group) if row.given.original is None else row.given.original
            return {i: kept if value is None else value for i, value in values.items()}
        return values

    def _largest_factors(self, leaf: Any) -> list[dict[int, float]]:
        largest = list(map(_largest, self._settings_of(leaf)))
        outer = self._optimizer()
        if leaf is outer:
            return largest
        # ZeroRedundancyOptimizer gives the inner optimizer a share of each group.
        of_outer = zip(self._groups, self._settings_of(outer), strict=True)
        known = {id(p): factors for group, s in of_outer for factors in [_largest(s)] for p in group["params"]}
        firsts = [group["params"][0] if group["params"] else None for group in user_groups(leaf)]
        return [known.get(id(first), factors) for first, factors in zip(firsts, largest, strict=True)]

    # -- what stands in the groups meanwhile ---------------------------------------------------------------------------

    def show(self, leaf: Any, number: int, epoch: int = 0) -> list[dict[int, Any]]:
        """Write the weight decay of step ``number`` into the groups of ``leaf``, and of the optimizer that holds it.

        Returns:
            The :meth:`values` of that step.
        """
        found = self._computed(leaf, number, epoch)
        if self._value_of is not None and not (found.is_written and all(row.is_written() for row in found.rows)):
            self._write(leaf, found.rows)
            outer = self._optimizer()
            if leaf is not outer:
                own = {id(row.group) for row in found.rows}
                rows = self._computed(outer, number, epoch).rows
                self._write(outer, [row for row in rows if id(row.group) not in own])
            found.is_written = True
        return [row.values for row in found.rows]

    def _write(self, optimizer: Any, rows: Sequence[_Row]) -> None:
        decaying = [row for row in rows if _DECAY in row.group]
        for row in decaying:
            group, given = row.group, row.given
            if given.original is None:  # ZeroRedundancyOptimizer has copied the key from its inner optimizer
                originals = (self._of_parameter[p].original for p in group["params"])
                given.original = next((each for each in originals if each is not None), _value(group))
            if given.written is not _UNWRITTEN and not self._is_warned and not _is_written(given, group):
                self._is_warned = True
                name = group.get("name") or f"pg{1 + next(i for i, each in enumerate(rows) if each is row)}"
                self._warn(
                    f"Somebody has set weight_decay={_value(group):g} in group {name!r} of {type(optimizer).__name__} "
                    "during training. WeightDecay overrides it by its own value."
                )
        # Several groups may hold one tensor, as torch makes it of a default.
        for row in decaying:
            _set(row.group, row.shown() if self._shows_value else 0.0)
        for row in decaying:
            row.given.written = _stamp(row.group[_DECAY])

    def put_back(self) -> None:
        """Write the values that the groups had before."""
        for group, given in self._of_group.values():
            if given.written is not _UNWRITTEN:
                _set(group, given.original or 0.0)
                given.written = _UNWRITTEN


def _are_same(groups: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> bool:
    return len(groups) == len(others) and all(map(is_, groups, others))


def _largest(settings: Sequence[tuple[int, float]]) -> dict[int, float]:
    """The largest factor of each schedule, of what decays; 1 for a group that has no parameters yet."""
    if not settings:
        return {0: 1.0}
    largest: dict[int, float] = {}
    for schedule, factor in settings:
        if factor > largest.get(schedule, 0.0):
            largest[schedule] = factor
    return largest


def _read(group: dict[str, Any]) -> Given:
    return Given(_value(group), _value(group) if _DECAY in group else None)


def _value(group: dict[str, Any]) -> float:
    return float(group.get(_DECAY) or 0.0)


def _set(group: dict[str, Any], value: float) -> None:
    """Captured graphs and compiled steps hold a tensor that stands there."""
    if isinstance(group[_DECAY], Tensor):
        group[_DECAY].fill_(value)
    else:
        group[_DECAY] = value


def _stamp(value: Any) -> Any:
    """Identifies a value, so that writes of others are noticed: for a tensor, also its version."""
    return (id(value), value._version) if isinstance(value, Tensor) else value


def _is_written(given: Given, group: dict[str, Any]) -> bool:
    """Is the weight decay of a group what was written there? An equal number may be somebody else's."""
    value = group.get(_DECAY)
    return bool(given.written == _stamp(value)) if isinstance(value, Tensor) else given.written is value
