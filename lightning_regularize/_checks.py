"""What is a number?"""

from __future__ import annotations

import numbers
from typing import TypeGuard


def check_is_number(name: str, value: object) -> None:
    """Refuse an argument that is no number.

    Raises:
        TypeError: It is none.
    """
    if not is_number(value):
        raise TypeError(f"`{name}` should be a number, got {value!r}.")


def is_number(value: object) -> TypeGuard[float]:
    """Is it a real number, of Python or numpy? A boolean is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
