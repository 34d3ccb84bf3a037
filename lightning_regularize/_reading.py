"""Sums over the parameters of one optimizer around one of its steps, on their way from the device to the host.

A :class:`Reading` collects tensors while the device is busy. Each sum over the pieces of parameters is a column of one
matrix, so that a single collective and a single transfer serve all quantities.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from lightning_regularize._rows import dense_pieces
from lightning_regularize._sharding import local_tensor, whole_tensor
from lightning_regularize.histograms import BINS, Histogram, as_histogram, measure
from lightning_regularize.norms import (
    change_sums,
    copies,
    counts_at_most,
    distance_sums,
    element_sums,
    nonfinite_counts,
    power_sums,
    spectral_norm,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

    from lightning_regularize._rows import Rows
    from lightning_regularize._sharding import Sharding

    Op = Literal["sum", "max", "none"]  # how the numbers of two ranks combine; "none" if they are the same already


class Reading:
    """What is read of the weights of one optimizer around one step.

    The names of sums are those of :data:`~lightning_regularize.quantities.Sums`.

    Args:
        weights: The weights by name, or what this rank holds of them; the names are the same on every rank.
        sizes: How many elements the whole weights have.
        sharding: Which ranks hold pieces of them.
        needs: The names of the sums to find.
        norm_type: The exponent of the sums of powers.
        like: What ``sharding`` knows the weights by; by default they are parameters, and known by themselves.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        sizes: Sequence[int],
        sharding: Sharding,
        needs: Collection[str],
        norm_type: float,
        like: Sequence[Tensor] | None = None,
    ) -> None:
        self.names = list(weights)
        self.sizes = sizes
        self._weights = list(weights.values())
        self._like = self._weights if like is None else like
        self._sharding = sharding
        self._needs = needs
        self._norm_type = norm_type
        self._columns: dict[Op, dict[str, Tensor]] = {"sum": {}, "max": {}, "none": {}}
        self._before: list[Rows] | None = None
        self._drawn: list[str] = []

    # -- on the device -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read_weights(self, threshold: float | None = None) -> None:
        """Sums over the weights as they are now; ``threshold`` is the largest magnitude that ``below`` counts."""
        weights = dense_pieces(self._weights)
        powers = {norm_type: power_sums(weights, norm_type) for norm_type in self._norm_types("weight")}
        self._add_powers("weight", powers)
        if "zeros" in self._needs:
            self._columns["sum"]["zeros"] = counts_at_most(weights)
        if threshold is not None and "below" in self._needs:
            self._columns["sum"]["below"] = counts_at_most(weights, threshold)
        if "weight_nonfinite" in self._needs:
            counts = nonfinite_counts(weights, next(iter(powers.values()), None))
            self._columns["sum"]["weight_nonfinite"] = counts

    @torch.no_grad()
    def read_gradients(self, gradients: Sequence[Tensor | None], scale: Tensor | None) -> None:
        """Sums over the gradients, which are divided by ``scale``."""
        # A rank may hold no piece of a parameter, and then no gradient; its row has to be there all the same.
        filled = dense_pieces(self._filled(gradients))
        powers = power_sums(filled, self._norm_type)
        self._columns["sum"]["gradient_nonfinite"] = nonfinite_counts(filled, powers)
        sums = {}
        if "gradient_sum" in self._needs:
            sums["gradient_sum"] = element_sums(filled), 1.0
        if "gradient_square" in self._needs:
            sums["gradient_square"] = powers if self._norm_type == 2 else power_sums(filled, 2.0), 2.0
        if scale is not None:
            powers = powers / scale.to(powers) ** (1 if math.isinf(self._norm_type) else self._norm_type)
        for name, (found, exponent) in sums.items():
            self._columns["sum"][name] = found if scale is None else found / scale.to(found) ** exponent
        if "gradient_power" in self._needs:
            self._columns["max" if math.isinf(self._norm_type) else "sum"]["gradient_power"] = powers
        sizes = torch.tensor([gradient.numel() for gradient in filled], dtype=powers.dtype, device="cpu")
        self._columns["sum"]["gradient_size"] = sizes.to(powers.device, non_blocking=True)

    def read_distances(self, start: Sequence[Tensor]) -> None:
        """Sums over the differences of the weights from what this rank holds of others."""
        distances = distance_sums(self._weights, start, self._norm_type)
        self._columns["max" if math.isinf(self._norm_type) else "sum"]["distance_power"] = distances

    def read_spectra(self, is_matrix: Sequence[bool]) -> None:
        """The squared largest singular values of what is a matrix; each is gathered first."""
        found = [
            spectral_norm(whole_tensor(local_tensor(weight), like).flatten(1)) if matrix else None
            for weight, like, matrix in zip(self._weights, self._like, is_matrix, strict=True)
        ]
        zero = next((norm.new_zeros(()) for norm in found if norm is not None), torch.zeros((), device="cpu"))
        spectra = [zero if norm is None else norm for norm in found]
        self._columns["none"]["spectral_square"] = torch.stack(spectra).square() if spectra else zero.expand(0)

    def draw(self, label: str, tensors: Sequence[Tensor | None], scale: Tensor | None = None) -> None:
        """Histograms of tensors that belong to the weights; their ends are divided by ``scale``."""
        if not self._weights:
            return
        ranges, counts = measure(self._filled(tensors), self._sharding, self._like, BINS)
        self._drawn.append(label)
        ranges = ranges if scale is None else ranges / scale.to(ranges)
        self._columns["none"] |= {f"{label}_low": ranges[:, 0], f"{label}_high": ranges[:, 1]}
        self._columns["sum"] |= {f"{label}_bin{i}": column for i, column in enumerate(counts.unbind(dim=1))}

    def keep_weights(self) -> None:
        """A copy of the weights, until :meth:`read_changes`."""
        if self._norm_types("update"):
            self._before = copies(self._weights)

    def read_changes(self, look: Callable[[], Sequence[Tensor]] | None = None) -> None:
        """Sums over what has changed since :meth:`keep_weights`; later calls do nothing.

        Args:
            look: Returns the weights as they are now, if they are other tensors than before.
        """
        if self._before is None:
            return
        norm_types = self._norm_types("update")
        now = self._weights if look is None else look()
        powers, self._columns["sum"]["radial"] = change_sums(self._before, now, norm_types)
        self._before = None
        self._add_powers("update", dict(zip(norm_types, powers, strict=True)))

    def _norm_types(self, of: str) -> list[float]:
        names = {f"{of}_power": self._norm_type, f"{of}_square": 2.0}
        return list(dict.fromkeys(norm_type for name, norm_type in names.items() if name in self._needs))

    def _add_powers(self, of: str, powers: Mapping[float, Tensor]) -> None:
        for name, norm_type in ((f"{of}_power", self._norm_type), (f"{of}_square", 2.0)):
            if name in self._needs:
                self._columns["max" if math.isinf(norm_type) else "sum"][name] = powers[norm_type]

    def _filled(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(tensors, self._weights, strict=True)
        return [local_tensor(weight).new_empty(0) if tensor is None else tensor for tensor, weight in pairs]

    def reduced(self) -> Tensor:
        """All numbers, over all ranks; one collective for each way in which parameters are spread."""
        found: list[Tensor] = []
        for op, columns in self._columns.items():
            if columns:
                device = next(iter(columns.values())).device
                matrix = torch.stack([column.to(device) for column in columns.values()], dim=1)
                matrix = matrix if op == "none" else self._sharding.reduce(matrix, self._like, op)
                found.append(matrix.T.to(found[0].device if found else device).double().flatten())
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device="cpu")

    # -- on the host -------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many numbers :meth:`reduced` returns."""
        return len(self.names) * sum(map(len, self._columns.values()))

    def sums(self, numbers: Tensor) -> tuple[dict[str, Tensor], dict[str, Histogram]]:
        """The sums of each weight, and histograms by key, from the numbers of :meth:`reduced`."""
        columns = [name for columns in self._columns.values() for name in columns]
        sums = dict(zip(columns, numbers.view(len(columns), len(self.names)).unbind(), strict=True))
        drawn = {}
        for label in self._drawn:
            ends_and_counts = [sums.pop(f"{label}_{side}") for side in ("low", "high")]
            ends_and_counts += [sums.pop(f"{label}_bin{i}") for i in range(BINS)]
            for name, row in zip(self.names, torch.stack(ends_and_counts, dim=1).tolist(), strict=True):
                drawn[f"{label}_histogram/{name}"] = as_histogram(*row)
        return sums, drawn
