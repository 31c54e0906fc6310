# SPDX-License-Identifier: Apache-2.0
"""Adversarial training as such: the loss on attacked images."""

from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_in_range
from lightning_robust.losses import Criterion, cross_entropy, full_precision
from lightning_robust.objectives.base import AttackedObjective, ObjectiveOutput, Prepared

__all__ = ["AdversarialCrossEntropy"]


class AdversarialCrossEntropy(AttackedObjective):
    r"""The loss on attacked images, with the loss on clean ones beside it if wanted: PGD-AT, FGSM-RS, N-FGSM.

    .. math:: (1 - w)\, \mathrm{CE}(f(x'), y) + w\, \mathrm{CE}(f(x), y), \qquad
              x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{CE}(f(x'), y)

    Which method it is, the attack decides: the default is PGD-AT;
    ``FGSM(eps=8/255, step_size=10/255, random_start=True, mode="train")`` is FGSM-RS, and
    ``FGSM(eps=8/255, random_start=True, start_scale=2, projection="box", mode="train")`` is N-FGSM. The attack runs
    once per batch. :class:`~lightning_robust.callbacks.AdversarialTraining` does the same to a module that keeps its
    own training step.

    Cost: with 10 attack steps 10 forwards and input-backwards for the attack, then 1 forward and backward (2 with a
    ``clean_weight``).

    Args:
        attack: finds the attacked images; when ``None``
            ``PGD(eps=8/255, step_size=2/255, steps=10)``, in evaluation mode as Bag of Tricks recommends. Rice et al.
            and Madry et al. attack in ``mode="train"``.
        clean_weight: the part ``w`` of the loss on clean images; 0 runs no clean forward.
        forwards: with a ``clean_weight``: ``"separate"``: clean, then attacked; ``"joint"``: both in one batch, which
            matters for BatchNorm.
        criterion: takes the place of the cross entropy, for label smoothing say.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a ``clean_weight`` outside of [0, 1] or an unknown value of ``forwards``.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083; Rice et al.,
        Overfitting in Adversarially Robust Deep Learning, arXiv 2002.11569, whose code runs the clean images in
        training mode too, for its log, and so mixes them into the BatchNorm statistics; Pang et al., Bag of Tricks for
        Adversarial Training, arXiv 2010.00467; Wong et al., Fast is Better than Free, arXiv 2001.03994 (FGSM-RS); de
        Jorge et al., Make Some Noise, arXiv 2202.01181 (N-FGSM).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = AdversarialCrossEntropy(attack=PGD(eps=0.1, steps=2))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['adversarial']
    """

    def __init__(
        self,
        *,
        attack: Attack | None = None,
        clean_weight: float = 0.0,
        forwards: Literal["separate", "joint"] = "separate",
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(PGD(eps=8 / 255, step_size=2 / 255, steps=10) if attack is None else attack)
        check_in_range("clean_weight", clean_weight, 0.0, 1.0)
        check_choice("forwards", forwards, ("separate", "joint"))
        self.clean_weight = clean_weight
        self.forwards = forwards
        self.criterion = criterion

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        weight = self.clean_weight
        if weight == 0:
            assert prepared.x_adv is not None, "made by prepare"
            adv = model(prepared.x_adv)
            loss, samples = self._losses(adv, prepared.y)
            return ObjectiveOutput(loss, adv, {"adversarial": loss.detach()}, samples)
        clean, adv = self.clean_and_attacked(model, prepared, joint=self.forwards == "joint")
        adversarial, adv_samples = self._losses(adv, prepared.y)
        natural, clean_samples = self._losses(clean, prepared.y)
        samples = None
        if adv_samples is not None and clean_samples is not None:
            samples = (1 - weight) * adv_samples + weight * clean_samples
        logs = {"adversarial": adversarial.detach(), "natural": natural.detach()}
        return ObjectiveOutput((1 - weight) * adversarial + weight * natural, adv, logs, samples)

    def _losses(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss, and what each sample adds to it where that is known."""
        if self.criterion is not None:
            return self.criterion(full_precision(logits), target), None
        samples = cross_entropy(logits, target, reduction="none")
        return samples.mean(), samples

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + inner * (2 if self.clean_weight > 0 else 1)

    @override
    def extra_repr(self) -> str:
        return f"attack={self.attack!r}, clean_weight={self.clean_weight}, forwards={self.forwards!r}"
