# SPDX-License-Identifier: Apache-2.0
"""What is known of every sample of an evaluation, by its index in the dataset."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["Ledger", "digest_of", "merged"]

_DTYPES = {"index": torch.int64, "label": torch.int64, "digest": torch.float64, "prediction": torch.int64}
_CHAIN_DTYPES = {"done": torch.int32, "broken": torch.int32, "rounded": torch.bool, "rounded_inside": torch.bool}
_FIRST_ROWS = 256


class Ledger:
    """Columns on the CPU, one row per sample.

    ``index``, ``label``, ``digest`` (tells whether it is the same image), ``prediction`` for the clean image; and per
    chain of attacks ``done`` (stages withstood), ``broken`` (stage that found an adversarial point, or -1),
    ``rounded`` and ``rounded_inside`` (whether that point, rounded to 8 bits, still fools the model, and does so
    within the budget).

    Args:
        chains: Number of chains.

    Example:
        >>> ledger = Ledger(chains=1)
        >>> rows = ledger.add(torch.tensor([7, 3]), torch.tensor([0, 1]), torch.rand(2), torch.tensor([0, 1]))
        >>> ledger.set(rows, chain=0, broken=torch.tensor([-1, 0]), done=torch.tensor([1, 0]))
        >>> ledger.columns()["broken"].tolist()
        [[-1], [0]]
    """

    def __init__(self, chains: int) -> None:
        self.chains = chains
        self.rows: dict[int, int] = {}
        self._columns = {name: torch.zeros(_FIRST_ROWS, dtype=dtype) for name, dtype in _DTYPES.items()}
        for name, dtype in _CHAIN_DTYPES.items():
            self._columns[name] = torch.zeros(_FIRST_ROWS, chains, dtype=dtype)
        self._changed = torch.zeros(_FIRST_ROWS, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, index: Tensor, label: Tensor, digest: Tensor, prediction: Tensor) -> Tensor:
        """Enter samples that are not known yet.

        Args:
            index: Index of each in the dataset.
            label: Class of each.
            digest: What `digest_of` says of each.
            prediction: Predicted class for each clean image.

        Returns:
            The rows.
        """
        rows = self._new_rows(index)
        for name, values in {"index": index, "label": label, "digest": digest, "prediction": prediction}.items():
            self._columns[name][rows] = values.to("cpu", _DTYPES[name])
        self._columns["broken"][rows] = -1
        self._changed[rows] = True
        return rows

    def rows_of(self, index: Tensor | Iterable[int]) -> Tensor:
        """Rows of known samples.

        Args:
            index: Indices in the dataset.
        """
        each = index.tolist() if isinstance(index, Tensor) else index
        return torch.tensor([self.rows[one] for one in each], dtype=torch.long)

    def refuse_other(self, rows: Tensor, label: Tensor, digest: Tensor) -> None:
        """Refuse samples that were other images when they were seen first.

        Args:
            rows: Rows of the samples.
            label: Class of each.
            digest: What `digest_of` says of each.

        Raises:
            ValueError: They differ.
        """
        known = self.columns(rows)
        same = (known["label"] == label.cpu()) & torch.isclose(known["digest"], digest, rtol=1e-5, atol=1e-5)
        if not same.all():
            index = int(known["index"][~same][0])
            raise ValueError(
                f"Sample {index} was another image, or of another class, when it was seen first; evaluate on data that "
                "do not change (no random augmentation), with one index per sample, and with a `state_dir` of its own."
            )

    def set(self, rows: Tensor, chain: int, **values: Tensor) -> None:
        """Write what became of samples in a chain.

        Args:
            rows: Which samples.
            chain: Number of the chain.
            **values: Columns by name.
        """
        for name, value in values.items():
            self._columns[name][rows, chain] = value.to("cpu", _CHAIN_DTYPES[name])
        self._changed[rows] = True

    def columns(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """The columns, of some rows or of all.

        Args:
            rows: Which; all when not given.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        return {name: column[rows] for name, column in self._columns.items()}

    def take_changes(self) -> dict[str, Tensor]:
        """The rows that changed since the last call."""
        rows = self._changed.nonzero().squeeze(1)
        self._changed[rows] = False
        return self.columns(rows)

    def merge(self, columns: Mapping[str, Tensor]) -> None:
        """Enter what another process or an earlier run found out; a broken sample stays broken.

        Args:
            columns: What `columns` or `take_changes` of the other gave.
        """
        first = _first_of_each(columns["index"])
        self._merge_unique({name: column[first] for name, column in columns.items()})
        again = torch.ones(len(columns["index"]), dtype=torch.bool)
        again[first] = False
        if again.any():
            self.merge({name: column[again] for name, column in columns.items()})

    def _merge_unique(self, columns: Mapping[str, Tensor]) -> None:
        known = torch.tensor([each in self.rows for each in columns["index"].tolist()], dtype=torch.bool)
        rows = self._new_rows(columns["index"][~known])
        for name, column in columns.items():
            self._columns[name][rows] = column[~known]
        theirs = {name: column[known] for name, column in columns.items()}
        rows = self.rows_of(theirs["index"])
        broken, other = self._columns["broken"][rows], theirs["broken"]
        earlier = (other >= 0) & ((broken < 0) | (other < broken))
        further = (other < 0) & (broken < 0) & (theirs["done"] > self._columns["done"][rows])
        for name in _CHAIN_DTYPES:
            self._columns[name][rows] = torch.where(earlier | further, theirs[name], self._columns[name][rows])

    def _new_rows(self, index: Tensor) -> Tensor:
        first = len(self.rows)
        self.rows.update({each: first + offset for offset, each in enumerate(index.tolist())})
        assert len(self.rows) == first + len(index), "an index came twice"
        while len(self.rows) > len(self._changed):
            self._changed = _doubled(self._changed)
            self._columns = {name: _doubled(column) for name, column in self._columns.items()}
        return torch.arange(first, len(self.rows))


def digest_of(x: Tensor) -> Tensor:
    """A number ``[B]`` per image by which another image is recognised as such; the same up to rounding everywhere.

    Args:
        x: Images.
    """
    flat = x.flatten(1).to("cpu", torch.float64)
    return flat @ torch.cos(torch.arange(flat.shape[1], dtype=torch.float64))


def merged(chains: int, parts: Iterable[Mapping[str, Tensor]]) -> Ledger:
    """One ledger of what several found out.

    Args:
        chains: Number of chains.
        parts: Columns of each.
    """
    ledger = Ledger(chains)
    for part in parts:
        ledger.merge(part)
    return ledger


def _first_of_each(index: Tensor) -> Tensor:
    seen: dict[int, int] = {}
    for position, each in enumerate(index.tolist()):
        seen.setdefault(each, position)
    return torch.tensor(list(seen.values()), dtype=torch.long)


def _doubled(column: Tensor) -> Tensor:
    return torch.cat([column, torch.zeros_like(column)])
