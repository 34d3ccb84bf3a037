"""Under which keys are the values of a monitor logged, and how many of them?"""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any

from lightning_regularize import quantities
from lightning_regularize.histograms import BINS

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_regularize._steps.watch import Watch
    from lightning_regularize.callbacks._monitored import Table
    from lightning_regularize.callbacks.norm_monitor import WeightNormMonitor
    from lightning_regularize.histograms import Histogram
    from lightning_regularize.spikes import SpikeScores

NONFINITE = ("gradient_nonfinite", "weight_nonfinite")
"""Counts that are logged beside quantities."""

_TOTAL = re.compile(r"(optimizer\d+ )?total")  # parts of the model may be called so as well
_BYTES = 16 * BINS  # of a histogram on disk: a count and an edge a bin


class LoggedValues:
    """The values of a step by key.

    Args:
        monitor: What to log, of which parts, and at most how much.
        run: The run.
        spikes: The totals before.
    """

    def __init__(self, monitor: WeightNormMonitor, run: Any, spikes: SpikeScores) -> None:
        self._monitor, self._run, self.spikes = monitor, run, spikes
        self._histogram_bytes = 0

    def totals(self, watch: Watch, sums: dict[str, Tensor]) -> dict[str, float]:
        """The values of all parameters of an optimizer together, by key."""
        count = len(sums["size"])
        if not count:
            self._monitor.warn(
                f"WeightNormMonitor logs nothing of optimizer {watch.index}: it holds no parameter that is watched."
            )
            return {}
        total = quantities.combined(sums, [0] * count, 1, self._monitor.norm_type)
        part = f"{label} total" if (label := self._run.label(watch)) else "total"
        values = self._values([part], total)
        if self._monitor.spike_score:
            values |= self.spikes.scores({key: value for key, value in values.items() if "/expected" not in key})
        counted = {name: total[name].tolist()[0] for name in ("gradient_size", *NONFINITE) if name in total}
        if counted.get("gradient_size") == 0:
            self._monitor.warn("WeightNormMonitor logs no gradient norm: no parameter that it watches has a gradient.")
            del counted["gradient_nonfinite"]
        if counted.get("weight_nonfinite") == 0:
            del counted["weight_nonfinite"]
        return values | {f"{name}/{part}": counted[name] for name in NONFINITE if name in counted}

    def details(self, watch: Watch, table: Table, sums: dict[str, Tensor], taken: set[str]) -> dict[str, float]:
        """The values of the parts that ``detail`` asks for, by key; ``taken`` are parts of other optimizers."""
        if self._monitor.detail == "total":
            return {}
        parts, index = table.parts(self._monitor.detail, watch.optimizer, self._run.label(watch))
        if not parts:
            return {}
        of_parts = quantities.combined(sums, index, max(index) + 1, self._monitor.norm_type)
        parts = [f"{part} ({self._monitor.detail})" if _TOTAL.fullmatch(part) else part for part in parts]
        labels = [f"{self._run.label(watch)} {part}" if part in taken else part for part in parts]
        taken |= set(parts)
        return self._values(labels, {name: values[: len(parts)] for name, values in of_parts.items()})

    def _values(self, parts: list[str], sums: dict[str, Tensor]) -> dict[str, float]:
        """The quantities of parts by key, without those that a part does not have."""
        batches, accumulated = self._run.trainer.num_training_batches, self._run.trainer.accumulate_grad_batches
        steps = batches if math.isinf(batches) else math.ceil(batches / accumulated)
        found = quantities.values_of(
            sums,
            self._monitor.quantities,
            norm_type=self._monitor.norm_type,
            expected=self._monitor.expected,
            steps_per_epoch=steps,
        )
        return quantities.by_key(found, parts)

    def at_most(self, details: dict[str, float]) -> dict[str, float]:
        if len(details) > self._monitor.max_keys:
            self._monitor.warn(
                f"WeightNormMonitor logs {self._monitor.max_keys} of {len(details)} keys a step: "
                "ask for less `detail`, `include` less, or raise `max_keys`."
            )
            return dict(itertools.islice(details.items(), self._monitor.max_keys))
        return details

    def affordable(self, drawn: dict[str, Histogram]) -> dict[str, Histogram]:
        if drawn and self._histogram_bytes + len(drawn) * _BYTES > self._monitor.max_histogram_megabytes * 1e6:
            self._monitor.warn(
                f"WeightNormMonitor draws no more histograms: there are {self._histogram_bytes / 1e6:.0f} MB of them. "
                "Draw them more rarely, `include` less, or raise `max_histogram_megabytes`."
            )
            return {}
        self._histogram_bytes += len(drawn) * _BYTES
        return dict(itertools.islice(drawn.items(), self._monitor.max_keys))
