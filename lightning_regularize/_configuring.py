"""How does one get at what ``configure_optimizers`` returns, before the strategy does?

Lightning looks ``configure_optimizers`` up on the instance, and so does LightningCLI, which sets it there. We set a
callable object around whatever is there. It must not be a closure: a module is pickled and copied while it trains
(``torch.save``, ``ddp_spawn``, weight averaging).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_regularize._sharding import has_flat_parameters, reshard
from lightning_regularize.groups import find_optimizers, numbered_like
from lightning_regularize.selection import parameter_infos

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import lightning.pytorch as pl
    from torch import nn
    from torch.optim import Optimizer

    Adapt = Callable[[pl.LightningModule, list[Optimizer], list[Any]], None]


class Configuring:
    """``configure_optimizers`` of a module, followed by ``adapt(module, optimizers, schedulers)``.

    Args:
        module: Its ``configure_optimizers`` is replaced by this object.
        adapt: What to do with all that was configured.
        lasting: Does it go into copies of the module? If so, ``adapt`` should pickle.
    """

    def __init__(self, module: pl.LightningModule, adapt: Adapt, *, lasting: bool = False) -> None:
        self.module = module
        self.configure = module.configure_optimizers
        self.was_on_instance = "configure_optimizers" in vars(module)
        self.adapt: Adapt | None = adapt
        self.lasting = lasting
        functools.update_wrapper(self, self.configure, updated=())
        self.__wrapped__ = inspect.unwrap(self.configure)  # Lightning's `is_overridden` looks through one layer only
        module.configure_optimizers = self  # type: ignore[method-assign]

    def __call__(self) -> Any:
        configured = self.configure()
        if self.adapt is not None:
            optimizers, schedulers = find_optimizers(configured)
            _, held = find_optimizers(list(vars(self.module).values()))
            known = {id(scheduler) for scheduler in schedulers}
            held = [s for s in held if id(s) not in known and any(s.optimizer is o for o in optimizers)]
            self.adapt(self.module, optimizers, schedulers + held)
        return configured

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.lasting else (_as_it_is, (self.configure,))

    def undo(self) -> None:
        """Put back what was there; where somebody else has wrapped it since, at least do nothing any more."""
        self.adapt = None
        if vars(self.module).get("configure_optimizers") is not self:
            return
        del self.module.configure_optimizers
        if self.was_on_instance:
            self.module.configure_optimizers = self.configure


def _as_it_is(configure: Callable[[], Any]) -> Callable[[], Any]:
    return configure


def model_root(trainer: pl.Trainer | None, module: pl.LightningModule) -> nn.Module:
    """The module as the strategy has wrapped it: under FSDP1 only the wrapper knows the parameters' whole shapes.

    Under FSDP2 its parameters are the optimizer's afterwards, also between a validation and the next training step.

    Raises:
        MisconfigurationException: FSDP1 shows no parameter of the module's own.
    """
    root = getattr(trainer.strategy, "model", None) or module if trainer is not None else module
    if has_flat_parameters(root):
        raise MisconfigurationException(
            "FSDP with `use_orig_params=False` shows one flat parameter a unit, of which no part can be told from "
            "another: use FSDPStrategy(use_orig_params=True), which is Lightning's default."
        )
    reshard(root)
    return root


def number_states(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the states of a checkpoint numbers that FSDP2 understands, see :func:`~groups.numbered_like`."""
    states = checkpoint.get("optimizer_states", [])
    if len(states) == len(trainer.optimizers):
        checkpoint["optimizer_states"] = [
            numbered_like(module, optimizer, state) for optimizer, state in zip(trainer.optimizers, states, strict=True)
        ]


def check_numbers(
    trainer: pl.Trainer, module: pl.LightningModule, state: Mapping[str, Any], layout: Sequence[Sequence[str]]
) -> None:
    """Refuse moments that FSDP2 has loaded into the wrong parameters, where shapes did not tell.

    Args:
        trainer: That of the run that resumes.
        module: Its module.
        state: Of one optimizer, as the checkpoint has it.
        layout: The names in each of its groups, as they were saved.

    Raises:
        MisconfigurationException: A number does not belong to the name.
    """
    numbers = [key for group in state.get("param_groups", ()) for key in group["params"]]
    names = list(itertools.chain.from_iterable(layout))
    of_fsdp2 = isinstance(trainer.strategy, ModelParallelStrategy)
    if not of_fsdp2 or len(numbers) != len(names) or not all(isinstance(number, int) for number in numbers):
        return
    place = {info.name: i for i, info in enumerate(parameter_infos(module))}  # in the order of `module.parameters()`
    if any(place.get(name, number) != number for number, name in zip(numbers, names, strict=True)):
        raise MisconfigurationException(
            "The checkpoint numbers the parameters of its optimizer by group, and ModelParallelStrategy has taken the "
            "numbers for places in the module: moments are mixed up. Save it once more with WeightDecay among the "
            "callbacks of a Trainer of one process or DDP, or load the weights alone."
        )
