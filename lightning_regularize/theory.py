"""Predicted equilibrium norms, angles and step sizes.

Weight decay pulls the weights in, noisy updates push them out, and where the two balance, the size of the weights and
the angle they turn by in a step follow from the hyperparameters alone. These functions say where that is, how long it
takes to get there, and when the arithmetic of a data type keeps it from happening at all.

They are formulas on Python floats. ``lr`` and ``weight_decay`` are always the numbers that stand in torch's parameter
groups, so that ``lr * weight_decay`` is the share of a weight that one decoupled step removes; the formulas take it to
be small against 1. A division by zero gives what IEEE 754 says: ``inf`` where something grows without bound or takes
for ever, ``nan`` where nothing moves and every value is as good as another.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import torch

from lightning_regularize._checks import is_number
from lightning_regularize._orthogonal_walk import walk

__all__ = [
    "equilibrium_rms_adamw",
    "equilibrium_rms_lion",
    "equilibrium_rms_muon",
    "equilibrium_norm_sgd",
    "equilibrium_angle_adamw",
    "equilibrium_angle_lion",
    "equilibrium_angle_muon",
    "equilibrium_angle_sgd",
    "max_abs_weight",
    "timescale",
    "timescale_epochs",
    "share_remaining",
    "ema_coefficients",
    "next_mean_square",
    "mean_square_trajectory",
    "weight_decay_from_independent",
    "weight_decay_from_normalized",
    "decay_rounding_threshold",
]


def equilibrium_rms_adamw(lr: float, weight_decay: float) -> float:
    r"""Return the root mean square that AdamW's weights settle at under noise.

    .. math:: \mathrm{RMS}(w) = \frac{\lVert w \rVert_2}{\sqrt{n}} = \sqrt{\frac{\eta}{2 \lambda}}

    It depends neither on the gradients nor on ``beta1``: momentum makes an update smaller and the next ones alike, and
    the two cancel. It holds for weights that the loss does not hold in place (scale-invariant ones above all), for
    ``beta2`` near 1, after some :func:`timescale`\ s.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Torch's decoupled weight decay, non-negative.

    Returns:
        The RMS of the weights; ``inf`` without weight decay, where it grows with the square root of the steps.

    Raises:
        ValueError: If an argument is negative or not finite.

    Example:
        >>> equilibrium_rms_adamw(lr=1e-3, weight_decay=0.1)
        0.07071067811865475

    References:
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212;
        Su, Asymptotic estimate of the weight RMS of AdamW, 2025, https://kexue.fm/archives/11307.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay):
        raise ValueError(complaint)
    return math.sqrt(_divide(lr, 2 * weight_decay))


def equilibrium_rms_lion(lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.99) -> float:
    r"""Return the root mean square that Lion's weights settle at under noise.

    .. math:: \mathrm{RMS}(w) = \sqrt{\frac{\eta}{2 \lambda}} \cdot
        \sqrt{\frac{2}{\pi}} \Big/ \sqrt{(1 - \beta_1)^2 + \beta_1^2 \frac{1 - \beta_2}{1 + \beta_2}}

    It is the learning rate over :func:`equilibrium_angle_lion`, since every weight moves by the learning rate, and as
    exact as that.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Decoupled weight decay, non-negative.
        beta1: In [0, 1); the paper's default.
        beta2: In [0, 1); the paper's default.

    Returns:
        The RMS of the weights; ``inf`` without weight decay.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(equilibrium_rms_lion(lr=1e-4, weight_decay=1.0), 5)
        0.04756

    References:
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212;
        Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, https://arxiv.org/abs/2302.06675.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2):
        raise ValueError(complaint)
    return math.sqrt(_divide(lr, 2 * weight_decay)) / _lion_correlation(beta1, beta2)


def equilibrium_rms_muon(
    lr: float,
    weight_decay: float,
    shape: Sequence[int],
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
) -> float:
    r"""Return the root mean square that the weights of torch's Muon settle at under noise.

    .. math:: \mathrm{RMS}(w) = \frac{\eta'}{\sqrt{n m}} \sqrt{\frac{1}{1 - a^2}
        \sum_p c_p \Bigl(1 + 2 q^p \frac{a \mu^p}{1 - a \mu^p}\Bigr)}, \qquad a = 1 - \eta \lambda

    over the odd numbers :math:`p`, with the adjusted rate :math:`\eta'`. Momentum makes steps alike, and
    orthogonalization makes them less alike: of two matrices of noise with correlation :math:`r`, the parts of size
    :math:`c_p` have the correlation :math:`r^p` after it. The sizes depend on the shape; they are those of large
    matrices, and of torch's five iterations with its default coefficients. Within 4 % of torch's Muon for the shapes
    16x16, 16x64, 64x16, 64x64 and 4x100, momenta of 0 to 0.99, and decays by 0.01 and 0.04 a step; for 2x2 it is 15 %
    off.

    Args:
        lr: Learning rate, non-negative, before it is adjusted.
        weight_decay: Decoupled weight decay, non-negative.
        shape: Rows and columns of the weight.
        momentum: In [0, 1); the default is torch's.
        nesterov: As of torch's Muon.
        adjust_lr_fn: As of torch's Muon; None is "original".

    Returns:
        The RMS of the weights; ``inf`` without weight decay.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(equilibrium_rms_muon(lr=0.02, weight_decay=0.1, shape=(64, 256)), 4)
        0.092

    References:
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212, for the walk;
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    """
    lengths = _muon(lr, weight_decay, shape, momentum, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    return lengths[1] / math.sqrt(math.prod(shape))


def equilibrium_norm_sgd(lr: float, weight_decay: float, momentum: float, gradient_norm_at_unit_norm: float) -> float:
    r"""Return the norm that scale-invariant weights settle at under SGD with momentum.

    .. math:: \lVert w \rVert_2^4 = \frac{\eta \lVert \tilde g \rVert_2^2}{2 \lambda (1 - \mu)},
        \qquad \lVert \tilde g \rVert_2 = \lVert g \rVert_2 \lVert w \rVert_2

    The weights before a normalization layer are scale-invariant: their gradient is perpendicular to them and shrinks as
    they grow, so that gradient norm times weight norm is the gradient norm they would have at norm 1.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Coupled weight decay, which is what ``torch.optim.SGD`` has, non-negative.
        momentum: In [0, 1), without dampening.
        gradient_norm_at_unit_norm: L2 norm of the loss's gradient times L2 norm of the same weights, non-negative; as
            something measured it may be ``nan`` or ``inf``, and the result is then too.

    Returns:
        The L2 norm of the weights; ``inf`` without weight decay.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(equilibrium_norm_sgd(lr=0.1, weight_decay=5e-4, momentum=0.9, gradient_norm_at_unit_norm=0.2), 3)
        2.515

    References:
        van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, https://arxiv.org/abs/1706.05350;
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212.
    """
    if complaint := _complaint(
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        gradient_norm_at_unit_norm=gradient_norm_at_unit_norm,
    ):
        raise ValueError(complaint)
    # Root before product, for the square of a measured norm may overflow.
    return math.sqrt(gradient_norm_at_unit_norm * math.sqrt(_divide(lr, 2 * weight_decay * (1 - momentum))))


def equilibrium_angle_adamw(lr: float, weight_decay: float, beta1: float = 0.9) -> float:
    r"""Return the angle by which AdamW turns weights in one step, once they are in equilibrium.

    .. math:: \angle(w_t, w_{t+1}) = \sqrt{2 \eta \lambda \frac{1 - \beta_1}{1 + \beta_1}}

    For small angles it is also the norm of the update over the norm of the weights.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Torch's decoupled weight decay, non-negative.
        beta1: In [0, 1); torch's default.

    Returns:
        The angle in radians; 0 without weight decay, where it vanishes as the weights grow.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(equilibrium_angle_adamw(lr=1e-3, weight_decay=0.1), 6)
        0.003244

    References:
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay, beta1=beta1):
        raise ValueError(complaint)
    return math.sqrt(2 * lr * weight_decay * (1 - beta1) / (1 + beta1))


def equilibrium_angle_lion(lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.99) -> float:
    r"""Return the angle by which Lion turns weights in one step, once they are in equilibrium.

    .. math:: \angle(w_t, w_{t+1}) = \sqrt{\pi \eta \lambda} \cdot
        \sqrt{(1 - \beta_1)^2 + \beta_1^2 \frac{1 - \beta_2}{1 + \beta_2}}

    The paper takes the signs of two updates to be as correlated as the updates themselves. That is 1 % off at the
    default betas, 3 % at (0.95, 0.98), and 25 % without momentum, where the signs are independent. All this as long as
    the decay is slow beside both averages, :math:`\eta \lambda \ll 1 - \beta_2`; at a tenth of it, 3 % are added.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Decoupled weight decay, non-negative.
        beta1: In [0, 1); the default of Chen et al.
        beta2: In [0, 1); the default of Chen et al.

    Returns:
        The angle in radians; 0 without weight decay.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(equilibrium_angle_lion(lr=1e-4, weight_decay=1.0), 6)
        0.002102

    References:
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212;
        Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, https://arxiv.org/abs/2302.06675.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2):
        raise ValueError(complaint)
    return math.sqrt(2 * lr * weight_decay) * _lion_correlation(beta1, beta2)


def equilibrium_angle_muon(
    lr: float,
    weight_decay: float,
    shape: Sequence[int],
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
) -> float:
    r"""Return the angle by which torch's Muon turns weights in one step, once they are in equilibrium.

    The length of a step over the norm of the weights, see :func:`equilibrium_rms_muon`.

    Args:
        lr: Learning rate, non-negative, before it is adjusted.
        weight_decay: Decoupled weight decay, non-negative.
        shape: Rows and columns of the weight.
        momentum: In [0, 1); the default is torch's.
        nesterov: As of torch's Muon.
        adjust_lr_fn: As of torch's Muon; None is "original".

    Returns:
        The angle in radians; 0 without weight decay.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(equilibrium_angle_muon(lr=0.02, weight_decay=0.1, shape=(64, 256)), 4)
        0.0116
    """
    step, norm = _muon(lr, weight_decay, shape, momentum, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    return step / norm if 0 < norm < math.inf else 0.0


def equilibrium_angle_sgd(lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    r"""Return the angle by which SGD turns scale-invariant weights in one step, once they are in equilibrium.

    .. math:: \angle(w_t, w_{t+1}) = \sqrt{\frac{2 \eta \lambda}{1 + \mu}}

    For small angles it is also the norm of the update over the norm of the weights.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Coupled weight decay, which is what ``torch.optim.SGD`` has, non-negative.
        momentum: In [0, 1), without dampening; torch's default.

    Returns:
        The angle in radians; 0 without weight decay, where it vanishes as the weights grow.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(equilibrium_angle_sgd(lr=0.1, weight_decay=5e-4, momentum=0.9), 6)
        0.007255

    References:
        Kosson et al., Rotational Equilibrium, ICML 2024, https://arxiv.org/abs/2305.17212.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay, momentum=momentum):
        raise ValueError(complaint)
    return math.sqrt(2 * lr * weight_decay / (1 + momentum))


def max_abs_weight(weight_decay: float) -> float:
    r"""Return the bound that decoupled decay sets on every single weight under AdamW and Lion.

    .. math:: \lVert w \rVert_\infty \le \frac{1}{\lambda}

    A weight of that size loses as much to decay as an update of size 1 gives back. Lion's updates have size 1, so its
    weights never leave the bound once they are inside; AdamW's have it on average only, and its full-batch run ends
    inside.

    Args:
        weight_decay: Decoupled weight decay, non-negative.

    Returns:
        The largest absolute value of a weight; ``inf`` without weight decay.

    Raises:
        ValueError: If the weight decay is negative or not finite.

    Example:
        >>> max_abs_weight(0.1)
        10.0

    References:
        Xie and Li, Implicit Bias of AdamW, ICML 2024, https://arxiv.org/abs/2404.04454.
    """
    if complaint := _complaint(weight_decay=weight_decay):
        raise ValueError(complaint)
    return _divide(1.0, weight_decay)


def timescale(lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    r"""Return over how many steps weight decay acts: the memory of the average that the weights are.

    .. math:: \tau = \frac{1 - \mu}{\eta \lambda}

    Left alone, weights shrink to :math:`1/e` in that many steps. A run shorter than this hardly feels its weight decay.
    Without momentum the function is its own inverse: ``timescale(lr, tau)`` is the weight decay that acts over
    ``tau`` steps.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Torch's weight decay, non-negative.
        momentum: In [0, 1), of an optimizer whose decay is coupled, as in ``torch.optim.SGD``: the momentum sums the
            decay up. Leave it at 0 for decoupled decay (AdamW, Lion), whatever the optimizer's momentum.

    Returns:
        The number of steps; ``inf`` where the learning rate or the weight decay is 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(timescale(lr=1e-3, weight_decay=0.01))
        100000

    References:
        Wang and Aitchison, How to set AdamW's weight decay as you scale model and dataset size, ICML 2025,
        https://arxiv.org/abs/2405.13698.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay, momentum=momentum):
        raise ValueError(complaint)
    return _divide(1 - momentum, lr * weight_decay)


def timescale_epochs(lr: float, weight_decay: float, steps_per_epoch: float, momentum: float = 0.0) -> float:
    r"""Return over how many epochs weight decay acts.

    .. math:: \tau_\mathrm{epoch} = \frac{1 - \mu}{\eta \lambda M}

    The paper's guideline: no fewer than about one epoch, so that all data count, and no more than the epochs of the
    run, so that the beginning is forgotten. The best value in epochs hardly changes with the sizes of model and data.

    Args:
        lr: Learning rate, non-negative.
        weight_decay: Torch's weight decay, non-negative.
        steps_per_epoch: Optimizer steps in an epoch (after accumulation), positive.
        momentum: As for :func:`timescale`.

    Returns:
        The number of epochs; ``inf`` where the learning rate or the weight decay is 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(timescale_epochs(lr=1e-3, weight_decay=0.1, steps_per_epoch=500), 6)
        20.0

    References:
        Wang and Aitchison, How to set AdamW's weight decay as you scale model and dataset size, ICML 2025,
        https://arxiv.org/abs/2405.13698.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay, steps_per_epoch=steps_per_epoch, momentum=momentum):
        raise ValueError(complaint)
    return timescale(lr, weight_decay, momentum) / steps_per_epoch


def share_remaining(lrs: Sequence[float], weight_decays: Sequence[float]) -> float:
    r"""Return which share of the initial weights is still there after all these steps of decoupled decay.

    .. math:: \prod_t (1 - \eta_t \lambda_t)

    Args:
        lrs: Learning rate of each step, finite and non-negative.
        weight_decays: Weight decay of each step, finite and non-negative, as many.

    Returns:
        The share, in [0, 1] as long as no step has ``lr * weight_decay > 1``; 1 for no steps.

    Raises:
        ValueError: If a value is out of its range or the lengths differ.

    Example:
        >>> round(share_remaining([0.01] * 1000, [0.1] * 1000), 4)
        0.3677

    References:
        Wang and Aitchison, How to set AdamW's weight decay as you scale model and dataset size, ICML 2025,
        https://arxiv.org/abs/2405.13698.
    """
    if complaint := _steps_complaint(lrs, weight_decays):
        raise ValueError(complaint)
    return math.prod(1 - lr * weight_decay for lr, weight_decay in zip(lrs, weight_decays, strict=True))


def ema_coefficients(lrs: Sequence[float], weight_decays: Sequence[float]) -> list[float]:
    r"""Return how much each step's update counts in the weights that decoupled decay leaves at the end.

    .. math:: w_T = \prod_t (1 - \eta_t \lambda_t) \, w_0 - \sum_t c_t \frac{u_t}{\lambda_t}, \qquad
        c_t = \eta_t \lambda_t \prod_{s > t} (1 - \eta_s \lambda_s)

    The weights are an exponential moving average of the :math:`-u_t / \lambda_t`, where :math:`u_t` is what the
    optimizer would have subtracted at learning rate 1. Coefficients that fall to 0 at the end of a schedule mean that
    the last data count for little.

    Args:
        lrs: Learning rate of each step, finite and non-negative.
        weight_decays: Weight decay of each step, finite and non-negative, as many. A step without weight decay has
            coefficient 0: its update is added as it is and takes no part in the average.

    Returns:
        The coefficients, one per step; they and :func:`share_remaining` add up to 1.

    Raises:
        ValueError: If a value is out of its range or the lengths differ.

    Example:
        >>> ema_coefficients([0.5, 0.5], [1.0, 1.0])
        [0.25, 0.5]

    References:
        Wang and Aitchison, How to set AdamW's weight decay as you scale model and dataset size, ICML 2025,
        https://arxiv.org/abs/2405.13698;
        Bergsma et al., Straight to Zero, ICLR 2025, https://arxiv.org/abs/2502.15938 (there: update-combination duals).
    """
    if complaint := _steps_complaint(lrs, weight_decays):
        raise ValueError(complaint)
    removed = [lr * weight_decay for lr, weight_decay in zip(lrs, weight_decays, strict=True)]
    remaining = accumulate(reversed(removed), lambda remains, share: remains * (1 - share), initial=1.0)
    return [share * remains for share, remains in zip(reversed(removed), remaining, strict=False)][::-1]


def next_mean_square(mean_square: float, lr: float, weight_decay: float) -> float:
    r"""Return the mean square of AdamW's weights after one more step, under noise.

    .. math:: \rho_{t+1} = (1 - \eta_t \lambda_t)^2 \rho_t + \eta_t^2

    Its fixed point is the square of :func:`equilibrium_rms_adamw`, up to a share ``lr * weight_decay / 2``. Momentum is
    counted as if all of a gradient acted at once, so that a change needs some ``1 / (1 - beta1)`` steps to show.

    Args:
        mean_square: Of the weights, non-negative; as something measured it may be ``nan`` or ``inf``.
        lr: Learning rate of the step, non-negative.
        weight_decay: Weight decay of the step, non-negative.

    Returns:
        The mean square; its root is the RMS.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> next_mean_square(0.25, lr=0.5, weight_decay=1.0)
        0.3125

    References:
        Su, Asymptotic estimate of the weight RMS of AdamW, part 2, 2025, https://kexue.fm/archives/11404.
    """
    if complaint := _complaint(mean_square=mean_square, lr=lr, weight_decay=weight_decay):
        raise ValueError(complaint)
    return (1 - lr * weight_decay) ** 2 * mean_square + lr**2


def mean_square_trajectory(mean_square: float, lrs: Sequence[float], weight_decays: Sequence[float]) -> list[float]:
    r"""Return the mean square of AdamW's weights along a whole schedule, under noise.

    It is :func:`next_mean_square` over and over, and under constant values closes in on equilibrium twice as fast as
    :func:`timescale` says: :math:`\rho_t - \rho_\infty` shrinks by :math:`e^2` in one timescale.

    Args:
        mean_square: Of the initial weights, non-negative.
        lrs: Learning rate of each step, finite and non-negative.
        weight_decays: Weight decay of each step, finite and non-negative, as many.

    Returns:
        One value more than steps: entry ``t`` is what step ``t`` finds, the last one what the last step leaves.

    Raises:
        ValueError: If a value is out of its range or the lengths differ.

    Example:
        >>> mean_square_trajectory(0.25, [0.5, 0.0], [1.0, 1.0])
        [0.25, 0.3125, 0.3125]

    References:
        Su, Asymptotic estimate of the weight RMS of AdamW, part 2, 2025, https://kexue.fm/archives/11404.
    """
    if complaint := _complaint(mean_square=mean_square) or _steps_complaint(lrs, weight_decays):
        raise ValueError(complaint)
    trajectory = [mean_square]
    for lr, weight_decay in zip(lrs, weight_decays, strict=True):
        trajectory.append(next_mean_square(trajectory[-1], lr, weight_decay))
    return trajectory


def weight_decay_from_independent(independent_weight_decay: float, peak_lr: float) -> float:
    r"""Return torch's weight decay for one that is meant independently of the learning rate.

    .. math:: w \leftarrow w - \eta_t u - \frac{\eta_t}{\eta_\mathrm{max}} \lambda_\mathrm{ind} w
        \quad \Longleftrightarrow \quad \lambda = \frac{\lambda_\mathrm{ind}}{\eta_\mathrm{max}}

    Independent weight decay is the share of a weight that a step at the peak of the schedule removes, so that a search
    over learning rates does not change the decay as well.

    Args:
        independent_weight_decay: Share removed in a step at the peak, non-negative, far below 1.
        peak_lr: Largest learning rate of the schedule, positive; not the one a warm-up starts with.

    Returns:
        The ``weight_decay`` for torch's AdamW.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> weight_decay_from_independent(1e-4, peak_lr=1e-3)
        0.1

    References:
        Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, ICLR 2024,
        https://arxiv.org/abs/2309.14322.
    """
    if complaint := _complaint(independent_weight_decay=independent_weight_decay, peak_lr=peak_lr):
        raise ValueError(complaint)
    return independent_weight_decay / peak_lr


def weight_decay_from_normalized(
    normalized_weight_decay: float, batch_size: float, samples: float, epochs: float, peak_lr: float
) -> float:
    r"""Return torch's weight decay for the AdamW paper's normalized one, which fits runs of any length.

    .. math:: \lambda = \frac{\lambda_\mathrm{norm}}{\eta_\mathrm{max}} \sqrt{\frac{b}{B T}}

    The paper's decay is not multiplied by the learning rate, torch's is; hence the division.

    Args:
        normalized_weight_decay: Non-negative; the authors' code recommends 0.025 to 0.05 on CIFAR-10.
        batch_size: Samples an optimizer step sees (over all devices and accumulated batches), positive.
        samples: In the training set, positive.
        epochs: Of the run, positive.
        peak_lr: Largest learning rate of the schedule, positive.

    Returns:
        The ``weight_decay`` for torch's AdamW.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(weight_decay_from_normalized(0.025, batch_size=128, samples=50_000, epochs=1500, peak_lr=1e-3), 5)
        0.03266

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, appendix,
        https://arxiv.org/abs/1711.05101.
    """
    if complaint := _complaint(
        normalized_weight_decay=normalized_weight_decay,
        batch_size=batch_size,
        samples=samples,
        epochs=epochs,
        peak_lr=peak_lr,
    ):
        raise ValueError(complaint)
    return normalized_weight_decay * math.sqrt(batch_size / (samples * epochs)) / peak_lr


def decay_rounding_threshold(dtype: torch.dtype) -> float:
    r"""Return the ``lr * weight_decay`` up to which decay is lost to rounding, in weights of this data type.

    .. math:: \mathrm{round}\big(w (1 - \eta \lambda)\big) = w \text{ for every } w
        \quad \Longleftrightarrow \quad \eta \lambda \le \tfrac14 \mathrm{eps}

    A weight moves if its decay exceeds half the distance to the next number below it. In units of the weight that
    distance is ``eps / 2`` for powers of two, almost as small for the largest numbers below one, and up to ``eps`` in
    between. So from the threshold to twice the threshold some weights decay and others do not, and above that all do,
    but in jumps of that distance. It holds for a decay that is rounded by itself, as torch's for-loop and foreach
    implementations do; a fused step rounds decay and update together, and the noise of the updates carries the decay.

    Args:
        dtype: A floating-point data type, or a complex one, whose numbers decay part by part.

    Returns:
        The threshold: :math:`2^{-9}` for bfloat16, :math:`2^{-12}` for float16, :math:`2^{-25}` for float32,
        :math:`2^{-54}` for float64.

    Raises:
        TypeError: If the data type is not a floating-point one.

    Example:
        >>> decay_rounding_threshold(torch.bfloat16)
        0.001953125
        >>> weight = torch.tensor([0.3, 1.0, 7.5], dtype=torch.bfloat16)
        >>> bool((weight * (1 - 0.001953125) == weight).all())
        True

    References:
        Goldberg, What Every Computer Scientist Should Know About Floating-Point Arithmetic, ACM Computing Surveys 1991.
    """
    if not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"`dtype` should be a floating-point torch.dtype, got {dtype!r}.")
    return torch.finfo(dtype).eps / 4


_Range = tuple[str, Callable[[float], bool]]

_NON_NEGATIVE: _Range = ("finite and non-negative", lambda value: 0 <= value < math.inf)
_POSITIVE: _Range = ("finite and positive", lambda value: 0 < value < math.inf)
_FRACTION: _Range = ("in [0, 1)", lambda value: 0 <= value < 1)
_MEASURED: _Range = ("non-negative", lambda value: not value < 0)  # nan passes: a diverged run is not an error here

_RANGES: dict[str, _Range] = {
    "lr": _NON_NEGATIVE,
    "lrs": _NON_NEGATIVE,
    "weight_decay": _NON_NEGATIVE,
    "weight_decays": _NON_NEGATIVE,
    "independent_weight_decay": _NON_NEGATIVE,
    "normalized_weight_decay": _NON_NEGATIVE,
    "peak_lr": _POSITIVE,
    "steps_per_epoch": _POSITIVE,
    "batch_size": _POSITIVE,
    "samples": _POSITIVE,
    "epochs": _POSITIVE,
    "momentum": _FRACTION,
    "beta1": _FRACTION,
    "beta2": _FRACTION,
    "mean_square": _MEASURED,
    "gradient_norm_at_unit_norm": _MEASURED,
}


def _complaint(**arguments: object) -> str | None:
    """Return what is wrong with the first argument that is outside the range of its name, None if all are inside."""
    for name, value in arguments.items():
        expected, holds = _RANGES[name]
        if not is_number(value):
            return f"`{name}` should be a number, {expected}, got {value!r}."
        if not holds(value):
            return f"`{name}` should be {expected}, got {value}."
    return None


def _steps_complaint(lrs: Sequence[float], weight_decays: Sequence[float]) -> str | None:
    """Return what is wrong with the two sequences, None if nothing is."""
    if len(lrs) != len(weight_decays):
        return (
            "`lrs` and `weight_decays` should have one value per step each, "
            f"got {len(lrs)} and {len(weight_decays)} values."
        )
    for step, (lr, weight_decay) in enumerate(zip(lrs, weight_decays, strict=True)):
        if complaint := _complaint(lrs=lr, weight_decays=weight_decay):
            return f"{complaint.removesuffix('.')} at step {step}."
    return None


def _divide(numerator: float, denominator: float) -> float:
    """Divide non-negative numbers as IEEE 754 does, where Python raises."""
    if denominator == 0:
        return math.inf if numerator > 0 else math.nan
    return numerator / denominator


def _lion_correlation(beta1: float, beta2: float) -> float:
    """Return the factor between Lion's angle and that of independent updates of the same size."""
    return math.sqrt(math.pi / 2) * math.sqrt((1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2))


def _muon(
    lr: float, weight_decay: float, shape: Sequence[int], momentum: float, *, nesterov: bool, adjust_lr_fn: str | None
) -> tuple[float, float]:
    """Return the length of Muon's steps, and the norm of weights in equilibrium.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if complaint := _complaint(lr=lr, weight_decay=weight_decay, momentum=momentum):
        raise ValueError(complaint)
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"`shape` should be the rows and columns of a matrix, got {shape!r}.")
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"`adjust_lr_fn` should be 'original', 'match_rms_adamw' or None, got {adjust_lr_fn!r}.")
    rows, columns = sizes
    is_original = adjust_lr_fn != "match_rms_adamw"
    rate = lr * (max(1, rows / columns) ** 0.5 if is_original else 0.2 * max(rows, columns) ** 0.5)
    step, norm = walk((rows, columns), momentum, nesterov=nesterov, share=min(lr * weight_decay, 1.0))
    return rate * math.sqrt(step), rate * math.sqrt(norm) if rate else 0.0
