# SPDX-License-Identifier: Apache-2.0
"""timm's mixture of mixup and CutMix, with its random numbers in one place."""

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_choice, check_in_range, check_non_negative
from lightning_robust.guards import rng_preserved
from lightning_robust.mixing.mixer import Mixer, check_inputs, draw_seed
from lightning_robust.mixing.mixture import Mixture, share

if TYPE_CHECKING:
    from timm.data.mixup import Mixup as Reference

__all__ = ["TimmMixup"]


class TimmMixup(Mixer):
    """timm's ``Mixup``: mixup, CutMix or a random choice of both, as in the recipes of timm, DeiT and torchvision.

    Each sample is mixed with the one at the mirrored place of the batch. Everything is computed by timm; this class
    gives it a seed of its own, so that runs repeat, processes draw differently and NumPy's global generator, from which
    timm draws, stands afterwards where it stood before. Two things differ from timm: ``label_smoothing`` is 0 unless it
    is asked for, and the last sample of an odd batch stays as it is instead of an error.

    Cost: one pass over the inputs and a copy of them; modes "elem" and "pair" go through the samples one by one.

    Args:
        mixup_alpha: Parameter of mixup's Beta distribution; 0 for no mixup.
        cutmix_alpha: Parameter of CutMix's Beta distribution; 0 for no CutMix.
        cutmix_minmax: Smallest and largest side of the box relative to the image, in place of ``cutmix_alpha``.
        prob: Probability of mixing, per batch or sample.
        switch_prob: Probability of CutMix where both are on.
        mode: What is drawn once: "batch", "pair" (of samples) or "elem" (a sample).
        correct_lam: Correct the share where the box sticks out of the image.
        label_smoothing: Part of the target that is spread over all classes; timm's own default is 0.1.

    Shape:
        Images ``[B, C, H, W]``.

    Raises:
        ValueError: If an argument is out of range or nothing is on; when mixing what is no batch of images.
        TypeError: When mixing integers.

    References:
        ``timm.data.Mixup``; Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899.

    Example:
        >>> import torch
        >>> from lightning_robust.mixing import TimmMixup
        >>> mixer = TimmMixup(mixup_alpha=0.8, cutmix_alpha=1.0)  # DeiT
        >>> mixed, target = mixer(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
        >>> target.second
        tensor([1, 2, 1, 0])
    """

    def __init__(
        self,
        *,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: list[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Literal["batch", "pair", "elem"] = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        check_non_negative("mixup_alpha", mixup_alpha)
        check_non_negative("cutmix_alpha", cutmix_alpha)
        check_in_range("prob", prob, 0.0, 1.0)
        check_in_range("switch_prob", switch_prob, 0.0, 1.0)
        check_choice("mode", mode, ("batch", "pair", "elem"))
        check_in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        if cutmix_minmax is not None:
            _check_minmax(cutmix_minmax)
        elif mixup_alpha == cutmix_alpha == 0:
            raise ValueError("Expected `mixup_alpha` or `cutmix_alpha` to be > 0, or `cutmix_minmax` to be given.")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.correct_lam = correct_lam
        self.label_smoothing = label_smoothing

    @override
    def mix(self, x: Tensor, generator: torch.Generator | None = None) -> Mixture:
        return self.mix_seeded(x, draw_seed(generator))

    def mix_seeded(self, x: Tensor, seed: int) -> Mixture:
        """Mix as timm does after ``numpy.random.seed(seed)``.

        Args:
            x: Images, ``[B, C, H, W]``.
            seed: Below 2 to the power of 32.
        """
        check_inputs(type(self).__name__, x, dims=4)
        self._refuse_empty_boxes(x)
        even = len(x) - len(x) % 2
        if not even:
            return Mixture.unmixed(x)
        rows = torch.arange(len(x), device=x.device)
        mirrored = torch.cat([rows[:even].flip(0), rows[even:]])
        # Partners are in different halves, so with the half as the label, timm's target shows the share of each row.
        half = (rows[:even] >= even // 2).long()
        with rng_preserved():
            np.random.seed(seed)
            mixed, target = self._reference()(x[:even].clone(), half)
        lam = target.gather(1, half.unsqueeze(1)).squeeze(1).to(share(x, 1.0).dtype)
        if even < len(x):
            return Mixture(torch.cat([mixed, x[even:]]), rows, mirrored, torch.cat([lam, torch.ones_like(lam[:1])]))
        return Mixture(mixed, rows, mirrored, lam[0] if self.mode == "batch" else lam)

    def _reference(self) -> "Reference":
        from timm.data.mixup import Mixup as Reference  # takes a second, which only its users should wait for

        return Reference(  # type: ignore[no-untyped-call]
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            cutmix_minmax=self.cutmix_minmax,
            prob=self.prob,
            switch_prob=self.switch_prob,
            mode=self.mode,
            correct_lam=self.correct_lam,
            label_smoothing=0.0,
            num_classes=2,
        )

    def _refuse_empty_boxes(self, x: Tensor) -> None:
        low, high = self.cutmix_minmax or (0.0, 1.0)
        if any(int(size * low) >= int(size * high) for size in x.shape[-2:]):
            raise ValueError(
                f"`cutmix_minmax` = {self.cutmix_minmax} leaves no size of a box in images of {tuple(x.shape[-2:])} "
                "pixels; widen it."
            )


def _check_minmax(minmax: list[float]) -> None:
    if len(minmax) != 2 or not 0 <= minmax[0] < minmax[1] <= 1:
        raise ValueError(f"Expected `cutmix_minmax` to be two numbers 0 <= min < max <= 1 but got {minmax!r}.")
