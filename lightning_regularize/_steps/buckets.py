"""Lists of tensors for ``torch._foreach_*`` and batched operations, bounded in bytes, and memory for temporaries.

One call works on many small tensors, because each call costs 5 to 10 microseconds on a GPU, however little it computes.
On a CPU a large tensor is cut into pieces that fit the cache, and temporaries lie in memory that is kept from step to
step, because to write to memory that the system has just handed out takes longer than most computations on it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_regularize._sharding import local_pieces

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

_CPU_BYTES = 2**22  # measured: what is smaller costs more to start than it gains in the cache
_DEVICE_BYTES = 2**26
_SMALL_BYTES = 2**16  # on a CPU; glibc's allocator keeps what is below 128 KiB, and may return what is above

Tensors = Tensor | Sequence[Tensor]


HALF = (torch.bfloat16, torch.float16)
"""The dtypes in which a small change of a weight rounds to nothing."""


def listed(tensors: Tensors) -> list[Tensor]:
    """A list of tensors, of one if it is a tensor."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def bytes_of_bucket(tensor: Tensor) -> int:
    """How large a bucket may be on the device of a tensor."""
    return _CPU_BYTES if tensor.is_cpu else _DEVICE_BYTES


class Bucket(NamedTuple):
    """Some rows of a table of tensors, on one device, with one dtype in each column: many small ones, or one piece.

    Args:
        indices: Which rows. A large one is in several buckets, with a piece of it in each.
        columns: The tensors of these rows, a list for each column.
    """

    indices: list[int]
    columns: tuple[list[Tensor], ...]


def buckets(
    *columns: Sequence[Tensor],
    alike: Sequence[Hashable] | None = None,
    dims: Sequence[int | None] | None = None,
    bounded: bool = True,
) -> Iterator[Bucket]:
    """Arrange the rows of a table, for example weights, their gradients and a state of each, in lists.

    Args:
        columns: Tensors that are not sparse. Those of a row have one device and one shape.
        alike: What the rows of a bucket have to agree in beside devices and dtypes, such as their shapes.
        dims: The dim along which a large row may be cut, None for not at all; by default it is cut anywhere.
        bounded: Whether to cut large rows on a CPU too where they are not of half precision. What makes no temporaries
            of their size there gains nothing by it, and each piece costs 50 microseconds.

    Yields:
        Buckets of about 4 MiB a column on a CPU, 64 MiB on another device. Their order is that of the first rows.

    Example:
        >>> weights = [torch.ones(2), torch.ones(3, 3), torch.ones(2, dtype=torch.float64)]
        >>> [bucket.indices for bucket in buckets(weights)]
        [[0, 1], [2]]
    """
    for indices in _alike(columns, alike):
        first = columns[0][indices[0]]
        limit = bytes_of_bucket(first)
        cuts = bounded or not first.is_cpu or first.dtype in HALF
        alone = _SMALL_BYTES if first.is_cpu else limit
        sizes = [columns[0][i].nbytes for i in indices]
        if max(sizes) <= alone and sum(sizes) <= limit:
            yield _bucket(indices, columns)
            continue
        together: list[int] = []
        total = 0
        for i, size in zip(indices, sizes, strict=True):
            if size > limit and cuts and (dims is None or dims[i] is not None):
                for pieces in _cut([column[i] for column in columns], None if dims is None else dims[i], limit):
                    yield Bucket([i], tuple([piece] for piece in pieces))
                continue
            # A large tensor is alone on a CPU, where its temporaries are to lie in memory that is kept.
            if together and (size > alone or total + size > limit):
                yield _bucket(together, columns)
                together, total = [], 0
            together.append(i)
            total += limit if size > alone else size
        if together:
            yield _bucket(together, columns)


def _alike(columns: Sequence[Sequence[Tensor]], alike: Sequence[Hashable] | None) -> Iterable[list[int]]:
    """The numbers of rows that agree in everything, in most tables of all rows."""
    keys: list[Sequence[Hashable]] = [[tensor.device for tensor in columns[0]]]
    keys += [[tensor.dtype for tensor in column] for column in columns]
    if alike is not None:
        keys.append(alike)
    if all(len(set(key)) == 1 for key in keys):
        return [list(range(len(columns[0])))]
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(zip(*keys, strict=True)):
        found.setdefault(key, []).append(i)
    return found.values()


def _bucket(indices: list[int], columns: Sequence[Sequence[Tensor]]) -> Bucket:
    if len(indices) == len(columns[0]):
        return Bucket(indices, tuple(map(list, columns)))
    return Bucket(indices, tuple([column[i] for i in indices] for column in columns))


def _cut(tensors: Sequence[Tensor], dim: int | None, limit: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, cut alike, so that those of the first have ``limit`` bytes at most."""
    first = tensors[0]
    if dim is None:
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        arranged = [tensor.permute(order) for tensor in tensors]
        if all(tensor.is_contiguous() for tensor in arranged):
            tensors, dim = [tensor.view(-1) for tensor in arranged], 0
        else:
            dim = max(range(first.dim()), key=first.size)
    size = max(1, tensors[0].shape[dim] * limit // tensors[0].nbytes)
    return zip(*[torch.split(tensor, size, dim) for tensor in tensors], strict=True)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[Hashable, Tensor] = {}


_KEPT = _Kept()


def scratch(
    like: Tensor, shape: Sequence[int] | None = None, *, dtype: torch.dtype | None = None, slot: str = ""
) -> Tensor:
    """Uninitialized memory for a temporary: good until the next call with this dtype and slot.

    Args:
        like: A tensor on the same device, with the shape and dtype where these are not given.
        shape: The shape.
        dtype: The dtype.
        slot: A name; temporaries that are needed at the same time have different ones.

    Returns:
        Contiguous. On a CPU it is the same memory each time; other devices have allocators that do as much. What
        is larger than a bucket may be is new.
    """
    shape, dtype = like.shape if shape is None else shape, dtype or like.dtype
    size = math.prod(shape)
    if not like.is_cpu or size * dtype.itemsize > 2 * _CPU_BYTES:
        return torch.empty(shape, dtype=dtype, device=like.device)
    buffer = _KEPT.buffers.get((dtype, slot))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of that mode
            buffer = torch.empty(size, dtype=dtype, device="cpu")
        if type(buffer) is Tensor:  # not a fake one
            _KEPT.buffers[dtype, slot] = buffer
    return buffer[:size].view(shape)


def new(function: str, tensors: list[Tensor], *others: Any, slot: str = "") -> list[Tensor]:
    """The results of ``torch._foreach_<function>`` for a bucket, as temporaries: that of a piece lies in scratch.

    Args:
        function: The name of a function that has an argument ``out``, by torch's name for one tensor.
        tensors: The tensors of a bucket.
        others: The other arguments: lists of tensors or numbers.
        slot: As for :func:`scratch`.

    Example:
        >>> new("sign", [torch.tensor([-2.0, 0.0]), torch.tensor([3.0])])
        [tensor([-1.,  0.]), tensor([1.])]
    """
    if len(tensors) > 1:
        return list(getattr(torch, f"_foreach_{function}")(tensors, *others))
    first = [other[0] if isinstance(other, list) else other for other in others]
    return [getattr(torch, function)(tensors[0], *first, out=scratch(tensors[0], slot=slot))]


def operand(number: float, tensors: Sequence[Tensor]) -> float | list[Tensor]:
    """A number for ``torch._foreach_*`` with tensors of one device and dtype.

    On a CPU (torch 2.13) a list takes four times as long with a number as with tensors of one element, and rounds the
    number to half precision before it is used.
    """
    if not tensors[0].is_cpu:
        return number
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    element = torch.tensor(number, dtype=wide, device="cpu")
    return [element] * len(tensors)


def copies(tensors: list[Tensor], *, slot: str = "") -> list[Tensor]:
    """Copies of a bucket as temporaries, those of half precision in float32."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if len(tensors) > 1:
        found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    else:
        found = [scratch(tensors[0], dtype=dtype, slot=slot)]
    torch._foreach_copy_(found, tensors)
    return found


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of a bucket, or of half precision copies in float32, to be rounded once, by :func:`write_back_`."""
    return copies(tensors, slot="wide") if tensors[0].dtype in HALF else tensors


def write_back_(tensors: list[Tensor], wide: list[Tensor]) -> None:
    """Give ``tensors`` the values that :func:`widened` made of them, after these have changed."""
    if wide is not tensors:
        torch._foreach_copy_(tensors, wide)


def stacked(tensors: Sequence[Tensor], *, slot: str = "stacked", wide: bool = False) -> Tensor:
    """The local tensors of a bucket of one shape as one with another dim in front, for a batched operation.

    A single tensor is viewed so, and changes with the result; else it is a temporary, see :func:`put_back_`.

    Args:
        tensors: The tensors.
        slot: As for :func:`scratch`.
        wide: Whether half precision is to be float32 on a CPU, where operations beside float32 would convert it to new
            memory, which takes longer than they do.
    """
    local = local_pieces(tensors)
    first, shape = local[0], (len(local), *local[0].shape)
    found = first[None] if len(local) == 1 else torch.stack(local, out=scratch(first, shape, slot=slot))
    if wide and first.is_cpu and first.dtype in HALF:
        return scratch(found, dtype=torch.float32, slot=slot).copy_(found)
    return found


def put_back_(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Give ``tensors`` the values that :func:`stacked` made of them, after these have changed."""
    if len(tensors) > 1 or values.dtype != tensors[0].dtype:
        torch._foreach_copy_(local_pieces(tensors), values.unbind())


def refreshed(kept: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors, in the memory of ``kept``, which are copies from a step before, where it fits."""
    if tensors and list(map(form_of, tensors)) == list(map(form_of, kept)):
        torch._foreach_copy_(kept, tensors)
        return kept
    return [tensor.clone() for tensor in tensors]


def form_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """What tensors have in common of which one can take the place of another."""
    return tensor.shape, tensor.dtype, tensor.device


def multiply_each_(tensors: Sequence[Tensor], factors: Tensor | Sequence[Tensor]) -> None:
    """Multiply each of the local tensors by a number of its own, which stays on the device."""
    numbers = factors.unbind() if isinstance(factors, Tensor) else factors
    for indices, (those,) in buckets(tensors, alike=[tensor.shape for tensor in tensors]):
        units = stacked(those, wide=True)
        dtype = torch.promote_types(units.dtype, torch.float32)
        each = torch.stack([numbers[i] for i in indices]).to(units.device, dtype)
        units.mul_(each.view(-1, *[1] * (units.dim() - 1)))
        put_back_(those, units)


def calls(takes_lists: bool, *columns: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """The arguments of the calls of a function: lists if it takes them, else one item of each after the other."""
    if takes_lists:
        return [columns] if columns[0] else []
    return zip(*columns, strict=True)
