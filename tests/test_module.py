"""Oracles: groups made by hand, torch's own optimizers and schedulers, and the same module without us."""

import copy
import functools
import io
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import LBFGS, SGD, AdamW
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_regularize import WeightDecay
from lightning_regularize.module import RegularizedModule, grouping_of, regularize
from tests.models import MLP, VisionTransformer, randn

torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost ten times what the work does

DECAY = ["net.hidden.weight", "net.output.weight"]
NO_DECAY = ["net.hidden.bias", "net.norm.weight", "net.norm.bias", "net.output.bias"]


class Plain(pl.LightningModule):
    """A user's module; `configure` makes of it what `configure_optimizers` returns."""

    def __init__(self, configure=lambda module: SGD(module.parameters(), lr=0.1, weight_decay=0.1), width=5):
        super().__init__()
        self.save_hyperparameters("width")
        self.configure = configure
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.net = MLP(4, width, 2)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("loss", loss, logger=False)
        return loss

    def configure_optimizers(self):
        return self.configure(self)


class Manual(Plain):
    def __init__(self, configure):
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch).square().mean())
            optimizer.step()
        for scheduler in self.lr_schedulers() or []:
            scheduler.step()


def fit(module, *callbacks, steps=3):
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([randn(4, 4, seed=seed) for seed in range(steps)], batch_size=None))
    return trainer


def names_of(module, group):
    name = {id(parameter): name for name, parameter in module.named_parameters()}
    return [name[id(parameter)] for parameter in group["params"]]


def split_of(module, optimizer):
    return [(names_of(module, group), group["weight_decay"]) for group in optimizer.param_groups]


def by_hand(module, optimizer=SGD, weight_decay=0.1, **options):
    parameters = dict(module.named_parameters())
    groups = [
        {"params": [parameters[name] for name in DECAY], "weight_decay": weight_decay},
        {"params": [parameters[name] for name in NO_DECAY], "weight_decay": 0.0},
    ]
    return optimizer(groups, **{"lr": 0.1, **options})


def assert_same_weights(module, other):
    for (name, parameter), (_, expected) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, expected), name


# regularize(): whatever configure_optimizers returns

FORMS = {
    "optimizer": lambda optimizer, scheduler: optimizer,
    "list": lambda optimizer, scheduler: [optimizer],
    "tuple": lambda optimizer, scheduler: (optimizer,),
    "two lists": lambda optimizer, scheduler: ([optimizer], [scheduler]),
    "two lists with settings": lambda optimizer, scheduler: (
        [optimizer],
        [{"scheduler": scheduler, "interval": "epoch", "frequency": 1}],
    ),
    "dictionary": lambda optimizer, scheduler: {"optimizer": optimizer},
    "dictionary with a scheduler": lambda optimizer, scheduler: {"optimizer": optimizer, "lr_scheduler": scheduler},
    "dictionary with settings": lambda optimizer, scheduler: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    },
    "dictionary with a monitor": lambda optimizer, scheduler: {
        "optimizer": optimizer,
        "lr_scheduler": schedulers.ReduceLROnPlateau(optimizer, min_lr=[0.01]),
        "monitor": "loss",
    },
    "tuple of dictionaries": lambda optimizer, scheduler: ({"optimizer": optimizer, "lr_scheduler": scheduler},),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_that_lightning_accepts_is_split_and_otherwise_kept(form):
    def configure(module):
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        returned.append(form(optimizer, schedulers.LambdaLR(optimizer, [lambda epoch: 0.5**epoch])))
        return returned[-1]

    returned = []
    module, expected = regularize(Plain(configure)), Plain(lambda module: by_hand(module, momentum=0.9))
    assert module.configure_optimizers() is returned[0]
    trainer = fit(module)
    assert split_of(module, trainer.optimizers[0]) == [(DECAY, 0.1), (NO_DECAY, 0.0)]
    if len(trainer.lr_scheduler_configs) == 0 or trainer.lr_scheduler_configs[0].interval == "epoch":
        fit(expected)
        assert_same_weights(module, expected)


def test_training_with_a_scheduler_is_bit_for_bit_that_of_groups_made_by_hand():
    def configure(module):
        optimizer = AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
        scheduler = schedulers.OneCycleLR(optimizer, max_lr=[0.3], total_steps=9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def configure_by_hand(module):
        optimizer = by_hand(module, AdamW)
        scheduler = schedulers.OneCycleLR(optimizer, max_lr=[0.3, 0.3], total_steps=9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    module, expected = regularize(Plain(configure)), Plain(configure_by_hand)
    fit(module, steps=8)
    fit(expected, steps=8)
    assert_same_weights(module, expected)


# lightning: to train nothing is what this test is about
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
def test_no_optimizer_stays_none():
    module = regularize(Plain(lambda module: None))
    assert module.configure_optimizers() is None
    fit(module)
    assert_same_weights(module, Plain())


def test_several_optimizers_are_split_each_with_its_schedulers_and_names_of_its_own():
    def configure(module):
        first = SGD(module.net.hidden.parameters(), lr=0.1, weight_decay=0.1)
        second = AdamW(module.net.output.parameters(), lr=0.2, weight_decay=0.2)
        third = SGD(module.net.norm.parameters(), lr=0.3, weight_decay=0.3)
        optimizers = [first, second, third]
        return optimizers, [schedulers.LambdaLR(o, [lambda epoch: 0.5**epoch]) for o in optimizers]

    module = regularize(Manual(configure))
    first, second, third = fit(module, steps=6).optimizers  # three steps a batch
    assert split_of(module, first) == [(["net.hidden.weight"], 0.1), (["net.hidden.bias"], 0.0)]
    assert split_of(module, second) == [(["net.output.weight"], 0.2), (["net.output.bias"], 0.0)]
    assert split_of(module, third) == [(["net.norm.weight", "net.norm.bias"], 0.0)]
    assert [[group["name"] for group in optimizer.param_groups] for optimizer in (first, second)] == [
        ["optimizer0 decay", "optimizer0 no_decay"],
        ["optimizer1 decay", "optimizer1 no_decay"],
    ]
    assert [[group["lr"] for group in optimizer.param_groups] for optimizer in (first, second, third)] == [
        [0.1 * 0.5**2] * 2,
        [0.2 * 0.5**2] * 2,
        [0.3 * 0.5**2],
    ]


GROUPS = {
    "generator": lambda module: (parameter for parameter in module.parameters()),
    "named parameters": lambda module: module.named_parameters(),
    "list of dictionaries": lambda module: [{"params": module.parameters()}],
    "dictionary with names": lambda module: [{"params": module.named_parameters()}],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_parameters_may_come_in_any_way(groups):
    module = regularize(Plain(lambda module: SGD(groups(module), lr=0.1, weight_decay=0.1)))
    optimizer = module.configure_optimizers()
    assert split_of(module, optimizer) == [(DECAY, 0.1), (NO_DECAY, 0.0)]
    for group in optimizer.param_groups:
        assert group.get("param_names", names_of(module, group)) == names_of(module, group)


def three_groups(module):
    layers = {"hidden": 0.2, "norm": 0.1, "output": 0.0}
    groups = [
        {"params": getattr(module.net, name).parameters(), "name": name, "lr": 0.1 * i, "weight_decay": decay}
        for i, (name, decay) in enumerate(layers.items())
    ]
    return AdamW(groups)


@pytest.mark.parametrize(
    ("weight_decay", "expected"),
    [(None, [0.2, 0.0, 0.1, 0.0, 0.0, 0.0]), (1.0, [1.0, 0.0, 0.5, 0.0, 0.0, 0.0]), (0.0, [0.0] * 6)],
)
def test_groups_with_their_own_settings_keep_them(weight_decay, expected):
    module = regularize(Plain(three_groups), weight_decay, exclude=("bias",))
    groups = module.configure_optimizers().param_groups
    assert [group["weight_decay"] for group in groups] == expected
    assert [group["lr"] for group in groups] == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    names = ["hidden decay", "hidden no_decay", "norm decay", "norm no_decay", "output decay", "output no_decay"]
    assert [group["name"] for group in groups] == names


WITHOUT_WEIGHT_DECAY = {
    "LBFGS": lambda module: LBFGS(module.parameters()),
    "Rprop": lambda module: torch.optim.Rprop(module.parameters()),
    "SparseAdam": lambda module: torch.optim.SparseAdam(module.parameters()),
}


@pytest.mark.parametrize("configure", WITHOUT_WEIGHT_DECAY.values(), ids=WITHOUT_WEIGHT_DECAY)
def test_optimizers_without_weight_decay_are_left_whole(configure):
    for weight_decay in (None, 0.0):
        module = regularize(Plain(configure), weight_decay)
        (group,) = module.configure_optimizers().param_groups
        assert names_of(module, group) == [name for name, _ in module.named_parameters()]
        assert "name" not in group


@pytest.mark.parametrize("name", WITHOUT_WEIGHT_DECAY)
def test_weight_decay_for_an_optimizer_that_has_none_is_refused(name):
    module = regularize(Plain(WITHOUT_WEIGHT_DECAY[name]), 0.1)
    with pytest.raises(ValueError, match=f"{name} has no `weight_decay`: use another optimizer, or `regularize"):
        module.configure_optimizers()


def test_lbfgs_trains_as_before():
    configure = functools.partial(LBFGS, lr=0.1, max_iter=3)
    module, expected = (Plain(lambda module: configure(module.parameters())) for _ in range(2))
    fit(regularize(module))
    fit(expected)
    assert_same_weights(module, expected)


class KeepsItsOptimizer(Plain):
    def __init__(self, make_scheduler):
        super().__init__(lambda module: module.optimizer)
        self.optimizer = SGD(self.parameters(), lr=0.1, weight_decay=0.1)
        self.scheduler = make_scheduler(self.optimizer)


def test_factors_of_an_optimizer_that_is_kept_do_not_compound_in_a_second_fit():
    module = KeepsItsOptimizer(lambda optimizer: None)
    regularize(module, factors={"net.output.*": 0.5})
    for _ in range(2):
        optimizer = fit(module).optimizers[0]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.05, 0.0]
        assert [group["name"] for group in optimizer.param_groups] == ["decay", "decay x0.5", "no_decay"]


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: schedulers.LambdaLR(o, [lambda epoch: 0.5**epoch]),
        lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
        lambda o: schedulers.ReduceLROnPlateau(o, min_lr=[0.05], patience=0),
    ],
    ids=["LambdaLR", "CosineAnnealingWarmRestarts", "ReduceLROnPlateau"],
)
def test_a_scheduler_that_the_module_keeps_to_itself_goes_on(make_scheduler):
    module, plain = regularize(KeepsItsOptimizer(make_scheduler)), KeepsItsOptimizer(make_scheduler)
    optimizer, _ = module.configure_optimizers(), plain.configure_optimizers()
    for step in range(5):
        for m in (module, plain):
            m.optimizer.step()
            m.scheduler.step(*([1.0] if isinstance(m.scheduler, schedulers.ReduceLROnPlateau) else []))
        assert [g["lr"] for g in optimizer.param_groups] == [plain.optimizer.param_groups[0]["lr"]] * 2, step


def test_factors_and_exclusions_are_those_of_the_arguments():
    module = regularize(Plain(), 1.0, exclude=("*.bias",), factors={"net.hidden.*": 0.5})
    assert split_of(module, module.configure_optimizers()) == [
        (["net.norm.weight", "net.output.weight"], 1.0),
        (["net.hidden.weight"], 0.5),
        (["net.hidden.bias", "net.norm.bias", "net.output.bias"], 0.0),
    ]


# regularize(): the module stays what it was


def test_the_module_is_the_same_object_with_the_same_class_keys_and_hyperparameters():
    module, plain = Plain(width=6), Plain(width=6)
    assert regularize(module) is module
    assert type(module) is Plain
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain.named_modules()]
    assert dict(module.hparams) == {"width": 6}


def test_logging_and_the_hooks_of_the_module_work():
    trainer = fit(regularize(Plain()), steps=2)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["loss"] > 0


def test_checkpoints_are_those_of_the_class(tmp_path):
    module, plain = regularize(Plain(width=6), 0.1), Plain(width=6)
    trainer, plain_trainer = fit(module), fit(plain)
    trainer.save_checkpoint(tmp_path / "regularized.ckpt")
    plain_trainer.save_checkpoint(tmp_path / "plain.ckpt")
    saved, expected = (torch.load(tmp_path / f"{name}.ckpt") for name in ("regularized", "plain"))
    assert saved.keys() == expected.keys()
    assert saved["state_dict"].keys() == expected["state_dict"].keys()
    assert saved["hyper_parameters"] == expected["hyper_parameters"]
    loaded = Plain.load_from_checkpoint(tmp_path / "regularized.ckpt")
    assert loaded.hparams.width == 6
    assert_same_weights(loaded, module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def default_optimizer(module):
    return SGD(module.parameters(), lr=0.1, weight_decay=0.1)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])


@COPIES
def test_a_copy_configures_itself(copied):
    other = copied(regularize(Plain(default_optimizer), 0.3))
    assert split_of(other, other.configure_optimizers()) == [(DECAY, 0.3), (NO_DECAY, 0.0)]


class CopyWhileItTrains(pl.Callback):
    def __init__(self, copied):
        self.copied, self.copies = copied, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.copies.append(self.copied(pl_module))


@COPIES
@pytest.mark.parametrize(
    "make_callbacks",
    [
        pytest.param(list, id="alone"),
        pytest.param(lambda: [WeightDecay(0.2)], id="with WeightDecay"),
    ],
)
def test_a_copy_made_while_the_module_trains_configures_itself(copied, make_callbacks):
    copies = CopyWhileItTrains(copied)
    fit(regularize(Plain(default_optimizer), 0.3), *make_callbacks(), copies, steps=2)
    other = copies.copies[-1]
    fit(other, steps=1)
    assert split_of(other, other.configure_optimizers()) == [(DECAY, 0.3), (NO_DECAY, 0.0)]


@COPIES
def test_a_copy_with_an_optimizer_of_its_own_splits_it(copied):
    module = regularize(KeepsItsOptimizer(lambda optimizer: None))
    module.configure = its_optimizer
    other = copied(module)
    assert split_of(other, other.configure_optimizers()) == [(DECAY, 0.1), (NO_DECAY, 0.0)]


def its_optimizer(module):
    return module.optimizer


def test_the_last_call_wins():
    module = regularize(regularize(Plain(), 0.3, exclude=("weight",)), 0.2)
    assert split_of(module, module.configure_optimizers()) == [(DECAY, 0.2), (NO_DECAY, 0.0)]
    assert split_of(module, module.configure_optimizers()) == [(DECAY, 0.2), (NO_DECAY, 0.0)]


def test_what_hangs_on_the_instance_is_wrapped():  # LightningCLI sets `configure_optimizers` there
    module = Plain()
    module.configure_optimizers = functools.partial(default_optimizer, module)
    regularize(regularize(module, 0.3), 0.2)
    assert split_of(module, module.configure_optimizers()) == [(DECAY, 0.2), (NO_DECAY, 0.0)]


def test_lightning_still_sees_that_the_hook_is_overridden():
    assert is_overridden("configure_optimizers", regularize(Plain()))


class Forgetful(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = MLP()

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()


def test_lightning_still_sees_that_the_hook_is_missing():
    module = regularize(Forgetful())
    assert not is_overridden("configure_optimizers", module)
    with pytest.raises(MisconfigurationException, match=r"No `configure_optimizers\(\)` method defined"):
        fit(module)


def test_weight_decay_callback_takes_over_from_regularize():
    module = regularize(Plain(), 0.1, factors={"net.hidden.*": 0.5})
    trainer = fit(module, WeightDecay(0.4))
    assert split_of(module, trainer.optimizers[0]) == [
        (["net.output.weight"], 0.4),
        (["net.hidden.weight"], 0.2),
        (NO_DECAY, 0.0),
    ]


# torch.compile imports torch.utils.mkldnn, whose classes are still scripted (torch 2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compilation_comes_after():
    compiled = torch.compile(regularize(Plain(), 0.3))
    optimizer = compiled.configure_optimizers()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    with pytest.raises(TypeError, match=r"got OptimizedModule\. Call `regularize` before `torch\.compile`"):
        regularize(compiled)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: regularize(MLP()), TypeError, "`module` should be a LightningModule, got MLP"),
        (lambda: regularize(Plain(), -0.1), ValueError, "`weight_decay` should be finite and at least 0, got -0.1"),
        (lambda: regularize(Plain(), "0.1"), TypeError, "`weight_decay` should be a number, got '0.1'"),
        (lambda: regularize(Plain(), exclude="bias"), TypeError, "`exclude` should be a sequence of rules"),
        (lambda: regularize(Plain(), exclude=("biases",)), ValueError, r"Did you mean 'bias'\?"),
        (lambda: regularize(Plain(), factors={"weight": -1}), ValueError, "factor of 'weight' should be finite"),
    ],
    ids=["no LightningModule", "negative", "str", "one rule", "unknown word", "negative factor"],
)
def test_bad_arguments_are_refused_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ("nets.*",)}, r"'nets.\*' matches no parameter; the nearest are "),
        ({"factors": {"*.bias": 0.5}}, r"The factor of '\*.bias' never applies"),
        ({"exclude": ("*",)}, "Weight decay is positive, but every parameter is excluded"),
    ],
    ids=["idle rule", "idle factor", "all excluded"],
)
def test_what_does_not_fit_the_module_is_refused_before_it_trains(options, message):
    module = regularize(Plain(), 0.1, **options)
    with pytest.raises(ValueError, match=message):
        fit(module)
    assert_same_weights(module, Plain())


# RegularizedModule


class Classifier(RegularizedModule):
    """As a user writes it."""

    def __init__(self, width=5, lr=0.1, **options):
        super().__init__(**{"optimizer": functools.partial(SGD, lr=lr), "weight_decay": 0.1, **options})
        self.save_hyperparameters("width", "lr")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.net = MLP(4, width, 2)

    training_step = Plain.training_step


def test_a_regularized_module_trains_bit_for_bit_as_with_groups_made_by_hand():
    module, expected = Classifier(), Plain(by_hand)
    trainer = fit(module)
    fit(expected)
    assert split_of(module, trainer.optimizers[0]) == [(DECAY, 0.1), (NO_DECAY, 0.0)]
    assert_same_weights(module, expected)


def test_the_default_is_adamw_as_torch_has_it():
    class Default(RegularizedModule):
        def __init__(self):
            super().__init__()
            self.net = MLP()

    optimizer = Default().configure_optimizers()
    assert type(optimizer) is AdamW
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("decay", 1e-3, 0.01),
        ("no_decay", 1e-3, 0.0),
    ]


def test_exclude_and_factors_are_followed():
    module = Classifier(exclude=("norm",), factors={"bias": 0.5})
    assert split_of(module, module.configure_optimizers()) == [
        (DECAY, 0.1),
        (["net.hidden.bias", "net.norm.bias", "net.output.bias"], 0.05),
        (["net.norm.weight"], 0.0),
    ]


@pytest.mark.parametrize(("interval", "lr"), [("step", 0.1 * 0.5**3), ("epoch", 0.1 * 0.5)])
def test_the_scheduler_steps_at_the_interval(interval, lr):
    module = Classifier(lr_scheduler=functools.partial(schedulers.StepLR, step_size=1, gamma=0.5), interval=interval)
    trainer = fit(module, steps=3)  # one epoch
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [lr, lr]


def test_a_plateau_is_watched_each_epoch():
    module = Classifier(lr_scheduler=functools.partial(ReduceLROnPlateau, monitor="loss", mode="max", patience=0))
    config = module.configure_optimizers()["lr_scheduler"]
    assert (config["monitor"], config["interval"]) == ("loss", "epoch")
    assert fit(module).lr_scheduler_configs[0].monitor == "loss"


def test_a_plateau_without_a_monitor_is_refused():
    module = Classifier(lr_scheduler=schedulers.ReduceLROnPlateau)
    with pytest.raises(
        ValueError, match="`lr_scheduler` does not say which metric it watches: use the ReduceLROnPlateau"
    ):
        module.configure_optimizers()


class Pyramid(RegularizedModule):
    def __init__(self, **options):
        super().__init__(**options)
        self.net = VisionTransformer(depth=2)


@pytest.mark.parametrize("optimizer", [functools.partial(AdamW, lr=0.2), AdamW], ids=["lr", "default lr"])
def test_layer_decay_scales_the_rate_of_the_optimizer(optimizer):
    lr = 1e-3 if optimizer is AdamW else 0.2
    built = Pyramid(optimizer=optimizer, layer_decay=0.5).configure_optimizers()
    assert [(group["name"], group["lr"]) for group in built.param_groups] == [
        ("decay layer 0", lr / 8),
        ("no_decay layer 0", lr / 8),
        ("decay layer 1", lr / 4),
        ("no_decay layer 1", lr / 4),
        ("decay layer 2", lr / 2),
        ("no_decay layer 2", lr / 2),
        ("decay layer 3", lr),
        ("no_decay layer 3", lr),
    ]


def test_schedulers_start_from_the_scaled_rates():
    module = Pyramid(layer_decay=0.5, lr_scheduler=lambda optimizer: schedulers.StepLR(optimizer, 1, gamma=0.1))
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert scheduler.base_lrs == [1e-3 * scale for scale in (0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0)]


def test_a_regularized_module_has_the_keys_and_hyperparameters_of_a_plain_one(tmp_path):
    module = Classifier(width=6, lr=0.2)
    assert list(module.state_dict()) == list(Plain(width=6).state_dict())
    fit(module).save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert dict(loaded.hparams) == {"width": 6, "lr": 0.2}
    assert loaded.configure_optimizers().param_groups[0]["lr"] == 0.2
    assert_same_weights(loaded, module)


@COPIES
def test_a_regularized_module_can_be_copied(copied):
    other = copied(Classifier(lr_scheduler=functools.partial(schedulers.StepLR, step_size=1)))
    optimizer = other.configure_optimizers()["optimizer"]
    assert split_of(other, optimizer) == [(DECAY, 0.1), (NO_DECAY, 0.0)]


def test_an_optimizer_without_weight_decay_is_refused_unless_none_is_wanted():
    with pytest.raises(ValueError, match=r"Rprop has no `weight_decay`: use another optimizer, or `weight_decay=0\.0`"):
        Classifier(optimizer=torch.optim.Rprop).configure_optimizers()
    assert Classifier(optimizer=torch.optim.Rprop, weight_decay=0.0).configure_optimizers()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adam"}, TypeError, "`optimizer` should make an optimizer from parameter groups, got 'adam'"),
        ({"lr_scheduler": 0.1}, TypeError, "`lr_scheduler` should make a scheduler from an optimizer, got 0.1"),
        ({"interval": "batch"}, ValueError, "`interval` should be 'step' or 'epoch', got 'batch'"),
        ({"weight_decay": -1.0}, ValueError, "`weight_decay` should be finite and at least 0, got -1.0"),
        ({"weight_decay": True}, TypeError, "`weight_decay` should be a number, got True"),
        ({"exclude": ("biases",)}, ValueError, r"Did you mean 'bias'\?"),
        ({"factors": {"weight": "1"}}, TypeError, "the factor of 'weight' should be a number, got '1'"),
        ({"layer_decay": 1.5}, ValueError, r"`layer_decay` should be in \(0, 1\], got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_regularized_module_checks_its_arguments_at_once(options, error, message):
    with pytest.raises(error, match=message):
        Classifier(**options)


def test_the_rules_of_a_module_can_be_asked_for():
    assert grouping_of(Plain()) is None
    assert grouping_of(regularize(Plain(), exclude=("bias",))).exclude == ("bias",)
    assert grouping_of(Classifier(exclude=("norm",))).exclude == ("norm",)
    assert grouping_of(regularize(Classifier(exclude=("norm",)), exclude=("bias",))).exclude == ("bias",)


def test_a_checkpoint_with_other_groups_is_refused_with_both_layouts():  # TRAPS 21: never moments on the wrong weights
    saved = Plain().configure_optimizers().state_dict()
    optimizer = regularize(Plain()).configure_optimizers()
    with pytest.raises(ValueError, match=r"1 parameter groups of sizes \(.*\), here are 2 of sizes"):
        optimizer.load_state_dict(saved)


def test_a_checkpoint_with_the_same_groups_loads():
    saved = regularize(Plain()).configure_optimizers().state_dict()
    regularize(Plain()).configure_optimizers().load_state_dict(saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": lambda groups: None}, "`optimizer` should make a torch.optim.Optimizer, it made None"),
        (
            {"lr_scheduler": lambda optimizer: None},
            "`lr_scheduler` should make a learning rate scheduler",
        ),
    ],
    ids=["optimizer", "lr_scheduler"],
)
def test_what_a_factory_made_is_looked_at(arguments, message):
    class Module(RegularizedModule):
        def __init__(self):
            super().__init__(**arguments)
            self.layer = torch.nn.Linear(2, 2)

    with pytest.raises(TypeError, match=message):
        Module().configure_optimizers()
