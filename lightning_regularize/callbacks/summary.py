"""What decays, by how much, and why? A table before the first step, and likely misconfigurations."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lightning_regularize._checks import check_positive_integer
from lightning_regularize._sharding import reshard
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.run import steps_per_epoch, total_steps
from lightning_regularize._trainer.strategies import has_optimizer, model_root
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._summary_rows import Training, notes_of, rows_of, table_of
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.schedules import check_total_steps, timescales_in
from lightning_regularize.selection import parameter_infos

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as pl
    from torch import nn

    from lightning_regularize._tables import Table

_HORIZON = 10_000  # steps over which a schedule is shown, where nobody says how many there are


class RegularizationSummary(Regularizer):
    """Prints which parameters decay, by how much, and the rule that decided, once at the start of training.

    The table is of what the optimizers hold, whoever made their groups. Scheduled weight decay shows the range of its
    values in the run, and of a :class:`~lightning_regularize.schedules.Timescale` also the steps over which it acts;
    learning rates stand beside it where groups differ in them. Below it stands what is likely not
    meant: weight decay that hardly acts in a run of this length, is lost to rounding, goes through Adam's
    normalization, or is applied twice. Printed on rank 0 only.

    Every logger gets the arguments of all other callbacks of this package as hyper-parameters, with keys such as
    ``regularization/WeightDecay/weight_decay``, and ``regularization/L1Penalty 2/strength`` where there are several of
    a class. Numbers stay numbers; schedules, rules and projections are texts; tensors are left out.

    Args:
        max_rows: Rows shown at most; what is left out is counted. At least 1. Parameters that differ in a number only,
            as those of repeated blocks, share a row.
        log_hyperparams: Whether loggers get the arguments.

    Raises:
        TypeError: ``log_hyperparams`` is not a boolean.
        ValueError: ``max_rows`` is no positive integer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import RegularizationSummary, WeightDecay
        >>> callbacks = [WeightDecay(0.05), RegularizationSummary()]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    acts_on_steps = False

    def __init__(self, *, max_rows: int = 50, log_hyperparams: bool = True) -> None:
        super().__init__(locals())
        self.max_rows = check_positive_integer(max_rows, "`max_rows`")
        if not isinstance(log_hyperparams, bool):
            raise TypeError(f"`log_hyperparams` should be True or False, got {log_hyperparams!r}.")
        self.log_hyperparams = log_hyperparams
        self._printed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._printed = False
        if self.log_hyperparams and stage == "fit":
            loggers.log_hyperparams(trainer, _hyperparameters(trainer.callbacks))  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In the first epoch: others have written their values in ``on_train_start``, also those that stand behind."""
        if self._printed or not has_optimizer(trainer):
            return
        self._printed = True
        root = model_root(trainer, pl_module)
        reshard(root)  # the sanity check has left other tensors in a root of FSDP2
        infos = parameter_infos(root)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        training = Training(infos, trainer.optimizers, callbacks, total_steps(trainer), steps_per_epoch(trainer))
        rows = rows_of(training)  # on every rank: if one alone raised, the others would wait for it
        if trainer.is_global_zero:
            table_of(rows, max_rows=self.max_rows, notes=notes_of(training, rows)).print_to(Console())


def summary(
    module: nn.Module,
    *callbacks: Regularizer,
    optimizer: torch.optim.Optimizer | None = None,
    total_steps: int | None = None,
    max_rows: int = 50,
) -> Table:
    """What :class:`RegularizationSummary` prints, before there is a Trainer.

    Args:
        module: Its trainable parameters are shown.
        callbacks: What the Trainer will get. Without a :class:`~lightning_regularize.WeightDecay` among them, the
            weight decay that ``optimizer`` has is shown.
        optimizer: Is left as it is. Without one, learning rates are not known, and notes that depend on them are left
            out.
        total_steps: Steps of the run. Without it, schedules are shown over 10,000 steps, and no note is made of decay
            that is too weak for the run.
        max_rows: As for :class:`RegularizationSummary`.

    Returns:
        A table that prints as text, and that a notebook shows as HTML.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There is neither a WeightDecay nor an optimizer, more than one WeightDecay, an optimizer is needed
            and not given, a number is out of range, or a rule matches nothing.
        MisconfigurationException: WeightDecay cannot work with the optimizer.

    Example:
        >>> from lightning_regularize import WeightDecay, summary
        >>> print(summary(torch.nn.Linear(3, 2), WeightDecay(0.05)))
                          Regularization
        <BLANKLINE>
         Group, parameters     Shape  Numbers  Decay, why
         ────────────────────────────────────────────────
         decay              1 tensor        6  0.05
           weight                2x3        6
        <BLANKLINE>
         no_decay           1 tensor        2  0
           bias                    2        2  bias
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"summary: `module` should be a torch.nn.Module, got {type(module).__name__}.")
    if wrong := [type(each).__name__ for each in callbacks if not isinstance(each, Regularizer)]:
        raise TypeError(f"summary: `callbacks` should be callbacks of this package, got {wrong[0]}.")
    if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"summary: `optimizer` should be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    max_rows, given_steps = check_positive_integer(max_rows, "summary: `max_rows`"), check_total_steps(total_steps)
    decays = [callback for callback in callbacks if isinstance(callback, WeightDecay)]
    if len(decays) > 1:
        raise ValueError(f"summary: {len(decays)} WeightDecay would write over each other. Use one, with `factors`.")
    infos = parameter_infos(module)
    if not decays:
        if optimizer is None:
            raise ValueError("summary: give a WeightDecay, or the `optimizer` whose weight decay is to be shown.")
        training = Training(infos, [optimizer], callbacks, given_steps or math.inf)
        rows = rows_of(training)
        return table_of(rows, max_rows=max_rows, notes=notes_of(training, rows))
    decay = copy.copy(decays[0])  # which may be in use
    if optimizer is None:
        _check_needs_no_optimizer(decay)
    stand_in = torch.optim.SGD([info.parameter for info in infos if info.parameter.requires_grad], lr=1.0)
    steps = given_steps or decay.total_steps or math.inf
    horizon = _HORIZON if math.isinf(steps) else int(steps)
    training = Training(infos, [optimizer or stand_in], [*(c for c in callbacks if c is not decays[0]), decay], steps)
    with decay.attach(optimizer or stand_in, module, total_steps=horizon):
        rows = rows_of(training)
    if optimizer is None:
        rows = [row._replace(lr=None, advice=None) for row in rows]
    is_guessed = math.isinf(steps) and any(getattr(each, "needs_total_steps", False) for each in decay.schedules)
    caption = f"Schedules are shown over {_HORIZON:,} steps; give `total_steps` of your run." if is_guessed else ""
    return table_of(rows, max_rows=max_rows, caption=caption, notes=notes_of(training, rows))


def _check_needs_no_optimizer(decay: WeightDecay) -> None:
    """Refuse what nothing is known of without an optimizer.

    Raises:
        ValueError: A schedule needs a learning rate, or values that the optimizer has.
    """
    for schedule in decay.rules.schedules:
        if schedule is None:
            raise ValueError(f"summary: {decay!r} keeps the weight decay of the optimizer: give `optimizer`.")
        if timescales_in(schedule):
            raise ValueError(f"summary: {schedule!r} needs the learning rate: give `optimizer`.")


def _hyperparameters(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The arguments of all callbacks of this package but the summary."""
    by_class: dict[str, list[Regularizer]] = {}
    for callback in callbacks:
        if isinstance(callback, Regularizer) and not isinstance(callback, RegularizationSummary):
            by_class.setdefault(type(callback).__name__, []).append(callback)
    return {
        f"regularization/{name}{f' {i}' if len(alike) > 1 else ''}/{argument}": value
        for name, alike in by_class.items()
        for i, callback in enumerate(alike, start=1)
        for argument, value in callback.hyperparameters().items()
    }
