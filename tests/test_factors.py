"""Oracles: widths counted by hand."""

import math
import pickle

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from lightning_regularize.factors import WidthPower
from lightning_regularize.selection import parameter_infos

LAYERS = {
    "linear": (nn.Linear(64, 8), 64),
    "convolution": (nn.Conv2d(8, 6, 3), 8 * 9),
    "grouped convolution": (nn.Conv1d(8, 4, 5, groups=2), 4 * 5),
    "transposed convolution": (nn.ConvTranspose2d(8, 6, 3), 8 * 9),
    "embedding": (nn.Embedding(100, 12), 12),
    "attention": (nn.MultiheadAttention(16, 2, bias=False), 16),
    "parametrized": (parametrizations.spectral_norm(nn.Linear(32, 8)), 32),
}


@pytest.mark.parametrize(("layer", "width"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("power", [0.5, 1, -1, 0])
def test_the_width_is_what_a_unit_takes_in(layer, width, power):
    infos = [info for info in parameter_infos(layer) if len(info.shape) > 1]
    found = [WidthPower(16, power)(info) for info in infos]
    assert found == pytest.approx([(width / 16) ** power] * len(infos), rel=1e-15, abs=0)


def test_it_is_a_value():
    factor = WidthPower(256)
    assert repr(factor) == "WidthPower(base=256, power=0.5)"
    assert pickle.loads(pickle.dumps(factor)) == factor != WidthPower(256, power=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": 0}, ValueError, "`base` should be positive, got 0"),
        ({"base": -1}, ValueError, "`base` should be finite and at least 0, got -1"),
        ({"base": "64"}, TypeError, "`base` should be a number, got '64'"),
        ({"base": 64, "power": math.inf}, ValueError, "`power` should be finite, got inf"),
        ({"base": 64, "power": None}, TypeError, "`power` should be a number, got None"),
    ],
    ids=str,
)
def test_what_is_out_of_range_raises(arguments, error, message):
    with pytest.raises(error, match=message):
        WidthPower(**arguments)


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.LazyLinear(4, bias=False)], ids=["vector", "lazy"])
def test_a_width_that_is_not_known_raises(layer):
    with pytest.raises(ValueError, match=r"WidthPower\(base=64, power=0\.5\) does not know which dims of 'weight'"):
        WidthPower(64)(parameter_infos(layer)[0])
