"""What does ``pip install lightning-regularize`` give, without any extra? Run by ``make dist`` in a fresh environment.

python -I tests/installed.py, from anywhere: isolated, Python finds what is installed and not the tree around this file;
with pytorch_lightning as an argument the same under that package
"""

import importlib
import os
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_regularize
from lightning_regularize import WeightDecay
from lightning_regularize.plots import plot_schedule
from lightning_regularize.schedules import Cosine

pl = importlib.import_module("pytorch_lightning" if "pytorch_lightning" in sys.argv else "lightning.pytorch")


class Line(pl.LightningModule):
    """Its gradients are zero, so that weights move by weight decay only. Nothing in it knows of regularization."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch):
        return 0.0 * self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.0)


def main():
    check_files()
    check_no_extra_is_there()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the Trainer leaves its logs
        check_one_line_use()
        os.chdir("/")
    check_a_missing_extra_is_named()
    print(f"lightning-regularize {lightning_regularize.__version__} works as installed with {pl.__name__}")


def check_files():
    package = Path(lightning_regularize.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not what was installed"
    assert (package / "py.typed").is_file()
    assert version("lightning-regularize") == lightning_regularize.__version__


def check_no_extra_is_there():
    optional = [requirement for requirement in requires("lightning-regularize") if "extra ==" in requirement]
    assert len(optional) > 5
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in optional}
    names -= {"lightning-regularize", "pytorch-lightning"}
    found = sorted(filter(is_installed, names))
    assert not found, f"{found} are installed, so that nothing is shown"


def is_installed(name):
    try:
        return distribution(name) is not None
    except PackageNotFoundError:
        return False


def check_one_line_use():
    module = Line()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = pl.Trainer(callbacks=[WeightDecay(0.05)], max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(module, DataLoader(torch.ones(8, 4), batch_size=2))
    assert trainer.global_step == 8
    assert torch.equal(module.layer.bias, before["layer.bias"]), "the bias has decayed"
    shrunk = before["layer.weight"] * (1 - 0.1 * 0.05) ** 8  # lr * weight_decay
    torch.testing.assert_close(module.layer.weight.detach(), shrunk)
    (group,) = trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.0, "the optimizer's own value was not put back"


def check_a_missing_extra_is_named():
    try:
        plot_schedule(Cosine(0.04, 0.4), total_steps=10)
        told = "nothing"
    except ImportError as error:
        told = str(error)
    assert 'pip install "lightning-regularize[plot]"' in told, told


if __name__ == "__main__":
    main()
