# SPDX-License-Identifier: Apache-2.0
"""Refusals of the command line: a few lines, a suggestion where there is one, an exit code, never a traceback."""

import difflib
from collections.abc import Collection

__all__ = ["BAD_USAGE", "FAILED", "CommandError", "UsageError", "did_you_mean"]

BAD_USAGE = 2
FAILED = 1


class CommandError(Exception):
    """A command that cannot go on: the first line says what is wrong, further lines how to go on.

    Args:
        message: The sentence that says what is wrong.
        *hints: Further lines.

    Example:
        >>> print(CommandError("Nothing to resume in runs/x.", "Start a new run with `lightning-robust run`."))
        Nothing to resume in runs/x.
        Start a new run with `lightning-robust run`.
    """

    exit_code = FAILED

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__("\n".join([message, *(hint for hint in hints if hint)]))


class UsageError(CommandError):
    """A command line or a recipe that cannot be understood."""

    exit_code = BAD_USAGE


def did_you_mean(given: str, known: Collection[str], n: int = 2) -> str:
    """Name the closest known words as a question, or return an empty string when none is close.

    Args:
        given: The word that is not known.
        known: The words that are.
        n: How many to name at most.

    Example:
        >>> did_you_mean("rhoo", ["rho", "adaptive"])
        'Did you mean `rho`?'
    """
    lowered = {word.lower(): word for word in known}
    close = difflib.get_close_matches(given.lower(), lowered, n=n, cutoff=0.6)
    if not close:
        return ""
    return "Did you mean " + " or ".join(f"`{lowered[word]}`" for word in close) + "?"
