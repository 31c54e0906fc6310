# SPDX-License-Identifier: Apache-2.0
"""Building teachers from what a configuration can say: a timm name or a file with weights, and options."""

import difflib
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lightning_robust.distillation.teacher import Classes, Precision, Teacher
from lightning_robust.distillation.weights import WeightsFile, load_weights, read_weights
from lightning_robust.guards import rng_preserved

__all__ = ["Network", "TeacherSource", "build_teacher"]

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
    mean: list[float] | None = None,
    std: list[float] | None = None,
    image_size: int | None = None,
    dtype: Precision | None = None,
    temperature: float = 1.0,
    classes: Classes | None = None,
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
        mean: What is subtracted from each channel of the inputs, for a network that does not normalise by itself.
        std: What each channel is divided by then.
        image_size: Height and width that images are resized to.
        dtype: Type that the network computes in; that of the run when ``None``.
        temperature: Divides the logits before any loss sees them.
        classes: For each class of the student the teacher's class, or several; the same classes when ``None``.
        name: What messages call the teacher.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``source`` is something else.
        ValueError: If the name is unknown, the file cannot be read without running code, its weights do not fit, or an
            option says how to build a network where none is built.

    Example:
        >>> from lightning_robust.distillation import build_teacher
        >>> build_teacher("timm:no_such_network")
        Traceback (most recent call last):
        ValueError: There is no timm model 'no_such_network'; see timm.list_models().
    """
    _refuse_unread(name, source, backbone=backbone, in_chans=in_chans, pretrained=pretrained, prefix=prefix)
    if isinstance(source, Teacher):
        _refuse_unread(name, source, num_classes=num_classes)
        return source
    told: dict[str, Any] = {"name": name, "num_classes": num_classes, "temperature": temperature, "classes": classes}
    told |= {"mean": mean, "std": std, "image_size": image_size, "dtype": dtype}
    if isinstance(source, nn.Module):
        return Teacher(source, **told)
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
    return Teacher(network, **told, source=str(source), label_smoothing=smoothing, copy=False)


class TeacherSource:
    """Says which teacher to take and how, for places that build it when it is needed: a recipe, a callback.

    Args:
        source: A network, which is copied; a teacher; the path of a file with weights; or the name of a timm model.
        backbone: Name of the timm model whose weights the file holds; a checkpoint of ``ImageClassifier`` knows it.
        num_classes: Number of classes of the network; that of the student for a timm model when ``None``.
        in_chans: Number of input channels of a timm model; that of the student when ``None``.
        pretrained: Download the published weights of the timm model.
        prefix: What the names of the weights in the file carry in front; found by itself when ``None``.
        mean: What is subtracted from each channel of the inputs, for a network that does not normalise by itself.
        std: What each channel is divided by then.
        image_size: Height and width that images are resized to, for a network trained at another size.
        dtype: Type that the network computes in, ``"bfloat16"`` say; that of the run when ``None``.
        temperature: Divides the logits before any loss sees them.
        classes: For each class of the student the teacher's class, or a list of several that are one for the student.

    Raises:
        ValueError: From :meth:`build`; see :func:`build_teacher`.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import TeacherSource
        >>> TeacherSource(torch.nn.Linear(4, 3), classes=[2, 0]).build()(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        source: str | Path | Network | Teacher,
        *,
        backbone: str | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        pretrained: bool = False,
        prefix: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        image_size: int | None = None,
        dtype: Precision | None = None,
        temperature: float = 1.0,
        classes: Classes | None = None,
    ) -> None:
        self.source = source
        self._shape: dict[str, int | None] = {"num_classes": num_classes, "in_chans": in_chans}
        self._options: dict[str, Any] = {"backbone": backbone, "pretrained": pretrained, "prefix": prefix}
        self._options |= {"mean": mean, "std": std, "image_size": image_size}
        self._options |= {"dtype": dtype, "temperature": temperature, "classes": classes}
        if isinstance(source, Teacher) and self._options != _AS_IT_IS:
            raise ValueError("A Teacher has its options already; give them to it, or give its network here.")

    def build(self, name: str = "teacher", *, num_classes: int | None = None, in_chans: int | None = None) -> Teacher:
        """Build the teacher.

        Args:
            name: What messages call it.
            num_classes: Number of classes of the student, for a timm model of which nothing else is said.
            in_chans: Number of input channels of the student.
        """
        found = {"num_classes": num_classes if self._options["classes"] is None else None, "in_chans": in_chans}
        if not isinstance(self.source, str | Path):  # a network has its shape already
            found = {}
        shape: dict[str, Any] = {key: found.get(key) if size is None else size for key, size in self._shape.items()}
        return build_teacher(self.source, name=name, **shape, **self._options)

    def __repr__(self) -> str:
        return f"TeacherSource({str(self.source)!r})"


_AS_IT_IS: dict[str, Any] = {"backbone": None, "pretrained": False, "prefix": None, "mean": None, "std": None}
_AS_IT_IS |= {"image_size": None, "dtype": None, "temperature": 1.0, "classes": None}


_MAP = " and map the teacher's classes with TeacherSource(classes=...)"


def _refuse_unread(name: str, source: object, **options: object) -> None:
    """Refuse options that say how to build a network where nothing is built from them."""
    given = [option for option, value in options.items() if value not in (None, False)]
    if isinstance(source, nn.Module | Teacher):
        what, unread = "is a network already", given
    elif isinstance(source, str | Path) and _is_file(source):
        what, unread = "is a file", [option for option in given if option == "pretrained"]
    else:
        what, unread = "is a timm model", [option for option in given if option in ("backbone", "prefix")]
    if unread:
        raise ValueError(f"The {name} {what}, so `{unread[0]}` would be ignored; leave it out.")


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
        raise ValueError(
            f"The teacher file {file.path} does not say which network it holds; set `backbone` (TeacherSource takes a "
            "file with options)."
        )
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
                f"take another teacher, or leave out `{key}`{_MAP if key == 'num_classes' else ''}."
            )
    classifier: nn.Module = import_module(MODELS).ImageClassifier(**told)
    load_weights(classifier.get_submodule("backbone"), file, prefix="backbone.")
    return classifier
