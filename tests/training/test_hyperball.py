"""Hyperball: does a matrix keep its norm, and turn by the learning rate, whatever the optimizer?"""

import copy
import functools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD, Adam, AdamW, Muon
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_regularize import (
    AnchorDecay,
    ConstrainedDecay,
    ElasticNetPenalty,
    Hyperball,
    L1Penalty,
    L2Penalty,
    WeightConstraint,
    WeightDecay,
    WeightPenalty,
)
from lightning_regularize.penalties import L2
from lightning_regularize.projections import MaxNorm
from lightning_regularize.schedules import Steps
from lightning_regularize.spheres import turn_
from tests.distributed import run_distributed
from tests.training.support import QUIET, Batches, Regression, SaveAfter, assert_identical_weights, train, weights

pytestmark = QUIET

MATRICES = ("hidden.weight", "output.weight")
ROWS = torch.arange(16.0).reshape(4, 4)
adam = functools.partial(Adam, lr=0.05)


def norms(module):
    return {name: weight.norm().item() for name, weight in module.named_parameters() if name in MATRICES}


class AdamH:
    """Adam without weight decay, whose steps of matrices are turned: written out, one weight after the other."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.step = parameters, lr, 0
        self.radii = {name: weight.norm() for name, weight in parameters.items()}
        self.means = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
        self.squares = {name: torch.zeros_like(weight) for name, weight in parameters.items()}

    def take_step(self, gradients, lr):
        self.step += 1
        for name, weight in self.parameters.items():
            mean, square, gradient = self.means[name], self.squares[name], gradients[name]
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            update = mean / (1 - 0.9**self.step) / ((square / (1 - 0.999**self.step)).sqrt() + 1e-8)
            if name in MATRICES:
                radius = self.radii[name]
                moved = weight - lr * radius * update / update.norm()
                weight.copy_(radius * moved / moved.norm())
            else:
                weight.sub_(lr * update)


def test_it_equals_adam_h_by_hand_over_200_steps():
    steps, twin = 200, Regression()
    parameters = {name: p.detach() for name, p in twin.named_parameters()}
    by_hand = AdamH(parameters, 0.05)
    module = Regression(adam, functools.partial(CosineAnnealingLR, T_max=steps))
    rates = [0.0] * steps
    scheduled = SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler = CosineAnnealingLR(scheduled, T_max=steps)
    for i in range(steps):
        rates[i] = scheduled.param_groups[0]["lr"]
        scheduled.step()
        scheduler.step()
    train(module, Hyperball(), max_epochs=-1, max_steps=steps)
    batches = Batches().batches
    for i in range(steps):
        twin.zero_grad()
        twin.loss(batches[i % len(batches)]).backward()
        with torch.no_grad():
            by_hand.take_step({name: p.grad for name, p in twin.named_parameters()}, rates[i])
    for name, weight in module.named_parameters():
        assert (weight - parameters[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("make_optimizer", [adam, functools.partial(SGD, lr=1e-4), functools.partial(AdamW, lr=0.3)])
def test_norms_do_not_drift_in_float32_over_1000_steps(make_optimizer):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    options = {"weight_decay": 0.0} if make_optimizer.func is AdamW else {}
    optimizer = make_optimizer(layer.parameters(), **options)
    start = layer.weight.detach().double().norm()
    with Hyperball().attach(optimizer, layer):
        for _ in range(1000):
            optimizer.zero_grad()
            layer(torch.randn(4, 30)).square().mean().backward()
            optimizer.step()
    assert abs(layer.weight.detach().double().norm() / start - 1) < 1e-6


def test_a_step_turns_by_the_learning_rate_whatever_its_length():
    for scale in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.eye(4, dtype=torch.float64))
        optimizer = SGD([weight], lr=0.1)
        layer = nn.Linear(4, 4, bias=False)
        layer.weight = weight
        with Hyperball().attach(optimizer, layer):
            weight.grad = scale * torch.ones(4, 4, dtype=torch.float64).triu(1)  # orthogonal to the weight
            optimizer.step()
        assert weight.norm().item() == pytest.approx(2.0, rel=1e-12, abs=0)
        tangent = (weight.detach() - torch.diag(weight.detach().diagonal())).norm() / weight.detach().diagonal().norm()
        assert tangent.item() == pytest.approx(0.1, rel=1e-12, abs=0)


def test_with_muon_and_a_rate_for_each_group():
    class Two(Regression):
        def configure_optimizers(self):
            groups = [{"params": [self.hidden.weight], "lr": 0.1}, {"params": [self.output.weight], "lr": 0.02}]
            return Muon(groups, lr=0.1, weight_decay=0.0)

    module = Two()
    before = weights(module)
    train(module, Hyperball(), max_epochs=-1, max_steps=1)
    train(plain := Two(), max_epochs=-1, max_steps=1)
    for name, lr in (("hidden.weight", 0.1), ("output.weight", 0.02)):
        start, update = before[name], before[name] - plain.get_parameter(name).detach()
        moved = start - lr * start.norm() * update / update.norm()
        expected = start.norm() * moved / moved.norm()
        assert (module.get_parameter(name) - expected).abs().max() < 1e-12


def test_what_does_not_move_stays_to_the_last_bit():
    weights_before = [torch.randn(3, 3), torch.randn(2, 5)]
    after = [weights_before[0].clone(), weights_before[1] + 1]
    # Rounding has led them away from their norms at the start.
    radii = torch.stack([weight.double().norm() for weight in weights_before]) * 1.001
    turn_(after, weights_before, torch.tensor([0.5, 0.5], dtype=torch.float64), radii)
    assert torch.equal(after[0], weights_before[0])
    assert not torch.equal(after[1], weights_before[1])


@pytest.mark.parametrize("lr", [0.1, 1.0, 3.0])
def test_a_single_element_cannot_turn_and_it_is_said(lr):
    layers = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    start = layers[1].weight.item()
    optimizer = SGD(layers.parameters(), lr=lr)
    message = r"Hyperball: \['1\.weight'\] have a single element, which cannot turn.*`exclude=\('1\.weight',\)`"
    with pytest.warns(UserWarning, match=message):
        attachment = Hyperball().attach(optimizer, layers)
    with attachment:
        for sign in (1.0, -1.0):  # towards zero and away from it
            optimizer.zero_grad()
            (sign * layers(torch.ones(3))).sum().backward()
            optimizer.step()
            assert layers[1].weight.item() == start
            assert layers[0].weight.isfinite().all()


def test_a_step_through_zero_is_no_nan():
    before, after = [torch.tensor([[3.0, 4.0]])], [torch.zeros(1, 2)]
    turn_(after, before, torch.ones(1, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64))
    assert torch.equal(after[0], torch.zeros(1, 2))
    turn_(after, [torch.zeros(1, 2)], torch.ones(1, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64))
    assert torch.equal(after[0], torch.zeros(1, 2))
    after = [torch.tensor([[0.0, 0.1]])]
    turn_(after, [torch.zeros(1, 2)], torch.ones(1, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64))
    assert after[0].tolist()[0] == pytest.approx([0.0, 5.0], rel=1e-6, abs=0)


def turn_a_piece(rank, world_size):
    init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    before, after = (distribute_tensor(numbers, mesh, [Shard(0)]) for numbers in (torch.eye(4), torch.eye(4) + ROWS))
    turn_([after], [before.to_local()], torch.tensor([0.1]), torch.tensor([2.0]))
    return after.full_tensor().numpy()


def test_pieces_are_turned_as_the_whole():
    """Rows of which those of one process move farther."""
    whole = torch.eye(4) + ROWS
    turn_([whole], [torch.eye(4)], torch.tensor([0.1]), torch.tensor([2.0]))
    for found in run_distributed(turn_a_piece):
        assert found == pytest.approx(whole.numpy(), rel=1e-6, abs=1e-6)


def test_a_step_that_is_not_finite_stays_visible():
    before = [torch.ones(2, 2)]
    after = [torch.tensor([[1.0, float("nan")], [1.0, 1.0]])]
    turn_(after, before, torch.tensor([0.1], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))
    assert after[0].isnan().all()


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_resumed_run_equals_one_that_was_not_interrupted(stop, tmp_path):
    whole = Regression(adam)
    train(whole, Hyperball(), SaveAfter(tmp_path, stop), max_epochs=2)
    resumed = Regression(adam)
    train(resumed, Hyperball(), max_epochs=2, ckpt_path=tmp_path / f"{stop}.ckpt")
    assert_identical_weights(weights(whole), weights(resumed))


def test_a_checkpoint_without_norms_is_told(tmp_path):
    train(Regression(adam), SaveAfter(tmp_path, 3), max_epochs=1)
    with pytest.warns(UserWarning, match="does not hold the norms at the start of training: Hyperball keeps those"):
        train(Regression(adam), Hyperball(), max_epochs=2, ckpt_path=tmp_path / "3.ckpt")


def test_in_a_loop_of_ones_own_it_is_the_same():
    module, twin = Regression(adam), Regression(adam)
    train(module, Hyperball(), max_epochs=1)
    optimizer = twin.configure_optimizers()
    with Hyperball().attach(optimizer, twin):
        for batch in Batches():
            optimizer.zero_grad()
            twin.loss(batch).backward()
            optimizer.step()
    assert_identical_weights(weights(module), weights(twin))


@pytest.mark.parametrize("callback", [WeightDecay(0.0), WeightDecay(0.1, exclude=MATRICES)], ids=repr)
def test_weight_decay_of_other_weights_goes_on(callback):
    module = Regression(functools.partial(AdamW, lr=0.05))
    before = norms(module)
    train(module, callback, Hyperball(), max_epochs=1)
    for name, norm in norms(module).items():
        assert norm == pytest.approx(before[name], rel=1e-12, abs=0)


REFUSED = {
    "AdamW": ((), AdamW, r"AdamW decays 'hidden.weight', 'output.weight', whose norm Hyperball keeps"),
    "WeightDecay": ((WeightDecay(0.1),), AdamW, r"decays 'hidden.weight', 'output.weight', whose norm Hyperball keeps"),
    "decoupled": ((WeightDecay(0.1, method="decoupled"),), Adam, r"WeightDecay decays 'hidden.weight'"),
    "later": ((WeightDecay(Steps([0.0, 0.1], [3]), method="decoupled"),), Adam, r"WeightDecay decays 'hidden.weight'"),
    "coupled": ((WeightDecay(0.1, method="coupled"),), Adam, r"WeightDecay decays 'hidden.weight'"),
    "AnchorDecay": ((AnchorDecay(0.1),), Adam, r"AnchorDecay decays 'hidden.weight'"),
    "ConstrainedDecay": ((ConstrainedDecay("start"),), Adam, r"ConstrainedDecay decays 'hidden.weight'"),
    "L2Penalty": ((L2Penalty(0.1, include=("output.*",)),), Adam, r"L2Penalty decays 'output.weight'"),
    "WeightPenalty": ((WeightPenalty(L2(), 0.1),), Adam, r"WeightPenalty decays 'hidden.weight'"),
    "ElasticNetPenalty": ((ElasticNetPenalty(0.1, 0.1),), Adam, r"ElasticNetPenalty decays 'hidden.weight'"),
}


@pytest.mark.parametrize("comes_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", REFUSED)
def test_decay_of_the_same_weights_is_refused_before_any_weight_changes(name, comes_first):
    callbacks, kind, message = REFUSED[name]
    module = Regression(functools.partial(kind, lr=0.05))
    before = weights(module)
    order = [Hyperball(), *callbacks] if comes_first else [*callbacks, Hyperball()]
    with pytest.raises(MisconfigurationException, match=message):
        train(module, *order, max_epochs=1)
    assert_identical_weights(weights(module), before)


def test_a_frozen_weight_with_a_gradient_is_moved_by_the_optimizer_and_keeps_its_norm():
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    layers[0].requires_grad_(False)
    optimizer, before = SGD(layers.parameters(), lr=0.1), weights(layers)
    with Hyperball().attach(optimizer, layers):
        for parameter in layers.parameters():
            parameter.grad = ROWS.clone()
        optimizer.step()
    for name, weight in weights(layers).items():
        assert not torch.equal(weight, before[name])
        assert weight.norm().item() == pytest.approx(before[name].norm().item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("comes_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", REFUSED)
def test_decay_of_the_same_weights_is_refused_where_both_are_attached(name, comes_first):
    callbacks, kind, message = REFUSED[name]
    module = Regression()
    optimizer, before = kind(module.parameters(), lr=0.05), weights(module)
    for callback in [Hyperball(), *callbacks] if comes_first else [*callbacks, Hyperball()]:
        copy.deepcopy(callback).attach(optimizer, module)
    module.loss(Batches().batches[0]).backward()
    with pytest.raises(MisconfigurationException, match=message):
        optimizer.step()
    assert_identical_weights(weights(module), before)


def test_decay_that_begins_in_mid_run_is_refused():
    class Begins(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().param_groups[0]["weight_decay"] = 0.1 * (batch_idx == 3)

    with pytest.raises(MisconfigurationException, match=r"Adam decays 'hidden\.weight'"):
        train(Begins(adam), Hyperball(), max_epochs=1)


def test_penalties_that_do_not_shrink_all_weights_alike_go_together():
    module = Regression(adam)
    before = norms(module)
    train(module, L1Penalty(0.01), Hyperball(), max_epochs=1)
    for name, norm in norms(module).items():
        assert norm == pytest.approx(before[name], rel=1e-12, abs=0)


@pytest.mark.parametrize("callback", [L1Penalty(3.0, method="proximal"), WeightConstraint(MaxNorm(0.1))], ids=repr)
def test_what_acts_after_steps_belongs_behind_it(callback):
    who = type(callback).__name__
    message = rf"{who} acts before Hyperball, which then moves 'hidden\.weight', 'output.*put {who} behind Hyperball"
    with pytest.warns(UserWarning, match=message):
        train(Regression(adam), callback, Hyperball(), max_epochs=1)
    train(module := Regression(adam), Hyperball(), callback, max_epochs=1)  # no warning, which would be an error
    assert any((p == 0).any() for p in module.parameters()) or module.hidden.weight.norm(dim=1).max() < 0.1 + 1e-12
    train(Regression(adam), L1Penalty(3.0, method="proximal", exclude=MATRICES), Hyperball(), max_epochs=1)


def test_half_precision_is_refused():
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    with pytest.raises(MisconfigurationException, match=r"Hyperball .* rounds it away in 'weight' of torch.bfloat16"):
        Hyperball().attach(SGD(layer.parameters(), lr=0.1), layer)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_norm_is_named(bad):
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, bad)
    with pytest.raises(ValueError, match=r"Hyperball: 'weight' has the norm .* `exclude=\('weight',\)` leaves it out"):
        Hyperball().attach(SGD(layer.parameters(), lr=0.1), layer)


def test_a_parametrized_weight_is_refused_also_when_it_becomes_so():
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    with pytest.raises(MisconfigurationException, match="cannot keep the norm of parametrized weights"):
        Hyperball().attach(SGD(layer.parameters(), lr=0.1), layer)
    layer = nn.Linear(3, 3)
    optimizer = SGD(layer.parameters(), lr=0.1)
    with Hyperball().attach(optimizer, layer):
        prune.random_unstructured(layer, "weight", amount=1)
        layer(torch.ones(3)).sum().backward()
        with pytest.raises(MisconfigurationException, match="cannot keep the norm of parametrized weights"):
            optimizer.step()


def test_an_optimizer_without_a_rate_is_refused():
    layer = nn.Linear(3, 2)
    optimizer = SGD(layer.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(MisconfigurationException, match="chooses its learning rate by itself"):
        Hyperball().attach(optimizer, layer)


def test_a_weight_that_comes_in_mid_run_keeps_the_norm_that_it_comes_with():
    module = nn.Sequential(nn.Linear(3, 3))
    optimizer = SGD(module.parameters(), lr=0.1)
    with Hyperball().attach(optimizer, module):
        for _ in range(2):
            optimizer.zero_grad()
            module(torch.ones(3)).square().sum().backward()
            optimizer.step()
            if len(module) == 1:
                module.append(nn.Linear(3, 3))
                start = module[1].weight.norm().item()
                optimizer.add_param_group({"params": list(module[1].parameters())})
    assert module[1].weight.norm().item() == pytest.approx(start, rel=1e-6, abs=0)


def test_a_matrix_that_is_moved_to_another_layer_keeps_its_norm():
    module = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "last": nn.Linear(3, 3, bias=False)})
    weight = module["first"].weight
    start = weight.norm().item()
    optimizer = SGD([weight], lr=0.1)
    with Hyperball().attach(optimizer, module):
        with torch.no_grad():
            weight.mul_(2.0)
        module["first"].weight, module["last"].weight = module["last"].weight, weight
        module["new"] = nn.Linear(3, 3)  # the model is looked at anew when an optimizer gets something new
        optimizer.add_param_group({"params": module["new"].parameters()})
        module["last"](torch.ones(3)).square().sum().backward()
        optimizer.step()
    assert weight.norm().item() == pytest.approx(start, rel=1e-6, abs=0)


def test_the_norm_of_the_checkpoint_counts_and_one_that_is_damaged_is_refused(tmp_path):
    train(module := Regression(adam), Hyperball(), SaveAfter(tmp_path, 3), max_epochs=1)
    checkpoint = torch.load(tmp_path / "3.ckpt", weights_only=False)
    checkpoint["state_dict"]["hidden.weight"] *= 2
    torch.save(checkpoint, tmp_path / "doubled.ckpt")
    train(resumed := Regression(adam), Hyperball(), max_epochs=1, ckpt_path=tmp_path / "doubled.ckpt")
    assert norms(resumed) == pytest.approx(norms(module), rel=1e-12, abs=0)
    state = next(state for key, state in checkpoint["callbacks"].items() if "Hyperball" in key)
    for damaged in (0.0, 1e300):
        state["radii"]["hidden.weight"] = damaged
        torch.save(checkpoint, tmp_path / "damaged.ckpt")
        with pytest.raises(
            ValueError, match=r"Hyperball: `radii\['hidden.weight'\]` in the checkpoint should be a positive"
        ):
            train(Regression(adam), Hyperball(), max_epochs=1, ckpt_path=tmp_path / "damaged.ckpt")
