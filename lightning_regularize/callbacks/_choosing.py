"""Which parameters does a callback act on, and can it? What cannot work is told before any weight changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_regularize._stepping import held_parameters
from lightning_regularize.groups import rule_name
from lightning_regularize.selection import matching, parameter_infos

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import lightning.pytorch as pl
    from torch import nn

    from lightning_regularize.selection import ParameterInfo, Rule


def choose(
    root: nn.Module, what: str, *, include: Sequence[Rule], exclude: Sequence[Rule], initialized: bool = True
) -> list[ParameterInfo]:
    """The trainable parameters that rules choose, at least one.

    Args:
        root: The module as the strategy has set it up.
        what: The callback and what it lacks if there is none: "AnchorDecay has nothing to pull".
        include: Rules, of which one has to match.
        exclude: Rules, of which none may match.
        initialized: Whether lazy parameters, whose shape is not known yet, are refused.

    Raises:
        MisconfigurationException: There is none, or a lazy one.
    """
    infos = matching(parameter_infos(root), include=include, exclude=exclude)
    if not infos:
        raise MisconfigurationException(
            f"{what}: no parameter matches include={tuple(map(rule_name, include))} and not "
            f"exclude={tuple(map(rule_name, exclude))}."
        )
    lazy = [info.name for info in infos if is_lazy(info.parameter)]
    if lazy and initialized:
        raise MisconfigurationException(
            f"{what.partition(' ')[0]} needs weights before the first batch, and {lazy} have no shape yet: run a batch "
            "through the model before `trainer.fit`, or leave them out by `exclude`."
        )
    return infos


def tell_idle(trainer: pl.Trainer, infos: Sequence[ParameterInfo], owner: str) -> None:
    """Warn if nothing that was chosen is going to be trained, as far as can be seen before training."""
    held = {id(p) for optimizer in trainer.optimizers for group in held_parameters(optimizer) for p in group}
    if any(info.parameter.requires_grad and id(info.parameter) in held for info in infos):
        return
    frozen = all(not info.parameter.requires_grad for info in infos)
    why = "all parameters that it is for are frozen" if frozen else "no optimizer trains a parameter that it is for"
    rank_zero_warn(f"{owner} has no effect as long as {why}: {[info.name for info in infos[:5]]}.")


def check_real(infos: Iterable[ParameterInfo], owner: str) -> None:
    """Refuse complex weights, which have neither a sign nor an order.

    Raises:
        MisconfigurationException: There is one.
    """
    if found := [info.name for info in infos if info.parameter.is_complex()]:
        raise MisconfigurationException(
            f"{owner} is made for real weights, and {found} are complex: leave them out by `exclude`, or let the "
            "parameter be real and take `torch.view_as_complex` of it."
        )
