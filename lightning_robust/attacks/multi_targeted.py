# SPDX-License-Identifier: Apache-2.0
"""One attack towards several other classes in turn."""

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.draws import SampleDraws
from lightning_robust.attacks.losses import STEERED_LOSSES, labels_of, margin
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.sequence import Ensemble
from lightning_robust.checks import check_integer

__all__ = ["MultiTargeted", "likeliest_others"]

#: Entries of a batch that stays in the caches of a CPU, where larger ones take longer per image.
_CPU_ENTRIES = 2**17


def likeliest_others(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """The classes other than the target's with the largest logits, in their order.

    Args:
        logits: ``[B, K]``.
        target: classes ``[B]`` or probabilities ``[B, K]``.
        count: how many; all others if there are fewer.

    Shape:
        Returns ``[B, min(count, K - 1)]``.

    Example:
        >>> import torch
        >>> likeliest_others(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([2]), 2)
        tensor([[0, 1]])
    """
    own = labels_of(target).long().unsqueeze(1)
    others = logits.scatter(1, own, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    return others[:, : min(count, logits.shape[1] - 1)]


class MultiTargeted(Ensemble):
    r"""Runs an attack towards one other class after the other, on the samples that are still right.

    .. math:: t_r = \text{class of the } r\text{-th largest clean logit}, \quad r = 2, \ldots, T + 1,
              \qquad T = \min(\mathrm{targets}, K - 1)

    The loss steers to :math:`t_r`; any misclassification is a success. ``MultiTargeted(APGD(loss="dlr"))`` is APGD-T,
    and FAB and PGD work as well. A sample that is misclassified already stays as it is; one that withstands all targets
    gets, of the points the attack returned, the one of the largest logit margin.

    The targeted DLR loss needs four classes: with two or three, ``loss="dlr"`` becomes ``"margin"``.

    When few samples are left of a call with ``indices``, several targets of each run side by side: as many images per
    pass as the call brought, on a CPU as many as its caches hold. The result is the same.

    Cost: for a sample that withstands all, ``T`` times the attack and a forward, and one for the clean images.

    Args:
        attack: the attack, in evaluation mode and not itself ``targeted``.
        targets: number of classes to try; 9 is AutoAttack's choice (5 in l1).

    Shape:
        ``x`` is ``[B, ...]``, ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: an argument out of range, an attack that cannot be steered, or (when called) ``towards``.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness, arXiv 2003.01690 (APGD-T, FAB-T); Gowal et al.,
        An Alternative Surrogate Loss for PGD-based Adversarial Testing, arXiv 1910.09338. AutoAttack's code fails for
        fewer classes than ``targets + 1`` and with fewer than four; it recomputes the clean logits for every target.

    Example:
        >>> from lightning_robust.attacks import APGD
        >>> attack = MultiTargeted(APGD(loss="dlr", steps=5), targets=3)
        >>> attack(torch.nn.Linear(4, 5), torch.rand(2, 4), torch.tensor([0, 2])).shape
        torch.Size([2, 4])
    """

    def __init__(self, attack: Attack, *, targets: int = 9) -> None:
        check_integer("targets", targets, 1)
        if attack.mode != "eval":
            raise ValueError(
                f"Expected `attack` to have mode='eval' but got {attack.mode!r}: leaving samples out changes the batch "
                "that BatchNorm sees."
            )
        if attack.targeted or isinstance(attack, Ensemble) or attack.loss not in STEERED_LOSSES:
            raise ValueError(
                f"Expected an attack that can be steered to a class but got {attack!r}; give a single one, without "
                f"`targeted`, of a loss among {', '.join(map(repr, STEERED_LOSSES))}."
            )
        super().__init__(
            eps=attack.eps,
            loss=attack.loss,
            mean=attack.mean,
            std=attack.std,
            bounds=attack.bounds,
            seed=attack.seed,
        )
        self.attack, self.targets = attack, targets
        self.norm = getattr(attack, "norm", None)  # an evaluation measures the budget in it

    @override
    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        if problem.towards is not None:
            raise ValueError("MultiTargeted chooses the classes itself; call its attack with `towards` for one class.")
        plain = replace(problem, loss=margin, reference=labels_of(problem.y))
        with torch.no_grad():
            logits = problem.logits(problem.x)
        torch.clear_autocast_cache()  # what it holds now has no graph
        x_adv, best, fooled = problem.x.clone(), plain.losses(logits), plain.fooled(logits)
        attack = self._suited(logits.shape[1])
        wanted = likeliest_others(logits, problem.y, self.targets)
        rank = 0
        while rank < wanted.shape[1]:
            left = (~fooled).nonzero().squeeze(1)
            if len(left) == 0:
                break
            some = wanted[left, rank : rank + self._at_once(problem, rank, len(left))]
            for found in self._towards(attack, plain.select(left), some, rank, None if start is None else start[left]):
                value, hit = plain.select(left).judge(found)
                better = ~fooled[left] & (hit | (value > best[left]))
                x_adv[left[better]], best[left[better]] = found[better], value[better]
                fooled[left] |= hit
            rank += some.shape[1]
        return x_adv

    @override
    def at(self, epoch: int, max_epochs: int) -> Attack:
        return self.replaced(attack=self.attack.at(epoch, max_epochs))

    @property
    @override
    def run_passes(self) -> float:
        # with at least as many classes; the clean prediction and the check after each target are lone forwards
        return self.targets * (self.attack.passes + 0.5) + 0.5

    @staticmethod
    def _at_once(problem: Problem, rank: int, left: int) -> int:
        # The first target breaks most of what falls, so it goes alone. With one stream of random numbers for all
        # samples the result would depend on how many targets are taken at once.
        if rank == 0 or not isinstance(problem.draws, SampleDraws):
            return 1
        rows = _CPU_ENTRIES // problem.x[0].numel() if problem.x.is_cpu else problem.capacity
        return max(1, rows // left)

    @staticmethod
    def _towards(
        attack: Attack, problem: Problem, wanted: Tensor, rank: int, start: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The attacked images for each column of ``wanted``, all in the same passes."""
        count = wanted.shape[1]
        sample = torch.arange(len(wanted), device=wanted.device).repeat(count)
        part = replace(problem.select(sample), towards=wanted.T.flatten())
        if isinstance(part.draws, SampleDraws):
            ranks = torch.arange(rank, rank + count, device=wanted.device).repeat_interleave(len(wanted))
            part = replace(part, draws=SampleDraws(part.draws.seed, (part.draws.indices << 20) + ranks))
        found = attack.solve(attack.adopt(part), None if start is None else start[sample])
        return tuple(torch.chunk(found, count))

    def _suited(self, classes: int) -> Attack:
        return self.attack.replaced(loss="margin") if self.attack.loss == "dlr" and classes < 4 else self.attack
