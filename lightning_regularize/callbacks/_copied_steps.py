"""What would a step do to copies of weights, in their own precision and in a wider one?"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_regularize._sharding import local_tensor
from lightning_regularize._steps.buckets import HALF
from lightning_regularize._steps.hooks import ATTRIBUTE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDE = {"mps": torch.float32}  # float64 elsewhere, so that a strength is seen that float32 rounds away as well
_NUMBERS = (int, float, str, type(None))


def widened_copy(tensor: Tensor) -> Tensor:
    """A copy in float64, of counts of steps in their own type."""
    is_wide = tensor.dtype not in HALF and (tensor.dim() == 0 or not tensor.is_floating_point())
    return tensor.to(tensor.dtype if is_wide else WIDE.get(tensor.device.type, torch.float64), copy=True)


@functools.cache
def _of_every_optimizer() -> frozenset[str]:
    """The attributes that any optimizer has."""
    return frozenset({*vars(SGD([torch.zeros(1, device="cpu")])), ATTRIBUTE})


def can_be_copied(optimizer: Optimizer) -> bool:
    """Can copies of weights make a step without touching anything else? Only if all it keeps is numbers and tensors."""
    own = [value for key, value in vars(optimizer).items() if key not in _of_every_optimizer() and not callable(value)]
    settings = [value for group in optimizer.param_groups for key, value in group.items() if key != "params"]
    by_weight = [state if isinstance(state, dict) else {"": state} for state in optimizer.state.values()]
    states = [value for state in by_weight for value in state.values()]
    return (
        all(isinstance(value, _NUMBERS) for value in own)
        and all(isinstance(value, (*_NUMBERS, tuple)) for value in settings)
        and all(isinstance(value, (*_NUMBERS, Tensor)) for value in states)
    )


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to talk to other ranks: what one of them does with copies, another may not do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{func} on copies of weights")
        return func(*args, **(kwargs or {}))


def step_of_copies(
    optimizer: Optimizer,
    group: dict[str, Any],
    weights: Sequence[Tensor],
    copy: Callable[[Tensor], Tensor],
    less: Sequence[Tensor] | None = None,
) -> tuple[Optimizer, list[Tensor]]:
    """What the optimizer's own step makes of copies of some weights, of their state, and of their gradients less some.

    Of a subclass of an optimizer of torch it is the step of that.
    """
    bases = [base for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim.")]
    kind: Any = bases[0] if bases[0] is not Optimizer else type(optimizer)
    copies = [copy(local_tensor(weight)) for weight in weights]
    twin: Optimizer = object.__new__(kind)
    state: Any = defaultdict(dict)
    held = {key: value for key, value in vars(optimizer).items() if not callable(value)}  # methods may be bound to it
    vars(twin).update({**held, "param_groups": [{**group, "params": copies}], "state": state})
    for i, (weight, own) in enumerate(zip(weights, copies, strict=True)):
        own.grad_dtype = None  # since torch 2.10 a gradient may be of another type, if the weight allows it
        own.grad = None if weight.grad is None else copy(local_tensor(weight.grad))
        if own.grad is not None and less is not None:
            own.grad.sub_(local_tensor(less[i]).view_as(own))
        found = optimizer.state.get(weight, {})
        state[own].update({k: copy(local_tensor(v)) if isinstance(v, Tensor) else v for k, v in found.items()})
    # What it draws at random is not drawn twice.
    alone = _Alone()  # type: ignore[no-untyped-call]
    with alone, torch.random.fork_rng([own.device for own in copies if own.is_cuda]):
        inspect.unwrap(kind.step)(twin)  # without the hooks that torch lets anyone add to all optimizers
    return twin, copies
