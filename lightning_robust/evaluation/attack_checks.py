# SPDX-License-Identifier: Apache-2.0
"""Sanity checks that compare the attack with other attacks: weaker, larger, longer, blind."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lightning_robust.attacks import FGSM, Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.draws import GeneratorDraws
from lightning_robust.attacks.losses import ATTACK_LOSSES
from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.judge import fine, warned
from lightning_robust.evaluation.probe import Probe
from lightning_robust.losses import full_precision

__all__ = ["black_box", "convergence", "eps_sweep", "random_search", "single_step", "transfer", "unbounded"]


def single_step(probe: Probe, *, tolerance: float = 0.02, slack: int = 1) -> Check:
    """Does one step break samples that the attack under test does not?

    A warning means masked gradients (the loss surface is so rough that steps lose their way) or a bug in the attack.
    Remedy: more steps and restarts, a smaller step, AutoAttack.

    Args:
        probe: What is checked.
        tolerance: largest share of samples that only the single step breaks.
        slack: so many samples are never a warning.
    """
    one = probe.survivors(FGSM(eps=probe.eps, **probe.budget()))
    only = int((probe.robust & ~one).sum())
    numbers = {"single_step_accuracy": _mean(one), "attack_accuracy": _mean(probe.robust), "only_single_step": only}
    if only > max(slack, tolerance * len(probe)):
        text = f"One step (FGSM) breaks {only} of {len(probe)} samples that the attack does not: masked gradients or "
        return warned("single-step", text + "too few steps; use AutoAttack.", numbers)
    return fine("single-step", "One step (FGSM) is no better than the attack.", numbers)


def black_box(probe: Probe, attack: Attack, *, tolerance: float = 0.002, slack: int = 1) -> Check:
    """Does an attack without gradients break samples that the attack under test does not?

    A warning means that the gradients mislead: a score-based search with few queries should not beat them. Remedy:
    count the black-box attack in (AutoAttack does), and look for what hides the gradients.

    Args:
        probe: What is checked.
        attack: an attack that uses no gradients, within the same budget.
        tolerance: largest share of samples that only the black-box attack breaks.
        slack: so many samples are never a warning.
    """
    blind = probe.survivors(attack)
    only = int((probe.robust & ~blind).sum())
    numbers = {"black_box_accuracy": _mean(blind), "attack_accuracy": _mean(probe.robust), "only_black_box": only}
    if only > max(slack, tolerance * len(probe)):
        text = f"{type(attack).__name__}, which sees no gradients, breaks {only} of {len(probe)} samples that the "
        return warned("black-box", text + "attack does not: masked gradients; use AutoAttack.", numbers)
    return fine("black-box", "An attack without gradients is no better than the attack.", numbers)


def random_search(probe: Probe, *, points: int = 100, tolerance: float = 0.0, slack: int = 0) -> Check:
    """Do random points of the budget break samples that the attack under test does not?

    A warning means that the attack misses what blind chance finds: masked gradients, or noise in the model. Remedy: as
    for the black-box check; for a noisy model average over its draws.

    Args:
        probe: What is checked.
        points: random points per sample, drawn uniformly in the ball.
        tolerance: largest share of samples that only random points break.
        slack: so many samples are never a warning.
    """
    left = probe.robust.nonzero().squeeze(1)
    claimed = len(left)
    attack = probe.pgd(steps=1)
    generator = torch.Generator(probe.x.device).manual_seed(probe.seed)
    for _ in range(points):
        if len(left) == 0:
            break
        delta = _uniform(probe, probe.x[left], generator)
        left = left[probe.right(attack.feasible(probe.x[left], delta), left)]
    broken = claimed - len(left)
    numbers = {"points": points, "broken": broken, "claimed_robust": claimed}
    if broken > max(slack, tolerance * len(probe)):
        text = f"{points} random points break {broken} of {claimed} samples that the attack calls robust: masked "
        return warned("random-search", text + "gradients or a noisy model; use AutoAttack.", numbers)
    return fine("random-search", f"{points} random points break no robust sample.", numbers)


def unbounded(probe: Probe, *, tolerance: float = 0.05) -> Check:
    """Does an attack without a budget reach 0%?

    The attack starts at the clean images and may move every pixel over its whole range, so nothing but a bad gradient
    keeps it from reaching another class. A warning means masked or missing gradients, or a bug in the attack. Remedy:
    another loss (``"margin"``, ``"dlr"``), more steps, BPDA.

    Args:
        probe: What is checked.
        tolerance: largest accuracy that may be left.
    """
    eps = probe.full_range
    attack = probe.pgd(eps=eps, norm="linf", random_start=False, step_size=eps / 4)
    accuracy = _mean(probe.survivors(attack))
    numbers = {"accuracy": accuracy, "eps": eps}
    if accuracy > tolerance:
        text = f"Without a budget {accuracy:.1%} of the samples still withstand the attack: masked gradients; try "
        return warned("unbounded", text + "loss='margin', more steps or BPDA.", numbers)
    return fine("unbounded", f"Without a budget the accuracy falls to {accuracy:.1%}.", numbers)


def eps_sweep(
    probe: Probe, *, factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0), tolerance: float = 0.02, slack: int = 1
) -> Check:
    """Does the accuracy fall as the budget grows?

    A warning means that a larger budget helps the model, or that nothing changes from the smallest to the largest
    budget although the accuracy is above zero: masked gradients. Remedy: as for the unbounded check.

    Args:
        probe: What is checked.
        factors: the radii, as multiples of the budget, ascending.
        tolerance: largest rise of the accuracy between two radii.
        slack: a rise of so many samples is never a warning.
    """
    accuracies = [_mean(probe.survivors(probe.pgd(eps=factor * probe.eps))) for factor in factors]
    numbers = {f"accuracy_{factor:g}": value for factor, value in zip(factors, accuracies, strict=True)}
    rise = max([later - sooner for sooner, later in pairwise(accuracies)], default=0.0)
    numbers["largest_rise"] = rise
    shown = ", ".join(f"{value:.1%}" for value in accuracies)
    if rise * len(probe) > max(slack, tolerance * len(probe)):
        text = f"The accuracy rises with the budget ({shown}): masked gradients or too few steps; use AutoAttack."
        return warned("eps-sweep", text, numbers)
    if probe.eps > 0 and accuracies[-1] > 0 and accuracies[-1] >= accuracies[0]:
        text = f"The accuracy does not fall from {factors[0]:g} to {factors[-1]:g} times the budget ({shown}): masked "
        return warned("eps-sweep", text + "gradients; use AutoAttack.", numbers)
    return fine("eps-sweep", f"The accuracy falls with the budget ({shown}).", numbers)


def convergence(probe: Probe, *, factor: int = 4, tolerance: float = 0.01, slack: int = 1) -> Check:
    """Do more steps help?

    Attacks with PGD of several times the steps, once with the loss of the attack and once, on what is left, with the
    margin. A warning means that the attack stops too early: its robust accuracy is not a minimum yet. Remedy: more
    steps or restarts, another loss; ``loss_falls`` is the share of steps in which the mean loss of the samples that are
    still right went down: when it is large, the step is too long.

    Args:
        probe: What is checked.
        factor: how many times the steps of the attack (of the checks, if it has none).
        tolerance: largest share of samples that only the longer attack breaks.
        slack: so many samples are never a warning.
    """
    steps = factor * max(int(getattr(probe.attack, "steps", probe.steps)), probe.steps)
    longer = probe.pgd(steps=steps)
    left = probe.robust & probe.survivors(longer)
    if bool(left.any()) and longer.loss != "margin":
        left = left & probe.survivors(longer.replaced(loss="margin"))
    more = int((probe.robust & ~left).sum())
    numbers: dict[str, float | int | None] = {
        "steps": steps,
        "only_longer": more,
        "attack_accuracy": _mean(probe.robust),
        "longer_accuracy": _mean(left),
    }
    numbers |= _course_numbers(_course(probe, left))
    if more > max(slack, tolerance * len(probe)):
        text = f"PGD with {steps} steps breaks {more} of {len(probe)} samples more: the attack has not converged; give "
        return warned("convergence", text + "it more steps or restarts, or use AutoAttack.", numbers)
    return fine("convergence", f"PGD with {steps} steps breaks hardly more.", numbers)


def transfer(probe: Probe, surrogate: Model, *, tolerance: float = 0.002, slack: int = 1) -> Check:
    """Do points made for another model break samples that the attack under test does not?

    A warning means that the gradients of another model, an undefended copy say, are of more use than the model's own:
    masked gradients. Remedy: as for the black-box check.

    Args:
        probe: What is checked.
        surrogate: the other model; it takes the same images.
        tolerance: largest share of samples that only the transferred points break.
        slack: so many samples are never a warning.
    """
    # the points that fool the surrogate most, not the first that do
    found = probe.points(probe.pgd(early_stop=False), surrogate)
    withstood = probe.clean_right & probe.right(found)
    only = int((probe.robust & ~withstood).sum())
    numbers = {"transfer_accuracy": _mean(withstood), "attack_accuracy": _mean(probe.robust), "only_transfer": only}
    if only > max(slack, tolerance * len(probe)):
        text = f"Points made for the surrogate break {only} of {len(probe)} samples that the attack does not: masked "
        return warned("transfer", text + "gradients; use AutoAttack.", numbers)
    return fine("transfer", "Points made for the surrogate are no better than the attack.", numbers)


def _mean(values: Tensor) -> float:
    return float(values.float().mean())


def _uniform(probe: Probe, x: Tensor, generator: torch.Generator) -> Tensor:
    """Perturbations in pixel units, uniform in the ball."""
    return probe.norm.uniform(full_precision(x), probe.eps, GeneratorDraws(generator))


def _course(probe: Probe, chosen: Tensor) -> Tensor | None:
    """Mean loss at each iterate of the checks' PGD over some of the samples; ``None`` without any."""
    rows = chosen.nonzero().squeeze(1)[: probe.batch_size]
    attack = probe.pgd(early_stop=False)
    if len(rows) == 0:
        return None
    followed = _Followed(probe, rows, ATTACK_LOSSES[attack.loss])
    attack(followed, probe.x[rows], probe.targets[rows], indices=probe.indices[rows])
    return torch.stack(followed.losses)


def _course_numbers(losses: Tensor | None) -> dict[str, float]:
    if losses is None or len(losses) < 2:
        return {}
    gain = (losses[-1] - losses[0]).clamp(min=torch.finfo(losses.dtype).tiny)
    late = losses[-1] - losses[-1 - len(losses) // 5]
    return {"loss_falls": float((losses.diff() < 0).float().mean()), "late_gain": float(late / gain)}


class _Followed:
    """The model, noting the mean loss of every forward."""

    def __init__(self, probe: Probe, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.module = probe.module
        self.losses: list[Tensor] = []
        self._probe, self._rows, self._loss = probe, rows, loss

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._probe.network(x)
        self.losses.append(self._loss(full_precision(logits.detach()), self._probe.y[self._rows]).mean())
        return logits
