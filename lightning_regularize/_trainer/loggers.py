"""How do numbers, histograms and hyper-parameters get to loggers? What is peculiar to single loggers stands here.

Values of all callbacks are gathered over a batch and logged in one row. They do not go through the module's ``log``,
which forgets what was logged in one hook when another one runs, and needs a batch size that only the module may know.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from lightning_regularize._checks import is_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import lightning.pytorch as pl

    from lightning_regularize.histograms import Histogram


class _Row:
    """What is to be logged of one batch."""

    def __init__(self) -> None:
        self.scalars: dict[str, Any] = {}
        self.details: dict[str, float] = {}
        self.histograms: dict[str, Histogram] = {}


_ROWS: WeakKeyDictionary[Any, _Row] = WeakKeyDictionary()


def gather(
    trainer: pl.Trainer,
    scalars: Mapping[str, Any],
    *,
    details: Mapping[str, float] | None = None,
    histograms: Mapping[str, Histogram] | None = None,
) -> None:
    """Keep values of this batch until :func:`flush`.

    Args:
        trainer: The Trainer.
        scalars: Numbers or 0-d tensors by key, for loggers and ``trainer.callback_metrics``.
        details: Numbers by key, for loggers only.
        histograms: Histograms by key.
    """
    row = _ROWS.setdefault(trainer, _Row())
    row.scalars.update(scalars)
    row.details.update(details or {})
    row.histograms.update(histograms or {})


def forget(trainer: pl.Trainer) -> None:
    """Log nothing of a batch that an exception has ended."""
    _ROWS.pop(trainer, None)


def is_waiting(trainer: pl.Trainer) -> bool:
    """Is there something to log?"""
    return bool(_ROWS) and trainer in _ROWS


def flush(trainer: pl.Trainer, step: int) -> None:
    """Log what was gathered, in one row of every logger, after one transfer from the device."""
    row = _ROWS.pop(trainer)
    numbers = _numbers(row.scalars)
    trainer.callback_metrics.update({key: torch.tensor(value, device="cpu") for key, value in numbers.items()})
    if trainer.is_global_zero and (numbers or row.details or row.histograms):
        log(trainer.loggers, numbers | row.details, row.histograms, step)


def _numbers(scalars: Mapping[str, Any]) -> dict[str, float]:
    tensors = {key: value for key, value in scalars.items() if isinstance(value, torch.Tensor)}
    if tensors:
        device = next(iter(tensors.values())).device
        read = torch.stack([tensor.detach().to(device).double() for tensor in tensors.values()]).tolist()
        scalars = {**scalars, **dict(zip(tensors, read, strict=True))}
    return {key: float(value) for key, value in scalars.items()}


def log(loggers: Iterable[Any], scalars: Mapping[str, float], histograms: Mapping[str, Histogram], step: int) -> None:
    """One row for every logger, in one call; to be made on rank 0."""
    for logger in loggers:
        if histograms and is_named(logger, "WandbLogger"):
            import numpy as np
            import wandb

            bars = {key: (np.asarray(h.counts), np.asarray(h.edges)) for key, h in histograms.items()}
            drawn = {key: wandb.Histogram(np_histogram=counts_and_edges) for key, counts_and_edges in bars.items()}
            logger.log_metrics({**scalars, **drawn}, step=step)  # one call, or there would be two rows
            continue
        if scalars:
            logger.log_metrics(_as_files(scalars) if is_named(logger, "MLFlowLogger") else dict(scalars), step=step)
        if is_named(logger, "TensorBoardLogger"):
            for key, histogram in histograms.items():
                _add_histogram(logger.experiment, key, histogram, step)


def log_hyperparams(trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
    """Log hyper-parameters with every logger on rank 0, in ``setup``: Lightning logs those of the module later.

    Args:
        trainer: The Trainer.
        values: Numbers, booleans, texts or None by key.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        # Of each run TensorBoard shows only what is logged first, so those of the module have to be among them.
        of_the_modules = _hyperparams_of_modules(trainer) if is_named(logger, "TensorBoardLogger") else {}
        logger.log_hyperparams({**of_the_modules, **values})


def _hyperparams_of_modules(trainer: pl.Trainer) -> dict[str, Any]:
    """What Lightning is about to log: saved with ``save_hyperparameters(logger=True)``."""
    holders: list[Any] = [trainer.lightning_module, trainer.datamodule]  # type: ignore[attr-defined]
    saved = [holder.hparams_initial for holder in holders if getattr(holder, "_log_hyperparams", False)]
    return {name: value for each in saved for name, value in each.items() if name != "_class_path"}


def shows_histograms(logger: Any) -> bool:
    """Can it draw them? CSV and MLflow cannot."""
    return is_named(logger, "WandbLogger") or is_named(logger, "TensorBoardLogger")


def define_step_axis(loggers: Iterable[Any], quantities: Iterable[str]) -> None:
    """Draw our keys over ``trainer/global_step`` in Weights & Biases, also in a run that the user began."""
    for logger in loggers:
        if not is_named(logger, "WandbLogger"):
            continue
        logger.experiment.define_metric("trainer/global_step")
        for quantity in quantities:
            logger.experiment.define_metric(f"{quantity}/*", step_metric="trainer/global_step")


def _as_files(scalars: Mapping[str, float]) -> dict[str, float]:
    """With keys of which none lies below another: MLflow's file store makes a file of each, and folders on the way."""
    return {
        key.replace("/expected", " expected").replace("/spike_score", " spike_score"): value
        for key, value in scalars.items()
    }


def _add_histogram(writer: Any, key: str, histogram: Histogram, step: int) -> None:
    edges, counts = histogram.edges, histogram.counts
    centers = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    writer.add_histogram_raw(
        key,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, centers, strict=True)),  # the summary tab shows none of the two
        sum_squares=sum(n * x * x for n, x in zip(counts, centers, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
    )
