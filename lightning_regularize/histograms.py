"""How are the elements of a tensor distributed? Counts in bins, over all ranks that hold a piece."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_regularize.norms import by_size, computable, local_dense, pieces, rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_regularize._sharding import Sharding

_BUFFER = 2**18  # elements

BINS = 64
"""As many as ``wandb.watch`` draws, and few enough for an 8-bit index."""


class Histogram(NamedTuple):
    """Counts of finite elements in bins of one width.

    Args:
        counts: One a bin.
        low: Where the first bin begins: at the smallest finite element.
        high: Where the last one ends, and holds the largest.
    """

    counts: list[int]
    low: float
    high: float

    @property
    def edges(self) -> list[float]:
        """One more than bins."""
        shares = (i / len(self.counts) for i in range(len(self.counts)))
        return [*((1 - share) * self.low + share * self.high for share in shares), self.high]


def histograms(
    tensors: Sequence[Tensor], *, sharding: Sharding, parameters: Sequence[Tensor] | None = None, bins: int = BINS
) -> list[Histogram]:
    """The histogram of each tensor, over all its pieces; every rank that holds one should take part.

    Args:
        tensors: Parameters or gradients of any floating dtype.
        sharding: Which ranks hold pieces.
        parameters: What ``sharding`` knows the tensors by, if they are gradients.
        bins: At most 254.

    Returns:
        One a tensor; without a finite element all counts are 0.

    Example:
        >>> from lightning_regularize._sharding import Sharding
        >>> histograms([torch.tensor([0.0, 1.0, 2.0, 4.0, math.inf])], sharding=Sharding(), bins=2)
        [Histogram(counts=[2, 2], low=0.0, high=4.0)]
    """
    if not tensors:
        return []
    ranges, counts = measure(tensors, sharding, tensors if parameters is None else parameters, bins)
    counts = sharding.reduce(counts, tensors if parameters is None else parameters)
    return [as_histogram(*row) for row in torch.cat([ranges, counts], dim=1).tolist()]


def measure(
    tensors: Sequence[Tensor], sharding: Sharding, parameters: Sequence[Tensor], bins: int
) -> tuple[Tensor, Tensor]:
    """The common range of the pieces of each tensor, shape ``(n, 2)``, and this rank's counts, ``(n, bins)``."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    local = [local_dense(tensor) for tensor in tensors]
    spans, are_finite = _cpu_spans(local) if on_cpu else (torch.stack([_span(tensor) for tensor in local]), [])
    zeros = _not_stored(tensors, local).to(spans.device)
    spans = torch.where(zeros[:, None] > 0, spans.clamp_min(0.0), spans)  # zeros are in the range
    spans = sharding.reduce(spans, parameters, "max")
    low, high = -spans[:, 0], spans[:, 1]
    empty, flat = low > high, low == high  # no finite element, or all the same
    width = torch.where(flat, (2**-20 * low.abs()).clamp_min(0.5), 0.0)  # large numbers swallow a half
    low, high = torch.where(empty, 0.0, low - width), torch.where(empty, 1.0, high + width)
    ranges = torch.stack([low, high], dim=1)
    if on_cpu:
        counts = _cpu_counts(local, ranges, are_finite, bins)
    else:
        counts = torch.stack([_counts(tensor, ends, bins) for tensor, ends in zip(local, ranges, strict=True)])
    place = (-low / (high - low) * bins).long().clamp(0, bins - 1)
    return ranges, counts.scatter_add_(1, place[:, None], zeros[:, None].to(counts.dtype))


def _not_stored(tensors: Sequence[Tensor], local: Sequence[Tensor]) -> Tensor:
    """How many zeros a sparse tensor does not store, shape ``(n,)``."""
    pairs = zip(tensors, local, strict=True)
    return torch.tensor([t.numel() - v.numel() if t.layout is not torch.strided else 0 for t, v in pairs])


def as_histogram(low: float, high: float, *counts: float) -> Histogram:
    """From a row of numbers, as it comes from the device."""
    return Histogram([round(count) for count in counts], low, high)


def _span(tensor: Tensor) -> Tensor:
    """Minus the smallest and the largest finite element, so that the maximum over pieces combines both."""
    spans = [torch.full((2,), -math.inf, dtype=torch.float64, device=tensor.device)]
    for piece in pieces(tensor):
        if piece.numel():
            finite = piece.isfinite()  # NaN would be carried on
            low, high = piece.where(finite, math.inf).amin(), piece.where(finite, -math.inf).amax()
            spans.append(torch.stack([-low, high]).to(torch.float64))
    return torch.stack(spans).amax(dim=0)


def _cpu_spans(tensors: Sequence[Tensor]) -> tuple[Tensor, list[bool]]:
    """As :func:`_span`, and of which tensors all elements are finite, which costs nothing as long as they are."""
    spans, are_finite = [(-math.inf, -math.inf)] * len(tensors), [True] * len(tensors)
    batches, few, large = by_size(tensors)
    singles = few + large
    for batch in batches:
        values = rows([tensors[i] for i in batch])
        if values.numel():
            for i, low, high in zip(batch, *(ends.tolist() for ends in values.aminmax(dim=1)), strict=True):
                spans[i] = -low, high
        singles += [i for i in batch if not all(map(math.isfinite, spans[i]))]
    for i in singles:
        spans[i], are_finite[i] = _cpu_span(tensors[i])
    return torch.tensor(spans, dtype=torch.float64), are_finite


def _cpu_span(tensor: Tensor) -> tuple[tuple[float, float], bool]:
    lows, highs, all_finite = [math.inf], [-math.inf], True
    for piece in filter(torch.numel, pieces(tensor)):
        low, high = (end.item() for end in piece.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite, all_finite = piece.isfinite(), False
            low, high = piece.where(finite, math.inf).amin().item(), piece.where(finite, -math.inf).amax().item()
        lows.append(low)
        highs.append(high)
    return (-min(lows), max(highs)), all_finite


def _counts(tensor: Tensor, ends: Tensor, bins: int) -> Tensor:
    low, scale = ends[0], bins / (ends[1] - ends[0])
    found = torch.zeros(bins, dtype=ends.dtype, device=ends.device)
    for piece in pieces(tensor):
        index = piece.sub(low.to(piece.dtype)).mul_(scale.to(piece.dtype))
        found += torch.histc(index, bins, 0, bins)  # passes over what is not finite
    return found


def _cpu_counts(tensors: Sequence[Tensor], ranges: Tensor, are_finite: Sequence[bool], bins: int) -> Tensor:
    """As :func:`_counts`, for ``torch.histc`` takes ten times as long."""
    found, ends = torch.zeros(len(tensors), bins + 1, dtype=torch.int64), ranges.tolist()
    batches, few, large = by_size(tensors)
    singles = few + large
    for batch in batches:
        (values,) = computable([rows([tensors[i] for i in batch])])
        if all(are_finite[i] and _arithmetic(values.dtype, *ends[i])[1] == 1 for i in batch):
            found[batch] = _row_counts(values, ranges[batch], bins)
        else:
            singles += batch
    buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for i in singles:
        for large_piece in pieces(tensors[i]):
            found[i] += _piece_counts(large_piece, ends[i], are_finite[i], bins, buffers)
    found[:, bins - 1] += found[:, bins]  # the largest element is the end of the last bin
    return found[:, :bins].double()


def _row_counts(values: Tensor, ends: Tensor, bins: int) -> Tensor:
    """Of finite rows at once, with one number more than bins."""
    low, width = ends[:, :1], ends.diff(dim=1)
    index = values.sub_(low.to(values.dtype)).mul_((bins / width).to(values.dtype)).long()
    index += (bins + 1) * torch.arange(len(values))[:, None]
    return torch.bincount(index.view(-1), minlength=len(values) * (bins + 1)).view(len(values), bins + 1)


def _piece_counts(
    values: Tensor, ends: Sequence[float], is_finite: bool, bins: int, buffers: dict[torch.dtype, tuple[Tensor, Tensor]]
) -> Tensor:
    """Of one vector, with one number more than bins; in ``buffers``, for fresh memory costs more than arithmetic."""
    (low, high), found = ends, torch.zeros(bins + 1, dtype=torch.int64)
    dtype, factor = _arithmetic(values.dtype, low, high)
    if dtype not in buffers:
        buffers[dtype] = values.new_empty(_BUFFER, dtype=dtype), torch.empty(_BUFFER, dtype=torch.int32)
    scaled, index = buffers[dtype]
    for piece in torch.split(values if is_finite else values[values.isfinite()], _BUFFER):
        source, size = piece if factor == 1 else piece.to(dtype) * factor, len(piece)
        torch.sub(source, low * factor, out=scaled[:size]).mul_(bins / (high * factor - low * factor))
        found += _tally_(index[:size].copy_(scaled[:size]), bins + 1)
    return found


def _arithmetic(dtype: torch.dtype, low: float, high: float) -> tuple[torch.dtype, float]:
    """In which precision to find bins, and by what to multiply: near the ends of a range, differences leave it."""
    limits = torch.finfo(dtype)
    if 1e9 * limits.tiny < high - low < limits.max:
        return dtype, 1.0
    exponent = math.frexp(max(abs(low), abs(high)))[1]
    return torch.float64, 2.0 ** min(-exponent, 1000)


def _tally_(index: Tensor, count: int) -> Tensor:
    """How often each of ``count`` numbers stands in ``index``, which is used up."""
    half = len(index) // 2
    if half < count**2:
        return torch.bincount(index, minlength=count)
    # Two at a time: a pair is a place in a square table, of which rows and columns are added up.
    pairs = index[:half].add_(index[half : 2 * half], alpha=count)
    table = torch.bincount(pairs, minlength=count**2).view(count, count)
    found = table.sum(dim=0) + table.sum(dim=1)
    if len(index) % 2:
        found[index[-1]] += 1
    return found
