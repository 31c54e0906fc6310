"""Order as a function of (seed, epoch), beginning in the middle, and evaluation without repeated samples."""

import pytest
import torch
from torch.utils.data import DistributedSampler

from lightning_robust.data import EpochSampler, EvalSampler


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order_depends_on_seed_and_epoch_only():
    first, second = EpochSampler(range(50), seed=3), EpochSampler(range(50), seed=3)
    torch.manual_seed(123)
    assert epoch_of(first, 4) == epoch_of(second, 4)
    assert epoch_of(first, 4) != epoch_of(first, 5)
    assert epoch_of(first, 4) != epoch_of(EpochSampler(range(50), seed=30), 4)
    assert sorted(epoch_of(first, 4)) == list(range(50))


def test_order_is_that_of_pytorch():
    ours = EpochSampler(range(11), seed=2, num_replicas=3, rank=1)
    theirs = DistributedSampler(range(11), num_replicas=3, rank=1, seed=2)
    assert epoch_of(ours, 6) == epoch_of(theirs, 6)


def test_processes_share_an_epoch():
    ranks = [epoch_of(EpochSampler(range(10), num_replicas=2, rank=rank), 1) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(10))


def test_start_leaves_out_the_beginning_and_keeps_the_length():
    sampler = EpochSampler(range(9))
    whole = list(sampler)
    sampler.start = 7
    assert list(sampler) == whole[7:]
    assert len(sampler) == 9


def test_no_shuffle_keeps_the_order():
    assert list(EpochSampler(range(5), shuffle=False)) == list(range(5))


@pytest.mark.parametrize(("samples", "processes"), [(10, 2), (11, 2), (7, 4), (3, 3), (1, 1)])
def test_evaluation_sees_every_sample_once(samples, processes):
    ranks = [EvalSampler(range(samples), num_replicas=processes, rank=rank) for rank in range(processes)]
    assert sorted(index for sampler in ranks for index in sampler) == list(range(samples))
    assert [len(sampler) for sampler in ranks] == [len(list(sampler)) for sampler in ranks]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_evaluation_refuses_a_process_without_samples():
    with pytest.raises(ValueError, match="at least one evaluation sample per process but got 2 samples for 3"):
        EvalSampler(range(2), num_replicas=3, rank=0)
