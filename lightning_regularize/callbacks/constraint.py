"""Where may the weights lie after every step?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_regularize import _stepping
from lightning_regularize._configuring import model_root
from lightning_regularize._sharding import Sharding
from lightning_regularize.callbacks._choosing import check_real, choose, tell_idle
from lightning_regularize.groups import rule_key
from lightning_regularize.projections import Box, MaxNorm, NonNegative, Projection, SpectralBall, norm_dims
from lightning_regularize.selection import check_rules

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as pl
    from torch import Tensor

    from lightning_regularize.selection import ParameterInfo, Rule


@dataclass
class _Target:
    """A parameter, how to look at it, and what it is projected by."""

    info: ParameterInfo
    view: tuple[int, ...]
    dim: tuple[int, ...] | None
    projection: Projection
    vector: Tensor | None = None

    def project_(self) -> Tensor:
        weight = self.info.parameter.detach()
        if tuple(weight.shape) != self.view:
            weight = weight.view(self.view)
        if self.vector is not None and isinstance(self.projection, SpectralBall):
            return self.projection.project_(weight, dim=self.dim, vector=self.vector)
        return self.projection.project_(weight, dim=self.dim)


class WeightConstraint(Callback):
    r"""Projects weights onto a set after every real step, so that a hard limit holds in training and in checkpoints.

    .. math:: w \leftarrow \arg\min_{x \in C} \lVert x - w \rVert_2

    It acts on the parameters of the optimizer that stepped, after the update and never after a step that a GradScaler
    skipped; validation, weight averaging and checkpoints see the projected weights. Norms of units are over their
    incoming weights, whatever the layer, see :func:`~lightning_regularize.projections.norm_dims`. If in the first epoch
    the constraint changes nothing, it says so once.

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
        super().__init__()
        if not isinstance(projection, Projection):
            raise TypeError(
                f"`projection` should be one of lightning_regularize.projections, such as MaxNorm(3.0), "
                f"got {projection!r}."
            )
        self.projection = projection
        self.include = check_rules(include, argument="include")
        self.exclude = check_rules(exclude, argument="exclude")
        self._begin_run()

    def _begin_run(self) -> None:
        self._saved: dict[str, dict[str, Any]] = {"radii": {}, "vectors": {}}
        self._targets: dict[int, _Target] = {}
        self._steps: _stepping.RealSteps | None = None
        self._bound: Tensor | None = None
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of the callback and not of a run: Lightning hangs the module on it, as ``log``."""
        return {key: self.__dict__[key] for key in ("projection", "include", "exclude")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_run()

    @property
    def state_key(self) -> str:
        rules = {"include": [*map(rule_key, self.include)], "exclude": [*map(rule_key, self.exclude)]}
        return self._generate_state_key(projection=repr(self.projection), **rules)

    def state_dict(self) -> dict[str, Any]:
        """The radii that were relative to the weights at the start, and the directions of power iterations."""
        radii = {t.info.name: t.projection.radius for t in self._targets.values() if hasattr(t.projection, "radius")}
        vectors = {t.info.name: t.vector.cpu() for t in self._targets.values() if t.vector is not None}
        return {"radii": radii, "vectors": vectors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = {"radii": {}, "vectors": {}} | state_dict

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stop()
            self._begin_run()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything is restored, so that what cannot work is told before any weight changes."""
        _stepping.check_weights_are_the_optimizers(trainer, "WeightConstraint")
        self._find_targets(trainer, pl_module)

    def _find_targets(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        root = model_root(trainer, module)
        what = "WeightConstraint has nothing to constrain"
        infos = choose(root, what, include=self.include, exclude=self.exclude)
        check_real(infos, "WeightConstraint")
        tell_idle(trainer, infos, "WeightConstraint")
        self._check_parametrized(infos)
        self._check_pieces(infos, Sharding(root))
        for info in infos:
            view, dim = tuple(info.shape), None
            if self.projection.per_unit:
                asked = getattr(self.projection, "dim", None)
                view, dim = norm_dims(info.owner, info.name.rpartition(".")[2], info.shape, dim=asked)
            elif isinstance(self.projection, (Box, NonNegative)):
                view = tuple(info.parameter.shape)  # elementwise: a piece will do
            _stepping.check_view(info.name, info.parameter, view)
            self._targets[id(info.parameter)] = _Target(info, view, dim, self.projection)

    def _check_parametrized(self, infos: Sequence[ParameterInfo]) -> None:
        found = [info.name for info in infos if _is_parametrized(info)]
        if found:
            raise MisconfigurationException(
                f"WeightConstraint cannot hold for parametrized weights, which are computed anew from {found}: "
                "leave them out by `exclude`, or take the parametrization away."
            )

    def _check_pieces(self, infos: Sequence[ParameterInfo], sharding: Sharding) -> None:
        if isinstance(self.projection, (Box, NonNegative)):
            return
        if any(sharding.is_flat(info.parameter) for info in infos):
            raise MisconfigurationException(
                f"{type(self.projection).__name__} needs norms of whole units, and FSDP1 cuts weights anywhere: use "
                "ModelParallelStrategy with fully_shard (FSDP2), or Box or NonNegative, which act on each weight."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is restored: what is relative to the weights at the start is known or can be measured."""
        relative = getattr(self.projection, "relative", False)
        if trainer.global_step > 0 and relative and not self._saved["radii"]:
            rank_zero_warn(
                "The checkpoint does not tell the norms at the start of training: WeightConstraint takes its radius "
                "relative to the weights as they are now."
            )
        for target in self._targets.values():
            name, weight = target.info.name, target.info.parameter.detach()
            if relative and name in self._saved["radii"]:
                target.projection = type(self.projection)(self._saved["radii"][name], relative=False)  # type: ignore[call-arg]
            else:
                target.projection = self.projection.at_start(weight)
            if isinstance(target.projection, SpectralBall):
                found = self._saved["vectors"].get(name)
                start = target.projection.warm_start(weight.view(target.view), dim=target.dim)
                target.vector = start if found is None else found.to(start)
        self._steps = _stepping.RealSteps(trainer, "WeightConstraint", after=lambda i: self._project(trainer, i))

    def _project(self, trainer: pl.Trainer, index: int) -> None:
        for group in _stepping.torch_optimizer(trainer.optimizers[index]).param_groups:
            for parameter in group["params"]:
                target = self._targets.get(id(parameter))
                if target is not None and parameter.requires_grad:
                    bound = target.project_()
                    self._bound = bound if self._bound is None else self._bound | bound

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once an epoch the device is asked whether anything was changed at all."""
        if self._told or self._bound is None:
            return
        bound = trainer.strategy.reduce(self._bound.float(), reduce_op="max")
        self._told = True
        if not bound:
            norm = "At torch's default initialization the norm of a unit's incoming weights is about 0.58."
            hint = norm if isinstance(self.projection, MaxNorm) else "The weights lie inside by themselves."
            rank_zero_warn(
                f"{self.projection} changed no weight in a whole epoch: unless weights grow, it does nothing. {hint}"
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


def _is_parametrized(info: ParameterInfo) -> bool:
    """Is the tensor that the layer uses computed from this parameter? Two ways of torch's, the newer one first."""
    path, _, leaf = info.name.rpartition(".")
    if ".parametrizations." in f".{path}.":
        return True
    stem, _, suffix = leaf.rpartition("_")
    return suffix in ("orig", "g", "v") and hasattr(info.owner, stem) and stem not in info.owner._parameters
