"""What is worth knowing about weights while they train?

Each quantity is a function of a few sums over elements, so that the sums of single parameters add up to those of a
module, a group or a whole model, and one read of the weights serves all. Where the sums come from is no matter here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_regularize import theory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Sums = Mapping[str, float]
    """By name, over the elements :math:`w` of some parameters, their gradients :math:`g` and changes :math:`\\delta`:

    ``weight_power``, ``gradient_power``, ``update_power``
        :math:`\\sum |x|^p`, or the largest magnitude.
    ``weight_square``, ``update_square``
        :math:`\\sum x^2`.
    ``radial``
        :math:`\\sum w \\delta`.
    ``size``, ``zeros``, ``below``, ``weight_nonfinite``, ``gradient_nonfinite``
        Numbers of elements.
    ``matrix_square``, ``spectral_square``
        Of what has two dimensions or more: :math:`\\sum w^2`, and the largest :math:`\\sigma_1^2`.
    ``decaying``, ``decay``, ``pull``
        Elements in groups with weight decay; their sum of :math:`\\eta\\lambda` and of one over the timescale.
    ``expected_square``, ``expected_turn``
        What theory expects of :math:`\\sum w^2`, and of the part of :math:`\\sum \\delta^2` that turns the weights.
    """

MAXIMA = {"spectral_square"}
"""Of which the largest counts, not the sum; :math:`p = \\infty` adds the powers."""


class Quantity(NamedTuple):
    """One that can be asked for.

    Args:
        key: What its logged keys begin with.
        needs: The names of the sums it is made of.
        value: It, from the sums; None where there is none, such as a rank without a matrix.
        expected: What theory expects of it, likewise; None where it says nothing.
    """

    key: str
    needs: frozenset[str]
    value: Callable[[Sums], float | None]
    expected: Callable[[Sums], float | None] | None


def angle(weight_square: float, update_square: float, radial: float) -> float:
    r"""By how much a change turns a vector, in radians.

    .. math:: \angle(w, w + \delta) = \operatorname{atan2}\bigl(\lVert\delta_\perp\rVert,
        \lVert w\rVert + \delta_\parallel\bigr)

    The change is taken apart into what lies along the vector and what lies across it. An arc cosine would round all
    angles below 3e-4 (float32) or 1e-8 (float64) to nothing.

    Args:
        weight_square: :math:`\lVert w\rVert^2`.
        update_square: :math:`\lVert\delta\rVert^2`.
        radial: :math:`w \cdot \delta`.

    Returns:
        In :math:`[0, \pi]`; NaN for :math:`w = 0` and where a sum is not finite.

    Example:
        >>> angle(1.0, 1.0, 0.0) == math.pi / 4
        True
    """
    norm = math.sqrt(weight_square)
    if not 0 < norm < math.inf:
        return math.nan
    along = radial / norm
    across = update_square - along * along  # where a power of floats would raise, this is infinite
    return math.atan2(math.sqrt(max(across, 0.0)), norm + along) if math.isfinite(across) else math.nan


def root(value: float, norm_type: float) -> float:
    """A norm from its sum of powers.

    Example:
        >>> root(25.0, 2.0), root(4.0, math.inf)
        (5.0, 4.0)
    """
    return value if norm_type == 1 or math.isinf(norm_type) else float(value ** (1 / norm_type))


def combined(rows: Iterable[Sums], norm_type: float = 2.0) -> dict[str, float]:
    """The sums of several parameters together; ``p`` is the norm type.

    Example:
        >>> combined([{"size": 2.0, "spectral_square": 9.0}, {"size": 1.0, "spectral_square": 4.0}])
        {'size': 3.0, 'spectral_square': 9.0, 'p': 2.0}
    """
    rows = list(rows)
    found = dict(rows[0]) if rows else {}
    for name in found if len(rows) > 1 else ():
        values = [row[name] for row in rows]
        largest = name in MAXIMA or (math.isinf(norm_type) and name.endswith("_power"))
        if largest and not any(map(math.isnan, values)):  # max() would drop it
            found[name] = max(values)
        else:
            found[name] = sum(values)
    return found | {"p": norm_type}


def settings(optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """What matters here of a parameter group, as it is now: LR schedulers change it right after the step.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, weight_decay=0.5)
        >>> settings(optimizer, optimizer.param_groups[0])
        {'rule': 'SGD', 'lr': 0.1, 'weight_decay': 0.5, 'momentum': 0.0, 'betas': None}
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
    }


def decay_sums(size: float, found: Mapping[str, Any]) -> dict[str, float]:
    """The sums ``decaying``, ``decay`` and ``pull`` of a parameter in a group with these :func:`settings`.

    Momentum counts in the timescale where decay passes through it, which it does in SGD.
    """
    decay = found["lr"] * found["weight_decay"]
    if not decay > 0:
        return {"decaying": 0.0, "decay": 0.0, "pull": 0.0}
    momentum = found["momentum"] if found["rule"].startswith("SGD") else 0.0
    pull = 1 / theory.timescale(found["lr"], found["weight_decay"], momentum)
    return {"decaying": size, "decay": size * decay, "pull": size * pull}


def equilibrium(found: Mapping[str, Any], sums: Sums) -> tuple[float, float] | None:
    """Where noise and weight decay balance, for one parameter, as :mod:`~lightning_regularize.theory` has it.

    Args:
        found: The :func:`settings` of its group; theory knows AdamW, Lion, and SGD.
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
    if rule == "SGD" and "gradient_square" in sums:
        gradient = math.sqrt(sums["gradient_square"] * sums["weight_square"])
        norm = theory.equilibrium_norm_sgd(lr, weight_decay, found["momentum"], gradient)
        return norm * norm, theory.equilibrium_angle_sgd(lr, weight_decay, found["momentum"])
    return None


def known_sums(
    row: Sums, size: float, found: Mapping[str, Any], *, expected: bool = False, norm_type: float = 2.0
) -> dict[str, float]:
    """The sums of one parameter that are known without reading a tensor, from those that were read.

    Args:
        row: What was read.
        size: Elements of the whole parameter.
        found: The :func:`settings` of its group.
        expected: Whether to ask theory; ``weight_square`` should have been read then.
        norm_type: Of ``gradient_power``.

    Returns:
        ``size``, what :func:`decay_sums` tells, and whatever else follows.
    """
    known = {"size": size, **decay_sums(size, found)}
    if "spectral_square" in row:
        is_matrix = row["spectral_square"] != 0
        known |= {"matrices": float(is_matrix), "matrix_square": row["weight_square"] if is_matrix else 0.0}
    if expected:
        gradient = {"gradient_square": row["gradient_power"]} if "gradient_power" in row and norm_type == 2 else {}
        foreseen = equilibrium(found, {**row, **known, **gradient})
        square, turn = foreseen or (row["weight_square"], 0.0)
        known |= {"expected_square": square, "expected_turn": square * turn**2, "foreseen": float(bool(foreseen))}
    return known


def values_of(
    sums: Sums, asked: Iterable[str], *, expected: bool = False, steps_per_epoch: float = math.inf
) -> dict[str, float]:
    """The quantities of one part, from its :func:`combined` sums.

    Args:
        sums: Of the part.
        asked: Words of :data:`QUANTITIES`.
        expected: Whether to add what theory expects, as ``<key>/expected``.
        steps_per_epoch: To tell a timescale in epochs as well; infinite if unknown.

    Returns:
        By key; without those that the part does not have.

    Example:
        >>> values_of({"size": 4.0, "zeros": 1.0}, ["sparsity"])
        {'sparsity': 0.25}
    """
    values: dict[str, float] = {}
    for quantity in map(QUANTITIES.__getitem__, asked):
        value = quantity.value(sums)
        if value is None:
            continue
        values[quantity.key] = value
        if expected and sums["foreseen"] and quantity.expected is not None:
            foreseen = quantity.expected(sums)
            if foreseen is not None:
                values[f"{quantity.key}/expected"] = foreseen
    if "below" in sums:
        values["below_threshold"] = _ratio(sums["below"], sums["size"])
    if "timescale" in values and math.isfinite(steps_per_epoch):
        values["timescale_epochs"] = values["timescale"] / steps_per_epoch
    return values


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _norm(sums: Sums, of: str) -> float:
    return root(sums[f"{of}_power"], sums["p"])


def _if_l2(value: Callable[[Sums], float]) -> Callable[[Sums], float | None]:
    return lambda s: value(s) if s["p"] == 2 else None


def _expected_angle(s: Sums) -> float:
    return math.sqrt(_ratio(s["expected_turn"], s["expected_square"]))


def _quantity(key: str, needs: str, value: Callable[[Sums], float | None], expected: Any = None) -> Quantity:
    return Quantity(key, frozenset(needs.split()), value, expected)


QUANTITIES: dict[str, Quantity] = {
    "weight": _quantity(
        "weight_norm", "weight_power", lambda s: _norm(s, "weight"), _if_l2(lambda s: math.sqrt(s["expected_square"]))
    ),
    "rms": _quantity(
        "rms",
        "weight_square",
        lambda s: math.sqrt(_ratio(s["weight_square"], s["size"])),
        lambda s: math.sqrt(_ratio(s["expected_square"], s["size"])),
    ),
    "gradient": _quantity(
        "gradient_norm", "gradient_power", lambda s: _norm(s, "gradient") if s["gradient_size"] else None
    ),
    "update": _quantity(
        "update_norm", "update_power", lambda s: _norm(s, "update"), _if_l2(lambda s: math.sqrt(s["expected_turn"]))
    ),
    "ratio": _quantity(
        "ratio",
        "update_power weight_power",
        lambda s: _ratio(_norm(s, "update"), _norm(s, "weight")),
        _if_l2(_expected_angle),
    ),
    "angle": _quantity(
        "angle",
        "weight_square update_square",
        lambda s: angle(s["weight_square"], s["update_square"], s["radial"]),
        _expected_angle,
    ),
    "sparsity": _quantity("sparsity", "zeros", lambda s: _ratio(s["zeros"], s["size"])),
    "stable_rank": _quantity(
        "stable_rank",
        "weight_square spectral_square",
        lambda s: _ratio(s["matrix_square"], s["spectral_square"]) if s["matrices"] else None,
    ),
    "effective_decay": _quantity("effective_decay", "", lambda s: _ratio(s["decay"], s["decaying"] or 1.0)),
    "timescale": _quantity("timescale", "", lambda s: _ratio(s["decaying"], s["pull"]) if s["decaying"] else None),
}
"""By the word that asks for it."""
