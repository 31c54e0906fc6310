# SPDX-License-Identifier: Apache-2.0
"""The best of several runs of an attack, sample by sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.attacks.climb import choose
from lightning_robust.attacks.problem import Problem

__all__ = ["best_of_runs"]


def best_of_runs(
    problem: Problem,
    x_adv: Tensor,
    run: Callable[[Problem, Tensor], Tensor],
    starts: Callable[[], Tensor],
    count: int,
    *,
    only_robust: bool,
) -> Tensor:
    """Per sample the first point that fools the model, else that of the highest loss.

    Args:
        problem: the images and the loss.
        x_adv: what the first run found.
        run: one more run, from a start.
        starts: draws a start for all samples.
        count: number of further runs.
        only_robust: leave samples that are fooled out of further runs.
    """
    loss, fooled = problem.judge(x_adv)
    for _ in range(count):
        # drawn for all samples, so that the draws of one do not depend on the success of another
        start = starts()
        left = (~fooled).nonzero().squeeze(1) if only_robust else torch.arange(len(x_adv), device=x_adv.device)
        if len(left) == 0:
            break
        part = problem.select(left)
        candidate = run(part, start[left])
        new_loss, new_fooled = part.judge(candidate)
        better = ~fooled[left] & (new_fooled | (new_loss > loss[left]))
        kept = choose(better, candidate, x_adv[left])
        x_adv = x_adv.index_copy(0, left, kept)
        loss = loss.index_copy(0, left, torch.where(better, new_loss, loss[left]))
        fooled = fooled.index_copy(0, left, fooled[left] | new_fooled)
    return x_adv
