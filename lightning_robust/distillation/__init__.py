# SPDX-License-Identifier: Apache-2.0
"""Teachers and the losses that compare a student with them."""

from lightning_robust.distillation.bank import Source, TeacherBank
from lightning_robust.distillation.cache import TeacherCache
from lightning_robust.distillation.dhkd import DHKD, align_gradients, binary_kl, binary_kl_norm
from lightning_robust.distillation.dist import DIST, dist_loss
from lightning_robust.distillation.dkd import DKD, dkd_loss
from lightning_robust.distillation.feature_base import FeatureDistillationLoss
from lightning_robust.distillation.feature_losses import FeatureAngle, FeatureCosine, FeatureMSE
from lightning_robust.distillation.feature_relations import RKD, AttentionTransfer
from lightning_robust.distillation.features import (
    angular_distance,
    attention_map,
    attention_transfer_loss,
    cosine_distance,
    rkd_angle_loss,
    rkd_distance_loss,
)
from lightning_robust.distillation.fkd import FKD, FerKD, ferkd_labels
from lightning_robust.distillation.focal import FocalDistillation, focal_distillation_loss
from lightning_robust.distillation.focal_logits import FocalLogitMatching, focal_logit_matching_loss
from lightning_robust.distillation.kd import KD, kd_loss
from lightning_robust.distillation.layers import LayerOutputs
from lightning_robust.distillation.losses import DistillationLoss, SampleDistillationLoss
from lightning_robust.distillation.nkd import NKD, nkd_loss
from lightning_robust.distillation.pld import PLD, pld_loss
from lightning_robust.distillation.self_distillation import SelfDistillation, self_distillation_loss
from lightning_robust.distillation.soft_labels import compress_soft_labels, recover_soft_labels
from lightning_robust.distillation.sources import Network, TeacherSource, build_teacher
from lightning_robust.distillation.squared_error import SquaredErrorLogit, squared_error_logit_loss
from lightning_robust.distillation.teacher import Teacher, fingerprint
from lightning_robust.distillation.uskd import USKD, uskd_loss

__all__ = [
    "DHKD",
    "DIST",
    "DKD",
    "FKD",
    "KD",
    "NKD",
    "PLD",
    "RKD",
    "USKD",
    "AttentionTransfer",
    "DistillationLoss",
    "FeatureAngle",
    "FeatureCosine",
    "FeatureDistillationLoss",
    "FeatureMSE",
    "FerKD",
    "FocalDistillation",
    "FocalLogitMatching",
    "LayerOutputs",
    "Network",
    "SampleDistillationLoss",
    "SelfDistillation",
    "Source",
    "SquaredErrorLogit",
    "Teacher",
    "TeacherBank",
    "TeacherCache",
    "TeacherSource",
    "align_gradients",
    "angular_distance",
    "attention_map",
    "attention_transfer_loss",
    "binary_kl",
    "binary_kl_norm",
    "build_teacher",
    "compress_soft_labels",
    "cosine_distance",
    "dist_loss",
    "dkd_loss",
    "ferkd_labels",
    "fingerprint",
    "focal_distillation_loss",
    "focal_logit_matching_loss",
    "kd_loss",
    "nkd_loss",
    "pld_loss",
    "recover_soft_labels",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "self_distillation_loss",
    "squared_error_logit_loss",
    "uskd_loss",
]
