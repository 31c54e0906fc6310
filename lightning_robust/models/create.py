# SPDX-License-Identifier: Apache-2.0
"""Making a backbone from a name."""

import difflib
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from lightning_robust.checks import check_integer
from lightning_robust.models import backbones as _registers_with_timm  # noqa: F401

__all__ = ["create_backbone"]


def create_backbone(
    backbone: str | Callable[..., Any], num_classes: int, in_chans: int = 3, **kwargs: Any
) -> nn.Module:
    """Create a timm model by name, or return a module as it is.

    Besides timm's own models there are ``resnet8_cifar``, ``resnet20_cifar``, ``resnet56_cifar``,
    ``resnet18_cifar``, ``preact_resnet18``, ``wide_resnet28_10``, ``wide_resnet34_10`` and ``mobilenetv2_cifar`` for
    small images.

    Args:
        backbone: a timm name, or a module that maps images to logits.
        num_classes: number of logits.
        in_chans: number of channels of the images.
        **kwargs: passed to ``timm.create_model``, for example ``pretrained``, ``drop_path_rate`` or ``img_size``.

    Raises:
        ValueError: timm has no model of that name; near names are given. Or options come with a module.
        TypeError: ``backbone`` is neither a name nor a module.

    Example:
        >>> network = create_backbone("resnet8_cifar", num_classes=10, in_chans=1)
        >>> network.num_classes
        10
    """
    check_integer("num_classes", num_classes, 1)
    check_integer("in_chans", in_chans, 1)
    if isinstance(backbone, nn.Module):
        if kwargs:
            raise ValueError(f"Expected no options with a backbone module but got {', '.join(sorted(kwargs))}.")
        return backbone
    if not isinstance(backbone, str):
        raise TypeError(
            f"Expected `backbone` to be a timm name or a torch.nn.Module but got {type(backbone).__name__}."
        )
    if backbone.startswith("<"):  # what ImageClassifier notes in checkpoints in place of a module
        raise ValueError(
            f"The checkpoint was made from a backbone object {backbone}, which it does not contain; pass it: "
            "load_from_checkpoint(path, backbone=...)."
        )
    # a name with a colon points to a hub or a folder, which only timm can look up
    if ":" not in backbone and not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists the names."
        raise ValueError(f"timm has no model {backbone!r}{hint}")
    model: nn.Module = timm.create_model(backbone, num_classes=num_classes, in_chans=in_chans, **kwargs)
    return model
