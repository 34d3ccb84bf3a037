"""Classes and functions of Lightning, from whichever of its two packages is in use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_imported = [name for name in _NAMES if name in sys.modules]
# `import lightning_regularize` often stands above `import pytorch_lightning`. Then both may be in use later.
_installed = [name for name in _NAMES if importlib.util.find_spec(name.partition(".")[0]) is not None]
# Where neither is installed, the import of the first one says so.
_packages = [importlib.import_module(name) for name in _imported or _installed or _NAMES]

if TYPE_CHECKING:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities import rank_zero_warn
else:
    LightningModule = _packages[0].LightningModule
    MisconfigurationException = _packages[0].utilities.exceptions.MisconfigurationException
    rank_zero_warn = _packages[0].utilities.rank_zero_warn

__all__ = ["LightningModule", "MisconfigurationException", "classes_named", "rank_zero_warn"]


def classes_named(name: str) -> tuple[type[Any], ...]:
    """The class of this name from each package of Lightning that may be in use.

    These are the packages that were imported before this one, or else those that are installed. What inherits from
    the classes of both is an instance of each.
    """
    return tuple(getattr(package, name) for package in _packages)
