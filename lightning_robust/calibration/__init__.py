# SPDX-License-Identifier: Apache-2.0
"""Post-hoc calibration, confidences for selective classification, and reliability diagrams."""

from lightning_robust.calibration.diagram import reliability_figure, reliability_rows
from lightning_robust.calibration.logit_normalization import LogitNormalization, normalized_logit_score
from lightning_robust.calibration.temperature import TemperatureScaling

__all__ = [
    "LogitNormalization",
    "TemperatureScaling",
    "normalized_logit_score",
    "reliability_figure",
    "reliability_rows",
]
