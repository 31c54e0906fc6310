# SPDX-License-Identifier: Apache-2.0
"""Taking features and logits out of a validation or test step at the moment it returns."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_robust.callbacks._evaluation_tap import EvaluationTap
from lightning_robust.training import FeatureCapture, FeaturesNotCaptured

__all__ = ["FeatureTap"]


class FeatureTap(EvaluationTap):
    """Keeps the features of an evaluation step beside its logits.

    Args:
        pl_module: The module whose step is watched.
        step: ``"validation_step"`` or ``"test_step"``.
        logits_from: Dotted name of the sub-module whose output is the logits; found by itself when not given.
        features: What remembers the features; attached already.
    """

    def __init__(
        self, pl_module: L.LightningModule, step: str, logits_from: str | None, features: FeatureCapture
    ) -> None:
        super().__init__(pl_module, step, logits_from)
        self._features = features
        self._found: Tensor | FeaturesNotCaptured | None = None

    @override
    def watch(self, run: Callable[[], Any]) -> Any:
        self._features.clear()
        self._features.active = True
        try:
            output = super().watch(run)
        finally:
            self._features.active = False
        if isinstance(self._taken, Tensor):
            try:
                self._found = self._features.take(self._taken)
            except FeaturesNotCaptured as error:  # raised where the features are asked for
                self._found = error
        self._features.clear()
        return output

    def take_both(self) -> tuple[Tensor, Tensor]:
        """Features and logits of the last step, once."""
        logits = self.take()
        found, self._found = self._found, None
        if isinstance(found, FeaturesNotCaptured):
            raise found
        assert found is not None, "found with the logits"
        return found, logits
