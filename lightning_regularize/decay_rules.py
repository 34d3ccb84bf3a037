"""By which schedule, and with which factor, does each parameter decay?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_regularize.group_settings import passes_through
from lightning_regularize.groups import Grouping, check_keys, check_something_decays, first_match, rule_name
from lightning_regularize.schedules import Constant, as_schedule, timescales_in
from lightning_regularize.selection import matches, require_matches

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.optim import Optimizer

    from lightning_regularize.decay_methods import DecayMethod
    from lightning_regularize.schedules import ScheduleLike
    from lightning_regularize.selection import ParameterInfo, Rule


class Setting(NamedTuple):
    """What parameters share that decay alike.

    Args:
        schedule: The number of their schedule.
        factor: What multiplies its value; 0 for what does not decay.
    """

    schedule: int
    factor: float


NO_DECAY = Setting(0, 0.0)


@dataclass(frozen=True, eq=False)
class Decision:
    """What the rules say about one parameter, and the name of the rules that decided."""

    info: ParameterInfo
    setting: Setting
    rule: str

    def weight_decay(self, values: Mapping[int, Any]) -> Any:
        """The weight decay of the parameter, from the values of the schedules by number."""
        schedule, factor = self.setting
        return factor * values[schedule] if factor else 0.0


class DecayRules:
    """A schedule and a factor for each parameter.

    Args:
        weight_decay: One schedule for all, None for what the optimizer has, or a mapping from rules to such. The first
            rule that matches wins, after ``grouping`` has said what does not decay at all.
        grouping: What does not decay, and the factors of the rest.

    Raises:
        TypeError: A rule or a schedule is of no known type.
        ValueError: A rule is not understood, a number is out of range, or the mapping is empty.

    Example:
        >>> from torch import nn
        >>> from lightning_regularize.selection import parameter_infos
        >>> rules = DecayRules({"0.*": 0.1, "*": 0.2}, Grouping())
        >>> rules.decide(parameter_infos(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))[0]).setting
        Setting(schedule=1, factor=1.0)
    """

    def __init__(self, weight_decay: object, grouping: Grouping) -> None:
        self.grouping = grouping
        self._rules: tuple[Rule, ...] = ()
        schedules: Iterable[Any] = (weight_decay,)
        if isinstance(weight_decay, Mapping) and "_target_" not in weight_decay:  # which is a schedule of Hydra's
            if not weight_decay:
                raise ValueError("`weight_decay` should have a schedule for at least one rule, got an empty mapping.")
            check_keys(weight_decay, argument="weight_decay")
            self._rules, schedules = tuple(weight_decay), weight_decay.values()
        self.names = _distinct([rule_name(rule) for rule in self._rules]) or [""]
        """The name of each schedule's rule; empty where there is one schedule for all."""
        self.schedules: list[ScheduleLike | None] = [
            None
            if schedule is None
            else as_schedule(schedule, name=f"weight_decay[{name!r}]" if name else "weight_decay")
            for schedule, name in zip(schedules, self.names, strict=True)
        ]
        """By number; None for what keeps the weight decay that the optimizer has."""

    @property
    def set_decay(self) -> bool:
        """Is there a schedule that may let something decay, whatever the optimizer has?"""
        return any(map(self.sets_decay, range(len(self.schedules))))

    def sets_decay(self, schedule: int) -> bool:
        """May this schedule let something decay, whatever the optimizer has?"""
        return self.schedules[schedule] is not None and self.schedules[schedule] != Constant(0.0)

    def decide(self, info: ParameterInfo) -> Decision:
        """What holds for a parameter.

        Raises:
            ValueError: No rule of the mapping matches it, or a factor is out of range.
            TypeError: A factor is no number.
        """
        factor, reason = self.grouping.decide(info)
        if not factor:
            return Decision(info, NO_DECAY, reason)
        if not self._rules:
            return Decision(info, Setting(0, factor), reason)
        rule = first_match(self._rules, info)
        if rule is None:
            raise ValueError(self._unmatched([info]))
        schedule = self._rules.index(rule)
        name = self.names[schedule]
        if self.schedules[schedule] == Constant(0.0):
            return Decision(info, NO_DECAY, name)
        return Decision(info, Setting(schedule, factor), f"{name}, {reason}" if reason else name)

    def check(self, infos: Sequence[ParameterInfo]) -> None:
        """Refuse rules that do nothing in a module with the parameters ``infos``, or leave out one that decays.

        Raises:
            TypeError: A factor is no number.
            ValueError: A rule matches nothing or never applies, a parameter has none, or nothing decays.
        """
        self.grouping.check(infos)
        require_matches(self._rules, infos, argument="weight_decay")
        factors = {id(info): self.grouping.decide(info)[0] for info in infos}
        first = {id(info): first_match(self._rules, info) for info in infos}
        for rule, name, schedule in zip(self._rules, self.names, self.schedules, strict=False):
            found = [info for info in infos if matches(rule, info)]
            if not found or any(factors[id(info)] and first[id(info)] is rule for info in found):
                continue
            if any(factors[id(info)] for info in found):
                raise ValueError(
                    f"`weight_decay`: {name!r} never applies: all that it matches and that decays has a schedule from "
                    "a rule before it. Change the order."
                )
            if schedule != Constant(0.0):  # 0 is what it has
                excluding = ", ".join(sorted({repr(self.grouping.decide(info)[1]) for info in found}))
                raise ValueError(
                    f"`weight_decay`: {name!r} never applies: all that it matches is excluded from weight decay, by "
                    f"{excluding}. Take that out of `exclude` or `factors`, or leave {name!r} out."
                )
        if self._rules and (unmatched := [i for i in infos if factors[id(i)] and first[id(i)] is None]):
            raise ValueError(self._unmatched(unmatched))
        if not self.set_decay:
            return
        check_something_decays(self.grouping, infos)
        if not any(self.decide(info).setting.factor for info in infos):
            raise ValueError(
                f"`weight_decay`: no rule with a positive weight decay matches a parameter, got {self.names}."
            )

    def refuse_optimizer(self, method: DecayMethod, optimizer: Optimizer, decisions: Sequence[Decision]) -> str:
        """Why ``method`` cannot let the parameters of an optimizer decay as asked; empty if it can."""
        decaying = [d for d in decisions if d.setting.factor and self.sets_decay(d.setting.schedule)]
        has_decay = any("weight_decay" in group for group in optimizer.param_groups)
        # What is excluded as a whole needs no weight decay, and where none is asked for there may be none.
        needs_none = method.uses_optimizer and not has_decay and not decaying
        if needs_none or not any(decision.setting.factor for decision in decisions):
            return ""
        return method.refuse(optimizer) or method.refuse_sparse([decision.info for decision in decaying])

    def untrue_timescale(
        self, method: DecayMethod, optimizer: Optimizer, decisions: Sequence[Sequence[Decision]]
    ) -> str:
        """Why a Timescale does not hold for something in the groups of an optimizer; empty if each does."""
        timed = {i for i, schedule in enumerate(self.schedules) if schedule is not None and timescales_in(schedule)}
        is_added = method.adds_to_gradients
        if not timed or not (is_added or method.uses_optimizer):
            return ""
        for group, of_group in zip(optimizer.param_groups, decisions, strict=True):
            decays = any(decision.setting.factor and decision.setting.schedule in timed for decision in of_group)
            if decays and (what := passes_through(optimizer, group, is_added=is_added)):
                return (
                    "WeightDecay: a Timescale counts on decay by lr * weight_decay, and here the decay passes through "
                    f"{what}, so that weights remember for another time. Use method='decoupled'."
                )
        return ""

    def refuse_ratios(self, held: Sequence[tuple[float, Decision]], decisions: Sequence[Decision]) -> str:
        """Why the groups of the user leave nothing to decay, or nothing of what a rule is for; empty if they do not.

        Args:
            held: What optimizers hold, each with the ratio of its group.
            decisions: All of the module.
        """
        zero = "given weight decay 0 beside others with some"
        decaying = any(each.setting.factor and each.info.parameter.requires_grad for each in decisions)
        if self.set_decay and held and decaying and not any(ratio * each.setting.factor for ratio, each in held):
            return (
                "Weight decay is positive, but nothing decays: each parameter in the optimizer's groups is excluded, "
                f"or in a group that was {zero}. Change the groups or `exclude`."
            )
        for schedule in filter(self.sets_decay, range(len(self.schedules))):
            ratios = [r for r, each in held if each.setting.factor and each.setting.schedule == schedule]
            if ratios and not any(ratios):
                return (
                    f"`weight_decay` has no effect for {self.names[schedule]!r}: all that decays by it is in groups "
                    f"that were {zero}. Change the groups, or leave it out."
                )
        return ""

    def _unmatched(self, infos: Sequence[ParameterInfo]) -> str:
        more = f" and {len(infos) - 3} more" if len(infos) > 3 else ""
        return (
            f"`weight_decay` has no rule for {[info.name for info in infos[:3]]}{more}, got {self.names}. Add '*' for "
            "the rest: a schedule, 0.0, or None to keep the weight decay that the optimizer has."
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where some are alike, as those of lambdas are."""
    places = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return [f"{name} {place}" if place > 1 else name for name, place in zip(names, places, strict=True)]
