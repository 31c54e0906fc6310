"""Indices of validation and test batches, followed and read from the batch."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_robust.training import EvaluationIndices
from support.modules import PlainModule, loader, trainer


class Follows(L.Callback):
    """Compares the followed indices with those that the dataset put into the batch."""

    def __init__(self, **options):
        self.indices = EvaluationIndices(**options)
        self.seen = []

    def setup(self, run, pl_module, stage):
        if stage in ("validate", "test"):
            self.indices.install(run)

    def on_test_batch_end(self, run, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == self.indices.dataloader_idx:
            found = self.indices.current(batch, count=len(batch[0]))
            assert torch.equal(found, batch[2])
            self.seen += found.tolist()

    on_validation_batch_end = on_test_batch_end

    def teardown(self, run, pl_module, stage):
        self.indices.remove()


class Module(PlainModule):
    def test_step(self, batch, *_):
        self(batch[0])


class Iterates(L.Callback):
    """Somebody else looks at the loader, before the loop and in the middle of it."""

    def on_test_start(self, run, pl_module):
        next(iter(run.test_dataloaders))

    def on_test_batch_end(self, run, pl_module, *_):
        next(iter(run.test_dataloaders))


@pytest.mark.filterwarnings("ignore:Your .*_dataloader.'s sampler has shuffling enabled")
@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_followed(stage, workers, shuffle):
    data = loader(23, form="triple").dataset
    follows = Follows()
    batches = DataLoader(data, batch_size=5, shuffle=shuffle, num_workers=workers)
    run = trainer(follows)
    for _ in range(2):
        getattr(run, stage)(Module(), batches, verbose=False)
    assert sorted(follows.seen[:23]) == sorted(follows.seen[23:]) == list(range(23))
    assert type(batches.batch_sampler).__iter__ is torch.utils.data.BatchSampler.__iter__


def test_others_may_iterate_over_the_loader():
    follows = Follows()
    trainer(Iterates(), follows).test(Module(), loader(23, form="triple"), verbose=False)
    assert follows.seen == list(range(23))


def test_limited_runs_and_the_second_loader():
    follows = Follows(dataloader_idx=1)
    loaders = [loader(8, form="triple"), loader(23, batch_size=5, form="triple")]
    trainer(follows, limit_test_batches=2).test(Module(), loaders, verbose=False)
    assert follows.seen == list(range(10))


def test_indices_of_the_batch():
    follows = Follows(index_key=2)
    trainer(follows).test(Module(), loader(23, form="triple"), verbose=False)
    assert follows.seen == list(range(23))


def test_refusals():
    with pytest.raises(ValueError, match="Expected `dataloader_idx`"):
        EvaluationIndices(dataloader_idx=-1)
    with pytest.raises(RuntimeError, match="was not asked for this batch"):
        EvaluationIndices().current([torch.zeros(2)], count=2)
    with pytest.raises(ValueError, match="The loader put 2 samples into this batch, which has 3 now"):
        EvaluationIndices(index_key=0).current([torch.tensor([1, 2])], count=3)
