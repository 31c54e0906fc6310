# SPDX-License-Identifier: Apache-2.0
"""ARREST: adversarial finetuning that keeps the features of clean images where they were."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.conditions import Model, unwrap
from lightning_robust.checks import check_in_range, check_non_negative
from lightning_robust.distillation import Source, angular_distance
from lightning_robust.guards import evaluation_mode
from lightning_robust.losses import autocast_off, cross_entropy, full_precision
from lightning_robust.objectives.base import ObjectiveOutput, Prepared
from lightning_robust.objectives.penultimate import Penultimate
from lightning_robust.objectives.taught import TaughtObjective

__all__ = ["ARREST", "arrest_loss", "noisy_replay"]


def arrest_loss(
    adv_logits: Tensor, target: Tensor, features: Tensor, reference: Tensor, weight: float = 50.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Cross entropy on attacked images plus the angle between their features and a teacher's of the clean ones.

    .. math:: \mathrm{CE}(z'_i, y_i) + \lambda\,\frac1\pi \arccos \frac{g(x'_i)^\top g_0(x_i)}
              {\|g(x'_i)\|\,\|g_0(x_i)\|}

    Args:
        adv_logits: ``[B, C]`` of the student on the attacked images.
        target: classes ``[B]`` or probabilities ``[B, C]``.
        features: ``[B, D]`` of the student on the attacked images.
        reference: ``[B, D]`` of the teacher on the clean images.
        weight: :math:`\lambda`.

    Returns:
        The loss, its cross-entropy part and the angular distance (before ``weight``), each ``[B]``.

    Raises:
        ValueError: the features have different widths.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import arrest_loss
        >>> g = torch.tensor([[1.0, 0.0]])
        >>> loss, _, distance = arrest_loss(torch.zeros(1, 2), torch.tensor([0]), g, -g, weight=2.0)
        >>> loss, distance
        (tensor([2.6931]), tensor([1.]))
    """
    with autocast_off(adv_logits):
        adversarial = cross_entropy(adv_logits, target, reduction="none")
        distance = _distance(features, reference.detach())
        return adversarial + weight * distance, adversarial, distance


def _distance(features: Tensor, reference: Tensor) -> Tensor:
    if features.shape != reference.shape:
        raise ValueError(
            f"ARREST compares features of one width, but the student's have shape {list(features.shape)} and the "
            f"teacher's {list(reference.shape)}; take a teacher of the student's architecture, or name layers of the "
            "same width with `features_from` and `teacher_features_from`."
        )
    return angular_distance(features, reference)


def noisy_replay(
    x: Tensor,
    x_adv: Tensor,
    distance: Tensor,
    threshold: float,
    noise: float,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace the attacked images whose features have moved too far by the clean ones with noise.

    Args:
        x: clean images.
        x_adv: attacked images.
        distance: how far the features of each sample are from where they were, ``[B]``.
        threshold: distance above which a sample is replaced.
        noise: half the width of the uniform noise.
        bounds: lowest and highest value of a pixel.
        generator: source of randomness on the device of ``x``.

    Example:
        >>> import torch
        >>> from lightning_robust.objectives import noisy_replay
        >>> x, x_adv = torch.zeros(2, 1), torch.ones(2, 1)
        >>> noisy_replay(x, x_adv, torch.tensor([0.1, 0.9]), threshold=0.5, noise=0.0)
        tensor([[1.],
                [0.]])
    """
    drawn = torch.empty_like(x).uniform_(-noise, noise, generator=generator)
    moved = (distance > threshold).view(-1, *[1] * (x.ndim - 1))
    return torch.where(moved, (x + drawn).clamp(*bounds), x_adv)


class ARREST(TaughtObjective):
    r"""Adversarial finetuning of a naturally trained network that keeps its features near where they were.

    .. math:: \mathrm{CE}(f(x'), y) + \lambda\, d\big(g(x'), g_0(x)\big), \qquad
              x' = \arg\max_{\|x' - x\| \le \epsilon} \mathrm{CE}(f(x'), y)

    with :math:`g` the penultimate features of the student, :math:`g_0` those of its teacher, and :math:`d` the angular
    distance, 1 for opposite features. The student starts from the weights of its teacher, which this objective cannot
    do for it: load them, or copy the network. Noisy replay: where the features of the attacked image are farther than
    ``replay_threshold`` from the teacher's, a noisy clean image takes its place in the loss.

    Cost: with 10 attack steps 10 forwards and input-backwards for the attack, a forward of the teacher, one of the
    student in evaluation mode for the noisy replay (none with ``replay_threshold=None``), then 1 forward and backward.

    Args:
        teacher: the naturally trained network: a network, a file, a timm name or a
            :class:`~lightning_robust.distillation.TeacherSource`. Its features are needed, so no cache.
        weight: :math:`\lambda`.
        replay_threshold: angular distance above which a sample is replayed; ``None`` for never. Features behind a ReLU
            are at most 0.5 apart, a right angle.
        replay_noise: half the width of the uniform noise on replayed images.
        attack: finds the attacked images; when ``None`` ``PGD(eps=8/255, step_size=2/255, steps=10)``.
        features_from: dotted name of the student's layer whose output is the features; the input of its classifier
            when ``None``.
        teacher_features_from: the same of the teacher.

    Shape:
        Images are ``[B, ...]``, targets ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: a negative ``weight`` or ``replay_noise``, or a ``replay_threshold`` outside of [0, 1]; in training,
            if there is no such layer or features differ in width.
        TypeError: in training, if the model is a bare function.

    References:
        Suzuki et al., Adversarial Finetuning with Latent Representation Constraint to Mitigate Accuracy-Robustness
        Tradeoff, arXiv:2308.16454. There is no official code: ``weight``, ``replay_threshold`` and ``replay_noise`` are
        ours, tried on digits only, and so is it that the decision to replay is taken once per batch, before the loss.

    Example:
        >>> import copy, torch
        >>> from lightning_robust.attacks import PGD
        >>> from lightning_robust.objectives import ARREST
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> model = copy.deepcopy(teacher)
        >>> objective = ARREST(teacher=teacher, attack=PGD(eps=0.1, steps=2))
        >>> prepared = objective.prepare(model, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> sorted(objective(model, prepared).logs)
        ['adversarial', 'distance', 'replayed']
    """

    def __init__(
        self,
        teacher: Source,
        *,
        weight: float = 50.0,
        replay_threshold: float | None = 0.2,
        replay_noise: float = 8 / 255,
        attack: Attack | None = None,
        features_from: str | None = None,
        teacher_features_from: str | None = None,
    ) -> None:
        super().__init__(
            PGD(eps=8 / 255, step_size=2 / 255, steps=10) if attack is None else attack, {"teacher": teacher}
        )
        check_non_negative("weight", weight)
        check_non_negative("replay_noise", replay_noise)
        if replay_threshold is not None:
            check_in_range("replay_threshold", replay_threshold, 0.0, 1.0)
        self.weight = weight
        self.replay_threshold = replay_threshold
        self.replay_noise = replay_noise
        self.features_from = features_from
        self.teacher_features_from = teacher_features_from
        self._of_student: Penultimate | None = None
        self._of_teacher: Penultimate | None = None

    @override
    def ready(self, num_classes: int | None = None, in_chans: int | None = None) -> None:
        super().ready(num_classes, in_chans)
        self.fit_ends()

    @override
    def fit_ends(self) -> None:
        super().fit_ends()
        for features in (self._of_student, self._of_teacher):
            if features is not None:
                features.detach()
        self._of_student = self._of_teacher = None

    @override
    def prepare(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Prepared:
        self._watch(model)  # before the attack: a compiled network must not have run yet
        prepared = super().prepare(model, x, y, generator=generator)
        assert prepared.x_adv is not None, "made by the attack"
        reference = self._reference(x)
        if self.replay_threshold is None:
            return Prepared(x, y, prepared.x_adv, {"reference": reference})
        with torch.no_grad(), evaluation_mode(self._student.network):
            model(prepared.x_adv)
            distance = _distance(self._student.take(len(x)), reference)
        bounds = getattr(self.current_attack, "bounds", (0.0, 1.0))
        threshold, noise = self.replay_threshold, self.replay_noise
        x_adv = noisy_replay(x, prepared.x_adv, distance, threshold, noise, bounds=bounds, generator=generator)
        replayed = (distance > threshold).float().mean()
        return Prepared(x, y, x_adv, {"reference": reference, "replayed": replayed})

    @override
    def forward(self, model: Model, prepared: Prepared) -> ObjectiveOutput:
        assert prepared.x_adv is not None, "made by prepare"
        logits = model(prepared.x_adv)
        features = self._student.take(len(logits))
        losses, adversarial, distance = arrest_loss(
            full_precision(logits), prepared.y, features, prepared.extra["reference"], self.weight
        )
        logs = {"adversarial": adversarial.detach().mean(), "distance": distance.detach().mean()}
        if "replayed" in prepared.extra:
            logs["replayed"] = prepared.extra["replayed"]
        return ObjectiveOutput(losses.mean(), logits, logs, losses)

    @override
    def passes(self, inner: float) -> float:
        return self.attack.passes + (0 if self.replay_threshold is None else 1 / 3) + inner

    @property
    def _student(self) -> Penultimate:
        assert self._of_student is not None, "made by prepare"
        return self._of_student

    def _watch(self, model: Model) -> None:
        """See to it that the features of both networks are remembered."""
        module = unwrap(model)[1]
        if not isinstance(module, nn.Module):
            raise TypeError("ARREST looks at the features of the model, but it is a bare function; give the nn.Module.")
        if self._of_student is None or self._of_student.network is not module:
            if self._of_student is not None:
                self._of_student.detach()
            self._of_student = Penultimate(module, self.features_from, owner="model")
        network = self.teachers.teacher("teacher").network
        if self._of_teacher is None or self._of_teacher.network is not network:
            self._of_teacher = Penultimate(network, self.teacher_features_from, owner="teacher")

    def _reference(self, x: Tensor) -> Tensor:
        """The teacher's features of the clean images."""
        assert self._of_teacher is not None, "made by _watch"
        self.ask("teacher", x)
        return full_precision(self._of_teacher.take(len(x)).detach())

    @override
    def extra_repr(self) -> str:
        return (
            f"attack={self.attack!r}, weight={self.weight}, replay_threshold={self.replay_threshold}, "
            f"replay_noise={self.replay_noise}, teachers={self.teachers!r}"
        )
