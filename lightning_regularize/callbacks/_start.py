"""What were the weights at the start of training?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_regularize._sharding import local_tensor, piece_like, whole_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from lightning_regularize._used import Piece, UsedWeight
    from lightning_regularize.callbacks._monitored import Row


class _Kept(NamedTuple):
    """What this rank holds of a weight as it was first seen; the parameter is kept for its identity."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    tensor: Tensor
    is_spread: bool  # over ranks as the parameter is


class Start:
    """Copies of weights as they were at the start of training.

    A weight that is new to an optimizer, that is unfrozen, or that takes the place of another one is kept as it is when
    it is first seen. One that only moves to another layer keeps its start.

    Args:
        saved: The whole weights at the start, by name, from a checkpoint.
        in_bfloat16: Whether to keep real weights in bfloat16.
    """

    def __init__(self, saved: Mapping[str, Tensor], *, in_bfloat16: bool) -> None:
        self._saved, self._in_bfloat16 = dict(saved), in_bfloat16
        self._kept: dict[int, _Kept] = {}

    @torch.no_grad()
    def keep(self, weights: Iterable[UsedWeight]) -> list[str]:
        """Keep the weights that are new; all ranks should take part.

        Returns:
            The names of those that were not in the checkpoint.

        Raises:
            ValueError: The checkpoint has a weight of another shape.
        """
        weights = list(weights)
        present = {id(weight.info.parameter) for weight in weights}
        names = {weight.info.name for weight in weights}
        # What is frozen for a while keeps its start; what was replaced lets go of it.
        self._kept = {key: kept for key, kept in self._kept.items() if key in present or kept.name not in names}
        missing = []
        for weight in weights:
            if self._knows(weight):
                key = id(weight.info.parameter)
                self._kept[key] = self._kept[key]._replace(name=weight.info.name)
                continue
            parameter, piece = weight.info.parameter, weight.piece()
            is_spread = piece.like is parameter
            name, tensor = weight.info.name, _dense(local_tensor(piece.tensor))
            if name in self._saved:
                tensor = self._restored(name, piece, tensor)
            else:
                missing.append(name)
                tensor = tensor.clone()
            if self._in_bfloat16 and tensor.is_floating_point():
                tensor = tensor.bfloat16()
            self._kept[id(parameter)] = _Kept(name, parameter, piece.shape, tensor, is_spread)
        return missing

    def _knows(self, weight: UsedWeight) -> bool:
        known = self._kept.get(id(weight.info.parameter))
        return known is not None and (weight.is_computed or known.shape == weight.info.shape)

    def _restored(self, name: str, piece: Piece, now: Tensor) -> Tensor:
        """This rank's piece of a weight in the checkpoint, which counts once: what replaces it later is new.

        Raises:
            ValueError: The weight there has another shape.
        """
        whole = self._saved.pop(name)
        if tuple(whole.shape) != tuple(piece.shape):
            raise ValueError(
                f"WeightNormMonitor: `start[{name!r}]` in the checkpoint should have the shape {tuple(piece.shape)} "
                f"of the weight, got {tuple(whole.shape)}."
            )
        return torch.empty_like(now).copy_(piece_like(whole.to(now.dtype), piece.like))

    def of(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> list[Tensor]:
        """What this rank holds of the start of each row, shaped as its ``pieces`` are now."""
        return [
            self._kept[id(row.parameter)].tensor if row.stands_for_weight else piece.tensor
            for row, piece in zip(rows, pieces, strict=True)
        ]

    def save(self) -> dict[str, Tensor]:
        """The whole weights on the host by name; all ranks should take part."""
        found: dict[str, Any] = {}
        for name, parameter, _, tensor, is_spread in self._kept.values():
            found[name] = (whole_tensor(tensor, parameter) if is_spread else tensor).cpu()
        return {**self._saved, **found}


def _dense(piece: Tensor) -> Tensor:
    return piece if piece.layout is torch.strided else piece.to_dense()
