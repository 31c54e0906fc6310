"""Normalisation as a layer."""

import pytest
import torch
from torchvision.transforms import v2

from lightning_robust.models import Normalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchvision(dtype):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = torch.rand(2, 3, 5, 4, dtype=dtype)
    torch.testing.assert_close(Normalize(mean, std).to(dtype)(x), v2.Normalize(mean, std)(x))


def test_one_value_serves_all_channels():
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(Normalize([0.5], [0.25])(x), (x - 0.5) * 4)


def test_statistics_are_saved_and_not_trained():
    layer = Normalize([0.5], [0.25])
    assert set(layer.state_dict()) == {"mean", "std"}
    assert not list(layer.parameters())
    assert repr(layer) == "Normalize(mean=[0.5], std=[0.25])"


def test_gradient_is_in_pixel_units():
    x = torch.rand(1, 1, 2, 2, requires_grad=True)
    Normalize([0.5], [0.25])(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 4.0))


@pytest.mark.parametrize(("mean", "std", "message"), [
    ([0.5], [0.1, 0.2], "one value per channel"), ([], [], "one value per channel"), ([0.5], [0.0], "`std`"),
])  # fmt: skip
def test_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)
