"""How much of what a callback does is left when half precision has rounded it?"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_regularize._sharding import local_piece, local_tensor
from lightning_regularize._steps.buckets import HALF
from lightning_regularize.callbacks._copied_steps import WIDE, can_be_copied, step_of_copies, widened_copy
from lightning_regularize.decay import decay_
from lightning_regularize.step_sizes import knows, step_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lightning_regularize._steps.hooks import Step
    from lightning_regularize.callbacks._base import Regularizer
    from lightning_regularize.decay_methods import Alike
    from lightning_regularize.selection import ParameterInfo

TOLERANCE = 0.05  # what may be lost, or gained, of a strength before a warning says so
_STEPS = (0, 1, 4, 7, 12)  # measured first; not all of the first ones, since weights stay where nothing moves them
_EVERY = 50  # then one step of so many is measured
_MOST = 2**20  # elements measured in one call, at least one tensor: each costs up to fifteen numbers of memory
_KEPT = 2**16  # elements of a tensor whose sums over the steps are kept
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
        corrects_itself: Is a step asked for what those before it lost? Then all are measured, and each counts.
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
        self._adds_to_gradients, self._every = adds_to_gradients, 1 if corrects_itself else _EVERY
        self._is_done = not any(info.parameter.dtype in HALF for info in infos)
        self._is_judged = False
        self._first: int | None = None
        self._has_peaked = False  # has a learning rate been near its peak?
        self._calls = 0
        # Of tensors that change together: how far their elements should have gone in all, and how far off they are.
        self._totals: dict[tuple[str, int, int, torch.device, int], Tensor] = {}
        self._optimizer = 0
        self._stands_for = 1  # a step that is measured stands for those since the one before it
        self.is_measured = False
        """Is the step under way one to measure?"""

    def begin_step(self, step: Step) -> None:
        """Decide whether to measure this step; in a loop without a Trainer, judge when it is time."""
        self.is_measured, self._calls, self._optimizer = False, 0, id(step.optimizer)
        if self._is_done:
            return
        self._first = step.number if self._first is None else self._first
        seen, run = step.number - self._first, self._owner.run
        if run.trainer is None:
            if seen > _STEPS[-1]:
                self.judge_early()
            if step.number + 1 == run.clock.total_steps or (math.isinf(run.clock.total_steps) and seen == _LOOP):
                self.judge()
                return
        self.is_measured = seen in _STEPS or seen % self._every == 0
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
        exact: Sequence[Any] | None = None,
    ) -> None:
        """Call ``change(tensors, *columns)``, where a column has an entry for each tensor, and measure what it does.

        Args:
            change: What changes the tensors.
            tensors: What is changed.
            columns: The other arguments.
            together: Does the change of one tensor depend on the others? Then all are measured.
            exact: The first column without what half precision has made of it, if that is another.
        """
        picked = self.pick(tensors, together=together)
        if not picked:
            change(tensors, *columns)
            return
        before = [_widened(local_tensor(tensors[i])) for i in picked]
        wide = [_widened(tensors[i].detach()) for i in picked]
        asked_of = columns if exact is None else (exact, *columns[1:])
        change(wide, *[[_widened(column[i]) for i in picked] for column in asked_of])
        change(tensors, *columns)
        asked = [local_tensor(w) - b for w, b in zip(wide, before, strict=True)]
        errors = [local_tensor(tensors[i]) - local_tensor(w) for i, w in zip(picked, wide, strict=True)]
        self._add("change", asked, errors, each_step_counts=self._every == 1)

    @torch.no_grad()
    def step(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        weights: Sequence[Tensor],
        terms: Sequence[Tensor],
        *,
        is_decoupled: bool = False,
        is_steady: bool = True,
    ) -> None:
        """Measure what the step that begins is going to round away, by the same step of copies in both precisions.

        Of an optimizer that :mod:`~lightning_regularize.step_sizes` does not know, and of ``terms`` that are not added
        in each step, a step without them shows what they do in one. Momentum makes more of them later, so that the
        warning may come too soon.

        Args:
            optimizer: Of one that is not known nothing is measured, unless copies of its weights can make its step.
            group: The group of all ``weights``, with the settings for them.
            weights: Parameters of half precision with gradients.
            terms: What of each gradient is the owner's, in float32, or of each weight where that decays by itself.
            is_decoupled: Does the optimizer subtract ``terms``, times its rate, without having them in its averages?
            is_steady: Are ``terms`` added in each step?
        """
        is_known = knows(optimizer)
        if not weights or not (is_known or can_be_copied(optimizer)):
            return
        try:
            in_half, rounded = step_of_copies(optimizer, group, weights, torch.Tensor.clone)
            in_wide, wide = step_of_copies(optimizer, group, weights, widened_copy)
            by_size = is_known and is_steady
            without = wide if by_size else step_of_copies(optimizer, group, weights, widened_copy, terms)[1]
        except Exception:
            if is_known:
                raise
            return  # it needs what copies do not have
        if by_size:
            if is_decoupled:
                lengths = [group["lr"] for _ in wide]
            else:
                lengths = [size.lengths() for size in step_sizes(in_wide, group, wide) if size is not None]
            asked = [-(n * local_tensor(t).view_as(w)) for n, t, w in zip(lengths, terms, wide, strict=True)]
        else:
            asked = [w - o for w, o in zip(wide, without, strict=True)]
        self._add("step", asked, [r - w for r, w in zip(rounded, wide, strict=True)])
        # Averages of gradients are rounded as well: in bfloat16 that of Adam's squares stands still with beta 0.999.
        for name in () if is_decoupled else _averages(optimizer.state[weights[0]]):
            if not all(name in optimizer.state[weight] for weight in weights):
                continue
            start = [local_tensor(optimizer.state[weight][name]).float() for weight in weights]
            ends = [in_wide.state[w][name] for w in wide]
            asked = [end - average for end, average in zip(ends, start, strict=True)]
            found = [in_half.state[r][name].float() for r in rounded]
            errors = [f - end for f, end in zip(found, ends, strict=True)]
            self._add("step", asked, errors, each_step_counts=True)  # an average comes back to where it was

    def exact_sizes(self, optimizer: Optimizer, group: dict[str, Any], weights: Sequence[Tensor]) -> list[Any]:
        """The step sizes after the step that begins, if that is not rounded: half precision makes small squares 0."""
        self._is_constant = False  # the first steps, of which averages know little, do not stand for the others
        in_wide, wide = step_of_copies(optimizer, group, weights, widened_copy)
        return step_sizes(in_wide, group, wide)

    def pick(self, tensors: Sequence[Tensor], *, together: bool = False) -> list[int]:
        """The numbers of the tensors to measure: small ones of half precision, the same on all ranks; none mostly."""
        if not self.is_measured:
            return []
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
        self, what: str, asked: Sequence[Tensor], errors: Sequence[Tensor], *, each_step_counts: bool = False
    ) -> None:
        """Add to what was asked of tensors that change together, and to the errors, what this step stands for.

        Elements are added up: where weights swing about zero, little of the way of many steps is left, and an error
        that is the same in all of them counts for more. Where ``each_step_counts``, lengths are added up instead, and
        what one step gains does not make up for what another loses.
        """
        self._calls += 1
        for device in {each.device for each in asked}:
            pair = [[each.flatten()[:_KEPT].float() for each in of if each.device == device] for of in (asked, errors)]
            rows = torch.stack(list(map(torch.cat, pair))).mul_(self._stands_for)
            if each_step_counts:
                length = torch.linalg.vector_norm(rows[0])
                rows = torch.stack([length, (rows[1] * (rows[0] / length)).sum().abs()])[:, None]
            rows = rows.where(rows.isfinite().all(), 0.0)  # nothing was asked, or a GradScaler skips the step
            size = rows.numel()  # another one if a tensor has no gradient for once
            key = what, self._optimizer, self._calls, device, size
            self._totals[key] = self._totals[key].add_(rows) if key in self._totals else rows

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
        worst: dict[str, float] = {"change": 0.0, "step": 0.0}
        for (what, *_), (asked, error) in self._totals.items():
            length = torch.linalg.vector_norm(asked)
            share = (error * (asked / length)).sum().div_(length).item()
            if abs(share) > abs(worst[what]):  # NaN if nothing was asked
                worst[what] = share
        both = abs((1 + worst["change"]) * (1 + worst["step"]) - 1)
        off = [min(number, 1.0) for number in (both, abs(worst["change"]), abs(worst["step"]))]
        if run.trainer is not None:
            off = [run.largest(number) for number in off]
        largest = max(off)
        if largest <= TOLERANCE:
            return
        self._is_done = True
        changed = "when it is added to half-precision gradients" if self._adds_to_gradients else "with the weights"
        found = zip((changed, "in the optimizer's step of the weights"), off[1:], strict=True)
        places = [place for place, number in found if number > TOLERANCE / 2.1]  # which one of them is
        remedy = self._remedy if not self._adds_to_gradients or places == [changed] else ""
        if self._adds_to_gradients and len(places) == 2:
            remedy = "; rounding='stochastic' helps with the gradients alone"
        self._owner.warn(
            f"{self._who} is off by up to {largest:.0%} of its strength here: it is rounded {' and '.join(places)}. "
            f"Use float32 weights with precision='bf16-mixed'{remedy}."
        )


@torch.no_grad()
def measure_decay(rounded: Rounding, step: Step, targets: Sequence[Alike], *, by_optimizer: bool) -> None:
    """Measure what an optimizer is going to round away of weight decay.

    Args:
        rounded: Where to add it up.
        step: The step that begins.
        targets: What decays in it.
        by_optimizer: Does the optimizer decay by itself? If not, its gradients hold the decay.
    """
    optimizer = step.optimizer
    for alike in targets:
        weights = [alike.parameters[i] for i in rounded.pick(alike.parameters)]
        value, group = alike.weight_decay, alike.group
        if by_optimizer and not knows(optimizer):  # mostly it decays by itself, before its update
            if not group.get("fused"):  # which rounds once, with the noise of the gradient in it
                copies = [local_piece(weight).clone() for weight in weights]
                rounded.change(functools.partial(decay_, share=alike.share), copies)
            continue
        is_decoupled = by_optimizer and (isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False))
        own = {**group, "weight_decay": value} if by_optimizer else group
        terms = [value * local_piece(weight).float() for weight in weights]
        rounded.step(optimizer, own, weights, terms, is_decoupled=is_decoupled)


def _widened(entry: Any) -> Any:
    """A tensor of half precision, in float64; another entry as it is."""
    if not isinstance(entry, Tensor) or entry.dtype not in HALF:
        return entry
    return entry.detach().to(WIDE.get(entry.device.type, torch.float64))


def _averages(state: Mapping[str, Any]) -> list[str]:
    return [name for name, value in state.items() if isinstance(value, Tensor) and value.dtype in HALF]
