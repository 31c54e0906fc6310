"""What an attack refuses to look at, and normalised images."""

import pytest
import torch
from torch import nn

from lightning_robust.attacks import FGSM, PGD, GeneratorDraws, InputSpace
from support.attacked import CountingNet, images

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture
def net():
    return CountingNet().eval()


def normalised(x):
    mean, std = (torch.tensor(values, dtype=x.dtype).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


class NormaliseInside(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(normalised(x))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("projection", ["ball-box", "box-ball", "box"])
def test_normalised_images_get_the_same_perturbation_as_pixels(net, norm, projection):
    net = net.double()
    x, y = images(dtype=torch.float64)
    options = {"eps": 0.05 if norm == "linf" else 0.5, "norm": norm, "steps": 5, "projection": projection}
    for start in ("uniform", "radial", "normal", "none"):
        inside = PGD(**options, random_start=start)(NormaliseInside(net), x, y)
        outside = PGD(**options, random_start=start, mean=MEAN, std=STD)(net, normalised(x), y)
        torch.testing.assert_close(outside, normalised(inside))


def test_normalised_images_stay_possible(net):
    x, y = images()
    x = x.round()  # black and white: half of every step leaves the bounds
    attacked = PGD(steps=3, mean=MEAN, std=STD)(net, normalised(x), y)
    pixels = attacked * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6
    assert float((pixels - x).abs().max()) == pytest.approx(8 / 255, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounded_normalised_images_are_accepted(dtype):
    space = InputSpace(MEAN, STD)
    x, _ = images(dtype=torch.float64)
    x[0, :, 0, 0], x[0, :, 0, 1] = 0, 1
    space.check(normalised(x).to(dtype))
    space.check(normalised(x.to(dtype)))
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=r"Expected pixels in \[0, 1\] but got \[.*, 1.01"):
            space.check(normalised(x + 0.01).to(dtype))


def test_images_outside_the_bounds_are_refused(net):
    x, y = images()
    with pytest.raises(ValueError, match="normalised, give the attack the `mean` and `std`"):
        PGD(steps=1)(net, normalised(x), y)
    with pytest.raises(ValueError, match=r"Expected pixels in \[0, 1\] but got \[0, 1.00002\]"):
        PGD(steps=1)(net, torch.linspace(0, 1.00002, x.numel()).view_as(x), y)
    PGD(steps=1)(net, x / x.max() + 5e-7, y)  # rounding, not a mistake


def test_nan_images_are_refused(net):
    x, y = images()
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="Expected images without NaN"):
        PGD(steps=1)(net, x, y)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_are_refused(net, kind):
    x, y = images()
    with pytest.raises(TypeError, match="Expected floating-point images"):
        PGD(steps=1)(net, x.to(kind), y)


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(7, dtype=torch.long),
        torch.zeros(8, 1, dtype=torch.long),
        torch.zeros(8),
        torch.zeros(8, 4, 1),
        torch.tensor(1),
    ],
    ids=lambda t: f"{list(t.shape)}-{t.dtype}",
)
def test_targets_of_the_wrong_form_are_refused(net, target):
    x, _ = images()
    with pytest.raises((ValueError, TypeError), match=r"Expected images \[B, ...\] with integer classes \[B\]"):
        PGD(steps=1)(net, x, target)


def test_start_of_the_wrong_shape_is_refused(net):
    x, y = images()
    with pytest.raises(ValueError, match="Expected `start` to have shape"):
        PGD(steps=1)(net, x, y, start=x[:2])


def test_wrong_number_of_channels_is_refused(net):
    with pytest.raises(ValueError, match="Expected images with 3 channels"):
        PGD(steps=1, mean=MEAN, std=STD)(net, torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))


def test_something_else_than_logits_is_refused(net):
    x, y = images()
    with pytest.raises(ValueError, match=r"Expected logits \[B, C\] from the model but got \[8\] for 8 images"):
        PGD(steps=1)(lambda z: net(z).sum(1), x, y)


def test_a_device_has_to_wait_in_the_first_call_only(net):
    x, y = images()
    attack = PGD(steps=1)
    attack._checked_on.add("cpu")
    assert attack._problem(net, x, y, GeneratorDraws(torch.Generator()), None, None).check  # the CPU never waits
    meta = torch.empty(2, 3, 6, 6, device="meta")
    attack._checked_on.add("meta")
    labels = torch.empty(2, dtype=torch.long, device="meta")
    assert not attack._problem(net, meta, labels, GeneratorDraws(torch.Generator()), None, None).check


class Changed(nn.Module):
    """A network with something done to its output or around it."""

    def __init__(self, net, how):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x):
        return self.how(self.net, x)


@pytest.mark.parametrize(
    "attack", [PGD(steps=1), FGSM(), PGD(steps=1, loss="margin"), PGD(steps=1, loss="kl")], ids=repr
)
def test_one_logit_is_refused(net, attack):
    x, y = images(classes=2)
    with pytest.raises(
        ValueError, match=r"one logit per class from the model but got \[8, 1\]; let a binary classifier"
    ):
        attack(Changed(net, lambda net, x: net(x)[:, :1]), x, y)


@pytest.mark.parametrize("value", [2.0, 0.9, 1.02, float("nan")])
def test_targets_that_are_no_probabilities_are_refused(net, value):
    x, y = images()
    target = torch.nn.functional.one_hot(y, 4).float()
    target[3] = value / 4
    with pytest.raises(ValueError, match="rows add up to 1 but got a row with the sum"):
        PGD(steps=1)(net, x, target)
    target[3] = 1.001 / 4
    PGD(steps=1)(net, x, target)


def no_grad(net, x):
    with torch.no_grad():
        return net(x)


def detached_features(net, x):
    return net.head(torch.tanh(net.norm(net.conv(x))).flatten(1).detach())


@pytest.mark.parametrize("how", [no_grad, detached_features, lambda net, x: net(x.detach())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_without_a_way_back_to_the_images_are_refused(net, how, dtype):
    x, y = images(dtype=dtype)
    with pytest.raises(ValueError, match="No gradient reaches the images from the logits"):
        PGD(steps=1)(Changed(net.to(dtype), how), x, y)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "prob-margin", "kl"])
@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(loss, label):
    net = torch.nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"Expected labels to be in \[0, 3\] for logits of 4 classes"):
        PGD(steps=1, loss=loss)(net, torch.rand(2, 6), torch.tensor([0, label]))
