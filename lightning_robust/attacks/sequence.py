# SPDX-License-Identifier: Apache-2.0
"""Several attacks one after the other, each on the samples that are still right."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.draws import Draws, SampleDraws
from lightning_robust.attacks.losses import labels_of, margin
from lightning_robust.attacks.problem import Problem

__all__ = ["AttackSequence", "Ensemble", "check_members", "flat_stages", "solve_in_order"]


def solve_in_order(attacks: Iterable[Attack], problem: Problem, start: Tensor | None = None) -> Tensor:
    """Run attacks in order, each on the samples that no earlier one has fooled.

    A sample that is misclassified already stays as it is; the others get the first adversarial point that is found. A
    sample that withstands all attacks gets, of the points they returned, the one of the largest logit margin.

    With a stream of random numbers per sample each attack draws from its own seed, so a member finds here what it finds
    when it is called alone.

    Cost: one forward for the clean images and one after each attack, on the samples still right, beside the attacks.

    Args:
        attacks: the attacks.
        problem: the images, and what success means.
        start: where the first attack starts.
    """
    watched = replace(problem, loss=margin, reference=labels_of(problem.y), towards=None)
    x_adv = problem.x.clone()
    best, fooled = watched.judge(x_adv)
    for number, attack in enumerate(attacks):
        left = (~fooled).nonzero().squeeze(1)
        if len(left) == 0:
            break
        part = attack.adopt(_with_own_draws(problem.select(left), attack))
        found = attack.solve(part, start[left] if start is not None and number == 0 else None)
        value, hit = watched.select(left).judge(found)
        better = hit | (value > best[left])
        x_adv[left[better]] = found[better]
        best[left[better]] = value[better]
        fooled[left] = hit
    return x_adv


def flat_stages(attacks: Mapping[str, Attack], num_classes: int) -> dict[str, Attack]:
    """The stages of all attacks in order; those of an ensemble are named "ensemble/stage".

    Args:
        attacks: attacks by name.
        num_classes: number of classes of the attacked model.
    """
    stages: dict[str, Attack] = {}
    for name, attack in attacks.items():
        inner = attack.stages(num_classes)
        if len(inner) == 1:
            stages[name] = next(iter(inner.values()))
        else:
            stages |= {f"{name}/{each}": stage for each, stage in inner.items()}
    return stages


def check_members(attacks: Mapping[str, Attack]) -> Attack:
    """Refuse attacks that cannot share a batch; returns the first one.

    Args:
        attacks: attacks by name.

    Raises:
        ValueError: there is none, or they differ in mode, in what success means, or in their images.
    """
    if not attacks:
        raise ValueError("Expected `attacks` to name at least one attack but got none.")
    first_name, first = next(iter(attacks.items()))
    for name, attack in attacks.items():
        for argument in ("mode", "targeted", "mean", "std", "bounds"):
            own, other = getattr(attack, argument), getattr(first, argument)
            if _plain(own) != _plain(other):
                raise ValueError(
                    f"Expected all attacks to have the same `{argument}` but {first_name!r} has {other!r} and {name!r} "
                    f"has {own!r}."
                )
    return first


class Ensemble(Attack):
    """An attack that consists of others and hands them the problem, instead of taking steps of its own."""

    #: Whether members need classes as targets and choose by themselves where to steer. Said before the first member
    #: runs, because whether a sample reaches the member that needs it depends on the model.
    chooses_targets: ClassVar[bool] = False

    @override
    def adopt(self, problem: Problem) -> Problem:
        name = type(self).__name__
        if self.chooses_targets and problem.y.ndim == 2:
            raise ValueError(f"Expected integer classes [B] for {name} but got probabilities; give y.argmax(1).")
        if self.chooses_targets and problem.towards is not None:
            raise ValueError(f"{name} chooses the classes to steer to itself; call APGD, say, with `towards`.")
        return super().adopt(problem)

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        return x.clone()  # the members draw their own

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        return self.solve(problem, x_adv)

    @property
    @override
    def passes(self) -> float:
        return self.run_passes


class AttackSequence(Ensemble):
    """Attacks one after the other, each only on the samples that all before it left right.

    Returned is per sample the first adversarial point; for a sample that withstands all of them the point of largest
    logit margin among those they returned; for a sample that is misclassified from the start the clean image. Put cheap
    attacks first: what they fool costs the others nothing.

    Cost: that of the members, each on the samples still right, and one forward for the clean images and after each.

    Args:
        attacks: the attacks by name, in their order; all in evaluation mode, of the same image space, and all or none
            of them targeted.

    Shape:
        ``x`` is ``[B, ...]``, ``y`` is ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: no attack, one that is not in evaluation mode, or attacks that differ in their image space.

    Example:
        >>> import torch
        >>> from lightning_robust.attacks import PGD
        >>> attack = AttackSequence(attacks={"ce": PGD(steps=5), "margin": PGD(steps=5, loss="margin")})
        >>> attack(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])).shape
        torch.Size([2, 4])
        >>> list(attack.stages(num_classes=3))
        ['ce', 'margin']
    """

    def __init__(self, *, attacks: dict[str, Attack]) -> None:
        first = check_members(attacks)
        if first.mode != "eval":
            raise ValueError(
                f"Expected attacks with mode='eval' but got {first.mode!r}: leaving samples out changes the batch that "
                "BatchNorm sees."
            )
        super().__init__(
            eps=max(each.eps for each in attacks.values()),
            targeted=first.targeted,
            mean=first.mean,
            std=first.std,
            bounds=first.bounds,
            seed=first.seed,
        )
        self.attacks = dict(attacks)

    @override
    def stages(self, num_classes: int) -> dict[str, Attack]:
        return flat_stages(self.attacks, num_classes)

    @override
    def solve(self, problem: Problem, start: Tensor | None = None) -> Tensor:
        return solve_in_order(self.attacks.values(), problem, start)

    @override
    def at(self, epoch: int, max_epochs: int) -> Attack:
        return self.replaced(attacks={name: each.at(epoch, max_epochs) for name, each in self.attacks.items()})

    @property
    @override
    def run_passes(self) -> float:
        # of a sample that withstands all; the clean prediction and the check after each attack are lone forwards
        return sum(each.passes + 0.5 for each in self.attacks.values()) + 0.5


def _with_own_draws(problem: Problem, attack: Attack) -> Problem:
    draws = problem.draws
    return (
        replace(problem, draws=SampleDraws(attack.seed, draws.indices)) if isinstance(draws, SampleDraws) else problem
    )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
