# SPDX-License-Identifier: Apache-2.0
"""Choosing layers by their names."""

import re
from collections.abc import Sequence

from typing_extensions import override

__all__ = ["NamePatterns", "plain_name"]


def plain_name(name: str) -> str:
    """The name that a layer would have if nothing were compiled.

    Args:
        name: Its dotted name.

    Example:
        >>> plain_name("net._orig_mod.0")
        'net.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


class NamePatterns:
    """Chooses names by regular expressions, which may occur anywhere in a name.

    Args:
        include: Patterns, one of which must occur; any name when ``None``.
        exclude: Patterns, none of which may occur.

    Raises:
        ValueError: If a pattern is not a regular expression.

    Example:
        >>> patterns = NamePatterns(exclude="head")
        >>> [name for name in ("blocks.0.fc", "head.fc") if name in patterns]
        ['blocks.0.fc']
    """

    def __init__(
        self, *, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
    ) -> None:
        self.include = None if include is None else _patterns("include", include)
        self.exclude = _patterns("exclude", exclude or [])

    def __contains__(self, name: str) -> bool:
        wanted = self.include is None or _occurs(self.include, name)
        return wanted and not _occurs(self.exclude, name)

    @override
    def __repr__(self) -> str:
        return f"include={self.include}, exclude={self.exclude}"


def _occurs(patterns: list[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _patterns(argument: str, value: str | Sequence[str]) -> list[str]:
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Expected `{argument}` to hold regular expressions but got {pattern!r} ({error})."
            ) from error
    return patterns
