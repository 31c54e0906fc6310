# SPDX-License-Identifier: Apache-2.0
"""Single numbers that say how sharp a loss is around its weights."""

import math
from dataclasses import dataclass

import torch

from lightning_robust.checks import check_integer, check_non_negative, check_positive
from lightning_robust.sharpness.surface import LossSurface

__all__ = [
    "EpsilonSharpness",
    "HessianTrace",
    "epsilon_sharpness",
    "gradient_norm",
    "hutchinson_trace",
    "stability_ratio",
]

# before this many samples their spread says little about the error of their mean
_FEWEST = 8


@dataclass(frozen=True)
class HessianTrace:
    """An estimate of the trace of a Hessian.

    Attributes:
        value: the estimate.
        standard_error: its standard error; NaN for a single sample.
        products: Hessian-vector products that were used.
        converged: whether the tolerance was reached within the allowed number of products.
    """

    value: float
    standard_error: float
    products: int
    converged: bool


@dataclass(frozen=True)
class EpsilonSharpness:
    """How much the loss rises within a ball around the weights.

    Attributes:
        loss: the loss at the weights.
        absolute: the rise.
        relative: the rise in percent of one plus the loss.
        passes: forward and backward passes that were used; one of them is forward only.
    """

    loss: float
    absolute: float
    relative: float
    passes: int


def gradient_norm(surface: LossSurface) -> float:
    """Euclidean norm of the gradient over all weights.

    Cost: one forward and one backward pass.

    Args:
        surface: the loss.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> gradient_norm(LossSurface(lambda: 0.5 * (w**2).sum(), [w]))
        5.0
    """
    return float(surface.value_and_gradient()[1].norm())


def hutchinson_trace(
    surface: LossSurface, *, tolerance: float = 0.05, max_products: int = 100, seed: int = 0
) -> HessianTrace:
    r"""The trace of the Hessian, the sum of its eigenvalues, by Hutchinson's estimator.

    .. math:: \mathrm{tr}\, H = \mathbb{E}\, z^\top H z, \qquad z_i = \pm 1

    Stops when the standard error is at most ``tolerance`` times the estimate, after 8 samples or more.

    Cost: one Hessian-vector product per sample.

    Args:
        surface: the loss.
        tolerance: relative standard error; 0 uses all products.
        max_products: largest number of samples.
        seed: seed of the random signs.

    Raises:
        ValueError: an argument out of range.

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989. Yao et al., PyHessian,
        arXiv 1912.07145, whose code stops when the mean changes little from one sample to the next, which it does long
        before it is exact.

    Example:
        >>> from lightning_robust.sharpness import LossSurface, hutchinson_trace
        >>> w = torch.zeros(3, requires_grad=True)
        >>> scales = torch.tensor([-5.0, 1.0, 2.0])
        >>> hutchinson_trace(LossSurface(lambda: 0.5 * (scales * w**2).sum(), [w])).value
        -2.0
    """
    check_non_negative("tolerance", tolerance)
    check_integer("max_products", max_products, 1)
    generator = torch.Generator().manual_seed(seed)
    samples: list[float] = []
    mean, error, converged = math.nan, math.nan, False
    with surface.products() as product:
        while len(samples) < max_products and not converged:
            signs = surface.random(generator, signs=True)
            samples += surface.agreed(torch.dot(signs, product(signs)))
            seen = torch.tensor(samples, dtype=torch.float64)
            mean = float(seen.mean())
            if len(samples) > 1:
                error = float(seen.std()) / math.sqrt(len(samples))
                converged = len(samples) >= _FEWEST and bool(tolerance) and error <= tolerance * abs(mean)
    return HessianTrace(mean, error, len(samples), converged)


def epsilon_sharpness(
    surface: LossSurface, *, radius: float = 0.05, steps: int = 10, step_size: float | None = None
) -> EpsilonSharpness:
    r"""How much the loss rises within a ball around the weights.

    .. math::
        \max_{\lVert e \rVert_2 \le \epsilon} L(w + e) - L(w), \qquad
        e \leftarrow P_\epsilon\big(e + \alpha \, g(w + e) / \lVert g(w + e) \rVert_2\big)

    The largest loss among the visited points counts, so the result is a lower bound of the maximum, never negative, and
    does not fall with more steps. One step goes to the point of SAM. Where the gradient is exactly zero there is no
    direction to climb, and the result is 0.

    Cost: ``steps`` forward and backward passes, and one forward pass.

    Args:
        surface: the loss.
        radius: radius of the ball, in units of the weights; SAM's ``rho``.
        steps: number of ascent steps.
        step_size: length of a step; the radius when ``None``.

    Raises:
        ValueError: an argument out of range, or a loss that is not finite within the ball.

    References:
        Keskar et al., On Large-Batch Training for Deep Learning, arXiv 1609.04836: there the set is a box that scales
        with the weights, and ``relative`` is the sharpness. The ball is that of Foret et al., arXiv 2010.01412.

    Example:
        >>> from lightning_robust.sharpness import LossSurface, epsilon_sharpness
        >>> w = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> round(epsilon_sharpness(LossSurface(lambda: 0.5 * (w**2).sum(), [w]), radius=0.5).absolute, 4)
        0.625
    """
    check_positive("radius", radius)
    check_integer("steps", steps, 1)
    if step_size is not None:
        check_positive("step_size", step_size)
    length = radius if step_size is None else step_size
    here, gradient = surface.value_and_gradient()
    (loss,) = surface.agreed(here)
    highest, offset, passes = loss, torch.zeros_like(gradient), 1
    for step in range(1, steps + 1):
        (norm,) = surface.agreed(gradient.norm())
        if norm == 0.0:
            break
        offset = offset + gradient * (length / norm)
        (distance,) = surface.agreed(offset.norm())
        if distance > radius:
            offset = offset * (radius / distance)
        if step < steps:
            reached, gradient = surface.value_and_gradient(offset)
        else:
            reached = surface.value(offset)
        passes += 1
        highest = max(highest, *surface.agreed(reached))
    rise = highest - loss
    return EpsilonSharpness(loss, rise, 100.0 * rise / (1.0 + loss), passes)


def stability_ratio(eigenvalue: float, lr: float, *, ascent: float = 0.0) -> float:
    r"""How close gradient descent is to the edge of stability, which it crosses at 1.

    .. math:: \eta \, (\lambda + r \lambda^2) / 2

    Gradient descent with step size :math:`\eta` diverges along an eigenvector of a quadratic when :math:`\lambda`
    exceeds :math:`2/\eta`, and full-batch training of networks hovers there. With heavy-ball momentum :math:`\beta` the
    threshold of this ratio is :math:`1 + \beta`; for Adam the Hessian would have to be preconditioned.

    Args:
        eigenvalue: largest eigenvalue of the Hessian.
        lr: step size.
        ascent: ``r`` of a sharpness-aware method that ascends by ``r * g``; for SAM that is ``rho / |g|``.

    Raises:
        ValueError: ``lr`` or ``ascent`` is negative.

    References:
        Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, arXiv 2103.00065.
        Long and Bartlett, Sharpness-Aware Minimization and the Edge of Stability, arXiv 2309.12488 (SAM).

    Example:
        >>> stability_ratio(20.0, lr=0.1)
        1.0
    """
    check_non_negative("lr", lr)
    check_non_negative("ascent", ascent)
    return lr * (eigenvalue + ascent * eigenvalue**2) / 2.0
