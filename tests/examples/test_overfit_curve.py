"""Does the curve overfit as a hand-written loop does, and does weight decay keep it from that?"""

import numpy as np
import overfit_curve
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_regularize import WeightDecay

pytestmark = pytest.mark.timeout(300)  # seconds; both full runs take 12 on a free core, which tests have not


def points(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        overfit_curve.noisy_line(count, slope=1.5, noise=0.5, generator=generator)
        for count in (overfit_curve.TRAIN_POINTS, overfit_curve.TEST_POINTS)
    ]


def results(output, *arguments):
    options = overfit_curve.parse_options(["--output", str(output), *arguments])
    decays = {"without": [], "with": [WeightDecay(options.weight_decay)]}
    return [overfit_curve.train(label, decay, points(0), options) for label, decay in decays.items()]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    output = tmp_path_factory.mktemp("fast")
    return output, results(output, "--fast", "--weight-decay", "1")


def predictions_of_a_plain_loop(weight_decay):
    """After 2, 4, ... 20 steps at 201 places, with the initial norm of the second layer and its last."""
    x, y = points(0)[0]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 1)
    )
    start_norm = net[2].weight.double().square().sum().sqrt().item()
    groups = [
        {"params": [layer.weight for layer in net[::2]], "weight_decay": weight_decay},
        {"params": [layer.bias for layer in net[::2]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    found = []
    for step in range(1, 21):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        if step % 2 == 0:
            found.append(net(torch.linspace(-1, 1, 201)[:, None]).flatten().tolist())
    return found, start_norm, net[2].weight.double().square().sum().sqrt().item()


@pytest.mark.parametrize(("run", "weight_decay"), [(0, 0.0), (1, 1.0)], ids=["without", "with"])
def test_a_run_is_that_of_a_hand_written_loop(fast, run, weight_decay):
    _, both = fast
    predictions, start_norm, end_norm = predictions_of_a_plain_loop(weight_decay)
    assert list(both[run].curves) == list(range(2, 21, 2))
    np.testing.assert_allclose(list(both[run].curves.values()), predictions, atol=1e-5)
    assert (both[run].start_norm, both[run].end_norm) == pytest.approx((start_norm, end_norm), rel=1e-5, abs=0)


@pytest.mark.parametrize("run", ["without", "with"])
def test_tensorboard_gets_histograms_of_weights_and_gradients_of_each_layer(fast, run):
    output, _ = fast
    events = EventAccumulator(str(output / "tensorboard" / run), size_guidance={"histograms": 0}).Reload()
    sizes = {"net.0": (200, 200), "net.2": (40_000, 200), "net.4": (40_000, 200), "net.6": (200, 1)}
    for quantity in ("weight", "gradient"):
        for layer, elements in sizes.items():
            for parameter, size in zip(("weight", "bias"), elements, strict=True):
                histograms = events.Histograms(f"{quantity}_histogram/{layer}.{parameter}")
                assert [event.step for event in histograms] == list(range(20))
                assert {event.histogram_value.num for event in histograms} == {size}


def test_points_are_of_the_line_with_noise_of_the_given_size():
    x, y = overfit_curve.noisy_line(100_001, slope=1.5, noise=0.5, generator=torch.Generator().manual_seed(0))
    x, y = x.flatten().double().numpy(), y.flatten().double().numpy()
    np.testing.assert_allclose(x, np.arange(-50_000, 50_001) / 50_000, atol=1e-6)
    (slope, intercept), (square, *_), *_ = np.polyfit(x, y, 1, full=True)
    # Standard errors are 0.0027, 0.0016 and 0.0011.
    assert slope == pytest.approx(1.5, abs=0.011, rel=0)
    assert intercept == pytest.approx(0, abs=0.0065, rel=0)
    assert (square / len(x)) ** 0.5 == pytest.approx(0.5, abs=0.0045, rel=0)


def test_distance_is_from_the_true_line_over_the_last_curves(tmp_path):
    # Mean of (1.5 k / 100)^2 over k = -100 ... 100: 2.25 * 2 * (100 * 101 * 201 / 6) / 201 / 100^2.
    zero, far = [0.0] * 201, [9.0] * 201
    curves = {1: far} | dict.fromkeys(range(2, 7), zero)
    assert overfit_curve.Result("", curves, tmp_path, 1, 1).distance() == pytest.approx(0.7575, rel=1e-6, abs=0)


@pytest.mark.parametrize("steps", [100, 500, 2000])
def test_decay_with_nothing_to_learn_is_that_of_sgd_with_momentum(steps):
    weight, velocity = 1.0, 0.0
    for _ in range(steps):
        velocity = 0.9 * velocity + 0.01 * weight
        weight -= 0.01 * velocity
    assert overfit_curve.share_left(steps, 0.01) == pytest.approx(weight, rel=0.02, abs=0)


def test_what_is_claimed_holds_in_a_full_run_and_not_the_other_way_round(tmp_path):
    without, decayed = results(tmp_path)
    assert all(claim.holds for claim in overfit_curve.claims_of([without, decayed]))
    assert not any(claim.holds for claim in overfit_curve.claims_of([decayed, without]))
    # Loops in plain torch from the same start left norms of 8.38 and 2.57.
    assert (without.end_norm, decayed.end_norm) == pytest.approx((8.38, 2.57), abs=0.1, rel=0)
    assert [run.error("test") for run in (without, decayed)] == pytest.approx([0.503, 0.441], abs=0.03, rel=0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("-0.1", "should be from 0 to 1, got -0.1"),
        ("nan", "should be from 0 to 1, got nan"),
        ("much", "invalid number value: 'much'"),
    ],
)
def test_a_wrong_weight_decay_is_told_and_exits_with_2(tmp_path, capsys, argument, message):
    with pytest.raises(SystemExit) as ended:
        overfit_curve.main(["--output", str(tmp_path / "none"), f"--weight-decay={argument}"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
