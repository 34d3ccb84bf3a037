"""Is the share of the YAML met, and can the YAML be changed and misspelled?"""

import sys

import pytest
import target_share

from lightning_regularize import WeightConstraint
from lightning_regularize.projections import TopShare
from lightning_regularize.schedules import CubicRamp
from tests.examples.support import run

pytestmark = pytest.mark.timeout(300)  # seconds; a full run takes 20 on a free core, which tests have not


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["target_share.py"])  # LightningCLI warns where both it and `args` are given
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse renames


def test_a_full_run_holds_what_it_claims(tmp_path):
    process = run("target_share", "--output", tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("\nholds: ") == 3
    assert "measured 270,029 zeros of 270,028.8" in process.stdout


def test_all_is_built_as_the_yaml_says(tmp_path):
    short = ["--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    where = [f"--config={target_share.CONFIG}", f"--trainer.logger.save_dir={tmp_path}"]
    fitted = target_share.run(["fit", *where, *short])
    constraint = next(c for c in fitted.trainer.callbacks if isinstance(c, WeightConstraint))
    assert constraint.projection == TopShare(CubicRamp(1.0, 0.1, begin=0.1, until=0.6), "all")
    assert constraint.arguments["freeze_zeros"] == 0.6


def test_a_share_that_is_none_ends_with_a_message_and_2(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    text = target_share.CONFIG.read_text()
    begin, end = text.index("            share:"), text.index("            scope:")
    path.write_text(text[:begin] + "            share: 90\n" + text[end:])
    with pytest.raises(SystemExit) as ended:
        target_share.main(["fit", f"--config={path}", f"--trainer.logger.save_dir={tmp_path}"])
    assert ended.value.code == 2
    assert "`share` should be in (0, 1], the part that is kept, got 90" in capsys.readouterr().err
