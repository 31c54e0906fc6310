"""Splits, loaders and attributes that all data modules share."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_robust.data import ArrayDataModule, EvalSampler, ResumableDataLoader, stratified_split


def arrays(count=40, classes=4):
    return torch.rand(count, 1, 8, 8), torch.arange(count) % classes


def module(**kwargs):
    return ArrayDataModule(**{"train": arrays(), "test": arrays(12), "batch_size": 8, **kwargs})


def test_split_is_stratified_and_fixed():
    labels = torch.tensor([0] * 20 + [1] * 10 + [2])
    stay, held = stratified_split(labels, 0.2, seed=1)
    assert sorted(stay + held) == list(range(31))
    assert labels[held].bincount(minlength=3).tolist() == [4, 2, 0]
    assert (stay, held) == stratified_split(labels, 0.2, seed=1)
    assert held != stratified_split(labels, 0.2, seed=2)[1]


def test_split_of_the_first_release_is_kept():
    # a change here changes everybody's validation set
    assert stratified_split(torch.arange(20) % 2, 0.3, seed=0)[1] == [3, 4, 7, 8, 11, 16]


def test_validation_is_held_out_of_training():
    data = module(val_fraction=0.25)
    data.setup("fit")
    assert len(data.train_set) == 32
    assert len(data.val_set) == 8
    assert not set(data.train_set.indices) & set(data.val_set.indices)
    assert data.test_set is None
    data.setup("test")
    assert len(data.test_set) == 12


def test_split_does_not_follow_the_seed():
    first, second, third = module(seed=1), module(seed=2), module(split_seed=1)
    for data in (first, second, third):
        data.setup("fit")
    assert first.val_set.indices == second.val_set.indices != third.val_set.indices


def test_own_validation_images_are_used():
    data = module(val=arrays(6))
    data.setup()
    assert len(data.train_set) == 40
    assert len(data.val_set) == 6


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_no_validation(fraction):
    data = module(val_fraction=fraction)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert len(data.train_set) == 40


def test_loaders():
    data = module(drop_last=True)
    data.setup()
    train = data.train_dataloader()
    assert isinstance(train, ResumableDataLoader)
    assert [len(labels) for _, labels in train] == [8, 8, 8, 8]
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.sampler, EvalSampler)
    images, labels = next(iter(data.test_dataloader()))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(images, data.test_set.dataset.images[:8])


def test_set_up_twice_loads_once():
    data = module()
    data.setup("fit")
    before = data.train_set
    data.setup("validate")
    assert data.train_set is before


def test_seed_comes_from_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    orders = {}
    for name, data in {"global": module(), "seven": module(seed=7), "eight": module(seed=8)}.items():
        data.setup("fit")
        orders[name] = [labels.tolist() for _, labels in data.train_dataloader()]
    assert orders["global"] == orders["seven"] != orders["eight"]


def test_augmented_epochs_differ_and_repeat():
    data = module(augment="shift", val_fraction=0.0)
    data.setup("fit")
    loader = data.train_dataloader()

    def epoch(number):
        loader.sampler.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    first = epoch(0)
    assert not torch.equal(first, epoch(1))
    assert torch.equal(first, epoch(0))


def test_own_transform():
    data = module(train_transform=lambda image: image * 0)
    data.setup("fit")
    assert all(images.max() == 0 for images, _ in data.train_dataloader())
    assert all(images.max() > 0 for images, _ in data.val_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size`"),
        ({"num_workers": -1}, "`num_workers`"),
        ({"augment": "flip"}, "`augment`"),
        ({"val_fraction": 1.0}, "`val_fraction`"),
        ({"split_seed": -1}, "`split_seed`"),
        ({"augment": "shift", "train_transform": torch.clone}, "either `augment` or `train_transform`"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_loader_before_setup_is_refused():
    for name in ("train", "val", "test"):
        with pytest.raises(RuntimeError, match="ArrayDataModule is not set up; call setup"):
            getattr(module(), f"{name}_dataloader")()


def test_trainer_gives_the_processes():
    class TwoProcesses(L.Trainer):
        world_size = 2
        global_rank = 1

    data = module()
    data.trainer = TwoProcesses(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.setup()
    assert (data.train_dataloader().sampler.num_replicas, data.train_dataloader().sampler.rank) == (2, 1)
    assert list(data.test_dataloader().sampler) == [1, 3, 5, 7, 9, 11]
