"""A loader that continues where it stopped, without loading what it skips."""

from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler

from lightning_robust.data import EpochSampler, ResumableDataLoader


class Recorded(Dataset):
    """Returns (index, epoch) and remembers what was asked for."""

    def __init__(self, length=20):
        self.length = length
        self.epoch = 0
        self.asked = []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.asked.append(index)
        return index, self.epoch


def make(length=20, batch_size=3, seed=5, **kwargs):
    dataset = Recorded(length)
    return ResumableDataLoader(dataset, batch_size, sampler=EpochSampler(dataset, seed=seed), **kwargs)


def take(loader, count=None):
    return [batch[0].tolist() for batch in islice(loader, count)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 4, 6, 7])
def test_continues_in_mid_epoch(num_workers, seen):
    whole = make(num_workers=num_workers)
    whole.sampler.set_epoch(2)
    expected = take(whole)
    assert len(expected) == len(whole) == 7
    stopped = make(num_workers=num_workers)
    stopped.sampler.set_epoch(2)
    iterator = iter(stopped)
    for _ in range(seen):
        next(iterator)
    state = stopped.state_dict()
    assert (state["epoch"], state["batches"]) == (2, seen)
    resumed = make(num_workers=num_workers)
    resumed.load_state_dict(state)
    iterator = iter(resumed)  # created before the epoch is announced, as Lightning does
    resumed.sampler.set_epoch(2)
    assert [batch[0].tolist() for batch in iterator] == expected[seen:]
    assert len(resumed) == 7
    resumed.sampler.set_epoch(3)
    whole.sampler.set_epoch(3)
    assert take(resumed) == take(whole)


def test_skipped_samples_are_not_loaded():
    loader = make()
    loader.load_state_dict({**loader.state_dict(), "batches": 5})
    assert sum(map(len, take(loader))) == len(loader.dataset.asked) == 5


def test_state_of_another_epoch_starts_at_the_beginning():
    loader = make()
    loader.load_state_dict({**loader.state_dict(), "batches": 5})
    loader.sampler.set_epoch(1)
    assert len(take(loader)) == 7


def test_progress_of_the_loop_comes_first():
    loader = make(progress=lambda: (3, 2))
    loader.load_state_dict({**loader.state_dict(), "epoch": 3, "batches": 3})
    reference = make()
    reference.sampler.set_epoch(3)
    assert take(loader) == take(reference)[2:]
    # the second iteration is a whole epoch: nothing was loaded since
    assert len(take(loader)) == 7


def test_loaded_state_survives_until_it_is_used():
    loader = make()
    state = {**loader.state_dict(), "batches": 5}
    loader.load_state_dict(state)
    assert loader.state_dict() == state


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataset_learns_the_epoch(num_workers):
    loader = make(num_workers=num_workers)
    for epoch in (0, 4):
        loader.sampler.set_epoch(epoch)
        assert {int(value) for batch in loader for value in batch[1]} == {epoch}


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    take(make())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"length": 24}, {"seed": 6}])
def test_another_layout_in_mid_epoch_is_refused(change):
    state = {**make().state_dict(), "batches": 2}
    loader = make(**change)
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match="Cannot continue in the middle of an epoch: the checkpoint counts batches of"):
        take(loader)


def test_another_layout_at_the_end_of_an_epoch_is_fine():
    loader = make(batch_size=4)
    loader.load_state_dict({**make().state_dict(), "batches": 7})
    loader.sampler.set_epoch(1)
    assert len(take(loader)) == 5


def test_kept_workers_are_refused():
    with pytest.raises(ValueError, match="Expected `persistent_workers` to be False"):
        make(num_workers=1, persistent_workers=True)


def test_other_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"made for 1 process\(es\) but 2 are running.*datamodule="):
        take(make())


def test_any_sampler_works_without_resume():
    dataset = Recorded(5)
    loader = ResumableDataLoader(dataset, 2, sampler=SequentialSampler(dataset))
    assert take(loader) == [[0, 1], [2, 3], [4]]
