"""Which weights of an attention layer belong to the same head? Rows of queries, keys and values, columns of the output.

Layers are known by the names that torch, transformers, timm and many others give to their projections, whatever the
class. How many heads there are is read off the module, or off its ``config``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_regularize._checks import is_named
from lightning_regularize.selection import canonical, tensor_name
from lightning_regularize.units import norm_dims, units_are_known

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

    from lightning_regularize.selection import ParameterInfo

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"),
    ("q", "k", "v"), ("wq", "wk", "wv"), ("Wq", "Wk", "Wv"), ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
)  # fmt: skip
_PACKED = ("in_proj_weight", "qkv", "c_attn", "Wqkv", "to_qkv", "qkv_proj", "query_key_value")
_OUTPUT = (
    "out_proj", "o_proj", "out_lin", "to_out", "to_out.0", "o", "wo", "Wo", "proj", "c_proj", "dense", "linear_out",
    "output", "out",
)  # fmt: skip
_NUMBERS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead", "heads", "num_attn_heads")
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head")
_KEY_NUMBERS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
# Where one weight holds all three, the queries of all heads mostly come first, then all keys, then all values. These
# have the queries, keys and values of the first head first, then those of the second one.
_HEAD_BY_HEAD = (
    "BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "MiniMaxLightningAttention", "PersimmonAttention",
)  # fmt: skip
# These look like others and have an order of their own; with the last part of the name of their file, if it is needed.
_OTHER_ORDER = ("CodeGenAttention", "DiffAttention", "nest.Attention")


class Slice(NamedTuple):
    """Some rows or columns of a weight, of which each head has equally many, one head after the other.

    Args:
        dim: The dim of the weight that they are counted along.
        start: The first one.
        size: How many there are, for all heads together.
    """

    dim: int
    start: int
    size: int


class Part(NamedTuple):
    """What a weight is of its attention layer.

    Args:
        layer: The canonical name of the layer.
        heads: How many heads the layer has; where several queries share a key and a value, it has as many as keys.
        slices: Where they lie in the weight.
    """

    layer: str
    heads: int
    slices: tuple[Slice, ...]


def head_parts(module: nn.Module, infos: Sequence[ParameterInfo], wanted: Collection[int]) -> dict[int, Part]:
    """Find the attention layers of ``module``, and say of their weights which heads they belong to.

    Args:
        module: Any module.
        infos: All its parameters.
        wanted: The ``id(parameter)`` of those that are to be grouped by heads. Weights of other layers may be among
            them.

    Returns:
        What a weight is of its layer, by ``id(parameter)``, for those of ``wanted`` that belong to one.

    Raises:
        ValueError: A layer with such weights looks like attention, and its heads cannot be told.

    Example:
        >>> from torch import nn
        >>> from lightning_regularize.selection import parameter_infos
        >>> attention = nn.MultiheadAttention(8, num_heads=2)
        >>> infos = parameter_infos(attention)
        >>> for part in head_parts(attention, infos, [id(info.parameter) for info in infos]).values():
        ...     print([tuple(each) for each in part.slices])
        [(0, 0, 8), (0, 8, 8), (0, 16, 8)]
        [(1, 0, 8)]
    """
    weights = {_used_name(info.name): info for info in infos if len(info.shape) > 1}
    found: dict[int, Part] = {}
    unknown: list[_Layer] = []
    for name, submodule in module.named_modules():
        layer = _Layer(canonical(name, module) if name else "", submodule, weights)
        if not layer.projections:
            unknown += [layer] if layer.looks_like_attention() else []
        elif any(id(info.parameter) in wanted for info in layer.of_heads):
            found |= layer.parts()
    for layer in unknown:
        inside = [info for info in weights.values() if info.name.startswith(layer.start)]
        if any(id(info.parameter) in wanted for info in inside) and not any(id(i.parameter) in found for i in inside):
            names = [info.name.removeprefix(layer.start) for info in inside[:4]]
            raise layer.error(f"it is none of the layouts that are known, with weights called {names}")
    return {key: part for key, part in found.items() if key in wanted}


class _Layer:
    """A module that may be an attention layer.

    Args:
        path: Its canonical name.
        module: The module.
        weights: All weights there are, by name.
    """

    def __init__(self, path: str, module: nn.Module, weights: dict[str, ParameterInfo]) -> None:
        self.path, self.module, self.start = path, module, f"{path}." if path else ""
        self._weights = weights
        self.projections = self._projections()
        self.output = self._output()

    @property
    def of_heads(self) -> list[ParameterInfo]:
        """The projections to queries, keys and values, and that of the output."""
        return [*self.projections, *([] if self.output is None else [self.output])]

    def looks_like_attention(self) -> bool:
        """Is it called so? A class such as ResNeSt's `SplitAttn`, of a convolution, states no heads."""
        name = type(self.module).__name__.lower()
        return "attention" in name or ("attn" in name and self._stated(_NUMBERS) is not None)

    def _weight(self, name: str) -> ParameterInfo | None:
        """The weight of a child, or a parameter of the layer's own."""
        names = (f"{self.start}{name}.weight", f"{self.start}{name}_weight", f"{self.start}{name}")
        return next((self._weights[each] for each in names if each in self._weights), None)

    def _projections(self) -> list[ParameterInfo]:
        """Three, to queries, keys and values, or one that is all of them, or none."""
        for names in _SEPARATE:
            those = [info for name in names if (info := self._weight(name)) is not None]
            if len(those) == len(names):
                return those
        return [info for name in _PACKED if (info := self._weight(name)) is not None][:1]

    def _output(self) -> ParameterInfo | None:
        """The output projection, which in BERT is beside the layer."""
        beside = self.path.rpartition(".")[0]
        names = (f"{beside}." if beside else "") + "output.dense.weight"
        return next((info for name in _OUTPUT if (info := self._weight(name)) is not None), self._weights.get(names))

    def parts(self) -> dict[int, Part]:
        """What each weight is of the layer, by ``id(parameter)``.

        Raises:
            ValueError: It cannot be told.
        """
        if self.output is None:
            raise self.error("its output projection has none of the names that are known")
        where, last = [self._dim(info, is_output=True) for info in self.projections], self._dim(self.output)
        sizes = [info.shape[dim] for info, dim in zip(self.projections, where, strict=True)]
        inner = self.output.shape[last]  # of all heads side by side
        if len(sizes) == 1:
            heads, width = self._heads(inner)
            if self._is_head_by_head():
                is_whole = sizes[0] % heads == 0
                number, runs = heads, [[Slice(where[0], 0, sizes[0])]]
            else:
                keys = (sizes[0] - inner) // 2
                states_fewer = self._stated(_KEY_NUMBERS) is not None
                number = heads if keys == inner else keys // width if states_fewer else 0
                is_whole = number > 0 and sizes[0] - inner == 2 * keys == 2 * number * width and heads % number == 0
                starts = ((0, inner), (inner, keys), (inner + keys, keys))
                runs = [[Slice(where[0], start, size) for start, size in starts]]
        else:
            _, keys, values = sizes
            heads, width = self._heads(sizes[0])
            runs = [[Slice(dim, 0, size)] for dim, size in zip(where, sizes, strict=True)]
            number = keys // width  # as many as there are keys, each of which several queries may share
            is_whole = number > 0 and keys == number * width and not (heads % number or values % number)
        if not is_whole or inner % heads:
            raise self.error(
                f"{heads} heads do not fit weights of the shapes {[tuple(i.shape) for i in self.of_heads]}"
            )
        runs.append([Slice(last, 0, inner)])
        pairs = zip(self.of_heads, runs, strict=True)
        return {id(info.parameter): Part(self.path, number, tuple(each)) for info, each in pairs}

    def _is_head_by_head(self) -> bool:
        """Does one weight hold queries, keys and values head by head, rather than one after the other?

        Raises:
            ValueError: It is in an order that is not known.
        """
        stated = vars(self.module)
        is_sure = (
            is_named(self.module, *_HEAD_BY_HEAD)
            or stated.get("head_first") is True  # MaxViT and CoAtNet of timm
            or {"key_dim", "val_dim"} <= stated.keys()  # EfficientFormer and TinyViT
            or (stated.get("multi_query") is False and not stated.get("new_decoder_architecture"))  # GPTBigCode, Falcon
        )
        name = self.projections[0].name.removeprefix(self.start)
        kind = type(self.module)
        is_other = f".{kind.__module__}.{kind.__name__}".endswith(tuple(f".{each}" for each in _OTHER_ORDER))
        if is_other or (name.startswith("query_key_value") and not is_sure):
            raise self.error("it packs queries, keys and values in an order that is not known")
        return is_sure

    def _dim(self, info: ParameterInfo, *, is_output: bool = False) -> int:
        """The dim of a projection that counts its outputs, or its inputs.

        Raises:
            ValueError: The layer does not say which dim that is.
        """
        if not units_are_known(info.owner, info.shape):
            raise self.error(f"{type(info.owner).__name__} does not say which dim of {info.name!r} holds its outputs")
        _, incoming = norm_dims(info.owner, tensor_name(info.name), info.shape)
        return next(d for d in range(len(info.shape)) if d not in incoming) if is_output else incoming[0]

    def _heads(self, size: int) -> tuple[int, int]:
        """How many heads there are, and how wide one is, of ``size`` queries.

        Raises:
            ValueError: Neither can be found on the module.
        """
        width, number = self._stated(_WIDTHS), self._stated(_NUMBERS)
        # The width comes first: where tensor parallelism cuts heads, users set the number to that of one rank.
        if width and size % width == 0:
            return size // width, width
        if number and size % number == 0:
            return number, size // number
        given = f"{number} heads do not divide {size} queries" if number else "it does not say how many there are"
        raise self.error(given)

    def _stated(self, names: Sequence[str]) -> int | None:
        holders: list[Any] = [self.module, getattr(self.module, "config", None)]
        values = [getattr(holder, name, None) for holder in holders for name in names]
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)

    def error(self, why: str) -> ValueError:
        """What to raise."""
        name = type(self.module).__name__
        return ValueError(
            f"the heads of {self.path or name!r} ({name}) cannot be told: {why}. Give the module an integer attribute "
            "`num_heads`, and projections called q_proj, k_proj, v_proj, or in_proj_weight or qkv for all three, and "
            f"out_proj; or leave it out by `exclude=({self.start + '*'!r},)`."
        )


def _used_name(name: str) -> str:
    """The name of the tensor that a layer uses, also where it is parametrized or pruned."""
    path, _, leaf = name.rpartition(".")
    path = path.removesuffix(f".parametrizations.{tensor_name(name)}")
    tensor = tensor_name(name).removesuffix("_orig") if leaf.endswith("_orig") else tensor_name(name)
    return f"{path}.{tensor}" if path else tensor
