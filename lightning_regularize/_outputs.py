"""Which weights are a model's output layers? Found without a batch, from what models say and from names and order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

# What output layers are called that are one layer. `fc` and `output` are called so in the middle of models too, and
# `heads` may be those of attention.
_NAMES = frozenset(
    ("head", "lm_head", "cls_head", "classifier", "logits", "output_layer", "output_projection", "embed_out", "score")
)


def output_weights(module: nn.Module, weights: Sequence[tuple[str, Any]]) -> set[int]:
    """The output layers of a model, by the ``id`` of their weights.

    * What timm's models name as their classifier (``pretrained_cfg``), which may be missing there on purpose.
    * Layers that are called ``head``, ``lm_head``, ``classifier`` and the like.
    * If no layer is called so: the last weight with at least two dims in registration order, unless it is in one of
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
    told: set[int] = set()
    inside: set[int] = set()
    for model, classifiers in _models_that_tell(module):
        inside |= {id(parameter) for parameter in model.parameters()}
        told |= {
            id(p) for name in classifiers if (layer := _child(model, name)) is not None for p in layer.parameters()
        }
    own = [(name, id(parameter)) for name, parameter in weights if id(parameter) not in inside]
    named = {key for name, key in own if name.rpartition(".")[0].rpartition(".")[2] in _NAMES}
    last = set() if named else {id(parameter) for _, parameter in weights[-1:]} - inside
    return {id(parameter) for _, parameter in weights} & (told | named | last)


def _models_that_tell(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[str]]]:
    for model in module.modules():
        config: Any = vars(model).get("pretrained_cfg") or vars(model).get("default_cfg")
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
