# SPDX-License-Identifier: Apache-2.0
"""The base class of everything that mixes the samples of a batch."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_robust.losses import MixedTarget
from lightning_robust.mixing.mixture import Mixture

__all__ = ["Mixer"]


class Mixer:
    """Mixes the samples of a batch; subclasses implement :meth:`mix`.

    A mixer looks at inputs only and says which rows it mixed with which shares, so one mixer serves hard labels, class
    probabilities and losses that need both labels. It draws from a CPU generator, on every device the same numbers.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import CrossEntropy
        >>> from lightning_robust.mixing import Mixup
        >>> images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
        >>> mixed, target = Mixup(alpha=1.0)(images, labels, generator=torch.Generator().manual_seed(0))
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
        >>> loss = CrossEntropy()(net(mixed), target)
    """

    #: Smoothing that belongs to the targets of this mixer.
    label_smoothing: float = 0.0
    #: Whether :meth:`mix` returns more rows than it got.
    adds_rows: ClassVar[bool] = False

    def mix(self, x: Tensor, generator: torch.Generator | None = None) -> Mixture:
        """Mix the rows of ``x``.

        Args:
            x: Floating-point inputs, ``[B, ...]``; they stay as they are.
            generator: A CPU generator; torch's global one when ``None``.

        Raises:
            TypeError: If ``x`` does not hold floating-point numbers.
            ValueError: If ``x`` has a shape that cannot be mixed this way, or the generator is on another device.
        """
        raise NotImplementedError

    def __call__(self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, MixedTarget]:
        """Mix inputs and labels.

        Args:
            x: Floating-point inputs, ``[B, ...]``.
            y: Class indices, ``[B]``.
            generator: A CPU generator; torch's global one when ``None``.

        Raises:
            ValueError: If this mixer smooths labels, which a pair of labels cannot hold.
        """
        if self.label_smoothing:
            raise ValueError(
                f"{type(self).__name__} smooths its labels (label_smoothing={self.label_smoothing:g}), which a pair of "
                "labels cannot express; take mixture = mixer.mix(x) and mixture.probabilities(y, num_classes, "
                "label_smoothing=...), or smooth in the criterion."
            )
        mixture = self.mix(x, generator)
        return mixture.x, mixture.target(y)


def check_inputs(who: str, x: Tensor, *, dims: int = 1) -> None:
    """Refuse inputs that cannot be mixed.

    Args:
        who: Name of the mixer.
        x: The inputs.
        dims: Number of dimensions that they have at least.

    Raises:
        TypeError: If ``x`` does not hold floating-point numbers.
        ValueError: If ``x`` has too few dimensions.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"{who} mixes floating-point inputs but got {x.dtype}; convert images first, for example "
            "x = x.float() / 255."
        )
    if x.ndim < dims:
        wanted = "images [B, C, H, W]" if dims == 4 else "a batch [B, ...]"
        raise ValueError(f"{who} mixes {wanted} but got shape {tuple(x.shape)}.")


def draw_partners(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random permutation of the rows of ``x``, on its device."""
    partner = torch.randperm(len(x), generator=generator)
    # from pinned memory, so that nobody waits for the device
    return partner.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else partner.to(x.device)


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for NumPy from a torch generator."""
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"Expected a CPU generator but got one on {generator.device}: shares are drawn on the CPU.")
    return int(torch.randint(2**32, (), generator=generator))


def draw_share(alpha: float, generator: torch.Generator | None) -> float:
    """A share from Beta(alpha, alpha)."""
    # torch.distributions draws from the global generator only
    return float(np.random.default_rng(draw_seed(generator)).beta(alpha, alpha))
