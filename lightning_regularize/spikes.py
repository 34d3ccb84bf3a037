"""How unusual is a value beside those before it?"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WINDOW = 128
"""Values that a score looks back at."""

FEWEST = 16
"""Values that there should be for a score: of fewer, the standard deviation is itself a guess."""


def spike_score(value: float, before: Iterable[float]) -> float | None:
    r"""By how many standard deviations a value lies above the mean of those before it.

    .. math:: (x - \bar x) / s, \quad s^2 = \frac1n \sum_i (x_i - \bar x)^2

    Args:
        value: :math:`x`.
        before: The finite values :math:`x_i` before it.

    Returns:
        None if there are fewer than 16, if they are all the same, or if ``value`` is not finite.

    Example:
        >>> spike_score(5.0, [1.0, 3.0] * 8)
        3.0
    """
    values = list(before)
    if len(values) < FEWEST or min(values) == max(values) or not math.isfinite(value):
        return None
    mean = math.fsum(values) / len(values)
    deviation = math.hypot(*(each - mean for each in values)) / math.sqrt(len(values))
    return (value - mean) / deviation


class SpikeScores:
    """The scores of values that are known by keys, each beside its own last 128 finite values.

    Args:
        values: The last values by key, as :meth:`values` returned them.
    """

    def __init__(self, values: Mapping[str, Iterable[float]]) -> None:
        self._last = {key: deque(each, maxlen=WINDOW) for key, each in values.items()}

    def scores(self, values: Mapping[str, float]) -> dict[str, float]:
        """The scores that there are, as ``<key>/spike_score``; the values count from the next call on."""
        found = {}
        for key, value in values.items():
            last = self._last.setdefault(key, deque(maxlen=WINDOW))
            score = spike_score(value, last)
            if score is not None:
                found[f"{key}/spike_score"] = score
            if math.isfinite(value):
                last.append(value)
        return found

    def values(self) -> dict[str, list[float]]:
        """The last values by key."""
        return {key: list(last) for key, last in self._last.items()}
