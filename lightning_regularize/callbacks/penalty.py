"""What pulls weights to zero while they train?"""

from __future__ import annotations

import contextlib
import functools
import itertools
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, final
from weakref import WeakSet

import torch

from lightning_regularize._checks import check_number, check_positive_integer, check_rounding
from lightning_regularize._joint import joint_value
from lightning_regularize._sharding import gathered
from lightning_regularize._steps.buckets import calls
from lightning_regularize._steps.targets import Targets
from lightning_regularize._steps.watch import stepping_optimizers
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.strategies import check_view
from lightning_regularize._used import is_packed
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._penalty_methods import Alike, Gradient, Method, Proximal, Target, arranged
from lightning_regularize.callbacks._rounding import Rounding
from lightning_regularize.callbacks._weight_groups import OutputUnits, WeightGroups
from lightning_regularize.penalties import L1, L2, ElasticNet, Penalty
from lightning_regularize.schedules import Constant, Schedule, as_schedule, check_total_steps
from lightning_regularize.selection import DEFAULT_EXCLUDE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize._steps.watch import Watch
    from lightning_regularize.schedules import Position
    from lightning_regularize.selection import ParameterInfo, Rule

_METHODS: dict[str, type[Method]] = {"gradient": Gradient, "proximal": Proximal}


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
        self.every_n_steps = check_positive_integer(self.arguments.get("every_n_steps", 1), "`every_n_steps`")
        rounding, self.seed = self.arguments.get("rounding", "nearest"), self.arguments.get("seed", 0)
        check_rounding(rounding, self.seed)
        self.rounds_at_random = rounding == "stochastic"
        if self.rounds_at_random and self.method != "gradient":
            raise ValueError(
                f"`rounding='stochastic'` is for what is added to gradients, and needs method='gradient', got "
                f"{self.method!r}."
            )

    @property
    @abstractmethod
    def name(self) -> str:
        """What the logged value is called, ``penalty/<name>``."""

    @abstractmethod
    def penalty(self) -> Penalty:
        """The penalty at unit strength."""

    @property
    def decays(self) -> bool:
        """Does it shrink weights, as weight decay does?"""
        return isinstance(self.penalty(), (L2, ElasticNet))

    @property
    def groups(self) -> WeightGroups:
        """What a penalty per unit takes for units."""
        return OutputUnits(getattr(self.penalty(), "dim", None))

    def strength(self, group: dict[str, Any], step: int) -> float:
        """The strength for a parameter group in step number ``step``."""
        return self.run.clock.value(self.schedule, group, step)  # type: ignore[no-any-return]

    def is_due(self, step: Step) -> bool:
        """Does it act on this step?"""
        return (step.number + 1) % self.every_n_steps == 0

    def check(self, run: Run) -> None:
        needs_shapes = self.penalty().per_unit
        infos = self.select(run, "nothing to pull at", initialized=needs_shapes)
        self._sharding = run.sharding()
        self._method.check(run, self)
        self._targets: Targets[Target] = Targets(self._look, self._learn, arrange=arranged)
        is_proximal = self.method == "proximal"
        remedy = "a larger strength" if is_proximal else "rounding='stochastic', which is right in the mean"
        self.rounded = Rounding(
            self,
            infos,
            who=f"{type(self).__name__}(method={self.method!r})",
            adds_to_gradients=not is_proximal,
            remedy=f", or {remedy}",
            is_constant=isinstance(self.schedule, Constant),
        )
        self._checked: WeakSet[Optimizer] = WeakSet()
        for optimizer in run.optimizers:
            for leaf in stepping_optimizers(optimizer):
                self._check_optimizer(leaf)
        if needs_shapes:
            groups = [lists for leaf in self._checked for _, lists in self.targets(leaf)]
            with self._misconfigurations():
                self.groups.check(groups)
        self.warn_if_no_effect(run, infos)
        if packed := [info.name for info in infos if info.parameter.requires_grad and is_packed(info)]:
            self.warn(
                f"{type(self).__name__} acts on the stored numbers of {packed[0]!r}, a packed weight, and not on those "
                "that its layer uses: leave it out by `exclude` if that is not meant."
            )

    def _look(self) -> list[ParameterInfo]:
        infos: list[ParameterInfo] = self.run.infos()
        if self.penalty().per_unit:
            with self._misconfigurations():
                self.groups.look(self, infos)
        return infos

    @contextlib.contextmanager
    def _misconfigurations(self, what: str = "") -> Iterator[None]:
        """What cannot be grouped is a misconfiguration of the run.

        Raises:
            MisconfigurationException: Instead of a ValueError.
        """
        try:
            yield
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}{what}: {error}") from error

    def _learn(self, info: ParameterInfo) -> Target | None:
        if not self.selects(info):
            return None
        self._method.check_weight(self, info)
        penalty = self.penalty()
        needs = "the norms of whole units" if penalty.per_unit else "" if penalty.takes_pieces else "whole weights"
        if needs and self._sharding.is_flat(info.parameter):
            raise MisconfigurationException(
                f"{type(self).__name__} needs {needs}, and FSDP1 cuts weights anywhere: use "
                "ModelParallelStrategy with fully_shard (FSDP2)."
            )
        if not penalty.per_unit:
            return Target(info)
        with self._misconfigurations(f" does not know what the units of {info.name!r} are"):
            target = self.groups.target(self, info)
        if target is not None and target.view is not None:
            check_view(info.name, info.parameter, target.view, type(self).__name__)
        return target

    def targets(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[Alike]]]:
        """The groups of an optimizer, each with what is penalized in it now."""
        for group, lists in zip(optimizer.param_groups, self._targets.of(optimizer), strict=True):
            trained = [alike.where([p.requires_grad for p in alike.parameters]) for alike in lists]
            yield group, [alike for alike in trained if alike.targets]

    def on_gradients(self, step: Step) -> None:
        if self.logs(step):
            self._log(step.watch)
        self._method.on_gradients(self, step)

    def before_step(self, step: Step) -> None:
        if step.optimizer not in self._checked:  # made since the last step
            self._check_optimizer(step.optimizer)
        self._method.before_step(self, step)

    def after_step(self, step: Step, *, is_real: bool) -> None:
        if is_real and self.is_due(step):
            self._method.after_step(self, step)

    def _check_optimizer(self, leaf: Optimizer) -> None:
        self._checked.add(leaf)
        self._method.check_optimizer(self, leaf)

    @torch.no_grad()
    def _log(self, watch: Watch) -> None:
        """The value of what the optimizer minimizes beside the loss, at the weights that the step finds."""
        penalty: Any = self.penalty()
        values: list[Tensor] = []
        flat: list[torch.nn.Parameter] = []  # FSDP1's pieces, whose values are still to be added up over ranks
        of_flat: list[Tensor] = []
        for leaf in watch.leaves:
            for group, lists in self.targets(leaf):
                strength = self.strength(group, watch.number(leaf)) if lists else 0.0
                for alike in lists:
                    are_flat = [self._sharding.is_flat(parameter) for parameter in alike.parameters]
                    value = functools.partial(penalty.value, strength=strength, dim=alike.dim)
                    whole = alike.where([not is_flat for is_flat in are_flat])
                    with whole.as_used():
                        if parts := [part for part in whole.parts if part is not None]:
                            values += joint_value(penalty, parts, whole.parameters, strength)
                            continue
                        units = whole.as_units(whole.parameters)
                        if not penalty.takes_pieces:
                            units = list(map(gathered, units))
                        values += [value(each) for (each,) in calls(penalty.takes_lists, units)]
                    pieces = list(itertools.compress(alike.parameters, are_flat))
                    of_flat += map(value, pieces)
                    flat += pieces
        if flat:
            values.append(self._sharding.reduce(torch.stack(of_flat), flat).sum())
        if not values:
            return
        number = self.number_among(type(self))
        suffix = f" {label}" if (label := self.run.label(watch)) else ""
        total = torch.stack([value.to(values[0].device) for value in values]).sum()
        self.run.log({f"penalty/{self.name}{number}{suffix}": total})


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
        rounding: How half-precision gradients are rounded when the penalty's is added: "nearest", or "stochastic", at
            random so that the mean is right, where a small penalty would be lost beside large gradients.
        seed: Of stochastic rounding.

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
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
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
        rounding: How half-precision gradients are rounded when the penalty's is added: "nearest", or "stochastic", at
            random so that the mean is right, where a small penalty would be lost beside large gradients.
        seed: Of stochastic rounding.

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
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
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
        rounding: How half-precision gradients are rounded when the penalty's is added: "nearest", or "stochastic", at
            random so that the mean is right, where a small penalty would be lost beside large gradients.
        seed: Of stochastic rounding.

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
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
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
        return (self.l1 + self.l2) * self.run.clock.value(self.schedule, group, step)  # type: ignore[no-any-return]
