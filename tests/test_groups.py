"""Oracles: splits written out by hand, what torch does with hand-made or unsplit groups, BEiT's and timm's layers."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers

from lightning_regularize.groups import (
    Description,
    Grouping,
    adapt_state_dict,
    describe,
    extend_plan_,
    find_optimizers,
    param_groups,
    plan_groups,
    repair_scheduler_,
)
from lightning_regularize.selection import parameter_infos
from tests.models import MLP, MODELS, ConvNet, LanguageModel, VisionTransformer

torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost ten times what the work does


def build(model, **options):
    """A model whose weights are always the same."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model(**options)


def names_of(module, parameters):
    name = {id(parameter): name for name, parameter in module.named_parameters()}
    return [name[id(parameter)] for parameter in parameters]


def split_of(module, groups):
    return {group["name"]: names_of(module, group["params"]) for group in groups}


def infos_of(module):
    return {id(info.parameter): info for info in parameter_infos(module)}


def regroup_(optimizer, module, *, exclude=("bias", "norm", "vector"), factors=None, scheduler=None):
    """What the package does as `configure_optimizers` returns."""
    before = [dict(group) for group in optimizer.param_groups]
    plan = plan_groups(optimizer, Grouping(exclude, factors or {}), infos_of(module))
    if scheduler is not None:
        repair_scheduler_(scheduler, plan.origins, before)
    return plan


def train(module, optimizer, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        module(module.example()).square().mean().backward()
        optimizer.step()


def assert_same_weights(module, other):
    for (name, parameter), (_, expected) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, expected), name


# The split, by hand

RESNET_DECAY = [
    "conv1.weight",
    "layer1.0.conv1.weight",
    "layer1.0.conv2.weight",
    "layer2.0.conv1.weight",
    "layer2.0.conv2.weight",
    "layer2.0.downsample.0.weight",
    "fc.weight",
]
RESNET_NO_DECAY = [
    "bn1.weight",
    "bn1.bias",
    "layer1.0.bn1.weight",
    "layer1.0.bn1.bias",
    "layer1.0.bn2.weight",
    "layer1.0.bn2.bias",
    "layer2.0.bn1.weight",
    "layer2.0.bn1.bias",
    "layer2.0.bn2.weight",
    "layer2.0.bn2.bias",
    "layer2.0.downsample.1.weight",
    "layer2.0.downsample.1.bias",
    "fc.bias",
]
VIT_DECAY = [
    "patch_embed.weight",
    "blocks.0.attn.in_proj_weight",
    "blocks.0.attn.out_proj.weight",
    "blocks.0.mlp.0.weight",
    "blocks.0.mlp.2.weight",
    "head.weight",
]
VIT_NO_DECAY = [
    "cls_token",
    "pos_embed",
    "patch_embed.bias",
    "blocks.0.norm1.weight",
    "blocks.0.norm1.bias",
    "blocks.0.attn.in_proj_bias",
    "blocks.0.attn.out_proj.bias",
    "blocks.0.ls1.gamma",
    "blocks.0.norm2.weight",
    "blocks.0.norm2.bias",
    "blocks.0.mlp.0.bias",
    "blocks.0.mlp.2.bias",
    "blocks.0.ls2.gamma",
    "norm.weight",
    "norm.bias",
    "head.bias",
]
LLAMA_DECAY = [
    "embed_tokens.weight",  # and lm_head.weight, which is the same tensor
    "layers.0.qkv_proj.weight",
    "layers.0.o_proj.weight",
    "layers.0.gate_up_proj.weight",
    "layers.0.down_proj.weight",
]
LLAMA_NO_DECAY = ["layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight", "norm.weight"]

KNOWN_MODELS = pytest.mark.parametrize(
    ("model", "decay", "no_decay"),
    [
        pytest.param(ConvNet, RESNET_DECAY, RESNET_NO_DECAY, id="resnet"),
        pytest.param(functools.partial(VisionTransformer, depth=1), VIT_DECAY, VIT_NO_DECAY, id="vit"),
        pytest.param(functools.partial(LanguageModel, depth=1), LLAMA_DECAY, LLAMA_NO_DECAY, id="llama"),
    ],
)


@KNOWN_MODELS
def test_a_known_model_is_split_as_by_hand(model, decay, no_decay):
    module = model()
    groups = param_groups(module, 0.1)
    assert split_of(module, groups) == {"decay": decay, "no_decay": no_decay}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@KNOWN_MODELS
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(SGD, lr=0.1, momentum=0.9),
        functools.partial(AdamW, lr=0.01),
        functools.partial(AdamW, lr=0.01, foreach=True),
        functools.partial(AdamW, lr=0.01, fused=True),
    ],
    ids=["sgd-momentum", "adamw", "adamw-foreach", "adamw-fused"],
)
def test_training_is_bit_for_bit_that_of_groups_made_by_hand(model, decay, no_decay, optimizer):
    module, by_hand = build(model), build(model)
    parameters = dict(by_hand.named_parameters())
    train(module, optimizer(param_groups(module, 0.1)))
    train(
        by_hand,
        optimizer(
            [
                {"params": [parameters[name] for name in decay], "weight_decay": 0.1},
                {"params": [parameters[name] for name in no_decay], "weight_decay": 0.0},
            ]
        ),
    )
    assert_same_weights(module, by_hand)


@KNOWN_MODELS
def test_description_names_the_group_of_every_parameter(model, decay, no_decay):
    rows = describe(model())
    assert [row.name for row in rows if row.group == "decay"] == decay
    assert [row.name for row in rows if row.group == "no_decay"] == no_decay
    assert len(rows) == len(decay) + len(no_decay)


def test_description_tells_the_rule_that_decided():
    rows = describe(VisionTransformer(depth=1), factors={"head.*": 0.1})
    assert rows[0] == Description("cls_token", (1, 1, 8), 8, "weight", "no_decay", "the model's own declaration")
    assert [(row.name, row.group, row.rule) for row in rows[-4:]] == [
        ("norm.weight", "no_decay", "norm"),
        ("norm.bias", "no_decay", "bias"),
        ("head.weight", "decay x0.1", "head.*"),
        ("head.bias", "no_decay", "bias"),
    ]


@pytest.mark.parametrize("options", [{}, {"exclude": ()}, {"factors": {"weight": 0.5}}, {"lr": 0.1}], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_groups_hold_each_trainable_parameter_once_and_none_is_empty(model, options):
    module = model()
    next(module.parameters()).requires_grad_(False)
    groups = param_groups(module, 0.1, **options)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in module.parameters() if parameter.requires_grad)
    assert all(group["params"] for group in groups)


def test_a_model_without_biases_and_norms_gives_one_group():
    groups = param_groups(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), 0.1)
    assert [(group["name"], len(group["params"])) for group in groups] == [("decay", 2)]


def test_frozen_weights_leave_no_empty_group():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert split_of(module, param_groups(module, 0.1)) == {"decay": ["1.weight"], "no_decay": ["1.bias"]}


@pytest.mark.parametrize("lr", [None, 0.5])
def test_lr_stands_in_the_groups_only_if_it_was_given(lr):
    assert {group.get("lr") for group in param_groups(MLP(), 0.1, lr=lr)} == {lr}


# Rules and factors


def test_the_first_matching_factor_wins():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    groups = param_groups(module, 0.5, factors={"0.*": 3.0, "[01].*": 0.5})
    assert split_of(module, groups) == {
        "decay x3": ["0.weight"],
        "decay": ["2.weight"],
        "decay x0.5": ["1.weight"],
        "no_decay": ["0.bias", "1.bias", "2.bias"],
    }
    assert [group["weight_decay"] for group in groups] == [1.5, 0.5, 0.25, 0.0]


def test_exclusion_and_the_models_declaration_come_before_factors():
    module = VisionTransformer(depth=1)
    groups = param_groups(module, 1.0, factors={"*": 0.5})
    assert split_of(module, groups) == {"decay x0.5": VIT_DECAY, "no_decay": VIT_NO_DECAY}


def test_a_factor_of_zero_joins_the_excluded():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = param_groups(module, 1.0, factors={"0.*": 0})
    assert split_of(module, groups) == {"decay": ["1.weight"], "no_decay": ["0.weight", "0.bias", "1.bias"]}


def first_layer(info):
    return info.name.startswith("0.")


@pytest.mark.parametrize(
    ("exclude", "factors"),
    [
        pytest.param(("bias",), {"*.bias": 0.5}, id="all excluded"),
        pytest.param(("bias",), {"bias": 0.5}, id="the very rule is excluded"),
        pytest.param((), {"0.*": 0.1, "0.weight": 0.5}, id="a rule before it"),
        pytest.param((), {first_layer: 0.1, lambda info: first_layer(info): 0.5}, id="functions"),
        pytest.param((), {lambda info: True: 0.1, lambda info: first_layer(info): 0.5}, id="functions of one name"),
    ],
)
def test_a_factor_that_never_applies_is_refused(exclude, factors):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"The factor of '.+' never applies: all that it matches is excluded"):
        param_groups(module, 0.1, exclude=exclude, factors=factors)


def test_a_factor_for_a_kind_that_the_model_lacks_is_no_mistake():
    assert len(param_groups(nn.Linear(2, 2, bias=False), 0.1, factors={"embedding": 0.5})) == 1


@pytest.mark.parametrize("exclude", [("bias", "weight"), ("*",), ()], ids=str)
def test_decay_that_would_apply_to_nothing_is_refused(exclude):
    factors = None if exclude else {"*": 0.0}
    with pytest.raises(ValueError, match="Weight decay is positive, but every parameter is excluded from it by"):
        param_groups(nn.Linear(2, 2), 0.1, exclude=exclude, factors=factors)
    assert len(param_groups(nn.Linear(2, 2), 0.0, exclude=exclude, factors=factors)) == 1


def test_decay_of_frozen_weights_only_warns():  # BitFit trains the biases alone
    module = MLP()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    with pytest.warns(UserWarning, match="no effect: all parameters that it applies to are frozen"):
        groups = param_groups(module, 0.1)
    assert split_of(module, groups) == {"no_decay": ["hidden.bias", "norm.bias", "output.bias"]}


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["none", "all frozen"])
def test_a_module_without_trainable_parameters_is_refused(module):
    with pytest.raises(ValueError, match=f"{type(module).__name__} has no trainable parameters to group"):
        param_groups(module, 0.1, exclude=())


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["weight_decay", "lr"])
def test_a_number_out_of_range_is_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` should be finite and at least 0, got {value}"):
        param_groups(MLP(), **{"weight_decay": 0.1, argument: value})


@pytest.mark.parametrize("value", [True, "0.1", [0.1]], ids=repr)
@pytest.mark.parametrize("argument", ["weight_decay", "lr", "layer_decay"])
def test_what_is_no_number_is_refused(argument, value):
    with pytest.raises(TypeError, match=f"`{argument}` should be a number, got "):
        param_groups(VisionTransformer(), **{"weight_decay": 0.1, "lr": 0.1, argument: value})


def test_numbers_of_numpy_become_pythons():
    """A checkpoint that is loaded with `weights_only` holds no others."""
    groups = param_groups(MLP(), np.float32(0.5), factors={"output.*": np.float64(2)}, lr=np.float32(0.25))
    values = [value for group in groups for key, value in group.items() if key in ("lr", "weight_decay")]
    assert {type(value) for value in values} == {float}
    assert sorted(set(values)) == [0.0, 0.25, 0.5, 1.0]
    with pytest.raises(TypeError, match="`weight_decay` should be a number, got "):
        param_groups(MLP(), np.bool_(True))


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ({"weight": -1}, ValueError, "the factor of 'weight' should be finite and at least 0, got -1"),
        ({"weight": float("nan")}, ValueError, "the factor of 'weight' should be finite"),
        ({nn.Linear: "1"}, TypeError, "the factor of 'type:Linear' should be a number, got '1'"),
        (["weight"], TypeError, "`factors` should map rules to numbers"),
        ({"wieght": 1}, ValueError, "`factors` should hold kinds"),
        ({"*.wieght": 1}, ValueError, r"'\*.wieght' matches no parameter; the nearest are "),
    ],
    ids=["negative", "nan", "str", "list", "unknown word", "idle"],
)
@pytest.mark.parametrize("function", [functools.partial(param_groups, weight_decay=0.1), describe])
def test_bad_factors_are_refused(function, factors, error, message):
    with pytest.raises(error, match=message):
        function(MLP(), factors=factors)


# Layers


def lr_of(module, **options):
    """Learning rate by name, with the rate 1 for the last layer."""
    groups = param_groups(module, 0.1, lr=1.0, **options)
    return {name: group["lr"] for group in groups for name in names_of(module, group["params"])}


def layer_in_beit(name, depth):
    """`get_num_layer_for_vit` of BEiT's optim_factory.py."""
    if name in {"cls_token", "mask_token", "pos_embed"} or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


@pytest.mark.parametrize("depth", [2, 3])
def test_layer_decay_is_that_of_beit(depth):
    module = VisionTransformer(depth=depth)
    expected = {name: 0.75 ** (depth + 1 - layer_in_beit(name, depth)) for name, _ in module.named_parameters()}
    assert lr_of(module, layer_decay=0.75) == expected


def test_layer_decay_keeps_decay_apart_and_names_the_layers():
    module = VisionTransformer(depth=2)
    groups = param_groups(module, 0.1, lr=0.2, layer_decay=0.5, factors={"head.*": 0.1})
    assert [(group["name"], group["weight_decay"], group["lr"], len(group["params"])) for group in groups] == [
        ("decay layer 0", 0.1, 0.025, 1),
        ("no_decay layer 0", 0.0, 0.025, 3),
        ("decay layer 1", 0.1, 0.05, 4),
        ("no_decay layer 1", 0.0, 0.05, 10),
        ("decay layer 2", 0.1, 0.1, 4),
        ("no_decay layer 2", 0.0, 0.1, 10),
        ("decay x0.1 layer 3", pytest.approx(0.01), 0.2, 1),
        ("no_decay layer 3", 0.0, 0.2, 3),
    ]


class TimmVisionTransformer(VisionTransformer):
    def group_matcher(self, coarse=False):  # as in timm
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class TimmResNet(ConvNet):
    def group_matcher(self, coarse=False):  # as in timm
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class InceptionLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.fc = (nn.Linear(2, 2, bias=False) for _ in range(4))

    def group_matcher(self, coarse=False):  # a function, as in timm's inception_v3
        return lambda name: {"stem": 0, "a": 2, "b": 5}.get(name.partition(".")[0], float("inf"))


TIMM_LAYERS = pytest.mark.parametrize(
    ("model", "layers"),
    [
        pytest.param(
            TimmVisionTransformer,
            {"cls": 0, "pos": 0, "patch": 0, "blocks.0": 1, "blocks.1": 2, "norm": 2, "head": 3},
            id="vit",
        ),
        pytest.param(TimmResNet, {"conv1": 0, "bn1": 0, "layer1.0": 1, "layer2.0": 2, "fc": 3}, id="resnet"),
        pytest.param(InceptionLike, {"stem": 0, "a": 1, "b": 2, "fc": 3}, id="function"),
    ],
)


def expected_in_timm(module, layers, prefix=""):
    """timm's scale is d ** (layer_max - layer)."""
    layer = {name: i for name, _ in module.named_parameters() for start, i in layers.items() if name.startswith(start)}
    return {prefix + name: 0.5 ** (max(layer.values()) - i) for name, i in layer.items()}


@TIMM_LAYERS
def test_layer_decay_follows_the_matcher_of_a_timm_model(model, layers):
    module = model()
    assert lr_of(module, layer_decay=0.5) == expected_in_timm(module, layers)


@TIMM_LAYERS
def test_a_timm_model_inside_a_wrapper_keeps_its_layers_and_what_is_outside_learns_at_the_full_rate(model, layers):
    module = nn.ModuleDict({"before": nn.Linear(2, 2), "backbone": model(), "after": nn.Linear(2, 2)})
    expected = dict.fromkeys(("before.weight", "before.bias", "after.weight", "after.bias"), 1.0)
    expected |= expected_in_timm(module["backbone"], layers, prefix="backbone.")
    assert lr_of(module, layer_decay=0.5) == expected


def compiled(module):
    return torch.compile(module)


def checkpointed_every_other_block(module):
    module.blocks[0] = checkpoint_wrapper(module.blocks[0])
    return module


# torch.compile imports torch.utils.mkldnn, whose classes are still scripted (torch 2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrap", [compiled, checkpointed_every_other_block])
@pytest.mark.parametrize("model", [VisionTransformer, TimmVisionTransformer])
def test_layers_are_the_same_under_wrappers(model, wrap):
    expected = list(lr_of(model(), layer_decay=0.5).values())
    assert list(lr_of(wrap(model()), layer_decay=0.5).values()) == expected


def test_layers_count_frozen_ones_too():
    module = VisionTransformer()
    module.head.requires_grad_(False)
    assert max(lr_of(module, layer_decay=0.5).values()) == 1.0  # the last norm is of the head's layer
    module.blocks.requires_grad_(False)
    assert min(lr_of(module, layer_decay=0.5).values()) == 0.125


def test_layers_of_a_sequential_are_its_repeated_modules():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.PReLU(), nn.Linear(2, 2))
    layers = {"0.": 0.25, "1.": 0.25, "2.": 0.5, "3.": 0.5, "4.": 1.0}
    assert lr_of(module, layer_decay=0.5) == {name: layers[name[:2]] for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (VisionTransformer, {"layer_decay": 0.5}, "`layer_decay` scales the learning rate: give `lr` as well"),
        (VisionTransformer, {"layer_decay": 0.0, "lr": 1.0}, r"`layer_decay` should be in \(0, 1\], got 0.0"),
        (VisionTransformer, {"layer_decay": 1.1, "lr": 1.0}, r"`layer_decay` should be in \(0, 1\], got 1.1"),
        (VisionTransformer, {"layer_decay": float("nan"), "lr": 1.0}, "`layer_decay` should be finite"),
        (MLP, {"layer_decay": 0.5, "lr": 1.0}, "needs to know the layers of MLP: it holds no repeated blocks"),
    ],
    ids=["no lr", "0", "1.1", "nan", "no blocks"],
)
def test_layer_decay_out_of_place_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model(), 0.1, **options)


# Groups that an optimizer has already


def test_a_split_keeps_the_options_of_the_group_and_the_order():
    module = MLP()
    optimizer = SGD(module.parameters(), lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1, foreach=True)
    plan = regroup_(optimizer, module)
    assert split_of(module, optimizer.param_groups) == {
        "decay": ["hidden.weight", "output.weight"],
        "no_decay": ["hidden.bias", "norm.weight", "norm.bias", "output.bias"],
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"], group["foreach"]) == (0.3, 0.8, True, True)
    assert (plan.factors, plan.origins) == ([1.0, 0.0], [0, 0])


def test_groups_with_decay_keep_their_ratio_and_those_without_keep_none():
    module = MLP()
    optimizer = SGD(
        [
            {"params": module.hidden.parameters(), "weight_decay": 0.1},
            {"params": module.norm.parameters(), "weight_decay": 0.4},
            {"params": module.output.parameters(), "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    plan = regroup_(optimizer, module, exclude=("bias",))
    assert [names_of(module, group["params"]) for group in optimizer.param_groups] == [
        ["hidden.weight"],
        ["hidden.bias"],
        ["norm.weight"],
        ["norm.bias"],
        ["output.weight"],
        ["output.bias"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.4, 0.0, 0.0, 0.0]
    assert plan.factors == [0.25, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert plan.origins == [0, 0, 1, 1, 2, 2]


def test_where_no_group_has_decay_all_may_get_it():
    module = MLP()
    optimizer = SGD([{"params": module.hidden.parameters()}, {"params": module.output.parameters()}], lr=0.1)
    assert regroup_(optimizer, module).factors == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((None, None), ["pg1 decay", "pg1 no_decay", "pg2 decay"]),
        (("body", "head"), ["body decay", "body no_decay", "head"]),
        (("body", None), ["body decay", "body no_decay", "pg2 decay"]),
        (("same", "same decay"), ["same decay 2", "same no_decay", "same decay"]),
    ],
    ids=["none", "own", "one", "clash"],
)
def test_names_of_split_groups_say_where_they_come_from(names, expected):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    groups = [{"params": layer.parameters()} for layer in module]
    optimizer = SGD([g if n is None else {**g, "name": n} for g, n in zip(groups, names, strict=True)], lr=0.1)
    regroup_(optimizer, module)
    assert [group["name"] for group in optimizer.param_groups] == expected


def test_an_optimizer_in_which_nothing_is_split_keeps_its_groups():
    module = MLP()
    weights = [module.hidden.weight, module.output.weight]
    rest = [module.hidden.bias, module.output.bias, *module.norm.parameters()]
    optimizer = SGD([{"params": weights}, {"params": rest}], lr=0.1, weight_decay=0.1)
    groups = list(optimizer.param_groups)
    plan = regroup_(optimizer, module)
    assert all(new is old for new, old in zip(optimizer.param_groups, groups, strict=True))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert not any("name" in group for group in groups)
    assert plan.factors == [1.0, 0.0]


@pytest.mark.parametrize("empty_first", [True, False])
def test_an_empty_group_of_the_users_stays_and_hides_no_split(empty_first):
    module = MLP()
    groups = [{"params": list(module.parameters()), "lr": 0.1}, {"params": [], "lr": 0.2}]
    optimizer = SGD(groups[::-1] if empty_first else groups, lr=0.1, weight_decay=0.1)
    regroup_(optimizer, module)
    found = [(group["lr"], len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    empty = (0.2, 0, 0.1)
    assert found == ([empty] if empty_first else []) + [(0.1, 2, 0.1), (0.1, 4, 0.0)] + ([] if empty_first else [empty])


def test_names_given_as_named_parameters_are_split_along():
    module = MLP()
    optimizer = AdamW(module.named_parameters())
    regroup_(optimizer, module)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["hidden.weight", "output.weight"],
        ["hidden.bias", "norm.weight", "norm.bias", "output.bias"],
    ]


def test_tensors_in_groups_are_scaled_and_never_shared():
    module = MLP()
    lr, weight_decay = torch.tensor(0.5), torch.tensor(0.1)
    optimizer = AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, foreach=False)
    regroup_(optimizer, module)
    decay, no_decay = optimizer.param_groups
    assert decay["lr"] is lr
    assert decay["weight_decay"] is weight_decay
    assert (no_decay["lr"], no_decay["weight_decay"]) == (0.5, 0.0)
    assert no_decay["lr"] is not lr


def test_a_tensor_from_outside_the_module_is_judged_by_its_shape():
    module = nn.Linear(2, 2)
    vector, matrix = torch.zeros(3, requires_grad=True), torch.zeros(3, 3, requires_grad=True)
    optimizer = SGD([vector, matrix, *module.parameters()], lr=0.1, weight_decay=0.1)
    regroup_(optimizer, module)
    assert [[p.shape for p in group["params"]] for group in optimizer.param_groups] == [[(3, 3), (2, 2)], [(3,), (2,)]]


def test_state_stays_with_its_parameter_if_the_optimizer_has_trained_before():
    split, whole = build(MLP), build(MLP)
    optimizers = [SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (split, whole)]
    for module, optimizer in zip((split, whole), optimizers, strict=True):
        train(module, optimizer, steps=2)
    regroup_(optimizers[0], split)
    for module, optimizer in zip((split, whole), optimizers, strict=True):
        train(module, optimizer, steps=2)
    assert_same_weights(split, whole)


def test_groups_added_later_are_split_and_named():
    module = MLP()
    optimizer = SGD(module.output.parameters(), lr=0.1, weight_decay=0.1)
    plan = regroup_(optimizer, module)
    optimizer.add_param_group({"params": list(module.hidden.parameters()), "lr": 0.01})
    origins = extend_plan_(plan, optimizer, Grouping(), infos_of(module))
    assert split_of(module, optimizer.param_groups) == {
        "decay": ["output.weight"],
        "no_decay": ["output.bias"],
        "pg3 decay": ["hidden.weight"],
        "pg3 no_decay": ["hidden.bias"],
    }
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.1),
        (0.1, 0.0),
        (0.01, 0.1),
        (0.01, 0.0),
    ]
    assert origins == [0, 1, 2, 2]
    assert plan.factors == [1.0, 0.0, 1.0, 0.0]
    assert plan.layout == [["output.weight"], ["output.bias"], ["hidden.weight"], ["hidden.bias"]]


# torch.distributed.optim is still scripted (torch 2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z]+` is deprecated:DeprecationWarning")
def test_the_share_of_a_rank_in_zero_redundancy_is_split_along(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        module, plain = build(MLP), build(MLP)
        optimizer = ZeroRedundancyOptimizer(module.parameters(), AdamW, lr=0.1, weight_decay=0.5)
        regroup_(optimizer, module)
        train(module, optimizer)
        assert [len(group["params"]) for group in optimizer.optim.param_groups] == [2, 4]
    finally:
        dist.destroy_process_group()
    train(plain, AdamW(param_groups(plain, 0.5), lr=0.1))
    assert_same_weights(module, plain)


def test_optimizers_and_schedulers_are_found_once_in_whatever_holds_them():
    first, second = (SGD([torch.zeros(1)], lr=0.1) for _ in range(2))
    scheduler = schedulers.StepLR(first, 1)
    configured = ({"optimizer": first, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}, [second], [first])
    assert find_optimizers(configured) == ([first, second], [scheduler])
    assert find_optimizers(None) == ([], [])
    from_elsewhere = TimmLike(first)
    assert find_optimizers(([first], [{"scheduler": from_elsewhere}])) == ([first], [from_elsewhere])


# LR schedulers


class TimmLike:
    """A scheduler from elsewhere: no LRScheduler, with lists of its own, and a `zip` that lets them be too short."""

    def __init__(self, optimizer, warm_up=False):
        self.optimizer, self.updates = optimizer, 0
        self.base_values = [group["lr"] for group in optimizer.param_groups]
        if warm_up:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
                group["lr"] = 0.0

    def step(self):
        self.updates += 1
        for group, value in zip(self.optimizer.param_groups, self.base_values, strict=False):
            group["lr"] = value / (1 + self.updates)

    def state_dict(self):
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state_dict):
        vars(self).update(state_dict)


class WarmUpThen(schedulers.LRScheduler):
    """Another from elsewhere, that drives a second one, which it keeps in an attribute."""

    def __init__(self, optimizer, after_scheduler):
        self.after_scheduler = after_scheduler
        super().__init__(optimizer)

    def get_lr(self):
        return [base * min(1, (self.last_epoch + 1) / 5) for base in self.base_lrs]

    def step(self, epoch=None):
        if self.last_epoch < 5:
            return super().step()
        return self.after_scheduler.step()

    def state_dict(self):
        nested = self.after_scheduler.state_dict()
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs, "nested": nested}

    def load_state_dict(self, state_dict):
        self.last_epoch, self.base_lrs = state_dict["last_epoch"], state_dict["base_lrs"]
        self.after_scheduler.load_state_dict(state_dict["nested"])


# By name: a function of the optimizer and of `each`, which repeats its arguments for as many groups as there are.
SCHEDULERS = {
    "LambdaLR": lambda o, each: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "LambdaLR[]": lambda o, each: schedulers.LambdaLR(o, each(lambda t: 0.9**t, lambda t: 1 / (1 + t))),
    "MultiplicativeLR": lambda o, each: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "MultiplicativeLR[]": lambda o, each: schedulers.MultiplicativeLR(o, each(lambda t: 0.9, lambda t: 0.8)),
    "StepLR": lambda o, each: schedulers.StepLR(o, 4, gamma=0.5),
    "MultiStepLR": lambda o, each: schedulers.MultiStepLR(o, [1, 7], gamma=0.5),
    "ConstantLR": lambda o, each: schedulers.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o, each: schedulers.LinearLR(o, 0.1, 1.0, 9),
    "ExponentialLR": lambda o, each: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, each: schedulers.PolynomialLR(o, 25, power=2.0),
    "CosineAnnealingLR": lambda o, each: schedulers.CosineAnnealingLR(o, 12, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o, each: schedulers.CosineAnnealingWarmRestarts(o, 4, 2),
    "CyclicLR": lambda o, each: schedulers.CyclicLR(o, 0.01, 0.5, step_size_up=4, mode="triangular2"),
    "CyclicLR[]": lambda o, each: schedulers.CyclicLR(
        o, each(0.01, 0.02), each(0.5, 0.4), 4, base_momentum=each(0.7, 0.6), max_momentum=each(0.95, 0.85)
    ),
    "OneCycleLR": lambda o, each: schedulers.OneCycleLR(o, 0.5, total_steps=31),
    "OneCycleLR[]": lambda o, each: schedulers.OneCycleLR(
        o, each(0.5, 0.3), total_steps=31, base_momentum=each(0.7, 0.6), max_momentum=each(0.95, 0.85)
    ),
    "SequentialLR": lambda o, each: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 5), schedulers.LambdaLR(o, each(lambda t: 0.9**t, lambda t: 1.0))], [5]
    ),
    "ChainedScheduler": lambda o, each: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 5), schedulers.MultiplicativeLR(o, each(lambda t: 0.9, lambda t: 0.8))]
    ),
    "ChainedScheduler nested": lambda o, each: schedulers.ChainedScheduler(
        [
            schedulers.SequentialLR(o, [schedulers.ConstantLR(o, 0.1, 9), schedulers.ExponentialLR(o, 0.9)], [3]),
            schedulers.MultiplicativeLR(o, each(lambda t: 0.9, lambda t: 0.8)),
        ]
    ),
    "ReduceLROnPlateau": lambda o, each: schedulers.ReduceLROnPlateau(o, patience=2, factor=0.5),
    "ReduceLROnPlateau[]": lambda o, each: schedulers.ReduceLROnPlateau(o, patience=2, min_lr=each(0.02, 0.003)),
    "SWALR": lambda o, each: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=10),
    "SWALR[]": lambda o, each: torch.optim.swa_utils.SWALR(o, each(0.05, 0.5), anneal_epochs=10),
    "one from elsewhere": lambda o, each: TimmLike(o),
    "one from elsewhere, warming up": lambda o, each: TimmLike(o, warm_up=True),
    "one that drives another": lambda o, each: WarmUpThen(o, schedulers.LambdaLR(o, lambda t: 0.9**t)),
}
SCHEDULER = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)

ADAM = functools.partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.99))  # of which schedulers cycle a beta
SGD_MOMENTUM = functools.partial(SGD, lr=0.1, momentum=0.9)


def scheduled(module, count, optimizer, scheduler):
    """An optimizer of one or two groups, with its scheduler."""
    groups = [{"params": [*module.hidden.parameters(), *module.norm.parameters()]}]
    groups.append({"params": list(module.output.parameters()), "lr": 0.03})
    if count == 1:
        groups = [{"params": list(module.parameters())}]
    built = optimizer(groups)
    return built, scheduler(built, lambda *values: list(values[:count]))


def trajectory(optimizer, scheduler, steps):
    """Learning rate and momentum of each group before each step."""
    values = []
    for _ in range(steps):
        values.append([(group["lr"], group.get("momentum"), group.get("betas")) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    return values


@SCHEDULER
@pytest.mark.parametrize("optimizer", [SGD_MOMENTUM, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("count", [1, 2], ids=["one group", "two groups"])
def test_schedulers_give_split_groups_what_they_give_the_whole(scheduler, optimizer, count):
    module = MLP()
    whole = trajectory(*scheduled(module, count, optimizer, scheduler), steps=30)
    built, built_scheduler = scheduled(module, count, optimizer, scheduler)
    regroup_(built, module, scheduler=built_scheduler)
    assert trajectory(built, built_scheduler, steps=30) == [
        [values[i] for i in ([0, 0] if count == 1 else [0, 0, 1, 1])] for values in whole
    ]
    assert len({str(values) for values in whole}) > 1, "the scheduler should do something"


@SCHEDULER
@pytest.mark.parametrize("count", [1, 2], ids=["one group", "two groups"])
def test_repaired_schedulers_go_on_where_their_state_was_saved(scheduler, count):
    def make():
        module = MLP()
        optimizer, built = scheduled(module, count, SGD_MOMENTUM, scheduler)
        regroup_(optimizer, module, scheduler=built)
        return optimizer, built

    uninterrupted = trajectory(*make(), steps=30)
    interrupted, resumed = make(), make()
    trajectory(*interrupted, steps=11)
    for new, old in zip(resumed, interrupted, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert trajectory(*resumed, steps=19) == uninterrupted[11:]


def test_a_milestone_that_is_as_large_as_the_learning_rate_is_no_rate():
    def make():
        optimizer = SGD(module.parameters(), lr=1.0)
        parts = [schedulers.ConstantLR(optimizer, 0.5, 1), schedulers.ExponentialLR(optimizer, 0.9)]
        return optimizer, schedulers.SequentialLR(optimizer, parts, milestones=[1])

    module = MLP()
    whole, (optimizer, scheduler) = trajectory(*make(), steps=5), make()
    regroup_(optimizer, module, scheduler=scheduler)
    assert trajectory(optimizer, scheduler, steps=5) == [values * 2 for values in whole]


def test_a_scheduler_of_another_optimizer_is_left_alone():
    module = MLP()
    first, second = SGD(module.hidden.parameters(), lr=0.1), SGD(module.output.parameters(), lr=0.1)
    other = schedulers.LambdaLR(second, [lambda t: 0.9**t])
    scheduler = WarmUpThen(first, other)
    regroup_(first, module, scheduler=scheduler)
    assert (len(scheduler.base_lrs), len(other.base_lrs), len(other.lr_lambdas)) == (2, 1, 1)


def test_a_learning_rate_that_is_a_tensor_is_reduced_once_for_each_group():
    module = MLP()
    optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(1.0, dtype=torch.float64), foreach=False)
    scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    regroup_(optimizer, module, scheduler=scheduler)
    for _ in range(2):
        scheduler.step(1.0)
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.5, 0.5]


# Checkpoints


def load_(optimizer, state_dict, plan, saved_layout=None):
    adapted, origins = adapt_state_dict(copy.deepcopy(state_dict), optimizer, plan, saved_layout)
    optimizer.load_state_dict(adapted)
    return origins


def assert_goes_on_alike(module, optimizer, other, other_optimizer):
    train(module, optimizer, steps=3)
    train(other, other_optimizer, steps=3)
    assert_same_weights(module, other)


WITH_STATE = {
    "sgd": functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.0),
    "adamw": functools.partial(AdamW, lr=0.01, weight_decay=0.0),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01),
    "adadelta": functools.partial(torch.optim.Adadelta, lr=0.1),
    "adamax": functools.partial(torch.optim.Adamax, lr=0.01),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.01),
    "radam": functools.partial(torch.optim.RAdam, lr=0.01),
    "asgd": functools.partial(torch.optim.ASGD, lr=0.01),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=0.01, weight_decay=0.0),
}


@pytest.mark.parametrize("make_optimizer", WITH_STATE.values(), ids=WITH_STATE)
def test_a_checkpoint_of_one_group_goes_on_in_two(make_optimizer):
    whole = build(MLP)
    saved = make_optimizer(whole.parameters())
    train(whole, saved)
    module = copy.deepcopy(whole)
    optimizer = make_optimizer(module.parameters())
    plan = regroup_(optimizer, module)
    assert load_(optimizer, saved.state_dict(), plan) == [0, 0]
    assert_goes_on_alike(module, optimizer, whole, saved)


def test_adapted_groups_have_the_learning_rates_of_the_checkpoint_and_the_decay_and_names_from_here():
    module = MLP()
    saved = SGD(module.named_parameters(), lr=0.7, momentum=0.5, weight_decay=0.3)
    optimizer = SGD(module.named_parameters(), lr=0.1, weight_decay=0.2)
    plan = regroup_(optimizer, module)
    load_(optimizer, saved.state_dict(), plan)
    assert [(g["name"], g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("decay", 0.7, 0.5, 0.2),
        ("no_decay", 0.7, 0.5, 0.0),
    ]
    assert [group["param_names"] for group in optimizer.param_groups] == plan.layout


@pytest.mark.parametrize(
    ("then", "now", "origins"),
    [
        (("bias", "norm", "vector"), ("bias",), [0, 1]),
        (("bias", "norm", "vector"), (), [0]),
        ((), ("bias", "norm", "vector"), [0, 0]),
        (("bias",), ("hidden.*",), [0, 0]),
        (("*.weight",), ("*.bias",), [1, 0]),  # equal sizes, and even equal shapes for the norm
    ],
    ids=["less excluded", "nothing excluded", "more excluded", "others excluded", "turned round"],
)
def test_a_checkpoint_that_tells_its_layout_goes_on_under_other_rules(then, now, origins):
    whole = build(MLP)
    saved = AdamW(whole.parameters(), lr=0.01, weight_decay=0.0)
    layout = regroup_(saved, whole, exclude=then).layout
    train(whole, saved)
    module = copy.deepcopy(whole)
    optimizer = AdamW(module.parameters(), lr=0.01, weight_decay=0.0)
    plan = regroup_(optimizer, module, exclude=now)
    assert load_(optimizer, saved.state_dict(), plan, layout) == origins
    assert_goes_on_alike(module, optimizer, whole, saved)


def test_a_checkpoint_of_the_same_layout_is_left_as_it_is():
    module = MLP()
    saved, optimizer = (SGD(module.parameters(), lr=0.1) for _ in range(2))
    regroup_(saved, module)
    plan = regroup_(optimizer, module)
    state_dict = saved.state_dict()
    assert adapt_state_dict(state_dict, optimizer, plan, None) == (state_dict, None)


def test_an_empty_group_keeps_its_own_options():
    module = MLP()
    groups = [{"params": list(module.parameters()), "lr": 0.1}, {"params": [], "lr": 0.2}]
    saved, optimizer = (SGD(copy.copy(groups), lr=1.0) for _ in range(2))
    plan = regroup_(optimizer, module)
    load_(optimizer, saved.state_dict(), plan)
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 2), (0.1, 4), (0.2, 0)]


def by_layer(module):
    return [{"params": list(layer.parameters()), "name": name} for name, layer in module.named_children()]


def test_a_layout_that_cannot_be_matched_is_refused_with_both_layouts():
    module = MLP()
    saved = SGD(by_layer(module), lr=0.1).state_dict()
    optimizer = SGD(module.parameters(), lr=0.1)
    plan = regroup_(optimizer, module)
    message = r"has 3 parameter groups of sizes \(hidden: 2, norm: 2, output: 2\), here are 2 of sizes \(2, 4\)"
    with pytest.raises(ValueError, match=message):
        adapt_state_dict(saved, optimizer, plan, None)


def test_a_checkpoint_of_other_parameters_is_refused_with_their_names():
    module, other = MLP(), nn.Sequential(nn.Linear(8, 16))
    saved, optimizer = SGD(other.parameters(), lr=0.1), SGD(module.parameters(), lr=0.1)
    layout = regroup_(saved, other).layout
    plan = regroup_(optimizer, module)
    message = r"Only in the checkpoint: \['0.bias', '0.weight'\]; only here: \['hidden.bias', 'hidden.weight', "
    with pytest.raises(ValueError, match=message):
        adapt_state_dict(saved.state_dict(), optimizer, plan, layout)


@pytest.mark.parametrize("make_optimizer", WITH_STATE.values(), ids=WITH_STATE)
@pytest.mark.parametrize("turned", ["groups", "layers"])
def test_moments_of_another_shape_are_refused(make_optimizer, turned):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    module.example = lambda: torch.ones(1, 2)
    decay, no_decay = [layer.weight for layer in module], [layer.bias for layer in module]
    layout = [no_decay, decay] if turned == "groups" else [decay[::-1], no_decay[::-1]]
    saved = make_optimizer([{"params": parameters} for parameters in layout])
    train(module, saved, steps=1)
    optimizer = make_optimizer(module.parameters())
    plan = regroup_(optimizer, module)
    with pytest.raises(ValueError, match=r"where '0.weight' of shape \(3, 2\) stands: its parameter groups hold other"):
        adapt_state_dict(saved.state_dict(), optimizer, plan, None)


def test_tensors_that_have_no_name_are_not_guessed():
    module = nn.Linear(2, 2)
    outside = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    saved, optimizer = (SGD([*outside, *module.parameters()], lr=0.1, momentum=0.9) for _ in range(2))
    plan = regroup_(optimizer, module)
    with pytest.raises(ValueError, match="it cannot be told which parameter is which"):
        adapt_state_dict(saved.state_dict(), optimizer, plan, None)


def test_groups_of_different_learning_rates_are_not_merged():
    module = MLP()
    saved = SGD([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(module.parameters())])
    layout = [[name] for name, _ in module.named_parameters()]
    optimizer = SGD(module.parameters(), lr=0.1)
    plan = regroup_(optimizer, module)
    with pytest.raises(ValueError, match=r"parameter groups \[0, 4\] have different learning rates"):
        adapt_state_dict(saved.state_dict(), optimizer, plan, layout)
