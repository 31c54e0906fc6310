# SPDX-License-Identifier: Apache-2.0
"""The queries of the Square attack: one after the other, or several ahead where few samples are left."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.attacks.norms import per_sample
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.region import Region
from lightning_robust.attacks.square_moves import Moves

__all__ = ["SquareSearch"]

Judge = Callable[[Problem, Tensor], tuple[Tensor, Tensor]]
Propose = Callable[[Region, Tensor, Moves], Tensor]

#: Most queries of a sample in one forward, and the part of the queries that may be tried in vain.
_MOST_AHEAD = 8
_IN_VAIN = 0.1
#: From how large a batch on there is nothing to gain: what leaves a CPU's cache, and what fills an accelerator.
_CPU_ENTRIES = 2**17
_DEVICE_ROWS = 1024


class SquareSearch:
    """The best points so far of the samples that are still right, and how the next queries change them.

    Queries are rarely accepted. So where a forward of few images wastes most of its time, several queries of a sample
    are proposed from the same point and judged in one forward; the first accepted one counts, and those after it are
    tried again from the new point. The result is that of one query after the other.

    Args:
        problem: images and loss.
        area: the budget around the images.
        best: points to start from, their loss, and whether they fool the model.
        judge: loss and success of images; one forward.
        ahead: whether to try several queries in one forward.
        patience: queries after which samples that are fooled leave.
    """

    def __init__(
        self,
        problem: Problem,
        area: Region,
        best: tuple[Tensor, Tensor, Tensor],
        judge: Judge,
        *,
        ahead: bool,
        patience: int,
    ) -> None:
        self.problem, self.area, self._judge = problem, area, judge
        self._x_adv, self._loss, self._fooled = best
        self._result, self._left = problem.x.clone(), torch.arange(len(problem.x), device=problem.x.device)
        self._ahead, self._patience, self._waited = ahead, patience, patience
        # without a graph, eight times as many images take no more memory than the passes of other attacks
        most = _CPU_ENTRIES // problem.x[0].numel() if problem.x.is_cpu else _DEVICE_ROWS
        self._rows = min(most, 8 * len(problem.x))
        self._accepted = 1.0

    def __len__(self) -> int:
        return len(self._left)

    def result(self) -> Tensor:
        """The best points of all samples."""
        self._result[self._left] = self._x_adv
        return self._result

    def run(self, moves: Moves, first: int, last: int, propose: Propose) -> Moves:
        """Queries with windows of one size.

        Args:
            moves: draws of the queries of a block, for the samples that are left.
            first: number of the first query in the block.
            last: number after the last query.
            propose: makes candidates of points and moves.

        Returns:
            The draws of the samples that are left now.
        """
        step = first
        while step < last:
            moves = self._leave(moves)
            if not len(self):
                break
            ahead = min(last - step, self._how_far())
            if ahead == 1:
                self._next_query(moves.at(step), propose)
                step += 1
            else:
                self._queries_ahead(moves, step, last, ahead, propose)
                step = last
        return moves

    def _how_far(self) -> int:
        if not self._room():
            return 1
        return max(1, min(_MOST_AHEAD, self._rows // len(self), int(2 * _IN_VAIN / max(self._accepted, 1e-3))))

    def _room(self) -> bool:
        return self._ahead and self._rows >= 2 * len(self)

    def _leave(self, moves: Moves) -> Moves:
        self._waited += 1
        if self._waited < self._patience or not self._fooled.any():
            return moves
        self._waited = 0
        self._result[self._left] = self._x_adv
        kept = (~self._fooled).nonzero().squeeze(1)
        self._left, self.problem = self._left[kept], self.problem.select(kept)
        self._x_adv, self._loss, self._fooled = self._x_adv[kept], self._loss[kept], self._fooled[kept]
        self.area.keep(kept)
        return moves.select(kept)

    def _next_query(self, move: Moves, propose: Propose) -> None:
        candidate = propose(self.area, self._x_adv, move)
        loss, fooled = self._judge(self.problem, candidate)
        better = ~self._fooled & (fooled | (loss > self._loss))
        # torch.where would take four times as long on a CPU; of finite numbers it is the same
        taken = per_sample(better, candidate).to(candidate)
        self._x_adv = torch.lerp(self._x_adv, candidate, taken)
        self._loss, self._fooled = torch.where(better, loss, self._loss), self._fooled | fooled
        if self._room():
            self._learn(better)

    def _queries_ahead(self, moves: Moves, first: int, last: int, ahead: int, propose: Propose) -> None:
        places = torch.arange(ahead, device=self._left.device)
        step = torch.full_like(self._left, first)  # each sample goes at its own pace
        while True:
            queries = step[:, None] + places
            sample, place = ((queries < last) & ~self._fooled[:, None]).nonzero(as_tuple=True)
            if not len(sample):
                return
            area = copy.copy(self.area)
            area.keep(sample)
            candidate = propose(area, self._x_adv.index_select(0, sample), moves.pick(sample, queries[sample, place]))
            loss, fooled = self._judge(self.problem.select(sample), candidate)
            better = fooled | (loss > self._loss[sample])
            accepted = torch.full_like(queries, ahead)
            accepted[sample, place] = torch.where(better, place, ahead)
            accepted = accepted.amin(1)
            row = (place == accepted[sample]).nonzero().squeeze(1)
            self._x_adv[sample[row]], self._loss[sample[row]] = candidate[row], loss[row]
            self._fooled[sample[row]] = fooled[row]
            step = step + (accepted + 1).clamp(max=ahead)
            self._learn(better)

    def _learn(self, better: Tensor) -> None:
        self._accepted += 0.1 * (float(better.float().mean()) - self._accepted)
