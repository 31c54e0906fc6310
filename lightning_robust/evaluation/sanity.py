# SPDX-License-Identifier: Apache-2.0
"""The sanity checks of an evaluation that has just run, on its first samples."""

from dataclasses import replace
from typing import Literal

import torch

from lightning_robust.attacks import Attack
from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.checks import run_checks
from lightning_robust.evaluation.evaluator import RobustnessEvaluator

__all__ = ["SAMPLES", "CheckBudget", "sanity_checks"]

CheckBudget = Literal["quick", "full"]

#: How many samples the checks look at.
SAMPLES: dict[CheckBudget, int] = {"quick": 64, "full": 256}


def sanity_checks(evaluator: RobustnessEvaluator, budget: CheckBudget | None) -> list[Check]:
    """Check what an evaluator measured; with several attacks each check is named after its attack, too.

    Args:
        evaluator: An evaluator that kept samples and has finished.
        budget: How much may be spent; ``None`` for no checks.
    """
    kept, book = evaluator.kept, evaluator.book
    if budget is None or book is None or kept.samples is None:
        return []
    found = []
    attacks = _checkable(evaluator)
    for name, attack in attacks.items():
        with torch.inference_mode(False):
            checks = run_checks(
                evaluator.model,
                kept.samples.x,
                kept.samples.y,
                attack,
                adversarial=kept.points(name, book.ledger),
                indices=kept.samples.index,
                seed=evaluator.seed or 0,
                budget=budget,
            )
        found += checks if len(attacks) == 1 else [replace(check, name=f"{name}/{check.name}") for check in checks]
    return found


def _checkable(evaluator: RobustnessEvaluator) -> dict[str, Attack]:
    """The attacks; of one whose stages have several norms, the first stage of each."""
    assert evaluator.book is not None
    found: dict[str, Attack] = {}
    for name, attack in evaluator.attacks.items():
        stages = [queue.stage for queue in evaluator.book.queues if queue.stage.info.attack == name]
        norms = {stage.info.norm: stage for stage in reversed(stages)}
        if len(norms) == 1:
            found[name] = attack
        else:
            found.update({f"{name}/{stage.info.name}": stage.attack for stage in norms.values()})
    return found
