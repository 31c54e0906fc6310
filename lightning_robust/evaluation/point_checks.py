# SPDX-License-Identifier: Apache-2.0
"""Sanity checks of the points that the attack under test returned."""

from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.judge import fine, warned
from lightning_robust.evaluation.probe import Probe
from lightning_robust.evaluation.watcher import Watcher

__all__ = ["precision", "quantisation", "silent_success", "within_budget"]


def silent_success(probe: Probe, watcher: Watcher, *, tolerance: float = 0.0, slack: int = 0) -> Check:
    """Was an iterate misclassified although the returned point is not?

    A warning means that the attack throws successes away (it returns its last iterate, not its best one), or that the
    model answers differently when asked again. Remedy: ``early_stop=True``, or AutoAttack, which keep the first point
    that fools the model.

    Args:
        probe: What is checked.
        watcher: the watcher through which the attack has run.
        tolerance: largest share of samples that are lost in this way.
        slack: so many samples are never a warning.
    """
    lost = int((watcher.fooled & probe.robust).sum())
    numbers = {"lost": lost, "fooled_on_the_way": int((watcher.fooled & probe.clean_right).sum())}
    if lost > max(slack, tolerance * len(probe)):
        text = f"{lost} of {len(probe)} samples were misclassified on the way but not at the point that the attack "
        return warned("silent-success", text + "returned; set early_stop=True, or use AutoAttack.", numbers)
    return fine("silent-success", "The attack loses no success that it had on its way.", numbers)


def within_budget(probe: Probe, *, tolerance: float = 1e-5) -> Check:
    """Do the returned points keep to the budget and to the possible pixels?

    A warning means that the attack cheats, so its robust accuracy is too low. Remedy: ``projection="ball-box"``, or the
    ``mean``, ``std`` and ``bounds`` of the images.

    Args:
        probe: What is checked.
        tolerance: what rounding may add, relative to the budget and to the range of the pixels.
    """
    low, high = probe.space.bounds
    points = probe.pixels(probe.adversarial)
    sizes = probe.norm.size(points - probe.pixels(probe.x))
    excess = max(low - float(points.min()), float(points.max()) - high, 0.0)
    over = int((sizes > probe.eps * (1 + tolerance) + tolerance * probe.full_range).sum())
    numbers = {"largest_size": float(sizes.max()), "eps": probe.eps, "samples_over": over, "pixels_over": excess}
    if over or not excess <= tolerance * probe.full_range:
        text = f"{over} of {len(probe)} points are outside the budget (up to {float(sizes.max()):.4g} of "
        text += f"{probe.eps:.4g}), pixels leave the bounds by {excess:.3g}; set projection='ball-box' and the true "
        return warned("within-budget", text + "`mean`, `std` and `bounds`.", numbers)
    return fine("within-budget", "All points keep to the budget and the possible pixels.", numbers)


def precision(probe: Probe, *, tolerance: float = 0.01, slack: int = 1) -> Check:
    """Do the points fool the model in float32 as they do in the precision around the evaluation?

    A warning means that autocast (bf16-mixed, 16-mixed) decides some samples: what it calls broken or robust is not so
    in float32. Remedy: evaluate in float32.

    Args:
        probe: What is checked.
        tolerance: largest share of samples that are decided differently.
        slack: so many samples are never a warning.
    """
    around = probe.logits(probe.adversarial, precise=False).argmax(1) == probe.y
    other = int((around != probe.right(probe.adversarial)).sum())
    if other > max(slack, tolerance * len(probe)):
        text = f"{other} of {len(probe)} points are classified differently in float32; evaluate in float32."
        return warned("precision", text, {"different": other})
    return fine("precision", "The points are classified in float32 as in the run's precision.", {"different": other})


def quantisation(probe: Probe, *, levels: int = 255, tolerance: float = 0.02, slack: int = 1) -> Check:
    """Do the points still fool the model when they are stored as 8-bit images?

    A warning means that the robust accuracy of real image files is higher than the one reported, because the attack
    stops right behind the boundary or its perturbations are below half a grey level. Remedy: report both numbers, or
    attack without ``early_stop``, which moves the points further in.

    Args:
        probe: What is checked.
        levels: number of steps between the smallest and the largest pixel.
        tolerance: largest share of samples that rounding repairs.
        slack: so many samples are never a warning.
    """
    low = probe.space.bounds[0]
    unit = probe.full_range / levels
    rounded = ((probe.pixels(probe.adversarial) - low) / unit).round() * unit + low
    right = probe.clean_right & probe.right(probe.images(rounded))
    repaired = int((right & ~probe.robust).sum())
    numbers = {
        "robust_accuracy": float(probe.robust.float().mean()),
        "rounded_accuracy": float(right.float().mean()),
        "repaired": repaired,
    }
    if repaired > max(slack, tolerance * len(probe)):
        text = f"Stored with {levels + 1} grey levels, {repaired} of {len(probe)} points fool the model no more "
        text += f"({numbers['rounded_accuracy']:.1%} instead of {numbers['robust_accuracy']:.1%} right); report both."
        return warned("quantisation", text, numbers)
    return fine("quantisation", "The points fool the model as 8-bit images too.", numbers)
