"""Does `cli.yaml` train, can it be printed, changed and fed back, and is a wrong one told in words?"""

import sys

import cli
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor

from lightning_regularize import L1Penalty, WeightConstraint, WeightDecay
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Constant, Cosine, Linear, Warmup
from tests.examples.support import agents_command, run
from tests.reading import read_wandb, read_wandb_config

pytestmark = pytest.mark.timeout(300)  # seconds; the slowest takes 15 on a free core, which tests have not

SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli.py"])  # LightningCLI warns where both it and `args` are given
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse renames


def fit(tmp_path, *arguments, config=cli.CONFIG):
    return cli.run(["fit", f"--config={config}", *SHORT, f"--trainer.logger.save_dir={tmp_path}", *arguments])


def found(fitted, kind):
    return [callback for callback in fitted.trainer.callbacks if isinstance(callback, kind)]


def write(tmp_path, old, new):
    text = cli.CONFIG.read_text()
    assert text.count(old) == 1
    path = tmp_path / "wrong.yaml"
    path.write_text(text.replace(old, new))
    return path


def test_all_is_built_as_the_yaml_says(tmp_path):
    fitted = fit(tmp_path)
    first, second = found(fitted, L1Penalty)
    assert (first.schedule, first.method, first.include) == (Constant(3e-4), "proximal", ("net.0.*",))
    assert (second.schedule, second.method, second.include) == (Linear(0.0, 3e-4), "gradient", ("net.2.*",))
    (decay,) = found(fitted, WeightDecay)
    assert decay.schedule == Warmup(Cosine(0.1, 1.0), fraction=0.1, start=0.01)
    (constraint,) = found(fitted, WeightConstraint)
    assert constraint.projection == MaxNorm(0.5)
    assert fitted.trainer.global_step == 3
    assert (decay.grouping.exclude, decay.grouping.factors) == (("bias",), {"net.4.*": 0.5})
    assert fitted.trainer.callback_metrics["weight_decay"] == 1.0  # in the last step
    (group,) = fitted.trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.01  # the module's, put back


def test_what_is_printed_is_fed_back_and_gives_the_same(tmp_path, capsys):
    printed = []
    for config in (cli.CONFIG, tmp_path / "0.yaml"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["fit", f"--config={config}", "--model.width=32", "--print_config"])
        assert not ended.value.code
        printed.append(capsys.readouterr().out)
        (tmp_path / f"{len(printed) - 1}.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    assert yaml.safe_load(printed[0])["model"]["width"] == 32
    first, second = fit(tmp_path, "--model.width=32"), fit(tmp_path, config=tmp_path / "0.yaml")
    assert first.model.net[0].out_features == 32
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_command_line_reaches_into_the_last_callback_and_adds_others(tmp_path):
    fitted = fit(tmp_path, "--trainer.callbacks.weight_decay.schedule.end=3")
    assert found(fitted, WeightDecay)[0].schedule == Warmup(Cosine(0.1, 3.0), fraction=0.1, start=0.01)
    assert fitted.trainer.callback_metrics["weight_decay"] == 3.0
    fitted = fit(tmp_path, "--trainer.callbacks.weight_decay=0.2", "--trainer.callbacks+=LearningRateMonitor")
    assert found(fitted, WeightDecay)[0].schedule == Constant(0.2)
    assert found(fitted, LearningRateMonitor)
    assert len(found(fitted, L1Penalty)) == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # the second run has a folder of its own
def test_lightning_clis_other_commands_are_there_too(tmp_path):
    fitted = fit(tmp_path)
    checkpoint = fitted.trainer.checkpoint_callback.best_model_path
    where = [f"--config={cli.CONFIG}", f"--ckpt_path={checkpoint}", f"--trainer.logger.save_dir={tmp_path}"]
    validated = cli.run(["validate", *where, *SHORT])
    assert validated.trainer.callback_metrics["val_accuracy"] == fitted.trainer.callback_metrics["val_accuracy"] > 0.1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("strength: 3.0e-4,", "strenght: 3.0e-4,", "Option 'strenght' is not accepted"),
        ("max_norm: 0.5", "max_norm: -0.5", "`max_norm` should be positive and finite, got -0.5."),
        ("end: 1.0", "end: -1.0", "`end` should be a finite number that is not negative, got -1.0."),
        ("schedules.Cosine", "schedules.Cosinus", "lightning_regularize.schedules.Cosinus"),
        ("exclude: [bias]", "exclude: [biases]", "Did you mean 'bias'?"),
        ("width: 256", "width: wide", 'Parser key "model.width"'),
        ("max_epochs: 30", "max_epoch: 30", "does not accept option 'trainer.max_epoch'"),
        ("accelerator: cpu", "accelerator: abacus", "abacus"),
        ("trainer:\n", "trainer\n", "line 4"),
    ],
    ids=["key", "norm", "schedule", "class", "rule", "type", "trainer's key", "accelerator", "syntax"],
)
def test_a_wrong_yaml_ends_with_a_message_and_2(tmp_path, capsys, old, new, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", f"--config={write(tmp_path, old, new)}", f"--trainer.logger.save_dir={tmp_path}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "usage: " in said
    assert message in said.partition("error: ")[2]
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


def test_the_sweep_drives_it(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    sweep = yaml.safe_load((cli.CONFIG.parent / "cli_sweep.yaml").read_text())
    values = {name: parameter.get("value", parameter.get("min")) for name, parameter in sweep["parameters"].items()}
    python, program, *arguments = agents_command(sweep, values)
    assert (python, program) == ("python", "examples/cli.py")
    monkeypatch.chdir(cli.CONFIG.parents[1])
    (tmp_path / "config.yaml").write_text("of the run before\n")
    fitted = cli.run([*arguments, *SHORT, f"--trainer.logger.save_dir={tmp_path}"])
    fitted.trainer.logger.experiment.finish()
    assert sweep["metric"] == {"name": "val_accuracy", "goal": "maximize"}
    assert [row for row in read_wandb(tmp_path) if "val_accuracy" in row]
    config = read_wandb_config(tmp_path)  # what W&B draws the metric over
    assert config["regularization/WeightDecay/weight_decay"] == repr(found(fitted, WeightDecay)[0].schedule)
    assert found(fitted, WeightDecay)[0].schedule == Warmup(Cosine(0.1, 0.1), fraction=0.1, start=0.01)
    assert fitted.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.001


def test_the_yaml_is_short_enough_to_be_shown_whole():
    assert len(cli.CONFIG.read_text().splitlines()) <= 45


def test_a_full_run_holds_what_it_claims(tmp_path):
    process = run("cli", "--output", tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("\nholds: ") == 6
    saved = yaml.safe_load((tmp_path / "regularized" / "version_0" / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][-1]["init_args"]["weight_decay"]["init_args"]["schedule"]["init_args"] == {
        "start": 0.1,
        "end": 1.0,
    }
