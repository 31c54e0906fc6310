"""The networks of the papers: parameter counts, resolution, and what users of timm expect."""

import pytest
import timm
import torch

from lightning_robust.models import CifarResNet, backbones

# with 10 classes; He et al., Zagoruyko and Komodakis and the usual CIFAR versions give 0.27, 11.17, 36.48, 46.16 M
PARAMETERS = {
    "resnet8_cifar": 75_290,
    "resnet20_cifar": 269_722,
    "resnet56_cifar": 853_018,
    "resnet18_cifar": 11_173_962,
    "preact_resnet18": 11_172_170,
    "wide_resnet28_10": 36_479_194,
    "wide_resnet34_10": 46_160_474,
    "mobilenetv2_cifar": 2_236_682,
}
LIGHT = ["resnet8_cifar", "resnet18_cifar", "preact_resnet18", "mobilenetv2_cifar"]


def test_table_is_complete():
    assert sorted(PARAMETERS) == sorted(backbones.__all__) == sorted(backbones.default_cfgs)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("name", "reduction"), [("resnet20_cifar", 4), ("wide_resnet28_10", 4), ("resnet18_cifar", 8),
                                                 ("preact_resnet18", 8), ("mobilenetv2_cifar", 8)])  # fmt: skip
def test_resolution_of_the_features(name, reduction):
    with torch.device("meta"):
        model = timm.create_model(name)
        features = model.forward_features(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, model.num_features, 32 // reduction, 32 // reduction)
    assert model.feature_info[-1]["reduction"] == reduction


@pytest.mark.parametrize("name", LIGHT)
def test_interface_of_timm(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.rand(2, 1, 16, 16)
    logits = model(x)
    assert logits.shape == (2, 7)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert getattr(model.get_classifier(), "out_features", getattr(model.get_classifier(), "out_channels", None)) == 7
    last, intermediates = model.forward_intermediates(x)
    assert [feature.shape[2:] for feature in intermediates] == [
        (16 // info["reduction"],) * 2 for info in model.feature_info
    ]
    assert last.shape[0] == 2
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", LIGHT)
def test_features_only(name):
    model = timm.create_model(name, features_only=True, in_chans=2).eval()
    features = model(torch.rand(1, 2, 16, 16))
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    assert [16 // feature.shape[2] for feature in features] == model.feature_info.reduction()


@pytest.mark.parametrize("name", PARAMETERS)
def test_no_pretrained_weights(name):
    with pytest.raises(ValueError, match=f"Expected `pretrained` to be False: there are no weights for {name}"):
        timm.create_model(name, pretrained=True)


def test_preactivation_equals_the_definition():
    """The first projecting block against He et al.'s equations, written out."""
    model = timm.create_model("preact_resnet18").eval()
    block = model.stages[1].blocks[0]
    x = torch.randn(2, 64, 8, 8)
    functional = torch.nn.functional
    active = functional.relu(functional.batch_norm(x, torch.zeros(64), torch.ones(64)))
    hidden = functional.conv2d(active, block.conv1.weight, stride=2, padding=1)
    hidden = functional.relu(functional.batch_norm(hidden, torch.zeros(128), torch.ones(128)))
    expected = functional.conv2d(hidden, block.conv2.weight, padding=1)
    expected = expected + functional.conv2d(active, block.downsample.conv.weight, stride=2)
    torch.testing.assert_close(block(x), expected)


def test_shortcut_of_the_cifar_network_has_no_parameters():
    model = CifarResNet(blocks=1).eval()
    block = model.layer2[0]
    x = torch.randn(2, 16, 8, 8)
    torch.nn.init.zeros_(block.bn2.weight)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected.relu())


def test_cifar_network_options():
    model = CifarResNet(blocks=2, width=4, drop_rate=0.5, num_classes=3)
    x = torch.rand(4, 3, 12, 12, requires_grad=True)
    assert not torch.equal(model(x), model(x))
    model.eval()
    reference = model(x)
    torch.testing.assert_close(model(x), reference)
    model.train()
    model.head_drop.p = 0.0
    plain = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), plain)
    model(x).sum().backward()
    assert x.grad is not None
    assert set(model.group_matcher()) == {"stem", "blocks"}
    assert model.double().get_classifier().weight.dtype == torch.float64
    model.reset_classifier(5, "max")
    assert model(x.double()).shape == (4, 5)


def test_cifar_network_intermediates():
    model = CifarResNet(blocks=1, width=4).eval()
    x = torch.rand(1, 3, 8, 8)
    every = model.forward_intermediates(x, intermediates_only=True)
    assert [feature.shape[1] for feature in every] == [4, 4, 8, 16]
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [feature.shape[1] for feature in last_two] == [8, 16]
    last, chosen = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    torch.testing.assert_close(last, chosen[1])
    assert len(chosen) == 2
    with pytest.raises(ValueError, match="Expected `output_fmt` to be 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")
