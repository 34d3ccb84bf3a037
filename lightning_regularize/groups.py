"""Parameter groups: build them, or describe how parameters are split."""

from __future__ import annotations

import math
import warnings
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn  # noqa: TC002  for the examples below

from lightning_regularize._checks import check_number
from lightning_regularize._layers import layer_scales
from lightning_regularize._tables import Column, Table
from lightning_regularize.schedules import Schedule
from lightning_regularize.selection import (
    DEFAULT_EXCLUDE,
    ParameterInfo,
    check_rules,
    matches,
    parameter_infos,
    require_matches,
    selecting_rule,
    taken_back_by,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lightning_regularize.selection import Rule

    Factor: TypeAlias = float | Callable[[ParameterInfo], float]


@dataclass(frozen=True)
class Grouping:
    """Which factor of the weight decay each parameter gets, and why.

    The first of these that holds decides: a rule in ``exclude`` (factor 0), the model's own declaration (factor 0; see
    :class:`ParameterInfo`), a rule in ``factors``, and otherwise factor 1.

    Args:
        exclude: Rules for what does not decay.
        factors: Rule -> factor on the weight decay, at least 0, or a function that makes one of a
            :class:`ParameterInfo`; the first match wins.

    Raises:
        TypeError: A rule or a factor is of no known type, or ``factors`` is no mapping.
        ValueError: A rule is not understood, or a factor is negative, infinite or NaN.

    Example:
        >>> grouping = Grouping(factors={"0.*": lambda info: 1 / info.shape[1]})
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> [grouping.decide(info) for info in parameter_infos(layers)]
        [(0.5, '0.*'), (0.0, 'bias'), (1.0, ''), (0.0, 'bias')]
    """

    exclude: Sequence[Rule] = DEFAULT_EXCLUDE
    factors: Mapping[Any, Factor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not hasattr(self.factors, "items"):
            raise TypeError(
                f"`factors` should map rules to numbers, got {self.factors!r}. Write, for example, {{'head.*': 0.1}}."
            )
        object.__setattr__(self, "exclude", check_rules(self.exclude, argument="exclude"))
        check_keys(self.factors, argument="factors")
        factors = {rule: _check_factor(factor, rule) for rule, factor in self.factors.items()}
        object.__setattr__(self, "factors", factors)

    def decide(self, info: ParameterInfo) -> tuple[float, str]:
        """The factor of ``info``, and the name of the rule that decided, or an empty one."""
        if reason := self._exclusion(info):
            return 0.0, reason
        rule = first_match(self.factors, info)
        if rule is None:
            return 1.0, ""
        factor: Any = self.factors[rule]
        if callable(factor):
            factor = check_number(factor(info), f"the factor of {rule_name(rule)!r} for {info.name!r}")
        return float(factor), rule_name(rule)

    def check(self, infos: Sequence[ParameterInfo]) -> None:
        """Refuse rules that do nothing in a module with the parameters ``infos``.

        Raises:
            TypeError: A function gives a factor that is no number.
            ValueError: A rule matches nothing, or a factor's rule only what does not decay or has a factor before; or
                a function gives a factor that is negative, infinite or NaN.
        """
        require_matches(self.exclude, infos, argument="exclude")
        require_matches(self.factors, infos, argument="factors")
        for rule in self.exclude:
            taken_back = taken_back_by(rule)
            found = [info for info in infos if taken_back is not None and matches(taken_back, info)]
            if found and all(info.declared for info in found):
                raise ValueError(
                    f"`exclude`: {rule!r} takes back nothing: the model declares by `no_weight_decay()` that what it "
                    "matches does not decay, and that stays so."
                )
        decisive = {first_match(self.factors, info) for info in infos if not self._exclusion(info)}
        for rule in self.factors:
            if rule not in decisive and any(matches(rule, info) for info in infos):
                raise ValueError(
                    f"The factor of {rule_name(rule)!r} never applies: all that it matches is excluded "
                    "or has a factor from a rule before it. Change `exclude` or the order of `factors`."
                )
        for info in infos:
            self.decide(info)

    def _exclusion(self, info: ParameterInfo) -> str:
        """Why ``info`` does not decay, or an empty string."""
        rule = selecting_rule(self.exclude, info)
        if rule is not None:
            return rule_name(rule)
        return "the model's own declaration" if info.declared else ""


def check_keys(rules: Iterable[Rule], *, argument: str) -> None:
    """Refuse what cannot be a key of a mapping from rules, of which the first that matches wins.

    Raises:
        TypeError: A key is of no known type.
        ValueError: A key is not understood, or takes back, which has no meaning there.
    """
    for rule in rules:
        if taken_back_by(rule) is not None:
            raise ValueError(
                f"`{argument}`: {rule!r} takes nothing back in a mapping, of which the first rule that matches wins. "
                "Give what it stands for an entry of its own, before the others."
            )
    check_rules(tuple(rules), argument=argument)


def first_match(rules: Iterable[Rule], info: ParameterInfo) -> Rule | None:
    """The first of ``rules`` that matches ``info``; None if none does."""
    return next((rule for rule in rules if matches(rule, info)), None)


def _check_factor(factor: object, rule: Rule) -> Any:
    if isinstance(factor, Schedule):
        raise TypeError(
            f"the factor of {rule_name(rule)!r} should be a number or a function of a ParameterInfo, got {factor!r}. A "
            f"schedule for a rule is written WeightDecay({{{rule_name(rule)!r}: {factor!r}, '*': ...}})."
        )
    if callable(factor) and not isinstance(factor, type):
        return factor
    return check_number(factor, f"the factor of {rule_name(rule)!r}")


@dataclass(frozen=True)
class Description:
    """One row of :func:`describe`.

    Attributes:
        name: Canonical name.
        shape: Unsharded shape.
        numel: Number of elements.
        kind: Kind of parameter, as in :mod:`lightning_regularize.selection`.
        group: Name of the parameter group.
        rule: What decided; empty where nothing but the default did.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    kind: str
    group: str
    rule: str


class Descriptions(list[Description]):
    """What :func:`describe` returns: a list that prints as a table, and that a notebook shows as one."""

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        columns = [
            Column("Name"),
            Column("Shape", is_right=True),
            Column("Numbers", is_right=True),
            Column("Kind"),
            Column("Group"),
            Column("Rule"),
        ]
        rows = [
            (row.name, "x".join(map(str, row.shape)) or "scalar", f"{row.numel:,}", row.kind, row.group, row.rule)
            for row in self
        ]
        return Table(columns, [rows])


def param_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
    factors: Mapping[Any, Factor] | None = None,
    lr: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    r"""Parameter groups for any torch optimizer, in which biases, norms and other vectors do not decay.

    With ``layer_decay`` the learning rate shrinks with the distance to the output,
    :math:`lr \cdot d^{\,n - 1 - i}` for layer ``i`` of ``n``. Layers are what timm's ``group_matcher()`` of a submodule
    says; without one, layer 0 is all before the first of the repeated blocks, then each block is a layer with what
    follows it, and all after the last block is the last layer, as in BEiT.

    Args:
        module: Its trainable parameters are grouped, each tensor once.
        weight_decay: Weight decay of the group with factor 1; at least 0.
        exclude: Rules for what does not decay.
        factors: Rule -> factor on ``weight_decay``, or a function that makes one of a :class:`ParameterInfo`, such as
            :class:`~lightning_regularize.factors.WidthPower`; the first match wins.
        lr: Learning rate of the groups; None leaves it to the optimizer.
        layer_decay: ``d``, in (0, 1]; needs ``lr``. BEiT's fine-tuning uses 0.65 to 0.9.

    Returns:
        One group a distinct setting, never an empty one, in registration order inside. Each has ``params``,
        ``weight_decay``, a ``name`` ("decay", "no_decay", "decay x0.1", "decay layer 3"), and ``lr`` if given.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: A number is out of range, a rule matches nothing or its factor never applies, ``module`` has no
            trainable parameter, ``weight_decay`` is positive and nothing would decay, or ``layer_decay`` finds no
            layers.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), 0.1)
        >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
        [('decay', 0.1, 1), ('no_decay', 0.0, 3)]

    References:
        Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022.
    """
    weight_decay = check_number(weight_decay, "`weight_decay`")
    if lr is not None:
        lr = check_number(lr, "`lr`")
    grouping = Grouping(exclude, factors or {})
    infos = parameter_infos(module)
    grouping.check(infos)
    trainable = [info for info in infos if info.parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no trainable parameters to group.")
    if weight_decay > 0:
        check_something_decays(grouping, infos)
    scales = layer_scales(module, infos, layer_decay, lr)

    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for info in trainable:
        factor, _ = grouping.decide(info)
        layer, scale = scales.get(id(info.parameter), (0, 1.0))
        group: dict[str, Any] = {"params": [], "weight_decay": weight_decay * factor, "name": group_name(factor)}
        if lr is not None:
            group["lr"] = lr * scale
        if scales:
            group["name"] += f" layer {layer}"
        groups.setdefault((layer, -factor), group)["params"].append(info.parameter)
    return [groups[setting] for setting in sorted(groups)]


def layer_groups(module: nn.Module, lr: float, layer_decay: float) -> list[dict[str, Any]]:
    """One group a layer, in the order of layers, with the learning rates of :func:`param_groups`.

    Args:
        module: Its trainable parameters are grouped, each tensor once.
        lr: Learning rate of the last layer.
        layer_decay: In (0, 1].

    Returns:
        Groups with ``params``, ``lr`` and a ``name`` such as "layer 3".

    Raises:
        ValueError: The module shows no layers.

    Example:
        >>> blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> [(group["name"], group["lr"]) for group in layer_groups(blocks, 0.1, 0.5)]
        [('layer 0', 0.05), ('layer 1', 0.1)]
    """
    infos = parameter_infos(module)
    groups: dict[int, dict[str, Any]] = {}
    scales = layer_scales(module, infos, layer_decay, lr)
    for info in infos:
        layer, scale = scales[id(info.parameter)]
        if info.parameter.requires_grad:
            group = groups.setdefault(layer, {"params": [], "lr": lr * scale, "name": f"layer {layer}"})
            group["params"].append(info.parameter)
    return [groups[layer] for layer in sorted(groups)]


def describe(
    module: nn.Module, *, exclude: Sequence[Rule] = DEFAULT_EXCLUDE, factors: Mapping[Any, float] | None = None
) -> Descriptions:
    """Where :func:`param_groups` puts each trainable parameter, and the rule that decided.

    Args:
        module: The module to describe.
        exclude: As for :func:`param_groups`.
        factors: As for :func:`param_groups`.

    Returns:
        A list with one row for each parameter, in registration order, that prints as a table.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: A rule is not understood or matches nothing.

    Example:
        >>> rows = describe(nn.Linear(3, 2))
        >>> print(rows)
         Name    Shape  Numbers  Kind    Group     Rule
         ──────────────────────────────────────────────
         weight    2x3        6  weight  decay
         bias        2        2  bias    no_decay  bias
        >>> rows[0].shape, rows[0].group
        ((2, 3), 'decay')
    """
    grouping = Grouping(exclude, factors or {})
    infos = parameter_infos(module)
    grouping.check(infos)
    rows = Descriptions()
    for info in infos:
        if info.parameter.requires_grad:
            factor, rule = grouping.decide(info)
            shape = tuple(info.shape)
            rows.append(Description(info.name, shape, math.prod(shape), info.kind, group_name(factor), rule))
    return rows


def check_something_decays(grouping: Grouping, infos: Iterable[ParameterInfo]) -> None:
    """Refuse a grouping under which nothing decays; warn where only frozen parameters would.

    Raises:
        ValueError: Every parameter is excluded.
    """
    decaying = [info for info in infos if grouping.decide(info)[0] > 0]
    if not decaying:
        raise ValueError(
            "Weight decay is positive, but every parameter is excluded from it by "
            f"exclude={tuple(map(rule_name, grouping.exclude))} or a factor of 0. Exclude less, or set it to 0."
        )
    if not any(info.parameter.requires_grad for info in decaying):
        warnings.warn("Weight decay has no effect: all parameters that it applies to are frozen.", stacklevel=3)


def rule_name(rule: Rule) -> str:
    """How a rule is written in tables and messages.

    Example:
        >>> rule_name("bias"), rule_name(nn.Embedding)
        ('bias', 'type:Embedding')
    """
    if isinstance(rule, str):
        return rule
    return f"type:{rule.__name__}" if isinstance(rule, type) else getattr(rule, "__name__", repr(rule))


def function_key(function: Callable[..., Any]) -> str:
    """Identifies a function in the key of a callback's state: by its name, and a lambda by what it computes.

    It is the same in every process, and in the next run, as long as the function is.

    Example:
        >>> function_key(lambda info: "0" in info.name) == function_key(lambda info: "4" in info.name)
        False
    """
    name = str(getattr(function, "__qualname__", type(function).__name__))
    code = getattr(function, "__code__", None)
    if "<lambda>" not in name or code is None:
        return name
    constants = [value for value in code.co_consts if isinstance(value, (str, int, float, bool, tuple, type(None)))]
    return f"{name}[{zlib.crc32(repr((code.co_code, constants, code.co_names)).encode()):08x}]"


def rule_key(rule: Rule) -> str:
    """As :func:`rule_name`, for the key of a callback's state."""
    return rule_name(rule) if isinstance(rule, (str, type)) else function_key(rule)


def group_name(factor: float) -> str:
    """What a group, or a part of one, is called whose parameters have this factor.

    Example:
        >>> group_name(1.0), group_name(0.0), group_name(0.1)
        ('decay', 'no_decay', 'decay x0.1')
    """
    return {0.0: "no_decay", 1.0: "decay"}.get(factor, f"decay x{factor:g}")
