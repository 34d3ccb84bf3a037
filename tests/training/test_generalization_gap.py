"""Is the gap of one epoch, of both data, and there when it is looked for?"""

import lightning.pytorch as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from lightning_regularize.callbacks.generalization_gap import GeneralizationGapMonitor
from tests.distributed import run_distributed
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


class Rising(Scored):
    """A training metric that grows by 1 with each batch of an epoch, and a validation metric that always is 1."""

    def training_step(self, batch, batch_idx):
        self.log("train_acc", float(batch_idx), on_step=False, on_epoch=True, batch_size=1 + batch_idx)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 1.0, batch_size=1)


def mean_so_far(batches):
    """Of :class:`Rising`, weighted by the size of batches."""
    return sum(i * (1 + i) for i in range(batches)) / sum(1 + i for i in range(batches))


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"val_check_interval": 2}, [2, 4, 6] * 2),
        ({"val_check_interval": 0.5}, [3, 6] * 2),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 3]),
        ({"check_val_every_n_epoch": 2}, [7]),
    ],
    ids=["every second batch", "twice an epoch", "every fifth batch of the run", "every second epoch"],
)
def test_each_validation_has_a_gap_to_the_training_metric_so_far(options, batches, tmp_path):
    module = Rising()
    seen = Seen()
    # The one that looks comes first, and does not see the gap of another validation.
    _, logged = fit(module, tmp_path, seen, GeneralizationGapMonitor("acc"), max_epochs=2, **options)
    expected = [mean_so_far(n) - 1 for n in batches]
    assert seen.gaps == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert list(logged["generalization_gap/acc"].values()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert list(logged["generalization_gap/acc"]) == list(logged["val_acc"])
    # To look has not changed the metric itself.
    assert list(logged["train_acc"].values()) == pytest.approx([mean_so_far(7)] * 2, rel=1e-6, abs=1e-6)


class Seen(L.Callback):
    """What callbacks find when validation ends, None where there is nothing."""

    def __init__(self, key="generalization_gap/acc"):
        self.key, self.gaps = key, []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            gap = trainer.callback_metrics.get(self.key)
            self.gaps.append(None if gap is None else gap.item())


def test_a_metric_of_torchmetrics_is_so_far_and_goes_on(tmp_path):
    class Metric(Rising):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean(float(batch_idx), weight=1.0 + batch_idx)
            self.log("train_acc", self.mean, on_step=False, on_epoch=True)
            return self.loss(batch)

    seen = Seen()
    _, logged = fit(Metric(), tmp_path, seen, GeneralizationGapMonitor("acc"), max_epochs=2, val_check_interval=3)
    assert seen.gaps == pytest.approx([mean_so_far(n) - 1 for n in (3, 6)] * 2, rel=1e-6, abs=1e-6)
    assert list(logged["train_acc"].values()) == pytest.approx([mean_so_far(7)] * 2, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"check_val_every_n_epoch": 2}, 4),
        ({"val_check_interval": 0.5}, 4),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 4),
        ({}, 4),
    ],
    ids=["every second epoch", "twice an epoch", "every third batch of the run", "once an epoch"],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_early_stopping_and_checkpoints_find_the_gap_of_each_validation(options, validations, place, tmp_path):
    class Falling(Scored):
        """The gap is 0, -1, -2, -2, ... so that the third validation after which it does not fall is the fourth."""

        validations = 0

        def training_step(self, batch, batch_idx):
            self.log("train_acc", 0.0, on_step=False, on_epoch=True, batch_size=1)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", float(min(self.validations, 2)), batch_size=1)

        def on_validation_end(self):
            self.validations += not self.trainer.sanity_checking

    stopping = EarlyStopping("generalization_gap/acc", mode="min", patience=1)
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="generalization_gap/acc", mode="min", save_top_k=1)
    callbacks = [GeneralizationGapMonitor("acc"), stopping]
    callbacks = callbacks[::-1] if place == "before" else callbacks
    module = Falling()
    fit(module, tmp_path, *callbacks, checkpoint, max_epochs=20, enable_checkpointing=True, **options)
    assert module.validations == validations
    assert stopping.best_score == checkpoint.best_model_score == -2


@pytest.mark.parametrize("metric", ["train_acc", "val_acc"])
def test_an_old_gap_is_not_seen_again(metric, tmp_path):
    class Sometimes(Scored):
        def log(self, name, *args, **kwargs):
            if name != metric or self.current_epoch != 1:
                super().log(name, *args, **kwargs)

    seen = Seen()
    with pytest.warns(UserWarning, match="logs no gap for (epochs|validations) in which '(train_)?acc' is not logged"):
        fit(Sometimes(), tmp_path, seen, GeneralizationGapMonitor("acc"))
    assert seen.gaps == [0, None, 18]


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("generalization_gap/acc", patience=99, check_on_train_epoch_end=True, strict=False),
        ModelCheckpoint(monitor="generalization_gap/acc", save_on_train_epoch_end=True),
    ],
    ids=lambda callback: type(callback).__name__,
)
@pytest.mark.filterwarnings("ignore:.*Early stopping conditioned on metric", "ignore:.*could not find the monitored")
def test_who_asks_to_see_old_gaps_is_told(callback, tmp_path):
    checkpointing = {"enable_checkpointing": isinstance(callback, ModelCheckpoint), "default_root_dir": tmp_path}
    monitor, message = GeneralizationGapMonitor("acc"), "finds an old value in epochs without validation: leave `"
    with pytest.warns(UserWarning, match=message):
        fit(Scored(), tmp_path, monitor, callback, check_val_every_n_epoch=2, **checkpointing)


def test_the_order_of_other_callbacks_stays_and_two_monitors_stand_side_by_side(tmp_path):
    others = [Seen(), L.Callback(), Seen("generalization_gap/loss")]
    first, second = GeneralizationGapMonitor("acc"), GeneralizationGapMonitor("loss")

    class Both(Scored):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", 7.0, on_step=False, on_epoch=True, batch_size=1)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 4.0, batch_size=1)
            super().validation_step(batch, batch_idx)

    trainer, _ = fit(Both(), tmp_path, others[0], first, others[1], second, others[2])
    assert trainer.callbacks == [first, second, *others]
    assert others[0].gaps == [0, 9, 18]
    assert others[2].gaps == [3, 3, 3]


# --- names --------------------------------------------------------------------------------------------------------


def named(train, val, *, loaders=False):
    class Named(Regression):
        def training_step(self, batch, batch_idx):
            if train:
                self.log(train, 5.0, on_step=False, on_epoch=True, batch_size=1)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            if val:
                self.log(val, 3.0 + dataloader_idx, batch_size=1)

        def val_dataloader(self):
            return [Batches(2), Batches(2)] if loaders else Batches(2)

    return Named()


@pytest.mark.parametrize(
    ("train", "val", "arguments"),
    [
        ("train_acc", "val_acc", {}),
        ("train/acc", "val/acc", {}),
        ("train-acc", "valid-acc", {}),
        ("training/acc", "validation/acc", {}),
        ("train_acc", "held_out/acc", {"val_prefix": "held_out/"}),
        ("fit.acc", "val/acc", {"train_prefix": "fit."}),
        ("acc", "val_acc", {"train_prefix": ""}),
    ],
)
def test_names_are_found(train, val, arguments, tmp_path):
    trainer = make_trainer(GeneralizationGapMonitor("acc", **arguments), max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(named(train, val), Batches())
    assert trainer.callback_metrics["generalization_gap/acc"] == 2


@pytest.mark.parametrize(
    ("val", "metric", "arguments", "message"),
    [
        ("val_acc", "f1", {}, r"finds no metric 'val_f1' or 'val/f1'; there are 'val_acc'\."),
        ("val_acc", "ac", {}, "Did you mean 'val_acc'"),
        ("val/acc", "acc", {"val_prefix": "val_"}, "Is it val_prefix='val/'"),
        ("held_out/acc", "acc", {}, r"Is it val_prefix='held_out/'\?.* as `train_prefix` and `val_prefix`"),
    ],
)
def test_a_validation_metric_that_is_not_found_is_told_by_the_sanity_check(val, metric, arguments, message):
    class Begun(L.Callback):
        steps = 0

        def on_train_batch_start(self, *_):
            self.steps += 1

    begun = Begun()
    monitor = GeneralizationGapMonitor(metric, **arguments)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(monitor, begun, max_epochs=1, num_sanity_val_steps=1).fit(named("train_acc", val), Batches())
    assert begun.steps == 0
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(monitor, begun, max_epochs=1, num_sanity_val_steps=0).fit(named("train_acc", val), Batches())
    assert begun.steps == 7


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "finds no metric 'train_acc' or 'train/acc'; there are none"),
        ("fit/acc", r"there are 'fit/acc'\. Is it train_prefix='fit/'"),
        ("train_accuracy", "there are 'train_accuracy'. Did you mean 'train_accuracy'"),
    ],
)
def test_a_training_metric_that_is_not_found_is_told(train, message):
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(GeneralizationGapMonitor("acc"), max_epochs=2).fit(named(train, "val_acc"), Batches())


def test_a_module_that_logs_nothing_in_a_sanity_check_is_not_refused(tmp_path):
    class Silent(Scored):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                super().validation_step(batch, batch_idx)

    _, logged = fit(Silent(), tmp_path, GeneralizationGapMonitor("acc"))
    assert list(logged["generalization_gap/acc"].values()) == [0, 9, 18]


@pytest.mark.parametrize(
    ("metric", "gaps"),
    [
        ("acc", {"generalization_gap/acc/dataloader_idx_0": 2, "generalization_gap/acc/dataloader_idx_1": 1}),
        ("acc/dataloader_idx_1", {"generalization_gap/acc/dataloader_idx_1": 1}),
    ],
)
def test_validation_loaders_have_a_gap_each(metric, gaps):
    stopping = EarlyStopping("generalization_gap/acc/dataloader_idx_1")
    trainer = make_trainer(GeneralizationGapMonitor(metric), stopping, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(named("train_acc", "val_acc", loaders=True), Batches())
    found = {key: value.item() for key, value in trainer.callback_metrics.items() if "gap" in key}
    assert found == gaps
    assert stopping.wait_count == 1


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (None, {}, "has nothing to log: this run has no validation"),
        (2, {"limit_val_batches": 0}, "has nothing to log: this run has no validation"),
        (2, {"check_val_every_n_epoch": 5}, "training has ended without a validation"),
    ],
    ids=["no data", "no batches", "too late"],
)
def test_a_run_without_validation_is_told_once(loader, options, message):
    trainer = make_trainer(GeneralizationGapMonitor("acc"), max_epochs=2, **options)
    with pytest.warns(UserWarning, match="GeneralizationGapMonitor") as caught:
        trainer.fit(Scored(), Batches(), None if loader is None else Batches(loader))
    assert [message in str(w.message) for w in caught if "GeneralizationGap" in str(w.message)] == [True]


def two_ranks(rank, world_size, sizes, monitors):
    class Spread(Rising):
        def training_step(self, batch, batch_idx):
            options = {"on_step": False, "on_epoch": True, "batch_size": sizes[rank], "sync_dist": True}
            self.log("train_acc", float(batch_idx + 10 * rank), **options)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 1.0, batch_size=1, sync_dist=True)

    seen = Seen()
    options = {"max_epochs": 1, "strategy": "ddp", "devices": 2, "val_check_interval": 3}
    trainer = make_trainer(seen, *(GeneralizationGapMonitor("acc") for _ in range(monitors)), **options)
    trainer.fit(Spread(), Batches(), Batches(2))
    return seen.gaps, trainer.callback_metrics["train_acc"].item()


def test_the_gap_is_of_all_ranks():
    for gaps, metric in run_distributed(two_ranks, (1, 1), 1):
        assert gaps == pytest.approx([1 + 5 - 1, 2.5 + 5 - 1], rel=1e-9, abs=1e-12)
        assert metric == pytest.approx(3.0 + 5, rel=1e-9, abs=1e-12)


def test_to_look_does_not_change_the_metric_of_the_epoch():
    """Lightning adds the counts of ranks in place, and rounds."""
    (_, found), _ = run_distributed(two_ranks, (1, 2), 1)
    (_, expected), _ = run_distributed(two_ranks, (1, 2), 0)
    assert found == expected


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

    with pytest.raises(
        MisconfigurationException, match="GeneralizationGapMonitor: 'train_acc' is logged for single steps only"
    ):
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


@pytest.mark.parametrize("name", ["train_prefix", "val_prefix"])
def test_a_prefix_is_a_text(name):
    with pytest.raises(TypeError, match=f"`{name}` should be what the name of a metric begins with, or None, got 3"):
        GeneralizationGapMonitor("acc", **{name: 3})
