"""Weight decay on a schedule, and only where it belongs."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_warn

from lightning_regularize import _stepping
from lightning_regularize._configuring import Configuring, check_numbers, model_root, number_states
from lightning_regularize._sharding import Sharding, local_tensor, settle_gradient_
from lightning_regularize.callbacks._choosing import check_real
from lightning_regularize.decay import HALF, couple_
from lightning_regularize.groups import (
    Grouping,
    Plan,
    adapt_state_dict,
    check_something_decays,
    extend_plan_,
    plan_groups,
    repair_scheduler_,
    rule_name,
    saved_layout_of,
)
from lightning_regularize.manners import Cautious, Decoupled, Independent, Manner, Stable, Target
from lightning_regularize.schedules import Constant, Schedule, as_schedule, value_at
from lightning_regularize.selection import DEFAULT_EXCLUDE, ParameterInfo, parameter_infos
from lightning_regularize.theory import decay_rounding_threshold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import lightning.pytorch as pl
    from torch.optim import Optimizer

    from lightning_regularize.schedules import Position
    from lightning_regularize.selection import Rule


_METHODS = ("optimizer", "decoupled", "coupled", "independent", "cautious", "stable")
_CONSTRUCTED = ("schedule", "grouping", "total_steps", "method", "rounding", "seed")


# What the user gave each group, for a callback that finds groups which another one has written to: an optimizer that is
# made in the module's `__init__` lives through several runs.
_GIVEN: WeakKeyDictionary[Optimizer, list[float]] = WeakKeyDictionary()


class WeightDecay(Callback):
    r"""Sets the optimizer's weight decay, on a schedule if you like, without decaying biases and norms.

    The optimizer's own ``weight_decay`` does the work, so that its kernels keep their speed and the result is bit for
    bit that of hand-made groups. While ``configure_optimizers`` runs, groups are split into decay and no-decay parts;
    LR schedulers of any kind find a rate for each. At step ``k`` a group decays by

    .. math:: \lambda_k = f_g \cdot \mathrm{schedule}(k)

    where :math:`f_g` is the group's factor: 0 where excluded, what ``factors`` says, and the ratio that the user's own
    groups have (a group given weight decay 0 beside others with some stays at 0; if no group of an optimizer has any,
    each has factor 1). Logged as ``weight_decay/<group>`` whenever Lightning logs.

    Args:
        weight_decay: A number of at least 0, a :class:`~lightning_regularize.schedules.Schedule`, or any callable from
            a :class:`~lightning_regularize.schedules.Position` to a number. The first step uses the schedule's first
            value and the last step its last; steps are the optimizer's, whatever the accumulation.
        exclude: Rules for what does not decay. What a model itself declares (``no_weight_decay()``) never does.
        factors: Rule -> factor on the weight decay, first match wins, e.g. ``{"encoder.*": 0.1}``.
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.
        method: Who decays, and how. ``"optimizer"``: the optimizer's own weight decay. With all others this callback
            does, the optimizer's own is set to 0, and any optimizer will do, also one without ``weight_decay``:
            ``"decoupled"`` as AdamW, by ``lr * weight_decay``; ``"coupled"`` as the gradient of an L2 penalty;
            ``"independent"``, by ``weight_decay`` whatever the learning rate; ``"cautious"``, decoupled where update
            and weight agree; ``"stable"``, decoupled and scaled to the real step size (SGD and Adam only). See
            :mod:`lightning_regularize.manners`. Callbacks that read weights before a step see them before it decays if
            they stand before this one.
        rounding: ``"nearest"``, as optimizers do; ``"stochastic"`` for half-precision weights and the methods
            ``"decoupled"`` and ``"independent"``: rounded to nearest, ``w * (1 - lr * weight_decay)`` is ``w`` again
            below :math:`2^{-9}` in bfloat16 and :math:`2^{-12}` in float16, and nothing decays.
        seed: Of stochastic rounding.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import WeightDecay
        >>> from lightning_regularize.schedules import Cosine
        >>> trainer = Trainer(callbacks=[WeightDecay(Cosine(0.04, 0.4))], logger=False, accelerator="cpu")

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021: 0.04 to 0.4.
    """

    def __init__(
        self,
        weight_decay: float | Schedule | Callable[[Position], float],
        *,
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        factors: Mapping[Any, float] | None = None,
        total_steps: int | None = None,
        method: Literal["optimizer", "decoupled", "coupled", "independent", "cautious", "stable"] = "optimizer",
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = as_schedule(weight_decay, name="weight_decay")
        self.grouping = Grouping(exclude, {} if factors is None else factors)
        self.total_steps = total_steps
        if method not in _METHODS:
            raise ValueError(f"`method` should be one of {_METHODS}, got {method!r}.")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"`rounding` should be 'nearest' or 'stochastic', got {rounding!r}.")
        if rounding == "stochastic" and method not in ("decoupled", "independent"):
            raise ValueError(f"`rounding='stochastic'` needs method='decoupled' or 'independent', got {method!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` should be an integer of at least 0, got {seed!r}.")
        self.method, self.rounding, self.seed = method, rounding, seed
        self._clock = _stepping.Clock(self.schedule, total_steps)
        self._plans: list[tuple[Optimizer, Plan]] = []
        self._begin_run()

    def _begin_run(self) -> None:
        self._configuring: Configuring | None = None
        self._hooks: list[Any] = []
        self._infos: dict[int, ParameterInfo] = {}
        self._saved_layouts: list[list[list[str]]] = []
        self._steps: _stepping.RealSteps | None = None
        self._manner: Manner | None = None
        self._told_rounding = self._told_uncounted = self._has_half = False
        self._rearranged: dict[int, tuple[list[int], list[dict[str, Any]]]] = {}
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as for spawned processes, is of the callback and not of a run."""
        return {key: self.__dict__[key] for key in _CONSTRUCTED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clock, self._plans = _stepping.Clock(self.schedule, self.total_steps), []
        self._begin_run()

    # -- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._undo()  # an exception may have ended the fit before
        self._begin_run()
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, WeightDecay)]
        if len(others) > 1:
            raise MisconfigurationException(
                f"{len(others)} WeightDecay callbacks would write over each other. Use one, with `factors`."
            )
        monitors = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, LearningRateMonitor)]
        if any(monitor.log_weight_decay for monitor in monitors) and not isinstance(self.schedule, Constant):
            rank_zero_warn("LearningRateMonitor stands before WeightDecay and will log the values of the step before.")
        self._trainer, self._module = trainer, pl_module
        self._configuring = Configuring(pl_module, self._split)

    def _split(self, module: pl.LightningModule, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        """As ``configure_optimizers`` returns, so that schedulers and strategies see the final groups."""
        self._learn_parameters()
        plans = []
        for i, optimizer in enumerate(optimizers):
            if self.method == "optimizer":
                check_has_weight_decay(optimizer)
            plan = next((plan for known, plan in self._plans if known is optimizer), None)
            if plan is None or len(plan.layout) != len(optimizer.param_groups):
                _put_back_given_(optimizer)
                given = [float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
                before = [dict(group) for group in optimizer.param_groups]
                prefix = f"optimizer{i}" if len(optimizers) > 1 else ""
                by_optimizer = self.method == "optimizer"
                plan = plan_groups(optimizer, self.grouping, self._infos, prefix, split=by_optimizer)
                _GIVEN[optimizer] = [given[origin] for origin in plan.origins]
                _repair(schedulers, optimizer, plan.origins, before)
            plans.append((optimizer, plan))  # known ones were made in the module's __init__ and have trained before
        if self.method == "optimizer":
            self._check_groups_decay([factor for _, plan in plans for factor in plan.factors])
        self._plans = plans

    def _check_groups_decay(self, factors: list[float]) -> None:
        decaying = [info for info in self._infos.values() if self.grouping.decide(info)[0]]
        if factors and not any(factors) and any(info.parameter.requires_grad for info in decaying):
            raise MisconfigurationException(
                "Weight decay is positive, but nothing decays: each parameter in the optimizer's groups is excluded, "
                "or in a group that was given weight decay 0 beside others with some. Change the groups or `exclude`."
            )

    def _learn_parameters(self) -> None:
        infos = parameter_infos(model_root(self._trainer, self._module))
        self.grouping.check(infos)
        if self.schedule != Constant(0.0):
            check_something_decays(self.grouping, infos)
        self._infos = {id(info.parameter): info for info in infos}
        self._has_half = any(info.parameter.dtype in HALF for info in infos)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The optimizers exist, nothing is restored yet."""
        if not _stepping.has_optimizer(trainer):
            rank_zero_warn("WeightDecay does nothing: `configure_optimizers` returned no optimizer.")
            return
        optimizers = [_stepping.torch_optimizer(optimizer) for optimizer in trainer.optimizers]
        if [id(o) for o in optimizers] != [id(o) for o, _ in self._plans]:  # set on the strategy by hand
            self._split(pl_module, optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])
        self._clock.note_rates(trainer)
        self._ready = True
        for i, optimizer in enumerate(optimizers):
            # First, so that whoever else checks the state finds it in the layout of the groups.
            adapter = self._checkpoint_adapter(i)
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(adapter, prepend=True))

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _checkpoint_adapter(self, index: int) -> Callable[[Optimizer, dict[str, Any]], dict[str, Any] | None]:
        def adapt(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            plan = self._plans[index][1]
            self._extend(optimizer, plan)  # BackboneFinetuning adds its groups again before the state is loaded
            saved = self._saved_layouts[index] if index < len(self._saved_layouts) else None
            adapted, origins = adapt_state_dict(state_dict, optimizer, plan, saved)
            if origins is not None:
                self._rearranged[index] = origins, state_dict["param_groups"]
            return adapted

        return adapt

    def state_dict(self) -> dict[str, Any]:
        arguments = {
            "weight_decay": repr(self.schedule),
            "exclude": repr([rule_name(rule) for rule in self.grouping.exclude]),
            "factors": repr({rule_name(rule): factor for rule, factor in self.grouping.factors.items()}),
        }
        return {
            # Without addresses: a function is another object in each process.
            "arguments": {key: re.sub(r" at 0x[0-9a-f]+", "", text) for key, text in arguments.items()},
            "layouts": [plan.layout for _, plan in self._plans],
            **self._clock.state_dict(),
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Splitting groups has changed the order of parameters, by which FSDP2 would tell them."""
        number_states(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """FSDP2 has loaded the optimizers' states by now.

        Raises:
            MisconfigurationException: It took moments of one parameter for those of another.
        """
        layouts = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("layouts", [])
        for i, (state, (_, plan)) in enumerate(zip(checkpoint.get("optimizer_states", ()), self._plans, strict=False)):
            layout = saved_layout_of(state, plan, layouts[i] if i < len(layouts) else None)
            check_numbers(trainer, pl_module, state, layout or [])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.load_state_dict(state_dict)
        self._saved_layouts = state_dict.get("layouts", [])
        now, then = self.state_dict()["arguments"], state_dict.get("arguments", {})
        changed = [f"{key}: {then[key]} then, {now[key]} now" for key in then if then[key] != now.get(key)]
        if changed:
            rank_zero_warn("WeightDecay differs from the checkpoint's and wins over it. " + "; ".join(changed) + ".")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is restored, the old values of the groups included, and nothing is trained yet."""
        if not self._ready:
            return
        for i, (origins, groups) in self._rearranged.items():
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            _repair(schedulers, self._plans[i][0], origins, groups)
        self._rearranged.clear()
        self._clock.start(trainer)
        self._take_over(trainer)
        self._write_all(trainer)

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """So that monitors which log now, such as LearningRateMonitor, show the value that the next step uses."""
        self._write_all(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """As at the start of an epoch."""
        self._write_all(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """The step uses what stands in the groups after this."""
        if not self._ready:
            return
        index = self._clock.begin(trainer, optimizer)
        self._write(trainer, index)
        if self._steps is not None:
            self._steps.announce(trainer, optimizer)
        if self.method == "coupled" and not _stepping.is_accumulating(trainer):
            self._couple(trainer, index)
        if _stepping.logs_now(trainer):
            labels = _stepping.group_labels(trainer, index)
            pl_module.log_dict(
                {f"weight_decay/{label}": v for label, v in zip(labels, self._values(trainer, index), strict=True)}
            )

    def _write_all(self, trainer: pl.Trainer) -> None:
        for index in range(len(self._plans) * self._ready):
            self._write(trainer, index)

    def _values(self, trainer: pl.Trainer, index: int) -> list[float]:
        """The weight decay of each group at the optimizer's present or next step."""
        optimizer, plan = self._plans[index]
        values = []
        for i, (group, factor) in enumerate(zip(optimizer.param_groups, plan.factors, strict=True)):
            if not factor:
                values.append(0.0)
                continue
            at = self._clock.position(trainer, index, i)
            values.append(factor * value_at(self.schedule, at))
            if self._has_half:
                self._tell_rounding(group, values[-1] * (1.0 if self.method == "independent" else at.peak_lr))
        return values

    def by_parameter(self, trainer: pl.Trainer) -> dict[str, tuple[float, float]]:
        """The weight decay of each parameter at its optimizer's present or next step, and its factor in it.

        Args:
            trainer: Between ``on_train_start`` and the end of training.

        Returns:
            By canonical name, whoever applies it.
        """
        rule = {info.name: self.grouping.decide(info)[0] for info in self._infos.values()}
        found = {}
        for index, (_, plan) in enumerate(self._plans):
            for names, value, factor in zip(plan.layout, self._values(trainer, index), plan.factors, strict=True):
                for name in names:
                    own = 1.0 if self.method == "optimizer" else rule.get(name, 0.0)  # else the groups are not split
                    found[name] = value * own, factor * own
        return found

    def _write(self, trainer: pl.Trainer, index: int) -> None:
        optimizer, plan = self._plans[index]
        self._extend(optimizer, plan)
        for group, scheduled in zip(optimizer.param_groups, self._values(trainer, index), strict=True):
            _set_weight_decay_(group, scheduled if self.method == "optimizer" else 0.0)

    def _extend(self, optimizer: Optimizer, plan: Plan) -> None:
        """Groups may have been added since, as BackboneFinetuning does, and with weight decay on everything.

        Raises:
            MisconfigurationException: Groups were removed.
        """
        if len(optimizer.param_groups) == len(plan.layout):
            return
        self._learn_parameters()  # modules may be new
        if len(optimizer.param_groups) < len(plan.layout):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} had {len(plan.layout)} parameter groups and now has "
                f"{len(optimizer.param_groups)}: groups may be added during training, not removed."
            )
        before = [dict(group) for group in optimizer.param_groups]
        split = self.method == "optimizer"
        origins = extend_plan_(plan, optimizer, self.grouping, self._infos, split=split)
        _repair([c.scheduler for c in self._trainer.lr_scheduler_configs], optimizer, origins, before)

    # -- where the optimizer does not decay by itself ------------------------------------------------------------------

    def _take_over(self, trainer: pl.Trainer) -> None:
        if self.method == "optimizer":
            if not self._module.automatic_optimization and not isinstance(self.schedule, Constant):
                for i, (optimizer, _) in enumerate(self._plans):
                    self._hooks.append(optimizer.register_step_post_hook(partial(self._tell_uncounted, i)))
            return
        if self.method == "coupled":
            _stepping.check_gradients_are_the_modules(trainer, "WeightDecay(method='coupled')")
            self._steps = _stepping.RealSteps(trainer, "WeightDecay", before=lambda _: None)
            return
        _stepping.check_weights_are_the_optimizers(trainer, f"WeightDecay(method={self.method!r})")
        if self.method in ("cautious", "stable"):
            decaying = [info for info in self._infos.values() if self.grouping.decide(info)[0]]
            check_real(decaying, f"WeightDecay(method={self.method!r})")
        self._manner = manner = self._make_manner(trainer)
        for optimizer, _ in self._plans:
            if reason := manner.refuse(optimizer):
                raise MisconfigurationException(reason)

        def act(when: Callable[[Optimizer, Sequence[Target], int], None], index: int) -> None:
            when(self._plans[index][0], self._targets(trainer, index), self._clock.step(trainer, index))

        self._steps = _stepping.RealSteps(
            trainer, "WeightDecay", before=partial(act, manner.before), after=partial(act, manner.after)
        )

    def _tell_uncounted(self, index: int, optimizer: Optimizer, *_: Any) -> None:
        if not self._told_uncounted and not self._clock.is_stepping(self._trainer, index):
            self._told_uncounted = True
            rank_zero_warn(
                f"{type(optimizer).__name__} was stepped past Lightning, which does not count such steps, so that the "
                "weight decay stands still meanwhile. In manual optimization step what `self.optimizers()` returns."
            )

    def _make_manner(self, trainer: pl.Trainer) -> Manner:
        if self.method == "decoupled":
            return Decoupled(stochastic=self.rounding == "stochastic", seed=self.seed)
        if self.method == "independent":
            return Independent(stochastic=self.rounding == "stochastic", seed=self.seed)
        if self.method == "cautious":
            return Cautious()
        return Stable(Sharding(model_root(trainer, self._module)))

    def _targets(self, trainer: pl.Trainer, index: int) -> list[Target]:
        """What decays in a step of one optimizer: parameters with a gradient, as for the optimizers themselves."""
        targets = []
        optimizer, _ = self._plans[index]
        for group, value in zip(optimizer.param_groups, self._values(trainer, index), strict=True):
            for parameter in group["params"]:
                info = self._infos.get(id(parameter))
                factor = self.grouping.decide(info)[0] if info is not None else 0.0
                if info is not None and factor * value and _stepping.will_move(optimizer, parameter):
                    targets.append(Target(info.name, parameter, group, factor * value))
        return targets

    def _couple(self, trainer: pl.Trainer, index: int) -> None:
        scaler = _stepping.loss_scaler(trainer, trainer.optimizers[index])
        for target in self._targets(trainer, index):
            weight, gradient = local_tensor(target.parameter), settle_gradient_(target.parameter)
            if gradient is None:  # LBFGS may decay what has none
                continue
            value: Any = -target.weight_decay if target.group.get("maximize") else target.weight_decay
            if scaler is not None:
                value = scaler.scale(torch.tensor(value, dtype=torch.float32, device=weight.device))
            couple_(local_tensor(gradient), weight, value)

    def _tell_rounding(self, group: Mapping[str, Any], share: float) -> None:
        """Once, if at the group's peak rate decay would round to nothing in half precision."""
        if self._told_rounding or self.rounding == "stochastic" or not share or self.method in ("coupled", "stable"):
            return  # of stable decay nobody knows the share before the step
        if self.method == "optimizer" and group.get("fused"):
            return  # a fused kernel rounds once, with the gradient's noise in it
        for dtype in {parameter.dtype for parameter in group["params"]} & set(HALF):
            if share < decay_rounding_threshold(dtype):
                self._told_rounding = True
                what = "weight_decay" if self.method == "independent" else "lr * weight_decay"
                rank_zero_warn(
                    f"Weight decay does nothing here: {what} is {share:.2g} at its peak, and {dtype} weights stay as "
                    f"they are below {decay_rounding_threshold(dtype):.2g}. Use WeightDecay(..., method='decoupled', "
                    "rounding='stochastic'), a fused optimizer, or float32 weights with precision='bf16-mixed'."
                )
                return

    # -- after training ----------------------------------------------------------------------------------------------

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._undo()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning calls no teardown after an exception."""
        self._undo()

    def _undo(self) -> None:
        if self._configuring is not None:
            self._configuring.undo()
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        if self._steps is not None:
            self._steps.remove()
            self._steps = None


def _put_back_given_(optimizer: Optimizer) -> None:
    given = _GIVEN.get(optimizer, ())
    if len(given) == len(optimizer.param_groups):
        for group, value in zip(optimizer.param_groups, given, strict=True):
            _set_weight_decay_(group, value)


def _set_weight_decay_(group: dict[str, Any], value: float) -> None:
    if isinstance(group.get("weight_decay"), torch.Tensor):
        group["weight_decay"].fill_(value)  # captured graphs and compiled steps hold this tensor
    elif "weight_decay" in group:
        group["weight_decay"] = value


def check_has_weight_decay(optimizer: Optimizer) -> None:
    """Refuse LBFGS, Rprop and other optimizers that know no weight decay.

    Raises:
        MisconfigurationException: A group has no ``weight_decay``.
    """
    if any("weight_decay" not in group for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} has no `weight_decay` of its own that could be set. "
            "Use WeightDecay(..., method='decoupled'), which decays by itself."
        )


def _repair(
    schedulers: Sequence[Any], optimizer: Optimizer, origins: Sequence[int], before: Sequence[Mapping[str, Any]]
) -> None:
    for scheduler in schedulers:
        if scheduler.optimizer is optimizer:
            repair_scheduler_(scheduler, origins, before)
