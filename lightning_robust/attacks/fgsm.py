# SPDX-License-Identifier: Apache-2.0
"""The fast gradient sign method and its randomised variants."""

from collections.abc import Sequence

from lightning_robust.attacks.base import AttackLoss
from lightning_robust.attacks.conditions import AttackMode
from lightning_robust.attacks.pgd import PGD, NormName, Projection, Start
from lightning_robust.checks import check_non_negative

__all__ = ["FGSM"]


class FGSM(PGD):
    r"""Fast gradient sign method: one step of steepest ascent.

    .. math:: x' = P(x + \alpha\, \mathrm{sign}(\nabla_x \ell(f(x), y)))

    Its published variants are settings: FGSM-RS is ``FGSM(eps=8/255, step_size=10/255, random_start=True)``; N-FGSM is
    ``FGSM(eps=8/255, random_start=True, start_scale=2, projection="box")``, whose perturbations may be up to three
    ``eps`` long. Their training code attacks in ``mode="train"``.

    Cost: one forward and one input-backward. Single-step adversarial training can fail at once and unnoticed
    (catastrophic overfitting): watch the accuracy under :class:`~lightning_robust.attacks.PGD`.

    Args:
        eps: radius of the ball in pixel units.
        norm: ``"linf"`` or ``"l2"``.
        step_size: length of the step in pixel units; ``eps`` when ``None``.
        random_start: as in :class:`~lightning_robust.attacks.PGD`.
        start_scale: radius of the random start as a multiple of ``eps``.
        restarts: independent runs; see :class:`~lightning_robust.attacks.PGD`.
        loss: what is maximised: ``"ce"``, ``"margin"``, ``"dlr"``, ``"prob-margin"`` or ``"kl"``.
        targeted: ``y`` is the class to reach.
        mode: mode of the model while it is attacked: ``"eval"``, ``"train"`` or ``"train-frozen-stats"``.
        projection: ``"ball-box"``, ``"box-ball"``, or ``"box"`` for none on the ball.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, or arguments that exclude each other.

    References:
        Goodfellow et al., Explaining and Harnessing Adversarial Examples, arXiv 1412.6572; Wong et al., Fast is Better
        than Free, arXiv 2001.03994 (FGSM-RS); de Jorge et al., Make Some Noise, arXiv 2202.01181 (N-FGSM).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.full((2, 4), 0.5), torch.tensor([0, 2])
        >>> ((FGSM(eps=0.1)(model, x, y) - x).abs() * 10).round().unique()
        tensor([1.])
    """

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        step_size: float | None = None,
        random_start: bool | Start = False,
        start_scale: float = 1.0,
        restarts: int = 1,
        loss: AttackLoss = "ce",
        targeted: bool = False,
        mode: AttackMode = "eval",
        projection: Projection = "ball-box",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps=eps,
            norm=norm,
            steps=1,
            step_size=eps if step_size is None else step_size,
            random_start=random_start,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            mode=mode,
            projection=projection,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
        check_non_negative("start_scale", start_scale)
        self.start_scale = start_scale
        self._start_radius = start_scale * eps
