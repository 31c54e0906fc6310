# SPDX-License-Identifier: Apache-2.0
"""Streaming metrics: calibration of classifiers in constant memory, and selective classification."""

from lightning_robust.metrics.accumulator import CalibrationAccumulator
from lightning_robust.metrics.aum import (
    MarginTable,
    ThresholdSamples,
    assign_threshold_samples,
    flag_suspicious,
    logit_margin,
)
from lightning_robust.metrics.calibration import (
    BrierScore,
    CalibrationError,
    NegativeLogLikelihood,
    TopLabelReliability,
)
from lightning_robust.metrics.class_separation import ClassSeparation, Separation, class_separation
from lightning_robust.metrics.effective_rank import EffectiveRank, Ranks, effective_rank, stable_rank
from lightning_robust.metrics.feature_sums import FeatureAccumulator, FeatureSums, feature_sums
from lightning_robust.metrics.negative_flips import FlipCounts, NegativeFlipRate, RelativeNegativeFlipRate
from lightning_robust.metrics.neural_collapse import (
    Collapse,
    NeuralCollapse,
    centred_means,
    class_distance_variance,
    nearest_mean_disagreement,
    within_class_variability,
)
from lightning_robust.metrics.oui import ActivationPatterns, draw_pairs, oui
from lightning_robust.metrics.reliability import ReliabilityTable, reliability_table
from lightning_robust.metrics.selective import (
    RiskCoverage,
    augrc,
    aurc,
    confidence_score,
    excess_aurc,
    risk_coverage_curve,
)
from lightning_robust.metrics.selective_metrics import AUGRC, AURC, ExcessAURC, SelectiveAccumulator
from lightning_robust.metrics.simplex import equiangularity, equinorm, self_duality, simplex_error

__all__ = [
    "AUGRC",
    "AURC",
    "ActivationPatterns",
    "BrierScore",
    "CalibrationAccumulator",
    "CalibrationError",
    "ClassSeparation",
    "Collapse",
    "EffectiveRank",
    "ExcessAURC",
    "FeatureAccumulator",
    "FeatureSums",
    "FlipCounts",
    "MarginTable",
    "NegativeFlipRate",
    "NegativeLogLikelihood",
    "NeuralCollapse",
    "Ranks",
    "RelativeNegativeFlipRate",
    "ReliabilityTable",
    "RiskCoverage",
    "SelectiveAccumulator",
    "Separation",
    "ThresholdSamples",
    "TopLabelReliability",
    "assign_threshold_samples",
    "augrc",
    "aurc",
    "centred_means",
    "class_distance_variance",
    "class_separation",
    "confidence_score",
    "draw_pairs",
    "effective_rank",
    "equiangularity",
    "equinorm",
    "excess_aurc",
    "feature_sums",
    "flag_suspicious",
    "logit_margin",
    "nearest_mean_disagreement",
    "oui",
    "reliability_table",
    "risk_coverage_curve",
    "self_duality",
    "simplex_error",
    "stable_rank",
    "within_class_variability",
]
