# SPDX-License-Identifier: Apache-2.0
"""CutMix: a box of one image pasted into another."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.mixing.mixer import Mixer, check_inputs, draw_partners, draw_share
from lightning_robust.mixing.mixture import Mixture, share

__all__ = ["CutMix", "cut_box"]


def cut_box(height: int, width: int, lam: float, center: tuple[int, int]) -> tuple[tuple[int, int, int, int], float]:
    r"""The box that leaves about ``lam`` of an image, and the share that it leaves exactly.

    Its sides are :math:`\sqrt{1-\lambda}` of the image's, rounded down to an even number of pixels; what sticks out of
    the image is cut off.

    Args:
        height: Of the image.
        width: Of the image.
        lam: Share of the image outside the box, as drawn.
        center: Row and column of the middle of the box.

    Returns:
        Top, left, bottom and right of the box (the last two exclusive), and the share of the image outside it.

    Example:
        >>> cut_box(32, 32, 0.75, (30, 8))
        ((22, 0, 32, 16), 0.84375)
    """
    ratio = math.sqrt(1 - lam)
    half_height, half_width = int(height * ratio) // 2, int(width * ratio) // 2
    top, bottom = max(center[0] - half_height, 0), min(center[0] + half_height, height)
    left, right = max(center[1] - half_width, 0), min(center[1] + half_width, width)
    return (top, left, bottom, right), 1 - (bottom - top) * (right - left) / (height * width)


class CutMix(Mixer):
    r"""CutMix: pastes a box of one image into another and mixes the labels by area.

    .. math:: \tilde x_i = M \odot x_i + (1-M) \odot x_{p(i)}, \qquad
              \tilde t_i = \lambda\,e_{y_i} + (1-\lambda)\,e_{y_{p(i)}}

    One box and one share per batch and a random permutation ``p``. The share is drawn from
    :math:`\mathrm{Beta}(\alpha, \alpha)` and then corrected to the area that the box leaves.

    Cost: a copy of the inputs.

    Args:
        alpha: Parameter of the Beta distribution; 1.0 makes shares uniform, as published. The published code mixes
            every second batch on CIFAR (``Mixing(CutMix(), probability=0.5)``) and every batch on ImageNet.

    Shape:
        Images ``[B, C, H, W]``.

    Raises:
        ValueError: If ``alpha`` is out of range; when mixing what is no batch of images.
        TypeError: When mixing integers.

    References:
        Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features,
        arXiv:1905.04899; the same box as in its code and in torchvision. A batch of one image stays as it is.

    Example:
        >>> import torch
        >>> from lightning_robust.mixing import CutMix
        >>> mixed, target = CutMix(alpha=1.0)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
        >>> mixed.shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, *, alpha: float = 1.0) -> None:
        check_positive("alpha", alpha)
        self.alpha = alpha

    @override
    def mix(self, x: Tensor, generator: torch.Generator | None = None) -> Mixture:
        check_inputs(type(self).__name__, x, dims=4)
        height, width = x.shape[-2:]
        drawn = draw_share(self.alpha, generator)
        partner = draw_partners(x, generator)
        row, column = (int(torch.randint(size, (), generator=generator)) for size in (height, width))
        (top, left, bottom, right), lam = cut_box(height, width, drawn, (row, column))
        mixed = x.clone()
        mixed[..., top:bottom, left:right] = x[..., top:bottom, left:right][partner]
        return Mixture(mixed, torch.arange(len(x), device=x.device), partner, share(x, lam))
