# SPDX-License-Identifier: Apache-2.0
"""The features from which a network computed its logits, for objectives that compare them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_robust.distillation import LayerOutputs
from lightning_robust.distillation.layers import named_classifiers
from lightning_robust.guards import TransientHook

__all__ = ["Penultimate"]


class Penultimate:
    """Remembers the features ``[B, D]`` behind the logits of a network's last run, with their graph.

    These are what a named layer put out, or what its classifier got: the layer that timm's ``get_classifier()`` names,
    else the linear layer that ran last. Maps ``[B, D, H, W]`` and tokens ``[B, N, D]`` are averaged.

    The hooks stay on the network until :meth:`detach`, because a compiled network sees only those that were there when
    it first ran; copies of the network do not carry them.

    Args:
        network: the network.
        layer: dotted name of the layer whose output is the features; the input of the classifier when ``None``.
        owner: what messages call the network.

    Raises:
        ValueError: there is no such layer, or no linear one; from :meth:`take`, if none ran.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> features = Penultimate(net)
        >>> _ = net(torch.zeros(2, 4))
        >>> features.take(2).shape
        torch.Size([2, 6])
    """

    def __init__(self, network: nn.Module, layer: str | None = None, *, owner: str = "network") -> None:
        self.network = network
        self.owner = owner
        self._inputs: Tensor | None = None
        self._outputs: LayerOutputs | None = None
        self._handles: list[Any] = []
        if layer is not None:
            self._outputs = LayerOutputs(network, [layer], owner=owner)
            self._outputs.attach()
            return
        hook = _RememberInput(self)
        for classifier in _classifiers(network, owner):
            self._handles.append(classifier.register_forward_hook(hook))

    def take(self, samples: int) -> Tensor:
        """Return the features of the last run, and forget them.

        Args:
            samples: number of samples of that run.
        """
        if self._outputs is not None:
            (found,) = self._outputs.take(samples)
            self._outputs.clear()
        elif self._inputs is None or len(self._inputs) != samples:
            raise ValueError(
                f"The classifier of the {self.owner} did not run on the {samples} samples of the batch, so there are "
                "no features to compare; name the layer whose output they are with `features_from` or "
                "`teacher_features_from`. A compiled network that ran before hides its layers until "
                "torch.compiler.reset() is called."
            )
        else:
            found, self._inputs = self._inputs, None
        if found.ndim == 4:
            return found.mean((2, 3))
        return found.mean(1) if found.ndim == 3 else found

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _no_features, ()  # copies and pickles of what holds it have no networks in them; they watch anew

    def detach(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs = None
        if self._outputs is not None:
            self._outputs.detach()


class _RememberInput(TransientHook):
    def __init__(self, owner: Penultimate) -> None:
        self._owner = owner

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._owner._inputs = inputs[0]


def _no_features() -> None:
    return None


def _classifiers(network: nn.Module, owner: str) -> list[nn.Module]:
    found = [layer for layer in named_classifiers(network) if not isinstance(layer, nn.Identity)]
    found = found or [child for child in network.modules() if isinstance(child, nn.Linear)]
    if not found:
        raise ValueError(
            f"The {owner} {type(network).__name__} has no linear layer that its features could be the input of; name "
            "the layer whose output they are with `features_from` or `teacher_features_from`."
        )
    return found
