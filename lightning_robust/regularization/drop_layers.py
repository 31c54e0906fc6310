# SPDX-License-Identifier: Apache-2.0
"""The dropout or drop-path layers of a network as one thing with one rate."""

from itertools import groupby
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from typing_extensions import override

from lightning_robust.checks import check_choice, check_in_range

__all__ = ["DropLayers"]


class DropLayers:
    """Sets the rates of all dropout layers, or of all drop-path layers, of a network.

    Dropout layers are PyTorch's; each gets the rate itself. Drop-path layers are those of timm (and of others who call
    them so) and torchvision's ``StochasticDepth``; they keep their proportions: a network that was built with rates
    from 0.02 to 0.2 has rates from 0.05 to 0.5 at 0.5, which is the linear rule over the depth where the network was
    built with it. If all were built with 0, the rates grow linearly from 0 in the first block to the rate in the last.

    Args:
        module: The network.
        what: ``"dropout"`` or ``"drop_path"``.

    Raises:
        ValueError: If the network has no such layers.

    Example:
        >>> from torch import nn
        >>> from lightning_robust.regularization import DropLayers
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 2))
        >>> layers = DropLayers(net, what="dropout")
        >>> layers.set_rate(0.3)
        >>> net[1].p
        0.3
        >>> layers.restore()
        >>> net[1].p
        0.0
    """

    def __init__(self, module: nn.Module, *, what: Literal["dropout", "drop_path"] = "drop_path") -> None:
        check_choice("what", what, ("dropout", "drop_path"))
        self.what = what
        layers = [(name, layer) for name, layer in module.named_modules() if _kind(layer) == what]
        if not layers:
            raise ValueError(_nothing(module, what))
        self._layers = [(layer, "drop_prob" if hasattr(layer, "drop_prob") else "p") for _, layer in layers]
        self._built = [float(getattr(layer, attribute)) for layer, attribute in self._layers]
        self._shares = [1.0] * len(layers) if what == "dropout" else self._proportions([name for name, _ in layers])

    def __len__(self) -> int:
        return len(self._layers)

    @override
    def __repr__(self) -> str:
        return f"DropLayers({len(self)} of {self.what})"

    @property
    def rates(self) -> list[float]:
        """The rates of the layers as they are now."""
        return [getattr(layer, attribute) for layer, attribute in self._layers]

    def set_rate(self, rate: float) -> None:
        """Set the rate: that of each dropout layer, the largest of the drop-path layers.

        Args:
            rate: Probability in [0, 1].
        """
        check_in_range("rate", rate, 0.0, 1.0)
        for (layer, attribute), share in zip(self._layers, self._shares, strict=True):
            setattr(layer, attribute, rate * share)

    def restore(self) -> None:
        """Put the rates back with which the network came."""
        for (layer, attribute), rate in zip(self._layers, self._built, strict=True):
            setattr(layer, attribute, rate)

    def _proportions(self, names: list[str]) -> list[float]:
        highest = max(self._built)
        if highest:
            return [rate / highest for rate in self._built]
        # the layers of one block share its rate
        sizes = [len(list(block)) for _, block in groupby(names, lambda name: name.rpartition(".")[0])]
        linear = torch.linspace(0, 1, len(sizes), dtype=torch.float64).tolist() if len(sizes) > 1 else [1.0]
        return [share for share, size in zip(linear, sizes, strict=True) for _ in range(size)]


def _kind(layer: nn.Module) -> str | None:
    if isinstance(layer, _DropoutNd):
        return "dropout"
    name = type(layer).__name__
    # every library brings a class of its own
    known = (name.endswith("DropPath") and hasattr(layer, "drop_prob")) or name == "StochasticDepth"
    return "drop_path" if known else None


def _nothing(module: nn.Module, what: str) -> str:
    """Say what a network without such layers has, and what to do."""
    kinds = [_kind(layer) for layer in module.modules()]
    places = sum(
        isinstance(layer, nn.Identity) and name.rpartition(".")[2].startswith("drop_path")
        for name, layer in module.named_modules()
    )
    if what == "dropout":
        has = f"{kinds.count('drop_path')} drop-path layers"
        remedy = "put nn.Dropout where it shall act, or schedule what='drop_path'"
    else:
        has = f"{kinds.count('dropout')} dropout layers and {places} places for drop paths that were built with rate 0"
        remedy = (
            "build it with a rate above 0, for example drop_path_rate=0.1 of timm.create_model "
            "(backbone_options={\"drop_path_rate\": 0.1} of ImageClassifier), or schedule what='dropout'"
        )
    return f"Expected {what} layers in {type(module).__name__} but it has none, only {has}; {remedy}."
