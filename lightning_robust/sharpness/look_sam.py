# SPDX-License-Identifier: Apache-2.0
"""LookSAM: an ascent every few steps, whose effect is used again in the steps between."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer, check_non_negative, check_positive
from lightning_robust.sharpness.ascent import inner_product
from lightning_robust.sharpness.dense import check_dense
from lightning_robust.sharpness.gradients import global_norm, tensor_norms
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["LookSAM", "orthogonal_part_"]


def orthogonal_part_(gradients: Gradients, ascended: Gradients, *, per_tensor: bool = True) -> Gradients:
    r"""What is orthogonal to ``gradients`` in ``ascended``; it overwrites ``gradients``.

    .. math:: g_v = g_s - \frac{g^\top g_s}{\lVert g \rVert^2} \, g

    Args:
        gradients: :math:`g`; where it is zero, all of :math:`g_s` is orthogonal. Where both are parallel up to
            rounding, nothing is.
        ascended: :math:`g_s`.
        per_tensor: whether each tensor is a vector by itself, or all of them are one.

    Example:
        >>> orthogonal_part_([torch.tensor([2.0, 0.0])], [torch.tensor([3.0, 5.0])])
        [tensor([0., 5.])]
    """
    products = torch.stack([inner_product([g], [s]) for g, s in zip(gradients, ascended, strict=True)])
    squares = torch.stack(tensor_norms(gradients)).square()
    if not per_tensor:
        products, squares = (each.sum().expand(len(gradients)) for each in (products, squares))
    shares = torch.where(squares > 0, products / squares, 0.0).neg().unbind()
    torch._foreach_mul_(gradients, _like(shares, gradients))
    torch._foreach_add_(gradients, ascended)
    sizes, left = (torch.stack(tensor_norms(each)) for each in (ascended, gradients))
    if not per_tensor:
        sizes, left = (torch.linalg.vector_norm(each).expand(len(gradients)) for each in (sizes, left))
    # what is left of parallel tensors is rounding, which a later step would scale up to full length
    noise = left <= 8 * torch.finfo(gradients[0].dtype).eps * sizes
    torch._foreach_mul_(gradients, _like((~noise).unbind(), gradients))
    return gradients


class LookSAM(SharpnessMethod):
    r"""SAM in every k-th step; the others use the part of its gradient again that leads to flat regions.

    .. math::
        t \bmod k = 0:\quad d = g_s = g(w + e), \qquad g_v = g_s - \frac{g^\top g_s}{\lVert g \rVert^2} \, g
        \\
        \text{otherwise:}\quad d = g + \alpha \, \frac{\lVert g \rVert}{\lVert g_v \rVert + 10^{-8}} \, g_v

    with :math:`e` as in SAM; t counts the optimizer steps, and the first is a step of SAM. In a plain loop say
    ``sharp_backward(..., step=t)``. A group option ``rho`` of the optimizer overrides ``rho``. All weights have a
    :math:`g_v`, also those that a selection does not perturb.

    With several processes or accumulated batches, the mean of what they find is remembered: each batch of a step of
    SAM gives its :math:`g_v`, and all processes use the same one until the next. One that is not finite, after an
    overflow of the loss scale, is not remembered.

    Cost: ``1 + 1 / interval`` forward + backward passes per step, and memory for one more gradient; with several
    processes, one more exchange of a gradient in the steps of SAM.

    Args:
        rho: radius, a number or a schedule; 0.1 in the examples of the code, 0.05 in its class.
        interval: k; 5 to 10.
        alpha: how much of :math:`g_v` is added in the steps between, in units of the gradient's norm.
        per_tensor: take products and norms tensor by tensor, as the code does, or over all weights, as the paper
            writes them.
        norm_eps: added to the norm of the ascent, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive, ``interval`` is below 1, or ``alpha`` is negative; in
            the first step, if a gradient is sparse.

    References:
        Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714, in the form of the
        public re-implementations (rollovd/LookSAM, kozistr/pytorch_optimizer), where :math:`g_v` belongs to the
        process and accumulated batches are not provided for.

    Example:
        >>> from lightning_robust.sharpness import LookSAM
        >>> LookSAM(interval=5).extra_passes
        0.2
    """

    collective: ClassVar[bool] = True

    def __init__(
        self,
        *,
        rho: Radius = 0.1,
        interval: int = 10,
        alpha: float = 0.7,
        per_tensor: bool = True,
        norm_eps: float = 1e-12,
    ) -> None:
        check_radius("rho", rho)
        check_integer("interval", interval, 1)
        check_non_negative("alpha", alpha)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.interval = interval
        self.alpha = alpha
        self.per_tensor = per_tensor
        self.norm_eps = norm_eps
        self._window = (-1, 0)  # the last step of SAM, and its batches so far

    @property
    @override
    def extra_passes(self) -> float:
        return 1 / self.interval

    @override
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        super().load_state_dict(state_dict)
        self._window = (-1, 0)

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        check_dense("LookSAM", weights, gradients)
        kept = self.recall("flat", weights)
        known = any(each is not None for each in kept)
        flat = [torch.zeros_like(w) if v is None else v for w, v in zip(weights.tensors, kept, strict=True)]
        # all batches of one optimizer step are of one kind, also where training begins between two steps of SAM
        if probe.step % self.interval == 0 or probe.step == self._window[0] or not known:
            return self._ascend(weights, gradients, flat, probe)
        return self._reuse(gradients, flat)

    def _ascend(self, weights: Weights, gradients: Gradients, flat: Gradients, probe: Probe) -> Gradients:
        steep = weights.pick(gradients)
        ascended = probe.gradient_at(steep, ascent_scales(probe.radii(self.rho), global_norm(steep), self.norm_eps))
        found = probe.average(orthogonal_part_(gradients, ascended, per_tensor=self.per_tensor))
        batches = self._window[1] + 1 if probe.step == self._window[0] else 1
        self._window = (probe.step, batches)
        usable = global_norm(found).isfinite()
        if batches > 1:
            torch._foreach_lerp_(found, flat, 1 - 1 / batches)
        # the memory of `found` is that of the gradients, which nobody needs any more
        for new, old in zip(found, flat, strict=True):
            new.copy_(torch.where(usable, new, old))
        self.remember("flat", weights, found)
        return ascended

    def _reuse(self, gradients: Gradients, flat: Gradients) -> Gradients:
        sizes, known = (torch.stack(tensor_norms(each)) for each in (gradients, flat))
        if not self.per_tensor:
            sizes, known = (torch.linalg.vector_norm(each).expand(len(flat)) for each in (sizes, known))
        scales = (self.alpha * sizes / (known + 1e-8)).unbind()
        torch._foreach_addcmul_(gradients, flat, _like(scales, gradients))
        return gradients


def _like(numbers: tuple[Tensor, ...], tensors: list[Tensor]) -> list[Tensor]:
    return [number.to(tensor.dtype) for number, tensor in zip(numbers, tensors, strict=True)]
