# SPDX-License-Identifier: Apache-2.0
"""The step pipeline and its guards: the only place that touches Lightning's training step."""

from lightning_robust.training.batches import BatchAdapter, RepeatableBatch, loss_of, replace_loss
from lightning_robust.training.callback import StepCallback
from lightning_robust.training.context import RunStep, StepContext, derive_seed
from lightning_robust.training.evaluation_indices import EvaluationIndices
from lightning_robust.training.features import FeatureCapture, FeaturesNotCaptured
from lightning_robust.training.indices import SampleIndices
from lightning_robust.training.logits import LogitsCapture, LogitsFunction, LogitsNotCaptured
from lightning_robust.training.per_sample import PerSampleCallback
from lightning_robust.training.pipeline import StepPipeline
from lightning_robust.training.quiet import QuietGate
from lightning_robust.training.replaced import ReplacedMethod
from lightning_robust.training.stages import REASONS, Stage

__all__ = [
    "REASONS",
    "BatchAdapter",
    "EvaluationIndices",
    "FeatureCapture",
    "FeaturesNotCaptured",
    "LogitsCapture",
    "LogitsFunction",
    "LogitsNotCaptured",
    "PerSampleCallback",
    "QuietGate",
    "RepeatableBatch",
    "ReplacedMethod",
    "RunStep",
    "SampleIndices",
    "Stage",
    "StepCallback",
    "StepContext",
    "StepPipeline",
    "derive_seed",
    "loss_of",
    "replace_loss",
]
