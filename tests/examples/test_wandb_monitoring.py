"""Does W&B get what the docstring tells to look for, and does the run leave nothing elsewhere?"""

import matplotlib
import pytest
import wandb_monitoring as example
from label_noise import read_csv
from wandb_monitoring import Rows

from tests.examples.support import run
from tests.reading import read_wandb

MODULES = ("hidden1", "norm1", "hidden2", "norm2", "head")
DECAYING = ("hidden1", "hidden2", "head")
PARAMETERS = (*(f"{name}.weight" for name in MODULES), "norm1.bias", "norm2.bias", "head.bias")
STEPS = [*range(19, 2000, 20)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, by a user whose home is empty; matplotlib keeps its fonts."""
    output, home = tmp_path_factory.mktemp("output"), tmp_path_factory.mktemp("home")
    environment = {"HOME": str(home), "TMPDIR": str(home), "MPLCONFIGDIR": matplotlib.get_configdir()}
    return output, home, run("wandb_monitoring", "--output", output, cwd=home, **environment)


@pytest.fixture(scope="module")
def history(finished):
    return read_wandb(finished[0])


def series(history, key):
    return {row["trainer/global_step"]: row[key] for row in history if key in row}


def test_a_whole_run_shows_what_its_docstring_says(finished):
    output, _, process = finished
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\nholds: ") == 7
    rows = Rows(read_csv(output / "csv" / "metrics.csv"))
    gaps = rows.series("generalization_gap/acc")
    assert gaps[49] < 0.1
    assert gaps[199] == pytest.approx(0.55, abs=0.06, rel=0)
    assert rows.series("weight_norm/norm2")[1999] == pytest.approx(27, abs=3, rel=0)
    assert rows.series("timescale/total")[119] == pytest.approx(1545, abs=1, rel=0)


def test_all_is_below_the_folder_of_the_run(finished):
    output, home, process = finished
    (folder,) = output.glob("wandb/offline-run-*")
    assert f"To see it in W&B: wandb sync {folder}\n" in process.stdout
    left = [path for path in home.rglob("*") if path.is_file()]
    assert left == []


def test_every_row_has_a_step_of_the_trainer(history):
    assert len(history) > 200
    assert all("trainer/global_step" in row for row in history)


@pytest.mark.parametrize("quantity", ["weight_norm", "rms", "update_norm", "ratio", "angle"])
def test_norms_are_there_for_each_layer_beside_what_is_expected(history, quantity):
    for part in ("total", *MODULES):
        assert list(series(history, f"{quantity}/{part}")) == STEPS
        has_expected = part in ("total", *DECAYING)
        assert list(series(history, f"{quantity}/{part}/expected")) == (STEPS if has_expected else [])


def test_the_other_quantities_are_there_on_the_steps_of_the_loss(history):
    assert list(series(history, "train_loss")) == STEPS
    for quantity in ("gradient_norm", "sparsity", "effective_decay"):
        for part in ("total", *MODULES):
            assert list(series(history, f"{quantity}/{part}")) == STEPS
    for key in (
        "timescale/total",
        "timescale_epochs/total",
        "gradient_nonfinite/total",
        "weight_decay",
        "lr-AdamW-weight_decay",
    ):
        assert list(series(history, key)) == STEPS
    assert list(series(history, "generalization_gap/acc")) == [*range(49, 2000, 50)]


def test_both_loggers_got_the_same_numbers(finished, history):
    rows = Rows(read_csv(finished[0] / "csv" / "metrics.csv"))
    for key in ("train_loss", "weight_norm/total", "angle/hidden1", "rms/head/expected", "generalization_gap/acc"):
        assert series(history, key) == pytest.approx(rows.series(key), rel=1e-6, abs=0)


def test_histograms_hold_all_elements_in_64_bins(history):
    sizes = {name: parameter.numel() for name, parameter in example.Classifier().named_parameters()}
    assert set(sizes) == set(PARAMETERS)
    for of in ("weight", "gradient"):
        for name, size in sizes.items():
            drawn = series(history, f"{of}_histogram/{name}")
            assert list(drawn) == STEPS
            for histogram in drawn.values():
                assert histogram["_type"] == "histogram"
                assert len(histogram["values"]) == 64
                assert len(histogram["bins"]) == 65
                assert sum(histogram["values"]) == size


def test_what_follows_from_the_settings(history):
    """In the end lr is 0.002 and weight decay 3; b is Adam's beta1 of 0.9."""
    assert series(history, "effective_decay/total")[1999] == pytest.approx(0.006, rel=1e-6, abs=0)
    assert series(history, "timescale/total")[1999] == pytest.approx(1 / 0.006, rel=1e-6, abs=0)
    assert series(history, "timescale_epochs/total")[1999] == pytest.approx(1 / 0.006 / 10, rel=1e-6, abs=0)
    assert series(history, "rms/hidden1/expected")[1999] == pytest.approx((0.002 / (2 * 3)) ** 0.5, rel=1e-6, abs=0)
    assert series(history, "angle/hidden1/expected")[1999] == pytest.approx(
        (2 * 0.006 * 0.1 / 1.9) ** 0.5, rel=1e-6, abs=0
    )


def test_the_share_of_what_is_expected_is_a_mean_over_the_last_tenth():
    rows = Rows([{"step": float(step), "rms/a": float(step), "rms/a/expected": 2.0} for step in range(1, 21)])
    assert rows.over_expected("rms/a") == pytest.approx((19 + 20) / 2 / 2, rel=1e-6, abs=0)


def test_wandb_mode_is_left_to_the_user(tmp_path):
    process = run("wandb_monitoring", "--fast", "--output", tmp_path, cwd=tmp_path, WANDB_MODE="disabled")
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.rglob("*.wandb")) == []
    assert "measured 0 file" in process.stdout
    assert "wandb sync" not in process.stdout
    assert (tmp_path / "csv" / "metrics.csv").exists()
