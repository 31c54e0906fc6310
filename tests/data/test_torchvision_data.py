"""torchvision's sets, without the network."""

import pickle
import re
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, MNIST, utils

from lightning_robust.data import TorchvisionDataModule
from lightning_robust.data.torchvision_data import FACTS


@pytest.mark.parametrize("name", FACTS)
def test_facts_are_known_before_setup(name):
    data = TorchvisionDataModule(dataset=name)
    assert len(data.classes) == data.num_classes
    assert len(data.mean) == len(data.std) == data.in_chans
    assert data.image_size in (28, 32)
    assert FACTS[name].build.__name__ == name


def test_cifar10_names_are_torchvisions(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(utils, "check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    random = np.random.RandomState(0)
    names = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
    for name in names:
        pixels = random.randint(0, 256, (4, 3072)).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(FACTS["CIFAR10"].classes)}))
    data = TorchvisionDataModule(dataset="CIFAR10", root=str(tmp_path), download=False, val_fraction=0.0)
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.test_set)) == (20, 4)
    image, label = data.test_set[3]
    assert image.shape == (3, 32, 32)
    assert label == 9
    # channel 0 of the first row is the beginning of the file's row
    assert torch.equal((image[0, 0] * 255).round().int(), torch.from_numpy(pixels[3, :32].astype(np.int32)))


def test_impossible_download_names_the_folder(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    data = TorchvisionDataModule(dataset="CIFAR10", root=str(tmp_path))
    expected = re.escape(str(tmp_path / "cifar-10-batches-py"))
    with pytest.raises(
        RuntimeError, match=f"CIFAR10 could not be downloaded .*no network.*files for it into {expected}"
    ):
        data.prepare_data()


@pytest.mark.parametrize("name", FACTS)
def test_missing_files_without_download(name, tmp_path):
    data = TorchvisionDataModule(dataset=name, root=str(tmp_path), download=False)
    with pytest.raises(RuntimeError, match=f"files of {name} were not found and download is off; put"):
        data.prepare_data()


def test_grey_images(monkeypatch, tmp_path):
    class Fake:
        data = torch.randint(256, (30, 28, 28), dtype=torch.uint8)
        targets = torch.arange(30) % 10

    monkeypatch.setattr(TorchvisionDataModule, "_open", lambda self, train, download: Fake)
    data = TorchvisionDataModule(dataset="MNIST", root=str(tmp_path), batch_size=5)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (5, 1, 28, 28)
    assert MNIST is FACTS["MNIST"].build


def test_default_folder_is_torchs_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert TorchvisionDataModule(dataset="SVHN").root == tmp_path / "datasets"


def test_unknown_set_is_refused():
    with pytest.raises(ValueError, match="Expected `dataset` to be one of 'CIFAR10'"):
        TorchvisionDataModule(dataset="ImageNet")
