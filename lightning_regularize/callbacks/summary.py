"""What decays, by how much, and why? A table before the first step, and what is likely not meant."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_regularize import group_settings
from lightning_regularize._checks import check_positive_integer
from lightning_regularize._steps.watch import stepping_optimizers
from lightning_regularize._trainer import loggers
from lightning_regularize._trainer.run import group_labels, steps_per_epoch, total_steps
from lightning_regularize._trainer.strategies import has_optimizer, held_parameters, model_root, torch_optimizer
from lightning_regularize.advice import DecayingGroup, advise
from lightning_regularize.callbacks._base import Regularizer
from lightning_regularize.callbacks.anchor_decay import AnchorDecay
from lightning_regularize.callbacks.constrained_decay import ConstrainedDecay
from lightning_regularize.callbacks.penalty import PenaltyCallback
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.groups import group_name
from lightning_regularize.schedules import Position, timescales_in, value_at
from lightning_regularize.selection import parameter_infos

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import lightning.pytorch as pl

    from lightning_regularize.schedules import ScheduleLike
    from lightning_regularize.selection import ParameterInfo

_SAMPLES = 100  # positions at which a schedule is looked at for its mean


class RegularizationSummary(Regularizer):
    """Prints which parameters decay, by how much, and the rule that decided, once at the start of training.

    The table is of what the optimizers hold, whoever made their groups. Scheduled weight decay shows the range of its
    values in the run, and of a :class:`~lightning_regularize.schedules.Timescale` also the steps over which it acts;
    learning rates stand beside it where groups differ in them. Below it stands what is likely not
    meant: weight decay that hardly acts in a run of this length, is lost to rounding, goes through Adam's
    normalization, or is applied twice. Printed on rank 0 only.

    Every logger gets the arguments of all other callbacks of this package as hyper-parameters, with keys such as
    ``regularization/WeightDecay/weight_decay``, and ``regularization/L1Penalty 2/strength`` where there are several of
    a class. Numbers stay numbers; schedules, rules and projections are texts; tensors are left out.

    Args:
        max_rows: Rows shown at most; what is left out is counted. At least 1. Parameters that differ in a number only,
            as those of repeated blocks, share a row.
        log_hyperparams: Whether loggers get the arguments.

    Raises:
        TypeError: ``log_hyperparams`` is not a boolean.
        ValueError: ``max_rows`` is no positive integer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_regularize import RegularizationSummary, WeightDecay
        >>> callbacks = [WeightDecay(0.05), RegularizationSummary()]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    acts_on_steps = False

    def __init__(self, *, max_rows: int = 50, log_hyperparams: bool = True) -> None:
        super().__init__(locals())
        self.max_rows = check_positive_integer(max_rows, "`max_rows`")
        if not isinstance(log_hyperparams, bool):
            raise TypeError(f"`log_hyperparams` should be True or False, got {log_hyperparams!r}.")
        self.log_hyperparams = log_hyperparams
        self._printed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._printed = False
        if self.log_hyperparams and stage == "fit":
            loggers.log_hyperparams(trainer, _hyperparameters(trainer.callbacks))  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In the first epoch: others have written their values in ``on_train_start``, also those that stand behind."""
        if self._printed or not has_optimizer(trainer):
            return
        self._printed = True
        rows = _rows(trainer, pl_module)  # on every rank: if one alone raised, the others would wait for it
        if trainer.is_global_zero:
            console = Console()
            console.print(_table(rows, self.max_rows))
            for sentence in _advice(trainer, rows):
                console.print(f"[bold]Note[/bold] {escape(sentence)}", highlight=False)


def _hyperparameters(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The arguments of all callbacks of this package but the summary."""
    by_class: dict[str, list[Regularizer]] = {}
    for callback in callbacks:
        if isinstance(callback, Regularizer) and not isinstance(callback, RegularizationSummary):
            by_class.setdefault(type(callback).__name__, []).append(callback)
    return {
        f"regularization/{name}{f' {i}' if len(alike) > 1 else ''}/{argument}": value
        for name, alike in by_class.items()
        for i, callback in enumerate(alike, start=1)
        for argument, value in callback.hyperparameters().items()
    }


class _Row(NamedTuple):
    group: str
    info: ParameterInfo
    decays: tuple[float, float] | None = None  # the least and the most of the run
    lr: float | None = None
    rule: str = ""
    advice: DecayingGroup | None = None  # what is known of the group, if the parameter decays
    timescale: float = 0.0  # in steps, where a Timescale was asked for


def _rows(trainer: pl.Trainer, module: pl.LightningModule) -> list[_Row]:
    """All trainable parameters, by optimizer, group and factor."""
    schedule = _schedule(trainer)
    rows = list(_of_optimizers(trainer, module) if schedule is None else _of_schedule(trainer, schedule))
    held = {id(row.info.parameter) for row in rows}
    infos = [info for info in parameter_infos(model_root(trainer, module)) if info.parameter.requires_grad]
    names = {info.name for info in infos}
    rows = [row for row in rows if row.info.name in names]
    return rows + [_Row("(in no optimizer)", info) for info in infos if id(info.parameter) not in held]


def _schedule(trainer: pl.Trainer) -> WeightDecay | None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, WeightDecay)), None)


def _of_optimizers(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[_Row]:
    """What the groups of the optimizers say by themselves."""
    infos = {id(info.parameter): info for info in parameter_infos(model_root(trainer, module))}
    several = len(trainer.optimizers) > 1
    for i, wrapped in enumerate(trainer.optimizers):
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
                    yield _Row(label, infos[id(parameter)], decays, _rate(group), rule, known)


def _of_schedule(trainer: pl.Trainer, callback: WeightDecay) -> Iterator[_Row]:
    """What WeightDecay makes of the groups: each in parts of one schedule and factor."""
    rules = callback.rules
    found = list(callback.by_parameter())
    settings = {id(info): rules.decide(info).setting for info, *_ in found}
    found.sort(key=lambda each: (each[1].index, each[2], -each[4], settings[id(each[0])].schedule))
    labels = {w.index: group_labels(w.optimizer, callback.run.label(w)) for _, w, *_ in found}
    is_one = sum(map(len, labels.values())) == 1
    samples: dict[tuple[float, int], Sequence[float]] = {}
    for info, watch, i, value, share, rule in found:
        optimizer = torch_optimizer(watch.optimizer)
        group = optimizer.param_groups[i]
        peak, part, schedule = _peak(group), group_name(share), settings[id(info)].schedule
        if (peak, schedule) not in samples:
            samples[peak, schedule] = _sampled(callback, rules.schedules[schedule], total_steps(trainer), peak)
        reach = samples[peak, schedule] or [value / share if share else 0.0]
        if share and rules.names[schedule]:
            part = f"{part}, {rules.names[schedule]}"
        pg, holder = _holder(optimizer, group, labels[watch.index][i])
        label = part if is_one else f"{pg} {part}"
        is_decoupled = not callback.decay_method.adds_to_gradients
        if callback.decay_method.uses_optimizer:
            is_decoupled = not _is_coupled(holder, group)
        elif share:
            label = f"WeightDecay, {label}"
        known = _group_advice(label, holder, group, share * sum(reach) / len(reach), is_decoupled)
        why = rule if rule or share else "0 as configured"
        steps = _timescale(callback, schedule, total_steps(trainer)) / share if share else 0.0
        yield _Row(label, info, (share * min(reach), share * max(reach)), _rate(group), why, known, steps)


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
        dtypes=frozenset(parameter.dtype for parameter in group["params"]),
    )


def _is_coupled(optimizer: Any, group: dict[str, Any]) -> bool:
    rule = group_settings.settings(optimizer, group)["rule"]
    return rule not in ("AdamW", "Lion", "Muon", "Adafactor") and not group.get("decoupled_weight_decay")


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
        if members[0].timescale:
            decay += f", over {members[0].timescale:,.4g} steps"
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


def _advice(trainer: pl.Trainer, rows: list[_Row]) -> list[str]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    groups = list(dict.fromkeys(row.advice for row in rows if row.advice is not None))
    kinds = (AnchorDecay, ConstrainedDecay)
    others = [c for c in callbacks if isinstance(c, kinds) or (isinstance(c, PenaltyCallback) and c.decays)]
    names = [type(other).__name__ for other in others]
    steps = {"total_steps": total_steps(trainer), "steps_per_epoch": steps_per_epoch(trainer)}
    decaying = [row.info.name for row in rows if row.advice is not None]
    return advise(groups, other_decays=names, decaying=decaying, **steps)


def _timescale(callback: WeightDecay, schedule: int, steps_of_run: float) -> float:
    """The time over which a Timescale acts at the peak of the rate, in steps; 0 of another schedule."""
    timescales = timescales_in(callback.rules.schedules[schedule])
    position = Position(0, callback.total_steps or steps_of_run, steps_per_epoch=callback.run.clock.steps_per_epoch)
    return timescales[0].in_steps(position) if timescales else 0.0


def _sampled(callback: WeightDecay, schedule: ScheduleLike | None, steps_of_run: float, lr: float) -> Sequence[float]:
    """Values of a schedule over the run, at a constant rate; none where the groups keep their own."""
    if schedule is None:
        return []
    horizon = callback.total_steps or steps_of_run
    last = horizon - 1 if math.isfinite(horizon) else 0
    steps = [round(i * last / (_SAMPLES - 1)) for i in range(_SAMPLES)]
    epoch_steps = callback.run.clock.steps_per_epoch
    return [value_at(schedule, Position(step, horizon, 0, lr, lr, epoch_steps)) for step in steps]
