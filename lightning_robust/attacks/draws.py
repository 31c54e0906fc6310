# SPDX-License-Identifier: Apache-2.0
"""The random numbers of an attack: one stream for a batch, or one for every sample."""

import math
import zlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer

__all__ = ["Draws", "GeneratorDraws", "SampleDraws"]

# splitmix64 (Steele et al. 2014), its unsigned constants written as the signed numbers that int64 tensors hold
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


class Draws(ABC):
    """Where an attack gets random numbers from; never torch's global generators.

    Shape:
        Every draw is shaped, typed and placed like the tensor ``like``, whose first dimension is the batch.
    """

    @abstractmethod
    def uniform(self, like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Independent ``U(low, high)``."""

    @abstractmethod
    def normal(self, like: Tensor) -> Tensor:
        """Independent ``N(0, 1)``."""

    @abstractmethod
    def integers(self, like: Tensor, high: int | Tensor) -> Tensor:
        """Independent integers from 0 to ``high - 1``, as int64; ``high`` may be a tensor that fits ``like``."""

    @abstractmethod
    def select(self, index: Tensor) -> "Draws":
        """The source of some of the samples.

        Args:
            index: which ones: indices or a mask.
        """

    @abstractmethod
    def fingerprint(self) -> int:
        """A number below ``2 ** 32`` that seeds the global generators while the model is attacked."""


class GeneratorDraws(Draws):
    """One stream for all samples, the fastest; what a sample gets depends on the samples before it.

    Args:
        generator: on the device of the images.

    Example:
        >>> draws = GeneratorDraws(torch.Generator().manual_seed(0))
        >>> draws.uniform(torch.zeros(2, 3), -1.0, 1.0).shape
        torch.Size([2, 3])
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    @override
    def uniform(self, like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=self.generator)

    @override
    def normal(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self.generator)

    @override
    def integers(self, like: Tensor, high: int | Tensor) -> Tensor:
        drawn = torch.empty_like(like, dtype=torch.int64).random_(generator=self.generator)
        return drawn.remainder(high)

    @override
    def select(self, index: Tensor) -> Draws:
        return self

    @override
    def fingerprint(self) -> int:
        return zlib.crc32(self.generator.get_state().numpy().tobytes())


class SampleDraws(Draws):
    """A stream of its own for every sample, made of ``seed``, the sample's index, and how often it has drawn.

    What a sample gets therefore depends neither on its batch nor on its place in it, on the samples that have already
    left an attack, or on the number of processes. The numbers are splitmix64 hashes of a counter; the same on every
    device.

    Args:
        seed: seed of the attack.
        indices: index of each sample in its dataset, ``[B]``.

    Raises:
        ValueError: ``seed`` is negative, or ``indices`` are not integers ``[B]``.

    Example:
        >>> both = SampleDraws(0, torch.tensor([7, 3])).uniform(torch.zeros(2, 4))
        >>> one = SampleDraws(0, torch.tensor([3])).uniform(torch.zeros(1, 4))
        >>> bool((both[1] == one[0]).all())
        True
    """

    def __init__(self, seed: int, indices: Tensor) -> None:
        check_integer("seed", seed, 0)
        if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(
                f"Expected `indices` to be integers [B] but got {list(indices.shape)} of {indices.dtype}; give each "
                "sample its index in the dataset."
            )
        self.seed = seed
        self.indices = indices.long()
        base = _mixed(torch.tensor(_signed(seed)))
        self._keys = _mixed(self.indices * _GOLDEN + base.to(indices.device))
        # shared with all selections, so that no sample ever sees a number twice
        with torch.inference_mode(False):  # attacks leave inference mode, where its tensors cannot count
            self._drawn = torch.zeros_like(self.indices)
        self._rows = torch.arange(len(indices), device=indices.device)

    @override
    def uniform(self, like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return _unit(self._bits(like), like.dtype) * (high - low) + low

    @override
    def normal(self, like: Tensor) -> Tensor:
        # Box and Muller; 1 - u is never zero
        radius = (-2 * (1 - _unit(self._bits(like), like.dtype)).log()).sqrt()
        return radius * (2 * math.pi * _unit(self._bits(like), like.dtype)).cos()

    @override
    def integers(self, like: Tensor, high: int | Tensor) -> Tensor:
        return _shifted(self._bits(like), 11).remainder(high)

    @override
    def select(self, index: Tensor) -> "SampleDraws":
        part = SampleDraws.__new__(SampleDraws)
        part.seed, part.indices = self.seed, self.indices[index]
        part._keys, part._drawn, part._rows = self._keys, self._drawn, self._rows[index]
        return part

    @override
    def fingerprint(self) -> int:
        return zlib.crc32(self.indices.cpu().numpy().tobytes(), self.seed & 0xFFFFFFFF)

    def _bits(self, like: Tensor) -> Tensor:
        if len(like) != len(self._rows):
            raise ValueError(f"Expected a draw for {len(self._rows)} samples but was asked for {len(like)}.")
        stream = _mixed(self._keys[self._rows] + self._drawn[self._rows] * _FIRST)
        self._drawn[self._rows] += 1
        count = math.prod(like.shape[1:])
        counter = torch.arange(1, count + 1, device=like.device) * _GOLDEN
        return _mixed(stream[:, None] + counter).view(like.shape)


def _mixed(bits: Tensor) -> Tensor:
    """The finalizer of splitmix64."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    # the shift of int64 copies the sign; the mask makes it that of an unsigned number
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1) of as many bits as their type can hold."""
    if dtype == torch.float64:
        return _shifted(bits, 11).double() * 2.0**-53
    return (_shifted(bits, 40).float() * 2.0**-24).to(dtype)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
