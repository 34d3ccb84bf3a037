"""Does reading a model take the same number of kernel launches for any number of tensors, and one transfer?

Fake tensors claim to lie on a GPU. Nothing is computed, but each operation is seen.
"""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_regularize._reading import Reading
from lightning_regularize._sharding import Sharding
from lightning_regularize.group_settings import known_sums
from lightning_regularize.quantities import QUANTITIES, needed_sums, values_of
from tests.models import randn

NO_LAUNCHES = (
    *("prim.device", "view", "detach", "alias", "expand", "slice", "select", "t.default", "split", "unbind", "permute"),
    *("unsqueeze", "empty"),
)
ALL_BUT_SPECTRA = tuple(quantity for quantity in QUANTITIES if quantity not in ("stable_rank", "spectral_norm"))
LAYOUTS = {
    "tiny": [(8, 8), (8,), (8,), (8,)],
    "two shapes": [(96, 96), (100,), (96, 96), (100,)],
    "odd sizes": [(7, 11, 13), (5000,), (3,), (257,)],
}


class Launches(TorchDispatchMode):
    """Counts operations on a GPU without views, and transfers to the host."""

    def __init__(self):
        super().__init__()
        self.launches, self.transfers = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = str(func), func(*args, **(kwargs or {}))
        before, after = (
            {t.device.type for t in tree_leaves(values) if isinstance(t, torch.Tensor)}
            for values in ((args, kwargs), result)
        )
        if "cuda" in before | after and not any(other in name for other in NO_LAUNCHES):
            self.launches[name] += 1
        self.transfers += ("cuda" in before and "cpu" in after) or "_local_scalar_dense" in name
        return result


class WithoutCopies(TorchFunctionMode):
    """``copy_`` asks for the device itself before it is dispatched."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            self.launches["copy_"] += 1
            return args[0]
        return func(*args, **(kwargs or {}))


def read(shapes, quantities, *, norm_type=2.0, dtype=torch.float32):
    """The operations of one logged step."""
    with FakeTensorMode(), Launches() as seen, WithoutCopies(seen.launches):
        parameters = {f"p{i}": torch.empty(shape, device="cuda", dtype=dtype) for i, shape in enumerate(shapes)}
        gradients = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
        seen.launches.clear()
        sizes = [math.prod(shape) for shape in shapes]
        reading = Reading(parameters, sizes, Sharding(), needed_sums(quantities), norm_type)
        reading.read_weights()
        if "gradient" in quantities:
            reading.read_gradients(gradients, None)
        if "distance" in quantities:
            reading.read_distances(gradients)
        reading.keep_weights()
        reading.read_changes()
        assert not seen.transfers
        reading.reduced().cpu()
    assert seen.transfers == 1
    return sum(seen.launches.values())


@pytest.mark.parametrize(("layout", "dtype"), [*((name, torch.float32) for name in LAYOUTS), ("tiny", torch.bfloat16)])
@pytest.mark.parametrize(
    ("quantities", "norm_type", "most"),
    [
        (("weight",), 2.0, 20),
        (("weight",), math.inf, 20),
        (("weight",), 3.0, 24),
        (ALL_BUT_SPECTRA, 2.0, 80),
        (ALL_BUT_SPECTRA, 1.0, 84),
    ],
)
def test_launches_do_not_depend_on_how_many_tensors_there_are(layout, dtype, quantities, norm_type, most):
    few, many = (read(LAYOUTS[layout] * repeats, quantities, norm_type=norm_type, dtype=dtype) for repeats in (5, 20))
    assert 0 < few <= most
    assert many == few


def test_launches_are_the_same_for_300_and_1200_tensors():
    assert read(LAYOUTS["two shapes"] * 75, ALL_BUT_SPECTRA) == read(LAYOUTS["two shapes"] * 300, ALL_BUT_SPECTRA) <= 80


def test_large_tensors_take_a_bounded_number_of_launches_more_for_64_mebibytes():
    small, large = (read([(4096, 1024)] * count, ALL_BUT_SPECTRA) for count in (4, 32))  # 64 and 512 MiB
    assert large - small <= 7 * small


def test_fake_tensors_leave_nothing_behind_for_real_ones():
    read(LAYOUTS["odd sizes"], ALL_BUT_SPECTRA)
    shapes = LAYOUTS["odd sizes"]
    parameters = {f"p{i}": nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)}
    sizes = [p.numel() for p in parameters.values()]
    reading = Reading(parameters, sizes, Sharding(), needed_sums(("weight",)), 2.0)
    reading.read_weights()
    sums, _ = reading.sums(reading.reduced())
    values, is_defined = values_of(sums | known_sums(sums, sizes, None), ("weight",))["weight_norm"]
    assert is_defined.all()
    assert values.tolist() == pytest.approx([p.double().norm().item() for p in parameters.values()], rel=1e-6, abs=0)
