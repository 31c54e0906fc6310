# SPDX-License-Identifier: Apache-2.0
"""Training batches for odd-k-out learning: sets of images in which one class appears twice."""

import random
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from typing_extensions import override

from lightning_robust.checks import check_integer
from lightning_robust.data.samplers import EpochSampler
from lightning_robust.training import derive_seed

__all__ = ["OKOSampler"]


class OKOSampler(EpochSampler):
    """Draws sets of ``k + 2`` samples, two of one class and one of each of ``k`` others, one set after the other.

    The ``k + 1`` classes of a set are drawn uniformly, so that each class appears equally often whatever its size, and
    the samples uniformly within their class, both without replacement; the members are in random order. With a batch
    size that is a multiple of ``k + 2`` every batch holds whole sets, as :class:`~lightning_robust.losses.OKO` needs
    them. Sets are a function of ``(seed, epoch, rank)``; Lightning calls ``set_epoch`` and leaves the sampler alone in
    one process as in many, so give it the number of processes and the rank, from the trainer in ``train_dataloader``.

    Cost: a few microseconds per sample, while batches are asked for.

    Args:
        labels: class of each sample of the dataset, in its order.
        k: number of odd classes in a set.
        num_sets: sets per epoch over all processes, rounded up to a multiple of their number; as many as the samples of
            the dataset would fill when ``None``.
        seed: with epoch and rank, what the sets are drawn from.
        num_replicas: number of processes.
        rank: index of this process.

    Raises:
        ValueError: there are fewer than ``k + 1`` classes, or a class has a single sample.

    Example:
        >>> labels = [0, 0, 0, 1, 1, 2, 2, 2, 2]
        >>> sampler = OKOSampler(labels, k=1, num_sets=4)
        >>> len(sampler)
        12
        >>> a_set = list(sampler)[:3]
        >>> len({labels[index] for index in a_set})
        2
    """

    def __init__(
        self,
        labels: Tensor | list[int],
        *,
        k: int = 1,
        num_sets: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        check_integer("k", k, 0)
        classes = torch.as_tensor(labels).tolist()
        super().__init__(classes, seed=seed, num_replicas=num_replicas, rank=rank)
        self.k = k
        self._members: dict[int, list[int]] = {}
        for index, label in enumerate(classes):
            self._members.setdefault(label, []).append(index)
        if len(self._members) < k + 1:
            raise ValueError(f"Expected at least {k + 1} classes for sets with k={k} but got {len(self._members)}.")
        single = [label for label, members in self._members.items() if len(members) < 2]
        if single:
            raise ValueError(
                f"Expected at least 2 samples of each class but class {single[0]} has 1; leave it out, or add to it."
            )
        if num_sets is None:
            num_sets = max(1, len(classes) // (k + 2))
        check_integer("num_sets", num_sets, 1)
        self.num_sets = -(-num_sets // num_replicas)  # of this process
        self.num_samples = self.num_sets * (k + 2)
        self.total_size = self.num_samples * num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        return islice(self._draw(), self.start, None)

    def _draw(self) -> Iterator[int]:
        draw = random.Random(derive_seed(self.seed, self.epoch, self.rank, "oko"))
        labels = sorted(self._members)
        for _ in range(self.num_sets):
            pair, *odd = draw.sample(labels, self.k + 1)
            members = draw.sample(self._members[pair], 2) + [draw.choice(self._members[label]) for label in odd]
            draw.shuffle(members)
            yield from members
