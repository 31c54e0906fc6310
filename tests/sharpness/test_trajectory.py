"""The trajectory loss against torch in float64 and in half precision; the ring of past logits against a plain loop."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.sharpness import LogitHistory, trajectory_loss


def stated(z, reference, temperature):
    """The sum of the definition, sample by sample in float64."""
    p, q = (torch.softmax(value.double() / temperature, 1) for value in (reference, z))
    return temperature**2 * sum((a * (a.log() - b.log())).sum() for a, b in zip(p, q, strict=True)) / len(z)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_loss_and_gradient(temperature):
    z, reference = (4 * torch.randn(6, 10, dtype=torch.float64)).requires_grad_(), torch.randn(6, 10).double()
    reference.requires_grad_()
    loss = trajectory_loss(z, reference, temperature)
    torch.testing.assert_close(loss, stated(z, reference, temperature))
    torch.testing.assert_close(
        loss,
        temperature**2
        * F.kl_div(
            torch.log_softmax(z / temperature, 1), torch.softmax(reference / temperature, 1), reduction="batchmean"
        ),
    )
    loss.backward()
    assert reference.grad is None
    expected = temperature * (torch.softmax(z / temperature, 1) - torch.softmax(reference / temperature, 1)) / 6
    torch.testing.assert_close(z.grad, expected)


def test_half_precision_computes_in_float32():
    z, reference = torch.tensor([[30.0, -30.0]]), torch.tensor([[-30.0, 30.0]])
    for dtype in (torch.float16, torch.bfloat16):
        loss = trajectory_loss(z.to(dtype), reference.to(dtype), 1.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, torch.tensor(60.0))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(trajectory_loss(z, reference, 1.0), torch.tensor(60.0))


def test_unknown_samples_add_nothing():
    z, reference = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    known = torch.tensor([True, False, True, False])
    loss = trajectory_loss(z, reference, known=known)
    torch.testing.assert_close(loss, trajectory_loss(z[known], reference[known]) / 2)
    loss.backward()
    assert (z.grad[~known] == 0).all()
    assert (z.grad[known] != 0).any()
    assert trajectory_loss(z, reference, known=torch.zeros(4, dtype=torch.bool)) == 0


def test_further_dimensions():
    z, reference = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = [value.movedim(1, -1).reshape(-1, 3) for value in (z, reference)]
    torch.testing.assert_close(trajectory_loss(z, reference), trajectory_loss(*flat))
    known = torch.tensor([True, False])
    torch.testing.assert_close(trajectory_loss(z, reference, known=known), trajectory_loss(z[:1], reference[:1]) / 2)


def test_refused_losses():
    with pytest.raises(ValueError, match=r"one shape but got \(2, 3\) and \(2, 4\)"):
        trajectory_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature"):
        trajectory_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_ring_equals_a_dictionary(lag):
    """The ring in words: a sample's reference is what its slot holds, if anything was ever written there."""
    history, slots = LogitHistory(7, 3, lag=lag), {}
    for epoch in range(9):
        for indices in torch.randperm(7)[:5].split(2):  # each epoch leaves two samples out
            logits = torch.randn(len(indices), 3, requires_grad=True)
            history.record(indices, logits, epoch=epoch)
            found, known = history.look_up(indices, epoch=epoch)
            assert not found.requires_grad
            for index, row, here, z in zip(indices.tolist(), found, known, logits, strict=True):
                slots[epoch % (lag + 1), index] = z.detach()
                expected = slots.get(((epoch - lag) % (lag + 1), index))
                assert bool(here) == (expected is not None)
                assert torch.equal(row, torch.zeros(3) if expected is None else expected)


def test_of_a_sample_drawn_twice_the_last_row_counts():
    history = LogitHistory(600, 2, lag=1)
    indices = torch.randint(600, (20000,))
    logits = torch.randn(20000, 2)
    history.record(indices, logits, epoch=0)
    last = {index: row for row, index in enumerate(indices.tolist())}
    found, known = history.look_up(torch.arange(600), epoch=1)
    assert known.all()
    assert torch.equal(found, logits[[last[index] for index in range(600)]])


def test_logits_that_are_not_finite_are_not_remembered():
    history = LogitHistory(4, 2, lag=1, dtype="float16")
    indices = torch.arange(4)
    history.record(indices, torch.ones(4, 2), epoch=0)
    bad = torch.tensor([[float("nan"), 0.0], [0.0, float("inf")], [0.0, 1e6], [2.0, 3.0]])  # 1e6 is too much for fp16
    history.record(indices, bad, epoch=0)
    found, known = history.look_up(indices, epoch=1)
    assert known.tolist() == [False, False, False, True]
    assert torch.equal(found, torch.tensor([[0.0, 0.0]] * 3 + [[2.0, 3.0]]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_storage_types(dtype):
    history, logits = LogitHistory(3, 4, dtype=dtype), 5 * torch.randn(3, 4)
    history.record(torch.arange(3), logits, epoch=0)
    found, _ = history.look_up(torch.arange(3), epoch=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits.to(getattr(torch, dtype)).float(), rtol=0, atol=0)
    history.record(torch.arange(3), logits.bfloat16(), epoch=1)
    torch.testing.assert_close(history.look_up(torch.arange(3), epoch=4)[0], logits, rtol=1e-2, atol=0.02)


def test_state_continues_exactly_and_is_a_copy(tmp_path):
    first, second = LogitHistory(5, 2, lag=1), LogitHistory(5, 2, lag=1)
    first.record(torch.tensor([1, 3]), torch.randn(2, 2), epoch=0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    before = second.look_up(torch.arange(5), epoch=1)[0].clone()
    for history in (first, second):
        history.record(torch.tensor([3, 4]), torch.ones(2, 2), epoch=0)
        history.record(torch.tensor([0]), torch.ones(1, 2), epoch=1)
    for name, value in first.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state_dict()[name])), name
    third = LogitHistory(5, 2, lag=1)
    third.load_state_dict(first.state_dict())
    first.record(torch.tensor([1]), torch.full((1, 2), 9.0), epoch=0)
    assert torch.equal(third.look_up(torch.tensor([1]), epoch=1)[0], before[1:2])
    assert third.to("cpu") is third


def test_merging_without_processes_does_nothing():
    history = LogitHistory(3, 2, lag=1)
    history.record(torch.tensor([2]), torch.ones(1, 2), epoch=0)
    history.merge(epoch=0)
    assert history.look_up(torch.arange(3), epoch=1)[1].tolist() == [False, False, True]


def test_refused_histories():
    for name in ("samples", "classes", "lag"):
        with pytest.raises(ValueError, match=f"`{name}` to be an integer >= 1"):
            LogitHistory(**{"samples": 2, "classes": 2, "lag": 1, name: 0})
    with pytest.raises(ValueError, match="dtype"):
        LogitHistory(2, 2, dtype="float64")
    history = LogitHistory(4, 3, lag=2)
    for shape in [(3, 3), (2, 4), (2, 3, 1)]:
        with pytest.raises(ValueError, match=r"shape \(2, 3\) but got"):
            history.record(torch.tensor([0, 1]), torch.zeros(shape), epoch=0)
    with pytest.raises(IndexError):
        history.record(torch.tensor([4]), torch.zeros(1, 3), epoch=0)
    for changed, message in [
        ({"samples": 5}, "samples=5 but this one has samples=4"),
        ({"classes": 2}, "classes=2 but this one has classes=3"),
        ({"lag": 1}, "lag=1 but this one has lag=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            history.load_state_dict(LogitHistory(**{"samples": 4, "classes": 3, "lag": 2, **changed}).state_dict())
