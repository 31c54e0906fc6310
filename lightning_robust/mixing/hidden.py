# SPDX-License-Identifier: Apache-2.0
"""Manifold mixup: mixing what goes into a layer instead of what goes into the network."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_robust.guards import TransientHook
from lightning_robust.mixing.mixture import Mixture, mix_rows

__all__ = ["HiddenMixing"]


class HiddenMixing:
    r"""Mixes the inputs of a layer while a network runs in training mode.

    .. math:: \tilde h_i = \lambda\,h_i + (1-\lambda)\,h_{p(i)}

    Hooks on the layers are there between :meth:`attach` and :meth:`detach` and do nothing unless :meth:`of` is active;
    attach them before a network is compiled. Copies of the network do not mix.

    Cost: one pass over the input of one layer.

    Args:
        network: Holds the layers.
        layers: Dotted names of sub-modules; each is called once per forward, with the batch in the first dimension of
            its first argument. The name of the network itself, or its first layer, mixes the inputs.

    Raises:
        ValueError: If there are no layers, or no sub-module of a name.
        RuntimeError: From a forward, if the input of the layer cannot be mixed.

    References:
        Verma et al., Manifold Mixup: Better Representations by Interpolating Hidden States, arXiv:1806.05236.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import CrossEntropy
        >>> from lightning_robust.mixing import HiddenMixing, Mixup
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> x, y = torch.rand(4, 6), torch.tensor([0, 1, 2, 1])
        >>> hidden, mixture = HiddenMixing(net, ["0", "2"]), Mixup(alpha=2.0).mix(x)
        >>> hidden.attach()
        >>> with hidden.of("2", mixture):
        ...     loss = CrossEntropy()(net(x), mixture.target(y))
        >>> hidden.detach()
    """

    def __init__(self, network: nn.Module, layers: list[str]) -> None:
        if not layers:
            raise ValueError("Expected `layers` to name at least one layer but got none.")
        self.network = network
        self.layers = {name: _submodule(network, name) for name in layers}
        self.mixture: Mixture | None = None
        self.active: str | None = None
        #: Whether the active layer was called since :meth:`start`.
        self.applied = False
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Put the hooks in place; attaching twice is the same as once."""
        if not self._handles:
            for name, layer in self.layers.items():
                self._handles.append(layer.register_forward_pre_hook(_MixInput(self, name)))

    def detach(self) -> None:
        """Take the hooks away."""
        self.stop()
        while self._handles:
            self._handles.pop().remove()

    def start(self, layer: str, mixture: Mixture) -> None:
        """Mix the inputs of a layer until :meth:`stop`; also when activation checkpointing runs the layer again.

        Args:
            layer: Its name.
            mixture: Which rows are mixed with which shares; its inputs are not looked at.
        """
        self.active, self.mixture, self.applied = layer, mixture, False

    def stop(self) -> None:
        """Mix no longer."""
        self.active = self.mixture = None

    @contextmanager
    def of(self, layer: str, mixture: Mixture) -> Iterator[None]:
        """Mix the inputs of a layer inside; the backward pass belongs inside too with activation checkpointing.

        Args:
            layer: Its name.
            mixture: Which rows are mixed with which shares.
        """
        self.start(layer, mixture)
        try:
            yield
        finally:
            self.stop()


class _MixInput(TransientHook):
    """The hook of one layer. A copy of the layer gets one that does nothing."""

    def __init__(self, owner: HiddenMixing, name: str) -> None:
        self._owner = owner
        self._name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        owner = self._owner
        # the flag of the whole network: a layer may be frozen in evaluation mode
        if owner.active != self._name or not owner.network.training:
            return None
        mixture = owner.mixture
        assert mixture is not None, "set together with the active layer"
        self._check(args, len(mixture.first))
        owner.applied = True
        return (mix_rows(args[0], mixture.second, mixture.lam), *args[1:])

    def _check(self, args: tuple[Any, ...], rows: int) -> None:
        found = args[0] if args else None
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise RuntimeError(
                f"The layer {self._name!r} is not called with a floating-point tensor as its first argument, so its "
                "input cannot be mixed; name another layer."
            )
        if found.shape[:1] != (rows,):
            raise RuntimeError(
                f"The layer {self._name!r} is called with an input of shape {tuple(found.shape)} for a batch of {rows} "
                "samples, so it is not known which rows to mix; name a layer with one row per sample."
            )


def _submodule(network: nn.Module, name: str) -> nn.Module:
    names = [candidate for candidate, _ in network.named_modules() if candidate]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or names[:5]
        raise ValueError(
            f"The layer {name!r} is no sub-module of {type(network).__name__}; it has {', '.join(near)}"
            f"{' ...' if len(names) > len(near) else ''}."
        )
    return network.get_submodule(name)
