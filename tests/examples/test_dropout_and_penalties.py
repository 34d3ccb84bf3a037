"""Are the losses with and without penalty what they are called, and do all three ways regularize?"""

from io import StringIO

import dropout_and_penalties
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from rich.console import Console
from torch import nn

pytestmark = pytest.mark.timeout(400)  # seconds; a full run takes 12 on a free core, which tests have not


def points(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        dropout_and_penalties.noisy_line(count, slope=1.0, noise=0.3, generator=generator)
        for count in (dropout_and_penalties.TRAIN_POINTS, dropout_and_penalties.TEST_POINTS)
    ]


def result(label, output, *arguments):
    options = dropout_and_penalties.parse_options(["--output", str(output), *arguments])
    return dropout_and_penalties.train(label, points(0), options)


class Witness(Callback):
    """Keeps the weights that each step finds, by epoch, and the dropout rates at each validation."""

    def __init__(self):
        super().__init__()
        self.weights, self.rates = {}, []

    def on_train_batch_start(self, trainer, pl_module, *_):
        found = {name: p.detach().double().numpy().copy() for name, p in pl_module.net.named_parameters()}
        self.weights[trainer.global_step + 1] = found

    def on_validation_end(self, trainer, pl_module):
        self.rates += [m.p for m in pl_module.modules() if isinstance(m, nn.Dropout)]


@pytest.fixture
def witnessed(monkeypatch, tmp_path):
    def run(label):
        witness, callbacks = Witness(), dropout_and_penalties.RUNS[label]
        monkeypatch.setitem(dropout_and_penalties.RUNS, label, lambda: [*callbacks(), witness])
        return result(label, tmp_path, "--fast"), witness

    return run


def squared_error(weights):
    x, y = (part.double().numpy() for part in points(0)[0])
    for layer in (0, 3):
        x = np.maximum(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"], 0)
    return np.mean((x @ weights["6.weight"].T + weights["6.bias"] - y) ** 2)


@pytest.mark.parametrize(
    ("label", "penalty"),
    [("none", lambda w: 0.0), ("L1 0.003", lambda w: 0.003 * np.abs(w)), ("L2 0.03", lambda w: 0.015 * w**2)],
    ids=["none", "L1", "L2"],
)
def test_the_loss_with_penalty_is_the_reported_one_and_the_penalty_at_the_weights_of_the_step(
    witnessed, label, penalty
):
    found, witness = witnessed(label)
    for epoch in (5, 10, 15, 20):
        weights = witness.weights[epoch]
        expected = sum(np.sum(penalty(weights[f"{layer}.weight"])) for layer in (0, 3, 6))
        assert found.at(epoch, "train_loss") == pytest.approx(squared_error(weights), rel=1e-4, abs=0)
        assert found.at(epoch, "loss_with_penalty") == pytest.approx(squared_error(weights) + expected, rel=1e-4, abs=0)


@pytest.mark.parametrize(("label", "weight_decay"), [("none", 0.0), ("L2 0.03", 0.03)], ids=["none", "L2"])
def test_a_run_is_that_of_a_hand_written_loop(tmp_path, label, weight_decay):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 1))
    groups = [  # the weight decay of torch's Adam is an L2 penalty
        {"params": [layer.weight for layer in net[::2]], "weight_decay": weight_decay},
        {"params": [layer.bias for layer in net[::2]]},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    x, y = points(0)[0]
    predictions = {}
    for epoch in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (1 + np.cos(np.pi * epoch / 20))
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        if epoch % 5 == 4:
            predictions[epoch + 1] = net(dropout_and_penalties.GRID).flatten().tolist()
    found = result(label, tmp_path, "--fast")
    assert list(found.curves) == list(predictions)
    np.testing.assert_allclose(list(found.curves.values()), list(predictions.values()), atol=1e-3)


def test_the_rate_is_on_at_every_validation_off_after_training_and_changes_nothing_there(witnessed):
    found, witness = witnessed("dropout 0.5")
    assert witness.rates == [0.5, 0.5] * 4
    assert [m.p for m in found.model.modules() if isinstance(m, nn.Dropout)] == [0.0, 0.0]
    assert found.at(20, "train_loss") > 1.1 * squared_error(witness.weights[20])
    assert found.at(20, "train_error") == pytest.approx(
        squared_error(witness.weights[20]), rel=0.05, abs=0
    )  # a small step on
    assert dropout_and_penalties.drops_in_training_only(found).holds
    with torch.no_grad():
        found.model.net[6].bias += 1e-3
    assert not dropout_and_penalties.drops_in_training_only(found).holds


def test_what_is_claimed_holds_in_a_full_run_and_not_for_other_runs(tmp_path):
    none, dropout, *_ = found = [result(label, tmp_path) for label in dropout_and_penalties.RUNS]
    assert [claim for claim in dropout_and_penalties.claims_of(found) if not claim.holds] == []
    assert [claim for claim in dropout_and_penalties.claims_of([dropout, none, none, none]) if claim.holds] == []
    # Loops in plain torch, on the same points, had these errors.
    errors = [run.last("test_error") for run in found]
    assert errors == pytest.approx([0.170, 0.128, 0.139, 0.130], abs=0.01, rel=0)
    rows = printed_rows(dropout_and_penalties.table_of(found, (10, 1000)))
    assert rows[4][:2] == ["L1 0.003", "10"]
    assert [float(cell) for cell in rows[4][2:4]] == pytest.approx([0.071, 1.366], abs=0.01, rel=0)


def printed_rows(table):
    text = StringIO()
    Console(file=text, width=100).print(table)
    lines = [line for line in text.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_a_file_in_place_of_the_output_folder_is_told_and_exits_with_2(tmp_path, capsys):
    file = tmp_path / "taken"
    file.touch()
    with pytest.raises(SystemExit) as ended:
        dropout_and_penalties.main(["--output", str(file)])
    assert ended.value.code == 2
    assert "should be a folder" in capsys.readouterr().err
