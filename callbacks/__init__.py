# SPDX-License-Identifier: Apache-2.0
"""Callbacks that plug into any Trainer: they change the training step of any LightningModule, or watch it."""

from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.callbacks.calibration_monitor import CalibrationMonitor
from lightning_robust.callbacks.criterion import Criterion
from lightning_robust.callbacks.distillation import Distillation
from lightning_robust.callbacks.drop_schedule import DropSchedule
from lightning_robust.callbacks.feature_monitor import FeatureMonitor
from lightning_robust.callbacks.layer_aware_perturbation import LayerAwarePerturbation
from lightning_robust.callbacks.logit_regularization import LogitRegularization
from lightning_robust.callbacks.manifold_mixup import ManifoldMixup
from lightning_robust.callbacks.mesa import MESA
from lightning_robust.callbacks.mislabel_monitor import MislabelMonitor
from lightning_robust.callbacks.mixing import Mixing
from lightning_robust.callbacks.mixout import Mixout
from lightning_robust.callbacks.objective_training import ObjectiveTraining
from lightning_robust.callbacks.orthogonal_gradient import OrthogonalGradient
from lightning_robust.callbacks.overfitting_guard import OverfittingGuard
from lightning_robust.callbacks.overfitting_monitor import OverfittingMonitor
from lightning_robust.callbacks.robust_evaluation import RobustEvaluation
from lightning_robust.callbacks.robustness_monitor import RobustnessMonitor
from lightning_robust.callbacks.saf import SAF
from lightning_robust.callbacks.seeded_steps import SeededSteps
from lightning_robust.callbacks.sharpness_aware import SharpnessAware
from lightning_robust.callbacks.sharpness_monitor import SharpnessMonitor
from lightning_robust.callbacks.teacher_cache_writer import TeacherCacheWriter, TeacherPredictor
from lightning_robust.callbacks.teacher_caching import cache_teacher
from lightning_robust.callbacks.weight_regularization import WeightRegularization

__all__ = [
    "MESA",
    "SAF",
    "AdversarialTraining",
    "CalibrationMonitor",
    "Criterion",
    "Distillation",
    "DropSchedule",
    "FeatureMonitor",
    "LayerAwarePerturbation",
    "LogitRegularization",
    "ManifoldMixup",
    "MislabelMonitor",
    "Mixing",
    "Mixout",
    "ObjectiveTraining",
    "OrthogonalGradient",
    "OverfittingGuard",
    "OverfittingMonitor",
    "RobustEvaluation",
    "RobustnessMonitor",
    "SeededSteps",
    "SharpnessAware",
    "SharpnessMonitor",
    "TeacherCacheWriter",
    "TeacherPredictor",
    "WeightRegularization",
    "cache_teacher",
]
