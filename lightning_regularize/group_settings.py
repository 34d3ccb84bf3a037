"""What follows from the settings of parameter groups alone: how strongly weights decay, and towards which size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lightning_regularize import theory
from lightning_regularize._orthogonal_walk import COEFFICIENTS, ITERATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lightning_regularize.quantities import Sums

NO_SETTINGS: dict[str, Any] = {
    "rule": "",
    "lr": 0.0,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "betas": None,
    "muon": None,
}
"""Of a parameter that no optimizer moves."""


COUPLED = ("Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
"""Rules that add weight decay to the gradient, and then divide by the gradient's size."""


def settings(optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """What matters here of a parameter group, as it is now: LR schedulers change it right after the step.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, weight_decay=0.5)
        >>> settings(optimizer, optimizer.param_groups[0])
        {'rule': 'SGD', 'lr': 0.1, 'weight_decay': 0.5, 'momentum': 0.0, 'betas': None, 'muon': None}
    """
    classes = [cls.__name__ for cls in type(optimizer).__mro__]
    rule = next((name for name in ("AdamW", "Adam", "Lion", "SGD") if name in classes), classes[0])
    if rule == "Adam" and group.get("decoupled_weight_decay"):
        rule = "AdamW"
    if rule == "SGD" and (group.get("nesterov") or group.get("dampening")):
        rule = "SGD with Nesterov's momentum or dampening"
    return {
        "rule": rule,
        "lr": float(group.get("lr") or 0.0),  # None where the optimizer finds its own
        "weight_decay": float(group.get("weight_decay") or 0.0),
        "momentum": float(group.get("momentum", 0.0)),
        "betas": tuple(map(float, group["betas"])) if "betas" in group else None,
        "muon": _of_muon(group),
    }


def _of_muon(group: Mapping[str, Any]) -> dict[str, Any] | None:
    """What else matters of torch's Muon; None of another optimizer, and of other coefficients than torch's own."""
    iterations = tuple(group.get("ns_coefficients", ())), group.get("ns_steps")
    adjustments = (None, "original", "match_rms_adamw")
    if iterations != (COEFFICIENTS, ITERATIONS) or group.get("adjust_lr_fn") not in adjustments:
        return None
    return {name: group[name] for name in ("nesterov", "adjust_lr_fn")}


def passes_through(optimizer: Any, group: Mapping[str, Any], *, is_added: bool = False) -> str:
    """What weight decay passes through before it reaches a weight, as far as is known; empty if nothing.

    Args:
        optimizer: The optimizer.
        group: One of its groups.
        is_added: Is the decay added to the gradient before the step, so that no optimizer can decouple it?

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
        >>> passes_through(optimizer, optimizer.param_groups[0])
        'the momentum of SGD'
    """
    found, name = settings(optimizer, group), type(optimizer).__name__
    if found["rule"].startswith("SGD"):
        return f"the momentum of {name}" if found["momentum"] else ""
    is_coupled = found["rule"] in COUPLED and not group.get("decoupled_weight_decay")
    return f"the averages of {name}" if is_added or is_coupled else ""


def known_sums(
    sums: Sums,
    sizes: Sequence[int],
    settings_of: Sequence[Mapping[str, Any]] | None,
    norm_type: float = 2.0,
    *,
    expected: bool = False,
) -> dict[str, Tensor]:
    """The sums of each parameter that are known without reading it, from those that were read.

    Args:
        sums: What was read.
        sizes: Elements of the whole parameters.
        settings_of: The :func:`settings` of the group of each parameter; None if no quantity needs them.
        norm_type: Of ``gradient_power``.
        expected: Whether to ask theory; ``weight_square`` should have been read then.

    Returns:
        ``size``, and whatever else follows.
    """
    known = {"size": torch.tensor(sizes, dtype=torch.float64, device="cpu")}
    if settings_of is not None:
        groups = {id(found): found for found in settings_of}
        rates = {key: _decay_rates(found) for key, found in groups.items()}
        of_each = [rates[id(found)] for found in settings_of]
        shares = torch.tensor(of_each, dtype=torch.float64, device="cpu").view(-1, 3)
        for name, share in zip(("decaying", "decay", "pull"), shares.unbind(dim=1), strict=True):
            known[name] = share * known["size"]
    if "spectral_square" in sums:
        is_matrix = sums["spectral_square"] != 0
        known["matrices"] = is_matrix.double()
        known["matrix_square"] = torch.where(is_matrix, sums["weight_square"], 0.0)
    if expected and settings_of is not None:
        known |= _expected_sums({**sums, **known}, settings_of, norm_type)
    return known


def _decay_rates(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """Whether a group decays, the share that a step removes, and one over the timescale.

    Momentum counts in the timescale where decay passes through it, which it does in SGD.
    """
    decay = found["lr"] * found["weight_decay"]
    if not decay > 0:
        return 0.0, 0.0, 0.0
    momentum = found["momentum"] if found["rule"].startswith("SGD") else 0.0
    return 1.0, decay, 1 / theory.timescale(found["lr"], found["weight_decay"], momentum)


def _expected_sums(sums: Sums, settings_of: Sequence[Mapping[str, Any]], norm_type: float) -> dict[str, Tensor]:
    """What theory expects of each parameter; what it does not know counts as measured."""
    names = [name for name in ("size", "weight_square", "gradient_power") if name in sums]
    rows = []
    for found, *values in zip(settings_of, *(sums[name].tolist() for name in names), strict=True):
        row = dict(zip(names, values, strict=True))
        if norm_type == 2 and "gradient_power" in row:
            row["gradient_square"] = row["gradient_power"]
        predicted = equilibrium(found, row)
        square, turn = predicted or (row["weight_square"], 0.0)
        rows.append((float(predicted is not None), square, square * turn**2))
    columns = torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, 3).unbind(dim=1)
    return dict(zip(("known", "expected_square", "expected_turn"), columns, strict=True))


def equilibrium(found: Mapping[str, Any], sums: Mapping[str, float]) -> tuple[float, float] | None:
    """Where noise and weight decay balance, for one parameter, as :mod:`~lightning_regularize.theory` has it.

    Args:
        found: The :func:`settings` of its group, for Muon with the ``shape`` of the parameter; theory knows AdamW,
            Lion, Muon and SGD.
        sums: Of the parameter: ``size``, for SGD also ``weight_square`` and ``gradient_square``.

    Returns:
        Squared norm of the weights and angle of a step; None where theory has nothing to say.
    """
    lr, weight_decay, rule = found["lr"], found["weight_decay"], found["rule"]
    if not (lr > 0 and weight_decay > 0):
        return None
    if rule == "AdamW":
        angle = theory.equilibrium_angle_adamw(lr, weight_decay, found["betas"][0])
        return sums["size"] * theory.equilibrium_rms_adamw(lr, weight_decay) ** 2, angle
    if rule == "Lion" and found["betas"] is not None:
        angle = theory.equilibrium_angle_lion(lr, weight_decay, *found["betas"])
        return sums["size"] * theory.equilibrium_rms_lion(lr, weight_decay, *found["betas"]) ** 2, angle
    if rule == "Muon" and found["muon"] is not None:
        known = lr, weight_decay, found["shape"], found["momentum"]
        rms = theory.equilibrium_rms_muon(*known, **found["muon"])
        return sums["size"] * rms**2, theory.equilibrium_angle_muon(*known, **found["muon"])
    if rule == "SGD" and "gradient_square" in sums:
        gradient = math.sqrt(sums["gradient_square"] * sums["weight_square"])
        norm = theory.equilibrium_norm_sgd(lr, weight_decay, found["momentum"], gradient)
        return norm * norm, theory.equilibrium_angle_sgd(lr, weight_decay, found["momentum"])
    return None
