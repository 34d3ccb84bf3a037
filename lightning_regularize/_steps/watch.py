"""Which optimizers step for the one that a training loop knows, and how many steps have they attempted?

Some optimizers hold others that change the weights, and may make those anew in mid-run: ZeroRedundancyOptimizer does.
So the inner optimizers are looked up whenever the outer one is about to step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_regularize._checks import is_named
from lightning_regularize._steps.hooks import ATTRIBUTE, Step, UnsupportedOptimizerError, Work, hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Watch:
    """Calls ``work`` around the steps of an optimizer, or of the inner optimizers that step for it.

    Args:
        optimizer: The optimizer that the training loop knows.
        work: What to call.
        index: Place of the optimizer among those of the loop.
        steps: Steps that were attempted so far.
        use_hooks: False where nothing can be hooked, as under DeepSpeed's ZeRO: steps are then announced only.
        position: Returns the number of the present step, if the loop counts for itself.
        order: Place among all that watch the same optimizer; those of one place act in the order in which they came.
    """

    def __init__(
        self,
        optimizer: Any,
        work: Work,
        *,
        index: int = 0,
        steps: int = 0,
        use_hooks: bool = True,
        position: Callable[[], int] | None = None,
        order: float = math.inf,
    ) -> None:
        self.optimizer, self.work, self.index, self.order = optimizer, work, index, order
        self._use_hooks, self._position = use_hooks, position
        self.leaves: list[Optimizer] = []
        """The optimizers that step."""
        self._steps: dict[Optimizer, int] = {}  # of each
        self._announced: set[Optimizer] = set()
        self._start, self._is_pending, self._is_counted = steps, False, False
        self.refresh()

    @property
    def steps(self) -> int:
        """Steps that were attempted so far."""
        if self._position is not None:
            return self._position()
        return max(self._steps.values(), default=self._start)

    @property
    def may_move_weights_later(self) -> bool:
        """Does the optimizer step by others, and may it change weights after them, as Lookahead does?"""
        plain = ("ChainedOptimizer", "ZeroRedundancyOptimizer")
        return self.optimizer not in self.leaves and not is_named(self.optimizer, *plain)

    def number(self, leaf: Optimizer) -> int:
        """The number of the present or next step of one optimizer that steps."""
        return self._steps[leaf] if self._position is None else self._position()

    def holds(self, optimizer: Any) -> bool:
        """Is it the optimizer that the training loop knows, or known to step for that?"""
        return optimizer is self.optimizer or any(optimizer is leaf for leaf in self.leaves)

    def follow(self, optimizer: Any) -> None:
        """``optimizer`` is about to step: look for inner optimizers that were made anew, and may be this one."""
        if optimizer is self.optimizer or not self.holds(optimizer):
            self.refresh()

    def refresh(self) -> None:
        """Look for inner optimizers. One that is new goes on with the count of those before.

        Raises:
            UnsupportedOptimizerError: There is none, and the optimizer only acts as one, so that it has no hooks.
        """
        if self.leaves == [self.optimizer]:  # it steps by itself
            return
        leaves = stepping_optimizers(self.optimizer)
        if not leaves and self._use_hooks:
            raise UnsupportedOptimizerError(
                f"{type(self.optimizer).__name__} is no torch.optim.Optimizer and holds none, so that its steps cannot "
                "be seen: let it inherit from torch.optim.Optimizer."
            )
        if leaves == self.leaves:
            return
        steps = self.steps
        for leaf in self._steps.keys() - set(leaves):
            self._announced.discard(leaf)
            if self._use_hooks:
                hooks_of(leaf).discard(leaf, self)
        for leaf in leaves:
            if leaf not in self._steps and self._use_hooks:
                hooks_of(leaf).add(leaf, self)
        self.leaves, self._steps = leaves, {leaf: self._steps.get(leaf, steps) for leaf in leaves}

    def announce(self, scale: Tensor | None = None) -> None:
        """Gradients are complete before the optimizer's own hooks are called: the loop has yet to clip them."""
        if self._is_pending and not any(hooks_of(leaf).is_stepping for leaf in self._steps if self._use_hooks):
            self.settle()
        if not self._is_pending:
            self._is_pending, self._is_counted = True, False
        if self.optimizer not in self._steps:
            self.refresh()
        for leaf in self.leaves:
            self._announced.add(leaf)
            self.work.on_gradients(self._step(leaf, scale))

    def settle(self) -> None:
        """The loop is done with the step: count it also where a GradScaler has skipped it."""
        is_skipped, self._is_pending = self._is_pending and not self._is_counted, False
        if is_skipped or len(self._steps) > 1:
            self._announced.clear()
            steps = max(self._steps.values(), default=0) + is_skipped
            self._steps = dict.fromkeys(self._steps, steps)

    def remove(self) -> None:
        """Watch no more. What was counted stays."""
        for leaf in self._steps if self._use_hooks else ():
            hooks_of(leaf).discard(leaf, self)

    # -- called by the hooks of one optimizer --------------------------------------------------------------------------

    def gradients_are_complete(self, optimizer: Optimizer) -> None:
        """Unless that was announced."""
        if optimizer in self._announced:
            self._announced.remove(optimizer)
        else:
            self.work.on_gradients(self._step(optimizer, getattr(optimizer, "grad_scale", None)))

    def begins(self, optimizer: Optimizer) -> None:
        """Weights are about to change."""
        self.work.before_step(self._step(optimizer, getattr(optimizer, "grad_scale", None)))

    def has_ended(self, optimizer: Optimizer, *, is_real: bool) -> None:
        """Count the step: the next one is ``number + 1``."""
        step = self._step(optimizer)
        if is_real or self._is_pending:
            self._steps[optimizer] += 1
            self._is_counted = True
        self.work.after_step(step, is_real=is_real)

    def _step(self, optimizer: Optimizer, scale: Tensor | None = None) -> Step:
        return Step(optimizer, self, self.number(optimizer), scale)


def stepping_optimizers(optimizer: Any) -> list[Optimizer]:
    """The optimizers that change weights when ``optimizer`` steps: inner ones, itself if it holds other parameters.

    Raises:
        UnsupportedOptimizerError: The optimizer does not step when its ``step`` is called.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> stepping_optimizers(sgd) == [sgd]
        True
    """
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__}(overlap_with_ddp=True) steps in the hooks of DDP, and not in `step`: use "
            "overlap_with_ddp=False."
        )
    return list(_leaves(optimizer, set()))


def _leaves(optimizer: Any, seen: set[int]) -> Iterator[Optimizer]:
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    leaves = [leaf for inner in _inner_optimizers(optimizer) for leaf in _leaves(inner, seen)]
    yield from leaves
    if not isinstance(optimizer, Optimizer) or (leaves and is_named(optimizer, "ZeroRedundancyOptimizer")):
        return
    held = {id(p) for leaf in leaves for group in leaf.param_groups for p in group["params"]}
    if not leaves or any(id(p) not in held for group in optimizer.param_groups for p in group["params"]):
        yield optimizer


def _inner_optimizers(optimizer: Any) -> Iterator[Any]:
    for name, value in vars(optimizer).items():
        if name not in ("state", "defaults", "param_groups", ATTRIBUTE):
            yield from _optimizers_in(value, depth=2)


def _optimizers_in(value: Any, depth: int) -> Iterator[Any]:
    """The optimizers in a value, also in a list, tuple or dictionary, which may hold such by itself."""
    if isinstance(value, (list, tuple, dict)):
        for each in (value.values() if isinstance(value, dict) else value) if depth else ():
            yield from _optimizers_in(each, depth - 1)
    elif isinstance(value, Optimizer) or _acts_as_one(value):
        yield value


def _acts_as_one(value: Any) -> bool:
    """Has it what Lightning asks of an optimizer, without being one?"""
    return not isinstance(value, (type, Tensor)) and hasattr(value, "param_groups") and hasattr(value, "step")


# What follows optimizers from step to step

_FOLLOWERS: list[ref[Any]] = []  # in the order of callbacks
_global_hook: Any = None


def add_follower(follower: Any) -> None:
    """Call ``follower.follow(optimizer)`` when any optimizer is about to step: it may have been made a moment ago."""
    global _global_hook
    _FOLLOWERS.append(ref(follower))
    if _global_hook is None:
        _global_hook = register_optimizer_step_pre_hook(torch.compiler.disable(_tell_followers))  # type: ignore[no-untyped-call]


def remove_follower(follower: Any) -> None:
    """Call it no more."""
    global _global_hook
    _FOLLOWERS[:] = [each for each in _FOLLOWERS if each() is not None and each() is not follower]
    if not _FOLLOWERS and _global_hook is not None:
        _global_hook.remove()
        _global_hook = None


def _tell_followers(optimizer: Optimizer, *_: Any) -> None:
    for each in _FOLLOWERS:
        follower = each()
        if follower is not None:
            follower.follow(optimizer)
