"""What is a unit of a layer, and how large is it? The dims that hold the incoming weights of an output unit.

Norms of units are taken in float32 at least, over blocks of 256 elements, and combined in float64. Where ranks hold
pieces of a unit, they are those of the whole unit.
"""

import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_regularize._checks import is_named
from lightning_regularize._sharding import local_piece, local_pieces, local_tensor
from lightning_regularize._steps.buckets import Bucket, buckets, scratch, stacked

if dist.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate

__all__ = [
    "norm_dims", "input_dims", "block_dims", "units_are_known", "check_dim", "unit_dims", "unit_norms",
    "norms_of_units", "unit_buckets", "sum_over_ranks", "spread_of", "at_least_float32", "in_float64",
]  # fmt: skip

_BLOCK = 256  # elements reduced in float32 before float64 takes over: an error below 12 eps, even if all are equal

_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS_OF_TORCH = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase,
    nn.RNNCellBase,
)  # fmt: skip
# What layers call the numbers of their inputs and outputs: torch, PyTorch Geometric, DGL, and many others.
_SIZES = (
    ("in_features", "out_features"), ("in_channels", "out_channels"), ("_in_feats", "_out_feats"),
    ("in_dim", "out_dim"), ("input_dim", "output_dim"),
)  # fmt: skip


def norm_dims(
    owner: nn.Module, name: str, shape: Sequence[int], *, dim: int | Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how to view a parameter, and along which dims, so that each norm is that of one output unit's input.

    ====================================  ==========================  ============  =================
    Layer                                 Weight                      Norm over     One norm a
    ====================================  ==========================  ============  =================
    Linear                                (out, in)                   in            output feature
    Conv1d to Conv3d, also grouped        (out, in / groups, k, ...)  in, k, ...    output channel
    ConvTranspose1d to 3d                 (in, out, k, ...)           in, k, ...    output channel
    the same, grouped                     (in, out / groups, k, ...)  in of the     output channel
                                                                      group, k, ...
    Embedding, EmbeddingBag               (number, features)          features      embedding
    MultiheadAttention, in and out        (out, in)                   in            query, key, ...
    RNN, LSTM, GRU, their cells           (gates * hidden, in)        in            gate of a unit
    Bilinear                              (out, in1, in2)             in1, in2      output feature
    Conv1D of transformers                (in, out)                   in            output feature
    any with known sizes                  (out, in, ...)              in, ...       output feature
    the same                              (in, out, ...)              in, ...       output feature
    the same                              (relations, in, out)        in            output of a relation
    any other, ``weight`` in its name     (out, ...)                  ...           entry of dim 0
    ====================================  ==========================  ============  =================

    A layer gives its sizes by attributes such as ``in_features`` and ``out_features``, or ``in_channels`` and
    ``out_channels``. If the two differ and occur in the shape, they decide, whatever the class. The last row is a
    guess, see :func:`units_are_known`.

    Args:
        owner: The module that has the parameter.
        name: The parameter's name, as its owner or as the whole model says it.
        shape: The parameter's shape, of the whole tensor where ranks hold pieces.
        dim: What the user asks for, instead of all this.

    Returns:
        ``view, dim``: ``weight.view(view)`` shares its memory, and ``dim`` are dims of it, counted from the front.

    Raises:
        ValueError: If ``dim`` lacks, is empty or repeats itself; or if it is not given and cannot be told.

    Example:
        >>> norm_dims(nn.Conv2d(8, 6, 3), "weight", (6, 8, 3, 3))
        ((6, 8, 3, 3), (1, 2, 3))
        >>> norm_dims(nn.ConvTranspose2d(8, 6, 3, groups=2), "weight", (8, 3, 3, 3))
        ((2, 4, 3, 3, 3), (1, 3, 4))
    """
    shape = tuple(shape)
    if dim is not None:
        return shape, _checked_dims(dim, shape)
    if isinstance(owner, _TRANSPOSED_CONVOLUTIONS) and len(shape) > 2:
        if owner.groups == 1:
            return shape, (0, *range(2, len(shape)))
        return _channels_by_groups(owner.groups, shape)  # each group of input channels has output channels of its own
    stated = _stated_dims(owner, shape)
    if stated is not None:
        return shape, stated
    if "weight" not in name or len(shape) < 2:
        needs = "a weight with at least 2 dims" if len(shape) < 2 else "a parameter that is called weight"
        raise ValueError(
            f"A norm over the incoming weights of a unit needs {needs}, got {name!r} of {type(owner).__name__} with "
            f'shape {shape}. Leave it out, as by `exclude=("*{name}",)`, or say by `dim` what a unit is.'
        )
    return shape, tuple(range(1, len(shape)))


def input_dims(owner: nn.Module, name: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how to view a parameter, and along which dims, so that each norm is that of all that one input feeds.

    An input is a feature of a Linear, a channel of a convolution, and a row of an Embedding. Where layers are known,
    what is a guess, and which dim it is, is as for :func:`norm_dims`.

    Args:
        owner: The module that has the parameter.
        name: The parameter's name, as its owner or as the whole model says it.
        shape: The parameter's shape, of the whole tensor where ranks hold pieces.

    Returns:
        ``view, dim``, as :func:`norm_dims`.

    Raises:
        ValueError: It cannot be told; a Bilinear has two inputs.

    Example:
        >>> input_dims(nn.Conv2d(8, 6, 3), "weight", (6, 8, 3, 3))
        ((6, 8, 3, 3), (0, 2, 3))
        >>> input_dims(nn.Conv2d(8, 6, 3, groups=2), "weight", (6, 4, 3, 3))
        ((2, 3, 4, 3, 3), (1, 3, 4))
    """
    shape = tuple(shape)
    if isinstance(owner, nn.Bilinear) and len(shape) > 2:
        raise ValueError("A Bilinear has two inputs: write `dim=(0, 2)` for the first, or `dim=(0, 1)` for the second.")
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return norm_dims(owner, name, shape)
    if isinstance(owner, _TRANSPOSED_CONVOLUTIONS) and len(shape) > 2:
        return shape, tuple(range(1, len(shape)))
    if isinstance(owner, nn.modules.conv._ConvNd) and owner.groups > 1 and len(shape) > 2:
        return _channels_by_groups(owner.groups, shape)  # each group of output channels has input channels of its own
    view, incoming = norm_dims(owner, name, shape)
    return view, tuple(d for d in range(len(view)) if d != incoming[0])


def block_dims(
    owner: nn.Module, name: str, shape: Sequence[int], size: int, *, dim: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how to view a parameter, and along which dim, so that each norm is that of ``size`` neighbors.

    Args:
        owner: The module that has the parameter.
        name: The parameter's name, as its owner or as the whole model says it.
        shape: The parameter's shape, of the whole tensor where ranks hold pieces.
        size: How many elements a block has.
        dim: The dim along which they lie; by default that of the inputs, dim 1 of a Linear or a convolution.

    Returns:
        ``view, dim``, as :func:`norm_dims`.

    Raises:
        ValueError: ``size`` does not divide the dim; or it is not given, and cannot be told.

    Example:
        >>> block_dims(nn.Linear(8, 6), "weight", (6, 8), 4)
        ((6, 2, 4), (2,))
    """
    view, incoming = norm_dims(owner, name, shape, dim=dim)
    along = incoming[0]
    if view[along] % size:
        raise ValueError(
            f"`block_size` should divide the dim along which blocks lie, got {size} for dim {along} of shape "
            f"{tuple(view)}."
        )
    return (*view[:along], view[along] // size, size, *view[along + 1 :]), (along + 1,)


def units_are_known(owner: nn.Module, shape: Sequence[int]) -> bool:
    """Is it known what the output units of a weight are, or does :func:`norm_dims` take dim 0 for want of better?

    Args:
        owner: The module that has the weight.
        shape: The weight's shape, of the whole tensor where ranks hold pieces.

    Returns:
        True for layers of torch, for ``Conv1D`` of transformers, and for layers with attributes such as
        ``in_features`` and ``out_features`` that differ and occur in the shape.

    Example:
        >>> class Graph(nn.Module):
        ...     def __init__(self, in_features, out_features):
        ...         super().__init__()
        ...         self.in_features, self.out_features = in_features, out_features
        >>> units_are_known(Graph(3, 4), (3, 4)), units_are_known(Graph(4, 4), (4, 4))
        (True, False)
    """
    return isinstance(owner, _LAYERS_OF_TORCH) or _stated_dims(owner, tuple(shape)) is not None


def _channels_by_groups(groups: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A view in which dim 0 is taken apart by groups, and the dims of it that belong to one channel of dim 1."""
    return (groups, shape[0] // groups, *shape[1:]), (1, *range(3, len(shape) + 1))


def _stated_dims(owner: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dims of the incoming weights of a unit, if the layer gives its sizes."""
    if len(shape) < 2:
        return None
    for names in _SIZES:
        incoming, outgoing = (getattr(owner, name, None) for name in names)
        if not isinstance(incoming, int) or not isinstance(outgoing, int) or incoming == outgoing:
            continue
        if shape[:2] == (outgoing, incoming):
            return tuple(range(1, len(shape)))
        if shape[:2] == (incoming, outgoing):
            return (0, *range(2, len(shape)))
        if len(shape) == 3 and shape[1:] == (incoming, outgoing):
            return (1,)
        if len(shape) == 3 and shape[1:] == (outgoing, incoming):
            return (2,)
    return (0,) if is_named(owner, "Conv1D") and len(shape) == 2 else None


def check_dim(dim: object) -> None:
    """Refuse what cannot be dims of a weight; whether a weight has them is seen later.

    Raises:
        TypeError: ``dim`` is neither None, nor an integer, nor a sequence of integers.
        ValueError: It is an empty sequence.
    """
    dims = dim if isinstance(dim, Sequence) and not isinstance(dim, str) else () if dim is None else (dim,)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in dims):
        raise TypeError(
            f"`dim` should be None, an integer, or a sequence of integers, got {dim!r}: it names the dims of a weight "
            "that hold the incoming weights of a unit."
        )
    if dim is not None and not dims:
        raise ValueError(f"`dim` should name at least one dim of a weight, got {dim!r}. None asks the layer.")


def unit_dims(weight: Tensor, dim: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the dims that hold the incoming weights of one output unit, in order and counted from the front.

    Args:
        weight: Any tensor.
        dim: Some of its dims; by default all but the first.

    Raises:
        ValueError: If ``weight`` lacks ``dim``, or has less than 2 dims and ``dim`` is not given.

    Example:
        >>> unit_dims(torch.ones(6, 8, 3, 3)), unit_dims(torch.ones(8, 6), dim=-2)
        ((1, 2, 3), (0,))
    """
    if dim is not None:
        return _checked_dims(dim, weight.shape)
    if weight.dim() < 2:
        raise ValueError(
            f"`dim` should be given for a weight with less than 2 dims, got None for shape {tuple(weight.shape)}."
        )
    return tuple(range(1, weight.dim()))


def unit_norms(weight: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    r"""Return the L2 norm of each output unit, accurate, and of the whole unit where ranks hold pieces of it.

    Args:
        weight: Any shape, floating. For a DTensor whose units are cut every rank that holds a piece should take part.
        dim: The dims that hold the incoming weights of a unit; by default all but the first.

    Returns:
        The norms of the units on this rank, float64 (float32 on devices without it), with ``dim`` kept as size 1, so
        that they broadcast against the weight's local piece.

    Raises:
        ValueError: If ``weight`` lacks ``dim``, or has less than 2 dims and ``dim`` is not given.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]], dtype=torch.float64)
    """
    dims = unit_dims(weight, dim)
    return norms_of_units(stacked([local_tensor(weight)], wide=True), weight, dims)[0]


def norms_of_units(units: Tensor, weight: Tensor, dims: Sequence[int]) -> Tensor:
    """Return what :func:`unit_norms` does, for several weights of one shape at once.

    Args:
        units: The weights, or this rank's pieces of them, stacked.
        weight: One of them, which shows whether ranks hold pieces of a unit.
        dims: The dims of a weight that hold a unit, in order and counted from the front.

    Returns:
        One norm for each weight and unit, with ``dims`` kept as size 1.
    """
    found = _local_norms(units, tuple(d + 1 for d in dims))
    return sum_over_ranks(found.square(), weight, dims).sqrt() if _is_cut(weight, dims) else found


def unit_buckets(
    dims: Sequence[tuple[int, ...]], weights: Sequence[Tensor], *columns: Sequence[Tensor], bounded: bool = True
) -> Iterator[Bucket]:
    """Arrange weights, and tensors that belong to each, in lists that one batched operation on units can work on.

    Args:
        dims: For each weight the dims that hold the incoming weights of one output unit, see :func:`unit_dims`.
        weights: Of any shapes, dtypes and devices. If ranks hold pieces of units, every rank should take part.
        columns: Tensors for each weight: of its shape, or with some dims of size 1.
        bounded: As for :func:`~lightning_regularize._steps.buckets.buckets`; norms over dims that are not the last
            make temporaries, so that these weights are cut in any case.

    Returns:
        Buckets of tensors of one shape and with the same dims, all on this rank. Only where ranks hold pieces of units
        the weights are DTensors. Large weights come in pieces of whole units.
    """
    rows: list[Tensor] = []
    alike: list[Hashable] = []
    between: list[int | None] = []
    for weight, of_units, *others in zip(weights, dims, *columns, strict=True):
        is_cut = _is_cut(weight, of_units)
        rows.append(weight if is_cut else local_piece(weight))
        alike.append((rows[-1].shape, of_units, spread_of(weight) if is_cut else None, *[o.shape for o in others]))
        units = [d for d in range(weight.dim()) if d not in of_units]
        between.append(max(units, key=weight.size) if units and not is_cut else None)
        bounded = bounded or bool(_last_dims(of_units, weight.dim())[1])
    return buckets(rows, *map(local_pieces, columns), alike=alike, dims=between, bounded=bounded)


def sum_over_ranks(values: Tensor, weight: Tensor, dims: Sequence[int]) -> Tensor:
    """Add up what the ranks found in their pieces of ``weight``, over the ranks between which ``dims`` are cut.

    Args:
        values: What this rank found. Its dims need not be those of ``weight``.
        weight: Any tensor; only a DTensor is spread over ranks.
        dims: Dims of ``weight``, counted from the front.

    Returns:
        ``values`` itself if no rank boundary lies in ``dims``, else the sum, by one collective.

    Example:
        >>> sum_over_ranks(torch.tensor(1.0), torch.ones(3, 3), [0])
        tensor(1.)
    """
    if not _is_cut(weight, dims):
        return values
    # Where the rank boundary lies in other dims the values differ, and should: "replicated" keeps them apart.
    parts = [Partial() if cut else Replicate() for cut in _cuts(weight, dims)]
    whole = [Replicate()] * len(parts)
    return (
        DTensor.from_local(values, weight.device_mesh, parts, run_check=False).redistribute(placements=whole).to_local()
    )


def _cuts(weight: "DTensor", dims: Sequence[int]) -> list[bool]:
    # By attribute, since FSDP2 over tensor parallel has placements that are no `Shard` and yet cut a dim.
    return [getattr(placement, "dim", None) in dims for placement in weight.placements]


def spread_of(weight: Tensor) -> Hashable:
    """How a weight is spread over ranks, in a form that can be compared."""
    if dist.is_available() and isinstance(weight, DTensor):
        return weight.device_mesh, weight.placements
    return None


def _is_cut(weight: Tensor, dims: Sequence[int]) -> "TypeGuard[DTensor]":
    return dist.is_available() and isinstance(weight, DTensor) and any(_cuts(weight, dims))


def _checked_dims(dim: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    dims = _from_the_front((dim,) if isinstance(dim, int) else tuple(dim), len(shape))
    if not dims:
        raise ValueError(
            f"`dim` should name different dims of a weight of shape {tuple(shape)}, each from {-len(shape)} to "
            f"{len(shape) - 1}, got {dim!r}."
        )
    return dims


@functools.cache  # it is asked for each weight in each step
def _from_the_front(given: tuple[int, ...], number: int) -> tuple[int, ...]:
    """Dims of a tensor with ``number`` of them, in order; none if they are not ``given`` properly."""
    dims = sorted({d % number for d in given if -number <= d < number})
    return tuple(dims) if len(dims) == len(given) else ()


def _local_norms(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Norms over ``dims``, kept as size 1. The dims that lie together at the end, most often all, go first and fast."""
    last, others = _last_dims(dims, weight.dim())
    found = weight
    if last:
        rows = weight
        if not weight.is_contiguous():  # a view for `channels_last` as well
            rows = weight.permute(*range(last[0]), *sorted(last, key=weight.stride, reverse=True))
        found = _row_norms(rows.flatten(last[0]))
        found = found.view(*found.shape, *[1] * len(last))
    if others:
        # Not `vector_norm`: over dims that are not the last it takes 40 times as long and loses up to 5 digits.
        found = found.to(at_least_float32(found))
        squares = torch.square(found, out=scratch(found, slot="squares of units"))
        found = in_float64(squares.sum(others, keepdim=True)).sqrt()
    return found


@functools.cache
def _last_dims(dims: tuple[int, ...], number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of ``dims`` that are the last of all, and the others."""
    last = tuple(d for d in dims if set(range(d, number)) <= set(dims))
    return last, dims[: len(dims) - len(last)]


def _row_norms(rows: Tensor) -> Tensor:
    """Norms over the last dim, of blocks in float32 and of their norms in float64."""
    size = rows.shape[-1]
    if size <= _BLOCK:
        return in_float64(torch.linalg.vector_norm(rows, dim=-1, dtype=at_least_float32(rows)))
    count, rest = divmod(size, _BLOCK)
    whole = rows.narrow(-1, 0, size - rest) if rest else rows
    found: Tensor = torch.linalg.vector_norm(_row_norms(whole.view(*rows.shape[:-1], count, _BLOCK)), dim=-1)
    return torch.hypot(found, _row_norms(rows.narrow(-1, size - rest, rest))) if rest else found


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype in which norms of ``tensor`` are taken."""
    return torch.promote_types(tensor.dtype, torch.float32)


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which norms are combined."""
    return tensor if tensor.device.type == "mps" else tensor.double()  # MPS has no float64
