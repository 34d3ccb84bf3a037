"""What whole trainings share: each callback, a tiny module in float64, its batches, a quiet Trainer, and a witness."""

import functools

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_regularize import (
    ActivationPenalty,
    AnchorDecay,
    ConstrainedDecay,
    DropoutSchedule,
    ElasticNetPenalty,
    GeneralizationGapMonitor,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    RegularizationSummary,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
    WeightPenalty,
)
from lightning_regularize.penalties import NuclearNorm, Orthogonal, Spectral
from lightning_regularize.projections import MaxNorm, Rank, TopShare
from lightning_regularize.schedules import Cosine, CubicRamp, FollowLR, Linear

torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost ten times what the work does

BATCHES = 7  # an epoch
EXCLUDED = ("hidden.bias", "norm.weight", "norm.bias", "output.bias")

QUIET = [
    # lightning/pytorch/utilities/_pytree.py, with torch >= 2.9, whenever a loader is set up
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def double_well(weight):
    return (weight.square() - 1).square().sum()


def zero_mean(weight: torch.Tensor) -> torch.Tensor:  # LightningCLI asks for these
    return weight - weight.mean()


# Each regularizer, by each of its methods, for modules with layers ``hidden`` and ``output`` and something to drop.
# A new one is added here, and what is asked of all is then asked of it.
REGULARIZERS = {
    "optimizer": lambda: WeightDecay(Linear(0.1, 1.0), factors={"output.*": 0.5}),
    "optimizer, FollowLR": lambda: WeightDecay(FollowLR(0.5)),
    "coupled": lambda: WeightDecay(Cosine(0.1, 1.0), method="coupled"),
    "decoupled": lambda: WeightDecay(Linear(1.0, 0.1), method="decoupled"),
    "independent": lambda: WeightDecay(Linear(0.1, 0.0), method="independent"),
    "cautious": lambda: WeightDecay(0.5, method="cautious"),
    "stable": lambda: WeightDecay(Linear(0.1, 0.0), method="stable"),
    "L1": lambda: L1Penalty(Linear(0.0, 0.01)),
    "L2": lambda: L2Penalty(0.1, include=("hidden.*",)),
    "elastic net": lambda: ElasticNetPenalty(0.01, 0.1, schedule=Linear(0.0, 1.0)),
    "group lasso": lambda: GroupLassoPenalty(Cosine(0.1, 0.0)),
    "orthogonal": lambda: WeightPenalty(Orthogonal(), Linear(0.0, 0.1)),
    "spectral": lambda: WeightPenalty(Spectral(0.5), 0.1),
    "function": lambda: WeightPenalty(double_well, Linear(0.1, 0.0)),
    "proximal L1": lambda: L1Penalty(Linear(0.0, 0.1), method="proximal"),
    "proximal L2": lambda: L2Penalty(0.1, method="proximal"),
    "proximal elastic net": lambda: ElasticNetPenalty(0.01, 0.1, method="proximal", include=("output.*",)),
    "proximal group lasso": lambda: GroupLassoPenalty(Linear(0.01, 0.0), method="proximal"),
    "nuclear": lambda: WeightPenalty(NuclearNorm(), Linear(0.0, 0.1)),
    "constraint": lambda: WeightConstraint(MaxNorm(0.4)),
    "share": lambda: WeightConstraint(TopShare(CubicRamp(1.0, 0.3, until=0.5), "all"), freeze_zeros=0.6),
    "rank": lambda: WeightConstraint(Rank(1), every_n_steps=3),
    "own constraint": lambda: WeightConstraint(zero_mean),
    "anchor": lambda: AnchorDecay(Linear(0.0, 2.0), exclude=("output.*",)),
    "constrained": lambda: ConstrainedDecay("warm_start", factor=0.9, warm_start_steps=3),
    "dropout": lambda: DropoutSchedule(Linear(0.5, 0.0)),
}
# What acts while a Trainer calls the loss' backward pass, and cannot be attached to an optimizer.
IN_BACKWARD = {"activations": lambda: ActivationPenalty(Linear(0.1, 0.0), include=("hidden",))}
# What only looks on. The gap is that of ``train_loss`` and ``val_loss``, which the module logs.
MONITORS = {
    "monitor": lambda: WeightNormMonitor(
        quantities=("weight", "rms", "gradient", "update", "sparsity"), detail="parameter"
    ),
    "gap": lambda: GeneralizationGapMonitor("loss"),
    "summary": lambda: RegularizationSummary(),
}
CALLBACKS = {**REGULARIZERS, **IN_BACKWARD, **MONITORS}


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
        if self.trainer.loggers or self.trainer.is_last_batch:  # else nobody looks, and it is a third of such a step
            self.log("train_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), **self.scheduler_options}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Witness(L.Callback):
    """At each step: the weight decay and learning rate that each parameter really had, and the weights afterwards.

    ``torch.optim`` hands each group that it steps to ``_init_group``, where they are read; of an optimizer that does
    not, when its step begins. ``shown`` is the weight decay that everybody else sees in the groups when a step begins.
    """

    def __init__(self):
        self.steps, self.weights, self.shown, self._seen = [], [], [], []
        self._handles, self._spied = [], []

    def on_train_start(self, trainer, pl_module):
        for i, optimizer in enumerate(trainer.optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._look))
            self._handles.append(optimizer.register_step_post_hook(functools.partial(self._record, i, pl_module)))
            if hasattr(optimizer, "_init_group"):
                optimizer._init_group = self._spy(optimizer._init_group)
                self._spied.append(optimizer)

    def _look(self, optimizer, args, kwargs):
        self._seen = [dict(group) for group in optimizer.param_groups]
        self.shown.append([float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups])
        self._is_new = True

    def _spy(self, init_group):
        def spy(group, *args, **kwargs):
            self._seen = [dict(group)] if self._is_new else [*self._seen, dict(group)]
            self._is_new = False
            return init_group(group, *args, **kwargs)

        return spy

    def _record(self, index, module, optimizer, args, kwargs):
        names = {id(p): name for name, p in module.named_parameters()}
        held = [(names.get(id(p)), group) for group in self._seen for p in group["params"]]
        decays = {name: float(group.get("weight_decay", 0.0)) for name, group in held}
        self.steps.append((index, decays, {name: float(group["lr"]) for name, group in held}))
        self.weights.append(weights(module))

    def decays(self, name="hidden.weight", optimizer=0):
        """The weight decay of one parameter at each step of an optimizer."""
        return self._of(1, name, optimizer)

    def lrs(self, name="hidden.weight", optimizer=0):
        """The learning rate of one parameter at each step of an optimizer."""
        return self._of(2, name, optimizer)

    def _of(self, which, name, optimizer):
        return [step[which][name] for step in self.steps if step[0] == optimizer]

    def teardown(self, trainer, pl_module, stage):
        while self._handles:
            self._handles.pop().remove()
        while self._spied:
            del self._spied.pop()._init_group

    def on_exception(self, trainer, pl_module, exception):
        self.teardown(trainer, pl_module, "fit")


class State(L.Callback):
    """What a checkpoint after the last step would hold of another callback, which should stand before this one."""

    def __init__(self, callback):
        self.callback, self.last = callback, {}

    def on_train_batch_end(self, trainer, *_):
        self.last = self.callback.state_dict()


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


class Around(torch.optim.Optimizer):
    """Steps by another optimizer. Hooks of its own are never called."""

    def __init__(self, inner):
        self.use(inner)

    def use(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, {}, inner.defaults

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)
