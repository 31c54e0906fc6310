# SPDX-License-Identifier: Apache-2.0
"""Samplers that know the number of processes themselves, so that Lightning leaves them alone."""

from collections.abc import Iterator, Sized
from itertools import islice
from typing import cast

from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

__all__ = ["EpochSampler", "EvalSampler"]


class EpochSampler(DistributedSampler[int]):
    """A shuffled order that is a function of ``(seed, epoch)`` and can begin in the middle.

    Lightning calls ``set_epoch`` on it, in one process as in many. As in PyTorch, a few samples are drawn twice in an
    epoch when their number is not a multiple of the number of processes.

    Args:
        dataset: what is sampled; only its length is used.
        seed: the order of epoch ``e`` is drawn from ``seed + e``.
        num_replicas: number of processes.
        rank: index of this process.
        shuffle: ``False`` keeps the order of the dataset.

    Example:
        >>> sampler = EpochSampler(range(6), seed=0)
        >>> whole = list(sampler)
        >>> sampler.start = 4
        >>> list(sampler) == whole[4:]
        True
    """

    def __init__(
        self, dataset: Sized, *, seed: int = 0, num_replicas: int = 1, rank: int = 0, shuffle: bool = True
    ) -> None:
        super().__init__(cast("Dataset[int]", dataset), num_replicas, rank, shuffle=shuffle, seed=seed)
        self.start = 0  # samples of this process that the next iteration leaves out; the length stays the whole epoch's

    @override
    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


class EvalSampler(DistributedSampler[int]):
    """Every sample exactly once over all processes, in order.

    Lightning's own choice pads the last round with repeated samples, which shifts accuracies and counts. Here some
    processes may have one batch more than others, which is fine as long as nothing is reduced per batch. Log
    torchmetrics objects: with ``sync_dist=True``, Lightning rounds the mean number of samples per process down to an
    integer, so that plain values are off by a little when the processes have different numbers.

    Args:
        dataset: what is sampled; only its length is used.
        num_replicas: number of processes.
        rank: index of this process.

    Raises:
        ValueError: there are fewer samples than processes; a process without a batch would leave the others waiting.

    Example:
        >>> [list(EvalSampler(range(5), num_replicas=2, rank=rank)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Sized, *, num_replicas: int = 1, rank: int = 0) -> None:
        samples = len(dataset)
        if samples < num_replicas:
            raise ValueError(
                f"Expected at least one evaluation sample per process but got {samples} samples for {num_replicas} "
                "processes."
            )
        super().__init__(cast("Dataset[int]", dataset), num_replicas, rank, shuffle=False)
        self.total_size = samples
        self.num_samples = len(range(rank, samples, num_replicas))

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))
