"""What does an optimizer see while it steps? Its groups in parts, of which each shares one setting of the weight decay.

Everybody else sees the user's groups: they are back before a closure is evaluated, before any other hook is called, and
before ``step`` returns. A part owns its values. A key goes from the group to its parts when somebody has changed it in
the group, and from the first part to the group when the optimizer has changed it, as Prodigy does with its ``d``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_regularize._steps.buckets import form_of
from lightning_regularize._steps.hooks import ATTRIBUTE
from lightning_regularize._steps.targets import held_by

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

# Lists with one entry for each group that an optimizer reads while it steps. They are known by name: a list of the same
# length may be something else. AdaBound's are read there; schedule-free optimizers have lists of this name that they do
# not read.
_PER_GROUP = ("base_lrs",)
_OURS = ("params", "param_names", "weight_decay")


class _Noted:
    """The values of a group, or of a part, as they were: to find what somebody has written since."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._contents: dict[str, Any] = {}  # of values that can be written into

    def changed(self, target: dict[str, Any]) -> list[str]:
        """Keys of values that are another object than they were, or were written into. An equal object may be new."""
        noted, contents = self._values, self._contents
        if not contents and len(noted) == len(target) and all(map(is_, target.values(), noted.values())):
            return []  # as it is at most steps
        keys = [key for key, value in target.items() if noted.get(key, noted) is not value]
        if contents:
            keys += [k for k in contents if k in target and k not in keys and contents[k] != _contents(target[k])]
        return keys

    def note(self, key: str, value: Any) -> None:
        self._values[key] = value
        if key not in _OURS and (isinstance(value, Tensor) or type(value) in (list, dict)):
            self._contents[key] = _contents(value)
        else:
            self._contents.pop(key, None)

    def forget_missing(self, target: dict[str, Any]) -> Iterable[str]:
        """Keys that ``target`` no longer has."""
        missing = self._values.keys() - target.keys()
        for key in missing:
            del self._values[key]
            self._contents.pop(key, None)
        return missing


def _contents(value: Any) -> Any:
    """What can be compared with what a value holds later. Tensors have no single answer to that, but a version."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if type(value) is dict:
        return {key: _contents(each) for key, each in value.items()}
    return [_contents(each) for each in value] if type(value) in (list, tuple) else value


@dataclass
class _Division:
    """One group of the user's and its parts."""

    settings: list[tuple[int, float]]
    parts: list[dict[str, Any]]
    in_group: _Noted = field(default_factory=_Noted)  # the group's values when they were last copied
    in_part: _Noted = field(default_factory=_Noted)  # the first part's values when they were last shown


class Parts:
    """The parts of the groups of one optimizer.

    Args:
        setting_of: The number of a parameter's schedule, and the factor on its value; asked once for each parameter
            that the groups hold.
    """

    def __init__(self, setting_of: Callable[[nn.Parameter], tuple[int, float]]) -> None:
        self.values: Sequence[Mapping[int, float | Tensor]] = []
        """The weight decay of each group of the user's in the step to come, by the number of the schedule."""
        self.setting_of = setting_of
        self._divisions: list[_Division] = []
        self._version = -1
        self._saved: Sequence[list[dict[str, Any]]] = ()
        self.users: tuple[list[dict[str, Any]], dict[str, list[Any]]] | None = None
        """While the parts are shown: the user's groups, and lists with one entry for each of them."""
        self._must_check = True
        self._watched: list[_WatchedList] = []  # of the step that is under way

    def update(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The parts of what the groups of ``optimizer`` hold now, with the values that they have now."""
        self._divide(optimizer)
        for group, division, value in zip(optimizer.param_groups, self._divisions, self.values, strict=True):
            _copy_to_parts(group, division)
            if "weight_decay" in group:
                given = group["weight_decay"]
                for (schedule, factor), part in zip(division.settings, division.parts, strict=True):
                    own = value[schedule] * factor if factor else 0.0
                    if isinstance(given, Tensor) and not isinstance(own, Tensor):
                        own = torch.full_like(given, own)
                    _set_value(part, "weight_decay", own)
        return [part for division in self._divisions for part in division.parts]

    def show(self, optimizer: Optimizer) -> None:
        """Replace the groups by their parts."""
        if self.users is not None:
            return
        groups, parts = optimizer.param_groups, self.update(optimizer)
        for division in self._divisions:
            for key in division.in_part.changed(division.parts[0]):
                division.in_part.note(key, division.parts[0][key])
        per_group = {name: vars(optimizer)[name] for name in _PER_GROUP if _has_one_each(optimizer, name)}
        for name, values in per_group.items():
            divided = zip(values, self._divisions, strict=True)
            setattr(optimizer, name, [value for value, division in divided for _ in division.parts])
        self.users = groups, per_group
        reads_late = type(optimizer).__module__.startswith("torch.optim.")  # as is known of these
        checks = self._must_check and not reads_late and not _is_compiled()
        if checks:
            for part in parts:
                part["params"] = _WatchedList.of(part["params"])
            self._watched.append(parts := _WatchedList(parts))
        optimizer.param_groups = parts

    def hide(self, optimizer: Optimizer) -> None:
        """Put the user's groups back, with what the optimizer has written to the first part of each."""
        if self.users is None:
            return
        (groups, per_group), self.users = self.users, None
        for group, division in zip(groups, self._divisions, strict=False):  # nothing may stop this
            _copy_from_parts(group, division)
        for name, values in per_group.items():
            setattr(optimizer, name, values)
        optimizer.param_groups = groups

    def were_ignored(self) -> bool:
        """Has the optimizer left some parts unread in the step that has ended? Asked of the first that reads any.

        One that keeps lists for its groups reads as many parts as it has groups, and may leave out a group as a whole.
        """
        watched, self._watched = self._watched, []
        if not watched:
            return False
        to_the_end = any(parts.was_finished for parts in watched)
        of_groups = []
        for division in self._divisions:
            # Another list is one that the optimizer has made of what it has read.
            of_groups.append([getattr(p["params"], "was_read", True) for p in division.parts if p["params"]])
            for part in division.parts:
                part["params"] = list(part["params"])
        self._must_check = to_the_end and not any(map(any, of_groups))  # an optimizer may do nothing in some steps
        if self._must_check:
            return False
        return any(not all(were_read) and (any(were_read) or not to_the_end) for were_read in of_groups)

    def state_dict(self) -> list[list[dict[str, Any]]]:
        """For each group the values of its parts, of keys in which they differ; empty if none does."""
        differing = [_differing(division) for division in self._divisions]
        return differing if any(map(any, differing)) else []

    def load_state_dict(self, state: Sequence[list[dict[str, Any]]]) -> None:
        """Values of :meth:`state_dict`, to be used when the groups are next divided."""
        self._saved, self._version = state, -1

    def _divide(self, optimizer: Optimizer) -> None:
        version = held_by(optimizer).look(optimizer.param_groups)
        if version == self._version:
            return
        before, self._divisions, self._version = self._divisions, [], version
        for i, group in enumerate(optimizer.param_groups):
            places: dict[tuple[int, float], list[int]] = {}
            for j, parameter in enumerate(group["params"]):
                places.setdefault(self.setting_of(parameter), []).append(j)
            settings = sorted(places, key=lambda setting: (-setting[1], setting[0])) or [(0, 1.0)]
            parts = [_part(group, places.get(setting, [])) for setting in settings]
            division = _Division(settings, parts)
            if i < len(before):  # parameters were appended or replaced: a part goes on with its own values
                _inherit(division, before[i], group)
            self._divisions.append(division)
        self._restore(optimizer)

    def _restore(self, optimizer: Optimizer) -> None:
        saved, self._saved = self._saved, ()
        for i, (group, division) in enumerate(zip(optimizer.param_groups, self._divisions, strict=True)):
            if i < len(saved) and len(saved[i]) == len(division.parts):
                _copy_to_parts(group, division)
                for part, values in zip(division.parts, saved[i], strict=True):
                    for key, value in values.items():
                        _set_value(part, key, value)


class _WatchedList(list[Any]):
    """A list that knows whether somebody has read items of it, and whether to its end."""

    was_read = was_finished = False

    @classmethod
    def of(cls, values: list[Any]) -> _WatchedList:
        """The list itself, if it is watched."""
        return values if isinstance(values, cls) else cls(values)

    def __iter__(self) -> Iterator[Any]:
        self.was_read = True
        yield from super().__iter__()
        self.was_finished = True

    def __reversed__(self) -> Iterator[Any]:
        return iter(self.copy()[::-1])

    def __getitem__(self, place: Any) -> Any:
        self.was_read = True
        self.was_finished |= isinstance(place, slice) or place in (-1, len(self) - 1)
        return super().__getitem__(place)

    def __add__(self, others: Any) -> Any:
        return self.copy() + others

    def __radd__(self, others: Any) -> Any:
        return others + self.copy()

    def copy(self) -> list[Any]:
        return list(self)


def _part(group: dict[str, Any], places: list[int]) -> dict[str, Any]:
    part: dict[str, Any] = {"params": [group["params"][j] for j in places]}
    if "param_names" in group:  # of those that the group had when it was made: parameters may have been appended
        part["param_names"] = [group["param_names"][j] for j in places if j < len(group["param_names"])]
    return part


def _copy_to_parts(group: dict[str, Any], division: _Division) -> None:
    for key in division.in_group.changed(group):
        for part in division.parts if key not in _OURS else ():
            _set_value(part, key, group[key])
        division.in_group.note(key, group[key])
    for key in division.in_group.forget_missing(group):
        for part in division.parts:
            part.pop(key, None)


def _copy_from_parts(group: dict[str, Any], division: _Division) -> None:
    first = division.parts[0]
    for key in division.in_part.changed(first):
        if key in _OURS:
            continue
        if key not in group or first[key] is not group[key]:
            _set_value(group, key, first[key])
        division.in_group.note(key, group[key])


def _set_value(target: dict[str, Any], key: str, value: Any) -> None:
    """Write a value that nobody shares. A tensor that is there stays: compiled steps and captured graphs hold it."""
    known = target.get(key)
    if not isinstance(value, Tensor):
        target[key] = type(value)(value) if type(value) in (dict, list) else value
    elif known is not value and isinstance(known, Tensor) and form_of(known) == form_of(value):
        known.copy_(value)
    else:
        target[key] = value.clone()


def _differing(division: _Division) -> list[dict[str, Any]]:
    first, *others = division.parts
    keys = [k for k in first if k not in _OURS and any(k in o and not _is_equal(first[k], o[k]) for o in others)]
    return [{key: part[key] for key in keys} for part in division.parts] if keys else []


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if type(a) is type(b) is dict:
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    if type(a) is type(b) and isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    same = a == b
    return bool(same.all() if hasattr(same, "all") else same)  # arrays of numpy have an answer for each element


def _inherit(division: _Division, before: _Division, group: dict[str, Any]) -> None:
    known = dict(zip(before.settings, before.parts, strict=True))
    if all(setting in known for setting in division.settings) and len(division.parts) == len(before.parts):
        for setting, part in zip(division.settings, division.parts, strict=True):
            part.update({key: value for key, value in known[setting].items() if key not in _OURS and key in group})
        division.in_group = before.in_group


def _has_one_each(optimizer: Optimizer, name: str) -> bool:
    values = vars(optimizer).get(name)
    return isinstance(values, list) and len(values) == len(optimizer.param_groups)


def _is_compiled() -> bool:
    """Is this step being traced, or run, by ``torch.compile``? It reads lists without calling their methods."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None  # type: ignore[attr-defined, unused-ignore]


def user_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer as the user has them, also while it sees parts."""
    hooks = vars(optimizer).get(ATTRIBUTE)
    users = hooks.parts.users if hooks is not None and hooks.parts is not None else None
    return optimizer.param_groups if users is None else users[0]  # type: ignore[no-any-return]


def refusal(leaf: Optimizer, optimizer: Any, *, is_foreign: bool) -> str:
    """Why the groups of ``leaf`` cannot be shown in parts; empty if they can.

    Args:
        leaf: An optimizer that steps.
        optimizer: What the training loop steps, the same or one that holds ``leaf``.
        is_foreign: Does ``leaf`` hold none of the module's parameters?
    """
    name, instead = type(leaf).__name__, "Use WeightDecay(..., method='decoupled'), which decays by itself."
    if is_foreign:
        return f"{type(optimizer).__name__} steps copies of the weights by {name}: rules do not know them. {instead}"
    if getattr(getattr(leaf, "mng", None), "index2config", None):
        return f"{name} has settings for single parameters by group and place (GlobalOptimManager). {instead}"
    return "" if _can_set_groups(leaf) else f"{name} does not let its `param_groups` be set. {instead}"


def _can_set_groups(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    other = list(groups)
    try:
        optimizer.param_groups = other
        return optimizer.param_groups is other
    except AttributeError:  # a property
        return False
    finally:
        with contextlib.suppress(AttributeError):
            optimizer.param_groups = groups
