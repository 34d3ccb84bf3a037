"""Is ChainedOptimizer one optimizer for a Trainer and for all callbacks? Oracles are two optimizers stepped by hand."""

import functools
import math

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateMonitor
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Muon, lr_scheduler

from lightning_regularize import (
    AnchorDecay,
    ChainedOptimizer,
    ConstrainedDecay,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    RegularizationSummary,
    RegularizedModule,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
    hidden_matrices,
    theory,
)
from lightning_regularize.projections import FrobeniusBall, MaxNorm
from lightning_regularize.schedules import Linear
from tests.distributed import run_distributed
from tests.training.matrix import ExactMuon, Kept
from tests.training.support import (
    EXCLUDED,
    QUIET,
    Batches,
    Regression,
    SaveAfter,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    train,
    weights,
)

pytestmark = QUIET

STEPS = 21
DECAYS = [0.1 + (0.9 - 0.1) * (k / (STEPS - 1)) for k in range(STEPS)]
MUON = functools.partial(Muon, lr=0.02, weight_decay=0.1)
ADAMW = functools.partial(AdamW, lr=0.05, weight_decay=0.1)


def chain(module, first=MUON, rest=ADAMW):
    return ChainedOptimizer(module, {hidden_matrices: first, "*": rest})


class Chained(Regression):
    """``hidden.weight`` is Muon's, and the rest, with the output layer, AdamW's."""

    def __init__(self, first=MUON, rest=ADAMW, **options):
        super().__init__(**options)
        self.make_optimizer = lambda _: chain(self, first, rest)


def by_hand(module, first=MUON, rest=ADAMW):
    named = dict(module.named_parameters())
    decaying, others = [named["output.weight"]], [named[name] for name in EXCLUDED]
    return [first([named["hidden.weight"]]), rest([{"params": decaying}, {"params": others, "weight_decay": 0.0}])]


def train_by_hand(module, optimizers, make_scheduler=None, decays=DECAYS):
    schedulers = [] if make_scheduler is None else list(map(make_scheduler, optimizers))
    for k, decay in enumerate(decays):
        for optimizer in optimizers:
            optimizer.zero_grad()
            if decay is not None:
                optimizer.param_groups[0]["weight_decay"] = decay
        module.loss(Batches().batches[k % 7]).backward()
        for each in (*optimizers, *schedulers):
            each.step()
    return weights(module)


SCHEDULERS = {
    "none": None,
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=STEPS + 1
    ),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_weight_decay_is_bit_equal_to_groups_of_two_optimizers_by_hand_and_resumes(name, tmp_path):
    make = SCHEDULERS[name]
    twin = Regression()
    expected = train_by_hand(twin, by_hand(twin), make)
    module, resumed = Chained(make_scheduler=make), Chained(make_scheduler=make)
    train(module, WeightDecay(Linear(0.1, 0.9)), SaveAfter(tmp_path, 10))
    assert_identical_weights(weights(module), expected)
    train(resumed, WeightDecay(Linear(0.1, 0.9)), ckpt_path=tmp_path / "10.ckpt")
    assert_identical_weights(weights(resumed), expected)


def test_reduce_on_plateau_and_monitored_rates():
    def make(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5, factor=0.5)

    logger = Kept()
    train(
        Chained(make_scheduler=make, interval="epoch", monitor="train_loss"),
        LearningRateMonitor("epoch", log_weight_decay=True),
        logger=logger,
    )
    rates = [[*logger.values[f"lr-ChainedOptimizer/pg{i}"].values()] for i in (1, 2)]
    assert rates == [[lr, lr, lr / 2] for lr in (0.02, 0.05)]


CALLBACKS = {
    "L1Penalty": lambda: L1Penalty(Linear(0.1, 0.0), total_steps=STEPS),
    "GroupLassoPenalty": lambda: GroupLassoPenalty(0.05),
    "proximal": lambda: ElasticNetPenalty(0.02, 0.1, method="proximal", include=("output.*",)),
    "MaxNorm": lambda: WeightConstraint(MaxNorm(0.3)),
    "FrobeniusBall": lambda: WeightConstraint(FrobeniusBall(0.9, relative=True)),
    "AnchorDecay": lambda: AnchorDecay(0.5),
    "ConstrainedDecay": lambda: ConstrainedDecay("warm_start", warm_start_steps=2),
    **{
        method: functools.partial(WeightDecay, Linear(0.1, 0.9), method=method, total_steps=STEPS)
        for method in ("decoupled", "coupled", "independent", "cautious")
    },
}


@pytest.mark.filterwarnings("ignore:.*has no effect as long as no optimizer trains:UserWarning")
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks_act_as_on_each_optimizer_by_itself(make):
    factories = [functools.partial(each, weight_decay=0.0) for each in (MUON, ADAMW)]
    module, twin, without = Regression(), Regression(), Regression()
    optimizer, optimizers = chain(module, *factories), by_hand(twin, *factories)
    make().attach(optimizer, module)
    for each in optimizers:
        make().attach(each, twin)
    for side, made in ((module, [optimizer]), (twin, optimizers), (without, by_hand(without, *factories))):
        train_by_hand(side, made, decays=[None] * STEPS)
    assert_identical_weights(weights(module), weights(twin))
    assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), without.parameters(), strict=True))


def test_what_an_inner_optimizer_cannot_do_names_it():
    with pytest.raises(MisconfigurationException, match="not of Muon"):
        L1Penalty(0.1, method="proximal").attach(chain(module := Regression()), module)


def test_the_monitor_expects_what_theory_knows_of_each_inner_optimizer():
    logger, module = Kept(), Chained()
    monitor = WeightNormMonitor(detail="parameter", expected=True, include=("*.weight",))
    make_trainer(WeightDecay(0.5), monitor, logger=logger, max_epochs=1).fit(module, Batches())
    logged = {key.removeprefix("weight_norm/") for key in logger.values if key.startswith("weight_norm")}
    assert {"hidden.weight", "output.weight"} <= logged
    known = {
        "hidden.weight": math.sqrt(12) * theory.equilibrium_rms_muon(0.02, 0.5, (4, 3)),
        "output.weight": math.sqrt(8) * theory.equilibrium_rms_adamw(0.05, 0.5),
    }
    for name, norm in known.items():
        assert [*logger.values[f"weight_norm/{name}/expected"].values()][-1] == pytest.approx(norm, rel=1e-9, abs=0)


def test_the_summary_shows_which_optimizer_holds_what(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*callbacks):
        make_trainer(*callbacks, RegularizationSummary(), max_epochs=1).fit(Chained(), Batches())
        return [" ".join(line.split()) for line in capsys.readouterr().out.partition("Note")[0].splitlines()]

    rows = shown()
    assert rows.index("Muon pg1 1 tensor 12 0.1, lr 0.02") + 1 == rows.index("hidden.weight 4x3 12")
    assert "AdamW pg2 5 tensors 22 0.1, lr 0.05" in rows
    rows = shown(WeightDecay(0.2))
    assert rows.index("Muon pg1 decay 1 tensor 12 0.2, lr 0.02") + 1 == rows.index("hidden.weight 4x3 12")
    assert rows.index("AdamW pg2 decay 1 tensor 8 0.2, lr 0.05") + 1 == rows.index("output.weight 2x4 8")
    assert "AdamW pg2 no_decay 4 tensors 14 0, lr 0.05" in rows


class Finetuned(L.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.backbone, self.middle = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
            self.output = nn.Linear(4, 2)
        self.double()

    def training_step(self, batch, batch_idx):
        return (self.output(self.middle(self.backbone(batch[0]))) - batch[1]).square().mean()

    def configure_optimizers(self):
        return chain(self)


def test_layers_that_are_unfrozen_in_mid_run_go_to_the_optimizer_of_their_rule():
    module, start = Finetuned(), weights(Finetuned())
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, lambda_func=lambda _: 1.0)
    trainer = make_trainer(WeightDecay(0.2), finetuning, max_epochs=3)
    trainer.fit(module, Batches())
    muon, adamw = trainer.optimizers[0].optimizers
    assert [[tuple(p.shape) for p in group["params"]] for group in muon.param_groups] == [[(4, 4)], [(4, 3), (4, 4)]]
    assert [[tuple(p.shape) for p in group["params"]] for group in adamw.param_groups][1:] == [[(4,), (4,)]]
    assert all(not torch.equal(p, start[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("rest", [ADAMW, MUON], ids=["a new group", "a new optimizer"])
def test_a_run_with_unfrozen_layers_resumes(rest, tmp_path):
    """Lightning's callback sets the list `param_groups` before the state is loaded."""

    class Resumed(Finetuned):
        def on_train_start(self):
            if self.global_step:  # which Lightning 2.6's callback leaves frozen
                self.backbone.requires_grad_(requires_grad=True)

        def configure_optimizers(self):
            self.middle.requires_grad_(requires_grad=False)
            return ChainedOptimizer(self, {"bias": ADAMW, "backbone.*": MUON, "*": rest})

    def run(**options):
        finetuning = BackboneFinetuning(1, lambda_func=lambda _: 1.0, backbone_initial_lr=0.01)
        trainer = make_trainer(WeightDecay(Linear(0.1, 0.9)), finetuning, SaveAfter(tmp_path, 10), max_epochs=3)
        trainer.fit(module := Resumed(), Batches(), **options)
        return module, [[len(g["params"]) for g in each.param_groups] for each in trainer.optimizers[0].optimizers]

    whole, groups = run()
    resumed, resumed_groups = run(ckpt_path=tmp_path / "10.ckpt", weights_only=False)
    assert resumed_groups == groups
    assert_identical_weights(weights(whole), weights(resumed))


# --------------------------------------------------------------------------------------------------------------------
# RegularizedModule


class Regularized(RegularizedModule):
    def __init__(self, **options):
        super().__init__(**options)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.hidden, self.norm, self.output = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.double()

    loss, training_step = Regression.loss, Regression.training_step


@pytest.mark.parametrize("scheduler", [None, SCHEDULERS["OneCycleLR"]], ids=["", "scheduler"])
def test_a_regularized_module_with_several_optimizers(scheduler):
    twin = Regression()
    expected = train_by_hand(twin, by_hand(twin), scheduler, [0.3] * STEPS)
    rules = {"hidden_matrices": MUON, "*": ADAMW}
    module = Regularized(optimizers=rules, weight_decay=0.3, lr_scheduler=scheduler)
    train(module)
    assert_identical_weights(weights(module), expected)


class Deep(RegularizedModule):
    def __init__(self, **options):
        super().__init__(**options)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))


def test_layer_wise_rates_of_several_optimizers():
    module = Deep(optimizers={"hidden_matrices": MUON, "*": ADAMW}, layer_decay=0.5)
    optimizer = module.configure_optimizers()
    assert [type(each) for each in optimizer.optimizers] == [Muon, AdamW]
    rates = [(tuple(group["params"][0].shape), group["lr"]) for group in optimizer.param_groups]
    assert rates == [((3, 3), 0.005), ((3, 3), 0.01), ((3,), 0.0125), ((3,), 0.025), ((3, 3), 0.05)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": {"*": AdamW}}, TypeError, "For several, each for the parameters of a rule, use `optimizers`"),
        ({"optimizers": AdamW}, TypeError, "`optimizers` should map rules"),
        ({"optimizers": {"*": 0.1}}, TypeError, r"the value of '\*' should make an optimizer .* got float"),
        ({"optimizers": {"head": AdamW}}, ValueError, r"To match names write '\*head\*'"),
    ],
    ids=["mapping as optimizer", "no mapping", "a number", "a word"],
)
def test_wrong_optimizers_of_a_module(options, error, message):
    with pytest.raises(error, match=message):
        Regularized(**options)


def test_an_inner_optimizer_without_weight_decay_is_named():
    class Bare(SGD):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            del self.defaults["weight_decay"]

    module = Regularized(optimizers={"hidden_matrices": Bare, "*": ADAMW})
    with pytest.raises(ValueError, match="'hidden_matrices' cannot be made: Bare has no `weight_decay`"):
        module.configure_optimizers()


# --------------------------------------------------------------------------------------------------------------------
# Two processes


class Sharded(Chained):
    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.hidden, self.norm, self.output):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Halves(Batches):
    def __init__(self, rank):
        super().__init__()
        self.batches = [tuple(tensor.chunk(2)[rank] for tensor in batch) for batch in self.batches]


EXACT = functools.partial(ExactMuon, lr=0.02, weight_decay=0.1)
LAYOUTS = ("ddp", "sharded", "full")


def fit_spread(rank, world_size, layout, *callbacks, ckpt_path=None):
    module, strategy = Sharded(EXACT, make_scheduler=SCHEDULERS["OneCycleLR"]), "ddp"
    if layout != "ddp":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=layout == "sharded")
    trainer = make_trainer(WeightDecay(Linear(0.1, 0.9)), *callbacks, strategy=strategy, devices=2, max_epochs=1)
    trainer.fit(module, Halves(rank), ckpt_path=ckpt_path)
    named = module.named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy() for name, p in named}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one_and_resume(layout, tmp_path):
    module = Chained(EXACT, make_scheduler=SCHEDULERS["OneCycleLR"])
    train(module, WeightDecay(Linear(0.1, 0.9)), max_epochs=1)
    path = tmp_path / "3.ckpt"
    for callbacks, options in (([SaveAfter(tmp_path, 3)], {}), ([], {"ckpt_path": path})):
        for found in run_distributed(functools.partial(fit_spread, **options), layout, *callbacks):
            assert_same_weights({name: torch.tensor(p) for name, p in found.items()}, weights(module))


def fit_as_it_is(rank, world_size):
    module = Sharded()
    trainer = make_trainer(strategy=ModelParallelStrategy(2, 1), devices=2, max_epochs=1)
    trainer.fit(module, Halves(rank))
    return module.hidden.weight.full_tensor().detach().numpy()


def test_muon_in_bfloat16_under_fsdp2_differs_by_rounding_only():
    train(module := Chained(), max_epochs=1)
    for found in run_distributed(fit_as_it_is):
        # 7 steps of at most 0.02 * 1.2, each with a relative error of about 2 ** -7
        torch.testing.assert_close(torch.tensor(found), module.hidden.weight.detach(), rtol=0, atol=7 * 0.024 * 2**-6)
