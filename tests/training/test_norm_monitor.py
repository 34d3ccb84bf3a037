"""Does WeightNormMonitor log what it says, on the steps it says, and nothing else?"""

import gc
import math
import pickle
import sys
import types

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_regularize import WeightDecay, WeightNormMonitor, schedules
from lightning_regularize.quantities import QUANTITIES
from tests.distributed import run_distributed
from tests.models import MODELS, randn
from tests.reading import read_csv, read_tensorboard, read_wandb
from tests.training.support import QUIET, Batches, Regression, adamw, make_trainer

pytestmark = [
    *QUIET,
    # lightning/fabric/loggers/csv_logs.py and trainer/connectors, when a run is resumed or begun again
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Found unsupported keys in the lr scheduler:UserWarning"),
]

EVERYTHING = tuple(QUANTITIES)


class Kept(Logger):
    """All rows, in memory."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "kept", 0

    def log_hyperparams(self, params):
        """Nothing to keep."""

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def logged(self):
        found = {}
        for step, metrics in self.rows:
            for key, value in metrics.items():
                found.setdefault(key, {})[step] = value
        return found


class Oracle(L.Callback):
    """Weights, gradients and changes of every step of a single optimizer, in float64."""

    def __init__(self):
        self.before, self.gradients, self.after = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(wide(pl_module, lambda p: p))
        self.gradients.append(wide(pl_module, lambda p: p.grad))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if len(self.after) < len(self.before):
            self.after.append(wide(pl_module, lambda p: p))


def wide(module, of):
    named = ((name, of(p)) for name, p in module.named_parameters() if p.requires_grad)
    return {name: tensor.detach().double().flatten().clone() for name, tensor in named if tensor is not None}


class Wrapped(L.LightningModule):
    """One of the shared models, pulled to zero output."""

    def __init__(self, model, make_optimizer=adamw):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.make_optimizer = model(), make_optimizer

    def training_step(self, batch, batch_idx):
        loss = self.model(self.model.example()).square().sum()
        self.log("train_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def fit(*callbacks, module=None, steps=3, **options):
    logger = Kept()
    module = Regression() if module is None else module
    make_trainer(*callbacks, **{"logger": logger, "max_epochs": 1, "limit_train_batches": steps, **options}).fit(
        module, Batches()
    )
    return logger


def monitored(monitor, **options):
    oracle = Oracle()
    return fit(monitor, oracle, **options).logged(), oracle


# -- definitions -----------------------------------------------------------------------------------------------------

PARTS = {
    "parameter": lambda name: name,
    "module": lambda name: name.rpartition(".")[0] or "_root_",
    "total": lambda name: "total",
}


def by_hand(quantity, before, gradients, after, p=2.0):
    """The definition, on the concatenation of what belongs to a part."""
    w, v = torch.cat(list(before.values())), torch.cat(list(after.values()))
    norm = lambda x: torch.linalg.vector_norm(x, ord=p).item()  # noqa: E731
    if quantity == "gradient":
        return norm(torch.cat(list(gradients.values())))
    return {
        "weight": lambda: norm(w),
        "rms": lambda: w.square().mean().sqrt().item(),
        "update": lambda: norm(v - w),
        "ratio": lambda: norm(v - w) / norm(w),
        "angle": lambda: exact_angle(w, v),
        "sparsity": lambda: (w == 0).double().mean().item(),
    }[quantity]()


def exact_angle(w, v):
    """Kahan's formula: half the angle is the arc tangent of the ratio of a rhombus' diagonals."""
    a, b = w * v.norm(), v * w.norm()
    return 2 * math.atan2((a - b).norm().item(), (a + b).norm().item())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("detail", PARTS)
def test_each_quantity_equals_its_definition(model, detail):
    asked = ("weight", "rms", "gradient", "update", "ratio", "angle", "sparsity")
    monitor = WeightNormMonitor(quantities=asked, detail=detail, every_n_steps=1)
    logged, oracle = monitored(monitor, module=Wrapped(model))
    for step in range(3):
        states = oracle.before[step], oracle.gradients[step], oracle.after[step]
        for part in {PARTS[detail](name) for name in states[0]} | {"total"}:
            own = [{n: x for n, x in state.items() if part in {PARTS[detail](n), "total"}} for state in states]
            for quantity in asked:
                key = f"{QUANTITIES[quantity].key}/{part}"
                if quantity == "gradient" and not own[1]:
                    assert key not in logged
                    continue
                if quantity in ("ratio", "angle") and not any(w.any() for w in own[0].values()):
                    assert step not in logged.get(key, {})
                    continue
                found = logged[key][step]
                # Of a change along the weights, float32 leaves a share of about 1e-4 across them.
                tolerance = 1e-5 if quantity == "angle" else 1e-9
                assert found == pytest.approx(by_hand(quantity, *own), rel=1e-5, abs=tolerance)


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_norms_are_of_the_type_asked_for(norm_type):
    asked = ("weight", "gradient", "update", "ratio", "angle", "rms")
    monitor = WeightNormMonitor(quantities=asked, detail="module", norm_type=norm_type)
    logged, oracle = monitored(monitor)
    states = oracle.before[1], oracle.gradients[1], oracle.after[1]
    for part in ("hidden", "norm", "output"):
        own = [{n: x for n, x in state.items() if n.startswith(part)} for state in states]
        for quantity in asked:
            expected = by_hand(quantity, *own, p=norm_type)
            assert logged[f"{QUANTITIES[quantity].key}/{part}"][1] == pytest.approx(expected, rel=1e-9, abs=0)


def test_groups_are_labeled_by_name_or_number():
    def two_groups(parameters):
        first, *others = parameters
        return adamw([{"params": [first], "name": "first"}, {"params": others}])

    logged, oracle = monitored(WeightNormMonitor(detail="group"), module=Regression(two_groups))
    first, *others = oracle.before[0].values()
    assert logged["weight_norm/first"][0] == pytest.approx(first.norm().item(), rel=1e-6, abs=0)
    assert logged["weight_norm/pg2"][0] == pytest.approx(torch.cat(others).norm().item(), rel=1e-6, abs=0)
    assert {key for key in logged if "/" in key} == {"weight_norm/first", "weight_norm/pg2", "weight_norm/total"}


def test_stable_rank_is_of_matrices_as_blocks_of_one():
    logged, oracle = monitored(WeightNormMonitor(quantities=("stable_rank",), detail="parameter"))
    matrices = [oracle.before[0]["hidden.weight"].view(4, 3), oracle.before[0]["output.weight"].view(2, 4)]
    squares = [m.square().sum().item() for m in matrices]
    largest = [torch.linalg.svdvals(m)[0].item() ** 2 for m in matrices]
    found = {key: steps[0] for key, steps in logged.items() if key.startswith("stable_rank")}
    assert found == pytest.approx(
        {
            "stable_rank/hidden.weight": squares[0] / largest[0],
            "stable_rank/output.weight": squares[1] / largest[1],
            "stable_rank/total": sum(squares) / max(largest),
        },
        rel=1e-6,
        abs=0,
    )


@pytest.mark.parametrize("shape", [(4, 3), (70, 90), (300, 80), (8, 4, 3, 3)], ids=str)
def test_the_spectral_norm_is_that_of_the_singular_values(shape):
    module = Regression()
    module.spare = nn.Parameter(randn(*shape, seed=0).double())
    monitor = WeightNormMonitor(quantities=("spectral_norm",), detail="parameter")
    logged = fit(monitor, module=module, steps=1).logged()
    expected = torch.linalg.svdvals(randn(*shape, seed=0).double().flatten(1))[0].item()
    assert logged["spectral_norm/spare"][0] == pytest.approx(expected, rel=1e-3, abs=0)
    assert logged["spectral_norm/total"][0] == pytest.approx(expected, rel=1e-3, abs=0)  # the largest
    assert "spectral_norm/hidden.bias" not in logged


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_mean_and_standard_deviation_of_gradients_equal_their_definitions(norm_type):
    asked = ("gradient_mean", "gradient_std")
    logged, oracle = monitored(WeightNormMonitor(quantities=asked, detail="parameter", norm_type=norm_type))
    gradients = {"total": torch.cat(list(oracle.gradients[1].values())), **oracle.gradients[1]}
    for part, gradient in gradients.items():
        assert logged[f"gradient_mean/{part}"][1] == pytest.approx(gradient.mean().item(), rel=1e-6, abs=1e-15)
        std = gradient.std(unbiased=False).item()
        assert logged[f"gradient_std/{part}"][1] == pytest.approx(std, rel=1e-6, abs=1e-9)


def decay_and_no_decay(make, **options):
    def configure(parameters):
        weight, *others = parameters
        return make([{"params": [weight], "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}], **options)

    return configure


@pytest.mark.parametrize(
    ("make", "options", "timescale"),
    [
        (torch.optim.AdamW, {"lr": 0.01}, 200.0),
        (torch.optim.SGD, {"lr": 0.01}, 200.0),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, 20.0),
    ],
    ids=["adamw", "sgd", "momentum"],
)
def test_effective_decay_and_timescale_are_of_what_decays(make, options, timescale):
    monitor = WeightNormMonitor(quantities=("effective_decay", "timescale"), detail="group")
    logged = fit(monitor, module=Regression(decay_and_no_decay(make, **options))).logged()
    found = {key: steps[0] for key, steps in logged.items() if "/" in key}
    assert found == pytest.approx(
        {
            "effective_decay/pg1": 0.005,
            "effective_decay/pg2": 0.0,
            "effective_decay/total": 0.005,
            "timescale/pg1": timescale,
            "timescale/total": timescale,
            "timescale_epochs/pg1": timescale / 3,
            "timescale_epochs/total": timescale / 3,
        },
        rel=1e-6,
        abs=0,
    )


def test_the_decay_is_that_of_the_step_and_not_of_the_next_one():
    module = Regression(
        decay_and_no_decay(torch.optim.AdamW, lr=0.01), lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1)
    )
    logged = fit(WeightNormMonitor(quantities=("effective_decay",)), module=module).logged()
    assert logged["effective_decay/total"] == pytest.approx({0: 5e-3, 1: 5e-4, 2: 5e-5}, rel=1e-6, abs=0)


@pytest.mark.parametrize("method", ["optimizer", "decoupled"])
def test_the_decay_is_counted_whoever_does_it(method):
    decay = WeightDecay(schedules.Linear(0.4, 0.2), method=method)
    monitor = WeightNormMonitor(quantities=("effective_decay",), detail="parameter")
    logged = fit(decay, monitor, module=Regression(lambda parameters: adamw(parameters, lr=0.1))).logged()
    assert logged["effective_decay/hidden.weight"] == pytest.approx({0: 0.04, 1: 0.03, 2: 0.02}, rel=1e-6, abs=0)
    assert logged["effective_decay/hidden.bias"] == {0: 0, 1: 0, 2: 0}


def test_a_timescale_of_epochs_counts_steps_and_not_batches():
    monitor = WeightNormMonitor(quantities=("timescale",))
    module = Regression(decay_and_no_decay(torch.optim.AdamW, lr=0.01))
    logged = fit(monitor, module=module, steps=7, accumulate_grad_batches=2).logged()  # 4 steps an epoch
    assert logged["timescale_epochs/total"][0] == pytest.approx(50, rel=1e-6, abs=0)


def test_small_weights_are_counted_apart_from_zeros():
    module = Regression()
    with torch.no_grad():
        module.hidden.weight[:] = torch.tensor([0.0, 0.01, 1.0])
    monitor = WeightNormMonitor(quantities=("sparsity",), detail="parameter", threshold=0.01)
    logged = fit(monitor, module=module).logged()
    assert logged["sparsity/hidden.weight"][0] == pytest.approx(1 / 3, rel=1e-6, abs=0)
    assert logged["below_threshold/hidden.weight"][0] == pytest.approx(2 / 3, rel=1e-6, abs=0)


def test_theory_stands_beside_what_is_measured():
    asked = ("weight", "rms", "update", "ratio", "angle")
    module = Regression(decay_and_no_decay(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.99)))
    logged = fit(WeightNormMonitor(quantities=asked, detail="parameter", expected=True), module=module).logged()
    rms, angle = math.sqrt(0.01 / (2 * 0.5)), math.sqrt(2 * 0.01 * 0.5 * 0.2 / 1.8)
    norm = rms * math.sqrt(12)
    found = {key.split("/")[0]: v[0] for key, v in logged.items() if key.endswith("hidden.weight/expected")}
    assert found == pytest.approx(
        {"weight_norm": norm, "rms": rms, "update_norm": norm * angle, "ratio": angle, "angle": angle}, rel=1e-6, abs=0
    )
    rest = logged["weight_norm/total"][0] ** 2 - logged["weight_norm/hidden.weight"][0] ** 2
    assert logged["weight_norm/total/expected"][0] == pytest.approx(math.sqrt(rest + norm**2), rel=1e-6, abs=0)
    assert not any("expected" in key for key in logged if "hidden.bias" in key)


def test_theory_of_sgd_takes_the_gradient_where_it_is_measured():
    make = decay_and_no_decay(torch.optim.SGD, lr=0.01, momentum=0.9)
    asked = ("weight", "gradient")
    logged = fit(
        WeightNormMonitor(quantities=asked, detail="parameter", expected=True), module=Regression(make)
    ).logged()
    gradient = logged["gradient_norm/hidden.weight"][0] * logged["weight_norm/hidden.weight"][0]
    expected = (0.01 * gradient**2 / (2 * 0.5 * 0.1)) ** 0.25
    assert logged["weight_norm/hidden.weight/expected"][0] == pytest.approx(expected, rel=1e-6, abs=0)
    with pytest.warns(UserWarning, match="SGD decays depends on their gradients.* add 'gradient' to `quantities`"):
        without = fit(WeightNormMonitor(expected=True), module=Regression(make)).logged()
    assert not any("expected" in key for key in without)


WITHOUT_THEORY = {
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "NAdam": torch.optim.NAdam,
    "Adam": torch.optim.Adam,  # adds the decay to the gradient
}


@pytest.mark.parametrize("name", WITHOUT_THEORY)
def test_an_optimizer_without_a_theory_is_told_once(name):
    module = Regression(lambda parameters: WITHOUT_THEORY[name](parameters, lr=0.01, weight_decay=0.1))
    with pytest.warns(UserWarning, match=f"no expected values are known for weights that {name} decays") as caught:
        logged = fit(WeightNormMonitor(expected=True), module=module).logged()
    assert sum("no expected values" in str(warning.message) for warning in caught) == 1
    assert not any("expected" in key for key in logged)


def test_one_without_a_theory_beside_one_with_it_is_told():
    class Both(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            rmsprop = torch.optim.RMSprop(self.output.parameters(), lr=0.01, weight_decay=0.1)
            return [adamw(self.hidden.parameters()), rmsprop]

    with pytest.warns(UserWarning, match="no expected values are known for weights that RMSprop decays"):
        logged = fit(WeightNormMonitor(expected=True), module=Both()).logged()
    assert "weight_norm/optimizer0 total/expected" in logged
    assert "weight_norm/optimizer1 total/expected" not in logged


# -- which steps -----------------------------------------------------------------------------------------------------


def test_keys_stand_on_the_rows_of_train_loss(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = WeightNormMonitor(quantities=("weight", "update"))
    fit(monitor, logger=logger, max_epochs=2, steps=7, log_every_n_steps=3)
    logged = read_csv(logger)
    assert list(logged["weight_norm/total"]) == list(logged["train_loss"]) == [2, 5, 8, 11]
    assert list(logged["update_norm/total"]) == [2, 5, 8, 11]


def test_a_period_of_its_own_is_kept():
    logged = fit(WeightNormMonitor(every_n_steps=2), steps=7).logged()
    assert list(logged["weight_norm/total"]) == [1, 3, 5]


def test_accumulated_batches_are_one_step():
    logged = fit(WeightNormMonitor(), steps=7, accumulate_grad_batches=3).logged()
    assert list(logged["weight_norm/total"]) == list(logged["train_loss"]) == [0, 1, 2]


def test_values_are_of_their_own_step_and_not_repeated():
    logged, oracle = monitored(WeightNormMonitor(every_n_steps=2), steps=6)
    expected = {step: torch.cat(list(oracle.before[step].values())).norm().item() for step in (1, 3, 5)}
    assert logged["weight_norm/total"] == pytest.approx(expected, rel=1e-6, abs=0)


class Validated(Regression):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=1)


def test_validation_and_the_sanity_check_log_nothing():
    logger, monitor = Kept(), WeightNormMonitor()
    trainer = make_trainer(monitor, logger=logger, max_epochs=1, num_sanity_val_steps=2, limit_val_batches=2)
    module = Validated()
    trainer.validate(module, Batches())
    assert not any("weight_norm/total" in row for _, row in logger.rows)
    trainer.fit(module, Batches(), Batches())
    assert len(logger.logged()["weight_norm/total"]) == 7


class TwoOptimizers(Regression):
    """Steps the first optimizer on every batch and the second on every other one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return adamw(self.hidden.parameters()), adamw([*self.norm.parameters(), *self.output.parameters()])

    def training_step(self, batch, batch_idx):
        self.log("train_loss", self.loss(batch), batch_size=1)
        for optimizer in self.optimizers()[: 1 if batch_idx % 2 else 2]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize("detail", ["total", "group", "module", "parameter"])
def test_each_optimizer_has_keys_of_its_own(detail):
    module = TwoOptimizers()
    first = torch.cat([p.flatten() for p in module.hidden.parameters()]).norm().item()
    logger = fit(WeightNormMonitor(detail=detail, quantities=("weight", "update")), module=module, steps=4)
    logged = logger.logged()
    assert logged["weight_norm/optimizer0 total"][0] == pytest.approx(first, rel=1e-6, abs=0)
    assert list(logged["update_norm/optimizer0 total"]) == [0, 1, 2, 3]
    assert list(logged["update_norm/optimizer1 total"]) == [0, 2]
    rows = [step for step, row in logger.rows if "weight_norm/optimizer0 total" in row]
    assert rows == [0, 1, 2, 3]  # one for both


class SameNames(TwoOptimizers):
    def configure_optimizers(self):
        return [adamw([{"params": list(layer.parameters()), "name": "all"}]) for layer in (self.hidden, self.output)]


def test_groups_of_one_name_do_not_write_over_each_other():
    logged = fit(WeightNormMonitor(detail="group"), module=SameNames()).logged()
    assert logged["weight_norm/optimizer0 all"][0] == logged["weight_norm/optimizer0 total"][0]
    assert logged["weight_norm/optimizer1 all"][0] == logged["weight_norm/optimizer1 total"][0]


@pytest.mark.parametrize(
    ("arguments", "options", "cause"),
    [
        ({"every_n_steps": 100}, {}, "no step in 3 batches .* every 100 steps. Choose a smaller `every_n_steps`"),
        ({}, {"log_every_n_steps": 50}, "every 50 steps. Choose a smaller `log_every_n_steps`"),
        ({}, {"log_every_n_steps": 0}, "with `log_every_n_steps=0` no step is"),
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 3}, "every 2 steps"),
        ({"every_n_steps": 4, "histograms": True}, {}, "every 4 steps"),
    ],
    ids=["every_n_steps", "log_every_n_steps", "no step", "accumulation", "histograms"],
)
# lightning/pytorch/loops/fit_loop.py says so as well where an epoch is shorter than the interval
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval:UserWarning")
def test_a_run_that_is_shorter_than_the_interval_is_warned_of(arguments, options, cause, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match=f"WeightNormMonitor logged nothing: .*{cause}") as caught:
        fit(WeightNormMonitor(**arguments), logger=logger, **options)
    assert sum("WeightNormMonitor" in str(w.message) for w in caught) == 1


class NeverSteps(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))


class OverriddenStep(Regression):
    """Leaves out the step."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()


@pytest.mark.parametrize("module", [NeverSteps, OverriddenStep])
def test_a_run_without_a_step_is_warned_of(module):
    with pytest.warns(UserWarning, match="logged nothing: no optimizer of the Trainer made a step") as caught:
        fit(WeightNormMonitor(), module=module())
    assert sum("WeightNormMonitor" in str(w.message) for w in caught) == 1


class StepsTheRawOptimizer(Regression):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        optimizer.optimizer.step()


def test_a_raw_optimizer_that_the_module_steps_is_logged():
    logged = fit(WeightNormMonitor(quantities=("weight", "update")), module=StepsTheRawOptimizer()).logged()
    assert list(logged["update_norm/total"]) == [0, 1, 2]
    assert all(value > 0 for value in logged["update_norm/total"].values())


@pytest.mark.parametrize(
    "arguments", [{}, {"every_n_steps": 100}, {"histograms": True}, {"quantities": EVERYTHING}], ids=str
)
@pytest.mark.parametrize("logger", [True, False])
def test_a_fast_run_in_development_is_silent(arguments, logger, recwarn):
    trainer = make_trainer(WeightNormMonitor(**arguments), fast_dev_run=2, logger=logger)
    trainer.fit(Regression(), Batches())
    assert not [w for w in recwarn if "WeightNormMonitor" in str(w.message)]


def test_an_optimizer_that_is_never_logged_is_warned_of():
    with pytest.warns(UserWarning, match="logged nothing of optimizer 1, which never stepped on a batch"):
        logged = fit(WeightNormMonitor(every_n_steps=2), module=EveryOther(), steps=6).logged()
    assert {key for key in logged if "/" in key} == {"weight_norm/optimizer0 total"}


class EveryOther(TwoOptimizers):
    """Both optimizers step on batches of their own."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[1 - batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class NamedTotal(Regression):
    def __init__(self):
        super().__init__()
        self.total = nn.Linear(3, 2, dtype=torch.float64)

    def loss(self, batch):
        return super().loss(batch) + self.total(batch[0]).square().mean()


@pytest.mark.parametrize("detail", ["module", "group"])
def test_a_part_called_total_does_not_write_over_the_total(detail):
    module = NamedTotal()
    if detail == "group":
        module.make_optimizer = lambda parameters: adamw([{"params": list(parameters), "name": "total"}])
    whole = torch.cat([p.detach().flatten() for p in module.parameters()]).norm().item()
    part = torch.cat([p.detach().flatten() for p in module.total.parameters()]).norm().item()
    logged = fit(WeightNormMonitor(detail=detail), module=module).logged()
    assert logged["weight_norm/total"][0] == pytest.approx(whole, rel=1e-6, abs=0)
    assert logged[f"weight_norm/total ({detail})"][0] == pytest.approx(
        part if detail == "module" else whole, rel=1e-6, abs=0
    )


def test_what_has_no_gradient_neither_decays_nor_moves_to_an_equilibrium():
    module = Regression(lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1))
    module.spare = nn.Linear(3, 3, dtype=torch.float64)
    monitor = WeightNormMonitor(
        quantities=("weight", "gradient", "angle", "effective_decay", "timescale"), detail="parameter", expected=True
    )
    logged = fit(monitor, module=module).logged()
    assert logged["effective_decay/spare.weight"][0] == 0
    assert not {"timescale/spare.weight", "weight_norm/spare.weight/expected"} & set(logged)
    assert logged["effective_decay/hidden.weight"][0] == pytest.approx(0.01, rel=1e-6, abs=0)
    expected = sum(
        logged[f"weight_norm/{n}/expected"][0] ** 2 for n, _ in module.named_parameters() if "spare" not in n
    )
    spare = torch.cat([p.flatten() for p in module.spare.parameters()]).square().sum().item()
    assert logged["weight_norm/total/expected"][0] == pytest.approx(math.sqrt(expected + spare), rel=1e-6, abs=0)


class Diverging(Regression):
    """Its weights leave the range in which squares are finite, and then that of float64."""

    def loss(self, batch):
        return sum((p.square() ** 2).sum() for p in self.parameters()) * 1e40


def test_a_run_that_diverges_goes_on_with_the_monitor():
    module = Diverging(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    logged = fit(WeightNormMonitor(quantities=EVERYTHING, detail="parameter"), module=module, steps=7).logged()
    assert list(logged["angle/total"]) == list(range(7))
    assert math.isnan(logged["angle/total"][6])


def zero_output(module):
    """As LoRA begins."""
    nn.init.zeros_(module.output.weight)
    nn.init.zeros_(module.output.bias)


def empty_parameter(module):
    module.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))


def huge_weights(module):
    """Squares of float32 are infinite, and so are sums of more than three of these weights."""
    module.huge = nn.Parameter(torch.full((100, 10), 1e38))


def tiny_weights(module):
    """Squares of float32 are 0."""
    module.tiny = nn.Parameter(torch.full((100, 10), 1e-30))


@pytest.mark.parametrize("change", [zero_output, empty_parameter, huge_weights, tiny_weights])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("detail", ["module", "parameter"])
def test_what_is_logged_is_finite(change, norm_type, detail):
    """What has no value, such as the ratio to weights that are 0, is left out."""
    module = Regression(decay_and_no_decay(torch.optim.AdamW, lr=0.01))
    change(module)
    monitor = WeightNormMonitor(
        quantities=EVERYTHING, detail=detail, norm_type=norm_type, threshold=0.1, expected=True, every_n_steps=1
    )
    logged = fit(monitor, module=module).logged()
    assert {key: steps for key, steps in logged.items() if not all(map(math.isfinite, steps.values()))} == {}
    assert len(logged) > 20


def test_quantities_of_weights_that_are_zero_begin_with_the_second_step():
    module = Regression()
    zero_output(module)
    logged = fit(WeightNormMonitor(quantities=("weight", "ratio", "angle"), detail="parameter"), module=module).logged()
    assert list(logged["weight_norm/output.weight"]) == [0, 1, 2]
    assert list(logged["ratio/output.weight"]) == list(logged["angle/output.weight"]) == [1, 2]
    assert list(logged["ratio/hidden.weight"]) == [0, 1, 2]


def test_an_empty_parameter_has_no_shares_and_no_mean():
    module = Regression()
    empty_parameter(module)
    monitor = WeightNormMonitor(quantities=EVERYTHING, detail="parameter", threshold=0.1)
    logged = fit(monitor, module=module).logged()
    parts = {key.partition("/")[0] for key in logged if key.endswith("/empty")}
    assert parts == {"weight_norm", "update_norm", "distance", "effective_decay"}
    assert 0 <= logged["below_threshold/total"][0] <= 1


def test_a_change_of_huge_weights_is_measured():
    module = Regression(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    huge_weights(module)

    class Step(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            pl_module.huge.data.mul_(1.5)

    monitor = WeightNormMonitor(quantities=("ratio", "angle"), include=("*huge",))
    module.huge.grad = torch.zeros_like(module.huge)
    logged = fit(monitor, Step(), module=module, steps=1).logged()
    assert logged["angle/total"][0] == pytest.approx(0, rel=0, abs=1e-7)


class ComplexGain(Regression):
    def __init__(self):
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
        self.gain = nn.Parameter(torch.tensor([3.0 + 0j, 1j], dtype=torch.complex128))

    def loss(self, batch):
        return super().loss(batch) + 2 * self.gain.imag.sum()


def test_changes_of_complex_weights_are_seen_in_their_phase_too():
    monitor = WeightNormMonitor(quantities=("weight", "update", "angle"), include=("*gain",))
    logged = fit(monitor, module=ComplexGain(), steps=1).logged()
    assert logged["weight_norm/total"][0] == pytest.approx(math.sqrt(10), rel=1e-6, abs=0)
    assert logged["update_norm/total"][0] == pytest.approx(math.sqrt(2), rel=1e-6, abs=0)
    w, v = torch.tensor([3.0, 0, 0, 1]), torch.tensor([3.0, -1, 0, 0])
    assert logged["angle/total"][0] == pytest.approx(exact_angle(w.double(), v.double()), rel=1e-6, abs=0)


def test_lbfgs_is_logged_once_a_step():
    module = Regression(lambda parameters: torch.optim.LBFGS(parameters, max_iter=3))
    logger = fit(WeightNormMonitor(quantities=("weight", "update")), module=module)
    assert [step for step, row in logger.rows if "weight_norm/total" in row] == [0, 1, 2]
    logged = logger.logged()
    assert all(value > 0 for value in logged["update_norm/total"].values())


# -- mixed precision, clipping ---------------------------------------------------------------------------------------


def scaled(init_scale=1024.0):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def in_float32(**options):
    return Regression(lambda parameters: torch.optim.AdamW(parameters, lr=0.01, **options)).float()


class Float32(Batches):
    def __init__(self):
        super().__init__()
        self.batches = [(x.float(), y.float()) for x, y in self.batches]


def fit_scaled(module, *callbacks, scale=1024.0, data=None, **options):
    logger = Kept()
    trainer = make_trainer(*callbacks, logger=logger, max_epochs=1, plugins=[scaled(scale)], **options)
    trainer.fit(module, data or Float32())
    return logger.logged()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_gradients_are_logged_unscaled(fused, norm_type):
    def monitor():
        return WeightNormMonitor(quantities=("gradient",), norm_type=norm_type)

    found = fit_scaled(in_float32(fused=fused), monitor())["gradient_norm/total"]
    logger = Kept()
    make_trainer(monitor(), logger=logger, max_epochs=1, precision="bf16-mixed").fit(in_float32(fused=fused), Float32())
    expected = logger.logged()["gradient_norm/total"]
    assert found[0] == pytest.approx(expected[0], rel=0.05, abs=0)  # half precision; the scale is 1024


class Overflowing(Float32):
    """The third batch of each epoch is too large for float16."""

    def __init__(self):
        super().__init__()
        self.batches[2] = (self.batches[2][0], torch.full_like(self.batches[2][1], 1e30))


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_that_overflows_is_counted_and_changes_nothing(fused):
    monitor = WeightNormMonitor(quantities=("gradient", "weight", "update", "angle", "ratio"), detail="parameter")
    logged = fit_scaled(in_float32(fused=fused), monitor, data=Overflowing())
    nonfinite = logged["gradient_nonfinite/total"]
    assert nonfinite[2] > 0
    assert not any(nonfinite[step] for step in nonfinite if step != 2)
    assert not math.isfinite(logged["gradient_norm/total"][2])
    assert logged["update_norm/total"][2] == logged["angle/total"][2] == logged["ratio/total"][2] == 0
    assert logged["update_norm/total"][3] > 0
    assert logged["weight_norm/total"][3] == logged["weight_norm/total"][2]


def test_gradients_are_logged_before_clipping():
    free = fit(WeightNormMonitor(quantities=("gradient",)), steps=1).logged()
    clipped = fit(WeightNormMonitor(quantities=("gradient",)), steps=1, gradient_clip_val=1e-3).logged()
    assert clipped["gradient_norm/total"] == free["gradient_norm/total"]


def test_a_model_of_nan_is_reported_with_a_count():
    module = Regression()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    logged = fit(WeightNormMonitor(quantities=EVERYTHING, detail="parameter", expected=True), module=module).logged()
    assert math.isnan(logged["weight_norm/total"][0])
    assert math.isnan(logged["stable_rank/total"][0])
    elements = sum(p.numel() for p in module.parameters())
    assert logged["weight_nonfinite/total"][0] == logged["gradient_nonfinite/total"][0] == elements


# -- what is measured ------------------------------------------------------------------------------------------------


def test_frozen_parameters_do_not_count():
    module = Regression()
    module.hidden.requires_grad_(False)
    logged, oracle = monitored(WeightNormMonitor(detail="module"), module=module)
    assert "weight_norm/hidden" not in logged
    assert logged["weight_norm/total"][0] == pytest.approx(
        torch.cat(list(oracle.before[0].values())).norm().item(), rel=1e-6, abs=0
    )


def test_rules_choose_what_is_measured():
    monitor = WeightNormMonitor(detail="parameter", include=("hidden.*", "output.*"), exclude=("bias",))
    logged = fit(monitor).logged()
    parts = {key.partition("/")[2] for key in logged if key.startswith("weight_norm")}
    assert parts == {"hidden.weight", "output.weight", "total"}


def test_a_rule_that_matches_nothing_raises():
    with pytest.raises(ValueError, match=r"'hiden\.\*' matches no parameter; the nearest are 'hidden\.bias'"):
        fit(WeightNormMonitor(include=("hiden.*",)))


def test_a_model_without_gradients_is_warned_of_once_and_not_logged_as_0():
    monitor = WeightNormMonitor(quantities=("gradient", "weight"), include=(lambda info: info.name == "spare",))
    module = Regression()
    module.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.warns(UserWarning, match="no gradient norm") as caught:
        logged = fit(monitor, module=module).logged()
    assert sum("no gradient norm" in str(w.message) for w in caught) == 1
    assert not any(key.startswith("gradient") for key in logged)
    assert logged["weight_norm/total"][0] == pytest.approx(math.sqrt(2), rel=1e-6, abs=0)


def test_what_deepspeed_keeps_on_a_disk_is_warned_of_and_not_logged_as_0(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))

    class Placeholder(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.spare.ds_shape = torch.Size([2, 3])
            pl_module.spare.ds_tensor = torch.zeros(0)
            pl_module.spare.ds_tensor.ds_numel = 6

    module = Regression()
    module.spare = nn.Parameter(torch.zeros(0, dtype=torch.float64))
    with pytest.warns(UserWarning, match="on a disk"):
        logged = fit(Placeholder(), WeightNormMonitor(detail="parameter"), module=module).logged()
    assert "weight_norm/spare" not in logged


def test_parametrized_weights_belong_to_their_module():
    module = Regression()
    nn.utils.parametrizations.weight_norm(module.hidden)
    logged = fit(WeightNormMonitor(detail="module"), module=module).logged()
    parts = {key.partition("/")[2] for key in logged if key.startswith("weight_norm")}
    assert parts == {"hidden", "norm", "output", "total"}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` should be a positive integer, got 0"),
        ({"every_n_steps": 1.5}, "`every_n_steps` should be a positive integer, got 1.5"),
        ({"every_n_steps": True}, "`every_n_steps` should be a positive integer, got True"),
        ({"quantities": ("wieght",)}, "`quantities` should be some of weight, rms, .* Did you mean 'weight'"),
        ({"quantities": "weight"}, "`quantities` should be some of"),
        ({"quantities": ()}, "`quantities` should be some of"),
        ({"detail": "layer"}, "`detail` should be one of"),
        ({"norm_type": 0.5}, "`norm_type` should be at least 1"),
        ({"norm_type": math.nan}, "`norm_type` should be at least 1"),
        ({"threshold": -1.0}, "`threshold` should be finite and at least 0"),
        ({"threshold": math.nan}, "`threshold` should be finite and at least 0"),
        ({"max_keys": 0}, "`max_keys` should be a positive integer"),
        ({"max_histogram_megabytes": 0}, "`max_histogram_megabytes` should be positive"),
        ({"include": ("biases",)}, "Did you mean 'bias'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightNormMonitor(**arguments)


@pytest.mark.parametrize("detail", ["total", "parameter"])
def test_without_a_logger_totals_are_there_for_other_callbacks(detail, tmp_path):
    monitor = WeightNormMonitor(quantities=("weight", "gradient"), detail=detail)
    checkpoint = L.callbacks.ModelCheckpoint(tmp_path, monitor="weight_norm/total", save_on_train_epoch_end=True)
    stopping = L.callbacks.EarlyStopping(
        "gradient_norm/total", mode="max", stopping_threshold=0.0, check_on_train_epoch_end=True
    )
    trainer = make_trainer(
        monitor, checkpoint, stopping, logger=False, max_epochs=3, limit_train_batches=2, enable_checkpointing=True
    )
    module = Regression()
    with pytest.warns(UserWarning, match="The Trainer has no logger: WeightNormMonitor puts totals") as caught:
        trainer.fit(module, Batches())
    assert sum("WeightNormMonitor" in str(w.message) for w in caught) == 1
    assert {key for key in trainer.callback_metrics if "/" in key} == {
        "weight_norm/total",
        "gradient_norm/total",
        "gradient_nonfinite/total",
    }
    assert checkpoint.best_model_score == trainer.callback_metrics["weight_norm/total"]
    assert trainer.current_epoch == 1  # above the threshold, so that training has stopped after an epoch


# -- runs ------------------------------------------------------------------------------------------------------------


def test_totals_are_there_for_other_callbacks():
    logger, monitor = Kept(), WeightNormMonitor(detail="parameter")
    trainer = make_trainer(monitor, logger=logger, max_epochs=1)
    trainer.fit(Regression(), Batches())
    assert trainer.callback_metrics["weight_norm/total"].item() == pytest.approx(
        logger.logged()["weight_norm/total"][6], rel=1e-6, abs=0
    )
    assert "weight_norm/hidden.weight" not in trainer.callback_metrics
    assert not any("weight_norm" in key for key in trainer.progress_bar_metrics)


def test_a_second_fit_logs_as_a_first_one():
    monitor = WeightNormMonitor(quantities=EVERYTHING)
    first = fit(monitor).logged()
    module = Regression()
    second = fit(monitor, module=module).logged()
    assert second == first
    assert not list(module.trainer.optimizers[0]._optimizer_step_post_hooks)


def test_an_exception_leaves_no_hook_behind():
    class Broken(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            raise KeyError("stop")

    monitor, module = WeightNormMonitor(quantities=("update",)), Regression()
    with pytest.raises(KeyError):
        fit(Broken(), monitor, module=module)
    assert not list(module.trainer.optimizers[0]._optimizer_step_post_hooks)
    assert fit(monitor).logged()["update_norm/total"][0] > 0


def test_a_resumed_run_logs_the_same_values(tmp_path):
    def monitor():
        return WeightNormMonitor(quantities=EVERYTHING, detail="parameter", expected=True)

    uninterrupted = fit(monitor(), steps=7, max_epochs=2).logged()
    trainer = make_trainer(monitor(), logger=Kept(), max_epochs=1)
    trainer.fit(Regression(), Batches())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    logger = Kept()
    make_trainer(monitor(), logger=logger, max_epochs=2).fit(Regression(), Batches(), ckpt_path=tmp_path / "half.ckpt")
    resumed = {key: steps for key, steps in logger.logged().items() if "/" in key}
    second_half = {key: {s: v for s, v in uninterrupted[key].items() if s >= 7} for key in resumed}
    assert resumed == second_half


def test_a_copy_of_a_callback_that_trains_is_new():
    monitor = WeightNormMonitor(quantities=("update",), detail="group")
    copies = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            copies.append(pickle.loads(pickle.dumps(monitor)))

    fit(monitor, Copy(), steps=1)
    assert copies[0].detail == "group"
    assert fit(copies[0]).logged()["update_norm/pg1"][0] > 0


def test_nothing_grows_with_the_run():
    monitor = WeightNormMonitor(quantities=EVERYTHING, detail="parameter", expected=True)
    sizes = []

    class Size(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            kept = [value for value in vars(monitor).values() if isinstance(value, (dict, list, set, tuple, str))]
            sizes.append(sum(map(len, kept)))

    fit(monitor, Size(), max_epochs=10, steps=7)
    assert len(set(sizes[2:])) == 1


# -- loggers ---------------------------------------------------------------------------------------------------------


class MLFlowLogger(Kept):
    """Allows in keys what MLflow and its file store do, and only numbers as values."""

    def log_metrics(self, metrics, step):
        assert not any(other.startswith(f"{key}/") for key in metrics for other in metrics)
        for key, value in metrics.items():
            assert set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. /")
            assert isinstance(value, (int, float))
        super().log_metrics(metrics, step)


def test_several_loggers_have_the_same_numbers(tmp_path):
    csv, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    kept, mlflow = Kept(), MLFlowLogger()
    monitor = WeightNormMonitor(quantities=EVERYTHING, detail="module", expected=True, histograms=True)
    fit(monitor, logger=[csv, board, kept, mlflow])
    expected = {key: steps for key, steps in kept.logged().items() if "/" in key}
    from_csv = read_csv(csv)
    scalars, pictures = read_tensorboard(board)
    assert len(expected) > 30
    in_mlflow = mlflow.logged()
    for key, steps in expected.items():
        assert from_csv[key] == pytest.approx(steps, nan_ok=True, rel=1e-6, abs=0)
        assert in_mlflow[key.replace("/expected", " expected")] == pytest.approx(steps, nan_ok=True, rel=1e-6, abs=0)
        assert scalars[key] == pytest.approx(steps, rel=1e-6, nan_ok=True, abs=0)  # float32
    assert list(scalars["train_loss"]) == list(scalars["weight_norm/total"]) == [0, 1, 2]
    assert {key.partition("/")[0] for key in pictures} == {"weight_histogram", "gradient_histogram"}


def test_histograms_in_tensorboard_count_the_weights(tmp_path):
    board, oracle = TensorBoardLogger(tmp_path), Oracle()
    fit(WeightNormMonitor(quantities=("gradient",), histograms=True), oracle, logger=board, steps=2)
    _, pictures = read_tensorboard(board)
    for label, states in (("weight", oracle.before), ("gradient", oracle.gradients)):
        for name, values in states[1].items():
            picture = pictures[f"{label}_histogram/{name}"][1]
            assert picture.num == values.numel()
            assert picture.min <= values.min() <= values.max() <= picture.max
            upper = np.array(picture.bucket_limit)
            below = [(values <= edge + 1e-9).sum().item() for edge in upper]
            assert np.abs(np.cumsum(picture.bucket) - below).max() <= 1  # an element may lie on an edge


# lightning/pytorch/loggers/wandb.py and wandb/analytics: third parties in an offline run
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_weights_and_biases_gets_one_row_a_step(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    calls = []
    run = logger.experiment
    log, define, defined = run.log, run.define_metric, []
    monkeypatch.setattr(run, "define_metric", lambda name, **kw: defined.append(name) or define(name, **kw))
    monkeypatch.setattr(run, "log", lambda *args, **kwargs: calls.append((args, kwargs)) or log(*args, **kwargs))
    module = Regression()
    monitor = WeightNormMonitor(
        quantities=("weight", "update", "gradient", "sparsity", "timescale"),
        detail="parameter",
        threshold=0.1,
        histograms=True,
    )
    fit(monitor, module=module, logger=logger, log_every_n_steps=2, steps=6)
    wandb.finish()
    assert not any("step" in kwargs for _, kwargs in calls)
    rows = read_wandb(tmp_path)
    ours = [row for row in rows if "weight_norm/total" in row]
    losses = [row for row in rows if "train_loss" in row]
    steps = [row["trainer/global_step"] for row in ours]
    assert steps == [row["trainer/global_step"] for row in losses] == [1, 3, 5]
    assert sum("weight_norm/total" in args[0] for args, _ in calls) == 3
    keys = {key.partition("/")[0] for row in ours for key in row if "/" in key} - {"trainer"}
    assert keys <= {metric.removesuffix("/*") for metric in defined}
    picture = ours[0]["weight_histogram/hidden.weight"]
    assert picture["_type"] == "histogram"
    assert sum(picture["values"]) == module.hidden.weight.numel()
    assert len(picture["bins"]) == len(picture["values"]) + 1


def test_wandb_is_not_imported_for_others(monkeypatch):
    """Nor is it when the package is imported, as test_release.py finds."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    WeightNormMonitor(histograms=True)
    assert "wandb" not in sys.modules


def test_histograms_that_no_logger_can_draw_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="CSVLogger has no place for them"):
        fit(WeightNormMonitor(histograms=True), logger=CSVLogger(tmp_path))


def test_keys_beyond_the_cap_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="logs 2 of 6 keys a step"):
        logged = fit(WeightNormMonitor(detail="parameter", max_keys=2)).logged()
    assert {key for key in logged if "/" in key} == {
        "weight_norm/total",
        "weight_norm/hidden.weight",
        "weight_norm/hidden.bias",
    }


def test_histograms_end_at_the_cap(tmp_path):
    board = TensorBoardLogger(tmp_path)
    monitor = WeightNormMonitor(histograms=True, max_histogram_megabytes=2 * 6 * 1024 / 1e6)
    with pytest.warns(UserWarning, match="draws no more histograms"):
        fit(monitor, logger=board, steps=5)
    _, pictures = read_tensorboard(board)
    assert list(pictures["weight_histogram/hidden.weight"]) == [0, 1]


# -- cost ------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts operations, copies, and what waits for a device: ``.item()``, ``bool(tensor)``, a copy to the host."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")

    def __init__(self):
        super().__init__()
        self.counts = torch.zeros(3, dtype=torch.int64)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        with torch.utils._python_dispatch._disable_current_modes():
            self.counts += torch.tensor([1, name.startswith("aten.clone"), name.startswith(self.WAITING)])
        return func(*args, **(kwargs or {}))


class Snapshots(L.Callback):
    """The counts when each step begins, and when the last one has ended."""

    def __init__(self, calls):
        self.calls, self.seen = calls, []

    def on_train_batch_start(self, *_):
        self.seen.append(self.calls.counts.clone())

    def on_train_epoch_end(self, *_):
        self.seen.append(self.calls.counts.clone())


def added_to_each_step(monitor, steps):
    """Operations, copies and waiting operations that a run has with the monitor beyond those that it has without it."""
    found = []
    for callbacks in ([monitor], []):
        with Calls() as calls:
            fit(snapshots := Snapshots(calls), *callbacks, steps=steps)
        found.append(torch.stack(snapshots.seen).diff(dim=0))
    return (found[0] - found[1]).T.tolist()


def test_steps_that_are_not_logged_compute_nothing():
    operations, _, _ = added_to_each_step(
        WeightNormMonitor(quantities=EVERYTHING, detail="parameter", every_n_steps=3), steps=6
    )
    assert [count > 0 for count in operations] == [False, False, True, False, False, True]


def test_logged_steps_wait_for_no_single_number():
    monitor = WeightNormMonitor(quantities=READ_ONLY, detail="parameter", every_n_steps=1)
    operations, _, waits = added_to_each_step(monitor, steps=3)
    assert min(operations) > 0
    assert waits == [0, 0, 0]


class Alive(L.Callback):
    """Bytes of all tensors that Python holds in the second batch: right before its step, and after it."""

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 1:
            self.before_step = self.count()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.after_batch = self.count()

    def count(self):
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not is_fake(t)]
        # Other tests leave lazy and sparse ones, which have no storage.
        dense = [tensor for tensor in tensors if not is_lazy(tensor) and tensor.layout is torch.strided]
        storages = [tensor.untyped_storage() for tensor in dense]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_held(*callbacks):
    """By the weights, and by all tensors before a step and after it."""
    gc.collect()  # of the run before
    module = Regression()
    module.spare = nn.Parameter(torch.ones(500_000, dtype=torch.float64))
    fit(*callbacks, alive := Alive(), module=module, steps=2)
    return module.spare.nbytes, alive.before_step, alive.after_batch


def test_weights_are_copied_for_what_compares_only_and_no_longer_than_a_step():
    reads, compares = (
        WeightNormMonitor(quantities=quantities, every_n_steps=1)
        for quantities in (("weight", "gradient", "rms", "sparsity", "timescale"), ("update",))
    )
    for monitor in (reads, compares):  # what is kept from step to step is there from now on
        bytes_held(monitor)
    weights, bare_step, bare_batch = bytes_held()
    _, reads_step, reads_batch = bytes_held(reads)
    _, compares_step, compares_batch = bytes_held(compares)
    assert reads_step - bare_step < 0.1 * weights
    assert weights <= compares_step - bare_step < 1.1 * weights
    assert max(reads_batch, compares_batch) - bare_batch < 0.1 * weights


# -- several processes -----------------------------------------------------------------------------------------------


def _train_on_two(rank, world_size, strategy, path):
    import warnings

    warnings.simplefilter("ignore")
    kept = Kept()
    monitor = WeightNormMonitor(
        quantities=EVERYTHING if strategy != "fsdp1" else FLAT,
        detail="parameter",
        histograms=True,
        expected=True,
    )
    trainer = make_trainer(
        monitor,
        logger=[kept, TensorBoardLogger(path)],
        max_epochs=1,
        strategy=_strategy(strategy),
        devices=world_size,
        use_distributed_sampler=False,
    )
    trainer.fit(Spread() if strategy == "fsdp2" else Regression(), Batches())
    return kept.logged()


def _count_collectives(rank, world_size):
    import warnings

    from lightning_regularize import _sharding

    warnings.simplefilter("ignore")
    calls, reduce = [], _sharding._all_reduce
    _sharding._all_reduce = lambda *args: calls.append(args) or reduce(*args)
    monitor = WeightNormMonitor(quantities=READ_ONLY, detail="parameter", every_n_steps=2)
    options = {"max_epochs": 1, "devices": world_size, "use_distributed_sampler": False}
    trainer = make_trainer(monitor, logger=Kept(), strategy=_strategy("fsdp2"), **options)
    trainer.fit(Spread(), Batches())
    return len(calls)


READ_ONLY = tuple(quantity for quantity in EVERYTHING if quantity not in ("stable_rank", "spectral_norm"))

FLAT = tuple(quantity for quantity in READ_ONLY if quantity != "distance")


def test_all_parameters_and_quantities_share_one_collective():
    meshes_and_placements = 1
    assert run_distributed(_count_collectives) == [3 * meshes_and_placements] * 2  # on steps 1, 3, 5


def _strategy(name):
    if name == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    if name == "fsdp1":
        from lightning.pytorch.strategies import FSDPStrategy

        class CPUFSDPStrategy(FSDPStrategy):
            def _setup_model(self, model):
                from torch.distributed.fsdp import FullyShardedDataParallel

                return FullyShardedDataParallel(module=model, device_id=torch.device("cpu"), **self.kwargs)

        return CPUFSDPStrategy(process_group_backend="gloo")
    return name


class Spread(Regression):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for layer in (self.hidden, self.norm, self.output):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
def test_two_processes_log_what_one_does(strategy, tmp_path):
    quantities = EVERYTHING if strategy != "fsdp1" else FLAT
    board = TensorBoardLogger(tmp_path / "one")
    monitor = WeightNormMonitor(quantities=quantities, detail="parameter", histograms=True, expected=True)
    kept = Kept()
    fit(monitor, logger=[kept, board], steps=7)
    alone = {key: steps for key, steps in kept.logged().items() if "/" in key}
    first, second = run_distributed(_train_on_two, strategy, tmp_path / "two")
    for key, steps in alone.items():
        assert first[key] == pytest.approx(steps, rel=1e-5, abs=5e-5, nan_ok=True), key  # FSDP1 trains in float32
    assert not any("/" in key for key in second)  # rank 0 alone writes
    found = read_tensorboard(TensorBoardLogger(tmp_path / "two", version=0))[1]
    expected = read_tensorboard(board)[1]
    for key, pictures in expected.items():
        for step, picture in pictures.items():
            assert found[key][step].num == picture.num
            if strategy != "fsdp1":  # trains in float32, which moves elements over edges
                assert list(found[key][step].bucket) == list(picture.bucket)
