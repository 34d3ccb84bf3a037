"""Decay towards where training began, instead of towards zero."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from lightning_regularize._sharding import local_piece, local_tensor, piece_like, whole_tensor
from lightning_regularize._steps.buckets import HALF
from lightning_regularize._steps.clock import rate_of
from lightning_regularize._steps.targets import Targets
from lightning_regularize._trainer.strategies import check_not_flat, check_weights_are_the_optimizers
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._saved import TENSOR, Value
from lightning_regularize.decay import check_share, pull_
from lightning_regularize.decay_methods import will_move
from lightning_regularize.schedules import Schedule, as_schedule, check_total_steps
from lightning_regularize.theory import decay_rounding_threshold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.schedules import Position
    from lightning_regularize.selection import ParameterInfo, Rule


class _Target(NamedTuple):
    """A parameter, and this rank's piece of what it is pulled to."""

    info: ParameterInfo
    anchor: Tensor | None  # None before training begins


class AnchorDecay(Regularizer):
    r"""Pulls weights towards an anchor, decoupled from the gradient: L2-SP, for fine-tuning.

    .. math:: w \leftarrow w - \eta\, a\, (w - w_0)

    before each real step of the optimizer. What the model was pretrained for is forgotten less than with decay towards
    zero. The anchor costs one copy of the weights it applies to, in memory and in checkpoints, so that a resumed run
    has the same one. Only parameters with a gradient are pulled. The optimizer's own weight decay acts as well, towards
    zero: set it to 0 unless you want both.

    Args:
        strength: ``a``, a number of at least 0, a schedule, or a callable from a position to a number.
        anchor: "init" for the weights at the start of training, or a state dict with whole tensors by canonical name.
        include: Rules for what is pulled.
        exclude: Rules for what is not. A new head has nothing to stay near: exclude it.
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import AnchorDecay
        >>> callbacks = [AnchorDecay(0.01, exclude=("head.*",))]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")

    References:
        Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018.
    """

    state_layouts: ClassVar[dict[str, Layout]] = {
        "anchors": {"*": Value(f"{TENSOR.expected}, or None", lambda v: v is None or TENSOR.is_valid(v))}
    }

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        anchor: Literal["init"] | Mapping[str, Tensor] = "init",
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = (),
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals())
        self.schedule = as_schedule(strength, name="strength")
        if anchor != "init" and not hasattr(anchor, "keys"):
            instead = ""
            if isinstance(anchor, (str, PathLike)):
                path = str(anchor)
                instead = f" Of a checkpoint's file write torch.load({path!r}, weights_only=True)['state_dict']."
            elif hasattr(anchor, "state_dict"):
                instead = " Of a module write `module.state_dict()`."
            raise TypeError(f"`anchor` should be 'init' or a state dict, got {anchor!r}.{instead}")
        self.anchor = anchor
        self.total_steps = check_total_steps(total_steps)

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        check_weights_are_the_optimizers(run.trainer, "AnchorDecay")
        check_not_flat(run.sharding(), list(run.root.parameters()), "AnchorDecay")
        infos = self.select(run, "nothing to pull")
        if self.anchor != "init":
            _check_anchor(self.anchor, infos)
        self._phase: Literal["before", "beginning", "training"] = "before"
        self._without_anchor: set[str] = set()
        self._targets: Targets[_Target] = Targets(run.infos, self._learn, move=self._move)
        for optimizer in run.optimizers:
            for group, targets in zip(optimizer.param_groups, self._targets.of(optimizer), strict=True):
                if targets:
                    rate_of(optimizer, group)
        self.warn_if_no_effect(run, infos)

    def _learn(self, info: ParameterInfo) -> _Target | None:
        if not self.selects(info):
            return None
        if self._phase == "before":
            return _Target(info, None)
        is_new = self._phase == "training"
        if self.anchor != "init" or (self._saved.get("anchors") and not is_new):
            whole = self._saved_anchor(info) if self.anchor == "init" else self.anchor.get(info.name)
            if whole is not None and tuple(whole.shape) == tuple(info.shape):
                return _Target(info, piece_like(whole, info.parameter).clone())
        elif not is_new:
            return _Target(info, local_tensor(info.parameter).clone())
        self._without_anchor.add(info.name)
        self.warn(f"AnchorDecay has no anchor for {info.name!r}, which is new to it, and leaves it alone.")
        return None

    def _saved_anchor(self, info: ParameterInfo) -> Tensor | None:
        """The anchor in the checkpoint; None for what has none.

        Raises:
            ValueError: The checkpoint is damaged.
        """
        anchor: Tensor | None = self._saved["anchors"].get(info.name)
        if info.name not in self._saved["anchors"] or (anchor is not None and tuple(anchor.shape) != tuple(info.shape)):
            what = "nothing" if anchor is None else f"shape {tuple(anchor.shape)}"
            raise ValueError(
                f"AnchorDecay: `anchors[{info.name!r}]` in the checkpoint should have the shape "
                f"{tuple(info.shape)} of the parameter, got {what}."
            )
        return anchor

    def _move(self, info: ParameterInfo, target: _Target) -> _Target | None:
        """A parameter that is in another layer now keeps its anchor, if rules select it there."""
        return target._replace(info=info) if self.selects(info) else None

    def begin(self, run: Run) -> None:
        if self.anchor == "init" and any(watch.steps for watch in run.watches) and not self._saved.get("anchors"):
            self.warn("The checkpoint has no anchor: AnchorDecay takes the weights as they are now.")
        self._phase = "beginning"
        self._targets = Targets(run.infos, self._learn, move=self._move)
        self._phase = "training"

    # -- training ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        optimizer = step.optimizer
        of_groups = zip(optimizer.param_groups, self._targets.of(optimizer), strict=True)
        pulled = [(targets, self._share(step, group)) for group, targets in of_groups if targets]
        for _, share in pulled:  # before any weight changes
            check_share(share)
        for targets, share in pulled:
            moving = [
                (local_piece(info.parameter), anchor)
                for info, anchor in targets
                if anchor is not None and will_move(optimizer, info.parameter)
            ]
            weights, anchors = [weight for weight, _ in moving], [anchor for _, anchor in moving]
            self._warn_of_rounding(weights, share)
            pull_(weights, anchors, share)

    def _share(self, step: Step, group: dict[str, Any]) -> float | Tensor:
        """The part of the way to the anchor that a step goes; a rate on the device is not read back."""
        strength: float = self.run.clock.value(self.schedule, group, step.number)
        return rate_of(step.optimizer, group) * strength

    def _warn_of_rounding(self, weights: Sequence[Tensor], share: float | Tensor) -> None:
        """Once, if in half precision a weight stays where it is although it is pulled."""
        if "rounding" in self._warned or (isinstance(share, torch.Tensor) and not share.is_cpu):
            return
        lost = {w.dtype for w in weights if w.dtype in HALF and 0 < share < decay_rounding_threshold(w.dtype)}
        for dtype in lost:
            self._warned.add("rounding")
            self.warn(
                f"AnchorDecay does next to nothing here: lr * strength is {float(share):.2g}, and below "
                f"{decay_rounding_threshold(dtype):.2g} {dtype} weights that are nearer to their anchor than to zero "
                "stay as they are. Use float32 weights with precision='bf16-mixed'."
            )

    def save(self) -> dict[str, Any]:
        """Whole tensors by name, which every rank takes part in putting together."""
        if self.anchor != "init":
            return {}
        targets = [target for target in self._targets if target.anchor is not None]
        anchors = {info.name: whole_tensor(anchor, info.parameter) for info, anchor in targets if anchor is not None}
        return {"anchors": {**dict.fromkeys(self._without_anchor), **{name: a.cpu() for name, a in anchors.items()}}}


def _check_anchor(anchor: Mapping[str, Tensor], infos: Sequence[ParameterInfo]) -> None:
    for info in infos:
        found = anchor.get(info.name)
        if found is not None and not isinstance(found, torch.Tensor):
            raise TypeError(f"`anchor` should hold tensors, got {type(found).__name__} for {info.name!r}.")
        if found is None or tuple(found.shape) != tuple(info.shape):
            what = "lacks it" if found is None else f"has shape {tuple(found.shape)}"
            raise ValueError(
                f"`anchor` should have a tensor of shape {tuple(info.shape)} for {info.name!r}, but {what}. "
                "Complete it, or leave the parameter out by `exclude`."
            )
        if not (found.is_floating_point() or found.is_complex()) or not found.isfinite().all():
            raise ValueError(
                f"`anchor` should hold finite floating-point numbers, which those for {info.name!r} are not "
                f"({found.dtype})."
            )
