"""What pulls weights to zero while they train?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final
from weakref import WeakSet

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_regularize._checks import check_number
from lightning_regularize._sharding import local_tensor, settle_gradient_
from lightning_regularize._steps.clock import rate_of
from lightning_regularize._steps.targets import Targets
from lightning_regularize._steps.watch import stepping_optimizers
from lightning_regularize._trainer.strategies import (
    check_gradients_are_the_modules,
    check_view,
    check_weights_are_the_optimizers,
)
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.decay import HALF
from lightning_regularize.penalties import L1, L2, ElasticNet, GroupLasso, Penalty
from lightning_regularize.projections import norm_dims
from lightning_regularize.schedules import Constant, Schedule, as_schedule, check_total_steps
from lightning_regularize.selection import DEFAULT_EXCLUDE, is_normalized, tensor_name
from lightning_regularize.step_sizes import knows, step_size, unknown_metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize._steps.watch import Watch
    from lightning_regularize.schedules import Position, ScheduleLike
    from lightning_regularize.selection import ParameterInfo, Rule
    from lightning_regularize.step_sizes import StepSize

_PIECE = 2**20  # elements of a weight for which a threshold of its own is made at a time


class _Target(NamedTuple):
    """A parameter that is penalized, and how to look at it."""

    info: ParameterInfo
    view: tuple[int, ...] | None
    dim: tuple[int, ...] | None

    @property
    def parameter(self) -> torch.nn.Parameter:
        return self.info.parameter

    def as_units(self, other: Any = None) -> tuple[Tensor, Any]:
        """The weight, and a tensor like it, in the shape in which the norms of units run over ``dim``."""
        weight = self.parameter.detach()
        if self.view is not None and tuple(weight.shape) != self.view:
            weight = weight.view(self.view)
            other = other.view(self.view) if isinstance(other, torch.Tensor) and other.dim() else other
        return weight, other


class PenaltyCallback(Regularizer):
    """The base of all penalties on weights: it says when, on what and how strongly; a subclass says which penalty.

    Args:
        arguments: The ``locals()`` of the subclass' constructor.
        strength: A number of at least 0, a schedule, or a callable from a position to a number.
    """

    def __init__(self, arguments: Mapping[str, Any], strength: float | Schedule | Callable[[Position], float]) -> None:
        super().__init__(arguments)
        self.schedule = as_schedule(strength, name="strength")
        self.total_steps = check_total_steps(self.arguments["total_steps"])
        self.method = self.arguments["method"]
        if self.method not in _METHODS:
            raise ValueError(f"`method` should be 'gradient' or 'proximal', got {self.method!r}.")
        self._method = _METHODS[self.method]()

    @property
    @abstractmethod
    def name(self) -> str:
        """What the logged value is called, ``penalty/<name>``."""

    @abstractmethod
    def penalty(self) -> Penalty:
        """The penalty at unit strength."""

    @property
    def schedules(self) -> Sequence[ScheduleLike]:
        """The schedule of the strength."""
        return (self.schedule,)

    def strength(self, group: dict[str, Any], step: int) -> float:
        """The strength for a parameter group in step number ``step``."""
        return self.run.value(self.schedule, group, step)  # type: ignore[no-any-return]

    def check(self, run: Run) -> None:
        needs_shapes = self.penalty().per_unit
        infos = self.select(run, "nothing to pull at", initialized=needs_shapes)
        self._sharding = run.sharding()
        self._method.check(run, self, infos)
        self._targets: Targets[_Target] = Targets(run.infos, self._learn)
        self._rounding = _Rounding(any(info.parameter.dtype in HALF for info in infos))
        self._checked: WeakSet[Optimizer] = WeakSet()
        for optimizer in run.optimizers:
            for leaf in stepping_optimizers(optimizer):
                self._check_optimizer(leaf)
        self.warn_if_no_effect(run, infos)

    def _learn(self, info: ParameterInfo) -> _Target | None:
        if not self.selects(info):
            return None
        if not self.penalty().per_unit:
            return _Target(info, None, None)
        if self._sharding.is_flat(info.parameter):
            raise MisconfigurationException(
                f"{type(self).__name__} needs the norms of whole units, and FSDP1 cuts weights anywhere: use "
                "ModelParallelStrategy with fully_shard (FSDP2)."
            )
        try:
            view, dim = norm_dims(info.owner, tensor_name(info.name), info.shape)
        except ValueError as error:
            raise MisconfigurationException(
                f"{type(self).__name__} does not know what the units of {info.name!r} are, of shape "
                f"{tuple(info.shape)}: leave it out by `exclude`."
            ) from error
        check_view(info.name, info.parameter, view)
        return _Target(info, view, dim)

    def targets(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[_Target]]]:
        """The groups of an optimizer, each with what is penalized in it now."""
        for group, targets in zip(optimizer.param_groups, self._targets.of(optimizer), strict=True):
            yield group, [target for target in targets if target.parameter.requires_grad]

    def on_gradients(self, step: Step) -> None:
        if self.logs(step):
            self._log(step.watch)
        self._method.on_gradients(self, step)

    def before_step(self, step: Step) -> None:
        if step.optimizer not in self._checked:  # made since the last step
            self._check_optimizer(step.optimizer)

    def after_step(self, step: Step, *, is_real: bool) -> None:
        if is_real:
            self._method.after_step(self, step)

    def _check_optimizer(self, leaf: Optimizer) -> None:
        self._checked.add(leaf)
        self._method.check_optimizer(self, leaf)

    def _log(self, watch: Watch) -> None:
        """The value of what the optimizer minimizes beside the loss, at the weights that the step finds."""
        values, parameters = [], []
        for leaf in watch.leaves:
            for group, targets in self.targets(leaf):
                strength = self.strength(group, watch.number(leaf)) if targets else 0.0
                for target in targets:
                    weight, _ = target.as_units()
                    values.append(self.penalty().value(weight, strength, dim=target.dim))
                    parameters.append(target.parameter)
        if not values:
            return
        number = self.number_among(type(self))
        suffix = f" {label}" if (label := self.run.label(watch)) else ""
        self.run.log({f"penalty/{self.name}{number}{suffix}": self._summed(torch.stack(values), parameters)})

    def _summed(self, values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        # Values of DTensors are of the whole already; FSDP1's pieces are still to be added up.
        flat = [i for i, p in enumerate(parameters) if self._sharding.is_flat(p)]
        if flat:
            values[flat] = self._sharding.reduce(values[flat], [parameters[i] for i in flat])
        return values.sum()

    # -- where weights are of low precision ----------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once an epoch has passed it is known whether shrinking rounds to nothing."""
        if isinstance(self.schedule, Constant):
            self._rounding.warn_if_lost(self)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run is not None:
            self._rounding.warn_if_lost(self)
        super().on_train_end(trainer, pl_module)


class _Method(ABC):
    """How a penalty acts on a step."""

    @abstractmethod
    def check(self, run: Run, owner: PenaltyCallback, infos: Sequence[ParameterInfo]) -> None:
        """Refuse a strategy or weights with which it cannot work."""

    @abstractmethod
    def check_optimizer(self, owner: PenaltyCallback, optimizer: Optimizer) -> None:
        """Refuse an optimizer with which it cannot work."""

    def on_gradients(self, owner: PenaltyCallback, step: Step) -> None:  # noqa: B027
        """Gradients are complete."""

    def after_step(self, owner: PenaltyCallback, step: Step) -> None:  # noqa: B027
        """Weights have changed."""


class _Gradient(_Method):
    """The gradient of the penalty is added to that of the loss."""

    def check(self, run: Run, owner: PenaltyCallback, infos: Sequence[ParameterInfo]) -> None:
        if not isinstance(owner.penalty(), L2):
            owner.check_real(infos, f"{type(owner).__name__}(method='gradient')")
        check_gradients_are_the_modules(run.trainer, type(owner).__name__)

    def check_optimizer(self, owner: PenaltyCallback, optimizer: Optimizer) -> None:
        if any(group.get("maximize") and penalized for group, penalized in owner.targets(optimizer)):
            raise MisconfigurationException(
                f"{type(optimizer).__name__}(maximize=True) climbs, and would climb the gradient of "
                f"{type(owner).__name__} as well: use method='proximal', or minimize the negative."
            )

    def on_gradients(self, owner: PenaltyCallback, step: Step) -> None:
        penalty = owner.penalty()
        for group, targets in owner.targets(step.optimizer):
            strength: Any = owner.strength(group, step.number) if targets else 0.0
            scaled = strength if step.scale is None else step.scale * strength
            for target in targets:
                gradient = settle_gradient_(target.parameter)
                if gradient is not None:  # otherwise unused in this step, and no gradient is made for it
                    weight, gradient = target.as_units(gradient)
                    penalty.add_gradient_(gradient, weight, scaled, dim=target.dim)


class _Proximal(_Method):
    """After the step the proximal map of the penalty is applied, in the metric of the optimizer."""

    def check(self, run: Run, owner: PenaltyCallback, infos: Sequence[ParameterInfo]) -> None:
        name = f"{type(owner).__name__}(method='proximal')"
        check_weights_are_the_optimizers(run.trainer, name)
        owner.check_real(infos, name)
        if isinstance(owner.penalty(), L2):
            return
        if found := [info.name for info in infos if is_normalized(info)]:
            raise MisconfigurationException(
                f"{name} makes weights exactly zero, where weight and spectral "
                f"normalization divide zero by zero, and on the scale of {found} the model does not depend: leave "
                "them out by `exclude`, or use method='gradient'."
            )

    def check_optimizer(self, owner: PenaltyCallback, optimizer: Optimizer) -> None:
        for group, penalized in owner.targets(optimizer):
            if penalized and not knows(optimizer):
                raise MisconfigurationException(unknown_metric(optimizer))
            if penalized:
                rate_of(optimizer, group)

    def after_step(self, owner: PenaltyCallback, step: Step) -> None:
        optimizer, rounding = step.optimizer, owner._rounding
        counts = rounding.counts_in(owner, step)
        for group, targets in owner.targets(optimizer):
            strength = owner.strength(group, step.number) if targets else 0.0
            for target in targets if strength else ():
                if target.parameter.grad is None:
                    continue
                size = step_size(optimizer, group, target.parameter)
                if size is None:
                    continue
                before = local_tensor(target.parameter).clone() if counts and target.parameter.dtype in HALF else None
                _shrink_(owner.penalty(), target, size, strength)
                if before is not None:
                    rounding.count(before, local_tensor(target.parameter))
        rounding.sum_up()


_METHODS: dict[str, type[_Method]] = {"gradient": _Gradient, "proximal": _Proximal}


def _shrink_(penalty: Penalty, target: _Target, step: StepSize, strength: float) -> None:
    if step.square is None or penalty.per_unit:
        weight, _ = target.as_units()
        lengths = step.lengths()
        if isinstance(lengths, torch.Tensor) and lengths.dim():  # this rank's, and so is the view's shape
            lengths = lengths.view_as(local_tensor(weight))
        penalty.proximal_(weight, lengths * strength, dim=target.dim)
        return
    weight = local_tensor(target.parameter)
    pieces = weight.chunk(-(-weight.numel() // _PIECE)) if weight.numel() > _PIECE else (weight,)
    for piece, piece_step in zip(pieces, step.pieces(len(pieces)), strict=True):
        penalty.proximal_(piece, piece_step.lengths() * strength)


class _Rounding:
    """Do proximal steps move half-precision weights at all?

    Args:
        has_half: Are there such weights?
    """

    def __init__(self, has_half: bool) -> None:
        self._has_half, self._is_done = has_half, False
        self._moved = -1.0  # the largest fraction of weights that a step has moved
        self._counts: list[Tensor] = []

    def counts_in(self, owner: PenaltyCallback, step: Step) -> bool:
        """Is this a step in which to count what moves? Not while the learning rate warms up."""
        if self._is_done or not self._has_half or not (self._moved < 0 or owner.run.logs_now()):
            return False
        positions = [owner.run.clock.position(group, step.number) for group in step.optimizer.param_groups]
        return any(at.lr >= 0.5 * at.peak_lr for at in positions)

    def count(self, before: Tensor, after: Tensor) -> None:
        """Of the weights that were not zero, count those that have changed, and all."""
        self._counts.append(torch.stack([(after != before).sum(), before.count_nonzero()]))

    def sum_up(self) -> None:
        """A step has ended."""
        if self._counts:
            counts, self._counts = self._counts, []
            number, of = torch.stack([each.to(counts[0].device) for each in counts]).sum(dim=0).tolist()
            self._moved = max(self._moved, number / of if of else 0.0)

    def warn_if_lost(self, owner: PenaltyCallback) -> None:
        """Warn once if most weights stay as they are; all ranks should take part."""
        if self._is_done or owner.method == "gradient" or not self._has_half:
            return
        moved = owner.run.largest(self._moved)
        self._is_done = moved >= 0  # else there was no step to tell from
        if 0 <= moved < 0.5:
            owner.warn(
                f"{type(owner).__name__}(method='proximal') hardly acts here: of half-precision weights it moved "
                f"{moved:.0%}, the others are as before when they are rounded. Use float32 weights with "
                "precision='bf16-mixed', or a larger strength."
            )


@final
class L1Penalty(PenaltyCallback):
    r"""Adds the gradient of :math:`a \lVert w \rVert_1`, or takes its proximal step, which reaches exact zeros.

    ``method="gradient"``: :math:`g \leftarrow g + a \operatorname{sign}(w)` once per step, before clipping, whatever
    the accumulation. ``method="proximal"``: after each real step

    .. math:: w \leftarrow \operatorname{sign}(w) \max(|w| - t, 0)

    with the threshold ``t`` that the optimizer's metric asks for, see
    :func:`~lightning_regularize.step_sizes.step_size`. Frozen parameters and those without a gradient are left alone.
    Logged as ``penalty/l1`` whenever Lightning logs, so that the loss can be read together with it.

    Args:
        strength: ``a``, a number of at least 0, a :class:`~lightning_regularize.schedules.Schedule`, or any callable
            from a :class:`~lightning_regularize.schedules.Position` to a number.
        include: Rules for what is penalized.
        exclude: Rules for what is not. By default biases, norms and other vectors.
        method: "gradient" for every optimizer; "proximal" for SGD, Adam, AdamW, NAdam, RMSprop and Adagrad.
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import L1Penalty
        >>> trainer = Trainer(callbacks=[L1Penalty(1e-4, method="proximal")], logger=False, accelerator="cpu")

    References:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.
        Parikh and Boyd, "Proximal Algorithms", 2014.
    """

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        method: Literal["gradient", "proximal"] = "gradient",
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals(), strength)

    name = "l1"

    def penalty(self) -> Penalty:
        """The sum of magnitudes."""
        return L1()


@final
class L2Penalty(PenaltyCallback):
    r"""Adds the gradient of :math:`\tfrac{a}{2} \lVert w \rVert^2`: weight decay coupled to the gradient, as in SGD.

    Under Adam it is rescaled like any gradient; decoupled decay is :class:`~lightning_regularize.WeightDecay`. With
    ``method="proximal"`` each real step is followed by :math:`w \leftarrow w / (1 + t)`. Logged as ``penalty/l2``.

    Args:
        strength: ``a``; see :class:`L1Penalty`.
        include: Rules for what is penalized.
        exclude: Rules for what is not. By default biases, norms and other vectors.
        method: "gradient" or "proximal".
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import L2Penalty
        >>> trainer = Trainer(callbacks=[L2Penalty(1e-4)], logger=False, accelerator="cpu")

    References:
        Hoerl and Kennard, "Ridge Regression", 1970.
    """

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        method: Literal["gradient", "proximal"] = "gradient",
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals(), strength)

    name = "l2"

    def penalty(self) -> Penalty:
        """Half the sum of squares."""
        return L2()


@final
class ElasticNetPenalty(PenaltyCallback):
    r"""Adds the gradient of :math:`a_1 \lVert w \rVert_1 + \tfrac{a_2}{2} \lVert w \rVert^2`, or a proximal step of it.

    In scikit-learn's terms :math:`a_1 = \alpha r` and :math:`a_2 = \alpha (1 - r)`. Logged as ``penalty/elastic_net``.

    Args:
        l1: :math:`a_1`, at least 0.
        l2: :math:`a_2`, at least 0; not both 0.
        schedule: What both are multiplied by: a number, a schedule or a callable from a position to a number.
        include: Rules for what is penalized.
        exclude: Rules for what is not. By default biases, norms and other vectors.
        method: "gradient" or "proximal".
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import ElasticNetPenalty
        >>> trainer = Trainer(callbacks=[ElasticNetPenalty(1e-4, l2=1e-3)], logger=False, accelerator="cpu")

    References:
        Zou and Hastie, "Regularization and Variable Selection via the Elastic Net", 2005.
    """

    def __init__(
        self,
        l1: float,
        l2: float,
        *,
        schedule: float | Schedule | Callable[[Position], float] = 1.0,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        method: Literal["gradient", "proximal"] = "gradient",
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals(), as_schedule(schedule, name="schedule"))
        self.l1, self.l2 = check_number(l1, "`l1`"), check_number(l2, "`l2`")
        if self.l1 + self.l2 == 0:
            raise ValueError("`l1` or `l2` should be positive, got 0 for both.")

    name = "elastic_net"

    def penalty(self) -> Penalty:
        """The mixture of both."""
        return ElasticNet(self.l1 / (self.l1 + self.l2))

    def strength(self, group: dict[str, Any], step: int) -> float:
        """The sum of both strengths, times the schedule."""
        return (self.l1 + self.l2) * self.run.value(self.schedule, group, step)  # type: ignore[no-any-return]


@final
class GroupLassoPenalty(PenaltyCallback):
    r"""Adds the gradient of :math:`a \sum_g \sqrt{|g|}\,\lVert w_g \rVert_2`, where a group is an output unit.

    With ``method="proximal"`` whole neurons and channels become exactly zero. What a unit is, the layer says, see
    :func:`~lightning_regularize.projections.norm_dims`. Logged as ``penalty/group_lasso``.

    Args:
        strength: ``a``; see :class:`L1Penalty`.
        include: Rules for what is penalized.
        exclude: Rules for what is not. By default biases, norms and other vectors.
        method: "gradient" or "proximal".
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import GroupLassoPenalty
        >>> penalty = GroupLassoPenalty(1e-4, method="proximal")
        >>> trainer = Trainer(callbacks=[penalty], logger=False, accelerator="cpu")

    References:
        Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        method: Literal["gradient", "proximal"] = "gradient",
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals(), strength)

    name = "group_lasso"

    def penalty(self) -> Penalty:
        """The norms of output units."""
        return GroupLasso()
