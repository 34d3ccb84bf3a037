"""Which ways to train with an L1 penalty find the lasso: its coefficients, and its zeros?

Linear regression on scikit-learn's diabetes data in float64, full batches, strength 0.05. The truth is scikit-learn's
``Lasso``. Printed is the largest error of a coefficient after 2,000 steps, and how many of the zeros are exact.

Run: python benchmarks/lasso.py

The rows of torchao's ``prototype.pat`` appear where it is installed, for example by
``pip install --no-deps torchao==0.18.0``, which needs nothing but the torch that is there.
"""

import functools
import importlib.metadata
import importlib.util
import warnings

import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_regularize import L1Penalty

STEPS, STRENGTH = 2_000, 0.05

OPTIMIZERS = {
    "SGD": functools.partial(SGD, lr=0.45),
    "momentum 0.9": functools.partial(SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(Adam, lr=0.02),
}


def data() -> tuple[Tensor, Tensor]:
    """The diabetes data, each column with mean 0 and variance 1."""
    x, y = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0, unbiased=False), (y - y.mean()) / y.std(unbiased=False)


def train(weight: nn.Parameter, optimizer: Optimizer, *, in_loss: bool = False, threshold: bool = False) -> Tensor:
    """Return the trained weights: with the penalty in the loss, with a soft threshold after each step, or neither."""
    x, y = data()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 0.5 * (x @ weight.T - y[:, None]).square().mean()
        (loss + STRENGTH * weight.abs().sum() if in_loss else loss).backward()
        optimizer.step()
        if threshold:
            lr = optimizer.param_groups[0]["lr"]
            weight.data = nn.functional.softshrink(weight.data, lr * STRENGTH)
    return weight.detach()[0]


def in_the_loss(make: functools.partial[Optimizer]) -> Tensor:
    weight = zeros()
    return train(weight, make([weight]), in_loss=True)


def soft_threshold(make: functools.partial[Optimizer]) -> Tensor:
    """After each step of size lr, shrink by lr times the strength."""
    weight = zeros()
    return train(weight, make([weight]), threshold=True)


def ours(make: functools.partial[Optimizer]) -> Tensor:
    layer = nn.Linear(10, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    optimizer = make([layer.weight])
    with L1Penalty(STRENGTH, method="proximal").attach(optimizer, layer):
        return train(layer.weight, optimizer)


def pat(make: functools.partial[Optimizer]) -> Tensor:
    """torchao's optimizer that prunes while it trains."""
    from torchao.prototype.pat import PruneOptimizer  # it need not be installed

    weight = zeros()
    group = {"params": [weight], "prox_type": "ProxLasso", "group_type": "ElemGrouper", "reg_lambda": STRENGTH}
    return train(weight, PruneOptimizer(make([group])))


def zeros() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, 10, dtype=torch.float64))


def main() -> None:
    x, y = data()
    lasso = Lasso(alpha=STRENGTH, fit_intercept=False, tol=1e-15, max_iter=1_000_000)
    expected = torch.from_numpy(lasso.fit(x.numpy(), y.numpy()).coef_)
    ways = {
        "loss + strength * w.abs().sum()": in_the_loss,
        "soft threshold of lr * strength": soft_threshold,
        'L1Penalty(method="proximal")': ours,
    }
    if importlib.util.find_spec("torchao"):
        warnings.filterwarnings("ignore")
        ways[f"torchao {importlib.metadata.version('torchao')}, ProxLasso"] = pat
    print(f"error of coefficients, exact zeros of {(expected == 0).sum()}")
    print(" " * 36 + "".join(f"{name:>22}" for name in OPTIMIZERS))
    for name, way in ways.items():
        cells = []
        for make in OPTIMIZERS.values():
            found = way(make)
            count = ((found == 0) & (expected == 0)).sum()
            cells.append(f"{(found - expected).abs().max():14.1e}, {count} of {(expected == 0).sum()}")
        print(f"{name:36s}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
