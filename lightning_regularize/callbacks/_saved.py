"""What should the state of a callback in a checkpoint hold? It is checked as the arguments of constructors are.

A layout is a :class:`Value`, a list ``[layout]`` of any length, or a dictionary, either by known keys or, with the
single key ``"*"``, by the names of parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_regularize._checks import is_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Value(NamedTuple):
    """One value of a state.

    Args:
        expected: What it should be, for messages.
        is_valid: Whether a value is that.
    """

    expected: str
    is_valid: Callable[[Any], bool]


Layout = Value | list[Any] | dict[str, Any]

COUNT = Value("an integer of at least 0", lambda value: type(value) is int and value >= 0)
_LARGEST = torch.finfo(torch.float32).max  # a larger number makes infinity of weights
NUMBER = Value("a finite number of at least 0", lambda value: is_number(value) and 0 <= value <= _LARGEST)
POSITIVE = Value("a positive and finite number", lambda value: is_number(value) and 0 < value <= _LARGEST)
TENSOR = Value(
    "a dense tensor of finite floating-point numbers",
    lambda value: (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and (value.is_floating_point() or value.is_complex())
        and bool(value.isfinite().all())
    ),
)


def check_state(owner: str, state: Mapping[str, Any], layouts: Mapping[str, Layout]) -> None:
    """Refuse a state that is damaged. A key that is missing is no damage: a checkpoint may be of another version.

    Args:
        owner: The class of the callback, for messages.
        state: What the checkpoint holds.
        layouts: What its values should be, by key.

    Raises:
        ValueError: A value is something else.

    Example:
        >>> check_state("MyCallback", {"steps": [3, -1]}, {"steps": [COUNT]})
        Traceback (most recent call last):
        ...
        ValueError: MyCallback: `steps[1]` in the checkpoint should be an integer of at least 0, got -1.
    """
    for key, layout in layouts.items():
        for path, expected, value in _invalid(state[key], layout, key) if key in state else ():
            raise ValueError(f"{owner}: `{path}` in the checkpoint should be {expected}, got {value!r}.")


def _invalid(value: Any, layout: Layout, path: str) -> Iterator[tuple[str, str, Any]]:
    """The places of a value that do not have its layout: where, what is expected there, and what stands there."""
    if isinstance(layout, Value):
        if not layout.is_valid(value):
            yield path, layout.expected, value
    elif isinstance(layout, list):
        if not isinstance(value, list):
            yield path, "a list", value
            return
        for i, each in enumerate(value):
            yield from _invalid(each, layout[0], f"{path}[{i}]")
    elif not isinstance(value, dict):
        yield path, "a dictionary", value
    else:
        for key, each in value.items():
            inner = layout.get("*", layout.get(key))
            if inner is not None:
                yield from _invalid(each, inner, f"{path}[{key!r}]")
