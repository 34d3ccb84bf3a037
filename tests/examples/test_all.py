"""Does every example run in its fast mode, end with its claims, draw its figure, and refuse a wrong command line?"""

import importlib
import re
import subprocess
import sys

import pytest
from matplotlib.image import imread

from tests.examples.support import EXAMPLES, NAMES, run

pytestmark = pytest.mark.timeout(300)  # seconds; the slowest takes 20 on a free core, which tests have not


@pytest.fixture(scope="module", params=NAMES)
def fast(request, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param)
    return output, run(request.param, "--fast", "--output", output, cwd=output)


def test_a_fast_run_ends_well_with_claims_and_no_warning(fast):
    _, process = fast
    assert process.returncode == 0, process.stderr
    claims = [line for line in process.stdout.splitlines() if line.startswith("not judged: ")]
    assert claims
    assert all(re.fullmatch(r"not judged: .+; measured .*\d.*", claim) for claim in claims)
    assert "warn" not in (process.stdout + process.stderr).lower()


def test_it_draws_figures_and_says_where(fast):
    output, process = fast
    paths = re.findall(r"^Figure: (.+)$", process.stdout, flags=re.MULTILINE)
    assert paths
    for path in paths:
        assert path.startswith(str(output))
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.05


def test_it_leaves_nothing_outside_its_folder(fast):
    output, _ = fast
    assert not (output / "lightning_logs").exists()
    assert not (output / "runs").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_command_line_ends_with_usage_and_2(name, tmp_path, capsys):
    main = importlib.import_module(name).main  # in this process, for most of a new one's time goes into imports
    with pytest.raises(SystemExit) as ended:
        main(["--seed", "-1", "--output", str(tmp_path / "none")])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"usage: {name}.py")
    assert "should be from 0 to 4294967295, got -1" in message
    assert not (tmp_path / "none").exists()


def test_all_run_by_one_command():
    process = subprocess.run(
        [sys.executable, EXAMPLES, "--fast", "nothing"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "no example is called nothing; there are" in process.stderr
