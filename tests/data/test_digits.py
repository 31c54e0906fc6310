"""The digits of scikit-learn."""

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_robust.data import DigitsDataModule


def everything(data):
    return [
        dataset[index] for dataset in (data.train_set, data.val_set, data.test_set) for index in range(len(dataset))
    ]


def test_every_digit_once_in_one_split():
    data = DigitsDataModule(image_size=8)
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (1295, 143, 359)
    ours = sorted((*(image * 16).int().flatten().tolist(), label) for image, label in everything(data))
    digits = load_digits()
    theirs = sorted(
        (*row.astype(int).tolist(), int(label)) for row, label in zip(digits.data, digits.target, strict=True)
    )
    assert ours == theirs


def test_test_set_is_always_the_same_and_balanced():
    first, second = (
        DigitsDataModule(image_size=8),
        DigitsDataModule(image_size=8, seed=5, split_seed=3, val_fraction=0.3),
    )
    for data in (first, second):
        data.setup()
    labels = first.test_set.dataset.labels
    assert torch.equal(first.test_set.dataset.images, second.test_set.dataset.images)
    assert labels.bincount().min() >= 35
    # as the first release had them: published accuracies refer to these images
    assert labels[:12].tolist() == [3, 7, 3, 9, 0, 8, 7, 0, 8, 0, 3, 3]


@pytest.mark.parametrize("size", [8, 12, 16, 32])
def test_sizes_range_and_suggested_normalisation(size):
    data = DigitsDataModule(image_size=size)
    data.setup()
    images = torch.stack([image for image, _ in everything(data)])
    assert images.shape == (1797, 1, size, size)
    assert (images.min(), images.max()) == (0, 1)
    assert abs(images.mean() - data.mean[0]) < 0.01
    assert abs(images.std() - data.std[0]) < 0.07


def test_too_small_is_refused():
    with pytest.raises(ValueError, match="Expected `image_size` to be an integer >= 8 but got 7"):
        DigitsDataModule(image_size=7)
