"""Does the schedule count optimizer steps, whatever lies between them, and end when training ends?"""

import itertools

import pytest
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import Cosine, FollowLR, Join, Linear, Steps, Timescale, Warmup
from tests.training.matrix import Kept
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    Witness,
    adamw,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    split,
    train,
    weights,
)

pytestmark = QUIET


class UncountedBatches(Batches):
    """Of which Lightning cannot tell how many there are."""

    __len__ = None


class SkippingRegression(Regression):
    """Returns no loss for each third batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


def approx(values):
    return pytest.approx(values, rel=1e-12, abs=0)


def line(steps):
    return [k / (steps - 1) for k in range(steps)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"accumulate_grad_batches": 2}, 12),
        ({"accumulate_grad_batches": 3}, 9),
        ({"accumulate_grad_batches": 7}, 3),
        ({"accumulate_grad_batches": 100}, 3),
        ({"limit_train_batches": 4}, 12),
        ({"limit_train_batches": 0.5}, 9),
        ({"limit_train_batches": 4, "accumulate_grad_batches": 3}, 6),
        ({"max_steps": 10}, 10),
        ({"max_steps": 10, "max_epochs": -1}, 10),
        ({"max_steps": 5, "accumulate_grad_batches": 3}, 5),
        ({"max_steps": 100}, 21),
        ({"val_check_interval": 2}, 21),
    ],
    ids=str,
)
def test_schedule_spans_the_steps_of_the_run(options, steps):
    assert train(Regression(), WeightDecay(Linear(0.0, 1.0)), **options).decays() == approx(line(steps))


@pytest.mark.parametrize(
    ("factors", "steps"), [({0: 4, 1: 2, 2: 1}, 2 + 4 + 7), ({1: 3}, 7 + 3 + 3), ({5: 3}, 21)], ids=str
)
def test_schedule_spans_the_steps_of_a_run_whose_accumulation_changes(factors, steps):
    accumulation = GradientAccumulationScheduler(factors)
    assert train(Regression(), accumulation, WeightDecay(Linear(0.0, 1.0))).decays() == approx(line(steps))


def test_value_changes_with_the_step_and_not_with_the_batches_between():
    seen = []

    class Watching(Regression):
        def training_step(self, batch, batch_idx):
            seen.append(self.optimizers().param_groups[0]["weight_decay"])
            return super().training_step(batch, batch_idx)

    train(Watching(), WeightDecay(Linear(0.0, 8.0)), accumulate_grad_batches=3)
    assert seen == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 6, 6, 7, 7, 7, 8]


def test_accumulated_weights_equal_a_plain_loop():
    module, twin = Regression(), Regression()
    train(module, WeightDecay(Linear(0.0, 1.0)), accumulate_grad_batches=3)
    optimizer, data = adamw(split(twin)), list(Batches())
    windows = 3 * [data[:3], data[3:6], data[6:]]
    for decay, window in zip(line(9), windows, strict=True):
        optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.zero_grad()
        for batch in window:
            (twin.loss(batch) / 3).backward()
        optimizer.step()
    assert_same_weights(weights(module), weights(twin))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning's, and on purpose
def test_batches_without_a_loss_count_as_they_do_for_lr_schedulers():
    module, twin = SkippingRegression(), Regression()
    decays = train(module, WeightDecay(Linear(0.0, 1.0))).decays()
    assert decays == approx(line(21))
    optimizer = adamw(split(twin))
    for k, (i, batch) in enumerate(itertools.chain.from_iterable(3 * [list(enumerate(Batches()))])):
        if i % 3 != 1:
            optimizer.param_groups[0]["weight_decay"] = k / 20
            optimizer.zero_grad()
            twin.loss(batch).backward()
            optimizer.step()
    assert_same_weights(weights(module), weights(twin))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulate", [2, 3])
def test_schedule_ends_at_its_end_with_accumulation_and_missing_losses(accumulate):
    decays = train(SkippingRegression(), WeightDecay(Linear(0.0, 1.0)), accumulate_grad_batches=accumulate).decays()
    assert decays == approx(line(len(decays)))


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (Batches(), {"max_epochs": -1, "limit_train_batches": 3}),
        (Batches(), {"max_epochs": -1, "max_steps": -1}),
        (UncountedBatches(), {"max_epochs": 2}),
        (UncountedBatches(), {"max_epochs": 2, "max_steps": -1}),
    ],
    ids=["no end", "no end at all", "uncounted", "uncounted, no max_steps"],
)
@pytest.mark.parametrize("schedule", [Cosine(0.04, 0.4), Warmup(0.1, fraction=0.1), Steps([1, 0], [0.5])], ids=repr)
def test_an_unknown_end_is_an_error_before_training(data, options, schedule):
    module = Regression()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"needs to know how many steps .* give `total_steps`"):
        train(module, WeightDecay(schedule), data=data, **options)
    assert_identical_weights(weights(module), before)


class StopAfter(EarlyStopping):
    def __init__(self, steps):
        super().__init__("train_loss")
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.steps

    def on_train_epoch_end(self, *_):
        pass


@pytest.mark.filterwarnings("ignore:WeightDecay. Linear.* was over after")  # `total_steps` is less on purpose
@pytest.mark.parametrize(
    ("weight_decay", "expected"),
    [
        (WeightDecay(0.3), [0.3] * 9),
        (WeightDecay(Linear(0.0, 1.0), total_steps=5), [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (WeightDecay(Steps([0.2, 0.1], [4])), [0.2] * 4 + [0.1] * 5),
        (WeightDecay(Warmup(0.4, steps=4)), [0, 0.1, 0.2, 0.3] + [0.4] * 5),
        (WeightDecay(FollowLR(0.2)), [0.2] * 9),
    ],
    ids=["constant", "total_steps", "steps", "warm-up in steps", "follows the lr"],
)
@pytest.mark.parametrize("data", [Batches(), UncountedBatches()], ids=["counted", "uncounted"])
def test_a_run_without_an_end(weight_decay, expected, data):
    decays = train(Regression(), weight_decay, StopAfter(9), data=data, max_epochs=-1).decays()
    assert decays == approx(expected)


def test_max_steps_ends_a_schedule_over_uncounted_data():
    decays = train(Regression(), WeightDecay(Linear(0.0, 1.0)), data=UncountedBatches(), max_steps=10).decays()
    assert decays == approx(line(10))


@pytest.mark.filterwarnings("ignore:WeightDecay. Linear.* was over after")  # `total_steps` is less on purpose
def test_total_steps_wins_over_what_the_trainer_expects_and_the_end_value_holds():
    decays = train(Regression(), WeightDecay(Linear(1.0, 0.0), total_steps=3)).decays()
    assert decays == [1.0, 0.5] + [0.0] * 19


def test_a_run_that_stops_early_keeps_to_the_planned_length():
    decays = train(Regression(), WeightDecay(Linear(0.0, 1.0)), StopAfter(9)).decays()
    assert decays == approx(line(21)[:9])


def test_fast_dev_run_is_a_run_of_one_step():
    assert train(Regression(), WeightDecay(Linear(0.1, 0.4)), fast_dev_run=True).decays() == [0.1]


@pytest.mark.parametrize(
    ("total_steps", "message"),
    [
        (31, "training has ended after 21 steps of 31, before Linear(.*) has reached its end"),
        (20, "Linear(.*) was over after 20 steps, and the optimizer made 21"),
    ],
)
def test_a_schedule_that_ends_elsewhere_than_training_is_warned_of(total_steps, message):
    with pytest.warns(UserWarning, match=message):
        train(Regression(), WeightDecay(Linear(0.0, 1.0), total_steps=total_steps))


def test_data_that_grow_from_epoch_to_epoch_are_warned_of():
    """The schedule is over before training ends, since nobody knew how long that would be."""

    class Growing(Regression):
        def train_dataloader(self):
            return Batches(2 + 2 * self.trainer.current_epoch)

    module, witness = Growing(), Witness()
    trainer = make_trainer(WeightDecay(Linear(0.0, 1.0)), witness, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="was over after 6 steps, and the optimizer made 12"):
        trainer.fit(module)
    assert witness.decays() == approx([*line(6), *[1.0] * 6])


@pytest.mark.parametrize(
    ("options", "steps_per_epoch"),
    [
        ({}, 7),
        ({"accumulate_grad_batches": 3}, 3),
        ({"limit_train_batches": 4, "accumulate_grad_batches": 2}, 2),
        ({"max_epochs": -1, "max_steps": 10}, 7),
        ({"max_steps": 2}, 7),
        ({"callbacks": [GradientAccumulationScheduler({0: 7, 1: 2, 2: 1})]}, (1 + 4 + 7) / 3),
    ],
    ids=["plain", "accumulated", "limited", "steps", "short", "scheduled"],
)
@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_a_timescale_in_epochs_counts_optimizer_steps(options, steps_per_epoch, method):
    options = dict(options)
    module, callback = Regression(adamw), WeightDecay(Timescale(epochs=2), method=method, exclude=())
    kept = Kept()
    callbacks = [callback, *options.pop("callbacks", ())]
    trainer = make_trainer(*callbacks, logger=kept, **{"max_epochs": 3, **options})
    trainer.fit(module, Batches())
    expected = 1 / (trainer.optimizers[0].param_groups[0]["lr"] * 2 * steps_per_epoch)
    values = list(kept.values["weight_decay"].values())
    assert values == approx([expected] * len(values))


def test_a_timescale_in_epochs_needs_epochs_of_known_length():
    module = Regression(adamw)
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"WeightDecay: .* how many steps an epoch has.*give `steps`"):
        train(module, WeightDecay(Timescale(epochs=2)), data=UncountedBatches(), max_epochs=-1, max_steps=3)
    assert_identical_weights(weights(module), before)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Warmup(s, steps=5), lambda s: Join([0.1, s], [3])])
def test_a_timescale_does_not_fit_a_decay_whatever_the_rate(wrap):
    with pytest.raises(ValueError, match="Timescale counts on decay by lr"):
        WeightDecay(wrap(Timescale(steps=10)), method="independent")
