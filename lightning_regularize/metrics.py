"""The same numbers as torchmetrics, for those who log in their own module.

Weights are the same on all ranks of DDP, so that these metrics do not add ranks up; pieces that ranks hold of a sharded
weight are reduced in ``update``, which all ranks should therefore call.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_regularize._checks import check_number
from lightning_regularize._rows import dense_pieces
from lightning_regularize._sharding import Sharding
from lightning_regularize._used import Piece, select_used, without_unknown
from lightning_regularize.norms import check_norm_type, combine, counts_at_most, norms
from lightning_regularize.selection import check_rules, parameter_infos

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_regularize.selection import Rule

__all__ = ["WeightNorm", "Sparsity", "GeneralizationGap"]


class WeightNorm(Metric):
    r"""The norm of a module's trainable weights together, at the last ``update``.

    .. math:: \lVert w \rVert_p = \bigl(\sum_i |w_i|^p\bigr)^{1/p}

    Of a layer that is pruned or parametrized, the weight that it uses counts, and not what that is computed from.

    Args:
        norm_type: ``p``, at least 1, or ``math.inf``.
        include: Rules for what counts.
        exclude: Rules for what does not.
        kwargs: What every torchmetrics metric takes.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: An argument is out of range.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> norm = WeightNorm(exclude=("bias",))
        >>> norm.update(layer)
        >>> norm.compute()
        tensor(5.)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    value: Tensor

    def __init__(
        self, norm_type: float = 2.0, *, include: Sequence[Rule] = ("*",), exclude: Sequence[Rule] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_norm_type(norm_type)
        self.norm_type = norm_type
        self.include = check_rules(include, argument="include")
        self.exclude = check_rules(exclude, argument="exclude")
        self.add_state("value", torch.tensor(0.0), dist_reduce_fx=_last)

    def update(self, module: nn.Module) -> None:
        """Measure a module; under FSDP1 the wrapped one."""
        pieces, sharding = _pieces(type(self).__name__, module, self.include, self.exclude)
        like = [piece.like for piece in pieces]
        found = norms([piece.tensor for piece in pieces], self.norm_type, sharding=sharding, parameters=like)
        self.value = self.value.new_tensor(combine(found.tolist(), self.norm_type))

    def compute(self) -> Tensor:
        """0-d."""
        return self.value

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure and its axes, of ``val`` or else of :meth:`compute`, as torchmetrics draws them."""
        return self._plot(val, ax)


class Sparsity(Metric):
    """The share of a module's trainable weights that are zero, or at most ``threshold``, at the last ``update``.

    Of a layer that is pruned or parametrized, the weight that it uses counts, and not what that is computed from.

    Args:
        threshold: Largest magnitude that counts, at least 0; 0 counts exact zeros.
        include: Rules for what is looked at.
        exclude: Rules for what is not.
        kwargs: What every torchmetrics metric takes.

    Raises:
        TypeError: A rule is of no known type.
        ValueError: An argument is out of range.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 0.3]]))
        >>> sparsity = Sparsity(include=("weight",))
        >>> sparsity(layer)
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    value: Tensor

    def __init__(
        self, threshold: float = 0.0, *, include: Sequence[Rule] = ("*",), exclude: Sequence[Rule] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.threshold = check_number(threshold, "`threshold`")
        self.include = check_rules(include, argument="include")
        self.exclude = check_rules(exclude, argument="exclude")
        self.add_state("value", torch.tensor(0.0), dist_reduce_fx=_last)

    def update(self, module: nn.Module) -> None:
        """Measure a module; under FSDP1 the wrapped one."""
        pieces, sharding = _pieces(type(self).__name__, module, self.include, self.exclude)
        counts = counts_at_most(dense_pieces([piece.tensor for piece in pieces]), self.threshold)
        found = sharding.reduce(counts, [piece.like for piece in pieces])
        elements = sum(piece.shape.numel() for piece in pieces)
        self.value = self.value.new_tensor(found.sum().item() / elements if elements else float("nan"))

    def compute(self) -> Tensor:
        """0-d, in [0, 1]; NaN if nothing was looked at."""
        return self.value

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure and its axes, of ``val`` or else of :meth:`compute`, as torchmetrics draws them."""
        return self._plot(val, ax)


class GeneralizationGap(WrapperMetric):
    """How much higher a metric is on training data than on validation data.

    Args:
        metric: Any metric; two copies of it are made, which see their own data and are reduced over ranks as it is.

    Raises:
        TypeError: ``metric`` is not a ``torchmetrics.Metric``.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> gap = GeneralizationGap(MeanMetric())
        >>> gap.update(torch.tensor([1.0, 0.8]), stage="train")
        >>> gap.update(torch.tensor([0.6]), stage="val")
        >>> gap.compute()
        tensor(0.3000)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        if not isinstance(metric, Metric):
            raise TypeError(f"`metric` should be a torchmetrics.Metric, got {type(metric).__name__}.")
        self.train_metric, self.val_metric = metric.clone(), metric.clone()

    def update(self, *args: Any, stage: Literal["train", "val"], **kwargs: Any) -> None:
        """Update the metric of one stage with the other arguments.

        Raises:
            ValueError: ``stage`` is neither "train" nor "val".
        """
        if stage not in ("train", "val"):
            raise ValueError(f"`stage` should be 'train' or 'val', got {stage!r}.")
        (self.train_metric if stage == "train" else self.val_metric).update(*args, **kwargs)

    def compute(self) -> Tensor:
        """Training minus validation; NaN as long as one of them has seen nothing."""
        if not (self.train_metric.update_called and self.val_metric.update_called):
            return torch.tensor(float("nan"), device=self.device)
        gap: Tensor = self.train_metric.compute() - self.val_metric.compute()
        return gap

    def reset(self) -> None:
        """Forget both."""
        super().reset()
        self.train_metric.reset()
        self.val_metric.reset()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure and its axes, of ``val`` or else of :meth:`compute`, as torchmetrics draws them."""
        return self._plot(val, ax)


def _pieces(
    owner: str, module: nn.Module, include: Sequence[Rule], exclude: Sequence[Rule]
) -> tuple[list[Piece], Sharding]:
    """What this rank holds of the weights that the layers of a module use, and how they are spread over ranks.

    Raises:
        ValueError: One is computed from flat pieces.
    """
    selected = select_used(parameter_infos(module), include=include, exclude=exclude)
    weights = without_unknown(selected, warnings.warn, owner)
    sharding = Sharding(module)
    for weight in weights:
        if weight.is_computed and sharding.is_flat(weight.info.parameter):
            raise ValueError(
                f"{weight.info.name!r} is computed from parameters that FSDP1 or ZeRO-3 has cut into flat pieces: use "
                "FSDP2, or leave it out by `exclude`."
            )
    return [weight.piece() for weight in weights], sharding


def _last(values: Tensor) -> Tensor:
    """Of replicas any, of an old and a new value the new one: both come stacked."""
    return values[-1]
