"""Is the gap of one epoch, of both data, and there when it is looked for?"""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_regularize.callbacks.generalization_gap import GeneralizationGapMonitor
from tests.reading import read_csv
from tests.training.support import QUIET, Batches, Regression, make_trainer

pytestmark = QUIET


class Scored(Regression):
    """Metrics that tell epochs apart: 10 * epoch on training data, epoch on validation data."""

    def training_step(self, batch, batch_idx):
        self.log("train_acc", 10.0 * self.current_epoch, on_step=False, on_epoch=True, batch_size=1)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", float(self.current_epoch), batch_size=1)


class ScoredLate(Scored):
    """Computes its training metric at the end of an epoch."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def on_train_epoch_end(self):
        self.log("train_acc", 10.0 * self.current_epoch)


def fit(module, tmp_path, *callbacks, **options):
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(*callbacks, **{"max_epochs": 3, "logger": logger, "num_sanity_val_steps": 2, **options})
    trainer.fit(module, Batches(), Batches(2))
    return trainer, read_csv(logger)


@pytest.mark.parametrize("module", [Scored, ScoredLate], ids=lambda module: module.__name__)
def test_the_gap_is_of_both_metrics_of_one_epoch(module, tmp_path):
    trainer, logged = fit(module(), tmp_path, GeneralizationGapMonitor("acc"))
    assert list(logged["generalization_gap/acc"].values()) == [0, 9, 18]
    assert trainer.callback_metrics["generalization_gap/acc"] == 18


def test_the_gap_stands_on_the_row_of_the_training_metric(tmp_path):
    _, logged = fit(Scored(), tmp_path, GeneralizationGapMonitor("acc"))
    assert list(logged["generalization_gap/acc"]) == list(logged["train_acc"])


def test_epochs_without_validation_have_no_gap(tmp_path):
    _, logged = fit(Scored(), tmp_path, GeneralizationGapMonitor("acc"), max_epochs=4, check_val_every_n_epoch=2)
    assert list(logged["generalization_gap/acc"].values()) == [9, 27]


def test_several_validations_in_an_epoch_have_one_gap(tmp_path):
    _, logged = fit(Scored(), tmp_path, GeneralizationGapMonitor("acc"), val_check_interval=2)
    assert list(logged["generalization_gap/acc"].values()) == [0, 9, 18]


class Seldom(Regression):
    """Logs its training metric in some epochs only, in one of two hooks."""

    def __init__(self, epochs, *, late):
        super().__init__()
        self.epochs, self.late = epochs, late

    def training_step(self, batch, batch_idx):
        if self.current_epoch in self.epochs and not self.late:
            self.log("train_acc", 5.0 + self.current_epoch, on_step=False, on_epoch=True, batch_size=1)
        return self.loss(batch)

    def on_train_epoch_end(self):
        if self.current_epoch in self.epochs and self.late:
            self.log("train_acc", 5.0 + self.current_epoch)

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 2.0 * self.current_epoch, batch_size=1)


@pytest.mark.parametrize("late", [False, True], ids=["in steps", "at the end"])
def test_a_training_metric_of_another_epoch_is_not_compared(late, tmp_path):
    with pytest.warns(UserWarning, match="no gap for epochs in which 'train_acc' is not logged") as caught:
        _, logged = fit(Seldom({0, 2}, late=late), tmp_path, GeneralizationGapMonitor("acc"), max_epochs=4)
    assert len([w for w in caught if "no gap" in str(w.message)]) == 1
    assert list(logged["generalization_gap/acc"].values()) == [5.0, 3.0]


def test_other_callbacks_find_the_gap_of_their_epoch(tmp_path):
    stopping = EarlyStopping("generalization_gap/acc", mode="min", patience=1, check_on_train_epoch_end=True)
    checkpoint = ModelCheckpoint(tmp_path, monitor="generalization_gap/acc", save_on_train_epoch_end=True)
    trainer, _ = fit(
        Scored(),
        tmp_path / "logs",
        GeneralizationGapMonitor("acc"),
        stopping,
        checkpoint,
        max_epochs=5,
        enable_checkpointing=True,
    )
    assert trainer.current_epoch == 2
    assert checkpoint.best_model_score == 0


def test_a_metric_that_is_logged_by_step_and_epoch_is_the_epochs(tmp_path):
    class Both(Scored):
        def training_step(self, batch, batch_idx):
            self.log("train_acc", float(batch_idx), on_step=True, on_epoch=True, batch_size=1)
            return self.loss(batch)

    _, logged = fit(Both(), tmp_path, GeneralizationGapMonitor("acc"))
    assert list(logged["generalization_gap/acc"].values()) == [3, 2, 1]


def test_a_metric_of_single_steps_raises(tmp_path):
    class Stepwise(Scored):
        def training_step(self, batch, batch_idx):
            self.log("train_acc", 1.0, batch_size=1)
            return self.loss(batch)

    with pytest.raises(MisconfigurationException, match="logged for single steps only"):
        fit(Stepwise(), tmp_path, GeneralizationGapMonitor("acc"))


def test_prefixes_are_what_one_likes(tmp_path):
    class Slashed(Regression):
        def training_step(self, batch, batch_idx):
            self.log("fit/loss", 1.0, on_step=False, on_epoch=True, batch_size=1)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("held_out/loss", 3.0, batch_size=1)

    monitor = GeneralizationGapMonitor("loss", train_prefix="fit/", val_prefix="held_out/")
    _, logged = fit(Slashed(), tmp_path, monitor)
    assert list(logged["generalization_gap/loss"].values()) == [-2, -2, -2]


def test_a_second_fit_begins_anew(tmp_path):
    monitor = GeneralizationGapMonitor("acc")
    fit(Scored(), tmp_path / "first", monitor)
    _, logged = fit(Scored(), tmp_path / "second", monitor)
    assert list(logged["generalization_gap/acc"].values()) == [0, 9, 18]


def test_validate_alone_logs_nothing():
    monitor = GeneralizationGapMonitor("acc")
    trainer = make_trainer(monitor)
    trainer.validate(Scored(), Batches(2))
    assert "generalization_gap/acc" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("metric", "message"),
    [("f1", "no metric 'train_f1' and no 'val_f1'"), ("ac", "Did you mean 'train_acc'")],
)
def test_a_metric_that_nobody_logs_raises(metric, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        fit(Scored(), tmp_path, GeneralizationGapMonitor(metric))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": ""}, "`metric` should be the name"),
        ({"metric": "acc", "train_prefix": "x_", "val_prefix": "x_"}, "should differ, got 'x_' twice"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GeneralizationGapMonitor(**arguments)
