# SPDX-License-Identifier: Apache-2.0
"""The Square attack: random search with the scores of the model alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.attacks.base import Attack
from lightning_robust.attacks.draws import Draws
from lightning_robust.attacks.norms import NORMS, per_sample
from lightning_robust.attacks.pgd import NormName
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.region import Cube, Region, region
from lightning_robust.attacks.square_moves import (
    Moves,
    bumps,
    draw_moves,
    move_energy,
    set_windows,
    start_grid,
    window_fraction,
    window_size,
)
from lightning_robust.attacks.square_search import SquareSearch
from lightning_robust.checks import check_choice, check_in_range, check_integer, check_positive

__all__ = ["Square"]

#: Queries that are drawn for at once, and on accelerators the queries after which fooled samples leave.
_BLOCK = 64
_SYNC_EVERY = 10


class Square(Attack):
    r"""Square attack: random changes of square windows, kept when they raise the loss; needs no gradient.

    linf: every channel of a window gets :math:`\pm\epsilon`, starting from vertical stripes. l2 and l1: the length of
    two windows is moved into one of them, shaped as a hill beside a valley. With :math:`h \times w` pixels, query
    :math:`i` uses windows of side

    .. math:: s_i = \mathrm{round}\sqrt{p_i h w}, \qquad p_i = p_\mathrm{init}\, 2^{-k_i}

    where :math:`k_i` counts which of 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 the query has passed.

    Being blind to gradients, it is the check on them: where it breaks what gradient attacks do not, these are masked.
    Every sample has windows of its own. A sample leaves with the first point that fools the model; one that the clean
    image fools stays there; of others the point of highest loss is returned.

    Cost: at most ``queries + 2`` forwards (times ``eot``) and no backward; fewer as samples leave. Where few samples
    are left, up to 8 queries of each are tried in one forward, a few percent of them in vain; the result is the same.

    Args:
        eps: radius of the budget in pixel units.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        queries: proposals after the start.
        p_init: fraction of the pixels that the first windows cover.
        rescale_schedule: stretch the schedule, made for 10000 queries, to ``queries``; AutoAttack does not.
        restarts: independent runs for samples that are not fooled.
        loss: ``"margin"``, ``"ce"`` (the authors' choice when targeted) or another loss of the scores.
        targeted: ``y`` is the class to reach.
        eot: for randomised models: each query is the mean loss of that many forwards, and no sample leaves.
        mean: mean per channel, if the images are normalised; ``eps`` and ``bounds`` stay in pixel units.
        std: standard deviation per channel, if the images are normalised.
        bounds: smallest and largest possible pixel.
        seed: seed of the attack's own generator, used when a call brings none, and of the streams of ``indices``.

    Shape:
        ``x`` is ``[B, C, H, W]``, with any H and W; signals ``[B, C, L]`` are images of one row, and vectors
        ``[B, d]`` images of one row and one channel.

    Raises:
        ValueError: an argument out of range, or (when called) images of more dimensions.

    References:
        Andriushchenko et al., Square Attack, arXiv 1912.00049; l1 from Croce and Hein, arXiv 2103.01208. Where
        AutoAttack's code draws one window for a batch, never reaches the last row and column, and fails in l2 and l1
        for sides such as 12 and 24, this one draws per sample, reaches all pixels and takes any size.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
        >>> x_adv = Square(eps=0.1, queries=20)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    def __init__(
        self,
        *,
        eps: float = 8 / 255,
        norm: NormName = "linf",
        queries: int = 5000,
        p_init: float = 0.8,
        rescale_schedule: bool = False,
        restarts: int = 1,
        loss: Literal["margin", "ce", "dlr", "prob-margin"] = "margin",
        targeted: bool = False,
        eot: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        check_choice("norm", norm, ("linf", "l2", "l1"))
        check_choice("loss", loss, ("margin", "ce", "dlr", "prob-margin"))
        check_integer("queries", queries, 0)
        check_integer("eot", eot, 1)
        check_positive("p_init", p_init)
        check_in_range("p_init", p_init, 0, 1)
        super().__init__(
            eps=eps,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            early_stop=eot == 1,
            mean=mean,
            std=std,
            bounds=bounds,
            seed=seed,
        )
        self.norm, self.queries, self.p_init, self.eot = norm, queries, p_init, eot
        self.rescale_schedule = rescale_schedule
        self._order = {"linf": 0, "l2": 2, "l1": 1}[norm]

    @override
    def draw_start(self, x: Tensor, draws: Draws, scale: Tensor | None = None) -> Tensor:
        grid = _as_images(x)
        if self.norm == "linf":
            stripes = 2 * draws.integers(grid[:, :, :1], 2) - 1
            return self.space.clip(x + self._signed(x, stripes))
        return x + self._scaled(start_grid(grid, draws, self._order).view_as(x))

    @override
    def run(self, problem: Problem, x_adv: Tensor) -> Tensor:
        if self.eps == 0:
            return problem.x.clone()
        area = region(self.norm, problem.x, self.eps, self.space, problem.dtype)
        best = self._first(problem, area.project(x_adv))
        if not x_adv.is_cpu:
            problem = replace(problem, check=False)  # the first queries have been looked at
        patience = _leave_every(x_adv)
        search = SquareSearch(problem, area, best, self._judge, ahead=self.eot == 1, patience=patience)
        for begin in range(0, self.queries, _BLOCK):
            grid = _as_images(search.problem.x)
            sizes = self._sizes(begin, *grid.shape[2:])
            moves = draw_moves(search.problem.draws, grid, sizes)
            for size, steps in groupby(range(len(sizes)), sizes.__getitem__):
                first, *rest = steps
                shapes = bumps(*size, self._order, grid) if self._order else None
                propose = partial(self._propose, size=size, shapes=shapes)
                moves = search.run(moves, first, first + len(rest) + 1, propose)
                if not len(search):
                    return search.result()
        return search.result()

    @property
    @override
    def run_passes(self) -> float:
        return 0.5 * self.eot * (self.queries + 1 + (self.eot == 1))

    def _first(self, problem: Problem, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, fooled = self._judge(problem, x_adv)
        if self.eot > 1:
            return x_adv, loss, fooled
        _, already = self._judge(problem, problem.x)
        return torch.where(per_sample(already, x_adv), problem.x, x_adv), loss, fooled | already

    def _judge(self, problem: Problem, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        loss, fooled = problem.judge(x_adv)
        if self.eot == 1:
            return loss, fooled
        for _ in range(self.eot - 1):
            loss = loss + problem.judge(x_adv)[0]
        # one forward says nothing certain of a randomised model, so no sample is fooled for good
        return loss / self.eot, torch.zeros_like(fooled)

    def _sizes(self, begin: int, height: int, width: int) -> list[tuple[int, int]]:
        stretch = 10_000 / self.queries if self.rescale_schedule else 1
        block = range(begin, min(begin + _BLOCK, self.queries))
        fractions = [window_fraction(int(query * stretch), self.p_init) for query in block]
        return [window_size(fraction, height, width, bumps=self.norm != "linf") for fraction in fractions]

    def _propose(
        self, area: Region, x_adv: Tensor, moves: Moves, size: tuple[int, int], shapes: Tensor | None
    ) -> Tensor:
        if shapes is None:
            assert isinstance(area, Cube)
            low, high = _as_images(area.low), _as_images(area.high)
            return set_windows(_as_images(x_adv), low, high, moves, size).view_as(x_adv)
        x = area.x
        delta = _as_images(self.space.to_pixels(x_adv - x))
        moved = move_energy(delta, moves, shapes, self._order, self.eps)
        return area.project(x + self._scaled(moved.view_as(x)))

    def _signed(self, x: Tensor, signs: Tensor) -> Tensor:
        return self.space.from_pixels(self.eps * signs.to(x).expand_as(_as_images(x)).reshape(x.shape))

    def _scaled(self, delta: Tensor) -> Tensor:
        if self.norm == "l2":  # the whole budget is used; in l1 the projection sees to that
            delta = delta * per_sample(self.eps / (NORMS["l2"].size(delta) + 1e-12), delta)
        return self.space.from_pixels(delta)


def _as_images(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x
    if x.ndim == 2:
        return x[:, None, None]
    if x.ndim == 3:
        return x[:, :, None]
    raise ValueError(
        f"Expected images [B, C, H, W], signals [B, C, L] or vectors [B, d] for windows but got {list(x.shape)}; "
        "flatten the further dimensions into channels or into the rows inside the model."
    )


def _leave_every(x: Tensor) -> int:
    return 1 if x.is_cpu else _SYNC_EVERY
