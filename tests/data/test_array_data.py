"""Your own arrays, or a file, as a data module."""

import numpy as np
import pytest
import torch

from lightning_robust.data import ArrayDataModule


def pair(count=20, size=8, channels=3, classes=4):
    return torch.rand(count, channels, size, size), torch.arange(count) % classes


def test_attributes_are_known_before_setup():
    images, labels = pair()
    data = ArrayDataModule(train=(images, labels))
    assert (data.num_classes, data.in_chans, data.image_size) == (4, 3, 8)
    assert data.classes == ("0", "1", "2", "3")
    np.testing.assert_allclose(data.mean, images.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(data.std, images.std((0, 2, 3), correction=0), rtol=1e-5)


def test_numpy_uint8_and_names():
    images = np.random.randint(0, 256, (20, 8, 8)).astype(np.uint8)
    data = ArrayDataModule(train=(images, np.arange(20) % 2), classes=["cat", "dog", "eel"])
    assert data.num_classes == 3
    data.setup("fit")
    batch, labels = next(iter(data.train_dataloader()))
    assert batch.shape[1:] == (1, 8, 8)
    assert batch.max() <= 1
    assert labels.max() == 1


def test_file(tmp_path):
    (images, labels), path = pair(), tmp_path / "data.npz"
    np.savez(path, **{f"{split}_{name}": value for split in ("train", "val", "test") for name, value in
                      (("images", images.numpy()), ("labels", labels.numpy()))})  # fmt: skip
    data = ArrayDataModule(path=str(path))
    data.setup()
    assert len(data.train_set) == len(data.val_set) == len(data.test_set) == 20
    assert torch.equal(data.test_set[3][0], images[3])


def test_caller_keeps_the_arrays():
    images, labels = pair()
    before = images.clone(), labels.clone()
    data = ArrayDataModule(train=(images, labels), augment="crop-flip")
    data.setup("fit")
    list(data.train_dataloader())
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`train=.images, labels.` or `path` but got neither"),
        ({"train": pair(), "path": "x.npz"}, "either `path` or the arrays but got both"),
        ({"train": pair(), "test": pair(size=6)}, r"test images of shape \(3, 8, 8\) as for training but got"),
        ({"train": pair(), "test": pair(classes=5)}, "`test labels` to be >= 0 and < 4"),
        ({"train": pair(), "num_classes": 3}, "`train labels` to be >= 0 and < 3"),
        ({"train": pair(), "classes": ["a"], "num_classes": 4}, "one name per class but got 1 `classes` for 4"),
        ({"train": (pair()[0], torch.arange(3))}, "as many train labels as images but got 3 for 20"),
        ({"train": (torch.rand(4, 3, 8, 6), torch.arange(4))}, "square images but got 8 x 6"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataModule(**arguments)


def test_missing_test_images():
    data = ArrayDataModule(train=pair())
    data.setup("fit")
    with pytest.raises(ValueError, match="no test images"):
        data.setup("test")
