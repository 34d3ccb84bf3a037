"""How does a LightningModule configure its parameter groups? A base class, and a function for modules that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

from lightning.pytorch import LightningModule
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_regularize._configuring import Configuring, model_root, number_states
from lightning_regularize.groups import (
    Grouping,
    check_layer_decay,
    check_number,
    check_something_decays,
    guard_state_dict,
    param_groups,
    plan_groups,
    repair_scheduler_,
)
from lightning_regularize.selection import DEFAULT_EXCLUDE, Rule, parameter_infos

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]  # as in lightning.pytorch.cli, which needs an extra package
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class RegularizedModule(LightningModule):
    """A LightningModule whose optimizer does not decay biases, norms and other vectors. Subclass it.

    Args:
        optimizer: Makes the optimizer from parameter groups, e.g. ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
        lr_scheduler: Makes the LR scheduler from the optimizer; None for a constant rate. A ReduceLROnPlateau should
            have a ``monitor``, as that of ``lightning.pytorch.cli`` has.
        weight_decay: Weight decay of the group with factor 1, whatever ``optimizer`` says; 0.01 is AdamW's default in
            torch.
        exclude: Rules for what does not decay.
        factors: Rule -> factor on ``weight_decay``, first match wins.
        layer_decay: The learning rate shrinks by this factor from layer to layer towards the input; see
            :func:`~lightning_regularize.param_groups`.
        interval: Whether the LR scheduler steps each "step" or each "epoch"; ReduceLROnPlateau steps each epoch.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> import functools
        >>> import torch
        >>> class Classifier(RegularizedModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.layer = torch.nn.Linear(4, 2)
        >>> module = Classifier(optimizer=functools.partial(torch.optim.AdamW, lr=1e-3), weight_decay=0.1)
        >>> [(group["name"], group["weight_decay"]) for group in module.configure_optimizers().param_groups]
        [('decay', 0.1), ('no_decay', 0.0)]
    """

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_decay: float = 0.01,
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        factors: Mapping[Any, float] | None = None,
        layer_decay: float | None = None,
        interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__()
        if not callable(optimizer):
            raise TypeError(f"`optimizer` should make an optimizer from parameter groups, got {optimizer!r}.")
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(f"`lr_scheduler` should make a scheduler from an optimizer, got {lr_scheduler!r}.")
        if interval not in ("step", "epoch"):
            raise ValueError(f"`interval` should be 'step' or 'epoch', got {interval!r}.")
        weight_decay = check_number(weight_decay, "`weight_decay`")
        if layer_decay is not None:
            check_layer_decay(layer_decay)
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self._grouping = Grouping(exclude, factors or {})
        self._weight_decay = weight_decay
        self._layer_decay = layer_decay
        self._interval = interval

    def configure_optimizers(self) -> Any:
        """The given optimizer over :func:`~lightning_regularize.param_groups` of this module.

        Raises:
            ValueError: The optimizer has no weight decay to be set, or the LR scheduler no metric to watch.
            TypeError: What ``optimizer`` or ``lr_scheduler`` made is none.
        """
        root = model_root(self._trainer, self)
        groups = param_groups(
            root,
            self._weight_decay,
            exclude=self._grouping.exclude,
            factors=self._grouping.factors,
            lr=None if self._layer_decay is None else 1.0,
            layer_decay=self._layer_decay,
        )
        optimizer = self._make_optimizer(groups)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` should make a torch.optim.Optimizer, it made {optimizer!r}.")
        if self._weight_decay > 0 and "weight_decay" not in optimizer.defaults:
            raise ValueError(
                f"{type(optimizer).__name__} has no `weight_decay`: use another optimizer, or `weight_decay=0.0`."
            )
        if self._layer_decay is not None:
            # Only the optimizer knows its rate; until now the groups' were multiples of it.
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * optimizer.defaults["lr"]
        guard_state_dict(optimizer, {id(info.parameter): info for info in parameter_infos(root)})
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        if not hasattr(scheduler, "step"):
            raise TypeError(f"`lr_scheduler` should make a learning rate scheduler, it made {scheduler!r}.")
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self._interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            if not hasattr(scheduler, "monitor"):
                raise ValueError(
                    "`lr_scheduler` does not say which metric it watches: use the ReduceLROnPlateau of "
                    "lightning.pytorch.cli, which takes a `monitor`."
                )
            config |= {"monitor": scheduler.monitor, "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have FSDP2 understand the numbers of parameters, which groups have put into another order.

        Call it from your own, if you have one, or the optimizer's state of a DDP run cannot be loaded under FSDP2.
        """
        if self._trainer is not None:
            number_states(self._trainer, self, checkpoint)


def regularize(
    module: LightningModule,
    weight_decay: float | None = None,
    *,
    exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
    factors: Mapping[Any, float] | None = None,
) -> LightningModule:
    """Have a module's own ``configure_optimizers`` come out with decay and no-decay groups.

    Whatever it returns is kept: optimizers, LR schedulers and their settings. Its groups are split where their
    parameters differ in decay, and schedulers get a value for each. LBFGS and other optimizers without weight decay are
    left whole. Class, state dict keys, hyperparameters and pickling are as before; a second call replaces the first.

    Args:
        module: Changed in place.
        weight_decay: Weight decay of groups with factor 1; None keeps what each group has.
        exclude: Rules for what does not decay.
        factors: Rule -> factor on the weight decay, first match wins.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is no LightningModule, or another argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> optimizer = regularize(BoringModel(), weight_decay=0.1).configure_optimizers()[0][0]
        >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
        [('decay', 0.1), ('no_decay', 0.0)]
    """
    if not isinstance(module, LightningModule):
        raise TypeError(
            f"`module` should be a LightningModule, got {type(module).__name__}."
            + (" Call `regularize` before `torch.compile`." if hasattr(module, "_orig_mod") else "")
        )
    if weight_decay is not None:
        weight_decay = check_number(weight_decay, "`weight_decay`")
    before = vars(module).get("configure_optimizers")
    if isinstance(before, Configuring) and before.lasting:
        before.undo()
    Configuring(module, _Split(weight_decay, Grouping(exclude, factors or {})), lasting=True)
    return module


def grouping_of(module: LightningModule) -> Grouping | None:
    """The rules by which a module of ours, or one that was given to :func:`regularize`, groups its parameters."""
    configuring = vars(module).get("configure_optimizers")
    while isinstance(configuring, Configuring):
        if isinstance(configuring.adapt, _Split):
            return configuring.adapt.grouping
        configuring = configuring.configure
    return module._grouping if isinstance(module, RegularizedModule) else None


@dataclass(frozen=True)
class _Split:
    """What :func:`regularize` does with the optimizers of a module."""

    weight_decay: float | None
    grouping: Grouping
    # An optimizer that is made in `__init__` comes again in a second fit, when its factors are in its groups already.
    done: WeakSet[Optimizer] = field(default_factory=WeakSet, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Split, (self.weight_decay, self.grouping)  # weak references cannot be pickled

    def __call__(self, module: LightningModule, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        """Split the groups of ``optimizers`` in place, and repair ``schedulers``.

        Raises:
            ValueError: An optimizer has no weight decay that could be set.
        """
        root = model_root(module._trainer, module)
        infos = parameter_infos(root)
        self.grouping.check(infos)
        if self.weight_decay:
            check_something_decays(self.grouping, infos)
        for i, optimizer in enumerate(optimizers):
            if any("weight_decay" not in group for group in optimizer.param_groups):
                if self.weight_decay:
                    raise ValueError(
                        f"{type(optimizer).__name__} has no `weight_decay`: use another optimizer, or "
                        "`regularize(module)` without a number."
                    )
                continue
            if optimizer in self.done:
                continue
            self.done.add(optimizer)
            before = [dict(group) for group in optimizer.param_groups]
            prefix = f"optimizer{i}" if len(optimizers) > 1 else ""
            by_id = {id(info.parameter): info for info in infos}
            plan = plan_groups(optimizer, self.grouping, by_id, prefix)
            guard_state_dict(optimizer, by_id)
            if self.weight_decay is not None:
                for group, factor in zip(optimizer.param_groups, plan.factors, strict=True):
                    group["weight_decay"] = self.weight_decay * factor
            for scheduler in schedulers:
                if scheduler.optimizer is optimizer:
                    repair_scheduler_(scheduler, plan.origins, before)
