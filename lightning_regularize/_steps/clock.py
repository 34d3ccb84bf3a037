"""Where does training stand, as an optimizer and one of its groups see it?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from torch import Tensor

from lightning_regularize._checks import named_errors
from lightning_regularize._steps.hooks import UnsupportedOptimizerError
from lightning_regularize.schedules import Position, depends_on_step_alone, value_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning_regularize.schedules import ScheduleLike


_STEPS_AHEAD = 64


class _Ahead(NamedTuple):
    """The values of a schedule in the steps to come, empty if they depend on more than the step."""

    schedule: ScheduleLike  # kept, so that its identity is not used twice
    total_steps: float
    first: int
    values: Sequence[float]


class Clock:
    """Positions in a run, and what schedules say at them.

    Args:
        total_steps: Steps of each optimizer in the whole run; infinite if unknown.
        owner: The class whose schedules are read, with which messages begin.
    """

    def __init__(self, total_steps: float = math.inf, owner: str = "") -> None:
        self.total_steps = total_steps
        self._owner = owner
        self.epoch = 0
        """The number of epochs that are complete; the training loop keeps it."""
        self.steps_per_epoch = math.inf
        """Steps of each optimizer in an epoch; infinite if unknown."""
        self.warn_of_peak: Callable[[str], None] = _say_nothing
        """Called once, when a learning rate rises above what counted as its peak, and a schedule follows it."""
        # By the identity of a group's first parameter. (A WeakTensorKeyDictionary takes ten times as long.)
        self._peaks: dict[int, tuple[ref[Tensor], float]] = {}
        self._ahead: dict[int, _Ahead] = {}  # by the identity of a schedule

    def note_rates(self, optimizers: Iterable[Any]) -> None:
        """Remember the learning rates as possible peaks, before a checkpoint replaces them."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                self._peak(group)

    def peaks(self, optimizers: Iterable[Any]) -> list[list[float]]:
        """The peak of each group's learning rate, for :meth:`restore_peaks` in a run that goes on."""
        return [[self._peak(group) for group in optimizer.param_groups] for optimizer in optimizers]

    def restore_peaks(self, optimizers: Iterable[Any], saved: Sequence[Sequence[float]]) -> None:
        """Remember the peaks from a checkpoint, if there are as many groups."""
        for optimizer, peaks in zip(optimizers, saved, strict=False):
            for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                if len(peaks) == len(optimizer.param_groups) and group["params"]:
                    first = group["params"][0]
                    self._peaks[id(first)] = ref(first), max(peak, self._peak(group))

    def position(self, group: dict[str, Any], step: int) -> Position:
        """Where training stands for ``group`` in a step; rates are NaN where the optimizer finds its own."""
        lr = group.get("lr", 1.0)
        if lr is None:
            return Position(step, self.total_steps, self.epoch, math.nan, math.nan, self.steps_per_epoch)
        return Position(step, self.total_steps, self.epoch, float(lr), self._peak(group), self.steps_per_epoch)

    def value(self, schedule: ScheduleLike, group: dict[str, Any], step: int) -> float:
        """The value of ``schedule`` for ``group`` in step number ``step``.

        Raises:
            UnsupportedOptimizerError: The schedule follows the learning rate, and the optimizer chooses that by itself.
            TypeError: The schedule is a function of something else than a position.
            ValueError: The schedule gives no number that one can train with.
        """
        ahead = self._ahead.get(id(schedule))
        is_known = ahead is not None and ahead.total_steps == self.total_steps
        if ahead is not None and is_known and 0 <= step - ahead.first < len(ahead.values):
            return ahead.values[step - ahead.first]
        with named_errors(self._owner):
            if ahead is None or not is_known or ahead.values:
                ahead = self._look_ahead(schedule, step)
            return ahead.values[0] if ahead.values else self._value_now(schedule, group, step)

    def _value_now(self, schedule: ScheduleLike, group: dict[str, Any], step: int) -> float:
        """As :meth:`value`, of a schedule that depends on more than the step.

        Raises:
            UnsupportedOptimizerError: As there.
            ValueError: As there.
        """
        before = self._known_peak(group)
        at = self.position(group, step)
        try:
            value = value_at(schedule, at)
            # LinearLR multiplies step by step, and ends a rounding error above the rate that it warms up to.
            has_risen = 0 < before < at.peak_lr and not math.isclose(before, at.peak_lr, rel_tol=1e-6)
            if step and has_risen and value_at(schedule, replace(at, peak_lr=before)) != value:
                self.warn_of_peak(
                    f"{schedule!r} follows the learning rate, which has risen to {at.peak_lr:g}. Its largest value "
                    f"before, {before:g}, counted as the peak; from now on {at.peak_lr:g} does."
                )
                self.warn_of_peak = _say_nothing
            return value
        except ValueError as error:
            if not math.isnan(at.lr):
                raise
            raise UnsupportedOptimizerError(
                f"{schedule!r} needs a learning rate, and a parameter group has lr=None: the optimizer chooses its "
                "rate by itself. Use a schedule that does not follow the rate."
            ) from error

    def _look_ahead(self, schedule: ScheduleLike, step: int) -> _Ahead:
        """Read many steps at once: in the midst of a step the code of a schedule is in no cache, and takes 30 us."""
        values = []
        if depends_on_step_alone(schedule):
            values = [value_at(schedule, Position(step + i, self.total_steps)) for i in range(_STEPS_AHEAD)]
        self._ahead[id(schedule)] = ahead = _Ahead(schedule, self.total_steps, step, values)
        return ahead

    def _known_peak(self, group: dict[str, Any]) -> float:
        """The largest rate that the group was seen to have; 0 if it is new."""
        known = self._peaks.get(id(group["params"][0])) if group["params"] else None
        return known[1] if known is not None and known[0]() is group["params"][0] else 0.0

    def _peak(self, group: dict[str, Any]) -> float:
        """The largest rate that the group is known to have had, or, with a cycling scheduler, is going to have."""
        lr = group.get("lr", 1.0)
        # Cycling schedulers write their peak into the group, others the rate that they began with.
        peak = float(group.get("max_lr", group.get("initial_lr", 0.0)) or 0.0)
        if not group["params"] or lr is None:
            return max(peak, float(lr or 0.0))
        first: Tensor = group["params"][0]
        before = self._known_peak(group)
        peak = max(peak, float(lr), before)
        if peak != before:
            self._peaks[id(first)] = ref(first), peak
        return peak


def _say_nothing(message: str) -> None:
    """Nobody asked to be warned."""


def rate_of(optimizer: Any, group: dict[str, Any]) -> float | Tensor:
    """The learning rate of a group, see :func:`as_rate`.

    Raises:
        UnsupportedOptimizerError: The optimizer chooses its rate by itself.
    """
    lr = group.get("lr")
    if lr is None:
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} has lr=None and chooses its learning rate by itself, which is needed here: "
            "give it a rate, or use a method that needs none."
        )
    return as_rate(lr)


def as_rate(lr: Any) -> float | Tensor:
    """A learning rate to compute with; a tensor, to which torch allows any shape with one element, is not read."""
    return lr.squeeze() if isinstance(lr, Tensor) else float(lr)
