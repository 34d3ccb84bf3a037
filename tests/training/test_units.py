"""Are constraints and group penalties per output unit in layers that store their weights in another way?"""

import functools
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD

from lightning_regularize import GroupLassoPenalty, WeightConstraint, WeightDecay
from lightning_regularize.projections import MaxNorm, SpectralBall, UnitNorm
from tests.models import randn
from tests.training.support import QUIET, make_trainer

pytestmark = QUIET


class GPT2(L.LightningModule):
    """Of transformers: all its matrices are of shape (in, out)."""

    def __init__(self, loss_factor=1.0):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        self.model = GPT2Model(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16))
        self.loss_factor = loss_factor

    def training_step(self, batch, batch_idx):
        hidden = self.model(input_ids=torch.arange(10).view(2, 5)).last_hidden_state
        return self.loss_factor * hidden.square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)

    def matrices(self):
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.dim() == 2 and ".h." in name}


def fit(module, callback):
    make_trainer(callback, max_epochs=1).fit(module, range(3))
    return module


@pytest.mark.parametrize("projection", [MaxNorm(0.01), UnitNorm()], ids=repr)
def test_the_outputs_of_gpt2_are_constrained(projection):
    # Without a gradient, which may lead some outputs inside.
    found = fit(GPT2(loss_factor=0.0), WeightConstraint(projection, exclude=("embedding",))).matrices()
    assert len(found) == 4
    bound = getattr(projection, "max_norm", 1.0)
    for weight in found.values():
        outputs, inputs = (weight.double().norm(dim=dim) for dim in (0, 1))
        assert outputs.tolist() == pytest.approx([bound] * len(outputs), rel=1e-5, abs=0)
        assert inputs.tolist() != pytest.approx([bound] * len(inputs), rel=1e-2, abs=0)


def test_the_matrix_of_an_output_layer_is_stretched_no_more_whichever_way_it_is_stored():
    found = fit(GPT2(), WeightConstraint(SpectralBall(0.05))).matrices()
    for weight in found.values():
        assert torch.linalg.svdvals(weight.double())[0] <= 0.05 * (1 + 1e-6)


@pytest.mark.parametrize("method", ["proximal", "gradient"])
def test_the_outputs_of_gpt2_are_the_groups_of_a_group_lasso(method):
    """Without a loss, one step is the soft threshold of each output, or a step along its direction."""
    strength, lr = 0.02, 0.1
    module = GPT2(loss_factor=0.0)
    before = module.matrices()
    callback = GroupLassoPenalty(strength, include=("type:Conv1D",), exclude=("bias",), method=method)
    make_trainer(callback, max_epochs=1).fit(module, range(1))
    for name, weight in module.matrices().items():
        start = before[name].double()
        step = lr * strength * start.shape[0] ** 0.5 / start.norm(dim=0)
        expected = start * (1 - step).clamp_min(0 if method == "proximal" else -1)
        assert weight.double().flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-5, abs=1e-8)


def test_norms_of_heads_do_not_decay():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    class Heads(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.project, self.q_norm = nn.Linear(3, 8), CohereLayerNorm((2, 4))

        def training_step(self, batch, batch_idx):
            return 0.0 * self.q_norm(self.project(torch.ones(1, 3)).view(1, 2, 4)).sum()

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1)

    module = Heads()
    project, gain = (p.detach().clone() for p in (module.project.weight, module.q_norm.weight))
    fit(module, WeightDecay(0.5))
    assert torch.equal(module.q_norm.weight, gain)
    torch.testing.assert_close(module.project.weight.detach(), project * 0.95**3)


class GraphConvolution(nn.Module):
    """As in the first implementations of graph networks."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(randn(in_features, out_features))

    def forward(self, x):
        return x @ self.weight


class Plain(nn.Module):
    """Tells nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(4, 6))

    def forward(self, x):
        return x @ self.weight


class Layered(L.LightningModule):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        return self.layers(torch.ones(2, 4)).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.01)


def test_a_graph_convolution_is_constrained_per_output():
    module = fit(Layered(GraphConvolution(4, 6)), WeightConstraint(UnitNorm()))
    assert module.layers[0].weight.norm(dim=0).tolist() == pytest.approx([1.0] * 6, rel=1e-5, abs=0)


PER_UNIT = {
    "UnitNorm": (lambda **options: WeightConstraint(UnitNorm(**options)), "WeightConstraint", "UnitNorm(..., dim=...)"),
    "group lasso": (
        lambda **options: GroupLassoPenalty(0.1, method="proximal", **options),
        "GroupLassoPenalty",
        "GroupLassoPenalty(..., dim=...)",
    ),
}
per_unit = pytest.mark.parametrize(("make", "callback", "argument"), PER_UNIT.values(), ids=PER_UNIT)


@per_unit
@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ([Plain()], ["Plain"]),
        ([GraphConvolution(4, 4), GraphConvolution(4, 6)], ["GraphConvolution"]),
        ([GraphConvolution(4, 4), GraphConvolution(4, 4), Plain()], ["GraphConvolution", "Plain"]),
        ([GraphConvolution(4, 6), nn.Linear(6, 6)], []),
    ],
    ids=["no sizes", "square", "two classes", "known"],
)
def test_where_the_units_are_a_guess_it_is_told_once_a_class(layers, told, make, callback, argument):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Layered(*layers), make())
    messages = [str(w.message) for w in caught if "output units" in str(w.message)]
    assert len(messages) == len(told)
    for message, name in zip(messages, told, strict=True):
        assert message.startswith(f"{callback} takes dim 0 of weights")
        assert f"and {name} does not say what they are" in message
        assert f"`{argument}`" in message


@per_unit
@pytest.mark.parametrize("layer", [Plain(), GraphConvolution(4, 4), GraphConvolution(4, 6)], ids=["0", "1", "2"])
def test_a_dim_that_is_given_is_used_and_nothing_is_told(layer, make, callback, argument):
    module = Layered(layer)
    with torch.no_grad():
        module.layers[0].weight[:, 0] = 1e-6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*output units")
        fit(module, make(dim=0))
    outputs = module.layers[0].weight.norm(dim=0)
    if callback == "WeightConstraint":
        assert outputs.tolist() == pytest.approx([1.0] * len(outputs), rel=1e-5, abs=0)
    else:
        assert (outputs == 0).tolist() == [True] + [False] * (len(outputs) - 1)


class Upside(nn.Linear):
    """Its attributes contradict what is usual for its class."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x):
        return x @ self.weight


@per_unit
def test_the_attributes_of_a_layer_precede_its_class(make, callback, argument):
    module = Layered(Upside(4, 6))
    with torch.no_grad():
        module.layers[0].weight[:, 0] = 1e-6
    fit(module, make())
    outputs = module.layers[0].weight.norm(dim=0)
    if callback == "WeightConstraint":
        assert outputs.tolist() == pytest.approx([1.0] * 6, rel=1e-5, abs=0)
    else:
        assert (outputs == 0).tolist() == [True] + [False] * 5


@pytest.mark.parametrize("method", ["proximal", "gradient"])
@pytest.mark.parametrize("dim", [0, (0,), [-2]], ids=repr)
def test_a_group_lasso_is_over_the_dim_that_is_given(dim, method):
    """By hand, on a raw parameter whose gradient is zero."""
    module = Layered(SparseAutoencoder())
    penalty = GroupLassoPenalty(0.02, dim=dim, include=("*.W_enc",), method=method)
    start, lr = module.layers[0].W_enc.detach().double(), 0.01
    module.training_step = lambda batch, batch_idx: 0.0 * module.layers(torch.ones(2, 4)).sum()
    make_trainer(penalty, max_epochs=1).fit(module, range(1))
    expected = start * (1 - lr * 0.02 * 2 / start.norm(dim=0))  # the root of 4 inputs is 2
    torch.testing.assert_close(module.layers[0].W_enc.detach().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dim", "error", "message"),
    [
        ("0", TypeError, r"GroupLassoPenalty: `dim` should be None, an integer, or a sequence of integers, got '0'"),
        (True, TypeError, r"got True"),
        ([0.5], TypeError, r"got \[0\.5\]"),
        ((), ValueError, r"GroupLassoPenalty: `dim` should name at least one dim of a weight, got \(\)"),
    ],
    ids=repr,
)
def test_a_dim_that_is_none_is_refused_at_once(dim, error, message):
    with pytest.raises(error, match=message):
        GroupLassoPenalty(0.1, dim=dim)
    for make in (UnitNorm, functools.partial(MaxNorm, 1.0), functools.partial(SpectralBall, 1.0)):
        with pytest.raises(error, match=message.removeprefix("GroupLassoPenalty: ")):
            make(dim=dim)


def test_a_dim_that_a_weight_lacks_names_the_weight():
    with pytest.raises(MisconfigurationException, match=r"units of 'layers\.0\.weight' are: `dim` .* got 2"):
        fit(Layered(nn.Linear(4, 6)), GroupLassoPenalty(0.1, dim=2))


class SparseAutoencoder(nn.Module):
    """Its matrices are parameters of its own, which no layer describes."""

    def __init__(self):
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(randn(4, 6)), nn.Parameter(randn(6, 4))
        self.b_enc = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return torch.relu(x @ self.W_enc + self.b_enc) @ self.W_dec


def test_a_matrix_that_no_layer_describes_asks_for_its_dim():
    message = r"'layers\.0\.W_enc': .* Leave it out, as by `exclude=\(\"\*W_enc\",\)`, or say by `dim` what a unit is"
    with pytest.raises(ValueError, match=message):
        fit(Layered(SparseAutoencoder()), WeightConstraint(UnitNorm()))
    with pytest.raises(MisconfigurationException, match=message.split(".*")[-1]):
        fit(Layered(SparseAutoencoder()), GroupLassoPenalty(0.1))
    module = fit(Layered(SparseAutoencoder()), WeightConstraint(UnitNorm(dim=1), include=("*.W_dec",)))
    assert module.layers[0].W_dec.norm(dim=1).tolist() == pytest.approx([1.0] * 6, rel=1e-5, abs=0)


def test_an_embedding_that_is_the_output_layer_too_is_constrained_per_word():
    from transformers import GPT2Config, GPT2LMHeadModel

    class Language(GPT2):
        def __init__(self):
            super().__init__()
            self.model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16))

        def training_step(self, batch, batch_idx):
            return 1e-3 * self.model(input_ids=torch.arange(1, 11).view(2, 5)).logits.square().mean()

    constraint = WeightConstraint(UnitNorm(), include=("*.wte.weight",))
    penalty = GroupLassoPenalty(0.02, method="proximal", include=("*.wte.weight",))
    for callback, expected in (constraint, [1.0] * 11), (penalty, [0.0, *[None] * 10]):
        module = Language()
        with torch.no_grad():
            module.model.transformer.wte.weight[0] *= 1e-6  # no word of the batch's
        head = fit(module, callback).model.lm_head.weight
        assert head is module.model.transformer.wte.weight
        for norm, asked in zip(head.norm(dim=1).tolist(), expected, strict=True):
            assert norm > 1e-3 if asked is None else norm == pytest.approx(asked, rel=1e-5, abs=0)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}], ids=["packed", "separate"])
def test_the_projections_of_attention_are_constrained_per_output(sizes):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, **sizes)

        def forward(self, x):
            key, value = (torch.ones(2, sizes.get(size, 4)) for size in ("kdim", "vdim"))
            return self.attention(x, key, value)[0]

    constraint, penalty = WeightConstraint(UnitNorm()), GroupLassoPenalty(1.0, method="proximal")
    for callback in (constraint, penalty):
        module = Layered(Attending())
        matrices = [p for name, p in module.named_parameters() if "weight" in name]
        assert len(matrices) == (2 if not sizes else 4)
        with torch.no_grad():
            for weight in matrices:
                weight[0] = 1e-6
        fit(module, callback)
        for weight in matrices:
            outputs = weight.norm(dim=1)
            if callback is constraint:
                assert outputs.tolist() == pytest.approx([1.0] * len(weight), rel=1e-5, abs=0)
            else:
                assert (outputs == 0).tolist() == [True] + [False] * (len(weight) - 1)
