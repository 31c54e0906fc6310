# SPDX-License-Identifier: Apache-2.0
"""Sanity checks of the gradients that white-box attacks follow."""

import torch
from torch import Tensor

from lightning_robust.attacks.losses import cross_entropy, margin
from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.judge import fine, warned
from lightning_robust.evaluation.probe import Probe
from lightning_robust.losses import full_precision

__all__ = ["finite_differences", "zero_gradients"]

LOSSES = {"ce": cross_entropy, "margin": margin}


def zero_gradients(
    probe: Probe, *, threshold: float = 1e-12, tolerance: float = 0.01, largest_gap: float = 30.0
) -> Check:
    """Do the images have gradients, at the start and at the end of the attack, and do the logits have a usual size?

    Looked at are samples that are right at the point in question. A warning means that a gradient is missing (a step
    function, a detached tensor), or that the cross-entropy is saturated: its gradient underflows where that of the
    margin does not, because the logits are large. Attacks then stand still. Remedy: attack with ``loss="margin"`` or
    ``"dlr"``, which do not depend on the scale of the logits; for a missing gradient a black-box attack, or BPDA.

    Args:
        probe: What is checked.
        threshold: Euclidean length below which a gradient counts as zero.
        tolerance: largest share of samples without a gradient.
        largest_gap: largest median difference of the two largest logits.
    """
    numbers: dict[str, float | int | None] = {}
    with torch.inference_mode(False):
        top = probe.logits(probe.x).topk(2, dim=1).values
    numbers["logit_gap"] = gap = float((top[:, 0] - top[:, 1]).median())
    if not probe.has_gradient:
        text = "No gradient reaches the images: gradient attacks say nothing; use Square or BPDA."
        return warned("zero-gradients", text, numbers)
    worst, only_ce = 0.0, 0
    for where, points, right in (
        ("start", probe.x, probe.clean_right),
        ("end", probe.adversarial, probe.robust),
    ):
        missing = {}
        for name in LOSSES:
            lengths = _pixel_gradient(probe, points, name).flatten(1).norm(dim=1)
            missing[name] = (lengths <= threshold) & right
            numbers[f"zero_{name}_{where}"] = share = float(missing[name].sum() / right.sum().clamp(min=1))
            worst = max(worst, share)
        only_ce += int((missing["ce"] & ~missing["margin"]).sum())
    numbers["zero_ce_but_not_margin"] = only_ce
    if worst > tolerance and only_ce:
        text = f"The gradient of the cross-entropy vanishes for {worst:.1%} of the samples where that of the margin "
        text += f"does not (median gap of the logits {gap:.3g}); attack with loss='margin' or 'dlr'."
    elif worst > tolerance:
        text = f"{worst:.1%} of the samples have no gradient; use a black-box attack (Square), or BPDA for the step "
        text += "that stops the gradient."
    elif gap > largest_gap:
        text = (
            f"The logits are large (median gap {gap:.3g}), so the cross-entropy saturates; attack with loss='margin' "
        )
        text += "or 'dlr'."
    else:
        return fine("zero-gradients", f"The images have gradients; median logit gap {gap:.3g}.", numbers)
    return warned("zero-gradients", text, numbers)


def finite_differences(
    probe: Probe,
    *,
    directions: int = 4,
    steps: tuple[float, ...] = (1e-3, 3e-3, 1e-2),
    tolerance: float = 0.5,
) -> Check:
    r"""Is the gradient that of the function that decides?

    Compares :math:`\langle \nabla m, d \rangle` with :math:`(m(x + h d) - m(x - h d)) / 2h` of the margin along random
    sign vectors ``d``, as the relative error over all samples and directions; of several ``h`` the best counts, since
    small ones drown in rounding and large ones in curvature. A warning means that something in the model has another
    gradient than its values say (quantised or encoded inputs, a straight-through estimator, a custom backward).
    Remedy: BPDA, or a black-box attack.

    Args:
        probe: What is checked.
        directions: random directions per sample.
        steps: step lengths, as parts of the range of the pixels.
        tolerance: largest relative error.
    """
    if not probe.has_gradient:
        return warned("finite-differences", "No gradient reaches the images; use Square or BPDA.", {})
    reach = max(steps) * probe.full_range
    low, high = probe.space.bounds
    # away from the edges, so that no step leaves the possible pixels
    base = probe.images(probe.pixels(probe.x).clamp(low + reach, high - reach))
    gradient = _pixel_gradient(probe, base, "margin")
    generator = torch.Generator(probe.x.device).manual_seed(probe.seed)
    signs = [torch.empty_like(gradient).normal_(generator=generator).sign() for _ in range(directions)]
    expected = torch.stack([(gradient * sign).flatten(1).sum(1) for sign in signs])
    errors = {}
    for step in steps:
        found = torch.stack([_difference(probe, base, sign, step * probe.full_range) for sign in signs])
        scale = torch.maximum(found.norm(), expected.norm())
        errors[step] = float((found - expected).norm() / scale) if scale > 0 else 0.0
    best = min(errors.values())
    numbers: dict[str, float | int | None] = {f"error_{step:g}": error for step, error in errors.items()}
    if not best <= tolerance:
        text = f"The gradient differs from finite differences by {best:.0%}; a step in the model has another gradient "
        text += "than its values say: use BPDA for it, or a black-box attack."
        return warned("finite-differences", text, numbers)
    return fine("finite-differences", f"The gradient agrees with finite differences up to {best:.1%}.", numbers)


def _difference(probe: Probe, base: Tensor, sign: Tensor, step: float) -> Tensor:
    shift = probe.space.from_pixels(step * sign)
    # the model's random numbers, if it draws some, are the same on both sides
    above, below = (margin(probe.logits(base + each), probe.y) for each in (shift, -shift))
    return (above - below) / (2 * step)


def _pixel_gradient(probe: Probe, points: Tensor, loss: str) -> Tensor:
    parts = []
    for x, y in zip(*(torch.split(each, probe.batch_size) for each in (points, probe.y)), strict=True):
        with probe.conditions(grad=True):
            x = x.detach().clone().requires_grad_()
            total = LOSSES[loss](full_precision(probe.network(x)), y).sum()
            parts.append(torch.autograd.grad(total, x)[0])
    return probe.space.pixel_gradient(full_precision(torch.cat(parts)))
