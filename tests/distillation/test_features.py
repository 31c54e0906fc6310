"""Distances between features against other formulas, and at the points where gradients are hard."""

import math

import pytest
import torch
from scipy.spatial.distance import cdist
from torch.nn import functional as F

from lightning_robust.distillation import (
    angular_distance,
    attention_map,
    attention_transfer_loss,
    cosine_distance,
    rkd_angle_loss,
    rkd_distance_loss,
)


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 5, 3, 2)])
def test_distances_of_directions(shape):
    g, h = features(0, *shape), features(1, *shape)
    cosine = F.cosine_similarity(g.flatten(1), h.flatten(1))
    torch.testing.assert_close(cosine_distance(g, h), 1 - cosine)
    torch.testing.assert_close(angular_distance(g, h), cosine.acos() / math.pi)
    torch.testing.assert_close(angular_distance(g, h, normalise=False), cosine.acos())


def test_the_gradient_of_the_angle():
    g, h = features(0, 4, 5).requires_grad_(), features(1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(angular_distance, (g, h))
    assert torch.autograd.gradcheck(cosine_distance, (g, h))


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, 0.0])
def test_gradients_are_finite_where_directions_agree_or_vanish(factor):
    h = features(0, 3, 5)
    g = (factor * h).requires_grad_()
    angle = angular_distance(g, h)
    expected = {1.0: 0.0, 3.0: 0.0, -1.0: 1.0, 0.0: 0.5}[factor]
    torch.testing.assert_close(angle, torch.full_like(angle, expected), atol=1e-7, rtol=0)
    assert torch.autograd.grad(angle.sum(), g)[0].isfinite().all()


def test_small_angles_do_not_drown_in_rounding():
    """The arc cosine of a float32 cosine knows no angle below 3e-4."""
    g = torch.tensor([[1.0, 0.0]])
    h = torch.tensor([[1.0, 1e-5]])
    torch.testing.assert_close(angular_distance(g, h, normalise=False), torch.tensor([1e-5]))


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_attention(power):
    maps = features(0, 3, 5, 2, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    expected = maps.abs().pow(power).mean(1).flatten(1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(attention_map(maps, power), expected)
    torch.testing.assert_close(attention_map(tokens, power), expected)


@pytest.mark.parametrize(("mine", "others"), [((4, 4), (2, 2)), ((2, 2), (4, 4)), ((4, 2), (2, 4))])
def test_attention_of_maps_of_other_size(mine, others):
    g, h = features(0, 3, 5, *mine), features(1, 3, 7, *others)
    loss = attention_transfer_loss(g, h)
    small = [F.avg_pool2d(each, (each.shape[2] // 2, each.shape[3] // 2)) for each in (g, h)]
    torch.testing.assert_close(loss, (attention_map(small[0]) - attention_map(small[1])).square().mean())


def test_relations_against_loops():
    g, h = features(0, 5, 3), features(1, 5, 4)

    def distances(x):
        found = torch.from_numpy(cdist(x, x))
        return found / found[found > 0].mean()

    torch.testing.assert_close(rkd_distance_loss(g, h), F.smooth_l1_loss(distances(g), distances(h)))

    def angles(x):
        found = torch.zeros(len(x), len(x), len(x), dtype=x.dtype)
        for i, j, k in ((i, j, k) for i in range(len(x)) for j in range(len(x)) for k in range(len(x))):
            if i not in (j, k):
                found[i, j, k] = F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)
        return found

    torch.testing.assert_close(rkd_angle_loss(g, h), F.smooth_l1_loss(angles(g), angles(h)))


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_relations_of_equal_or_single_samples(loss):
    for samples in (torch.ones(3, 4), torch.ones(1, 4)):
        given = samples.requires_grad_()
        value = loss(given, torch.zeros(len(samples), 2))
        assert value == 0
        assert torch.autograd.grad(value, given)[0].isfinite().all()


@pytest.mark.parametrize("function", [angular_distance, cosine_distance, attention_transfer_loss, rkd_angle_loss])
def test_computes_in_float32_under_autocast(function):
    g, h = features(0, 3, 5, 2, 2).float(), features(1, 3, 5, 2, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        within = function(g, h)
    assert torch.equal(within, function(g, h))
    assert function(g.bfloat16(), h.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (cosine_distance, ((2, 3), (2, 4)), r"the student's have \(2, 3\) and the teacher's \(2, 4\)"),
        (angular_distance, ((2, 3), (3, 3)), r"Expected features of one shape"),
        (attention_transfer_loss, ((2, 3), (2, 3)), r"Attention needs maps \[B, D, H, W\] or tokens"),
        (attention_transfer_loss, ((2, 4, 3), (2, 5, 3)), r"do not have the same positions; name layers of the same"),
        (rkd_distance_loss, ((2, 3), (3, 3)), r"the student's are 2 and the teacher's 3"),
        (rkd_angle_loss, ((2, 3), (3, 3)), r"Expected features of the same samples"),
    ],
)
def test_features_that_do_not_fit_are_refused(function, shapes, message):
    with pytest.raises(ValueError, match=message):
        function(*(torch.zeros(shape) for shape in shapes))
