import math
import warnings

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from lightning_regularize.metrics import GeneralizationGap, Sparsity, WeightNorm
from tests.distributed import run_distributed
from tests.models import MLP, MODELS, randn


def seeded(model=MLP):
    torch.manual_seed(0)
    return model()


def elements(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_weight_norm_equals_its_definition(model, norm_type):
    module, metric = seeded(model), WeightNorm(norm_type)
    metric.update(module)
    assert metric.compute().item() == pytest.approx(elements(module).norm(norm_type).item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_sparsity_equals_its_definition(threshold):
    module, metric = seeded(), Sparsity(threshold)
    expected = (elements(module).abs() <= threshold).double().mean().item()
    assert metric(module).item() == pytest.approx(expected, rel=1e-6, abs=0)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6, abs=0)


def test_rules_choose_what_is_measured():
    module, norm, sparsity = seeded(), WeightNorm(include=("weight",)), Sparsity(include=("norm",), exclude=("*.bias",))
    weights = torch.cat([module.hidden.weight.flatten(), module.output.weight.flatten()])
    assert norm(module).item() == pytest.approx(weights.norm().item(), rel=1e-6, abs=0)
    module.norm.weight.data[:4] = 0
    assert sparsity(module).item() == 0.25


@pytest.mark.parametrize("metric", [WeightNorm(), Sparsity()], ids=repr)
def test_the_last_update_counts(metric):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(first.weight, 3.0), nn.init.zeros_(first.bias)
    nn.init.constant_(second.weight, 1.0), nn.init.constant_(second.bias, 1.0)
    expected = {WeightNorm: math.sqrt(2), Sparsity: 0.0}[type(metric)]
    metric(first)
    metric(second)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6, abs=0)


def test_frozen_parameters_do_not_count():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    metric = WeightNorm()
    assert metric(module).item() == pytest.approx(module.weight.norm().item(), rel=1e-6, abs=0)


def test_the_gap_is_training_minus_validation():
    gap = GeneralizationGap(BinaryAccuracy())
    gap.update(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 0, 0]), stage="train")
    gap.update(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0]), stage="val")
    assert gap.compute().item() == 0.25
    gap.reset()
    assert gap.compute().isnan()
    gap.update(torch.tensor([1]), torch.tensor([1]), stage="train")
    assert gap.compute().isnan()


@pytest.mark.parametrize("metric", [WeightNorm(), Sparsity(), GeneralizationGap(MeanMetric())], ids=repr)
def test_metrics_can_be_plotted(metric):
    plt = pytest.importorskip("matplotlib.pyplot")
    if isinstance(metric, GeneralizationGap):
        metric.update(1.0, stage="train")
        metric.update(0.5, stage="val")
    else:
        metric.update(seeded())
    fig, ax = metric.plot()
    assert metric.plot(ax=ax)[1] is ax
    assert metric.plot([torch.tensor(0.1), torch.tensor(0.2)])[1].lines
    plt.close("all")
    assert fig is not None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightNorm(0.5), ValueError, "`norm_type` should be at least 1"),
        (lambda: Sparsity(-1.0), ValueError, "`threshold` should be finite and at least 0, got -1.0"),
        (lambda: Sparsity(include=("wieght",)), ValueError, "Did you mean 'weight'"),
        (lambda: WeightNorm()(torch.ones(2)), TypeError, "`module` should be a torch.nn.Module, got Tensor"),
        (lambda: GeneralizationGap(0.5), TypeError, "`metric` should be a torchmetrics.Metric, got float"),
        (lambda: GeneralizationGap(MeanMetric()).update(1.0, stage="test"), ValueError, "`stage` should be 'train'"),
    ],
    ids=["norm", "threshold", "rule", "module", "metric", "stage"],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def _measured(rank, world_size, sharded):
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    module = seeded()
    module.hidden.weight.data[:3] = 0
    if sharded == "fsdp1":  # whose parameters are this rank's elements alone
        from torch.distributed.fsdp import FullyShardedDataParallel

        module = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
    if sharded == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    norm, sparsity, gap = WeightNorm(), Sparsity(), GeneralizationGap(MeanMetric())
    norm.update(module)
    sparsity.update(module)
    gap.update(float(rank), stage="train")
    gap.update(float(2 * rank), stage="val")
    return [metric.compute().item() for metric in (norm, sparsity, gap)]


@pytest.mark.parametrize("sharded", ["ddp", "fsdp1", "fsdp2"])
def test_ranks_are_not_added_up(sharded):
    module = seeded()
    module.hidden.weight.data[:3] = 0
    expected = [elements(module).norm().item(), (elements(module) == 0).double().mean().item(), -0.5]
    for found in run_distributed(_measured, sharded):
        assert found == pytest.approx(expected, rel=1e-6, abs=0)


def test_metrics_are_restored_and_moved():
    metric = WeightNorm()
    metric.persistent(True)
    metric.update(seeded())
    copy = WeightNorm()
    copy.persistent(True)
    copy.load_state_dict(metric.state_dict())
    assert copy.value == metric.value
    assert randn(1).dtype == metric.value.dtype
