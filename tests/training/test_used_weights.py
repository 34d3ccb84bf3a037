"""Is what layers use measured, where that is not what the optimizer holds? Under one process, DDP and FSDP2."""

import functools
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.ao import quantization
from torch.ao.nn import qat
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_regularize import Hyperball, WeightConstraint, WeightNormMonitor
from lightning_regularize._used import used_weights
from lightning_regularize.metrics import Sparsity, WeightNorm
from lightning_regularize.plots import plot_histograms
from lightning_regularize.projections import MaxNorm
from lightning_regularize.selection import parameter_infos
from tests.distributed import run_distributed
from tests.strategies import CPUFSDPStrategy
from tests.training.support import QUIET, Batches, Regression, make_trainer
from tests.training.test_norm_monitor import Kept

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

QUANTITIES = ("weight", "rms", "sparsity", "stable_rank", "spectral_norm")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Dropped(nn.Module):
    """In training it draws random numbers."""

    def forward(self, weight):
        return nn.functional.dropout(weight, 0.5, self.training)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


def pruned_twice(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)
    prune.ln_structured(layer, "weight", amount=1, n=2, dim=0)


def masked_before_weight_norm(layer):
    """The older one goes on with what the mask makes in the same forward pass."""
    nn.utils.weight_norm(layer)
    prune.l1_unstructured(layer, "weight_v", amount=0.3)
    layer._forward_pre_hooks.move_to_end(next(iter(layer._forward_pre_hooks)))


def spectral_norm_and_doubled(layer):
    parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())


COMPUTED = {
    "pruned": pruned,
    "pruned twice": pruned_twice,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": functools.partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "older weight_norm": nn.utils.weight_norm,
    "older spectral_norm": nn.utils.spectral_norm,
    "masked before older weight_norm": masked_before_weight_norm,
    "spectral_norm and doubled": spectral_norm_and_doubled,
    "dropped in training": lambda layer: parametrize.register_parametrization(layer, "weight", Dropped()),
}


class Computed(Regression):
    """Its hidden layer computes its weight."""

    def __init__(self, how):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            COMPUTED[how](self.hidden)
        self.used = []

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.hidden, self.norm, self.output):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        handle = self.hidden.register_forward_hook(lambda layer, *_: self.used.append(used_now(layer)))
        loss = super().loss(batch)
        handle.remove()
        return loss


def used_now(layer):
    """The weight of the forward pass that is under way, in float64; in evaluation, for nothing may be dropped."""
    modes = [(module, module.training) for module in layer.modules()]
    for module, _ in modes:
        module.training = False
    with torch.no_grad():
        weight = layer.weight.detach().double().clone()
    for module, mode in modes:
        module.training = mode
    return weight


def fit(how, **options):
    logger, module = Kept(), Computed(how)
    monitor = WeightNormMonitor(quantities=QUANTITIES, detail="parameter")
    options = {"logger": logger, "max_epochs": 1, "limit_train_batches": 4, **options}
    make_trainer(monitor, **options).fit(module, Batches())
    return logger.logged(), [weight.numpy() for weight in module.used]


def on_two(rank, world_size, strategy):
    warnings.simplefilter("ignore")
    options = {"devices": world_size, "use_distributed_sampler": False}
    make = {"ddp": lambda: "ddp", "fsdp2": lambda: ModelParallelStrategy(world_size, 1, process_group_backend="gloo")}
    return [fit(how, strategy=make[strategy](), **options) for how in COMPUTED]


def by_definition(weight):
    weight = torch.as_tensor(weight)
    square, largest = weight.square().sum(), torch.linalg.svdvals(weight)[0]
    return {
        "weight_norm": weight.norm().item(),
        "rms": weight.square().mean().sqrt().item(),
        "sparsity": (weight == 0).double().mean().item(),
        "spectral_norm": largest.item(),
        "stable_rank": (square / largest.square()).item(),
    }


def assert_used_weights_are_logged(logged, used):
    expected = [by_definition(weight) for weight in used]
    for key in expected[0]:
        found = logged[f"{key}/hidden.weight"]
        assert found == pytest.approx({i: each[key] for i, each in enumerate(expected)}, rel=1e-6, abs=1e-12), key
    parts = {key.partition("/")[2] for key in logged if key.startswith("weight_norm")}
    assert {part for part in parts if part.startswith("hidden.")} == {"hidden.weight", "hidden.bias"}


@pytest.mark.parametrize("how", COMPUTED)
def test_the_used_weight_is_logged(how):
    logged, used = fit(how)
    assert len(used) == 4
    assert_used_weights_are_logged(logged, used)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_used_weight_is_logged_on_two_processes(strategy):
    first, _ = run_distributed(on_two, strategy)
    for logged, used in first:
        assert_used_weights_are_logged(logged, used)


def state_and_random_numbers(how, *callbacks):
    module = Computed(how)
    torch.manual_seed(1)
    make_trainer(*callbacks, logger=Kept(), max_epochs=2).fit(module, Batches())
    return {**module.state_dict(), "drawn": torch.get_rng_state()}


@pytest.mark.parametrize("how", COMPUTED)
def test_to_measure_changes_no_weight_no_buffer_and_no_random_number(how):
    monitor = WeightNormMonitor(quantities=("weight", "gradient", "angle", "stable_rank"), histograms=False)
    torch.testing.assert_close(
        state_and_random_numbers(how, monitor), state_and_random_numbers(how), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.filterwarnings("ignore:.*ModelPruning:UserWarning")
def test_a_layer_that_is_pruned_in_mid_run_is_measured_as_it_is_used():
    module, logger = Regression(), Kept()
    pruning = ModelPruning("l1_unstructured", [(module.hidden, "weight")], amount=0.5, make_pruning_permanent=False)
    monitor = WeightNormMonitor(quantities=("sparsity",), detail="parameter")
    make_trainer(pruning, monitor, logger=logger, max_epochs=3, limit_train_batches=2).fit(module, Batches())
    # It prunes at the end of each epoch, half of what is left. 12 weights.
    assert logger.logged()["sparsity/hidden.weight"] == pytest.approx(
        {0: 0, 1: 0, 2: 0.5, 3: 0.5, 4: 0.75, 5: 0.75}, rel=1e-6, abs=0
    )


def test_a_mask_that_is_removed_in_mid_run_is_followed():
    class Remove(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                prune.remove(pl_module.hidden, "weight")

    module, logger = Computed("pruned"), Kept()
    monitor = WeightNormMonitor(quantities=("sparsity",), detail="parameter")
    make_trainer(Remove(), monitor, logger=logger, max_epochs=1, limit_train_batches=3).fit(module, Batches())
    found = logger.logged()["sparsity/hidden.weight"]
    assert found[0] == 0.5
    assert found[2] == 0.0  # the optimizer moves all again


@pytest.mark.parametrize("how", COMPUTED)
def test_gradients_are_of_what_the_optimizer_holds(how):
    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            held = {name: p.grad for name, p in pl_module.hidden.named_parameters() if name != "bias"}
            self.norm = torch.cat([gradient.flatten() for gradient in held.values()]).norm().item()

    logger, gradients = Kept(), Gradients()
    monitor = WeightNormMonitor(quantities=("gradient",), detail="parameter")
    options = {"logger": logger, "max_epochs": 1, "limit_train_batches": 1}
    make_trainer(monitor, gradients, **options).fit(Computed(how), Batches())
    assert logger.logged()["gradient_norm/hidden.weight"][0] == pytest.approx(gradients.norm, rel=1e-9, abs=0)


@pytest.mark.parametrize("how", COMPUTED)
def test_a_step_is_measured_as_a_change_of_the_used_weight(how):
    class Changes(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = used_after_a_forward_pass_in_evaluation(pl_module)

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.after = used_after_a_forward_pass_in_evaluation(pl_module)

    logger, changes = Kept(), Changes()
    monitor = WeightNormMonitor(quantities=("update",), detail="parameter")
    options = {"logger": logger, "max_epochs": 1, "limit_train_batches": 1}
    make_trainer(monitor, changes, **options).fit(Computed(how), Batches())
    expected = (changes.after - changes.before).norm().item()
    assert logger.logged()["update_norm/hidden.weight"][0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def used_after_a_forward_pass_in_evaluation(module):
    module.hidden.eval()
    with torch.no_grad():
        module.hidden(torch.zeros(1, 3, dtype=torch.float64))
        weight = module.hidden.weight.detach().clone()
    module.hidden.train()
    return weight


@pytest.mark.parametrize("rules", [{"include": ("hidden.weight",)}, {"include": ("weight",), "exclude": ("output.*",)}])
@pytest.mark.parametrize("how", COMPUTED)
def test_metrics_are_of_the_used_weight_and_rules_know_its_name(how, rules):
    module = Computed(how)
    expected = by_definition(used_after_a_forward_pass_in_evaluation(module))
    assert WeightNorm(**rules)(module).item() == pytest.approx(expected["weight_norm"], rel=1e-6, abs=0)
    assert Sparsity(**rules)(module).item() == pytest.approx(expected["sparsity"], rel=1e-6, abs=0)


@pytest.mark.parametrize("how", COMPUTED)
def test_histograms_are_of_the_used_weight(how):
    pytest.importorskip("matplotlib")
    module = Computed(how)
    expected = used_after_a_forward_pass_in_evaluation(module)
    _, axes = plot_histograms(module.hidden, log=False)
    drawn = {ax.get_title(): ax.patches[0].get_data() for ax in axes}
    assert set(drawn) == {"weight", "bias"}
    assert [drawn["weight"].edges[0], drawn["weight"].edges[-1]] == pytest.approx(
        [expected.min().item(), expected.max().item()], rel=1e-9, abs=1e-12
    )


def test_what_is_packed_in_integers_is_left_out_of_a_plot_with_a_warning():
    pytest.importorskip("matplotlib")
    module = nn.Linear(2, 2)
    module.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.warns(UserWarning, match=r"leaves out 'packed', which is packed in torch.uint8"):
        _, axes = plot_histograms(module)
    assert [ax.get_title() for ax in axes] == ["weight", "bias"]


def test_a_tied_computed_weight_counts_once():
    layer = parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    module = nn.ModuleList([layer, nn.Sequential(layer)])
    assert WeightNorm()(module).item() == pytest.approx(layer.weight.norm().item(), rel=1e-6, abs=0)


def test_a_cached_weight_is_not_taken_for_the_present_one():
    layer = parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    with parametrize.cached():
        stale = layer.weight.norm().item()
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(2)
        assert WeightNorm()(layer).item() == pytest.approx(2 * stale, rel=1e-6, abs=0)


def test_factors_of_a_low_rank_parametrization_are_weights_of_their_own():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3, 1))

        def forward(self, weight):
            return weight + self.factor @ self.factor.T

    layer = nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(layer, "weight", LowRank())
    both = [layer.weight.norm().item(), 3**0.5]
    assert WeightNorm()(layer).item() == pytest.approx((both[0] ** 2 + both[1] ** 2) ** 0.5, rel=1e-6, abs=0)


def flat(rank, world_size):
    warnings.simplefilter("ignore")
    module, logger = Computed("weight_norm"), Kept()
    told = []
    monitor = WeightNormMonitor(detail="parameter")
    monitor.warn = told.append
    options = {"devices": world_size, "use_distributed_sampler": False, "logger": logger, "max_epochs": 1}
    make_trainer(monitor, strategy=CPUFSDPStrategy(process_group_backend="gloo"), **options).fit(module, Batches())
    return sorted(logger.logged()), told


def test_what_fsdp1_has_cut_is_left_out_with_a_warning():
    keys, told = run_distributed(flat)[0]
    assert "weight_norm/output.weight" in keys
    assert "weight_norm/hidden.weight" not in keys
    assert "'hidden.weight', which layers compute from parameters that FSDP1" in told[0]


@pytest.mark.parametrize("frozen", ["original0", "original1"])
def test_a_weight_is_trained_if_any_of_its_sources_is(frozen):
    layer = parametrizations.weight_norm(nn.Linear(3, 2, bias=False))
    getattr(layer.parametrizations.weight, frozen).requires_grad_(False)
    assert WeightNorm()(layer).item() == pytest.approx(layer.weight.norm().item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("name", ["weight", "parametrizations.weight.original0", "parametrizations.weight.original1"])
def test_rules_know_a_used_weight_by_its_sources_too(name):
    layer = parametrizations.weight_norm(nn.Linear(3, 2))
    found = WeightNorm(include=(name,), exclude=("bias",))(layer).item()
    assert found == pytest.approx(layer.weight.norm().item(), rel=1e-6, abs=0)


def test_what_a_computation_draws_and_counts_is_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, weight):
            self.calls.add_(1)
            return weight + torch.rand(())

    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Counting())
    calls, drawn = layer.parametrizations.weight[0].calls.clone(), torch.get_rng_state()
    WeightNorm()(layer)
    assert torch.equal(layer.parametrizations.weight[0].calls, calls)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_mask_that_is_removed_from_another_source_is_noticed():
    layer = nn.utils.weight_norm(nn.Linear(1, 3))  # of equally large sources the first stands for the weight
    prune.l1_unstructured(layer, "weight_v", amount=1)
    (used,) = (each for each in used_weights(parameter_infos(layer)) if each.is_computed)
    assert used.stored.name == "weight_g"
    assert used.is_up_to_date
    prune.remove(layer, "weight_v")
    assert not used.is_up_to_date


# -- training for integers -------------------------------------------------------------------------------------------


class ForIntegers(L.LightningModule):
    """Its layers round their weights to 255 steps, or to 15, in each forward pass."""

    def __init__(self, how):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 4, (1, 2)), nn.Flatten(), nn.Linear(8, 2))
        self.net.qconfig = QCONFIGS[how]()
        quantization.prepare_qat(self.net.train(), inplace=True)
        for module in self.net.modules():
            if isinstance(module, _LearnableFakeQuantize):
                module.enable_param_learning()
        self.used = {0: [], 2: []}

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for i in self.used:
                fully_shard(self.net[i], mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        handles = [
            self.net[i].weight_fake_quant.register_forward_hook(functools.partial(self.note, i)) for i in self.used
        ]
        loss = (self.net(torch.ones(4, 3, 1, 3)) - torch.tensor([1.0, -1.0])).square().mean()
        for handle in handles:
            handle.remove()
        return loss

    def note(self, i, quantizer, inputs, rounded):
        self.used[i].append(rounded.detach().double().norm().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def coarse(quantizer, **options):
    options |= {"observer": quantization.MinMaxObserver, "quant_min": -8, "quant_max": 7}
    return quantization.QConfig(nn.Identity, quantizer.with_args(dtype=torch.qint8, **options))


QCONFIGS = {
    "per channel": lambda: quantization.get_default_qat_qconfig("x86"),
    "per tensor": lambda: quantization.QConfig(quantization.default_fake_quant, quantization.default_weight_fake_quant),
    "coarse": lambda: coarse(quantization.FakeQuantize),
    "learned": lambda: coarse(_LearnableFakeQuantize, scale=0.1),
}


def fit_for_integers(how, **options):
    module, logger = ForIntegers(how), Kept()
    monitor = WeightNormMonitor(detail="parameter", include=("*.weight",))
    make_trainer(monitor, logger=logger, max_epochs=1, **options).fit(module, Batches())
    return logger.logged(), module


def assert_rounded_weights_are_logged(logged, used):
    for i, norms in used.items():
        found = logged[f"weight_norm/net.{i}.weight"]
        assert len(norms) == 7
        assert found == pytest.approx(dict(enumerate(norms)), rel=1e-6, abs=0)


@pytest.mark.filterwarnings("ignore:.*(quantization|reduce_range|torch.ao).*")
@pytest.mark.parametrize("how", QCONFIGS)
def test_weights_in_training_for_integers_are_measured_as_they_are_rounded(how):
    logged, module = fit_for_integers(how)
    assert_rounded_weights_are_logged(logged, module.used)
    stored = module.net[0].weight.double().norm().item()
    assert abs(stored - WeightNorm(include=("net.0.weight",))(module).item()) > 1e-5


def for_integers_on_two(rank, world_size, strategy):
    warnings.simplefilter("ignore")
    make = {"ddp": lambda: "ddp", "fsdp2": lambda: ModelParallelStrategy(world_size, 1, process_group_backend="gloo")}
    found = []
    for how in QCONFIGS if strategy == "fsdp2" else ["per channel"]:
        logged, module = fit_for_integers(how, devices=world_size, strategy=make[strategy]())
        found.append((logged, module.used))
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_weights_in_training_for_integers_are_measured_on_two_processes(strategy):
    first, _ = run_distributed(for_integers_on_two, strategy)
    for logged, used in first:
        assert_rounded_weights_are_logged(logged, used)


@pytest.mark.filterwarnings("ignore:.*(quantization|reduce_range|torch.ao).*")
@pytest.mark.parametrize(
    "callback", [WeightConstraint(MaxNorm(0.3)), Hyperball()], ids=["WeightConstraint", "Hyperball"]
)
def test_weights_in_training_for_integers_are_not_constrained(callback):
    with pytest.raises(MisconfigurationException, match=r"computed anew from 'net.[02].weight'"):
        make_trainer(callback, max_epochs=1).fit(ForIntegers("per tensor"), Batches())


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["linear", "convolution", "pruned", "by torchao's name", "before its first pass"])
def test_fake_quantized_weights_are_measured_as_they_are_used_and_not_constrained(name):
    torch.manual_seed(0)
    qconfig = quantization.get_default_qat_qconfig("x86")
    options = {"bias": False, "qconfig": qconfig}
    layer = qat.Conv2d(2, 3, 2, **options) if name == "convolution" else qat.Linear(4, 3, **options)
    if name == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    if name == "by torchao's name":
        layer.weight_fake_quantizer = layer.weight_fake_quant
        layer.forward = lambda x: nn.functional.linear(x, layer.weight_fake_quantizer(layer.weight))
        del layer.weight_fake_quant
    used = []
    quantizer = getattr(layer, "weight_fake_quant", None) or layer.weight_fake_quantizer
    quantizer.register_forward_hook(lambda *args: used.append(args[2].detach().double()))
    x = torch.randn(1, 2, 4, 4) if name == "convolution" else torch.randn(2, 4)
    if name != "before its first pass":
        layer(x)
        with torch.no_grad():  # what the observer saw is not what the weight is now
            layer.get_parameter("weight_orig" if name == "pruned" else "weight").mul_(0.5)
    state = {key: value.clone() for key, value in quantizer.state_dict().items()}
    norm = WeightNorm()
    norm.update(layer)
    assert all(torch.equal(value, state[key]) for key, value in quantizer.state_dict().items())
    if name != "before its first pass":
        quantizer.disable_observer()
    used.clear()
    layer(x)
    assert norm.compute().item() == pytest.approx(used[0].norm().item(), rel=1e-6, abs=0)
    stored = layer.get_parameter("weight_orig" if name == "pruned" else "weight")
    assert norm.compute().item() != pytest.approx(stored.double().norm().item(), rel=1e-6, abs=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(MisconfigurationException, match=r"WeightConstraint.*cannot hold for parametrized weights"):
        WeightConstraint(MaxNorm(0.1)).attach(optimizer, layer)
