"""The life of a run, which all callbacks share: how it begins and ends, what it remembers, and what it says."""

from __future__ import annotations

import functools
import math
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar
from weakref import ref

import torch
import torch.distributed as dist

from lightning_regularize._checks import named_errors
from lightning_regularize._steps.clock import Clock
from lightning_regularize._steps.hooks import Step, UnsupportedOptimizerError, Work
from lightning_regularize._steps.run import Attachment, LoopRun, Run
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.run import TrainerRun, is_extended, logged_step, steps_per_epoch, total_steps
from lightning_regularize.callbacks._saved import COUNT, NUMBER, check_state
from lightning_regularize.callbacks._selective import Selective, check_holds
from lightning_regularize.schedules import Constant, check_total_steps, timescales_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import lightning.pytorch as pl
    from torch import nn
    from torch.optim import Optimizer

    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.schedules import ScheduleLike

P = ParamSpec("P")
T = TypeVar("T")


def _misconfiguration(method: Callable[P, T]) -> Callable[P, T]:
    """What the engine cannot work with, a Trainer calls a misconfiguration, and it has several callbacks."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except UnsupportedOptimizerError as error:
            name, message = type(args[0]).__name__, str(error)
            raise MisconfigurationException(message if name in message else f"{name}: {message}") from error

    return call


class Regularizer(Selective, Work):
    """The base of all callbacks. A subclass says what it does, and when; this class calls it.

    Args:
        arguments: The ``locals()`` of the subclass' constructor.
    """

    error = MisconfigurationException

    state_layouts: ClassVar[Mapping[str, Layout]] = {}
    """What :meth:`save` returns, by key: a checkpoint is checked for it."""

    acts_on_steps: ClassVar[bool] = True
    """Does it do anything around optimizer steps?"""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.run: Any = None
        self._saved: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}  # the state at the end of the run before
        self._kept_of: ref[Any] | None = None  # its module
        self._logged: dict[int, int] = {}
        self._of_run: set[str] = set()  # names of the attributes that `check` and `begin` have made

    # -- what a subclass states ----------------------------------------------------------------------------------------

    schedule: Any = None
    """What is followed, where something changes with the position in training."""

    rounded: Any = None
    """A ``Rounding``, where :meth:`check` makes one: it measures what half precision leaves of the strength."""

    @property
    def schedules(self) -> Sequence[ScheduleLike]:
        """The schedules that are followed."""
        return () if self.schedule is None else (self.schedule,)

    def check(self, run: Run) -> None:
        """Refuse what cannot work, before a checkpoint is restored and before any weight changes."""

    def begin(self, run: Run) -> None:
        """Everything is restored, and training is about to begin."""

    # `on_gradients`, `before_step` and `after_step` say what is done around steps, see `Work`.

    def show_next(self) -> None:
        """Let the groups of optimizers show the settings of the next step: others look at them before it begins."""

    def end(self, run: Run) -> None:
        """Put back what was changed; called once, however the run ends."""

    def save(self) -> dict[str, Any]:
        """What a resumed run has to know, as plain numbers, strings, lists, dictionaries and tensors."""
        return {}

    # -- a run of a Trainer --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A second ``fit`` begins anew, also after an exception."""
        self.take_place(trainer.callbacks)  # type: ignore[attr-defined]
        if stage != "fit":
            return
        self._end()
        self._let_go()
        # Another `fit` of the same Trainer and module, with more epochs, continues the one before.
        continues = trainer.global_step > 0 and self._kept_of is not None and self._kept_of() is pl_module
        self._saved = self._kept if continues else {}
        self._warned, self._logged = set(), {}
        loggers.forget(trainer)

    @_misconfiguration
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The optimizers exist; nothing is restored."""
        self.run = TrainerRun(trainer, pl_module, self)
        self.run.clock.note_rates(self.run.optimizers)
        if not pl_module.automatic_optimization:  # a batch may step an optimizer twice, or every fourth time
            advice = "in manual optimization Lightning does not know, give `total_steps`"
            self._check_horizon(self.arguments.get("total_steps") or math.inf, MisconfigurationException, advice)
        self._prepare(self.check)

    @_misconfiguration
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored. The length of the data is not asked for earlier: a loader may be restored too."""
        if not all(isinstance(schedule, Constant) for schedule in self.schedules):
            self.run.clock.total_steps = horizon = self.arguments.get("total_steps") or total_steps(trainer)
            self.run.clock.steps_per_epoch = steps_per_epoch(trainer)
            self._most_steps = horizon + is_extended(trainer)
            advice = "give `total_steps`, or set `max_steps` or `max_epochs` with data of known length"
            self._check_horizon(horizon, MisconfigurationException, advice)
            self._check_epochs_are_known(self.run.clock.steps_per_epoch)
        self._start()
        self._warn_of_changed_arguments()

    @_misconfiguration
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Groups may have been added, and LR schedulers that step once an epoch have set their rates."""
        if self.acts_on_steps and self.run is not None:
            self.run.refresh()
            self.show_next()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In the first batch: callbacks behind this one may have changed groups in ``on_train_epoch_start``."""
        if batch_idx == 0:
            Regularizer.on_train_epoch_start(self, trainer, pl_module)

    @_misconfiguration
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are complete, and not yet clipped."""
        if self.acts_on_steps and self.run is not None and self.run.watches:
            self.run.announce(optimizer)

    @_misconfiguration
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """All optimizers have stepped, and LR schedulers have set the rates of the next step."""
        if self.run is None:  # added to the Trainer in mid-run
            return
        if self.acts_on_steps:
            for watch in self.run.watches:
                watch.settle()
            self.show_next()
        self.after_batch(trainer)
        if loggers.is_waiting(trainer) and _last_of(trainer.callbacks) is self:  # type: ignore[attr-defined]
            loggers.flush(trainer, logged_step(trainer))

    def after_batch(self, trainer: pl.Trainer) -> None:
        """A batch has ended, and with it the steps made in it."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rounded is not None:
            self.rounded.judge_early()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rounded is not None:
            self.rounded.judge()
        if self.run is not None:
            self._warn_of_the_horizon(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The state of the run stays, for a checkpoint that is saved after it or another ``fit`` that continues it."""
        if stage == "fit":
            self._kept_of = ref(pl_module)
            self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning calls no teardown after an exception; other callbacks may still save a checkpoint."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._end()  # the state may need the other ranks, which need not be here
        else:
            self._finish()

    def _finish(self) -> None:
        self._kept = self.state_dict()
        self._end()
        self._let_go()
        # Lightning has bound these two to the module.
        self.__dict__.pop("log", None)
        self.__dict__.pop("log_dict", None)

    def _end(self) -> None:
        if self.run is not None and not self.run.is_over:
            self.end(self.run)
            self.run.stop()

    def _prepare(self, make: Callable[[Run], None]) -> None:
        """Call ``check`` or ``begin``. What they make belongs to the run."""
        before = set(vars(self))
        try:
            make(self.run)
        finally:
            self._of_run |= vars(self).keys() - before

    def _start(self) -> None:
        """Go on where the saved state ends."""
        self.run.clock.restore_peaks(self.run.optimizers, self._saved.get("peaks", []))
        if self.acts_on_steps:
            self.run.start(self._saved.get("steps"))
        self._prepare(self.begin)
        self.run.has_begun = True

    def _let_go(self) -> None:
        """Let go of the run, and of all that holds something of it."""
        self.run = None
        for name in self._of_run & vars(self).keys():
            delattr(self, name)
        self._of_run.clear()

    # -- a run without a Trainer ---------------------------------------------------------------------------------------

    @_misconfiguration
    def attach(
        self, optimizer: Optimizer, module: nn.Module, *, total_steps: int | None = None, position: Any = None
    ) -> Attachment:
        """Act on the steps of ``optimizer``, in any training loop.

        Gradients are changed when they are complete, right before weights change: after a clipping of the loop's own.
        The schedule counts real steps. Call :meth:`load_state_dict` before, to go on where ``state_dict()`` was taken.

        Args:
            optimizer: The optimizer, as it is or as Fabric or accelerate wraps it.
            module: The module whose parameters it holds.
            total_steps: Length of the schedule in steps; by default what the constructor was given.
            position: A function without arguments that returns the number of the present step, from 0; for loops in
                which a step that a GradScaler skips counts as well.

        Returns:
            What has a method ``remove()``.

        Raises:
            TypeError: ``optimizer`` or ``module`` is something else, or this callback does nothing around steps.
            ValueError: ``total_steps`` is out of range or missing, ``module`` does not hold what the optimizer steps,
                or rules do not fit.
            RuntimeError: The callback is in use already.
            MisconfigurationException: It cannot work with the optimizer.

        Example:
            >>> import torch
            >>> from lightning_regularize import WeightDecay
            >>> layer = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
            >>> attachment = WeightDecay(0.05).attach(optimizer, layer)
            >>> optimizer.step()
            >>> attachment.remove()
        """
        if not self.acts_on_steps:
            raise TypeError(f"{type(self).__name__} needs a Trainer: it does nothing around optimizer steps.")
        with named_errors(f"{type(self).__name__}.attach"):
            _check_attached(optimizer, module, position)
            given = check_total_steps(total_steps)
        if self.run is not None and not self.run.is_over:
            raise RuntimeError(f"{type(self).__name__} is in use already: remove() it first, or make another one.")
        horizon = given or self.arguments.get("total_steps") or math.inf
        self._check_horizon(horizon, ValueError, "give `total_steps`")
        self._let_go()
        self.run = run = LoopRun(optimizer, module, Clock(horizon, type(self).__name__), self, position)
        try:
            check_holds(module, run)
            run.clock.note_rates(run.optimizers)
            self._prepare(self.check)
            self._start()
        except BaseException:
            self._end()
            self._let_go()
            raise
        return Attachment(self._detach)

    def _detach(self) -> None:
        if self.run is not None and self.run.trainer is None:
            if self.rounded is not None:
                self.rounded.judge()
            self._finish()

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Arguments as texts, the steps of each optimizer, and what :meth:`save` adds; after a run, as at its end."""
        if self.run is None or not self.run.has_begun:
            return {**(self._kept if self.run is None else self._saved), "arguments": self.argument_texts()}
        state: dict[str, Any] = {"steps": self.run.steps} if self.run.watches else {}
        if not all(isinstance(schedule, Constant) for schedule in self.schedules):
            state["peaks"] = self.run.clock.peaks(self.run.optimizers)
        return {"arguments": self.argument_texts(), **state, **self.save()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave.

        Raises:
            ValueError: The state is damaged.
            RuntimeError: The callback is attached, and has begun without this state.
        """
        if self.run is not None and self.run.trainer is None and not self.run.is_over:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} is attached, and has begun without this state, which would have no effect: load it before "
                "`attach`, under accelerate by `load_state` before `attach`, or remove() the callback first."
            )
        layouts = {"steps": [COUNT], "peaks": [[NUMBER]], **self.state_layouts}
        check_state(type(self).__name__, state_dict, layouts)
        self._saved = dict(state_dict)

    def _warn_of_changed_arguments(self) -> None:
        then, now = self._saved.get("arguments", {}), self.argument_texts()
        changed = [
            f"{name}: {then[name]} then, {now[name]} now" for name in now if name in then and then[name] != now[name]
        ]
        if changed:
            self.warn(
                f"{type(self).__name__} differs from the checkpoint's and wins over it. " + "; ".join(changed) + "."
            )

    # -- helpers of subclasses -----------------------------------------------------------------------------------------

    def logs(self, step: Step) -> bool:
        """Are values of this step to be logged now? Once, although a closure may be evaluated again."""
        if not self.run.logs_now() or self._logged.get(step.watch.index) == step.watch.steps:
            return False
        self._logged[step.watch.index] = step.watch.steps
        return True

    def number_among(self, kind: type[Regularizer]) -> str:
        """The number of this callback among several of its class, as its keys end in it; empty if there is one."""
        alike = [c for c in self.run.trainer.callbacks if isinstance(c, kind)]
        return f" {next(i for i, c in enumerate(alike, start=1) if c is self)}" if len(alike) > 1 else ""

    def _ending_schedules(self) -> list[ScheduleLike]:
        """The schedules that need to know when the run ends."""
        return [schedule for schedule in self.schedules if getattr(schedule, "needs_total_steps", False)]

    def _check_epochs_are_known(self, steps_per_epoch: float) -> None:
        for schedule in self.schedules if math.isinf(steps_per_epoch) else ():
            if any(timescale.epochs is not None for timescale in timescales_in(schedule)):
                raise MisconfigurationException(
                    f"{type(self).__name__}: {schedule!r} needs to know how many steps an epoch has, and Lightning "
                    "does not: give `steps` instead of `epochs`."
                )

    def _check_horizon(self, horizon: float, error: type[Exception], advice: str) -> None:
        if math.isinf(horizon) and (ending := self._ending_schedules()):
            raise error(f"{type(self).__name__}: {ending[0]!r} needs to know how many steps the run has: {advice}.")

    def _warn_of_the_horizon(self, trainer: pl.Trainer) -> None:
        """At the end of training: has a schedule ended too early, or not at all?"""
        horizon, steps = self.run.clock.total_steps, self.run.steps
        ending = self._ending_schedules()
        if not ending or not steps or math.isinf(horizon) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        most = max(steps)
        if most > self._most_steps:
            self.warn(
                f"{type(self).__name__}: {ending[0]!r} was over after {horizon:,.0f} steps, and the optimizer made "
                f"{most:,}. Its last value held from there on. Give `total_steps`."
            )
        elif 0 < most < horizon and not trainer.should_stop:
            self.warn(
                f"{type(self).__name__}: training has ended after {most:,} steps of {horizon:,.0f}, before "
                f"{ending[0]!r} has reached its end. Give `total_steps`, if this is not on purpose."
            )


def _check_attached(optimizer: object, module: object, position: object) -> None:
    """Refuse what :meth:`Regularizer.attach` cannot work with.

    Raises:
        TypeError: An argument is something else than it should be.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        instead = ""
        if isinstance(optimizer, torch.nn.Module):
            instead = " Write attach(optimizer, module)."
        elif isinstance(optimizer, (list, tuple, dict)) and len(optimizer):
            instead = " Attach to each of several optimizers a callback of its own."
        elif isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):  # of a scheduler
            instead = " Give the `optimizer` of that."
        found = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"`optimizer` should be a torch.optim.Optimizer, got {found}.{instead}")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"`module` should be a torch.nn.Module, got {type(module).__name__}.")
    number: Any = position() if callable(position) else None
    if position is not None and not (isinstance(number, Integral) and int(number) >= 0):
        what = f"a function that returns {number!r}" if callable(position) else repr(position)
        raise TypeError(
            f"`position` should be a function that returns the number of the present step, got {what}. Write "
            "position=lambda: step, with an integer of at least 0."
        )


def _last_of(callbacks: Sequence[Any]) -> Regularizer:
    return next(callback for callback in reversed(callbacks) if isinstance(callback, Regularizer))
