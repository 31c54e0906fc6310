# SPDX-License-Identifier: Apache-2.0
"""What happened in one stage of an evaluation, in numbers that can be added up over processes and runs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RunningTally", "StageTally"]


@dataclass
class StageTally:
    """Counts of one stage; all add up, except the largest size.

    Args:
        entered: Samples that were attacked.
        broken: Samples for which a valid, misclassified point was found.
        forwards: Forward passes of the attack, in samples.
        backwards: Backward passes of the attack, in samples.
        verifications: Forward passes that looked at returned points, in samples.
        seconds: Time.
        over_budget: Returned points that were too far from their image.
        out_of_bounds: Returned points with impossible pixels.
        not_finite: Returned points with NaN or infinite pixels.
        lost: Points that fooled the model in the type they were crafted in, and not in float32.
        rejected: Misclassified points that did not count for one of these reasons.
        max_size: Largest distance of a returned point from its image.

    Example:
        >>> StageTally.total([StageTally(entered=3, max_size=0.1), StageTally(entered=2, max_size=0.3)]).entered
        5
    """

    entered: int = 0
    broken: int = 0
    forwards: int = 0
    backwards: int = 0
    verifications: int = 0
    seconds: float = 0.0
    over_budget: int = 0
    out_of_bounds: int = 0
    not_finite: int = 0
    lost: int = 0
    rejected: int = 0
    max_size: float = 0.0

    def add(self, **counts: float) -> None:
        """Add to some of the counts.

        Args:
            **counts: By name.
        """
        for name, value in counts.items():
            before = getattr(self, name)
            setattr(self, name, max(before, value) if name == "max_size" else before + value)

    @classmethod
    def total(cls, tallies: Iterable["StageTally"]) -> "StageTally":
        """The counts of several together.

        Args:
            tallies: Counts.
        """
        total = cls()
        for tally in tallies:
            total.add(**asdict(tally))
        return total

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)


class RunningTally:
    """Counts that grow, and are written down from time to time.

    Example:
        >>> running = RunningTally()
        >>> running.add(StageTally(entered=3))
        >>> running.take().entered, running.take().entered, running.total.entered
        (3, 0, 3)
    """

    def __init__(self) -> None:
        self.total = StageTally()
        self._new = StageTally()  # since the last `take`

    def add(self, tally: StageTally) -> None:
        """Count.

        Args:
            tally: What happened.
        """
        self.total, self._new = StageTally.total([self.total, tally]), StageTally.total([self._new, tally])

    def take(self) -> StageTally:
        """What was counted since the last call."""
        taken, self._new = self._new, StageTally()
        return taken
