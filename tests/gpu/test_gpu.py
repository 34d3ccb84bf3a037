"""Is it the same on a GPU, without a synchronization where nothing is logged, and at the speed of the memory?

Needs CUDA. Where a test asks for two devices it says so; all others do with one.
"""

import functools
import itertools

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    GroupLassoPenalty,
    L1Penalty,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
)
from lightning_regularize.norms import norms
from lightning_regularize.penalties import L1
from lightning_regularize.projections import Box, MaxNorm
from lightning_regularize.schedules import Cosine
from tests.training.matrix import Kept
from tests.training.support import QUIET

pytestmark = [
    *QUIET,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

STEPS = 6


class Network(L.LightningModule):
    """Large enough for tensor cores, small enough for a second."""

    def __init__(self, make_optimizer=functools.partial(torch.optim.AdamW, lr=1e-3), overflow=None):  # noqa: B008
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16))
        self.make_optimizer, self.overflow = make_optimizer, overflow

    def training_step(self, batch, batch_idx):
        loss = (self.layers(batch).float() - 1).square().mean()
        return loss * (float("inf") if batch_idx == self.overflow else 1.0)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Batches:
    """On the device already, so that moving them waits for nothing."""

    def __init__(self, device="cuda"):
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(8, 32, generator=generator).to(device) for _ in range(STEPS)]

    def __len__(self):
        return STEPS

    def __iter__(self):
        return iter(self.batches)


def trainer(*callbacks, accelerator="gpu", logger=False, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(
        accelerator=accelerator,
        callbacks=list(callbacks),
        logger=logger,
        **quiet,
        **{"devices": 1, "max_epochs": 1, "log_every_n_steps": 1, **options},
    )


def fit(*callbacks, module=None, accelerator="gpu", **options):
    module = Network() if module is None else module
    run = trainer(*callbacks, accelerator=accelerator, **options)
    run.fit(module, Batches("cuda" if accelerator == "gpu" else "cpu"))
    return {name: p.detach().double().cpu() for name, p in module.named_parameters()}


def everything():
    return [WeightDecay(Cosine(0.1, 0.9)), L1Penalty(1e-3)]


CALLBACKS = {
    "WeightDecay": lambda: WeightDecay(Cosine(0.1, 0.9)),
    **{
        method: functools.partial(WeightDecay, 0.1, method=method)
        for method in ("decoupled", "coupled", "independent", "cautious", "stable")
    },
    "L1Penalty": lambda: L1Penalty(1e-3),
    "L1Penalty proximal": lambda: L1Penalty(1e-3, method="proximal"),
    "GroupLassoPenalty": lambda: GroupLassoPenalty(1e-3),
    "MaxNorm": lambda: WeightConstraint(MaxNorm(0.5)),
    "Box": lambda: WeightConstraint(Box(-0.1, 0.1)),
    "AnchorDecay": lambda: AnchorDecay(1.0),
    "ConstrainedDecay": lambda: ConstrainedDecay("warm_start", warm_start_steps=2),
}
IMPLEMENTATIONS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "capturable": {"capturable": True}}


# Where the GPU's sums and products differ from the CPU's in their last bits, Adam makes up to a rate of it.
@pytest.mark.parametrize("callback", CALLBACKS)
def test_weights_are_those_of_the_cpu(callback):
    if callback == "ConstrainedDecay":
        both = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    else:
        both = functools.partial(torch.optim.AdamW, lr=1e-3)
    found = fit(CALLBACKS[callback](), module=Network(both))
    expected = fit(CALLBACKS[callback](), module=Network(both), accelerator="cpu")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_implementation_of_the_optimizer(options):
    found = fit(*everything(), module=Network(functools.partial(torch.optim.AdamW, lr=1e-3, **options)))
    expected = fit(*everything(), module=Network(functools.partial(torch.optim.AdamW, lr=1e-3, foreach=False)))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_fused_equals_unfused_in_mixed_precision(precision):
    """A fused optimizer unscales by itself: what is added to its gradients carries the scale as well."""
    fused, plain = (
        fit(*everything(), module=Network(functools.partial(torch.optim.SGD, lr=0.1, fused=fused)), precision=precision)
        for fused in (True, False)
    )
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.filterwarnings("ignore:AdamW decays weights by:UserWarning")
def test_nothing_moves_in_a_step_that_is_skipped(callback, fused):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]).clone())

    module = Network(functools.partial(torch.optim.AdamW, lr=1e-3, fused=fused), overflow=3)
    fit(CALLBACKS[callback](), Watch(), module=module, precision="16-mixed")
    assert torch.equal(seen[3], seen[2])
    assert not torch.equal(seen[4], seen[3])


def test_gradient_norms_of_a_fused_optimizer_carry_no_scale():
    found = []
    for fused in (False, True):
        logger = Kept()
        make = functools.partial(torch.optim.SGD, lr=1e-3, fused=fused)
        fit(WeightNormMonitor(quantities=("gradient",)), module=Network(make), precision="16-mixed", logger=logger)
        found.append(logger.values["gradient_norm/total"])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=0)


# -- nobody waits for the device -------------------------------------------------------------------------------------


class Strict(L.Callback):
    """An error where the host waits for the device, from the second batch to the last but one."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if 1 <= batch_idx < STEPS - 1 else "default")

    def on_train_end(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


QUIET_CALLBACKS = [name for name in CALLBACKS if name != "AnchorDecay"] + ["WeightNormMonitor"]


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("callback", QUIET_CALLBACKS)
@pytest.mark.filterwarnings("ignore:AdamW decays weights by:UserWarning")
def test_a_step_that_is_not_logged_does_not_wait(callback, options):
    monitor = functools.partial(WeightNormMonitor, quantities=("weight", "gradient", "update"))
    make = functools.partial(torch.optim.AdamW, lr=1e-3, **options)
    made = monitor() if callback == "WeightNormMonitor" else CALLBACKS[callback]()
    fit(Strict(), made, module=Network(make), logger=Kept(), log_every_n_steps=STEPS)


# -- sharded on one device -------------------------------------------------------------------------------------------


class Sharded(Network):
    def configure_model(self):
        for layer in self.layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def on_train_end(self):
        self.whole = {name: p.detach().full_tensor().double().cpu() for name, p in self.named_parameters()}


@pytest.fixture
def alone_in_a_group(monkeypatch):
    """This process is all of a process group."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_fsdp2_on_one_device_equals_no_sharding(alone_in_a_group):
    logger, sharded_logger, module = Kept(), Kept(), Sharded()
    expected = fit(*everything(), WeightNormMonitor(detail="parameter"), logger=logger)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    fit(*everything(), WeightNormMonitor(detail="parameter"), module=module, logger=sharded_logger, strategy=strategy)
    for name, weight in expected.items():
        torch.testing.assert_close(module.whole[name], weight, rtol=0, atol=1e-6)
    for key in (key for key in logger.values if key.startswith("weight_norm")):
        assert sharded_logger.values[key] == pytest.approx(logger.values[key], rel=1e-5, abs=0), key


# -- accuracy and speed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_equal_those_of_float64(dtype, norm_type):
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(size, generator=generator, device="cuda").to(dtype) for size in (1, 1000, 5_000_001, 38_597_376)
    ]
    expected = torch.stack([torch.linalg.vector_norm(t.double(), ord=norm_type) for t in tensors])
    torch.testing.assert_close(norms(tensors, norm_type), expected, rtol=1e-5, atol=0)


def seconds(function, rounds=20):
    """The median over rounds, by events on the device."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for _ in range(3):
        function()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[rounds // 2] / 1e3


def weights_of_1_5_billion():
    """48 blocks of a GPT-2 XL; 5.9 GB in float32."""
    d = 1600
    shapes = [(50257, d), *(48 * [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)])]
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free memory")
    return [torch.randn(shape, device="cuda") for shape in shapes]


def bytes_a_second_of_a_copy():
    """What a device-to-device copy reads; it writes as much."""
    source = torch.empty(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def test_norms_read_at_80_percent_of_the_memorys_bandwidth():
    weights = weights_of_1_5_billion()
    rate = sum(w.nbytes for w in weights) / seconds(lambda: norms(weights))
    share = rate / bytes_a_second_of_a_copy()
    print(f"norms: {share:.2f} of a copy's bandwidth")
    assert share >= 0.8


def test_the_gradient_of_l1_moves_60_percent_of_the_memorys_bandwidth():
    weights = weights_of_1_5_billion()
    gradients = [torch.zeros_like(w) for w in weights]

    def add():
        for gradient, weight in zip(gradients, weights, strict=True):
            L1().add_gradient_(gradient, weight, 1e-4)

    moved = 3 * sum(w.nbytes for w in weights)  # weight and gradient are read, the gradient is written
    share = moved / seconds(add) / bytes_a_second_of_a_copy()
    print(f"L1 gradient: {share:.2f} of a copy's bandwidth")
    assert share >= 0.6
