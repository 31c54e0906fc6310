"""Losses on features as objects: their projectors, layers and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust import distillation
from lightning_robust.distillation import (
    RKD,
    AttentionTransfer,
    FeatureAngle,
    FeatureCosine,
    FeatureMSE,
    LayerOutputs,
    angular_distance,
    cosine_distance,
    rkd_angle_loss,
    rkd_distance_loss,
)
from lightning_robust.distillation.layers import classifier_sizes, layer_width, own_layers
from support.distillation_losses import FEATURE_NAMES, build, call_with_features

LOGITS = torch.zeros(6, 4)


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(loss, mine, others):
    return loss(LOGITS, LOGITS, student_features=[mine], teacher_features=[others])


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5), (6, 5, 4, 2)])
def test_the_projector_maps_channels(shape):
    loss = FeatureMSE("a", "b", student_width=5, teacher_width=7)
    mine = features(0, *shape)
    others = features(1, *[7 if size == 5 else size for size in shape])
    (linear,) = loss.projectors
    moved = linear.weight @ mine.movedim(1 if len(shape) == 4 else -1, 0).flatten(1) + linear.bias[:, None]
    expected = (moved - others.movedim(1 if len(shape) == 4 else -1, 0).flatten(1)).square().mean()
    torch.testing.assert_close(compare(loss, mine, others), expected)
    compare(loss, mine, others).backward()
    assert linear.weight.grad.abs().sum() > 0


def test_values_are_those_of_the_functions():
    mine, others = features(0, 6, 5, 2, 2), features(1, 6, 5, 2, 2)
    torch.testing.assert_close(compare(FeatureMSE(projector=False), mine, others), F.mse_loss(mine, others))
    torch.testing.assert_close(compare(FeatureCosine(), mine, others), cosine_distance(mine, others).mean())
    torch.testing.assert_close(compare(FeatureAngle(), mine, others), angular_distance(mine, others).mean())
    both = 2 * rkd_distance_loss(mine, others) + 3 * rkd_angle_loss(mine, others)
    torch.testing.assert_close(compare(RKD(distance_weight=2.0, angle_weight=3.0), mine, others), both)


def test_layers_are_paired_and_summed():
    loss = FeatureCosine(["a", "b"], ["c", "d"])
    mine, others = [features(0, 6, 5), features(1, 6, 3)], [features(2, 6, 5), features(3, 6, 3)]
    value = loss(LOGITS, LOGITS, student_features=mine, teacher_features=others)
    torch.testing.assert_close(value, sum(cosine_distance(*pair).mean() for pair in zip(mine, others, strict=True)))
    assert FeatureCosine(["a", "b"]).teacher_layers == ["a", "b"]
    assert FeatureCosine().student_layers == [None]


@pytest.mark.parametrize("name", FEATURE_NAMES)
def test_no_gradient_reaches_the_teacher(name):
    loss = build(name)
    value, given = call_with_features(loss)
    gradients = torch.autograd.grad(value, given["teacher"], allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in gradients)
    gradients = torch.autograd.grad(value, given["student"], allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", FEATURE_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision(name, dtype):
    loss = build(name)
    value, _ = call_with_features(loss, dtype)
    assert value.ndim == 0
    assert value.dtype in (torch.float32, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        within, _ = call_with_features(loss, dtype)
    torch.testing.assert_close(value, within)


@pytest.mark.parametrize("name", FEATURE_NAMES)
def test_can_be_saved_and_built_anew(name):
    loss = build(name)
    other = build(name)
    other.load_state_dict(loss.state_dict())
    torch.manual_seed(0)
    torch.testing.assert_close(call_with_features(loss.eval())[0], call_with_features(other.eval())[0])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: FeatureMSE(["a"], ["b", "c"]), r"`student_layer` names 1 and `teacher_layer` 2"),
        (
            lambda: FeatureMSE("a", student_width=[1, 2]),
            r"Expected `student_width` to hold a width for each of",
        ),
        (lambda: FeatureMSE("a", teacher_width=0), r"Expected `teacher_width` to be an integer >= 1 but got 0"),
        (lambda: compare(FeatureMSE("a"), *[features(0, 6, 5)] * 2), r"The projector of FeatureMSE is not built; set"),
        (lambda: FeatureMSE(projector=False)(LOGITS, LOGITS), r"FeatureMSE compares 1 pairs of features but got 0 of"),
        (
            lambda: compare(FeatureMSE(projector=False), features(0, 6, 5), features(0, 6, 4)),
            r"The student's features have 5 channels but the teacher's 4; set `projector`",
        ),
        (
            lambda: compare(FeatureMSE(student_width=5, teacher_width=3), features(0, 6, 5), features(0, 6, 4)),
            r"have 3 channels but the teacher's 4; correct `teacher_width`",
        ),
        (lambda: AttentionTransfer("a", power=0.0), r"Expected `power` to be a finite number > 0 but got 0.0"),
        (lambda: RKD(distance_weight=-1.0), r"Expected `distance_weight` to be a finite number >= 0 but got -1.0"),
        (lambda: RKD(angle_weight=-1.0), r"Expected `angle_weight` to be a finite number >= 0 but got -1.0"),
        (
            lambda: FeatureMSE().build([None], [3], None),
            r"FeatureMSE cannot read off how many channels the features before the classifier have; set `student_wid",
        ),
    ],
)
def test_refused(action, message):
    with pytest.raises(ValueError, match=message):
        action()


def test_sizes_of_layers():
    timm = pytest.importorskip("timm")
    net = nn.Module()
    net.backbone = timm.create_model("test_resnet", num_classes=7)
    stage = net.backbone.feature_info[-1]
    assert layer_width(net, f"backbone.{stage['module']}") == stage["num_chs"]
    assert classifier_sizes(net) == (net.backbone.num_features, 7)
    assert layer_width(net, "backbone") is None
    plain = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.LayerNorm(20))
    assert [layer_width(plain, str(number)) for number in range(5)] == [5, 5, None, None, 20]
    assert classifier_sizes(plain) == (None, None)
    assert classifier_sizes(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))) == (None, None)
    assert classifier_sizes(nn.Linear(3, 4)) == (3, 4)


def test_what_stands_apart_is_no_layer():
    net = nn.Sequential(nn.Linear(3, 4))
    head = nn.Sequential(nn.Linear(9, 9))
    head.stands_apart = True
    net.add_module("head", head)
    assert list(own_layers(net)) == ["0"]
    assert classifier_sizes(net) == (3, 4)


def test_outputs_of_layers():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    x = features(0, 2, 3)
    with LayerOutputs(net, ["1", "0"], needs_grad=True) as outputs:
        net(features(1, 5, 3))
        expected = net(x)
        with torch.no_grad():
            net(features(2, 2, 3))
        assert torch.equal(outputs.take(2)[0], expected)
        assert outputs.take(5)[1].shape == (5, 4)
        outputs.clear()
        with pytest.raises(ValueError, match=r"The layer '1' of the network did not run, so there are no features"):
            outputs.take(2)
        with torch.no_grad():
            net(x)
        with pytest.raises(ValueError, match=r"ran without gradients only"):
            outputs.take(2)
    assert not net[0]._forward_hooks


def test_every_loss_is_exported():
    assert {"FeatureMSE", "FeatureAngle", "FeatureCosine", "AttentionTransfer", "RKD", "USKD", "DHKD"} <= set(
        distillation.__all__
    )
    assert len(FEATURE_NAMES) == 7
