"""How are the elements of a tensor distributed? Counts in bins, over all ranks that hold a piece."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_regularize.norms import pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_regularize._sharding import Sharding

_BUFFER = 2**17  # elements

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
        width = (self.high - self.low) / len(self.counts)
        return [*(self.low + i * width for i in range(len(self.counts))), self.high]


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
    spans = torch.stack([_span(tensor) for tensor in tensors])
    spans = sharding.reduce(spans, parameters, "max")
    low, high = -spans[:, 0], spans[:, 1]
    empty, flat = low > high, low == high  # no finite element, or all the same
    low = torch.where(empty, 0.0, torch.where(flat, low - 0.5, low))
    high = torch.where(empty, 1.0, torch.where(flat, high + 0.5, high))
    ranges = torch.stack([low, high], dim=1)
    return ranges, torch.stack([_counts(t, ends, bins) for t, ends in zip(tensors, ranges, strict=True)])


def as_histogram(low: float, high: float, *counts: float) -> Histogram:
    """From a row of numbers, as it comes from the device."""
    return Histogram([round(count) for count in counts], low, high)


def _span(tensor: Tensor) -> Tensor:
    """Minus the smallest and the largest finite element of the local piece, so that the maximum combines both."""
    spans = []
    for piece in pieces(tensor):
        if not piece.numel():
            continue
        low, high = piece.aminmax()
        is_known = piece.device.type == "cpu" and all(map(math.isfinite, torch.stack([low, high]).tolist()))
        if not is_known:  # NaN would have been carried on
            finite = piece.isfinite()
            low, high = piece.where(finite, math.inf).amin(), piece.where(finite, -math.inf).amax()
        spans.append(torch.stack([-low, high]))
    if not spans:
        return torch.full((2,), -math.inf, dtype=torch.float64, device=tensor.device)
    return torch.stack(spans).amax(dim=0).to(torch.float64)


def _counts(tensor: Tensor, ends: Tensor, bins: int) -> Tensor:
    if ends.device.type == "cpu":
        left, right = ends.tolist()
        return _cpu_counts(tensor, left, bins / (right - left), bins)
    low, scale = ends[0], bins / (ends[1] - ends[0])
    found = torch.zeros(bins, dtype=ends.dtype, device=ends.device)
    for piece in pieces(tensor):
        index = piece.sub(low.to(piece.dtype)).mul_(scale.to(piece.dtype))
        found += torch.histc(index, bins, 0, bins)  # passes over what is not finite
    return found


def _cpu_counts(tensor: Tensor, low: float, scale: float, bins: int) -> Tensor:
    """As ``torch.histc``, which takes ten times as long; in buffers, for fresh memory costs more than arithmetic."""
    found = torch.zeros(bins + 1, dtype=torch.int64)
    buffers: list[Tensor] = []
    for large in pieces(tensor):
        for piece in torch.split(large, _BUFFER):
            if not buffers:
                buffers = [piece.new_empty(len(piece), dtype=d) for d in (piece.dtype, torch.int32, torch.uint8)]
            scaled, index, byte = (buffer[: len(piece)] for buffer in buffers)
            torch.sub(piece, low, out=scaled).mul_(scale)
            if math.isfinite(scaled.sum()):
                byte.copy_(index.copy_(scaled))  # the detour is faster
            else:
                byte = scaled[scaled.isfinite()].to(torch.uint8)
            found += torch.bincount(byte, minlength=bins + 1)
    found[bins - 1] += found[bins]  # the largest element is the end of the last bin
    return found[:bins].double()
