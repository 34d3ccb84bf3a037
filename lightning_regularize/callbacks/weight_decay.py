"""Weight decay on a schedule, and only where it belongs."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary, WeakSet

from torch.utils.weak import WeakTensorKeyDictionary

from lightning_regularize._checks import check_rounding, is_named, named_errors
from lightning_regularize._steps.decaying import Decaying
from lightning_regularize._steps.group_decay import Given, GroupDecay
from lightning_regularize._steps.hooks import ATTRIBUTE, Step, hooks_of
from lightning_regularize._steps.parts import Parts, refusal
from lightning_regularize._steps.targets import Targets
from lightning_regularize._steps.watch import Watch, stepping_optimizers
from lightning_regularize._trainer.deepspeed import ZeroTwin
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.run import group_labels
from lightning_regularize._trainer.strategies import check_gradients_are_the_modules, check_weights_are_the_optimizers
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._rounding import Rounding, measure_decay
from lightning_regularize.callbacks._saved import NUMBER, Value
from lightning_regularize.decay_methods import METHODS, Alike, DecayMethod, check_method
from lightning_regularize.decay_rules import NO_DECAY, DecayRules, Decision, Setting
from lightning_regularize.groups import Grouping
from lightning_regularize.schedules import Constant, Schedule, check_total_steps, timescales_in
from lightning_regularize.selection import DEFAULT_EXCLUDE, FOREIGN, ParameterInfo, Rule, foreign_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

    import lightning.pytorch as pl
    from torch.optim import Optimizer

    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.schedules import Position, ScheduleLike


class WeightDecay(Regularizer):
    r"""Sets the optimizer's weight decay, on a schedule if you like, without decaying biases and norms.

    The optimizer's own ``weight_decay`` does the work, so that its kernels keep their speed and the result is bit for
    bit that of hand-made groups. The groups stay as ``configure_optimizers`` made them: the optimizer sees them split
    into parts only while it changes weights. At step ``k`` a parameter decays by

    .. math:: \lambda_k = r_g \cdot f_p \cdot \mathrm{schedule}(k)

    where :math:`f_p` is the parameter's factor (0 where excluded, what ``factors`` says, otherwise 1) and :math:`r_g`
    the ratio that the user's own groups have: a group that was given weight decay 0 beside others with some stays at
    0; if no group of an optimizer has any, each has ratio 1. The ``weight_decay`` of a group shows the value of what
    decays in it, for the step to come; of several schedules, that of the last in the mapping. Logged whenever Lightning
    logs: as ``weight_decay``, with several groups as ``weight_decay/<group>``, with several schedules as
    ``weight_decay/<group>/<rule>``.

    Args:
        weight_decay: A number of at least 0, a :class:`~lightning_regularize.schedules.Schedule`, or any callable from
            a :class:`~lightning_regularize.schedules.Position` to a number. The first step uses the schedule's first
            value and the last step its last; steps are the optimizer's, whatever the accumulation. None keeps the
            values that the groups have, and only excludes. A mapping from rules to such gives each rule its own, e.g.
            ``{"head.*": 0.1, "embedding": 0.0, "*": FollowLR(0.1)}``; the first match wins, and whatever decays needs
            one. A rule that never applies is an error, also where ``exclude`` has all that it is for.
        exclude: Rules for what does not decay; ``"!rule"`` takes back what a rule before it has excluded. What a model
            itself declares (``no_weight_decay()``) never decays.
        factors: Rule -> factor on the weight decay, or a function that makes one of a
            :class:`~lightning_regularize.ParameterInfo`, first match wins, e.g. ``{"encoder.*": 0.1}``.
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.
        method: What applies the decay. ``"optimizer"``: the optimizer's own weight decay. With all others this callback
            does, the optimizer's own is set to 0, and any optimizer will do, also one without ``weight_decay``:
            ``"decoupled"`` as AdamW, by ``lr * weight_decay``; ``"coupled"`` as the gradient of an L2 penalty;
            ``"independent"``, by ``weight_decay`` whatever the learning rate; ``"cautious"``, decoupled where update
            and weight agree; ``"stable"``, decoupled and scaled to the real step size (SGD and Adam only). See
            :mod:`lightning_regularize.decay_methods`.
        rounding: ``"nearest"``, as optimizers do; ``"stochastic"`` for half-precision weights and the methods
            ``"decoupled"`` and ``"independent"``: rounded to nearest, ``w * (1 - lr * weight_decay)`` is ``w`` again
            below :math:`2^{-9}` in bfloat16 and :math:`2^{-12}` in float16, and nothing decays. With ``"coupled"`` the
            sum with half-precision gradients is rounded so.
        seed: Of stochastic rounding.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import WeightDecay
        >>> from lightning_regularize.schedules import Cosine, FollowLR
        >>> trainer = Trainer(callbacks=[WeightDecay(Cosine(0.04, 0.4))], logger=False, accelerator="cpu")
        >>> WeightDecay({"head.*": 0.1, "embedding": 0.0, "*": FollowLR(0.1)})
        WeightDecay({'head.*': 0.1, 'embedding': 0.0, '*': FollowLR(value=0.1)})

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021: 0.04 to 0.4.
    """

    of_module: Callable[[], Any] | None = None
    """A weak reference to the module from whose ``configure_callbacks`` it comes, if it does."""

    def __init__(
        self,
        weight_decay: float
        | Schedule
        | Callable[[Position], float]
        | Mapping[Any, float | Schedule | Callable[[Position], float] | None]
        | None,
        *,
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        factors: Mapping[Any, float | Callable[[ParameterInfo], float]] | None = None,
        total_steps: int | None = None,
        method: Literal["optimizer", "decoupled", "coupled", "independent", "cautious", "stable"] = "optimizer",
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(locals())
        self.grouping = Grouping(exclude, {} if factors is None else factors)
        self.rules = DecayRules(weight_decay, self.grouping)
        self.schedule = self.rules.schedules[0] if len(self.rules.schedules) == 1 else None
        self.total_steps = check_total_steps(total_steps)
        check_method(method)
        if None in self.rules.schedules and method != "optimizer":
            what = "`weight_decay=None`" if weight_decay is None else "A weight decay of None for a rule"
            raise ValueError(f"{what} keeps the optimizer's own decay, it needs method='optimizer', got {method!r}.")
        if method == "independent" and any(map(timescales_in, self.schedules)):
            raise ValueError("A Timescale counts on decay by lr * weight_decay, got method='independent'.")
        check_rounding(rounding, seed)
        if rounding == "stochastic" and method not in ("decoupled", "independent", "coupled"):
            raise ValueError(
                f"`rounding='stochastic'` needs method='decoupled' or 'independent' or 'coupled', got {method!r}."
            )
        self.method, self.rounding, self.seed = method, rounding, seed
        self._twin: ZeroTwin | None = None

    state_layouts: ClassVar[dict[str, Layout]] = {
        "given": [[Value("None, or a finite number of at least 0", lambda v: v is None or NUMBER.is_valid(v))]],
        "parts": [[[Value("a dictionary", lambda v: isinstance(v, dict))]]],
    }

    @property
    def schedules(self) -> Sequence[ScheduleLike]:
        """The schedule of each rule."""
        return [schedule for schedule in self.rules.schedules if schedule is not None]

    def identity(self) -> dict[str, Any]:
        """There is one in a Trainer, whatever its rules."""
        return {}

    # -- before training -----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.of_module is not None and self.of_module() is not pl_module:  # the Trainer has another module now
            trainer.callbacks = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
            return
        others = [c for c in trainer.callbacks if isinstance(c, WeightDecay)]  # type: ignore[attr-defined]
        if stage == "fit" and len(others) > 1:
            raise MisconfigurationException(
                f"{len(others)} WeightDecay callbacks would write over each other. Use one, with `factors`."
            )
        self._twin = None
        if stage == "fit" and METHODS[self.method].uses_optimizer and is_named(trainer.strategy, "DeepSpeedStrategy"):
            self._twin = ZeroTwin(trainer, pl_module, self.rules)

    def check(self, run: Run) -> None:
        if self._twin is not None and self._twin.optimizer is not None:
            run.optimizers = [self._twin.optimizer]
        if not run.optimizers:
            self.warn("WeightDecay does nothing: `configure_optimizers` returned no optimizer.")
        infos = run.infos()
        with named_errors("WeightDecay"):
            self.rules.check(infos)
        self.decay_method = self._make_method(run)
        if self.decay_method.adds_to_gradients:
            check_gradients_are_the_modules(run.trainer, f"WeightDecay(method={self.method!r})")
        elif self.decay_method.acts_on_weights:
            check_weights_are_the_optimizers(run.trainer, f"WeightDecay(method={self.method!r})")
        if self.decay_method.needs_real_weights:
            for info in infos:
                if info.parameter.requires_grad and self.rules.decide(info).setting.factor:
                    self.check_real(info, f"WeightDecay(method={self.method!r})")
        self._targets: Targets[Decision] = Targets(
            run.infos, self._learn, lambda parameter: self._learn(foreign_info(parameter))
        )
        self._parts: WeakKeyDictionary[Optimizer, Parts] = WeakKeyDictionary()
        self._groups: WeakKeyDictionary[Any, GroupDecay] = WeakKeyDictionary()
        self._given: MutableMapping[Any, list[Given]] = WeakTensorKeyDictionary()
        self._decaying = Decaying(self._targets)
        self._in_step: dict[Any, list[Alike]] = {}  # between the beginning and the end of a step
        # Under automatic optimization a batch ends with the step, and LR schedulers set the next rate before that.
        self._shows_at_end = run.trainer is not None and run.module.automatic_optimization
        is_coupled = self.decay_method.adds_to_gradients
        at_random = "rounding='stochastic', which is right in the mean"
        self.rounded = Rounding(
            self,
            infos,
            who=f"WeightDecay(method={self.method!r})",
            is_constant=all(isinstance(schedule, Constant) for schedule in self.schedules),
            adds_to_gradients=is_coupled,
            remedy=f", or {at_random}" if is_coupled else f", or WeightDecay(..., method='decoupled', {at_random})",
        )
        self.decay_method.change = self.rounded.change
        self._checked: WeakSet[Any] = WeakSet()
        for optimizer in run.optimizers:
            for leaf in stepping_optimizers(optimizer):
                self._check_optimizer(leaf, optimizer)

    def _check_optimizer(self, leaf: Optimizer, optimizer: Any) -> None:
        """Refuse an optimizer whose weights cannot be made to decay as asked.

        Raises:
            MisconfigurationException: It has no weight decay, or its groups cannot be split.
        """
        self._checked.add(leaf)
        decisions = [decision for of_group in self._targets.of(leaf) for decision in of_group]
        has_decay = any("weight_decay" in group for group in leaf.param_groups)
        reason = ""
        if self.decay_method.uses_optimizer and has_decay:
            is_foreign = leaf is not optimizer and all(decision.info.name == FOREIGN for decision in decisions)
            reason = refusal(leaf, optimizer, is_foreign=is_foreign)
        if reason := reason or self.rules.refuse_optimizer(self.decay_method, leaf, decisions):
            raise MisconfigurationException(f"WeightDecay: {reason}")
        if untrue := self.rules.untrue_timescale(self.decay_method, leaf, self._targets.of(leaf)):
            self.warn(untrue)

    def _check_groups_decay(self, run: Run) -> None:
        if not self.decay_method.uses_optimizer:
            return
        held = [
            (self._groups_of(watch.optimizer).ratio(group), decision)
            for watch in run.watches
            for group, decisions in zip(watch.optimizer.param_groups, self._targets.of(watch.optimizer), strict=True)
            for decision in decisions
        ]
        if reason := self.rules.refuse_ratios(held, list(self._targets)):
            raise MisconfigurationException(f"WeightDecay: {reason}")

    def _make_method(self, run: Run) -> DecayMethod:
        kind = METHODS[self.method]
        known = {"stochastic": self.rounding == "stochastic", "seed": self.seed, "sharding": run.sharding()}
        return kind(**{field.name: known[field.name] for field in fields(kind)})  # type: ignore[arg-type]

    def _learn(self, info: ParameterInfo) -> Decision:
        with named_errors("WeightDecay"):
            return self.rules.decide(info)

    def begin(self, run: Run) -> None:
        given = self._saved.get("given", [])
        for watch, saved in zip(run.watches, given, strict=False):
            self._groups_of(watch.optimizer).restore(saved)
        saved = self._saved.get("parts", [])
        self._misses_parts = not saved and any(run.steps)
        leaves = [leaf for watch in run.watches for leaf in watch.leaves]
        self._check_groups_decay(run)
        for i, leaf in enumerate(leaves):
            self._install_parts(leaf, saved[i] if i < len(saved) else ())
        self.show_next()

    def _groups_of(self, optimizer: Any) -> GroupDecay:
        """The weight decay of an optimizer's groups, which have the user's values when they are first seen."""
        groups = self._groups.get(optimizer)
        if groups is None:
            value_of = self._value_of if self.schedules else None
            options = {"shows_value": self.decay_method.uses_optimizer, "of_run": self._given, "warn": self.warn}
            groups = GroupDecay(optimizer, value_of, self._settings_of, **options)  # type: ignore[arg-type]
            self._groups[optimizer] = groups
        return groups

    def _value_of(self, schedule: int, group: dict[str, Any], step: int, ratio: float) -> float | None:
        found, value = self.rules.schedules[schedule], self.run.clock.value
        return None if found is None else ratio * value(found, group, step) if ratio else 0.0

    def _settings_of(self, optimizer: Any) -> list[list[Setting]]:
        return [[decision.setting for decision in decisions] for decisions in self._targets.of(optimizer)]

    def _install_parts(self, leaf: Optimizer, saved: Sequence[list[dict[str, Any]]] = ()) -> None:
        has_decay = any("weight_decay" in group for group in leaf.param_groups)
        has_twin = self._twin is not None and self._twin.optimizer is leaf
        if not self.decay_method.uses_optimizer or not has_decay or has_twin:
            return
        hooks = hooks_of(leaf)
        if hooks.parts is not None:
            raise MisconfigurationException(f"Two WeightDecay act on a {type(leaf).__name__}: use one, with `factors`.")
        find = self._targets.find
        hooks.parts = Parts(lambda parameter: decision.setting if (decision := find(parameter)) else NO_DECAY)
        hooks.parts.load_state_dict(saved)
        self._parts[leaf] = hooks.parts

    # -- training ------------------------------------------------------------------------------------------------------

    def on_gradients(self, step: Step) -> None:
        if self.decay_method.adds_to_gradients:
            self.rounded.begin_step(step)
            values = self._values(step.watch, step.optimizer, step.number)
            self.decay_method.on_gradients(self._decaying.of(step.optimizer, values), step.scale, step.number)
        if self._twin is not None and self._twin.optimizer is step.optimizer:  # no hook comes later
            self._twin.update(self._values(step.watch, step.optimizer, step.number))
        if self.run.logs_now():
            self._log(step.watch)

    def before_step(self, step: Step) -> None:
        leaf, groups = step.optimizer, self._groups_of(step.watch.optimizer)
        if leaf not in self._checked:  # made since the last step
            self._check_optimizer(leaf, step.watch.optimizer)
            if leaf not in self._parts:  # where it was made after the check and before training began
                self._install_parts(leaf)
        values, parts = groups.show(leaf, step.number, self.run.clock.epoch), self._parts.get(leaf)
        if parts is not None:
            parts.values = values
            hooks_of(leaf).parts = parts  # an optimizer that comes back has new hooks
        method = self.decay_method
        if not method.adds_to_gradients:
            self.rounded.begin_step(step)
        if self.rounded.is_measured or self.rounded.is_followed:
            measure_decay(self.rounded, step, self._decaying.of(leaf, values), method)
        if method.acts_on_weights:
            self._in_step[leaf] = self._decaying.of(leaf, values)
            method.before(leaf, self._in_step[leaf], step.number)

    def after_step(self, step: Step, *, is_real: bool) -> None:
        if self.decay_method.acts_on_weights:
            decaying = self._in_step.pop(step.optimizer, [])
            if is_real:
                self.decay_method.after(step.optimizer, decaying, step.number)
        if self._misses_parts and step.optimizer in self._parts:
            self._misses_parts = False
            if self._parts[step.optimizer].state_dict():
                self.warn(
                    f"{type(step.optimizer).__name__} keeps values for each group, and parts of a group differ in "
                    "them. The checkpoint has them for whole groups only: each part went on with the group's."
                )
        if not self._shows_at_end:
            self._show_next(step.watch)

    def show_next(self) -> None:
        for watch in self.run.watches:
            self._show_next(watch)

    def _show_next(self, watch: Watch) -> None:
        groups, clock = self._groups_of(watch.optimizer), self.run.clock
        for leaf in watch.leaves:
            number = watch.number(leaf)
            if number < clock.total_steps:
                groups.show(leaf, number, clock.epoch)

    def _values(self, watch: Watch, leaf: Any, number: int) -> list[dict[int, Any]]:
        """The weight decay of factor 1 in each group of an optimizer, by schedule."""
        return self._groups_of(watch.optimizer).values(leaf, number, self.run.clock.epoch)

    def _log(self, watch: Watch) -> None:
        optimizer = watch.optimizer
        names, groups = self.rules.names, self._groups_of(watch.optimizer)
        of_groups = groups.by_schedule(optimizer, watch.steps, self.run.clock.epoch)
        labels = group_labels(optimizer, self.run.label(watch))
        is_one = len(names) == 1 and len(labels) == 1 and len(self.run.watches) == 1
        for label, values in zip(labels, of_groups, strict=True):
            key = "weight_decay" if is_one else f"weight_decay/{label}"
            by_rule = {f"{key}/{names[schedule]}": value for schedule, value in values.items()}
            self.run.log(by_rule if by_rule and len(names) > 1 else {key: values.get(0, 0.0)})

    def by_parameter(self) -> Iterator[tuple[ParameterInfo, Watch, int, float, float, str]]:
        """For each parameter that an optimizer holds: its place, its weight decay, the factor in that, and the rule.

        To be called between ``on_train_start`` and the end of training, with the groups as the user has them.
        """
        for watch in self.run.watches:
            optimizer = watch.optimizer
            groups, values = self._groups_of(watch.optimizer), self._values(watch, optimizer, watch.steps)
            of_groups = zip(optimizer.param_groups, self._targets.of(optimizer), values, strict=True)
            for i, (group, decisions, value) in enumerate(of_groups):
                for d in decisions:
                    share = groups.ratio(group) * d.setting.factor
                    yield d.info, watch, i, float(d.weight_decay(value)), share, d.rule

    # -- after training ------------------------------------------------------------------------------------------------

    def end(self, run: Run) -> None:
        self._twin = None
        for leaf, parts in getattr(self, "_parts", {}).items():
            parts.hide(leaf)
            if ATTRIBUTE in vars(leaf):
                hooks_of(leaf).parts = None
        for groups in getattr(self, "_groups", {}).values():
            groups.put_back()

    def save(self) -> dict[str, Any]:
        """The weight decay that the user gave each group, and values in which parts of a group differ."""
        if not self.run.watches:
            return {}
        given = [self._groups_of(watch.optimizer).state() for watch in self.run.watches]
        leaves = [leaf for watch in self.run.watches for leaf in watch.leaves]
        parts = [self._parts[leaf].state_dict() if leaf in self._parts else [] for leaf in leaves]
        return {"given": given, **({"parts": parts} if any(parts) else {})}
