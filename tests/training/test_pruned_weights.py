"""Is it the used weight that is constrained and penalized, where a pruning mask takes elements of the stored one?"""

import functools

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam

from lightning_regularize import ElasticNetPenalty, GroupLassoPenalty, L1Penalty, L2Penalty, WeightConstraint
from lightning_regularize.penalties import L1, L2, ElasticNet, GroupLasso
from lightning_regularize.projections import (
    NM,
    Box,
    FrobeniusBall,
    FrobeniusSphere,
    MaxNorm,
    NonNegative,
    Rank,
    SpectralBall,
    TopShare,
    UnitNorm,
)
from tests.distributed import run_distributed
from tests.reading import read_csv
from tests.training.support import QUIET, Batches, Regression, make_trainer, train

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*changed no weight in a whole epoch")]

sgd, adam = functools.partial(SGD, lr=0.3, momentum=0.9), functools.partial(Adam, lr=0.1)
MASK = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]])


class Pruned(Regression):
    """Its first layer has a mask, which hides large elements that are not zero."""

    def __init__(self, make_optimizer=sgd, mask=MASK):
        super().__init__(make_optimizer)
        prune.custom_from_mask(self.hidden, "weight", mask)
        with torch.no_grad():
            self.hidden.weight_orig.add_(torch.sign(self.hidden.weight_orig) * 3.0 * (1 - mask))

    def used(self):
        return (self.hidden.weight_orig * self.hidden.weight_mask).detach()


def steps(module, batches, after=lambda: None, before=lambda: None):
    """A loop by hand: losses that autograd follows through the mask."""
    optimizer = module.configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        module.loss(batch).backward()
        before()
        optimizer.step()
        after()


PROJECTIONS = {
    "MaxNorm": MaxNorm(0.3),
    "UnitNorm": UnitNorm(),
    "NonNegative": NonNegative(),
    "FrobeniusBall": FrobeniusBall(0.5, relative=True),
    "FrobeniusSphere": FrobeniusSphere(0.7),
    "NM": NM(1, 3),
    "TopShare": TopShare(0.25),
}


@pytest.mark.parametrize("projection", PROJECTIONS.values(), ids=PROJECTIONS)
def test_the_used_weight_is_constrained_and_what_is_masked_is_left_alone(projection):
    module, by_hand = Pruned(), Pruned()
    train(module, WeightConstraint(projection, include=("hidden.weight*",)), max_epochs=1)
    fixed, mask = projection.at_start(by_hand.used()), MASK.bool()

    @torch.no_grad()
    def project():
        stored = by_hand.hidden.weight_orig
        stored.copy_(torch.where(mask, fixed.project(by_hand.used()), stored))

    steps(by_hand, Batches().batches, project)
    assert (module.hidden.weight_orig[~mask].abs() > 2.9).all()
    torch.testing.assert_close(module.hidden.weight_orig, by_hand.hidden.weight_orig, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(module.output.weight, by_hand.output.weight, rtol=1e-12, atol=1e-14)


def halved(weight):
    return weight / 2


@pytest.mark.parametrize(
    "projection", [Box(0.1, 0.2), SpectralBall(0.5), Rank(1), halved], ids=["box", "spectral", "rank", "function"]
)
def test_what_would_not_leave_the_mask_alone_is_refused(projection):
    with pytest.raises(MisconfigurationException, match=r"WeightConstraint.* computed anew from 'hidden.weight_orig'"):
        train(Pruned(), WeightConstraint(projection))


def test_a_weight_that_two_layers_share_is_refused():
    module = Pruned()
    module.twin = nn.Linear(3, 4).double()
    module.twin.weight = module.hidden.weight_orig  # which it uses without the mask
    with pytest.raises(MisconfigurationException, match="cannot hold"):
        train(module, WeightConstraint(MaxNorm(0.3)))


@pytest.mark.parametrize("make_permanent", [True, False])
def test_a_relative_radius_stays_that_of_the_start_when_masks_come_and_go(make_permanent):
    class Masks(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                prune.custom_from_mask(module.hidden, "weight", MASK)
            if trainer.current_epoch == 2 and make_permanent:
                prune.remove(module.hidden, "weight")

    module = Regression(sgd)
    start = module.hidden.weight.norm().item()
    train(module, Masks(), WeightConstraint(FrobeniusBall(0.5, relative=True), include=("hidden.weight*",)))
    used = module.hidden.weight.detach()
    assert used.norm().item() == pytest.approx(0.5 * start, rel=1e-9, abs=0)  # it grows without


PENALTIES = {
    "L1": (lambda **options: L1Penalty(0.05, **options), L1(), "penalty/l1"),
    "L2": (lambda **options: L2Penalty(0.05, **options), L2(), "penalty/l2"),
    "ElasticNet": (
        lambda **options: ElasticNetPenalty(0.025, 0.025, **options),
        ElasticNet(0.5),
        "penalty/elastic_net",
    ),
    "GroupLasso": (lambda **options: GroupLassoPenalty(0.05, **options), GroupLasso(), "penalty/group_lasso"),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_gradient_is_that_of_the_penalty_of_the_used_weight(penalty, tmp_path):
    make, at_unit_strength, key = PENALTIES[penalty]
    module, by_hand, logger, values = Pruned(adam), Pruned(adam), CSVLogger(tmp_path), {}
    train(module, make(include=("hidden.weight*",)), logger=logger, max_epochs=1)
    stored = by_hand.hidden.weight_orig

    def add():
        values[len(values)] = at_unit_strength.value(by_hand.used(), 0.05).item()
        term = torch.zeros_like(stored)
        at_unit_strength.add_gradient_(term, by_hand.used(), 0.05, dim=1)
        stored.grad += term * MASK

    steps(by_hand, Batches().batches, before=add)
    torch.testing.assert_close(module.hidden.weight_orig, stored, rtol=1e-12, atol=1e-14)
    assert read_csv(logger)[key] == pytest.approx(values, rel=1e-9, abs=0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_proximal_step_is_that_of_the_used_weight(penalty):
    make, at_unit_strength, _ = PENALTIES[penalty]
    plain = functools.partial(SGD, lr=0.3)
    module, by_hand = Pruned(plain), Pruned(plain)
    train(module, make(include=("hidden.weight*",), method="proximal"), max_epochs=1)

    @torch.no_grad()
    def shrink():
        used, stored = by_hand.used(), by_hand.hidden.weight_orig
        at_unit_strength.proximal_(used, 0.3 * 0.05, dim=1)
        stored.copy_(torch.where(MASK.bool(), used, stored))

    steps(by_hand, Batches().batches, after=shrink)
    assert (module.hidden.weight_orig[MASK == 0].abs() > 2.9).all()
    torch.testing.assert_close(module.hidden.weight_orig, by_hand.hidden.weight_orig, rtol=1e-9, atol=1e-12)


def end_of(rank, world_size, callback):
    module = Pruned()
    trainer = make_trainer(callback(), strategy="ddp", devices=world_size, max_epochs=1)
    trainer.fit(module, Batches())
    return module.hidden.weight_orig.detach().numpy()


@pytest.mark.parametrize("name", ["MaxNorm", "GroupLasso"])
def test_replicas_stay_equal_and_end_where_one_process_does(name):
    make = {
        "MaxNorm": lambda: WeightConstraint(MaxNorm(0.3), include=("hidden.weight*",)),
        "GroupLasso": lambda: GroupLassoPenalty(0.05, include=("hidden.weight*",), method="proximal"),
    }[name]
    alone = Pruned()
    train(alone, make(), max_epochs=1)
    for found in run_distributed(end_of, make):
        torch.testing.assert_close(torch.from_numpy(found), alone.hidden.weight_orig.detach(), rtol=1e-12, atol=1e-14)
