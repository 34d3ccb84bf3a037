"""When? A schedule turns a position in training into a value: a weight decay, a penalty's strength, a dropout rate.

The value depends on nothing but the position: there is no state to save, and a resumed run continues with the very
numbers of an uninterrupted one. The first step has the start value, the last step the end value, which then holds.
"""

import math
import numbers
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_regularize._checks import is_integer, is_number, quoted_number

__all__ = [
    "Position", "Schedule", "ScheduleLike",
    "Constant", "Linear", "Cosine", "Exponential", "Polynomial",
    "CubicRamp", "Steps", "Join", "Warmup", "FollowLR", "Timescale", "FromLRScheduler",
    "early_dropout", "late_dropout",
    "as_schedule", "check_total_steps", "value_at", "simulate",
]  # fmt: skip

_UNKNOWN_HORIZON = (
    "`total_steps` should be finite where a schedule depends on the fraction of the run, got inf: "
    "the horizon is unknown. Give `total_steps`, or a schedule whose lengths are in steps."
)


@dataclass(frozen=True)
class Position:
    """Where training stands, as an optimizer and one of its parameter groups see it.

    Args:
        step: Optimizer steps attempted so far; 0 at the first step.
        total_steps: Optimizer steps of the whole run; ``math.inf`` where the horizon is unknown.
        epoch: Epochs completed so far.
        lr: The group's learning rate. By default 1, which with ``peak_lr`` 1 is its peak.
        peak_lr: The largest learning rate that the group is to see.
        steps_per_epoch: Optimizer steps of an epoch; ``math.inf`` where it is unknown, as in manual optimization.

    Example:
        >>> Position(step=3, total_steps=13).fraction
        0.25
    """

    step: int
    total_steps: float
    epoch: int = 0
    lr: float = 1.0
    peak_lr: float = 1.0
    steps_per_epoch: float = math.inf

    @property
    def fraction(self) -> float:
        """The part of the run that is done: 0 at the first step, 1 at the last and past it; 0 in a run of one step.

        Raises:
            ValueError: If the horizon is unknown.
        """
        if self.total_steps == math.inf:
            raise ValueError(_UNKNOWN_HORIZON)
        last_step = self.total_steps - 1
        if self.step <= 0 or last_step <= 0:
            return 0.0
        return 1.0 if self.step >= last_step else self.step / last_step


class Schedule(ABC):
    """A pure function of the position that can be printed, compared and pickled: best written as a frozen dataclass.

    Where no more than the function is needed, a plain callable serves as well.

    Example:
        >>> @dataclass(frozen=True)
        ... class Triangle(Schedule):
        ...     peak: float
        ...     needs_total_steps = True
        ...
        ...     def __call__(self, at: Position) -> float:
        ...         return self.peak * (1 - abs(2 * at.fraction - 1))
        >>> simulate(Triangle(peak=0.4), total_steps=5)
        [0.0, 0.2, 0.4, 0.2, 0.0]
    """

    @abstractmethod
    def __call__(self, at: Position) -> float:
        """The value at a position: finite and not negative."""

    @property
    def needs_total_steps(self) -> bool:
        """Whether some value depends on ``total_steps``, so that an unknown horizon is an error."""
        return False


ScheduleLike: TypeAlias = float | Schedule | Callable[[Position], float]


@final
@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    Args:
        value: Finite and not negative.

    Raises:
        ValueError: If the value is negative or not finite; TypeError if it is no number.

    Example:
        >>> simulate(Constant(0.1), total_steps=3)
        [0.1, 0.1, 0.1]
    """

    value: float

    def __post_init__(self) -> None:
        _set_(self, value=_value("value", self.value))

    def __call__(self, at: Position) -> float:
        """The value, wherever training stands."""
        return self.value


@dataclass(frozen=True)
class _Curve(Schedule):
    # From `start` to `end` over the run. Both are exact, and rounding leads no value out of what lies between them.

    start: float
    end: float
    needs_total_steps = True

    def __post_init__(self) -> None:
        _set_(self, start=_value("start", self.start), end=_value("end", self.end))

    def __call__(self, at: Position) -> float:
        """The point of the curve at ``at.fraction``."""
        fraction, start, end = at.fraction, self.start, self.end
        if fraction == 0:
            return start
        if fraction == 1:
            return end
        value = self._inner(fraction)
        low, high = (start, end) if start < end else (end, start)
        return low if value < low else high if value > high else value

    @abstractmethod
    def _inner(self, fraction: float) -> float: ...


@final
@dataclass(frozen=True)
class Linear(_Curve):
    """A straight line over the run: ``start + (end - start) * fraction``.

    Args:
        start: Value of the first step; finite and not negative.
        end: Value of the last step; finite and not negative.

    Raises:
        ValueError: If a value is negative or not finite; TypeError if it is no number.

    Example:
        >>> simulate(Linear(1.0, 0.0), total_steps=5)
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def _inner(self, fraction: float) -> float:
        return self.start + (self.end - self.start) * fraction


@final
@dataclass(frozen=True)
class Cosine(_Curve):
    """Half a cosine over the run, downwards or upwards: ``end + (start - end) * (1 + cos(pi * fraction)) / 2``.

    DINO raises the weight decay from 0.04 to 0.4 in this way. Its ``fraction`` is ``step / total_steps``, which stops
    one step short of ``end``; here the last step has the end value.

    Args:
        start: Value of the first step; finite and not negative.
        end: Value of the last step; finite and not negative.

    Raises:
        ValueError: If a value is negative or not finite; TypeError if it is no number.

    Example:
        >>> [round(value, 3) for value in simulate(Cosine(0.04, 0.4), total_steps=5)]
        [0.04, 0.093, 0.22, 0.347, 0.4]

    References:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv 2104.14294.
    """

    def _inner(self, fraction: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * fraction)) / 2


@final
@dataclass(frozen=True)
class Exponential(_Curve):
    """The same factor at every step: ``start * (end / start) ** fraction``.

    Args:
        start: Value of the first step; finite and positive.
        end: Value of the last step; finite and positive.

    Raises:
        ValueError: If a value is not positive or not finite; TypeError if it is no number.

    Example:
        >>> [round(value, 3) for value in simulate(Exponential(1.0, 0.01), total_steps=3)]
        [1.0, 0.1, 0.01]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 in {self.start, self.end}:
            raise ValueError(f"`start` and `end` should be positive, got {self.start} and {self.end}.")

    def _inner(self, fraction: float) -> float:
        return self.start * math.pow(self.end / self.start, fraction)


@final
@dataclass(frozen=True)
class Polynomial(_Curve):
    """A power of what is left of the run: ``end + (start - end) * (1 - fraction) ** power``.

    Args:
        start: Value of the first step; finite and not negative.
        end: Value of the last step; finite and not negative.
        power: Exponent; finite and positive. 1 is ``Linear``; more moves fast at first, less at last.

    Raises:
        ValueError: If a number is negative or not finite, or ``power`` is 0; TypeError if it is no number.

    Example:
        >>> simulate(Polynomial(1.0, 0.0, power=2), total_steps=5)
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """

    power: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_(self, power=_value("power", self.power))
        if self.power == 0:
            raise ValueError(f"`power` should be positive, got {self.power}.")

    def _inner(self, fraction: float) -> float:
        return self.end + (self.start - self.end) * math.pow(1 - fraction, self.power)


@final
@dataclass(frozen=True)
class Steps(Schedule):
    """A staircase: ``values[0]`` at first, ``values[i]`` from ``boundaries[i - 1]`` on.

    Args:
        values: Finite and not negative; one more than there are boundaries.
        boundaries: Strictly increasing. An integer is a step, a float in [0, 1] a fraction of the run, rounded to a
            step: ``1`` is the second step, ``1.0`` the end. Where both occur, a call compares them.

    Raises:
        ValueError: If a number is out of range, the lengths do not fit or the boundaries do not increase;
            TypeError if an argument is no sequence of numbers.

    Example:
        >>> simulate(Steps([0.5, 0.1], boundaries=[0.75]), total_steps=4)
        [0.5, 0.5, 0.5, 0.1]
    """

    values: Sequence[float]
    boundaries: Sequence[int | float]
    _units: tuple[type, ...] = field(init=False, repr=False)  # for `==`: 1 equals 1.0, a step not the whole run

    def __post_init__(self) -> None:
        values = tuple(_value("values", value) for value in _tuple("values", self.values))
        boundaries = _boundaries(self.boundaries, "values", len(values))
        _set_(self, values=values, boundaries=boundaries, _units=tuple(map(type, boundaries)))

    @property
    def needs_total_steps(self) -> bool:
        """Whether a boundary is a fraction of the run."""
        return float in self._units

    def __call__(self, at: Position) -> float:
        """The value of the stair on which the step lies."""
        return self.values[bisect_right(_in_steps(self.boundaries, at.total_steps), _held_step(at))]


@final
@dataclass(frozen=True)
class Join(Schedule):
    """One schedule after another, each over its own piece of the run as if that were a run of its own.

    Inside a piece the step counts from its beginning and ``total_steps`` is its length, so that ``fraction`` is 0 at
    its first step and 1 at its last. Epoch and learning rate stay those of the run. A configuration of Hydra that lists
    schedules needs ``_convert_: all`` beside ``_target_``, or Hydra turns them into dictionaries.

    Args:
        schedules: Numbers, schedules or callables; one more than there are boundaries.
        boundaries: Where the second and later pieces begin, in the units of ``Steps``.

    Raises:
        ValueError: As in ``Steps``; TypeError if an element is no schedule or no boundary.

    Example:
        >>> simulate(Join([Linear(0.0, 1.0), 0.5], boundaries=[3]), total_steps=5)
        [0.0, 0.5, 1.0, 0.5, 0.5]
    """

    schedules: Sequence[ScheduleLike]
    boundaries: Sequence[int | float]
    _units: tuple[type, ...] = field(init=False, repr=False)  # for `==`: 1 equals 1.0, a step not the whole run

    def __post_init__(self) -> None:
        schedules = tuple(as_schedule(schedule, name="schedules") for schedule in _tuple("schedules", self.schedules))
        boundaries = _boundaries(self.boundaries, "schedules", len(schedules))
        _set_(self, schedules=schedules, boundaries=boundaries, _units=tuple(map(type, boundaries)))

    @property
    def needs_total_steps(self) -> bool:
        """Whether a boundary is a fraction of the run, or the last piece needs to know where it ends."""
        return float in self._units or _needs_total_steps(self.schedules[-1])

    def __call__(self, at: Position) -> float:
        """The value of the piece in which the step lies."""
        step = _held_step(at)
        boundaries = _in_steps(self.boundaries, at.total_steps)
        piece = bisect_right(boundaries, step)
        begin, end = [0, *boundaries][piece], [*boundaries, at.total_steps][piece]
        return value_at(self.schedules[piece], replace(at, step=step - begin, total_steps=end - begin))


@final
@dataclass(frozen=True)
class CubicRamp(Schedule):
    """From ``start`` to ``end``, fast at first and slowly at last: the ramp of gradual pruning.

    Between ``begin`` and ``until`` it is ``end + (start - end) * (1 - f) ** 3`` with ``f`` from 0 to 1, before and
    after that it is constant. For the share of weights that are kept, ``CubicRamp(1.0, 0.1)`` ends at 90 % zeros.

    Args:
        start: The value up to ``begin``; finite and not negative.
        end: The value from ``until`` on; finite and not negative.
        begin: Where the ramp begins, in the units of ``Steps``: an integer is a step, a float in [0, 1] a fraction of
            the run.
        until: Where it ends, likewise.

    Raises:
        ValueError: If a number is out of range, or ``begin`` is not before ``until``; TypeError if it is no number.

    Example:
        >>> [round(value, 3) for value in simulate(CubicRamp(1.0, 0.2, until=4), total_steps=6)]
        [1.0, 0.437, 0.23, 0.2, 0.2, 0.2]

    References:
        Zhu and Gupta, "To Prune, or Not to Prune", 2017, arXiv 1710.01878.
    """

    start: float
    end: float
    begin: int | float = 0
    until: int | float = 1.0
    _pieces: Join = field(init=False, repr=False)  # for `==`: 1 equals 1.0, a step not the whole run

    def __post_init__(self) -> None:
        _set_(self, start=_value("start", self.start), end=_value("end", self.end))
        ramp = Polynomial(self.start, self.end, power=3)
        try:
            pieces = Join([self.start, ramp, self.end], boundaries=[self.begin, self.until])
        except (TypeError, ValueError) as error:
            found = f"got {self.begin!r} and {self.until!r}"
            raise type(error)(
                f"`begin` and `until` should be steps or fractions, in this order, {found}: {error}"
            ) from error
        _set_(self, _pieces=pieces)

    @property
    def needs_total_steps(self) -> bool:
        """Whether an end of the ramp is a fraction of the run."""
        return float in map(type, self._pieces.boundaries)

    def __call__(self, at: Position) -> float:
        """The point of the ramp."""
        return self._pieces(at)


@final
@dataclass(frozen=True)
class Warmup(Schedule):
    """A straight line to the first value of a schedule, which then has the rest of the run for itself.

    Args:
        schedule: A number, schedule or callable. It begins where the warm-up ends, with the steps that remain as its
            ``total_steps``. During the warm-up its first value is read at the current learning rate.
        steps: Length of the warm-up in optimizer steps: step ``steps`` is the first of ``schedule``. 0 is no warm-up.
        fraction: The same as a fraction of the run, in [0, 1]. Exactly one of the two should be given.
        start: Value of the first step; finite and not negative. By default 0.

    Raises:
        ValueError: If a number is out of range, or not exactly one of ``steps`` and ``fraction`` is given;
            TypeError if an argument has the wrong type.

    Example:
        >>> simulate(Warmup(Linear(1.0, 0.0), steps=2), total_steps=7)
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    schedule: ScheduleLike
    steps: int | None = None
    fraction: float | None = None
    start: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.fraction is None):
            raise ValueError(f"Either `steps` or `fraction` should be given, got {self.steps} and {self.fraction}.")
        if self.steps is not None:
            _set_(self, steps=_integer("steps", self.steps, at_least=0))
        if self.fraction is not None:
            _set_(self, fraction=_fraction("fraction", self.fraction))
        _set_(self, schedule=as_schedule(self.schedule, name="schedule"), start=_value("start", self.start))

    @property
    def needs_total_steps(self) -> bool:
        """Whether the warm-up is a fraction of the run, or the schedule needs to know where the run ends."""
        return self.fraction is not None or _needs_total_steps(self.schedule)

    def __call__(self, at: Position) -> float:
        """The point of the line, and after it the value of the schedule."""
        step = _held_step(at)
        (length,) = _in_steps([end for end in (self.steps, self.fraction) if end is not None], at.total_steps)
        # A warm-up over the whole run leaves a run of one step. It is never reached; its value is where the line ends.
        rest = replace(at, step=max(step - length, 0), total_steps=max(at.total_steps - length, 1))
        value = value_at(self.schedule, rest)
        return value if step >= length else self.start + (value - self.start) * step / length


@final
@dataclass(frozen=True)
class FollowLR(Schedule):
    """A value tied to the learning rate: ``value * lr / peak_lr``, and 0 where the peak is 0.

    As the weight decay of a normalized layer under AdamW this is AdamC: the group's weight decay is
    ``lam * eta_t / eta_max``, so that a step shrinks the weight by ``lam * eta_t**2 / eta_max``, and gradient norms no
    longer grow as the learning rate falls.

    Args:
        value: Value at the peak of the learning rate; finite and not negative.

    Raises:
        ValueError: If the value is negative or not finite; TypeError if it is no number.

    Example:
        >>> simulate(FollowLR(0.5), total_steps=4, lr=[0.0, 4e-3, 2e-3, 1e-3])
        [0.0, 0.5, 0.25, 0.125]

    References:
        Defazio, "Why Gradients Rapidly Increase Near the End of Training", 2025, arXiv 2506.02285.
    """

    value: float

    def __post_init__(self) -> None:
        _set_(self, value=_value("value", self.value))

    def __call__(self, at: Position) -> float:
        """The value that belongs to ``at.lr``."""
        return self.value * (at.lr / at.peak_lr) if at.peak_lr else 0.0


@final
@dataclass(frozen=True)
class Timescale(Schedule):
    r"""The weight decay that makes weights remember the updates of a given time, at the peak of the learning rate.

    .. math:: \lambda = \frac{s(k)}{\eta_\mathrm{max} \, \tau}

    Under decoupled weight decay (AdamW, Lion, Muon; with plain SGD also its own) weights are an average of past
    updates, in which an update that is :math:`\tau` steps old has :math:`1/e` of the weight of a new one. The best
    :math:`\tau`, counted in epochs, hardly changes with batch size, model and data, where the best :math:`\lambda`
    does. With ``WeightDecay(method="independent")``, which decays whatever the learning rate, it is an error.

    Args:
        epochs: :math:`\tau` in epochs; positive and finite.
        steps: In optimizer steps.
        fraction: In runs: 0.1 is a tenth of the run. Exactly one of the three should be given.
        schedule: A number, schedule or callable :math:`s` that the value is multiplied by, such as ``Cosine(1, 0)``; by
            default 1.

    Raises:
        ValueError: If a number is out of range, or not exactly one of the first three is given; TypeError if an
            argument has the wrong type. When called, ValueError where an epoch has no known number of steps.

    Example:
        >>> simulate(Timescale(epochs=2), total_steps=3, steps_per_epoch=50, lr=1e-3)
        [10.0, 10.0, 10.0]
        >>> simulate(Timescale(steps=100, schedule=Linear(1, 0)), total_steps=3, lr=[1e-3, 2e-3, 1e-3])
        [5.0, 2.5, 0.0]

    References:
        Wang and Aitchison, "How to set AdamW's weight decay as you scale model and dataset size", ICML 2025,
        arXiv 2405.13698; Bergsma et al., "Power Lines: Scaling Laws for Weight Decay and Batch Size in LLM
        Pre-training", 2025, arXiv 2505.13738.
    """

    epochs: float | None = None
    steps: float | None = None
    fraction: float | None = None
    schedule: ScheduleLike | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("epochs", "steps", "fraction")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Exactly one of `epochs`, `steps` and `fraction` should be given, got {given or 'none'}.")
        for name, value in given.items():
            if not _value(name, value):
                raise ValueError(f"`{name}` should be positive, got {value!r}.")
        if self.schedule is not None:
            _set_(self, schedule=as_schedule(self.schedule, name="schedule"))

    @property
    def needs_total_steps(self) -> bool:
        """Whether the time is a fraction of the run, or the schedule needs to know where the run ends."""
        return self.fraction is not None or (self.schedule is not None and _needs_total_steps(self.schedule))

    def __call__(self, at: Position) -> float:
        """The weight decay at ``at.peak_lr``, times the value of the schedule; 0 where the peak is 0.

        Raises:
            ValueError: If it is not known how many steps an epoch, or the run, has.
        """
        steps = self.in_steps(at)
        value = 1.0 if self.schedule is None else value_at(self.schedule, at)
        return value / (at.peak_lr * steps) if at.peak_lr else 0.0

    def in_steps(self, at: Position) -> float:
        """The time in optimizer steps.

        Args:
            at: A position of the run, of which the numbers of steps count.

        Raises:
            ValueError: If it is not known how many steps an epoch, or the run, has.
        """
        units = ((self.epochs, at.steps_per_epoch), (self.steps, 1), (self.fraction, at.total_steps))
        (steps,) = [length * unit for length, unit in units if length is not None]
        if math.isinf(steps):
            raise ValueError(f"{self!r} needs to know how many steps an epoch or the run has: give `steps` instead.")
        return steps


class _Replay:
    # A throw-away optimizer whose learning rate a scheduler drives, forward only.

    def __init__(self, factory: Callable[[Optimizer], LRScheduler], value: float) -> None:
        self.optimizer = SGD([torch.zeros((), device="cpu")], lr=value)
        try:
            self.scheduler = factory(self.optimizer)
        except TypeError as error:
            name = getattr(factory, "__name__", "StepLR")
            raise TypeError(
                f"`factory` should make a scheduler of an optimizer alone, and failed: {error}. Give it the rest, "
                f"as in functools.partial({name}, ...)."
            ) from error
        self.steps = 0
        if not isinstance(self.scheduler, LRScheduler) or isinstance(self.scheduler, ReduceLROnPlateau):
            found = type(self.scheduler).__name__
            raise TypeError(f"`factory` should return a torch LRScheduler that needs no metric, got a {found}.")
        self.optimizer.step()  # no gradient, no effect, but torch warns of a scheduler that steps before its optimizer

    def lr_after(self, steps: int) -> float:
        while self.steps < steps:
            self.scheduler.step()
            self.steps += 1
        return float(self.optimizer.param_groups[0]["lr"])


@final
@dataclass(frozen=True)
class FromLRScheduler(Schedule):
    """Any torch LR scheduler, driving this value instead of a learning rate.

    The value at step k is the learning rate of a throw-away optimizer after k scheduler steps. Each step forward costs
    one scheduler step, a step back begins anew. The scheduler brings its own horizon (``T_max``, ``total_iters``).

    Args:
        factory: Makes the scheduler for an optimizer. A ``functools.partial`` of a scheduler class can be pickled, a
            lambda not.
        value: Learning rate of the throw-away optimizer; finite and not negative. By default 1, so that the
            scheduler's factors are the values. ``OneCycleLR`` and ``CyclicLR`` write their own over it.

    Raises:
        ValueError: If ``value`` is negative or not finite; TypeError if it is no number, or if ``factory`` does not
            return an LR scheduler or returns one that needs a metric.

    Example:
        >>> from torch.optim.lr_scheduler import StepLR
        >>> halved = FromLRScheduler(lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5), value=0.4)
        >>> simulate(halved, total_steps=5)
        [0.4, 0.4, 0.2, 0.2, 0.1]
    """

    factory: Callable[[Optimizer], LRScheduler]
    value: float = field(default=1.0, kw_only=True)
    _replay: _Replay | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.factory):
            raise TypeError(
                f"`factory` should be a callable that takes an optimizer, got {self.factory!r}."
                + _of_torch_scheduler(self.factory)
            )
        value = _value("value", self.value)
        _set_(self, value=value, _replay=_Replay(self.factory, value))

    def __call__(self, at: Position) -> float:
        """The learning rate after ``at.step`` scheduler steps."""
        step = _held_step(at)
        replay = self._replay
        if replay is None or step < replay.steps:
            replay = _Replay(self.factory, self.value)
            _set_(self, _replay=replay)
        return replay.lr_after(step)

    def __getstate__(self) -> dict[str, object]:
        return {"factory": self.factory, "value": self.value}


def early_dropout(p: float, until: int | float = 1 / 6) -> Schedule:
    """Dropout against underfitting: ``p`` at the first step, linearly down to 0 at ``until``, then none.

    Args:
        p: The first rate, in [0, 1).
        until: Where it ends: an integer is a step, a float in [0, 1] a fraction of the run. By default 50 of 300
            epochs, as in the paper.

    Returns:
        A schedule.

    Raises:
        ValueError: If ``p`` is not in [0, 1), or ``until`` is out of range; TypeError if one is no number.

    Example:
        >>> simulate(early_dropout(0.5, until=3), total_steps=5)
        [0.5, 0.25, 0.0, 0.0, 0.0]

    References:
        Liu et al., "Dropout Reduces Underfitting", ICML 2023, arXiv 2303.01500.
    """
    return Join([Linear(_rate(p), 0.0), 0.0], boundaries=[until])


def late_dropout(p: float, start: int | float = 1 / 6) -> Schedule:
    """Dropout against overfitting that leaves the first steps alone: none until ``start``, and ``p`` from there on.

    Args:
        p: The rate, in [0, 1).
        start: The first step with dropout: an integer is a step, a float in [0, 1] a fraction of the run. By default
            50 of 300 epochs, as in the paper.

    Returns:
        A schedule.

    Raises:
        ValueError: If ``p`` is not in [0, 1), or ``start`` is out of range; TypeError if one is no number.

    Example:
        >>> simulate(late_dropout(0.5, start=3), total_steps=5)
        [0.0, 0.0, 0.0, 0.5, 0.5]

    References:
        Liu et al., "Dropout Reduces Underfitting", ICML 2023, arXiv 2303.01500.
    """
    return Steps([0.0, _rate(p)], boundaries=[start])


def as_schedule(value: ScheduleLike, *, name: str = "value") -> Schedule | Callable[[Position], float]:
    """Turn a number into a ``Constant``, and leave a schedule or another callable as it is.

    Args:
        value: A number as ``Constant`` takes it, a schedule, or a callable that takes a ``Position``.
        name: Of the argument, for messages.

    Returns:
        What can be called with a ``Position``.

    Raises:
        TypeError: If ``value`` is something else, such as a class.
        ValueError: If it is a number that is negative or not finite.

    Example:
        >>> as_schedule(0.1)
        Constant(value=0.1)
    """
    if callable(value) and not isinstance(value, type):
        return value
    if is_number(value):
        return Constant(_value(name, value))
    message = f"`{name}` should be a number, a `Schedule` or a callable of a `Position`, got {value!r}."
    raise TypeError(message + _instead_of(value))


def value_at(schedule: ScheduleLike, at: Position) -> float:
    """Read a schedule at a position, and make sure that it gave a number one can train with.

    Args:
        schedule: A number, schedule or callable.
        at: The position.

    Returns:
        The value; finite and not negative.

    Raises:
        ValueError: If the schedule gives no number, or one that is negative or not finite.
        TypeError: If ``schedule`` is something else, or does not take a position.

    Example:
        >>> value_at(lambda at: 1 / (1 + at.step), Position(step=3, total_steps=math.inf))
        0.25
    """
    function = as_schedule(schedule)
    try:
        value: object = function(at)
    except TypeError as error:
        if isinstance(function, Schedule):
            raise
        raise TypeError(
            f"{schedule!r} should take a `Position`, and failed with one: {error}. Of the step write "
            "`lambda at: ... at.step ...`, of the part of the run that is done `at.fraction`."
        ) from error
    if type(value) is float and 0 <= value < math.inf:
        return value
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{schedule!r} should give a finite number that is not negative, got {value!r} at {at!r}.")
    return float(value)


def simulate(
    schedule: ScheduleLike,
    total_steps: int,
    *,
    steps_per_epoch: int | None = None,
    lr: float | Sequence[float] | Callable[[int], float] = 1.0,
) -> list[float]:
    """List the value at every step of a run, without the run: to look at, to plot, to test.

    Args:
        schedule: A number, schedule or callable.
        total_steps: Optimizer steps of the run; at least 1.
        steps_per_epoch: Optimizer steps of an epoch; at least 1. By default the run is one epoch.
        lr: The learning rate: a number, one number per step, or a callable that takes the step; the largest is the
            peak. By default 1, as in ``Position``.

    Returns:
        ``total_steps`` values.

    Raises:
        ValueError: If ``lr`` has another length.
        TypeError: If ``lr`` is a schedule, which is no function of the step.

    Example:
        >>> simulate(lambda at: 0.1 * at.epoch, total_steps=6, steps_per_epoch=2)
        [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    """
    steps = range(_integer("total_steps", total_steps, at_least=1))
    epoch_steps = len(steps) if steps_per_epoch is None else _integer("steps_per_epoch", steps_per_epoch, at_least=1)
    if isinstance(lr, Schedule):
        raise TypeError(
            f"`lr` should be a number, one number per step or a function of the step, got {lr!r}: a schedule is a "
            "function of a `Position`. Give `simulate(schedule, total_steps)`."
        )
    per_step = map(lr, steps) if callable(lr) else [lr] * len(steps) if is_number(lr) else lr
    lrs = [_value("lr", value) for value in _tuple("lr", per_step)]
    if len(lrs) != len(steps):
        raise ValueError(f"`lr` should have one element for each of the {len(steps)} steps, got {len(lrs)}.")
    peak_lr = max(lrs)
    positions = (Position(step, len(steps), step // epoch_steps, lrs[step], peak_lr, epoch_steps) for step in steps)
    return [value_at(schedule, at) for at in positions]


def check_total_steps(total_steps: int | None) -> int | None:
    """Refuse what is not a number of steps; None leaves it to the training loop.

    Args:
        total_steps: What was given.

    Returns:
        The same; numbers of numpy become Python's.

    Raises:
        ValueError: If it is not a positive integer.

    Example:
        >>> check_total_steps(100)
        100
    """
    if total_steps is None or (is_integer(total_steps) and total_steps > 0):
        return None if total_steps is None else int(total_steps)
    given: Any = total_steps
    instead = f" Write {int(given)}." if isinstance(given, float) and given > 0 and given.is_integer() else ""
    raise ValueError(f"`total_steps` should be a positive integer or None, got {given!r}.{instead}")


def _instead_of(value: object) -> str:
    """What to write instead of something that is often taken for a schedule, if it is known."""
    if isinstance(value, Mapping):
        return (
            " Hydra makes a dictionary of a schedule in a list: write `_convert_: all` beside the `_target_` that has "
            "the list. Elsewhere a schedule is made by its class."
        )
    if isinstance(value, type) and issubclass(value, Schedule):
        return f" A class is not a schedule yet: write {value.__name__}(...), with its values."
    return _of_torch_scheduler(value) or quoted_number(value)


def _of_torch_scheduler(value: object) -> str:
    kind = value if isinstance(value, type) else type(value)
    if not issubclass(kind, LRScheduler):
        return ""
    return f" Of a torch scheduler write FromLRScheduler(functools.partial({kind.__name__}, ...))."


def timescales_in(schedule: object) -> list[Timescale]:
    """The :class:`Timescale` that a schedule is, or that it is made of.

    Example:
        >>> timescales_in(Warmup(Timescale(steps=10), steps=3))
        [Timescale(epochs=None, steps=10, fraction=None, schedule=None)]
    """
    if isinstance(schedule, Timescale):
        return [schedule]
    parts = [getattr(schedule, "schedule", None), *getattr(schedule, "schedules", ())]
    return [found for part in parts if part is not None for found in timescales_in(part)]


def depends_on_step_alone(schedule: object) -> bool:
    """Whether the values are known ahead: they depend on ``step`` and ``total_steps``, and not on rates or epochs.

    Example:
        >>> depends_on_step_alone(Warmup(Cosine(1, 0), steps=3)), depends_on_step_alone(Warmup(FollowLR(1), steps=3))
        (True, False)
    """
    if type(schedule) is Join:
        return all(map(depends_on_step_alone, schedule.schedules))
    if type(schedule) is Warmup:
        return depends_on_step_alone(schedule.schedule)
    # Not `isinstance`: a subclass of the user's may look at anything.
    by_step = (CubicRamp, Constant, Linear, Cosine, Exponential, Polynomial, Steps)
    return type(schedule) in by_step or is_number(schedule)


def _needs_total_steps(schedule: ScheduleLike) -> bool:
    return isinstance(schedule, Schedule) and schedule.needs_total_steps


def _held_step(at: Position) -> int:
    # Past the end the last step's value holds, whatever boundaries or schedulers lie beyond.
    return at.step if at.step < at.total_steps else max(int(at.total_steps) - 1, 0)


def _in_steps(boundaries: Sequence[int | float], total_steps: float) -> list[int]:
    if total_steps == math.inf and float in map(type, boundaries):
        raise ValueError(_UNKNOWN_HORIZON)
    steps = [boundary if isinstance(boundary, int) else round(boundary * total_steps) for boundary in boundaries]
    if steps != sorted(steps):
        raise ValueError(f"`boundaries` should increase, got {boundaries}: of {total_steps} steps these are {steps}.")
    return steps


def _set_(instance: Schedule, **fields: object) -> None:
    # How a frozen dataclass stores what it has checked.
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


def _value(name: str, value: object) -> float:
    message = f"`{name}` should be a finite number that is not negative, got {value!r}."
    if not is_number(value):
        raise TypeError(message + quoted_number(value))
    if not 0 <= value < math.inf:
        raise ValueError(message)
    return float(value)


def _fraction(name: str, value: object) -> float:
    fraction = _value(name, value)
    if fraction > 1:
        instead = f" As a step write the integer {int(fraction)}." if fraction == int(fraction) else ""
        raise ValueError(f"`{name}` should be in [0, 1] as a fraction of the run, got {value!r}.{instead}")
    return fraction


def _rate(p: object) -> float:
    rate = _value("p", p)
    if rate >= 1:
        raise ValueError(f"`p` should be in [0, 1), got {p!r}.")
    return rate


def _integer(name: str, value: object, at_least: int) -> int:
    message = f"`{name}` should be an integer of at least {at_least}, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(message)
    if int(value) < at_least:
        raise ValueError(message)
    return int(value)


def _tuple(name: str, values: object) -> tuple[Any, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"`{name}` should be a sequence, got {values!r}.")
    return tuple(values)


def _boundary(value: object) -> int | float:
    is_step = isinstance(value, numbers.Integral)
    return _integer("boundaries", value, at_least=0) if is_step else _fraction("boundaries", value)


def _boundaries(values: object, pieces_name: str, pieces: int) -> tuple[int | float, ...]:
    boundaries = tuple(map(_boundary, _tuple("boundaries", values)))
    if pieces != len(boundaries) + 1:
        found = f"{pieces} and {len(boundaries)}"
        raise ValueError(f"`{pieces_name}` should have one element more than `boundaries`, got {found}.")
    for unit in (int, float):
        comparable = [boundary for boundary in boundaries if isinstance(boundary, unit)]
        if comparable != sorted(set(comparable)):
            raise ValueError(f"`boundaries` should be strictly increasing, got {boundaries}.")
    return boundaries
