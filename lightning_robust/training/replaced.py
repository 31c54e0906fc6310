# SPDX-License-Identifier: Apache-2.0
"""Standing in for a method of one object, and stepping aside again in any order."""

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

from typing_extensions import override

__all__ = ["ReplacedMethod", "WatchedMethod"]


class ReplacedMethod:
    """Takes the place of ``owner.name`` on the instance from its construction until :meth:`remove`.

    A subclass says in :meth:`call` what happens instead. Several may stand one over the other and be removed in any
    order: one that is hidden by a later one passes calls on until that one goes and takes it along. A copy of the owner
    gets its own method instead of this.

    Args:
        owner: the object; its class is not touched.
        name: the method.

    Example:
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> class Loud(ReplacedMethod):
        ...     def call(self):
        ...         return self.inner().upper()
        >>> greeter = Greeter()
        >>> loud = Loud(greeter, "greet")
        >>> greeter.greet()
        'HELLO'
        >>> loud.remove()
        >>> greeter.greet()
        'hello'
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.inner: Callable[..., Any] = getattr(owner, name)
        # Lightning reads the parameter names of a step one level deep, and drops the first of a bound method.
        self.__wrapped__ = inspect.unwrap(self.inner)
        self._hidden = vars(owner).get(name, _ABSENT)
        self._removed = False
        vars(owner)[name] = self

    @property
    def __code__(self) -> CodeType:
        # Lightning compares the code of a step to see whether it is overridden, through one wrapper of somebody else's
        code: CodeType = self.__wrapped__.__code__
        return code

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What happens in place of the method, which is ``self.inner``.

        Args:
            *args: positional arguments of the call.
            **kwargs: named arguments of the call.
        """
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement, or the method itself once this was removed."""
        return self.inner(*args, **kwargs) if self._removed else self.call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (self.owner, self.name)

    def remove(self) -> None:
        """Step aside; doing so twice is harmless."""
        self._removed = True
        if vars(self.owner).get(self.name) is not self:
            return  # a later one stands over this one
        hidden = self._hidden
        while isinstance(hidden, ReplacedMethod) and hidden._removed:
            hidden = hidden._hidden
        if hidden is _ABSENT:
            del vars(self.owner)[self.name]
        else:
            vars(self.owner)[self.name] = hidden


class WatchedMethod(ReplacedMethod):
    """A method that tells when it is called, and what it returned.

    Args:
        owner: the object.
        name: the method.
        before: called before it.
        after: called after it, with what it returned.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__(owner, name)
        self._before = before
        self._after = after

    @override
    def call(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            self._before()
        result = self.inner(*args, **kwargs)
        if self._after is not None:
            self._after(result)
        return result


_ABSENT = object()
