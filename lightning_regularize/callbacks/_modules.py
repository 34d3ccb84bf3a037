"""Which modules is a callback for?"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def check_module_rules(include: object) -> tuple[str | type, ...]:
    """The rules as a tuple.

    Raises:
        TypeError: ``include`` is no sequence of globs, "type:Name" and classes.
    """
    is_list = isinstance(include, Sequence) and not isinstance(include, str)
    if not is_list or not all(isinstance(rule, (str, type)) for rule in include):  # type: ignore[attr-defined]
        raise TypeError(f"`include` should be a sequence of globs, 'type:Name' or module classes, got {include!r}.")
    return tuple(include)  # type: ignore[arg-type]


def matches_module(rule: str | type, name: str, module: nn.Module) -> bool:
    """Does a rule select a module, which the model calls ``name``?"""
    if isinstance(rule, type):
        return isinstance(module, rule)
    if rule.startswith("type:"):
        return rule.removeprefix("type:") in (base.__name__ for base in type(module).__mro__)
    return fnmatchcase(name, rule)
