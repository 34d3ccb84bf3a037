"""How do numbers and histograms get to a logger? What is peculiar to single loggers stands here.

Loggers are told apart by what they can do, so that none of their packages is imported unless its logger is in use.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning_regularize.histograms import Histogram


def log(loggers: Iterable[Any], scalars: Mapping[str, float], histograms: Mapping[str, Histogram], step: int) -> None:
    """One row for every logger, in one call; to be made on rank 0."""
    for logger in loggers:
        if histograms and _is(logger, "WandbLogger"):
            import numpy as np
            import wandb

            bars = {key: (np.asarray(h.counts), np.asarray(h.edges)) for key, h in histograms.items()}
            drawn = {key: wandb.Histogram(np_histogram=counts_and_edges) for key, counts_and_edges in bars.items()}
            logger.log_metrics({**scalars, **drawn}, step=step)  # one call, or there would be two rows
            continue
        if scalars:
            logger.log_metrics(_as_files(scalars) if _is(logger, "MLFlowLogger") else dict(scalars), step=step)
        if _is(logger, "TensorBoardLogger"):
            for key, histogram in histograms.items():
                _add_histogram(logger.experiment, key, histogram, step)


def shows_histograms(logger: Any) -> bool:
    """Can it draw them? CSV and MLflow cannot."""
    return _is(logger, "WandbLogger") or _is(logger, "TensorBoardLogger")


def define_step_axis(loggers: Iterable[Any], quantities: Iterable[str]) -> None:
    """Draw our keys over ``trainer/global_step`` in Weights & Biases, also in a run that the user began."""
    for logger in loggers:
        if not _is(logger, "WandbLogger"):
            continue
        logger.experiment.define_metric("trainer/global_step")
        for quantity in quantities:
            logger.experiment.define_metric(f"{quantity}/*", step_metric="trainer/global_step")


def _is(logger: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(logger).__mro__)


def _as_files(scalars: Mapping[str, float]) -> dict[str, float]:
    """With keys of which none lies below another: MLflow's file store makes a file of each, and folders on the way."""
    return {key.replace("/expected", " expected"): value for key, value in scalars.items()}


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
