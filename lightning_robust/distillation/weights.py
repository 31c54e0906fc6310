# SPDX-License-Identifier: Apache-2.0
"""Reading weights from files without running code, and loading them with errors that say what differs."""

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightsFile", "load_weights", "read_weights"]

CONTAINERS = ("state_dict", "model")  # Lightning and timm, torchvision
SHOWN = 3  # names listed per kind of difference


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds.

    Args:
        path: The file.
        tensors: Weights and buffers by name.
        hyper_parameters: What a Lightning checkpoint says about its module; empty for other files.
        label_smoothing: How much the labels of its training were smoothed, where the file says so.
    """

    path: Path
    tensors: dict[str, Tensor]
    hyper_parameters: dict[str, Any]
    label_smoothing: float = 0.0


def read_weights(path: Path) -> WeightsFile:
    """Read a Lightning checkpoint, a state dictionary or a safetensors file onto the CPU, without running its code.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read without running code, or holds no weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no teacher file {path}; train the teacher first, or correct the path.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return WeightsFile(path, load_file(path), {})
        except SafetensorError as error:
            raise ValueError(f"The teacher file {path} is no safetensors file ({error}).") from error
    content = _unpickle(path)
    tensors = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), content)
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"The teacher file {path} holds no weights, only {', '.join(map(str, content)) or 'nothing'}; save "
            "`module.state_dict()`."
        )
    smoothing = content.get("label_smoothing", 0.0)
    return WeightsFile(path, tensors, dict(content.get("hyper_parameters", {})), float(smoothing))


def _unpickle(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
        raise ValueError(
            f"The teacher file {path} cannot be read as weights without running code; save it with "
            "`torch.save(module.state_dict(), path)`."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"The teacher file {path} holds a {type(content).__name__}, not weights; save `module.state_dict()`."
        )
    return content


def load_weights(
    network: nn.Module, file: WeightsFile, *, prefix: str | None = None, num_classes: int | None = None
) -> None:
    """Load the weights of ``network`` from ``file``, all of them and nothing else under their prefix.

    Args:
        network: The network to fill.
        file: Where the weights are.
        prefix: What the names in the file carry in front, as ``"net."``; found by itself when ``None``.
        num_classes: Number of classes of ``network``, for the message about another number.

    Raises:
        ValueError: If names or shapes differ, or if several prefixes fit.
    """
    expected = network.state_dict()
    if prefix is None:
        prefix = _find_prefix(file, expected)
    elif prefix and not prefix.endswith("."):
        prefix = f"{prefix}."
    found = {name[len(prefix) :]: value for name, value in file.tensors.items() if name.startswith(prefix)}
    difference = _Difference(
        missing=[name for name in expected if name not in found],
        unexpected=[name for name in found if name not in expected],
        reshaped={
            name: (list(found[name].shape), list(expected[name].shape))
            for name in expected
            if name in found and found[name].shape != expected[name].shape
        },
    )
    if difference.classes is not None and difference.classes[1] == num_classes:
        raise ValueError(
            f"The teacher file {file.path} has {difference.classes[0]} classes but {num_classes} were expected; set "
            f"`num_classes` to {difference.classes[0]}, or take another teacher."
        )
    if difference:
        raise ValueError(
            f"The teacher file {file.path} does not fit {type(network).__name__}: it {difference}. Set `backbone`, "
            "`num_classes` and `in_chans` to what it was trained with."
        )
    network.load_state_dict(found)


@dataclass(frozen=True)
class _Difference:
    """How the names and shapes of a file differ from those of a network."""

    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[list[int], list[int]]]  # shapes in the file and in the network

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    @property
    def classes(self) -> tuple[int, int] | None:
        """Sizes in the file and in the network when nothing but the first dimension of some tensors differs."""
        if self.missing or self.unexpected:
            return None
        sizes = {(there[0], here[0]) for there, here in self.reshaped.values() if there[1:] == here[1:]}
        return sizes.pop() if len(sizes) == 1 else None

    def __str__(self) -> str:
        shapes = [f"{name} {there} instead of {here}" for name, (there, here) in self.reshaped.items()]
        parts = {"lacks": self.missing, "also holds": self.unexpected, "has other shapes:": shapes}
        return "; ".join(f"{verb} {_shorten(names)}" for verb, names in parts.items() if names)


def _find_prefix(file: WeightsFile, expected: Iterable[str]) -> str:
    """The prefix under which most of the expected names stand."""
    expected = set(expected)
    fits: Counter[str] = Counter()
    for name in file.tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                fits[".".join(parts[:start])] += 1
    complete = [prefix for prefix, count in fits.items() if count == len(expected)]
    if len(complete) > 1:
        raise ValueError(
            f"The teacher file {file.path} holds this network {len(complete)} times, under "
            f"{' and '.join(map(repr, complete))}; choose with `prefix`."
        )
    best = complete or [prefix for prefix, _ in fits.most_common(1)]
    return f"{best[0]}." if best and best[0] else ""


def _shorten(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
