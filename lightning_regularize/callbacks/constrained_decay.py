"""Weight decay that finds its own strength, so that each matrix keeps below a norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_regularize import _stepping
from lightning_regularize._configuring import model_root
from lightning_regularize._sharding import Sharding, local_tensor
from lightning_regularize.callbacks._choosing import check_real, choose, tell_idle
from lightning_regularize.decay import decay_, next_multiplier
from lightning_regularize.groups import check_number, rule_key
from lightning_regularize.norms import norms
from lightning_regularize.selection import check_rules

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_regularize.selection import ParameterInfo, Rule

_BOUNDS = ("start", "warm_start", "inflection_point")
_LARGEST_MULTIPLIER = 0.25  # halves a weight; weights with an RMS above 0.5 would swing farther and farther else
_SMOOTHING = 0.9  # of the square norm whose inflection is looked for


class ConstrainedDecay(Callback):
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
        super().__init__()
        if bound not in _BOUNDS:
            raise ValueError(f"`bound` should be one of {_BOUNDS}, got {bound!r}.")
        factor = check_number(factor, "`factor`")
        if not factor:
            raise ValueError(f"`factor` should be positive and finite, got {factor!r}.")
        for name, steps in (("warm_start_steps", warm_start_steps), ("interval", interval)):
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
                raise ValueError(f"`{name}` should be a positive integer, got {steps!r}.")
        self.bound, self.factor = bound, factor
        self.warm_start_steps, self.interval = warm_start_steps, interval
        self.include = check_rules(include, argument="include")
        self.exclude = check_rules(exclude, argument="exclude")
        self._counter = _stepping.StepCounter()
        self._begin_run()

    def _begin_run(self) -> None:
        self._infos: list[ParameterInfo] = []
        self._sharding = Sharding()
        self._steps: _stepping.RealSteps | None = None
        self._state: dict[str, Tensor] = {}
        self._saved: dict[str, dict[str, float]] = {}
        self._told_decay = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of the callback and not of a run."""
        constructed = ("bound", "factor", "warm_start_steps", "interval", "include", "exclude")
        return {key: self.__dict__[key] for key in constructed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counter = _stepping.StepCounter()
        self._begin_run()

    @property
    def state_key(self) -> str:
        rules = {"include": [*map(rule_key, self.include)], "exclude": [*map(rule_key, self.exclude)]}
        return self._generate_state_key(**rules)

    def state_dict(self) -> dict[str, Any]:
        """Multiplier, bound and smoothed square norms of each matrix, as numbers by name."""
        names = [info.name for info in self._infos]
        state = {key: dict(zip(names, values.tolist(), strict=True)) for key, values in self._state.items()}
        return {"matrices": state, **self._counter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counter.load_state_dict(state_dict)
        self._saved = state_dict.get("matrices", {})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stop()
            self._begin_run()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything is restored, so that what cannot work is told before any weight changes.

        Raises:
            MisconfigurationException: No parameter is concerned, or the strategy cannot work with it.
        """
        _stepping.check_weights_are_the_optimizers(trainer, "ConstrainedDecay")
        root = model_root(trainer, pl_module)
        self._sharding = Sharding(root)
        what = "ConstrainedDecay has nothing to constrain"
        self._infos = choose(root, what, include=self.include, exclude=self.exclude)
        check_real(self._infos, "ConstrainedDecay")
        tell_idle(trainer, self._infos, "ConstrainedDecay")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is restored."""
        if self.bound == "start" and trainer.global_step > 0 and not self._saved:
            rank_zero_warn(
                "The checkpoint does not tell the norms at the start of training: ConstrainedDecay takes its bounds "
                "from the weights as they are now."
            )
        self._counter.start(trainer)
        self._state = self._initial_state()
        for key, values in self._state.items():
            for i, info in enumerate(self._infos):
                values[i] = self._saved.get(key, {}).get(info.name, values[i])
        self._steps = _stepping.RealSteps(
            trainer,
            "ConstrainedDecay",
            after=lambda index: self._decay(trainer, index),
            counts=self.bound != "start",
        )

    def _initial_state(self) -> dict[str, Tensor]:
        square = self._square_norms(self._infos)
        return {
            "multiplier": torch.zeros_like(square),
            "bound": self.factor * square if self.bound == "start" else torch.full_like(square, math.inf),
            "smoothed": square.clone(),
            "growth": torch.full_like(square, -math.inf),  # there is no growth that could slow down yet
        }

    def _square_norms(self, infos: Sequence[ParameterInfo]) -> Tensor:
        return norms([info.parameter for info in infos], sharding=self._sharding).square()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """By now a WeightDecay that stands after this callback has written its own values."""
        if not self._told_decay:
            self._told_decay = True
            self._warn_of_decay(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._steps is not None:
            self._counter.begin(trainer, _stepping.optimizer_index(trainer, optimizer))
            self._steps.announce(trainer, optimizer)

    def _decay(self, trainer: pl.Trainer, index: int) -> None:
        """After the optimizer's step; nothing is read back from the device."""
        groups = _stepping.torch_optimizer(trainer.optimizers[index]).param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
        rows = [i for i, info in enumerate(self._infos) if id(info.parameter) in held and info.parameter.requires_grad]
        if not rows:
            return
        infos = [self._infos[i] for i in rows]
        square = self._square_norms(infos)
        which = torch.tensor(rows, device=square.device)
        state = {key: values[which] for key, values in self._state.items()}
        self._look_for_bound_(state, square, steps=self._counter.current(trainer, index) + 1)
        numel = torch.tensor([math.prod(info.shape) for info in infos], device=square.device)
        multiplier = next_multiplier(state["multiplier"], square, state["bound"], numel)
        state["multiplier"] = multiplier.clamp_max(_LARGEST_MULTIPLIER)
        for key, values in state.items():
            self._state[key][which] = values
        for info, multiplier in zip(infos, state["multiplier"], strict=True):
            decay_(local_tensor(info.parameter), 2 * multiplier)

    def _look_for_bound_(self, state: dict[str, Tensor], square: Tensor, *, steps: int) -> None:
        if self.bound == "warm_start" and steps >= self.warm_start_steps:  # a GradScaler may skip the very step
            state["bound"] = torch.where(state["bound"].isinf(), self.factor * square, state["bound"])
        elif self.bound == "inflection_point" and steps % self.interval == 0:
            smoothed = torch.lerp(square, state["smoothed"], _SMOOTHING)
            growth = smoothed - state["smoothed"]
            slower = (growth < state["growth"]) & state["bound"].isinf()
            state["bound"] = torch.where(slower, self.factor * square, state["bound"])
            state["smoothed"], state["growth"] = smoothed, growth

    def _warn_of_decay(self, trainer: pl.Trainer) -> None:
        held = {id(info.parameter) for info in self._infos}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if group.get("weight_decay") and any(id(parameter) in held for parameter in group["params"]):
                    rank_zero_warn(
                        f"{type(optimizer).__name__} decays weights by weight_decay={float(group['weight_decay']):g} "
                        "that ConstrainedDecay decays as well: set it to 0, for example by WeightDecay(0.0)."
                    )
                    return

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
