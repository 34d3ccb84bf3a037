"""Weight decay that finds its own strength, so that each matrix keeps below a norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lightning_regularize._checks import check_number, check_positive_integer, is_number
from lightning_regularize._sharding import local_pieces
from lightning_regularize._steps.buckets import multiply_each_
from lightning_regularize._steps.targets import Targets
from lightning_regularize._trainer.strategies import check_weights_are_the_optimizers
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._rounding import Rounding
from lightning_regularize.callbacks._saved import NUMBER, Value
from lightning_regularize.decay import next_multiplier
from lightning_regularize.norms import norms

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl
    from torch import Tensor

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.selection import ParameterInfo, Rule

_BOUNDS = ("start", "warm_start", "inflection_point")
_LARGEST_MULTIPLIER = 0.25  # halves a weight; weights with an RMS above 0.5 would swing farther and farther else
_SMOOTHING = 0.9  # of the square norm whose inflection is looked for


class _Target:
    """A matrix, with its multiplier, bound, smoothed square norm, growth of that and size, as one tensor."""

    def __init__(self, info: ParameterInfo) -> None:
        self.info = info
        self.state: Tensor | None = None


def _is_multiplier(value: object) -> bool:
    return is_number(value) and 0 <= value <= _LARGEST_MULTIPLIER


def _is_bound(value: object) -> bool:
    return is_number(value) and value >= 0


_STATE = ("multiplier", "bound", "smoothed", "growth")


class ConstrainedDecay(Regularizer):
    r"""Constrained parameter regularization: each matrix has its own decay, as strong as its bound needs.

    After each real step, for each matrix with :math:`n` weights,

    .. math:: l \leftarrow \max\Bigl(0,\; l + \frac{\lVert W \rVert^2 - \kappa}{n}\Bigr), \; W \leftarrow (1 - 2l) W

    :math:`\kappa` is ``factor`` times :math:`\lVert W \rVert^2` at the start ("start"), after ``warm_start_steps``
    steps ("warm_start"), or where its growth begins to slow down ("inflection_point", with a look every ``interval``
    steps); until then nothing decays. :math:`l` is at most 0.25, lest large weights change sign. Use it instead of
    weight decay: it warns if the optimizer decays as well.

    Args:
        bound: Where :math:`\kappa` comes from.
        factor: What the square norm is multiplied by, positive; 0.49 for a ball of 0.7 times the norm at the start.
        warm_start_steps: Steps of an optimizer before ``bound="warm_start"`` looks, at least 1; the paper has 1,000 or
            the length of the learning rate's warm-up.
        interval: Steps between two looks of ``bound="inflection_point"``, at least 1.
        include: Rules for what is constrained; by default matrices and the like.
        exclude: Rules for what is not.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: An argument is out of range, or a rule is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import ConstrainedDecay, WeightDecay
        >>> callbacks = [WeightDecay(0.0), ConstrainedDecay("warm_start", warm_start_steps=500)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")

    References:
        Franke et al., "Improving Deep Learning Optimization through Constrained Parameter Regularization", NeurIPS
        2024, https://arxiv.org/abs/2311.09058.
    """

    state_layouts: ClassVar[dict[str, Layout]] = {
        "matrices": {
            "multiplier": {"*": Value(f"a number in [0, {_LARGEST_MULTIPLIER}]", _is_multiplier)},
            "bound": {"*": Value("a number of at least 0, infinite if it is not known", _is_bound)},
            "smoothed": {"*": NUMBER},
            "growth": {"*": Value("a number", lambda value: is_number(value) and not math.isnan(value))},
        }
    }

    def __init__(
        self,
        bound: Literal["start", "warm_start", "inflection_point"] = "inflection_point",
        *,
        factor: float = 1.0,
        warm_start_steps: int = 1000,
        interval: int = 200,
        include: Sequence[Rule] = ("weight",),
        exclude: Sequence[Rule] = (),
    ) -> None:
        super().__init__(locals())
        if bound not in _BOUNDS:
            raise ValueError(f"`bound` should be one of {_BOUNDS}, got {bound!r}.")
        factor = check_number(factor, "`factor`")
        if not factor:
            raise ValueError(f"`factor` should be positive and finite, got {factor!r}.")
        for name, steps in (("warm_start_steps", warm_start_steps), ("interval", interval)):
            check_positive_integer(steps, f"`{name}`")
        self.bound, self.factor = bound, factor
        self.warm_start_steps, self.interval = warm_start_steps, interval

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        check_weights_are_the_optimizers(run.trainer, "ConstrainedDecay")
        infos = self.select(run, "nothing to constrain")
        self.warn_if_no_effect(run, infos)
        self.rounded = Rounding(self, infos, who="ConstrainedDecay", is_constant=False, corrects_itself=True)
        self._sharding, self._has_looked_for_decay = run.sharding(), False
        self._targets: Targets[_Target] = Targets(run.infos, self._learn, move=self._move)

    def _learn(self, info: ParameterInfo) -> _Target | None:
        if not self.selects(info):
            return None
        self.check_real(info)
        return _Target(info)

    def _move(self, info: ParameterInfo, target: _Target) -> _Target | None:
        """A matrix that is in another place of the model goes on, if rules select it there."""
        target.info = info
        return target if self.selects(info) else None

    def begin(self, run: Run) -> None:
        if any(run.steps) and not self._saved.get("matrices"):
            bounds = {
                "start": "are taken of the weights as they are now",
                "warm_start": f"are taken after step {self.warm_start_steps:,}, or now if that is over",
                "inflection_point": "are looked for from now on",
            }
            self.warn(
                "The checkpoint does not hold the norms at the start of training: ConstrainedDecay begins anew, "
                f"without any decay at first, and its bounds {bounds[self.bound]}."
            )
        self._begin_targets(list(self._targets))

    def _begin_targets(self, targets: Sequence[_Target]) -> None:
        new = [target for target in targets if target.state is None]
        if not new:
            return
        square, saved = self._square_norms(new), self._saved.get("matrices", {})
        bound = self.factor * square if self.bound == "start" else torch.full_like(square, math.inf)
        numel = torch.tensor([math.prod(target.info.shape) for target in new], dtype=square.dtype, device=square.device)
        # There is no growth yet that could slow down.
        columns = [torch.zeros_like(square), bound, square.clone(), torch.full_like(square, -math.inf), numel]
        for target, state in zip(new, torch.stack(columns, dim=1), strict=True):
            for i, key in enumerate(_STATE):
                if target.info.name in saved.get(key, {}):
                    state[i] = saved[key][target.info.name]
            target.state = state

    def _square_norms(self, targets: Sequence[_Target]) -> Tensor:
        return norms([target.info.parameter for target in targets], sharding=self._sharding).square()

    # -- training ------------------------------------------------------------------------------------------------------

    def on_gradients(self, step: Step) -> None:
        """What is new begins with its weights as they are now, before another callback decays them."""
        self._begin_targets([target for targets in self._targets.of(step.optimizer) for target in targets])

    def before_step(self, step: Step) -> None:
        """LBFGS begins before there are gradients. WeightDecay has written its own values by now."""
        if not self._has_looked_for_decay:
            self._has_looked_for_decay = True
            self._warn_of_decay()
        self.on_gradients(step)
        self.rounded.begin_step(step)
        for group, targets in zip(step.optimizer.param_groups, self._targets.of(step.optimizer), strict=True):
            moved = [t.info.parameter for t in targets if t.info.parameter.grad is not None]
            self.rounded.follow(step.optimizer, group, [moved[i] for i in self.rounded.pick(moved)])

    @torch.no_grad()
    def after_step(self, step: Step, *, is_real: bool) -> None:
        """Nothing is read back from the device."""
        held = [t for targets in self._targets.of(step.optimizer) for t in targets if t.info.parameter.requires_grad]
        if not held or not is_real:
            return
        square = self._square_norms(held)
        rows = torch.stack([target.state for target in held if target.state is not None])
        *columns, numel = rows.unbind(dim=1)
        state = dict(zip(_STATE, columns, strict=True))
        self._look_for_bound_(state, square, steps=step.number + 1)
        multiplier = next_multiplier(state["multiplier"], square, state["bound"], numel)
        state["multiplier"] = multiplier.clamp_max(_LARGEST_MULTIPLIER)
        for target, row in zip(held, torch.stack([*state.values(), numel], dim=1), strict=True):
            target.state = row
        weights, factors = local_pieces([target.info.parameter for target in held]), 1 - 2 * state["multiplier"]
        self.rounded.change(multiply_each_, weights, factors.unbind())

    def _look_for_bound_(self, state: dict[str, Tensor], square: Tensor, *, steps: int) -> None:
        if self.bound == "warm_start" and steps >= self.warm_start_steps:  # a GradScaler may skip the very step
            state["bound"] = torch.where(state["bound"].isinf(), self.factor * square, state["bound"])
        elif self.bound == "inflection_point" and steps % self.interval == 0:
            smoothed = torch.lerp(square, state["smoothed"], _SMOOTHING)
            growth = smoothed - state["smoothed"]
            slower = (growth < state["growth"]) & state["bound"].isinf()
            state["bound"] = torch.where(slower, self.factor * square, state["bound"])
            state["smoothed"], state["growth"] = smoothed, growth

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        looked = {
            "warm_start": f"bounds are taken after step {self.warm_start_steps:,}. Give a smaller `warm_start_steps`",
            "inflection_point": f"at none of the looks, one in {self.interval:,} steps, had growth of a norm slowed "
            "down. Give a smaller `interval`, or bound='start'",
        }
        if self.bound not in looked or self.run is None or not any(self.run.steps) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Under ZeroRedundancyOptimizer each rank knows the bounds of what it steps.
        is_known = any(math.isfinite(target.state[1]) for target in self._targets if target.state is not None)
        if not self.run.largest(is_known):
            self.warn(f"ConstrainedDecay has done nothing in {max(self.run.steps):,} steps: {looked[self.bound]}.")

    def _warn_of_decay(self) -> None:
        for optimizer in self.run.optimizers:
            for group, targets in zip(optimizer.param_groups, self._targets.of(optimizer), strict=True):
                if group.get("weight_decay") and targets:
                    self.warn(
                        f"{type(optimizer).__name__} decays weights by weight_decay={float(group['weight_decay']):g} "
                        "that ConstrainedDecay decays as well: set it to 0, for example by WeightDecay(0.0)."
                    )
                    return

    def save(self) -> dict[str, Any]:
        """Multiplier, bound, smoothed square norm and its growth of each matrix, as numbers by name."""
        begun = {t.info: t.state for t in self._targets if t.state is not None}
        states = self.run.from_who_steps(list(begun.values()), [info.parameter for info in begun])
        rows = {info.name: state.tolist() for info, state in zip(begun, states, strict=True)}
        return {"matrices": {key: {name: row[i] for name, row in rows.items()} for i, key in enumerate(_STATE)}}
