"""What whole trainings share: a tiny module in float64, its batches, a quiet Trainer, and a witness of each step."""

import functools

import lightning.pytorch as L
import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost ten times what the work does

BATCHES = 7  # an epoch
EXCLUDED = ("hidden.bias", "norm.weight", "norm.bias", "output.bias")

QUIET = [
    # lightning/pytorch/utilities/_pytree.py, with torch >= 2.9, whenever a loader is set up
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class Batches:
    """Pairs of inputs and targets, always the same. A checkpoint tells at which to go on.

    It is no DataLoader, so that Lightning says nothing of workers.
    """

    def __init__(self, count=BATCHES, size=4):
        generator = torch.Generator().manual_seed(1)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.batches = [(draw(size, 3), draw(size, 2)) for _ in range(count)]
        self.given, self.first = 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        first, self.first = self.first, 0
        for i in range(first, len(self.batches)):
            self.given = i + 1
            yield self.batches[i]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state_dict):
        self.first = state_dict["given"] % len(self.batches)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, **{"lr": 0.1, **options})


class Regression(L.LightningModule):
    """Two layers with a norm between; the factories make what ``configure_optimizers`` returns."""

    def __init__(self, make_optimizer=adamw, make_scheduler=None, **scheduler_options):
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.hidden, self.norm, self.output = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.double()
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        self.scheduler_options = {"interval": "step", **scheduler_options}

    def loss(self, batch):
        x, y = batch
        return (self.output(torch.tanh(self.norm(self.hidden(x)))) - y).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), **self.scheduler_options}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Witness(L.Callback):
    """What the groups of an optimizer held in the very moment in which it had changed the weights, at each step."""

    def __init__(self):
        self.steps, self.weights, self._handles = [], [], []

    def on_train_start(self, trainer, pl_module):
        for i, optimizer in enumerate(trainer.optimizers):
            hook = functools.partial(self._record, i, pl_module)
            self._handles.append(optimizer.register_step_post_hook(hook))

    def _record(self, index, module, optimizer, args, kwargs):
        groups = optimizer.param_groups
        self.steps.append((index, [float(g["weight_decay"]) for g in groups], [float(g["lr"]) for g in groups]))
        self.weights.append(weights(module))

    def decays(self, group=0, optimizer=0):
        return [decays[group] for index, decays, _ in self.steps if index == optimizer]

    def lrs(self, group=0, optimizer=0):
        return [lrs[group] for index, _, lrs in self.steps if index == optimizer]

    def teardown(self, trainer, pl_module, stage):
        for handle in self._handles:
            handle.remove()

    def on_exception(self, trainer, pl_module, exception):
        self.teardown(trainer, pl_module, "fit")


class SaveAfter(L.Callback):
    """Saves ``<step>.ckpt`` after some steps; of an epoch's last step, when the epoch has ended."""

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, set(steps)

    def save(self, trainer):
        if trainer.global_step in self.steps:
            self.steps.remove(trainer.global_step)
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer)


def make_trainer(*callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    nothing_saved = {"logger": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **nothing_saved, **options})


def train(module, *callbacks, data=None, ckpt_path=None, **options):
    """Fit 3 epochs of 7 batches unless told otherwise, and return the witness."""
    witness = Witness()
    trainer = make_trainer(*callbacks, witness, **{"max_epochs": 3, **options})
    trainer.fit(module, Batches() if data is None else data, ckpt_path=ckpt_path)
    return witness


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def split(module):
    """Hand-made groups: what decays, then what does not."""
    named = module.named_parameters()
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in named:
        groups[name in EXCLUDED]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def plain_loop(module, optimizer, data, decays, scheduler=None):
    """The oracle: a loop over batches without Lightning and without this package; ``decays`` go to the first group."""
    for batch, decay in zip(data, decays, strict=True):
        optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return weights(module)


def assert_same_weights(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_identical_weights(found, expected):
    assert_same_weights(found, expected, atol=0)
