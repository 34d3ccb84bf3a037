"""What pulls weights to zero while they train?"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_regularize import _stepping
from lightning_regularize._configuring import model_root
from lightning_regularize._sharding import Sharding, local_tensor, settle_gradient_
from lightning_regularize.callbacks._choosing import check_real, choose, tell_idle
from lightning_regularize.decay import HALF
from lightning_regularize.groups import check_number, function_key, rule_key
from lightning_regularize.penalties import L1, L2, ElasticNet, GroupLasso, Penalty
from lightning_regularize.projections import norm_dims
from lightning_regularize.schedules import Constant, Schedule, as_schedule
from lightning_regularize.selection import DEFAULT_EXCLUDE, check_rules, is_normalized, tensor_name
from lightning_regularize.step_sizes import knows, step_size, unknown_metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_regularize.schedules import Position
    from lightning_regularize.selection import ParameterInfo, Rule
    from lightning_regularize.step_sizes import StepSize

_PIECE = 2**20  # elements of a weight for which a threshold of its own is made at a time


class PenaltyCallback(Callback):
    """The base of all penalties on weights: it says when, on what and how strongly; a subclass says which penalty.

    Args:
        strength: A number of at least 0, a schedule, or a callable from a position to a number.
        include: Rules for what is penalized.
        exclude: Rules for what is not.
        method: "gradient" or "proximal".
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.
    """

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[Rule],
        exclude: Sequence[Rule],
        method: Literal["gradient", "proximal"],
        total_steps: int | None,
    ) -> None:
        super().__init__()
        self.schedule = as_schedule(strength, name="strength")
        self.include = check_rules(include, argument="include")
        self.exclude = check_rules(exclude, argument="exclude")
        if method not in ("gradient", "proximal"):
            raise ValueError(f"`method` should be 'gradient' or 'proximal', got {method!r}.")
        self.method = method
        self._clock = _stepping.Clock(self.schedule, total_steps)
        self._begin_run()

    def _begin_run(self) -> None:
        self._infos: dict[int, ParameterInfo] = {}
        self._dims: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._sharding = Sharding()
        self._steps: _stepping.RealSteps | None = None
        self._logged: dict[int, int] = {}  # the step in which each optimizer's was, for LBFGS evaluates several times
        self._moved = -1.0  # the largest share of half-precision weights that a proximal step has moved
        self._has_half = self._told_rounding = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of the callback and not of a run."""
        constructed = {key: self.__dict__[key] for key in ("schedule", "include", "exclude", "method")}
        return {**constructed, "total_steps": self._clock.total_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._clock = _stepping.Clock(state["schedule"], state.pop("total_steps"))
        self.__dict__.update(state)
        self._begin_run()

    @property
    @abstractmethod
    def name(self) -> str:
        """What the logged value is called, ``penalty/<name>``."""

    @abstractmethod
    def penalty(self) -> Penalty:
        """The penalty at unit strength."""

    @property
    def state_key(self) -> str:
        rules = {"include": [*map(rule_key, self.include)], "exclude": [*map(rule_key, self.exclude)]}
        # A function's repr is an address, which another process does not have.
        schedule = self.schedule
        strength = repr(schedule) if isinstance(schedule, Schedule) else function_key(schedule)
        return self._generate_state_key(strength=strength, method=self.method, **rules)

    def state_dict(self) -> dict[str, Any]:
        return self._clock.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stop()
            self._begin_run()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything is restored, so that what cannot work is told before any weight changes.

        Raises:
            MisconfigurationException: Nothing is penalized, or the strategy or an optimizer cannot work with it.
        """
        root = model_root(trainer, pl_module)
        what, needs_shapes = f"{type(self).__name__} has nothing to pull at", self.penalty().per_unit
        infos = choose(root, what, include=self.include, exclude=self.exclude, initialized=needs_shapes)
        self._check_penalizable(infos)
        self._infos = {id(info.parameter): info for info in infos}
        self._has_half = any(info.parameter.dtype in HALF for info in infos)
        self._sharding = Sharding(root)
        if self.method == "proximal":
            _stepping.check_weights_are_the_optimizers(trainer, f"{type(self).__name__}(method='proximal')")
        else:
            _stepping.check_gradients_are_the_modules(trainer, type(self).__name__)
        self._find_units(infos)
        for optimizer in map(_stepping.torch_optimizer, trainer.optimizers):
            self._check_optimizer(optimizer)
        self._clock.note_rates(trainer)
        tell_idle(trainer, infos, type(self).__name__)

    def _check_penalizable(self, infos: Sequence[ParameterInfo]) -> None:
        if self.method == "proximal" or not isinstance(self.penalty(), L2):
            check_real(infos, f"{type(self).__name__}(method={self.method!r})")
        if self.method == "gradient" or isinstance(self.penalty(), L2):
            return
        if found := [info.name for info in infos if is_normalized(info)]:
            raise MisconfigurationException(
                f"{type(self).__name__}(method='proximal') makes weights exactly zero, where weight and spectral "
                f"normalization divide zero by zero, and on the scale of {found} the model does not depend: leave "
                "them out by `exclude`, or use method='gradient'."
            )

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        groups = [g for g in optimizer.param_groups if any(id(p) in self._infos for p in g["params"])]
        if groups and self.method == "proximal" and not knows(optimizer):
            raise MisconfigurationException(unknown_metric(optimizer))
        if self.method == "gradient" and any(group.get("maximize") for group in groups):
            raise MisconfigurationException(
                f"{type(optimizer).__name__}(maximize=True) climbs, and would climb the gradient of "
                f"{type(self).__name__} as well: use method='proximal', or minimize the negative."
            )

    def _find_units(self, infos: Sequence[ParameterInfo]) -> None:
        if not self.penalty().per_unit:
            return
        if any(self._sharding.is_flat(info.parameter) for info in infos):
            raise MisconfigurationException(
                f"{type(self).__name__} needs the norms of whole units, and FSDP1 cuts weights anywhere: use "
                "ModelParallelStrategy with fully_shard (FSDP2)."
            )
        for info in infos:
            try:
                view, dim = norm_dims(info.owner, tensor_name(info.name), info.shape)
            except ValueError as error:
                raise MisconfigurationException(
                    f"{type(self).__name__} does not know what the units of {info.name!r} are, of shape "
                    f"{tuple(info.shape)}: leave it out by `exclude`."
                ) from error
            _stepping.check_view(info.name, info.parameter, view)
            self._dims[id(info.parameter)] = view, dim

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is restored."""
        self._clock.start(trainer)
        self._steps = _stepping.RealSteps(
            trainer,
            type(self).__name__,
            before=(lambda _: None) if self.method == "gradient" else None,
            after=(lambda i: self._proximal_step(trainer, i)) if self.method == "proximal" else None,
            counts=not isinstance(self.schedule, Constant),
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are complete, and in a closure that is evaluated again they are new."""
        if self._steps is None or _stepping.is_accumulating(trainer):
            return
        index = self._clock.begin(trainer, optimizer)
        self._steps.announce(trainer, optimizer)
        if _stepping.logs_now(trainer) and self._logged.get(index) != trainer.global_step:
            self._logged[index] = trainer.global_step
            self._log(trainer, pl_module, index)
        if self.method == "gradient":
            self._add_gradients(trainer, index)

    # -- what is done ------------------------------------------------------------------------------------------------

    def _add_gradients(self, trainer: pl.Trainer, index: int) -> None:
        scaler = _stepping.loss_scaler(trainer, trainer.optimizers[index])
        penalty = self.penalty()
        for parameter, strength in self._targets(trainer, index):
            gradient = settle_gradient_(parameter)
            if gradient is None:  # unused in this step, and no gradient is made for it
                continue
            scaled = strength
            if scaler is not None:
                scaled = scaler.scale(torch.tensor(strength, dtype=torch.float32, device=gradient.device))
            weight, gradient, dim = self._as_units(parameter, gradient)
            penalty.add_gradient_(gradient, weight, scaled, dim=dim)

    def _proximal_step(self, trainer: pl.Trainer, index: int) -> None:
        optimizer = _stepping.torch_optimizer(trainer.optimizers[index])
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        is_watched = self._watches(trainer, index)
        moved: list[Tensor] = []
        for parameter, strength in self._targets(trainer, index):
            if parameter.grad is None or not strength:
                continue
            step = step_size(optimizer, group_of[id(parameter)], parameter)
            if step is None:
                continue
            before = local_tensor(parameter).clone() if is_watched and parameter.dtype in HALF else None
            self._shrink_(parameter, step, strength)
            if before is not None:
                moved.append(_moved(before, local_tensor(parameter)))
        if moved:
            number, of = torch.stack([counts.to(moved[0].device) for counts in moved]).sum(dim=0).tolist()
            self._moved = max(self._moved, number / of if of else 0.0)

    def _shrink_(self, parameter: Tensor, step: StepSize, strength: float) -> None:
        if step.square is None or self.penalty().per_unit:
            weight, _, dim = self._as_units(parameter, None)
            lengths = step.lengths()
            if isinstance(lengths, torch.Tensor) and lengths.dim():  # this rank's, and so is the view's shape
                lengths = lengths.view_as(local_tensor(weight))
            self.penalty().proximal_(weight, lengths * strength, dim=dim)
            return
        weight = local_tensor(parameter)
        pieces = weight.chunk(-(-weight.numel() // _PIECE)) if weight.numel() > _PIECE else (weight,)
        for piece, piece_step in zip(pieces, step.pieces(len(pieces)), strict=True):
            self.penalty().proximal_(piece, piece_step.lengths() * strength)

    # -- where weights are of low precision --------------------------------------------------------------------------

    def _watches(self, trainer: pl.Trainer, index: int) -> bool:
        """Is this a step in which to count what moves? Not while the learning rate warms up."""
        if self._told_rounding or not self._has_half or not (self._moved < 0 or _stepping.logs_now(trainer)):
            return False
        groups = range(len(_stepping.torch_optimizer(trainer.optimizers[index]).param_groups))
        return any(at.lr >= 0.5 * at.peak_lr for at in (self._clock.position(trainer, index, i) for i in groups))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once an epoch has passed it is known whether shrinking rounds to nothing."""
        if isinstance(self.schedule, Constant):
            self._tell_rounding(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell_rounding(trainer, pl_module)

    def _tell_rounding(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._told_rounding or self.method == "gradient" or not self._has_half:
            return
        moved = trainer.strategy.reduce(torch.tensor(self._moved, device=module.device), reduce_op="max").item()
        self._told_rounding = moved >= 0  # else there was no step to tell from
        if 0 <= moved < 0.5:
            rank_zero_warn(
                f"{type(self).__name__}(method='proximal') hardly acts here: of half-precision weights it moved "
                f"{moved:.0%}, the others are as before when they are rounded. Use float32 weights with "
                "precision='bf16-mixed', or a larger strength."
            )

    def _targets(self, trainer: pl.Trainer, index: int) -> Iterator[tuple[torch.nn.Parameter, float]]:
        """The penalized parameters of one optimizer, with the strength for this step."""
        for i, group in enumerate(_stepping.torch_optimizer(trainer.optimizers[index]).param_groups):
            strength = self._strength(trainer, index, i)
            for parameter in group["params"]:
                if id(parameter) in self._infos and parameter.requires_grad:
                    yield parameter, strength

    def _strength(self, trainer: pl.Trainer, index: int, group_index: int) -> float:
        return self._clock.value(trainer, index, group_index)

    def _as_units(self, parameter: Tensor, other: Any) -> tuple[Tensor, Any, tuple[int, ...] | None]:
        weight = parameter.detach()
        if id(parameter) not in self._dims:
            return weight, other, None
        view, dim = self._dims[id(parameter)]
        if tuple(weight.shape) != view:
            weight = weight.view(view)
            other = other.view(view) if isinstance(other, torch.Tensor) and other.dim() else other
        return weight, other, dim

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, index: int) -> None:
        """The value of what the optimizer minimizes beside the loss, at the weights that the step finds."""
        values = [self._value(parameter, strength) for parameter, strength in self._targets(trainer, index)]
        parameters = [parameter for parameter, _ in self._targets(trainer, index)]
        if not values:
            return
        total = self._summed(torch.stack(values), parameters)
        number = _stepping.number_among(_stepping.alike(trainer, type(self)), self)
        suffix = f" optimizer{index}" if len(trainer.optimizers) > 1 else ""
        module.log(f"penalty/{self.name}{number}{suffix}", total.float())

    def _value(self, parameter: Tensor, strength: float) -> Tensor:
        weight, _, dim = self._as_units(parameter, None)
        return self.penalty().value(weight, strength, dim=dim)

    def _summed(self, values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        # Values of DTensors are of the whole already; FSDP1's pieces are still to be added up.
        flat = [i for i, p in enumerate(parameters) if self._sharding.is_flat(p)]
        if flat:
            values[flat] = self._sharding.reduce(values[flat], [parameters[i] for i in flat])
        return values.sum()

    # -- after training ----------------------------------------------------------------------------------------------

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._steps is not None:
            self._steps.remove()
            self._steps = None


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Of the weights that were not zero, how many are others now, and how many there are."""
    return torch.stack([(after != before).sum(), before.count_nonzero()])


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
        super().__init__(strength, include=include, exclude=exclude, method=method, total_steps=total_steps)

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
        super().__init__(strength, include=include, exclude=exclude, method=method, total_steps=total_steps)

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
        l1, l2 = check_number(l1, "`l1`"), check_number(l2, "`l2`")
        if l1 + l2 == 0:
            raise ValueError("`l1` or `l2` should be positive, got 0 for both.")
        self.l1, self.l2 = l1, l2
        schedule = as_schedule(schedule, name="schedule")
        super().__init__(schedule, include=include, exclude=exclude, method=method, total_steps=total_steps)

    name = "elastic_net"

    @property
    def state_key(self) -> str:
        return f"{super().state_key}[l1={self.l1}, l2={self.l2}]"

    def __getstate__(self) -> dict[str, Any]:
        """As of every penalty, with both strengths."""
        return {**super().__getstate__(), "l1": self.l1, "l2": self.l2}

    def penalty(self) -> Penalty:
        """The mixture of both."""
        return ElasticNet(self.l1 / (self.l1 + self.l2))

    def _strength(self, trainer: pl.Trainer, index: int, group_index: int) -> float:
        return (self.l1 + self.l2) * super()._strength(trainer, index, group_index)


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
        super().__init__(strength, include=include, exclude=exclude, method=method, total_steps=total_steps)

    name = "group_lasso"

    def penalty(self) -> Penalty:
        """The norms of output units."""
        return GroupLasso()
