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
from torch.optim import LBFGS, SGD, AdamW
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_regularize import WeightDecay, param_groups
from lightning_regularize.module import RegularizedModule, regularize
from tests.models import MLP, VisionTransformer, randn

torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost ten times what the work does

DECAY = ["net.hidden.weight", "net.output.weight"]
NO_DECAY = ["net.hidden.bias", "net.norm.weight", "net.norm.bias", "net.output.bias"]


def one_group(module):
    return SGD(module.parameters(), lr=0.1, weight_decay=0.1)


class Plain(pl.LightningModule):
    """A user's module; `configure` makes of it what `configure_optimizers` returns."""

    def __init__(self, configure=one_group, width=5):
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


def fit(module, *callbacks, steps=3, ckpt_path=None, lightning=pl):
    """Train on epochs of three batches, which are always the same."""
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return trainer


def batches():
    return DataLoader([randn(4, 4, seed=seed) for seed in range(3)], batch_size=None)


def names_of(module, group):
    name = {id(parameter): name for name, parameter in module.named_parameters()}
    return [name[id(parameter)] for parameter in group["params"]]


def by_hand(module, optimizer=SGD, weight_decay=0.1, decay=DECAY, **options):
    """An optimizer with the groups that the user would have to make."""
    named = dict(module.named_parameters())
    groups = [
        {"params": [named[name] for name in decay], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if name not in decay], "weight_decay": 0.0},
    ]
    return optimizer(groups, **{"lr": 0.1, **options})


def one_by_one(decays):
    """An optimizer with one group for each parameter, of which some have this weight decay."""

    def configure(module):
        named = module.named_parameters()
        return SGD([{"params": [p], "weight_decay": decays.get(name, 0.0)} for name, p in named], lr=0.1)

    return configure


def assert_same_weights(module, other):
    for (name, parameter), (_, expected) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def assert_trains_as(module, expected, *callbacks, steps=3):
    """They end with the same weights to the last bit, and with others than they began with."""
    before = copy.deepcopy(module.net.hidden.weight)
    trainer = fit(module, *callbacks, steps=steps)
    fit(expected, steps=steps)
    assert_same_weights(module, expected)
    assert not torch.equal(module.net.hidden.weight, before)
    return trainer


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
        "lr_scheduler": schedulers.ReduceLROnPlateau(optimizer, min_lr=[0.01] * len(optimizer.param_groups)),
        "monitor": "loss",
    },
    "tuple of dictionaries": lambda optimizer, scheduler: ({"optimizer": optimizer, "lr_scheduler": scheduler},),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_that_lightning_accepts_is_kept_and_decays_as_with_groups_made_by_hand(form):
    def configure(module):
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        group = optimizer.param_groups[0]
        returned.append(form(optimizer, schedulers.LambdaLR(optimizer, [lambda epoch: 0.5**epoch])))
        made.append((optimizer, group))
        return returned[-1]

    def configure_by_hand(module):
        optimizer = by_hand(module, momentum=0.9)
        return form(optimizer, schedulers.LambdaLR(optimizer, lambda epoch: 0.5**epoch))

    returned, made = [], []
    module = regularize(Plain(configure))
    assert module.configure_optimizers() is returned[0]
    trainer = assert_trains_as(module, Plain(configure_by_hand))
    ((optimizer, group),) = made[1:]
    assert trainer.optimizers == [optimizer]
    assert optimizer.param_groups == [group]
    assert optimizer.param_groups[0] is group
    assert names_of(module, group) == [name for name, _ in module.named_parameters()]
    assert group["weight_decay"] == 0.1


def test_training_with_a_scheduler_is_bit_for_bit_that_of_groups_made_by_hand():
    def configured(make_optimizer):
        def configure(module):
            optimizer = make_optimizer(module)
            rates = [0.3] * len(optimizer.param_groups)
            scheduler = schedulers.OneCycleLR(optimizer, max_lr=rates, total_steps=9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return Plain(configure)

    module = configured(lambda module: AdamW(module.parameters(), lr=0.1, weight_decay=0.1))
    expected = configured(lambda module: by_hand(module, AdamW))
    assert_trains_as(regularize(module), expected, steps=8)


# lightning: to train nothing is what this test is about
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
def test_no_optimizer_stays_none():
    module = regularize(Plain(lambda module: None))
    assert module.configure_optimizers() is None
    with pytest.warns(UserWarning, match="WeightDecay does nothing: `configure_optimizers` returned no optimizer"):
        fit(module)
    assert_same_weights(module, Plain())


def test_each_of_several_optimizers_decays_as_with_groups_made_by_hand():
    def configured(split):
        def configure(module):
            net = module.net
            first = SGD(split(net.hidden, 0.1), lr=0.1)
            second = AdamW(split(net.output, 0.2), lr=0.2)
            third = SGD([{"params": list(net.norm.parameters()), "weight_decay": 0.0}], lr=0.3)
            optimizers = [first, second, third]
            return optimizers, [schedulers.LambdaLR(o, lambda epoch: 0.5**epoch) for o in optimizers]

        return Manual(configure)

    def whole(layer, decay):
        return [{"params": list(layer.parameters()), "weight_decay": decay}]

    def split(layer, decay):
        return [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias], "weight_decay": 0.0}]

    module = regularize(configured(whole))
    trainer = assert_trains_as(module, configured(split), steps=6)  # three steps a batch
    groups = [optimizer.param_groups for optimizer in trainer.optimizers]
    assert [[group["weight_decay"] for group in each] for each in groups] == [[0.1], [0.2], [0.0]]
    assert [[group["lr"] for group in each] for each in groups] == [[0.1 * 0.5**2], [0.2 * 0.5**2], [0.3 * 0.5**2]]
    assert not any("name" in group for each in groups for group in each)


GROUPS = {
    "generator": lambda module: (parameter for parameter in module.parameters()),
    "named parameters": lambda module: module.named_parameters(),
    "list of dictionaries": lambda module: [{"params": module.parameters()}],
    "dictionary with names": lambda module: [{"params": module.named_parameters()}],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_parameters_may_come_in_any_way(groups):
    module = regularize(Plain(lambda module: SGD(groups(module), lr=0.1, weight_decay=0.1)))
    assert_trains_as(module, Plain(by_hand))


def three_groups(module):
    layers = {"hidden": 0.2, "norm": 0.1, "output": 0.0}
    groups = [
        {"params": list(getattr(module.net, name).parameters()), "name": name, "lr": 0.1 * i, "weight_decay": decay}
        for i, (name, decay) in enumerate(layers.items(), start=1)
    ]
    return AdamW(groups)


def six_groups(decays):
    def configure(module):
        groups = [
            {"params": [p], "lr": group["lr"], "weight_decay": decay if p.dim() > 1 or (i == 1 and j == 0) else 0.0}
            for i, (group, decay) in enumerate(zip(three_groups(module).param_groups, decays, strict=True))
            for j, p in enumerate(group["params"])
        ]
        return AdamW(groups)

    return configure


@pytest.mark.parametrize(
    ("weight_decay", "decays"), [(None, [0.2, 0.1, 0.0]), (1.0, [1.0, 0.5, 0.0]), (0.0, [0.0, 0.0, 0.0])]
)
def test_groups_with_their_own_settings_keep_them(weight_decay, decays):
    module = regularize(Plain(three_groups), weight_decay, exclude=("bias",))
    trainer = assert_trains_as(module, Plain(six_groups(decays)))
    groups = trainer.optimizers[0].param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("hidden", 0.1),
        ("norm", 0.2),
        ("output", pytest.approx(0.3, rel=1e-15, abs=0)),
    ]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.1, 0.0]  # put back


WITHOUT_WEIGHT_DECAY = {
    "LBFGS": lambda module: LBFGS(module.parameters(), lr=0.1, max_iter=3),
    "Rprop": lambda module: torch.optim.Rprop(module.parameters()),
}


@pytest.mark.parametrize("configure", WITHOUT_WEIGHT_DECAY.values(), ids=WITHOUT_WEIGHT_DECAY)
def test_optimizers_without_weight_decay_are_left_alone(configure):
    trainer = assert_trains_as(regularize(Plain(configure)), Plain(configure))
    (group,) = trainer.optimizers[0].param_groups
    assert "weight_decay" not in group
    assert "name" not in group


@pytest.mark.parametrize("name", WITHOUT_WEIGHT_DECAY)
def test_weight_decay_for_an_optimizer_that_has_none_is_refused(name):
    module = regularize(Plain(WITHOUT_WEIGHT_DECAY[name]), 0.1)
    with pytest.raises(MisconfigurationException, match=rf"{name} has no `weight_decay` of its own that could be set"):
        fit(module)
    assert_same_weights(module, Plain())


class KeepsItsOptimizer(Plain):
    def __init__(self):
        super().__init__(its_optimizer)
        self.optimizer = SGD(self.parameters(), lr=0.1, weight_decay=0.1)


def its_optimizer(module):
    return module.optimizer


@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_factors_of_an_optimizer_that_is_kept_do_not_compound_in_a_second_fit(weight_decay):
    module = regularize(KeepsItsOptimizer(), weight_decay, factors={"net.output.*": 0.5})
    expected = Plain(one_by_one({"net.hidden.weight": 0.1, "net.output.weight": 0.05}))
    for _ in range(2):
        assert_trains_as(module, expected)
        assert module.optimizer.param_groups[0]["weight_decay"] == 0.1


def test_factors_and_exclusions_are_those_of_the_arguments():
    module = regularize(Plain(), 1.0, exclude=("*.bias",), factors={"net.hidden.*": 0.5})
    decays = {"net.norm.weight": 1.0, "net.output.weight": 1.0, "net.hidden.weight": 0.5}
    assert_trains_as(module, Plain(one_by_one(decays)))


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
    assert saved["state_dict"].keys() == expected["state_dict"].keys()
    assert saved["hyper_parameters"] == expected["hyper_parameters"]
    assert saved["optimizer_states"] == expected["optimizer_states"]  # SGD without momentum: the groups
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


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])


@COPIES
def test_a_copy_decays_as_the_module_does(copied):
    module = regularize(Plain(), 0.3)
    other = copied(module)
    assert other.configure_callbacks is not module.configure_callbacks
    assert_trains_as(other, Plain(functools.partial(by_hand, weight_decay=0.3)))
    assert_same_weights(module, Plain())


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
def test_a_copy_made_while_the_module_trains_decays_as_the_module_would(copied, make_callbacks):
    copies = CopyWhileItTrains(copied)
    fit(regularize(Plain(), 0.3), *make_callbacks(), copies, steps=2)
    other, expected = copies.copies[-1], Plain(functools.partial(by_hand, weight_decay=0.3))
    expected.load_state_dict(other.state_dict())
    assert_trains_as(other, expected)


@COPIES
def test_a_copy_of_a_module_with_an_optimizer_of_its_own_trains_with_a_copy_of_that(copied):
    module = regularize(KeepsItsOptimizer())
    other = copied(module)
    assert_trains_as(other, Plain(by_hand))
    assert_trains_as(module, Plain(by_hand))


def test_a_second_call_replaces_the_first():
    module = regularize(regularize(Plain(), 0.3, exclude=("weight",)), 0.2)
    assert [repr(callback) for callback in module.configure_callbacks()] == ["WeightDecay(0.2)"]
    assert_trains_as(module, Plain(functools.partial(by_hand, weight_decay=0.2)))


def test_a_call_for_a_regularized_module_replaces_its_rules():
    module = regularize(Classifier(exclude=("norm",)), 0.2, exclude=("*.bias",))
    assert [repr(callback) for callback in module.configure_callbacks()] == ["WeightDecay(0.2, exclude=('*.bias',))"]
    decays = dict.fromkeys(["net.hidden.weight", "net.norm.weight", "net.output.weight"], 0.2)
    assert_trains_as(module, Plain(one_by_one(decays)))


class Counter(pl.Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *_):
        self.batches += 1


class WithCallbacks(Plain):
    def __init__(self, configured):
        super().__init__()
        self.configured = configured

    def configure_callbacks(self):
        return self.configured


@pytest.mark.parametrize("place", ["class", "instance"])
@pytest.mark.parametrize("form", [lambda callback: callback, lambda callback: [callback]], ids=["one", "list"])
def test_callbacks_of_the_module_stay(place, form):
    counter = Counter()
    if place == "class":
        module = WithCallbacks(form(counter))
    else:
        module = Plain()
        module.configure_callbacks = lambda: form(counter)
    module = regularize(regularize(module, 0.3), 0.2)
    assert_trains_as(module, Plain(functools.partial(by_hand, weight_decay=0.2)))
    assert counter.batches == 3


def test_what_hangs_on_the_instance_is_called():  # LightningCLI sets `configure_optimizers` there
    module = Plain(lambda module: None)
    module.configure_optimizers = functools.partial(one_group, module)
    regularize(regularize(module, 0.3), 0.2)
    assert_trains_as(module, Plain(functools.partial(by_hand, weight_decay=0.2)))


class Forgetful(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = MLP()

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()


def test_lightning_still_sees_that_a_hook_is_missing():
    with pytest.raises(MisconfigurationException, match=r"No `configure_optimizers\(\)` method defined"):
        fit(regularize(Forgetful()))


# The Trainer's WeightDecay wins


@pytest.mark.parametrize(
    "make_module",
    [
        pytest.param(lambda **rules: regularize(Plain(), 0.1, **rules), id="regularize"),
        pytest.param(lambda **rules: Classifier(**rules), id="RegularizedModule"),
    ],
)
@pytest.mark.parametrize(
    ("rules", "callback", "decays", "differs"),
    [
        pytest.param({}, {}, dict.fromkeys(DECAY, 0.4), False, id="no rules"),
        pytest.param(
            {},
            {"exclude": ("bias",)},
            {**dict.fromkeys(DECAY, 0.4), "net.norm.weight": 0.4},
            False,
            id="of the Trainer alone",
        ),
        pytest.param(
            {"exclude": ("bias",)},
            {"exclude": ("bias",)},
            {**dict.fromkeys(DECAY, 0.4), "net.norm.weight": 0.4},
            False,
            id="equal rules",
        ),
        pytest.param({"exclude": ("bias",)}, {}, dict.fromkeys(DECAY, 0.4), True, id="other exclude"),
        pytest.param({"factors": {"net.hidden.*": 0.5}}, {}, dict.fromkeys(DECAY, 0.4), True, id="other factors"),
    ],
)
def test_the_weight_decay_of_the_trainer_wins(make_module, rules, callback, decays, differs, recwarn):
    module = make_module(**rules)
    assert_trains_as(module, Plain(one_by_one(decays)), WeightDecay(0.4, **callback))
    said = [str(warning.message) for warning in recwarn if "decides what decays" in str(warning.message)]
    assert len(said) == differs
    assert all(message.startswith("The Trainer's WeightDecay(0.4") for message in said)


def test_regularize_knows_a_module_of_the_other_package():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                self.net = MLP(4, 5, 2)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return one_group(self)

    fit(module := regularize(Other(), 0.3), lightning=pytorch_lightning)
    fit(expected := Plain(functools.partial(by_hand, weight_decay=0.3)))
    assert_same_weights(module, expected)


@pytest.mark.parametrize(
    "make_module",
    [
        pytest.param(lambda: regularize(Plain(), 0.3), id="regularize"),
        pytest.param(lambda: Classifier(weight_decay=0.3), id="RegularizedModule"),
    ],
)
def test_a_second_fit_of_the_same_trainer_decays_as_the_first(make_module):
    module = make_module()
    expected = Plain(functools.partial(by_hand, weight_decay=0.3))
    trainer, plain = fit(module), fit(expected)
    for each, of in ((trainer, module), (plain, expected)):
        each.fit_loop.epoch_loop.max_steps = 6
        each.fit_loop.max_epochs = 2
        each.fit(of, batches())
        assert each.global_step == 6
    assert_same_weights(module, expected)
    assert [type(callback) for callback in trainer.callbacks].count(WeightDecay) == 1


class Silent(Plain):
    """torch.compile does not trace Lightning's `log` (torch 2.13)."""

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()


# torch.compile imports torch.utils.mkldnn, whose classes are still scripted (torch 2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compilation_comes_after():
    compiled = torch.compile(regularize(Silent(), 0.3), backend="eager")
    fit(compiled)
    fit(expected := Plain(functools.partial(by_hand, weight_decay=0.3)))
    assert_same_weights(compiled._orig_mod, expected)
    with pytest.raises(TypeError, match=r"got OptimizedModule\. Call `regularize` before `torch\.compile`"):
        regularize(compiled)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: regularize(MLP()), TypeError, "`module` should be a LightningModule, got MLP"),
        (lambda: regularize(Plain(), -0.1), ValueError, "`weight_decay` should be finite and at least 0, got -0.1"),
        (lambda: regularize(Plain(), "0.1"), TypeError, "`weight_decay` should be a number, got '0.1'"),
        (lambda: regularize(Plain(), max), TypeError, r"got <.*the Trainer: `callbacks=\[WeightDecay\(...\)\]`"),
        (lambda: regularize(Plain(), exclude="bias"), TypeError, "`exclude` should be a sequence of rules"),
        (lambda: regularize(Plain(), exclude=("biases",)), ValueError, r"Did you mean 'bias'\?"),
        (lambda: regularize(Plain(), factors={"weight": -1}), ValueError, "factor of 'weight' should be finite"),
    ],
    ids=["no LightningModule", "negative", "str", "schedule", "one rule", "unknown word", "negative factor"],
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
    trainer = assert_trains_as(module := Classifier(), Plain(by_hand))
    (group,) = trainer.optimizers[0].param_groups
    assert names_of(module, group) == [name for name, _ in module.named_parameters()]
    assert group["weight_decay"] == 0.1
    assert "name" not in group


def test_the_default_is_adamw_as_torch_has_it():
    class Default(RegularizedModule):
        def __init__(self):
            super().__init__()
            self.net = MLP()

    optimizer = Default().configure_optimizers()
    assert type(optimizer) is AdamW
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.01)]


def test_the_weight_decay_of_the_module_wins_over_that_of_the_optimizer():
    module = Classifier(optimizer=functools.partial(SGD, lr=0.1, weight_decay=0.7), weight_decay=0.2)
    assert_trains_as(module, Plain(functools.partial(by_hand, weight_decay=0.2)))


def test_exclude_and_factors_are_followed():
    module = Classifier(exclude=("norm",), factors={"bias": 0.5})
    biases = {"net.hidden.bias": 0.05, "net.output.bias": 0.05, "net.norm.bias": 0.05}
    assert_trains_as(module, Plain(one_by_one({**dict.fromkeys(DECAY, 0.1), **biases})))


def test_frozen_parameters_are_in_no_group():
    module = Classifier()
    module.net.hidden.requires_grad_(False)
    (group,) = module.configure_optimizers().param_groups
    assert names_of(module, group) == ["net.norm.weight", "net.norm.bias", "net.output.weight", "net.output.bias"]
    module.net.requires_grad_(False)
    with (
        pytest.warns(UserWarning, match="no effect: all parameters that it applies to are frozen"),
        pytest.raises(ValueError, match="Classifier has no trainable parameters to group"),
    ):
        module.configure_optimizers()


@pytest.mark.parametrize(("interval", "lr"), [("step", 0.1 * 0.5**3), ("epoch", 0.1 * 0.5)])
def test_the_scheduler_steps_at_the_interval(interval, lr):
    module = Classifier(lr_scheduler=functools.partial(schedulers.StepLR, step_size=1, gamma=0.5), interval=interval)
    trainer = fit(module, steps=3)  # one epoch
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [lr]


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
    def __init__(self, depth=2, **options):
        super().__init__(**options)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.net = VisionTransformer(depth=depth)

    def training_step(self, batch, batch_idx):
        return self.net(self.net.example()).square().mean()


@pytest.mark.parametrize("optimizer", [functools.partial(AdamW, lr=0.2), AdamW], ids=["lr", "default lr"])
def test_layer_decay_scales_the_rate_of_the_optimizer(optimizer):
    lr = 1e-3 if optimizer is AdamW else 0.2
    module = Pyramid(optimizer=optimizer, layer_decay=0.5)
    groups = module.configure_optimizers().param_groups
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("layer 0", lr / 8, 0.01),
        ("layer 1", lr / 4, 0.01),
        ("layer 2", lr / 2, 0.01),
        ("layer 3", lr, 0.01),
    ]
    assert [len(group["params"]) for group in groups] == [4, 14, 14, 4]


class PlainPyramid(Pyramid):
    """With the groups of `param_groups`, one for each layer and factor."""

    def configure_callbacks(self):
        return []

    def configure_optimizers(self):
        return SGD(param_groups(self, 0.1, lr=0.2, layer_decay=0.5), momentum=0.9)


def test_layer_decay_trains_bit_for_bit_as_with_groups_by_layer_and_factor():
    module = Pyramid(optimizer=functools.partial(SGD, lr=0.2, momentum=0.9), weight_decay=0.1, layer_decay=0.5)
    fit(module)
    fit(expected := PlainPyramid())
    assert_same_weights(module, expected)


def test_schedulers_start_from_the_scaled_rates():
    module = Pyramid(layer_decay=0.5, lr_scheduler=lambda optimizer: schedulers.StepLR(optimizer, 1, gamma=0.1))
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert scheduler.base_lrs == [1e-3 * scale for scale in (0.125, 0.25, 0.5, 1.0)]


def test_a_regularized_module_has_the_keys_and_hyperparameters_of_a_plain_one(tmp_path):
    module = Classifier(width=6, lr=0.2)
    assert list(module.state_dict()) == list(Plain(width=6).state_dict())
    fit(module).save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert dict(loaded.hparams) == {"width": 6, "lr": 0.2}
    assert loaded.configure_optimizers().param_groups[0]["lr"] == 0.2
    assert_same_weights(loaded, module)


@COPIES
def test_a_copy_of_a_regularized_module_decays_as_the_module_does(copied):
    module = Classifier(lr_scheduler=functools.partial(schedulers.StepLR, step_size=1, gamma=1.0), weight_decay=0.3)
    assert_trains_as(copied(module), Plain(functools.partial(by_hand, weight_decay=0.3)))


def test_an_optimizer_without_weight_decay_is_refused_unless_none_is_wanted():
    with pytest.raises(ValueError, match=r"Rprop has no `weight_decay`: use another optimizer, or `weight_decay=0\.0`"):
        Classifier(optimizer=torch.optim.Rprop).configure_optimizers()
    module = Classifier(optimizer=torch.optim.Rprop, weight_decay=0.0)
    assert_trains_as(module, Plain(lambda module: torch.optim.Rprop(module.parameters())))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adam"}, TypeError, "`optimizer` should make an optimizer from parameter groups, got 'adam'"),
        ({"lr_scheduler": 0.1}, TypeError, "`lr_scheduler` should make a scheduler from an optimizer, got 0.1"),
        ({"interval": "batch"}, ValueError, "`interval` should be 'step' or 'epoch', got 'batch'"),
        ({"weight_decay": -1.0}, ValueError, "`weight_decay` should be finite and at least 0, got -1.0"),
        ({"weight_decay": True}, TypeError, "`weight_decay` should be a number, got True"),
        ({"weight_decay": {"*": 0.1}}, TypeError, r"got \{.*the Trainer: `callbacks=\[WeightDecay\(...\)\]`"),
        ({"exclude": ("biases",)}, ValueError, r"Did you mean 'bias'\?"),
        ({"factors": {"weight": "1"}}, TypeError, "the factor of 'weight' should be a number, got '1'"),
        ({"layer_decay": 1.5}, ValueError, r"`layer_decay` should be in \(0, 1\], got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_regularized_module_checks_its_arguments_at_once(options, error, message):
    with pytest.raises(error, match=message):
        Classifier(**options)


# RegularizedModule without its callbacks


def train_by_hand(module):
    """A loop without a Trainer."""
    optimizer = module.configure_optimizers()
    for batch in batches():
        optimizer.zero_grad()
        module.net(batch).square().mean().backward()
        optimizer.step()
    return optimizer


def test_without_a_trainer_excluded_weights_do_not_decay():
    optimizer = train_by_hand(module := Classifier(factors={"net.output.*": 0.5}))
    expected = Plain(one_by_one({"net.hidden.weight": 0.1, "net.output.weight": 0.05}))
    train_by_hand(expected)
    assert_same_weights(module, expected)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


class Overridden(Plain, RegularizedModule):
    """Its callbacks are not added to ours."""

    def __init__(self, **options):
        RegularizedModule.__init__(self, optimizer=functools.partial(SGD, lr=0.1), weight_decay=0.1, **options)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.net = MLP(4, 5, 2)
        self.counter = Counter()

    configure_optimizers = RegularizedModule.configure_optimizers

    def configure_callbacks(self):
        return [self.counter]


def test_where_configure_callbacks_is_overridden_excluded_weights_do_not_decay():
    module = Overridden()
    assert_trains_as(module, Plain(by_hand))
    assert module.counter.batches == 3


def test_where_configure_callbacks_is_overridden_the_weight_decay_of_the_trainer_wins():
    assert_trains_as(Overridden(), Plain(functools.partial(by_hand, weight_decay=0.4)), WeightDecay(0.4))


class DeepSpeedStrategy:
    """What the module asks of Lightning's, which it knows by this name."""

    model, config = None, {"zero_optimization": {"stage": 2}}


class OfDeepSpeed:
    callbacks, strategy = (), DeepSpeedStrategy()


def test_where_configure_callbacks_is_overridden_zero_is_refused():
    module = Overridden()
    module._trainer = OfDeepSpeed()
    with pytest.raises(MisconfigurationException, match=r"Overridden\.configure_callbacks leaves out what `super\(\)"):
        module.configure_optimizers()


# Resuming


class OwnRules(Classifier):
    """Adam, of which each weight has moments."""

    def __init__(self, **options):
        super().__init__(optimizer=functools.partial(AdamW, lr=0.1), **options)


class ChangeAt(pl.Callback):
    """Gives each parameter, which has a group of its own, another weight decay from some step on."""

    def __init__(self, step, decays):
        self.step, self.decays = step, decays

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            names = [name for name, _ in pl_module.named_parameters()]
            for name, group in zip(names, trainer.optimizers[0].param_groups, strict=True):
                group["weight_decay"] = self.decays.get(name, 0.0)


class Moments(pl.Callback):
    """Adam's, by name, as training begins."""

    def on_train_start(self, trainer, pl_module):
        states = trainer.optimizers[0].state
        self.found = {name: states[p]["exp_avg"].clone() for name, p in pl_module.named_parameters() if p in states}


def make_own(**rules):
    return OwnRules(**rules)


def make_regularized(**rules):
    return regularize(Plain(lambda module: AdamW(module.parameters(), lr=0.1, weight_decay=0.1)), **rules)


@pytest.mark.parametrize("make_module", [make_own, make_regularized])
@pytest.mark.parametrize(
    ("then", "now", "before", "after"),
    [
        pytest.param({}, {"exclude": ("bias",)}, DECAY, [*DECAY, "net.norm.weight"], id="less excluded"),
        pytest.param({"exclude": ()}, {}, [*DECAY, *NO_DECAY], DECAY, id="more excluded"),
        pytest.param(
            {"exclude": ("*.weight",)}, {"exclude": ("*.bias",)},
            ["net.hidden.bias", "net.norm.bias", "net.output.bias"], [*DECAY, "net.norm.weight"], id="turned round",
        ),
    ],
)  # fmt: skip
def test_a_resumed_run_follows_its_own_rules_and_keeps_the_moments_of_each_weight(
    make_module, then, now, before, after, tmp_path
):
    first = fit(make_module(**then))
    first.save_checkpoint(tmp_path / "saved.ckpt")
    states, expected_moments = first.optimizers[0].state, {}
    for name, parameter in first.lightning_module.named_parameters():
        expected_moments[name] = states[parameter]["exp_avg"].clone()

    module, moments = make_module(**now), Moments()
    with pytest.warns(UserWarning, match="WeightDecay differs from the checkpoint's and wins over it. exclude: "):
        fit(module, moments, steps=6, ckpt_path=tmp_path / "saved.ckpt")
    assert moments.found.keys() == expected_moments.keys()
    for name, moment in expected_moments.items():
        assert torch.equal(moments.found[name], moment), name

    def configure(module):
        decays = dict.fromkeys(before, 0.1)
        named = module.named_parameters()
        return AdamW([{"params": [p], "weight_decay": decays.get(name, 0.0)} for name, p in named], lr=0.1)

    expected = Plain(configure)
    fit(expected).save_checkpoint(tmp_path / "expected.ckpt")
    change = ChangeAt(3, dict.fromkeys(after, 0.1))
    fit(expected, change, steps=6, ckpt_path=tmp_path / "expected.ckpt")
    assert_same_weights(module, expected)


@pytest.mark.parametrize("make_module", [make_own, make_regularized])
def test_runs_with_and_without_the_rules_go_on_from_each_others_checkpoints(make_module, tmp_path):
    """Nothing is excluded, so that the run without them is the oracle."""

    def plain():
        return Plain(lambda module: AdamW(module.parameters(), lr=0.1, weight_decay=0.1))

    fit(uninterrupted := plain(), steps=3).save_checkpoint(tmp_path / "plain.ckpt")
    fit(make_module(exclude=()), steps=3).save_checkpoint(tmp_path / "ours.ckpt")
    fit(uninterrupted, steps=6, ckpt_path=tmp_path / "plain.ckpt")
    fit(module := make_module(exclude=()), steps=6, ckpt_path=tmp_path / "plain.ckpt")
    assert_same_weights(module, uninterrupted)
    with pytest.warns(UserWarning, match="[Cc]allback"):  # Lightning: the checkpoint has a callback that is not here
        fit(module := plain(), steps=6, ckpt_path=tmp_path / "ours.ckpt")
    assert_same_weights(module, uninterrupted)


# What factories make


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
