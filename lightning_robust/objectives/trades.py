# SPDX-License-Identifier: Apache-2.0
"""TRADES: accuracy on clean images, traded against how far an attack moves the prediction."""

from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.losses import kl_divergence
from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.losses import Criterion, cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared

__all__ = ["TRADES", "trades_loss"]


def trades_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    beta: float = 6.0,
    *,
    kl_logits: Tensor | None = None,
    criterion: Criterion | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Cross entropy on clean images plus ``beta`` times the divergence of the attacked prediction.

    .. math:: \frac1B \sum_i \mathrm{CE}(z_i, y_i) + \beta\, \frac1B \sum_i \mathrm{KL}(p_i \,\|\, q_i)

    with :math:`p` and :math:`q` the softmax of clean and attacked logits; gradients flow through both.

    Args:
        clean_logits: ``[B, C]`` of the clean images.
        adv_logits: ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        beta: weight of the divergence.
        kl_logits: clean logits for the divergence where they differ from those for the cross entropy, as after a second
            forward or detached.
        criterion: takes the place of the cross entropy.

    Returns:
        The loss, its cross-entropy part and its divergence part (before ``beta``).

    Example:
        >>> import torch
        >>> zeros = torch.zeros(1, 2)
        >>> trades_loss(zeros, zeros, torch.tensor([0]))
        (tensor(0.6931), tensor(0.6931), tensor(0.))
    """
    natural, divergences = _parts(clean_logits, adv_logits, target, kl_logits, criterion)
    robust = divergences.mean()
    return natural + beta * robust, natural, robust


def _parts(
    clean_logits: Tensor, adv_logits: Tensor, target: Tensor, kl_logits: Tensor | None, criterion: Criterion | None
) -> tuple[Tensor, Tensor]:
    """The loss on clean images, and the divergence of each sample."""
    natural = (cross_entropy if criterion is None else criterion)(full_precision(clean_logits), target)
    reference = full_precision(clean_logits if kl_logits is None else kl_logits).log_softmax(1)
    return natural, kl_divergence(full_precision(adv_logits), reference)


class TRADES(AttackedObjective):
    r"""Trades accuracy on clean images for robustness.

    .. math:: \mathrm{CE}(f(x), y) + \beta\, \mathrm{KL}\big(f(x) \,\|\, f(x')\big), \qquad
              x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{KL}\big(f(x) \,\|\, f(x')\big)

    The attack runs once per batch, by default in evaluation mode.

    Cost: with 10 attack steps 11 forwards and 10 input-backwards for the attack, then 2 forwards and backwards
    (3 forwards with ``forwards="published"``).

    Args:
        beta: weight of the divergence; 6 in the paper for CIFAR-10.
        attack: finds the attacked images; when ``None`` the paper's for CIFAR-10,
            ``PGD(eps=0.031, step_size=0.007, steps=10, loss="kl", random_start="normal")``.
        forwards: how the model is run for the loss, which matters for BatchNorm: ``"separate"``: clean, then attacked;
            ``"joint"``: both in one batch; ``"published"``: clean, attacked, clean again for the divergence, so
            running statistics move three times and dropout draws twice; ``"published-awp"``: attacked, clean for the
            divergence, clean again, as in the code of AWP.
        detach_clean: stop the gradient of the divergence at the clean prediction.
        criterion: takes the place of the cross entropy on clean images, for label smoothing say.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative ``beta`` or an unknown value of ``forwards``.

    References:
        Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, arXiv 1901.08573. Their code
        evaluates the clean prediction anew in every attack step, which gives the same numbers in evaluation mode.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = TRADES(attack=PGD(eps=0.1, steps=2, loss="kl"))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['natural', 'robust']
    """

    def __init__(
        self,
        *,
        beta: float = 6.0,
        attack: Attack | None = None,
        forwards: Literal["separate", "joint", "published", "published-awp"] = "separate",
        detach_clean: bool = False,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(
            PGD(eps=0.031, step_size=0.007, steps=10, loss="kl", random_start="normal") if attack is None else attack
        )
        check_non_negative("beta", beta)
        check_choice("forwards", forwards, ("separate", "joint", "published", "published-awp"))
        self.beta = beta
        self.forwards = forwards
        self.detach_clean = detach_clean
        self.criterion = criterion

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        clean, adv, kl_logits = self._logits(model, prepared)
        if self.detach_clean:
            kl_logits = kl_logits.detach()
        natural, divergences = _parts(clean, adv, prepared.y, kl_logits, self.criterion)
        robust = divergences.mean()
        sample_losses = None
        if self.criterion is None:
            sample_losses = cross_entropy(clean, prepared.y, reduction="none") + self.beta * divergences
        logs = {"natural": natural.detach(), "robust": robust.detach()}
        return ObjectiveOutput(natural + self.beta * robust, clean, logs, sample_losses)

    def _logits(self, model: Model, prepared: Prepared) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the clean and the attacked images, and of the clean ones for the divergence."""
        if self.forwards == "published-awp":
            assert prepared.x_adv is not None, "made by prepare"
            adv, kl_logits, clean = model(prepared.x_adv), model(prepared.x), model(prepared.x)
            return clean, adv, kl_logits
        clean, adv = self.clean_and_attacked(model, prepared, joint=self.forwards == "joint")
        return clean, adv, model(prepared.x) if self.forwards == "published" else clean

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * (3 if self.forwards.startswith("published") else 2)

    @override
    def extra_repr(self) -> str:
        return f"beta={self.beta}, attack={self.attack!r}, forwards={self.forwards!r}, detach_clean={self.detach_clean}"
