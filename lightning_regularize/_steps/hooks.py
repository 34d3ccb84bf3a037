"""When do weights really change? Calls around each step of an optimizer, in any training loop.

A torch step pre-hook may return other arguments, so it can wrap the closure. Gradients are complete when the closure
returns, or, without a closure, when the pre-hook runs. Facts that shape this file (torch 2.13):

* A class whose ``step`` calls ``super().step()`` fires its hooks once for each level. A shadow of ``optimizer.step`` on
  the instance knows the outermost call; its ``finally`` clause cleans up where an exception skips the post-hooks.
* ``torch.compile`` traces hooks, and would lose what they write to the optimizer. They are hidden from it.
* An unfused optimizer is not called at all for a step that a GradScaler skips. A fused one is, with ``found_inf`` set.
* ``torch.optim.LBFGS`` moves weights between evaluations of its closure, so that nothing may change them meanwhile.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_regularize._steps.targets import held_by

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from torch import Tensor

    from lightning_regularize._steps.parts import Parts
    from lightning_regularize._steps.watch import Watch


class Step(NamedTuple):
    """One step of one optimizer.

    Args:
        optimizer: The optimizer that changes the weights; its groups are the user's.
        watch: What led here.
        number: Steps that were attempted before this one.
        scale: What the gradients are multiplied by; None for 1.
    """

    optimizer: Optimizer
    watch: Watch
    number: int
    scale: Tensor | None = None


class UnsupportedOptimizerError(RuntimeError):
    """An optimizer, or the way in which it is used, cannot work with a regularizer."""


class Work:
    """What is done around steps, by default nothing. Each method may be called for several optimizers."""

    error: type[Exception] = UnsupportedOptimizerError
    """What is raised for an optimizer that cannot work."""

    def on_gradients(self, step: Step) -> None:
        """Gradients are complete; called for each evaluation of a closure."""

    def before_step(self, step: Step) -> None:
        """Weights are about to change; called once a step, and not for a step that a GradScaler skips."""

    def after_step(self, step: Step, *, is_real: bool) -> None:
        """The optimizer has returned. ``is_real`` is False for a fused step that a GradScaler skipped."""


class StepHooks:
    """The hooks of one optimizer that steps, shared by all that watch it."""

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self._watches: list[Watch] = []
        self._handles: list[Any] = []
        self._in_shadow = False
        self._shadow: Any = None
        self._step_before: Any = None
        self._evaluate = torch.compiler.disable(self._evaluate_closure, recursive=False)  # type: ignore[no-untyped-call]
        self._reset()

    def _reset(self) -> None:
        self.is_stepping = self._has_begun = self._is_skipped = self._is_loading = False
        self._closure: Callable[..., Any] | None = None
        self._optimizer: Optimizer | None = None
        self._depth = 0  # calls of `step` that run inside each other
        self._frame: FrameType | None = None  # of the outermost one, if it goes past the shadow

    @property
    def works(self) -> list[Work]:
        """What acts on the steps, in its order."""
        return [watch.work for watch in self._watches]

    def add(self, optimizer: Optimizer, watch: Watch) -> None:
        """Call ``watch`` from the next step of ``optimizer`` on."""
        if not self._watches:
            self._register(optimizer)
        self._watches.append(watch)
        self._watches.sort(key=lambda each: each.order)

    def discard(self, optimizer: Optimizer, watch: Watch) -> None:
        """Call ``watch`` no more. The last one leaves nothing behind, unless somebody has wrapped ``step`` since."""
        if watch in self._watches:
            self._watches.remove(watch)
        if self._watches:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._shadow is not None and vars(optimizer).get("step") is self._shadow:
            del optimizer.step
            if self._step_before is not None:
                optimizer.step = self._step_before  # type: ignore[method-assign]
            self._shadow = None
        if self._shadow is None:
            vars(optimizer).pop(ATTRIBUTE, None)

    def _register(self, optimizer: Optimizer) -> None:
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} does not call `Optimizer.__init__` and holds no optimizer that does, so "
                "that its steps cannot be seen: let its constructor call `super().__init__`."
            )
        self._held = held_by(optimizer)
        pre = optimizer.register_step_pre_hook(torch.compiler.disable(self._enter))  # type: ignore[no-untyped-call]
        post = optimizer.register_step_post_hook(torch.compiler.disable(self._leave))  # type: ignore[no-untyped-call]
        # Hooks of others see the user's groups: ours is the last before the step and the first after it. Both are
        # ordered dictionaries.
        optimizer._optimizer_step_post_hooks.move_to_end(post.id, last=False)  # type: ignore[attr-defined]
        self._handles = [pre, post]
        if self._shadow is None:
            self._step_before = vars(optimizer).get("step")
            self._shadow = optimizer.step = _shadow_of(optimizer.step, optimizer, self)  # type: ignore[method-assign]

    def run(self, optimizer: Optimizer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``step``, the optimizer's own, and clean up however it ends.

        Raises:
            UnsupportedOptimizerError: The optimizer looks something up by the number of a part, as if it were a group.
            LookupError: The optimizer's own, as are the others.
            ValueError: Likewise.
            AttributeError: Likewise.
        """
        if not self._handles or self._in_shadow:
            return step(*args, **kwargs)
        pre, _ = self._handles
        if next(reversed(optimizer._optimizer_step_pre_hooks)) != pre.id:
            optimizer._optimizer_step_pre_hooks.move_to_end(pre.id)  # type: ignore[attr-defined]
        self._clean_up(optimizer)
        self._in_shadow = self.is_stepping = True
        try:
            return step(*args, **kwargs)
        except (LookupError, ValueError, AttributeError) as error:  # of a list, zip, setattr
            users = None if self.parts is None else self.parts.users
            if users is None or len(users[0]) == len(optimizer.param_groups):
                raise
            raise self._watches[0].work.error(
                f"{type(optimizer).__name__} failed while its groups were shown in parts: {error}. If it keeps a list "
                "with one entry for each group, use WeightDecay(..., method='decoupled'), which needs no parts."
            ) from error
        finally:
            self._in_shadow = False
            self._clean_up(optimizer)

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._in_shadow:
            frame = _step_frame()
            if not _is_inside(frame, self._frame):  # the outermost call, or the first after one that an exception ended
                self._clean_up(optimizer)
                self._frame = frame
        self._depth += 1
        if self._depth > 1:  # `super().step()`
            return None
        self.is_stepping = True
        key, closure = _find_closure(optimizer, args, kwargs)
        if closure is None:
            self._begin(optimizer)
            self._show_parts(optimizer)
            return None
        if isinstance(optimizer, LBFGS):
            self._begin(optimizer, gradients=False)
        self._closure, self._optimizer = closure, optimizer
        if isinstance(key, int):
            return (*args[:key], self._evaluate, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: self._evaluate}

    def _evaluate_closure(self, *args: Any, **kwargs: Any) -> Any:
        closure, optimizer = self._closure, self._optimizer
        if closure is None or optimizer is None:
            raise RuntimeError("The closure of an optimizer was called after the optimizer's step had ended.")
        self._hide_parts(optimizer)
        loss = closure(*args, **kwargs)
        self._begin(optimizer)
        self._show_parts(optimizer)
        return loss

    def _begin(self, optimizer: Optimizer, *, gradients: bool = True) -> None:
        is_first = not self._has_begun
        if is_first:
            self._has_begun = True
            self._is_loading = _is_loading_step(optimizer)
            self._is_skipped = is_skipped(optimizer)
            self._held.freeze()
            if self.parts is not None:  # which are soon shown in place of the groups
                self._held.look(optimizer.param_groups)
        if self._is_loading or self._is_skipped:
            return
        watches = list(self._watches)
        for watch in watches if gradients else ():
            watch.gradients_are_complete(optimizer)
        for watch in watches if is_first else ():
            watch.begins(optimizer)

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._hide_parts(optimizer)
        try:
            for watch in () if self._is_loading else list(self._watches):
                watch.has_ended(optimizer, is_real=not self._is_skipped)
        finally:
            if not self._in_shadow:  # which cleans up itself
                self._clean_up(optimizer)
        if self.parts is not None and self.parts.were_ignored():
            raise self._watches[0].work.error(
                f"{type(optimizer).__name__} does not read its parameter groups, or not all of them, in its step after "
                "its closure has returned, so that excluded weights have decayed as well, or were left alone: use "
                "WeightDecay(..., method='decoupled'), which decays by itself."
            )

    def _show_parts(self, optimizer: Optimizer) -> None:
        if self.parts is not None and not self._is_loading and not self._is_skipped:
            self.parts.show(optimizer)

    def _hide_parts(self, optimizer: Optimizer) -> None:
        if self.parts is not None:
            self.parts.hide(optimizer)

    def _clean_up(self, optimizer: Optimizer) -> None:
        if self.is_stepping or self._depth:
            self._hide_parts(optimizer)
            self._held.thaw()
            self._reset()


def _step_frame() -> FrameType | None:
    """The call of torch's that runs the hooks of a step, and the step."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != _TORCH_FILE:
        frame = frame.f_back
    return frame


def _is_inside(frame: FrameType | None, outer: FrameType | None) -> bool:
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is not None


def _shadow_of(step: Callable[..., Any], optimizer: Optimizer, hooks: StepHooks) -> Any:
    """What stands in place of ``optimizer.step`` on the instance. LR schedulers, which wrap it, need a method."""

    @functools.wraps(getattr(step, "__func__", step))
    def shadow(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return hooks.run(self, step, *args, **kwargs)

    return types.MethodType(torch.compiler.disable(shadow, recursive=False), optimizer)  # type: ignore[no-untyped-call]


def _find_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int | str, Callable[..., Any] | None]:
    """The closure and its place: what is called so, or else the first callable that is not a module."""
    if callable(kwargs.get("closure")):
        return "closure", kwargs["closure"]
    kind: Any = type(optimizer)
    place = _closure_place(kind)
    if place is not None and place < len(args) and callable(args[place]):
        return place, args[place]
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    others = ((key, value) for key, value in given[1:] if callable(value) and not isinstance(value, nn.Module))
    return next(others, ("", None)) if place is None else ("", None)


@functools.cache
def _closure_place(kind: Any) -> int | None:
    names = list(inspect.signature(kind.step).parameters)
    return names.index("closure") if "closure" in names else None


def is_skipped(optimizer: Optimizer) -> bool:
    """Does a GradScaler let a fused optimizer skip this step? Reading it waits for the device, as GradScaler does."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _is_loading_step(optimizer: Optimizer) -> bool:
    """``torch.distributed.checkpoint`` makes one step with rate 0 and zero gradients to learn what state there is."""
    if optimizer.state or any(float(group.get("lr") or 0.0) for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(gradient.any() for gradient in gradients)


_TORCH_FILE = inspect.getfile(Optimizer)

ATTRIBUTE = "_regularizer"
"""Where an optimizer keeps its hooks, so that both live equally long. Copies and pickles do not have it."""


def hooks_of(optimizer: Any) -> StepHooks:
    """The hooks of ``optimizer``, made when they are first asked for."""
    hooks = vars(optimizer).get(ATTRIBUTE)
    if hooks is None:
        hooks = StepHooks()
        setattr(optimizer, ATTRIBUTE, hooks)
    return hooks  # type: ignore[no-any-return]
