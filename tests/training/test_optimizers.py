"""Which groups decay, and by how much, whatever optimizer and groups the user makes?"""

import functools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import optim
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_regularize import WeightDecay
from lightning_regularize.schedules import Linear
from tests.training.support import (
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


def used(witness):
    """The weight decays of all groups, step by step."""
    return [decays for _, decays, _ in witness.steps]


# --------------------------------------------------------------------------------------------------------------------
# Factors


def test_what_is_excluded_never_decays():
    witness = train(Regression(functools.partial(adamw, weight_decay=0.5)), WeightDecay(Linear(1.0, 0.0)))
    assert witness.decays(group=1) == [0.0] * 21


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
    hidden, output = factors
    witness = train(Grouped(*given), WeightDecay(Linear(0.0, 1.0)))
    assert used(witness) == [[pytest.approx(hidden * x), 0.0, pytest.approx(output * x), 0.0] for x in LINE]


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"output.*": 0.1}, [1.0, 0.1, 0.0]),
        ({"output.*": 3.0, "*": 0.5}, [3.0, 0.5, 0.0]),
        ({"hidden.*": 0.0}, [1.0, 0.0]),
    ],
    ids=str,
)
def test_factors(factors, expected):
    """The first rule that matches wins; groups stand from the largest factor to none."""
    witness = train(Regression(), WeightDecay(Linear(0.0, 1.0), factors=factors))
    assert used(witness) == [pytest.approx([factor * x for factor in expected]) for x in LINE]


def test_factors_multiply_the_ratio_of_the_users_groups():
    witness = train(Grouped(0.1, 0.2), WeightDecay(Linear(0.0, 1.0), factors={"output.*": 0.3}))
    assert used(witness)[-1] == pytest.approx([0.5, 0.0, 0.3, 0.0])


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
def test_no_optimizer_is_told():
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
    decaying, excluded = module.trainer.optimizers[0].param_groups
    assert decaying["param_names"] == ["hidden.weight", "output.weight"]
    assert excluded["param_names"] == ["hidden.bias", "norm.weight", "norm.bias", "output.bias"]


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
    train(module, WeightDecay(Linear(0.0, 1.0)))
    assert module.trainer.optimizers[0].param_groups[0]["weight_decay"] is decay
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
    assert found.lrs(0) == found.lrs(1) == expected.lrs(0)
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_leave_everything_alone(stage):
    class Evaluated(Regression):
        def configure_optimizers(self):
            raise AssertionError("nothing is optimized")

        def validation_step(self, batch, batch_idx):
            return self.loss(batch)

        test_step = predict_step = validation_step

    module = Evaluated()
    before = weights(module)
    getattr(make_trainer(WeightDecay(Linear(0.0, 1.0))), stage)(module, Batches())
    assert_identical_weights(weights(module), before)
    assert "configure_optimizers" not in vars(module)
