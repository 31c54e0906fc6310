import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.objectives import ARREST, arrest_loss, noisy_replay
from support.attacked import SIZE, CountingNet, images

ATTACK = PGD(eps=0.1, steps=2)


def seeded():
    return torch.Generator().manual_seed(0)


class Wide(nn.Module):
    """Another width of features; the layer before them is `project`."""

    def __init__(self, width=7):
        super().__init__()
        self.project = nn.Linear(3 * SIZE * SIZE, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.project(x.flatten(1)))


def features_of(net, x):
    return torch.tanh(net.norm(net.conv(x))).flatten(1)


def angles(first, second):
    return torch.stack(
        [torch.acos(a @ b / (a.norm() * b.norm())) / math.pi for a, b in zip(first, second, strict=True)]
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_loss_is_cross_entropy_plus_the_angle_to_the_teachers_features(mode):
    x, y = images(dtype=torch.float64)
    teacher, net = CountingNet().double(), CountingNet().double().train(mode == "train")
    objective = ARREST(teacher=teacher, weight=3.0, replay_threshold=None, attack=ATTACK)
    prepared = objective.prepare(net, x, y, generator=seeded())
    assert torch.equal(prepared.x_adv, ATTACK(net, x, y, generator=seeded()))
    output = objective(net, prepared)
    reference = copy.deepcopy(net)
    g, g0 = features_of(reference, prepared.x_adv), features_of(teacher.eval(), x).detach()
    samples = F.cross_entropy(reference.head(g), y, reduction="none") + 3 * angles(g, g0)
    torch.testing.assert_close(output.sample_losses, samples, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.loss, samples.mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.logs["distance"], angles(g, g0).mean().detach())
    gradients = [
        torch.autograd.grad(loss, list(module.parameters()))
        for loss, module in ((output.loss, net), (samples.mean(), reference))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert not teacher.training
    assert "replayed" not in output.logs


def test_a_student_that_equals_its_teacher_has_a_finite_gradient():
    x, y = images()
    teacher = CountingNet().eval()
    net = copy.deepcopy(teacher)
    objective = ARREST(teacher=teacher, attack=PGD(eps=0.0, steps=1))
    output = objective(net, objective.prepare(net, x, y))
    assert float(output.logs["distance"]) < 1e-3
    output.loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())


def test_samples_whose_features_moved_far_are_replayed_with_noise():
    x, y = images()
    net, teacher = CountingNet().eval(), CountingNet().eval()
    attacked = ATTACK(net, x, y, generator=seeded())
    far = angles(features_of(net, attacked), features_of(teacher, x)).detach()
    threshold = float(far.median())
    objective = ARREST(teacher=teacher, replay_threshold=threshold, replay_noise=0.05, attack=ATTACK)
    before = net.norm.running_mean.clone()
    prepared = objective.prepare(net.train(), x, y, generator=seeded())
    assert torch.equal(net.norm.running_mean, before)
    assert all(module.training for module in net.modules())
    moved = far > threshold
    assert 0 < int(moved.sum()) < len(x)
    assert torch.equal(prepared.x_adv[~moved], attacked[~moved])
    noise = (prepared.x_adv - x)[moved]
    assert 0.04 < float(noise.abs().max()) <= 0.05 + 1e-6
    assert float(prepared.x_adv.min()) >= 0
    assert float(prepared.x_adv.max()) <= 1
    torch.testing.assert_close(objective(net, prepared).logs["replayed"], moved.float().mean())


@pytest.mark.parametrize(("threshold", "replayed"), [(1.0, 0.0), (0.0, 1.0)])
def test_thresholds_at_the_ends(threshold, replayed):
    x, y = images()
    objective = ARREST(teacher=CountingNet(), replay_threshold=threshold, attack=ATTACK)
    net = CountingNet()
    assert float(objective(net, objective.prepare(net, x, y)).logs["replayed"]) == replayed


def test_noise_is_uniform_within_the_bounds_and_repeatable():
    x = torch.rand(4, 3, SIZE, SIZE)
    found = [noisy_replay(x, x + 9, torch.ones(4), 0.5, 0.3, bounds=(0.2, 0.8), generator=seeded()) for _ in range(2)]
    assert torch.equal(*found)
    assert float(found[0].min()) == pytest.approx(0.2)
    assert float(found[0].max()) == pytest.approx(0.8)


def test_features_by_layer_name_and_of_a_timm_network():
    x, y = images()
    net, teacher = CountingNet(), Wide(width=6)
    objective = ARREST(teacher=teacher, features_from="norm", teacher_features_from="project", attack=ATTACK)
    prepared = objective.prepare(net, x, y)
    torch.testing.assert_close(prepared.extra["reference"], teacher.project(x.flatten(1)).detach())
    output = objective(net.eval(), prepared)
    maps = net.norm(net.conv(prepared.x_adv)).mean((2, 3))
    torch.testing.assert_close(output.logs["distance"], angles(maps, prepared.extra["reference"]).mean().detach())

    resnet = timm.create_model("test_resnet", num_classes=4).eval()
    objective = ARREST(teacher=resnet, attack=ATTACK)
    x = torch.rand(2, 3, 32, 32)
    prepared = objective.prepare(resnet, x, torch.tensor([0, 1]))
    expected = resnet.forward_head(resnet.forward_features(x), pre_logits=True)
    torch.testing.assert_close(prepared.extra["reference"], expected.detach())


def test_copies_watch_anew_and_a_fresh_fit_leaves_no_hooks():
    x, y = images()
    net = CountingNet()
    objective = ARREST(teacher=CountingNet(), attack=ATTACK)
    prepared = objective.prepare(net, x, y)
    assert len(net.head._forward_hooks) == 1
    copied = copy.deepcopy(objective)
    assert copied.teachers.teacher("teacher").network is objective.teachers.teacher("teacher").network
    other = CountingNet()
    copied(other, copied.prepare(other, x, y))
    assert bool(objective(net, prepared).loss.isfinite())
    objective.prepare(other, x, y)  # another student: the first is let go
    assert len(net.head._forward_hooks) == 0
    objective.ready()
    assert len(objective.teachers.teacher("teacher").network.head._forward_hooks) == 1  # that of the copy


def test_no_layer_no_module_no_common_width_is_refused():
    x, y = images()
    net = CountingNet()
    with pytest.raises(ValueError, match=r"student's have shape \[8, 216\] and the teacher's \[8, 7\]; take a teacher"):
        ARREST(teacher=Wide(), attack=ATTACK).prepare(net, x, y)
    with pytest.raises(ValueError, match="The model CountingNet has no layer 'norn'; it has 'norm'"):
        ARREST(teacher=net, features_from="norn", attack=ATTACK).prepare(net, x, y)
    convolutional = nn.Sequential(nn.Conv2d(3, 4, SIZE), nn.Flatten())
    with pytest.raises(ValueError, match="has no linear layer that its features could be the input of"):
        ARREST(teacher=net, attack=ATTACK).prepare(convolutional, x, y)
    with pytest.raises(TypeError, match="it is a bare function; give the"):
        ARREST(teacher=net, attack=ATTACK).prepare(lambda images: net(images), x, y)
    objective = ARREST(teacher=net, attack=ATTACK)
    prepared = objective.prepare(net, x, y)
    with pytest.raises(ValueError, match="did not run on the 8 samples"):
        objective(CountingNet(), prepared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "`weight` to be a finite number >= 0"),
        ({"replay_noise": -1.0}, "`replay_noise` to be a finite number >= 0"),
        ({"replay_threshold": 2.0}, r"`replay_threshold` to be in \[0.0, 1.0\]"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ARREST(teacher=CountingNet(), **options)


def test_cost_counts_the_look_at_the_features():
    teacher = CountingNet()
    assert ARREST(teacher=teacher, attack=ATTACK).passes(2) == pytest.approx(ATTACK.passes + 1 / 3 + 2)
    assert ARREST(teacher=teacher, attack=ATTACK, replay_threshold=None).passes(2) == ATTACK.passes + 2


def test_the_function_alone():
    g, h = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).roll(1, 0)
    loss, adversarial, distance = arrest_loss(torch.zeros(3, 3).double(), torch.arange(3), g, h, weight=4.0)
    torch.testing.assert_close(distance, torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(loss, adversarial + 2.0)
