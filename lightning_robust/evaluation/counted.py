# SPDX-License-Identifier: Apache-2.0
"""A model that counts how many samples went through it, forwards and backwards."""

import torch
from torch import Tensor

from lightning_robust.attacks.conditions import Model, unwrap
from lightning_robust.losses import full_precision

__all__ = ["CountedModel"]


class CountedModel:
    """Stands between an attack and the model, and counts.

    A backward is counted where it leaves the logits. Whether a logit was NaN or infinite is remembered without waiting
    for the device.

    Args:
        model: A module, or a callable ``x -> logits`` that may name its module in the attribute ``module``.

    Example:
        >>> counted = CountedModel(torch.nn.Linear(3, 2))
        >>> x = torch.rand(4, 3, requires_grad=True)
        >>> counted(x).sum().backward()
        >>> counted.forwards, counted.backwards
        (4, 4)
    """

    def __init__(self, model: Model) -> None:
        self._network, self.module = unwrap(model)
        self._finite: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Start counting at zero."""
        self.forwards = 0
        self.backwards = 0
        self._finite = None

    @property
    def finite(self) -> bool:
        """Whether all logits since the last reset were finite; waits for the device."""
        return self._finite is None or bool(self._finite)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        logits = self._network(x)
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        finite = logits.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        return logits

    def plain(self, x: Tensor) -> Tensor:
        """Logits as they are reported: without autocast, without a graph, in at least float32; counted as well.

        Args:
            x: Images.

        Raises:
            ValueError: The model returned something else than ``[B, C]``, or NaN or infinity.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits = self(x)
        if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            raise ValueError(
                f"Expected logits [B, C] of two classes or more from the model but got {list(logits.shape)} for "
                f"{len(x)} images."
            )
        if not logits.isfinite().all():
            raise ValueError(
                "The evaluated model returned NaN or infinite logits, which would pass for robustness; look for "
                "diverged weights or overflow in half precision."
            )
        return full_precision(logits)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
