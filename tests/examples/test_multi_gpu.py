"""Do all processes share the batches of one, is what differs found, and does only the first process speak?"""

import csv
from itertools import chain

import multi_gpu
import pytest
import torch
from torch.utils.data import TensorDataset

from tests.examples.support import run

pytestmark = pytest.mark.timeout(300)  # seconds; the slowest takes 15 on two free cores, which tests have not


def batches_of(processes, rank, epoch):
    loader = multi_gpu.loader(TensorDataset(torch.arange(600)), processes, rank)
    loader.sampler.set_epoch(epoch)  # as Lightning does
    return [batch.tolist() for (batch,) in loader]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_shares_of_all_processes_are_the_batches_of_one(processes, epoch):
    whole = batches_of(1, 0, epoch)
    shares = [batches_of(processes, rank, epoch) for rank in range(processes)]
    assert sorted(chain(*whole)) == list(range(600))
    assert {len(batch) for share in shares for batch in share} == {60 // processes}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(chain(*parts))


def test_epochs_have_other_batches():
    assert batches_of(1, 0, epoch=0) != batches_of(1, 0, epoch=1)


@pytest.fixture
def fits(tmp_path):
    """Two that are the same: a weight with 1500 zeros in it, and a log of three steps."""
    rows = [
        {"step": step, "weight_decay": decay, "weight_norm/total": 7.0 - step}
        for step, decay in enumerate((0.1, 0.55, 1.0))
    ]
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, rows)
    weight = torch.zeros(3, 1000, dtype=torch.float64)
    weight[0, :900], weight[1, :600] = 0.5 / 30, 0.01
    fit = multi_gpu.Fit({"weight": weight}, 1.0, tmp_path / "one")
    return fit, multi_gpu.Fit({"weight": weight.clone()}, 1.0, tmp_path / "other"), rows


def write(folder, rows):
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def verdicts(fit, alone):
    return [claim.holds for claim in multi_gpu.compare("DDP", fit, alone)]


def test_what_is_the_same_is_said_to_be(fits):
    assert verdicts(fits[1], fits[0]) == [True] * 5


@pytest.mark.parametrize(
    ("place", "change", "expected"),
    [
        ((0, 0), -1e-8, [False, True, True, True, True]),
        ((2, 0), 1e-12, [True, True, False, True, True]),
        ((0, 950), 0.1, [False, True, False, False, True]),
    ],
    ids=["a weight", "a zero", "a unit's norm"],
)
def test_a_weight_that_differs_is_found(fits, place, change, expected):
    alone, fit, _ = fits
    fit.weights["weight"][place] += change
    assert verdicts(fit, alone) == expected


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("weight_norm/total", 1e-8, [True, False, True, True, True]),
        ("weight_decay", 1e-5, [True, False, True, True, False]),
    ],
)
def test_a_number_that_is_logged_otherwise_is_found(fits, key, change, expected):
    alone, fit, rows = fits
    write(fit.log_dir, [*rows[:2], rows[2] | {key: rows[2][key] * (1 + change)}])
    assert verdicts(fit, alone) == expected


def test_a_key_that_is_not_logged_is_found(fits):
    alone, fit, rows = fits
    write(fit.log_dir, [{key: row[key] for key in row if key != "weight_norm/total"} for row in rows])
    assert verdicts(fit, alone) == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("arguments", "gpus", "message"),
    [
        (["--devices", "7"], 0, "should divide the 60 images of a batch, got 7"),
        (["--devices", "1"], 0, "should be from 2 to 60, got 1"),
        (["--accelerator", "gpu"], 1, "there are 1 GPUs for 2 processes"),
        (["--strategy", "fsdp1"], 0, "invalid choice: 'fsdp1'"),
    ],
    ids=["uneven batches", "one process", "too few GPUs", "unknown strategy"],
)
def test_wrong_arguments_are_told_and_exit_with_2(monkeypatch, capsys, arguments, gpus, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(SystemExit) as ended:
        multi_gpu.parse_options(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("accelerator", "gpus", "expected"), [("auto", 1, "cpu"), ("auto", 2, "gpu"), ("gpu", 3, "gpu"), ("cpu", 8, "cpu")]
)
def test_auto_takes_gpus_if_there_is_one_a_process(monkeypatch, accelerator, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert multi_gpu.parse_options(["--accelerator", accelerator]).accelerator == expected


def test_a_full_run_holds_what_it_claims_and_says_it_once(tmp_path):
    process = run("multi_gpu", "--output", tmp_path, "--accelerator", "cpu")
    assert process.returncode == 0, process.stdout + process.stderr
    # torch 2.10 prints of its own connections, "[Gloo] Rank 0 is connected to 1 peer ranks. ...", and ranks cut in.
    lines = [line for line in process.stdout.splitlines() if "[Gloo]" not in line and "peer ranks" not in line]
    assert len(lines) == len(set(lines)) == 13
    assert sum(line.startswith("holds: ") for line in lines) == 12
    assert "measured DDP 100%, FSDP2 50%" in process.stdout
    assert not process.stderr
    assert sorted(path.name for path in (tmp_path / "csv").iterdir()) == ["ddp", "fsdp2", "one", "plain"]
