# SPDX-License-Identifier: Apache-2.0
"""The losses of introspective adversarial distillation."""

import torch
from torch import Tensor

from lightning_robust.losses import autocast_off, cross_entropy, full_precision
from lightning_robust.objectives.terms import divergences, label_probabilities, teacher_divergences

__all__ = ["iad_i_loss", "iad_ii_loss", "iad_trust"]

_Loss = tuple[Tensor, dict[str, Tensor]]


def iad_trust(teacher_logits: Tensor, target: Tensor, beta: float = 0.1) -> Tensor:
    r"""How far a teacher is trusted per sample: its probability of the label under attack, :math:`q_y^\beta`.

    Args:
        teacher_logits: ``[B, C]`` of the teacher on the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        beta: exponent.

    Shape:
        Returns ``[B]``, without gradient.

    Example:
        >>> iad_trust(torch.zeros(1, 4), torch.tensor([2]), beta=0.5)
        tensor([0.5000])
    """
    with autocast_off(teacher_logits):
        probabilities = full_precision(teacher_logits.detach()).softmax(1)
        return (label_probabilities(target, probabilities) * probabilities).sum(1) ** beta


def iad_i_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    trust: Tensor | None = None,
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
) -> _Loss:
    r"""IAD-I: imitate the teacher, and where it is not trusted oneself.

    .. math:: \alpha\, T^2\, \mathrm{KL}(t/T \,\|\, z'/T) + \alpha\, (1 - a)\, \mathrm{KL}(z \,\|\, z')
              + (1 - \alpha)\, \mathrm{CE}(z, y)

    averaged over samples. Gradients flow to both student logits, also through the clean ones in the divergence.

    Args:
        clean_logits: ``[B, C]``, :math:`z`, of the student on the clean images.
        adv_logits: ``[B, C]``, :math:`z'`, of the student on the attacked images.
        teacher_logits: ``[B, C]`` of the teacher, on the clean images as published.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        trust: :math:`a`, ``[B]``, see :func:`iad_trust`; full when ``None``, as in the first epochs.
        alpha: weight of the teacher.
        temperature: :math:`T`.

    Returns:
        The loss, and what each part adds to that of each sample, ``[B]``: ``"distilled"``, ``"introspective"`` and
        ``"natural"``.

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> iad_i_loss(zeros, zeros, torch.tensor([[2.0, 0.0]]), torch.tensor([0]))[0]
        tensor(0.3278)
    """
    distilled = temperature**2 * teacher_divergences(adv_logits, teacher_logits, temperature=temperature)
    natural = cross_entropy(clean_logits, target, reduction="none")
    parts = {
        "distilled": alpha * distilled,
        "introspective": alpha * _introspective(clean_logits, adv_logits, trust),
        "natural": (1 - alpha) * natural,
    }
    return torch.stack(list(parts.values())).sum(0).mean(), parts


def iad_ii_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    clean_teacher_logits: Tensor,
    target: Tensor,
    trust: Tensor | None = None,
    *,
    alpha: float = 0.5,
    clean_alpha: float = 0.25,
    temperature: float = 1.0,
) -> _Loss:
    r"""IAD-II: imitate two teachers under attack, and oneself where the robust one is not trusted.

    .. math:: \alpha\, T^2 \big[ a\, \mathrm{KL}(t/T \,\|\, z'/T) + (1 - a)\, \mathrm{KL}(z \,\|\, z') \big]
              + \alpha_c\, T^2\, \mathrm{KL}(t_c/T \,\|\, z'/T) + (1 - \alpha - \alpha_c)\, \mathrm{CE}(z', y)

    averaged over samples. Gradients flow to both student logits, also through the clean ones.

    Args:
        clean_logits: ``[B, C]``, :math:`z`, of the student on the clean images.
        adv_logits: ``[B, C]``, :math:`z'`, of the student on the attacked images.
        teacher_logits: ``[B, C]`` of the robust teacher on the attacked images.
        clean_teacher_logits: ``[B, C]`` of the naturally trained teacher on the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        trust: :math:`a`, ``[B]``, see :func:`iad_trust`; full when ``None``, as in the first epochs.
        alpha: weight of the robust teacher.
        clean_alpha: weight of the naturally trained one.
        temperature: :math:`T`.

    Returns:
        The loss, and what each part adds to that of each sample, ``[B]``: ``"distilled"``, ``"introspective"``,
        ``"distilled_clean"`` and ``"robust"``.

    Example:
        >>> zeros, teacher = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
        >>> iad_ii_loss(zeros, zeros, teacher, teacher, torch.tensor([0]))[0]
        tensor(0.4191)
    """
    distilled = teacher_divergences(adv_logits, teacher_logits, temperature=temperature)
    distilled_clean = teacher_divergences(adv_logits, clean_teacher_logits, temperature=temperature)
    squared = temperature**2
    parts = {
        "distilled": alpha * squared * (distilled if trust is None else trust * distilled),
        "introspective": alpha * squared * _introspective(clean_logits, adv_logits, trust),
        "distilled_clean": clean_alpha * squared * distilled_clean,
        "robust": (1 - alpha - clean_alpha) * cross_entropy(adv_logits, target, reduction="none"),
    }
    return torch.stack(list(parts.values())).sum(0).mean(), parts


def _introspective(clean: Tensor, adv: Tensor, trust: Tensor | None) -> Tensor:
    """``(1 - a) KL(z || z')`` per sample."""
    if trust is None:
        return torch.zeros(len(adv), dtype=full_precision(adv).dtype, device=adv.device)
    with autocast_off(adv):
        return (1 - trust) * divergences(full_precision(clean), full_precision(adv))
