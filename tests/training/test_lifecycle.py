"""Is everything put back after a run, however it ends, so that the next one starts afresh?"""

import contextlib
import copy
import functools
import gc
import io
import pickle
import weakref

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_regularize import WeightDecay, WeightNormMonitor
from lightning_regularize.quantities import QUANTITIES
from lightning_regularize.schedules import Cosine, FromLRScheduler, Linear
from tests.training.support import (
    CALLBACKS,
    QUIET,
    REGULARIZERS,
    Batches,
    Regression,
    Witness,
    adamw,
    assert_identical_weights,
    make_trainer,
    plain_loop,
    train,
    weights,
)

pytestmark = QUIET

LINE = [k / 20 for k in range(21)]


class Early(Regression):
    """Makes its optimizer once for all fits, with groups of the user's."""

    def __init__(self, hidden=0.1, output=0.1, make_scheduler=None):
        super().__init__()
        groups = [
            {"params": [*self.hidden.parameters(), *self.norm.parameters()], "weight_decay": hidden},
            {"params": [*self.output.parameters()], "weight_decay": output, "name": "output"},
        ]
        self.optimizer = adamw(groups)
        self.scheduler = make_scheduler and make_scheduler(self.optimizer)

    def configure_optimizers(self):
        return self.optimizer if self.scheduler is None else ([self.optimizer], [self.scheduler])


class Before:
    """An optimizer as it was before a run, to be compared with what the run leaves."""

    def __init__(self, optimizer):
        self.optimizer, self.own_step = optimizer, vars(optimizer).get("step")
        self.groups, self.dictionaries = optimizer.param_groups, list(optimizer.param_groups)
        self.values = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        self.hooks_of_all = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)

    def assert_left_as_it_was(self):
        optimizer = self.optimizer
        assert not any(hooks for name, hooks in vars(optimizer).items() if name.endswith("_hooks"))
        # An attachment that an earlier test has dropped may take its hook along meanwhile.
        before = [set(hooks) for hooks in self.hooks_of_all]
        assert set(_global_optimizer_pre_hooks) <= before[0]
        assert set(_global_optimizer_post_hooks) <= before[1]
        assert not any(name for name in vars(optimizer) if "regulariz" in name)
        assert vars(optimizer).get("step") is self.own_step
        assert self.own_step is not None or optimizer.step.__func__ is type(optimizer).step
        assert optimizer.param_groups is self.groups
        assert len(self.groups) == len(self.dictionaries)
        for group, dictionary, values in zip(self.groups, self.dictionaries, self.values, strict=True):
            assert group is dictionary
            assert list(group) == list(values)
            assert all(p is q for p, q in zip(group["params"], values["params"], strict=True))
            assert {**group, "params": None, "lr": None} == {**values, "params": None, "lr": None}


def attributes(thing):
    """The names of what stands on it, but for hyperparameters, which Lightning makes when they are first asked for."""
    return {name for name in vars(thing) if not name.startswith("_hparams")}


def failing(function, error, when):
    """``function``, but for a call for which ``when`` says True."""

    @functools.wraps(function)
    def fails(*args, **kwargs):
        if when():
            raise error
        return function(*args, **kwargs)

    return fails


class Raise(L.Callback):
    def __init__(self, hook, error, step=0):
        setattr(self, hook, self.act)
        self.error, self.step = error, step

    def act(self, trainer, *_, **__):
        if trainer.global_step == self.step:
            raise self.error


class TwoLosses(Early):
    """With a dropout layer and two losses, so that any callback has something to do."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drop = nn.Dropout(0.1)

    def training_step(self, batch, batch_idx):
        self.log("train_loss", 1.0, on_epoch=True, on_step=False, batch_size=1)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0, batch_size=1)


class Unpicklable(TwoLosses):
    """With something that cannot be copied to another process."""

    def __init__(self):
        super().__init__()
        self.function = lambda: None


ALL = {**CALLBACKS, "of the groups": lambda: WeightDecay(None)}
DECAYS_AS_WELL = pytest.mark.filterwarnings("ignore:AdamW decays weights by .* that ConstrainedDecay decays as well")


@DECAYS_AS_WELL
@pytest.mark.parametrize("make_scheduler", [None, functools.partial(StepLR, step_size=6)], ids=["", "StepLR"])
@pytest.mark.parametrize("name", ALL)
def test_after_a_fit(name, make_scheduler, tmp_path):
    module, twin = TwoLosses(make_scheduler=make_scheduler), TwoLosses(make_scheduler=make_scheduler)
    before = Before(module.optimizer)
    for each, callbacks in ((module, [ALL[name]()]), (twin, [])):
        trainer = make_trainer(*callbacks, max_epochs=1, logger=CSVLogger(tmp_path), num_sanity_val_steps=0)
        trainer.fit(each, Batches(), Batches(2))
    before.assert_left_as_it_was()
    assert attributes(module.optimizer) == attributes(twin.optimizer)
    assert attributes(module) == attributes(twin)


class Add(L.Callback):
    """Adds another callback to the Trainer when the second epoch begins."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.callbacks.append(self.callback)


@DECAYS_AS_WELL
@pytest.mark.parametrize("name", CALLBACKS)
def test_what_is_added_in_mid_run_does_nothing_before_the_next_fit(name, tmp_path):
    """Lightning calls the hooks of the rest of the run, and has called none of those that begin it."""
    module, twin, callback = TwoLosses(), TwoLosses(), CALLBACKS[name]()
    for each, callbacks in ((module, [Add(callback)]), (twin, [])):
        trainer = make_trainer(*callbacks, max_epochs=3, logger=CSVLogger(tmp_path), num_sanity_val_steps=0)
        trainer.fit(each, Batches(), Batches(2))
    assert_identical_weights(weights(module), weights(twin))
    make_trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path)).fit(TwoLosses(), Batches(), Batches(2))


class FromHere(L.Callback):
    """Makes another device the default, as ``torch.set_default_device`` does in a script."""

    def on_before_optimizer_step(self, *_):
        torch.set_default_device("meta")


class ToHere(L.Callback):
    def on_train_batch_end(self, *_):
        torch.set_default_device(None)


WATCHED = {**REGULARIZERS, "monitor": lambda: WeightNormMonitor(quantities=QUANTITIES, detail="module", expected=True)}


@pytest.mark.filterwarnings("ignore:The Trainer has no logger")
@pytest.mark.parametrize("name", WATCHED)
def test_temporaries_lie_where_the_weights_are_whatever_the_default_device(name):
    found = []
    for around in ([FromHere(), WATCHED[name](), ToHere()], [WATCHED[name]()]):
        module = Regression(functools.partial(torch.optim.SGD, lr=0.1))
        module.drop = nn.Dropout(0.1)
        trainer = make_trainer(*around, max_epochs=1)
        try:
            trainer.fit(module, Batches())
        finally:
            torch.set_default_device(None)
        found.append((weights(module), {k: v for k, v in trainer.callback_metrics.items() if k != "train_loss"}))
    torch.testing.assert_close(*found, rtol=0, atol=0)


WHERE = {
    "setup": 0,
    "on_fit_start": 0,
    "on_train_start": 0,
    "on_train_batch_start": 4,
    "training_step": 4,
    "on_after_backward": 4,
    "on_before_optimizer_step": 4,
    "step": 4,
    "on_train_batch_end": 4,
}


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
def test_after_an_exception(error, where, place, method):
    module, weight_decay = Early(0.2, 0.1), WeightDecay(Linear(0.0, 1.0), method=method)
    before, callbacks = Before(module.optimizer), [weight_decay]
    if where == "training_step":
        module.training_step = failing(module.training_step, error, lambda: module.trainer.global_step == 4)
    elif where == "step":  # when it has taken up the first of its groups, or of their parts
        calls = iter([False] * (4 * (4 if method == "optimizer" else 2) + 1) + [True])
        module.optimizer._init_group = failing(module.optimizer._init_group, error, lambda: next(calls))
    else:
        callbacks.insert(place == "after", Raise(where, error, WHERE[where]))
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError, match=r"on purpose|^1$"):
        make_trainer(*callbacks, max_epochs=3).fit(module, Batches())
    before.assert_left_as_it_was()
    fresh, twin = Regression(), Regression()  # and the callback serves again
    assert train(fresh, weight_decay).steps == train(twin, WeightDecay(Linear(0.0, 1.0), method=method)).steps
    assert_identical_weights(weights(fresh), weights(twin))


@DECAYS_AS_WELL
@pytest.mark.parametrize("name", ALL)
def test_after_an_exception_inside_a_step_of_the_optimizer(name, tmp_path):
    module = TwoLosses()
    before, calls = Before(module.optimizer), iter([False] * 9 + [True])
    module.optimizer._init_group = failing(
        module.optimizer._init_group, RuntimeError("on purpose"), lambda: next(calls)
    )
    trainer = make_trainer(ALL[name](), max_epochs=3, logger=CSVLogger(tmp_path), num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, Batches(), Batches(2))
    before.assert_left_as_it_was()


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_after_an_exception_inside_a_step_that_the_module_catches(method):
    """Training goes on with the user's groups; the step counts, as it does for LR schedulers."""

    class Catching(Early):
        groups_after = []

        def optimizer_step(self, *args, **kwargs):
            with contextlib.suppress(ArithmeticError):
                super().optimizer_step(*args, **kwargs)
            self.groups_after.append(self.optimizer.param_groups)

    module = Catching()
    groups, calls = module.optimizer.param_groups, iter([*[False] * 9, True, *[False] * 99])
    module.optimizer._init_group = failing(module.optimizer._init_group, ArithmeticError(), lambda: next(calls))
    witness = train(module, WeightDecay(Linear(0.0, 1.0), method=method))
    assert len(module.groups_after) == 21
    assert all(after is groups for after in module.groups_after)
    expected = LINE if method == "optimizer" else [0.0] * 21
    assert witness.shown == [pytest.approx([x, x], rel=1e-12, abs=0) for x in expected]


def test_what_others_have_put_on_the_module_stays_there():
    module = Regression()
    module.configure_optimizers = configure = functools.partial(
        Regression.configure_optimizers, module
    )  # as a CLI does
    train(module, WeightDecay(0.1), max_epochs=1)
    assert module.configure_optimizers is configure


def test_a_wrapper_of_step_that_somebody_has_put_there_in_mid_run_stays_and_works():
    """An LR scheduler that is made in mid-run does so."""

    class MakeScheduler(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                StepLR(pl_module.optimizer, step_size=100)
                self.wrapper = pl_module.optimizer.step

    module, twin = Early(), Early()
    train(module, WeightDecay(Linear(0.0, 1.0)), make_scheduler := MakeScheduler())
    assert module.optimizer.step is make_scheduler.wrapper
    assert [group["weight_decay"] for group in module.optimizer.param_groups] == [0.1, 0.1]
    twin.load_state_dict(module.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(module.optimizer.state_dict()))
    for each in (module, twin):  # the optimizer now decays all that it holds
        plain_loop(each, each.optimizer, Batches().batches, [0.1] * 7)
    assert_identical_weights(weights(module), weights(twin))


def test_after_an_exception_in_the_modules_own_configure_optimizers():
    module, weight_decay = Regression(lambda parameters: 1 / 0), WeightDecay(0.1)
    with pytest.raises(ZeroDivisionError):
        train(module, weight_decay)
    assert set(train(Regression(), weight_decay).decays()) == {0.1}


# --------------------------------------------------------------------------------------------------------------------
# Fit twice


@pytest.mark.parametrize("make_module", [Regression, Early, lambda: Early(0.1, 0.05)], ids=["late", "early", "ratio"])
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("same_callback", [True, False], ids=["same callback", "new callback"])
def test_a_second_trainer_begins_anew(make_module, end, same_callback):
    """Also with an optimizer that was made early, and which the first run has stepped."""

    def weight_decay():
        return WeightDecay(Linear(0.5, end), factors={"output.*": 0.1})

    module, first = make_module(), weight_decay()
    once = train(module, first)
    again = train(module, first if same_callback else weight_decay())
    assert [decays for _, decays, _ in again.steps] == [decays for _, decays, _ in once.steps]
    assert again.shown == once.shown
    assert len(again.steps) == 21


@pytest.mark.parametrize("module_class", [Regression, Early])
def test_the_same_trainer_with_more_epochs_goes_on(module_class):
    module, witness = module_class(), Witness()
    trainer = make_trainer(WeightDecay(Linear(0.0, 1.0)), witness, max_epochs=2)
    trainer.fit(module, Batches())
    assert witness.decays() == pytest.approx([k / 13 for k in range(14)], rel=1e-12, abs=0)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, Batches())
    assert witness.decays()[14:] == pytest.approx(LINE[14:], rel=1e-12, abs=0)
    assert len(witness.steps) == 21


def test_fit_validate_fit():
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

    module, weight_decay = Validated(), WeightDecay(Linear(0.0, 1.0))
    trainer = make_trainer(weight_decay, witness := Witness(), max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(module, Batches(), Batches())
    left = weights(module)
    trainer.validate(module, Batches(), verbose=False)
    assert_identical_weights(weights(module), left)
    assert witness.decays() == pytest.approx(LINE, rel=1e-12, abs=0)


def test_nothing_is_written_before_training_starts():
    seen = []

    class Sane(Regression):
        def validation_step(self, batch, batch_idx):
            if self.trainer.sanity_checking:
                seen.extend(group["weight_decay"] for group in self.optimizers().param_groups)

    before = weights(module := Sane(functools.partial(adamw, weight_decay=0.7)))
    trainer = make_trainer(
        WeightDecay(0.1), Raise("on_train_start", InterruptedError()), max_epochs=1, num_sanity_val_steps=1
    )
    with pytest.raises(InterruptedError):
        trainer.fit(module, Batches(), Batches())
    assert seen == [0.7]
    assert_identical_weights(weights(module), before)


# --------------------------------------------------------------------------------------------------------------------
# Copies made while it runs


class CopyAt(L.Callback):
    def __init__(self, copy):
        self.copy, self.copies = copy, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 4:
            self.copies.append(self.copy(pl_module))


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.save"])
def test_a_module_copied_while_it_trains_is_a_plain_module(copy):
    module, copier = Regression(), CopyAt(copy)
    weight_decay = WeightDecay(Linear(0.0, 1.0))
    witness = train(module, weight_decay, copier)
    (twin,) = copier.copies
    assert_identical_weights(weights(twin), witness.weights[3])
    (group,) = twin.configure_optimizers().param_groups
    assert group["params"][0] is twin.hidden.weight
    assert train(twin, WeightDecay(Linear(0.0, 1.0))).decays() == pytest.approx(
        LINE, rel=1e-12, abs=0
    )  # and can be trained in turn


@pytest.mark.filterwarnings("ignore:WeightDecay. Cosine.* was over after 12 steps")  # `total_steps` is copied, too
@pytest.mark.parametrize("copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_callback_copied_while_it_trains_is_as_new(copy):
    weight_decay = WeightDecay(Cosine(0.1, 0.9), exclude=("bias",), factors={"output.*": 0.5}, total_steps=12)
    copier = CopyAt(lambda _: copy(weight_decay))
    train(Regression(), weight_decay, copier)
    module, twin = Regression(), Regression()
    found, expected = train(twin, copier.copies[0]), train(module, weight_decay)
    assert found.steps == expected.steps
    assert_identical_weights(weights(module), weights(twin))


def test_what_ddp_spawn_sends_can_be_pickled():
    schedule = FromLRScheduler(functools.partial(StepLR, step_size=6))
    trainer = make_trainer(WeightDecay(schedule), max_epochs=1)
    trainer.fit(module := Regression(), Batches())
    callbacks, module = pickle.loads(pickle.dumps((trainer.callbacks, module)))
    assert len(train(module, *[c for c in callbacks if isinstance(c, WeightDecay)]).steps) == 21


@DECAYS_AS_WELL
@pytest.mark.parametrize("name", ALL)
def test_a_copy_of_a_callback_that_ran_does_not_hold_the_module(name, tmp_path):
    callback = ALL[name]()
    trainer = make_trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path), num_sanity_val_steps=0)
    trainer.fit(Unpicklable(), Batches(), Batches(2))
    copies = pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)
    assert not any(hasattr(twin, "log") or hasattr(twin, "log_dict") for twin in copies)
    for twin in copies:
        make_trainer(twin, max_epochs=1, logger=CSVLogger(tmp_path)).fit(Unpicklable(), Batches(), Batches(2))


@DECAYS_AS_WELL
@pytest.mark.parametrize("name", ALL)
def test_a_callback_that_is_kept_lets_go_of_the_module_the_optimizer_and_the_trainer(name, tmp_path):
    callback = ALL[name]()

    def run():
        module = TwoLosses()
        trainer = make_trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path), num_sanity_val_steps=0)
        trainer.fit(module, Batches(), Batches(2))
        return [weakref.ref(each) for each in (module, module.optimizer, module.hidden.weight, trainer)]

    references = run()
    gc.collect()
    assert [reference() is None for reference in references] == [True] * 4
