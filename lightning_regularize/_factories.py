"""Which optimizer is made for which parameters, by rules, and what speaks against it?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_regularize.groups import first_match, rule_name
from lightning_regularize.selection import check_rules, matches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_regularize.selection import ParameterInfo, Rule


def check_factories(optimizers: Any) -> None:
    """Refuse what maps no rules to what makes optimizers; a constructor can call it before there is a module.

    Args:
        optimizers: What was given.

    Raises:
        TypeError: It is no mapping, a key is no rule, or a value cannot be called.
        ValueError: It is empty, or a rule is not understood.
    """
    if not isinstance(optimizers, Mapping):
        raise TypeError(
            "ChainedOptimizer: `optimizers` should map rules to what makes an optimizer, such as "
            f"{{hidden_matrices: partial(torch.optim.Muon, lr=0.02), '*': torch.optim.AdamW}}, got {optimizers!r}."
        )
    if not optimizers:
        raise ValueError("ChainedOptimizer: `optimizers` is empty. Give it a rule, or '*' for all parameters.")
    check_rules(tuple(optimizers), argument="optimizers")
    for rule, factory in optimizers.items():
        if not callable(factory):
            instead = f" For example functools.partial(torch.optim.{type(factory).__name__}, lr=...)."
            raise TypeError(
                f"ChainedOptimizer: the value of {rule_name(rule)!r} should make an optimizer of a list of parameters, "
                f"got {type(factory).__name__}." + instead * isinstance(factory, Optimizer)
            )


def check_initialized(infos: Sequence[ParameterInfo]) -> None:
    """Refuse parameters that have no shape yet.

    Raises:
        ValueError: There are some.
    """
    if lazy := [info.name for info in infos if is_lazy(info.parameter)]:
        raise ValueError(
            f"ChainedOptimizer: {lazy} have no shape yet, so that rules cannot tell them apart: run a batch through "
            "the model before."
        )


def check_decisive(rules: Sequence[Rule], infos: Sequence[ParameterInfo]) -> None:
    """Refuse a rule that matches only what rules before it match.

    Raises:
        ValueError: There is one.
    """
    decisive = {first_match(rules, info) for info in infos}
    for rule in rules:
        if rule not in decisive and rule != "*" and any(matches(rule, info) for info in infos):
            raise ValueError(
                f"ChainedOptimizer: the optimizer of {rule_name(rule)!r} gets nothing: rules before it match all that "
                "it matches. Change the order of `optimizers`."
            )


def divide(
    parameters: Sequence[Any], infos: Sequence[ParameterInfo], rules: Mapping[Any, Any]
) -> dict[Any, list[ParameterInfo]]:
    """Which rule each parameter is for, in the order of the rules; rules without parameters are left out.

    Raises:
        ValueError: A parameter is not among ``infos``, or matches no rule.
    """
    known = {id(info.parameter): info for info in infos}
    if foreign := [tuple(p.shape) for p in parameters if id(p) not in known]:
        raise ValueError(
            f"ChainedOptimizer: parameters of shapes {foreign} are not of its module, so no rule is known."
        )
    found: dict[Any, list[ParameterInfo]] = {rule: [] for rule in rules}
    missed: list[ParameterInfo] = []
    for info in (known[id(parameter)] for parameter in parameters):
        rule = first_match(rules, info)
        (missed if rule is None else found[rule]).append(info)
    if missed:
        raise ValueError(
            f"ChainedOptimizer: no rule matches {_names(missed)}. Add '*' as the last rule, with an optimizer for the "
            "rest."
        )
    return {rule: selected for rule, selected in found.items() if selected}


def make_optimizer(rule: Rule, factory: Callable[[Any], Any], infos: Sequence[ParameterInfo]) -> Optimizer:
    """The optimizer of a rule, over the parameters that the rule selects.

    Raises:
        TypeError: What was made is no optimizer, or one that evaluates the closure by itself.
        ValueError: It refuses its parameters, or holds others.
    """
    try:
        optimizer = factory([info.parameter for info in infos])
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(_refusal(rule, factory, infos, error)) from error
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"ChainedOptimizer: the value of {rule_name(rule)!r} should make a torch.optim.Optimizer of a list of "
            f"parameters, it made {optimizer!r}."
        )
    held = [id(p) for each in optimizer.param_groups for p in each["params"]]
    if sorted(held) != sorted(id(info.parameter) for info in infos):
        raise ValueError(
            f"ChainedOptimizer: the optimizer of {rule_name(rule)!r} should hold the {len(infos)} parameters that it "
            f"is given, each once. It holds {len(held)}, not the same."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"ChainedOptimizer: {type(optimizer).__name__}, the optimizer of {rule_name(rule)!r}, evaluates the "
            "closure by itself, and here the closure is evaluated once for all: use another optimizer."
        )
    return optimizer


def _accepts(factory: Callable[[Any], Any], parameter: nn.Parameter) -> bool:
    try:
        factory([parameter])
    except (TypeError, ValueError):
        return False
    return True


def _refusal(rule: Rule, factory: Callable[[Any], Any], infos: Sequence[ParameterInfo], error: Exception) -> str:
    """Is it for some parameters that the optimizer cannot be made, or for any?"""
    refused = [info for info in infos if not _accepts(factory, info.parameter)]
    if not refused or not _accepts(factory, nn.Parameter(torch.zeros(8, 8, device="cpu"))):
        return f"ChainedOptimizer: the optimizer of {rule_name(rule)!r} cannot be made: {error}"
    says = f"ChainedOptimizer: the optimizer of {rule_name(rule)!r} does not take {_names(refused)}: {error}."
    if any(info.parameter.shape != info.shape for info in refused):
        return f"{says} FSDP1 shows flat pieces of weights: use FSDP2 (fully_shard)."
    rules = dict.fromkeys(
        info.kind if info.kind != "weight" else f"type:{type(info.owner).__name__}" for info in refused
    )
    return f"{says} Put a rule with another optimizer before it, such as {', '.join(map(repr, rules))}."


def _names(infos: Sequence[ParameterInfo], most: int = 5) -> str:
    named = [f"{info.name!r} of shape {tuple(info.shape)}" for info in infos[:most]]
    return ", ".join(named) + (f" and {len(infos) - most} more" if len(infos) > most else "")
