"""When did an optimizer really step, at which position, and by what are its gradients scaled?

What is peculiar to Lightning's loops and to mixed precision stands here. The facts, for Lightning 2.6:

* Without a GradScaler the closure runs *inside* ``optimizer.step``, so that torch's step pre-hook fires before the
  backward pass; with one, after it. ``on_before_optimizer_step`` comes with complete gradients in both cases.
* ``trainer.global_step`` counts the steps that were attempted, those included that a GradScaler skips, as LR schedulers
  do. Under manual optimization it counts the steps of all optimizers together.
* ``on_before_optimizer_step`` may come several times a step (LBFGS evaluates its closure, DeepSpeed accumulates);
  ``global_step`` stays the same meanwhile.
* A fused optimizer unscales by itself, so that its gradients still carry the GradScaler's factor in that hook.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_regularize._sharding import Sharding
from lightning_regularize.schedules import Position, value_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import lightning.pytorch as pl

    from lightning_regularize.schedules import Schedule


class StepCounter:
    """How many steps each optimizer has attempted: what LR schedulers count as well.

    A single optimizer's steps are Lightning's ``global_step``, which checkpoints carry. Of several, each has its own
    count, which this object keeps and which travels in the state of the callback that owns it.
    """

    def __init__(self) -> None:
        self._begun: list[int] = []
        self._seen: list[int] = []  # the global step at which each optimizer began its latest step

    def start(self, trainer: pl.Trainer) -> None:
        """Once all is restored, in ``on_train_start``; before it, counts may be of another run."""
        count, step = len(trainer.optimizers), trainer.global_step
        self._seen = [-1] * count
        if len(self._begun) == count and sum(self._begun) == step:
            return
        self._begun = [step // max(count, 1)] * count
        if count > 1 and step > 0:
            rank_zero_warn(
                f"The checkpoint does not say how many steps each of {count} optimizers made; "
                f"schedules continue as if each had made {step // count} of the {step}."
            )

    def begin(self, trainer: pl.Trainer, index: int) -> None:
        """In ``on_before_optimizer_step``: a step begins, or its closure is evaluated once more."""
        if self._seen[index] != trainer.global_step:
            self._seen[index] = trainer.global_step
            self._begun[index] += 1

    def current(self, trainer: pl.Trainer, index: int) -> int:
        """The number, from 0, of the step that the optimizer makes now, or of its next one."""
        if len(self._begun) <= 1:
            return trainer.global_step
        return self._begun[index] - self.is_stepping(trainer, index)

    def is_stepping(self, trainer: pl.Trainer, index: int) -> bool:
        """Whether the optimizer makes a step now that :meth:`begin` was told of."""
        return self._seen[index] == trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Plain lists; empty for a single optimizer."""
        return {"steps": list(self._begun)} if len(self._begun) > 1 else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        self._begun = list(state_dict.get("steps", []))


def total_steps(trainer: pl.Trainer) -> float:
    """Steps that each optimizer makes in the whole run, as far as Lightning knows; infinite where it does not.

    ``trainer.estimated_stepping_batches`` does not serve: it is -1 for data of unknown length, takes the accumulation
    of the first epoch for all, and counts the epoch that StochasticWeightAveraging adds to update batch norms.
    """
    if trainer.max_epochs != -1:
        _ = trainer.estimated_stepping_batches  # sets the data up
    epochs, batches, steps = _training_epochs(trainer), trainer.num_training_batches, math.inf
    if epochs is not None and batches != math.inf:
        steps = sum(math.ceil(batches / _accumulated_batches(trainer, epoch)) for epoch in range(epochs))
    if trainer.max_steps != -1:
        # Under manual optimization it counts the steps of all optimizers together.
        steps = min(steps, math.ceil(trainer.max_steps / max(len(trainer.optimizers), 1)))
    return steps


def _training_epochs(trainer: pl.Trainer) -> int | None:
    epochs = trainer.max_epochs
    if epochs is None or epochs == -1:
        return None
    # Stands for the epoch that makes no step. Known by its own attribute: others may raise `max_epochs` as well.
    is_extended = any(
        isinstance(callback, StochasticWeightAveraging) and getattr(callback, "_max_epochs", None) == epochs - 1
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    return max(epochs - is_extended, 1)


def _accumulated_batches(trainer: pl.Trainer, epoch: int) -> int:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def check_horizon(schedule: Schedule | Any, horizon: float) -> None:
    """Refuse a schedule that needs to know when the run ends, in a run that does not.

    Raises:
        MisconfigurationException: The horizon is infinite.
    """
    if math.isinf(horizon) and getattr(schedule, "needs_total_steps", False):
        raise MisconfigurationException(
            f"{schedule} needs to know how many steps the run has, and this Trainer does not: "
            "give `total_steps`, or set `max_steps` or `max_epochs` with data of known length."
        )


def position(trainer: pl.Trainer, group: dict[str, Any], step: int, horizon: float, start_lr: float) -> Position:
    """Where training stands for one parameter group."""
    # Cycling schedulers write the peak into the group; others leave the rate that they began with.
    peak = group.get("max_lr", group.get("initial_lr", start_lr))
    return Position(
        step=step,
        total_steps=horizon,
        epoch=trainer.current_epoch,
        lr=float(group.get("lr", 1.0)),
        peak_lr=float(peak),
    )


def optimizer_index(trainer: pl.Trainer, optimizer: Optimizer) -> int:
    """Where ``optimizer``, as a hook was given it, stands among the Trainer's.

    Raises:
        MisconfigurationException: It is none of them.
    """
    for i, known in enumerate(trainer.optimizers):
        if known is optimizer:
            return i
    if len(trainer.optimizers) == 1:  # DeepSpeed wraps it
        return 0
    raise MisconfigurationException(f"{type(optimizer).__name__} stepped, but is none of the Trainer's optimizers.")


def is_accumulating(trainer: pl.Trainer) -> bool:
    """In ``on_before_optimizer_step``: is there more to come? DeepSpeed calls it for every batch it accumulates."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    return engine is not None and not engine.is_gradient_accumulation_boundary()


def has_optimizer(trainer: pl.Trainer) -> bool:
    """Is there anything to regularize? Lightning puts a mock where ``configure_optimizers`` returns None."""
    return any(type(optimizer).__name__ != "_MockOptimizer" for optimizer in trainer.optimizers)


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that the user made: Lightning and DeepSpeed wrap it, with the same groups."""
    while not isinstance(optimizer, Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def group_labels(trainer: pl.Trainer, index: int) -> list[str]:
    """What logged keys call the groups of one optimizer: their names, or pg1, pg2, ... as Lightning does."""
    names = [g.get("name") or f"pg{i}" for i, g in enumerate(trainer.optimizers[index].param_groups, start=1)]
    prefix = f"optimizer{index} "
    if len(trainer.optimizers) > 1:  # two may have groups of one name
        return [name if name.startswith(prefix) else prefix + name for name in names]
    return names


def loss_scaler(trainer: pl.Trainer, optimizer: Optimizer) -> Any:
    """The GradScaler whose factor the gradients still carry in ``on_before_optimizer_step``, or None."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler if getattr(optimizer, "_step_supports_amp_scaling", False) else None


def logs_now(trainer: pl.Trainer, every_n_steps: int | None = None) -> bool:
    """Is this a step on which Lightning logs, or with ``every_n_steps`` every such one?"""
    if every_n_steps is None:
        return trainer._logger_connector.should_update_logs
    return (logged_step(trainer) + 1) % every_n_steps == 0


def logged_step(trainer: pl.Trainer) -> int:
    """The x axis of all that Lightning logs: 0-based, batches that stepped; ``train_loss`` has the same."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


class Clock:
    """What a schedule says for each parameter group of each optimizer, step by step.

    Args:
        schedule: A schedule or a callable from a position to a number.
        total_steps: Its length in steps of an optimizer; None for what the Trainer expects.
    """

    def __init__(self, schedule: Schedule | Callable[[Position], float], total_steps: int | None) -> None:
        self.schedule, self.total_steps = schedule, check_total_steps(total_steps)
        self._counter = StepCounter()
        self._start_lrs: list[list[float]] = []
        self._horizon = math.inf

    def note_rates(self, trainer: pl.Trainer) -> None:
        """In ``on_fit_start``: the rates that the optimizers begin with, before a checkpoint replaces them.

        LearningRateFinder has had its say by then: tuners run first.
        """
        self._start_lrs = [
            [float(g.get("lr", 1.0)) for g in optimizer.param_groups] for optimizer in trainer.optimizers
        ]

    def start(self, trainer: pl.Trainer) -> None:
        """In ``on_train_start``, when all is restored.

        Not before: who asks for the length of the data too early keeps a loader's own state from being restored.
        """
        self._horizon = self.total_steps or total_steps(trainer)
        check_horizon(self.schedule, self._horizon)
        self._counter.start(trainer)
        for index, optimizer in enumerate(trainer.optimizers):
            for group in range(len(optimizer.param_groups)):
                self.value(trainer, index, group)

    def begin(self, trainer: pl.Trainer, optimizer: Optimizer) -> int:
        """In ``on_before_optimizer_step``: a step begins; the optimizer's index."""
        index = optimizer_index(trainer, optimizer)
        self._counter.begin(trainer, index)
        return index

    def step(self, trainer: pl.Trainer, index: int) -> int:
        """The number of the optimizer's present or next step."""
        return self._counter.current(trainer, index)

    def is_stepping(self, trainer: pl.Trainer, index: int) -> bool:
        """Whether the optimizer makes a step now that :meth:`begin` was told of."""
        return self._counter.is_stepping(trainer, index)

    def position(self, trainer: pl.Trainer, index: int, group_index: int) -> Position:
        """Where training stands for one group at the optimizer's present or next step."""
        group, lrs = trainer.optimizers[index].param_groups[group_index], self._start_lrs[index]
        start = lrs[group_index] if group_index < len(lrs) else float(group.get("lr", 1.0))
        return position(trainer, group, self.step(trainer, index), self._horizon, start)

    def value(self, trainer: pl.Trainer, index: int, group_index: int) -> float:
        """The schedule's value for one group at the optimizer's present or next step."""
        return value_at(self.schedule, self.position(trainer, index, group_index))

    def state_dict(self) -> dict[str, Any]:
        """Plain lists; empty for a single optimizer."""
        return self._counter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        self._counter.load_state_dict(state_dict)


class RealSteps:
    """Calls around every step that really changes weights, of every optimizer.

    A step that a GradScaler skips is none: torch's hooks do not fire for an unfused optimizer then, and for a fused one
    they do, with ``found_inf`` set. Make it in ``on_train_start``, not before: loading a sharded checkpoint makes
    steps with rate 0. ``announce`` belongs into ``on_before_optimizer_step``.

    Args:
        trainer: Its optimizers are watched until :meth:`remove`.
        owner: Whose work it is, for messages.
        before: Called with the optimizer's index when its gradients are complete, right before weights change. Between
            it and the change only clipping may come. For LBFGS it comes before the closure's first evaluation.
        after: Called with the optimizer's index when weights have changed; with ``before``, only where that was called.
        counts: Whether what ``after`` does depends on the number of the step, which Lightning counts.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        owner: str,
        *,
        before: Callable[[int], None] | None = None,
        after: Callable[[int], None] | None = None,
        counts: bool = False,
    ) -> None:
        self._owner, self._before, self._after = owner, before, after
        self._lack = f"{owner} could not act before the step" if before is not None else ""
        if counts and not self._lack:
            self._lack = f"{owner} stands still, for Lightning does not count the step"
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scaled = scaler is not None and scaler.is_enabled()
        optimizers = [torch_optimizer(optimizer) for optimizer in trainer.optimizers]
        self._announced = [False] * len(optimizers)
        self._acted = [False] * len(optimizers)
        self._told = False
        self._handles = []
        for i, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_pre_hook(functools.partial(self._enter, i)))
            self._handles.append(optimizer.register_step_post_hook(functools.partial(self._leave, i)))

    def announce(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Gradients are complete. Whether the step will be real is only known where no GradScaler may skip it."""
        if is_accumulating(trainer):
            return
        index = optimizer_index(trainer, optimizer)
        self._announced[index] = True
        if not self._scaled and not self._acted[index]:
            self._act(index)

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def _act(self, index: int) -> None:
        self._acted[index] = True
        if self._before is not None:
            self._before(index)

    def _enter(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        # DeepSpeed steps when all is announced, others announce while they step.
        self._acted[index] = self._announced[index] and not self._scaled
        # With a GradScaler the backward pass is over by now. LBFGS moves its weights along a line while it evaluates
        # its closure, so that no change by others may come between.
        if (self._scaled and not _is_skipped(optimizer)) or isinstance(optimizer, torch.optim.LBFGS):
            self._act(index)

    def _leave(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        if self._lack and not self._announced[index] and not self._told:
            self._told = True
            rank_zero_warn(
                f"{type(optimizer).__name__} was stepped past Lightning, so that {self._lack}. In manual optimization "
                "step what `self.optimizers()` returns."
            )
        self._announced[index] = False
        has_begun = self._before is None or self._acted[index]
        self._acted[index] = False
        if self._after is not None and has_begun and not _is_skipped(optimizer):
            self._after(index)


def _is_skipped(optimizer: Optimizer) -> bool:
    # Reading it waits for the device, as a GradScaler does for every unfused optimizer.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def check_view(name: str, parameter: torch.Tensor, view: tuple[int, ...]) -> None:
    """Refuse a grouped ConvTranspose that has no view by groups: cut by a rank boundary, or not contiguous.

    Raises:
        MisconfigurationException: ``parameter`` cannot be viewed so.
    """
    try:
        parameter.detach().view(view)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"{name!r} of shape {tuple(parameter.shape)} cannot be viewed by groups, as {view}: ranks cut through "
            "them, or it is not contiguous. Leave it out by `exclude`, or do not shard it."
        ) from error


def will_move(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    """Is a parameter going to change in the step that begins? LBFGS begins before there are gradients."""
    return parameter.grad is not None or (isinstance(optimizer, torch.optim.LBFGS) and parameter.requires_grad)


def alike(trainer: pl.Trainer, kind: type) -> list[Any]:
    """All callbacks of a class, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def number_among(callbacks: Sequence[Any], callback: Any) -> str:
    """What tells the key of one of several callbacks from those of the others, `` 2``; of one alone nothing."""
    return f" {callbacks.index(callback) + 1}" if len(callbacks) > 1 else ""


def without_module(callback: Any) -> dict[str, Any]:
    """The attributes of a callback without ``log`` and ``log_dict``, which Lightning binds to the module."""
    return {key: value for key, value in vars(callback).items() if key not in ("log", "log_dict")}


def check_total_steps(total_steps: int | None) -> int | None:
    """Refuse what is not a number of steps; None is the Trainer's.

    Raises:
        ValueError: It is not a positive integer.
    """
    if total_steps is None or (isinstance(total_steps, int) and not isinstance(total_steps, bool) and total_steps > 0):
        return total_steps
    raise ValueError(f"`total_steps` should be a positive integer or None, got {total_steps!r}.")


def check_weights_are_the_optimizers(trainer: pl.Trainer, owner: str) -> None:
    """Refuse DeepSpeed's ZeRO, whose optimizer holds weights of its own and writes them over the module's.

    Raises:
        MisconfigurationException: The strategy is DeepSpeed with a stage above 0, or in half precision.
    """
    if keeper := deepspeed_keeper(trainer):
        raise MisconfigurationException(
            f"{owner} changes the module's weights, and DeepSpeed's {keeper} overwrites them with its own at the next "
            "step: use DDP, FSDP2 (ModelParallelStrategy), or ZeRO stage 0 in float32."
        )


def deepspeed_keeper(trainer: pl.Trainer) -> str:
    """What of DeepSpeed keeps weights and gradients of its own, of which the module's are copies; empty if nothing."""
    config = _deepspeed_config(trainer)
    if stage := int(config.get("zero_optimization", {}).get("stage", 0)):
        return f"ZeRO stage {stage}"
    return "half precision" if any(config.get(key, {}).get("enabled") for key in ("fp16", "bf16")) else ""


def hides_gradients(trainer: pl.Trainer) -> bool:
    """Are gradients scaled by a factor that only DeepSpeed knows?"""
    return bool(_deepspeed_config(trainer).get("fp16", {}).get("enabled"))


def held_parameters(optimizer: Any) -> list[list[torch.nn.Parameter]]:
    """The module's parameters in each group of an optimizer, in the stead of which ZeRO has flat pieces."""
    if hasattr(optimizer, "sub_group_to_group_id"):  # stage 3
        held: list[list[torch.nn.Parameter]] = [[] for _ in optimizer.param_groups]
        for i, parameters in enumerate(optimizer.fp16_groups):
            held[optimizer.sub_group_to_group_id[i]].extend(parameters)
        return held
    if hasattr(optimizer, "bit16_groups"):  # stages 1 and 2
        return [list(parameters) for parameters in optimizer.bit16_groups]
    return [group["params"] for group in optimizer.param_groups]


def _deepspeed_config(trainer: pl.Trainer) -> dict[str, Any]:
    # By name: Lightning's class from `lightning` is another than that from `pytorch_lightning`.
    if not any(base.__name__ == "DeepSpeedStrategy" for base in type(trainer.strategy).__mro__):
        return {}
    return getattr(trainer.strategy, "config", None) or {}


def check_gradients_are_the_modules(trainer: pl.Trainer, owner: str) -> None:
    """Refuse DeepSpeed's ZeRO, whose gradients do not stand in ``parameter.grad``.

    Raises:
        MisconfigurationException: The strategy is DeepSpeed with a stage above 0, or in half precision.
    """
    if keeper := deepspeed_keeper(trainer):
        raise MisconfigurationException(
            f"{owner} adds to gradients, which DeepSpeed's {keeper} keeps to itself: use DDP, FSDP2 "
            "(ModelParallelStrategy), or ZeRO stage 0 in float32."
        )


def check_not_flat(root: torch.nn.Module, owner: str) -> None:
    """Refuse FSDP1, which shows 1-D pieces that are cut anywhere.

    Raises:
        MisconfigurationException: Some parameter is such a piece.
    """
    sharding = Sharding(root)
    if any(sharding.is_flat(parameter) for parameter in root.parameters()):
        raise MisconfigurationException(
            f"{owner} needs whole weights, and FSDP1 cuts them anywhere: use ModelParallelStrategy with fully_shard "
            "(FSDP2)."
        )
