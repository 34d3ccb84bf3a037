"""Do penalties by autograd have the values of their formulas, and the gradients of their values?"""

import functools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_regularize.penalties import Function, Orthogonal, Spectral


def double_well(weight):
    return (weight.square() - 1).square().sum()


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def cosines(matrix):
    """Keras' formula, in a loop over pairs of rows."""
    k = len(matrix)
    pairs = [(a, b) for i, a in enumerate(matrix) for b in matrix[:i]]
    return sum(abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs) * 2 / (k * (k - 1))


PENALTIES = {
    "orthogonal rows": (Orthogonal(), lambda w: cosines(w.reshape(len(w), -1))),
    "orthogonal columns": (Orthogonal("columns"), lambda w: cosines(w.reshape(len(w), -1).T)),
    "spectral": (Spectral(0.5), lambda w: (np.linalg.norm(w.reshape(len(w), -1), 2) ** 2 - 0.25) ** 2),
    "spectral, k=1": (Spectral(3.0, k=1), lambda w: (np.linalg.norm(w.reshape(len(w), -1), 2) - 3) ** 2),
    "function": (Function(double_well), lambda w: ((w**2 - 1) ** 2).sum()),
}
each = pytest.mark.parametrize(("penalty", "formula"), PENALTIES.values(), ids=PENALTIES)


@each
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 2, 2, 2)])
def test_the_value_is_that_of_the_formula(penalty, formula, shape):
    weight = draw(*shape)
    assert penalty.value(weight, 0.3).item() == pytest.approx(0.3 * formula(weight.numpy()), rel=1e-12, abs=0)
    both = penalty.value([weight, 2 * weight, draw(5, 3)], 0.3).item()
    expected = sum(formula(w.numpy()) for w in (weight, 2 * weight, draw(5, 3)))
    assert both == pytest.approx(0.3 * expected, rel=1e-12, abs=0)


@each
def test_the_gradient_is_that_of_finite_differences(penalty, formula):
    weight, gradient = draw(4, 3), torch.ones(4, 3, dtype=torch.float64)
    penalty.add_gradient_(gradient, weight, 0.5)
    h = 1e-6
    for i in np.ndindex(4, 3):
        step = np.zeros((4, 3))
        step[i] = h
        slope = (formula(weight.numpy() + step) - formula(weight.numpy() - step)) / (2 * h)
        assert gradient[i].item() == pytest.approx(1 + 0.5 * slope, rel=1e-6, abs=1e-7)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_half_precision_is_rounded_once(penalty, formula, dtype, strength):
    weight = draw(4, 3, dtype=dtype)
    gradient, exact = torch.zeros_like(weight), torch.zeros(4, 3, dtype=torch.float64)
    penalty.add_gradient_(gradient, weight, strength)
    penalty.add_gradient_(exact, weight.double(), 0.5)
    assert gradient.dtype == dtype
    eps = 0.6 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(gradient.double(), exact, rtol=eps, atol=1e-6)


@each
def test_autocast_and_no_grad_change_nothing(penalty, formula):
    weight = draw(4, 3, dtype=torch.float32)
    plain, within = torch.zeros(4, 3), torch.zeros(4, 3)
    penalty.add_gradient_(plain, weight, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        penalty.add_gradient_(within, weight, 0.5)
    assert torch.equal(plain, within)


def test_dim_says_where_the_incoming_weights_are():
    weight = draw(4, 6)
    for penalty in (Orthogonal(), Orthogonal("columns"), Spectral()):
        assert penalty.value(weight, dim=0) == penalty.value(weight.T.contiguous())


def test_a_row_of_zeros_is_orthogonal_to_all_and_tiny_rows_are_rows():
    weight = torch.tensor([[0.0, 0.0], [1e-30, 1e-30], [1.0, 0.0]])
    assert Orthogonal().value(weight).item() == pytest.approx(0.5**0.5 / 3, rel=1e-6, abs=0)
    gradient = torch.zeros(3, 2)
    Orthogonal().add_gradient_(gradient, weight, 1.0)
    assert gradient.isfinite().all()
    assert not gradient[0].any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 4)])
def test_weights_without_pairs(shape):
    weight, gradient = torch.ones(shape), torch.zeros(shape)
    for penalty in (Orthogonal(), *[Orthogonal("columns"), Spectral()] * (0 in shape)):
        penalty.add_gradient_(gradient, weight, 1.0)
        assert penalty.value(weight).item() == 0
    assert not gradient.any()


def test_what_is_not_finite_raises_no_error():
    weight, gradient = torch.full((3, 3), float("nan")), torch.zeros(3, 3)
    Spectral().add_gradient_(gradient, weight, 1.0)
    assert Spectral().value(weight).isnan()
    assert not gradient.any()


def test_strength_0_adds_nothing_where_the_gradient_is_nan():
    gradient = torch.zeros(2)
    Function(lambda w: w.sqrt().sum()).add_gradient_(gradient, -torch.ones(2), 0.0)
    assert not gradient.any()


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", [Orthogonal(), Spectral()], ids=["orthogonal", "spectral"])
def test_forty_more_weights_cost_no_more_operations(penalty):
    def operations(count):
        weights = [draw(4, 3) for _ in range(count)]
        gradients = [torch.zeros_like(w) for w in weights]
        with Count() as counter:
            penalty.add_gradient_(gradients, weights, 0.1)
        return counter.calls - count  # each is detached, which launches nothing

    assert operations(44) == operations(4)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda w: w, ValueError, r"lambda should return a real 0-d tensor, got shape \(2,\) .* take the sum or mean"),
        (lambda w: 1.0, TypeError, r"lambda should return a 0-d tensor, got 1\.0"),
        (lambda w: w.detach().sum(), ValueError, "^lambda does not depend on the weight in a way that autograd"),
        (functools.partial(torch.add, other=1), ValueError, "add should return a real 0-d tensor"),
    ],
    ids=["no scalar", "no tensor", "detached", "partial"],
)
def test_what_is_no_function_to_a_scalar_is_refused(function, error, message):
    gradient = torch.zeros(2)
    with pytest.raises(error, match=message):
        Function(function).add_gradient_(gradient, torch.ones(2), 1.0)
    assert not gradient.any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Orthogonal("row"), ValueError, "`mode` should be 'rows' or 'columns', got 'row'"),
        (lambda: Spectral(0.0), ValueError, r"`target` should be positive and finite, got 0\.0"),
        (lambda: Spectral("1"), TypeError, "`target` should be a number, got '1'"),
        (lambda: Spectral(k=0), ValueError, "`k` should be a positive integer, got 0"),
        (lambda: Function(3), TypeError, "`function` should be a function .*, got 3"),
        (lambda: Orthogonal().proximal_(torch.ones(2, 2), 1.0), NotImplementedError, "has no proximal step"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
