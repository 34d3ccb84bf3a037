"""Mathematical properties as named assertions, so that a test file is a table."""

import numpy as np
import scipy.optimize
import torch
from hypothesis import strategies as st

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def matrices(dtype=torch.float64, max_rows=4, max_columns=5):
    """Small matrices with zeros, ties and six orders of magnitude; no -0.0, whose bits a clamp need not keep."""
    numbers = st.floats(-100, 100).map(lambda x: 0.0 if abs(x) < 1e-4 else x)
    columns = st.integers(1, max_columns)
    rows = columns.flatmap(lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=max_rows))
    return rows.map(lambda values: torch.tensor(values, dtype=dtype))


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    kind = BITS[actual.element_size()]
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind))


def assert_inside(norms, bound, rtol=0.0):
    """Every norm, a float64 number, is at most the bound; strictly so by default."""
    largest = max(map(float, norms), default=0.0)
    assert largest <= bound * (1 + rtol), f"{largest} exceeds {bound} by {largest / bound - 1:.1e}"


def assert_idempotent(projection, weight, **options):
    once = projection.project(weight, **options)
    twice = once.clone()
    changed = projection.project_(twice, **options)
    assert_same_bits(twice, once)
    assert not changed


def assert_pure(projection, weight, **options):
    """``project`` leaves its argument alone and agrees with ``project_``, which says whether it did anything."""
    before, in_place = weight.clone(), weight.clone()
    projected = projection.project(weight, **options)
    changed = projection.project_(in_place, **options)
    assert_same_bits(weight, before)
    assert_same_bits(projected, in_place)
    assert changed.dtype == torch.bool
    assert changed.shape == ()
    assert changed == (projected != weight).any()


def assert_nearest_point(projected, weight, members, tolerance=1e-12):
    """No member of the set is nearer to the weight: ``members`` are points of it, found in any way."""
    distance = torch.linalg.vector_norm(projected - weight)
    for member in members:
        assert distance <= torch.linalg.vector_norm(member - weight) + tolerance


def nearest_point_by_solver(weight, constraint):
    """The nearest point with ``constraint(x) >= 0``, from scipy's SLSQP in float64, started inside."""
    target = weight.double().numpy().ravel()
    solution = scipy.optimize.minimize(
        lambda x: 0.5 * np.sum((x - target) ** 2),
        0.01 * target + 1e-3,
        jac=lambda x: x - target,
        constraints=[{"type": "ineq", "fun": lambda x: constraint(x.reshape(weight.shape))}],
        options={"ftol": 1e-10, "maxiter": 500},
    )
    # Not `solution.success`: at the edge of the set a line search may stop within rounding of the solution.
    assert np.min(constraint(solution.x.reshape(weight.shape))) > -1e-6, solution.message
    return torch.from_numpy(solution.x).view(weight.shape)


def assert_proximal(found, weight, penalty, tolerance=1e-8):
    """``found`` minimizes ``|x - weight|^2 / 2 + penalty(x)``, as far as scipy can tell from where it starts it."""
    target = weight.double().numpy()

    def objective(x):
        return 0.5 * np.sum((x.reshape(target.shape) - target) ** 2) + penalty(x.reshape(target.shape))

    ours = objective(found.double().numpy())
    for start in (target, found.double().numpy(), np.zeros_like(target)):
        solution = scipy.optimize.minimize(
            objective, start.ravel(), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
        )
        assert ours <= solution.fun + tolerance
