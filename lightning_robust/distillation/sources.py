# SPDX-License-Identifier: Apache-2.0
"""Building teachers from what a configuration can say: a timm name or a file with weights."""

import difflib
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lightning_robust.distillation.teacher import Teacher
from lightning_robust.distillation.weights import WeightsFile, load_weights, read_weights
from lightning_robust.guards import rng_preserved

__all__ = ["Network", "build_teacher"]

TIMM = "timm:"
MODELS = "lightning_robust.models"  # stands above this room, so it is only reached when a network has to be built
FILE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# What a checkpoint of ImageClassifier says about its architecture and its input.
ARCHITECTURE = ("backbone", "num_classes", "in_chans", "mean", "std")
OPTIONS = ("backbone_options", "channels_last")


class Network(Protocol):
    """An ``nn.Module``, as a protocol: the help of an option typed ``nn.Module`` would list every module there is."""

    def modules(self) -> Iterator[nn.Module]:
        """Return all sub-modules."""
        ...


def build_teacher(
    source: str | Path | Network | Teacher,
    *,
    backbone: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    pretrained: bool = False,
    prefix: str | None = None,
    name: str = "teacher",
) -> Teacher:
    """Build a frozen teacher; the global random generators stand afterwards where they stood before.

    Files are read with ``weights_only=True``: nothing in them is executed. A checkpoint of our ``ImageClassifier``
    knows its architecture and its normalisation; any other file (Lightning checkpoint, state dictionary,
    safetensors) needs ``backbone``, and its inputs are taken as they come.

    Args:
        source: A network, which is copied; a teacher, which is returned; the path of a file with weights; or the name
            of a timm model, with ``"timm:"`` in front when it could be mistaken for a path.
        backbone: Name of the timm model whose weights the file holds.
        num_classes: Number of classes of the timm model.
        in_chans: Number of input channels of the timm model.
        pretrained: Download the published weights of the timm model.
        prefix: What the names of the weights in the file carry in front; found by itself when ``None``.
        name: What messages call the teacher.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``source`` is something else.
        ValueError: If the name is unknown, the file cannot be read without running code, or its weights do not fit.

    Example:
        >>> from lightning_robust.distillation import build_teacher
        >>> build_teacher("timm:no_such_network")
        Traceback (most recent call last):
        ValueError: There is no timm model 'no_such_network'; see timm.list_models().
    """
    if isinstance(source, Teacher):
        return source
    if isinstance(source, nn.Module):
        return Teacher(source, name=name, num_classes=num_classes)
    if not isinstance(source, str | Path):
        raise TypeError(
            f"Expected `{name}` to be a network, a Teacher, a path or the name of a timm model but got "
            f"{type(source).__name__}."
        )
    shape = {"num_classes": num_classes, "in_chans": in_chans}
    smoothing = 0.0
    with rng_preserved():
        if _is_file(source):
            file = read_weights(Path(source))
            smoothing = file.label_smoothing
            network = _from_file(file, backbone, shape, prefix)
        else:
            network = _create(str(source).removeprefix(TIMM), shape, pretrained=pretrained)
            if not pretrained:
                warnings.warn(
                    f"The {name} {source} has random weights; give a file with its weights and `backbone`, or set "
                    "`pretrained`.",
                    stacklevel=2,
                )
    told: dict[str, Any] = {"name": name, "num_classes": num_classes, "source": str(source)}
    return Teacher(network, **told, label_smoothing=smoothing, copy=False)


def _is_file(source: str | Path) -> bool:
    if str(source).startswith(TIMM):
        return False
    path = Path(source)
    return isinstance(source, Path) or path.suffix in FILE_SUFFIXES or os.sep in source or path.is_file()


def _create(name: str, shape: Mapping[str, int | None], *, pretrained: bool = False) -> nn.Module:
    import timm

    import_module(MODELS)  # registers our small backbones with timm
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()."
        raise ValueError(f"There is no timm model {name!r}; {hint}")
    given: dict[str, Any] = {key: value for key, value in shape.items() if value is not None}
    network: nn.Module = timm.create_model(name, pretrained=pretrained, **given)
    return network


def _from_file(
    file: WeightsFile, backbone: str | None, shape: Mapping[str, int | None], prefix: str | None
) -> nn.Module:
    if set(ARCHITECTURE) <= set(file.hyper_parameters):
        return _image_classifier(file, {"backbone": backbone, **shape})
    if backbone is None:
        raise ValueError(f"The teacher file {file.path} does not say which network it holds; set `backbone`.")
    network = _create(backbone, shape)
    load_weights(network, file, prefix=prefix, num_classes=getattr(network, "num_classes", None))
    return network


def _image_classifier(file: WeightsFile, asked: Mapping[str, Any]) -> nn.Module:
    told = {key: value for key, value in file.hyper_parameters.items() if key in (*ARCHITECTURE, *OPTIONS)}
    if told["backbone"].startswith("<"):  # a module of the user's own, which the file names but does not hold
        if asked["backbone"] is None:
            raise ValueError(
                f"The teacher file {file.path} was made with the network {told['backbone']}, which it does not hold; "
                "set `backbone`, or give Teacher(ImageClassifier.load_from_checkpoint(path, backbone=...))."
            )
        told["backbone"] = asked["backbone"]
    for key, value in asked.items():
        if value is not None and value != told[key]:
            raise ValueError(
                f"The teacher file {file.path} was trained with `{key}` = {told[key]!r} but {value!r} was asked for; "
                f"leave out `{key}`, or take another teacher."
            )
    classifier: nn.Module = import_module(MODELS).ImageClassifier(**told)
    load_weights(classifier.get_submodule("backbone"), file, prefix="backbone.")
    return classifier
