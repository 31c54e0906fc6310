# SPDX-License-Identifier: Apache-2.0
"""All sanity checks of a robustness evaluation in one call."""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.attacks.conditions import Model
from lightning_robust.attacks.square import Square
from lightning_robust.checks import check_choice
from lightning_robust.evaluation import attack_checks, gradient_checks, model_checks, point_checks
from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.probe import Probe
from lightning_robust.guards import buffers_restored

__all__ = ["BUDGETS", "CHECKS", "Budget", "run_checks"]


@dataclass(frozen=True)
class Budget:
    """How much the checks may cost.

    Args:
        samples: only so many samples are looked at, the first ones.
        steps: steps of the PGD attacks that the checks bring themselves.
        random_points: random points per sample.
        queries: queries of the black-box attack.
        watched_passes: the attack is run once more, watched, when it was run elsewhere and costs at most so many
            passes.
    """

    samples: int
    steps: int
    random_points: int
    queries: int
    watched_passes: float


#: The two sizes of :func:`run_checks`.
BUDGETS = {
    "quick": Budget(samples=64, steps=20, random_points=100, queries=200, watched_passes=100),
    "full": Budget(samples=256, steps=50, random_points=1000, queries=2000, watched_passes=float("inf")),
}

#: The checks by name, in their order.
CHECKS: dict[str, Callable[..., Check]] = {
    "finite": model_checks.finite,
    "input-range": model_checks.input_range,
    "outputs": model_checks.outputs,
    "determinism": model_checks.determinism,
    "batch-independence": model_checks.batch_independence,
    "fixed-state": model_checks.fixed_state,
    "autograd-in-forward": model_checks.autograd_in_forward,
    "within-budget": point_checks.within_budget,
    "precision": point_checks.precision,
    "quantisation": point_checks.quantisation,
    "silent-success": point_checks.silent_success,
    "zero-gradients": gradient_checks.zero_gradients,
    "finite-differences": gradient_checks.finite_differences,
    "single-step": attack_checks.single_step,
    "random-search": attack_checks.random_search,
    "black-box": attack_checks.black_box,
    "unbounded": attack_checks.unbounded,
    "eps-sweep": attack_checks.eps_sweep,
    "convergence": attack_checks.convergence,
    "transfer": attack_checks.transfer,
}

#: These run gradient attacks of their own.
_NEED_GRADIENTS = frozenset({"single-step", "unbounded", "eps-sweep", "convergence"})


def run_checks(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    adversarial: Tensor | None = None,
    indices: Tensor | None = None,
    seed: int = 0,
    budget: Literal["quick", "full"] = "quick",
    surrogate: Model | None = None,
    thresholds: Mapping[str, Mapping[str, Any]] | None = None,
    skip: Collection[str] = (),
    batch_size: int = 64,
) -> list[Check]:
    """Look for the signs that a measured robustness is not there.

    Each check says ``ok`` or ``warn``, with its numbers and, when it warns, the remedy. The checks never decide for the
    user: a warning can have an innocent cause, and no warning is no proof. With non-finite logits only the check
    ``finite`` is returned, because no other means anything then; checks that need gradients are left out for a model
    without any, which ``zero-gradients`` reports.

    Modes, buffers, gradients and random generators are left as they were found.

    Cost: with ``"quick"`` at most 64 samples, each about 220 forward-and-backward passes and 300 forwards, the attack
    itself not counted; with ``"full"`` 256 samples, 500 passes and 2,400 forwards.

    Args:
        model: module or callable ``x -> logits``; a callable may name its module in the attribute ``module``.
        x: clean images ``[B, ...]``; the first ones are used.
        y: classes ``[B]`` or probabilities ``[B, C]``.
        attack: the attack under test: untargeted and with one norm.
        adversarial: the points that it found for these images, if it has been run already.
        indices: index of each sample in its dataset, for the draws of the attacks.
        seed: seed of all random numbers of the checks.
        budget: how much may be spent: ``"quick"`` or ``"full"``.
        surrogate: another model, an undefended copy say, whose adversarial points should not work better.
        thresholds: other thresholds by the name of the check, such as ``{"single-step": {"tolerance": 0.05}}``.
        skip: names of checks to leave out.
        batch_size: images per forward.

    Raises:
        ValueError: an unknown name or threshold, images outside the bounds, or an attack that cannot be checked.

    Example:
        >>> import torch
        >>> from lightning_robust.attacks import PGD
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()
        >>> x = torch.rand(8, 4)
        >>> found = run_checks(model, x, model(x).argmax(1), PGD(eps=0.3, early_stop=True))
        >>> next(check.status for check in found if check.name == "determinism")
        'ok'
    """
    check_choice("budget", budget, tuple(BUDGETS))
    changes = _checked(thresholds or {}, skip)
    size = BUDGETS[budget]
    part = slice(size.samples)
    probe = Probe(
        model,
        x[part],
        y[part],
        attack,
        adversarial=None if adversarial is None else adversarial[part],
        indices=None if indices is None else indices[part],
        seed=seed,
        steps=size.steps,
        batch_size=batch_size,
    )
    found: list[Check] = []
    with torch.inference_mode(False), nullcontext() if probe.module is None else buffers_restored(probe.module):
        for name, function in CHECKS.items():
            if name in skip or (name in _NEED_GRADIENTS and not probe.has_gradient):
                continue
            given = _arguments(name, probe, size, surrogate)
            if given is None:
                continue
            found.append(function(probe, **{**given, **changes.get(name, {})}))
            if found[-1].name == "finite" and found[-1].status == "warn":
                break
    return found


def _arguments(name: str, probe: Probe, size: Budget, surrogate: Model | None) -> dict[str, Any] | None:
    """What a check needs beside the probe; ``None`` if it cannot be run."""
    if name == "random-search":
        return {"points": size.random_points}
    if name == "black-box":
        return {"attack": Square(eps=probe.eps, queries=size.queries, **probe.budget())}
    if name == "transfer":
        return None if surrogate is None else {"surrogate": surrogate}
    if name == "silent-success":
        watcher = probe.watch(size.watched_passes)
        return None if watcher is None else {"watcher": watcher}
    return {}


def _checked(thresholds: Mapping[str, Mapping[str, Any]], skip: Collection[str]) -> dict[str, dict[str, Any]]:
    for name in skip:
        check_choice("skip", name, tuple(CHECKS))
    for name, values in thresholds.items():
        check_choice("thresholds", name, tuple(CHECKS))
        known = [each for each, kind in signature(CHECKS[name]).parameters.items() if kind.kind is kind.KEYWORD_ONLY]
        for threshold in values:
            check_choice(f"thresholds of {name}", threshold, known)
    return {name: dict(values) for name, values in thresholds.items()}
