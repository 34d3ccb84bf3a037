"""Train with group lasso, remove the units that became zero with torch-pruning, and see what that saves.

    python examples/zeros_that_pay.py

What to look for: zeros alone make nothing faster, for a layer multiplies by them as by any number. Removed with all
that belongs to them, they do: a small ResNet and a small vision transformer end with fewer hidden units, the same
outputs up to rounding, and in less time.

The penalty is on the weights that *read* a hidden unit, not on those that write it. If a filter is zero, the batch norm
behind it still returns its shift, and a row of zeros in a Linear still returns its bias. The next layer reads these
constants, and outputs change without them. A unit that nothing reads can be removed, whatever its value is. So a group
is all that reads one hidden unit: `GroupLassoPenalty(group="input")` of the next layer.

The transformer is also trained with two zeros among every four neighbors, which the sparse tensor cores of a GPU make
use of; see the guide on sparsity. On a CPU it is checked that torch's format for them keeps all the weights.
"""

from __future__ import annotations

import copy
import time
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
import torch_pruning
from bias_exclusion import train, training_sets
from claims import Claim, be_quiet, conclude, parser_of
from label_noise import Batches, digits
from lightning.pytorch import Callback, LightningModule, seed_everything
from pictures import COLORS, panels, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.sparse import _semi_structured_conversions as conversions

from lightning_regularize import GroupLassoPenalty, WeightConstraint
from lightning_regularize.projections import NM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

EPOCHS, FAST_EPOCHS = 15, 1
REPEATS, FAST_REPEATS = 41, 3
IMAGES = 512  # at a time, when time is measured
LR = 3e-3


# -- models ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The basic block of a ResNet, with hidden channels of its own number."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.writes = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.reads = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.norm_hidden, self.norm = nn.BatchNorm2d(hidden), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width), and the same."""
        hidden = F.relu(self.norm_hidden(self.writes(x)))
        return F.relu(x + self.norm(self.reads(hidden)))


class Attention(nn.Module):
    """Attention and an MLP, each behind a norm and beside a skip connection: a layer of a vision transformer."""

    def __init__(self, width: int, hidden: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.writes, self.reads = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width), and the same."""
        n, tokens, width = x.shape
        packed = self.qkv(self.norm_attention(x)).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(attended)
        return x + self.reads(F.gelu(self.writes(self.norm(x))))


class Classifier(LightningModule):
    """Learns digits by AdamW."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        """No weight decay, and a cosine of the learning rate to 0."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=0.0)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ResNet(Classifier):
    """Two residual blocks behind a convolution."""

    def __init__(self, channels: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.layers = nn.Sequential(*(Residual(channels, hidden) for _ in range(2)))
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes, (n, 10), for images (n, 64)."""
        return self.head(self.layers(self.stem(images.view(-1, 1, 8, 8))).mean((2, 3)))


class ViT(Classifier):
    """Two layers of a transformer on 4 patches of 4x4 pixels."""

    def __init__(self, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(4, width))
        self.layers = nn.Sequential(*(Attention(width, hidden) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes, (n, 10), for images (n, 64)."""
        tokens = self.patches(images.view(-1, 1, 8, 8)).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(tokens).mean(1))


# -- zeros, and their removal ------------------------------------------------------------------------------------------


def lasso(strength: float) -> GroupLassoPenalty:
    """The groups are the weights that read one hidden unit."""
    return GroupLassoPenalty(strength, group="input", include=("*.reads.weight",), method="proximal")


def unread(reads: nn.Module) -> list[int]:
    """The hidden units that a layer multiplies by zeros only, of which one stays if there is no other."""
    per_unit = reads.weight.detach().transpose(0, 1).flatten(1)
    units = (per_unit == 0).all(dim=1).nonzero().flatten().tolist()
    return units[len(units) == len(per_unit) :]


def without_unread(model: Classifier, example: Tensor) -> Classifier:
    """A copy of a model without the hidden units that nothing reads."""
    smaller = copy.deepcopy(model).eval()
    # torch-pruning finds what belongs together, such as a filter, its batch norm and what reads it, in the graph of
    # autograd. Where the positions' width lies it is told, since that parameter belongs to no layer that it knows.
    own = [(smaller.positions, 1)] if isinstance(smaller, ViT) else None
    graph = torch_pruning.DependencyGraph().build_dependency(smaller, example, unwrapped_parameters=own)
    for layer in smaller.layers:
        if units := unread(layer.reads):
            remove = graph.get_pruner_of_module(layer.writes).prune_out_channels
            graph.get_pruning_group(layer.writes, remove, idxs=units).prune()
    return smaller


def milliseconds(models: Sequence[nn.Module], images: Tensor, repeats: int) -> list[float]:
    """Median time of each model for the images, taken in turns, so that what else runs here meets all of them."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(repeats):
            for model, found in zip(models, times, strict=True):
                start = time.perf_counter()
                model(images)
                found.append(1e3 * (time.perf_counter() - start))
    return [median(found) for found in times]


def fits_sparse_tensor_cores(weight: Tensor) -> bool:
    """Whether torch's format for two zeros of four holds exactly this weight, in float16 as a GPU asks for."""
    rows, columns = weight.shape
    if rows % 32 or columns % 64:  # what the format asks for
        return False
    half = weight.detach().half()
    kept = conversions.sparse_semi_structured_to_dense_cutlass(
        *conversions.sparse_semi_structured_from_dense_cutlass(half)
    )
    return torch.equal(kept, half)


# -- runs --------------------------------------------------------------------------------------------------------------


def trained(make: type[Classifier], callbacks: list[Callback], seed: int, epochs: int) -> Classifier:
    """A model that has learned the digits, ready to be used."""
    seed_everything(seed, verbose=False)
    model = make()
    train(model, Batches(*training_sets(seed)["right"], batch_size=50, seed=seed), callbacks, epochs)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, seed: int) -> float:
    """On test images."""
    images, labels = digits(seed).test
    return (model(images).argmax(dim=1) == labels).float().mean().item()


class Result(NamedTuple):
    """What became of a model: trained without a penalty, with it, and with its unread units removed."""

    name: str
    hidden: list[int]
    left: list[int]
    accuracies: tuple[float, float, float]
    milliseconds: tuple[float, float]
    difference: float

    @property
    def speedup(self) -> float:
        """How many times as fast."""
        return self.milliseconds[0] / self.milliseconds[1]


def compare(make: type[Classifier], penalty: GroupLassoPenalty, seed: int, *, is_fast: bool) -> Result:
    """Train, remove, and compare."""
    epochs, images = FAST_EPOCHS if is_fast else EPOCHS, digits(seed).test[0]
    dense, sparse = (trained(make, callbacks, seed, epochs) for callbacks in ([], [penalty]))
    smaller = without_unread(sparse, images[:1])
    with torch.no_grad():
        difference = (smaller(images) - sparse(images)).abs().max().item()
    return Result(
        make.__name__,
        [layer.reads.weight.shape[1] for layer in sparse.layers],
        [layer.reads.weight.shape[1] for layer in smaller.layers],
        (accuracy(dense, seed), accuracy(sparse, seed), accuracy(smaller, seed)),
        tuple(milliseconds((sparse, smaller), images[:IMAGES], FAST_REPEATS if is_fast else REPEATS)),
        difference,
    )


class TwoOfFour(NamedTuple):
    """What became of the transformer whose weights are zero in two of four places."""

    accuracy: float
    weights: int
    fitting: int


def two_of_four(seed: int, *, is_fast: bool) -> TwoOfFour:
    """Train with the constraint on all matrices of the layers."""
    constraint = WeightConstraint(NM(2, 4), include=("layers.*.weight",), exclude=("norm",))
    model = trained(ViT, [constraint], seed, FAST_EPOCHS if is_fast else EPOCHS)
    weights = [each.weight for each in model.layers.modules() if isinstance(each, nn.Linear)]
    return TwoOfFour(accuracy(model, seed), len(weights), sum(map(fits_sparse_tensor_cores, weights)))


# -- what is shown -----------------------------------------------------------------------------------------------------


def table_of(results: Sequence[Result]) -> Table:
    """A row for each model."""
    table = Table(title=f"{IMAGES} images at a time, on one core")
    for heading in (
        "Model",
        "Hidden units",
        "Accuracy without penalty",
        "with it",
        "Milliseconds",
        "Outputs differ by",
    ):
        table.add_column(heading, justify="right" if table.columns else "left")
    for r in results:
        hidden, left = (" + ".join(map(str, units)) for units in (r.hidden, r.left))
        dense, _, smaller = r.accuracies
        before, after = r.milliseconds
        units, times = f"{hidden}\n{left}", f"{before:.1f}\n{after:.1f}"
        table.add_row(r.name, units, f"{dense:.3f}", f"{smaller:.3f}", times, f"{r.difference:.0e}")
    return table


def plot(results: Sequence[Result]) -> Figure:
    """Hidden units and time, before and after, for each model."""
    figure, axes = panels(1, 2)
    names = [r.name for r in results]
    for ax, label, pairs in (
        (axes[0], "hidden units", [(sum(r.hidden), sum(r.left)) for r in results]),
        (axes[1], f"milliseconds for {IMAGES} images", [r.milliseconds for r in results]),
    ):
        for i, (which, color) in enumerate((("with zeros", COLORS[1]), ("zeros removed", COLORS[2]))):
            bars = ax.bar([j + 0.4 * i for j in range(len(names))], [pair[i] for pair in pairs], 0.38, color=color)
            bars.set_label(which)
            ax.bar_label(bars, fmt="%.3g", fontsize="small")
        ax.set_xticks([j + 0.2 for j in range(len(names))], names)
        ax.set_ylabel(label)
    axes[0].legend(fontsize="small")
    return figure


def claims_of(results: Sequence[Result], semi: TwoOfFour) -> list[Claim]:
    """What is shown, in numbers."""
    found = []
    for r in results:
        dense, sparse, smaller = r.accuracies
        found += [
            Claim(
                f"{r.name}: without the units that nothing reads, outputs are the same",
                f"a largest difference of {r.difference:.0e}",
                r.difference <= 1e-5,
            ),
            Claim(
                f"{r.name}: at least half of the hidden units go, for at most .01 of accuracy",
                f"{sum(r.hidden)} and {sum(r.left)} units, accuracy {dense:.3f} and {smaller:.3f}",
                sum(r.left) <= sum(r.hidden) / 2 and smaller >= dense - 0.01 and abs(smaller - sparse) < 1e-3,
            ),
            Claim(
                f"{r.name}: at least 1.2 times as fast",
                f"{r.milliseconds[0]:.1f} and {r.milliseconds[1]:.1f} ms, {r.speedup:.1f} times",
                r.speedup >= 1.2,
            ),
        ]
    dense = results[-1].accuracies[0]
    return [
        *found,
        Claim(
            "ViT, two of four zero: the format of sparse tensor cores holds all weights, for at most .02 of accuracy",
            f"{semi.fitting} of {semi.weights} weights, accuracy {dense:.3f} and {semi.accuracy:.3f}",
            semi.fitting == semi.weights and semi.accuracy >= dense - 0.02,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, remove, and judge."""
    options = parser_of(__doc__, "zeros_that_pay").parse_args(arguments)
    be_quiet()
    penalties = {ResNet: lasso(2e-2), ViT: lasso(1e-3)}
    results = [compare(make, each, options.seed, is_fast=options.fast) for make, each in penalties.items()]
    Console().print(table_of(results))
    save(plot(results), options.output / "zeros_that_pay.png")
    conclude(claims_of(results, two_of_four(options.seed, is_fast=options.fast)), is_fast=options.fast)


if __name__ == "__main__":
    main()
