"""Where may the weights lie after every step?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_regularize._steps.buckets import calls
from lightning_regularize._steps.hooks import Step
from lightning_regularize._steps.targets import Targets
from lightning_regularize._trainer.strategies import check_view, check_weights_are_the_optimizers
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._saved import POSITIVE, TENSOR
from lightning_regularize.projections import Box, MaxNorm, NonNegative, Projection, SpectralBall

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import lightning.pytorch as pl
    from torch import Tensor

    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.selection import ParameterInfo, Rule


@dataclass(eq=False)
class _Target:
    """A parameter, how to look at it, and what it is projected by."""

    info: ParameterInfo
    view: tuple[int, ...]
    dim: tuple[int, ...] | None
    projection: Projection | None = None  # known when training begins
    vector: Tensor | None = None

    def as_units(self) -> Tensor:
        """The weight in the shape in which the norms of units run over ``dim``."""
        weight = self.info.parameter.detach()
        return weight if tuple(weight.shape) == self.view else weight.view(self.view)


def _project_(targets: Sequence[_Target]) -> Tensor:
    """Project the weights of targets with the same projection and ``dim``."""
    projection: Any = targets[0].projection
    options: dict[str, Any] = {"dim": targets[0].dim}
    if isinstance(projection, SpectralBall):
        options["vector"] = [target.vector for target in targets]
    weights = [target.as_units() for target in targets]
    changed: list[Tensor] = [projection.project_(w, **options) for (w,) in calls(projection.takes_lists, weights)]
    if len(changed) == 1:
        return changed[0]
    found = torch.stack([each.to(changed[0].device) for each in changed])
    return found.any()


class WeightConstraint(Regularizer):
    r"""Projects weights onto a set after every real step, so that a hard limit holds in training and in checkpoints.

    .. math:: w \leftarrow \arg\min_{x \in C} \lVert x - w \rVert_2

    It acts on the parameters of the optimizer that stepped, after the update and never after a step that a GradScaler
    skipped; validation, weight averaging and checkpoints see the projected weights. If an optimizer steps by another
    one, and moves weights after it as Lookahead does, they are projected again at the end of the batch; in a loop of
    one's own that is left to the loop. Norms of units are over their
    incoming weights, whatever the layer, see :func:`~lightning_regularize.units.norm_dims`. If in the first epoch
    the constraint changes nothing, it warns once.

    Args:
        projection: One of :mod:`lightning_regularize.projections`. A relative radius is taken of the weights at the
            start of training, and remembered in checkpoints.
        include: Rules for what is constrained.
        exclude: Rules for what is not.

    Raises:
        TypeError: ``projection`` is none, or a rule is of no known type.
        ValueError: A rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import WeightConstraint
        >>> from lightning_regularize.projections import MaxNorm
        >>> trainer = Trainer(callbacks=[WeightConstraint(MaxNorm(3.0))], logger=False, accelerator="cpu")

    References:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.
    """

    def __init__(
        self, projection: Projection, *, include: Sequence[Rule] = ("weight",), exclude: Sequence[Rule] = ()
    ) -> None:
        super().__init__(locals())
        if not isinstance(projection, Projection):
            raise TypeError(
                f"`projection` should be one of lightning_regularize.projections, such as MaxNorm(3.0), "
                f"got {projection!r}."
            )
        self.projection = projection

    state_layouts: ClassVar[dict[str, Layout]] = {"radii": {"*": POSITIVE}, "vectors": {"*": TENSOR}}

    def identity(self) -> dict[str, Any]:
        """Projections of two kinds are two constraints."""
        return {**super().identity(), "projection": type(self.projection).__name__}

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        check_weights_are_the_optimizers(run.trainer, "WeightConstraint")
        infos = self.select(run, "nothing to constrain")
        self.check_real(infos)
        self.warn_if_no_effect(run, infos)
        self._sharding, self._has_begun = run.sharding(), False
        self._bound: Tensor | None = None
        self._is_checked = False
        self._targets: Targets[_Target] = Targets(run.infos, self._learn, move=self._move)

    def _learn(self, info: ParameterInfo) -> _Target | None:
        if not self.selects(info):
            return None
        if is_parametrized(info):
            raise MisconfigurationException(
                f"WeightConstraint cannot hold for parametrized weights, which are computed anew from {info.name!r}: "
                "leave it out by `exclude`, or take the parametrization away."
            )
        is_elementwise = isinstance(self.projection, (Box, NonNegative))
        if not is_elementwise and self._sharding.is_flat(info.parameter):
            raise MisconfigurationException(
                f"{type(self.projection).__name__} needs norms of whole units, and FSDP1 cuts weights anywhere: use "
                "ModelParallelStrategy with fully_shard (FSDP2), or Box or NonNegative, which act on each weight."
            )
        view, dim = tuple(info.shape), None
        if self.projection.per_unit:
            asked, argument = getattr(self.projection, "dim", None), f"{type(self.projection).__name__}(..., dim=...)"
            try:
                view, dim = self.units(info, asked, argument)
                self.projection.check_shape(view, dim)
            except ValueError as error:
                raise ValueError(f"WeightConstraint: {info.name!r}: {error}") from error
        elif is_elementwise:
            view = tuple(info.parameter.shape)  # a piece will do
        check_view(info.name, info.parameter, view)
        target = _Target(info, view, dim)
        if self._has_begun and info.parameter.requires_grad:
            self._begin_target(target)
        return target

    def _move(self, info: ParameterInfo, target: _Target) -> _Target | None:
        """A weight that is in another place of the model keeps its radius, if rules select it there."""
        moved = self._learn(info)
        if moved is not None and moved.view == target.view:
            moved.projection, moved.vector = target.projection, target.vector
        return moved

    def begin(self, run: Run) -> None:
        is_resumed = any(watch.steps for watch in run.watches)
        if is_resumed and getattr(self.projection, "relative", False) and not self._saved.get("radii"):
            self.warn(
                "The checkpoint does not hold the norms at the start of training: WeightConstraint takes its radius "
                "relative to the weights as they are now."
            )
        for target in self._targets:
            if target.info.parameter.requires_grad:  # a frozen one begins when it is trained
                self._begin_target(target)
        self._has_begun = True

    def _begin_target(self, target: _Target) -> None:
        """What is relative to the weights at the start is known from a checkpoint, or can be measured.

        Raises:
            ValueError: The weights at the start have no norm to be relative to.
        """
        name, weight = target.info.name, target.info.parameter.detach()
        radius = self._saved.get("radii", {}).get(name)
        if getattr(self.projection, "relative", False) and radius is not None:
            target.projection = type(self.projection)(radius, relative=False)  # type: ignore[call-arg]
        else:
            try:
                target.projection = self.projection.at_start(weight)
            except ValueError as error:
                raise ValueError(f"WeightConstraint: {name!r}: {error} `exclude=({name!r},)` leaves it out.") from error
        if isinstance(target.projection, SpectralBall):
            saved = self._saved.get("vectors", {}).get(name)
            start = target.projection.warm_start(weight.view(target.view), dim=target.dim)
            target.vector = start if saved is None else saved.to(start)

    # -- training ------------------------------------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        """Refuse what cannot be constrained any more before weights change."""
        moved = [t for targets in self._targets.of(step.optimizer) for t in targets if not is_in_place(t.info)]
        for target in moved:
            self._targets.forget(target.info.parameter)
        for targets in self._targets.of(step.optimizer):
            for target in targets:
                if target.projection is None and target.info.parameter.requires_grad:
                    self._begin_target(target)

    def after_step(self, step: Step, *, is_real: bool) -> None:
        alike: dict[Hashable, list[_Target]] = {}
        for targets in self._targets.of(step.optimizer) if is_real else ():
            for target in targets:
                if target.info.parameter.requires_grad:
                    alike.setdefault((id(target.projection), target.dim), []).append(target)
        for those in alike.values():
            changed = _project_(those)
            self._bound = changed if self._bound is None else self._bound | changed.to(self._bound.device)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """An optimizer that steps by another one may have moved the weights once more, as Lookahead does."""
        for watch in self.run.watches:
            for leaf in watch.leaves if watch.may_move_weights_later else ():
                self.after_step(Step(leaf, watch, max(watch.number(leaf) - 1, 0)), is_real=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once an epoch the device is asked whether anything was changed at all."""
        if self._is_checked or self._bound is None:
            return
        self._is_checked = True
        if not self.run.largest(float(self._bound)):
            norm = "At torch's default initialization the norm of a unit's incoming weights is about 0.58."
            hint = norm if isinstance(self.projection, MaxNorm) else "The weights lie inside by themselves."
            self.warn(
                f"{self.projection} changed no weight in a whole epoch: unless weights grow, it does nothing. {hint}"
            )

    def save(self) -> dict[str, Any]:
        """The radii that were relative to the weights at the start, and the directions of power iterations."""
        named = {target.info.name: target for target in self._targets}
        radii = {name: t.projection.radius for name, t in named.items() if hasattr(t.projection, "radius")}  # type: ignore[union-attr]
        vectors = {name: t.vector.cpu() for name, t in named.items() if t.vector is not None}
        return {"radii": radii, "vectors": vectors}


def is_in_place(info: ParameterInfo) -> bool:
    """Does the layer still hold the parameter under its name? A pruning mask or a parametrization moves it."""
    return info.name.rpartition(".")[2] in info.owner._parameters


def is_parametrized(info: ParameterInfo) -> bool:
    """Is the tensor that the layer uses computed from this parameter? Two ways of torch's, the newer one first."""
    path, _, leaf = info.name.rpartition(".")
    if ".parametrizations." in f".{path}.":
        return True
    stem, _, suffix = leaf.rpartition("_")
    return suffix in ("orig", "g", "v") and hasattr(info.owner, stem) and stem not in info.owner._parameters
