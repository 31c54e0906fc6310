# SPDX-License-Identifier: Apache-2.0
"""Looking over an attack's shoulder: which samples did some iterate of it fool?"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Watcher"]

_ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


class Watcher:
    """A model to attack in place of another, noting which samples an allowed iterate has fooled.

    Iterates are attributed to the sample whose clean image they are near to, so that attacks may leave samples out;
    those outside the budget or the pixels, and those near several clean images, are not counted.

    Args:
        network: maps images to logits.
        module: the module whose modes the attack switches.
        clean: clean images as pixel values ``[B, ...]``.
        y: classes ``[B]``.
        pixels: turns images into pixel values.
        norm: name of the norm of the budget.
        eps: radius of the budget in pixel units.
        bounds: smallest and largest possible pixel.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> net, x, y = torch.nn.Linear(4, 3), torch.rand(8, 4), torch.arange(8) % 3
        >>> watcher = Watcher(net, net, x, y, pixels=lambda x: x, norm="linf", eps=0.1)
        >>> x_adv = PGD(eps=0.1, steps=3)(watcher, x, y)
        >>> watcher.fooled.shape
        torch.Size([8])
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        module: nn.Module | None,
        clean: Tensor,
        y: Tensor,
        *,
        pixels: Callable[[Tensor], Tensor],
        norm: str,
        eps: float,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.module = module
        self.fooled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        self._network, self._y, self._pixels = network, y, pixels
        self._clean = clean.flatten(1)
        self._order, self._eps, self._bounds = _ORDER[norm], eps, bounds

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of the model.

        Args:
            x: iterates of the attack.
        """
        logits = self._network(x)
        with torch.no_grad():
            self._note(self._pixels(x.detach()).flatten(1), logits.detach().argmax(1))
        return logits

    def _note(self, pixels: Tensor, predicted: Tensor) -> None:
        low, high = self._bounds
        # the quick way through a matrix product is not exact enough for small budgets
        distances = torch.cdist(pixels, self._clean, p=self._order, compute_mode="donot_use_mm_for_euclid_dist")
        near = distances <= self._eps * (1 + 1e-6) + 1e-6
        possible = (pixels >= low - 1e-6).all(1) & (pixels <= high + 1e-6).all(1)
        own = near.float().argmax(1)
        counted = possible & (near.sum(1) == 1) & (predicted != self._y[own])
        self.fooled[own[counted]] = True
