"""Quantities to monitor, each computed from sums over elements.

The sums of single parameters add up to those of a module, a group or a whole model. All of them are on the host, a
vector for each sum with one element for each parameter, or for each part of the model.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    Sums = Mapping[str, Tensor]
    """By name, over the elements :math:`w` of each part, their gradients :math:`g` and changes :math:`\\delta`:

    ``weight_power``, ``gradient_power``, ``update_power``, ``distance_power``
        :math:`\\sum |x|^p`, or the largest magnitude; the last of :math:`w - w_0`, from the start of training.
    ``weight_square``, ``update_square``
        :math:`\\sum x^2`.
    ``gradient_sum``, ``gradient_square``
        :math:`\\sum g` and :math:`\\sum g^2`.
    ``radial``
        :math:`\\sum w \\delta`.
    ``size``, ``zeros``, ``below``, ``weight_nonfinite``, ``gradient_size``, ``gradient_nonfinite``
        Numbers of elements.
    ``matrices``, ``matrix_square``, ``spectral_square``
        Of what has two dimensions or more: how many, :math:`\\sum w^2`, and the largest :math:`\\sigma_1^2`.
    ``decaying``, ``decay``, ``pull``
        Elements in groups with weight decay; their sum of :math:`\\eta\\lambda` and of one over the timescale.
    ``known``, ``expected_square``, ``expected_turn``
        Parameters that theory knows; what it expects of :math:`\\sum w^2`, and of the part of
        :math:`\\sum \\delta^2` that turns the weights.
    """

MAXIMA = {"spectral_square"}
"""Of which the largest counts, not the sum; :math:`p = \\infty` adds the powers."""


class Quantity(NamedTuple):
    """A quantity that can be asked for.

    Args:
        key: What its logged keys begin with.
        needs: The names of the sums that have to be read for it.
        value: Its value for each part, from the sums and the norm type.
        is_defined: Where it has a value; by default everywhere. A ratio to nothing has none.
        expected: What theory expects of it, likewise; None where it says nothing.
    """

    key: str
    needs: frozenset[str]
    value: Callable[[Sums, float], Tensor]
    is_defined: Callable[[Sums], Tensor] | None = None
    expected: Callable[[Sums, float], Tensor | None] | None = None


class Values(NamedTuple):
    """A quantity of each part, and where it has a value."""

    values: Tensor
    is_defined: Tensor


def angle(weight_square: Tensor, update_square: Tensor, radial: Tensor) -> Tensor:
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
        >>> one = torch.ones((), dtype=torch.float64)
        >>> angle(one, one, 0 * one).item() == math.pi / 4
        True
    """
    norm = weight_square.sqrt()
    along = radial / norm
    across = update_square - along.square()
    turned = torch.atan2(across.clamp_min(0.0).sqrt(), norm + along)
    return torch.where(norm.isfinite() & across.isfinite(), turned, math.nan)


def root(power: Tensor, norm_type: float) -> Tensor:
    """A norm from its sum of powers.

    Example:
        >>> root(torch.tensor([25.0, 4.0]), 2.0)
        tensor([5., 2.])
    """
    return power if norm_type == 1 or math.isinf(norm_type) else power.pow(1 / norm_type)


def combined(sums: Sums, parts: Sequence[int], count: int, norm_type: float = 2.0) -> dict[str, Tensor]:
    """The sums of parts that consist of several parameters.

    Args:
        sums: Of each parameter.
        parts: The part that each parameter belongs to, from 0.
        count: How many parts there are.
        norm_type: The exponent of the sums of powers.

    Example:
        >>> sums = {"size": torch.tensor([2.0, 1.0]), "spectral_square": torch.tensor([9.0, 4.0])}
        >>> found = combined(sums, [0, 0], 1)
        >>> found["size"], found["spectral_square"]
        (tensor([3.]), tensor([9.]))
    """
    if list(parts) == list(range(count)):
        return dict(sums)
    index = torch.tensor(parts, dtype=torch.int64, device="cpu")
    found: dict[str, Tensor] = {}
    largest = {name for name in sums if name in MAXIMA or (math.isinf(norm_type) and name.endswith("_power"))}
    for names, reduce in ((sums.keys() - largest, "sum"), (largest, "amax")):
        if names:  # all at once
            values = torch.stack([sums[name] for name in names])
            of_parts = values.new_zeros(len(names), count)
            of_parts.scatter_reduce_(1, index.expand_as(values), values, reduce)
            found |= dict(zip(names, of_parts.unbind(), strict=True))
    return found


def values_of(
    sums: Sums,
    asked: Iterable[str],
    *,
    norm_type: float = 2.0,
    expected: bool = False,
    steps_per_epoch: float = math.inf,
) -> dict[str, Values]:
    """The quantities of each part, from its sums.

    Args:
        sums: Of each part, those of :func:`~lightning_regularize.group_settings.known_sums` included.
        asked: Words of :data:`QUANTITIES`.
        norm_type: The exponent of the sums of powers.
        expected: Whether to add what theory expects, as ``<key>/expected``.
        steps_per_epoch: For the timescale in epochs; infinite if unknown.

    Returns:
        By key.

    Example:
        >>> values_of({"size": torch.tensor([4.0, 0.0]), "zeros": torch.tensor([1.0, 0.0])}, ["sparsity"])
        {'sparsity': Values(values=tensor([0.2500,    nan]), is_defined=tensor([ True, False]))}
    """
    found: dict[str, Values] = {}
    everywhere = torch.ones_like(sums["size"], dtype=torch.bool)
    for quantity in map(QUANTITIES.__getitem__, asked):
        is_defined = quantity.is_defined(sums) if quantity.is_defined else everywhere
        found[quantity.key] = Values(quantity.value(sums, norm_type), is_defined)
        if expected and quantity.expected is not None:
            prediction = quantity.expected(sums, norm_type)
            if prediction is not None:
                is_known = is_defined & (sums["known"] > 0) & ~(prediction.isnan() & (sums["expected_square"] == 0))
                found[f"{quantity.key}/expected"] = Values(prediction, is_known)
    if "below" in sums:
        found["below_threshold"] = Values(sums["below"] / sums["size"], sums["size"] > 0)
    if "timescale" in found and math.isfinite(steps_per_epoch):
        found["timescale_epochs"] = found["timescale"]._replace(values=found["timescale"].values / steps_per_epoch)
    return found


def by_key(found: Mapping[str, Values], parts: Sequence[str]) -> dict[str, float]:
    """Values by the key under which they are logged, without those that a part does not have.

    Args:
        found: What :func:`values_of` returns.
        parts: The names of the parts.

    Example:
        >>> known = torch.tensor([True, False])
        >>> by_key({"rms/expected": Values(torch.tensor([0.5, 1.0]), known)}, ["net.0", "net.1"])
        {'rms/net.0/expected': 0.5}
    """
    if not found:
        return {}
    keys = _keys(tuple(found), tuple(parts))
    values = torch.stack([each.values for each in found.values()], dim=1).flatten().tolist()
    are_defined = torch.stack([each.is_defined for each in found.values()], dim=1).flatten().tolist()
    pairs = zip(keys, values, strict=True)
    return dict(pairs if all(are_defined) else itertools.compress(pairs, are_defined))


@functools.lru_cache(maxsize=64)
def _keys(names: tuple[str, ...], parts: tuple[str, ...]) -> list[str]:
    """For each part the keys of all quantities: to put together thousands takes a millisecond, and they stay."""
    split = [name.partition("/") for name in names]
    return [f"{name}/{part}{slash}{suffix}" for part in parts for name, slash, suffix in split]


def _norm(of: str) -> Callable[[Sums, float], Tensor]:
    return lambda sums, norm_type: root(sums[f"{of}_power"], norm_type)


def _if_l2(value: Callable[[Sums], Tensor]) -> Callable[[Sums, float], Tensor | None]:
    return lambda sums, norm_type: value(sums) if norm_type == 2 else None


def _has_elements(sums: Sums) -> Tensor:
    return sums["size"] > 0


def _has_gradient(sums: Sums) -> Tensor:
    return sums["gradient_size"] > 0


def _gradient_mean(sums: Sums) -> Tensor:
    return sums["gradient_sum"] / sums["gradient_size"]


def _gradient_std(sums: Sums) -> Tensor:
    variance = sums["gradient_square"] / sums["gradient_size"] - _gradient_mean(sums).square()
    return variance.clamp_min(0.0).sqrt()


QUANTITIES: dict[str, Quantity] = {
    "weight": Quantity(
        "weight_norm",
        frozenset({"weight_power"}),
        _norm("weight"),
        expected=_if_l2(lambda s: s["expected_square"].sqrt()),
    ),
    "rms": Quantity(
        "rms",
        frozenset({"weight_square"}),
        lambda s, _: (s["weight_square"] / s["size"]).sqrt(),
        _has_elements,
        lambda s, _: (s["expected_square"] / s["size"]).sqrt(),
    ),
    "gradient": Quantity(
        "gradient_norm",
        frozenset({"gradient_power", "gradient_size", "gradient_nonfinite"}),
        _norm("gradient"),
        _has_gradient,
    ),
    "gradient_mean": Quantity(
        "gradient_mean",
        frozenset({"gradient_sum", "gradient_size", "gradient_nonfinite"}),
        lambda s, _: _gradient_mean(s),
        _has_gradient,
    ),
    "gradient_std": Quantity(
        "gradient_std",
        frozenset({"gradient_sum", "gradient_square", "gradient_size", "gradient_nonfinite"}),
        lambda s, _: _gradient_std(s),
        _has_gradient,
    ),
    "update": Quantity(
        "update_norm",
        frozenset({"update_power"}),
        _norm("update"),
        expected=_if_l2(lambda s: s["expected_turn"].sqrt()),
    ),
    "ratio": Quantity(
        "ratio",
        frozenset({"update_power", "weight_power"}),
        lambda s, p: root(s["update_power"], p) / root(s["weight_power"], p),
        lambda s: s["weight_power"] != 0,
        _if_l2(lambda s: (s["expected_turn"] / s["expected_square"]).sqrt()),
    ),
    "angle": Quantity(
        "angle",
        frozenset({"weight_square", "update_square"}),
        lambda s, _: angle(s["weight_square"], s["update_square"], s["radial"]),
        lambda s: s["weight_square"] != 0,
        lambda s, _: (s["expected_turn"] / s["expected_square"]).sqrt(),
    ),
    "distance": Quantity("distance", frozenset({"distance_power"}), _norm("distance")),
    "sparsity": Quantity("sparsity", frozenset({"zeros"}), lambda s, _: s["zeros"] / s["size"], _has_elements),
    "stable_rank": Quantity(
        "stable_rank",
        frozenset({"weight_square", "spectral_square"}),
        lambda s, _: s["matrix_square"] / s["spectral_square"],
        lambda s: s["matrices"] > 0,
    ),
    "spectral_norm": Quantity(
        "spectral_norm",
        frozenset({"weight_square", "spectral_square"}),
        lambda s, _: s["spectral_square"].sqrt(),
        lambda s: s["matrices"] > 0,
    ),
    "effective_decay": Quantity(
        "effective_decay", frozenset(), lambda s, _: s["decay"] / torch.where(s["decaying"] > 0, s["decaying"], 1.0)
    ),
    "timescale": Quantity(
        "timescale", frozenset(), lambda s, _: s["decaying"] / s["pull"], lambda s: s["decaying"] > 0
    ),
}
"""By the word that asks for it."""


def module_of(name: str) -> str:
    """The module that a parameter belongs to; a parametrization's, the module that is parametrized.

    Example:
        >>> module_of("net.0.weight"), module_of("net.0.parametrizations.weight.original"), module_of("scale")
        ('net.0', 'net.0', '_root_')
    """
    module, _, parametrization = name.partition("parametrizations.")
    return (module.rstrip(".") if parametrization else name.rpartition(".")[0]) or "_root_"


def check_quantities(asked: Sequence[str]) -> tuple[str, ...]:
    """Refuse what is not a list of words of :data:`QUANTITIES`; each word is returned once.

    Raises:
        ValueError: It is something else.
    """
    expected = f"`quantities` should be some of {', '.join(QUANTITIES)}, got {asked!r}."
    if isinstance(asked, str) or not asked or not all(isinstance(quantity, str) for quantity in asked):
        raise ValueError(expected + (f" Write ({asked!r},)." if asked in list(QUANTITIES) else ""))
    if unknown := [quantity for quantity in asked if quantity not in QUANTITIES]:
        close = difflib.get_close_matches(str(unknown[0]), QUANTITIES, n=1)
        raise ValueError(expected + (f" Did you mean {close[0]!r}?" if close else ""))
    return tuple(dict.fromkeys(asked))


def needed_sums(asked: Iterable[str], *, expected: bool = False, below: bool = False) -> set[str]:
    """The names of the sums that have to be read for some quantities.

    Args:
        asked: Words of :data:`QUANTITIES`.
        expected: Whether theory will be asked as well.
        below: Whether to count what is below a threshold, which goes with ``sparsity``.

    Example:
        >>> sorted(needed_sums(["rms"]))
        ['weight_nonfinite', 'weight_square']
    """
    needs = set().union(*(QUANTITIES[quantity].needs for quantity in asked))
    if expected:
        needs.add("weight_square")
    if below and "zeros" in needs:
        needs.add("below")
    return needs | ({"weight_nonfinite"} if needs & {"weight_power", "weight_square", "zeros"} else set())
