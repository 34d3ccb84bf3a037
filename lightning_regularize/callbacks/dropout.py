"""How much is dropped, and when?"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import math
import re
import types
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import guard_failures
from torch.nn.modules.dropout import _DropoutNd

from lightning_regularize._checks import named_errors
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._modules import check_module_rules, is_list, matches_module
from lightning_regularize.schedules import Constant, Position, Schedule, as_schedule, check_total_steps, value_at
from lightning_regularize.selection import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import lightning.pytorch as pl

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run

# torch recompiles a compiled model for each value of a rate, at most 8 times by default, and once more for evaluation.
_COMPILED_LEVELS = 4
_SAMPLES = 1000  # positions at which a schedule's range is looked up
# What transformers, timm and their like call a rate that is a plain number: `attention_dropout`, `dropout_p`, `p_drop`,
# `resid_pdrop`, `drop_rate`; but neither `layerdrop` nor `token_drop_rate`, which drop something else.
_RATE_NAME = re.compile(
    r"(\w+_)?(dropout(_p|_prob|_rate|_ratio)?|p_?drop(out)?)|((attn|proj)_)?drop(_p|_prob|_rate)?|drop_path(_rate)?"
)
_UNENDING = (
    "A compiled model is compiled anew for each dropout rate, so that DropoutSchedule has to know them: "
    "give `total_steps`."
)
_NOT_IN_FORWARD = {"__init__", "__repr__", "extra_repr", "reset_parameters", "setup", "configure_model"}


class _Rate(NamedTuple):
    """A number that a module has as an attribute, perhaps of its settings, and drops by, and what it was."""

    name: str
    module: nn.Module
    attribute: str
    original: float

    @property
    def place(self) -> tuple[Any, str]:
        """The object that has the number, and what it calls it: of ``config.dropout`` the module's configuration."""
        *path, name = self.attribute.split(".")
        return functools.reduce(getattr, path, self.module), name

    def write(self, p: float) -> None:
        holder, name = self.place
        setattr(holder, name, p)

    @property
    def path(self) -> str:
        """What the attribute is called from the root of the model."""
        return f"{self.name}.{self.attribute}" if self.name else self.attribute


class DropoutSchedule(Regularizer):
    """Sets the dropout rate of a module's layers on a schedule while it trains.

    The largest rate follows the schedule, and the others keep their ratio to it, as the rates of stochastic depth that
    grow from layer to layer: ``p_t * rate / largest``. With ``same=True``, or where all rates are 0, all get ``p_t``.

    Scheduled are ``p`` of torch's dropout layers and of torchvision's ``StochasticDepth``, ``dropout`` of
    ``MultiheadAttention`` and of recurrent layers with more than one layer, ``drop_prob`` of whatever module has it
    (timm's ``DropPath``), plain numbers with a usual name (``dropout``, ``attention_dropout``, ``dropout_p``,
    ``p_drop``) that the module's own methods read, as attention does in transformers, and the ``attributes`` you name.
    A warning names numbers that are left alone: those with such a name that no method of their module reads, those with
    another name that has "dropout" in it, and those of a module's settings, such as ``config.dropout``.

    The original rates come back when training ends, by an exception too. Modules in evaluation mode drop nothing: a
    warning says if all are. Where ``torch.compile`` compiles the model, or a function that drops, it does so anew for
    each rate, so the schedule's value is then rounded to one of 4 from its lowest to its highest. The largest rate of
    the modules in training mode is logged as ``dropout/p`` whenever Lightning logs, of several schedules as
    ``dropout/p 1`` and so on.

    Args:
        p: A rate in [0, 1), a :class:`~lightning_regularize.schedules.Schedule`, or a callable from a
            :class:`~lightning_regularize.schedules.Position` to a rate. See
            :func:`~lightning_regularize.schedules.early_dropout` and
            :func:`~lightning_regularize.schedules.late_dropout` for ready ones.
        include: Which modules: globs on their names (``"encoder.*"``), ``"type:Dropout"`` for a class or one of its
            bases, or module classes.
        attributes: Names of further attributes that are dropout rates, also of settings: ``"config.dropout"``.
        same: Whether all rates are the same, instead of keeping the ratios that they have when training begins.
        total_steps: Length of the schedule in optimizer steps; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import DropoutSchedule
        >>> from lightning_regularize.schedules import Linear
        >>> trainer = Trainer(callbacks=[DropoutSchedule(Linear(0.5, 0.0))], logger=False, accelerator="cpu")

    References:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.
        Morerio et al., "Curriculum Dropout", ICCV 2017.
        Liu et al., "Dropout Reduces Underfitting", ICML 2023: early and late dropout.
    """

    def __init__(
        self,
        p: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[str | type[nn.Module]] = ("*",),
        attributes: Sequence[str] = (),
        same: bool = False,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals())
        self.schedule = as_schedule(p, name="p")
        if isinstance(self.schedule, Constant):
            _check_rate(self.schedule.value)
        rules = check_module_rules(include)
        if not is_list(attributes) or not all(isinstance(name, str) for name in attributes):
            raise TypeError(f"`attributes` should be a sequence of names, got {attributes!r}.")
        if not isinstance(same, bool):
            raise TypeError(f"`same` should be True or False, got {same!r}.")
        self.include = rules
        self.attributes, self.same = tuple(attributes), same
        self.total_steps = check_total_steps(total_steps)

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        self._levels: list[float] = []
        candidates = list(self._find(run.module))
        self._rates = [rate for rate in candidates if self._is_known(rate)]
        unknown = [rate.path for rate in candidates if not self._is_known(rate) and not self._is_explained(rate)]
        if not self._rates:
            hint = f"{unknown} may be rates: name them in" if unknown else "Name a number that is one in"
            raise MisconfigurationException(
                f"DropoutSchedule: There is nothing to drop: no module that matches `include` {self.include} has a "
                f"dropout rate. {hint} `attributes`, or take DropoutSchedule out."
            )
        self._check_all_found()
        for other in run.trainer.callbacks if run.trainer is not None else ():
            if isinstance(other, DropoutSchedule) and other is not self and other.run is not None:
                self._check_not_shared(other)
        if unknown:
            self.warn(
                f"DropoutSchedule leaves {unknown} alone, which look like dropout rates: they have an unusual name, "
                "belong to a module's settings, or are read by no method of their modules. Name those that are rates "
                "in `attributes`."
            )
        largest = max(rate.original for rate in self._rates)
        self._shares = [1.0 if self.same or not largest else _ratio(rate.original, largest) for rate in self._rates]

    def _check_not_shared(self, other: DropoutSchedule) -> None:
        """Of two schedules for one rate the later would win.

        Raises:
            MisconfigurationException: There are two.
        """
        taken = [rate.place for rate in other._rates]
        if shared := [r.name for r in self._rates if any(r.place[0] is o and r.place[1] == n for o, n in taken)]:
            raise MisconfigurationException(
                f"Two DropoutSchedules have the rates of {shared}: let them `include` different modules."
            )

    def _check_all_found(self) -> None:
        """A misspelled rule or attribute finds nothing.

        Raises:
            MisconfigurationException: There is one.
        """
        idle = [rule for rule in self.include if not any(matches_module(rule, r.name, r.module) for r in self._rates)]
        absent = [attribute for attribute in self.attributes if all(attribute != r.attribute for r in self._rates)]
        if idle or absent:
            what = f"`include` {idle}" if idle else f"`attributes` {absent}"
            found = [rate.path for rate in self._rates]
            raise MisconfigurationException(
                f"DropoutSchedule: No dropout rate is found by {what}; all that is found is {found}."
            )

    def begin(self, run: Run) -> None:
        rates = self._sampled_rates(run.clock.total_steps)
        self._reads_rate = re.compile(rf"\.({'|'.join({rate.attribute for rate in self._rates})}) == ")
        self._range, self._recompilations_before = (min(rates), max(rates)), self._recompilations()
        if _is_compiled(run.module):
            if self._is_unending:
                raise MisconfigurationException(_UNENDING)
            self._round()
        self._set_rates()

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Before the forward pass, so that it drops at the rate of the step it belongs to."""
        super().on_train_batch_start(trainer, pl_module, *args)
        if self.run is not None:
            self._set_rates()

    def on_gradients(self, step: Step) -> None:
        """A function that is compiled cannot be found, but it is compiled anew for a new rate."""
        if self._levels or self._recompilations() == self._recompilations_before:
            return
        if self._is_unending:
            self.warn(_UNENDING)
        else:
            self._round()

    def after_step(self, step: Step, *, is_real: bool) -> None:
        """Outside a Trainer no hook comes before the next forward pass."""
        if self.run.trainer is None:
            self._warn_if_nothing_drops()
            self._set_rates()

    def after_batch(self, trainer: pl.Trainer) -> None:
        """The model's own code may have changed modes until now."""
        self._warn_if_nothing_drops()
        dropping = [getattr(*rate.place) for rate in self._rates if rate.module.training]
        if dropping and self.run.logs_now():
            self.run.log({f"dropout/p{self.number_among(DropoutSchedule)}": max(dropping)})

    def _warn_if_nothing_drops(self) -> None:
        if not any(rate.module.training for rate in self._rates):
            names = [rate.name for rate in self._rates[:5]]
            self.warn(
                f"DropoutSchedule has no effect as long as all its modules are in evaluation mode, such as {names}: "
                "call train() on them, or take DropoutSchedule out."
            )

    def _set_rates(self) -> None:
        p = _check_rate(self.run.value(self.schedule))
        if self._levels:
            p = min(self._levels, key=lambda level: abs(level - p))
        for rate, share in zip(self._rates, self._shares, strict=True):
            rate.write(p * share)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()
        super().on_train_end(trainer, pl_module)

    def end(self, run: Run) -> None:
        self._restore()

    def _restore(self) -> None:
        for rate in getattr(self, "_rates", ()):
            rate.write(rate.original)
        self._rates = []

    def _find(self, root: nn.Module) -> Iterator[_Rate]:
        """All that is a rate, or is called like one."""
        for name, module in root.named_modules():
            name = canonical(name, root)
            if not any(matches_module(rule, name, module) for rule in self.include):
                continue
            usual = dict.fromkeys(a for a in vars(module) if _RATE_NAME.fullmatch(a) or "dropout" in a)
            if isinstance(module, nn.RNNBase):  # a single recurrent layer has none
                usual.pop("dropout", None)
            settings = dict.fromkeys(a for cls in type(module).__mro__ for a in sorted(_settings_read(cls)))
            for attribute in _known_attributes(module) | usual | settings | dict.fromkeys(self.attributes):
                value: Any = module
                for part in attribute.split("."):
                    value = getattr(value, part, None)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    yield _Rate(name, module, attribute, value)

    def _is_known(self, rate: _Rate) -> bool:
        if rate.attribute in _known_attributes(rate.module) or rate.attribute in self.attributes:
            return True
        return bool(_RATE_NAME.fullmatch(rate.attribute)) and 0 <= rate.original < 1 and _is_read(rate)

    def _is_explained(self, rate: _Rate) -> bool:
        """Is it no rate, one that drops nothing, or merely what a layer inside was made with?"""
        inside = set(map(id, rate.module.modules()))
        is_of_layer = any(id(known.module) in inside and known.original == rate.original for known in self._rates)
        return not 0 < rate.original < 1 or (is_of_layer and not _is_read(rate))

    def _sampled_rates(self, total_steps: float) -> list[float]:
        """What the schedule has in store, checked before training; without an end, its first value."""
        last = 0 if math.isinf(total_steps) else max(int(total_steps) - 1, 0)
        steps = [*range(0, last, max(last // _SAMPLES, 1)), last]
        with named_errors("DropoutSchedule"):
            return [_check_rate(value_at(self.schedule, Position(step=s, total_steps=total_steps))) for s in steps]

    @property
    def _is_unending(self) -> bool:
        return math.isinf(self.run.clock.total_steps) and not isinstance(self.schedule, Constant)

    def _recompilations(self) -> int:
        """How often Dynamo has compiled anew since a rate had changed."""
        return sum(bool(self._reads_rate.search(reason)) for reasons in guard_failures.values() for reason in reasons)

    def _round(self) -> None:
        low, high = self._range
        self._levels = [low + (high - low) * i / (_COMPILED_LEVELS - 1) for i in range(_COMPILED_LEVELS)]


def _known_attributes(module: nn.Module) -> dict[str, None]:
    """Names, in order, of the attributes that are dropout rates wherever they stand."""
    names = dict.fromkeys(["drop_prob"])
    if isinstance(module, _DropoutNd) or type(module).__name__ == "StochasticDepth":  # torchvision's
        names |= dict.fromkeys(["p"])
    if isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.RNNBase) and module.num_layers > 1):
        names |= dict.fromkeys(["dropout"])
    return names


def _is_read(rate: _Rate) -> bool:
    """Does a method of the module read it, once it is made?"""
    return any(rate.attribute in _attributes_read(cls) for cls in type(rate.module).__mro__)


@functools.cache
def _attributes_read(cls: type) -> frozenset[str]:
    """The attributes that the methods of a class read of their ``self``, but for methods that prepare a module."""
    return frozenset().union(*(_read_of(code.co_varnames[0], code) for code in _methods(cls)))


@functools.cache
def _settings_read(cls: type) -> frozenset[str]:
    """Numbers such as ``config.dropout`` that methods read which ask, or say, whether the module trains."""
    read: set[str] = set()
    for code in _methods(cls):
        keywords = itertools.chain.from_iterable(names for names in code.co_consts if isinstance(names, tuple))
        if "training" in {*code.co_names, *keywords} and any(map(_RATE_NAME.fullmatch, code.co_names)):
            read |= _read_of(code.co_varnames[0], code)
    return frozenset(name for name in read if "." in name and _RATE_NAME.fullmatch(name.rpartition(".")[2]))


def _methods(cls: type) -> Iterator[types.CodeType]:
    for name, member in vars(cls).items() if cls not in {nn.Module, object} else ():
        function: Any = member.fget if isinstance(member, property) else member
        code = getattr(inspect.unwrap(function), "__code__", None)
        if name not in _NOT_IN_FORWARD and code is not None and code.co_argcount:
            yield code


def _read_of(variable: str, code: types.CodeType) -> set[str]:
    """What is read of a variable: attributes, and attributes of these."""
    read: set[str] = set()
    loaded: Any = None
    path = ""
    for instruction in dis.get_instructions(code):
        is_of_variable = instruction.opname == "LOAD_ATTR" and loaded == variable
        if is_of_variable or (instruction.opname == "LOAD_ATTR" and path):
            path = instruction.argval if is_of_variable else f"{path}.{instruction.argval}"
            read.add(path)
        else:
            path = ""
        loaded = instruction.argval if instruction.opname.startswith("LOAD_") else None
        if isinstance(loaded, tuple) and loaded:  # Python 3.13 and later load two variables at once
            loaded = loaded[-1]
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return read.union(*(_read_of(variable, each) for each in inner))


def _is_compiled(module: nn.Module) -> bool:
    wrapped = getattr(module, "_compiler_ctx", None) is not None  # how Lightning remembers torch.compile(module)
    return wrapped or any(
        isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in module.modules()
    )


def _ratio(rate: float, largest: float) -> float:
    """``rate / largest``; of rates that ``torch.linspace`` has rounded to float32, as before the rounding."""
    ratio = rate / largest
    simple = float(Fraction(ratio).limit_denominator(256))  # such as 3 / 11
    is_rounded = all(torch.tensor(p, dtype=torch.float32, device="cpu").item() == p for p in (rate, largest))
    return simple if is_rounded and math.isclose(ratio, simple, rel_tol=1e-6) else ratio


def _check_rate(p: float) -> float:
    """``p``, if it is a dropout rate.

    Raises:
        ValueError: It is not in [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"DropoutSchedule: A dropout rate should be in [0, 1), got {p!r}.")
    return p
