"""Regularization for PyTorch Lightning, added to a ``Trainer`` as callbacks."""

import importlib
import sys
from typing import TYPE_CHECKING, NoReturn

from lightning_regularize._trainer import names as _names  # noqa: F401  first: it looks at what is imported already
from lightning_regularize.callbacks.activation import ActivationPenalty
from lightning_regularize.callbacks.anchor_decay import AnchorDecay
from lightning_regularize.callbacks.constrained_decay import ConstrainedDecay
from lightning_regularize.callbacks.constraint import WeightConstraint
from lightning_regularize.callbacks.dropout import DropoutSchedule
from lightning_regularize.callbacks.generalization_gap import GeneralizationGapMonitor
from lightning_regularize.callbacks.group_lasso import GroupLassoPenalty
from lightning_regularize.callbacks.hyperball import Hyperball
from lightning_regularize.callbacks.norm_monitor import WeightNormMonitor
from lightning_regularize.callbacks.penalty import ElasticNetPenalty, L1Penalty, L2Penalty
from lightning_regularize.callbacks.summary import RegularizationSummary, summary
from lightning_regularize.callbacks.weight_decay import WeightDecay
from lightning_regularize.callbacks.weight_penalty import WeightPenalty
from lightning_regularize.groups import describe, param_groups
from lightning_regularize.module import RegularizedModule, regularize
from lightning_regularize.optimizers import ChainedOptimizer, hidden_matrices
from lightning_regularize.selection import DEFAULT_EXCLUDE, ParameterInfo, parameter_infos, select

__version__ = "0.1.0"

__all__ = [
    "WeightDecay",
    "AnchorDecay",
    "ConstrainedDecay",
    "Hyperball",
    "L1Penalty",
    "L2Penalty",
    "ElasticNetPenalty",
    "GroupLassoPenalty",
    "WeightPenalty",
    "ActivationPenalty",
    "WeightConstraint",
    "DropoutSchedule",
    "WeightNormMonitor",
    "GeneralizationGapMonitor",
    "RegularizationSummary",
    "summary",
    "RegularizedModule",
    "regularize",
    "ChainedOptimizer",
    "hidden_matrices",
    "param_groups",
    "describe",
    "select",
    "parameter_infos",
    "ParameterInfo",
    "DEFAULT_EXCLUDE",
]

_MODULES = (
    "schedules", "projections", "penalties", "factors", "metrics", "plots", "theory", "norms", "decay", "decay_methods",
    "activations", "groups", "selection", "optimizers", "units", "step_sizes", "spheres", "advice",
)  # fmt: skip

if not TYPE_CHECKING:  # with it, type checkers would accept every name

    def __getattr__(name: str) -> NoReturn:
        """Say which module has the name, for example ``schedules`` for ``Cosine``.

        Raises:
            AttributeError: Always.
            ImportError: Instead of one, in ``from lightning_regularize import ...``, which would replace the message of
                an ``AttributeError`` by its own.
        """
        is_searched = not name.startswith("_") and name not in _MODULES
        home = next((module for module in _MODULES if _has(module, name)), None) if is_searched else None
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        message = f"{name!r} is in {__name__}.{home}. Write: from {__name__}.{home} import {name}"
        is_import = sys._getframe(1).f_code.co_name == "_handle_fromlist"  # importlib's
        raise (ImportError if is_import else AttributeError)(message)

    def _has(module: str, name: str) -> bool:
        """Does a module define the name, and not only import it?"""
        path = f"{__name__}.{module}"
        found = importlib.import_module(path)
        return name in getattr(found, "__all__", ()) or getattr(vars(found).get(name), "__module__", None) == path
