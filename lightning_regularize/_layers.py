"""Which layer does a parameter belong to, counted from the input? For learning rates of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_regularize._checks import check_layer_decay
from lightning_regularize.selection import canonical, wraps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_regularize.selection import ParameterInfo


def layer_scales(
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
            return _matched_layers(submodule, infos, canonical(path, module) if path else "")
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
    inner = next((child for name, child in block.named_children() if wraps(block, name)), None)
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
