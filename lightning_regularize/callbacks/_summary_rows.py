"""Which rows and notes does a summary have? One row for each parameter that is trained."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_regularize import group_settings
from lightning_regularize._steps.watch import stepping_optimizers
from lightning_regularize._tables import Column, Table
from lightning_regularize._trainer.run import group_labels
from lightning_regularize._trainer.strategies import held_parameters, torch_optimizer
from lightning_regularize.advice import DecayingGroup, advise
from lightning_regularize.callbacks.anchor_decay import AnchorDecay
from lightning_regularize.callbacks.constrained_decay import ConstrainedDecay
from lightning_regularize.callbacks.penalty import PenaltyCallback
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.groups import group_name
from lightning_regularize.schedules import Position, timescales_in, value_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_regularize._steps.watch import Watch
    from lightning_regularize.schedules import ScheduleLike
    from lightning_regularize.selection import ParameterInfo

_SAMPLES = 100  # positions at which a schedule is looked at for its mean


@dataclass(frozen=True)
class Training:
    """What a summary is of: a run of a Trainer, or what a run would have.

    Args:
        infos: All parameters of the module.
        optimizers: The optimizers, as they are or as a strategy wraps them.
        callbacks: The callbacks.
        total_steps: Of the run; infinite where it is not known.
        steps_per_epoch: Likewise.
    """

    infos: Sequence[ParameterInfo]
    optimizers: Sequence[Any]
    callbacks: Sequence[Any]
    total_steps: float = math.inf
    steps_per_epoch: float = math.inf

    @property
    def weight_decay(self) -> WeightDecay | None:
        """The callback, if there is one."""
        return next((callback for callback in self.callbacks if isinstance(callback, WeightDecay)), None)


class Row(NamedTuple):
    """One parameter in a summary."""

    group: str
    info: ParameterInfo
    decays: tuple[float, float] | None = None  # the least and the most of the run
    lr: float | None = None
    rule: str = ""
    advice: DecayingGroup | None = None  # what is known of the group, if the parameter decays
    timescale: float = 0.0  # in steps, where a Timescale was asked for


def rows_of(training: Training) -> list[Row]:
    """All trainable parameters, by optimizer, group and factor."""
    callback = training.weight_decay
    found = _of_optimizers(training) if callback is None else _of_schedule(callback)
    trainable = [info for info in training.infos if info.parameter.requires_grad]
    names = {info.name for info in trainable}
    rows = list(found)
    held = {id(row.info.parameter) for row in rows}
    rows = [row for row in rows if row.info.name in names]
    return rows + [Row("(in no optimizer)", info) for info in trainable if id(info.parameter) not in held]


def _of_optimizers(training: Training) -> Iterator[Row]:
    """What the groups of the optimizers say by themselves."""
    infos = {id(info.parameter): info for info in training.infos}
    several = len(training.optimizers) > 1
    for i, wrapped in enumerate(training.optimizers):
        optimizer = torch_optimizer(wrapped)
        labels = group_labels(wrapped, f"optimizer{i}" if several else "")
        of_groups = zip(labels, wrapped.param_groups, held_parameters(wrapped), strict=True)
        for pg, group, parameters in of_groups:
            label, holder = _holder(optimizer, group, pg)
            decay = None if group.get("weight_decay") is None else float(group["weight_decay"])
            known = _group_advice(label, holder, group, decay or 0.0, not _is_coupled(holder, group))
            for parameter in parameters:
                if id(parameter) in infos:
                    rule = "" if decay else "0 as configured"
                    decays = None if decay is None else (decay, decay)
                    yield Row(label, infos[id(parameter)], decays, _rate(group), rule, known)


def _of_schedule(callback: WeightDecay) -> Iterator[Row]:
    """What WeightDecay makes of the groups: each in parts of one schedule and factor."""
    rules = callback.rules
    found = list(callback.by_parameter())
    schedules = {id(info): rules.decide(info).setting.schedule for info, *_ in found}
    labels = {w.index: group_labels(w.optimizer, callback.run.label(w)) for _, w, *_ in found}
    is_one = sum(map(len, labels.values())) == 1
    samples: dict[tuple[float, int], Sequence[float]] = {}

    def part_of(each: tuple[ParameterInfo, Watch, int, float, float, str]) -> tuple[int, int, float, int]:
        info, watch, i, _, share, _ = each
        return watch.index, i, -share, schedules[id(info)]

    for (index, i, _, schedule), of_part in itertools.groupby(sorted(found, key=part_of), key=part_of):
        members = list(of_part)
        _, watch, _, value, share, _ = members[0]
        optimizer = torch_optimizer(watch.optimizer)
        group = optimizer.param_groups[i]
        peak, part = _peak(group), group_name(share)
        if (peak, schedule) not in samples:
            samples[peak, schedule] = _sampled(callback, rules.schedules[schedule], peak)
        reach = samples[peak, schedule] or [value / share if share else 0.0]
        if share and rules.names[schedule]:
            part = f"{part}, {rules.names[schedule]}"
        pg, holder = _holder(optimizer, group, labels[index][i])
        label = part if is_one else f"{pg} {part}"
        is_decoupled = not callback.decay_method.adds_to_gradients
        if callback.decay_method.uses_optimizer:
            is_decoupled = not _is_coupled(holder, group)
        elif share:
            label = f"WeightDecay, {label}"
        known = _group_advice(label, holder, group, share * sum(reach) / len(reach), is_decoupled)
        steps = _timescale(callback, schedule) / share if share else 0.0
        decays = share * min(reach), share * max(reach)
        for info, *_, rule in members:
            why = rule if rule or share else "0 as configured"
            yield Row(label, info, decays, _rate(group), why, known, steps)


def _holder(optimizer: Any, group: dict[str, Any], label: str) -> tuple[str, Any]:
    """Which of several optimizers in one steps a group, with the label of the group, in which its name comes first."""
    inner = stepping_optimizers(optimizer)
    holder = next((each for each in inner if any(held is group for held in each.param_groups)), optimizer)
    return (f"{type(holder).__name__} {label}" if len(inner) > 1 else label), holder


def _rate(group: dict[str, Any]) -> float | None:
    return None if group.get("lr") is None else float(group["lr"])


def _peak(group: dict[str, Any]) -> float:
    # LR schedulers that cycle write their peak into the group, others leave what they began with.
    return max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))


def _group_advice(
    label: str, optimizer: Any, group: dict[str, Any], weight_decay: float, is_decoupled: bool
) -> DecayingGroup | None:
    found = group_settings.settings(optimizer, group)
    if not (_peak(group) > 0 and weight_decay > 0):
        return None
    return DecayingGroup(
        label=label,
        rule=found["rule"],
        lr=_peak(group),
        weight_decay=weight_decay,
        momentum=0.0 if is_decoupled or "SGD" not in found["rule"] else found["momentum"],
        is_decoupled=is_decoupled,
        is_fused=bool(group.get("fused")),
        dtypes=frozenset(parameter.dtype for parameter in group["params"] if parameter.requires_grad),
    )


def _is_coupled(optimizer: Any, group: dict[str, Any]) -> bool:
    rule = group_settings.settings(optimizer, group)["rule"]
    return rule not in ("AdamW", "Lion", "Muon", "Adafactor") and not group.get("decoupled_weight_decay")


def table_of(rows: list[Row], *, max_rows: int, caption: str = "", notes: Sequence[str] = ()) -> Table:
    """The rows as a table, in which parameters of one shape and rule share a row, with a section for each group."""
    lrs = {row.lr for row in rows if row.lr is not None}
    sections, hidden, left = [], 0, max_rows
    for group, found in itertools.groupby(rows, key=lambda row: row.group):
        members = list(found)
        ranges = {row.decays for row in members if row.decays is not None}
        numbers = sum(math.prod(row.info.shape) for row in members)
        decay = ", ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in sorted(ranges)) or "-"
        if len(lrs) > 1 and members[0].lr is not None:
            decay += f", lr {members[0].lr:.3g}"
        if members[0].timescale:
            decay += f", over {members[0].timescale:,.4g} steps"
        section = [(group, f"{len(members)} tensor{'s' if len(members) > 1 else ''}", f"{numbers:,}", decay)]
        alike = _alike(members)
        for rows_alike in alike[:left]:
            info, count = rows_alike[0].info, len(rows_alike)
            shape = "x".join(map(str, info.shape)) or "scalar"
            name = "  " + _joint_name([row.info.name for row in rows_alike])
            size = f"{count * math.prod(info.shape):,}"
            section.append((name, f"{count} of {shape}" if count > 1 else shape, size, rows_alike[0].rule))
        hidden += sum(map(len, alike[left:]))
        left = max(left - len(alike), 0)
        sections.append(section)
    if hidden:
        caption = f"{hidden} more parameters are not shown; see `max_rows`. {caption}".strip()
    columns = [
        Column("Group, parameters"),
        Column("Shape", is_right=True),
        Column("Numbers", is_right=True),
        Column("Decay, why", max_width=20),
    ]
    return Table(columns, sections, title="Regularization", caption=caption, notes=notes, has_heads=True)


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Rows of one shape and rule whose names differ in numbers only, in the order of the first of each."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        pattern = tuple("#" if part.isdigit() else part for part in row.info.name.split("."))
        found.setdefault((pattern, tuple(row.info.shape), row.rule), []).append(row)
    return list(found.values())


def _joint_name(names: list[str]) -> str:
    """One name for several: ``blocks.0.weight`` and ``blocks.1.weight`` are ``blocks.{0,1}.weight``."""
    parts = [list(dict.fromkeys(parts)) for parts in zip(*(name.split(".") for name in names), strict=True)]
    return ".".join(part[0] if len(part) == 1 else "{" + _ranges(list(map(int, part))) + "}" for part in parts)


def _ranges(numbers: list[int]) -> str:
    contiguous = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    return f"{numbers[0]}-{numbers[-1]}" if contiguous else ",".join(map(str, numbers))


def notes_of(training: Training, rows: list[Row]) -> list[str]:
    """Warnings about likely misconfigurations."""
    groups = list(dict.fromkeys(row.advice for row in rows if row.advice is not None))
    kinds = (AnchorDecay, ConstrainedDecay)
    others = [c for c in training.callbacks if isinstance(c, kinds) or (isinstance(c, PenaltyCallback) and c.decays)]
    names = [type(other).__name__ for other in others]
    steps = {"total_steps": training.total_steps, "steps_per_epoch": training.steps_per_epoch}
    decaying = [row.info.name for row in rows if row.advice is not None]
    return advise(groups, other_decays=names, decaying=decaying, **steps)


def _timescale(callback: WeightDecay, schedule: int) -> float:
    """The time over which a Timescale acts at the peak of the rate, in steps; 0 of another schedule."""
    timescales = timescales_in(callback.rules.schedules[schedule])
    clock = callback.run.clock
    position = Position(0, clock.total_steps, steps_per_epoch=clock.steps_per_epoch)
    return timescales[0].in_steps(position) if timescales else 0.0


def _sampled(callback: WeightDecay, schedule: ScheduleLike | None, lr: float) -> Sequence[float]:
    """Values of a schedule over the run, at a constant rate; none where the groups keep their own."""
    if schedule is None:
        return []
    horizon = callback.run.clock.total_steps  # infinite where all schedules are constant
    last = horizon - 1 if math.isfinite(horizon) else 0
    steps = [round(i * last / (_SAMPLES - 1)) for i in range(_SAMPLES)]
    epoch_steps = callback.run.clock.steps_per_epoch
    return [value_at(schedule, Position(step, horizon, 0, lr, lr, epoch_steps)) for step in steps]
