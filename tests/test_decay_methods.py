"""Does each method of weight decay, in a loop written by hand, do what its formula or another optimizer does?"""

import functools
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

from lightning_regularize._sharding import Sharding
from lightning_regularize.decay_methods import Alike, Cautious, Coupled, Decoupled, Independent, Stable
from tests.models import randn
from tests.naming import printed
from tests.properties import assert_same_bits

STEPS = 50
WEIGHT_DECAY = 0.3


def parameters(dtype=torch.float64):
    return [nn.Parameter(randn(4, 3, seed=1).to(dtype)), nn.Parameter(randn(5, seed=2).to(dtype))]


def gradients(weights, step):
    return [(w + randn(*w.shape, seed=10 * step + i)).detach().to(w.dtype) for i, w in enumerate(weights)]


def targets(optimizer, weight_decay=WEIGHT_DECAY):
    """Everything with a gradient; the second group decays by half."""
    lists = []
    for i, group in enumerate(optimizer.param_groups):
        moving = {f"{i}.{j}": p for j, p in enumerate(group["params"]) if p.grad is not None}
        lists.append(Alike(list(moving), list(moving.values()), group, weight_decay / (i + 1)))
    return lists


def run(make_optimizer, method=None, dtype=torch.float64, steps=STEPS, weight_decay=WEIGHT_DECAY):
    """Two groups, and a learning rate that anneals; without a method the optimizer's own weight decay acts."""
    weights = parameters(dtype)
    own = 0.0 if method is not None else weight_decay
    groups = [{"params": [w], "weight_decay": own / (i + 1)} for i, w in enumerate(weights)]
    optimizer = make_optimizer(groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        for weight, gradient in zip(weights, gradients(weights, step), strict=True):
            weight.grad = gradient
        if method is not None:
            method.before(optimizer, targets(optimizer, weight_decay), step)
        optimizer.step()
        if method is not None:
            method.after(optimizer, targets(optimizer, weight_decay), step)
        scheduler.step()
    return [weight.detach() for weight in weights]


def annealed(lr, step):
    return lr * 0.5 * (1 + math.cos(math.pi * step / STEPS))


# --- decoupled and independent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_with_decoupled_decay_is_adamw_to_the_last_bit(foreach, amsgrad, dtype):
    options = {"lr": 0.1, "foreach": foreach, "amsgrad": amsgrad}
    found = run(functools.partial(Adam, **options), Decoupled(), dtype)
    expected = run(functools.partial(AdamW, **options), dtype=dtype)
    for weight, other in zip(found, expected, strict=True):
        assert_same_bits(weight, other)


def test_nadam_with_decoupled_decay_is_torchs_to_the_last_bit():
    found = run(functools.partial(NAdam, lr=0.1), Decoupled())
    expected = run(functools.partial(NAdam, lr=0.1, decoupled_weight_decay=True))
    for weight, other in zip(found, expected, strict=True):
        assert_same_bits(weight, other)


def by_hand(share):
    """SGD without momentum, where ``share(lr)`` of a weight goes before each step."""
    weights = [w.detach() for w in parameters()]
    for step in range(STEPS):
        steps = gradients(weights, step)
        lr = annealed(0.1, step)
        weights = [(1 - share(lr) / (i + 1)) * w - lr * g for i, (w, g) in enumerate(zip(weights, steps, strict=True))]
    return weights


@pytest.mark.parametrize(
    ("method", "share"),
    [(Decoupled(), lambda lr: lr * WEIGHT_DECAY), (Independent(), lambda lr: WEIGHT_DECAY)],
    ids=["decoupled", "independent"],
)
def test_sgd_equals_the_formula(method, share):
    torch.testing.assert_close(run(functools.partial(SGD, lr=0.1), method), by_hand(share), rtol=0, atol=1e-14)


def test_a_tensor_as_lr():
    lr = torch.tensor(0.1, dtype=torch.float64)
    torch.testing.assert_close(
        run(functools.partial(SGD, lr=lr.clone()), Decoupled()), run(functools.partial(SGD, lr=0.1), Decoupled())
    )


@pytest.mark.parametrize("method", [Decoupled, Independent])
def test_stochastic_rounding_is_the_same_in_each_replica_and_another_for_each_seed(method):
    make_optimizer = functools.partial(SGD, lr=0.1)
    first, again, other = (
        run(make_optimizer, method(stochastic=True, seed=seed), torch.bfloat16, steps=5, weight_decay=0.01)
        for seed in (0, 0, 1)
    )
    for a, b in zip(first, again, strict=True):
        assert_same_bits(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def noise_of(name, step):
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=1.0)
    Decoupled(stochastic=True).before(optimizer, [Alike([name], [weight], optimizer.param_groups[0], 1e-3)], step)
    return weight.detach()


@pytest.mark.parametrize("other", [("b", 0), ("a", 1)], ids=["name", "step"])
def test_the_noise_is_another_for_each_parameter_and_each_step(other):
    assert not torch.equal(noise_of("a", 0), noise_of(*other))
    assert_same_bits(noise_of("a", 0), noise_of("a", 0))


# --- coupled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maximize", "scale", "expected"),
    [
        (False, None, [1.0 + 0.3 * 1.0, 1.0 + 0.3 * -2.0]),
        (True, None, [1.0 - 0.3 * 1.0, 1.0 - 0.3 * -2.0]),
        (False, torch.tensor(8.0), [1.0 + 8 * 0.3 * 1.0, 1.0 + 8 * 0.3 * -2.0]),
    ],
    ids=["plain", "maximize", "scaled"],
)
def test_coupled_decay_adds_the_gradient_of_a_penalty(maximize, scale, expected):
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    Coupled().on_gradients(targets(SGD([weight], lr=0.1, maximize=maximize)), scale, 0)
    torch.testing.assert_close(weight.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("make_optimizer", [SGD, Adam, RMSprop], ids=lambda optimizer: optimizer.__name__)
def test_coupled_decay_is_the_weight_decay_of_torchs_optimizers_to_the_last_bit(make_optimizer):
    found, expected = (parameters() for _ in range(2))
    groups = [{"params": [w], "weight_decay": WEIGHT_DECAY / (i + 1)} for i, w in enumerate(expected)]
    ours, torchs = make_optimizer([{"params": [w]} for w in found], lr=0.1), make_optimizer(groups, lr=0.1)
    for step in range(STEPS):
        for weights in (found, expected):
            for weight, gradient in zip(weights, gradients(weights, step), strict=True):
                weight.grad = gradient
        Coupled().on_gradients(targets(ours), None, 0)
        ours.step()
        torchs.step()
    for weight, other in zip(found, expected, strict=True):
        assert_same_bits(weight.detach(), other.detach())


# --- cautious -----------------------------------------------------------------------------------------------------


def test_cautious_sgd_with_momentum_equals_the_formula():
    found = run(functools.partial(SGD, lr=0.1, momentum=0.9), Cautious())
    weights = [w.detach() for w in parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    for step in range(STEPS):
        lr = annealed(0.1, step)
        for i, gradient in enumerate(gradients(weights, step)):
            w, u = weights[i], 0.9 * buffers[i] + gradient
            weights[i] = w - lr * (u + WEIGHT_DECAY / (i + 1) * w * (u * w >= 0))
            buffers[i] = u
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-13)


def test_cautious_decay_makes_its_copies_once():
    weight = nn.Parameter(torch.ones(3))
    optimizer, method = SGD([weight], lr=0.1), Cautious()
    weight.grad = torch.ones(3)
    method.before(optimizer, targets(optimizer), 0)
    (copy,) = method._copies[optimizer]
    method.before(optimizer, targets(optimizer), 1)
    (again,) = method._copies[optimizer]
    assert again is copy


def test_cautious_decay_follows_weights_that_are_replaced():
    first, second = nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.full((5,), 4.0))
    method = Cautious()
    optimizer = SGD([first], lr=0.1)
    for weight in (first, second):
        optimizer.param_groups[0]["params"] = [weight]
        weight.grad = torch.ones_like(weight)
        method.before(optimizer, targets(optimizer), 0)
        optimizer.step()
        method.after(optimizer, targets(optimizer), 0)
    for weight, start in ((first, 2.0), (second, 4.0)):  # the update and the weight agree
        expected = torch.full_like(weight, start - 0.1 * (1.0 + WEIGHT_DECAY * start))
        torch.testing.assert_close(weight.detach(), expected.detach())


# --- stable -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, 1.0), ({"momentum": 0.9}, 10.0), ({"momentum": 0.9, "dampening": 0.5}, 5.0), ({"momentum": 0.5}, 2.0)],
    ids=["plain", "momentum", "dampening", "little momentum"],
)
def test_stable_sgd_decays_by_the_real_step_size(options, factor):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.01, **options)
    weight.grad = torch.zeros(3, dtype=torch.float64)
    Stable(Sharding()).before(optimizer, targets(optimizer), 0)
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1 - 0.01 * WEIGHT_DECAY * factor))


def stable_adam_by_hand(lr, betas, eps=1e-8):
    """The share is ``lr * weight_decay`` over the root of the mean of v_hat, over all weights together."""
    weights = [w.detach() for w in parameters()]
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(STEPS):
        now, eta = gradients(weights, step), annealed(lr, step)
        means = [betas[0] * m + (1 - betas[0]) * g for m, g in zip(means, now, strict=True)]
        squares = [betas[1] * v + (1 - betas[1]) * g**2 for v, g in zip(squares, now, strict=True)]
        m_hat = [m / (1 - betas[0] ** (step + 1)) for m in means]
        v_hat = [v / (1 - betas[1] ** (step + 1)) for v in squares]
        root = torch.cat([v.flatten() for v in v_hat]).mean().sqrt()
        weights = [
            (1 - eta * WEIGHT_DECAY / (i + 1) / root) * w - eta * m / (v.sqrt() + eps)
            for i, (w, m, v) in enumerate(zip(weights, m_hat, v_hat, strict=True))
        ]
    return weights


@pytest.mark.parametrize("make_optimizer", [Adam, functools.partial(Adam, foreach=True), functools.partial(AdamW)])
def test_stable_adam_equals_the_formula(make_optimizer):
    found = run(functools.partial(make_optimizer, lr=0.02, betas=(0.8, 0.9)), Stable(Sharding()))
    torch.testing.assert_close(found, stable_adam_by_hand(0.02, (0.8, 0.9)), rtol=0, atol=1e-12)


def stable_step(optimizer, step):
    for group in optimizer.param_groups:
        for i, weight in enumerate(group["params"]):
            if weight.requires_grad:
                weight.grad = randn(*weight.shape, seed=10 * step + i).double()
    method = Stable(Sharding())
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    method.before(optimizer, targets(optimizer), step)
    after = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    v_hat = [
        state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
        for state in optimizer.state.values()
        if "exp_avg_sq" in state
    ]
    root = torch.cat([v.flatten() for v in v_hat]).mean().sqrt()
    return before, after, 1 - 0.1 * WEIGHT_DECAY / root


def test_a_parameter_that_is_unfrozen_later_counts_by_its_own_steps():
    first, second = parameters()
    second.requires_grad_(False)
    optimizer = Adam([first, second], lr=0.1)
    for step in range(3):
        stable_step(optimizer, step)
    second.requires_grad_(True)
    before, after, factor = stable_step(optimizer, 3)
    torch.testing.assert_close(after, [factor * w for w in before], rtol=0, atol=1e-12)


def test_a_parameter_without_a_gradient_does_not_count_although_it_has_a_state():
    first, second = parameters()
    optimizer = Adam([first, second], lr=0.1)
    stable_step(optimizer, 0)
    second.grad, first.grad = None, torch.ones_like(first)
    v = optimizer.state[first]["exp_avg_sq"] * 0.999 + 0.001
    factor = 1 - 0.1 * WEIGHT_DECAY / (v / (1 - 0.999**2)).mean().sqrt()
    before = first.detach().clone()
    Stable(Sharding()).before(optimizer, targets(optimizer), 1)
    torch.testing.assert_close(first.detach(), factor * before, rtol=0, atol=1e-12)


def test_groups_of_their_own_betas_count_together():
    weights = parameters()
    optimizer = Adam([{"params": [w], "betas": (0.9, b)} for w, b in zip(weights, (0.9, 0.99), strict=True)], lr=0.1)
    for gradients in ((2.0, 3.0), (0.0, 0.0)):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = torch.full_like(weight, gradient)
        if any(gradients):
            optimizer.step()
    before = [weight.detach().clone() for weight in weights]
    Stable(Sharding()).before(optimizer, targets(optimizer), 1)
    # In the second step v is beta (1 - beta) g^2, and the correction 1 - beta^2.
    v_hat = [0.9 * 0.1 / (1 - 0.9**2) * 2.0**2, 0.99 * 0.01 / (1 - 0.99**2) * 3.0**2]
    root = math.sqrt((12 * v_hat[0] + 5 * v_hat[1]) / 17)
    for i, (weight, start) in enumerate(zip(weights, before, strict=True)):
        expected = (1 - 0.1 * WEIGHT_DECAY / (i + 1) / root) * start
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make_optimizer", [SGD, Adam], ids=lambda optimizer: optimizer.__name__)
@pytest.mark.parametrize(
    "method", [Decoupled(), Independent(), Cautious(), Stable(Sharding())], ids=lambda method: type(method).__name__
)
def test_no_weight_changes_if_the_share_of_another_is_too_large(method, make_optimizer):
    weights = parameters()
    optimizer = make_optimizer([{"params": [w], "lr": lr} for w, lr in zip(weights, (0.1, 10.0), strict=True)])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    before = [weight.detach().clone() for weight in weights]
    too_large = [
        Alike([str(i)], [weight], group, weight_decay)
        for i, (weight, group, weight_decay) in enumerate(zip(weights, optimizer.param_groups, (0.1, 1.5), strict=True))
    ]
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        method.before(optimizer, too_large, 0)
    for weight, start in zip(weights, before, strict=True):
        assert_same_bits(weight.detach(), start)


def test_gradients_that_a_fused_optimizer_is_to_unscale_are_unscaled():
    found = []
    for scale in (None, 1024.0):
        weights = parameters()
        optimizer = Adam(weights, lr=0.1, fused=True)
        for weight, gradient in zip(weights, gradients(weights, 0), strict=True):
            weight.grad = gradient if scale is None else scale * gradient
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)
        Stable(Sharding()).before(optimizer, targets(optimizer), 0)
        found.append([w.detach() for w in weights])
    torch.testing.assert_close(found[1], found[0])


def test_where_no_gradient_says_anything_nothing_decays():
    weights = parameters()
    optimizer = Adam(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    before = [w.detach().clone() for w in weights]
    Stable(Sharding()).before(optimizer, targets(optimizer), 0)
    for weight, other in zip(weights, before, strict=True):
        assert_same_bits(weight.detach(), other)


@pytest.mark.parametrize(
    ("make_optimizer", "reason"),
    [
        (RMSprop, "defined for SGD, Adam, AdamW and NAdam, not for RMSprop"),
        (Adagrad, "not for Adagrad"),
        (functools.partial(Adam, amsgrad=True), "not defined for AMSGrad"),
    ],
    ids=["RMSprop", "Adagrad", "AMSGrad"],
)
def test_stable_decay_refuses_what_it_is_not_defined_for(make_optimizer, reason):
    assert reason in Stable(Sharding()).refuse(make_optimizer(parameters()))


@pytest.mark.parametrize("method", [Decoupled(), Independent(), Cautious(), Stable(Sharding())], ids=printed)
def test_sgd_will_do_for_every_method(method):
    assert method.refuse(SGD(parameters(), lr=0.1)) == ""
