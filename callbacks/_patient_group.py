# SPDX-License-Identifier: Apache-2.0
"""Processes that hand results to each other, and wait for each other as long as it takes."""

from datetime import timedelta
from typing import Any, TypeVar

import torch

__all__ = ["PatientGroup"]

T = TypeVar("T")


class PatientGroup:
    """All processes of the run, in a group of its own without the usual limit of minutes.

    One process may work for an hour longer than another when attacks break more samples here than there; the limits of
    the Trainer's own group would end the run. All processes have to make it at the same time.
    """

    def __init__(self) -> None:
        self._group: Any = None
        if _is_distributed():
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))

    def gather(self, value: T) -> list[T]:
        """What each process gave, in the order of ranks.

        Args:
            value: Anything that can be pickled.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None and _is_distributed():
            torch.distributed.destroy_process_group(self._group)
        self._group = None


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
