"""How much better does a model do on what it has seen?"""

from __future__ import annotations

import difflib
import itertools
import re
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lightning_regularize._checks import is_named
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.run import logged_step
from lightning_regularize.callbacks._base import Regularizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import lightning.pytorch as pl

_SEPARATORS = ("_", "/", "-", ".")
_TRAIN_PREFIXES = tuple(map("".join, itertools.product(("train", "training"), _SEPARATORS)))
_VAL_PREFIXES = tuple(map("".join, itertools.product(("val", "valid", "validation"), _SEPARATORS)))
_LOADER = re.compile(r"/dataloader_idx_\d+$")  # what Lightning adds to a name where there are several loaders


class GeneralizationGapMonitor(Regularizer):
    r"""Logs the gap between a metric on training and on validation data, the first sign of overfitting.

    .. math:: \mathrm{gap} = m_\mathrm{train} - m_\mathrm{val}

    Of an accuracy it is positive when the model overfits, of a loss negative. The module logs both metrics, such as
    ``self.log("train_acc", ..., on_step=False, on_epoch=True)`` and ``self.log("val_acc", ...)``, or ``"train/acc"``
    and ``"val/acc"``. The gap is logged as ``generalization_gap/acc`` to all loggers and to
    ``trainer.callback_metrics``. With several validation loaders there is one gap of each,
    ``generalization_gap/acc/dataloader_idx_0`` and so on.

    It is taken whenever validation ends, before other callbacks look at it, so that EarlyStopping and ModelCheckpoint
    find it also where validation is not once an epoch; for this the monitor goes to the front of the Trainer's
    callbacks. The training metric is that of the epoch so far. One that the module logs in its own
    ``on_train_epoch_end`` is known only when the next epoch begins or training ends, and so is the gap. If one of the
    two metrics is not logged, no gap is logged for this validation, not an old one either, and one warning is given.
    Training metrics are of the weights as they were during the epoch and with dropout, which makes the gap look smaller
    than it is.

    Args:
        metric: Name of the metric without its prefix; with ``/dataloader_idx_1`` at its end of this loader only.
        train_prefix: What the name begins with on training data. By default ``train`` or ``training``, followed by one
            of ``_ / - .``, whichever is logged.
        val_prefix: What it begins with on validation data. By default ``val``, ``valid`` or ``validation`` in the same
            way.

    Raises:
        ValueError: A name is empty or the prefixes are the same.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize.callbacks.generalization_gap import GeneralizationGapMonitor
        >>> trainer = Trainer(callbacks=[GeneralizationGapMonitor("acc")], logger=False, accelerator="cpu")
    """

    acts_on_steps = False

    def __init__(self, metric: str, *, train_prefix: str | None = None, val_prefix: str | None = None) -> None:
        super().__init__(locals())
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"`metric` should be the name of a metric without its prefix, got {metric!r}.")
        for name, prefix in (("train_prefix", train_prefix), ("val_prefix", val_prefix)):
            if prefix is not None and not isinstance(prefix, str):
                raise TypeError(f"`{name}` should be what the name of a metric begins with, or None, got {prefix!r}.")
        if train_prefix is not None and train_prefix == val_prefix:
            raise ValueError(f"`train_prefix` and `val_prefix` should differ, got {train_prefix!r} twice.")
        self.metric = metric
        base = _LOADER.sub("", metric)
        self._train_names = [f"{p}{base}" for p in ([train_prefix] if train_prefix is not None else _TRAIN_PREFIXES)]
        self._val_names = [f"{p}{metric}" for p in ([val_prefix] if val_prefix is not None else _VAL_PREFIXES)]
        self._reset()

    def _reset(self) -> None:
        self._is_found = self._has_validated = False
        self._waiting: dict[str, float] = {}  # validation metrics by key, for which there is no training metric yet
        self._before: dict[str, torch.Tensor] = {}  # metrics before the module's own `on_train_epoch_end`

    @property
    def key(self) -> str:
        """What the gap is logged as; with several loaders, what its keys begin with."""
        return f"generalization_gap/{self.metric}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Callbacks that look at the gap come after this one, as Lightning itself has checkpoints come last."""
        super().setup(trainer, pl_module, stage)
        self._reset()
        if stage == "fit":
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            trainer.callbacks = sorted(callbacks, key=lambda c: not isinstance(c, GeneralizationGapMonitor))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not _has_validation(trainer):
            self.warn(
                "GeneralizationGapMonitor has nothing to log: this run has no validation. Give the Trainer validation "
                "data and the module a `validation_step`, or take GeneralizationGapMonitor out."
            )
        self._warn_of_old_values(trainer)
        if trainer.is_global_zero:
            loggers.define_step_axis(trainer.loggers, ["generalization_gap"])

    def _warn_of_old_values(self, trainer: pl.Trainer) -> None:
        """Callbacks that look at the end of epochs without validation see the gap of another epoch."""
        for callback in trainer.callbacks if trainer.check_val_every_n_epoch != 1 else ():  # type: ignore[attr-defined]
            for name, argument in _AT_EPOCH_END.items():
                looks = is_named(callback, name) and vars(callback).get(f"_{argument}")
                if looks and self._is_key(callback.monitor or ""):
                    self.warn(
                        f"{name} looks at {self.key!r} at the end of every epoch, and finds an old value in epochs "
                        f"without validation: leave `{argument}` out, so that it looks when validation ends."
                    )

    def _is_key(self, name: str) -> bool:
        return self.key in (name, _LOADER.sub("", name))

    # -- around validation ---------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        validated = _logged(trainer.fit_loop.epoch_loop.val_loop._results)
        found = self._found(validated)
        metrics = trainer.callback_metrics
        if trainer.sanity_checking:
            self._is_found = bool(found)
            if validated and not found:  # a module may log nothing at all in a sanity check
                self._raise_not_found("val_prefix", self._val_names, validated)
            return
        for key in [key for key in metrics if self._is_key(key)]:
            del metrics[key]  # the gap of another validation
        if not found:
            if not self._is_found:
                self._raise_not_found("val_prefix", self._val_names, validated)
            self.warn(f"GeneralizationGapMonitor logs no gap for validations in which {self.metric!r} is not logged.")
        self._is_found = self._has_validated = True
        self._waiting = {key: float(metrics[name]) for key, name in found.items()}
        self._log_if_known(trainer, logged_step(trainer))

    def _found(self, validated: Mapping[str, Any]) -> dict[str, str]:
        """The names of the metric in what validation has logged, by the keys of their gaps."""
        for name in self._val_names:
            loaders = {logged[len(name) :]: logged for logged in validated if _LOADER.sub("", logged) == name}
            loaders |= {"": name} if name in validated else {}
            if loaders:
                return {f"{self.key}{loader}": logged for loader, logged in loaders.items()}
        return {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The training metrics of the epoch are complete, those excepted that the module logs in this very hook."""
        if self._waiting:
            self._log_if_known(trainer, logged_step(trainer) - 1)
            self._before = dict(trainer.callback_metrics)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_what_waits(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_what_waits(trainer)
        if _has_validation(trainer) and not self._has_validated:
            self.warn("GeneralizationGapMonitor has logged nothing: training has ended without a validation.")
        super().on_train_end(trainer, pl_module)

    def _log_if_known(self, trainer: pl.Trainer, step: int) -> None:
        """Log the gap if the training metric has been logged in this epoch.

        Raises:
            MisconfigurationException: It is logged for single steps only.
        """
        # What stands in `callback_metrics` may be of the epoch before; the loop's own results are of this one.
        results = _logged(trainer.fit_loop.epoch_loop._results)
        name = next((name for name in self._train_names if name in results), None)
        if name is None or not self._waiting:
            return
        of_epoch = [result for result in results[name] if result.meta.on_epoch]
        if not of_epoch:
            raise MisconfigurationException(
                f"GeneralizationGapMonitor: {name!r} is logged for single steps only, and the value of the last step "
                f"says little. Write: self.log({name!r}, ..., on_epoch=True)."
            )
        self._log(trainer, _so_far(of_epoch[0]), step)

    def _log_what_waits(self, trainer: pl.Trainer) -> None:
        """The module has logged its metric at the end of the epoch, or not at all."""
        if not self._waiting:
            return
        metrics = trainer.callback_metrics
        name = next((name for name in self._train_names if name in metrics), None)
        if name is None:
            self._raise_not_found("train_prefix", self._train_names, metrics)
        elif metrics[name] is self._before.get(name):
            self._waiting = {}
            self.warn(f"GeneralizationGapMonitor logs no gap for epochs in which {name!r} is not logged.")
        else:
            self._log(trainer, float(metrics[name]), logged_step(trainer) - 1)

    def _log(self, trainer: pl.Trainer, trained: float, step: int) -> None:
        gaps = {key: trained - validated for key, validated in self._waiting.items()}
        self._waiting = {}
        trainer.callback_metrics.update({key: torch.tensor(gap, device="cpu") for key, gap in gaps.items()})
        if trainer.is_global_zero:
            loggers.log(trainer.loggers, gaps, {}, step)

    def _raise_not_found(self, argument: str, names: list[str], logged: Iterable[str]) -> NoReturn:
        """Say what is looked for, what there is, and what to write.

        Raises:
            MisconfigurationException: Always.
        """
        base, taken = _LOADER.sub("", self.metric), self._val_names if argument == "train_prefix" else []
        logged = [name for name in logged if not self._is_key(name) and _LOADER.sub("", name) not in taken]
        close = difflib.get_close_matches(names[0], logged, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        others = [_LOADER.sub("", name).removesuffix(base) for name in logged if _LOADER.sub("", name).endswith(base)]
        if others:
            hint = f" Is it {argument}={others[0]!r}?"
        raise MisconfigurationException(
            f"GeneralizationGapMonitor finds no metric {' or '.join(map(repr, names[:2]))}; there are "
            f"{', '.join(map(repr, logged)) or 'none'}.{hint} Give the metric's name without its prefix as `metric`, "
            "and the prefixes as `train_prefix` and `val_prefix`; log it with `on_epoch=True`."
        )


# What asks these callbacks to look at the end of an epoch rather than of a validation.
_AT_EPOCH_END = {"EarlyStopping": "check_on_train_epoch_end", "ModelCheckpoint": "save_on_train_epoch_end"}


def _has_validation(trainer: pl.Trainer) -> bool:
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0


def _logged(results: Any) -> dict[str, list[Any]]:
    """What was logged since the results of a loop were reset, by the names in ``callback_metrics``."""
    logged: dict[str, list[Any]] = {}
    for result in results.values():
        if not result.has_reset:
            meta = result.meta
            has_suffix = meta.add_dataloader_idx and meta.dataloader_idx is not None
            suffix = f"/dataloader_idx_{meta.dataloader_idx}" if has_suffix else ""
            logged.setdefault(meta.name + suffix, []).append(result)
    return logged


def _so_far(result: Any) -> float:
    """The value of a metric of an epoch that may go on."""
    if not result.is_tensor:
        return float(result.value.compute())
    # Not `result.compute()`: it writes the mean of all ranks' counts into the count that goes on (Lightning 2.6).
    meta = result.meta
    value = meta.sync(result.value.clone())
    return float(value / meta.sync(result.cumulated_batch_size.clone()) if meta.is_mean_reduction else value)
