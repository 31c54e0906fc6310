"""Random numbers of an attack: reproducible, independent of the batch, and distributed as they should be."""

import pytest
import torch

from lightning_robust.attacks import PGD, GeneratorDraws, SampleDraws
from support.attacked import CountingNet, images

INDICES = torch.tensor([4, 900_000_000_000, 0, 17])


def take(draws, kind, like):
    return draws.integers(like, 10) if kind == "integers" else getattr(draws, kind)(like)


@pytest.mark.parametrize("kind", ["uniform", "normal", "integers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_gets_the_same_in_every_batch(kind, dtype):
    like = torch.zeros(4, 3, 5, dtype=dtype)
    together = SampleDraws(3, INDICES)
    first, second = take(together, kind, like), take(together, kind, like)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = SampleDraws(3, INDICES[order])
    assert torch.equal(take(shuffled, kind, like), first[order])
    # one after the other, with samples leaving in between
    alone = SampleDraws(3, INDICES[1:2])
    assert torch.equal(take(alone, kind, like[:1]), first[1:2])
    assert torch.equal(take(alone, kind, like[:1]), second[1:2])
    assert not torch.equal(first, second)
    assert not torch.equal(first, take(SampleDraws(4, INDICES), kind, like))


def test_selections_continue_the_streams_of_their_samples():
    like = torch.zeros(4, 6)
    plain = SampleDraws(0, INDICES)
    expected = [plain.uniform(like) for _ in range(3)]
    draws = SampleDraws(0, INDICES)
    draws.uniform(like)
    part = draws.select(torch.tensor([True, False, False, True]))
    assert torch.equal(part.uniform(like[:2]), expected[1][[0, 3]])
    again = draws.uniform(like)
    assert torch.equal(again[[0, 3]], expected[2][[0, 3]])
    assert torch.equal(again[[1, 2]], expected[1][[1, 2]])
    assert torch.equal(part.select(torch.tensor([1])).indices, INDICES[[3]])


def test_distributions():
    like = torch.zeros(300, 2000, dtype=torch.float64)
    draws = SampleDraws(1, torch.arange(300))
    uniform, normal = draws.uniform(like, -1.0, 3.0), draws.normal(like)
    assert float(uniform.min()) >= -1
    assert float(uniform.max()) < 3
    torch.testing.assert_close(uniform.mean(), torch.tensor(1.0).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(uniform.std(), torch.tensor(4 / 12**0.5).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(normal.mean(), torch.tensor(0.0).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(normal.pow(4).mean(), torch.tensor(3.0).double(), rtol=0.03, atol=0)
    # neither neighbours in a sample nor samples of neighbouring indices know of each other
    for a, b in ((normal[:, 1:], normal[:, :-1]), (normal[1:], normal[:-1])):
        assert abs(float((a * b).mean())) < 0.01
    counts = draws.integers(like, torch.tensor(7)).flatten().bincount()
    assert counts.tolist() == pytest.approx([300 * 2000 / 7] * 7, rel=0.02)


def test_a_generator_draws_integers_below_their_limit():
    drawn = GeneratorDraws(torch.Generator().manual_seed(0)).integers(
        torch.zeros(3, 500), torch.tensor([[2], [3], [5]])
    )
    assert drawn.dtype == torch.int64
    assert drawn.amax(1).tolist() == [1, 2, 4]
    assert drawn.amin(1).tolist() == [0, 0, 0]


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    SampleDraws(0, INDICES).normal(torch.zeros(4, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), r"Expected `indices` to be integers \[B\] but got \[2, 2\]"),
        (torch.zeros(2), r"integers \[B\] but got \[2\] of torch.float32"),
        (torch.ones(2, dtype=torch.bool), "of torch.bool"),
    ],
)
def test_refused_indices(indices, message):
    with pytest.raises(ValueError, match=message):
        SampleDraws(0, indices)


def test_a_draw_for_other_samples_is_refused():
    with pytest.raises(ValueError, match="Expected a draw for 4 samples but was asked for 2"):
        SampleDraws(0, INDICES).uniform(torch.zeros(2, 3))


@pytest.mark.parametrize("options", [{}, {"restarts": 3}, {"restarts": 3, "early_stop": True}, {"norm": "l2"}])
def test_an_attack_on_a_sample_does_not_depend_on_its_batch(options):
    net = CountingNet().double()
    x, y = images(9, dtype=torch.float64)
    indices = torch.arange(9) * 3
    attack = PGD(steps=3, **options)
    whole = attack(net, x, y, indices=indices)
    assert torch.equal(whole, attack(net, x, y, indices=indices))  # no state is left from call to call
    order = torch.tensor([5, 2, 8, 1, 0, 7, 3, 6, 4])
    parts = [attack(net, x[rows], y[rows], indices=indices[rows]) for rows in order.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole[order], rtol=0, atol=1e-12)


def test_generator_and_indices_exclude_each_other():
    x, y = images(2)
    with pytest.raises(ValueError, match="`generator` and `indices` both say"):
        PGD()(CountingNet(), x, y, generator=torch.Generator(), indices=torch.arange(2))
    with pytest.raises(ValueError, match=r"Expected one value of `indices` per image, \[2\], but got \[3\]"):
        PGD()(CountingNet(), x, y, indices=torch.arange(3))
