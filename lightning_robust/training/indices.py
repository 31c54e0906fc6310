# SPDX-License-Identifier: Apache-2.0
"""Which samples of the dataset a training batch consists of, without touching dataset, loader or training step."""

import operator
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_robust.checks import check_integer
from lightning_robust.training.followed import FollowedLoader, Iteration
from lightning_robust.training.replaced import WatchedMethod

__all__ = ["REMEDY", "SampleIndices", "as_indices", "entry_of"]

REMEDY = (
    "let the dataset return the index of each sample and name that entry of the batch with index_key=... "
    "(a key, or a position)."
)


class SampleIndices:
    """Tells for the running training batch which indices of the dataset it was made of.

    The sampler of a map-style ``DataLoader`` runs in the main process, and batches arrive in the order in which it
    named them. So its answers are written down while it is asked, and each batch that Lightning fetches takes one.
    That holds for worker processes, prefetching, injected distributed samplers, loaders that are made anew, and runs
    that continue in mid-epoch. Loader and strategy are as they were after :meth:`remove`.

    A ``collate_fn`` has to keep number and order of the samples: another number is refused, another order cannot be
    seen. With ``index_key`` the batch itself holds the indices and nothing is followed.

    Cost: one small list per batch.

    Args:
        index_key: key (mapping) or position (sequence) of the indices in a batch; the sampler is followed when
            ``None``.
        num_samples: number of samples of the dataset; that of the training loader's dataset when ``None``.

    Raises:
        TypeError: when loaders are set up, for one that cannot be followed: an ``IterableDataset``, something that is
            no ``DataLoader``, batches out of order, or a subclass that iterates in a way of its own.
        ValueError: for several training loaders, and if the number of samples is unknown or changes during a fit; in a
            step, for a batch with another number of samples than indices.

    Example:
        >>> from lightning_robust.training import SampleIndices
        >>> SampleIndices(index_key="id").current({"x": torch.zeros(2, 3), "id": torch.tensor([7, 1])}, count=2)
        tensor([7, 1])
    """

    def __init__(self, *, index_key: int | str | None = None, num_samples: int | None = None) -> None:
        if num_samples is not None:
            check_integer("num_samples", num_samples, 1)
        self.index_key = index_key
        self.num_samples = num_samples
        self._trainer: L.Trainer | None = None
        self._watched: list[WatchedMethod] = []
        self._followed: FollowedLoader | None = None
        self._asked: Iteration | None = None  # the last one that a loader asked
        self._fetched: tuple[int, Iteration | None] | None = None  # number of a batch, and where it comes from
        self._list: tuple[int, list[Any]] | None = None  # number of the running batch, and its samples
        self._samples: int | None = None
        self._in_set_up = False

    def install(self, trainer: L.Trainer) -> None:
        """Follow the training loader of ``trainer``; to be called in ``setup``, before any loader is made.

        Args:
            trainer: the Trainer.
        """
        self.remove()
        self._trainer = trainer
        if self.index_key is None:
            self._watched = [
                WatchedMethod(trainer.fit_loop, "setup_data", before=self._set_up_begins, after=self._set_up_ends),
                WatchedMethod(trainer.strategy, "process_dataloader", after=self._follow),
                WatchedMethod(trainer.strategy, "batch_to_device", before=self._next_batch),
            ]

    def remove(self) -> None:
        """Stop following; safe to call at any time and more than once."""
        while self._watched:
            self._watched.pop().remove()
        if self._followed is not None:
            self._followed.release()
        self._trainer = self._followed = self._asked = self._samples = None
        self._fetched = self._list = None
        self._in_set_up = False

    def start(self) -> int:
        """Refuse what is not known by now; to be called in ``on_train_start``.

        Returns:
            The number of samples.
        """
        loaders = tree_leaves(self._running().train_dataloader)
        if self.index_key is None and len(loaders) != 1:
            raise ValueError(
                f"There are {len(loaders)} training loaders, so an index does not name a sample; use one loader, or "
                + REMEDY
            )
        if self.index_key is None and (self._followed is None or self._followed.loader is not loaders[0]):
            raise RuntimeError("The training loader was replaced after its set-up, so it is not followed; " + REMEDY)
        self._samples = self.num_samples if self.num_samples is not None else _length(loaders)
        return self._samples

    def current(self, batch: Any, *, count: int, partial: bool = False) -> Tensor:
        """Indices of the running batch, ``[count]``.

        Args:
            batch: the batch as the loader gave it.
            count: number of samples that the step computed something for.
            partial: whether that may be the first part of the batch only.

        Raises:
            KeyError: the batch has no entry ``index_key``.
            RuntimeError: the sampler was not asked for this batch.
        """
        if self.index_key is not None:
            indices = as_indices(entry_of(batch, self.index_key))
        else:
            indices = as_indices(self._list_of_running_batch())
        if count > len(indices) or (count < len(indices) and not partial):
            raise ValueError(
                f"The loader put {len(indices)} samples into this batch but the step has logits of {count}; methods "
                "that remember samples need one row of logits for each, so nothing may drop, add or repeat samples: "
                "no collate_fn, no callback, not the step."
            )
        self._refuse_outside(indices)
        return indices[:count]

    def _list_of_running_batch(self) -> list[Any]:
        self._take()
        if self._list is None or self._list[0] != self._running().fit_loop.total_batch_idx:
            raise RuntimeError("The sampler of the training loader was not asked for this batch; " + REMEDY)
        return self._list[1]

    def _refuse_outside(self, indices: Tensor) -> None:
        # on another device the answer would have to be waited for
        if self._samples is None or indices.device.type != "cpu" or not len(indices):
            return
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self._samples:
            raise ValueError(
                f"Expected sample indices from 0 to {self._samples - 1} but got {low if low < 0 else high}; set "
                "num_samples=... if there are more."
            )

    def _running(self) -> L.Trainer:
        assert self._trainer is not None, "installed in setup"
        return self._trainer

    def _set_up_begins(self) -> None:
        self._in_set_up = True

    def _set_up_ends(self, _: None) -> None:
        self._in_set_up = False

    def _follow(self, loader: Any) -> None:
        if not self._in_set_up:  # of training loaders
            return
        if self._followed is not None:
            self._followed.release()
        self._followed = FollowedLoader(loader, self._note, REMEDY)
        samples = len(loader.dataset)
        if self._samples is not None and self.num_samples is None and samples != self._samples:
            raise ValueError(
                f"The training dataset had {self._samples} samples and has {samples} now that its loader was made "
                "anew, so what is remembered of each sample has lost its meaning; keep the dataset during a fit."
            )

    def _note(self, iteration: Iteration) -> None:
        self._asked = iteration

    def _next_batch(self) -> None:
        """Somebody moves a batch to the device. When it is Lightning, it has just asked for that batch."""
        if not self._running().training:
            return
        self._take()
        self._fetched = self._running().fit_loop.total_batch_idx + 1, self._asked

    def _take(self) -> None:
        """Take the samples of the fetched batch, once Lightning has counted it and nobody else can be meant."""
        if self._fetched is not None and self._fetched[0] <= self._running().fit_loop.total_batch_idx:
            number, iteration = self._fetched
            self._fetched = None
            self._list = (number, iteration.lists.popleft()) if iteration is not None and iteration.lists else None


def entry_of(batch: Any, key: int | str, option: str = "index_key") -> Any:
    """The entry of a batch that a user names.

    Args:
        batch: the batch.
        key: key (mapping) or position (sequence).
        option: where the user names it.

    Raises:
        KeyError: the batch has no such entry.
    """
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        form = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else _describe(batch)
        raise KeyError(f"{option}={key!r} names no entry of the batch, which has {form}.") from None


def as_indices(indices: Any) -> Tensor:
    """Indices of samples as a tensor ``[B]`` of int64.

    Args:
        indices: a tensor, or a list of integers.

    Raises:
        TypeError: they are something else.
    """
    if isinstance(indices, Tensor) and indices.ndim == 1 and not indices.is_floating_point():
        return indices.long()
    if isinstance(indices, list | tuple):
        try:
            return torch.tensor([operator.index(index) for index in indices], dtype=torch.long)
        except TypeError:
            pass  # refused below
    raise TypeError(
        f"Expected the indices of a batch to be integers [B] but got {_describe(indices)}; methods that remember "
        "samples need a dataset whose samples are numbered 0, 1, 2, ..."
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, list | tuple) and value:
        return f"{len(value)} entries, the first a {type(value[0]).__name__}"
    return f"the type {type(value).__name__}"


def _length(loaders: list[Any]) -> int:
    dataset: Any = getattr(loaders[0], "dataset", None) if len(loaders) == 1 else None
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        raise ValueError(
            "The number of training samples cannot be read off the training loader; name it with num_samples=..."
        ) from None
