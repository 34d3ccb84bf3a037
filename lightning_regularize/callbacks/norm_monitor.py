"""How large are weights and gradients while they train, and how fast do they move?"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_regularize import _logging, _stepping, quantities
from lightning_regularize._configuring import model_root
from lightning_regularize._reading import Reading
from lightning_regularize._sharding import Sharding, gradient_of, is_elsewhere
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.groups import check_number
from lightning_regularize.histograms import BINS
from lightning_regularize.norms import NONFINITE, check_norm_type, count_below, power
from lightning_regularize.quantities import QUANTITIES
from lightning_regularize.selection import check_rules, matching, parameter_infos

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl
    from torch.optim import Optimizer

    from lightning_regularize.histograms import Histogram
    from lightning_regularize.norms import Statistic
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


class WeightNormMonitor(Callback):
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
        super().__init__()
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
        self.include = check_rules(include, argument="include")
        self.exclude = check_rules(exclude, argument="exclude")
        self.threshold = threshold
        self.expected = expected
        self.max_keys = _positive_integer(max_keys, "max_keys")
        self.max_histogram_megabytes = max_histogram_megabytes
        self._begin_run()

    def _begin_run(self) -> None:
        self._infos: list[ParameterInfo] = []
        self._sharding = Sharding()
        self._real_steps: _stepping.RealSteps | None = None
        self._logged: dict[int, int] = {}
        self._seen: set[int] = set()
        self._readings: dict[int, tuple[Reading, dict[str, dict[str, Any]]]] = {}
        self._told: set[str] = set()
        self._histogram_bytes = 0
        self._weights, self._gradients, self._changes = self._statistics()

    def _statistics(self) -> tuple[dict[str, Statistic], dict[str, Statistic], dict[str, Statistic]]:
        """What to find in weights, gradients and changes, by the name of the sum."""
        needs = set().union(*(QUANTITIES[q].needs for q in self.quantities))
        weights = {"weight_power": power(self.norm_type), "weight_square": power(2.0), "zeros": count_below()}
        weights = {name: statistic for name, statistic in weights.items() if name in needs}
        if self.expected:
            weights["weight_square"] = power(2.0)
        if self.threshold is not None and "sparsity" in self.quantities:
            weights["below"] = count_below(self.threshold)
        if weights:
            weights["weight_nonfinite"] = NONFINITE
        gradients = {"gradient_power": power(self.norm_type), "gradient_nonfinite": NONFINITE}
        changes = {"update_power": power(self.norm_type), "update_square": power(2.0)}
        return (
            weights,
            gradients if "gradient" in self.quantities else {},
            {name: statistic for name, statistic in changes.items() if name in needs},
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as for spawned processes, is of the callback and not of a run."""
        return {key: value for key, value in _stepping.without_module(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_run()

    # -- when --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._stop()
        self._begin_run()
        if not trainer.loggers:
            raise MisconfigurationException(
                "WeightNormMonitor has nowhere to log to: give the Trainer a logger, or take the callback out."
            )
        if self.histograms and not any(map(_logging.shows_histograms, trainer.loggers)):
            names = ", ".join(type(logger).__name__ for logger in trainer.loggers)
            rank_zero_warn(f"WeightNormMonitor draws no histograms: {names} has no place for them.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        root = model_root(trainer, pl_module)
        self._sharding = Sharding(root)
        self._infos = matching(parameter_infos(root), include=self.include, exclude=self.exclude)
        # DeepSpeed writes the module's weights when its optimizer has stepped: they are read when the batch ends.
        if self._changes and not _stepping.deepspeed_keeper(trainer):
            self._real_steps = _stepping.RealSteps(trainer, "WeightNormMonitor", after=self._after_step)
        if trainer.is_global_zero:
            keys = [QUANTITIES[quantity].key for quantity in self.quantities]
            _logging.define_step_axis(trainer.loggers, [*keys, *_BESIDE])

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are complete here, and not yet clipped."""
        if _stepping.is_accumulating(trainer):
            return
        index, step = _stepping.optimizer_index(trainer, optimizer), _stepping.logged_step(trainer)
        self._seen.add(index)
        if not _stepping.logs_now(trainer, self.every_n_steps):
            return
        if self._logged.get(index) != step:  # LBFGS evaluates its closure again: the first time counts
            self._logged[index] = step
            self._readings[index] = self._read(trainer, index), self._settings(trainer, index)

    def _after_step(self, index: int) -> None:
        if index in self._readings:
            self._readings[index][0].read_changes(self._changes)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """All optimizers have stepped: one transfer to the host, and one row, for all."""
        if not self._readings:
            return
        readings, self._readings = self._readings, {}
        for reading, _settings in readings.values():
            reading.read_changes(self._changes)  # of a step that was skipped: none
        numbers = iter(torch.cat([reading.reduced() for reading, _settings in readings.values()]).tolist())
        totals: dict[str, float] = {}
        details: dict[str, float] = {}
        drawn: dict[str, Histogram] = {}
        for index, (reading, settings) in readings.items():
            sums, pictures = reading.rows(numbers)
            self._complete(sums, settings)
            self._name(trainer, index, sums, totals, details)
            drawn |= pictures
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in totals.items()})
        if trainer.is_global_zero:
            scalars = totals | self._at_most(details)
            _logging.log(trainer.loggers, scalars, self._affordable(drawn), _stepping.logged_step(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Optimizers that take turns may all have stepped on other batches than those that are logged."""
        if not pl_module.automatic_optimization and not self._seen and trainer.fit_loop.total_batch_idx >= 0:
            self._tell(
                "WeightNormMonitor logged nothing, for Lightning has seen no step: in manual optimization step what "
                "`self.optimizers()` returns."
            )
        for index in sorted(self._seen - set(self._logged)) if self._logged else ():
            self._tell(
                f"WeightNormMonitor logged nothing of optimizer {index}, which never stepped on a batch that is "
                "logged: choose another `every_n_steps`."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning calls no teardown after an exception."""
        self._stop()

    def _stop(self) -> None:
        self._readings.clear()
        if self._real_steps is not None:
            self._real_steps.remove()
            self._real_steps = None

    # -- on what -----------------------------------------------------------------------------------------------------

    def _read(self, trainer: pl.Trainer, index: int) -> Reading:
        """Whatever can be known before the step; nothing waits for the device."""
        infos = self._of_optimizer(trainer, index)
        reading = Reading({info.name: info.parameter for info in infos}, self._sharding)
        reading.read_weights(self._weights)
        if self.histograms:
            reading.draw("weight", [info.parameter for info in infos])
        if self._gradients:
            hidden = _stepping.hides_gradients(trainer)
            gradients = [None if hidden else gradient_of(info.parameter) for info in infos]
            scaler, scale = _stepping.loss_scaler(trainer, trainer.optimizers[index]), None
            if scaler is not None and infos:
                scale = scaler.scale(torch.ones((), device=infos[0].parameter.device))  # no synchronization
            reading.read_gradients(
                gradients, self._gradients, scale, 1.0 if math.isinf(self.norm_type) else self.norm_type
            )
            if self.histograms:
                reading.draw("gradient", gradients, scale)
        if "stable_rank" in self.quantities:
            reading.read_spectra([self._is_matrix(info) for info in infos])
        if self._changes:
            reading.keep_weights()
        return reading

    def _of_optimizer(self, trainer: pl.Trainer, index: int) -> list[ParameterInfo]:
        trainable = [info for info in self._infos if info.parameter.requires_grad]
        readable = [info for info in trainable if not is_elsewhere(info.parameter)]
        if len(readable) < len(trainable):
            self._tell(
                "DeepSpeed has put parameters on a disk, where WeightNormMonitor cannot read them; it leaves them out."
            )
        if len(trainer.optimizers) == 1:
            return readable
        held = {id(p) for group in trainer.optimizers[index].param_groups for p in group["params"]}
        return [info for info in readable if id(info.parameter) in held]

    def _is_matrix(self, info: ParameterInfo) -> bool:
        if len(info.shape) < 2 or 0 in info.shape:
            return False
        if self._sharding.is_flat(info.parameter):
            self._tell(
                "WeightNormMonitor logs no stable rank of what FSDP1 or ZeRO-3 has cut into flat pieces; use FSDP2."
            )
            return False
        return True

    def _settings(self, trainer: pl.Trainer, index: int) -> dict[str, dict[str, Any]]:
        """What the optimizer's groups say of each parameter, and who decays in their stead."""
        optimizer = _stepping.torch_optimizer(trainer.optimizers[index])
        found = [quantities.settings(optimizer, group) for group in optimizer.param_groups]
        held = _stepping.held_parameters(trainer.optimizers[index])
        by_id = {id(p): setting for setting, parameters in zip(found, held, strict=True) for p in parameters}
        if not _stepping.deepspeed_keeper(trainer):  # which has the gradients to itself
            # What has no gradient neither moves nor decays; the piece of a parameter that is empty need not have one.
            moving = [p for group in held for p in group if _stepping.will_move(optimizer, p) or not p.numel()]
            by_id = {id(p): by_id[id(p)] for p in moving}
        named = {info.name: by_id[id(info.parameter)] for info in self._infos if id(info.parameter) in by_id}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightDecay) and callback.method != "optimizer":
                for name, (value, _) in callback.by_parameter(trainer).items():
                    if callback.method in ("cautious", "stable"):
                        named.pop(name, None)  # what these remove is known only after the step
                    elif name in named:
                        # Independent decay removes the weight decay itself, whatever the rate.
                        rate = {"lr": 1.0} if callback.method == "independent" else {}
                        named[name] = named[name] | {"weight_decay": value} | rate
        return named

    def _complete(self, rows: dict[str, dict[str, float]], settings: dict[str, dict[str, Any]]) -> None:
        """Add the sums that are known without reading a tensor."""
        shapes = {info.name: info.shape for info in self._infos}
        for name, row in rows.items():
            size, found = float(math.prod(shapes[name])), settings.get(name, _NO_SETTINGS)
            row |= quantities.known_sums(row, size, found, expected=self.expected, norm_type=self.norm_type)

    # -- under which names -------------------------------------------------------------------------------------------

    def _name(
        self,
        trainer: pl.Trainer,
        index: int,
        sums: dict[str, dict[str, float]],
        totals: dict[str, float],
        details: dict[str, float],
    ) -> None:
        prefix = f"optimizer{index} " if len(trainer.optimizers) > 1 else ""
        total = quantities.combined(sums.values(), self.norm_type)
        if not sums:
            self._tell(f"WeightNormMonitor logs nothing of optimizer {index}: it holds no parameter that is watched.")
            return
        if "gradient" in self.quantities and not total["gradient_size"]:
            self._tell("WeightNormMonitor logs no gradient norm: no parameter that it watches has a gradient.")
        totals |= self._values(f"{prefix}total", total, trainer)
        if total.get("gradient_size"):
            totals[f"gradient_nonfinite/{prefix}total"] = total["gradient_nonfinite"]
        if total.get("weight_nonfinite"):
            totals[f"weight_nonfinite/{prefix}total"] = total["weight_nonfinite"]
        for part, names in self._parts(trainer, index, list(sums)).items():
            values = self._values(part, quantities.combined((sums[name] for name in names), self.norm_type), trainer)
            taken = any(key in details for key in values)  # by another optimizer with a part of that name
            details |= {f"{key.replace('/', f'/{prefix}', 1)}": v for key, v in values.items()} if taken else values

    def _values(self, part: str, sums: dict[str, float], trainer: pl.Trainer) -> dict[str, float]:
        """Keys and values of one part."""
        steps = _steps_per_epoch(trainer)
        found = quantities.values_of(sums, self.quantities, expected=self.expected, steps_per_epoch=steps)
        return {key.replace("/", f"/{part}/", 1) if "/" in key else f"{key}/{part}": v for key, v in found.items()}

    def _parts(self, trainer: pl.Trainer, index: int, names: list[str]) -> dict[str, list[str]]:
        """The names of the parameters behind each part that ``detail`` asks for."""
        if self.detail == "total":
            return {}
        if self.detail == "parameter":
            of = {name: name for name in names}
        elif self.detail == "module":
            of = {name: _owner(name) for name in names}
        else:
            held = _stepping.held_parameters(trainer.optimizers[index])
            labels = _stepping.group_labels(trainer, index)
            by_id = {id(p): k for k, parameters in zip(labels, held, strict=True) for p in parameters}
            of = {i.name: by_id[id(i.parameter)] for i in self._infos if i.name in names and id(i.parameter) in by_id}
        parts: dict[str, list[str]] = {}
        for name, part in of.items():
            own = f"{part} ({self.detail})" if _TOTAL.fullmatch(part) else part
            parts.setdefault(own, []).append(name)
        return parts

    # -- within limits -----------------------------------------------------------------------------------------------

    def _at_most(self, details: dict[str, float]) -> dict[str, float]:
        if len(details) > self.max_keys:
            self._tell(
                f"WeightNormMonitor logs {self.max_keys} of {len(details)} keys a step: "
                "ask for less `detail`, `include` less, or raise `max_keys`."
            )
        return dict(itertools.islice(details.items(), self.max_keys))

    def _affordable(self, drawn: dict[str, Histogram]) -> dict[str, Histogram]:
        if drawn and self._histogram_bytes + len(drawn) * _BYTES > self.max_histogram_megabytes * 1e6:
            self._tell(
                f"WeightNormMonitor draws no more histograms: there are {self._histogram_bytes / 1e6:.0f} MB of them. "
                "Draw them more rarely, `include` less, or raise `max_histogram_megabytes`."
            )
            return {}
        self._histogram_bytes += len(drawn) * _BYTES
        return dict(itertools.islice(drawn.items(), self.max_keys))

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            rank_zero_warn(message)


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
        raise ValueError(expected)
    if unknown := [quantity for quantity in asked if quantity not in QUANTITIES]:
        close = difflib.get_close_matches(str(unknown[0]), QUANTITIES, n=1)
        raise ValueError(expected + (f" Did you mean {close[0]!r}?" if close else ""))
    return tuple(dict.fromkeys(asked))


def _positive_integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` should be a positive integer, got {value!r}.")
    return value
