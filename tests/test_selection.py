import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from lightning_regularize.selection import (
    DEFAULT_EXCLUDE,
    KINDS,
    ParameterInfo,
    check_rules,
    matches,
    parameter_infos,
    require_matches,
    select,
)
from tests.distributed import run_distributed
from tests.models import MLP, MODELS, ConvNet, LanguageModel, LlamaRMSNorm, Recurrent, VisionTransformer

# torch.compile imports torch.utils.mkldnn, whose classes are still scripted (torch 2.13).
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def kinds(module):
    return {info.name: info.kind for info in parameter_infos(module)}


def names(infos):
    return [info.name for info in infos]


def facts(module):
    """All that wrappers should not change; the owner's class only by the subclass that FSDP2 gives it."""
    return [
        (i.name, i.kind, i.shape, i.aliases, i.declared, type(i.owner).__name__.removeprefix("FSDP"))
        for i in parameter_infos(module)
    ]


def class_named(name, *shapes, base=nn.Module):
    """An instance of a new class of this name, with parameters `weight`, `weight1`, ... of the given shapes."""
    module = type(name, (base,), {})()
    for i, shape in enumerate(shapes):
        module.register_parameter(f"weight{i or ''}", nn.Parameter(torch.zeros(shape)))
    return module


@pytest.fixture
def gloo(tmp_path):
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# The kind of every parameter, written by hand

RESNET = {
    "conv1.weight": "weight",
    "bn1.weight": "norm",
    "bn1.bias": "bias",
    "layer1.0.conv1.weight": "weight",
    "layer1.0.bn1.weight": "norm",
    "layer1.0.bn1.bias": "bias",
    "layer1.0.conv2.weight": "weight",
    "layer1.0.bn2.weight": "norm",
    "layer1.0.bn2.bias": "bias",
    "layer2.0.conv1.weight": "weight",
    "layer2.0.bn1.weight": "norm",
    "layer2.0.bn1.bias": "bias",
    "layer2.0.conv2.weight": "weight",
    "layer2.0.bn2.weight": "norm",
    "layer2.0.bn2.bias": "bias",
    "layer2.0.downsample.0.weight": "weight",
    "layer2.0.downsample.1.weight": "norm",
    "layer2.0.downsample.1.bias": "bias",
    "fc.weight": "weight",
    "fc.bias": "bias",
}
VIT = {
    "cls_token": "weight",
    "pos_embed": "weight",
    "patch_embed.weight": "weight",
    "patch_embed.bias": "bias",
    "blocks.0.norm1.weight": "norm",
    "blocks.0.norm1.bias": "bias",
    "blocks.0.attn.in_proj_weight": "weight",
    "blocks.0.attn.in_proj_bias": "bias",
    "blocks.0.attn.out_proj.weight": "weight",
    "blocks.0.attn.out_proj.bias": "bias",
    "blocks.0.ls1.gamma": "vector",
    "blocks.0.norm2.weight": "norm",
    "blocks.0.norm2.bias": "bias",
    "blocks.0.mlp.0.weight": "weight",
    "blocks.0.mlp.0.bias": "bias",
    "blocks.0.mlp.2.weight": "weight",
    "blocks.0.mlp.2.bias": "bias",
    "blocks.0.ls2.gamma": "vector",
    "norm.weight": "norm",
    "norm.bias": "bias",
    "head.weight": "weight",
    "head.bias": "bias",
}
LLAMA = {
    "embed_tokens.weight": "embedding",
    "layers.0.input_layernorm.weight": "norm",
    "layers.0.qkv_proj.weight": "weight",
    "layers.0.o_proj.weight": "weight",
    "layers.0.post_attention_layernorm.weight": "norm",
    "layers.0.gate_up_proj.weight": "weight",
    "layers.0.down_proj.weight": "weight",
    "norm.weight": "norm",
}


@pytest.mark.parametrize(
    ("model", "expected"),
    [(ConvNet(), RESNET), (VisionTransformer(depth=1), VIT), (LanguageModel(depth=1), LLAMA)],
    ids=["resnet", "vit", "llama"],
)
def test_every_parameter_of_a_known_model_has_the_expected_kind(model, expected):
    assert kinds(model) == expected


@pytest.mark.parametrize("model", MODELS)
def test_infos_are_the_parameters_in_registration_order(model):
    module = model()
    infos = parameter_infos(module)
    expected = list(module.named_parameters())
    assert names(infos) == [name for name, _ in expected]
    assert all(info.parameter is parameter for info, (_, parameter) in zip(infos, expected, strict=True))
    assert all(info.shape == parameter.shape for info, (_, parameter) in zip(infos, expected, strict=True))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Bilinear(2, 3, 4), {"weight": "weight", "bias": "bias"}),
        (nn.ConvTranspose2d(2, 3, 1), {"weight": "weight", "bias": "bias"}),
        (nn.Linear(5, 1), {"weight": "weight", "bias": "bias"}),
        (nn.Embedding(5, 1), {"weight": "embedding"}),
        (nn.EmbeddingBag(5, 2), {"weight": "embedding"}),
        (nn.PReLU(), {"weight": "vector"}),
        (nn.BatchNorm1d(2), {"weight": "norm", "bias": "bias"}),
        (nn.SyncBatchNorm(2), {"weight": "norm", "bias": "bias"}),
        (nn.GroupNorm(1, 2), {"weight": "norm", "bias": "bias"}),
        (nn.InstanceNorm2d(2, affine=True), {"weight": "norm", "bias": "bias"}),
        (nn.LayerNorm(2), {"weight": "norm", "bias": "bias"}),
        (nn.LayerNorm((2, 3)), {"weight": "norm", "bias": "bias"}),
        (nn.RMSNorm((2, 3)), {"weight": "norm"}),
        (LlamaRMSNorm(2), {"weight": "norm"}),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3, vdim=5),
            {
                "q_proj_weight": "weight",
                "k_proj_weight": "weight",
                "v_proj_weight": "weight",
                "in_proj_bias": "bias",
                "bias_k": "bias",
                "bias_v": "bias",
                "out_proj.weight": "weight",
                "out_proj.bias": "bias",
            },
        ),
        (
            nn.LSTM(2, 3, bidirectional=True, proj_size=2),
            {
                "weight_ih_l0": "weight",
                "weight_hh_l0": "weight",
                "bias_ih_l0": "bias",
                "bias_hh_l0": "bias",
                "weight_hr_l0": "weight",
                "weight_ih_l0_reverse": "weight",
                "weight_hh_l0_reverse": "weight",
                "bias_ih_l0_reverse": "bias",
                "bias_hh_l0_reverse": "bias",
                "weight_hr_l0_reverse": "weight",
            },
        ),
        (
            Recurrent(),
            {
                "lstm.weight_ih_l0": "weight",
                "lstm.weight_hh_l0": "weight",
                "lstm.bias_ih_l0": "bias",
                "lstm.bias_hh_l0": "bias",
                "head.weight": "weight",
                "head.bias": "bias",
            },
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_torch_layers_have_the_expected_kinds(module, expected):
    assert kinds(module) == expected


@pytest.mark.parametrize(
    ("class_name", "shape", "expected"),
    [
        ("RMSNorm", (4,), "norm"),
        ("LayerNorm2d", (4, 1, 1), "norm"),
        ("GlobalResponseNorm", (1, 1, 1, 4), "norm"),
        ("ConvNextV2GRN", (1, 1, 1, 4), "norm"),
        ("FRN", (1, 4, 1, 1), "norm"),
        ("GRN2d", (1, 4, 1, 1), "norm"),
        ("GRNBlock", (1, 4, 1, 1), "weight"),
        ("GRN", (4, 3), "weight"),
        ("L2Normalize", (1,), "norm"),
        ("InstanceNormalisation", (1, 4), "norm"),
        ("CohereLayerNorm", (2, 4), "norm"),
        ("MultiHeadRMSNorm", (2, 1, 4), "norm"),
        ("LayerNorm2d", (4, 3, 3), "norm"),
        ("RMSNormGated", (2, 4), "norm"),
        ("HeteroLayerNormalization", (3, 4), "norm"),
        ("LayerNormPerHead", (2, 4), "norm"),
        ("NormLinear", (4, 3), "weight"),
        ("PreNormBlock", (4, 3), "weight"),
        ("WeightNorm", (4, 3), "weight"),
        ("SpectralNorm", (4, 3), "weight"),
        ("NormalizedProjection", (4, 3), "weight"),
        ("NormalHead", (1, 4), "weight"),
        ("LogNormal", (1, 4), "weight"),
        ("TokenEmbedding", (4, 3), "embedding"),
        ("VocabParallelEmbedding", (4, 3), "embedding"),
        ("EmbeddingProjection", (4, 3), "weight"),
        ("LayerScale", (4,), "vector"),
        ("LayerScale2d", (4, 1, 1), "vector"),
        ("Temperature", (), "vector"),
        ("Tokens", (1, 1, 4), "weight"),
    ],
)
def test_a_class_of_the_user_is_judged_by_its_name_and_the_shape(class_name, shape, expected):
    assert kinds(class_named(class_name, shape)) == {"weight": expected}


def test_only_the_weight_of_an_embedding_class_is_an_embedding():
    assert kinds(class_named("TokenEmbedding", (4, 3), (3, 3))) == {"weight": "embedding", "weight1": "weight"}
    with_more = type("ScaledWordEmbedding", (nn.Embedding,), {})(4, 3)  # as T5Gemma 2 has it, with a token of its own
    with_more.end_of_image, with_more.lora_A = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 4))
    assert kinds(with_more) == {"weight": "embedding", "end_of_image": "vector", "lora_A": "weight"}


def test_a_subclass_keeps_the_kind_of_its_bases():
    gain = class_named("Gain", (4, 1), base=type("SwitchNorm", (nn.Module,), {}))
    assert kinds(gain) == {"weight": "norm"}
    table = type("Table", (nn.Embedding,), {})(4, 3)
    assert kinds(table) == {"weight": "embedding"}


@pytest.mark.parametrize("sizes", [("in_features", "out_features"), ("in_channels", "out_channels")])
def test_a_layer_with_inputs_and_outputs_is_no_norm_whatever_its_name(sizes):
    layer = class_named("LinearNorm", (4, 3))
    for size, value in zip(sizes, (3, 4), strict=True):
        setattr(layer, size, value)
    assert kinds(layer) == {"weight": "weight"}


@pytest.mark.parametrize("heads", [1, 2])
def test_norms_of_heads_in_transformers_do_not_decay(heads):
    from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    for layer in (CohereLayerNorm((heads, 4)), ChameleonLayerNorm((heads, 4))):
        assert kinds(layer)["weight"] == "norm"
        assert select(nn.ModuleDict({"q_norm": layer}), exclude=DEFAULT_EXCLUDE) == []


@pytest.mark.parametrize("name", ["SpectralNormLinear", "NormalizedLinear"])
def test_a_linear_layer_with_one_output_is_no_norm(name):
    assert kinds(type(name, (nn.Linear,), {})(4, 1)) == {"weight": "weight", "bias": "bias"}


@pytest.mark.parametrize(
    "name", ["normal_head", "unbiased", "inline", "plan", "norm_proj", "bias_net", "embedding_out"]
)
def test_the_name_of_a_module_decides_nothing(name):
    assert kinds(nn.ModuleDict({name: nn.Linear(2, 2, bias=False)})) == {f"{name}.weight": "weight"}


@pytest.mark.parametrize("name", ["ln_f", "LayerNorm", "norm1", "final"])
def test_a_norm_is_a_norm_under_any_name(name):
    assert kinds(nn.ModuleDict({name: nn.LayerNorm(2, bias=False)})) == {f"{name}.weight": "norm"}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("q_bias", (4,), "bias"),
        ("attention_bias", (4, 3, 3), "bias"),
        ("pos_bias_u", (4, 3), "bias"),
        ("relative_position_bias_table", (9, 4), "weight"),
        ("unbiased", (4, 3), "weight"),
        ("layer_scale_1", (4, 1, 1), "vector"),
        ("logit_scale", (), "vector"),
        ("D", (4,), "vector"),
        ("A_log", (4, 3), "weight"),
        ("cls_token", (1, 1, 4), "weight"),
        ("pos_embed", (1, 5, 4), "weight"),
        ("w_g", (4, 3), "weight"),
        ("w_v", (4, 3), "weight"),
    ],
)
def test_a_raw_parameter_is_judged_by_its_own_name_and_shape(name, shape, expected):
    module = nn.ParameterDict({name: torch.zeros(shape)})
    assert kinds(module) == {name: expected}


# Tied tensors, frozen ones, lazy ones


def test_tied_tensor_appears_once_with_its_aliases_and_owners():
    model = LanguageModel()
    info = parameter_infos(model)[0]
    assert (info.name, info.aliases) == ("embed_tokens.weight", ("lm_head.weight",))
    assert (info.owner, info.alias_owners) == (model.embed_tokens, (model.lm_head,))


def test_tied_tensor_has_its_strongest_kind_whoever_comes_first():
    embedding = nn.Embedding(4, 3)
    head = nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight
    assert kinds(nn.ModuleDict({"head": head, "embedding": embedding})) == {"head.weight": "embedding"}


def test_a_module_registered_twice_is_an_alias():
    layer = nn.Linear(2, 2)
    weight, bias = parameter_infos(nn.ModuleList([layer, nn.Tanh(), layer]))
    assert (weight.name, weight.aliases) == ("0.weight", ("2.weight",))
    assert (bias.name, bias.aliases) == ("0.bias", ("2.bias",))


def test_two_attributes_of_one_module_are_aliases():
    module = class_named("Twice", (2, 2))
    module.again = module.weight
    assert [(info.name, info.aliases) for info in parameter_infos(module)] == [("weight", ("again",))]


def test_frozen_parameters_are_known_but_not_selected():
    model = MLP()
    model.hidden.requires_grad_(False)
    assert len(parameter_infos(model)) == 6
    assert names(select(model)) == ["norm.weight", "norm.bias", "output.weight", "output.bias"]
    assert select(model, include=("hidden.*",)) == []


def test_lazy_parameters_are_judged_by_owner_and_name():
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    infos = parameter_infos(module)
    before = [(info.name, info.kind) for info in infos]
    assert all(info.shape == (0,) for info in infos)
    module(torch.zeros(2, 3, 5, 5))
    assert [(info.name, info.kind) for info in parameter_infos(module)] == before
    assert [kind for _, kind in before] == ["weight", "bias", "norm", "bias", "weight", "bias"]


@pytest.mark.parametrize("model", MODELS)
def test_meta_device_changes_nothing(model):
    with torch.device("meta"):
        on_meta = model()
    assert facts(on_meta) == facts(model())


def test_parameters_that_are_none_and_modules_that_are_none_are_passed_over():
    module = nn.Linear(2, 2, bias=False)
    module.register_module("absent", None)
    assert names(parameter_infos(module)) == ["weight"]
    assert parameter_infos(nn.Tanh()) == []


# Parametrizations


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (parametrizations.weight_norm, {"original0": "norm", "original1": "weight"}),
        (parametrizations.spectral_norm, {"original": "weight"}),
        (parametrizations.orthogonal, {"original": "weight"}),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal"],
)
def test_a_parametrized_weight_is_judged_as_the_tensor_that_it_makes(wrap, expected):
    module = nn.Sequential(wrap(nn.Linear(3, 4)), wrap(nn.Embedding(5, 4)))
    table = {name: "embedding" if kind == "weight" else kind for name, kind in expected.items()}
    assert kinds(module) == (
        {"0.bias": "bias"}
        | {f"0.parametrizations.weight.{name}": kind for name, kind in expected.items()}
        | {f"1.parametrizations.weight.{name}": kind for name, kind in table.items()}
    )


def test_the_owner_of_a_parametrized_weight_is_the_parametrized_module():
    linear = parametrizations.weight_norm(nn.Linear(3, 4))
    assert all(info.owner is linear for info in parameter_infos(linear))
    assert names(select(linear, include=("type:Linear",))) == names(select(linear, include=(nn.Linear,)))


def test_a_parametrized_bias_or_gain_keeps_its_kind():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    norm = nn.LayerNorm(3)
    parametrize.register_parametrization(norm, "weight", Double())
    parametrize.register_parametrization(norm, "bias", Double())
    assert kinds(norm) == {"parametrizations.weight.original": "norm", "parametrizations.bias.original": "bias"}


def test_only_weight_normalization_has_a_magnitude():
    """Other parametrizations may be made of two tensors as well."""

    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

        def right_inverse(self, whole):
            return whole / 2, whole / 2

    linear = nn.Linear(3, 4, bias=False)
    parametrize.register_parametrization(linear, "weight", Sum())
    assert set(kinds(linear).values()) == {"weight"}


def test_parameters_of_a_parametrization_are_judged_by_themselves():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_a = nn.Parameter(torch.zeros(2, 3))
            self.lora_b = nn.Parameter(torch.zeros(4, 2))

        def forward(self, x):
            return x + self.lora_b @ self.lora_a

    linear = nn.Linear(3, 4, bias=False)
    parametrize.register_parametrization(linear, "weight", LowRank())
    assert kinds(linear) == {
        "parametrizations.weight.original": "weight",
        "parametrizations.weight.0.lora_a": "weight",
        "parametrizations.weight.0.lora_b": "weight",
    }


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (lambda: nn.utils.weight_norm(nn.Linear(3, 4, bias=False)), {"weight_g": "norm", "weight_v": "weight"}),
        (lambda: nn.utils.weight_norm(nn.Embedding(3, 4)), {"weight_g": "norm", "weight_v": "embedding"}),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 4, bias=False)), {"weight_orig": "weight"}),
        (lambda: nn.utils.spectral_norm(nn.Embedding(3, 4)), {"weight_orig": "embedding"}),
        (lambda: prune.identity(nn.LayerNorm(3), "bias"), {"weight": "norm", "bias_orig": "bias"}),
        (lambda: prune.identity(class_named("TokenEmbedding", (4, 3)), "weight"), {"weight_orig": "embedding"}),
    ],
    ids=[
        "weight_norm",
        "weight_norm of an embedding",
        "spectral_norm",
        "spectral_norm of an embedding",
        "prune",
        "prune an embedding",
    ],
)
def test_the_hooks_of_old_are_understood(module, expected):
    assert kinds(module()) == expected


# What the model declares


def declared(module):
    return [info.name for info in parameter_infos(module) if info.declared]


def test_no_weight_decay_is_heard_wherever_the_model_sits():
    model = VisionTransformer()
    assert declared(model) == ["cls_token", "pos_embed"]
    assert declared(nn.ModuleDict({"net": model})) == ["net.cls_token", "net.pos_embed"]


def test_no_weight_decay_may_name_a_submodule():
    model = MLP()
    model.no_weight_decay = lambda: ["norm", "output.weight", "hid"]
    assert declared(model) == ["norm.weight", "norm.bias", "output.weight"]


def test_no_weight_decay_may_hold_patterns():
    model = MLP()
    model.no_weight_decay = lambda: {"norm.*", "*.bias"}
    names = ["net.hidden.bias", "net.norm.weight", "net.norm.bias", "net.output.bias"]
    assert declared(nn.ModuleDict({"net": model})) == names


def test_no_weight_decay_keywords_are_parts_of_names():
    class Swin(nn.Module):
        def __init__(self):
            super().__init__()
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
            self.proj = nn.Linear(2, 2)

        def no_weight_decay_keywords(self):
            return {"relative_position"}

    assert declared(nn.ModuleDict({"proj": Swin()})) == ["proj.relative_position_bias_table"]


def test_keywords_are_not_looked_for_above_the_module_that_declares_them():
    model = MLP()
    model.no_weight_decay_keywords = lambda: {"net"}
    assert declared(nn.ModuleDict({"net": model})) == []


def test_a_mark_on_the_parameter_declares():
    model = MLP()
    model.hidden.weight._no_weight_decay = True
    model.output.weight._no_weight_decay = False
    assert declared(model) == ["hidden.weight"]


def test_a_tied_tensor_is_declared_under_any_name():
    model = LanguageModel()
    model.no_weight_decay = lambda: {"lm_head.weight"}
    assert declared(model) == ["embed_tokens.weight"]


def test_a_parametrized_weight_is_declared_under_its_own_name():
    model = MLP()
    model.no_weight_decay = lambda: {"hidden.weight"}
    parametrizations.weight_norm(model.hidden)
    assert declared(model) == [f"hidden.parametrizations.weight.original{i}" for i in range(2)]


def test_names_that_a_model_computes_may_contain_wrappers():
    model = MLP()
    model.norm = torch.compile(model.norm)
    model.no_weight_decay = lambda: {name for name, _ in model.named_parameters() if "norm" in name}
    assert model.no_weight_decay() == {"norm._orig_mod.weight", "norm._orig_mod.bias"}
    assert declared(model) == ["norm.weight", "norm.bias"]


def test_a_setting_that_is_called_no_weight_decay_declares_nothing():
    model = MLP()
    model.no_weight_decay = True
    assert declared(model) == []


@pytest.mark.parametrize("method", ["no_weight_decay", "no_weight_decay_keywords"])
@pytest.mark.parametrize("returned", ["norm", None, 0.1, [1]])
def test_a_declaration_that_is_no_collection_of_names_raises(method, returned):
    model = MLP()
    setattr(model, method, lambda: returned)
    with pytest.raises(TypeError, match=rf"`MLP.{method}\(\)` should return a collection of parameter names, got"):
        parameter_infos(nn.Sequential(model))


# Wrappers


class _FabricModule(nn.Module):
    """Holds and forwards as the class of this name in Lightning Fabric does."""

    def __init__(self, forward_module, original_module):
        super().__init__()
        self._forward_module = forward_module
        self._original_module = original_module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_original_module"), name)


class DeepSpeedEngine(nn.Module):
    """Holds as the class of this name in DeepSpeed does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def inside(name, wrap):
    """Wrap a child of the model, instead of the model."""

    def wrapped(model):
        setattr(model, name, wrap(getattr(model, name)))
        return model

    return wrapped


def each_block(wrap):
    def wrapped(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return wrapped


WRAPPERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "compile": torch.compile,
    "compile in place": lambda model: (model.compile(), model)[1],
    "compile inside": inside("head", torch.compile),
    "ddp": DistributedDataParallel,
    "data parallel": nn.DataParallel,
    "checkpoint inside": each_block(checkpoint_wrapper),
    "averaged": AveragedModel,
    "deepspeed": DeepSpeedEngine,
    "fabric": lambda model: _FabricModule(DistributedDataParallel(model), model),
    "ddp inside": inside("patch_embed", DistributedDataParallel),
    "all at once": lambda model: torch.compile(
        DistributedDataParallel(each_block(lambda block: torch.compile(checkpoint_wrapper(block)))(model))
    ),
    "averaged all": lambda model: AveragedModel(
        inside("norm", checkpoint_wrapper)(inside("head", torch.compile)(model))
    ),
    "fabric of compiled": lambda model: _FabricModule(torch.compile(DistributedDataParallel(model)), model),
    "sync batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_changes_nothing(wrap):
    assert facts(wrap(VisionTransformer())) == facts(VisionTransformer())


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("wrap", [torch.compile, DistributedDataParallel, checkpoint_wrapper, AveragedModel])
def test_a_wrapper_changes_nothing_for_tied_tensors(wrap):
    wrapped = wrap(LanguageModel())
    assert facts(nn.ModuleDict({"net": wrapped})) == facts(nn.ModuleDict({"net": LanguageModel()}))


@pytest.mark.parametrize("child", ["module", "_orig_mod", "_forward_module"])
def test_a_child_of_a_plain_module_keeps_its_name(child):
    module = nn.Module()
    module.register_module(child, nn.Linear(2, 2, bias=False))
    assert names(parameter_infos(module)) == [f"{child}.weight"]
    assert names(parameter_infos(AveragedModel(module))) == [f"{child}.weight"]


def fsdp1(module, *, use_orig_params=True):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def fsdp1_facts(rank, world_size, model, *children):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    module = model()
    for child in children:
        setattr(module, child, fsdp1(getattr(module, child)))
    wrapped = fsdp1(module)
    return facts(wrapped), {parameter.ndim for parameter in wrapped.parameters()}


@pytest.mark.parametrize(
    ("model", "children"),
    [(MLP, ["norm"]), (ConvNet, ["layer1", "fc"]), (VisionTransformer, ["head"]), (LanguageModel, []), (Recurrent, [])],
)
def test_fsdp1_changes_nothing(model, children):
    for found, dims in run_distributed(fsdp1_facts, model, *children):
        assert found == facts(model())
        assert dims == {1}  # the ranks hold flat pieces indeed


def fsdp1_refusals(rank, world_size):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    messages = []
    for refused in (fsdp1(MLP(), use_orig_params=False), fsdp1(MLP()).module):
        with pytest.raises(ValueError) as error:
            parameter_infos(refused)
        messages.append(str(error.value))
    return messages


def test_flat_pieces_of_unknown_shape_raise():
    for flat, inner in run_distributed(fsdp1_refusals):
        assert flat.startswith("'_flat_param' is a flat piece of an FSDP unit, of unknown shape: pass the module that")
        assert inner.startswith("'hidden.weight' is a flat piece of an FSDP unit")


def fsdp2_facts(rank, world_size, model):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    module, mesh = model(), dist.init_device_mesh("cpu", (world_size,))
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            continue
        for block in child:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return facts(module)


@pytest.mark.parametrize("model", MODELS)
def test_fsdp2_changes_nothing(model):
    for found in run_distributed(fsdp2_facts, model):
        assert found == facts(model())


# ParameterInfo


def test_infos_are_compared_by_identity_and_printed_shortly():
    first, second = parameter_infos(nn.Linear(2, 2)), parameter_infos(nn.Linear(2, 2))
    assert first[0] == first[0]
    assert first[0] != second[0]
    assert len({*first, *second}) == 4
    assert repr(first[0]) == (
        "ParameterInfo(name='weight', kind='weight', shape=torch.Size([2, 2]), aliases=(), declared=False)"
    )


def test_what_is_no_module_raises():
    with pytest.raises(TypeError, match=r"`module` should be a torch\.nn\.Module, got generator\."):
        parameter_infos(nn.Linear(2, 2).parameters())


# Rules


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("bias", ["hidden.bias", "norm.bias", "output.bias"]),
        ("norm", ["norm.weight"]),
        ("weight", ["hidden.weight", "output.weight"]),
        ("embedding", []),
        ("vector", []),
        ("hidden.*", ["hidden.weight", "hidden.bias"]),
        ("*.bias", ["hidden.bias", "norm.bias", "output.bias"]),
        ("norm.weight", ["norm.weight"]),
        ("*h?dden*", ["hidden.weight", "hidden.bias"]),
        ("[ho]*.weight", ["hidden.weight", "output.weight"]),
        ("type:Linear", ["hidden.weight", "hidden.bias", "output.weight", "output.bias"]),
        ("type:_BatchNorm", ["norm.weight", "norm.bias"]),
        (nn.BatchNorm1d, ["norm.weight", "norm.bias"]),
        (lambda info: info.shape == (4,), ["output.bias"]),
    ],
)
def test_rule_selects(rule, expected):
    model = MLP()
    assert names(select(model, include=(rule,))) == expected
    excluded = names(select(model, exclude=(rule,)))
    assert sorted(expected + excluded) == sorted(names(parameter_infos(model)))
    assert [info.name for info in parameter_infos(model) if matches(rule, info)] == expected


def test_exclude_wins_over_include():
    assert names(select(MLP(), include=("hidden.*", "norm"), exclude=("bias",))) == ["hidden.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (("bias", "!hidden.*"), ["norm.bias", "output.bias"]),
        (("*", "!bias", "!norm"), ["hidden.weight", "output.weight"]),
        (("bias", "!*", "hidden.bias"), ["hidden.bias"]),  # and rules after it select again
        (("bias", "norm", "!type:_BatchNorm"), ["hidden.bias", "output.bias"]),
        (("hidden.*", "!embedding"), ["hidden.weight", "hidden.bias"]),  # a kind may be absent
    ],
    ids=str,
)
def test_a_rule_takes_back_what_rules_before_it_have_selected(rules, expected):
    model = MLP()
    assert names(select(model, include=rules)) == expected
    excluded = names(select(model, exclude=rules))
    assert sorted(expected + excluded) == sorted(names(parameter_infos(model)))


def test_a_tied_tensor_is_taken_back_by_any_name():
    selected = select(LanguageModel(depth=1), include=("embedding", "!lm_head.*", "*.o_proj.weight"))
    assert names(selected) == ["layers.0.o_proj.weight"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("!norm",), r"'!norm' is the first rule and has nothing to take back\. .* \('\*', '!norm'\)"),
        (("!norm", "*"), "'!norm' is the first rule"),
        (("*", "!nrom"), "got 'nrom'. Did you mean 'norm'"),
        (("*", "!"), "globs, .* got ''"),
        (("norm", "!hiden.*"), "'!hiden.*' matches no parameter; the nearest are 'hidden.bias'"),
        (("norm", "!hidden.*"), "'!hidden.*' takes back nothing: no rule before it selects what it matches"),
        (("bias", "!*.bias", "!hidden.bias"), "'!hidden.bias' takes back nothing"),
    ],
    ids=str,
)
def test_a_rule_that_takes_back_nothing_raises(rules, message):
    with pytest.raises(ValueError, match=message):
        select(MLP(), include=rules)


def test_default_exclude_leaves_weights_and_embeddings():
    selected = select(LanguageModel(depth=1), exclude=DEFAULT_EXCLUDE)
    assert names(selected) == [name for name, kind in LLAMA.items() if kind in {"weight", "embedding"}]


@pytest.mark.parametrize(
    "rule", ["lm_head.*", "embed_tokens.*", "type:Linear", nn.Linear, "type:Embedding", nn.Embedding, "embedding"]
)
def test_a_tied_tensor_is_found_by_any_name_and_any_owner(rule):
    model = LanguageModel()
    assert "embed_tokens.weight" in names(select(model, include=(rule,)))
    assert "embed_tokens.weight" not in names(select(model, exclude=(rule,)))


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ("weight", TypeError, r"`include` should be a sequence of rules, got 'weight'; one alone is \('weight',\)"),
        (nn.Linear, TypeError, "should be a sequence of rules, got <class"),
        (None, TypeError, "should be a sequence of rules, got None"),
        ({"weight"}, TypeError, "should be a sequence of rules, got {'weight'}"),
        (("biases",), ValueError, r"`include` should hold kinds \(bias, norm, .*got 'biases'. Did you mean 'bias'\?"),
        (("Norm",), ValueError, r"Did you mean 'norm'\?"),
        (("encoder",), ValueError, r"classes or functions, got 'encoder'. To match names write '\*encoder\*'\."),
        (("weight", 1), TypeError, "`include` should hold kinds .*, got 1"),
        ((int,), TypeError, "module classes or functions, got <class 'int'>"),
        ((nn.Linear(2, 2),), TypeError, "got a module; give its class Linear, or a glob on its name"),
    ],
)
def test_what_is_no_rule_raises(rules, error, message):
    with pytest.raises(error, match=message):
        check_rules(rules, argument="include")
    with pytest.raises(error, match=message):
        select(MLP(), include=rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("hiden.*", "'hiden.*' matches no parameter; the nearest are 'hidden.bias', "),
        ("type:Liner", "'type:Liner' matches no parameter; the nearest are 'Linear', "),
        ("type:", "'type:' matches no parameter; the nearest are"),
        (nn.BatchNorm2d, "BatchNorm2d'> matches no parameter; the nearest are 'BatchNorm1d', '_BatchNorm', "),
        (lambda info: False, "<function .*> matches no parameter; the module has 6"),
    ],
)
def test_an_idle_rule_raises_and_names_what_is_near(rule, message):
    with pytest.raises(ValueError, match=message.replace("*'", r"\*'")):
        select(MLP(), include=(rule,))
    with pytest.raises(ValueError, match="matches no parameter"):
        select(MLP(), exclude=(rule,))


def test_a_module_without_parameters_raises():
    with pytest.raises(ValueError, match=r"'\*' matches no parameter; the module has 0"):
        select(nn.Tanh())


def test_kinds_may_be_absent():
    require_matches(KINDS, parameter_infos(nn.Linear(2, 2)))
    assert select(nn.Linear(2, 2), include=("embedding",)) == []


def test_an_info_made_by_hand_is_enough_for_rules():
    linear = nn.Linear(2, 2)
    info = ParameterInfo("weight", linear.weight, linear, "weight", linear.weight.shape)
    assert matches(nn.Linear, info)
    assert matches("w*", info)
