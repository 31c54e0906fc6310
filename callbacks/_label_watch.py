# SPDX-License-Identifier: Apache-2.0
"""Noticing that a metric is given class probabilities in place of labels."""

from typing import Any

import lightning as L
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_robust.training.quiet import find_metrics
from lightning_robust.training.replaced import ReplacedMethod

__all__ = ["LabelWatch"]


class LabelWatch:
    """Watches, between enter and exit, which metrics of a module are updated with a tensor.

    Args:
        module: The LightningModule.
        labels: The tensor.
    """

    def __init__(self, module: L.LightningModule, labels: Tensor) -> None:
        self._module = module
        self._labels = labels
        self._watched: list[_Update] = []
        #: Names of the metrics that got it.
        self.found: set[str] = set()

    def __enter__(self) -> "LabelWatch":
        metrics = [metric for metric in find_metrics(self._module) if not isinstance(metric, MetricCollection)]
        self._watched = [_Update(metric, self._labels, self.found) for metric in metrics]
        return self

    def __exit__(self, *exception: object) -> None:
        while self._watched:
            self._watched.pop().remove()


class _Update(ReplacedMethod):
    def __init__(self, metric: Any, labels: Tensor, found: set[str]) -> None:
        super().__init__(metric, "update")
        self._labels = labels
        self._found = found

    @override
    def call(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # a detached view is the same labels
        if any(value.shape == self._labels.shape and value.data_ptr() == self._labels.data_ptr() for value in given):
            self._found.add(type(self.owner).__name__)
        return self.inner(*args, **kwargs)
