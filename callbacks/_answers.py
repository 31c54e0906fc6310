# SPDX-License-Identifier: Apache-2.0
"""The answer of a frozen network, asked once however often a training step is repeated."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["OncePerInput"]

Answer = TypeVar("Answer")


class OncePerInput:
    """Remembers what a network answered to its last input.

    The passes of a sharpness-aware step show it the same tensor; one that was changed in place since is another input.
    """

    def __init__(self) -> None:
        self._answered: tuple[Tensor, int, Any] | None = None  # input, its version, answer

    def ask(self, network: Callable[[Tensor], Answer], x: Tensor) -> Answer:
        """The answer of ``network`` to ``x``.

        Args:
            network: The network, the same in every call.
            x: The input.
        """
        if self._answered is None or self._answered[0] is not x or self._answered[1] != x._version:
            self._answered = x, x._version, network(x)
        answer: Answer = self._answered[2]
        return answer

    def forget(self) -> None:
        """Let go of input and answer."""
        self._answered = None
