"""How does the optimizer hear of it? Parameter groups, made by hand or out of the groups that an optimizer has."""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_regularize._checks import is_number
from lightning_regularize.selection import (
    DEFAULT_EXCLUDE,
    ParameterInfo,
    _canonical,
    _wraps,
    check_rules,
    matches,
    parameter_infos,
    require_matches,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.optim import Optimizer

    from lightning_regularize.selection import Rule

# What torch's schedulers keep a value a group in; the rest (OneCycleLR's max_lr, SWALR's swa_lr) stands in the groups.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
# State that has the shape of its parameter in every optimizer that uses the name.
_SHAPED_STATE = {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "ax", "variance"}
_FACTORED_STATE = {"row_var", "col_var"}  # Adafactor's, in which one dimension has size 1


@dataclass(frozen=True)
class Grouping:
    """Which factor of the weight decay each parameter gets, and why.

    The first of these that holds decides: a rule in ``exclude`` (factor 0), the model's own declaration (factor 0; see
    :class:`ParameterInfo`), a rule in ``factors``, and otherwise factor 1.

    Args:
        exclude: Rules for what does not decay.
        factors: Rule -> factor on the weight decay, at least 0; the first match wins.

    Raises:
        TypeError: A rule is of no known type, or ``factors`` is no mapping.
        ValueError: A rule is not understood, or a factor is negative, infinite or NaN.

    Example:
        >>> grouping = Grouping(factors={"0.*": 0.5})
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> [grouping.decide(info) for info in parameter_infos(layers)]
        [(0.5, '0.*'), (0.0, 'bias'), (1.0, ''), (0.0, 'bias')]
    """

    exclude: Sequence[Rule] = DEFAULT_EXCLUDE
    factors: Mapping[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not hasattr(self.factors, "items"):
            raise TypeError(f"`factors` should map rules to numbers, got {self.factors!r}.")
        object.__setattr__(self, "exclude", check_rules(self.exclude, argument="exclude"))
        check_rules(tuple(self.factors), argument="factors")
        factors = {
            rule: check_number(factor, f"the factor of {rule_name(rule)!r}") for rule, factor in self.factors.items()
        }
        object.__setattr__(self, "factors", factors)

    def decide(self, info: ParameterInfo) -> tuple[float, str]:
        """The factor of ``info``, and the name of the rule that decided, or an empty one."""
        if reason := self._exclusion(info):
            return 0.0, reason
        rule = self._factor_rule(info)
        return (1.0, "") if rule is None else (float(self.factors[rule]), rule_name(rule))

    def check(self, infos: Sequence[ParameterInfo]) -> None:
        """Refuse rules that do nothing in a module with the parameters ``infos``.

        Raises:
            ValueError: A rule matches nothing, or a factor's rule only what does not decay or has a factor before.
        """
        require_matches((*self.exclude, *self.factors), infos)
        decisive = {self._factor_rule(info) for info in infos if not self._exclusion(info)}
        for rule in self.factors:
            if rule not in decisive and any(matches(rule, info) for info in infos):
                raise ValueError(
                    f"The factor of {rule_name(rule)!r} never applies: all that it matches is excluded "
                    "or has a factor from a rule before it. Change `exclude` or the order of `factors`."
                )

    def _exclusion(self, info: ParameterInfo) -> str:
        """Why ``info`` does not decay, or an empty string."""
        rule = next((rule for rule in self.exclude if matches(rule, info)), None)
        if rule is not None:
            return rule_name(rule)
        return "the model's own declaration" if info.declared else ""

    def _factor_rule(self, info: ParameterInfo) -> Rule | None:
        return next((rule for rule in self.factors if matches(rule, info)), None)


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


def param_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
    factors: Mapping[Any, float] | None = None,
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
        factors: Rule -> factor on ``weight_decay``; the first match wins.
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
    scales = _layer_scales(module, infos, layer_decay, lr)

    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for info in trainable:
        factor, _ = grouping.decide(info)
        layer, scale = scales.get(id(info.parameter), (0, 1.0))
        group: dict[str, Any] = {"params": [], "weight_decay": weight_decay * factor, "name": _group_name(factor)}
        if lr is not None:
            group["lr"] = lr * scale
        if scales:
            group["name"] += f" layer {layer}"
        groups.setdefault((layer, -factor), group)["params"].append(info.parameter)
    return [groups[setting] for setting in sorted(groups)]


def describe(
    module: nn.Module, *, exclude: Sequence[Rule] = DEFAULT_EXCLUDE, factors: Mapping[Any, float] | None = None
) -> list[Description]:
    """Where :func:`param_groups` puts each trainable parameter, and the rule that decided.

    Args:
        module: The module to describe.
        exclude: As for :func:`param_groups`.
        factors: As for :func:`param_groups`.

    Returns:
        A row a parameter, in registration order.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: A rule is not understood or matches nothing.

    Example:
        >>> for row in describe(nn.Linear(3, 2)):
        ...     print(row.name, row.shape, row.kind, row.group, row.rule or "-")
        weight (2, 3) weight decay -
        bias (2,) bias no_decay bias
    """
    grouping = Grouping(exclude, factors or {})
    infos = parameter_infos(module)
    grouping.check(infos)
    rows = []
    for info in infos:
        if info.parameter.requires_grad:
            factor, rule = grouping.decide(info)
            shape = tuple(info.shape)
            rows.append(Description(info.name, shape, math.prod(shape), info.kind, _group_name(factor), rule))
    return rows


def check_number(value: object, what: str) -> float:
    """Refuse what is not a finite number of at least 0; numbers of numpy become Python's, which checkpoints can hold.

    Raises:
        TypeError: ``value`` is no number.
        ValueError: ``value`` is negative, infinite or NaN.
    """
    if not is_number(value):
        raise TypeError(f"{what} should be a number, got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{what} should be finite and at least 0, got {value!r}.")
    return value if isinstance(value, int) else float(value)


def check_layer_decay(layer_decay: object) -> None:
    """Refuse what is not a number in (0, 1].

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    if not 0 < check_number(layer_decay, "`layer_decay`") <= 1:
        raise ValueError(f"`layer_decay` should be in (0, 1], got {layer_decay!r}.")


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
    """What tells functions apart in the key of a callback's state: a name, and for a lambda what it computes.

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


def _group_name(factor: float) -> str:
    return {0.0: "no_decay", 1.0: "decay"}.get(factor, f"decay x{factor:g}")


# --------------------------------------------------------------------------------------------------------------------
# Layers, for layer_decay


def _layer_scales(
    module: nn.Module, infos: Sequence[ParameterInfo], layer_decay: float | None, lr: float | None
) -> dict[int, tuple[int, float]]:
    """``id(parameter)`` -> layer and factor on the learning rate; empty without ``layer_decay``.

    Raises:
        ValueError: ``layer_decay`` is out of range, or there is no ``lr`` to scale.
    """
    if layer_decay is None:
        return {}
    check_layer_decay(layer_decay)
    if lr is None:
        raise ValueError("`layer_decay` scales the learning rate: give `lr` as well.")
    layers = _layers(module, infos)
    last = max(layers.values())
    return {parameter: (layer, layer_decay ** (last - layer)) for parameter, layer in layers.items()}


def _layers(module: nn.Module, infos: Sequence[ParameterInfo]) -> dict[int, int]:
    """``id(parameter)`` -> number of its layer, counted from the input.

    Raises:
        ValueError: The module shows no layers.
    """
    for path, submodule in module.named_modules():
        if callable(getattr(type(submodule), "group_matcher", None)):
            return _matched_layers(submodule, infos, _canonical(path, module) if path else "")
    blocks = _repeated_blocks(module)
    if len(blocks) < 2:
        raise ValueError(
            f"`layer_decay` needs to know the layers of {type(module).__name__}: it holds no repeated blocks in a "
            "ModuleList or Sequential. Give it a `group_matcher()` as timm's models have."
        )
    number = {id(p): i for i, block in enumerate(blocks, start=1) for p in block.parameters()}
    last_in_block = max(i for i, info in enumerate(infos) if id(info.parameter) in number)
    layers, layer = {}, 0
    for i, info in enumerate(infos):
        layer = number.get(id(info.parameter), layer if i < last_in_block else len(blocks) + 1)
        layers[id(info.parameter)] = layer
    return _dense(layers)


def _repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules of the class that stands most often in the outermost ModuleLists and Sequentials."""
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for stack in _outermost_stacks(module):
        for block in stack.children():
            if any(True for _ in block.parameters()):
                by_class.setdefault(type(_unwrapped(block)), []).append(block)
    return max(by_class.values(), key=len, default=[])


def _unwrapped(block: nn.Module) -> nn.Module:
    """Activation checkpointing often wraps every other block."""
    inner = next((child for name, child in block.named_children() if _wraps(block, name)), None)
    return block if inner is None else _unwrapped(inner)


def _outermost_stacks(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
        yield module
        return
    for child in module.children():
        yield from _outermost_stacks(child)


def _matched_layers(model: nn.Module, infos: Sequence[ParameterInfo], path: str) -> dict[int, int]:
    """Layers as timm counts them: by the sorted places of their parameters, where 99999 joins what was before."""
    place_of = _place_finder(model.group_matcher(coarse=False))  # type: ignore[operator]
    start = f"{path}." if path else ""
    places = {}
    for info in infos:
        name = next((name for name in (info.name, *info.aliases) if name.startswith(start)), None)
        if name is not None:
            places[id(info.parameter)] = place_of(name.removeprefix(start))
    layer_of: dict[tuple[float, ...], int] = {}
    layer = -1
    for place in sorted(set(places.values())):
        layer += layer < 0 or place[-1] != 99999
        layer_of[place] = layer
    layers = {parameter: layer_of[place] for parameter, place in places.items()}
    # What stands outside the model, such as a new head, learns at the full rate.
    return {id(info.parameter): layers.get(id(info.parameter), layer) for info in infos}


def _place_finder(matcher: Any) -> Callable[[str], tuple[float, ...]]:
    """From a parameter's name to its place: a function's own answer, or ordinal, numbers in the name, and suffix."""
    if callable(matcher):
        return lambda name: tuple(found) if isinstance(found := matcher(name), Iterable) else (found,)
    patterns = []
    for ordinal, spec in enumerate(matcher.values()):
        for pattern, suffix in [(spec, None)] if isinstance(spec, str) else spec or ():
            patterns.append((re.compile(pattern), ordinal, suffix))

    def place_of(name: str) -> tuple[float, ...]:
        for pattern, ordinal, suffix in patterns:
            if found := pattern.match(name):
                return (ordinal, *(float(number) for number in found.groups() if number is not None), *(suffix or ()))
        return (math.inf,)

    return place_of


def _dense(layers: dict[int, int]) -> dict[int, int]:
    rank = {layer: i for i, layer in enumerate(sorted(set(layers.values())))}
    return {parameter: rank[layer] for parameter, layer in layers.items()}


# --------------------------------------------------------------------------------------------------------------------
# Groups that an optimizer has already


@dataclass
class Plan:
    """What becomes of an optimizer's groups: which parameters each holds, and its factor on the weight decay.

    Group dictionaries are replaced whenever a state is loaded, and keys added to them break sharded checkpoints; so a
    plan counts groups by their index and keeps everything to itself.

    Attributes:
        layout: Names of the parameters of each group.
        factors: Factor of each group on a scheduled weight decay.
        original: The layout before groups were split.
        origins: The index that each group had before.
    """

    layout: list[list[str]]
    factors: list[float]
    original: list[list[str]]
    origins: list[int]


def plan_groups(
    optimizer: Optimizer,
    grouping: Grouping,
    infos: Mapping[int, ParameterInfo],
    prefix: str = "",
    *,
    split: bool = True,
) -> Plan:
    """Split the groups of ``optimizer`` in place, so that each has one factor, and say what each is.

    A group without weight decay beside groups with some keeps none; other groups keep their ratios.

    Args:
        optimizer: Any torch optimizer whose groups have ``weight_decay``.
        grouping: The rules.
        infos: What is known of each parameter, by ``id(parameter)``.
        prefix: What the names of new groups begin with, so that they are unique among several optimizers.
        split: Without it groups stay as they are, need no ``weight_decay``, and factors are the user's ratios alone.

    Returns:
        The plan.
    """
    given = [float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
    largest = max(given)
    original = _layout(optimizer, infos)
    origins, rule_factors = list(range(len(given))), [1.0] * len(given)
    if split:
        origins, rule_factors = split_groups_(optimizer, grouping, infos, prefix=prefix)
    shares = [given[i] / largest if largest else 1.0 for i in origins]
    factors = [share * factor for share, factor in zip(shares, rule_factors, strict=True)]
    return Plan(_layout(optimizer, infos), factors, original, origins)


def extend_plan_(
    plan: Plan, optimizer: Optimizer, grouping: Grouping, infos: Mapping[int, ParameterInfo], *, split: bool = True
) -> list[int]:
    """Take up groups that were added to ``optimizer`` since; the origins of all groups as they are now.

    A new group's own weight decay counts for nothing: torch fills in the optimizer's default where none is given.
    """
    known = len(plan.layout)
    origins, rule_factors = list(range(len(optimizer.param_groups))), [1.0] * len(optimizer.param_groups)
    if split:
        origins, rule_factors = split_groups_(optimizer, grouping, infos, first=known)
    plan.factors += rule_factors[known:]
    plan.layout = _layout(optimizer, infos)
    return origins


def split_groups_(
    optimizer: Optimizer,
    grouping: Grouping,
    infos: Mapping[int, ParameterInfo],
    *,
    first: int = 0,
    prefix: str = "",
) -> tuple[list[int], list[float]]:
    """Split each group from ``first`` on into one a factor, largest first, each with ``weight_decay`` times its factor.

    Options of a group go to all its parts, and names given as ``named_parameters()`` along. An optimizer in which
    nothing is split keeps its groups as they are, names included. So does a group without parameters.

    Returns:
        For each group the index it had before, and its factor (1 for the groups before ``first``).
    """
    parts = [(i, 1.0, group) for i, group in enumerate(optimizer.param_groups[:first])]
    for i, group in enumerate(optimizer.param_groups[first:], start=first):
        by_factor: dict[float, list[int]] = {}
        for j, parameter in enumerate(group["params"]):
            by_factor.setdefault(grouping.decide(_info(parameter, infos))[0], []).append(j)
        for factor in sorted(by_factor, reverse=True) or [1.0]:
            part = _part(group, by_factor.get(factor, []), factor)
            if parts and parts[-1][0] == i:  # the second part of this group, or a later one
                _own_tensors_(part)
            parts.append((i, factor, part))
    origins, factors = [i for i, _, _ in parts], [factor for _, factor, _ in parts]
    split = len(parts) > len(optimizer.param_groups)
    if not split:  # the dictionaries stay the same objects: others may hold them
        for old, (_, _, new) in zip(optimizer.param_groups, parts, strict=True):
            old["weight_decay"] = new["weight_decay"]
        return origins, factors
    _name_(parts, first, prefix)
    optimizer.param_groups[:] = [group for _, _, group in parts]
    if hasattr(optimizer, "_init_local_optimizer"):
        # ZeroRedundancyOptimizer hands the groups on to an optimizer that holds this rank's share of each.
        optimizer._clear_cache()  # type: ignore[attr-defined]
        optimizer._init_local_optimizer()
    return origins, factors


def _part(group: dict[str, Any], indices: list[int], factor: float) -> dict[str, Any]:
    part = {**group, "params": [group["params"][j] for j in indices]}
    if "param_names" in group:
        part["param_names"] = [group["param_names"][j] for j in indices]
    if factor != 1:  # untouched otherwise: a tensor stays the same tensor
        part["weight_decay"] = group["weight_decay"] * factor
    return part


def _own_tensors_(part: dict[str, Any]) -> None:
    """ReduceLROnPlateau changes a capturable lr in place, a group at a time: shared by two, it would shrink twice."""
    part.update({key: value.clone() for key, value in part.items() if isinstance(value, Tensor)})


def _name_(parts: Sequence[tuple[int, float, dict[str, Any]]], first: int, prefix: str) -> None:
    """Give the groups from ``first`` on names that say what they are and do not repeat."""
    several = len({i for i, _, _ in parts}) > 1
    split = {i for i, _, _ in parts if sum(j == i for j, _, _ in parts) > 1}
    kept = [i < first or (i not in split and "name" in group) for i, _, group in parts]
    taken = {group.get("name") for keeps, (_, _, group) in zip(kept, parts, strict=True) if keeps}
    for keeps, (i, factor, group) in zip(kept, parts, strict=True):
        if keeps:
            continue
        own = group.get("name", f"pg{i + 1}" if several else "")  # pg1 is what Lightning calls the first group
        own = own if own.removeprefix(prefix).strip() != "decay" else ""  # split before, by `param_groups` say
        name = candidate = " ".join(filter(None, (prefix, own, _group_name(factor))))
        number = 1
        while candidate in taken:
            number += 1
            candidate = f"{name} {number}"
        group["name"] = candidate
        taken.add(candidate)


def _info(parameter: Tensor, infos: Mapping[int, ParameterInfo]) -> ParameterInfo:
    """What is known of ``parameter``; of a tensor from outside the module, only its shape is."""
    if id(parameter) in infos:
        return infos[id(parameter)]
    kind = "vector" if parameter.dim() <= 1 else "weight"
    return ParameterInfo("<not in the module>", parameter, nn.Module(), kind, parameter.shape, ())  # type: ignore[arg-type]


def _layout(optimizer: Optimizer, infos: Mapping[int, ParameterInfo]) -> list[list[str]]:
    return [[_info(p, infos).name for p in group["params"]] for group in optimizer.param_groups]


def find_optimizers(configured: object) -> tuple[list[Any], list[Any]]:
    """The optimizers and LR schedulers in whatever ``configure_optimizers`` returned, once each, in order.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        >>> found = find_optimizers(([optimizer], [{"scheduler": scheduler, "interval": "step"}]))
        >>> found == ([optimizer], [scheduler])
        True
    """
    optimizers: dict[int, Any] = {}
    schedulers: dict[int, Any] = {}

    def visit(thing: object) -> None:
        if isinstance(thing, dict):
            thing = list(thing.values())
        if isinstance(thing, (list, tuple)):
            for element in thing:
                visit(element)
        elif isinstance(thing, torch.optim.Optimizer):
            optimizers[id(thing)] = thing
        elif hasattr(thing, "param_groups") and hasattr(thing, "optimizer"):  # a wrapper, such as LightningOptimizer
            visit(thing.optimizer)
        elif hasattr(thing, "optimizer") and callable(getattr(thing, "step", None)):
            schedulers[id(thing)] = thing

    visit(configured)
    return list(optimizers.values()), list(schedulers.values())


def repair_scheduler_(scheduler: Any, origins: Sequence[int], groups_before: Sequence[Mapping[str, Any]]) -> None:
    """Give an LR scheduler a value for each group, after its optimizer's groups were split.

    Args:
        scheduler: Any torch LR scheduler, or one that keeps its values a group in lists likewise.
        origins: For each group the index it had before.
        groups_before: The groups as the scheduler knew them.
    """
    for part in _nested(scheduler):
        for name, values in list(vars(part).items()):
            if not isinstance(values, (list, tuple)) or len(values) != len(groups_before):
                continue
            # Schedulers from elsewhere name their lists as they like: they are known by holding the groups' rates.
            if name in _PER_GROUP or any(_holds(values, groups_before, key) for key in ("lr", "initial_lr")):
                setattr(part, name, type(values)(values[i] for i in origins))


def _nested(scheduler: Any) -> list[Any]:
    """The scheduler and all that it drives: SequentialLR keeps a list, warm-ups from elsewhere an attribute."""
    found = [scheduler]
    for part in found:  # grows on the way
        _, children = find_optimizers(list(vars(part).values()))
        found += [c for c in children if c.optimizer is part.optimizer and all(c is not other for other in found)]
    return found


def _holds(values: Sequence[Any], groups: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Are ``values`` the groups' rates? Not so milestones that happen to be as large: they are integers."""
    rates = [group.get(key) for group in groups]
    return all(v is r or (type(v) is type(r) is float and v == r) for v, r in zip(values, rates, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


def adapt_state_dict(
    state_dict: dict[str, Any], optimizer: Optimizer, plan: Plan, saved_layout: list[list[str]] | None
) -> tuple[dict[str, Any], list[int] | None]:
    """An optimizer's state in the layout of its groups, from a checkpoint that may have another.

    Args:
        state_dict: As loaded; not changed.
        optimizer: The optimizer that it is for.
        plan: The layout of its groups.
        saved_layout: The names in each group of the checkpoint, if it tells.

    Returns:
        The state to load, and for each group the index it had in the checkpoint, or None where the layouts are one.

    Raises:
        ValueError: The checkpoint's groups differ, and cannot be brought into the layout without guessing.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> saved = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9).state_dict()
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> infos = {id(info.parameter): info for info in parameter_infos(layer)}
        >>> plan = plan_groups(optimizer, Grouping(), infos)
        >>> adapted, origins = adapt_state_dict(saved, optimizer, plan, None)
        >>> [group["params"] for group in adapted["param_groups"]], origins
        ([[0], [1]], [0, 0])
    """
    saved_groups = state_dict["param_groups"]
    saved_layout = saved_layout_of(state_dict, plan, saved_layout)
    if saved_layout is None or not _hold_the_same(saved_layout, plan.layout):
        raise ValueError(_layouts_differ(saved_groups, saved_layout, plan))
    origins = None
    if saved_layout != plan.layout:
        state_dict, origins = _rearranged(state_dict, optimizer, saved_layout, plan.layout)
    _check_shapes(state_dict, optimizer, plan)
    return state_dict, origins


def saved_layout_of(state_dict: Mapping[str, Any], plan: Plan, told: list[list[str]] | None) -> list[list[str]] | None:
    """The names in each group of a checkpoint's optimizer: as it tells, or one of the plan's that is of its sizes."""
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    candidates = [plan.layout, plan.original] if told is None else [told, plan.layout, plan.original]
    return next((names for names in candidates if [len(group) for group in names] == sizes), None)


def _hold_the_same(saved_layout: list[list[str]], layout: list[list[str]]) -> bool:
    """Are the parameters the same, and can each be told from the others?"""
    names = _flat(layout)
    unique = len(set(names)) == len(names)  # tensors from outside the module share a name
    return saved_layout == layout or (unique and sorted(_flat(saved_layout)) == sorted(names))


def _flat(layout: Iterable[Iterable[str]]) -> list[str]:
    return list(chain.from_iterable(layout))


def guard_state_dict(optimizer: Optimizer, infos: Mapping[int, ParameterInfo]) -> None:
    """Have ``optimizer`` refuse a state whose groups are not its own, instead of loading moments by position.

    Args:
        optimizer: From now on its ``load_state_dict`` raises a ValueError that names both layouts.
        infos: What is known of each parameter, by ``id(parameter)``.
    """

    def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        layout = _layout(optimizer, infos)  # as it is by then: groups may have been added
        plan = Plan(layout, [1.0] * len(layout), layout, list(range(len(layout))))
        adapt_state_dict(state_dict, optimizer, plan, None)

    optimizer.register_load_state_dict_pre_hook(check)


def numbered_like(module: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state whose parameters have the numbers that they have in ``module.parameters()``.

    By itself torch counts them group by group. An optimizer that loads a state does not look at the numbers, but who
    translates them into names, as FSDP2 and FSDP1 do with the checkpoint of a DDP run, takes them for the module's.

    Args:
        module: Whose parameters the optimizer holds.
        optimizer: As it is.
        state_dict: Its own; not changed.

    Returns:
        A state that loads as before; the same where parameters have names already.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD([{"params": layer.bias}, {"params": layer.weight}], lr=0.1)
        >>> [group["params"] for group in numbered_like(layer, optimizer, optimizer.state_dict())["param_groups"]]
        [[1], [0]]
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [key for group in state_dict.get("param_groups", ()) for key in group["params"]]
    if saved != list(range(len(held))) or hasattr(optimizer, "consolidate_state_dict"):  # ZeRO's numbers are its own
        return state_dict
    number = {id(parameter): i for i, parameter in enumerate(module.parameters())}
    for parameter in held:
        number.setdefault(id(parameter), len(number))
    numbers = [number[id(parameter)] for parameter in held]
    groups = [{**group, "params": [numbers[key] for key in group["params"]]} for group in state_dict["param_groups"]]
    state = {numbers[key] if isinstance(key, int) else key: value for key, value in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def _rearranged(
    state_dict: dict[str, Any], optimizer: Optimizer, saved_layout: list[list[str]], layout: list[list[str]]
) -> tuple[dict[str, Any], list[int]]:
    """The state with its groups as in ``layout``, and for each group one that it comes from.

    Raises:
        ValueError: One group would get two learning rates.
    """
    saved_groups = state_dict["param_groups"]
    place = {name: (i, j) for i, names in enumerate(saved_layout) for j, name in enumerate(names)}
    groups, origins = [], []
    for names, group in zip(layout, optimizer.param_groups, strict=True):
        sources = sorted({place[name][0] for name in names}) or [0]
        if len({float(saved_groups[i].get("lr", 0)) for i in sources}) > 1:
            raise ValueError(
                f"The checkpoint's parameter groups {sources} have different learning rates, and here they are one "
                "group. Resume with the groups that it was saved with, or load the weights alone."
            )
        own = {key: group[key] for key in ("name", "param_names", "weight_decay") if key in group}
        params = [saved_groups[i]["params"][j] for i, j in map(place.__getitem__, names)]
        groups.append({**(saved_groups[sources[0]] if names else group), **own, "params": params})
        origins.append(sources[0])
    return {**state_dict, "param_groups": groups}, origins


def _check_shapes(state_dict: dict[str, Any], optimizer: Optimizer, plan: Plan) -> None:
    """Refuse a state whose tensors cannot belong to the parameters where they would go.

    Raises:
        ValueError: A shape differs.
    """
    saved = (key for group in state_dict["param_groups"] for key in group["params"])
    current = (p for group in optimizer.param_groups for p in group["params"])
    for key, parameter, name in zip(saved, current, _flat(plan.layout), strict=True):
        for entry, value in (state_dict["state"].get(key) or {}).items():  # ZeRO writes None for another rank's
            if isinstance(value, Tensor) and not _fits(entry, value.shape, parameter.shape):
                raise ValueError(
                    f"The checkpoint has an optimizer state {entry!r} of shape {tuple(value.shape)} where "
                    f"{name!r} of shape {tuple(parameter.shape)} stands: its parameter groups hold other parameters. "
                    "Resume with the rules that it was saved with."
                )


def _fits(entry: str, shape: Sequence[int], parameter_shape: Sequence[int]) -> bool:
    if entry in _FACTORED_STATE and len(shape) == len(parameter_shape):
        return all(size in {1, whole} for size, whole in zip(shape, parameter_shape, strict=True))
    return entry not in {*_SHAPED_STATE, *_FACTORED_STATE} or shape == parameter_shape


def _layouts_differ(saved_groups: Sequence[Mapping[str, Any]], saved: list[list[str]] | None, plan: Plan) -> str:
    names = [group.get("name", f"pg{i}") for i, group in enumerate(saved_groups, start=1)]
    there = [f"{name}: {len(group['params'])}" for name, group in zip(names, saved_groups, strict=True)]
    here = [f"{len(names)}" for names in plan.layout]
    unknown = ""
    if saved is not None:
        only_there = sorted(set(_flat(saved)) - set(_flat(plan.layout)))
        only_here = sorted(set(_flat(plan.layout)) - set(_flat(saved)))
        unknown = f" Only in the checkpoint: {only_there[:5]}; only here: {only_here[:5]}."
    return (
        f"The checkpoint's optimizer has {len(there)} parameter groups of sizes ({', '.join(there)}), "
        f"here are {len(here)} of sizes ({', '.join(here)}), and it cannot be told which parameter is which.{unknown} "
        "Resume with the module and the rules that it was saved with, or load the weights alone."
    )
