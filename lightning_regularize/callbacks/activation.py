"""What keeps activations small, or few, while a model trains?"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn

from lightning_regularize import activations
from lightning_regularize._rows import wide
from lightning_regularize._steps.buckets import HALF
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.strategies import check_activations_are_whole
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._modules import check_module_rules, matches_module
from lightning_regularize.callbacks._rounding import TOLERANCE
from lightning_regularize.schedules import Schedule, as_schedule, check_total_steps
from lightning_regularize.selection import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import lightning.pytorch as pl

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.schedules import Position


class _Penalized(torch.autograd.Function):
    """The identity, whose backward pass adds the gradient of a penalty on what goes through.

    Not a hook on the tensor: what is saved here is recomputed under activation checkpointing, as everything is. The
    recomputation adds nothing, since gradients go through the graph of the first forward pass, or, if that had none
    (reentrant checkpointing), through that of the second one.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, owner: ActivationPenalty, name: str) -> Tensor:
        ctx.save_for_backward(outputs)
        ctx.owner, ctx.name, ctx.is_added = owner, name, False
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.owner.is_in_backward and not ctx.is_added:
            ctx.is_added = True  # the graph may be gone through again, by the loss of another optimizer
            gradient = ctx.owner.add(gradient, ctx.name, *ctx.saved_tensors)
        return gradient, None, None


@final
class ActivationPenalty(Regularizer):
    r"""Adds the gradient of a penalty on the outputs of modules, as if the loss were ``loss + strength * penalty``.

    ========== ====================================================== ==========================================
    norm       penalty                                                also known as
    ========== ====================================================== ==========================================
    l1         :math:`\frac{1}{B} \sum_i |x_i|`                       ``activity_regularizer=L1()`` of Keras
    l2         :math:`\frac{1}{B} \sum_i x_i^2`                       ``activity_regularizer=L2()`` of Keras
    logsumexp  :math:`\frac{1}{N} \sum_n (\log \sum_c e^{x_{nc}})^2`  z-loss, where outputs are logits
    ========== ====================================================== ==========================================

    It is a mean over the :math:`B` samples along dim 0, or over all :math:`N` positions with classes along the last
    dim, and a sum over the modules. "The loss" is what ``training_step`` returns, or what ``self.manual_backward`` is
    called with: gradient accumulation, a GradScaler and the mean over ranks of DDP and FSDP treat the penalty as they
    treat the loss. Each forward pass counts once, in the first backward pass that reaches it; what
    ``torch.autograd.grad`` computes, as for gradient penalties, stays as it is. Activations on which the loss does
    not depend are not penalized, and an error says so if no other are left.

    Nothing is kept, and nothing is computed, outside of training. In training one view of each output is kept as long
    as autograd keeps it, under activation checkpointing no longer than that. The output should not be changed in place
    by what follows: name ``"type:ReLU"`` and not the layer before a ``ReLU(inplace=True)``, or PyTorch raises an error.

    In half precision a strength that is lost beside large gradients is told at the end of training.

    The mean over ranks, times the strength, is logged as ``penalty/activation`` whenever Lightning logs, summed over
    the batches that are accumulated as the loss is, of several callbacks as ``penalty/activation 1`` and so on.

    In a loop of one's own add :func:`lightning_regularize.activations.penalty` to the loss.

    Args:
        strength: A number of at least 0, a :class:`~lightning_regularize.schedules.Schedule`, or a callable from a
            :class:`~lightning_regularize.schedules.Position` to a number. Under Adam with cross-entropy 1e-4 is usual
            for "logsumexp".
        include: Which modules: globs on their names (``"encoder.*.act"``), ``"type:ReLU"`` for a class or one of its
            bases, or module classes. Each should return one floating tensor.
        norm: "l1", "l2" or "logsumexp".
        total_steps: Length of the schedule in optimizer steps; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import ActivationPenalty
        >>> z_loss = ActivationPenalty(1e-4, include=("lm_head",), norm="logsumexp")
        >>> trainer = Trainer(callbacks=[z_loss], logger=False, accelerator="cpu")

    References:
        Glorot, Bordes and Bengio, "Deep Sparse Rectifier Neural Networks", AISTATS 2011: l1 of activations.
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", JMLR 2023: z-loss.
    """

    is_in_backward = False
    """Is the backward pass of the loss running?"""

    _is_in_batch = False

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[str | type[nn.Module]],
        norm: Literal["l1", "l2", "logsumexp"] = "l1",
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals())
        self.schedule = as_schedule(strength, name="strength")
        self.include = check_module_rules(include)
        if not self.include:
            raise ValueError("`include` should name at least one module, got none.")
        if norm not in list(activations.NORMS):
            names = ", ".join(map(repr, activations.NORMS))
            raise ValueError(f"`norm` should be one of {names}, got {norm!r}.")
        self.norm = norm
        self.total_steps = check_total_steps(total_steps)

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        if run.trainer is None:
            raise TypeError(
                "ActivationPenalty needs a Trainer, which tells when the backward pass of the loss begins and what the "
                "loss is multiplied by. In a loop of your own add to the loss what "
                f"`lightning_regularize.activations.penalty(outputs, norm={self.norm!r})` returns, times the strength."
            )
        check_activations_are_whole(run.trainer, "ActivationPenalty")
        self._handles: dict[nn.Module, Any] = {}
        self._values: list[Tensor] = []
        self._has_run: set[str] = set()
        self._is_trained: set[str] = set()  # has run, and something before it is trained
        self._is_reached: set[str] = set()  # by the backward pass of the loss
        self._is_checked = self._epoch_is_checked = False
        self._share, self._is_measured = 0.0, False
        self._scale: Tensor | None = None
        # What was to be added to half-precision gradients, squared, and how much of it was, once it was rounded.
        self._rounded: dict[torch.device, Tensor] = {}
        self._find(run)

    def _find(self, run: Run) -> None:
        """Hook the modules that there are now.

        Raises:
            MisconfigurationException: A rule matches none.
        """
        # What wraps a module, as FSDP1 and torch.compile do, has its name: the innermost is the module itself.
        modules = {canonical(name, run.module): module for name, module in run.module.named_modules() if name}
        self._names = {
            rule: [
                name
                for name, module in modules.items()
                if type(module).forward is not nn.Module.forward and matches_module(rule, name, module)
            ]
            for rule in self.include
        }
        if idle := [rule for rule, names in self._names.items() if not names]:
            raise MisconfigurationException(
                f"ActivationPenalty: `include` {idle} matches no module that has a `forward`. The modules are "
                f"{list(modules)[:20]}."
            )
        found = {modules[name]: name for names in self._names.values() for name in names}
        for gone in self._handles.keys() - found.keys():
            self._handles.pop(gone).remove()
        for module, name in found.items():
            if module not in self._handles:
                # torch.compile would make constants of what is looked up here.
                hook = torch.compiler.disable(functools.partial(self._see, name))  # type: ignore[no-untyped-call]
                self._handles[module] = module.register_forward_hook(hook)

    def end(self, run: Run) -> None:
        self.is_in_backward = self._is_in_batch = False
        for handle in getattr(self, "_handles", {}).values():
            handle.remove()

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Modules may have been replaced at the beginning of an epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.run is None:
            return
        if batch_idx == 0:
            self._find(self.run)
        self._is_in_batch = True

    def _see(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """A module has run.

        Raises:
            MisconfigurationException: It did not return a tensor of which a penalty can be computed.
        """
        if not self._is_in_batch:
            return None
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or not outputs.dim():
            what = f"{outputs.dtype}, {outputs.dim()}-d" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise MisconfigurationException(
                f"ActivationPenalty: {name!r} should return a floating tensor with the samples of a batch along dim 0, "
                f"got {what}: name a module inside it, or behind it, in `include`."
            )
        self._has_run.add(name)
        if not torch.is_grad_enabled() or not outputs.requires_grad:
            return None
        self._is_trained.add(name)
        return _Penalized.apply(outputs, self, name)  # type: ignore[no-untyped-call]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """What is multiplied here is what the strategy and the precision have multiplied the loss by."""
        if not self._is_in_batch:
            return
        batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._share = self.run.value(self.schedule) / batches
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        is_scaled = scaler is not None and scaler.is_enabled()
        self._scale = scaler.scale(torch.ones((), device=loss.device)) if is_scaled else None  # without waiting
        self.is_in_backward, self._is_measured = True, self.run.logs_now()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.is_in_backward = False

    def add(self, gradient: Tensor, name: str, outputs: Tensor) -> Tensor:
        """The gradient of the loss with respect to the outputs of a module, together with that of the penalty.

        Args:
            gradient: That of the loss.
            name: The module.
            outputs: What it has returned.
        """
        self._is_reached.add(name)
        if not self._share:
            return gradient
        if self._is_measured:
            with torch.no_grad():
                self._values.append(activations.penalty(outputs, self.norm) * self._share)
        # Second-order optimizers go through this once more: nothing may be in place.
        term = activations.gradient(outputs, self.norm) * self._share
        if self._scale is not None:
            term = term * self._scale.to(term.device)
        total = gradient + term.to(gradient.dtype)
        if gradient.dtype in HALF and (self._is_measured or not self._is_checked):
            with torch.no_grad():
                asked = term.float()
                row = torch.stack([asked.square().sum(), ((total.float() - gradient.float()) * asked).sum()])
                row = row.where(row.isfinite().all(), 0.0)  # a GradScaler skips some steps
                self._rounded[row.device] = self._rounded.get(row.device, 0.0) + row
        return total

    def on_gradients(self, step: Step) -> None:
        values, self._values = self._values, []
        # One that other optimizers train may not have run yet, as in adversarial training.
        if not self._is_checked and all(watch.steps for watch in self.run.watches if watch is not step.watch):
            self._is_checked = True
            self._check_all_run()
        if self.logs(step):
            self._log(step, values)

    def _check_all_run(self) -> None:
        """Before weights change for the first time.

        Raises:
            MisconfigurationException: Of what a rule names, nothing ran, or the loss depends on nothing.
        """
        for rule, names in self._names.items():
            if self._has_run.isdisjoint(names):
                raise MisconfigurationException(
                    f"ActivationPenalty: `include` {rule!r} names {names[:5]}, none of which was called in "
                    "training: name modules that `training_step` calls, not ones whose weights are used by others. "
                    "What `torch.compile` compiled before training has no hooks: call `torch.compiler.reset()` before."
                )
            if self._is_trained.isdisjoint(names):
                self.warn(
                    f"ActivationPenalty has no effect on {names[:5]} as long as nothing that they depend on is trained."
                )
            elif self._is_reached.isdisjoint(names):
                raise MisconfigurationException(
                    f"ActivationPenalty: the loss does not depend on the outputs of {names[:5]}, so that nothing was "
                    "penalized: in manual optimization call `self.manual_backward(loss)`, not `loss.backward()`; "
                    "otherwise name other modules in `include`."
                )

    def _log(self, step: Step, values: Sequence[Tensor]) -> None:
        trainer, device = self.run.trainer, self.run.lightning_module.device
        here = torch.zeros((), dtype=wide(device), device=device)
        for value in values:
            here += value.to(here)
        # All ranks take part, also one in which none of the modules has run.
        value = trainer.strategy.reduce(here, reduce_op="mean")
        suffix = f" {label}" if (label := self.run.label(step.watch)) else ""
        self.run.log({f"penalty/activation{self.number_among(ActivationPenalty)}{suffix}": value})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self._is_in_batch = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.run is None:
            return
        asked, found = sum((row.cpu() for row in self._rounded.values()), torch.zeros(2)).tolist()
        lost = self.run.largest(abs(1 - found / asked) if asked else 0.0)  # all ranks take part
        if lost > TOLERANCE:
            self.warn(
                f"ActivationPenalty is off by {lost:.0%} of its strength here: it is rounded when it is added to "
                "half-precision gradients of the activations. Use float32 for the modules that `include` names, or a "
                "larger strength."
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once an epoch has passed it is known what does not run, and what the loss does not depend on."""
        if self.run is None or self._epoch_is_checked:
            return
        self._epoch_is_checked = True
        names = dict.fromkeys(name for names in self._names.values() for name in names)
        if idle := [name for name in names if name not in self._has_run]:
            self.warn(f"ActivationPenalty has no effect on {idle[:10]}, which were not called in a whole epoch.")
        if unused := [name for name in names if name in self._is_trained - self._is_reached]:
            self.warn(
                f"ActivationPenalty has no effect on {unused[:10]}, on whose outputs the loss did not depend in a "
                "whole epoch: it acts in the backward pass of the loss."
            )
