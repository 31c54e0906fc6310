# SPDX-License-Identifier: Apache-2.0
"""The samples that wait for a stage, until they fill a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.evaluation.plan import Stage
from lightning_robust.evaluation.tally import RunningTally

__all__ = ["Samples", "StageQueue"]


@dataclass(frozen=True)
class Samples:
    """Images with their classes and indices.

    Args:
        x: Images ``[B, ...]``.
        y: Classes ``[B]``.
        index: Index of each in the dataset, ``[B]``, on the CPU.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def select(self, chosen: Tensor) -> "Samples":
        """Some of the samples.

        Args:
            chosen: Which: indices or a mask, on the CPU.
        """
        there = chosen.to(self.x.device)
        return Samples(self.x[there], self.y[there], self.index[chosen])

    def split(self, size: int) -> list["Samples"]:
        """The samples in parts of at most ``size``.

        Args:
            size: Number of samples.
        """
        starts = range(0, len(self), size)
        return [Samples(*(each[at : at + size] for each in (self.x, self.y, self.index))) for at in starts]

    @classmethod
    def joined(cls, parts: "list[Samples]") -> "Samples":
        """Several in one.

        Args:
            parts: At least one.
        """
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "index")))


class StageQueue:
    """Where samples of many loader batches wait for one stage.

    Args:
        stage: The stage.
        number: Its number in the evaluation.

    Example:
        >>> queue = StageQueue(stage=None, number=0)
        >>> queue.push(Samples(torch.zeros(3, 2), torch.zeros(3), torch.arange(3)))
        >>> queue.push(Samples(torch.zeros(3, 2), torch.zeros(3), torch.arange(3, 6)))
        >>> queue.pop(4).index, len(queue)
        (tensor([0, 1, 2, 3]), 2)
    """

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage = stage
        self.number = number
        self.tally = RunningTally()
        self._parts: list[Samples] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def push(self, samples: Samples) -> None:
        """Let samples wait.

        Args:
            samples: Images that the stage has not attacked.
        """
        if len(samples):
            self._parts.append(samples)

    def pop(self, size: int) -> Samples:
        """Take the first ``size`` samples, or all if there are fewer.

        Args:
            size: Number of samples.
        """
        waiting = Samples.joined(self._parts)
        first, *rest = waiting.split(size)
        self._parts = [Samples.joined(rest)] if rest else []
        return first
