# SPDX-License-Identifier: Apache-2.0
"""The overfitting-underfitting indicator: how differently the units of a network respond to pairs of samples."""

import fnmatch
import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.checks import check_integer
from lightning_robust.guards import TransientHook

__all__ = ["ACTIVATIONS", "ActivationPatterns", "draw_pairs", "oui"]

#: Kinds of modules whose outputs are read when no layers are named.
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU)


def oui(patterns: Sequence[Tensor], pairs: Tensor) -> Tensor:
    r"""Overfitting-underfitting indicator: how far the activation patterns of two samples differ, on average.

    .. math:: \frac{1}{|P|\,L} \sum_{(i,j)\in P} \sum_{l=1}^{L}
              \frac{\min\big(d(b_{li}, b_{lj}),\,\lfloor n_l/2\rfloor\big)}{\lfloor n_l/2\rfloor}

    with the bits :math:`b_{li}` of the :math:`n_l` units of layer :math:`l` (whether their outputs are above zero) and
    the number :math:`d` of bits that differ. 1: all pairs differ in at least half of the bits of each layer. 0: no unit
    tells the samples apart. The authors recommend weight decay that leads to 0.6 to 0.8.

    Args:
        patterns: the bits of each layer; layers with a single unit are left out.
        pairs: row numbers of the pairs of samples.

    Shape:
        ``patterns`` bool ``[B, n_l]`` or ``[B, ...]`` each, ``pairs`` ``[P, 2]`` -> float32 scalar.

    Raises:
        ValueError: no layer has two units, or there is no pair.

    References:
        Fernández-Hernández et al., arXiv:2504.17160. In the authors' code a batch of fewer than 8 samples, with fewer
        pairs than wanted, is an error.

    Example:
        >>> bits = torch.tensor([[True, True, False, False], [True, False, False, False]])
        >>> oui([bits], torch.tensor([[0, 1]])).item()
        0.5
    """
    rows = [bits.flatten(1) for bits in patterns if bits[0].numel() >= 2]
    if not rows or not len(pairs):
        raise ValueError(
            f"Expected at least one layer of two or more units and one pair of samples but got {len(rows)} layers and "
            f"{len(pairs)} pairs."
        )
    first, second = pairs.to(rows[0].device).unbind(1)
    layers = []
    for bits in rows:
        limit = bits.shape[1] // 2
        differing = (bits[first] != bits[second]).sum(1)
        layers.append(differing.clamp(max=limit).float() / limit)
    return torch.stack(layers).mean()


def draw_pairs(rows: int, count: int = 28, *, seed: int = 0) -> Tensor:
    """Distinct pairs of different rows, ``[min(count, all), 2]``; the same for the same arguments everywhere.

    Args:
        rows: number of samples in a batch.
        count: number of pairs; all of them if there are fewer.
        seed: seed of the choice.

    Example:
        >>> draw_pairs(3, 2).shape, len(draw_pairs(3))
        (torch.Size([2, 2]), 3)
    """
    check_integer("rows", rows, 2)
    check_integer("count", count, 1)
    # position of a pair in lexicographic order, so that a batch of thousands needs no list of millions
    total = rows * (rows - 1) // 2
    chosen = random.Random(seed).sample(range(total), min(count, total))
    ends = list(itertools.accumulate(range(rows - 1, 0, -1)))
    pairs = []
    for position in chosen:
        first = next(row for row, end in enumerate(ends) if position < end)
        pairs.append([first, rows - (ends[first] - position)])
    return torch.tensor(pairs)


class ActivationPatterns:
    """Remembers which units were active in the most recent forward of a module, for some rows of the batch.

    Its hooks stay between :meth:`attach` and :meth:`detach`, and do nothing while :attr:`rows` is ``None``; copies of
    the module do not carry them. A layer that is called several times leaves its last call.

    Cost: one comparison per activation of the chosen rows, one bit pattern (a byte per unit) for each of them.

    Args:
        module: the network.
        layers: names of sub-modules, patterns of names (``"*.act"``), or names of classes (``"Hardswish"``) whose
            outputs are read; every ReLU, SiLU and GELU module when ``None``.

    Raises:
        ValueError: the module has no such layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> with ActivationPatterns(net) as patterns:
        ...     patterns.rows = torch.arange(3)
        ...     _ = net(torch.ones(5, 4))
        ...     {name: list(bits.shape) for name, bits in patterns.take().items()}
        {'1': [3, 6]}
    """

    def __init__(self, module: nn.Module, layers: Sequence[str] | None = None) -> None:
        self.module = module
        self.layers = None if layers is None else list(layers)
        #: Rows of the batch that are read; ``None`` for none, ``slice(None)`` for all.
        self.rows: Tensor | slice | None = None
        #: Outputs with fewer rows than this are left out.
        self.least = 0
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._watched = self._choose()

    def attach(self) -> None:
        """Start watching; attaching twice is the same as once."""
        if not self._handles:
            for name, child in self._watched.items():
                self._handles.append(child.register_forward_hook(_Bits(self, name)))

    def detach(self) -> None:
        """Stop watching and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def __enter__(self) -> "ActivationPatterns":
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def names(self) -> list[str]:
        """Names of the watched layers."""
        return list(self._watched)

    def take(self) -> dict[str, Tensor]:
        """Bits of the chosen rows by layer, once; empty if no layer ran."""
        seen, self._seen = self._seen, {}
        return seen

    def _choose(self) -> dict[str, nn.Module]:
        children = {name: child for name, child in self.module.named_modules() if name}
        kind = type(self.module).__name__
        if self.layers is None:
            found: dict[str, nn.Module] = {n: child for n, child in children.items() if isinstance(child, ACTIVATIONS)}
            if not found:
                raise ValueError(
                    f"{kind} has no ReLU, SiLU or GELU module; activations that are called as functions (F.relu) "
                    'cannot be seen: use modules, or name layers whose outputs are activations with layers=["..."].'
                )
            return found
        chosen: dict[str, nn.Module] = {}
        for wanted in self.layers:
            found = {
                name: child
                for name, child in children.items()
                if fnmatch.fnmatchcase(name, wanted) or type(child).__name__ == wanted
            }
            if not found:
                raise ValueError(
                    f"layers={wanted!r} names no sub-module and no class of one in {kind}; it has "
                    f"{', '.join(list(children)[:8])}{' ...' if len(children) > 8 else ''}."
                )
            chosen |= found
        return chosen


class _Bits(TransientHook):
    """The forward hook. A copy of the hooked module (an EMA, say) gets one that does nothing."""

    def __init__(self, patterns: ActivationPatterns, name: str) -> None:
        self._patterns = patterns
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        rows = self._patterns.rows
        if rows is not None and isinstance(output, Tensor) and len(output) >= self._patterns.least:
            self._patterns._seen[self._name] = output.detach()[rows] > 0
