# SPDX-License-Identifier: Apache-2.0
"""Networks for 32 x 32 images, registered with timm under names of their own.

timm's ResNets begin with a 7 x 7 convolution of stride 2 and a pooling, which suits 224 x 224 images; the networks of
the CIFAR papers begin with one 3 x 3 convolution of stride 1. They are built from timm's classes with that stem.
"""

from typing import Any

import timm
from timm.layers.create_conv2d import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from lightning_robust.models.cifar_resnet import CifarResNet

__all__: list[str] = []  # register_model adds each network


def _cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        "mobilenetv2_cifar": _cfg("conv_stem", "classifier"),
        "preact_resnet18": _cfg("stem.conv", "head.fc"),
        "resnet18_cifar": _cfg("conv1", "fc"),
        "resnet20_cifar": _cfg("conv1", "fc"),
        "resnet56_cifar": _cfg("conv1", "fc"),
        "resnet8_cifar": _cfg("conv1", "fc"),
        "wide_resnet28_10": _cfg("stem.conv", "head.fc"),
        "wide_resnet34_10": _cfg("stem.conv", "head.fc"),
    }
)

_THREE_STAGES = ("resnet8_cifar", "resnet20_cifar", "resnet56_cifar", "wide_resnet28_10", "wide_resnet34_10")


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-8 of He et al.'s CIFAR family (75 k parameters), for demonstrations and tests."""
    return _build(CifarResNet, "resnet8_cifar", pretrained, blocks=1, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for CIFAR (0.27 M parameters), arXiv:1512.03385."""
    return _build(CifarResNet, "resnet20_cifar", pretrained, blocks=3, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR (0.85 M parameters), arXiv:1512.03385."""
    return _build(CifarResNet, "resnet56_cifar", pretrained, blocks=9, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with a 3 x 3 stem and no pooling (11.17 M parameters with 10 classes)."""
    return _build(_resnet18, "resnet18_cifar", pretrained, **kwargs)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-18 (11.17 M parameters with 10 classes), arXiv:1603.05027."""
    channels = (64, 128, 256, 512)
    return _build(_preact, "preact_resnet18", pretrained, layers=[2] * 4, channels=channels, stem_chs=64, **kwargs)


@register_model
def wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-10 (36.48 M parameters with 10 classes), arXiv:1605.07146."""
    channels = (160, 320, 640)
    return _build(_preact, "wide_resnet28_10", pretrained, layers=[4] * 3, channels=channels, stem_chs=16, **kwargs)


@register_model
def wide_resnet34_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-34-10 (46.16 M parameters with 10 classes), the usual large network of adversarial training."""
    channels = (160, 320, 640)
    return _build(_preact, "wide_resnet34_10", pretrained, layers=[5] * 3, channels=channels, stem_chs=16, **kwargs)


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 with a total stride of 8 instead of 32 (2.24 M parameters with 10 classes), arXiv:1801.04381."""
    return _build(_mobilenetv2, "mobilenetv2_cifar", pretrained, **kwargs)


def _build(network: Any, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained:
        raise ValueError(f"Expected `pretrained` to be False: there are no weights for {name}.")
    stages = 4 if name in _THREE_STAGES else 5  # the stem counts, for features_only=True
    features = {"feature_cls": "getter", "out_indices": tuple(range(stages))}
    model: nn.Module = build_model_with_cfg(network, name, False, feature_cfg=features, **kwargs)
    return model


def _resnet18(**kwargs: Any) -> nn.Module:
    # The papers start from the plain initialisation, not from zero residual branches.
    block: Any = BasicBlock
    model: Any = ResNet(block, (2, 2, 2, 2), **{"zero_init_last": False, **kwargs})
    model.conv1 = _stem(model.in_chans, 64)
    model.maxpool = nn.Identity()
    return _with_reductions(model, (1, 1, 2, 4, 8))


def _preact(*, stem_chs: int, **kwargs: Any) -> nn.Module:
    model = ResNetV2(
        stem_chs=stem_chs,
        basic=True,
        bottle_ratio=1.0,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        **kwargs,
    )
    model.stem = nn.Sequential()
    model.stem.add_module("conv", _stem(model.in_chans, stem_chs))
    return _with_reductions(model, (1, 1, 2, 4, 8))


def _mobilenetv2(**kwargs: Any) -> nn.Module:
    model: Any = timm.create_model("mobilenetv2_100", **kwargs)
    for convolution in (model.conv_stem, model.blocks[1][0].conv_dw):
        convolution.stride = (1, 1)
    return _with_reductions(model, (1, 1, 2, 4, 8))


def _stem(in_chans: int, width: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _with_reductions(model: Any, reductions: tuple[int, ...]) -> nn.Module:
    # zip stops at the shorter one: wide networks have three stages
    for info, reduction in zip(model.feature_info, reductions, strict=False):
        info["reduction"] = reduction
    network: nn.Module = model
    return network
