"""How is a parameter spread over ranks, and how does one reduce over its pieces?

Everything that is peculiar to DTensor (FSDP2, tensor parallel), FSDP1 or DeepSpeed stands here. Two facts shape it:

* ``torch.linalg.vector_norm(dtensor).item()`` silently returns the *local* number, and an infinity norm of an empty
  shard raises on that rank alone, so that the others hang. We therefore reduce local tensors by ourselves, an empty
  one to zero, and make one collective for all parameters that are spread alike.
* FSDP1 with ``use_orig_params=True`` hands out 1-D local slices, some of them empty, that do not know where they come
  from; only the flat parameter does (``FlatParamHandle``, private, the same since torch 2.0).
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Replicate

_SHARDED = (DTensor,) if dist.is_available() else ()
_PLAIN = {Tensor, nn.Parameter}


def local_tensor(tensor: Tensor) -> Tensor:
    """The piece of ``tensor`` that lies on this rank, detached and sharing memory; a plain tensor is its own piece."""
    return local_piece(tensor).detach()


def local_piece(tensor: Tensor) -> Tensor:
    """As :func:`local_tensor`, but a plain tensor is not detached, which takes time: to be called without gradients."""
    if hasattr(tensor, "ds_tensor"):
        return _of_zero3(tensor.ds_tensor, tensor)
    # What `to_local` returns without gradients, as torch documents it, in a tenth of the time.
    return tensor._local_tensor if isinstance(tensor, _SHARDED) else tensor


def local_pieces(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What :func:`local_piece` says of each."""
    found = list(tensors)
    return found if _are_plain(found) else [local_piece(tensor) for tensor in found]


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Says that no tensor knows that it is spread, as almost always, in a third of the time of asking each."""
    return _PLAIN.issuperset(map(type, tensors)) and not (_has_deepspeed() and any(map(_is_in_zero3, tensors)))


def is_dtensor(tensor: Tensor) -> bool:
    """Does a rank hold a piece that knows the whole, as under FSDP2 and tensor parallel?"""
    return isinstance(tensor, _SHARDED)


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient of ``parameter``, spread over ranks as that is; tensor parallel may leave it in summands."""
    gradient = parameter.grad
    if type(gradient) is Tensor:  # as almost always
        return gradient
    if gradient is None and (hasattr(parameter, "ds_tensor") or hasattr(parameter, "_hp_mapping")):
        return _gradient_in_zero(parameter)
    if dist.is_available() and isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        agree = gradient.placements == parameter.placements
        return gradient if agree else gradient.redistribute(placements=parameter.placements)
    return gradient


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """What :func:`gradient_of` says of each."""
    own = [parameter.grad for parameter in parameters]
    return own if set(map(type, own)) == {Tensor} else list(map(gradient_of, parameters))


def settle_gradients_(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """What :func:`gradients_of` says, and from now on the parameters' own: what is added to them then counts once."""
    gradients = gradients_of(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not parameter.grad:
            parameter.grad = gradient
    return gradients


def are_elsewhere(parameters: Sequence[Tensor]) -> list[bool]:
    """Has DeepSpeed's ZeRO-Infinity put the elements of a parameter on a disk? Asked of each."""
    if not _has_deepspeed():
        return [False] * len(parameters)
    return [_is_in_zero3(p) and p.ds_tensor.numel() != p.ds_tensor.ds_numel for p in parameters]  # type: ignore[attr-defined]


def _has_deepspeed() -> bool:
    """Might tensors have what DeepSpeed adds to them? To look for it takes longer than most else."""
    return "deepspeed" in sys.modules


def _is_in_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


def _of_zero3(piece: Tensor, parameter: Any) -> Tensor:
    """A rank's ``piece`` of a parameter of ZeRO-3 without the padding, by which pieces are equally long."""
    start = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
    return piece.detach()[: max(parameter.ds_numel - start, 0)]


def _gradient_in_zero(parameter: Any) -> Tensor | None:
    """The gradient that DeepSpeed's ZeRO keeps to itself, spread as the parameter is; all ranks should take part."""
    from deepspeed.utils import safe_get_full_grad

    gradient: Tensor | None = safe_get_full_grad(parameter)
    if gradient is None or not hasattr(parameter, "ds_tensor"):
        return gradient
    start = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
    return gradient.detach().flatten()[start : start + parameter.ds_tensor.ds_numel]


def whole_tensor(piece: Tensor, like: Tensor) -> Tensor:
    """The whole of which every rank has a ``piece`` cut as ``like`` is; all ranks should take part."""
    if not (dist.is_available() and isinstance(like, DTensor)):
        return piece
    spread = DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor()


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor of which ranks may hold pieces, detached; all ranks should take part."""
    return whole_tensor(local_tensor(tensor), tensor)


def piece_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of a ``whole`` that every rank has, cut as ``like`` is, on its device and of its dtype."""
    whole = whole.detach().to(device=like.device, dtype=like.dtype)
    if not (dist.is_available() and isinstance(like, DTensor)):
        return whole
    everywhere = [Replicate()] * len(like.placements)
    spread = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=like.placements).to_local()


def copy_pieces_(tensors: Sequence[Tensor], wholes: Sequence[Tensor]) -> None:
    """Give tensors, of which ranks may hold pieces, the values of whole ones that every rank has."""
    pieces = [piece_like(whole, tensor) for whole, tensor in zip(wholes, tensors, strict=True)]
    torch._foreach_copy_(local_pieces(tensors), pieces)


def _flat_handles(module: nn.Module) -> Iterator[Any]:
    """The ``FlatParamHandle`` of every FSDP1 unit in ``module``."""
    if not dist.is_available():
        return
    for unit in module.modules():
        if isinstance(unit, FullyShardedDataParallel) and unit._handle is not None:
            yield unit._handle


def has_flat_parameters(module: nn.Module) -> bool:
    """Does FSDP1 show one flat parameter a unit (``use_orig_params=False``) instead of the module's own?"""
    return any(not handle._use_orig_params for handle in _flat_handles(module))


def reshard(module: nn.Module) -> None:
    """Let FSDP2 show the parameters that the optimizer holds, its shards.

    A root stays unsharded after a forward pass without a backward one, as validation is. What it shows meanwhile are
    other tensors, whose memory is freed when it is sharded again.
    """
    for part in module.modules() if dist.is_available() else ():
        if isinstance(part, FSDPModule):
            part.reshard()


def unsharded_shapes(module: nn.Module) -> dict[int, torch.Size]:
    """The shapes of whole tensors, by ``id(parameter)``, for the parameters whose own shape is not it.

    A DTensor's shape is the whole one already. FSDP1's slices are 1-D, and a parameter of DeepSpeed's ZeRO-3 has no
    element outside its forward pass.
    """
    shapes = {id(p): torch.Size(p.ds_shape) for p in module.parameters() if hasattr(p, "ds_shape")}
    for handle in _flat_handles(module):
        flat = handle.flat_param
        shapes.update((id(p), torch.Size(s)) for p, s in zip(flat._params or (), flat._shapes, strict=False))
    return shapes


class Sharding:
    """Which ranks hold the pieces of each parameter of a module.

    Args:
        module: The module as the strategy has set it up; without one, only DTensors are known to be spread.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._process_groups: dict[int, dist.ProcessGroup] = {}
        for handle in _flat_handles(module) if module is not None else ():
            # Under NO_SHARD every rank holds the whole tensor, although there is a process group.
            if handle.uses_sharded_strategy:
                self._process_groups |= dict.fromkeys(map(id, handle.flat_param._params or ()), handle.process_group)

    def _spread(self, parameter: Tensor) -> Hashable:
        """How ``parameter`` is spread: None, a process group, or a mesh with placements."""
        if dist.is_available() and isinstance(parameter, DTensor):
            return parameter.device_mesh, tuple(parameter.placements)
        if hasattr(parameter, "ds_tensor"):
            return parameter.ds_process_group  # type: ignore[attr-defined, no-any-return]
        return self._process_groups.get(id(parameter))

    def is_flat(self, parameter: Tensor) -> bool:
        """Is what this rank holds of ``parameter`` a run of its elements, cut anywhere?"""
        return id(parameter) in self._process_groups or hasattr(parameter, "ds_tensor")

    def reduce(self, values: Tensor, parameters: Sequence[Tensor], op: Literal["sum", "max"] = "sum") -> Tensor:
        """What ``values`` come to over all pieces of each parameter: one collective for all that are spread alike.

        Args:
            values: Row ``i`` is what this rank found in its piece of ``parameters[i]``; shape ``(n, ...)``.
            parameters: The ``n`` parameters, in the same order on every rank. Replicas count once.
            op: How two pieces combine.

        Returns:
            A tensor like ``values``, the same on every rank that holds a piece.
        """
        if not (dist.is_available() and dist.is_initialized()) or (not self._process_groups and _are_plain(parameters)):
            return values
        spread_alike: dict[Hashable, list[int]] = {}
        for i, parameter in enumerate(parameters):
            if (spread := self._spread(parameter)) is not None:
                spread_alike.setdefault(spread, []).append(i)
        if not spread_alike:
            return values
        values = values.clone()
        for spread, rows in spread_alike.items():
            index = torch.tensor(rows, device=values.device)
            values[index] = _all_reduce(values[index], spread, op)
        return values


def _all_reduce(values: Tensor, spread: Any, op: Literal["sum", "max"]) -> Tensor:
    if isinstance(spread, dist.ProcessGroup):
        groups = [spread]
    else:  # a mesh has one group a dim; not through a DTensor of partial sums, which takes longer than the collective
        mesh, placements = spread
        groups = [mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if op == "max":  # in which NaN is lost or not, depending on the order of the ranks
        missing = values.isnan().to(values.dtype)
        values = torch.stack([values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), missing])
    for group in groups:
        dist.all_reduce(values, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group)
    return values if op == "sum" else torch.where(values[1] > 0, math.nan, values[0])
