# SPDX-License-Identifier: Apache-2.0
"""One switch that keeps repeated forward passes out of logs and metrics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torchmetrics import Metric, MetricCollection

__all__ = ["QuietGate"]


class QuietGate:
    """Replaces ``self.log`` and the ``update``/``forward`` of the module's metrics by versions that can be silenced.

    The replacements are installed once per fit and only a flag is flipped per pass: swapping attributes per pass would
    make a compiled module compile again. A silenced metric's ``forward`` returns the value of the pass that counted.

    Args:
        module: the LightningModule whose logging is guarded.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self.quiet = False
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Put the replacements in place."""
        self._replace(self.module, "log", self._gated(self.module.log, lambda: None))
        self._replace(self.module, "log_dict", self._gated(self.module.log_dict, lambda: None))
        for metric in self._metrics():
            self._replace(metric, "update", self._gated(metric.update, lambda: None))
            if isinstance(metric, Metric):
                self._replace(metric, "forward", self._gated(metric.forward, _cached(metric)))

    def remove(self) -> None:
        """Take them out again; doing so twice is harmless."""
        while self._replaced:
            owner, name, original = self._replaced.pop()
            if original is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = original

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Nothing is logged or counted inside."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def _metrics(self) -> list[Metric | MetricCollection]:
        # Metrics in a plain list or dictionary are no sub-modules, but people keep them there.
        found: dict[int, Metric | MetricCollection] = {}
        loose = [entry for value in vars(self.module).values() for entry in _entries(value)]
        for candidate in [*self.module.modules(), *loose]:
            if isinstance(candidate, Metric | MetricCollection):
                found[id(candidate)] = candidate
                if isinstance(candidate, MetricCollection):
                    found.update((id(metric), metric) for metric in candidate.values(copy_state=False))
        return list(found.values())

    def _gated(self, function: Callable[..., Any], silent: Callable[[], Any]) -> Callable[..., Any]:
        def gated(*args: Any, **kwargs: Any) -> Any:
            return silent() if self.quiet else function(*args, **kwargs)

        gated.__wrapped__ = function  # type: ignore[attr-defined]
        disabled: Callable[..., Any] = torch.compiler.disable(gated)  # type: ignore[no-untyped-call]
        return disabled

    def _replace(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        vars(owner)[name] = replacement


_ABSENT = object()


def _entries(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _cached(metric: Metric) -> Callable[[], Any]:
    return lambda: metric._forward_cache
