"""Which weights are a model's output layers? Found without a batch, from what models say and from names and order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

# Layers of such a name: head, lm_head, policy_head, classifier. `fc` and `output` are in the middle of models too,
# `heads` may be those of attention, and `q_head` makes queries for them, in Funnel.
_NAME = re.compile(r"(^|(?<!^[qkv])_)(head|classifier)$|^embed_out$")
_ROUTER = re.compile(r"(^|_)router$")  # its `classifier` chooses experts in the middle of a model


def output_weights(module: nn.Module, weights: Sequence[tuple[str, Any]]) -> set[int]:
    """The output layers of a model, by the ``id`` of their weights.

    * What timm's models name as their classifier (``pretrained_cfg``), which may be missing there on purpose.
    * Layers whose name is or ends in ``head`` or ``classifier``, as ``lm_head``, outside of routers; of several layers
      in a module that is called so, such as an ``nn.Sequential``, the last one.
    * If nothing is called so: the last weight with at least two dims in registration order, unless it is in one of
      timm's models.

    Args:
        module: The model.
        weights: Canonical name and parameter of all weights with at least two dims, in registration order; a tied one
            stands at each of its places.

    Returns:
        Of each output layer, the ``id`` of its weight.

    Example:
        >>> from torch import nn
        >>> layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> output_weights(layers, [("0.weight", layers[0].weight), ("2.weight", layers[2].weight)]) == {
        ...     id(layers[2].weight)
        ... }
        True
    """
    declared: set[int] = set()
    inside: set[int] = set()
    for model, classifiers in _models_with_classifiers(module):
        inside |= {id(parameter) for parameter in model.parameters()}
        declared |= {
            id(p) for name in classifiers if (layer := _child(model, name)) is not None for p in layer.parameters()
        }
    own = [(name, id(parameter)) for name, parameter in weights if id(parameter) not in inside]
    named: dict[str, int] = {}  # by the path of what is called so, its last weight
    for name, key in own:
        *path, _ = name.split(".")
        if not any(map(_ROUTER.search, path)):
            named.update({".".join(path[: i + 1]): key for i, part in enumerate(path) if _NAME.search(part)})
    last = set() if named else {id(parameter) for _, parameter in weights[-1:]} - inside
    return {id(parameter) for _, parameter in weights} & (declared | {*named.values()} | last)


def _models_with_classifiers(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[str]]]:
    found = [module]
    for model in found:  # faster than `module.modules()`, and a module that is found twice does no harm
        found += [child for child in model._modules.values() if child is not None]
        config: Any = model.__dict__.get("pretrained_cfg") or model.__dict__.get("default_cfg")
        if config is None:
            continue
        classifier = config.get("classifier") if hasattr(config, "get") else getattr(config, "classifier", None)
        if isinstance(classifier, str):
            yield model, (classifier,)
        elif isinstance(classifier, (tuple, list)) and all(isinstance(name, str) for name in classifier):
            yield model, classifier


def _child(model: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        child = model._modules.get(part)
        if child is None:
            return None
        model = child
    return model
