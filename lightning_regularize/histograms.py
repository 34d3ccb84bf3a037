"""How are the elements of a tensor distributed? Counts in bins, over all ranks that hold a piece."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_regularize._rows import dense_pieces, per_tensor, rows_of
from lightning_regularize._steps.buckets import scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_regularize._rows import Rows
    from lightning_regularize._sharding import Sharding

BINS = 64
"""As many as ``wandb.watch`` draws."""


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
        bins: How many.

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


@torch.no_grad()
def measure(
    tensors: Sequence[Tensor], sharding: Sharding, parameters: Sequence[Tensor], bins: int
) -> tuple[Tensor, Tensor]:
    """The common range of the pieces of each tensor, shape ``(n, 2)``, and this rank's counts, ``(n, bins)``."""
    dense = dense_pieces(tensors)
    spans = _spans(dense)
    zeros = _not_stored(tensors, dense).to(spans.device)
    spans = torch.where(zeros[:, None] > 0, spans.clamp_min(0.0), spans)  # zeros are in the range
    spans = sharding.reduce(spans, parameters, "max")
    low, high = -spans[:, 0], spans[:, 1]
    empty, flat = low > high, low == high  # no finite element, or all the same
    width = torch.where(flat, (2**-20 * low.abs()).clamp_min(0.5), 0.0)  # large numbers swallow a half
    low, high = torch.where(empty, 0.0, low - width), torch.where(empty, 1.0, high + width)
    ranges = torch.stack([low, high], dim=1)
    counts = _counts(dense, ranges, bins)
    place = (-low / (high - low) * bins).long().clamp(0, bins - 1)
    return ranges, counts.scatter_add_(1, place[:, None], zeros[:, None].to(counts.dtype))


def _not_stored(tensors: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """How many zeros a sparse tensor does not store, shape ``(n,)``."""
    pairs = zip(tensors, dense, strict=True)
    return torch.tensor([t.numel() - v.numel() if t.layout is not torch.strided else 0 for t, v in pairs], device="cpu")


def as_histogram(low: float, high: float, *counts: float) -> Histogram:
    """From a row of numbers, as it comes from the device."""
    return Histogram([round(count) for count in counts], low, high)


def _spans(tensors: Sequence[Tensor]) -> Tensor:
    """Minus the smallest and the largest finite element, so that the maximum over pieces combines both."""
    found: tuple[list[tuple[Rows, Tensor]], ...] = [], []
    for rows in rows_of(tensors, fill=math.nan):
        for side, sign in zip(found, (-1, 1), strict=True):
            memory = torch.mul(rows.values, sign, out=scratch(rows.values, slot="norms"))
            finite = memory.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
            side.append((rows, finite.amax(dim=1)))
    return torch.stack([per_tensor(side, tensors, "amax", initial=-math.inf) for side in found], dim=1)


def _counts(tensors: Sequence[Tensor], ranges: Tensor, bins: int) -> Tensor:
    """How many elements are in each bin, shape ``(n, bins)``."""
    low, high = ranges[:, 0], ranges[:, 1]
    # Near the ends of the range of float64, differences leave it. A power of two does not round.
    factor = torch.exp2(-torch.frexp(torch.maximum(low.abs(), high.abs())).exponent.clamp(-1000, 1000).to(low.dtype))
    low, scale = low * factor, bins / (high * factor - low * factor)
    places = bins + 2  # the largest element is at the end of the last bin, and what is not finite is behind it
    counts = torch.zeros(len(tensors) * places, dtype=torch.int64, device=ranges.device)
    for rows in rows_of(tensors, fill=math.nan):
        numbers, times = torch.tensor(rows.indices, device="cpu"), torch.tensor(rows.counts, device="cpu")
        owner = numbers.repeat_interleave(times, output_size=len(rows.values))
        owner = owner.to(ranges.device, non_blocking=True)
        values = scratch(rows.values, dtype=ranges.dtype, slot="bins").copy_(rows.values)
        values.mul_(factor[owner, None]).sub_(low[owner, None]).mul_(scale[owner, None])
        index = scratch(values, dtype=torch.int64, slot="bins").copy_(values.nan_to_num_(bins + 1, bins + 1, bins + 1))
        index.add_(places * owner[:, None])
        if index.is_cpu:
            counts += torch.bincount(index.view(-1), minlength=len(counts))
        else:  # where `bincount` waits for the device
            counts.scatter_add_(0, index.view(-1), torch.ones_like(index).view(-1))
    table = counts.view(len(tensors), places)
    table[:, bins - 1] += table[:, bins]
    return table[:, :bins].to(ranges.dtype)
