# SPDX-License-Identifier: Apache-2.0
"""Evaluate a trained classifier once and exactly: accuracy clean and attacked, calibration, and whether to trust it."""

from lightning_robust.evaluation.check import Check
from lightning_robust.evaluation.checks import run_checks
from lightning_robust.evaluation.evaluate import evaluate
from lightning_robust.evaluation.evaluate_robustness import evaluate_robustness
from lightning_robust.evaluation.evaluator import RobustnessEvaluator
from lightning_robust.evaluation.linear_probe import LinearProbe, linear_probe, quarter_turns
from lightning_robust.evaluation.progress import RobustnessProgress
from lightning_robust.evaluation.report import AttackReport, ClassReport, RobustnessReport, StageReport
from lightning_robust.evaluation.report_build import build_report
from lightning_robust.evaluation.report_picture import robustness_figure
from lightning_robust.evaluation.report_view import print_report, report_view
from lightning_robust.evaluation.result import EvaluationResult
from lightning_robust.evaluation.shard import Shard, merge_shards
from lightning_robust.evaluation.state import load_points

__all__ = [
    "AttackReport",
    "Check",
    "ClassReport",
    "EvaluationResult",
    "LinearProbe",
    "RobustnessEvaluator",
    "RobustnessProgress",
    "RobustnessReport",
    "Shard",
    "StageReport",
    "build_report",
    "evaluate",
    "evaluate_robustness",
    "linear_probe",
    "load_points",
    "merge_shards",
    "print_report",
    "quarter_turns",
    "report_view",
    "robustness_figure",
    "run_checks",
]
