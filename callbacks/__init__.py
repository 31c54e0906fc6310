# SPDX-License-Identifier: Apache-2.0
"""Callbacks that plug into any Trainer: they change the training step of any LightningModule, or watch it."""

from lightning_robust.callbacks.adversarial_training import AdversarialTraining
from lightning_robust.callbacks.calibration_monitor import CalibrationMonitor
from lightning_robust.callbacks.distillation import Distillation
from lightning_robust.callbacks.logit_regularization import LogitRegularization
from lightning_robust.callbacks.objective_training import ObjectiveTraining
from lightning_robust.callbacks.robustness_monitor import RobustnessMonitor
from lightning_robust.callbacks.seeded_steps import SeededSteps
from lightning_robust.callbacks.sharpness_aware import SharpnessAware

__all__ = [
    "AdversarialTraining",
    "CalibrationMonitor",
    "Distillation",
    "LogitRegularization",
    "ObjectiveTraining",
    "RobustnessMonitor",
    "SeededSteps",
    "SharpnessAware",
]
