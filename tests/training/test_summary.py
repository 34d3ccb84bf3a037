"""Does the table show what the optimizers hold, and the note what is likely not meant?"""

import pytest
import torch

from lightning_regularize import (
    AnchorDecay,
    L2Penalty,
    RegularizationSummary,
    RegularizedModule,
    WeightDecay,
    regularize,
    schedules,
)
from tests.distributed import run_distributed
from tests.models import LanguageModel
from tests.training.support import QUIET, Batches, Regression, adamw, make_trainer
from tests.training.test_norm_monitor import SameNames, TwoOptimizers, Wrapped

pytestmark = QUIET


def printed(capsys, *callbacks, module=None, **options):
    """The lines of the table as lists of words, then the notes."""
    make_trainer(*callbacks, **{"max_epochs": 1, **options}).fit(Regression() if module is None else module, Batches())
    text = capsys.readouterr().out
    table, *notes = text.split("Note ")
    rows = [line.split() for line in table.splitlines() if line.split() and not set(line.strip()) <= {"─"}]
    return rows, [" ".join(note.split()) for note in notes]


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_weight_decay_shows_groups_and_rules(capsys):
    decay = WeightDecay(0.05, factors={"output.*": 0.5})
    rows, _ = printed(capsys, decay, RegularizationSummary())
    assert rows == [
        ["Regularization"],
        ["Group,", "parameters", "Shape", "Numbers", "Decay,", "why"],
        ["decay", "1", "tensor", "12", "0.05"],
        ["hidden.weight", "4x3", "12"],
        ["decay", "x0.5", "1", "tensor", "8", "0.025"],
        ["output.weight", "2x4", "8", "output.*"],
        ["no_decay", "4", "tensors", "14", "0"],
        ["hidden.bias", "4", "4", "bias"],
        ["norm.weight", "4", "4", "norm"],
        ["norm.bias", "4", "4", "bias"],
        ["output.bias", "2", "2", "bias"],
    ]


def test_a_schedule_shows_from_where_to_where_it_reaches(capsys):
    schedule = schedules.Warmup(schedules.Cosine(0.1, 0.4), steps=2)
    rows, _ = printed(capsys, WeightDecay(schedule, factors={"output.*": 0.5}), RegularizationSummary())
    assert ["decay", "1", "tensor", "12", "0", "to", "0.4"] in rows
    assert ["decay", "x0.5", "1", "tensor", "8", "0", "to", "0.2"] in rows
    assert ["no_decay", "4", "tensors", "14", "0"] in rows


@pytest.mark.parametrize("times", [{"steps": 20}, {"epochs": 20 / 7}, {"fraction": 20 / 7}], ids=str)
def test_a_timescale_shows_the_weight_decay_and_the_steps(capsys, times):
    decay = WeightDecay(schedules.Timescale(**times), factors={"output.*": 0.5})
    rows, _ = printed(capsys, decay, RegularizationSummary())
    text = " ".join(word for row in rows for word in row)
    assert "12 0.5, over 20 steps" in text  # 1 / (lr 0.1 * 20 steps)
    assert "8 0.25, over 40 steps" in text


def test_each_rule_shows_its_schedule(capsys):
    rules = {"output.*": 0.3, "*": schedules.Linear(0.2, 0.1)}
    rows, _ = printed(capsys, WeightDecay(rules), RegularizationSummary())
    assert ["decay,", "output.*", "1", "tensor", "8", "0.3"] in rows
    assert ["decay,", "*", "1", "tensor", "12", "0.1", "to", "0.2"] in rows
    assert ["output.weight", "2x4", "8", "output.*"] in rows
    assert ["no_decay", "4", "tensors", "14", "0"] in rows


class Based(RegularizedModule):
    def __init__(self):
        super().__init__(weight_decay=0.3)
        self.inner = Regression()

    def training_step(self, batch, batch_idx):
        return self.inner.loss(batch)


@pytest.mark.parametrize(
    ("module", "decay"), [(lambda: regularize(Regression(), 0.2), "0.2"), (Based, "0.3")], ids=["regularize", "base"]
)
def test_modules_of_ours_show_their_rules(capsys, module, decay):
    rows, _ = printed(capsys, RegularizationSummary(), module=module())
    assert ["decay", "2", "tensors", "20", decay] in rows
    assert [row[-1] for row in rows if row[0].endswith("hidden.bias")] == ["bias"]
    assert [row[-1] for row in rows if row[0].endswith("norm.weight")] == ["norm"]


def test_groups_of_the_user_show_as_they_are(capsys):
    def configure(parameters):
        weight, bias, *others = parameters
        return torch.optim.SGD([{"params": [weight], "weight_decay": 0.1}, {"params": [bias, *others]}], lr=0.1)

    rows, _ = printed(capsys, RegularizationSummary(), module=Regression(configure))
    assert ["pg1", "1", "tensor", "12", "0.1"] in rows
    assert ["pg2", "5", "tensors", "22", "0"] in rows
    assert ["output.weight", "2x4", "8", "0", "as", "configured"] in rows


def test_learning_rates_show_where_groups_differ_in_them(capsys):
    def configure(parameters):
        weight, *others = parameters
        return torch.optim.SGD([{"params": [weight], "lr": 0.02}, {"params": others}], lr=0.1, weight_decay=0.3)

    rows, _ = printed(capsys, RegularizationSummary(), module=Regression(configure))
    assert ["pg1", "1", "tensor", "12", "0.3,", "lr", "0.02"] in rows
    assert ["pg2", "5", "tensors", "22", "0.3,", "lr", "0.1"] in rows


def test_each_optimizer_shows_its_groups(capsys):
    rows, _ = printed(capsys, RegularizationSummary(), module=TwoOptimizers())
    assert ["optimizer0", "pg1", "2", "tensors", "16", "0.01"] in rows
    assert ["optimizer1", "pg1", "4", "tensors", "18", "0.01"] in rows


def test_parameters_of_no_optimizer_are_told(capsys):
    rows, _ = printed(capsys, RegularizationSummary(), module=SameNames())
    assert ["(in", "no", "optimizer)", "2", "tensors", "8", "-"] in rows


def test_frozen_parameters_are_left_out(capsys):
    module = Regression()
    module.hidden.requires_grad_(False)
    rows, _ = printed(capsys, RegularizationSummary(), module=module)
    assert not any("hidden" in word for row in rows for word in row)


def test_blocks_share_rows(capsys):
    rows, _ = printed(capsys, WeightDecay(0.05), RegularizationSummary(), module=Wrapped(LanguageModel))
    assert ["model.layers.{0,1}.o_proj.weight", "2", "of", "8x8", "128"] in rows


def test_what_is_beyond_the_cap_is_counted(capsys):
    rows, _ = printed(capsys, WeightDecay(0.05), RegularizationSummary(max_rows=3))
    assert sum(any("." in word and "0." not in word for word in row[:1]) for row in rows) == 3
    assert ["3", "more", "parameters", "are", "not", "shown;", "see", "`max_rows`."] in rows
    assert ["no_decay", "4", "tensors", "14", "0"] in rows


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    trainer = make_trainer(WeightDecay(0.05), RegularizationSummary(), max_epochs=1)
    trainer.fit(Wrapped(LanguageModel), Batches())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


def test_the_table_is_printed_once_a_fit(capsys):
    summary = RegularizationSummary()
    for _ in range(2):
        rows, _ = printed(capsys, summary, max_epochs=3)
        assert rows.count(["Regularization"]) == 1


def test_nothing_is_printed_without_an_optimizer(capsys):
    class Untrained(Regression):
        def configure_optimizers(self):
            return None

    with pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"):
        rows, notes = printed(capsys, RegularizationSummary(), module=Untrained())
    assert (rows, notes) == ([], [])


def _on_two(rank, world_size):
    import contextlib
    import io
    import warnings

    warnings.simplefilter("ignore")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        trainer = make_trainer(RegularizationSummary(), max_epochs=1, strategy="ddp", devices=world_size)
        trainer.fit(Regression(), Batches())
    return out.getvalue()


def test_only_the_first_rank_prints():
    first, second = run_distributed(_on_two)
    assert "hidden.weight" in first
    assert second == ""


@pytest.mark.parametrize("max_rows", [0, -1, 1.5, True, None], ids=str)
def test_bad_arguments_are_refused(max_rows):
    with pytest.raises(ValueError, match="`max_rows` should be a positive integer"):
        RegularizationSummary(max_rows=max_rows)


# -- notes -----------------------------------------------------------------------------------------------------------


def test_decay_that_hardly_acts_in_this_run_is_told(capsys):
    module = Regression(lambda parameters: adamw(parameters, lr=1e-3))
    _, notes = printed(capsys, WeightDecay(0.01), RegularizationSummary(), module=module)
    assert notes == [
        "'decay': weight decay 0.01 at lr 0.001 acts over 100,000 steps; this run has 7: it will do next to nothing."
    ]


def test_the_mean_of_a_schedule_is_judged_at_the_peak_rate(capsys):
    module = Regression(
        lambda parameters: adamw(parameters, lr=0.1),
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-6, total_iters=3),
    )
    _, notes = printed(capsys, WeightDecay(schedules.Linear(0.0, 4.0)), RegularizationSummary(), module=module)
    assert notes == []
    _, notes = printed(capsys, WeightDecay(schedules.Linear(0.02, 0.04)), RegularizationSummary(), module=Regression())
    assert "weight decay 0.03 at lr 0.1 acts over 333 steps" in notes[0]


def test_adam_with_coupled_decay_is_told(capsys):
    def adam(**options):
        return Regression(lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.9, **options))

    _, notes = printed(capsys, RegularizationSummary(), module=adam())
    assert len(notes) == 1
    assert notes[0].startswith("Adam adds weight decay to the gradient")


def test_decay_by_optimizer_and_penalty_is_told(capsys):
    _, notes = printed(capsys, WeightDecay(0.9), L2Penalty(0.1), RegularizationSummary())
    assert len(notes) == 1
    assert notes[0].startswith("Weights decay twice: by the optimizer")
    assert notes[0].endswith("and by L2Penalty.")


def test_decay_to_zero_and_to_an_anchor_is_told(capsys):
    _, notes = printed(capsys, WeightDecay(0.9), AnchorDecay(0.1), RegularizationSummary())
    assert len(notes) == 1
    assert notes[0].startswith("Weights decay twice: by the optimizer")
    assert notes[0].endswith("and by AnchorDecay.")
    assert printed(capsys, WeightDecay(0.0), AnchorDecay(0.1), RegularizationSummary())[1] == []


def test_decay_that_rounds_to_nothing_is_told(capsys):
    module = Regression(lambda parameters: adamw(parameters, lr=0.01, weight_decay=0.1)).bfloat16()

    class Half(Batches):
        def __init__(self):
            super().__init__()
            self.batches = [(x.bfloat16(), y.bfloat16()) for x, y in self.batches]

    trainer = make_trainer(RegularizationSummary(), max_epochs=20)
    trainer.fit(module, Half())
    assert "lost to rounding: torch.bfloat16" in " ".join(capsys.readouterr().out.split())
