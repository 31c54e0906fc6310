# SPDX-License-Identifier: Apache-2.0
"""Mixup, and RegMixup, which keeps the clean batch beside the mixed one."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.mixing.mixer import Mixer, check_inputs, draw_partners, draw_share
from lightning_robust.mixing.mixture import Mixture, mix_rows, share

__all__ = ["Mixup", "RegMixup"]


class Mixup(Mixer):
    r"""Mixup: trains on convex combinations of two samples and of their labels.

    .. math:: \tilde x_i = \lambda\,x_i + (1-\lambda)\,x_{p(i)}, \qquad
              \tilde t_i = \lambda\,e_{y_i} + (1-\lambda)\,e_{y_{p(i)}}, \qquad
              \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    One share per batch and a random permutation ``p``. For the cross-entropy the mixed target gives the same loss as
    the mean of the losses of both labels.

    Cost: one pass over the inputs.

    Args:
        alpha: Parameter of the Beta distribution; 1.0 on CIFAR, 0.1 to 0.4 on ImageNet.

    Shape:
        Any ``[B, ...]`` of floating-point numbers.

    Raises:
        ValueError: If ``alpha`` is out of range.
        TypeError: When mixing integers.

    References:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, arXiv:1710.09412. A batch of one sample stays as it is.

    Example:
        >>> import torch
        >>> from lightning_robust.mixing import Mixup
        >>> mixed, target = Mixup(alpha=1.0)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
        >>> target.probabilities(3).sum(1)
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, *, alpha: float = 1.0) -> None:
        check_positive("alpha", alpha)
        self.alpha = alpha

    @override
    def mix(self, x: Tensor, generator: torch.Generator | None = None) -> Mixture:
        check_inputs(type(self).__name__, x)
        lam = draw_share(self.alpha, generator)
        partner = draw_partners(x, generator)
        return Mixture(mix_rows(x, partner, lam), torch.arange(len(x), device=x.device), partner, share(x, lam))


class RegMixup(Mixup):
    r"""RegMixup: mixup as a regulariser, the loss of the clean batch plus that of a mixed one.

    .. math:: \tfrac12\big(L(x, y) + L(\tilde x, \tilde t)\big), \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    The batch is doubled, clean rows first, and the loss is one mean over all of its rows; BatchNorm sees them together.
    With a large ``alpha`` the shares are near one half.

    Cost: twice the forward and backward pass, and twice the memory of activations.

    Args:
        alpha: Parameter of the Beta distribution; 20 on CIFAR-10, 10 on CIFAR-100 and ImageNet.

    Shape:
        ``[B, ...]`` becomes ``[2B, ...]``.

    Raises:
        ValueError: If ``alpha`` is out of range.
        TypeError: When mixing integers.

    References:
        Pinto et al., RegMixup: Mixup as a Regularizer Can Surprisingly Improve Accuracy and Out-of-Distribution
        Robustness, arXiv:2206.14502, with its code's mean over both halves; the paper adds the two losses, which is
        twice that.

    Example:
        >>> import torch
        >>> from lightning_robust.mixing import RegMixup
        >>> mixed, target = RegMixup(alpha=20.0)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
        >>> mixed.shape, target.lam[:4]
        (torch.Size([8, 3, 8, 8]), tensor([1., 1., 1., 1.]))
    """

    adds_rows: ClassVar[bool] = True

    def __init__(self, *, alpha: float = 20.0) -> None:
        super().__init__(alpha=alpha)

    @override
    def mix(self, x: Tensor, generator: torch.Generator | None = None) -> Mixture:
        mixed = super().mix(x, generator)
        shares = torch.cat([torch.ones_like(mixed.lam).expand(len(x)), mixed.lam.expand(len(x))])
        rows = mixed.first
        return Mixture(torch.cat([x, mixed.x]), rows.repeat(2), torch.cat([rows, mixed.second]), shares)
