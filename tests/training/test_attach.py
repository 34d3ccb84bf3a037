"""Do regularizers that are attached to an optimizer do in any loop what they do in a Trainer?

The same model trains on the same batches in a plain loop, in Fabric and in the Trainer of transformers, and has to end
with the bits with which Lightning ends. Nothing is clipped or dropped at random.
"""

import contextlib
import copy
import functools
import gc
import math
import re
import weakref

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from lightning_regularize import AnchorDecay, L1Penalty, WeightConstraint, WeightDecay
from lightning_regularize.projections import FrobeniusBall
from tests.distributed import run_distributed
from tests.training.support import (
    MONITORS,
    QUIET,
    REGULARIZERS,
    Around,
    Batches,
    assert_identical_weights,
    assert_same_weights,
    make_trainer,
    weights,
)

pytestmark = QUIET

EPOCHS, BATCHES = 3, 4
STEPS = EPOCHS * BATCHES


# -- one training in four loops --------------------------------------------------------------------------------------


class Fading(nn.Module):
    """Stands for dropout, without its noise."""

    drop_prob = 0.0

    def forward(self, x):
        return x * (1 - self.drop_prob)


class Loss:
    """A regression whose ``forward`` returns the loss."""

    def build(self, dtype=torch.float64):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.hidden, self.norm, self.output = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.fading = Fading()
        return self.to(dtype)

    def forward(self, x, y):
        return {"loss": (self.output(self.fading(torch.tanh(self.norm(self.hidden(x))))) - y).square().mean()}


class Net(Loss, nn.Module):
    pass


class Lit(Loss, L.LightningModule):
    def training_step(self, batch, batch_idx):
        return self(*batch)

    def configure_optimizers(self):
        optimizer, scheduler = self.make(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def of_class(optimizer_class, **options):
    """Makes the optimizer and the LR scheduler of a model."""

    def make(model):
        optimizer = optimizer_class(model.parameters(), **options)
        return optimizer, CosineAnnealingLR(optimizer, T_max=STEPS)

    return make


adamw = of_class(AdamW, lr=0.05, weight_decay=0.0)
sgd = of_class(SGD, lr=0.1, momentum=0.9)


class Stream:
    """All batches of a training, or the halves of them that belong to one of two processes."""

    def __init__(self, dtype=torch.float64, rank=None):
        pairs = [(x.to(dtype), y.to(dtype)) for x, y in EPOCHS * list(Batches(BATCHES))]
        self.batches = pairs if rank is None else [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in pairs]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def in_lightning(callbacks, make=adamw, dtype=torch.float64, rank=None, **options):
    module = Lit().build(dtype)
    module.make = make
    trainer = make_trainer(*callbacks, **{"max_epochs": 1, **options})
    trainer.fit(module, Stream(dtype, rank))
    return weights(module)


def in_a_plain_loop(callbacks, make=adamw, dtype=torch.float64, accumulate=1):
    model = Net().build(dtype)
    optimizer, scheduler = make(model)
    attachments = [callback.attach(optimizer, model, total_steps=STEPS // accumulate) for callback in callbacks]
    for i, batch in enumerate(Stream(dtype)):
        (model(*batch)["loss"] / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    for attachment in reversed(attachments):
        attachment.remove()
    return weights(model)


def in_fabric(callbacks, make=adamw, wrapped=True, rank=None, **options):
    fabric = Fabric(accelerator="cpu", **{"devices": 1, **options})
    fabric.launch()
    module = Net().build()
    optimizer, scheduler = make(module)
    model, stepped = fabric.setup(module, optimizer)
    for callback in callbacks:
        callback.attach(*((stepped, model) if wrapped else (optimizer, module)), total_steps=STEPS)
    for batch in Stream(rank=rank):
        fabric.backward(model(*batch)["loss"])
        stepped.step()
        scheduler.step()
        stepped.zero_grad()
    return weights(module)


BY_GRADIENTS = ["coupled", "L1", "L2", "elastic net", "group lasso"]
each = pytest.mark.parametrize("name", REGULARIZERS)


@functools.cache
def expected(name, dtype=torch.float64):
    return in_lightning([REGULARIZERS[name]()], dtype=dtype)


@functools.cache
def without(dtype=torch.float64):
    return in_lightning([], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each
def test_a_plain_loop_ends_as_lightning_does(name, dtype):
    found = in_a_plain_loop([REGULARIZERS[name]()], dtype=dtype)
    assert_identical_weights(found, expected(name, dtype))
    assert any(not torch.equal(weight, without(dtype)[key]) for key, weight in found.items())


@pytest.mark.parametrize("name", ["optimizer", "L1", "proximal group lasso", "anchor", "constrained", "dropout"])
def test_a_plain_loop_that_accumulates_ends_as_lightning_does(name):
    by_lightning = in_lightning([REGULARIZERS[name]()], accumulate_grad_batches=2)
    assert_identical_weights(in_a_plain_loop([REGULARIZERS[name]()], accumulate=2), by_lightning)


@pytest.mark.parametrize(
    "names", [["optimizer", "L1", "constraint"], ["anchor", "decoupled", "proximal L1"]], ids=", ".join
)
@pytest.mark.parametrize("make", [sgd, of_class(Adam, lr=0.05, amsgrad=True)], ids=["SGD", "AMSGrad"])
def test_several_at_once_act_in_the_order_in_which_they_are_attached(names, make):
    by_lightning = in_lightning([REGULARIZERS[name]() for name in names], make)
    assert_identical_weights(in_a_plain_loop([REGULARIZERS[name]() for name in names], make), by_lightning)


@pytest.mark.parametrize("name", ["coupled", "decoupled", "cautious", "L1", "group lasso", "constraint", "anchor"])
def test_closures_that_are_evaluated_several_times(name):
    make = of_class(LBFGS, lr=0.1, max_iter=3)
    model, callback = Net().build(), REGULARIZERS[name]()
    optimizer, scheduler = make(model)
    callback.attach(optimizer, model, total_steps=STEPS)
    for batch in Stream():

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(*batch)["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert_identical_weights(weights(model), in_lightning([REGULARIZERS[name]()], make))


# -- Fabric ----------------------------------------------------------------------------------------------------------


@each
def test_fabric_ends_as_lightning_does(name):
    assert_identical_weights(in_fabric([REGULARIZERS[name]()]), expected(name))


@pytest.mark.parametrize("name", ["optimizer", "L2", "proximal elastic net", "anchor", "constraint", "dropout"])
def test_what_fabric_is_given_may_be_attached_to_as_well(name):
    assert_identical_weights(in_fabric([REGULARIZERS[name]()], wrapped=False), expected(name))


def on_two(rank, world_size, loop, names):
    """Each process has its half of every batch."""
    callbacks = [REGULARIZERS[name]() for name in names]
    if loop == "Fabric":
        found = in_fabric(callbacks, strategy=FabricDDPStrategy(process_group_backend="gloo"), devices=2, rank=rank)
    else:
        strategy = DDPStrategy(process_group_backend="gloo")
        found = in_lightning(callbacks, strategy=strategy, devices=2, rank=rank)
    return {name: weight.tolist() for name, weight in found.items()}


@pytest.mark.parametrize(
    "names", [["optimizer", "L2", "proximal group lasso", "constraint"], ["anchor", "L1", "decoupled", "constrained"]]
)
def test_fabric_on_two_processes_ends_as_lightning_does(names):
    found, by_lightning = (run_distributed(on_two, loop, names) for loop in ("Fabric", "Lightning"))
    assert found == by_lightning


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


class Rows(torch.utils.data.Dataset):
    """The samples of the batches, one after the other."""

    def __init__(self):
        pairs = list(Batches(BATCHES))
        self.x, self.y = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}


def in_transformers(transformers, callback, folder, given, accumulate=1):
    class Attaching(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.attachment = callback.attach(optimizer, model, total_steps=state.max_steps)

        def on_train_end(self, *args, **kwargs):
            self.attachment.remove()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Net().build()
    optimizer, scheduler = adamw(model)
    if given:
        callback.attach(optimizer, model, total_steps=STEPS // accumulate)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        num_train_epochs=EPOCHS,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callbacks = [] if given else [Attaching()]
    options = {"train_dataset": Rows(), "optimizers": (optimizer, scheduler), "callbacks": callbacks}
    InOrder(model, arguments, **options).train()
    return weights(model)


@each
def test_the_trainer_of_transformers_ends_as_lightning_does(name, transformers, tmp_path):
    found = in_transformers(transformers, REGULARIZERS[name](), tmp_path, given=False)
    assert_identical_weights(found, expected(name))


@pytest.mark.parametrize("name", ["optimizer", "decoupled", "L1", "proximal group lasso", "anchor", "dropout"])
def test_an_optimizer_that_is_given_to_the_trainer_of_transformers(name, transformers, tmp_path):
    found = in_transformers(transformers, REGULARIZERS[name](), tmp_path, given=True)
    assert_identical_weights(found, expected(name))


@pytest.mark.parametrize("name", ["optimizer", "L1", "proximal L1", "constrained"])
def test_the_trainer_of_transformers_that_accumulates_ends_as_lightning_does(name, transformers, tmp_path):
    found = in_transformers(transformers, REGULARIZERS[name](), tmp_path, given=False, accumulate=2)
    assert_identical_weights(found, in_lightning([REGULARIZERS[name]()], accumulate_grad_batches=2))


# -- gradients that are scaled ---------------------------------------------------------------------------------------


def scaled_loop(callback, optimizer_class, *, fused, unscale, scale=2.0**10, overflow=(), position=False):
    """Powers of two change no bit of a gradient. In steps of ``overflow`` the gradients are infinite first."""
    model = Net().build(torch.float32)
    optimizer = optimizer_class(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, backoff_factor=0.5)
    done = []
    counted = {"position": lambda: len(done)} if position else {}
    callback.attach(optimizer, model, total_steps=STEPS + len(overflow) * position, **counted)
    for i, batch in enumerate(Stream(torch.float32)):
        for is_finite in (False, True) if i in overflow else (True,):
            optimizer.zero_grad()
            scaler.scale(model(*batch)["loss"] * (1.0 if is_finite else math.inf)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            done.append(i)
    return weights(model)


def unscaled_loop(callback, optimizer_class, fused, strengths=None):
    model = Net().build(torch.float32)
    optimizer = optimizer_class(model.parameters(), lr=0.05, fused=fused)
    callback.attach(optimizer, model, total_steps=STEPS)
    for batch in Stream(torch.float32):
        optimizer.zero_grad()
        model(*batch)["loss"].backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_gradients_are_exact_under_a_scaler(name, optimizer_class, fused, unscale):
    """A strength that is multiplied by the scale, which is a float32 tensor, is rounded once more."""
    found = scaled_loop(REGULARIZERS[name](), optimizer_class, fused=fused, unscale=unscale)
    tolerance = 2e-7 if fused and not unscale else 0.0
    assert_same_weights(found, unscaled_loop(REGULARIZERS[name](), optimizer_class, fused), atol=tolerance)


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("name", ["optimizer", "decoupled", "independent", "L1", "proximal L1", "constraint", "anchor"])
def test_nothing_acts_or_counts_in_a_step_that_a_scaler_skips(name, fused, unscale):
    found = scaled_loop(REGULARIZERS[name](), Adam, fused=fused, unscale=unscale, overflow=(0, 3, 4))
    assert_identical_weights(found, unscaled_loop(REGULARIZERS[name](), Adam, fused))


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_position_of_the_loops_own_counts_skipped_steps(fused):
    """14 steps are attempted, of which those with number 2 and 7 are skipped."""
    seen = []

    def watch(at):
        seen.append(at.step)
        return 0.01

    scaled_loop(L1Penalty(watch), SGD, fused=fused, unscale=False, overflow=(2, 6), position=True)
    used = list(dict.fromkeys(seen))
    assert [step for step in range(14) if step not in (2, 7)] == [step for step in used if step not in (2, 7)]
    assert max(used) == 13


# -- state -----------------------------------------------------------------------------------------------------------


class Loop:
    """A training that can be saved and gone on with."""

    def __init__(self, name, state=None, make=adamw, attach_first=False):
        self.model, self.callback = Net().build(), REGULARIZERS[name]()
        self.optimizer, self.scheduler = make(self.model)
        if state is not None:
            self.callback.load_state_dict(state["callback"])
            self.model.load_state_dict(state["model"])
        if attach_first:
            self.attach()
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        if not attach_first:
            self.attach()

    def attach(self):
        self.attachment = self.callback.attach(self.optimizer, self.model, total_steps=STEPS)

    def train(self, start=0, end=STEPS):
        for batch in Stream().batches[start:end]:
            self.optimizer.zero_grad()
            self.model(*batch)["loss"].backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def state(self):
        names = ("model", "optimizer", "scheduler", "callback")
        return {name: copy.deepcopy(getattr(self, name).state_dict()) for name in names}


@pytest.mark.parametrize("attach_first", [False, True], ids=["loaded, attached", "attached, loaded"])
@each
def test_a_plain_loop_goes_on_from_its_state(name, attach_first, tmp_path):
    torch.save(Loop(name).train(end=5).state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Loop(name, state, attach_first=attach_first).train(start=5)
    assert_identical_weights(weights(resumed.model), expected(name))


@each
def test_a_state_that_comes_too_late_is_an_error(name):
    state = Loop(name).train(end=5).state()["callback"]
    loop = Loop(name)
    with pytest.raises(RuntimeError, match=rf"^{type(loop.callback).__name__} is attached, .* load it before `attach`"):
        loop.callback.load_state_dict(state)
    loop.attachment.remove()
    loop.callback.load_state_dict(state)


@pytest.mark.parametrize("has_closure", [False, True])
def test_an_inner_optimizer_that_replaces_another_one_acts_from_its_first_step(has_closure):
    model, twin = Net().build(), Net().build()
    kept = [name for name, p in twin.named_parameters() if p.ndim > 1]

    def made(side, groups):
        by_hand = [
            {"params": [p for n, p in side.named_parameters() if (n in kept) is decays]} for decays in (True, False)
        ]
        return AdamW(
            [{**by_hand[0], "weight_decay": 0.3}, {**by_hand[1], "weight_decay": 0.0}] if groups else side.parameters(),
            lr=0.1,
        )

    optimizer, hand_made = Around(made(model, groups=False)), made(twin, groups=True)
    WeightDecay(0.3).attach(optimizer, model)
    for i, batch in enumerate(Stream().batches[:6]):
        if i == 3:
            optimizer.use(made(model, groups=False))
            hand_made = made(twin, groups=True)
        for side, each in ((model, optimizer), (twin, hand_made)):

            def closure(side=side, batch=batch):
                side.zero_grad()
                loss = side(*batch)["loss"]
                loss.backward()
                return loss

            if has_closure:
                each.step(closure)
            else:
                closure()
                each.step()
    assert_identical_weights(weights(model), weights(twin))


@pytest.mark.parametrize("name", ["optimizer", "decoupled", "L1", "constrained"])
def test_a_state_that_is_not_loaded_begins_anew(name):
    state = Loop(name).train(end=5).state()
    state["callback"] = {}
    found = weights(Loop(name, state).train(start=5).model)
    assert any(not torch.equal(weight, expected(name)[key]) for key, weight in found.items())


@pytest.mark.parametrize("order", ["before", "after"])
@each
def test_the_step_that_dcp_makes_to_learn_what_state_there_is_neither_acts_nor_counts(name, order):
    """Of a fresh optimizer, in a process that has not made a step yet."""
    saved = Loop(name).train(end=5)
    state = saved.state()
    of_optimizer = get_optimizer_state_dict(saved.model, saved.optimizer)
    loop = Loop.__new__(Loop)
    loop.model, loop.callback = Net().build(), REGULARIZERS[name]()
    loop.optimizer, loop.scheduler = adamw(loop.model)
    loop.callback.load_state_dict(state["callback"])
    if order == "before":
        loop.model.load_state_dict(state["model"])
        loop.attach()
        before = weights(loop.model)
        set_optimizer_state_dict(loop.model, loop.optimizer, of_optimizer)
        assert_identical_weights(weights(loop.model), before)
    else:
        set_optimizer_state_dict(loop.model, loop.optimizer, of_optimizer)
        loop.model.load_state_dict(state["model"])
        loop.attach()
    loop.scheduler.load_state_dict(state["scheduler"])
    loop.train(start=5)
    assert_identical_weights(weights(loop.model), expected(name))


# -- removing --------------------------------------------------------------------------------------------------------


def two_groups(model):
    """With values that the user gave, of which the ratio is kept."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.1}], lr=0.05)
    return optimizer, LambdaLR(optimizer, lambda step: 1.0)


def left_on(optimizer):
    """What an optimizer has besides its state: values of groups, attributes, hooks."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    return groups, vars(optimizer).keys() - {"step", "_opt_called"}, hooks  # torch's schedulers count by these


@pytest.mark.filterwarnings("ignore:.* decays weights by weight_decay=0.3 that ConstrainedDecay:UserWarning")
@pytest.mark.parametrize("scheduler_first", [True, False], ids=["scheduler first", "scheduler last"])
@each
def test_remove_leaves_nothing_behind(name, scheduler_first):
    model, callback = Net().build(), REGULARIZERS[name]()
    optimizer, scheduler = two_groups(model)
    dictionaries, before = list(optimizer.param_groups), left_on(optimizer)
    attachment = callback.attach(optimizer, model, total_steps=STEPS)
    if not scheduler_first:
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
    for batch in Stream().batches[:4]:
        optimizer.zero_grad()
        model(*batch)["loss"].backward()
        optimizer.step()
        scheduler.step()
    attachment.remove()
    attachment.remove()
    assert all(a is b for a, b in zip(optimizer.param_groups, dictionaries, strict=True))
    assert left_on(optimizer) == before
    assert model.fading.drop_prob == 0.0
    twin = Net().build()
    twin.load_state_dict(model.state_dict())
    by_hand, _ = two_groups(twin)
    by_hand.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in Stream().batches[4:]:
        for each_model, each_optimizer in ((model, optimizer), (twin, by_hand)):
            each_optimizer.zero_grad()
            each_model(*batch)["loss"].backward()
            each_optimizer.step()
    assert_identical_weights(weights(model), weights(twin))


def test_constrained_decay_says_that_the_optimizer_decays_as_well():
    """As it does in a Trainer."""

    def attach_and_step():
        model = Net().build()
        optimizer, _ = two_groups(model)
        REGULARIZERS["constrained"]().attach(optimizer, model)
        model(*Stream().batches[0])["loss"].backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"decays weights by weight_decay=0.3 .* set it to 0"):
        attach_and_step()


def test_a_removed_callback_can_be_attached_again_and_begins_anew():
    callback = REGULARIZERS["optimizer"]()
    for _ in range(2):
        assert_identical_weights(in_a_plain_loop([callback]), expected("optimizer"))


def test_an_attachment_is_a_context():
    model, callback = Net().build(), WeightDecay(0.5)
    optimizer, _ = two_groups(model)
    with contextlib.suppress(ZeroDivisionError), callback.attach(optimizer, model):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        raise ZeroDivisionError
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.1]


@each
def test_a_callback_that_is_removed_holds_nothing(name):
    loop = Loop(name).train(end=2)
    references = [weakref.ref(thing) for thing in (loop.model, loop.optimizer, loop.model.hidden.weight)]
    loop.attachment.remove()
    callback = loop.callback
    del loop
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert callback.arguments


# -- errors ----------------------------------------------------------------------------------------------------------


class Other(nn.Module):
    """Has none of the parameters that the optimizer holds."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 6)


REFUSED = (ValueError, MisconfigurationException)
SCHEDULED = ["optimizer", "coupled", "decoupled", "L1", "proximal L1", "elastic net", "anchor", "dropout"]


@pytest.mark.parametrize(
    "thing",
    [nn.Linear(2, 2), SGD, None, [], iter(()), torch.optim.lr_scheduler.LRScheduler],
    ids=lambda thing: type(thing).__name__,
)
@pytest.mark.parametrize("name", ["optimizer", "L1", "constraint"])
def test_what_is_no_optimizer_is_refused(name, thing):
    message = rf"^{type(REGULARIZERS[name]()).__name__}.attach: `optimizer` should be a torch.optim.Optimizer, got "
    with pytest.raises(TypeError, match=message):
        REGULARIZERS[name]().attach(thing, Net().build(), total_steps=STEPS)


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (lambda optimizer, model: model, "got Net. Write attach(optimizer, module)."),
        (lambda optimizer, model: [optimizer], "got list. Attach to each of several optimizers a callback of its own."),
        (lambda optimizer, model: LambdaLR(optimizer, float), "got LambdaLR. Give the `optimizer` of that."),
        (lambda optimizer, model: SGD, "got SGD."),
    ],
    ids=["module", "list", "scheduler", "class"],
)
def test_what_is_no_optimizer_is_told_what_to_write_instead(wrap, advice):
    model = Net().build()
    thing = wrap(adamw(model)[0], model)
    with pytest.raises(TypeError, match=re.escape(advice)):
        L1Penalty(0.1).attach(thing, model)


POSITIONS = {
    "0": 0,
    "'step'": "step",
    "a function that returns None": lambda: None,
    "a function that returns 1.0": lambda: 1.0,
    "a function that returns -1": lambda: -1,
    "a function that returns tensor(3)": lambda: torch.tensor(3),
}


@pytest.mark.parametrize("found", POSITIONS)
def test_a_position_that_gives_no_number_of_a_step_is_refused(found):
    model, position = Net().build(), POSITIONS[found]
    optimizer, _ = adamw(model)
    before = left_on(optimizer)
    message = rf"^L1Penalty.attach: `position` should be a function .* got {re.escape(found)}\. Write"
    with pytest.raises(TypeError, match=message):
        L1Penalty(0.1).attach(optimizer, model, position=position)
    assert left_on(optimizer) == before


@pytest.mark.parametrize(
    "thing", [None, dict(Net().build().named_parameters()), Net, 3], ids=lambda thing: type(thing).__name__
)
@pytest.mark.parametrize("name", ["optimizer", "L1", "anchor"])
def test_what_is_no_module_is_refused(name, thing):
    optimizer, _ = adamw(Net().build())
    with pytest.raises(TypeError, match=r"`module` should be a torch.nn.Module, got "):
        REGULARIZERS[name]().attach(optimizer, thing, total_steps=STEPS)


@each
def test_a_callback_that_is_attached_cannot_be_attached_again(name):
    model = Net().build()
    optimizer, _ = adamw(model)
    callback = REGULARIZERS[name]()
    callback.attach(optimizer, model, total_steps=STEPS)
    with pytest.raises(RuntimeError, match=r"in use already.*remove\(\)"):
        callback.attach(optimizer, model, total_steps=STEPS)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_needs_to_know_when_it_ends(name):
    model = Net().build()
    optimizer, _ = adamw(model)
    before = left_on(optimizer)
    with pytest.raises(ValueError, match=r"needs to know how many steps the run has: give `total_steps`"):
        REGULARIZERS[name]().attach(optimizer, model)
    assert left_on(optimizer) == before


@pytest.mark.parametrize("total_steps", [0, -3, 2.5, "10", True], ids=repr)
@pytest.mark.parametrize("name", ["optimizer", "L1", "constraint"])
def test_a_number_of_steps_is_checked(name, total_steps):
    model = Net().build()
    with pytest.raises((ValueError, TypeError), match=r"^\w+.attach: `total_steps` should be a "):
        REGULARIZERS[name]().attach(adamw(model)[0], model, total_steps=total_steps)


@pytest.mark.parametrize("name", MONITORS)
def test_a_callback_that_does_nothing_without_a_trainer_says_so(name):
    callback = MONITORS[name]()
    model = Net().build()
    optimizer, _ = adamw(model)
    before = left_on(optimizer)
    with pytest.raises(TypeError, match=f"{type(callback).__name__} .*Trainer"):
        callback.attach(optimizer, model)
    assert left_on(optimizer) == before


@pytest.mark.parametrize(
    "name", [name for name in REGULARIZERS if name not in ("dropout", "L2", "proximal elastic net")]
)
def test_a_module_that_does_not_hold_the_parameters_is_refused(name):
    optimizer, _ = adamw(Net().build())
    callback = REGULARIZERS[name]()
    if name in ("optimizer", "anchor"):
        callback = type(callback)(0.1)  # without rules that match nothing there
    before = left_on(optimizer)
    with pytest.raises((*REFUSED, UserWarning), match=r"holds none of the parameters|no optimizer trains a parameter"):
        callback.attach(optimizer, Other(), total_steps=STEPS)
    assert left_on(optimizer) == before


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: WeightDecay(0.1, exclude=("*.missing",)), r"missing"),
        (lambda: L1Penalty(0.1, include=("encoder.*",)), r"L1Penalty.*encoder\.\*"),
        (lambda: WeightConstraint(FrobeniusBall(1.0), include=("head.*",)), r"WeightConstraint.*head\.\*"),
        (lambda: AnchorDecay(0.1, anchor={"hidden.weight": torch.ones(1)}), r"anchor"),
    ],
    ids=["WeightDecay", "L1Penalty", "WeightConstraint", "AnchorDecay"],
)
def test_rules_that_match_nothing_are_told_and_leave_nothing_behind(callback, message):
    model, callback = Net().build(), callback()
    optimizer, _ = two_groups(model)
    before = left_on(optimizer)
    with pytest.raises(REFUSED, match=message):
        callback.attach(optimizer, model)
    assert left_on(optimizer) == before
    with pytest.raises(REFUSED, match=message):  # and not: in use already
        callback.attach(optimizer, model)


@pytest.mark.parametrize(
    ("callback", "optimizer_class", "message"),
    [
        (lambda: WeightDecay(0.1), LBFGS, "no `weight_decay`.*decoupled"),
        (lambda: WeightDecay(0.1, method="stable"), torch.optim.RMSprop, "RMSprop"),
        (lambda: L1Penalty(0.1, method="proximal"), torch.optim.Adadelta, "Adadelta.*method='gradient'"),
    ],
    ids=["WeightDecay", "stable", "proximal"],
)
def test_an_optimizer_that_cannot_work_is_refused(callback, optimizer_class, message):
    model = Net().build()
    with pytest.raises(REFUSED, match=message):
        callback().attach(optimizer_class(model.parameters(), lr=0.1), model)


def test_two_weight_decays_on_one_optimizer_are_refused():
    model = Net().build()
    optimizer, _ = two_groups(model)
    WeightDecay(0.1).attach(optimizer, model)
    with pytest.raises(REFUSED, match=r"([Tt]wo|2) WeightDecay"):
        WeightDecay(0.2).attach(optimizer, model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
