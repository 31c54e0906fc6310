"""Image files in folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_robust.data import ImageFolderDataModule


def write(root, split, classes=("cat", "dog"), count=4, size=(20, 14)):
    random = np.random.RandomState(0)
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(count):
            array = random.randint(0, 100, (*size, 3)) + 100 * label
            Image.fromarray(array.astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, split)
    return tmp_path


def test_loads_resizes_and_splits(folder):
    data = ImageFolderDataModule(root=str(folder), image_size=8, batch_size=4, val_fraction=0.25)
    assert (data.num_classes, data.classes, data.in_chans) == (2, ("cat", "dog"), 3)
    assert data.resize == 9
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (6, 2, 8)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for images, labels in loader:
            assert images.shape == (len(labels), 3, 8, 8)
            assert images.dtype == torch.float32
            # the dogs are the bright ones
            assert torch.equal(images.mean((1, 2, 3)) > 0.4, labels == 1)


def test_val_folder_is_used(folder):
    write(folder, "val", count=1)
    data = ImageFolderDataModule(root=str(folder), image_size=8)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (8, 2)


def test_augmentation_cuts_random_parts(folder):
    data = ImageFolderDataModule(root=str(folder), image_size=8, augment="crop-flip")
    data.setup("fit")
    first = data.train_set[0][0]
    assert torch.equal(first, data.train_set[0][0])
    data.train_set.set_epoch(1)
    assert first.shape == (3, 8, 8)
    assert not torch.equal(first, data.train_set[0][0])


def test_missing_folders(tmp_path, folder):
    with pytest.raises(
        FileNotFoundError, match=r"one folder of images per class in .*nowhere.train, but there is none"
    ):
        ImageFolderDataModule(root=str(tmp_path / "nowhere"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="one folder of images per class"):
        ImageFolderDataModule(root=str(tmp_path / "empty"))
    write(tmp_path / "partial", "train")
    data = ImageFolderDataModule(root=str(tmp_path / "partial"))
    with pytest.raises(FileNotFoundError, match=r"partial.test, but there is none"):
        data.setup("test")


def test_other_classes_are_refused(folder):
    write(folder, "val", classes=("cat", "emu"))
    with pytest.raises(ValueError, match="they differ in: dog, emu"):
        ImageFolderDataModule(root=str(folder)).setup("fit")


def test_resize_below_the_crop_is_refused(folder):
    with pytest.raises(ValueError, match="Expected `resize` to be an integer >= 32 but got 16"):
        ImageFolderDataModule(root=str(folder), image_size=32, resize=16)
