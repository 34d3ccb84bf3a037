"""Does the decay do the same under a GradScaler, fused or not, and when the scaler skips a step?"""

import functools

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim.lr_scheduler import LambdaLR

from lightning_regularize import L1Penalty, L2Penalty, WeightDecay
from lightning_regularize.schedules import FollowLR, Linear
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    adamw,
    assert_identical_weights,
    assert_same_weights,
    split,
    train,
    weights,
)

pytestmark = QUIET

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
OVERFLOW = 4


class Scaled(Regression):
    """In float64 throughout, so that nothing but the GradScaler's doings differ; some gradients overflow."""

    def __init__(self, fused, *args, overflows=()):
        super().__init__(functools.partial(adamw, fused=fused), *args)
        self.overflows, self.left, self.decays = overflows, [], []

    def loss(self, batch):
        with torch.autocast("cpu", enabled=False):
            return super().loss(batch)

    def on_after_backward(self):
        if self.trainer.global_step in self.overflows:
            self.output.weight.grad[0, 0] = torch.inf

    def on_before_optimizer_step(self, optimizer):
        self.decays.append(optimizer.param_groups[0]["weight_decay"])

    def on_train_batch_end(self, *_):
        self.left.append(weights(self))


def fit(module, *callbacks, **options):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    return train(module, *callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)


def plain_loop(module, optimizer, decays, skipped=()):
    for k, (batch, decay) in enumerate(zip(3 * list(Batches()), decays, strict=True)):
        optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.zero_grad()
        module.loss(batch).backward()
        if k not in skipped:
            optimizer.step()
    return weights(module)


@FUSED
@pytest.mark.parametrize("overflows", [(), (OVERFLOW,), (0, 1, 20)], ids=["no overflow", "one", "first and last"])
def test_weights_equal_those_of_a_loop_that_leaves_out_what_overflows(fused, overflows):
    module, twin = Scaled(fused, overflows=overflows), Regression()
    fit(module, WeightDecay(Linear(0.0, 1.0)))
    plain_loop(twin, adamw(split(twin), fused=fused), [k / 20 for k in range(21)], overflows)
    assert_same_weights(weights(module), weights(twin))


@FUSED
def test_a_skipped_step_leaves_the_weights_alone_and_the_schedule_goes_on(fused):
    module = Scaled(fused, overflows=(OVERFLOW,))
    fit(module, WeightDecay(Linear(0.0, 1.0)))
    assert module.decays == pytest.approx([k / 20 for k in range(21)], rel=1e-6, abs=0)
    assert_identical_weights(module.left[OVERFLOW], module.left[OVERFLOW - 1])


@FUSED
def test_the_schedule_keeps_step_with_the_learning_rate(fused):
    module = Scaled(fused, functools.partial(LambdaLR, lr_lambda=lambda k: 1 - k / 20), overflows=(OVERFLOW,))
    fit(module, WeightDecay(FollowLR(1.0)))
    assert module.decays == pytest.approx([1 - k / 20 for k in range(21)], rel=1e-6, abs=0)


@FUSED
@pytest.mark.parametrize("step", [OVERFLOW + 1, 9])
@pytest.mark.parametrize("place", ["before", "after"])
def test_resumed_after_a_skipped_step_equals_uninterrupted(fused, place, step, tmp_path):
    whole, resumed = Scaled(fused, overflows=(OVERFLOW,)), Scaled(fused, overflows=(OVERFLOW,))
    callbacks = [SaveAfter(tmp_path, step), WeightDecay(Linear(0.0, 1.0))]
    fit(whole, *(callbacks if place == "before" else reversed(callbacks)))
    fit(resumed, WeightDecay(Linear(0.0, 1.0)), ckpt_path=tmp_path / f"{step}.ckpt")
    assert resumed.decays == whole.decays[step:]
    assert_identical_weights(weights(resumed), weights(whole))


def test_bfloat16_autocast_decays_float32_weights_exactly():
    """Without a gradient to speak of, what is left of a weight is the product of ``1 - lr * weight_decay``."""

    class Idle(Regression):
        def __init__(self):
            super().__init__(functools.partial(adamw, lr=0.01))
            self.float()

        def training_step(self, batch, batch_idx):
            return sum(0.0 * parameter.sum() for parameter in self.parameters())

    module = Idle()
    before = weights(module)
    train(module, WeightDecay(Linear(0.0, 1.0)), precision="bf16-mixed")
    left = 1.0
    for k in range(21):
        left *= 1 - 0.01 * k / 20
    for name, weight in weights(module).items():
        expected = before[name] * (left if name in {"hidden.weight", "output.weight"} else 1.0)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)


class Wide(Regression):
    """Weights of bfloat16 with gradients of float32, in which small terms are not lost."""

    def __init__(self):
        super().__init__(functools.partial(torch.optim.SGD, lr=0.25, foreach=False))
        self.bfloat16()
        for parameter in self.parameters():
            parameter.grad_dtype = torch.float32

    def loss(self, batch):
        x, y = batch
        return (self.output(torch.tanh(self.hidden(x.bfloat16()))) - y.bfloat16()).float().square().mean()


ADDED = {
    "L1": (lambda: L1Penalty(2**-9), lambda w: 2**-9 * w.float().sign()),
    "L2": (lambda: L2Penalty(2**-9), lambda w: 2**-9 * w.float()),
    "coupled": (lambda: WeightDecay(2**-9, method="coupled"), lambda w: 2**-9 * w.float()),
    "optimizer": (lambda: WeightDecay(0.0), lambda w: 0.0),
}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.filterwarnings("ignore:.*off by up to .* in the optimizer's step of the weights")
def test_gradients_may_be_of_another_type_than_the_weights(name):
    make, added = ADDED[name]
    module, twin = Wide(), Wide()
    train(module, make())
    optimizer = twin.make_optimizer(twin.parameters())
    for batch in 3 * list(Batches()):
        optimizer.zero_grad()
        twin.loss(batch).backward()
        for weight in (twin.hidden.weight, twin.output.weight):
            weight.grad += added(weight.detach())
        optimizer.step()
    assert_identical_weights(weights(module), weights(twin))
