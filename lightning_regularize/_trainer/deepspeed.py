"""How does an optimizer see its groups in parts under DeepSpeed's ZeRO, which flattens groups once, when it starts?"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from lightning_regularize._steps.parts import Parts
from lightning_regularize._trainer.strategies import deepspeed_keeper
from lightning_regularize.decay_rules import NO_DECAY
from lightning_regularize.selection import parameter_infos

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import lightning.pytorch as pl
    from torch import nn
    from torch.optim import Optimizer

    from lightning_regularize.decay_rules import DecayRules


class ZeroTwin:
    """Gives DeepSpeed a twin of the user's optimizer, whose groups are parts of the user's for good.

    The user's optimizer keeps its groups, so that LR schedulers and others that hold it work as they would; what they
    write goes to the twin before each step, see :meth:`update`.

    Args:
        trainer: A Trainer with a DeepSpeedStrategy, before that has started.
        module: Its module.
        rules: The schedules and factors of the parameters.
    """

    def __init__(self, trainer: pl.Trainer, module: nn.Module, rules: DecayRules) -> None:
        self.optimizer: Optimizer | None = None
        self._trainer, self._module, self._rules = trainer, module, rules
        self._strategy: Any = trainer.strategy
        earlier = vars(self._strategy).get("_setup_model_and_optimizer")
        if isinstance(earlier, ZeroTwin):  # of a run that failed before DeepSpeed started
            earlier.undo()
        self._set_up = self._strategy._setup_model_and_optimizer  # type: ignore[attr-defined, unused-ignore]
        self._strategy._setup_model_and_optimizer = self  # type: ignore[attr-defined, unused-ignore]

    def __call__(self, model: Any, optimizer: Optimizer | None, lr_scheduler: Any = None) -> Any:
        """In place of ``strategy._setup_model_and_optimizer``."""
        self.undo()
        if optimizer is None or not deepspeed_keeper(self._trainer):
            return self._set_up(model, optimizer, lr_scheduler)
        infos = parameter_infos(self._module)
        self._rules.check(infos)
        settings = {id(info.parameter): self._rules.decide(info).setting for info in infos}
        self.optimizer, self._parts = optimizer, Parts(lambda parameter: settings.get(id(parameter), NO_DECAY))
        twin = object.__new__(type(optimizer))
        vars(twin).update({key: value for key, value in vars(optimizer).items() if key != "step"})
        schedules = range(len(self._rules.schedules))
        self._parts.values = [dict.fromkeys(schedules, g.get("weight_decay", 0.0)) for g in optimizer.param_groups]
        twin.param_groups, twin.state = self._parts.update(optimizer), collections.defaultdict(dict)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or LR schedulers miss its steps
        return self._set_up(model, twin, lr_scheduler)

    def update(self, values: Sequence[Mapping[int, Any]]) -> None:
        """Pass on the weight decay of each group, and all else that was written to the user's groups."""
        if self.optimizer is not None:
            self._parts.values = values
            self._parts.update(self.optimizer)

    def undo(self) -> None:
        """Put the strategy's own method back."""
        if vars(self._strategy).get("_setup_model_and_optimizer") is self:
            del self._strategy._setup_model_and_optimizer
