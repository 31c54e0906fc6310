# SPDX-License-Identifier: Apache-2.0
"""One switch that keeps repeated forward passes out of logs and metrics."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_robust.training.replaced import ReplacedMethod

__all__ = ["QuietGate"]


class QuietGate:
    """Replaces ``self.log`` and the calls of the module's metrics by versions that can be silenced.

    The replacements are installed once per fit and only a flag is flipped per pass: swapping attributes per pass would
    make a compiled module compile again. What is silenced returns the value of the pass that counted.

    Metrics are found among the sub-modules, and in lists, dictionaries and plain objects that the module holds.

    Args:
        module: the LightningModule whose logging is guarded.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self.quiet = False
        self._replaced: list[_Gated] = []
        self._complete = False

    def install(self) -> None:
        """Put the replacements in place."""
        for name in ("log", "log_dict"):
            self._replace(self.module, name)
        self._replace_metrics()
        self._complete = False

    def remove(self) -> None:
        """Take them out again; doing so twice is harmless."""
        while self._replaced:
            self._replaced.pop().remove()

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Nothing is logged or counted inside."""
        if self._replaced and not self._complete:
            # metrics that were made after the installation, in a hook or in the first pass
            self._replace_metrics()
            self._complete = True
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def _replace_metrics(self) -> None:
        known = {id(gated.owner) for gated in self._replaced}
        for metric in find_metrics(self.module):
            if id(metric) not in known:
                for name in ("update", "forward", "compute", "reset"):
                    self._replace(metric, name)

    def _replace(self, owner: Any, name: str) -> None:
        self._replaced.append(_Gated(self, owner, name))


class _Gated(ReplacedMethod):
    """A method that can be silenced."""

    def __init__(self, gate: QuietGate, owner: Any, name: str) -> None:
        super().__init__(owner, name)
        self._gate = gate
        self._last: Any = _NEVER

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    @override
    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._gate.quiet:
            self._last = self.inner(*args, **kwargs)
        elif self._last is _NEVER:
            return self._uncounted(*args, **kwargs)
        return self._last

    def _uncounted(self, *args: Any, **kwargs: Any) -> Any:
        """What a silent pass gets that comes before any that counts: a metric's value, counted in a copy."""
        if not isinstance(self.owner, Metric | MetricCollection):
            return None
        return getattr(copy.deepcopy(self.owner), self.name)(*args, **kwargs)


_NEVER = object()
_CONTAINERS = (list, tuple, set, dict)


def find_metrics(module: L.LightningModule) -> list[Metric | MetricCollection]:
    """Metrics among the sub-modules, and in containers and plain objects that the module holds.

    Args:
        module: the LightningModule.
    """
    found: dict[int, Metric | MetricCollection] = {}
    seen: set[int] = set()
    pending: list[Any] = [*module.modules(), *(value for owner in module.modules() for value in _held_by(owner))]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Metric | MetricCollection):
            found[id(value)] = value
            pending.extend(value.values(copy_state=False) if isinstance(value, MetricCollection) else ())
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, _CONTAINERS):
            pending.extend(value)
        elif not isinstance(value, torch.nn.Module):
            pending.extend(_held_by(value))
    return list(found.values())


def _held_by(value: Any) -> list[Any]:
    """What an object of the user's own classes holds; objects of libraries are not searched."""
    if type(value).__module__.partition(".")[0] in ("torch", "lightning", "pytorch_lightning", "builtins", "numpy"):
        return []
    return [each for name, each in getattr(value, "__dict__", {}).items() if name not in ("_trainer", "_fabric")]
