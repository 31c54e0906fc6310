# SPDX-License-Identifier: Apache-2.0
"""One sanity check of a robustness evaluation, as data that a report can hold."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_robust.checks import check_choice

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """What one sanity check found; it never fails, it warns.

    Args:
        name: Short name with dashes, the same in every report: ``"zero-gradients"``.
        status: ``"ok"``, or ``"warn"``: the robustness that was measured may not be there.
        message: One sentence for the reader, with the remedy when the status is ``"warn"``.
        numbers: What the status was decided on, by name.

    Raises:
        ValueError: If the status is neither of the two.

    Example:
        >>> check = Check("zero-gradients", "ok", "Every image has a gradient.", {"share": 0.0})
        >>> Check.from_dict(check.to_dict()) == check
        True
    """

    name: str
    status: Literal["ok", "warn"]
    message: str
    numbers: dict[str, float | int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("status", self.status, ("ok", "warn"))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Check":
        """The check that `to_dict` wrote.

        Args:
            values: What `to_dict` returned.
        """
        return cls(**values)
