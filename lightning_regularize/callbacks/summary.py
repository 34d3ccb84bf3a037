"""What decays, by how much, and why? A table before the first step, and what is likely not meant."""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import Callback
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_regularize import _stepping, quantities
from lightning_regularize._configuring import model_root
from lightning_regularize.advice import DecayingGroup, advise
from lightning_regularize.callbacks.anchor_decay import AnchorDecay
from lightning_regularize.callbacks.constrained_decay import ConstrainedDecay
from lightning_regularize.callbacks.penalty import ElasticNetPenalty, L2Penalty
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.module import grouping_of
from lightning_regularize.schedules import Position, value_at
from lightning_regularize.selection import parameter_infos

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import lightning.pytorch as pl

    from lightning_regularize.groups import Grouping
    from lightning_regularize.selection import ParameterInfo

_SAMPLES = 100  # positions at which a schedule is looked at for its mean


class RegularizationSummary(Callback):
    """Prints which parameters decay, by how much, and the rule that decided, once at the start of training.

    The table is of what the optimizers hold, whoever made their groups. Scheduled weight decay shows the range of its
    values in the run; learning rates stand beside it where groups differ in them. Below it stands what is likely not
    meant: weight decay that hardly acts in a run of this length, is lost to rounding, goes through Adam's
    normalization, or is applied twice. Printed on rank 0 only.

    Args:
        max_rows: Rows shown at most; what is left out is counted. At least 1. Parameters that differ in a number only,
            as those of repeated blocks, share a row.

    Raises:
        ValueError: ``max_rows`` is no positive integer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import RegularizationSummary, WeightDecay
        >>> callbacks = [WeightDecay(0.05), RegularizationSummary()]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(self, *, max_rows: int = 50) -> None:
        super().__init__()
        if not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 1:
            raise ValueError(f"`max_rows` should be a positive integer, got {max_rows!r}.")
        self.max_rows = max_rows
        self._printed = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not hold the module."""
        return _stepping.without_module(self)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._printed = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In the first epoch: others have written their values in ``on_train_start``, also those that stand behind."""
        if self._printed or not _stepping.has_optimizer(trainer):
            return
        self._printed = True
        rows = _rows(trainer, pl_module)  # on every rank: if one alone raised, the others would wait for it
        if trainer.is_global_zero:
            console = Console()
            console.print(_table(rows, self.max_rows))
            for sentence in _advice(trainer):
                console.print(f"[bold]Note[/bold] {escape(sentence)}", highlight=False)


class _Row(NamedTuple):
    group: str
    info: ParameterInfo
    decays: tuple[float, float] | None  # the least and the most of the run
    lr: float | None
    rule: str


def _rows(trainer: pl.Trainer, module: pl.LightningModule) -> list[_Row]:
    """All trainable parameters, by optimizer and group."""
    infos = [info for info in parameter_infos(model_root(trainer, module)) if info.parameter.requires_grad]
    grouping = _grouping(trainer, module)
    schedule = _schedule(trainer)
    scheduled = {} if schedule is None else schedule.by_parameter(trainer)
    reach = functools.cache(functools.partial(_reach, schedule, _stepping.total_steps(trainer)))
    places = _places(trainer, infos)
    rows = []
    for info in sorted(infos, key=lambda info: places.get(info.name, (math.inf, 0))):
        if info.name not in places:
            rows.append(_Row("(in no optimizer)", info, None, None, ""))
            continue
        index, group = places[info.name]
        settings = trainer.optimizers[index].param_groups[group]
        share = weight_decay = settings.get("weight_decay")
        decays = None if weight_decay is None else (float(weight_decay), float(weight_decay))
        if info.name in scheduled:
            _, share = scheduled[info.name]
            low, high = reach(_peak(settings))
            decays = share * low, share * high
        factor, rule = grouping.decide(info) if grouping else (1.0, "")
        if not rule and factor and not share:
            rule = "0 as configured"
        label = _stepping.group_labels(trainer, index)[group]
        rows.append(_Row(label, info, decays, float(settings["lr"]) if "lr" in settings else None, rule))
    return rows


def _schedule(trainer: pl.Trainer) -> WeightDecay | None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, WeightDecay)), None)


def _peak(group: dict[str, Any]) -> float:
    # LR schedulers that cycle write their peak into the group, others leave what they began with.
    return max(float(group.get(key, 0.0)) for key in ("lr", "initial_lr", "max_lr"))


def _grouping(trainer: pl.Trainer, module: pl.LightningModule) -> Grouping | None:
    schedule = _schedule(trainer)
    return grouping_of(module) if schedule is None else schedule.grouping


def _places(trainer: pl.Trainer, infos: list[ParameterInfo]) -> dict[str, tuple[int, int]]:
    """Name -> indices of its optimizer and its group."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightDecay):  # knows the names, also where a strategy has put flat tensors instead
            layouts = callback.state_dict()["layouts"]
            return {n: (i, j) for i, layout in enumerate(layouts) for j, names in enumerate(layout) for n in names}
    place = {
        id(p): (i, j)
        for i, optimizer in enumerate(trainer.optimizers)
        for j, parameters in enumerate(_stepping.held_parameters(optimizer))
        for p in parameters
    }
    return {info.name: place[id(info.parameter)] for info in infos if id(info.parameter) in place}


def _table(rows: list[_Row], max_rows: int) -> Table:
    table = Table(title="Regularization", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("Group, parameters", overflow="fold")
    table.add_column("Shape", justify="right", no_wrap=True)
    table.add_column("Numbers", justify="right", no_wrap=True)
    table.add_column("Decay, why", overflow="fold", max_width=20)
    lrs = {row.lr for row in rows if row.lr is not None}
    hidden, left = 0, max_rows
    for group, found in itertools.groupby(rows, key=lambda row: row.group):
        members = list(found)
        ranges = {row.decays for row in members if row.decays is not None}
        numbers = sum(math.prod(row.info.shape) for row in members)
        decay = ", ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in sorted(ranges)) or "-"
        if len(lrs) > 1 and members[0].lr is not None:
            decay += f", lr {members[0].lr:.3g}"
        tensors = f"{len(members)} tensor{'s' if len(members) > 1 else ''}"
        table.add_row(escape(group), tensors, f"{numbers:,}", decay, style="bold")
        alike = _alike(members)
        for rows_alike in alike[:left]:
            info, count = rows_alike[0].info, len(rows_alike)
            shape = "x".join(map(str, info.shape)) or "scalar"
            name = escape("  " + _joint_name([row.info.name for row in rows_alike]))
            why = escape(rows_alike[0].rule)
            table.add_row(
                name, f"{count} of {shape}" if count > 1 else shape, f"{count * math.prod(info.shape):,}", why
            )
        hidden += sum(map(len, alike[left:]))
        left = max(left - len(alike), 0)
        table.add_section()
    if hidden:
        table.caption = f"{hidden} more parameters are not shown; see `max_rows`."
    return table


def _alike(rows: list[_Row]) -> list[list[_Row]]:
    """Rows of one shape and rule whose names differ in numbers only, in the order of the first of each."""
    found: dict[Any, list[_Row]] = {}
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


def _advice(trainer: pl.Trainer) -> list[str]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    total_steps = _stepping.total_steps(trainer)
    schedule = _schedule(trainer)
    groups = list(_decaying_groups(trainer, schedule, total_steps))
    others = [c for c in callbacks if isinstance(c, (L2Penalty, ElasticNetPenalty, AnchorDecay, ConstrainedDecay))]
    names = [type(other).__name__ for other in others]
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    return advise(groups, total_steps=total_steps, steps_per_epoch=steps_per_epoch, other_decays=names)


def _decaying_groups(trainer: pl.Trainer, schedule: WeightDecay | None, total_steps: float) -> Iterator[DecayingGroup]:
    for index, wrapped in enumerate(trainer.optimizers):
        optimizer = _stepping.torch_optimizer(wrapped)
        labels = _stepping.group_labels(trainer, index)
        for label, group in zip(labels, optimizer.param_groups, strict=True):
            found = quantities.settings(optimizer, group)
            peak = _peak(group)
            decay, is_decoupled = found["weight_decay"], not _is_coupled(found["rule"], group)
            if schedule is not None:
                decay *= _mean_over_first(schedule, total_steps, peak)
            if schedule is not None and schedule.method != "optimizer":
                decay, is_decoupled = _mean(schedule, total_steps, peak), schedule.method != "coupled"
                label = f"WeightDecay, {label}"
            if peak > 0 and decay > 0:
                yield DecayingGroup(
                    label=label,
                    rule=found["rule"],
                    lr=peak,
                    weight_decay=decay,
                    momentum=0.0 if is_decoupled or "SGD" not in found["rule"] else found["momentum"],
                    is_decoupled=is_decoupled,
                    is_fused=bool(group.get("fused")),
                    dtypes=frozenset(parameter.dtype for parameter in group["params"]),
                )


def _is_coupled(rule: str, group: dict[str, Any]) -> bool:
    return rule not in ("AdamW", "Lion", "Muon", "Adafactor") and not group.get("decoupled_weight_decay")


def _mean(schedule: WeightDecay, total_steps: float, lr: float) -> float:
    """Of the scheduled weight decay over the run, at a constant rate."""
    return sum(_sampled(schedule, total_steps, lr)) / _SAMPLES


def _mean_over_first(schedule: WeightDecay, total_steps: float, lr: float) -> float:
    """What the value of the first step, which stands in the groups, is to be multiplied by."""
    values = _sampled(schedule, total_steps, lr)
    return sum(values) / _SAMPLES / values[0] if values[0] > 0 else 1.0


def _reach(schedule: WeightDecay | None, total_steps: float, lr: float) -> tuple[float, float]:
    values = [0.0] if schedule is None else _sampled(schedule, total_steps, lr)
    return min(values), max(values)


def _sampled(schedule: WeightDecay, total_steps: float, lr: float) -> Sequence[float]:
    horizon = schedule.total_steps or total_steps
    last = horizon - 1 if math.isfinite(horizon) else 0
    steps = [round(i * last / (_SAMPLES - 1)) for i in range(_SAMPLES)]
    return [value_at(schedule.schedule, Position(step, horizon, 0, lr, lr)) for step in steps]
