"""Where may the weights lie after every step?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lightning_regularize._checks import check_positive_integer, name_of, named_errors
from lightning_regularize._projection import schedules_of
from lightning_regularize._sharding import local_piece
from lightning_regularize._steps.buckets import buckets, calls, put_back_, stacked
from lightning_regularize._steps.targets import Targets
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.strategies import check_view, check_weights_are_the_optimizers
from lightning_regularize._used import Layers, as_used, follow_moved, pruning_mask, why_not_held
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._saved import POSITIVE, TENSOR
from lightning_regularize.projections import Box, Function, MaxNorm, NonNegative, Projection, SpectralBall, TopShare
from lightning_regularize.schedules import Constant, Steps, check_total_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.schedules import Schedule
    from lightning_regularize.selection import ParameterInfo, Rule


@dataclass(eq=False)
class _Target:
    """A parameter, how to look at it, and what it is projected by."""

    info: ParameterInfo
    view: tuple[int, ...]
    dim: tuple[int, ...] | None
    projection: Projection | None = None  # known when training begins; of what is scheduled, it has the schedules
    vector: Tensor | None = None

    def as_units(self) -> Tensor:
        """The weight in the shape in which the norms of units run over ``dim``; to be called without gradients."""
        weight = self.info.parameter
        return weight if tuple(weight.shape) == self.view else weight.view(self.view)


def _project_(projection: Any, targets: Sequence[_Target]) -> Tensor:
    """Project the weights of targets with the same ``dim``."""
    options: dict[str, Any] = {"dim": targets[0].dim}
    if isinstance(projection, SpectralBall):
        options["vector"] = [target.vector for target in targets]
    weights = [target.as_units() for target in targets]
    changed: list[Tensor] = [projection.project_(w, **options) for (w,) in calls(projection.takes_lists, weights)]
    if len(changed) == 1:
        return changed[0]
    found = torch.stack([each.to(changed[0].device) for each in changed])
    return found.any()


def _of_one_shape(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """What this rank holds of parameters, in lists of one shape."""
    pieces = [piece for each in parameters if (piece := local_piece(each.detach())).numel()]
    return [those for _, (those,) in buckets(pieces, alike=[each.shape for each in pieces])] if pieces else []


class WeightConstraint(Regularizer):
    r"""Projects weights onto a set after every real step, so that a hard limit holds in training and in checkpoints.

    .. math:: w \leftarrow \arg\min_{x \in C} \lVert x - w \rVert_2

    It acts on the parameters of the optimizer that stepped, after the update and never after a step that a GradScaler
    skipped; validation, weight averaging and checkpoints see the projected weights. If an optimizer steps by another
    one, and moves weights after it as Lookahead does, they are projected again at the end of the batch; in a loop of
    one's own that is left to the loop. Norms of units are over their incoming weights, whatever the layer, see
    :func:`~lightning_regularize.units.norm_dims`. If in the first epoch the constraint changes nothing, it warns once.

    A weight with a pruning mask of torch's is projected as the layer uses it, and the masked elements of the stored one
    stay as they are, if the projection keeps zeros: all but ``Box``, ``SpectralBall``, ``Rank`` and functions do.
    These, packed weights, and weights that a layer computes in any other way, are refused, also when that begins in
    mid-run; frozen ones are refused when they are trained.

    Args:
        projection: One of :mod:`lightning_regularize.projections`, whose bounds may be schedules; a
            :class:`~lightning_regularize.projections.Projection` of one's own; or a function from a weight to a tensor
            of the same shape. A relative radius is taken of the weights at the start of training, and remembered in
            checkpoints. A function gets each weight as a whole: under FSDP2 and tensor parallel it is gathered, and
            FSDP1 is refused. It is tried once before training begins.
        include: Rules for what is constrained.
        exclude: Rules for what is not.
        every_n_steps: It projects after each ``n``-th step of an optimizer, with 10 after steps 10, 20 and so on.
            Between these steps weights leave the set, and after the last one they may be outside of it. A step that a
            GradScaler skips counts, and projects nothing.
        freeze_zeros: From where on weights that are zero stay zero while the others train on: an integer is a step, a
            float in [0, 1] a fraction of the run, None for nowhere. A weight that is zero when a step begins is zero
            when it ends, whoever made it so; the weights are the only state of this, so that a resumed run agrees.
        total_steps: Length of schedules in steps of an optimizer; by default what the Trainer expects.

    Raises:
        TypeError: ``projection`` is neither a projection nor a function, or a rule has an unknown type.
        ValueError: A rule is not understood, or a number is out of range. Before training begins also if a function
            does not return a tensor of the weight's shape, or a schedule leaves the range of what it is for.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import WeightConstraint
        >>> from lightning_regularize.projections import MaxNorm
        >>> trainer = Trainer(callbacks=[WeightConstraint(MaxNorm(3.0))], logger=False, accelerator="cpu")

    References:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.
    """

    def __init__(
        self,
        projection: Projection | Callable[[Tensor], Tensor],
        *,
        include: Sequence[Rule] = ("weight",),
        exclude: Sequence[Rule] = (),
        every_n_steps: int = 1,
        freeze_zeros: int | float | None = None,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals())
        if isinstance(projection, type) or not (isinstance(projection, Projection) or callable(projection)):
            a_class = isinstance(projection, type)
            raise TypeError(
                "`projection` should be one of lightning_regularize.projections, or a function from a weight to a "
                f"tensor of its shape, such as MaxNorm(3.0), got {projection!r}."
                + (f" A class is not a projection yet: write {projection.__name__}(...)." if a_class else "")
            )
        self.projection = projection if isinstance(projection, Projection) else Function(projection)
        self._scheduled = schedules_of(self.projection)
        self.every_n_steps = check_positive_integer(every_n_steps, "`every_n_steps`")
        try:
            self._freeze = Constant(0.0) if freeze_zeros is None else Steps([0.0, 1.0], boundaries=[freeze_zeros])
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"`freeze_zeros` should be a step or a fraction of the run, got {freeze_zeros!r}. Write an integer for "
                "a step, a float in [0, 1] for a fraction, or None."
            ) from error
        self.total_steps = check_total_steps(total_steps)

    state_layouts: ClassVar[dict[str, Layout]] = {"radii": {"*": POSITIVE}, "vectors": {"*": TENSOR}}

    @property
    def schedules(self) -> Sequence[Schedule]:
        """Those of the projection, and when zeros are frozen."""
        return (*self._scheduled.values(), self._freeze)

    def identity(self) -> dict[str, Any]:
        """Projections of two kinds are two constraints."""
        given = self.arguments["projection"]
        name = type(given).__name__ if isinstance(given, Projection) else name_of(given)
        return {**super().identity(), "projection": name}

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        check_weights_are_the_optimizers(run.trainer, "WeightConstraint")
        infos = self.select(run, "nothing to constrain")
        self.warn_if_no_effect(run, infos)
        # Only a Trainer says when a batch ends.
        self.warn_if_moved_later(run, "the constraint does not hold for them", is_followed=run.trainer is not None)
        self._sharding, self._has_begun = run.sharding(), False
        self._bound: Tensor | None = None
        self._is_checked = False
        # In the step under way: what to project by what, and what was zero before it.
        self._due: dict[Optimizer, list[tuple[Projection, list[_Target]]]] = {}
        self._frozen: dict[Optimizer, tuple[Sequence[Tensor], list[Tensor]]] = {}
        self._targets: Targets[_Target] = Targets(run.infos, self._learn, move=self._move)

    def _learn(self, info: ParameterInfo) -> _Target | None:
        if not self.selects(info):
            return None
        self.check_real(info)
        if (why := why_not_held(info)) and (pruning_mask(info) is None or not self.projection.keeps_zeros):
            raise MisconfigurationException(f"WeightConstraint({type(self.projection).__name__}) cannot hold for {why}")
        is_elementwise = isinstance(self.projection, (Box, NonNegative))
        if not is_elementwise and self._sharding.is_flat(info.parameter):
            needs = "whole weights" if isinstance(self.projection, (TopShare, Function)) else "norms of whole units"
            raise MisconfigurationException(
                f"WeightConstraint: {type(self.projection).__name__} needs {needs}, and FSDP1 cuts weights anywhere: "
                "use ModelParallelStrategy with fully_shard (FSDP2), or Box or NonNegative, which act on each weight."
            )
        view, dim = tuple(info.shape), None
        if self.projection.per_unit:
            asked, argument = getattr(self.projection, "dim", None), f"{type(self.projection).__name__}(..., dim=...)"
            with named_errors(f"WeightConstraint: {info.name!r}"):
                view, dim = self.units(info, asked, argument)
                self.projection.check_shape(view, dim)
        elif is_elementwise:
            view = tuple(info.parameter.shape)  # a piece will do
        check_view(info.name, info.parameter, view, "WeightConstraint")
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
        is_resumed = any(run.steps)
        if is_resumed and getattr(self.projection, "relative", False) and not self._saved.get("radii"):
            self.warn(
                "The checkpoint does not hold the norms at the start of training: WeightConstraint takes its radius "
                "relative to the weights as they are now."
            )
        for target in self._targets:
            if target.info.parameter.requires_grad:  # a frozen one begins when it is trained
                self._begin_target(target)
        self._has_begun = True
        horizon = run.clock.total_steps
        for watch in run.watches:
            for group in watch.optimizer.param_groups if self._scheduled else ():
                # A range is left at the beginning or at the end, if at all.
                for number in {watch.steps, watch.steps if math.isinf(horizon) else int(horizon) - 1}:
                    self._projection_at(self._values_in(group, number), number)

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
                with as_used(Layers([target.info])):
                    target.projection = self.projection.at_start(weight)
            except ValueError as error:
                raise ValueError(f"WeightConstraint: {name!r}: {error} `exclude=({name!r},)` leaves it out.") from error
        if isinstance(target.projection, SpectralBall):
            saved = self._saved.get("vectors", {}).get(name)
            start = target.projection.warm_start(weight.view(target.view), dim=target.dim)
            if saved is not None and saved.shape != start.shape:
                raise ValueError(
                    f"WeightConstraint: `vectors[{name!r}]` in the checkpoint should have shape {tuple(start.shape)}, "
                    f"got {tuple(saved.shape)}."
                )
            target.vector = start if saved is None else saved.to(start)
        if isinstance(target.projection, Function):  # called before any weight changes
            with named_errors(f"WeightConstraint: {name!r}"):
                target.projection.project(weight)

    def _values_in(self, group: dict[str, Any], number: int) -> dict[str, float]:
        """The values that the schedules of the projection have for a group in a step, by argument."""
        return {name: self.run.clock.value(schedule, group, number) for name, schedule in self._scheduled.items()}

    def _projection_at(self, values: dict[str, float], number: int) -> Projection:
        """The projection with these values.

        Raises:
            ValueError: A value is out of range.
        """
        projection: Any = self.projection
        with named_errors(f"WeightConstraint: {projection!r} in step {number}"):
            return replace(projection, **values)  # type: ignore[no-any-return]

    # -- training ------------------------------------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        """Refuse what cannot be constrained any more before weights change."""
        follow_moved(self._targets, step.optimizer)
        groups = self._acting(step)
        for target in [t for _, targets in groups for t in targets if t.projection is None]:
            self._begin_target(target)
        is_due = (step.number + 1) % self.every_n_steps == 0
        self._due[step.optimizer] = self._arranged(groups, step.number) if is_due else []
        value = self.run.clock.value
        held = [t.info.parameter for group, ts in groups if ts and value(self._freeze, group, step.number) for t in ts]
        self._frozen[step.optimizer] = held, [stacked(those) == 0 for those in _of_one_shape(held)]

    def _acting(self, step: Step) -> list[tuple[dict[str, Any], list[_Target]]]:
        """The groups of an optimizer, each with what is constrained in it now."""
        groups = zip(step.optimizer.param_groups, self._targets.of(step.optimizer), strict=True)
        return [(group, [t for t in targets if t.info.parameter.requires_grad]) for group, targets in groups]

    def _arranged(
        self, groups: Sequence[tuple[dict[str, Any], list[_Target]]], number: int
    ) -> list[tuple[Projection, list[_Target]]]:
        """Projections, with the values of the step, and what is projected by one call of each.

        Raises:
            ValueError: A value of a schedule is out of range.
        """
        alike: dict[Hashable, tuple[Any, list[_Target]]] = {}
        now: dict[Hashable, Projection] = {}  # the same for all groups in which schedules have the same values
        for group, targets in groups:
            scheduled: Projection | None = None
            if self._scheduled and targets:
                values = self._values_in(group, number)
                key = tuple(values.values())
                scheduled = now[key] = now.get(key) or self._projection_at(values, number)
            for target in targets:
                projection = scheduled or target.projection
                alike.setdefault((id(projection), target.dim), (projection, []))[1].append(target)
        return list(alike.values())

    def after_step(self, step: Step, *, is_real: bool) -> None:
        self._act(step.optimizer)  # nothing is due if the step was skipped, for then it did not begin
        if not step.watch.may_move_weights_later:
            self._forget(step.optimizer)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """An optimizer that steps by another one may have moved the weights once more, as Lookahead does."""
        for watch in self.run.watches:
            for leaf in watch.leaves if watch.may_move_weights_later else ():
                self._act(leaf)
                self._forget(leaf)

    @torch.no_grad()
    def _act(self, optimizer: Optimizer) -> None:
        held, are_zero = self._frozen.get(optimizer, ([], []))
        for those, mask in zip(_of_one_shape(held), are_zero, strict=True):
            put_back_(those, stacked(those).masked_fill_(mask, 0))
        for projection, targets in self._due.get(optimizer, ()):
            with as_used(Layers(target.info for target in targets)):
                changed = _project_(projection, targets)
            self._bound = changed if self._bound is None else self._bound | changed.to(self._bound.device)

    def _forget(self, optimizer: Optimizer) -> None:
        self._frozen.pop(optimizer, None)
        self._due.pop(optimizer, None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once an epoch the device is asked whether anything was changed at all."""
        if self.run is None or self._is_checked or self._scheduled:  # which may not bind before the end
            return
        # All ranks ask, also one that steps none of the weights, as some do under ZeroRedundancyOptimizer.
        bound = self.run.largest(-1.0 if self._bound is None else float(self._bound))
        self._is_checked = bound >= 0
        if bound == 0:
            norm = "At torch's default initialization the norm of a unit's incoming weights is about 0.58."
            hint = norm if isinstance(self.projection, MaxNorm) else "The weights lie inside by themselves."
            self.warn(
                f"{self.projection} changed no weight in a whole epoch: unless weights grow, it does nothing. {hint}"
            )

    def save(self) -> dict[str, Any]:
        """The radii that were relative to the weights at the start, and the directions of power iterations."""
        named = {target.info.name: target for target in self._targets}
        begun: dict[str, Any] = {name: t.projection for name, t in named.items() if t.projection is not None}
        is_relative = getattr(self.projection, "relative", False)
        radii = {name: float(projection.radius) for name, projection in begun.items() if is_relative}
        kept = {name: t.vector for name, t in named.items() if t.vector is not None}
        vectors = self.run.from_who_steps(list(kept.values()), [named[name].info.parameter for name in kept])
        return {"radii": radii, "vectors": {name: v.cpu() for name, v in zip(kept, vectors, strict=True)}}
