"""Do a user's groups, schedulers, code and checkpoints behave as without us, and weights as with hand-made groups?"""

import copy
import functools
import inspect
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    LearningRateMonitor,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn, optim
from torch.distributed.fsdp import fully_shard
from torch.optim import lr_scheduler

from lightning_regularize import (
    AnchorDecay,
    L1Penalty,
    RegularizationSummary,
    WeightDecay,
    WeightNormMonitor,
    regularize,
)
from tests.distributed import run_distributed
from tests.steps.optimizers import (
    COMBINED,
    DECAYS,
    STEPS,
    ActsAsOne,
    AdaBound,
    AdaBoundByZip,
    CombinedByProperty,
    Layout,
    Lookahead,
    Orthogonal,
    Plain,
    StepsByItself,
    adamw,
    decay,
    ordered,
    set_decay,
    split,
)
from tests.training.support import (
    EXCLUDED,
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    Witness,
    assert_identical_weights,
    make_trainer,
    train,
    weights,
)

pytestmark = QUIET

EPOCHS, BATCHES = 2, 3  # of 6 steps
RULES = {"exclude": ("norm.*", "output.*")}  # by which Muon's matrices are split and AdamW's rest as well
REST = ("norm.weight", "norm.bias", "output.weight", "output.bias")


class HandMade(L.Callback):
    """The oracle: writes the weight decay of each step into groups that were made by hand."""

    def __init__(self, *factors):
        self.factors = factors

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for group, factor in zip(optimizer.param_groups, self.factors, strict=True):
            set_decay(group, factor * DECAYS[min(trainer.global_step, STEPS - 1)])


class Keeping(Logger):
    """Keeps what is logged, as pairs of keys and values."""

    name, version = "keeping", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows += metrics.items()

    def log_hyperparams(self, params):
        pass


class Module(Regression):
    def __init__(self, make=adamw, make_scheduler=None, *, dtype=torch.float64, **scheduler_options):
        super().__init__(make, make_scheduler, **scheduler_options)
        self.to(dtype)

    def loss(self, batch):
        x, y = (tensor.to(self.hidden.weight.dtype) for tensor in batch)
        return super().loss((x, y))


class Matrices(Module):
    """Has no vectors, of which Muon knows nothing; ``output.weight`` is to be excluded."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.norm, self.hidden.bias, self.output.bias = nn.Identity(), None, None


def by_hand(cls=Module, excluded=EXCLUDED, make=adamw, **options):
    """A module whose groups are made by hand."""
    module = cls(**options)
    module.make_optimizer = lambda _: make(split(module, excluded))
    return module


def fit(module, *callbacks, ckpt_path=None, **options):
    make_trainer(*callbacks, **{"max_epochs": EPOCHS, **options}).fit(module, Batches(BATCHES), ckpt_path=ckpt_path)


def watch(module, *callbacks, **options):
    """Likewise, with a witness, which works for optimizers with hooks and a learning rate."""
    return train(module, *callbacks, data=Batches(BATCHES), **{"max_epochs": EPOCHS, **options})


# --------------------------------------------------------------------------------------------------------------------
# The weights are those of hand-made groups

OPTIMIZERS = {
    "SGD": functools.partial(optim.SGD, lr=0.1, momentum=0.9),
    "SGD fused": functools.partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "Adam": functools.partial(optim.Adam, lr=0.1),
    "AdamW": adamw,
    "AdamW foreach": functools.partial(adamw, foreach=True),
    "AdamW fused": functools.partial(adamw, fused=True),
    "AdamW amsgrad": functools.partial(adamw, amsgrad=True),
    "RMSprop": functools.partial(optim.RMSprop, lr=0.1, momentum=0.9),
    "NAdam": functools.partial(optim.NAdam, lr=0.1),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.1),
    "Adafactor": functools.partial(optim.Adafactor, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equal_to_hand_made_groups_bit_for_bit(make, dtype):
    module, twin = Module(make, dtype=dtype), by_hand(make=make, dtype=dtype)
    fit(module, decay())
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_muon_equals_hand_made_groups_bit_for_bit(dtype):
    module = Matrices(optim.Muon, dtype=dtype)
    twin = by_hand(Matrices, ("output.weight",), optim.Muon, dtype=dtype)
    fit(module, decay(exclude=("output.*",)))
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


class Manual(Module):
    automatic_optimization = False

    def step(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def training_step(self, batch, batch_idx):
        self.step(self.optimizers(), batch, batch_idx)


class ManualByClosure(Manual):
    def step(self, optimizer, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))

        optimizer.step(closure=closure)


class ManualRaw(Manual):
    """Steps the torch optimizer, of which Lightning learns nothing."""

    def training_step(self, batch, batch_idx):
        self.step(self.optimizers().optimizer, batch, batch_idx)


class ManualAccumulated(Manual):
    """Steps on every second batch, and on the last one of an epoch."""

    def step(self, optimizer, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        if batch_idx % 2 or batch_idx == BATCHES - 1:
            optimizer.step()
            optimizer.zero_grad()


class Overflowing(Module):
    """Has an infinite gradient in the second step, which a GradScaler skips."""

    def on_after_backward(self):
        if self.trainer.global_step == 1:
            self.output.weight.grad[0, 0] = torch.inf


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


MODES = {
    "automatic": (Module, dict),
    "accumulated": (Module, lambda: {"accumulate_grad_batches": 2, "max_epochs": 3}),
    "clipped by value": (Module, lambda: {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "scaled": (Module, scaled),
    "scaled, with overflow": (Overflowing, scaled),
    "scaled and accumulated": (Module, lambda: {**scaled(), "accumulate_grad_batches": 2, "max_epochs": 3}),
    "manual": (Manual, dict),
    "manual by a closure": (ManualByClosure, dict),
    "manual and accumulated": (ManualAccumulated, lambda: {"max_epochs": 3}),
    "manual and scaled": (Manual, scaled),
}
SOME = {name: OPTIMIZERS[name] for name in ("SGD", "AdamW", "AdamW fused", "Adafactor")}


@pytest.mark.parametrize("make", SOME.values(), ids=SOME)
@pytest.mark.parametrize(("cls", "options"), MODES.values(), ids=MODES)
def test_whatever_the_loop_weights_equal_those_of_hand_made_groups(cls, options, make):
    module, twin = cls(make, dtype=torch.float32), by_hand(cls, make=make, dtype=torch.float32)
    fit(module, decay(), **options())
    fit(twin, HandMade(1.0, 0.0), **options())
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("make", SOME.values(), ids=SOME)
def test_steps_of_the_raw_optimizer_count_as_well(make):
    module, twin = ManualRaw(make), by_hand(Manual, make=make)
    fit(module, decay())
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("make", SOME.values(), ids=SOME)
@pytest.mark.parametrize("after", [1, 3, 4])
def test_an_interrupted_and_resumed_run(make, after, tmp_path):
    module, twin = Module(make), by_hand(make=make)
    fit(twin, HandMade(1.0, 0.0))
    fit(Module(make), decay(), SaveAfter(tmp_path, after))
    fit(module, decay(), ckpt_path=tmp_path / f"{after}.ckpt")
    assert_identical_weights(weights(module), weights(twin))


# --------------------------------------------------------------------------------------------------------------------
# The list and its dictionaries are the user's, whenever somebody looks


class TwoGroups(Module):
    """Groups of the user's, with names, a ratio of two and two rates; makes its optimizer once."""

    def __init__(self, make=adamw, make_scheduler=None, **options):
        super().__init__(make, make_scheduler, **options)
        self.optimizer = make(self.groups())
        self.layout = Layout(self.optimizer)

    def groups(self):
        first, second = [*self.hidden.parameters(), *self.norm.parameters()], [*self.output.parameters()]
        return [
            {"params": first, "lr": 0.05, "weight_decay": 0.2, "name": "backbone"},
            {"params": second, "lr": 0.1, "weight_decay": 0.1, "name": "head"},
        ]

    def configure_optimizers(self):
        self.make_optimizer = lambda _: self.optimizer
        return super().configure_optimizers()


MOMENTS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
]


def calls(name, function):
    """A hook of any signature that calls ``function``."""

    def hook(self, *args, **kwargs):
        function(name)

    return hook


def looking(function):
    """A callback that calls ``function`` in every hook of training."""
    hooks = [*MOMENTS, "on_fit_start", "on_fit_end", "on_save_checkpoint"]
    return type("Looking", (L.Callback,), {name: calls(name, function) for name in hooks})()


class Looks(TwoGroups):
    """Looks in all of its own hooks."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = set()

    def look(self, moment):
        self.layout.check()
        self.seen.add(moment)

    def training_step(self, batch, batch_idx):
        self.look("training_step")
        return super().training_step(batch, batch_idx)

    def backward(self, loss):
        self.look("backward")
        super().backward(loss)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.look("optimizer_zero_grad")
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.look("configure_gradient_clipping")
        self.clip_gradients(optimizer, 0.1, "value")

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        def closure():
            self.look("closure")
            loss = optimizer_closure()
            self.look("after the closure")
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.look("optimizer_step")

    def lr_scheduler_step(self, scheduler, metric):
        self.look("lr_scheduler_step")
        super().lr_scheduler_step(scheduler, metric)


for _name in MOMENTS:
    setattr(Looks, _name, lambda self, *args, _name=_name: self.look(_name))


OWN = ("training_step", "backward", "optimizer_zero_grad", "configure_gradient_clipping", "closure", "optimizer_step")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("options", [dict, scaled, lambda: {"accumulate_grad_batches": 2}], ids=["", "scaled", "acc."])
def test_in_every_hook_of_the_module_and_of_other_callbacks(options, place, tmp_path):
    scheduler = functools.partial(lr_scheduler.StepLR, step_size=2)
    module, seen = Looks(make_scheduler=scheduler, dtype=torch.float32), set()
    module.configure_optimizers()
    scheduler(module.optimizer)  # writes `initial_lr`
    module.layout = Layout(module.optimizer)

    def look(moment):
        module.layout.check()
        seen.add(moment)

    callbacks = [looking(look), decay()] if place == "before" else [decay(), looking(look)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an epoch of accumulation has fewer steps than the schedule
        fit(module, *callbacks, SaveAfter(tmp_path, 1), **options())
    module.layout.check()
    assert {*MOMENTS, *OWN, "lr_scheduler_step", "after the closure"} <= module.seen
    assert {*MOMENTS, "on_save_checkpoint"} <= seen
    assert [group["weight_decay"] for group in module.optimizer.param_groups] == [0.2, 0.1]


class StopError(Exception):
    pass


class Raises(TwoGroups):
    """Raises in one of its hooks after three steps, when the weight decay of all groups is 0."""

    def __init__(self, moment):
        super().__init__(Failing)
        self.moment = moment

    def arrive(self, moment):
        if moment == self.moment and self.trainer.global_step == 3:
            raise StopError(moment)

    def training_step(self, batch, batch_idx):
        self.arrive("training_step")
        return super().training_step(batch, batch_idx)

    def backward(self, loss):
        super().backward(loss)
        self.arrive("backward")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.arrive("configure_gradient_clipping")

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.optimizer.fails = self.moment == "update" and self.trainer.global_step == 3
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Failing(Plain):
    """Raises while it changes weights, when it is told to."""

    fails = False

    def update(self, group, i):
        super().update(group, i)
        if self.fails and i == 1:
            raise StopError("update")


for _name in MOMENTS[:-1]:
    setattr(Raises, _name, lambda self, *args, _name=_name: self.arrive(_name))

INSIDE = [
    "training_step",
    "backward",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "update",
    "on_train_batch_start",
    "on_train_batch_end",
]


class SavesOnException(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        pl_module.layout.check()
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("moment", INSIDE)
def test_after_an_exception_and_in_the_checkpoint_that_is_saved_then(moment, place, tmp_path):
    module, ours, saves = Raises(moment), decay(), SavesOnException(tmp_path / "x.ckpt")
    with pytest.raises(StopError, match=moment):
        fit(module, *([saves, ours] if place == "before" else [ours, saves]))
    module.layout.check()
    optimizer = module.optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert not {"step", "_regularizer"} & vars(optimizer).keys()
    (saved,) = torch.load(tmp_path / "x.ckpt", weights_only=True)["optimizer_states"]
    assert [set(group) for group in saved["param_groups"]] == [set(keys) for keys in module.layout.keys]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2, 3], [4, 5]]
    # It goes on: the callback, the optimizer and the checkpoint are fit to be used.
    again = watch(TwoGroups(Plain), decay(), ckpt_path=tmp_path / "x.ckpt")
    assert again.decays("hidden.weight") == list(DECAYS[3 : 3 + len(again.steps)])
    assert again.decays("output.weight") == [0.5 * value for value in again.decays("hidden.weight")]
    assert len(again.steps) >= 2
    module.moment = ""
    fit(module, ours)
    module.layout.check()


# lightning 2.6 resumes with it of its own accord
@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model:UserWarning")
@pytest.mark.filterwarnings("ignore:.*no last checkpoint available:UserWarning")
def test_lightnings_own_checkpoint_on_exception(tmp_path):
    module = Raises("update")
    with pytest.raises(StopError):
        fit(module, decay(), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    (saved,) = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["optimizer_states"]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("make", [adamw, functools.partial(optim.SGD, lr=0.1, momentum=0.9), Plain])
def test_the_optimizer_in_a_checkpoint_has_the_layout_of_a_run_without_us(make, tmp_path):
    states = []
    for i, callbacks in enumerate([(), (decay(),)]):
        folder = tmp_path / str(i)
        fit(TwoGroups(make), *callbacks, SaveAfter(folder, 2, 6))
        loaded = [torch.load(folder / f"{step}.ckpt", weights_only=True)["optimizer_states"][0] for step in (2, 6)]
        for saved in loaded:
            for group in saved["param_groups"]:
                group["weight_decay"] = "whatever"
        states.append(
            [(saved["param_groups"], {i: list(state) for i, state in saved["state"].items()}) for saved in loaded]
        )
    assert states[0] == states[1]


# --------------------------------------------------------------------------------------------------------------------
# LR schedulers

LR_SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda k: 0.5**k, lambda k: 0.8**k]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda k: 0.5, lambda k: 0.8]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.3], step_size_up=2, cycle_momentum=False),
    "CyclicLR momentum": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.3], step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.3], total_steps=7),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, [0.01, 0.02], anneal_epochs=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[0.001, 0.02]),
}


class Logging(TwoGroups):
    """Logs a number that does not depend on the weights, for ReduceLROnPlateau."""

    def training_step(self, batch, batch_idx):
        self.log("pace", float(batch_idx), batch_size=1)
        return super().training_step(batch, batch_idx)


class Values(L.Callback):
    """All that the groups hold before each batch and at the end, but for their weight decay."""

    def __init__(self):
        self.values = []

    def on_train_batch_start(self, trainer, *_):
        for group in trainer.optimizers[0].param_groups:
            held = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
            self.values.append(copy.deepcopy(held))

    def on_train_end(self, trainer, *_):
        self.on_train_batch_start(trainer)


def test_the_table_of_schedulers_is_complete():
    classes = {
        cls.__name__
        for _, cls in inspect.getmembers(lr_scheduler, inspect.isclass)
        if cls.__module__ == "torch.optim.lr_scheduler"
    }
    base = {"LRScheduler", "_LRScheduler", "Counter", "partial", "_enable_get_lr_call", "_initial_mode"}
    assert {name for name in classes - base if not name.startswith("_")} <= {name.split()[0] for name in LR_SCHEDULERS}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_schedulers_end_in_the_state_that_they_have_without_us(name, tmp_path):
    make = functools.partial(optim.SGD, lr=0.1, momentum=0.9)
    found = []
    for callbacks in [(), (decay(),)]:
        options = {"monitor": "pace", "strict": True} if name == "ReduceLROnPlateau" else {}
        module, values = Logging(make, LR_SCHEDULERS[name], **options), Values()
        witness = Witness()
        trainer = make_trainer(*callbacks, values, witness, max_epochs=EPOCHS)
        trainer.fit(module, Batches(BATCHES))
        state = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        state = {key: value for key, value in state.items() if not callable(value)}
        found.append((state, [lrs for _, _, lrs in witness.steps], values.values))
    (state, rates, values), (our_state, our_rates, our_values) = found
    assert repr(our_state) == repr(state)
    assert our_rates == rates
    assert our_values == values


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR", "CyclicLR", "SequentialLR"])
def test_schedulers_of_a_resumed_run(name, tmp_path):
    make = functools.partial(optim.SGD, lr=0.1, momentum=0.9)
    whole = watch(TwoGroups(make, LR_SCHEDULERS[name]))
    fit(TwoGroups(make, LR_SCHEDULERS[name]), decay(), SaveAfter(tmp_path, 2))
    resumed = watch(TwoGroups(make, LR_SCHEDULERS[name]), decay(), ckpt_path=tmp_path / "2.ckpt")
    assert [lrs for _, _, lrs in resumed.steps] == [lrs for _, _, lrs in whole.steps[2:]]


class TimmScheduler:
    """As timm's: no LRScheduler; writes each group's rate by its place, with a warm-up of one rate for all."""

    def __init__(self, optimizer, warmup=3, warmup_lr=1e-6):
        self.optimizer, self.warmup, self.warmup_lr = optimizer, warmup, warmup_lr
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_values = [group["initial_lr"] for group in optimizer.param_groups]
        self.update_groups([warmup_lr] * len(self.base_values))

    def update_groups(self, values):
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            group["lr"] = value * group.get("lr_scale", 1.0)

    def step_update(self, step):
        steps = [(value - self.warmup_lr) / self.warmup for value in self.base_values]
        if step < self.warmup:
            self.update_groups([self.warmup_lr + step * each for each in steps])
        else:
            self.update_groups([value * 0.5 ** (step - self.warmup) for value in self.base_values])

    def step(self, *_):
        pass

    def state_dict(self):
        return {"base_values": self.base_values}

    def load_state_dict(self, state_dict):
        self.base_values = state_dict["base_values"]


def real_timm(optimizer):
    scheduler = pytest.importorskip("timm.scheduler", exc_type=ImportError)
    return scheduler.CosineLRScheduler(optimizer, t_initial=6, warmup_t=3, warmup_lr_init=1e-6, t_in_epochs=False)


class WithTimm(TwoGroups):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step_update(self.trainer.global_step)


class WithTimmInOneGroup(WithTimm):
    def groups(self):
        return [{"params": list(self.parameters()), "lr": 0.1}]


class WithLayerScales(WithTimm):
    def groups(self):
        first, second = super().groups()
        return [{**first, "lr_scale": 0.5}, {**second, "lr_scale": 1.0}]


@pytest.mark.parametrize("make_scheduler", [TimmScheduler, real_timm])
@pytest.mark.parametrize("cls", [WithTimmInOneGroup, WithTimm, WithLayerScales])
def test_timms_schedulers_write_the_rates_that_they_write_without_us(cls, make_scheduler):
    alone, beside = (watch(cls(adamw, make_scheduler), *callbacks) for callbacks in [(), (decay(),)])
    assert [lrs for _, _, lrs in beside.steps] == [lrs for _, _, lrs in alone.steps]
    assert beside.lrs("output.bias")[0] <= 1e-6
    assert beside.lrs("output.bias")[3] == 0.1


# --------------------------------------------------------------------------------------------------------------------
# Others who know the groups by their place, their number or their name


class WithBackbone(Module):
    """For Lightning's callbacks, which want an attribute of this name."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.backbone = nn.Sequential(self.hidden, self.norm)

    def configure_optimizers(self):
        return optim.SGD([p for p in self.output.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Unfreezing(BaseFinetuning):
    """A user's own: one layer more in each epoch, each in its group."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.hidden, pl_module.norm])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.norm, optimizer, lr=0.03)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.hidden, optimizer, lr=0.01)


def rate_doubles(epoch):
    return 2.0


FINETUNING = {
    "BackboneFinetuning": lambda: BackboneFinetuning(1, lambda_func=rate_doubles, backbone_initial_lr=1e-4),
    "BackboneFinetuning, aligned": lambda: BackboneFinetuning(
        2, lambda_func=rate_doubles, backbone_initial_ratio_lr=0.1
    ),
    "one's own": Unfreezing,
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("make", FINETUNING.values(), ids=FINETUNING)
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_callbacks_that_add_groups_and_write_the_last_ones_rate(make, place):
    witnesses, groups = [], []
    for callbacks in [
        [make()],
        [make(), WeightDecay(0.3)] if place == "before" else [WeightDecay(0.3), make()],
    ]:
        module, witness = WithBackbone(), Witness()
        trainer = make_trainer(*callbacks, witness, max_epochs=4)
        trainer.fit(module, Batches(BATCHES))
        witnesses.append(witness)
        groups.append([[key for key in group if key != "weight_decay"] for group in trainer.optimizers[0].param_groups])
    assert [lrs for _, _, lrs in witnesses[0].steps] == [lrs for _, _, lrs in witnesses[1].steps]
    assert groups[0] == groups[1]
    for _, decays, _ in witnesses[1].steps:
        assert {name: value for name, value in decays.items() if name in EXCLUDED and value} == {}
    assert {name for name, value in witnesses[1].steps[-1][1].items() if value == 0.3} == {
        "hidden.weight",
        "output.weight",
    }


@pytest.mark.parametrize("rates", [[0.03, 0.01], 0.05], ids=["a list", "a number"])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.filterwarnings("ignore:Swapping lr_scheduler:UserWarning")
def test_stochastic_weight_averaging_with_one_rate_for_each_group(place, rates):
    found = []
    for ours in [[], [WeightDecay(0.3)]]:
        averaging = StochasticWeightAveraging(swa_lrs=rates, swa_epoch_start=1, annealing_epochs=2)
        callbacks = [averaging, *ours] if place == "before" else [*ours, averaging]
        module, witness = TwoGroups(functools.partial(optim.SGD, lr=0.1)), Witness()
        make_trainer(*callbacks, witness, max_epochs=4).fit(module, Batches(BATCHES))
        found.append([lrs for _, _, lrs in witness.steps])
    assert found[0] == found[1]


class ByZip(TwoGroups):
    def optimizer_step(self, *args, **kwargs):
        for group, rate in zip(self.optimizer.param_groups, (0.001, 0.1), strict=True):
            group["lr"] = rate
        super().optimizer_step(*args, **kwargs)


class ByPlace(TwoGroups):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"] = 0.001, 0.1 / (1 + batch_idx)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


class ByName(TwoGroups):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        for group in optimizer.param_groups:
            if group["name"] == "backbone":
                group["lr"] = 0.001 * (1 + batch_idx)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


class ByADictionaryThatWasKept(TwoGroups):
    def on_train_batch_start(self, batch, batch_idx):
        self.layout.groups[1]["lr"] = 0.1 / (1 + batch_idx)


class InAClosure(TwoGroups):
    def training_step(self, batch, batch_idx):
        self.optimizers().param_groups[0]["lr"] = 0.01 * (1 + batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("cls", [ByZip, ByPlace, ByName, ByADictionaryThatWasKept, InAClosure])
def test_modules_that_address_their_groups(cls):
    alone, beside = (watch(cls(), *callbacks) for callbacks in [(), (decay(),)])
    assert [lrs for _, _, lrs in beside.steps] == [lrs for _, _, lrs in alone.steps]


class Growing(Module):
    """Appends layers to its group at the beginning of the second epoch; a resumed run has them from the beginning."""

    late = ("output.weight", "output.bias", "norm.weight")

    def __init__(self, make=adamw, *, is_resumed=False):
        super().__init__(make)
        self.is_resumed = is_resumed

    def configure_optimizers(self):
        given = dict(self.named_parameters())
        self.added = [given[name] for name in self.late]
        early = [p for name, p in given.items() if name not in self.late]
        return self.make_optimizer([*early, *self.added] if self.is_resumed else early)

    def on_train_epoch_start(self):
        if self.current_epoch == 1 and not self.is_resumed:
            self.optimizers().param_groups[0]["params"].extend(self.added)


class GrowingByHand(Growing):
    def configure_optimizers(self):
        given = dict(self.named_parameters())
        self.added = [given[name] for name in self.late]
        first, second = (
            [p for n, p in given.items() if n not in self.late and (n in EXCLUDED) is w] for w in (False, True)
        )
        return self.make_optimizer([{"params": first}, {"params": second}])

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            weight, bias, gain = self.added
            self.optimizers().param_groups[0]["params"].append(weight)
            self.optimizers().param_groups[1]["params"].extend([bias, gain])


@pytest.mark.parametrize(
    "make", [adamw, functools.partial(optim.SGD, lr=0.1, momentum=0.9), functools.partial(adamw, fused=True)]
)
def test_parameters_that_are_appended_to_a_group_in_mid_run(make, tmp_path):
    module, twin, resumed = Growing(make), GrowingByHand(make), Growing(make, is_resumed=True)
    witness = watch(module, decay(), SaveAfter(tmp_path, 4))
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))
    for name in Growing.late:
        assert witness.steps[-1][1][name] == (0.0 if name in EXCLUDED else DECAYS[-1])
    fit(resumed, decay(), ckpt_path=tmp_path / "4.ckpt")
    assert_identical_weights(weights(resumed), weights(twin))


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints: with other rules, with and without us


class ByPlaceInGroup(optim.AdamW):
    """As bitsandbytes: its own ``load_state_dict``, which goes by the order of parameters over all groups."""

    def load_state_dict(self, state_dict):
        held = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, held, strict=True):
            self.state[p] = {k: v.clone() if torch.is_tensor(v) else v for k, v in state_dict["state"][i].items()}
        for group, values in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})


class ByNewDictionaries(ByPlaceInGroup):
    """Likewise, with new dictionaries in a new list."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.param_groups = [dict(group) for group in self.param_groups]


class WithSomethingMore(optim.AdamW):
    """Keeps a counter of its own beside what torch keeps."""

    loads = 0

    def state_dict(self):
        return {**super().state_dict(), "loads": self.loads}

    def load_state_dict(self, state_dict):
        self.loads = state_dict["loads"] + 1
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


LOADING = [optim.AdamW, ByPlaceInGroup, ByNewDictionaries, WithSomethingMore]
CHANGES = {
    "other rules": (lambda: decay(), lambda: decay(exclude=("output.*",))),
    "other factors": (lambda: decay(), lambda: decay(factors={"output.weight": 0.5})),
    "without us, then with": (lambda: L.Callback(), lambda: decay()),
    "with us, then without": (lambda: decay(), lambda: L.Callback()),
}


class Remembers(L.Callback):
    """The moments of each parameter, at the beginning and at the end."""

    def of(self, trainer, pl_module):
        state = trainer.optimizers[0].state
        return {name: state[p]["exp_avg"].clone() for name, p in pl_module.named_parameters() if p in state}

    def on_train_start(self, trainer, pl_module):
        self.first = self.of(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 3:
            self.third = self.of(trainer, pl_module)


@pytest.mark.parametrize("cls", LOADING)
@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:WeightDecay differs from the checkpoint's:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_each_weight_keeps_its_own_moments(before, after, cls, tmp_path):
    """Layers of one shape, of which an exchange would not be noticed by torch."""
    saved, found = Remembers(), Remembers()
    fit(Square(cls), before(), saved, SaveAfter(tmp_path, 3))
    resumed, twin = Square(cls), Square(cls)
    fit(resumed, after(), found, ckpt_path=tmp_path / "3.ckpt")
    torch.testing.assert_close(found.first, saved.third, rtol=0, atol=0)
    assert len(found.first) == 6
    twin.load_state_dict(torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"])
    assert all(not torch.equal(p, q) for p, q in zip(resumed.parameters(), twin.parameters(), strict=True))


class Square(Module):
    """All weights have one shape, and all vectors."""

    def __init__(self, make, **options):
        super().__init__(functools.partial(make, lr=0.1), **options)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.hidden, self.norm, self.output = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)
        self.double()

    def loss(self, batch):
        x, _ = batch
        return super().loss((x, x.roll(1, dims=1)))


@pytest.mark.parametrize("name", ["SOAP", "Shampoo", "AdaBelief", "Lion"])
@pytest.mark.filterwarnings("ignore")
def test_optimizers_of_others_resume_with_other_rules_and_without_us(name, tmp_path):
    cls = getattr(pytest.importorskip("pytorch_optimizer"), name)
    make = functools.partial(cls, lr=0.01)
    fit(Module(make, dtype=torch.float32), decay(), SaveAfter(tmp_path, 3))
    for i, callbacks in enumerate([[decay()], [decay(exclude=("output.*",))], []]):
        module, twin = Module(make, dtype=torch.float32), Module(make, dtype=torch.float32)
        fit(module, *callbacks, ckpt_path=tmp_path / "3.ckpt")
        if i == 0:
            fit(twin, decay())
            assert_identical_weights(weights(module), weights(twin))


class Sharded(Module):
    def configure_model(self):
        if not getattr(self, "is_sharded", False):
            self.is_sharded = True
            for layer in (self.hidden, self.norm, self.output, self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def fit_layout(rank, world_size, layout, callbacks, save, resume):
    warnings.simplefilter("ignore")  # torch's and Lightning's, of checkpoints
    options = {"max_epochs": 1, "devices": world_size}
    if layout != "plain":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=layout == "sharded")
        options["strategy"] = strategy
    module = Module() if layout == "plain" else Sharded()
    witness, saves = Witness(), [] if save is None else [SaveAt(save)]
    trainer = make_trainer(*callbacks, *saves, witness, **options)
    trainer.fit(module, Batches(STEPS), ckpt_path=resume)
    full = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for n, p in module.named_parameters()}
    groups = [sorted({*group} - {"param_names"}) for group in trainer.optimizers[0].param_groups]
    return full, [decays for _, decays, _ in witness.steps], groups


class SaveAt(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", ["with", "without"])
@pytest.mark.parametrize("layout", ["plain", "sharded", "full"])
def test_a_run_without_us_goes_on_with_us_and_the_reverse(layout, first, tmp_path):
    """On two processes with FSDP2, in torch's sharded and full checkpoints."""
    path, count = str(tmp_path / "three.ckpt"), 1 if layout == "plain" else 2
    run = functools.partial(run_distributed, fit_layout, layout, world_size=count)
    with_us, without = [decay()], []
    before, after = (with_us, without) if first == "with" else (without, with_us)
    (_, decays_before, groups), *_ = run(before, path, None)
    (found, decays, groups_after), *_ = run(after, None, path)
    assert groups == groups_after
    ours = dict.fromkeys(EXCLUDED, 0.0)
    for k, each in enumerate([*decays_before[:3], *decays]):
        if (k < 3) == (first == "with"):
            assert each == {**each, **ours}
            assert each["hidden.weight"] == DECAYS[k]
        else:
            assert len(set(each.values())) == 1
    # By hand: three steps of the one, three of the other.
    twin = Module()
    groups = split(twin, EXCLUDED)
    optimizer = adamw(groups)
    for k, batch in enumerate(Batches(STEPS)):
        is_ours = (k < 3) == (first == "with")
        for group, factor in zip(optimizer.param_groups, (1.0, 0.0), strict=True):
            # Without us a group of a resumed run has what the checkpoint says.
            group["weight_decay"] = factor * DECAYS[k] if is_ours else 0.01 if first == "without" else DECAYS[3]
        optimizer.zero_grad()
        twin.loss(batch).backward()
        optimizer.step()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(torch.tensor(found[name], dtype=p.dtype), p.detach(), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# Optimizers that hold others, and others that are peculiar


def muon_and_adamw(make, by_hand=False):
    """Muon for the matrices, AdamW for the rest, in one optimizer; of each something decays, and something does not."""

    def make_optimizer(module):
        named = list(module.named_parameters())
        optimizers = []
        for cls, is_matrix in ((optim.Muon, True), (optim.AdamW, False)):
            held = [(name, p) for name, p in named if (p.dim() == 2) is is_matrix]
            parts = [[p for name, p in held if (name in REST) is wanted] for wanted in (False, True)]
            groups = [{"params": part} for part in parts] if by_hand else [{"params": [p for _, p in held]}]
            optimizers.append(cls(groups, lr=0.1, weight_decay=0.1))
        return make(*optimizers)

    return make_optimizer


class Combining(Module):
    def __init__(self, make_optimizer):
        super().__init__(make_scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.5**k))
        self.make_optimizer = lambda _: make_optimizer(self)


@pytest.mark.parametrize("make", COMBINED.values(), ids=COMBINED)
def test_several_optimizers_in_one(make, tmp_path):
    twin = Combining(muon_and_adamw(make, by_hand=True))
    fit(twin, HandMade(1.0, 0.0, 1.0, 0.0))
    module = Combining(muon_and_adamw(make))
    fit(module, decay(**RULES), SaveAfter(tmp_path, 3))
    assert_identical_weights(weights(module), weights(twin))
    resumed = Combining(muon_and_adamw(make))
    fit(resumed, decay(**RULES), ckpt_path=tmp_path / "3.ckpt")
    assert_identical_weights(weights(resumed), weights(twin))


@pytest.mark.parametrize("make", COMBINED.values(), ids=COMBINED)
def test_the_rates_and_decays_of_several_optimizers_in_one_are_logged(make, tmp_path):
    """LearningRateMonitor reads the groups at the beginning of a batch."""

    logger = Keeping()
    monitor = LearningRateMonitor("step", log_weight_decay=True)
    fit(Combining(muon_and_adamw(make)), monitor, decay(**RULES), logger=logger)
    for i in (1, 2):
        rates = [value for key, value in logger.rows if key.startswith("lr-") and key.endswith(f"/pg{i}")]
        decays = [value for key, value in logger.rows if key.endswith(f"/pg{i}-weight_decay")]
        assert rates == [0.1 * 0.5**k for k in range(STEPS)]
        assert decays == list(DECAYS)


WRAPPERS = {
    "Lookahead": lambda groups: Lookahead(adamw(groups)),
    "orthogonal gradients": lambda groups: Orthogonal(adamw(groups)),
    "one around the other": lambda groups: Lookahead(Orthogonal(optim.SGD(groups, lr=0.1, momentum=0.9))),
    "no optimizer": lambda groups: ActsAsOne(adamw(groups)),
    "no optimizers in a list": lambda groups: ActsAsOne(CombinedByProperty(ActsAsOne(adamw(groups)))),
}


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
def test_optimizers_that_hold_the_real_one(make, tmp_path):
    module, twin, resumed = Module(), Module(), Module()
    module.make_optimizer = resumed.make_optimizer = lambda parameters: make(list(parameters))
    twin.make_optimizer = lambda _: make(split(twin))
    fit(module, decay(), SaveAfter(tmp_path, 3))
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))
    fit(resumed, decay(), ckpt_path=tmp_path / "3.ckpt")
    assert_identical_weights(weights(resumed), weights(twin))


@pytest.mark.filterwarnings("ignore:The Trainer has no logger")
@pytest.mark.parametrize(
    "make", [decay, functools.partial(L1Penalty, 0.1), WeightNormMonitor], ids=["decay", "L1", "monitor"]
)
def test_what_only_acts_as_an_optimizer_is_refused_before_any_weight_changes(make):
    module = Module(StepsByItself)
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"StepsByItself is no torch\.optim\.Optimizer and holds none"):
        fit(module, make())
    assert_identical_weights(weights(module), before)


def test_a_summary_of_what_only_acts_as_an_optimizer(capsys):
    fit(Module(StepsByItself), RegularizationSummary())
    assert "hidden.weight" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Lookahead", "OrthoGrad"])
@pytest.mark.filterwarnings("ignore")
def test_optimizers_of_pytorch_optimizer_that_hold_the_real_one(name):
    cls = getattr(pytest.importorskip("pytorch_optimizer"), name)
    module, twin = Module(dtype=torch.float32), Module(dtype=torch.float32)
    module.make_optimizer = lambda _: cls(adamw(ordered(module)))
    twin.make_optimizer = lambda _: cls(adamw(split(twin)))
    fit(module, decay())
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


def real_adabound(groups):
    return pytest.importorskip("pytorch_optimizer").AdaBound(groups, lr=0.1)


@pytest.mark.parametrize("make", [AdaBound, AdaBoundByZip, real_adabound])
def test_adabound(make):
    module, twin = Module(make, dtype=torch.float32), by_hand(make=make, dtype=torch.float32)
    fit(module, decay())
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


def test_lbfgs_by_the_decoupled_method():
    make = functools.partial(optim.LBFGS, lr=0.1, max_iter=3)
    module, twin = Module(make), Module(make)

    class ByHand(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            with torch.no_grad():
                for name, p in pl_module.named_parameters():
                    p.mul_(1 - 0.1 * DECAYS[trainer.global_step] * (name not in EXCLUDED))

    fit(module, decay(method="decoupled"))
    fit(twin, ByHand())
    torch.testing.assert_close(weights(module), weights(twin), rtol=0, atol=1e-12)


def test_lbfgs_is_refused_where_the_optimizer_should_decay():
    with pytest.raises(MisconfigurationException, match=r"LBFGS has no `weight_decay`.*method='decoupled'"):
        fit(Module(functools.partial(optim.LBFGS, lr=0.1)), decay())


class Early(Plain):
    """Reads its groups before it evaluates the closure."""

    def step(self, closure=None):
        groups = self.param_groups
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for i, group in enumerate(groups):
                self.update(group, i)
        return loss


def test_an_optimizer_that_reads_its_groups_before_the_closure_is_refused_in_its_first_step():
    with pytest.raises(MisconfigurationException, match=r"Early does not read its.*method='decoupled'"):
        fit(Module(Early), decay())
    fit(Module(Early), decay(method="decoupled"))


# --------------------------------------------------------------------------------------------------------------------
# Somebody else writes the weight decay


class Writes(Module):
    """Writes a weight decay of its own at one moment of each batch."""

    def __init__(self, moment, value=0.9):
        super().__init__()
        self.moment, self.value = moment, value

    def write(self, moment, optimizer=None):
        if moment == self.moment:
            (optimizer or self.optimizers()).param_groups[0]["weight_decay"] = self.value

    def on_train_batch_start(self, batch, batch_idx):
        self.write("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        self.write("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer):
        self.write("on_before_zero_grad")

    def on_after_backward(self):
        self.write("on_after_backward")

    def on_before_optimizer_step(self, optimizer):
        self.write("on_before_optimizer_step")

    def configure_gradient_clipping(self, optimizer, **_):
        self.write("configure_gradient_clipping")

    def on_train_start(self):
        hook = functools.partial(self._from_hook, "a hook of the optimizer")
        self.trainer.optimizers[0].register_step_pre_hook(hook)

    def _from_hook(self, moment, optimizer, args, kwargs):
        self.write(moment, optimizer)

    def on_train_batch_end(self, *_):
        self.write("on_train_batch_end")


WRITING = [
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "a hook of the optimizer",
    "on_train_batch_end",
]


@pytest.mark.parametrize("moment", WRITING)
def test_a_value_that_somebody_else_writes_is_overridden_with_one_warning(moment):
    module, twin, logger = Writes(moment), by_hand(), Keeping()
    with pytest.warns(UserWarning, match=r"Somebody has set weight_decay=0\.9 in group 'pg1' of AdamW") as told:
        witness = watch(module, decay(), logger=logger)
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))
    assert witness.decays() == list(DECAYS)
    assert [value for key, value in logger.rows if key == "weight_decay"] == list(DECAYS)
    assert len([w for w in told if "Somebody has set" in str(w.message)]) == 1


class WritesFromACallback(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        optimizer.param_groups[0]["weight_decay"] = 0.9


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_value_that_another_callback_writes_is_overridden(place):
    module, twin = Module(), by_hand()
    callbacks = [WritesFromACallback(), decay()] if place == "before" else [decay(), WritesFromACallback()]
    with pytest.warns(UserWarning, match=r"Somebody has set weight_decay=0\.9"):
        fit(module, *callbacks)
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("given", [0.0, 0.7])
def test_loading_a_checkpoint_is_no_override(given, tmp_path):
    """The suite turns a warning into an error."""
    make = functools.partial(adamw, weight_decay=given)
    fit(Module(make), decay(), SaveAfter(tmp_path, 3))
    fit(Module(make), decay(), ckpt_path=tmp_path / "3.ckpt")


# --------------------------------------------------------------------------------------------------------------------
# Two of us, and optimizers without a learning rate

TWO = {
    "equal": lambda: [WeightDecay(0.1), WeightDecay(0.1)],
    "with other rules": lambda: [WeightDecay(0.1, exclude=("output.*",)), WeightDecay(0.2, exclude=("hidden.*",))],
    "with other methods": lambda: [WeightDecay(0.1), WeightDecay(0.1, method="decoupled")],
}


@pytest.mark.parametrize("callbacks", TWO.values(), ids=TWO)
def test_two_in_one_trainer_are_refused_by_our_own_message(callbacks):
    with pytest.raises(MisconfigurationException, match="2 WeightDecay callbacks would write over each other"):
        fit(Module(), *callbacks())


def test_the_trainers_takes_precedence_over_the_modules():
    module, twin = Module(), by_hand()
    fit(regularize(module, weight_decay=0.9), decay())
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


class ChoosesItsRate(Plain):
    """As transformers' Adafactor(lr=None)."""

    def __init__(self, params, **options):
        super().__init__(params, lr=None, **options)

    def update(self, group, i):
        for p in group["params"]:
            if p.grad is not None:
                p.mul_(1 - 0.1 * group["weight_decay"]).sub_(0.1 * p.grad)


def real_adafactor(groups):
    transformers = pytest.importorskip("transformers")
    return transformers.Adafactor(groups, lr=None)


@pytest.mark.parametrize("make", [ChoosesItsRate, real_adafactor])
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [decay()],
        lambda: [decay(method="independent")],
        lambda: [decay(method="coupled")],
        lambda: [L1Penalty(0.1)],
        lambda: [RegularizationSummary(), decay()],
    ],
    ids=["WeightDecay", "independent", "coupled", "L1Penalty", "RegularizationSummary"],
)
@pytest.mark.filterwarnings("ignore:.*RegularizationSummary:UserWarning")
def test_an_optimizer_that_chooses_its_rate(make, callbacks, capsys):
    fit(Module(make, dtype=torch.float32), *callbacks())


@pytest.mark.parametrize("make", [ChoosesItsRate, real_adafactor])
def test_the_weights_of_an_optimizer_that_chooses_its_rate(make):
    module, twin = Module(make, dtype=torch.float32), by_hand(make=make, dtype=torch.float32)
    fit(module, decay())
    fit(twin, HandMade(1.0, 0.0))
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("make", [ChoosesItsRate, real_adafactor])
@pytest.mark.parametrize(
    "callback",
    [
        lambda: decay(method="decoupled"),
        lambda: AnchorDecay(0.1),
        lambda: L1Penalty(0.1, method="proximal"),
    ],
    ids=["decoupled", "AnchorDecay", "proximal"],
)
def test_where_a_rate_is_needed_an_error_names_the_optimizer(make, callback):
    name = f"{type(callback()).__name__}.*{'ChoosesItsRate' if make is ChoosesItsRate else 'Adafactor'}"
    before = weights(module := Module(make, dtype=torch.float32))
    with pytest.raises((MisconfigurationException, ValueError), match=name):
        fit(module, callback())
    assert_identical_weights(weights(module), before)
