import math
from statistics import fmean

import pytest
import torch
from torch import nn

from lightning_regularize import theory


@pytest.fixture(autouse=True)
def one_thread():
    """On vectors this short threads would only wait for each other, on a busy machine for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_walk(optimizer_type, initial_rms, steps, dim=2048, schedule=None, scale_invariant=False, **settings):
    """Train on pure noise in float64; measure mean square and angle of every fifth step, the last one included."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(initial_rms * torch.randn(dim, dtype=torch.float64, generator=generator))
    optimizer = optimizer_type([weight], **settings)
    mean_squares, angles = [], []
    for step in range(steps):
        if schedule is not None:
            lr, weight_decay = schedule(step)
            optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        before = weight.detach().clone()
        gradient = torch.randn(dim, dtype=torch.float64, generator=generator)
        if scale_invariant:  # perpendicular, and of norm 1 where the weights have norm 1
            gradient -= before * (gradient @ before) / (before @ before)
            gradient /= gradient.norm() * before.norm()
        weight.grad = gradient
        optimizer.step()
        if (step + 1) % 5:
            continue
        after = weight.detach()
        mean_squares.append(after.square().mean())
        angles.append(torch.acos(before @ after / (before.norm() * after.norm())))
    return torch.stack(mean_squares), torch.stack(angles)


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al., 2023."""

    def __init__(self, params, lr, weight_decay, betas):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        (weight,) = group["params"]
        momentum = self.state.setdefault(weight, {"exp_avg": torch.zeros_like(weight)})["exp_avg"]
        beta1, beta2 = group["betas"]
        update = torch.sign(beta1 * momentum + (1 - beta1) * weight.grad)
        weight.sub_(group["lr"] * (update + group["weight_decay"] * weight))
        momentum.mul_(beta2).add_((1 - beta2) * weight.grad)


def second_half(values):
    return values[len(values) // 2 :].mean().item()


@pytest.mark.parametrize(
    ("lr", "weight_decay", "betas"),
    [(1e-2, 0.2, (0.9, 0.99)), (1e-3, 1.0, (0.5, 0.999)), (3e-3, 1.0, (0.0, 0.99))],
    ids=["torch-beta1", "smaller-beta1", "no-momentum"],
)
def test_adamw_settles_at_the_expected_rms_and_angle(lr, weight_decay, betas):
    expected_rms = theory.equilibrium_rms_adamw(lr, weight_decay)
    mean_squares, angles = random_walk(
        torch.optim.AdamW, 1.2 * expected_rms, steps=4000, lr=lr, weight_decay=weight_decay, betas=betas
    )
    assert math.sqrt(second_half(mean_squares)) == pytest.approx(expected_rms, rel=0.03, abs=0)
    assert second_half(angles) == pytest.approx(
        theory.equilibrium_angle_adamw(lr, weight_decay, betas[0]), rel=0.03, abs=0
    )


@pytest.mark.parametrize(
    ("lr", "weight_decay", "momentum"), [(0.1, 2e-2, 0.0), (0.1, 5e-3, 0.9), (0.5, 2e-3, 0.5)], ids=str
)
def test_sgd_settles_at_the_expected_norm_and_angle(lr, weight_decay, momentum):
    dim = 512
    expected_norm = theory.equilibrium_norm_sgd(lr, weight_decay, momentum, gradient_norm_at_unit_norm=1.0)
    mean_squares, angles = random_walk(
        torch.optim.SGD,
        1.2 * expected_norm / math.sqrt(dim),
        steps=4000,
        dim=dim,
        scale_invariant=True,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
    )
    assert math.sqrt(dim * second_half(mean_squares)) == pytest.approx(expected_norm, rel=0.03, abs=0)
    assert second_half(angles) == pytest.approx(
        theory.equilibrium_angle_sgd(lr, weight_decay, momentum), rel=0.03, abs=0
    )


def test_the_angle_of_lion_by_hand():
    """Of unit noise the average has variance (1 - b2) / (1 + b2) = 1/3, and what the sign is taken of, 1/4 + 1/12."""
    assert theory.equilibrium_angle_lion(0.01, 1.0, 0.5, 0.5) == pytest.approx(
        math.sqrt(0.02 * math.pi / 2 / 3), rel=1e-12, abs=0
    )


def test_lion_settles_at_the_expected_rms_and_angle():
    lr, weight_decay, betas = 4e-4, 1.0, (0.9, 0.99)
    expected_rms = theory.equilibrium_rms_lion(lr, weight_decay, *betas)
    mean_squares, angles = random_walk(
        Lion, expected_rms, steps=10_000, dim=4096, lr=lr, weight_decay=weight_decay, betas=betas
    )
    assert math.sqrt(second_half(mean_squares)) == pytest.approx(expected_rms, rel=0.03, abs=0)
    assert second_half(angles) == pytest.approx(
        theory.equilibrium_angle_lion(lr, weight_decay, *betas), rel=0.03, abs=0
    )


def test_mean_square_follows_schedules_of_learning_rate_and_weight_decay():
    steps = 4000

    def schedule(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return 4e-3 * cosine, 1.0 - 0.9 * cosine

    mean_squares, _ = random_walk(torch.optim.AdamW, 0.05, steps, dim=4096, schedule=schedule, betas=(0.9, 0.99))
    expected = theory.mean_square_trajectory(0.05**2, *zip(*map(schedule, range(steps)), strict=True))
    for done in (steps // 4, steps // 2, 3 * steps // 4, steps):
        assert math.sqrt(mean_squares[done // 5 - 1]) == pytest.approx(math.sqrt(expected[done]), rel=0.03, abs=0)


def test_mean_square_trajectory_is_the_closed_form_of_a_linear_recurrence():
    lr, weight_decay, initial, steps = 0.01, 0.5, 0.3, 50
    shrink = (1 - lr * weight_decay) ** 2
    fixed_point = lr**2 / (1 - shrink)
    trajectory = theory.mean_square_trajectory(initial, [lr] * steps, [weight_decay] * steps)
    assert trajectory == pytest.approx(
        [fixed_point + shrink**t * (initial - fixed_point) for t in range(steps + 1)], rel=1e-6, abs=0
    )
    assert math.sqrt(fixed_point) == pytest.approx(
        theory.equilibrium_rms_adamw(lr, weight_decay), rel=lr * weight_decay, abs=0
    )


def test_mean_square_is_the_second_moment_of_unit_steps():
    # (1 - 0.1 * 2) * 3 +- 0.1 with equal chance: 2.3^2 and 2.5^2.
    assert theory.next_mean_square(9.0, lr=0.1, weight_decay=2.0) == pytest.approx(
        (2.3**2 + 2.5**2) / 2, rel=1e-6, abs=0
    )


@pytest.mark.parametrize(("weight_decay", "rms"), [(0.1, 0.0701), (0.0, 0.1428)], ids=["decay", "no-decay"])
def test_mean_square_reproduces_the_measured_growth_from_an_initialization(weight_decay, rms):
    trajectory = theory.mean_square_trajectory(0.02**2, [1e-3] * 20_000, [weight_decay] * 20_000)
    assert math.sqrt(trajectory[-1]) == pytest.approx(rms, abs=5e-5, rel=0)


def noisy_adamw_run(steps=400):
    """Weights of AdamW before and after, its updates read from its state, and the settings of every step."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, dtype=torch.float64, generator=generator))
    initial = weight.detach().clone()
    betas, eps = (0.9, 0.99), 1e-8
    optimizer = torch.optim.AdamW([weight], betas=betas, eps=eps)
    lrs = [1e-2 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    weight_decays = [0.1 + 2 * step / steps for step in range(steps)]
    updates = []
    for step, (lr, weight_decay) in enumerate(zip(lrs, weight_decays, strict=True), start=1):
        optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        weight.grad = torch.randn(20, dtype=torch.float64, generator=generator) + weight.detach()
        optimizer.step()
        state = optimizer.state[weight]
        mean = state["exp_avg"] / (1 - betas[0] ** step)
        updates.append(mean / ((state["exp_avg_sq"] / (1 - betas[1] ** step)).sqrt() + eps))
    return initial, weight.detach(), updates, lrs, weight_decays


def test_ema_coefficients_reconstruct_the_weights_that_adamw_trained():
    initial, trained, updates, lrs, weight_decays = noisy_adamw_run()
    coefficients = theory.ema_coefficients(lrs, weight_decays)
    reconstructed = theory.share_remaining(lrs, weight_decays) * initial
    for coefficient, update, weight_decay in zip(coefficients, updates, weight_decays, strict=True):
        reconstructed -= coefficient * update / weight_decay
    torch.testing.assert_close(reconstructed, trained, rtol=0, atol=1e-13)


def test_ema_coefficients_and_what_remains_add_up_to_one():
    _, _, _, lrs, weight_decays = noisy_adamw_run(steps=100)
    total = math.fsum(theory.ema_coefficients(lrs, weight_decays)) + theory.share_remaining(lrs, weight_decays)
    assert total == pytest.approx(1.0, abs=1e-14, rel=0)


def test_share_remaining_is_what_adamw_leaves_of_weights_without_gradient():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.zeros_like(weight)
    lrs, weight_decays = [0.1, 0.2, 0.05], [1.0, 0.5, 2.0]
    for lr, weight_decay in zip(lrs, weight_decays, strict=True):
        optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        optimizer.step()
    expected = theory.share_remaining(lrs, weight_decays)
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected), rtol=1e-15, atol=0)


def test_share_remaining_of_a_cosine_schedule_is_close_to_its_exponential():
    lrs = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 1000)) for step in range(1000)]
    share = theory.share_remaining(lrs, [0.1] * 1000)
    assert share == pytest.approx(0.6061, abs=1e-4, rel=0)
    assert share == pytest.approx(math.exp(-0.1 * 0.01 * 1000 / 2), rel=1e-3, abs=0)


def test_no_steps_leave_everything():
    assert theory.share_remaining([], []) == 1.0
    assert theory.ema_coefficients([], []) == []
    assert theory.mean_square_trajectory(0.5, [], []) == [0.5]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_timescale_is_the_time_in_which_sgd_forgets_to_one_over_e(momentum):
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=2e-3, momentum=momentum)
    weight.grad = torch.zeros_like(weight)
    steps = theory.timescale(lr=0.1, weight_decay=2e-3, momentum=momentum)
    for _ in range(round(steps)):
        optimizer.step()
    assert weight.item() == pytest.approx(math.exp(-1), rel=0.03, abs=0)


def test_timescale_is_its_own_inverse():
    assert theory.timescale(1e-3, theory.timescale(1e-3, 5000.0)) == pytest.approx(5000.0, rel=1e-6, abs=0)


def test_timescale_in_epochs_is_that_in_steps_over_the_steps_of_an_epoch():
    assert theory.timescale_epochs(1e-3, 0.1, steps_per_epoch=250) == pytest.approx(40.0, rel=1e-6, abs=0)
    assert theory.timescale_epochs(0.1, 1e-3, steps_per_epoch=250, momentum=0.9) == pytest.approx(4.0, rel=1e-6, abs=0)


def test_full_batch_adamw_stops_at_the_bound():
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.99), weight_decay=2.0)
    for _ in range(1500):  # the minimum of (w - 1.5)^2 is outside
        optimizer.zero_grad()
        (weight - 1.5).square().backward()
        optimizer.step()
    assert theory.max_abs_weight(2.0) == 0.5
    assert weight.item() == pytest.approx(0.5, rel=1e-3, abs=0)


def test_update_rms_of_adam_is_angle_times_rms():
    update_rms = theory.equilibrium_angle_adamw(1e-3, 0.1) * theory.equilibrium_rms_adamw(1e-3, 0.1) / 1e-3
    assert update_rms == pytest.approx(0.2294, abs=1e-4, rel=0)  # Adam's sqrt((1 - 0.9) / (1 + 0.9))


def test_normalized_weight_decay_of_the_paper():
    arguments = {"batch_size": 128, "samples": 50_000, "epochs": 1500}
    assert theory.weight_decay_from_normalized(0.025, **arguments, peak_lr=1.0) == pytest.approx(
        3.266e-5, rel=1e-4, abs=0
    )
    assert theory.weight_decay_from_normalized(0.025, **arguments, peak_lr=1e-3) == pytest.approx(
        0.03266, rel=1e-4, abs=0
    )


def test_independent_weight_decay_is_removed_at_the_peak_whatever_the_peak():
    for peak_lr in (1e-4, 1e-2):
        assert peak_lr * theory.weight_decay_from_independent(1e-4, peak_lr) == pytest.approx(1e-4, rel=1e-6, abs=0)


# Rounding


def normal_weights(dtype):
    """All positive normal numbers of a 16-bit type; of the others random ones, and the ends of 60 octaves.

    Without the smallest one, below which the numbers get no closer.
    """
    if dtype.itemsize == 2:
        weights = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        return weights[weights.isfinite() & (weights > torch.finfo(dtype).tiny)]
    generator = torch.Generator().manual_seed(0)
    octaves = torch.randint(-30, 30, (100_000,), generator=generator).to(dtype)
    weights = (1 + torch.rand(100_000, dtype=dtype, generator=generator)) * 2**octaves
    powers = 2 ** torch.arange(-30, 30, dtype=dtype)
    return torch.cat([weights, powers, torch.nextafter(powers, torch.zeros_like(powers))])


DTYPES = pytest.mark.parametrize(
    ("dtype", "threshold"),
    [
        (torch.bfloat16, 2.0**-9),
        (torch.float16, 2.0**-12),
        (torch.float32, 2.0**-25),
        (torch.float64, 2.0**-54),
    ],
    ids=str,
)


@DTYPES
def test_decay_at_the_rounding_threshold_moves_no_weight(dtype, threshold):
    assert theory.decay_rounding_threshold(dtype) == threshold
    weights = normal_weights(dtype)
    assert torch.equal(weights.clone().mul_(1 - threshold), weights)
    assert torch.equal(weights.neg().mul_(1 - threshold), -weights)


@DTYPES
def test_decay_just_above_the_rounding_threshold_moves_powers_of_two(dtype, threshold):
    weights = normal_weights(dtype)
    powers = weights[torch.frexp(weights.double()).mantissa == 0.5]
    assert len(powers) >= 29  # float16's
    assert (powers.clone().mul_(1 - 1.01 * threshold) != powers).all()


@DTYPES
def test_decay_of_twice_the_rounding_threshold_moves_every_weight(dtype, threshold):
    weights = normal_weights(dtype)
    assert (weights.clone().mul_(1 - 2 * threshold) != weights).all()


def test_decay_between_moves_some_of_gaussian_bfloat16_weights():
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = weights.clone().mul_(1 - 3e-3) != weights
    assert moved.double().mean().item() == pytest.approx(0.627, abs=0.01, rel=0)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_adamw_in_bfloat16_keeps_weights_at_the_threshold(fused):
    weight = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16())
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=2.0**-9, weight_decay=1.0, foreach=not fused, fused=fused)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("shape", "momentum", "options"),
    [
        ((64, 16), 0.95, {}),
        ((16, 64), 0.9, {}),
        ((32, 32), 0.95, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
        ((4, 100), 0.0, {}),
    ],
    ids=["tall", "wide", "square, without Nesterov, adjusted as AdamW", "without momentum"],
)
def test_muon_settles_at_the_expected_rms_and_angle(shape, momentum, options):
    lr, weight_decay = 0.02, 2.0  # a timescale of 25 steps
    generator, weight = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([weight], lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
    squares, turns = [], []
    for step in range(1500):
        before = weight.detach().clone()
        weight.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        if step >= 500:
            squares.append(weight.detach().square().mean().item())
            moved = weight.detach() - (1 - lr * weight_decay) * before
            turns.append((moved.norm() / before.norm()).item())
    arguments = lr, weight_decay, shape, momentum
    expected_rms = theory.equilibrium_rms_muon(*arguments, **options)
    assert math.sqrt(fmean(squares)) == pytest.approx(expected_rms, rel=0.05, abs=0)
    assert fmean(turns) == pytest.approx(theory.equilibrium_angle_muon(*arguments, **options), rel=0.05, abs=0)


def test_steps_of_muon_are_less_alike_than_their_momentum():
    """Of one row they are as alike. Steps are as long as torch makes them, to the precision of bfloat16."""
    for shape, least, most in (((1, 4096), 0.97, 1.03), ((64, 64), 0.8, 0.9)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, nesterov=False).step()
        rms = theory.equilibrium_rms_muon(1.0, 1e-4, shape, 0.9, nesterov=False)
        plain = weight.detach().square().mean().sqrt().item() * math.sqrt((1 + 2 * 0.9 / (1 - 0.9)) / 2e-4)
        assert least < rms / plain < most


# Edges and errors


def test_nothing_holds_weights_without_weight_decay():
    assert theory.equilibrium_rms_adamw(1e-3, 0.0) == math.inf
    assert theory.equilibrium_rms_lion(1e-3, 0.0) == math.inf
    assert theory.equilibrium_rms_muon(1e-3, 0.0, (3, 4)) == math.inf
    assert theory.equilibrium_angle_muon(1e-3, 0.0, (3, 4)) == 0.0
    assert theory.equilibrium_norm_sgd(0.1, 0.0, 0.9, 1.0) == math.inf
    assert theory.max_abs_weight(0.0) == math.inf
    assert theory.timescale(1e-3, 0.0) == math.inf
    assert theory.timescale_epochs(1e-3, 0.0, 10) == math.inf
    assert theory.equilibrium_angle_adamw(1e-3, 0.0) == 0.0
    assert theory.equilibrium_angle_lion(1e-3, 0.0) == 0.0
    assert theory.equilibrium_angle_sgd(0.1, 0.0) == 0.0
    assert theory.ema_coefficients([0.1, 0.1], [0.0, 0.5]) == [0.0, 0.05]


def test_nothing_moves_at_learning_rate_zero():
    assert theory.timescale(0.0, 0.1) == math.inf
    assert theory.equilibrium_rms_adamw(0.0, 0.1) == 0.0  # the limit, which takes for ever to reach
    assert math.isnan(theory.equilibrium_rms_adamw(0.0, 0.0))
    assert theory.equilibrium_rms_muon(0.0, 0.1, (3, 4)) == theory.equilibrium_angle_muon(0.0, 0.1, (3, 4)) == 0.0
    assert theory.next_mean_square(0.3, 0.0, 0.1) == 0.3


@pytest.mark.parametrize("measured", [math.nan, math.inf])
def test_what_was_measured_on_a_diverged_model_is_passed_on(measured):
    for value in (theory.equilibrium_norm_sgd(0.1, 1e-2, 0.9, measured), theory.next_mean_square(measured, 0.1, 0.1)):
        assert not math.isfinite(value)


def test_a_gradient_norm_whose_square_overflows_is_fine():
    assert theory.equilibrium_norm_sgd(1.0, 0.5, 0.0, 1e200) == pytest.approx(1e100, rel=1e-6, abs=0)


VALID = {
    theory.equilibrium_rms_adamw: {"lr": 0.1, "weight_decay": 0.1},
    theory.equilibrium_rms_lion: {"lr": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99},
    theory.equilibrium_rms_muon: {"lr": 0.1, "weight_decay": 0.1, "shape": (3, 4), "momentum": 0.9},
    theory.equilibrium_angle_muon: {"lr": 0.1, "weight_decay": 0.1, "shape": (3, 4), "momentum": 0.9},
    theory.equilibrium_norm_sgd: {
        "lr": 0.1,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "gradient_norm_at_unit_norm": 1.0,
    },
    theory.equilibrium_angle_adamw: {"lr": 0.1, "weight_decay": 0.1, "beta1": 0.9},
    theory.equilibrium_angle_lion: {"lr": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99},
    theory.equilibrium_angle_sgd: {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9},
    theory.max_abs_weight: {"weight_decay": 0.1},
    theory.timescale: {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9},
    theory.timescale_epochs: {"lr": 0.1, "weight_decay": 0.1, "steps_per_epoch": 10, "momentum": 0.9},
    theory.next_mean_square: {"mean_square": 0.1, "lr": 0.1, "weight_decay": 0.1},
    theory.weight_decay_from_independent: {"independent_weight_decay": 0.1, "peak_lr": 0.1},
    theory.weight_decay_from_normalized: {
        "normalized_weight_decay": 0.1,
        "batch_size": 1,
        "samples": 1,
        "epochs": 1,
        "peak_lr": 0.1,
    },
}


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, arguments in VALID.items() for name in arguments],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_negative_argument_is_an_error_that_names_it(function, name):
    assert math.isfinite(function(**VALID[function]))
    with pytest.raises(ValueError, match=rf"^`{name}` should be .*, got -0.5\.$"):
        function(**VALID[function] | {name: -0.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", math.nan), ("lr", math.inf), ("weight_decay", math.nan), ("weight_decay", math.inf), ("momentum", 1.0)],
)
def test_settings_that_cannot_be_are_errors(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` should be .*, got {value}\.$"):
        theory.timescale(**{"lr": 0.1, "weight_decay": 0.1, name: value})


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 3), (5, 1)], ids=str)
def test_the_smallest_matrices_have_an_equilibrium_too(shape):
    assert 0 < theory.equilibrium_rms_muon(0.1, 0.1, shape) < math.inf


@pytest.mark.parametrize(
    ("options", "name"),
    [({"shape": (3,)}, "shape"), ({"shape": (3, 0)}, "shape"), ({"adjust_lr_fn": "rms"}, "adjust_lr_fn")],
    ids=["a vector", "empty", "unknown"],
)
def test_what_is_no_matrix_or_no_rate_of_muon_is_an_error(options, name):
    with pytest.raises(ValueError, match=f"^`{name}` should be .*, got"):
        theory.equilibrium_rms_muon(**{"lr": 0.1, "weight_decay": 0.1, "shape": (3, 4), **options})


@pytest.mark.parametrize("name", ["peak_lr", "batch_size", "samples", "epochs"])
def test_a_divisor_of_zero_is_an_error(name):
    with pytest.raises(ValueError, match=rf"^`{name}` should be finite and positive, got 0\.$"):
        theory.weight_decay_from_normalized(**VALID[theory.weight_decay_from_normalized] | {name: 0})


@pytest.mark.parametrize(
    "function",
    [
        theory.share_remaining,
        theory.ema_coefficients,
        lambda lrs, weight_decays: theory.mean_square_trajectory(0.1, lrs, weight_decays),
    ],
    ids=["share_remaining", "ema_coefficients", "mean_square_trajectory"],
)
def test_steps_are_checked(function):
    with pytest.raises(ValueError, match=r"one value per step each, got 2 and 1 values\.$"):
        function([0.1, 0.1], [0.1])
    with pytest.raises(ValueError, match=r"^`weight_decays` should be finite and non-negative, got -1.0 at step 1\.$"):
        function([0.1, 0.1], [0.1, -1.0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, "float32"], ids=str)
def test_rounding_of_what_is_no_floating_point_type_is_an_error(dtype):
    with pytest.raises(TypeError, match=r"^`dtype` should be a floating-point torch.dtype, got "):
        theory.decay_rounding_threshold(dtype)
