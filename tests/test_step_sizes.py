"""Is a step size how far the optimizer really goes? Each optimizer is given a steady gradient, and watched."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RMSprop

from lightning_regularize.step_sizes import KNOWN_OPTIMIZERS, knows, step_size, step_sizes, thresholds, unknown_metric
from tests.models import randn

GRADIENT = torch.tensor([[-3.0, 1.0], [0.2, 1e-3]], dtype=torch.float64)

CONSTANT = {  # the same length for each weight
    "SGD": functools.partial(SGD, lr=0.1),
    "SGD momentum": functools.partial(SGD, lr=0.1, momentum=0.9),
    "SGD dampening": functools.partial(SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD dampening without momentum, which then does not matter": functools.partial(SGD, lr=0.1, dampening=0.5),
    "SGD Nesterov": functools.partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD maximize": functools.partial(SGD, lr=0.1, momentum=0.5, maximize=True),
    "SGD foreach": functools.partial(SGD, lr=0.1, momentum=0.5, foreach=True),
    "SGD fused": functools.partial(SGD, lr=0.1, momentum=0.5, fused=True),
    "SGD tensor lr": functools.partial(SGD, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.5),
}
ELEMENTWISE = {
    "Adam": functools.partial(Adam, lr=0.1),
    "Adam betas": functools.partial(Adam, lr=0.1, betas=(0.5, 0.9), eps=1e-2),
    "Adam amsgrad": functools.partial(Adam, lr=0.1, amsgrad=True),
    "Adam foreach": functools.partial(Adam, lr=0.1, foreach=True),
    "Adam fused": functools.partial(Adam, lr=0.1, fused=True),
    "Adam maximize": functools.partial(Adam, lr=0.1, maximize=True),
    "Adam tensor lr": functools.partial(Adam, lr=torch.tensor(0.1, dtype=torch.float64), foreach=False),
    "AdamW": functools.partial(AdamW, lr=0.1, weight_decay=0.0),
    "NAdam": functools.partial(NAdam, lr=0.1),
    "NAdam fast": functools.partial(NAdam, lr=0.1, momentum_decay=0.1),
    "RMSprop": functools.partial(RMSprop, lr=0.1),
    "RMSprop momentum": functools.partial(RMSprop, lr=0.1, momentum=0.5, alpha=0.5),
    "RMSprop centered": functools.partial(RMSprop, lr=0.1, centered=True),
    "Adagrad": functools.partial(Adagrad, lr=0.1),
    "Adagrad lr decay": functools.partial(Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.3),
    "Adagrad fused": functools.partial(Adagrad, lr=0.1, fused=True),
}


def stepped(make_optimizer, steps=1):
    """An optimizer and its only parameter, after steps of a steady gradient, and where the parameter was before."""
    weight = nn.Parameter(torch.zeros_like(GRADIENT))
    optimizer = make_optimizer([weight])
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = GRADIENT.clone()
        optimizer.step()
    return optimizer, weight, before


def size_of(optimizer, weight):
    return step_size(optimizer, optimizer.param_groups[0], weight)


@pytest.mark.parametrize("name", {**CONSTANT, **ELEMENTWISE})
def test_a_steady_gradient_moves_weights_by_the_step_size(name):
    optimizer, weight, before = stepped({**CONSTANT, **ELEMENTWISE}[name], steps=400)
    moved = (before - weight.detach()) / GRADIENT
    lengths = size_of(optimizer, weight).lengths()
    torch.testing.assert_close(
        moved.abs(), torch.as_tensor(lengths, dtype=torch.float64).expand_as(moved), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if "momentum" not in name])
def test_without_momentum_or_with_its_bias_corrected_it_does_so_from_the_first_step(name, steps):
    optimizer, weight, before = stepped(ELEMENTWISE[name], steps)
    moved = (before - weight.detach()).abs() / GRADIENT.abs()
    torch.testing.assert_close(moved, size_of(optimizer, weight).lengths(), rtol=1e-12, atol=0)


def test_amsgrad_goes_as_far_as_its_largest_average_says():
    """Gradients are smaller now than they were. Without momentum a step is gradient times length."""
    weight = nn.Parameter(torch.zeros_like(GRADIENT))
    optimizer = Adam([weight], lr=0.1, betas=(0.0, 0.9), amsgrad=True)
    for gradient in (GRADIENT, *[0.01 * GRADIENT] * 5):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    moved = (before - weight.detach()).abs() / (0.01 * GRADIENT).abs()
    torch.testing.assert_close(moved, size_of(optimizer, weight).lengths(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CONSTANT)
def test_the_step_size_of_sgd_is_one_number(name):
    assert size_of(*stepped(CONSTANT[name])[:2]).square is None


def test_the_lr_of_now_counts():
    optimizer, weight, _ = stepped(functools.partial(SGD, lr=0.1))
    optimizer.param_groups[0]["lr"] = 0.3
    assert size_of(optimizer, weight).length == 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Adam", "Adam amsgrad", "RMSprop centered", "Adagrad lr decay"])
def test_thresholds_of_several_weights_are_strength_times_length(name, dtype):
    weights = [nn.Parameter(torch.zeros(3, 4, dtype=dtype)), nn.Parameter(torch.zeros(5, dtype=dtype))]
    optimizer = ELEMENTWISE[name](weights)
    for steps, stepped in ((1, weights), (3, weights[1:])):  # one of them has made more steps than the other
        for seed in range(steps):
            for weight in stepped:
                weight.grad = randn(*weight.shape, seed=seed).to(dtype)
            optimizer.step()
            optimizer.zero_grad()
    sizes = step_sizes(optimizer, optimizer.param_groups[0], weights)
    means = [size.mean for size in sizes if size.mean is not None]
    found = thresholds(sizes, [size.square for size in sizes], means, 0.25)
    for threshold, size in zip(found, sizes, strict=True):
        mean = 0.0 if size.mean is None else size.mean.double()
        variance = size.correction * (size.square.double() - mean**2)
        expected = 0.25 * size.length / (variance.sqrt() + size.eps)
        accurate = torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(threshold, expected.to(accurate), rtol=1e-5, atol=0)


def test_lengths_leave_the_state_alone():
    optimizer, weight, _ = stepped(ELEMENTWISE["RMSprop centered"])
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    size_of(optimizer, weight).lengths()
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in before.items())


@pytest.mark.parametrize("make_optimizer", [Adam, AdamW, NAdam, RMSprop])
def test_a_parameter_that_was_not_stepped_has_no_step_size_yet(make_optimizer):
    weight = nn.Parameter(torch.ones(1))
    assert size_of(make_optimizer([weight]), weight) is None


class Renamed(Adam):
    """A subclass, as libraries and users make them."""


def test_subclasses_are_known():
    assert knows(Renamed([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("make_optimizer", [Adadelta, Adafactor, Adamax, LBFGS, Muon])
def test_an_unknown_metric_is_an_error_that_names_the_known(make_optimizer):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([weight])
    assert not knows(optimizer)
    with pytest.raises(ValueError, match=f"{', '.join(KNOWN_OPTIMIZERS)}, not of {make_optimizer.__name__}"):
        size_of(optimizer, weight)
    assert "method='gradient'" in unknown_metric(optimizer)
