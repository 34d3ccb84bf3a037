"""Does the table show what the optimizers hold, and the notes likely misconfigurations?"""

import pytest
import torch
from torch import nn

from lightning_regularize import (
    AnchorDecay,
    L2Penalty,
    RegularizationSummary,
    RegularizedModule,
    WeightDecay,
    group_settings,
    regularize,
    schedules,
    summary,
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


def test_what_all_parameters_of_a_part_share_is_looked_up_once(monkeypatch):
    """Once for each parameter it would take minutes for a large model, since it looks at all of the group."""

    def lookups(layers):
        module, calls = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)]), []
        look = group_settings.settings
        with monkeypatch.context() as patch:
            patch.setattr(group_settings, "settings", lambda *of: calls.append(of) or look(*of))
            summary(module, WeightDecay(0.1), optimizer=adamw(module.parameters()))
        return len(calls)

    assert 0 < lookups(3) == lookups(30)


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_frozen_weights_of_other_types_round_nothing(dtype, capsys):
    module = Regression(lambda parameters: adamw(parameters, lr=1e-7, weight_decay=1e-3))
    module.packed = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    make_trainer(RegularizationSummary(), max_epochs=20).fit(module, Batches())
    printed = " ".join(capsys.readouterr().out.split())
    assert "hidden.weight" in printed
    assert "lost to rounding" not in printed


# -- without a Trainer -----------------------------------------------------------------------------------------------


def table_of(*args, **options):
    """The lines of a table as lists of words."""
    lines = str(summary(*args, **options)).splitlines()
    return [line.split() for line in lines if line.split() and not set(line.strip()) <= {"─"}]


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_a_summary_without_a_trainer_is_what_a_trainer_prints(capsys, method):
    module = Regression(lambda parameters: adamw(parameters, lr=1e-3))
    options = {"factors": {"output.*": 0.5}, "method": method}
    schedule = schedules.Cosine(0.01, 0.04)
    make_trainer(WeightDecay(schedule, **options), RegularizationSummary(), max_epochs=1).fit(module, Batches())
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    optimizer = module.configure_optimizers()
    made = summary(module, WeightDecay(schedule, **options), optimizer=optimizer, total_steps=7)
    assert str(made).splitlines()[1:] == [line for line in printed if line.strip() != "Regularization"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]
    optimizer.step()
    assert "step" not in vars(optimizer)  # nothing is left at the optimizer


def test_without_an_optimizer_rates_are_not_known_and_nothing_is_noted_about_them():
    decay = WeightDecay({"output.*": schedules.FollowLR(0.1), "*": 1e-9})
    assert table_of(Regression(), decay, total_steps=2) == [
        ["Regularization"],
        ["Group,", "parameters", "Shape", "Numbers", "Decay,", "why"],
        ["decay,", "output.*", "1", "tensor", "8", "0.1"],
        ["output.weight", "2x4", "8", "output.*"],
        ["decay,", "*", "1", "tensor", "12", "1e-09"],
        ["hidden.weight", "4x3", "12", "*"],
        ["no_decay", "4", "tensors", "14", "0"],
        ["hidden.bias", "4", "4", "bias"],
        ["norm.weight", "4", "4", "norm"],
        ["norm.bias", "4", "4", "bias"],
        ["output.bias", "2", "2", "bias"],
    ]


def test_a_schedule_without_a_number_of_steps_says_over_how_many_it_is_shown():
    decay = WeightDecay(schedules.Warmup(schedules.Cosine(0.1, 0.4), steps=500))
    assert "Schedules are shown over 10,000 steps" in " ".join(str(summary(Regression(), decay)).split())
    assert "Schedules are shown" not in str(summary(Regression(), decay, total_steps=100))
    assert ["decay", "2", "tensors", "20", "0", "to", "0.0198"] in table_of(Regression(), decay, total_steps=100)


def test_a_summary_of_an_optimizer_alone_and_of_a_callback_in_use():
    module = Regression(lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.9))
    optimizer = module.configure_optimizers()
    text = " ".join(str(summary(module, optimizer=optimizer)).split())
    assert "pg1 6 tensors 34 0.9" in text
    assert "Note Adam adds weight decay to the gradient" in text
    decay = WeightDecay(0.3)
    with decay.attach(torch.optim.SGD(module.parameters(), lr=0.1), module):
        assert ["decay", "2", "tensors", "20", "0.3"] in table_of(module, decay)
    text = " ".join(str(summary(module, decay, AnchorDecay(0.1), L2Penalty(0.1), optimizer=optimizer)).split())
    assert "by AnchorDecay and L2Penalty." in text


def test_a_notebook_shows_a_table():
    html = summary(Regression(), WeightDecay(0.05), max_rows=2)._repr_html_()
    assert html.count("<tr>") == 1 + 2 + 2  # the header, a heading for each group, and two rows
    assert ">&nbsp;&nbsp;hidden.weight</td>" in html
    assert '<th style="text-align: left">decay</th><th style="text-align: right">2 tensors</th>' in html
    assert "more parameters are not shown" in html
    module = Regression()
    note = summary(module, WeightDecay(1e-9), optimizer=module.configure_optimizers(), total_steps=2)
    assert "<p><b>Note</b> &#x27;decay&#x27;: weight decay 1e-09" in note._repr_html_()


@pytest.mark.parametrize(
    ("callbacks", "options", "error", "message"),
    [
        ([], {}, ValueError, "give a WeightDecay, or the `optimizer` whose weight decay is to be shown"),
        ([WeightDecay(None)], {}, ValueError, r"WeightDecay\(None\) keeps .*: give `optimizer`"),
        ([WeightDecay(schedules.Timescale(steps=9))], {}, ValueError, r"Timescale\(.* needs the learning rate: give"),
        ([WeightDecay(0.1), WeightDecay(0.2)], {}, ValueError, "2 WeightDecay would write over each other"),
        ([0.1], {}, TypeError, "`callbacks` should be callbacks of this package, got float"),
        ([WeightDecay(0.1)], {"max_rows": 0}, ValueError, "`max_rows` should be a positive integer, got 0"),
        ([WeightDecay(0.1)], {"total_steps": -1}, ValueError, "`total_steps`"),
        ([WeightDecay(0.1)], {"optimizer": "adam"}, TypeError, "`optimizer` should be a torch.optim.Optimizer"),
        ([], {"optimizer": "adam"}, TypeError, "`optimizer` should be a torch.optim.Optimizer"),
        ([WeightDecay(0.1, exclude=("nothing.*",))], {}, ValueError, "nothing"),
    ],
    ids=["nothing", "none", "timescale", "two", "number", "rows", "steps", "text", "text alone", "rule"],
)
def test_what_a_summary_cannot_be_made_of_is_refused(callbacks, options, error, message):
    with pytest.raises(error, match=message):
        summary(Regression(), *callbacks, **options)


def test_a_summary_is_of_a_module():
    with pytest.raises(TypeError, match=r"summary: `module` should be a torch.nn.Module, got list"):
        summary(list(Regression().parameters()), WeightDecay(0.1))
