"""Oracles: splits written out by hand, what torch does with groups made by hand, BEiT's and timm's layers."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW

from lightning_regularize.factors import WidthPower
from lightning_regularize.groups import Description, describe, function_key, layer_groups, param_groups
from lightning_regularize.schedules import Linear
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


def test_a_description_prints_as_a_table_and_shows_as_one_in_a_notebook():
    rows = describe(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), factors={"0.*": 0.1})
    assert str(rows).splitlines() == [
        " Name      Shape  Numbers  Kind    Group       Rule",
        " ──────────────────────────────────────────────────",
        " 0.weight    2x3        6  weight  decay x0.1  0.*",
        " 0.bias        2        2  bias    no_decay    bias",
        " 1.weight      2        2  norm    no_decay    norm",
        " 1.bias        2        2  bias    no_decay    bias",
    ]
    html = rows._repr_html_()
    assert html.startswith("<table><thead><tr><th")
    assert html.count("<tr>") == 5
    assert '<td style="text-align: left">decay x0.1</td>' in html
    assert isinstance(rows, list)
    assert rows[1:] == list(rows)[1:]


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
        ("decay x0.1 layer 3", pytest.approx(0.01, rel=1e-6, abs=0), 0.2, 1),
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
    ("first", "second", "agree"),
    [
        (lambda info: "0" in info.name, lambda info: "0" in info.name, True),
        (lambda info: "0" in info.name, lambda info: "4" in info.name, False),
        (lambda info: info.name, lambda info: info.kind, False),
        (lambda info: info.name < "0", lambda info: info.name > "0", False),
    ],
    ids=["equal", "constants", "names", "operations"],
)
def test_lambdas_are_told_apart_by_what_they_compute(first, second, agree):
    assert (function_key(first) == function_key(second)) == agree


def test_numbers_of_layers_have_no_gap_where_blocks_share_their_weight():
    """The second and the third are one layer, right before the last."""
    module = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(4)])
    module[2].weight = module[1].weight
    groups = param_groups(module, 0.1, lr=1.0, layer_decay=0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("decay layer 0", 0.25),
        ("decay layer 1", 0.5),
        ("decay layer 2", 1.0),
    ]


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


# One group a layer, whatever decays


def test_layer_groups_are_the_layers_of_beit_whole_and_in_order():
    module = VisionTransformer(depth=2)
    groups = layer_groups(module, 0.2, 0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("layer 0", 0.025),
        ("layer 1", 0.05),
        ("layer 2", 0.1),
        ("layer 3", 0.2),
    ]
    names = [name for name, _ in module.named_parameters()]
    assert [names_of(module, group["params"]) for group in groups] == [
        [name for name in names if layer_in_beit(name, depth=2) == layer] for layer in range(4)
    ]
    assert all(group.keys() == {"params", "lr", "name"} for group in groups)


@TIMM_LAYERS
@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_layer_groups_have_the_rates_of_param_groups(model, layers, layer_decay):
    module = model()
    groups = layer_groups(module, 1.0, layer_decay)
    found = {name: group["lr"] for group in groups for name in names_of(module, group["params"])}
    assert found == lr_of(module, layer_decay=layer_decay)
    assert len(groups) == max(layers.values()) + 1


def test_a_frozen_layer_has_no_group_and_keeps_its_number():
    module = VisionTransformer(depth=2)
    module.blocks[0].requires_grad_(False)
    groups = layer_groups(module, 1.0, 0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("layer 0", 0.125),
        ("layer 2", 0.5),
        ("layer 3", 1.0),
    ]


class Backwards(InceptionLike):
    """Registered in another order than its layers have."""

    def group_matcher(self, coarse=False):
        return lambda name: {"stem": 9, "a": 4, "b": 1}.get(name.partition(".")[0], 0)


def test_layer_groups_stand_in_the_order_of_layers():
    module = Backwards()
    groups = layer_groups(module, 1.0, 0.5)
    assert [(group["name"], names_of(module, group["params"])) for group in groups] == [
        ("layer 0", ["fc.weight"]),
        ("layer 1", ["b.weight"]),
        ("layer 2", ["a.weight"]),
        ("layer 3", ["stem.weight"]),
    ]


def test_layer_groups_hold_a_shared_tensor_once():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    groups = layer_groups(module, 1.0, 0.5)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in module.parameters())


def test_any_optimizer_takes_layer_groups():
    module = build(VisionTransformer, depth=2)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    train(module, AdamW(layer_groups(module, 0.01, 0.5)), steps=1)
    assert not any(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "layer_decay", "message"),
    [
        (VisionTransformer, 0.0, r"`layer_decay` should be in \(0, 1\], got 0.0"),
        (VisionTransformer, 1.1, r"`layer_decay` should be in \(0, 1\], got 1.1"),
        (MLP, 0.5, "needs to know the layers of MLP: it holds no repeated blocks"),
    ],
    ids=["0", "1.1", "no blocks"],
)
def test_layer_groups_out_of_place_are_refused(model, layer_decay, message):
    with pytest.raises(ValueError, match=message):
        layer_groups(model(), 0.1, layer_decay)


# Factors that are computed, and rules that take back


def depth_of(info):
    return 1 / (1 + int(info.name.split(".")[0]))


def blocks():
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))


def test_a_factor_may_be_a_function_of_a_parameter():
    factors = {"3.*": 0.5, "weight": depth_of}
    groups = param_groups(blocks(), 0.1, factors=factors)
    assert [(group["name"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("decay", 0.1, 1), ("decay x0.5", 0.05, 2), ("no_decay", 0.0, 5)
    ]  # fmt: skip
    assert [row.rule for row in describe(blocks(), factors=factors) if row.kind == "weight"] == [
        "weight", "weight", "3.*"
    ]  # fmt: skip


def test_a_function_is_asked_only_for_what_decays():
    seen = []
    describe(blocks(), factors={"*": lambda info: seen.append(info.name) or 1.0})
    assert set(seen) == {"0.weight", "1.weight", "3.weight"}


def test_a_function_may_exclude_and_give_numbers_of_numpy():
    rows = describe(blocks(), factors={"*": lambda info: np.float32(info.shape[0] > 8)})
    assert [row.group for row in rows if row.kind == "weight"] == ["no_decay", "decay", "no_decay"]


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ({"weight": lambda info: -1.0}, ValueError, "the factor of 'weight' for '0.weight' should be finite and at"),
        ({"weight": lambda info: math.nan}, ValueError, "for '0.weight' should be finite and at least 0, got nan"),
        ({"weight": lambda info: "1"}, TypeError, "for '0.weight' should be a number, got '1'"),
        ({"weight": Linear(0, 1)}, TypeError, r"A schedule for a rule is written WeightDecay\(\{'weight': Linear"),
        ({"weight": WidthPower}, TypeError, "the factor of 'weight' should be a number, got <class"),
        ({"weight": None}, TypeError, "the factor of 'weight' should be a number, got None"),
        ({"weight": 2.0, "!0.*": 1.0}, ValueError, "`factors`: '!0.*' takes nothing back in a mapping"),
        ({"!0.*": 1.0}, ValueError, "takes nothing back in a mapping, of which the first rule that matches wins"),
    ],
    ids=["negative", "nan", "text", "schedule", "class", "none", "second", "first"],
)
def test_what_is_no_factor_raises(factors, error, message):
    with pytest.raises(error, match=message):
        param_groups(blocks(), 0.1, factors=factors)


class WithDeclaration(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.LayerNorm(4)

    def no_weight_decay(self):
        return {"token"}


def test_exclude_may_take_back():
    rows = describe(WithDeclaration(), exclude=("bias", "norm", "!q_norm.weight"))
    assert [(row.name, row.group, row.rule) for row in rows] == [
        ("token", "no_decay", "the model's own declaration"),
        ("q_norm.weight", "decay", ""),
        ("k_norm.weight", "no_decay", "norm"),
        ("k_norm.bias", "no_decay", "bias"),
    ]


def test_what_the_model_declares_is_not_taken_back():
    with pytest.raises(ValueError, match=r"'!tok\*' takes back nothing: the model declares by `no_weight_decay\(\)`"):
        describe(WithDeclaration(), exclude=("*", "!tok*"))
