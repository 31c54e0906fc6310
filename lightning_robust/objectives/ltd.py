# SPDX-License-Identifier: Apache-2.0
"""Low-temperature distillation: soft labels of a teacher for adversarial training."""

from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.conditions import Model
from lightning_robust.checks import check_positive
from lightning_robust.distillation import Source, TeacherBank
from lightning_robust.losses import autocast_off, full_precision
from lightning_robust.objectives.adversarial_cross_entropy import AdversarialCrossEntropy
from lightning_robust.objectives.base import Objective
from lightning_robust.objectives.targets import SoftTargets
from lightning_robust.objectives.taught import Taught

__all__ = ["LTD", "ltd_targets"]


def ltd_targets(teacher_logits: Tensor, temperature: float = 5.0) -> Tensor:
    r"""Soft labels of a teacher, :math:`\mathrm{softmax}(t / \tau)`.

    Args:
        teacher_logits: ``[B, C]``, of the clean images.
        temperature: :math:`\tau`, of the teacher alone; the student's is 1.

    Shape:
        ``[B, C]``; float32, or float64 for float64 logits; detached.

    Example:
        >>> import torch
        >>> ltd_targets(torch.tensor([[0.0, 5.0]]), temperature=5.0)
        tensor([[0.2689, 0.7311]])
    """
    with autocast_off(teacher_logits):
        return (full_precision(teacher_logits.detach()) / temperature).softmax(1)


class LTD(Taught, SoftTargets):
    r"""Adversarial training towards the soft labels of a naturally trained teacher.

    .. math:: y' = \mathrm{softmax}\big(t(x) / \tau\big)

    The teacher sees the clean images. The student's temperature is 1, in training and afterwards, so its gradients are
    not masked as those of defensive distillation are; no factor :math:`\tau^2`. The labels of the batch are not used,
    except by the attack with ``attack_with="labels"``. The method is an objective on top of these labels:
    ``LTD(teacher=..., objective=TRADES(beta=6.0))``, with AWP around it for the best published numbers.

    Cost: that of the objective, and a forward of the teacher per batch; none with a
    :class:`~lightning_robust.distillation.TeacherCache`, for images that are not augmented at random.

    Args:
        teacher: a network, a file, a timm name, a :class:`~lightning_robust.distillation.TeacherSource` or a cache.
        temperature: :math:`\tau`, of the teacher alone.
        objective: the loss on the soft labels; when ``None`` :class:`AdversarialCrossEntropy`, PGD-AT.
        attack_with: ``"targets"``: the attack moves away from the soft labels; ``"labels"``: from the labels.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: ``temperature`` is not positive, or an unknown value of ``attack_with``; when training, a teacher
            of other classes.

    References:
        Chen and Lee, LTD: Low Temperature Distillation for Robust Adversarial Training, arXiv:2111.02331. Their
        repository has no training code: the temperature of each data set, the objective and what the attack looks at
        are not known for sure; the defaults here are ours.

    Example:
        >>> import torch
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.objectives import LTD, AdversarialCrossEntropy
        >>> model, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> objective = LTD(teacher=teacher, objective=AdversarialCrossEntropy(attack=PGD(eps=0.1, steps=2)))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['adversarial']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        temperature: float = 5.0,
        objective: Objective | None = None,
        attack_with: Literal["targets", "labels"] = "targets",
    ) -> None:
        super().__init__(
            objective=AdversarialCrossEntropy() if objective is None else objective, attack_with=attack_with
        )
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.teachers = TeacherBank({"teacher": teacher}, cacheable=("teacher",))

    @override
    def targets(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        return ltd_targets(self.ask("teacher", x), self.temperature)

    @override
    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, attack_with={self.attack_with!r}, teachers={self.teachers!r}"
