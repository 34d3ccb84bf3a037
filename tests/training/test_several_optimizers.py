"""Does each optimizer follow the schedule by its own steps, when a module steps them by hand?"""

import csv

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import FollowLR, Linear
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    adamw,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    split,
    train,
    weights,
)

pytestmark = QUIET


class Adversaries(L.LightningModule):
    """A generator that steps with every batch, and a discriminator that steps with every second."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = Regression(), Regression()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [adamw(self.generator.parameters()), torch.optim.SGD(self.discriminator.parameters(), lr=0.1)]

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch, batch_idx):
        for_generator, for_discriminator = self.optimizers()
        self.step(for_generator, self.generator.loss(batch))
        if batch_idx % 2 == 1:  # of 7 batches an epoch: 3 times
            self.step(for_discriminator, self.discriminator.loss(batch))


class Alternating(Adversaries):
    """Both step with every batch."""

    def training_step(self, batch, batch_idx):
        for optimizer, model in zip(self.optimizers(), (self.generator, self.discriminator), strict=True):
            self.step(optimizer, model.loss(batch))


class Single(Regression):
    """One optimizer, stepped by hand."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.step(optimizer, batch)

    def step(self, optimizer, batch):
        optimizer.step()


class WithClosure(Single):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class SteppedTwice(Single):
    def step(self, optimizer, batch):
        optimizer.step()
        optimizer.step()


class SteppedRaw(Single):
    def step(self, optimizer, batch):
        optimizer.optimizer.step()


def schedule():
    return WeightDecay(Linear(0.0, 1.0), total_steps=31)


G_DECAYS, D_DECAYS = [k / 30 for k in range(21)], [k / 30 for k in range(9)]


def test_each_counts_its_own_steps():
    witness = train(Adversaries(), schedule())
    assert witness.decays(optimizer=0) == pytest.approx(G_DECAYS)
    assert witness.decays(optimizer=1) == pytest.approx(D_DECAYS)
    assert {*witness.decays(group=1, optimizer=0), *witness.decays(group=1, optimizer=1)} == {0.0}


def test_weights_equal_those_of_a_plain_loop():
    module, twin = Adversaries(), Adversaries()
    train(module, schedule())
    optimizers = adamw(split(twin.generator)), torch.optim.SGD(split(twin.discriminator), lr=0.1)
    models, decays = (twin.generator, twin.discriminator), (iter(G_DECAYS), iter(D_DECAYS))
    for i, batch in 3 * list(enumerate(Batches())):
        for model, optimizer, decay in list(zip(models, optimizers, decays, strict=True))[: 1 + i % 2]:
            optimizer.param_groups[0]["weight_decay"] = next(decay)
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
    assert_same_weights(weights(module), weights(twin))


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 21), ({"max_steps": 20}, 10), ({"max_steps": 60}, 21), ({"max_epochs": 1}, 7)], ids=str
)
def test_each_of_two_that_alternate_reaches_the_end(options, steps):
    witness = train(Alternating(), WeightDecay(Linear(0.0, 1.0)), **options)
    for optimizer in range(2):
        assert witness.decays(optimizer=optimizer) == pytest.approx([k / (steps - 1) for k in range(steps)])


class EvaluatingTwice(torch.optim.SGD):
    """Evaluates its closure twice a step, as LBFGS does several times, and lets it be at that."""

    def step(self, closure):
        return closure(), closure()


def test_a_closure_that_is_evaluated_twice_makes_one_step():
    class Closures(Alternating):
        def configure_optimizers(self):
            return [EvaluatingTwice(model.parameters(), lr=0.1) for model in (self.generator, self.discriminator)]

        def step(self, optimizer, loss):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step(lambda: loss.detach())

    witness = train(Closures(), schedule())
    for optimizer in range(2):
        assert witness.decays(optimizer=optimizer) == pytest.approx(G_DECAYS)


@pytest.mark.parametrize("step", [1, 3, 6, 10, 20], ids="after step {}".format)
def test_resumed_each_goes_on_at_its_own_step(step, tmp_path):
    whole, resumed = Adversaries(), Adversaries()
    expected = train(whole, schedule(), SaveAfter(tmp_path, step)).steps
    assert train(resumed, schedule(), ckpt_path=tmp_path / f"{step}.ckpt").steps == expected[step:]
    assert_identical_weights(weights(resumed), weights(whole))


def test_counts_that_a_checkpoint_does_not_hold_are_estimated_and_it_is_said(tmp_path):
    train(Alternating(), SaveAfter(tmp_path, 10))
    with pytest.warns(UserWarning, match=r"how many steps each of 2 optimizers made; .* had made 5 of the 10"):
        witness = train(Alternating(), schedule(), ckpt_path=tmp_path / "10.ckpt")
    assert witness.decays(optimizer=1) == pytest.approx([k / 30 for k in range(5, 21)])


def test_groups_have_names_that_do_not_repeat():
    trainer = make_trainer(WeightDecay(0.1), max_epochs=1)
    trainer.fit(Adversaries(), Batches())
    names = [group["name"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert names == ["optimizer0 decay", "optimizer0 no_decay", "optimizer1 decay", "optimizer1 no_decay"]


def test_groups_of_one_name_in_two_optimizers_are_logged_apart(tmp_path):
    class Namesakes(Alternating):
        def configure_optimizers(self):
            groups = [
                {"params": [*model.parameters()], "name": "all"} for model in (self.generator, self.discriminator)
            ]
            return [torch.optim.AdamW([group], lr=0.1) for group in groups]

    logger = CSVLogger(tmp_path)
    train(Namesakes(), WeightDecay(0.1, exclude=(), factors={"generator.*": 0.5}), logger=logger, max_epochs=1)
    assert logged(logger, "weight_decay/optimizer0 all") == pytest.approx([0.05] * 7)
    assert logged(logger, "weight_decay/optimizer1 all") == pytest.approx([0.1] * 7)


def logged(logger, key):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def test_learning_rate_monitor_shows_what_the_steps_use(tmp_path):
    logger = CSVLogger(tmp_path)
    train(Alternating(), WeightDecay(Linear(0.0, 1.0)), LearningRateMonitor(log_weight_decay=True), logger=logger)
    steps = [0, *range(7), 7, *range(7, 14), 14, *range(14, 21)]  # it logs at the start of each epoch as well
    for name in ("lr-AdamW/optimizer0", "lr-SGD/optimizer1"):
        assert logged(logger, f"{name} decay-weight_decay") == pytest.approx([k / 20 for k in steps])
        assert logged(logger, f"{name} no_decay-weight_decay") == [0.0] * len(steps)


def test_a_learning_rate_monitor_that_comes_too_early_is_told(tmp_path):
    monitor = LearningRateMonitor(log_weight_decay=True)
    with pytest.warns(UserWarning, match="LearningRateMonitor stands before WeightDecay"):
        train(Regression(), monitor, WeightDecay(Linear(0.0, 1.0)), logger=CSVLogger(tmp_path))


def test_logged_values_are_what_the_steps_use(tmp_path):
    logger = CSVLogger(tmp_path)
    train(Alternating(), WeightDecay(Linear(0.0, 1.0)), logger=logger)
    for name in ("optimizer0", "optimizer1"):
        assert logged(logger, f"weight_decay/{name} decay") == pytest.approx([k / 20 for k in range(21)])
        assert logged(logger, f"weight_decay/{name} no_decay") == [0.0] * 21


@pytest.mark.parametrize("module_class", [Single, WithClosure])
def test_a_single_optimizer_stepped_by_hand_equals_automatic_optimization(module_class):
    module, twin = module_class(), Regression()
    assert train(module, schedule()).steps == train(twin, schedule()).steps
    assert_identical_weights(weights(module), weights(twin))


def test_several_steps_in_one_batch_count_each():
    witness = train(SteppedTwice(), WeightDecay(Linear(0.0, 1.0), total_steps=42))
    assert witness.decays() == pytest.approx([k / 41 for k in range(42)])


@pytest.mark.parametrize("module_class", [SteppedRaw, Adversaries])
def test_a_number_needs_no_count(module_class):
    assert set(train(module_class(), WeightDecay(0.3)).decays()) == {0.3}


def test_steps_past_lightning_are_told_once():
    with pytest.warns(UserWarning, match="AdamW was stepped past Lightning") as told:
        witness = train(SteppedRaw(), schedule())
    assert len([warning for warning in told if "stepped past" in str(warning.message)]) == 1
    assert set(witness.decays()) == {0.0}


def test_follow_lr_follows_the_rate_of_each_optimizer():
    class Annealing(Alternating):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.optimizers()[1].param_groups[0]["lr"] *= 0.5

    witness = train(Annealing(), WeightDecay(FollowLR(0.2)), max_epochs=1)
    assert witness.decays(optimizer=0) == [0.2] * 7
    assert witness.decays(optimizer=1) == pytest.approx([0.2 * 0.5**k for k in range(7)])
