"""Decay towards where training began, instead of towards zero."""

from __future__ import annotations

import functools
import itertools
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch.optim import LBFGS

from lightning_regularize._sharding import gradients_of, local_pieces, local_tensor, piece_like, whole_tensor
from lightning_regularize._steps.buckets import HALF
from lightning_regularize._steps.clock import rate_of
from lightning_regularize._steps.targets import Targets
from lightning_regularize._trainer.names import MisconfigurationException
from lightning_regularize._trainer.strategies import check_not_flat, check_weights_are_the_optimizers
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks._rounding import Rounding
from lightning_regularize.callbacks._saved import TENSOR, Value
from lightning_regularize.decay import check_share, progress, pull_, pull_back_, pull_by_importance_
from lightning_regularize.decay_methods import will_move
from lightning_regularize.schedules import Constant, Schedule, as_schedule, check_total_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize._steps.run import Run
    from lightning_regularize.callbacks._saved import Layout
    from lightning_regularize.schedules import Position
    from lightning_regularize.selection import ParameterInfo, Rule


_METHODS = ("decoupled", "selective")


class _Target(NamedTuple):
    """A parameter, and this rank's pieces of what it is pulled to and of the importance of its elements."""

    info: ParameterInfo
    anchor: Tensor | None  # None before training begins
    importance: Tensor | None = None


def _arranged(targets: Sequence[_Target]) -> tuple[list[nn.Parameter], list[Any], list[Any]]:
    """Their columns: parameters, anchors and importances."""
    return [t.info.parameter for t in targets], [t.anchor for t in targets], [t.importance for t in targets]


class _Moving(NamedTuple):
    """What is pulled back after a step, see :func:`~lightning_regularize.decay.pull_back_`."""

    weights: Sequence[Tensor]
    anchors: Sequence[Tensor]
    distances: Tensor
    strengths: Tensor


class AnchorDecay(Regularizer):
    r"""Pulls weights towards an anchor, decoupled from the gradient: L2-SP, for fine-tuning.

    .. math:: w \leftarrow w - \eta\, a\, (w - w_0)

    before each real step of the optimizer. What the model was pretrained for is forgotten less than with decay towards
    zero. The anchor costs one copy of the weights it applies to, in memory and in checkpoints, so that a resumed run
    has the same one. Only parameters with a gradient are pulled. The optimizer's own weight decay acts as well, towards
    zero: set it to 0 unless you want both.

    With ``method="selective"`` (selective projection decay) a weight that its gradient :math:`g` calls back, and only
    such a one, loses of each real step a part of what the step has added to its distance from the anchor:

    .. math:: w \leftarrow w' - a\,\max\Bigl(0, 1 - \frac{\lVert w - w_0\rVert}{\lVert w' - w_0\rVert}\Bigr)
        (w' - w_0) \quad \text{if } \langle g, w - w_0\rangle > 0

    for each parameter as a whole, with :math:`w` before the step and :math:`w'` after it. The learning rate does not
    enter; :math:`a = 1` takes all of it back. It needs copies of the weights' size for a moment in each step.

    Args:
        strength: ``a``, a number of at least 0, a schedule, or a callable from a position to a number.
        method: "decoupled" or "selective".
        importance: A dictionary by canonical name of whole tensors :math:`F` of at least 0, one number for each
            element: weights are then pulled by :math:`\eta\,a\,F \odot (w - w_0)`. With the diagonal of the Fisher
            information this is elastic weight consolidation. Parameters without an entry are not pulled.
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
        Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018;
        Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024, arXiv
        2411.01713; Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.
    """

    state_layouts: ClassVar[dict[str, Layout]] = {
        "anchors": {"*": Value(f"{TENSOR.expected}, or None", lambda v: v is None or TENSOR.is_valid(v))}
    }

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        anchor: Literal["init"] | Mapping[str, Tensor] = "init",
        method: Literal["decoupled", "selective"] = "decoupled",
        importance: Mapping[str, Tensor] | None = None,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = (),
        total_steps: int | None = None,
    ) -> None:
        super().__init__(locals())
        self.schedule = as_schedule(strength, name="strength")
        if anchor != "init" and not hasattr(anchor, "keys"):
            instead = ""
            if isinstance(anchor, (str, PathLike)):
                path = str(anchor)
                instead = f" Of a checkpoint's file write torch.load({path!r}, weights_only=True)['state_dict']."
            elif hasattr(anchor, "state_dict"):
                instead = " Of a module write `module.state_dict()`."
            raise TypeError(f"`anchor` should be 'init' or a state dict, got {anchor!r}.{instead}")
        if method not in _METHODS:
            raise ValueError(f"`method` should be one of {_METHODS}, got {method!r}.")
        if importance is not None and not hasattr(importance, "keys"):
            raise TypeError(f"`importance` should be a dictionary of tensors by name, got {importance!r}.")
        if importance is not None and method == "selective":
            raise ValueError("`importance` is for method='decoupled': 'selective' pulls a parameter as a whole.")
        self.anchor, self.method, self.importance = anchor, method, importance
        self.total_steps = check_total_steps(total_steps)

    # -- before training -----------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        check_weights_are_the_optimizers(run.trainer, "AnchorDecay")
        check_not_flat(run.sharding(), list(run.root.parameters()), "AnchorDecay")
        infos = self.select(run, "nothing to pull")
        if self.anchor != "init":
            _check_anchor(self.anchor, infos)
        self._largest_importance = 1.0
        if self.importance is not None:
            self._largest_importance = _check_importance(self.importance, infos)
        self._sharding = run.sharding()
        is_constant = isinstance(self.schedule, Constant)
        self.rounded = Rounding(self, infos, who="AnchorDecay", is_constant=is_constant)
        self._moving: dict[Optimizer, _Moving] = {}  # in the step under way
        self._phase: Literal["before", "beginning", "training"] = "before"
        self._without_anchor: set[str] = set()
        self._targets: Targets[_Target] = Targets(run.infos, self._learn, move=self._move, arrange=_arranged)
        for optimizer in run.optimizers:
            for group, (parameters, *_) in zip(optimizer.param_groups, self._targets.of(optimizer), strict=True):
                if parameters and self.method == "decoupled":
                    rate_of(optimizer, group)
        self.warn_if_no_effect(run, infos)

    def _importance_of(self, info: ParameterInfo) -> Tensor | None:
        """This rank's piece."""
        return None if self.importance is None else piece_like(self.importance[info.name], info.parameter)

    def _learn(self, info: ParameterInfo) -> _Target | None:
        if not self.selects(info) or (self.importance is not None and info.name not in self.importance):
            return None
        if self.method == "selective":
            self.check_real(info, "AnchorDecay(method='selective')")
            if info.parameter.dtype in HALF:
                raise MisconfigurationException(
                    "AnchorDecay(method='selective') needs the distance that a step adds, and rounds it away in "
                    f"{info.name!r} of {info.parameter.dtype}: use float32 weights with precision='bf16-mixed'."
                )
        if self._phase == "before":
            return _Target(info, None)
        is_new = self._phase == "training"
        if self.anchor != "init" or (self._saved.get("anchors") and not is_new):
            whole = self._saved_anchor(info) if self.anchor == "init" else self.anchor.get(info.name)
            if whole is not None and tuple(whole.shape) == tuple(info.shape):
                return _Target(info, piece_like(whole, info.parameter).clone(), self._importance_of(info))
        elif not is_new:
            return _Target(info, local_tensor(info.parameter).clone(), self._importance_of(info))
        self._without_anchor.add(info.name)
        self.warn(f"AnchorDecay has no anchor for {info.name!r}, which is new to it, and leaves it alone.")
        return None

    def _saved_anchor(self, info: ParameterInfo) -> Tensor | None:
        """The anchor in the checkpoint; None for what has none.

        Raises:
            ValueError: The checkpoint is damaged.
        """
        anchor: Tensor | None = self._saved["anchors"].get(info.name)
        if info.name not in self._saved["anchors"] or (anchor is not None and tuple(anchor.shape) != tuple(info.shape)):
            what = "nothing" if anchor is None else f"shape {tuple(anchor.shape)}"
            raise ValueError(
                f"AnchorDecay: `anchors[{info.name!r}]` in the checkpoint should have the shape "
                f"{tuple(info.shape)} of the parameter, got {what}."
            )
        return anchor

    def _move(self, info: ParameterInfo, target: _Target) -> _Target | None:
        """A parameter that is in another layer now keeps its anchor, if rules select it there."""
        return target._replace(info=info) if self.selects(info) else None

    def begin(self, run: Run) -> None:
        if self.anchor == "init" and any(run.steps) and not self._saved.get("anchors"):
            self.warn("The checkpoint has no anchor: AnchorDecay takes the weights as they are now.")
        self._phase = "beginning"
        self._targets = Targets(run.infos, self._learn, move=self._move, arrange=_arranged)
        self._phase = "training"

    # -- training ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_gradients(self, step: Step) -> None:
        """LBFGS begins before there are gradients: those of its first evaluation are at the weights before the step."""
        if self.method == "selective" and isinstance(step.optimizer, LBFGS) and step.optimizer not in self._moving:
            self._look(step)

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        optimizer = step.optimizer
        if self.method == "selective":
            self._moving.pop(optimizer, None)  # of a step that an exception ended
            if not isinstance(optimizer, LBFGS):
                self._look(step)
            return
        self.rounded.begin_step(step)
        of_groups = zip(optimizer.param_groups, self._targets.of(optimizer), strict=True)
        pulled = [(columns, self._share(step, group)) for group, columns in of_groups if columns[0]]
        for _, share in pulled:  # before any weight changes
            self._check_share(share)
        for columns, share in pulled:
            flags = will_move(optimizer, columns[0])
            moving = columns if all(flags) else [list(itertools.compress(column, flags)) for column in columns]
            parameters, *others = moving if self.importance is not None else moving[:2]
            pull = functools.partial(pull_ if self.importance is None else pull_by_importance_, share=share)
            self.rounded.change(pull, local_pieces(parameters), *others)

    def _check_share(self, share: float | Tensor) -> None:
        """Refuse what would pull a weight past its anchor; a rate on the device is not looked at.

        Raises:
            ValueError: It would.
        """
        check_share(share)
        if not isinstance(share, torch.Tensor) and share * self._largest_importance > 1:
            raise ValueError(
                f"AnchorDecay: lr * strength * `importance` should be at most 1, got {share:.3g} * "
                f"{self._largest_importance:.3g}: weights would be pulled past their anchor. Divide `importance` by "
                "its largest number, or choose a smaller strength."
            )

    def _look(self, step: Step) -> None:
        """Before the step: how far is each weight from its anchor, and does its gradient call it back?"""
        found: list[tuple[Any, ...]] = []
        strengths = []
        of_groups = zip(step.optimizer.param_groups, self._targets.of(step.optimizer), strict=True)
        for group, (parameters, anchors, _) in of_groups:
            gradients = gradients_of(parameters)
            moving = [row for row in zip(parameters, anchors, gradients, strict=True) if row[2] is not None]
            found += moving
            strengths.append((self.run.clock.value(self.schedule, group, step.number) if moving else 0.0, len(moving)))
        if found:
            weights, anchors, pieces = map(list, zip(*found, strict=True))
            distances, calls_back = progress(weights, anchors, local_pieces(pieces), sharding=self._sharding)
            own = torch.cat([distances.new_full((count,), strength) for strength, count in strengths])
            self._moving[step.optimizer] = _Moving(weights, anchors, distances, own * calls_back)

    @torch.no_grad()
    def after_step(self, step: Step, *, is_real: bool) -> None:
        moving = self._moving.pop(step.optimizer, None)
        if moving is not None and is_real:
            pull_back_(*moving, sharding=self._sharding)

    def _share(self, step: Step, group: dict[str, Any]) -> float | Tensor:
        """The part of the way to the anchor that a step goes; a rate on the device is not read back."""
        strength: float = self.run.clock.value(self.schedule, group, step.number)
        return rate_of(step.optimizer, group) * strength

    def save(self) -> dict[str, Any]:
        """Whole tensors by name, which every rank takes part in putting together."""
        if self.anchor != "init":
            return {}
        targets = [target for target in self._targets if target.anchor is not None]
        anchors = {t.info.name: whole_tensor(t.anchor, t.info.parameter) for t in targets if t.anchor is not None}
        return {"anchors": {**dict.fromkeys(self._without_anchor), **{name: a.cpu() for name, a in anchors.items()}}}


def _check_importance(importance: Mapping[str, Tensor], infos: Sequence[ParameterInfo]) -> float:
    """Refuse what is no importance, and return the largest number of all.

    Raises:
        ValueError: A tensor is missing its parameter, or is not what it should be.
    """
    shapes = {info.name: tuple(info.shape) for info in infos}
    if unknown := [name for name in importance if name not in shapes]:
        raise ValueError(
            "AnchorDecay: `importance` should have names of parameters that it is for, such as "
            f"{next(iter(shapes))!r}, got {unknown[0]!r}."
        )
    largest = 0.0
    for name, tensor in importance.items():
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shapes[name]:
            what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"AnchorDecay: `importance` should have a tensor of shape {shapes[name]} for {name!r}, got {what}."
            )
        is_dense = tensor.layout == torch.strided and tensor.is_floating_point()
        if not is_dense or not tensor.isfinite().all() or (tensor < 0).any():
            raise ValueError(
                f"AnchorDecay: `importance` of {name!r} should be a dense tensor of finite floating-point numbers of "
                "at least 0."
            )
        largest = max(largest, tensor.max().item()) if tensor.numel() else largest
    if not largest:
        raise ValueError(
            "AnchorDecay: `importance` is 0 everywhere, so that nothing would be pulled: use tensors with numbers > 0."
        )
    return largest


def _check_anchor(anchor: Mapping[str, Tensor], infos: Sequence[ParameterInfo]) -> None:
    for info in infos:
        found = anchor.get(info.name)
        if found is not None and not isinstance(found, torch.Tensor):
            raise TypeError(f"AnchorDecay: `anchor` should hold tensors, got {type(found).__name__} for {info.name!r}.")
        if found is None or tuple(found.shape) != tuple(info.shape):
            names = ", ".join(map(repr, itertools.islice(anchor, 3)))
            what = "lacks it" + (f"; its names are such as {names}" if names else "")
            what = what if found is None else f"has shape {tuple(found.shape)}"
            raise ValueError(
                f"AnchorDecay: `anchor` should have a tensor of shape {tuple(info.shape)} for {info.name!r}, but "
                f"{what}. Complete it, or leave the parameter out by `exclude`."
            )
        is_float = found.is_floating_point() or found.is_complex()
        if not is_float or not found.isfinite().all():
            raise ValueError(
                f"AnchorDecay: `anchor` of {info.name!r} should hold finite floating-point numbers, got "
                f"{found.dtype}" + (" with NaN or infinity." if is_float else ".")
            )
