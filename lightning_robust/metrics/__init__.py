# SPDX-License-Identifier: Apache-2.0
"""Streaming metrics with constant memory: calibration of classifiers."""

from lightning_robust.metrics.accumulator import CalibrationAccumulator
from lightning_robust.metrics.calibration import (
    BrierScore,
    CalibrationError,
    NegativeLogLikelihood,
    TopLabelReliability,
)
from lightning_robust.metrics.reliability import ReliabilityTable, reliability_table

__all__ = [
    "BrierScore",
    "CalibrationAccumulator",
    "CalibrationError",
    "NegativeLogLikelihood",
    "ReliabilityTable",
    "TopLabelReliability",
    "reliability_table",
]
