"""Is the search resumed where it was, are folds what they should be, and does the sweep fit the script?"""

import os
import re

import choose_weight_decay as example
import optuna
import pytest
import torch
import wandb
import yaml
from optuna.trial import TrialState

from tests.examples.support import EXAMPLES, agents_command, run
from tests.reading import read_wandb

pytestmark = pytest.mark.timeout(300)  # seconds

SWEEP = yaml.safe_load((EXAMPLES / "sweep.yaml").read_text())


@pytest.fixture
def trained(monkeypatch):
    """The strengths that are tried, in their order; trainings are replaced by a formula."""
    strengths = []

    def cross_validate(weight_decay, options):
        strengths.append(weight_decay)
        return [weight_decay / (1 + weight_decay) ** 2 + fold / 100 for fold in range(options.folds)]

    monkeypatch.setattr(example, "cross_validate", cross_validate)
    monkeypatch.setattr(example, "score", lambda weight_decay, *_: weight_decay)
    return strengths


def study(output):
    (summary,) = optuna.get_all_study_summaries(f"sqlite:///{output / example.DATABASE}")
    return optuna.load_study(study_name=summary.study_name, storage=f"sqlite:///{output / example.DATABASE}")


def search(output, *arguments):
    example.main([*arguments, "--output", str(output)])


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_the_whole_grid_is_tried_and_the_best_is_found(trained, tmp_path, capsys):
    search(tmp_path)
    assert sorted(trained) == list(example.GRID)
    assert study(tmp_path).best_params == {"weight_decay": 1.0}  # where w / (1 + w)^2 has its maximum
    assert "holds: the best weight decay lies inside the grid; measured 1 in 0.0001 to 10" in capsys.readouterr().out


def test_a_second_run_goes_on_with_the_rest_and_ends_as_one_that_was_not_interrupted(trained, tmp_path, capsys):
    search(tmp_path / "parts", "--trials", "3")
    assert len(trained) == 3
    assert "3 of 8 strengths are done" in capsys.readouterr().out
    search(tmp_path / "parts", "--trials", "2")
    search(tmp_path / "parts")
    assert sorted(trained) == list(example.GRID)
    search(tmp_path / "parts")
    assert len(trained) == len(example.GRID)
    search(tmp_path / "whole")
    assert example.scores_of(study(tmp_path / "parts")) == example.scores_of(study(tmp_path / "whole"))


def interrupt(monkeypatch, error):
    """Let the third trial from here end so."""
    formula, calls = example.cross_validate, []

    def cross_validate(weight_decay, options):
        calls.append(weight_decay)
        if len(calls) == 3:
            raise error
        return formula(weight_decay, options)

    monkeypatch.setattr(example, "cross_validate", cross_validate)
    return calls


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(1), 1)],
    ids=["between trainings", "in a training, where Lightning makes an exit of it"],
)
def test_a_trial_that_was_interrupted_is_run_again_and_no_other(trained, tmp_path, monkeypatch, error, code):
    calls = interrupt(monkeypatch, error)
    with pytest.raises(SystemExit) as ended:
        search(tmp_path)
    assert ended.value.code == code
    search(tmp_path)
    assert calls.count(calls[2]) == 2
    assert sorted(trained) == list(example.GRID)


def test_a_trial_whose_process_was_killed_is_run_again(trained, tmp_path):
    search(tmp_path, "--trials", "2")
    killed = study(tmp_path)
    killed.sampler = optuna.samplers.GridSampler({"weight_decay": example.GRID}, seed=0)
    lost = killed.ask().suggest_float("weight_decay", 1e-4, 10.0, log=True)
    search(tmp_path)
    assert trained.count(lost) == 1
    assert sorted(trained) == list(example.GRID)
    assert len(study(tmp_path).get_trials(states=[TrialState.RUNNING])) == 1


def test_a_trial_that_failed_is_told_and_not_passed_over(trained, tmp_path, monkeypatch):
    interrupt(monkeypatch, RuntimeError("no more memory"))
    with pytest.raises(RuntimeError, match="no more memory"):
        search(tmp_path)
    with pytest.raises(SystemExit, match=r"remove .*study\.db") as ended:
        search(tmp_path)
    assert str(ended.value).startswith("Of 1 trials an exception was the end")


def test_other_settings_are_another_search(trained, tmp_path):
    search(tmp_path)
    search(tmp_path, "--folds", "3")
    search(tmp_path, "--seed", "1")
    assert len(trained) == 3 * len(example.GRID)


# -- cross-validation --------------------------------------------------------------------------------------------------


def test_each_image_is_held_out_once_and_the_folds_are_the_same_for_all_strengths(monkeypatch):
    seen = []

    def score(weight_decay, train, test, options):
        seen.append((weight_decay, train, test))
        return 0.0

    monkeypatch.setattr(example, "score", score)
    options = example.parse_options(["--folds", "4"])
    for weight_decay in (0.1, 1.0):
        assert example.cross_validate(weight_decay, options) == [0.0] * 4
    images = example.digits(0).train[0]
    for first, second in zip(seen[:4], seen[4:], strict=True):
        assert (first[0], second[0]) == (0.1, 1.0)
        assert torch.equal(first[2][0], second[2][0])
        both = torch.cat([first[1][0], first[2][0]])
        assert torch.equal(both.sum(dim=1).sort().values, images.sum(dim=1).sort().values)
    held_out = torch.cat([test[0] for _, _, test in seen[:4]])
    assert torch.equal(held_out.unique(dim=0), images.unique(dim=0))
    assert len(held_out) == len(images) == 600


def test_scores_are_what_the_docstring_says(capsys):
    means = []
    for weight_decay, *fast in (["3", "--fast"], ["0.0001"], ["3"], ["3", "--fast"]):
        example.main(["--weight-decay", weight_decay, *fast])
        means.append(float(re.fullmatch(rf"weight decay {weight_decay}: (.*)\n", capsys.readouterr().out)[1]))
    # Measured 0.458 and 0.535; the standard error of an accuracy on 600 images is 0.02.
    assert means[1:3] == pytest.approx([0.458, 0.535], abs=0.03, rel=0)
    assert means[0] == means[3]  # whatever was trained before
    assert means[2] > means[1] + 0.03


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_the_script_takes_the_command_of_the_sweep():
    strength, folds = SWEEP["parameters"]["weight-decay"], SWEEP["parameters"]["folds"]["value"]
    assert strength["distribution"] == "log_uniform_values"
    assert (strength["min"], strength["max"]) == (example.GRID[0], example.GRID[-1])
    python, program, *arguments = agents_command(SWEEP, {"weight-decay": 0.0123, "folds": folds})
    assert (python, program) == ("python", "examples/choose_weight_decay.py")
    assert (EXAMPLES.parent / program).is_file()
    options = example.parse_options(arguments)
    assert (options.weight_decay, options.folds, options.wandb) == (0.0123, 5, True)


def test_the_metric_of_the_sweep_is_logged(tmp_path):
    _, _, *arguments = agents_command(SWEEP, {"weight-decay": 3, "folds": 2})
    process = run("choose_weight_decay", *arguments, "--fast", "--output", tmp_path)
    assert process.returncode == 0, process.stderr
    (row,) = read_wandb(tmp_path)
    assert process.stdout == f"weight decay 3: {row[SWEEP['metric']['name']]:.3f}\n"
    assert row["weight_decay"] == 3
    assert SWEEP["metric"]["goal"] == "maximize"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "offline"), ({"WANDB_SWEEP_ID": "abc"}, None), ({"WANDB_MODE": "disabled"}, "disabled")],
    ids=["by hand", "by an agent", "as the user says"],
)
def test_only_the_run_of_an_agent_is_sent_unless_the_user_says_so(monkeypatch, tmp_path, environment, expected):
    class Run(dict):
        log = dict.update
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    began = Run()
    monkeypatch.setattr(wandb, "init", lambda **_: began)
    for name in ("WANDB_MODE", "WANDB_SWEEP_ID"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the example makes of it
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    example.log_to_wandb(3.0, [0.5, 0.7], example.parse_options(["--output", str(tmp_path)]))
    assert os.environ.get("WANDB_MODE") == expected
    assert began["val_accuracy"] == pytest.approx(0.6, rel=1e-6, abs=0)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight-decay", "-1"], "should be from 0 to 1e+06, got -1"),
        (["--weight-decay", "strong"], "invalid number value: 'strong'"),
        (["--folds", "1"], "should be from 2 to 20, got 1"),
        (["--trials", "0"], "should be from 1 to 1000, got 0"),
        (["--wandb"], "needs --weight-decay"),
    ],
    ids=["negative", "no number", "one fold", "no trial", "nothing to log"],
)
def test_wrong_arguments_are_told_and_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        example.parse_options(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
