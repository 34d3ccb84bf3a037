"""The classes of Lightning, of which there are two packages."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

_TWIN = "pytorch_lightning"
_imported = [name for name in ("lightning.pytorch", _TWIN) if name in sys.modules]
# The package that is imported last takes the log of both. Importing the other one here may not change whose it is.
_rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
_log = getattr(_rank_zero, "log", None)
_packages = ["lightning.pytorch"]
if _TWIN in _imported or (not _imported and importlib.util.find_spec(_TWIN) is not None):
    _packages.append(_TWIN)
_modules = [importlib.import_module(name) for name in _packages]
if _imported and _rank_zero is not None:
    _rank_zero.log = _log  # type: ignore[attr-defined]


def both(name: str) -> tuple[type[Any], ...]:
    """The class of this name from ``lightning.pytorch``, and from ``pytorch_lightning`` where that may be in use.

    What inherits from both is an instance of each. ``pytorch_lightning`` may be in use where it is imported already, or
    where neither is, and it is installed.
    """
    return tuple(getattr(module, name) for module in _modules)
