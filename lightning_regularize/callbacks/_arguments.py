"""What is a callback, apart from any run? Its arguments, its text, its copies, and its key in a checkpoint."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import pickle
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch

from lightning_regularize._checks import named_errors
from lightning_regularize._trainer.names import classes_named
from lightning_regularize.groups import rule_key, rule_name
from lightning_regularize.schedules import Constant, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Described(*classes_named("Callback")):  # type: ignore[misc]
    """A callback that can be printed, copied and pickled by the arguments of its constructor.

    Args:
        arguments: The ``locals()`` of the subclass' constructor.
    """

    arguments: dict[str, Any]
    """The arguments of the constructor, by name."""

    _alive: ClassVar[WeakSet[Described]] = WeakSet()
    _made: ClassVar[Iterator[int]] = itertools.count()

    def __init_subclass__(cls, **options: Any) -> None:
        """What the constructor refuses names the class, since a Trainer has several callbacks."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _naming(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        self._key = ""  # known once there is a Trainer
        self._number = next(Described._made)
        Described._alive.add(self)

    def identity(self) -> dict[str, Any]:
        """The arguments that tell callbacks of one class apart in a checkpoint; a resumed run should have the same."""
        rules = {name: self.arguments[name] for name in ("include", "exclude") if name in self.arguments}
        return {name: [*map(rule_key, value)] for name, value in rules.items()}

    def __repr__(self) -> str:
        signature = _defaults(type(self))
        given = []
        for i, (name, value) in enumerate(self.arguments.items()):
            if i == 0 and signature.get(name, ...) is ...:
                given.append(repr(value))
            elif name not in signature or signature[name] is ... or signature[name] != value:
                given.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    def __copy__(self) -> Any:
        """A copy is of the callback and not of a run."""
        return type(self)(**self.arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(**copy.deepcopy(self.arguments, memo))

    def __reduce__(self) -> Any:
        """As a copy, for spawned processes.

        Raises:
            PicklingError: An argument cannot be pickled.
        """
        for name, value in self.arguments.items():
            if (error := _pickling_error(value)) is not None:
                raise pickle.PicklingError(
                    f"{type(self).__name__}: `{name}` cannot be pickled, which strategies that spawn processes need. "
                    f"Define functions at the top of a module, instead of lambdas, in {value!r}: {error}"
                ) from error
        return _construct, (type(self), self.arguments)

    @property
    def state_key(self) -> str:
        """Class, rules, and, among callbacks that agree in both, the place."""
        return self._key or self._key_at(self._place_among_alive())

    def _key_at(self, place: int) -> str:
        key = self._generate_state_key(**identity) if (identity := self.identity()) else type(self).__qualname__
        return f"{key} {place}" if place > 1 else key

    def _place_among_alive(self) -> int:
        """Before there is a Trainer: among those that never had one, which Lightning compares when it gets them."""
        fresh = [c for c in Described._alive if type(c) is type(self) and not c._key]
        return 1 + sum(c._number < self._number and c.identity() == self.identity() for c in fresh)

    def take_place(self, callbacks: Iterable[Any]) -> None:
        """Learn the place among the callbacks of a Trainer."""
        twins = [c for c in callbacks if type(c) is type(self) and c.identity() == self.identity()]
        place = 1 + next(i for i, twin in enumerate(twins) if twin is self)
        self._key = self._key_at(place)  # which Lightning asks for around each hook

    def argument_texts(self) -> dict[str, str]:
        """The arguments as texts that are the same in every process; without tensors."""
        texts = {name: _text(value) for name, value in self.arguments.items()}
        return {name: text for name, text in texts.items() if text is not None}

    def hyperparameters(self) -> dict[str, Any]:
        """The arguments for loggers: numbers, booleans, strings and None as they are, others as texts; no tensors."""
        values = {name: value.value if isinstance(value, Constant) else value for name, value in self.arguments.items()}
        plain = (bool, int, float, str, type(None))
        texts = self.argument_texts()
        return {name: values[name] if isinstance(values[name], plain) else text for name, text in texts.items()}


def _naming(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor whose errors begin with the name of the class."""

    @functools.wraps(init)
    def named(self: Described, *args: Any, **kwargs: Any) -> None:
        with named_errors(type(self).__name__):
            init(self, *args, **kwargs)

    return named


def _pickling_error(value: Any) -> Exception | None:
    if isinstance(value, Mapping) and any(isinstance(entry, torch.Tensor) for entry in value.values()):
        return None  # a state dict, which is large
    try:
        pickle.dumps(value)
    except Exception as error:  # of many types
        return error
    return None


def _construct(cls: type[Described], arguments: dict[str, Any]) -> Described:
    return cls(**arguments)


def _defaults(cls: type[Described]) -> dict[str, Any]:
    """The default of each argument of a constructor, or ``...``."""
    parameters = list(inspect.signature(cls).parameters.values())
    return {p.name: ... if p.default is inspect.Parameter.empty else p.default for p in parameters}


def _text(value: Any) -> str | None:
    """An argument as a text that is the same in every process; None for tensors."""
    if isinstance(value, Constant):
        value = value.value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(float(value))
    if isinstance(value, (Schedule, str, bool, type(None))):
        return repr(value)
    if isinstance(value, Mapping) and not value:
        return repr(None)  # the same as no argument
    if isinstance(value, Mapping):  # of Python or of Hydra
        entries = [(rule_name(key), _text(entry)) for key, entry in value.items()]
        return None if any(v is None for _, v in entries) else "{" + ", ".join(f"{k!r}: {v}" for k, v in entries) + "}"
    if isinstance(value, (list, tuple)):
        return repr([rule_name(rule) for rule in value])
    if isinstance(value, torch.Tensor) or hasattr(value, "keys"):
        return None
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
