# SPDX-License-Identifier: Apache-2.0
"""Losses on logits: criteria that see the target, and penalties that do not. Plain PyTorch."""

from lightning_robust.losses.criterion import Criterion
from lightning_robust.losses.cross_entropy import CrossEntropy, cross_entropy
from lightning_robust.losses.logit_penalty import LogitPenalty, logit_norm_penalty
from lightning_robust.losses.maxsup import MaxSup, maxsup_penalty
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.probability_distance import probability_distance
from lightning_robust.losses.regularizers import LogitRegularizer
from lightning_robust.losses.stablemax import (
    StableMax,
    log_stablemax,
    stable_exp,
    stablemax,
    stablemax_cross_entropy,
)
from lightning_robust.losses.vs_loss import VSLoss, vs_logits, vs_loss
from lightning_robust.schedules import Constant, Cosine, Linear, Piecewise, Schedule

__all__ = [
    "Constant",
    "Cosine",
    "Criterion",
    "CrossEntropy",
    "Linear",
    "LogitPenalty",
    "LogitRegularizer",
    "MaxSup",
    "Piecewise",
    "Schedule",
    "StableMax",
    "VSLoss",
    "autocast_off",
    "cross_entropy",
    "full_precision",
    "log_stablemax",
    "logit_norm_penalty",
    "maxsup_penalty",
    "probability_distance",
    "stable_exp",
    "stablemax",
    "stablemax_cross_entropy",
    "vs_logits",
    "vs_loss",
]
