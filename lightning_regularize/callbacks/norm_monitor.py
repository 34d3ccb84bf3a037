"""How large are weights and gradients while they train, and how fast do they move?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from lightning_regularize import group_settings
from lightning_regularize._checks import check_number, check_positive_integer, is_number, named_errors
from lightning_regularize._reading import Reading
from lightning_regularize._sharding import gradients_of
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.run import logs_now
from lightning_regularize._trainer.strategies import check_not_flat, hides_gradients
from lightning_regularize._used import used_weights
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._logged import NONFINITE, LoggedValues
from lightning_regularize.callbacks._monitored import Monitored, settings_of
from lightning_regularize.callbacks._saved import Value
from lightning_regularize.callbacks._start import Start
from lightning_regularize.norms import check_norm_type
from lightning_regularize.quantities import QUANTITIES, check_quantities, needed_sums
from lightning_regularize.selection import require_matches
from lightning_regularize.spikes import SpikeScores

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl
    from torch import Tensor

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize._steps.watch import Watch
    from lightning_regularize._used import Piece
    from lightning_regularize.callbacks._monitored import Row, Table
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.histograms import Histogram
    from lightning_regularize.selection import Rule

_DETAILS = ("total", "group", "module", "parameter")
# Keys that come with quantities.
_BESIDE = (*NONFINITE, "below_threshold", "timescale_epochs", "weight_histogram", "gradient_histogram")


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
    from, together. Effective decay and timescale are of the largest of them, and theory expects nothing of it. If it
    cannot be told which weight a layer uses, it is left out with a warning.

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
    ``distance``         distance            norm of what the weights have moved since the start of training
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
    where it is sharded. ``distance`` keeps a copy of the weights all the time, and whole in checkpoints, so that a
    resumed run has the same one; a weight that is new to an optimizer, is unfrozen or replaces another one is measured
    from where it was when it came. Where FSDP1 or ZeRO-3 cuts weights into flat pieces, ``distance`` is refused.

    Args:
        every_n_steps: Period in batches that step; None logs on the very steps on which Lightning logs.
        quantities: Any of the words above.
        detail: What is logged beside the total: nothing ("total"), or one value per parameter group,
            module or parameter.
        norm_type: ``p`` of weight, gradient and update norms, at least 1, or ``math.inf``.
        histograms: Whether to draw a histogram of each parameter, ``weight_histogram/<name>``, and of its gradient,
            ``gradient_histogram/<name>``, if that is among the quantities, in the loggers that can (TensorBoard,
            Weights & Biases).
        include: Rules for what is measured.
        exclude: Rules for what is not.
        threshold: If given, ``below_threshold/<part>`` is the share of weights of at most this magnitude.
        expected: Whether to log ``<quantity>/<part>/expected`` too (in MLflow with a space before the last word): where
            :mod:`~lightning_regularize.theory` sees the equilibrium of noise and weight decay, at the lr and weight
            decay of the step, for weights before a norm. Of AdamW, Lion and torch's Muon it is known for ``weight``,
            ``rms``, ``update``, ``ratio`` and ``angle``; of SGD as well if ``gradient`` is among the quantities. What
            does not decay counts as measured.
        spike_score: Whether to log ``<quantity>/<total>/spike_score`` too (in MLflow with a space before the last
            word): by how many standard deviations a total lies above the mean of its last 128 logged values that are
            finite, without itself. It begins when there are 16 of these, and is left out where they are all the same
            or the total is not finite. The values are in checkpoints.
        start_in_bfloat16: Whether ``distance`` keeps the start in bfloat16, which is half the memory of float32 and
            adds up to 0.2 % of the norm of the start to what is measured.
        max_keys: Details logged per step at most; a warning gives the number of keys.
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

    state_layouts: ClassVar[dict[str, Layout]] = {
        "spikes": {"*": [Value("a finite number", lambda value: is_number(value) and math.isfinite(value))]},
        "start": {"*": Value("a dense tensor", lambda v: isinstance(v, torch.Tensor) and v.layout is torch.strided)},
    }

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
        spike_score: bool = False,
        start_in_bfloat16: bool = False,
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
        flags = {"histograms": histograms, "expected": expected, "spike_score": spike_score}
        for name, flag in {**flags, "start_in_bfloat16": start_in_bfloat16}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"`{name}` should be True or False, got {flag!r}.")
        self.detail = detail
        self.norm_type = float(norm_type)
        self.histograms = histograms
        self.threshold = threshold
        self.expected = expected
        if start_in_bfloat16 and "distance" not in self.quantities:
            raise ValueError("`start_in_bfloat16` is for 'distance', which is not among `quantities`: add it.")
        self.spike_score = spike_score
        self.start_in_bfloat16 = start_in_bfloat16
        self.max_keys = check_positive_integer(max_keys, "`max_keys`")
        self.max_histogram_megabytes = max_histogram_megabytes
        self._needs = needed_sums(self.quantities, expected=expected, below=threshold is not None)
        self._needs_settings = expected or not {"effective_decay", "timescale"}.isdisjoint(self.quantities)

    # -- when ----------------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        self._seen: set[int] = set()  # indices of optimizers that stepped
        self._batches = 0
        self._readings: dict[int, _Read] = {}
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
        with named_errors("WeightNormMonitor"):
            require_matches(self.include, infos, argument="include")
            require_matches(self.exclude, infos, argument="exclude")
        self._monitored = Monitored(self, run)
        self._values = LoggedValues(self, run, SpikeScores(self._saved.get("spikes", {})))
        self._origin: Start | None = None
        if "distance" in self.quantities:
            check_not_flat(self._monitored.sharding, list(run.root.parameters()), "WeightNormMonitor's `distance`")
            saved = self._saved.get("start", {})
            self._origin = Start(saved, in_bfloat16=self.start_in_bfloat16)
            self._of_start: dict[int, Table] = {}  # what was looked at, by the index of an optimizer
            missing = [name for watch in run.watches for name in self._keep_start(watch)]
            if missing and any(run.steps):
                self.warn(
                    f"WeightNormMonitor finds no start of {len(missing)} weights such as {missing[0]!r} in the "
                    "checkpoint: their `distance` is from where they are now."
                )
        if run.trainer.is_global_zero:
            keys = [QUANTITIES[quantity].key for quantity in self.quantities]
            loggers.define_step_axis(run.trainer.loggers, [*keys, *_BESIDE])

    def on_gradients(self, step: Step) -> None:
        """Gradients are complete here, and not yet clipped."""
        watch, trainer = step.watch, self.run.trainer
        if self._origin is not None:
            self._keep_start(watch)
        self._seen.add(watch.index)
        # LBFGS evaluates its closure again: the first time counts.
        if logs_now(trainer, self.every_n_steps) and watch.index not in self._readings:
            self._logged[watch.index] = watch.steps
            table = self._monitored.of(watch)
            settings = settings_of(table.rows, trainer, watch) if self._needs_settings else None
            self._readings[watch.index] = _Read(watch, table, self._read(table, step), settings)

    def _keep_start(self, watch: Watch) -> list[str]:
        """Keep the start of weights that are new, before they move; see :meth:`Start.keep`."""
        table = self._monitored.of(watch)
        if self._origin is None or self._of_start.get(watch.index) is table:
            return []
        self._of_start[watch.index] = table
        return self._origin.keep([row.weight for row in table.rows if row.stands_for_weight])

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
            totals |= self._values.totals(watch, sums)
            details |= self._values.details(watch, table, sums, taken)
            drawn |= pictures
        details, drawn = self._values.at_most(details), self._values.affordable(drawn)
        loggers.gather(trainer, totals, details=details, histograms=drawn)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of optimizers that never stepped on a batch that is logged, or at all."""
        if self.run is None or trainer.fast_dev_run or not self._batches:  # type: ignore[attr-defined]
            return
        interval = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        name = "every_n_steps" if self.every_n_steps else "log_every_n_steps"
        if not self._seen:
            self.warn("WeightNormMonitor logged nothing: no optimizer of the Trainer made a step.")
        elif not interval:
            self.warn("WeightNormMonitor logged nothing: with `log_every_n_steps=0` no step is. Give `every_n_steps`.")
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

    def save(self) -> dict[str, Any]:
        state: dict[str, Any] = {"spikes": self._values.spikes.values()} if self.spike_score else {}
        return state if self._origin is None else {**state, "start": self._origin.save()}

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
            gradients: list[Tensor | None] = (
                [None] * len(rows) if is_hidden else gradients_of([row.parameter for row in rows])
            )
            reading.read_gradients(gradients, step.scale)
            if self.histograms:
                reading.draw("gradient", gradients, step.scale)
        if self._origin is not None:
            reading.read_distances(self._origin.of(rows, pieces))
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
        if "SGD" in unknown and "gradient" not in self.quantities:
            self.warn(
                "WeightNormMonitor: what is expected of weights that SGD decays depends on their gradients. Only "
                "measured values of them are logged: add 'gradient' to `quantities`."
            )
        if rules := ", ".join(sorted(unknown - {"SGD"})):
            self.warn(
                f"WeightNormMonitor: no expected values are known for weights that {rules} decays. Only measured "
                "values of them are logged."
            )
