# SPDX-License-Identifier: Apache-2.0
"""Objectives: whole training losses that own their forward passes."""

from lightning_robust.objectives.aaer import AAER, AbnormalExamples, aaer_loss, abnormal_examples
from lightning_robust.objectives.adaad import AdaAD, AdaIAD, adaad_loss
from lightning_robust.objectives.adr import ADR, adr_targets
from lightning_robust.objectives.adversarial_cross_entropy import AdversarialCrossEntropy
from lightning_robust.objectives.ard import ARD, ard_loss
from lightning_robust.objectives.arow import ARoW, arow_loss
from lightning_robust.objectives.arrest import ARREST, arrest_loss, noisy_replay
from lightning_robust.objectives.avmixup import AVmixup, avmixup_images, avmixup_labels
from lightning_robust.objectives.balance_picture import balance_figure
from lightning_robust.objectives.balance_rules import balanced_temperatures, balanced_weights, entropies
from lightning_robust.objectives.balances import LossBalance, TemperatureBalance
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Prepared, Running, Total
from lightning_robust.objectives.dafa import DAFA, dafa_loss
from lightning_robust.objectives.dafa_weights import dafa_sums, dafa_weights
from lightning_robust.objectives.elle import ELLE, elle_loss
from lightning_robust.objectives.elle_a import ELLEA
from lightning_robust.objectives.gairat import GAIRAT, gairat_weights
from lightning_robust.objectives.hat import HAT, hat_loss
from lightning_robust.objectives.iad import IADI, IADII
from lightning_robust.objectives.iad_loss import iad_i_loss, iad_ii_loss, iad_trust
from lightning_robust.objectives.igdm import IGDM, igdm_loss
from lightning_robust.objectives.ltd import LTD, ltd_targets
from lightning_robust.objectives.mart import MART, mart_loss
from lightning_robust.objectives.mtard import MTARD
from lightning_robust.objectives.mtard_loss import mtard_loss
from lightning_robust.objectives.rslad import RSLAD, rslad_loss
from lightning_robust.objectives.saad import SAAD, saad_loss, saad_weights
from lightning_robust.objectives.score import SCORE
from lightning_robust.objectives.score_loss import score_bound, score_loss, score_pgd_loss
from lightning_robust.objectives.sovr import SOVR, TSOVR, important_samples, one_vs_rest, sovr_loss
from lightning_robust.objectives.srst_awr import SRSTAWR, SRSTAWRParts, srst_awr_loss
from lightning_robust.objectives.targets import SoftTargets
from lightning_robust.objectives.trades import TRADES, trades_loss
from lightning_robust.objectives.weat import WEAT, energy_weights, weat_loss

__all__ = [
    "AAER",
    "ADR",
    "ARD",
    "ARREST",
    "DAFA",
    "ELLE",
    "ELLEA",
    "GAIRAT",
    "HAT",
    "IADI",
    "IADII",
    "IGDM",
    "LTD",
    "MART",
    "MTARD",
    "RSLAD",
    "SAAD",
    "SCORE",
    "SOVR",
    "SRSTAWR",
    "TRADES",
    "TSOVR",
    "WEAT",
    "ARoW",
    "AVmixup",
    "AbnormalExamples",
    "AdaAD",
    "AdaIAD",
    "AdversarialCrossEntropy",
    "LossBalance",
    "Objective",
    "ObjectiveOutput",
    "Prepared",
    "Running",
    "SRSTAWRParts",
    "SoftTargets",
    "TemperatureBalance",
    "Total",
    "aaer_loss",
    "abnormal_examples",
    "adaad_loss",
    "adr_targets",
    "ard_loss",
    "arow_loss",
    "arrest_loss",
    "avmixup_images",
    "avmixup_labels",
    "balance_figure",
    "balanced_temperatures",
    "balanced_weights",
    "dafa_loss",
    "dafa_sums",
    "dafa_weights",
    "elle_loss",
    "energy_weights",
    "entropies",
    "gairat_weights",
    "hat_loss",
    "iad_i_loss",
    "iad_ii_loss",
    "iad_trust",
    "igdm_loss",
    "important_samples",
    "ltd_targets",
    "mart_loss",
    "mtard_loss",
    "noisy_replay",
    "one_vs_rest",
    "rslad_loss",
    "saad_loss",
    "saad_weights",
    "score_bound",
    "score_loss",
    "score_pgd_loss",
    "sovr_loss",
    "srst_awr_loss",
    "trades_loss",
    "weat_loss",
]
