"""Do the layers drop at the rate of the schedule while they train, and at their own before and after?"""

import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_diabetes
from torch import nn
from torch.optim import SGD

from lightning_regularize import DropoutSchedule
from lightning_regularize.schedules import Constant, FollowLR, Linear, early_dropout, late_dropout
from tests.reading import read_csv
from tests.training.support import QUIET, Batches, Regression, make_trainer

pytestmark = QUIET


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class StochasticDepth(nn.Module):
    """As torchvision's."""

    def __init__(self, p):
        super().__init__()
        self.p, self.mode = p, "row"

    def forward(self, x):
        return x


class Gated(nn.Module):
    """With a rate of a name of its own, and something that is no rate."""

    def __init__(self):
        super().__init__()
        self.token_drop_rate, self.p = 0.3, 7


class Layers(Regression):
    def __init__(self, *args, **options):
        super().__init__(lambda parameters: SGD(parameters, lr=0.01), *args, **options)
        self.drop = nn.Sequential(nn.Dropout(0.1), nn.AlphaDropout(0.2))
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True).double()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.4, batch_first=True).double()
        self.single = nn.LSTM(4, 4)  # torch warns of dropout in one layer, which has none
        self.path, self.depth, self.gated = DropPath(0.5), StochasticDepth(0.6), Gated()

    def loss(self, batch):
        x, y = batch
        x = self.drop(self.hidden(x)[:, None])
        x = self.lstm(self.attention(x, x, x)[0])[0]
        return (self.output(x[:, 0]) - y).square().mean()


OWN = {
    "drop.0.p": 0.1,
    "drop.1.p": 0.2,
    "attention.dropout": 0.3,
    "lstm.dropout": 0.4,
    "path.drop_prob": 0.5,
    "depth.p": 0.6,
}


def rates(module, names=OWN):
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        found[name] = getattr(module.get_submodule(path), attribute)
    return found


class Watch(L.Callback):
    """The rates in the very moment of the forward pass."""

    def __init__(self, names=OWN):
        self.names, self.seen = names, []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):  # between the forward pass and the backward pass
        self.seen.append(rates(pl_module, self.names))


def fit(module, *callbacks, **options):
    make_trainer(*callbacks, **{"max_epochs": 1, **options}).fit(module, Batches())
    return module


# --- which rates, and when ----------------------------------------------------------------------------------------


def test_every_kind_of_layer_drops_at_the_rate_of_the_step():
    watch = Watch()
    fit(Layers(), DropoutSchedule(Linear(0.6, 0.0)), watch)
    for k, seen in enumerate(watch.seen):
        assert list(seen.values()) == pytest.approx([0.6 - 0.1 * k] * len(OWN), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (0.25, [0.25] * 7),
        (early_dropout(0.4, until=5), [0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]),
        (late_dropout(0.4, start=5), [0.0] * 5 + [0.4] * 2),
        (lambda at: 0.1 * at.step, [0.1 * k for k in range(7)]),
    ],
    ids=["number", "early", "late", "callable"],
)
def test_schedules(schedule, expected):
    watch = Watch(["drop.0.p"])
    fit(Layers(), DropoutSchedule(schedule), watch)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_rate_may_follow_the_learning_rate():
    watch = Watch(["drop.0.p"])
    module = Layers(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    fit(module, DropoutSchedule(FollowLR(0.8)), watch)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx(
        [0.8 * 0.5**k for k in range(7)], rel=1e-9, abs=1e-12
    )


def test_the_rate_is_of_the_step_and_not_of_the_batch():
    watch = Watch(["drop.0.p"])

    class Seen(Layers):
        def training_step(self, batch, batch_idx):
            watch.on_before_zero_grad(None, self, None)
            return super().training_step(batch, batch_idx)

    fit(Seen(), DropoutSchedule(Linear(0.2, 0.0)), accumulate_grad_batches=3)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx(
        [0.2] * 3 + [0.1] * 3 + [0.0], rel=1e-9, abs=1e-12
    )


@pytest.mark.filterwarnings("ignore:DropoutSchedule. Linear.* was over after 3 steps")  # on purpose
def test_total_steps_is_the_length_of_the_schedule():
    watch = Watch(["drop.0.p"])
    fit(Layers(), DropoutSchedule(Linear(0.2, 0.0), total_steps=3), watch)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx([0.2, 0.1] + [0.0] * 5, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ("drop.*",)}, {"drop.0.p", "drop.1.p"}),
        ({"include": ("type:AlphaDropout", "path")}, {"drop.1.p", "path.drop_prob"}),
        ({"include": (nn.MultiheadAttention, nn.RNNBase)}, {"attention.dropout", "lstm.dropout"}),
        ({"attributes": ("token_drop_rate",)}, {*OWN, "gated.token_drop_rate"}),
    ],
    ids=["glob", "type", "class", "attribute"],
)
def test_rules_select(options, expected):
    names, watch = [*OWN, "gated.token_drop_rate"], None
    watch, module = Watch(names), Layers()
    own = rates(module, names)
    fit(module, DropoutSchedule(0.05, **options), watch, limit_train_batches=1)
    assert {name for name, rate in watch.seen[0].items() if rate != own[name]} == expected
    assert module.gated.p == 7


def test_the_rate_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Layers(), DropoutSchedule(Linear(0.6, 0.0)), logger=logger, log_every_n_steps=3)
    assert read_csv(logger)["dropout/p"] == pytest.approx({2: 0.4, 5: 0.1}, rel=1e-9, abs=1e-12)


# --- before and after ---------------------------------------------------------------------------------------------


def test_the_original_rates_come_back():
    assert rates(fit(Layers(), DropoutSchedule(0.25))) == OWN


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_original_rates_come_back_after(error):
    class Failing(Layers):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise error("on purpose")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises((error, SystemExit)):
        fit(module, DropoutSchedule(0.25))
    assert rates(module) == OWN


def test_validation_drops_nothing_and_a_sanity_check_changes_nothing():
    class Validated(Layers):
        outputs = []

        def validation_step(self, batch, batch_idx):
            if self.trainer.sanity_checking:
                assert rates(self) == OWN
            self.outputs.append([self.loss(next(iter(Batches()))).item() for _ in range(2)])

        def val_dataloader(self):
            return range(1)

    module = Validated()
    fit(module, DropoutSchedule(0.9))
    assert all(first == again for first, again in module.outputs)


def test_a_second_fit_schedules_again_and_restores_again():
    module, dropout = Layers(), DropoutSchedule(Linear(0.6, 0.0))
    for _ in range(2):
        watch = Watch()
        fit(module, dropout, watch)
        assert watch.seen[0]["drop.0.p"] == 0.6
        assert rates(module) == OWN


def test_a_resumed_run_goes_on_at_its_step(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    watch = Watch(["drop.0.p"])
    fit(Layers(), DropoutSchedule(Linear(0.6, 0.0)), Save())
    trainer = make_trainer(DropoutSchedule(Linear(0.6, 0.0)), watch, max_epochs=1)
    trainer.fit(Layers(), Batches(), ckpt_path=tmp_path / "3.ckpt")
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx([0.3, 0.2, 0.1, 0.0], rel=1e-9, abs=1e-12)


def test_a_copy_made_during_training_restores_nothing_of_the_run():
    dropout, copies = DropoutSchedule(0.25), []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            copies.append(pickle.dumps(dropout))

    fit(Layers(), dropout, Copy(), limit_train_batches=1)
    module = Layers()
    assert rates(fit(module, pickle.loads(copies[0]))) == OWN


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_model_is_compiled_for_few_rates_only():
    graphs, watch = [], Watch(["net._orig_mod.1.p"])

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch._dynamo.reset()
            self.net = torch.compile(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), backend=backend)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0].float()).square().mean()

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.01)

    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        make_trainer(DropoutSchedule(Linear(0.6, 0.0), include=("net.1",)), watch, max_epochs=1).fit(
            Compiled(), Batches(100)
        )
    found = [seen["net._orig_mod.1.p"] for seen in watch.seen]
    assert found[0] == 0.6
    assert found[-1] == 0.0
    assert sorted(set(found)) == pytest.approx([0.0, 0.2, 0.4, 0.6], rel=1e-9, abs=1e-12)
    assert len(graphs) <= 5
    assert all(abs(rate - 0.6 * (1 - k / 99)) <= 0.1 + 1e-9 for k, rate in enumerate(found))


# --- what dropout is ----------------------------------------------------------------------------------------------


class Average(L.Callback):
    """The mean of the weights over the second half of the run."""

    def __init__(self, after):
        self.after, self.count, self.mean = after, 0, 0.0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.after:
            self.count += 1
            self.mean = self.mean + (pl_module.layer.weight.detach() - self.mean) / self.count


class DroppedInputs(L.LightningModule):
    def __init__(self, inputs, targets):
        super().__init__()
        self.layer, self.drop = nn.Linear(inputs.shape[1], 1, bias=False).double(), nn.Dropout(0.0)
        self.inputs, self.targets = inputs, targets

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.layer(self.drop(self.inputs)).squeeze(1) - self.targets).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.2)


def test_a_linear_model_with_dropout_is_ridge():
    """In the mean over masks the loss is that of ridge with p / (1 - p) diag(X'X)."""
    inputs, targets = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = (targets - targets.mean()) / targets.std()
    p, gram = 0.4, inputs.T @ inputs
    expected = torch.linalg.solve(gram + p / (1 - p) * gram.diag().diag(), inputs.T @ targets)
    torch.manual_seed(0)
    average = Average(after=100)
    trainer = make_trainer(DropoutSchedule(p), average, max_epochs=1)
    trainer.fit(DroppedInputs(inputs, targets), range(1500))
    assert ((average.mean[0] - expected).norm() / expected.norm()) < 0.01
    without = torch.linalg.solve(gram, inputs.T @ targets)
    assert ((without - expected).norm() / expected.norm()) > 0.4


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_class", "options", "message"),
    [
        (Regression, {}, "There is nothing to drop: no module .* has a dropout rate"),
        (Layers, {"include": ("hidden",)}, "There is nothing to drop"),
        (Layers, {"include": ("drop.*", "dorp.*")}, r"No dropout rate is found by `include` \['dorp.\*'\]"),
        (Layers, {"attributes": ("token_drop",)}, r"No dropout rate is found by `attributes` \['token_drop'\]"),
    ],
    ids=["no layer", "none matches", "misspelled rule", "misspelled attribute"],
)
def test_nothing_to_drop_is_an_error_before_training(module_class, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module_class(), DropoutSchedule(0.1, **options))


def test_a_schedule_that_leaves_the_range_is_an_error_before_training():
    module = Layers()
    before = module.hidden.weight.detach().clone()
    with pytest.raises(ValueError, match=r"A dropout rate should be in \[0, 1\), got 1\.\d*"):
        fit(module, DropoutSchedule(Linear(0.0, 1.5)))
    assert torch.equal(module.hidden.weight, before)


def test_an_unknown_end_is_an_error_before_training():
    with pytest.raises(MisconfigurationException, match="needs to know how many steps"):
        fit(Layers(), DropoutSchedule(Linear(0.5, 0.0)), max_epochs=-1, limit_train_batches=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DropoutSchedule(1.0), ValueError, r"in \[0, 1\), got 1.0"),
        (lambda: DropoutSchedule(-0.1), ValueError, "got -0.1"),
        (lambda: DropoutSchedule("0.1"), TypeError, "got '0.1'"),
        (lambda: DropoutSchedule(0.1, include="drop"), TypeError, "`include` should be a sequence of globs"),
        (lambda: DropoutSchedule(0.1, include=(3,)), TypeError, "`include` should be a sequence of globs"),
        (lambda: DropoutSchedule(0.1, total_steps=0), ValueError, "`total_steps` should be a positive integer"),
        (lambda: DropoutSchedule(Constant(1.0)), ValueError, r"in \[0, 1\), got 1.0"),
        (
            lambda: DropoutSchedule(0.1, attributes="p"),
            TypeError,
            "`attributes` should be a sequence of names, got 'p'",
        ),
    ],
)
def test_bad_input_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()
