# SPDX-License-Identifier: Apache-2.0
"""The two outcomes of a sanity check."""

from collections.abc import Mapping

from lightning_robust.evaluation.check import Check

__all__ = ["Numbers", "fine", "warned"]

#: What a check measured, by name.
Numbers = Mapping[str, float | int | None]


def fine(name: str, message: str, numbers: Numbers) -> Check:
    """A check that found nothing suspicious.

    Args:
        name: name of the check.
        message: one sentence.
        numbers: what was measured.

    Example:
        >>> fine("finite", "All logits are finite.", {"not_finite": 0}).status
        'ok'
    """
    return Check(name, "ok", message, dict(numbers))


def warned(name: str, message: str, numbers: Numbers) -> Check:
    """A check that found something suspicious.

    Args:
        name: name of the check.
        message: what it is, and the remedy.
        numbers: what was measured.

    Example:
        >>> warned("finite", "3 images have infinite logits; look for overflow.", {"not_finite": 3}).status
        'warn'
    """
    return Check(name, "warn", message, dict(numbers))
