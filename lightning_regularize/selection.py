"""Which parameters?

A parameter has a *canonical name* (the one it would have without DDP, FSDP, ``torch.compile`` and other wrappers), an
*owner* (the module that uses it) and a *kind*, found from the owner first, the name second, the unsharded shape last:

``bias``
    Named ``bias``, ``bias_*``, ``*_bias`` or ``*_bias_u``, with any letter for u. A table such as Swin's
    ``relative_position_bias_table`` is a weight.
``norm``
    Gain of a normalization layer: one of torch's, or a class named so, or GRN or FRN. If its name ends in norm
    (``LlamaRMSNorm``), a gain may have any shape, such as one number for each head and channel; otherwise it has at
    most one dimension larger than 1. The magnitudes of weight normalization count as gains too.
``embedding``
    Weight of an ``nn.Embedding`` or ``nn.EmbeddingBag``, or of a class that is named so.
``vector``
    Slope of a PReLU, factor of a LayerScale, or whatever else has at most one dimension.
``weight``
    The rest, tokens of shape ``(1, 1, C)`` and raw ``pos_embed`` parameters included.

*Rules* select parameters by kind, name, owner, or anything else, see :data:`Rule`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_regularize._outputs import output_weights
from lightning_regularize._sharding import unsharded_shapes

Kind = Literal["bias", "norm", "embedding", "vector", "weight"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds, strongest first: a tied tensor has the strongest kind of all the places it is used in."""


@dataclass(frozen=True, eq=False)  # compared by identity: `==` on tensors is elementwise
class ParameterInfo:
    """What is known about one parameter.

    Args:
        name: Canonical name; of a tied tensor the first in registration order.
        parameter: The tensor that the optimizer holds, on whatever device and however sharded it is.
        owner: The module that uses it; for ``parametrizations.weight.original`` the module that is parametrized.
        kind: One of :data:`KINDS`.
        shape: Unsharded shape; ``(0,)`` as long as a lazy parameter waits for its first batch.
        aliases: The other canonical names of a tied tensor.
        declared: Does the model itself ask for no weight decay here, by a method ``no_weight_decay()`` or
            ``no_weight_decay_keywords()`` of any of its modules, or by ``parameter._no_weight_decay = True``
            (which ``fully_shard`` and ``copy.deepcopy`` forget)?
        alias_owners: The other modules that use a tied tensor.
        is_output: Is it the weight of an output layer, by what the model itself says, by the name of the layer
            (``head``, ``lm_head``, ``classifier``) or else by the order of its layers?

    Example:
        >>> parameter_infos(nn.LayerNorm(3))[0]
        ParameterInfo(name='weight', kind='norm', shape=torch.Size([3]), aliases=(), declared=False)
    """

    name: str
    parameter: nn.Parameter = field(repr=False)
    owner: nn.Module = field(repr=False)
    kind: Kind
    shape: torch.Size
    aliases: tuple[str, ...] = ()
    declared: bool = False
    alias_owners: tuple[nn.Module, ...] = field(default=(), repr=False)
    is_output: bool = field(default=False, repr=False)


Rule = str | type[nn.Module] | Callable[[ParameterInfo], bool]
"""What selects parameters:

* a kind: ``"bias"``, ``"norm"``, ``"embedding"``, ``"vector"``, ``"weight"``;
* ``"hidden_matrices"``, which is :func:`hidden_matrices`;
* a glob on the canonical name, which has a ``.``, ``*``, ``?`` or ``[``: ``"encoder.*"``, ``"head.weight"``;
* ``"type:Embedding"``: the owner's class, or one of its bases, has this name;
* a module class, of which the owner is an instance;
* a function of a :class:`ParameterInfo`.

In a sequence of rules, ``"!rule"`` takes back what rules before it have selected: ``("norm", "!*.q_norm.weight")`` are
all gains of norms but those of queries. It may be a word or a glob, and not the first; rules after it select again.
"""

DEFAULT_EXCLUDE: tuple[Rule, ...] = ("bias", "norm", "vector")
"""What does not decay by default. Embeddings do, as in torch, timm and transformers; add ``"embedding"`` if not."""


def parameter_infos(module: nn.Module) -> list[ParameterInfo]:
    """What is known about every parameter of ``module``, frozen ones included, each tensor once.

    Args:
        module: Any module, wrapped or not. Under FSDP1 the wrapped one (``trainer.model``), for it alone knows shapes.

    Returns:
        One entry per tensor, in registration order.

    Raises:
        TypeError: If ``module`` is no module, or declares no weight decay for something else than names.
        ValueError: If FSDP1 shows a parameter as a flat piece of unknown shape.

    Example:
        >>> for info in parameter_infos(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2), nn.RMSNorm(2))):
        ...     print(info.name, info.kind, tuple(info.shape))
        0.weight embedding (9, 4)
        1.weight weight (2, 4)
        1.bias bias (2,)
        2.weight norm (2,)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` should be a torch.nn.Module, got {type(module).__name__}.")
    shapes, declared = unsharded_shapes(module), _declared(module)
    uses: dict[int, list[_Use]] = {}
    all_uses = list(_uses(module))
    for use in all_uses:
        uses.setdefault(id(use.parameter), []).append(use)
        if getattr(use.parameter, "_fsdp_flattened", False) and id(use.parameter) not in shapes:
            raise ValueError(
                f"{use.name!r} is a flat piece of an FSDP unit, of unknown shape: pass the module that "
                "FullyShardedDataParallel returned (`trainer.model` in Lightning), made with `use_orig_params=True`."
            )
    infos = [_info(tied, shapes.get(key), declared=key in declared) for key, tied in uses.items()]
    dims = {id(info.parameter): len(info.shape) for info in infos if info.kind in ("embedding", "weight")}
    weights = [(use.name, use.parameter) for use in all_uses if dims.get(id(use.parameter), 0) > 1]
    outputs = output_weights(module, weights)
    return [replace(info, is_output=True) if id(info.parameter) in outputs else info for info in infos]


FOREIGN = "<not in the module>"
"""The name of a parameter that an optimizer holds and the module does not."""


def foreign_info(parameter: nn.Parameter) -> ParameterInfo:
    """What is known about a parameter that the module does not hold: its shape.

    Args:
        parameter: Any tensor.

    Returns:
        Its information; a vector or a weight, by the number of dims.

    Example:
        >>> foreign_info(nn.Parameter(torch.ones(2, 2))).kind
        'weight'
    """
    kind: Kind = "vector" if parameter.dim() <= 1 else "weight"
    return ParameterInfo(FOREIGN, parameter, nn.Module(), kind, parameter.shape)


def select(module: nn.Module, *, include: Sequence[Rule] = ("*",), exclude: Sequence[Rule] = ()) -> list[ParameterInfo]:
    """The trainable parameters of ``module`` that match a rule of ``include`` and none of ``exclude``.

    What is no rule raises, see :func:`check_rules`, and so does a rule that selects nothing, see
    :func:`require_matches`.

    Args:
        module: See :func:`parameter_infos`.
        include: Rules, of which one has to match; all parameters by default.
        exclude: Rules, of which none may match.

    Returns:
        In registration order, each tensor once.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> [info.name for info in select(module, exclude=DEFAULT_EXCLUDE)]
        ['0.weight']
        >>> [info.name for info in select(module, include=("1.*", "bias"))]
        ['0.bias', '1.weight', '1.bias']
        >>> [info.name for info in select(module, include=("*", "!1.*"))]
        ['0.weight', '0.bias']
    """
    include, exclude = check_rules(include, argument="include"), check_rules(exclude, argument="exclude")
    chosen = matching(parameter_infos(module), include=include, exclude=exclude)
    return [info for info in chosen if info.parameter.requires_grad]


def matching(
    infos: Sequence[ParameterInfo], *, include: Sequence[Rule], exclude: Sequence[Rule]
) -> list[ParameterInfo]:
    """Those of ``infos`` that match a rule of ``include`` and none of ``exclude``, frozen ones included.

    Rules should have been checked by :func:`check_rules`; one that selects nothing raises, see :func:`require_matches`.

    Args:
        infos: What is known about the parameters of a module.
        include: Rules, of which one has to match.
        exclude: Rules, of which none may match.

    Returns:
        A part of ``infos``, in their order.

    Example:
        >>> infos = parameter_infos(nn.Linear(2, 3).requires_grad_(False))
        >>> [info.name for info in matching(infos, include=("*",), exclude=("bias",))]
        ['weight']
    """
    require_matches(include, infos, argument="include")
    require_matches(exclude, infos, argument="exclude")
    return [info for info in infos if is_selected(info, include=include, exclude=exclude)]


def is_selected(info: ParameterInfo, *, include: Sequence[Rule], exclude: Sequence[Rule]) -> bool:
    """Does ``include`` select a parameter, and ``exclude`` not? Rules should have been checked by :func:`check_rules`.

    Args:
        info: A parameter.
        include: Rules, of which one has to match.
        exclude: Rules, of which none may match.

    Returns:
        True if so.

    Example:
        >>> weight, bias = parameter_infos(nn.Linear(2, 3))
        >>> [is_selected(info, include=("*",), exclude=("bias",)) for info in (weight, bias)]
        [True, False]
    """
    return selecting_rule(include, info) is not None and selecting_rule(exclude, info) is None


def selecting_rule(rules: Iterable[Rule], info: ParameterInfo) -> Rule | None:
    """The rule that selects a parameter: the first that matches, after the last that takes it back.

    Args:
        rules: What :func:`check_rules` lets pass.
        info: A parameter.

    Returns:
        One of ``rules``; None if they do not select it.

    Example:
        >>> weight, bias = parameter_infos(nn.Linear(2, 3))
        >>> selecting_rule(("vector", "bias"), bias), selecting_rule(("bias", "!*"), bias)
        ('bias', None)
    """
    selecting: Rule | None = None
    for rule in rules:
        taken_back = taken_back_by(rule)
        if taken_back is None:
            selecting = rule if selecting is None and matches(rule, info) else selecting
        elif selecting is not None and matches(taken_back, info):
            selecting = None
    return selecting


def taken_back_by(rule: Rule) -> Rule | None:
    """The rule for what ``"!rule"`` takes back; None of one that selects.

    Example:
        >>> taken_back_by("!head.*"), taken_back_by("head.*")
        ('head.*', None)
    """
    return rule[1:] if isinstance(rule, str) and rule.startswith("!") else None


# Rules


def check_rules(rules: Sequence[Rule], *, argument: str) -> tuple[Rule, ...]:
    """The rules as a tuple, if each is one; a constructor can call it before there is a module.

    Args:
        rules: What was given.
        argument: The name under which it was given, for the message.

    Returns:
        The same rules.

    Raises:
        TypeError: If ``rules`` is no sequence, or holds something that cannot be a rule.
        ValueError: If it holds a word that is neither a kind nor a glob, or begins with one that takes back.

    Example:
        >>> check_rules(["bias", "head.*"], argument="exclude")
        ('bias', 'head.*')
        >>> check_rules(["biases"], argument="exclude")
        Traceback (most recent call last):
        ValueError: `exclude` should hold kinds (bias, norm, embedding, vector, weight), globs, 'type:Name', module \
classes or functions, got 'biases'. Did you mean 'bias'? To match names write '*biases*'.
    """
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        given: Any = rules
        written = getattr(given, "__name__", repr(given))
        is_rule = isinstance(given, str) or callable(given)
        alone = f"; one alone is ({written},)" if is_rule else "; a list or a tuple is one"
        raise TypeError(f"`{argument}` should be a sequence of rules, got {given!r}{alone}.")
    expected = f"`{argument}` should hold kinds ({', '.join(KINDS)}), globs, 'type:Name', module classes or functions"
    if rules and taken_back_by(rules[0]) is not None:
        raise ValueError(
            f"`{argument}`: {rules[0]!r} is the first rule and has nothing to take back. For all but that write "
            f"('*', {rules[0]!r})."
        )
    words = (*KINDS, hidden_matrices.__name__)
    for given_rule in rules:
        rule = given_rule if (taken_back := taken_back_by(given_rule)) is None else taken_back
        if isinstance(rule, str):
            if rule not in words and not rule.startswith("type:") and set(".*?[").isdisjoint(rule):
                close = difflib.get_close_matches(rule, words, n=1, cutoff=0.7)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                is_class_name = rule[:1].isupper()  # such as LayerNorm, which no parameter is called
                instead = f"For a class write 'type:{rule}'." if is_class_name else f"To match names write '*{rule}*'."
                raise ValueError(f"{expected}, got {rule!r}.{meant} {instead}")
        elif not (issubclass(rule, nn.Module) if isinstance(rule, type) else callable(rule)):
            raise TypeError(f"{expected}, got {rule!r}.")
        elif isinstance(rule, nn.Module):  # callable too, but not meant so
            raise TypeError(f"{expected}, got a module; give its class {type(rule).__name__}, or a glob on its name.")
    return tuple(rules)


def matches(rule: Rule, info: ParameterInfo) -> bool:
    """Does ``rule`` select this parameter? A tied tensor is selected by any of its names and owners.

    Args:
        rule: One that :func:`check_rules` lets pass, and that takes nothing back.
        info: A parameter.

    Returns:
        True if it does.

    Example:
        >>> weight, bias = parameter_infos(nn.Conv1d(1, 1, 3))
        >>> matches("bias", weight), matches("type:_ConvNd", weight), matches(lambda info: len(info.shape) == 3, weight)
        (False, True, True)
    """
    owners = (info.owner, *info.alias_owners)
    if isinstance(rule, type):
        return any(isinstance(owner, rule) for owner in owners)
    if not isinstance(rule, str):
        return bool(rule(info))
    if rule in KINDS:
        return info.kind == rule
    if rule == hidden_matrices.__name__:
        return hidden_matrices(info)
    if rule.startswith("type:"):
        return any(rule.removeprefix("type:") in _class_names(owner) for owner in owners)
    return any(fnmatchcase(name, rule) for name in (info.name, *info.aliases))


def hidden_matrices(info: ParameterInfo) -> bool:
    """A rule for Muon: weights with at least two dims that are neither an embedding nor an output layer.

    The first two dims are larger than 1: depthwise convolutions, position tables of shape ``(1, n, d)`` and class
    tokens are no matrices. Nor is what the model itself declares free of weight decay (``declared`` of
    :class:`ParameterInfo`), such as tables of relative positions. What is an output layer, ``is_output`` says; where it
    cannot be told, put a rule for it before this one, or name it in ``exclude``. In YAML, write ``"hidden_matrices"``.

    Args:
        info: A parameter.

    Returns:
        True if it is one.

    Example:
        >>> module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> [info.name for info in parameter_infos(module) if hidden_matrices(info)]
        ['1.weight']

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    is_matrix = info.kind == "weight" and len(info.shape) >= 2 and min(info.shape[:2]) > 1
    return is_matrix and not info.is_output and not info.declared


def require_matches(rules: Iterable[Rule], infos: Sequence[ParameterInfo], *, argument: str = "rules") -> None:
    """Check that no rule is idle, as a misspelled one is; only a kind may be absent from a module.

    Args:
        rules: What :func:`check_rules` let pass.
        infos: All parameters of the module, frozen ones included.
        argument: The name under which the rules were given, for the message.

    Raises:
        ValueError: If a glob, a type or a function matches none of them, or takes back nothing.

    Example:
        >>> infos = parameter_infos(nn.Sequential(nn.Linear(2, 2)))
        >>> require_matches(["norm", "*.wieght"], infos, argument="exclude")
        Traceback (most recent call last):
        ValueError: `exclude`: '*.wieght' matches no parameter; the nearest are '0.weight', '0.bias'.
    """
    before: list[Rule] = []
    for rule in rules:
        pattern = rule if (taken_back := taken_back_by(rule)) is None else taken_back
        matching_infos = [info for info in infos if matches(pattern, info)]
        if pattern not in KINDS and not matching_infos:
            nearest = ", ".join(map(repr, _nearest(pattern, infos)))
            hint = f"the nearest are {nearest}" if nearest else f"the module has {len(infos)}"
            if rule in (hidden_matrices, hidden_matrices.__name__):
                rule, hint = hidden_matrices.__name__, "the module has none beside embeddings and output layers"
            raise ValueError(f"`{argument}`: {rule!r} matches no parameter; {hint}.")
        is_idle = all(selecting_rule(before, info) is None for info in matching_infos)
        if taken_back is not None and matching_infos and is_idle:
            raise ValueError(f"`{argument}`: {rule!r} takes back nothing: no rule before it selects what it matches.")
        before.append(rule)


def _nearest(rule: Rule, infos: Sequence[ParameterInfo]) -> list[str]:
    if isinstance(rule, type) or (isinstance(rule, str) and rule.startswith("type:")):
        word = rule.removeprefix("type:") if isinstance(rule, str) else rule.__name__
        owners = [owner for info in infos for owner in (info.owner, *info.alias_owners)]
        candidates = [name for owner in owners for name in _class_names(owner)]
    elif isinstance(rule, str):
        word, candidates = rule.strip("*"), [name for info in infos for name in (info.name, *info.aliases)]
    else:
        return []
    return difflib.get_close_matches(word, dict.fromkeys(candidates), n=3, cutoff=0.0)


# Names and owners

# The children under which a wrapper keeps what it wraps. Known by the wrapper's class name, so that neither Dynamo nor
# Lightning nor DeepSpeed is imported to ask; and by parent, for a model may have a child `module` of its own.
_WRAPPED_CHILDREN = {
    "ActivationWrapper": {"_checkpoint_wrapped_module"},
    "AveragedModel": {"module"},
    "DataParallel": {"module"},
    "DeepSpeedEngine": {"module"},
    "DistributedDataParallel": {"module"},
    "FullyShardedDataParallel": {"_fsdp_wrapped_module"},
    "OptimizedModule": {"_orig_mod"},
    "_FabricModule": {"_forward_module", "_original_module"},
}


class _Use(NamedTuple):
    """One place in which a parameter hangs. A tied tensor has several."""

    name: str  # canonical
    parameter: nn.Parameter
    owner: nn.Module
    tensor: str  # canonical name of the tensor that `owner` computes with; differs from `name` if parametrized
    is_magnitude: bool  # of weight normalization


def _uses(module: nn.Module, path: str = "", parents: tuple[nn.Module, ...] = ()) -> Iterator[_Use]:
    # Not `named_parameters()`: it leaves out all names of a tied tensor but the first, and wrappers override it.
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _use(name, parameter, path, (*parents, module))
    for name, child in module._modules.items():
        if child is not None:
            yield from _uses(child, path if wraps(module, name) else _join(path, name), (*parents, module))


def _use(name: str, parameter: nn.Parameter, path: str, modules: tuple[nn.Module, ...]) -> _Use:
    full_name, holder = _join(path, name), modules[-1]
    if isinstance(holder, ParametrizationList) and len(modules) > 2:
        # `path` is "<path of the owner>.parametrizations.<name of the tensor>"
        outer, _, tensor = path.rpartition("parametrizations.")
        is_magnitude = name == "original0" and isinstance(holder[0], _WeightNorm)
        return _Use(full_name, parameter, modules[-3], outer + tensor, is_magnitude)
    for hook in holder._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and name in {f"{hook.name}_g", f"{hook.name}_v"}:
            return _Use(full_name, parameter, holder, _join(path, hook.name), name.endswith("_g"))
    # What the hooks of `torch.nn.utils.spectral_norm` and `torch.nn.utils.prune` compute with.
    return _Use(full_name, parameter, holder, _join(path, name.removesuffix("_orig")), is_magnitude=False)


def _info(uses: list[_Use], shape: torch.Size | None, *, declared: bool) -> ParameterInfo:
    first = uses[0]
    if shape is None and not is_lazy(first.parameter):
        shape = first.parameter.shape
    names = list(dict.fromkeys(use.name for use in uses))  # Fabric shows each module twice, under one canonical name
    return ParameterInfo(
        name=first.name,
        parameter=first.parameter,
        owner=first.owner,
        kind=min((_kind(use, shape) for use in uses), key=KINDS.index),
        shape=torch.Size([0]) if shape is None else shape,
        aliases=tuple(names[1:]),
        declared=declared,
        alias_owners=tuple(use.owner for use in uses[1:]),
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def wraps(module: nn.Module, child: str) -> bool:
    """Is ``module`` a wrapper, such as DDP, and ``child`` the name under which it keeps what it wraps?"""
    return any(child in _WRAPPED_CHILDREN.get(name, ()) for name in _class_names(module))


def _class_names(module: nn.Module) -> list[str]:
    """Of the module's class and its bases, ``Module`` and ``object`` left out."""
    return [cls.__name__ for cls in type(module).__mro__ if cls not in {nn.Module, object}]


def tensor_name(name: str) -> str:
    """What a layer calls the tensor that it computes from a parameter: ``weight``, where that is parametrized.

    Example:
        >>> tensor_name("0.weight"), tensor_name("0.parametrizations.weight.original1")
        ('weight', 'weight')
    """
    path, _, leaf = name.rpartition(".")
    _, is_parametrized, tensor = path.rpartition("parametrizations.")
    return tensor if is_parametrized else leaf


def is_normalized(info: ParameterInfo) -> bool:
    """Is the tensor divided by its own norm before the layer uses it, as in weight and spectral normalization of torch?

    The model then does not depend on its scale, and at zero it is 0/0.
    """
    leaf, tensor = info.name.rpartition(".")[2], tensor_name(info.name)
    if leaf != tensor:
        parametrizations = getattr(info.owner, "parametrizations", {})
        by = list(parametrizations[tensor]) if tensor in parametrizations else []
        is_direction = leaf == "original1" and any(isinstance(part, _WeightNorm) for part in by)
        return is_direction or any(isinstance(part, _SpectralNorm) for part in by)
    hooks = info.owner._forward_pre_hooks.values()
    return any(
        (isinstance(hook, WeightNorm) and leaf == f"{hook.name}_v")
        or (isinstance(hook, SpectralNorm) and leaf == f"{hook.name}_orig")
        for hook in hooks
    )


def has_sparse_gradient(info: ParameterInfo) -> bool:
    """Is it the table of an embedding with ``sparse=True``, and trained?"""
    return info.parameter.requires_grad and info.kind == "embedding" and getattr(info.owner, "sparse", False) is True


# Kinds

_TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Never a norm, whatever the class is called: `SpectralNormLinear(64, 1)`.
_TORCH_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
# bias, in_proj_bias, bias_ih_l0, and pos_bias_u and pos_bias_v of relative positions, which have a row for each head.
_BIAS_NAME = re.compile(r"bias(_.*)?|.*_bias(_[a-z])?")
# Norm, RMSNorm, Normalize, Normalization; but neither Normal nor NormalHead. And the initials GRN and FRN, of global
# and filter response normalization, whose gains have the dims of an image.
_NORM_NAME = re.compile(r"(?i:norm(?!al(?!i[sz])))|[GF]RN([123]d)?$")
# A layer that does nothing else: RMSNorm, LayerNorm2d, Normalization, RMSNormGated; but neither NormLinear nor
# WeightNorm, which have matrices.
_NORM_LAYER_NAME = re.compile(
    r"(?<!weight)(?<!spectral)norm(ali[sz](e|er|ation))?(gated|act|fp32|no_?bias|per_?head|[123]d)*$", re.IGNORECASE
)


def _kind(use: _Use, shape: torch.Size | None) -> Kind:
    """The kind that one use gives. The ``shape`` of a lazy parameter is unknown, and then decides nothing."""
    owner, leaf, classes = use.owner, use.tensor.rpartition(".")[2], _class_names(use.owner)
    if _BIAS_NAME.fullmatch(leaf):
        return "bias"
    if use.is_magnitude or _is_norm(owner, classes, shape):
        return "norm"
    if leaf == "weight" and any(name.endswith(("Embedding", "EmbeddingBag")) for name in classes):
        return "embedding"
    if leaf.startswith("layer_scale") or any(name.startswith("LayerScale") for name in classes):
        return "vector"
    if shape is not None and len(shape) < 2:
        return "vector"
    return "weight"


def _is_norm(owner: nn.Module, classes: list[str], shape: torch.Size | None) -> bool:
    if isinstance(owner, (_TORCH_NORMS, _TORCH_PRODUCTS)):
        return isinstance(owner, _TORCH_NORMS)
    if shape is None or sum(size > 1 for size in shape) < 2:
        return any(_NORM_NAME.search(name) for name in classes)
    is_product = hasattr(owner, "out_features") or hasattr(owner, "out_channels")
    return not is_product and any(_NORM_LAYER_NAME.search(name) for name in classes)


# What the model itself declares


def _declared(module: nn.Module) -> set[int]:
    """``id`` of each parameter for which a module of the tree, or a mark on the tensor, asks for no weight decay."""
    declared = {id(parameter) for parameter in module.parameters() if getattr(parameter, "_no_weight_decay", False)}
    for part in module.modules():
        prefixes = [canonical(name, part) for name in _declaration(part, "no_weight_decay")]
        keywords = _declaration(part, "no_weight_decay_keywords")
        for use in _uses(part) if prefixes or keywords else ():
            names = (use.name, use.tensor)
            is_listed = any(_is_listed(name, listed) for name in names for listed in prefixes)
            if is_listed or any(keyword in name for name in names for keyword in keywords):
                declared.add(id(use.parameter))
    return declared


def _is_listed(name: str, listed: str) -> bool:
    """Is the parameter, a module that has it, or a pattern that it matches, as XCiT's ``"pos_embed.*"``, ``listed``?"""
    return f"{name}.".startswith(f"{listed}.") or fnmatchcase(name, listed)


def _declaration(module: nn.Module, method: str) -> Collection[str]:
    # Not `getattr` at once: wrappers forward it, and the wrapped module comes by itself.
    if method not in vars(module) and not hasattr(type(module), method):
        return ()
    declare = getattr(module, method)
    if not callable(declare):  # a setting of the user's, which happens to have this name
        return ()
    names = declare()
    if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`{type(module).__name__}.{method}()` should return a collection of parameter names, got {names!r}."
        )
    return names


def canonical(name: str, module: nn.Module) -> str:
    """``name``, which is relative to ``module``, without what wrappers below ``module`` add to it."""
    parts: list[str] = []
    at: nn.Module | None = module
    for part in name.split("."):
        if at is None or not wraps(at, part):
            parts.append(part)
        at = None if at is None else at._modules.get(part)
    return ".".join(parts)
