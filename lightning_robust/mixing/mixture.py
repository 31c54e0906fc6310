# SPDX-License-Identifier: Apache-2.0
"""What mixing the samples of a batch gives: inputs, and which two rows each of them was made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.losses import MixedTarget

__all__ = ["Mixture", "mix_rows"]


def mix_rows(x: Tensor, partner: Tensor, lam: Tensor | float) -> Tensor:
    r"""Mix every row with another one.

    .. math:: \tilde x_i = \lambda_i\,x_i + (1 - \lambda_i)\,x_{p(i)}

    Args:
        x: Rows, ``[B, ...]``.
        partner: Position of the other row, ``[B]``.
        lam: Share of the row itself; one number, or ``[B]``.

    Shape:
        That of ``x``, also in precision.

    Example:
        >>> import torch
        >>> mix_rows(torch.tensor([[0.0], [4.0]]), torch.tensor([1, 0]), 0.75)
        tensor([[1.],
                [3.]])
    """
    if isinstance(lam, Tensor):
        lam = lam.to(x.dtype)
        if lam.ndim:
            lam = lam.view(-1, *[1] * (x.ndim - 1))
    return x * lam + x[partner] * (1 - lam)


class Mixture(NamedTuple):
    r"""A batch of mixed inputs with the rows they come from: row i is made of rows ``first[i]`` and ``second[i]``.

    Labels are mixed from it in whatever form a loss wants them.

    Args:
        x: Mixed inputs, ``[M, ...]``; ``M`` is the size of the batch except where a mixer adds rows.
        first: Rows of the batch, ``[M]``.
        second: Rows of the batch, ``[M]``.
        lam: Share :math:`\lambda` of ``first``; one number for all (a scalar tensor) or one per row, ``[M]``.

    Example:
        >>> import torch
        >>> from lightning_robust.mixing import Mixture
        >>> rows = torch.tensor([0, 1])
        >>> mixture = Mixture(torch.zeros(2, 3), rows, rows.flip(0), torch.tensor(0.75))
        >>> mixture.probabilities(torch.tensor([0, 1]), 2)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """

    x: Tensor
    first: Tensor
    second: Tensor
    lam: Tensor

    @classmethod
    def unmixed(cls, x: Tensor) -> "Mixture":
        """The batch as it is.

        Args:
            x: Inputs, ``[B, ...]``.
        """
        rows = torch.arange(len(x), device=x.device)
        return cls(x, rows, rows, share(x, 1.0))

    def target(self, y: Tensor) -> MixedTarget:
        """Both labels of each row with their shares, for a criterion of this library.

        Args:
            y: Class indices of the batch, ``[B]``.
        """
        y = y.long()
        return MixedTarget(y[self.first], y[self.second], self.lam)

    def probabilities(self, y: Tensor, num_classes: int, *, label_smoothing: float = 0.0) -> Tensor:
        """Class probabilities of each row, ``[M, C]``, for any loss that takes them.

        Args:
            y: Class indices of the batch, ``[B]``, or class probabilities, ``[B, C]``.
            num_classes: Number of classes.
            label_smoothing: Part of each row that is spread evenly over all classes.
        """
        if y.is_floating_point():
            lam = self.lam.to(y.dtype).expand(len(self.first)).unsqueeze(1)
            found = lam * y[self.first] + (1 - lam) * y[self.second]
        else:
            found = self.target(y).probabilities(num_classes, self.lam.dtype)
        return found * (1 - label_smoothing) + label_smoothing / num_classes if label_smoothing else found

    def dominant(self, y: Tensor) -> Tensor:
        """The label with the larger share of each row, ``[M]``.

        Args:
            y: Class indices of the batch, ``[B]``.
        """
        return torch.where(self.lam >= 0.5, y[self.first], y[self.second])


def share(x: Tensor, lam: float) -> Tensor:
    """A share as a scalar tensor beside ``x``; filled in on the device, which nothing has to wait for."""
    return torch.full((), lam, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
