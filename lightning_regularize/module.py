"""A LightningModule that configures its parameter groups, and a function that does so for modules that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_regularize._checks import check_layer_decay, check_number, is_named
from lightning_regularize._factories import check_factories
from lightning_regularize._trainer.names import LightningModule, MisconfigurationException, rank_zero_warn
from lightning_regularize._trainer.strategies import deepspeed_keeper, model_root
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.groups import (
    Grouping,
    check_something_decays,
    layer_groups,
)
from lightning_regularize.optimizers import ChainedOptimizer
from lightning_regularize.selection import DEFAULT_EXCLUDE, Rule, parameter_infos

if TYPE_CHECKING:
    from torch import nn

    from lightning_regularize.selection import ParameterInfo

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]  # as in lightning.pytorch.cli, which needs an extra package
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class RegularizedModule(LightningModule):
    """A LightningModule whose optimizer does not decay biases, norms and other vectors. Subclass it.

    It is of the package that is imported before this one, ``lightning.pytorch`` or ``pytorch_lightning``; else of
    ``lightning.pytorch``, if that is installed.

    Args:
        optimizer: Makes the optimizer from parameter groups, e.g. ``functools.partial(torch.optim.AdamW, lr=1e-3)``.
        optimizers: In place of ``optimizer``, rule -> what makes an optimizer: a
            :class:`~lightning_regularize.ChainedOptimizer`, e.g. Muon for ``"hidden_matrices"`` and AdamW for ``"*"``.
        lr_scheduler: Makes the LR scheduler from the optimizer; None for a constant rate. A ReduceLROnPlateau should
            have a ``monitor``, as that of ``lightning.pytorch.cli`` has.
        weight_decay: Weight decay of the group with factor 1, whatever ``optimizer`` says; 0.01 is AdamW's default in
            torch.
        exclude: Rules for what does not decay.
        factors: Rule -> factor on ``weight_decay``, or a function that makes one of a
            :class:`~lightning_regularize.ParameterInfo`, first match wins.
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
        >>> module.configure_callbacks()
        [WeightDecay(0.1)]
    """

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = AdamW,
        optimizers: Mapping[Any, OptimizerCallable] | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_decay: float = 0.01,
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        factors: Mapping[Any, float | Callable[[ParameterInfo], float]] | None = None,
        layer_decay: float | None = None,
        interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__()
        if not callable(optimizer):
            raise TypeError(
                f"`optimizer` should make an optimizer from parameter groups, got {optimizer!r}. For several, each for "
                "the parameters of a rule, use `optimizers`."
            )
        if optimizers is not None:
            check_factories(optimizers)
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(f"`lr_scheduler` should make a scheduler from an optimizer, got {lr_scheduler!r}.")
        if interval not in ("step", "epoch"):
            raise ValueError(f"`interval` should be 'step' or 'epoch', got {interval!r}.")
        weight_decay = _check_decay(weight_decay)
        if layer_decay is not None:
            check_layer_decay(layer_decay)
        self._make_optimizer, self._make_optimizers = optimizer, optimizers
        self._make_lr_scheduler = lr_scheduler
        self._weight_decay = weight_decay
        self._decay: dict[str, Any] = {"weight_decay": weight_decay, "exclude": exclude, "factors": factors}
        WeightDecay(**self._decay)  # which checks these
        self._layer_decay = layer_decay
        self._interval = interval

    def configure_callbacks(self) -> Sequence[Any]:
        """:class:`~lightning_regularize.WeightDecay` with the rules of this module, unless the Trainer has one.

        Whoever overrides it should add what ``super().configure_callbacks()`` returns.
        """
        return _decay_callbacks(self, self._decay)

    def configure_optimizers(self) -> Any:
        """The given optimizer over the trainable parameters: one group, or with ``layer_decay`` one per layer.

        Without a Trainer, :class:`~lightning_regularize.WeightDecay` is attached to the optimizer, so that nothing that
        is excluded decays in another training loop either.

        Raises:
            ValueError: There is nothing to train or to decay, the optimizer has no weight decay to be set, or the LR
                scheduler no metric to watch.
            TypeError: ``optimizer`` did not make an optimizer, or ``lr_scheduler`` no LR scheduler.
            MisconfigurationException: Under DeepSpeed's ZeRO an override of ``configure_callbacks`` leaves WeightDecay
                out.
        """
        root = model_root(self._trainer, self)
        groups = self._groups(root)
        if self._make_optimizers is None:
            optimizer = self._make(self._make_optimizer, groups)
        else:
            optimizer = self._chain(self._make_optimizers, root, groups)
        self._see_to_decay(optimizer, root)
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

    def _chain(
        self, optimizers: Mapping[Any, OptimizerCallable], root: nn.Module, groups: Sequence[dict[str, Any]]
    ) -> Optimizer:
        """Several optimizers in one, of which each gets what ``groups`` have of its parameters.

        Raises:
            MisconfigurationException: DeepSpeed's ZeRO or FSDP1 hides the weights from them.
            ValueError: The rules do not fit, or an optimizer refuses its parameters.
        """
        if self._trainer is not None and (keeper := deepspeed_keeper(self._trainer)):
            raise MisconfigurationException(
                f"DeepSpeed's {keeper} steps flat copies of the weights, and not several optimizers in one: use DDP or "
                "FSDP2 (ModelParallelStrategy)."
            )

        def make_from(make: OptimizerCallable, parameters: Sequence[Any]) -> Optimizer:
            keys = set(map(id, parameters))
            own = [{**group, "params": [p for p in group["params"] if id(p) in keys]} for group in groups]
            return self._make(make, [group for group in own if group["params"]] or [{"params": parameters}])

        try:
            return ChainedOptimizer(root, {rule: partial(make_from, make) for rule, make in optimizers.items()})
        except ValueError as error:
            if is_named(root, "FullyShardedDataParallel"):
                raise MisconfigurationException(str(error)) from error
            raise

    def _make(self, make: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
        """One optimizer, with the weight decay of this module.

        Raises:
            TypeError: ``make`` makes something else.
            ValueError: The optimizer has no weight decay.
        """
        optimizer = make(groups)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` should make a torch.optim.Optimizer, it made {optimizer!r}.")
        if self._weight_decay > 0 and "weight_decay" not in optimizer.defaults:
            raise ValueError(
                f"{type(optimizer).__name__} has no `weight_decay`: use another optimizer, or `weight_decay=0.0`."
            )
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = self._weight_decay
            if self._layer_decay is not None:  # until now the rates were multiples of the optimizer's
                group["lr"] = group["lr"] * optimizer.defaults["lr"]
        return optimizer

    def _groups(self, root: nn.Module) -> list[dict[str, Any]]:
        infos = parameter_infos(root)
        grouping = Grouping(self._decay["exclude"], self._decay["factors"] or {})
        grouping.check(infos)
        if self._weight_decay > 0:
            check_something_decays(grouping, infos)
        parameters = [info.parameter for info in infos if info.parameter.requires_grad]
        if not parameters:
            raise ValueError(f"{type(self).__name__} has no trainable parameters to group.")
        if self._layer_decay is None:
            return [{"params": parameters}]
        return layer_groups(root, 1.0, self._layer_decay)

    def _see_to_decay(self, optimizer: Optimizer, root: nn.Module) -> None:
        callbacks = getattr(self._trainer, "callbacks", ())
        if any(isinstance(callback, WeightDecay) for callback in callbacks) or not self._weight_decay:
            return
        if self._trainer is not None and deepspeed_keeper(self._trainer):
            raise MisconfigurationException(
                f"{type(self).__name__}.configure_callbacks leaves out what `super().configure_callbacks()` returns, "
                "without which nothing is excluded from weight decay under DeepSpeed's ZeRO: add it."
            )
        WeightDecay(**self._decay).attach(optimizer, root)


def regularize(
    module: LightningModule,
    weight_decay: float | None = None,
    *,
    exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
    factors: Mapping[Any, float | Callable[[ParameterInfo], float]] | None = None,
) -> LightningModule:
    """Let a module exclude biases, norms and other vectors from weight decay in any Trainer, by its own callbacks.

    Its ``configure_callbacks`` returns a :class:`~lightning_regularize.WeightDecay` beside what it returned before.
    Optimizers, their groups and LR schedulers stay as they are. LBFGS and other optimizers without weight decay are
    left alone. Class, state dict keys, hyperparameters and pickling are as before; a second call replaces the first. A
    WeightDecay that the Trainer has takes precedence. In a loop without a Trainer, attach a WeightDecay instead.

    Args:
        module: Changed in place; of ``lightning.pytorch`` or ``pytorch_lightning``.
        weight_decay: As of :class:`~lightning_regularize.WeightDecay`; None keeps what each group has.
        exclude: Rules for what does not decay.
        factors: Rule -> factor on the weight decay, or a function that makes one of a
            :class:`~lightning_regularize.ParameterInfo`, first match wins.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is not a LightningModule, or another argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> regularize(BoringModel(), weight_decay=0.1).configure_callbacks()
        [WeightDecay(0.1)]
    """
    if not is_named(module, "LightningModule"):
        raise TypeError(
            f"`module` should be a LightningModule, got {type(module).__name__}."
            + (" Call `regularize` before `torch.compile`." if hasattr(module, "_orig_mod") else "")
        )
    if weight_decay is not None:
        weight_decay = _check_decay(weight_decay)
    decay: dict[str, Any] = {"weight_decay": weight_decay, "exclude": exclude, "factors": factors}
    WeightDecay(**decay)  # which checks these
    before = vars(module).get("configure_callbacks")
    if isinstance(before, _ConfigureCallbacks):
        before = before.before
    module.configure_callbacks = _ConfigureCallbacks(module, decay, before)  # type: ignore[method-assign]
    return module


def _check_decay(weight_decay: object) -> float:
    """The number that it should be.

    Raises:
        TypeError: It is a schedule, or something else.
        ValueError: It is out of range.
    """
    if callable(weight_decay) or isinstance(weight_decay, Mapping):
        raise TypeError(
            f"`weight_decay` should be a number, got {weight_decay!r}. Give a schedule, or one for each rule, to the "
            "Trainer: `callbacks=[WeightDecay(...)]`, which precedes the module's own."
        )
    return check_number(weight_decay, "`weight_decay`")


class _ConfigureCallbacks:
    """``configure_callbacks`` of a module, and a WeightDecay. A class, since modules are pickled and copied."""

    def __init__(self, module: LightningModule, decay: dict[str, Any], before: Callable[[], Any] | None) -> None:
        self.module, self.decay, self.before = module, decay, before

    def __call__(self) -> list[Any]:
        found = type(self.module).configure_callbacks(self.module) if self.before is None else self.before()
        callbacks = found if isinstance(found, Sequence) else [found]
        others = [c for c in callbacks if not (isinstance(c, WeightDecay) and c.of_module is not None)]
        return [*others, *_decay_callbacks(self.module, self.decay)]


def _decay_callbacks(module: LightningModule, decay: Mapping[str, Any]) -> list[WeightDecay]:
    """A WeightDecay for a module; none if the Trainer has one of its own, which Lightning would throw out."""
    callbacks = getattr(module._trainer, "callbacks", ())
    of_trainer = [c for c in callbacks if isinstance(c, WeightDecay) and c.of_module is None]
    mine = WeightDecay(**decay)
    mine.of_module = ref(module)
    if not of_trainer:
        return [mine]
    theirs = of_trainer[0]
    excludes = mine.grouping.exclude not in (DEFAULT_EXCLUDE, theirs.grouping.exclude)
    if excludes or mine.grouping.factors not in ({}, theirs.grouping.factors):
        rank_zero_warn(
            f"The Trainer's {theirs!r} decides what decays, and not {mine!r} of {type(module).__name__}: give the "
            "`exclude` and `factors` of the module to the Trainer's."
        )
    return []
