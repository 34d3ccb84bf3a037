"""Which weights does a monitor read of an optimizer, and what do the optimizer's groups say of them?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from lightning_regularize import group_settings
from lightning_regularize._sharding import are_elsewhere, local_tensor
from lightning_regularize._steps.targets import Targets, held_by
from lightning_regularize._trainer.run import group_labels
from lightning_regularize._trainer.strategies import deepspeed_keeper, held_parameters, torch_optimizer
from lightning_regularize._used import Layers, Piece, used_weight, without_unknown
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.decay_methods import will_move
from lightning_regularize.quantities import module_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lightning_regularize._steps.watch import Watch
    from lightning_regularize._used import UsedWeight
    from lightning_regularize.callbacks._base import Regularizer
    from lightning_regularize.selection import ParameterInfo


class Row(NamedTuple):
    """A parameter that an optimizer holds, and the weight that a layer makes of it.

    Of a computed weight the largest source has the name of the weight. The others add their gradients, and no elements.
    """

    name: str
    weight: UsedWeight
    parameter: nn.Parameter

    @property
    def stands_for_weight(self) -> bool:
        """Are its elements those of the weight?"""
        return self.parameter is self.weight.info.parameter

    def piece(self) -> Piece:
        """What this rank holds of the elements, as they are now."""
        if self.stands_for_weight:
            return self.weight.piece()
        return Piece(local_tensor(self.parameter).new_empty(0), self.parameter, torch.Size([0]))


class Parts(NamedTuple):
    """Parts of the model.

    Args:
        names: Of each part.
        numbers: The number of the part that each row belongs to; one too large for those that belong to none.
    """

    names: list[str]
    numbers: list[int]

    @classmethod
    def of(cls, names: Sequence[str | None]) -> Parts:
        """From the name of the part of each row; None for no part."""
        known = [name for name in dict.fromkeys(names) if name is not None]
        places: dict[str | None, int] = {name: i for i, name in enumerate(known)}
        return cls(known, [places.get(name, len(known)) for name in names])


class Table:
    """What is read of the weights of one optimizer, as long as nothing else is to be read.

    Args:
        rows: One for each parameter.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.names = [row.name for row in rows]
        self._pieces = list(map(_lasting_piece, rows))
        self._parts: dict[str, Parts] = {}

    def pieces(self) -> list[Piece]:
        """What this rank holds of each row, as it is now."""
        return [row.piece() if known is None else known for row, known in zip(self.rows, self._pieces, strict=True)]

    def parts(self, detail: str, optimizer: Any, label: str) -> Parts:
        """The parts of the model that ``detail`` asks for."""
        if detail == "group":  # whose names may change
            of_groups = zip(group_labels(optimizer, label), held_parameters(optimizer), strict=True)
            by_id = {id(p): name for name, parameters in of_groups for p in parameters}
            return Parts.of([by_id.get(id(row.parameter)) for row in self.rows])
        if detail not in self._parts:
            names = [row.weight.info.name for row in self.rows]
            self._parts[detail] = Parts.of(names if detail == "parameter" else list(map(module_of, names)))
        return self._parts[detail]


def _lasting_piece(row: Row) -> Piece | None:
    """The piece of a row if it is the parameter itself, or empty; None where it is a copy of what changes."""
    if not row.stands_for_weight:
        return row.piece()
    if row.weight.is_computed:
        return None
    piece = row.piece()
    return piece if piece.tensor is row.parameter else None


class Monitored:
    """The weights that a monitor reads, by optimizer, as they are now.

    Args:
        monitor: Whose rules select them, and who warns.
        run: The run.
    """

    def __init__(self, monitor: Regularizer, run: Any) -> None:
        self._monitor, self._run = monitor, run
        self.sharding = run.sharding()
        self._tables: dict[int, tuple[Any, Table]] = {}  # by the index of an optimizer, and what they depend on
        self._targets: Targets[UsedWeight] = Targets(run.infos, self._learn)
        self._list()

    def _learn(self, info: ParameterInfo) -> UsedWeight | None:
        weight = used_weight(info)
        return weight if weight is not None and self._monitor.selects(weight.info) else None

    def _list(self) -> None:
        self._weights = list(self._targets)
        self._lazy = [weight for weight in self._weights if is_lazy(weight.info.parameter)]
        self._parameters = [weight.info.parameter for weight in self._weights]
        self._computed = [weight for weight in self._weights if weight.is_computed]
        self._layers = Layers(weight.stored for weight in self._weights if not weight.is_computed)
        self._sources = [source for weight in self._weights for source in weight.recipe.sources.values()]

    def of(self, watch: Watch) -> Table:
        """What is read of the weights of an optimizer."""
        versions = [held_by(leaf).look(leaf.param_groups) for leaf in watch.leaves]
        state = self._state(watch, versions)
        known = self._tables.get(watch.index)
        ready = [weight for weight in self._lazy if not is_lazy(weight.info.parameter)]
        is_known = known is not None and known[0] == state and not ready
        if known is not None and is_known and not self._outdated():
            return known[1]
        for leaf in watch.leaves:  # layers may have been replaced
            self._targets.of(leaf)
        self._list()
        if outdated := ready + self._outdated():
            for weight in outdated:
                self._targets.forget(weight.stored.parameter)
            self._targets.refresh()
            self._list()
        table = Table(self._rows(watch))
        self._tables[watch.index] = self._state(watch, versions), table
        return table

    def _outdated(self) -> list[UsedWeight]:
        """Weights that their layers compute otherwise than before."""
        asked = self._computed if self._layers.are_plain() else self._weights
        return [weight for weight in asked if not weight.is_up_to_date]

    def _state(self, watch: Watch, versions: list[int]) -> Any:
        """What decides about the rows: what optimizers hold, and which parameters are trained and can be read."""
        are_trained = [source.requires_grad for source in self._sources]
        return watch.leaves, versions, len(self._run.watches), are_trained, are_elsewhere(self._parameters)

    def _rows(self, watch: Watch) -> list[Row]:
        trainable = [weight for weight in self._weights if weight.is_trainable and weight not in self._lazy]
        elsewhere = are_elsewhere([weight.info.parameter for weight in trainable])
        readable = [weight for weight, is_gone in zip(trainable, elsewhere, strict=True) if not is_gone]
        if len(readable) < len(trainable):
            self._monitor.warn(
                "DeepSpeed has put parameters on a disk, where WeightNormMonitor cannot read them; it leaves them out."
            )
        if cut := [w.info.name for w in readable if w.is_computed and self.sharding.is_flat(w.info.parameter)]:
            self._monitor.warn(
                f"WeightNormMonitor leaves out {len(cut)} weights such as {cut[0]!r}, which layers compute from "
                "parameters that FSDP1 or ZeRO-3 has cut into flat pieces; use FSDP2."
            )
            readable = [weight for weight in readable if weight.info.name not in cut]
        readable = without_unknown(readable, self._monitor.warn, "WeightNormMonitor")
        if len(self._run.watches) > 1:
            held = {id(p) for leaf in watch.leaves for group in leaf.param_groups for p in group["params"]}
            readable = [weight for weight in readable if id(weight.info.parameter) in held]
        return [row for weight in readable for row in _rows_of(weight)]


def _rows_of(weight: UsedWeight) -> list[Row]:
    largest, sources = weight.info.parameter, weight.recipe.sources
    return [Row(weight.info.name if p is largest else name, weight, p) for name, p in sources.items()]


def settings_of(rows: Sequence[Row], trainer: Any, watch: Watch) -> list[dict[str, Any]]:
    """What the optimizer's groups say of each parameter, and what WeightDecay says."""
    if deepspeed_keeper(trainer):  # which has the gradients to itself
        optimizer, held = torch_optimizer(watch.optimizer), held_parameters(trainer.optimizers[watch.index])
        of_groups = zip(trainer.optimizers[watch.index].param_groups, held, strict=True)
        by_id = {id(p): group_settings.settings(optimizer, group) for group, params in of_groups for p in params}
    else:
        # What has no gradient neither moves nor decays; the piece of a parameter that is empty need not have one.
        by_id = {
            id(p): found
            for leaf in watch.leaves
            for group in leaf.param_groups
            for found in [group_settings.settings(leaf, group)]
            for p, moves in zip(group["params"], will_move(leaf, group["params"]), strict=True)
            if moves or not p.numel()
        }
    for callback in trainer.callbacks:
        if not isinstance(callback, WeightDecay):
            continue
        method = callback.decay_method
        for info, _, _, value, _, _ in callback.by_parameter():
            key = id(info.parameter)
            if not method.knows_share:
                by_id.pop(key, None)
            elif key in by_id:
                by_id[key] = by_id[key] | {"weight_decay": value, "lr": method.rate(by_id[key]["lr"])}
    found = [by_id.get(id(row.parameter), group_settings.NO_SETTINGS) for row in rows]
    found = [
        each if each["muon"] is None else each | {"shape": tuple(row.parameter.shape)}
        for row, each in zip(rows, found, strict=True)
    ]
    # Theory is about what an optimizer holds, not about what a layer computes from it.
    computed = {id(each): each | {"rule": f"{each['rule']} of computed weights"} for each in found}
    return [computed[id(each)] if row.weight.is_computed else each for row, each in zip(rows, found, strict=True)]
