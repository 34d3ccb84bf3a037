"""Does what a callback does at the beginning of a run grow with the model, and not with its square?"""

import functools
import gc
import sys

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_regularize import ActivationPenalty, WeightDecay, WeightNormMonitor
from tests.training.support import CALLBACKS, QUIET, make_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore")]

MEMBERS = {
    **CALLBACKS,
    "activations": lambda: ActivationPenalty(0.1, include=("type:Linear",)),
    "a schedule for each layer": lambda: WeightDecay({"blocks.*": 0.1, "hidden.*": 0.2, "output.*": 0.3}),
    "all quantities": lambda: WeightNormMonitor(
        quantities=("weight", "update", "distance", "effective_decay"), detail="parameter", expected=True
    ),
}


class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.LayerNorm(2), nn.Dropout(0.5))


class Deep(L.LightningModule):
    def __init__(self, depth, group_of_each):
        super().__init__()
        self.hidden, self.blocks, self.output = nn.Linear(3, 2), nn.Sequential(), nn.Linear(2, 2)
        self.blocks.extend([Block() for _ in range(depth)])
        self.group_of_each = group_of_each

    def training_step(self, batch, batch_idx):
        loss = self.output(self.blocks(self.hidden(batch))).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        parameters = list(self.parameters())
        groups = [{"params": [p]} for p in parameters] if self.group_of_each else parameters
        return torch.optim.SGD(groups, lr=0.01, foreach=True)


def calls_of(callbacks, depth, group_of_each):
    """The calls of functions in a fit of one step."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    trainer, module = make_trainer(*callbacks, max_steps=1), Deep(depth, group_of_each)
    gc.disable()  # what a collection calls is of other tests
    sys.setprofile(count)
    try:
        trainer.fit(module, torch.ones(1, 4, 3))
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


@functools.cache
def calls_without(depth, group_of_each):
    calls_of([], depth, group_of_each)  # what is made at first sight is made
    return calls_of([], depth, group_of_each)


@pytest.mark.parametrize("group_of_each", [False, True], ids=["one group", "a group for each parameter"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_model_of_twice_the_depth_takes_twice_the_calls(name, group_of_each, capsys):
    calls_of([MEMBERS[name]()], 1, group_of_each)
    small, middle, large = (
        calls_of([MEMBERS[name]()], depth, group_of_each) - calls_without(depth, group_of_each) for depth in (8, 16, 32)
    )
    assert large - middle < 2.1 * (middle - small) + 100
