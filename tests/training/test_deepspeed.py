"""Does DeepSpeed give the numbers of one process, or say why not?

It is no dependency: see ``make test-deepspeed``. One op is compiled on first use, which takes a minute or two.
"""

import functools

import pytest

from tests.distributed import run_distributed
from tests.training import matrix
from tests.training.matrix import COLUMNS, ROWS, assert_cell, fit_all
from tests.training.support import QUIET

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed", exc_type=ImportError)

pytestmark = [
    *QUIET,
    pytest.mark.deepspeed,
    pytest.mark.timeout(600),
    # deepspeed and what it imports, on import and on use
    pytest.mark.filterwarnings("ignore"),
]

HERE = [column for column in COLUMNS if column.startswith("deepspeed")]


@functools.cache
def alone(row, dtype):
    return matrix.fit(0, 1, row, "single", dtype)


@pytest.fixture(scope="module", params=HERE)
def spread(request, tmp_path_factory):
    """A stage, and what it makes of all rows, trained by the same two processes."""
    rows, column = list(ROWS), request.param
    progress = tmp_path_factory.mktemp("progress") / "row"
    first, second = run_distributed(fit_all, rows, column, progress, timeout=500)
    return column, {row: [first[row], second[row]] for row in rows}


@pytest.mark.parametrize("row", ROWS)
def test_cell(spread, row):
    column, outcomes = spread
    assert_cell(row, column, outcomes[row], alone(row, COLUMNS[column].dtype))


ACCUMULATED = ["WeightDecay", "coupled", "stable", "cautious", "L1Penalty", "MaxNorm", "WeightNormMonitor"]


@pytest.mark.parametrize("stage", [0, 2])
def test_accumulated_batches_are_one_step(stage, tmp_path):
    """DeepSpeed shows each of them as a step that is about to come."""
    rows = [row for row in ACCUMULATED if matrix.TABLE[row][f"deepspeed {stage}"] == matrix.EQUAL]
    arguments = rows, f"deepspeed {stage}", tmp_path / "row", 3
    first, second = run_distributed(fit_all, *arguments, timeout=200)
    for row in rows:
        expected = matrix.fit(0, 1, row, "single", COLUMNS["deepspeed 0"].dtype, 3)
        assert_cell(row, f"deepspeed {stage}", [first[row], second[row]], expected, atol=1e-5)
