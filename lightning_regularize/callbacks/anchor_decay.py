"""Decay towards where training began, instead of towards zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_regularize import _stepping
from lightning_regularize._configuring import model_root
from lightning_regularize._sharding import local_tensor, piece_like, whole_tensor
from lightning_regularize.callbacks._choosing import choose, tell_idle
from lightning_regularize.decay import HALF, pull_
from lightning_regularize.groups import rule_key
from lightning_regularize.schedules import Schedule, as_schedule
from lightning_regularize.selection import check_rules
from lightning_regularize.theory import decay_rounding_threshold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_regularize.schedules import Position
    from lightning_regularize.selection import ParameterInfo, Rule


class AnchorDecay(Callback):
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

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        anchor: Literal["init"] | Mapping[str, Tensor] = "init",
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = (),
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.schedule = as_schedule(strength, name="strength")
        if anchor != "init" and not hasattr(anchor, "keys"):
            raise TypeError(f"`anchor` should be 'init' or a state dict, got {anchor!r}.")
        self.anchor = anchor
        self.include = check_rules(include, argument="include")
        self.exclude = check_rules(exclude, argument="exclude")
        self._clock = _stepping.Clock(self.schedule, total_steps)
        self._begin_run()

    def _begin_run(self) -> None:
        self._infos: list[ParameterInfo] = []
        self._anchors: dict[int, Tensor] = {}
        self._saved: dict[str, Tensor] = {}
        self._steps: _stepping.RealSteps | None = None
        self._told_rounding = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of the callback and not of a run."""
        constructed = {key: self.__dict__[key] for key in ("schedule", "anchor", "include", "exclude")}
        return {**constructed, "total_steps": self._clock.total_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._clock = _stepping.Clock(state["schedule"], state.pop("total_steps"))
        self.__dict__.update(state)
        self._begin_run()

    @property
    def state_key(self) -> str:
        rules = {"include": [*map(rule_key, self.include)], "exclude": [*map(rule_key, self.exclude)]}
        return self._generate_state_key(**rules)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by name, which every rank takes part in putting together."""
        if self.anchor != "init":
            return self._clock.state_dict()
        anchors = {i.name: whole_tensor(self._anchors[id(i.parameter)], i.parameter) for i in self._anchored()}
        return {"anchors": {name: anchor.cpu() for name, anchor in anchors.items()}, **self._clock.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.load_state_dict(state_dict)
        self._saved = dict(state_dict.get("anchors", {}))

    def _anchored(self) -> list[ParameterInfo]:
        return [info for info in self._infos if id(info.parameter) in self._anchors]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stop()
            self._begin_run()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything is restored, so that what cannot work is told before any weight changes.

        Raises:
            MisconfigurationException: No parameter is concerned, or the strategy cannot work with it.
        """
        _stepping.check_weights_are_the_optimizers(trainer, "AnchorDecay")
        root = model_root(trainer, pl_module)
        _stepping.check_not_flat(root, "AnchorDecay")
        self._infos = choose(root, "AnchorDecay has nothing to pull", include=self.include, exclude=self.exclude)
        if self.anchor != "init":
            self._check_anchor(self.anchor)
        self._clock.note_rates(trainer)
        tell_idle(trainer, self._infos, "AnchorDecay")

    def _check_anchor(self, anchor: Mapping[str, Tensor]) -> None:
        for info in self._infos:
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is restored, the anchor of the first start too."""
        if self.anchor == "init" and trainer.global_step > 0 and not self._saved:
            rank_zero_warn("The checkpoint has no anchor: AnchorDecay takes the weights as they are now.")
        given = self._saved if self.anchor == "init" else self.anchor
        for info in self._infos:
            whole = given.get(info.name)
            weight = local_tensor(info.parameter)
            self._anchors[id(info.parameter)] = (
                weight.clone() if whole is None else piece_like(whole, info.parameter).clone()
            )
        self._saved = {}
        self._clock.start(trainer)
        self._steps = _stepping.RealSteps(trainer, "AnchorDecay", before=lambda index: self._pull(trainer, index))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._steps is not None:
            self._clock.begin(trainer, optimizer)
            self._steps.announce(trainer, optimizer)

    def _pull(self, trainer: pl.Trainer, index: int) -> None:
        optimizer = _stepping.torch_optimizer(trainer.optimizers[index])
        for i, group in enumerate(optimizer.param_groups):
            strength = self._clock.value(trainer, index, i)
            for parameter in group["params"]:
                anchor = self._anchors.get(id(parameter))
                if anchor is not None and _stepping.will_move(optimizer, parameter):
                    share = float(group["lr"]) * strength
                    self._tell_rounding(parameter.dtype, share)
                    pull_(local_tensor(parameter), anchor, share)

    def _tell_rounding(self, dtype: torch.dtype, share: float) -> None:
        """Once, if in half precision a weight stays where it is although it is pulled."""
        if dtype in HALF and 0 < share < decay_rounding_threshold(dtype) and not self._told_rounding:
            self._told_rounding = True
            rank_zero_warn(
                f"AnchorDecay does next to nothing here: lr * strength is {share:.2g}, and below "
                f"{decay_rounding_threshold(dtype):.2g} {dtype} weights that are nearer to their anchor than to zero "
                "stay as they are. Use float32 weights with precision='bf16-mixed'."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
