"""Which modules is a callback for?"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import nn


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Is it a sequence of several? A text is one value."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_module_rules(include: object) -> tuple[str | type, ...]:
    """The rules as a tuple.

    Raises:
        TypeError: ``include`` is no sequence of globs, "type:Name" and classes.
    """
    expected = f"`include` should be a sequence of globs, 'type:Name' or module classes, got {include!r}"
    if isinstance(include, (str, type)):
        raise TypeError(f"{expected}; one alone is ({getattr(include, '__name__', repr(include))},).")
    if not is_list(include):
        raise TypeError(f"{expected}.")
    for rule in include:
        if not isinstance(rule, (str, type)):
            raise TypeError(f"{expected}; of a module give its name or its class, {type(rule).__name__}.")
    return tuple(include)


def matches_module(rule: str | type, name: str, module: nn.Module) -> bool:
    """Does a rule select a module, which the model calls ``name``?"""
    if isinstance(rule, type):
        return isinstance(module, rule)
    if rule.startswith("type:"):
        return rule.removeprefix("type:") in (base.__name__ for base in type(module).__mro__)
    return fnmatchcase(name, rule)
