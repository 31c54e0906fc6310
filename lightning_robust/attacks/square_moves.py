# SPDX-License-Identifier: Apache-2.0
"""Where the Square attack starts and what it tries next, for every norm; knows no model."""

import bisect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.draws import Draws

__all__ = [
    "Moves",
    "bumps",
    "draw_moves",
    "move_energy",
    "set_windows",
    "start_grid",
    "window_fraction",
    "window_size",
]

#: After how many queries (of 10 000) the windows become half as large.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Moves:
    """What is drawn for some queries: one window per sample to write to, one to take from, signs and an orientation.

    Args:
        corners: upper left corners ``[B, N, 4]``: row and column of the first window, row and column of the second.
        signs: ``[B, N, C]``, of each channel.
        turned: ``[B, N]``, 0 or 1: which way a bump is split.
    """

    corners: Tensor
    signs: Tensor
    turned: Tensor

    def select(self, index: Tensor) -> "Moves":
        """The draws of some of the samples."""
        return Moves(self.corners[index], self.signs[index], self.turned[index])

    def pick(self, index: Tensor, step: Tensor) -> "Moves":
        """The draws of query ``step[i]`` of sample ``index[i]``, without the dimension N."""
        return Moves(self.corners[index, step], self.signs[index, step], self.turned[index, step])

    def at(self, step: int) -> "Moves":
        """The draws of query ``step``, without the dimension N."""
        return Moves(self.corners[:, step], self.signs[:, step], self.turned[:, step])


def window_fraction(query: int, p_init: float) -> float:
    """Fraction of the pixels that query number ``query`` (from 0, of 10 000) changes.

    Args:
        query: number of the query.
        p_init: fraction of the first queries.

    Example:
        >>> [window_fraction(query, 0.8) for query in (0, 10, 11, 51)]
        [0.8, 0.8, 0.4, 0.2]
    """
    return float(p_init / 2 ** bisect.bisect_left(_HALVED_AFTER, query))


def window_size(fraction: float, height: int, width: int, bumps: bool = False) -> tuple[int, int]:
    """Rows and columns of a window: a square of that fraction of the image, or what fits of it.

    Args:
        fraction: part of the pixels to cover.
        height: of the image.
        width: of the image; if the square does not fit, the other side grows to cover the same area.
        bumps: odd sides of at least 3, as bumps need them.

    Example:
        >>> window_size(0.5, 32, 32), window_size(0.5, 1, 64)
        ((23, 23), (1, 32))
    """
    area = fraction * height * width

    def side(value: float) -> int:
        whole = round(value)
        return max(whole + (whole % 2 == 0), 3) if bumps else max(whole, 1)

    square = side(math.sqrt(area))
    rows, columns = min(square, height), min(square, width)
    if square > height:
        columns = min(max(columns, side(area / height)), width)
    if square > width:
        rows = min(max(rows, side(area / width)), height)
    return rows, columns


def draw_moves(draws: Draws, x: Tensor, sizes: list[tuple[int, int]]) -> Moves:
    """Draws for one query per entry of ``sizes``, made at once because a draw per query would cost more than its move.

    Args:
        draws: where random numbers come from.
        x: images ``[B, C, H, W]``.
        sizes: rows and columns of the windows of each query.
    """
    batch, channels, height, width = x.shape
    # the last row and column are reached: a window of s rows has H - s + 1 places
    places = torch.tensor([[height - rows + 1, width - columns + 1] * 2 for rows, columns in sizes], device=x.device)
    corners = draws.integers(x.new_empty(batch, len(sizes), 4), places)
    signs = draws.integers(x.new_empty(batch, len(sizes), channels), 2)
    turned = draws.integers(x.new_empty(batch, len(sizes)), 2)
    return Moves(corners, (2 * signs - 1).to(x.dtype), turned)


def set_windows(x: Tensor, low: Tensor, high: Tensor, moves: Moves, size: tuple[int, int]) -> Tensor:
    """The images with the first window of each set, in every channel, to its lowest or highest values by the sign.

    Args:
        x: images ``[B, C, H, W]``.
        low: lowest values, shaped like the images.
        high: highest values.
        moves: the draws of one query.
        size: rows and columns of the windows.
    """
    index = _window_index(moves.corners[:, :2], size, x.shape[3]).unsqueeze(1).expand(-1, x.shape[1], -1)
    lowest, highest = (bound.flatten(2).gather(2, index) for bound in (low, high))
    values = torch.where(moves.signs.unsqueeze(2) > 0, highest, lowest)
    return x.flatten(2).scatter(2, index, values).view_as(x)


def bumps(rows: int, columns: int, order: int, like: Tensor) -> Tensor:
    """Two windows ``[2, rows, columns]`` of length one: a hill beside a valley, split by rows and by columns.

    Args:
        rows: of the window.
        columns: of the window.
        order: 1 or 2, of the norm; hills are steeper in l1.
        like: gives the type and the device.
    """
    by_rows = [_hill(rows // 2, columns, order, like), -_hill(rows - rows // 2, columns, order, like)]
    by_columns = [_hill(rows, columns // 2, order, like), -_hill(rows, columns - columns // 2, order, like)]
    pair = torch.stack([torch.cat(by_rows, 0), torch.cat(by_columns, 1)])
    length = torch.linalg.vector_norm(pair, ord=order, dim=(1, 2), keepdim=True)
    shapes: Tensor = pair / length
    return shapes


def start_grid(x: Tensor, draws: Draws, order: int) -> Tensor:
    """Perturbations that fill the image with about 5 x 5 bumps of random signs and orientations.

    Args:
        x: images ``[B, C, H, W]``, of any height and width.
        draws: where random numbers come from.
        order: 1 or 2, of the norm.
    """
    batch, channels, height, width = x.shape
    rows, columns = max(height // 5, 1), max(width // 5, 1)
    down, across = height // rows, width // columns
    turned = draws.integers(x.new_empty(batch, 1, down, across), 2)
    signs = 2 * draws.integers(x.new_empty(batch, channels, down, across), 2) - 1
    tiles = bumps(rows, columns, order, x)[turned] * signs[..., None, None]
    grid = tiles.transpose(3, 4).reshape(batch, channels, down * rows, across * columns)
    top, left = (height - down * rows) // 2, (width - across * columns) // 2
    return torch.nn.functional.pad(grid, (left, width - across * columns - left, top, height - down * rows - top))


def move_energy(delta: Tensor, moves: Moves, shapes: Tensor, order: int, eps: float) -> Tensor:
    r"""The length of a window, and what is left of the budget, moved to another window and shaped as a bump.

    .. math:: \delta_{W_2} = 0, \qquad \delta_{W_1} = r\, \frac{v}{\|v\|_p},\qquad
        v = \pm b + \frac{\delta_{W_1}}{\|\delta_{W_1}\|_p}

    per channel, with :math:`r^p = \|\delta_{W_1 \cup W_2}\|_p^p + (\epsilon^p - \|\delta\|_p^p) / C`.

    Args:
        delta: perturbations ``[B, C, H, W]``.
        moves: the draws of one query.
        shapes: the two bumps to choose from, ``[2, rows, columns]``.
        order: 1 or 2, of the norm.
        eps: budget.

    Shape:
        Returns ``[B, C, H, W]``, which may be longer than ``eps``.
    """
    _, channels, _, width = delta.shape

    def size(values: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(values, ord=order, dim=2, keepdim=True)
        return length

    first, second = (
        _window_index(moves.corners[:, start : start + 2], shapes.shape[1:], width)
        .unsqueeze(1)
        .expand(-1, channels, -1)
        for start in (0, 2)
    )
    flat = delta.flatten(2)
    old = flat.gather(2, first)
    emptied = flat.scatter(2, first, 0.0)
    energy = size(old) ** order + size(emptied.gather(2, second)) ** order
    unused = (eps**order - (size(flat) ** order).sum(1, keepdim=True)).clamp(min=0)
    new = shapes[moves.turned].flatten(1).unsqueeze(1) * moves.signs.unsqueeze(2) + old / (size(old) + 1e-12)
    length = (unused / channels + energy) ** (1 / order)
    if order == 1:
        length = length * channels  # the authors' factor; the projection takes back what is too much
    new = new / (size(new) + 1e-12) * length
    return emptied.scatter(2, second, 0.0).scatter(2, first, new).view_as(delta)


def _hill(rows: int, columns: int, order: int, like: Tensor) -> Tensor:
    # squares of growing size around the centre, each lower than the one before, added up
    rings = torch.arange(1, max(rows, columns) // 2 + 2, device=like.device).to(like) ** (-2.0 if order == 2 else -4.0)
    height = rings.flip(0).cumsum(0).flip(0)
    down = (torch.arange(rows, device=like.device) - rows // 2).abs()
    across = (torch.arange(columns, device=like.device) - columns // 2).abs()
    hill = height[torch.maximum(down[:, None], across[None])]
    length = torch.linalg.vector_norm(hill, ord=order) if hill.numel() else hill.new_ones(())
    return hill / length


def _window_index(corner: Tensor, size: tuple[int, ...] | torch.Size, width: int) -> Tensor:
    rows = corner[:, :1] + torch.arange(size[0], device=corner.device)
    columns = corner[:, 1:] + torch.arange(size[1], device=corner.device)
    return (rows[:, :, None] * width + columns[:, None]).flatten(1)
