"""Which parameters decay in a step, and how strongly? A list that is made anew only when the answer changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_regularize.decay_methods import Alike, will_move

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.optim import Optimizer

    from lightning_regularize._steps.targets import Targets
    from lightning_regularize.decay_rules import Decision


@dataclass(frozen=True, eq=False)
class _Known:
    """What was found in a step before."""

    decisions: Sequence[Sequence[Decision]]
    groups: Sequence[dict[str, Any]]
    values: Sequence[Mapping[int, float]]
    targets: list[Alike]


class Decaying:
    """The parameters that decay.

    Args:
        targets: What rules say about each parameter of an optimizer.
    """

    def __init__(self, targets: Targets[Decision]) -> None:
        self._targets = targets
        self._known: WeakKeyDictionary[Optimizer, _Known] = WeakKeyDictionary()

    def of(self, optimizer: Optimizer, values: Sequence[Mapping[int, float]]) -> list[Alike]:
        """What decays in the step that begins: parameters with a gradient, as for the optimizers themselves.

        Args:
            optimizer: With the user's groups.
            values: The weight decay of factor 1 of each group, by the number of the schedule.
        """
        decisions, groups = self._targets.of(optimizer), optimizer.param_groups
        known = self._known.get(optimizer)
        if (
            known is None
            or known.decisions is not decisions
            or known.values != values
            or any(group is not before for group, before in zip(groups, known.groups, strict=True))
        ):
            of_groups = zip(groups, decisions, values, strict=True)
            targets = [alike for group, of_group, own in of_groups for alike in _by_strength(group, of_group, own)]
            known = self._known[optimizer] = _Known(decisions, list(groups), values, targets)
        moving = [alike.where(will_move(optimizer, alike.parameters)) for alike in known.targets]
        return [alike for alike in moving if alike.parameters]


def _by_strength(group: dict[str, Any], decisions: Sequence[Decision], values: Mapping[int, float]) -> Iterator[Alike]:
    """What decays in a group, in lists of one weight decay."""
    found: dict[float, list[Decision]] = {}
    for decision in decisions:
        if decay := decision.weight_decay(values):
            found.setdefault(decay, []).append(decision)
    for decay, those in found.items():
        yield Alike([each.info.name for each in those], [each.info.parameter for each in those], group, decay)
