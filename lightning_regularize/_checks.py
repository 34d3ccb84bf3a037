"""Is an argument a number, and in range? Is a value of a class that is known by name? Who refuses it?"""

from __future__ import annotations

import contextlib
import math
import numbers
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_is_number(name: str, value: object) -> None:
    """Refuse an argument that is no number.

    Raises:
        TypeError: ``value`` is not a number. Booleans do not count as numbers.
    """
    if not is_number(value):
        raise TypeError(f"`{name}` should be a number, got {value!r}.{quoted_number(value)}")


def quoted_number(value: object) -> str:
    """What to write instead of a text that is a number, for messages; otherwise nothing.

    Example:
        >>> quoted_number("1e-4"), quoted_number("adam")
        (' Write 0.0001 without quotes; in YAML 1.0e-4, since 1e-4 is a text there.', '')
    """
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    yaml = "; in YAML 1.0e-4, since 1e-4 is a text there" if "e" in str(value).lower() else ""
    return f" Write {number:g} without quotes{yaml}."


def is_number(value: object) -> TypeGuard[float]:
    """Is it a real number, of Python or numpy? Booleans do not count as numbers."""
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def is_integer(value: object) -> TypeGuard[int]:
    """Is it an integer, of Python or numpy? Booleans do not count as integers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(value: object, what: str) -> float:
    """Refuse what is not a finite number of at least 0; numbers of numpy become Python's, which checkpoints can hold.

    Raises:
        TypeError: ``value`` is no number.
        ValueError: ``value`` is negative, infinite or NaN.
    """
    if not is_number(value):
        raise TypeError(f"{what} should be a number, got {value!r}.{quoted_number(value)}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{what} should be finite and at least 0, got {value!r}.")
    return value if isinstance(value, int) else float(value)


def check_positive_integer(value: object, what: str) -> int:
    """Refuse what is not an integer of at least 1; those of numpy become Python's.

    Raises:
        ValueError: ``value`` is something else.
    """
    if not is_integer(value) or value < 1:
        raise ValueError(f"{what} should be a positive integer, got {value!r}.")
    return int(value)


def check_rounding(rounding: object, seed: object) -> None:
    """Refuse what is not a way of rounding, or not the seed of one.

    Raises:
        ValueError: It is something else.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"`rounding` should be 'nearest' or 'stochastic', got {rounding!r}.")
    if not is_integer(seed) or seed < 0:
        raise ValueError(f"`seed` should be an integer of at least 0, got {seed!r}.")


def check_layer_decay(layer_decay: object) -> None:
    """Refuse what is not a number in (0, 1].

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    if not 0 < check_number(layer_decay, "`layer_decay`") <= 1:
        raise ValueError(f"`layer_decay` should be in (0, 1], got {layer_decay!r}.")


def name_of(function: Any) -> str:
    """The name of a function, of a partial one that of the whole, and of an object that of its class.

    Example:
        >>> name_of(math.sqrt)
        'sqrt'
    """
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def is_named(thing: object, *names: str) -> bool:
    """Does the class of ``thing``, or one of its bases, have one of these names?

    Example:
        >>> is_named(True, "int"), is_named(True, "float")
        (True, False)
    """
    return any(cls.__name__ in names for cls in type(thing).__mro__)


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Errors begin with the name of the class, as the user knows it: a Trainer has several callbacks.

    Raises:
        TypeError: Instead of one.
        ValueError: Instead of one.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith(name):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error
