# SPDX-License-Identifier: Apache-2.0
"""Which samples of the dataset a validation or test batch consists of."""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_robust.checks import check_integer
from lightning_robust.training.followed import FollowedLoader, Iteration
from lightning_robust.training.indices import REMEDY, as_indices, entry_of
from lightning_robust.training.replaced import WatchedMethod

__all__ = ["EvaluationIndices"]

_KINDS = {TrainerFn.VALIDATING: "validation", TrainerFn.TESTING: "test"}


class EvaluationIndices:
    """Tells for each batch of ``trainer.validate`` or ``trainer.test`` which indices of the dataset it was made of.

    The sampler of one map-style ``DataLoader`` is followed, as :class:`~lightning_robust.training.SampleIndices` does
    in a fit: its answers are written down, and each batch takes the oldest. That holds for worker processes, shuffling
    and injected distributed samplers, whose padding thereby shows. A ``collate_fn`` has to keep number and order of
    the samples. With ``index_key`` the batch itself holds the indices and nothing is followed.

    Cost: one small list per batch.

    Args:
        index_key: key (mapping) or position (sequence) of the indices in a batch; the sampler is followed when
            ``None``.
        dataloader_idx: which loader, if there are several.

    Raises:
        TypeError: when loaders are set up, for one that cannot be followed: an ``IterableDataset``, something that is
            no ``DataLoader``, batches out of order, or a subclass that iterates in a way of its own.
        ValueError: for a batch with another number of samples than indices.

    Example:
        >>> import torch
        >>> from lightning_robust.training import EvaluationIndices
        >>> EvaluationIndices(index_key="id").current({"x": torch.zeros(2, 3), "id": torch.tensor([7, 1])}, count=2)
        tensor([7, 1])
    """

    def __init__(self, *, index_key: int | str | None = None, dataloader_idx: int = 0) -> None:
        check_integer("dataloader_idx", dataloader_idx, 0)
        self.index_key = index_key
        self.dataloader_idx = dataloader_idx
        self._watched: list[WatchedMethod] = []
        self._followed: FollowedLoader | None = None
        self._in_set_up = False
        self._loaders = 0  # that were set up
        self._asked: Iteration | None = None  # the last one that the loader asked
        self._running: Iteration | None = None  # that of the loop
        self._kind = ""

    def install(self, trainer: L.Trainer) -> None:
        """Follow a loader of the run that begins; to be called in ``setup``, before any loader is made.

        Args:
            trainer: the Trainer, in ``validate`` or ``test``.
        """
        self.remove()
        if self.index_key is not None:
            return
        assert trainer.state.fn is not None
        self._kind = _KINDS[trainer.state.fn]
        loop = trainer.test_loop if trainer.state.fn == TrainerFn.TESTING else trainer.validate_loop
        self._watched = [
            WatchedMethod(loop, "setup_data", before=self._set_up_begins, after=self._set_up_ends),
            WatchedMethod(trainer.strategy, "process_dataloader", after=self._follow),
            WatchedMethod(trainer.strategy, "batch_to_device", before=self._batch_moves),
        ]

    def remove(self) -> None:
        """Stop following; safe to call at any time and more than once."""
        while self._watched:
            self._watched.pop().remove()
        if self._followed is not None:
            self._followed.release()
        self._followed = self._asked = self._running = None
        self._in_set_up, self._loaders = False, 0

    def current(self, batch: Any, *, count: int) -> Tensor:
        """Indices ``[count]`` of the running batch; to be called once for each batch of the loader.

        Args:
            batch: the batch.
            count: number of its samples.

        Raises:
            KeyError: the batch has no entry ``index_key``.
            RuntimeError: the sampler was not asked for this batch.
        """
        if self.index_key is not None:
            indices = as_indices(entry_of(batch, self.index_key))
        elif self._running is None or not self._running.lists:
            raise RuntimeError(f"The sampler of the {self._kind} loader was not asked for this batch; " + REMEDY)
        else:
            indices = as_indices(self._running.lists.popleft())
        if len(indices) != count:
            raise ValueError(
                f"The loader put {len(indices)} samples into this batch, which has {count} now, so they cannot be told "
                "apart; let no collate_fn and no callback drop, add or repeat samples, or " + REMEDY
            )
        return indices

    def _set_up_begins(self) -> None:
        self._in_set_up, self._loaders = True, 0

    def _set_up_ends(self, _: None) -> None:
        self._in_set_up = False

    def _follow(self, loader: Any) -> None:
        if not self._in_set_up:
            return
        if self._loaders == self.dataloader_idx:
            if self._followed is not None:
                self._followed.release()
            self._followed = FollowedLoader(loader, self._note, REMEDY, self._kind)
        self._loaders += 1

    def _note(self, iteration: Iteration) -> None:
        self._asked = iteration

    def _batch_moves(self) -> None:
        # the loop moves each batch right after it asked for it, and iterates over its loader once
        if self._running is None:
            self._running = self._asked
