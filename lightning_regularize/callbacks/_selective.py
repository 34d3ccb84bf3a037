"""Which parameters is a callback for, and can it act on them?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from lightning_regularize._checks import is_named, named_errors
from lightning_regularize._steps.watch import stepping_optimizers
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.strategies import held_parameters
from lightning_regularize.callbacks._arguments import Described
from lightning_regularize.groups import rule_name
from lightning_regularize.selection import check_rules, is_selected, matching, tensor_name
from lightning_regularize.units import norm_dims, units_are_known

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from lightning_regularize._steps.run import Run
    from lightning_regularize.selection import ParameterInfo


class Selective(Described):
    """A callback with rules for what it is for.

    Args:
        arguments: The ``locals()`` of the subclass' constructor.
    """

    include: tuple[Any, ...]
    """Rules for what the callback is for, one of which has to match."""

    exclude: tuple[Any, ...]
    """Rules for what it leaves alone, none of which may match."""

    run: Any
    """The run that the callback takes part in, or None."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        if {"include", "exclude"} <= self.arguments.keys():
            self.include = check_rules(self.arguments["include"], argument="include")
            self.exclude = check_rules(self.arguments["exclude"], argument="exclude")
        self._warned: set[str] = set()

    def warn(self, message: str) -> None:
        """Warn once a run."""
        if message not in self._warned:
            self._warned.add(message)
            self.run.warn(message)

    def selects(self, info: ParameterInfo) -> bool:
        """Do ``include`` and ``exclude`` select a parameter?"""
        return is_selected(info, include=self.include, exclude=self.exclude)

    def select(self, run: Run, what: str, *, initialized: bool = True) -> list[ParameterInfo]:
        """The parameters that ``include`` and ``exclude`` select, at least one.

        Args:
            run: The run.
            what: For the message if nothing is selected, such as "nothing to pull".
            initialized: Whether lazy parameters, whose shape is not known yet, are refused.

        Raises:
            MisconfigurationException: Nothing is selected, or a lazy parameter.
            ValueError: A rule matches nothing.
        """
        name = type(self).__name__
        with named_errors(name):
            infos = matching(run.infos(), include=self.include, exclude=self.exclude)
        if not infos:
            raise MisconfigurationException(
                f"{name} has {what}: no parameter matches include={tuple(map(rule_name, self.include))} and not "
                f"exclude={tuple(map(rule_name, self.exclude))}."
            )
        lazy = [info.name for info in infos if is_lazy(info.parameter)]
        if lazy and initialized:
            raise MisconfigurationException(
                f"{name} needs weights before the first batch, and {lazy} have no shape yet: run a batch "
                "through the model before `trainer.fit`, or leave them out by `exclude`."
            )
        return infos

    def warn_if_no_effect(self, run: Run, infos: Sequence[ParameterInfo]) -> None:
        """Warn if no optimizer trains any of ``infos``, as far as can be seen before training."""
        held = held_by_optimizers(run)
        if any(info.parameter.requires_grad and id(info.parameter) in held for info in infos):
            return
        frozen = all(not info.parameter.requires_grad for info in infos)
        why = "all parameters that it is for are frozen" if frozen else "no optimizer trains a parameter that it is for"
        self.warn(f"{type(self).__name__} has no effect as long as {why}: {[info.name for info in infos[:5]]}.")

    def warn_if_moved_later(self, run: Run, consequence: str, *, is_followed: bool = False) -> None:
        """Warn of optimizers that move weights once more, after the step that a callback sees.

        Args:
            run: The run.
            consequence: What this means: "zeros do not last".
            is_followed: Does the callback act again after an optimizer that steps by another one?
        """
        for optimizer in run.optimizers:
            if is_named(optimizer, "Lookahead", "TRAC") and not is_followed:
                self.warn(
                    f"{type(self).__name__}: {type(optimizer).__name__} moves weights after each step of the optimizer "
                    f"in it, so that {consequence}. Use the optimizer in it by itself."
                )
            for each in (optimizer, *stepping_optimizers(optimizer)):
                # Schedule-free optimizers evaluate at averages, and put these in place of the weights. That of
                # accelerate has the two methods whatever it holds.
                has_both = callable(getattr(each, "eval", None)) and callable(getattr(each, "train", None))
                if has_both and not is_named(each, "AcceleratedOptimizer"):
                    self.warn(
                        f"{type(self).__name__}: {type(each).__name__} has other weights for evaluation, which its "
                        f"`eval()` puts in place, so that {consequence}. Use an optimizer without `eval()`."
                    )

    def units(
        self, info: ParameterInfo, dim: int | Sequence[int] | None, argument: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What :func:`~lightning_regularize.units.norm_dims` returns; warns once for each class where it is a guess.

        Args:
            info: A parameter.
            dim: What the user asks for.
            argument: How the user would write it: "UnitNorm(..., dim=...)".

        Raises:
            ValueError: The parameter lacks ``dim``; or it is not given and cannot be told.
        """
        view, dims = norm_dims(info.owner, tensor_name(info.name), info.shape, dim=dim)
        if dim is None:
            self.warn_if_guessed(info, argument)
        return view, dims

    def warn_if_guessed(self, info: ParameterInfo, argument: str) -> None:
        """Warn once for each class that does not say what its units are.

        Args:
            info: A parameter.
            argument: As for :meth:`units`.
        """
        if not units_are_known(info.owner, info.shape):
            kind = type(info.owner).__name__
            self.warn(
                f"{type(self).__name__} takes dim 0 of weights for the output units of {kind}, and {kind} does not say "
                f"what they are. If they are in another dim, say by `{argument}` which dims hold the incoming weights."
            )

    def check_real(self, info: ParameterInfo, owner: str = "") -> None:
        """Refuse a complex weight, which has neither a sign nor an order.

        Raises:
            MisconfigurationException: It is one.
        """
        if info.parameter.is_complex():
            raise MisconfigurationException(
                f"{owner or type(self).__name__} is made for real weights, and {[info.name]} are complex: leave them "
                "out by `exclude`, or let the parameter be real and take `torch.view_as_complex` of it."
            )


def held_by_optimizers(run: Run) -> set[int]:
    """Identities of the module's parameters that optimizers hold, or others that step for them."""
    optimizers = [each for optimizer in run.optimizers for each in (optimizer, *stepping_optimizers(optimizer))]
    return {id(p) for optimizer in optimizers for group in held_parameters(optimizer) for p in group}


def check_holds(module: nn.Module, run: Run) -> None:
    """Refuse a module that does not belong to the optimizer: rules could not find what they name.

    Raises:
        ValueError: It holds none of the parameters.
    """
    if held_by_optimizers(run).isdisjoint(id(info.parameter) for info in run.infos()):
        raise ValueError(
            f"`module` holds none of the parameters that {type(run.optimizers[0]).__name__} steps, got "
            f"{type(module).__name__}: give the module whose parameters the optimizer was made with."
        )
