"""Every exported distillation loss, as tests can build and call it."""

import inspect

import torch

from lightning_robust import distillation
from lightning_robust.distillation import DistillationLoss, FeatureDistillationLoss, SampleDistillationLoss

ABSTRACT = {DistillationLoss, FeatureDistillationLoss, SampleDistillationLoss}

# What a loss needs besides its defaults; some bring what makes a test sharper.
OPTIONS = {
    "DKD": {"alpha": 0.7, "beta": 2.0},
    "FKD": {"k": 2},
    "FerKD": {"soften_below": 0.6, "discard_below": 0.4},
}

NAMES = [
    name
    for name in distillation.__all__
    if inspect.isclass(kind := getattr(distillation, name))
    and issubclass(kind, DistillationLoss)
    and kind not in ABSTRACT
    and not issubclass(kind, FeatureDistillationLoss)
]

SAMPLE_NAMES = [name for name in NAMES if issubclass(getattr(distillation, name), SampleDistillationLoss)]


def build(name):
    return getattr(distillation, name)(**OPTIONS.get(name, {}))


def call(loss, student, teacher, labels):
    """As the callback does: labels only where they are needed."""
    return loss(student, teacher, labels) if loss.needs_target else loss(student, teacher)


def logits(seed, *shape, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def labels(seed, classes, *shape):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


FEATURE_OPTIONS = {
    "AttentionTransfer": {"student_layer": "a"},
    "DHKD": {"width": 5, "num_classes": 4},
    "FeatureMSE": {"student_width": 5, "teacher_width": 5},
    "USKD": {"layer": "a", "width": 5, "num_classes": 4},
}
OPTIONS |= FEATURE_OPTIONS

# Those that look into the networks, or train parts of their own.
FEATURE_NAMES = [
    name
    for name in distillation.__all__
    if inspect.isclass(kind := getattr(distillation, name))
    and issubclass(kind, FeatureDistillationLoss)
    and kind not in ABSTRACT
]


def call_with_features(loss, dtype=torch.float32):
    """The value, and what went in from the student and from the teacher."""
    mine, others = (logits(seed, 6, 4, dtype=dtype).requires_grad_() for seed in (0, 1))
    seen, taught = (logits(seed, 6, 5, 3, 2, dtype=dtype).requires_grad_() for seed in (2, 3))
    value = loss(
        mine,
        others if loss.needs_teacher else None,
        labels(0, 4, 6) if loss.needs_target else None,
        student_features=[seen],
        teacher_features=[taught] if loss.teacher_layers else [],
    )
    return value, {"student": [mine, seen], "teacher": [others, taught]}
