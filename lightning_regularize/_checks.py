"""What is a number?"""

from __future__ import annotations

import numbers
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Is it a real number, of Python or numpy? A boolean is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
