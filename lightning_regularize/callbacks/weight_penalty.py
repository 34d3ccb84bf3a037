"""What else should weights be pulled to? Any penalty, and any function of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch.nn.parameter import is_lazy

from lightning_regularize._checks import named_errors
from lightning_regularize._sharding import gathered
from lightning_regularize.callbacks.penalty import PenaltyCallback
from lightning_regularize.penalties import ByAutograd, Function, Penalty
from lightning_regularize.selection import DEFAULT_EXCLUDE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_regularize._steps.run import Run
    from lightning_regularize.schedules import Position, Schedule
    from lightning_regularize.selection import Rule


@final
class WeightPenalty(PenaltyCallback):
    r"""Adds the gradient of :math:`a R(w)` for any penalty or function :math:`R`, or takes a penalty's proximal step.

    :class:`L1Penalty`, :class:`L2Penalty`, :class:`ElasticNetPenalty` and :class:`GroupLassoPenalty` are shorthands of
    it. It acts as they do: once per step, before clipping. Logged as ``penalty/<name>``, with the name of the function
    or of the penalty's class.

    Args:
        penalty: A :class:`~lightning_regularize.penalties.Penalty`, such as ``penalties.Orthogonal()``, or one's own;
            or a function of a weight that returns a 0-d tensor, whose gradient autograd computes. A function gets each
            weight as a whole: under FSDP2 and tensor parallel it is gathered, and FSDP1 is refused. It is tried once
            before training begins.
        strength: ``a``, a number of at least 0, a :class:`~lightning_regularize.schedules.Schedule`, or any callable
            from a :class:`~lightning_regularize.schedules.Position` to a number.
        include: Rules for what is penalized.
        exclude: Rules for what is not. By default biases, norms and other vectors.
        method: "gradient"; or "proximal", for a penalty that has a proximal step and an optimizer whose steps are
            known, see :class:`L1Penalty`.
        every_n_steps: For penalties that take long, such as ``NuclearNorm()`` of large matrices: it acts on each
            ``n``-th step of an optimizer, with 10 on steps 10, 20 and so on, with ``n`` times the strength.
        total_steps: Length of the schedule in steps of an optimizer; by default what the Trainer expects.
        rounding: How half-precision gradients are rounded when the penalty's is added: "nearest", or "stochastic", at
            random so that the mean is right, where a small penalty would be lost beside large gradients.
        seed: Of stochastic rounding.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, a rule is not understood, or ``method="proximal"`` is asked of a
            function. Before training begins also if a function returns no scalar that depends on the weight.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import WeightPenalty
        >>> from lightning_regularize.penalties import Orthogonal
        >>> def double_well(weight):
        ...     return (weight.square() - 1).square().sum()
        >>> penalties = [WeightPenalty(Orthogonal(), 0.01), WeightPenalty(double_well, 1e-4)]
        >>> trainer = Trainer(callbacks=penalties, logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        penalty: Penalty | Callable[[Tensor], Tensor],
        strength: float | Schedule | Callable[[Position], float],
        *,
        include: Sequence[Rule] = ("*",),
        exclude: Sequence[Rule] = DEFAULT_EXCLUDE,
        method: Literal["gradient", "proximal"] = "gradient",
        every_n_steps: int = 1,
        total_steps: int | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(locals(), strength)
        if isinstance(penalty, type):
            raise TypeError(
                f"`penalty` should be an object, got the class {penalty.__name__}: write {penalty.__name__}(...)."
            )
        if not (isinstance(penalty, Penalty) or callable(penalty)):
            raise TypeError(
                "`penalty` should be one of lightning_regularize.penalties, such as Orthogonal(), or a function from a "
                f"weight to a 0-d tensor, got {penalty!r}."
            )
        self._penalty = penalty if isinstance(penalty, Penalty) else Function(penalty)
        if method == "proximal" and isinstance(self._penalty, ByAutograd):
            raise ValueError(
                f"`method='proximal'` needs a proximal step, which cannot be derived from the value of {self.name}: "
                "use method='gradient', or write a `Penalty` with the method `proximal_`."
            )

    @property
    def name(self) -> str:
        """The name of the function, or of the penalty's class."""
        return self._penalty.name if isinstance(self._penalty, Function) else type(self._penalty).__name__

    def identity(self) -> dict[str, Any]:
        """Two penalties may be for the same weights."""
        return {**super().identity(), "penalty": self.name}

    def penalty(self) -> Penalty:
        """The penalty at unit strength."""
        return self._penalty

    def begin(self, run: Run) -> None:
        """A function is tried before any weight changes: at strength 0 it is not called for a while."""
        for target in self._targets if isinstance(self._penalty, Function) else ():
            if target.parameter.requires_grad and not is_lazy(target.parameter):
                weight = gathered(target.parameter)
                with named_errors(f"WeightPenalty: {target.info.name!r}"):
                    self._penalty.add_gradient_(torch.zeros_like(weight), weight, 1.0)
