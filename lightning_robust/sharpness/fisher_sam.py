# SPDX-License-Identifier: Apache-2.0
"""FSAM: SAM that perturbs the entries with the largest Fisher information."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_integer, check_positive
from lightning_robust.sharpness.dense import check_dense
from lightning_robust.sharpness.gradients import global_norm
from lightning_robust.sharpness.method import SharpnessMethod
from lightning_robust.sharpness.probe import Probe
from lightning_robust.sharpness.radius import Radius, ascent_scales, check_radius
from lightning_robust.sharpness.weights import Gradients, Weights

__all__ = ["FisherSAM", "top_entries"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def top_entries(scores: Tensor, keep_ratio: float) -> Tensor:
    """Mark the largest entries, exactly ``int(keep_ratio * entries)`` of them; among equals the first ones.

    Args:
        scores: any numbers but NaN.
        keep_ratio: share of the entries to mark.

    Returns:
        A mask of the shape of ``scores``.

    Raises:
        ValueError: ``keep_ratio`` is not in [0, 1].

    Example:
        >>> top_entries(torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0]), 0.4)
        tensor([False,  True, False,  True, False])
    """
    check_in_range("keep_ratio", keep_ratio, 0.0, 1.0)
    kept = int(scores.numel() * keep_ratio)
    if not kept:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    # sorting everything takes several times as long as finding the last value that is kept
    least = flat.topk(kept, sorted=False).values.min()
    above, equal = flat > least, flat == least
    rank = equal.cumsum(0, dtype=torch.int32 if flat.numel() < 2**31 else torch.int64)
    return (above | (equal & (rank <= kept - above.sum()))).view_as(scores)


class FisherSAM(SharpnessMethod):
    r"""FSAM: SAM whose perturbation keeps the weights with the largest Fisher information.

    .. math::
        F = g(w)^2, \qquad M = \big[F \text{ is among the largest } \kappa \text{ of all scores}\big], \qquad
        e = \rho \, M \, g(w) / (\lVert g(w) \rVert_2 + 10^{-7}), \qquad d = g(w + e)

    The score of an entry is the square of the batch's gradient, compared over all scored weights. Parameters that are
    not scored are perturbed whole, and the norm is that of the whole gradient, so the perturbation is shorter than
    ``rho``. A group option ``rho`` of the optimizer overrides ``rho``.

    The mask is renewed every ``refresh_every`` optimizer steps, from the first batch of the step, and remembered
    between; in a plain loop say ``sharp_backward(..., step=...)``. Several processes use one mask, from the mean of
    their scores. Where a gradient is zero or not finite, after an overflow of the loss scale for example, the mask
    stays as it is; before there is one, everything is perturbed.

    ``perturb=ParameterSelection(...)`` comes first: scores, norm and perturbation are of what it chooses, and the
    rest stays in place.

    Cost: 2 forward + 2 backward passes per step, a search over all weights in every ``refresh_every``-th, and one
    byte per weight; with several processes, one more exchange of a gradient in those steps.

    Args:
        rho: radius, a number or a schedule.
        keep_ratio: share of the scored entries that is perturbed.
        refresh_every: optimizer steps from mask to mask; 100 in the README and the class of the official code, 1 in
            its configuration.
        unscored: parameters with one of these texts in their name are not scored, nor are those of BatchNorm.
        norm_eps: added to the norm, so that a zero gradient gives no perturbation.

    Raises:
        ValueError: ``rho`` or ``norm_eps`` is not positive, ``keep_ratio`` is not in [0, 1], or ``refresh_every`` is
            below 1; in the first step, if names are not known, nothing is scored or a scored gradient is sparse.

    References:
        Zhong et al., Improving Sharpness-Aware Minimization with Fisher Mask for Better Generalization on Language
        Models, arXiv 2210.05497. The published class cannot take a step (``KeyError: 'old_p'``), drops the gradient
        in the steps that renew the mask, and perturbs once per parameter group; none of this is followed.

    Example:
        >>> from lightning_robust.sharpness import FisherSAM
        >>> FisherSAM(keep_ratio=0.3).refresh_every
        100
    """

    ascent_only: ClassVar[bool] = True
    collective: ClassVar[bool] = True

    def __init__(
        self,
        *,
        rho: Radius = 0.05,
        keep_ratio: float = 0.1,
        refresh_every: int = 100,
        unscored: Sequence[str] = ("bias", "embed"),
        norm_eps: float = 1e-7,
    ) -> None:
        check_radius("rho", rho)
        check_in_range("keep_ratio", keep_ratio, 0.0, 1.0)
        check_integer("refresh_every", refresh_every, 1)
        check_positive("norm_eps", norm_eps)
        self.rho = rho
        self.keep_ratio = keep_ratio
        self.refresh_every = refresh_every
        self.unscored = (unscored,) if isinstance(unscored, str) else tuple(unscored)
        self.norm_eps = norm_eps
        self._refreshed = -1  # the step of the last renewal

    @override
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        super().load_state_dict(state_dict)
        self._refreshed = -1

    @override
    def direction(self, weights: Weights, gradients: Gradients, probe: Probe) -> Gradients:
        steep = weights.pick(gradients)
        norm = global_norm(steep)
        scored = self._scored(weights.perturbed)
        chosen = weights.perturbed.subset(scored)
        masked = [gradient for gradient, each in zip(steep, scored, strict=True) if each]
        check_dense("FisherSAM", chosen, masked)
        torch._foreach_mul_(masked, self._masks(chosen, masked, probe))
        return probe.gradient_at(steep, ascent_scales(probe.radii(self.rho), norm, self.norm_eps))

    def _masks(self, chosen: Weights, gradients: Gradients, probe: Probe) -> list[Tensor]:
        kept = self.recall("mask", chosen)
        known = [mask for mask in kept if mask is not None]
        due = probe.step % self.refresh_every == 0 and probe.step != self._refreshed
        if len(known) == len(kept) and not due:
            return known
        wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
        scores = torch.cat([gradient.flatten() for gradient in wide]).square_()
        del wide
        probe.average([scores])
        largest = scores.max()
        usable = (largest > 0) & largest.isfinite()
        parts = torch.split(top_entries(scores, self.keep_ratio), [gradient.numel() for gradient in gradients])
        found = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        masks = [
            torch.where(usable, new, torch.ones_like(new) if old is None else old)
            for new, old in zip(found, kept, strict=True)
        ]
        self.remember("mask", chosen, masks)
        self._refreshed = probe.step
        return masks

    def _scored(self, moved: Weights) -> list[bool]:
        if all(owner is None for owner in moved.owners or [None]):
            raise ValueError(
                "FisherSAM leaves out parameters by their names, which are not known; pass the module (module=...)."
            )
        scored = [
            not isinstance(owner, _NORMS) and not any(text in name for text in self.unscored)
            for name, owner in zip(moved.names, moved.owners, strict=True)
        ]
        if not any(scored):
            raise ValueError(
                f"FisherSAM scores none of the {len(moved)} parameters that are perturbed ({moved.names[:3]}, ...), so "
                f"it would be plain SAM; choose others or shorten unscored={self.unscored!r}."
            )
        return scored
