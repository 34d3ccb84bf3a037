"""What does a regularizer know of the run that it takes part in? Optimizers, the module, and where training stands."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_regularize._checks import is_named
from lightning_regularize._sharding import Sharding, reshard
from lightning_regularize._steps.watch import Watch, add_follower, remove_follower
from lightning_regularize.selection import ParameterInfo, parameter_infos

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from lightning_regularize._steps.clock import Clock
    from lightning_regularize._steps.hooks import Work
    from lightning_regularize.schedules import ScheduleLike


KEPT = "_regularizers"
"""The attribute of an optimizer that keeps what acts on its steps."""


class Run(ABC):
    """A run of training with one regularizer.

    Args:
        module: The module that is trained.
        clock: Where training stands.
    """

    trainer: Any = None
    """The Trainer, if there is one."""

    def __init__(self, module: nn.Module, clock: Clock) -> None:
        self.module, self.clock = module, clock
        clock.warn_of_peak = self.warn
        self.watches: list[Watch] = []
        self.has_begun = self.is_over = False
        self._instead: list[Any] | None = None

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers as they are now, each as the training loop, or what replaces it here, knows it."""
        return self._now() if self._instead is None else self._instead

    @optimizers.setter
    def optimizers(self, instead: list[Any]) -> None:
        self._instead = instead

    @abstractmethod
    def _now(self) -> list[Any]:
        """The optimizers that the training loop has now."""

    @abstractmethod
    def start(self, saved: Sequence[int] | None) -> None:
        """Watch all optimizers; everything is restored.

        Args:
            saved: Steps that each optimizer had attempted, from a checkpoint or the end of the run before this one.
        """

    @property
    def root(self) -> nn.Module:
        """The module as it is wrapped for training."""
        return self.module

    def value(self, schedule: ScheduleLike) -> float:
        """The present value of a schedule for what belongs to no optimizer: at the optimizer that made fewest steps."""
        step = min((watch.steps for watch in self.watches), default=0)
        nothing: dict[str, Any] = {"params": []}
        group = next((group for watch in self.watches for group in watch.optimizer.param_groups), nothing)
        return self.clock.value(schedule, group, step)

    def infos(self) -> list[ParameterInfo]:
        """All parameters of the module as they are now, each as an optimizer holds it."""
        # After a forward pass without a backward pass FSDP2 shows other tensors.
        reshard(self.root)
        return parameter_infos(self.root)

    def sharding(self) -> Sharding:
        """How the parameters are spread over ranks."""
        return Sharding(self.root)

    def from_who_steps(self, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that belong to parameters, as the rank has them that steps the parameter; all ranks take part.

        Under ZeroRedundancyOptimizer each parameter is stepped by one rank, elsewhere by all alike.
        """
        if not states or not any(is_named(watch.optimizer, "ZeroRedundancyOptimizer") for watch in self.watches):
            return list(states)
        leaves = [leaf for watch in self.watches for leaf in watch.leaves]
        own = {id(p) for leaf in leaves for group in leaf.param_groups for p in group["params"]}
        mine = [s if id(p) in own else torch.full_like(s, -math.inf) for s, p in zip(states, parameters, strict=True)]
        found = torch.cat([each.flatten().double() for each in mine])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        pieces = torch.split(found, [state.numel() for state in states])
        shared = [piece.view_as(state).to(state) for piece, state in zip(pieces, states, strict=True)]
        return [state.where(each == -math.inf, each) for state, each in zip(states, shared, strict=True)]

    def label(self, watch: Watch) -> str:
        """The prefix of the logged keys of one optimizer among several; empty if there is one."""
        return f"optimizer{watch.index}" if len(self.watches) > 1 else ""

    def logs_now(self) -> bool:
        """Are values of this step logged?"""
        return False

    def log(self, values: Mapping[str, Any]) -> None:  # noqa: B027
        """Log values of this step, numbers or 0-d tensors by key; by default they go nowhere."""

    def largest(self, value: float) -> float:
        """The largest of what all ranks give."""
        if not (dist.is_available() and dist.is_initialized()):
            return value
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        found = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def warn(self, message: str) -> None:
        """Warn on one rank."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            warnings.warn(message, stacklevel=4)

    @property
    def steps(self) -> list[int]:
        """Steps that each optimizer has attempted."""
        return [watch.steps for watch in self.watches]

    def stop(self) -> None:
        """Watch no more. What was counted stays."""
        self.is_over = True
        for watch in self.watches:
            watch.remove()


class _Kept(list[Watch]):
    """What an optimizer keeps alive. Its copies and pickles keep nothing."""

    def __reduce__(self) -> Any:
        return _Kept, ()


class LoopRun(Run):
    """A run in somebody's own loop, of one optimizer.

    Args:
        optimizer: The optimizer that the loop knows.
        module: The module that is trained.
        clock: Where training stands.
        work: What to call around steps.
        position: Returns the number of the present step; None to count real steps.
    """

    def __init__(
        self, optimizer: Any, module: nn.Module, clock: Clock, work: Work, position: Callable[[], int] | None = None
    ) -> None:
        super().__init__(module, clock)
        self._optimizer, self._work, self._position = optimizer, work, position

    def _now(self) -> list[Any]:
        return [self._optimizer]

    def start(self, saved: Sequence[int] | None) -> None:
        """Watch the optimizer from its next step on."""
        watch = Watch(self._optimizer, self._work, steps=next(iter(saved or ()), 0), position=self._position)
        self.watches = [watch]
        add_follower(watch)
        # Nobody else may keep it: the inner optimizers, which hold their hooks, may be made anew.
        vars(self._optimizer).setdefault(KEPT, _Kept()).append(watch)

    def stop(self) -> None:
        """Watch no more."""
        for watch in self.watches:
            remove_follower(watch)
            if kept := [each for each in vars(self._optimizer).pop(KEPT, ()) if each is not watch]:
                vars(self._optimizer)[KEPT] = _Kept(kept)
        super().stop()


class Attachment:
    """A regularizer that acts on the steps of an optimizer, until :meth:`remove`.

    Args:
        end: What to do then.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def remove(self) -> None:
        """Act no more, and put back what was changed of the optimizer's settings. A second call does nothing."""
        self._end()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
