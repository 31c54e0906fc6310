# SPDX-License-Identifier: Apache-2.0
"""MMCE: a kernel calibration error of the batch, added to a criterion."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_positive
from lightning_robust.losses.batch_penalty import BatchPenalty
from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.precision import autocast_off, full_precision

__all__ = ["MMCE", "mmce", "weighted_mmce"]


def mmce(confidence: Tensor, correct: Tensor, *, kernel_width: float = 0.4, kept: Tensor | None = None) -> Tensor:
    r"""Squared maximum mean calibration error of a batch.

    .. math:: \frac{1}{N^2}\sum_{i,j} (c_i - r_i)(c_j - r_j)\,e^{-|r_i - r_j|/w}

    Cost: :math:`N^2` time and memory.

    Args:
        confidence: Largest probability :math:`r` of each sample, ``[N]``.
        correct: Whether the prediction is right, :math:`c`, ``[N]``.
        kernel_width: Width :math:`w` of the kernel.
        kept: Which samples count, ``[N]``; all when ``None``.

    Shape:
        A scalar, 0 or above; 0 where no sample counts.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import mmce
        >>> mmce(torch.tensor([0.5, 0.5]), torch.tensor([0, 0]))
        tensor(0.2500)
    """
    with autocast_off(confidence):
        r, c, kept = _inputs(confidence, correct, kept)
        gap = torch.where(kept, c - r, 0.0)
        return gap @ _kernel(r, kernel_width) @ gap / kept.sum().clamp(min=1).square()


def weighted_mmce(
    confidence: Tensor, correct: Tensor, *, kernel_width: float = 0.4, kept: Tensor | None = None
) -> Tensor:
    r"""Weighted MMCE of a batch: right and wrong predictions are compared as two groups.

    .. math:: \sqrt{\frac{a^\top K a}{m^2(m^2+\delta)} + \frac{b^\top K b}{n^2(n^2+\delta)}
              - \frac{2\,a^\top K b}{mn(mn+\delta)} + 10^{-10}}, \quad
              a_i = c_i(1 - r_i),\ b_i = (1 - c_i)\,r_i,\ K_{ij} = e^{-|r_i - r_j|/w}

    with :math:`m` right and :math:`n` wrong predictions and :math:`\delta = 10^{-5}`; 0 if there is none of one kind.

    Cost: :math:`N^2` time and memory.

    Args:
        confidence: Largest probability :math:`r` of each sample, ``[N]``.
        correct: Whether the prediction is right, :math:`c`, ``[N]``.
        kernel_width: Width :math:`w` of the kernel.
        kept: Which samples count, ``[N]``; all when ``None``.

    Shape:
        A scalar, 0 or above.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import weighted_mmce
        >>> weighted_mmce(torch.tensor([0.9, 0.9]), torch.tensor([1, 0]))
        tensor(0.8000)
    """
    with autocast_off(confidence):
        r, c, kept = _inputs(confidence, correct, kept)
        kernel = _kernel(r, kernel_width)
        right, wrong = c * kept, (1 - c) * kept
        count_right, count_wrong = right.sum(), wrong.sum()
        both = (count_right > 0) & (count_wrong > 0)
        m, n = count_right.clamp(min=1), count_wrong.clamp(min=1)
        a, b = right * (1 - r) / m, wrong * r / n
        kernel_a, kernel_b = kernel @ a, kernel @ b
        square = a @ kernel_a / (m * m + 1e-5) + b @ kernel_b / (n * n + 1e-5) - 2 * (b @ kernel_a) / (m * n + 1e-5)
        # With the 1e-5 the form is not quite positive; a negative root would be NaN.
        return torch.where(both, (square.clamp(min=0) + 1e-10).sqrt(), 0.0)


class MMCE(BatchPenalty):
    r"""A criterion plus a weight times the maximum mean calibration error of the batch.

    .. math:: L + \frac{\lambda}{N^2}\sum_{i,j} (c_i - r_i)(c_j - r_j)\,e^{-|r_i - r_j|/w}

    with the confidence :math:`r` and correctness :math:`c` of each prediction. ``weighted=True`` takes
    :func:`weighted_mmce` instead, for batches in which nearly all predictions are right. The penalty is a property
    of a batch: it has no value per sample, class weights do not enter it, and micro-batches of gradient accumulation
    each have their own.

    Cost: one more pass over the logits, and :math:`N^2` memory for the pairs of a batch (4 MB at 1024 samples); not for
    segmentation.

    Args:
        weight: Factor :math:`\lambda`; 2 is common on CIFAR.
        kernel_width: Width :math:`w` of the kernel.
        weighted: Whether to compare right and wrong predictions as two groups.
        base: The criterion :math:`L`; cross-entropy when ``None``.
        ignore_index: Hard label of the samples that do not count; a ``base`` that has one brings its own.
        gather: Whether the processes of a distributed run compute the penalty of their common batch, with gradients.
            All of them need the same number of samples in each training step (``drop_last=True``). By default each
            takes its own batch, whose error is larger the smaller the batch.

    Shape:
        ``logits`` ``[B, C]`` and class indices ``[B]`` give a scalar.

    Raises:
        ValueError: If ``weight`` is negative, ``kernel_width`` is not positive, ``base`` does not reduce to a scalar,
            or the target is soft.

    References:
        Kumar et al., ICML 2018, "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings". As
        in the code of focal_calibration, :func:`mmce` has no square root and :func:`weighted_mmce` divides its means
        by the squared group sizes once more; the original TensorFlow code takes the root of both.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import MMCE
        >>> MMCE(weight=2.0)(torch.zeros(2, 2), torch.tensor([1, 1]))
        tensor(1.1931)
    """

    name: ClassVar[str] = "mmce"

    def __init__(
        self,
        *,
        weight: float = 2.0,
        kernel_width: float = 0.4,
        weighted: bool = False,
        base: Criterion | None = None,
        ignore_index: int = -100,
        gather: bool = False,
    ) -> None:
        super().__init__(weight=weight, base=base, ignore_index=ignore_index, gather=gather)
        check_positive("kernel_width", kernel_width)
        self.kernel_width = kernel_width
        self.weighted = weighted

    @override
    def penalty(self, confidence: Tensor, correct: Tensor, kept: Tensor) -> Tensor:
        error = weighted_mmce if self.weighted else mmce
        return error(confidence, correct, kernel_width=self.kernel_width, kept=kept)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_width={self.kernel_width}, weighted={self.weighted}"


def _inputs(confidence: Tensor, correct: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    r = full_precision(confidence)
    return r, correct.to(r), torch.ones_like(r, dtype=torch.bool) if kept is None else kept


def _kernel(r: Tensor, width: float) -> Tensor:
    return (-(r.unsqueeze(1) - r).abs() / width).exp()
