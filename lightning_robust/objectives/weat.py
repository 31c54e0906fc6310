# SPDX-License-Identifier: Apache-2.0
"""WEAT: adversarial training whose samples weigh by the energy of their clean prediction."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_non_negative
from lightning_robust.losses import cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared
from lightning_robust.objectives.terms import divergences

__all__ = ["WEAT", "energy_weights", "weat_loss"]

Form = Literal["nat", "adv"]


def energy_weights(logits: Tensor) -> Tensor:
    r"""Weights of samples by their energy, ``1 / log(1 + exp |E|)`` with ``E = -logsumexp(logits)``.

    Largest, 1.44, at energy 0, and about ``1 / |E|`` for confident predictions. Constants: no gradient. Adding the
    same number to all logits of a sample changes its weight though not its prediction.

    Args:
        logits: ``[B, C]`` of the clean images.

    Shape:
        Returns ``[B]``.

    Example:
        >>> import torch
        >>> energy_weights(torch.tensor([[10.0, 0.0], [500.0, 0.0]]))
        tensor([0.1000, 0.0020])
    """
    energy = full_precision(logits.detach()).logsumexp(1)
    return 1 / F.softplus(energy.abs())


def weat_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    target: Tensor,
    beta: float = 7.0,
    *,
    form: Form = "adv",
    normalize: bool = False,
    prob_eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""TRADES with a weight per sample, with the cross entropy on attacked or on clean images.

    .. math:: \frac1B \sum_i w_i \big[ \mathrm{CE}(z'_i, y_i) + \beta\, \mathrm{KL}(p_i \,\|\, q_i) \big]

    with :math:`w` of :func:`energy_weights`, :math:`p` and :math:`q` the softmax of clean and attacked logits, and
    :math:`z'` the attacked logits, or the clean ones with ``form="nat"``. Gradients flow through both predictions.

    Args:
        clean_logits: ``[B, C]`` of the clean images.
        adv_logits: ``[B, C]`` of the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        beta: weight of the divergence.
        form: ``"adv"``: cross entropy on attacked images; ``"nat"``: on clean ones.
        normalize: divide the weights by their mean over the batch.
        prob_eps: added to :math:`q` inside the logarithm.

    Returns:
        The loss, its cross-entropy part and its divergence part (before ``beta``).

    Raises:
        ValueError: an unknown ``form``.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[8.0, 0.0]])
        >>> weat_loss(logits, logits, torch.tensor([1]), normalize=True, prob_eps=0.0)
        (tensor(8.0003), tensor(8.0003), tensor(0.))
    """
    check_choice("form", form, ("nat", "adv"))
    supervised, robust = (
        losses.mean() for losses in _samples(clean_logits, adv_logits, target, form, normalize, prob_eps)
    )
    return supervised + beta * robust, supervised, robust


def _samples(
    clean_logits: Tensor, adv_logits: Tensor, target: Tensor, form: Form, normalize: bool, prob_eps: float
) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy and weighted divergence of each sample."""
    clean, adv = full_precision(clean_logits), full_precision(adv_logits)
    weights = energy_weights(clean)
    if normalize:
        weights = weights / weights.mean()
    supervised = cross_entropy(adv if form == "adv" else clean, target, reduction="none")
    return weights * supervised, weights * divergences(clean, adv, prob_eps)


class WEAT(AttackedObjective):
    r"""Weighted-energy adversarial training: the less energy a clean prediction has, the more its sample counts.

    .. math:: w(x)\,\Big[ \mathrm{CE}(f(x'), y) + \beta\, \mathrm{KL}\big(f(x) \,\|\, f(x')\big) \Big], \qquad
              w(x) = \frac{1}{\log\big(1 + e^{|E(x)|}\big)}, \quad E(x) = -\log \sum_k e^{f(x)_k}

    Energies lie around 5 to 15, so weights around 0.07 to 0.2: the step shrinks as if the learning rate were that much
    smaller, unless ``normalize`` is set. The attack runs once per batch, by default in evaluation mode.

    Cost: with 10 attack steps 11 forwards and 10 input-backwards for the attack, then 2 forwards and backwards.

    Args:
        form: ``"adv"``: cross entropy on attacked images, the paper's WEAT-adv; ``"nat"``: on clean ones, WEAT-nat.
        beta: weight of the divergence; when ``None`` the paper's, 7 for ``"adv"`` and 6 for ``"nat"``.
        attack: finds the attacked images; when ``None`` the paper's for CIFAR-10,
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl", random_start="normal")``.
        forwards: ``"separate"``: clean, then attacked; ``"joint"``: both in one batch, which matters for BatchNorm.
        normalize: divide the weights by their mean over the batch (that of the process).
        prob_eps: added to the attacked probabilities inside the logarithm, as the authors do; 0 for the exact
            divergence.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative ``beta`` or ``prob_eps``, or an unknown value of ``form`` or ``forwards``.

    References:
        Mirza et al., Shedding More Light on Robust Classifiers under the Lens of Energy-based Models, arXiv 2407.06315.
        Their ``exp |E|`` overflows for energies above 88 in float32 and the weight becomes 0; the weights here do not.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = WEAT(attack=PGD(eps=0.1, steps=2, loss="kl"))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['robust', 'supervised']
    """

    def __init__(
        self,
        *,
        form: Form = "adv",
        beta: float | None = None,
        attack: Attack | None = None,
        forwards: Literal["separate", "joint"] = "separate",
        normalize: bool = False,
        prob_eps: float = 1e-12,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl", random_start="normal")
            if attack is None
            else attack
        )
        check_choice("form", form, ("nat", "adv"))
        check_choice("forwards", forwards, ("separate", "joint"))
        if beta is None:
            beta = 7.0 if form == "adv" else 6.0
        check_non_negative("beta", beta)
        check_non_negative("prob_eps", prob_eps)
        self.form: Form = form
        self.beta = beta
        self.forwards = forwards
        self.normalize = normalize
        self.prob_eps = prob_eps

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        clean, adv = self.clean_and_attacked(model, prepared, joint=self.forwards == "joint")
        supervised, robust = _samples(clean, adv, prepared.y, self.form, self.normalize, self.prob_eps)
        losses = supervised + self.beta * robust
        logs = {"supervised": supervised.detach().mean(), "robust": robust.detach().mean()}
        return ObjectiveOutput(losses.mean(), clean, logs, losses)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * 2

    @override
    def extra_repr(self) -> str:
        return f"form={self.form!r}, beta={self.beta}, attack={self.attack!r}, forwards={self.forwards!r}"
