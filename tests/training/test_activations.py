"""Is training with ActivationPenalty training with the loss plus the penalty?"""

import functools

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_regularize import ActivationPenalty, activations
from lightning_regularize.schedules import Linear
from tests.training.support import QUIET, Batches, assert_same_weights, make_trainer, weights

pytestmark = QUIET

STRENGTH = 0.3
NORMS = ("l1", "l2", "logsumexp")


def by_hand(outputs, norm):
    """The penalty as its formula has it; 4 samples a batch."""
    if norm == "logsumexp":
        return outputs.exp().sum(-1).log().pow(2).mean()
    return (outputs.abs() if norm == "l1" else outputs**2).sum() / len(outputs)


class Net(L.LightningModule):
    """Two layers; with ``norm`` the penalty is in the loss.

    Args:
        norm: Which penalty the loss has; None for none.
        strength: Of that, a function of the step.
        checkpointing: None, or ``use_reentrant`` of the checkpoint around the first layer.
        make: Makes the optimizer.
        layers: What is penalized.
    """

    def __init__(self, norm=None, strength=lambda step: STRENGTH, checkpointing=None, make=None):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.first, self.act, self.last = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)
            self.unused = nn.Linear(2, 2)
        self.double()
        self.norm, self.strength, self.checkpointing = norm, strength, checkpointing
        self.make = make or functools.partial(torch.optim.AdamW, lr=0.02)

    def forward(self, x):
        if self.checkpointing is None:
            self.hidden = self.act(self.first(x))
        else:
            x = x.clone().requires_grad_()
            self.hidden = checkpoint(lambda x: self.act(self.first(x)), x, use_reentrant=self.checkpointing)
        self.out = self.last(self.hidden)
        return self.out

    def loss(self, batch):
        with torch.autocast("cpu", enabled=False):
            loss = (self(batch[0]) - batch[1]).square().mean()
            if self.norm is not None:
                added = by_hand(self.hidden, self.norm) + by_hand(self.out, self.norm)
                loss = loss + self.strength(self.trainer.global_step) * added
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return self.make(self.parameters())


def fit(module, *callbacks, scaler=None, **options):
    if scaler is not None:
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scaler))]
    trainer = make_trainer(*callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module, Batches())
    return weights(module)


def penalty(norm="l2", strength=STRENGTH, **options):
    return ActivationPenalty(strength, include=("act", "last"), norm=norm, **options)


SETTINGS = {
    "plain": {},
    "accumulation 4": {"accumulate_grad_batches": 4},  # 7 batches: the last window of an epoch is not full
    "GradScaler": {"scaler": 1024.0},
    "GradScaler and accumulation 4": {"scaler": 1024.0, "accumulate_grad_batches": 4},
    "clipping": {"gradient_clip_val": 0.5},
}
ALL_NORMS = "GradScaler and accumulation 4"
CASES = [*(("l2", name) for name in SETTINGS), ("l1", ALL_NORMS), ("logsumexp", ALL_NORMS)]


@pytest.mark.parametrize(("norm", "options"), CASES, ids=[f"{norm}, {options}" for norm, options in CASES])
def test_training_is_that_with_the_penalty_in_the_loss(norm, options):
    options = SETTINGS[options]
    found = fit(Net(), penalty(norm), **options)
    assert_same_weights(found, fit(Net(norm), **options), atol=1e-12)
    assert not torch.equal(found["first.weight"], fit(Net(), **options)["first.weight"])


@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_penalty_and_gradient_are_means_over_samples_or_positions(norm, shape):
    outputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = activations.penalty(outputs, norm)
    expected = by_hand(outputs, norm) if len(outputs) else outputs.sum()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(expected, outputs)
    torch.testing.assert_close(activations.gradient(outputs, norm), gradient, rtol=1e-12, atol=1e-12)


def test_penalty_and_gradient_are_computed_in_float32():
    outputs = torch.tensor([[40000.0]], dtype=torch.float16)  # whose square and double float16 cannot hold
    assert activations.penalty(outputs, "l2").item() == 40000.0**2
    assert activations.gradient(outputs, "l2").item() == 80000.0


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_forward_pass_that_is_computed_again_counts_once(norm, use_reentrant):
    module = Net(checkpointing=use_reentrant)
    found = fit(module, penalty(norm), accumulate_grad_batches=2)
    assert_same_weights(found, fit(Net(norm), accumulate_grad_batches=2), atol=1e-12)


def test_the_strength_follows_the_position_of_the_step():
    found = fit(Net(), penalty(strength=Linear(0.0, 1.0)), accumulate_grad_batches=4, max_epochs=4)  # 8 steps
    assert_same_weights(found, fit(Net("l2", lambda step: step / 7), accumulate_grad_batches=4, max_epochs=4), 1e-12)


def test_accumulation_that_changes():
    def changing():
        return GradientAccumulationScheduler({0: 1, 1: 3})

    assert_same_weights(fit(Net(), penalty(), changing()), fit(Net("l2"), changing()), atol=1e-12)


def test_each_evaluation_of_a_closure_has_the_penalty():
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    assert_same_weights(fit(Net(make=lbfgs), penalty()), fit(Net("l2", make=lbfgs)), atol=1e-10)


def test_two_penalties_add_up():
    found = fit(Net(), *(ActivationPenalty(STRENGTH, include=(name,), norm="l1") for name in ("act", "last")))
    assert_same_weights(found, fit(Net("l1")), atol=1e-12)


def test_a_layer_that_is_called_twice_counts_twice():
    class Twice(Net):
        def forward(self, x):
            self.hidden = self.act(self.act(self.first(x)))
            self.out = self.last(self.hidden)
            return self.out

    class TwiceByHand(Twice):
        def forward(self, x):
            self.first_act = self.act(self.first(x))
            self.hidden = self.act(self.first_act)
            return self.last(self.hidden)

        def loss(self, batch):
            added = (self(batch[0]) - batch[1]).square().mean()
            return added + STRENGTH * (by_hand(self.hidden, "l1") + by_hand(self.first_act, "l1"))

    once = ActivationPenalty(STRENGTH, include=(nn.Tanh,))
    assert_same_weights(fit(Twice(), once), fit(TwiceByHand()), atol=1e-12)


class Manual(Net):
    """A step for every second batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("scaler", [None, 256.0], ids=["", "GradScaler"])
def test_manual_optimization_adds_to_what_manual_backward_gets(scaler):
    found = fit(Manual(), penalty(strength=STRENGTH / 2), scaler=scaler)
    assert_same_weights(found, fit(Manual("l2"), scaler=scaler), atol=1e-12)


class Adversarial(Net):
    """Two optimizers, for the layers before and behind the activation, of which the second goes through the first."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, last = self.optimizers()
        x, y = batch
        for optimizer, target in ((first, y), (last, -y)):
            self.toggle_optimizer(optimizer)
            hidden = self.act(self.first(x))
            loss = (self.last(hidden) - target).square().mean()
            if self.norm is not None:
                loss = loss + STRENGTH * by_hand(hidden, self.norm)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (self.first, self.last)]


def test_several_optimizers():
    found = fit(Adversarial(), ActivationPenalty(STRENGTH, include=("act",), norm="l2"))
    assert_same_weights(found, fit(Adversarial("l2")), atol=1e-12)


class TwoLosses(Net):
    """One forward pass for two backward passes."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.optimizers().zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward((self.out - 1).square().mean())
        self.optimizers().step()


def test_a_second_backward_pass_through_one_forward_pass_adds_nothing():
    assert_same_weights(fit(TwoLosses(), penalty()), fit(TwoLosses("l2")), atol=1e-12)


class GradientPenalty(Net):
    """Has a gradient of the model in its loss."""

    def loss(self, batch):
        x = batch[0].requires_grad_()
        loss = (self(x) - batch[1]).square().mean()
        (slope,) = torch.autograd.grad(self.out.sum(), x, create_graph=True)
        if self.norm is not None:
            loss = loss + STRENGTH * (by_hand(self.hidden, self.norm) + by_hand(self.out, self.norm))
        return loss + slope.square().sum()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_the_model_asks_for_are_its_own(norm):
    assert_same_weights(fit(GradientPenalty(), penalty(norm)), fit(GradientPenalty(norm)), atol=1e-12)


class SecondOrder(Net):
    """Divides gradients by one plus the diagonal of the Hessian, as it is along a direction."""

    def backward(self, loss):
        loss.backward(create_graph=True)
        parameters = [p for p in self.parameters() if p.grad is not None]
        curvature = torch.autograd.grad(sum(p.grad.sum() for p in parameters), parameters)
        for parameter, each in zip(parameters, curvature, strict=True):
            parameter.grad = parameter.grad.detach() / (1 + each.abs())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_the_gradient_has_a_gradient():
    assert_same_weights(fit(SecondOrder(), penalty()), fit(SecondOrder("l2")), atol=1e-12)


def test_nothing_is_added_outside_of_training():
    module, callback, kept = Net(), penalty(), []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            kept.append(pl_module.hidden.grad_fn)

    trainer = make_trainer(callback, Look(), max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(module, Batches(), Batches(1))
    assert kept == [None, None]
    assert not any(layer._forward_hooks for layer in module.modules())
    hidden = module.act(module.first(torch.ones(1, 3).double()))
    assert hidden.grad_fn.name() == "TanhBackward0"


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_logged_is_what_the_loss_would_have_had(norm, tmp_path):
    class Kept(Net):
        def __init__(self):
            super().__init__()
            self.added = [[]]

        def loss(self, batch):
            loss = super().loss(batch)
            self.added[-1].append(STRENGTH * (by_hand(self.hidden, norm) + by_hand(self.out, norm)).item() / 3)
            return loss

        def on_before_optimizer_step(self, optimizer):
            self.added.append([])

    module = Kept()
    trainer = make_trainer(penalty(norm), max_epochs=1, accumulate_grad_batches=3, logger=CSVLogger(tmp_path))
    logged = []
    trainer.logger.log_metrics = lambda metrics, step=None: logged.append(metrics.get("penalty/activation"))
    trainer.fit(module, Batches())
    expected = [sum(added) for added in module.added[:3]]
    assert [each for each in logged if each is not None] == pytest.approx(expected, rel=1e-6, abs=0)


class InBfloat16(Net):
    """Under autocast; the penalty by hand is computed in bfloat16 too."""

    def __init__(self, norm=None):
        super().__init__(norm, make=functools.partial(torch.optim.SGD, lr=0.05))
        self.float()

    def loss(self, batch):
        loss = (self(batch[0].float()) - batch[1].float()).square().mean()
        assert self.out.dtype == torch.bfloat16
        if self.norm is not None:
            loss = loss + STRENGTH * (by_hand(self.hidden, self.norm) + by_hand(self.out, self.norm))
        return loss


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_activations(norm):
    found = fit(InBfloat16(), penalty(norm), precision="bf16-mixed")
    assert_same_weights(found, fit(InBfloat16(norm), precision="bf16-mixed"), atol=0.02)  # two to three digits


class Large(Net):
    """Its gradients are large, and its dtype is that of the precision."""

    def __init__(self):
        super().__init__()
        self.float()

    def loss(self, batch):
        return 1e3 * self(batch[0].to(self.first.weight.dtype)).float().sum()


LOST = "ActivationPenalty is off by 1?[0-9]+% of its strength here: it is rounded when it is added"


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_strength_that_half_precision_rounds_away_is_told_once(norm, precision):
    with pytest.warns(UserWarning, match=LOST) as caught:
        fit(Large(), ActivationPenalty(1e-4, include=("act", "last"), norm=norm), precision=precision)
    assert sum("ActivationPenalty is off by" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize(("precision", "strength"), [("32-true", 1e-4), ("bf16-true", 1e4), ("bf16-mixed", 1e4)])
def test_a_strength_that_is_added_is_not(precision, strength):
    fit(Large(), ActivationPenalty(strength, include=("act",)), precision=precision)


# torch/_dynamo/variables/builder.py looks for a gradient of what a graph break leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("where", ["module", "layer"])
def test_compiled_modules(where):
    module = Net()
    if where == "module":
        fitted = torch.compile(module, backend="eager")
    else:
        module.act, fitted = torch.compile(module.act, backend="eager"), module
    trainer = make_trainer(penalty(), max_epochs=1)
    trainer.fit(fitted, Batches())
    assert_same_weights(
        {name.replace("._orig_mod", ""): value for name, value in weights(module).items()},
        fit(Net("l2"), max_epochs=1),
        atol=1e-12,
    )


def test_a_second_fit_and_one_after_an_exception_begin_anew():
    class Fails(Net):
        fails = True

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.fails:
                raise RuntimeError("on purpose")
            return loss

    module, callback = Fails(), penalty()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, callback)
    assert not any(layer._forward_hooks for layer in module.modules())
    module.fails = False
    assert_same_weights(fit(module, callback), fit(Net("l2")), atol=1e-12)


def test_a_layer_that_is_replaced_between_epochs():
    class Replaces(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.act = nn.Tanh()

    assert_same_weights(fit(Replaces(), penalty()), fit(Net("l2")), atol=1e-12)


# -- what cannot work ------------------------------------------------------------------------------------------------

CONSTRUCTOR = {
    "negative": ({"strength": -1.0}, ValueError, "`strength` should be"),
    "text": ({"strength": "1e-4"}, TypeError, "`strength` should be"),
    "norm": ({"norm": "l3"}, ValueError, "`norm` should be one of 'l1', 'l2', 'logsumexp', got 'l3'"),
    "norms": ({"norm": ["l1"]}, ValueError, r"`norm` should be one of .*, got \['l1'\]"),
    "one glob": ({"include": "act"}, TypeError, "`include` should be a sequence of globs"),
    "a module": ({"include": [nn.Tanh()]}, TypeError, "`include` should be a sequence of globs"),
    "nothing": ({"include": ()}, ValueError, "`include` should name at least one module, got none"),
    "steps": ({"total_steps": 0}, ValueError, "`total_steps` should be a positive integer"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR.values(), ids=CONSTRUCTOR)
def test_constructor(arguments, error, message):
    with pytest.raises(error, match=f"ActivationPenalty: {message}"):
        ActivationPenalty(**{"strength": 1.0, "include": ("act",), **arguments})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_what_was_compiled_before_is_told_to_be_compiled_anew():
    def fit_compiled(*callbacks):
        make_trainer(*callbacks, max_epochs=1).fit(torch.compile(module := Net(), backend="eager"), Batches())
        return weights(module)

    torch.compiler.reset()
    fit_compiled()
    with pytest.raises(MisconfigurationException, match=r"call `torch\.compiler\.reset\(\)` before"):
        fit_compiled(penalty())
    torch.compiler.reset()
    assert_same_weights(fit_compiled(penalty()), fit(Net("l2"), max_epochs=1), atol=1e-12)


class ReturnsTwo(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class LastReturnsTwo(Net):
    def __init__(self):
        super().__init__()
        self.last = ReturnsTwo(5, 2).double()

    def loss(self, batch):
        return (self(batch[0])[0] - batch[1]).square().mean()


class Detached(Net):
    def loss(self, batch):
        self.act(self.first(batch[0]))
        return self.last(batch[0].new_ones(4, 5)).square().mean()


class WithoutLightning(Manual):
    def training_step(self, batch, batch_idx):
        self.loss(batch).backward()
        self.optimizers().step()


BAD = {
    "matches nothing": (Net, {"include": ("act", "akt")}, r"`include` \['akt'\] matches no module"),
    "never runs": (Net, {"include": ("act", "unused")}, r"'unused' names \['unused'\], none of which was called"),
    "two outputs": (LastReturnsTwo, {"include": ("last",)}, "'last' should return a floating tensor.*got tuple"),
    "not in the loss": (Detached, {"include": ("act",)}, r"the loss does not depend on the outputs of \['act'\]"),
    "loss.backward()": (WithoutLightning, {"include": ("act",)}, r"call `self.manual_backward\(loss\)`"),
}


@pytest.mark.parametrize(("make", "arguments", "message"), BAD.values(), ids=BAD)
def test_what_does_nothing_is_an_error_before_weights_change(make, arguments, message):
    module = make()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, ActivationPenalty(1.0, **arguments))
    assert_same_weights(weights(module), before, atol=0)


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Known by its name."""


def test_deepspeed_is_refused():
    """What the table of strategies says of it is checked where DeepSpeed is installed."""
    with pytest.raises(MisconfigurationException, match="DeepSpeed multiplies it by itself: use another strategy"):
        fit(Net(), penalty(), strategy=DeepSpeedStrategy("cpu"))


def test_a_module_that_did_not_run_in_an_epoch_is_told():
    with pytest.warns(UserWarning, match=r"no effect on \['unused'\], which were not called in a whole epoch"):
        fit(Net(), ActivationPenalty(0.1, include=(nn.Linear,)), max_epochs=1)


class OnlyLogged(Net):
    def loss(self, batch):
        self.log("size", self.unused(self.last(self.act(self.first(batch[0])))).mean())
        return super().loss(batch)


def test_a_module_that_the_loss_does_not_depend_on_is_told():
    with pytest.warns(UserWarning, match=r"no effect on \['unused'\], on whose outputs the loss did not depend"):
        fit(OnlyLogged(), ActivationPenalty(0.1, include=(nn.Linear,)), max_epochs=1)


def test_what_is_frozen_is_told():
    module = Net(make=lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1))
    module.first.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no effect on \['act'\] as long as nothing that they depend on is trained"):
        fit(module, ActivationPenalty(0.1, include=("act",)), max_epochs=1)


def test_a_loop_of_ones_own_is_told_what_to_do():
    module = Net()
    with pytest.raises(TypeError, match=r"In a loop of your own add .*activations.penalty\(outputs, norm='l2'\)"):
        penalty().attach(module.configure_optimizers(), module)
