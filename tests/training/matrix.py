"""What runs where: every feature (a row) under every way to spread a training (a column), and what is to be seen.

``TABLE`` is the one place that says what each cell does. The tests go through it, and ``docs/strategies.md`` shows it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import warnings
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from lightning_regularize import (
    ActivationPenalty,
    AnchorDecay,
    ConstrainedDecay,
    DropoutSchedule,
    ElasticNetPenalty,
    GroupLassoPenalty,
    Hyperball,
    L1Penalty,
    L2Penalty,
    RegularizationSummary,
    RegularizedModule,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
    WeightPenalty,
    hidden_matrices,
    regularize,
)
from lightning_regularize.penalties import NuclearNorm, Orthogonal, Penalty, Spectral
from lightning_regularize.projections import NM, Box, FrobeniusBall, MaxNorm, Rank, SpectralBall, TopShare
from lightning_regularize.quantities import QUANTITIES
from lightning_regularize.schedules import Cosine, CubicRamp, Linear
from tests.strategies import CPUDeepSpeedStrategy, CPUFSDPStrategy
from tests.training.support import double_well, make_trainer, zero_mean

if TYPE_CHECKING:
    from collections.abc import Callable


class Frobenius(Penalty):
    """The norm of a whole weight, by someone who knows nothing of DTensors."""

    def value(self, weight, strength=1.0, *, dim=None):
        return strength * weight.detach().norm().double()

    def add_gradient_(self, gradient, weight, strength, *, dim=None):
        gradient.add_(weight.detach() / weight.detach().norm() * strength)

    def proximal_(self, weight, threshold, *, dim=None):
        weight.mul_((1 - threshold / weight.norm()).clamp_min(0))


STEPS = 4  # 2 epochs of 2
TOTAL = 4  # samples of a batch, over all processes


# -- the training ----------------------------------------------------------------------------------------------------


class Fading(nn.Module):
    """Stands for dropout, without its noise, which no two processes share."""

    drop_prob = 0.0

    def forward(self, x):
        return x * (1 - self.drop_prob)


class Training:
    """A small regression, with an odd number of rows in one layer and a parameter of a single element."""

    def build(self, column, dtype=torch.float64):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.embed, self.norm = nn.Linear(3, 5), nn.LayerNorm(5)
            self.hidden, self.output = nn.Linear(5, 4), nn.Linear(4, 2)
        self.scale, self.fading = nn.Parameter(torch.ones(1)), Fading()
        self.to(dtype)
        self.column = column
        return self

    def configure_model(self):
        if self.column.spread is not None and not getattr(self, "is_spread", False):
            self.is_spread = True
            self.column.spread(self)

    def forward(self, x):
        x = torch.tanh(self.norm(self.embed(x)))
        return self.output(torch.tanh(self.hidden(self.fading(x)))) * self.scale

    def training_step(self, batch, batch_idx):
        x, y = batch
        error = (self(x) - y).square().sum()
        if hasattr(self.trainer.strategy, "deepspeed_engine"):
            error *= self.trainer.accumulate_grad_batches  # by which Lightning divides the loss, and then DeepSpeed too
        return error * self.column.data_parallel / (TOTAL * y.shape[1])  # the mean over all processes

    def validation_step(self, batch, batch_idx):
        """Under FSDP2 a root keeps whole parameters after a forward pass that no backward pass follows."""
        self(batch[0])


class Network(Training, L.LightningModule):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Attention(nn.Module):
    """Four heads of two, of which two share a key and a value; each input is a token."""

    num_heads = 4

    def __init__(self):
        super().__init__()
        # Without biases: that of the keys has no gradient but roundings, of which Adam makes steps.
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(3, size, bias=False) for size in (8, 4, 4))
        self.out_proj = nn.Linear(8, 3)

    def forward(self, x):
        tokens = x[:, :, None] * torch.tensor([1.0, -0.5, 0.25], dtype=x.dtype)
        # Under tensor parallelism these are the heads of one rank.
        q, k, v = (
            each.unflatten(-1, (-1, 2)).transpose(1, 2)
            for each in (self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens))
        )
        heads = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.out_proj(heads.transpose(1, 2).flatten(2)).mean(dim=2)


class Attending(Network):
    """The network, with attention before it."""

    def build(self, column, dtype=torch.float64):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(1)
            self.attention = Attention()
        return super().build(column, dtype)

    def forward(self, x):
        return super().forward(self.attention(x))


class NetworkWithSGD(Training, L.LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class RegularizedNetwork(Training, RegularizedModule):
    pass


class Share:
    """The batches of one process: every ``count``-th sample of all, from ``index`` on."""

    def __init__(self, index=0, count=1, dtype=torch.float64, batches=STEPS // 2):
        generator = torch.Generator().manual_seed(1)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        pairs = [(draw(TOTAL, 3), draw(TOTAL, 2)) for _ in range(batches)]
        self.batches = [(x[index::count].to(dtype), y[index::count].to(dtype)) for x, y in pairs]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class KeepsValues:
    """What a logger of either package does to keep all that was logged, in memory: key -> step -> value."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_hyperparams(self, params):
        """Nothing to keep."""

    def log_metrics(self, metrics, step):
        for key, value in metrics.items():
            self.values.setdefault(key, {})[step] = float(value)


class Kept(KeepsValues, Logger):
    """All that was logged, in memory."""


class Weights(L.Callback):
    """The whole weights at the end of training, while the strategy still holds them together."""

    def on_train_end(self, trainer, pl_module):
        self.found = whole_weights(trainer)


def whole_weights(trainer):
    """By canonical name, as float64 arrays, which travel between processes; every process should take part."""
    model = trainer.strategy.model
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {clean_tensor_name(name): array(p) for name, p in model.named_parameters()}
    return {name: array(whole(p)) for name, p in trainer.lightning_module.named_parameters()}


def whole(parameter):
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def array(tensor):
    return tensor.detach().double().numpy().copy()


class Outcome(NamedTuple):
    """What came out of a training in one process; of one that raised, only the error."""

    weights: dict | None = None
    logged: dict | None = None
    printed: str = ""
    error: str = ""
    warned: tuple = ()


def fit(rank, world_size, row, column, dtype, accumulate=1):
    """Train ``row`` under ``column`` as one of its processes."""
    row, column = ROWS[row], COLUMNS[column]
    module = row.module().build(column, dtype)
    logger, weights, printed = Kept(), Weights(), io.StringIO()
    data = Share(rank // column.tensor_parallel, column.data_parallel, dtype, STEPS // 2 * accumulate)
    trainer = make_trainer(
        *row.callbacks(),
        weights,
        logger=logger,
        max_epochs=2,
        devices=world_size,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1,  # a forward pass without a backward pass is what it is for
        **column.options(),
    )
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # each training of a process shall warn anew
        try:
            trainer.fit(row.wrap(module), data, data)
        except MisconfigurationException as error:
            return Outcome(error=str(error))
    return Outcome(weights.found, logger.values, printed.getvalue(), warned=tuple(str(w.message) for w in warned))


def fit_all(rank, world_size, rows, column, progress, accumulate=1):
    """Train all ``rows`` one after the other; ``progress`` is the path of a file that tells of a hang."""
    outcomes = {}
    for row in rows:
        with open(f"{progress}.{rank}", "w") as file:
            file.write(row)
        outcomes[row] = fit(rank, world_size, row, column, COLUMNS[column].dtype, accumulate)
    return outcomes


# -- columns ---------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A way to spread a training.

    ``options`` are for the Trainer, made in the process that uses them; ``spread`` is what ``configure_model`` does.
    """

    title: str
    options: Callable[[], dict] = dict
    data_parallel: int = 1
    tensor_parallel: int = 1
    spread: Callable[[Training], None] | None = None
    dtype: torch.dtype = torch.float64

    @property
    def processes(self):
        return self.data_parallel * self.tensor_parallel


def fsdp1(**options):
    return {"strategy": CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, **options)}


def model_parallel(data, tensor=1):
    return {"strategy": ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)}


def deepspeed(stage):
    return {"strategy": CPUDeepSpeedStrategy(stage=stage, logging_batch_size_per_gpu=2)}


def shard(module, mesh=None):
    mesh = module.device_mesh["data_parallel"] if mesh is None else mesh
    for layer in (module.hidden, module.output, module):  # some in units of their own, the others in that of the root
        fully_shard(layer, mesh=mesh)


def shard_and_replicate(module):
    shard(module, dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def cut(module):
    plan = {
        "embed": ColwiseParallel(output_layouts=Shard(0), use_local_output=False),
        "norm": SequenceParallel(sequence_dim=0),
        "hidden": ColwiseParallel(input_layouts=Shard(0)),
        "output": RowwiseParallel(),
        **{f"attention.{name}_proj": ColwiseParallel() for name in "qkv"},
        "attention.out_proj": RowwiseParallel(),
    }
    plan = {name: style for name, style in plan.items() if name in dict(module.named_modules())}
    parallelize_module(module, module.device_mesh["tensor_parallel"], plan)


def cut_and_shard(module):
    cut(module)
    shard(module)


COLUMNS = {
    "single": Column("one process"),
    "ddp": Column("DDP", lambda: {"strategy": "ddp"}, data_parallel=2),
    "ddp uneven": Column("DDP, 3 processes with uneven batches", lambda: {"strategy": "ddp"}, data_parallel=3),
    "fsdp2": Column("FSDP2", lambda: model_parallel(2), data_parallel=2, spread=shard),
    "tensor": Column("tensor parallel", lambda: model_parallel(1, 2), tensor_parallel=2, spread=cut),
    "fsdp2 x tensor": Column(
        "FSDP2 x tensor parallel", lambda: model_parallel(2, 2), 2, tensor_parallel=2, spread=cut_and_shard
    ),
    "hsdp": Column("HSDP", lambda: model_parallel(4), data_parallel=4, spread=shard_and_replicate),
    # Lightning's FSDP1 and DeepSpeed know no float64.
    "fsdp1": Column("FSDP1", fsdp1, data_parallel=2, dtype=torch.float32),
    "fsdp1 flat": Column(
        "FSDP1, `use_orig_params=False`", lambda: fsdp1(use_orig_params=False), data_parallel=2, dtype=torch.float32
    ),
    **{
        f"deepspeed {i}": Column(
            f"DeepSpeed stage {i}", functools.partial(deepspeed, i), data_parallel=2, dtype=torch.float32
        )
        for i in range(4)
    },
}


# -- rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    title: str
    callbacks: Callable[[], list]
    module: Callable[[], Training] = Network
    wrap: Callable[[Training], Training] = lambda module: module


def decay(method):
    # Norms decay too: under tensor parallelism their gradients come as summands on each rank.
    return lambda: [WeightDecay(Cosine(0.1, 0.9), exclude=("bias",), factors={"output.*": 0.5}, method=method)]


def regularized_module():
    make = functools.partial(torch.optim.AdamW, lr=0.05)
    return RegularizedNetwork(optimizer=make, weight_decay=0.5, factors={"output.*": 0.5})


class ExactMuon(torch.optim.Muon):
    """Muon orthogonalizes in bfloat16, where pieces of a weight round otherwise than the whole; here in float64."""

    def step(self, closure=None):
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):
            return super().step(closure)


def chained(make):
    first, rest = functools.partial(make, lr=0.02), functools.partial(torch.optim.AdamW, lr=0.05)
    return lambda: RegularizedNetwork(optimizers={hidden_matrices: first, "*": rest}, weight_decay=0.5)


def regularized(module):
    return regularize(module, 0.5, factors={"output.*": 0.5})


def monitor(**options):
    return lambda: [WeightDecay(Linear(0.1, 0.9)), WeightNormMonitor(detail="parameter", **options)]


SHARDED = tuple(quantity for quantity in QUANTITIES if quantity not in ("stable_rank", "spectral_norm", "distance"))
IMPORTANCE = {"embed.weight": torch.linspace(0, 1, 15).view(5, 3), "hidden.weight": torch.linspace(1, 0, 20).view(4, 5)}

ROWS = {
    "WeightDecay": Row("`WeightDecay` with a schedule, exclusion and factors", decay("optimizer")),
    "WeightDecay by rules": Row(
        "`WeightDecay` with a schedule for each rule",
        lambda: [WeightDecay({"output.*": 0.5, "*": Cosine(0.1, 0.9)}, exclude=("bias",))],
    ),
    "WeightDecay on all": Row("`WeightDecay(exclude=())`", lambda: [WeightDecay(Cosine(0.1, 0.9), exclude=())]),
    **{
        method: Row(f'`WeightDecay(method="{method}")`', decay(method))
        for method in ("decoupled", "coupled", "independent", "cautious", "stable")
    },
    "L1Penalty": Row("`L1Penalty`", lambda: [L1Penalty(Linear(0.1, 0.0), exclude=("bias",))]),
    "L1Penalty proximal": Row('`L1Penalty(method="proximal")`', lambda: [L1Penalty(0.02, method="proximal")]),
    "L2Penalty": Row("`L2Penalty`", lambda: [L2Penalty(0.1)]),
    "ElasticNetPenalty": Row(
        '`ElasticNetPenalty(method="proximal")`', lambda: [ElasticNetPenalty(0.02, 0.1, method="proximal")]
    ),
    "GroupLassoPenalty": Row("`GroupLassoPenalty`", lambda: [GroupLassoPenalty(0.1)]),
    "GroupLassoPenalty proximal": Row(
        '`GroupLassoPenalty(method="proximal")`', lambda: [GroupLassoPenalty(0.02, method="proximal")], NetworkWithSGD
    ),
    "inputs": Row('`GroupLassoPenalty(group="input")`', lambda: [GroupLassoPenalty(0.1, group="input")]),
    "blocks": Row(
        '`GroupLassoPenalty(group="block", method="proximal")`',
        lambda: [
            GroupLassoPenalty(0.5, group="block", block_size=2, include=("output.weight",), method="proximal"),
        ],
    ),
    "heads": Row('`GroupLassoPenalty(group="head")`', lambda: [GroupLassoPenalty(0.1, group="head")], Attending),
    "heads proximal": Row(
        '`GroupLassoPenalty(group="head", method="proximal")`',
        lambda: [GroupLassoPenalty(0.5, group="head", method="proximal")],
        Attending,
    ),
    "WeightPenalty of a function": Row("`WeightPenalty` of a function", lambda: [WeightPenalty(double_well, 0.1)]),
    "WeightPenalty orthogonal": Row("`WeightPenalty(Orthogonal())`", lambda: [WeightPenalty(Orthogonal(), 0.1)]),
    "WeightPenalty spectral": Row("`WeightPenalty(Spectral())`", lambda: [WeightPenalty(Spectral(0.5), 0.1)]),
    "NuclearNorm": Row("`WeightPenalty(NuclearNorm())`", lambda: [WeightPenalty(NuclearNorm(), 0.1)]),
    "NuclearNorm proximal": Row(
        '`WeightPenalty(NuclearNorm(), method="proximal")`',
        lambda: [WeightPenalty(NuclearNorm(), 0.05, method="proximal")],
        NetworkWithSGD,
    ),
    "WeightPenalty of one's own": Row(
        '`WeightPenalty(method="proximal")` of a `Penalty` of one\'s own',
        lambda: [WeightPenalty(Frobenius(), 0.5, method="proximal")],
        NetworkWithSGD,
    ),
    "ActivationPenalty": Row(
        "`ActivationPenalty`", lambda: [ActivationPenalty(Linear(0.1, 0.0), include=("hidden", "output"))]
    ),
    "MaxNorm": Row("`WeightConstraint(MaxNorm)`", lambda: [WeightConstraint(MaxNorm(0.6))]),
    "FrobeniusBall": Row(
        "`WeightConstraint(FrobeniusBall)`, relative", lambda: [WeightConstraint(FrobeniusBall(0.9, relative=True))]
    ),
    "SpectralBall": Row("`WeightConstraint(SpectralBall)`", lambda: [WeightConstraint(SpectralBall(0.7))]),
    "NM": Row("`WeightConstraint(NM)`", lambda: [WeightConstraint(NM(2, 4), include=("output.weight",))]),
    "TopShare": Row(
        "`WeightConstraint(TopShare)` with a schedule and frozen zeros",
        lambda: [WeightConstraint(TopShare(CubicRamp(1.0, 0.5, until=2)), freeze_zeros=3)],
    ),
    "TopShare of all": Row(
        '`WeightConstraint(TopShare(scope="all"))`', lambda: [WeightConstraint(TopShare(Linear(1.0, 0.4), "all"))]
    ),
    "Rank": Row("`WeightConstraint(Rank, every_n_steps=2)`", lambda: [WeightConstraint(Rank(1), every_n_steps=2)]),
    "WeightConstraint of a function": Row(
        "`WeightConstraint` of a function", lambda: [WeightConstraint(zero_mean, include=("hidden.*", "output.*"))]
    ),
    "Box": Row("`WeightConstraint(Box)`", lambda: [WeightConstraint(Box(-0.3, 0.3))]),
    "AnchorDecay": Row("`AnchorDecay`", lambda: [AnchorDecay(Linear(1.0, 0.1), exclude=("output.*",))]),
    "AnchorDecay importance": Row("`AnchorDecay(importance=...)`", lambda: [AnchorDecay(1.0, importance=IMPORTANCE)]),
    "AnchorDecay selective": Row(
        '`AnchorDecay(method="selective")`', lambda: [AnchorDecay(0.5, method="selective", exclude=("output.*",))]
    ),
    "ConstrainedDecay": Row(
        "`ConstrainedDecay`", lambda: [WeightDecay(0.0), ConstrainedDecay("warm_start", warm_start_steps=2)]
    ),
    "Hyperball": Row("`Hyperball`", lambda: [WeightDecay(0.0), Hyperball()]),
    "DropoutSchedule": Row("`DropoutSchedule`", lambda: [DropoutSchedule(Linear(0.5, 0.0))]),
    "WeightNormMonitor": Row(
        "`WeightNormMonitor`, all but `stable_rank`, `spectral_norm`, `distance`",
        monitor(quantities=SHARDED, threshold=0.1),
    ),
    "WeightNormMonitor inf": Row(
        "`WeightNormMonitor(norm_type=math.inf)`",
        monitor(quantities=("weight", "gradient", "update"), norm_type=torch.inf),
    ),
    "stable_rank": Row('`WeightNormMonitor(quantities=["stable_rank"])`', monitor(quantities=("stable_rank",))),
    "distance": Row('`WeightNormMonitor(quantities=["distance"])`', monitor(quantities=("distance",))),
    "RegularizationSummary": Row(
        "`RegularizationSummary`", lambda: [WeightDecay(Cosine(0.1, 0.9)), RegularizationSummary()]
    ),
    "RegularizedModule": Row("`RegularizedModule`", list, regularized_module),
    "ChainedOptimizer": Row("`ChainedOptimizer` of SGD and AdamW", decay("optimizer"), chained(torch.optim.SGD)),
    "Muon": Row("`ChainedOptimizer` of Muon and AdamW", decay("optimizer"), chained(ExactMuon)),
    "regularize": Row("`regularize()`", list, wrap=regularized),
}


# -- the table -------------------------------------------------------------------------------------------------------

EQUAL = "equal"  # weights and all that is logged and printed are those of one process


def refused(message):
    """Training does not begin: a MisconfigurationException says so before any weight changes."""
    return f"refused: {message}"


def left_out(message):
    """Weights are equal, nothing is logged, and a warning says so."""
    return f"left out: {message}"


def averaged(message):
    """Weights are the same in all processes, and not those of one process."""
    return f"averaged: {message}"


FLAT = refused("use FSDPStrategy(use_orig_params=True)")
CUT = refused("FSDP1 cuts weights anywhere: use ModelParallelStrategy with fully_shard (FSDP2)")
ZERO_WEIGHTS = refused("overwrites them with its own at the next step: use DDP, FSDP2 (ModelParallelStrategy), or ZeRO")
ZERO_GRADIENTS = refused("keeps to itself: use DDP, FSDP2 (ModelParallelStrategy), or ZeRO stage 0")

SCALED = refused("DeepSpeed multiplies it by itself: use another strategy")
WHOLE = refused("tensor parallelism cuts some of them: use FSDP2 alone")

WHOLE_NEEDED = "FSDP1 and ZeRO-3 cut them anywhere: use ModelParallelStrategy with fully_shard (FSDP2)"
OWN_GRADIENTS = ("WeightPenalty of a function", "WeightPenalty orthogonal", "WeightPenalty spectral", "NuclearNorm")
WHOLE_WEIGHTS = ("TopShare", "TopShare of all", "Rank", "WeightConstraint of a function")

FSDP1 = {
    **dict.fromkeys(("GroupLassoPenalty", "GroupLassoPenalty proximal"), CUT),
    **dict.fromkeys(("inputs", "blocks", "heads", "heads proximal"), CUT),
    **dict.fromkeys((*OWN_GRADIENTS, "NuclearNorm proximal", "WeightPenalty of one's own"), CUT),
    **dict.fromkeys(("MaxNorm", "FrobeniusBall", "SpectralBall", "NM", *WHOLE_WEIGHTS), CUT),
    **dict.fromkeys(
        ("AnchorDecay", "AnchorDecay importance", "AnchorDecay selective", "Hyperball", "distance"),
        refused(WHOLE_NEEDED),
    ),
    "stable_rank": left_out("no stable rank of what FSDP1 or ZeRO-3 has cut"),
    "Muon": refused("Muon only supports 2D parameters"),
}
ZERO = {
    **dict.fromkeys(("coupled", "L1Penalty", "L2Penalty", "GroupLassoPenalty", *OWN_GRADIENTS), ZERO_GRADIENTS),
    **dict.fromkeys(("inputs", "heads"), ZERO_GRADIENTS),
    **dict.fromkeys(("decoupled", "independent", "cautious", "stable"), ZERO_WEIGHTS),
    **dict.fromkeys(("L1Penalty proximal", "ElasticNetPenalty", "GroupLassoPenalty proximal"), ZERO_WEIGHTS),
    **dict.fromkeys(("blocks", "heads proximal", "NuclearNorm proximal", "WeightPenalty of one's own"), ZERO_WEIGHTS),
    **dict.fromkeys(("MaxNorm", "FrobeniusBall", "SpectralBall", "NM", *WHOLE_WEIGHTS, "Box"), ZERO_WEIGHTS),
    **dict.fromkeys(("AnchorDecay", "AnchorDecay importance", "AnchorDecay selective"), ZERO_WEIGHTS),
    **dict.fromkeys(("ConstrainedDecay", "Hyperball"), ZERO_WEIGHTS),
    **dict.fromkeys(("ChainedOptimizer", "Muon"), refused("and not several optimizers in one: use DDP or FSDP2")),
    "ActivationPenalty": SCALED,
}
EXCEPTIONS = {
    "fsdp1": FSDP1,
    "fsdp1 flat": {row: FLAT for row in ROWS if row not in ("DropoutSchedule", "ActivationPenalty")},
    "ddp uneven": {"ActivationPenalty": averaged("each process takes the mean over its own samples")},
    "tensor": {"ActivationPenalty": WHOLE},
    "fsdp2 x tensor": {"ActivationPenalty": WHOLE},
    "deepspeed 0": {"ActivationPenalty": SCALED},
    "deepspeed 1": ZERO,
    "deepspeed 2": ZERO,
    "deepspeed 3": ZERO
    | {"stable_rank": left_out("no stable rank of what FSDP1 or ZeRO-3 has cut"), "distance": refused(WHOLE_NEEDED)},
}
TABLE = {row: {column: EXCEPTIONS.get(column, {}).get(row, EQUAL) for column in COLUMNS} for row in ROWS}


def as_markdown():
    """The table of ``docs/strategies.md``; write it there by ``python -m tests.training.matrix``."""
    notes = {}
    lines = ["| | " + " | ".join(column.title for column in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, cells in TABLE.items():
        marks = [_mark(cell, notes) for cell in cells.values()]
        lines.append(f"| {ROWS[row].title} | " + " | ".join(marks) + " |")
    explained = [f"{number}. {says}" for says, number in notes.items()]
    return "\n".join([*lines, "", *explained]) + "\n"


def _mark(cell, notes):
    if cell == EQUAL:
        return "="
    kind, _, message = cell.partition(": ")
    text = MARKS[kind][1].format(message)
    return f"{MARKS[kind][0]} {notes.setdefault(text, len(notes) + 1)}"


MARKS = {
    "refused": ("no", 'Refused before training begins: "... {} ..."'),
    "left out": ("(=)", 'Left out, with a warning: "... {} ..."'),
    "averaged": ("mean", "As the loss plus the penalty: {}, and gradients are the mean over processes."),
}


def write_page(path):
    """Put the table between the two marks of a page."""
    before, _, after = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + "\n" + as_markdown() + END + after.partition(END)[2])


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "strategies.md"
BEGIN, END = "<!-- made by tests/training/matrix.py -->", "<!-- end -->"


def assert_cell(row, column, outcomes, alone, atol=None):
    """``outcomes`` of all processes, against the one of a process ``alone``, are what the table says."""
    says, _, message = TABLE[row][column].partition(": ")
    if says == "refused":
        assert all(message in outcome.error for outcome in outcomes), outcomes[0].error or "it trained"
        return
    if says == "averaged":
        first, *others = outcomes
        assert not first.error
        assert all((w == other.weights[name]).all() for other in others for name, w in first.weights.items())
        assert any(abs(w - alone.weights[name]).max() > 1e-6 for name, w in first.weights.items())
        return
    exact = COLUMNS[column].dtype == torch.float64
    atol = atol or (1e-12 if exact else 1e-6)
    for outcome in outcomes:
        assert not outcome.error
        assert outcome.weights.keys() == alone.weights.keys()
        for name, weight in alone.weights.items():
            assert outcome.weights[name] == pytest.approx(weight, rel=0, abs=atol), name
    first, *others = outcomes
    if says == "left out":
        assert any(message in warning for warning in first.warned), first.warned
        return
    rel, small = (1e-11, 1e-13) if exact else (10 * max(atol, 1e-6),) * 2
    assert first.logged.keys() == alone.logged.keys()
    for key, steps in alone.logged.items():
        assert first.logged[key] == pytest.approx(steps, rel=rel, abs=small, nan_ok=True), key
    is_equal = str.__contains__ if column.startswith("deepspeed") else str.__eq__  # which has something to say as well
    assert is_equal(first.printed, alone.printed)
    assert not any(alone.printed and alone.printed in other.printed for other in others)


if __name__ == "__main__":
    write_page(PAGE)
