# SPDX-License-Identifier: Apache-2.0
"""Evaluate a trained classifier once and exactly: accuracy clean and attacked, calibration before and after scaling."""

from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.evaluate import evaluate
from lightning_robust.evaluation.result import EvaluationResult

__all__ = ["Check", "EvaluationResult", "evaluate"]
