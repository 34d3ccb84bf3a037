"""Regularization for PyTorch Lightning, added to a ``Trainer`` as callbacks."""

from lightning_regularize._trainer import names as _names  # noqa: F401  first: it looks at what is imported already
from lightning_regularize.callbacks.activation import ActivationPenalty
from lightning_regularize.callbacks.anchor_decay import AnchorDecay
from lightning_regularize.callbacks.constrained_decay import ConstrainedDecay
from lightning_regularize.callbacks.constraint import WeightConstraint
from lightning_regularize.callbacks.dropout import DropoutSchedule
from lightning_regularize.callbacks.generalization_gap import GeneralizationGapMonitor
from lightning_regularize.callbacks.hyperball import Hyperball
from lightning_regularize.callbacks.norm_monitor import WeightNormMonitor
from lightning_regularize.callbacks.penalty import ElasticNetPenalty, GroupLassoPenalty, L1Penalty, L2Penalty
from lightning_regularize.callbacks.summary import RegularizationSummary
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
