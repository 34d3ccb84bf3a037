"""How does one get at what ``configure_optimizers`` returns, before the strategy does?

Lightning looks ``configure_optimizers`` up on the instance, and so does LightningCLI, which sets it there. We set a
callable object around whatever is there. It must not be a closure: a module is pickled and copied while it trains
(``torch.save``, ``ddp_spawn``, weight averaging).
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_regularize._sharding import has_flat_parameters
from lightning_regularize.groups import find_optimizers

if TYPE_CHECKING:
    from collections.abc import Callable

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

    Raises:
        MisconfigurationException: FSDP1 shows no parameter of the module's own.
    """
    root = getattr(trainer.strategy, "model", None) or module if trainer is not None else module
    if has_flat_parameters(root):
        raise MisconfigurationException(
            "FSDP with `use_orig_params=False` shows one flat parameter a unit, of which no part can be told from "
            "another: use FSDPStrategy(use_orig_params=True), which is Lightning's default."
        )
    return root
