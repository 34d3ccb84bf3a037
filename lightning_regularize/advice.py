"""What is likely not meant? Settings of weight decay that do nothing, too much, or the same thing twice."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_regularize import theory
from lightning_regularize.group_settings import COUPLED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

_NOTHING = 0.1  # of a timescale: weights left alone would keep 90 % of their size
# As peft and torchtune call them, and as diffusers' training scripts do.
_ADAPTER = re.compile(r"(^|\.)lora_((embedding_)?[ab]|down|up)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class DecayingGroup:
    """What is known of a parameter group whose weights decay.

    Args:
        label: Its name.
        rule: Class name of the optimizer.
        lr: Its peak, positive.
        weight_decay: Of a typical step, positive.
        momentum: That the decay passes through, as in SGD; 0 if decoupled.
        is_decoupled: Does the decay go past the gradient?
        is_fused: Does a kernel round weights once a step?
        dtypes: Of its parameters.
    """

    label: str
    rule: str
    lr: float
    weight_decay: float
    momentum: float = 0.0
    is_decoupled: bool = True
    is_fused: bool = False
    dtypes: frozenset[torch.dtype] = frozenset()

    @property
    def what(self) -> str:
        """In words."""
        return f"{self.label!r}: weight decay {self.weight_decay:.3g} at lr {self.lr:.3g}"


def advise(
    groups: Sequence[DecayingGroup],
    *,
    total_steps: float = math.inf,
    steps_per_epoch: float = math.inf,
    other_decays: Sequence[str] = (),
    decaying: Iterable[str] = (),
) -> list[str]:
    """What a reader of the settings would ask about.

    Args:
        groups: Those that decay.
        total_steps: Of the run; infinite if unknown, and then not judged.
        steps_per_epoch: Likewise.
        other_decays: What decays weights besides the optimizer, such as "L2Penalty".
        decaying: Names of the parameters that decay, among which LoRA adapters are looked for.

    Returns:
        Sentences, none if all is well.

    Example:
        >>> group = DecayingGroup("decay", "AdamW", lr=1e-3, weight_decay=0.01)
        >>> print(*advise([group], total_steps=2000))
        'decay': weight decay 0.01 at lr 0.001 acts over 100,000 steps; this run has 2,000: it will do next to nothing.
    """
    found: dict[str, list[str]] = {}
    for group in groups:
        for kind, sentence in _of_group(group, total_steps, steps_per_epoch):
            found.setdefault(kind, []).append(sentence)
    if other_decays and groups:
        found["twice"] = [f"Weights decay twice: by the optimizer ({groups[0].what}) and by {_listed(other_decays)}."]
    elif len(other_decays) > 1:
        found["twice"] = [f"Weights decay twice: by {_listed(other_decays)}."]
    if adapters := [name for name in decaying if _ADAPTER.search(name)]:
        found["adapters"] = [
            f"Weight decay of LoRA adapters ({len(adapters)}, such as {adapters[0]!r}) pulls towards the base model, "
            "to which their product is added, and not towards smaller weights. If that is not meant, add '*lora_*' to "
            "`exclude`."
        ]
    return [_first_of(list(dict.fromkeys(sentences))) for sentences in found.values()]


def _of_group(group: DecayingGroup, total_steps: float, steps_per_epoch: float) -> Iterable[tuple[str, str]]:
    """What is said of one group, each with a word for its kind."""
    steps = theory.timescale(group.lr, group.weight_decay, group.momentum)
    if group.is_decoupled and group.lr * group.weight_decay > 1:
        share = group.lr * group.weight_decay
        yield "diverges", f"{group.what} removes {share:.0%} of a weight in one step, so that it changes its sign."
    elif math.isfinite(total_steps) and total_steps < _NOTHING * steps:
        run = f"this run has {total_steps:,.0f}"
        yield "weak", f"{group.what} acts over {steps:,.0f} steps; {run}: it will do next to nothing."
    elif math.isfinite(steps_per_epoch) and steps < min(steps_per_epoch, total_steps) / 2:
        yield (
            "strong",
            f"{group.what} acts over {steps:,.0f} steps, less than half an epoch of {steps_per_epoch:,.0f}: "
            "the weights forget most of the data before they see it again.",
        )
    if group.rule in COUPLED and not group.is_decoupled:
        yield (
            "coupled",
            f"{group.rule} adds weight decay to the gradient and then divides by the gradient's size, so that weights "
            "with large gradients hardly decay; AdamW, or WeightDecay(..., method='decoupled'), is likely meant.",
        )
    if not group.is_decoupled or group.is_fused:
        return  # what rounds is the sum with the gradient, whose noise carries the decay
    # Nothing is measured yet, and perhaps no callback will: only what no weight can escape is said. A callback that
    # decays measures the rest while it trains, see `callbacks/_rounding.py`.
    for dtype in sorted(group.dtypes, key=str):
        threshold = theory.decay_rounding_threshold(dtype)
        if group.lr * group.weight_decay <= threshold:
            yield (
                "rounding",
                f"{group.what} is lost to rounding: {dtype} weights stay as they are when lr * weight_decay is at most "
                f"{threshold:.2g}. Keep float32 weights (precision='bf16-mixed'), use a fused optimizer, or "
                "WeightDecay(..., method='decoupled', rounding='stochastic').",
            )


def _first_of(sentences: list[str]) -> str:
    others = len(sentences) - 1
    return sentences[0] + (f" The same holds for {others} other group{'s' if others > 1 else ''}." if others else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
