"""Does a message name the callback and the argument, and say what to write instead?"""

import copy
import functools
import inspect
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, StepLR

from lightning_regularize import (
    ActivationPenalty,
    AnchorDecay,
    ChainedOptimizer,
    ConstrainedDecay,
    DropoutSchedule,
    ElasticNetPenalty,
    GroupLassoPenalty,
    L1Penalty,
    L2Penalty,
    RegularizedModule,
    WeightConstraint,
    WeightDecay,
    WeightNormMonitor,
    WeightPenalty,
    param_groups,
)
from lightning_regularize.callbacks.generalization_gap import GeneralizationGapMonitor
from lightning_regularize.penalties import Orthogonal
from lightning_regularize.projections import FrobeniusBall, FrobeniusSphere, MaxNorm, SpectralBall, UnitNorm
from lightning_regularize.schedules import Cosine, FromLRScheduler, Join, Linear, Steps, Warmup
from lightning_regularize.selection import DEFAULT_EXCLUDE
from tests.models import VisionTransformer
from tests.training.support import QUIET, Batches, Regression, make_trainer

pytestmark = QUIET


def scheduler(kind=StepLR, **options):
    return kind(SGD([nn.Parameter(torch.ones(1))], lr=0.1), **options)


class Settings(OrderedDict):
    """A mapping that is no dict, as those of omegaconf."""


ARGUMENTS = {
    "one quantity": (
        lambda: WeightNormMonitor(quantities="weight"),
        r"WeightNormMonitor: `quantities` should be some of .*, got 'weight'\. Write \('weight',\)\.",
    ),
    "a class's name": (
        lambda: WeightDecay(0.1, exclude=("LayerNorm",)),
        r"WeightDecay: `exclude` .* got 'LayerNorm'\. For a class write 'type:LayerNorm'\.$",
    ),
    "a part of a name": (
        lambda: L1Penalty(0.1, include=("head",)),
        r"L1Penalty: `include` .* got 'head'\. To match names write '\*head\*'\.$",
    ),
    "one kind": (
        lambda: L2Penalty(0.1, exclude="bias"),
        r"L2Penalty: `exclude` should be a sequence of rules, got 'bias'; one alone is \('bias',\)\.",
    ),
    "one class": (
        lambda: ConstrainedDecay(exclude=nn.LayerNorm),
        r"ConstrainedDecay: `exclude` should be a sequence of rules, got <class .*>; one alone is \(LayerNorm,\)\.",
    ),
    "a set": (
        lambda: AnchorDecay(0.1, exclude={"bias"}),
        r"AnchorDecay: `exclude` should be a sequence of rules, got {'bias'}; a list or a tuple is one\.",
    ),
    "AdamW's decay": (
        lambda: WeightDecay(0.1, method="adamw"),
        r"WeightDecay: `method` .* got 'adamw'\. AdamW's is 'optimizer' with AdamW itself, else 'decoupled'\.$",
    ),
    "a decay as L2": (
        lambda: WeightDecay(0.1, method="L2"),
        r"WeightDecay: `method` .* got 'L2'\. It is 'coupled'\.$",
    ),
    "another method": (lambda: WeightDecay(0.1, method="strong"), r"WeightDecay: `method` .* got 'strong'\.$"),
    "factors in a list": (
        lambda: WeightDecay(0.1, factors=["bias"]),
        r"WeightDecay: `factors` should map rules to numbers, got \['bias'\]\. Write, for example, {",
    ),
    "a number of YAML": (
        lambda: WeightDecay("1e-4"),
        r"WeightDecay: `weight_decay` .* got '1e-4'\. Write 0\.0001 without quotes; in YAML 1\.0e-4",
    ),
    "a strength in quotes": (
        lambda: GroupLassoPenalty("0.1"),
        r"GroupLassoPenalty: `strength` .* got '0\.1'\. Write 0\.1 without quotes\.$",
    ),
    "a factor in quotes": (
        lambda: WeightDecay(0.1, factors={"bias": "0.5"}),
        r"WeightDecay: the factor of 'bias' should be a number, got '0\.5'\. Write 0\.5 without quotes\.",
    ),
    "a bound in quotes": (lambda: MaxNorm("3"), r"`max_norm` should be a number, got '3'\. Write 3 without quotes\."),
    "an end in quotes": (lambda: Linear(0.1, "0"), r"`end` .* got '0'\. Write 0 without quotes\."),
    "a text that is no number": (lambda: DropoutSchedule("high"), r"DropoutSchedule: `p` .* got 'high'\.$"),
    "a class of schedules": (
        lambda: WeightDecay(Cosine),
        r"WeightDecay: `weight_decay` .* A class is not a schedule yet: write Cosine\(\.\.\.\), with its values\.",
    ),
    "a class inside": (lambda: Warmup(Linear, steps=3), r"`schedule` .* write Linear\(\.\.\.\), with its values\."),
    "a scheduler of torch": (
        lambda: L1Penalty(scheduler(step_size=3)),
        r"L1Penalty: `strength` .* write FromLRScheduler\(functools\.partial\(StepLR, \.\.\.\)\)\.",
    ),
    "a class of torch's schedulers": (
        lambda: DropoutSchedule(CosineAnnealingLR),
        r"DropoutSchedule: `p` .* write FromLRScheduler\(functools\.partial\(CosineAnnealingLR, \.\.\.\)\)\.",
    ),
    "a scheduler as factory": (
        lambda: FromLRScheduler(scheduler(ExponentialLR, gamma=0.9)),
        r"`factory` .* write FromLRScheduler\(functools\.partial\(ExponentialLR, \.\.\.\)\)\.",
    ),
    "a factory that needs more": (
        lambda: FromLRScheduler(StepLR),
        r"`factory` .* missing 1 required .* Give it the rest, as in functools\.partial\(StepLR, \.\.\.\)\.",
    ),
    "steps as a float": (
        lambda: WeightDecay(0.1, total_steps=1e4),
        r"WeightDecay: `total_steps` should be a positive integer or None, got 10000\.0\. Write 10000\.",
    ),
    "a boundary as a float": (
        lambda: Steps([0.1, 0.2], [100.0]),
        r"`boundaries` should be in \[0, 1\] .* got 100\.0\. As a step write the integer 100\.",
    ),
    "a path": (
        lambda: AnchorDecay(0.1, anchor="x.ckpt"),
        r"AnchorDecay: `anchor` .* write torch\.load\('x\.ckpt', weights_only=True\)\['state_dict'\]\.",
    ),
    "a pathlib path": (lambda: AnchorDecay(0.1, anchor=Path("x.pt")), r"write torch\.load\('x\.pt', weights_only=True"),
    "a module": (lambda: AnchorDecay(0.1, anchor=nn.Linear(2, 2)), r"Of a module write `module\.state_dict\(\)`\."),
    "a configuration": (
        lambda: Join([{"_target_": "lightning_regularize.schedules.Linear", "start": 0.0, "end": 1.0}], []),
        r"`schedules` .* write `_convert_: all` beside the `_target_` that has the list\.",
    ),
    "settings": (lambda: Join([Settings(start=0.0, end=1.0), 0.1], [5]), r"write `_convert_: all`"),
    "a dictionary": (lambda: Warmup({"start": 0.0, "end": 1.0}, steps=3), r"a schedule is made by its class\."),
    "a metric that is empty": (lambda: GeneralizationGapMonitor(""), "GeneralizationGapMonitor: `metric` should be"),
    "a rate of 1": (lambda: DropoutSchedule(1.0), "^DropoutSchedule: A dropout rate should be in"),
    "both are 0": (lambda: ElasticNetPenalty(0.0, 0.0), "ElasticNetPenalty: "),
    "no projection": (lambda: WeightConstraint(3.0), r"WeightConstraint: `projection` .* such as MaxNorm\(3\.0\)"),
    "a class of projections": (
        lambda: WeightConstraint(MaxNorm),
        r"WeightConstraint: `projection` .* A class is not a projection yet: write MaxNorm\(\.\.\.\)\.$",
    ),
    "zeros frozen at the end": (
        lambda: WeightConstraint(MaxNorm(3.0), freeze_zeros="end"),
        r"WeightConstraint: `freeze_zeros` should be .*, got 'end'\. Write an integer for a step, a float in \[0, 1\]",
    ),
    "one module's name": (
        lambda: DropoutSchedule(0.1, include="drop"),
        r"DropoutSchedule: `include` should be .*, got 'drop'; one alone is \('drop',\)\.$",
    ),
    "one module's class": (
        lambda: ActivationPenalty(0.1, include=nn.ReLU),
        r"ActivationPenalty: `include` should be .*; one alone is \(ReLU,\)\.$",
    ),
    "a module among names": (
        lambda: ActivationPenalty(0.1, include=[nn.ReLU()]),
        r"ActivationPenalty: `include` should be .*; of a module give its name or its class, ReLU\.$",
    ),
    "a rule of several optimizers": (
        lambda: ChainedOptimizer(nn.Linear(2, 2), {"x.*": SGD, "*": SGD}),
        r"ChainedOptimizer: `optimizers`: 'x\.\*' matches no parameter",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_bad_argument_is_told_with_what_to_write(case):
    make, message = ARGUMENTS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_the_signature_of_a_constructor_stays():
    assert list(inspect.signature(DropoutSchedule).parameters) == ["p", "include", "attributes", "same", "total_steps"]


@pytest.mark.parametrize(
    "function",
    [lambda step: 0.1 * step, lambda step: 1 / (1 + step), lambda step, total: step / total, lambda: 0.1],
    ids=["a product", "a quotient", "two arguments", "no argument"],
)
@pytest.mark.parametrize("callback", [WeightDecay, L1Penalty, AnchorDecay, DropoutSchedule])
def test_a_function_of_the_step_is_told_before_weights_change(callback, function):
    module = Regression()
    module.drop = nn.Dropout(0.1)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        TypeError,
        match=rf"^{callback.__name__}: .* should take a `Position`, and failed with one: .*`lambda at: \.\.\. at\.step",
    ):
        make_trainer(callback(function), max_epochs=1).fit(module, Batches())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def of_own_position(at):
    return at.nothing


def test_an_error_of_a_function_that_is_not_of_its_type_stays_as_it_is():
    with pytest.raises(AttributeError, match="nothing"):
        make_trainer(WeightDecay(of_own_position), max_epochs=1).fit(Regression(), Batches())


# --- rules that match nothing -------------------------------------------------------------------------------------

IDLE = {
    "exclude": (lambda: WeightDecay(0.1, exclude=("*.hed.*",)), r"WeightDecay: `exclude`: '\*\.hed\.\*' matches no"),
    "factors": (lambda: WeightDecay(0.1, factors={"x.*": 2.0}), r"WeightDecay: `factors`: 'x\.\*' matches no"),
    "include": (lambda: L1Penalty(0.1, include=("x.*",)), r"L1Penalty: `include`: 'x\.\*' matches no parameter"),
    "type": (
        lambda: WeightConstraint(MaxNorm(1.0), exclude=("type:LayerNrm",)),
        "WeightConstraint: `exclude`: 'type:LayerNrm' matches no parameter; the nearest are",
    ),
    "anchor": (lambda: AnchorDecay(0.1, include=("x.*",)), r"AnchorDecay: `include`: 'x\.\*' matches no"),
    "constrained": (lambda: ConstrainedDecay(exclude=("x.*",)), r"ConstrainedDecay: `exclude`: 'x\.\*' matches no"),
    "monitor": (lambda: WeightNormMonitor(include=("x.*",)), r"WeightNormMonitor: `include`: 'x\.\*' matches no"),
    "monitor, exclude": (lambda: WeightNormMonitor(exclude=("x.*",)), r"WeightNormMonitor: `exclude`: 'x\.\*' matches"),
    "dropout": (lambda: DropoutSchedule(0.1, include=("drop", "x.*")), r"DropoutSchedule: .* by `include` \['x\.\*'\]"),
    "dropout, nothing": (lambda: DropoutSchedule(0.1, include=("x.*",)), r"DropoutSchedule: .* matches `include`"),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_rule_that_matches_nothing_names_callback_and_argument(case, tmp_path):
    make, message = IDLE[case]
    module = Regression()
    module.drop = nn.Dropout(0.1)
    others = [L2Penalty(0.1), DropoutSchedule(0.1), GroupLassoPenalty(0.1, include=("hidden.weight",))]
    others = [other for other in others if type(other) is not type(make())]
    trainer = make_trainer(*others, make(), max_epochs=1, logger=True, default_root_dir=tmp_path)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer.fit(module, Batches())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: param_groups(nn.Linear(2, 2), 0.1, exclude=("x.*",)), r"`exclude`: 'x\.\*' matches no parameter"),
        (lambda: param_groups(nn.Linear(2, 2), 0.1, factors={"x.*": 2.0}), r"`factors`: 'x\.\*' matches no parameter"),
        (lambda: RegularizedModule(exclude=("LayerNorm",)), "`exclude` .* write 'type:LayerNorm'"),
    ],
    ids=["exclude", "factors", "module"],
)
def test_functions_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- weights that have no units, and weights of norm zero ---------------------------------------------------------


@pytest.mark.parametrize("projection", [MaxNorm(0.1), UnitNorm(), SpectralBall(0.1)], ids=repr)
def test_a_token_is_told_with_the_rule_that_leaves_it_out(projection):
    class Seeing(Regression):
        def __init__(self):
            super().__init__()
            self.vit = VisionTransformer().double()

        def loss(self, batch):
            return self.vit(self.vit.example().double()).square().mean()

    message = r"WeightConstraint: 'vit\.cls_token': .* shape \(1, 1, 8\)\. .*`exclude=\(\"\*cls_token\",\)`"
    with pytest.raises(ValueError, match=message):
        make_trainer(WeightConstraint(projection), max_epochs=1).fit(Seeing(), Batches(1))
    constraint = WeightConstraint(projection, exclude=("*cls_token", "*pos_embed"))
    make_trainer(constraint, max_epochs=1).fit(Seeing(), Batches(1))


class LoRA(Regression):
    """An adapter whose second matrix begins at zero."""

    def __init__(self, *, is_frozen):
        super().__init__()
        self.down, self.up = nn.Linear(4, 1, bias=False).double(), nn.Linear(1, 4, bias=False).double()
        nn.init.zeros_(self.up.weight)
        self.up.weight.requires_grad_(not is_frozen)

    def loss(self, batch):
        return super().loss(batch) + self.up(self.down(self.hidden(batch[0]))).sum()


RELATIVE = [FrobeniusBall(0.5, relative=True), FrobeniusSphere(1.0, relative=True), FrobeniusSphere(2.0, relative=True)]


@pytest.mark.parametrize("projection", RELATIVE, ids=repr)
def test_a_weight_of_norm_zero_is_named(projection):
    constraint = WeightConstraint(projection)
    with pytest.raises(ValueError, match=r"'up\.weight': A relative .* got 0\.0.* `exclude=\('up\.weight',\)`"):
        make_trainer(constraint, max_epochs=1).fit(LoRA(is_frozen=False), Batches())


@pytest.mark.parametrize("projection", RELATIVE, ids=repr)
def test_a_frozen_weight_is_not_looked_at_until_it_is_trained(projection):
    module = LoRA(is_frozen=True)
    make_trainer(WeightConstraint(projection), max_epochs=1).fit(module, Batches())
    assert not module.up.weight.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_a_frozen_quantized_weight_is_not_looked_at(dtype):
    class Quantized(Regression):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(3, 2, bias=False)
            self.base.weight = nn.Parameter(torch.ones(2, 3).to(dtype), requires_grad=False)

    constraint = WeightConstraint(FrobeniusBall(0.5, relative=True))
    make_trainer(constraint, max_epochs=1).fit(Quantized(), Batches())


def test_a_weight_that_is_trained_later_is_relative_to_what_it_was():
    class Thawed(Regression):
        def on_train_epoch_start(self):
            self.output.weight.requires_grad_(self.current_epoch > 0)

    module = Thawed()
    module.output.weight.requires_grad_(False)
    radius = 0.5 * module.output.weight.detach().norm().item()
    constraint = WeightConstraint(FrobeniusBall(0.5, relative=True), include=("output.weight", "hidden.weight"))
    make_trainer(constraint, max_epochs=2).fit(module, Batches())
    assert module.output.weight.norm().item() <= radius
    assert module.output.weight.norm().item() == pytest.approx(radius, rel=1e-6, abs=0)


# --- pickling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: WeightDecay(lambda at: 0.1), "weight_decay"),
        (lambda: WeightDecay(Warmup(lambda at: 0.1, steps=3)), "weight_decay"),
        (lambda: WeightDecay(0.1, factors={(lambda info: True): 0.5}), "factors"),
        (lambda: L1Penalty(FromLRScheduler(lambda optimizer: StepLR(optimizer, 3))), "strength"),
        (lambda: L1Penalty(0.1, include=(lambda info: True,)), "include"),
        (lambda: WeightConstraint(MaxNorm(1.0), exclude=(lambda info: False,)), "exclude"),
        (lambda: DropoutSchedule(lambda at: 0.1), "p"),
    ],
    ids=["weight decay", "nested", "factors", "factory", "include", "exclude", "dropout"],
)
def test_a_lambda_that_cannot_be_pickled_is_named_and_can_be_copied(make, argument):
    callback = make()
    message = f"{type(callback).__name__}: `{argument}` cannot be pickled, which strategies that spawn processes need"
    with pytest.raises(pickle.PicklingError, match=message):
        pickle.dumps(callback)
    for copied in (copy.copy(callback), copy.deepcopy(callback)):
        assert type(copied) is type(callback)
        assert copied is not callback
        assert repr(copied) == repr(callback)


def test_what_is_defined_in_a_module_can_be_pickled():
    schedule = FromLRScheduler(functools.partial(StepLR, step_size=3))
    anchor = {"weight": torch.ones(2, 2)}
    for callback in (WeightDecay(of_own_position), L1Penalty(schedule), AnchorDecay(0.1, anchor=anchor)):
        assert type(pickle.loads(pickle.dumps(callback))) is type(callback)


# -- sparse gradients --------------------------------------------------------------------------------------------------


class Sparse(Regression):
    """Its embedding has gradients for the rows that were looked up."""

    def __init__(self, make_optimizer, kind=nn.Embedding):
        super().__init__(make_optimizer)
        self.embedding = kind(6, 4, sparse=True).double()

    def loss(self, batch):
        return super().loss(batch) + self.embedding(torch.tensor([[0, 3]])).sum()


class Embeddings(nn.EmbeddingBag):
    """A class of one's own."""


SPARSE = {
    "SGD": (functools.partial(SGD, lr=0.1), nn.Embedding),
    "Adagrad": (functools.partial(torch.optim.Adagrad, lr=0.1), nn.Embedding),
    "a bag": (functools.partial(SGD, lr=0.1), Embeddings),
}


@pytest.mark.parametrize(("make", "kind"), SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("method", ["optimizer", "coupled"])
def test_sparse_gradients_are_named_before_any_weight_changes(make, kind, method):
    module = Sparse(make, kind)
    before = module.embedding.weight.detach().clone()
    message = r"\['embedding\.weight'\] have sparse gradients.*`exclude=\(\*DEFAULT_EXCLUDE, \"embedding\"\)`"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(WeightDecay(0.1, method=method), max_steps=2).fit(module, Batches())
    assert torch.equal(module.embedding.weight, before)


ALLOWED = {
    "excluded": WeightDecay(0.1, exclude=(*DEFAULT_EXCLUDE, "embedding")),
    "decoupled": WeightDecay(0.1, method="decoupled"),
    "none": WeightDecay(0.0),
    "as given": WeightDecay(None),
}


@pytest.mark.parametrize("callback", ALLOWED.values(), ids=ALLOWED)
def test_sparse_gradients_to_which_nothing_is_added(callback):
    make_trainer(copy.copy(callback), max_steps=2).fit(Sparse(functools.partial(SGD, lr=0.1)), Batches())


@pytest.mark.parametrize(
    "penalty", [L1Penalty(0.1), GroupLassoPenalty(0.1), WeightPenalty(Orthogonal(), 0.1)], ids=repr
)
def test_penalties_name_what_has_sparse_gradients_before_any_weight_changes(penalty):
    module = Sparse(functools.partial(SGD, lr=0.1))
    before = module.hidden.weight.detach().clone()
    message = type(penalty).__name__ + r".*\['embedding\.weight'\] have sparse gradients.*`exclude="
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(penalty, max_steps=2).fit(module, Batches())
    assert torch.equal(module.hidden.weight, before)


@pytest.mark.parametrize("callback", [WeightDecay(0.1), L1Penalty(0.1)], ids=repr)
def test_a_sparse_embedding_that_is_frozen(callback):
    module = Sparse(functools.partial(SGD, lr=0.1))
    module.embedding.requires_grad_(False)
    make_trainer(callback, max_steps=2).fit(module, Batches())


class Router(nn.Module):
    """Its ``sparse`` says something else."""

    def __init__(self):
        super().__init__()
        self.sparse, self.table = True, nn.Parameter(torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("callback", [WeightDecay(0.1), L1Penalty(0.1)], ids=repr)
def test_only_embeddings_have_sparse_gradients(callback):
    module = Regression(functools.partial(SGD, lr=0.1))
    module.router = Router()
    make_trainer(callback, max_steps=2).fit(module, Batches())
