"""Which tensor does a layer use, and which parameters, that an optimizer holds, is it computed from?

Parametrizations, the older weight and spectral normalization, pruning masks and the fake quantizers of training that is
aware of quantization compute a weight anew in each forward pass. To compute it here changes nothing: the modules that
do so are in evaluation mode meanwhile, in which spectral normalization uses its vectors as the last forward pass has
left them; they get copies of their buffers, fake quantizers are copied, and random generators are put back.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

from lightning_regularize._checks import is_named
from lightning_regularize._sharding import gathered, is_dtensor, local_tensor, piece_like
from lightning_regularize.selection import ParameterInfo, matching, tensor_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lightning_regularize._steps.targets import Targets

# Parameters of bitsandbytes, whose elements are not those of the weight, or not those that the layer multiplies by.
_PACKED = ("Params4bit", "Int8Params")


class Piece(NamedTuple):
    """What this rank holds of a used weight.

    Args:
        tensor: The elements.
        like: A tensor that is spread over ranks in the same way.
        shape: The shape of the whole.
    """

    tensor: Tensor
    like: Tensor
    shape: torch.Size


@dataclass(frozen=True, eq=False)
class UsedWeight:
    """A tensor that a layer uses.

    Args:
        info: What rules see of it. A computed weight has the name by which the layer knows it, and those of its sources
            as aliases; ``parameter`` is the largest source then.
        stored: What is known of that parameter by itself.
        recipe: How it is computed.
    """

    info: ParameterInfo
    stored: ParameterInfo
    recipe: Recipe

    @property
    def is_computed(self) -> bool:
        """Does the layer compute it from other tensors?"""
        return bool(self.recipe.makers)

    @property
    def is_trainable(self) -> bool:
        """Is any of the parameters that it is computed from trained?"""
        return any(source.requires_grad for source in self.recipe.sources.values())

    @cached_property
    def unknown_because(self) -> str:
        """Why it cannot be told from outside what the layer uses, as the end of a sentence; empty of most weights."""
        owner, leaf = self.stored.owner, self.info.name.rpartition(".")[2]
        if is_named(self.stored.parameter, *_PACKED):
            return f"which {type(self.stored.parameter).__name__} packs in a way of its own"
        if not self.is_computed:
            return ""
        if _fake_quantizers(owner, leaf) and "bn" in owner._modules:
            return f"which {type(owner).__name__} scales by its batch norm before it rounds them"
        made_and_read = [_makes(hook) for hook in self.recipe.makers]
        made_later = {made for made, _ in made_and_read}
        for made, read in made_and_read:
            if made_later.intersection(read):
                return "which their layers compute from what a hook that comes later left in the forward pass before"
            made_later.discard(made)
        if any(leaf in _makes(hook)[1] for hook in owner._forward_pre_hooks.values()):
            return "from which a hook computes another one"
        return ""

    @property
    def is_up_to_date(self) -> bool:
        """Is it computed as it was? Masks and parametrizations may come and go while training."""
        now = _recipe_of(self.stored)
        return now is not None and now.makers == self.recipe.makers

    def piece(self) -> Piece:
        """Its elements as they are now, of a computed weight a copy. All ranks take part where sources are spread."""
        parameter = self.info.parameter
        if not self.is_computed:
            return Piece(_unpacked(parameter), parameter, self.info.shape)
        with torch.no_grad(), _generators_put_back(parameter.device):
            weight = self.recipe.compute(self.info.owner)
        if weight.shape != parameter.shape:
            return Piece(weight, weight, weight.shape)
        # Of what is spread over ranks, a rank keeps no more than its piece.
        return Piece(piece_like(weight, parameter) if is_dtensor(parameter) else weight, parameter, weight.shape)


def used_weight(info: ParameterInfo) -> UsedWeight | None:
    """What a layer computes from a parameter, or the parameter itself.

    Parameters of a parametrization, such as the factors of a low-rank one, are weights of their own.

    Args:
        info: What is known of the parameter. Of a tied one the first use counts.

    Returns:
        None if a larger parameter is the one that stands for the weight, so that each weight is found once.

    Example:
        >>> from lightning_regularize.selection import parameter_infos
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 3, bias=False))
        >>> [used.info.name for info in parameter_infos(layer) if (used := used_weight(info))]
        ['weight']
    """
    recipe = _recipe_of(info) or Recipe((), info.name, {info.name: info.parameter}, {})
    if not recipe.makers:
        return UsedWeight(info, info, recipe)
    largest = max(recipe.sources.values(), key=torch.Tensor.numel)
    if largest is not info.parameter:
        return None
    aliases = tuple(dict.fromkeys([*recipe.sources, *info.aliases]))
    return UsedWeight(replace(info, name=recipe.name, aliases=aliases), info, recipe)


def used_weights(infos: Sequence[ParameterInfo]) -> list[UsedWeight]:
    """The weights that the layers use, each once, in the order of the parameters that stand for them."""
    return [used for info in infos if (used := used_weight(info)) is not None]


def select_used(infos: Sequence[ParameterInfo], *, include: Sequence[Any], exclude: Sequence[Any]) -> list[UsedWeight]:
    """Those that are trained and that rules select, see :func:`~lightning_regularize.selection.select`."""
    used = {id(weight.info): weight for weight in used_weights(infos)}
    chosen = matching([weight.info for weight in used.values()], include=include, exclude=exclude)
    return [used[id(info)] for info in chosen if used[id(info)].is_trainable]


def without_unknown(weights: Sequence[UsedWeight], warn: Callable[[str], None], who: str) -> list[UsedWeight]:
    """Weights without those of which it cannot be told what their layers use; a warning names the first of these."""
    unknown = [weight for weight in weights if weight.unknown_because]
    if unknown:
        name, why = unknown[0].info.name, unknown[0].unknown_because
        warn(f"{who} leaves out {len(unknown)} weights such as {name!r}, {why}: what is used cannot be told.")
    return [weight for weight in weights if not weight.unknown_because]


def pruning_mask(info: ParameterInfo) -> Tensor | None:
    """What a layer multiplies a parameter by, if a pruning mask of torch's is all that it does to it; else None."""
    owner = info.owner
    if not owner._forward_pre_hooks or info.aliases:  # which another layer may use without the mask
        return None
    makers = [hook for hook in owner._forward_pre_hooks.values() if _makes(hook)[1]]
    read = {source for hook in makers for source in _makes(hook)[1]}
    for made in [hook._tensor_name for hook in makers if isinstance(hook, BasePruningMethod)]:
        is_last = made not in read and not _fake_quantizers(owner, made)
        if owner._parameters.get(f"{made}_orig") is info.parameter and is_last:
            mask: Tensor = getattr(owner, f"{made}_mask")
            return mask if mask.shape == info.parameter.shape else None  # FSDP1 holds pieces
    return None


class Layers:
    """The layers of some parameters. Of most they are plain, which is seen at once.

    Args:
        infos: What is known of the parameters.
    """

    def __init__(self, infos: Iterable[ParameterInfo]) -> None:
        self.infos = list(infos)
        self._number = -1

    @cached_property
    def _places(self) -> list[tuple[nn.Module, str]]:
        return [(info.owner, info.name.rpartition(".")[2]) for info in self.infos]

    def are_plain(self) -> bool:
        """Does each hold its parameter under its name, and nothing that might compute something from it?"""
        if self.may_mask():
            return False
        return all(leaf in owner._parameters and not owner._modules for owner, leaf in self._places)

    def may_mask(self) -> bool:
        """Has one of them a hook, which might be a pruning mask?"""
        number = RemovableHandle.next_id  # which whoever adds a hook takes, and counts on
        if number != self._number and not any(info.owner._forward_pre_hooks for info in self.infos):
            self._number = number
        return number != self._number


@contextmanager
@torch.no_grad()
def as_used(layers: Layers) -> Iterator[None]:
    """Parameters have zeros meanwhile where a pruning mask makes zeros of them; then they have their own again."""
    own = []
    for info in layers.infos if layers.may_mask() else ():
        if info.owner._forward_pre_hooks and (mask := pruning_mask(info)) is not None:
            piece, is_gone = local_tensor(info.parameter), piece_like(mask, info.parameter) == 0
            own.append((piece, piece.where(is_gone, 0.0)))
            piece.masked_fill_(is_gone, 0.0)
    try:
        yield
    finally:
        for piece, values in own:
            piece.add_(values)


def follow_moved(targets: Targets[Any], optimizer: Any) -> None:
    """Learn anew what layers no longer hold under its name: a pruning mask or a parametrization moves it."""
    infos = (target.info for of_group in targets.of(optimizer) for target in of_group)
    if not all(info.name.rpartition(".")[2] in info.owner._parameters for info in infos):
        targets.refresh()


def why_not_held(info: ParameterInfo) -> str:
    """For which weights a constraint on this parameter does not hold, and what to do, as the end of a sentence.

    Told by names of torch's, which others use as well. Empty if the layer uses the parameter as it is.
    """
    path, _, leaf = info.name.rpartition(".")
    stem, _, suffix = leaf.rpartition("_")
    is_source = suffix in ("orig", "g", "v") and hasattr(info.owner, stem) and stem not in info.owner._parameters
    if is_source or ".parametrizations." in f".{path}." or _fake_quantizers(info.owner, leaf):
        return (
            f"parametrized weights, which are computed anew from {info.name!r}: leave it out by `exclude`, or take the "
            "parametrization away."
        )
    return f"packed weights such as {info.name!r}: leave it out by `exclude`." if is_packed(info) else ""


def is_packed(info: ParameterInfo) -> bool:
    """Does the parameter stand for other numbers than its elements, those of a quantized weight?"""
    parameter: Any = info.parameter
    return is_named(parameter, *_PACKED) or (not is_lazy(parameter) and _is_quantized(local_tensor(parameter)))


# How a weight is computed


class Recipe(NamedTuple):
    """How a layer computes a weight.

    Args:
        makers: A list of parametrizations and its members, or the hooks, and a fake quantizer, in the order in which
            they act; none of a plain parameter.
        name: The canonical name of the weight.
        sources: The parameters that it is computed from, by canonical name.
        inputs: All parameters that the computation reads, by their names in the module that makes it. They are looked
            up once, because between a forward and a backward pass FSDP2 shows others.
    """

    makers: tuple[Any, ...]
    name: str
    sources: Mapping[str, nn.Parameter]
    inputs: Mapping[str, nn.Parameter]

    def compute(self, owner: nn.Module) -> Tensor:
        """The whole weight of ``owner``."""
        whole: dict[str, Any] = {name: gathered(parameter) for name, parameter in self.inputs.items()}
        leaf = self.name.rpartition(".")[2]
        quantizers = _fake_quantizers(owner, leaf)
        if isinstance(self.makers[0], ParametrizationList):
            return _quantized(_parametrized(self.makers[0], whole), quantizers)
        stand_in = _StandIn(owner, whole)
        for hook in self.makers:
            made, _ = _makes(hook)
            if not made:
                continue  # the fake quantizer comes last
            if isinstance(hook, BasePruningMethod):
                whole[made] = hook.apply_mask(stand_in)  # type: ignore[no-untyped-call]
            elif isinstance(hook, SpectralNorm):
                whole[made] = hook.compute_weight(stand_in, do_power_iteration=False)  # type: ignore[arg-type]
            else:
                whole[made] = hook.compute_weight(stand_in)
        return _quantized(whole[leaf], quantizers)


def _recipe_of(info: ParameterInfo) -> Recipe | None:
    """How the layer makes a weight of a parameter; None if it does not hold the parameter under its name any more."""
    owner, (path, _, leaf) = info.owner, info.name.rpartition(".")
    tensor = tensor_name(info.name)
    if is_parametrized(owner, tensor):
        made_by: Any = owner.parametrizations[tensor]  # type: ignore[index]
        if leaf in made_by._parameters:
            name = path.removesuffix(f"parametrizations.{tensor}") + tensor
            sources = {f"{path}.{key}": source for key, source in made_by._parameters.items() if source is not None}
            return Recipe(
                (made_by, *made_by, *_fake_quantizers(owner, tensor)), name, sources, dict(made_by.named_parameters())
            )
    if leaf not in owner._parameters:
        return None
    # One hook may go on with what another one makes: a mask on the direction of weight normalization.
    hooks = [hook for hook in owner._forward_pre_hooks.values() if _makes(hook)[1]]
    becomes = {source: made for made, sources in map(_makes, hooks) for source in sources}
    start = f"{path}." if path else ""
    made = _end(leaf, becomes)
    inputs = {key: p for key, p in owner._parameters.items() if p is not None and _end(key, becomes) == made}
    makers = tuple(hook for hook in hooks if _end(_makes(hook)[0], becomes) == made)
    makers += _fake_quantizers(owner, made)
    return Recipe(makers, start + made, {start + key: source for key, source in inputs.items()}, inputs)


def _makes(hook: Any) -> tuple[str, tuple[str, ...]]:
    """The name of the tensor that a hook of torch makes, and those of the tensors that it reads."""
    if isinstance(hook, WeightNorm):
        return hook.name, (f"{hook.name}_g", f"{hook.name}_v")
    if isinstance(hook, (SpectralNorm, BasePruningMethod)):
        name = hook.name if isinstance(hook, SpectralNorm) else hook._tensor_name
        return name, (f"{name}_orig",)
    return "", ()


def _fake_quantizers(owner: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """The module that rounds a weight in the forward pass, by the names that torch.ao and torchao give it, or none."""
    found = (owner._modules.get(f"{name}_{suffix}") for suffix in ("fake_quant", "fake_quantizer"))
    return tuple(each for each in found if each is not None)


def _quantized(weight: Tensor, quantizers: Iterable[nn.Module]) -> Tensor:
    """The weight after fake quantization, with the scales that the last forward pass has left."""
    for own in quantizers:
        parameters = dict(own.named_parameters())  # such as a scale that is learned
        # It may keep statistics of what it sees; torch cannot copy gradients that ranks hold pieces of.
        quantizer = copy.deepcopy(own, {id(parameter): parameter for parameter in parameters.values()})
        seen = getattr(getattr(quantizer, "activation_post_process", None), "min_val", None)
        if seen is not None and seen.numel() and seen.isfinite().all():
            quantizer.disable_observer()  # type: ignore[operator]
        whole = {name: gathered(parameter).clone() for name, parameter in parameters.items()}
        weight = functional_call(quantizer, whole, weight)
    return weight


def _end(name: str, becomes: Mapping[str, str]) -> str:
    while name in becomes:
        name = becomes[name]
    return name


class _StandIn:
    """What hooks read instead of a module: its attributes, of which some are replaced."""

    def __init__(self, module: nn.Module, instead: Mapping[str, Any]) -> None:
        self._module, self._instead = module, instead

    def __getattr__(self, name: str) -> Any:
        found = self._instead[name] if name in self._instead else getattr(self._module, name)
        return gathered(found) if isinstance(found, Tensor) else found


def _parametrized(made_by: ParametrizationList, parameters: Mapping[str, Tensor]) -> Tensor:
    modes = [(module, module.training) for module in made_by.modules()]
    buffers = {name: gathered(buffer).clone() for name, buffer in made_by.named_buffers()}
    try:
        for module, _ in modes:
            module.training = False
        weight: Tensor = functional_call(made_by, {**buffers, **parameters})
    finally:
        for module, mode in modes:
            module.training = mode
    return weight


@contextmanager
def _generators_put_back(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _unpacked(parameter: Tensor) -> Tensor:
    """The numbers that a quantized tensor stands for; any other tensor is its own."""
    if type(parameter) in (Tensor, nn.Parameter) and not parameter.is_quantized:
        return parameter
    piece = local_tensor(parameter)
    return piece.dequantize() if _is_quantized(piece) else parameter


def _is_quantized(piece: Tensor) -> bool:
    return piece.is_quantized or type(piece).dequantize is not Tensor.dequantize
