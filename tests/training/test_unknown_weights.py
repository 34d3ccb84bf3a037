"""Where it cannot be told what a layer uses: is the weight left out with one warning, and never constrained?"""

import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.ao import quantization
from torch.ao.nn.intrinsic import qat
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_regularize import (
    GroupLassoPenalty,
    Hyperball,
    L1Penalty,
    WeightConstraint,
    WeightNormMonitor,
    WeightPenalty,
)
from lightning_regularize.metrics import Sparsity, WeightNorm
from lightning_regularize.penalties import Orthogonal
from lightning_regularize.plots import plot_histograms
from lightning_regularize.projections import Box, FrobeniusBall, MaxNorm
from tests.training.support import QUIET, make_trainer
from tests.training.test_norm_monitor import Kept

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*changed no weight in a whole epoch"),
]


class Params4bit(nn.Parameter):
    """By the name of bitsandbytes', which holds two elements in each byte, in bytes or in what is wide as some."""


class Int8Params(nn.Parameter):
    """By the name of bitsandbytes', which trains in floating point and multiplies by integers."""


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def masked_behind(normalize, name):
    """The mask makes what the normalization has read already: a forward pass uses that of the one before."""
    layer = normalize(nn.Linear(3, 4))
    prune.l1_unstructured(layer, name, amount=0.5)
    return layer


def masked_before_a_parametrization():
    layer = prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=0.5)
    parametrize.register_parametrization(layer, "weight_orig", Doubled())
    return layer


def int8(trained=True):
    layer = nn.Linear(3, 4)
    layer.weight = Int8Params(layer.weight.detach().clone(), requires_grad=trained)
    return layer


def four_bit():
    """Stored as numbers of bfloat16, as for FSDP, which mean nothing."""
    layer = nn.Linear(3, 4)
    bytes_ = torch.arange(6, dtype=torch.uint8).view(torch.bfloat16).view(-1, 1)
    layer.weight = Params4bit(bytes_, requires_grad=False)
    return layer


def with_batch_norm(layer, *sizes):
    return layer(*sizes, qconfig=quantization.get_default_qat_qconfig("x86"))


UNKNOWN = {
    "weight_norm, masked": (lambda: masked_behind(nn.utils.weight_norm, "weight_v"), "a hook that comes later"),
    "gain of weight_norm, masked": (lambda: masked_behind(nn.utils.weight_norm, "weight_g"), "a hook that comes later"),
    "spectral_norm, masked": (lambda: masked_behind(nn.utils.spectral_norm, "weight_orig"), "a hook that comes later"),
    "masked, then parametrized": (masked_before_a_parametrization, "from which a hook computes another one"),
    "ConvBn1d": (lambda: with_batch_norm(qat.ConvBn1d, 3, 4, 1), "ConvBn1d scales by its batch norm"),
    "ConvBnReLU2d": (lambda: with_batch_norm(qat.ConvBnReLU2d, 3, 4, 1), "ConvBnReLU2d scales by its batch norm"),
    "LinearBn1d": (lambda: with_batch_norm(qat.LinearBn1d, 3, 4), "LinearBn1d scales by its batch norm"),
    "Int8Params": (int8, "Int8Params packs in a way of its own"),
}


class Net(L.LightningModule):
    """A plain layer, which is the same beside any other one; each parameter has a loss of its own."""

    def __init__(self, make_layer):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.head = nn.Linear(4, 2)
            self.layer = make_layer()

    def training_step(self, batch, batch_idx):
        return sum(p.abs().square().sum() for p in self.parameters() if p.requires_grad)

    def train_dataloader(self):
        return [0, 1, 2]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("how", UNKNOWN)
def test_it_is_left_out_with_one_warning(how):
    make_layer, why = UNKNOWN[how]
    module, logger = Net(make_layer), Kept()
    rest = module.head.weight.double().norm().item()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = WeightNormMonitor(detail="parameter", quantities=("weight", "sparsity", "update", "distance"))
        make_trainer(monitor, logger=logger, max_epochs=1).fit(module)
    told = [str(each.message) for each in caught if "leaves out" in str(each.message)]
    assert len(told) == 1
    assert "WeightNormMonitor leaves out 1 weights such as 'layer.weight" in told[0]
    assert why in told[0]
    logged = logger.logged()
    assert not [key for key in logged if "/layer.weight" in key]
    assert logged["weight_norm/head.weight"][0] == pytest.approx(rest, rel=1e-6, abs=0)


@pytest.mark.parametrize("how", UNKNOWN)
def test_metrics_and_plots_leave_it_out_with_a_warning(how):
    make_layer, why = UNKNOWN[how]
    module = Net(make_layer)
    with pytest.warns(UserWarning, match=f"WeightNorm leaves out 1 weights such as 'layer.weight.*{why}"):
        found = WeightNorm(exclude=("bias", "norm"))(module)
    assert found.item() == pytest.approx(module.head.weight.double().norm().item(), rel=1e-6, abs=0)
    with pytest.warns(UserWarning, match="Sparsity leaves out 1 weights"):
        assert Sparsity(exclude=("bias",))(module).item() == 0
    pytest.importorskip("matplotlib")
    with pytest.warns(UserWarning, match="plot_histograms leaves out 1 weights"):
        _, axes = plot_histograms(module)
    assert "layer.weight" not in {ax.get_title() for ax in axes}


def test_four_bits_that_are_stored_as_wider_numbers_are_not_drawn():
    pytest.importorskip("matplotlib")
    with pytest.warns(UserWarning, match=r"leaves out 1 weights such as 'layer.weight', which Params4bit packs"):
        _, axes = plot_histograms(Net(four_bit))
    assert {ax.get_title() for ax in axes} == {"head.weight", "head.bias", "layer.bias"}


@pytest.mark.parametrize(
    "callback", [WeightConstraint(MaxNorm(0.3)), Hyperball()], ids=lambda each: type(each).__name__
)
@pytest.mark.parametrize("how", UNKNOWN)
def test_it_is_not_constrained(how, callback):
    module = Net(UNKNOWN[how][0])
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with pytest.raises(MisconfigurationException, match=rf"{type(callback).__name__}.*'layer\..*weight.*exclude"):
        make_trainer(callback, max_epochs=1).fit(module)
    for now, then in zip(module.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_a_penalty_says_that_it_acts_on_packed_numbers():
    with pytest.warns(UserWarning, match=r"L1Penalty acts on the stored numbers of 'layer.weight', a packed weight"):
        make_trainer(L1Penalty(1e-3), max_epochs=1).fit(Net(int8))


# -- frozen weights, which nothing acts on -----------------------------------------------------------------------------


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))


FROZEN = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "older spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
    "token": Token,
    "complex": Complex,
    "rows that are looked up": lambda: nn.Embedding(3, 4, sparse=True),
    "4 bits": four_bit,
    "8 bits": lambda: int8(trained=False),
}
ACTING = {
    "MaxNorm": lambda: WeightConstraint(MaxNorm(0.3)),
    "relative ball": lambda: WeightConstraint(FrobeniusBall(0.5, relative=True)),
    "Box": lambda: WeightConstraint(Box(-0.2, 0.2)),
    "Hyperball": lambda: Hyperball(),
    "L1": lambda: L1Penalty(0.01, exclude=("bias",)),
    "proximal L1": lambda: L1Penalty(0.01, exclude=("bias",), method="proximal"),
    "group lasso": lambda: GroupLassoPenalty(0.01),
    "Orthogonal": lambda: WeightPenalty(Orthogonal(), 0.01),
}


def end_of_head(make_layer, make_callback):
    """Where the plain layer ends beside another one that is frozen."""
    module = Net(make_layer)
    module.layer.requires_grad_(False)
    frozen = {name: value.clone() for name, value in module.layer.state_dict().items()}
    make_trainer(make_callback(), max_epochs=1).fit(module)
    assert all(torch.equal(value, frozen[name]) for name, value in module.layer.state_dict().items())
    return module.head.weight.detach()


@pytest.mark.parametrize("acting", ACTING)
def test_frozen_weights_are_not_looked_at(acting):
    expected = end_of_head(nn.Identity, ACTING[acting])
    for make_layer in FROZEN.values():
        torch.testing.assert_close(end_of_head(make_layer, ACTING[acting]), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("acting", "frozen", "message"),
    [
        ("MaxNorm", "weight_norm", "WeightConstraint.*cannot hold for parametrized weights.*'layer.param"),
        ("Hyperball", "older spectral_norm", "Hyperball.*parametrized weights.*'layer.weight_orig'"),
        ("group lasso", "token", "GroupLassoPenalty.*'layer.token'"),
        ("L1", "complex", r"L1Penalty.*\['layer.weight'\] are complex"),
        ("proximal L1", "weight_norm", r"L1Penalty.*\['layer.parametrizations.weight.original1'\]"),
    ],
)
def test_what_is_refused_is_refused_when_it_is_trained(acting, frozen, message):
    class Unfreeze(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                self.before = {name: value.clone() for name, value in module.state_dict().items()}
                module.layer.requires_grad_(True)

    module, unfreeze = Net(FROZEN[frozen]), Unfreeze()
    module.layer.requires_grad_(False)
    trainer = make_trainer(ACTING[acting](), unfreeze, max_epochs=3)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module)
    assert trainer.current_epoch == 1
    assert all(torch.equal(value, unfreeze.before[name]) for name, value in module.state_dict().items())
