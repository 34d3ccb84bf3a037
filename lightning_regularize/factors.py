"""By how much more or less does a parameter decay? Factors that are computed from what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lightning_regularize._checks import check_number, is_number
from lightning_regularize.units import norm_dims

if TYPE_CHECKING:
    from lightning_regularize.selection import ParameterInfo


@final
@dataclass(frozen=True)
class WidthPower:
    r"""A factor for ``factors`` that grows with the width of a layer: :math:`(n / n_0)^p`.

    :math:`n` is the number of inputs of one output unit, counted over the unsharded weight: the features of a linear
    layer, channels per group times kernel size of a convolution, the features of an embedding.

    Args:
        base: :math:`n_0`, the width at which the factor is 1, for which the weight decay was chosen; positive.
        power: :math:`p`, finite. With learning rates :math:`\propto 1/n` (muP) Fan et al. have 1/2 for AdamW; 1 keeps
            learning rate times weight decay.

    Raises:
        TypeError: An argument is no number.
        ValueError: ``base`` is not positive, or a number is not finite. When called, ValueError where it is not known
            which dims of a parameter are inputs, or a lazy one has no shape yet.

    Example:
        >>> from torch import nn
        >>> from lightning_regularize import param_groups
        >>> wide = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 4))
        >>> groups = param_groups(wide, 0.1, factors={"weight": WidthPower(64)})
        >>> [(group["name"], group["weight_decay"]) for group in groups]
        [('decay x2', 0.2), ('decay', 0.1), ('no_decay', 0.0)]

    References:
        Fan et al., "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning", 2025, arXiv 2510.15262: 1/2.
        Wang and Aitchison, "How to set AdamW's weight decay as you scale model and dataset size", ICML 2025,
        arXiv 2405.13698: 1.
    """

    base: float
    power: float = 0.5

    def __post_init__(self) -> None:
        if not check_number(self.base, "`base`"):
            raise ValueError(f"`base` should be positive, got {self.base!r}.")
        if not is_number(self.power):
            raise TypeError(f"`power` should be a number, got {self.power!r}.")
        if not math.isfinite(self.power):
            raise ValueError(f"`power` should be finite, got {self.power!r}.")

    def __call__(self, info: ParameterInfo) -> float:
        """The factor of a parameter.

        Raises:
            ValueError: It is not known which dims of the parameter are inputs, or a lazy one has no shape yet.
        """
        try:
            view, dims = norm_dims(info.owner, info.name, info.shape)
        except ValueError as error:
            raise ValueError(
                f"{self!r} does not know which dims of {info.name!r}, of shape {tuple(info.shape)}, are inputs: give "
                "it a factor by a rule before."
            ) from error
        return float((math.prod(view[dim] for dim in dims) / self.base) ** self.power)
