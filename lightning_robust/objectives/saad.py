# SPDX-License-Identifier: Apache-2.0
"""SAAD: distil most where the attack leaves the teacher unsure."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model, ordinary
from lightning_robust.checks import check_non_negative, check_positive
from lightning_robust.distillation import Source
from lightning_robust.losses import autocast_off, full_precision
from lightning_robust.objectives.ascent import check_one_run
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.igdm import Ramp, igdm_loss, mirrored
from lightning_robust.objectives.taught import TaughtObjective
from lightning_robust.objectives.terms import check_compares, label_probabilities, log_plus, teacher_divergences

__all__ = ["SAAD", "saad_loss", "saad_weights"]


def saad_weights(teacher_logits: Tensor, *, gamma: float = 1.0, scale: float = 5.0, eps_log: float = 0.0) -> Tensor:
    r"""Weights of the samples: how much less sure the teacher is than about the surest one of the batch.

    .. math:: w_i = s\, \big(H_\gamma(q_i) - \min_j H_\gamma(q_j)\big), \qquad
              H_\gamma(q) = \frac{1}{1 - \gamma} \log \sum_c q_c^\gamma

    with Shannon's entropy for :math:`\gamma = 1`.

    Args:
        teacher_logits: ``[B, C]`` of the teacher on the attacked images.
        gamma: order of the entropy.
        scale: :math:`s`.
        eps_log: added inside the logarithm, 1e-12 in the authors' code; it makes entropies of high order of unsure
            predictions among many classes smaller.

    Shape:
        Returns ``[B]``, without gradient.

    Example:
        >>> saad_weights(torch.tensor([[0.0, 0.0], [100.0, 0.0]]), scale=1.0)
        tensor([0.6931, 0.0000])
    """
    with autocast_off(teacher_logits):
        log_q = full_precision(teacher_logits.detach()).log_softmax(1)
        if gamma == 1:
            entropy = -(log_q.exp() * log_plus(log_q, eps_log)).sum(1)
        else:
            entropy = log_plus((gamma * log_q).logsumexp(1), eps_log) / (1 - gamma)
        return scale * (entropy - entropy.min())


def saad_loss(
    clean_logits: Tensor,
    plus_logits: Tensor,
    minus_logits: Tensor,
    teacher_clean: Tensor,
    teacher_plus: Tensor,
    teacher_minus: Tensor,
    *,
    beta: float = 0.0,
    gamma: float = 1.0,
    scale: float = 5.0,
    igdm_weight: float = 1.0,
    eps_log: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Divergences from the teacher, weighted by how unsure it is under attack.

    .. math:: w\, \big[ \mathrm{KL}(t^+ \,\|\, z^+) + \alpha\, \mathrm{KL}(t^+ - t^- \,\|\, z^+ - z^-) \big]
              + \beta\, (1 - \hat w)\, \mathrm{KL}(t \,\|\, z)

    averaged over samples, with :math:`w` of :func:`saad_weights` and :math:`\hat w` the same brought to [0, 1].

    Args:
        clean_logits: ``[B, C]`` of the student on the clean images.
        plus_logits: ``[B, C]`` of the student on the attacked images :math:`x + \delta`.
        minus_logits: ``[B, C]`` of the student on their mirror images :math:`x - \delta`.
        teacher_clean: ``[B, C]`` of the teacher on the clean images; no gradient flows to the teacher's.
        teacher_plus: ``[B, C]`` of the teacher on the attacked images.
        teacher_minus: ``[B, C]`` of the teacher on the mirror images.
        beta: weight of the clean images.
        gamma: order of the entropy.
        scale: scale of the weights.
        igdm_weight: :math:`\alpha`.
        eps_log: see :func:`saad_weights`.

    Returns:
        The loss, and what each part adds to that of each sample, ``[B]``: ``"robust"``, ``"igdm"`` and ``"natural"``.

    Example:
        >>> zeros, teacher = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> saad_loss(zeros, zeros, zeros, teacher, teacher, zeros, beta=1.0)[1]["natural"]
        tensor([0.0000, 0.3278])
    """
    weights = saad_weights(teacher_plus, gamma=gamma, scale=scale, eps_log=eps_log)
    # the authors' constant keeps a batch of equal weights finite
    spread = (weights - weights.min()) / (weights.max() - weights.min() + 1e-8)
    parts = {
        "robust": weights * teacher_divergences(plus_logits, teacher_plus),
        "igdm": igdm_weight * weights * igdm_loss(plus_logits, minus_logits, teacher_plus, teacher_minus),
        "natural": beta * (1 - spread) * teacher_divergences(clean_logits, teacher_clean),
    }
    return torch.stack(list(parts.values())).sum(0).mean(), parts


class SAAD(TaughtObjective):
    r"""Sample-wise adaptive adversarial distillation: weights by the teacher's entropy, and a linearised teacher.

    .. math:: w\, \big[ \mathrm{KL}(t^+ \,\|\, z^+) + \alpha\, \tfrac{e}{E}\,
              \mathrm{KL}(t^+ - t^- \,\|\, z^+ - z^-) \big] + \beta\, (1 - \hat w)\, \mathrm{KL}(t \,\|\, z), \qquad
              w_i = s\, \big(H_\gamma(q_i) - \min_j H_\gamma(q_j)\big)

    with :math:`t^\pm` and :math:`z^\pm` the answers of teacher and student about :math:`x \pm \delta`. Samples of which
    the teacher is sure under attack teach the student nothing but overconfidence, so they count least. The attack is
    that of :class:`AdaAD` with the teacher's logit of the label replaced by its linearisation around the clean image
    and the others held: one gradient of the teacher instead of one per step. The minimum is that of the batch (of each
    process).

    Cost: with 10 attack steps 10 forwards and 10 input-backwards for the attack, then 3 forwards and backwards, 3
    forwards and one input-backward of the teacher.

    Args:
        teacher: a robust one: a network, a file, a timm name or a
            :class:`~lightning_robust.distillation.TeacherSource`.
        beta: weight of the clean images; 0 in the authors' script for CIFAR-10, where they only run.
        gamma: order of the entropy; 1 in that script.
        scale: scale of the weights; 5 in their code.
        igdm_alpha: weight of the gradient matching in the last epoch, see :class:`IGDM`; 1 for CIFAR-10, 10 for
            CIFAR-100.
        slope: multiplies the linear part of the teacher in the attack; 0 holds all its logits, as RSLAD does.
        ramp: ``"linear"``: the weight of the gradient matching grows in proportion to the epochs; ``"none"``: it does
            not.
        epochs: epochs of the ramp, after which the weight stays; those of the run when ``None``.
        attack: finds the attacked images; when ``None`` the paper's,
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl", random_start="normal")``. Others need such a loss
            too.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a number out of range, an unknown ``ramp``, an attack whose loss compares with no prediction or that
            drops samples on its way; when an epoch starts, if nobody knows how many there are; in training, a teacher
            of other classes.

    References:
        The code of HongsinLee/saad (2025), which also averages weights from epoch 95 of 200 on; here that is the job of
        Lightning's ``WeightAveraging``.

    Example:
        >>> from lightning_robust.objectives import SAAD
        >>> model, objective = torch.nn.Linear(4, 3), SAAD(torch.nn.Linear(4, 3))
        >>> objective.epoch_starts(epoch=0, max_epochs=200)
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['igdm', 'natural', 'robust']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        beta: float = 0.0,
        gamma: float = 1.0,
        scale: float = 5.0,
        igdm_alpha: float = 1.0,
        slope: float = 1.0,
        ramp: Literal["linear", "none"] = "linear",
        epochs: int | None = None,
        attack: Attack | None = None,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl", random_start="normal")
            if attack is None
            else attack,
            {"teacher": teacher},
        )
        check_compares("SAAD", self.attack)
        check_one_run("SAAD", self.attack)
        for name, value in {"beta": beta, "slope": slope, "igdm_alpha": igdm_alpha}.items():
            check_non_negative(name, value)
        for name, value in {"gamma": gamma, "scale": scale}.items():
            check_positive(name, value)
        self.beta, self.gamma, self.scale, self.slope = beta, gamma, scale, slope
        self.ramp = Ramp("SAAD", igdm_alpha, kind=ramp, epochs=epochs)

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        self.ramp.epoch_starts(epoch, max_epochs)

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        clean, linear = self._linearised(x, y)
        x_adv = self.current_attack(model, x, y, generator=generator, against=linear)
        minus = mirrored(x, x_adv)
        extra = {
            "teacher": clean,
            "teacher_plus": self.ask("teacher", x_adv),
            "teacher_minus": self.ask("teacher", minus),
            "minus": minus,
        }
        return Prepared(x, y, x_adv, extra)

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        extra = prepared.extra
        plus, minus, clean = model(prepared.x_adv), model(extra["minus"]), model(prepared.x)
        self.check_classes("teacher", extra["teacher"], clean)
        loss, parts = saad_loss(
            clean,
            plus,
            minus,
            extra["teacher"],
            extra["teacher_plus"],
            extra["teacher_minus"],
            beta=self.beta,
            gamma=self.gamma,
            scale=self.scale,
            igdm_weight=self.ramp.weight,
        )
        logs = {name: values.detach().mean() for name, values in parts.items()}
        return ObjectiveOutput(loss, clean, logs, torch.stack(list(parts.values())).sum(0))

    @override
    def passes(self, inner: float) -> float:
        # the attack needs no clean prediction of the student
        return self.attack.passes - 0.5 + inner * (2.5 if self.beta == 0 else 3)

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.teachers!r}, beta={self.beta}, gamma={self.gamma}, scale={self.scale}, slope={self.slope}, "
            f"{self.ramp!r}, attack={self.attack!r}"
        )

    def _linearised(self, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The teacher's logits of the clean images, and what it would say nearby if its label logit were linear."""
        with torch.inference_mode(False), torch.enable_grad():
            start = ordinary(x).clone().requires_grad_()
            logits = self.ask("teacher", start, input_grad=True)
            labels = label_probabilities(ordinary(y), logits)
            (gradient,) = torch.autograd.grad((labels * logits).sum(), start)
        clean, base = logits.detach(), full_precision(start.detach())
        gradient = full_precision(gradient)

        def linear(x_adv: Tensor) -> Tensor:
            rise = (gradient * (full_precision(x_adv) - base)).flatten(1).sum(1, keepdim=True)
            return clean + self.slope * labels * rise

        return clean, linear
