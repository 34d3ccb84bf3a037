"""Does every precision give what a hand-written loop of that precision gives?

The loop knows nothing of this package: it makes its own groups, adds its own gradients and shrinks its own weights.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    GroupLassoPenalty,
    L1Penalty,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
)
from lightning_regularize.projections import Box, MaxNorm
from lightning_regularize.schedules import Linear
from tests.training.matrix import Kept
from tests.training.support import BATCHES, QUIET, Batches, Regression, make_trainer, split, weights

pytestmark = [
    *QUIET,
    # lightning/pytorch/trainer/connectors/accelerator_connector.py on CPU
    pytest.mark.filterwarnings("ignore:You passed .Trainer.accelerator='cpu', precision=.*16:UserWarning"),
]

LR, DECAY, STRENGTH = 0.05, 0.3, 0.02
SCALE = 1024.0
PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float32,
}


class Data(Batches):
    """As float32, whatever the precision makes of it."""

    def __init__(self):
        super().__init__()
        self.batches = [(x.float(), y.float()) for x, y in self.batches]


class Model(Regression):
    """Its gradients overflow in one batch, if told so."""

    def __init__(self, make_optimizer, overflow=None):
        super().__init__(make_optimizer)
        self.float()
        self.overflow = overflow

    def training_step(self, batch, batch_idx):
        return self.loss_of(batch, batch_idx)

    def loss_of(self, batch, batch_idx):
        return self.loss(batch) * (math.inf if batch_idx == self.overflow else 1.0)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def precision_options(precision):
    if precision == "16-mixed":  # of which Lightning makes bf16-mixed on CPU, unless it comes as a plugin
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler())]}
    return {"precision": precision}


def fit(module, precision, *callbacks, **options):
    trainer = make_trainer(*callbacks, max_epochs=1, **precision_options(precision), **options)
    trainer.fit(module, Data())
    return trainer


# -- by hand ---------------------------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """Callbacks, and what they do by hand before and after a step, given the weight, its gradient, and the decay."""

    callbacks: tuple
    before: object = None
    after: object = None
    by_optimizer: bool = False


def add_decay(w, g, decay):
    g.add_(w, alpha=decay)


def shrink(w, g, decay):
    w.mul_(1 - LR * decay)


def add_sign(w, g, decay):
    g.add_(w.sign(), alpha=STRENGTH)


def threshold(w, g, decay):
    wide = w.float() if w.dtype == torch.bfloat16 else w  # the threshold itself would be rounded
    w.copy_(F.softshrink(wide, LR / (1 - 0.9) * STRENGTH))


def clip_weights(w, g, decay):
    w.clamp_(-0.25, 0.25)


SCHEDULE = Linear(0.0, DECAY)
FEATURES = {
    "WeightDecay": Feature((lambda: WeightDecay(SCHEDULE),), by_optimizer=True),
    "coupled": Feature((lambda: WeightDecay(SCHEDULE, method="coupled"),), before=add_decay),
    "decoupled": Feature((lambda: WeightDecay(SCHEDULE, method="decoupled"),), before=shrink),
    "L1Penalty": Feature((lambda: L1Penalty(STRENGTH),), before=add_sign),
    "L1Penalty proximal": Feature((lambda: L1Penalty(STRENGTH, method="proximal"),), after=threshold),
    "Box": Feature((lambda: WeightConstraint(Box(-0.25, 0.25)),), after=clip_weights),
}


def sgd(groups, **options):
    return torch.optim.SGD(groups, lr=LR, momentum=0.9, **options)


def by_hand(precision, feature, *, options, clip=None, accumulate=1, overflow=None):
    module = Model(None, overflow)
    if precision in ("bf16-true", "64-true"):
        module.to(PRECISIONS[precision])
    groups = split(module)
    optimizer, decaying = sgd(groups, **options), groups[0]["params"]
    low = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    context = functools.partial(torch.autocast, "cpu", low) if low else contextlib.nullcontext
    grad_scaler = scaler() if precision == "16-mixed" else torch.amp.GradScaler("cpu", enabled=False)
    batches = [tuple(t.to(PRECISIONS[precision]) for t in batch) for batch in Data()]
    windows = [range(i, min(i + accumulate, BATCHES)) for i in range(0, BATCHES, accumulate)]
    for step, window in enumerate(windows):
        optimizer.zero_grad()
        for i in window:
            with context():
                loss = module.loss_of(batches[i], i) / accumulate
            grad_scaler.scale(loss).backward()
        grad_scaler.unscale_(optimizer)
        real = all(bool(p.grad.isfinite().all()) for p in module.parameters())
        decay = DECAY * step / (len(windows) - 1)
        if feature.by_optimizer:
            optimizer.param_groups[0]["weight_decay"] = decay
        act(feature.before, decaying, decay, real)
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        act(feature.after, decaying, decay, real)
    return weights(module)


@torch.no_grad()
def act(what, parameters, decay, real):
    if what is not None and real:
        for parameter in parameters:
            what(parameter, parameter.grad, decay)


# What is computed in one dtype is equal to a few roundings; a fused kernel rounds once where others round often.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.0}


def assert_by_hand(precision, feature, *, options, clip=None, accumulate=1, overflow=None):
    feature = FEATURES[feature]
    module = Model(functools.partial(sgd, **options), overflow)
    callbacks = [make() for make in feature.callbacks]
    fit(module, precision, *callbacks, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    expected = by_hand(precision, feature, options=options, clip=clip, accumulate=accumulate, overflow=overflow)
    found = weights(module)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=TOLERANCES[weight.dtype])


IMPLEMENTATIONS = {"default": {}, "fused": {"fused": True}}


@pytest.mark.parametrize("accumulate", [1, 3], ids="{} batches a step".format)
@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("feature", FEATURES)
def test_equals_a_hand_written_loop(feature, precision, options, accumulate):
    assert_by_hand(precision, feature, options=options, accumulate=accumulate)


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "bf16-true"])
@pytest.mark.parametrize("feature", ["WeightDecay", "coupled", "L1Penalty"])
def test_equals_a_hand_written_loop_with_clipping(feature, precision):
    """What is added to gradients is clipped along with them; the optimizer's decay is not."""
    assert_by_hand(precision, feature, options={}, clip=0.05)


# Not in the first: torch's fused SGD then goes on with a momentum that nobody has written (seen in 2.13).
@pytest.mark.parametrize("overflow", [1, 3, 6], ids="in step {}".format)
@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", FEATURES)
def test_equals_a_hand_written_loop_when_gradients_overflow(feature, options, overflow):
    assert_by_hand("16-mixed", feature, options=options, overflow=overflow)


# -- steps that are skipped ------------------------------------------------------------------------------------------


def pulled_to_zero():
    return AnchorDecay(0.5, anchor={name: torch.zeros_like(w) for name, w in Model(None).named_parameters()})


EVERYTHING = {
    "independent": lambda: WeightDecay(DECAY, method="independent"),
    "cautious": lambda: WeightDecay(DECAY, method="cautious"),
    "stable": lambda: WeightDecay(DECAY, method="stable"),
    "AnchorDecay": pulled_to_zero,
    "ConstrainedDecay": lambda: ConstrainedDecay("warm_start", factor=0.5, warm_start_steps=1),
    "GroupLassoPenalty": lambda: GroupLassoPenalty(STRENGTH, method="proximal"),
    "MaxNorm": lambda: WeightConstraint(MaxNorm(0.3)),
    **{name: feature.callbacks[0] for name, feature in FEATURES.items()},
}


class Watch(L.Callback):
    """The weights after every batch, and the scale."""

    def __init__(self):
        self.weights, self.scales = [], []

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(torch.cat([w.flatten() for w in weights(pl_module).values()]))
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("callback", EVERYTHING)
def test_nothing_moves_in_a_step_that_is_skipped(callback, options):
    watch = Watch()
    fit(Model(functools.partial(sgd, **options), overflow=3), "16-mixed", EVERYTHING[callback](), watch)
    moved = [not torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert moved == [True, True, True, False, True, True, True]
    assert watch.scales == [SCALE] * 4 + [SCALE / 2] * 4


# -- what is measured ------------------------------------------------------------------------------------------------


def measured(precision, options, **trainer_options):
    logger = Kept()
    monitor = WeightNormMonitor(quantities=("weight", "gradient", "update"), detail="parameter")
    fit(Model(functools.partial(sgd, **options)), precision, monitor, logger=logger, **trainer_options)
    return {key: steps for key, steps in logger.values.items() if "norm/" in key}


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize(("precision", "rel"), [("64-true", 1e-5), ("16-mixed", 2e-2), ("bf16-mixed", 5e-2)])
def test_norms_are_those_of_float32(precision, rel, options):
    """In particular they carry no factor of a GradScaler."""
    expected, found = measured("32-true", {}), measured(precision, options)
    for key in ("weight_norm/total", "gradient_norm/total", "update_norm/total"):
        assert found[key] == pytest.approx(expected[key], rel=rel, abs=0), key


def test_norms_are_before_clipping():
    expected, found = measured("32-true", {}), measured("32-true", {}, gradient_clip_val=1e-3)
    assert found["gradient_norm/total"][0] == expected["gradient_norm/total"][0] > 0.1
    assert found["update_norm/total"][0] == pytest.approx(1e-3 * LR, rel=1e-4, abs=0)


def test_a_gradient_that_overflows_is_counted_and_changes_nothing():
    logger = Kept()
    monitor = WeightNormMonitor(quantities=("gradient", "update"))
    fit(Model(sgd, overflow=3), "16-mixed", monitor, logger=logger)
    assert logger.values["update_norm/total"][3] == 0
    assert not math.isfinite(logger.values["gradient_norm/total"][3])
    assert logger.values["gradient_nonfinite/total"][3] > 0
    assert {step for step, count in logger.values["gradient_nonfinite/total"].items() if count} == {3}


# -- decay that rounds to nothing ------------------------------------------------------------------------------------


def test_decay_that_rounds_to_nothing_is_told():
    make = functools.partial(torch.optim.AdamW, lr=1e-3)
    with pytest.warns(UserWarning, match=r"WeightDecay.* is off by up to .*rounding='stochastic'"):
        fit(Model(make), "bf16-true", WeightDecay(0.1))


def test_stochastic_rounding_decays_in_the_mean():
    """200 steps of 1e-4 are exp(-0.02) = 0.980, and rounded to nearest 1."""

    class Ones(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)
            nn.init.ones_(self.layer.weight)

        def training_step(self, batch, batch_idx):
            return 0 * self.layer.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Ones()
    decay = WeightDecay(0.1, method="decoupled", rounding="stochastic")
    make_trainer(decay, precision="bf16-true", max_steps=200).fit(module, Batches(count=200, size=1))
    assert module.layer.weight.float().mean().item() == pytest.approx((1 - 1e-4) ** 200, rel=0, abs=0.002)
