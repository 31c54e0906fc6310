"""One row per training sample: looking up, recording, merging over processes, saving."""

import copy

import pytest
import torch

from lightning_robust.losses import SampleTable


def row(*values):
    return torch.tensor([[float(value)] * 2 for value in values])


def merged(*tables):
    """Merge tables as processes would, each with the sums over all."""
    told = []
    for table in tables:
        mine = []
        copy.deepcopy(table).merge(lambda tensor, mine=mine: mine.append(tensor.clone()) or tensor)
        told.append(mine)
    sums = [torch.stack(parts).sum(0) for parts in zip(*told, strict=True)]
    for table in tables:
        remaining = iter(sums)
        table.merge(lambda tensor, remaining=remaining: next(remaining))


def test_rows_are_those_recorded_last():
    table = SampleTable(fill=7.0, num_samples=3)
    table.record(torch.tensor([2, 0]), row(1, 2))
    table.record(torch.tensor([2]), row(3))
    assert table.look_up(torch.tensor([0, 1, 2]), like=row(0, 0, 0))[:, 0].tolist() == [2.0, 7.0, 3.0]


def test_rows_carry_no_gradient():
    table, rows = SampleTable(num_samples=2), row(1, 2).requires_grad_()
    table.record(torch.tensor([0, 1]), rows)
    assert not table.look_up(torch.tensor([0]), like=rows[:1]).requires_grad


def test_merging_gives_all_processes_what_each_wrote():
    first, second = SampleTable(num_samples=4), SampleTable(num_samples=4)
    first.record(torch.tensor([0, 1]), row(1, 2))
    second.record(torch.tensor([1, 3]), row(4, 5))
    merged(first, second)
    for table in (first, second):
        assert table.rows[:, 0].tolist() == [1.0, 3.0, 0.0, 5.0]  # of a sample that both wrote, the mean
    first.record(torch.tensor([0]), row(9))
    merged(first, second)
    for table in (first, second):
        assert table.rows[:, 0].tolist() == [9.0, 3.0, 0.0, 5.0]  # older rows are not summed again


def test_merging_before_any_use_is_harmless():
    SampleTable(num_samples=2).merge(lambda tensor: tensor)


def test_a_saved_table_brings_its_size_and_another_is_refused():
    table = SampleTable(num_samples=3)
    table.record(torch.tensor([1]), row(4))
    restored = SampleTable()
    restored.load_state_dict(table.state_dict())
    assert torch.equal(restored.rows, table.rows)
    restored.resize(3)
    with pytest.raises(ValueError, match="belongs to 3 training samples, but there are 4 now"):
        restored.resize(4)
    with pytest.raises(ValueError, match="belongs to 5 training samples, but there are 3 now"):
        SampleTable(num_samples=5).load_state_dict(table.state_dict())


def test_a_table_that_was_not_used_can_be_saved_too():
    SampleTable().load_state_dict(SampleTable(num_samples=3).state_dict())


def test_the_number_of_samples_must_be_known_and_rows_keep_their_shape():
    with pytest.raises(RuntimeError, match="number of training samples is not known"):
        SampleTable().record(torch.tensor([0]), row(1))
    table = SampleTable(num_samples=2)
    table.record(torch.tensor([0]), row(1))
    with pytest.raises(ValueError, match=r"has shape \(2,\), but the batch has \(3,\)"):
        table.look_up(torch.tensor([0]), like=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="`num_samples` to be an integer >= 1"):
        SampleTable(num_samples=0)
