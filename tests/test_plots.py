import io
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import nn

from lightning_regularize.plots import plot_histograms, plot_norms, plot_schedule
from lightning_regularize.schedules import Cosine, FollowLR, Linear, simulate

STEPS = [0, 10, 20]


def log_of(count, quantity="weight_norm"):
    """A log of so many layers: layer i is at i + 1, i + 2, i + 3."""
    return {f"{quantity}/layers.{i}.weight": (STEPS, [i + 1.0, i + 2.0, i + 3.0]) for i in range(count)}


def points(line):
    return list(line.get_xdata()), list(line.get_ydata())


def legend_labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def mesh_of(ax):
    (mesh,) = [artist for artist in ax.collections if isinstance(artist, QuadMesh)]
    return mesh


def cells_of(ax):
    """The colors of a heat map as numbers, a row a layer; matplotlib before 3.8 keeps them flat."""
    return mesh_of(ax).get_array().reshape(-1, mesh_of(ax).get_coordinates().shape[1] - 1)


def render(fig):
    """Draw for real: what is wrong with a figure shows here, as a warning that pytest turns into an error."""
    fig.savefig(io.BytesIO())


# Norms


def test_norms_are_drawn_as_they_were_logged():
    log = {"weight_norm/total": (STEPS, [3.0, 2.0, 1.5]), "weight_norm/head": ([10, 20], [1.0, 0.5])}
    fig, ax = plot_norms(log)
    assert [points(line) for line in ax.lines] == [(STEPS, [3.0, 2.0, 1.5]), ([10, 20], [1.0, 0.5])]
    assert legend_labels(ax) == ["total", "head"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "weight norm")
    render(fig)


def test_lines_are_told_apart_without_color():
    _, ax = plot_norms(log_of(6))
    assert len({line.get_marker() for line in ax.lines}) == 6
    assert len({line.get_color() for line in ax.lines}) == 6


def test_what_theory_expects_is_dashed_in_the_color_of_what_was_measured():
    log = log_of(2) | {"weight_norm/layers.1.weight/expected": (STEPS, [2.5, 2.5, 2.5])}
    fig, ax = plot_norms(log)
    _, measured, expected, _ = ax.lines
    assert points(expected) == (STEPS, [2.5, 2.5, 2.5])
    assert expected.get_color() == measured.get_color()
    assert expected.is_dashed()
    assert not measured.is_dashed()
    assert legend_labels(ax) == ["layers.0.weight", "layers.1.weight", "expected"]
    render(fig)


def test_what_theory_expects_can_be_left_out():
    log = log_of(2) | {"weight_norm/layers.1.weight/expected": (STEPS, [2.5, 2.5, 2.5])}
    _, ax = plot_norms(log, expected=False)
    assert [line.get_label() for line in ax.lines] == ["layers.0.weight", "layers.1.weight"]


def test_small_values_beside_large_ones_get_a_logarithmic_axis():
    scales = [plot_norms({"x/a": (STEPS, [1.0, 1.0, top])}, quantity="x")[1].get_yscale() for top in (20.0, 50.0)]
    assert scales == ["linear", "log"]


def test_zeros_keep_the_axis_linear():
    assert plot_norms({"x/a": (STEPS, [0.0, 1.0, 50.0])}, quantity="x")[1].get_yscale() == "linear"


@pytest.mark.parametrize("kind", ["lines", "grid", "heatmap"])
@pytest.mark.parametrize("quantity", ["generalization_gap", "sparsity"])
def test_differences_and_shares_have_linear_scales(quantity, kind):
    _, ax = plot_norms({f"{quantity}/a": (STEPS, [0.001, 0.1, 0.3])}, quantity=quantity, kind=kind)
    if kind == "heatmap":
        assert type(ax.collections[0].norm).__name__ == "Normalize"
    else:
        assert (ax[0] if kind == "grid" else ax).get_yscale() == "linear"


@pytest.mark.parametrize(
    ("quantity", "label"),
    [
        ("gradient_norm", "gradient norm"),
        ("angle", "angle (radians per step)"),
        ("ratio", "update norm / weight norm"),
        ("timescale", "timescale (steps)"),
        ("timescale_epochs", "timescale (epochs)"),
        ("sparsity", "sparsity (share of zeros)"),
        ("effective_decay", "effective decay (share removed per step)"),
    ],
)
def test_axis_is_named_with_its_unit(quantity, label):
    log = log_of(2, quantity) | log_of(3, "other")
    assert plot_norms(log, quantity=quantity)[1].get_ylabel() == label
    assert len(plot_norms(log, quantity=quantity)[1].lines) == 2


@pytest.mark.parametrize("values", [[math.nan] * 3, [1.0, math.nan, 2.0], [1.0, math.inf, 1e3]], ids=str)
@pytest.mark.parametrize("kind", ["lines", "grid", "heatmap"])
def test_what_is_not_finite_leaves_a_gap(kind, values):
    render(plot_norms({"x/a": (STEPS, values), "x/b": ([0], [1.0])}, quantity="x", kind=kind)[0])


def test_names_of_any_form_reach_the_legend():
    _, ax = plot_norms({"x/_orig_mod.weight": ([0], [1.0]), "x/cost $\\alpha$ in $": ([0], [2.0])}, quantity="x")
    assert legend_labels(ax) == ["_orig_mod.weight", "cost $\\alpha$ in $"]
    render(ax.figure)


def test_more_keys_than_lines_can_show_get_a_panel_each():
    log = log_of(7) | {"weight_norm/layers.6.weight/expected": (STEPS, [8.0, 8.0, 8.0])}
    fig, axes = plot_norms(log)
    assert [ax.get_title() for ax in axes] == [f"layers.{i}.weight" for i in range(7)]
    assert [points(ax.lines[0]) for ax in axes] == [log[f"weight_norm/layers.{i}.weight"] for i in range(7)]
    assert points(axes[6].lines[1]) == (STEPS, [8.0, 8.0, 8.0])
    assert [text.get_text() for text in fig.texts] == ["optimizer step", "weight norm"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["measured", "expected"]
    assert fig.axes == axes
    render(fig)


def test_lowest_panel_of_every_column_shows_the_steps():
    fig, axes = plot_norms(log_of(6), kind="grid")  # four columns: below the third and fourth panel there is none
    labeled = [ax.xaxis.get_major_ticks()[0].label1.get_visible() for ax in axes]
    assert labeled == [False, False, True, True, True, True]
    render(fig)


def test_titles_keep_the_whole_name():
    name = "model.encoder.layers.11.self_attn.in_proj_weight"
    _, (ax,) = plot_norms({f"weight_norm/{name}": ([0], [1.0])}, kind="grid")
    assert ax.get_title().replace("\n", "") == name
    assert max(map(len, ax.get_title().split("\n"))) < 32


def test_still_more_keys_become_a_heat_map():
    log = log_of(21)
    fig, ax = plot_norms(log)
    mesh = mesh_of(ax)
    assert cells_of(ax).tolist() == [values for _, values in log.values()]
    assert isinstance(mesh.norm, LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1.0, 23.0)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"layers.{i}.weight" for i in range(21)]
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "optimizer step"
    assert mesh.colorbar.ax.get_ylabel() == "weight norm"
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5.0, 5.0, 15.0, 25.0]
    render(fig)


def test_heat_map_of_hundreds_of_layers_labels_some():
    fig, ax = plot_norms(log_of(200))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"layers.{i}.weight" for i in range(0, 200, 4)]
    assert ax.get_yticks().tolist() == [i + 0.5 for i in range(0, 200, 4)]
    render(fig)


def test_heat_map_masks_what_was_not_logged():
    log = {"x/a": ([0, 20], [1.0, 2.0]), "x/b": ([10, 20], [math.nan, 4.0])}
    _, ax = plot_norms(log, quantity="x", kind="heatmap")
    assert cells_of(ax).mask.tolist() == [[False, True, False], [True, True, False]]
    assert ax.patch.get_hatch()


def test_heat_map_of_zeros_is_linear():
    fig, ax = plot_norms({"sparsity/a": (STEPS, [0.0, 0.5, 0.9])}, quantity="sparsity", kind="heatmap")
    assert type(mesh_of(ax).norm).__name__ == "Normalize"
    render(fig)


@pytest.mark.parametrize("values", [[2.0, 2.0], [1.1, 1.9], [1.0, 200.0], [1e-6, 1e4], [0.0, 0.0]], ids=str)
def test_color_bar_has_labels_on_any_range(values):
    fig, ax = plot_norms({"x/a": ([0, 1], values)}, quantity="x", kind="heatmap")
    render(fig)
    bar = mesh_of(ax).colorbar
    shown = [tick for tick in bar.get_ticks() if values[0] * 0.99 <= tick <= values[1] * 1.01]
    assert shown
    assert all("10^" not in label.get_text() for label in bar.ax.get_yticklabels())


def test_heat_map_leaves_out_totals_unless_they_are_asked_for():
    log = log_of(2) | {"weight_norm/total": (STEPS, [9.0] * 3), "weight_norm/optimizer0 total": (STEPS, [9.0] * 3)}
    assert len(cells_of(plot_norms(log, kind="heatmap")[1])) == 2
    assert len(cells_of(plot_norms(log, kind="heatmap", keys=["*"])[1])) == 4
    only_totals = {key: series for key, series in log.items() if key.endswith("total")}
    assert len(cells_of(plot_norms(only_totals, kind="heatmap")[1])) == 2


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["layers.2.weight", "layers.0.weight"], ["layers.2.weight", "layers.0.weight"]),
        (["weight_norm/layers.1.weight"], ["layers.1.weight"]),
        (["*.1.*", "layers.*"], ["layers.1.weight", "layers.0.weight", "layers.2.weight"]),
        (["layers.[02].weight"], ["layers.0.weight", "layers.2.weight"]),
    ],
    ids=str,
)
def test_keys_select_by_name_or_glob_in_their_order(keys, names):
    _, ax = plot_norms(log_of(3), keys=keys)
    assert [line.get_label() for line in ax.lines] == names


# Sources


@pytest.fixture
def logger(tmp_path):
    """What Lightning writes: rows of different metrics, columns in alphabetical order, blanks between."""
    logger = CSVLogger(tmp_path, name="run", version=0)
    for step in STEPS:
        logger.log_metrics({"train_loss": 1.0 / (step + 1)}, step=step)
        norms = {f"weight_norm/layers.{i}.weight": torch.tensor(float(i + step)) for i in (2, 10, 1)}
        logger.log_metrics({**norms, "weight_norm/layers.2.weight/expected": 5.0}, step=step)
    logger.log_metrics({"val_loss": 0.1}, step=STEPS[-1])
    logger.save()
    return logger


@pytest.mark.parametrize(
    "source_of",
    [lambda logger: logger, lambda logger: logger.log_dir, lambda logger: f"{logger.log_dir}/metrics.csv"],
    ids=["logger", "directory", "file"],
)
def test_csv_logs_are_read(logger, source_of):
    _, ax = plot_norms(source_of(logger))
    assert {line.get_label(): points(line) for line in ax.lines if len(line.get_xdata())} == {
        "layers.1.weight": (STEPS, [1.0, 11.0, 21.0]),
        "layers.2.weight": (STEPS, [2.0, 12.0, 22.0]),
        "layers.2.weight/expected": (STEPS, [5.0, 5.0, 5.0]),
        "layers.10.weight": (STEPS, [10.0, 20.0, 30.0]),
    }


def test_layers_of_a_csv_log_are_in_natural_order(logger):
    _, ax = plot_norms(logger, expected=False)
    assert legend_labels(ax) == ["layers.1.weight", "layers.2.weight", "layers.10.weight"]


def test_nan_in_a_csv_log_stays_nan(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,weight_norm/total\n0,1.5\n1,nan\n2,\n3,inf\n")
    _, ax = plot_norms(tmp_path)
    steps, values = points(ax.lines[0])
    assert steps == [0, 1, 3]
    assert values[0] == 1.5
    assert math.isnan(values[1])
    assert math.isinf(values[2])


def test_mapping_may_hold_tensors():
    _, ax = plot_norms({"weight_norm/total": (torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))})
    assert points(ax.lines[0]) == ([0, 1, 2], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"quantity": "weigth_norm"},
            r"^`quantity` should be one that was logged, got 'weigth_norm'\. Did you mean 'wei",
        ),
        ({"quantity": "loss"}, r"^`quantity` should be one that was logged, got 'loss'\. There are: weight_norm\.$"),
        (
            {"keys": ["layers.1.wieght"]},
            r"^`keys` should name what was logged, got 'layers.1.wieght'\. Did you mean 'la",
        ),
        ({"keys": ["head.*"]}, r"^`keys` should name what was logged, got 'head\.\*'\. There are: layers\.0"),
        ({"keys": []}, r"^`keys` should be a sequence of at least one name, got \[\]\.$"),
        ({"keys": "total"}, r"^`keys` should be a sequence of at least one name, got 'total'\.$"),
        ({"kind": "bars"}, r"^`kind` should be 'auto', 'lines', 'grid' or 'heatmap', got 'bars'\.$"),
    ],
    ids=["near-quantity", "far-quantity", "near-key", "far-key", "no-key", "string", "kind"],
)
def test_what_was_not_logged_is_an_error_that_names_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_norms(log_of(3), **arguments)


@pytest.mark.parametrize(
    "log", [{}, {"weight_norm/total": ([], [])}, {"weight_norm/total": ([1, 2], [1.0])}], ids=["none", "empty", "short"]
)
def test_log_without_values_is_an_error(log):
    with pytest.raises(ValueError, match=r"There are: none\.$|got 0 steps and 0 values\.$|got 2 steps and 1 values\.$"):
        plot_norms(log)


@pytest.mark.parametrize("text", ["", "step,weight_norm/total\n", "epoch,weight_norm/total\n0,1.0\n"], ids=repr)
def test_csv_without_steps_is_an_error(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv' should have a column 'step' and rows, got \["):
        plot_norms(tmp_path)


def test_csv_that_is_not_there_is_an_error_that_says_who_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^`source` should lead to a metrics\.csv, got .*CSVLogger writes it"):
        plot_norms(tmp_path)


@pytest.mark.parametrize("source", [SimpleNamespace(log_dir=None), 3, None], ids=["other-logger", "number", "none"])
def test_source_of_another_kind_is_an_error(source):
    with pytest.raises(TypeError, match=r"^`source` should be a path, a logger with a `log_dir`"):
        plot_norms(source)


# Schedules


def test_schedule_is_drawn_step_by_step():
    fig, ax = plot_schedule(Linear(1.0, 0.0), total_steps=5)
    assert points(ax.lines[0]) == ([0, 1, 2, 3, 4], [1.0, 0.75, 0.5, 0.25, 0.0])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "weight decay")
    render(fig)


@pytest.mark.parametrize(
    "rate", [{"lr_schedule": [1.0, 0.5, 0.25]}, {"lr_schedule": lambda step: 2.0**-step}], ids=["sequence", "callable"]
)
def test_learning_rate_adds_itself_and_the_product(rate):
    fig, axes = plot_schedule(Linear(0.0, 0.4), 3, **rate)
    assert [list(ax.lines[0].get_ydata()) for ax in axes] == [
        [0.0, 0.2, 0.4],
        [1.0, 0.5, 0.25],
        pytest.approx([0.0, 0.1, 0.1], rel=1e-6, abs=0),
    ]
    assert [ax.get_ylabel() for ax in axes] == ["weight decay", "learning rate", "lr * weight decay"]
    assert [ax.get_xlabel() for ax in axes] == ["", "", "optimizer step"]
    render(fig)


def test_constant_learning_rate_scales_the_product():
    _, axes = plot_schedule(0.1, 2, lr=0.01)
    assert list(axes[1].lines[0].get_ydata()) == [0.01, 0.01]
    assert list(axes[2].lines[0].get_ydata()) == pytest.approx([1e-3, 1e-3], rel=1e-6, abs=0)


def test_schedule_sees_the_learning_rate_it_follows():
    _, axes = plot_schedule(FollowLR(0.5), 3, lr_schedule=[0.0, 4e-3, 2e-3])
    assert list(axes[0].lines[0].get_ydata()) == [0.0, 0.5, 0.25]


@pytest.mark.parametrize("schedule", [0.0, 0.1, lambda at: 0.1 / (at.step + 1)], ids=["zero", "number", "callable"])
@pytest.mark.parametrize("total_steps", [1, 3, 2000])
def test_any_schedule_of_any_length_is_drawn(schedule, total_steps):
    fig, ax = plot_schedule(schedule, total_steps)
    assert len(ax.lines[0].get_ydata()) == total_steps
    assert ax.get_ylim()[0] == 0.0
    render(fig)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 3, "lr": 0.1, "lr_schedule": [0.1] * 3}, r"^One of `lr` and `lr_schedule` should be given"),
        ({"total_steps": 0}, "`total_steps`"),
        ({"total_steps": 3, "lr_schedule": [0.1, 0.1]}, "3 steps, got 2"),
        ({"total_steps": 3, "lr_schedule": []}, "3 steps, got 0"),
        ({"total_steps": 3, "lr": -1.0}, "`lr`"),
    ],
    ids=["two-rates", "no-step", "short", "empty", "negative"],
)
def test_schedule_that_cannot_be_drawn_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_schedule(0.1, **arguments)


# Histograms


def counts_and_edges(patch):
    data = patch.get_data()
    return data.values.tolist(), data.edges.tolist()


def test_histogram_counts_the_weights_of_each_bin():
    fig, ax = plot_histograms({"weights": torch.tensor([0.0, 0.1, 0.3, 0.9, 1.0])}, bins=4)
    assert counts_and_edges(ax.patches[0]) == ([2, 1, 0, 2], [0.0, 0.25, 0.5, 0.75, 1.0])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("value of a weight", "weights per bin")
    assert ax.get_yscale() == "log"
    render(fig)


def test_module_gets_a_panel_for_each_parameter():
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    fig, axes = plot_histograms(module)
    assert [ax.get_title() for ax in axes] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [sum(counts_and_edges(ax.patches[0])[0]) for ax in axes] == [15, 5, 5, 5]
    assert [text.get_text() for text in fig.texts] == ["value of a weight", "weights per bin"]
    render(fig)


def test_mapping_is_laid_over_each_other_on_common_bins():
    fig, ax = plot_histograms({"before": nn.Linear(2, 2).parameters(), "after": torch.tensor([-9.0, 9.0])}, bins=3)
    (before, edges), (after, other_edges) = map(counts_and_edges, ax.patches)
    assert (before, after) == ([0, 6, 0], [1, 0, 1])
    assert edges == other_edges == [-9.0, -3.0, 3.0, 9.0]
    assert legend_labels(ax) == ["before", "after"]
    assert len({patch.get_linestyle() for patch in ax.patches}) == 2
    render(fig)


def test_mapping_of_many_labels_gets_a_panel_each():
    fig, axes = plot_histograms({f"label {i}": torch.arange(i + 2.0) for i in range(7)})
    assert [ax.get_title() for ax in axes] == [f"label {i}" for i in range(7)]
    render(fig)


def test_only_finite_values_are_drawn_and_the_others_counted():
    weights = {"a": torch.tensor([math.nan, 1.0, math.inf, 2.0]), "b": torch.full((1500,), math.nan)}
    fig, ax = plot_histograms(weights, bins=2)
    assert [counts_and_edges(patch)[0] for patch in ax.patches] == [[1, 1], [0, 0]]
    assert legend_labels(ax) == ["a (2 not finite)", "b (1,500 not finite)"]
    render(fig)


def test_title_of_a_panel_says_how_many_were_not_finite():
    module = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, math.nan)
    fig, (ax,) = plot_histograms(module)
    assert ax.get_title() == "weight (2 not finite)"
    render(fig)


def test_equal_values_lie_in_the_middle():
    _, ax = plot_histograms({"ones": torch.ones(7)}, bins=3)
    assert counts_and_edges(ax.patches[0]) == (
        [0, 7, 0],
        pytest.approx([0.5, 0.5 + 1 / 3, 0.5 + 2 / 3, 1.5], rel=1e-6, abs=0),
    )


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 65504.0], dtype=torch.float16),
        torch.tensor([-3e38, 3e38]),
        torch.tensor([1, 2]),
        nn.Parameter(torch.eye(2).T),
    ],
    ids=["bfloat16", "float16", "wide", "integer", "matrix-with-gradient"],
)
def test_weights_of_any_type_are_drawn(weights):
    fig, ax = plot_histograms({"weights": weights}, bins=8, log=False)
    assert sum(counts_and_edges(ax.patches[0])[0]) == weights.numel()
    assert ax.get_yscale() == "linear"
    render(fig)


def test_drawing_changes_no_weight():
    module = nn.Linear(4, 4)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    plot_histograms(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.weight.grad is None


@pytest.mark.parametrize(
    ("weights", "arguments", "message"),
    [
        ({}, {}, r"^`weights` should have at least one value, got none\.$"),
        ({"a": torch.empty(0), "b": []}, {}, r"^`weights` should have at least one value, got none\.$"),
        (nn.ReLU(), {}, r"^`weights` should have at least one value, got none\.$"),
        ({"a": torch.ones(2)}, {"bins": 0}, r"^`bins` should be a positive integer, got 0\.$"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, {}, r"^`weights\['a'\]` should be real, in memory and whole"),
        (nn.Linear(2, 2, device="meta"), {}, r"^`weights\['weight'\]` should be real, in memory and whole"),
    ],
    ids=["no-label", "no-value", "no-parameter", "bins", "complex", "meta"],
)
def test_weights_that_cannot_be_drawn_are_errors(weights, arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_histograms(weights, **arguments)


# Axes


DRAWINGS = {
    "lines": lambda ax: plot_norms(log_of(2), ax=ax),
    "many-lines": lambda ax: plot_norms(log_of(7), ax=ax),
    "heatmap": lambda ax: plot_norms(log_of(2), kind="heatmap", ax=ax),
    "schedule": lambda ax: plot_schedule(Cosine(0.0, 0.1), 10, ax=ax),
    "histogram": lambda ax: plot_histograms({"a": torch.arange(9.0)}, ax=ax),
}
PANELS = {
    "grid": lambda ax: plot_norms(
        log_of(3) | {"weight_norm/layers.0.weight/expected": ([0], [1.0])}, kind="grid", ax=ax
    ),
    "schedule": lambda ax: plot_schedule(0.1, 10, lr=0.1, ax=ax),
    "histograms": lambda ax: plot_histograms(nn.Sequential(nn.Linear(2, 2), nn.PReLU()), ax=ax),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_axes_that_are_given_are_drawn_into(draw):
    fig = Figure()
    given, other = fig.subplots(1, 2)
    assert draw(given) == (fig, given)
    assert given.get_xlabel()
    assert not other.has_data()
    render(fig)


@pytest.mark.parametrize("draw", PANELS.values(), ids=PANELS)
@pytest.mark.parametrize("form", [lambda axes: axes, list], ids=["array", "list"])
def test_panels_that_are_given_are_drawn_into(draw, form):
    fig = Figure()
    given = form(fig.subplots(3, 1))
    assert draw(given) == (fig, list(given))
    assert all(ax.has_data() and ax.get_ylabel() for ax in given)
    render(fig)


def test_figure_of_axes_in_a_subfigure_is_the_whole_figure():
    fig = Figure()
    ax = fig.subfigures(1, 2)[1].subplots()
    assert plot_norms(log_of(2), ax=ax) == (fig, ax)


@pytest.mark.parametrize("draw", [*DRAWINGS.values(), *PANELS.values()], ids=[*DRAWINGS, *(f"{n}-3" for n in PANELS)])
def test_wrong_number_of_axes_is_an_error(draw):
    with pytest.raises(ValueError, match=r"^`ax` should be [13] axes, one a panel, got 2\.$"):
        draw(Figure().subplots(1, 2))


@pytest.mark.parametrize("draw", [*DRAWINGS.values(), *PANELS.values()], ids=[*DRAWINGS, *(f"{n}-3" for n in PANELS)])
def test_new_figure_is_not_left_with_pyplot(draw):
    fig, axes = draw(None)
    assert isinstance(fig, Figure)
    assert isinstance(axes, Axes) or all(isinstance(ax, Axes) for ax in axes)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("draw", [*DRAWINGS.values(), *PANELS.values()], ids=[*DRAWINGS, *(f"{n}-3" for n in PANELS)])
def test_without_matplotlib_the_error_names_the_extra(draw, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "lightning-regularize\[plot\]"'):
        draw(None)


@pytest.mark.parametrize("bins", [0, 2.0, True, "7"], ids=repr)
def test_bins_are_a_positive_integer(bins):
    with pytest.raises(ValueError, match="`bins` should be a positive integer, got "):
        plot_histograms(nn.Linear(2, 2), bins=bins)


@pytest.mark.parametrize("weights", [torch.ones(3), [torch.ones(3)], 3], ids=repr)
def test_histograms_are_of_a_module_or_a_mapping(weights):
    with pytest.raises(TypeError, match="`weights` should be a module, or map labels to tensors, got "):
        plot_histograms(weights)


def test_a_learning_rate_may_be_a_schedule():
    _, given = plot_schedule(FollowLR(0.1), 10, lr_schedule=Cosine(1e-3, 0.0))
    _, listed = plot_schedule(FollowLR(0.1), 10, lr_schedule=simulate(Cosine(1e-3, 0.0), 10))
    assert [points(ax.lines[0]) for ax in given] == [points(ax.lines[0]) for ax in listed]
