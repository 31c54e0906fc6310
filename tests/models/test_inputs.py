"""What a batch may look like."""

import pytest
import torch

from lightning_robust.models.inputs import check_image_form, check_image_values, check_labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_good_images(dtype):
    images = torch.rand(2, 3, 8, 8).to(dtype)
    check_image_form(images, 3)
    check_image_values(images)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 8, 8, 3), (2, 3)])
def test_refused_shapes(shape):
    with pytest.raises(ValueError, match=r"Expected images of shape \[B, 3, H, W\] but got \["):
        check_image_form(torch.zeros(shape), 3)


def test_refused_integers():
    with pytest.raises(TypeError, match=r"float images in \[0, 1\] but got torch.uint8; divide integer images by 255"):
        check_image_form(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 3)


@pytest.mark.parametrize("value", [-2e-6, 1 + 2e-6, 255.0, float("nan"), float("inf")])
def test_refused_values(value):
    images = torch.rand(2, 3, 8, 8)
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"Expected images in \[0, 1\] without NaN but got values from"):
        check_image_values(images)


def test_rounding_is_allowed():
    check_image_values(torch.tensor([-5e-7, 1 + 5e-7]))


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.rand(2, 4)])
def test_good_labels(labels):
    check_labels(labels, 2, 4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "Expected labels from 0 to 3 but got values from 0 to 4; set num_classes"),
        (torch.tensor([0, -1]), "values from -1 to 0"),
        (torch.tensor([0, 1, 2]), r"torch.int64 labels of shape \[2\] but got \[3\]"),
        (torch.tensor([0.0, 1.0]), r"torch.float32 labels of shape \[2, 4\] but got \[2\]"),
    ],
)
def test_refused_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 2, 4)
