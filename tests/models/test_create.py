"""Backbones by name, or as they are."""

import pytest
import timm
import torch
from torch import nn

from lightning_robust.models import create_backbone


@pytest.mark.parametrize("name", ["resnet8_cifar", "test_resnet"])
def test_name(name):
    model = create_backbone(name, num_classes=5, in_chans=2)
    assert model(torch.rand(2, 2, 32, 32)).shape == (2, 5)


def test_options_are_passed_on():
    model = create_backbone("test_vit", 5, 1, img_size=16, patch_size=4)
    assert model(torch.rand(1, 1, 16, 16)).shape == (1, 5)


def test_module_stays_as_it_is():
    module = nn.Linear(3, 2)
    assert create_backbone(module, num_classes=2) is module
    with pytest.raises(ValueError, match="no options with a backbone module but got drop_rate"):
        create_backbone(module, num_classes=2, drop_rate=0.1)


def test_near_names_of_an_unknown_model():
    with pytest.raises(ValueError, match=r"timm has no model 'resnet81_cifar'; did you mean .*resnet8_cifar"):
        create_backbone("resnet81_cifar", num_classes=2)
    with pytest.raises(ValueError, match=r"timm has no model '@@@'; timm.list_models\(\) lists the names"):
        create_backbone("@@@", num_classes=2)


def test_sources_are_left_to_timm(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: (name, kwargs))
    assert create_backbone("hf-hub:someone/model", 3)[0] == "hf-hub:someone/model"


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"a timm name or a torch.nn.Module but got function"):
        create_backbone(lambda x: x, num_classes=2)


@pytest.mark.parametrize(("classes", "channels"), [(0, 3), (2, 0)])
def test_refused_numbers(classes, channels):
    with pytest.raises(ValueError, match="to be an integer >= 1 but got 0"):
        create_backbone("resnet8_cifar", classes, channels)
