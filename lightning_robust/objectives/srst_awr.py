# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised robust training with a teacher: SRST-AWR."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_choice, check_in_range, check_non_negative, check_positive
from lightning_robust.distillation import Source
from lightning_robust.losses import autocast_off, cross_entropy, full_precision
from lightning_robust.objectives.base import ObjectiveOutput, Prepared, Total
from lightning_robust.objectives.targets import SameClasses
from lightning_robust.objectives.taught import TaughtObjective
from lightning_robust.objectives.terms import divergences, log_plus

__all__ = ["SRSTAWR", "SRSTAWRParts", "srst_awr_loss"]

_EPS = 1e-12  # added to probabilities in the published code


@dataclass(frozen=True)
class SRSTAWRParts:
    """The value of :func:`srst_awr_loss` and what it consists of, before their weights.

    Args:
        loss: the weighted sum.
        supervised: smoothed cross entropy of the labelled samples.
        regularizer: weighted divergence of the attacked predictions.
        knowledge: divergence of the predictions from the teacher's.
    """

    loss: Tensor
    supervised: Tensor
    regularizer: Tensor
    knowledge: Tensor


def srst_awr_loss(
    labelled_logits: Tensor,
    target: Tensor,
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    *,
    lam: float = 20.0,
    gamma: float = 4.0,
    beta: float = 0.5,
    temperature: float = 1.2,
    label_smoothing: float = 0.2,
    kl_logits: Tensor | None = None,
) -> SRSTAWRParts:
    r"""Supervised loss on labelled samples, robustness and a teacher's knowledge on unlabelled ones.

    .. math:: \mathrm{CE}_s + \frac{\lambda}{U}\sum_i w_i\,\mathrm{KL}\big(p_i \,\|\, p'_i\big)
              + \frac{\gamma}{U}\sum_i \mathrm{KL}\big(q_i^{\tau} \,\|\, p_i^{\tau}\big), \qquad
              w_i = \beta \langle q_i, p_i \rangle + (1 - \beta)\big(1 - \langle q_i, p'_i \rangle\big)

    with :math:`p` and :math:`p'` the student on clean and attacked images, :math:`q` the teacher on clean ones, and
    :math:`\tau` the temperature of both in the last term (no factor :math:`\tau^2`). Gradients flow through the weights
    too. A part without samples is zero.

    Args:
        labelled_logits: ``[L, C]`` of the student on the labelled images.
        target: classes ``[L]`` or probabilities ``[L, C]``.
        clean_logits: ``[U, C]`` of the student on the unlabelled images.
        adv_logits: ``[U, C]`` of the student on the attacked unlabelled images.
        teacher_logits: ``[U, C]`` of the teacher on the clean unlabelled images.
        lam: weight of the divergence under attack.
        gamma: weight of the teacher's knowledge.
        beta: share of agreement with the teacher on clean images in the weight of a sample.
        temperature: of the teacher's knowledge.
        label_smoothing: of the labels.
        kl_logits: clean logits for the divergence under attack where they come from a second forward.

    References:
        Yang et al., arXiv:2308.04061.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import srst_awr_loss
        >>> zeros = torch.zeros(1, 2)
        >>> parts = srst_awr_loss(zeros, torch.tensor([0]), zeros, zeros, zeros)
        >>> parts.supervised, parts.regularizer
        (tensor(0.6931), tensor(0.))
    """
    with autocast_off(clean_logits):
        clean, adv, teacher = (full_precision(each) for each in (clean_logits, adv_logits, teacher_logits.detach()))
        student = clean if kl_logits is None else full_precision(kl_logits)
        q = teacher.softmax(1)
        weights = beta * (q * student.softmax(1)).sum(1) + (1 - beta) * (1 - (q * adv.softmax(1)).sum(1))
        samples = max(len(clean), 1)
        regularizer = (weights * divergences(student, adv, _EPS)).sum() / samples
        target_probabilities = (teacher / temperature).softmax(1) + _EPS
        log_p = log_plus((clean / temperature).log_softmax(1), _EPS)
        knowledge = (target_probabilities * (target_probabilities.log() - log_p)).sum() / samples
        if len(labelled_logits):
            supervised = cross_entropy(full_precision(labelled_logits), target, label_smoothing=label_smoothing)
        else:
            supervised = regularizer.new_zeros(())
        return SRSTAWRParts(supervised + lam * regularizer + gamma * knowledge, supervised, regularizer, knowledge)


class SRSTAWR(TaughtObjective):
    r"""Robust training on few labels: an attack towards a teacher's pseudo labels, weighted by what the teacher says.

    See :func:`srst_awr_loss` for the formula. A batch holds labelled and unlabelled images; a negative label, -100 or
    -1, says that there is none. :class:`~lightning_robust.data.LabelledAndUnlabelled` makes such batches of two
    loaders, :class:`~lightning_robust.data.PartialLabels` of one data set. Only unlabelled images are attacked, and the
    teacher sees only them, clean. In a process without unlabelled images the batch is plain supervised training.

    Cost: with 10 attack steps 10 forwards and input-backwards on the unlabelled images for the attack, a forward of the
    teacher, then 1 forward and backward on the labelled images and 2 on the unlabelled (one forward more with
    ``forwards="published"``). The device is waited for once per batch, to see which samples have labels.

    Args:
        teacher: a network, a file, a timm name, a :class:`~lightning_robust.distillation.TeacherSource` or a cache;
            the paper's was trained with FixMatch on the same labels.
        lam: weight of the divergence under attack; 20 on CIFAR-10, 8 on STL-10.
        gamma: weight of the teacher's knowledge.
        beta: share of agreement with the teacher on clean images in the weight of a sample.
        temperature: of the teacher's knowledge; 1.2 on CIFAR-10, 1.0 on CIFAR-100.
        label_smoothing: of the labels.
        attack: finds the attacked images; when ``None`` the paper's for CIFAR-10,
            ``PGD(eps=8/255, step_size=2/255, steps=10, loss="kl")``. With ``loss="ce"``, theirs for the other data
            sets, it moves away from the teacher's pseudo labels.
        forwards: ``"separate"``: labelled, unlabelled, attacked; ``"published"``: a second forward of the unlabelled
            images for the divergence under attack, so running statistics move once more and dropout draws twice.

    Shape:
        Images are ``[B, ...]``, targets ``[B]``; or probabilities ``[B, C]``, with which all samples are labelled.

    Raises:
        ValueError: a negative ``lam`` or ``gamma``, ``beta`` or ``label_smoothing`` outside of [0, 1], a temperature
            that is not positive, an unknown value of ``forwards``; in training, a teacher of other classes.

    References:
        Yang et al., arXiv:2308.04061. As in their code the weights are not detached, and both of their factors use the
        teacher on the clean image; their code also asks the teacher about the attacked one, for nothing. Their attack
        runs after the forwards of the clean images, so it sees running statistics that have moved already.

    Example:
        >>> import torch
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.objectives import SRSTAWR
        >>> model, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> objective = SRSTAWR(teacher=teacher, attack=PGD(eps=0.1, steps=2, loss="kl"))
        >>> prepared = objective.prepare(model, torch.rand(3, 4), torch.tensor([0, -100, -100]))
        >>> sorted(objective(model, prepared).logs)
        ['knowledge', 'regularizer', 'supervised']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        lam: float = 20.0,
        gamma: float = 4.0,
        beta: float = 0.5,
        temperature: float = 1.2,
        label_smoothing: float = 0.2,
        attack: Attack | None = None,
        forwards: Literal["separate", "published"] = "separate",
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10, loss="kl") if attack is None else attack,
            {"teacher": teacher},
            cacheable=("teacher",),
        )
        check_non_negative("lam", lam)
        check_non_negative("gamma", gamma)
        check_in_range("beta", beta, 0.0, 1.0)
        check_positive("temperature", temperature)
        check_in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        check_choice("forwards", forwards, ("separate", "published"))
        self.lam = lam
        self.gamma = gamma
        self.beta = beta
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.forwards = forwards
        self._unlabelled: Tensor | None = None  # whether a batch of this epoch had a sample without label

    @override
    def epoch_starts(self, epoch: int, max_epochs: int) -> None:
        super().epoch_starts(epoch, max_epochs)
        self._unlabelled = None

    @override
    def epoch_ends(self, epoch: int, total: Total) -> None:
        super().epoch_ends(epoch, total)
        if self._unlabelled is not None and not bool(total(self._unlabelled)):
            warnings.warn(
                f"No sample of epoch {epoch} was without label, so SRSTAWR was cross entropy on clean images; give the "
                "unlabelled ones the label -100 (PartialLabels, LabelledAndUnlabelled).",
                stacklevel=2,
            )

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        known = torch.ones(len(y), dtype=torch.bool, device=y.device) if y.is_floating_point() else y >= 0
        labelled, unlabelled = known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)
        extra = {"labelled": labelled, "unlabelled": unlabelled}
        found = (~known).any().float()
        self._unlabelled = found if self._unlabelled is None else torch.maximum(self._unlabelled, found)
        if len(unlabelled) == 0:
            return Prepared(x, y, None, extra)
        clean, index = x[unlabelled], self.running.index
        index = None if index is None else index[unlabelled.to(index.device)]
        answers = self.teachers.ask("teacher", clean, index=index)
        model = SameClasses(model, answers, f"teacher of {type(self).__name__} has")
        x_adv = self.current_attack(model, clean, answers.argmax(1), generator=generator)
        return Prepared(x, y, x_adv, {**extra, "teacher": answers})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        labelled, unlabelled = prepared.extra["labelled"], prepared.extra["unlabelled"]
        of_labelled, of_unlabelled, adv, kl_logits = self._logits(model, prepared)
        parts = srst_awr_loss(
            of_labelled,
            prepared.y[labelled],
            of_unlabelled,
            adv,
            prepared.extra.get("teacher", adv),
            lam=self.lam,
            gamma=self.gamma,
            beta=self.beta,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            kl_logits=kl_logits,
        )
        logits = torch.cat([of_labelled, of_unlabelled])[torch.cat([labelled, unlabelled]).argsort()]
        logs = {name: getattr(parts, name).detach() for name in ("supervised", "regularizer", "knowledge")}
        return ObjectiveOutput(parts.loss, logits, logs)

    def _logits(self, model: Model, prepared: Prepared) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of labelled, unlabelled and attacked images, and of the unlabelled ones for the divergence."""
        labelled, unlabelled = prepared.extra["labelled"], prepared.extra["unlabelled"]
        of_labelled = model(prepared.x[labelled]) if len(labelled) else None
        if prepared.x_adv is None:
            assert of_labelled is not None, "a batch has samples"
            none = of_labelled[:0]
            return of_labelled, none, none, none
        of_unlabelled, adv = model(prepared.x[unlabelled]), model(prepared.x_adv)
        kl_logits = model(prepared.x[unlabelled]) if self.forwards == "published" else of_unlabelled
        return of_unlabelled[:0] if of_labelled is None else of_labelled, of_unlabelled, adv, kl_logits

    @override
    def passes(self, inner: float) -> float:
        # at most: how many of the images have no labels is not known
        return self.attack.passes + inner * (2 + 1 / 3 if self.forwards == "published" else 2)

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, lam={self.lam}, gamma={self.gamma}, beta={self.beta}, "
            f"temperature={self.temperature}, label_smoothing={self.label_smoothing}, forwards={self.forwards!r}, "
            f"teachers={self.teachers!r}"
        )
