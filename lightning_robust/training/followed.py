# SPDX-License-Identifier: Apache-2.0
"""Writing down what a DataLoader's sampler answers, while the DataLoader asks it."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["FollowedLoader", "Iteration"]


class FollowedLoader:
    """Listens to the sampler of a map-style ``DataLoader`` until :meth:`release`.

    Batches come in the order in which the sampler named their samples, so every delivered batch belongs to the oldest
    answer of its iteration that no batch has taken yet. Several may listen to one loader and go in any order.

    Args:
        loader: the loader; the same object is followed and put back.
        asked: told which iteration is being asked, before the answer.
        remedy: end of the sentence that refuses a loader.
        kind: what the loader is for, as messages name it.

    Raises:
        TypeError: for what cannot be followed: something that is no ``DataLoader``, an ``IterableDataset``, batches out
            of order, or a subclass with an iteration of its own that does not declare ``batches_follow_sampler``.

    Example:
        >>> loader = DataLoader(range(4), batch_size=2)
        >>> heard = []
        >>> followed = FollowedLoader(loader, heard.append)
        >>> for batch in loader:
        ...     print(heard[-1].lists.popleft(), batch)
        [0, 1] tensor([0, 1])
        [2, 3] tensor([2, 3])
        >>> followed.release()
    """

    def __init__(
        self, loader: Any, asked: Callable[["Iteration"], None], remedy: str = "", kind: str = "training"
    ) -> None:
        _refuse_unfollowable(loader, remedy, kind)
        self.loader = loader
        # DataLoader refuses that these are set; its iterators read them from here
        self._name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._sampler = _FollowedSampler(vars(loader)[self._name], asked)
        vars(loader)[self._name] = self._sampler
        if getattr(loader, "_iterator", None) is not None:
            loader._iterator = None  # kept workers go on asking the sampler of the iteration that started them

    def release(self) -> None:
        """Stop listening; doing so twice is harmless."""
        _set(self._sampler, active=False)
        here = vars(self.loader)[self._name]
        while type(here) is _FollowedSampler and not _get(here, "active"):
            here = _get(here, "sampler")
        vars(self.loader)[self._name] = here


class Iteration:
    """One iteration over a sampler; ``lists`` are the answers that no batch has taken yet.

    Args:
        iterator: the sampler's own iterator.
        asked: told before each answer.
    """

    def __init__(self, iterator: Iterator[Any], asked: Callable[["Iteration"], None]) -> None:
        self.lists: deque[list[Any]] = deque()
        self._iterator = iterator
        self._asked = asked

    def __iter__(self) -> "Iteration":
        return self

    def __next__(self) -> Any:
        self._asked(self)
        chosen = next(self._iterator)
        self.lists.append(list(chosen) if isinstance(chosen, list | tuple | Tensor) else [chosen])
        return chosen


class _FollowedSampler:
    """Passes for the sampler that it stands in for, also with ``isinstance`` and for attributes that are set."""

    def __init__(self, sampler: Any, asked: Callable[[Iteration], None]) -> None:
        _set(self, sampler=sampler, asked=asked, active=True)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(_get(self, "sampler"))

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(_get(self, "sampler"))
        return Iteration(iterator, _get(self, "asked")) if _get(self, "active") else iterator

    def __len__(self) -> int:
        return len(_get(self, "sampler"))

    def __getattr__(self, name: str) -> Any:
        return getattr(_get(self, "sampler"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_get(self, "sampler"), name, value)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _itself, (_get(self, "sampler"),)  # a copy of the loader has a copy of its own sampler


def _itself(value: Any) -> Any:
    return value


def _get(followed: _FollowedSampler, name: str) -> Any:
    return object.__getattribute__(followed, f"_followed_{name}")


def _set(followed: _FollowedSampler, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(followed, f"_followed_{name}", value)


def _refuse_unfollowable(loader: Any, remedy: str, purpose: str) -> None:
    kind = type(loader)
    if not isinstance(loader, DataLoader):
        raise TypeError(f"The {purpose} loader is a {kind.__name__}, whose samples have no known index; {remedy}")
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"The {purpose} dataset {type(loader.dataset).__name__} is an IterableDataset, whose samples have no known "
            f"index; use a map-style dataset, or {remedy}"
        )
    if loader.num_workers and not loader.in_order:
        raise TypeError(
            f"The {purpose} loader has in_order=False, so its batches arrive in an unknown order; set in_order=True, "
            f"or {remedy}"
        )
    plain = kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator
    if not plain and not getattr(kind, "batches_follow_sampler", False):
        raise TypeError(
            f"The {purpose} loader {kind.__name__} iterates in a way of its own, so its batches may not follow its "
            f"sampler; use a plain DataLoader, set {kind.__name__}.batches_follow_sampler = True if they do, or "
            f"{remedy}"
        )
