"""How much better does a model do on what it has seen?"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.run import logged_step
from lightning_regularize.callbacks._base import Regularizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GeneralizationGapMonitor(Regularizer):
    r"""Logs the gap between a metric on training and on validation data, the first sign of overfitting.

    .. math:: \mathrm{gap} = m_\mathrm{train} - m_\mathrm{val}

    Of an accuracy it is positive when the model overfits, of a loss negative. The module logs both metrics, such as
    ``self.log("train_acc", ..., on_step=False, on_epoch=True)`` and ``self.log("val_acc", ...)``; the gap is logged as
    ``generalization_gap/acc`` to all loggers and to ``trainer.callback_metrics``, where EarlyStopping and
    ModelCheckpoint find it.

    It is taken at the end of a training epoch in which validation ran: only then is the epoch's training metric known.
    A training metric that the module logs in its own ``on_train_epoch_end``, which comes after the callbacks', is taken
    as soon as the next epoch begins or training ends. Where it was not logged in an epoch, there is no gap, and that is
    said once. Training metrics are of the weights as they were during the epoch and with dropout, which makes the gap
    look smaller than it is.

    Args:
        metric: Name of the metric without its prefix.
        train_prefix: What the name begins with on training data.
        val_prefix: What it begins with on validation data.

    Raises:
        ValueError: A name is empty or the prefixes are the same.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize.callbacks.generalization_gap import GeneralizationGapMonitor
        >>> trainer = Trainer(callbacks=[GeneralizationGapMonitor("acc")], logger=False, accelerator="cpu")
    """

    acts_on_steps = False

    def __init__(self, metric: str, *, train_prefix: str = "train_", val_prefix: str = "val_") -> None:
        super().__init__(locals())
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"`metric` should be the name of a metric without its prefix, got {metric!r}.")
        if train_prefix == val_prefix:
            raise ValueError(f"`train_prefix` and `val_prefix` should differ, got {train_prefix!r} twice.")
        self.metric = metric
        self.train_name, self.val_name = f"{train_prefix}{metric}", f"{val_prefix}{metric}"
        self._is_validated = self._waits = False
        self._stale: torch.Tensor | None = None

    @property
    def key(self) -> str:
        """What the gap is logged as."""
        return f"generalization_gap/{self.metric}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_validated = self._waits = False
        self._stale = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            loggers.define_step_axis(trainer.loggers, ["generalization_gap"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._is_validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The training metrics of the epoch are complete, those excepted that the module logs in this very hook."""
        if not self._is_validated:
            return
        # What stands in `callback_metrics` may be of the epoch before; the loop's own results are of this one.
        results: Any = trainer.fit_loop._results
        fresh = [r for r in results.values() if r.meta.name == self.train_name and not r.has_reset]
        self._waits, self._stale = not fresh, trainer.callback_metrics.get(self.train_name)
        if fresh:
            self._check_is_of_an_epoch(fresh)
            self._log(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_what_waits(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_what_waits(trainer)
        super().on_train_end(trainer, pl_module)

    def _check_is_of_an_epoch(self, results: list[Any]) -> None:
        if not any(result.meta.on_epoch for result in results):
            raise MisconfigurationException(
                f"{self.train_name!r} is logged for single steps only, of which the last says little: "
                f"self.log({self.train_name!r}, ..., on_epoch=True)."
            )

    def _log_what_waits(self, trainer: pl.Trainer) -> None:
        if not self._waits:
            return
        self._waits = False
        if self._stale is not None and trainer.callback_metrics.get(self.train_name) is self._stale:
            self._is_validated = False
            self.warn(f"GeneralizationGapMonitor logs no gap for epochs in which {self.train_name!r} is not logged.")
            return
        self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        self._is_validated = False
        metrics = trainer.callback_metrics
        missing = [name for name in (self.train_name, self.val_name) if name not in metrics]
        if missing:
            close = difflib.get_close_matches(missing[0], metrics, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise MisconfigurationException(
                f"GeneralizationGapMonitor finds no metric {' and no '.join(map(repr, missing))} at an epoch's end; "
                f"there are {', '.join(map(repr, metrics)) or 'none'}.{hint} Log it with `on_epoch=True`."
            )
        gap = float(metrics[self.train_name]) - float(metrics[self.val_name])
        metrics[self.key] = torch.tensor(gap)
        if trainer.is_global_zero:
            # The epoch's last step, as Lightning has it for the metrics of the epoch.
            loggers.log(trainer.loggers, {self.key: gap}, {}, logged_step(trainer) - 1)
