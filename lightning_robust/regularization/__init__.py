# SPDX-License-Identifier: Apache-2.0
"""Regularisers of weights and of drop rates over a run, for any training loop."""

from lightning_robust.regularization.auto_weight_decay import AutoWeightDecay, WeightDecayStep
from lightning_robust.regularization.base import WeightRegularizer
from lightning_robust.regularization.drop import drop_rate_at, drop_schedule
from lightning_robust.regularization.drop_layers import DropLayers
from lightning_robust.regularization.gor import GOR, group_orthogonality
from lightning_robust.regularization.mixout import mixout
from lightning_robust.regularization.names import NamePatterns
from lightning_robust.regularization.norm_loss import NormLoss, filter_norms, norm_loss

__all__ = [
    "GOR",
    "AutoWeightDecay",
    "DropLayers",
    "NamePatterns",
    "NormLoss",
    "WeightDecayStep",
    "WeightRegularizer",
    "drop_rate_at",
    "drop_schedule",
    "filter_norms",
    "group_orthogonality",
    "mixout",
    "norm_loss",
]
