# SPDX-License-Identifier: Apache-2.0
"""SAM: the gradient at the weights of locally highest loss."""

from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.sharpness.method import GradientAt, SharpnessMethod
from lightning_robust.sharpness.weights import Gradients, Weights, global_norm

__all__ = ["SAM", "ascent_scales"]


class SAM(SharpnessMethod):
    r"""Sharpness-aware minimization: the base optimizer gets the gradient at the ascended weights.

    .. math:: e = \rho \, g(w) / (\lVert g(w) \rVert_2 + 10^{-12}), \qquad d = g(w + e)

    with one norm over all weights. A group option ``rho`` of the optimizer overrides ``rho`` for its weights. Weight
    decay belongs to the base optimizer: it acts at the unperturbed weights and is no part of ``e``.

    Cost: 2 forward + 2 backward passes per step.

    Args:
        rho: radius of the neighbourhood, in units of the weights; 0.05 in the paper for CIFAR.
        norm_eps: added to the norm, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive.

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412. The
        official JAX code puts the L2 penalty into the loss and hence into the ascent; here, as in all PyTorch ports,
        it is not.

    Example:
        >>> from lightning_robust.sharpness import SAM
        >>> SAM(rho=0.1)
        SAM(rho=0.1, norm_eps=1e-12)
    """

    def __init__(self, *, rho: float = 0.05, norm_eps: float = 1e-12) -> None:
        check_positive("rho", rho)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.norm_eps = norm_eps

    def __repr__(self) -> str:
        return f"SAM(rho={self.rho}, norm_eps={self.norm_eps})"

    @override
    def direction(self, weights: Weights, gradients: Gradients, gradient_at: GradientAt) -> Gradients:
        norm = global_norm(gradients)
        return gradient_at(gradients, ascent_scales(weights, norm, self.rho, self.norm_eps))


def ascent_scales(weights: Weights, norm: Tensor, rho: float, norm_eps: float) -> Tensor | list[Tensor]:
    """The factor ``rho / (norm + norm_eps)`` of each weight, with the radius of its optimizer group.

    Args:
        weights: the perturbed weights.
        norm: norm of the ascent gradient.
        rho: radius where a group names none.
        norm_eps: added to the norm.

    Raises:
        ValueError: a group's ``rho`` is negative or not a number.
    """
    radii = [option.get("rho", rho) for option in weights.options]
    for radius in {id(radius): radius for radius in radii}.values():
        if not isinstance(radius, int | float) or not radius >= 0:
            raise ValueError(f"Expected the optimizer group option `rho` to be a number >= 0 but got {radius!r}.")
    unit = 1.0 / (norm + norm_eps)
    if all(radius == radii[0] for radius in radii):
        return unit * radii[0]  # type: ignore[operator]
    return [unit * radius for radius in radii]  # type: ignore[operator]
