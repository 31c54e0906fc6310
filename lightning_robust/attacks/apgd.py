# SPDX-License-Identifier: Apache-2.0
"""Auto-PGD: projected ascent that finds its step size itself."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.apgd_l1 import SparseSteps, budgets
from lightning_robust.attacks.apgd_momentum import MomentumSteps
from lightning_robust.attacks.base import Attack, AttackLoss
from lightning_robust.attacks.climb import Outcome, Steps, climb
from lightning_robust.attacks.conditions import AttackMode
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.losses import PREDICTION_LOSSES
from lightning_robust.attacks.norms import NORMS, per_sample
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.region import region
from lightning_robust.checks import check_choice, check_in_range, check_integer

__all__ = ["APGD"]


class APGD(Attack):
    r"""Auto-PGD: projected ascent with momentum that halves its step size where the loss stops growing.

    .. math:: z = P(x_t + \eta_t\, s(g_t)), \qquad x_{t+1} = P(x_t + a\,(z - x_t) + (1 - a)(x_t - x_{t-1}))

    with :math:`\eta_0 = 2\epsilon` and the step :math:`s` of :class:`~lightning_robust.attacks.PGD`. At checkpoints,
    per sample, :math:`\eta` is halved and the run goes back to its best point if fewer than ``rho`` of the steps since
    the last one raised the loss, or if neither :math:`\eta` nor the best loss changed. In l1 steps are sparse, their
    number of pixels follows that of the best point, and there is no momentum. Nothing has to be tuned: a good single
    attack for evaluations, ``loss="ce"`` and ``"dlr"`` as in AutoAttack;
    ``MultiTargeted(APGD(loss="dlr"))`` is stronger, at nine times the cost.

    Returned is, per sample, an adversarial point if the run saw one (with ``early_stop`` the first, otherwise the one
    of largest loss), else the point of largest loss. Points are within budget and pixels in the type of the images,
    in half precision too. A sample that is misclassified already is attacked like the others.

    Cost: ``steps + 1`` forwards and ``steps`` input-backwards per restart, each ``eot`` times; two more forwards with
    ``largereps``. With ``early_stop`` samples leave when they are fooled.

    Args:
        eps: radius of the budget in pixel units.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: number of steps; 0 looks at the start only.
        rho: the part of the steps between two checkpoints that has to raise the loss (not in l1).
        momentum: the part of an update that is new; the rest is the previous move (not in l1).
        largereps: in l1, spend 30% of the steps in 3 and 30% in 2 times ``eps`` and go on from their best points, as
            AutoAttack does.
        restarts: independent runs, each on the samples that are not fooled.
        loss: what is maximised: ``"ce"``, ``"dlr"``, ``"margin"``, ``"prob-margin"`` or ``"kl"``.
        targeted: ``y`` is the class to reach.
        eot: for randomised models: average gradient, loss and probabilities over that many forwards.
        mode: mode of the model while it is attacked: ``"eval"``, ``"train"`` or ``"train-frozen-stats"``.
        early_stop: samples leave at their first adversarial point; the host waits for the device in every step.
        best_loss: return the point of largest loss, also where another one is adversarial (for training).
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, ...]`` (channels in dimension 1 if ``mean`` is given), ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, or arguments that exclude each other.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks, arXiv 2003.01690; l1: Croce and Hein, Mind the box, arXiv 2103.01208. As in their code the first loss
        counts as raised when it is above zero, whatever that of the start. Unlike it, the last point costs no backward,
        with ``eot`` loss and prediction are means as well, and which adversarial point of a path is returned does not
        depend on the order of the steps.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> x_adv = APGD(eps=0.1, steps=10)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: Literal["linf", "l2", "l1"] = "linf",
        steps: int = 100,
        rho: float = 0.75,
        momentum: float = 0.75,
        largereps: bool = False,
        restarts: int = 1,
        loss: AttackLoss = "ce",
        targeted: bool = False,
        eot: int = 1,
        mode: AttackMode = "eval",
        early_stop: bool = True,
        best_loss: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps=eps,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            mode=mode,
            early_stop=early_stop,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
        check_choice("norm", norm, ("linf", "l2", "l1"))
        check_integer("steps", steps, 0)
        check_in_range("rho", rho, 0, 1)
        check_in_range("momentum", momentum, 0, 1)
        check_integer("eot", eot, 1)
        if largereps and norm != "l1":
            raise ValueError(f"`largereps` is a schedule of budgets for norm='l1'; it does nothing for {norm!r}.")
        if best_loss and early_stop:
            raise ValueError("`best_loss` looks at the whole path; it needs early_stop=False.")
        self.norm, self.steps, self.rho, self.momentum = norm, steps, rho, momentum
        self.largereps, self.eot, self.best_loss = largereps, eot, best_loss

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        if self.norm == "l1":
            widest = region("l1", x, self._phases()[0][0], self.space, x.dtype)
            return widest.project(x + self.space.from_pixels(draws.normal(x)))
        noise = draws.uniform(x, -1.0, 1.0) if self.norm == "linf" else NORMS["l2"].direction(draws.normal(x))
        if self.norm == "linf":
            size = per_sample(NORMS["linf"].size(noise), x)
            noise = noise / size.clamp(min=torch.finfo(noise.dtype).tiny)
        return self.space.clip(x + self.space.from_pixels(self.eps * noise))

    @override
    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        # every run knows the loss of its points, so choosing between restarts takes no further forward
        found = self._search(problem, self._start(problem) if start is None else start.to(problem.x))
        for _ in range(self.restarts - 1):
            # drawn for all samples, so that the draws of one do not depend on the success of another
            again = self._start(problem)
            left = (
                (~found.fooled).nonzero().squeeze(1) if self.early_stop else torch.arange(len(again)).to(again.device)
            )
            if not len(left):
                break
            part = self._search(problem.select(left), again[left])
            found.put(left, found.rows(left).or_better(part, by_loss=self.best_loss))
        return found.x_adv

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        return self._search(problem, x_adv).x_adv

    @property
    @override
    def run_passes(self) -> float:
        return self.eot * (self.steps + 0.5 * len(self._phases()))

    @property
    @override
    def passes(self) -> float:
        return self.restarts * self.run_passes + 0.5 * (self.loss in PREDICTION_LOSSES)

    def _phases(self) -> list[tuple[float, int]]:
        return budgets(self.eps, self.steps, larger=self.largereps)

    def _search(self, problem: Problem, x_adv: Tensor) -> Outcome:
        *larger, last = self._phases()
        for eps, count in larger:
            # what is adversarial in a larger budget is but a start
            steps = self._steps(problem, eps, count)
            wide = climb(problem, x_adv, steps, count=count, eot=self.eot, early_stop=False, best_loss=True)
            x_adv = wide.x_adv
        return climb(
            problem,
            x_adv,
            self._steps(problem, *last),
            count=last[1],
            eot=self.eot,
            early_stop=self.early_stop,
            best_loss=self.best_loss,
        )

    def _steps(self, problem: Problem, eps: float, count: int) -> Steps:
        around = region(self.norm, problem.x, eps, self.space, problem.dtype)
        if self.norm == "l1":
            return SparseSteps(around, count, resume=self.largereps)
        return MomentumSteps(around, self.norm, count, rho=self.rho, momentum=self.momentum)
