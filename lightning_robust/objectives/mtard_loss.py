# SPDX-License-Identifier: Apache-2.0
"""The loss of MTARD at fixed weights and temperatures."""

from torch import Tensor

from lightning_robust.objectives.terms import KLReduction, kl_scale, teacher_divergences

__all__ = ["mtard_loss"]


def mtard_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    clean_teacher_logits: Tensor,
    robust_teacher_logits: Tensor,
    *,
    weights: tuple[float, float] = (0.5, 0.5),
    temperatures: tuple[float, float] = (1.0, 1.0),
    reduction: KLReduction = "elementmean",
    loss_factor: float = 1.0,
    eps_log: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Divergences of the student from a clean teacher on clean images and from a robust one on attacked images.

    .. math:: w_c\, \mathrm{KL}\big(q^c(x) \,\|\, p(x)\big) + w_r\, \mathrm{KL}\big(q^r(x') \,\|\, p(x')\big), \qquad
              q = \mathrm{softmax}(t / \tau), \quad p = \mathrm{softmax}(z)

    Args:
        clean_logits: ``[B, C]`` of the student on the clean images.
        adv_logits: ``[B, C]`` of the student on the attacked images.
        clean_teacher_logits: ``[B, C]`` of the clean teacher on the clean images; no gradient flows to them.
        robust_teacher_logits: ``[B, C]`` of the robust teacher on the attacked images, likewise.
        weights: :math:`w`, as all pairs (clean, robust).
        temperatures: :math:`\tau` of the teachers; the student has none.
        reduction: ``"elementmean"``: divided by the number of classes too, as published; or ``"batchmean"``.
        loss_factor: multiplies both divergences.
        eps_log: added inside the logarithm of the teachers, which shifts the value, never the gradient.

    Returns:
        The loss, and its two divergences before ``weights``.

    Example:
        >>> import torch
        >>> zeros, sure = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
        >>> mtard_loss(zeros, zeros, sure, sure, reduction="batchmean", eps_log=0.0)
        (tensor(0.3278), tensor(0.3278), tensor(0.3278))
    """
    pairs = ((clean_logits, clean_teacher_logits), (adv_logits, robust_teacher_logits))
    scale = loss_factor * kl_scale(reduction, clean_logits)
    clean, robust = (
        scale * teacher_divergences(*pair, teacher_temperature=temperature, eps_log=eps_log).mean()
        for pair, temperature in zip(pairs, temperatures, strict=True)
    )
    return weights[0] * clean + weights[1] * robust, clean, robust
