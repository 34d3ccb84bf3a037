"""How much of what a callback does is left when half precision has rounded it?"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_regularize._sharding import local_piece, local_pieces, local_tensor
from lightning_regularize._steps.buckets import HALF
from lightning_regularize.callbacks._copied_steps import Copies, Followed, widened
from lightning_regularize.decay import decay_
from lightning_regularize.decay_methods import Cautious, Stable
from lightning_regularize.step_sizes import knows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize.callbacks._base import Regularizer
    from lightning_regularize.decay_methods import Alike, DecayMethod
    from lightning_regularize.selection import ParameterInfo

TOLERANCE = 0.05  # what may be lost, or gained, of a strength before a warning says so
_STEPS = (0, 1, 4, 7, 12)  # measured first; not all of the first ones, since weights stay where nothing moves them
_EVERY = 50  # then one step of so many is measured
_FIRST = (0, 50, 100, 200, 300, 400)  # here copies begin to follow the optimizer for a while
_AGAIN = 500  # and then once in so many steps
_WHILE = 20  # steps
_MOST = 2**20  # elements measured in one call, at least one tensor
_KEPT = 2**16  # elements of a tensor that are followed, and whose sums over the steps are kept
_LOOP = 500  # steps after which a loop of unknown length is judged, since nobody says that it has ended


class Rounding:
    """Measures, in a few steps, what happens to half-precision tensors beside the same in float64.

    Nothing waits for the device before :meth:`judge`.

    Args:
        owner: Whose strength may be lost.
        infos: What it acts on.
        who: The owner, and what of it, for the warning.
        is_constant: Is the strength the same in all steps? If not, it is judged when training ends.
        adds_to_gradients: Does it act through gradients? Then the optimizer rounds it once more, in its own step.
        corrects_itself: Does what is asked of a step depend on where those before it have led? Then all are measured,
            and each counts; and so does what half precision loses of the steps of the optimizer.
        remedy: What helps beside float32 weights: ", or ...". For what goes through gradients, it helps in their sum.
    """

    def __init__(
        self,
        owner: Regularizer,
        infos: Iterable[ParameterInfo],
        *,
        who: str,
        is_constant: bool,
        adds_to_gradients: bool = False,
        corrects_itself: bool = False,
        remedy: str = "",
    ) -> None:
        self._owner, self._who, self._remedy, self._is_constant = owner, who, remedy, is_constant
        self._adds_to_gradients, self._corrects_itself = adds_to_gradients, corrects_itself
        self._every = 1 if corrects_itself else _EVERY
        self._is_done = not any(info.parameter.dtype in HALF for info in infos)
        self._is_judged = False
        self._first: int | None = None
        self._has_peaked = False  # has a learning rate been near its peak?
        self._calls = 0
        # Of tensors that change together: how far their elements should have gone in all, and how far off they are.
        self._totals: dict[tuple[str, int, int, torch.device, int], Tensor] = {}
        self._followed: dict[tuple[int, int], Followed] = {}  # by optimizer and first weight
        self._optimizer = 0
        self._exact: list[list[Any]] = []
        self._stands_for = 1  # a step that is measured stands for those since the one before it
        self.is_measured = False
        """Is the step under way one to measure?"""
        self.is_followed = False
        """Do copies of weights make the step under way as well?"""
        self.cannot_follow: set[int] = set()
        """The ids of optimizers that copies cannot follow."""

    def begin_step(self, step: Step, *, acts: bool = True) -> None:
        """Decide whether to measure this step; in a loop without a Trainer, judge when it is time.

        Args:
            step: The step.
            acts: Does the owner act in it? Copies that follow the optimizer make the other ones as well.
        """
        self.is_measured, self.is_followed = False, False
        self._calls, self._optimizer, self._exact = 0, id(step.optimizer), []
        if self._is_done or (self._first is None and not acts):
            return
        self._first = step.number if self._first is None else self._first
        seen, run = step.number - self._first, self._owner.run
        if run.trainer is None:
            if seen > _WHILE:
                self.judge_early()
            if step.number + 1 == run.clock.total_steps or (math.isinf(run.clock.total_steps) and seen == _LOOP):
                self.judge()
                return
        begun = max(k for k in _FIRST if k <= seen) if seen < _AGAIN else seen - seen % _AGAIN
        self.is_followed = seen < begun + _WHILE
        if seen == begun or not self.is_followed:
            self._finish(self._optimizer)
        before = max((k for k in (*_FIRST, begun - _AGAIN) if 0 <= k < begun), default=-_WHILE)
        self._follows_for = begun - before
        self.is_measured = acts and (seen in _STEPS or seen % self._every == 0)
        self._stands_for = seen - max([k for k in (*_STEPS, seen - self._every) if 0 <= k < seen], default=-1)
        if self.is_measured and not self._has_peaked:
            positions = [run.clock.position(group, step.number) for group in step.optimizer.param_groups]
            self._has_peaked = not all(at.lr < 0.5 * at.peak_lr for at in positions)  # NaN where none is known

    # -- measuring -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def change(
        self,
        change: Callable[..., None],
        tensors: Sequence[Tensor],
        *columns: Sequence[Any],
        together: bool = False,
    ) -> None:
        """Call ``change(tensors, *columns)``, where a column has an entry for each tensor, and measure what it does.

        Args:
            change: What changes the tensors.
            tensors: What is changed.
            columns: The other arguments.
            together: Does the change of one tensor depend on the others? Then all are measured.
        """
        self._calls += 1
        picked = self.pick(tensors, together=together) if self.is_measured else []
        if not picked:
            change(tensors, *columns)
            return
        before = [widened(local_tensor(tensors[i])) for i in picked]
        wide = [widened(tensors[i].detach()) for i in picked]
        asked_of = (self._exact[self._calls - 1], *columns[1:]) if self._exact else columns
        change(wide, *[[widened(column[i]) for i in picked] for column in asked_of])
        change(tensors, *columns)
        asked = [local_tensor(w) - b for w, b in zip(wide, before, strict=True)]
        errors = [local_tensor(tensors[i]) - local_tensor(w) for i, w in zip(picked, wide, strict=True)]
        self._add(("change", self._optimizer, self._calls), asked, errors, self._stands_for, self._corrects_itself)

    @torch.no_grad()
    def follow(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        weights: Sequence[Tensor],
        terms: Sequence[Tensor] | None = None,
        *,
        without: dict[str, Any] | None = None,
    ) -> None:
        """Make the step that begins with copies of weights too, in both precisions, each with and without the owner.

        The copies go on for some steps, since averages of an optimizer spread what is added to a gradient over those
        that follow, and each step rounds them.

        Args:
            optimizer: Of one that is not known nothing is measured, unless copies of its weights can make its step.
            group: The group of all ``weights``, with the settings for them.
            weights: Parameters of half precision with gradients.
            terms: What of each gradient is the owner's, in float32, if it acts through gradients.
            without: The group without the owner, if the optimizer acts for it.
        """
        if not (weights and self.is_followed) or id(optimizer) in self.cannot_follow:
            return
        key = id(optimizer), id(weights[0])
        followed = self._followed.get(key)
        try:
            if followed is None or not followed.is_of(weights):
                self._finish(*key)
                is_decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
                followed = self._followed[key] = Followed(
                    optimizer,
                    weights,
                    self._follows_for,
                    _KEPT if knows(optimizer) else None,
                    have_twins=terms is not None or without is not None,
                    answers=self._corrects_itself,
                    squares=not self._corrects_itself and not (without is not None and is_decoupled),
                )
            followed.step(optimizer, group, terms, without or group)
        except Exception:
            self._give_up(optimizer)
            self._followed.pop(key, None)

    def _finish(self, *key: int) -> None:
        """Add up what copies have found whose key begins with ``key``."""
        for each in [each for each in self._followed if each[: len(key)] == key]:
            followed = self._followed.pop(each)
            for what, asked, errors in followed.found():
                self._add((what, *each), asked, errors, followed.stands_for)

    def expect_steps(self, optimizer: Optimizer, groups: Sequence[tuple[dict[str, Any], Sequence[Tensor]]]) -> None:
        """Let each call of :meth:`change` find, for weights before the step, those from which rounding leads as far.

        Whether an update agrees with a weight cannot be seen where half precision has made it zero.

        Args:
            optimizer: Of one that is not known nothing is expected, unless copies of its weights can make its step.
            groups: For each call the group, and the weights.
        """
        if not self.is_measured or id(optimizer) in self.cannot_follow:
            return
        expected: list[list[Any]] = []
        for group, weights in groups:
            expected.append([None] * len(weights))
            numbers = self.pick(local_pieces(weights))
            picked = [weights[i] for i in numbers]
            try:
                copies = Copies(optimizer, picked, widened)
                gradients = [weight.grad for weight in picked if weight.grad is not None]
                copies.step(optimizer, group, [widened(local_tensor(gradient)) for gradient in gradients])
            except Exception:
                self._give_up(optimizer)
                return
            for i, weight, after in zip(numbers, picked, copies.weights, strict=True):
                expected[-1][i] = 2 * widened(local_tensor(weight)) - after
        self._exact = expected

    def _give_up(self, optimizer: Optimizer) -> None:
        """In the handler of an error: it needs what copies do not have."""
        if knows(optimizer):
            raise
        self.cannot_follow.add(id(optimizer))

    def pick(self, tensors: Sequence[Tensor], *, together: bool = False) -> list[int]:
        """The numbers of the tensors to measure: small ones of half precision, the same on all ranks."""
        halves = [i for i, tensor in enumerate(tensors) if tensor.dtype in HALF]
        if together and halves:
            return list(range(len(tensors)))
        picked: list[int] = []
        left = _MOST
        for i in sorted(halves, key=lambda i: tensors[i].numel()):
            left -= tensors[i].numel()
            if picked and left < 0:
                break
            picked.append(i)
        return picked

    def _add(
        self,
        key: tuple[str, int, int],
        asked: Sequence[Tensor],
        errors: Sequence[Tensor],
        stands_for: int,
        each_step_counts: bool = False,
    ) -> None:
        """Add to what was asked of tensors that change together, and to the errors, what this step stands for.

        Elements are added up: where weights swing about zero, little of the way of many steps is left, and an error
        that is the same in all of them counts for more. Where ``each_step_counts``, lengths are added up instead, and
        what one step gains does not make up for what another loses.
        """
        for device in {each.device for each in asked}:
            pair = [[each.flatten()[:_KEPT].float() for each in of if each.device == device] for of in (asked, errors)]
            rows = torch.stack(list(map(torch.cat, pair))).mul_(stands_for)
            if each_step_counts:
                length = torch.linalg.vector_norm(rows[0])
                rows = torch.stack([length, (rows[1] * (rows[0] / length)).sum().abs()])[:, None]
            rows = rows.where(rows.isfinite().all(), 0.0)  # nothing was asked, or a GradScaler skips the step
            size = rows.numel()  # another one if a tensor has no gradient for once
            full = (*key, device, size)
            self._totals[full] = self._totals[full].add_(rows) if full in self._totals else rows

    # -- judging -------------------------------------------------------------------------------------------------------

    def judge_early(self) -> None:
        """After the first epoch that reaches a learning rate: where the strength is the same in all epochs."""
        if not self._is_done and not self._is_judged and self._is_constant and self._has_peaked:
            self._is_judged = True
            self._warn_if_lost()

    def judge(self) -> None:
        """When training ends."""
        if not self._is_done:
            self._warn_if_lost()
            self._is_done = True

    def _warn_if_lost(self) -> None:
        """Warn if the strength is another one; with a Trainer all ranks should take part."""
        run = self._owner.run
        self._finish()
        worst: dict[str, float] = {"change": 0.0, "step": 0.0, "square": 0.0}
        for (what, *_), (asked, error) in self._totals.items():
            length = torch.linalg.vector_norm(asked)
            share = (error * (asked / length)).sum().div_(length).item()
            if what == "step":  # copies of few weights differ by chance: two standard errors do not count
                noise = torch.linalg.vector_norm(error - share * asked).div_(length * math.sqrt(asked.numel())).item()
                share = math.copysign(max(abs(share) - 2 * noise, 0.0), share)
            if what == "square":  # each has a step size of its own, however small it is
                share = (error / asked).nanmean().item()
            if abs(share) > abs(worst[what]):  # NaN if nothing was asked
                worst[what] = share
        every = math.prod(1 + share for share in worst.values()) - 1
        off = [min(abs(share), 1.0) for share in (every, *worst.values())]
        if run.trainer is not None:
            off = [run.largest(number) for number in off]
        largest = max(off)
        if largest <= TOLERANCE:
            return
        self._is_done = True
        changed = "when it is added to half-precision gradients" if self._adds_to_gradients else "with the weights"
        in_square = "in the averages of squared gradients that the optimizer's step sizes come from"
        found = zip((changed, "in the optimizer's step of the weights", in_square), off[1:], strict=True)
        places = [place for place, number in found if number > TOLERANCE / 3.2]  # which one of them is
        remedy = self._remedy if places == [changed] or not (self._adds_to_gradients or in_square in places) else ""
        if self._adds_to_gradients and changed in places[:-1]:
            remedy = "; rounding='stochastic' helps with the gradients alone"
        self._owner.warn(
            f"{self._who} is off by up to {largest:.0%} of its strength here: it is rounded {' and '.join(places)}. "
            f"Use float32 weights with precision='bf16-mixed'{remedy}."
        )


@torch.no_grad()
def measure_decay(rounded: Rounding, step: Step, targets: Sequence[Alike], method: DecayMethod) -> None:
    """Measure what an optimizer is going to round away of weight decay.

    Args:
        rounded: Where to add it up.
        step: The step that begins.
        targets: What decays in it.
        method: How it decays.
    """
    optimizer = step.optimizer
    if isinstance(method, Cautious):
        rounded.expect_steps(optimizer, [(alike.group, alike.parameters) for alike in targets])
    if method.acts_on_weights and not isinstance(method, Stable):
        return
    for alike in targets:
        weights = [alike.parameters[i] for i in rounded.pick(alike.parameters)]
        group = alike.group
        if not method.uses_optimizer:
            terms = [alike.pull * local_piece(weight).float() for weight in weights]
            rounded.follow(optimizer, group, weights, terms if method.adds_to_gradients else None)
            continue
        own, without = {**group, "weight_decay": alike.weight_decay}, {**group, "weight_decay": 0.0}
        rounded.follow(optimizer, own, weights, without=without)
        # Mostly it decays by itself, before its update. A fused one rounds once, with the noise of the gradient in it.
        if id(optimizer) in rounded.cannot_follow and rounded.is_measured and not group.get("fused"):
            copies = [local_piece(weight).clone() for weight in weights]
            rounded.change(functools.partial(decay_, share=alike.share), copies)
