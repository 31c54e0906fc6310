# SPDX-License-Identifier: Apache-2.0
"""Losses on logits: criteria that see the target, and penalties that do not. Plain PyTorch."""

from lightning_robust.losses.absolute_error import MAE, RCE, SCE, mae_loss, rce_loss
from lightning_robust.losses.acls import ACLS, acls_penalty
from lightning_robust.losses.active_passive import ActivePassive
from lightning_robust.losses.adafocal import AdaFocal, adafocal_gammas, adafocal_loss
from lightning_robust.losses.brier import Brier, brier_loss
from lightning_robust.losses.comp_sum import CompSum, comp_sum_loss
from lightning_robust.losses.confidence_penalty import ConfidencePenalty, negative_entropy
from lightning_robust.losses.cpc import CPC, binary_discrimination, binary_exclusion
from lightning_robust.losses.criterion import CONTEXT, Criterion, SampleCriterion
from lightning_robust.losses.cross_entropy import CrossEntropy, cross_entropy
from lightning_robust.losses.decoupled_mixup import DecoupledMixup, decoupled_mixup_loss
from lightning_robust.losses.dual_focal import DualFocal, dual_focal_loss
from lightning_robust.losses.elr import ELR, elr_loss, elr_ramp, elr_update
from lightning_robust.losses.focal import FLSD, Focal, flsd_loss, focal_loss
from lightning_robust.losses.gce import GCE, gce_loss
from lightning_robust.losses.group_dro import GroupDRO, group_weights
from lightning_robust.losses.ldr import ALDRKL, LDRKL, adapted_lambda, ldr_loss, ldr_scores
from lightning_robust.losses.logit_clip import LogitClip, clip_logits
from lightning_robust.losses.logit_norm import LogitNorm, normalized_logits
from lightning_robust.losses.logit_penalty import LogitPenalty, logit_norm_penalty
from lightning_robust.losses.margin_bias import MarginBias
from lightning_robust.losses.margin_penalty import CALS, MbLS, margin_penalty
from lightning_robust.losses.maxsup import MaxSup, maxsup_penalty
from lightning_robust.losses.mmce import MMCE, mmce, weighted_mmce
from lightning_robust.losses.normalised import NCE, NFL, NGCE, nce_loss, nfl_loss, ngce_loss
from lightning_robust.losses.oko import OKO, oko_loss
from lightning_robust.losses.online_label_smoothing import OnlineLabelSmoothing
from lightning_robust.losses.poly import PolyLoss, poly_loss
from lightning_robust.losses.precision import autocast_off, full_precision
from lightning_robust.losses.probability_distance import probability_distance
from lightning_robust.losses.ps_kd import PSKD, pskd_targets
from lightning_robust.losses.regularizers import LogitRegularizer
from lightning_robust.losses.smoothing import label_smoothing_of
from lightning_robust.losses.soft_ece import SoftECE, soft_binned_ece
from lightning_robust.losses.sparsemax import Sparsemax, sparsemax, sparsemax_loss
from lightning_robust.losses.stablemax import (
    StableMax,
    log_stablemax,
    stable_exp,
    stablemax,
    stablemax_cross_entropy,
)
from lightning_robust.losses.table import SampleTable
from lightning_robust.losses.target import MixedTarget, Target
from lightning_robust.losses.truncated_gce import TruncatedGCE
from lightning_robust.losses.vs_loss import VSLoss, vs_logits, vs_loss
from lightning_robust.schedules import Constant, Cosine, Linear, Piecewise, Schedule

__all__ = [
    "ACLS",
    "ALDRKL",
    "CALS",
    "CONTEXT",
    "CPC",
    "ELR",
    "FLSD",
    "GCE",
    "LDRKL",
    "MAE",
    "MMCE",
    "NCE",
    "NFL",
    "NGCE",
    "OKO",
    "PSKD",
    "RCE",
    "SCE",
    "ActivePassive",
    "AdaFocal",
    "Brier",
    "CompSum",
    "ConfidencePenalty",
    "Constant",
    "Cosine",
    "Criterion",
    "CrossEntropy",
    "DecoupledMixup",
    "DualFocal",
    "Focal",
    "GroupDRO",
    "Linear",
    "LogitClip",
    "LogitNorm",
    "LogitPenalty",
    "LogitRegularizer",
    "MarginBias",
    "MaxSup",
    "MbLS",
    "MixedTarget",
    "OnlineLabelSmoothing",
    "Piecewise",
    "PolyLoss",
    "SampleCriterion",
    "SampleTable",
    "Schedule",
    "SoftECE",
    "Sparsemax",
    "StableMax",
    "Target",
    "TruncatedGCE",
    "VSLoss",
    "acls_penalty",
    "adafocal_gammas",
    "adafocal_loss",
    "adapted_lambda",
    "autocast_off",
    "binary_discrimination",
    "binary_exclusion",
    "brier_loss",
    "clip_logits",
    "comp_sum_loss",
    "cross_entropy",
    "decoupled_mixup_loss",
    "dual_focal_loss",
    "elr_loss",
    "elr_ramp",
    "elr_update",
    "flsd_loss",
    "focal_loss",
    "full_precision",
    "gce_loss",
    "group_weights",
    "label_smoothing_of",
    "ldr_loss",
    "ldr_scores",
    "log_stablemax",
    "logit_norm_penalty",
    "mae_loss",
    "margin_penalty",
    "maxsup_penalty",
    "mmce",
    "nce_loss",
    "negative_entropy",
    "nfl_loss",
    "ngce_loss",
    "normalized_logits",
    "oko_loss",
    "poly_loss",
    "probability_distance",
    "pskd_targets",
    "rce_loss",
    "soft_binned_ece",
    "sparsemax",
    "sparsemax_loss",
    "stable_exp",
    "stablemax",
    "stablemax_cross_entropy",
    "vs_logits",
    "vs_loss",
    "weighted_mmce",
]
