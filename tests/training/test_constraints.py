"""Do the weights satisfy the constraint after every real step, and is nothing else touched?"""

import copy
import functools
import pickle

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adam, AdamW

from lightning_regularize import Hyperball, L1Penalty, WeightConstraint
from lightning_regularize.projections import (
    NM,
    Box,
    FrobeniusBall,
    FrobeniusSphere,
    MaxNorm,
    NonNegative,
    Projection,
    SpectralBall,
    UnitNorm,
)
from tests.distributed import run_distributed
from tests.models import randn
from tests.properties import assert_same_bits
from tests.steps.optimizers import Lookahead
from tests.strategies import CPUFSDPStrategy
from tests.training import spread
from tests.training.support import (
    QUIET,
    Batches,
    Regression,
    assert_identical_weights,
    make_trainer,
    train,
    weights,
)

pytestmark = QUIET

sgd = functools.partial(SGD, lr=0.5)
adam = functools.partial(Adam, lr=0.1)


def named(argument):
    return repr(argument) if isinstance(argument, Projection) else ""


class Watch(L.Callback):
    """What ``look`` finds after every step."""

    def __init__(self, look=weights):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(pl_module))


# --- every layer type ---------------------------------------------------------------------------------------------


class Zoo(L.LightningModule):
    """One layer of each kind, and a loss that pulls all weights away from zero."""

    def __init__(self, dtype=torch.float64, make_optimizer=sgd):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 3)
            self.conv1 = nn.Conv1d(4, 6, 3)
            self.conv2 = nn.Conv2d(4, 6, 3, groups=2)
            self.conv3 = nn.Conv3d(2, 3, 2)
            self.up1 = nn.ConvTranspose1d(4, 6, 3)
            self.up2 = nn.ConvTranspose2d(4, 6, 3, groups=2)
            self.table = nn.Embedding(5, 3)
            self.attention = nn.MultiheadAttention(4, 2)
            self.lstm = nn.LSTM(3, 4)
        self.to(dtype)
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        return -sum(p.square().sum() for p in self.parameters()) / 10

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def rows(weight):
    return list(weight.flatten(1))


def grouped(weight, groups):
    """The incoming weights of each output channel of a grouped transposed convolution, one slice at a time."""
    inputs = weight.shape[0] // groups
    return [
        weight[g * inputs : (g + 1) * inputs, channel].flatten()
        for g in range(groups)
        for channel in range(weight.shape[1])
    ]


UNITS = {
    "linear.weight": rows,
    "conv1.weight": rows,
    "conv2.weight": rows,
    "conv3.weight": rows,
    "up1.weight": lambda w: [w[:, channel].flatten() for channel in range(6)],
    "up2.weight": lambda w: grouped(w, 2),
    "table.weight": rows,
    "attention.in_proj_weight": rows,
    "attention.out_proj.weight": rows,
    "lstm.weight_ih_l0": rows,
    "lstm.weight_hh_l0": rows,
}


def norms_of_units(module):
    named = dict(module.named_parameters())
    return {name: [float(u.double().norm()) for u in units(named[name].detach())] for name, units in UNITS.items()}


@pytest.fixture(scope="module")
def zoo_norms():
    watch = Watch(norms_of_units)
    constraint = WeightConstraint(MaxNorm(0.6), include=("weight", "embedding"))
    make_trainer(constraint, watch, max_epochs=1).fit(Zoo(), range(8))
    return watch.seen


@pytest.mark.parametrize("name", UNITS)
def test_units_of_every_layer_are_bounded_after_every_step_and_some_bind(name, zoo_norms):
    seen = [norms[name] for norms in zoo_norms]
    assert len(seen) == 8
    assert max(max(norms) for norms in seen) <= 0.6
    assert max(seen[-1]) == pytest.approx(0.6, rel=1e-9, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("max_norm", [0.3, 1.0, 1.1])
def test_the_bound_is_strict_in_every_precision(max_norm, dtype):
    watch = Watch(norms_of_units)
    constraint = WeightConstraint(MaxNorm(max_norm), include=("weight", "embedding"))
    make_trainer(constraint, watch, max_epochs=1).fit(Zoo(dtype), range(8))
    largest = max(max(norms) for seen in watch.seen for norms in seen.values())
    assert 0.98 * max_norm < largest <= max_norm


@pytest.mark.parametrize(
    ("projection", "holds"),
    [
        (UnitNorm(), lambda w: torch.allclose(w.norm(dim=1), torch.ones(len(w), dtype=w.dtype))),
        (NonNegative(), lambda w: (w >= 0).all()),
        (Box(-0.1, 0.2), lambda w: ((w >= -0.1) & (w <= 0.2)).all()),
        (FrobeniusBall(0.5), lambda w: w.norm() <= 0.5),
        (FrobeniusSphere(2.0), lambda w: torch.allclose(w.norm(), torch.tensor(2.0, dtype=w.dtype))),
        (SpectralBall(0.4), lambda w: torch.linalg.matrix_norm(w, 2) <= 0.4 * (1 + 1e-9)),
    ],
    ids=named,
)
def test_every_projection_holds_after_every_step(projection, holds):
    watch = Watch()
    train(Regression(adam), WeightConstraint(projection), watch)
    assert len(watch.seen) == 21
    assert all(holds(seen[name]) for seen in watch.seen for name in ("hidden.weight", "output.weight"))


# --- nothing else -------------------------------------------------------------------------------------------------


def test_what_is_not_constrained_trains_as_without_bit_for_bit():
    """Each parameter pulls for itself in this module, so that the two runs can be compared."""
    module, twin = Zoo(), Zoo()
    constraint = WeightConstraint(MaxNorm(0.6), include=("linear.weight", "up2.weight"))
    make_trainer(constraint, max_epochs=1).fit(module, range(8))
    make_trainer(max_epochs=1).fit(twin, range(8))
    found, expected = weights(module), weights(twin)
    for name in found.keys() - {"linear.weight", "up2.weight"}:
        assert_same_bits(found[name], expected[name])
    assert not torch.equal(found["linear.weight"], expected["linear.weight"])


def test_units_inside_are_left_bit_for_bit():
    class Bent(Zoo):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) - 5 * self.linear.weight[0].square().sum()

    def look(module):
        return module.linear.weight.detach().clone()

    watches = Watch(look), Watch(look)
    for watch, callbacks in zip(watches, ([WeightConstraint(MaxNorm(5.0))], []), strict=True):
        make_trainer(*callbacks, watch, max_epochs=1).fit(Bent(), range(8))
    bound, free = (watch.seen[-1] for watch in watches)
    assert bound[0].norm() == pytest.approx(5.0, rel=1e-9, abs=0)
    assert free[0].norm() > 6
    assert_same_bits(bound[1:], free[1:])


def test_the_optimizers_state_is_left_alone():
    module, trainer = (
        Regression(adam),
        make_trainer(WeightConstraint(MaxNorm(0.1)), max_epochs=1, limit_train_batches=1),
    )
    twin, plain = Regression(adam), make_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(module, Batches())
    plain.fit(twin, Batches())
    found, expected = (t.optimizers[0].state_dict()["state"] for t in (trainer, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autograd_does_not_object_to_weights_that_change_between_steps():
    """A graph that lives on over the step, as with a retained one, would see another version of the weight."""

    class Retaining(Regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    watch = Watch()
    train(Retaining(sgd), WeightConstraint(MaxNorm(0.3)), watch)
    assert all(seen["hidden.weight"].norm(dim=1).max() <= 0.3 for seen in watch.seen)


def test_frozen_weights_are_left_alone():
    module = Regression(sgd)
    module.hidden.requires_grad_(False)
    before = weights(module)
    train(module, WeightConstraint(MaxNorm(0.1)), max_epochs=1)
    assert torch.equal(module.hidden.weight, before["hidden.weight"])
    assert module.output.weight.norm(dim=1).max() <= 0.1


class Adversaries(L.LightningModule):
    """The critic is clipped after its own step, as in a Wasserstein GAN."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = Regression(), Regression()
        self.automatic_optimization = False
        self.largest = []

    def configure_optimizers(self):
        return [sgd(self.generator.parameters()), sgd(self.critic.parameters())]

    def training_step(self, batch, batch_idx):
        for optimizer, part in zip(self.optimizers(), (self.generator, self.critic), strict=True):
            optimizer.zero_grad()
            self.manual_backward(part.loss(batch))
            optimizer.step()
            self.largest.append(max(p.abs().max().item() for p in self.critic.parameters()))


def test_only_the_critic_is_clipped_and_right_after_its_own_step():
    module, twin = Adversaries(), Adversaries()
    train(module, WeightConstraint(Box(-0.01, 0.01), include=("critic.*",)))
    train(twin)
    assert module.largest[0] > 0.01  # the generator has stepped, the critic not yet
    assert all(largest <= 0.01 for largest in module.largest[1:])
    assert_identical_weights(weights(module.generator), weights(twin.generator))


# --- before anybody looks -----------------------------------------------------------------------------------------


class Validated(Regression):
    def __init__(self):
        super().__init__(sgd)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen.append(self.hidden.weight.norm(dim=1).max().item())

    def val_dataloader(self):
        return range(1)


def test_validation_sees_constrained_weights():
    module = Validated()
    make_trainer(WeightConstraint(MaxNorm(0.3)), max_epochs=2, val_check_interval=2).fit(module, Batches())
    assert len(module.seen) == 6
    assert max(module.seen) <= 0.3


def test_checkpoints_hold_constrained_weights(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    train(Regression(sgd), saving, WeightConstraint(MaxNorm(0.3)), max_epochs=1, enable_checkpointing=True)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == 7
    for path in paths:
        assert torch.load(path)["state_dict"]["hidden.weight"].norm(dim=1).max() <= 0.3


def test_averaged_weights_are_of_constrained_ones():
    module, watch = Regression(sgd), Watch()
    averaging = EMAWeightAveraging(decay=0.5)
    train(module, averaging, watch, WeightConstraint(MaxNorm(0.3)), max_epochs=1)
    assert module.hidden.weight.norm(dim=1).max() <= 0.3  # a ball is convex
    average = Regression().hidden.weight.detach()
    for i, seen in enumerate(watch.seen):
        average = seen["hidden.weight"] if i == 0 else 0.5 * average + 0.5 * seen["hidden.weight"]
    torch.testing.assert_close(module.hidden.weight.detach(), average)


class Overflowing(Regression):
    """Its third batch has an infinite loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.trainer.global_step == 2 else loss


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_that_overflows_moves_nothing(fused):
    """A weight is put outside before that step, to see whether it is left there."""

    class PutOutside(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                pl_module.hidden.weight.data[0, 0] = 9.0

    watch = Watch()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    module = Overflowing(functools.partial(AdamW, lr=0.1, fused=fused))
    train(module, PutOutside(), WeightConstraint(MaxNorm(0.3)), watch, plugins=[plugin], max_epochs=1)
    largest = [seen["hidden.weight"].norm(dim=1).max().item() for seen in watch.seen]
    assert largest[2] > 9
    assert max(largest[:2] + largest[3:]) <= 0.3


def test_constraint_and_proximal_step_in_one_run():
    watch, module = Watch(), Regression(sgd)
    train(module, L1Penalty(0.1, method="proximal"), WeightConstraint(MaxNorm(0.3)), watch)
    assert all(seen["hidden.weight"].norm(dim=1).max() <= 0.3 for seen in watch.seen)
    assert (module.hidden.weight == 0).any()


# --- state --------------------------------------------------------------------------------------------------------


class Save(L.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    "projection", [FrobeniusBall(0.7, relative=True), FrobeniusSphere(1.5, relative=True)], ids=repr
)
def test_a_relative_radius_is_of_the_weights_at_the_start_when_resumed_too(projection, tmp_path):
    whole, resumed = Regression(sgd), Regression(sgd)
    radius = projection.radius * whole.hidden.weight.norm().item()
    train(whole, WeightConstraint(projection), Save(tmp_path / "8.ckpt", 8))
    train(resumed, WeightConstraint(projection), ckpt_path=tmp_path / "8.ckpt")
    assert resumed.hidden.weight.norm().item() == pytest.approx(radius, rel=1e-9, abs=0)
    assert_identical_weights(weights(resumed), weights(whole))


def test_without_the_norms_at_the_start_those_of_now_count_and_it_says_so(tmp_path):
    train(Regression(sgd), Save(tmp_path / "8.ckpt", 8))
    with pytest.warns(UserWarning, match="The checkpoint does not hold the norms at the start"):
        train(Regression(sgd), WeightConstraint(FrobeniusBall(0.7, relative=True)), ckpt_path=tmp_path / "8.ckpt")


class Wide(L.LightningModule):
    """Large enough for power iteration, and pulled apart along one direction that turns."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(80, 70, bias=False, dtype=torch.float64)
        self.layer.weight.data.copy_(randn(70, 80) / 20)
        self.outputs = randn(70, seed=1).double() + 0.2 * randn(20, 70, seed=2).double()

    def training_step(self, batch, batch_idx):
        return -self.outputs[batch_idx] @ self.layer.weight.sum(dim=1)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.003)


def sigma(module):
    return torch.linalg.matrix_norm(module.layer.weight.detach(), 2).item()


def test_one_power_iteration_a_step_bounds_a_large_matrix_since_it_starts_from_the_step_before():
    watch = Watch(sigma)
    make_trainer(WeightConstraint(SpectralBall(1.0)), watch, max_epochs=1).fit(Wide(), Batches(20))
    free = Watch(sigma)
    make_trainer(free, max_epochs=1).fit(Wide(), Batches(20))
    assert free.seen[-1] > 3
    assert max(watch.seen) < 1.1  # when another direction becomes the one that is stretched most
    assert max(watch.seen[-10:]) < 1.01


def test_a_resumed_power_iteration_goes_on_where_it_was(tmp_path):
    whole, resumed = Wide(), Wide()
    path = tmp_path / "8.ckpt"
    make_trainer(WeightConstraint(SpectralBall(1.0)), Save(path, 8), max_epochs=1).fit(whole, Batches(20))
    make_trainer(WeightConstraint(SpectralBall(1.0)), max_epochs=1).fit(resumed, Batches(20), ckpt_path=path)
    assert_identical_weights(weights(resumed), weights(whole))


RADII = {0.5: "hidden.weight", 0.4: "output.weight"}


def pickle_and_back(pair):
    return pickle.loads(pickle.dumps(pair))


PAIRS = {
    "equal": lambda: (WeightConstraint(MaxNorm(1.0)), WeightConstraint(MaxNorm(1.0))),
    "bound": lambda: (WeightConstraint(MaxNorm(1.0)), WeightConstraint(MaxNorm(2.0))),
    "projection": lambda: (WeightConstraint(MaxNorm(1.0)), WeightConstraint(UnitNorm())),
    "include": lambda: (WeightConstraint(MaxNorm(1.0)), WeightConstraint(MaxNorm(1.0), include=("output.weight",))),
    "exclude": lambda: (WeightConstraint(MaxNorm(1.0)), WeightConstraint(MaxNorm(1.0), exclude=("output.*", "vector"))),
}


@pytest.mark.filterwarnings("ignore:MaxNorm.* changed no weight in a whole epoch")
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("copied", [tuple, pickle_and_back, copy.deepcopy], ids=["itself", "pickle", "deepcopy"])
def test_state_keys_tell_two_in_one_trainer_apart_and_are_the_same_in_the_next_run(make, copied):
    pair = make()
    assert pair[0].state_key != pair[1].state_key
    make_trainer(*pair, fast_dev_run=True).fit(Regression(sgd), Batches())
    keys = [constraint.state_key for constraint in pair]
    assert keys[0] != keys[1]
    make_trainer(*(again := copied(pair)), fast_dev_run=True).fit(Regression(sgd), Batches())
    assert [constraint.state_key for constraint in again] == keys


def test_each_of_two_of_a_kind_gets_its_own_state_back(tmp_path):
    """Of the norms at the start, which the weights in the checkpoint no longer tell."""

    def constraints():
        return [WeightConstraint(FrobeniusBall(r, relative=True), include=(n,)) for r, n in RADII.items()]

    whole, resumed = Regression(adam), Regression(adam)
    start = weights(whole)
    train(whole, *constraints(), Save(tmp_path / "8.ckpt", 8))
    train(resumed, *constraints(), ckpt_path=tmp_path / "8.ckpt")
    assert_identical_weights(weights(resumed), weights(whole))
    for radius, name in RADII.items():
        found = dict(resumed.named_parameters())[name].norm().item()
        assert found <= radius * start[name].norm().item()


def test_a_copy_made_during_training_is_of_the_callback_only():
    constraint, copies = WeightConstraint(MaxNorm(0.3)), []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            copies.append(pickle.dumps(constraint))

    train(Regression(sgd), constraint, Copy(), max_epochs=1)
    module = Regression(sgd)
    train(module, pickle.loads(copies[0]), max_epochs=1)
    assert module.hidden.weight.norm(dim=1).max() <= 0.3


# --- what cannot work, or does nothing ----------------------------------------------------------------------------


def test_a_constraint_that_never_binds_says_so_once():
    with pytest.warns(
        UserWarning, match=r"MaxNorm\(max_norm=50.0, dim=None\) changed no weight in a whole epoch"
    ) as caught:
        train(Regression(sgd), WeightConstraint(MaxNorm(50.0)), max_epochs=3)
    assert sum("changed no weight" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("every_n_steps", [1, 10])  # an epoch has 7
def test_a_constraint_that_binds_says_nothing(every_n_steps):
    constraint = WeightConstraint(MaxNorm(0.3), every_n_steps=every_n_steps)
    train(Regression(sgd), constraint, max_epochs=2)  # a warning would be an error


PARAMETRIZED = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "old spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("parametrize", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_a_parametrized_weight_is_refused_before_training(parametrize):
    module = Regression(sgd)
    parametrize(module.hidden)
    with pytest.raises(
        MisconfigurationException, match=r"cannot hold for parametrized weights.* leave it out by `exclude`"
    ):
        train(module, WeightConstraint(MaxNorm(0.3)))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_older_weight_norm_is_refused_before_training():
    module = Regression(sgd)
    torch.nn.utils.weight_norm(module.hidden)
    with pytest.raises(MisconfigurationException, match="cannot hold for parametrized weights"):
        train(module, WeightConstraint(MaxNorm(0.3)))


def test_a_parametrized_weight_may_be_left_out():
    module = Regression(sgd)
    torch.nn.utils.parametrizations.weight_norm(module.hidden)
    train(module, WeightConstraint(MaxNorm(0.3), exclude=("hidden.*",)), max_epochs=1)
    assert module.output.weight.norm(dim=1).max() <= 0.3


@pytest.mark.parametrize(
    ("constraint", "error", "message"),
    [
        (WeightConstraint(MaxNorm(1.0), include=("embedding",)), MisconfigurationException, "has nothing to constrain"),
        (WeightConstraint(MaxNorm(1.0), include=("*.wieght",)), ValueError, "matches no parameter"),
        (WeightConstraint(MaxNorm(1.0, dim=2)), ValueError, "`dim` should name different dims.* got 2"),
        (WeightConstraint(MaxNorm(1.0), include=("bias",)), ValueError, "needs a weight with at least 2 dims"),
        (
            WeightConstraint(FrobeniusBall(0.5, relative=True), include=("norm.bias",)),
            ValueError,
            "positive, finite norm",
        ),
    ],
    ids=["nothing", "misspelled", "no such dim", "no unit", "relative to zero"],
)
def test_what_cannot_work_is_an_error_before_training(constraint, error, message):
    module = Regression(sgd)
    before = weights(module)
    with pytest.raises(error, match=message):
        train(module, constraint)
    assert_identical_weights(weights(module), before)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightConstraint(3.0), TypeError, r"such as MaxNorm\(3.0\), got 3.0"),
        (lambda: WeightConstraint(MaxNorm), TypeError, "`projection` should be one of"),
        (lambda: WeightConstraint(MaxNorm(0.0)), ValueError, "`max_norm` should be positive"),
        (lambda: WeightConstraint(FrobeniusBall(-1.0)), ValueError, "`radius` should be positive"),
        (lambda: WeightConstraint(MaxNorm(1.0), include="weight"), TypeError, "`include` should be a sequence"),
        (lambda: WeightConstraint(MaxNorm(1.0), exclude=("wieght",)), ValueError, "Did you mean 'weight'"),
    ],
)
def test_bad_input_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- two processes ------------------------------------------------------------------------------------------------

found = spread.results(
    {
        "MaxNorm": (lambda: WeightConstraint(MaxNorm(0.3)), adam),
        "MaxNorm of columns": (lambda: WeightConstraint(MaxNorm(0.5, dim=0)), adam),
        "UnitNorm": (lambda: WeightConstraint(UnitNorm()), adam),
        "Box": (lambda: WeightConstraint(Box(-0.2, 0.1)), adam),
        "FrobeniusBall": (lambda: WeightConstraint(FrobeniusBall(0.7, relative=True)), adam),
        "SpectralBall": (lambda: WeightConstraint(SpectralBall(0.5)), adam),
    }
)


@pytest.mark.parametrize("name", found.names)
@pytest.mark.parametrize("strategy", spread.STRATEGIES)
def test_two_processes_equal_one(strategy, name):
    one, two = found("one process")[name], found(strategy)[name]
    for key, weight in one.items():
        np.testing.assert_allclose(two[key], weight, rtol=0, atol=1e-12)


def test_the_units_that_fsdp2_cuts_are_bounded_as_wholes():
    up = found("fsdp2")["MaxNorm"]["up.weight"]
    largest = max(np.linalg.norm(up[:, channel]) for channel in range(3))
    assert 0.299 < largest <= 0.3


class CutGroups(spread.Upsampling):
    """Three groups of two input channels on two processes: the boundary goes through the second."""

    def __init__(self, *args):
        super().__init__(*args)
        self.up = nn.ConvTranspose1d(6, 3, 2, groups=3).double()

    def configure_model(self):
        fully_shard(self.up, mesh=self.device_mesh["data_parallel"])


def constrain_cut_groups(rank, world_size):
    strategy = ModelParallelStrategy(world_size, 1)
    trainer = make_trainer(
        WeightConstraint(MaxNorm(0.5), include=("up.*weight",)), strategy=strategy, devices=world_size, max_epochs=1
    )
    with pytest.raises(
        MisconfigurationException, match=r"^WeightConstraint: .* cannot be viewed by groups, .*: ranks cut through them"
    ):
        trainer.fit(CutGroups(adam, rank, world_size))


def test_groups_that_fsdp2_cuts_are_refused_before_training():
    run_distributed(constrain_cut_groups)


def constrain_under_fsdp1(rank, world_size, projection, message):
    module = spread.Upsampling(adam, rank, world_size)
    trainer = make_trainer(WeightConstraint(projection), strategy=CPUFSDPStrategy(), devices=world_size, max_epochs=1)
    if message is None:
        trainer.fit(module)
        assert all(p.min() >= 0 for p in module.linear.parameters() if p.numel() and p.dim() > 1)
    else:
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(module)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (
            MaxNorm(0.5),
            "WeightConstraint: MaxNorm needs norms of whole units, and FSDP1 cuts weights anywhere: use ModelParallel",
        ),
        (FrobeniusBall(0.5), "FrobeniusBall needs norms of whole units"),
        (NonNegative(), None),
    ],
    ids=named,
)
def test_fsdp1_serves_what_acts_on_each_weight_and_refuses_the_rest(projection, message):
    run_distributed(constrain_under_fsdp1, projection, message)


# --- optimizers that hold others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [UnitNorm(), NM(1, 2)], ids=repr)
def test_the_constraint_holds_after_an_optimizer_has_moved_what_another_one_in_it_stepped(projection):
    module, watch = Regression(lambda parameters: Lookahead(adam(parameters))), Watch(lambda m: m.output.weight.clone())
    train(module, WeightConstraint(projection, include=("output.weight",)), watch)
    for weight in watch.seen:
        torch.testing.assert_close(projection.project(weight), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Hyperball(), "^Hyperball: Lookahead moves weights after each step .* so that norms are not kept"),
        (L1Penalty(0.1, method="proximal"), "^L1Penalty: Lookahead moves weights after .* so that zeros do not last"),
    ],
    ids=["Hyperball", "proximal"],
)
def test_what_does_not_last_under_lookahead_is_told(callback, message):
    plain = functools.partial(SGD, lr=0.1)
    with pytest.warns(UserWarning, match=message):
        train(Regression(lambda parameters: Lookahead(plain(parameters))), callback, max_epochs=1)


def test_in_a_loop_of_ones_own_a_constraint_is_left_to_the_loop_and_says_so():
    module = Regression()
    optimizer = Lookahead(sgd(module.parameters()))
    with (
        pytest.warns(UserWarning, match="^WeightConstraint: Lookahead moves weights .* so that the constraint"),
        WeightConstraint(UnitNorm()).attach(optimizer, module),
    ):
        pass


class Averaging(SGD):
    """As schedule-free optimizers, it has averages for evaluation."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("mean", torch.full_like(p, 9.0))
        return loss

    def exchange(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data, self.state[p]["mean"] = self.state[p]["mean"], p.data

    eval = train = exchange


class Around(torch.optim.Optimizer):
    """The averages are those of the optimizer in it."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize(
    "make",
    [Averaging, lambda parameters, **options: Around(Averaging(parameters, **options))],
    ids=["by itself", "in another one"],
)
@pytest.mark.parametrize(
    ("callback", "consequence"),
    [
        (lambda: WeightConstraint(MaxNorm(0.5)), "the constraint does not hold for them"),
        (Hyperball, "norms are not kept"),
        (lambda: L1Penalty(0.1, method="proximal"), "zeros do not last"),
    ],
    ids=["constraint", "Hyperball", "proximal"],
)
def test_an_optimizer_that_has_other_weights_for_evaluation_is_told(callback, consequence, make):
    message = rf"^\w+: \w+ has other weights for evaluation, .*`eval\(\)`.* so that {consequence}\. Use"
    module = Regression(lambda parameters: make(parameters, lr=0.1))
    with pytest.warns(UserWarning, match=message):
        make_trainer(callback(), max_epochs=1).fit(module, Batches())
    optimizer = make(module.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=message), callback().attach(optimizer, module):
        pass


class AcceleratedOptimizer(Around):
    """As accelerate's: has both methods, whatever it holds."""

    def exchange(self):
        """There is nothing to exchange."""

    eval = train = exchange


def test_the_optimizer_of_accelerate_has_no_other_weights():
    module = Regression()
    with WeightConstraint(MaxNorm(0.5)).attach(AcceleratedOptimizer(sgd(module.parameters())), module):
        pass
