"""Is what runs log what the page of log keys says: which key, by which callback, and when?"""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn

import lightning_regularize as lr
from lightning_regularize.penalties import Orthogonal
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Linear
from tests.training.support import QUIET, Batches, Regression, adamw, make_trainer

pytestmark = QUIET

PAGE = (Path(__file__).parents[2] / "docs" / "log-keys.md").read_text()
ROWS = [
    (pattern, re.findall(r"`(\w+)`", callback)[0], when)
    for keys, callback, when in re.findall(r"^\| (`.*?`) \| (.*?) \| (.*?) \|", PAGE, flags=re.MULTILINE)
    for pattern in re.findall(r"`([^`]+)`", keys)
]


class TensorBoardLogger(Logger):
    """Keeps what it gets, by key and step; histograms are given to loggers of this name."""

    name = version = "kept"

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        for key in metrics:
            self.steps.setdefault(key, []).append(step)

    def log_hyperparams(self, params, *args, **kwargs):
        self.log_metrics(params)

    @property
    def experiment(self):
        return self

    def add_histogram_raw(self, key, *, global_step, **_):
        self.log_metrics([key], global_step)


class Validated(Regression):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop = nn.Dropout(0.5)

    def loss(self, batch):
        x, y = batch
        return (self.output(self.drop(self.norm(self.hidden(x)))) - y).square().mean()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_error", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_error", self.loss(batch), batch_size=1)


def without_decay(parameters):
    return adamw(parameters, weight_decay=0.0)


def two_groups(parameters):
    weight, *others = parameters
    return adamw([{"params": [weight], "name": "first"}, {"params": others}])


class Broken(Validated):
    """Has a weight that is NaN, and does not count in the loss."""

    def __init__(self):
        super().__init__()
        self.broken = nn.Parameter(torch.full((2,), torch.nan))


ALL = ("weight", "rms", "gradient", "gradient_mean", "gradient_std", "update", "ratio", "angle", "distance",
       "sparsity", "stable_rank", "spectral_norm", "effective_decay", "timescale")  # fmt: skip

# What logs each of the keys of a callback, as pairs of a module and callbacks.
RUNS = {
    "WeightDecay": [
        (Validated, lambda: [lr.WeightDecay(0.1)]),
        (lambda: Validated(two_groups), lambda: [lr.WeightDecay(0.1)]),
        (Validated, lambda: [lr.WeightDecay({"hidden.*": 0.1, "*": 0.2})]),
    ],
    "L1Penalty": [(Validated, lambda: [lr.L1Penalty(0.1)])],
    "L2Penalty": [(Validated, lambda: [lr.L2Penalty(0.1)])],
    "ElasticNetPenalty": [(Validated, lambda: [lr.ElasticNetPenalty(0.1, 0.1)])],
    "GroupLassoPenalty": [(Validated, lambda: [lr.GroupLassoPenalty(0.1)])],
    "WeightPenalty": [(Validated, lambda: [lr.WeightPenalty(Orthogonal(), 0.1)])],
    "ActivationPenalty": [(Validated, lambda: [lr.ActivationPenalty(0.1, include=("hidden",))])],
    "DropoutSchedule": [(Validated, lambda: [lr.DropoutSchedule(Linear(0.5, 0.0))])],
    "WeightNormMonitor": [
        (Broken, lambda: [lr.WeightNormMonitor(quantities=("weight",))]),
        (
            Validated,
            lambda: [
                lr.WeightNormMonitor(
                    quantities=ALL, detail="parameter", histograms=True, threshold=0.1, expected=True
                )
            ],
        ),
    ],
    "GeneralizationGapMonitor": [(Validated, lambda: [lr.GeneralizationGapMonitor("error")])],
    "RegularizationSummary": [(Validated, lambda: [lr.RegularizationSummary(), lr.WeightConstraint(MaxNorm(0.5))])],
    "WeightConstraint": [(Validated, lambda: [lr.WeightConstraint(MaxNorm(0.5))])],
    "AnchorDecay": [(Validated, lambda: [lr.AnchorDecay(0.1)])],
    "ConstrainedDecay": [(lambda: Validated(without_decay), lambda: [lr.ConstrainedDecay("start")])],
    "Hyperball": [(lambda: Validated(without_decay), lambda: [lr.Hyperball()])],
}  # fmt: skip


def logged(module, callbacks):
    """The steps of each key: of the module itself, and of the callbacks."""
    logger = TensorBoardLogger()
    trainer = make_trainer(*callbacks, logger=logger, max_epochs=2, log_every_n_steps=3, val_check_interval=0.5)
    trainer.fit(module, Batches(4), Batches(1))
    own = {key: logger.steps.pop(key, None) for key in ("train_loss", "train_error", "val_error", "epoch")}
    return own, logger.steps


def fits(pattern, key):
    return re.fullmatch(re.sub(r"<\w+>", ".+", re.escape(pattern).replace(r"\<", "<").replace(r"\>", ">")), key)


def when_of(steps, own):
    if steps == [None]:
        return "once, as hyper-parameters"
    return {tuple(own["train_loss"]): "logged step", tuple(own["val_error"]): "each validation"}[tuple(steps)]


def test_each_callback_is_in_the_table_or_said_to_log_nothing():
    callbacks = {name for name in lr.__all__ if name in RUNS}
    silent = re.search(r"\n((?:`\w+`[, and]*)+) log nothing", PAGE.replace("\n", " ").replace("  ", "\n"))
    assert callbacks == {callback for _, callback, _ in ROWS} | set(re.findall(r"\w+", silent[1])) - {"and"}


@pytest.mark.filterwarnings("ignore:.*of each unit.*:UserWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_callback_logs_what_the_table_says(name):
    rows = [
        (pattern, when.partition(",")[0] if "if there" in when else when) for pattern, by, when in ROWS if by == name
    ]
    seen = set()
    for module, callbacks in RUNS[name]:
        own, steps = logged(module(), callbacks())
        for key, found in steps.items():
            # The most literal pattern counts: weight_decay/<group> would fit weight_decay/pg1/* as well.
            pattern, when = max((row for row in rows if fits(row[0], key)), key=lambda row: row[0].count("/"))
            assert when_of(found, own) == when, key
            seen.add(pattern)
    assert seen == {pattern for pattern, _ in rows}


def test_several_of_one_kind_are_told_apart_as_the_page_says():
    _, steps = logged(Validated(), [lr.L1Penalty(0.1, include=("hidden.*",)), lr.L1Penalty(0.1, include=("output.*",))])
    assert steps.keys() == {"penalty/l1 1", "penalty/l1 2"}

    class TwoOptimizers(Validated):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [adamw(self.hidden.parameters()), adamw(self.output.parameters())]

    callbacks = [lr.WeightDecay(0.1), lr.L1Penalty(0.1, include=("hidden.*", "output.*")), lr.WeightNormMonitor()]
    _, steps = logged(TwoOptimizers(), callbacks)
    for i in (0, 1):
        assert {f"weight_decay/optimizer{i} pg1", f"weight_norm/optimizer{i} total", f"penalty/l1 optimizer{i}"} <= set(
            steps
        )
    for example in re.findall(r"`([^`<]*(?:optimizer0|l1 \d)[^`]*)`", PAGE):
        assert example == "optimizer0" or example in {*steps, "penalty/l1 1", "penalty/l1 2"}


class Iterating(Validated):
    """Takes its batches itself, so that Lightning does not know their size, and logs nothing."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


ITERATED = {
    "weight_decay": lambda: lr.WeightDecay(0.1),
    "penalty/l1": lambda: lr.L1Penalty(0.1),
    "penalty/activation": lambda: lr.ActivationPenalty(0.1, include=("hidden",)),
    "dropout/p": lambda: lr.DropoutSchedule(0.1),
    "weight_norm/total": lambda: lr.WeightNormMonitor(),
}


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")  # Lightning calls it experimental
@pytest.mark.parametrize("key", ITERATED)
def test_a_module_that_takes_its_batches_itself_is_logged_too(key):
    logger = TensorBoardLogger()
    trainer = make_trainer(ITERATED[key](), logger=logger, max_epochs=2, log_every_n_steps=3)
    trainer.fit(Iterating(), Batches(4))
    assert logger.steps[key] == [2, 5]
    assert key in trainer.callback_metrics
