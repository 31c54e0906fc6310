# SPDX-License-Identifier: Apache-2.0
"""Robustness of a plain PyTorch model in one call."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks.conditions import Model, unwrap
from lightning_robust.checks import check_choice, check_integer
from lightning_robust.evaluation.evaluator import RobustnessEvaluator
from lightning_robust.evaluation.plan import Attacks, Mode
from lightning_robust.evaluation.progress import RobustnessProgress
from lightning_robust.evaluation.report import RobustnessReport
from lightning_robust.evaluation.report_build import build_report
from lightning_robust.evaluation.sanity import SAMPLES, CheckBudget, sanity_checks
from lightning_robust.evaluation.stage_runner import CraftDtype

__all__ = ["evaluate_robustness"]


def evaluate_robustness(
    model: Model,
    batches: Iterable[Any],
    attacks: Attacks,
    *,
    mode: Mode = "exact",
    seed: int | None = None,
    batch_size: int | None = None,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    craft_dtype: CraftDtype | None = None,
    eight_bit: bool = True,
    checks: CheckBudget | None = None,
    state_dir: str | Path | None = None,
    unpack: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    progress: bool = False,
) -> RobustnessReport:
    """Measure how many samples withstand attacks, every returned point verified, as a report that can be trusted.

    The loader has to bring the same images in the same order each time: the position of a sample is its index, on
    which the attacks' random draws depend. See `lightning_robust.evaluation.RobustnessEvaluator` for how it runs.

    Cost: one forward per sample; per attacked sample that of the attacks and one forward or two; `checks` on top.

    Args:
        model: A module, or a callable ``x -> logits`` that may name its module in the attribute ``module``.
        batches: Batches of the test set, a loader that does not shuffle.
        attacks: One attack, or several by name.
        mode: ``"exact"``: every attack on all correct samples; ``"union"``: each on those that the ones before it
            left, which is cheaper when only the union matters.
        seed: Seed in place of those of the attacks; theirs when not given.
        batch_size: Samples per attacked batch; that of the loader when not given.
        max_samples: Evaluate only this many samples, the first ones.
        device: Where to run; where the model is when not given.
        craft_dtype: Run the attacks under autocast in ``"bfloat16"`` or ``"float16"``; points are verified in float32.
        eight_bit: Look at adversarial points after rounding to 8 bits as well.
        checks: Make the sanity checks of `lightning_robust.evaluation.run_checks`, ``"quick"`` or ``"full"``.
        state_dir: Folder for flags and adversarial points from which a killed evaluation continues.
        unpack: Reads images and labels from a batch; its first two entries by default.
        progress: Show how far it is.

    Raises:
        ValueError: An attack that cannot be evaluated, a `state_dir` of another evaluation, images, classes or logits
            that make no sense, or no sample.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> model = torch.nn.Linear(4, 3)
        >>> batches = [(torch.rand(8, 4), torch.randint(3, (8,)))]
        >>> report = evaluate_robustness(model, batches, {"linf": PGD(eps=0.1), "l2": PGD(norm="l2", eps=0.2)})
        >>> report.robust_accuracy <= min(attack.robust_accuracy for attack in report.attacks)
        True
    """
    check_choice("checks", checks, (None, *SAMPLES))
    if max_samples is not None:
        check_integer("max_samples", max_samples, 1)
    place = _place(model, device)
    with ExitStack() as stack:
        shown = stack.enter_context(RobustnessProgress()) if progress else None
        evaluator = RobustnessEvaluator(
            model,
            attacks,
            mode=mode,
            seed=seed,
            batch_size=batch_size,
            craft_dtype=craft_dtype,
            eight_bit=eight_bit,
            state_dir=state_dir,
            total=_total(batches, max_samples),
            progress=shown,
            keep=0 if checks is None else SAMPLES[checks],
        )
        taken = 0
        for batch in batches:
            x, y = (batch[0], batch[1]) if unpack is None else unpack(batch)
            count = len(x) if max_samples is None else min(len(x), max_samples - taken)
            evaluator.feed(x[:count].to(place), y[:count].to(place), torch.arange(taken, taken + count))
            taken += count
            if taken == max_samples:
                break
        shard = evaluator.finish()
    return build_report([shard], sanity_checks(evaluator, checks))


def _place(model: Model, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    module: nn.Module | None = unwrap(model)[1]
    parameter = None if module is None else next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _total(batches: Iterable[Any], max_samples: int | None) -> int | None:
    """Number of samples that a loader says it has."""
    dataset: Any = getattr(batches, "dataset", None)
    if not hasattr(dataset, "__len__"):
        return max_samples
    return len(dataset) if max_samples is None else min(len(dataset), max_samples)
