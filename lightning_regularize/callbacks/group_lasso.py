"""What makes whole units, inputs, heads or blocks zero?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final

from lightning_regularize._checks import check_positive_integer
from lightning_regularize.callbacks._weight_groups import Blocks, Heads, InputFeatures, OutputUnits, WeightGroups
from lightning_regularize.callbacks.penalty import PenaltyCallback
from lightning_regularize.penalties import GroupLasso, Penalty
from lightning_regularize.selection import DEFAULT_EXCLUDE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_regularize.schedules import Position, Schedule
    from lightning_regularize.selection import Rule


@final
class GroupLassoPenalty(PenaltyCallback):
    r"""Adds the gradient of :math:`a \sum_g \sqrt{|g|}\,\lVert w_g \rVert_2`, where a group is, say, an output unit.

    With ``method="proximal"`` whole groups become exactly zero. Logged as ``penalty/group_lasso``.

    ============  ====================================================================================================
    ``group``     What is a group
    ============  ====================================================================================================
    "output"      The incoming weights of an output unit: a neuron, a channel. See
                  :func:`~lightning_regularize.units.norm_dims`.
    "input"       All weights that one input feature or input channel feeds, see
                  :func:`~lightning_regularize.units.input_dims`.
    "head"        A head of attention as a whole: its rows in the projections to queries, keys and values, and its
                  columns in that of the output. If several queries share a key and a value, these are one group.
    "block"       ``block_size`` neighbors along the input dim, or along ``dim``.
    ============  ====================================================================================================

    Heads are found in the attention layers of torch, transformers, timm and others, by the names of projections and by
    an attribute such as ``num_heads``; weights of other layers are left alone. What ``include`` and ``exclude`` leave
    out of a layer is not part of its groups, nor is what is frozen.

    Args:
        strength: ``a``; see :class:`L1Penalty`.
        group: "output", "input", "head" or "block".
        block_size: How many weights a block has, which should divide the dim along which it lies.
        dim: Anything else: the dims that hold the weights of a group, an integer or a sequence of them. None takes
            what the layer says; a warning names layers that say nothing. With ``group="block"`` the dim along which
            blocks lie.
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
        >>> from lightning_regularize import GroupLassoPenalty
        >>> neurons = GroupLassoPenalty(1e-4, method="proximal", exclude=("bias", "norm", "vector", "*.self_attn.*"))
        >>> heads = GroupLassoPenalty(1e-4, group="head", method="proximal")
        >>> trainer = Trainer(callbacks=[neurons, heads], logger=False, accelerator="cpu")

    References:
        Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006.
    """

    def __init__(
        self,
        strength: float | Schedule | Callable[[Position], float],
        *,
        group: Literal["output", "input", "head", "block"] = "output",
        block_size: int | None = None,
        dim: int | Sequence[int] | None = None,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        method: Literal["gradient", "proximal"] = "gradient",
        total_steps: int | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(locals(), strength)
        self._penalty = GroupLasso(dim)
        if group not in ("output", "input", "head", "block"):
            raise ValueError(f"`group` should be 'output', 'input', 'head' or 'block', got {group!r}.")
        if block_size is not None and group != "block":
            raise ValueError(f"`block_size` is for group='block', got {block_size!r} with group={group!r}.")
        if dim is not None and group in ("input", "head"):
            raise ValueError(
                f"`dim` says what a group is instead of group={group!r}: give one of the two, got {dim!r}."
            )
        if group == "block":
            if not (dim is None or isinstance(dim, int)):
                raise TypeError(
                    f"`dim` should be one integer with group='block', got {dim!r}: blocks lie along one dim."
                )
            self._groups: WeightGroups = Blocks(check_positive_integer(block_size, "`block_size`"), dim)
        else:
            self._groups = {"output": OutputUnits(dim), "input": InputFeatures(), "head": Heads()}[group]

    name = "group_lasso"

    @property
    def groups(self) -> WeightGroups:
        """What ``group`` and ``dim`` say."""
        return self._groups

    def identity(self) -> dict[str, Any]:
        """Two penalties may have different groups of the same weights."""
        group = self.arguments["group"]
        return super().identity() if group == "output" else {**super().identity(), "group": group}

    def penalty(self) -> Penalty:
        """The norms of groups."""
        return self._penalty
