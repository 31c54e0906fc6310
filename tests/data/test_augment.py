"""Augmentation as a function of (seed, epoch, index), and the conversion to [0, 1]."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_robust.data import AUGMENTATIONS, ArrayImages, AugmentedView, ImageView, augmentation


def images(count=6, size=16, channels=3):
    return ArrayImages(torch.randint(256, (count, channels, size, size), dtype=torch.uint8), torch.arange(count))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS[1:])
def test_every_augmentation_keeps_form_and_range(name, channels):
    data = images(channels=channels)
    view = AugmentedView(data, transform=augmentation(name, 16), seed=1)
    for epoch in range(5):
        view.set_epoch(epoch)
        for position in range(len(view)):
            image, label = view[position]
            assert image.shape == (channels, 16, 16)
            assert image.dtype == torch.float32
            assert 0 <= image.min() <= image.max() <= 1
            assert label == position


def test_none_is_no_transform():
    assert augmentation("none", 32) is None


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="Expected `augment` to be one of 'none', 'shift'"):
        augmentation("autoaugment", 32)


def test_shift_moves_whole_pixels_and_crop_flip_mirrors():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8) + 1
    shift, flip = augmentation("shift", 8), augmentation("crop-flip", 8)
    for transform, mirrors in ((shift, False), (flip, True)):
        seen = {tuple(transform(image).flatten().tolist()) for _ in range(300)}
        ascending = all(row[i] < row[i + 1] for row in seen for i in range(27, 28))
        assert ascending != mirrors
        assert len(seen) == (9 if not mirrors else 18)


def test_draws_depend_on_seed_epoch_and_index_only():
    data = images()
    view = AugmentedView(data, transform=augmentation("crop-flip", 16), seed=1)
    whole = [view[position][0] for position in range(6)]
    torch.manual_seed(99)
    assert all(torch.equal(view[position][0], whole[position]) for position in reversed(range(6)))
    part = AugmentedView(data, [4, 2], augmentation("crop-flip", 16), seed=1)
    assert torch.equal(part[0][0], whole[4])
    view.set_epoch(1)
    assert not all(torch.equal(view[position][0], whole[position]) for position in range(6))
    other = AugmentedView(data, transform=augmentation("crop-flip", 16), seed=2)
    assert not all(torch.equal(other[position][0], whole[position]) for position in range(6))


def test_workers_draw_the_same():
    view = AugmentedView(images(), transform=augmentation("randaugment", 16), seed=1)
    alone = torch.cat([batch for batch, _ in DataLoader(view, 2, generator=torch.Generator())])
    workers = torch.cat([batch for batch, _ in DataLoader(view, 2, num_workers=2, generator=torch.Generator())])
    assert torch.equal(alone, workers)


@pytest.mark.parametrize("seed_all", [False, True])
def test_generators_stand_where_they_stood(seed_all):
    def transform(image):
        torch.rand(1)
        if seed_all:
            random.random()
            np.random.rand()
        return image

    view = AugmentedView(images(), transform=transform, seed=0, seed_all=seed_all)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    view[0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_generators_are_restored_after_an_error():
    def fails(image):
        torch.rand(1)
        raise KeyError("broken")

    view = AugmentedView(images(), transform=fails, seed=0)
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        view[0]
    assert torch.equal(before, torch.get_rng_state())


def test_own_transform_may_use_python_and_numpy():
    def transform(image):
        return image * 0 + random.randrange(100) + np.random.randint(100)

    view = AugmentedView(images(), transform=transform, seed=0, seed_all=True)
    first = view[3][0]
    random.seed(5)
    np.random.seed(5)
    assert torch.equal(view[3][0], first)
    assert not torch.equal(view[2][0], first)


def test_view_without_transform_is_the_image():
    data = images()
    for view in (ImageView(data), AugmentedView(data, seed=3)):
        torch.testing.assert_close(view[1][0], data.images[1].float() / 255)
    assert len(ImageView(data, [5, 0])) == 2
    assert ImageView(data, [5, 0])[0][1] == 5


def test_floats_stay_as_they_are():
    data = ArrayImages(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    assert torch.equal(ImageView(data)[0][0], data.images[0])


def test_resized_crop_makes_the_size():
    assert augmentation("crop-flip", 8, resized_crop=True)(torch.rand(3, 20, 30)).shape == (3, 8, 8)
