# SPDX-License-Identifier: Apache-2.0
"""Objectives: whole training losses that own their forward passes."""

from lightning_robust.objectives.aaer import AAER, AbnormalExamples, aaer_loss, abnormal_examples
from lightning_robust.objectives.adversarial_cross_entropy import AdversarialCrossEntropy
from lightning_robust.objectives.arow import ARoW, arow_loss
from lightning_robust.objectives.avmixup import AVmixup, avmixup_images, avmixup_labels
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Prepared, Total
from lightning_robust.objectives.dafa import DAFA, dafa_loss
from lightning_robust.objectives.dafa_weights import dafa_sums, dafa_weights
from lightning_robust.objectives.elle import ELLE, elle_loss
from lightning_robust.objectives.elle_a import ELLEA
from lightning_robust.objectives.gairat import GAIRAT, gairat_weights
from lightning_robust.objectives.hat import HAT, hat_loss
from lightning_robust.objectives.mart import MART, mart_loss
from lightning_robust.objectives.score import SCORE
from lightning_robust.objectives.score_loss import score_bound, score_loss, score_pgd_loss
from lightning_robust.objectives.sovr import SOVR, TSOVR, important_samples, one_vs_rest, sovr_loss
from lightning_robust.objectives.trades import TRADES, trades_loss
from lightning_robust.objectives.weat import WEAT, energy_weights, weat_loss

__all__ = [
    "AAER",
    "DAFA",
    "ELLE",
    "ELLEA",
    "GAIRAT",
    "HAT",
    "MART",
    "SCORE",
    "SOVR",
    "TRADES",
    "TSOVR",
    "WEAT",
    "ARoW",
    "AVmixup",
    "AbnormalExamples",
    "AdversarialCrossEntropy",
    "Objective",
    "ObjectiveOutput",
    "Prepared",
    "Total",
    "aaer_loss",
    "abnormal_examples",
    "arow_loss",
    "avmixup_images",
    "avmixup_labels",
    "dafa_loss",
    "dafa_sums",
    "dafa_weights",
    "elle_loss",
    "energy_weights",
    "gairat_weights",
    "hat_loss",
    "important_samples",
    "mart_loss",
    "one_vs_rest",
    "score_bound",
    "score_loss",
    "score_pgd_loss",
    "sovr_loss",
    "trades_loss",
    "weat_loss",
]
