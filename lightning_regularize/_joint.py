"""How is a group penalized whose elements lie in several tensors? As a row of a matrix that is made of all of them.

A head of attention has rows of queries, keys and values, and columns of the output projection. The weights of a layer
are copied into a matrix with one row a head, on which a penalty works as on any other, and what comes out is copied
back. Layers of the same shapes share a matrix, bounded in bytes; a large layer is taken some heads at a time. Where
ranks hold pieces of weights, the weights of a layer are gathered, one layer after the other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_regularize._sharding import is_dtensor, local_pieces, piece_like, whole_tensor
from lightning_regularize._steps.buckets import buckets, bytes_of_bucket, put_back_, scratch, stacked
from lightning_regularize.units import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from torch import Tensor

    from lightning_regularize._heads import Part


def joint_value(penalty: Any, parts: Sequence[Part], weights: Sequence[Tensor], strength: float) -> list[Tensor]:
    """The values of a penalty on groups, which add up to that of all.

    Args:
        penalty: A penalty on the rows of matrices.
        parts: What each weight is of its layer.
        weights: The weights. Where ranks hold pieces, all ranks should take part.
        strength: The strength.
    """
    return [penalty.value(layers.matrix_of(weights), strength, dim=1) for layers in _layers(parts, weights)]


def add_joint_gradient_(
    penalty: Any, parts: Sequence[Part], gradients: Sequence[Tensor], weights: Sequence[Tensor], strength: Any
) -> None:
    """Add the gradient of a penalty on groups to ``gradients``.

    Args:
        penalty: A penalty on the rows of matrices.
        parts: What each weight is of its layer.
        gradients: Of the weights, spread over ranks as they are.
        weights: The weights. Where ranks hold pieces, all ranks should take part.
        strength: The strength, a number or a 0-d tensor.
    """
    for layers in _layers(parts, weights):
        matrix = layers.matrix_of(weights)
        term = scratch(matrix, slot="joint term").zero_()
        penalty.add_gradient_(term, matrix, strength, dim=1)
        layers.give_back_(gradients, term, adds=True)


def joint_proximal_(
    penalty: Any,
    parts: Sequence[Part],
    weights: Sequence[Tensor],
    threshold: float | Tensor | Callable[[Sequence[int]], Sequence[Tensor]],
) -> None:
    """Apply the proximal map of a penalty on groups.

    Args:
        penalty: A penalty on the rows of matrices.
        parts: What each weight is of its layer.
        weights: The weights, changed in place. Where ranks hold pieces, all ranks should take part.
        threshold: A number; or what returns a threshold for each element of some weights, given their numbers, or of
            what lies on this rank.
    """
    for layers in _layers(parts, weights):
        matrix = layers.matrix_of(weights)
        found: Any = threshold
        if callable(threshold):
            found = layers.matrix(threshold, slot="joint threshold")
        penalty.proximal_(matrix, found, dim=1)
        layers.give_back_(weights, matrix, adds=False)


class _Layers(NamedTuple):
    """Some layers whose weights are alike, and some of their heads; or a layer of which ranks hold pieces.

    Args:
        parts: For each weight of a layer what it is of it.
        columns: Likewise the numbers of this weight in all layers.
        like: Likewise this weight of the first layer.
        first: The first of the heads.
        last: The first that is not one of them any more.
    """

    parts: list[Part]
    columns: list[list[int]]
    like: list[Tensor]
    first: int
    last: int

    def matrix_of(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights of a head in each row, in float32 at least: temporary, good until the next call."""
        return self.matrix(lambda numbers: local_pieces([weights[i] for i in numbers]), slot="joint")

    def matrix(self, tensors_of: Callable[[Sequence[int]], Sequence[Tensor]], *, slot: str) -> Tensor:
        """What ``tensors_of`` returns for the numbers of weights, as a matrix with one row a head."""
        size = sum(_elements(part, weight) for part, weight in zip(self.parts, self.like, strict=True))
        count = len(self.columns[0])
        shape = count, self.last - self.first, size
        matrix = scratch(self.like[0], shape, dtype=at_least_float32(self.like[0]), slot=slot)
        at = 0
        for part, numbers, like in zip(self.parts, self.columns, self.like, strict=True):
            tensors = [whole_tensor(tensor, like) for tensor in tensors_of(numbers)]
            for view in self._by_heads(stacked(tensors), part):
                end = at + math.prod(view.shape[2:])
                matrix[:, :, at:end].view(*matrix.shape[:2], *view.shape[2:]).copy_(view)
                at = end
        return matrix.view(-1, size)

    def give_back_(self, tensors: Sequence[Tensor], matrix: Tensor, *, adds: bool) -> None:
        """Give tensors, which are spread as the weights are, the values of a matrix, or add these to them."""
        rows, at = matrix.view(len(self.columns[0]), self.last - self.first, -1), 0
        for part, numbers, like in zip(self.parts, self.columns, self.like, strict=True):
            is_cut, those = is_dtensor(like), local_pieces([tensors[i] for i in numbers])
            stack = (
                torch.zeros((1, *like.shape), dtype=matrix.dtype, device=matrix.device) if is_cut else stacked(those)
            )
            for view in self._by_heads(stack, part):
                end = at + math.prod(view.shape[2:])
                values = rows[:, :, at:end].view(*rows.shape[:2], *view.shape[2:])
                view.add_(values) if adds and not is_cut else view.copy_(values)
                at = end
            if is_cut:
                piece = piece_like(stack[0], like.to(matrix.dtype))
                those[0].add_(piece) if adds else those[0].copy_(piece)
            else:
                put_back_(those, stack)

    def _by_heads(self, stack: Tensor, part: Part) -> Iterator[Tensor]:
        """Views of weights of one shape with the heads in dim 1."""
        for dim, start, size in part.slices:
            width = size // part.heads
            those = stack.narrow(dim + 1, start + self.first * width, (self.last - self.first) * width)
            yield those.unflatten(dim + 1, (-1, width)).movedim(dim + 1, 1)  # type: ignore[no-untyped-call]


def _layers(parts: Sequence[Part], weights: Sequence[Tensor]) -> Iterator[_Layers]:
    by_layer: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        by_layer.setdefault(part.layer, []).append(i)
    alike: dict[Hashable, list[list[int]]] = {}
    for layer, numbers in by_layer.items():
        kinds = [(parts[i].slices, weights[i].shape, weights[i].dtype, weights[i].device) for i in numbers]
        cut = layer if any(is_dtensor(weights[i]) for i in numbers) else None
        alike.setdefault((parts[numbers[0]].heads, cut, *kinds), []).append(numbers)
    for layers in alike.values():
        columns = [list(column) for column in zip(*layers, strict=True)]
        of_layer, like = [parts[i] for i in layers[0]], [weights[i] for i in layers[0]]
        heads = of_layer[0].heads
        if any(map(is_dtensor, like)):
            yield _Layers(of_layer, columns, like, 0, heads)
            continue
        tables = [[weights[i] for i in column] for column in columns]
        size = sum(_elements(part, weight) for part, weight in zip(of_layer, like, strict=True))
        most = max(1, bytes_of_bucket(like[0]) // (size * at_least_float32(like[0]).itemsize))
        for indices, _ in buckets(*tables, dims=[None] * len(layers)):
            chosen = [[column[i] for i in indices] for column in columns]
            step = most if len(indices) == 1 else heads
            for first in range(0, heads, step):
                yield _Layers(of_layer, chosen, like, first, min(first + step, heads))


def _elements(part: Part, weight: Tensor) -> int:
    """How many elements of a weight belong to one head."""
    return sum(weight.numel() // weight.shape[run.dim] * (run.size // part.heads) for run in part.slices)
