"""Cutout against a loop over pixels."""

import pytest
import torch

from lightning_robust.data import ArrayDataModule, Cutout, augmentation, cutout_mask


@pytest.mark.parametrize("length", [2, 5, 8, 40])
def test_the_mask_equals_a_loop_over_pixels(length):
    centers = [(0, 0), (7, 11), (15, 3)]
    mask = cutout_mask(16, 12, length, centers)
    for row in range(16):
        for column in range(12):
            inside = any(
                -(length // 2) <= row - y < length // 2 and -(length // 2) <= column - x < length // 2
                for y, x in centers
            )
            assert bool(mask[row, column] == 0) == inside


def test_holes_are_filled_and_the_rest_stays():
    image = torch.rand(3, 16, 12) + 1
    torch.manual_seed(0)
    holed = Cutout(length=6, holes=2, fill=[0.1, 0.2, 0.3])(image)
    hole = (holed != image).all(0)
    assert 0 < int(hole.sum()) <= 2 * 36
    for channel, value in enumerate([0.1, 0.2, 0.3]):
        assert torch.equal(holed[channel][hole], torch.full((int(hole.sum()),), value))
    assert torch.equal(holed[:, ~hole], image[:, ~hole])
    torch.manual_seed(0)
    assert torch.equal(Cutout(length=6, holes=2, fill=[0.1, 0.2, 0.3])(image), holed)


def test_centres_are_anywhere_in_the_image():
    image = torch.ones(1, 6, 4)
    torch.manual_seed(1)
    holed = torch.stack([Cutout(length=2)(image)[0] for _ in range(300)])
    covered = (holed == 0).double().mean(0)
    assert bool((covered > 0).all())
    assert set((holed == 0).sum((1, 2)).tolist()) == {1, 2, 4}  # a corner, an edge, the whole hole


def test_the_fill_has_the_units_of_floating_point_images():
    bytes_ = torch.full((1, 8, 8), 200, dtype=torch.uint8)
    holed = Cutout(length=8, fill=0.5)(bytes_)
    assert holed.dtype == torch.uint8
    assert set(holed.unique().tolist()) <= {127, 128, 200}


def test_as_the_augmentation_of_a_data_module():
    images = torch.full((40, 1, 8, 8), 255, dtype=torch.uint8)
    images[20:] = 0
    data = ArrayDataModule(train=(images, torch.arange(40) % 2), augment="cutout", batch_size=8)
    data.prepare_data()
    data.setup("fit")
    x = torch.cat([x for x, _ in data.train_dataloader()])
    assert bool(((x - 0.5).abs() < 0.01).flatten(1).any(1).all())  # the mean of all images
    assert augmentation("cutout", 8)(images[0]).shape == (1, 8, 8)


def test_refusals():
    with pytest.raises(ValueError, match="`length` to be an integer >= 2"):
        Cutout(length=1)
    with pytest.raises(ValueError, match="`holes` to be an integer >= 1"):
        Cutout(holes=0)
    with pytest.raises(ValueError, match=r"single images \[C, H, W\] but got shape \(2, 3, 8, 8\)"):
        Cutout()(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="`fill` to be one number or 1, one per channel"):
        Cutout(fill=[0.1, 0.2, 0.3])(torch.zeros(1, 8, 8))
