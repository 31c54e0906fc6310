"""Augmented variants that are the same in every epoch, order, worker and run."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lightning_robust.data import (
    ArrayImages,
    DigitsDataModule,
    ImageView,
    ResumableDataLoader,
    SeededViews,
    ViewSampler,
)
from lightning_robust.distillation.cache_data import describe_dataset
from lightning_robust.training import SampleIndices
from support.modules import PlainModule, trainer

SAMPLES, VARIANTS = 9, 3


class Noisy(Dataset):
    """Draws from all three generators, as augmentation libraries do."""

    def __init__(self, length=SAMPLES):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(torch.rand(1)), np.random.rand(), random.random()]), index % 4


def items(views):
    return torch.stack([views[position][0] for position in range(len(views))])


def test_every_item_is_one_fixed_draw():
    views = SeededViews(Noisy(), variants=VARIANTS, seed=5)
    first = items(views)
    torch.rand(3), np.random.rand(3), random.random()
    again = torch.stack([views[position][0] for position in reversed(range(len(views)))]).flip(0)
    assert torch.equal(first, again)
    assert len(first.unique(dim=0)) == SAMPLES * VARIANTS
    for column in first.T:  # each of the generators is seeded
        assert len(column.unique()) == SAMPLES * VARIANTS
    assert not torch.equal(items(SeededViews(Noisy(), variants=VARIANTS, seed=6)), first)
    # more variants begin with the same ones
    assert torch.equal(items(SeededViews(Noisy(), variants=VARIANTS + 1, seed=5))[: len(first)], first)
    assert [views[position][1] for position in range(len(views))] == [index % 4 for index in range(SAMPLES)] * VARIANTS


def test_generators_stand_where_they_stood():
    views = SeededViews(Noisy())
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    wanted = Noisy()[0][0]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    _ = views[3]
    assert torch.equal(Noisy()[0][0], wanted)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_workers_and_orders(workers, seed):
    views = SeededViews(Noisy(), variants=VARIANTS)
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(seed)).tolist()
    loader = DataLoader(views, 4, sampler=order, num_workers=workers)
    for _ in range(2):
        assert torch.equal(torch.cat([images for images, _ in loader]), items(views)[order])


def test_persistent_workers_need_not_know_the_epoch():
    views = SeededViews(Noisy(), variants=VARIANTS)
    sampler = ViewSampler(views, seed=1)
    loader = DataLoader(views, 4, sampler=sampler, num_workers=1, persistent_workers=True)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        assert torch.equal(torch.cat([images for images, _ in loader]), items(views)[list(sampler)])


def test_an_epoch_shows_one_variant_of_each_sample():
    views = SeededViews(Noisy(), variants=VARIANTS)
    seen = []
    for epoch in range(2 * VARIANTS):
        parts = [ViewSampler(views, seed=2, num_replicas=2, rank=rank) for rank in range(2)]
        for sampler in parts:
            sampler.set_epoch(epoch)
        assert len(parts[0]) == 5
        chosen = [position for sampler in parts for position in sampler]
        assert {position // SAMPLES for position in chosen} == {epoch % VARIANTS}
        assert {position % SAMPLES for position in chosen} == set(range(SAMPLES))
        seen.append(chosen)
    assert len({tuple(chosen) for chosen in seen}) == len(seen)


def test_refusals():
    with pytest.raises(ValueError, match="`variants`"):
        SeededViews(Noisy(), variants=0)
    with pytest.raises(ValueError, match="`seed`"):
        SeededViews(Noisy(), seed=-1)
    with pytest.raises(ValueError, match="empty"):
        SeededViews(Noisy(0))
    for position in (-1, SAMPLES):
        with pytest.raises(IndexError, match=f"from 0 to 8 but got {position}"):
            _ = SeededViews(Noisy())[position]


# ---- what a cache remembers


def test_labels_and_description():
    images = ArrayImages(torch.rand(5, 1, 8, 8), torch.tensor([3, 1, 0, 2, 1]))
    views = SeededViews(ImageView(images, [4, 0], v2.RandomCrop(8, padding=1)), variants=2, seed=7)
    assert views.labels.tolist() == [1, 3, 1, 3]
    told = describe_dataset(views)
    assert (told["samples"], told["view"], told["variants"]) == (4, "seeded", 2)
    assert told["transform"].startswith("seed=7: RandomCrop")
    assert not hasattr(SeededViews(Noisy()), "labels")


@pytest.mark.parametrize("options", [{"seed": 1}, {"augment": "crop-flip"}, {"augment_variants": 3}], ids=str)
def test_descriptions_of_our_data_tell_views_apart(options):
    described = []
    for more in ({}, {}, options):
        data = DigitsDataModule(image_size=8, **{"augment": "shift", "augment_variants": 2, "seed": 0, **more})
        data.setup("fit")
        described.append(describe_dataset(data.train_views()))
    assert described[0] == described[1] != described[2]


# ---- our data modules


def digits(**options):
    data = DigitsDataModule(image_size=8, batch_size=400, **{"augment": "shift", "seed": 3, **options})
    data.setup("fit")
    return data


def test_our_data_repeat_their_epochs():
    data = digits(augment_variants=2)
    plain = digits()
    views = data.train_views()
    count = len(data.train_set)
    assert len(views) == 2 * count
    for variant in range(2):  # the variants are the first epochs of data that augment anew
        plain.train_set.set_epoch(variant)
        for index in (0, 17, count - 1):
            assert torch.equal(views[variant * count + index][0], plain.train_set[index][0])
    assert not torch.equal(views[17][0], views[count + 17][0])
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        order = list(loader.sampler)
        images = torch.cat([images for images, _ in loader])
        assert len(images) == count
        assert torch.equal(images, torch.stack([views[position][0] for position in order]))
        epochs.append(images[torch.tensor(order).argsort()])
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_own_transforms_of_our_data():
    data = digits(augment="none", train_transform=v2.RandomCrop(8, padding=1), augment_variants=2)
    views = data.train_views()
    assert torch.equal(views[3][0], views[3][0])
    assert torch.equal(
        items(digits(augment="none", augment_variants=2).train_views())[:5], items(digits(augment="none").train_set)[:5]
    )


def test_our_data_without_variants():
    with pytest.raises(ValueError, match="DigitsDataModule augments anew in every epoch; set `augment_variants`"):
        digits().train_views()
    with pytest.raises(ValueError, match="`augment_variants`"):
        DigitsDataModule(augment_variants=0)


class Follow(Callback):
    """What each step saw, beside what the position of its samples says."""

    def __init__(self, save):
        self.indices = SampleIndices()
        self.steps = []
        self.save = save

    def setup(self, trainer, pl_module, stage):
        self.indices.install(trainer)

    def on_train_start(self, trainer, pl_module):
        self.indices.start()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append((self.indices.current(batch, count=len(batch[0])), batch[0].clone()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.save is not None and trainer.global_step == 4:
            trainer.save_checkpoint(self.save)


class Pixels(Dataset):
    """Images for the plain module, with noise."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.rand(2, 6, 6), index % 4


@pytest.mark.parametrize("workers", [0, 1])
def test_positions_name_the_views_in_a_fit_and_when_it_continues(tmp_path, workers):
    views = SeededViews(Pixels(), variants=2)

    def fit(**options):
        follow = Follow(None if options else tmp_path / "middle.ckpt")
        run = trainer(follow, max_epochs=4)
        loader = ResumableDataLoader(views, 3, sampler=ViewSampler(views, seed=1), num_workers=workers)
        run.fit(PlainModule(), loader, **options)
        return follow.steps

    whole = fit()
    assert len(whole) == 12
    for indices, images in whole:
        assert torch.equal(images, torch.stack([views[position][0] for position in indices.tolist()]))
    assert {int(indices[0]) // SAMPLES for indices, _ in whole[3:6]} == {1}
    resumed = fit(ckpt_path=tmp_path / "middle.ckpt")  # in the middle of the second epoch
    assert len(resumed) == 8
    for (indices, images), (wanted, shown) in zip(resumed, whole[4:], strict=True):
        assert torch.equal(indices, wanted)
        assert torch.equal(images, shown)
