"""Is what is added to half-precision gradients right in the mean, or is the user told that it is lost?"""

import functools
import math
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import SGD, Adam, AdamW

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    WeightDecay,
    WeightPenalty,
)
from lightning_regularize.callbacks._copied_steps import _difference
from lightning_regularize.penalties import L1, Spectral
from tests.distributed import run_distributed
from tests.models import randn
from tests.training.support import QUIET, SaveAfter, assert_identical_weights, train, weights

pytestmark = QUIET

ADDED = {
    "l1": L1Penalty,
    "l2": L2Penalty,
    "elastic net": functools.partial(ElasticNetPenalty, l2=1e-3),
    "group lasso": GroupLassoPenalty,
    "coupled": functools.partial(WeightDecay, method="coupled"),
}
at_random = pytest.mark.parametrize(
    "make", [functools.partial(m, rounding="stochastic") for m in ADDED.values()], ids=ADDED
)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def asked_of(callback, weight):
    """What a step adds to the gradient, in double precision."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    if isinstance(callback, WeightDecay):
        return found + callback.schedule.value * weight.double()
    strength = callback.l1 + callback.l2 if isinstance(callback, ElasticNetPenalty) else callback.schedule.value
    callback.penalty().add_gradient_(found, weight.double(), strength)
    return found


class Added:
    """A callback in a loop whose gradients are all 1, and whose weights stay."""

    def __init__(self, callback, dtype, **options):
        self.layer = nn.Linear(32, 32, bias=False).to(dtype)
        with torch.no_grad():
            self.layer.weight.copy_(randn(32, 32))
        self.optimizer = SGD(self.layer.parameters(), lr=0.0, **options)
        self.attachment = callback.attach(self.optimizer, self.layer)

    def step(self):
        weight = self.layer.weight
        weight.grad = torch.ones_like(weight)
        self.optimizer.step()
        return weight.grad - 1.0 if weight.dtype == torch.float32 else weight.grad.double() - 1.0


@at_random
@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.bfloat16, 1000), (torch.float16, 300)], ids=["bfloat16", "float16"]
)
def test_rounded_at_random_additions_are_right_in_the_mean(make, dtype, steps):
    callback = make(1e-3)
    loop = Added(callback, dtype)
    asked = asked_of(callback, loop.layer.weight.detach())
    added = sum((loop.step() * asked).sum().item() for _ in range(steps)) / steps
    assert added == pytest.approx(asked.square().sum().item(), rel=0.02, abs=0)


@pytest.mark.parametrize("make", ADDED.values(), ids=ADDED)
@half
def test_rounded_to_nearest_they_are_lost(make, dtype):
    """Else the test above would show nothing."""
    callback = make(1e-5) if make is not ADDED["elastic net"] else ElasticNetPenalty(1e-5, 1e-5)
    assert not Added(callback, dtype).step().any()


@at_random
def test_each_step_and_each_seed_has_noise_of_its_own(make):
    first, again, other = (Added(make(1e-3, seed=seed), torch.bfloat16) for seed in (0, 0, 1))
    a, b = first.step(), first.step()
    assert not torch.equal(a, b)
    assert torch.equal(again.step(), a)
    assert torch.equal(again.step(), b)
    assert not torch.equal(other.step(), a)


@at_random
def test_gradients_of_float32_are_rounded_as_ever(make):
    nearest = {"rounding": "nearest"}
    assert torch.equal(Added(make(1e-3), torch.float32).step(), Added(make(1e-3, **nearest), torch.float32).step())


gentle = functools.partial(SGD, lr=1e-2)


class Steep(L.LightningModule):
    """Its gradients are all ``steepness``, whatever the weights."""

    def __init__(self, dtype=torch.bfloat16, steepness=1.0, make_optimizer=gentle):
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(randn(16, 16))
        self.to(dtype)
        self.steepness, self.make_optimizer = steepness, make_optimizer

    def training_step(self, batch, batch_idx):
        return (self.steepness * self.layer.weight).sum()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


@pytest.mark.filterwarnings("ignore:.*it is rounded in the optimizer's step")
@at_random
def test_rounded_at_random_a_resumed_run_has_the_same_bits(make, tmp_path):
    whole, resumed, without = Steep(), Steep(), Steep()
    train(whole, make(1e-2), SaveAfter(tmp_path, 9))
    train(resumed, make(1e-2), ckpt_path=tmp_path / "9.ckpt")
    train(without)
    assert_identical_weights(weights(resumed), weights(whole))
    assert not torch.equal(whole.layer.weight, without.layer.weight)


def add_on_a_rank(rank, world_size, make):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(rank)  # draws of the user's differ
    loop = Added(make(1e-3), torch.bfloat16)
    plain = [loop.step().float().numpy() for _ in range(3)]
    mesh = init_device_mesh("cpu", (world_size,))
    weight = loop.layer.weight = nn.Parameter(distribute_tensor(loop.layer.weight.detach(), mesh, [Replicate()]))
    loop.attachment.remove()
    optimizer = SGD([weight], lr=0.0)
    make(1e-3).attach(optimizer, loop.layer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return plain, (weight.grad.to_local() - 1.0).float().numpy()


@at_random
def test_replicas_have_the_same_noise(make):
    (first, spread), (second, other) = run_distributed(add_on_a_rank, make)
    for a, b in zip(first, second, strict=True):
        assert (a == b).all()
    assert (spread == other).all()
    assert (spread == first[0]).all()


@pytest.mark.parametrize("make", [ADDED["l1"], ADDED["l2"], ADDED["coupled"]], ids=["l1", "l2", "coupled"])
def test_a_loss_scale_is_in_what_is_added(make):
    """A fused optimizer divides the gradients by itself."""
    callback = make(1e-3, rounding="stochastic")
    loop = Added(callback, torch.bfloat16, fused=True)
    weight, total = loop.layer.weight, 0.0
    asked = asked_of(callback, weight.detach())
    for _ in range(200):
        weight.grad = torch.full_like(weight, 1024.0)
        loop.optimizer.grad_scale, loop.optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        added = []
        handle = loop.optimizer.register_step_post_hook(lambda *_, to=added: to.append(weight.grad.clone()))
        loop.optimizer.step()
        handle.remove()
        gradient = added[0].double()
        gradient = gradient if gradient.mean() > 10 else 1024 * gradient  # some kernels leave them divided
        total += ((gradient - 1024.0) * asked).sum().item() / 1024 / 200
    assert total == pytest.approx(asked.square().sum().item(), rel=0.05, abs=0)


# -- coupled decay that is lost --------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("make_optimizer", [gentle, functools.partial(AdamW, lr=1e-2, eps=1e-4)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("strength", [1e-5, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("steepness", [0.0, 1.0])
def test_coupled_decay_has_its_strength_in_gradients_or_is_warned_of(strength, steepness, make_optimizer, dtype):
    callback, module, added = WeightDecay(strength, method="coupled"), Steep(dtype, steepness, make_optimizer), []

    class Watch(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.handle = trainer.optimizers[0].register_step_pre_hook(lambda *_: self.look(pl_module.layer.weight))

        def look(self, weight):
            self.before = weight.detach().clone()

        def on_train_batch_end(self, trainer, pl_module, *_):
            asked = strength * self.before.double()
            found = pl_module.layer.weight.grad.double() - steepness
            added.append(torch.stack([(found * asked).sum(), asked.square().sum()]))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, callback, Watch(), max_epochs=1)
    messages = [str(w.message) for w in caught if "added to half-precision gradients" in str(w.message)]
    got, asked = torch.stack(added).sum(dim=0).tolist()
    assert len(messages) <= 1
    if messages:
        assert "WeightDecay(method='coupled') is off by up to" in messages[0]
        assert "rounding='stochastic'" in messages[0]
    else:
        assert got == pytest.approx(asked, rel=0.05, abs=0)
    if strength == 1e-5 and steepness:
        assert "is off by up to 100%" in messages[0]
    if steepness == 0 and strength > 1e-5:  # in float16 what is smaller is rounded to multiples of 2^-24
        assert not messages


@at_random
def test_what_is_rounded_at_random_is_lost_in_the_step_at_most(make):
    """Steps of 0.01 move weights of size 1 by one or two spacings, whatever a thousandth of that adds."""
    with pytest.warns(UserWarning, match=r"is off by up to .*: it is rounded in the optimizer's step .*mixed'\.$"):
        train(Steep(), make(1e-3), max_epochs=1)


# -- what is left after some hundred steps ---------------------------------------------------------------------------

zeros = {"weight": torch.zeros(32, 32)}
IMPORTANCE = {"weight": torch.linspace(0, 1, 1024).view(32, 32)}
PROXIMAL = {
    name: functools.partial(kind, method="proximal")
    for name, kind in (("l1", L1Penalty), ("l2", L2Penalty), ("group lasso", GroupLassoPenalty))
}
SHRINKING = {  # in a step by about lr * strength of a weight, whatever the steps before
    "optimizer, AdamW": (WeightDecay, functools.partial(AdamW, eps=1e-4, foreach=True)),
    "optimizer, AdamW fused": (WeightDecay, functools.partial(AdamW, eps=1e-4, fused=True)),
    "optimizer, SGD": (WeightDecay, SGD),
    **{
        method: (functools.partial(WeightDecay, method=method), SGD)
        for method in ("decoupled", "coupled", "cautious", "stable")
    },
    "independent": (lambda a: WeightDecay(a / 8, method="independent"), SGD),
    "anchor": (functools.partial(AnchorDecay, anchor=zeros), SGD),
    "anchor, importance": (
        functools.partial(AnchorDecay, anchor=zeros, importance={"weight": torch.ones(32, 32)}),
        SGD,
    ),
    "l2, gradient": (L2Penalty, SGD),
    "l1, gradient": (L1Penalty, SGD),
    "elastic net, gradient": (lambda a: ElasticNetPenalty(a / 2, a / 2), SGD),
    "group lasso, gradient": (lambda a: GroupLassoPenalty(32**0.5 * a), SGD),
    "of a function, gradient": (lambda a: WeightPenalty(half_square, a), SGD),
    **{f"{name}, proximal": (make, SGD) for name, make in PROXIMAL.items() if name != "group lasso"},
    "elastic net, proximal": (lambda a: ElasticNetPenalty(a / 2, a / 2, method="proximal"), SGD),
    "group lasso, proximal": (lambda a: PROXIMAL["group lasso"](32**0.5 * a), SGD),
}
adam = functools.partial(Adam, eps=1e-2)
momentum = functools.partial(SGD, momentum=0.9)
AVERAGING = {  # what the optimizer makes of it depends on its averages
    f"{name}, {how}": (make, make_optimizer)
    for name, make in (
        ("optimizer", WeightDecay),
        ("coupled", functools.partial(WeightDecay, method="coupled")),
        ("l1, gradient", L1Penalty),
        ("group lasso, gradient", GroupLassoPenalty),
        ("group lasso, proximal", PROXIMAL["group lasso"]),
    )
    for how, make_optimizer in (("momentum", momentum), ("Adam", adam))
}
BOUNDED = {"constrained": (lambda _: ConstrainedDecay("start", factor=0.5), SGD)}
_SPACING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def half_square(weight):
    return weight.square().sum() / 2


def run(make, make_optimizer, dtype, strength, steps=60, gradient=0.0):
    """How far each weight has gone."""
    layer = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        layer.weight.copy_(randn(32, 32).bfloat16())
    layer.to(dtype)
    start = layer.weight.detach().double()
    optimizer = make_optimizer(layer.parameters(), lr=2.0**-3)
    attachment = make(strength).attach(optimizer, layer)
    for _ in range(steps):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        optimizer.step()
    attachment.remove()
    return layer.weight.detach().double() - start


def left_of(make, make_optimizer, dtype, spacings, **options):
    """What is left of the change in float32, and the warnings; the strength is in spacings of numbers of ``dtype``."""
    strength = spacings * _SPACING[dtype] * 2**3
    whole = run(make, make_optimizer, torch.float32, strength, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(make, make_optimizer, dtype, strength, **options)
    messages = [str(w.message) for w in caught if "is off by up to" in str(w.message)]
    assert len(messages) <= 1
    return ((found * whole).sum() / whole.square().sum()).item(), messages


def rows(*tables):
    chosen = {name: row for table in tables for name, row in table.items()}
    return pytest.mark.parametrize(("make", "make_optimizer"), chosen.values(), ids=chosen)


@half
@rows(SHRINKING)
def test_what_is_below_the_spacing_of_numbers_is_warned_of_and_what_is_above_is_there(make, make_optimizer, dtype):
    _, messages = left_of(make, make_optimizer, dtype, 0.2)
    assert messages
    left, messages = left_of(make, make_optimizer, dtype, 30.0)
    assert not messages
    assert left == pytest.approx(1, rel=0.05, abs=0)


@half
@pytest.mark.parametrize("spacings", [0.05, 0.7, 3.0])
@rows(SHRINKING, AVERAGING, BOUNDED)
def test_in_between_it_is_as_in_float32_or_warned_of(make, make_optimizer, spacings, dtype):
    left, messages = left_of(make, make_optimizer, dtype, spacings)
    assert messages or left == pytest.approx(1, rel=0.05, abs=0)


@pytest.mark.parametrize("spacings", [0.1, 3.0])
@rows({name: (SHRINKING | AVERAGING)[name] for name in ("optimizer, AdamW fused", "l1, gradient", "coupled, Adam")})
def test_after_500_steps_as_well(make, make_optimizer, spacings):
    left, messages = left_of(make, make_optimizer, torch.bfloat16, spacings, steps=500)
    assert messages or left == pytest.approx(1, rel=0.05, abs=0)


@pytest.mark.parametrize(
    ("make", "make_optimizer", "spacings"),
    [
        # Weights of little importance stay, while the others arrive in the first steps.
        (functools.partial(AnchorDecay, anchor=zeros, importance=IMPORTANCE), SGD, 5.0),
        # Strong in the first steps, of which most are measured, and lost in all others.
        (lambda a: WeightDecay(lambda at: a * (20 if at.step < 13 else 0.3), method="decoupled"), SGD, 1.0),
        # Singular vectors take turns, and little of each step's way is left.
        (functools.partial(WeightPenalty, Spectral()), momentum, 0.018),
    ],
    ids=["importances", "shrinking", "spectral"],
)
def test_what_is_lost_late_or_in_part_is_warned_of_after_500_steps(make, make_optimizer, spacings):
    left, messages = left_of(make, make_optimizer, torch.bfloat16, spacings, steps=500)
    assert left != pytest.approx(1, rel=0.05, abs=0)
    assert messages


def test_decay_that_acts_in_a_few_steps_only_is_measured_in_them():
    make = functools.partial(ConstrainedDecay, "warm_start", warm_start_steps=20, factor=0.999)
    left, messages = left_of(lambda _: make(), SGD, torch.bfloat16, 1.0)
    assert left < 0.95
    assert messages


def test_squares_that_half_precision_makes_zero_are_warned_of():
    """Then Adam divides by its ``eps``, and so does a proximal step."""
    make_optimizer = functools.partial(Adam, eps=1e-4)
    left, messages = left_of(PROXIMAL["l1"], make_optimizer, torch.float16, 0.1, gradient=3e-3)
    assert left > 2
    assert "in the averages of squared gradients that the optimizer's step sizes come from" in messages[0]
    assert "larger strength" not in messages[0]  # it would be too strong as well


def test_a_penalty_of_every_tenth_step_is_measured():
    """Adam spreads over many steps what is added in one."""
    make = functools.partial(WeightPenalty, L1(), every_n_steps=10)
    left, messages = left_of(make, functools.partial(Adam, eps=1e-2), torch.bfloat16, 0.005, steps=100)
    assert left < 0.95
    assert messages


def walk(make, make_optimizer, dtype, *, noise, outward=0.0, steps=500):
    """How far each weight has gone, with gradients that are noise, and lead away from zero if that is asked."""
    layer = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        layer.weight.copy_(randn(32, 32).bfloat16())
    layer.to(dtype)
    start = layer.weight.detach().double()
    optimizer = make_optimizer(layer.parameters())
    if make is not None:
        make().attach(optimizer, layer, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        gradient = noise * torch.randn(32, 32, generator=generator) - outward * layer.weight.detach()
        layer.weight.grad = gradient.bfloat16().to(dtype)
        optimizer.step()
    return layer.weight.detach().double() - start


def left_under_noise(make, make_optimizer, dtype, **options):
    """What is left of the difference to the run without, in float32, and the warnings."""
    wide, wide_without = (walk(each, make_optimizer, torch.float32, **options) for each in (make, None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, without = (walk(each, make_optimizer, dtype, **options) for each in (make, None))
    whole = wide - wide_without
    left = (((found - without) * whole).sum() / whole.square().sum()).item()
    return left, [str(w.message) for w in caught if "is off by up to" in str(w.message)]


def steady(kind, strength, **options):
    """A schedule, so that it is judged at the end."""
    return lambda: kind(lambda at: strength, **options)


nesterov = functools.partial(SGD, lr=0.01, momentum=0.9, nesterov=True)
muon = functools.partial(torch.optim.Muon, weight_decay=0.0)


@pytest.mark.parametrize(
    ("make", "make_optimizer"),
    [
        (steady(L1Penalty, 0.01), functools.partial(SGD, lr=0.01, momentum=0.9)),
        (steady(L1Penalty, 0.01), functools.partial(torch.optim.Adagrad, lr=0.01)),
        (steady(WeightDecay, 0.02, method="coupled"), functools.partial(muon, lr=0.02)),
    ],
    ids=["momentum", "Adagrad", "Muon"],
)
def test_the_warning_says_what_is_lost_under_noise(make, make_optimizer):
    """A step makes little of what it is given, and later ones round that again."""
    left, messages = left_under_noise(make, make_optimizer, torch.bfloat16, noise=0.1)
    assert left < 0.9
    lost = int(messages[0].partition("off by up to ")[2].partition("%")[0]) / 100
    assert lost == pytest.approx(1 - left, rel=0, abs=0.05)  # two standard errors do not count


@pytest.mark.parametrize(
    ("make_optimizer", "strength", "noise"),
    [
        (functools.partial(SGD, lr=0.01), 0.2, 0.05),
        (functools.partial(SGD, lr=0.003, momentum=0.9), 0.3, 0.03),
        (functools.partial(muon, lr=0.01), 0.3, 0.3),
    ],
    ids=["SGD", "momentum", "Muon"],
)
def test_updates_that_round_to_nothing_agree_with_every_weight(make_optimizer, strength, noise):
    make = steady(WeightDecay, strength, method="cautious")
    left, messages = left_under_noise(make, make_optimizer, torch.float16, noise=noise)
    assert left > 1.1
    assert "it is rounded with the weights" in messages[0]


@pytest.mark.parametrize(
    ("make_optimizer", "dtype", "outward"),
    [
        (nesterov, torch.bfloat16, 0.05),
        (functools.partial(muon, lr=0.002), torch.float16, 0.1),
        (functools.partial(Adam, lr=0.003), torch.bfloat16, 0.1),
    ],
    ids=["nesterov", "Muon", "Adam"],
)
def test_constrained_decay_answers_steps_that_are_lost(make_optimizer, dtype, outward):
    left, messages = left_under_noise(
        lambda: ConstrainedDecay("start"), make_optimizer, dtype, noise=0.1, outward=outward
    )
    assert left != pytest.approx(1, rel=0.05, abs=0)
    assert "in the optimizer's step of the weights" in messages[0]


def test_constrained_decay_that_has_nothing_to_do_is_not_warned_of():
    make_optimizer = functools.partial(SGD, lr=0.003)  # of which most steps are lost
    _, messages = left_under_noise(
        lambda: ConstrainedDecay("start", factor=2.0), make_optimizer, torch.bfloat16, noise=0.1
    )
    assert not messages


SQUARES = {
    "l1, gradient": steady(L1Penalty, 0.1),
    "coupled": steady(WeightDecay, 0.1, method="coupled"),
    "l1, proximal": steady(L1Penalty, 0.1, method="proximal"),
    "l2, proximal": steady(L2Penalty, 0.1, method="proximal"),
    "stable": steady(WeightDecay, 0.1, method="stable"),
}


@pytest.mark.parametrize(
    ("make", "make_optimizer"),
    [
        *[(make, functools.partial(Adam, lr=0.05)) for make in SQUARES.values()],
        (SQUARES["l1, proximal"], functools.partial(torch.optim.RMSprop, lr=0.05, alpha=0.999)),
        (SQUARES["l1, gradient"], functools.partial(torch.optim.Adamax, lr=0.05)),
    ],
    ids=[*[f"{name}, Adam" for name in SQUARES], "l1, proximal, RMSprop", "l1, gradient, Adamax"],
)
def test_averages_of_squares_that_stand_still_are_warned_of(make, make_optimizer):
    """No step shows it, since each begins with an average that is wrong already."""
    _, messages = left_under_noise(make, make_optimizer, torch.bfloat16, noise=0.3)
    assert "in the averages of squared gradients" in messages[0]
    assert "larger strength" not in messages[0]


@pytest.mark.parametrize("make", SQUARES.values(), ids=SQUARES)
def test_averages_of_squares_that_move_are_not(make):
    make_optimizer = functools.partial(Adam, lr=0.05, betas=(0.9, 0.9))
    _, messages = left_under_noise(make, make_optimizer, torch.bfloat16, noise=0.3)
    assert not any("in the averages of squared gradients" in message for message in messages)


def test_decay_that_does_not_depend_on_averages_of_squares_is_not_warned_of():
    make_optimizer = functools.partial(AdamW, lr=0.003)
    left, messages = left_under_noise(steady(WeightDecay, 5.0), make_optimizer, torch.bfloat16, noise=0.3)
    assert left == pytest.approx(1, rel=0.05, abs=0)
    assert not messages


@rows({name: SHRINKING[name] for name in ("optimizer, SGD", "decoupled", "anchor", "l2, gradient", "l2, proximal")})
def test_what_float32_loses_as_well_is_warned_of(make, make_optimizer):
    left, messages = left_of(make, make_optimizer, torch.bfloat16, 1e-6)
    assert math.isnan(left) or left == 0  # nothing has changed, in float32 either, or at least in bfloat16
    assert "off by up to 100%" in messages[0]


class Own(torch.optim.Optimizer):
    """Heavy-ball momentum, with noise of size 0; ``log`` is what it keeps beside its state, if not None."""

    def __init__(self, params, lr, log=None):
        super().__init__(params, {"lr": lr})
        if log is not None:
            self.log = log

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(0.9).add_(weight.grad).add_(torch.randn_like(weight), alpha=0.0)
                weight.add_(velocity, alpha=-group["lr"])
        if hasattr(self, "log"):
            self.log.append(None)


@pytest.mark.parametrize("make", [ADDED["l1"], ADDED["l2"], ADDED["coupled"]], ids=["l1", "l2", "coupled"])
@pytest.mark.parametrize("make_optimizer", [Own, torch.optim.Adafactor], ids=["own", "Adafactor"])
def test_the_step_of_other_optimizers_is_measured(make, make_optimizer):
    left, messages = left_of(make, make_optimizer, torch.bfloat16, 0.02)
    assert left < 0.95
    assert "in the optimizer's step of the weights" in messages[0]


@pytest.mark.parametrize("make", [ADDED["l1"], ADDED["l2"], ADDED["coupled"]], ids=["l1", "l2", "coupled"])
def test_other_optimizers_are_not_warned_of_without_a_reason(make):
    left, messages = left_of(make, Own, torch.float16, 30.0)
    assert left == pytest.approx(1, rel=0.05, abs=0)
    assert not messages


def test_an_optimizer_that_keeps_more_than_its_state_is_stepped_once():
    log = []
    run(ADDED["l2"], functools.partial(Own, log=log), torch.bfloat16, 1e-3, steps=5)
    assert len(log) == 5


class Averaging(Own):
    """Averages its gradients over ranks by itself."""

    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            dist.all_reduce(weight.grad)
        return super().step(closure)


def lose_on_a_rank(rank, world_size, make_optimizer):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    with CommDebugMode() as communication:
        _, messages = left_of(ADDED["l2"], make_optimizer, torch.bfloat16, 0.02)
    return communication.get_total_counts(), messages


def test_the_step_of_other_optimizers_is_measured_on_several_ranks_as_well():
    (_, messages), _ = run_distributed(lose_on_a_rank, Own)
    assert "in the optimizer's step of the weights" in messages[0]


def test_a_step_that_talks_to_other_ranks_is_made_once():
    for steps, messages in run_distributed(lose_on_a_rank, Averaging):
        assert steps == 60 + 60  # in float32 and in half precision
        assert not messages


def test_what_an_optimizer_draws_at_random_is_drawn_once():
    weight = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
    layer, optimizer, states = nn.Linear(32, 32, bias=False), Own([weight], lr=0.1), []
    layer.weight, weight.grad = weight, torch.ones_like(weight)
    for attach in (lambda: None, lambda: L2Penalty(1.0).attach(optimizer, layer)):
        attach()
        torch.manual_seed(0)
        optimizer.step()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Penalty(0.1, rounding="up"), r"L1Penalty: `rounding` should be 'nearest' or 'stochastic', got 'up'"),
        (lambda: L2Penalty(0.1, seed=-1), r"L2Penalty: `seed` should be an integer of at least 0, got -1"),
        (lambda: GroupLassoPenalty(0.1, seed=True), r"`seed` should be an integer of at least 0, got True"),
        (
            lambda: L1Penalty(0.1, rounding="stochastic", method="proximal"),
            r"L1Penalty: `rounding='stochastic'` .* needs method='gradient', got 'proximal'",
        ),
        (lambda: WeightDecay(0.1, rounding="stochastic", method="stable"), r"or 'coupled', got 'stable'"),
    ],
    ids=["rounding", "seed", "boolean", "proximal", "stable"],
)
def test_bad_input_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gradient_less_a_small_term_is_right_in_the_mean_of_elements_and_of_steps(dtype):
    gradient, term = torch.full((10_000,), 0.7, dtype=dtype), torch.full((10_000,), 1e-4)
    off = torch.stack([gradient.double() - _difference(gradient, term, step).double() for step in range(300)])
    assert off[:3].mean(dim=1).tolist() == pytest.approx([1e-4] * 3, rel=0.02, abs=0)
    assert off[:, :3].mean(dim=0).tolist() == pytest.approx([1e-4] * 3, rel=0.2, abs=0)
