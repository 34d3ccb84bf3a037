"""How large are weights and gradients while they train, and how fast do they move?"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_regularize import quantities
from lightning_regularize._checks import check_number
from lightning_regularize._reading import Reading
from lightning_regularize._sharding import gradient_of, is_elsewhere
from lightning_regularize._steps.targets import Targets
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.run import group_labels, logs_now
from lightning_regularize._trainer.strategies import deepspeed_keeper, held_parameters, hides_gradients, torch_optimizer
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.decay_methods import will_move
from lightning_regularize.histograms import BINS
from lightning_regularize.norms import check_norm_type
from lightning_regularize.quantities import QUANTITIES
from lightning_regularize.selection import require_matches

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize._steps.watch import Watch
    from lightning_regularize.histograms import Histogram
    from lightning_regularize.selection import ParameterInfo, Rule

_DETAILS = ("total", "group", "module", "parameter")
_NO_SETTINGS: dict[str, Any] = {"rule": "", "lr": 0.0, "weight_decay": 0.0, "momentum": 0.0, "betas": None}
_TOTAL = re.compile(r"(optimizer\d+ )?total")  # parts of the model may be called so as well
_BESIDE = (  # keys that come with quantities
    "gradient_nonfinite",
    "weight_nonfinite",
    "below_threshold",
    "timescale_epochs",
    "weight_histogram",
    "gradient_histogram",
)
_BYTES = 16 * BINS  # of a histogram on disk: a count and an edge a bin


class WeightNormMonitor(Regularizer):
    r"""Logs how large weights and gradients are, and how far a step moves the weights.

    .. math:: \lVert w \rVert_p = \bigl(\sum_i |w_i|^p\bigr)^{1/p}

    Keys are ``<quantity>/<part>``. The part ``total`` is always there; ``detail`` adds parts such as
    ``weight_norm/net.0.weight``. With several optimizers each has its own total, ``weight_norm/optimizer0 total``.
    All go to all loggers on the step axis of ``train_loss``, totals also to ``trainer.callback_metrics``. Only
    trainable parameters count, and only what is asked for is computed, on the steps that are logged.

    ===================  ==================  =====================================================================
    ``quantities``       key                 what it is, for the elements of a part
    ===================  ==================  =====================================================================
    ``weight``           weight_norm         norm of the weights as the step finds them
    ``rms``              rms                 root of their mean square
    ``gradient``         gradient_norm       norm of the gradient, unscaled, before clipping
    ``update``           update_norm         norm of what the step changes; 0 if a GradScaler skips it
    ``ratio``            ratio               update norm over weight norm; about 1e-3 is healthy
    ``angle``            angle               angle between the weights before and after the step, in radians
    ``sparsity``         sparsity            share of exact zeros
    ``stable_rank``      stable_rank         :math:`\lVert W\rVert_F^2 / \sigma_1^2`, of matrices (kernels flattened)
    ``effective_decay``  effective_decay     lr times weight decay, the share that a decoupled step removes
    ``timescale``        timescale           over how many steps the decay acts, 1 / (lr * weight decay)
    ===================  ==================  =====================================================================

    Beside them: ``gradient_nonfinite/total`` and, where there are any, ``weight_nonfinite/total`` count elements that
    are NaN or infinite; ``below_threshold`` goes with ``sparsity``, and ``timescale_epochs`` with ``timescale``. The
    stable rank of several matrices is that of a matrix with these as diagonal blocks. Effective decay and timescale
    are means over the elements that decay at all.

    All but two cost one read of weights or gradients; ``update``, ``ratio`` and ``angle`` keep a copy of the weights
    during a logged step, and ``stable_rank`` reads each matrix 64 times and gathers it where it is sharded.

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
        self.every_n_steps = None if every_n_steps is None else _positive_integer(every_n_steps, "every_n_steps")
        self.quantities = _check_quantities(quantities)
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
        self.max_keys = _positive_integer(max_keys, "max_keys")
        self.max_histogram_megabytes = max_histogram_megabytes
        self._needs = self._sums()

    def _sums(self) -> set[str]:
        """The names of the sums that the quantities are made of."""
        needs = set().union(*(QUANTITIES[quantity].needs for quantity in self.quantities))
        if self.expected:
            needs.add("weight_square")
        if self.threshold is not None and "sparsity" in self.quantities:
            needs.add("below")
        if needs & {"weight_power", "weight_square", "zeros"}:
            needs.add("weight_nonfinite")
        return needs

    # -- when ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not trainer.loggers:
            raise MisconfigurationException(
                "WeightNormMonitor has nowhere to log to: give the Trainer a logger, or take the callback out."
            )

    def check(self, run: Run) -> None:
        self._seen: set[int] = set()
        self._readings: dict[int, tuple[Watch, Reading, dict[str, dict[str, Any]]]] = {}
        self._histogram_bytes = 0
        if run.trainer is None:
            raise TypeError("WeightNormMonitor logs to the loggers of a Trainer, and cannot be attached without one.")
        if self.histograms and not any(map(loggers.shows_histograms, run.trainer.loggers)):
            names = ", ".join(type(logger).__name__ for logger in run.trainer.loggers)
            self.warn(f"WeightNormMonitor draws no histograms: {names} has no place for them.")

    def begin(self, run: Run) -> None:
        self._sharding = run.sharding()
        infos = run.infos()
        try:
            require_matches(self.include, infos, argument="include")
            require_matches(self.exclude, infos, argument="exclude")
        except ValueError as error:
            raise ValueError(f"WeightNormMonitor: {error}") from error
        self._targets: Targets[ParameterInfo] = Targets(run.infos, self._learn)
        if run.trainer.is_global_zero:
            keys = [QUANTITIES[quantity].key for quantity in self.quantities]
            loggers.define_step_axis(run.trainer.loggers, [*keys, *_BESIDE])

    def _learn(self, info: ParameterInfo) -> ParameterInfo | None:
        return info if self.selects(info) else None

    def on_gradients(self, step: Step) -> None:
        """Gradients are complete here, and not yet clipped."""
        watch, trainer = step.watch, self.run.trainer
        self._seen.add(watch.index)
        if not logs_now(trainer, self.every_n_steps):
            return
        if watch.index not in self._readings:  # LBFGS evaluates its closure again: the first time counts
            self._logged[watch.index] = watch.steps
            self._readings[watch.index] = watch, self._read(trainer, step), self._settings(trainer, watch)

    def after_step(self, step: Step, *, is_real: bool) -> None:
        """Of several inner optimizers the last one completes the change."""
        if is_real and step.watch.index in self._readings and step.optimizer is step.watch.leaves[-1]:
            self._readings[step.watch.index][1].read_changes()

    def after_batch(self, trainer: pl.Trainer) -> None:
        """All optimizers have stepped: one transfer to the host, and one row, for all."""
        if not self._readings:
            return
        readings, self._readings = self._readings, {}
        for _, reading, _settings in readings.values():
            # DeepSpeed writes the module's weights after its optimizer's step; of a step that was skipped: no change.
            reading.read_changes()
        numbers = iter(torch.cat([reading.reduced() for _, reading, _settings in readings.values()]).tolist())
        totals: dict[str, float] = {}
        details: dict[str, float] = {}
        drawn: dict[str, Histogram] = {}
        for watch, reading, settings in readings.values():
            sums, pictures = reading.rows(numbers)
            self._complete(sums, settings)
            self._name(watch, sums, totals, details)
            drawn |= pictures
        loggers.gather(trainer, totals, details=self._at_most(details), histograms=self._affordable(drawn))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Optimizers that take turns may all have stepped on other batches than those that are logged."""
        for index in sorted(self._seen - set(self._logged)) if self._logged else ():
            self.warn(
                f"WeightNormMonitor logged nothing of optimizer {index}, which never stepped on a batch that is "
                "logged: choose another `every_n_steps`."
            )

    def end(self, run: Run) -> None:
        self._readings = {}

    # -- on what -----------------------------------------------------------------------------------------------------

    def _read(self, trainer: pl.Trainer, step: Step) -> Reading:
        """Whatever can be known before the step; nothing waits for the device."""
        infos = self._of_optimizer(step.watch)
        parameters = {info.name: info.parameter for info in infos}
        reading = Reading(parameters, self._sharding, self._needs, self.norm_type)
        reading.read_weights(self.threshold)
        if self.histograms:
            reading.draw("weight", list(parameters.values()))
        if "gradient" in self.quantities:
            is_hidden = hides_gradients(trainer)
            gradients = [None if is_hidden else gradient_of(parameter) for parameter in parameters.values()]
            reading.read_gradients(gradients, step.scale)
            if self.histograms:
                reading.draw("gradient", gradients, step.scale)
        if "stable_rank" in self.quantities:
            reading.read_spectra([self._is_matrix(info) for info in infos])
        reading.keep_weights()
        return reading

    def _of_optimizer(self, watch: Watch) -> list[ParameterInfo]:
        for leaf in watch.leaves:  # layers may have been replaced
            self._targets.of(leaf)
        trainable = [info for info in self._targets if info.parameter.requires_grad]
        readable = [info for info in trainable if not is_elsewhere(info.parameter)]
        if len(readable) < len(trainable):
            self.warn(
                "DeepSpeed has put parameters on a disk, where WeightNormMonitor cannot read them; it leaves them out."
            )
        if len(self.run.watches) == 1:
            return readable
        held = {id(p) for leaf in watch.leaves for group in leaf.param_groups for p in group["params"]}
        return [info for info in readable if id(info.parameter) in held]

    def _is_matrix(self, info: ParameterInfo) -> bool:
        if len(info.shape) < 2 or 0 in info.shape:
            return False
        if self._sharding.is_flat(info.parameter):
            self.warn(
                "WeightNormMonitor logs no stable rank of what FSDP1 or ZeRO-3 has cut into flat pieces; use FSDP2."
            )
            return False
        return True

    def _settings(self, trainer: pl.Trainer, watch: Watch) -> dict[str, dict[str, Any]]:
        """What the optimizer's groups say of each parameter, and what WeightDecay says."""
        if deepspeed_keeper(trainer):  # which has the gradients to itself
            optimizer, held = torch_optimizer(watch.optimizer), held_parameters(trainer.optimizers[watch.index])
            of_groups = zip(trainer.optimizers[watch.index].param_groups, held, strict=True)
            by_id = {id(p): quantities.settings(optimizer, group) for group, params in of_groups for p in params}
        else:
            # What has no gradient neither moves nor decays; the piece of a parameter that is empty need not have one.
            by_id = {
                id(p): found
                for leaf in watch.leaves
                for group in leaf.param_groups
                for found in [quantities.settings(leaf, group)]
                for p in group["params"]
                if will_move(leaf, p) or not p.numel()
            }
        named = {info.name: by_id[id(info.parameter)] for info in self._targets if id(info.parameter) in by_id}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, WeightDecay):
                continue
            method = callback.decay_method
            for info, _, _, value, _, _ in callback.by_parameter():
                if not method.knows_share:
                    named.pop(info.name, None)
                elif info.name in named:
                    found = named[info.name]
                    named[info.name] = found | {"weight_decay": value, "lr": method.rate(found["lr"])}
        return named

    def _complete(self, rows: dict[str, dict[str, float]], settings: dict[str, dict[str, Any]]) -> None:
        """Add the sums that are known without reading a tensor."""
        shapes = {info.name: info.shape for info in self._targets}
        for name, row in rows.items():
            size, found = float(math.prod(shapes[name])), settings.get(name, _NO_SETTINGS)
            row |= quantities.known_sums(row, size, found, expected=self.expected, norm_type=self.norm_type)

    # -- under which names -------------------------------------------------------------------------------------------

    def _name(
        self, watch: Watch, sums: dict[str, dict[str, float]], totals: dict[str, float], details: dict[str, float]
    ) -> None:
        trainer, prefix = self.run.trainer, f"{label} " if (label := self.run.label(watch)) else ""
        total = quantities.combined(sums.values(), self.norm_type)
        if not sums:
            self.warn(
                f"WeightNormMonitor logs nothing of optimizer {watch.index}: it holds no parameter that is watched."
            )
            return
        if "gradient" in self.quantities and not total["gradient_size"]:
            self.warn("WeightNormMonitor logs no gradient norm: no parameter that it watches has a gradient.")
        totals |= self._values(f"{prefix}total", total, trainer)
        if total.get("gradient_size"):
            totals[f"gradient_nonfinite/{prefix}total"] = total["gradient_nonfinite"]
        if total.get("weight_nonfinite"):
            totals[f"weight_nonfinite/{prefix}total"] = total["weight_nonfinite"]
        for part, names in self._parts(watch, list(sums)).items():
            values = self._values(part, quantities.combined((sums[name] for name in names), self.norm_type), trainer)
            taken = any(key in details for key in values)  # by another optimizer with a part of that name
            details |= {f"{key.replace('/', f'/{prefix}', 1)}": v for key, v in values.items()} if taken else values

    def _values(self, part: str, sums: dict[str, float], trainer: pl.Trainer) -> dict[str, float]:
        """Keys and values of one part."""
        steps = _steps_per_epoch(trainer)
        found = quantities.values_of(sums, self.quantities, expected=self.expected, steps_per_epoch=steps)
        return {key.replace("/", f"/{part}/", 1) if "/" in key else f"{key}/{part}": v for key, v in found.items()}

    def _parts(self, watch: Watch, names: list[str]) -> dict[str, list[str]]:
        """The names of the parameters behind each part that ``detail`` asks for."""
        if self.detail == "total":
            return {}
        if self.detail == "parameter":
            of = {name: name for name in names}
        elif self.detail == "module":
            of = {name: _owner(name) for name in names}
        else:
            labels = group_labels(watch.optimizer, self.run.label(watch))
            of_groups = zip(labels, held_parameters(watch.optimizer), strict=True)
            by_id = {id(p): label for label, parameters in of_groups for p in parameters}
            infos = [info for info in self._targets if info.name in names and id(info.parameter) in by_id]
            of = {info.name: by_id[id(info.parameter)] for info in infos}
        parts: dict[str, list[str]] = {}
        for name, part in of.items():
            own = f"{part} ({self.detail})" if _TOTAL.fullmatch(part) else part
            parts.setdefault(own, []).append(name)
        return parts

    # -- within limits -----------------------------------------------------------------------------------------------

    def _at_most(self, details: dict[str, float]) -> dict[str, float]:
        if len(details) > self.max_keys:
            self.warn(
                f"WeightNormMonitor logs {self.max_keys} of {len(details)} keys a step: "
                "ask for less `detail`, `include` less, or raise `max_keys`."
            )
        return dict(itertools.islice(details.items(), self.max_keys))

    def _affordable(self, drawn: dict[str, Histogram]) -> dict[str, Histogram]:
        if drawn and self._histogram_bytes + len(drawn) * _BYTES > self.max_histogram_megabytes * 1e6:
            self.warn(
                f"WeightNormMonitor draws no more histograms: there are {self._histogram_bytes / 1e6:.0f} MB of them. "
                "Draw them more rarely, `include` less, or raise `max_histogram_megabytes`."
            )
            return {}
        self._histogram_bytes += len(drawn) * _BYTES
        return dict(itertools.islice(drawn.items(), self.max_keys))


def _owner(name: str) -> str:
    """The module that a parameter belongs to; a parametrization's, to the module that is parametrized."""
    module, _, parametrization = name.partition("parametrizations.")
    return (module.rstrip(".") if parametrization else name.rpartition(".")[0]) or "_root_"


def _steps_per_epoch(trainer: pl.Trainer) -> float:
    batches = trainer.num_training_batches
    return batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def _check_quantities(asked: Sequence[str]) -> tuple[str, ...]:
    expected = f"`quantities` should be some of {', '.join(QUANTITIES)}, got {asked!r}."
    if isinstance(asked, str) or not asked or not all(isinstance(quantity, str) for quantity in asked):
        raise ValueError(expected + (f" Write ({asked!r},)." if asked in list(QUANTITIES) else ""))
    if unknown := [quantity for quantity in asked if quantity not in QUANTITIES]:
        close = difflib.get_close_matches(str(unknown[0]), QUANTITIES, n=1)
        raise ValueError(expected + (f" Did you mean {close[0]!r}?" if close else ""))
    return tuple(dict.fromkeys(asked))


def _positive_integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` should be a positive integer, got {value!r}.")
    return value
