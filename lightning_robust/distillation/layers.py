# SPDX-License-Identifier: Apache-2.0
"""What the layers of a network put out while it runs, found by their names."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_robust.guards import TransientHook

__all__ = ["LayerOutputs", "check_layers", "classifier_sizes", "layer_width", "named_classifiers", "own_layers"]

_CALLS = 64  # remembered per layer: an attack calls the network often


class LayerOutputs:
    """Remembers what named layers of a network put out, with their graphs.

    The hooks stay attached between :meth:`attach` and :meth:`detach`, so that a compiled network keeps them; copies of
    the network do not carry them. Where a layer ran several times the last run with the right number of samples counts.

    Cost: a Python call per layer and forward pass; what the layers put out is kept until :meth:`clear`.

    Args:
        network: The network.
        layers: Dotted names of its layers.
        owner: What messages call the network.
        needs_grad: Overlook runs without a graph.

    Raises:
        ValueError: If there is no such layer; from :meth:`take`, if a layer did not run or gave no tensor.

    Example:
        >>> import torch
        >>> from lightning_robust.distillation import LayerOutputs
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> with LayerOutputs(net, ["1"]) as outputs:
        ...     _ = net(torch.zeros(2, 4))
        ...     [each.shape for each in outputs.take(2)]
        [torch.Size([2, 6])]
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], *, owner: str = "network", needs_grad: bool = False
    ) -> None:
        check_layers(network, layers, owner)
        self.network = network
        self.layers = list(layers)
        self.owner = owner
        self.needs_grad = needs_grad
        self._seen: dict[str, list[Tensor]] = {}
        self._ran: dict[str, str] = {}  # what unusable runs gave
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Start watching; attaching twice is the same as once."""
        if not self._handles:
            for name in dict.fromkeys(self.layers):
                hook = _Remember(self._remember, name)
                self._handles.append(self.network.get_submodule(name).register_forward_hook(hook))

    def detach(self) -> None:
        """Stop watching and forget what was seen."""
        while self._handles:
            self._handles.pop().remove()
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self._seen.clear()
        self._ran.clear()

    def __enter__(self) -> "LayerOutputs":
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def take(self, samples: int) -> list[Tensor]:
        """Return what each layer put out in its last run with so many samples, in the order of the names.

        Args:
            samples: Number of samples.
        """
        return [self._take(name, samples) for name in self.layers]

    def _take(self, name: str, samples: int) -> Tensor:
        seen = self._seen.get(name, [])
        found = next((output for output in reversed(seen) if len(output) == samples), None)
        if found is not None:
            return found
        if seen:
            happened = f"ran with {len(seen[-1])} samples instead of {samples}"
        else:
            happened = self._ran.get(name, "did not run")
        raise ValueError(
            f"The layer {name!r} of the {self.owner} {happened}, so there are no features to compare; name a layer "
            "that runs once on the whole batch." + _compiled(self.network, name in self._ran)
        )

    def _remember(self, name: str, output: Any) -> None:
        if isinstance(output, tuple | list) and len(output) > 0:
            output = output[0]
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
            self._ran[name] = f"gave {_describe(output)}"
            return
        if self.needs_grad and not output.requires_grad:
            self._ran[name] = "ran without gradients only"
            return
        calls = self._seen.setdefault(name, [])
        if len(calls) >= _CALLS:
            del calls[0]
        calls.append(output)


class _Remember(TransientHook):
    def __init__(self, remember: Callable[[str, Any], None], name: str) -> None:
        self._remember = remember
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._remember(self._name, output)


def own_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a network by name, without what only stands on it for the time of a fit.

    Args:
        network: The network, or a module that holds it. A child that says ``stands_apart`` is left out with its layers:
            a head that a loss trains, for one, is no classifier of the network.
    """
    found: dict[str, nn.Module] = {}
    apart: list[str] = []
    for name, layer in network.named_modules():
        if getattr(layer, "stands_apart", False) is True:
            apart.append(f"{name}.")
        elif name and not name.startswith(tuple(apart)):
            found[name] = layer
    return found


def check_layers(network: nn.Module, layers: Sequence[str], owner: str) -> None:
    """Refuse names that no layer of ``network`` has, with near ones.

    Args:
        network: The network.
        layers: Dotted names.
        owner: What messages call the network.

    Raises:
        ValueError: If there is no such layer.
    """
    names = list(own_layers(network))
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    for layer in layers:
        if layer in names:
            continue
        ends = [name for name in names if name.endswith(f".{layer}")]  # the part that stands in front was left out
        near = ends[:3] or difflib.get_close_matches(layer, names, n=3)
        near = near or [last[name] for name in difflib.get_close_matches(layer, last, n=3)] or names[:5]
        raise ValueError(
            f"The {owner} {type(network).__name__} has no layer {layer!r}; it has {', '.join(map(repr, near))}"
            f"{' ...' if len(names) > len(near) else ''}."
        )


def named_classifiers(module: nn.Module) -> list[nn.Module]:
    """Return the layers that timm's ``get_classifier()`` names, of the network and of networks inside of it.

    Args:
        module: The network, or a module that holds it.
    """
    said: list[Any] = []
    for child in (module, *own_layers(module).values()):
        named: Any = getattr(child, "get_classifier", None)
        if callable(named):
            layer = named()
            said += layer if isinstance(layer, tuple) else (layer,)  # distilled networks have two
    return [layer for layer in said if isinstance(layer, nn.Module)]


def classifier_of(module: nn.Module) -> nn.Module | None:
    """Return the layer that makes the logits; ``None`` if that cannot be read off.

    Args:
        module: The network, or a module that holds it: what timm's ``get_classifier()`` names, else its linear layer if
            it is the only one.
    """
    layers = (module, *own_layers(module).values())
    candidates = named_classifiers(module) or [child for child in layers if isinstance(child, nn.Linear)]
    different = {id(layer): layer for layer in candidates}
    found = next(iter(different.values())) if len(different) == 1 else None
    return found if isinstance(found, nn.Linear | nn.Conv2d) else None


def classifier_sizes(module: nn.Module) -> tuple[int | None, int | None]:
    """Return how many features the classifier of a network takes and how many classes it has, where known.

    Args:
        module: The network, or a module that holds it.
    """
    layer = classifier_of(module)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return (layer.in_channels, layer.out_channels) if isinstance(layer, nn.Conv2d) else (None, None)


def layer_width(network: nn.Module, name: str) -> int | None:
    """Return how many channels a layer puts out; ``None`` if that cannot be read off it.

    Args:
        network: The network, or a module that holds it.
        name: Dotted name of the layer. Linear, convolutional and norm layers know their width, and the stages of a timm
            network are in its ``feature_info``.
    """
    layer = network.get_submodule(name)
    if isinstance(layer, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
        shape = getattr(layer, "normalized_shape", None)
        return shape[-1] if shape else getattr(layer, "num_features", getattr(layer, "num_channels", None))
    for attribute in ("out_features", "out_channels"):
        width = getattr(layer, attribute, None)
        if isinstance(width, int):
            return width
    parts = name.split(".")
    for start in range(len(parts)):
        owner = network.get_submodule(".".join(parts[:start]))
        for each in getattr(owner, "feature_info", None) or ():
            if isinstance(each, dict) and each.get("module") == ".".join(parts[start:]):
                return int(each["num_chs"])
    return None


def _compiled(network: nn.Module, ran: bool) -> str:
    if ran or all(type(child).__name__ != "OptimizedModule" for child in network.modules()):
        return ""
    return " A compiled network that ran before hides its layers until torch.compiler.reset() is called."


def _describe(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
