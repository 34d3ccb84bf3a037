"""Does each optimizer follow the schedule by its own steps, when a module steps them by hand?"""

import csv
import functools

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lightning_regularize import L1Penalty, WeightDecay
from lightning_regularize.schedules import Cosine, FollowLR, FromLRScheduler, Linear, Warmup
from lightning_regularize.selection import DEFAULT_EXCLUDE
from tests.reading import read_csv
from tests.training.support import (
    EXCLUDED,
    QUIET,
    Batches,
    Regression,
    SaveAfter,
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
    """Steps torch's optimizer, which Lightning wraps to count steps."""

    def step(self, optimizer, batch):
        optimizer.optimizer.step()


class Stop(L.Callback):
    """Stops after five batches, as EarlyStopping does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 4


def schedule():
    return WeightDecay(Linear(0.0, 1.0), total_steps=21)


G_DECAYS, D_DECAYS = [k / 20 for k in range(21)], [k / 20 for k in range(9)]
MODELS = ("generator", "discriminator")


def approx(values):
    return pytest.approx(values, rel=1e-12, abs=0)


def test_each_counts_its_own_steps():
    witness = train(Adversaries(), schedule())
    for optimizer, (name, decays) in enumerate(zip(MODELS, (G_DECAYS, D_DECAYS), strict=True)):
        assert witness.decays(f"{name}.hidden.weight", optimizer) == approx(decays)
        assert {decay for excluded in EXCLUDED for decay in witness.decays(f"{name}.{excluded}", optimizer)} == {0.0}


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
    witness = train(Alternating(), WeightDecay(Linear(0.0, 1.0), total_steps=steps), **options)
    for optimizer, name in enumerate(MODELS):
        assert witness.decays(f"{name}.hidden.weight", optimizer) == approx([k / (steps - 1) for k in range(steps)])


@pytest.mark.parametrize("module_class", [Adversaries, Single, SteppedRaw])
@pytest.mark.parametrize("needing", [Linear(0.0, 1.0), Cosine(1.0, 0.0), Warmup(0.1, fraction=0.5)], ids=repr)
def test_a_schedule_that_needs_to_know_the_end_asks_for_total_steps(module_class, needing):
    module = module_class()
    before = weights(module)
    with pytest.raises(
        MisconfigurationException, match=r"in manual optimization Lightning does not know, give `total_"
    ):
        train(module, WeightDecay(needing))
    assert_identical_weights(weights(module), before)


HALVED = FromLRScheduler(functools.partial(StepLR, step_size=6, gamma=0.5))


@pytest.mark.parametrize(
    ("needless", "expected"),
    [
        (0.3, [0.3] * 21),
        (Warmup(0.4, steps=8), [min(0.4, 0.05 * k) for k in range(21)]),
        (FollowLR(0.2), [0.2] * 21),
        (HALVED, [0.5 ** (k // 6) for k in range(21)]),
        (lambda at: 0.1 * at.step, [0.1 * k for k in range(21)]),
    ],
    ids=["number", "Warmup", "FollowLR", "FromLRScheduler", "function"],
)
def test_other_schedules_do_not(needless, expected):
    witness = train(Adversaries(), WeightDecay(needless))
    assert witness.decays("generator.hidden.weight", 0) == approx(expected)
    assert witness.decays("discriminator.hidden.weight", 1) == approx(expected[:9])


def messages(caught):
    return [str(warning.message) for warning in caught if "WeightDecay" in str(warning.message)]


@pytest.mark.parametrize(
    ("module_class", "total_steps", "message"),
    [
        (Adversaries, 31, "training has ended after 21 steps of 31, before Linear(.*) has reached its end"),
        (Single, 31, "training has ended after 21 steps of 31, before Linear(.*) has reached its end"),
        (SteppedTwice, 21, "Linear(.*) was over after 21 steps, and the optimizer made 42"),
        (SteppedRaw, 20, "Linear(.*) was over after 20 steps, and the optimizer made 21"),
    ],
)
def test_a_schedule_that_ends_elsewhere_than_training_is_warned_of_once(module_class, total_steps, message):
    with pytest.warns(UserWarning, match=message) as caught:
        train(module_class(), WeightDecay(Linear(0.0, 1.0), total_steps=total_steps))
    assert len(messages(caught)) == 1


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"callbacks": [Stop()]}], ids=["fast_dev_run", "stopped"])
def test_a_run_that_is_cut_short_on_purpose_is_not_warned_of(options):
    options = dict(options)
    train(Alternating(), WeightDecay(Linear(0.0, 1.0), total_steps=99), *options.pop("callbacks", ()), **options)


class EvaluatingTwice(torch.optim.SGD):
    """Evaluates its closure twice a step, as LBFGS does several times; then makes a step of SGD."""

    def step(self, closure):
        losses = closure(), closure()
        for group in self.param_groups:
            self._init_group(group, [], [], [])
            with torch.no_grad():
                for parameter in group["params"]:
                    parameter -= group["lr"] * (parameter.grad + group["weight_decay"] * parameter)
        return losses[-1]


def test_a_closure_that_is_evaluated_twice_makes_one_step():
    class Closures(Alternating):
        def __init__(self, optimizer_class):
            super().__init__()
            self.optimizer_class = optimizer_class

        def configure_optimizers(self):
            return [self.optimizer_class(getattr(self, name).parameters(), lr=0.1) for name in MODELS]

        def training_step(self, batch, batch_idx):
            for optimizer, name in zip(self.optimizers(), MODELS, strict=True):
                optimizer.step(functools.partial(self.closure, optimizer, getattr(self, name), batch))

        def closure(self, optimizer, model, batch):
            optimizer.zero_grad()
            loss = model.loss(batch)
            self.manual_backward(loss)
            return loss

    module, twin = Closures(EvaluatingTwice), Closures(torch.optim.SGD)
    witness = train(module, schedule())
    for optimizer, name in enumerate(MODELS):
        assert witness.decays(f"{name}.hidden.weight", optimizer) == approx(G_DECAYS)
    train(twin, schedule())
    assert_same_weights(weights(module), weights(twin))


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
    assert witness.decays("discriminator.hidden.weight", 1) == approx([k / 20 for k in range(5, 21)])


def test_another_fit_with_more_epochs_goes_on_at_each_ones_own_step():
    module, witness = Adversaries(), Witness()
    trainer = make_trainer(WeightDecay(lambda at: 0.01 * at.step), witness, max_epochs=2)
    trainer.fit(module, Batches())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, Batches())
    assert witness.decays("generator.hidden.weight", 0) == approx([0.01 * k for k in range(21)])
    assert witness.decays("discriminator.hidden.weight", 1) == approx([0.01 * k for k in range(9)])


# --------------------------------------------------------------------------------------------------------------------
# What is logged


def logged(logger, key):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def test_groups_of_one_name_in_two_optimizers_are_logged_apart(tmp_path):
    class Namesakes(Alternating):
        def configure_optimizers(self):
            groups = [{"params": [*getattr(self, name).parameters()], "name": "all"} for name in MODELS]
            return [torch.optim.AdamW([group], lr=0.1) for group in groups]

    logger = CSVLogger(tmp_path)
    train(Namesakes(), WeightDecay(0.1, exclude=(), factors={"generator.*": 0.5}), logger=logger, max_epochs=1)
    assert logged(logger, "weight_decay/optimizer0 all") == approx([0.05] * 7)
    assert logged(logger, "weight_decay/optimizer1 all") == approx([0.1] * 7)


@pytest.mark.parametrize("method", ["optimizer", "decoupled", "coupled"])
@pytest.mark.parametrize("module_class", [Alternating, Adversaries])
def test_logged_values_are_what_the_steps_use(module_class, method, tmp_path):
    """A row for every step of an optimizer, and none for batches in which it does not step."""
    logger = CSVLogger(tmp_path)
    weight_decay = WeightDecay(Linear(0.0, 1.0), total_steps=21, method=method)
    train(module_class(), weight_decay, logger=logger)
    batches = {Alternating: range(21), Adversaries: [1, 3, 5, 8, 10, 12, 15, 17, 19]}[module_class]
    found = read_csv(logger)
    assert {key for key in found if "weight_decay" in key} == {
        "weight_decay/optimizer0 pg1",
        "weight_decay/optimizer1 pg1",
    }
    assert found["weight_decay/optimizer0 pg1"] == approx({k: k / 20 for k in range(21)})
    assert found["weight_decay/optimizer1 pg1"] == approx({k: i / 20 for i, k in enumerate(batches)})


def test_each_step_is_logged_with_one_batch_per_epoch(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [WeightDecay(Linear(0.0, 1.0), total_steps=5), L1Penalty(Linear(0.0, 1.0), total_steps=5)]
    train(Alternating(), *callbacks, logger=logger, max_epochs=5, limit_train_batches=1)
    found = read_csv(logger)
    for i in (0, 1):
        assert found[f"weight_decay/optimizer{i} pg1"] == approx({k: k / 4 for k in range(5)})
        assert list(found[f"penalty/l1 optimizer{i}"]) == list(range(5))


@pytest.mark.parametrize("monitor_is_first", [True, False], ids=["monitor first", "monitor last"])
def test_learning_rate_monitor_shows_what_the_steps_use(monitor_is_first, tmp_path):
    logger, callbacks = CSVLogger(tmp_path), [schedule(), LearningRateMonitor(log_weight_decay=True)]
    train(Alternating(), *(reversed(callbacks) if monitor_is_first else callbacks), logger=logger)
    steps = [0, *range(7), 7, *range(7, 14), 14, *range(14, 21)]  # it logs at the start of each epoch as well
    for name in ("lr-AdamW", "lr-SGD"):
        assert logged(logger, f"{name}-weight_decay") == approx([k / 20 for k in steps])


# --------------------------------------------------------------------------------------------------------------------
# One optimizer


@pytest.mark.parametrize("module_class", [Single, WithClosure, SteppedRaw])
def test_a_single_optimizer_stepped_by_hand_equals_automatic_optimization(module_class):
    module, twin = module_class(), Regression()
    assert train(module, schedule()).steps == train(twin, schedule()).steps
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("raw", [False, True], ids=["Lightning's", "torch's"])
def test_several_steps_in_one_batch_count_each(raw):
    class SteppedTwiceRaw(SteppedTwice):
        def step(self, optimizer, batch):
            super().step(optimizer.optimizer, batch)

    module = SteppedTwiceRaw() if raw else SteppedTwice()
    witness = train(module, WeightDecay(Linear(0.0, 1.0), total_steps=42))
    assert witness.decays() == approx([k / 41 for k in range(42)])


def test_steps_of_lightnings_and_of_torchs_optimizer_are_counted_together():
    class InTurns(Single):
        def step(self, optimizer, batch):
            self.count = getattr(self, "count", 0) + 1
            (optimizer.optimizer if self.count % 3 else optimizer).step()

    module, twin = InTurns(), Regression()
    assert train(module, schedule()).steps == train(twin, schedule()).steps
    assert_identical_weights(weights(module), weights(twin))


def test_follow_lr_follows_the_rate_of_each_optimizer():
    class Annealing(Alternating):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.optimizers()[1].param_groups[0]["lr"] *= 0.5

    witness = train(Annealing(), WeightDecay(FollowLR(0.2)), max_epochs=1)
    assert witness.decays("generator.hidden.weight", 0) == [0.2] * 7
    assert witness.decays("discriminator.hidden.weight", 1) == approx([0.2 * 0.5**k for k in range(7)])


class TowerAndRest(Adversaries):
    """One optimizer decays the tower; the other one has no weight decay, and all that it holds is excluded."""

    def __init__(self, rest, make_rest, make_tower=adamw):
        super().__init__()
        self.tower, self.rest = Regression(), rest()
        self.make_tower, self.make_rest = make_tower, make_rest

    def configure_optimizers(self):
        return [self.make_tower(self.tower), self.make_rest(self.rest.parameters())]

    def training_step(self, batch, batch_idx):
        of_tower, of_rest = self.optimizers()
        self.step(of_tower, self.tower.loss(batch))
        x = torch.tensor([0, 2]) if isinstance(self.rest, nn.Embedding) else torch.ones(2, 3)
        self.step(of_rest, self.rest(x).square().sum())


RESTS = {
    "looked up": (lambda: nn.Embedding(4, 3, sparse=True), torch.optim.SparseAdam, (*DEFAULT_EXCLUDE, "embedding")),
    "norm": (lambda: nn.LayerNorm(3), torch.optim.Rprop, DEFAULT_EXCLUDE),
    "by name": (lambda: nn.Linear(3, 2), torch.optim.Rprop, (*DEFAULT_EXCLUDE, "rest.*")),
}


@pytest.mark.parametrize("method", ["optimizer", "decoupled", "coupled"])
@pytest.mark.parametrize("rest", RESTS)
def test_what_is_fully_excluded_needs_no_weight_decay(rest, method):
    def both(make_tower):
        torch.manual_seed(0)
        return TowerAndRest(RESTS[rest][0], RESTS[rest][1], make_tower)

    def by_hand(tower):
        decaying, excluded = split(tower)
        decay = {"weight_decay": 0.3}
        return torch.optim.SGD([{**decaying, **decay}, excluded], lr=0.1)

    module, twin = both(lambda tower: torch.optim.SGD(tower.parameters(), lr=0.1)), both(by_hand)
    train(module, WeightDecay(0.3, exclude=RESTS[rest][2], method=method), max_epochs=1)
    train(twin, max_epochs=1)
    assert_same_weights(weights(module), weights(twin))
