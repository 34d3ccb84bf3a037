"""Does what WeightNormMonitor measures come to where it says that theory expects it?"""

import statistics

import lightning.pytorch as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_regularize import WeightNormMonitor
from tests.training.support import QUIET, make_trainer
from tests.training.test_norm_monitor import Kept

pytestmark = QUIET


class Walk(L.LightningModule):
    """A weight that noise moves: gradients know nothing of it but, as before a norm, its size and direction."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.make_optimizer = make_optimizer
        self.weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))

    def training_step(self, noise, batch_idx):
        direction = self.weight / self.weight.norm()
        return 100 * (direction * noise / noise.norm()).sum()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Noise:
    def __init__(self, steps):
        self.steps = steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(64, 64, generator=generator) for _ in range(self.steps))


class Digits(L.LightningModule):
    """An MLP of which a BatchNorm follows each hidden layer, so that nothing depends on the size of their weights."""

    def __init__(self, lr, weight_decay):
        super().__init__()
        torch.manual_seed(0)
        self.lr, self.weight_decay = lr, weight_decay
        layers = [nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
        layers += [nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        hidden = [self.net[0].weight, self.net[3].weight]
        others = [p for p in self.parameters() if all(p is not weight for weight in hidden)]
        groups = [{"params": hidden, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))


class NoisyDigits:
    """Batches of 32 images; 30 % of the labels are wrong, so that gradients do not vanish."""

    def __init__(self, steps):
        self.steps = steps
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
        generator = torch.Generator().manual_seed(0)
        wrong = torch.randperm(len(labels), generator=generator)[: round(0.3 * len(labels))]
        self.labels[wrong] = torch.randint(0, 10, wrong.shape, generator=generator)

    def __len__(self):
        return self.steps

    def __iter__(self):
        generator = torch.Generator().manual_seed(2)
        for _ in range(self.steps):
            batch = torch.randint(0, len(self.labels), (32,), generator=generator)
            yield self.images[batch], self.labels[batch]


def at_the_end(module, batches, quantities, detail="total"):
    """The mean of what is logged in the last fifth of a run, by key."""
    logger = Kept()
    monitor = WeightNormMonitor(quantities=quantities, detail=detail, expected=True, every_n_steps=len(batches) // 100)
    make_trainer(monitor, logger=logger, max_epochs=1, log_every_n_steps=10**6).fit(module, batches)
    return {key: statistics.mean(list(steps.values())[-20:]) for key, steps in logger.logged().items() if "/" in key}


LR, DECAY = 0.01, 0.5  # a timescale of 200 steps
WALKS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, betas=(0.9, 0.99)),
    "Muon": lambda parameters: torch.optim.Muon(parameters, lr=LR, weight_decay=DECAY),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY / 10, momentum=0.9),
}


@pytest.mark.parametrize("make_optimizer", WALKS.values(), ids=WALKS)
def test_a_random_walk_comes_within_3_percent(make_optimizer):
    found = at_the_end(Walk(make_optimizer), Noise(2000), ("weight", "rms", "angle", "gradient"))
    for key in ("weight_norm/total", "rms/total", "angle/total"):
        assert found[key] == pytest.approx(found[f"{key}/expected"], rel=0.03, abs=0), key


@pytest.mark.parametrize(("lr", "weight_decay"), [(3e-3, 1.0), (1e-2, 0.3), (1e-3, 3.0)])
def test_layers_before_a_batch_norm_come_within_15_percent(lr, weight_decay):
    steps = round(6 / (lr * weight_decay))
    found = at_the_end(Digits(lr, weight_decay), NoisyDigits(steps), ("rms", "angle"), detail="parameter")
    for name in ("net.0.weight", "net.3.weight"):
        assert found[f"rms/{name}"] == pytest.approx(found[f"rms/{name}/expected"], rel=0.15, abs=0)
        assert found[f"angle/{name}"] == pytest.approx(found[f"angle/{name}/expected"], rel=0.15, abs=0)
