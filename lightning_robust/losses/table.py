# SPDX-License-Identifier: Apache-2.0
"""One row for every training sample, the same in all processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_robust.checks import check_integer

__all__ = ["SampleTable"]

_CHUNK = 1 << 24  # elements summed over the processes at a time


class SampleTable(nn.Module):
    """Remembers one row per training sample, for losses whose terms have a memory.

    The shape of a row is that of the first ones that are looked up or recorded. Each process writes the rows of its own
    samples; :meth:`merge` gives them to all, in one sum. Between two merges a sample belongs to one process as a rule
    (an epoch of a distributed sampler), so merging once per epoch equals exchanging every step; of one that several
    processes wrote, all get the mean.

    Args:
        fill: Value of the rows that were never written.
        num_samples: Number of samples; may be told later by :meth:`resize`.

    Raises:
        RuntimeError: If the table is used before the number of samples is known.
        ValueError: If a saved table has another number of samples.

    Example:
        >>> import torch
        >>> from lightning_robust.losses import SampleTable
        >>> table = SampleTable(fill=1.0, num_samples=4)
        >>> table.record(torch.tensor([2]), torch.tensor([[5.0, 6.0]]))
        >>> table.look_up(torch.tensor([0, 2]), like=torch.zeros(2, 2))
        tensor([[1., 1.],
                [5., 6.]])
    """

    rows: Tensor | None
    written: Tensor | None

    def __init__(self, *, fill: float = 0.0, num_samples: int | None = None) -> None:
        super().__init__()
        if num_samples is not None:
            check_integer("num_samples", num_samples, 1)
        self.fill = fill
        self.num_samples = num_samples
        self.register_buffer("rows", None)
        self.register_buffer("written", None, persistent=False)  # since the last merge; checkpoints hold merged tables

    def resize(self, num_samples: int) -> None:
        """Learn the number of samples; knowing it already is fine, another number is not.

        Args:
            num_samples: Number of training samples.
        """
        check_integer("num_samples", num_samples, 1)
        if self.num_samples is not None and self.num_samples != num_samples:
            raise ValueError(
                f"What is remembered belongs to {self.num_samples} training samples, but there are {num_samples} now; "
                "continue with the same data set, or start a new run."
            )
        self.num_samples = num_samples

    def look_up(self, index: Tensor, like: Tensor) -> Tensor:
        """The rows of some samples, detached, on the device of ``like``.

        Args:
            index: Positions in the training set, ``[B]``.
            like: A tensor ``[B, ...]`` with the shape and type of the rows.
        """
        rows, _ = self._allocated(like)
        return rows[index.to(rows.device)].to(like)

    def record(self, index: Tensor, rows: Tensor) -> None:
        """Overwrite the rows of some samples.

        Args:
            index: Positions in the training set, ``[B]``.
            rows: ``[B, ...]``.
        """
        table, written = self._allocated(rows)
        index = index.to(table.device)
        table[index] = rows.detach().to(table)
        written[index] = True

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Give all processes the rows that each of them wrote since the last merge; all call it at once.

        Args:
            total: Sums a tensor over the processes.
        """
        if self.rows is None or self.written is None:
            return
        writers = total(self.written.to(self.rows.dtype))
        shape = (-1, *[1] * (self.rows.ndim - 1))
        step = max(1, _CHUNK // max(1, self.rows[0].numel()))
        for begin in range(0, len(self.rows), step):
            part = slice(begin, begin + step)
            own, count = self.written[part].view(shape), writers[part].view(shape)
            summed = total(torch.where(own, self.rows[part], 0.0))
            self.rows[part] = torch.where(count > 0, summed / count.clamp(min=1), self.rows[part])
        self.written.zero_()

    def _allocated(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.num_samples is None:
            raise RuntimeError(
                "The number of training samples is not known; pass num_samples=..., or use the callback Criterion, "
                "which tells it."
            )
        if self.rows is None:
            self.rows = like.new_full((self.num_samples, *like.shape[1:]), self.fill, requires_grad=False)
        if self.written is None:
            self.written = torch.zeros(self.num_samples, dtype=torch.bool, device=self.rows.device)
        if self.rows.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"What is remembered of each sample has shape {tuple(self.rows.shape[1:])}, but the batch has "
                f"{tuple(like.shape[1:])}; keep the number of classes during a run."
            )
        return self.rows, self.written

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The table takes the size of what is loaded, unless it knows that this is the wrong number of samples.
        saved = state_dict.get(prefix + "rows")
        if isinstance(saved, Tensor):
            self.resize(len(saved))
            self.rows, self.written = (
                torch.empty_like(saved, device=None if self.rows is None else self.rows.device),
                None,
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
