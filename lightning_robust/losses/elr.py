# SPDX-License-Identifier: Apache-2.0
"""Early-learning regularisation: labels that contradict what the model said early on lose their pull."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_in_range, check_integer, check_non_negative
from lightning_robust.losses.criterion import SampleCriterion
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.table import SampleTable
from lightning_robust.losses.target import MixedTarget, Reduction, Target

__all__ = ["ELR", "elr_loss", "elr_ramp", "elr_update"]

_LOWEST = 1e-4  # probabilities are kept in [1e-4, 1 - 1e-4], so that the logarithm stays finite


def elr_update(remembered: Tensor, logits: Tensor, *, beta: float = 0.7, clamp: bool = True) -> Tensor:
    r"""Move what is remembered of some samples towards what the model says now: :math:`\beta T + (1 - \beta)\,\hat p`.

    Args:
        remembered: Running mean of the probabilities of each sample, ``[B, C]``; zeros at first.
        logits: ``[B, C]``.
        beta: Share that is kept.
        clamp: Keep probabilities in [1e-4, 1 - 1e-4] before they are brought to a sum of one; ELR+ does not.

    Shape:
        ``[B, C]``, detached.

    Example:
        >>> elr_update(torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]), beta=0.9)
        tensor([[0.0500, 0.0500]])
    """
    with autocast_off(logits), torch.no_grad():
        return _moved(remembered, full_precision(logits).softmax(1), beta, clamp)


def elr_loss(
    logits: Tensor,
    target: Tensor | MixedTarget | Target,
    remembered: Tensor,
    *,
    lam: float = 3.0,
    refine_target: bool = False,
) -> Tensor:
    r"""Cross-entropy of each sample plus :math:`\lambda \log(1 - \langle T, \hat p \rangle)`.

    This is the loss of ELR+ too: with mixed images and targets, the mixture of what is remembered of both, and a
    ``lam`` that :func:`elr_ramp` multiplies.

    Args:
        logits: ``[B, C]``.
        target: Class indices, class probabilities or a mixture.
        remembered: Running mean of the probabilities of each sample, ``[B, C]``, from :func:`elr_update`.
        lam: Weight of the second term.
        refine_target: Multiply the target with what is remembered and bring it back to a sum of one, as ELR+ does on
            CIFAR-100.

    Shape:
        ``[B]``, not reduced; may be negative.

    References:
        Liu et al., arXiv:2007.00151.

    Example:
        >>> elr_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[0.5, 0.5]]), lam=1.0)
        tensor([0.])
    """
    with autocast_off(logits):
        log_p = full_precision(logits).log_softmax(1)
        seen = Target.of(log_p, target)
        remembered = remembered.to(log_p)
        if refine_target:
            refined = seen.probabilities(log_p) * remembered
            losses = -(seen.weigh_classes(refined) * log_p).sum(1) / refined.sum(1)
        else:
            losses = -seen.expected(log_p)
        return losses + lam * seen.weighted(_disagreement(log_p.exp(), remembered))


def elr_ramp(step: int, steps: int) -> float:
    r"""Factor of ELR+'s second term, which grows from 0.007 to 1: :math:`e^{-5 (1 - s / S)^2}`.

    Args:
        step: Number of the optimizer step.
        steps: Step from which on the factor is 1; 0 for no ramp.

    Example:
        >>> round(elr_ramp(0, 100), 4), elr_ramp(100, 100), elr_ramp(0, 0)
        (0.0067, 1.0, 1.0)
    """
    check_integer("step", step, 0)
    check_integer("steps", steps, 0)
    return 1.0 if steps == 0 else math.exp(-5 * (1 - min(step, steps) / steps) ** 2)


def _moved(remembered: Tensor, p: Tensor, beta: float, clamp: bool) -> Tensor:
    kept = _clamped(p.detach()) if clamp else p.detach()
    return beta * remembered.to(kept) + (1 - beta) * (kept / kept.sum(1, keepdim=True))


def _clamped(p: Tensor) -> Tensor:
    return p.clamp(_LOWEST, 1 - _LOWEST)


def _disagreement(p: Tensor, remembered: Tensor) -> Tensor:
    return (1 - (remembered * _clamped(p)).sum(1)).log()


class ELR(SampleCriterion):
    r"""Cross-entropy that also asks the model to stay with what it predicted for a sample so far.

    .. math:: \mathrm{CE}(z_i, y_i) + \lambda \log\big(1 - \langle T_i, \hat p_i \rangle\big), \qquad
              T_i \leftarrow \beta\, T_i + (1 - \beta)\, \hat p_i

    Networks learn the clean labels first and memorise the wrong ones later. :math:`T_i` remembers the early phase; the
    second term lifts the gradient of clean samples and cancels that of the others. :math:`T_i` starts at zero, is
    updated before the loss of the same step and has no gradient; :math:`\hat p` is the softmax, kept in
    [1e-4, 1 - 1e-4]. Samples with :math:`\arg\max T_i \ne y_i` are the ones whose label the model doubts:
    ``criterion.memory.rows``. The loss may be negative.

    Cost: one number per training sample and class (2 MB for CIFAR-10, 5.1 GB for ImageNet) and about two further passes
    over the logits.

    Args:
        beta: Share of the memory that an update keeps.
        lam: Weight of the second term. The paper's pairs of ``beta`` and ``lam``: 0.7 and 3 for CIFAR-10 with symmetric
            noise, 0.9 and 1 with asymmetric noise, 0.9 and 7 for CIFAR-100.
        num_samples: Number of training samples; the callback ``Criterion`` tells it.
        weight: Weight of each class; of both terms.
        ignore_index: Hard label of the samples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per sample).

    Shape:
        ``logits`` ``[B, C]``; ``target`` ``[B]``, the shape of ``logits``, or a mixture; ``index``, positions in the
        training set, ``[B]``.

    Raises:
        ValueError: If an argument is out of range, or for another number of samples than before.
        RuntimeError: If the number of samples is not known.

    References:
        Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, arXiv:2007.00151. The default
        0.3 of ``beta`` in their class is used by none of their settings. ELR+, with two networks, averaged weights and
        mixup, is a training loop; its parts are :func:`elr_update`, :func:`elr_loss` and :func:`elr_ramp`.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import ELR
        >>> criterion = ELR(num_samples=100)
        >>> logits, labels, index = torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.tensor([42])
        >>> [round(float(criterion(logits, labels, index=index)), 4) for _ in range(2)]
        [-0.6846, -1.4201]
    """

    needs = ("index",)

    def __init__(
        self,
        *,
        beta: float = 0.7,
        lam: float = 3.0,
        num_samples: int | None = None,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_in_range("beta", beta, 0, 1)
        check_non_negative("lam", lam)
        self.beta = beta
        self.lam = lam
        self.memory = SampleTable(num_samples=num_samples)

    @override
    def sample_losses(self, logits: Tensor, target: Target, **context: Tensor) -> Tensor:
        _check_flat(logits, type(self).__name__)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        remembered = _moved(self.memory.look_up(context["index"], like=p), p, self.beta, clamp=True)
        if self.recording:
            self.memory.record(context["index"], remembered)
        return self.lam * target.weighted(_disagreement(p, remembered)) - target.expected(log_p)

    @override
    def samples_known(self, num_samples: int) -> None:
        self.memory.resize(num_samples)

    @override
    def extra_repr(self) -> str:
        return f"beta={self.beta}, lam={self.lam}, reduction={self.reduction!r}"


def _check_flat(logits: Tensor, who: str) -> None:
    if logits.ndim != 2:
        raise ValueError(f"{who} remembers one row per sample: expected `logits` [B, C] but got {tuple(logits.shape)}.")
