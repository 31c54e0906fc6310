"""What the Square attack tries next, against loops over pixels."""

import pytest
import torch

from lightning_robust.attacks import GeneratorDraws, SampleDraws
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


def draws(seed=0):
    return GeneratorDraws(torch.Generator().manual_seed(seed))


def test_windows_halve_after_the_published_queries():
    halved = [query for query in range(1, 10_000) if window_fraction(query, 1.0) < window_fraction(query - 1, 1.0)]
    assert halved == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert window_fraction(0, 0.8) == 0.8
    assert window_fraction(5000, 0.8) == 0.8 / 2**7
    assert window_fraction(9999, 0.8) == 0.8 / 2**9


@pytest.mark.parametrize(
    ("fraction", "height", "width", "plain", "odd"),
    [
        (0.8, 32, 32, (29, 29), (29, 29)),
        (0.4, 32, 32, (20, 20), (21, 21)),
        (0.8 / 512, 32, 32, (1, 1), (3, 3)),
        (1.0, 32, 32, (32, 32), (32, 32)),
        (0.8, 2, 2, (2, 2), (2, 2)),
        (0.25, 1, 64, (1, 16), (1, 17)),
        (0.25, 64, 1, (16, 1), (17, 1)),
        (0.5, 4, 100, (4, 50), (4, 51)),
        (0.001, 1, 64, (1, 1), (1, 3)),
    ],
)
def test_sizes_of_windows(fraction, height, width, plain, odd):
    assert window_size(fraction, height, width) == plain
    assert window_size(fraction, height, width, bumps=True) == odd


def test_every_place_of_a_window_is_drawn_and_samples_differ():
    x = torch.zeros(50, 3, 4, 6)
    moves = draw_moves(draws(), x, [(1, 1), (3, 2), (4, 6)] * 40)
    corners = moves.corners.view(50, 40, 3, 4)
    for number, places in enumerate([(4, 6), (2, 5), (1, 1)]):
        for first in (0, 2):
            seen = {tuple(pair) for pair in corners[:, :, number, first : first + 2].reshape(-1, 2).tolist()}
            assert seen == {(row, column) for row in range(places[0]) for column in range(places[1])}
    assert not torch.equal(moves.corners[0], moves.corners[1])
    assert set(moves.signs.unique().tolist()) == {-1.0, 1.0}
    assert set(moves.turned.unique().tolist()) == {0, 1}
    assert moves.signs.shape == (50, 120, 3)
    assert moves.signs.mean().abs() < 0.05


def test_selected_and_single_moves():
    x = torch.zeros(4, 2, 5, 5)
    moves = draw_moves(SampleDraws(0, torch.arange(4)), x, [(2, 2)] * 3)
    part = moves.select(torch.tensor([2, 0])).at(1)
    assert torch.equal(part.corners, moves.corners[[2, 0], 1])
    assert torch.equal(part.signs, moves.signs[[2, 0], 1])
    assert torch.equal(part.turned, moves.turned[[2, 0], 1])


def test_windows_are_set_to_the_lowest_or_highest_values():
    x, low, high = torch.rand(3, 2, 5, 7), torch.rand(3, 2, 5, 7) - 1, torch.rand(3, 2, 5, 7) + 1
    corners = torch.tensor([[0, 0, 1, 1], [3, 4, 0, 0], [1, 2, 0, 0]])
    signs = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])
    expected = x.clone()
    for sample, (row, column, *_) in enumerate(corners.tolist()):
        for channel in range(2):
            source = high if signs[sample, channel] > 0 else low
            window = (sample, channel, slice(row, row + 2), slice(column, column + 3))
            expected[window] = source[window]
    moves = Moves(corners, signs, torch.zeros(3, dtype=torch.long))
    before = x.clone()
    assert torch.equal(set_windows(x, low, high, moves, (2, 3)), expected)
    assert torch.equal(x, before)


def naive_hill(rows, columns, order):
    """Nested squares around the centre, the k-th of height (k + 1) ** -2, or -4 in l1."""
    hill = torch.zeros(rows, columns, dtype=torch.float64)
    for k in range(max(rows, columns) // 2 + 1):
        for i in range(rows):
            for j in range(columns):
                if abs(i - rows // 2) <= k and abs(j - columns // 2) <= k:
                    hill[i, j] += (k + 1.0) ** (-2 if order == 2 else -4)
    return hill / (hill.norm() if order == 2 else hill.sum())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (6, 6), (9, 9), (5, 2), (2, 8)])
def test_bumps_are_a_hill_beside_a_valley(rows, columns, order):
    by_rows, by_columns = bumps(rows, columns, order, torch.zeros(1, dtype=torch.float64))
    upper = naive_hill(rows // 2, columns, order)
    expected = torch.cat([upper, -naive_hill(rows - rows // 2, columns, order)])
    torch.testing.assert_close(by_rows, expected / torch.linalg.vector_norm(expected, order))
    left = naive_hill(rows, columns // 2, order)
    expected = torch.cat([left, -naive_hill(rows, columns - columns // 2, order)], 1)
    torch.testing.assert_close(by_columns, expected / torch.linalg.vector_norm(expected, order))
    if rows == columns:
        torch.testing.assert_close(by_rows, by_columns.T)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_bumps_of_one_row_or_column_are_whole(shape, order):
    pair = bumps(*shape, order, torch.zeros(1))
    assert bool(pair.isfinite().all())
    torch.testing.assert_close(torch.linalg.vector_norm(pair, order, dim=(1, 2)), torch.ones(2))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("height", "width", "tiles"),
    [(12, 12, 36), (24, 24, 36), (32, 32, 25), (28, 20, 25), (3, 3, 9), (1, 40, 5), (1, 1, 1), (16, 5, 25)],
)
def test_grid_fills_images_of_any_size(height, width, tiles, order):
    x = torch.zeros(2, 3, height, width, dtype=torch.float64)
    grid = start_grid(x, draws(), order)
    assert grid.shape == x.shape
    lengths = torch.linalg.vector_norm(grid.flatten(2), order, dim=2) ** order
    torch.testing.assert_close(lengths, torch.full((2, 3), float(tiles), dtype=torch.float64))
    assert tiles == 1 or not torch.equal(grid[0, 0].sign(), grid[1, 0].sign())


def naive_move(delta, moves, shapes, order, eps):
    """The same for one sample and channel after the other."""
    moved, size = delta.clone(), shapes.shape[1:]
    for sample in range(len(delta)):
        row, column, row2, column2 = moves.corners[sample].tolist()
        first = (slice(row, row + size[0]), slice(column, column + size[1]))
        second = (slice(row2, row2 + size[0]), slice(column2, column2 + size[1]))
        for channel in range(delta.shape[1]):
            values = delta[sample, channel]
            union = torch.zeros_like(values, dtype=torch.bool)
            union[first], union[second] = True, True
            energy = (values.abs()[union] ** order).sum()
            unused = max(eps**order - float((delta[sample].abs() ** order).sum()), 0) / delta.shape[1]
            old = values[first]
            new = shapes[moves.turned[sample]] * moves.signs[sample, channel]
            new = new + old / (old.norm(p=order) + 1e-12)
            length = (energy + unused) ** (1 / order) * (delta.shape[1] if order == 1 else 1)
            moved[sample, channel][second] = 0
            moved[sample, channel][first] = new / (new.norm(p=order) + 1e-12) * length
    return moved


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("size", [(3, 3), (5, 2), (6, 7)])
def test_energy_is_moved_as_in_a_loop(size, order):
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(20, 3, 6, 7, generator=generator, dtype=torch.float64) * 0.1
    delta[0] = 0
    eps = 20.0 if order == 1 else 1.2
    drawn = draw_moves(draws(1), delta, [size]).at(0)
    assert isinstance(drawn, Moves)
    shapes = bumps(*size, order, delta)
    torch.testing.assert_close(
        move_energy(delta, drawn, shapes, order, eps), naive_move(delta, drawn, shapes, order, eps)
    )


def test_the_length_of_an_l2_perturbation_is_kept():
    delta = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta /= delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = move_energy(delta, draw_moves(draws(), delta, [(3, 3)]).at(0), bumps(3, 3, 2, delta), 2, 1.0)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert not torch.equal(moved, delta)
