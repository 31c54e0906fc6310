# SPDX-License-Identifier: Apache-2.0
"""A training loader that continues in the middle of an epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_robust.data.samplers import EpochSampler
from lightning_robust.training import derive_seed

__all__ = ["ResumableDataLoader"]


class ResumableDataLoader(DataLoader[Any]):
    """A ``DataLoader`` whose position is saved in checkpoints and restored without loading what was seen already.

    Lightning stores the state of every loader that has ``state_dict`` and gives it back when a run continues in
    mid-epoch. The order is a function of ``(seed, epoch)`` through :class:`~lightning_robust.data.EpochSampler`, so
    epoch and number of batches are the whole state, with worker processes too. Nothing is prepared before the first
    batch is asked for: Lightning creates the iterator of a resumed run before it announces the epoch. A dataset with
    ``set_epoch`` is told the epoch before workers start.

    Cost: none per batch; worker processes start anew in each epoch (``persistent_workers`` would keep an old epoch).

    Args:
        dataset: a map-style dataset.
        batch_size: samples per batch and process.
        sampler: an :class:`~lightning_robust.data.EpochSampler`.
        progress: returns the epoch and the number of its batches that were trained on, from the training loop. The loop
            knows better than the loader: a run that was interrupted inside a step has fetched one batch more than it
            learned from. ``None`` trusts ``set_epoch`` and the number of fetched batches.
        **kwargs: passed to ``torch.utils.data.DataLoader``.

    Raises:
        ValueError: with ``persistent_workers``, and when a run is continued in mid-epoch with another batch size,
            number of processes, dataset length or seed.
        RuntimeError: the loader was made for another number of processes than are running.

    Example:
        >>> def loader():
        ...     return ResumableDataLoader(range(8), 2, sampler=EpochSampler(range(8), seed=1))
        >>> first = loader()
        >>> batches = iter(first)
        >>> _ = next(batches)
        >>> second = loader()
        >>> second.load_state_dict(first.state_dict())
        >>> [batch.tolist() for batch in second] == [batch.tolist() for batch in batches]
        True
    """

    #: Every batch belongs to one answer of the sampler, in order: see ``SampleIndices``.
    batches_follow_sampler = True

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        *,
        sampler: Any = None,
        progress: Callable[[], tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("persistent_workers"):
            raise ValueError("Expected `persistent_workers` to be False: kept workers do not see the epoch change.")
        # An own generator: creating an iterator draws a number, which must not come from the global stream.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(dataset, batch_size, sampler=sampler, **kwargs)
        self._progress = progress
        self._epoch = 0
        self._fetched = 0
        self._to_resume: dict[str, Any] | None = None  # loaded, and not used by an iteration yet

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches fetched in it, and what both are counted in."""
        if self._to_resume is not None:
            return dict(self._to_resume)
        return {"epoch": self._epoch, "batches": self._fetched, "layout": self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration begin where ``state_dict`` was taken, if it is an iteration over the same epoch.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        self._to_resume = dict(state_dict)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(state_dict["epoch"])

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        sampler = self.sampler
        if self._progress is not None and isinstance(sampler, EpochSampler):
            # Lightning announces one epoch too many when max_steps continues from the end of an epoch
            sampler.set_epoch(self._progress()[0])
        self._epoch = int(getattr(sampler, "epoch", 0))
        self._fetched = self._first_batch()
        self._to_resume = None
        if isinstance(sampler, EpochSampler):
            _check_processes(sampler.num_replicas)
            sampler.start = self._fetched * (self.batch_size or 1)
            if self.generator is not None:
                self.generator.manual_seed(derive_seed(sampler.seed, self._epoch, sampler.rank, "workers"))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self._epoch)
        for batch in super().__iter__():
            self._fetched += 1
            yield batch

    def _first_batch(self) -> int:
        state = self._to_resume
        if state is None:
            return 0
        if self._progress is not None:
            first = self._progress()[1]
        else:
            first = state["batches"] if state["epoch"] == self._epoch else 0
        if first and state["layout"] != self._layout():
            raise ValueError(
                f"Cannot continue in the middle of an epoch: the checkpoint counts batches of {state['layout']} but "
                f"this run has {self._layout()}; restore these values or resume from a checkpoint of an epoch's end."
            )
        return int(first)

    def _layout(self) -> dict[str, int | None]:
        return {
            "batch_size": self.batch_size,
            "processes": getattr(self.sampler, "num_replicas", 1),
            "samples": len(self.dataset),  # type: ignore[arg-type]
            "seed": getattr(self.sampler, "seed", None),
        }


def _check_processes(expected: int) -> None:
    distributed = torch.distributed
    running = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else expected
    if running != expected:
        raise RuntimeError(
            f"This training loader was made for {expected} process(es) but {running} are running, so all would see the "
            "same samples; give the data module itself to the Trainer (datamodule=...) instead of its loaders."
        )
