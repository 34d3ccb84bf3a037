"""What is there to act on now? Parameters that an optimizer holds, and what was learned about each at first sight.

Users replace optimizers, replace parameters, append some and freeze others while a run goes on. So the identities of
what the groups hold are compared at each step; the module tree is walked only where they differ.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from lightning_regularize.selection import ParameterInfo

T = TypeVar("T")


class _DifferentError(Exception):
    """Two tensors are not the same object."""


class _Identities(TorchFunctionMode):
    """In which tensors are equal only to themselves.

    Lists that are compared ask an item only where it is not the very item of the other list, and do not touch it
    otherwise: for 300 parameters, which are in no cache then, that takes a third of the time of comparing one by one.
    """

    def __torch_function__(self, *_: Any, **__: Any) -> Any:
        raise _DifferentError


_IDENTITIES = _Identities()


class Held:
    """What the groups of one optimizer hold. References are kept, so that no identity is used twice."""

    def __init__(self) -> None:
        self.version = 0
        self._lists: list[list[Tensor]] = []
        self._lazy: list[Tensor] = []  # whose shape is not known yet
        self._is_frozen = self._has_looked = False

    def look(self, groups: Sequence[dict[str, Any]]) -> int:
        """The number of times that the groups were seen to hold something else, or a lazy parameter to have a shape."""
        if not (self._is_frozen and self._has_looked):
            self._has_looked = True
            if not self._is_same(groups) or not all(map(is_lazy, self._lazy)):
                self._lists = [copy.copy(group["params"]) for group in groups]
                self._lazy = [p for params in self._lists for p in params if is_lazy(p)]
                self.version += 1
        return self.version

    def _is_same(self, groups: Sequence[dict[str, Any]]) -> bool:
        try:
            with _IDENTITIES:
                return [group["params"] for group in groups] == self._lists
        except _DifferentError:
            return False

    def freeze(self) -> None:
        """Look once more at most, until :meth:`thaw`: within a step nothing changes."""
        self._is_frozen, self._has_looked = True, False

    def thaw(self) -> None:
        """Look again."""
        self._is_frozen = False


_HELD: WeakKeyDictionary[Any, Held] = WeakKeyDictionary()


def held_by(optimizer: Any) -> Held:
    """The record for ``optimizer``, made when it is first asked for."""
    if optimizer not in _HELD:
        _HELD[optimizer] = Held()
    return _HELD[optimizer]


class Targets(Generic[T]):
    """What a callback acts on, by optimizer and group, as it is now.

    Args:
        look: What the module holds now; asked again only when an optimizer holds something else than before.
        learn: What there is to know about a parameter, or None if the callback leaves it alone; asked once for each.
            An error that it raises about a frozen parameter is raised when that is trained.
        move: Likewise for a known one that is in another place of the module now; by default it is learned anew.
        learn_foreign: Likewise for a parameter of an optimizer that the module does not hold.
        arrange: What is made of the targets of a group, until that holds something else; by default they are listed.
    """

    def __init__(
        self,
        look: Callable[[], Sequence[ParameterInfo]],
        learn: Callable[[ParameterInfo], T | None],
        learn_foreign: Callable[[nn.Parameter], T | None] | None = None,
        *,
        move: Callable[[ParameterInfo, T], T | None] | None = None,
        arrange: Callable[[list[T]], Any] = list,
    ) -> None:
        self._look, self._learn, self._learn_foreign, self._move = look, learn, learn_foreign, move
        self._arrange = arrange
        self._known: dict[int, tuple[ParameterInfo, T | None]] = {}
        self._of: WeakKeyDictionary[Any, tuple[int, list[Any]]] = WeakKeyDictionary()
        self._not_learned: list[Tensor] = []  # frozen parameters about which there was an error
        self.refresh()

    def of(self, optimizer: Any) -> list[Any]:
        """For each group of ``optimizer``, whose groups should be the user's, the targets among what it holds."""
        version = held_by(optimizer).look(optimizer.param_groups)
        if any(parameter.requires_grad for parameter in self._not_learned):
            self.refresh()
        known = self._of.get(optimizer)
        if known is None or known[0] != version:
            held = [group["params"] for group in optimizer.param_groups]
            if any(self._is_new(p) for params in held for p in params):
                self.refresh()
            found = [[t for t in map(self.find, params) if t is not None] for params in held]
            known = version, list(map(self._arrange, found))
            self._of[optimizer] = known
        return known[1]

    def _is_new(self, parameter: Tensor) -> bool:
        """Is it another one, or was it lazy when it was looked at?"""
        info, _ = self._known.get(id(parameter), (None, None))
        return info is None or (info.shape == (0,) and not is_lazy(parameter) and parameter.numel() > 0)

    def __iter__(self) -> Iterator[T]:
        """All targets in the module, in registration order."""
        return (target for _, target in self._known.values() if target is not None)

    def refresh(self) -> None:
        """Walk the module: learn what is new, and forget what is gone."""
        for parameter in self._not_learned:
            self._known.pop(id(parameter), None)
        self._not_learned = []
        self._known = {id(info.parameter): (info, self._learned(info)) for info in self._look()}
        self._of.clear()

    def _learned(self, info: ParameterInfo) -> T | None:
        before, target = self._known.get(id(info.parameter), (None, None))
        if before is not None and (before.name, before.owner, before.shape) == (info.name, info.owner, info.shape):
            return target
        try:
            if target is not None and self._move is not None:
                return self._move(info, target)
            return self._learn(info)
        except Exception:
            if info.parameter.requires_grad:
                raise
            self._not_learned.append(info.parameter)
            return None

    def forget(self, parameter: Tensor) -> None:
        """Learn ``parameter`` anew when it is next seen."""
        self._known.pop(id(parameter), None)
        self._of.clear()

    def find(self, parameter: nn.Parameter) -> T | None:
        """The target for one parameter."""
        if id(parameter) in self._known:
            return self._known[id(parameter)][1]
        return None if self._learn_foreign is None else self._learn_foreign(parameter)
