# SPDX-License-Identifier: Apache-2.0
"""Teachers and the losses that compare a student with them."""

from lightning_robust.distillation.kd import KD, kd_loss
from lightning_robust.distillation.losses import DistillationLoss
from lightning_robust.distillation.sources import Network, build_teacher
from lightning_robust.distillation.teacher import Teacher, fingerprint

__all__ = ["KD", "DistillationLoss", "Network", "Teacher", "build_teacher", "fingerprint", "kd_loss"]
