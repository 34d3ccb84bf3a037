"""How large are weights and gradients while they train, and how fast do they move?"""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lightning_regularize import group_settings, quantities
from lightning_regularize._checks import check_number, check_positive_integer
from lightning_regularize._reading import Reading
from lightning_regularize._sharding import gradient_of
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.run import logs_now
from lightning_regularize._trainer.strategies import hides_gradients
from lightning_regularize._used import used_weights
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._monitored import Monitored, settings_of
from lightning_regularize.histograms import BINS
from lightning_regularize.norms import check_norm_type
from lightning_regularize.quantities import QUANTITIES, check_quantities, needed_sums
from lightning_regularize.selection import require_matches

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl
    from torch import Tensor

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize._steps.watch import Watch
    from lightning_regularize._used import Piece
    from lightning_regularize.callbacks._monitored import Row, Table
    from lightning_regularize.histograms import Histogram
    from lightning_regularize.selection import Rule

_DETAILS = ("total", "group", "module", "parameter")
_TOTAL = re.compile(r"(optimizer\d+ )?total")  # parts of the model may be called so as well
_NONFINITE = ("gradient_nonfinite", "weight_nonfinite")
# Keys that come with quantities.
_BESIDE = (*_NONFINITE, "below_threshold", "timescale_epochs", "weight_histogram", "gradient_histogram")
_BYTES = 16 * BINS  # of a histogram on disk: a count and an edge a bin


class _Read(NamedTuple):
    """What is known of the weights of an optimizer around a step that is logged."""

    watch: Watch
    table: Table
    reading: Reading
    settings: list[dict[str, Any]] | None

    def read_changes(self) -> None:
        """Of plain parameters and computed weights."""
        self.reading.read_changes(lambda: [piece.tensor for piece in self.table.pieces()])


class WeightNormMonitor(Regularizer):
    r"""Logs how large weights and gradients are, and how far a step moves the weights.

    .. math:: \lVert w \rVert_p = \bigl(\sum_i |w_i|^p\bigr)^{1/p}

    Keys are ``<quantity>/<part>``. The part ``total`` is always there; ``detail`` adds parts such as
    ``weight_norm/net.0.weight``. With several optimizers each has its own total, ``weight_norm/optimizer0 total``.
    Of a layer that is pruned or parametrized (weight norm, spectral norm, ...) the weight that it uses is measured,
    under its own name. Such a weight has no gradient: gradient quantities are of the parameters that it is computed
    from, together. Effective decay and timescale are of the largest of them, and theory expects nothing of it.

    All go to all loggers on the step axis of ``train_loss``, totals also to ``trainer.callback_metrics``. Only
    trainable parameters count, and only what is asked for is computed, on the steps that are logged.

    ===================  ==================  =====================================================================
    ``quantities``       key                 what it is, for the elements of a part
    ===================  ==================  =====================================================================
    ``weight``           weight_norm         norm of the weights as the step finds them
    ``rms``              rms                 root of their mean square
    ``gradient``         gradient_norm       norm of the gradient, unscaled, before clipping
    ``gradient_mean``    gradient_mean       mean of the gradient's elements
    ``gradient_std``     gradient_std        standard deviation of the gradient's elements around it
    ``update``           update_norm         norm of what the step changes; 0 if a GradScaler skips it
    ``ratio``            ratio               update norm over weight norm; about 1e-3 is healthy
    ``angle``            angle               angle between the weights before and after the step, in radians
    ``sparsity``         sparsity            share of exact zeros
    ``stable_rank``      stable_rank         :math:`\lVert W\rVert_F^2 / \sigma_1^2`, of matrices (kernels flattened)
    ``spectral_norm``    spectral_norm       :math:`\sigma_1`, the largest singular value, of matrices
    ``effective_decay``  effective_decay     lr times weight decay, the share that a decoupled step removes
    ``timescale``        timescale           over how many steps the decay acts, 1 / (lr * weight decay)
    ===================  ==================  =====================================================================

    Beside them: ``gradient_nonfinite/total`` and, where there are any, ``weight_nonfinite/total`` count elements that
    are NaN or infinite; ``below_threshold`` goes with ``sparsity``, and ``timescale_epochs`` with ``timescale``. The
    stable rank and the spectral norm of several matrices are those of a matrix with these as diagonal blocks. Effective
    decay and timescale are means over the elements that decay at all. What a part does not have, such as the ratio to
    weights that are all 0 or the mean of no elements, is left out.

    Most cost one read of weights or gradients; ``update``, ``ratio`` and ``angle`` keep a copy of the weights
    during a logged step, and ``stable_rank`` and ``spectral_norm`` read each matrix 64 times and gather it
    where it is sharded.

    Args:
        every_n_steps: Period in batches that step; None logs on the very steps on which Lightning logs.
        quantities: Any of the words above.
        detail: What is logged beside the total: nothing ("total"), or a value a parameter group, a module, or a
            parameter.
        norm_type: ``p`` of weight, gradient and update norms, at least 1, or ``math.inf``.
        histograms: Whether to draw a histogram of each parameter, ``weight_histogram/<name>``, and of its gradient,
            ``gradient_histogram/<name>``, if that is among the quantities, in the loggers that can (TensorBoard,
            Weights & Biases).
        include: Rules for what is measured.
        exclude: Rules for what is not.
        threshold: If given, ``below_threshold/<part>`` is the share of weights of at most this magnitude.
        expected: Whether to log ``<quantity>/<part>/expected`` too (in MLflow with a space before the last word): where
            :mod:`~lightning_regularize.theory` sees the equilibrium of noise and weight decay, at the lr and weight
            decay of the step, for weights before a norm. Of AdamW and Lion it is known for ``weight``, ``rms``,
            ``update``, ``ratio`` and ``angle``; of SGD as well if ``gradient`` is among the quantities. What does not
            decay counts as measured.
        max_keys: Details logged a step at most; what is left out is told.
        max_histogram_megabytes: Histograms end, with a warning, when a run has drawn about so much.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: An argument is out of range or unknown.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import WeightNormMonitor
        >>> trainer = Trainer(callbacks=[WeightNormMonitor(detail="module")], logger=False, accelerator="cpu")

    References:
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212, for what is expected.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        quantities: Sequence[str] = ("weight",),
        detail: Literal["total", "group", "module", "parameter"] = "total",
        norm_type: float = 2.0,
        histograms: bool = False,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = (),
        threshold: float | None = None,
        expected: bool = False,
        max_keys: int = 2000,
        max_histogram_megabytes: float = 100.0,
    ) -> None:
        super().__init__(locals())
        self.every_n_steps = None if every_n_steps is None else check_positive_integer(every_n_steps, "`every_n_steps`")
        self.quantities = check_quantities(quantities)
        if detail not in _DETAILS:
            raise ValueError(f"`detail` should be one of {_DETAILS}, got {detail!r}.")
        check_norm_type(norm_type)
        threshold = None if threshold is None else check_number(threshold, "`threshold`")
        if not check_number(max_histogram_megabytes, "`max_histogram_megabytes`"):
            raise ValueError("`max_histogram_megabytes` should be positive, got 0.")
        for name, flag in (("histograms", histograms), ("expected", expected)):
            if not isinstance(flag, bool):
                raise TypeError(f"`{name}` should be True or False, got {flag!r}.")
        self.detail = detail
        self.norm_type = float(norm_type)
        self.histograms = histograms
        self.threshold = threshold
        self.expected = expected
        self.max_keys = check_positive_integer(max_keys, "`max_keys`")
        self.max_histogram_megabytes = max_histogram_megabytes
        self._needs = needed_sums(self.quantities, expected=expected, below=threshold is not None)
        self._needs_settings = expected or not {"effective_decay", "timescale"}.isdisjoint(self.quantities)

    # -- when ----------------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        self._seen: set[int] = set()  # indices of optimizers that stepped
        self._batches = 0
        self._readings: dict[int, _Read] = {}
        self._histogram_bytes = 0
        trainer = run.trainer
        if trainer is None:
            raise TypeError("WeightNormMonitor logs to the loggers of a Trainer, and cannot be attached without one.")
        if trainer.fast_dev_run:
            return
        if not trainer.loggers:
            self.warn(
                "The Trainer has no logger: WeightNormMonitor puts totals into `trainer.callback_metrics`, where other "
                "callbacks find them, and writes nothing."
            )
        elif self.histograms and not any(map(loggers.shows_histograms, trainer.loggers)):
            names = ", ".join(type(logger).__name__ for logger in trainer.loggers)
            self.warn(f"WeightNormMonitor draws no histograms: {names} has no place for them.")

    def begin(self, run: Run) -> None:
        infos = [weight.info for weight in used_weights(run.infos())]
        try:
            require_matches(self.include, infos, argument="include")
            require_matches(self.exclude, infos, argument="exclude")
        except ValueError as error:
            raise ValueError(f"WeightNormMonitor: {error}") from error
        self._monitored = Monitored(self, run)
        if run.trainer.is_global_zero:
            keys = [QUANTITIES[quantity].key for quantity in self.quantities]
            loggers.define_step_axis(run.trainer.loggers, [*keys, *_BESIDE])

    def on_gradients(self, step: Step) -> None:
        """Gradients are complete here, and not yet clipped."""
        watch, trainer = step.watch, self.run.trainer
        self._seen.add(watch.index)
        # LBFGS evaluates its closure again: the first time counts.
        if logs_now(trainer, self.every_n_steps) and watch.index not in self._readings:
            self._logged[watch.index] = watch.steps
            table = self._monitored.of(watch)
            settings = settings_of(table.rows, trainer, watch) if self._needs_settings else None
            self._readings[watch.index] = _Read(watch, table, self._read(table, step), settings)

    def after_step(self, step: Step, *, is_real: bool) -> None:
        """Of several inner optimizers the last one completes the change."""
        if is_real and step.watch.index in self._readings and step.optimizer is step.watch.leaves[-1]:
            self._readings[step.watch.index].read_changes()

    def after_batch(self, trainer: pl.Trainer) -> None:
        """All optimizers have stepped: one transfer to the host, and one row, for all."""
        self._batches += 1
        if not self._readings:
            return
        readings, self._readings = list(self._readings.values()), {}
        for read in readings:
            # DeepSpeed writes the module's weights after its optimizer's step; of a step that was skipped: no change.
            read.read_changes()
        reduced = [read.reading.reduced() for read in readings]
        numbers = torch.cat([each.to(reduced[0].device) for each in reduced]).cpu()
        of_readings = torch.split(numbers, [read.reading.count for read in readings])
        totals: dict[str, float] = {}
        details: dict[str, float] = {}
        drawn: dict[str, Histogram] = {}
        taken: set[str] = set()
        for (watch, table, reading, settings), own in zip(readings, of_readings, strict=True):
            sums, pictures = reading.sums(own)
            sums |= group_settings.known_sums(sums, reading.sizes, settings, self.norm_type, expected=self.expected)
            self._warn_of_unknown_rules(table.rows, settings, sums)
            totals |= self._totals(watch, sums)
            details |= self._details(watch, table, sums, taken)
            drawn |= pictures
        loggers.gather(trainer, totals, details=self._at_most(details), histograms=self._affordable(drawn))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of optimizers that never stepped on a batch that is logged, or at all."""
        if self.run is None or trainer.fast_dev_run or not self._batches:  # type: ignore[attr-defined]
            return
        interval = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        name = "every_n_steps" if self.every_n_steps else "log_every_n_steps"
        if not self._seen:
            self.warn("WeightNormMonitor logged nothing: no optimizer of the Trainer made a step.")
        elif not self._logged:
            self.warn(
                f"WeightNormMonitor logged nothing: no step in {self._batches} batches was one of those that are "
                f"logged, which are every {interval} steps. Choose a smaller `{name}`."
            )
        for index in sorted(self._seen - set(self._logged)) if self._logged else ():
            self.warn(
                f"WeightNormMonitor logged nothing of optimizer {index}, which never stepped on a batch that is "
                f"logged: choose another `{name}`."
            )

    def end(self, run: Run) -> None:
        self._readings = {}

    # -- on what -----------------------------------------------------------------------------------------------------

    def _read(self, table: Table, step: Step) -> Reading:
        """Whatever can be known before the step; nothing waits for the device."""
        rows, pieces = table.rows, table.pieces()
        weights = [piece.tensor for piece in pieces]
        sizes, like = [piece.shape.numel() for piece in pieces], [piece.like for piece in pieces]
        reading = Reading(
            dict(zip(table.names, weights, strict=True)),
            *(sizes, self._monitored.sharding, self._needs, self.norm_type, like),
        )
        reading.read_weights(self.threshold)
        if self.histograms:
            reading.draw("weight", weights)
        if "gradient_size" in self._needs:
            is_hidden = hides_gradients(self.run.trainer)
            gradients = [None if is_hidden else gradient_of(row.parameter) for row in rows]
            reading.read_gradients(gradients, step.scale)
            if self.histograms:
                reading.draw("gradient", gradients, step.scale)
        if "spectral_square" in self._needs:
            reading.read_spectra([self._is_matrix(row, piece) for row, piece in zip(rows, pieces, strict=True)])
        reading.keep_weights()
        return reading

    def _is_matrix(self, row: Row, piece: Piece) -> bool:
        if len(piece.shape) < 2 or 0 in piece.shape:
            return False
        if self._monitored.sharding.is_flat(row.parameter):
            asked = " and ".join(q.replace("_", " ") for q in ("stable_rank", "spectral_norm") if q in self.quantities)
            self.warn(f"WeightNormMonitor logs no {asked} of what FSDP1 or ZeRO-3 has cut into flat pieces; use FSDP2.")
            return False
        return True

    def _warn_of_unknown_rules(
        self, rows: Sequence[Row], settings: list[dict[str, Any]] | None, sums: dict[str, Tensor]
    ) -> None:
        if not self.expected or settings is None:
            return
        unknown = {
            found["rule"]
            for row, found, is_known in zip(rows, settings, sums["known"].tolist(), strict=True)
            if not is_known and not row.weight.is_computed and found["lr"] * found["weight_decay"] > 0
        }
        if rules := ", ".join(sorted(unknown - {"SGD"})):  # of which the gradient has to be among the quantities
            self.warn(
                f"WeightNormMonitor: no expected values are known for weights that {rules} decays. Only measured "
                "values of them are logged."
            )

    # -- under which names -------------------------------------------------------------------------------------------

    def _totals(self, watch: Watch, sums: dict[str, Tensor]) -> dict[str, float]:
        """The values of all parameters of an optimizer together, by key."""
        count = len(sums["size"])
        if not count:
            self.warn(
                f"WeightNormMonitor logs nothing of optimizer {watch.index}: it holds no parameter that is watched."
            )
            return {}
        total = quantities.combined(sums, [0] * count, 1, self.norm_type)
        part = f"{label} total" if (label := self.run.label(watch)) else "total"
        values = self._values([part], total)
        counted = {name: total[name].tolist()[0] for name in ("gradient_size", *_NONFINITE) if name in total}
        if counted.get("gradient_size") == 0:
            self.warn("WeightNormMonitor logs no gradient norm: no parameter that it watches has a gradient.")
            del counted["gradient_nonfinite"]
        if counted.get("weight_nonfinite") == 0:
            del counted["weight_nonfinite"]
        return values | {f"{name}/{part}": counted[name] for name in _NONFINITE if name in counted}

    def _details(self, watch: Watch, table: Table, sums: dict[str, Tensor], taken: set[str]) -> dict[str, float]:
        """The values of the parts that ``detail`` asks for, by key; ``taken`` are parts of other optimizers."""
        if self.detail == "total":
            return {}
        part_of = table.parts(self.detail, watch.optimizer, self.run.label(watch))
        parts = list(dict.fromkeys(part for part in part_of if part is not None))
        if not parts:
            return {}
        places: dict[str | None, int] = {part: i for i, part in enumerate(parts)}
        index = [places.get(part, len(parts)) for part in part_of]  # the last is of no part
        of_parts = quantities.combined(sums, index, max(index) + 1, self.norm_type)
        parts = [f"{part} ({self.detail})" if _TOTAL.fullmatch(part) else part for part in parts]
        labels = [f"{self.run.label(watch)} {part}" if part in taken else part for part in parts]
        taken |= set(parts)
        return self._values(labels, {name: values[: len(parts)] for name, values in of_parts.items()})

    def _values(self, parts: list[str], sums: dict[str, Tensor]) -> dict[str, float]:
        """The quantities of parts by key, without those that a part does not have."""
        batches, accumulated = self.run.trainer.num_training_batches, self.run.trainer.accumulate_grad_batches
        steps = batches if math.isinf(batches) else math.ceil(batches / accumulated)
        found = quantities.values_of(
            sums, self.quantities, norm_type=self.norm_type, expected=self.expected, steps_per_epoch=steps
        )
        return quantities.by_key(found, parts)

    # -- within limits -----------------------------------------------------------------------------------------------

    def _at_most(self, details: dict[str, float]) -> dict[str, float]:
        if len(details) > self.max_keys:
            self.warn(
                f"WeightNormMonitor logs {self.max_keys} of {len(details)} keys a step: "
                "ask for less `detail`, `include` less, or raise `max_keys`."
            )
            return dict(itertools.islice(details.items(), self.max_keys))
        return details

    def _affordable(self, drawn: dict[str, Histogram]) -> dict[str, Histogram]:
        if drawn and self._histogram_bytes + len(drawn) * _BYTES > self.max_histogram_megabytes * 1e6:
            self.warn(
                f"WeightNormMonitor draws no more histograms: there are {self._histogram_bytes / 1e6:.0f} MB of them. "
                "Draw them more rarely, `include` less, or raise `max_histogram_megabytes`."
            )
            return {}
        self._histogram_bytes += len(drawn) * _BYTES
        return dict(itertools.islice(drawn.items(), self.max_keys))
