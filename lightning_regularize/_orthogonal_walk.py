r"""How long are the steps of Muon under noise, and how far do they lead? A random walk of orthogonalized momentum.

Momentum makes steps alike, so that they lead farther than independent ones. Orthogonalization makes them less alike:
how much, depends on the shape. Take two large matrices of normal numbers, ``n`` by ``m`` with ``n <= m``, whose
elements have the correlation :math:`r`. Like a function of two correlated numbers, which is a sum of Hermite
polynomials, an odd function of their singular values is a sum of orthogonal parts of degree 1, 3, 5, ..., and the
parts of degree ``p`` of both have the correlation :math:`r^p`. With variance :math:`1 / m` of the elements and
:math:`\gamma = n / m`, singular values are

.. math:: s^2 = 1 + \gamma + 2 \sqrt{\gamma} \cos\theta

by the law of Marchenko and Pastur, and the part of degree :math:`2 j + 1` is along :math:`s\,U_j(\cos\theta)`, with
Chebyshev polynomials of the second kind and the weight :math:`\tfrac{2}{\pi} \sin^2\theta`.
"""

import functools
import math

import torch
from torch import Tensor

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of torch.optim.Muon
_POINTS = 2048  # sums of polynomials of the cosine are exact up to degree 4095, and they have 2 * (5 ** 5 // 2) at most


@functools.lru_cache(maxsize=4096)
def _squares_of_parts(n: int, m: int) -> Tensor:
    """The mean squared norm of each part of an orthogonalized matrix of noise, shape ``(terms,)``, in float64.

    Args:
        n: The smaller side.
        m: The larger side.
    """
    # From Python: torch's own cosine may begin threads, for which a process that is forked later waits for ever.
    angles = [(i + 0.5) * (math.pi / _POINTS) for i in range(_POINTS)]
    cosine = torch.tensor(list(map(math.cos, angles)), dtype=torch.float64)
    square = 1 + n / m + 2 * math.sqrt(n / m) * cosine
    # Muon begins with singular values over the root of their sum of squares; here squared, and at most 1, as they are.
    value = (square / n).clamp_max(1)
    ratio = (value / square).sqrt()  # of what becomes of a singular value to the singular value
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        factor = a + b * value + c * value.square()
        value, ratio = value * factor.square(), ratio * factor
    weighted = ratio * (1 - cosine.square()) * (2 / _POINTS)
    before, polynomial, along = torch.zeros_like(cosine), torch.ones_like(cosine), []
    for _ in range(5**ITERATIONS // 2 + 1):  # the polynomial has degree 5, five times
        along.append((weighted * polynomial).sum())
        before, polynomial = polynomial, 2 * cosine * polynomial - before
    squares: Tensor = n * torch.stack(along).square()
    return squares


def walk(shape: tuple[int, int], momentum: float, *, nesterov: bool, share: float) -> tuple[float, float]:
    r"""Return the mean squared norms of a step, and of the sum of all steps that decay leaves.

    .. math:: \mathrm{E} \lVert u \rVert^2 = \sum_p c_p, \qquad
        \mathrm{E} \Bigl\lVert \sum_k a^k u_k \Bigr\rVert^2 = \frac{1}{1 - a^2}
        \sum_p c_p \Bigl(1 + 2 q^p \frac{a \mu^p}{1 - a \mu^p}\Bigr), \qquad a = 1 - \text{share}

    with :math:`q \mu^k` the correlation of momenta that are :math:`k` steps apart; :math:`q = 1` without Nesterov.

    Args:
        shape: Of the matrix, rows and columns.
        momentum: :math:`\mu`, in [0, 1).
        nesterov: Whether a step looks ahead, by another part of the newest gradient.
        share: What a step removes of a weight, in [0, 1].

    Returns:
        Both, for steps of rate 1; the second is ``inf`` where nothing decays.
    """
    squares, kept, alike = _squares_of_parts(min(shape), max(shape)), 1 - share, 1.0
    if nesterov:
        older = momentum**4 / (1 - momentum**2)
        alike = (momentum * (1 + momentum) + older) / ((1 + momentum) ** 2 + older)
    degree = 2 * torch.arange(len(squares), dtype=torch.float64) + 1
    again = kept * momentum**degree
    lengthened = (squares * (1 + 2 * alike**degree * again / (1 - again))).sum().item()
    lost = share * (2 - share)
    return squares.sum().item(), lengthened / lost if lost else math.inf
