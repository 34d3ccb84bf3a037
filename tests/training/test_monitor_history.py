"""What WeightNormMonitor compares with the past: the distance from the start of training, and spike scores."""

import copy
import math

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_regularize import WeightNormMonitor
from lightning_regularize.norms import distance_sums
from lightning_regularize.spikes import SpikeScores, spike_score
from tests.distributed import run_distributed
from tests.models import randn
from tests.training.support import QUIET, Batches, Regression, SaveAfter, make_trainer
from tests.training.test_norm_monitor import Kept, MLFlowLogger, Spread, TwoOptimizers, _strategy, fit

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Found unsupported keys in the lr scheduler:UserWarning"),
]

DISTANCE = ("distance",)


def distances(**options):
    return WeightNormMonitor(quantities=DISTANCE, detail="parameter", **options)


class Weights(L.Callback):
    """The weights of each step, as it finds them."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})


class At(L.Callback):
    """Does something when a batch begins."""

    def __init__(self, batch, act):
        self.batch, self.act = batch, act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            self.act(trainer, pl_module)


# -- distance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_the_distance_is_that_from_the_first_weights(norm_type):
    logged = fit(distances(norm_type=norm_type), weights := Weights()).logged()
    for step, now in enumerate(weights.seen):
        moved = {name: (now[name] - weights.seen[0][name]).flatten() for name in now}
        moved["total"] = torch.cat(list(moved.values()))
        for name, change in moved.items():
            expected = torch.linalg.vector_norm(change, norm_type).item()
            assert logged[f"distance/{name}"][step] == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_start_in_bfloat16_is_off_by_its_rounding_only():
    logged = fit(distances(start_in_bfloat16=True), weights := Weights()).logged()
    first, last = weights.seen[0]["hidden.weight"], weights.seen[-1]["hidden.weight"]
    expected = (last - first.bfloat16().double()).norm().item()
    assert logged["distance/hidden.weight"][2] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_pairs_of_any_layout_and_dtype_are_compared(dtype):
    tensors = [
        randn(70, 300).to(dtype),
        randn(40, 30).to(dtype).T,
        randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last),
        torch.zeros(0, dtype=dtype),
        randn(5),
        randn(6, 7).to(dtype).to_sparse(),
        torch.ones((), dtype=dtype),
    ]
    dense = [tensor.to_dense() for tensor in tensors]
    others = [randn(*tensor.shape, 1, seed=1).to(tensor.dtype).view(tensor.shape) for tensor in dense]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = [(x.to(wide) - y.to(wide)).abs().square().sum().item() for x, y in zip(dense, others, strict=True)]
    assert distance_sums(tensors, others, 2.0).tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_what_is_unfrozen_is_measured_from_there_also_between_steps_that_are_logged():
    module = Regression()
    module.hidden.requires_grad_(False)
    unfreeze = At(1, lambda trainer, module: module.hidden.requires_grad_(True))
    logged = fit(distances(every_n_steps=3), unfreeze, weights := Weights(), module=module, steps=6).logged()
    moved = (weights.seen[5]["hidden.weight"] - weights.seen[1]["hidden.weight"]).norm().item()
    assert logged["distance/hidden.weight"][5] == pytest.approx(moved, rel=1e-12, abs=0)
    assert moved > 0


def test_a_weight_that_replaces_another_begins_anew():
    def replace(trainer, module):
        module.hidden.weight = nn.Parameter(2 * module.hidden.weight.detach())
        trainer.optimizers[0].param_groups[0]["params"] = list(module.parameters())

    logged = fit(distances(), At(2, replace), steps=4).logged()["distance/hidden.weight"]
    assert logged[1] > 0
    assert logged[2] == 0
    assert 0 < logged[3] < 2 * logged[1]


def test_the_distance_is_that_of_the_weight_that_a_layer_uses():
    module = Regression()
    prune.l1_unstructured(module.hidden, "weight", 0.5)
    before = module.hidden.weight.detach().clone()
    logged = fit(distances(), weights := Weights(), module=module).logged()
    now = weights.seen[-1]["hidden.weight_orig"] * module.hidden.weight_mask
    assert logged["distance/hidden.weight"][2] == pytest.approx((now - before).norm().item(), rel=1e-12, abs=0)


def test_each_optimizer_has_a_distance_of_its_own():
    logged = fit(distances(), module=TwoOptimizers(), steps=4).logged()
    totals = [logged[f"distance/optimizer{i} total"] for i in range(2)]
    assert all(max(values.values()) > 0 for values in totals)


def test_a_lazy_weight_is_measured_from_its_first_step():
    module = Regression()
    module.output = nn.LazyLinear(1, dtype=torch.float64)
    logged = fit(distances(), weights := Weights(), module=module).logged()["distance/output.weight"]
    moved = (weights.seen[2]["output.weight"] - weights.seen[0]["output.weight"]).norm().item()
    assert logged[0] == 0
    assert logged[2] == pytest.approx(moved, rel=1e-12, abs=0)


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_a_resumed_run_logs_the_same_distances_and_scores(in_bfloat16, tmp_path):
    def monitor():
        return WeightNormMonitor(
            quantities=("distance", "gradient"), spike_score=True, start_in_bfloat16=in_bfloat16, detail="parameter"
        )

    whole = fit(monitor(), steps=7, max_epochs=4).logged()
    trainer = make_trainer(monitor(), logger=Kept(), max_epochs=3)
    trainer.fit(Regression(), Batches())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(monitor(), logger=(kept := Kept()), max_epochs=4).fit(
        Regression(), Batches(), ckpt_path=tmp_path / "half.ckpt"
    )
    resumed = {key: steps for key, steps in kept.logged().items() if "/" in key}
    assert resumed == {key: {s: v for s, v in whole[key].items() if s >= 21} for key in resumed}
    assert {"distance/total", "gradient_norm/total/spike_score"} <= resumed.keys()


@pytest.mark.filterwarnings("ignore:WeightNormMonitor differs from the checkpoint")
def test_a_checkpoint_without_the_start_is_warned_of(tmp_path):
    trainer = make_trainer(WeightNormMonitor(quantities=("weight",)), logger=Kept(), max_epochs=1)
    trainer.fit(Regression(), Batches())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match=r"finds no start of 6 weights such as 'hidden.weight' in the checkpoint"):
        make_trainer(WeightNormMonitor(quantities=DISTANCE), logger=Kept(), max_epochs=2).fit(
            Regression(), Batches(), ckpt_path=tmp_path / "half.ckpt"
        )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"start": {"a": 1.0}}, r"`start\['a'\]` in the checkpoint should be a dense tensor"),
        ({"spikes": {"a": [math.nan]}}, r"`spikes\['a'\]\[0\]` in the checkpoint should be a finite number"),
    ],
    ids=["start", "spikes"],
)
def test_a_damaged_state_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        WeightNormMonitor(quantities=DISTANCE).load_state_dict(state)


def test_a_start_of_another_shape_is_refused():
    monitor = WeightNormMonitor(quantities=DISTANCE)
    monitor.load_state_dict({"start": {"hidden.weight": torch.zeros(3)}})
    saved = copy.copy(monitor._saved)
    monitor.setup = lambda *_, **__: vars(monitor).update(_saved=saved)
    with pytest.raises(ValueError, match=r"`start\['hidden.weight'\]` in the checkpoint should have the shape"):
        fit(monitor)


def _resume_on_two(rank, world_size, strategy, path):
    import warnings

    warnings.simplefilter("ignore")
    found = []
    options = {"devices": world_size, "use_distributed_sampler": False}
    for epochs, ckpt_path in ((1, None), (2, path)):
        make = Spread if strategy == "fsdp2" else Regression
        callbacks = [distances(), *([] if ckpt_path else [SaveAfter(path.parent, 7)])]
        trainer = make_trainer(
            *callbacks, logger=(kept := Kept()), max_epochs=epochs, strategy=_strategy(strategy), **options
        )
        trainer.fit(make(), Batches(), ckpt_path=ckpt_path)
        found.append(kept.logged())
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_resume_the_distances_of_one(strategy, tmp_path):
    alone = fit(distances(), steps=7, max_epochs=2).logged()
    (first, resumed), _ = run_distributed(_resume_on_two, strategy, tmp_path / "7.ckpt")
    for key in (key for key in alone if "/" in key):
        found = {**first[key], **resumed[key]}
        assert found == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key


# -- spike scores ------------------------------------------------------------------------------------------------------


def test_a_score_begins_with_16_values_that_differ():
    values = [float(i % 2) for i in range(16)]
    assert spike_score(2.0, values) == pytest.approx(3.0, rel=1e-12, abs=0)
    assert spike_score(2.0, values[1:]) is None
    assert spike_score(2.0, [1 / 3] * 20) is None
    assert spike_score(math.inf, values) is None


def test_scores_are_of_the_last_128_finite_values_of_each_key():
    drawn = [randn(200).exp().tolist(), randn(200, seed=1).tolist()]
    drawn[0][150] = math.nan
    scores = SpikeScores({})
    for i, (a, b) in enumerate(zip(*drawn, strict=True)):
        found = scores.scores({"a": a, "b": b})
        scores = SpikeScores(scores.values())  # as in a checkpoint
        for key, values in zip("ab", drawn, strict=True):
            before = torch.tensor([value for value in values[:i] if math.isfinite(value)][-128:], dtype=torch.float64)
            if i < 16 or not math.isfinite(values[i]):
                assert f"{key}/spike_score" not in found
                continue
            expected = ((values[i] - before.mean()) / before.std(correction=0)).item()
            assert found[f"{key}/spike_score"] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_spike_is_logged_with_the_totals_in_the_step_in_which_it_occurs():
    def enlarge(trainer, module):
        module.hidden.weight.data.mul_(10)

    monitor = WeightNormMonitor(quantities=("weight",), detail="parameter", spike_score=True, expected=True)
    kept = Kept()
    trainer = make_trainer(monitor, At(4, enlarge), logger=[kept, MLFlowLogger()], max_epochs=3)
    trainer.fit(Regression(), Batches())
    scores = kept.logged()
    assert [key for key in scores if "spike" in key] == ["weight_norm/total/spike_score"]
    logged, totals = scores["weight_norm/total/spike_score"], list(scores["weight_norm/total"].values())
    assert list(logged) == list(range(16, 21))
    before = torch.tensor(totals[:18], dtype=torch.float64)
    expected = ((totals[18] - before.mean()) / before.std(correction=0)).item()
    assert logged[18] == pytest.approx(expected, rel=1e-9, abs=0)
    assert trainer.callback_metrics["weight_norm/total/spike_score"] == pytest.approx(logged[20], rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spike_score": 1}, "`spike_score` should be True or False, got 1"),
        ({"quantities": DISTANCE, "start_in_bfloat16": "yes"}, "`start_in_bfloat16` should be True or False"),
        ({"start_in_bfloat16": True}, "`start_in_bfloat16` is for 'distance', which is not among `quantities`"),
    ],
    ids=["number", "text", "without distance"],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"WeightNormMonitor: {message}"):
        WeightNormMonitor(**arguments)
