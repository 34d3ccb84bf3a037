"""Do inputs, blocks and heads of attention become zero as a whole, on one process and on two?

A case is a module, what ``GroupLassoPenalty`` is told, and the number of the group of each element, by hand. What the
elements of a number become is solved by scipy, in float64.
"""

import copy
import math

import lightning.pytorch as L
import numpy as np
import pytest
import scipy.optimize
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from lightning_regularize import GroupLassoPenalty
from lightning_regularize._steps import buckets
from lightning_regularize.penalties import GroupLasso
from tests.distributed import run_distributed
from tests.training.matrix import Kept
from tests.training.support import QUIET, make_trainer

pytestmark = QUIET

LR = 0.1


class Attention(nn.Module):
    """With projections and attributes by the names that are asked for."""

    def __init__(self, layers, **attributes):
        super().__init__()
        for name, (inputs, outputs) in layers.items():
            self.add_module(name, nn.Linear(inputs, outputs))
        vars(self).update(attributes)


def hugging_face(name, **options):
    import transformers

    common = {"vocab_size": 11, "num_hidden_layers": 2, "intermediate_size": 8, "hidden_size": 8, "pad_token_id": 0}
    if name != "ViT":
        options = {"bos_token_id": 1, "eos_token_id": 2, **options}
    config = getattr(transformers, f"{name}Config")(**{**common, **options})
    return getattr(transformers, f"{name}Model")(config)


def runs(*sizes):
    """The numbers 0, 1, ..., each as often as it says, a list each time: ``runs(2, 2)`` is 0, 0, 1, 1."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def of_layers(labels, template, heads):
    """``labels`` of one layer, for two layers with as many heads."""
    return {template.format(i) + name: each + heads * i for i in range(2) for name, each in labels.items()}


TWO = runs(4, 4)  # the rows of 2 heads of 4
SQUARE = {"rows": TWO[:, None].expand(8, 8), "columns": TWO[None].expand(8, 8)}
PACKED = TWO.repeat(3)[:, None].expand(24, 8)
SHARED = runs(2, 2).repeat_interleave(2)  # of 4 queries of 2, of which 2 share a key
GROUPED_IN = torch.arange(6).view(2, 1, 3, 1, 1).expand(2, 2, 3, 2, 2).reshape(4, 3, 2, 2)


def separate(query, key, value, output):
    return {
        **{f"{name}.weight": SQUARE["rows"] for name in (query, key, value)},
        f"{output}.weight": SQUARE["columns"],
    }


def each(shape, *dims):
    """A number for each index in ``dims``, the same for all other indices."""
    sizes = [size if d in dims else 1 for d, size in enumerate(shape)]
    return torch.arange(math.prod(sizes)).view(sizes).expand(shape)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 6)


CASES = {
    "output, Linear": (lambda: nn.Linear(7, 5), {}, {"weight": each((5, 7), 0)}),
    "output, Conv2d": (lambda: nn.Conv2d(3, 4, 2), {"group": "output"}, {"weight": each((4, 3, 2, 2), 0)}),
    "dim": (lambda: nn.Conv2d(3, 4, 2), {"dim": (2, 3)}, {"weight": each((4, 3, 2, 2), 0, 1)}),
    "input, Linear": (lambda: nn.Linear(7, 5), {"group": "input"}, {"weight": each((5, 7), 1)}),
    "input, Conv1d": (lambda: nn.Conv1d(3, 5, 2), {"group": "input"}, {"weight": each((5, 3, 2), 1)}),
    "input, Conv2d": (lambda: nn.Conv2d(3, 4, 2), {"group": "input"}, {"weight": each((4, 3, 2, 2), 1)}),
    "input, grouped": (lambda: nn.Conv2d(6, 4, 2, groups=2), {"group": "input"}, {"weight": GROUPED_IN}),
    "input, depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), {"group": "input"}, {
        "weight": runs(2, 2, 2, 2)[:, None, None].expand(8, 1, 3),
    }),
    "input, transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), {"group": "input"}, {"weight": each((4, 3, 2, 2), 0)}),
    "input, transposed and grouped": (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2), {"group": "input"}, {
        "weight": each((4, 3, 2), 0),
    }),
    "input, Conv1D": (conv1d, {"group": "input", "include": ("weight",)}, {"weight": each((6, 4), 0)}),
    "input, Embedding": (lambda: nn.Embedding(5, 3), {"group": "input"}, {"weight": each((5, 3), 0)}),
    "input, LSTM": (lambda: nn.LSTM(3, 2), {"group": "input"}, {
        "weight_ih_l0": each((8, 3), 1), "weight_hh_l0": 3 + each((8, 2), 1),
    }),
    "block, Linear": (lambda: nn.Linear(8, 5), {"group": "block", "block_size": 4}, {
        "weight": each((5, 2, 4), 0, 1).reshape(5, 8),
    }),
    "block, Conv2d": (lambda: nn.Conv2d(4, 3, 2), {"group": "block", "block_size": 2}, {
        "weight": each((3, 2, 2, 2, 2), 0, 1, 3, 4).reshape(3, 4, 2, 2),
    }),
    "block, Conv1D": (conv1d, {"group": "block", "block_size": 3, "include": ("weight",)}, {
        "weight": each((2, 3, 4), 0, 2).reshape(6, 4),
    }),
    "block, dim 0": (lambda: nn.Linear(3, 8), {"group": "block", "block_size": 2, "dim": 0}, {
        "weight": each((4, 2, 3), 0, 2).reshape(8, 3),
    }),
    "head, packed": (lambda: nn.MultiheadAttention(8, 2), {"group": "head"}, {
        "in_proj_weight": PACKED, "out_proj.weight": SQUARE["columns"],
    }),
    "head, three of MultiheadAttention": (lambda: nn.MultiheadAttention(6, 3, kdim=5, vdim=4), {"group": "head"}, {
        **{f"{n}_proj_weight": runs(2, 2, 2)[:, None].expand(6, i) for n, i in [("q", 6), ("k", 5), ("v", 4)]},
        "out_proj.weight": runs(2, 2, 2).expand(6, 6),
    }),
    "head, 3 of 3 rows": (
        lambda: Attention({"to_q": (5, 9), "to_k": (5, 9), "to_v": (5, 9), "to_out": (9, 5)}, heads=3),
        {"group": "head"},
        {**{f"to_{n}.weight": runs(3, 3, 3)[:, None].expand(9, 5) for n in "qkv"},
         "to_out.weight": runs(3, 3, 3).expand(5, 9)},
    ),
    "head, timm": (lambda: Attention({"qkv": (8, 24), "proj": (8, 8)}, num_heads=2), {"group": "head"}, {
        "qkv.weight": PACKED, "proj.weight": SQUARE["columns"],
    }),
    "head, a number of one rank": (
        lambda: Attention({f"{n}_proj": (8, 8) for n in ("q", "k", "v", "out")}, num_heads=1, head_dim=4),
        {"group": "head"}, separate("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "head, only outputs": (lambda: nn.MultiheadAttention(8, 2), {"group": "head", "include": ("out_proj.weight",)}, {
        "out_proj.weight": SQUARE["columns"],
    }),
    "head, BERT": (lambda: hugging_face("Bert", num_attention_heads=2), {"group": "head"}, of_layers(
        separate("self.query", "self.key", "self.value", "output.dense"), "encoder.layer.{}.attention.", 2)),
    "head, GPT-2": (lambda: hugging_face("GPT2", num_attention_heads=2), {"group": "head"}, of_layers(
        {"c_attn.weight": PACKED.T, "c_proj.weight": SQUARE["rows"]}, "h.{}.attn.", 2)),
    "head, ViT": (
        lambda: hugging_face("ViT", num_attention_heads=2, image_size=8, patch_size=4), {"group": "head"},
        of_layers(separate("q_proj", "k_proj", "v_proj", "o_proj"), "layers.{}.attention.", 2),
    ),
    "head, Llama": (
        lambda: hugging_face("Llama", num_attention_heads=4, num_key_value_heads=2), {"group": "head"},
        of_layers({
            "q_proj.weight": SHARED[:, None].expand(8, 8), "o_proj.weight": SHARED.expand(8, 8),
            **{f"{n}_proj.weight": runs(2, 2)[:, None].expand(4, 8) for n in "kv"},
        }, "layers.{}.self_attn.", 2),
    ),
    "head, Phi3": (
        lambda: hugging_face("Phi3", num_attention_heads=4, num_key_value_heads=2), {"group": "head"},
        of_layers({
            "qkv_proj.weight": torch.cat([SHARED, runs(2, 2), runs(2, 2)])[:, None].expand(16, 8),
            "o_proj.weight": SHARED.expand(8, 8),
        }, "layers.{}.self_attn.", 2),
    ),
    **{
        f"head, head by head by {next(iter(attributes))}": (
            lambda attributes=attributes: Attention({"qkv": (8, 24), "proj": (8, 8)}, num_heads=2, **attributes),
            {"group": "head"}, {"qkv.weight": runs(12, 12)[:, None].expand(24, 8), "proj.weight": SQUARE["columns"]},
        )
        for attributes in ({"head_first": True}, {"multi_query": False})
    },
    "head, wide values": (
        lambda: Attention({"qkv": (8, 16), "proj": (8, 8)}, num_heads=2, key_dim=2, val_dim=4), {"group": "head"},
        {"qkv.weight": runs(8, 8)[:, None].expand(16, 8), "proj.weight": SQUARE["columns"]},
    ),
    "head, ModernBERT": (lambda: hugging_face("ModernBert", num_attention_heads=2), {"group": "head"}, of_layers(
        {"Wqkv.weight": PACKED, "Wo.weight": SQUARE["columns"]}, "layers.{}.attn.", 2)),
    "head, GPT-NeoX": (lambda: hugging_face("GPTNeoX", num_attention_heads=2), {"group": "head"}, of_layers(
        {"query_key_value.weight": runs(12, 12)[:, None].expand(24, 8), "dense.weight": SQUARE["columns"]},
        "layers.{}.attention.", 2)),
}  # fmt: skip
each_case = pytest.mark.parametrize("name", CASES)
METHODS = {
    "gradient": (torch.optim.SGD, "gradient", 0.5),
    "proximal, SGD": (torch.optim.SGD, "proximal", 0.1),
    "proximal, Adam": (torch.optim.Adam, "proximal", 2.0),
}


def made(name):
    """The module of a case in float64, some groups of which are small, with a gradient for each parameter."""
    make, _, labels = CASES[name]
    torch.manual_seed(0)
    module = make().double().requires_grad_()
    for key, parameter in module.named_parameters():
        parameter.data.normal_(0, 0.3)
        if key in labels:
            parameter.data[labels[key] % 2 == 1] *= 0.02
    return module


def gradients(module, method):
    """Random ones for Adam, whose metric they make; none for SGD."""
    generator = torch.Generator().manual_seed(1)
    scale = 1.0 if "Adam" in method else 0.0
    return {n: scale * torch.randn(p.shape, generator=generator).double() for n, p in module.named_parameters()}


def expected(name, method):
    """What the weights become, or what is added to their gradients, group by group."""
    optimizer, way, strength = METHODS[method]
    module, labels = made(name), CASES[name][2]
    grads = gradients(module, method)
    plain = copy.deepcopy(module)
    for key, parameter in plain.named_parameters():
        parameter.grad = grads[key]
    optimizer(plain.parameters(), lr=LR).step()
    found = {n: p.detach().clone() for n, p in plain.named_parameters()}
    lengths = {n: LR / (g.abs() + 1e-8) if "Adam" in method else torch.full_like(g, LR) for n, g in grads.items()}
    if way == "gradient":
        found = {n: p.detach().zero_() for n, p in plain.named_parameters()}
    weights = dict(module.named_parameters()) if way == "gradient" else found
    solutions = {n: found[n].clone() for n in labels}
    for number in range(1 + max(int(label.max()) for label in labels.values())):
        where = {n: label == number for n, label in labels.items()}
        w = np.concatenate([weights[n].detach()[mask].numpy() for n, mask in where.items()])
        if way == "gradient":
            solved = strength * math.sqrt(w.size) * w / np.linalg.norm(w)
        else:
            solved = shrunk(w, strength * np.concatenate([lengths[n][mask].numpy() for n, mask in where.items()]))
        sizes = [int(mask.sum()) for mask in where.values()]
        for (n, mask), values in zip(where.items(), torch.from_numpy(solved).split(sizes), strict=True):
            solutions[n][mask] = values
    return found | solutions


def shrunk(w, thresholds):
    removed = thresholds * math.sqrt(w.size)

    def excess(norm):
        return ((w / (norm + removed)) ** 2).sum() - 1

    norm = scipy.optimize.brentq(excess, 0, np.linalg.norm(w), xtol=1e-300, rtol=1e-15) if excess(0) > 0 else 0.0
    return w * norm / (norm + removed)


def acted(name, method, wrap=lambda module: module):
    """The module after a step, with the gradients of that step."""
    optimizer, way, strength = METHODS[method]
    module = made(name)
    grads = gradients(module, method)
    wrap(module)
    stepping = optimizer(module.parameters(), lr=LR)
    for key, parameter in module.named_parameters():
        parameter.grad = like(grads[key], parameter)
    with GroupLassoPenalty(strength, method=way, **CASES[name][1]).attach(stepping, module):
        stepping.step()
    return {n: whole(p.grad if way == "gradient" else p.detach()) for n, p in module.named_parameters()}


def like(gradient, parameter):
    if not hasattr(parameter, "device_mesh"):
        return gradient
    return torch.distributed.tensor.distribute_tensor(gradient, parameter.device_mesh, parameter.placements)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("method", METHODS)
@each_case
def test_groups_are_penalized_as_a_whole(name, method):
    solution = expected(name, method)
    torch.testing.assert_close(acted(name, method), solution, rtol=1e-9, atol=1e-12)
    if "proximal" in method:  # or it would show nothing
        are_zero = torch.cat([(solution[n] == 0).flatten() for n in CASES[name][2]])
        assert are_zero.any()
        assert not are_zero.all()


def on_two(rank, world_size):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    return {
        (name, method): {n: t.numpy() for n, t in acted(name, method, lambda m: fully_shard(m, mesh=mesh)).items()}
        for name in CASES
        for method in METHODS
        if method != "proximal, SGD" or "packed" in name
    }


def test_two_processes_end_where_one_does():
    first, second = run_distributed(on_two)
    for (name, method), found in first.items():
        for key, solution in expected(name, method).items():
            assert (found[key] == second[name, method][key]).all()
            assert found[key] == pytest.approx(solution.numpy(), rel=1e-9, abs=1e-12), f"{name}, {method}, {key}"


def test_what_ranks_cut_through_is_refused():
    run_distributed(refuse)


def refuse(rank, world_size):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for module, options in (
        (nn.Conv1d(6, 6, 2, groups=3), {"group": "input"}),
        (nn.Linear(3, 6), {"group": "block", "block_size": 2, "dim": 0}),
    ):
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)
        with pytest.raises(MisconfigurationException, match="ranks cut through them"):
            GroupLassoPenalty(0.1, **options).attach(optimizer, module)


# Heads


def attend(module, *, optimizer=None, method="proximal", **options):
    """One step with zero gradients."""
    stepping = optimizer or torch.optim.SGD(module.parameters(), lr=LR)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with GroupLassoPenalty(0.1, group="head", method=method, **options).attach(stepping, module):
        stepping.step()
    return {n: p.detach() for n, p in module.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["head, packed", "head, Llama"])
def test_a_large_layer_is_taken_some_heads_at_a_time(name, method, monkeypatch):
    solution = acted(name, method)
    monkeypatch.setattr(buckets, "_CPU_BYTES", 1200)  # less than a layer, of which a head has 1,024 or more
    torch.testing.assert_close(acted(name, method), solution, rtol=1e-12, atol=1e-15)


def test_small_layers_share_a_matrix(monkeypatch):
    seen = []
    monkeypatch.setattr(GroupLasso, "proximal_", lambda self, w, *_, **__: seen.append(tuple(w.shape)))
    attend(nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(6, 3), nn.MultiheadAttention(8, 2)]))
    assert seen == [(4, 4 * 4 * 8), (3, 4 * 2 * 6)]


def test_what_is_frozen_is_no_part_of_a_head():
    module = nn.MultiheadAttention(8, 2).double()
    module.in_proj_weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    after = attend(module)
    heads = before["out_proj.weight"].view(8, 2, 4)
    expected = heads * (1 - LR * 0.1 * 32**0.5 / heads.norm(dim=(0, 2), keepdim=True))
    torch.testing.assert_close(after.pop("out_proj.weight"), expected.view(8, 8), rtol=1e-12, atol=0)
    assert all(torch.equal(weight, before[n]) for n, weight in after.items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_gradients_of_heads_in_half_precision(rounding):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(64, 4).bfloat16()
    columns = module.out_proj.weight.detach().double().view(64, 4, 16)
    rows = module.in_proj_weight.detach().double().view(3, 4, 16, 64)
    norms = (columns.square().sum((0, 2)) + rows.square().sum((0, 2, 3))).sqrt()
    expected = 0.1 * 4096**0.5 * columns / norms[:, None]
    attend(module, method="gradient", rounding=rounding)
    found = module.out_proj.weight.grad.double().view(64, 4, 16)
    assert (found - expected).abs().max() < 2**-7 * expected.abs().max()


def test_the_penalty_of_heads_is_logged():
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2).double()

        def training_step(self, batch, batch_idx):
            return 0.0 * self.attention.in_proj_weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    module = Module()
    norms = [head.norm() for head in matrix_of(module.attention)]
    logger = Kept()
    make_trainer(GroupLassoPenalty(0.1, group="head"), max_epochs=1, logger=logger).fit(module, range(1))
    assert logger.values["penalty/group_lasso"][0] == pytest.approx(0.1 * 128**0.5 * float(sum(norms)), rel=1e-6, abs=0)


def matrix_of(attention):
    """The weights of each head of a layer of torch, of two heads of 4."""
    rows, columns = attention.in_proj_weight.view(3, 2, 4, 8), attention.out_proj.weight.view(8, 2, 4)
    return torch.cat([rows.transpose(0, 1).reshape(2, -1), columns.transpose(0, 1).reshape(2, -1)], dim=1).detach()


def projections(**attributes):
    return Attention({"q_proj": (8, 8), "k_proj": (8, 8), "v_proj": (8, 8), "out_proj": (8, 8)}, **attributes)


class CodeGenAttention(Attention):
    """As transformers' class of this name, which packs weights in four parts of queries, values and keys."""


class SubSampleAttn(Attention):
    """As in Twins, with one projection to keys and values."""


HEADLESS = {
    "no number": (lambda: projections(), "cannot be told: it does not say how many there are. Give the module an int"),
    "a number that does not divide": (lambda: projections(num_heads=3), "3 heads do not divide 8 queries"),
    "no output": (
        lambda: Attention({"q_proj": (8, 8), "k_proj": (8, 8), "v_proj": (8, 8)}, num_heads=2),
        "its output projection has none of the names that are known",
    ),
    "other names": (
        lambda: Attention({"first": (8, 8), "second": (8, 8)}, num_heads=2),
        r"none of the layouts that are known, with weights called \['first.weight', 'second.weight'\]",
    ),
    "an order that is not known": (
        lambda: Attention({"query_key_value": (8, 24), "dense": (8, 8)}, num_heads=2),
        "packs queries, keys and values in an order that is not known",
    ),
    "an order of its own": (
        lambda: CodeGenAttention({"qkv_proj": (8, 24), "out_proj": (8, 8)}, num_heads=2),
        "packs queries, keys and values in an order that is not known",
    ),
    "packed keys and values without queries": (
        lambda: Attention({"qkv": (8, 16), "proj": (8, 8)}, num_heads=4),
        r"4 heads do not fit weights of the shapes \[\(16, 8\), \(8, 8\)\]",
    ),
    "Attn in its name": (
        lambda: SubSampleAttn({"q": (8, 8), "kv": (8, 16), "proj": (8, 8)}, num_heads=2),
        r"none of the layouts that are known, with weights called \['q.weight', 'kv.weight', 'proj.weight'\]",
    ),
    "keys that do not fit": (
        lambda: Attention({"q": (8, 8), "k": (8, 6), "v": (8, 6), "o": (8, 8)}, num_heads=2),
        "2 heads do not fit weights of the shapes",
    ),
    "no attention": (lambda: nn.Linear(8, 8), "the model has no attention layer that is known"),
}


@pytest.mark.parametrize(("make", "message"), HEADLESS.values(), ids=HEADLESS)
def test_heads_that_cannot_be_told(make, message):
    module = nn.ModuleDict({"layer": make()})
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    with pytest.raises(MisconfigurationException, match=message) as raised:
        GroupLassoPenalty(0.1, group="head").attach(optimizer, module)
    assert str(raised.value).startswith("GroupLassoPenalty: ")
    if "no attention" not in message:
        assert "'layer'" in str(raised.value)
        assert "exclude=('layer.*',)" in str(raised.value)


def test_a_layer_that_cannot_be_told_may_be_left_out():
    module = nn.ModuleDict({"layer": projections(), "other": nn.MultiheadAttention(8, 2)})
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    after = attend(module, exclude=("bias", "layer.*"))
    changed = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert changed == {"other.in_proj_weight", "other.out_proj.weight"}


def test_a_layer_in_two_parameter_groups_is_refused():
    module = nn.MultiheadAttention(8, 2)
    groups = [{"params": [module.in_proj_weight]}, {"params": [module.out_proj.weight]}]
    with pytest.raises(MisconfigurationException, match="in several parameter groups, and a head can only be"):
        attend(module, optimizer=torch.optim.SGD(groups, lr=LR))


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group": "heads"}, ValueError, "`group` should be 'output', 'input', 'head' or 'block', got 'heads'"),
        ({"group": ["head"]}, ValueError, r"`group` should be .*, got \['head'\]"),
        ({"group": "block"}, ValueError, "`block_size` should be a positive integer, got None"),
        ({"group": "block", "block_size": 0}, ValueError, "`block_size` should be a positive integer, got 0"),
        ({"group": "block", "block_size": 2.0}, ValueError, "`block_size` should be a positive integer, got 2.0"),
        ({"block_size": 2}, ValueError, "`block_size` is for group='block', got 2 with group='output'"),
        ({"group": "input", "dim": 0}, ValueError, "`dim` says what a group is instead of group='input': .* got 0"),
        ({"group": "block", "block_size": 2, "dim": (0, 1)}, TypeError, r"`dim` should be one integer .* got \(0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=f"^GroupLassoPenalty: {message}"):
        GroupLassoPenalty(0.1, **options)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(7, 5), {"group": "block", "block_size": 2}, "should divide .* got 2 for dim 1 of shape"),
        (nn.Linear(7, 5), {"group": "block", "block_size": 2, "dim": 2}, "each from -2 to 1, got 2"),
        (nn.Bilinear(2, 3, 4), {"group": "input"}, "A Bilinear has two inputs"),
    ],
    ids=["size", "dim", "two inputs"],
)
def test_weights_without_such_groups_are_refused_by_name(module, options, message):
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    with pytest.raises(MisconfigurationException, match=f"does not know what the units of 'weight' are: .*{message}"):
        GroupLassoPenalty(0.1, **options).attach(optimizer, module)


@pytest.mark.parametrize("options", [{"group": "input"}, {"group": "block", "block_size": 2}], ids=repr)
def test_a_guess_is_told(options):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 6))

    module = Plain()
    with pytest.warns(UserWarning, match=r"takes dim 0 of weights for the output units of Plain"):
        GroupLassoPenalty(0.1, **options).attach(torch.optim.SGD(module.parameters(), lr=LR), module)


def test_penalties_of_other_groups_have_other_keys_in_a_checkpoint():
    keys = {GroupLassoPenalty(0.1, group=group).state_key for group in ("output", "input", "head")}
    assert len(keys) == 3
