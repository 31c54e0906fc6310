# SPDX-License-Identifier: Apache-2.0
"""Finding the penultimate features of a running step in somebody else's module, without a second forward pass."""

import difflib
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_robust.distillation.layers import named_classifiers, own_layers
from lightning_robust.guards import TransientHook

__all__ = ["FeatureCapture", "FeaturesNotCaptured"]

_CALLS = 64  # remembered per layer: an attack calls the network often


class FeaturesNotCaptured(RuntimeError):  # noqa: N818 - says what happened
    """The step computed no features that a callback could see; the message says how to point to them."""


class _Call(NamedTuple):
    features: Tensor
    output: Tensor


class FeatureCapture:
    """Remembers the features ``[B, D]`` from which a module computed its most recent logits.

    By default these are the input of the classifier: of the layer that returned the logits, be it what timm's
    ``get_classifier()`` names or an ``nn.Linear``. If no layer returned them as they are (they were scaled, say), it is
    the only classifier, else the only linear layer, that returned a tensor of their shape. Nothing is guessed: several
    candidates are an error that names them. With ``features_from`` they are the output of that layer in its last call.
    Tokens ``[B, N, D]`` and maps ``[B, D, H, W]`` are averaged.

    The hooks stay attached between :meth:`attach` and :meth:`detach`; copies of the module do not carry them. Several
    forward passes in a step (an attack, say) are told apart by the logits.

    Cost: a Python call per linear layer and forward pass; the features of up to 64 calls of each until :meth:`clear`.

    Args:
        module: the LightningModule that is watched.
        features_from: dotted name of the layer whose output is the features; the input of the classifier when ``None``.
        needs_grad: keep the graph of the features, and overlook calls without one.

    Raises:
        ValueError: ``features_from`` names no sub-module.
        FeaturesNotCaptured: from :meth:`take`, when nothing usable was seen.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> with FeatureCapture(net) as capture:
        ...     logits = net(torch.zeros(2, 4))
        ...     capture.take(logits).shape
        torch.Size([2, 6])
    """

    def __init__(self, module: nn.Module, features_from: str | None = None, *, needs_grad: bool = False) -> None:
        self.module = module
        self.features_from = features_from
        self.needs_grad = needs_grad
        #: Whether calls are remembered. A compiled network sees only hooks that were attached before its first run.
        self.active = True
        #: The layer whose input the last :meth:`take` returned; ``None`` with ``features_from``.
        self.classifier: nn.Module | None = None
        self._calls: dict[str, list[_Call]] = {}
        self._handles: list[Any] = []
        if features_from is not None:
            _refuse_unknown(module, features_from)

    def attach(self) -> None:
        """Start watching; attaching twice is the same as once."""
        if self._handles:
            return
        if self.features_from is not None:
            watched = {self.features_from: self.module.get_submodule(self.features_from)}
        else:
            watched = _classifiers(self.module) | _linear_layers(self.module)
        for name, child in watched.items():
            self._handles.append(child.register_forward_hook(_Remember(self, name)))

    def detach(self) -> None:
        """Stop watching and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self._calls.clear()

    def __enter__(self) -> "FeatureCapture":
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def take(self, logits: Tensor) -> Tensor:
        """Return the features ``[B, D]`` that belong to the logits of a step.

        Args:
            logits: what the step computed, ``[B, C]``.
        """
        self.classifier = None
        if self.features_from is not None:
            calls = self._calls.get(self.features_from, [])
            found = next((call for call in reversed(calls) if len(call.features) == len(logits)), None)
            if found is None:
                raise FeaturesNotCaptured(self._explain(logits))
            return found.features
        name, found = self._match(logits)
        self.classifier = self.module.get_submodule(name)
        return found.features

    def _match(self, logits: Tensor) -> tuple[str, _Call]:
        alike = self._alike(logits)
        for name, calls in alike.items():
            for call in reversed(calls):
                if call.output.data_ptr() == logits.data_ptr():
                    return name, call
        named = [name for name in alike if name in _classifiers(self.module)]
        for candidates in (named, list(alike)):
            if len(candidates) == 1:
                return candidates[0], alike[candidates[0]][-1]
        raise FeaturesNotCaptured(self._explain(logits))

    def _alike(self, logits: Tensor) -> dict[str, list[_Call]]:
        """Calls that returned a tensor of the form of the logits, by layer."""
        alike = {n: [call for call in calls if call.output.shape == logits.shape] for n, calls in self._calls.items()}
        return {name: calls for name, calls in alike.items() if calls}

    def _explain(self, logits: Tensor) -> str:
        name, remedy = type(self.module).__name__, 'features_from="..." names the layer whose output is the features.'
        if self.features_from is not None:
            return (
                f"features_from={self.features_from!r} was not called by the step of {name}, or not with the "
                f"{len(logits)} samples of its logits; name a layer that runs once per sample."
            )
        layers = ", ".join(self._alike(logits))
        if layers:
            return f"Several layers of {name} may have computed the logits ({layers}); {remedy}"
        if any(type(child).__name__ == "OptimizedModule" for child in self.module.modules()):
            remedy += " A compiled network that ran before hides its layers until torch.compiler.reset() is called."
        return f"No linear layer of {name} returned its logits {list(logits.shape)}, so there are no features; {remedy}"

    def _remember(self, name: str, inputs: Tensor, output: Tensor) -> None:
        if self.needs_grad and not inputs.requires_grad:
            return
        if not self.needs_grad:  # the graph of other passes must not be kept
            inputs, output = inputs.detach(), output.detach()
        calls = self._calls.setdefault(name, [])
        if len(calls) >= _CALLS:
            del calls[0]
        calls.append(_Call(inputs, output))


def _refuse_unknown(module: nn.Module, name: str) -> None:
    names = [candidate for candidate, _ in module.named_modules() if candidate]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or names[:5]
        raise ValueError(
            f"features_from={name!r} names no sub-module of {type(module).__name__}; it has {', '.join(near)}"
            f"{' ...' if len(names) > len(near) else ''}."
        )


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in own_layers(module).items() if isinstance(child, nn.Linear)}


def _classifiers(module: nn.Module) -> dict[str, nn.Module]:
    """What timm's networks inside the module say their classifiers are."""
    layers = {id(layer) for layer in named_classifiers(module) if not isinstance(layer, nn.Identity)}
    return {name: child for name, child in own_layers(module).items() if id(child) in layers}


def pooled(value: Any) -> Tensor | None:
    """Features ``[B, D]`` in what a layer got or gave: means of tokens ``[B, N, D]`` and of maps ``[B, D, H, W]``."""
    if isinstance(value, tuple | list) and len(value) > 0:
        value = value[0]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return None
    if value.ndim == 2:
        return value
    return value.mean(1) if value.ndim == 3 else value.flatten(2).mean(2)


class _Remember(TransientHook):
    """The forward hook. A copy of the hooked module (an EMA, say) gets one that does nothing."""

    def __init__(self, capture: FeatureCapture, name: str) -> None:
        self._capture = capture
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self._capture.active:
            return
        if self._capture.features_from is not None:
            features = pooled(output)
            if features is not None:
                self._capture._remember(self._name, features, features)
            return
        logits = _as_logits(output)
        features = None if logits is None else pooled(inputs)
        if features is not None and logits is not None:
            self._capture._remember(self._name, features, logits)


def _as_logits(output: Any) -> Tensor | None:
    """The output of a layer as ``[B, C]``, also of a convolution that classifies pooled maps; other shapes are none."""
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4 and output.shape[2:] == (1, 1):
        return output.flatten(1)
    return output if output.ndim == 2 else None
