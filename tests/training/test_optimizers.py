"""Which parameters decay, and by how much, whatever optimizer and groups the user makes?"""

import functools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import optim
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import Linear
from tests.training.support import (
    EXCLUDED,
    QUIET,
    Batches,
    Regression,
    adamw,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    split,
    train,
    weights,
)

pytestmark = QUIET

LINE = [k / 20 for k in range(21)]


class Grouped(Regression):
    """The user's own groups: one a layer, with the given weight decays."""

    def __init__(self, hidden, output, optimizer=optim.AdamW):
        super().__init__()
        self.decays, self.optimizer_class = (hidden, output), optimizer

    def configure_optimizers(self):
        layers = ([self.hidden, self.norm], [self.output])
        groups = [
            {"params": [p for layer in layers for p in layer.parameters()], "weight_decay": decay}
            for layers, decay in zip(layers, self.decays, strict=True)
        ]
        return self.optimizer_class(groups, lr=0.1)


NAMES = ("hidden.weight", "output.weight")


def used(witness):
    """For each step the weight decay of each weight; those of the others are 0."""
    assert {step[name] for _, step, _ in witness.steps for name in EXCLUDED} == {0.0}
    return [[step[name] for name in NAMES] for _, step, _ in witness.steps]


def approx(values):
    return pytest.approx(values, rel=1e-12, abs=0)


# --------------------------------------------------------------------------------------------------------------------
# Factors


@pytest.mark.parametrize("given", [0.0, 0.5])
def test_what_is_excluded_never_decays(given):
    witness = train(Regression(functools.partial(adamw, weight_decay=given)), WeightDecay(Linear(1.0, 0.0)))
    assert used(witness) == [approx([x, x]) for x in reversed(LINE)]


@pytest.mark.parametrize(
    ("given", "factors"),
    [
        ((0.1, 0.1), (1.0, 1.0)),
        ((0.2, 0.1), (1.0, 0.5)),
        ((0.01, 0.04), (0.25, 1.0)),
        ((0.0, 0.1), (0.0, 1.0)),
        ((0.1, 0.0), (1.0, 0.0)),
        ((0.0, 0.0), (1.0, 1.0)),
    ],
    ids=str,
)
def test_the_users_groups_keep_their_ratio(given, factors):
    """A group at 0 beside others stays there; where none has any, the value is for all."""
    witness = train(Grouped(*given), WeightDecay(Linear(0.0, 1.0)))
    assert used(witness) == [approx([factor * x for factor in factors]) for x in LINE]
    assert witness.shown == used(witness)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"output.*": 0.1}, [1.0, 0.1]),
        ({"output.*": 3.0, "*": 0.5}, [0.5, 3.0]),
        ({"hidden.*": 0.0}, [0.0, 1.0]),
    ],
    ids=str,
)
def test_factors(factors, expected):
    """The first rule that matches wins."""
    witness = train(Regression(), WeightDecay(Linear(0.0, 1.0), factors=factors))
    assert used(witness) == [approx([factor * x for factor in expected]) for x in LINE]


def test_factors_multiply_the_ratio_of_the_users_groups():
    witness = train(Grouped(0.1, 0.2), WeightDecay(Linear(0.0, 1.0), factors={"output.*": 0.3}))
    assert used(witness)[-1] == approx([0.5, 0.3])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({}, [1.0, 0.5]),
        ({"factors": {"output.*": 0.3}}, [1.0, 0.15]),
        ({"factors": {"norm.weight": 2.0}, "exclude": ("bias",)}, [2.0, 0.5]),
        ({"exclude": ("output.*", "bias", "norm")}, [1.0, 0.0]),
        ({"method": "decoupled"}, [0.0, 0.0]),
    ],
    ids=["as given", "factor", "largest factor", "all excluded", "method"],
)
def test_a_group_shows_what_decays_in_it_in_the_step_to_come(arguments, shown):
    """Of several factors the largest; where the callback decays by itself, or nothing decays, 0."""
    witness = train(Grouped(0.2, 0.1), WeightDecay(Linear(0.0, 1.0), **arguments))
    assert witness.shown == [approx([factor * x for factor in shown]) for x in LINE]


@pytest.mark.parametrize("arguments", [{}, {"factors": {"output.*": 0.5}}], ids=["exclude", "factors"])
def test_none_keeps_the_optimizers_own_values(arguments):
    """Also those that a scheduler of the user's writes."""

    class Own(Grouped):
        def on_train_batch_start(self, batch, batch_idx):
            for group in self.trainer.optimizers[0].param_groups:
                group["weight_decay"] *= 0.9

    module = Own(0.2, 0.1)
    witness = train(module, WeightDecay(None, **arguments))
    factor = arguments.get("factors", {}).get("output.*", 1.0)
    assert used(witness) == [approx([0.2 * 0.9**k, factor * 0.1 * 0.9**k]) for k in range(1, 22)]
    assert witness.shown == [approx([0.2 * 0.9**k, 0.1 * 0.9**k]) for k in range(1, 22)]
    assert [group["weight_decay"] for group in module.trainer.optimizers[0].param_groups] == witness.shown[-1]


@pytest.mark.parametrize("where", ["on_train_batch_start", "on_before_optimizer_step", "optimizer_step"])
@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_what_somebody_else_writes_in_mid_run_is_overridden_with_one_warning(where, method):
    class Writing(Regression):
        def write(self):
            self.trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.9

        def on_train_batch_start(self, *_):
            self.write() if where == "on_train_batch_start" else None

        def on_before_optimizer_step(self, optimizer):
            self.write() if where == "on_before_optimizer_step" else None

        def optimizer_step(self, *args, **kwargs):
            self.write() if where == "optimizer_step" else None
            super().optimizer_step(*args, **kwargs)

    module, twin = Writing(), Regression()
    with pytest.warns(UserWarning, match=r"Somebody has set weight_decay=0\.9 in group 'pg1' of AdamW") as caught:
        found = train(module, WeightDecay(Linear(0.0, 1.0), method=method))
    assert len([warning for warning in caught if "Somebody" in str(warning.message)]) == 1
    expected = train(twin, WeightDecay(Linear(0.0, 1.0), method=method))
    assert found.steps == expected.steps
    assert_identical_weights(weights(module), weights(twin))


def test_factors_equal_hand_made_groups_bit_for_bit():
    module, twin = Regression(), Regression()
    train(module, WeightDecay(0.4, factors={"output.*": 0.5}))
    groups = [
        {"params": [twin.hidden.weight], "weight_decay": 0.4},
        {"params": [twin.output.weight], "weight_decay": 0.2},
        {"params": [twin.hidden.bias, *twin.norm.parameters(), twin.output.bias], "weight_decay": 0.0},
    ]
    twin.make_optimizer = lambda _: adamw(groups)
    train(twin)
    assert_identical_weights(weights(module), weights(twin))


def test_weight_decay_where_the_user_gave_some_only_to_what_is_excluded_is_an_error():
    class Mistaken(Regression):
        def configure_optimizers(self):
            decaying, excluded = split(self)
            return adamw([{**decaying, "weight_decay": 0.0}, {**excluded, "weight_decay": 0.1}])

    with pytest.raises(MisconfigurationException, match="nothing decays"):
        train(Mistaken(), WeightDecay(0.1))


# --------------------------------------------------------------------------------------------------------------------
# Optimizers


@pytest.mark.parametrize(
    "make_optimizer",
    [
        optim.ASGD,
        optim.Adadelta,
        optim.Adafactor,
        optim.Adagrad,
        optim.Adam,
        optim.AdamW,
        optim.Adamax,
        optim.NAdam,
        optim.RAdam,
        optim.RMSprop,
        functools.partial(optim.SGD, lr=0.1),
    ],
    ids=lambda make: getattr(make, "__name__", "SGD"),
)
def test_optimizer_equals_itself_with_hand_made_groups(make_optimizer):
    module, twin = Regression(make_optimizer), Regression()
    decaying, excluded = split(twin)
    twin.make_optimizer = lambda _: make_optimizer([{**decaying, "weight_decay": 0.3}, excluded])
    train(module, WeightDecay(0.3), max_epochs=1)
    train(twin, max_epochs=1)
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("make_optimizer", [optim.LBFGS, optim.Rprop, optim.SparseAdam], ids=lambda make: make.__name__)
def test_an_optimizer_without_weight_decay_is_named_in_the_error(make_optimizer):
    module = Regression(lambda parameters: make_optimizer(list(parameters)))
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=rf"{make_optimizer.__name__} has no `weight_decay`"):
        train(module, WeightDecay(0.1))
    assert_identical_weights(weights(module), before)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")  # Lightning says it too
def test_no_optimizer_is_warned_of():
    module = Regression()
    module.configure_optimizers = lambda: None
    with pytest.warns(UserWarning, match="WeightDecay does nothing: `configure_optimizers` returned no optimizer"):
        train(module, WeightDecay(Linear(0.0, 1.0)), max_epochs=1)


def test_named_parameters():
    module, twin = Regression(), Regression()
    module.configure_optimizers = lambda: adamw(module.named_parameters())
    train(module, WeightDecay(0.3))
    train(twin, WeightDecay(0.3))
    assert_identical_weights(weights(module), weights(twin))
    (group,) = module.trainer.optimizers[0].param_groups
    assert group["param_names"] == [name for name, _ in module.named_parameters()]


def test_an_optimizer_made_in_the_constructor():
    class Early(Regression):
        def __init__(self):
            super().__init__()
            self.optimizer = adamw(self.parameters())
            self.scheduler = LambdaLR(self.optimizer, lambda step: 0.9**step)

        def configure_optimizers(self):
            return [self.optimizer], [{"scheduler": self.scheduler, "interval": "step"}]

    module, twin = Early(), Regression(make_scheduler=functools.partial(LambdaLR, lr_lambda=lambda step: 0.9**step))
    assert train(module, WeightDecay(Linear(0.0, 1.0))).steps == train(twin, WeightDecay(Linear(0.0, 1.0))).steps
    assert_identical_weights(weights(module), weights(twin))


def test_tensors_in_the_groups_are_filled_in_place():
    decay = torch.tensor(0.7, dtype=torch.float64)
    options = {"lr": torch.tensor(0.1, dtype=torch.float64), "weight_decay": decay, "foreach": False}
    module, twin = Regression(functools.partial(optim.AdamW, **options)), Regression()
    found = train(module, WeightDecay(Linear(0.0, 1.0)))
    assert [shown for (shown,) in found.shown] == approx(LINE)
    assert module.trainer.optimizers[0].param_groups[0]["weight_decay"] is decay
    assert decay.item() == 0.7  # as before
    train(twin, WeightDecay(Linear(0.0, 1.0)))
    assert_same_weights(weights(module), weights(twin))


# --------------------------------------------------------------------------------------------------------------------
# LR schedulers in the same run


@pytest.mark.parametrize(
    ("make_scheduler", "options"),
    [
        (lambda o: LambdaLR(o, [lambda step: 0.9**step]), {}),
        (functools.partial(OneCycleLR, max_lr=[0.2], total_steps=21), {}),
        (functools.partial(StepLR, step_size=4), {}),
        (
            functools.partial(ReduceLROnPlateau, patience=0, min_lr=[0.01]),
            {"interval": "epoch", "monitor": "train_loss"},
        ),
    ],
    ids=["LambdaLR", "OneCycleLR", "StepLR", "ReduceLROnPlateau"],
)
def test_the_learning_rate_is_as_without_the_callback(make_scheduler, options):
    make_optimizer = functools.partial(adamw, weight_decay=0.0)
    module, twin = (Regression(make_optimizer, make_scheduler, **options) for _ in range(2))
    found, expected = train(module, WeightDecay(0.0)), train(twin)
    assert found.lrs() == found.lrs("hidden.bias") == expected.lrs()
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_leave_everything_alone(stage):
    class Evaluated(Regression):
        def configure_optimizers(self):
            raise AssertionError("nothing is optimized")

        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

        test_step = predict_step = validation_step

    module, twin = Evaluated(), Evaluated()
    before = weights(module)
    getattr(make_trainer(WeightDecay(Linear(0.0, 1.0))), stage)(module, Batches())
    getattr(make_trainer(), stage)(twin, Batches())
    assert_identical_weights(weights(module), before)
    assert set(vars(module)) == set(vars(twin))
