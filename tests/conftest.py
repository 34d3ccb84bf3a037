"""What all tests share: they do not wait for what is always the same.

Each has one thread, since threads that wait for each other cost more than tiny tensors do. Each Trainer looks for entry
points of the installed packages, which are read once here; and the garbage collector leaves imported modules alone.
"""

import functools
import gc

import torch

import lightning_regularize  # noqa: F401  (before Lightning, so that it looks for both packages of it)

torch.set_num_threads(1)


def pytest_collection_finish():
    from lightning.fabric.utilities import registry

    registry.entry_points = functools.cache(registry.entry_points)
    gc.collect()
    gc.freeze()
