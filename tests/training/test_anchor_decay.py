"""AnchorDecay(method="selective") and AnchorDecay(importance=...): the same numbers as loops by hand."""

import functools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from lightning_regularize import AnchorDecay
from lightning_regularize.schedules import Linear
from tests.training.support import QUIET, Batches, Regression, SaveAfter, assert_identical_weights, train, weights

pytestmark = QUIET

adam = functools.partial(Adam, lr=0.1)
STEPS = 40


def by_hand(pull, make_optimizer=adam):
    """Train without the callback, and call ``pull(step, before, gradients, anchors, parameters)`` after each step."""
    module = Regression(make_optimizer)
    optimizer, batches = module.configure_optimizers(), Batches().batches
    parameters = dict(module.named_parameters())
    anchors = weights(module)
    for step in range(STEPS):
        optimizer.zero_grad()
        module.loss(batches[step % len(batches)]).backward()
        before, gradients = weights(module), {name: p.grad.clone() for name, p in parameters.items()}
        optimizer.step()
        with torch.no_grad():
            pull(step, before, gradients, anchors, parameters)
    return weights(module)


@pytest.mark.parametrize("make_optimizer", [adam, functools.partial(SGD, lr=0.3, momentum=0.9)], ids=["Adam", "SGD"])
@pytest.mark.parametrize("schedule", [1.0, 0.3, Linear(0.0, 1.0)], ids=repr)
def test_selective_decay_equals_a_loop_by_hand(schedule, make_optimizer):
    pulled = []

    def pull(step, before, gradients, anchors, parameters):
        strength = schedule if isinstance(schedule, float) else step / (STEPS - 1)
        for name, p in parameters.items():
            gap = p - anchors[name]
            if (gradients[name] * (before[name] - anchors[name])).sum() > 0 and gap.norm() > 0:
                ratio = max(0.0, 1 - (before[name] - anchors[name]).norm() / gap.norm())
                pulled.append(ratio)
                p.sub_(strength * ratio * gap)

    expected = by_hand(pull, make_optimizer)
    assert 0 < sum(ratio > 0 for ratio in pulled) < STEPS * 6  # sometimes, and not always
    module = Regression(make_optimizer)
    train(module, AnchorDecay(schedule, method="selective"), max_epochs=-1, max_steps=STEPS)
    for name, weight in weights(module).items():
        assert (weight - expected[name]).abs().max() < 1e-12, name


def test_selective_decay_of_lbfgs_looks_at_the_first_evaluation_of_each_step():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    generator, evaluations = torch.Generator().manual_seed(1), []
    batches = torch.randn(3, 8, 3, generator=generator, dtype=torch.float64)

    def step(module, optimizer, batch, *, fails=False):
        def closure():
            optimizer.zero_grad()
            loss = (module(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
            loss.backward()
            evaluations.append(loss)
            if fails and len(evaluations) == first + 2:
                raise KeyboardInterrupt
            return loss

        first = len(evaluations)
        optimizer.step(closure)

    module, twin = net(), net()
    anchors = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    optimizer, of_twin = (LBFGS(each.parameters(), lr=0.1, max_iter=3) for each in (module, twin))
    parameters, pulled = list(twin.parameters()), 0
    with AnchorDecay(1.0, anchor=anchors, method="selective").attach(optimizer, module):
        for i, batch in enumerate(batches):
            for each, its_optimizer in ((module, optimizer), (twin, of_twin)) if i else ():
                with pytest.raises(KeyboardInterrupt):  # after weights have moved, and before they are pulled
                    step(each, its_optimizer, batch, fails=True)
            step(module, optimizer, batch)
            before = [p.detach().clone() for p in parameters]
            loss = (twin(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
            calls_back = [(g * p).sum() > 0 for g, p in zip(torch.autograd.grad(loss, parameters), before, strict=True)]
            step(twin, of_twin, batch)
            for p, start, is_called in zip(parameters, before, calls_back, strict=True):
                if is_called and p.norm() > start.norm():
                    pulled += 1
                    p.detach().mul_(start.norm() / p.detach().norm())
            for name, p in module.named_parameters():
                assert (p - twin.get_parameter(name)).abs().max() < 1e-12, name
    assert pulled
    assert len(evaluations) > 2 * len(batches)  # several in each step


def test_importance_pulls_each_element_by_its_own():
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in Regression().named_parameters() if name.endswith("weight")}
    importance = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    anchors = weights(Regression())

    class Pulled(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            def closure():
                loss = optimizer_closure()
                with torch.no_grad():
                    for name, factor in importance.items():
                        p = self.get_parameter(name)
                        p.sub_(0.1 * 0.5 * factor.double() * (p - anchors[name]))
                return loss

            optimizer.step(closure=closure)

    train(twin := Pulled(adam), max_epochs=2)
    train(module := Regression(adam), AnchorDecay(0.5, importance=importance, include=("*weight",)), max_epochs=2)
    for name, weight in weights(module).items():
        assert (weight - weights(twin)[name]).abs().max() < 1e-12, name


def test_importance_of_one_everywhere_is_none():
    ones = {name: torch.ones(p.shape, requires_grad=True) for name, p in Regression().named_parameters()}
    train(module := Regression(adam), AnchorDecay(0.5, importance=ones), max_epochs=1)
    train(twin := Regression(adam), AnchorDecay(0.5), max_epochs=1)
    for name, weight in weights(module).items():
        assert (weight - weights(twin)[name]).abs().max() < 1e-14, name


def test_what_has_no_importance_is_left_alone():
    importance = {"hidden.weight": torch.ones(4, 3)}
    layer = nn.Module()
    layer.hidden, layer.output = nn.Linear(3, 4), nn.Linear(4, 3)
    optimizer = SGD(layer.parameters(), lr=0.5)
    with AnchorDecay(1.0, importance=importance).attach(optimizer, layer):
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(1.0)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in layer.named_parameters()}
    assert moved.pop("hidden.weight") == pytest.approx(0.5, rel=1e-5, abs=0)
    assert set(moved.values()) == {0.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda: AnchorDecay(0.5, method="selective"),
        lambda: AnchorDecay(0.5, importance={"hidden.weight": torch.ones(4, 3)}),
    ],
    ids=["selective", "importance"],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(make, tmp_path):
    train(whole := Regression(adam), make(), SaveAfter(tmp_path, 5), max_epochs=2)
    train(resumed := Regression(adam), make(), max_epochs=2, ckpt_path=tmp_path / "5.ckpt")
    assert_identical_weights(weights(whole), weights(resumed))


def attach(callback, dtype=torch.float32):
    layer = nn.Linear(3, 2, dtype=dtype)
    optimizer = SGD(layer.parameters(), lr=0.5)
    with callback.attach(optimizer, layer):
        layer(torch.ones(3, dtype=dtype)).sum().backward()
        optimizer.step()


ones = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "spd"}, ValueError, r"AnchorDecay: `method` should be one of \('decoupled', 'selective'\)"),
        ({"importance": ones}, TypeError, "AnchorDecay: `importance` should be a dictionary of tensors by name"),
        ({"importance": {"weight": ones}, "method": "selective"}, ValueError, "`importance` is for method='decoupled'"),
        ({"importance": {"wait": ones}}, ValueError, r"such as 'weight', got 'wait'"),
        ({"importance": {"weight": ones[0]}}, ValueError, r"of shape \(2, 3\) for 'weight', got shape \(3,\)"),
        ({"importance": {"weight": 1.0}}, ValueError, r"of shape \(2, 3\) for 'weight', got float"),
        ({"importance": {"weight": -ones}}, ValueError, "`importance` of 'weight' should be a dense tensor of finite"),
        (
            {"importance": {"weight": ones / 0}},
            ValueError,
            "`importance` of 'weight' should be a dense tensor of finite",
        ),
        (
            {"importance": {"weight": ones.long()}},
            ValueError,
            "dense tensor of finite floating-point numbers of at least 0",
        ),
        ({"importance": {"weight": ones.to_sparse()}}, ValueError, "should be a dense tensor of finite floating-point"),
        ({"importance": {}}, ValueError, "`importance` is 0 everywhere, so that nothing would be pulled"),
        ({"importance": {"weight": 0 * ones}}, ValueError, "`importance` is 0 everywhere"),
        ({"importance": {"weight": 100 * ones}}, ValueError, r"should be at most 1, got 0\.05 \* 100"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        attach(AnchorDecay(0.1, **arguments))


def test_half_precision_is_refused():
    with pytest.raises(MisconfigurationException, match="needs the distance that a step adds, and rounds it away"):
        attach(AnchorDecay(0.1, method="selective"), torch.bfloat16)
