"""Is it noticed whenever the groups of an optimizer hold something else?"""

import pytest
import torch
from torch import nn

from lightning_regularize._steps.targets import Held


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)], ids=str)
def test_an_equal_parameter_is_another_one(shape, kind):
    held, kept = Held(), parameter(2)
    groups = [{"params": kind([kept, parameter(*shape)])}]
    version = held.look(groups)
    assert held.look(groups) == held.look([{"params": kind(groups[0]["params"])}]) == version
    groups[0]["params"] = kind([kept, parameter(*shape)])
    assert held.look(groups) == version + 1


def test_parameters_of_other_shapes_and_numbers_of_them_are_told_apart():
    held, a, b, c = Held(), parameter(2), parameter(3, 1), parameter(4)
    held_in_turn = [[[a, b]], [[a, c]], [[a]], [[a], [b]], [[a], []], [[], [a]], [[b], [a]], [], [[a, b]]]
    versions = [held.look([{"params": params} for params in lists]) for lists in held_in_turn]
    assert versions == list(range(1, 10))
