"""Does training end where mathematics, or scikit-learn, says that it ends?

Long runs have a loop of their own, whose steps take a tenth of a Trainer's. Both end alike, says ``test_attach.py``.
"""

import functools
import math

import lightning.pytorch as L
import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn import linear_model
from sklearn.datasets import load_diabetes
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    WeightDecay,
)
from lightning_regularize.decay import decay_
from tests.training.support import QUIET, make_trainer

pytestmark = QUIET

A, B, D = 3.0, 2.0, 0.5  # the loss is B w^2 / 2 - A w, and D the strength of what is added


class Problem(L.LightningModule):
    """A loss of one layer's parameters; every batch is the whole of the data."""

    def __init__(self, layer, make_optimizer):
        super().__init__()
        self.layer, self.make_optimizer = layer.double(), make_optimizer

    def training_step(self, batch, batch_idx):
        return self.loss()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Quadratic(Problem):
    def __init__(self, make_optimizer, start=0.25):
        super().__init__(nn.Linear(1, 1, bias=False), make_optimizer)
        nn.init.constant_(self.layer.weight, start)

    def loss(self):
        weight = self.layer.weight.squeeze()
        return 0.5 * B * weight**2 - A * weight


def solve(problem, callback, steps):
    configured = problem.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured

    def closure():
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    with callback.attach(optimizer, problem):
        for _ in range(steps):
            optimizer.step(closure)
            if optimizer is not configured:
                configured["lr_scheduler"]["scheduler"].step()
    return problem


def end_of(make_optimizer, callback, steps, **options):
    return solve(Quadratic(make_optimizer, **options), callback, steps).layer.weight.item()


# --- one weight ---------------------------------------------------------------------------------------------------

PLAIN = functools.partial(SGD, lr=0.3)
HEAVY = functools.partial(SGD, lr=0.1, momentum=0.5)
ADAM = functools.partial(Adam, lr=0.1, betas=(0.5, 0.9))
ADAMW = functools.partial(AdamW, lr=0.2, betas=(0.5, 0.9))
RIDGE = A / (B + D)


def slowing(make_optimizer, factor):
    """Adam goes on jumping to and fro unless its rate goes to zero."""

    def configure(parameters):
        optimizer = make_optimizer(parameters)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return configure


ANNEALED = slowing(ADAM, 0.96)


@pytest.mark.parametrize(
    ("callback", "make_optimizer", "expected"),
    [
        pytest.param(WeightDecay(D), PLAIN, RIDGE, id="SGD's own"),
        pytest.param(WeightDecay(D, method="coupled"), PLAIN, RIDGE, id="coupled, SGD"),
        pytest.param(WeightDecay(D, method="coupled"), HEAVY, RIDGE, id="coupled, momentum"),
        pytest.param(WeightDecay(D, method="coupled"), ANNEALED, RIDGE, id="coupled, Adam"),
        pytest.param(WeightDecay(D, method="decoupled"), PLAIN, RIDGE, id="decoupled, SGD"),
        pytest.param(WeightDecay(D, method="decoupled"), HEAVY, A / (B + 0.5 * D), id="decoupled, momentum"),
        pytest.param(WeightDecay(0.05, method="independent"), PLAIN, A / (B + 0.05 / 0.3), id="independent"),
        pytest.param(WeightDecay(D, method="stable"), PLAIN, RIDGE, id="stable, SGD"),
        pytest.param(WeightDecay(D, method="stable"), HEAVY, RIDGE, id="stable, momentum"),
        pytest.param(WeightDecay(D, method="stable"), ADAM, RIDGE, id="stable, Adam"),
        pytest.param(WeightDecay(D, method="cautious"), PLAIN, A / B, id="cautious, SGD"),
        pytest.param(WeightDecay(D, method="cautious"), ANNEALED, A / B, id="cautious, Adam"),
        pytest.param(L2Penalty(D), PLAIN, RIDGE, id="L2, SGD"),
        pytest.param(L2Penalty(D), ANNEALED, RIDGE, id="L2, Adam"),
        pytest.param(L2Penalty(D, method="proximal"), PLAIN, RIDGE, id="proximal L2, SGD"),
        pytest.param(L2Penalty(D, method="proximal"), HEAVY, RIDGE, id="proximal L2, momentum"),
        pytest.param(L2Penalty(D, method="proximal"), ADAM, RIDGE, id="proximal L2, Adam"),
        pytest.param(AnchorDecay(D), PLAIN, (A + D * 0.25) / (B + D), id="anchor"),
        pytest.param(AnchorDecay(D, anchor={"layer.weight": torch.tensor([[4.0]])}), PLAIN, 2.0, id="given anchor"),
    ],
)
def test_one_weight_ends_at(callback, make_optimizer, expected):
    problem = Quadratic(make_optimizer)
    make_trainer(callback, max_epochs=1).fit(problem, range(80 if make_optimizer in (PLAIN, HEAVY) else 250))
    assert problem.layer.weight.item() == pytest.approx(expected, rel=1e-6, abs=0)


class Hill(Quadratic):
    def loss(self):
        return -super().loss()


def test_coupled_decay_pulls_to_zero_while_an_optimizer_climbs():
    hill = solve(Hill(functools.partial(SGD, lr=0.3, maximize=True)), WeightDecay(D, method="coupled"), steps=80)
    assert hill.layer.weight.item() == pytest.approx(RIDGE, rel=1e-6, abs=0)


@pytest.mark.parametrize("start", [-4.0, 4.0], ids=["from below", "from above"])
def test_cautious_decay_does_not_move_the_minimum(start):
    assert end_of(PLAIN, WeightDecay(D, method="cautious"), steps=80, start=start) == pytest.approx(
        A / B, rel=1e-6, abs=0
    )


@pytest.mark.parametrize("start", [-1.0, 3.0], ids=["from below", "from above"])
@pytest.mark.parametrize("weight_decay", [0.1, 0.5, 1.0, 2.0], ids=str)
def test_full_batch_adamw_is_clipped_and_no_ridge(weight_decay, start):
    """Xie and Li, "Implicit Bias of AdamW", ICML 2024: at its end no weight exceeds 1 / weight_decay."""
    found = end_of(slowing(ADAMW, 0.98), WeightDecay(weight_decay), steps=300, start=start)
    assert found == pytest.approx(min(A / B, 1 / weight_decay), rel=0.02, abs=0)


@pytest.mark.parametrize("gamma", [0.9, 0.99], ids=str)
def test_to_shrink_before_each_gradient_step_is_ridge(gamma):
    weight, rate = torch.tensor(4.0, dtype=torch.float64), 0.2
    for _ in range(200):
        decay_(weight, 1 - gamma)
        at = weight.item()
        weight -= rate * (B * weight - A)
    assert at == pytest.approx(A / (B + (1 - gamma) / (gamma * rate)), rel=1e-12, abs=0)


# --- constrained decay --------------------------------------------------------------------------------------------


class Bowl(Problem):
    """A quadratic in 20 dimensions, begun at its minimum."""

    def __init__(self, make_optimizer):
        super().__init__(nn.Linear(20, 1, bias=False), make_optimizer)
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(20, 40, generator=generator, dtype=torch.float64)
        self.hessian = root @ root.T / 40
        self.minimum = 0.1 * torch.randn(20, generator=generator, dtype=torch.float64)
        self.layer.weight.data.copy_(self.minimum)

    def loss(self):
        off = self.layer.weight[0] - self.minimum
        return 0.5 * off @ self.hessian @ off


def karush_kuhn_tucker(bowl, bound):
    """The minimum with a squared norm of at most ``bound``, and its multiplier, in float64 by scipy's root finder."""
    hessian, minimum = bowl.hessian.numpy(), bowl.minimum.numpy()

    def at(multiplier):
        return np.linalg.solve(hessian + 2 * multiplier * np.eye(20), hessian @ minimum)

    multiplier = scipy.optimize.brentq(lambda m: at(m) @ at(m) - bound, 0, 1e3)
    return at(multiplier), multiplier


def test_constrained_decay_finds_the_constrained_minimum_and_its_multiplier():
    bowl = Bowl(functools.partial(SGD, lr=0.015))
    decay = ConstrainedDecay("start", factor=0.25)
    bound = 0.25 * bowl.minimum.square().sum().item()
    expected, multiplier = karush_kuhn_tucker(bowl, bound)
    found = solve(bowl, decay, steps=1000).layer.weight.detach().numpy()[0]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.02
    found_multiplier = decay.state_dict()["matrices"]["multiplier"]["layer.weight"]
    assert found @ found / (1 - 2 * found_multiplier) ** 2 == pytest.approx(
        bound, rel=1e-3, abs=0
    )  # it binds, then decays
    assert found_multiplier / 0.015 == pytest.approx(multiplier, rel=0.02, abs=0)


# --- diabetes -----------------------------------------------------------------------------------------------------

X, Y = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
X = (X - X.mean(0)) / X.std(0, unbiased=False)
Y = (Y - Y.mean()) / Y.std(unbiased=False)


class Diabetes(Problem):
    """Half the mean squared error, as scikit-learn's lasso has it."""

    def __init__(self, make_optimizer, *, bias=False, offset=0.0):
        super().__init__(nn.Linear(10, 1, bias=bias), make_optimizer)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.targets = Y + offset

    def loss(self):
        return 0.5 * (self.layer(X).squeeze(1) - self.targets).square().mean()

    @property
    def coefficients(self):
        return self.layer.weight.detach().numpy()[0]


OPTIMIZERS = {  # and in how many steps they are there
    "SGD": (functools.partial(SGD, lr=0.45), 200),
    "momentum": (functools.partial(SGD, lr=0.1, momentum=0.9), 500),
    "Nesterov": (functools.partial(SGD, lr=0.3, momentum=0.9, nesterov=True), 300),
    "dampening": (functools.partial(SGD, lr=3.0, momentum=0.9, dampening=0.9), 500),
    "Adam": (functools.partial(Adam, lr=0.02), 500),
    "Adam fused": (functools.partial(Adam, lr=0.02, fused=True), 500),
    "AMSGrad": (functools.partial(Adam, lr=0.1, amsgrad=True), 500),
    "AdamW": (functools.partial(AdamW, lr=0.02, weight_decay=0.0), 500),
    "NAdam": (functools.partial(NAdam, lr=0.02), 500),
    "RMSprop": (functools.partial(RMSprop, lr=0.01), 400),
    "RMSprop momentum": (functools.partial(RMSprop, lr=0.005, momentum=0.5, alpha=0.9), 500),
    "RMSprop centered": (functools.partial(RMSprop, lr=0.05, centered=True, eps=0.1), 300),
    "Adagrad": (functools.partial(Adagrad, lr=0.3), 300),
    "Adagrad lr decay": (functools.partial(Adagrad, lr=0.3, lr_decay=1e-3), 400),
}
exactly = {"fit_intercept": False, "tol": 1e-15, "max_iter": 1_000_000}
SPARSE = {
    "lasso": (L1Penalty(0.05, method="proximal"), linear_model.Lasso(alpha=0.05, **exactly)),
    "elastic net": (
        ElasticNetPenalty(0.05, 0.05, method="proximal"),
        linear_model.ElasticNet(alpha=0.1, l1_ratio=0.5, **exactly),
    ),
}


@functools.cache
def by_scikit_learn(name):
    return SPARSE[name][1].fit(X.numpy(), Y.numpy()).coef_


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("lasso", optimizer) for optimizer in OPTIMIZERS]
    + [("elastic net", optimizer) for optimizer in ("SGD", "momentum", "Adam", "RMSprop", "Adagrad")],
)
def test_proximal_steps_end_at_scikit_learns_coefficients_and_zeros(name, optimizer):
    make_optimizer, steps = OPTIMIZERS[optimizer]
    found = solve(Diabetes(make_optimizer), SPARSE[name][0], steps=steps).coefficients
    expected = by_scikit_learn(name)
    assert np.abs(found - expected).max() < 1e-10
    assert ((found == 0) == (expected == 0)).all()
    assert 0 < (found == 0).sum() < 10


def test_the_gradient_of_the_lasso_comes_near_without_a_zero():
    found = solve(Diabetes(functools.partial(SGD, lr=0.01, momentum=0.8)), L1Penalty(0.05), steps=400).coefficients
    expected = by_scikit_learn("lasso")
    assert 1e-10 < np.abs(found - expected).max() < 5e-3
    assert (found != 0).all()


MOMENTUM = functools.partial(SGD, lr=0.3, momentum=0.8)


@pytest.mark.parametrize(
    ("callback", "make_optimizer"),
    [
        (L2Penalty(0.2), MOMENTUM),
        (L2Penalty(0.2, method="proximal"), MOMENTUM),
        (WeightDecay(0.2, method="coupled"), MOMENTUM),
        (WeightDecay(0.2, method="coupled"), functools.partial(LBFGS, tolerance_grad=1e-14, tolerance_change=0.0)),
        (WeightDecay(0.2), MOMENTUM),
    ],
    ids=["L2", "proximal L2", "coupled", "coupled, LBFGS", "SGD's own"],
)
def test_ridge_with_the_bias_excluded_equals_scikit_learns_intercept_too(callback, make_optimizer):
    expected = linear_model.Ridge(alpha=0.2 * len(X), tol=1e-14).fit(X.numpy(), (Y + 10).numpy())
    steps = 250 if make_optimizer is MOMENTUM else 5
    problem = solve(Diabetes(make_optimizer, bias=True, offset=10.0), callback, steps=steps)
    assert np.abs(problem.coefficients - expected.coef_).max() < 1e-10
    assert problem.layer.bias.item() == pytest.approx(expected.intercept_, abs=1e-10, rel=1e-6)


def test_a_bias_that_decays_is_drawn_to_zero():
    problem = Diabetes(MOMENTUM, bias=True, offset=10.0)
    solve(problem, WeightDecay(0.2, method="coupled", exclude=()), steps=250)
    assert problem.layer.bias.item() == pytest.approx(10 / 1.2, abs=1e-10, rel=1e-6)


# --- whole units --------------------------------------------------------------------------------------------------


class Multitask(Problem):
    """Three related regressions at once: a group is the row of an output."""

    def __init__(self, make_optimizer):
        super().__init__(nn.Linear(10, 4, bias=False), make_optimizer)
        nn.init.zeros_(self.layer.weight)
        self.layer.weight.data[:, 0] = 0.1  # a group that is zero has no direction to leave it by in the first step
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(X), 3, generator=generator, dtype=torch.float64)
        self.targets = torch.cat([Y[:, None], 0.5 * Y[:, None] + 0.5 * noise[:, :1], noise[:, 1:]], dim=1)

    def loss(self):
        return 0.5 * (self.layer(X) - self.targets).square().mean(0).sum()


@functools.cache
def group_lasso_by_ista(strength, steps=6000):
    """The textbook's proximal gradient steps, on each row for itself."""
    gram, cross = (X.T @ X / len(X)).numpy(), (X.T @ Multitask(None).targets / len(X)).numpy()
    weight, threshold = np.zeros((4, 10)), 0.2 * strength * math.sqrt(10)
    for _ in range(steps):
        weight = weight - 0.2 * (weight @ gram - cross.T)
        lengths = np.linalg.norm(weight, axis=1, keepdims=True)
        weight = weight * np.maximum(0, 1 - threshold / np.maximum(lengths, 1e-300))
    return weight


@pytest.mark.parametrize(
    "make_optimizer",
    [
        pytest.param(functools.partial(SGD, lr=0.3, momentum=0.9), id="momentum"),
        pytest.param(functools.partial(Adam, lr=0.02), id="Adam"),
        pytest.param(functools.partial(Adam, lr=0.02, fused=True), id="Adam fused"),
        pytest.param(functools.partial(Adam, lr=0.2, amsgrad=True), id="AMSGrad"),
        pytest.param(functools.partial(NAdam, lr=0.02), id="NAdam"),
        pytest.param(functools.partial(RMSprop, lr=0.03, eps=0.1), id="RMSprop"),
        pytest.param(functools.partial(Adagrad, lr=0.3), id="Adagrad"),
    ],
)
def test_the_group_lasso_ends_at_the_same_zeros_and_coefficients_with_every_optimizer(make_optimizer):
    problem = solve(Multitask(make_optimizer), GroupLassoPenalty(0.05, method="proximal"), steps=300)
    found, expected = problem.layer.weight.detach().numpy(), group_lasso_by_ista(0.05)
    assert np.abs(found - expected).max() < 1e-8
    assert ((found == 0).all(axis=1) == (expected == 0).all(axis=1)).all()
    assert 0 < (found == 0).all(axis=1).sum() < 4
