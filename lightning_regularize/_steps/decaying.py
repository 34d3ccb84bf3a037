"""Which parameters decay in a step, and how strongly? A list that is made anew only when the answer changes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_regularize.decay_methods import Target, will_move

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from lightning_regularize._steps.targets import Targets
    from lightning_regularize.decay_rules import Decision


@dataclass(frozen=True, eq=False)
class _Known:
    """What was found in a step before."""

    decisions: Sequence[Sequence[Decision]]
    groups: Sequence[dict[str, Any]]
    values: Sequence[Mapping[int, float]]
    targets: list[Target]
    parameters: list[nn.Parameter]


class Decaying:
    """The parameters that decay.

    Args:
        targets: What rules say about each parameter of an optimizer.
    """

    def __init__(self, targets: Targets[Decision]) -> None:
        self._targets = targets
        self._known: WeakKeyDictionary[Optimizer, _Known] = WeakKeyDictionary()

    def of(self, optimizer: Optimizer, values: Sequence[Mapping[int, float]]) -> list[Target]:
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
            targets = [
                Target(decision.info.name, decision.info.parameter, group, decay)
                for group, of_group, own in zip(groups, decisions, values, strict=True)
                for decision in of_group
                if (decay := decision.weight_decay(own))
            ]
            known = self._known[optimizer] = _Known(
                decisions, list(groups), values, targets, [target.parameter for target in targets]
            )
        flags = will_move(optimizer, known.parameters)
        return known.targets if all(flags) else list(itertools.compress(known.targets, flags))  # mostly all
