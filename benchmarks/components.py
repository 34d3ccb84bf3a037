"""What do a penalty's gradient, a proximal step and a projection cost, beside the memory traffic that no way avoids?

Each figure is a median over interleaved rounds in a random order, and its ratio to one pass over flat buffers of the
same size: ``gradient.add_(weight)`` or ``weight.mul_(1)``. Run it on an idle machine::

    python benchmarks/components.py
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lightning_regularize.penalties import L1, L2, ElasticNet, GroupLasso
from lightning_regularize.projections import Box, FrobeniusBall, MaxNorm, NonNegative, UnitNorm


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The shapes of a ResNet-50 without its downsampling branches: 146 tensors, 23.5 M elements."""
    shapes: list[tuple[int, ...]] = []
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        block = [(width, 4 * width, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
        shapes += blocks * [*block, *([(width,)] * 4), *([(4 * width,)] * 2)]
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The shapes of a GPT-2 small with an eighth of its vocabulary: 146 tensors, 90.7 M elements."""
    d = 768
    block = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), *([(d,)] * 5)]
    return [(50257 // 8, d), (1024, d), *(12 * block)]


def median_seconds(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each case, each run once a round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 2):
        for name in random.sample(list(cases), len(cases)):
            start = time.perf_counter()
            cases[name]()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def report(title: str, cases: Mapping[str, Callable[[], object]], rounds: int) -> None:
    """Print the time of each case and its ratio to the first."""
    print(f"  {title}")
    seconds = median_seconds(cases, rounds)
    limit = seconds[next(iter(cases))]
    for name, found in seconds.items():
        print(f"    {name:36s} {found * 1e3:8.2f} ms  x{found / limit:5.2f}")


def for_each(step: Callable[..., object], *tensors: Iterable[Tensor]) -> Callable[[], None]:
    """A case that takes ``step`` on every parameter."""
    items = list(zip(*tensors, strict=True))

    def run() -> None:
        for item in items:
            step(*item)

    return run


def measure(shapes: list[tuple[int, ...]], rounds: int) -> None:
    """Print what everything costs on parameters of these shapes."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    matrices = [(w, g) for w, g in zip(weights, gradients, strict=True) if w.dim() > 1]
    rows, row_gradients = zip(*matrices, strict=True)
    flat_weight = torch.cat([w.flatten() for w in weights])
    flat_gradient = torch.cat([g.flatten() for g in gradients])
    thresholds = [torch.full_like(w, 1e-9) for w in weights]
    strength = torch.tensor(1e-4)

    add: dict[str, Callable[[], object]] = {
        "g.add_(w) on flat buffers": lambda: flat_gradient.add_(flat_weight, alpha=1e-4)
    }
    gradient_cases: dict[str, Callable[[], object]] = {
        "g.add_(w.sign()) a tensor": for_each(lambda g, w: g.add_(w.sign(), alpha=1e-4), gradients, weights),
        "L1": lambda: L1().add_gradient_(gradients, weights, 1e-4),
        "L1, strength on the device": lambda: L1().add_gradient_(gradients, weights, strength),
        "L2": lambda: L2().add_gradient_(gradients, weights, 1e-4),
        "ElasticNet": lambda: ElasticNet(0.5).add_gradient_(gradients, weights, 1e-4),
        "GroupLasso": lambda: GroupLasso().add_gradient_(row_gradients, rows, 1e-4),
    }
    report("gradient of a penalty", add | gradient_cases, rounds)

    mul: dict[str, Callable[[], object]] = {"w.mul_(1) on a flat buffer": lambda: flat_weight.mul_(1.0)}
    softshrink = torch.nn.functional.softshrink
    proximal_cases = {
        "w.copy_(softshrink(w)) a tensor": for_each(lambda w: w.copy_(softshrink(w, 1e-9)), weights),
        "L1": lambda: L1().proximal_(weights, 1e-9),
        "L1, elementwise threshold": lambda: L1().proximal_(weights, thresholds),
        "L2": lambda: L2().proximal_(weights, 1e-9),
        "ElasticNet": lambda: ElasticNet(0.5).proximal_(weights, 1e-9),
        "GroupLasso": lambda: GroupLasso().proximal_(rows, 1e-9),
    }
    report("proximal step", mul | proximal_cases, rounds)

    bounds = (5 * 0.99**i for i in itertools.count())  # each below the norms that the one before has left
    outside = [row.clone() for row in rows]

    def max_norm_of_rows_outside() -> None:
        MaxNorm(next(bounds)).project_(outside)

    projection_cases = {
        "w.copy_(w.renorm(2, 0, c)) a tensor": for_each(lambda w: w.copy_(w.renorm(2, 0, 100.0)), rows),
        "MaxNorm, all rows inside": lambda: MaxNorm(1000.0).project_(rows),
        "MaxNorm, all rows outside": max_norm_of_rows_outside,
        "UnitNorm": lambda: UnitNorm().project_(rows),
        "FrobeniusBall": lambda: FrobeniusBall(1e6).project_(rows),
        "Box": lambda: Box(-10.0, 10.0).project_(weights),
        "NonNegative": lambda: NonNegative().project_(weights),
    }
    report("projection", mul | projection_cases, rounds)


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for label, shapes in (("ResNet-50", resnet50_shapes()), ("GPT-2 small", gpt2_shapes())):
        print(f"{label}: {len(shapes)} tensors, torch {torch.__version__}, {options.threads} threads")
        measure(shapes, options.rounds)


if __name__ == "__main__":
    main()
