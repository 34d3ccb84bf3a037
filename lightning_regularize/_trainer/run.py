"""Where does training stand in a Trainer, and which optimizers does it step?

* ``on_before_optimizer_step`` comes with complete gradients, before they are clipped, under every precision. It may
  come several times per step: LBFGS evaluates its closure again, and DeepSpeed accumulates.
* ``trainer.global_step`` counts the steps that were attempted, including those that a GradScaler skips, as LR
  schedulers do. Under manual optimization it counts the steps of all optimizers together, and not those that the user
  makes with the torch optimizer itself; so steps are counted here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lightning_regularize._checks import is_named
from lightning_regularize._steps.clock import Clock
from lightning_regularize._steps.run import Run
from lightning_regularize._steps.watch import Watch, add_follower, remove_follower
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.names import MisconfigurationException, rank_zero_warn
from lightning_regularize._trainer.strategies import deepspeed_keeper, has_optimizer, model_root

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import lightning.pytorch as pl
    from torch import nn

    from lightning_regularize._steps.hooks import Work


class TrainerRun(Run):
    """A run of a Trainer's ``fit``.

    Args:
        trainer: The Trainer.
        module: Its LightningModule.
        work: What to call around steps.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, work: Work) -> None:
        super().__init__(module, Clock(owner=type(work).__name__))
        self.trainer, self.lightning_module, self._work = trainer, module, work
        self._steps: list[int] = []
        self._deepspeed = getattr(trainer.strategy, "deepspeed_engine", None)
        self._scaler: Any = None
        self._announced_at: float = math.inf  # the Trainer's count of steps when gradients were complete last

    def _now(self) -> list[Any]:
        return list(self.trainer.optimizers) if has_optimizer(self.trainer) else []  # or a mock

    @property
    def root(self) -> nn.Module:
        """The module as the strategy has wrapped it."""
        return model_root(self.trainer, self.lightning_module)

    @property
    def use_hooks(self) -> bool:
        """False under DeepSpeed's ZeRO, which steps groups one by one and holds flat copies of the weights."""
        return not deepspeed_keeper(self.trainer)

    def start(self, saved: Sequence[int] | None) -> None:
        """Watch all optimizers. Without saved counts Lightning's is used, as far as it says anything of each."""
        count, step = len(self.optimizers), self.trainer.global_step
        # Lightning counts calls of `optimizer_step`, in which a module may step twice, or not at all.
        if saved is not None and len(saved) == count:
            self._steps = list(saved)
        else:
            self._steps = [step // max(count, 1)] * count
            if count > 1 and step > 0:
                rank_zero_warn(
                    f"The checkpoint does not say how many steps each of {count} optimizers made; "
                    f"schedules continue as if each had made {step // count} of the {step}."
                )
        self.refresh()
        add_follower(self)

    def follow(self, optimizer: Any) -> None:
        """An optimizer is about to step: the Trainer may have got it, or one that holds it, after the batch began."""
        for watch in self.watches:
            if watch.holds(optimizer):
                watch.follow(optimizer)
                return
        self.refresh()

    def refresh(self) -> None:
        """Watch the optimizers that the Trainer has now; one that replaces another goes on with its count."""
        self.clock.epoch = self.trainer.current_epoch
        self._scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizers = self.optimizers
        known = {watch.index: watch for watch in self.watches}
        for i, optimizer in enumerate(optimizers):
            if i in known and known[i].optimizer is optimizer:
                known[i].refresh()
                continue
            if i in known:
                self._steps[i] = known[i].steps
                known[i].remove()
            steps = self._steps[i] if i < len(self._steps) else 0
            order = next((j for j, c in enumerate(self.trainer.callbacks) if c is self._work), math.inf)
            use_hooks = self.use_hooks
            known[i] = Watch(optimizer, self._work, index=i, steps=steps, use_hooks=use_hooks, order=order)
        for i in range(len(optimizers), len(known)):
            known.pop(i).remove()
        self.watches = [known[i] for i in sorted(known)]
        self._steps = [watch.steps for watch in self.watches]

    def announce(self, optimizer: Any) -> None:
        """In ``on_before_optimizer_step``.

        Raises:
            MisconfigurationException: The optimizer is not the Trainer's.
        """
        if self._deepspeed is not None and not self._deepspeed.is_gradient_accumulation_boundary():
            return  # it calls the hook for each batch
        self._announced_at = self.trainer.global_step
        self._watch_of(optimizer).announce(None if self._scaler is None else self._loss_scale(optimizer))

    def _watch_of(self, optimizer: Any) -> Watch:
        for watch in self.watches:
            if watch.optimizer is optimizer:
                return watch
        self.refresh()
        found = [watch for watch in self.watches if watch.optimizer is optimizer]
        if not found and len(self.watches) == 1:  # DeepSpeed wraps it
            found = self.watches
        if not found:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} stepped, but is none of the Trainer's optimizers."
            )
        return found[0]

    @property
    def steps(self) -> list[int]:
        """Steps that each optimizer has attempted, with one that a GradScaler has just skipped in this batch."""
        if self.trainer.global_step > self._announced_at:
            for watch in self.watches:
                watch.settle()
        return super().steps

    def stop(self) -> None:
        """Watch no more."""
        remove_follower(self)
        super().stop()

    def _loss_scale(self, optimizer: Any) -> torch.Tensor | None:
        """What gradients are multiplied by in ``on_before_optimizer_step``: a fused optimizer unscales by itself."""
        if not self._scaler.is_enabled() or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return None
        device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
        return self._scaler.scale(torch.ones((), device=device))  # type: ignore[no-any-return]  # without waiting

    # -- logging -------------------------------------------------------------------------------------------------------

    def logs_now(self) -> bool:
        """Is this a step on which Lightning logs?"""
        return logs_now(self.trainer)

    def log(self, values: Mapping[str, Any]) -> None:
        """Log values of this batch, all callbacks' in one row."""
        loggers.gather(self.trainer, values)

    def warn(self, message: str) -> None:
        """Warn on rank 0."""
        rank_zero_warn(message)


def logs_now(trainer: pl.Trainer, every_n_steps: int | None = None) -> bool:
    """Is this a step on which Lightning logs, or with ``every_n_steps`` every such one?"""
    # As `trainer._logger_connector.should_update_logs`, which calls ten functions to learn that this is a `fit`.
    every: int = every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not every:
        return False
    return (logged_step(trainer) + 1) % every == 0 or (every_n_steps is None and trainer.should_stop)


def logged_step(trainer: pl.Trainer) -> int:
    """The x axis of all that Lightning logs: 0-based, batches that stepped; ``train_loss`` has the same."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def group_labels(optimizer: Any, prefix: str = "") -> list[str]:
    """What logged keys call the groups of an optimizer: their names, or pg1, pg2, ... as Lightning does."""
    names = [group.get("name") or f"pg{i}" for i, group in enumerate(optimizer.param_groups, start=1)]
    if prefix:  # two optimizers may have groups of one name
        return [name if name.startswith(f"{prefix} ") else f"{prefix} {name}" for name in names]
    return names


def total_steps(trainer: pl.Trainer) -> float:
    """Steps that each optimizer makes in the whole run, as far as Lightning knows; infinite where it does not.

    ``trainer.estimated_stepping_batches`` does not serve: it is -1 for data of unknown length, takes the accumulation
    of the first epoch for all, and counts the epoch that StochasticWeightAveraging adds to update batch norms.
    """
    if trainer.max_epochs != -1:
        _ = trainer.estimated_stepping_batches  # sets the data up
    epochs, steps = _training_epochs(trainer), math.inf
    if epochs is not None:
        steps = _steps_of_epochs(trainer, epochs)
    if trainer.max_steps != -1:
        # Under manual optimization it counts the steps of all optimizers together.
        steps = min(steps, math.ceil(trainer.max_steps / max(len(trainer.optimizers), 1)))
    return steps


def steps_per_epoch(trainer: pl.Trainer) -> float:
    """The mean number of steps that each optimizer makes in an epoch; infinite in manual optimization."""
    epochs = _training_epochs(trainer) or 1
    return _steps_of_epochs(trainer, epochs) / epochs if trainer.lightning_module.automatic_optimization else math.inf


def _steps_of_epochs(trainer: pl.Trainer, epochs: int) -> float:
    batches = trainer.num_training_batches
    if batches == math.inf:
        return math.inf
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_named(callback, "GradientAccumulationScheduler"):
            accumulated = map(callback.get_accumulate_grad_batches, range(epochs))
            return float(sum(math.ceil(batches / number) for number in accumulated))
    return epochs * math.ceil(batches / trainer.accumulate_grad_batches)


def _training_epochs(trainer: pl.Trainer) -> int | None:
    epochs = trainer.max_epochs
    return None if epochs is None or epochs == -1 else max(epochs - is_extended(trainer), 1)


def is_extended(trainer: pl.Trainer) -> bool:
    """Has StochasticWeightAveraging added an epoch, to update batch norms? One step at its end does not train."""
    # Known by its own attribute: others may raise `max_epochs` as well.
    return any(
        is_named(callback, "StochasticWeightAveraging")
        and getattr(callback, "_max_epochs", None) == (trainer.max_epochs or 0) - 1
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
