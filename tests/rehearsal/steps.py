"""Steps of a Trainer on the device that is not there."""

import functools
import tempfile

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from tests.rehearsal.device import NAME, Seen, rehearse

STEPS = 3  # of which the last one is observed: the first ones make the optimizer's state, and what callbacks keep


class _Accelerator(CPUAccelerator):
    """Asks nothing of the device."""

    def setup_device(self, device):
        pass


class _Layers(pl.LightningModule):
    """Four tensors a layer, mostly in two shapes. There is no forward pass: gradients are simply there."""

    def __init__(self, layers, make_optimizer, dtype, is_attention):
        super().__init__()
        self.make_optimizer = make_optimizer
        where = {"device": NAME, "dtype": dtype}
        if is_attention:
            blocks = (nn.MultiheadAttention(8, 2, **where) for _ in range(layers))
        else:
            blocks = (nn.Sequential(nn.Linear(8, 8, **where), nn.LayerNorm(8, **where)) for _ in range(layers))
        self.layers = nn.Sequential(*blocks)
        self.gradients = [torch.empty_like(parameter) for parameter in self.parameters()]

    def training_step(self, batch, batch_idx):
        return torch.zeros((), device=NAME, requires_grad=True)

    def backward(self, loss):
        for parameter, gradient in zip(self.parameters(), self.gradients, strict=True):
            parameter.grad = gradient

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def _apply(self, fn, recurse=True):
        """Stay on the device. FakeTensorMode cannot move parameters from one to another."""
        return self


def _optimizer(kind, fused, tensor_lr, parameters):
    optimizer = kind(parameters, lr=1e-4, fused=fused, foreach=not fused)
    for group in optimizer.param_groups if tensor_lr else ():  # the constructor would read it
        group["lr"] = torch.zeros((), device=NAME)
    return optimizer


class _LastStep(pl.Callback):
    """Observes the last batch, from before the hooks of all other callbacks until after them."""

    def __init__(self, observer):
        self.observer, self.seen = observer, Seen()

    def on_train_batch_start(self, trainer, *_):
        self.observer.seen = self.seen if trainer.global_step == STEPS - 1 else None

    def on_train_epoch_end(self, *_):
        self.observer.seen = None


def observe(make_callback, layers, **options):
    """What a step does on the device, and does not do without the callback. See :func:`train`."""
    return observe_each(make_callback, [{"layers": layers, **options}])[0]


def observe_each(make_callback, variants):
    """As :func:`observe`, for several trainings in one process, each with its own layers and options."""
    found = rehearse(_train_each, make_callback, variants)
    return [seen - _without(**variant) for seen, variant in zip(found, variants, strict=True)]


@functools.cache
def _without(**variant):
    return rehearse(_train_each, None, [variant])[0]


def _train_each(observer, make_callback, variants):
    return [train(observer, make_callback, **variant) for variant in variants]


def train(
    observer,
    make_callback,
    layers,
    *,
    logs=False,
    fused=False,
    scaler=False,
    tensor_lr=False,
    dtype=torch.float32,
    is_attention=False,
    optimizer=torch.optim.AdamW,
):
    """What the last of a few steps does on the device.

    Args:
        observer: What counts.
        make_callback: Makes the callback, or a list of them; None for none.
        layers: Number of layers, each of which has four tensors.
        logs: Is the step logged?
        fused: The optimizer's ``fused``, or else its ``foreach``.
        scaler: Train with a GradScaler, in precision 16-mixed.
        tensor_lr: Is the learning rate a tensor on the device? Only AdamW's ``fused`` is rehearsed so.
        dtype: Of the parameters.
        is_attention: Are the layers attention?
        optimizer: Its class.
    """
    last_step, made = _LastStep(observer), make_callback() if make_callback else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=STEPS,
            callbacks=[last_step, *(made if isinstance(made, list) else [made])],
            logger=CSVLogger(folder),
            log_every_n_steps=1 if logs else 10**6,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            strategy=SingleDeviceStrategy(torch.device(NAME, 0), _Accelerator()),
            plugins=[MixedPrecision("16-mixed", NAME, torch.amp.GradScaler(NAME))] if scaler else None,
        )
        make_optimizer = functools.partial(_optimizer, optimizer, fused, tensor_lr)
        trainer.fit(_Layers(layers, make_optimizer, dtype, is_attention), range(STEPS))
    return last_step.seen
