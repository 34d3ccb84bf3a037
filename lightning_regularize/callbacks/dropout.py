"""How much is dropped, and when?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.schedules import Constant, Position, Schedule, as_schedule, check_total_steps, value_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.schedules import ScheduleLike

# torch recompiles a compiled model for each value of a rate, at most 8 times by default, and once more for evaluation.
_COMPILED_LEVELS = 4
_SAMPLES = 1000  # positions at which a schedule's range is looked up
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")


class _Rate(NamedTuple):
    """A float attribute of a module that is a dropout rate, and what it was."""

    name: str
    module: nn.Module
    attribute: str
    original: float


class DropoutSchedule(Regularizer):
    """Sets the dropout rate of a module's layers on a schedule while it trains.

    Scheduled are ``p`` of torch's dropout layers and of torchvision's ``StochasticDepth``, ``dropout`` of
    ``MultiheadAttention`` and of recurrent layers with more than one layer, ``drop_prob`` of whatever module has it
    (timm's ``DropPath``), and the ``attributes`` you name. All get the same rate. The original rates come back when
    training ends, by an exception too. Evaluation mode drops nothing and is not concerned. A compiled model is
    recompiled for each rate, so the rate then takes 4 values from the schedule's lowest to its highest. Logged as
    ``dropout/p`` whenever Lightning logs, of several schedules as ``dropout/p 1`` and so on.

    Args:
        p: A rate in [0, 1), a :class:`~lightning_regularize.schedules.Schedule`, or a callable from a
            :class:`~lightning_regularize.schedules.Position` to a rate. See
            :func:`~lightning_regularize.schedules.early_dropout` and
            :func:`~lightning_regularize.schedules.late_dropout` for ready ones.
        include: Which modules: globs on their names (``"encoder.*"``), ``"type:Dropout"`` for a class or one of its
            bases, or module classes.
        attributes: Names of further float attributes that are dropout rates.
        total_steps: Length of the schedule in optimizer steps; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import DropoutSchedule
        >>> from lightning_regularize.schedules import Linear
        >>> trainer = Trainer(callbacks=[DropoutSchedule(Linear(0.5, 0.0))], logger=False, accelerator="cpu")

    References:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.
        Morerio et al., "Curriculum Dropout", ICCV 2017.
        Liu et al., "Dropout Reduces Underfitting", ICML 2023: early and late dropout.
    """

    def __init__(
        self,
        p: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[str | type[nn.Module]] = ("*",),
        attributes: Sequence[str] = (),
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals())
        self.schedule = as_schedule(p, name="p")
        if isinstance(self.schedule, Constant):
            _check_rate(self.schedule.value)
        if not _is_list(include) or not all(isinstance(rule, (str, type)) for rule in include):
            raise TypeError(f"`include` should be a sequence of globs, 'type:Name' or module classes, got {include!r}.")
        if not _is_list(attributes) or not all(isinstance(name, str) for name in attributes):
            raise TypeError(f"`attributes` should be a sequence of names, got {attributes!r}.")
        self.include = tuple(include)
        self.attributes = tuple(attributes)
        self.total_steps = check_total_steps(total_steps)

    @property
    def schedules(self) -> Sequence[ScheduleLike]:
        """The schedule of the rate."""
        return (self.schedule,)

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        self._levels: list[float] = []
        self._rates = list(self._find(run.module))
        if not self._rates:
            raise MisconfigurationException(
                f"There is nothing to drop: no module that matches {self.include} has a dropout rate. "
                "Name a float attribute that is one in `attributes`, or take DropoutSchedule out."
            )
        self._check_all_found()
        for other in run.trainer.callbacks if run.trainer is not None else ():
            if isinstance(other, DropoutSchedule) and other is not self and other.run is not None:
                self._check_not_shared(other)

    def _check_not_shared(self, other: DropoutSchedule) -> None:
        """Of two schedules for one rate the later would win.

        Raises:
            MisconfigurationException: There are two.
        """
        taken = {(id(rate.module), rate.attribute) for rate in other._rates}
        if shared := [r.name for r in self._rates if (id(r.module), r.attribute) in taken]:
            raise MisconfigurationException(
                f"Two DropoutSchedules have the rates of {shared}: let them `include` different modules."
            )

    def _check_all_found(self) -> None:
        """A misspelled rule or attribute finds nothing.

        Raises:
            MisconfigurationException: There is one.
        """
        idle = [rule for rule in self.include if not any(_matches(rule, r.name, r.module) for r in self._rates)]
        absent = [attribute for attribute in self.attributes if all(attribute != r.attribute for r in self._rates)]
        if idle or absent:
            what = f"`include` {idle}" if idle else f"`attributes` {absent}"
            found = [f"{rate.name}.{rate.attribute}" for rate in self._rates]
            raise MisconfigurationException(f"No dropout rate is found by {what}; all that is found is {found}.")

    def begin(self, run: Run) -> None:
        rates = self._sampled_rates(run.clock.total_steps)
        self._levels = self._compiled_levels(rates, run.clock.total_steps) if _is_compiled(run.module) else []
        self._set_rate()

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Before the forward pass, so that it drops at the rate of the step it belongs to."""
        super().on_train_batch_start(trainer, pl_module, *args)
        rate = self._set_rate()
        if self.run.logs_now():
            self.run.log({f"dropout/p{self.number_among(DropoutSchedule)}": rate})

    def after_step(self, step: Step, *, is_real: bool) -> None:
        """Outside a Trainer no hook comes before the next forward pass."""
        if self.run.trainer is None:
            self._set_rate()

    def _set_rate(self) -> float:
        watches = self.run.watches
        step = min((watch.steps for watch in watches), default=0)
        nothing: dict[str, Any] = {"params": []}
        group = next((group for watch in watches for group in watch.optimizer.param_groups), nothing)
        p = _check_rate(self.run.value(self.schedule, group, step))
        if self._levels:
            p = min(self._levels, key=lambda level: abs(level - p))
        for rate in self._rates:
            setattr(rate.module, rate.attribute, p)
        return p

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()
        super().on_train_end(trainer, pl_module)

    def end(self, run: Run) -> None:
        self._restore()

    def _restore(self) -> None:
        for rate in getattr(self, "_rates", ()):
            setattr(rate.module, rate.attribute, rate.original)
        self._rates = []

    def _find(self, root: nn.Module) -> Iterator[_Rate]:
        for name, module in root.named_modules():
            name = _WRAPPERS.sub("", name)
            if not any(_matches(rule, name, module) for rule in self.include):
                continue
            for attribute in _known_attributes(module) | dict.fromkeys(self.attributes):
                value = getattr(module, attribute, None)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    yield _Rate(name, module, attribute, value)

    def _sampled_rates(self, total_steps: float) -> list[float]:
        """What the schedule has in store, checked before training; without an end, its first value."""
        last = 0 if math.isinf(total_steps) else max(int(total_steps) - 1, 0)
        steps = [*range(0, last, max(last // _SAMPLES, 1)), last]
        return [_check_rate(value_at(self.schedule, Position(step=s, total_steps=total_steps))) for s in steps]

    def _compiled_levels(self, rates: Sequence[float], total_steps: float) -> list[float]:
        if math.isinf(total_steps) and not isinstance(self.schedule, Constant):
            raise MisconfigurationException(
                "A compiled model is recompiled for each dropout rate, so that DropoutSchedule has to know them: "
                "give `total_steps`."
            )
        low, high = min(rates), max(rates)
        return [low + (high - low) * i / (_COMPILED_LEVELS - 1) for i in range(_COMPILED_LEVELS)]


def _known_attributes(module: nn.Module) -> dict[str, None]:
    """Names, in order, of the attributes that are dropout rates wherever they stand."""
    names = dict.fromkeys(["drop_prob"])
    if isinstance(module, _DropoutNd) or type(module).__name__ == "StochasticDepth":  # torchvision's
        names |= dict.fromkeys(["p"])
    if isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.RNNBase) and module.num_layers > 1):
        names |= dict.fromkeys(["dropout"])
    return names


def _matches(rule: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(rule, type):
        return isinstance(module, rule)
    if rule.startswith("type:"):
        return rule.removeprefix("type:") in (base.__name__ for base in type(module).__mro__)
    return fnmatchcase(name, rule)


def _is_compiled(module: nn.Module) -> bool:
    wrapped = getattr(module, "_compiler_ctx", None) is not None  # how Lightning remembers torch.compile(module)
    return wrapped or any(
        isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in module.modules()
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_rate(p: float) -> float:
    """``p``, if it is a dropout rate.

    Raises:
        ValueError: It is not in [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"A dropout rate should be in [0, 1), got {p!r}.")
    return p
