"""Bringing arrays and files into one form, and refusing what would have to be guessed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_robust.data import ArrayImages, as_images, as_labels, channel_statistics, decode_images, read_npz


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 6), (5, 1, 8, 6)),
        ((5, 8, 6, 3), (5, 3, 8, 6)),
        ((5, 3, 8, 6), (5, 3, 8, 6)),
        ((5, 1, 8, 6), (5, 1, 8, 6)),
        ((5, 8, 6, 1), (5, 1, 8, 6)),
        ((5, 4, 8, 8), (5, 4, 8, 8)),
    ],
)
def test_forms(shape, expected):
    array = np.random.randint(0, 256, shape).astype(np.uint8)
    images = as_images(array)
    assert images.shape == expected
    assert images.dtype == torch.uint8
    assert sorted(images.flatten().tolist()) == sorted(array.flatten().tolist())


def test_channels_last_is_transposed():
    array = np.random.rand(2, 5, 6, 3)
    assert np.allclose(as_images(array).numpy(), array.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_become_float32(dtype):
    assert as_images(torch.rand(2, 3, 8, 8).to(dtype)).dtype == torch.float32


def test_rounding_errors_are_clamped():
    images = as_images(torch.tensor([-5e-7, 1 + 5e-7]).reshape(1, 1, 2))
    assert images.min() == 0
    assert images.max() == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (torch.zeros(3, 3), r"to be \[N, H, W\].*but got shape \(3, 3\)"),
        (torch.zeros(2, 3, 8, 3), "Cannot tell where the channels"),
        (torch.zeros(2, 8, 8, 8), "an axis of 1 to 4 channels"),
        (torch.zeros(0, 3, 8, 8), "to hold images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "uint8, or float in"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bool), "uint8, or float in"),
        (torch.full((2, 3, 8, 8), 1.01), "values from .* to 1.0"),
        (torch.full((2, 3, 8, 8), -0.01), "values from -0.0"),
        (torch.full((2, 3, 8, 8), float("nan")), "without NaN"),
        (torch.full((2, 3, 8, 8), 255.0), "to 255.0"),
    ],
)
def test_refused_images(array, message):
    with pytest.raises(ValueError, match=message):
        as_images(array)


def test_layout_settles_what_is_ambiguous():
    array = torch.rand(2, 3, 8, 4)
    assert as_images(array, layout="NCHW").shape == (2, 3, 8, 4)
    assert as_images(array, layout="NHWC").shape == (2, 4, 3, 8)
    with pytest.raises(ValueError, match="Expected `layout` to be one of"):
        as_images(array, layout="CHW")
    with pytest.raises(ValueError, match="axis of 1 to 4"):
        as_images(torch.rand(2, 8, 8, 3), layout="NCHW")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.int64), r"to be \[N\] integers"),
        (torch.zeros(3), "integers"),
        (torch.zeros(3, dtype=torch.bool), "integers"),
        (torch.tensor([0, -1]), "to be >= 0 and < 3 but got values from -1 to 0"),
        (torch.tensor([0, 3]), "values from 0 to 3"),
    ],
)
def test_refused_labels(array, message):
    with pytest.raises(ValueError, match=message):
        as_labels(array, "labels", 3)


def test_labels_become_int64():
    assert as_labels(np.array([2, 1], dtype=np.uint8)).dtype == torch.int64
    with pytest.raises(ValueError, match="Expected `labels` to be >= 0 but"):
        as_labels(np.array([-2, 1]))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="as many labels as images but got 3 for 2"):
        ArrayImages(torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("scale", [1, 255])
def test_statistics_equal_numpy(scale):
    array = np.random.randint(0, 256, (5000, 3, 4, 4)).astype(np.uint8)
    images = torch.from_numpy(array) if scale == 255 else torch.from_numpy(array / 255.0)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (array / 255.0).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (array / 255.0).std((0, 2, 3)), rtol=1e-10)


def encode(arrays, form="PNG"):
    files = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, form)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), dtype=np.uint8), offsets


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 6, 5, 3)])
def test_encoded_images_are_decoded(shape):
    arrays = np.random.randint(0, 256, shape).astype(np.uint8)
    images = decode_images(*encode(arrays))
    expected = arrays[:, None] if len(shape) == 3 else arrays.transpose(0, 3, 1, 2)
    assert (images.numpy() == expected).all()


def test_other_colour_modes_become_rgb():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(buffer, "PNG")
    encoded = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    assert decode_images(encoded, np.array([0, len(encoded)])).shape == (1, 3, 4, 4)


def test_file_of_arrays(tmp_path):
    images, labels = np.random.rand(4, 6, 6), np.arange(4)
    np.savez(
        tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels,
        classes=np.array(["a", "b", "c", "d"]),
    )  # fmt: skip
    splits, names = read_npz(tmp_path / "a.npz")
    assert sorted(splits) == ["test", "train"]
    assert names == ("a", "b", "c", "d")
    assert torch.equal(splits["train"][0], as_images(images))
    assert splits["train"][1].tolist() == [0, 1, 2, 3]


def test_file_of_encoded_images(tmp_path):
    arrays = np.random.randint(0, 256, (3, 6, 6, 3)).astype(np.uint8)
    encoded, offsets = encode(arrays)
    np.savez(tmp_path / "a.npz", train_jpeg=encoded, train_offsets=offsets, train_labels=np.arange(3))
    splits, names = read_npz(tmp_path / "a.npz")
    assert torch.equal(splits["train"][0], as_images(arrays))
    assert names == ()


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file nowhere\.npz"):
        read_npz("nowhere.npz")
    np.savez(tmp_path / "a.npz", test_images=np.zeros((1, 4, 4)), test_labels=np.zeros(1, dtype=int))
    with pytest.raises(KeyError, match="neither train_images nor train_jpeg, only test_images, test_labels"):
        read_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", train_images=np.zeros((1, 4, 4)))
    with pytest.raises(KeyError, match="train_labels"):
        read_npz(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", train_images=np.zeros((1, 4, 4)), train_labels=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz(tmp_path / "c.npz")
