"""Features of a step in modules of many forms."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from lightning_robust.training import FeatureCapture, FeaturesNotCaptured
from support.modules import CLASSES, Images, PlainModule


class Wrapped(nn.Module):
    """Networks by name; `run` says what a step does with them."""

    def __init__(self, run, **networks):
        super().__init__()
        self.run = run
        for name, network in networks.items():
            setattr(self, name, network)

    def forward(self, x):
        return self.run(self, x)


def mlp(classes=3):
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, classes))


def features_of(module, x, features_from=None, **options):
    with FeatureCapture(module, features_from, **options) as capture:
        return capture.take(module(x)), capture.classifier


def test_input_of_the_classifier():
    module, x = PlainModule(), Images(5).x
    found, classifier = features_of(module, x)
    module.eval()
    found, classifier = features_of(module, x)
    assert torch.equal(found, module.net[:-1](x))
    assert classifier is module.net[-1]
    assert not found.requires_grad


@pytest.mark.parametrize("name", ["resnet8_cifar", "vit_tiny_patch16_224", "mobilenetv3_small_050", "resnetv2_50"])
def test_timm(name):
    import lightning_robust.models  # noqa: F401 - registers resnet8_cifar

    options = {"img_size": 32} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=7, **options).eval()
    module, x = Wrapped(lambda self, x: self.net(x), net=net), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, classifier = features_of(module, x)
        expected = net.forward_head(net.forward_features(x), pre_logits=True)
    assert torch.equal(found, expected.flatten(1))
    assert classifier is net.get_classifier()


def test_a_named_layer_and_pooling():
    module, x = PlainModule().eval(), Images(5).x
    found, classifier = features_of(module, x, "net.0")
    torch.testing.assert_close(found, module.net[0](x).mean((2, 3)))
    assert classifier is None
    tokens = Wrapped(lambda self, x: self.head(self.body(x).mean(1)), body=nn.Linear(4, 5), head=nn.Linear(5, 2))
    words = torch.rand(3, 7, 4)
    torch.testing.assert_close(features_of(tokens, words, "body")[0], tokens.body(words).mean(1))


def test_scaled_logits_come_from_the_only_layer_of_their_shape():
    module = Wrapped(lambda self, x: self.net(x) / 2, net=mlp())
    x = torch.randn(2, 4)
    assert torch.equal(features_of(module, x)[0], module.net[:2](x))


def test_the_network_of_the_logits_is_told_from_its_teacher():
    module = Wrapped(lambda self, x: (self.student(x), self.teacher(x))[0], student=mlp(), teacher=mlp())
    x = torch.randn(2, 4)
    found, classifier = features_of(module, x)
    assert classifier is module.student[2]
    assert torch.equal(found, module.student[:2](x))


def test_the_pass_of_the_logits_is_told_from_others():
    def step(self, x):
        logits = self.net(x)
        for _ in range(40):
            self.net(x + 1)
        return logits

    module, x = Wrapped(step, net=mlp()), torch.randn(2, 4)
    assert torch.equal(features_of(module, x)[0], module.net[:2](x))


def test_only_some_calls_are_remembered():
    module, x = mlp(), torch.randn(2, 4)
    with FeatureCapture(module) as capture:
        for _ in range(200):
            logits = module(x)
        assert [len(calls) for calls in capture._calls.values()] == [64, 64]
        assert torch.equal(capture.take(logits), module[:2](x))
        capture.clear()
        with pytest.raises(FeaturesNotCaptured):
            capture.take(logits)


def test_a_head_on_a_timm_network_wins_over_its_classifier():
    import lightning_robust.models  # noqa: F401

    net = timm.create_model("resnet8_cifar", num_classes=5).eval()
    module, x = Wrapped(lambda self, x: self.head(self.net(x)), net=net, head=nn.Linear(5, 5)), torch.rand(2, 3, 8, 8)
    assert torch.equal(features_of(module, x)[0], net(x))


def test_graph_if_wanted():
    module, x = mlp(), torch.randn(2, 4)
    with FeatureCapture(module, needs_grad=True) as capture:
        logits = module(x)
        with torch.no_grad():
            module(x)
        found = capture.take(logits)
    (gradient,) = torch.autograd.grad(found.sum(), module[0].weight)
    assert gradient.abs().sum() > 0


def test_copies_do_not_carry_the_hook_and_detaching_forgets():
    module = mlp()
    capture = FeatureCapture(module)
    capture.attach()
    capture.attach()
    assert len(module[2]._forward_hooks) == 1
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin(torch.randn(2, 4))
    assert not capture._calls
    capture.active = False
    module(torch.randn(2, 4))
    assert not capture._calls
    capture.detach()
    assert not module[2]._forward_hooks


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    torch._dynamo.reset()
    net = mlp()
    module, x = Wrapped(lambda self, x: self.net(x), net=torch.compile(net, backend=backend)), torch.randn(5, 4)
    capture = FeatureCapture(module)
    capture.attach()
    for scale in (1, 2):
        for active in (True, False):
            capture.clear()
            capture.active = active
            logits = module(scale * x)
            assert bool(capture._calls) == active
            if active:
                torch.testing.assert_close(capture.take(logits), net[:2](scale * x).detach())
    capture.detach()
    module(x)
    with FeatureCapture(module) as late, pytest.raises(FeaturesNotCaptured, match=r"until torch.compiler.reset\(\)"):
        late.take(module(x))


def test_what_cannot_be_told_is_refused():
    two = Wrapped(lambda self, x: self.a(x) + self.b(x), a=mlp(), b=mlp())
    with pytest.raises(
        FeaturesNotCaptured, match=r'Several layers of Wrapped .*\(a.2, b.2\); features_from="..." names'
    ):
        features_of(two, torch.randn(2, 4))
    none = nn.Sequential(nn.Conv1d(1, CLASSES, 4), nn.Flatten())
    with pytest.raises(FeaturesNotCaptured, match=r"No linear layer of Sequential returned its logits \[2, 4\]"):
        features_of(none, torch.randn(2, 1, 4))
    with pytest.raises(ValueError, match=r"features_from='a.3' names no sub-module of Wrapped; it has a"):
        FeatureCapture(two, "a.3")
    unused = Wrapped(lambda self, x: self.a(x), a=mlp(), b=mlp())
    with pytest.raises(FeaturesNotCaptured, match=r"features_from='b.0' was not called by the step of Wrapped"):
        features_of(unused, torch.randn(2, 4), "b.0")
