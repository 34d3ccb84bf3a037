"""How does a penalty act on a step: by its gradient, or by a proximal step?"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_regularize._joint import add_joint_gradient_, joint_proximal_
from lightning_regularize._sharding import (
    gathered,
    is_dtensor,
    local_piece,
    local_pieces,
    piece_like,
    settle_gradients_,
    whole_tensor,
)
from lightning_regularize._steps.buckets import HALF, buckets, calls
from lightning_regularize._steps.clock import rate_of
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.strategies import check_gradients_are_the_modules, check_weights_are_the_optimizers
from lightning_regularize._used import Layers, as_used
from lightning_regularize.decay import change_stochastically_, noise_seed
from lightning_regularize.penalties import L2
from lightning_regularize.selection import has_sparse_gradient, is_normalized
from lightning_regularize.step_sizes import differ_by_weight, knows, step_sizes, thresholds, unknown_metric
from lightning_regularize.units import at_least_float32, unit_buckets, unit_dims

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_regularize._heads import Part
    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks.penalty import PenaltyCallback
    from lightning_regularize.selection import ParameterInfo
    from lightning_regularize.step_sizes import StepSize


class Target(NamedTuple):
    """A parameter that is penalized, with the shape in which the norms of its units run over ``dim``.

    ``part`` is what it is of an attention layer, where groups are heads, which lie in several parameters.
    """

    info: ParameterInfo
    view: tuple[int, ...] | None = None
    dim: tuple[int, ...] | None = None
    part: Part | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return self.info.parameter

    def as_units(self, tensor: Tensor) -> Tensor:
        """The parameter, or a tensor of its shape; to be called without gradients."""
        return tensor if self.view is None or tuple(tensor.shape) == self.view else tensor.view(self.view)


class Alike:
    """Targets of a group whose units lie in the same dims, which are penalized by one call."""

    def __init__(self, dim: tuple[int, ...] | None, targets: list[Target]) -> None:
        self.dim, self.targets = dim, targets
        self.parameters = [target.parameter for target in targets]
        self.parts = [target.part for target in targets]
        """What each target is of an attention layer, where groups are heads; else None."""
        self.is_joint = any(part is not None for part in self.parts)
        """Do groups lie in several of the parameters?"""
        self._have_views = any(target.view is not None for target in targets)
        self._layers = Layers(target.info for target in targets)

    def where(self, flags: Sequence[bool]) -> Alike:
        """Those whose flag is set, mostly all."""
        return self if all(flags) else Alike(self.dim, list(itertools.compress(self.targets, flags)))

    def where_in(self, numbers: Sequence[int]) -> Alike:
        """Those with these numbers."""
        return Alike(self.dim, [self.targets[i] for i in numbers])

    def with_gradients(self) -> Alike:
        """Those that a step moves."""
        return self.where([parameter.grad is not None for parameter in self.parameters])

    def as_used(self) -> AbstractContextManager[None]:
        """Meanwhile pruned elements of the parameters are zero, see :func:`~lightning_regularize._used.as_used`."""
        return as_used(self._layers)

    def as_units(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parameters, or tensors of their shapes, see :meth:`Target.as_units`."""
        if not self._have_views:
            return list(tensors)
        return [target.as_units(tensor) for target, tensor in zip(self.targets, tensors, strict=True)]


def arranged(targets: Sequence[Target]) -> list[Alike]:
    """The targets of a group in lists for one call each."""
    by_dim: dict[tuple[int, ...] | None, list[Target]] = {}
    for target in targets:
        by_dim.setdefault(target.dim, []).append(target)
    return [Alike(dim, alike) for dim, alike in by_dim.items()]


class Method(ABC):
    """A way in which a penalty acts on a step."""

    @abstractmethod
    def check(self, run: Run, owner: PenaltyCallback) -> None:
        """Refuse a strategy with which it cannot work."""

    @abstractmethod
    def check_weight(self, owner: PenaltyCallback, info: ParameterInfo) -> None:
        """Refuse a weight on which it cannot act."""

    @abstractmethod
    def check_optimizer(self, owner: PenaltyCallback, optimizer: Optimizer) -> None:
        """Refuse an optimizer with which it cannot work."""

    def on_gradients(self, owner: PenaltyCallback, step: Step) -> None:  # noqa: B027
        """Gradients are complete."""

    def before_step(self, owner: PenaltyCallback, step: Step) -> None:  # noqa: B027
        """Weights are about to change."""

    def after_step(self, owner: PenaltyCallback, step: Step) -> None:  # noqa: B027
        """Weights have changed."""


class Gradient(Method):
    """The gradient of the penalty is added to that of the loss."""

    def check(self, run: Run, owner: PenaltyCallback) -> None:
        check_gradients_are_the_modules(run.trainer, type(owner).__name__)

    def check_weight(self, owner: PenaltyCallback, info: ParameterInfo) -> None:
        if not isinstance(owner.penalty(), L2):
            owner.check_real(info, f"{type(owner).__name__}(method='gradient')")
        if has_sparse_gradient(info):
            raise MisconfigurationException(
                f"{type(owner).__name__}(method='gradient') pulls at every weight, and {[info.name]} have sparse "
                "gradients, for the rows that were looked up: leave them out by "
                "`exclude=(*DEFAULT_EXCLUDE, \"embedding\")`, use `sparse=False`, or method='proximal'."
            )

    def check_optimizer(self, owner: PenaltyCallback, optimizer: Optimizer) -> None:
        if any(group.get("maximize") and penalized for group, penalized in owner.targets(optimizer)):
            raise MisconfigurationException(
                f"{type(optimizer).__name__}(maximize=True) would maximize the penalty of {type(owner).__name__} as "
                "well: use method='proximal', or minimize the negative loss."
            )

    @torch.no_grad()
    def on_gradients(self, owner: PenaltyCallback, step: Step) -> None:
        owner.rounded.begin_step(step, acts=owner.is_due(step))
        penalty = owner.penalty()
        for group, lists in owner.targets(step.optimizer) if owner.is_due(step) else ():
            strength: Any = _strength(owner, group, step) if lists else 0.0
            scaled = strength if step.scale is None else step.scale * strength
            for alike in lists:
                # Without a gradient a parameter is unused in this step, and none is made for it.
                settled = settle_gradients_(alike.parameters)
                found = alike.where([gradient is not None for gradient in settled])
                gradients = found.as_units([gradient for gradient in settled if gradient is not None])
                weights = found.as_units(found.parameters)
                add = functools.partial(_add_, penalty=penalty, strength=scaled, dim=found.dim)
                with found.as_used():
                    if owner.rounds_at_random:
                        _add_at_random_(owner, add, gradients, weights, found.targets, step.number)
                    else:
                        owner.rounded.change(add, gradients, weights, found.parts, together=found.is_joint)

    @torch.no_grad()
    def before_step(self, owner: PenaltyCallback, step: Step) -> None:
        """Measure what the step rounds away: gradients are as it finds them, those of the penalty included."""
        for group, lists in owner.targets(step.optimizer) if owner.rounded.is_followed else ():
            strength = _strength(owner, group, step) if lists and owner.is_due(step) else 0.0
            for alike in (each.with_gradients() for each in lists):
                picked = alike.where_in(owner.rounded.pick(alike.parameters, together=alike.is_joint))
                weights = picked.as_units(picked.parameters)
                terms = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
                with picked.as_used():
                    _add_(terms, weights, picked.parts, owner.penalty(), strength, alike.dim)
                halves = [p.dtype in HALF for p in picked.parameters]
                measured, of_measured = (list(itertools.compress(each, halves)) for each in (picked.parameters, terms))
                owner.rounded.follow(step.optimizer, group, measured, of_measured)


class Proximal(Method):
    """After the step the proximal map of the penalty is applied, in the metric of the optimizer."""

    def check(self, run: Run, owner: PenaltyCallback) -> None:
        check_weights_are_the_optimizers(run.trainer, f"{type(owner).__name__}(method='proximal')")
        if not isinstance(owner.penalty(), L2):
            owner.warn_if_moved_later(run, "zeros do not last")

    def check_weight(self, owner: PenaltyCallback, info: ParameterInfo) -> None:
        name = f"{type(owner).__name__}(method='proximal')"
        owner.check_real(info, name)
        if is_normalized(info) and not isinstance(owner.penalty(), L2):
            raise MisconfigurationException(
                f"{name} makes weights exactly zero, where weight and spectral normalization divide zero by zero, and "
                f"on the scale of {[info.name]} the model does not depend: leave them out by `exclude`, or use "
                "method='gradient'."
            )

    def check_optimizer(self, owner: PenaltyCallback, optimizer: Optimizer) -> None:
        for group, penalized in owner.targets(optimizer):
            if penalized and not knows(optimizer):
                raise MisconfigurationException(f"{type(owner).__name__}: {unknown_metric(optimizer)}")
            if penalized and not owner.penalty().takes_metric and differ_by_weight(optimizer):
                raise MisconfigurationException(
                    f"{type(owner).__name__}(method='proximal') of {owner.penalty()} needs one step size for all "
                    f"weights of a group, as SGD has, and {type(optimizer).__name__} has one for each weight: use SGD, "
                    "or method='gradient'."
                )
            if penalized:
                rate_of(optimizer, group)

    @torch.no_grad()
    def before_step(self, owner: PenaltyCallback, step: Step) -> None:
        """Measure what the optimizer loses of the averages from which step sizes are made."""
        owner.rounded.begin_step(step, acts=owner.is_due(step))
        if not owner.rounded.is_followed or not differ_by_weight(step.optimizer):
            return
        for group, lists in owner.targets(step.optimizer):
            for alike in (each.with_gradients() for each in lists):
                picked = [alike.parameters[i] for i in owner.rounded.pick(alike.parameters)]
                owner.rounded.follow(step.optimizer, group, picked)

    @torch.no_grad()
    def after_step(self, owner: PenaltyCallback, step: Step) -> None:
        optimizer = step.optimizer
        for group, lists in owner.targets(optimizer):
            strength = _strength(owner, group, step) if lists else 0.0
            for alike in (each.with_gradients() for each in lists if strength):
                sizes = step_sizes(optimizer, group, alike.parameters)
                stepped = alike.where([size is not None for size in sizes])
                if stepped.targets:
                    weights = stepped.as_units(stepped.parameters)
                    shrink = functools.partial(_shrink_, penalty=owner.penalty(), strength=strength, dim=alike.dim)
                    known = [size for size in sizes if size is not None]
                    with stepped.as_used():
                        owner.rounded.change(shrink, weights, known, stepped.parts, together=stepped.is_joint)


def _strength(owner: PenaltyCallback, group: dict[str, Any], step: Step) -> float:
    """The strength in a step that stands for several."""
    return owner.every_n_steps * owner.strength(group, step.number)


def _add_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    parts_or_none: Sequence[Part | None],
    penalty: Any,
    strength: Any,
    dim: tuple[int, ...] | None,
) -> None:
    """Add the gradient of a penalty, also of one that has to be given whole weights."""
    if parts := [part for part in parts_or_none if part is not None]:
        add_joint_gradient_(penalty, parts, gradients, weights, strength)
        return
    if penalty.takes_pieces or not any(map(is_dtensor, weights)):
        for g, w in calls(penalty.takes_lists, gradients, weights):
            penalty.add_gradient_(g, w, strength, dim=dim)
        return
    for gradient, weight in zip(gradients, weights, strict=True):
        wide = weight.to(at_least_float32(weight))
        every = gathered(wide)
        term = torch.zeros_like(every)
        penalty.add_gradient_(term, every, strength, dim=dim)
        local_piece(gradient).add_(piece_like(term, wide))


def _add_at_random_(
    owner: PenaltyCallback,
    add: Callable[..., None],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Sequence[Target],
    step: int,
) -> None:
    """Add the gradient of a penalty, to gradients of half precision by rounding at random."""
    together: dict[str, list[int]] = {}
    for i, target in enumerate(targets):
        together.setdefault(target.info.name if target.part is None else target.part.layer, []).append(i)
    for numbers in together.values():
        those, found = [gradients[i] for i in numbers], [targets[i] for i in numbers]
        terms = [torch.zeros_like(each, dtype=torch.float32) if each.dtype in HALF else each for each in those]
        add(terms, [weights[i] for i in numbers], [target.part for target in found])
        for target, gradient, term in zip(found, those, terms, strict=True):
            if term is not gradient:
                seed = noise_seed(owner.seed, step, f"{type(owner).__name__}/{target.info.name}")
                add_term = functools.partial(torch.Tensor.add_, other=local_piece(term))
                change_stochastically_(local_piece(gradient), add_term, seed=seed)


def _shrink_whole_(penalty: Any, weight: Tensor, threshold: float | Tensor, dim: tuple[int, ...] | None) -> None:
    """Apply the proximal map of a penalty that has to be given whole weights."""
    if not is_dtensor(weight):
        penalty.proximal_(weight, threshold, dim=dim)
        return
    every = gathered(weight)
    of_every = whole_tensor(threshold, weight) if isinstance(threshold, torch.Tensor) and threshold.dim() else threshold
    penalty.proximal_(every, of_every, dim=dim)
    local_piece(weight).copy_(piece_like(every, weight))


def _shrink_(
    weights: Sequence[Tensor],
    sizes: Sequence[StepSize],
    parts_or_none: Sequence[Part | None],
    penalty: Any,
    strength: float,
    dim: tuple[int, ...] | None,
) -> None:
    parts = [part for part in parts_or_none if part is not None]
    if sizes[0].square is None:  # for all parameters of the group
        if parts:
            joint_proximal_(penalty, parts, weights, sizes[0].length * strength)
            return
        if not penalty.takes_pieces and any(map(is_dtensor, weights)):
            for weight in weights:
                _shrink_whole_(penalty, weight, sizes[0].length * strength, dim)
            return
        for (w,) in calls(penalty.takes_lists, weights):
            penalty.proximal_(w, sizes[0].length * strength, dim=dim)
        return
    columns: list[list[Any]] = [[size.square for size in sizes], [size.mean for size in sizes]]
    states = [
        [s if s.shape == w.shape else s.view(local_piece(w).shape) for s, w in zip(column, weights, strict=True)]
        for column in columns
        if column[0] is not None
    ]
    if parts:

        def thresholds_of(numbers: Sequence[int]) -> list[Tensor]:
            squares, *means = [[column[i] for i in numbers] for column in states]
            return thresholds([sizes[i] for i in numbers], squares, means[0] if means else [], strength)

        joint_proximal_(penalty, parts, weights, thresholds_of)
        return
    if not penalty.takes_pieces:
        for i, (weight, (square, *mean)) in enumerate(zip(weights, zip(*states, strict=True), strict=True)):
            (threshold,) = thresholds([sizes[i]], [square], mean, strength)
            _shrink_whole_(penalty, weight, threshold, dim)
        return
    # The thresholds of a bucket are made when they are needed, in memory for one bucket.
    if penalty.per_unit:
        arranged = unit_buckets([unit_dims(weight, dim) for weight in weights], weights, *states)
    else:
        arranged = buckets(local_pieces(weights), *states)
    for indices, (bucket, squares, *means) in arranged:
        found = thresholds([sizes[i] for i in indices], squares, means[0] if means else [], strength)
        for w, t in calls(penalty.takes_lists, bucket, found):
            penalty.proximal_(w, t, dim=dim)
