"""What would a step do to copies of weights, in their own precision and in a wider one?"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_regularize._sharding import local_tensor
from lightning_regularize._steps.buckets import HALF
from lightning_regularize._steps.hooks import ATTRIBUTE
from lightning_regularize._steps.run import KEPT
from lightning_regularize.decay import DROPPED_BITS, round_with
from lightning_regularize.step_sizes import knows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WIDE = {"mps": torch.float32}  # float64 elsewhere, so that a strength is seen that float32 rounds away as well
_SQUARES = ("exp_avg_sq", "square_avg", "sum", "exp_inf")  # in the state of an optimizer; the last has magnitudes
_GOLDEN = round(2**32 * (5**0.5 - 1) / 2) - 2**32  # as an int32, whose products wrap around
_NUMBERS = (int, float, str, type(None))


def widened(entry: Any) -> Any:
    """A copy of a tensor in float64, of counts of steps in their own type; what is no tensor as it is."""
    if not isinstance(entry, Tensor):
        return entry
    is_wide = entry.dtype not in HALF and (entry.dim() == 0 or not entry.is_floating_point())
    return entry.detach().to(entry.dtype if is_wide else WIDE.get(entry.device.type, torch.float64), copy=True)


@functools.cache
def _of_every_optimizer() -> frozenset[str]:
    """The attributes that any optimizer has."""
    return frozenset({*vars(SGD([torch.zeros(1, device="cpu")])), ATTRIBUTE, KEPT})


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


def _kept_share(group: dict[str, Any]) -> Any:
    """What a step keeps of an average of squares; Adagrad adds them up."""
    return group["betas"][1] if "betas" in group else group.get("alpha", 1.0)


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to talk to other ranks: what one of them does with copies, another may not do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{func} on copies of weights")
        return func(*args, **(kwargs or {}))


def _difference(gradient: Tensor, term: Tensor, step: int) -> Tensor:
    """A gradient less a term, right in the mean: to nearest it would be rounded a second time.

    Noise from the golden ratio fills its range evenly, over elements and over steps, and needs no generator.
    """
    if gradient.dtype not in HALF:  # of a weight that allows another dtype
        return gradient - term
    numbers = torch.arange(step, step + gradient.numel(), dtype=torch.int32, device=gradient.device)
    dropped = DROPPED_BITS[gradient.dtype]
    noise = numbers.mul_(_GOLDEN).bitwise_right_shift_(32 - dropped).bitwise_and_((1 << dropped) - 1)
    return round_with(noise.view_as(gradient), gradient.float() - term, gradient.dtype)


class Copies:
    """Copies of some weights and of their state, which make the steps that an optimizer makes.

    Of a subclass of an optimizer of torch these are the steps of that.

    Args:
        optimizer: Whose steps they make. It is not changed.
        weights: What is copied, with their state as it is now.
        copy: Makes the copy of a tensor.

    Raises:
        TypeError: Of an optimizer whose step is not known, if it keeps more than numbers and tensors.
    """

    def __init__(self, optimizer: Optimizer, weights: Sequence[Tensor], copy: Callable[[Tensor], Tensor]) -> None:
        if not (knows(optimizer) or can_be_copied(optimizer)):
            raise TypeError(f"{type(optimizer).__name__} keeps more than numbers and tensors.")
        bases = [base for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim.")]
        self._kind: Any = bases[0] if bases[0] is not Optimizer else type(optimizer)
        self.weights = [copy(local_tensor(weight)) for weight in weights]
        self.optimizer: Optimizer = object.__new__(self._kind)
        state: Any = defaultdict(dict)
        self.optimizer.state = state
        for weight, own in zip(weights, self.weights, strict=True):
            own.grad_dtype = None  # since torch 2.10 a gradient may be of another type, if the weight allows it
            found = optimizer.state.get(weight, {})
            state[own].update({k: copy(local_tensor(v)) if isinstance(v, Tensor) else v for k, v in found.items()})

    def step(self, optimizer: Optimizer, group: dict[str, Any], gradients: Sequence[Tensor | None]) -> None:
        """Make the step that ``optimizer`` begins, with the settings of ``group`` and with other gradients."""
        for own, gradient in zip(self.weights, gradients, strict=True):
            own.grad = gradient
        # Methods may be bound to the optimizer.
        held = {key: value for key, value in vars(optimizer).items() if not callable(value)}
        groups = [{**group, "params": self.weights}]
        vars(self.optimizer).update({**held, "param_groups": groups, "state": self.optimizer.state})
        # What it draws at random is not drawn twice.
        alone = _Alone()  # type: ignore[no-untyped-call]
        with alone, torch.random.fork_rng([own.device for own in self.weights if own.is_cuda]):
            inspect.unwrap(self._kind.step)(self.optimizer)  # without the hooks that torch lets anyone add to all


class Followed:
    """Copies of weights that follow an optimizer, in both precisions, with and without what is measured.

    Args:
        optimizer: What they follow.
        weights: What is copied.
        stands_for: How many steps the found difference stands for.
        kept: Elements of each weight to copy, where the optimizer is known and treats each by itself; else all.
        have_twins: Are there copies without what is measured?
        answers: If not, does what is measured act after the step, so as to answer it?
        squares: Are averages of squared gradients measured, if the optimizer has them?
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Sequence[Tensor],
        stands_for: int,
        kept: int | None,
        *,
        have_twins: bool,
        answers: bool,
        squares: bool,
    ) -> None:
        self._weights, self.stands_for, self._kept = list(weights), stands_for, kept
        self._steps, self._has_squares = 0, squares
        self._half, self._wide = (Copies(optimizer, weights, copy) for copy in (self._cut, self._cut_wide))
        copies = (self._cut, self._cut_wide) if have_twins else ()
        self._twins = [Copies(optimizer, weights, copy) for copy in copies]
        self._answers = answers

    def _cut(self, tensor: Tensor) -> Tensor:
        local = local_tensor(tensor).detach()
        return (local.flatten()[: self._kept] if self._kept and local.dim() else local).clone()

    def _cut_wide(self, tensor: Tensor) -> Tensor:
        local: Tensor = widened(self._cut(tensor))
        return local

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        return len(weights) == len(self._weights) and all(map(operator.is_, weights, self._weights))

    def step(
        self, optimizer: Optimizer, group: dict[str, Any], terms: Sequence[Tensor] | None, without: dict[str, Any]
    ) -> None:
        """Make the step that begins, where ``terms`` are in the gradients or ``without`` is the group without them."""
        gradients = [self._cut(weight.grad) for weight in self._weights if weight.grad is not None]
        if self._twins:
            less = [[gradient.clone() for gradient in gradients], list(map(widened, gradients))]
            scale = getattr(optimizer, "grad_scale", None)
            for i, term in enumerate(terms or ()):
                own = self._cut(term).view_as(gradients[i])
                own = own if scale is None else own * scale
                less[0][i], less[1][i] = _difference(less[0][i], own, self._steps), less[1][i] - own
            for twin, those in zip(self._twins, less, strict=True):
                twin.step(optimizer, without, those)
        if not self._steps:
            self._start_squares = self._squares(self._wide)
        self._half.step(optimizer, group, gradients)
        self._wide.step(optimizer, group, list(map(widened, gradients)))
        self._group, self._steps = group, self._steps + 1

    def _squares(self, copies: Copies) -> list[Tensor]:
        """The averages of squared gradients by whose roots an optimizer divides; 0 before there are any."""
        found = []
        for weight in copies.weights if self._has_squares else ():
            state = copies.optimizer.state[weight]
            square = next((state[name] for name in _SQUARES if name in state), torch.zeros_like(weight))
            found.append(square.to(self._wide.weights[0].dtype, copy=True))
        return found

    def found(self) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
        """Where something is lost, how far copies should have gone for what is measured, and how far off they are."""
        halves, wides = list(map(widened, self._half.weights)), self._wide.weights
        if self._twins:
            without, wide_without = self._twins
            asked = [w - o for w, o in zip(wides, wide_without.weights, strict=True)]
            yield "step", asked, [h - o - a for h, o, a in zip(halves, without.weights, asked, strict=True)]
        elif self._answers:  # what a step has lost is missing in the answer, which the copies do not have
            asked = [self._cut_wide(weight) - half for weight, half in zip(self._weights, halves, strict=True)]
            yield "step", asked, [w - h for w, h in zip(wides, halves, strict=True)]
        # These copies begin with averages that are rounded, so that what a step makes of these does not show it. A
        # share of what comes in that is lost in each step is missing in the end, and makes steps longer by half of it.
        wide = self._squares(self._wide)
        kept, eps = _kept_share(self._group) ** self._steps, self._group.get("eps")
        came_in = [square - kept * start for square, start in zip(wide, self._start_squares, strict=True)]
        lost = [square - half for square, half in zip(wide, self._squares(self._half), strict=True)]
        eps = max(eps, 1e-30) if isinstance(eps, float) else 1e-30  # beside a large one they do not matter
        matters = [root / (root + eps) for root in [square.sqrt() for square in wide]]
        if wide:
            yield "square", came_in, [each * share / 2 for each, share in zip(lost, matters, strict=True)]
