"""Norms of many tensors at once, accurate in low precision, and counts of their elements.

Each function also has the right result where ranks hold pieces of tensors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_regularize._checks import is_number
from lightning_regularize._rows import Rows, dense_pieces, per_tensor, rows_of, wide
from lightning_regularize._sharding import Sharding, local_pieces
from lightning_regularize._steps.buckets import HALF, buckets, scratch

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

_STEPS = 32  # of the bidiagonalization: its error for a Gaussian matrix of any size is then about 1e-3 or less


def norms(
    tensors: Sequence[Tensor],
    norm_type: float = 2.0,
    *,
    sharding: Sharding | None = None,
    parameters: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""The norm of each tensor, accurate, and of the whole tensor where ranks hold pieces of it.

    .. math:: \lVert x \rVert_p = \bigl(\sum_i |x_i|^p\bigr)^{1/p}

    Every rank that holds a piece should call this with the same tensors in the same order.

    Args:
        tensors: Parameters or gradients of any shape and floating dtype; DTensors welcome.
        norm_type: ``p``, at least 1; ``math.inf`` for the largest magnitude.
        sharding: Which ranks hold pieces; by default only DTensors are taken to be spread.
        parameters: What ``sharding`` knows the tensors by, if they are gradients; by default the tensors themselves.

    Returns:
        Shape ``(len(tensors),)``, on the device of the first tensor, float64 (float32 on devices without it).

    Raises:
        ValueError: ``norm_type`` is below 1 or not a number.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.zeros(0)])
        tensor([5., 0.], dtype=torch.float64)
    """
    check_norm_type(norm_type)
    known_by = tensors if parameters is None else parameters
    op: Literal["sum", "max"] = "max" if math.isinf(norm_type) else "sum"
    sums = (sharding or Sharding()).reduce(power_sums(dense_pieces(tensors), norm_type), known_by, op)
    return sums if norm_type == 1 or math.isinf(norm_type) else sums.pow(1 / norm_type)


def combine(values: Iterable[float], norm_type: float = 2.0) -> float:
    """The norm of a vector whose parts have the norms ``values``.

    Example:
        >>> combine([3.0, 4.0]), combine([3.0, 4.0], 1.0), combine([3.0, 4.0], math.inf)
        (5.0, 7.0, 4.0)
    """
    values = list(values)
    if any(math.isnan(v) for v in values):  # max() and hypot() would drop it
        return math.nan
    if math.isinf(norm_type):
        return max(values, default=0.0)
    if norm_type == 2:
        return math.hypot(*values)  # neither overflows nor underflows on the way
    largest = max(values, default=0.0)
    if largest in (0.0, math.inf):
        return largest
    return float(largest * math.fsum((v / largest) ** norm_type for v in values) ** (1 / norm_type))


def count_nonfinite(
    tensors: Sequence[Tensor], *, sharding: Sharding | None = None, parameters: Sequence[Tensor] | None = None
) -> Tensor:
    """How many elements of each tensor are NaN or infinite, over all its pieces; shape ``(n,)``, int64.

    Example:
        >>> count_nonfinite([torch.tensor([1.0, float("nan"), float("inf")])])
        tensor([2])
    """
    known_by = tensors if parameters is None else parameters
    return (sharding or Sharding()).reduce(nonfinite_counts(dense_pieces(tensors)), known_by).long()


def spectral_norm(matrix: Tensor) -> Tensor:
    r"""The largest singular value :math:`\sigma_1` of a matrix; 0-d, float64.

    Small matrices are decomposed; of larger ones, Golub and Kahan's bidiagonalization makes 32 products with the matrix
    and 32 with its transpose, from a start that is always the same. For Gaussian matrices, whose singular values
    crowd at the top as no others do, that is within 0.1 %; trained ones are closer.

    Args:
        matrix: Shape ``(m, n)``, of any floating or complex dtype; the whole of it.

    Returns:
        On the device of the matrix; NaN if an element is not finite.

    Example:
        >>> round(spectral_norm(torch.diag(torch.tensor([3.0, 4.0]))).item(), 6)
        4.0

    References:
        Golub and Kahan, "Calculating the Singular Values and Pseudo-Inverse of a Matrix", SIAM J. Numer. Anal. 1965.
    """
    matrix = matrix.detach()
    if matrix.dtype in HALF:
        matrix = matrix.float()
    if not matrix.numel():
        return matrix.new_zeros((), dtype=wide(matrix.device))
    # Squares of elements leave the range of float32 long before the elements.
    scale = _largest_magnitude(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
    matrix = _bidiagonal(matrix, scale) if min(matrix.shape) > 2 * _STEPS else matrix / scale
    finite = matrix.isfinite().all()  # the decomposition raises otherwise
    found = torch.linalg.svdvals(torch.where(finite, matrix, 0.0))[0].to(wide(matrix.device))
    return torch.where(finite, found * scale.to(found), math.nan)


def _bidiagonal(matrix: Tensor, scale: Tensor) -> Tensor:
    r"""The matrix :math:`U^H A V` of the bidiagonalization, of which the largest singular value is nearly that of A.

    It is that of ``matrix / scale``, of which no copy is made.
    """
    numbers = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], generator=numbers, dtype=matrix.dtype, device="cpu")
    tiny = torch.finfo(matrix.dtype).tiny
    left, right = matrix.new_empty(_STEPS, matrix.shape[0]), matrix.new_empty(_STEPS + 1, matrix.shape[1])
    result = matrix.new_zeros(_STEPS, _STEPS + 1, dtype=matrix.real.dtype)
    right[0] = start / start.norm()
    for i in range(_STEPS):
        u = _orthogonal(matrix @ (right[i] / scale), left[:i])
        result[i, i] = u.norm()
        left[i] = u / result[i, i].clamp_min(tiny)
        v = _orthogonal(matrix.mH @ (left[i] / scale), right[: i + 1])
        result[i, i + 1] = v.norm()
        right[i + 1] = v / result[i, i + 1].clamp_min(tiny)
    return result


def _orthogonal(vector: Tensor, rows: Tensor) -> Tensor:
    """What of a vector is orthogonal to all rows, which are orthonormal.

    Rounding destroys what theory says of the last alone. Of a matrix of low rank nothing but rounding is left soon, of
    which one pass leaves as much along the rows as across them.
    """
    for _ in range(2):
        vector = vector - rows.T @ (rows.conj() @ vector)
    return vector


def check_norm_type(norm_type: object) -> None:
    """Refuse what is not the order of a norm.

    Raises:
        ValueError: ``norm_type`` is below 1 or not a number.
    """
    if not is_number(norm_type) or not norm_type >= 1:
        raise ValueError(f"`norm_type` should be at least 1 (1, 2 or math.inf are usual), got {norm_type!r}.")


# -- what this rank's pieces have --------------------------------------------------------------------------------------


@torch.no_grad()
def power_sums(pieces: Sequence[Tensor], norm_type: float) -> Tensor:
    r"""The sum :math:`\sum_i |x_i|^p` of each tensor; for ``p = inf`` the largest magnitude.

    Args:
        pieces: Tensors as :func:`~lightning_regularize._rows.dense_pieces` returns them.
        norm_type: ``p``.

    Returns:
        Shape ``(len(pieces),)``, on the device of the first tensor, float64 (float32 on devices without it).
    """
    on_cpu = any(piece.is_cpu for piece in pieces)
    if on_cpu or norm_type not in (1, 2, math.inf):
        of_rows = _largest if math.isinf(norm_type) else lambda rows: (rows, _row_norms(rows.values, norm_type))
        found = list(map(of_rows, rows_of(pieces, bounded=norm_type not in (2, math.inf))))
    else:
        found = _foreach_norms(pieces, norm_type)
    # Squared in float64, which no square of a float32 number overflows.
    op: Literal["sum", "amax"] = "amax" if math.isinf(norm_type) else "sum"
    sums = per_tensor(found, pieces, op, exponent=2 if norm_type == 2 else 1)
    return _with_extremes(sums, pieces, norm_type) if on_cpu and norm_type in (1, 2) else sums


def _largest(rows: Rows) -> tuple[Rows, Tensor]:
    """The largest magnitude of each row of small tensors, and of all rows of a large one, which takes half the time."""
    if len(rows.indices) > 1 or not len(rows.values):
        return rows, _row_norms(rows.values, math.inf)
    return rows._replace(counts=[1]), _largest_magnitude(rows.values).view(1)


def _largest_magnitude(values: Tensor) -> Tensor:
    """The largest magnitude of some elements, at least one; 0-d."""
    if values.is_complex():
        return values.abs().amax()
    smallest, largest = values.aminmax()  # torch's own norm takes thirty times as long
    return torch.maximum(largest, -smallest)


def _foreach_norms(pieces: Sequence[Tensor], norm_type: float) -> list[tuple[Rows, Tensor]]:
    """One kernel for many tensors, which accumulates in the dtype of its results: in float64, unlike on a CPU."""
    found = []
    for indices, (tensors,) in buckets(pieces):
        # It refuses the largest magnitude of no elements.
        filled = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
        norms = torch.stack(torch._foreach_norm(filled, norm_type, dtype=wide(filled[0].device)))
        found.append((Rows(indices, [1] * len(indices), norms), norms))
    return found


def _row_norms(values: Tensor, norm_type: float) -> Tensor:
    """The norm of each row for ``p = 2`` and ``p = inf``, else its sum of powers."""
    if norm_type == 2:
        found: Tensor = torch.linalg.vector_norm(values, dim=1, dtype=None if values.is_cpu else wide(values.device))
        return found
    if norm_type not in (1, math.inf):
        return _row_powers(values, norm_type)
    # torch's own norms take five times as long for p = 1, and thirty times for p = inf.
    if math.isinf(norm_type) and not values.is_complex():
        return torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())
    magnitudes = torch.abs(values, out=scratch(values, dtype=values.real.dtype, slot="magnitudes"))
    return magnitudes.sum(dim=1) if norm_type == 1 else magnitudes.amax(dim=1)


def _row_powers(values: Tensor, norm_type: float) -> Tensor:
    """The sum of powers of each row in float64: powers in float32 are inaccurate, and leave its range early."""
    magnitudes = torch.abs(values, out=scratch(values, dtype=values.real.dtype, slot="magnitudes"))
    powers = scratch(values, dtype=wide(values.device), slot="powers").copy_(magnitudes)
    return powers.pow_(norm_type).sum(dim=1)


def _with_extremes(sums: Tensor, pieces: Sequence[Tensor], norm_type: float) -> Tensor:
    """Add up in float64 what overflows or underflows float32; squares do so long before the elements."""
    smallest = 1e-26 if norm_type == 2 else 0.0
    suspects = [i for i, value in enumerate(sums.tolist()) if value < smallest or value == math.inf]
    largest = power_sums([pieces[i] for i in suspects], math.inf).tolist() if suspects else []
    if extreme := [i for i, magnitude in zip(suspects, largest, strict=True) if 0 < magnitude < math.inf]:
        again = [pieces[i] for i in extreme]
        sums[extreme] = per_tensor([(rows, _row_powers(rows.values, norm_type)) for rows in rows_of(again)], again)
    return sums


@torch.no_grad()
def element_sums(pieces: Sequence[Tensor]) -> Tensor:
    """The sum of the elements of each tensor; arguments and result as for :func:`power_sums`."""
    return per_tensor([(rows, rows.values.sum(dim=1)) for rows in rows_of(pieces)], pieces)


@torch.no_grad()
def counts_at_most(pieces: Sequence[Tensor], threshold: float = 0.0) -> Tensor:
    """How many elements of each tensor have a magnitude of at most ``threshold``; NaN has none.

    Args:
        pieces: As for :func:`power_sums`.
        threshold: The threshold.

    Returns:
        As :func:`power_sums`.
    """
    found = []
    for rows in rows_of(pieces, fill=math.nan):
        flags = scratch(rows.values, slot="magnitudes")
        if threshold:
            torch.abs(rows.values, out=flags).le_(threshold)
        else:
            torch.eq(rows.values, 0, out=flags)
        found.append((rows, flags.sum(dim=1)))
    return per_tensor(found, pieces)


@torch.no_grad()
def nonfinite_counts(pieces: Sequence[Tensor], sums: Tensor | None = None) -> Tensor:
    """How many elements of each tensor are NaN or infinite.

    Args:
        pieces: As for :func:`power_sums`.
        sums: The :func:`power_sums` of the tensors, if they are known.

    Returns:
        As :func:`power_sums`.
    """
    if not pieces or not all(piece.is_cpu for piece in pieces):
        return _nonfinite_counts(pieces)
    # On a CPU to read the sums does not wait, and saves a second read of tensors whose sums are finite.
    sums = power_sums(pieces, 2.0) if sums is None else sums
    counts = torch.zeros_like(sums)
    if broken := [i for i, value in enumerate(sums.tolist()) if not math.isfinite(value)]:
        counts[broken] = _nonfinite_counts([pieces[i] for i in broken])
    return counts


def _nonfinite_counts(pieces: Sequence[Tensor]) -> Tensor:
    found = []
    for rows in rows_of(pieces):
        differences = torch.sub(rows.values, rows.values, out=scratch(rows.values, slot="magnitudes"))  # 0 or NaN
        found.append((rows, differences.ne_(0).sum(dim=1)))
    return per_tensor(found, pieces)


@torch.no_grad()
def copies(tensors: Sequence[Tensor]) -> list[Rows]:
    """The local elements of tensors as they are now, for :func:`change_sums`."""
    pieces = dense_pieces(tensors, keeps_complex=True)
    kept = []
    for rows in rows_of(pieces):
        memory = torch.empty_like(
            rows.values, dtype=pieces[rows.indices[0]].dtype
        )  # rows of half precision are float32
        kept.append(rows._replace(values=memory.copy_(rows.values)))
    return kept


@torch.no_grad()
def distance_sums(tensors: Sequence[Tensor], others: Sequence[Tensor], norm_type: float) -> Tensor:
    r"""The sum :math:`\sum_i |x_i - y_i|^p` over the local elements of each pair, with differences in float64.

    Args:
        tensors: Of any layout and dtype; DTensors welcome.
        others: For each of them a dense tensor of the shape of its local piece, perhaps of another dtype.
        norm_type: ``p``; for infinity the largest magnitude.

    Returns:
        As :func:`power_sums`.
    """
    pairs = []
    for tensor, other in zip(local_pieces(tensors), others, strict=True):
        dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
        other = other.to(dense.device)
        # Elements are compared in the order in which they lie in memory.
        alike = dense.stride() == other.stride()
        pairs.append((dense, other) if alike else (dense.contiguous(), other.contiguous()))
    pieces = dense_pieces([dense for dense, _ in pairs], keeps_complex=True)
    then = dense_pieces([other for _, other in pairs], keeps_complex=True)
    alike_in: dict[Hashable, list[int]] = {}  # dtypes and device, so that both sides are arranged in the same rows
    for i, (piece, other) in enumerate(zip(pieces, then, strict=True)):
        alike_in.setdefault((piece.dtype, other.dtype, piece.device), []).append(i)
    found = []
    for indices in alike_in.values():
        rows_then = rows_of([then[i] for i in indices])
        for rows in rows_of([pieces[i] for i in indices]):
            dtype = torch.complex128 if rows.values.is_complex() else wide(rows.values.device)
            change = scratch(rows.values, dtype=dtype, slot="change").copy_(rows.values)
            change.sub_(next(rows_then).values)
            found.append((rows._replace(indices=[indices[i] for i in rows.indices]), _row_norms(change, norm_type)))
    op: Literal["sum", "amax"] = "amax" if math.isinf(norm_type) else "sum"
    return per_tensor(found, pieces, op, exponent=2 if norm_type == 2 else 1)


@torch.no_grad()
def change_sums(
    before: Sequence[Rows], tensors: Sequence[Tensor], norm_types: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    r"""Sums over the change :math:`\delta = w' - w` of the local elements of each tensor.

    They are computed in float64. On a CPU that takes twice as long, so that of large float32 tensors only those are
    for which a sum leaves the range of float32.

    Args:
        before: The :func:`copies` of the tensors as they were.
        tensors: The same tensors, as they are now.
        norm_types: Each ``p`` to find the sum of powers of the change for.

    Returns:
        The sums of powers for each norm type, and :math:`w \cdot \delta`; each as :func:`power_sums`.
    """
    pieces = dense_pieces(tensors, keeps_complex=True)
    sums = _change_sums(before, pieces, norm_types, in_float32=True)
    fast = {rows.indices[0] for rows in before if _is_in_float32(rows)}
    if not fast:
        return sums[:-1], sums[-1]
    magnitudes = torch.stack(sums).abs()
    is_extreme = ((magnitudes < 1e-26) | ~magnitudes.isfinite()).any(dim=0).tolist()
    if suspects := [i for i in sorted(fast) if is_extreme[i]]:
        again = [rows for rows in before if rows.indices[0] in suspects]
        wide_sums = _change_sums(again, [pieces[i] for i in suspects], norm_types, in_float32=False)
        for each, exact in zip(sums, wide_sums, strict=True):
            each[suspects] = exact
    return sums[:-1], sums[-1]


def _change_sums(
    before: Sequence[Rows], pieces: Sequence[Tensor], norm_types: Sequence[float], *, in_float32: bool
) -> list[Tensor]:
    """The sums of powers of the change for each norm type, and last its product with what was before."""
    found: list[list[tuple[Rows, Tensor]]] = [[] for _ in (*norm_types, None)]
    for then, rows in zip(before, rows_of(pieces), strict=True):
        if in_float32 and _is_in_float32(then):
            old, change = then.values, torch.sub(rows.values, then.values, out=scratch(rows.values, slot="change"))
        else:
            dtype = torch.complex128 if rows.values.is_complex() else wide(rows.values.device)
            old = scratch(rows.values, dtype=dtype, slot="before").copy_(then.values)
            change = scratch(rows.values, dtype=dtype, slot="change").copy_(rows.values).sub_(old)
        for norm_type, powers in zip(norm_types, found[:-1], strict=True):
            powers.append((rows, _row_norms(change, norm_type)))
        if change.is_complex():
            change, old = (torch.view_as_real(values).flatten(1) for values in (change, old))
        found[-1].append((rows, change.mul_(old).sum(dim=1)))
    sums = []
    for norm_type, numbers in zip((*norm_types, 1.0), found, strict=True):
        op: Literal["sum", "amax"] = "amax" if math.isinf(norm_type) else "sum"
        sums.append(per_tensor(numbers, pieces, op, exponent=2 if norm_type == 2 else 1))
    return sums


def _is_in_float32(rows: Rows) -> bool:
    """Are these rows of a large tensor whose change may be computed in float32?"""
    return rows.are_of_large_tensor and rows.values.is_cpu and rows.values.dtype == torch.float32
