"""What does one step of an optimizer leave to be reduced over ranks, sent to the host, and named there?

A :class:`Reading` collects tensors while the device is busy. Everything that is summed over the pieces of a parameter
is a column of one matrix, so that a single collective and a single transfer serve all quantities.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from lightning_regularize._sharding import local_tensor, whole_tensor
from lightning_regularize.histograms import BINS, Histogram, as_histogram, measure
from lightning_regularize.norms import flat_copy, local_changes, local_statistics, spectral_norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lightning_regularize._sharding import Sharding
    from lightning_regularize.norms import Statistic


class Reading:
    """What is read of the parameters of one optimizer around one step.

    Args:
        parameters: The parameters by name; the same on every rank.
        sharding: Which ranks hold pieces of them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], sharding: Sharding) -> None:
        self.names = list(parameters)
        self._parameters = list(parameters.values())
        self._sharding = sharding
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}  # the same on every rank already
        self._before: list[Tensor] | None = None
        self._drawn: list[str] = []

    # -- on the device -----------------------------------------------------------------------------------------------

    def read_weights(self, statistics: Mapping[str, Statistic]) -> None:
        """One read of the weights, as they are now."""
        self._add(statistics, local_statistics(self._parameters, list(statistics.values())))

    def read_gradients(
        self,
        gradients: Sequence[Tensor | None],
        statistics: Mapping[str, Statistic],
        scale: Tensor | None,
        power: float,
    ) -> None:
        """One read of the gradients; ``gradient_power`` is divided by ``scale ** power``."""
        # A rank may hold no piece of a parameter, and then no gradient; its row has to be there all the same.
        filled = self._filled(gradients)
        values = local_statistics(filled, list(statistics.values()))
        if scale is not None and filled:
            values[:, list(statistics).index("gradient_power")] /= scale.to(values) ** power
        self._add(statistics, values)
        sizes = torch.tensor([local_tensor(gradient).numel() for gradient in filled], dtype=values.dtype)
        self._sums["gradient_size"] = sizes.to(values.device, non_blocking=True)

    def read_spectra(self, is_matrix: Sequence[bool]) -> None:
        """The squared largest singular values of what is a matrix; each is gathered first."""
        found = [
            spectral_norm(whole_tensor(local_tensor(parameter), parameter).flatten(1)) if matrix else None
            for parameter, matrix in zip(self._parameters, is_matrix, strict=True)
        ]
        zero = next((norm.new_zeros(()) for norm in found if norm is not None), torch.zeros(()))
        spectra = [zero if norm is None else norm for norm in found]
        self._whole["spectral_square"] = torch.stack(spectra).square() if spectra else torch.zeros(0)

    def draw(self, label: str, tensors: Sequence[Tensor | None], scale: Tensor | None = None) -> None:
        """Histograms of tensors that belong to the parameters; their ends are divided by ``scale``."""
        if not self._parameters:
            return
        ranges, counts = measure(self._filled(tensors), self._sharding, self._parameters, BINS)
        self._drawn.append(label)
        ranges = ranges if scale is None else ranges / scale.to(ranges)
        self._whole |= {f"{label}_low": ranges[:, 0], f"{label}_high": ranges[:, 1]}
        self._sums |= {f"{label}_bin{i}": column for i, column in enumerate(counts.unbind(dim=1))}

    def keep_weights(self) -> None:
        """A copy of the weights, until :meth:`read_changes`."""
        self._before = [flat_copy(parameter) for parameter in self._parameters]

    def read_changes(self, statistics: Mapping[str, Statistic]) -> None:
        """What has changed since :meth:`keep_weights`; later calls do nothing."""
        if self._before is None:
            return
        before, self._before = self._before, None
        values = local_changes(before, self._parameters, list(statistics.values()))
        self._add(statistics, values)
        self._sums["radial"] = values[:, -1]

    def reduced(self) -> Tensor:
        """All numbers, over all ranks; one collective for each way in which parameters are spread."""
        parts = [self._reduce(self._sums, "sum"), self._reduce(self._maxima, "max"), _matrix(self._whole)]
        found = [part for part in parts if part is not None]
        device = found[0].device if found else None
        return torch.cat([part.to(device).double().flatten() for part in found]) if found else torch.zeros(0)

    def _reduce(self, columns: Mapping[str, Tensor], op: str) -> Tensor | None:
        matrix = _matrix(columns)
        return (
            None if matrix is None else self._sharding.reduce(matrix, self._parameters, "max" if op == "max" else "sum")
        )

    def _add(self, statistics: Mapping[str, Statistic], values: Tensor) -> None:
        for i, (name, statistic) in enumerate(statistics.items()):
            (self._sums if statistic.combine == "sum" else self._maxima)[name] = values[:, i]

    def _filled(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(tensors, self._parameters, strict=True)
        return [local_tensor(p).new_empty(0) if tensor is None else tensor for tensor, p in pairs]

    # -- on the host -------------------------------------------------------------------------------------------------

    def rows(self, numbers: Iterator[float]) -> tuple[dict[str, dict[str, float]], dict[str, Histogram]]:
        """The sums of each parameter, and histograms by key, from the numbers of :meth:`reduced`."""
        rows: dict[str, dict[str, float]] = {name: {} for name in self.names}
        for columns in (self._sums, self._maxima, self._whole):
            for name in self.names:
                rows[name] |= dict(zip(columns, itertools.islice(numbers, len(columns)), strict=True))
        drawn = {}
        for label in self._drawn:
            for name, row in rows.items():
                counts = [row.pop(f"{label}_bin{i}") for i in range(BINS)]
                drawn[f"{label}_histogram/{name}"] = as_histogram(
                    row.pop(f"{label}_low"), row.pop(f"{label}_high"), *counts
                )
        return rows, drawn


def _matrix(columns: Mapping[str, Tensor]) -> Tensor | None:
    """The columns side by side, or None without any."""
    if not columns:
        return None
    device = next(iter(columns.values())).device
    return torch.stack([column.to(device) for column in columns.values()], dim=1)
