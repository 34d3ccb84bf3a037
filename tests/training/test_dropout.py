"""Do the layers drop at the rate of the schedule while they train, and at their own before and after?"""

import functools
import pickle
import types
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_diabetes
from torch import nn
from torch.optim import SGD

from lightning_regularize import DropoutSchedule
from lightning_regularize.schedules import Constant, FollowLR, Linear, early_dropout, late_dropout
from tests.reading import read_csv
from tests.training.support import QUIET, Batches, Regression, make_trainer

pytestmark = QUIET


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class StochasticDepth(nn.Module):
    """As torchvision's."""

    def __init__(self, p):
        super().__init__()
        self.p, self.mode = p, "row"

    def forward(self, x):
        return x


class Gated(nn.Module):
    """With a rate of a name of its own, and something that is no rate."""

    def __init__(self):
        super().__init__()
        self.token_drop_rate, self.p = 0.3, 7


class Layers(Regression):
    def __init__(self, *args, **options):
        super().__init__(lambda parameters: SGD(parameters, lr=0.01), *args, **options)
        self.drop = nn.Sequential(nn.Dropout(0.1), nn.AlphaDropout(0.2))
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True).double()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.4, batch_first=True).double()
        self.single = nn.LSTM(4, 4)  # torch warns of dropout in one layer, which has none
        self.path, self.depth, self.gated = DropPath(0.5), StochasticDepth(0.6), Gated()

    def loss(self, batch):
        x, y = batch
        x = self.drop(self.hidden(x)[:, None])
        x = self.lstm(self.attention(x, x, x)[0])[0]
        return (self.output(x[:, 0]) - y).square().mean()


OWN = {
    "drop.0.p": 0.1,
    "drop.1.p": 0.2,
    "attention.dropout": 0.3,
    "lstm.dropout": 0.4,
    "path.drop_prob": 0.5,
    "depth.p": 0.6,
}


def rates(module, names=OWN):
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        found[name] = getattr(module.get_submodule(path), attribute)
    return found


class Watch(L.Callback):
    """The rates in the very moment of the forward pass."""

    def __init__(self, names=OWN):
        self.names, self.seen = names, []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):  # between the forward pass and the backward pass
        self.seen.append(rates(pl_module, self.names))


def fit(module, *callbacks, **options):
    make_trainer(*callbacks, **{"max_epochs": 1, **options}).fit(module, Batches())
    return module


# --- which rates, and when ----------------------------------------------------------------------------------------


def test_every_kind_of_layer_drops_at_the_rate_of_the_step():
    watch = Watch()
    fit(Layers(), DropoutSchedule(Linear(0.6, 0.0), same=True), watch)
    for k, seen in enumerate(watch.seen):
        assert list(seen.values()) == pytest.approx([0.6 - 0.1 * k] * len(OWN), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (0.25, [0.25] * 7),
        (early_dropout(0.4, until=5), [0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]),
        (late_dropout(0.4, start=5), [0.0] * 5 + [0.4] * 2),
        (lambda at: 0.1 * at.step, [0.1 * k for k in range(7)]),
    ],
    ids=["number", "early", "late", "callable"],
)
def test_schedules(schedule, expected):
    watch = Watch(["drop.0.p"])
    fit(Layers(), DropoutSchedule(schedule, same=True), watch)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_rate_may_follow_the_learning_rate():
    watch = Watch(["drop.0.p"])
    module = Layers(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    fit(module, DropoutSchedule(FollowLR(0.8), same=True), watch)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx(
        [0.8 * 0.5**k for k in range(7)], rel=1e-9, abs=1e-12
    )


def test_the_rate_is_of_the_step_and_not_of_the_batch():
    watch = Watch(["drop.0.p"])

    class Seen(Layers):
        def training_step(self, batch, batch_idx):
            watch.on_before_zero_grad(None, self, None)
            return super().training_step(batch, batch_idx)

    fit(Seen(), DropoutSchedule(Linear(0.2, 0.0), same=True), accumulate_grad_batches=3)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx(
        [0.2] * 3 + [0.1] * 3 + [0.0], rel=1e-9, abs=1e-12
    )


@pytest.mark.filterwarnings("ignore:DropoutSchedule. Linear.* was over after 3 steps")  # on purpose
def test_total_steps_is_the_length_of_the_schedule():
    watch = Watch(["drop.0.p"])
    fit(Layers(), DropoutSchedule(Linear(0.2, 0.0), same=True, total_steps=3), watch)
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx([0.2, 0.1] + [0.0] * 5, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ("drop.*",)}, {"drop.0.p", "drop.1.p"}),
        ({"include": ("type:AlphaDropout", "path")}, {"drop.1.p", "path.drop_prob"}),
        ({"include": (nn.MultiheadAttention, nn.RNNBase)}, {"attention.dropout", "lstm.dropout"}),
        ({"attributes": ("token_drop_rate",)}, {*OWN, "gated.token_drop_rate"}),
    ],
    ids=["glob", "type", "class", "attribute"],
)
def test_rules_select(options, expected):
    names, watch = [*OWN, "gated.token_drop_rate"], None
    watch, module = Watch(names), Layers()
    own = rates(module, names)
    fit(module, DropoutSchedule(0.05, **options), watch, limit_train_batches=1)
    assert {name for name, rate in watch.seen[0].items() if rate != own[name]} == expected
    assert module.gated.p == 7


def test_the_rate_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Layers(), DropoutSchedule(Linear(0.6, 0.0)), logger=logger, log_every_n_steps=3)
    assert read_csv(logger)["dropout/p"] == pytest.approx({2: 0.4, 5: 0.1}, rel=1e-9, abs=1e-12)


class Block(nn.Module):
    """A residual block of stochastic depth, in the three ways in which rates are kept."""

    def __init__(self, p, kind):
        super().__init__()
        self.kind = kind
        if kind == "layer":
            self.drop = nn.Dropout(p)
        elif kind == "drop_path":
            self.drop = DropPath(p)
        else:
            self.dropout_p = p

    def forward(self, x):
        return x + (F.dropout(x, self.dropout_p, self.training) if self.kind == "number" else self.drop(x))

    @property
    def rate(self):
        return {"layer": lambda: self.drop.p, "drop_path": lambda: self.drop.drop_prob}.get(
            self.kind, lambda: self.dropout_p
        )()


class Deep(Regression):
    def __init__(self, rates, kind):
        super().__init__(lambda parameters: SGD(parameters, lr=0.01))
        self.blocks, self.seen = nn.Sequential(*(Block(p, kind) for p in rates)), []

    def loss(self, batch):
        x, y = batch
        self.seen.append([block.rate for block in self.blocks])
        return (self.output(self.blocks(self.hidden(x))) - y).square().mean()


@pytest.mark.parametrize("kind", ["layer", "drop_path", "number"])
@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (0.3, [0.3] * 7),
        (Linear(0.5, 0.0), np.linspace(0.5, 0, 7)),
        (early_dropout(0.5, until=5), [0.5, 0.375, 0.25, 0.125, 0.0, 0.0, 0.0]),
        (late_dropout(0.2, start=3), [0.0] * 3 + [0.2] * 4),
    ],
    ids=["constant", "linear", "early", "late"],
)
def test_rates_keep_their_ratios(schedule, values, kind):
    """As in "Dropout Reduces Underfitting", where stochastic depth grows linearly to the scheduled rate."""
    module = Deep(np.linspace(0, 0.5, 12), kind)
    fit(module, DropoutSchedule(schedule))
    assert module.seen == [pytest.approx(np.linspace(0, p, 12), rel=0, abs=1e-12) for p in values]
    assert [block.rate for block in module.blocks] == list(np.linspace(0, 0.5, 12))


def test_rates_of_float32_keep_the_ratios_that_were_meant():
    """Beit of transformers has its rates from ``torch.linspace``."""
    from transformers import BeitConfig, BeitModel

    config = BeitConfig(
        hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        drop_path_rate=0.5,
    )  # fmt: skip
    seen = []

    class Image(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = BeitModel(config, add_pooling_layer=False)

        def training_step(self, batch, batch_idx):
            seen.append([m.drop_prob for m in self.model.modules() if type(m).__name__ == "BeitDropPath"])
            return self.model(torch.zeros(1, 3, 8, 8)).last_hidden_state.square().mean()

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.01)

    fit(Image(), DropoutSchedule(Linear(0.5, 0.0), include=("type:BeitDropPath",)))
    assert seen == [pytest.approx(np.linspace(0, p, 12)[1:], rel=0, abs=1e-12) for p in np.linspace(0.5, 0, 7)]


@pytest.mark.parametrize("rates", [[0.1234567, 0.7654321], [0.1, 0.3], [0.05, 0.1, 0.15]], ids=str)
def test_other_ratios_are_what_they_are(rates):
    module = Deep(rates, "layer")
    fit(module, DropoutSchedule(0.6), limit_train_batches=1)
    assert module.seen[0] == pytest.approx([0.6 * p / rates[-1] for p in rates], rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("rates", "options", "expected"),
    [
        ([0.1, 0.2, 0.4], {}, [0.2, 0.4, 0.8]),
        ([0.0, 0.3], {}, [0.0, 0.8]),
        ([0.0, 0.0], {}, [0.8, 0.8]),
        ([0.1, 0.0, 0.4], {"same": True}, [0.8, 0.8, 0.8]),
        ([0.4, 0.1, 0.2], {"include": ("blocks.[12].*",)}, [0.4, 0.4, 0.8]),
    ],
    ids=["ratios", "one is zero", "all are zero", "same", "of some"],
)
def test_the_largest_of_the_rates_follows_the_schedule(rates, options, expected, tmp_path):
    logger, module = CSVLogger(tmp_path), Deep(rates, "layer")
    fit(module, DropoutSchedule(0.8, **options), limit_train_batches=1, logger=logger)
    assert module.seen[0] == pytest.approx(expected, rel=0, abs=1e-12)
    assert read_csv(logger)["dropout/p"] == pytest.approx({0: 0.8}, rel=0, abs=1e-12)


# --- rates that are plain numbers ---------------------------------------------------------------------------------


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def bart():
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.1, attention_dropout=0.2,
        activation_dropout=0.3, bos_token_id=1, eos_token_id=2, max_position_embeddings=16,
    )  # fmt: skip
    return BartModel(config)


def llama():
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        attention_dropout=0.2,
    )  # fmt: skip
    return LlamaModel(config)


def gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16))


def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2))


class Text(L.LightningModule):
    """A model of transformers, and the rates at which it has really dropped."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=torch.arange(10).view(2, 5)).last_hidden_state.square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.01)


@pytest.fixture
def dropped(monkeypatch):
    """The rate of each call of torch that drops."""
    found = []

    def spy(holder, name, read):
        original = getattr(holder, name)

        def call(*args, **kwargs):
            found.append(read(*args, **kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, call)

    spy(F, "dropout", lambda x, p=0.5, training=True, inplace=False: p if training else 0.0)
    spy(F, "scaled_dot_product_attention", lambda *_, dropout_p=0.0, **__: dropout_p)
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [bert, bart, llama, gpt2, t5], ids=lambda make: make.__name__)
def test_nothing_in_a_model_of_transformers_drops_at_another_rate(make, attention, dropped):
    model = make()
    model.set_attn_implementation(attention)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    fit(Text(model), DropoutSchedule(0.35, same=True), limit_train_batches=2)
    assert len(dropped) >= 4
    assert set(dropped) == {0.35}
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    for name, attributes in before.items():
        rates = {key: value for key, value in attributes.items() if isinstance(value, float)}
        assert rates == {key: after[name][key] for key in rates}


class Attention(nn.Module):
    """With a rate that is a plain number under some name, which its forward pass reads in some way."""

    def __init__(self, name, reads="self"):
        super().__init__()
        self.name, self.reads, self.out = name, reads, nn.Dropout(0.1)
        setattr(self, name, 0.2)

    def forward(self, x):
        rate = getattr(self, self.name)
        return self.out(F.scaled_dot_product_attention(x, x, x, dropout_p=rate))


class Read(Attention):
    def forward(self, x):
        def inner():
            return self.p_drop if self.training else 0.0

        return self.out(F.scaled_dot_product_attention(x, x, x, dropout_p=inner()))


class Leftover(nn.Module):
    """Remembers what its layer was made with, as a module with hyperparameters does."""

    def __init__(self):
        super().__init__()
        self.dropout, self.drop = 0.3, nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(x)


class Attending(Regression):
    def __init__(self, *parts):
        super().__init__(lambda parameters: SGD(parameters, lr=0.01))
        self.parts = nn.Sequential(*parts)

    def loss(self, batch):
        x, y = batch
        return (self.output(self.parts(self.hidden(x))[:, :]) - y).square().mean()


def test_a_number_that_the_forward_pass_reads_is_scheduled_unasked(dropped):
    fit(Attending(Read("p_drop")), DropoutSchedule(0.4), limit_train_batches=1)
    assert dropped == [0.4, 0.2]


class Configured(nn.Module):
    """As in transformers' Persimmon: the rate is a number of the configuration, and a layer inside has the same."""

    def __init__(self):
        super().__init__()
        self.config, self.out = types.SimpleNamespace(attention_dropout=0.2), nn.Dropout(0.2)

    def forward(self, x):
        p = self.config.attention_dropout if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(x, x, x, dropout_p=p))


class AlwaysDropping(nn.Module):
    """As transformers' ESMFold 2: it drops whether it trains or not."""

    def __init__(self):
        super().__init__()
        self.config, self.out = types.SimpleNamespace(attention_dropout=0.2), nn.Dropout(0.2)

    def forward(self, x):
        return self.out(F.dropout(x, p=self.config.attention_dropout, training=True))


@pytest.mark.parametrize("make", [Configured, AlwaysDropping])
def test_a_number_of_the_settings_is_told_and_scheduled_if_asked(make, dropped):
    with pytest.warns(UserWarning, match=r"leaves \['parts\.0\.config\.attention_dropout'\] alone"):
        fit(Attending(make()), DropoutSchedule(0.4), limit_train_batches=1)
    assert dropped == [0.2, 0.4]
    dropped.clear()
    module = Attending(make())
    fit(module, DropoutSchedule(0.4, attributes=("config.attention_dropout",)), limit_train_batches=1)
    assert dropped == [0.4, 0.4]
    assert module.parts[0].config.attention_dropout == 0.2


RATES = ["dropout", "dropout_p", "attention_dropout", "attn_dropout_prob", "resid_pdrop", "dropout_positions"]


@pytest.mark.parametrize("name", RATES)
def test_a_number_that_nobody_is_seen_to_read_is_told_once(name, dropped):
    with pytest.warns(UserWarning, match=rf"leaves \['parts\.0\.{name}'\] alone, .* in `attributes`") as caught:
        fit(Attending(Attention(name)), DropoutSchedule(0.4), max_epochs=2, limit_train_batches=1)
    assert len([w for w in caught if "look like dropout rates" in str(w.message)]) == 1
    assert dropped == [0.2, 0.4] * 2
    dropped.clear()
    fit(Attending(Attention(name)), DropoutSchedule(0.4, attributes=(name,)), limit_train_batches=1)
    assert dropped == [0.4, 0.2]


class Making(nn.Module):
    """Makes its layer by its settings, in a method that does not ask whether it trains."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(attention_dropout=0.2)
        self.out = self.make()

    def make(self):
        return nn.Dropout(self.config.attention_dropout)

    def forward(self, x):
        return self.out(x)


@pytest.mark.parametrize(
    ("parts", "include"),
    [
        ([Leftover()], "*"),
        ([Attention("layerdrop")], "*"),
        ([Attention("dropout"), nn.Dropout(0.5)], "parts.1"),
        ([Making()], "*"),
    ],
    ids=["what a layer was made with", "another kind of rate", "not included", "settings of a layer"],
)
def test_numbers_that_are_no_rates_of_ours_are_not_told(parts, include):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(Attending(*parts), DropoutSchedule(0.4, include=(include,)), limit_train_batches=1)


def test_a_number_that_only_the_constructor_reads_is_told():
    class Prepared(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout_p, self.other = 0.2, nn.Dropout(0.1)
            self.drop = functools.partial(F.dropout, p=self.dropout_p)

        def forward(self, x):
            return self.other(self.drop(x))

    with pytest.warns(UserWarning, match=r"leaves \['parts\.0\.dropout_p'\] alone"):
        fit(Attending(Prepared()), DropoutSchedule(0.4), limit_train_batches=1)


def test_with_unknown_numbers_alone_the_error_names_them():
    part = Attention("attention_dropout")
    part.out = nn.Identity()
    with pytest.raises(MisconfigurationException, match=r"\['parts.0.attention_dropout'\] may be rates: name them in"):
        fit(Attending(part), DropoutSchedule(0.4))


# --- evaluation mode ----------------------------------------------------------------------------------------------


class Frozen(Layers):
    """Puts some of its parts into evaluation mode, at one of the moments at which people do."""

    def __init__(self, parts, moment):
        super().__init__()
        self.frozen, self.moment = parts, moment

    def freeze(self, moment):
        for part in self.frozen if moment == self.moment else ():
            getattr(self, part).eval()

    def on_train_epoch_start(self):
        self.freeze("epoch")

    def on_train_batch_start(self, batch, batch_idx):
        self.freeze("batch")

    def training_step(self, batch, batch_idx):
        self.freeze("step")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("moment", ["epoch", "batch", "step"])
def test_the_rate_is_not_logged_where_nothing_drops(moment, tmp_path):
    logger = CSVLogger(tmp_path)
    module = Frozen(["drop", "attention", "lstm", "path", "depth"], moment)
    with pytest.warns(UserWarning, match="no effect as long as all its modules are in evaluation mode") as caught:
        fit(module, DropoutSchedule(0.3), logger=logger)
    assert len([w for w in caught if "evaluation mode" in str(w.message)]) == 1
    assert "dropout/p" not in read_csv(logger)


@pytest.mark.parametrize(
    ("parts", "logged"),
    [(["drop"], 0.3), (["depth"], 0.25), (["depth", "path", "lstm"], 0.15)],
    ids=["small ones", "the largest", "half of them"],
)
def test_the_logged_rate_is_of_modules_that_drop(parts, logged, tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Frozen(parts, "epoch"), DropoutSchedule(0.3), logger=logger, limit_train_batches=1)
    assert read_csv(logger)["dropout/p"] == pytest.approx({0: logged}, rel=1e-9, abs=1e-12)


# --- before and after ---------------------------------------------------------------------------------------------


def test_the_original_rates_come_back():
    assert rates(fit(Layers(), DropoutSchedule(0.25))) == OWN


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_original_rates_come_back_after(error):
    class Failing(Layers):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise error("on purpose")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises((error, SystemExit)):
        fit(module, DropoutSchedule(0.25))
    assert rates(module) == OWN


def test_validation_drops_nothing_and_a_sanity_check_changes_nothing():
    class Validated(Layers):
        outputs = []

        def validation_step(self, batch, batch_idx):
            if self.trainer.sanity_checking:
                assert rates(self) == OWN
            self.outputs.append([self.loss(next(iter(Batches()))).item() for _ in range(2)])

        def val_dataloader(self):
            return range(1)

    module = Validated()
    fit(module, DropoutSchedule(0.9))
    assert all(first == again for first, again in module.outputs)


def test_a_second_fit_schedules_again_and_restores_again():
    module, dropout = Layers(), DropoutSchedule(Linear(0.6, 0.0), same=True)
    for _ in range(2):
        watch = Watch()
        fit(module, dropout, watch)
        assert watch.seen[0]["drop.0.p"] == 0.6
        assert rates(module) == OWN


def test_a_resumed_run_goes_on_at_its_step(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    watch = Watch(["drop.0.p"])
    fit(Layers(), DropoutSchedule(Linear(0.6, 0.0), same=True), Save())
    trainer = make_trainer(DropoutSchedule(Linear(0.6, 0.0), same=True), watch, max_epochs=1)
    trainer.fit(Layers(), Batches(), ckpt_path=tmp_path / "3.ckpt")
    assert [seen["drop.0.p"] for seen in watch.seen] == pytest.approx([0.3, 0.2, 0.1, 0.0], rel=1e-9, abs=1e-12)


def test_a_copy_made_during_training_restores_nothing_of_the_run():
    dropout, copies = DropoutSchedule(0.25), []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            copies.append(pickle.dumps(dropout))

    fit(Layers(), dropout, Copy(), limit_train_batches=1)
    module = Layers()
    assert rates(fit(module, pickle.loads(copies[0]))) == OWN


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_model_is_compiled_for_few_rates_only():
    graphs, watch = [], Watch(["net._orig_mod.1.p"])

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch._dynamo.reset()
            self.net = torch.compile(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), backend=backend)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0].float()).square().mean()

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.01)

    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        make_trainer(DropoutSchedule(Linear(0.6, 0.0), include=("net.1",)), watch, max_epochs=1).fit(
            Compiled(), Batches(100)
        )
    found = [seen["net._orig_mod.1.p"] for seen in watch.seen]
    assert found[0] == 0.6
    assert found[-1] == 0.0
    assert sorted(set(found)) == pytest.approx([0.0, 0.2, 0.4, 0.6], rel=1e-9, abs=1e-12)
    assert len(graphs) <= 5
    assert all(abs(rate - 0.6 * (1 - k / 99)) <= 0.1 + 1e-9 for k, rate in enumerate(found))


class Counting:
    """A backend of ``torch.compile`` that counts what it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


class Partly(L.LightningModule):
    """Of which a part is compiled, in one of the ways that no module tells of."""

    def __init__(self, way, backend):
        super().__init__()
        torch._dynamo.reset()
        self.layer, self.drop, self.dropout = nn.Linear(3, 2), nn.Dropout(0.2), 0.1
        self.way, self.seen = way, []

        def compiled(function):
            return torch.compile(function, backend=backend, fullgraph=True)

        drop = self.drop
        if way == "method":
            self.dropping = compiled(self.dropping)
        elif way == "function":
            functions = [compiled(lambda x: drop(x))]
            self.dropping = functions[0]
        elif way == "number":
            self.dropping = compiled(self.dropping_by_number)
        else:
            self.scale = compiled(lambda x: 2 * x)

    def dropping(self, x):
        return self.drop(x)

    def dropping_by_number(self, x):
        return F.dropout(x, self.dropout, self.training)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.drop.p)
        x = self.dropping(self.layer(batch[0].float()))
        if self.way == "elsewhere":  # compiled anew, for another length
            x = self.scale(x[: 1 + batch_idx % 4])
        return x.square().mean()

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.01)


COMPILES = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, of tracing


@COMPILES
@pytest.mark.parametrize("way", ["method", "function", "number"])
def test_a_compiled_function_is_compiled_for_few_rates_only(way):
    backend = Counting()
    module = Partly(way, backend)
    trainer = make_trainer(DropoutSchedule(Linear(0.6, 0.0)), max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(module, Batches(50), Batches(1))
    seen = module.seen[1:-1]  # without validation
    assert len(set(seen)) <= 6
    assert {round(p, 9) for p in seen[3:]} <= {0.0, 0.2, 0.4, 0.6}
    assert max(abs(p - 0.6 * (1 - k / 49)) for k, p in enumerate(seen)) <= 0.1 + 1e-9
    assert backend.graphs <= 7


@COMPILES
def test_rates_are_exact_where_something_without_dropout_is_compiled():
    backend = Counting()
    module = Partly("elsewhere", backend)
    fit(module, DropoutSchedule(Linear(0.6, 0.0)))
    assert backend.graphs > 1
    assert module.seen == pytest.approx(np.linspace(0.6, 0, 7), rel=0, abs=1e-12)


@COMPILES
def test_without_an_end_a_compiled_function_is_told():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 3

    module = Partly("method", Counting())
    with pytest.warns(UserWarning, match="compiled anew for each dropout rate.* give `total_steps`"):
        fit(module, DropoutSchedule(lambda at: 0.01 * at.step), Stop(), max_epochs=-1)


# --- what dropout is ----------------------------------------------------------------------------------------------


class Average(L.Callback):
    """The mean of the weights over the second half of the run."""

    def __init__(self, after):
        self.after, self.count, self.mean = after, 0, 0.0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.after:
            self.count += 1
            self.mean = self.mean + (pl_module.layer.weight.detach() - self.mean) / self.count


class DroppedInputs(L.LightningModule):
    def __init__(self, inputs, targets):
        super().__init__()
        self.layer, self.drop = nn.Linear(inputs.shape[1], 1, bias=False).double(), nn.Dropout(0.0)
        self.inputs, self.targets = inputs, targets

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.layer(self.drop(self.inputs)).squeeze(1) - self.targets).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.2)


def test_a_linear_model_with_dropout_is_ridge():
    """In the mean over masks the loss is that of ridge with p / (1 - p) diag(X'X)."""
    inputs, targets = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = (targets - targets.mean()) / targets.std()
    p, gram = 0.4, inputs.T @ inputs
    expected = torch.linalg.solve(gram + p / (1 - p) * gram.diag().diag(), inputs.T @ targets)
    torch.manual_seed(0)
    average = Average(after=100)
    trainer = make_trainer(DropoutSchedule(p), average, max_epochs=1)
    trainer.fit(DroppedInputs(inputs, targets), range(1500))
    assert ((average.mean[0] - expected).norm() / expected.norm()) < 0.01
    without = torch.linalg.solve(gram, inputs.T @ targets)
    assert ((without - expected).norm() / expected.norm()) > 0.4


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_class", "options", "message"),
    [
        (Regression, {}, "There is nothing to drop: no module .* has a dropout rate"),
        (Layers, {"include": ("hidden",)}, "There is nothing to drop"),
        (Layers, {"include": ("drop.*", "dorp.*")}, r"No dropout rate is found by `include` \['dorp.\*'\]"),
        (Layers, {"attributes": ("token_drop",)}, r"No dropout rate is found by `attributes` \['token_drop'\]"),
    ],
    ids=["no layer", "none matches", "misspelled rule", "misspelled attribute"],
)
def test_nothing_to_drop_is_an_error_before_training(module_class, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module_class(), DropoutSchedule(0.1, **options))


def test_a_schedule_that_leaves_the_range_is_an_error_before_training():
    module = Layers()
    before = module.hidden.weight.detach().clone()
    with pytest.raises(ValueError, match=r"A dropout rate should be in \[0, 1\), got 1\.\d*"):
        fit(module, DropoutSchedule(Linear(0.0, 1.5)))
    assert torch.equal(module.hidden.weight, before)


def test_an_unknown_end_is_an_error_before_training():
    with pytest.raises(MisconfigurationException, match="needs to know how many steps"):
        fit(Layers(), DropoutSchedule(Linear(0.5, 0.0)), max_epochs=-1, limit_train_batches=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DropoutSchedule(1.0), ValueError, r"in \[0, 1\), got 1.0"),
        (lambda: DropoutSchedule(-0.1), ValueError, "got -0.1"),
        (lambda: DropoutSchedule("0.1"), TypeError, "got '0.1'"),
        (lambda: DropoutSchedule(0.1, include="drop"), TypeError, "`include` should be a sequence of globs"),
        (lambda: DropoutSchedule(0.1, include=(3,)), TypeError, "`include` should be a sequence of globs"),
        (lambda: DropoutSchedule(0.1, total_steps=0), ValueError, "`total_steps` should be a positive integer"),
        (lambda: DropoutSchedule(0.1, same=1), TypeError, "`same` should be True or False, got 1"),
        (lambda: DropoutSchedule(Constant(1.0)), ValueError, r"in \[0, 1\), got 1.0"),
        (
            lambda: DropoutSchedule(0.1, attributes="p"),
            TypeError,
            "`attributes` should be a sequence of names, got 'p'",
        ),
    ],
)
def test_bad_input_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()
