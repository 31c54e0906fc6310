# SPDX-License-Identifier: Apache-2.0
"""Whether a point that an attack returned counts: inside the budget, a possible image, and misclassified."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.norms import NORMS, per_sample
from lightning_robust.evaluation.contract import InputContract, wide
from lightning_robust.evaluation.counted import CountedModel

__all__ = ["Budget", "Verdict", "judge"]


@dataclass(frozen=True)
class Budget:
    """How far a point may be from its image.

    Args:
        norm: Name of the norm.
        eps: Radius, in pixel units.
        contract: What the images are.
    """

    norm: str
    eps: float
    contract: InputContract

    def size(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Distance ``[B]`` of each point from its image, in float64.

        Args:
            x: Clean images.
            x_adv: Points.
        """
        return NORMS[self.norm].size(self.contract.space.to_pixels(wide(x_adv) - wide(x)))

    def rounding(self, x_adv: Tensor) -> Tensor:
        """What rounding to the type of the images can add to that distance, ``[B]``.

        A point is stored as ``round(x + delta)``: each entry is off by half a unit of its last digit. In float32 this
        is 3e-8 for a pixel near 1, more than a millionth of a small budget.

        Args:
            x_adv: Points.
        """
        unit = torch.finfo(x_adv.dtype).eps / 2
        return NORMS[self.norm].size(self.contract.space.to_pixels(wide(x_adv).abs() * unit))

    def holds(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Whether each point is within ``eps (1 + 1e-6)``, up to the rounding of its type; ``[B]``.

        Args:
            x: Clean images.
            x_adv: Points.
        """
        return self.size(x, x_adv) <= self.eps * (1 + 1e-6) + self.rounding(x_adv)

    def possible(self, x_adv: Tensor) -> Tensor:
        """Whether all pixels of each point are within the bounds, up to rounding; ``[B]``.

        Args:
            x_adv: Points.
        """
        low, high = self.contract.bounds
        # as attacks accept images: the user's normalisation was rounded to the images' type
        slack = max(1e-6, 8 * torch.finfo(x_adv.dtype).eps if self.contract.std is not None else 0.0) * (high - low)
        pixels = self.contract.pixels(wide(x_adv)).flatten(1)
        return (pixels.amin(1) >= low - slack) & (pixels.amax(1) <= high + slack)


@dataclass(frozen=True)
class Verdict:
    """What became of the points of one batch, each ``[B]``.

    Args:
        fooled: Valid and misclassified.
        misclassified: Misclassified, valid or not.
        over_budget: Farther from the image than allowed.
        out_of_bounds: With impossible pixels.
        not_finite: With NaN or infinite pixels.
        size: Distance from the image, in pixel units; 0 where it is not finite.
    """

    fooled: Tensor
    misclassified: Tensor
    over_budget: Tensor
    out_of_bounds: Tensor
    not_finite: Tensor
    size: Tensor


def judge(model: CountedModel, x: Tensor, x_adv: Tensor, y: Tensor, budget: Budget) -> Verdict:
    """Look at what an attack returned the way it will be reported.

    Cost: one forward.

    Args:
        model: The model.
        x: Clean images.
        x_adv: What the attack returned.
        y: Classes ``[B]``.
        budget: What the attack was allowed.

    Raises:
        ValueError: The points have another shape or type than the images, or the logits are not finite.
    """
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        raise ValueError(
            f"Expected attacked images like the clean ones, {list(x.shape)} in {x.dtype}, but got "
            f"{list(x_adv.shape)} in {x_adv.dtype}."
        )
    finite = x_adv.flatten(1).isfinite().all(1)
    # NaN pixels would give NaN logits, which are an error of the model; these are one of the attack
    safe = torch.where(per_sample(finite, x), x_adv, x)
    misclassified = model.plain(safe).argmax(1) != y
    within, possible = budget.holds(x, safe), budget.possible(safe)
    return Verdict(
        fooled=misclassified & finite & within & possible,
        misclassified=misclassified & finite,
        over_budget=~within,
        out_of_bounds=~possible,
        not_finite=~finite,
        size=budget.size(x, safe),
    )
