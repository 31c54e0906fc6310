# SPDX-License-Identifier: Apache-2.0
"""Post-hoc calibration and reliability diagrams."""

from lightning_robust.calibration.diagram import reliability_figure, reliability_rows
from lightning_robust.calibration.temperature import TemperatureScaling

__all__ = ["TemperatureScaling", "reliability_figure", "reliability_rows"]
