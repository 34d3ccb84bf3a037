"""Matrices that keep the norm they had at the start, and turn by the learning rate in each step."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from lightning_regularize._sharding import local_pieces
from lightning_regularize._steps.buckets import HALF, refreshed
from lightning_regularize._steps.clock import rate_of
from lightning_regularize._steps.hooks import hooks_of
from lightning_regularize._steps.targets import Targets
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.strategies import check_not_flat, check_weights_are_the_optimizers
from lightning_regularize._used import follow_moved, why_not_held
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._saved import POSITIVE
from lightning_regularize.callbacks.anchor_decay import AnchorDecay
from lightning_regularize.callbacks.constrained_decay import ConstrainedDecay
from lightning_regularize.callbacks.constraint import WeightConstraint
from lightning_regularize.callbacks.penalty import PenaltyCallback
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.decay_methods import will_move
from lightning_regularize.norms import norms
from lightning_regularize.spheres import turn_

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.selection import ParameterInfo, Rule

_DECAYS = (AnchorDecay, ConstrainedDecay)


class _Target:
    """A matrix, and the norm that it keeps, as a 0-d tensor of its device."""

    def __init__(self, info: ParameterInfo) -> None:
        self.info = info
        self.radius: Tensor | None = None


class Hyperball(Regularizer):
    r"""Keeps each matrix at the norm that it had at the start; the learning rate sets how far a step turns it.

    After each real step of any optimizer, with :math:`W_0` before it and :math:`W_1` after it, for each matrix

    .. math:: W \leftarrow R\,\frac{V}{\lVert V\rVert}, \qquad
        V = W_0 - \eta R\,\frac{W_0 - W_1}{\lVert W_0 - W_1\rVert}, \qquad R = \lVert W\rVert \text{ at the start}

    with Frobenius norms and the learning rate :math:`\eta` of the parameter group. With Adam this is AdamH, with Muon
    MuonH. There is no weight decay to choose: weights that decay as well are an error. Leave embeddings and the output
    layer out by ``exclude``, if their size should be learned. Proximal penalties and constraints of the same weights
    belong behind it in the list of callbacks, and have the last word on norms. A matrix of one element stays as it is.

    Args:
        include: Rules for what turns; by default matrices and the like.
        exclude: Rules for what does not.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: A rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import Hyperball, WeightDecay
        >>> callbacks = [WeightDecay(0.0), Hyperball(exclude=("head.*",))]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")

    References:
        Wen et al., "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization", 2026,
        https://arxiv.org/abs/2606.16899.
    """

    state_layouts: ClassVar[dict[str, Layout]] = {"radii": {"*": POSITIVE}}

    def __init__(self, *, include: Sequence[Rule] = ("weight",), exclude: Sequence[Rule] = ()) -> None:
        super().__init__(locals())

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        check_weights_are_the_optimizers(run.trainer, "Hyperball")
        check_not_flat(run.sharding(), list(run.root.parameters()), "Hyperball")
        infos = self.select(run, "nothing to turn")
        self.warn_if_no_effect(run, infos)
        self.warn_if_moved_later(run, "norms are not kept")
        self._sharding, self._has_begun = run.sharding(), False
        self._targets: Targets[_Target] = Targets(run.infos, self._learn, move=self._move)
        for optimizer in run.optimizers:
            for group, targets in zip(optimizer.param_groups, self._targets.of(optimizer), strict=True):
                if targets:
                    rate_of(optimizer, group)
        self._before: WeakKeyDictionary[Optimizer, list[Tensor]] = WeakKeyDictionary()  # weights before a step
        self._moving: dict[Optimizer, list[tuple[dict[str, Any], list[_Target]]]] = {}  # in the step under way

    def _learn(self, info: ParameterInfo) -> _Target | None:
        if not self.selects(info):
            return None
        self.check_real(info)
        if why := why_not_held(info):
            raise MisconfigurationException(f"Hyperball cannot keep the norm of {why}")
        if info.parameter.dtype in HALF:
            raise MisconfigurationException(
                f"Hyperball needs the difference that a step makes, and rounds it away in {info.name!r} of "
                f"{info.parameter.dtype}: use float32 weights with precision='bf16-mixed'."
            )
        return _Target(info)

    def _move(self, info: ParameterInfo, target: _Target) -> _Target | None:
        """A matrix that is in another place of the model keeps its norm, if rules select it there."""
        moved = self._learn(info)
        if moved is not None:
            moved.radius = target.radius
        return moved

    def begin(self, run: Run) -> None:
        is_resumed = any(run.steps)
        if is_resumed and not self._saved.get("radii"):
            self.warn(
                "The checkpoint does not hold the norms at the start of training: Hyperball keeps those that the "
                "weights have now."
            )
        self._begin_targets([target for target in self._targets if target.info.parameter.requires_grad])

    def _begin_targets(self, targets: Sequence[_Target]) -> None:
        """Measure what is new, or read it from the checkpoint.

        Raises:
            ValueError: A weight has no norm to keep.
        """
        new = [target for target in targets if target.radius is None]
        if not new:
            return
        radii, names = norms([t.info.parameter for t in new], sharding=self._sharding), [t.info.name for t in new]
        saved = self._saved.get("radii", {})
        for i, name in enumerate(names):
            if name in saved:
                radii[i] = saved[name]
        cannot_be_kept = (radii == 0) | ~radii.isfinite()
        if cannot_be_kept.any():
            radius, name = next(pair for pair in zip(radii.tolist(), names, strict=True) if not 0 < pair[0] < math.inf)
            raise ValueError(
                f"Hyperball: {name!r} has the norm {radius} at the start, which no step can keep: "
                f"`exclude=({name!r},)` leaves it out."
            )
        if single := [target.info.name for target in new if target.info.shape.numel() == 1]:
            self.warn(
                f"Hyperball: {single} have a single element, which cannot turn, and stay as they are: "
                f"`exclude={tuple(single)}` leaves them out."
            )
        for target, radius in zip(new, radii.unbind(), strict=True):
            target.radius = radius

    # -- training ------------------------------------------------------------------------------------------------------

    def on_gradients(self, step: Step) -> None:
        """All callbacks have begun, and none has changed a weight yet."""
        if not self._has_begun:
            self._has_begun = True
            # In a loop of one's own, what else is attached to the optimizer.
            trainer = self.run.trainer
            callbacks = hooks_of(step.optimizer).works if trainer is None else trainer.callbacks
            self._refuse_other_decay(callbacks)
            self._warn_of_what_is_undone(callbacks[: callbacks.index(self)])

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        self.on_gradients(step)  # LBFGS begins before there are gradients
        optimizer = step.optimizer
        follow_moved(self._targets, optimizer)
        moving = []
        for group, targets in zip(optimizer.param_groups, self._targets.of(optimizer), strict=True):
            flags = will_move(optimizer, [target.info.parameter for target in targets])
            if any(flags):
                moving.append((group, list(itertools.compress(targets, flags))))
        for group, targets in moving:
            _refuse_decay(optimizer, group, targets)
        held = [target for _, targets in moving for target in targets]
        self._begin_targets(held)
        self._moving[optimizer] = moving
        weights = local_pieces([target.info.parameter for target in held])
        self._before[optimizer] = refreshed(self._before.get(optimizer, []), weights)

    @torch.no_grad()
    def after_step(self, step: Step, *, is_real: bool) -> None:
        moving = self._moving.pop(step.optimizer, [])
        if not is_real or not moving:
            return
        held = [target for _, targets in moving for target in targets]
        radii = torch.stack([target.radius for target in held if target.radius is not None])
        lengths = torch.cat([_filled(radii, rate_of(step.optimizer, group), len(ts)) for group, ts in moving])
        weights = [target.info.parameter for target in held]
        turn_(weights, self._before[step.optimizer], lengths, radii, sharding=self._sharding)

    def _refuse_other_decay(self, callbacks: Sequence[Any]) -> None:
        """Refuse callbacks that decay the same weights.

        Raises:
            MisconfigurationException: There is one.
        """
        turned = {id(target.info.parameter): target.info for target in self._targets}
        for callback in callbacks:
            found: list[str] = []
            if isinstance(callback, _DECAYS) or (isinstance(callback, PenaltyCallback) and callback.decays):
                found = [info.name for info in turned.values() if callback.selects(info)]
            elif isinstance(callback, WeightDecay) and callback.run is not None:
                found = [
                    info.name
                    for info, _, _, value, factor, _ in callback.by_parameter()
                    if id(info.parameter) in turned and (value or (factor and callback.rules.set_decay))
                ]
            if found:
                raise MisconfigurationException(_refusal(type(callback).__name__, found))

    def _warn_of_what_is_undone(self, before: Sequence[Any]) -> None:
        """Callbacks act in their order: zeros of a proximal step and constraints last only behind this one."""
        for callback in before:
            if isinstance(callback, WeightConstraint) or getattr(callback, "method", "") == "proximal":
                undone = [target.info.name for target in self._targets if callback.selects(target.info)]
                if undone:
                    who = type(callback).__name__
                    self.warn(
                        f"{who} acts before Hyperball, which then moves {_shown(undone)} again, so that its effect on "
                        f"them does not last: put {who} behind Hyperball in the list of callbacks, or attach it later."
                    )

    def save(self) -> dict[str, Any]:
        """The norm of each matrix at the start, by name."""
        return {"radii": {t.info.name: t.radius.item() for t in self._targets if t.radius is not None}}


def _refuse_decay(optimizer: Optimizer, group: dict[str, Any], targets: Sequence[_Target]) -> None:
    """Refuse an optimizer that decays the same weights.

    Raises:
        MisconfigurationException: It does.
    """
    if not group.get("weight_decay"):
        return
    parts = hooks_of(optimizer).parts
    decaying = [t.info.name for t in targets if parts is None or parts.setting_of(t.info.parameter)[1]]
    if decaying:
        raise MisconfigurationException(_refusal(type(optimizer).__name__, decaying))


def _refusal(who: str, names: Sequence[str]) -> str:
    return (
        f"{who} decays {_shown(names)}, whose norm Hyperball keeps: both together do nothing but shorten steps. Set "
        "the weight decay to 0, for example by WeightDecay(0.0), or exclude these weights from one of the two."
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _filled(like: Tensor, value: float | Tensor, count: int) -> Tensor:
    """A number as often as asked for; one on the device stays there."""
    if isinstance(value, torch.Tensor):
        return value.to(like).expand(count)
    return like.new_full((count,), value)
